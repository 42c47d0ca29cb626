"""SIGKILL at twenty random moments: the run always goes on, and ends with the weights of an unbroken one."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ARGUMENTS = [
    *("train", "gpt2", "--steps", "500", "--d-model", "32", "--n-layers", "2", "--n-heads", "2"),
    *("--context-length", "32", "--batch-size", "8", "--threads", "1", "--checkpoint-every", "0.02", "--json"),
]


def _command(folder: str, arguments: list[str]) -> None:
    os.chdir(folder)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    from canon import cli

    cli.main(arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked from one that has imported torch")
def test_killed_twenty_times_ends_bit_identical(tmp_path: Path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["canon.language.gpt2", "canon.cli", "torch.utils.tensorboard"])

    def start(*more: str):
        process = context.Process(target=_command, args=(str(tmp_path), [*ARGUMENTS, *more]))
        process.start()
        return process

    straight = start("--name", "straight")
    straight.join()
    assert straight.exitcode == 0

    moments, folder = random.Random(0), tmp_path / "runs" / "gpt2" / "killed"
    for attempt in range(20):
        process = start("--name", "killed", *(["--resume"] if (folder / "config.json").is_file() else []))
        if attempt % 2:  # at any moment, mostly while it starts; else while it trains and writes checkpoints
            time.sleep(moments.uniform(0, 1))
        else:
            before = set(folder.glob("checkpoint/step-*"))
            while process.is_alive() and set(folder.glob("checkpoint/step-*")) <= before:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.2))
        assert process.exitcode is None, "the run finished before it could be killed"
        process.kill()
        process.join()
    last = start("--name", "killed", "--resume")
    last.join()
    assert last.exitcode == 0
    weights = [
        load_file(tmp_path / "runs" / "gpt2" / name / "model" / "model.safetensors") for name in ("straight", "killed")
    ]
    for name, value in weights[0].items():
        assert value.equal(weights[1][name]), name
