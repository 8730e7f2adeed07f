"""The settings of a run: one YAML file and dotted overrides, typed and checked before anything starts."""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from jobs.runtime.settings import job_sections, sections
from jobs.runtime.settings.setting import NO_ROW, Location, Section, at_key, setting
from jobs.runtime.settings.withheld import described, file_shown, key_shown
from jobs.runtime.settings.yaml_text import YamlTextError, parse_yaml, value_of
from udfs.wsi.store import StoreUri, public_uri, read_bytes, redact, secrets_of
from udfs.wsi.tissue.method import TissueMethod, tissue_method

_SECRET = "***"
_LONGEST_KEY = 200  # characters that are compared with those of settings
_VARIABLE = re.compile(r"\$\{(\w+)\}")


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
    encoder: sections.EncoderSettings = sections.EncoderSettings()
    resources: sections.ResourcesSettings = sections.ResourcesSettings()
    histogram: sections.HistogramSettings = sections.HistogramSettings()
    stainnet: job_sections.StainnetSettings = job_sections.StainnetSettings()
    splits: job_sections.SplitsSettings = job_sections.SplitsSettings()
    training: job_sections.TrainingSettings = job_sections.TrainingSettings()
    predict: job_sections.PredictSettings = job_sections.PredictSettings()
    patches: job_sections.PatchesSettings = job_sections.PatchesSettings()
    run: sections.RunSettings = sections.RunSettings()
    on_failed_slides: Literal["report", "ignore"] = setting(
        "report", "report: exit status 3 if slides failed; ignore: 0", NO_ROW
    )

    @field_validator("resources")
    @classmethod
    def _no_idle_gpus(cls, resources: sections.ResourcesSettings, info: ValidationInfo) -> sections.ResourcesSettings:
        encoder: sections.EncoderSettings | None = info.data.get("encoder")
        if encoder and resources.gpus_per_task and (encoder.device == "cpu" or encoder.runtime == "openvino"):
            why = "encoder.device = cpu" if encoder.device == "cpu" else "encoder.runtime = openvino"
            raise ValueError(f"gpus_per_task takes GPUs that {why} leaves idle: set it to null, or change that")
        return resources

    @property
    def tissue_method(self) -> TissueMethod:
        """The chosen tissue method with its settings."""
        return tissue_method(self.tissue.method, dict(self.tissue))

    def by_key(self) -> dict[str, Any]:
        """Returns the values of all settings by dotted key, as plain values of JSON."""
        values = self.model_dump(mode="json")
        return {key: at_key(values, key) for key, _ in settings_by_key()}

    def locations(self, job: str) -> Iterator[tuple[str, StoreUri, Location]]:
        """Yields (dotted key, path or URI, what lies there) of the settings that have one and that the job reads."""
        values = self.by_key()
        for key, info in settings_by_key():
            for kind in info.metadata:
                is_set = isinstance(kind, Location) and values[key] not in (None, *kind.names)
                if is_set and job_sections.ONE_JOBS.get(key.partition(".")[0], job) == job:
                    yield key, values[key], kind

    def masked(self) -> dict[str, Any]:
        """Returns the settings without secrets, fit for logs and tables."""
        return _masked(self.model_dump(mode="json"))


def settings_by_key(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yields the settings of a section and of the sections below it, by dotted key."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from settings_by_key(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{info.alias or name}", info


_TEXTS = {key for key, info in settings_by_key() if info.annotation in (str, str | None, StoreUri, StoreUri | None)}


def load_config(uri: str, overrides: Sequence[str] = (), *, expand: bool = True) -> Config:
    """Returns the settings of a file.

    Args:
        uri: of the YAML file, a path or any fsspec URI.
        overrides: ``dotted.key=value``, see `value_of`.
        expand: replace ``${NAME}`` in storage options by environment variables; False for settings of another machine.

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
    options = loaded.get("slides") if isinstance(loaded.get("slides"), dict) else None
    if expand and options and "storage_options" in options:
        options["storage_options"] = _on_texts(_expanded, options["storage_options"])
    section_names = {key.partition(".")[0] for key, _ in settings_by_key() if "." in key}
    loaded = {key: {} if value is None and key in section_names else value for key, value in loaded.items()}
    try:
        return Config.model_validate(loaded)
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
    *parents, last = key.split(".")
    for parent in parents:
        if settings.get(parent) is None:
            settings[parent] = {}
        settings = settings[parent]
        if not isinstance(settings, dict):
            raise ConfigError(f"{key_shown(key)}: {key_shown(parent)} is a value, not a section")
    try:
        settings[last] = value_of(text, is_text=key in _TEXTS)
    except YamlTextError as error:
        raise ConfigError(f"{key_shown(key)}: {error}") from None


def _expanded(text: str) -> str:
    def lookup(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"slides.storage_options: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(lookup, text)


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    known = [name for name, _ in settings_by_key()]
    whole = ".".join(path)  # with the branch of a union, or an index
    key = next((name for name in known if f"{whole}.".startswith(f"{name}.")), whole)
    if item["type"] == "extra_forbidden":
        section_names = {name.rpartition(".")[0] for name in known} - {""}
        close = difflib.get_close_matches(key[:_LONGEST_KEY], [*known, *section_names], n=1, cutoff=0.0)
        same_name = [name for name in known if name.rpartition(".")[2] == path[-1]]
        return f"unknown setting {key_shown(key)}: did you mean {(same_name or close)[0]}?"
    if item["type"] == "missing":
        return f"{key} is required: add it to the configuration or give {key}=VALUE"
    if item["type"] == "model_type":
        kind = type(item["input"]).__name__
        return f"{key_shown(key)} is a section: write its settings below it, not a value ({kind})"
    value = "" if "storage_options" in path else f" (it is {described(item['input'])})"
    return f"{key_shown(key)}: {item['msg'].removeprefix('Value error, ')}{value}"
