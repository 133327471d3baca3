"""Rows that share a sequence see nothing of each other, in every family.

Tolerance: 1e-6 relative for summed losses in fp32, 1e-5 of the largest entry for gradients.
"""

from pathlib import Path

import pytest
import torch
from pipeline.test_chain import FAMILIES
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows

from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.sequences import IGNORED, Packer, Row, collate, take
from qlora_pipe.hf.training import trained_parameters

TEXTS = ["a short row", "x" * 40 + "and a longer one", "the third", "y z " * 12, "five", "the sixth row of them all"]
ROWS = byte_rows(TEXTS, ignored=3)
LENGTH = 64


def packed(rows: list[Row], length: int = LENGTH) -> list[Row]:
    packer = Packer(length)
    for row in rows:
        packer.add(row)
    return packer.rows(len(rows))


def test_take_stops_at_the_tokens_but_takes_one_row() -> None:
    found = [Row((1, 2, 3), (1, 2, 3)), Row((1, 2), (1, 2)), Row((1, 2, 3), (1, 2, 3))]
    assert take(found, 3) == found[:2]
    assert take(found, 4) == found[:2]
    assert take(found, 5) == found
    assert take(found, 1) == found[:1]


def test_collate_pads_right_and_scores_no_pad() -> None:
    batch = collate([Row((5, 6, 7), (IGNORED, 6, 7)), Row((8,), (8,))])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_collate_counts_positions_anew_where_rows_share_a_sequence() -> None:
    batch = collate([Row((5, 6, 7), (IGNORED, 6, IGNORED), (2, 1)), Row((8,), (8,))])
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert "attention_mask" not in batch


def test_every_row_is_in_one_sequence_in_the_first_that_has_room() -> None:
    rows = [Row((n,) * size, (n,) * size) for n, size in enumerate([5, 6, 4, 1, 9, 2])]
    found = packed(rows, length=10)
    assert [row.input_ids for row in found] == [
        (0,) * 5 + (2,) * 4 + (3,),
        (1,) * 6 + (5,) * 2,
        (4,) * 9,
    ]
    assert [row.lengths for row in found] == [(5, 4, 1), (6, 2), (9,)]
    assert found[0].labels == (IGNORED, 0, 0, 0, 0, IGNORED, 2, 2, 2, IGNORED)
    assert sum(row.scored for row in found) == sum(row.scored for row in rows)


def test_only_the_last_sequences_take_rows() -> None:
    rows = [Row((1,) * 6, (1,) * 6)] * 65 + [Row((2,) * 4, (2,) * 4)]
    found = packed(rows, length=10)
    assert [len(row.lengths) for row in found] == [1, 2, *[1] * 63]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_a_sequence_have_the_losses_of_rows_alone(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family.partition("-")[0], **FAMILIES[family])
    model, shared = TinyFolder(folder).dense(), packed(ROWS)
    assert 1 < len(shared) < len(ROWS)
    with torch.no_grad():
        alone = sum(summed_loss(model, collate([row])).double().item() for row in ROWS)
        together = summed_loss(model, collate(shared)).double().item()
        blind = [Row(row.input_ids, row.labels) for row in shared]
        leaking = summed_loss(model, collate(blind)).double().item()
    assert together == pytest.approx(alone, rel=1e-6)
    assert leaking != pytest.approx(alone, rel=1e-4), "one row sees the other: the check above could not fail"


def test_gradients_of_packed_rows_are_those_of_the_rows(tmp_path: Path) -> None:
    model = TinyFolder(save_tiny_model(tmp_path)).packed()
    parameters = trained_parameters(model)

    def gradients(batches: list[list[Row]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            summed_loss(model, collate(batch)).backward()
        return {name: model.get_parameter(name).grad.clone() for name in parameters}

    alone, together = gradients([[row] for row in ROWS]), gradients([packed(ROWS)])
    for name, expected in alone.items():
        assert (together[name] - expected).abs().max() <= 1e-5 * max(expected.abs().max(), 1e-3), name
