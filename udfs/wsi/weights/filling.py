"""Models that take their weights from a mapped file and hold no copy of them, and how a model and a file differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class NoInitialValues(TorchFunctionMode):
    """While it is active, the parameters of new modules keep the memory that they get: nothing is drawn and written there.

    Memory that nobody writes takes no room, and ViT-g is built in a second. Buffers get their values as ever.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Leave out what changes a parameter in place, such as `Tensor.normal_` and `nn.init.zeros_`."""
        kwargs = kwargs or {}
        name = func.__name__
        target = args[0] if args else kwargs.get("tensor")
        is_in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if is_in_place and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


def fill(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make tensors the parameters and buffers of a model, without a copy if they have the model's own type of number.

    Raises:
        RuntimeError: names or shapes differ; the model is unusable then.
    """
    own = model.state_dict()
    cast = {name: each.to(own[name].dtype) if name in own else each for name, each in tensors.items()}
    model.load_state_dict(cast, assign=True)


def differences_of(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Yield what keeps tensors from filling a model: what it misses, what is of another shape, what it does not have."""
    for name, tensor in expected.items():
        if name not in tensors:
            yield f"no {name}"
        elif tensors[name].shape != tensor.shape:
            yield f"{name} is {list(tensors[name].shape)}, not {list(tensor.shape)}"
    for name in tensors:
        if name not in expected:
            yield f"{name} is not in the model"
