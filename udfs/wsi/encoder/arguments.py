"""Arguments with which timm builds a model: which are not the model's own, and layers by name."""

from collections.abc import Iterable

_OF_TIMM = frozenset(
    {
        *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),  # its weights
        *("scriptable", "exportable", "no_jit"),  # how layers are compiled
        *("features_only", "num_classes", "in_chans"),  # what goes in and comes out
    }
)


def check_arguments(names: Iterable[str]) -> None:
    """Refuse arguments of `timm.create_model` that would change the weights, the images or the output behind the settings.

    Raises:
        ValueError: there are some.
    """
    refused = sorted(_OF_TIMM.intersection(names))
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: not for the model but for timm, which takes RGB images and weights only as slidelake says: "
            "leave this out, and set its weights for other weights, its pooling for another output"
        )
