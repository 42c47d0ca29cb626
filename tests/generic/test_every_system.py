"""What every system of the catalog must do, on its laptop preset with real data."""

import dataclasses
import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from canon import cli
from canon.catalog import entries
from canon.core.errors import UserError
from canon.core.hub.tensors import WEIGHTS_FILE
from canon.core.lab.run import Run
from canon.core.training.checkpoint import checkpoints
from canon.core.training.fit import fit

SYSTEMS = {entry.id: entry.system for entry in entries() if entry.system}


@pytest.fixture(params=SYSTEMS)
def system(request, monkeypatch):
    """(name, module, laptop config shortened to four fp32 steps)."""
    module = importlib.import_module(SYSTEMS[request.param])
    config = module.PRESETS["laptop"]
    recipe = dataclasses.replace(
        config.training,
        steps=4,
        batch_size=4,
        accumulation=1,
        precision="fp32",
        log_every=1,
        evaluate_every=0,
        checkpoint_every=1e9,
    )
    monkeypatch.setattr(drawing(module), "show", lambda *_: None, raising=False)
    return request.param, module, dataclasses.replace(config, training=recipe, **first_stages(config, 2))


def drawing(module: ModuleType) -> Any:
    """Where the pictures of a system's report are made, by ``show``; its own tests look at them."""
    return sys.modules.get(f"{module.__name__}.views", module)


def first_stages(config: Any, steps: int) -> dict[str, int]:
    """Few steps for the stages that come before the last, and few pictures where a stage draws some."""
    names = [field.name for field in dataclasses.fields(config)]
    few = {"prior_images": 8} if "prior_images" in names else {}
    return few | {name: steps for name in names if name.endswith("_steps")}


def trained(system, folder, die_after: int | None = None) -> torch.nn.Module:
    name, module, config = system
    run = Run(folder, config)
    run.quiet = True
    model, batches = module.build(config), module.batches(config)
    if die_after is None:
        return fit(model, batches, run, config.training)
    config = dataclasses.replace(config.training, checkpoint_every=0)
    real, calls = model.loss, 0

    def loss(batch):
        nonlocal calls
        calls += 1
        if calls > die_after * config.accumulation:
            raise KeyboardInterrupt
        return real(batch)

    model.loss = loss
    with pytest.raises(KeyboardInterrupt):
        fit(model, batches, run, config)
    return model


@pytest.mark.parametrize("heads", ["7", "0"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_heads_that_do_not_divide_the_width_are_one_line(name, heads, capsys, in_folder):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", name, "--n-heads", heads])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert "n_heads" in line.replace("-", "_")  # a system without heads says that it has no such option


def test_every_parameter_gets_a_gradient(system):
    name, module, config = system
    model = module.build(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))  # what starts at zero lets no gradient through in the first step
    model.loss(next(module.batches(config)))[0].backward()
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue  # an earlier stage, frozen
        assert p.grad is not None, f"{key} gets no gradient"
        assert p.grad.abs().max() > 0, f"{key} has a zero gradient"


def test_saved_and_loaded_weights_are_bitwise_equal(system, tmp_path):
    from canon.core.hub.pretrained import save_pretrained

    name, module, config = system
    model = module.build(config)
    save_pretrained(model, config, tmp_path, system=name)
    loaded, *_ = module.from_pretrained(tmp_path)
    for (key, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_interrupted_and_resumed_equals_uninterrupted(system, tmp_path):
    straight = trained(system, tmp_path / "straight")
    trained(system, tmp_path / "broken", die_after=2)
    resumed = trained(system, tmp_path / "broken")
    for (key, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_a_resume_that_fails_keeps_the_trained_weights(system, tmp_path):
    name, module, config = system
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=1))
    run = Run(tmp_path, config)
    run.quiet = True
    module.train(config, run)
    weights = (tmp_path / "model" / WEIGHTS_FILE).read_bytes()
    (checkpoints(tmp_path / "checkpoint")[-1] / "manifest.json").write_text("damaged")
    with pytest.raises(UserError, match="delete that folder"):
        module.train(config, run)
    assert (tmp_path / "model" / WEIGHTS_FILE).read_bytes() == weights
    loaded, *_ = module.from_pretrained(tmp_path / "model")
    assert not all(map(torch.equal, loaded.parameters(), module.build(config).parameters()))


def test_a_run_killed_before_its_first_export_has_no_weights(system, tmp_path, monkeypatch):
    name, module, config = system
    run = Run(tmp_path, config)
    run.quiet = True
    monkeypatch.setattr(sys.modules["canon.core.training.fit"], "_backward", _killed)
    with pytest.raises(KeyboardInterrupt):
        module.train(config, run)
    with pytest.raises(UserError, match="no weights"):
        module.from_pretrained(tmp_path / "model")


def _killed(*_):
    raise KeyboardInterrupt
