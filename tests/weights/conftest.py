"""A server on loopback that misbehaves on request, and records of the files it serves."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from vizoo.weights import fetch
from vizoo.weights.record import Weights
from vizoo.weights.store import path_of


@dataclass(frozen=True)
class Answer:
    """How the server treats one request; the default is to serve the file well."""

    status: int = 200
    cut: int | None = None  # bytes of the body after which the connection closes
    stall: bool = False  # keeps the connection open after the cut, instead of closing it
    ranges: bool = True
    if_range: bool = True
    length: bool = True
    etag: bool = True
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """Serves `files` by path. `answers` are used up in turn, then every request is served well."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.released = threading.Event()
        handler = type("Bound", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=lambda: self.http.serve_forever(poll_interval=0.01), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for _, _, headers in self.requests]

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    owner: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner = self.owner
        owner.requests.append((self.command, self.path, dict(self.headers)))
        answer = owner.answers.pop(0) if owner.answers else Answer()
        data = owner.files.get(self.path)
        if data is None or answer.status != 200:
            self.send(404 if data is None else answer.status, b"", answer)
            return
        etag = '"' + hashlib.sha256(data).hexdigest()[:16] + '"'
        start = self.range_start() if answer.ranges else None
        if start is not None and answer.if_range and self.headers.get("If-Range", etag) != etag:
            start = None
        if start is not None and start >= len(data):
            self.send(416, b"", answer)
            return
        extra = {"ETag": etag} if answer.etag else {}
        if start is not None:
            extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(200 if start is None else 206, data[start or 0 :], answer, extra)

    def range_start(self) -> int | None:
        text = self.headers.get("Range")
        return int(text.removeprefix("bytes=").rstrip("-")) if text else None

    def send(self, status: int, body: bytes, answer: Answer, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream", **(extra or {}), **answer.headers}
        if answer.length:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: answer.cut])
        self.wfile.flush()
        if answer.stall:
            self.owner.released.wait(30)


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def answer() -> type[Answer]:
    return Answer


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"stem.weight": torch.randn(96, 96), "head.bias": torch.arange(5.0)}


@pytest.fixture
def data(state: dict[str, torch.Tensor]) -> bytes:
    """A checkpoint file as the authors of Swin publish it."""
    buffer = io.BytesIO()
    torch.save({"model": state}, buffer)
    return buffer.getvalue()


@pytest.fixture
def make_record() -> Callable[..., Weights]:
    def make(url: str = "", **changes: Any) -> Weights:
        fields: dict[str, Any] = {
            "license": "MIT",
            "repository": "owner/name",
            "commit": "0" * 40,
            "container": "model",
        }
        fields |= {"input_size": (3, 224, 224), "num_classes": 5}
        return Weights(url=url, **(fields | changes))

    return make


@pytest.fixture
def record(server: Server, data: bytes, make_record: Callable[..., Weights]) -> Weights:
    """A record of a file on the server, with its true digest."""
    server.files["/v1/model.pth"] = data
    return make_record(f"{server.url}/v1/model.pth", sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def part_of() -> Callable[[Weights], Path]:
    return lambda weights: path_of(weights).with_name(path_of(weights).name + ".part")


@pytest.fixture
def left_behind() -> Callable[[Weights], set[str]]:
    """Names in the folder of a record, without the lock."""

    def names(weights: Weights) -> set[str]:
        folder = path_of(weights).parent
        return {file.name for file in folder.iterdir() if not file.name.endswith(".lock")} if folder.exists() else set()

    return names


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "BACKOFF", 0.005)
    monkeypatch.setenv("VIZOO_TIMEOUT", "10")  # a busy machine may make a server wait for seconds
    monkeypatch.delenv("VIZOO_ACCEPT_UNSTATED_LICENSES", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
