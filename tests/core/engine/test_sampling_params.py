"""What the sampling parameters do to whole requests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead import LLM, RequestOutput, SamplingParams
from fairlead.errors import RequestError
from fairlead.testing.tiny_model import write_tiny_llama

V = 128


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    llm = LLM("demo", dtype="float32", max_num_seqs=8, max_model_len=256)
    yield llm
    llm.engine.scheduler.check_integrity()
    assert llm.engine.stats().kv_cache_usage == 0
    llm.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=3)


def run(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    return llm.generate(prompt, SamplingParams(**{"max_tokens": 24, **params}), use_tqdm=False)[0]


def tokens(llm: LLM, prompt: Any, **params: Any) -> list[int]:
    return list(run(llm, prompt, **params).outputs[0].token_ids)


def test_penalties_thin_out_and_negative_ones_gather(demo: LLM) -> None:
    def distinct(**params: Any) -> int:
        return len(set(tokens(demo, "ROMEO:", temperature=0, max_tokens=60, ignore_eos=True, **params)))

    free = distinct()
    assert distinct(repetition_penalty=1.5) > free
    assert distinct(frequency_penalty=2.0) > free
    assert distinct(presence_penalty=2.0) > free
    assert distinct(frequency_penalty=-2.0) < free


def test_repetition_penalty_is_that_of_transformers(tiny: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    llm = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=128)
    for penalty in (0.7, 1.3, 2.5):
        prompt = [5, 9, 5, 17, 100]
        found = tokens(llm, [prompt], temperature=0, repetition_penalty=penalty, max_tokens=40, detokenize=False)
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, repetition_penalty=penalty, max_new_tokens=40, pad_token_id=0
        )
        assert found == expected[0, len(prompt) :].tolist()


def test_allowed_ids_and_a_bias_decide(demo: LLM) -> None:
    allowed = [40, 41, 42, 43]
    assert set(tokens(demo, "ROMEO:", allowed_token_ids=allowed, seed=1)) <= set(allowed)
    assert set(tokens(demo, "ROMEO:", logit_bias={50: 100}, temperature=0)) == {50}
    assert 50 not in tokens(demo, "ROMEO:", logit_bias={50: -100}, temperature=2.0, seed=4)


def test_min_tokens_holds_off_every_kind_of_end(demo: LLM) -> None:
    (end, *_) = demo.front_end.eos_token_ids
    early = run(demo, "ROMEO:", temperature=0, logit_bias={end: 100}).outputs[0]
    assert (list(early.token_ids), early.finish_reason) == ([end], "stop")
    for settings in ({}, {"stop_token_ids": [50]}):
        bias = {50 if settings else end: 100}
        late = run(demo, "ROMEO:", temperature=0, logit_bias=bias, min_tokens=7, **settings).outputs[0]
        assert (len(late.token_ids), late.finish_reason) == (8, "stop")
    free = run(demo, "ROMEO:", temperature=0).outputs[0]
    stop = free.text[2]
    cut = run(demo, "ROMEO:", temperature=0, min_tokens=12, stop=stop).outputs[0]
    assert len(cut.token_ids) > 12
    assert list(cut.token_ids) == list(free.token_ids[: len(cut.token_ids)])
    assert stop in cut.text


def test_bad_words_are_never_written_and_their_parts_are(demo: LLM) -> None:
    free = run(demo, "ROMEO:", temperature=0, max_tokens=60).outputs[0].text
    words = sorted({word.strip(",.:;?!'") for word in free.split()}, key=len)[-3:]
    found = run(demo, "ROMEO:", temperature=0, max_tokens=60, bad_words=words).outputs[0]
    spelt = demo.front_end._spellings(words)
    ids = tuple(found.token_ids)
    assert all(ids[i : i + len(word)] != word for word in spelt for i in range(len(ids)))
    assert found.text != free
    one_token = [word for word in spelt if len(word) == 1]
    assert not {word[0] for word in one_token} & set(ids)


def test_bad_words_need_a_tokenizer(tiny: Path) -> None:
    llm = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=64)
    with pytest.raises(RequestError, match="bad_words need a tokenizer"):
        run(llm, [[1, 2]], bad_words=["x"])


def test_a_callable_processor_sees_prompt_and_output(demo: LLM) -> None:
    seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def count_up(logits_V: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
        seen.append((prompt, output))
        return torch.full_like(logits_V, -torch.inf).index_fill_(0, torch.tensor(60 + len(output)), 0.0)

    output = run(demo, [[7, 8, 9]], logits_processors=[count_up], max_tokens=4)
    assert list(output.outputs[0].token_ids) == [60, 61, 62, 63]
    assert seen == [((7, 8, 9), tuple(range(60, 60 + i))) for i in range(4)]


def test_a_processor_that_fails_ends_its_request_alone(demo: LLM) -> None:
    def fail(logits_V: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
        raise KeyError("nothing there") if output else ValueError("no")

    params = [SamplingParams(logits_processors=(fail,)), SamplingParams(temperature=0, max_tokens=5)]
    bad, good = demo.generate(["ROMEO:", "JULIET:"], params, use_tqdm=False)
    assert bad.outputs[0].finish_reason == "error"
    assert bad.error is not None
    assert "raised ValueError: no" in bad.error
    assert (len(good.outputs[0].token_ids), good.error) == (5, None)
    with pytest.raises(RequestError, match="no logits processor 'missing'"):
        run(demo, "ROMEO:", logits_processors=["missing"])
    assert not demo.engine.has_work


def test_best_of_gives_the_n_most_likely(demo: LLM) -> None:
    for seed in range(3):
        shared: dict[str, Any] = {"temperature": 1.2, "seed": seed, "max_tokens": 12, "stop": ["the", "e "]}
        every = run(demo, "The king", n=6, logprobs=0, **shared).outputs
        ranked = sorted(every, key=lambda o: -(o.cumulative_logprob or 0))
        for settings in ({}, {"logprobs": 2}):
            found = run(demo, "The king", n=2, best_of=6, **shared, **settings)
            assert [o.token_ids for o in found.outputs] == [o.token_ids for o in ranked[:2]]
            assert [o.text for o in found.outputs] == [o.text for o in ranked[:2]]
            assert [o.index for o in found.outputs] == [0, 1]
            assert [o.logprobs is None for o in found.outputs] == [not settings] * 2
            expected = [o.cumulative_logprob for o in ranked[:2]]
            assert [o.cumulative_logprob for o in found.outputs] == pytest.approx(expected)
    streamed = list(demo.generate_stream("The king", SamplingParams(best_of=3, seed=1, max_tokens=4)))
    assert [(o.finished, len(o.outputs)) for o in streamed] == [(True, 1)]
    with pytest.raises(RequestError, match="best_of=9 exceeds max_num_seqs=8"):
        run(demo, "The king", best_of=9)


def test_truncation_keeps_the_end_of_the_prompt(demo: LLM) -> None:
    prompt = list(range(20, 60))
    output = run(demo, [prompt], truncate_prompt_tokens=7, temperature=0)
    assert list(output.prompt_token_ids) == prompt[-7:]
    assert list(output.outputs[0].token_ids) == tokens(demo, [prompt[-7:]], temperature=0)
    assert len(run(demo, [prompt * 10], truncate_prompt_tokens=-1, max_tokens=6).prompt_token_ids) == 250
    assert len(run(demo, [prompt * 10], truncate_prompt_tokens=-1, max_tokens=None).prompt_token_ids) == 255
