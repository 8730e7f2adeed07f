"""How the bags of a training set were made, by table runs: the recipes and the settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.training.labelled import CohortError, TrainingSet
from jobs.training.refusals import NoTableError
from jobs.training.table_versions import read_columns
from udfs.wording import is_run_id, named
from udfs.wsi.encoder.provenance import PROVENANCE
from udfs.wsi.store import StorageOptions

# Vectors of tiles are comparable only if these entries of their recipes are equal.
_OF_VECTORS = ("encoder.", "inference.", "stain.")
_OF_SCALE = ("tiling.tile_px", "tiling.mpp")


@dataclass(frozen=True)
class Origins:
    """How the bags of one encoder were made."""

    recipes: tuple[dict[str, str], ...]  # each once; several if runs of different settings made them; none if not known
    config: Mapping[str, Any]  # settings of the newest run that made them, without secrets; empty if not known


def read_origins(found: TrainingSet, runs_uri: str, storage_options: StorageOptions | None = None) -> Origins:
    """Returns how the bags of a training set were made; unknown if table runs is missing, or says nothing of the encoder.

    A killed run left no record. The next run that ended rebuilt the rows of other recipes. So if no row's run has a record,
    the newest record counts.

    Raises:
        CohortError: a killed run wrote some of the patients, and none has ended since; or vectors of different settings are
            mixed.
    """
    try:
        _, rows = read_columns(runs_uri, ("run_id", "started_at", "config", "features"), None, storage_options)
    except (NoTableError, KeyError):  # a table of an older version has no such column
        return Origins((), {})
    runs = [row | {"recipe": _recipe(row["features"], found.encoder)} for row in rows.to_pylist()]
    runs = sorted((run for run in runs if run["recipe"]), key=lambda run: run["started_at"])
    ids = {member.run_id for members in found.splits.values() for member in members}
    newest = max((run["run_id"] for run in runs if is_run_id(run["run_id"])), default=None)
    later = sorted(name for name in ids if newest and is_run_id(name) and name > newest)
    if later:
        raise CohortError(
            f"run {later[0]} wrote some of these patients and left no record, so it was killed, and what their features were "
            "made with is not known: run the same job to its end, then train"
        )
    known = [run for run in runs if run["run_id"] in ids] or runs[-1:]
    unique = {json.dumps(run["recipe"], sort_keys=True): run["recipe"] for run in known}
    recipes = tuple(unique[text] for text in sorted(unique))
    _refuse_mixed_vectors(found, recipes)
    return Origins(recipes, json.loads(known[-1]["config"] or "{}") if known else {})


def n_different(recipes: Sequence[Mapping[str, str]]) -> int:
    """Returns how many of some recipes differ in more than where the encoder comes from."""
    return len({json.dumps([(k, v) for k, v in sorted(recipe.items()) if k not in PROVENANCE]) for recipe in recipes})


def _recipe(features: Sequence[tuple[str, Any]] | None, encoder: str) -> dict[str, str]:
    """Returns the recipe of an encoder in a cell of column features; empty if there is none."""
    return dict(dict(features or ()).get(encoder) or ())


def _refuse_mixed_vectors(found: TrainingSet, recipes: Sequence[Mapping[str, str]]) -> None:
    """Raises CohortError if the recipes differ in encoder, precision, stain or scale of the tiles."""
    names = sorted({name for recipe in recipes for name in recipe})
    compared = [name for name in names if name.startswith(_OF_VECTORS) or name in _OF_SCALE]
    values = {name: sorted({recipe[name] for recipe in recipes if name in recipe}) for name in compared}
    mixed = [f"{name} is {' or '.join(map(named, several))}" for name, several in values.items() if len(several) > 1]
    if mixed:
        raise CohortError(
            f"the bags of encoder {found.encoder} were made with several settings, so their vectors cannot be compared: "
            f"{'; '.join(mixed)}: run the main job again with one set of settings, then train"
        )
