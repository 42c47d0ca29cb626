"""Claims of DALL-E."""

from dataclasses import replace
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from canon.core.data.images import Pictures, to_float
from canon.core.data.shapes import oracle, read_prompt, shapes
from canon.core.data.tokenizers import BPETokenizer
from canon.core.lab import Lab, Measurement, Run, claim
from canon.core.training.distributed import move
from canon.core.training.fit import TrainingConfig, fit
from canon.images.clip import CLIP, tokenize, train_tokenizer
from canon.images.clip import Config as CLIPConfig
from canon.images.clip.training import CaptionedBatches
from canon.images.dalle import DALLE, PRESETS, Config, build, train
from canon.images.dalle.captions import Captions
from canon.images.dalle.dvae import DVAE
from canon.images.dalle.model import generate_images, rank
from canon.images.dalle.training import CaptionedCodes, corpus, dvae_scores, train_dvae
from canon.images.dalle.transformer import PATTERNS, Transformer, attention_mask


def _config(seed: int, first_steps: int, steps: int) -> Config:
    """The laptop preset with so many steps of each stage."""
    preset = PRESETS["laptop"]
    shrink = first_steps / preset.first_steps
    return replace(
        preset,
        first_steps=first_steps,
        temperature_steps=round(preset.temperature_steps * shrink),
        training=replace(preset.training, steps=steps, seed=seed, evaluate_every=0),
    )


# Masks ---------------------------------------------------------------------------------------------------------------


def _by_definition(pattern: str, text: int, side: int, kernel: int) -> Bool[Tensor, "time time"]:
    """What each input sees, pair by pair."""
    n, half = text + side**2, kernel // 2
    mask = torch.zeros(n, n, dtype=torch.bool)
    for query in range(n):
        for key in range(query + 1):
            q, k = (
                query - text - 1,
                key - text - 1,
            )  # places on the grid; negative in the text and at the start of image
            around = {q - up * side + across for up in range(half + 1) for across in range(-half, half + 1)}
            sees = {"row": q - side <= k, "column": q % side == k % side, "convolution": k in around}
            mask[query, key] = q < 0 or k < 0 or sees[pattern]
    return mask


@claim(
    "A code sees the whole caption and, of the codes before it, exactly its row, its column or its neighbourhood",
    source="section 2.2; appendix B.1, figure 11",
    passes="wrong_pairs == 0 and leak == 0 and reached == 1",
    seeds=3,
    minutes=0.2,
)
def masks_are_exact(lab: Lab, sabotage: bool = False) -> Measurement:
    """Masks of grids of 2 x 2 to 8 x 8 codes against their definitions, pair by pair. Then every input of the laptop's
    Transformer with random weights is changed in turn, for each mask alone and for all layers together: `leak` is the
    largest change of an output that must not change, `reached` the share that change of those that may. Sabotage: full
    causal attention.
    """
    wrong, draw = 0, torch.Generator().manual_seed(lab.seed)
    for text, side, kernel in ((6, 4, 3), (3, 2, 5), (5, 6, 3), (24, 8, 5)):
        for pattern in PATTERNS:
            mask = attention_mask(pattern, text, side, kernel)
            mask = torch.ones_like(mask).tril() if sabotage else mask
            wrong += int((mask != _by_definition(pattern, text, side, kernel)).sum())
    c = PRESETS["laptop"]
    model = Transformer(c).eval()
    definitions = [_by_definition(pattern, c.text_length, c.side, c.kernel_size).float() for pattern in PATTERNS]
    if sabotage:
        model.masks.copy_(torch.ones_like(model.masks).tril())
    text = torch.randint(c.vocab_size, (1, c.text_length), generator=draw)
    codes = torch.randint(c.codebook_size, (1, c.side, c.side), generator=draw)
    tokens = model.stream(text, codes)[:, :-1]
    leaks, shares = [], []
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.1, mean=float(p.dim() == 1), generator=draw)  # no weight underflows
        for layers in (*([index] for index in range(len(PATTERNS))), model.patterns):
            model.patterns, everything = layers, list(model.blocks)
            model.blocks = torch.nn.ModuleList(everything[: len(layers)])
            allowed = torch.eye(tokens.shape[1])
            for layer in layers:
                allowed = (definitions[layer] @ allowed > 0).float()
            # row j of the batch has another token at j
            others = tokens.repeat(tokens.shape[1], 1)
            others.diagonal().copy_(torch.where(others.diagonal() == 0, 1, 0))
            before, after = (model(rows).nan_to_num(neginf=0.0) for rows in (tokens, others))
            change = (after - before).abs().amax(2).T  # (output, changed input)
            leaks.append(float(change[allowed == 0].max()))
            shares.append(float((change[allowed == 1] > 0).float().mean()))
            model.blocks = torch.nn.ModuleList(everything)
    return Measurement(wrong_pairs=wrong, leak=max(leaks), reached=min(shares))


# The codebook --------------------------------------------------------------------------------------------------------


@claim(
    "Annealing the temperature of the relaxation to 1/16 closes the gap between relaxed and hard codes, and the "
    "codebook is used; at temperature 1 the decoder cannot read hard codes",
    source="section 2.1: 'annealing tau to 1/16 was sufficient to close the gap'",
    passes="annealed_ratio <= 1.1 and codes_used >= 0.5 and fixed_ratio >= 2",
    seeds=3,
    minutes=16,
)
def annealing_closes_the_gap(lab: Lab, sabotage: bool = False) -> Measurement:
    """Two dVAEs on shapes, alike but for the temperature. Ratios are of the squared error of pictures held out decoded
    from their likeliest codes and from relaxed samples at the last temperature of each. Sabotage: it stays at 1 in
    both.
    """
    config = _config(lab.seed, first_steps=2_000, steps=1)
    held = to_float(corpus(config.data, config.image_size, config.vocab_size)[1].images[:256])

    def scores(name: str, anneal: bool) -> dict[str, float]:
        shape = config if anneal else replace(config, temperature_steps=10**9)
        model = DVAE(shape)
        model.load_state_dict(train_dvae(shape, lab.stage(name, shape)))
        return dvae_scores(model.eval(), held, 1 / 16 if anneal else 1.0)

    fixed = scores("fixed", anneal=False)
    annealed = fixed if sabotage else scores("annealed", anneal=True)
    lab.table("held-out pictures", [{"temperature": "annealed"} | annealed, {"temperature": "1"} | fixed])
    return Measurement(
        annealed_ratio=annealed["hard_mse"] / annealed["soft_mse"],
        codes_used=annealed["codes_used"],
        fixed_ratio=fixed["hard_mse"] / fixed["soft_mse"],
        hard_mse=annealed["hard_mse"],
        perplexity=annealed["perplexity"],
    )


# The captions --------------------------------------------------------------------------------------------------------


def _learn(config: Config, run: Run, shuffled: bool) -> tuple[DALLE, Captions]:
    """A trained model; or one that learned from pictures with each other's captions."""
    pictures, _, tokenizer = corpus(config.data, config.image_size, config.vocab_size)
    captions = Captions(tokenizer, config.vocab_size, config.text_length)
    if not shuffled:
        return train(config, run), captions
    order = torch.randperm(len(pictures.captions), generator=torch.Generator().manual_seed(config.training.seed))
    wrong = Pictures(pictures.images, [pictures.captions[i] for i in order.tolist()])
    model = build(config)
    model.dvae.load_state_dict(train_dvae(config, run))
    return fit(model, CaptionedCodes(wrong, captions, config.training, False), run, config.training), captions


def _right(images: Float[Tensor, "n 3 size size"], texts: list[str], names: tuple[str, ...]) -> Bool[Tensor, " n"]:
    """Whether the oracle sees on a picture what its caption says of these attributes."""
    seen = oracle(images.shape[-1]).read(images)
    wanted = [read_prompt(text) for text in texts]
    return torch.stack([seen[name] == torch.tensor([w[name] for w in wanted]) for name in names]).all(0)


@torch.no_grad()
def _image_loss(model: DALLE, images: Float[Tensor, "n 3 size size"], tokens: Int[Tensor, "n text_length"]) -> float:
    """Nats a code, given the captions."""
    device = model.transformer.token_embedding.weight.device
    parts = zip(images.split(64), tokens.split(64))
    losses = [float(model.loss(move({"images": x, "tokens": y}, device))[1]["image_loss"]) * len(x) for x, y in parts]
    return sum(losses) / len(images)


@claim(
    "The caption decides what is drawn: samples show its colour and form, and codes are likelier after the right one",
    source="section 2.2; sections 3.1 and 3.3 show it at scale",
    passes="accuracy >= 5 / 24 and nll_gap >= 0.05",
    seeds=3,
    minutes=24,
)
def captions_control_pictures(lab: Lab, sabotage: bool = False) -> Measurement:
    """480 captions of fresh shapes, one sample each at temperature 1, colour and form read by an oracle (chance 1/24);
    codes of these shapes, in nats each, after their own captions and, the control, after each other's. Sabotage: the
    Transformer learns from shuffled captions.
    """
    config = _config(lab.seed, first_steps=2_000, steps=900)
    model, captions = _learn(config, lab.stage("dalle", config), shuffled=sabotage)
    fresh = shapes(480, config.image_size, seed=10_000 + lab.seed)
    real, tokens = to_float(fresh.images), captions.encode(fresh.captions)
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(lab.seed))]
    made = generate_images(model, tokens, seed=lab.seed)
    back = model.dvae.decode(model.dvae.codes(real))
    accuracies = {
        name: float(_right(images, fresh.captions, ("colour", "form")).float().mean())
        for name, images in (("accuracy", made), ("reconstructed", back), ("oracle", real))
    }
    matching = _image_loss(model, real, tokens)
    return Measurement(**accuracies, nll_gap=_image_loss(model, real, shuffled) - matching, nll=matching)


# Re-ranking ----------------------------------------------------------------------------------------------------------


def _train_clip(lab: Lab, name: str, shuffled: bool) -> tuple[CLIP, BPETokenizer]:
    """A small CLIP of shapes; or one that learned from pictures with each other's captions."""
    pictures = corpus("shapes", 32, PRESETS["laptop"].vocab_size)[0]
    texts = [ways[0] for ways in pictures.captions]
    tokenizer = train_tokenizer(texts, 640)
    recipe = TrainingConfig(
        steps=300, batch_size=128, learning_rate=2e-3, warmup_steps=30, final_fraction=0.0, optimizer="muon",
        beta2=0.98, eps=1e-6, weight_decay=0.2, seed=lab.seed,
    )  # fmt: skip
    config = CLIPConfig(
        d_embedding=64, image_size=32, image_layers=(3,), image_width=96, image_heads=3, patch_size=4,
        vocab_size=tokenizer.vocab_size, context_length=20, d_model=96, n_layers=2, n_heads=3, data="shapes",
        training=recipe,
    )  # fmt: skip
    tokens = tokenize(tokenizer, texts, config.context_length)[:, None]
    if shuffled:
        tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(lab.seed))]
    torch.manual_seed(lab.seed)
    stream = CaptionedBatches(pictures.images, tokens, recipe.batch_size, recipe.seed)
    return fit(CLIP(config), stream, lab.stage(name, config), recipe), tokenizer


def best_of(right: Bool[Tensor, " candidates"], n: int) -> float:
    """How often the first of n candidates is right, for candidates in order of rank: a mean over all choices of n."""
    total = len(right)
    # the one of rank r is the first of n if the others are among those behind it
    chances = [comb(total - 1 - r, n - 1) / comb(total, n) for r in range(total)]
    return sum(chance for chance, is_right in zip(chances, right.tolist()) if is_right)


@claim(
    "Pictures chosen by CLIP from more samples fit their caption better, and the gain levels off after the first few",
    source="section 2.6, figure 6",
    passes="best_of_1 < best_of_8 < best_of_32 and gain_to_8 >= 2 * gain_to_32 and abs(shuffled_gain) <= 0.02",
    partly="gain_to_8 >= 0.05 and gain_to_8 > gain_to_32 and abs(shuffled_gain) < gain_to_8 / 2",
    seeds=3,
    minutes=32,
)
def reranking_helps_and_levels_off(lab: Lab, sabotage: bool = False) -> Measurement:
    """32 samples of each of the 240 captions of shapes, ranked by a CLIP trained on the same pictures; right is a
    sample on which an oracle, which CLIP never sees, reads colour, form, place and size as the caption says.
    `gain_to_8` is from one sample to the best of 8, `gain_to_32` from there to the best of 32. Control: a CLIP trained
    on shuffled captions, of which `shuffled_gain` is that to 8. Sabotage: that CLIP ranks all.
    """
    config = _config(lab.seed, first_steps=2_000, steps=900)
    model, captions = _learn(config, lab.stage("dalle", config), shuffled=False)
    blind = _train_clip(lab, "shuffled-clip", shuffled=True)
    judge = blind if sabotage else _train_clip(lab, "clip", shuffled=False)
    texts = list(dict.fromkeys(shapes(6_000, config.image_size).captions))
    found: dict[str, list[float]] = {name: [] for name in ("best_of_1", "best_of_8", "best_of_32", "shuffled_8")}
    for index, text in enumerate(texts):
        seed = lab.seed * len(texts) + index
        images = generate_images(model, captions.encode([text] * 32), seed=seed)
        right = _right(images, [text] * 32, ("colour", "form", "place", "size"))
        ranked, random = (right[rank(*clip, text, images)[0]] for clip in (judge, blind))
        for n in (1, 8, 32):
            found[f"best_of_{n}"].append(best_of(ranked, n))
        found["shuffled_8"].append(best_of(random, 8))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    shuffled = means.pop("shuffled_8")
    return Measurement(
        **means,
        gain_to_8=means["best_of_8"] - means["best_of_1"],
        gain_to_32=means["best_of_32"] - means["best_of_8"],
        shuffled_gain=shuffled - means["best_of_1"],
    )
