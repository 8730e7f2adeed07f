"""Small files written whole: on disks and in stores."""

from pathlib import Path
from typing import Any

import pytest

from udfs.wsi.store import write_bytes


def test_a_file_goes_to_a_store_by_its_uri(memory: Any) -> None:
    write_bytes("memory://models/deep/net.pth", b"weights", {"account_key": "of another store"})
    assert memory.cat("/models/deep/net.pth") == b"weights"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "net.pth"
    write_bytes(str(path), b"old")

    def dies(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write_bytes(str(path), b"newer and longer")
    assert path.read_bytes() == b"old"
    write_bytes(str(path), b"new")
    assert path.read_bytes() == b"new"
