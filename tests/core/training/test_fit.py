import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn

from canon.core.errors import UserError
from canon.core.hub.tensors import load_tensors
from canon.core.lab.run import Run
from canon.core.training.checkpoint import _refusal, checkpoints
from canon.core.training.fit import Diverged, Interrupted, TrainingConfig, fit
from canon.core.training.optimizers import learning_rate_at, optimizers
from tests.core.training.toy import Stream, Toy

CONFIG = TrainingConfig(
    steps=12, learning_rate=1e-2, warmup_steps=3, weight_decay=0.1, checkpoint_every=0, log_every=1, precision="fp32"
)


def trained(folder: Path, config: TrainingConfig = CONFIG, die_after: int | None = None, dropout: float = 0.1) -> Toy:
    torch.manual_seed(config.seed)
    model, run = Toy(dropout), Run(folder, config)
    run.quiet = True
    calls = 0

    def loss(batch):
        nonlocal calls
        calls += model.training
        if die_after is not None and calls > die_after:
            raise KeyboardInterrupt
        return Toy.loss(model, batch)

    model.loss = loss
    if die_after is None:
        return fit(model, Stream(), run, config)
    with pytest.raises(KeyboardInterrupt):
        fit(model, Stream(), run, config)
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "change",
    [{}, {"optimizer": "muon"}, {"ema_decay": 0.9}, {"precision": "bf16"}, {"accumulation": 3}],
    ids=lambda change: "-".join(change) or "plain",
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, change):
    config = replace(CONFIG, **change)
    straight = trained(tmp_path / "toy" / "straight", config)
    trained(tmp_path / "toy" / "broken", config, die_after=5 * config.accumulation)
    trained(tmp_path / "toy" / "broken", config, die_after=4 * config.accumulation)
    resumed = trained(tmp_path / "toy" / "broken", config)
    assert equal(straight, resumed)
    rows = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in Run.open(tmp_path / "toy" / name).metrics()]
        for name in ("straight", "broken")
    ]
    assert rows[0] == rows[1]
    assert [row[0] for row in rows[0]] == list(range(1, 13))


def test_loop_equals_plain_pytorch(tmp_path):
    model = trained(tmp_path / "toy" / "fit", dropout=0.0)
    torch.manual_seed(CONFIG.seed)
    plain, stream = Toy(0.0), Stream()
    decayed = [p for p in plain.parameters() if p.dim() >= 2]
    rest = [p for p in plain.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(12):
        share = (step + 1) / 3 if step < 3 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1 - 3) / 9))
        for group in adamw.param_groups:
            group["lr"] = 1e-2 * share
        loss, _ = plain.loss(next(stream))
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_accumulation_is_the_whole_batch(tmp_path):
    whole = trained(tmp_path / "toy" / "whole", dropout=0.0)
    parts = trained(tmp_path / "toy" / "parts", replace(CONFIG, accumulation=5), dropout=0.0)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_sigterm_saves_and_the_run_goes_on(tmp_path):
    config = replace(CONFIG, checkpoint_every=1e9)
    torch.manual_seed(config.seed)
    model, stream = Toy(), Stream()

    class Ending(Stream):
        def __next__(self):
            if self.position == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    run = Run(tmp_path / "toy" / "stopped", config)
    run.quiet = True
    with pytest.raises(Interrupted, match="after step 7 of 12"):
        fit(model, Ending(), run, config)
    assert (run.path / "model" / "model.safetensors").is_file()
    torch.manual_seed(config.seed)
    resumed = fit(Toy(), stream, run, config)
    assert equal(trained(tmp_path / "toy" / "straight", config), resumed)


def test_average_is_evaluated_and_exported(tmp_path):
    config = replace(CONFIG, ema_decay=0.8, optimizer="adam", clip_norm=0.0)
    torch.manual_seed(0)
    model, history = Toy(0.0), []
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    step = torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        step(self, *args, **kwargs)
        for key, value in model.state_dict().items():
            expected[key] = 0.8 * expected[key] + 0.2 * value

    run = Run(tmp_path / "toy" / "ema", config)
    run.quiet = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", recorded)
        fit(model, Stream(), run, config, evaluate=lambda m: history.append(m.embedding.weight.clone()) or {"x": 1.0})
    torch.testing.assert_close(model.embedding.weight, expected["embedding.weight"])
    torch.testing.assert_close(history[-1], expected["embedding.weight"])
    exported = load_tensors(run.path / "model")
    torch.testing.assert_close(exported["embedding.weight"], expected["embedding.weight"])


def test_divergence_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    config = replace(CONFIG, log_every=4)
    torch.manual_seed(0)
    model = Toy()
    run = Run(tmp_path / "toy" / "nan", config)
    run.quiet = True
    calls = 0

    def loss(batch):
        nonlocal calls
        calls += model.training
        value, metrics = Toy.loss(model, batch)
        return (value * math.nan if calls == 7 else value), metrics

    model.loss = loss
    with pytest.raises(Diverged, match="step 7") as error:
        fit(model, Stream(), run, config)
    assert error.value.step == 7
    assert checkpoints(run.path / "checkpoint")[-1].name == "step-00000006"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_damaged_checkpoint_is_one_line_and_the_one_before_still_works(tmp_path, damage):
    trained(tmp_path / "toy" / "run", die_after=8)
    before, newest = checkpoints(tmp_path / "toy" / "run" / "checkpoint")
    data = next(newest.glob("*.distcp"))
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "remove":
        (newest / ".metadata").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=f"delete that folder to resume from {before.name}") as error:
        trained(tmp_path / "toy" / "run")
    assert "\n" not in str(error.value)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert equal(trained(tmp_path / "toy" / "run"), trained(tmp_path / "toy" / "straight"))


def test_checkpoint_of_another_model_is_refused(tmp_path):
    trained(tmp_path / "toy" / "run", die_after=3)
    other = Toy()
    other.layers.append(nn.Linear(32, 32))
    with pytest.raises(UserError, match="another model"):
        fit(other, Stream(), Run(tmp_path / "toy" / "run", CONFIG), CONFIG)


def test_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    trained(tmp_path / "toy" / "run", die_after=4)
    monkeypatch.setattr("canon.core.training.checkpoint._to_disk", _no_space)
    with pytest.raises(UserError, match="the disk is full"):
        trained(tmp_path / "toy" / "run")
    monkeypatch.undo()
    left = [path.name for path in (tmp_path / "toy" / "run" / "checkpoint").iterdir()]
    assert sorted(left) == ["step-00000003", "step-00000004"]
    assert equal(trained(tmp_path / "toy" / "run"), trained(tmp_path / "toy" / "straight"))


def _no_space(path):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "inverse_sqrt"])
def test_schedules(schedule):
    def rate(step):
        return learning_rate_at(step, peak=2.0, schedule=schedule, warmup_steps=10, steps=110, final_fraction=0.1)

    assert [rate(s) for s in range(10)] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    at_half, at_end = {
        "cosine": (2 * 0.55, 0.2),
        "linear": (2 * 0.55, 0.2),
        "constant": (2.0, 2.0),
        "inverse_sqrt": (2 * math.sqrt(10 / 60), 2 * math.sqrt(10 / 110)),
    }[schedule]
    assert rate(59) == pytest.approx(at_half)
    assert rate(109) == pytest.approx(at_end)


def test_muon_leaves_embeddings_head_and_vectors_to_adamw():
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 9)})
    adamw, muon = optimizers(model, TrainingConfig(optimizer="muon", learning_rate=1.0, weight_decay=0.1))
    assert [p for group in muon.param_groups for p in group["params"]] == [model["inner"].weight]
    assert sum(len(group["params"]) for group in adamw.param_groups) == 4
    before = model["inner"].weight.detach().clone()
    F.mse_loss(model["inner"](torch.randn(64, 4)), torch.randn(64, 4)).backward()
    muon.step()
    singular = torch.linalg.svdvals(model["inner"].weight.detach() - before * (1 - 0.1))
    assert singular.max() / singular.min() < 2.5  # Newton-Schulz brings every singular value of the step near one


def test_what_hides_behind_the_errors_of_torchs_writers_is_found():
    refusal = OSError(28, "No space left on device")
    hiding = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    hiding.__context__ = refusal  # as if raised while that was handled
    assert _refusal(hiding) is refusal
    assert _refusal(dcp.CheckpointException("write", {0: (hiding, None)})) is refusal
    assert _refusal(RuntimeError("another")) is None
