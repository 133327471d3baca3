"""The commands on finished adapters. Heavy imports happen inside the commands that need them."""

from pathlib import Path

import click

from qlora_pipe.errors import ConfigError

_FOLDER = click.Path(path_type=Path)
_OUTPUT = click.option("--output", type=_FOLDER, required=True, help="The folder to make; it must not be there yet.")
_DTYPE = click.option(
    "--dtype",
    type=click.Choice(("float32", "bfloat16", "float16")),
    help="What factors are stored in; default: what holds those that are given.",
)
_RANK = click.option("--rank", type=int, help="The largest rank of a matrix of the result; default: as large as it is.")
_FORCE = click.option("--force", is_flag=True, help="Though the adapters call their base by different names.")


@click.group()
def adapter() -> None:
    """Cut, add, subtract and compare PEFT LoRA folders, one matrix at a time."""


@adapter.command()
@click.argument("folder", type=_FOLDER)
@click.option("--rank", type=int, help="The largest rank that a matrix keeps.")
@click.option("--energy", type=float, help="The share of each matrix' squared singular values that is kept, as 0.99.")
@_OUTPUT
@_DTYPE
def truncate(folder: Path, rank: int | None, energy: float | None, output: Path, dtype: str | None) -> None:
    """The best adapter of lower rank for what FOLDER adds, and what it loses."""
    from qlora_pipe.adapters import operations

    click.echo(operations.truncate(folder, output, operations.Cut(rank, energy), dtype))


@adapter.command()
@click.argument("folders", type=_FOLDER, nargs=-1, required=True)
@click.option("--weights", help="One for each folder, as 1,0.5; default: 1.")
@_RANK
@_OUTPUT
@_DTYPE
@_FORCE
def add(
    folders: tuple[Path, ...], weights: str | None, rank: int | None, output: Path, dtype: str | None, force: bool
) -> None:
    """The weighted sum of FOLDERS, of their ranks together: exact unless --rank cuts it."""
    from qlora_pipe.adapters import operations

    try:
        given = [1.0] * len(folders) if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights: expected numbers such as 1,0.5, found {weights!r}") from error
    click.echo(operations.add(folders, given, output, operations.Cut(rank), dtype, force))


@adapter.command()
@click.argument("trained", type=_FOLDER)
@click.argument("init", type=_FOLDER)
@_RANK
@_OUTPUT
@_DTYPE
@_FORCE
def subtract(trained: Path, init: Path, rank: int | None, output: Path, dtype: str | None, force: bool) -> None:
    """What training changed: TRAINED less INIT, as it was saved before. For inits that take a part out of the base
    (PiSSA, OLoRA, CorDA, LoRA-GA), the result is an adapter of the original base; for LoftQ it is approximately one,
    as base and INIT add up to the original but for a residual."""
    from qlora_pipe.adapters import operations

    click.echo(operations.subtract(trained, init, output, operations.Cut(rank), dtype, force))


@adapter.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@click.option("--base", type=_FOLDER, help="The model's folder, also a packed one: count intruder dimensions too.")
@click.option("--top", default=10, show_default=True, help="Leading singular vectors of a matrix that are looked at.")
@click.option("--threshold", default=0.5, show_default=True, help="An intruder's cosines with the base's are below.")
@click.option("--json", "file", type=_FOLDER, help="Write the figures to this file too.")
def compare(a: Path, b: Path, base: Path | None, top: int, threshold: float, file: Path | None) -> None:
    """Norms, cosine and subspace overlap of what A and B add to each matrix. With --base, an SVD of each matrix
    without and with each adapter is needed, one at a time."""
    from qlora_pipe.adapters.comparison import compare
    from qlora_pipe.events import Reporter

    click.echo(compare(a, b, base=base, top=top, threshold=threshold, file=file, reporter=Reporter()))
