"""A profile of an engine's steps: complete, without effect on what they compute, and gone when it is over."""

from pathlib import Path

import pytest

from fairlead import LLM, SamplingParams, StepProfile
from fairlead.errors import ConfigError
from fairlead.layers.attention import Attention
from fairlead.testing.equivalence import MODELS, make_llm, prompts_of

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
LAYERS = 2


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return make_llm(MODELS["full"](tmp_path_factory.mktemp("model")))


def tokens(llm: LLM) -> list[tuple[int, ...]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts_of(5, 9), PARAMS, use_tqdm=False)]


def test_it_counts_every_call_and_changes_nothing(llm: LLM) -> None:
    before, during = tokens(llm), []
    profile = llm.engine.profile(lambda: during.append(tokens(llm)))
    assert isinstance(profile, StepProfile)
    assert during == [before]
    assert {(p.num_rows, p.num_steps) for p in profile.by_rows} == {(14, 1), (2, 5)}
    for found in profile.by_rows:
        calls = {one.op: one.calls for one in found.ops}
        num_layers = calls["attention"]
        assert (
            calls["linear qkv_proj"] == calls["linear down_proj"] == calls["rotary_embedding"] == num_layers >= LAYERS
        )
        assert calls["between ops"] == calls["embedding"] == 1
        assert sum(one.seconds for one in found.ops) == pytest.approx(found.seconds)
    inside = sum(p.seconds * p.num_steps for p in profile.by_rows)
    assert profile.total_s == pytest.approx(inside + profile.head_s + profile.outside_s)
    assert min(profile.head_s, profile.outside_s) > 0


def test_it_leaves_nothing_behind(llm: LLM) -> None:
    runner = llm.engine._runner
    model = runner.model
    assert hasattr(model, "named_modules")

    def state() -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = [(runner.padded,)]
        for path, module in model.named_modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            functions = [id(getattr(v, "__func__", v)) for v in vars(module).values() if callable(v)]
            found.append((path, hooks, *functions))
        return found

    before = state()
    with pytest.raises(ZeroDivisionError):
        llm.engine.profile(lambda: 1 / 0)
    assert state() == before
    assert any(isinstance(module, Attention) for module in model.modules())
    assert tokens(llm) == tokens(llm)


def test_steps_that_overlap_are_refused(tmp_path: Path) -> None:
    llm = make_llm(MODELS["full"](tmp_path), async_scheduling=True)
    with pytest.raises(ConfigError, match="async_scheduling=False"):
        llm.engine.profile(lambda: None)
    llm.close()
