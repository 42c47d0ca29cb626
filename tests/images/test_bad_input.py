"""Numbers that make no sense are one line, before anything is built."""

import dataclasses
from typing import Any

import pytest

from canon.core.errors import UserError
from canon.images import clip, dalle, imagen, latent_diffusion

BAD = [
    (latent_diffusion, "image_size", 0),
    (latent_diffusion, "image_size", -32),
    (latent_diffusion, "first_channels", 0),
    (latent_diffusion, "first_multipliers", ()),
    (latent_diffusion, "first_multipliers", (0, 1, 2)),
    (latent_diffusion, "latent_channels", 0),
    (latent_diffusion, "codebook", -5),
    (latent_diffusion, "channels", 0),
    (latent_diffusion, "multipliers", ()),
    (latent_diffusion, "multipliers", (0, 3)),
    (latent_diffusion, "res_blocks", 0),
    (latent_diffusion, "vocab_size", -1),
    (latent_diffusion, "context_length", 1),
    (latent_diffusion, "d_model", 0),
    (clip, "image_size", 0),
    (clip, "image_layers", (0,)),
    (clip, "image_width", 0),
    (clip, "context_length", 0),
    (clip, "context_length", 1),
    (clip, "d_model", 0),
    (clip, "d_embedding", 0),
    (dalle, "d_model", 0),
    (dalle, "first_batch_size", 0),
    (imagen, "channels", 0),
    (imagen, "sr_blocks", (1, 0)),
]


def test_the_time_embedding_needs_even_channels():
    with pytest.raises(UserError, match=r"^channels must be even"):
        dataclasses.replace(latent_diffusion.PRESETS["laptop"], channels=33, unet_heads=3)


@pytest.mark.parametrize(("system", "name", "value"), BAD)
def test_numbers_that_are_too_small_are_one_line(system: Any, name: str, value: Any):
    with pytest.raises(UserError, match=rf"^{name} (must be|needs whole numbers of) at least \d, not [^\n]+$"):
        dataclasses.replace(system.PRESETS["laptop"], **{name: value})
