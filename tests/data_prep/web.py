"""A web on the loopback interface, as kind or as nasty as a test wants it; benches serve a folder with it.

A page is bytes, or a coroutine function that is given the request and the stream to answer on, so that it can send
what no framework would. `python -m tests.data_prep.web FOLDER [PORT]` serves a folder until its standard input ends.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self


class Request(NamedTuple):
    target: str
    headers: dict[str, str]  # names in lower case


class Stream:
    """The server's end of a connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes = b"", status: int = 200, **headers: str | list[str]) -> None:
        """A whole answer; `Retry_After` is written `Retry-After`, and a list becomes several headers."""
        await self.send(head(status, **{"Content_Length": str(len(body)), **headers}) + body)

    def reset(self) -> None:
        self.writer.transport.abort()


Page = bytes | Callable[[Request, Stream], Awaitable[None]]


def head(status: int = 200, **headers: str | list[str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever"]
    for name, value in headers.items():
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"{name.replace('_', '-')}: {one}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


class Web:
    """`with Web() as web: web.pages["/x"] = ...`; pages are looked up without their query."""

    def __init__(self, pages: dict[str, Page] | None = None, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        self.pages: dict[str, Page] = dict(pages or {})
        self.requests: list[Request] = []
        self.connections = 0
        self.active = 0  # requests in a page's hands, and the most that ever were
        self.most_active = 0
        self._tls = tls
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="web", daemon=True)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.target.partition("?")[0] == path]

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda *_: None)  # clients that leave in a hurry are what it is for
        server = await asyncio.start_server(self._connected, "127.0.0.1", self._port, ssl=self._tls, backlog=1000)
        self.port: int = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            with suppress(OSError, asyncio.IncompleteReadError):
                while await self._exchange(reader, Stream(writer)):
                    pass
        finally:
            writer.transport.abort() if writer.transport.is_closing() else writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, stream: Stream) -> bool:
        """One request and its answer; whether another may follow."""
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:] if line)
        request = Request(lines[0].split(" ")[1], {name.lower(): value.strip() for name, _, value in fields})
        self.requests.append(request)
        page = self.pages.get(request.target.partition("?")[0])
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            if page is None:
                await stream.answer(b"nothing here", 404)
            elif isinstance(page, bytes):
                await stream.answer(page)
            else:
                await page(request, stream)
        finally:
            self.active -= 1
        return request.headers.get("connection") != "close" and not stream.writer.transport.is_closing()


def main() -> None:
    folder = Path(sys.argv[1])
    pages: dict[str, Page] = {
        f"/{path.relative_to(folder)}": path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
    with Web(pages, port=int(sys.argv[2]) if len(sys.argv) > 2 else 0) as web:
        print(web.url(), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
