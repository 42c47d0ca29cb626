import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from canon.core.data import text
from canon.core.data.tokenizers import CharTokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import save_pretrained
from canon.core.training.optimizers import optimizers
from canon.language import gpt2

TINY = gpt2.Config(
    vocab_size=77, context_length=32, d_model=48, n_layers=3, n_heads=3, dropout=0.0, corpus="shakespeare",
    tokenizer="characters",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[transformers.GPT2LMHeadModel, Path]:
    """A small GPT-2 of transformers with random weights (all of them, biases and gains too), saved in its layout."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=77, n_positions=32, n_embd=48, n_layer=3, n_head=3)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1) * 0.5, std=0.2)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return model, folder


def tokens(rows: int = 4, time: int = 33) -> torch.Tensor:
    characters = CharTokenizer(text.shakespeare()[:1_115_394])
    return torch.tensor([characters.encode(text.shakespeare()[1000 * i :][:time]) for i in range(rows)])


def test_outputs_loss_and_gradients_equal_transformers(published):
    reference, folder = published
    ours, _ = gpt2.from_pretrained(folder)
    batch = tokens()
    assert ours.config.d_model == 48
    theirs = reference(batch[:, :-1])
    torch.testing.assert_close(ours(batch[:, :-1]), theirs.logits, rtol=0, atol=1e-4)
    loss, metrics = ours.loss({"tokens": batch})
    expected = nn.functional.cross_entropy(theirs.logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert metrics["tokens"] == 4 * 32
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    compared = 0
    for name, p in reference.transformer.named_parameters():
        number = next((part for part in name.split(".") if part.isdigit()), "")
        target = gpt2.NAMES[name.replace(f".{number}.", ".{i}.")]
        key, transpose = target if isinstance(target, tuple) else (target, None)
        got = grads[key.replace("{i}", number)]
        torch.testing.assert_close(got.t() if transpose else got, p.grad, rtol=1e-3, atol=1e-5)
        compared += 1
    assert compared == len(grads)


def test_our_weights_return_bit_for_bit(tmp_path):
    model = gpt2.build(TINY)
    characters = CharTokenizer(text.shakespeare()[:1000])
    save_pretrained(model, TINY, tmp_path, system="gpt2", tokenizer=characters)
    loaded, tokenizer = gpt2.from_pretrained(tmp_path)
    assert tokenizer.encode("First") == characters.encode("First")
    assert loaded.config == TINY
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_position_sees_only_itself_and_the_past():
    model = gpt2.build(TINY).eval()
    embedded = []
    model.dropout.register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), embedded.append(output))[0]
    )
    logits = model(tokens(rows=1, time=20))
    logits[0, 11].sum().backward()
    reached = embedded[0].grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 12 + [False] * 8


def test_cached_steps_equal_a_full_forward_for_ragged_rows():
    model = gpt2.build(TINY).eval()
    rows = tokens(time=32)
    with torch.no_grad():
        full = model(rows)
        cache = model.new_cache(4, 32)
        model(rows[:, :10], cache)
        cache.lengths = torch.tensor([3, 10, 1, 7])
        for _ in range(20):
            at = cache.lengths.clone()
            step = model(rows[range(4), at][:, None], cache)[:, 0]
            torch.testing.assert_close(step, full[range(4), at], rtol=0, atol=1e-5)


def test_published_sizes_have_the_published_number_of_parameters():
    expected = {
        "gpt2-124m": 124_439_808,
        "gpt2-355m": 354_823_168,
        "gpt2-774m": 774_030_080,
        "gpt2-1.5b": 1_557_611_200,
    }
    for name, count in expected.items():
        with torch.device("meta"):
            model = gpt2.GPT2(gpt2.PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == count, name


def test_initialisation_follows_the_paper():
    model = gpt2.build(replace(TINY, d_model=192, n_layers=8))
    out = torch.cat([m.out.weight.flatten() for m in model.modules() if hasattr(m, "out")])
    assert out.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.02)
    assert model.blocks[0].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(p.eq(0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_matrices_decay_and_gains_and_biases_do_not():
    recipe = gpt2.PRESETS["gpt2-124m"].training
    model = gpt2.build(TINY)
    (optimizer,) = optimizers(model, recipe)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        vector = name.endswith("bias") or "norm" in name
        assert decay.pop(id(p)) == (0.0 if vector else 0.1), name
    assert not decay
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "n_layers", "d_model", "n_heads", "learning_rate"),
    [
        ("gpt2-124m", 12, 768, 12, 6e-4),
        ("gpt2-355m", 24, 1024, 16, 3e-4),
        ("gpt2-774m", 36, 1280, 20, 2.5e-4),
        ("gpt2-1.5b", 48, 1600, 25, 2e-4),
    ],
)
def test_published_presets(name: str, n_layers: int, d_model: int, n_heads: int, learning_rate: float):
    c = gpt2.PRESETS[name]
    t = c.training
    assert (c.n_layers, c.d_model, c.n_heads) == (n_layers, d_model, n_heads)
    assert (c.vocab_size, c.context_length, c.tokenizer) == (50_257, 1024, "gpt2")
    assert (t.optimizer, t.beta1, t.beta2, t.weight_decay, t.clip_norm) == ("adamw", 0.9, 0.95, 0.1, 1.0)
    assert (t.schedule, t.final_fraction, t.learning_rate, t.warmup_steps) == ("cosine", 0.1, learning_rate, 2000)
    assert t.batch_size * c.context_length == 491_520  # nanoGPT's half a million tokens


@pytest.mark.parametrize("training", [True, False])
def test_dropout_stands_on_embeddings_attention_weights_and_both_branches(monkeypatch, training: bool):
    model = gpt2.build(replace(TINY, dropout=0.25)).train(training)
    dropped, branches, rates = [], [], []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda module, inputs, output: dropped.append(inputs[0]))
        if isinstance(module, gpt2.Attention | gpt2.FeedForward):
            module.register_forward_hook(lambda module, inputs, output: branches.append(output))
    attend = gpt2.causal_attention
    monkeypatch.setattr(gpt2, "causal_attention", lambda q, k, v, rate: rates.append(rate) or attend(q, k, v, rate))
    batch = tokens(time=32)
    model(batch)
    embedded, *rest = dropped
    assert torch.equal(embedded, model.token_embedding(batch) + model.position_embedding(torch.arange(32)))
    assert len(rest) == 2 * TINY.n_layers
    assert all(ours is branch for ours, branch in zip(rest, branches, strict=True))
    assert rates == [0.25 if training else 0.0] * TINY.n_layers


def test_another_system_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="llama"):
        gpt2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "other",
    [
        {"activation_function": "gelu"},  # Cerebras-GPT
        {"scale_attn_by_inverse_layer_idx": True},  # Mistral of Stanford
        {"scale_attn_weights": False},
        {"layer_norm_epsilon": 1e-2},
    ],
)
def test_a_model_of_the_same_layout_that_computes_something_else_is_refused(published, tmp_path, other):
    reference, folder = published
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | other))
    with pytest.raises(UserError, match=next(iter(other))) as error:
        gpt2.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    # the same function by its other name
    (tmp_path / "config.json").write_text(json.dumps(settings | {"activation_function": "gelu_pytorch_tanh"}))
    assert torch.equal(
        gpt2.from_pretrained(tmp_path)[0](tokens(time=32)), gpt2.from_pretrained(folder)[0](tokens(time=32))
    )


def test_a_corpus_with_more_characters_than_the_vocabulary_is_one_line():
    with pytest.raises(UserError, match="--vocab-size"):
        gpt2.batches(replace(TINY, vocab_size=50))
