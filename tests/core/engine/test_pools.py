"""A loaded engine's memory can be taken away and given back, pool by pool, and its tokens stay the same."""

import gc
from pathlib import Path
from typing import Any

import pytest

from fairlead import LLM, SamplingParams
from fairlead.engine import planner
from fairlead.interface import Device
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu.platform import CpuPlatform


@pytest.mark.parametrize(
    "settings", [{}, {"quantization": "int8"}, {"quantization": "int4", "dtype": "float32"}], ids=str
)
def test_an_engine_sleeps_and_wakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    platform = CpuPlatform(Device(name="cpu:0", description="test", memory_bytes=2**33))
    monkeypatch.setattr(planner.plugins, "create", lambda record, device: platform)
    model = str(write_tiny_llama(tmp_path, tie_word_embeddings=True))
    llm = LLM(model, platform="cpu", skip_tokenizer_init=True, num_blocks=40, **settings)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

    def generate() -> list[int]:
        return list(llm.generate([{"prompt_token_ids": list(range(3, 30))}], params)[0].outputs[0].token_ids)

    expected = generate()
    gc.collect()
    pools = platform.allocator
    held = {tag: pools.allocated_bytes(tag) for tag in ("weights", "kv_cache")}
    assert held == {"weights": llm.engine.info.weights_bytes, "kv_cache": llm.engine.info.kv_cache_bytes}
    pools.offload("weights")
    pools.discard("kv_cache")
    assert {tag: pools.allocated_bytes(tag) for tag in held} == {"weights": 0, "kv_cache": 0}
    llm.engine.reset_prefix_cache()
    pools.restore("weights")
    pools.restore("kv_cache")
    assert {tag: pools.allocated_bytes(tag) for tag in held} == held
    assert generate() == expected
