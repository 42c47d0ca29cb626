"""Batches: every window once per epoch, positions resumed exactly, corpora on disk, packed documents."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from canon.core.data.tokenizers import CharTokenizer
from canon.core.data.tokens import PackedBatches, TokenBatches, read_tokens, write_tokens
from canon.core.errors import UserError


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 7), st.integers(0, 5))
def test_an_epoch_deals_every_window_once(length: int, context: int, batch: int, seed: int):
    if length <= context:
        with pytest.raises(UserError, match="shorter context"):
            TokenBatches(range(length), context, batch)
        return
    batches = TokenBatches(range(length), context, batch, seed)
    rows = torch.cat([next(batches)["tokens"] for _ in range(2 * batches.windows_per_epoch)])
    assert rows.shape == (2 * batches.windows_per_epoch * batch, context + 1)
    assert rows.dtype == torch.int64
    assert torch.equal(rows - rows[:, :1], torch.arange(context + 1).expand_as(rows)), "windows are contiguous"
    for epoch in rows[:, 0].split(batches.windows_per_epoch):
        starts = epoch.sort().values
        assert (starts.diff() == context).all(), "side by side: no target twice"
    assert rows.min() >= 0
    assert rows.max() < length
    # Nearly all of the sequence is dealt: at most one window's length is left out at each end.
    assert batches.windows_per_epoch * context >= length - 1 - 2 * context


def test_every_token_is_met_over_the_epochs():
    batches = TokenBatches(np.arange(101), context_length=10, batch_size=9)
    assert batches.windows_per_epoch == 9
    assert torch.cat([next(batches)["tokens"] for _ in range(200)]).unique().tolist() == list(range(101))


def test_batches_depend_on_seed_and_position_only():
    tokens = torch.randint(50, (1000,))
    one, other = TokenBatches(tokens, 16, 4, seed=1), TokenBatches(tokens, 16, 4, seed=1)
    expected = [next(one)["tokens"] for _ in range(50)]  # several epochs of 61 windows
    for position in (37, 3, 49, 0, 15):
        other.load_state_dict({"position": position})
        assert other.state_dict() == {"position": position}
        assert torch.equal(next(other)["tokens"], expected[position])
    assert not torch.equal(next(TokenBatches(tokens, 16, 4, seed=2))["tokens"], expected[0])
    assert not torch.equal(expected[0], expected[1])


def test_corpus_on_disk(tmp_path: Path):
    path = tmp_path / "corpus.bin"
    ids = np.random.default_rng(0).integers(65_536, size=5000)
    assert write_tokens(path, iter([ids[:10].tolist(), ids[10:4000], [], ids[4000:]]), tokenizer="abc") == 5000
    assert path.stat().st_size == 10_000
    tokens = read_tokens(path, tokenizer="abc")
    assert tokens.dtype == np.uint16
    assert not tokens.flags.writeable
    assert (tokens == ids).all()
    assert torch.equal(next(TokenBatches(tokens, 8, 4))["tokens"], next(TokenBatches(ids, 8, 4))["tokens"])
    assert write_tokens(path, [[70_000]], dtype="uint32") == 1
    assert read_tokens(path).tolist() == [70_000]
    assert write_tokens(path, []) == 0
    assert read_tokens(path).size == 0


def test_a_corpus_that_cannot_be_right_is_refused(tmp_path: Path):
    path = tmp_path / "corpus.bin"
    write_tokens(path, [range(100)], tokenizer="abc")
    with pytest.raises(UserError, match="another tokenizer"):
        read_tokens(path, tokenizer="def")
    with pytest.raises(UserError, match="choose uint32"):
        write_tokens(path, [[1, 2], [65_536]])
    with pytest.raises(UserError, match="outside 0"):
        write_tokens(path, [[-1]])
    assert read_tokens(path).size == 100, "a failed write leaves the old corpus"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpus.bin", "corpus.bin.json"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="199 bytes instead of 200"):
        read_tokens(path)
    (tmp_path / "corpus.bin.json").unlink()
    with pytest.raises(UserError, match="not a finished token file"):
        read_tokens(path)


class Letters(CharTokenizer):
    """Characters and an end-of-text token."""

    def __init__(self):
        super().__init__("abcdefghijklmnopqrstuvwxyz")
        self.eot = 26


DOCUMENTS = ["hello", "", "a", "thequickbrownfoxjumpsoverthelazydog", "xyz", "canon"]


def test_packing_loses_and_repeats_nothing():
    batches = PackedBatches(DOCUMENTS, Letters(), context_length=4, batch_size=3, seed=5)
    rows = torch.cat([next(batches)["tokens"] for _ in range(40)])
    assert rows.shape == (120, 5)
    assert torch.equal(rows[1:, 0], rows[:-1, -1]), "neighbours share one token, also across batches"
    stream = rows[:, :-1].flatten().tolist()
    texts = "".join("|" if token == 26 else chr(ord("a") + token) for token in stream).split("|")[:-1]
    epochs = [texts[start : start + 6] for start in range(0, len(texts) - 5, 6)]
    assert len(epochs) >= 6
    assert all(sorted(epoch) == sorted(DOCUMENTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1, "the order changes"


@pytest.mark.parametrize("seed", [0, 1])
def test_packing_resumes_anywhere(seed: int):
    def fresh() -> PackedBatches:
        return PackedBatches(DOCUMENTS, Letters(), context_length=7, batch_size=2, seed=seed)

    batches, states, expected = fresh(), [], []
    for _ in range(30):
        states.append(batches.state_dict())
        expected.append(next(batches)["tokens"])
    for position in (0, 1, 7, 13, 29):
        resumed = fresh()
        resumed.load_state_dict(states[position])
        for got, want in zip(islice(resumed, 5), expected[position:]):
            assert torch.equal(got["tokens"], want)


def test_packing_needs_documents_and_an_end_of_text():
    with pytest.raises(UserError, match="no documents"):
        PackedBatches([], Letters(), 4, 1)
    with pytest.raises(UserError, match="end-of-text"):
        PackedBatches(["a"], CharTokenizer("a"), 4, 1)
