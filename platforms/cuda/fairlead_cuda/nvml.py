"""What the driver says of its devices, through NVML: no device is initialised. Imports no torch.

Source: NVML API reference, "nvmlInit_v2" and the queries named below.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96


class NvmlError(Exception):
    """The driver cannot be asked; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device. `capability` is the compute capability, such as (9, 0)."""

    name: str
    uuid: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The driver: its version, the newest CUDA that it can run, such as (12, 4), and its devices in PCI order."""

    version: str
    cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """An open NVML; `close` ends it."""

    def __init__(self, load: Callable[[str], Any] = ctypes.CDLL) -> None:
        try:
            self._library = load(LIBRARY)
        except OSError as error:
            raise NvmlError(f"{LIBRARY} is not found") from error
        self._call("nvmlInit_v2")

    def close(self) -> None:
        """Lets the driver go."""
        self._library.nvmlShutdown()

    def driver(self) -> Driver:
        """All of it."""
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        self._call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        version = self._text("nvmlSystemGetDriverVersion")
        gpus = tuple(self._gpu("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(i)) for i in range(count.value))
        return Driver(version=version, cuda=(cuda.value // 1000, cuda.value % 1000 // 10), gpus=gpus)

    def instance(self, uuid: str) -> Gpu:
        """A part of a device (MIG), by its full name."""
        return self._gpu("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(uuid.encode()))

    def _gpu(self, function: str, key: Any) -> Gpu:
        handle, memory, major, minor = ctypes.c_void_p(), _Memory(), ctypes.c_int(), ctypes.c_int()
        self._call(function, key, ctypes.byref(handle))
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        self._call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        return Gpu(
            name=self._text("nvmlDeviceGetName", handle),
            uuid=self._text("nvmlDeviceGetUUID", handle),
            memory_bytes=memory.total,
            capability=(major.value, minor.value),
        )

    def _text(self, function: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(function, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            self._library.nvmlErrorString.restype = ctypes.c_char_p
            text = self._library.nvmlErrorString(ctypes.c_int(status))
            raise NvmlError(f"{function} failed: {(text or b'?').decode(errors='replace')} ({status})")


def read_driver(load: Callable[[str], Any] = ctypes.CDLL) -> Driver:
    """Opens NVML, reads it and closes it. Raises NvmlError."""
    nvml = Nvml(load)
    try:
        return nvml.driver()
    finally:
        nvml.close()


def read_instances(uuids: list[str], load: Callable[[str], Any] = ctypes.CDLL) -> tuple[Gpu, ...]:
    """Parts of devices (MIG). Raises NvmlError."""
    nvml = Nvml(load)
    try:
        return tuple(nvml.instance(uuid) for uuid in uuids)
    finally:
        nvml.close()
