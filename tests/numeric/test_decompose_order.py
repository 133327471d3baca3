"""Which decomposition is better under the covariance that counts: on a synthetic layer, measured on held-out inputs.

One draw; the order is what is tested, with a margin of 3 % at each step.
"""

import itertools

import pytest
import torch
from quant_samples import gaussian, generator

from quant.blockwise import quantize, rebuild
from quant.codebook import levels_of
from quant.decompose import decompose
from quant.lowrank import dequantize_factors
from quant.metric import Metric
from quant.rounding import feedback, quantize_compensated
from quant.storage import Choice


def _loss(error, covariance):
    return (error.double() @ covariance.double() * error).sum().item()


def _decaying(size, power):
    return torch.arange(1, size + 1).float().pow(-power)


def _inputs(tokens, seed):
    """Correlated, a few channels large."""
    mixed = (gaussian(tokens, 512, seed) * _decaying(512, 0.7)) @ torch.linalg.qr(gaussian(512, 512, 77)).Q
    mixed[:, torch.randperm(512, generator=generator(3))[:8]] *= 8
    return mixed


@pytest.mark.parametrize("grid", ["nf", "lloyd"])
@pytest.mark.parametrize("bits", [2, 3])
def test_each_piece_pays_on_held_out_inputs(grid, bits):
    left, right = torch.linalg.qr(gaussian(256, 256, 5)).Q, torch.linalg.qr(gaussian(512, 256, 6)).Q
    weight = (100 * left * _decaying(256, 0.5)) @ right.T
    seen, held_out = (x.T @ x / len(x) for x in (_inputs(4096, 10), _inputs(4096, 20)))
    choice = Choice(grid, bits, 64, 16, factor_dtype="float32")
    full, passing = Metric(covariance=seen), feedback(seen, 64)
    variants = [
        {"metric": Metric()},
        {"metric": Metric(inputs=seen.diagonal().sqrt())},
        {"metric": full},
        {"metric": full, "passing": passing},
    ]
    losses = []
    for settings in variants:
        made = decompose(weight, choice, generator=generator(), max_iterations=12, patience=12, **settings)
        left, right = dequantize_factors(made.left, made.right, made.factor_scale)
        losses.append(_loss(weight - rebuild(made.quantized, choice) - left @ right, held_out))
    assert all(better < 0.97 * worse for worse, better in itertools.pairwise(losses)), losses


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("bits", "positive"), [(2, (0.1901, 0.6520)), (3, (0.0986, 0.3062, 0.5488, 0.8854))])
def test_a_massive_input_needs_a_level_at_zero(bits, positive, compensated):
    """Blocks along the outputs of one input, as in a transposed matrix: one weight sets the scale, and levels without
    a zero (those that minimise the error on Gaussian weights) move every other weight by the innermost level, which
    the massive input multiplies. A model lost its use to one such block."""
    weight = 0.05 * gaussian(64, 48)
    weight[7, 5] = 5.88
    x = gaussian(400, 48, 1)
    x[:, 5] *= 18259**0.5
    covariance = x.T @ x / len(x)
    choice = Choice("lloyd", bits, 32, 0)
    without = torch.tensor([-level for level in reversed(positive)] + list(positive))
    losses = []
    for levels in (without, levels_of(choice)):
        if compensated:
            made = quantize_compensated(weight, choice, feedback(covariance, None), transposed=True, levels=levels)
        else:
            made = quantize(weight.T.contiguous(), choice, levels)
        losses.append(_loss(weight - rebuild(made, choice).T, covariance))
    assert losses[0] > 10 * losses[1], losses
