"""Linear layers hand their weights to the platform's method once, while loading."""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fairlead import LLM, SamplingParams
from fairlead.checkpoint import Checkpoint
from fairlead.config import EngineConfig, ModelConfig
from fairlead.engine import builder, planner
from fairlead.errors import ConfigError
from fairlead.interface import UNQUANTIZED, Device, LinearMethod, LinearShape
from fairlead.layers.context import BuildContext
from fairlead.layers.embedding import OutputHead
from fairlead.layers.linear import Linear
from fairlead.layers.moe import Router
from fairlead.models import registry
from fairlead.models.config import ModelShape
from fairlead.ops.linear import PlainLinear
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.platform import CpuPlatform


class Transposing:
    """Keeps the weight as (in, out), in memory of its own."""

    name = "transposing"

    def __init__(self, allocator: HostAllocator) -> None:
        self.allocator = allocator
        self.num_packed = self.peak = 0

    def refuses(self, shape: LinearShape) -> str | None:
        return "it is shared" if shape.is_shared else None

    def packed_bytes(self, shape: LinearShape) -> int:
        return shape.in_features * shape.out_features * 4

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> object:
        weight = tensors["weight"]
        packed = self.allocator.empty((weight.shape[1], weight.shape[0]), weight.dtype, tag="weights")
        packed.copy_(weight.t())
        self.num_packed += 1
        self.peak = max(self.peak, self.allocator.allocated_bytes("weights"))
        return (packed,)

    def apply(self, x_NI: torch.Tensor, packed: object, bias_O: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(packed, tuple)
        out = x_NI @ packed[0]
        return out if bias_O is None else out + bias_O

    def dequantise(self, packed: object) -> torch.Tensor:
        assert isinstance(packed, tuple)
        weight: torch.Tensor = packed[0].t()
        return weight


class Platform(CpuPlatform):
    """The CPU with one linear method."""

    def __init__(self) -> None:
        super().__init__(Device(name="cpu:0", description="test", memory_bytes=2**33))
        allocator = HostAllocator()
        self.allocator = allocator
        self.method = Transposing(allocator)

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        return {UNQUANTIZED: (self.method,)}


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    """What every engine of the test runs on."""
    platform = Platform()
    monkeypatch.setattr(planner.plugins, "create", lambda record, device: platform)
    return platform


def generate(model: Path, **settings: Any) -> list[tuple[int, ...]]:
    llm = LLM(str(model), skip_tokenizer_init=True, num_blocks=64, dtype="float32", **settings)
    prompts = [{"prompt_token_ids": list(range(3, 20))}, {"prompt_token_ids": [7, 5]}]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    return [tuple(output.outputs[0].token_ids) for output in outputs]


KINDS = ["llama", "mixtral", "gpt2", "deepseek_v3", "phi"]


def write(directory: Path, kind: str) -> Path:
    return write_tiny_llama(directory) if kind == "llama" else write_tiny_checkpoint(directory, kind)


def build(model: Path, **settings: Any) -> tuple[torch.nn.Module, int]:
    """The loaded model, and the bytes that the planner foresaw."""
    built = builder.build(EngineConfig.of(model=str(model), dtype="float32", num_blocks=64, **settings))
    assert isinstance(built.runner.model, torch.nn.Module)
    return built.runner.model, built.plan.info.weights_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_runs_on_packed_weights(tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    model = write(tmp_path, kind)
    expected = generate(model)
    platform: Platform = request.getfixturevalue("platform")
    assert generate(model) == expected
    assert platform.method.num_packed > 0


@pytest.mark.parametrize("kind", KINDS)
def test_loading_takes_the_model_and_one_layer(tmp_path: Path, platform: Platform, kind: str) -> None:
    loaded, foreseen = build(write(tmp_path, kind))
    gc.collect()
    held = platform.allocator.allocated_bytes("weights")
    assert held == foreseen  # the plain weights of packed layers are gone
    largest = max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in plain_model(tmp_path).modules())
    assert platform.method.peak <= held + largest
    del loaded


def plain_model(model: Path) -> torch.nn.Module:
    checkpoint = Checkpoint.open(ModelConfig(model=str(model)))
    config = registry.read_config(checkpoint.architecture, checkpoint.config)
    context = BuildContext.reference(max_model_len=1)
    return registry.build_model(checkpoint.architecture, config, ModelShape.of(config), context)


def test_a_fused_layer_is_packed_as_one(tmp_path: Path, platform: Platform) -> None:
    loaded, _ = build(write_tiny_llama(tmp_path, num_layers=1))
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, Linear)}
    assert {name.rpartition(".")[2] for name in layers} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"
    }  # fmt: skip
    assert platform.method.num_packed == len(layers)
    stored = load_file(tmp_path / "model.safetensors")
    qkv = [stored[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(layers["model.layers.0.self_attn.qkv_proj"].dequantised(), torch.cat(qkv))


def test_a_tied_head_may_stay_as_it_is(tmp_path: Path, platform: Platform) -> None:
    loaded, _ = build(write_tiny_llama(tmp_path, tie_word_embeddings=True))
    head, embedding = loaded.get_submodule("lm_head"), loaded.get_submodule("model.embed_tokens")
    assert isinstance(head, Linear)
    assert isinstance(head.method, PlainLinear)  # the method refuses shared weights
    assert head.dequantised().data_ptr() == embedding.get_parameter("weight").data_ptr()


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
def test_a_model_is_quantised_while_it_is_loaded(tmp_path: Path, kind: str, scheme: str) -> None:
    model = write(tmp_path, kind)
    tokens = generate(model, quantization=scheme)
    assert all(len(ids) == 12 for ids in tokens)
    plain, foreseen_plain = build(model)
    rounded, foreseen = build(model, quantization=scheme)
    assert foreseen < foreseen_plain
    layers = [
        (n, m) for n, m in rounded.named_modules() if isinstance(m, Linear) and not isinstance(m, OutputHead | Router)
    ]
    assert layers
    for name, layer in layers:
        exact = plain.get_submodule(name)
        assert isinstance(exact, Linear)
        error = float((layer.dequantised() - exact.dequantised()).norm() / exact.dequantised().norm())
        assert 0 < error < {"int8": 0.01, "int4": 0.15, "fp8": 0.04}[scheme]


def test_a_model_without_such_layers_cannot_be_quantised(tmp_path: Path) -> None:
    model = write_tiny_checkpoint(tmp_path, "cohere")
    with pytest.raises(ConfigError, match=r"quantization int8 \(no layer of CohereForCausalLM can"):
        build(model, quantization="int8")


def test_the_method_can_be_chosen_by_name(tmp_path: Path, platform: Platform) -> None:
    model = write_tiny_llama(tmp_path)
    for name, expected in (("transposing", "transposing"), ("reference", "reference")):
        config = EngineConfig.of(model=str(model), dtype="float32", op_providers=[f"linear={name}"])
        assert planner.plan_engine(config).op_providers["linear"] == expected
