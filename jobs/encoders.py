"""The command `slidelake encoders`: the table of presets, or all that one of them needs and whether it runs here.

A preset is a published encoder of tiles by name: `encoders: {uni2-h: {}}` builds it, brings tiles to its size and normalises
them as its authors do. With a name, the command looks for the weights in the cache of this machine and on the hub, downloads
nothing, and runs a forward pass of one tile: with random weights if there are none here.
"""

import argparse
import difflib
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.runtime.settings.arguments import BAD_CONFIG, Parser
from jobs.runtime.settings.withheld import described
from jobs.runtime.spark.streams import log_to_stderr

if TYPE_CHECKING:
    from udfs.wsi.encoder.preset import Preset

_log = logging.getLogger("slidelake.encoders")
_DONE, _FAILED = 0, 1
_COLUMNS = ("name", "dim", "input px", "um/px", "precision", "licence", "gated", "weights")
_SHOWN = 40  # characters of a licence in the table

_EXIT_STATUS = """\
exit status:
  0  the table, or a preset whose forward pass ran
  2  no preset has this name, or nothing here can run it
  1  anything else
"""


def main(argv: Sequence[str]) -> int:
    """Print the table or one preset; returns the exit status."""
    log_to_stderr()
    parser = Parser(
        prog="slidelake encoders",
        description=__doc__,
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset; without it, the table of all")
    name = parser.parse_args(argv).name
    from udfs.wsi.encoder.presets import PRESETS  # noqa: PLC0415  --help does without torch

    if name is None:
        print(_table([*PRESETS.values()]))
        return _DONE
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
        guess = f"did you mean {' or '.join(near)}?" if near else "`slidelake encoders` prints them"
        _log.error("slidelake encoders: no preset %s: %s", described(name), guess)
        return BAD_CONFIG
    return _examine(PRESETS[name])


def _table(presets: "Sequence[Preset]") -> str:
    """Columns as wide as their texts."""
    rows = [_COLUMNS, *(_row(preset) for preset in presets)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _row(preset: "Preset") -> tuple[str, ...]:
    edge = str(preset.crop_px or preset.input_px)
    scale = ", ".join(f"{mpp:g}" for mpp in preset.mpps) or "any"
    licence = preset.licence.name
    licence = licence if len(licence) <= _SHOWN else f"{licence[: _SHOWN - 3]}..."
    where = "cannot be run" if preset.unavailable else "here" if _cached(preset) else ""
    gated = "gated" if preset.is_gated else "open"
    return (preset.name, str(preset.dim), edge, scale, preset.precision, licence, gated, where)


def _cached(preset: "Preset") -> str:
    """Path of the weights on this machine, empty if they are not here."""
    from udfs.wsi.weights.hub import HubReference, cached_file  # noqa: PLC0415

    return str(cached_file(HubReference(preset.repository, preset.revision), [preset.file]) or "")


def _examine(preset: "Preset") -> int:
    """Print what a preset needs and run it; returns the exit status."""
    print("\n".join(f"{key:<12} {value}" for key, value in _facts(preset)))
    if preset.unavailable:
        _log.error("slidelake encoders: %s cannot be run: %s", preset.name, preset.unavailable)
        return BAD_CONFIG
    path = _cached(preset)
    print(f"{'weights':<12} {f'here: {path}' if path else _on_hub(preset)}", flush=True)
    try:
        print(f"{'forward pass':<12} {_forward(preset, path)}")
    except Exception as error:  # of the file, or of too little memory
        _log.error("slidelake encoders: %s: %s", preset.name, error)
        return _FAILED
    return _DONE


def _facts(preset: "Preset") -> list[tuple[str, str]]:
    crop = f", then the centre of {preset.crop_px} px" if preset.crop_px else ""
    scale = f"{' or '.join(f'{mpp:g}' for mpp in preset.mpps)} um/px" if preset.mpps else "any scale"
    commerce = "commercial use allowed" if preset.licence.is_commercial else "no commercial use"
    arguments = ", ".join(f"{name}={value}" for name, value in preset.kwargs.items())
    return [
        ("name", preset.name),
        ("model", f"{preset.architecture} of timm{f': {arguments}' if arguments else ''}"),
        ("repository", f"https://huggingface.co/{preset.repository}, revision {preset.revision or 'main'}"),
        ("file", f"{preset.file}, sha256 {preset.sha256 or 'not known'}"),
        ("tiles", f"{preset.tile_px} px at {scale}"),
        ("images", f"{preset.input_px} px by {preset.interpolation}{crop}; mean {preset.mean}, std {preset.std}"),
        ("vector", f"{preset.dim} numbers, pooling {preset.pooling}"),
        ("precision", f"{preset.precision} on a GPU"),
        ("licence", f"{preset.licence.name}; {commerce}; {'gated' if preset.is_gated else 'open to everybody'}"),
        ("sources", ", ".join(preset.sources)),
    ]


def _on_hub(preset: "Preset") -> str:
    """Whether this machine can download the weights."""
    from udfs.wsi.weights.checkpoint import CheckpointError  # noqa: PLC0415
    from udfs.wsi.weights.hub import HubReference, file_on_hub  # noqa: PLC0415

    reference = HubReference(preset.repository, preset.revision)
    try:
        return f"not here; the hub gives {file_on_hub(reference, [preset.file])} to this machine"
    except CheckpointError as error:
        return f"not here, and not to be downloaded: {error}"


def _forward(preset: "Preset", path: str) -> str:
    """Embed one grey tile on the processor."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from udfs.wsi.encoder import Encoder, EncoderSpec  # noqa: PLC0415
    from udfs.wsi.encoder.timm_network import load_timm_network, random_network  # noqa: PLC0415

    spec = EncoderSpec(preset.name, path or None, batch_size=1, device="cpu")
    begun = time.monotonic()
    encoder = Encoder(spec, load_timm_network(spec) if path else random_network(spec), device=torch.device("cpu"))
    loaded = time.monotonic()
    vectors = encoder.embed(np.full((1, preset.tile_px, preset.tile_px, 3), 200, np.uint8))
    done = time.monotonic()
    weights = "its weights" if path else "random weights"
    return (
        f"with {weights}: one tile of {preset.tile_px} px to {vectors[0].shape[1]:,} numbers in {done - loaded:.2f} s on this "
        f"processor in fp32, built in {loaded - begun:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
