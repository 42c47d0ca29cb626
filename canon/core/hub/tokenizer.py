"""The tokenizer and the chat template that come with published weights.

A GGUF file describes its tokenizer in metadata: the pieces, how they merge, and how text is cut before merging. What
is built from it is a tokenizer of the `tokenizers` library that gives the ids llama.cpp gives. A chat template is a
Jinja program, written by whoever published the weights, so it runs in Jinja's sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from canon.core.data.tokenizers import TOKENIZER_CONFIG_FILE, BPETokenizer
from canon.core.errors import UserError
from canon.core.lab.files import merge_json, write_atomic

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type

# How each family cuts text before merging, by `tokenizer.ggml.pre`. These are the published patterns: another cut
# gives other ids. None: the pattern of GPT-2, which the library has built in.
SMOLLM = "digits apart, then GPT-2"
CUTS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": SMOLLM,
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def gguf_tokenizer(metadata: Mapping[str, Any]) -> BPETokenizer:
    """The tokenizer of a GGUF file; its end-of-text token is the one that ends an answer.

    Args:
        metadata: of `GGUF`.

    Raises:
        UserError: there is none, or it is damaged or of a kind that is not built here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        raise UserError(f"the file's tokenizer is of the kind {kind!r}; those that can be read are gpt2 and llama")
    try:
        pieces = list(metadata["tokenizer.ggml.tokens"])
        vocab = {piece: index for index, piece in enumerate(pieces)}
        if len(vocab) != len(pieces):
            raise UserError("the file's vocabulary names a token twice: the file is damaged, download it again")
        rust = builders[kind](vocab, metadata)
        types = list(metadata.get("tokenizer.ggml.token_type", ()))
        special = [piece for piece, type in zip(pieces, types) if type in (UNKNOWN, CONTROL)]
        rust.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
        added = [piece for piece, type in zip(pieces, types) if type == USER_DEFINED]
        rust.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in added])
        return BPETokenizer(rust, eot=pieces[metadata["tokenizer.ggml.eos_token_id"]])
    except UserError:
        raise
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        reason = str(error).splitlines()[0][:120]
        raise UserError(
            f"the file's tokenizer cannot be built ({reason}): the file is damaged, download it again"
        ) from error


def _byte_level(vocab: dict[str, int], metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2, LLaMA 3, Qwen, SmolLM): the merges are in the file, in order."""
    family = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if not isinstance(family, str) or family not in CUTS:
        raise UserError(f"the file cuts text as {family!r} does, which is not known here; known are {', '.join(CUTS)}")
    cut = CUTS[family]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # LLaMA 3 takes a whole word that is in the vocabulary as it is, without merging.
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=family == "llama-bpe"))
    if cut is None:
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif cut is SMOLLM:
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(cut), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    rust.decoder = decoders.ByteLevel()
    return rust


def _sentencepiece(vocab: dict[str, int], metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """SentencePiece BPE (LLaMA 1 and 2, Mistral): any two neighbours merge into a piece, the best score first."""
    pieces = metadata["tokenizer.ggml.tokens"]
    scores = list(metadata["tokenizer.ggml.scores"])
    merges = sorted(
        (-score, cut, len(piece) - cut, vocab[piece[:cut]], vocab[piece[cut:]])
        for piece, score in zip(pieces, scores, strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    )
    rust = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(pieces[left], pieces[right]) for *_, left, right in merges],
            unk_token=pieces[metadata["tokenizer.ggml.unknown_token_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    # The text begins with one more space, even if it begins with one (Metaspace would not add it then).
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    rust.decoder = decoders.Sequence([*undo, decoders.Strip(" ", left=1)] if prefix else undo)
    return rust


# --- Chat -------------------------------------------------------------------------------------------------------------

TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """How a model was taught to read a conversation.

    Attributes:
        source: the Jinja template.
        bos_token: text of the token that begins a text; templates may write it.
        eos_token: text of the token that ends an answer.
    """

    source: str
    bos_token: str = ""
    eos_token: str = ""

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation, with its special tokens written out.

        Args:
            messages: each with ``role`` (system, user, assistant) and ``content``.
            add_generation_prompt: end with what begins the assistant's next answer.
            variables: more of what the template knows, such as ``tools``.

        Raises:
            UserError: the template refuses the conversation, or is not valid.
        """
        try:
            return (
                _environment()
                .from_string(self.source)
                .render(
                    messages=messages,
                    add_generation_prompt=add_generation_prompt,
                    bos_token=self.bos_token,
                    eos_token=self.eos_token,
                    **{"tools": None, "documents": None, **variables},
                )
            )
        except Exception as error:  # the template is a stranger's program: whatever it raises is its refusal
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise UserError(f"the model's chat template refuses this conversation: {reason}") from error

    def save(self, folder: str | Path) -> None:
        """Write it into a folder in the published layout, for `load_chat_template`."""
        folder = Path(folder)
        write_atomic(folder / TEMPLATE_FILE, self.source)
        tokens = {name: text for name, text in asdict(self).items() if name != "source" and text}
        merge_json(folder / TOKENIZER_CONFIG_FILE, tokens)  # beside what the tokenizer wrote there


def gguf_chat_template(metadata: Mapping[str, Any]) -> ChatTemplate | None:
    """The chat template of a GGUF file; None if it has none."""
    source, pieces = metadata.get("tokenizer.chat_template"), metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(source, str):
        return None

    def token(name: str) -> str:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return pieces[index] if isinstance(index, int) and index < len(pieces) else ""

    return ChatTemplate(source, token("bos"), token("eos"))


def load_chat_template(folder: str | Path) -> ChatTemplate | None:
    """The chat template of a folder, ours or published; None if it has none.

    Raises:
        UserError: its files cannot be read.
    """
    file, config = Path(folder) / TEMPLATE_FILE, Path(folder) / TOKENIZER_CONFIG_FILE
    try:
        settings = json.loads(config.read_bytes()) if config.is_file() else {}
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        tokens = [settings.get(name) or "" for name in ("bos_token", "eos_token")]
        texts = [token["content"] if isinstance(token, dict) else token for token in tokens]
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{config} cannot be read ({error}); download or save it again") from error
    return ChatTemplate(source, *texts) if isinstance(source, str) else None


def _environment() -> jinja2.Environment:
    """Jinja as the published templates expect it (Hugging Face's settings), with nothing to reach out of."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
