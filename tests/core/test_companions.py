"""The files that belong to a slide: found by what the slide names or what lies beside it, copied with it, none outside."""

from pathlib import Path
from typing import Any

import pytest

from tests.core.staging import copies, names, slide
from tests.slides.foreign import write_dicom, write_mirax, write_vms
from tests.slides.make import position_pixels
from udfs.wsi.reading.companions import beside, path_in
from udfs.wsi.reading.staging import staged

pytestmark = pytest.mark.usefixtures("staging_root")


def test_the_files_that_belong_to_a_slide_come_along(memory: Any, tmp_path: Path, staging_root: Path) -> None:
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
def test_nothing_that_a_slide_names_is_written_outside_of_its_copy(memory: Any, staging_root: Path, name: str) -> None:
    text = f"[Virtual Microscope Specimen]\nImageFile={name}\nMapFile=map.jpg\n"
    memory.pipe("/bucket/c/d/v.vms", text.encode())
    slide(memory, "c/d/map.jpg")
    slide(memory, f"c/d/{name}")  # to a store it is a name like any other
    with staged("memory://bucket/c/d/v.vms", None, "Hamamatsu VMS") as path:
        assert names(staging_root.parent) == names(path.parent) == ["map.jpg", "v.vms"]


def test_a_file_that_is_named_twice_is_copied_once(memory: Any) -> None:
    slide(memory, "map.jpg")
    memory.pipe("/bucket/v.vms", b"[Virtual Microscope Specimen]\nImageFile=./map.jpg\nMapFile=map.jpg\n")
    with staged("memory://bucket/v.vms", None, "Hamamatsu VMS") as path:
        assert names(path.parent) == ["map.jpg", "v.vms"]


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
