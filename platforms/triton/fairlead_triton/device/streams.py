"""Streams and events of a device."""

from contextlib import AbstractContextManager
from typing import Any

from fairlead.interface import Event
from fairlead_triton.device.runtime import Runtime


class DeviceStream:
    """Stream over torch's. Its events are torch's own, which have the two methods that Event asks for."""

    def __init__(self, runtime: Runtime) -> None:
        self._module = runtime.module
        self._stream: Any = runtime.module.Stream(runtime.index)
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> "DeviceStream":
        context = self._module.stream(self._stream)
        context.__enter__()
        self._entered.append(context)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._entered.pop().__exit__(*exception)

    def record(self) -> Event:
        """Marks the end of what is queued now."""
        event: Event = self._stream.record_event()
        return event

    def wait(self, event: Event) -> None:
        """Queues the wait; this thread goes on."""
        self._stream.wait_event(event)

    def synchronize(self) -> None:
        """Blocks this thread."""
        self._stream.synchronize()
