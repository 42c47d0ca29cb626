"""Put a trained run among the checkpoints that come with the repository.

    python checkpoints/ship.py runs/latent_diffusion/NAME latent_diffusion "canon run latent_diffusion"

Copies the configuration, the weights as float16, the tokenizer, and says how it was made: command, seconds, metrics.
"""

import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import torch

from canon.core.hub.tensors import WEIGHTS_FILE, load_tensors, save_tensors
from canon.core.lab import Run
from canon.images.latent_diffusion.weights import SHIPPED

LARGEST = 6_000_000  # bytes
LICENCE = (
    "The weights are ours, Apache-2.0 like the code. They were trained on pictures made by this repository's own code "
    "(shapes) or on Google's Noto emoji (Apache-2.0) with the names and tags of emojibase (MIT)."
)


def ship(source: Path, name: str, command: str) -> Path:
    """Copy a run to ``checkpoints/NAME``.

    Raises:
        SystemExit: the weights are larger than 6 MB.
    """
    run, target = Run.open(source), Path(__file__).parent / name
    weights = load_tensors(source / "model")
    # a locked base that is shipped itself is left out
    alone = run.config.get("base") == "" and run.config.get("sd_locked", False)
    base = load_tensors(SHIPPED) if alone else {}
    for key, value in base.items():
        if not torch.equal(weights[f"base.{key}"].half(), value.half()):
            raise SystemExit(f"{key} of its base is not what is shipped in {SHIPPED}: train it again on that")
    own = {key: value for key, value in weights.items() if not (alone and key.startswith("base."))}
    size = sum(value.numel() * min(2, value.element_size()) for value in own.values())
    if size > LARGEST:
        raise SystemExit(f"{size:,} bytes of weights: at most {LARGEST:,} are shipped")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shutil.copy(source / "config.json", target / "config.json")
    environment = json.loads((source / "environment.json").read_text()) | {"command": command.split()}
    (target / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")  # without this machine's folders
    left_out = shutil.ignore_patterns(WEIGHTS_FILE, *["base"] * alone)
    shutil.copytree(source / "model", target / "model", ignore=left_out)
    halves = {key: value.half() if value.dtype == torch.float32 else value for key, value in own.items()}
    save_tensors(halves, target / "model" / WEIGHTS_FILE)
    size = (target / "model" / WEIGHTS_FILE).stat().st_size
    rows = [row for part in [*run.stages(), run] for row in part.metrics()]
    facts = {
        "command": command,
        "seconds": round(sum(seconds(part) for part in [*run.stages(), run])),
        "metrics": {key: value for row in rows for key, value in row.items() if "loss" in key or key == "psnr"},
        "bytes": size,
        "licence": LICENCE,
    }
    if alone:  # it is nothing without exactly this base, so a test compares them
        facts["base_sha256"] = sha256((SHIPPED / WEIGHTS_FILE).read_bytes()).hexdigest()
    (target / "checkpoint.json").write_text(json.dumps(facts, indent=2) + "\n")
    return target


def seconds(run: Run) -> float:
    """How long a stage trained: examples over examples a second, line by line."""
    batch = run.config.get("training", run.config)["batch_size"]
    rows = [row for row in run.metrics() if row.get("examples_per_second")]
    steps = [row["step"] - before for row, before in zip(rows, [0, *(row["step"] for row in rows)])]
    return sum(n * batch / row["examples_per_second"] for n, row in zip(steps, rows))


if __name__ == "__main__":
    print(ship(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
