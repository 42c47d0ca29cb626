"""Two gloo processes must equal one, with DDP and with FSDP2, and a run may change its number of processes."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from canon.core.lab.run import Run
from canon.core.training.distributed import leave
from canon.core.training.fit import Interrupted, TrainingConfig, fit
from tests.core.training.toy import Stream, Toy

CONFIG = TrainingConfig(
    steps=9, learning_rate=1e-2, weight_decay=0.1, ema_decay=0.9, checkpoint_every=1e9, log_every=1, precision="fp32"
)


class _StoppingAt(Stream):
    """Sends this process SIGTERM while it draws a batch, as a cluster's scheduler would."""

    def __init__(self, position: int) -> None:
        super().__init__()
        self.stop_at = position

    def __next__(self):
        if self.position == self.stop_at:
            os.kill(os.getpid(), 15)
        return super().__next__()


def _train(rank: int, processes: int, port: int, folder: str, config: TrainingConfig, stop_at: int) -> None:
    if processes > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    run = Run(folder, config)
    run.quiet = True
    try:
        stream = _StoppingAt(stop_at if rank == 0 else -1)
        fit(
            Toy(dropout=0.0),
            stream,
            run,
            config,
            evaluate=lambda model: {"fresh": float(model.loss(next(Stream()))[0])},
        )
    except Interrupted:
        assert stop_at >= 0
    else:
        assert stop_at < 0
    leave()


def train(folder: Path, processes: int, config: TrainingConfig, stop_at: int = -1) -> dict[str, torch.Tensor]:
    if processes == 1:
        _train(0, 1, 0, str(folder), config, stop_at)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(_train, (processes, port, str(folder), config, stop_at), nprocs=processes)
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_two_one_processes_end_where_one_does(tmp_path, parallel):
    config = replace(CONFIG, parallel=parallel, accumulation=2)
    straight = train(tmp_path / "toy" / "straight", 1, config)
    changing = tmp_path / "toy" / "changing"
    train(changing, 1, config, stop_at=2)
    train(changing, 2, config, stop_at=5)
    ended = train(changing, 1, config)
    assert [row["step"] for row in Run.open(changing).metrics()] == list(range(1, 10))
    for name, value in straight.items():
        torch.testing.assert_close(ended[name], value, rtol=1e-4, atol=1e-5)
    losses = [[row["loss"] for row in Run.open(path).metrics()] for path in (tmp_path / "toy" / "straight", changing)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
