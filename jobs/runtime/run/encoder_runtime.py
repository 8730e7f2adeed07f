"""Which runtime and precision the encoder runs with, where the settings leave it open."""

import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from jobs.runtime.run.run import Run
from jobs.runtime.settings.config import ConfigError
from jobs.runtime.tables.tables import spark_schema
from udfs.measure_encoders import measure_encoders
from udfs.schemas import MEASURED_ENCODERS
from udfs.wsi.encoder.encoder_spec import Precision, Runtime
from udfs.wsi.encoder.fastest import LEAST_COSINE, Measured, fastest

_PROPERTY = "slidelake.encoder"  # of table features
_SLIDES_LOOKED_AT = 64  # at most, from all over the cohort: tiles are taken of the first that has some


def settle_runtime(run: Run, uris: Sequence[str], *, keep: bool = True) -> tuple[Runtime, Precision]:
    """What the settings say; with `runtime: auto`, what the rows of table features were made with, so that all rows compare,
    or what a measurement on tiles of the cohort finds fastest, which is then written down with the table if it shall `keep`.
    """
    settings = run.config.encoder
    if settings.runtime != "auto":
        return settings.runtime, settings.precision or "fp32"
    what = (settings.name, run.models.encoder.fingerprint, settings.input_px, settings.precision)
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    known = json.loads(run.tables.property("features", _PROPERTY) or "{}")
    if known.get("of") == key:
        return _kept(run, known["runtime"], known["precision"])
    print("encoder: measuring runtimes on tiles of the cohort ...", file=sys.stderr)
    measured = measure_runtimes(run, uris)
    if not measured:
        print(
            "encoder: no tile of tissue to measure with: torch is taken, and the next run measures again",
            file=sys.stderr,
        )
        return "torch", settings.precision or "fp32"
    best = fastest(measured)
    if best is None:
        raise ConfigError(
            f"encoder.precision = {settings.precision}: its cosine to fp32 is {max(one.cosine for one in measured):.5f} on "
            f"tiles of the cohort, less than {LEAST_COSINE}",
            "leave it out, or set encoder.runtime to take it all the same",
        )
    for one in measured:
        print(
            f"encoder: {one.runtime} {one.precision}: {one.tiles_per_s:.1f} tiles/s a task, cosine to fp32 {one.cosine:.5f}"
            f"{' <- taken' if one is best else '' if one.cosine >= LEAST_COSINE else f' < {LEAST_COSINE}'}",
            file=sys.stderr,
        )
    if keep:
        choice = {"of": key, "runtime": best.runtime, "precision": best.precision}
        run.tables.set_property("features", _PROPERTY, json.dumps(choice))
    return best.runtime, best.precision


def _kept(run: Run, runtime: Runtime, precision: Precision) -> tuple[Runtime, Precision]:
    """The recorded choice, if it can be had here; in fp32 PyTorch gives the same rows."""
    if runtime == "torch" or (find_spec("openvino") and run.config.encoder.device != "cuda"):
        return runtime, precision
    if precision == "fp32":
        return "torch", precision
    raise ConfigError(
        f"these tables' embeddings were made with OpenVINO in {precision}, on processors",
        "pip install 'slidelake[openvino]' and set encoder.device to auto or cpu; or set encoder.runtime to torch, which encodes "
        "all tiles again",
    )


def measure_runtimes(run: Run, uris: Sequence[str]) -> list[Measured]:
    """Every way that executors have, on tiles of these slides; none where no slide has tissue."""
    some = uris[:: max(1, len(uris) // _SLIDES_LOOKED_AT)][:_SLIDES_LOOKED_AT]
    rows = run.spark.createDataFrame([(uri,) for uri in some], "uri string").coalesce(1)
    function = measure_encoders(run.feature_spec, run.config.tiling.tile_px, run.config.encoder.precision)
    profile = run.stage_resources.profile
    found = rows.mapInArrow(function, spark_schema(MEASURED_ENCODERS), profile=profile).collect()
    return [Measured(**row.asDict()) for row in found]
