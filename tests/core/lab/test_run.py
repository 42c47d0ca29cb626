"""Runs: what a crash, a full disk, a resumption or a bad name may not break."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import wave
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from canon.core.errors import UserError
from canon.core.lab import Run
from canon.core.lab.progress import show_progress


@dataclass(frozen=True)
class Training:
    steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Config:
    d_model: int = 8
    training: Training = field(default_factory=Training)


@pytest.fixture
def run(tmp_path):
    run = Run.create("gpt2", "laptop", Config(), root=tmp_path)
    run.track = False
    return run


def disk_full(monkeypatch, after: int):
    """From now on the disk takes ``after`` more bytes."""
    room = [after]
    write = os.write

    def writing(descriptor, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, bytes(data)[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr("canon.core.lab.files.os.write", writing)


# Crashes and resumption


def test_a_torn_last_line_is_cut_off_before_the_next_one(run):
    run.log(1, loss=2.5)
    run.log(2, loss=2.25)
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 3, "lo')
    again = Run.open(run.path)
    again.track = False
    assert [row["step"] for row in again.metrics()] == [1, 2]
    again.log(3, loss=2.0)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": 2.25},
        {"step": 3, "loss": 2.0},
    ]


def test_zeros_left_by_a_power_cut_are_cut_off(run):
    run.log(1, loss=2.5)
    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b"\0" * 20 + b'\n{"step": 9}\n')
    again = Run.open(run.path)
    again.track = False
    again.log(2, loss=2.0)
    assert [row["step"] for row in again.metrics()] == [1, 2]


def test_sigkill_loses_no_finished_line(tmp_path):
    code = (
        "import sys; from canon.core.lab.run import Run\n"
        "run = Run(sys.argv[1]); run.track = False\n"
        "for step in range(10**9): run.log(step, loss=1 / (step + 1)); print(step, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    seen = [int(process.stdout.readline()) for _ in range(200)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [row["step"] for row in Run.open(tmp_path / "r").metrics()]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= seen


def test_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    def train(run, first, last):
        run.track = False
        for step in range(first, last + 1):
            run.log(step, loss=1 / step)
            if step % 2 == 0:
                run.text("sample", f"after {step}", step=step)

    whole, broken = Run(tmp_path / "whole", Config()), Run(tmp_path / "broken", Config())
    train(whole, 1, 10)
    train(broken, 1, 9)  # dies at 9; its last checkpoint is of step 6
    resumed = Run(tmp_path / "broken", Config())
    resumed.truncate_after(6)
    train(resumed, 7, 10)
    for name in ("metrics.jsonl", "samples/index.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert resumed.samples() == whole.samples()


def test_starting_over_forgets_everything_logged(run):
    run.log(0, loss=3.0)
    run.text("sample", "early")
    run.truncate_after(-1)
    assert run.metrics() == []
    assert run.samples() == []


def test_a_sample_made_again_replaces_the_first(run):
    run.text("poem", "old", step=1)
    run.text("other", "x", step=1)
    run.text("poem", "new", step=1)
    assert [row["name"] for row in run.samples()] == ["other", "poem"]
    assert (run.path / "samples" / run.samples()[1]["file"]).read_text() == "new"


# Full disks


def test_full_disk_while_logging_takes_the_half_line_back(run, monkeypatch):
    run.log(1, loss=2.5)
    before = (run.path / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        disk_full(patch, after=10)
        with pytest.raises(UserError, match=r"metrics\.jsonl.*full"):
            run.log(2, loss=2.0)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run.log(2, loss=2.0)
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_full_disk_never_leaves_half_a_config(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk_full(patch, after=700)  # the environment fits, or half of it
        with pytest.raises(UserError, match="full"):
            Run.create("gpt2", "laptop", {"long": "x" * 1000}, root=tmp_path)
    folder = tmp_path / "gpt2" / "laptop"
    assert not (folder / "config.json").exists()
    assert not list(folder.glob(".*tmp"))
    with pytest.raises(UserError, match="no run"):
        Run.open(folder)
    assert Run.create("gpt2", "laptop", {"x": 1}, root=tmp_path).config == {"x": 1}


def test_full_disk_keeps_the_old_summary(run, monkeypatch):
    run.summary(parameters=124)
    with monkeypatch.context() as patch:
        disk_full(patch, after=5)
        with pytest.raises(UserError, match=r"summary\.json"):
            run.summary(parameters=125)
    assert json.loads((run.path / "summary.json").read_text()) == {"parameters": 124}


# Names and configurations


@pytest.mark.parametrize("name", ["", "..", "../other", "a/b", "a\\b", ".hidden", "a\n", "x" * 101, "/tmp", "~", "a b"])
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a run"):
        Run.create("gpt2", name, {}, root=tmp_path)
    with pytest.raises(UserError, match="cannot name a run"):
        Run.create(name, "laptop", {}, root=tmp_path)
    with pytest.raises(UserError, match="cannot name a run"):
        Run(tmp_path / "run").stage(name)


def test_any_sample_name_stays_in_its_folder_and_apart(run):
    names = ["../../escape", "a b", "a-b", "a/b", "诗", "x" * 300, "."]
    for name in names:
        run.text(name, name)
    rows = run.samples()
    assert [row["name"] for row in rows] == names
    assert len({row["file"] for row in rows}) == len(names)
    for row in rows:
        assert (run.path / "samples" / row["file"]).resolve().parent == (run.path / "samples").resolve()
        assert (run.path / "samples" / row["file"]).read_text() == row["name"]


def test_same_configuration_goes_on_and_another_one_is_refused(run, tmp_path):
    assert Run.create("gpt2", "laptop", Config(), root=tmp_path).config == run.config
    with pytest.raises(UserError, match=r"training\.steps 10, now 20"):
        Run.create("gpt2", "laptop", Config(training=Training(steps=20)), root=tmp_path)
    assert json.loads((run.path / "config.json").read_text())["training"] == {"steps": 10, "betas": [0.9, 0.95]}


def test_latest_is_the_run_written_to_last(tmp_path):
    for name in ("first", "second"):
        Run.create("gpt2", name, {}, root=tmp_path)
    first = Run.open(tmp_path / "gpt2" / "first")
    first.track = False
    first.log(1, loss=1.0)
    later = time.time_ns() + 10**9
    os.utime(first.path / "metrics.jsonl", ns=(later, later))
    (tmp_path / "gpt2" / "claims").mkdir()
    assert Run.latest("gpt2", root=tmp_path).name == "first"
    with pytest.raises(UserError, match="canon run bert"):
        Run.latest("bert", root=tmp_path)


def test_stages_keep_their_own_metrics_in_order(run):
    for name in ("prior", "autoencoder"):
        stage = run.stage(name, {"of": name})
        stage.log(1, loss=float(len(name)))
    assert [(stage.name, stage.metrics()[0]["loss"]) for stage in run.stages()] == [
        ("prior", 5.0),
        ("autoencoder", 11.0),
    ]
    assert run.metrics() == []


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = Run.create("gpt2", "laptop", Config(), root=tmp_path)
    run.log(1, loss=1.0)
    run.text("a", "b")
    run.image("c", torch.zeros(1, 2, 2))
    run.summary(x=1)
    run.truncate_after(0)
    assert list(tmp_path.iterdir()) == []
    assert run.config["d_model"] == 8


# Values


def test_metrics_that_are_not_finite_survive_as_strict_json(run):
    run.log(1, loss=float("nan"), bound=torch.tensor(float("-inf")), count=np.int64(3))
    line = (run.path / "metrics.jsonl").read_text()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    row = run.metrics()[0]
    assert row["loss"] != row["loss"]
    assert row["bound"] == -float("inf")
    assert row["count"] == 3


def test_image_maps_minus_one_to_one_onto_black_to_white(run):
    run.image("ramp", torch.tensor([[[-1.0, 0.0, 1.0, 9.0]]]))
    run.image("red", torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1))
    run.image("pil", Image.new("RGB", (2, 2), (1, 2, 3)))
    pictures = [Image.open(run.path / "samples" / row["file"]) for row in run.samples()]
    assert np.asarray(pictures[0]).tolist() == [[0, 128, 255, 255]]
    assert pictures[1].getpixel((0, 0)) == (255, 0, 0)
    assert pictures[2].getpixel((1, 1)) == (1, 2, 3)
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        run.image("bad", torch.zeros(2, 4, 4))


def test_audio_is_a_wave_file_of_the_same_samples(run):
    run.audio("tone", torch.tensor([[0.0, 0.5, -1.0, 2.0], [1.0, 0.0, 0.0, 0.0]]), rate=16_000)
    with wave.open(io.BytesIO((run.path / "samples" / "tone.wav").read_bytes())) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16_000, 4)
        frames = np.frombuffer(file.readframes(4), "<i2").reshape(4, 2)
    assert frames[:, 0].tolist() == [0, 16384, -32767, 32767]
    assert frames[:, 1].tolist() == [32767, 0, 0, 0]


def test_figure_is_kept_for_the_page_and_for_print(run):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    run.figure("curve", figure)
    assert run.samples()[0]["file"] == "curve.png"
    assert Image.open(run.path / "samples" / "curve.png").width > 200
    assert "<svg" in (run.path / "samples" / "curve.svg").read_text()


# Progress


def test_progress_without_a_terminal_is_a_few_lines_on_standard_error(run, capsys):
    with run.progress(1000, "training", done=500) as progress:
        for step in range(501, 1001):
            progress.update(step, loss=1.5, tokens_per_second=41_203.0, examples_per_second=160, utilisation=0.312)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("training  600/1000  loss 1.5  41 203 tokens/s  31% MFU  ")
    assert "left" in lines[0]
    assert "left" not in lines[-1]


def test_quiet_runs_and_their_stages_show_nothing(run, capsys):
    run.quiet = True
    for quiet in (run, run.stage("one")):
        with quiet.progress(2, "training") as progress:
            progress.update(1, loss=1.0)
            progress.update(2, loss=0.5)
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_terminal_is_live(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with show_progress(4, "training") as progress:
        progress.update(3, loss=1.25)
    assert "3/4" in terminal.getvalue()
    assert "loss 1.25" in terminal.getvalue()


# Neighbours


def test_tensorboard_events_follow_a_resumed_run(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run.track = True
    for step in (1, 2, 3):
        run.log(step, loss=float(step))
    run.truncate_after(1)
    run.log(2, loss=20.0)
    run._events.close()
    events = EventAccumulator(str(run.path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_importing_the_lab_loads_no_torch():
    code = "import sys, canon.core.lab; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
