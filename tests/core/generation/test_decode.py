"""Filters against transformers and against plain implementations, sampling against probabilities, decoding against
the full forward pass."""

import pytest
import torch
import transformers

from canon.core.errors import UserError
from canon.core.generation.decode import Memory, generate, stream
from canon.core.generation.sampling import (
    Sampling,
    draw,
    min_p,
    repetition_penalty,
    sample,
    sample_with_log_probability,
    top_k,
    top_p,
)
from tests.core.generation.tiny import ByteTokenizer, FixedDecoder, ScriptedDecoder, TinyDecoder

LETTERS = ByteTokenizer([bytes([c]) for c in range(97, 123)])


def prompts(*lengths, vocab=50):
    return [torch.randint(vocab, (n,)).tolist() for n in lengths]


def chi_square(counts, probabilities):
    """Pearson's statistic over the entries that are possible, in standard deviations above its mean."""
    possible = probabilities > 0
    assert (counts[~possible] == 0).all()
    expected = probabilities[possible] * counts.sum()
    freedom = int(possible.sum()) - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    return float(statistic - freedom) / (2 * freedom) ** 0.5


# Filters


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("vocab", [40, 3000])
def test_filters_equal_transformers(scale, vocab):
    logits = torch.randn(16, vocab) * scale
    ids = torch.randint(vocab, (16, 7))
    ids[:, -1] = ids[:, 0]  # seen twice
    hf = transformers
    for k in (1, 5, vocab, vocab + 1):
        assert torch.equal(top_k(logits, k), hf.TopKLogitsWarper(min(k, vocab))(ids, logits))
    for p in (0.01, 0.5, 0.9, 0.999):
        assert torch.equal(top_p(logits, p), hf.TopPLogitsWarper(p)(ids, logits))
    for p in (0.0, 0.05, 0.5, 1.0):
        assert torch.equal(min_p(logits, p), hf.MinPLogitsWarper(p)(ids, logits))
    for penalty in (0.8, 1.3):
        expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        assert torch.equal(repetition_penalty(logits, ids, penalty), expected)


@pytest.mark.parametrize("p", [0.1, 0.6, 0.95])
def test_top_p_keeps_the_smallest_nucleus(p):
    for logits in (torch.randn(20, 60) * 2, torch.randn(4, 1500)):  # the second has nuclei beyond the candidates
        for row, kept in zip(logits.softmax(-1).double(), top_p(logits, p).isfinite()):
            ranked = row.sort(descending=True).values
            size = next(n for n in range(1, len(row) + 1) if ranked[:n].sum() >= p)
            assert kept.sum() == size
            assert row[kept].min() == ranked[size - 1]


def test_top_p_of_a_certain_token():
    assert top_p(torch.tensor([[0.0, -1e4, -2e4]]), 0.5).isfinite().tolist() == [[True, False, False]]


# Drawing


def test_draw_inverts_the_cumulative_distribution():
    weights = torch.rand(6, 1000) * (torch.rand(6, 1000) < 0.1)
    uniform = torch.rand(6, dtype=torch.float64)
    expected = (weights.double().cumsum(-1) <= uniform[:, None] * weights.double().sum(-1, keepdim=True)).sum(-1)
    assert torch.equal(draw(weights, uniform), expected)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 4097])
def test_draw_never_takes_what_is_impossible(vocab):
    place = torch.randint(vocab, (200,))
    weights = torch.zeros(200, vocab).scatter_(1, place[:, None], torch.rand(200, 1).exp() * 1e-3)
    for u in (0.0, 0.5, 1 - 2**-53, 1.0):
        assert torch.equal(draw(weights, torch.full((200,), u, dtype=torch.float64)), place)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2, "temperature": 1.3},
        {"top_k": 8, "top_p": 0.8},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.1, "temperature": 0.9},
        {"top_k": 1},
    ],
    ids=str,
)
def test_frequencies_are_the_filtered_probabilities(options):
    """Also where the token is drawn before the filter: that must not favour the likely ones."""
    logits = torch.randn(1, 30) * 1.5
    sampling = Sampling(**options)
    scores = logits / sampling.temperature
    for name, warper in (("top_k", "TopK"), ("top_p", "TopP"), ("min_p", "MinP")):
        if name in options:
            scores = getattr(transformers, f"{warper}LogitsWarper")(options[name])(None, scores)
    n = 60_000
    uniform = torch.rand(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn = sample(logits.expand(n, -1), uniform, sampling)
    counts = drawn.bincount(minlength=30).double()
    if options.get("top_k") == 1:
        assert counts[logits.argmax()] == n
    else:
        assert chi_square(counts, scores.softmax(-1)[0].double()) < 4


@pytest.mark.parametrize("vocab", [1, 15, 16, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.8])
def test_a_draw_and_its_probability(vocab, dtype, temperature):
    """The first token at which the cumulative probability exceeds u, of a row in the middle of a larger tensor."""
    logits = (torch.randn(40, 2, vocab + 3) * 4).to(dtype)[:, 1, :vocab]
    logits.masked_fill_(torch.rand(40, vocab) < 0.3, -torch.inf)[:, vocab // 2] = 0.5
    uniform = torch.rand(40, 2, dtype=torch.float64)
    uniform[:2, 0] = torch.tensor([0.0, 1 - 2**-53])
    tokens, log_probs = sample_with_log_probability(logits, logits, uniform, Sampling(temperature=temperature))
    p = (logits.double() / temperature).softmax(-1)
    upper = p.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    assert (p.gather(-1, tokens[:, None]) > 0).all()
    assert (upper > uniform[:, 0] - 1e-6).all()
    assert (upper - p.gather(-1, tokens[:, None])[:, 0] < uniform[:, 0] + 1e-6).all()
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("place", [0, 17, 99])
def test_a_logit_that_is_not_a_number_shows(place):
    logits = torch.randn(3, 100)
    logits[1, place] = torch.nan
    uniform = torch.rand(3, 2, dtype=torch.float64)
    log_probs = sample_with_log_probability(logits, logits, uniform, Sampling())[1]
    assert log_probs.isnan().tolist() == [False, True, False]


def test_frequencies_over_rows_and_steps_of_generate():
    """The numbers of different rows and steps are independent: all of them together fit the distribution."""
    logits = torch.randn(20)
    drawn = generate(FixedDecoder(logits), [[0]] * 300, Sampling(max_tokens=40))
    counts = torch.tensor([g.tokens for g in drawn]).flatten().bincount(minlength=20).double()
    assert chi_square(counts, logits.softmax(-1).double()) < 4
    pairs = torch.tensor([g.tokens for g in drawn]).unfold(1, 2, 2).flatten(0, 1)
    counts = (pairs[:, 0] * 20 + pairs[:, 1]).bincount(minlength=400).double()
    joint = torch.outer(logits.softmax(-1), logits.softmax(-1)).flatten().double()
    assert chi_square(counts, joint) < 4


# Decoding


@pytest.mark.parametrize("batch_size", [256, 4])
def test_greedy_batch_equals_one_by_one_without_cache(batch_size):
    model = TinyDecoder()
    batch = prompts(1, 30, 7, 7, 48, 2, 40)
    results = generate(model, batch, Sampling(max_tokens=20, temperature=0), batch_size=batch_size)
    assert model.training  # as it was; dropout was off meanwhile, or the rest would fail
    model.eval()
    for prompt, result in zip(batch, results):
        tokens, log_probs = list(prompt), []
        while len(log_probs) < min(20, 48 - len(prompt) + 1):
            logits = model(torch.tensor([tokens[:48]]))[0, -1]
            tokens.append(int(logits.argmax()))
            log_probs.append(float(logits.log_softmax(-1).max()))
        assert result.tokens == tokens[len(prompt) :]
        assert result.log_probs == pytest.approx(log_probs, abs=1e-5)
        assert result.finish == "length"


@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_p": 0.9}, {"top_k": 9, "repetition_penalty": 1.5}])
def test_log_probs_are_the_models_own(options):
    model = TinyDecoder().eval()
    batch = prompts(3, 9, 5)
    for prompt, result in zip(batch, generate(model, batch, Sampling(max_tokens=12, **options))):
        log_probs = model(torch.tensor([prompt + result.tokens]))[0].log_softmax(-1)
        expected = [float(log_probs[len(prompt) - 1 + i, t]) for i, t in enumerate(result.tokens)]
        assert result.log_probs == pytest.approx(expected, abs=1e-5)


def test_repetition_penalty_counts_prompt_and_text():
    """A strong penalty makes greedy decoding visit every token once before any twice."""
    logits = torch.linspace(5, 6, 10)
    result = generate(FixedDecoder(logits), [[9, 8]], Sampling(max_tokens=8, temperature=0, repetition_penalty=10))[0]
    assert result.tokens == [7, 6, 5, 4, 3, 2, 1, 0]


def test_same_seed_same_tokens_in_any_batch():
    model = TinyDecoder()
    batch = prompts(4, 4, 9, 2, 2, 2, 17, 4)
    batch[3] = batch[4] = batch[5]
    for options in ({}, {"top_p": 0.8}, {"top_k": 7, "min_p": 0.05}):
        first = [g.tokens for g in generate(model, batch, Sampling(max_tokens=15, **options))]
        assert first == [g.tokens for g in generate(model, batch, Sampling(max_tokens=15, **options))]
        assert first == [g.tokens for g in generate(model, batch, Sampling(max_tokens=15, **options), batch_size=3)]
        shorter = generate(model, batch[:6], Sampling(max_tokens=9, **options))
        assert [t[:9] for t in first[:6]] == [g.tokens for g in shorter]
        assert first != [g.tokens for g in generate(model, batch, Sampling(max_tokens=15, seed=1, **options))]
    assert len({tuple(t) for t in first[3:6]}) == 3  # equal prompts, different continuations


def test_rows_that_end_leave_the_batch_and_change_nothing():
    model = TinyDecoder(vocab=27)
    batch = prompts(*range(1, 21), vocab=26)
    results = generate(model, batch, Sampling(max_tokens=25, seed=3), tokenizer=LETTERS)
    assert len({len(g.tokens) for g in results}) > 5
    open_ended = generate(model, batch, Sampling(max_tokens=25, seed=3))
    for result, unending in zip(results, open_ended):
        ends = unending.tokens.index(LETTERS.eot) + 1 if LETTERS.eot in unending.tokens else 25
        assert result.tokens == unending.tokens[:ends]
        assert result.finish == ("eot" if ends < 25 or unending.tokens[-1] == LETTERS.eot else "length")
        assert result.text == LETTERS.decode(result.tokens)


def test_stop_tokens():
    decoder = ScriptedDecoder([0, 1, 2, 3, 4, 5], 27)
    result = generate(decoder, [[0]], Sampling(stop_tokens=(3,)), tokenizer=LETTERS)[0]
    assert (result.tokens, result.text, result.finish) == ([0, 1, 2, 3], "abc", "eot")


def test_logits_that_are_not_numbers():
    with pytest.raises(UserError, match="NaN"):
        generate(FixedDecoder([0.0, float("nan"), 1.0]), [[0]], Sampling(max_tokens=3))


def test_prompts_that_do_not_fit():
    model = TinyDecoder()
    with pytest.raises(UserError, match="prompt 1 has 49 tokens, and the model's context is 48"):
        generate(model, prompts(2, 49), Sampling())
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generate(model, [[]], Sampling())
    assert len(generate(model, prompts(48), Sampling())[0].tokens) == 1
    assert generate(model, [], Sampling()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"seed": -1},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(UserError, match="tokenizer"):
        generate(TinyDecoder(), prompts(2), Sampling(stop=("x",)))


def test_timing_counts_tokens():
    result = generate(TinyDecoder(), prompts(5, 9, 2), Sampling(max_tokens=6))[0]
    assert (result.timing.prefill_tokens, result.timing.new_tokens) == (4 + 8 + 1, 18)
    assert result.timing.decode_speed > 0
    assert result.timing.prefill_speed > 0


def test_bfloat16_end_to_end():
    model = TinyDecoder().to(torch.bfloat16)
    results = generate(model, prompts(3, 11), Sampling(max_tokens=10))
    assert [len(g.tokens) for g in results] == [10, 10]


# Streams and memory


def run(pieces):
    """The pieces of a stream and its return value."""
    parts = []
    while True:
        try:
            parts.append(next(pieces))
        except StopIteration as end:
            return parts, end.value


def test_stream_is_generate():
    model = TinyDecoder(vocab=27)
    sampling = Sampling(max_tokens=20, stop=("zz",), seed=4)
    prompt = prompts(3, vocab=26)[0]
    parts, result = run(stream(model, prompt, sampling, tokenizer=LETTERS))
    expected = generate(model, [prompt], sampling, tokenizer=LETTERS)[0]
    assert "".join(parts) == result.text == expected.text
    assert (result.tokens, result.finish, result.log_probs) == (expected.tokens, expected.finish, expected.log_probs)


def test_memory_reads_only_what_is_new():
    model = TinyDecoder(vocab=27, context=80)
    memory = Memory(model)
    prompt = prompts(20, vocab=26)[0]
    for turn in range(4):
        sampling = Sampling(max_tokens=5, seed=turn)
        _, result = run(stream(model, prompt, sampling, tokenizer=LETTERS, memory=memory))
        assert result.tokens == generate(model, [prompt], sampling, tokenizer=LETTERS)[0].tokens
        # The last token drawn was never fed; the last of the prompt is fed by the first step.
        assert result.timing.prefill_tokens == (19 if turn == 0 else 4)
        prompt = prompt + result.tokens + [1, 2, 3, 4]
    edited = [*prompt[:12], 7, 7, 7, 7]
    _, result = run(stream(model, edited, Sampling(max_tokens=5), tokenizer=LETTERS, memory=memory))
    assert result.tokens == generate(model, [edited], Sampling(max_tokens=5), tokenizer=LETTERS)[0].tokens
    assert result.timing.prefill_tokens == 3
    _, again = run(stream(model, edited, Sampling(max_tokens=5), tokenizer=LETTERS, memory=memory))
    assert (again.tokens, again.timing.prefill_tokens) == (result.tokens, 0)
