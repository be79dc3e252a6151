"""Norms against their references, and their 8-bit variants against `quantise_rows` of the references' results."""

import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE
from fairlead_triton.norm import Norms
from fairlead_triton.quantise import LARGEST, Quantised, RowQuantiser
from fairlead_triton.tuning import Tuning

EPS = 1e-5
NORMS = Norms(Tuning("sm_90"))
SHAPES = [(1, 64), (0, 64), (5, 127), (2, 3, 129), (1, 4100)]


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    torch.testing.assert_close(got.float(), expected.float(), atol=bound, rtol=bound)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["rms_norm", "gemma_rms_norm"])
def test_rms(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(*shape, dtype=dtype, device=device), random(shape[-1], dtype=dtype, device=device, seed=1)
    got = getattr(NORMS, op)(x, weight, EPS)
    assert got.shape == x.shape
    assert got.dtype == dtype
    close(got, getattr(reference, op)(x.float(), weight.float(), EPS), dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_add(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = random(shape[-1], dtype=dtype, device=device, seed=2)
    kept = x.clone(), residual.clone()
    got, total = NORMS.fused_add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = reference.fused_add_rms_norm(x.float(), residual.float(), weight.float(), EPS)
    close(got, expected, dtype)
    close(total, expected_total, dtype)
    assert total.dtype == dtype
    assert torch.equal(x, kept[0])
    assert torch.equal(residual, kept[1])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
    x = random(*shape, dtype=dtype, device=device)
    weight, bias = (random(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (1, 2))
    bias32 = bias.float() if has_bias else None
    got = NORMS.layer_norm(x, weight, bias if has_bias else None, EPS)
    assert got.dtype == dtype
    close(got, reference.layer_norm(x.float(), weight.float(), bias32, EPS), dtype)


def test_views_are_read_where_they_lie(device: torch.device) -> None:
    """Queries cut out of a fused projection: rows of two dimensions that no single stride reaches."""
    qkv = random(5, 12 * 16, dtype=torch.float32, device=device)
    weight = random(16, dtype=torch.float32, device=device, seed=1)
    q = qkv[:, 16 : 5 * 16].view(5, 4, 16)
    close(NORMS.rms_norm(q, weight, EPS), reference.rms_norm(q, weight, EPS), torch.float32)
    close(NORMS.rms_norm(qkv[::2, 3:19], weight, EPS), reference.rms_norm(qkv[::2, 3:19], weight, EPS), torch.float32)
    across = random(16, 7, dtype=torch.float32, device=device).t()
    close(NORMS.rms_norm(across, weight, EPS), reference.rms_norm(across, weight, EPS), torch.float32)
    total, other = q.transpose(0, 1), random(4, 5, 16, dtype=torch.float32, device=device, seed=2)
    for got, expected in zip(
        NORMS.fused_add_rms_norm(total, other, weight, EPS),
        reference.fused_add_rms_norm(total, other, weight, EPS),
        strict=True,
    ):
        close(got, expected, torch.float32)


def test_a_weight_of_another_dtype_decides_the_result(device: torch.device) -> None:
    x, weight = random(3, 40, dtype=torch.bfloat16, device=device), random(40, dtype=torch.float32, device=device)
    assert NORMS.rms_norm(x, weight, EPS).dtype == reference.rms_norm(x, weight, EPS).dtype == torch.float32


def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(9, 200, dtype=dtype, device=device), random(200, dtype=dtype, device=device)
    whole = NORMS.rms_norm(x, weight, EPS)
    assert all(torch.equal(NORMS.rms_norm(x[i : i + 1], weight, EPS)[0], whole[i]) for i in range(9))


def check_8_bits(got: Quantised, expected: torch.Tensor, dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """Each value is within half a step of what it stands for, beside the error that the norm itself may have."""
    values, scales = got.values.float(), got.scales[..., None]
    assert got.values.dtype == dtype
    assert got.values.shape == expected.shape
    assert got.scales.shape == expected.shape[:-1]
    bound = TOLERANCE[str(model_dtype).removeprefix("torch.")]
    step = torch.full_like(values, 0.5) if dtype == torch.int8 else (expected / scales).abs().clamp(min=2**-6) / 16
    error = (values * scales - expected).abs()
    assert (error <= 1.001 * step * scales + bound + bound * expected.abs()).all()
    assert (values.abs().amax(-1) == LARGEST[dtype]).all()


EIGHT = [torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz]


@pytest.mark.parametrize("eight", EIGHT, ids=str)
@pytest.mark.parametrize("shape", [(3, 129), (1, 3, 100)])
def test_quantised_norms(shape: tuple[int, ...], eight: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    skip_unknown(eight, device)
    x, residual = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight, bias = (random(shape[-1], dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    x32, weight32 = x.float(), weight.float()
    for name, more in (("rms_norm", ()), ("gemma_rms_norm", ()), ("layer_norm", (bias,))):
        got = getattr(NORMS, f"{name}_quantised")(x, weight, *more, EPS, eight)
        expected = getattr(reference, name)(x32, weight32, *(m.float() for m in more), EPS)
        check_8_bits(got, expected, eight, dtype)
    got, total = NORMS.fused_add_rms_norm_quantised(x, residual, weight, EPS, eight)
    expected, expected_total = reference.fused_add_rms_norm(x32, residual.float(), weight32, EPS)
    check_8_bits(got, expected, eight, dtype)
    close(total, expected_total, dtype)


def skip_unknown(eight: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and eight == torch.float8_e4m3fnuz and torch.version.hip is None:
        pytest.skip("NVIDIA has no e4m3fnuz")


@pytest.mark.parametrize("eight", EIGHT, ids=str)
@pytest.mark.parametrize("width", [1, 4095, 4097, 9000])
def test_quantise_rows(width: int, eight: torch.dtype, device: torch.device) -> None:
    """The same bits as torch's own rounding, subnormal results included."""
    skip_unknown(eight, device)
    x = random(3, width, dtype=torch.float32, device=device) * 10.0 ** torch.randint(-4, 1, (3, width), device=device)
    got = RowQuantiser(Tuning("sm_90"))(x, eight)
    scaled = x / got.scales[:, None]
    expected = scaled.round() if eight == torch.int8 else scaled
    assert torch.equal(got.values.float(), expected.to(eight).float())
    torch.testing.assert_close(got.scales, x.abs().amax(-1) / LARGEST[eight])


def test_a_row_of_zeros_stays_one(device: torch.device) -> None:
    got = RowQuantiser(Tuning("sm_90"))(torch.zeros((2, 5), device=device), torch.int8)
    assert not got.values.any()
    assert got.scales.isfinite().all()
