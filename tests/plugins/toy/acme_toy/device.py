"""The device "toy": torch's PrivateUse1 key, set up from Python.

A ToyTensor says that it is on "toy:0" and has no memory that the host could reach; what it holds is in `_held`. Every
operation on it comes here and is computed there. As on a real device, host tensors do not mix with its own, except
numbers and indices.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import backend_registration

_HOST_FRIENDLY = ("copy_", "_copy_from", "index", "index_put_", "index_put", "set_")  # may take host tensors


class ToyTensor(torch.Tensor):
    """A tensor of the toy device."""

    _held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "ToyTensor":
        with torch.inference_mode(False):  # views of tensors from outside inference mode must not be inference tensors
            made = torch.Tensor._make_wrapper_subclass(
                cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device("toy", 0)
            )
        made._held = held
        return made

    def tolist(self) -> Any:
        """Torch's own, in C++, knows no subclasses."""
        return self._held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Computes on what the tensors hold; results stay on the device, unless they are wanted elsewhere."""
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs or {})
        _refuse_host_tensors(func, given)
        target = given.get("device")
        if isinstance(given.get("other"), torch.Tensor) and "aten::to.other" in str(func._schema):
            target = given["other"].device
        held = {name: _map(_unwrap, value) for name, value in given.items()}
        if target is not None:
            held["device"] = "cpu"
        positional = [held.pop(a.name) for a in func._schema.arguments if not a.kwarg_only and a.name in held]
        result = func(*positional, **held)
        written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if written and func._schema.returns:
            found = tuple(given[name] for name in written if name in given)
            return found[0] if len(found) == 1 else found
        if target is not None and torch.device(target).type != "toy":
            return result
        return _map(_wrap, result)


def held_by(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor of the toy holds; any other tensor itself."""
    return tensor._held if isinstance(tensor, ToyTensor) else tensor


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Changes a value, or each one of a list or tuple: more there is not in the arguments of an operation."""
    if isinstance(value, (list, tuple)):
        return type(value)([change(v) for v in value])
    return change(value)


def _unwrap(value: Any) -> Any:
    return value._held if isinstance(value, ToyTensor) else value


def _wrap(value: Any) -> Any:
    return ToyTensor(value) if isinstance(value, torch.Tensor) else value


def _refuse_host_tensors(func: Any, given: Mapping[str, Any]) -> None:
    if func._schema.name.removeprefix("aten::") in _HOST_FRIENDLY:
        return
    for name, value in given.items():
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, ToyTensor) and tensor.dim():
                raise RuntimeError(f"{func}: all tensors must be on toy:0, but {name!r} is on {tensor.device}")


def _empty(size: Any, dtype: Any = None, **_: Any) -> ToyTensor:
    return ToyTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> ToyTensor:
    return ToyTensor(torch.empty_strided(size, stride, dtype=dtype))


def _arange(start: Any, end: Any = None, step: Any = 1, dtype: Any = None, **_: Any) -> ToyTensor:
    first, last = (0, start) if end is None else (start, end)
    return ToyTensor(torch.arange(first, last, step, dtype=dtype))


def _copy_from(source: torch.Tensor, destination: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    held_by(destination).copy_(held_by(source))
    return destination


def register() -> torch.device:
    """Makes the device known to torch, once per process."""
    if torch._C._get_privateuse1_backend_name() != "toy":
        backend_registration._setup_privateuseone_for_python_backend("toy")
        for name, kernel in (
            ("empty.memory_format", _empty),
            ("empty_strided", _empty_strided),
            ("arange", _arange),
            ("arange.start", _arange),
            ("arange.start_step", _arange),
            ("_copy_from", _copy_from),
        ):
            _LIBRARY.impl(name, kernel, "PrivateUse1")  # type: ignore[no-untyped-call]
    return torch.device("toy", 0)


# Its kernels live as long as it does.
_LIBRARY = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
