"""Whether a file of weights is the one of its preset, by its hash: models of one architecture differ in nothing but numbers."""

from udfs.wsi.encoder.presets import PRESETS
from udfs.wsi.weights.checkpoint import Checkpoint, CheckpointError

_SHOWN = 12  # digits of a hash in messages


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
