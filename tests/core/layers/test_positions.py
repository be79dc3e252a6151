"""Rotary positions of both pairings against complex numbers, and ALiBi's slopes against the published ones."""

import pytest
import torch

from fairlead.errors import UnsupportedModelError
from fairlead.layers.alibi import alibi_slopes
from fairlead.layers.context import BuildContext
from fairlead.layers.rotary import Rotary

CONTEXT = BuildContext.reference(max_model_len=64)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_rotary_turns_pairs_as_complex_numbers(interleaved: bool, part: float) -> None:
    size, positions_T = 16, torch.tensor([0, 5, 63])
    params = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": part}
    rotary = Rotary(size, params, CONTEXT, interleaved=interleaved)
    x_THD = torch.randn(3, 2, size, generator=torch.Generator().manual_seed(0))
    turned, _ = rotary(x_THD, x_THD[:, :1], positions_T)
    n = int(size * part) // 2
    expected = x_THD.clone()
    for i in range(n):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
        turn = torch.polar(torch.ones(3), positions_T * 100.0 ** (-i / n))[:, None]
        z = torch.complex(x_THD[:, :, a], x_THD[:, :, b]) * turn
        expected[:, :, a], expected[:, :, b] = z.real, z.imag
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)


def test_a_part_that_is_no_even_number_of_dimensions_is_refused() -> None:
    params = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.2}
    with pytest.raises(UnsupportedModelError, match="rotates 3 of 16 dimensions"):
        Rotary(16, params, CONTEXT)


def test_alibi_slopes_are_the_published_ones() -> None:
    assert alibi_slopes(8) == pytest.approx([2.0**-i for i in range(1, 9)])
    assert alibi_slopes(16)[:2] == pytest.approx([2**-0.5, 2**-1])
    assert alibi_slopes(12) == pytest.approx([*alibi_slopes(8), *alibi_slopes(16)[0:8:2]])
