"""Targets found a layer at a time against the whole teacher; the divergence against the one over the vocabulary."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows
from torch.nn import functional

from qlora_pipe.events import Reporter
from qlora_pipe.hf.distill import Targets, summed_distillation, teacher_targets
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import Row, collate
from qlora_pipe.memory import HEAD_ROWS

VOCABULARY = 260
CHANGES = {
    "llama": {},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32, "final_logit_softcapping": 2.0},
}
ROWS = byte_rows(["a short row of text", "x" * 180 + "and a much longer one", "the third", "y z " * 40], ignored=3)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    return TinyFolder(save_tiny_model(tmp_path_factory.mktemp("model"), request.param, **CHANGES[request.param]))


@pytest.fixture(scope="module")
def student(folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Another model of the same family."""
    family, place = folder.dense().config.model_type, tmp_path_factory.mktemp("student")
    return TinyFolder(save_tiny_model(place, family, initializer_range=0.1, **CHANGES[family])).dense()


def targets(folder: TinyFolder, top: int, rows: list[Row] = ROWS) -> Targets:
    return teacher_targets(folder.stream(), rows, top, Path(tempfile.gettempdir()), Reporter(json_lines=True))


def test_targets_are_the_teachers_most_likely_tokens(folder: TinyFolder) -> None:
    """1e-5: fp32 sums in another order."""
    found, model = targets(folder, 5), folder.dense()
    assert len(found.tokens) == sum(row.scored for row in ROWS) > HEAD_ROWS, "more than one part of the head"
    for row in ROWS:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        kept = torch.tensor(row.labels[1:]) >= 0
        expected = logits[kept].log_softmax(dim=-1).topk(5)
        tokens, log_probs = found.of(collate([row]))
        assert torch.equal(tokens, expected.indices)
        torch.testing.assert_close(log_probs, expected.values, rtol=1e-5, atol=1e-5)


def test_over_the_whole_vocabulary_it_is_the_divergence(folder: TinyFolder, student: Model) -> None:
    expected = summed_divergence(folder.dense(), student, collate(ROWS)).item()
    assert expected > 1
    found = summed_distillation(targets(folder, VOCABULARY), student, collate(ROWS)).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_fewer_tokens_say_less(folder: TinyFolder, student: Model) -> None:
    batch = collate(ROWS)
    found = [summed_distillation(targets(folder, top), student, batch).item() for top in (1, 8, 64, VOCABULARY)]
    assert sorted(found) == found
    assert found[0] < 0.5 * found[-1]


def test_all_other_tokens_count_together(folder: TinyFolder, student: Model) -> None:
    row = ROWS[2]
    found = targets(folder, 3, [row])
    with torch.no_grad():
        teacher, other = (m(input_ids=torch.tensor([row.input_ids])).logits[0, :-1] for m in (folder.dense(), student))
    kept = torch.tensor(row.labels[1:]) >= 0
    p, q = (logits[kept].double().softmax(dim=-1) for logits in (teacher, other))
    best = p.topk(3).indices
    singly = [probs.gather(1, best) for probs in (p, q)]
    wanted, got = (torch.cat([probs, 1 - probs.sum(dim=1, keepdim=True)], dim=1) for probs in singly)
    expected = functional.kl_div(got.log(), wanted, reduction="sum").item()
    assert summed_distillation(found, student, collate([row])).item() == pytest.approx(expected, rel=1e-4)


def test_batches_may_be_made_in_any_order(folder: TinyFolder, student: Model) -> None:
    found = partial(summed_distillation, targets(folder, 8), student)
    total = found(collate(ROWS)).item()
    assert found(collate(ROWS[::-1])).item() == pytest.approx(total, rel=1e-5)
    assert sum(found(collate([row])).item() for row in ROWS) == pytest.approx(total, rel=1e-5)


def test_one_text_under_two_masks_has_targets_of_both(folder: TinyFolder, student: Model) -> None:
    row = ROWS[1]
    other = Row(row.input_ids, (*[-100] * 100, *row.labels[100:]))
    both = targets(folder, 8, [row, other])
    for one in (row, other):
        alone = summed_distillation(targets(folder, 8, [one]), student, collate([one])).item()
        assert summed_distillation(both, student, collate([one])).item() == pytest.approx(alone, rel=1e-5)


def test_a_certain_student_has_a_finite_divergence_and_gradient(folder: TinyFolder) -> None:
    """All of its probability on one token: what is left for all others rounds to nothing."""
    model = folder.dense()
    weight = torch.nn.Parameter(1e3 * model.get_output_embeddings().weight)
    model.get_output_embeddings().weight = weight
    loss = summed_distillation(targets(folder, 1), model, collate(ROWS))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(weight.grad).all()
