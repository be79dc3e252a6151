"""Block sizes, warps and stages of the kernels by device, kept as data in `tuning_data/*.toml`.

A device's key is the name that compilers give its architecture: "sm_90", "gfx942", "xpu". Its settings of a kernel are
those of "default", then of its family ("sm", "gfx", "xpu"), then its own; so a device that nobody tuned works too.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

from fairlead.errors import ConfigError

DEFAULT = "default"
_FAMILY = re.compile(r"(sm|gfx|xpu)(_?[0-9a-z]+)?")
_POWERS_OF_TWO = re.compile(r"block(_.*)?|num_warps|max_warps|heads|.*_elements|elements_per_thread")
_MAX_WARPS = 32

Settings = Mapping[str, int]


class Tuning:
    """The settings of every kernel on one device."""

    def __init__(self, device: str, table: Mapping[str, Mapping[str, Settings]] | None = None) -> None:
        """`table` is settings by device by kernel; the package's own if there is none. Raises ConfigError for a key
        that is not a device's."""
        family = _FAMILY.fullmatch(device)
        if family is None:
            raise ConfigError(f"no device is called {device!r} here; keys are such as 'sm_90', 'gfx942', 'xpu'")
        self.device, self.family = device, family[1]
        self._kernels = {
            kernel: MappingProxyType({**devices[DEFAULT], **devices.get(self.family, {}), **devices.get(device, {})})
            for kernel, devices in (_package_table() if table is None else table).items()
        }

    def of(self, kernel: str) -> Settings:
        """The settings of one kernel; they do not change."""
        return self._kernels[kernel]

    def __iter__(self) -> Iterator[str]:
        """Names of the kernels."""
        return iter(self._kernels)


@cache
def _package_table() -> dict[str, dict[str, dict[str, int]]]:
    files = sorted(resources.files("fairlead_triton").joinpath("tuning_data").iterdir(), key=lambda file: file.name)
    return read_table({file.name: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".toml")})


def read_table(files: Mapping[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Reads TOML texts by file name. Raises ConfigError, naming the file and the entry, if one means nothing."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name, text in files.items():
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{name} is not TOML: {error}") from error
        for kernel, devices in found.items():
            if kernel in table:
                raise ConfigError(f"{name}: kernel {kernel!r} is in another file too")
            table[kernel] = _checked(f"{name}: {kernel}", devices)
    return table


def _checked(where: str, devices: object) -> dict[str, dict[str, int]]:
    if not isinstance(devices, dict) or not isinstance(devices.get(DEFAULT), dict):
        raise ConfigError(f"{where} has no section {DEFAULT!r}, which every kernel needs")
    known = devices[DEFAULT]
    for device, settings in devices.items():
        if device != DEFAULT and _FAMILY.fullmatch(device) is None:
            raise ConfigError(f"{where}.{device} is no device; keys are such as 'sm_90', 'gfx942', 'xpu'")
        if not isinstance(settings, dict):
            raise ConfigError(f"{where}.{device} must be a section, found {settings!r}")
        for key, value in settings.items():
            if key not in known:
                raise ConfigError(f"{where}.{device}.{key} is not set by {DEFAULT!r}, which has {', '.join(known)}")
            reason = _fault(key, value)
            if reason is not None:
                raise ConfigError(f"{where}.{device}.{key} must be {reason}, found {value!r}")
    return devices


def _fault(key: str, value: object) -> str | None:
    """What the value should be, if it is not."""
    if type(value) is not int or value < 0:
        return "a whole number from 0 on"
    if _POWERS_OF_TWO.fullmatch(key) and (value == 0 or value & (value - 1)):
        return "a power of two"
    if key in ("num_warps", "max_warps") and value > _MAX_WARPS:
        return f"at most {_MAX_WARPS}"
    return None
