"""Targets found a layer at a time against the whole teacher; the divergence against the one over the vocabulary."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from tiny_models import TinyFolder, byte_rows
from torch import Tensor
from torch.nn import functional

from qlora_pipe.events import Reporter
from qlora_pipe.footprint import HEAD_ROWS
from qlora_pipe.hf.calibration import batches_of
from qlora_pipe.hf.distill import Targets, summed_distillation, teacher_targets
from qlora_pipe.hf.loss import summed_divergence
from qlora_pipe.hf.model import Model
from qlora_pipe.hf.sequences import IGNORED, Packer, Row, collate

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
    found = summed_distillation(targets(folder, VOCABULARY), 1.0, student, collate(ROWS)).item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_fewer_tokens_say_less(folder: TinyFolder, student: Model) -> None:
    batch = collate(ROWS)
    found = [summed_distillation(targets(folder, top), 1.0, student, batch).item() for top in (1, 8, 64, VOCABULARY)]
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
    assert summed_distillation(found, 1.0, student, collate([row])).item() == pytest.approx(expected, rel=1e-4)


def by_rows(teacher: Model, student: Model, rows: list[Row], top: int, share: float) -> Tensor:
    """The loss row by row, in fp64: probabilities of the teacher's `top` tokens and of the rest, and of the text."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels[1:])
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits[0, :-1].double().softmax(dim=-1)
        found = student(input_ids=ids).logits[0, :-1].double().softmax(dim=-1)
        for p, q, label in zip(wanted, found, labels.tolist(), strict=True):
            if label != IGNORED:
                best = p.argsort(descending=True)[:top]
                pairs = [(p[at], q[at]) for at in best] + [(1 - p[best].sum(), 1 - q[best].sum())]
                total = total + share * sum(a * (a / b).log() for a, b in pairs) - (1 - share) * q[label].log()
    return total


def test_the_teacher_has_its_share_and_the_text_the_rest(folder: TinyFolder) -> None:
    """Tolerances: 1e-4 of the loss and of the largest entry of a gradient; what is left beside the best is a
    difference of fp32 numbers."""
    rows, model, teacher = [ROWS[0], ROWS[2]], folder.dense(), folder.dense()
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight").requires_grad_()
    with torch.no_grad():
        weight.mul_(-2)
    asked = targets(folder, 6, rows)
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for share in (0.3, 1.0):
        passes.clear()
        loss = summed_distillation(asked, share, model, collate(rows))
        assert len(passes) == 1, "hidden states serve both terms"
        expected = by_rows(teacher, model, rows, 6, share)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        found, wanted = (torch.autograd.grad(each, weight)[0] for each in (loss, expected))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def packed(*lengths: tuple[int, ...]) -> list[Row]:
    """Sequences of as many tokens, which rows of these lengths share."""
    found = []
    for sizes in lengths:
        texts = ["".join(chr(97 + (size * n + n) % 26) for n in range(size)) for size in sizes]
        packer = Packer(sum(sizes))
        for row in byte_rows(texts, ignored=2):
            packer.add(row)
        found += packer.rows(len(sizes))
    return found


def test_rows_that_share_a_sequence_are_asked_alone(folder: TinyFolder, student: Model) -> None:
    """More tokens than go through a layer together: two batches have one shape, and different rows."""
    sequences = packed(*[(20 + n, 40, 180 - n) for n in range(16)], (33, 17))
    assert [row.lengths for row in sequences[:2]] == [(20, 40, 180), (21, 40, 179)]
    found, model = targets(folder, 5, sequences), folder.dense()
    assert [tuple(b.inputs["input_ids"].shape) for b in batches_of(sequences, "cpu")] == [(8, 240), (8, 240), (1, 50)]
    for sequence in sequences:
        tokens, log_probs = found.of(collate([sequence]))
        start, expected = 0, []
        for size in sequence.lengths:
            part = slice(start, start + size)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([sequence.input_ids[part]])).logits[0, :-1]
            kept = torch.tensor(sequence.labels[part][1:]) >= 0
            expected.append(logits[kept].log_softmax(dim=-1).topk(5).values)
            start += size
        torch.testing.assert_close(log_probs, torch.cat(expected), rtol=1e-5, atol=1e-4)
        assert len(tokens) == sequence.scored
    loss = partial(summed_distillation, found, 0.5, student)
    together, apart = loss(collate(sequences)).item(), sum(loss(collate([row])).item() for row in sequences)
    assert together == pytest.approx(apart, rel=1e-5)


def test_batches_may_be_made_in_any_order_and_rows_come_again(folder: TinyFolder, student: Model) -> None:
    found = partial(summed_distillation, targets(folder, 8), 0.5, student)
    total = found(collate(ROWS)).item()
    assert found(collate(ROWS[::-1])).item() == pytest.approx(total, rel=1e-5)
    assert sum(found(collate([row])).item() for row in ROWS) == pytest.approx(total, rel=1e-5)
    assert found(collate([*ROWS, *ROWS])).item() == pytest.approx(2 * total, rel=1e-5)


def test_one_text_under_two_masks_has_targets_of_both(folder: TinyFolder, student: Model) -> None:
    row = ROWS[1]
    other = Row(row.input_ids, (*[-100] * 100, *row.labels[100:]))
    both = targets(folder, 8, [row, other])
    for one in (row, other):
        alone = summed_distillation(targets(folder, 8, [one]), 1.0, student, collate([one])).item()
        assert summed_distillation(both, 1.0, student, collate([one])).item() == pytest.approx(alone, rel=1e-5)


def test_a_certain_student_has_a_finite_divergence_and_gradient(folder: TinyFolder) -> None:
    """All of its probability on one token: what is left for all others rounds to nothing."""
    model = folder.dense()
    weight = torch.nn.Parameter(1e3 * model.get_output_embeddings().weight)
    model.get_output_embeddings().weight = weight
    loss = summed_distillation(targets(folder, 1), 0.5, model, collate(ROWS))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(weight.grad).all()
