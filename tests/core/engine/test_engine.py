"""The engine under faults of its platform and of its numbers: one request's fault stays its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead.config import EngineConfig
from fairlead.engine.engine import EngineCore
from fairlead.request import FinishReason, Request, SamplingParams, SequenceDelta
from fairlead.testing.tiny_model import write_tiny_llama

NAN_TOKEN = 99
MAX_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives NaN for every sequence that holds token 99."""
    directory = write_tiny_llama(tmp_path_factory.mktemp("model"), seed=1)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    tensors["lm_head.weight"][NAN_TOKEN] = 0.0  # so that the token is never the best one
    save_file(tensors, directory / "model.safetensors")
    return directory


def make_engine(model: Path, **settings: Any) -> EngineCore:
    return EngineCore(EngineConfig.of(model=str(model), **{"num_blocks": 200, "block_size": 8, **settings}))


@pytest.fixture
def engine(model: Path) -> Iterator[EngineCore]:
    engine = make_engine(model)
    yield engine
    engine.close()


def request(request_id: str, prompt: list[int], **params: Any) -> Request:
    settings = {"temperature": 0.0, "max_tokens": MAX_TOKENS, **params}
    return Request(request_id=request_id, prompt_token_ids=tuple(prompt), params=SamplingParams(**settings))


def prompts(number: int) -> dict[str, list[int]]:
    return {f"r{i}": [(7 * i + 3 * j) % 90 for j in range(5 + 6 * i)] for i in range(number)}


def run(engine: EngineCore) -> dict[str, list[SequenceDelta]]:
    """Steps until there is no work; the deltas by request."""
    deltas: dict[str, list[SequenceDelta]] = {}
    while engine.has_work:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        engine.scheduler.check_integrity()
    return deltas


def tokens(deltas: list[SequenceDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def generate(engine: EngineCore, wanted: dict[str, list[int]], **params: Any) -> dict[str, list[int]]:
    for request_id, prompt in wanted.items():
        engine.add_request(request(request_id, prompt, **params))
    return {request_id: tokens(deltas) for request_id, deltas in run(engine).items()}


def check_idle(engine: EngineCore) -> None:
    engine.scheduler.check_integrity()
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage) == (0, 0, 0.0)


def test_outputs_vary_with_the_prompt_and_along_the_way(engine: EngineCore) -> None:
    """Near-uniform logits would hide every fault below."""
    found = generate(engine, prompts(6))
    assert len({tuple(t) for t in found.values()}) == 6
    assert sum(len(set(t)) for t in found.values()) > 6 * MAX_TOKENS / 2


class FaultError(Exception):
    """What the platform raises."""


def fail_at(engine: EngineCore, method: str, call: int, error: BaseException) -> Callable[[], None]:
    """Makes the k-th call of a method of the attention backend raise; returns what undoes it."""
    backend = engine._runner.backends[0]
    original = getattr(backend, method)
    calls = iter(range(1, 10**9))

    def failing(*args: Any) -> object:
        if next(calls) == call:
            raise error
        return original(*args)

    setattr(backend, method, failing)
    return lambda: delattr(backend, method)


@pytest.mark.parametrize("error", [FaultError("out of order"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("method", "call"), [("plan", 1), ("plan", 2), ("plan", 7), ("forward", 1), ("forward", 6)])
def test_a_platform_that_raises_ends_every_request(
    engine: EngineCore, method: str, call: int, error: BaseException
) -> None:
    expected = generate(engine, prompts(5))
    engine.reset_prefix_cache()
    undo = fail_at(engine, method, call, error)
    for request_id, prompt in prompts(5).items():
        engine.add_request(request(request_id, prompt))
    engine.add_request(request("many", [5, 6, 7], n=3, temperature=1.0))
    with pytest.raises(type(error)) as raised:
        run(engine)
    assert raised.value is error
    check_idle(engine)
    undo()
    assert generate(engine, prompts(5)) == expected, "the cache held something of the failed step"
    check_idle(engine)


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 4}, {"enable_prefix_caching": False}], ids=str)
def test_nan_fails_one_request_and_no_neighbour(model: Path, settings: dict[str, Any]) -> None:
    engine = make_engine(model, **settings)
    healthy = generate(engine, prompts(5))
    engine.reset_prefix_cache()
    bad = {"bad": [1, 2, NAN_TOKEN, 3], "worse": [NAN_TOKEN, *prompts(5)["r3"]]}
    mixed = {"r0": prompts(5)["r0"], **bad, **prompts(5)}
    for request_id, prompt in mixed.items():
        engine.add_request(request(request_id, prompt))
    deltas = run(engine)
    for request_id in bad:
        assert tokens(deltas[request_id]) == []
        last = deltas[request_id][-1]
        assert last.finish_reason is FinishReason.ERROR
        assert last.error is not None
        assert "not a number" in last.error
    assert {request_id: tokens(deltas[request_id]) for request_id in healthy} == healthy
    assert engine.stats().num_nan_sequences == 2
    check_idle(engine)
    assert generate(engine, prompts(5)) == healthy, "NaN was left in a block"
    assert engine.stats().num_nan_sequences == 2


def test_nan_leaves_nothing_in_the_prefix_cache(model: Path) -> None:
    engine = make_engine(model)
    healthy = generate(engine, prompts(5))
    engine.reset_prefix_cache()
    assert generate(engine, {"bad": [*prompts(5)["r3"], NAN_TOKEN]}) == {"bad": []}
    assert generate(engine, prompts(5)) == healthy


def test_nan_in_a_block_that_is_shared_in_the_same_step(model: Path) -> None:
    engine = make_engine(model)
    prompt = prompts(5)["r3"]
    healthy = generate(engine, {"good": prompt})
    engine.reset_prefix_cache()
    found = generate(engine, {"bad": [*prompt, NAN_TOKEN], "good": prompt})
    assert found == {"bad": [], **healthy}


def test_nan_in_the_middle_of_an_answer(model: Path) -> None:
    """A request that samples the NaN token fails in the step after, with the tokens it has."""
    engine = make_engine(model)
    engine.add_request(request("bad", [4, 5, 6], temperature=1e30, seed=0, max_tokens=500, logprobs=2))
    engine.add_request(request("good", [4, 5, 6]))
    deltas = run(engine)
    assert deltas["bad"][-1].finish_reason is FinishReason.ERROR
    assert tokens(deltas["bad"])[-1] == NAN_TOKEN
    assert NAN_TOKEN not in tokens(deltas["bad"])[:-1]
    assert tokens(deltas["good"]) == generate(make_engine(model), {"good": [4, 5, 6]})["good"]
    check_idle(engine)


def test_a_request_id_in_use_is_refused(engine: EngineCore) -> None:
    engine.add_request(request("a", [1, 2]))
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.add_request(request("a", [3]))
    assert list(run(engine)) == ["a"]
    engine.add_request(request("a", [3]))
    run(engine)


def test_a_closed_engine_holds_no_request(model: Path) -> None:
    engine = make_engine(model)
    engine.add_request(request("a", [1, 2]))
    engine.step()
    engine.close()
    check_idle(engine)
