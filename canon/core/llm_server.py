"""Language models on servers that speak OpenAI's protocol, behind the interface of `canon.core.llm`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import regex

from canon.core.errors import UserError, require
from canon.core.llm import Message, Options, Reply


class Server:
    """A model behind an OpenAI-compatible server: vLLM, llama.cpp, Ollama, ``canon serve``, OpenAI itself.

    The key is read from ``OPENAI_API_KEY``. Choices and regular expressions are sent in the words of vLLM; a reply
    that is none of the choices, or does not match, is refused.

    Args:
        address: up to and with ``/v1``.
        model: its name there; by default the server's first.

    Raises:
        UserError: nothing answers there, or the ``openai`` package is missing.
    """

    def __init__(self, address: str, model: str = ""):
        self.address = address
        self._openai = require("openai", "agents")
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = self._openai.OpenAI(base_url=address, api_key=key, timeout=600.0, max_retries=2)
        if not model:
            with self._asking():
                models = list(self._client.models.list().data)
            if not models:
                raise UserError(f"the server at {address} offers no model")
            model = models[0].id
        self.model = model

    def complete(self, prompt: str, /, **options: Any) -> Reply:
        """Continue a text."""
        wanted = Options(**options)
        with self._asking():
            answer = self._client.completions.create(prompt=prompt, logprobs=1, **self._parameters(wanted))
            choice = answer.choices[0]
            given = getattr(choice.logprobs, "token_logprobs", None)
            return self._reply(choice.text, choice.finish_reason, answer.usage, given, wanted)

    def chat(self, messages: Sequence[Message], /, **options: Any) -> Reply:
        """Answer a conversation."""
        wanted = Options(**options)
        with self._asking():
            answer = self._client.chat.completions.create(
                messages=[dict(message) for message in messages], logprobs=True, **self._parameters(wanted)
            )
            choice = answer.choices[0]
            content = getattr(choice.logprobs, "content", None)
            given = [token.logprob for token in content] if content else None
            return self._reply(choice.message.content or "", choice.finish_reason, answer.usage, given, wanted)

    def stream(self, prompt: str | Sequence[Message], /, **options: Any) -> Iterator[str]:
        """Continue a text or answer a conversation piece by piece."""
        wanted = Options(**options)
        parameters = self._parameters(wanted) | {"stream": True}
        text, finish, usage = "", "stop", None
        with self._asking():
            if isinstance(prompt, str):
                parts = self._client.completions.create(prompt=prompt, **parameters)
            else:
                messages = [dict(message) for message in prompt]
                parts = self._client.chat.completions.create(messages=messages, **parameters)
            iterator, pieces = iter(parts), 0
        while True:
            with self._asking():
                if (part := next(iterator, None)) is None:
                    break
                usage = getattr(part, "usage", None) or usage
                if not part.choices:
                    continue
                choice = part.choices[0]
                piece = choice.text if isinstance(prompt, str) else choice.delta.content
                finish = choice.finish_reason or finish
            if piece:
                text, pieces = text + piece, pieces + 1
                yield piece
        return self._reply(text, finish, usage, None, wanted, pieces)

    def score(self, prompt: str, continuation: str, /) -> float:
        """Log-probability, in nats, that the text ``prompt`` goes on with ``continuation``; needs a server that echoes
        prompts with log-probabilities (vLLM does).

        Raises:
            UserError: the server does not echo, the prompt is empty, or a token holds the prompt's end and more.
        """
        if not prompt:
            raise UserError("a server gives a text's first token no probability: give a prompt that is not empty")
        with self._asking():
            answer = self._client.completions.create(
                model=self.model, prompt=prompt + continuation, max_tokens=1, temperature=0, echo=True, logprobs=1
            )
            given = answer.choices[0].logprobs
            if given is None or not given.text_offset or given.text_offset[0] != 0:
                raise UserError(f"the server at {self.address} does not echo prompts, which scoring needs: use vLLM")
            if len(prompt) not in given.text_offset:
                raise UserError(
                    "one token holds the end of the prompt and the beginning of the continuation, so neither has a "
                    "probability of its own: move the cut, for example to before a space"
                )
            end = len(prompt) + len(continuation)
            return float(sum(p for p, at in zip(given.token_logprobs, given.text_offset) if len(prompt) <= at < end))

    def _parameters(self, wanted: Options) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if wanted.choices is not None:
            extra = {"structured_outputs": {"choice": list(wanted.choices)}}
        elif wanted.regex is not None:
            extra = {"structured_outputs": {"regex": wanted.regex}}
        return {
            "model": self.model,
            "max_tokens": wanted.max_tokens,
            "temperature": wanted.temperature,
            "top_p": wanted.top_p,
            "stop": list(wanted.stop) or None,
            "seed": wanted.seed,
            "extra_body": extra,
        }

    def _reply(
        self,
        text: str,
        finish: str | None,
        usage: Any,
        log_probs: list[float] | None,
        wanted: Options,
        pieces: int = 0,
    ) -> Reply:
        if not isinstance(text, str):
            raise TypeError("an answer without text")  # see _asking
        if wanted.choices is not None and text not in wanted.choices:
            raise UserError(f"the server at {self.address} ignores choices: it answered {text[:60]!r}")
        cut = finish == "length" or wanted.stop  # then the text is the beginning of a match
        if wanted.regex is not None and not cut and not _matches(wanted.regex, text):
            raise UserError(f"the server at {self.address} ignores regular expressions: it answered {text[:60]!r}")
        tokens = usage.completion_tokens if usage else pieces
        names = {"stop": "stop" if wanted.stop else "eot", "length": "length"}
        return Reply(
            text,
            tokens,
            None if log_probs is None else float(sum(p for p in log_probs if p is not None)),
            names.get(finish or "", finish or "eot"),
            usage.prompt_tokens if usage else 0,
        )

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A request, and the reading of its answer; what fails is told in one line."""
        try:
            yield
        except self._openai.APIConnectionError as error:
            raise UserError(f"nothing answers at {self.address}: start the server, or check the address") from error
        except self._openai.APIStatusError as error:
            message = str(error).splitlines()[0][:200]
            raise UserError(f"the server at {self.address} refuses: {message}") from error
        except (self._openai.OpenAIError, AttributeError, TypeError, LookupError, ValueError) as error:
            # A page of HTML, other JSON, or an answer without choices.
            raise UserError(
                f"what answers at {self.address} does not speak OpenAI's protocol: check the address (it ends in /v1)"
            ) from error


def _matches(pattern: str, text: str) -> bool:
    """Whether the whole text matches, as far as Python can tell."""
    try:
        return regex.fullmatch(pattern, text) is not None
    except regex.error:  # the syntax of the server's engine is another in rare corners
        return True
