"""Whose weights a stage reads; needs no torch."""

from qlora_pipe.config import Config


def read_by(stage: str, config: Config, full_packed: str) -> tuple[str, ...]:
    """Stages whose weights `stage` reads; `source` stands for the original model, `full_packed` is the stage that the
    full decomposed model is of."""
    sparse = config.prune.sparsity.enabled
    compact = ("compact",) if config.compact.enabled else ()
    first = ("calibrate",) if compact and config.compact.init in ("auto", "feedback", "awmse") else ()
    grid = compact if config.compact.method == "l4q" else ()
    deployed = (full_packed,) if config.recover.base == "decomposed" else ()
    correcting = ("prune",) if config.recover.correction != "none" else ()
    small = ("prune", "align") if config.compensates else ("prune",)
    # The biases that pruning left are the packed model's.
    original_small = ("source", *(small if config.prune.leaves_bias else small[1:]))
    under = small if config.train.base == "packed" else original_small
    trained = compact or (*under, "train")
    moments = () if config.prune.method in ("lora", "magnitude", "random") else ("calibrate",)
    means = ("calibrate",) if config.prune.leaves_bias else ()
    original = ("source",) if sparse else ()
    guided = ("select",) if config.prune.method == "lora" else ()
    aligning = ("prune", *(("source",) if config.align.asks else ())) if config.align.enabled else ()
    found: dict[str, tuple[str, ...]] = {
        "source": ("source",),
        "calibrate": ("source",),
        "score": ("source", "calibrate"),
        "decompose": ("source", "calibrate"),
        "refine": ("source", "decompose") if config.refine.enabled else (),
        "select": (full_packed, *(moments or (means if config.prune.measures else ())), *original),
        "prune": (full_packed, *(("source", "calibrate", "select") if sparse else means)),
        "align": (*guided, *aligning),
        "train": (*under, *(("source",) if config.train.asks else ())),
        "compact": (*original_small, *first, "train") if compact else (),
        "recover": ("source", *(first if grid else ()), *under, "train", *grid, *deployed, *correcting),
        "export": ("source", "recover", *trained, *deployed),
        "evaluate": ("source", full_packed, *small, "train", *compact, "recover"),
    }
    return tuple(dict.fromkeys(found.get(stage, ())))
