"""Copies of remote slides that several processes want at once, and what a killed process leaves."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.core.staging import copies, names

# Stages argv[1] from a store of its own that counts and can stop, tells what it does, and does as stdin says.
WORKER = """
    import sys
    from fsspec.implementations.memory import MemoryFileSystem
    from udfs.wsi.reading import staging

    uri, size, stops = sys.argv[1], int(sys.argv[2]), "stops" in sys.argv
    staging.REQUEST_BYTES, staging.MAX_BYTES = 1000, 10_000
    read = MemoryFileSystem.cat_file

    def tell(text):
        print(text, flush=True)

    def told(self, path, start=None, end=None, **options):
        tell(f"read {start}")
        if stops and start == 4000:
            sys.stdin.readline()
        return read(self, path, start, end, **options)

    MemoryFileSystem.cat_file = told
    # the same version in each process
    MemoryFileSystem.info = lambda self, path, **_: {"name": path, "size": size, "type": "file", "etag": "1"}
    MemoryFileSystem().pipe(uri, bytes(size))
    tell("ready")
    try:
        with staging.staged(uri) as path:
            tell(f"staged {path.stat().st_size}")
            sys.stdin.readline()
            tell(f"still {path.stat().st_size}")
    except staging.SlideError as error:
        tell(error.code)
"""


class Worker:
    """Another process that stages one slide."""

    def __init__(self, stack: ExitStack, name: str, size: int, *flags: str) -> None:
        command = [sys.executable, "-c", textwrap.dedent(WORKER), f"memory://bucket/{name}", str(size), *flags]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = stack.enter_context(process)
        stack.callback(process.kill)

    def until(self, start: str) -> list[str]:
        """What it says, up to the first line that begins so."""
        assert self.process.stdout
        said: list[str] = []
        while not said or not said[-1].startswith(start):
            line = self.process.stdout.readline()
            assert line, f"ended after {said}"
            said.append(line.strip())
        return said

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def workers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_processes_that_want_the_same_slide_copy_it_once(workers: ExitStack, staging_root: Path) -> None:
    first = Worker(workers, "a", 6000, "stops")
    first.until("read 4000")
    others = [Worker(workers, "a", 6000) for _ in range(2)]
    for other in others:
        other.until("ready")
    assert [path.parent.suffix for path in copies(staging_root)] == [".part"]  # none that anybody could take for whole
    first.go_on()
    first.until("staged 6000")
    for other in others:
        assert other.until("staged") == ["staged 6000"]  # and read nothing
    assert len(copies(staging_root)) == 1


def test_a_process_killed_in_the_middle_leaves_nothing_half(workers: ExitStack, staging_root: Path) -> None:
    killed = Worker(workers, "a", 6000, "stops")
    killed.until("read 4000")
    killed.process.kill()
    killed.process.wait()
    assert [path.parent.suffix for path in copies(staging_root)] == [".part"]
    other = Worker(workers, "b", 2000)  # makes room for another, and cleans
    other.until("staged 2000")
    assert names(staging_root) == ["b"]
    again = Worker(workers, "a", 6000)
    assert "read 0" in again.until("staged 6000")
    assert names(staging_root) == ["a", "b"]


def test_a_copy_under_way_counts_with_all_its_bytes(workers: ExitStack, staging_root: Path) -> None:
    first = Worker(workers, "a", 6000, "stops")
    first.until("read 4000")
    second = Worker(workers, "b", 6000)
    second.until("read_failed")
    assert names(staging_root) == ["a"]
    first.go_on()
    first.until("staged 6000")


def test_no_process_removes_what_another_reads(workers: ExitStack, staging_root: Path) -> None:
    reader = Worker(workers, "a", 6000)
    reader.until("staged")
    other = Worker(workers, "b", 6000)
    other.until("read_failed")
    reader.go_on()
    reader.until("still 6000")
    reader.process.wait()
    Worker(workers, "b", 6000).until("staged 6000")
    assert names(staging_root) == ["b"]
