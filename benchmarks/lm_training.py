"""How fast a small language model learns: nanoGPT's CPU recipe against Canon's ``laptop`` preset, in turn.

    python -m benchmarks lm_training [--rounds 3] [--threads 2] [--json]

Both sides learn the same characters (the first 1,115,394 of Shakespeare, as many as nanoGPT's own file has; 90 %
to train on, the rest to validate) with the same vocabulary and threads. The recipe is the one that nanoGPT's README
documents for a CPU, rebuilt on transformers' GPT-2. A round trains each side once, with a seed of its own; the order
alternates. The clock stops for evaluation, which scores every validation character once, in float32, in
windows of each side's own context set side by side.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from canon.core.data.corpora import Corpus, load_corpus
from canon.core.data.tokens import TokenBatches
from canon.core.lab import Run
from canon.core.lab.environment import machine
from canon.core.training.fit import fit
from canon.language import gpt2


@torch.no_grad()
def nats_per_character(logits: Callable[[Tensor], Tensor], corpus: Corpus, context_length: int) -> float:
    """Mean loss over all validation characters but the first, in windows side by side; the last one is shorter."""
    tokens = torch.from_numpy(corpus.validation.astype(np.int64))
    whole = (len(tokens) - 1) // context_length * context_length
    inputs, targets = (part[:whole].view(-1, context_length) for part in (tokens[:-1], tokens[1:]))
    batches = [*zip(inputs.split(64), targets.split(64), strict=True)]
    if whole < len(tokens) - 1:
        batches.append((tokens[None, whole:-1], tokens[None, whole + 1 :]))
    losses = [F.cross_entropy(logits(x).flatten(0, 1).float(), y.flatten(), reduction="sum") for x, y in batches]
    return float(torch.stack(losses).sum()) / (len(tokens) - 1)


def recipe(corpus: Corpus, seed: int) -> tuple[float, float]:
    """Train nanoGPT's recipe; returns seconds and validation loss.

    ``train.py config/train_shakespeare_char.py --device=cpu --compile=False --block_size=64 --batch_size=12
    --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0``, where the file adds
    learning rate 1e-3 falling to 1e-4, 100 steps of warm-up, beta2 0.99, and train.py weight decay 0.1, clipping at
    1.0 and no biases.
    """
    train = torch.from_numpy(corpus.train.astype(np.int64))
    context, batch, steps, warmup, peak, final = 64, 12, 2000, 100, 1e-3, 1e-4
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=corpus.tokenizer.vocab_size,
        n_positions=context,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu",  # nanoGPT's is the exact form
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero: frozen there, the model has none
            parameter.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.99))

    model(input_ids=train[None, :context])  # what transformers loads at its first call is not timed
    start = time.perf_counter()
    for step in range(steps):
        if step < warmup:
            rate = peak * (step + 1) / (warmup + 1)
        else:
            rate = final + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (peak - final)
        for group in optimizer.param_groups:
            group["lr"] = rate
        places = torch.randint(len(train) - context, (batch, 1)) + torch.arange(context + 1)
        windows = train[places]
        logits = model(input_ids=windows[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    model.eval()
    return seconds, nats_per_character(lambda tokens: model(input_ids=tokens).logits, corpus, context)


def laptop(corpus: Corpus, seed: int) -> tuple[float, float]:
    """Train Canon's laptop preset with the library's own loop; returns seconds and validation loss."""
    preset = gpt2.PRESETS["laptop"]
    config = replace(preset, training=replace(preset.training, seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, config)
        run.quiet, run.track = True, False
        model = gpt2.build(config)
        batches = TokenBatches(corpus.train, config.context_length, config.training.batch_size, seed)
        start = time.perf_counter()
        fit(model, batches, run, config.training)
        seconds = time.perf_counter() - start
    return seconds, nats_per_character(model, corpus, config.context_length)


def measure(rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train both sides ``rounds`` times, the order alternating; returns the rows of the table."""
    preset = gpt2.PRESETS["laptop"]
    corpus = load_corpus(preset.corpus, preset.tokenizer, preset.vocab_size)
    sides = {"nanoGPT's CPU recipe (transformers)": recipe, "Canon, preset laptop": laptop}
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 0):
            seconds, loss = sides[name](corpus, seed=1 + number)
            results[name].append((seconds, loss))
            progress(f"round {number + 1} of {rounds}, {name}: {loss:.3f} nats in {seconds:.1f} s")
    rows = [_row(name, *zip(*results[name], strict=True)) for name in sides]
    theirs, ours = (results[name] for name in sides)
    pairs = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)]  # of the same round
    return [*rows, _row("difference", *zip(*pairs, strict=True))]


def _row(name: str, seconds: tuple[float, ...], losses: tuple[float, ...]) -> dict[str, Any]:
    def spread(values: tuple[float, ...], digits: int) -> str:
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    return {
        "side": name,
        "seconds": round(statistics.median(seconds), 2),
        "seconds, spread": spread(seconds, 1),
        "validation loss (nats per character)": round(statistics.median(losses), 4),
        "loss, spread": spread(losses, 3),
    }


def main() -> None:
    """Run the comparison and print a table, or with ``--json`` one object."""
    parser = argparse.ArgumentParser(description="How fast a small language model learns, against nanoGPT's CPU recipe")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each side")
    parser.add_argument("--threads", type=int, default=2, help="threads of both sides")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.rounds, lambda line: None if arguments.json else print(line, flush=True))
    record = {
        "benchmark": "lm_training",
        "title": "Training: loss reached in the same time",
        "note": f"Medians of {arguments.rounds} rounds on {arguments.threads} threads, evaluation not timed. "
        "The requirement: at least 0.25 nats less than the recipe, in at most its time.",
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "rows": rows,
    }
    if arguments.json:
        print(json.dumps(record))
        return
    for row in rows:
        print("   ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
