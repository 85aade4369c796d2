"""A real S3 server on the loopback, behind a proxy of ours that injects faults and keeps a log."""

from __future__ import annotations

import contextlib
import gc
import http.client
import itertools
import logging
import socket
import struct
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from store_schema.disk import remote

# s3fs leaves its HTTP sessions to the garbage collector; they hold nothing of ours.
UNCLOSED = [
    pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LATE_S = 0.8
"""How long a late answer takes; `impatient` gives up before."""


class Fault(Enum):
    """What the proxy does to one request."""

    ERROR_500 = "500"
    SLOW_DOWN = "503 SlowDown"
    REFUSED = "reset before an answer"
    DROPPED = "reset in mid-body"
    CUT = "closed in mid-body, right headers"
    SHORT = "body cut, headers to match"
    TRICKLE = "slow body"
    LATE = "carried out, answered too late"
    EMPTY_LIST = "nothing listed"


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the proxy saw it."""

    number: int
    method: str
    key: str
    """Path in the bucket."""
    query: dict[str, list[str]]

    @property
    def lists(self) -> bool:
        """Whether it asks for a listing."""
        return self.method == "GET" and "list-type" in self.query


@dataclass
class Proxy:
    """What to do to requests, and what was done."""

    choose: Callable[[Request], Fault | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    faults: Counter[Fault] = field(default_factory=Counter)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> Fault | None:
        """Note a request and choose its fault."""
        parts = urlsplit(path)
        key = parts.path.lstrip("/").partition("/")[2]
        with self.lock:
            query = parse_qs(parts.query, keep_blank_values=True)
            request = Request(next(self.numbers), method, key, query)
            self.requests.append(request)
            fault = self.choose(request)
            if fault is not None:
                self.faults[fault] += 1
        return fault

    def reset(self, choose: Callable[[Request], Fault | None] = lambda request: None) -> None:
        """Forget what was seen and choose faults again."""
        with self.lock:
            self.choose = choose
            self.requests, self.faults, self.numbers = [], Counter(), itertools.count()

    def count(self, method: str, key: str = "") -> int:
        """Requests of a method whose key holds `key`."""
        return sum(r.method == method and key in r.key for r in self.requests)


def every(number: int, fault: Fault, method: str = "") -> Callable[[Request], Fault | None]:
    """Chooses `fault` for each `number`-th request of a method (or of all).

    Requests come from many threads, so chance may hit one file again and again: after two faults
    it is spared, as a client that tries thrice expects.
    """
    seen = itertools.count(1)
    hits: Counter[tuple[str, str]] = Counter()

    def choose(request: Request) -> Fault | None:
        if request.lists or (method and request.method != method):
            return None
        if next(seen) % number or hits[request.method, request.key] == 2:
            hits[request.method, request.key] = 0
            return None
        hits[request.method, request.key] += 1
        return fault

    return choose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: tuple[str, int]

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _handle(self) -> None:
        body = self._body()
        fault = self.proxy.take(self.command, self.path)
        if fault is Fault.REFUSED:
            return self._reset()
        if fault is Fault.ERROR_500:
            return self._error(500, "InternalError")
        if fault is Fault.SLOW_DOWN:
            return self._error(503, "SlowDown")
        status, headers, data = self._forward(body)
        if fault is Fault.LATE:
            time.sleep(LATE_S)
        if fault is Fault.EMPTY_LIST:
            name = self.path.lstrip("/").partition("?")[0].partition("/")[0]
            data = (
                '<?xml version="1.0"?><ListBucketResult>'
                f"<Name>{name}</Name><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated>"
                "</ListBucketResult>"
            ).encode()
        with contextlib.suppress(ConnectionError):
            self._answer(status, headers, data, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.upstream, timeout=20)
        try:
            dropped = ("transfer-encoding", "expect", "connection", "content-length")
            headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
            skipped = ("transfer-encoding", "connection", "content-length")
            kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in skipped]
            length = answer.getheader("Content-Length")
            if self.command == "HEAD" and length is not None:
                kept.append(("Content-Length", length))
            return answer.status, kept, data
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, fault: Fault | None
    ) -> None:
        half = len(data) // 2
        if fault is Fault.SHORT:
            data = data[:half]
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in (Fault.DROPPED, Fault.CUT) and data:
            self.wfile.write(data[:half])
            self.wfile.flush()
            if fault is Fault.DROPPED:
                return self._reset()
            self.close_connection = True
            return None
        step = max(len(data) // 5, 1) if fault is Fault.TRICKLE else max(len(data), 1)
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            self.wfile.flush()
            if fault is Fault.TRICKLE:
                time.sleep(0.01)
        return None

    def _error(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>"
        data = text.encode() if self.command != "HEAD" else b""
        self._answer(status, [("Content-Type", "application/xml")], data, None)

    def _reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True


@dataclass(frozen=True)
class S3:
    """The server: `endpoint` goes through the proxy."""

    endpoint: str
    proxy: Proxy


@contextlib.contextmanager
def serve_s3() -> Iterator[S3]:
    """Start moto's server and the proxy; both end with the block."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    proxy = Proxy()
    handler = type("Handler", (_Handler,), {"proxy": proxy, "upstream": moto.get_host_and_port()})
    front = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    front.daemon_threads = True
    thread = threading.Thread(target=front.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield S3(f"http://127.0.0.1:{front.server_address[1]}", proxy)
    finally:
        front.shutdown()
        thread.join()
        front.server_close()
        moto.stop()


@contextlib.contextmanager
def new_bucket(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a new bucket, with the environment that reaches it."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
    s3fs.S3FileSystem.clear_instance_cache()
    s3.proxy.reset()
    name = uuid.uuid4().hex
    remote.open_filesystem(f"s3://{name}")[0].mkdir(f"/{name}")
    s3.proxy.reset()
    yield f"s3://{name}"
    s3.proxy.reset()
    s3fs.S3FileSystem.clear_instance_cache()
    gc.collect()


def hurry(monkeypatch: pytest.MonkeyPatch, *, read_timeout_s: float = 5.0) -> None:
    """The same tries as ever, with short waits between them and a client that gives up early."""
    import botocore.retries.standard as standard

    monkeypatch.setattr(standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(remote, "READ_TIMEOUT_S", read_timeout_s)
    monkeypatch.setattr(remote, "CONNECT_TIMEOUT_S", 1.0)
