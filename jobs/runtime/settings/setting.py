"""What a setting is: its type, default and meaning, whose rows it shapes, and that it is a path or URI."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from udfs.wsi.plausible import MPP_WANTED, plausible_mpp
from udfs.wsi.store import StoreUri


@dataclass(frozen=True)
class Location:
    """Marks a setting that says where something lies: a path or a URI."""

    written: Literal["folder", "file"] | None = None  # what the job that reads the setting writes there
    names: tuple[str, ...] = ()  # values that are neither a path nor a URI


Source = Annotated[StoreUri | None, Location()]
OutFolder = Annotated[StoreUri | None, Location(written="folder")]
OutFile = Annotated[StoreUri | None, Location(written="file")]


class Shapes:
    """Says whose rows a setting shapes: see `jobs.runtime.settings.identity`.

    Args:
        tables: ``slides`` stands for slides, tiles and indexes, which one pass makes; ``selection`` for which tiles have a
            row in features. Tables further down follow from these and are not named.
        by_content: not the value itself counts, but what it leads to: the numbers in a file, the form of a loaded model.
    """

    def __init__(
        self, *tables: Literal["slides", "selection", "features", "patients", "splits"], by_content: bool = False
    ) -> None:
        self.tables, self.by_content = frozenset(tables), by_content


NO_ROW = Shapes()


def setting(default: Any, meaning: str, shapes: Shapes, **constraints: Any) -> Any:
    """Returns a field of a section: default (``...``: required), meaning, the rows that it shapes, pydantic's constraints."""
    return Field(default, description=meaning, json_schema_extra={"shapes": shapes}, **constraints)  # type: ignore[dict-item]


def shapes_of(field: FieldInfo) -> Shapes | None:
    """Returns whose rows a setting shapes; None if its definition does not say."""
    extra = field.json_schema_extra
    shapes = extra.get("shapes") if isinstance(extra, dict) else None
    return shapes if isinstance(shapes, Shapes) else None


class Section(BaseModel):
    """The base of all sections: unknown keys, changes and NaN are refused, and settings are written by their own names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )


Spec = TypeVar("Spec")


def filled(spec: type[Spec], *sections: Section, **given: Any) -> Spec:
    """Returns a pass's spec, a dataclass: each field is given, or is the setting of its name in one of the sections.

    Raises:
        TypeError: a field without a default is neither, or two sections have a setting of its name.
    """
    values: dict[str, Any] = {}
    for name in [field.name for field in fields(spec) if field.name not in given]:  # type: ignore[arg-type]
        found = [getattr(section, name) for section in sections if name in type(section).model_fields]
        if len(found) > 1:
            raise TypeError(
                f"{spec.__name__}.{name}: {len(found)} sections have a setting of this name: give the value"
            )
        if found:
            values[name] = found[0]
    return spec(**values, **given)


def at_key(settings: Any, key: str) -> Any:
    """Returns the value at a dotted key of nested mappings; None if there is none."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, Mapping) else None
    return settings


def _plausible(mpp: float) -> float:
    if plausible_mpp(mpp) is None:
        raise ValueError(f"must be {MPP_WANTED}")
    return mpp


Mpp = Annotated[float, AfterValidator(_plausible)]
