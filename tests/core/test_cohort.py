"""The patient CSV: what is refused names its lines, what is harmless is read, and every row finds its file or says why not."""

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from jobs.runtime.cohort.locating import Located, locate, read_cohort
from jobs.runtime.cohort.patient_csv import Image, parse_cohort, rows_as_written
from jobs.runtime.settings.config import Config, ConfigError
from udfs.wsi import ErrorCode
from udfs.wsi.store import StoreUri

HEADER = "image_id,center_id,patient_id,image_num"
GOOD = f"{HEADER},label\na,n,001,0,CE\nb,n,001,1,CE\nc,s,2,0,LAA\n"


def config_for(folder: Path, **slides: Any) -> Config:
    return Config.model_validate(
        {"patients": str(folder / "patients.csv"), "output": {"root": str(folder / "t")}, "slides": slides}
    )


def image(image_id: str, uri: str | None = None) -> Image:
    return Image(image_id, "n", "p", 0, None, None if uri is None else StoreUri(uri), None)


REFUSED = {
    "": ["empty"],
    "\n\n": ["empty"],
    HEADER: ["no rows"],
    "image_id,patient_id\na,1\n": ["lacks center_id, image_num", "image_id, patient_id"],
    "image_id;center_id;patient_id;image_num\n": ["lacks image_id"],
    f"{HEADER},image_id\na,n,1,0,a\n": ["image_id twice"],
    f"{HEADER}\na,n,1,0\nb,n,1,0\na,n,2,0\n": ["image_id is not unique", "a (lines 2, 4)"],
    f"{HEADER}\na,n,1,0\n\n\nb,s,1,0\n": ["disagree on center_id", "patient 1", "'n' (line 2)", "'s' (line 5)"],
    f"{HEADER},label\na,n,1,0,CE\nb,n,1,0,LAA\n": ["disagree on label", "'CE' (line 2)", "'LAA' (line 3)"],
    f"{HEADER},label\na,n,1,0,CE\nb,n,1,0,\n": ["disagree on label", "'' (line 3)"],
    f"{HEADER}\n,n,1,0\nb, ,1,0\nc,n,,0\n": ["empty", "2 (image_id)", "3 (center_id)", "4 (patient_id)"],
    f"{HEADER}\na,n\n": ["line 2 (patient_id)"],
    f"{HEADER}\na/b,n,1,0\n": ["line 2", "image_id 'a/b'", "path separators"],
    f"{HEADER}\na,n,..,0\n": ["line 2", "patient_id '..'"],
    f"{HEADER}\na\\b,n,1,0\nc,n,x\x07y,0\n": ["line 2", "line 3", "control characters", r"'x\x07y'"],
    f'{HEADER}\n"a\nb",n,1,0\n': ["line 3", r"'a\nb'", "control characters"],
    f"{HEADER}\na,n,1,first\n": ["line 2", "image_num", "'first'", "whole number"],
    f"{HEADER}\na,n,1,-1\n": ["line 2", "image_num", "'-1'"],
    f"{HEADER}\na,n,1,3000000000\n": ["line 2", "image_num"],
    f"{HEADER},mpp\na,n,1,0,half\n": ["line 2", "mpp", "'half'", "micrometres"],
    f"{HEADER},mpp\na,n,1,0,0\n": ["line 2", "mpp"],
    f"{HEADER},mpp\na,n,1,0,inf\n": ["line 2", "mpp"],
    f"{HEADER}\na,n,1,0,x,y\n": ["line 2 has 6 cells, the header 4", "quote"],
    f'{HEADER}\na,n,1,0\n"b,n,1,0\n': ["not CSV"],
    f"{HEADER}\na,n,1\0,0\n": ["NUL", "UTF-8"],
    f"{HEADER},mpp\na,n,1,0,0.25\nb,n,2,0,40\nc,n,3,0,0.019\n": [
        "micrometres per pixel, 0.02 to 20",
        "line 3 (mpp '40'); line 4 (mpp '0.019')",
    ],
    **{
        f"{HEADER},mpp\na,n,1,0,{mpp}\n": ["line 2", "0.02 to 20"]
        for mpp in ("20.1", "0x1", "+0.5", "0_1", "1e-9", "\u0660.\u0665")
    },
    **{f"{HEADER}\na,n,1,{number}\n": ["line 2", "image_num"] for number in ("1_0", "٣", "0.5", "1e0", "NA", "\uff11")},
    # labels
    f"{HEADER},label\na,n,1,0,CE\nb,n,2,0,ce\nc,n,3,0,CE\n": ["labels differ", "'CE' (lines 2, 4), 'ce' (line 3)"],
    f"{HEADER},label\na,n,1,0,+\nb,n,2,0,-\n": ["'+' (line 2), '-' (line 3)", "positive and negative"],
    f'{HEADER},label\na,n,1,0,"C\nE"\n': ["line 3 (label 'C\\nE')"],
    f"{HEADER},label\na,n,1,0,C\x1b[2JE\n": [r"line 2 (label 'C\x1b[2JE')"],
    f"{HEADER},label\na,n,1,0,{'x' * 10_000}\n": ["255 characters", "xxx'... (10,000 characters)"],
    # identifiers
    f"{HEADER}\n{'x' * 10_000},n,1,0\n": ["255 characters", "line 2 (image_id 'xxx", "(10,000 characters)"],
    f"{HEADER}\na,n,nan,0\nb,n,#N/A,0\n": ["empty", "line 2 (patient_id 'nan'); line 3 (patient_id '#N/A')"],
    f"{HEADER}\n“a”,n,1,0\n": ["quotes", "“a”"],
    f"{HEADER}\na,'n',1,0\n": ["quotes", "line 2 (center_id \"'n'\")"],
    f"{HEADER}\na,n,55.0,0\nb,n,55.0,1\n": ["dtype=str", "line 2 (patient_id '55.0')"],
    f"{HEADER}\na,n,55,0\nb,n,55.0,1\nc,n,x,0\n": ["dtype=str", "line 3 (patient_id '55.0')"],
    f"{HEADER}\n1.2E+09,n,1,0\n": ["Excel", "line 2 (image_id '1.2E+09')"],
    f"{HEADER}\ncafé,n,1,0\ncafe\u0301,n,2,0\n": ["image_id is not unique", "(lines 2, 3)"],
    f"{HEADER}\na\u200e,n,1,0\nb,n\u00a0n,1,0\n": ["invisible", r"'a\u200e'", r"'n\xa0n'"],
    f"{HEADER},uri\na,n,1,0,s3://b/\x1b[31mx.svs\n": ["line 2 (uri", "control characters"],
    # the file as a whole
    f"sep=,\n{HEADER}\na,n,1,0\n": ["it has 'sep=': the header is in line 2: delete the lines above it"],
    f"Our cohort\n\n{HEADER}\na,n,1,0\n": ["the header is in line 3"],
    f"sep=;\n{HEADER}\na,n,1,0\n".replace(",", ";"): ["separated by semicolons: save it with commas"],
    f"{HEADER}\na,n,1,0\n".replace(",", "\t"): [r"image_id\tcenter_id", "separated by tabs: save it with commas"],
    f"{HEADER}\na,n,1,0\n".replace(",", "|"): ["separated by bars"],
    f"{HEADER}\na,n,1,0\n{HEADER}\nb,n,2,0\n": ["line 3 repeats the header"],
    f"{HEADER},Label,LABEL\na,n,1,0,x,y\n": ["label twice"],
    "PK\3\4\0\1": ["Excel workbook", "CSV UTF-8"],
    "  <!doctype HTML><p>Sign in": ["HTML", "login"],
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\n": ["Git LFS pointer", "git lfs pull"],
    '{"image_id": []}': ["JSON"],
    "x" * 10_000: ["lacks image_id", "(10,000 characters)"],
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: " ".join(REFUSED[text])[:60])
def test_a_csv_at_fault_is_refused_in_one_line_with_its_rows(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cohort(text.encode())
    line = str(caught.value)
    assert "\n" not in line
    assert all(told in line for told in REFUSED[text]), line


def test_another_encoding_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match="line 3 is not UTF-8"):
        parse_cohort(f"{HEADER}\na,n,1,0\nb,Köln,2,0\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"line 2 is not UTF-8 \(byte 0xf6\)"):  # old Macs end lines in CR
        parse_cohort(f"{HEADER}\rb,Köln,2,0\r".encode("cp1252"))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        with pytest.raises(ConfigError, match="UTF-8"):
            parse_cohort(GOOD.encode(encoding))


def test_many_rows_at_fault_are_counted_not_listed() -> None:
    rows = "".join(f"x,n,{i},0\ny{i},,{i},0\n" for i in range(20))
    with pytest.raises(ConfigError, match=r"line 11 \(center_id\); and 15 more$"):
        parse_cohort(f"{HEADER}\n{rows}".encode())


def test_identifiers_stay_text() -> None:
    rows = parse_cohort(f"{HEADER},mpp\n007,01,0042,3,0.25\n7,1e5,42,0,\n".encode())
    assert rows == [
        Image("007", "01", "0042", 3, None, None, 0.25),
        Image("7", "1e5", "42", 0, None, None, None),
    ]


@pytest.mark.parametrize(
    "data",
    [
        GOOD.encode("utf-8-sig"),
        GOOD.replace("\n", "\r\n").encode(),
        GOOD.replace("\n", "\n\n").encode() + b"\n,,,,\n  \n",
        b"\n\n" + GOOD.encode().rstrip(),
        GOOD.replace(",", " , ").encode(),
        GOOD.replace(HEADER, HEADER.upper()).replace("label", "Label").encode(),
        GOOD.replace(",CE", ",CE,,").encode(),
        GOOD.replace(",0,", ",0.0,").replace(",1,", ",1.,").encode(),
        GOOD.replace(",n,", ', "n",').encode(),
        GOOD.replace(HEADER, f"Unnamed: 0,{HEADER}")
        .replace("\na,", "\n0,a,")
        .replace("\nb,", "\n1,b,")
        .replace("\nc,", "\n2,c,")
        .encode(),
        GOOD.replace("label", "label,uri,mpp").replace("CE", "CE,NA,nan").replace("LAA", "LAA,null,").encode(),
        b'label,notes,image_id,patient_id,image_num,center_id\nCE,"a, b",a,001,0,n\nCE,"x\ny",b,001,1,n\nLAA,,c,2,0,s\n',
    ],
    ids=[
        "byte order mark",
        "CRLF",
        "blank lines",
        "blank beginning",
        "spaces",
        "another case in the header",
        "commas at the end",
        "whole numbers as floats",
        "blanks before quotes",
        "an index of pandas",
        "missing values",
        "extra and quoted columns in any order",
    ],
)
def test_what_is_harmless_is_read(data: bytes) -> None:
    assert parse_cohort(data) == parse_cohort(GOOD.encode())


@pytest.mark.parametrize(
    "label",
    [
        "NA",
        "nan",
        "NaN",
        "None",
        "N/A",
        "null",
        "NULL",
        "-",
        "#N/A",
        "?",
        "<NA>",
        "NaT",
        "n/a",
        "\\N",
        ".",
        "--",
        "\N{EN DASH}",
        " ",
    ],
)
def test_what_stands_for_a_missing_label_is_none(label: str) -> None:
    first, second = parse_cohort(f"{HEADER},label\na,n,1,0,{label}\nb,n,2,0,CE\n".encode())
    assert (first.label, second.label) == (None, "CE")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("CE", "Ce"), ("IDH mut", "IDHmut"), ("IDH mut", "IDH  mut"), ("Straße", "STRASSE"), ("pT2", "pT\u00b2")),
        *(("1", "1.0"), ("1", "01"), ("0", "-0"), ("100", "1e2"), ("0.5", ".50"), ("1", "\uff11"), ("1", "\u0661")),
    ],
)
def test_labels_that_differ_only_in_writing_are_refused(one: str, other: str) -> None:
    with pytest.raises(ConfigError, match="labels differ only in case, blanks or as numbers") as caught:
        parse_cohort(f"{HEADER},label\na,n,1,0,{one}\nb,n,2,0,{other}\n".encode())
    assert repr(one) in str(caught.value) and repr(other) in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"), [("CE", "LAA"), ("1", "-1"), ("1", "10"), ("grade 1", "grade 2"), ("no", "unknown"), ("1", "1a")]
)
def test_labels_that_differ_are_kept_as_they_are(one: str, other: str) -> None:
    rows = parse_cohort(f"{HEADER},label\na,n,1,0,{one}\nb,n,2,0,{other}\n".encode())
    assert [row.label for row in rows] == [one, other]


def test_texts_are_in_one_unicode_form() -> None:
    """Names that macOS lists are in form NFD, and so are CSVs made of them: the same patient, centre and class."""
    nfd = "Mu\u0308ller"
    data = f"{HEADER},label\na,{nfd},{nfd},0,{nfd}\nb,Müller,Müller,1,Müller\n".encode()
    first, second = parse_cohort(data)
    assert (first.center_id, first.patient_id, first.label) == ("Müller",) * 3
    assert (second.center_id, second.patient_id, second.label) == ("Müller",) * 3
    assert [patient for patient, _ in rows_as_written(data)[1]] == ["Müller"] * 2


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_rows_keep_their_text_byte_for_byte(ending: str, mark: bytes) -> None:
    header = f'label,"notes",image_id, patient_id ,image_num,center_id{ending}'
    rows = [f'CE,"a,\n""b""",a, 001 ,0,n{ending}', f"CE , ,b,001,01,n{ending}", "LAA,Köln,c,2,0,s"]
    blank = ending + " , ,," + ending
    data = mark + (ending + header + rows[0] + blank + rows[1] + rows[2]).encode()
    assert len(parse_cohort(data)) == 3
    rows[2] += ending
    assert rows_as_written(data) == (
        mark + header.encode(),
        [(patient, row.encode()) for patient, row in zip(("001", "001", "2"), rows, strict=True)],
    )


def test_quoted_commas_and_other_scripts_are_kept() -> None:
    [row] = parse_cohort(f'{HEADER},label\n"slide, 1",Köln,ß-7,0,"CE, sure"\n'.encode())
    assert row == Image("slide, 1", "Köln", "ß-7", 0, "CE, sure", None, None)


def test_a_csv_is_read_from_any_fsspec_uri_and_named_where_it_fails(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/cohort/patients.csv", GOOD.encode())
    config = config_for(tmp_path)
    assert len(read_cohort(config.model_copy(update={"patients": "memory://cohort/patients.csv"})).images) == 3
    with pytest.raises(ConfigError, match=r"patients: no file at .*patients\.csv"):
        read_cohort(config)
    (tmp_path / "patients.csv").write_text(HEADER)
    with pytest.raises(ConfigError, match=r"patients: .*patients\.csv: it has a header and no rows"):
        read_cohort(config)
    with pytest.raises(ConfigError, match=r"cannot be read") as caught:
        read_cohort(config.model_copy(update={"patients": "nosuch://u:SECRETSECRET@host/p.csv?sig=SECRETSECRET"}))
    assert "SECRET" not in str(caught.value)


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    for name in ("a.svs", "deep/er/b.TIF", "north/c.svs", "south/c.tiff", "e.1.svs", "notes/f.txt", "007.tif", "7.tif"):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "slides"


def code(located: Located) -> ErrorCode | None:
    return located.error.code if located.error else None


def test_files_under_the_root_are_found_by_name_at_any_depth(slides: Path) -> None:
    config = config_for(slides.parent, root=str(slides))
    found = locate([image(name) for name in ("a", "b", "c", "e.1", "f", "007", "7", "gone")], config)
    assert found["a"].uri == str(slides / "a.svs")
    assert found["b"].uri == str(slides / "deep/er/b.TIF")
    assert found["e.1"].uri == str(slides / "e.1.svs")
    assert (found["007"].uri, found["7"].uri) == (str(slides / "007.tif"), str(slides / "7.tif"))
    info = found["a"].info
    assert info is not None
    assert info.size_bytes == 5
    assert {name for name, located in found.items() if located.error} == {"c", "f", "gone"}
    assert (code(found["c"]), code(found["f"]), code(found["gone"])) == (
        ErrorCode.FILE_AMBIGUOUS,
        *[ErrorCode.FILE_MISSING] * 2,
    )
    ambiguous, gone = str(found["c"].error), str(found["gone"].error)
    assert "north/c.svs" in ambiguous
    assert "south/c.tiff" in ambiguous
    assert "give its uri in the CSV" in ambiguous
    assert all(told in gone for told in ("gone", str(slides), ".svs", "upload it"))


@pytest.mark.parametrize("in_csv", ["café", "cafe\u0301"])
@pytest.mark.parametrize("on_disk", ["café", "cafe\u0301"])
def test_files_are_found_in_either_unicode_form(tmp_path: Path, in_csv: str, on_disk: str) -> None:
    (tmp_path / f"{on_disk}.svs").write_bytes(b"1")
    path = str(tmp_path / f"{on_disk}.svs")
    rows = parse_cohort(f"{HEADER},uri\n{in_csv},n,1,0,\nb,n,2,0,{tmp_path}/{in_csv}.svs\n".encode())
    found = locate(rows, config_for(tmp_path, root=str(tmp_path)))
    assert [found[row.image_id].uri for row in rows] == [path, path]


@pytest.mark.parametrize(
    ("image_id", "told"),
    [
        ("A", "A differs from a file only in case: write a as image_id"),
        ("E.1", "write e.1 as image_id"),
        ("a.svs", "a.svs differs from a file only in the file's ending: write a as image_id"),
        ("B.tif", "write b as image_id"),
        ("scan", "write scan.ome as image_id"),
        ("7.0", "write 7 as image_id"),
        ("x", "upload it"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_file_that_bears_nearly_the_name_is_told(slides: Path, image_id: str, told: str, alone: bool) -> None:
    (slides / "scan.ome.tif").write_bytes(b"1")
    config = config_for(slides.parent, root=str(slides))
    if not alone:
        assert told in str(locate([image(image_id), image("a")], config)[image_id].error)
    elif image_id != "x":  # none of the CSV's slides is there
        with pytest.raises(ConfigError, match="has none of the 1 slides") as caught:
            locate([image(image_id)], config)
        assert told in str(caught.value)


def test_folders_with_odd_names_are_told_in_one_line(slides: Path) -> None:
    for name in ("x\n1", "x\x1b[2J"):
        (slides / name).mkdir()
        (slides / name / "twin.svs").write_bytes(b"1")
    error = str(locate([image("twin"), image("a")], config_for(slides.parent, root=str(slides)))["twin"].error)
    assert error.isprintable() and r"x\n1/twin.svs" in error
    for name in ("café", "cafe\u0301"):
        (slides / f"{name}.svs").write_bytes(b"1")
    error = str(locate([image("café"), image("a")], config_for(slides.parent, root=str(slides)))["café"].error)
    assert r"caf\xe9.svs" in error and r"cafe\u0301.svs" in error  # they look alike


def test_files_are_found_in_a_store_by_uri() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/x/a.svs", b"12345")
    found = locate([image("a")], config_for(Path(), root="memory://bucket"))
    assert found["a"].uri == "memory://bucket/x/a.svs"


@pytest.mark.parametrize("root", ["abfss://c@acc.dfs.core.windows.net/dir", "abfss://c@acc.dfs.core.windows.net/dir/"])
def test_the_account_in_the_root_stays_in_the_uris(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of abfss://container@account/dir fsspec keeps container/dir, and so do the names in its listings."""

    class Azure(MemoryFileSystem):  # type: ignore[misc]
        def isdir(self, path: str) -> bool:
            return path.rstrip("/") == "c/dir"

        def find(self, path: str, **_: Any) -> Any:
            return {f"{path.rstrip('/')}/deep/a.svs": {"size": 5, "etag": "1"}}

    monkeypatch.setattr(
        "udfs.wsi.store.listing.filesystem", lambda uri, _: (Azure(), "c/dir" + uri.partition("/dir")[2])
    )
    found = locate([image("a")], config_for(Path(), root=root))
    assert found["a"].uri == "abfss://c@acc.dfs.core.windows.net/dir/deep/a.svs"


def test_a_uri_in_the_csv_wins_over_the_root(slides: Path) -> None:
    rows = [image("a", str(slides / "007.tif")), image("b"), image("x", f"file://{slides}/7.tif")]
    rows += [image("gone", str(slides / "gone.svs")), image("folder", str(slides))]
    found = locate(rows, config_for(slides.parent, root=str(slides)))
    assert [found[row.image_id].uri for row in rows[:3]] == [rows[0].uri, str(slides / "deep/er/b.TIF"), rows[2].uri]
    assert code(found["gone"]) is ErrorCode.FILE_MISSING
    assert code(found["folder"]) is ErrorCode.NOT_A_SLIDE
    assert locate(rows[:1], config_for(slides.parent))["a"].error is None


def test_a_root_that_is_needed_and_not_there_stops_the_job(slides: Path) -> None:
    with pytest.raises(ConfigError, match=r"slides\.root is not set and 2 rows of the CSV have no uri \(a, \.\.\.\)"):
        locate([image("a"), image("b")], config_for(slides.parent))
    with pytest.raises(ConfigError, match=r"slides\.root: no folder at .*nowhere: set it to the folder"):
        locate([image("a")], config_for(slides.parent, root=str(slides / "nowhere")))
    with pytest.raises(ConfigError, match=r"slides\.root: nosuch://host/x cannot be listed") as caught:
        locate([image("a")], config_for(slides.parent, root="nosuch://u:SECRETSECRET@host/x"))
    assert "SECRET" not in str(caught.value) and "credentials" in caught.value.remedy


def test_a_root_that_holds_none_of_the_slides_stops_the_job(slides: Path) -> None:
    """A bucket that is not mounted is no hundred thousand missing slides."""
    with pytest.raises(ConfigError, match=r"slides\.root: .*deep has none of the 2 slides .*\(a, \.\.\.\).*mounted"):
        locate([image("a"), image("gone")], config_for(slides.parent, root=str(slides / "deep")))


def test_a_replaced_file_has_another_version(slides: Path) -> None:
    config = config_for(slides.parent, root=str(slides))
    before = locate([image("a")], config)["a"].info
    assert locate([image("a")], config)["a"].info == before
    (slides / "a.svs").write_bytes(b"other")
    assert locate([image("a")], config)["a"].info != before
