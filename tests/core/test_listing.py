"""Slides below slides.root on a disk: links to folders and files, each file once, known by what its link leads to."""

import os
from pathlib import Path

import pytest

from jobs.runtime.cohort.locating import Located, locate
from jobs.runtime.cohort.patient_csv import Image
from jobs.runtime.settings.config import Config
from udfs.wsi import ErrorCode
from udfs.wsi.store import File


def find(root: Path, *names: str) -> dict[str, Located]:
    settings = {"patients": "p.csv", "slides": {"root": str(root)}, "output": {"root": "t"}}
    images = [Image(name, "c", "p", number, None, None, None) for number, name in enumerate(names)]
    return locate(images, Config.model_validate(settings))


def put(path: Path, content: bytes = b"slide") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path / "root/own.svs")
    return tmp_path / "root"


def test_slides_in_linked_folders_are_found_at_any_depth(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "disk2/deep/er/a.svs")
    put(tmp_path / "disk3/b.svs")
    (root / "sub").mkdir()
    (root / "sub/two").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2/deep/three").symlink_to("../../disk3")  # a link in a linked folder, relative
    found = find(root, "own", "a", "b")
    assert found["a"].uri == str(root / "sub/two/deep/er/a.svs")
    assert found["b"].uri == str(root / "sub/two/deep/three/b.svs")
    assert all(one.error is None for one in found.values())


def test_a_root_that_is_a_link_is_looked_into(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert find(tmp_path / "link", "own")["own"].uri == str(tmp_path / "link/own.svs")


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "../root", "../other"])
def test_a_loop_ends_and_nothing_above_the_root_is_listed(root: Path, tmp_path: Path, target: str) -> None:
    put(tmp_path / "beside.svs")
    put(tmp_path / "other/x.svs")
    (tmp_path / "other/back").symlink_to(root)
    (tmp_path / "other/up").symlink_to(tmp_path)
    (root / "link").symlink_to(target)
    found = find(root, "own", "beside")
    assert found["own"].uri == str(root / "own.svs")
    assert found["beside"].uri is None


@pytest.mark.parametrize(
    "kind", ["folder inside the root", "same folder by two links", "link to a file", "nested links"]
)
def test_a_file_that_is_reached_twice_is_one_file(root: Path, tmp_path: Path, kind: str) -> None:
    outside = put(tmp_path / "disk2/deep/a.svs")
    expected = root / "m/deep/a.svs"
    if kind == "folder inside the root":
        expected = put(root / "z/deep/a.svs")
        (root / "a_link").symlink_to(root / "z")
    elif kind == "same folder by two links":
        (root / "m").symlink_to(tmp_path / "disk2")
        (root / "n").symlink_to(tmp_path / "disk2")
    elif kind == "link to a file":
        expected = put(root / "z/a.svs")
        (root / "a.svs").symlink_to(expected)
    else:
        (root / "m").symlink_to(tmp_path / "disk2")
        (root / "n").symlink_to(outside.parent)
    assert find(root, "a")["a"].uri == str(expected)


@pytest.mark.parametrize(
    ("target", "links"),
    [
        ("root/raw/TCGA-1.svs", ["named/p1_0.svs"]),
        ("root/raw/TCGA-1.svs", ["a_first.svs", "named/p1_0.svs", "z/last.tif"]),
        ("disk2/TCGA-1.svs", ["p1_0.svs", "p1_1.svs"]),
        ("disk2/TCGA-1.svs", ["p1_0.svs", "deep/er/p1_1.svs", "TCGA-1.svs"]),
    ],
)
@pytest.mark.parametrize("is_folder_linked", [False, True])
def test_a_link_to_a_file_is_found_by_its_own_name(
    root: Path, tmp_path: Path, target: str, links: list[str], is_folder_linked: bool
) -> None:
    file = put(tmp_path / target)
    for link in links:
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        (root / link).symlink_to(os.path.relpath(file, (root / link).parent))
    if is_folder_linked:
        (root / "m_folder").symlink_to(file.parent)
    found = find(root, "own", *(Path(link).stem for link in links))
    assert {name: one.uri for name, one in found.items()} == {
        "own": str(root / "own.svs"),
        **{Path(link).stem: str(root / link) for link in links},
    }
    if is_folder_linked or target.startswith("root"):
        assert find(root, "TCGA-1")["TCGA-1"].error is None


def test_two_files_of_one_name_stay_ambiguous(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "disk2/own.svs", b"another")
    (root / "link").symlink_to(tmp_path / "disk2")
    error = find(root, "own")["own"].error
    assert error
    assert error.code is ErrorCode.FILE_AMBIGUOUS


def test_a_link_that_leads_nowhere_is_a_missing_file(root: Path, tmp_path: Path) -> None:
    (root / "a.svs").symlink_to(tmp_path / "gone.svs")
    (root / "b.svs").symlink_to("b.svs")  # to itself
    put(root / "deep/c.svs")
    (root / "folder").symlink_to(tmp_path / "gone")
    found = find(root, "a", "b", "c")
    assert found["a"].error
    assert found["a"].error.code is ErrorCode.FILE_MISSING
    assert found["b"].error
    assert found["b"].error.code is ErrorCode.FILE_MISSING
    assert found["c"].error is None


@pytest.mark.parametrize("kind", ["file", "link", "link to a link", "in a linked folder"])
@pytest.mark.parametrize("change", ["time", "size", "another target"])
def test_locating_and_opening_know_a_file_by_its_target(root: Path, tmp_path: Path, kind: str, change: str) -> None:
    target = put(tmp_path / "disk2/a.svs", b"12345")
    other = put(tmp_path / "disk3/a.svs", b"54321")
    os.utime(target, ns=(10**18, 10**18))
    os.utime(other, ns=(10**18, 10**18 + 10**9))
    path = root / "a.svs"
    if kind == "file":
        target.rename(path)
        target = path
    elif kind == "link":
        path.symlink_to(target)
    elif kind == "link to a link":
        (tmp_path / "middle").symlink_to(target)
        path.symlink_to(tmp_path / "middle")
    else:
        (root / "link").symlink_to(target.parent)
        path = root / "link/a.svs"
    before = find(root, "a")["a"].info
    assert before == File(str(path)).info
    assert before.size_bytes == 5
    file = File(str(path))
    if change == "time":
        target.write_bytes(b"54321")
        os.utime(target, ns=(10**18, 10**18 + 10**6))
    elif change == "size":
        target.write_bytes(b"123456")
        os.utime(target, ns=(10**18, 10**18))
    else:
        other.replace(target)
    after = find(root, "a")["a"].info
    assert after
    assert after != before
    assert after == File(str(path)).info
    with pytest.raises(Exception, match="was replaced since its header was read"):
        file.check_unchanged()()
