"""Where weights come from: whether a file is the one of its preset, by its hash, and what table runs says of its origin.

Models of one architecture differ in nothing but numbers.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import timm

from udfs.wsi.encoder.encoder_spec import EncoderSpec
from udfs.wsi.encoder.preset import Preset
from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.weights.checkpoint import Checkpoint, CheckpointError
from udfs.wsi.weights.hub import HubReference

PROVENANCE = ("licence", "licence.commercial", "revision", "sha256")
"""What a run records of an encoder beside its recipe. It shapes no row: the recipe has the hash of the numbers."""
_SHOWN = 12  # digits of a hash in messages
# Licences as timm writes them; others are not judged.
_COMMERCIAL = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0")
_NOT_COMMERCIAL = ("cc-by-nc-4.0", "fair-noncommercial-research-license", "apple-amlr")


class LicenceError(Exception):
    """The licence of an encoder forbids commercial use; one line with reason and remedy."""


def licence_of(spec: EncoderSpec, sha256: str | None = None) -> dict[str, str]:
    """Returns what is known of the licence of an encoder's weights, by names of `PROVENANCE`: a preset's, or as timm says.

    Args:
        spec: the encoder; the licence is that of the preset that it names, or whose repository it names.
        sha256: of the weights, if they are loaded: those of a preset have its licence, whatever the spec names.
    """
    if presets := _presets_of(spec, sha256):
        licence = min((preset.licence for preset in presets), key=lambda one: one.is_commercial)  # the strictest
        return {"licence": licence.name, "licence.commercial": str(licence.is_commercial).lower()}
    config = None
    if timm.is_model(spec.name) and not spec.weights:
        with suppress(RuntimeError):  # whoever builds the model says that it has no such weights
            config = timm.models.get_pretrained_cfg(spec.name)
    if not config or not config.license:
        return {}
    judged = dict.fromkeys(_COMMERCIAL, "true") | dict.fromkeys(_NOT_COMMERCIAL, "false")
    commercial = {"licence.commercial": judged[config.license]} if config.license in judged else {}
    return {"licence": config.license} | commercial


def origin_of(spec: EncoderSpec, checkpoint: Checkpoint) -> dict[str, str]:
    """Returns what is known of the origin of an encoder's weights, by names of `PROVENANCE`."""
    preset, given = PRESETS.get(spec.name), spec.weights or spec.name
    reference = HubReference.parse(given)
    revision = reference.revision if reference else preset.revision if preset and not spec.weights else None
    known = {"revision": revision, "sha256": checkpoint.sha256}
    return licence_of(spec, checkpoint.sha256) | {name: value for name, value in known.items() if value}


def _presets_of(spec: EncoderSpec, sha256: str | None) -> list[Preset]:
    """The presets that a spec names, by name or repository, and the one whose published file has this SHA-256."""
    references = [HubReference.parse(text) for text in (spec.name, spec.weights) if text]
    repositories = {each.repository.lower() for each in references if each}  # the hub does not tell capitals apart
    return [
        preset
        for name, preset in PRESETS.items()
        if name == spec.name
        or preset.repository.lower() in repositories
        or (sha256 is not None and preset.sha256 == sha256)
    ]


def refuse_non_commercial(encoder: str, origins: Sequence[Mapping[str, str]]) -> str:
    """Compare the licences of an encoder with commercial use.

    Args:
        encoder: its name.
        origins: of its weights, by names of `PROVENANCE`; other names are ignored.

    Returns:
        A line if a licence is not known; else "".

    Raises:
        LicenceError: a licence forbids it.
    """
    for origin in origins:
        if origin.get("licence.commercial") == "false":
            raise LicenceError(
                f"licence is commercial, and the licence of encoder {encoder} ({origin['licence']}) forbids commercial use: "
                "choose another encoder, or set licence to any"
            )
    if origins and all("licence.commercial" in origin for origin in origins):
        return ""
    return f"licence is commercial, and the licence of encoder {encoder} is not known: make sure that it allows commercial use"


def refuse_weights_of_another_preset(checkpoint: Checkpoint, name: str, *, is_published: bool) -> None:
    """Compare the SHA-256 of a file with those of the presets.

    Args:
        checkpoint: of the file, with its hash.
        name: of the preset that the settings name.
        is_published: whether the file is from where the preset says, rather than from the settings.

    Raises:
        CheckpointError: the file is that of another preset, or it is published and not the one that the preset has.
    """
    own, found = PRESETS[name].sha256, checkpoint.sha256
    if found is None or found == own:
        return
    if other := next((each.name for each in PRESETS.values() if each.sha256 == found), None):
        raise CheckpointError(
            f"{checkpoint.name} holds the weights of preset {other}, by their SHA-256, and the encoder is {name}: set "
            f"its model to {other}, or its weights to the file of {name}"
        )
    if is_published and own:
        raise CheckpointError(
            f"{checkpoint.name} has the SHA-256 {found[:_SHOWN]}..., and the weights of preset {name} have {own[:_SHOWN]}...: "
            f"remove {checkpoint.path.resolve()} and run again, or set its weights to a file that you trust"
        )
