"""An HTTP server on loopback that passes requests on, except those that it was told to spoil."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["hang", "drop", "torn upload", "slow upload", "torn download", "lost answer"] | tuple[int, str]

SLOW_PIECES, SLOW_PAUSE = 40, 0.1  # of a body that is taken slowly, and seconds before each


class FaultProxy(ThreadingHTTPServer):
    """`with FaultProxy("127.0.0.1:9000") as proxy: proxy.spoil(...)`, and clients use `proxy.url`."""

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[str] = []  # "METHOD /path?query", as they came
        self.released = threading.Event()
        self.away: Fault | None = None  # what every request meets, while it is set
        self._plan: list[tuple[str, str, Fault]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> FaultProxy:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def spoil(self, fault: Fault, method: str, part_of_path: str = "", *, times: int = 1) -> None:
        """The next `times` requests of this method, with this text in their path or query, meet the fault."""
        with self._lock:
            self._plan += [(method, part_of_path, fault)] * times

    def unused(self) -> int:
        return len(self._plan)

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append(f"{method} {path}")
            if self.away is not None:
                return self.away
            for number, (wanted, text, fault) in enumerate(self._plan):
                if wanted == method and text in path:
                    del self._plan[number]
                    return fault
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up in the middle are what this server is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def _serve(self) -> None:
        fault = self.server.take(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        body = self._body(fault, length)
        if fault == "hang":
            self.server.released.wait()
        if fault in ("hang", "drop", "torn upload"):
            self.close_connection = True
        elif isinstance(fault, tuple):
            status, code = fault
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, text, len(text))
        else:
            status, headers, answer = self._upstream(body)
            if fault == "lost answer":
                self.close_connection = True
                return
            length = int(headers.get("Content-Length", len(answer)))
            if fault == "torn download":
                self.close_connection = True
                answer = answer[: len(answer) // 2]
            self._answer(status, headers, answer, length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self, fault: Fault | None, length: int) -> bytes:
        if fault != "slow upload":
            return self.rfile.read(length // 2 if fault == "torn upload" else length)
        body = b""
        for left in range(SLOW_PIECES, 0, -1):
            time.sleep(SLOW_PAUSE)
            body += self.rfile.read((length - len(body)) // left)
        return body

    def _upstream(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # the host too: it is signed
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
