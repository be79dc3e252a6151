"""A tiny Llama through the engine on the Triton attention: transformers' tokens, its rotation in the write or apart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fairlead import LLM, SamplingParams
from fairlead.engine import planner
from fairlead.interface import (
    PLATFORM_API,
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Device,
    MemoryInfo,
    PlatformSpec,
)
from fairlead.ops.platform import BasicPlatform
from fairlead.plugins import PlatformRecord
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_triton.attention.backend import TritonAttention
from fairlead_triton.attention.tiles import DeviceTraits

V, MAX_TOKENS = 128, 4
DEVICE = Device(name="acme:0", description="where Triton kernels run", memory_bytes=2**30)
TILES = {
    "prompt_rows": 64, "prompt_keys": 32, "decode_rows": 16, "decode_keys": 32, "split": 32, "max_decode_rows": 16,
    "write_rows": 64,
}  # fmt: skip


class AcmePlatform(BasicPlatform):
    """References, and the Triton attention."""

    name = "acme"
    capabilities = Capabilities(dtypes=("float32",), block_sizes=(16,), kv_layouts=("triton",), batch_invariant=True)

    def __init__(self, torch_device: torch.device) -> None:
        super().__init__(DEVICE)
        self.torch_device = torch_device
        self.rotations: list[int] = []

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(total_bytes=2**30, free_bytes=2**29)

    def attention_backends(self) -> tuple[str, ...]:
        return ("triton",)

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        rotations, options = self.rotations, {}
        if self.torch_device.type == "cpu":
            options = {"traits": DeviceTraits(num_processors=1), "tuning": TILES}

        class Watched(TritonAttention):
            def forward_rotary(self, q_THD: torch.Tensor, *rest: Any) -> torch.Tensor:
                rotations.append(len(q_THD))
                return super().forward_rotary(q_THD, *rest)

        return Watched(shape, self.allocator, self.torch_device, **options)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> AcmePlatform:
    platform = AcmePlatform(device)
    spec = PlatformSpec(
        name="acme", api_version=PLATFORM_API, priority=1, probe=lambda: (DEVICE,), create=lambda device: platform
    )
    record = PlatformRecord(
        name="acme", distribution="acme", version="1", status="available", devices=(DEVICE,), spec=spec
    )
    monkeypatch.setattr(planner.plugins, "choose", lambda config: (record, DEVICE))
    return platform


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny"), seed=7, num_layers=1)


def expected(tiny: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, attention_mask=torch.ones_like(ids))
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("op_providers", [(), ("rotary_embedding=reference",)], ids=["fused", "apart"])
def test_tokens_equal_those_of_transformers(
    tiny: Path, platform: AcmePlatform, op_providers: tuple[str, ...], count: Callable[..., int]
) -> None:
    """Prompts around a block's edge and over a split's, the longest in chunks, beside each other."""
    prompts = [[(5 * i + j * j + 3) % V for j in range(n)] for i, n in enumerate((1, 17, 41))]
    max_tokens = count(MAX_TOKENS, full=24)
    llm = LLM(
        str(tiny), skip_tokenizer_init=True, max_model_len=128, num_blocks=24, max_num_batched_tokens=32,
        op_providers=op_providers, device_memory_utilization=0.5,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    try:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        names = llm.engine.op_providers
    finally:
        llm.close()
    assert [out.outputs[0].token_ids for out in outputs] == expected(tiny, prompts, max_tokens)
    assert bool(platform.rotations) == (not op_providers)
    assert names["rotary_embedding"] == ("reference" if op_providers else "triton")
