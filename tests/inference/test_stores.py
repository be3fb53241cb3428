"""Recordings in stores elsewhere, by the clients that users have, against servers on this machine.

s3fs asks moto's server, gcsfs and huggingface_hub servers that answer as those of Google and of the
hub do, and aiohttp one with a certificate. `make test` has neither s3fs, gcsfs, moto nor trustme:
``pip install -c constraints.txt 'w2vbert_fast[stores]'`` beside what it installs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
import torch
from huggingface_hub import constants

from tests.helpers.offline import Stub, encoded, run, table, write_manifest
from w2vbert_fast.inference import AudioError, load_audio
from w2vbert_fast.recordings.inputs import open_inputs

CLIP = encoded("FLAC", 0.5)
FILES = {
    "calls/a.flac": CLIP,
    "calls/b #1 ä.flac": CLIP,
    "calls/deep/c.flac": CLIP,
    "calls/notes.txt": b"text",
    "calls/empty.wav": b"",
    "calls/rows.jsonl": b'{"audio": "a.flac"}\n',
}


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler], context: Any = None) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http{'s' * (context is not None)}://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Answers(BaseHTTPRequestHandler):
    """Answers what `answer` makes of a path and its query: JSON, content, or a status."""

    protocol_version = "HTTP/1.1"

    def answer(self, path: str, query: dict[str, str]) -> Any:
        raise NotImplementedError

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.asked = self.rfile.read(int(self.headers.get("content-length") or 0))
        found = self.answer(unquote(parts.path), query)
        status, content = (found, b"{}") if isinstance(found, int) else (200, found)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        span = self.headers.get("range")
        whole = len(content)
        if span and status == 200 and content:
            first, _, last = span.partition("=")[2].partition("-")
            content = content[int(first) : int(last or whole) + 1]
            status = 206
        self.send_response(status)
        if status == 206:
            end = int(first) + len(content) - 1
            self.send_header("content-range", f"bytes {first}-{end}/{whole}")
        self.send_header("content-type", "application/json" if content[:1] in b"[{" else "a/b")
        self.send_header("etag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_POST = do_HEAD = do_GET

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _new_clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients are kept by their class, with the address of a server that is gone."""
    fsspec.AbstractFileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield
    for name in ("s3", "gs", "hf", "https"):
        if fsspec.registry.get(name) is not None:
            fsspec.get_filesystem_class(name).clear_instance_cache()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import boto3

    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    store = boto3.client("s3")
    store.create_bucket(Bucket="bucket")
    for name, content in FILES.items():
        store.put_object(Bucket="bucket", Key=name, Body=content)
    yield "s3://bucket"
    running.stop()


class Google(Answers):
    """Objects of the bucket `bucket`, as the JSON API of Google's storage has them; `locked` is
    nobody's."""

    def answer(self, path: str, query: dict[str, str]) -> Any:
        bucket, _, name = path.partition("/b/")[2].partition("/o")
        name = name.removeprefix("/")
        if bucket != "bucket":
            return 403 if bucket == "locked" else 404
        if not name:
            return self.listed(query.get("prefix", ""), query.get("delimiter", ""))
        if name not in FILES:
            return 404
        media = "download" in path or query.get("alt") == "media"
        return FILES[name] if media else self.described(name)

    def described(self, name: str) -> dict[str, Any]:
        digest = base64.b64encode(hashlib.md5(FILES[name]).digest()).decode()
        size = str(len(FILES[name]))
        return {"name": name, "bucket": "bucket", "size": size, "md5Hash": digest, "etag": digest}

    def listed(self, prefix: str, delimiter: str) -> dict[str, Any]:
        names = [name for name in FILES if name.startswith(prefix)]
        rest = {name: name[len(prefix) :] for name in names}
        below = {n for n in names if delimiter and delimiter in rest[n]}
        folders = {prefix + rest[n].partition(delimiter)[0] + delimiter for n in below}
        items = [self.described(name) for name in names if name not in below]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    with serving(Google) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server)
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield "gs://bucket"


class Hub(Answers):
    """The data set `org/name` of the hub; `org/gated` is nobody's."""

    def answer(self, path: str, query: dict[str, str]) -> Any:
        if "/org/name/" not in f"{path}/":
            return 403 if "/org/gated" in path else 404
        rest = f"{path}/".partition("/org/name/")[2].strip("/").split("/")
        if rest[0] == "resolve":
            return FILES.get("/".join(rest[2:]), 404)
        if rest[0] == "tree":
            return self.below("/".join(rest[2:]), query.get("recursive", "").lower() == "true")
        if rest[0] == "paths-info":
            paths = parse_qs(self.asked.decode()).get("paths") or json.loads(self.asked)["paths"]
            found = [self.described(name) for name in paths if name in FILES]
            folders = [n for n in paths if any(f.startswith(f"{n}/") for f in FILES)]
            return found + [{"type": "directory", "oid": "0", "path": n} for n in folders]
        return {"id": "org/name", "sha": "0" * 40, "private": False, "siblings": []}

    def described(self, name: str) -> dict[str, Any]:
        return {"type": "file", "oid": "0" * 40, "size": len(FILES[name]), "path": name}

    def below(self, folder: str, recursive: bool) -> Any:
        names = [name for name in FILES if name.startswith(f"{folder}/" if folder else "")]
        start = len(folder) + bool(folder)
        folders = {n[: n.index("/", start)] for n in names if "/" in n[start:]}
        files = [self.described(n) for n in names if recursive or "/" not in n[start:]]
        return files + [{"type": "directory", "oid": "0", "path": n} for n in sorted(folders)]


@pytest.fixture
def hf(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with serving(Hub) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{server}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        yield "hf://datasets/org/name"


@pytest.fixture(params=["s3", "gs", "hf"])
def store(request: pytest.FixtureRequest) -> str:
    """The beginning of URLs in each of the stores."""
    return str(request.getfixturevalue(request.param))


def names(*inputs: str) -> list[str]:
    return [row.name.partition("calls/")[2] for row in open_inputs(inputs).rows()]


def test_a_recording_is_read_as_from_a_file(store: str) -> None:
    expected = load_audio(CLIP)
    for name in ("a.flac", "b #1 ä.flac", "deep/c.flac"):
        assert torch.equal(load_audio(f"{store}/calls/{name}").samples, expected.samples)
    assert load_audio(f"{store}/calls/a.flac", offset=0.25).seconds == pytest.approx(0.25)


def test_folders_and_patterns(store: str) -> None:
    everything = ["a.flac", "b #1 ä.flac", "deep/c.flac", "empty.wav"]
    assert names(f"{store}/calls/") == everything
    assert names(f"{store}/calls/*.flac") == everything[:2]
    assert names(f"{store}/calls/**/*.flac") == everything[:3]
    with pytest.raises((ValueError, OSError), match=f"{store}/none/.* holds no recordings|listed"):
        open_inputs([f"{store}/none/"])
    with pytest.raises(ValueError, match=r"rows\.jsonl is a data set elsewhere; copy it"):
        open_inputs([f"{store}/calls/rows.jsonl"])


def test_a_job_has_a_row_for_each_that_fails(store: str, tmp_path: Path) -> None:
    rows = ["a.flac", "none.flac", "empty.wav", "deep", "deep/c.flac"]
    manifest = write_manifest(
        tmp_path / "rows.jsonl", [{"audio": f"{store}/calls/{name}"} for name in rows]
    )
    run([manifest, f"{store}/calls/*.flac"], tmp_path / "out", Stub())
    found = table(tmp_path / "out")
    errors = [row.get("error") for row in found]
    assert errors[:3] == [None, "not found", "the file is empty"]
    assert errors[3] == "a folder; with / at its end its files are read"
    assert errors[4:] == [None] * 3
    assert found[1]["error_type"] == "FileNotFoundError"
    assert len({row["text"] for row in found if "text" in row}) == 1


def test_what_is_not_allowed_is_a_row_that_says_so(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    kind = {"content-type": "application/octet-stream"}
    urllib.request.urlopen(urllib.request.Request(reset, b"0", kind, method="POST")).close()
    run([f"{s3}/calls/a.flac"], tmp_path / "out", Stub())
    (row,) = table(tmp_path / "out")
    assert row["error_type"] == "PermissionError"
    assert row["error"].startswith("cannot be fetched: ")
    with pytest.raises(PermissionError, match=r"s3://bucket/calls/ cannot be listed: "):
        open_inputs([f"{s3}/calls/"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(OSError, match=r"s3://bucket/calls/ cannot be listed: "):
        open_inputs([f"{s3}/calls/"])


def test_a_bucket_of_somebody_else(gs: str, hf: str) -> None:
    for url in ("gs://locked/a.flac", "hf://datasets/org/gated/a.flac"):
        with pytest.raises(AudioError) as found:
            load_audio(url)
        assert url in str(found.value) and "cannot be fetched" in str(found.value)


def test_a_certificate(tmp_path: Path) -> None:
    """aiohttp takes what OpenSSL trusts; what it does not is a row."""
    trustme = pytest.importorskip("trustme", reason="trustme is not installed")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "trusted.pem")

    class Site(Answers):
        def answer(self, path: str, query: dict[str, str]) -> Any:
            return FILES.get(path.removeprefix("/"), 404)

    with serving(Site, context) as server:
        with pytest.raises(AudioError, match=r"cannot be fetched: .*CERTIFICATE_VERIFY_FAILED"):
            load_audio(f"{server}/calls/a.flac")
        code = (
            "import sys; from w2vbert_fast.inference import load_audio\n"
            "print(load_audio(sys.argv[1]).seconds)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, f"{server}/calls/a.flac"],
            env={**os.environ, "SSL_CERT_FILE": str(tmp_path / "trusted.pem")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(done.stdout) == 0.5
