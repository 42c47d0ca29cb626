"""Two gloo processes with sharded parameters equal one, for every system: training, evaluation, what is exported."""

import dataclasses
import importlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from canon.catalog import entries
from canon.core.lab.run import Run
from canon.core.training.distributed import leave
from tests.generic.test_every_system import drawing, first_stages

SYSTEMS = {entry.id: entry.system for entry in entries() if entry.system}


def shortened(config: Any) -> Any:
    """Three steps of the laptop preset, without dropout, whose masks are each process's own, and without Muon, which
    orthogonalises small gradients in bfloat16 and so makes rounding large; tests of the training loop have it.
    """
    recipe = dataclasses.replace(
        config.training, steps=3, batch_size=4, precision="fp32", log_every=1, evaluate_every=2, parallel="fsdp",
        optimizer="adam" if config.training.optimizer == "adam" else "adamw",
    )  # fmt: skip
    dropout = {"dropout": 0.0} if hasattr(config, "dropout") else {}
    return dataclasses.replace(config, training=recipe, **dropout, **first_stages(config, 3))


def train(rank: int, processes: int, port: int, name: str, folder: str) -> None:
    """One process of a training."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    module = importlib.import_module(SYSTEMS[name])
    if processes > 1:
        drawing(module).show = lambda *_: None
    config = shortened(module.PRESETS["laptop"])
    run = Run(folder, config)
    run.quiet = True
    module.train(config, run)
    leave()


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_processes_equal_one(name, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(drawing(importlib.import_module(SYSTEMS[name])), "show", lambda *_: None, raising=False)
    train(0, 1, 0, name, str(tmp_path / "one"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train, (2, port, name, str(tmp_path / "two")), nprocs=2)
    one, two = (load_file(tmp_path / path / "model" / "model.safetensors") for path in ("one", "two"))
    assert one.keys() == two.keys()
    module = importlib.import_module(SYSTEMS[name])
    fresh = module.build(shortened(module.PRESETS["laptop"])).state_dict()
    for key, value in one.items():  # by what was learned
        if key.endswith(".k.bias"):
            continue  # it shifts all scores of a query alike, which softmax does not see: its gradient is rounding
        floor = 1e-5 * value.numel() ** 0.5  # behind layers that start at zero, first gradients are rounding
        assert (two[key] - value).norm() <= 0.02 * (value - fresh[key]).norm() + floor, key
    rows = [Run.open(tmp_path / path).metrics() for path in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]]
    for ours, theirs in zip(*rows):
        for metric in ours.keys() & theirs.keys() & {"loss", "fixed_loss", "validation_loss", "validation_nll"}:
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4), metric
