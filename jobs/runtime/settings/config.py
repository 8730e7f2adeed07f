"""The settings of a run: one YAML file and dotted overrides, typed and checked before anything starts."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from jobs.runtime.settings import job_sections, sections
from jobs.runtime.settings.setting import NO_ROW, Location, Section, setting
from jobs.runtime.settings.withheld import described, file_shown, key_shown
from jobs.runtime.settings.yaml_text import YamlTextError, parse_yaml, value_of
from udfs.wsi.aggregator.aggregator import aggregator_methods
from udfs.wsi.store import StoreUri, public_uri, read_bytes, redact, secrets_of
from udfs.wsi.tissue.method import TissueMethod, tissue_method

_SECRET = "***"
_LONGEST_KEY = 200  # characters that are compared with those of settings
_LONGEST_NAME = 200
_VARIABLE = re.compile(r"\$\{(\w+)\}")
EACH = "NAME"  # stands for the names of sections that users name, in the keys of all settings
_NO_NAME = re.compile(r"[\s'\"`\\]|^$")


class ConfigError(Exception):
    """Settings, a CSV or arguments that cannot be used: one line for the user, exit status 2.

    Args:
        reason: what cannot be used and why, and what to do if no `remedy` is given.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        """Reason and remedy in one line."""
        return f"{self.reason}: {self.remedy}" if self.remedy else self.reason


def _by_name(what: str, example: str) -> BeforeValidator:
    """Sections by name, in which a name without settings has the defaults: YAML makes them null."""

    def checked(sections_: Any) -> Any:
        if not isinstance(sections_, dict) or not sections_:
            raise ValueError(f"must be a mapping of one {what} or several: for example {example}")
        for name in sections_:
            if not isinstance(name, str) or _NO_NAME.search(name) or len(name) > _LONGEST_NAME:
                raise ValueError(
                    f"{described(str(name))} is no name of an {what}: take a text of at most {_LONGEST_NAME} characters without "
                    "blanks and quotes"
                )
        return {name: {} if settings is None else settings for name, settings in sections_.items()}

    return BeforeValidator(checked)


EncodersByName = Annotated[dict[str, sections.EncoderSettings], _by_name("encoder", "encoders: {efficientnet_b0: {}}")]
AggregatorsByName = Annotated[
    dict[str, job_sections.AggregatorSettings], _by_name("aggregator", "aggregators: {mean: {}, max: {}}")
]


class Config(Section):
    """All settings of slidelake."""

    patients: Annotated[StoreUri, Location()] = setting(
        ..., "URI of the CSV: image_id, center_id, patient_id, image_num, [label], [uri], [mpp]", NO_ROW
    )
    slides: sections.SlidesSettings = sections.SlidesSettings()
    output: sections.OutputSettings
    tissue: sections.TissueSettings = sections.TissueSettings()
    tiling: sections.TilingSettings = sections.TilingSettings()
    stain: sections.StainSettings = sections.StainSettings()
    encoders: EncodersByName = setting(
        {"efficientnet_b0": {}},
        "the encoders by name, one or several: each tile is read and decoded once for all of them; the name is in column encoder "
        "of the tables",
        NO_ROW,
    )
    inference: sections.InferenceSettings = sections.InferenceSettings()
    resources: sections.ResourcesSettings = sections.ResourcesSettings()
    histogram: sections.HistogramSettings = sections.HistogramSettings()
    stainnet: job_sections.StainnetSettings = job_sections.StainnetSettings()
    splits: job_sections.SplitsSettings = job_sections.SplitsSettings()
    training: job_sections.TrainingSettings = job_sections.TrainingSettings()
    predict: job_sections.PredictSettings = job_sections.PredictSettings()
    aggregators: AggregatorsByName = setting(
        {"mean": {}, "max": {}},
        "what makes one vector of the tiles of a slide or patient, by name; the name is in column aggregator of the tables",
        NO_ROW,
    )
    patches: job_sections.PatchesSettings = job_sections.PatchesSettings()
    run: sections.RunSettings = sections.RunSettings()
    licence: Literal["any", "commercial"] = setting(
        "any",
        "commercial refuses encoders whose licence forbids commercial use, and training on tables that were made with one",
        NO_ROW,
    )
    on_failed_slides: Literal["report", "ignore"] = setting(
        "report", "report: exit status 3 if slides failed; ignore: 0", NO_ROW
    )

    @field_validator("resources")
    @classmethod
    def _no_idle_gpus(cls, resources: sections.ResourcesSettings, info: ValidationInfo) -> sections.ResourcesSettings:
        inference: sections.InferenceSettings | None = info.data.get("inference")
        if inference and resources.gpus_per_task and (inference.device == "cpu" or inference.runtime == "openvino"):
            why = "inference.device = cpu" if inference.device == "cpu" else "inference.runtime = openvino"
            raise ValueError(f"gpus_per_task takes GPUs that {why} leaves idle: set it to null, or change that")
        return resources

    @field_validator("aggregators")
    @classmethod
    def _known_methods(
        cls, aggregators: dict[str, job_sections.AggregatorSettings]
    ) -> dict[str, job_sections.AggregatorSettings]:
        methods = aggregator_methods()
        for name, settings in aggregators.items():
            method = settings.method or name
            if method not in methods:
                raise ValueError(f"{name}: no method {described(method)}: set method to one of {', '.join(methods)}")
            if methods[method].has_weights != (settings.weights is not None):
                has = "needs the weights of a checkpoint" if methods[method].has_weights else "has no weights"
                raise ValueError(f"{name}: method {method} {has}: see setting weights")
        return aggregators

    @property
    def tissue_method(self) -> TissueMethod:
        """The chosen tissue method with its settings."""
        return tissue_method(self.tissue.method, dict(self.tissue))

    def each(self) -> Iterator[tuple[str, FieldInfo, Any]]:
        """Yields all settings: dotted key, definition, value as a plain value of JSON."""
        yield from _each(self, self.model_dump(mode="json"))

    def by_key(self) -> dict[str, Any]:
        """Returns the values of all settings by dotted key, as plain values of JSON."""
        return {key: value for key, _, value in self.each()}

    def locations(self, job: str) -> Iterator[tuple[str, StoreUri, Location]]:
        """Yields (dotted key, path or URI, what lies there) of the settings that have one and that the job reads."""
        for key, info, value in self.each():
            for kind in info.metadata:
                is_set = isinstance(kind, Location) and value not in (None, *kind.names)
                if is_set and job_sections.ONE_JOBS.get(key.partition(".")[0], job) == job:
                    yield key, value, kind

    def masked(self) -> dict[str, Any]:
        """Returns the settings without secrets, fit for logs and tables."""
        return _masked(self.model_dump(mode="json"))


def settings_by_key(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the settings of a section and of the sections below it, by dotted key; `EACH` stands for the names of encoders."""
    for name, info in model.model_fields.items():
        section = _section_below(info)
        if section and get_origin(info.annotation) is dict:
            yield from settings_by_key(section, f"{prefix}{name}.{EACH}.")
        elif section:
            yield from settings_by_key(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{info.alias or name}", info


def _section_below(info: FieldInfo) -> type[Section] | None:
    """The section that a field holds, or several of under names; None if it is a setting."""
    kind = get_args(info.annotation)[1] if get_origin(info.annotation) is dict else info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _each(section: Section, values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, info in type(section).model_fields.items():
        own, key = getattr(section, name), info.alias or name
        if isinstance(own, Section):
            yield from _each(own, values[key], f"{prefix}{key}.")
        elif _section_below(info):
            for each, below in own.items():
                yield from _each(below, values[key][each], f"{prefix}{key}.{each}.")
        else:
            yield f"{prefix}{key}", info, values[key]


_NAMED: dict[str, type[Section]] = {  # sections below names of the user
    "encoders": sections.EncoderSettings,
    "aggregators": job_sections.AggregatorSettings,
}
_TEXTS = {key for key, info in settings_by_key() if info.annotation in (str, str | None, StoreUri, StoreUri | None)}


Completion = Callable[["Config", dict[str, Any]], dict[str, Any]]
"""Gives settings in place of those that are written; its arguments are the latter as they are checked and as written."""


def load_config(
    uri: str, overrides: Sequence[str] = (), *, expand: bool = True, complete: Completion | None = None
) -> Config:
    """Returns the settings of a file.

    Args:
        uri: of the YAML file, a path or any fsspec URI.
        overrides: ``dotted.key=value``, see `value_of`.
        expand: replace ``${NAME}`` in storage options by environment variables; False for settings of another machine.
        complete: gives the settings of a job that takes some from elsewhere.

    Raises:
        ConfigError: one line that names the key, what is wrong and what would be right.
    """
    file = f"--config {file_shown(public_uri(uri))}"
    try:
        loaded = parse_yaml(read_bytes(uri)) or {}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except YamlTextError as error:
        raise ConfigError(f"{file}: {error}") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, None))
        raise ConfigError(f"{file}: cannot be read ({text})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file}: must be a mapping of settings, not {type(loaded).__name__}")
    for override in overrides:
        _override(loaded, override)
    if "encoder" in loaded:
        raise ConfigError(
            "unknown section encoder: write encoders: {NAME: {weights: ...}}, and runtime, precision, batch_size and device in "
            "section inference"
        )
    options = loaded.get("slides") if isinstance(loaded.get("slides"), dict) else None
    if expand and options and "storage_options" in options:
        options["storage_options"] = _on_texts(_expanded, options["storage_options"])
    section_names = {key.partition(".")[0] for key, _ in settings_by_key() if "." in key}
    loaded = {key: {} if value is None and key in section_names else value for key, value in loaded.items()}
    config = _checked(loaded)
    return _checked(complete(config, loaded)) if complete else config


def _checked(settings: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def describe_settings() -> list[tuple[str, str, str]]:
    """Returns (dotted key, default, meaning) of every setting, for --help and the documentation."""
    return [
        (key, "required" if info.is_required() else _yaml(info.default), info.description or "")
        for key, info in settings_by_key()
    ]


def masked_override(override: str) -> str:
    """Returns a ``dotted.key=value`` as `Config.masked` would show it: whole, or ``key=***`` if its value has a secret.

    A value that is just ``${NAME}`` is no secret: it says where the secret is.

    Raises:
        ConfigError: the text is no setting.
    """
    settings: dict[str, Any] = {}
    _override(settings, override)
    return override if _masked(settings) == settings else f"{override.partition('=')[0]}={_SECRET}"


def _masked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings, all or some, without user, password and query of URIs and without the values of storage options."""
    shown: dict[str, Any] = _on_texts(public_uri, settings)
    slides = settings.get("slides")
    if isinstance(slides, dict) and "storage_options" in slides:
        shown["slides"]["storage_options"] = _without_values(slides["storage_options"])
    return shown


def _on_texts(change: Callable[[str], Any], value: Any) -> Any:
    """Nested values with each text changed."""
    if isinstance(value, dict):
        return {key: _on_texts(change, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_texts(change, item) for item in value]
    return change(value) if isinstance(value, str) else value


def _without_values(options: Any) -> Any:
    if isinstance(options, dict):
        return {key: _without_values(value) for key, value in options.items()}
    if isinstance(options, list):
        return [_without_values(value) for value in options]
    is_shown = options is None or isinstance(options, bool)
    is_variable = isinstance(options, str) and _VARIABLE.fullmatch(options)  # not yet taken from the environment
    return options if is_shown or is_variable else _SECRET


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return "null" if value is None else yaml.safe_dump(plain, default_flow_style=True).split("\n...")[0].strip()


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"{described(override)} is no setting: write dotted.key=value, for example tiling.max_background=0.2"
        )
    *parents, last = _path_of(key, text)
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise ConfigError(f"{key_shown(key)}: {key_shown(parent)} is a value, not a section")
    try:
        settings[last] = value_of(text, is_text=_general([*parents, last]) in _TEXTS)
    except YamlTextError as error:
        raise ConfigError(f"{key_shown(key)}: {error}") from None


def _path_of(key: str, value: str) -> list[str]:
    """The names along a dotted key. The name of an encoder may have dots: what follows it is a setting of an encoder."""
    first, _, rest = key.partition(".")
    if first not in _NAMED or not rest:
        return key.split(".")
    if found := re.fullmatch(r"(.+)\.(kwargs)\.([^.]+)", rest):
        return [first, *found.groups()]
    name, dot, last = rest.rpartition(".")
    is_name = not dot or (last not in _NAMED[first].model_fields and value.strip()[:1] in ("", "{"))
    return [first, rest] if is_name else [first, name, last]


def _general(path: Sequence[str]) -> str:
    """A dotted key with `EACH` in the place of the name of an encoder or aggregator."""
    return ".".join([*path[:1], EACH, *path[2:]] if path[0] in _NAMED else path)


def _expanded(text: str) -> str:
    def lookup(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"slides.storage_options: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(lookup, text)


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    own = path[1] if path[0] in _NAMED and len(path) > 1 else EACH
    known = [name.replace(f".{EACH}.", f".{own}.") for name, _ in settings_by_key()]
    whole = ".".join(path)  # with the branch of a union, or an index
    key = next((name for name in known if f"{whole}.".startswith(f"{name}.")), whole)
    if item["type"] == "extra_forbidden":
        section_names = {name.rpartition(".")[0] for name in known} - {""}
        close = difflib.get_close_matches(key[:_LONGEST_KEY], [*known, *section_names], n=1, cutoff=0.0)
        same_name = [name for name in known if name.rpartition(".")[2] == path[-1]]
        return f"unknown setting {key_shown(key)}: did you mean {key_shown((same_name or close)[0])}?"
    if item["type"] == "missing":
        return f"{key} is required: add it to the configuration or give {key}=VALUE"
    if item["type"] == "model_type":
        kind = type(item["input"]).__name__
        return f"{key_shown(key)} is a section: write its settings below it, not a value ({kind})"
    value = "" if "storage_options" in path else f" (it is {described(item['input'])})"
    return f"{key_shown(key)}: {item['msg'].removeprefix('Value error, ')}{value}"
