"""Settings on the command line: texts are taken whole, the rest is what it looks like."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.runtime.settings.config import Config, load_config

MINIMAL = {"patients": "patients.csv", "output": {"root": "tables"}}


def load(folder: Path, *overrides: str) -> Config:
    """The smallest settings there are, and these."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return load_config(str(path), overrides)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "/data/a #b",
            "/data/a# b",
            "a: b",
            "@x",
            "*x",
            "&x",
            "!x",
            "%41 %",
            "- x",
            "? x",
            "`x`",
            "|",
            ">",
            "'",
            "'a' b",
            '"',
        ),
        *(
            "a: b: c",
            "x # 'y'",
            "0123",
            "1_0",
            "1:30",
            "1e3",
            "12",
            "3.50",
            "true",
            "no",
            "2021-03-01",
            "=",
            "<<",
            "[x",
            "{a}b",
            "[a]b",
        ),
        *("a\tb", "ü %41 #", "a=b", " a ", "C:\\x", "\\\\host\\x", "${HOME}", "---", "x ---", "\\n"),
    ],
)
def test_a_text_on_the_command_line_is_taken_whole(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, f"slides.root={text}", f"stain.weights={text}")
    assert (config.slides.root, config.stain.weights) == (text, text)
    windows = load(tmp_path, f"slides.root={text}\r", f"stain.weights={text}\r\r")
    assert (windows.slides.root, windows.stain.weights) == (text, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("a #b", "a #b"), ("a: b", "a: b"), ("@x", "@x"), ("*x", "*x"), ("!x", "!x"), ("- x", "- x"), ("'", "'")),
        *(
            ("5", 5),
            ("-5", -5),
            ("0.5", 0.5),
            ("1.5e3", 1500.0),
            ("true", True),
            ("False", False),
            *((word, True) for word in ("yes", "Yes", "YES", "on", "On", "ON", "True", "TRUE")),
            *((word, False) for word in ("no", "No", "NO", "off", "Off", "OFF", "FALSE")),
            *((f" {word} ", word) for word in ("cpu", "y", "n", "nO", "a #b")),
            *((f"{text}\r", value) for text, value in (("cpu", "cpu"), ("no", False), ("5", 5), ("null", None))),
            ("null", None),
            ("", None),
        ),
        *(("007", "007"), ("1_0", "1_0"), ("1:30", "1:30"), ("12e4567", "12e4567"), ("9" * 5000, "9" * 5000)),
        *(
            ("[a, b]", ["a", "b"]),
            ("{a: b, c: [1]}", {"a": "b", "c": [1]}),
            ("'5'", "5"),
            ('"a #b"', "a #b"),
            ("[]", []),
        ),
    ],
)
def test_a_value_on_the_command_line_is_what_it_looks_like(tmp_path: Path, text: str, value: Any) -> None:
    config = load(tmp_path, f"slides.storage_options.x={text}")
    found = config.slides.storage_options["x"]
    assert (found, type(found)) == (value, type(value))


def test_numbers_lists_and_nothing_on_the_command_line(tmp_path: Path) -> None:
    overrides = [
        "tiling.tile_px=0512",
        "training.learning_rate=1e-3",
        "training.use_center=yes",
        "inference.batch_size=8",
    ]
    overrides += [
        "slides={root: /a, extensions: [.tif]}",
        "splits.stratify=[]",
        "encoders.b0.weights=null",
        "stain.weights=",
    ]
    overrides += ["inference.device= cpu ", "training.device=cpu\r", "slides.storage_options.anon=no"]
    config = load(tmp_path, "stain.weights=x", *overrides)
    assert (config.inference.device, config.training.device, config.slides.storage_options) == (
        "cpu",
        "cpu",
        {"anon": False},
    )
    assert (config.tiling.tile_px, config.training.learning_rate, config.training.use_center) == (512, 0.001, True)
    assert (config.inference.batch_size, config.slides.root, config.slides.extensions) == (8, "/a", (".tif",))
    assert (config.splits.stratify, config.encoders["b0"].weights, config.stain.weights) == ((), None, None)
