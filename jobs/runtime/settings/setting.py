"""What a setting is: its type, default and meaning, whose rows it shapes, and where it lies if it is a path or URI."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from udfs.wsi.plausible import MPP_WANTED, plausible_mpp


@dataclass(frozen=True)
class Location:
    """Marks a setting that says where something lies: a path or a URI."""

    written: Literal["folder", "file"] | None = None  # what the job that reads the setting writes there
    names: tuple[str, ...] = ()  # values that are neither


Source = Annotated[str | None, Location()]
WrittenFolder = Annotated[str | None, Location(written="folder")]
WrittenFile = Annotated[str | None, Location(written="file")]


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
    """A field of a section: its default (``...``: required), its meaning, the rows that it shapes, and pydantic's constraints."""
    return Field(default, description=meaning, json_schema_extra={"shapes": shapes}, **constraints)  # type: ignore[dict-item]


def shapes_of(field: FieldInfo) -> Shapes | None:
    """Whose rows a setting shapes; None if its definition does not say."""
    extra = field.json_schema_extra
    shapes = extra.get("shapes") if isinstance(extra, dict) else None
    return shapes if isinstance(shapes, Shapes) else None


class Section(BaseModel):
    """What all sections have: no unknown keys, no changes, no NaN; the names of settings, whatever attributes are called."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, serialize_by_alias=True
    )


def _plausible(mpp: float) -> float:
    if plausible_mpp(mpp) is None:
        raise ValueError(f"must be {MPP_WANTED}")
    return mpp


Mpp = Annotated[float, AfterValidator(_plausible)]
