"""Scheduler and block manager under random rules, against the oracle of `fairlead.testing.scheduler_oracle`.

Hypothesis looks for short failures and shrinks them, the plain driver goes far. To see a seed fail alone:

    python -m fairlead.testing.scheduler_simulation SEED NUM_STEPS
"""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from fairlead.request import FinishReason
from fairlead.testing import scheduler_simulation
from fairlead.testing.scheduler_simulation import RULES, Simulation, simulate

FAILED_SEEDS: list[int] = []  # seeds of the plain driver that once failed; never removed
EVENTS = (
    "preemptions",
    "hits",
    "hits amid a prefix",
    "blocks that left a window",
    "evictions",
    "swapped out",
    "swapped in",
    "recomputed by choice",
    "copies",
    "forks",
    "aborts",
    "aborts of one",
    "worker errors",
)


class SchedulerMachine(RuleBasedStateMachine):
    """The same rules, in an order that Hypothesis chooses and shrinks."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.simulation = Simulation(Random(seed))

    @rule(apply=st.sampled_from(list(RULES)), seed=st.integers(0, 1000))
    def apply(self, apply: Callable[[Simulation, Random], None], seed: int) -> None:
        apply(self.simulation, Random(seed))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain(Random(0))


def test_hypothesis_finds_no_violation(count: Callable[..., int]) -> None:
    """An example has 50 steps: of the 10^5 of every run a quarter is here, the rest is the plain driver's."""
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(max_examples=count(500, full=20_000), deadline=None, report_multiple_bugs=False),
    )


def test_a_long_run_has_no_violation_and_sees_everything(count: Callable[..., int]) -> None:
    num_steps = count(75_000, full=1_000_000)
    for seed in [*FAILED_SEEDS, *range(count(1, full=20))]:
        seen = simulate(seed, num_steps)
        for what in EVENTS:
            assert seen[what] > num_steps / 500, f"{what}: hardly happened, {seen}"
        for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR):
            assert seen[reason.value] > num_steps / 500, seen


def test_one_seed_gives_one_trace() -> None:
    trace, other_trace = hashlib.sha256(), hashlib.sha256()
    simulate(7, 2_000, trace)
    simulate(8, 2_000, other_trace)
    assert trace.digest() != other_trace.digest()
    for hash_seed in ("0", "1"):  # no order of a set may show
        again = subprocess.run(
            [sys.executable, "-m", scheduler_simulation.__name__, "7", "2000"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert again.stdout.split()[0] == trace.hexdigest()
