"""A small pair of languages to translate between, and the recurrent translator that attention replaced.

Source sentences are subject-verb-object, target sentences subject-object-verb. A synchronous context-free grammar
writes both at once (Aho and Ullman 1969): every rule has a right side in each language.

    rule       source            target                                  agreement in the target
    S          NP V NP           NP NP V                                 verb with its subject's number
    NP         Det Adj* N Mod?   Det N Adj* Mod?                         determiner and adjectives with the noun's
                                                                         gender and number, determiner with its case
    Mod (PP)   P NP              NP P
    Mod (Rel)  that V NP         rel NP V                                relative word with the noun's gender, verb
                                                                         with its number

The source marks number on nouns, and on verbs in the present tense only; gender and case it does not mark at all.
So a word-for-word dictionary translates next to nothing: most words need their sentence.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from canon.core.data.translation import BOS, EOS, N_SPECIAL, PAD
from canon.language.transformer.model import smoothed_cross_entropy

N_NOUNS, N_VERBS, N_ADJECTIVES, N_PREPOSITIONS, N_DETERMINERS = 48, 24, 24, 6, 3
GENDERS, NUMBERS = 3, ("sg", "pl")
MAX_DEPTH = 2  # modifiers inside modifiers


class Languages:
    """The two languages with one lexicon; the seed draws the genders of the nouns and the sentences.

    Attributes:
        vocab_size: words of both languages, and PAD, BOS and EOS.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.genders = [self.random.randrange(GENDERS) for _ in range(N_NOUNS)]
        self.ids: dict[str, int] = {}
        for _ in range(20_000):  # every word there is, so that ids and their number do not depend on what is asked
            self._sentence()
        words = sorted(self.ids)
        self.ids = {word: N_SPECIAL + index for index, word in enumerate(words)}
        self.vocab_size = N_SPECIAL + len(words)

    def pairs(self, count: int) -> list[tuple[list[int], list[int]]]:
        """Ids of `count` different source sentences and their translations; another call may repeat some of them."""
        found: dict[tuple[int, ...], list[int]] = {}
        while len(found) < count:
            source, target = self._sentence()
            found.setdefault(tuple(self.ids[word] for word in source), [self.ids[word] for word in target])
        return [(list(source), target) for source, target in found.items()]

    def _sentence(self) -> tuple[list[str], list[str]]:
        """S: words of the source and of the target."""
        subject, subject_t, number, _ = self._noun_phrase("nom", 0)
        verb, verb_t = self._verb(number)
        object_, object_t, _, _ = self._noun_phrase("acc", 0)
        sentence = [*subject, verb, *object_], [*subject_t, *object_t, verb_t]
        for word in (*sentence[0], *sentence[1]):
            self.ids.setdefault(word, 0)
        return sentence

    def _noun_phrase(self, case: str, depth: int) -> tuple[list[str], list[str], str, int]:
        """NP: words of the source and of the target, and the number and gender of its noun."""
        draw = self.random
        noun, number = draw.randrange(N_NOUNS), draw.choice(NUMBERS)
        gender = self.genders[noun]
        determiner = draw.randrange(N_DETERMINERS)
        adjectives = [draw.randrange(N_ADJECTIVES) for _ in range(draw.choices((0, 1, 2), (60, 30, 10))[0])]
        source = [f"det{determiner}", *(f"adj{a}" for a in adjectives), f"noun{noun}-{number}"]
        target = [f"DET{determiner}-{gender}-{number}-{case}", f"NOUN{noun}-{number}"]
        target += [f"ADJ{a}-{gender}-{number}" for a in adjectives]
        kind = draw.random() if depth < MAX_DEPTH else 1.0
        if kind < 0.3:
            inner, inner_t, *_ = self._noun_phrase("acc", depth + 1)
            if kind < 0.15:
                preposition = draw.randrange(N_PREPOSITIONS)
                source += [f"prep{preposition}", *inner]
                target += [*inner_t, f"POST{preposition}"]
            else:
                verb, verb_t = self._verb(number)
                source += ["that", verb, *inner]
                target += [f"REL-{gender}", *inner_t, verb_t]
        return source, target, number, gender

    def _verb(self, number: str) -> tuple[str, str]:
        """V: the source marks the subject's number in the present only, the target always."""
        verb, tense = self.random.randrange(N_VERBS), self.random.choice(("present", "past"))
        return f"verb{verb}-{tense}" + (f"-{number}" if tense == "present" else ""), f"VERB{verb}-{tense}-{number}"


class GRUTranslator(nn.Module):
    """Encoder-decoder of two gated recurrent networks without attention (Cho et al. 2014; Sutskever et al. 2014).

    The whole source passes through one vector. It is read backwards, which Sutskever et al. found to help; the
    embedding is shared as in the Transformer.

    Args:
        vocab_size: words of both languages and the special ones.
        d_model: width of the embedding.
        d_hidden: width of the recurrent state.
        label_smoothing: of the loss.
    """

    def __init__(self, vocab_size: int, d_model: int, d_hidden: int, label_smoothing: float):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.encoder = nn.GRU(d_model, d_hidden, batch_first=True)
        self.decoder = nn.GRU(d_model, d_hidden, batch_first=True)
        self.head = nn.Linear(d_hidden, vocab_size)

    def encode(self, source: Int[Tensor, "batch source"]) -> Float[Tensor, "1 batch d_hidden"]:
        """The state after reading the source backwards, without its padding."""
        lengths = (source != PAD).sum(dim=1)
        backwards = (lengths[:, None] - 1 - torch.arange(source.shape[1], device=source.device)).clamp(min=0)
        x = self.embedding(source.gather(1, backwards))
        return self.encoder(pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False))[1]

    def loss(self, batch: dict[str, Int[Tensor, "batch _"]]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """As the Transformer's."""
        source, target = batch["source"], batch["target"]
        states, _ = self.decoder(self.embedding(target[:, :-1]), self.encode(source))
        return smoothed_cross_entropy(self.head(states), target[:, 1:], self.label_smoothing)

    @torch.no_grad()
    def greedy(self, source: Int[Tensor, "batch source"], extra_length: int = 50) -> list[list[int]]:
        """Ids of the translations, without EOS."""
        state = self.encode(source)
        tokens = torch.full((len(source), 1), BOS)
        for _ in range(source.shape[1] + extra_length):
            output, state = self.decoder(self.embedding(tokens[:, -1:]), state)
            tokens = torch.cat([tokens, self.head(output)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
            if (tokens == EOS).any(dim=1).all():
                break
        return [_until_end(row) for row in tokens[:, 1:].tolist()]


def _until_end(row: Sequence[int]) -> list[int]:
    return list(row[: row.index(EOS)] if EOS in row else row)


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
