"""Who is served first."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedRequest:
    """A request as a policy sees it. `arrival_s` are seconds of a clock that never goes back."""

    arrival_s: float
    priority: int
    num_prompt_tokens: int
    max_tokens: int | None
    cache_salt: str


class SchedulingPolicy(Protocol):
    """Puts the requests of an engine in order.

    An installed package registers a function without parameters that makes one, as an entry point of the group
    `fairlead.scheduling_policies`; `--scheduling-policy NAME` takes it.
    """

    def key(self, request: QueuedRequest) -> float:
        """The place of a request, lower first; equal ones are served in order of arrival. Asked once, at its arrival.

        For nobody to starve, keys must grow with the time of arrival. A request whose key is lower than that of one
        that runs takes its seat or its memory if there is too little for both.
        """
        ...
