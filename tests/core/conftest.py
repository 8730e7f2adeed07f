"""What tests of the core share: the demo cohort, built once, and a store that is not local."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.slides.demo import build_demo


@pytest.fixture(scope="session")
def demo_cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo cohort with its weights, fresh from its makers."""
    return build_demo(tmp_path_factory.mktemp("cohort"))


@pytest.fixture
def memory() -> Iterator[Any]:
    """An empty store that is not local."""
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def staging_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the copies of remote slides, of this test alone; it does not exist yet."""
    monkeypatch.setenv("SLIDELAKE_STAGING", str(tmp_path / "staging"))
    return tmp_path / "staging"
