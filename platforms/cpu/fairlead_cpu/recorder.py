"""GraphRunner of the CPU: a forward pass is recorded as native calls once, and replayed in one call after that.

In Python, a small model's step costs as much as its arithmetic: some three hundred calls, each with its tensors. What
they pass to the kernels depends on the number of rows alone, but for the inputs and the plan of the attention; so a
record of them, with those pointers exchanged, is the step.
"""

import ctypes
import logging
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fairlead_cpu.arena import Arena
from fairlead_cpu.native import SIGNATURES, Kernels, RecordedCall
from fairlead_cpu.native_attention import NativeAttention

MAX_ARGUMENTS = 20
_MAX_ROWS = 64  # of a recorded step; in larger ones the arithmetic outweighs Python
_MAX_RECORDINGS = 64
_CREATE = ("empty", "new_empty", "empty_like")
_LOOK = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__setitem__")

logger = logging.getLogger("fairlead.cpu")
Forward = Callable[..., torch.Tensor]


class _Watch(TorchFunctionMode):
    """Gives new tensors memory of the arena, and notes what else than kernels computes, or looks at, anything.

    (A dispatch mode would see more, but its first use imports sympy and the compiler's front end, for seconds.)
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self.foreign: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result, name = func(*args, **(kwargs or {})), func.__name__
        if name in _CREATE:
            return self._arena.empty(tuple(result.shape), result.dtype)
        if name in _LOOK or name.rstrip("_") + "_" == name:
            self.foreign.add(name)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not any(_shares(tensor, argument) for argument in args):
                self.foreign.add(name)
        return result


def _shares(tensor: torch.Tensor, argument: object) -> bool:
    """Whether a result is a view of an argument, or the argument itself."""
    return isinstance(argument, torch.Tensor) and (
        tensor.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
    )


class _Recording:
    """The calls of one forward pass, as csrc/replay.cpp reads them, and where the step's own pointers stand in them."""

    def __init__(
        self, kernels: Kernels, calls: Sequence[RecordedCall], inputs: Sequence[int], out: torch.Tensor
    ) -> None:
        self.out = out
        words = np.zeros((len(calls), 1 + MAX_ARGUMENTS), np.uint64)
        for row, (name, arguments) in zip(words, calls, strict=True):
            row[0] = kernels.address(f"{name}_invoke")
            row[1 : 1 + len(arguments)] = [
                _word(kind, value) for kind, value in zip(SIGNATURES[name][1], arguments, strict=True)
            ]
        self._flat = words.reshape(-1)
        self._places = [np.flatnonzero(self._flat == np.uint64(pointer)) for pointer in inputs]
        self._replay, self._address, self._num_calls = kernels.call.fl_replay, self._flat.ctypes.data, len(calls)

    def replay(self, inputs: Sequence[int]) -> torch.Tensor:
        for places, pointer in zip(self._places, inputs, strict=True):
            self._flat[places] = pointer
        self._replay(self._address, self._num_calls)
        return self.out


def _word(kind: type, value: int | float | None) -> int:
    """An argument as the 64-bit word that stands for it."""
    if value is None:
        return 0
    if kind is ctypes.c_float:
        bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
        return bits
    return int(value) % 2**64


class StepRecorder:
    """GraphRunner without buckets: a step of so many rows is recorded when it comes for the second time.

    A model whose forward pass computes anything outside the kernels runs as it comes; the log says why, once.
    """

    buckets: tuple[int, ...] = ()

    def __init__(self, kernels: Kernels, generation: Callable[[], int]) -> None:
        """`generation` tells how often memory has moved: a recording lives no longer than its pointers."""
        self._kernels, self._generation = kernels, generation
        self._recorded_at = generation()
        self._arena = Arena()
        self._recordings: OrderedDict[int, _Recording | None] = OrderedDict()
        self.foreign: set[str] = set()
        """What keeps steps from being recorded."""

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        """No padding: every number of rows has its own recording."""
        return None

    def run(self, forward: Forward, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Any) -> torch.Tensor:
        """Replays a step of this many rows; records it the second time, and just runs it the first."""
        num_rows = len(token_ids_T)
        if num_rows > _MAX_ROWS or self.foreign:
            return forward(token_ids_T, positions_T, step)
        if self._generation() != self._recorded_at:
            self._recordings.clear()
            self._recorded_at = self._generation()
        if num_rows not in self._recordings:
            self._recordings[num_rows] = None
            if len(self._recordings) > _MAX_RECORDINGS:
                self._recordings.popitem(last=False)
            return forward(token_ids_T, positions_T, step)
        inputs = [token_ids_T.data_ptr(), positions_T.data_ptr()]
        for group in step.groups:
            if not isinstance(group.backend, NativeAttention):
                return forward(token_ids_T, positions_T, step)
            inputs += group.plan.pointers
        recording = self._recordings[num_rows]
        if recording is not None:
            self._recordings.move_to_end(num_rows)
            return recording.replay(inputs)
        with _Watch(self._arena) as watch, self._kernels.record() as calls:
            out = forward(token_ids_T, positions_T, step)
        if watch.foreign:
            self.foreign = watch.foreign
            logger.info(
                "steps are not recorded: beside the kernels, the model runs %s", ", ".join(sorted(self.foreign))
            )
        else:
            self._recordings[num_rows] = _Recording(self._kernels, calls, inputs, out)
        return out
