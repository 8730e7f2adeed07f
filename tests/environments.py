"""Pythons that have the packages of this one, but no way to the checkout, as the nodes of a cluster; and what is sent them."""

import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

ROOT = Path(__file__).parents[1]
CODE = ROOT / f"dist/slidelake-{version('slidelake')}.zip"  # by `make_dist`


def environment_without_checkout(folder: Path) -> Path:
    """Make a virtual environment whose packages are links to those here, slidelake's own left out; returns its Python.

    So are .pth files, one of which leads to the checkout.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    here = Path(get_path("purelib"))
    there = folder / here.relative_to(sys.prefix)
    for package in here.iterdir():
        if "slidelake" not in package.name and package.suffix != ".pth":
            (there / package.name).symlink_to(package)
    return folder / "bin/python"


def without_path() -> dict[str, str]:
    """The environment variables of this process less those that lead Python to the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def make_dist(*options: str) -> None:
    """`make dist`, which does nothing where it is up to date."""
    done = subprocess.run(["make", "dist", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pack(environment: Path, archive: Path) -> Path:
    """The environment as an archive, in the way of `make dist-env`; links stay links."""
    command = [sys.executable, "-m", "venv_pack", "--quiet", "--prefix", str(environment), "--output", str(archive)]
    subprocess.run(command, check=True, cwd=archive.parent)
    return archive
