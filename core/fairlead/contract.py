"""What the core checks of a platform before it builds on it, cheaply and once. No torch.

The conformance kit (`fairlead.testing`) looks for the rest.
"""

from collections.abc import Mapping
from typing import Any

from fairlead.errors import PluginContractError
from fairlead.interface import Capabilities, Defaults, Device, LinearMethod, MemoryInfo, OpProvider, Platform

_DATA = ("name", "device", "torch_device", "capabilities", "defaults", "allocator")
_METHODS = (
    "attention_backends",
    "unavailable_backends",
    "attention",
    "ops",
    "linear_methods",
    "graph_runner",
    "communicator",
    "memory_info",
    "memory_profile",
    "max_swap_bytes",
    "stream",
    "synchronize",
    "seed",
)
_ALLOCATOR = ("empty", "allocated_bytes", "offload", "discard", "restore")
_BACKEND = ("block_bytes", "allocate", "plan", "forward", "copy_blocks")  # and, to swap, the copies to the host
_LINEAR = ("refuses", "packed_bytes", "pack", "apply", "dequantise")
_GRAPH_RUNNER = ("bucket", "run")


def check_platform(platform: Any, plugin: str, device: Device) -> None:
    """Looks at what `create` returned and at what its hooks without arguments return.

    Raises PluginContractError naming plugin, hook, expected and got.
    """

    def expect(is_so: bool, hook: str, expected: str, got: object) -> None:
        if not is_so:
            raise PluginContractError(plugin=plugin, hook=hook, expected=expected, got=repr(got)[:200])

    missing = [a for a in (*_DATA, *_METHODS) if getattr(platform, a, None) is None]
    if missing:
        got = f"{type(platform).__name__} without {', '.join(missing)}"
        raise PluginContractError(plugin=plugin, hook="create", expected="a Platform", got=got)
    for method in _METHODS:
        expect(callable(getattr(platform, method)), method, "a method", getattr(platform, method))
    expect(platform.name == plugin, "create", f"a platform named {plugin!r}", platform.name)
    expect(platform.device == device, "create", f"the platform of device {device.name!r}", platform.device)
    capabilities, defaults = platform.capabilities, platform.defaults
    expect(isinstance(capabilities, Capabilities), "capabilities", "Capabilities", capabilities)
    expect(isinstance(defaults, Defaults), "defaults", "Defaults", defaults)
    expect(defaults.dtype in capabilities.dtypes, "defaults", f"a dtype of {capabilities.dtypes}", defaults.dtype)
    sizes = capabilities.block_sizes
    expect(defaults.block_size in sizes, "defaults", f"a block size of {sizes}", defaults.block_size)
    _check_methods(plugin, "allocator", "a MemoryAllocator", platform.allocator, _ALLOCATOR)

    names = platform.attention_backends()
    is_names = isinstance(names, tuple) and bool(names) and all(isinstance(n, str) and n for n in names)
    expect(is_names, "attention_backends", "a tuple of at least one name", names)
    missing_names = platform.unavailable_backends()
    is_reasons = isinstance(missing_names, Mapping) and all(
        isinstance(text, str) and text for item in missing_names.items() for text in item
    )
    is_reasons = is_reasons and not set(missing_names) & set(names)
    expect(is_reasons, "unavailable_backends", "reasons by the names of others than attention_backends", missing_names)
    for hook, kind in (("ops", "OpProvider"), ("linear_methods", "LinearMethod")):
        found = getattr(platform, hook)()
        is_table = isinstance(found, Mapping) and all(isinstance(v, tuple) for v in found.values())
        expect(is_table, hook, f"a mapping of names to tuples of {kind}", found)
        for entry in (entry for entries in found.values() for entry in entries):
            if kind == "OpProvider":
                expect(isinstance(entry, OpProvider) and callable(entry.fn), hook, "an OpProvider", entry)
            else:
                _check_methods(plugin, hook, "a LinearMethod", entry, _LINEAR)
    runner = platform.graph_runner()
    _check_methods(plugin, "graph_runner", "a GraphRunner", runner, _GRAPH_RUNNER)
    buckets = getattr(runner, "buckets", None)
    is_rising = isinstance(buckets, tuple) and list(buckets) == sorted({n for n in buckets if n > 0})
    expect(is_rising, "graph_runner", "buckets: a tuple of rising sizes above 0", buckets)
    expect(bool(buckets) or not capabilities.static_shapes, "graph_runner", "buckets for static_shapes", buckets)
    memory_info(platform)


def memory_info(platform: Platform) -> MemoryInfo:
    """The platform's memory now, if it can be: 0 <= free <= total."""
    found: object = platform.memory_info()
    if isinstance(found, MemoryInfo) and 0 <= found.free_bytes <= found.total_bytes > 0:
        return found
    expected = "MemoryInfo with 0 <= free_bytes <= total_bytes, and a total above 0"
    raise PluginContractError(plugin=platform.name, hook="memory_info", expected=expected, got=repr(found)[:200])


def check_backend(plugin: str, name: str, backend: Any) -> None:
    """Looks at what `attention` returned."""
    _check_methods(plugin, f"attention({name!r})", "an AttentionBackend", backend, _BACKEND)
    num_bytes = backend.block_bytes()
    if type(num_bytes) is not int or num_bytes <= 0:
        hook = f"attention({name!r}).block_bytes"
        raise PluginContractError(plugin=plugin, hook=hook, expected="a number of bytes above 0", got=repr(num_bytes))


def check_packed(plugin: str, method: LinearMethod, packed: object) -> None:
    """Looks at what `pack` of a linear method returned."""
    if packed is None:
        hook = f"linear_methods {method.name!r}.pack"
        raise PluginContractError(plugin=plugin, hook=hook, expected="what apply wants", got="None")


def _check_methods(plugin: str, hook: str, expected: str, got: object, methods: tuple[str, ...]) -> None:
    missing = [m for m in methods if not callable(getattr(got, m, None))]
    if missing:
        what = "None" if got is None else f"{type(got).__name__} without {', '.join(missing)}"
        raise PluginContractError(plugin=plugin, hook=hook, expected=expected, got=what)
