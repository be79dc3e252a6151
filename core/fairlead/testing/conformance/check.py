"""What a check is, and how its verdict is told. No torch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType

from fairlead.errors import PluginContractError, one_line

TIERS = ("contract", "ops", "attention", "quantisation", "model", "engine", "server")
AGAINST = "against"

SUPPORTED, REFERENCE, UNSUPPORTED, FAILED = "supported", "reference", "unsupported", "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a check that convicts nobody found.

    `status` is "supported", "reference" (it falls back to one) or "unsupported"; `error` is the largest one measured,
    next to the `tolerance` that it kept to.
    """

    status: str = SUPPORTED
    reason: str | None = None
    error: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question to a platform. `hook` names what it asks of it.

    `run` returns an Outcome, or raises: PluginContractError with hook, expected and got, or whatever the plugin raises.
    """

    tier: str
    name: str
    hook: str
    run: Callable[[], Outcome]

    @property
    def id(self) -> str:
        """Unique among the checks of a platform."""
        return f"{self.tier}: {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The verdict on one check; `message` says why it failed or is not supported."""

    tier: str
    name: str
    status: str
    message: str | None = None
    error: float | None = None
    tolerance: float | None = None
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """The check's."""
        return f"{self.tier}: {self.name}"


def run_check(check: Check, plugin: str, package: str | None) -> Result:
    """Runs it; `package` is the top-level module of the plugin, to find the function that raised."""
    start = time.perf_counter()
    try:
        outcome = check.run()
    except KeyboardInterrupt:
        raise
    except PluginContractError as error:
        fault: PluginContractError | None = error
    except BaseException as error:  # a plugin may raise anything, SystemExit included
        hook = _with_culprit(check.hook, culprit(_frames(error.__traceback__), package))
        fault = PluginContractError(plugin=plugin, hook=hook, expected="no exception", got=one_line(error))
    else:
        fault = None
    seconds = time.perf_counter() - start
    if fault is not None:
        return failed(check.tier, check.name, str(fault), seconds)
    return Result(
        tier=check.tier,
        name=check.name,
        status=outcome.status,
        message=outcome.reason,
        error=outcome.error,
        tolerance=outcome.tolerance,
        seconds=seconds,
    )


def failed(tier: str, name: str, message: str, seconds: float = 0.0) -> Result:
    """A conviction."""
    return Result(tier=tier, name=name, status=FAILED, message=message, seconds=seconds)


def hung(check: Check, plugin: str, package: str | None, frame: FrameType | None, seconds: float) -> Result:
    """The conviction of a check that did not end; `frame` is where it stood."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    hook = _with_culprit(check.hook, culprit(reversed(frames), package))
    fault = PluginContractError(
        plugin=plugin, hook=hook, expected=f"an end within {seconds:g} s", got="none: it hangs, or is far too slow"
    )
    return failed(check.tier, check.name, str(fault), seconds)


def culprit(frames: Iterator[FrameType], package: str | None) -> str | None:
    """The outermost function of the plugin on a stack."""
    for frame in frames:
        if package is not None and str(frame.f_globals.get("__name__")).split(".")[0] == package:
            return frame.f_code.co_qualname
    return None


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _with_culprit(hook: str, name: str | None) -> str:
    return hook if name is None or name in hook else f"{hook}, in {name}"
