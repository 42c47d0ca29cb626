"""How fast text is sampled in bulk: `canon.core.generation` against transformers' ``generate``, on the same weights.

    python -m benchmarks decoding [--rounds 5] [--threads 2] [--json]

A GPT-2 of the `tinylm` preset (random weights: the work does not depend on them) continues 256 prompts of 16 tokens by
128 each, at temperature 1, in float32 and in bfloat16. The sides take turns, in an order that alternates; the clock
runs from the call to the last token, prompts included. Ratios are those of neighbours in one round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from canon.core.generation.decode import Sampling, generate
from canon.core.lab.environment import machine
from canon.language import gpt2

BATCH, PROMPT, NEW = 256, 16, 128


def published(model: gpt2.GPT2) -> Any:
    """The same model in transformers."""
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.context_length,
        n_embd=c.d_model,
        n_layer=c.n_layers,
        n_head=c.n_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    ours, theirs = model.state_dict(), {}
    for name, target in gpt2.NAMES.items():
        if target is None:
            continue
        target, transposed = (target, False) if isinstance(target, str) else (target[0], True)
        for layer in range(c.n_layers if "{i}" in name else 1):
            weight = ours[target.format(i=layer)]
            theirs[f"transformer.{name.format(i=layer)}"] = weight.T if transposed else weight
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    peer = GPT2LMHeadModel(config).eval()
    peer.load_state_dict(theirs)
    return peer


def sides(prompts: torch.Tensor) -> dict[tuple[str, str], Callable[[], None]]:
    """What is compared: (precision, side) -> decode everything once."""
    config = gpt2.PRESETS["tinylm"]
    found: dict[tuple[str, str], Callable[[], None]] = {}
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        ours = gpt2.build(config).eval()
        theirs = published(ours).to(dtype)
        ours.to(dtype)
        probe = prompts[:8]
        with torch.inference_mode():
            torch.testing.assert_close(ours(probe), theirs(input_ids=probe).logits, rtol=0.05, atol=0.05)

        def canon(model: gpt2.GPT2 = ours) -> None:
            results = generate(model, prompts.tolist(), Sampling(max_tokens=NEW))
            assert all(len(result.tokens) == NEW for result in results)

        def transformers(model: Any = theirs) -> None:
            with torch.inference_mode():
                tokens = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=NEW,
                    min_new_tokens=NEW,
                    pad_token_id=0,
                )
            assert tokens.shape == (BATCH, PROMPT + NEW)

        found[precision, "canon"], found[precision, "transformers"] = canon, transformers
    return found


def measure(rounds: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    torch.manual_seed(0)
    prompts = torch.randint(gpt2.PRESETS["tinylm"].vocab_size, (BATCH, PROMPT))
    runs = sides(prompts)
    speeds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for number in range(rounds + 1):  # the first round warms up
        for key in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[key]()
            if number:
                speeds[key].append(BATCH * NEW / (time.perf_counter() - start))
    rows = []
    for (precision, side), values in speeds.items():
        ratios = [a / b for a, b in zip(values, speeds[precision, "transformers"])]
        rows.append(
            {
                "weights": precision,
                "side": side,
                "new tokens/s": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
                "times transformers": statistics.median(ratios),
                "ratio from": min(ratios),
                "ratio to": max(ratios),
            }
        )
    return rows


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    config = gpt2.PRESETS["tinylm"]
    parameters = sum(p.numel() for p in gpt2.build(config).parameters()) / 1e6
    record = {
        "benchmark": "decoding",
        "title": f"Sampling in bulk from a GPT-2 of {parameters:.1f} M parameters",
        "machine": f"{machine()}, {arguments.threads} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "note": f"{BATCH} prompts of {PROMPT} tokens, {NEW} new tokens each, {arguments.rounds} rounds; "
        f"d_model {config.d_model}, {config.n_layers} layers, vocabulary {config.vocab_size:,}.",
        "rows": measure(arguments.rounds),
    }
    if arguments.json:
        print(json.dumps(record))
        return
    print(record["title"], record["machine"], record["note"], sep="\n")
    for row in record["rows"]:
        print(
            "  ".join(
                f"{key} {value:,.2f}" if isinstance(value, float) else f"{value:12}" for key, value in row.items()
            )
        )


if __name__ == "__main__":
    main()
