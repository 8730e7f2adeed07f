"""The settings that shaped the features that a model learned from: kept with the model, and the defaults of job predict."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from jobs.runtime.settings.config import EACH, Config, ConfigError, settings_by_key
from jobs.runtime.settings.setting import Location, at_key, shapes_of
from udfs.wsi.encoder.described import FOLDER
from udfs.wsi.tissue.method import tissue_methods
from udfs.wsi.weights.hub import is_of_hub

Sections = dict[str, Any]  # values of settings as plain values of JSON, by section and name
_FIELDS = dict(settings_by_key())
_SHAPES = {key: shapes for key, info in _FIELDS.items() if (shapes := shapes_of(info))}
_OF_FEATURES = [
    key for key, shapes in _SHAPES.items() if shapes.tables & {"slides", "selection", "features"} and EACH not in key
]
# In these sections null is no value of its own: the preset, or else slidelake, chooses.
_NULL_IS_UNSET = ("encoders", "inference")


def settings_of_features(config: Mapping[str, Any], encoder: str, recipe: Mapping[str, str]) -> Sections:
    """Returns what of a run's settings shaped the features of an encoder.

    Args:
        config: settings of the run, as column config of table runs has them.
        encoder: its name in the settings; {} is returned if the run did not have it.
        recipe: of the features, which says in what precision the encoder ran. The runtime shapes no vector in fp32, so it is
            left out then.
    """
    if not isinstance(at_key(config, "encoders"), Mapping) or encoder not in config["encoders"]:
        return {}
    kept: Sections = {"encoders": {encoder: dict(config["encoders"][encoder])}}
    for key in _OF_FEATURES:
        section, name = key.split(".")
        if name in (config.get(section) or {}) and _is_used(key, config):
            kept.setdefault(section, {})[name] = config[section][name]
    if "encoder.precision" in recipe:
        precision, _, runtime = recipe["encoder.precision"].partition(" by ")
        kept["inference"] = {"precision": precision} | ({"runtime": runtime} if runtime else {})
    return kept


def with_settings_of_model(written: Sections, of_model: Sections, encoder: str) -> Sections:
    """Returns settings as they are written, completed by those of a model. Of the encoders, the model's alone stays."""
    completed = written | {
        section: values | _set(written.get(section), section)
        for section, values in of_model.items()
        if section != "encoders"
    }
    own, known = written.get("encoders") or {}, of_model.get("encoders", {})
    if encoder in own or encoder in known:
        completed["encoders"] = {encoder: known.get(encoder, {}) | _set(own.get(encoder), "encoders")}
    return completed


def taken_from_model(written: Sections, of_model: Sections) -> list[str]:
    """Returns the settings that a model completes with other values than their defaults, each as key=value."""
    own = dict(_flat(written))
    return [
        f"{key}={_text(value)}"
        for key, value in _of_this_version(of_model)
        if (own.get(key) is None if key.startswith(_NULL_IS_UNSET) else key not in own)
        and value != _FIELDS[_general(key)].default
    ]


def differences_as_written(config: Config, of_model: Sections) -> list[str]:
    """Returns how settings differ from a model's, if only loaded models tell what they lead to; one text per setting.

    Settings that shape rows by their value are left to `jobs.runtime.settings.identity.differences`. Weights and folders of
    models are compared by their content once they are loaded: only stain.weights that the model does not have are a difference.
    """
    now = config.by_key()
    differ = []
    for key, value in _of_this_version(of_model):
        general = _general(key)
        is_unset = now[key] is None and key.startswith(_NULL_IS_UNSET)
        if not _SHAPES[general].by_content or is_unset or now[key] == value:
            continue
        if _is_location(general, value):
            is_same = general != "stain.weights" or value is not None
        else:
            own_name = key.split(".", 1)[1].rpartition(".")[0]  # which model=null stands for
            is_same = general.endswith(".model") and now[key] == (value or own_name)
        if not is_same:
            differ.append(f"{key} is {_text(now[key])}, not {_text(value)}")
    return differ


def missing_files(config: Config, of_model: Sections) -> list[tuple[str, str]]:
    """Returns (dotted key, place) of the model's weights and folder that are not on this machine, unless settings name others."""
    now = config.by_key()
    paths = [
        (key, value)
        for key, value in _of_this_version(of_model)
        if value and _is_location(_general(key), value) and now[key] == value
    ]
    return [
        (key, path)
        for key, path in paths
        if "://" not in path and not is_of_hub(path) and not Path(path.removeprefix(FOLDER)).expanduser().exists()
    ]


def _set(settings: Mapping[str, Any] | None, section: str) -> Sections:
    """What is set in a section."""
    return {
        name: value for name, value in (settings or {}).items() if value is not None or section not in _NULL_IS_UNSET
    }


def _of_this_version(of_model: Sections) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of a model's settings; raises ConfigError if there is no such setting."""
    for key, value in _flat(of_model):
        if _general(key) not in _FIELDS:
            raise ConfigError(
                f"predict.model: its model.json has {key}, which is no setting of this version of slidelake: the model is of "
                "another version: predict by that one, or train again"
            )
        yield key, value


def _flat(settings: Sections) -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) of the settings in sections."""
    for section, values in settings.items():
        if section == "encoders":
            for encoder, below in (values or {}).items():
                yield from ((f"{section}.{encoder}.{name}", value) for name, value in (below or {}).items())
        elif isinstance(values, dict):
            yield from ((f"{section}.{name}", value) for name, value in values.items())


def _general(key: str) -> str:
    """The dotted key with `EACH` in the place of an encoder's name."""
    section, _, rest = key.partition(".")
    return f"{section}.{EACH}.{rest.rpartition('.')[2]}" if section == "encoders" else key


def _is_location(general: str, value: Any) -> bool:
    """Whether the value says where something lies, such as the folder of a model."""
    is_folder = general.endswith(".model") and str(value).startswith(FOLDER)
    return is_folder or any(isinstance(kind, Location) for kind in _FIELDS[general].metadata)


def _is_used(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a setting shapes features, given the others: those of other tissue methods and the seed of no draw do not."""
    if key == "tiling.seed":
        return at_key(config, "tiling.max_tiles_per_patient") is not None
    if not key.startswith("tissue.") or key == "tissue.method":
        return True
    method = tissue_methods().get(str(at_key(config, "tissue.method")))
    return method is not None and key.removeprefix("tissue.") in {one.name for one in fields(method)}


def _text(value: Any) -> str:
    return json.dumps(value)
