"""How fast the U-Net of latent diffusion runs, learns and draws: ours against diffusers, on the same weights.

    python -m benchmarks diffusion, or python -m benchmarks.diffusion [--rounds 7] [--threads 2] [--json]

Two shapes: Stable Diffusion v1 at an eighth of its width (40 channels, 32 x 32 latents, 77 tokens, batch 4), and the
laptop's (64 and 128 channels, which diffusers can express where the preset's 64 and 96 on 32 cannot; 8 x 8 latents,
16 tokens, batch 64). A forward pass, a training step (forward, backward, AdamW) and 20 steps of DPM-Solver++(2M) with
guidance, in float32 and under autocast to bfloat16. The sides take turns, in an order that alternates; ratios are those
of neighbours in one round. Each shape and precision is measured in a process of its own, and so is each side's peak
memory, that of three training steps (the median of three processes).
"""

import argparse
import gc
import json
import multiprocessing as mp
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn

from canon.core.generation import diffusion
from canon.core.generation.diffusion_samplers import dpm_solver, last
from canon.core.lab.environment import machine
from canon.images.latent_diffusion.unet import UNet
from canon.images.latent_diffusion.weights import load_unet

SHAPES: dict[str, dict[str, Any]] = {
    "SD v1 / 8": {
        "channels": 40, "multipliers": (1, 2, 4, 4), "attention": (True, True, True, False), "res_blocks": 2,
        "n_heads": 8, "d_context": 96, "side": 32, "tokens": 77, "batch": 4,
    },
    "laptop": {
        "channels": 64, "multipliers": (1, 2), "attention": (False, True), "res_blocks": 1,
        "n_heads": 4, "d_context": 96, "side": 8, "tokens": 16, "batch": 64,
    },
}  # fmt: skip
STEPS = 20


def build(shape: dict[str, Any]) -> tuple[UNet, Any]:
    """Our U-Net and diffusers', with the same weights."""
    torch.manual_seed(0)
    levels = shape["attention"]
    theirs = UNet2DConditionModel(
        sample_size=shape["side"],
        block_out_channels=tuple(shape["channels"] * m for m in shape["multipliers"]),
        layers_per_block=shape["res_blocks"],
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in levels),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(levels)),
        attention_head_dim=shape["n_heads"],  # diffusers' name for their number
        cross_attention_dim=shape["d_context"],
        norm_num_groups=8,
    )
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.03)
    names = ("channels", "multipliers", "attention", "res_blocks", "n_heads", "d_context")
    ours = UNet(4, 4, *(shape[name] for name in names), groups=8)
    load_unet(ours, theirs.state_dict())
    return ours, theirs


def inputs(shape: dict[str, Any], batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, times and texts."""
    torch.manual_seed(1)
    z = torch.randn(batch, 4, shape["side"], shape["side"])
    return z, torch.randint(1000, (batch,)), torch.randn(batch, shape["tokens"], shape["d_context"])


def precision(name: str) -> AbstractContextManager:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16")


def predict(model: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Either side as a function of latents, times and texts."""
    return model if isinstance(model, UNet) else lambda z, t, context: model(z, t, context, return_dict=False)[0]


def training_step(model: nn.Module, shape: dict[str, Any], dtype: str) -> Callable[[], None]:
    """A step on one fixed batch."""
    z, t, context = inputs(shape, shape["batch"])
    target, optimizer = torch.randn_like(z), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    run = predict(model)

    def step() -> None:
        with precision(dtype):
            loss = (run(z, t, context).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward(model: nn.Module, shape: dict[str, Any], dtype: str) -> Callable[[], None]:
    """A prediction."""
    arguments, run = inputs(shape, shape["batch"]), predict(model)

    def step() -> None:
        with torch.inference_mode(), precision(dtype):
            run(*arguments)

    return step


def sampling(model: nn.Module, shape: dict[str, Any], dtype: str) -> Callable[[], None]:
    """Twenty guided steps for four pictures, by our sampler and U-Net or by diffusers' scheduler and U-Net."""
    z, _, context = inputs(shape, 4)
    both, run = torch.cat([context, torch.zeros_like(context)]), predict(model)
    betas = diffusion.scaled_linear_betas()
    table = diffusion.from_betas(betas)
    way = diffusion.path(table[diffusion.trailing(STEPS, 1000)])
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing"
    )

    def canon() -> None:
        def guided(z_t: Tensor, t: Tensor) -> Tensor:
            conditional, unconditional = run(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
            return diffusion.guide(conditional, unconditional, 7.5)

        with torch.inference_mode(), precision(dtype):
            last(dpm_solver(diffusion.denoiser(guided, diffusion.EPS), z, way))

    def diffusers() -> None:
        with torch.inference_mode(), precision(dtype):
            scheduler.set_timesteps(STEPS)
            x = z
            for t in scheduler.timesteps:
                conditional, unconditional = run(torch.cat([x, x]), t.expand(8), both).chunk(2)
                guided = unconditional + 7.5 * (conditional - unconditional)
                x = scheduler.step(guided, t, x, return_dict=False)[0]

    return canon if isinstance(model, UNet) else diffusers


TASKS = {"forward": forward, "training step": training_step, f"{STEPS}-step sampling": sampling}


def _resident(name: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def _memory(name: str, dtype: str, side: int) -> float:
    """MiB that three training steps add to this process."""
    step = training_step(build(SHAPES[name])[side], SHAPES[name], dtype)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def _times(name: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table, for each task."""
    rows, shape = [], SHAPES[name]
    pair = build(shape)
    z, t, context = inputs(shape, 2)
    with torch.no_grad():
        torch.testing.assert_close(*(predict(model)(z, t, context) for model in pair), rtol=1e-3, atol=1e-3)
    for task, make in TASKS.items():
        runs = [make(model, shape, dtype) for model in pair]
        seconds: list[list[float]] = [[], []]
        for number in range(rounds + 1):  # the first round warms up
            for side in (0, 1) if number % 2 else (1, 0):
                start = time.perf_counter()
                runs[side]()
                if number:
                    seconds[side].append(time.perf_counter() - start)
        ratios = [theirs / ours for ours, theirs in zip(*seconds)]
        rows.append(
            {
                "shape": name,
                "precision": dtype,
                "task": task,
                "canon, ms": 1000 * statistics.median(seconds[0]),
                "diffusers, ms": 1000 * statistics.median(seconds[1]),
                "times as fast": statistics.median(ratios),
                "from": min(ratios),
                "to": max(ratios),
            }
        )
    return rows


def measure(rounds: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    rows = []
    for name in SHAPES:
        for dtype in ("float32", "bfloat16"):
            rows += alone(threads, _times, name, dtype, rounds)
            peaks = [[alone(threads, _memory, name, dtype, side) for side in (0, 1)] for _ in range(3)]
            ours, theirs = map(statistics.median, zip(*peaks))
            row = {"shape": name, "precision": dtype, "task": "training, peak MiB"}
            rows.append(row | {"canon, ms": ours, "diffusers, ms": theirs, "times as fast": theirs / ours})
    return rows


def alone(threads: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own with that many threads."""
    start = {"mp_context": mp.get_context("spawn"), "initializer": torch.set_num_threads, "initargs": (threads,)}
    with ProcessPoolExecutor(1, **start) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    """Print the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    record = {
        "benchmark": "diffusion",
        "title": "The U-Net of latent diffusion",
        "machine": f"{machine()}, {arguments.threads} threads",
        "date": datetime.now(UTC).date().isoformat(),
        "note": f"{arguments.rounds} rounds; milliseconds, but MiB in the rows on memory. Stable Diffusion v1 at 40 "
        "channels on 32 x 32 latents, batch 4; the laptop's shape at 64 and 128 channels on 8 x 8, batch 64; sampling "
        "draws 4 pictures with guidance.",
        "rows": measure(arguments.rounds, arguments.threads),
    }
    if arguments.json:
        print(json.dumps(record))
        return
    print(record["title"], record["machine"], record["note"], sep="\n")
    for row in record["rows"]:
        print(
            "  ".join(f"{key} {value:,.2f}" if isinstance(value, float) else str(value) for key, value in row.items())
        )


if __name__ == "__main__":
    main()
