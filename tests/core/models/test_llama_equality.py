"""N1: greedy output in float32 equals transformers, token for token, however the work is cut up."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import transformers

from fairlead import LLM, SamplingParams, demo
from fairlead.testing.reference import MAX_PROMPT, Reference, prompts_for
from fairlead.testing.tiny_model import write_tiny_llama

BLOCK_SIZE = 16

CHECKPOINTS = {
    "mha": {"seed": 1, "num_heads": 4, "num_kv_heads": 4},
    "gqa3-tied": {"seed": 2, "num_heads": 6, "num_kv_heads": 2, "hidden_size": 96, "tie_word_embeddings": True},
    "gqa8": {"seed": 3, "num_heads": 8, "num_kv_heads": 1, "hidden_size": 64, "head_dim": 16},
    "llama3-rope": {
        "seed": 4,
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "bias-gqa8-tied": {
        "seed": 5,
        "num_heads": 8,
        "num_kv_heads": 1,
        "hidden_size": 128,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}

MODES = {
    "at once": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "few seats": {"max_num_seqs": 3, "block_size": 1},
    "prefix hits": {"enable_prefix_caching": True},
    "tenth of the demand": {"num_blocks": 0},
}


@pytest.fixture(scope="module", params=["demo", *CHECKPOINTS])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    name = request.param
    directory = demo.path()
    if name != "demo":
        directory = write_tiny_llama(tmp_path_factory.mktemp(name), **CHECKPOINTS[name])
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = Reference(name=name, directory=directory, model=model)
    yield found
    found.report()


@pytest.mark.parametrize("mode", MODES)
def test_greedy_equals_transformers(reference: Reference, mode: str, count: Callable[..., int]) -> None:
    num_new = count(64, full=256)
    settings = {"enable_prefix_caching": False, "block_size": BLOCK_SIZE, **MODES[mode]}
    longest = MAX_PROMPT + num_new
    prompts = prompts_for(reference.model.config.vocab_size, count(32, full=64))
    if "num_blocks" in settings:
        demand = sum(-(-(len(p) + num_new) // BLOCK_SIZE) for p in prompts)
        settings["num_blocks"] = max(demand // 10, -(-longest // BLOCK_SIZE))
    max_model_len = min(longest, reference.model.config.max_position_embeddings)
    llm = LLM(
        str(reference.directory), dtype="float32", skip_tokenizer_init=True, max_model_len=max_model_len, **settings
    )
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=0, detokenize=False)
    inputs = [{"prompt_token_ids": p} for p in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    if settings["enable_prefix_caching"]:
        outputs += llm.generate(inputs, params, use_tqdm=False)
        hits = [o.num_cached_tokens for o in outputs[len(inputs) :]]
        assert hits == [(len(p) - 1) // BLOCK_SIZE * BLOCK_SIZE for p in prompts]
    for output in outputs:
        assert len(output.outputs[0].token_ids) == num_new
        reference.check(output)
    if reference.name != "demo":
        distinct = [len(set(o.outputs[0].token_ids)) / num_new for o in outputs]
        assert np.mean(distinct) >= min(0.5, reference.model.config.vocab_size / num_new / 2)
    stats = llm.engine.stats()
    assert (stats.num_preemptions > 0) == ("num_blocks" in settings)
    assert stats.kv_cache_usage == 0
    llm.engine.scheduler.check_integrity()
    llm.close()


def test_a_wrong_position_or_head_would_show(reference: Reference) -> None:
    """The checkpoints are drawn so that the comparison above means something."""
    prompts = prompts_for(reference.model.config.vocab_size, 32)
    ids = torch.tensor([p for p in prompts if len(p) == MAX_PROMPT][:1])
    model = reference.model
    with torch.inference_mode():
        right = model(ids).logits.argmax(-1)
        moved = torch.arange(ids.shape[1])[None].clone()
        moved[0, 100:] += 1
        assert (model(ids, position_ids=moved).logits.argmax(-1) != right).any()
        weight = model.model.layers[0].self_attn.q_proj.weight
        head_size = model.config.head_dim
        kept = weight.clone()
        weight[:head_size] = kept[head_size : 2 * head_size]
        changed = model(ids).logits.argmax(-1)
        weight.copy_(kept)
    assert (changed != right).any()
