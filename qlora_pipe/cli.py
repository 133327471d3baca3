"""The command line. Heavy imports happen inside the commands that need them."""

import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlora_pipe.cli_adapter import adapter
from qlora_pipe.errors import ConfigError, QloraPipeError
from qlora_pipe.known import CHAIN

if TYPE_CHECKING:
    from qlora_pipe.events import Reporter

_CONFIG = click.argument("config", type=click.Path(path_type=Path))
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
_JSON = click.option(
    "--log-json", is_flag=True, help="Every event on standard error, one JSON object a line, and nothing else."
)
_LOG = click.option(
    "--log-file",
    "log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Add every event to FILE, one JSON object a line, beside what people read.",
)


class _Group(click.Group):
    """Turns the project's errors into one paragraph and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QloraPipeError as error:
            click.echo(f"{type(error).__name__}: {error}", err=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            click.echo(f"StageError: the disk is full ({error}); free some space and run again", err=True)
        raise click.exceptions.Exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="qlora-pipe")
def main() -> None:
    """A compiler for LLM weights under a memory budget."""
    # Bars and notices of other libraries would tear ours apart.
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@main.command()
@click.option("--model", required=True, help="Hub id, folder, .gguf file or package:NAME.")
@click.option("--budget", default="3.5bits", show_default=True, help="Such as 2.75bits or 24GB.")
@click.option("--output", type=click.Path(path_type=Path), help="Where to write; default: standard output.")
def init(model: str, budget: str, output: Path | None) -> None:
    """Write a commented configuration to start from."""
    from qlora_pipe.starter import starter
    from qlora_pipe.units import parse_budget

    parse_budget(budget)
    text = starter(model, budget)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with output.open("x") as stream:
            stream.write(text)
    except FileExistsError:
        raise ConfigError(f"{output} exists already; remove it or choose another name") from None
    except OSError as error:
        raise ConfigError(f"{output}: expected a path that can be written, found {error.strerror}") from error


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration."""
    from qlora_pipe.starter import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@_CONFIG
@_SET
@click.option("--json", "as_json", is_flag=True, help="For tools.")
def plan(config: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Say what every stage reads and writes and how much memory it takes. Reads headers only."""
    from qlora_pipe.config_file import load
    from qlora_pipe.plan import make_plan, render_plan

    made = make_plan(load(config, overrides))
    click.echo(json.dumps(made.to_json(), indent=2) if as_json else render_plan(made))


@main.command()
@_CONFIG
@_SET
@_JSON
@_LOG
@click.option("--until", type=click.Choice(CHAIN), default=CHAIN[-1], show_default=True, help="Last stage.")
@click.option("--from", "start", type=click.Choice(CHAIN), help="Make this stage and all after it anew.")
def run(
    config: Path, overrides: tuple[str, ...], log_json: bool, log: Path | None, until: str, start: str | None
) -> None:
    """Run the whole chain; what is done is not done again."""
    with _opened(log_json, log) as reporter:
        _run(config, overrides, reporter, until, start)


def _stage_command(stage: str) -> Callable[..., None]:
    @main.command(name=stage, help=f"Run the chain up to {stage}.")
    @_CONFIG
    @_SET
    @_JSON
    @_LOG
    def command(config: Path, overrides: tuple[str, ...], log_json: bool, log: Path | None) -> None:
        with _opened(log_json, log) as reporter:
            _run(config, overrides, reporter, stage, None)

    return command


for _stage in CHAIN:
    _stage_command(_stage)

main.add_command(adapter)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def verify(path: Path) -> None:
    """Re-hash every file below PATH (a run or an artifact) and check what must hold inside."""
    from qlora_pipe.verify import verify_path

    for line in verify_path(path):
        click.echo(line)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--into", type=click.Path(path_type=Path), help="The new folder; default: RUN-again.")
@_JSON
@_LOG
def reproduce(run: Path, into: Path | None, log_json: bool, log: Path | None) -> None:
    """Run RUN again in a fresh folder, and compare the hash of every file. Exit code 1 if any differs. Killed, it goes
    on where it was."""
    from qlora_pipe.hf.ranks import rank
    from qlora_pipe.reproduce import reproduce

    with _opened(log_json, log) as reporter:
        table, same = reproduce(run, into or run.resolve().with_name(f"{run.resolve().name}-again"), reporter)
    if rank():
        return
    click.echo(table)
    if not same:
        raise click.exceptions.Exit(1)


@main.command(name="check-consumers")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the findings to this file too.")
def consumers(run: Path, file: Path | None) -> None:
    """Load what RUN exported with the libraries it is for, and compare logits. Exit code 1 if any differs."""
    from qlora_pipe.consumers import show_consumers

    table, holds = show_consumers(run, file)
    click.echo(table)
    if not holds:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "table", type=click.Path(path_type=Path), help="Write every vertex of the curve to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the curve in this file, .png or .svg.")
def frontier(run: Path, table: Path | None, plot: Path | None) -> None:
    """Show quality against bytes for every budget, from the error table of RUN. Reads no weight."""
    from qlora_pipe.frontier import show_frontier

    click.echo(show_frontier(run, table, plot))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def status(run: Path) -> None:
    """Say how far RUN is, who works there and how long it takes, if that is known. Writes nothing."""
    from qlora_pipe.status import show_status

    click.echo(show_status(run))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path) -> None:
    """Show what is inside PATH (a run or an artifact)."""
    from qlora_pipe.inspection import describe

    click.echo(describe(path))


def _run(config: Path, overrides: tuple[str, ...], reporter: "Reporter", until: str, start: str | None) -> None:
    from qlora_pipe.config_file import load

    settings = load(config, overrides)
    if start is not None and CHAIN.index(start) > CHAIN.index(until):
        raise click.UsageError(f"--from {start} comes after --until {until}")

    from qlora_pipe.compile import compile_model
    from qlora_pipe.hf.ranks import rank

    compile_model(settings, reporter, until=until, start=start)
    if rank():
        return
    from qlora_pipe.report import show_results, write_report

    assert settings.run is not None
    report = write_report(Path(settings.run))
    if until == CHAIN[-1]:
        click.echo(show_results(Path(settings.run)))
    click.echo(f"report: {report}")


@contextmanager
def _opened(log_json: bool, log: Path | None) -> Iterator["Reporter"]:
    from qlora_pipe.events import Reporter

    if log_json and log:
        raise click.UsageError("--log-json and --log-file are two places for the same; give one")
    if log is None:
        yield Reporter(json_lines=log_json)
        return
    try:
        stream = log.open("a")
    except OSError as error:
        raise ConfigError(f"--log-file {log}: expected a path that can be written, found {error.strerror}") from error
    try:
        yield Reporter(log=stream)
    finally:
        # What the disk has not taken so far has been told of.
        with suppress(OSError):
            stream.close()


if __name__ == "__main__":
    sys.exit(main())
