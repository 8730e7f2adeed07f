"""Where weights come from: a path, a URI, or a model on the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

from udfs.wsi.store import PublicUri, StorageOptions, absolute_uri
from udfs.wsi.weights.checkpoint import Checkpoint, CheckpointError, map_checkpoint, open_checkpoint
from udfs.wsi.weights.hub import REPOSITORY, WEIGHTS, HubReference, hub_file, is_in_cache


def open_weights(source: str, storage_options: StorageOptions | None = None) -> Checkpoint:
    """The weights of a path, of a URI, or of ``hf-hub:OWNER/NAME[@REVISION]`` or ``hf://OWNER/NAME[@REVISION]/FILE``.

    A path in the cache of the hub is mapped as it is, without a copy. `Checkpoint.sha256` is known.

    Raises:
        CheckpointError: see `open_checkpoint` and `hub_file`.
    """
    try:
        reference = HubReference.parse(source)
    except ValueError as error:
        raise CheckpointError(f"weights: {error}") from None
    if reference is None:
        return open_checkpoint(source, storage_options, in_place=is_in_cache(source), hashed=True)
    path = hub_file(reference, [reference.file] if reference.file else WEIGHTS)
    return map_checkpoint(path, PublicUri(str(reference)), hashed=True)


def published_checkpoint(config: Mapping[str, Any], name: str) -> Checkpoint:
    """The weights that timm names for a model.

    Args:
        config: `pretrained_cfg` of the model.
        name: of the model, for messages.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    if repository := config.get("hf_hub_id"):
        file = config.get("hf_hub_filename")
        return open_weights(f"hf://{repository}/{file}" if file else f"{REPOSITORY}{repository}")
    if url := config.get("url"):
        return open_checkpoint(url, hashed=True)
    raise CheckpointError(f"timm has no weights of {name}: set its weights to the path or URI of a checkpoint")


def absolute_source(source: str) -> str:
    """The source for processes that run elsewhere: a plain path made absolute."""
    return source if source.startswith(REPOSITORY) else absolute_uri(source)
