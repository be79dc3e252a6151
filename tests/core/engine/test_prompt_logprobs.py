"""Log-probabilities of the prompt: transformers' values, however the prompt is cut up."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fairlead import LLM, RequestOutput, SamplingParams
from fairlead.engine import model_runner
from fairlead.testing.tiny_model import write_tiny_llama

V = 128
TOLERANCE = 1e-4
PROMPTS = [[(5 * i + j * j + 3) % V for j in range(n)] for i, n in enumerate((1, 2, 15, 16, 17, 33, 90))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=5)


@pytest.fixture(scope="module")
def reference(tiny: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def run(tiny: Path, *, rounds: int = 1, n: int = 1, **settings: Any) -> tuple[LLM, list[RequestOutput]]:
    llm = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=128, block_size=16, **settings)
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=3, n=n, detokenize=False, ignore_eos=True)
    for _ in range(rounds):
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    llm.engine.scheduler.check_integrity()
    return llm, outputs


def check(model: transformers.PreTrainedModel, output: RequestOutput, num_best: int = 3) -> None:
    prompt, found = list(output.prompt_token_ids), output.prompt_logprobs
    assert found is not None
    assert len(found) == len(prompt)
    assert found[0] is None
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for i in range(1, len(prompt)):
        best, row = found[i], logprobs[i - 1]
        assert best is not None
        assert next(iter(best)) == prompt[i]
        assert set(best) == {prompt[i], *row.topk(num_best).indices.tolist()}
        for token_id, entry in best.items():
            assert entry.logprob == pytest.approx(row[token_id].item(), abs=TOLERANCE)
            assert entry.rank == 1 + (row > row[token_id]).sum().item()


def test_they_are_those_of_transformers(tiny: Path, reference: transformers.PreTrainedModel) -> None:
    for output in run(tiny)[1]:
        check(reference, output)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 16},
        {"max_num_batched_tokens": 17, "enable_prefix_caching": False},
        {"max_num_seqs": 2, "rounds": 2},
        {"rounds": 2, "n": 3},
        {"num_blocks": 9, "max_num_batched_tokens": 20},
        {"num_blocks": 9, "n": 2, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_chunks_hits_forks_and_preemptions_change_nothing(
    tiny: Path, reference: transformers.PreTrainedModel, settings: dict[str, Any]
) -> None:
    llm, outputs = run(tiny, **settings)
    for output in outputs:
        check(reference, output)
        assert output.num_cached_tokens == 0
    assert (llm.engine.stats().num_preemptions > 0) == ("num_blocks" in settings)


def test_a_preemption_amid_the_prompt_keeps_what_was_there(tiny: Path, reference: transformers.PreTrainedModel) -> None:
    """The older request needs the newer one's blocks while that is still computing its prompt."""
    llm = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=128, block_size=1, num_blocks=128)
    add = llm.engine.add_request
    old = SamplingParams(temperature=0, max_tokens=100, detokenize=False, ignore_eos=True)
    new = SamplingParams(temperature=0, max_tokens=2, detokenize=False, prompt_logprobs=3)
    llm.engine.scheduler.max_num_batched_tokens = 3
    requests = [llm._request([7, 8], old)[0], llm._request(PROMPTS[-1], new)[0]]
    for request in requests:
        add(request)
    found = []
    while llm.engine.has_work:
        found += [d for d in llm.engine.step() if d.prompt_logprobs]
    assert llm.engine.stats().num_preemptions > 0
    assert [(d.request_id, len(d.prompt_logprobs)) for d in found] == [(requests[1].request_id, 89)]
    with torch.inference_mode():
        logprobs = reference(torch.tensor([PROMPTS[-1]])).logits[0].log_softmax(-1)
    for i, entry in enumerate(found[0].prompt_logprobs, start=1):
        assert entry.token_ids[0] == PROMPTS[-1][i]
        assert entry.logprobs[0] == pytest.approx(logprobs[i - 1, entry.token_ids[0]].item(), abs=TOLERANCE)


def test_a_few_rows_of_logits_at_a_time(
    tiny: Path, reference: transformers.PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "_MAX_ROWS", 8)
    for output in run(tiny)[1]:
        check(reference, output)


def test_who_asks_for_none_gets_none_and_reads_the_cache(tiny: Path) -> None:
    llm = LLM(str(tiny), skip_tokenizer_init=True, max_model_len=128, block_size=16)
    ask = [SamplingParams(max_tokens=1, detokenize=False, prompt_logprobs=k) for k in (0, None)]
    first, second = (llm.generate([PROMPTS[-1]], params, use_tqdm=False)[0] for params in ask)
    assert first.prompt_logprobs is not None
    assert [len(best) for best in first.prompt_logprobs if best is not None] == [1] * 89
    assert second.prompt_logprobs is None
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 80)
