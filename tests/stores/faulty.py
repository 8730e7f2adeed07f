"""A proxy before an HTTP store that makes a share of the reads fail: 503, reset, a body cut short, a stall."""

import asyncio
import json
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from yarl import URL

from tests.stores.process import ask, listen, running_module

KINDS = ("503", "reset", "short", "stall")
_INJECTED = "/__injected"
_OF_A_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding")


@dataclass(frozen=True)
class FaultyStore:
    """A proxy that runs."""

    url: str

    def injected(self) -> dict[str, int]:
        """How many faults of each kind there were, as "reads" how many reads, as "requests" how many of any method."""
        counts: dict[str, int] = json.loads(ask(f"{self.url}{_INJECTED}"))
        return counts


@contextmanager
def faulty(
    url: str, share: float = 0.05, seed: int = 0, stall_s: float = 2.0, kinds: Sequence[str] = KINDS
) -> Iterator[FaultyStore]:
    """Put the proxy before the store at `url`. Whether and how the n-th read fails hangs on the seed alone."""
    with running_module("faulty", url, str(share), str(seed), str(stall_s), *kinds) as own:
        yield FaultyStore(own)


class _Proxy:
    def __init__(self, url: str, share: float, seed: int, stall_s: float, kinds: Sequence[str]) -> None:
        self._url, self._share, self._stall_s, self._kinds = url, share, stall_s, kinds
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter(dict.fromkeys((*KINDS, "reads", "requests"), 0))

    async def injected(self, _: web.Request) -> web.Response:
        return web.json_response(dict(self._counts))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        kind = None
        self._counts["requests"] += 1
        if request.method == "GET" and ("Range" in request.headers or "x-ms-range" in request.headers):
            self._counts["reads"] += 1
            if self._random.random() < self._share:
                kind = self._random.choice(self._kinds)
                self._counts[kind] += 1
        if kind == "503":
            return web.Response(status=503, text="Server busy")
        if kind == "stall":
            await asyncio.sleep(self._stall_s)
        if kind == "reset" and request.transport:
            # Without lingering, closing sends RST; else the client would see an orderly end.
            request.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            request.transport.abort()
            return web.Response()
        # Host and path stay: they are part of what a store's signatures are made of.
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method,
                URL(f"{self._url}{request.raw_path}", encoded=True),
                headers=request.headers,
                data=await request.read() or None,
                skip_auto_headers=("Content-Type", "User-Agent", "Accept", "Accept-Encoding"),
            ) as upstream,
        ):
            body = await upstream.read()
            headers = {k: v for k, v in upstream.headers.items() if k.lower() not in _OF_A_CONNECTION}
            if request.method == "HEAD":
                headers["Content-Length"] = upstream.headers.get("Content-Length", "0")
                return web.Response(status=upstream.status, headers=headers)
            if kind != "short" or not body:
                return web.Response(status=upstream.status, headers=headers, body=body)
            short = web.StreamResponse(status=upstream.status, headers=headers | {"Content-Length": str(len(body))})
            await short.prepare(request)
            await short.write(body[: len(body) // 2])
            if request.transport:
                request.transport.close()
            return short


def _application(url: str, share: str, seed: str, stall_s: str, *kinds: str) -> web.Application:
    proxy = _Proxy(url, float(share), int(seed), float(stall_s), kinds)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get(_INJECTED, proxy.injected)
    app.router.add_route("*", "/{path:.*}", proxy.answer)
    return app


if __name__ == "__main__":
    asyncio.run(listen(_application(*sys.argv[1:])))
