"""A small model hub on loopback: the two routes of the real one that huggingface_hub asks, with ranges and hashes."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sora_train.codec import BUILTIN

COMMIT = "c0ffee" * 6 + "beef"


class Hub:
    """One repository, `acme/pipe`, gone wrong in ways that a test sets."""

    def __init__(self, files: dict[str, bytes], url: str):
        self.files, self.url = files, url
        self.commit = COMMIT
        self.cut: dict[str, int] = {}  # bytes after which a file's connection breaks off, once
        self.down = False  # after the first break no file comes any more
        self.wrong: set[str] = set()  # files whose bytes come out other than listed
        self.refusal: tuple[int, str] = (0, "")  # status and error code of every answer
        self.gets: list[tuple[str, str]] = []  # file and range of each download

    def listing(self) -> dict:
        return {"id": "acme/pipe", "sha": self.commit, "siblings": [self.facts(path) for path in self.files]}

    def facts(self, path: str) -> dict:
        data = self.files[path]
        facts = {
            "rfilename": path,
            "size": len(data),
            "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        if path.endswith((".safetensors", ".bin")):
            digest = hashlib.sha256(data).hexdigest()
            facts["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
        return facts


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if hub.refusal[0]:
                return self.answer(hub.refusal[0], b"{}", {"X-Error-Code": hub.refusal[1]})
            if found := re.fullmatch(r"/api/models/acme/pipe(?:/revision/(.+))?", path):
                if found[1] not in (None, "main", "v1", hub.commit, hub.commit[:8]):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return self.answer(200, json.dumps(hub.listing()).encode(), {"Content-Type": "application/json"})
            if found := re.fullmatch(rf"/acme/pipe/resolve/{hub.commit}/(.+)", path):
                return self.file(found[1])
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815

        def file(self, path: str) -> None:
            data, facts = hub.files[path], hub.facts(path)
            size = len(data)
            if path in hub.wrong:
                data = bytes(byte ^ 1 for byte in data)
            wish = self.headers.get("Range", "")
            start = int(wish.removeprefix("bytes=").partition("-")[0]) if wish else 0
            etag = facts["lfs"]["sha256"] if "lfs" in facts else facts["blobId"]
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            if wish:
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            stop = None
            if self.command == "GET":
                hub.gets.append((path, wish))
                if hub.down and not hub.cut:
                    return self.answer(503)
                stop = hub.cut.pop(path, None)
            self.answer(206 if wish else 200, data[start:stop], {**headers, "Content-Length": str(size - start)})
            if stop is not None:
                self.wfile.flush()
                self.connection.shutdown(2)
                self.close_connection = True
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(files, f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(name="serve")
def _serve() -> Callable[[dict[str, bytes]], AbstractContextManager[Hub]]:
    return serve


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A pipeline with the embedded networks, and with files that nobody asked for."""
    files = {f"vae/{path.name}": path.read_bytes() for path in (BUILTIN / "vae").iterdir()}
    for path in (BUILTIN / "text").iterdir():
        part = "tokenizer" if "tokenizer" in path.name else "text_encoder"
        files[f"{part}/{path.name}"] = path.read_bytes()
    files |= {"transformer/config.json": b"{}", "transformer/x.safetensors": b"x" * 999, "README.md": b"readme"}
    files |= {"scheduler/scheduler_config.json": b"{}", "model_index.json": b"{}"}
    files |= {"vae/diffusion_pytorch_model.fp16.safetensors": b"half", "vae/diffusion_pytorch_model.bin": b"pickle"}
    with serve(files) as server:
        yield server
