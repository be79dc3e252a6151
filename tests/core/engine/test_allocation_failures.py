"""R10: memory runs out at the k-th allocation, while an engine is built and while it runs; nothing is left half done.

Every operator of torch counts as an allocation, since any of them may be one; so do the calls of the platform's
allocator, apart. Quick runs take every 23rd k, full ones all from 1 to 500.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairlead import LLM
from fairlead.config import EngineConfig
from fairlead.engine import planner
from fairlead.engine.engine import EngineCore
from fairlead.errors import FairleadError, ModelMemoryError
from fairlead.interface import MemoryAllocator
from fairlead.request import Request, SamplingParams
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu import plugin
from fairlead_cpu.platform import CpuPlatform

LAST = 500
PROMPTS = {f"r{i}": tuple((7 * i + 3 * j) % 90 for j in range(5 + 9 * i)) for i in range(4)}
_OPS = ("linear", "embedding", "rms_norm", "fused_add_rms_norm", "rotary_embedding", "silu_and_mul")
SETTINGS: dict[str, Any] = {
    "block_size": 8,
    "num_blocks": 40,
    "max_model_len": 64,
    "max_num_batched_tokens": 32,
    # Of torch's operators the fault injection sees all allocations; native kernels' are few.
    "attention_backend": "sdpa",
    "op_providers": [f"{op}=reference" for op in _OPS],
}


class FailingOps(TorchDispatchMode):
    """Raises MemoryError in place of the k-th operator."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.num_calls = k, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        if self.num_calls == self.k:
            raise MemoryError(f"cannot allocate the result of {func}")
        return func(*args, **(kwargs or {}))


class FailingAllocator:
    """A platform's allocator whose k-th call fails."""

    k = 0

    def __init__(self, inner: MemoryAllocator) -> None:
        self.inner, self.num_calls = inner, 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, tag: str) -> torch.Tensor:
        self.num_calls += 1
        if self.num_calls == self.k:
            raise MemoryError(f"cannot allocate {shape}")
        return self.inner.empty(shape, dtype, tag=tag)

    def allocated_bytes(self, tag: str) -> int:
        return self.inner.allocated_bytes(tag)


@pytest.fixture
def platforms(monkeypatch: pytest.MonkeyPatch) -> list[CpuPlatform]:
    """The platforms that engines of this test were made on, each with a FailingAllocator."""
    made: list[CpuPlatform] = []

    def create(record: object, device: object) -> CpuPlatform:
        platform = CpuPlatform(plugin.probe()[0])  # type: ignore[arg-type]
        platform.allocator = FailingAllocator(platform.allocator)
        made.append(platform)
        return platform

    monkeypatch.setattr(planner.plugins, "create", create)
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture
def points(count: Callable[..., int]) -> range:
    return range(1, LAST + 1, count(23, full=1))


def allocated(platform: CpuPlatform) -> int:
    gc.collect()
    return sum(platform.allocator.allocated_bytes(tag) for tag in ("weights", "kv_cache"))


@contextmanager
def failing_steps(engine: EngineCore, ops: FailingOps) -> Iterator[FailingOps]:
    """The operators of steps fail, in whichever thread they run; modes are a thread's own."""
    runner, names = engine._runner, ("prepare", "forward", "sample")

    def within(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with ops:
                return method(*args)

        return call

    for name in names:
        setattr(runner, name, within(getattr(runner, name)))
    try:
        yield ops
    finally:
        for name in names:
            delattr(runner, name)


def run(engine: EngineCore, prefix: str = "") -> dict[str, list[int]]:
    """The tokens of every prompt, all at once; one with several samples, one with penalties and log-probabilities."""
    params: dict[str, dict[str, Any]] = {
        "r1": {"n": 2, "temperature": 1.0, "seed": 5},
        "r2": {"presence_penalty": 0.5, "logprobs": 2},
        "r3": {"prompt_logprobs": 1},
    }
    found: dict[str, list[int]] = {}
    for name, prompt in PROMPTS.items():
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **params.get(name, {})})
        engine.add_request(Request(request_id=prefix + name, prompt_token_ids=prompt, params=sampling))
    while engine.has_work:
        for delta in engine.step():
            found.setdefault(f"{delta.request_id.removeprefix(prefix)}.{delta.index}", []).extend(delta.token_ids)
        engine.scheduler.check_integrity()
    return found


def check_idle(engine: EngineCore) -> None:
    engine.scheduler.check_integrity()
    stats = engine.stats()
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage) == (0, 0, 0.0)


@pytest.fixture(params=[False, True], ids=["one step at a time", "asynchronous"])
def engine(request: pytest.FixtureRequest, model: Path, platforms: list[CpuPlatform]) -> Iterator[EngineCore]:
    engine = EngineCore(EngineConfig.of(model=str(model), async_scheduling=request.param, **SETTINGS))
    yield engine
    engine.close()


def test_memory_that_runs_out_in_a_step_ends_its_requests_and_no_more(engine: EngineCore, points: range) -> None:
    expected = run(engine)
    engine.reset_prefix_cache()
    with failing_steps(engine, FailingOps(0)) as counting:
        assert run(engine) == expected
    assert counting.num_calls > LAST
    for k in points:
        engine.reset_prefix_cache()
        failure = pytest.raises(MemoryError, match="cannot allocate the result of")
        with failing_steps(engine, FailingOps(k)), failure:
            run(engine, f"{k}.")
        check_idle(engine)
        assert run(engine, f"{k}.") == expected, "the ids are free again, and nothing of the failed step is reused"


def build_fails(model: Path, platforms: list[CpuPlatform], **settings: Any) -> str:
    """The one line that a build fails with; it leaves nothing."""
    with pytest.raises(FairleadError) as raised:
        EngineCore(EngineConfig.of(model=str(model), **settings))
    message = str(raised.value)
    assert isinstance(raised.value, ModelMemoryError)
    assert message.startswith(f"memory ran out while '{model}' was loaded: cannot allocate ")
    assert "\n" not in message
    del raised
    assert all(allocated(platform) == 0 for platform in platforms[-1:])
    return message


def test_memory_that_runs_out_in_an_operator_of_the_build(
    model: Path, platforms: list[CpuPlatform], points: range
) -> None:
    """Of dummy weights, since safetensors does not read under a dispatch mode; the cache is sized by a profile."""
    settings = {"max_model_len": 64, "max_num_batched_tokens": 32, "max_num_seqs": 4, "load_format": "dummy"}
    counting = FailingOps(0)
    with counting:
        EngineCore(EngineConfig.of(model=str(model), **settings)).close()
    assert counting.num_calls > 300
    for k in range(1, counting.num_calls + 1, points.step):
        with FailingOps(k):
            build_fails(model, platforms, **settings)
    engine = EngineCore(EngineConfig.of(model=str(model), **settings))
    assert len(run(engine)) == len(PROMPTS) + 1
    engine.close()


def test_memory_that_runs_out_in_the_allocator(
    model: Path, platforms: list[CpuPlatform], monkeypatch: pytest.MonkeyPatch, count: Callable[..., int]
) -> None:
    """At every call that a build makes, of which there are fewer than 500."""
    EngineCore(EngineConfig.of(model=str(model), **SETTINGS)).close()
    allocator = platforms[-1].allocator
    assert isinstance(allocator, FailingAllocator)
    num_calls = allocator.num_calls
    assert num_calls > 10
    for k in range(1, num_calls + 1, count(8, full=1)):
        monkeypatch.setattr(FailingAllocator, "k", k)
        build_fails(model, platforms, **SETTINGS)


def test_an_llm_answers_the_next_prompt(model: Path, platforms: list[CpuPlatform], points: range) -> None:
    llm = LLM(str(model), skip_tokenizer_init=True, **SETTINGS)
    params = SamplingParams(temperature=0.0, max_tokens=6)
    prompts = [list(prompt) for prompt in PROMPTS.values()]

    def answers() -> list[list[int]]:
        return [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False)]

    expected = answers()
    for k in points[::4]:
        llm.reset_prefix_cache()
        with failing_steps(llm.engine, FailingOps(k)), pytest.raises(MemoryError):
            answers()
        check_idle(llm.engine)
        assert answers() == expected
    llm.close()
