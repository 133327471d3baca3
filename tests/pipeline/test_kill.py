"""SIGKILL at random moments, then run again: the hashes are those of the undisturbed run."""

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from tiny import save_settings, save_texts, save_tiny_model

from qlora_pipe.artifacts.manifest import read_manifest
from qlora_pipe.known import CHAIN

KILLS = 20


def run_chain(config: Path, run: Path) -> None:
    """The work of `qlora-pipe run`, in a process that may die."""
    from qlora_pipe.compile import compile_model
    from qlora_pipe.config_file import load
    from qlora_pipe.events import Reporter

    compile_model(load(config, (f"run={run}",)), Reporter(json_lines=True))


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    """Processes that start with the heavy imports done: they are killed in the chain, not while importing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qlora_pipe.compile", "transformers.trainer"])
    return context


def hashes(run: Path) -> dict[str, dict[str, str]]:
    return {
        stage: {
            name: entry.sha256
            for name, entry in read_manifest(run / stage).files.items()
            # It names the run's own base folder.
            if name != "peft/adapter_config.json"
        }
        for stage in CHAIN
    }


def test_sigkill_at_random_moments_changes_no_hash(tmp_path: Path, server: ForkServerContext) -> None:
    save_tiny_model(tmp_path / "model")
    save_texts(tmp_path)
    config = save_settings(tmp_path, train={"teacher": "original"}, compact={"block_rows": 2})

    started = time.monotonic()
    calm = server.Process(target=run_chain, args=(config, tmp_path / "calm"))
    calm.start()
    calm.join()
    assert calm.exitcode == 0
    took = time.monotonic() - started
    expected = hashes(tmp_path / "calm")

    seed = random.randrange(2**32)
    moments = random.Random(seed)
    killed, finished, stages_reached = 0, 0, set()
    run = tmp_path / "killed"
    while killed < KILLS:
        process = server.Process(target=run_chain, args=(config, run))
        process.start()
        # Most of a resumed run is work it has left; short delays keep the kills inside the chain.
        process.join(moments.uniform(0.1, 0.4) * took)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            stages_reached |= {stage for stage in CHAIN if (run / stage).exists()}
        else:
            assert process.exitcode == 0, f"seed {seed}"
            assert hashes(run) == expected, f"seed {seed}"
            finished += 1
            run = tmp_path / f"killed-{finished}"
    last = server.Process(target=run_chain, args=(config, run))
    last.start()
    last.join()
    assert last.exitcode == 0, f"seed {seed}"
    assert hashes(run) == expected, f"seed {seed}"
    assert len(stages_reached) > len(CHAIN) // 2, f"seed {seed}: kills fell into {stages_reached} only"
