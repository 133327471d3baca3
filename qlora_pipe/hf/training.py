"""transformers' Trainer over a frozen model with trainable slots: resume to the same bytes, stop on a NaN loss."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qlora_pipe.artifacts.manifest import file_digest
from qlora_pipe.config_training import Optimisation
from qlora_pipe.errors import StageError
from qlora_pipe.events import Reporter
from qlora_pipe.hf import ranks
from qlora_pipe.hf.loss import summed_loss
from qlora_pipe.hf.sequences import Row, collate
from quant.fakequant import MIN_TRAINED_STEP, L4QLinear


class Watch(Protocol):
    """Takes part in a training: sees the gradients of every step, and has a state that checkpoints keep."""

    def before_step(self, step: int) -> None:
        """Called with the number of the step, from 0, when its gradients are there and nothing has moved yet."""

    def after_last_step(self) -> None:
        """Called when all steps are made."""

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""


SummedLoss = Callable[[PreTrainedModel, dict[str, Tensor]], Tensor]
"""(model, batch) to the loss summed over the scored tokens of the batch."""

_SLOTS = "slots.safetensors"
_WATCH = "watch.safetensors"
_WHOLE = "whole.json"
_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}


def train(
    model: PreTrainedModel,
    rows: Sequence[Row],
    settings: Optimisation,
    *,
    work: Path,
    seed: int,
    device: str,
    reporter: Reporter,
    step_rate: float | None = None,
    loss: SummedLoss = summed_loss,
    watch: Watch | None = None,
) -> list[dict[str, float]]:
    """Train every parameter that requires a gradient; returns the log, one {step, loss, ...} per optimiser step.

    `loss` is summed over the scored tokens of a batch. Parameters named `scale` or `offset` (L4Q step sizes) learn at
    `step_rate` and do not decay. Goes on from the last whole checkpoint in `work`. Of several processes each makes its
    share of the passes of every step (DDP); all call this alike. Peak bytes: the model, four fp32 copies of the trained
    parameters (value, gradient, two moments), one more for DDP, activations of one batch.
    """
    with ExitStack() as stack:
        trainer = _SlotTrainer(
            model=_Objective(model, loss),
            args=_arguments(settings, work, seed, device),
            train_dataset=list(rows),
            data_collator=collate,
            callbacks=[_Steps(reporter, settings.steps, stack, watch)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.step_rate = step_rate
        trainer.watch = watch
        trainer.train(resume_from_checkpoint=ranks.agree(partial(_last_whole_checkpoint, work)))
    if watch is not None:
        watch.after_last_step()
    _check_finite(model, settings.steps)
    keep = ("step", "loss", "learning_rate", "grad_norm")
    return [{key: row[key] for key in keep if key in row} for row in trainer.state.log_history if "loss" in row]


def _arguments(settings: Optimisation, work: Path, seed: int, device: str) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation // ranks.count(),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        optim=_OPTIMIZERS[settings.optimizer],
        activation_checkpointing=settings.activation_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.activation_checkpointing else None,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        # All that is trained takes part in every pass; buffers are the packed weights, which nothing changes.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=False,
    )
    if arguments.device.type != "cpu":
        # Otherwise the Trainer would wrap the model in DataParallel over every device of the machine.
        arguments._n_gpu = 1
    return arguments


class _Objective(nn.Module):
    """A model and what is asked of it as one module: what DDP wraps must see the whole forward pass."""

    accepts_loss_kwargs = True
    # By this the Trainer knows that the first label of a row is not scored, and does not count it.
    loss_type = "ForCausalLM"

    def __init__(self, model: PreTrainedModel, summed: SummedLoss) -> None:
        super().__init__()
        self.model, self._summed = model, summed

    def forward(self, **batch: Tensor) -> Tensor:
        return self._summed(self.model, batch)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.model.activation_checkpointing_enable(**options)


class _SlotTrainer(Trainer):
    """Saves and loads the trained parameters only; the frozen base is on disk already."""

    model: _Objective
    step_rate: float | None = None
    watch: Watch | None = None
    optimizer: torch.optim.Optimizer | None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the scored tokens of the whole optimiser step, so that accumulation changes nothing, and neither
        do several processes, over which gradients are averaged."""
        count = (inputs["labels"][:, 1:] >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        loss = model(**inputs) / count * ranks.count()
        if not torch.isfinite(loss):
            numbers = ", ".join(map(str, _numbers(self.train_dataset, inputs["input_ids"])))
            raise StageError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on the training rows {numbers} (from "
                "0, as read); the last whole checkpoint of these settings is kept: lower the learning rate and run "
                "again, or look at these rows"
            )
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Adapter factors with weight decay; step sizes with their own rate and none."""
        if self.optimizer is None:
            factors, steps = factors_and_steps(self.model)
            groups: list[dict[str, Any]] = [{"params": factors, "weight_decay": self.args.weight_decay}]
            if steps:
                groups.append({"params": steps, "weight_decay": 0.0, "lr": self.step_rate})
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_parameters(self.model.model), folder / _SLOTS)
        if self.watch is not None:
            save_file(self.watch.state(), folder / _WATCH)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _SLOTS)
        with torch.no_grad():
            for name, tensor in trained_parameters(self.model.model).items():
                tensor.copy_(saved[name])
        if self.watch is not None:
            self.watch.load(load_file(Path(resume_from_checkpoint) / _WATCH))


class _Steps(TrainerCallback):
    """Progress, positive step sizes, and the mark that makes a checkpoint whole."""

    def __init__(self, reporter: Reporter, steps: int, stack: ExitStack, watch: Watch | None) -> None:
        self._reporter, self._steps, self._stack, self._watch = reporter, steps, stack, watch
        self._raised = Counter[str]()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self._reporter.event("resume", f"going on from step {state.global_step} of {self._steps}")
        # The Trainer says nothing when it fails; the stack closes the bar all the same.
        self._advance = self._stack.enter_context(self._reporter.progress("training", self._steps - state.global_step))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._watch is not None:
            self._watch.before_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, module in kwargs["model"].named_modules():
            if isinstance(module, L4QLinear):
                self._raised[name.removeprefix("model.")] += module.clamp_steps_()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._advance()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if total := self._raised.total():
            name, count = self._raised.most_common(1)[0]
            self._reporter.event(
                "steps",
                f"step sizes were raised to the floor of {MIN_TRAINED_STEP:g} {total} times, most often in {name} "
                f"({count}): lower the rate of the step sizes (compact.step_rate)",
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks.wait()  # each process has written its random state
        if ranks.rank():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != _WHOLE}
        (folder / _WHOLE).write_text(json.dumps(files))


def _numbers(rows: Sequence[Row], batch: Tensor) -> list[int]:
    """Which of the rows are in a padded batch of token ids."""
    found, width = {tuple(ids) for ids in batch.tolist()}, batch.shape[1]
    return [n for n, row in enumerate(rows) if (*row.input_ids, *[0] * (width - len(row.input_ids))) in found]


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Name and value of every parameter that requires a gradient."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def factors_and_steps(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All that requires a gradient: first what is no step size or offset of L4Q, then these, which learn at a rate of
    their own."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    steps = [parameter for name, parameter in named if name.endswith((".scale", ".offset"))]
    return [parameter for name, parameter in named if not name.endswith((".scale", ".offset"))], steps


def _check_finite(model: nn.Module, step: int) -> None:
    """The loss of a step is that before it: what the last step did to the parameters no loss has shown yet."""
    for name, tensor in trained_parameters(model).items():
        if not torch.isfinite(tensor).all():
            raise StageError(f"after step {step} {name} is not finite; lower the learning rate and run again")


def _last_whole_checkpoint(work: Path) -> str | None:
    """The newest checkpoint whose files all match its mark; anything else was cut short and is removed."""
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    whole = None
    for folder in found:
        if whole is None and _is_whole(folder):
            whole = folder
        elif not _is_whole(folder):
            shutil.rmtree(folder)
    return str(whole) if whole else None


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / _WHOLE).read_text())
        return all(file_digest(folder / name) == value for name, value in files.items())
    except (OSError, ValueError, AttributeError):
        return False
