"""What happens to requests and when, for whoever measures it."""

from dataclasses import dataclass
from typing import Protocol

from fairlead.request import Request, RequestOutput


@dataclass(slots=True, kw_only=True)
class Timeline:
    """When a request reached its stages, by time.monotonic(); None for a stage that it has not reached.

    `caller` is whatever the caller wants to find again when the request ends.
    """

    arrived: float
    started: float | None = None  # the scheduler took it up
    first_token: float | None = None
    last_token: float | None = None
    caller: object = None


class EngineObserver(Protocol):
    """Hears of every step and every request of an AsyncEngine, in its event loop; it must not wait."""

    def step(self, num_tokens: float) -> None:
        """The engine computed a step of so many tokens."""

    def gap(self, seconds: float) -> None:
        """A request got tokens, so long after its last ones."""

    def ended(self, request: Request, output: RequestOutput, times: Timeline, now: float) -> None:
        """A request ended in whatever way."""
