"""The work that workers report, summed."""

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Work:
    """As `udfs.schemas.WORK`."""

    requests: int = 0
    bytes: int = 0
    waited_s: float = 0.0
    decoded_s: float = 0.0
    encoded_s: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))
