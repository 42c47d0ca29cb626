import gzip
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from canon.core.data import assets, text
from canon.core.data.images import emoji
from canon.core.errors import UserError
from canon.core.hub.pretrained import _rename, load_weights, save_pretrained
from canon.core.lab import Run
from canon.core.training import distributed
from canon.core.training.fit import TrainingConfig, fit
from canon.images import clip
from canon.images.clip import weights
from canon.images.clip.model import CHANNEL_MEAN, CHANNEL_STD
from canon.images.clip.tokenizer import SOT, bpe_tokenizer, load_clip_tokenizer
from canon.images.clip.training import CaptionedBatches, crop, jitter
from canon.images.clip.vision import Bottleneck
from tests.images.make_clip_resnet_fixture import FILE, TINY, draw, fingerprint, inputs

OPEN_CLIP: dict[str, Any] = json.loads(gzip.decompress(FILE.read_bytes()))
SMALL = clip.Config(
    d_embedding=12, image_size=16, image_layers=(2,), image_width=16, image_heads=2, patch_size=8, vocab_size=600,
    context_length=12, d_model=16, n_layers=2, n_heads=2, data="shapes", tokenizer="bpe", augmentation="jitter",
    training=TrainingConfig(steps=20, batch_size=16, learning_rate=3e-3, warmup_steps=5, log_every=1, precision="fp32"),
)  # fmt: skip
PUBLISHED = {
    "RN50": "rn50", "RN101": "rn101", "RN50x4": "rn50x4", "RN50x16": "rn50x16", "RN50x64": "rn50x64",
    "ViT-B-32": "vit-b-32", "ViT-B-16": "vit-b-16", "ViT-L-14": "vit-l-14", "ViT-L-14-336": "vit-l-14-336",
}  # fmt: skip


def standardised(images: Tensor) -> Tensor:
    """What other libraries are given for our pictures in [-1, 1]."""
    return ((images + 1) / 2 - torch.tensor(CHANNEL_MEAN)[:, None, None]) / torch.tensor(CHANNEL_STD)[:, None, None]


def captions(rows: int, vocab_size: int, length: int) -> Tensor:
    """Random captions that end at different places with the last token of the vocabulary."""
    tokens = torch.randint(1, vocab_size - 2, (rows, length))
    for row in range(rows):
        tokens[row, 2 + row] = vocab_size - 1
        tokens[row, 3 + row :] = 0
    return tokens


def program(tensors: dict[str, Tensor]) -> torch.jit.ScriptModule:
    """A TorchScript program with these tensors, as OpenAI released its models."""
    root = nn.Module()
    for name, tensor in tensors.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(last, tensor)
    return torch.jit.script(root)


def randomise(model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1) * 0.5, std=0.2)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.CLIPModel, Path]:
    torch.manual_seed(1)
    text_config = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 2, "max_position_embeddings": 11, "bos_token_id": 88, "eos_token_id": 89,
    }  # fmt: skip
    vision_config = {
        "hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 20, "patch_size": 5,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    randomise(model)
    folder = tmp_path_factory.mktemp("huggingface")
    model.save_pretrained(folder)
    return model, folder


def test_outputs_loss_and_gradients_equal_transformers(huggingface):
    reference, folder = huggingface
    ours, tokenizer = clip.from_pretrained(folder)
    assert tokenizer is None
    images, tokens = torch.rand(6, 3, 20, 20) * 2 - 1, captions(6, 90, 11)
    theirs = reference(input_ids=tokens, pixel_values=standardised(images), return_loss=True)
    image, text, scale = ours(images, tokens)
    torch.testing.assert_close(image, theirs.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, theirs.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(scale * image @ text.t(), theirs.logits_per_image, rtol=0, atol=1e-4)
    loss, _ = ours.loss({"images": images, "tokens": tokens})
    torch.testing.assert_close(loss, theirs.loss)
    loss.backward()
    theirs.loss.backward()
    expected = clip.CLIP(ours.config)  # whose weights are their gradients
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    load_weights(expected, weights.fuse_qkv(gradients), weights.HF_NAMES)
    for (name, p), q in zip(ours.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_text_tower_alone_equals_transformers(activation: str, prefix: str):
    config = transformers.CLIPTextConfig(
        vocab_size=90, hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=11, bos_token_id=88, eos_token_id=89, hidden_act=activation,
    )  # fmt: skip
    reference = transformers.CLIPTextModel(config).eval()
    randomise(reference)
    state = {name if name.startswith(prefix) else prefix + name: p for name, p in reference.state_dict().items()}
    options = {} if activation == "quick_gelu" else {"activation": F.gelu}
    ours = clip.TextTransformer(90, 11, 32, 3, 2, **options)
    load_weights(ours, weights.fuse_qkv(state), weights.HF_TEXT_NAMES)
    tokens = captions(5, 90, 11)
    theirs = reference(input_ids=tokens)
    hidden = ours(tokens)
    assert hidden.shape == (5, 11, 32)
    torch.testing.assert_close(hidden, theirs.last_hidden_state, rtol=0, atol=1e-4)
    torch.testing.assert_close(clip.pool(hidden, tokens), theirs.pooler_output, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", TINY)
def test_outputs_loss_and_gradients_equal_open_clip(kind: str, tmp_path: Path):
    expected = OPEN_CLIP[kind]
    tensors = {name: draw(name, tuple(shape)) for name, shape in expected["shapes"].items()}
    assert sum(tensor.numel() for tensor in tensors.values()) > 100_000
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pt")
    ours, _ = clip.from_pretrained(tmp_path / "model.safetensors")
    settings = {"input_resolution": torch.tensor(TINY[kind]["image_size"]), "vocab_size": torch.tensor(7)}
    torch.jit.save(program(tensors | settings), tmp_path / "released.pt")
    for name in ("model.pt", "released.pt"):
        other, _ = clip.from_pretrained(tmp_path / name)
        assert all(map(torch.equal, ours.state_dict().values(), other.state_dict().values()))
    pixels, tokens = inputs(TINY[kind]["image_size"])
    ours.image.double()
    ours.image_projection.double()
    images = (pixels.double() * ours.channel_std + ours.channel_mean) * 2 - 1
    with torch.no_grad():
        image, text, _ = ours(images, tokens)
    torch.testing.assert_close(image, torch.tensor(expected["image"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(text, torch.tensor(expected["text"]), rtol=0, atol=1e-5)
    loss, _ = ours.train().loss({"images": images, "tokens": tokens})
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    loss.backward()
    names = weights.OPENAI_VIT_NAMES if kind == "vit" else weights.OPENAI_RESNET_NAMES
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, (norm, product) in expected["gradients"].items():
        shape = expected["shapes"][name]
        (our_name,) = _rename({name: tensors[name]}, names, {})[0]
        gradient = gradients.pop(our_name)
        gradient = gradient.t() if name in ("visual.proj", "text_projection") else gradient.reshape(shape)
        found = fingerprint(name, gradient)
        assert found == pytest.approx([norm, product], rel=1e-3, abs=1e-4 * norm + 1e-6), name
    assert not gradients


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name: str):
    with torch.device("meta"):
        model = clip.CLIP(clip.PRESETS[PUBLISHED[name]])
    assert sum(p.numel() for p in model.parameters()) == OPEN_CLIP["parameters"][name]


@pytest.mark.parametrize("name", OPEN_CLIP["layouts"])
def test_openai_layouts_fill_the_model_that_their_shapes_describe(name: str):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in OPEN_CLIP["layouts"][name].items()}
    config, preset = weights.config_from_shapes(tensors), clip.PRESETS[PUBLISHED[name]]
    assert config == replace(preset, training=config.training)
    with torch.device("meta"):
        model = clip.CLIP(config)
    names = weights.OPENAI_VIT_NAMES if name.startswith("ViT") else weights.OPENAI_RESNET_NAMES
    settings = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.empty((), device="meta"))
    load_weights(model, tensors | settings, names)
    with pytest.raises(UserError, match="1 missing"):
        load_weights(model, {key: t for key, t in tensors.items() if key != "ln_final.bias"}, names)


def test_the_hugging_face_layout_of_vit_b_32_fills_the_model():
    with torch.device("meta"):
        state = transformers.CLIPModel(transformers.CLIPConfig()).state_dict()
        model = clip.CLIP(weights.config_from_settings({"model_type": "clip"}))
    assert model.config == replace(clip.PRESETS["vit-b-32"], training=model.config.training)
    load_weights(model, weights.fuse_qkv(state), weights.HF_NAMES)


def test_published_recipes():
    for name, rate in (("rn50", 5e-4), ("vit-b-32", 5e-4), ("vit-l-14", 4e-4), ("rn50x16", 4e-4), ("rn50x64", 3.6e-4)):
        recipe = clip.PRESETS[name].training
        assert (recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (32_768, rate, 0.2)
        assert recipe.batch_size * recipe.steps == 32 * 400_000_000
        assert (recipe.beta2, recipe.eps) == ((0.98, 1e-6) if name.startswith("vit") else (0.999, 1e-8))


def test_other_models_are_refused(huggingface, tmp_path):
    _, folder = huggingface
    settings = json.loads((folder / "config.json").read_text())

    def refused(changed: dict[str, Any], match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            weights.config_from_settings(settings | changed)
        assert "\n" not in str(error.value)

    refused({"model_type": "siglip"}, "siglip")
    refused({"vision_config": settings["vision_config"] | {"hidden_act": "gelu"}}, "hidden_act")  # LAION's
    refused({"text_config": settings["text_config"] | {"intermediate_size": 99}}, "intermediate_size")
    refused({"text_config": settings["text_config"] | {"eos_token_id": 7}}, "end with another token")
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "program.pt")
    with pytest.raises(UserError):  # it is no CLIP, and there is no config.json beside it
        clip.from_pretrained(tmp_path / "program.pt")
    save_file({"visual.conv1.weight": torch.zeros(4, 3, 2, 2)}, tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="not a whole CLIP"):
        clip.from_pretrained(tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"n_heads": 3}, "n_heads"),
        ({"image_heads": 3}, "image_heads"),
        ({"patch_size": 5}, "patch"),
        ({"image_layers": (2, 2)}, "image_layers"),
        ({"image_layers": (1, 1, 1, 1)}, "multiple of 32"),
        ({"training": TrainingConfig(accumulation=2)}, "accumulation"),
    ],
)
def test_configurations_that_cannot_be_are_one_line(changed: dict[str, Any], match: str):
    with pytest.raises(UserError, match=match):
        replace(SMALL, **changed)


# ------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def published() -> Any:
    return clip.published_tokenizer()


def test_token_ids_equal_openai_s_own_code(published):
    assert published.vocab_size == 49_408
    for sentence, ids in OPEN_CLIP["tokens"].items():
        assert published.encode(sentence) == ids, sentence


def test_token_ids_equal_transformers_on_real_text(published, tmp_path):
    lines = gzip.decompress(assets.fetch("clip-bpe").read_bytes()).decode().split("\n")[1 : 49_152 - 256 - 2 + 1]
    symbols = sorted(chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)])
    symbols += [chr(256 + n) for n in range(256 - len(symbols))]
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *(line.replace(" ", "") for line in lines)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    reference = transformers.CLIPTokenizer(
        vocab={token: n for n, token in enumerate(vocabulary)}, merges=[tuple(line.split()) for line in lines]
    )
    labels = emoji(32).labels
    texts = [label for language in ("en", "de", "fr", "zh") for label in labels[language][::8]]
    texts += [text.moby_dick()[n * 20_000 :][:300] for n in range(20)]
    texts += ["a <|endoftext|> b", "İstanbul ĄŻ ſ", "\u00a0 \u3000 x", "'''s ''ll"]
    for sentence, ids in zip(texts, reference(texts)["input_ids"], strict=True):
        assert published.encode(sentence) == ids[1:-1], sentence
    padded = reference(texts, padding="max_length", max_length=16, truncation=True)["input_ids"]
    ours = clip.tokenize(published, texts, 16, pad=published.eot)  # as Stable Diffusion pads
    assert ours.tolist() == padded
    # the files that stand beside Stable Diffusion's weights
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    assert load_clip_tokenizer(tmp_path).encode_batch(texts) == published.encode_batch(texts)


def test_captions_are_framed_cut_and_filled_with_zeros(published):
    rows = clip.tokenize(published, ["a cat", "a " * 100], 8)
    start, end = published.rust.token_to_id(SOT), published.eot
    assert (start, end) == (49_406, 49_407)
    assert rows[0].tolist() == [start, 320, 2368, end, 0, 0, 0, 0]
    assert rows[1].tolist() == [start, 320, 320, 320, 320, 320, 320, end]


def test_a_vocabulary_learned_from_captions_encodes_everything_and_ends_with_the_end(tmp_path):
    tokenizer = clip.train_tokenizer(["a red apple", "a red rose", "a blue rose"] * 3, 530)
    assert tokenizer.vocab_size <= 530
    assert tokenizer.eot == tokenizer.vocab_size - 1
    assert len(tokenizer.encode("red rose")) == 2
    assert tokenizer.decode(tokenizer.encode("Grün, 绿色 &  \U0001f34e!")).split() == [
        "grün",
        ",",
        "绿色",
        "&",
        "\U0001f34e!",
    ]
    words = [f"{a}{b}" for a in "abcdefgh" for b in "ijklmnop"]  # all pairs are equally frequent
    assert len({clip.train_tokenizer(words, 600).rust.to_str() for _ in range(5)}) == 1
    tokenizer.save(tmp_path)
    assert load_clip_tokenizer(tmp_path).encode("a green rose?") == tokenizer.encode("a green rose?")
    with pytest.raises(UserError, match="514"):
        clip.train_tokenizer(["a"], 300)
    (tmp_path / "characters.json").write_text('{"characters": "abc"}')
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="not CLIP's"):
        load_clip_tokenizer(tmp_path)


# ------------------------------------------------------------------------------------------------------- properties


def test_a_caption_is_read_at_its_first_end_and_nothing_behind_it_counts():
    model = clip.build(SMALL).eval()
    tokens = captions(4, 600, 12)
    behind = tokens.clone()
    behind[1, 5:] = torch.randint(1, 599, (7,))
    behind[2, 6:] = 599  # padded with the end of text, as for Stable Diffusion
    with torch.no_grad():
        expected = model.encode_text(tokens)
        torch.testing.assert_close(model.encode_text(behind), expected)
        torch.testing.assert_close(model.encode_text(tokens[:, :6]), expected)
        before = tokens.clone()
        before[0, 1] += 1
        assert (model.encode_text(before)[0] - expected[0]).abs().max() > 1e-4
    positions = torch.arange(12.0)[None, :, None].expand(4, 12, 1)
    assert clip.pool(positions, behind)[:, 0].tolist() == [2, 3, 4, 5]


def test_a_text_position_sees_only_itself_and_the_past():
    tower = clip.build(SMALL).text
    embedded = []
    tower.token_embedding.register_forward_hook(lambda m, i, output: (output.retain_grad(), embedded.append(output))[0])
    tower(captions(1, 600, 12))[0, 7].sum().backward()
    assert (embedded[0].grad[0].abs().sum(-1) > 0).tolist() == [True] * 8 + [False] * 4


def test_the_temperature_never_exceeds_100_and_can_come_back():
    model = clip.build(SMALL)
    assert model.scale().item() == pytest.approx(1 / 0.07)
    batch = {"images": torch.rand(6, 3, 16, 16), "tokens": captions(6, 600, 12)}
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert model.scale().item() == pytest.approx(100)
    loss, metrics = model.loss(batch)
    assert metrics["logit_scale"].item() == pytest.approx(100)
    loss.backward()
    assert model.logit_scale.item() == pytest.approx(math.log(100))
    assert model.logit_scale.grad.abs().item() > 0


def test_the_loss_is_symmetric_in_pictures_and_captions():
    model = clip.build(SMALL)
    batch = {"images": torch.rand(6, 3, 16, 16) * 2 - 1, "tokens": captions(6, 600, 12)}
    image, text, scale = model(**batch)
    logits = scale * image @ text.t()
    rows, columns = (-part.log_softmax(dim=1).diagonal().mean() for part in (logits, logits.t()))
    assert abs(rows - columns) > 1e-4
    torch.testing.assert_close(model.loss(batch)[0], (rows + columns) / 2)


def test_initialisation_follows_the_released_code():
    with torch.random.fork_rng():
        model = clip.build(replace(SMALL, d_model=128, n_layers=4, d_embedding=256))
    block = model.text.blocks[0]
    stds = {
        model.text.token_embedding.weight: 0.02, model.text.position_embedding.weight: 0.01,
        block.qkv.weight: 128**-0.5, block.out.weight: 128**-0.5 * 8**-0.5, block.up.weight: 256**-0.5,
        block.down.weight: 128**-0.5 * 8**-0.5, model.text_projection.weight: 128**-0.5,
    }  # fmt: skip
    for weight, std in stds.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.text_projection.bias is None
    assert model.image_projection.bias is None


def test_a_fresh_bottleneck_passes_its_shortcut_on_and_blurs_before_it_thins_out():
    x = torch.rand(2, 32, 8, 8)
    torch.testing.assert_close(Bottleneck(32, 8)(x), x)
    block = Bottleneck(16, 8, stride=2).eval()
    stripes = torch.zeros(1, 16, 8, 8)
    stripes[..., ::2] = 1  # the finest stripes: a convolution of stride 2 would see all of them or none
    shifted = stripes.roll(1, dims=3)
    torch.testing.assert_close(block(stripes), block(shifted))


def test_processes_with_different_numbers_of_rows_contrast_the_whole_batch(monkeypatch):
    """Threads stand for processes here; tests/generic trains with real ones."""
    processes, place, barrier = 2, threading.local(), threading.Barrier(2)
    held: dict[int, Tensor] = {}

    def all_reduce(x: Tensor) -> None:
        held[place.rank] = x.clone()
        barrier.wait()
        total = sum(held.values())
        barrier.wait()
        x.copy_(total)

    batch = {"images": torch.rand(5, 3, 16, 16), "tokens": captions(5, 600, 12)}
    models = [clip.build(SMALL) for _ in range(processes)]
    losses = [torch.zeros(())] * processes

    def contrast(rank: int) -> None:
        place.rank = rank
        mine = distributed.my_rows(batch, rank, processes)
        losses[rank] = models[rank].loss(mine)[0] * len(mine["images"]) / 5  # as fit weights it
        losses[rank].backward()

    whole = clip.build(SMALL)
    expected = whole.loss(batch)[0]
    expected.backward()
    for name, value in (("is_initialized", lambda: True), ("get_world_size", lambda: processes),
                        ("get_rank", lambda: place.rank), ("all_reduce", all_reduce)):  # fmt: skip
        monkeypatch.setattr(clip.model.dist, name, value)
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(contrast, range(processes)))
    torch.testing.assert_close(sum(losses), expected)
    for p, q, r in zip(whole.parameters(), *(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(q.grad + r.grad, p.grad, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- data


def test_no_batch_holds_a_caption_twice_and_its_position_is_its_state():
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 2, 2)
    words = [[1, 2], [3, 4], [2, 5], [6, 6], [7, 8], [8, 9], [10, 10], [11, 12], [13, 14]]  # 0 and 2 share, 4 and 5
    tokens = torch.tensor(words)[:, :, None] + torch.zeros(9, 2, 3, dtype=torch.long)
    stream = CaptionedBatches(images, tokens, 7, seed=1)
    assert sorted(map(sorted, stream.groups)) == [[0, 2], [1], [3], [4, 5], [6], [7], [8]]
    seen = []
    for _ in range(20):
        batch = next(stream)
        rows = ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert len({0 if row == 2 else 4 if row == 5 else row for row in rows}) == 7
        assert all(int(token) in words[row] for row, token in zip(rows, batch["tokens"][:, 0]))
        seen += rows
    assert set(seen) == set(range(9))
    again = CaptionedBatches(images, tokens, 7, seed=1)
    again.load_state_dict({"position": 19})
    assert all(map(torch.equal, next(again).values(), batch.values()))
    assert again.state_dict() == stream.state_dict() == {"position": 20}
    with pytest.raises(UserError, match=r"do not fill a batch of 8: lower --batch-size$"):
        CaptionedBatches(images, tokens, 8)


def test_captions_of_a_batch_are_cut_behind_the_last_end():
    stream = clip.batches(SMALL)
    tokens = next(stream)["tokens"]
    ends = tokens.argmax(dim=1)
    assert int(ends.max()) == tokens.shape[1] - 1 < stream.tokens.shape[2]


def test_augmentations_keep_white_white_and_depend_on_their_generator_alone():
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    first, second, third = (jitter(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    torch.testing.assert_close(jitter(torch.ones(4, 3, 16, 16), torch.Generator()), torch.ones(4, 3, 16, 16))
    cut = crop(12)(images, torch.Generator().manual_seed(0))
    windows = images.unfold(2, 12, 1).unfold(3, 12, 1)
    for picture, of in zip(cut, windows):
        assert (of == picture[:, None, None]).flatten(3).all(dim=3).all(dim=0).sum() == 1


GOLDEN = [
    4.44425,
    4.06528,
    3.44908,
    3.01826,
    3.1822,
    2.80801,
    2.73167,
    2.87443,
    2.86495,
    2.78584,
    2.75352,
    2.79016,
    2.82186,
    2.78973,
    2.77853,
    2.77816,
    2.75361,
    2.73997,
    2.76353,
    2.73332,
]


def test_twenty_steps_repeat_their_recorded_losses(tmp_path):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 16, 16), generator=draw, dtype=torch.uint8)
    tokens = torch.randint(1, 598, (40, 2, 8), generator=draw)
    tokens[:, :, -1] = 599
    run = Run(tmp_path, SMALL)
    run.quiet = True
    torch.set_num_threads(1)
    fit(clip.build(SMALL), CaptionedBatches(images, tokens, 16, augment=jitter), run, SMALL.training)
    assert [row["loss"] for row in run.metrics()] == pytest.approx(GOLDEN, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- transfer


def test_a_prompt_ensemble_is_the_normalised_mean_of_normalised_embeddings():
    model, tokenizer = clip.build(SMALL).eval(), bpe_tokenizer([])
    templates = ("{}", "a {} !", "so {}")
    found = clip.class_embeddings(model, tokenizer, ["x", "yy"], templates)
    with torch.no_grad():
        each = [model.encode_text(clip.tokenize(tokenizer, [t.format(n) for n in ("x", "yy")], 12)) for t in templates]
    mean = torch.stack(each).mean(dim=0)
    assert mean.norm(dim=1).max() < 1 - 1e-4  # they differ, so that their mean is shorter
    torch.testing.assert_close(found, mean / mean.norm(dim=1, keepdim=True))
    images = torch.rand(3, 3, 16, 16)
    p = clip.probabilities(model, clip.image_embeddings(model, images), found)
    with torch.no_grad():
        expected = (model.encode_image(images) @ found.t() / 0.07).softmax(dim=1)
    torch.testing.assert_close(p, expected)


def test_the_linear_probe_stands_at_the_minimum_of_its_objective():
    features, labels = torch.randn(200, 10), torch.randint(4, (200,))
    probe = clip.linear_probe(features, labels, 4, strength=0.5)
    with torch.no_grad():
        residual = probe(features).softmax(dim=1) - F.one_hot(labels, 4)
        # W / C + sum_i (p_i - y_i) x_i^T = 0, and sum_i (p_i - y_i) = 0
        torch.testing.assert_close(probe.weight / 0.5, -residual.t() @ features, rtol=0, atol=0.02)
        torch.testing.assert_close(residual.sum(dim=0), torch.zeros(4), rtol=0, atol=0.02)
    assert not probe.weight.requires_grad


def test_features_stand_before_the_projection():
    model = clip.build(SMALL).eval()
    images = torch.rand(3, 3, 16, 16)
    features = clip.image_features(model, images)
    assert features.shape == (3, 16)
    expected = F.normalize(model.image_projection(features), dim=1)
    torch.testing.assert_close(clip.image_embeddings(model, images), expected)


@pytest.fixture
def folder_of_pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, name in enumerate(("red", "green", "blue", "white", "black", "grey")):
        Image.new("RGB", (40, 30), name).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"something {name}\n" + "a colour\n" * (n > 3))
    return folder


def test_a_folder_of_pictures_is_learned_searched_and_named(folder_of_pictures, tmp_path):
    recipe = replace(SMALL.training, steps=2, batch_size=4)
    config = replace(SMALL, data=str(folder_of_pictures), augmentation="crop", vocab_size=530, training=recipe)
    run = Run(tmp_path / "run", config)
    run.quiet = True
    model = clip.train(config, run)
    loaded, tokenizer = clip.from_pretrained(run.path / "model")
    assert tokenizer is not None
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
    page = clip.sample(loaded, run, "something red", top=3)
    assert isinstance(page, Image.Image)
    named = clip.sample(loaded, run, str(folder_of_pictures / "0.png"))
    assert len(named.splitlines()) == 6
    assert sum(float(line.split("%")[0]) for line in named.splitlines()) == pytest.approx(100, abs=1)
    own = clip.sample(loaded, run, str(folder_of_pictures / "0.png"), names="cat, dog")
    assert {line.split()[-1] for line in own.splitlines()} == {"cat", "dog"}
    assert "6 names" in clip.sample(loaded, run)
    kinds = [row["kind"] for row in run.samples()]
    assert kinds.count("image") == 6
    assert kinds.count("figure") == 2
    assert kinds.count("table") == 1
    with pytest.raises(UserError, match="no folder of pictures"):
        clip.sample(loaded, run, "red", pictures=str(tmp_path / "nothing"))
    for prompt in ("red", str(folder_of_pictures / "0.png")):
        for top in (0, -3):
            with pytest.raises(UserError, match=f"^top must be at least 1, not {top}$"):
                clip.sample(loaded, run, prompt, top=top)
    with pytest.raises(UserError, match=r"^there is no picture \S+nope\.PNG: [^\n]+$"):
        clip.sample(loaded, run, str(folder_of_pictures / "nope.PNG"))
    with pytest.raises(UserError, match=r"^\S+pictures is a folder: [^\n]+$"):
        clip.sample(loaded, run, str(folder_of_pictures))
    long = "something red " * 400  # longer than the name of a file may be
    assert isinstance(clip.sample(loaded, run, long), Image.Image)


def test_our_weights_return_bit_for_bit_with_their_tokenizer(tmp_path):
    for config in (SMALL, replace(SMALL, image_layers=(1, 1, 1, 1), image_size=32, image_width=4)):
        model, tokenizer = clip.build(config), clip.train_tokenizer(["a red star"], 520)
        save_pretrained(model, config, tmp_path, system="clip", tokenizer=tokenizer)
        loaded, found = clip.from_pretrained(tmp_path)
        assert loaded.config == config
        assert found.encode("red stars") == tokenizer.encode("red stars")
        assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))


def test_the_published_tokenizer_needs_its_vocabulary():
    with pytest.raises(UserError, match="49408 tokens"):
        clip.batches(replace(SMALL, tokenizer="clip"))
