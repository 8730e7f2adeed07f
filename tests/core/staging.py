"""What tests of copies of remote slides share."""

from pathlib import Path
from typing import Any

SIZE = 1000  # bytes of most slides; nothing looks into them


def slide(memory: Any, name: str, size: int = SIZE) -> str:
    """Write a slide to the store; returns its URI."""
    memory.pipe(f"/bucket/{name}", bytes([size % 251]) * size)
    return f"memory://bucket/{name}"


def copies(root: Path) -> list[Path]:
    """Returns the files of slides, whole or half, without locks."""
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")


def names(root: Path) -> list[str]:
    """Returns the names of these files."""
    return sorted(path.name for path in copies(root))
