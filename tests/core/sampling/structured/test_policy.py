"""Requests are held until their grammar is there, and what happens to them meanwhile."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairlead import LLM, SamplingParams, StructuredOutputParams
from fairlead.config import EngineConfig
from fairlead.engine.engine import EngineCore
from fairlead.errors import RequestError
from fairlead.request import FinishReason, Request, SequenceDelta
from fairlead.sampling.sampler import SamplingBatch, sample
from fairlead.sampling.structured.llguidance_backend import LLGuidanceMatcher
from fairlead.sampling.structured.policy import StructuredOutputs
from fairlead.scheduling.batch import ScheduledChunk

TIMEOUT_S = 30


@pytest.fixture
def engine(model_dir: Path) -> Iterator[EngineCore]:
    config = EngineConfig.of(
        model=str(model_dir), structured_outputs_backend="llguidance", max_num_seqs=4, max_model_len=64
    )
    made = EngineCore(config)
    yield made
    assert made._structured._grammars == made._structured._places == {}
    made.close()


def request(request_id: str, *, n: int = 1, **spec: Any) -> Request:
    params = SamplingParams(max_tokens=20, seed=1, n=n, structured_outputs=StructuredOutputParams(**spec))
    return Request(request_id=request_id, prompt_token_ids=(40, 41), params=params, eos_token_ids=(3,))


def run(engine: EngineCore, until: Callable[[], bool] = lambda: False) -> list[SequenceDelta]:
    deltas: list[SequenceDelta] = []
    deadline = time.monotonic() + TIMEOUT_S
    while engine.has_work and not until():
        assert time.monotonic() < deadline
        deltas += engine.step()
    return deltas


def test_a_request_is_held_and_then_runs(engine: EngineCore) -> None:
    engine.add_request(request("a", regex="[a-z]{4}"))
    assert engine.has_work
    assert not engine.scheduler.has_work
    assert engine.stats().num_requests_waiting == 1
    deltas = run(engine)
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason is None
    assert engine.take_rejected() == []


def test_a_bad_one_is_rejected_while_others_run(engine: EngineCore) -> None:
    engine.add_request(request("bad", regex="(a"))
    engine.add_request(request("good", regex="[a-z]{4}"))
    deltas = run(engine)
    assert {d.request_id for d in deltas} == {"good"}
    [(request_id, error)] = engine.take_rejected()
    assert request_id == "bad"
    assert isinstance(error, RequestError)
    assert engine.take_rejected() == []


def test_one_without_a_grammar_does_not_wait_for_one_with(engine: EngineCore) -> None:
    engine.add_request(request("slow", json={"enum": [f"v {i}" for i in range(4000)]}))
    free = Request(request_id="free", prompt_token_ids=(40,), params=SamplingParams(max_tokens=3, ignore_eos=True))
    engine.add_request(free)
    assert engine.step() + engine.step() != []
    assert engine.stats().num_requests_waiting == 1
    run(engine)


def test_an_abort_while_held_is_final(engine: EngineCore) -> None:
    engine.add_request(request("a", json={"enum": [f"v {i}" for i in range(4000)]}))
    engine.abort("a")
    assert not engine.has_work
    engine.add_request(request("a", regex="[a-z]{4}"))
    assert {d.request_id for d in run(engine)} == {"a"}


def test_an_abort_while_running_lets_go(engine: EngineCore) -> None:
    engine.add_request(request("a", n=2, regex="[a-z]{15}"))
    run(engine, until=lambda: len(engine._structured._places) == 2)
    engine.abort("a", 1)
    assert len(engine._structured._places) == 1
    engine.abort("a")
    assert run(engine) == []


def test_an_id_is_used_once_at_a_time(engine: EngineCore) -> None:
    engine.add_request(request("a", regex="[a-z]{4}"))
    with pytest.raises(ValueError, match="in use"):
        engine.add_request(request("a", regex="[a-z]{4}"))
    run(engine)


def test_more_requests_than_grammars_may_be_held(engine: EngineCore) -> None:
    for i in range(20):
        engine.add_request(request(str(i), regex=f"[a-z]{{4}}{i}"))
    most = 0
    while engine.has_work:
        engine.step()
        most = max(most, len(engine._structured._grammars))
    assert 0 < most <= 8


def test_a_failing_step_ends_held_requests_too(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request(request("a", regex="[a-z]{15}"))
    run(engine, until=lambda: engine.scheduler.has_work)
    engine.add_request(request("b", regex="[a-z]{15}x"))
    monkeypatch.setattr(engine._runner, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(engine)
    assert not engine.has_work


class PanicError(BaseException):
    """What a library's panic looks like."""


@pytest.mark.parametrize("name", ["fill_bitmask", "accept"])
def test_a_library_that_fails_ends_one_sequence(engine: EngineCore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_: object) -> None:
        raise PanicError("no more") if name == "fill_bitmask" else RuntimeError("no more")

    engine.add_request(request("a", regex="[a-z]{4}"))
    free = Request(request_id="free", prompt_token_ids=(40,), params=SamplingParams(max_tokens=9, ignore_eos=True))
    engine.add_request(free)
    monkeypatch.setattr(LLGuidanceMatcher, name, fail)
    ends = {d.request_id: d for d in run(engine) if d.finish_reason is not None}
    assert ends["a"].error == "the grammar cannot go on: no more"
    assert ends["free"].finish_reason is FinishReason.LENGTH


def test_a_grammar_that_no_token_continues_is_an_error(engine: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LLGuidanceMatcher, "fill_bitmask", lambda _, row_W: row_W.fill(0))
    engine.add_request(request("a", regex="[a-z]{4}"))
    assert "no token" in str(run(engine)[-1].error)


def test_without_grammars_the_policy_does_nothing(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("llguidance")
    monkeypatch.setattr(StructuredOutputs, "_place", lambda *_: pytest.fail("it looked at a row"))
    llm.generate(["Hi"], SamplingParams(max_tokens=4), use_tqdm=False)
    assert llm.engine._structured._filler is None
    llm.close()


def test_a_nan_that_the_grammar_forbids_is_still_one() -> None:
    params = SamplingParams(temperature=0)
    chunk = ScheduledChunk(seq_id=0, token_ids=(1,), start=0, block_tables=(), params=params, sample_seed=0, position=0)
    logits = torch.from_numpy(np.array([[1.0, np.nan, 0.5], [1.0, 2.0, 0.5]], np.float32))
    allowed = logits.clone()
    allowed[:, 1] = -torch.inf
    found, _ = sample(logits, SamplingBatch.of([chunk, chunk]), allowed)
    assert [token.token_id for token in found] == [None, 0]
