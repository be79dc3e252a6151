"""A device that is not there: torch's device module with memory accounts, streams and graphs, over host tensors.

What it keeps to is what the real ones do where it matters to us: an allocation beyond what is free raises torch's
RuntimeError; freed memory stays with the process until `empty_cache`; what is captured does not run before the replay,
which reads and writes the addresses of the capture; an event is done once its stream has been waited for.
"""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairlead_triton.device.runtime import Runtime

GIB = 2**30


class FakeEvent:
    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self.is_done = True


class FakeStream:
    def __init__(self, device: int) -> None:
        self.device, self.waited_for, self.events = device, [], []

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def wait_event(self, event: FakeEvent) -> None:
        self.waited_for.append(event)

    def synchronize(self) -> None:
        for event in self.events:
            event.synchronize()


class FakeGraph:
    """A tape of tensor operations. A replay runs them on the tensors of the capture, into its results."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self.pool: Any = None
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for op, args, kwargs, made in self.tape:
            for kept, result in zip(made, _tensors(op(*args, **kwargs)), strict=True):
                if kept.data_ptr() != result.data_ptr():  # neither a view nor a change in place
                    kept.copy_(result)


def _tensors(value: object) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, torch.Tensor)]


class _Taping(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default,):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self._graph.tape.append((func, args, kwargs or {}, _tensors(result)))
        return result


@dataclass
class FakeModule:
    """torch.cuda or torch.xpu, as far as `DeviceModule` goes. `neighbour_bytes` are other processes'."""

    total_bytes: int = 16 * GIB
    num_devices: int = 1
    neighbour_bytes: int = 0
    has_memory_query: bool = True
    capability: tuple[int, int] = (9, 0)
    properties: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.current = threading.local()
        self.storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self.reserved = self.peak = 0
        self.num_synchronized = self.num_emptied = 0
        self.seeds: list[int] = []
        self.stream_stack: list[FakeStream] = []
        self.graphs: list[FakeGraph] = []
        self._handles = itertools.count(1)

    # memory

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = dtype.itemsize
        for n in shape:
            num_bytes *= n
        if num_bytes > self.total_bytes - self.neighbour_bytes - self.memory_allocated(0):
            raise RuntimeError(f"out of memory: tried to allocate {num_bytes} bytes")
        tensor = torch.empty(shape, dtype=dtype)
        self.storages.add(tensor.untyped_storage())
        self._note()
        return tensor

    def _note(self) -> int:
        allocated = sum(storage.nbytes() for storage in self.storages)
        self.reserved, self.peak = max(self.reserved, allocated), max(self.peak, allocated)
        return allocated

    def memory_allocated(self, device: int) -> int:
        return self._note()

    def memory_reserved(self, device: int) -> int:
        self._note()
        return self.reserved

    def max_memory_allocated(self, device: int) -> int:
        self._note()
        return self.peak

    def reset_peak_memory_stats(self, device: int) -> None:
        self.peak = 0
        self._note()

    def mem_get_info(self, device: int) -> tuple[int, int]:
        if not self.has_memory_query:
            raise RuntimeError("The device does not support querying the available free memory")
        return self.total_bytes - self.neighbour_bytes - self.memory_reserved(device), self.total_bytes

    def empty_cache(self) -> None:
        self.num_emptied += 1
        self.reserved = 0
        self._note()

    # device, streams, seeds

    def device_count(self) -> int:
        return self.num_devices

    def current_device(self) -> int:
        return getattr(self.current, "index", 0)

    def set_device(self, device: int) -> None:
        assert 0 <= device < self.num_devices
        self.current.index = device

    def synchronize(self, device: int) -> None:
        self.num_synchronized += 1

    def manual_seed_all(self, seed: int) -> None:
        self.seeds.append(seed)

    def get_device_properties(self, device: int) -> Any:
        major, minor = self.capability
        return SimpleNamespace(total_memory=self.total_bytes, major=major, minor=minor, **self.properties)

    def Stream(self, device: int) -> FakeStream:
        return FakeStream(device)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.stream_stack.append(stream)
        try:
            yield
        finally:
            assert self.stream_stack.pop() is stream

    # graphs

    def graph_pool_handle(self) -> tuple[int, int]:
        return (0, next(self._handles))

    def new_graph(self) -> FakeGraph:
        self.graphs.append(FakeGraph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def capture(self, graph: FakeGraph, pool: Any, stream: FakeStream) -> Iterator[None]:
        graph.pool = pool
        with self.stream(stream), _Taping(graph):
            yield
        for op, args, _, made in graph.tape:  # nothing has run yet: what it wrote is not there
            seen = {t.untyped_storage().data_ptr() for t in _tensors(args)}
            for tensor in made:
                if tensor.untyped_storage().data_ptr() not in seen and tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            assert op is not None


def fake_runtime(module: FakeModule | None = None, index: int = 0, *, graphs: bool = True) -> Runtime:
    """Of one device; its tensors are the host's."""
    module = module or FakeModule()
    return Runtime(
        module=module,
        index=index,
        torch_device=torch.device("cpu"),
        empty=module.empty,
        new_graph=module.new_graph if graphs else None,
        capture=module.capture,
    )
