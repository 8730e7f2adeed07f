"""Delta's Python side: on a platform a part of Spark's, by `--packages` in Delta's jar, else by pip; None if it is missing."""

try:
    from delta.tables import DeltaTable
except ModuleNotFoundError:
    DeltaTable = None  # type: ignore[assignment,misc]  # no job meets it, see refuse_unusable_spark

__all__ = ["DeltaTable"]
