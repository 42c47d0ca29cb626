"""Language models behind one small interface: in this process, or on any server that speaks OpenAI's protocol.

model = connect()                                   # SmolLM2-135M-Instruct, here
model = connect("runs/gpt2/first/model")            # a model trained here
model = connect("http://localhost:8000/v1")         # a server
model.complete("The capital of France is", max_tokens=5).text
model.chat([{"role": "user", "content": "Hello"}], choices=["yes", "no"]).text
"""

import json as json_module
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from canon.catalog import find
from canon.core.data.tokenizers import BPETokenizer, Tokenizer
from canon.core.device import use_threads
from canon.core.errors import UserError
from canon.core.generation import constraints
from canon.core.generation.decode import Generation, Memory, Sampling, Timing, generate, stream
from canon.core.hub.gguf import GGUF
from canon.core.hub.pretrained import load_config, resolve
from canon.core.hub.tokenizer import ChatTemplate, gguf_chat_template, load_chat_template

DEFAULT = "smollm2-135m-instruct"
Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""


@dataclass(frozen=True)
class Reply:
    """What a model wrote."""

    text: str
    tokens: int
    """New tokens, the one that ended the text included."""
    log_prob: float | None
    """Of the text under the model: the sum over its tokens, in nats; None if a server does not say."""
    finish: str
    """Why it ended: eot, stop, constraint or length."""
    prompt_tokens: int
    timing: Timing | None = None
    """What it took; None on a server."""


@dataclass(frozen=True)
class Options:
    """How to continue a text."""

    max_tokens: int = 256
    """Most new tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token, 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that hold this much probability."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    choices: tuple[str, ...] | None = None
    """The text is exactly one of these."""
    regex: str | None = None
    """The text matches this regular expression."""
    seed: int = 0
    """Another seed, another text."""


class LLM(Protocol):
    """A language model. Keywords of the first four methods are the fields of `Options`."""

    def complete(self, prompt: str, /, **options: Any) -> Reply:
        """Continue a text."""
        ...

    def chat(self, messages: Sequence[Message], /, **options: Any) -> Reply:
        """Answer a conversation."""
        ...

    def stream(self, prompt: str | Sequence[Message], /, **options: Any) -> Iterator[str]:
        """The same piece by piece, as a generator whose return value is the `Reply`."""
        ...

    def score(self, prompt: str, continuation: str, /) -> float:
        """Log-probability, in nats, that the text ``prompt`` goes on with ``continuation``."""
        ...


def connect(source: str = DEFAULT, precision: Literal["fast", "exact"] = "fast") -> LLM:
    """A language model from an address (``http://host/v1``, or with a model's name: ``http://host/v1#name``), or from
    whatever `from_pretrained` of its system reads: an asset, a folder, a GGUF file.

    Raises:
        UserError: there is nothing there.
    """
    if source.startswith(("http://", "https://")):
        from canon.core.llm_server import Server  # which imports this module

        address, _, name = source.partition("#")
        return Server(address, name)
    return Local(source, precision)


# --- In this process --------------------------------------------------------------------------------------------------


class Local:
    """A model of the library, in this process.

    Args:
        source: an asset, a folder or a GGUF file.
        precision: ``fast``, or ``exact`` (float32), of systems that know the difference.

    Raises:
        UserError: there is nothing there, or no system of the library can load it.
    """

    def __init__(self, source: str = DEFAULT, precision: Literal["fast", "exact"] = "fast"):
        path = resolve(source)
        folder = path if path.is_dir() else path.parent
        name = str(GGUF(path).metadata.get("general.architecture")) if path.suffix == ".gguf" else _system(folder)
        entry = find(name)
        if entry.system is None:
            raise UserError(f"{source} is a {name!r}, which does not run here yet")
        load: Callable[..., tuple[Any, Tokenizer | None]] = import_module(entry.system).from_pretrained
        options = {"precision": precision} if "precision" in signature(load).parameters else {}
        start = time.perf_counter()  # libraries are loaded, and the file is here
        is_gguf = path.suffix == ".gguf"
        self.template = gguf_chat_template(GGUF(path).metadata) if is_gguf else load_chat_template(folder)
        self.model, tokenizer = load(path, **options)
        if tokenizer is None:
            raise UserError(f"{source} has no tokenizer that can be read; put its tokenizer.json beside the weights")
        self.tokenizer: Tokenizer = tokenizer
        self.load_seconds = time.perf_counter() - start
        self._memory: Memory | None = None

    def complete(self, prompt: str, /, **options: Any) -> Reply:
        """Continue a text; special tokens in it are read as such."""
        return self._generate(self.tokenizer.encode(prompt), Options(**options))

    def chat(self, messages: Sequence[Message], /, **options: Any) -> Reply:
        """Answer a conversation, through the model's own template."""
        return self._generate(self.chat_tokens(messages), Options(**options))

    def stream(self, prompt: str | Sequence[Message], /, **options: Any) -> Iterator[str]:
        """Continue a text or answer a conversation piece by piece; what a later call repeats is not read again."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.chat_tokens(prompt)
        wanted = Options(**options)
        if self._memory is None:
            self._memory = Memory(self.model)
        result = yield from stream(
            self.model,
            self._checked(tokens),
            _sampling(wanted),
            tokenizer=self.tokenizer,
            constraint=_constraint(wanted),
            memory=self._memory,
        )
        return _reply(result, len(tokens))

    def score(self, prompt: str, continuation: str, /) -> float:
        """Log-probability, in nats, that the text ``prompt`` goes on with ``continuation``.

        The two are cut into tokens apart, so that the same prompt is the same prompt for every continuation.
        """
        first, rest = self._checked(self.tokenizer.encode(prompt)), self.tokenizer.encode(continuation)
        cache = self.model.new_cache(1, len(first) + len(rest))
        total = 0.0
        with torch.inference_mode():
            if len(first) > 1:
                self.model(torch.tensor([first[:-1]]), cache, last_only=True)
            for token, following in zip([first[-1], *rest], rest):
                logits = self.model(torch.tensor([[token]]), cache)[0, -1].float()
                total += float(logits[following] - logits.logsumexp(-1))
        return total

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the model reads it.

        What a person or a tool wrote cannot pose as the template: special tokens in it are plain characters.

        Raises:
            UserError: the model has no chat template, or it refuses the conversation.
        """
        if self.template is None:
            raise UserError("this model was not taught to chat: it has no template; use  canon generate  instead")
        tokenizer = self.tokenizer
        text = self.template.render(messages)
        if not isinstance(tokenizer, BPETokenizer):
            return tokenizer.encode(text)
        contents = [message["content"] for message in messages]
        if all(tokenizer.encode(content) == tokenizer.encode(content, special=False) for content in contents):
            return tokenizer.encode(text)
        return self._guarded(self.template, tokenizer, messages, contents)

    def _guarded(
        self, template: ChatTemplate, tokenizer: BPETokenizer, messages: Sequence[Message], contents: list[str]
    ) -> list[int]:
        """Render with marks in the place of the contents, and encode contents and template apart."""
        marks = [f"\ue000{index}\ue001" for index in range(len(contents))]
        text = template.render([{**message, "content": mark} for message, mark in zip(messages, marks)])
        # Template, mark, template, mark ... template: a template may leave messages out, move or repeat them.
        parts = re.split(f"({'|'.join(marks)})", text)
        encoded = [
            tokenizer.encode(contents[marks.index(part)], special=False) if place % 2 else tokenizer.encode(part)
            for place, part in enumerate(parts)
        ]
        return list(chain.from_iterable(encoded))

    def _checked(self, tokens: list[int]) -> list[int]:
        """The tokens; an empty text begins with the end of the text before it."""
        return tokens or [self.tokenizer.eot or 0]

    def _generate(self, tokens: list[int], wanted: Options) -> Reply:
        result = generate(
            self.model,
            [self._checked(tokens)],
            _sampling(wanted),
            tokenizer=self.tokenizer,
            constraint=_constraint(wanted),
        )[0]
        return _reply(result, len(tokens))


def _system(folder: Path) -> str:
    settings = load_config(folder)
    return str(settings.get("system") or settings.get("model_type", "unknown"))


def _sampling(wanted: Options) -> Sampling:
    return Sampling(
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        stop=tuple(wanted.stop),
        seed=wanted.seed,
    )


def _constraint(wanted: Options) -> constraints.Constraint | None:
    if wanted.choices is not None and wanted.regex is not None:
        raise UserError("give choices or a regex, not both")
    if wanted.choices is not None:
        return constraints.choices(list(wanted.choices))
    return None if wanted.regex is None else constraints.regex(wanted.regex)


def _reply(result: Generation, prompt_tokens: int) -> Reply:
    log_prob = float(sum(result.log_probs))
    return Reply(result.text, len(result.tokens), log_prob, result.finish, prompt_tokens, result.timing)


# --- Commands ---------------------------------------------------------------------------------------------------------


def chat_command(
    prompt: str | None = None,
    model: str = DEFAULT,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    precision: Literal["fast", "exact"] = "fast",
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Talk with a language model; Ctrl-C stops a reply, Ctrl-D or /exit leaves, /new forgets the conversation.

    Args:
        prompt: one message to answer; without it a conversation begins.
        model: an asset, a folder, a GGUF file, a Hugging Face repository, or a server's address (http://host/v1).
        system: what the model is told before the conversation.
        max_tokens: most tokens of a reply.
        temperature: 0 always takes the likeliest token, 1 samples from the model's distribution.
        top_p: sample from the likeliest tokens that hold this much probability.
        seed: another seed, another reply.
        precision: exact computes in float32.
        threads: CPU threads; by default as many as there are cores.
        json: print one JSON object: the text, its tokens, and the speed.
    """
    use_threads(threads)
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    language_model = connect(model, precision)
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        _answer(language_model, [*history, {"role": "user", "content": prompt}], options, json)
        return
    if json:
        raise UserError("--json answers one --prompt: give it")
    beginning = list(history)
    print("Ctrl-C stops a reply, /new starts again, /exit or Ctrl-D leaves.", file=sys.stderr)
    while (line := _ask_person()) not in (None, "/exit"):
        if line == "/new":
            history = list(beginning)
        elif line:
            message = {"role": "user", "content": line}
            try:
                answer = _answer(language_model, [*history, message], options, False)
            except UserError as error:  # such as a conversation that outgrew the context
                print(f"canon: {error}; your message was taken back (/new starts again)", file=sys.stderr)
            else:
                history += [message, {"role": "assistant", "content": answer}]


def generate_command(
    prompt: str,
    model: str = DEFAULT,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    stop: tuple[str, ...] = (),
    seed: int = 0,
    precision: Literal["fast", "exact"] = "fast",
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Continue raw text with a language model.

    Args:
        prompt: what to continue.
        model: an asset, a folder, a GGUF file, a Hugging Face repository, or a server's address (http://host/v1).
        max_tokens: most new tokens.
        temperature: 0 always takes the likeliest token, 1 samples from the model's distribution.
        top_p: sample from the likeliest tokens that hold this much probability.
        stop: strings before the first of which the text ends.
        seed: another seed, another text.
        precision: exact computes in float32.
        threads: CPU threads; by default as many as there are cores.
        json: print one JSON object: the text, its tokens, and the speed.
    """
    use_threads(threads)
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "stop": stop, "seed": seed}
    _answer(connect(model, precision), prompt, options, json)


def _answer(model: LLM, prompt: str | Sequence[Message], options: dict[str, Any], as_json: bool) -> str:
    """Stream a reply to standard output, or print it as JSON; returns its text, also of one that Ctrl-C cut short."""
    if as_json:
        reply = model.complete(prompt, **options) if isinstance(prompt, str) else model.chat(prompt, **options)
        timing = reply.timing
        speeds = {} if timing is None else {
            "load_s": round(model.load_seconds, 3) if isinstance(model, Local) else None,
            "prefill_tokens_per_s": round(timing.prefill_speed, 1),
            "decode_tokens_per_s": round(timing.decode_speed, 1),
        }  # fmt: skip
        facts = {"text": reply.text, "prompt_tokens": reply.prompt_tokens, "new_tokens": reply.tokens}
        print(json_module.dumps(facts | speeds, ensure_ascii=False))
        return reply.text
    text = ""
    try:
        for piece in model.stream(prompt, **options):
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" ...", end="")
    print()
    return text


def _ask_person() -> str | None:
    """A line from the terminal, without spaces at its ends; None at its end. Ctrl-C gives an empty line."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return ""
