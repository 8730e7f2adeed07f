"""Copies of remote slides: whole or not there, made once however many ask, never taken from under who reads them."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem

from tests.slides.foreign import write_dicom, write_mirax, write_vms
from tests.slides.make import position_pixels
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.reading import staging
from udfs.wsi.reading.companions import beside, path_in
from udfs.wsi.reading.staging import staged
from udfs.wsi.store import file

SIZE = 1000  # bytes of most slides here; nothing looks into them


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staging"))
    # A wrapper that is kept has the methods that a filesystem had before a test changes them.
    monkeypatch.setattr(file, "_asynchronous", file._asynchronous.__wrapped__)
    return tmp_path / "staging"


def slide(memory: Any, name: str, size: int = SIZE) -> str:
    memory.pipe(f"/bucket/{name}", bytes([size % 251]) * size)
    return f"memory://bucket/{name}"


def copies(root: Path) -> list[Path]:
    """Files of slides, whole or half, without locks."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in copies(root))


class Reads:
    """How often the store was asked for bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        read = MemoryFileSystem.cat_file

        def counted(*args: Any, **options: Any) -> Any:
            self.count += 1
            return read(*args, **options)

        monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)


def test_a_local_slide_is_used_where_it_lies(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "a.czi"
    path.write_bytes(b"x")
    for uri in (str(path), path.as_uri()):
        with staged(uri) as found:
            assert found == path
    assert not root.exists()


def test_a_copy_is_whole_and_serves_again(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(1).bytes(
        staging.REQUEST_BYTES * 6 + 12345
    )  # more requests than are under way at once
    memory.pipe("/bucket/a.czi", content)
    with staged("memory://bucket/a.czi") as path:
        assert path.name == "a.czi"
        assert path.read_bytes() == content
    reads = Reads(monkeypatch)
    with staged("memory://bucket/a.czi") as again:
        assert again == path
        assert again.read_bytes() == content
    assert reads.count == 0


def test_who_comes_second_uses_what_the_first_copied(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = slide(memory, "a")
    rivals = iter([1])

    def outrun(path: Path) -> Any:
        if next(rivals, None):
            with staged(uri):  # between our look and our lock
                pass
        return FileLock(path)

    monkeypatch.setattr(staging, "FileLock", outrun)
    reads = Reads(monkeypatch)
    with staged(uri):
        assert reads.count == 1


def test_a_replaced_slide_is_copied_anew(memory: Any) -> None:
    uri = slide(memory, "a.czi")
    with staged(uri) as old:
        memory.pipe("/bucket/a.czi", b"new" * 100)
        with staged(uri) as new:
            assert old.stat().st_size == SIZE
            assert new.read_bytes() == b"new" * 100


def test_a_copy_that_lost_a_file_is_made_anew(memory: Any) -> None:
    uri = slide(memory, "a.czi")
    with staged(uri) as path:
        pass
    path.unlink()  # as those do who clean folders of temporary files
    with staged(uri) as path:
        assert path.stat().st_size == SIZE


def test_the_files_that_belong_to_a_slide_come_along(memory: Any, tmp_path: Path, root: Path) -> None:
    pixels = position_pixels(2048, 512)
    source = tmp_path / "slides"
    source.mkdir()
    write_mirax(source / "m.mrxs", pixels)
    (source / "m" / "notes.txt").write_text("not of the slide")
    write_vms(source / "v.vms", pixels)
    write_dicom(source / "d", pixels, levels=(1, 4), series=1)
    write_dicom(source / "d", pixels[:256], levels=(1,), series=2)
    memory.put(f"{source}/", "/bucket/", recursive=True)
    wanted = {
        "m.mrxs": ("MIRAX", ["Data0000.dat", "Index.dat", "Slidedat.ini", "m.mrxs"]),
        "v.vms": ("Hamamatsu VMS", ["v-0.jpg", "v-1.jpg", "v-macro.jpg", "v-map.jpg", "v.vms"]),
        "d/series1-level1.dcm": ("DICOM", ["series1-level1.dcm", "series1-level4.dcm"]),
    }
    for name, (kind, files) in wanted.items():
        with staged(f"memory://bucket/{name}", None, kind) as path:
            place = path.parent
            assert names(place) == files
            for copy in copies(place):
                original = (source / name).parent / copy.relative_to(place)
                assert copy.read_bytes() == original.read_bytes()


def test_a_changed_companion_is_another_slide(memory: Any, tmp_path: Path) -> None:
    write_vms(tmp_path / "v.vms", position_pixels(2048, 128))
    memory.put(f"{tmp_path}/", "/bucket/", recursive=True)
    with staged("memory://bucket/v.vms", None, "Hamamatsu VMS") as path:
        memory.pipe("/bucket/v-1.jpg", b"other")
        with staged("memory://bucket/v.vms", None, "Hamamatsu VMS") as changed:
            assert changed != path
            assert changed.with_name("v-1.jpg").read_bytes() == b"other"


@pytest.mark.parametrize("name", ["../../b.jpg", "/b.jpg", "x/../../b.jpg"])
def test_nothing_that_a_slide_names_is_written_outside_of_its_copy(memory: Any, root: Path, name: str) -> None:
    text = f"[Virtual Microscope Specimen]\nImageFile={name}\nMapFile=map.jpg\n"
    memory.pipe("/bucket/c/d/v.vms", text.encode())
    slide(memory, "c/d/map.jpg")
    slide(memory, f"c/d/{name}")  # to a store it is a name like any other
    with staged("memory://bucket/c/d/v.vms", None, "Hamamatsu VMS") as path:
        assert names(root.parent) == names(path.parent) == ["map.jpg", "v.vms"]


def test_a_file_that_is_named_twice_is_copied_once(memory: Any) -> None:
    slide(memory, "map.jpg")
    memory.pipe("/bucket/v.vms", b"[Virtual Microscope Specimen]\nImageFile=./map.jpg\nMapFile=map.jpg\n")
    with staged("memory://bucket/v.vms", None, "Hamamatsu VMS") as path:
        assert names(path.parent) == ["map.jpg", "v.vms"]


def test_the_longest_unused_goes_first(memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 3 * SIZE)
    for name in "abcad":  # a is used again before d needs room
        with staged(slide(memory, name)) if name not in names(root) else staged(f"memory://bucket/{name}"):
            pass
    assert names(root) == ["a", "c", "d"]


def test_what_is_read_is_never_removed(memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 2 * SIZE)
    with ExitStack() as stack:
        held = [stack.enter_context(staged(slide(memory, name))) for name in "ab"]
        with pytest.raises(SlideError) as caught, staged(slide(memory, "c")):
            pass
        assert [path.stat().st_size for path in held] == [SIZE, SIZE]
    assert caught.value.code == ErrorCode.READ_FAILED
    assert "memory://bucket/c takes 1,000 bytes" in caught.value.message
    assert "2,000 of them are in use" in caught.value.message
    with staged("memory://bucket/c"):
        assert "c" in names(root)


def test_a_slide_that_can_never_fit_drives_out_no_other(
    memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 2 * SIZE)
    with staged(slide(memory, "a")):
        pass
    with pytest.raises(SlideError, match="may hold 2,000"), staged(slide(memory, "b", 2 * SIZE + 1)):
        pass
    assert names(root) == ["a"]


def test_the_bound_is_half_of_what_the_disk_has_for_copies(
    memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 4 * SIZE - 2})())
    with pytest.raises(SlideError, match="may hold 1,999"), staged(slide(memory, "a", 2 * SIZE)):
        pass


def test_a_disk_that_keeps_the_folder_of_an_open_lock(memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does: who removes a copy has its lock open."""
    monkeypatch.setattr(staging, "MAX_BYTES", SIZE)
    remove = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        is_kept = (path / "use.lock").exists()
        remove(path, **options)
        if is_kept:
            path.mkdir()

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    uris = [slide(memory, name) for name in "ab"]
    for uri in uris * 3:
        with staged(uri) as path:
            assert path.stat().st_size == SIZE
    folders = [path for path in root.iterdir() if path.is_dir()]
    assert len(folders) == 2  # the copy, and what is left of the one removed last: the next copy takes it away


def test_other_files_in_the_folder_are_left_alone(memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", SIZE)
    (root / "my slides-123").mkdir(parents=True)
    (root / "my slides-123" / "precious").write_text("x")
    for name in "ab":
        with staged(slide(memory, name)):
            pass
    assert names(root) == ["b", "precious"]


def test_a_disk_that_refuses_is_named(memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "in_parts", full)
    with pytest.raises(SlideError) as caught, staged(slide(memory, "a")):
        pass
    assert caught.value.code == ErrorCode.READ_FAILED
    assert "memory://bucket/a" in caught.value.message
    assert "No space left on device" in caught.value.message
    assert "SLIDELAKE_STAGING" in caught.value.message
    assert copies(root) == []


def test_the_folder_of_another_user_is_not_used(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIDELAKE_STAGING")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with staged(slide(memory, "a")) as path:
        assert path.is_relative_to(tmp_path / f"slidelake-staging-{os.getuid()}")
    stranger = os.getuid() + 1
    (tmp_path / f"slidelake-staging-{stranger}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    with pytest.raises(SlideError, match="another user's"), staged(slide(memory, "b")):
        pass


def test_a_store_that_fails_halfway_leaves_nothing(memory: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = slide(memory, "a", 3 * SIZE)
    monkeypatch.setattr(staging, "REQUEST_BYTES", SIZE)
    read = MemoryFileSystem.cat_file

    def failing(self: Any, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        if start == 2 * SIZE:
            raise PermissionError("the token expired")
        return read(self, path, start, end, **options)

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "cat_file", failing)
        with pytest.raises(SlideError) as caught, staged(uri):
            pass
    assert caught.value.code == ErrorCode.ACCESS_DENIED
    assert copies(root) == []
    with staged(uri) as path:
        assert path.stat().st_size == 3 * SIZE


def test_a_slide_that_is_not_there_is_missing() -> None:
    with pytest.raises(SlideError) as caught, staged("memory://bucket/none.czi"):
        pass
    assert caught.value.code == ErrorCode.FILE_MISSING


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a b/c.mrxs", "/a b/c/S.ini"),
        ("c.mrxs", "c/S.ini"),
        ("s3://bucket/a?b/c.mrxs", "s3://bucket/a?b/c/S.ini"),
        ("https://host/a/c%201.mrxs?sig=x/y%3D", "https://host/a/c%201/S.ini?sig=x/y%3D"),
        ("simplecache::s3://bucket/a/c.mrxs", "simplecache::s3://bucket/a/c/S.ini"),
        ("zip://a/c.mrxs::s3://bucket/x.zip", "zip://a/c/S.ini::s3://bucket/x.zip"),
        ("zip://c.mrxs::s3://bucket/x.zip", "zip://c/S.ini::s3://bucket/x.zip"),
    ],
)
def test_beside(uri: str, expected: str) -> None:
    assert beside(uri, f"{path_in(uri).stem}/S.ini") == expected


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


def test_processes_that_want_the_same_slide_copy_it_once(workers: ExitStack, root: Path) -> None:
    first = Worker(workers, "a", 6000, "stops")
    first.until("read 4000")
    others = [Worker(workers, "a", 6000) for _ in range(2)]
    for other in others:
        other.until("ready")
    assert [path.parent.suffix for path in copies(root)] == [".part"]  # none that anybody could take for whole
    first.go_on()
    first.until("staged 6000")
    for other in others:
        assert other.until("staged") == ["staged 6000"]  # and read nothing
    assert len(copies(root)) == 1


def test_a_process_killed_in_the_middle_leaves_nothing_half(workers: ExitStack, root: Path) -> None:
    killed = Worker(workers, "a", 6000, "stops")
    killed.until("read 4000")
    killed.process.kill()
    killed.process.wait()
    assert [path.parent.suffix for path in copies(root)] == [".part"]
    other = Worker(workers, "b", 2000)  # makes room for another, and cleans
    other.until("staged 2000")
    assert names(root) == ["b"]
    again = Worker(workers, "a", 6000)
    assert "read 0" in again.until("staged 6000")
    assert names(root) == ["a", "b"]


def test_a_copy_under_way_counts_with_all_its_bytes(workers: ExitStack, root: Path) -> None:
    first = Worker(workers, "a", 6000, "stops")
    first.until("read 4000")
    second = Worker(workers, "b", 6000)
    second.until("read_failed")
    assert names(root) == ["a"]
    first.go_on()
    first.until("staged 6000")


def test_no_process_removes_what_another_reads(workers: ExitStack, root: Path) -> None:
    reader = Worker(workers, "a", 6000)
    reader.until("staged")
    other = Worker(workers, "b", 6000)
    other.until("read_failed")
    reader.go_on()
    reader.until("still 6000")
    reader.process.wait()
    Worker(workers, "b", 6000).until("staged 6000")
    assert names(root) == ["b"]
