"""What is stale: a table of cases on plain values, and what becomes of the row that a patient has."""

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from jobs.patients import decide
from jobs.runtime.run.survey import patient_hash
from jobs.runtime.settings.identity import Identity
from jobs.runtime.settings.sections import EncoderSettings
from tests.core.cohorts import (
    COMMITS,
    CONFIG,
    CORNERS,
    ENCODER,
    Stored,
    World,
    file_of,
    identity_of,
    image,
    lost,
    stale_in,
    stored_by,
    survey_of,
)
from udfs.wsi import ErrorCode
from udfs.wsi.store import StoreUri

UNLIMITED = replace(
    World(),
    config=CONFIG.model_copy(update={"tiling": CONFIG.tiling.model_copy(update={"max_tiles_per_patient": None})}),
)
STORED = stored_by(UNLIMITED)
ALL = {"slide": {"a1", "a2", "b1"}, "features": {"a1", "a2", "b1"}}


def encoder(**values: Any) -> World:
    """The same cohort under other settings of the encoder."""
    return encoders({ENCODER: UNLIMITED.config.encoders[ENCODER].model_copy(update=values)})


def encoders(named: dict[str, Any]) -> World:
    """The same cohort with other encoders."""
    return replace(UNLIMITED, config=UNLIMITED.config.model_copy(update={"encoders": named}))


def settings(section: str, **values: Any) -> World:
    """The same cohort under other settings."""
    part = getattr(UNLIMITED.config, section).model_copy(update=values)
    return replace(UNLIMITED, config=UNLIMITED.config.model_copy(update={section: part}))


CHANGES: dict[str, tuple[World, dict[str, set[str]]]] = {  # what a run finds, and what is stale then
    "nothing": (UNLIMITED, {}),
    "a label": (UNLIMITED.change(image("b1", "B", "LAA")), {"metadata": {"b1"}, "patient": {"b1"}}),
    "the label of a patient without tiles": (UNLIMITED.change(image("c1", "C", "CE")), {"metadata": {"c1"}}),
    "a centre": (
        UNLIMITED.change(replace(image("b1", "B"), center_id="east")),
        {"metadata": {"b1"}, "patient": {"b1"}},
    ),
    "an image's number": (UNLIMITED.change(replace(image("b1", "B"), image_num=3)), {"metadata": {"b1"}}),
    "where a file lies": (
        UNLIMITED.change(b1=replace(file_of("b1"), uri=StoreUri("s3://u:secret@bucket/b1.tif"))),
        {"metadata": {"b1"}},
    ),
    "mpp of the CSV": (UNLIMITED.change(image("b1", "B", mpp=0.5)), {"slide": {"b1"}, "features": {"b1"}}),
    "a file": (UNLIMITED.change(b1=file_of("b1", "2")), {"slide": {"b1"}, "features": {"b1"}}),
    "a file arrives late": (UNLIMITED.change(c1=file_of("c1")), {"slide": {"c1"}, "features": {"c1"}}),
    "a new image": (
        UNLIMITED.change(image("b2", "B"), b2=file_of("b2")),
        {"slide": {"b2"}, "features": {"b2"}},
    ),
    "a new image that is missing": (
        UNLIMITED.change(image("b2", "B"), b2=lost(ErrorCode.FILE_MISSING)),
        {"slide": {"b2"}, "features": {"b2"}},
    ),
    "an image moves to another patient": (
        UNLIMITED.change(image("a2", "B")),
        {"slide": {"a2"}, "features": {"a2"}, "patient": {"a1"}},
    ),
    "an image is removed from the CSV": (UNLIMITED.change(remove="a2"), {"slide": {"a2"}, "features": {"a2"}}),
    "the settings of the mask": (
        settings("tissue", background_brightness=200),
        {**ALL, "slide": {*ALL["slide"], "c1"}, "features": {*ALL["features"], "c1"}},
    ),
    "the encoder": (encoder(input_px=96), {"features": ALL["features"]}),
    "the weights": (encoder(weights="other.pth"), {"features": ALL["features"]}),
    "the dtype of bags": (settings("output", embedding_dtype="float16"), {"patient": {"a1", "a2", "b1"}}),
    "how a run goes": (settings("run", wave_slides=1, unit_tiles=7), {}),
    "a limit above what patients have": (settings("tiling", max_tiles_per_patient=6), {}),
    "a limit": (settings("tiling", max_tiles_per_patient=5), {"features": {"a1", "a2"}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_makes_stale(change: str) -> None:
    world, expected = CHANGES[change]
    found = stale_in(survey_of(world, STORED))
    if change == "a limit":  # which of the two loses a tile is drawn
        assert found.keys() == {"features"} and found["features"] <= expected["features"]
    else:
        assert found == expected


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("died_after", COMMITS)
def test_a_run_that_died_between_any_two_commits_is_gone_on_with(change: str, died_after: str) -> None:
    """What is not yet as it should be is stale, and nothing once all is committed."""
    world, _ = CHANGES[change]
    redone = stored_by(world)
    done = COMMITS[: COMMITS.index(died_after) + 1]
    stored = {name: (redone if name in done else STORED)[name] for name in COMMITS}
    survey = survey_of(world, stored)
    found = stale_in(survey)
    rows = {table: {*stored[table], *redone[table]} for table in ("tiles", "indexes", "slides", "features")}
    differs = {
        table: {key for key in keys if stored[table].get(key) != redone[table].get(key)} for table, keys in rows.items()
    }
    redoes = found.get("slide", set()) | found.get("metadata", set())
    assert differs["tiles"] | differs["indexes"] | differs["slides"] <= redoes
    assert {image_id for image_id, _ in differs["features"]} <= found.get("features", set())
    touched = {survey["patient_id"][name] for name in set().union(*found.values())}
    patients = {*STORED["patients"], *redone["patients"]}
    changed = {key for key in patients if stored["patients"].get(key) != redone["patients"].get(key)}
    assert {patient for patient, _ in changed} <= touched
    if died_after == "patients":
        assert found == {}


def test_a_first_run_has_all_to_do() -> None:
    empty: Stored = {name: {} for name in COMMITS}
    everything = {"a1", "a2", "b1", "c1"}
    assert stale_in(survey_of(UNLIMITED, empty)) == {"slide": everything, "features": everything}
    assert stale_in(survey_of(World(), empty)) == {"slide": everything, "features": everything}


@pytest.mark.parametrize("missing", COMMITS)
def test_a_table_that_lost_its_rows_gets_them_again(missing: str) -> None:
    """Indexes have no hash, and are read with what they were made with: features do without one."""
    found = stale_in(survey_of(UNLIMITED, STORED | {missing: {}}))
    expected = {
        "tiles": ALL,
        "indexes": {},
        "slides": {"slide": {*ALL["slide"], "c1"}, "features": {*ALL["features"], "c1"}},
        "features": {"features": ALL["features"]},
        "patients": {"patient": {"a1", "a2", "b1"}},
    }
    assert found == expected[missing]


@pytest.mark.parametrize("error", [ErrorCode.ACCESS_DENIED, ErrorCode.READ_FAILED])
def test_what_was_read_before_its_store_was_out_of_reach_stays(error: ErrorCode) -> None:
    away = UNLIMITED.change(b1=lost(error))
    survey = survey_of(away, STORED)
    assert stale_in(survey) == {} and list(survey.index[survey["unreachable"]]) == ["b1"]
    other = replace(away, config=settings("tissue", background_brightness=200).config)
    assert "b1" not in stale_in(survey_of(other, STORED))["slide"]  # its rows stay until it can be read again
    denied = stored_by(away)
    assert stale_in(survey_of(away, denied)) == {}  # a slide that could never be read has failed
    assert stale_in(survey_of(UNLIMITED, denied)) == {"slide": {"b1"}, "features": {"b1"}}


def test_rows_of_a_file_that_is_gone_stay_while_the_settings_do() -> None:
    away = UNLIMITED.change(b1=lost(ErrorCode.FILE_MISSING))
    assert stale_in(survey_of(away, STORED)) == {}
    other = replace(away, config=settings("tissue", background_brightness=200).config)
    assert "b1" in stale_in(survey_of(other, STORED))["slide"]


def test_failed_slides_are_tried_again_only_if_asked() -> None:
    assert stale_in(survey_of(UNLIMITED, STORED)) == {}
    retried = stale_in(survey_of(UNLIMITED, STORED, retry_failed=True))
    assert retried == {"slide": {"c1"}, "features": {"c1"}}


def test_an_image_that_its_patient_no_longer_has_is_found_in_any_table() -> None:
    world = UNLIMITED.change(remove="a2")
    for table in ("slides", "tiles", "features"):  # whichever still has it
        stored = {
            name: rows | ({key: row for key, row in STORED[name].items() if "a2" in key} if name == table else {})
            for name, rows in stored_by(world).items()
        }
        survey = survey_of(world, stored)
        assert survey.index[survey["removed"]].to_list() == ["a2"]
        assert stale_in(survey)["slide"] == {"a2"}
    others = replace(world, images=tuple(row for row in world.images if row.patient_id != "A"))
    assert not survey_of(others, STORED)["removed"].any()  # patients that the CSV does not name are left alone


def test_tiles_that_moved_are_encoded_again_and_tiles_that_did_not_are_not() -> None:
    """As after the slides job under another mask, which measured all tiles anew and moved those of b1."""
    mask = settings("tiling", mask_downsample=8)
    stored = stored_by(replace(mask, corners={"b1": CORNERS[1:]}))
    stored |= {name: STORED[name] for name in ("features", "patients")}
    assert stale_in(survey_of(mask, stored)) == {"features": {"b1"}}


def test_a_slide_that_changes_moves_the_sample_of_its_patient() -> None:
    limited = World()
    stored = stored_by(limited)
    assert stale_in(survey_of(limited, stored)) == {}
    for changed in (
        limited.change(a1=file_of("a1", "2")),
        limited.change(remove="a1"),
        limited.change(image("a1", "B")),
    ):
        assert stale_in(survey_of(changed, stored))["features"] >= {"a1", "a2"}


def test_features_of_unknown_models_are_all_stale_and_slides_are_not() -> None:
    found = stale_in(survey_of(UNLIMITED, STORED, identity=Identity(UNLIMITED.config)))
    assert found == {"features": ALL["features"]}


def test_an_encoder_that_is_added_is_the_only_one_whose_rows_are_new() -> None:
    now = encoders({**UNLIMITED.config.encoders, "second": EncoderSettings()})
    survey = survey_of(now, STORED)
    assert stale_in(survey) == {"features": ALL["features"]}
    assert set(survey.loc[[*ALL["features"]], "stale_encoders"]) == {("second",)}
    stored = stored_by(now)
    assert stale_in(survey_of(now, stored)) == {}
    only_bags = stored | {"patients": STORED["patients"]}
    assert stale_in(survey_of(now, only_bags)) == {"patient": ALL["features"]}


def test_an_encoder_that_changes_redoes_its_rows_alone() -> None:
    both = {**UNLIMITED.config.encoders, "second": EncoderSettings()}
    now = encoders(both | {"second": EncoderSettings(input_px=96)})
    survey = survey_of(now, stored_by(encoders(both)))
    assert set(survey.loc[[*ALL["features"]], "stale_encoders"]) == {("second",)}


def test_rows_of_an_encoder_that_the_settings_no_longer_name_stay_but_for_images_that_their_patient_lost() -> None:
    stored = stored_by(encoders({**UNLIMITED.config.encoders, "second": EncoderSettings()}))
    assert stale_in(survey_of(UNLIMITED, stored)) == {}
    other_file = survey_of(UNLIMITED.change(b1=file_of("b1", "2")), stored)
    assert other_file["stale_encoders"]["b1"] == (ENCODER,)
    moved = survey_of(UNLIMITED.change(image("a2", "B")), stored)
    assert moved["stale_encoders"]["a2"] == (ENCODER, "second")
    removed = survey_of(UNLIMITED.change(remove="a2"), stored)
    assert removed["stale_encoders"]["a2"] == (ENCODER, "second") and removed["stale_encoders"]["a1"] == ()


def images(label: Any) -> pd.DataFrame:
    row = {"image_id": "a", "center_id": "n", "label": label, "status": "ok", "removed": False}
    row |= {"feature_rows": 3, "features_digest": "d", "features_hash": "h"}
    return pd.DataFrame([row], dtype=object).astype({"removed": bool})


def test_a_label_that_is_missing_is_the_same_however_pandas_holds_it() -> None:
    identity = identity_of(CONFIG)
    missing = [patient_hash(images(label), identity) for label in (None, math.nan, pd.NA)]
    assert len(set(missing)) == 1 and missing[0] is not None
    assert patient_hash(images("nan"), identity) not in missing


Fate = tuple[list[int], list[int], list[tuple[str, str]]]  # rows to build, rows too large, patients whose row goes
KEY = ("p", ENCODER)
ROW_IS: dict[Any, Any] = {None: {}, "right": {KEY: "now"}, "outdated": {KEY: "before"}}
BUILT: Fate = ([1], [], [])
TOO_LARGE: Fate = ([], [1], [])
GOES: Fate = ([], [], [KEY])
STAYS: Fate = ([], [], [])


@pytest.mark.parametrize(
    ("tiles", "row", "becomes"),
    [
        (10, None, BUILT),
        (10, "right", STAYS),
        (10, "outdated", BUILT),
        (11, None, TOO_LARGE),
        (11, "right", STAYS),
        (11, "outdated", TOO_LARGE),  # and stays
        (0, None, STAYS),
        (0, "right", GOES),
        (0, "outdated", GOES),
    ],
)
def test_a_row_goes_only_if_its_patient_has_no_tile(tiles: int, row: str | None, becomes: Fate) -> None:
    made = {"patient_id": "p", "encoder": ENCODER, "params_hash": "now", "wanted_tiles": tiles}
    build, too_large, drop = decide({KEY: made} if tiles else {}, ROW_IS[row], most_tiles={ENCODER: 10})
    assert ([1 for _ in build], [1 for _ in too_large], drop) == becomes
