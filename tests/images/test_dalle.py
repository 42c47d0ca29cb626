import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import models
from torch import distributions, nn

from canon.core.data.images import Pictures, to_float
from canon.core.errors import UserError
from canon.core.hub.pretrained import save_pretrained
from canon.core.lab.run import Run
from canon.core.training.fit import TrainingConfig
from canon.images import dalle
from canon.images.clip.model import CLIP
from canon.images.clip.model import Config as CLIPConfig
from canon.images.clip.tokenizer import SOT, tokenize, train_tokenizer
from canon.images.dalle import captions, dvae, model, training, transformer, weights

DATA = Path(__file__).with_name("data")
TINY = dalle.Config(
    data="shapes", image_size=32, codebook_size=10, dvae_width=8, dvae_groups=4, dvae_blocks=1, vocab_size=560,
    text_length=18, d_model=24, n_layers=3, n_heads=2, kernel_size=3, first_steps=2, first_batch_size=4,
    temperature_steps=2, kl_steps=1, training=TrainingConfig(steps=2, batch_size=4, precision="fp32", log_every=1),
)  # fmt: skip
GRID = replace(TINY, text_length=3, image_size=24, vocab_size=5)  # 3 tokens of text, 3 x 3 codes
TEXTS = ["a small red circle in the middle", "a large green star at the top left", "a large blue square"]


def drawn(module: nn.Module, std: float = 0.3) -> nn.Module:
    """The module with all of its parameters drawn at random, biases and gains too."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(mean=0.5 if p.dim() == 1 else 0.0, std=std)
    return module.eval()


# ------------------------------------------------------------------------------------------ stage 1: the networks


def write_released(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> Path:
    for part, tensors in parts.items():
        save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
                  folder / f"{part}.safetensors")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[dict[str, torch.Tensor], Path]:
    """What the released code computes on small random weights, and these weights under the released names."""
    found = load_file(DATA / "dalle_released.safetensors")
    parts = {
        part: {name.partition("/")[2]: tensor for name, tensor in found.items() if name.startswith(f"{part}/")}
        for part in ("encoder", "decoder")
    }
    return found, write_released(tmp_path_factory.mktemp("released"), parts)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_outputs_and_gradients_equal_the_released_code(released, part):
    found, folder = released
    ours = dalle.released_dvae(folder)
    assert (ours.config.dvae_width, ours.config.codebook_size, ours.config.dvae_groups) == (4, 12, 4)
    network = getattr(ours, part)
    x = found[f"{part}.input"].requires_grad_()
    y = network(x)
    torch.testing.assert_close(y, found[f"{part}.output"], rtol=1e-4, atol=1e-4)
    (y * found[f"{part}.weight"]).sum().backward()
    torch.testing.assert_close(x.grad, found[f"{part}.input_grad"], rtol=1e-3, atol=1e-4)
    names = weights.released_names(ours.config.dvae_groups, ours.config.dvae_blocks)
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for name, expected in found.items():
        if name.startswith(f"{part}.grad/"):
            torch.testing.assert_close(
                gradients.pop(names[name.partition("/")[2]]), expected, rtol=1e-3, atol=1e-3, msg=name
            )
    assert not gradients


def test_the_map_of_pixels_equals_the_released_one(released):
    found, _ = released
    images = 2 * found["pixels"] - 1
    torch.testing.assert_close(dvae.map_pixels(images), found["mapped"])
    torch.testing.assert_close(dvae.unmap_pixels(found["pixels"]), 2 * found["unmapped"] - 1)
    torch.testing.assert_close(dvae.unmap_pixels(dvae.map_pixels(images)), images)


def test_the_encoder_equals_transformers(tmp_path):
    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=14, num_blocks_per_group=2, freeze=False)
    reference = drawn(transformers.FlavaImageCodebook(config))
    renames = ((".group.", "."), (".path.", "."), (".weight", ".w"), (".bias", ".b"))

    def released_name(name: str) -> str:
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        return name

    shape = replace(TINY, codebook_size=14, dvae_blocks=2)
    names = weights.released_names(4, 2)
    other = {ours: theirs for theirs, ours in names.items()}
    decoder = {other[name]: tensor for name, tensor in drawn(dvae.DVAE(shape)).decoder.state_dict().items()}
    encoder = {released_name(name): tensor for name, tensor in reference.state_dict().items()}
    ours = dalle.released_dvae(write_released(tmp_path, {"encoder": encoder, "decoder": decoder}))
    x = torch.rand(2, 3, 32, 32)
    y, expected = ours.encoder(x), reference(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(y.argmax(1), reference.get_codebook_indices(x))
    weight = torch.randn_like(y)
    for output in (y, expected):
        (output * weight).sum().backward()
    gradients = {name: p.grad for name, p in ours.encoder.named_parameters()}
    for name, p in reference.named_parameters():
        got = gradients.pop(names[released_name(name)])
        torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()), msg=name)
    assert not gradients


def test_a_released_file_that_does_not_fit_is_one_line(released, tmp_path):
    found, folder = released
    with pytest.raises(UserError, match=r"no file .*encoder\.safetensors"):
        dalle.released_dvae(tmp_path)
    write_released(tmp_path, {"encoder": {"w": torch.zeros(1)}, "decoder": {"w": torch.zeros(1)}})
    with pytest.raises(UserError, match="not the encoder of a dVAE") as error:
        dalle.released_dvae(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "encoder.safetensors").write_bytes((folder / "encoder.safetensors").read_bytes())
    with pytest.raises(UserError, match="decoder"):
        dalle.released_dvae(tmp_path)


def test_fresh_networks_have_the_published_form():
    fresh = dvae.DVAE(replace(TINY, dvae_width=64, codebook_size=128, dvae_groups=3, dvae_blocks=2))
    blocks = [module for module in fresh.modules() if isinstance(module, dvae.Bottleneck)]
    assert len(blocks) == 12
    assert {block.gain for block in blocks} == {1 / 6**2}  # 1 / n_layers^2 of each network
    assert [c.kernel_size[0] for c in fresh.encoder.groups[0][0].convolutions] == [3, 3, 3, 1]
    assert [c.kernel_size[0] for c in fresh.decoder.groups[0][0].convolutions] == [1, 3, 3, 3]
    assert (fresh.encoder.input.kernel_size, fresh.encoder.output.kernel_size) == ((7, 7), (1, 1))
    assert (fresh.decoder.input.kernel_size, fresh.decoder.output.kernel_size) == ((1, 1), (1, 1))
    assert fresh.encoder.output.weight.std().item() == pytest.approx((4 * 64) ** -0.5, rel=0.05)
    pools = [module for module in fresh.modules() if isinstance(module, nn.MaxPool2d)]
    ups = [module for module in fresh.modules() if isinstance(module, nn.Upsample)]
    assert (len(pools), len(ups), {up.mode for up in ups}) == (2, 2, {"nearest"})
    codes = fresh.codes(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 8, 8)
    assert fresh.decode(codes).shape == (2, 3, 32, 32)


# ---------------------------------------------------------------------------------- stage 1: likelihood and loss


def test_logit_laplace_is_a_laplace_variable_squashed():
    x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for mu, b in ((0.0, 1.0), (-1.2, 0.3), (2.0, 0.05)):
        mu, b = torch.tensor(mu, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        squashed = distributions.TransformedDistribution(distributions.Laplace(mu, b), distributions.SigmoidTransform())
        ours = dvae.logit_laplace(x, mu.expand(9), b.log().expand(9))
        torch.testing.assert_close(ours, squashed.log_prob(x))
        # Eq. 2 of the appendix, digit by digit
        by_hand = [math.exp(-abs(math.log(p / (1 - p)) - float(mu)) / float(b)) / (2 * float(b) * p * (1 - p))
                   for p in x.tolist()]  # fmt: skip
        torch.testing.assert_close(ours.exp(), torch.tensor(by_hand, dtype=torch.float64))


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.9), (1.5, 0.4), (-2.0, 0.1)])
def test_logit_laplace_integrates_to_one(mu, b):
    x = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    density = dvae.logit_laplace(x, torch.full_like(x, mu), torch.full_like(x, math.log(b))).exp()
    assert float(density.mean()) == pytest.approx(1, abs=2e-3)


def test_the_loss_is_the_negative_relaxed_bound_and_so_is_its_gradient():
    config = replace(TINY, dvae_groups=3, temperature_steps=40, kl_steps=20)
    ours = drawn(dvae.DVAE(config), 0.2)
    images, seed = torch.rand(3, 3, 16, 16) * 2 - 1, torch.tensor([5, 900, 17])
    loss, metrics = ours.loss({"images": images, "step": torch.full((3,), 10), "seed": seed})
    loss.backward()
    gradients = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()

    tau = 1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 4)) / 2
    beta = 6.6 * (1 - math.cos(math.pi / 2)) / 2
    assert metrics["temperature"] == pytest.approx(tau)
    assert metrics["kl_weight"] == pytest.approx(beta)
    x = 0.1 + 0.8 * (images + 1) / 2
    total = 0.0
    for row, s in zip(x, seed.tolist()):
        logits = ours.encoder(row[None])
        noise = torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(s))
        z = torch.softmax((logits - noise.log()) / tau, dim=1)
        mu, log_b = ours.decoder(z)[0].split(3)
        density = (-(torch.log(row / (1 - row)) - mu).abs() / log_b.exp()).exp() / (2 * log_b.exp() * row * (1 - row))
        q = logits[0].permute(1, 2, 0).softmax(-1)
        kl = (q * (q / (1 / 10)).log()).sum()  # over all places of the grid
        total = total - density.log().sum() + beta * kl
    expected = total / 3 / (16 * 16 * 3)  # "we divide the overall loss by 256 x 256 x 3"
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    expected.backward()
    for (name, p), got in zip(ours.named_parameters(), gradients):
        torch.testing.assert_close(got, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()), msg=name)
        assert float(got.abs().max()) > 0, name


def test_a_code_weighs_beta_over_192_in_the_paper():
    paper = dalle.PRESETS["paper"]
    assert 3 * paper.image_size**2 / paper.side**2 == 192
    assert (paper.kl_weight, paper.side, paper.codebook_size) == (6.6, 32, 8192)


def test_the_noise_of_a_picture_is_a_function_of_its_seed_alone():
    ours = drawn(dvae.DVAE(TINY))
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    seeds = torch.tensor([3, 1, 4, 1])
    together = ours(images, 0.5, seeds)[1]
    torch.manual_seed(99)
    apart = torch.cat([ours(images[i : i + 1], 0.5, seeds[i : i + 1])[1] for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, ours(images, 0.5, seeds + 1)[1], atol=1e-3)


def test_schedules_follow_a_cosine_and_then_stay():
    assert [dvae.temperature_at(step, 150_000) for step in (0, 75_000, 150_000, 3_000_000)] == pytest.approx(
        [1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16]
    )
    assert dvae.temperature_at(37_500, 150_000) == pytest.approx(1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 4)) / 2)
    assert [dvae.kl_weight_at(step, 5_000, 6.6) for step in (0, 2_500, 5_000, 99_999)] == pytest.approx(
        [0, 3.3, 6.6, 6.6]
    )
    assert dvae.kl_weight_at(1_250, 5_000, 6.6) == pytest.approx(6.6 * (1 - math.cos(math.pi / 4)) / 2)


# ------------------------------------------------------------------------------------------ stage 2: who sees whom


def brute_force(pattern: str, text: int, side: int, kernel: int) -> torch.Tensor:
    """Masks by their definitions, pair by pair: text, the start of image, then codes in raster order."""
    n = text + side**2
    mask = torch.zeros(n, n, dtype=torch.bool)
    for query, key in itertools.product(range(n), range(n)):
        if key > query:
            continue
        if query <= text or key <= text:  # the text is causal, and whole for every code
            mask[query, key] = True
            continue
        q, k = query - text - 1, key - text - 1
        if pattern == "row":
            mask[query, key] = k in range(q - side, q + 1)
        elif pattern == "column":
            mask[query, key] = q % side == k % side
        else:
            half = kernel // 2
            window = {q - up * side + across for up in range(half + 1) for across in range(-half, half + 1)}
            mask[query, key] = k in window
    return mask


@pytest.mark.parametrize("pattern", ["row", "column", "convolution"])
@pytest.mark.parametrize(("text", "side", "kernel"), [(6, 4, 3), (2, 3, 1), (4, 5, 5), (3, 2, 5)])
def test_masks_equal_their_definitions(pattern, text, side, kernel):
    ours = transformer.attention_mask(pattern, text, side, kernel)
    assert torch.equal(ours, brute_force(pattern, text, side, kernel))


def test_the_masks_of_figure_11():
    """A text of 6 tokens and 4 x 4 codes; the 11th code stands in row 2, column 2."""
    seen = {
        p: transformer.attention_mask(p, 6, 4, 3)[7 + 10, 7:].nonzero()[:, 0].tolist() for p in transformer.PATTERNS
    }
    assert seen["row"] == [6, 7, 8, 9, 10]  # "each image token attends to the previous 5 image tokens in raster order"
    assert seen["column"] == [2, 6, 10]
    assert seen["convolution"] == [5, 6, 7, 9, 10]
    wrapped = transformer.attention_mask("convolution", 6, 4, 3)[7 + 8, 7:].nonzero()[:, 0].tolist()
    assert wrapped == [3, 4, 5, 7, 8]  # row 2, column 0: the left neighbours are the ends of the rows before


def test_layers_take_turns_and_the_last_is_convolutional():
    assert transformer.layer_patterns(6) == ["row", "column", "row", "row", "row", "convolution"]
    patterns = transformer.layer_patterns(64)
    assert patterns[:8] == ["row", "column", "row", "row"] * 2
    assert patterns.count("column") == 16
    assert [i for i, pattern in enumerate(patterns) if pattern == "convolution"] == [63]


@pytest.mark.parametrize("patterns", [("row",), ("column",), ("convolution",), ("row", "column", "convolution")])
def test_an_input_reaches_exactly_the_outputs_that_the_masks_allow(patterns):
    ours = transformer.Transformer(replace(GRID, n_layers=len(patterns)))
    drawn(ours)
    ours.patterns = [transformer.PATTERNS.index(pattern) for pattern in patterns]
    n = GRID.context_length
    tokens = ours.stream(torch.randint(5, (1, 3)), torch.randint(10, (1, 3, 3)))[:, :-1]
    embedded = []
    ours.token_embedding.register_forward_hook(lambda module, inputs, y: (y.retain_grad(), embedded.append(y))[0])
    logits = ours(tokens)
    reached = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        embedded[0].grad = None
        finite = logits[0, i][logits[0, i].isfinite()]
        (finite * torch.randn(len(finite))).sum().backward(retain_graph=True)
        reached[i] = embedded[0].grad[0].abs().sum(-1) > 0
    allowed = torch.eye(n)
    for pattern in patterns:
        allowed = (brute_force(pattern, 3, 3, 3).float() @ allowed > 0).float()
    assert torch.equal(reached, allowed.bool())


def test_text_is_followed_by_text_and_codes_by_codes():
    ours = drawn(transformer.Transformer(GRID))
    tokens = ours.stream(torch.randint(5, (2, 3)), torch.randint(10, (2, 3, 3)))
    assert tokens.shape == (2, 13)
    assert tokens[:, 3].tolist() == [ours.start_of_image] * 2
    finite = ours(tokens[:, :-1]).isfinite()
    assert (ours.start_of_image, ours.first_code) == (5 + 3, 5 + 3 + 1)
    text, codes = range(8), range(9, 19)
    for position in range(12):
        expected = text if position < 3 else codes
        for row in finite[:, position]:
            assert row.nonzero()[:, 0].tolist() == list(expected)


def test_codes_know_their_row_and_their_column():
    ours = transformer.Transformer(GRID)
    positions = ours.positions()
    assert positions.shape == (12, 24)
    assert torch.equal(positions[:3], ours.text_position.weight)
    assert torch.equal(positions[3], torch.zeros(24))  # the start of image
    for place in range(8):
        row, column = divmod(place, 3)
        expected = ours.row_position.weight[row] + ours.column_position.weight[column]
        assert torch.equal(positions[4 + place], expected)


def test_cached_decoding_equals_the_full_forward():
    ours = drawn(transformer.Transformer(GRID), 0.2)
    tokens = ours.stream(torch.randint(5, (3, 3)), torch.randint(10, (3, 3, 3)))[:, :-1]
    with torch.no_grad():
        full = ours(tokens)
        cache = ours.new_cache(3, 12)
        parts = [ours(tokens[:, :2], cache), ours(tokens[:, 2:5], cache)]
        parts += [ours(tokens[:, i : i + 1], cache, last_only=True) for i in range(5, 12)]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(tokens, last_only=True)[:, 0], full[:, -1], rtol=0, atol=1e-5)


def test_attention_written_out_equals_the_kernel():
    q, k, v = torch.randn(3, 2, 3, 12, 8)
    mask = transformer.attention_mask("row", 3, 3, 3)
    exact = transformer.masked_attention(q, k, v, mask)
    by_hand = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(exact, by_hand, rtol=1e-4, atol=1e-5)
    rounded = transformer.masked_attention(*(x.bfloat16() for x in (q, k, v)), mask)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------- stage 2: loss and sampling


def test_the_loss_is_an_eighth_text_and_seven_eighths_codes():
    ours = drawn(model.DALLE(replace(TINY, text_length=5, dvae_groups=3)), 0.2)
    text, images = torch.randint(560, (2, 5)), torch.rand(2, 3, 32, 32) * 2 - 1
    loss, metrics = ours.loss({"tokens": text, "images": images})
    codes = ours.dvae.logits(images).argmax(1).flatten(1)
    stream = torch.cat([text, torch.full((2, 1), 560 + 5), codes + 560 + 5 + 1], 1)
    logits = ours.transformer(stream[:, :-1])
    log_p = torch.stack([logits[:, i, :565].log_softmax(-1).gather(1, text[:, i + 1 : i + 2]) for i in range(4)])
    image = torch.stack([logits[:, 5 + i, 566:].log_softmax(-1).gather(1, codes[:, i : i + 1]) for i in range(64)])
    torch.testing.assert_close(loss, -log_p.mean() / 8 - 7 * image.mean() / 8)
    torch.testing.assert_close(metrics["text_loss"], -log_p.mean())
    torch.testing.assert_close(metrics["image_loss"], -image.mean())


def test_the_codebook_is_frozen_and_all_else_learns():
    ours = dalle.build(TINY)
    assert not any(p.requires_grad for p in ours.dvae.parameters())
    batch = next(dalle.batches(TINY))
    ours.loss(batch)[0].backward()
    for name, p in ours.transformer.named_parameters():
        assert float(p.grad.abs().max()) > 0, name
    assert ours.train().loss(batch)[0] == ours.loss(batch)[0]  # "without adding any gumbel noise"


def test_sampled_codes_follow_the_model():
    ours = drawn(model.DALLE(GRID), 0.3)
    text = torch.tensor([[1, 2, 7], [3, 6, 7]])
    greedy = model.generate_codes(ours, text, temperature=0.0)
    stream = ours.transformer.stream(text, torch.zeros(2, 3, 3, dtype=torch.long))
    for i in range(9):
        with torch.no_grad():
            stream[:, 4 + i] = ours.transformer(stream[:, : 4 + i])[:, -1].argmax(-1)
    assert torch.equal(greedy.flatten(1), stream[:, 4:] - ours.transformer.first_code)
    drawn_codes = model.generate_codes(ours, text[:1].expand(2000, -1), seed=3)
    assert drawn_codes.shape == (2000, 3, 3)
    assert int(drawn_codes.min()) >= 0
    assert int(drawn_codes.max()) < 10
    assert torch.equal(drawn_codes[:2], model.generate_codes(ours, text[:1].expand(2, -1), seed=3))
    with torch.no_grad():
        expected = ours.transformer(stream[:1, :4])[0, -1, ours.transformer.first_code :].softmax(-1)
    share = drawn_codes[:, 0, 0].bincount(minlength=10) / 2000
    assert float((share - expected).abs().max()) < 0.04
    images = model.generate_images(ours, text, seed=3, batch_size=1)
    torch.testing.assert_close(images, ours.dvae.decode(model.generate_codes(ours, text, seed=3)), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 560)


@pytest.fixture(scope="module")
def judge(tokenizer) -> CLIP:
    torch.manual_seed(0)
    config = CLIPConfig(
        d_embedding=16, image_size=16, image_layers=(1,), image_width=16, image_heads=2, patch_size=8,
        vocab_size=tokenizer.vocab_size, context_length=12, d_model=16, n_layers=1, n_heads=2, data="shapes",
    )  # fmt: skip
    return CLIP(config).eval()


def test_clip_ranks_by_similarity(tokenizer, judge):
    images = torch.rand(70, 3, 16, 16) * 2 - 1
    order, scores = model.rank(judge, tokenizer, TEXTS[0], images)
    text = judge.encode_text(tokenize(tokenizer, [TEXTS[0]], 12))
    expected = F.cosine_similarity(judge.encode_image(images), text)
    torch.testing.assert_close(scores, expected)
    assert order.tolist() == sorted(range(70), key=lambda i: -float(expected[i]))
    larger = F.interpolate(images[:4], scale_factor=2)
    torch.testing.assert_close(model.rank(judge, tokenizer, TEXTS[0], larger)[1], expected[:4], rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------------- captions


def test_each_position_has_a_padding_token_of_its_own(tokenizer):
    rows = captions.Captions(tokenizer, 560, 18).encode(TEXTS)
    for row, text in zip(rows.tolist(), TEXTS):
        ids = [tokenizer.rust.token_to_id(SOT), *tokenizer.encode(text)]
        assert row == [*ids, *(560 + position for position in range(len(ids), 18))]
    short = captions.Captions(tokenizer, 560, 4).encode(TEXTS)
    assert torch.equal(short, rows[:, :4])


def test_without_dropout_merging_equals_the_library(tokenizer):
    ours = captions.Captions(tokenizer, 560, 18)
    strange = [*TEXTS, "A  RED apple, naïve 42!", "日本", "", "red <|endoftext|>"]
    for text in strange:
        symbols = ours._with_dropout(text, 1e-12, captions.random.Random(0))
        assert symbols == tokenizer.encode_batch([text], special=False)[0], text


def test_bpe_dropout_leaves_out_merges_as_often_as_the_library(tokenizer):
    ours = captions.Captions(tokenizer, 560, 60)
    letters = ours._with_dropout(TEXTS[0], 1.0, captions.random.Random(0))
    assert len(letters) == len(TEXTS[0].replace(" ", ""))
    many = TEXTS * 700
    mine = (ours.encode(many, 0.1, seed=1) < 560).sum().item() / len(many)
    library = captions.json.loads(tokenizer.rust.to_str())["model"]
    theirs = models.BPE(
        vocab=library["vocab"],
        merges=[tuple(pair) for pair in library["merges"]],
        end_of_word_suffix="</w>",
        dropout=0.1,
    )
    words = [word for text in TEXTS for word in text.split()] * 700
    counted = sum(len(theirs.tokenize(word)) for word in words) / len(many) + 1  # the start of text
    assert mine == pytest.approx(counted, rel=0.02)
    whole = (ours.encode(TEXTS) < 560).sum().item() / 3
    assert mine > whole + 0.5
    assert torch.equal(ours.encode(TEXTS, 0.1, seed=5), ours.encode(TEXTS, 0.1, seed=5))
    for row in ours.encode(many[:30], 0.3, seed=2):
        said = tokenizer.decode([t for t in row.tolist() if t < 560]).replace(SOT, "")
        assert said.strip() in TEXTS


# ------------------------------------------------------------------------------------- training, samples, errors


def test_batches_are_a_function_of_their_position():
    first, second = dalle.batches(TINY), dalle.batches(TINY)
    batches = [next(first) for _ in range(4)]
    second.load_state_dict({"position": 3})
    again = next(second)
    assert all(torch.equal(batches[3][key], again[key]) for key in again)
    assert first.state_dict() == {"position": 4}
    assert batches[0]["tokens"].shape == (4, 18)
    pictures = training.corpus("shapes", 32, 560)[0]
    noisy = training.NoisyPictures(pictures, TINY.training, moved=False, noise=0.1)
    clean = training.NoisyPictures(pictures, TINY.training, moved=False, noise=0.0)
    drawn_batches = [next(noisy) for _ in range(3)]
    assert [int(batch["step"][0]) for batch in drawn_batches] == [0, 1, 2]
    assert len({int(seed) for batch in drawn_batches for seed in batch["seed"]}) == 12
    difference = drawn_batches[0]["images"] - next(clean)["images"]
    assert 0.095 < float(difference.abs().max()) <= 0.1001


def test_one_picture_in_twenty_is_held_out(monkeypatch):
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    monkeypatch.setattr(training, "load_pictures", lambda *_: Pictures(images, [(f"word {i}",) for i in range(40)]))
    training.corpus.cache_clear()
    learned, held, _ = training.corpus("shapes", 32, 560)
    training.corpus.cache_clear()
    assert held.images[:, 0, 0, 0].tolist() == [19, 39]
    assert held.captions == [("word 19",), ("word 39",)]
    assert len(learned.images) == len(learned.captions) == 38


def test_too_few_pictures_name_the_option_of_their_stage(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"a small {name} at the top")
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"{name}.png")
    for number, (first, option) in enumerate(((4, "--first-batch-size"), (1, "--batch-size"))):
        config = replace(TINY, data=str(tmp_path), vocab_size=530, first_batch_size=first)
        with pytest.raises(UserError, match=f"2 pictures do not fill a batch of 4: lower {option}$"):
            dalle.train(config, Run.create("dalle", str(number), config, tmp_path / "runs"))


def test_both_stages_train_and_the_report_shows_them(tmp_path, tokenizer, judge):
    root = tmp_path / "runs"
    clip_run = Run.create("clip", "one", judge.config, root)
    save_pretrained(judge, judge.config, clip_run.path / "model", system="clip", tokenizer=tokenizer)
    run = Run.create("dalle", "one", TINY, root)
    run.quiet, run.track = True, False
    trained = dalle.train(TINY, run)
    names = {entry["name"] for entry in run.samples()}
    assert len(names) == 5
    assert any("ranked by CLIP" in name for name in names)
    assert run.stage("dvae").metrics()[-1].keys() >= {"hard_mse", "soft_mse", "codes_used", "perplexity", "kl", "nll"}
    assert run.metrics()[-1].keys() >= {"validation_loss", "validation_image_loss", "text_loss", "image_loss"}
    loaded, words = dalle.from_pretrained(run.path / "model")
    for (name, a), b in zip(trained.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    first = load_file(run.path / "stages" / "dvae" / "model" / "model.safetensors")
    assert all(torch.equal(tensor, loaded.dvae.state_dict()[name]) for name, tensor in first.items())
    assert words.encode("red") == training.corpus("shapes", 32, 560)[2].encode("red")

    page = dalle.sample(loaded, run, TEXTS[0], count=3, candidates=5, seed=1)
    assert page.size == (3 * 32 * 4 + 2 * 2, 32 * 4)
    text = captions.Captions(words, 560, 18).encode([TEXTS[0]] * 5)
    images = model.generate_images(loaded, text, seed=1)
    order, _ = model.rank(judge, tokenizer, TEXTS[0], images)
    tile = torch.tensor(list(page.crop((0, 0, 128, 128)).resize((32, 32), Image.Resampling.NEAREST).tobytes()))
    assert float((to_float(tile.view(32, 32, 3).permute(2, 0, 1).byte()) - images[order[0]]).abs().max()) < 0.01
    with pytest.raises(UserError, match="at least count"):
        dalle.sample(loaded, run, candidates=2)
    alone = Run.create("dalle", "one", TINY, tmp_path / "elsewhere")
    save_pretrained(loaded, TINY, alone.path / "model", system="dalle", tokenizer=words)
    with pytest.raises(UserError, match="needs a CLIP"):
        dalle.sample(loaded, alone, candidates=16)
    assert dalle.sample(loaded, alone, count=1).size == (128, 128)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_heads": 5}, "n_heads"),
        ({"n_heads": 0}, "n_heads"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"image_size": 30}, "image_size"),
        ({"dvae_width": 6}, "dvae_width"),
        ({"text_length": 1}, "text_length"),
        ({"n_layers": 0}, "n_layers"),
        ({"pixel_noise": 0.3}, "pixel_noise"),
    ],
)
def test_a_wrong_configuration_is_one_line(change, said):
    with pytest.raises(UserError, match=said) as error:
        replace(TINY, **change)
    assert "\n" not in str(error.value)


def test_the_paper_has_twelve_billion_parameters_and_the_laptop_three_million_at_most():
    with torch.device("meta"):
        paper = transformer.Transformer(dalle.PRESETS["paper"])
    assert sum(p.numel() for p in paper.parameters()) == pytest.approx(12.2e9, rel=0.02)
    assert paper.masks.shape == (3, 1280, 1280)
    for preset in ("laptop", "emoji"):
        assert sum(p.numel() for p in dalle.build(dalle.PRESETS[preset]).parameters()) <= 3_000_000
    recipe, first = dalle.PRESETS["paper"].training, training.first_recipe(dalle.PRESETS["paper"])
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.learning_rate) == (0.9, 0.96, 0.045, 4.5e-4)
    assert (first.beta2, first.weight_decay, first.ema_decay, first.learning_rate) == (0.999, 1e-4, 0.999, 1e-4)
    assert first.learning_rate * first.final_fraction == pytest.approx(1.25e-6)


def test_another_system_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    with pytest.raises(UserError, match="not DALL-E"):
        dalle.from_pretrained(tmp_path)
