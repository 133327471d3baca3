"""L4Q's kernels in Triton's interpreter, on the CPU, beside plain torch: `make test-triton`."""

import os

import pytest
import torch
from quant_samples import generator

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 must be set before triton is imported", allow_module_level=True)

from quant import grid, l4q_rows, triton_l4q
from quant.baselines import FakeQuantLinear
from quant.fakequant import L4QLinear

ROWS, COLUMNS, RANK, ALPHA = 37, 128, 3, 0.5
# The interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16]


def operands(bits, group, kind, dtype, shrink=0.6):
    """About a third of the weights are clipped; the rows fill no whole number of tiles."""
    draw = torch.Generator().manual_seed(bits * group)
    frozen = torch.randn(ROWS, COLUMNS, generator=draw).to(dtype)
    lora_a = torch.randn(RANK, COLUMNS, generator=draw)
    lora_b = 0.1 * torch.randn(ROWS, RANK, generator=draw)
    scale = shrink * grid.init_grid(frozen.float(), bits, group)[0]
    offset = grid.offset_of(kind, scale, 0.3 * scale)
    return frozen, lora_a, lora_b, scale, offset, ALPHA, bits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["zero", "half", "trained"])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 64), (4, 128), (8, 32)])
def test_kernels_do_what_plain_torch_does(bits, group, kind, dtype):
    """Codes and masks are equal; sums over a group are taken in another order: 1e-5 of their largest."""
    given = operands(bits, group, kind, dtype)
    codes = l4q_rows.codes(*given)
    assert torch.equal(triton_l4q.codes(*given), codes)
    assert len(codes.unique()) > 2
    expected = l4q_rows.rebuild(*given)
    assert torch.equal(triton_l4q.rebuild(*given), expected)
    grad = torch.randn(ROWS, COLUMNS, generator=generator(1))
    wanted = l4q_rows.pull_back(grad.clone(), *given, weight=True)
    found = triton_l4q.pull_back(grad.clone(), *given, weight=True)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], wanted[1])
    assert 0.02 < (found[1] == 0).double().mean() < 0.98
    for ours, plain in zip(found[2:], wanted[2:], strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
    assert triton_l4q.pull_back(grad.clone(), *given, weight=False)[0] is None


@pytest.mark.parametrize("kind", ["zero", "half", "trained"])
def test_a_layer_trains_alike_and_ships_what_it_computed_with(kind):
    made = []
    for fused in (True, False):
        layer = L4QLinear(
            *(torch.randn(ROWS, COLUMNS, generator=generator(0)), None),
            bits=3,
            group_size=32,
            rank=RANK,
            alpha=ALPHA,
            generator=generator(1),
            offset=kind,
            row_chunk=16,
            fused=fused,
        )
        layer.scale.data.mul_(0.6)
        layer.lora_b.data.normal_(generator=generator(2))
        trained = [layer.lora_a, layer.lora_b, layer.scale, *([layer.offset] if kind == "trained" else [])]
        x = torch.randn(5, COLUMNS, generator=generator(3), requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        made.append([y.detach(), x.grad, *(parameter.grad for parameter in trained)])
        assert l4q_rows.chosen(layer.weight, layer.lora_a, layer.scale, fused) is (triton_l4q if fused else l4q_rows)
        assert torch.equal(layer.dequantized(), layer(torch.eye(COLUMNS)).t())
    for ours, plain in zip(*made, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


def test_a_nan_is_not_rounded_away():
    frozen, lora_a, lora_b, *rest = operands(3, 32, "zero", torch.float32)
    lora_b[1, 0] = float("nan")
    for rows in (l4q_rows, triton_l4q):
        found = rows.rebuild(frozen, lora_a, lora_b, *rest)
        assert found[1].isnan().all()
        assert found[0].isfinite().all()
        grad = torch.ones_like(frozen)
        assert rows.pull_back(grad, frozen, lora_a, lora_b, *rest, weight=False)[2][1].isnan().all()


def test_rows_of_a_transposed_view_come_out_in_order():
    frozen, *rest = operands(3, 32, "half", torch.float32)
    expected = l4q_rows.rebuild(frozen, *rest)
    assert torch.equal(triton_l4q.rebuild(frozen.t().contiguous().t(), *rest), expected)


def test_what_does_not_fit_goes_through_plain_torch():
    frozen, lora_a, _, scale, *_ = operands(4, 32, "zero", torch.float32)
    assert l4q_rows.chosen(frozen, lora_a, scale, True) is triton_l4q
    assert l4q_rows.chosen(frozen.double(), lora_a, scale, True) is l4q_rows
    assert l4q_rows.chosen(frozen, lora_a, scale.double(), True) is l4q_rows
    assert l4q_rows.chosen(frozen[:, :96], lora_a[:, :96], scale, True) is l4q_rows
    assert l4q_rows.chosen(frozen, lora_a, scale[:, :1].repeat(1, 16), True) is l4q_rows
    wide = torch.ones(256, 64 * 4)
    assert l4q_rows.chosen(torch.ones(ROWS, 64 * 4), wide[:128], torch.ones(ROWS, 4), True) is triton_l4q
    assert l4q_rows.chosen(torch.ones(ROWS, 64 * 4), wide, torch.ones(ROWS, 4), True) is l4q_rows
    plain = FakeQuantLinear(frozen, None, bits=4, group_size=32, steps=(scale, None))
    assert torch.equal(plain(torch.eye(COLUMNS)).t(), plain.dequantized())
