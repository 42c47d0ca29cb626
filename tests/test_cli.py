"""The command line as a user meets it: what it prints, its exit codes, and that mistakes are one line."""

import json
import os
import resource
import subprocess
import sys

import pytest

from canon import cli

SMALL = [
    *("--steps", "30", "--d-model", "32", "--n-layers", "2", "--n-heads", "2", "--context-length", "32"),
    *("--batch-size", "8", "--log-every", "5", "--threads", "1", "--precision", "fp32"),
]


def canon(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    code = 0
    try:
        cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which a small GPT-2 has been trained by the command."""
    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        cli.main(["train", "gpt2", "--name", "small", *SMALL])
    finally:
        os.chdir(before)
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tarin"], "did you mean canon train"),
        (["show", "gtp2"], "closest: gpt2"),
        (["run", "nerf"], "does not run yet"),
        (["run", "gpt2", "--preset", "huge"], "choose from laptop"),
        (["run", "gpt2", "--steps", "many"], "--steps"),
        (["run", "gpt2", "--d-modell", "3"], "--d-modell"),
        (["run", "gpt2", "--resume"], "no run"),
        (["run", "gpt2", "--device", "tpu:9"], "no device"),
        (["run", "gpt2", "--threads", "0"], "--threads"),
        (["run", "gpt2", "--name", "../up"], "cannot name a run"),
        (["run", "gpt2", "--vocab-size", "9"], "--vocab-size"),
        (["train", "gpt2", "--n-heads", "5"], "n_heads"),
        (["sample"], "name of a system"),
        (["verify"], "--all"),
        (["verify", "gpt2", "--claim", "everything"], "choose from"),
        (["fetch", "shakspeare"], "shakespeare"),
        (["show"], "missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, in_folder, arguments, says):
    code, out, err = canon(capsys, *arguments)
    assert (code, out) == (2, "")
    lines = [line for line in err.strip().splitlines() if not line.startswith("run      ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err


def test_missing_extra_names_it(capsys, monkeypatch):
    from canon.core.errors import UserError, require

    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install 'aicanon\[agents\]'"):
        require("openai", "agents")


@pytest.mark.parametrize("command", ["", *cli._COMMANDS])
def test_help_teaches(capsys, command):
    code, out, _ = canon(capsys, *([command] if command else []), "--help")
    assert code == 0
    assert len(out.splitlines()) >= 5 or command in ("sample",)
    assert "canon" in out


def test_train_writes_a_run_that_samples(capsys, trained, monkeypatch):
    monkeypatch.chdir(trained)
    code, out, _ = canon(capsys, "sample", "gpt2", "ROMEO:", "--max-tokens", "20", "--json")
    sample = json.loads(out)["sample"]
    assert code == 0
    assert sample.startswith("ROMEO:")
    assert len(sample) == len("ROMEO:") + 20
    again = json.loads(canon(capsys, "sample", "gpt2", "ROMEO:", "--max-tokens", "20", "--json")[1])["sample"]
    assert again == sample
    code, out, _ = canon(capsys, "sample", "gpt2", "JULIET:")
    assert code == 0
    assert out.startswith("JULIET:")


def test_a_run_does_not_change_its_configuration(capsys, trained, monkeypatch):
    monkeypatch.chdir(trained)
    code, _, err = canon(capsys, "train", "gpt2", "--name", "small", "--resume", "--steps", "40")
    assert code == 2
    assert "another configuration" in err


@pytest.mark.parametrize("damage", ["cut", "flip", "config"])
def test_damaged_weights_are_one_line(capsys, trained, tmp_path, damage):
    import shutil

    copy = tmp_path / "gpt2" / "copy"
    shutil.copytree(trained / "runs" / "gpt2" / "small", copy)
    weights = copy / "model" / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[3] ^= 0xFF
        weights.write_bytes(content)
    else:
        (copy / "model" / "config.json").write_text("{")
    code, _, err = canon(capsys, "sample", "gpt2", "--run", str(copy))
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_the_map_takes_less_than_a_third_of_a_second():
    """Processor time, best of five, because the machine may be busy."""
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "canon", "list"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best < 0.3


def test_verify_prints_one_object_for_each_claim(capsys, in_folder):
    code, out, _ = canon(capsys, "verify", "gpt2", "--claim", "cache_is_exact", "--json")
    record = json.loads(out)
    assert code == 0
    assert {"system", "claim", "verdict", "passes", "seeds", "measured", "sabotage", "seconds"} <= record.keys()
    assert record["verdict"] == "reproduced"
    assert record["measured"]["logit_error"]["mean"] < 1e-5 < record["sabotage"]["logit_error"]["mean"]
