"""N2 on the CPU: a request gives the same bits alone and in any batch, whatever its chunks."""

import pytest

from fairlead import LLM, RequestOutput, SamplingParams, demo
from fairlead_cpu import native

pytestmark = pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels")


def bits(output: RequestOutput) -> list[tuple[int, list[tuple[int, float]]]]:
    """The sampled tokens, each with the log-probabilities that were reported with it."""
    completion = output.outputs[0]
    assert completion.logprobs is not None
    reported = [sorted((token, float(entry.logprob)) for token, entry in row.items()) for row in completion.logprobs]
    return list(zip(completion.token_ids, reported, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_request_has_the_same_bits_alone_and_in_any_batch(dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=8, detokenize=False)
    prompts = [{"prompt_token_ids": [(7 * i + 3 * j) % 256 for j in range(4 + 23 * i)]} for i in range(9)]

    def run(batch: list[dict[str, list[int]]], **settings: int) -> list[list[tuple[int, list[tuple[int, float]]]]]:
        llm = LLM(str(demo.path()), dtype=dtype, enable_prefix_caching=False, num_blocks=400, **settings)
        assert llm.engine.stats().num_preemptions == 0
        found = [bits(output) for output in llm.generate(batch, params, use_tqdm=False)]
        llm.close()
        return found

    together = run(prompts)
    assert run(prompts, max_num_batched_tokens=37, max_num_seqs=5) == together
    for i in (0, 4, 8):
        assert run(prompts[i : i + 1]) == [together[i]]
