"""The thin face of torch's device modules that we use: what a test fakes to run a platform without its hardware."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch


class Graph(Protocol):
    """A captured sequence of launches (torch.cuda.CUDAGraph, torch.xpu.XPUGraph)."""

    def replay(self) -> None:
        """Queues all launches again, on the addresses of the capture."""
        ...


class DeviceModule(Protocol):
    """torch.cuda, torch.xpu, or a fake. Signatures are torch's; devices are given by index."""

    def device_count(self) -> int: ...
    def current_device(self) -> int: ...
    def set_device(self, device: int) -> None: ...
    def synchronize(self, device: int) -> None: ...
    def mem_get_info(self, device: int) -> tuple[int, int]: ...
    def memory_allocated(self, device: int) -> int: ...
    def memory_reserved(self, device: int) -> int: ...
    def max_memory_allocated(self, device: int) -> int: ...
    def reset_peak_memory_stats(self, device: int) -> None: ...
    def empty_cache(self) -> None: ...
    def manual_seed_all(self, seed: int) -> None: ...
    def get_device_properties(self, device: int) -> Any: ...
    def Stream(self, device: int) -> Any: ...  # noqa: N802 (torch's class)
    def stream(self, stream: Any) -> AbstractContextManager[Any]: ...
    def graph_pool_handle(self) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One device: its module, its number there, where its tensors live, and how they are made.

    `new_graph` is None where this torch cannot capture graphs on the device; what is queued inside
    `capture(graph, pool, stream)` goes to the graph and does not run.
    """

    module: DeviceModule
    index: int
    torch_device: torch.device
    empty: Callable[[tuple[int, ...], torch.dtype], torch.Tensor]
    new_graph: Callable[[], Graph] | None
    capture: Callable[[Any, Any, Any], AbstractContextManager[Any]]

    def make_current(self) -> None:
        """Makes it this thread's device: kernels start on the current one, and a new thread begins with number 0."""
        if self.module.current_device() != self.index:
            self.module.set_device(self.index)

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        self.module.synchronize(self.index)


def torch_runtime(kind: str, index: int) -> Runtime:
    """The real one: `kind` is "cuda" (which is ROCm's name in torch, too) or "xpu"."""
    module: Any = getattr(torch, kind)
    device = torch.device(kind, index)

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # Elsewhere a plan is being made meanwhile: what that thread allocates is not of the capture, and must not end it.
    options: dict[str, Any] = {"capture_error_mode": "thread_local"} if kind == "cuda" else {}

    def capture(graph: Any, pool: Any, stream: Any) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = module.graph(graph, pool=pool, stream=stream, **options)
        return context

    return Runtime(
        module=cast(DeviceModule, module),
        index=index,
        torch_device=device,
        empty=empty,
        new_graph=getattr(module, f"{kind.upper()}Graph", None),
        capture=capture,
    )
