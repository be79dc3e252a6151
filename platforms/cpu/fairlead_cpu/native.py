"""The native kernels' library: which one suits this processor, and its functions by ctypes. No torch."""

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fairlead.errors import ConfigError
from fairlead_cpu import topology

ISA_VARIABLE = "FAIRLEAD_CPU_ISA"
_LIB = Path(__file__).parent / "lib"
_CPUINFO = Path("/proc/cpuinfo")

_X86_AVX2 = frozenset({"avx2", "fma", "f16c"})
_X86_AVX512 = _X86_AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_X86_VNNI = _X86_AVX512 | {"avx512_vnni"}
_X86_BF16 = _X86_VNNI | {"avx512_bf16", "avx512vbmi"}
_ARM_BF16 = frozenset({"asimddp", "i8mm", "bf16"})
# Best first; the features are named as Linux names them. Every library runs on a machine that has its features.
_NEEDS: dict[str, frozenset[str]] = {
    "amx": _X86_BF16 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512bf16": _X86_BF16,
    "avx512vnni": _X86_VNNI,
    "avx512": _X86_AVX512,
    "avx2": _X86_AVX2,
    "neon_bf16": _ARM_BF16 | {"asimd"},
    "neon": frozenset({"asimd"}),
    "generic": frozenset(),
}

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
# The result's type and the arguments' of every exported function; pointers travel as tensor.data_ptr().
SIGNATURES: dict[str, tuple[type | None, Sequence[type]]] = {
    "fl_isa": (ctypes.c_char_p, ()),
    "fl_enable": (_I32, ()),
    "fl_pool_init": (None, (_I32, _P)),
    "fl_pool_num_threads": (_I32, ()),
    "fl_pool_shutdown": (None, ()),
    # bfloat16?, variant, then x and its strides, what else is read, what is written, sizes
    "fl_rms_norm": (None, (_I32, _I32, _P, _I64, _P, _I64, _P, _P, _P, _I64, _I64, ctypes.c_float)),
    "fl_layer_norm": (None, (_I32, _P, _I64, _P, _P, _P, _I64, _I64, ctypes.c_float)),
    "fl_rotary": (None, (_I32, _I32, *(_P, _I64, _I64, _I64) * 2, _P, _P, _P, _I64, _I64, _P, _P)),
    "fl_gate": (None, (_I32, _I32, _P, _I64, _P, _I64, _I64)),
    "fl_embedding": (None, (_P, _I64, _P, _I64, _P)),
    # rows at a stride, what rules them, sizes, what is written
    "fl_draw": (None, (_P, _I64, _P, _I64, _I64, _P)),
    "fl_draw_filtered": (None, (_P, _I64, _P, _I64, _I64, _P)),
    "fl_token_bitmask": (None, (_I32, _P, _I64, _P, _I64, _P, _I64, _I64)),
    "fl_penalties": (None, (*(_P,) * 5, _I64)),
    "fl_lora_shrink": (None, (_I32, _P, _I64, _P, _P, _P, _I64, _I64, _I64)),
    "fl_lora_expand": (None, (_I32, _P, _I64, _P, _I64, _P, _P, _P, _I64, _I64, _I64)),
    "fl_attention_block_bytes": (_I64, (_P,)),
    "fl_attention_plan": (_I64, (_P, _I64, _P, _P, _P, _I64, _P, _I64, _P, _I64)),
    "fl_attention_scratch_bytes": (_I64, (_P, _P)),
    "fl_attention": (None, (_P, _P, *(_P, _I64, _I64) * 3, _P, _P, _P)),
    "fl_probe_multiply": (_I64, (_I32, _I64)),
    "fl_probe_read": (ctypes.c_float, (_P, _I64)),
    "fl_replay": (None, (_P, _I64)),
    # layer, x, its stride, rows, bias, residual, its stride, y, its stride
    "fl_linear": (None, (_P, _P, _I64, _I64, _P, _P, _I64, _P, _I64)),
    # layer, x, its stride, tokens, logits in bfloat16?, logits, their stride, correction, scratch, y
    "fl_moe": (None, (_P, _P, _I64, _I64, _I32, _P, _I64, _P, _P, _P)),
    "fl_moe_scratch_bytes": (_I64, (_P, _I64)),
    "fl_advise_huge_pages": (None, (_P, _I64)),
    # scheme, pair, out, k
    "fl_packed_bytes": (_I64, (_I32, _I32, _I64, _I64)),
    "fl_packed_columns": (_I64, (_I32, _I64)),
    # (scheme,) pair, source, its dtype and stride, out, k, then what is written
    "fl_pack_float": (None, (_I32, _I32, _P, _I32, _I64, _I64, _I64, _P)),
    "fl_pack_int4": (None, (_I32, _P, _I32, _I64, _I64, _I64, _P, _P)),
    "fl_pack_int8": (None, (_I32, _P, _I32, _I64, _I64, _I64, _P, _P, _P)),
}


class LinearLayer(ctypes.Structure):
    """FlLinear of csrc/matmul.h."""

    _fields_ = (
        ("scheme", _I32),
        ("x_dtype", _I32),
        ("y_dtype", _I32),
        ("activation", _I32),
        ("k", _I64),
        ("out", _I64),
        ("weight", _P),
        ("scale", _P),
        ("sums", _P),
    )


Offsets = tuple[int, int, int]
"""Of a layer's weight, scales and sums in its memory, in bytes."""


class MoeLayer(ctypes.Structure):
    """FlMoe of csrc/moe.cpp."""

    _fields_ = (
        *((name, _I32) for name in ("num_experts", "top_k", "num_groups", "top_groups", "group_top")),
        ("sigmoid", _I32),
        ("normalize", _I32),
        ("scale", ctypes.c_float),
        ("enter", _P),
        ("leave", _P),
    )


RecordedCall = tuple[str, tuple[Any, ...]]


class Function:
    """One exported function. While its thread records, each call is noted too."""

    __slots__ = ("_function", "_kernels", "_name")

    def __init__(self, name: str, function: Callable[..., Any], kernels: "Kernels") -> None:
        self._name, self._function, self._kernels = name, function, kernels

    def __call__(self, *arguments: Any) -> Any:
        recording = self._kernels.recording
        if recording is not None and recording[0] == threading.get_ident():
            recording[1].append((self._name, arguments))
        return self._function(*arguments)


class Kernels:
    """One library, loaded: `call.fl_name(...)` calls a function, `isa` and `layout` say what it is and runs on.

    `recording` is the thread whose calls are noted, and the notes.
    """

    def __init__(self, isa: str, layout: topology.Layout) -> None:
        self.isa = isa
        self.layout = layout
        self.library = ctypes.CDLL(str(_LIB / f"libfairlead_cpu_{isa}.so"))
        self._recording_lock = threading.Lock()
        self.recording: tuple[int, list[RecordedCall]] | None = None
        self.call = types.SimpleNamespace()
        for name, (result, arguments) in SIGNATURES.items():
            function = self.library[name]
            function.restype, function.argtypes = result, arguments
            setattr(self.call, name, Function(name, function, self))
        built_for = self.call.fl_isa().decode()
        assert built_for == isa, f"the library of {isa} was compiled for {built_for}"
        if not self.call.fl_enable():
            raise ConfigError(
                f"the operating system does not let this process use {isa}; {ISA_VARIABLE} selects another instruction "
                f"set: {', '.join(name for name in usable() if name != isa)}"
            )
        bound = (_I32 * len(layout.cpus))(*layout.cpus) if layout.bound else None
        self.call.fl_pool_init(len(layout.cpus), bound)

    def address(self, name: str) -> int:
        """Where an exported function stands."""
        address = ctypes.cast(self.library[name], _P).value
        assert address is not None
        return address

    @contextlib.contextmanager
    def record(self) -> Iterator[list[RecordedCall]]:
        """Notes the calls that this thread makes; one thread at a time."""
        calls: list[RecordedCall] = []
        with self._recording_lock:
            self.recording = (threading.get_ident(), calls)
            try:
                yield calls
            finally:
                self.recording = None


@functools.cache
def kernels() -> Kernels | None:
    """The library for this process, loaded once; None where the package was built without kernels.

    Raises ConfigError where FAIRLEAD_CPU_ISA names what cannot run here.
    """
    isa = choose()
    return None if isa is None else Kernels(isa, topology.layout())


def choose() -> str | None:
    """The instruction set whose library suits this machine best, or the one asked for; None without libraries.

    Raises ConfigError where FAIRLEAD_CPU_ISA names one that was not built or cannot run here.
    """
    names = usable()
    asked = os.environ.get(ISA_VARIABLE)
    if asked and asked not in names:
        raise ConfigError(f"{ISA_VARIABLE}={asked}: this machine can run {', '.join(names) or 'none (built without)'}")
    return asked or next(iter(names), None)


def usable() -> tuple[str, ...]:
    """The instruction sets that were built and that this processor has, best first."""
    features = _features()
    return tuple(
        isa for isa, needs in _NEEDS.items() if needs <= features and (_LIB / f"libfairlead_cpu_{isa}.so").is_file()
    )


@functools.cache
def _features() -> frozenset[str]:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return frozenset(value.split())
        return frozenset()
    if platform.machine() == "arm64":
        return frozenset({"asimd"}) | _apple_features()
    return frozenset()


def _apple_features() -> frozenset[str]:
    names = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}
    found = set()
    for name, feature in names.items():
        run = subprocess.run(["sysctl", "-n", f"hw.optional.arm.{name}"], capture_output=True, text=True)
        if run.stdout.strip() == "1":
            found.add(feature)
    return frozenset(found)
