"""Labels of the patient CSV: what stands for none is told, what may be a class is refused, what is one is kept."""

from argparse import Namespace
from pathlib import Path

import pytest

from jobs.runtime.cohort.patient_csv import Image, parse_cohort, unlabelled
from jobs.runtime.run.cli import main
from jobs.runtime.run.run import Job, Run
from jobs.runtime.settings.arguments import BAD_CONFIG
from jobs.runtime.settings.config import ConfigError
from tests.messages import plain
from udfs.labels import is_no_value, twins

HEADER = "image_id,center_id,patient_id,image_num,label"


def cohort(*labels: str) -> list[Image]:
    """A CSV with a patient for each label."""
    rows = [f"i{n},n,p{n},0,{label}" for n, label in enumerate(labels)]
    return parse_cohort("\n".join([HEADER, *rows]).encode())


def test_rows_without_a_label_are_told_with_what_they_have() -> None:
    assert unlabelled(cohort("CE", "NA", "NA", "nan", "", "LAA")) == "4 rows have no label: 'NA' (2), 'nan' (1), '' (1)"
    assert unlabelled(cohort("CE", "?")) == "1 row has no label: '?' (1)"
    assert unlabelled(cohort("CE", "")) == "1 row has no label: '' (1)"
    assert unlabelled(cohort("none", *["CE"] * 20)) == "1 row has no label: 'none' (1)"
    assert unlabelled(cohort("CE", "LAA")) == ""


def test_a_csv_without_labels_is_not_remarked_upon() -> None:
    assert unlabelled(cohort("", "")) == ""
    assert unlabelled(parse_cohort(b"image_id,center_id,patient_id,image_num\na,n,1,0\n")) == ""


@pytest.mark.parametrize("word", ["none", "nil"])
def test_a_word_that_may_be_a_class_is_refused_if_it_is_frequent(word: str) -> None:
    for labels in (["mild", word, "severe"], [word] * 10 + ["mild"] * 1000, [word] * 2 + ["mild"] * 39, [word]):
        with pytest.raises(ConfigError, match=rf"label '{word}' \(lines? \d.*another name") as caught:
            cohort(*labels)
        assert "leave the cell empty" in caught.value.remedy
    for labels in ([word] * 2 + ["mild"] * 40, [word] * 9 + ["mild"] * 1000, ["None", "NIL", "NA", "mild"]):
        assert {image.label for image in cohort(*labels)} == {"mild", None}


@pytest.mark.parametrize(
    "text",
    [
        *("\N{MINUS SIGN}", "\N{HYPHEN}", "\N{HORIZONTAL BAR}", "\N{EM DASH}\N{EM DASH}", "\u200b", "\uff0d", "\uff1f"),
        *("#N/A N/A", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN", "n / a", "+nan", "-nan", "\N{MINUS SIGN}NaN"),
        *("#NV", "#SPILL!", "#CALC!", "#FIELD!", "#BEZUG!", "#\xa1VALOR!", "#NAME?", "#DIV/0!"),
        *("n.d.", "N.D.", "not available", "Not  Available", "(blank)", "(none)", "\\N"),
    ],
)
def test_more_that_stands_for_a_missing_label(text: str) -> None:
    assert is_no_value(text)
    [missing, given] = cohort(text, "CE")
    assert (missing.label, given.label) == (None, "CE")


@pytest.mark.parametrize(
    "label", ["unknown", "missing", "not done", "negative", "#1", "0", "+", "no", "nd", "-1", "IND"]
)
def test_words_and_numbers_stay_classes(label: str) -> None:
    assert not is_no_value(label)
    assert [image.label for image in cohort(label, "CE")] == [label, "CE"]


def test_numbers_are_compared_exactly() -> None:
    long = "1234567890123456789012345678901"
    assert twins([f"{long}1", f"{long}2", f"0.{long}1", f"0.{long}2", "1e400", "1e401"]) == []
    assert twins([long, f"0{long}.0"]) == [[f"0{long}.0", long]]
    assert twins(["\N{MINUS SIGN}1", "-1", "1", "T\N{NON-BREAKING HYPHEN}cell", "T-cell", "0.5", "1/2"]) == [
        ["-1", "\N{MINUS SIGN}1"],
        ["T-cell", "T\N{NON-BREAKING HYPHEN}cell"],
    ]


def test_labels_that_differ_in_what_nobody_sees_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'CE' \(line 2\), 'CE\\u200b' \(line 3\)"):
        cohort("CE", "CE\u200b")


@pytest.mark.parametrize(
    "text", ["grade\xa02", "\u56db\u3000\u7d1a", "1\u202f000", "\u0645\u06cc\u200c\u062e", "\u0915\u094d\u200d\u0937"]
)
def test_blanks_and_joiners_of_all_scripts_are_kept(text: str) -> None:
    rows = f"{HEADER},uri\na,n,1,0,{text},/slides/{text}.svs\n"
    [image] = parse_cohort(rows.encode())
    assert (image.label, image.uri) == (text, f"/slides/{text}.svs")
    for column in ("image_id", "center_id", "patient_id"):
        cells = dict(zip(HEADER.split(","), ("a", "n", "1", "0", "CE"), strict=True)) | {column: text}
        with pytest.raises(ConfigError, match=f"invisible characters in identifiers: line 2 \\({column}"):
            parse_cohort(f"{HEADER}\n{','.join(cells.values())}\n".encode())


@pytest.mark.parametrize("control", ["\x07", "\x85", "\u2028", "\u2029", "\u200e", "\u202e", "\u2066", "\u061c"])
def test_controls_in_labels_and_uris_are_refused(control: str) -> None:
    for cells in (f"C{control}E,", f",/slides/a{control}b.svs"):
        with pytest.raises(ConfigError, match=r"control characters, .*line \d \((label|uri) '"):
            parse_cohort(f"{HEADER},uri\na,n,1,0,{cells}\n".encode())


@pytest.mark.parametrize("name", ["NA", "-", "None", "null", "nan", "?"])
def test_a_centre_may_be_called_anything_but_nothing(name: str) -> None:
    [image] = parse_cohort(f"{HEADER}\na,{name},1,0,CE\n".encode())
    assert image.center_id == name
    for row in (f"{name},n,1,0,CE", f"a,n,{name},0,CE"):
        with pytest.raises(ConfigError, match="identifiers that stand for an empty cell: line 2"):
            parse_cohort(f"{HEADER}\n{row}\n".encode())
    with pytest.raises(ConfigError, match=r"empty identifiers: line 2 \(center_id\)"):
        parse_cohort(f"{HEADER}\na,,1,0,CE\n".encode())


_SECRET_URIS = [
    "https://u:SECRETPW@h/x\xa0y\u200e.svs?sig=SECRET",
    "s3://SECRETKEY:SECRET@b/x\x07.svs",
    "simplecache::https://SECRETTOKEN@h/x\x07.svs#SECRET",
    "see https://u:SECRETPW@h/x\x07.svs?sig=SECRET",
    "https://h/a https://u:SECRETPW@h/x\x07?SECRET",
    "https://[SECRET@h/x\x07.svs",
]


@pytest.mark.parametrize("uri", _SECRET_URIS)
def test_no_credentials_of_a_uri_in_any_cell_are_shown(uri: str) -> None:
    columns = f"{HEADER},uri,mpp".split(",")
    good = dict(zip(columns, ("a", "n", "1", "0", "CE", "", ""), strict=True))
    texts = [
        f"{','.join(columns)}\n{','.join((good | {column: cell}).values())}\n"
        for column in columns
        for cell in (uri, f"'{uri}'", uri + "x" * 9000)
        if column != "label" or "\x07" in cell or "\u200e" in cell
    ]
    clean = uri.replace("\x07", "").replace("\u200e", "")
    texts += [
        f"{HEADER}\na,n,1,0,{clean}\nb,n,1,0,LAA\n",
        f"{HEADER}\na,n,1,0,{clean}\nb,n,2,0,{clean.upper()}\n",
        f"{HEADER[9:]},{clean}\n",
    ]
    for text in texts:
        with pytest.raises(ConfigError) as caught:
            parse_cohort(text.encode())
        assert "SECRET" not in str(caught.value)


def test_faults_of_the_whole_file_are_told_plainly() -> None:
    for text, told in {
        "sep=,\nimage_id,center_id,patient_id,image_num\na,n,1,0\n": "it has 'sep=': the header is in line 2",
        f"{HEADER}\na,n,1,0,+\nb,n,2,0,\N{MINUS SIGN}\n": "labels are '+' (line 2), '\N{MINUS SIGN}' (line 3)",
        f"\ufeff\ufeff{HEADER}\na,n,1,0,CE\n": "more than one byte order mark",
    }.items():
        with pytest.raises(ConfigError) as caught:
            parse_cohort(text.encode())
        assert told in str(caught.value)


def test_a_job_prints_once_and_before_spark_starts_which_rows_have_no_label(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def work(run: Run, arguments: Namespace) -> int:
        raise AssertionError

    (tmp_path / "patients.csv").write_text(f"{HEADER}\na,n,1,0,CE\nb,n,2,0,?\nc,n,3,0,n.d.\n")
    arguments = ["--config", str(tmp_path / "c.yaml")]
    (tmp_path / "c.yaml").write_text(f"patients: {tmp_path}/patients.csv\noutput: {{root: /proc/t}}\n")
    assert main(Job("slides"), work, arguments) == BAD_CONFIG
    labels, refusal = plain(capfd.readouterr().err).splitlines()
    assert labels == "slidelake slides: 2 rows have no label: '?' (1), 'n.d.' (1)"
    assert "output.root: /proc/t cannot be written" in refusal
