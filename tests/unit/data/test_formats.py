"""Formats of text: packed lines, tables, folders of `datasets` and the hub hold the same documents."""

import gzip
import hashlib
import json
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, HubHandler, asked_instead

from raysweep.data.files import digests_of, resolve, sampled, sizes_of
from raysweep.data.formats import read_jsonl, read_texts
from raysweep.data.text import Domain
from raysweep.errors import DataError
from raysweep.spec import fingerprint

TEXTS = [f"Dokument {index}: wörter, ⅔ und \n mehr." for index in range(700)]
CHANGED = "was changed since the sweep was loaded"


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def lines(texts=TEXTS, column="text") -> bytes:
    return "\n".join(json.dumps({"id": number, column: text}) for number, text in enumerate(texts)).encode()


def table(texts=TEXTS, column="text", kind=None) -> pa.Table:
    return pa.table({"id": range(len(texts)), column: pa.array(texts, kind or pa.string())})


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=100)


def save_as_datasets_does(folder: Path, *tables: pa.Table) -> None:
    """As `Dataset.save_to_disk`; the library itself is compared below where it is installed."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(tables):05}.arrow" for number in range(len(tables))]
    for name, part in zip(names, tables, strict=True):
        write_arrow(folder / name, part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


@pytest.fixture
def folder(tmp_path) -> Path:
    """The same documents in every format."""
    (tmp_path / "a.jsonl").write_bytes(lines())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(lines()))
    # As pzstd and `cat` make them: several frames in one file.
    (tmp_path / "frames.jsonl.zst").write_bytes(zstd(lines(TEXTS[:300]) + b"\n") + zstd(lines(TEXTS[300:])))
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=200)
    for name, kind in (("large", pa.large_string()), ("words", pa.dictionary(pa.int32(), pa.string()))):
        pq.write_table(table().set_column(1, "text", table()["text"].cast(kind)), tmp_path / f"{name}.parquet")
    save_as_datasets_does(tmp_path / "saved", table(TEXTS[:300]), table(TEXTS[300:]))
    return tmp_path


PACKED = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "frames.jsonl.zst"]
TABLES = ["a.parquet", "large.parquet", "words.parquet", "saved"]


@pytest.mark.parametrize("name", PACKED + TABLES)
def test_every_format_holds_the_same_documents(folder, name):
    domain = Domain(train=name).pin(folder)
    assert [text for _, text in domain.split_documents("train", "valid")] == TEXTS
    assert set(domain.documents("train")) == set(Domain(train="a.jsonl").pin(folder).documents("train"))
    assert "_data_files" not in str(domain.train)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet", "saved"])
def test_a_file_that_was_changed_is_named(folder, name):
    domain = Domain(train=name).pin(folder)
    before = Path(domain.train[-1]).read_bytes()
    others = {"a.jsonl.zst": zstd(lines(TEXTS[1:])), "a.parquet": before.replace(b"Dokument", b"Document")}
    for content in (others.get(name, before.replace(b"Dokument", b"Document")), before[: len(before) // 2]):
        Path(domain.train[-1]).write_bytes(content)
        with pytest.raises(DataError, match=CHANGED):
            list(domain.documents("train"))
    Path(domain.train[-1]).unlink()
    with pytest.raises(DataError, match="is gone since"):
        list(domain.documents("train"))


def test_plain_text_may_be_packed_with_zstd(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"Ein Text. " * 9))
    assert list(read_texts(sampled("a.txt.zst", tmp_path))) == ["Ein Text. " * 9]


def test_tasks_read_zstd_too(folder):
    assert [line["text"] for _, line in read_jsonl(str(folder / "a.jsonl.zst"))] == TEXTS


def test_the_column_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(column="content"))
    pq.write_table(table(column="content"), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        domain = Domain(train=name, column="content").pin(tmp_path)
        assert [text for _, text in domain.split_documents("train", "valid")] == TEXTS
    with pytest.raises(DataError, match=r"a\.parquet: no column 'text' of strings; columns: id \(int64\), content"):
        Domain(train="a.parquet").pin(tmp_path)
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field 'text' with a string; fields: id, content"):
        Domain(train="a.jsonl").pin(tmp_path)
    with pytest.raises(DataError, match=r"no column 'id' of strings"):
        Domain(train="a.parquet", column="id").pin(tmp_path)


def test_a_name_by_which_the_same_bytes_are_read_otherwise_is_identity(folder):
    """A line each, or one document."""
    (folder / "a.txt").write_bytes((folder / "a.jsonl").read_bytes())
    (folder / "b.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    of_lines, renamed, of_one = (Domain(train=name).pin(folder) for name in ("a.jsonl", "b.jsonl", "a.txt"))
    assert fingerprint(renamed) == fingerprint(of_lines)
    assert fingerprint(of_one) != fingerprint(of_lines)


def test_fields_that_are_left_out_change_no_identity(folder):
    plain = Domain(train="a.jsonl").pin(folder)
    assert fingerprint(plain) == fingerprint(plain.with_(column="text", tag=None, length_quantiles=None))
    assert fingerprint(plain) != fingerprint(plain.with_(column="id"))
    assert fingerprint(plain) != fingerprint(plain.with_(tag="<|a|>"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl.zst", zstd(lines())[:200], "Truncated"),
        ("x.jsonl.zst", b"no zstd", "cannot be read"),
        ("x.jsonl.zst", zstd(b'{"text": 1}'), r"x\.jsonl\.zst:1: no field 'text' with a string"),
        ("x.parquet", b"no parquet, and long enough to hold one", "cannot be read"),
        ("x.arrow", b"ARROW1\0\0 of another kind", "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        sampled(name, tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_a_row_without_text_is_named(tmp_path):
    pq.write_table(table(["a", "b", None]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: row 3: column 'text' is null"):
        list(read_texts([str(tmp_path / "x.parquet")]))


def test_a_folder_of_several_splits_says_which(tmp_path):
    for split in ("train", "test"):
        save_as_datasets_does(tmp_path / "all" / split, table())
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"'all' holds several splits \(test, train\); name one, such as 'all/train'"):
        resolve("all", tmp_path)
    assert len(resolve("all/train", tmp_path)) == 1


def test_a_name_that_no_file_can_have_matches_none(tmp_path):
    with pytest.raises(DataError, match="no file matches 'aaa"):
        resolve("a" * 300, tmp_path)


def test_a_folder_that_datasets_did_not_write(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "state.json").write_text('{"files": []}')
    with pytest.raises(DataError, match=r"state\.json: not as Dataset\.save_to_disk writes it \(KeyError"):
        resolve("odd", tmp_path)


def test_what_the_library_itself_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    saved.save_to_disk(str(tmp_path / "plain"), num_shards=3)
    saved.select(range(0, 700, 7)).save_to_disk(str(tmp_path / "chosen"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "dict"))
    assert list(read_texts(resolve("plain", tmp_path))) == TEXTS
    assert list(read_texts(resolve("chosen", tmp_path))) == TEXTS[::7]
    assert list(read_texts(resolve("dict/train", tmp_path))) == TEXTS


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub that serves one data set, by as much of the protocol as reading needs; what it was asked for."""
    files = {"data/train-0.parquet": (folder / "a.parquet").read_bytes(), "valid.jsonl": lines(TEXTS[:9])}
    asked = []

    class Handler(HubHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            if self.path.startswith("/api/datasets/owner/name"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
            name = unquote(self.path.removeprefix(f"/datasets/owner/name/resolve/{COMMIT}/"))
            if name not in files:
                return self.answer(b"{}", status=404)
            return self.answer_file(files[name])

        def do_POST(self):
            asked.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == f"/api/datasets/owner/name/paths-info/{COMMIT}"
            names = [name for name in files if name in unquote(body.decode())]
            # As the real one: git's own large files come with their SHA-256, small ones without.
            infos = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0"} for name in names]
            for info in infos:
                if info["path"].endswith(".parquet"):
                    sha256 = hashlib.sha256(files[info["path"]]).hexdigest()
                    info["lfs"] = {"oid": sha256, "size": info["size"], "pointerSize": 1}
            self.answer(json.dumps(infos).encode())

    with asked_instead(Handler, monkeypatch, tmp_path / "hub"):
        yield asked


def test_a_data_set_of_the_hub(hub, folder):
    given = {"train": "hf://datasets/owner/name/data/*.parquet", "valid": "hf://datasets/owner/name@main/valid.jsonl"}
    domain = Domain(**given).pin(folder)
    assert domain.train == (f"hf://datasets/owner/name@{COMMIT}/data/train-0.parquet",)
    # Of a large file nothing is fetched to plan; its identity is that of the same file here.
    assert not any("parquet" in path for path in hub)
    local = Domain(train="a.parquet", valid="valid.jsonl")
    (folder / "valid.jsonl").write_bytes(lines(TEXTS[:9]))
    assert fingerprint(domain) == fingerprint(local.pin(folder))
    assert sizes_of(domain.train) == {domain.train[0]: (folder / "a.parquet").stat().st_size}
    assert list(domain.documents("train")) == TEXTS
    assert list(domain.documents("valid")) == TEXTS[:9]
    hub.clear()
    assert list(domain.documents("train")) == TEXTS
    assert not any(path.startswith("GET /datasets") for path in hub), "fetched again"


def test_data_sets_that_are_not_there(hub, tmp_path):
    with pytest.raises(DataError, match=r"no file matches '.*/\*\.csv'; of 2 files there are: data/train-0\.parquet"):
        resolve("hf://datasets/owner/name/*.csv", tmp_path)
    with pytest.raises(DataError, match=r"the hub does not show this data set"):
        resolve("hf://datasets/owner/other/*.parquet", tmp_path)
    with pytest.raises(DataError, match=r"names no files of a data set; write hf://datasets/owner/name@revision/"):
        resolve("hf://datasets/owner/name", tmp_path)


def test_digests_of_files_here_and_there(hub, folder):
    there = resolve("hf://datasets/owner/name/*", folder)
    found = digests_of([*there, str(folder / "a.parquet")])
    assert len(found) == 3
    assert found[there[0]] == found[str(folder / "a.parquet")]
