"""The loop that quantises first against LoftQ (arXiv 2310.08659, algorithm 1) written out: 1e-4 relative."""

import pytest
import torch
from quant_samples import gaussian, generator, rebuilt

from quant.decompose import decompose
from quant.errors import full_table
from quant.exceptions import ShapeError
from quant.storage import Choice

CHOICE = Choice("nf", 2, 32, 30, factor_dtype="float32")  # at half the smaller side the SVD is exact


@pytest.mark.parametrize("patience", [None, 1])
def test_quantised_first_all_iterations_are_made_and_the_last_is_returned(patience):
    weight = gaussian(60, 96)
    low = torch.zeros_like(weight)
    for _ in range(7):
        quantized = rebuilt(weight - low, CHOICE)
        u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
        low = (u[:, :30] * s[:30]) @ vh[:30]
    result = decompose(weight, CHOICE, generator=generator(), max_iterations=7, patience=patience, quantize_first=True)
    assert len(result.losses) == 8
    assert result.at == 7
    assert torch.allclose(result.left @ result.right, low, atol=1e-4)
    expected = (weight - quantized - low).double().square().sum().item()
    assert result.loss == result.losses[-1] == pytest.approx(expected, rel=1e-4)
    assert result.losses[0] == pytest.approx((weight - rebuilt(weight, CHOICE)).double().square().sum().item())


def test_quantised_first_from_given_factors():
    weight = gaussian(60, 96)
    factors = gaussian(60, 30, 1) / 10, gaussian(30, 96, 2) / 10
    result = decompose(weight, CHOICE, generator=generator(), max_iterations=1, quantize_first=True, first=factors)
    left = weight - factors[0] @ factors[1]
    assert result.losses[0] == pytest.approx((left - rebuilt(left, CHOICE)).double().square().sum().item(), rel=1e-4)
    with pytest.raises(ShapeError, match="do not fit"):
        decompose(weight, CHOICE, generator=generator(), quantize_first=True, first=(factors[1], factors[0]))


def test_without_a_low_rank_part_the_order_changes_nothing():
    weight, choice = gaussian(60, 96), Choice("nf", 2, 32, 0)
    first, other = (decompose(weight, choice, generator=generator(), quantize_first=flag) for flag in (True, False))
    assert first.losses == other.losses


def test_the_full_table_holds_losses_of_the_same_loop():
    weight, choices = gaussian(60, 96), [CHOICE, Choice("nf", 3, 32, 8)]
    found = full_table(weight, choices, generator_seed=3, max_iterations=2, quantize_first=True)
    expected = [
        decompose(weight, choice, generator=generator(3), max_iterations=2, quantize_first=True).loss
        for choice in choices
    ]
    assert found == expected
