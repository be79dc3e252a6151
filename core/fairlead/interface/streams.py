"""Queues of work on a device, and marks in them."""

from typing import Protocol


class Event(Protocol):
    """A mark in a stream."""

    def query(self) -> bool:
        """Whether all work before the mark is done."""
        ...

    def synchronize(self) -> None:
        """Blocks this thread until it is."""
        ...


class Stream(Protocol):
    """A queue of work: calls that were made while it was current run in their order, beside those of other streams.

    A device without such queues runs everything at once; its streams do nothing.
    """

    def __enter__(self) -> "Stream":
        """Makes it the current stream of this thread."""
        ...

    def __exit__(self, *exception: object) -> None:
        """Makes the one before current again."""
        ...

    def record(self) -> Event:
        """Marks the end of what is queued now."""
        ...

    def wait(self, event: Event) -> None:
        """Work that is queued from now on waits for the event; this thread does not."""
        ...

    def synchronize(self) -> None:
        """Blocks this thread until all that is queued is done."""
        ...
