"""Golden values: twenty fixed-seed steps of every system repeat the losses recorded in `golden.json`.

A change of the model, the data order, the optimiser or the schedule shows here. Where it is meant,
`python -m tests.language.test_golden` records the losses again.
"""

import itertools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from canon.core.lab.run import Run
from canon.core.training.fit import TrainingConfig
from canon.language import gpt2, llama, transformer

RECORD = Path(__file__).with_name("golden.json")
ADAMW = TrainingConfig(
    steps=20, batch_size=8, learning_rate=3e-3, warmup_steps=5, weight_decay=0.1, log_every=1, precision="fp32"
)
SHAPE = {"vocab_size": 77, "context_length": 32, "d_model": 48, "n_layers": 3, "corpus": "shakespeare"}
GPT2 = gpt2.Config(**SHAPE, n_heads=3, dropout=0.1, tokenizer="characters", training=ADAMW)
LLAMA = llama.Config(**SHAPE, n_heads=4, n_kv_heads=2, d_ff=64, tokenizer="characters", training=ADAMW)
# Adam without decay and clipping, label smoothing and dropout, batches by length: all as in the paper but the sizes.
TRANSFORMER = replace(
    transformer.PRESETS["base"], vocab_size=300, d_model=32, n_layers=2, n_heads=4, d_ff=48, tokens_per_batch=200,
    training=replace(
        transformer.PRESETS["base"].training, steps=20, learning_rate=5e-3, warmup_steps=5, log_every=1,
        evaluate_every=0, precision="fp32",
    ),
)  # fmt: skip
# Muon orthogonalises in bfloat16, which rounds differently from one processor to the next.
CASES: dict[str, tuple[Any, Any, float]] = {
    "gpt2": (gpt2, GPT2, 1e-5),
    "gpt2 with muon": (gpt2, replace(GPT2, training=replace(ADAMW, optimizer="muon")), 1e-3),
    "llama": (llama, LLAMA, 1e-5),
    "transformer": (transformer, TRANSFORMER, 1e-5),
}


def losses(name: str, folder: Path) -> list[float]:
    """The loss of each of the twenty steps."""
    system, config, _ = CASES[name]
    if system is transformer:
        words = itertools.permutations(["one", "two", "three", "four", "five", "six", "seven"], 4)
        rows = [f"{' '.join(row)}\t{' '.join(reversed(row))}\n" for row in itertools.islice(words, 300)]
        (folder / "pairs.tsv").write_text("".join(rows))
        config = replace(config, corpus=str(folder / "pairs.tsv"))
    run = Run(folder / "run", config)
    run.quiet = True
    torch.set_num_threads(1)  # sums of several threads are rounded in another order
    system.train(config, run)
    return [row["loss"] for row in run.metrics() if "loss" in row]


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_repeat_their_recorded_losses(name: str, tmp_path: Path):
    assert losses(name, tmp_path) == pytest.approx(json.loads(RECORD.read_text())[name], rel=CASES[name][2])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as root:
        found = {}
        for case in CASES:
            (folder := Path(root) / case).mkdir()
            found[case] = [float(f"{loss:.8g}") for loss in losses(case, folder)]
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORD
    target.write_text(json.dumps(found, indent=1) + "\n")
