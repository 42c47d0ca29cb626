"""The Transformer against independent implementations, and the properties its paper states."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from canon.core.data.bleu import corpus_bleu
from canon.core.data.translation import BOS, EOS, PAD, padded, translation_pairs
from canon.core.errors import UserError
from canon.core.generation.search import beam_search, greedy_search
from canon.core.hub.tensors import load_tensors
from canon.core.lab import Run
from canon.core.training.optimizers import learning_rate_at
from canon.language.transformer import PRESETS, batches, from_pretrained, sample, train, translate
from canon.language.transformer.model import (
    Config,
    FeedForward,
    MultiHeadAttention,
    Transformer,
    attention,
    attention_maps,
    positional_encoding,
    smoothed_cross_entropy,
)
from canon.language.transformer.training import average_weights, corpus

VOCAB, D_MODEL, N_LAYERS, N_HEADS, D_FF = 23, 32, 2, 4, 48


def tiny(dropout: float = 0.0, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(Config(VOCAB, D_MODEL, N_LAYERS, N_HEADS, D_FF, dropout))
    for module in model.modules():  # away from the symmetric start: every weight shall matter to the comparison
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model


def pairs(seed: int = 1) -> dict[str, torch.Tensor]:
    """Three pairs of different lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(3, VOCAB, (3, 9), generator=generator)
    target = torch.randint(3, VOCAB, (3, 8), generator=generator)
    target[:, 0] = BOS
    for row, (s, t) in enumerate([(9, 8), (5, 6), (2, 4)]):
        source[row, s - 1], target[row, t - 1] = EOS, EOS
        source[row, s:], target[row, t:] = PAD, PAD
    return {"source": source, "target": target}


# ---------------------------------------------------------------- parity


def copy_to_torch(model: Transformer) -> nn.Transformer:
    """torch's own Transformer with our weights; its attention biases are zero and its two final norms the identity."""
    reference = nn.Transformer(D_MODEL, N_HEADS, N_LAYERS, N_LAYERS, D_FF, dropout=0.0, batch_first=True)
    reference.encoder.norm = reference.decoder.norm = nn.Identity()

    def copy_attention(ours, theirs):
        theirs.in_proj_weight.data = torch.cat([ours.W_Q.weight, ours.W_K.weight, ours.W_V.weight]).detach().clone()
        theirs.in_proj_bias.data.zero_()
        theirs.out_proj.weight.data.copy_(ours.W_O.weight)
        theirs.out_proj.bias.data.zero_()

    for ours, theirs in zip([*model.encoder, *model.decoder], [*reference.encoder.layers, *reference.decoder.layers]):
        copy_attention(ours.self_attention, theirs.self_attn)
        if hasattr(ours, "cross_attention"):
            copy_attention(ours.cross_attention, theirs.multihead_attn)
        theirs.linear1.load_state_dict(ours.feed_forward.W_1.state_dict())
        theirs.linear2.load_state_dict(ours.feed_forward.W_2.state_dict())
        for index, residual in enumerate(ours.residuals):
            getattr(theirs, f"norm{index + 1}").load_state_dict(residual.norm.state_dict())
    return reference


def test_outputs_and_gradients_equal_torch_transformer():
    model, batch = tiny(), pairs()
    reference = copy_to_torch(model)
    source, target = batch["source"], batch["target"][:, :-1]

    logits = model(source, target)
    embedding = model.embedding.weight.detach().clone().requires_grad_()

    def embed(tokens):
        return F.embedding(tokens, embedding) * math.sqrt(D_MODEL) + positional_encoding(
            torch.arange(tokens.shape[1]), D_MODEL
        )

    x = reference(
        embed(source),
        embed(target),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
        src_key_padding_mask=source == PAD,
        memory_key_padding_mask=source == PAD,
    )
    expected = x @ embedding.T
    keep = batch["target"][:, 1:] != PAD
    torch.testing.assert_close(logits[keep], expected[keep], atol=1e-5, rtol=0)

    weights = torch.randn(keep.sum(), VOCAB, generator=torch.Generator().manual_seed(2))
    (logits[keep] * weights).mean().backward()
    (expected[keep] * weights).mean().backward()
    torch.testing.assert_close(model.embedding.weight.grad, embedding.grad, atol=1e-5, rtol=0)
    for ours, theirs in zip([*model.encoder, *model.decoder], [*reference.encoder.layers, *reference.decoder.layers]):
        blocks = [(ours.self_attention, theirs.self_attn)]
        if hasattr(ours, "cross_attention"):
            blocks.append((ours.cross_attention, theirs.multihead_attn))
        for mine, other in blocks:
            grads = torch.cat([mine.W_Q.weight.grad, mine.W_K.weight.grad, mine.W_V.weight.grad])
            torch.testing.assert_close(grads, other.in_proj_weight.grad, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.W_O.weight.grad, other.out_proj.weight.grad, atol=1e-5, rtol=0)
        for mine, other in [(ours.feed_forward.W_1, theirs.linear1), (ours.feed_forward.W_2, theirs.linear2)] + [
            (residual.norm, getattr(theirs, f"norm{i + 1}")) for i, residual in enumerate(ours.residuals)
        ]:
            torch.testing.assert_close(mine.weight.grad, other.weight.grad, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.bias.grad, other.bias.grad, atol=1e-5, rtol=0)


def test_logits_equal_marian():
    """Marian is the same post-LN model; its sinusoids put all sines first, so its features are ours, reordered."""
    from transformers import MarianConfig, MarianMTModel

    model, batch = tiny().eval(), pairs()
    marian = MarianMTModel(
        MarianConfig(
            vocab_size=VOCAB, d_model=D_MODEL, encoder_layers=N_LAYERS, decoder_layers=N_LAYERS,
            encoder_attention_heads=N_HEADS, decoder_attention_heads=N_HEADS, encoder_ffn_dim=D_FF,
            decoder_ffn_dim=D_FF, activation_function="relu", dropout=0.0, scale_embedding=True,
            max_position_embeddings=16, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=BOS,
            share_encoder_decoder_embeddings=True, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    order = torch.cat([torch.arange(0, D_MODEL, 2), torch.arange(1, D_MODEL, 2)])
    state = {"final_logits_bias": torch.zeros(1, VOCAB), "lm_head.weight": model.embedding.weight[:, order]}
    state["model.shared.weight"] = state["lm_head.weight"]
    zero = torch.zeros(D_MODEL)
    for side, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        state[f"model.{side}.embed_tokens.weight"] = state["lm_head.weight"]
        for i, layer in enumerate(layers):
            name = f"model.{side}.layers.{i}"
            attentions = [("self_attn", layer.self_attention)]
            if side == "decoder":
                attentions.append(("encoder_attn", layer.cross_attention))
            for (theirs, ours), residual in zip(attentions, layer.residuals):
                for letter in "qkv":
                    weight = getattr(ours, f"W_{letter.upper()}").weight[:, order]
                    state |= {
                        f"{name}.{theirs}.{letter}_proj.weight": weight,
                        f"{name}.{theirs}.{letter}_proj.bias": zero,
                    }
                state |= {f"{name}.{theirs}.out_proj.weight": ours.W_O.weight[order]}
                state |= {f"{name}.{theirs}.out_proj.bias": zero}
                for key, value in residual.norm.state_dict().items():
                    state[f"{name}.{theirs}_layer_norm.{key}"] = value[order]
            for key, value in layer.residuals[-1].norm.state_dict().items():
                state[f"{name}.final_layer_norm.{key}"] = value[order]
            ffn = layer.feed_forward
            state |= {f"{name}.fc1.weight": ffn.W_1.weight[:, order], f"{name}.fc1.bias": ffn.W_1.bias}
            state |= {f"{name}.fc2.weight": ffn.W_2.weight[order], f"{name}.fc2.bias": ffn.W_2.bias[order]}
    missing, unexpected = marian.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("embed_positions" in name for name in missing)  # its sinusoids stay its own
    source, target = batch["source"], batch["target"][:, :-1]
    with torch.no_grad():
        expected = marian(input_ids=source, attention_mask=source != PAD, decoder_input_ids=target).logits
        keep = batch["target"][:, 1:] != PAD
        torch.testing.assert_close(model(source, target)[keep], expected[keep], atol=1e-5, rtol=0)


def test_written_out_attention_equals_the_fused_kernel():
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randn(2, 3, n, 8, generator=generator) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 5, 7, generator=generator) > 0.3
    mask[..., 0] = True
    output, weights = attention(Q, K, V, mask)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(Q, K, V, attn_mask=mask))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5))
    assert (weights[~mask.expand_as(weights)] == 0).all()


def test_label_smoothing_equals_torch_and_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, VOCAB, generator=generator, requires_grad=True)
    labels = torch.randint(3, VOCAB, (4, 6), generator=generator)
    labels[1, 3:] = labels[3, 1:] = PAD
    ours, metrics = smoothed_cross_entropy(logits, labels, 0.1)
    theirs = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)
    torch.testing.assert_close(metrics["nll"], plain.detach())


# ---------------------------------------------------------------- properties


def test_padding_changes_nothing():
    model, batch = tiny().eval(), pairs()
    wider = {name: F.pad(tokens, (0, 5), value=PAD) for name, tokens in batch.items()}
    with torch.no_grad():
        length = batch["target"].shape[1] - 1
        narrow = model(batch["source"], batch["target"][:, :-1])
        wide = model(wider["source"], wider["target"][:, :length])
        torch.testing.assert_close(narrow, wide, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.loss(batch)[0], model.loss(wider)[0], atol=1e-6, rtol=0)


def test_decoder_never_looks_ahead():
    model, batch = tiny(), pairs()
    x = model.embed(batch["target"][:, :-1]).detach()
    for position in range(x.shape[1]):
        inputs = x.clone().requires_grad_()
        model.embed = lambda tokens, start=0, inputs=inputs: inputs
        cache = tiny().encode(batch["source"])
        model.decode(batch["target"][:, :-1], cache)[:, position].sum().backward()
        assert (inputs.grad[:, position + 1 :] == 0).all()
        assert (inputs.grad[:, : position + 1] != 0).any(dim=-1).all()


def test_cached_decoding_equals_full():
    model, batch = tiny().eval(), pairs()
    source, target = batch["source"], batch["target"]
    with torch.no_grad():
        cache = model.encode(source)
        steps = torch.cat([model.decode(target[:, t : t + 1], cache) for t in range(target.shape[1])], dim=1)
        torch.testing.assert_close(steps, model(source, target), atol=1e-5, rtol=0)
        cache = model.encode(source)  # pieces of any length, and the rows in another order half-way
        model.decode(target[:, :3], cache)
        order = torch.tensor([2, 0, 0])
        cache.select(order)
        rest = model.decode(target[order][:, 3:], cache)
        torch.testing.assert_close(rest, model(source, target)[order][:, 3:], atol=1e-5, rtol=0)


def test_positions_are_linear_functions_of_one_another():
    """§3.5: for any fixed offset k, PE(pos + k) is a linear function of PE(pos)."""
    table = positional_encoding(torch.arange(300), 64)
    assert table.abs().max() <= 1
    wavelengths = 10000 ** (torch.arange(0, 64, 2) / 64)
    for k in (1, 7, 100):
        angle = k / wavelengths
        rotation = torch.block_diag(*(torch.tensor([[c, s], [-s, c]]) for c, s in zip(angle.cos(), angle.sin())))
        torch.testing.assert_close(table[:-k] @ rotation.T, table[k:], atol=1e-4, rtol=0)


def test_positions_equal_the_formula():
    table = positional_encoding(torch.arange(50), 16)
    for pos, i in itertools.product(range(0, 50, 7), range(8)):
        angle = pos / 10000 ** (2 * i / 16)
        assert table[pos, 2 * i] == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[pos, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-5)


def test_parameter_counts_are_the_papers():
    """Table 3: 65 and 213 million, with the shared vocabulary of about 37,000 tokens."""
    with torch.device("meta"):
        base = Transformer(PRESETS["base"])
        big = Transformer(PRESETS["big"])
    assert sum(p.numel() for p in base.parameters()) == pytest.approx(65e6, rel=0.05)
    assert sum(p.numel() for p in big.parameters()) == pytest.approx(213e6, rel=0.05)


def test_attention_maps_are_distributions():
    model = tiny(dropout=0.5).eval()
    encoder, decoder = attention_maps(model, [5, 6, 7, EOS], [8, 9, EOS])
    assert encoder.shape == (N_LAYERS, N_HEADS, 4, 4)
    assert decoder.shape == (N_LAYERS, N_HEADS, 3, 4)
    torch.testing.assert_close(decoder.sum(-1), torch.ones(N_LAYERS, N_HEADS, 3))


def test_dropout_stands_on_both_embeddings_and_every_sublayer():
    """§5.4: on the sums of embeddings and positions in both stacks, and on each sub-layer's output, before the sum."""
    model, batch = tiny(dropout=0.25), pairs()
    dropped, sublayers = [], []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda module, inputs, output: dropped.append(inputs[0]))
        if isinstance(module, MultiHeadAttention | FeedForward):
            module.register_forward_hook(lambda module, inputs, output: sublayers.append(output))
    source, target = batch["source"], batch["target"][:, :-1]
    model(source, target)
    assert len(dropped) == 2 + 2 * N_LAYERS + 3 * N_LAYERS

    def embedded(tokens):
        positions = positional_encoding(torch.arange(tokens.shape[1]), D_MODEL)
        return model.embedding(tokens) * math.sqrt(D_MODEL) + positions

    first, *encoder = dropped[: 1 + 2 * N_LAYERS]
    second, *decoder = dropped[1 + 2 * N_LAYERS :]
    assert torch.equal(first, embedded(source))
    assert torch.equal(second, embedded(target))
    assert all(ours is output for ours, output in zip(encoder + decoder, sublayers, strict=True))


def test_a_sublayer_that_is_dropped_leaves_the_normalised_input():
    """So dropout stands inside the residual sum, and nothing of a sub-layer goes round it."""
    model, batch = tiny(), pairs()
    for layer in [*model.encoder, *model.decoder]:
        for residual in layer.residuals:
            residual.dropout.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    x = model.embed(batch["target"])
    for layer in model.decoder:
        for residual in layer.residuals:
            x = residual.norm(x)
    torch.testing.assert_close(model(batch["source"], batch["target"]), x @ model.embedding.weight.T)


# ---------------------------------------------------------------- decoding


def sharp(seed: int = 0) -> Transformer:
    """Random weights whose next-token distributions are far from uniform, so that searches differ."""
    model = tiny(seed=seed).eval()
    model.embedding.weight.data *= 3
    return model


def log_prob(model: Transformer, source: list[int], target: list[int]) -> float:
    """Log-probability of one translation, EOS included, computed without any cache or search."""
    with torch.no_grad():
        logits = model(torch.tensor([source]), torch.tensor([[BOS, *target]]))[0]
    return float(logits.log_softmax(-1)[range(len(target) + 1), [*target, EOS]].sum())


def test_beam_search_equals_brute_force():
    """A beam as wide as the tree finds the best of all translations, of every length up to the limit."""
    torch.manual_seed(3)
    vocab, words = 6, [3, 4, 5]
    model = Transformer(Config(vocab, 16, 1, 2, 32, 0.0)).eval()
    model.embedding.weight.data *= 2
    sources = [[3, 4, EOS], [5, EOS], [4, 4, EOS]]
    for alpha in (0.0, 0.6, 1.5):
        found = beam_search(model, padded(sources), beam=60, alpha=alpha, extra_length=1)
        for source, hypothesis in zip(sources, found):
            limit = len(source) + 1
            everything = [t for n in range(limit) for t in itertools.product(words, repeat=n)]
            scores = {t: log_prob(model, source, list(t)) / ((6 + len(t)) / 6) ** alpha for t in everything}
            best = max(scores, key=scores.get)
            assert tuple(hypothesis.tokens) == best
            assert hypothesis.score == pytest.approx(scores[best], abs=1e-4)


@pytest.mark.parametrize("search", [greedy_search, beam_search])
def test_a_search_knows_its_log_probability_and_ignores_its_neighbours(search):
    model, sources = sharp(), [[5, 6, 7, 8, EOS], [9, EOS], [3, 4, 5, 6, 7, 8, 9, 10, EOS]]
    together = search(model, padded(sources), extra_length=5)
    for source, found in zip(sources, together):
        alone = search(model, torch.tensor([source]), extra_length=5)[0]
        assert alone.tokens == found.tokens
        assert alone.log_prob == pytest.approx(found.log_prob, abs=1e-4)
        assert found.log_prob == pytest.approx(log_prob(model, source, found.tokens), abs=1e-4)
        assert found.score == pytest.approx(found.log_prob / ((6 + len(found.tokens)) / 6) ** 0.6, abs=1e-4)
        assert len(found.tokens) < len(source) + 5


def test_beam_is_no_worse_than_greedy():
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(3, VOCAB, (40, 7), generator=generator)
    model = sharp()
    greedy = greedy_search(model, source, extra_length=3, alpha=0.0)
    beam = beam_search(model, source, alpha=0.0, extra_length=3)
    gains = torch.tensor([b.log_prob - g.log_prob for b, g in zip(beam, greedy)])
    assert (gains > -1e-4).float().mean() >= 0.95  # a beam may lose the greedy path; it hardly ever does
    assert gains.mean() > 0.1


# ---------------------------------------------------------------- training


def test_schedule_equals_equation_3():
    for name in ("base", "big"):
        config = PRESETS[name]
        t = config.training
        for step in (1, 100, 3999, 4000, 4001, 50_000, 100_000):
            # Eq. 3: lrate = d_model^-0.5 min(step_num^-0.5, step_num warmup_steps^-1.5)
            expected = config.d_model**-0.5 * min(step**-0.5, step * 4000**-1.5)
            rate = learning_rate_at(
                step - 1, peak=t.learning_rate, schedule=t.schedule, warmup_steps=t.warmup_steps, steps=t.steps,
                final_fraction=t.final_fraction,
            )  # fmt: skip
            assert rate == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "d_model", "n_heads", "d_ff", "dropout", "averaged", "steps"),
    [("base", 512, 8, 2048, 0.1, 5, 100_000), ("big", 1024, 16, 4096, 0.3, 20, 300_000)],
)
def test_published_presets_are_table_3_and_section_5(name, d_model, n_heads, d_ff, dropout, averaged, steps):
    c = PRESETS[name]
    t = c.training
    assert (c.n_layers, c.d_model, c.n_heads, c.d_ff) == (6, d_model, n_heads, d_ff)
    assert (c.vocab_size, c.tokens_per_batch) == (37_000, 25_000)  # §5.1
    assert (t.optimizer, t.beta1, t.beta2, t.eps) == ("adam", 0.9, 0.98, 1e-9)  # §5.3
    assert (t.schedule, t.warmup_steps, t.weight_decay, t.clip_norm, t.ema_decay) == ("inverse_sqrt", 4000, 0, 0, 0)
    assert (c.dropout, c.label_smoothing, t.steps) == (dropout, 0.1, steps)  # Table 3, §5.4
    assert (c.beam, c.length_penalty, c.extra_length, c.averaged_checkpoints) == (4, 0.6, 50, averaged)  # §6.1
    # Checkpoints 10 minutes apart (§6.1), at 0.4 and 1.0 seconds a step (§5.2)
    assert t.evaluate_every * {"base": 0.4, "big": 1.0}[name] == 600


@pytest.mark.parametrize("shape", [{"n_heads": 3}, {"n_heads": 0}, {"d_model": 15, "n_heads": 3}])
def test_a_shape_that_does_not_divide_is_one_line(shape):
    with pytest.raises(UserError, match="d_model") as error:
        replace(PRESETS["laptop"], **shape)
    assert "\n" not in str(error.value)


def test_averaging_is_exact():
    states = [tiny(seed=seed).state_dict() for seed in range(5)]
    average = average_weights(states)
    for name, value in average.items():
        torch.testing.assert_close(value, torch.stack([state[name] for state in states]).mean(0))


def test_bleu_equals_sacrebleu():
    import sacrebleu

    references = ["Das Netzwerk ① konnte nicht erstellt werden.", "Wert: 3,5-mal (siehe 2-3) &amp; mehr", "Ja, klar."]
    hypotheses = ["Netzwerk ① konnte nicht erstellt werden", "Der Wert: 3,5-mal (siehe 2-3) & mehr.", "Nein."]
    for rows in (slice(0, 3), slice(0, 1), slice(1, 3), slice(2, 3)):
        ours = corpus_bleu(hypotheses[rows], references[rows])
        assert ours == pytest.approx(sacrebleu.corpus_bleu(hypotheses[rows], [references[rows]]).score, abs=1e-9)
    zh = (["无法删除密钥对：①。"], ["无法删除密钥：①。"])
    theirs = sacrebleu.corpus_bleu(zh[0], [zh[1]], tokenize="char").score
    assert corpus_bleu(*zh, tokenize=list) == pytest.approx(theirs, abs=1e-9)
    assert corpus_bleu(references, references) == pytest.approx(100)


@pytest.fixture
def toy(tmp_path) -> Config:
    """A laptop preset made tiny, on a file of 300 pairs that count backwards."""
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    rows = [list(p) for p in itertools.islice(itertools.permutations(words, 4), 300)]
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{' '.join(row)}\t{' '.join(row[::-1])}\n" for row in rows), encoding="utf-8")
    preset = PRESETS["laptop"]
    recipe = replace(preset.training, steps=8, warmup_steps=4, evaluate_every=2, log_every=2, precision="fp32")
    return replace(
        preset, vocab_size=300, d_model=32, n_layers=1, n_heads=2, d_ff=32, corpus=str(file), tokens_per_batch=200,
        averaged_checkpoints=3, training=recipe,
    )  # fmt: skip


def test_a_file_of_any_languages_is_learned_from_as_it_is(toy, tmp_path):
    """Chinese has no spaces, so a sentence is one word; markup and one-sided placeholders are the user's affair."""
    draw = random.Random(0)
    numerals = "一二三四五六七八九十"
    lines = ["".join(draw.sample(numerals, 6)) for _ in range(200)]
    rows = [f"{line}\t{' '.join(f'<b>{ord(c)}</b>' for c in line[:2])} %s\n" for line in lines]
    file = tmp_path / "zh-en.tsv"
    file.write_text("".join(rows), encoding="utf-8")
    read = translation_pairs("en-de", file)
    assert sum(map(len, (read.train, read.validation, read.test))) == len(set(lines))
    assert read.train[0].target.endswith("</b> ①")
    # what cannot serve is left out and counted: no translation, a repetition, more tokens than a batch
    unfit = ["一\t\n", rows[0], "".join(draw.choices(numerals, k=400)) + "\tlong\n"]
    file.write_text("".join(rows + unfit), encoding="utf-8")
    config = replace(toy, corpus=str(file))
    kept, _ = corpus(config)
    assert sum(map(len, (kept.train, kept.validation, kept.test))) == len(set(lines))
    assert kept.left_out == len(lines) + len(unfit) - len(set(lines))
    run = Run(tmp_path / "runs" / "zh", config)
    run.quiet = True
    train(config, run)
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["training_pairs"], summary["pairs_left_out"]) == (len(kept.train), kept.left_out)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 pairs to train on"),
        (b"one two three\teins zwei drei\n", "give more pairs"),
        (b"no tab\n", "line 1"),
        ("Grüße\tgreetings\n".encode("latin-1"), "UTF-8"),
    ],
)
def test_a_file_that_cannot_be_learned_from_is_one_line(toy, tmp_path, content, says):
    file = tmp_path / "bad.tsv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        batches(replace(toy, corpus=str(file)))
    assert "\n" not in str(error.value)


def test_batches_too_small_for_any_pair_are_one_line(toy):
    with pytest.raises(UserError, match="larger batches"):
        batches(replace(toy, tokens_per_batch=2))


def test_a_run_ends_with_the_average_of_its_last_checkpoints_and_translates(toy, tmp_path):
    run = Run(tmp_path / "runs" / "transformer" / "a", toy)
    run.quiet = True
    model = train(toy, run)
    snapshots = sorted((run.path / "snapshots").iterdir())
    assert len(snapshots) == 3
    average = average_weights([load_tensors(path) for path in snapshots])
    loaded, vocabulary = from_pretrained(run.path / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, average[name])
        assert torch.equal(value, model.state_dict()[name])
    assert "BLEU" in sample(loaded, run)
    names = {row["name"] for row in run.samples()}
    assert {"translations of test sentences", "decoder attention over the source, last layer"} <= names
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["test_sentences"] > 0
    assert sample(loaded, run, "one {x} two") == translate(loaded, vocabulary, ["one {x} two"])[0]


def test_a_stopped_run_goes_on_to_the_same_average(toy, tmp_path, monkeypatch):
    def run(name: str) -> Run:
        made = Run(tmp_path / "runs" / name, toy)
        made.quiet = True
        return made

    straight = train(toy, run("straight"))
    recipe = replace(toy.training, checkpoint_every=0.0)
    loss, calls = Transformer.loss, itertools.count()

    def failing(self, batch):
        if self.training and next(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(Transformer, "loss", failing)
    broken = Run(tmp_path / "runs" / "broken")
    broken.quiet = True
    with pytest.raises(KeyboardInterrupt):
        train(replace(toy, training=recipe), broken)
    monkeypatch.undo()
    resumed = train(replace(toy, training=recipe), broken)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
