"""Beam search equals transformers' token for token, in float32, and leaves the engine as it was."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fairlead import LLM, RequestOutput, SamplingParams, demo
from fairlead.engine.beam_search import BeamSearch
from fairlead.request import Request, TokenLogprobs
from fairlead.testing.tiny_model import write_tiny_llama

V = 128
ENDS = list(range(2, V, 8))  # so many that searches end at all lengths
PROMPTS = [[(5 * i + j * j + 3) % V for j in range(n)] for i, n in enumerate((1, 15, 16, 33))]
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
EARLY: tuple[bool | str, ...] = (True, False, "never")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=7)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    llm = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=128, block_size=16)
    yield llm
    assert_idle(llm)
    llm.close()


def assert_idle(llm: LLM) -> None:
    assert not llm.engine.has_work
    assert not llm.engine._beams
    assert llm.engine._beams._owners == {}
    assert llm.engine.stats().kv_cache_usage == 0
    llm.engine.scheduler.check_integrity()


def beams(**settings: Any) -> SamplingParams:
    asked = {"temperature": 0, "use_beam_search": True, "max_tokens": 14, "detokenize": False, **settings}
    return SamplingParams(**asked)


def expected(
    model: transformers.PreTrainedModel, prompt: list[int], params: SamplingParams, **settings: Any
) -> tuple[list[list[int]], list[float]]:
    """The sequences of transformers, cut behind their end, and their scores."""
    ends = settings.pop("eos_token_id", list(params.stop_token_ids) or None)
    with torch.inference_mode():
        found = model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            num_beams=params.beam_width,
            num_return_sequences=params.n,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            max_new_tokens=params.max_tokens,
            eos_token_id=ends,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
    sequences = []
    for row in found.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in (ends or ())), len(row))
        sequences.append(row[:end])
    return sequences, found.sequences_scores.tolist()


def check(model: transformers.PreTrainedModel, output: RequestOutput, params: SamplingParams, **settings: Any) -> None:
    sequences, scores = expected(model, list(output.prompt_token_ids), params, **settings)
    assert [list(o.token_ids) for o in output.outputs] == sequences
    for one, score in zip(output.outputs, scores, strict=True):
        assert one.cumulative_logprob is not None
        length = len(one.token_ids) ** params.length_penalty
        assert one.cumulative_logprob / length == pytest.approx(score, rel=1e-4)
        assert one.finish_reason == ("stop" if one.token_ids[-1] in params.stop_token_ids else "length")
        assert one.stop_reason == (one.token_ids[-1] if one.finish_reason == "stop" else None)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("early", EARLY)
def test_beams_are_those_of_transformers(
    llm: LLM, reference: transformers.PreTrainedModel, width: int, early: bool | str
) -> None:
    asked = [
        (prompt, beams(best_of=width, n=n, length_penalty=penalty, early_stopping=early, stop_token_ids=ends))
        for i, (prompt, penalty) in enumerate(itertools.product(PROMPTS, PENALTIES))
        for n, ends in [((1, width)[i % 2], ENDS[: (0, 3, 8, 16)[(i + i // 4) % 4]])]
    ]
    outputs = llm.generate([p for p, _ in asked], [params for _, params in asked], use_tqdm=False)
    for output, (_, params) in zip(outputs, asked, strict=True):
        check(reference, output, params)
    lengths = {len(o.token_ids) for output in outputs for o in output.outputs}
    assert len(lengths) > 4  # or the ends would mean nothing


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_prefix_caching": False},
        {"num_blocks": 8},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": 5, "enable_prefix_caching": False},
        {"block_size": 1},
    ],
    ids=str,
)
def test_the_same_without_cache_memory_seats_or_budget(
    tiny: Path, reference: transformers.PreTrainedModel, settings: dict[str, Any]
) -> None:
    tight = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=128, **{"block_size": 16, **settings})
    params = beams(best_of=4, n=2, stop_token_ids=ENDS[:8], max_tokens=10)
    for output in tight.generate(PROMPTS, params, use_tqdm=False):
        check(reference, output, params)
    assert_idle(tight)


def test_beams_of_the_demo_with_its_own_end() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()
    llm = LLM("demo", dtype="float32", max_model_len=256)
    params = beams(n=3, max_tokens=16, detokenize=True)
    output = llm.generate("ROMEO:", params, use_tqdm=False)[0]
    eos = list(llm.front_end.eos_token_ids)
    sequences, _ = expected(model, list(output.prompt_token_ids), params, eos_token_id=eos)
    assert [list(o.token_ids) for o in output.outputs] == sequences
    assert all(o.text and llm.get_tokenizer().decode(list(o.token_ids)).endswith(o.text) for o in output.outputs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"min_tokens": 6}, {"min_new_tokens": 6}),
        ({"logit_bias": {5: -100, 6: 3.0}}, {"sequence_bias": {(5,): -100.0, (6,): 3.0}}),
    ],
    ids=["repetition", "min_tokens", "bias"],
)
def test_edits_come_upon_log_probabilities(
    llm: LLM, reference: transformers.PreTrainedModel, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    params = beams(best_of=3, n=2, stop_token_ids=ENDS, **ours)
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        check(reference, output, params, **theirs)


def test_other_requests_share_the_engine(llm: LLM, reference: transformers.PreTrainedModel) -> None:
    plain = SamplingParams(seed=5, max_tokens=20, detokenize=False, repetition_penalty=1.2)
    alone = llm.generate([PROMPTS[1]], plain, use_tqdm=False)[0].outputs[0].token_ids
    params = [beams(n=3), plain, beams(n=2, best_of=4)]
    outputs = llm.generate([PROMPTS[2], PROMPTS[1], PROMPTS[3]], params, use_tqdm=False)
    assert outputs[1].outputs[0].token_ids == alone
    check(reference, outputs[0], params[0])
    check(reference, outputs[2], params[2])


def test_logprobs_and_prompt_logprobs_come_along(llm: LLM) -> None:
    output = llm.generate([PROMPTS[2]], beams(n=2, logprobs=2, prompt_logprobs=0), use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(PROMPTS[2])
    for one in output.outputs:
        assert one.logprobs is not None
        assert all(token_id in best for token_id, best in zip(one.token_ids, one.logprobs, strict=True))
        total = sum(best[token_id].logprob for token_id, best in zip(one.token_ids, one.logprobs, strict=True))
        assert one.cumulative_logprob == pytest.approx(total)
    streamed = list(llm.generate_stream({"prompt_token_ids": PROMPTS[2]}, beams(n=2)))
    assert [[list(o.token_ids) for o in s.outputs] for s in streamed] == [[list(o.token_ids) for o in output.outputs]]


def test_the_context_ends_a_search(llm: LLM) -> None:
    prompt = [j % V for j in range(120)]
    output = llm.generate([prompt], beams(n=2, max_tokens=None), use_tqdm=False)[0]
    assert [(len(o.token_ids), o.finish_reason) for o in output.outputs] == [(8, "length")] * 2


def test_an_aborted_search_leaves_nothing(llm: LLM) -> None:
    request, _ = llm._request(PROMPTS[3], beams(n=3))
    llm.engine.add_request(request)
    with pytest.raises(ValueError, match="is in use"):
        llm.engine.add_request(request)
    for _ in range(4):
        assert llm.engine.step() == []
    assert llm.engine.stats().num_requests_waiting == 3  # one sequence per beam
    llm.engine.abort(request.request_id)
    assert_idle(llm)


def test_a_failing_step_ends_searches_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prepared: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._runner, "forward", fail)
        with pytest.raises(OSError, match="gone"):
            llm.generate([PROMPTS[1]], beams(n=2), use_tqdm=False)
    assert_idle(llm)


def test_a_search_that_the_masks_leave_too_few_sequences_says_so(llm: LLM) -> None:
    params = [beams(n=2, allowed_token_ids=[5]), beams(n=2, allowed_token_ids=[3], stop_token_ids=[3], min_tokens=2)]
    one, none = llm.generate([PROMPTS[1], PROMPTS[1]], params, use_tqdm=False)
    assert one.error == "the beam search ended with 1 sequences of the n=2 asked for"
    assert none.error is not None
    assert "no token is left" in none.error
    assert [o.finish_reason for o in (*one.outputs, *none.outputs)] == ["error"] * 4


def test_so_many_candidates_that_ends_leave_enough_beams() -> None:
    params = beams(n=2, stop_token_ids=(3, 4))
    request = Request(request_id="r", prompt_token_ids=(1,), params=params, eos_token_ids=(4, 5))
    assert BeamSearch(request, 100).num_candidates == 8
    best = TokenLogprobs(token_ids=(3, 4, 5, 8, 9, 7, 6), logprobs=tuple(-0.1 * i for i in range(7)), rank=1)
    search = BeamSearch(request, 100)
    search.advance([best])
    assert [beam.tokens for _, beam in search.best] == [(3,), (4,)]
    search = BeamSearch(Request(request_id="r", prompt_token_ids=(1,), params=beams(n=2, stop_token_ids=(3,))), 100)
    search.advance([best])
    assert [beam.tokens for beam in search.running] == [(4,), (5,)]


def test_scores_add_up_in_float32() -> None:
    request = Request(request_id="r", prompt_token_ids=(1,), params=beams(n=2, max_tokens=3))
    search = BeamSearch(request, 100)
    best = TokenLogprobs(token_ids=(8, 9, 7, 6), logprobs=(-0.1, -0.2, -float("inf"), -float("inf")), rank=1)
    search.advance([best])
    assert [(b.tokens, b.score.dtype) for b in search.running] == [((8,), "float32"), ((9,), "float32")]
    search.advance([best, best])
    assert [b.tokens for b in search.running] == [(8, 8), (8, 9)]  # of equal scores, the first beam's
    search.advance([best, best])
    assert search.running == []
    assert [beam.tokens for _, beam in search.best] == [(8, 8, 8), (8, 8, 9)]
