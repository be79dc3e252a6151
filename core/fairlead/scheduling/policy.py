"""In which order requests are served."""

from dataclasses import dataclass

from fairlead.interface import QueuedRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstComeFirstServed:
    """The order of arrival."""

    def key(self, request: QueuedRequest) -> float:
        """The same for all."""
        return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Priority:
    """A lower `priority` first, and among equals the order of arrival.

    A level of priority is worth `aging_s` seconds of waiting: whoever has waited for longer than that is not passed
    over any more, so that nobody starves, whatever comes.
    """

    aging_s: float

    def key(self, request: QueuedRequest) -> float:
        """The time at which a request of priority 0 would have to arrive for the same place."""
        return request.arrival_s + request.priority * self.aging_s
