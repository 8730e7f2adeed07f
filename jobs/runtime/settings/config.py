"""The settings of a run: one YAML file and dotted overrides, typed and checked before anything starts."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from jobs.runtime.settings.job_sections import (
    ONE_JOBS,
    PatchesSettings,
    PredictSettings,
    SplitsSettings,
    StainnetSettings,
    TrainingSettings,
)
from jobs.runtime.settings.sections import (
    EncoderSettings,
    HistogramSettings,
    OutputSettings,
    ResourcesSettings,
    RunSettings,
    SlidesSettings,
    StainSettings,
    TilingSettings,
    TissueSettings,
)
from jobs.runtime.settings.setting import NO_ROW, Location, Section, setting
from jobs.runtime.settings.withheld import described, file_shown, key_shown
from jobs.runtime.settings.yaml_text import YamlTextError, parse_yaml, value_of
from udfs.wsi.store import public_uri, read_bytes, redact, secrets_of
from udfs.wsi.tissue.method import TissueMethod, tissue_method

_SECRET = "***"
_LONGEST_KEY = 200  # characters that are compared with those of settings
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class ConfigError(Exception):
    """Settings, a CSV or arguments that can't be used: one line for the user, exit status 2.

    Args:
        reason: what can't be used and why, and what to do where no `remedy` is given.
        remedy: what to do.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason, remedy)
        self.reason, self.remedy = reason, remedy

    def __str__(self) -> str:
        """Both, in one line."""
        return f"{self.reason}: {self.remedy}" if self.remedy else self.reason


class Config(Section):
    """All settings of slidelake."""

    patients: Annotated[str, Location()] = setting(
        ..., "URI of the CSV: image_id, center_id, patient_id, image_num, [label], [uri], [mpp]", NO_ROW
    )
    slides: SlidesSettings = SlidesSettings()
    output: OutputSettings
    tissue: TissueSettings = TissueSettings()
    tiling: TilingSettings = TilingSettings()
    stain: StainSettings = StainSettings()
    encoder: EncoderSettings = EncoderSettings()
    resources: ResourcesSettings = ResourcesSettings()
    histogram: HistogramSettings = HistogramSettings()
    stainnet: StainnetSettings = StainnetSettings()
    splits: SplitsSettings = SplitsSettings()
    training: TrainingSettings = TrainingSettings()
    predict: PredictSettings = PredictSettings()
    patches: PatchesSettings = PatchesSettings()
    run: RunSettings = RunSettings()
    on_failed_slides: Literal["report", "ignore"] = setting(
        "report", "report: exit status 3 if slides failed; ignore: 0", NO_ROW
    )

    @field_validator("resources")
    @classmethod
    def _no_idle_gpus(cls, resources: ResourcesSettings, info: ValidationInfo) -> ResourcesSettings:
        encoder: EncoderSettings | None = info.data.get("encoder")
        if encoder and resources.gpus_per_task and (encoder.device == "cpu" or encoder.runtime == "openvino"):
            why = "encoder.device = cpu" if encoder.device == "cpu" else "encoder.runtime = openvino"
            raise ValueError(f"gpus_per_task takes GPUs that {why} leaves idle: set it to null, or change that")
        return resources

    @property
    def tissue_method(self) -> TissueMethod:
        """The chosen tissue method with its settings."""
        return tissue_method(self.tissue.method, dict(self.tissue))

    def locations(self, job: str) -> Iterator[tuple[str, str, Location]]:
        """(dotted key, path or URI, what lies there) of each setting that is set, but those of other jobs' sections."""
        for key, info in settings_by_key():
            names = key.split(".")
            kinds = [kind for kind in info.metadata if isinstance(kind, Location)]
            if kinds and all(ONE_JOBS.get(section, job) == job for section in names[:-1]):
                value: Any = reduce(getattr, names, self)
                if value is not None and value not in kinds[0].names:
                    yield key, value, kinds[0]

    def masked(self) -> dict[str, Any]:
        """The settings without secrets, fit for logs and tables."""
        return _masked(self.model_dump(mode="json"))


def settings_by_key(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The settings of a section and of those below it, by dotted key."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from settings_by_key(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{info.alias or name}", info


_TEXTS = {key for key, info in settings_by_key() if info.annotation in (str, str | None)}


def load_config(uri: str, overrides: Sequence[str] = (), *, expand: bool = True) -> Config:
    """Read the settings.

    Args:
        uri: of the YAML file, a path or any fsspec URI.
        overrides: ``dotted.key=value``, see `value_of`.
        expand: put environment variables where storage options name them; False where settings are for another machine.

    Raises:
        ConfigError: one line that names the key, what is wrong and what would be right.
    """
    try:
        loaded = parse_yaml(read_bytes(uri)) or {}
    except FileNotFoundError:
        raise ConfigError(f"--config {file_shown(public_uri(uri))}: no such file") from None
    except YamlTextError as error:
        raise ConfigError(f"--config {file_shown(public_uri(uri))}: {error}") from None
    except Exception as error:
        text = redact(f"{type(error).__name__}: {error}", secrets_of(uri, None))
        raise ConfigError(f"--config {file_shown(public_uri(uri))}: can't be read ({text})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"--config {file_shown(public_uri(uri))}: a mapping of settings is wanted, not {type(loaded).__name__}"
        )
    for override in overrides:
        _override(loaded, override)
    options = loaded.get("slides") if isinstance(loaded.get("slides"), dict) else None
    if expand and options and "storage_options" in options:
        options["storage_options"] = _expand(options["storage_options"])
    sections = {name.partition(".")[0] for name, _ in settings_by_key() if "." in name}
    loaded = {key: {} if value is None and key in sections else value for key, value in loaded.items()}
    try:
        return Config.model_validate(loaded)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors())) from None


def describe_settings() -> list[tuple[str, str, str]]:
    """(dotted key, default, meaning) of every setting, for --help and the documentation."""
    return [
        (key, "required" if info.is_required() else _yaml(info.default), info.description or "")
        for key, info in settings_by_key()
    ]


def masked_override(override: str) -> str:
    """A ``dotted.key=value`` as `Config.masked` would show it: whole, or ``key=***`` where its value holds a secret.

    A value that is ``${NAME}`` and no more is none: it tells where the secret is.

    Raises:
        ConfigError: it is no setting.
    """
    settings: dict[str, Any] = {}
    _override(settings, override)
    return override if _masked(settings) == settings else f"{override.partition('=')[0]}={_SECRET}"


def _masked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings, all or some, without user, password and query of URIs and without what storage options say."""

    def mask(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: mask(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [mask(item) for item in value]
        if isinstance(value, str) and _VARIABLE.fullmatch(value):
            return value  # not yet taken from the environment
        return value if value is None or isinstance(value, bool) else _SECRET

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(item) for key, item in value.items()}
        return public_uri(value) if isinstance(value, str) else value

    shown: dict[str, Any] = public(settings)
    slides = settings.get("slides")
    if isinstance(slides, dict) and "storage_options" in slides:
        shown["slides"]["storage_options"] = mask(slides["storage_options"])
    return shown


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    return "null" if value is None else yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()


def _override(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"{described(override)} is no setting: write dotted.key=value, for example tiling.max_background=0.2"
        )
    *parents, last = key.split(".")
    for parent in parents:
        below = settings.setdefault(parent, {})
        if below is None:
            below = settings[parent] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"{key_shown(key)}: {key_shown(parent)} is a value, not a section")
        settings = below
    try:
        settings[last] = value_of(text, is_text=key in _TEXTS)
    except YamlTextError as error:
        raise ConfigError(f"{key_shown(key)}: {error}") from None


def _expand(value: Any) -> Any:
    """${NAME} in storage options, from the environment."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"slides.storage_options: the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return _VARIABLE.sub(lookup, value)


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    known = [name for name, _ in settings_by_key()]
    key = ".".join(path)
    key = next(
        (name for name in known if f"{key}.".startswith(f"{name}.")), key
    )  # without the branch of a union, or an index
    if item["type"] == "extra_forbidden":
        sections = {name.rpartition(".")[0] for name in known} - {""}
        close = difflib.get_close_matches(key[:_LONGEST_KEY], [*known, *sections], n=1, cutoff=0.0)
        same_name = [name for name in known if name.rpartition(".")[2] == path[-1]]
        return f"unknown setting {key_shown(key)}: did you mean {(same_name or close)[0]}?"
    if item["type"] == "missing":
        return f"{key} is required: add it to the configuration or give {key}=VALUE"
    if item["type"] == "model_type":
        return (
            f"{key_shown(key)} is a section: write its settings below it, not a value ({type(item['input']).__name__})"
        )
    value = "" if "storage_options" in path else f" (it is {described(item['input'])})"
    return f"{key_shown(key)}: {item['msg'].removeprefix('Value error, ')}{value}"
