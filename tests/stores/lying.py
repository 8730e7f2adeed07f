"""HTTP servers of this process that lie about what they send, or take their time."""

import gzip
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

Lie = Callable[["Server", bytes, int, int], None]


class Server(BaseHTTPRequestHandler):
    """Files of a folder with byte ranges; `lie` answers GETs in place of it, `lies` times."""

    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    lie: ClassVar[Lie | None]
    lies: ClassVar[int]
    released: ClassVar[threading.Event]  # what hangs ends with it
    seen: ClassVar[list[dict[str, str]]]  # headers, by origin
    redirect: ClassVar[dict[str, str]]  # Host to the origin that it sends to

    def log_message(self, *_: Any) -> None:
        """Be quiet."""

    def do_GET(self) -> None:
        cls, host = type(self), self.headers["Host"]
        self.seen.append(dict(self.headers) | {"method": self.command})
        if host in self.redirect:
            self.begin(302, 0, Location=self.redirect[host] + self.path)
            return
        content = (self.folder / self.path.partition("?")[0].lstrip("/")).read_bytes()
        wanted = self.headers.get("Range")
        first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(content) - 1)
        if self.command == "GET" and wanted and cls.lie and cls.lies:
            cls.lies -= 1
            cls.lie(self, content, first, last)
            return
        part = content[first : last + 1]
        about = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"} if wanted else {}
        self.begin(206 if wanted else 200, len(part), **about)
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def begin(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"ETag": '"one"'} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def answer(self: Server, content: bytes, first: int, last: int, part: bytes, **headers: str) -> None:
    self.begin(206, len(part), **{"Content-Range": f"bytes {first}-{last}/{len(content)}"} | headers)
    self.wfile.write(part)


def another_range(self: Server, content: bytes, first: int, last: int) -> None:
    """Of the right length, and it says so."""
    count = last - first + 1
    at = 0 if first else min(7, len(content) - count)
    answer(self, content, at, at + count - 1, content[at : at + count])


def no_content_range(self: Server, content: bytes, first: int, last: int) -> None:
    self.begin(206, last - first + 1)
    self.wfile.write(content[first : last + 1])


def other_unit(self: Server, content: bytes, first: int, last: int) -> None:
    answer(self, content, first, last, content[first : last + 1], **{"Content-Range": f"items {first}-{last}/9"})


def multipart(self: Server, content: bytes, first: int, last: int) -> None:
    body = b"--x\r\nContent-Range: bytes %d-%d/%d\r\n\r\n%b\r\n--x--" % (first, last, len(content), content[first:last])
    self.begin(206, last - first + 1, Content_Type="multipart/byteranges; boundary=x")
    self.wfile.write(body[: last - first + 1])


def compressed(self: Server, content: bytes, first: int, last: int) -> None:
    answer(self, content, first, last, gzip.compress(content[first : last + 1]), Content_Encoding="gzip")


def fewer(self: Server, content: bytes, first: int, last: int) -> None:
    answer(self, content, first, last - 1, content[first:last])


def fewer_than_it_says(self: Server, content: bytes, first: int, last: int) -> None:
    answer(self, content, first, last, content[first:last])


def more(self: Server, content: bytes, first: int, last: int) -> None:
    answer(self, content, first, last, content[first : last + 1] + b"more")


def whole(self: Server, content: bytes, first: int, last: int) -> None:
    self.begin(200, len(content))
    with_it = content[: 1 << 16]
    self.wfile.write(with_it)
    self.close_connection = True


def bytes_equals(self: Server, content: bytes, first: int, last: int) -> None:
    """As some servers write a range; no lie."""
    about = {"Content-Range": f"bytes={first}-{last}/{len(content)}"}
    answer(self, content, first, last, content[first : last + 1], **about)


def other_weak_version(self: Server, content: bytes, first: int, last: int) -> None:
    """As servers write that compress what they send; no lie about the bytes."""
    answer(self, content, first, last, content[first : last + 1], ETag=f'W/"{first}"')


def other_size(self: Server, content: bytes, first: int, last: int) -> None:
    about = {"Content-Range": f"bytes {first}-{last}/{len(content) + 5}"}
    answer(self, content, first, last, content[first : last + 1], **about)


def other_version(self: Server, content: bytes, first: int, last: int) -> None:
    answer(self, content, first, last, content[first : last + 1], ETag='"two"')


def endless(self: Server, content: bytes, first: int, last: int) -> None:
    """Of no announced length; the client must not take it all."""
    self.begin(206, None, **{"Content-Range": f"bytes {first}-{last}/{len(content)}"}, Connection="close")
    self.close_connection = True
    try:
        while not self.released.is_set():
            self.wfile.write(bytes(1 << 16))
    except OSError:
        pass


LIES: list[Lie] = [
    *(another_range, no_content_range, other_unit, multipart, compressed, fewer, fewer_than_it_says, more),
    *(other_size, other_version, endless),
]


def hang(self: Server, content: bytes, first: int, last: int) -> None:
    self.released.wait()
    self.close_connection = True


def drip(self: Server, content: bytes, first: int, last: int) -> None:
    self.begin(206, last - first + 1, **{"Content-Range": f"bytes {first}-{last}/{len(content)}"})
    for byte in content[first : last + 1]:
        try:
            self.wfile.write(bytes([byte]))
        except OSError:
            break
        if self.released.wait(0.1):
            break
    self.close_connection = True


def announce_more(self: Server, content: bytes, first: int, last: int) -> None:
    """And keep the connection."""
    self.begin(206, last - first + 1, **{"Content-Range": f"bytes {first}-{last}/{len(content)}"})
    self.wfile.write(content[first : first + 10])
    hang(self, content, first, last)


SLOW: list[Lie] = [hang, drip, announce_more]


@contextmanager
def listening() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            Server.released.set()
            server.shutdown()
            thread.join()
