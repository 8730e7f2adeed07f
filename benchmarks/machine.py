"""One core for whatever is measured, and what is printed once about machine and versions. No clock here."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

_CORES = sorted(os.sched_getaffinity(0))
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VIPS_CONCURRENCY")
_PACKAGES = (
    "slidelake",
    "tifffile",
    "tiffslide",
    "simplejpeg",
    "imagecodecs",
    "fsspec",
    "numpy",
    "torch",
    "timm",
    "openvino",
    "pyspark",
)


def take_one_core() -> None:
    """This process, and those that it starts, on one core and one thread. Before numpy and its like are imported."""
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    os.sched_setaffinity(0, _CORES[-1:])


@contextmanager
def on_another_core() -> Iterator[None]:
    """What is started here stays on another core, where there is one: a server takes no time from its client."""
    os.sched_setaffinity(0, _CORES[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, _CORES[-1:])


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """What is started here has that many cores; each of its processes still one thread, unless it says otherwise."""
    os.sched_setaffinity(0, _CORES[-count:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, _CORES[-1:])


def described() -> str:
    """Two lines: the machine, and the versions of all that is compared."""
    import openslide  # noqa: PLC0415  they start threads, which belong on the one core
    import pyvips  # noqa: PLC0415

    facts = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((fact.partition(":")[2].strip() for fact in facts if fact.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
        "openslide": openslide.__library_version__,
        "pyvips": version("pyvips"),
        "libvips": ".".join(str(pyvips.version(part)) for part in range(3)),
    }
    machine = f'machine cpu="{model}" cores={len(_CORES)} used=1 memory_gib={memory:.0f}'
    return "\n".join([machine, " ".join(["versions", *(f"{name}={number}" for name, number in versions.items())])])
