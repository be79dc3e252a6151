"""The reference ops against NumPy in float64: what every provider is then measured against."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [(0, 8), (1, 1), (3, 5), (7, 64), (33, 65)]


def randn(*shape: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def f64(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def check(found: torch.Tensor, expected: np.ndarray, dtype: str) -> None:
    assert found.dtype == DTYPES[dtype]
    np.testing.assert_allclose(f64(found), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(dtype: str) -> None:
    weight = randn(11, 6, dtype=dtype)
    found = reference.embedding(torch.tensor([0, 10, 3, 3]), weight)
    assert torch.equal(found, weight[[0, 10, 3, 3]])
    assert reference.embedding(torch.zeros(0, dtype=torch.int64), weight).shape == (0, 6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear(size: tuple[int, int], dtype: str) -> None:
    x, weight, bias = randn(*size, dtype=dtype), randn(9, size[1], dtype=dtype, seed=1), randn(9, dtype=dtype, seed=2)
    weight = (weight.float() / math.sqrt(size[1])).to(DTYPES[dtype])
    check(reference.linear(x, weight, None), f64(x) @ f64(weight).T, dtype)
    check(reference.linear(x, weight, bias), f64(x) @ f64(weight).T + f64(bias), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(size: tuple[int, int], dtype: str, eps: float) -> None:
    x, weight = randn(*size, dtype=dtype), randn(size[1], dtype=dtype, seed=1)
    check(reference.rms_norm(x, weight, eps), rms(f64(x), f64(weight), eps), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fused_add_rms_norm(size: tuple[int, int], dtype: str) -> None:
    x, residual = (randn(*size, dtype=dtype, seed=i) for i in range(2))
    weight = randn(size[1], dtype=dtype, seed=3)
    normed, total = reference.fused_add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    check(normed, rms(f64(total), f64(weight), 1e-5), dtype)


def test_rms_norm_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in DTYPES:
        module = LlamaRMSNorm(64, eps=1e-5).to(DTYPES[dtype])
        module.weight.data = randn(64, dtype=dtype, seed=1)
        x = randn(5, 64, dtype=dtype)
        assert torch.equal(reference.rms_norm(x, module.weight.data, 1e-5), module(x).detach())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES[2:], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm(size: tuple[int, int], dtype: str, has_bias: bool) -> None:
    x, weight = randn(*size, dtype=dtype), randn(size[1], dtype=dtype, seed=1)
    bias = randn(size[1], dtype=dtype, seed=2) if has_bias else None
    x64 = f64(x)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5) * f64(weight)
    check(reference.layer_norm(x, weight, bias, 1e-5), expected + (f64(bias) if bias is not None else 0), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_embedding_turns_pairs(dtype: str, interleaved: bool) -> None:
    head_size, positions = 10, torch.tensor([0, 3, 3, 99])
    angles = np.outer(np.arange(100), 10000.0 ** (-np.arange(0, head_size, 2) / head_size))
    # Seen as (2, D / 2) or, interleaved, as (D / 2, 2), the axis of two holds the parts of each complex number.
    axis, size = (-1, (head_size // 2, 2)) if interleaved else (-2, (2, head_size // 2))
    table = np.repeat(angles, 2, axis=-1) if interleaved else np.tile(angles, 2)
    cos, sin = (torch.from_numpy(f(table)).to(DTYPES[dtype]) for f in (np.cos, np.sin))
    q, k = randn(4, 3, head_size, dtype=dtype), randn(4, 1, head_size, dtype=dtype, seed=1)
    for x, found in zip((q, k), reference.rotary_embedding(q, k, positions, cos, sin, interleaved), strict=True):
        real, imaginary = np.moveaxis(f64(x).reshape(*x.shape[:-1], *size), axis, 0)
        turned = (real + 1j * imaginary) * np.exp(1j * angles[positions.numpy()])[:, None]
        check(found, np.stack((turned.real, turned.imag), axis=axis).reshape(x.shape), dtype)


def test_gelu_is_the_tanh_form_and_silu_the_sigmoid_form() -> None:
    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    for op, activation in ((reference.silu_and_mul, silu), (reference.gelu_and_mul, gelu)):
        for dtype in DTYPES:
            for rows, size in SIZES:
                x = randn(rows, 2 * size, dtype=dtype) * 2
                gate, up = np.split(f64(x), 2, axis=-1)
                check(op(x), activation(gate) * up, dtype)


def test_kv_cache_write_fills_its_slots_and_no_others() -> None:
    x = randn(3, 2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        cache = torch.full((8, 2, 4), 7.0, dtype=dtype)
        slots = torch.tensor([6, 0, 3])
        reference.kv_cache_write(x, cache, slots)
        assert torch.equal(cache[slots], x.to(dtype))
        assert (cache[[1, 2, 4, 5, 7]] == 7.0).all()


def calls() -> list[tuple[str, Callable[..., object], list[object]]]:
    x, weight = randn(4, 8), randn(8, seed=1)
    cos = randn(9, 8)
    return [
        ("embedding", reference.embedding, [torch.tensor([1, 2]), randn(5, 8)]),
        ("linear", reference.linear, [x, randn(3, 8), randn(3)]),
        ("rms_norm", reference.rms_norm, [x, weight, 1e-5]),
        ("fused_add_rms_norm", reference.fused_add_rms_norm, [x, randn(4, 8, seed=2), weight, 1e-5]),
        ("layer_norm", reference.layer_norm, [x, weight, weight, 1e-5]),
        (
            "rotary_embedding",
            reference.rotary_embedding,
            [randn(4, 2, 8), randn(4, 1, 8), torch.arange(4), cos, cos, False],
        ),
        ("silu_and_mul", reference.silu_and_mul, [x]),
        ("gelu_and_mul", reference.gelu_and_mul, [x]),
    ]


@pytest.mark.parametrize(("name", "fn", "args"), calls(), ids=[c[0] for c in calls()])
def test_inputs_are_not_changed_and_results_are_new(name: str, fn: Callable[..., object], args: list[object]) -> None:
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    results = fn(*args)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    for result in results if isinstance(results, tuple) else (results,):
        assert isinstance(result, torch.Tensor)
        assert all(result.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in tensors)


def test_lora_adds_each_rows_own_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 7, generator=generator), torch.randn(5, 6, generator=generator)
    a, b = torch.randn(3, 2, 7, generator=generator), torch.randn(3, 6, 2, generator=generator)
    a[0] = b[0] = 0.0
    adapters = [2, 0, 1, 2, 0]
    before = x.clone(), y.clone()
    adapter_N = torch.tensor(adapters)
    out = reference.lora_expand(y, reference.lora_shrink(x, a, adapter_N), b, adapter_N)
    for row, adapter in enumerate(adapters):
        torch.testing.assert_close(out[row], y[row] + b[adapter] @ (a[adapter] @ x[row]))
    assert torch.equal(out[1], y[1])
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    half = reference.lora_expand(y.bfloat16(), reference.lora_shrink(x.bfloat16(), a, adapter_N), b, adapter_N)
    assert half.dtype == torch.bfloat16


def test_penalties_change_the_named_places_alone() -> None:
    logits = torch.tensor([[2.0, -2.0, 5.0, -torch.inf], [1.0, 3.0, -1.0, 3e38]])
    expected = [[2.0, -2.0 * 2 - 0.5 - 0.25, 5.0 / 2, -torch.inf], [1.0, 3.0 + 9.0, -1.0, 3.4028234663852886e38]]
    index = torch.tensor([1, 2, 3, 5, 7])
    repetition = torch.tensor([2.0, 2.0, 2.0, 1.0, 1e-38])
    frequency = torch.tensor([0.5, 0.0, 0.5, -9.0, 0.0])
    presence = torch.tensor([0.25, 0.0, 0.25, 0.0, 0.0])
    reference.apply_penalties(logits, index, repetition, frequency, presence)
    assert torch.equal(logits, torch.tensor(expected))


def test_draw_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).repeat(5, 1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert reference.draw(probs, uniform).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "tokens"),
    [
        (0, 1.0, 0.0, {0, 1, 2, 3}),
        (4, 1.0, 0.0, {0, 1, 2, 3}),
        (2, 1.0, 0.0, {0, 2}),
        (0, 0.6, 0.0, {0, 2}),
        (0, 1.0, 0.45, {0, 2, 3}),
        (3, 0.5, 0.0, {0, 2}),
    ],
)
def test_draw_filtered_keeps_the_best(top_k: int, top_p: float, min_p: float, tokens: set[int]) -> None:
    probs = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).repeat(64, 1)
    settings = torch.tensor([[top_k], [top_p], [min_p]], dtype=torch.float64).repeat(1, 64)
    uniform = torch.linspace(0, 1 - 1e-9, 64, dtype=torch.float64)[None]
    drawn = reference.draw_filtered(probs, torch.cat((settings, uniform)), top_k if top_k < 4 else 0)
    assert set(drawn.tolist()) == tokens
