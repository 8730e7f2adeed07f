"""A folder over HTTP/1.1 by byte ranges, each request as late as a distant store's."""

import argparse
import asyncio
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from tests.stores.process import ask, listen, running_module

_TRAFFIC = "/__traffic"


class Server:
    """A folder that is being served: a file's URL is `url`/NAME."""

    def __init__(self, url: str) -> None:
        """Use `serve`."""
        self.url = url

    def traffic(self, name: str | None = None) -> tuple[int, int]:
        """Requests, and bytes of their bodies, since the start or the last `reset`: for one file, or all where None."""
        told: dict[str, dict[str, int]] = json.loads(ask(self.url + _TRAFFIC))
        requests, sent = told["requests"], told["bytes"]
        if name is None:
            return sum(requests.values()), sum(sent.values())
        return requests.get(f"/{name}", 0), sent.get(f"/{name}", 0)

    def reset(self) -> None:
        """Count from zero."""
        ask(self.url + _TRAFFIC, "DELETE")


@contextmanager
def serve(folder: Path, latency_s: float = 0.0, mb_per_s: float = math.inf) -> Iterator[Server]:
    """Serve a folder from a process of its own.

    Answers have ETag, Last-Modified and Accept-Ranges; connections are kept. Before each answer pass `latency_s` and its
    length by `mb_per_s`, of many requests at the same time.
    """
    with running_module("http", str(folder.absolute()), str(latency_s), str(mb_per_s)) as url:
        yield Server(url)


def _application(folder: Path, latency_s: float, mb_per_s: float) -> web.Application:
    requests: Counter[str] = Counter()
    sent: Counter[str] = Counter()

    # Before the first byte is sent, so that who has it all and then asks for the traffic finds it counted.
    async def count_late(request: web.Request, response: web.StreamResponse) -> None:
        if request.path != _TRAFFIC:
            length = (response.content_length or 0) * (request.method != "HEAD")
            await asyncio.sleep(latency_s + length / (mb_per_s * 1e6))
            requests[request.path] += 1
            sent[request.path] += length

    async def tell(_: web.Request) -> web.Response:
        return web.json_response({"requests": requests, "bytes": sent})

    async def reset(_: web.Request) -> web.Response:
        requests.clear()
        sent.clear()
        return web.Response()

    app = web.Application()
    app.on_response_prepare.append(count_late)
    app.router.add_get(_TRAFFIC, tell)
    app.router.add_delete(_TRAFFIC, reset)
    app.router.add_static("/", folder)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("latency_s", type=float, nargs="?", default=0.0)
    parser.add_argument("mb_per_s", type=float, nargs="?", default=math.inf)
    arguments = parser.parse_args()
    asyncio.run(listen(_application(arguments.folder, arguments.latency_s, arguments.mb_per_s)))
