"""The first call of what a platform brings is checked: shapes, dtypes and devices of its results."""

from collections.abc import Callable
from typing import Any

import torch

from fairlead.errors import PluginContractError

MAX_ZEROS = 2**20


class FirstCall:
    """Stands for a function of a platform until it has been called once, which `unwrap` in a model's layers ends.

    The first result is compared with what the reference gives on the host, from zeros of the same shapes.
    """

    def __init__(self, fn: Callable[..., Any], reference: Callable[..., Any], *, plugin: str, hook: str) -> None:
        self.fn, self._reference = fn, reference
        self._plugin, self._hook = plugin, hook
        self._is_checked = False

    def __call__(self, *args: Any) -> Any:
        result = self.fn(*args)
        if not self._is_checked:
            expected = self._reference(*(_stand_in(a) for a in args))
            device = next(a.device for a in args if isinstance(a, torch.Tensor))
            check_result(result, expected, device, plugin=self._plugin, hook=self._hook)
            self._is_checked = True
        return result


def unwrap(model: torch.nn.Module) -> None:
    """Puts the functions themselves in place, so that later steps pay nothing for the check."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, FirstCall):
                setattr(module, name, value.fn)


def check_result(got: object, expected: object, device: torch.device, *, plugin: str, hook: str) -> None:
    """Compares tensors (alone, or in tuples) by shape and dtype; `device` is where `got` must be.

    Raises PluginContractError.
    """
    if isinstance(expected, tuple):
        if not isinstance(got, tuple) or len(got) != len(expected):
            raise PluginContractError(plugin=plugin, hook=hook, expected=f"{len(expected)} tensors", got=_shown(got))
        for mine, other in zip(got, expected, strict=True):
            check_result(mine, other, device, plugin=plugin, hook=hook)
    elif isinstance(expected, torch.Tensor) and (
        not isinstance(got, torch.Tensor)
        or (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, device)
    ):
        wanted = _describe(tuple(expected.shape), expected.dtype, device)
        raise PluginContractError(plugin=plugin, hook=hook, expected=wanted, got=_shown(got))


def _stand_in(value: Any) -> Any:
    """Zeros in a tensor's place; where there are many, such as those of weights, one zero stands for all of them.

    The meta device would not even compute, but the first operation there imports the compiler of torch: 2.3 s.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() > MAX_ZEROS:
        return torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    num = last + 1 if value.numel() else 0
    return torch.zeros(num, dtype=value.dtype, device="cpu").as_strided(value.shape, value.stride())


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return _describe(tuple(value.shape), value.dtype, value.device)
    return repr(value)[:200]


def _describe(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"a tensor of shape {shape}, {str(dtype).removeprefix('torch.')}, on {device}"
