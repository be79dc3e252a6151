"""Layers leave activations and residuals to linear methods that can do them, and to nobody else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fairlead import LLM, SamplingParams
from fairlead.engine import planner
from fairlead.interface import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    UNQUANTIZED,
    Device,
    LinearMethod,
    LinearShape,
    OpProvider,
)
from fairlead.layers.context import BuildContext
from fairlead.layers.feed_forward import ACTIVATIONS as BY_CONFIG
from fairlead.layers.feed_forward import FeedForward, gated_mlp
from fairlead.layers.linear import Linear, total
from fairlead.ops import reference
from fairlead.ops.linear import LinearTable, PlainLinear
from fairlead.testing.conformance.fused import MEANING
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu.platform import CpuPlatform


class Fusing(PlainLinear):
    """The reference that also does what follows, and notes what it was asked for."""

    def __init__(self, refused: tuple[str | None, ...] = ()) -> None:
        super().__init__(reference.linear, "fusing")
        self.refused, self.num_residuals = refused, 0
        self.activations: list[str] = []

    def refuses_fused(self, shape: LinearShape, activation: str | None) -> str | None:
        return "it does not" if activation in self.refused else None

    def pack_fused(self, tensors: Mapping[str, torch.Tensor], activation: str) -> object:
        self.activations.append(activation)
        return activation, tensors["weight"]

    def apply_fused(
        self,
        x_NI: torch.Tensor,
        packed: object,
        bias_O: torch.Tensor | None,
        residual_NO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        activation, weight = packed if isinstance(packed, tuple) else (None, packed)
        assert isinstance(weight, torch.Tensor)
        out = MEANING[activation](reference.linear(x_NI, weight, bias_O))
        self.num_residuals += residual_NO is not None
        return out if residual_NO is None else residual_NO + out


class Platform(CpuPlatform):
    """The CPU with one linear method and the reference of all ops."""

    def __init__(self, method: Fusing) -> None:
        super().__init__(Device(name="cpu:0", description="test", memory_bytes=2**33))
        self.method = method

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        return {UNQUANTIZED: (self.method,)}

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        return {}


def context(method: Fusing, kept: tuple[str, ...] = ()) -> BuildContext:
    plain = BuildContext.reference(max_model_len=1)
    table = LinearTable("test", {UNQUANTIZED: (method,)}, plain.ops.linear, kept=kept)
    return BuildContext(ops=plain.ops, linear=table, dtype=plain.dtype, device=plain.device, max_model_len=1)


def fill(module: torch.nn.Module) -> None:
    """Gives every layer weights, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, Linear):
            assert layer.weight is not None
            shape = layer.weight.shape
            layer.weight = torch.nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
            layer.bias = torch.nn.Parameter(torch.randn(shape[0], generator=generator), requires_grad=False)
            layer.pack_weights()


def block(name: str, ctx: BuildContext) -> FeedForward:
    if name in GATED_ACTIVATIONS:
        made = gated_mlp(24, 40, {"silu_and_mul": "silu", "gelu_and_mul": "gelu_new"}[name], ctx, bias=True)
    else:
        act = next(act for act in BY_CONFIG.values() if act.name == name)
        made = FeedForward(("up", Linear(24, 40, ctx, bias=True)), act, ("down", Linear(40, 24, ctx, bias=True)))
    fill(made)
    return made


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_feed_forward_is_the_same_whoever_does_the_activation(name: str) -> None:
    x, residual = torch.randn(5, 24), torch.randn(5, 24)
    expected = block(name, context(Fusing(refused=(None, *ACTIVATIONS))))
    for refused in ((), (name,), (None,)):
        method = Fusing(refused)
        made = block(name, context(method))
        assert torch.equal(made(x), expected(x))
        out, left = made.add(x, residual)
        assert (left is None) == (None not in refused)
        assert torch.equal(total(out, left), residual + expected(x))
        assert method.activations == ([] if name in refused else [name])


def test_names_of_activations_mean_what_they_say() -> None:
    x = torch.linspace(-4, 4, 99)
    for act in BY_CONFIG.values():
        assert torch.equal(act.fn(x), MEANING[act.name](x))
    assert torch.equal(BY_CONFIG["gelu_new"].fn(x), functional.gelu(x, approximate="tanh"))


def test_a_provider_that_was_asked_for_keeps_its_op() -> None:
    for op, activations, num_residuals in (("silu_and_mul", [], 1), ("fused_add_rms_norm", ["silu_and_mul"], 0)):
        method = Fusing()
        ctx = context(method, kept=(op,))
        block("silu_and_mul", ctx).add(torch.randn(2, 24), torch.randn(2, 24))
        assert (method.activations, method.num_residuals) == (activations, num_residuals)
        assert op not in ctx.linear.fused


KINDS = ("llama", "gpt2", "deepseek_v3")
MORE_KINDS = ("gemma2", "olmo2", "gpt_neox", "gptj", "phi", "falcon", "opt", "mixtral")


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_a_model_gives_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, full: bool) -> None:
    """Sums and activations are the very same operations in float32, so not a bit may differ."""
    if kind in MORE_KINDS and not full:
        pytest.skip("only at the full count: every family is compared with transformers elsewhere")
    model = write_tiny_llama(tmp_path) if kind == "llama" else write_tiny_checkpoint(tmp_path, kind)
    found = []
    for method in (Fusing(refused=(None, *ACTIVATIONS)), Fusing()):
        monkeypatch.setattr(planner.plugins, "create", lambda record, device, m=method: Platform(m))
        llm = LLM(str(model), skip_tokenizer_init=True, num_blocks=32, dtype="float32")
        params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=3)
        outputs = llm.generate([{"prompt_token_ids": list(range(3, 20))}], params)
        found.append((outputs[0].outputs[0].token_ids, outputs[0].outputs[0].logprobs))
        is_fused = bool(method.activations or method.num_residuals)
        assert is_fused == (not method.refused)
    assert found[0] == found[1]


def test_what_a_method_took_over_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_llama(tmp_path)

    def providers(**settings: Any) -> Mapping[str, str]:
        monkeypatch.setattr(planner.plugins, "create", lambda record, device: Platform(Fusing()))
        llm = LLM(str(model), skip_tokenizer_init=True, num_blocks=32, dtype="float32", **settings)
        return llm.engine.op_providers

    assert providers()["silu_and_mul"] == "fusing"
    assert providers(op_providers=("silu_and_mul=reference",))["silu_and_mul"] == "reference"
