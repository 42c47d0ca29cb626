"""The checkpoints that come with the repository load, are small, say where they are from, and draw what is asked."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import canon
from canon import cli
from canon.core.data.images import open_image
from canon.core.data.shapes import oracle, read_prompt, shapes
from canon.core.generation.diffusion_samplers import last
from canon.core.hub.tensors import WEIGHTS_FILE
from canon.images import latent_diffusion as ldm
from canon.images.latent_diffusion.sampling import generate

FOLDER = Path(__file__).parents[1] / "checkpoints"
CHECKPOINTS = sorted(path.parent.name for path in FOLDER.glob("*/checkpoint.json"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_and_says_where_it_is_from(name):
    facts = json.loads((FOLDER / name / "checkpoint.json").read_text())
    assert (FOLDER / name / "model" / WEIGHTS_FILE).stat().st_size == facts["bytes"] <= 6_000_000
    assert facts["command"].startswith("canon ")
    assert facts["seconds"] > 0
    assert "Apache-2.0" in facts["licence"]
    model, tokenizer = canon.load(name.split("-")[0]).from_pretrained(FOLDER / name / "model")
    assert tokenizer is not None or name == "imagen"  # whose prompts a language model reads
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if "base_sha256" in facts:  # shipped without its base, and made for exactly this one
        base = FOLDER / "latent_diffusion-shapes" / "model" / WEIGHTS_FILE
        assert sha256(base.read_bytes()).hexdigest() == facts["base_sha256"]


def test_a_picture_without_a_run(capsys, in_folder):
    cli.main(["sample", "latent_diffusion", "a red apple", "--steps", "20", "--out", "apple.png"])
    assert capsys.readouterr().out.strip() == "apple.png"
    red, green, blue = open_image("apple.png", 32)[:, 12:24, 8:24].mean((1, 2))
    assert red > 0.6 > max(green, blue) + 0.2
    cli.main(["sample", "clip", "apple.png"])  # which names what it sees, likeliest first
    assert "apple" in capsys.readouterr().out


def test_a_cascade(capsys, in_folder):
    cli.main(["sample", "imagen", "red apple", "--count", "2", "--steps", "12", "--out", "cascade.png"])
    assert capsys.readouterr().out.strip() == "cascade.png"
    page = open_image("cascade.png")  # two columns of three stages, small ones first, each 192 pixels wide and 2 apart
    for place in range(6):
        top, left = 194 * (place // 2) + 70, 194 * (place % 2) + 60
        red, green, blue = page[:, top : top + 80, left : left + 70].mean((1, 2))
        assert red > 0.6 > max(green, blue) + 0.2, place


def test_a_picture_written_as_text(capsys, in_folder):
    words = "a large blue star in the middle"
    cli.main(["sample", "dalle", words, "--count", "1", "--out", "star.png"])
    assert capsys.readouterr().out.strip() == "star.png"
    read = {name: int(value[0]) for name, value in oracle(32).read(open_image("star.png", 32)[None]).items()}
    assert read == read_prompt(words)


def test_prompts_of_shapes_are_obeyed():
    model, tokenizer = ldm.from_pretrained(FOLDER / "latent_diffusion-shapes" / "model")
    assert tokenizer is not None
    asked = shapes(48, seed=123)
    with torch.no_grad():
        images = model.decode(last(generate(model, tokenizer, asked.captions, steps=15, guidance=3.0)))
    read = oracle(32).read(images)
    right = {name: float((read[name] == getattr(asked, name)).float().mean()) for name in read}
    assert right["colour"] > 0.9, right
    assert right["place"] > 0.9, right
    assert right["form"] > 0.9, right
