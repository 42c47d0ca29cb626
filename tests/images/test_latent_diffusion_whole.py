"""Latent diffusion from the command line: presets to the end of their reports, captions of any kind, masks, runs."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from canon.cli import main
from canon.core.lab import Run

SHORT = [
    "--steps", "2", "--first-steps", "4", "--batch-size", "4", "--channels", "16", "--first-channels", "8",
    "--evaluate-every", "0", "--threads", "1",
]  # fmt: skip


def canon(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def drawings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with five pictures, fewer than the autoencoder's batch, whose captions are no formulas."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "drawings"
    folder.mkdir()
    captions = ["price $5_{ and \\frac$ x^", "红苹果 🍎", "word " * 400, "a_b^c", "plain"]
    for i, caption in enumerate(captions):
        Image.new("RGB", (40, 40), (50 * i, 90, 200 - 40 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption, "utf-8")
    return folder


def test_a_run_ends_with_its_report_and_samples(drawings: Path, recwarn):
    """Of inpainting, with an autoencoder of f = 2: views must not take text alone, nor f = 4, for granted."""
    change = ["--preset", "inpainting", "--first-multipliers", "1", "2"]
    assert canon("train", "latent_diffusion", "--data", drawings, "--name", "a", *change, *SHORT) == 0
    run = Run.open("runs/latent_diffusion/a")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    for sample in run.samples():
        if sample["kind"] == "figure":
            assert max(Image.open(run.path / "samples" / sample["file"]).size) < 4000
    Image.new("RGB", (60, 60), "red").save("red.png")
    Image.new("L", (60, 60), 255).save("white.png")
    for words in ([], ["--image", "red.png"], ["--image", "red.png", "--mask", "white.png"]):
        assert canon("sample", "latent_diffusion", "plain", "--steps", "2", *words) == 0


def test_masks_that_cannot_be_meant_are_one_line(drawings: Path, capsys):
    Image.new("RGB", (60, 60), "red").save("red.png")
    clear = Image.new("RGBA", (60, 60), (255, 255, 255, 0))
    clear.save("clear.png")
    Image.new("L", (60, 60), 1).save("ones.png")
    Image.new("L", (120, 60), 255).save("wide.png")
    for mask, said in (("clear.png", "white"), ("ones.png", "white"), ("wide.png", "120 x 60")):
        words = ["plain", "--image", "red.png", "--mask", mask, "--steps", "1"]
        assert canon("sample", "latent_diffusion", *words) == 2
        error = capsys.readouterr().err.strip()
        assert said in error.splitlines()[-1], error
    clear.paste((255, 255, 255, 255), (0, 0, 30, 60))
    clear.save("half.png")
    words = ["plain", "--image", "red.png", "--mask", "half.png", "--steps", "2", "--out", "new.png"]
    assert canon("sample", "latent_diffusion", *words) == 0
    page = torch.tensor(list(Image.open("new.png").getdata())).view(256, 256, 3)
    red = (page == torch.tensor([255, 0, 0])).all(2)
    assert red[:, 128:].all()
    assert not red[:, :128].all()


def test_what_is_not_trained_hides_nothing(drawings: Path, capsys):
    assert canon("sample", "latent_diffusion", "plain", "--steps", "1") == 0
    assert canon("train", "latent_diffusion", "--data", "no-such-folder", "--name", "mine") == 2
    assert not Path("runs/latent_diffusion/mine").exists()
    assert canon("train", "latent_diffusion", "--data", drawings, "--name", "mine", "--batch-size", "100") == 2
    assert "5 pictures do not fill a batch of 100" in capsys.readouterr().err
    assert not Path("runs/latent_diffusion/mine").exists()
    begun = Run("runs/latent_diffusion/begun", {"a": 1})
    begun.log(1, loss=1.0)
    assert canon("sample", "latent_diffusion", "plain", "--steps", "1") == 0
    assert re.search(r"begun is not trained to its end, so this is from .*shipped", capsys.readouterr().err)


def test_pictures_of_one_prompt_are_all_kept(drawings: Path):
    for seed in (1, 2, 1):
        assert canon("sample", "latent_diffusion", "plain", "--steps", "1", "--seed", seed) == 0
    kept = list(Path("runs/latent_diffusion/shipped/samples").glob("plain*.png"))
    assert len(kept) == 2


@pytest.mark.parametrize("name", ["a.palm", "a.h5", "a", "a.txt"])
def test_names_of_no_picture(drawings: Path, name: str, capsys):
    assert canon("sample", "latent_diffusion", "plain", "--out", name) == 2
    assert "pictures are written as .png" in capsys.readouterr().err
    assert not Path(name).exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guidance", "nan"], "guidance must be a finite number"),
        (["--seed", str(10**20)], "seed must be"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--image", "0.png", "--strength", "nan"], "strength"),
        (["--image", "0.png", "--strength", "inf"], "strength"),
        (["--strength", "0.5"], "give one with --image"),
        (["--image", "0.png", "--mask", "0.png", "--strength", "0.5"], "leave one out"),
        (["--count", "0"], "count must be at least 1"),
    ],
)
def test_numbers_that_are_none_are_one_line(drawings: Path, words: list[str], said: str, capsys, monkeypatch):
    monkeypatch.chdir(drawings)
    assert canon("sample", "latent_diffusion", "plain", *words) == 2
    assert said in capsys.readouterr().err
