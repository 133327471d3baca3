"""source: pin down the model, file by file."""

from qlora_pipe.artifacts.manifest import file_digest
from qlora_pipe.sources import model_files, read_config
from qlora_pipe.stages.base import Context, Stage


def run(context: Context) -> None:
    """Write the hash of every file of the base model, so that a run says what it was made from."""
    shape = context.known.architecture.layers[0]
    context.write_json(
        "source.json",
        {
            "model": context.config.model,
            "model_type": context.known.architecture.model_type,
            "license": read_config(context.base).get("license"),
            "layers": len(context.known.architecture.layers),
            "hidden": shape.hidden,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "ffn": shape.ffn,
            "files": {
                path.name: {"sha256": file_digest(path), "bytes": path.stat().st_size}
                for path in model_files(context.base)
            },
        },
    )


STAGE = Stage("source", 1, (), lambda config: {"model": config.model}, run)
