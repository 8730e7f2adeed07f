"""Servers in processes of their own, so that their work does not hold up the interpreter of what is tested."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from aiohttp import web

HOST = "127.0.0.1"
_PATIENCE_S = 30.0
_ROOT = Path(__file__).parents[2]
_DIRECT = build_opener(ProxyHandler({}))  # never by way of a proxy of the environment


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[str]:
    """Run a server that says where it listens; yields its first line, and ends it with the block.

    Its stdin ends with this process, however that ends.
    """
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, **options
    ) as process:
        try:
            assert process.stdout
            line = process.stdout.readline().strip()
            if not line:
                raise RuntimeError(f"{Path(command[0]).name} did not start, exit status {process.wait()}")
            yield line
        finally:
            process.terminate()


@contextmanager
def running_at(port: int, command: Sequence[str], **options: Any) -> Iterator[str]:
    """Run a server that was told its port; yields its URL once it takes connections, and ends it with the block."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=_ROOT, **options
    ) as process:
        try:
            end = monotonic() + _PATIENCE_S
            while not _takes_connections(port):
                if process.poll() is not None or monotonic() > end:
                    raise RuntimeError(f"{Path(command[0]).name} does not listen, exit status {process.poll()}")
                sleep(0.05)
            yield f"http://{HOST}:{port}"
        finally:
            process.kill()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        return int(unused.getsockname()[1])


def _takes_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def running_module(name: str, *arguments: str) -> Iterator[str]:
    """Run `python -m tests.stores.NAME`; yields the URL where it listens."""
    with running([sys.executable, "-m", f"tests.stores.{name}", *arguments]) as port:
        yield f"http://{HOST}:{port}"


async def listen(app: web.Application) -> None:
    """In the server's process: serve, say the port, and go on until stdin ends."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0, backlog=1024).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def ask(url: str, method: str = "GET") -> bytes:
    """The body of an answer of a server that runs here; raises urllib.error.HTTPError."""
    with _DIRECT.open(Request(url, method=method), timeout=30) as answer:
        body: bytes = answer.read()
    return body
