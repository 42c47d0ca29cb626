"""Corpus BLEU (Papineni et al. 2002), the score the paper reports: n-gram precision against one reference."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence


def tokenize_13a(text: str) -> list[str]:
    """Words and punctuation as NIST's mteval-v13a separates them, the convention of published BLEU scores."""
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", f" {text} ")  # punctuation and symbols, but not ' , - .
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)  # period and comma, unless inside a number
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()  # a dash after a digit


def corpus_bleu(
    hypotheses: Sequence[str], references: Sequence[str], tokenize: Callable[[str], Sequence[str]] = tokenize_13a
) -> float:
    """BLEU-4 of a corpus, from 0 to 100.

    Args:
        hypotheses: translations.
        references: one human translation of each.
        tokenize: words of a sentence; ``list`` compares characters, for languages without spaces.

    Raises:
        ValueError: not as many references as hypotheses.
    """
    matches, totals = [0] * 4, [0] * 4
    c = r = 0  # lengths of all hypotheses and of all references
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, theirs = tokenize(hypothesis), tokenize(reference)
        c, r = c + len(ours), r + len(theirs)
        for n in range(4):
            have, want = (Counter(zip(*(words[i:] for i in range(n + 1)))) for words in (ours, theirs))
            matches[n] += sum((have & want).values())  # clipped: a word counts as often as the reference has it
            totals[n] += sum(have.values())
    if not matches[0] or not totals[3]:
        return 0.0
    log_precision, halving = 0.0, 1.0
    for match, total in zip(matches, totals):
        if match == 0:  # the k-th order without a match counts 1/2^k of one (Chen and Cherry 2014, smoothing 3)
            halving /= 2
        log_precision += math.log((match or halving) / total) / 4
    # BLEU = BP exp(sum_n log p_n / 4),  BP = min(1, exp(1 - r/c))
    return 100 * math.exp(min(0.0, 1 - r / c) + log_precision)
