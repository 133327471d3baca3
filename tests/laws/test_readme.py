"""The README names only commands and files that exist."""

import re
from collections.abc import Iterable
from pathlib import Path

from qlora_pipe.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def code(markdown: str) -> list[str]:
    """Lines of fenced blocks, and inline code."""
    fence = re.compile(r"^```.*?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in fence.findall(markdown) for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", fence.sub("", markdown))


def named(program: str, lines: Iterable[str]) -> set[str]:
    """First words behind `program` where it is called."""
    call = re.compile(rf"(?:^|&& |\$ |[\w./]*/){re.escape(program)} ((?:[A-Z_]+=\S* )*)([a-z][\w-]*)")
    return {match[2] for line in lines for match in call.finditer(line)}


def missing_targets(targets: Iterable[str], makefile: str) -> set[str]:
    rules = re.findall(r"^([a-z][\w%-]*):", makefile, re.MULTILINE)
    patterns = [re.compile(re.escape(rule).replace("%", ".+")) for rule in rules]
    return {target for target in targets if not any(pattern.fullmatch(target) for pattern in patterns)}


def test_make_targets_exist() -> None:
    targets = named("make", code(README))
    assert {"demo", "test"} <= targets
    assert missing_targets(targets, MAKEFILE) == set()


def test_commands_exist() -> None:
    commands = named("qlora-pipe", code(README))
    assert {"run", "plan", "init"} <= commands
    assert commands <= set(main.commands)


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    files = [word for line in code(README) for word in re.findall(r"\b(?:examples|docs|benchmarks)/[\w./-]+", line)]
    assert [name for name in (*links, *files) if not (ROOT / name).exists()] == []


def test_the_law_sees_what_is_missing() -> None:
    lines = code("Do make nothing, but `make demo`.\n\n```sh\nmake PYTHON=python3.12 lost\nqlora-pipe plan x\n```\n")
    assert named("make", lines) == {"demo", "lost"}
    assert named("qlora-pipe", lines) == {"plan"}
    assert missing_targets({"demo", "lost", "bench-x"}, "demo: a\n\tb\nbench-%: c\n") == {"lost"}
