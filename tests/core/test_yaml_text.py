"""Settings that are small as text and not when their aliases are followed: one line, at once, in a file and in an override."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.runtime.settings.config import ConfigError, load_config
from jobs.slides import main
from tests.messages import plain

VALID = "patients: patients.csv\noutput: {root: tables}\n"
SECONDS = 5.0  # a bomb takes hours, the slowest of these texts a second


def laughs(first: str, following: str) -> str:
    """A block list of anchors a0, a1, ...; each following one holds ten times an alias of the one before.

    In `following`, @ stands for the ten aliases and # for one alias.
    """
    items = [first]
    for i in range(1, 12):
        items.append(following.replace("@", ", ".join([f"*a{i - 1}"] * 10)).replace("#", f"*a{i - 1} "))
    return "\n".join(f"    - &a{i} {item}" for i, item in enumerate(items))


OPTION = "slides:\n  storage_options:\n    k:\n"
MAPPING = "{" + ", ".join(f"k{i}: #" for i in range(10)) + "}"
LAUGHS = "[&a0 [x, y]" + "".join(f", &a{i} [{f'*a{i - 1}, ' * 10}]" for i in range(1, 12)) + "]"
KEYS = "{" + ", ".join(f"? [#, {i}] : 0" for i in range(10)) + "}"

TEXTS = {
    "lists": (OPTION + laughs("[x, y]", "[@]"), "more than 10,000 values"),
    "mappings": (OPTION + laughs("{x: y}", MAPPING), "more than 10,000 values"),
    "merged mappings": (OPTION + laughs("{x: y, z: 0}", "{<<: [@]}"), "more than 10,000 values"),
    "keys": (OPTION + laughs("[x]", KEYS), "more than 10,000 values"),
    "of no setting": ("oops:\n" + laughs("[x, y]", "[@]"), "more than 10,000 values"),
    "a list in itself": (
        "slides: {storage_options: {hosts: &a [1, *a]}}",
        "line 1, column 35 has an alias of itself",
    ),
    "a mapping in itself": ("slides: {storage_options: &a {key: *a}}", "has an alias of itself"),
    "in itself, further down": ("slides: {storage_options: {k: &a {b: [{c: *a}]}}}", "has an alias of itself"),
    "merged with itself": ("tiling: &a {<<: *a}", "has an alias of itself"),
    "the root in itself": ("&a {patients: *a}", "has an alias of itself"),
    "brackets": ("slides: {storage_options: {k: " + "[" * 60 + "]" * 60 + "}}", "nested deeper than 50 levels"),
    "many brackets": ("k: " + "[" * 40_000, "nested deeper than 50 levels"),
    "many questions": ("? " * 40_000, "nested deeper than 50 levels"),
    "aliases in a chain": (
        OPTION + "    - &a0 [x]\n" + "\n".join(f"    - &a{i} [*a{i - 1}]" for i in range(1, 60)),
        "nested deeper than 50 levels",
    ),
    "a long integer": (
        "tiling: {tile_px: 0x" + "f" * 5000 + "}",
        "an integer of 5,002 characters at line 1, column 19",
    ),
    "an integer of sixties": ("tiling: {tile_px: 1" + ":01" * 3000 + "}", "an integer of 9,001 characters"),
    "an integer by its tag": ("tiling: {tile_px: !!int '" + "7" * 6000 + "'}", "an integer of 6,000 characters"),
    "a long text": ("a: " + "x" * 200_000, "more than 100,000 bytes"),
    "no month": ("slides: {storage_options: {day: 2020-13-41}}", "not YAML"),
    "no timestamp": ("slides: {storage_options: {day: !!timestamp SECRET}}", "not YAML"),
    "no integer": ("tiling: {tile_px: !!int SECRET}", "not YAML"),
    "an object": ("slides: {storage_options: !!python/object/apply:os.system [SECRET]}", "not YAML"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_unfolds_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    text, reason = TEXTS[kind]
    path = tmp_path / "config.yaml"
    path.write_text(text if text.startswith("&") else text + "\n" + VALID)
    begun = time.process_time()
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(str(path))
    assert time.process_time() - begun < SECONDS
    line = str(caught.value)
    assert line.startswith(f"--config {path}: ")
    assert "\n" not in line and len(line) < 400 and "SECRET" not in line


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{b: &a [*a]}", "has an alias of itself"),
        (LAUGHS, "more than 10,000 values"),
        ("[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        ("[2020-99-99]", "not YAML"),
        ("{n: 0x" + "f" * 5000 + "}", "an integer of 5,002 characters"),
    ],
)
def test_an_override_that_unfolds_is_refused_in_one_line(tmp_path: Path, value: str, reason: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(VALID)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(str(path), [f"slides.storage_options.key={value}"])
    assert str(caught.value).startswith("slides.storage_options.key: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mappings", "a mapping in itself"])
def test_print_config_ends_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TEXTS[kind][0] + "\n" + VALID)
    assert main(["--config", str(path), "--print-config"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert plain(err).startswith("slidelake slides: --config ") and err.count("\n") == 1


def test_aliases_that_stay_small_are_followed(tmp_path: Path) -> None:
    """Anchors, aliases and merge keys are YAML's own way to write a thing once."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "slides:\n  storage_options:\n    one: &one {key: a, secret: b}\n    two: *one\n    three: {<<: *one, key: c}\n"
        + VALID
    )
    one: dict[str, Any] = {"key": "a", "secret": "b"}
    options = load_config(str(path)).slides.storage_options
    assert options == {"one": one, "two": one, "three": one | {"key": "c"}}
    assert yaml.safe_load(path.read_text())["slides"]["storage_options"] == options
