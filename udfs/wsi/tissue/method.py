"""What a tissue method is. Each method is a file of this folder; a new file is known to settings and jobs at once."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from udfs.wsi.registry import import_modules


def method_setting(default: Any, description: str, *, shapes_mask: bool = True, **bounds: float) -> Any:
    """Declares a setting of a tissue method; it becomes `tissue.NAME`.

    Args:
        default: its value if the user sets none.
        description: one line for --help and the documentation.
        shapes_mask: whether another value gives other masks, so that slides must be read again.
        bounds: `ge`, `gt`, `le`, `lt` of a number.
    """
    return field(default=default, metadata={"description": description, "shapes_mask": shapes_mask, "bounds": bounds})


@dataclass(frozen=True)
class TissueMethod(ABC):
    """A way to separate tissue from background. A subclass is a frozen dataclass whose fields are `method_setting`.

    Names of settings are unique over all methods.
    """

    name: ClassVar[str]  # in `tissue.method`
    version: ClassVar[int]  # raise it when the same settings begin to give other masks

    @abstractmethod
    def background(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Returns the mask of `pixels`, uint8 [h, w, 3], RGB, the slide at 1/mask_downsample: bool [h, w], True if background."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that shapes the mask: name, version and settings. Equal identities give equal masks."""
        shaping = {one.name: getattr(self, one.name) for one in fields(self) if one.metadata["shapes_mask"]}
        return {"method": self.name, "version": self.version, **shaping}


def tissue_methods() -> dict[str, type[TissueMethod]]:
    """Returns all methods by name."""
    import_modules(__package__)
    return {method.name: method for method in sorted(TissueMethod.__subclasses__(), key=lambda method: method.name)}


def tissue_method(name: str, settings: Mapping[str, Any]) -> TissueMethod:
    """Returns the method of that name; `settings` may hold those of other methods too."""
    method = tissue_methods()[name]
    return method(**{one.name: settings[one.name] for one in fields(method)})
