"""A run folder as the compiler leaves it, made in a moment: real manifests and tensors, invented figures."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prune.groups import LayerShape, shape_of
from prune.indexmap import IndexMap, LayerKept
from prune.scatter import scatter_adapter
from qlora_pipe import layouts
from qlora_pipe.architectures import FAMILIES, Architecture, linear_name
from qlora_pipe.artifacts.layout import Layout
from qlora_pipe.artifacts.store import Store, Ticket
from qlora_pipe.artifacts.tensors import TensorWriter, torch_dtype_of
from qlora_pipe.config import Config
from qlora_pipe.config_export import IntegerFormat
from qlora_pipe.config_file import resolved_yaml
from qlora_pipe.exporters import compressed_tensors, gptq
from qlora_pipe.exporters.gptq import ZERO_SHIFT
from qlora_pipe.known import CHAIN, Known
from qlora_pipe.selection import record, scores_to_json, tabulate
from quant.interchange import compressed_tensors_buffers, gptq_buffers
from quant.storage import Choice

INPUTS = {
    "source": (),
    "calibrate": ("source",),
    "score": ("source", "calibrate"),
    "allocate": ("score",),
    "decompose": ("source", "calibrate", "allocate"),
    "refine": ("source", "allocate", "decompose"),
    "select": ("source", "calibrate", "allocate", "decompose", "refine"),
    "prune": ("source", "calibrate", "allocate", "decompose", "refine", "select"),
    "align": ("source", "allocate", "select", "prune"),
    "train": ("source", "allocate", "select", "prune", "align"),
    "compact": ("source", "calibrate", "select", "prune", "align", "train"),
    "recover": (
        "source",
        "calibrate",
        "allocate",
        "decompose",
        "refine",
        "select",
        "prune",
        "align",
        "train",
        "compact",
    ),
    "export": ("source", "allocate", "decompose", "refine", "select", "prune", "align", "train", "compact", "recover"),
    "evaluate": (
        "source",
        "allocate",
        "decompose",
        "refine",
        "select",
        "prune",
        "align",
        "train",
        "compact",
        "recover",
    ),
}
PERPLEXITY = {
    "base": 21.4,
    "decomposed": 22.9,
    "pruned": 48.2,
    "trained-small": 19.3,
    "compact": 18.7,
    "full+recovered": 14.2,
    "decomposed+recovered": 15.6,
}

Edit = Callable[[Any], Any]


class RunBuilder:
    """Builds a run of a tiny model; `edits` change a JSON document (by "stage/name") before it is committed."""

    def __init__(
        self,
        run: Path,
        *,
        layers: int = 3,
        evaluation: tuple[str, ...] = ("c4",),
        compact: bool = True,
        formats: tuple[str, ...] = ("compressed-tensors",),
        edits: Mapping[str, Edit] | None = None,
        tamper: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        model: str = "package:tiny",
    ) -> None:
        data = {name: {"source": f"{name}.txt"} for name in evaluation}
        self.config = Config.model_validate(
            {
                "model": model,
                "run": str(run),
                "data": {"calibration": "a.txt", "task": "b.txt", "evaluation": data},
                "decompose": {"ranks": (4,)},
                "train": {"rank": 4},
                "compact": {
                    "enabled": compact,
                    "group_size": 32,
                    "rules": [{"roles": ["up"], "bits": 3}, {"roles": ["down"], "bits": 8}],
                },
                "export": {"integer": formats if compact else None},
                "prune": {"ffn_ratio": 0.5},
            }
        )
        shape = LayerShape(hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128)
        architecture = Architecture("llama", FAMILIES[0], 48, (shape,) * layers, True, frozenset())
        names = [name for _, _, name in architecture.linears()]
        ladder = [Choice("nf", *sizes, 4) for sizes in ((2, 64), (3, 64), (3, 32), (4, 64), (8, 32))]
        # Tied roles alike, the ends of the model dearer than its middle.
        allocation = {
            name: ladder[(2 * (layer in (0, layers - 1)) + layer + {"o": 1, "down": 2}.get(role, 0)) % 5]
            for name, (layer, role, _) in zip(names, architecture.linears(), strict=True)
        }
        self.known = Known(self.config, architecture, {}, allocation, allocation_is_final=True)
        self.kept = IndexMap((LayerKept((0, 1), (*range(0, 128, 2),)),) * layers, architecture.layers)
        self.store, self.run = Store(run), run
        self.edits, self.tamper = edits or {}, tamper or {}
        self.generator = torch.Generator().manual_seed(0)
        self.identities: dict[str, str] = {}

    def build(self, until: str = CHAIN[-1]) -> Path:
        with self.store.lock():
            for stage in CHAIN[: CHAIN.index(until) + 1]:
                self.make(stage)
        (self.run / "config.yaml").write_text(resolved_yaml(self.config))
        stats = {
            stage: {"seconds": 3.7 * number + 1.26, "peak_bytes": int(6e8 + 1.1e8 * number)}
            for number, stage in enumerate(self.identities)
        }
        (self.run / "stats.json").write_text(json.dumps(stats))
        plans = [{"name": stage, "host_peak": int(6.2e8 + 1.05e8 * n)} for n, stage in enumerate(CHAIN)]
        (self.run / "plan.json").write_text(json.dumps({"exact": True, "stages": plans}))
        return self.run

    def make(self, stage: str, settings: Mapping[str, Any] | None = None) -> None:
        """Commit one stage from what its inputs are now."""
        inputs = {name: self.identities[name] for name in INPUTS[stage]} or {"model": "0" * 64}
        ticket = Ticket(stage, 1, dict(settings or {"seed": 0}), inputs)
        with self.store.writing(ticket) as out:
            getattr(self, f"_{stage}")(out)
            self.identities[stage] = self.store.commit(ticket, out, self.known.files(stage)).identity

    def _source(self, out: Path) -> None:
        self._json(out, "source", "source.json", {"model_type": "llama", "layers": 3, "hidden": 64})

    def _calibrate(self, out: Path) -> None:
        self._tensors(out, self.known.moments(), "moments")

    def _rows(self) -> dict[str, dict[str, Any]]:
        found = {}
        for number, (layer, role, name) in enumerate(self.known.architecture.linears()):
            choice = self.known.allocation[name]
            shape = layouts.packed_shape(self.known.architecture, layer, role, choice)
            loss = 0.01 * (number + 1) / choice.bits**2
            found[name] = choice.to_json() | {"bytes": layouts.packed_bytes(shape), "loss": loss, "error": loss / 50}
        return found

    def _score(self, out: Path) -> None:
        self._json(out, "score", "table.json", {name: [row] for name, row in self._rows().items()})

    def _allocate(self, out: Path) -> None:
        rows = self._rows()
        cost, loss = sum(row["bytes"] for row in rows.values()), math.fsum(row["loss"] for row in rows.values())
        body = {
            "budget_bytes": cost + 37,
            "bytes": cost,
            "bits_per_weight": 8 * cost / self.known.architecture.linear_weights(),
            "loss": loss,
            "loss_error": math.hypot(*(row["error"] for row in rows.values())),
            "bound": loss,
            "gap": 0.0,
            "multiplier": 0.0,
            "optimal": True,
            "method": "hull",
            "ties": [
                [linear_name(layer, role) for role in roles]
                for layer in range(len(self.known.architecture.layers))
                for roles in (("q", "k", "v"), ("gate", "up"))
            ],
            "rules": [],
            "fixed": [],
            "floored": {},
            "choices": rows,
        }
        self._json(out, "allocate", "allocation.json", body)

    def _decompose(self, out: Path) -> None:
        self._tensors(out, self.known.decomposed())

    def _refine(self, out: Path) -> None:
        self._json(out, "refine", "skipped.json", {"reason": "refine.enabled is false"})

    def _select(self, out: Path) -> None:
        settings, architecture = self.config.prune, self.known.architecture
        generator = torch.Generator().manual_seed(1)
        even = torch.arange(128, dtype=torch.float64).remainder(2) == 0
        scores = [
            {
                "kv": torch.tensor([2.0, 1.0], dtype=torch.float64),
                "ffn": even + torch.rand(128, generator=generator, dtype=torch.float64) / 2,
            }
            for _ in architecture.layers
        ]
        table = tabulate(scores, architecture, settings)
        body = record(table, self.kept, None, architecture, settings, "0" * 64)
        self._json(out, "select", "scores.json", scores_to_json(scores))
        self._json(out, "select", "table.json", table)
        self._json(out, "select", "kept.json", self.kept.to_json())
        self._json(out, "select", "selection.json", body)

    def _prune(self, out: Path) -> None:
        self._tensors(out, self.known.pruned())

    def _align(self, out: Path) -> None:
        self._json(out, "align", "skipped.json", {"reason": "align.enabled is false"})

    def _train(self, out: Path) -> None:
        self.small = self._tensors(out, self.known.adapter(), "adapter")
        self._json(out, "train", "history.json", self._history(2.9))

    def _compact(self, out: Path) -> None:
        if not self.config.compact.enabled:
            self._json(out, "compact", "skipped.json", {"reason": "compact.enabled is false"})
            return
        self.integers = self._tensors(out, self.known.integers())
        self.compact = self._tensors(out, self.known.compact_adapter(), "adapter")
        self._json(out, "compact", "history.json", self._history(2.4))

    def _recover(self, out: Path) -> None:
        self._scatter(out, "adapter", self.known.full_adapter(), self.small)
        losses = {"0.0": 3.06, "0.25": 2.9, "0.5": 2.77, "0.75": 2.69, "1.0": 2.65, "1.25": 2.67}
        body = {
            "base": "original",
            "scale": 1.0,
            "tau": 0.83,
            "losses": {"full": 3.06, "full_adapted": 2.65, "small": 3.9, "small_adapted": 2.95},
            "loss_by_scale": losses,
            "rows": 24,
            "tokens": 2211,
            "index_map": self.kept.digest(),
        }
        if self.config.compact.enabled:
            self._scatter(out, "compact_adapter", self.known.full_compact_adapter(), self.compact)
            body["unquantise_gap"] = {"gap": 0.0213, "gain": 0.21, "share": 0.101}
        self._json(out, "recover", "recovery.json", body)

    def _export(self, out: Path) -> None:
        formats = [name for name, reason in self.known.integer_formats.items() if reason is None]
        for folder in ("peft", "merged", "small", *formats):
            (out / folder).mkdir()
        peft = layouts.peft_adapter(self.known.architecture, self.config.train.rank)
        self._tensors(out / "peft", peft, "adapter_model")
        self._tensors(out / "merged", layouts.dense(self.known.architecture, "float32"))
        self._tensors(out / "small", layouts.dense(self.known.small, "float32"))
        for name in formats:
            self._integer_model(out, name)

    def _integer_model(self, out: Path, name: IntegerFormat) -> None:
        """Codes and steps of compact; of all else, tensors of their own."""
        bits, layout, values = self.known.integer_bits, self.known.exported_integers(name), dict[str, Tensor]()
        for linear, width in bits.items():
            words, steps = (self.integers[f"{linear}.{kind}"] for kind in ("codes", "scale"))
            if name == "compressed-tensors":
                buffers = compressed_tensors_buffers(words, steps, width, 32)
            else:
                buffers = gptq_buffers(words, steps.half(), width, 32, ZERO_SHIFT[name])
            values |= {f"{linear}.{buffer}": tensor for buffer, tensor in buffers.items()}
        values |= {key: torch.ones(spec.shape) for key, spec in layout.items() if key not in values}
        self._tensors(out / name, layout, values=values)
        told = (
            compressed_tensors.quantization_config(bits, 32)
            if name == "compressed-tensors"
            else gptq.quantization_config(name, bits, 32)
        )
        self._json(out / name, f"export/{name}", "config.json", {"quantization_config": told})

    def _evaluate(self, out: Path) -> None:
        bits = {"base": 32.0, "full+recovered": 33.9}
        rows = [
            {
                "model": model,
                "dataset": dataset,
                "perplexity": value * (1 + 0.9 * number),
                "loss": math.log(value),
                "tokens": 4096,
                "bits_per_weight": bits.get(model, 3.51),
                "bytes": 538_000_000 if model in bits else 91_400_000,
            }
            for model, value in PERPLEXITY.items()
            for number, dataset in enumerate(("task", *self.config.data.evaluation))
            if model != "compact" or self.config.compact.enabled
        ]
        self._json(out, "evaluate", "metrics.json", rows)

    def _history(self, start: float) -> list[dict[str, float]]:
        noise = torch.randn(100, generator=self.generator).tolist()
        return [
            {"step": step, "loss": 1.9 + (start - 1.9) / (1 + step / 15) + 0.12 * noise[step - 1]}
            for step in range(1, 101)
        ]

    def _scatter(self, out: Path, stem: str, layout: Layout, small: Mapping[str, Tensor]) -> None:
        full: dict[str, Tensor] = {}
        for layer, role, name in self.known.architecture.linears():
            shape = shape_of(role, self.known.architecture.layers[layer])
            keys = [f"{name}.lora_{side}.weight" for side in "AB"]
            kept = self.kept.kept_indices(layer, role)
            full |= zip(keys, scatter_adapter(*(small[key] for key in keys), role, kept, shape), strict=True)
        self._tensors(out, layout, stem, full)

    def _tensors(
        self, out: Path, layout: Layout, stem: str = "model", values: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        found = {}
        with TensorWriter(out, layout, stem=stem) as writer:
            for name, spec in layout.items():
                tensor = values[name] if values else torch.rand(spec.shape, generator=self.generator) + 0.01
                tensor = tensor.sort().values if name.endswith(".levels") else tensor
                change = self.tamper.get(f"{out.name.partition('-')[0]}/{stem}/{name}", lambda same: same)
                found[name] = change(tensor.to(torch_dtype_of(spec.dtype)))
                writer.write(name, found[name])
        return found

    def _json(self, out: Path, stage: str, name: str, body: Any) -> None:
        edit = self.edits.get(f"{stage}/{name}", lambda same: same)
        (out / name).write_text(json.dumps(edit(body)))


@pytest.fixture
def run_builder(tmp_path: Path) -> Callable[..., RunBuilder]:
    """Makes a RunBuilder for a run folder of this test; keyword arguments as there."""

    def make(**options: Any) -> RunBuilder:
        return RunBuilder(tmp_path / "run", **options)

    return make
