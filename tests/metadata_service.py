"""The metadata service of a spot machine on AWS and Google Cloud, by as much as its notice of an end needs."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token-of-this-service"


class MetadataService:
    """At `url`. `ends`: whether it tells that its machine is about to be taken back; `asked`: which paths were."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ends = False
        self.asked: list[str] = []

    def answer_to(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Status and body, as documented for version 2 of AWS's service, which takes no request without a token."""
        self.asked.append(path)
        match method, path:
            case "PUT", "/latest/api/token":
                is_right = 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600
                return (200, TOKEN) if is_right else (400, "")
            case "GET", "/latest/meta-data/spot/instance-action":
                if headers.get("X-aws-ec2-metadata-token") != TOKEN:
                    return 401, ""
                notice = {"action": "terminate", "time": "2026-11-27T08:22:00Z"}
                return (200, json.dumps(notice)) if self.ends else (404, "<html>404 - Not Found</html>")
            case "GET", "/computeMetadata/v1/instance/preempted":
                if headers.get("Metadata-Flavor") != "Google":
                    return 403, ""
                return 200, str(self.ends).upper()
        return 404, ""


@contextmanager
def metadata_service() -> Iterator[MetadataService]:
    """On loopback, for as long as one is in it."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            status, body = service.answer_to(self.command, self.path, dict(self.headers.items()))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *given: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        service = MetadataService(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield service
        server.shutdown()
