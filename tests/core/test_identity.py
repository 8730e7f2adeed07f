"""What shapes rows: every setting says it beside its definition, and what it says is true."""

import json
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin

import pytest

from jobs.runtime.settings.config import EACH, Config, settings_by_key
from jobs.runtime.settings.identity import Identity, differences, recorded_models, row_hash
from jobs.runtime.settings.setting import shapes_of
from tests.core.cohorts import CONFIG, ENCODER, World, identity_of, models_of, stale_in, stored_by, survey_of
from udfs.wsi.quality.tile_metrics.background_fraction import BackgroundFraction
from udfs.wsi.tissue.brightness import Brightness
from udfs.wsi.tissue.method import tissue_methods

FIELDS = dict(settings_by_key())


def test_every_setting_says_whose_rows_it_shapes_or_that_it_shapes_none() -> None:
    assert [key for key, info in FIELDS.items() if shapes_of(info) is None] == []


def literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for inner in get_args(annotation) for value in literals(inner)]


def another(key: str) -> Any:
    """A value of a setting that is not that of `CONFIG`."""
    value: Any = CONFIG
    for name in key.split("."):
        value = (
            next(iter(value.values())) if name == EACH else getattr(value, "schema_name" if name == "schema" else name)
        )
    if choices := [choice for choice in literals(FIELDS[key].annotation) if choice != value]:
        return choices[-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    is_number = value is None and {int, float} & {*get_args(FIELDS[key].annotation)}
    return 0.5 if key.endswith("mpp") else 3 if is_number else "another"


def base_of(key: str) -> Config:
    """`CONFIG`, with the tissue method that has the setting."""
    owners = [
        name
        for name, method in tissue_methods().items()
        if key.removeprefix("tissue.") in {one.name for one in fields(method)}
    ]
    if not key.startswith("tissue.") or not owners:
        return CONFIG
    return CONFIG.model_copy(update={"tissue": CONFIG.tissue.model_copy(update={"method": owners[0]})})


def changed(key: str, config: Config = CONFIG) -> Config:
    """Settings with another value of one of them, whatever else would have to be changed with it."""
    section, _, name = key.rpartition(".")
    value = {"schema_name" if name == "schema" else name: another(key)}
    if not section:
        return config.model_copy(update=value)
    if section.endswith(f".{EACH}"):
        named = section.removesuffix(f".{EACH}")
        first, *_ = getattr(config, named).items()
        return config.model_copy(update={named: {first[0]: first[1].model_copy(update=value)}})
    part = getattr(config, section).model_copy(update=value)
    return config.model_copy(update={section: part})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of values that validation would refuse
@pytest.mark.parametrize("key", [key for key, info in FIELDS.items() if len(literals(info.annotation)) != 1])
def test_a_setting_makes_just_those_rows_stale_that_it_says(key: str) -> None:
    shapes = shapes_of(FIELDS[key])
    assert shapes
    before = replace(World(), config=base_of(key))
    now = replace(before, config=changed(key, before.config))
    stored, redone, stale = stored_by(before), stored_by(now), set()
    if not shapes.tables or shapes.tables == {"splits"}:
        assert stale_in(survey_of(now, stored)) == {}
        return
    # As the jobs do it: stage after stage, each upon what the one before it has left. Tiles stay where they were.
    for name, kind, tables in (
        ("slides", "slide", ("slides", "tiles", "indexes")),
        ("features", "features", ("features",)),
        ("patients", "patient", ("patients",)),
    ):
        if kind in stale_in(survey_of(now, stored)):
            stale.add(name)
        stored = stored | {table: redone[table] for table in tables}
    says = {"features" if name == "selection" else name for name in shapes.tables} - {"splits"}
    assert stale == says | ({"patients"} if "features" in says else set())
    assert stale_in(survey_of(now, stored)) == {}


def test_the_settings_of_splits_are_those_that_say_so() -> None:
    named = {key for key, info in FIELDS.items() if (shapes := shapes_of(info)) and "splits" in shapes.tables}
    assert named == {f"splits.{name}" for name in ("train", "validation", "test", "stratify", "seed", "folds")}


def test_what_moves_no_tile_does_not_reach_features() -> None:
    """Settings of the mask change rows of slides and tiles, and features only through the corners of tiles."""
    before, after = (identity_of(config) for config in (CONFIG, changed("tiling.mask_downsample")))
    assert before.slide_hash("p", "1", None) != after.slide_hash("p", "1", None)
    assert before.features_hashes("p", "1", None) == after.features_hashes("p", "1", None)


def test_a_new_version_of_the_method_or_of_a_metric_makes_slides_stale_and_of_features_only_moved_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = identity_of(CONFIG)
    for changed_class in (Brightness, BackgroundFraction):
        with monkeypatch.context() as patched:
            patched.setattr(changed_class, "version", 99)
            after = identity_of(CONFIG)
        assert before.slide_hash("p", "1", None) != after.slide_hash("p", "1", None)
        assert before.features_hashes("p", "1", None) == after.features_hashes("p", "1", None)
        assert len(differences(after.recipe(ENCODER), [before.recipe(ENCODER)])) == 1


def test_mpp_of_the_csv_shapes_features_only_if_tiles_are_read_at_a_target_mpp() -> None:
    at_target = identity_of(changed("tiling.mpp"))
    for identity, counts in ((identity_of(CONFIG), False), (at_target, True)):
        assert (identity.features_hashes("p", "1", 0.25) != identity.features_hashes("p", "1", 0.5)) is counts
        assert identity.slide_hash("p", "1", 0.25) != identity.slide_hash("p", "1", 0.5)


def test_features_of_unknown_models_have_no_hash_and_their_recipe_is_what_the_settings_say() -> None:
    assert Identity(CONFIG).features_hashes("p", "1", None) == {}
    known, full = Identity(CONFIG).recipe(ENCODER), identity_of(CONFIG).recipe(ENCODER)
    assert known.items() < full.items()
    assert full.keys() - known.keys() == models_of(CONFIG).keys()
    assert differences(known, [full]) == []


def test_the_dtype_of_bags_makes_patients_stale_and_no_model_unfit() -> None:
    half = changed("output.embedding_dtype")
    assert identity_of(half).recipe(ENCODER) == identity_of(CONFIG).recipe(ENCODER)
    assert identity_of(half).patient_hash("n", None, []) != identity_of(CONFIG).patient_hash("n", None, [])


def test_models_are_taken_from_the_newest_run_that_had_the_same_settings_of_features() -> None:
    other = changed(f"encoders.{EACH}.weights")
    runs = [(json.dumps(config.masked()), {ENCODER: identity_of(config).recipe(ENCODER)}) for config in (other, CONFIG)]
    assert recorded_models(CONFIG, ENCODER, runs) == models_of(CONFIG)
    assert recorded_models(other, ENCODER, runs) == models_of(other)
    assert recorded_models(changed(f"encoders.{EACH}.input_px"), ENCODER, runs) is None
    elsewhere = changed("tiling.mask_downsample"), changed("run.unit_tiles"), changed("inference.device")
    assert [recorded_models(config, ENCODER, runs) for config in elsewhere] == [models_of(CONFIG)] * 3
    assert recorded_models(CONFIG, ENCODER, []) is None
    tiling = CONFIG.tiling.model_copy(update={"max_tiles_per_patient": None})
    unlimited = CONFIG.model_copy(update={"tiling": tiling})
    assert recorded_models(unlimited, ENCODER, runs) == models_of(CONFIG)


def test_the_hash_of_values_is_the_same_in_any_order_and_tells_types_apart() -> None:
    assert row_hash({"a": 1, "b": [2]}) == row_hash({"b": [2], "a": 1})
    assert len({row_hash(x) for x in (1, 1.5, "1", None, True, [1], {"a": 1}, {"a": "1"})}) == 8
