"""Whether tiles have a scale and a field of view that a preset is recommended for."""

from udfs.wsi.encoder.described import preset_of
from udfs.wsi.encoder.encoder_spec import EncoderSpec

_TOLERANCE = 0.1  # of a length, as a share of the preset's


def check_tile_scale(spec: EncoderSpec, tile_px: int, mpp: float | None) -> None:
    """Refuses tiles that the encoder would see at a scale, or with a field of view, that its preset is not recommended for.

    Args:
        spec: the encoder. Timm models and models without a recommended scale accept all tiles.
        tile_px: edge of a tile, pixels at `mpp`.
        mpp: um/px at which tiles are read; None: each slide's own level 0.

    Raises:
        ValueError: tiles differ from every scale of the preset by more than a tenth; the message gives the settings that agree.
    """
    preset = preset_of(spec)
    if preset is None or preset.mpp is None:
        return
    wanted = [(preset.tile_px * each, preset.tile_px * each / preset.input_px) for each in preset.mpps]
    if mpp is not None:
        tile_um = tile_px * mpp
        seen_mpp = tile_um / (spec.input_px or preset.input_px)
        if any(_agree(tile_um, wanted_um) and _agree(seen_mpp, wanted_mpp) for wanted_um, wanted_mpp in wanted):
            return
        tiles = f"tiles are {tile_um:g} um wide and seen at {seen_mpp:g} um/px"
    else:
        tiles = f"tiles of {tile_px} px have the scale of each slide, because tiling.mpp is null"
    scales = " or ".join(f"{wanted_um:g} um wide and seen at {wanted_mpp:g} um/px" for wanted_um, wanted_mpp in wanted)
    remedy = (
        f"set tiling.tile_px to {preset.tile_px} and tiling.mpp to {preset.mpp:g}, or its allow_other_scale to true"
    )
    raise ValueError(f"encoder {spec.name} is recommended for tiles {scales}; here {tiles}: {remedy}")


def _agree(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= _TOLERANCE * wanted
