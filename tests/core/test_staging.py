"""Copies of remote slides: whole or not there, made once however many ask, never taken from under who reads them."""

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem

from tests.core.staging import SIZE, copies, names, slide
from udfs.wsi import ErrorCode, SlideError
from udfs.wsi.reading import staging
from udfs.wsi.reading.staging import staged
from udfs.wsi.store import Traffic

pytestmark = pytest.mark.usefixtures("staging_root")


def test_a_local_slide_is_used_where_it_lies(tmp_path: Path, staging_root: Path) -> None:
    path = tmp_path / "a.czi"
    path.write_bytes(b"x")
    for uri in (str(path), path.as_uri()):
        with staged(uri) as found:
            assert found == path
    assert not staging_root.exists()


def test_a_copy_is_whole_and_serves_again(memory: Any) -> None:
    # more requests than are under way at once
    content = np.random.default_rng(1).bytes(staging.REQUEST_BYTES * 6 + 12345)
    memory.pipe("/bucket/a.czi", content)
    with staged("memory://bucket/a.czi") as path:
        assert path.name == "a.czi"
        assert path.read_bytes() == content
    traffic = Traffic()
    with staged("memory://bucket/a.czi", traffic=traffic) as again:
        assert again == path
        assert again.read_bytes() == content
    assert traffic.bytes == 0


def test_who_comes_second_uses_what_the_first_copied(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = slide(memory, "a")
    first, second = Traffic(), Traffic()
    rivals = iter([first])

    def outrun(path: Path) -> Any:
        if rival := next(rivals, None):
            with staged(uri, traffic=rival):  # between our look and our lock
                pass
        return FileLock(path)

    monkeypatch.setattr(staging, "FileLock", outrun)
    with staged(uri, traffic=second):
        assert (first.bytes, second.bytes) == (SIZE, 0)


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


def test_the_longest_unused_goes_first(memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 3 * SIZE)
    for name in "abcad":  # a is used again before d needs room
        with staged(slide(memory, name)) if name not in names(staging_root) else staged(f"memory://bucket/{name}"):
            pass
    assert names(staging_root) == ["a", "c", "d"]


def test_what_is_read_is_never_removed(memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert "c" in names(staging_root)


def test_a_slide_that_can_never_fit_drives_out_no_other(
    memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", 2 * SIZE)
    with staged(slide(memory, "a")):
        pass
    with pytest.raises(SlideError, match="may hold 2,000"), staged(slide(memory, "b", 2 * SIZE + 1)):
        pass
    assert names(staging_root) == ["a"]


def test_the_bound_is_half_of_what_the_disk_has_for_copies(
    memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 4 * SIZE - 2})())
    with pytest.raises(SlideError, match="may hold 1,999"), staged(slide(memory, "a", 2 * SIZE)):
        pass


def test_a_disk_that_keeps_the_folder_of_an_open_lock(
    memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    folders = [path for path in staging_root.iterdir() if path.is_dir()]
    assert len(folders) == 2  # the copy, and what is left of the one removed last: the next copy takes it away


def test_other_files_in_the_folder_are_left_alone(
    memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "MAX_BYTES", SIZE)
    (staging_root / "my slides-123").mkdir(parents=True)
    (staging_root / "my slides-123" / "precious").write_text("x")
    for name in "ab":
        with staged(slide(memory, name)):
            pass
    assert names(staging_root) == ["b", "precious"]


def test_a_disk_that_refuses_is_named(memory: Any, staging_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "in_parts", full)
    with pytest.raises(SlideError) as caught, staged(slide(memory, "a")):
        pass
    assert caught.value.code == ErrorCode.READ_FAILED
    assert "memory://bucket/a" in caught.value.message
    assert "No space left on device" in caught.value.message
    assert "SLIDELAKE_STAGING" in caught.value.message
    assert copies(staging_root) == []


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


class ExpiringStore(MemoryFileSystem):  # type: ignore[misc]
    """A store whose token expires before the third request."""

    protocol = "expiring"
    expires = True

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> Any:
        if self.expires and start == 2 * SIZE:
            raise PermissionError("the token expired")
        return super().cat_file(path, start, end, **options)


def test_a_store_that_fails_halfway_leaves_nothing(staging_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("expiring", ExpiringStore, clobber=True)
    monkeypatch.setattr(staging, "REQUEST_BYTES", SIZE)
    uri = "expiring://bucket/a"
    fsspec.filesystem("expiring").pipe(uri, bytes(3 * SIZE))
    with pytest.raises(SlideError) as caught, staged(uri):
        pass
    assert caught.value.code == ErrorCode.ACCESS_DENIED
    assert copies(staging_root) == []
    monkeypatch.setattr(ExpiringStore, "expires", False)
    with staged(uri) as path:
        assert path.stat().st_size == 3 * SIZE


def test_a_slide_that_is_not_there_is_missing() -> None:
    with pytest.raises(SlideError) as caught, staged("memory://bucket/none.czi"):
        pass
    assert caught.value.code == ErrorCode.FILE_MISSING
