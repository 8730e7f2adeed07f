"""Where tables can lie: paths and URIs that all who write and read them take for the same place; others are refused."""

from pathlib import Path

import pytest

from jobs.runtime.settings.config import Config
from jobs.training.refusals import FeedError
from jobs.training.table_stores import TableStore


def root_of(root: str) -> str:
    return Config.model_validate({"patients": "p.csv", "output": {"root": root}}).output.root


@pytest.mark.parametrize(
    ("root", "reason"),
    [
        ("/data/%41", "'%41' in a path"),
        ("data/100%25/x", "'%25' in a path"),
        ("file:///data/%c3%a4", "'%c3' in a path"),
        ("s3a://bucket/%2F", "'%2F' in a path"),
        ("C:\\data", "'\\\\\\\\' in a path"),
        ("/data/`x`", "'`' in a path"),
        ("/data/x\ny", "'\\\\n' in a path"),
        ("/data/x\u200by", "in a path"),
        ("/data/x\u202ey", "in a path"),
        ("abfss://c@a.dfs.core.windows.net/x?sig=c2VjcmV0", r"ends at '\?'"),
        ("file:///data/a#1", "ends at '#'"),
        ("file:/data/tables", "'file:/' begins neither"),
        ("s3a:/bucket/x", "'s3a:/' begins neither"),
        ("hdfs:///data/../x", "'..' in a URI"),
        ("", "names no folder"),
        ("  ", "names no folder"),
    ],
)
def test_a_place_that_readers_take_for_another_is_refused(root: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        root_of(root)
    assert "name the folder otherwise" in str(refused.value) or "give a path" in str(refused.value)


@pytest.mark.parametrize(
    "root",
    ["a b", "ümläut 漢字 🔬", "100%", "%4", "50%x", "a#b?c", "a:b", "$x ${x} {1} [2] *", "hdfs:///x", "s3a://b/a b"],
)
def test_any_other_place_is_taken_as_it_is(root: str) -> None:
    assert root_of(root) == root


def test_a_tilde_is_the_home_folder_as_it_is_for_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert root_of("~/tables") == "/home/me/tables"
    assert root_of("~nobody-of-that-name/x") == "~nobody-of-that-name/x"


@pytest.mark.parametrize("name", ["%41", "a\\b"])
def test_the_feed_refuses_a_folder_that_deltalake_takes_for_another(tmp_path: Path, name: str) -> None:
    with pytest.raises(FeedError, match="name the folder otherwise"):
        TableStore(str(tmp_path / name))
