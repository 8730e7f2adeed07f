"""Finds what the files of a folder define, so that a new file is known without being named anywhere."""

import pkgutil
from importlib import import_module


def import_modules(package: str) -> None:
    """Imports every module of a package, which may lie in a folder or in the .zip that Spark sends to workers."""
    for module in pkgutil.iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
