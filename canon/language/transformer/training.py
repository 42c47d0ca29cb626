"""Training (§5), averaging of the last checkpoints and translation (§6.1)."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from canon.core.data.bleu import corpus_bleu, tokenize_13a
from canon.core.data.translation import (
    EOS,
    Pairs,
    SharedVocabulary,
    TranslationBatches,
    fitting,
    padded,
    translation_pairs,
)
from canon.core.data.translation import mask_placeholders as mask
from canon.core.data.translation import restore_placeholders as restore
from canon.core.errors import UserError
from canon.core.generation.search import beam_search
from canon.core.hub.pretrained import load_pretrained, save_description
from canon.core.hub.tensors import WEIGHTS_FILE, load_tensors, save_tensors
from canon.core.lab import Run
from canon.core.lab.maps import attention_figure
from canon.core.training.checkpoint import full_weights, set_full_weights
from canon.core.training.distributed import move
from canon.core.training.fit import fit
from canon.language.transformer.model import Config, Transformer, attention_maps


def from_pretrained(source: str | Path) -> tuple[Transformer, SharedVocabulary | None]:
    """A trained Transformer and its vocabulary, from a folder that a run or `save_pretrained` wrote.

    Raises:
        UserError: there is nothing there, it is damaged, or it is another model (the paper's weights are not public).
    """
    model, tokenizer = load_pretrained(source, "transformer", Config, Transformer, {}, _from_published)
    return model, SharedVocabulary(tokenizer) if tokenizer else None


def _from_published(settings: dict[str, Any]) -> Config:
    raise UserError(
        f"a published {settings.get('model_type')!r} is not the Transformer of 2017, whose weights are not public: "
        "give the folder of a run"
    )


def corpus(config: Config) -> tuple[Pairs, SharedVocabulary]:
    """Sentence pairs that fit a batch, and the vocabulary learned from both sides of their training part.

    Raises:
        UserError: the file of pairs is unusable, or no pair is left to train on, to validate or to test with.
    """
    return _corpus(config.languages, config.corpus, config.vocab_size, config.tokens_per_batch)


@cache
def _corpus(languages: str, file: str, vocab_size: int, tokens_per_batch: int) -> tuple[Pairs, SharedVocabulary]:
    pairs = translation_pairs(languages, file)
    vocabulary = SharedVocabulary.train(pairs.train, vocab_size)
    return fitting(pairs, vocabulary, tokens_per_batch), vocabulary


def build(config: Config) -> Transformer:
    """A fresh model; its weights are drawn from the training seed."""
    torch.manual_seed(config.training.seed)
    return Transformer(config)


def batches(config: Config) -> TranslationBatches:
    """The stream of training batches."""
    pairs, vocabulary = corpus(config)
    return TranslationBatches(vocabulary.encode_pairs(pairs.train), config.tokens_per_batch, config.training.seed)


def average_weights(states: Sequence[dict[str, Float[Tensor, "..."]]]) -> dict[str, Float[Tensor, "..."]]:
    """The mean of several weights of one model (§6.1), summed in double precision."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(value.dtype)
        for name, value in states[0].items()
    }


def train(config: Config, run: Run) -> Transformer:
    """Train, and end with the mean of the weights at the last evaluations; goes on where the run was stopped.

    Args:
        config: from PRESETS, or a variation.
        run: receives the metrics, and under ``model/`` the weights and the vocabulary.
    """
    pairs, vocabulary = corpus(config)
    validation = vocabulary.encode_pairs(pairs.validation)
    model, stream, snapshots = build(config), batches(config), run.path / "snapshots"
    if run.leader:
        save_description(config, run.path / "model", system="transformer", tokenizer=vocabulary)

    def evaluate(_: nn.Module) -> dict[str, float]:
        weights = full_weights(model)
        if run.leader:
            # Named by the data position, so that a resumed run writes again what an unbroken one would.
            save_tensors(weights, snapshots / f"{stream.epoch:06d}-{stream.position:06d}.safetensors")
            for old in sorted(snapshots.iterdir())[: -config.averaged_checkpoints]:
                old.unlink()
        return validation_metrics(model, validation)

    fit(model, stream, run, config.training, evaluate=evaluate)
    last = validation_metrics(model, validation)["validation_nll"]
    weights = average_weights([load_tensors(path) for path in sorted(snapshots.iterdir())])
    set_full_weights(model, weights)
    averaged = validation_metrics(model, validation)["validation_nll"]
    used = {"training_pairs": len(pairs.train), "pairs_left_out": pairs.left_out}
    run.summary(**used, validation_nll_last=last, validation_nll_averaged=averaged)
    if run.leader:
        save_tensors(weights, run.path / "model" / WEIGHTS_FILE)
    return model


def validation_metrics(model: Transformer, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Negative log-likelihood in nats and accuracy of the next token, averaged over all target tokens.

    Args:
        model: in evaluation mode.
        pairs: ids of sources and translations.
    """
    stream, device = TranslationBatches(pairs, model.config.tokens_per_batch), model.embedding.weight.device
    with torch.no_grad():
        found = [model.loss(move(next(stream), device))[1] for _ in stream.plan]
    tokens = sum(float(m["tokens"]) for m in found)
    return {f"validation_{n}": sum(float(m[n] * m["tokens"]) for m in found) / tokens for n in ("nll", "accuracy")}


def translate(model: Transformer, vocabulary: SharedVocabulary, sentences: Sequence[str], rows: int = 64) -> list[str]:
    """Translate sentences with the beam search of the model's configuration.

    Placeholders such as ``%(name)s`` or ``{count}`` come out as they went in.

    Args:
        model: in evaluation mode.
        vocabulary: the one it was trained with.
        sentences: any number; they are searched in groups of similar length.
        rows: sentences in a group.
    """
    c, device = model.config, model.embedding.weight.device
    names: list[list[str]] = [[] for _ in sentences]
    ids = [[*vocabulary.encode(mask(text, n)), EOS] for text, n in zip(sentences, names)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    translations = [""] * len(ids)
    for start in range(0, len(order), rows):
        group = order[start : start + rows]
        source = padded([ids[i] for i in group]).to(device)
        for i, found in zip(group, beam_search(model, source, c.beam, c.length_penalty, c.extra_length)):
            translations[i] = restore(vocabulary.decode(found.tokens), names[i])
    return translations


def sample(model: Transformer, run: Run, prompt: str = "") -> str:
    """Translate a sentence; or, without one, the test set, which is scored and kept among the run's samples.

    Args:
        model: a trained model.
        run: the run that trained it, which holds its vocabulary.
        prompt: an English sentence; placeholders such as {count} come out as they went in.
    """
    vocabulary = SharedVocabulary.load(run.path / "model")
    if prompt:
        translation = translate(model, vocabulary, [prompt])[0]
        attention_figures(model, vocabulary, run, prompt, translation)
        return translation
    test = corpus(model.config)[0].test
    found = translate(model, vocabulary, [pair.source for pair in test])
    exact = sum(translation == pair.target for translation, pair in zip(found, test)) / len(test)
    words = list if model.config.languages.endswith("zh") else tokenize_13a  # Chinese is compared by characters
    bleu = corpus_bleu(found, [pair.target for pair in test], words)
    run.summary(test_bleu=bleu, test_exact_match=exact, test_sentences=len(test))
    rows = [{"source": p.source, "reference": p.target, "translation": t} for p, t in zip(test, found)]
    run.table("translations of test sentences", rows[:40])
    example = max(rows[:40], key=lambda row: len(row["source"].split()) * (row["reference"] == row["translation"]))
    attention_figures(model, vocabulary, run, example["source"], example["translation"])
    lines = [f"{row['source']}\n  {row['translation']}\n  reference: {row['reference']}" for row in rows[:8]]
    return "\n".join([*lines, f"test set: BLEU {bleu:.1f}, {exact:.1%} of {len(test)} sentences exactly as translated"])


def attention_figures(
    model: Transformer, vocabulary: SharedVocabulary, run: Run, source: str, translation: str
) -> None:
    """Keep the attention of the last layers for one sentence: encoder over itself, decoder over the source."""
    masked: list[str] = []
    ids, target_ids = ([*vocabulary.encode(mask(text, masked)), EOS] for text in (source, translation))
    encoder, decoder = attention_maps(model, ids, target_ids)
    read, written = ([vocabulary.decode([i]).strip() or "end" for i in row] for row in (ids, target_ids))
    run.figure("encoder self-attention, last layer", attention_figure(encoder[-1], read, read))
    run.figure("decoder attention over the source, last layer", attention_figure(decoder[-1], written, read))
