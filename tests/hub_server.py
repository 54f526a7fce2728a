"""A hub in this process, by as much of the protocol as looking up and downloading need."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


class HubHandler(BaseHTTPRequestHandler):
    """Answers as the hub does; what is asked for is a subclass's `do_GET`."""

    def do_HEAD(self):
        self.do_GET()

    def answer(self, body, *, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_file(self, content):
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    def log_message(self, *given):
        pass


@contextmanager
def asked_instead(handler, monkeypatch, cache: Path) -> Iterator[None]:
    """While in it, huggingface_hub asks a server with this handler, and keeps what it downloads in `cache`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        url = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("NO_PROXY", "*")
        yield
        server.shutdown()


@contextmanager
def serving(folders: dict[str, Path], monkeypatch, cache: Path) -> Iterator[list[str]]:
    """While in it, huggingface_hub asks a server of this process; gives the requests so far.

    Args:
        folders: owner/name -> the files of its one commit, COMMIT, which every branch is at.
        monkeypatch: pytest's.
        cache: where huggingface_hub keeps what it downloads.
    """
    asked: list[str] = []

    class Handler(HubHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            for name, folder in folders.items():
                if self.path.startswith(f"/api/models/{name}"):
                    return self._describe(name, folder)
                for revision in (COMMIT, "main"):
                    if self.path.startswith(start := f"/{name}/resolve/{revision}/"):
                        return self._send_file(folder / self.path.removeprefix(start))
            return self.answer(b"{}", status=404, **{"X-Error-Code": "RepoNotFound"})

        def _describe(self, name, folder):
            files = sorted(path for path in folder.iterdir() if path.is_file())
            if "/tree/" in self.path:
                found = [{"type": "file", "path": each.name, "size": each.stat().st_size, "oid": "0"} for each in files]
                return self.answer(json.dumps(found).encode())
            config = json.loads((folder / "config.json").read_text())
            siblings = [{"rfilename": each.name} for each in files]
            model = {"id": name, "sha": COMMIT, "config": config, "siblings": siblings}
            return self.answer(json.dumps(model).encode())

        def _send_file(self, path):
            if not path.is_file():
                return self.answer(b"{}", status=404, **{"X-Error-Code": "EntryNotFound"})
            return self.answer_file(path.read_bytes())

    with asked_instead(Handler, monkeypatch, cache):
        yield asked
