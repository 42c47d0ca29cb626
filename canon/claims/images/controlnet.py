"""Claims of ControlNet, on shapes: a function reads a sample's outline, and an oracle its colour and form.

They steer the model of shapes that comes with the repository; what is learned, its data order and the held-out pictures
change with the seed.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from canon.core.data.images import PictureBatches, to_float
from canon.core.data.shapes import COLOURS, FORMS, Shapes, oracle, shapes
from canon.core.lab import Lab, Measurement, claim
from canon.core.training.fit import fit
from canon.images.controlnet import (
    PRESETS,
    Config,
    Control,
    ControlledDiffusion,
    batches,
    build,
    canny,
    controlled,
    generate,
    load_base,
    palette,
)
from canon.images.latent_diffusion import LatentDiffusion


class _Batches:
    """Training batches, changed on their way."""

    def __init__(self, batches: PictureBatches, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
        self.batches, self.change = batches, change

    def __next__(self) -> dict[str, Tensor]:
        return self.change(next(self.batches))

    def state_dict(self) -> dict[str, int]:
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches.load_state_dict(state)


def _trained(
    lab: Lab,
    name: str,
    config: Config,
    prepare: Callable[[ControlledDiffusion], None] = lambda model: None,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda batch: batch,
) -> ControlledDiffusion:
    """A ControlNet trained with the lab's seed, its network or its batches changed before."""
    config = replace(config, training=replace(config.training, seed=lab.seed))
    model = build(config)
    prepare(model)
    return fit(model, _Batches(batches(config), change), lab.stage(name, config), config.training)


def _gaussian(model: ControlledDiffusion) -> None:
    """Ordinary convolutions where the zero convolutions are: weights of variance 1 / fan-in."""
    for layer in (*model.control.zero_convs, model.control.hint[-1]):
        assert isinstance(layer, nn.Conv2d)
        nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def _from_scratch(model: ControlledDiffusion) -> None:
    """The copy's weights as a U-Net begins with, in place of the base's."""
    fresh = LatentDiffusion(model.base.config).unet.state_dict()
    model.control.copy.load_state_dict({name: fresh[name] for name in model.control.copy.state_dict()})


def _samples(
    model: ControlledDiffusion,
    prompts: list[str],
    hints: Float[Tensor, "n 3 32 32"],
    seed: int,
    strength: float = 1.0,
    guidance: float = 4.0,
) -> Float[Tensor, "n 3 32 32"]:
    """One picture of each prompt and condition, a hundred at a time; without control for a strength of 0."""
    tokenizer = load_base(model.config.base)[1]
    made = []
    for start in range(0, len(prompts), 100):
        rows = slice(start, start + 100)
        control = Control(model.control, hints[rows], strength)
        made.append(
            generate(
                model.base, tokenizer, prompts[rows], [control], steps=20, guidance=guidance, seed=1000 * seed + start
            )
        )
    return torch.cat(made)


def _mask(images: Float[Tensor, "n 3 32 32"]) -> Bool[Tensor, "n 32 32"]:
    """Where the shape is: what differs from the median colour, the ground, by half of what paint differs from it."""
    ground = images.flatten(2).median(2).values[..., None, None]
    return (images - ground).abs().amax(1) > 0.65


def _iou(images: Float[Tensor, "n 3 32 32"], asked: Shapes) -> float:
    """Intersection over union of the drawn and the wanted shape, a mean over pictures."""
    found = _mask(images)
    shared, either = (found & asked.masks).sum((1, 2)), (found | asked.masks).sum((1, 2))
    return float((shared / either).mean())


def _right(images: Float[Tensor, "n 3 32 32"], asked: Shapes, *names: str) -> float:
    """Share of pictures of which the oracle reads all the named attributes as asked."""
    read = oracle(32).read(images)
    return float(torch.stack([read[name] == getattr(asked, name) for name in names]).all(0).float().mean())


def _half_said(asked: Shapes) -> list[str]:
    """Captions of colour and form: place, size and angle are left to the condition."""
    colours = list(COLOURS)
    return [f"a {colours[c]} {FORMS[f]}" for c, f in zip(asked.colour.tolist(), asked.form.tolist())]


@claim(
    "Zero convolutions make the start a no-op: the output is the base's bit for bit; the first step moves them alone, "
    "the second the copy",
    source="section 3.1, Eq. 3",
    passes="largest_change == 0 and zeros_moved == 1 and copy_gradient == 0 and copy_moved_by_one == 0 "
    "and copy_moved_by_two == 1",
    seeds=3,
    minutes=0.2,
)
def zero_convolutions_start_as_nothing(lab: Lab, sabotage: bool = False) -> Measurement:
    """Two steps of SGD on real batches. Sabotage: ordinary convolutions, with Gaussian weights."""
    config = replace(PRESETS["laptop"], training=replace(PRESETS["laptop"].training, seed=lab.seed))
    model, stream = build(config), batches(config)
    if sabotage:
        _gaussian(model)
    batch = next(stream)
    images, hint = batch["images"].split(3, dim=1)
    z, t, context = model.base.encode(images), 1000 * batch["t"], model.base.text(batch["tokens"])
    with torch.no_grad():
        steered = controlled(model.base.unet, z, t, context, model.control(z, t, context, hint))
        change = (steered - model.base.unet(z, t, context)).abs().max()
    zeros, copy = list(model.control.zero_convs.parameters()), list(model.control.copy.parameters())
    began = [p.detach().clone() for p in copy]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    moved, gradients = [], []
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(next(stream))[0].backward()
        optimizer.step()
        gradients.append(max(float(p.grad.abs().max()) for p in copy if p.grad is not None))
        moved.append(any(not torch.equal(p, before) for p, before in zip(copy, began)))
    return Measurement(
        largest_change=change,
        zeros_moved=all(bool(p.any()) for p in zeros),
        copy_gradient=gradients[0],
        copy_moved_by_one=moved[0],
        copy_moved_by_two=moved[1],
    )


@claim(
    "Connections with Gaussian weights harm the locked model from the start; zero convolutions do not",
    source="section 4 (ablative study), figure 8",
    passes="accuracy_zero - accuracy_gaussian >= 0.20",
    seeds=3,
    minutes=2,
)
def zero_convolutions_keep_early_samples(lab: Lab, sabotage: bool = False) -> Measurement:
    """Colour and form read by the oracle off 96 samples after 20 training steps. Sabotage: both are Gaussian."""
    config = replace(PRESETS["laptop"], training=replace(PRESETS["laptop"].training, steps=20))
    asked = shapes(96, seed=10_000 + lab.seed)
    hints = canny(to_float(asked.images))

    def accuracy(name: str, prepare: Callable[[ControlledDiffusion], None]) -> float:
        model = _trained(lab, name, config, prepare)
        return _right(_samples(model, asked.captions, hints, lab.seed), asked, "colour", "form")

    return Measurement(
        accuracy_zero=accuracy("zero", _gaussian if sabotage else lambda model: None),
        accuracy_gaussian=accuracy("gaussian", _gaussian),
    )


@claim(
    "A ControlNet steers a locked model by edges: samples take the shape of the condition, keep the colour of the "
    "prompt, and the base stays as it was bit for bit",
    source="sections 3.2 and 4, figure 7",
    passes="iou - iou_without >= 0.25 and colour >= colour_without - 0.03 and base_changed == 0",
    seeds=3,
    minutes=22,
)
def edges_steer_a_locked_model(lab: Lab, sabotage: bool = False) -> Measurement:
    """The laptop preset; 192 held-out shapes whose prompts name colour and form, so that place, size and angle can be
    known from the edges alone; the control is the base from the same noise. Sabotage: in training, each picture gets
    the edges of another.
    """
    asked = shapes(192, seed=20_000 + lab.seed)
    prompts, hints = _half_said(asked), canny(to_float(asked.images))

    def rolled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        images, hint = batch["images"].split(3, dim=1)
        return batch | {"images": torch.cat([images, hint.roll(1, 0)], dim=1)}

    model = _trained(lab, "control", PRESETS["laptop"], change=rolled if sabotage else lambda batch: batch)
    steered, free = (_samples(model, prompts, hints, lab.seed, strength) for strength in (1.0, 0.0))
    original = load_base(model.config.base)[0].state_dict()
    return Measurement(
        iou=_iou(steered, asked),
        iou_without=_iou(free, asked),
        colour=_right(steered, asked, "colour"),
        colour_without=_right(free, asked, "colour"),
        base_changed=any(not torch.equal(p.cpu(), original[name]) for name, p in model.base.state_dict().items()),
    )


@claim(
    "With 500 pairs, a copy that starts from the base's weights obeys better than a network of the same size that "
    "starts from random ones",
    source="section 3.1 (trainable copy), section 4 (robustness to the size of the data)",
    passes="iou_copy - iou_scratch >= 0.05",
    seeds=3,
    minutes=14,
)
def the_copy_beats_scratch(lab: Lab, sabotage: bool = False) -> Measurement:
    """800 steps each, on the same batches; 192 held-out shapes whose prompts name colour and form.

    Sabotage: the copy forgets the base's weights, too.
    """
    recipe = replace(PRESETS["laptop"].training, steps=800, evaluate_every=0)
    config = replace(PRESETS["laptop"], pairs=500, training=recipe)
    asked = shapes(192, seed=30_000 + lab.seed)
    prompts, hints = _half_said(asked), canny(to_float(asked.images))
    copy = _trained(lab, "copy", config, _from_scratch if sabotage else lambda model: None)
    scratch = _trained(lab, "scratch", config, _from_scratch)
    return Measurement(
        iou_copy=_iou(_samples(copy, prompts, hints, lab.seed), asked),
        iou_scratch=_iou(_samples(scratch, prompts, hints, lab.seed), asked),
        colour_copy=_right(_samples(copy, prompts, hints, lab.seed), asked, "colour"),
    )


@claim(
    "Two ControlNets work together by adding what they say: one gives the form, the other the colour",
    source="section 3.4 (composing multiple ControlNets), figure 6",
    passes="colour_both - colour_edges >= 0.3 and form_both - form_palette >= 0.2",
    seeds=3,
    minutes=20,
)
def two_controls_compose(lab: Lab, sabotage: bool = False) -> Measurement:
    """One network learned edges and another coarse colours, 1,200 steps each and apart; 96 held-out shapes, no prompt.

    Edges do not tell the colour, nor sixteen coarse fields the form. Sabotage: the colours are those of other pictures.
    """
    recipe = replace(PRESETS["laptop"].training, steps=1_200, evaluate_every=0)
    edges, colours = (
        _trained(lab, name, replace(PRESETS[name], training=recipe)).control for name in ("laptop", "palette")
    )
    base, tokenizer = load_base("")
    base.to(next(edges.parameters()).device)
    asked = shapes(96, seed=40_000 + lab.seed)
    images = to_float(asked.images)
    form = Control(edges, canny(images))
    colour = Control(colours, palette(images.roll(1, 0) if sabotage else images))

    def draw(*controls: Control) -> Tensor:
        return generate(base, tokenizer, [""] * len(images), controls, steps=20, guidance=1.0, seed=1000 * lab.seed)

    both, edges_only, palette_only = draw(form, colour), draw(form), draw(colour)
    return Measurement(
        colour_both=_right(both, asked, "colour"),
        colour_edges=_right(edges_only, asked, "colour"),
        form_both=_right(both, asked, "form"),
        form_palette=_right(palette_only, asked, "form"),
        iou_both=_iou(both, asked),
    )
