"""The tokenizer and chat template of published weights, against llama.cpp's recorded ids and against transformers.

`llama_cpp.json` holds what llama.cpp itself (node-llama-cpp 3.22.1) makes of texts chosen to be awkward.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from canon.core.data import assets, text
from canon.core.data.tokenizers import BPETokenizer, load_tokenizer
from canon.core.errors import UserError
from canon.core.generation.text import token_bytes
from canon.core.hub.gguf import GGUF
from canon.core.hub.tokenizer import ChatTemplate, gguf_chat_template, gguf_tokenizer, load_chat_template

LLAMA_CPP = json.loads(Path(__file__).with_name("llama_cpp.json").read_text())


@pytest.fixture(scope="module")
def smollm2() -> GGUF:
    return GGUF(assets.fetch("smollm2-135m-instruct"))


@pytest.fixture(scope="module")
def tokenizer(smollm2: GGUF) -> BPETokenizer:
    return gguf_tokenizer(smollm2.metadata)


@pytest.fixture(scope="module")
def reference(smollm2: GGUF) -> Any:
    """The tokenizer that transformers builds from the file, cut as the published one of SmolLM2 cuts."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    architecture, tokenizer, settings = get_gguf_tokenizer(str(smollm2.path))
    backend, _ = convert_gguf_tokenizer(architecture, tokenizer)
    # transformers (5.23) does not know `smollm` and leaves numbers whole, unlike llama.cpp and the published tokenizer.
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def sentencepiece_metadata(prefix: bool = True) -> dict[str, Any]:
    learned = LLAMA_CPP["sentencepiece"]["pieces"]
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*base, *learned, "<tool>"],
        "tokenizer.ggml.scores": [0.0] * len(base) + [-float(rank) for rank in range(len(learned))] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(learned) + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


# --- Ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "special", "ids"), LLAMA_CPP["smollm2"])
def test_smollm2_ids_are_those_of_llama_cpp(tokenizer: BPETokenizer, written: str, special: bool, ids: list[int]):
    assert tokenizer.encode(written, special=special) == ids
    assert tokenizer.decode(ids) == written


@pytest.mark.parametrize(("prefix", "written", "special", "ids"), LLAMA_CPP["sentencepiece"]["cases"])
def test_sentencepiece_ids_are_those_of_llama_cpp(prefix: bool, written: str, special: bool, ids: list[int]):
    assert gguf_tokenizer(sentencepiece_metadata(prefix)).encode(written, special=special) == ids


def test_sentencepiece_decodes_what_it_encodes():
    tokenizer = gguf_tokenizer(sentencepiece_metadata())
    for written in ("the return of 東京 😀", " two", "a\tb\n"):
        assert tokenizer.decode(tokenizer.encode(written)) == written
    assert (tokenizer.eot, tokenizer.vocab_size) == (2, 259 + len(LLAMA_CPP["sentencepiece"]["pieces"]) + 1)


def test_python_lines_as_in_transformers(tokenizer: BPETokenizer, reference: Any):
    lines = [line for line in text.standard_library().split("\n") if line.strip()]
    lines = lines[:: len(lines) // 2000][:2000]
    assert len(lines) == 2000
    assert tokenizer.encode_batch(lines) == reference(lines)["input_ids"]


def test_properties_of_smollm2(tokenizer: BPETokenizer):
    assert (tokenizer.vocab_size, tokenizer.eot) == (49_152, 2)
    assert tokenizer.encode("<|im_end|>") == [2]
    assert len(tokenizer.encode("<|im_end|>", special=False)) > 1
    assert len(tokenizer.encode("1234567")) == 7


@settings(max_examples=100, deadline=None, derandomize=True)
# The published vocabulary has no token for six control bytes, nor for the bytes 241 and 242 that begin the unassigned
# planes from U+40000: like llama.cpp, the tokenizer drops them.
@given(st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t\r")))
def test_every_text_comes_back(tokenizer: BPETokenizer, written: str):
    assert tokenizer.decode(tokenizer.encode(written)) == written


def test_saved_and_loaded(tokenizer: BPETokenizer, tmp_path: Path):
    tokenizer.save(tmp_path)
    written = "def f(x):\n    return 12 * x  # <|im_end|>"
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(written) == tokenizer.encode(written)
    assert loaded.eot == tokenizer.eot == 2  # not <|endoftext|>, which is in the vocabulary too


@pytest.mark.parametrize("template_first", [True, False])
def test_template_and_tokenizer_share_a_file(tokenizer: BPETokenizer, tmp_path: Path, template_first: bool):
    template = ChatTemplate("{{ bos_token }}x", bos_token="<s>")
    for part in (template, tokenizer) if template_first else (tokenizer, template):
        part.save(tmp_path)
    assert load_tokenizer(tmp_path).eot == tokenizer.eot
    assert load_chat_template(tmp_path) == ChatTemplate("{{ bos_token }}x", "<s>", "<|im_end|>")


@pytest.mark.parametrize(
    ("name", "content", "eot"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>"}, 2),
        ("tokenizer_config.json", {"eos_token": {"content": "</s>", "special": True}}, 2),
        ("config.json", {"eos_token_id": 2}, 2),
        ("generation_config.json", {"eos_token_id": [2, 1]}, 2),
        ("generation_config.json", {"eos_token_id": 10**6}, None),
        ("config.json", {"model_type": "llama"}, None),
    ],
)
def test_the_end_of_text_is_the_published_one(tmp_path: Path, name: str, content: dict[str, Any], eot: int | None):
    gguf_tokenizer(sentencepiece_metadata()).rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eot == eot
    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="is damaged") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", [True, False])
def test_bytes_of_sentencepiece_tokens(prefix: bool):
    """Byte tokens are bytes, and letters of GPT-2's alphabet of bytes are letters."""
    tokenizer = gguf_tokenizer(sentencepiece_metadata(prefix))
    pieces = token_bytes(tokenizer)
    written = "été\tthe return of 東京 😀\nnaïve"
    assert b"".join(pieces[index] for index in tokenizer.encode(written)).decode() == " " * prefix + written
    metadata = sentencepiece_metadata(prefix)
    letters = ["é", "Ġ", "é▁Ġ"]
    types, scores = [*metadata["tokenizer.ggml.token_type"], 1, 1, 1], [*metadata["tokenizer.ggml.scores"], 0, 0, 0]
    tokens = [*metadata["tokenizer.ggml.tokens"], *letters]
    metadata |= {
        f"tokenizer.ggml.{key}": v for key, v in zip(("tokens", "token_type", "scores"), (tokens, types, scores))
    }
    tokenizer = gguf_tokenizer(metadata)
    assert [token_bytes(tokenizer)[tokens.index(piece)].decode() for piece in letters] == ["é", "Ġ", "é Ġ"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "of the kind 'bert'"),
        ({"tokenizer.ggml.model": None}, "of the kind None"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "of the kind"),
        ({"tokenizer.ggml.pre": "martian"}, "cuts text as 'martian' does"),
        ({"tokenizer.ggml.pre": [1]}, "cuts text as"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "names a token twice"),
        ({"tokenizer.ggml.tokens": 3}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["a b"]}, "cannot be built"),
        ({"tokenizer.ggml.merges": ["a"]}, "cannot be built"),
        ({"tokenizer.ggml.eos_token_id": 9}, "cannot be built"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "cannot be built"),
    ],
)
def test_damage_is_one_line(change: dict[str, Any], message: str):
    whole = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "c", "ac"],
        "tokenizer.ggml.merges": ["a c"],
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert gguf_tokenizer(whole).encode("ac") == [2]
    with pytest.raises(UserError, match=message) as caught:
        gguf_tokenizer(whole | change)
    assert "\n" not in str(caught.value)


# --- Chat -------------------------------------------------------------------------------------------------------------

TURNS = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4.\n\nAnything else?"},
    {"role": "user", "content": "No <b>thanks</b> & bye"},
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [TURNS[:1], TURNS, [{"role": "system", "content": "Be brief."}, *TURNS]])
def test_renders_and_encodes_as_transformers(
    smollm2: GGUF, tokenizer: BPETokenizer, reference: Any, messages: list, prompt: bool
):
    template = gguf_chat_template(smollm2.metadata)
    assert template is not None
    rendered = template.render(messages, add_generation_prompt=prompt)
    assert rendered == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    encoded = reference.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert tokenizer.encode(rendered) == encoded


# The constructs that published templates use: trimmed blocks, loop controls, tojson, tokens, raise_exception.
ELABORATE = """{{- bos_token }}
{%- if tools %}
    {{- tools | tojson(indent=2) }} {{ tools | tojson }}
{% endif %}
    {% for message in messages %}
        {% if message.role == 'tool' %}{% continue %}{% endif %}
{{ message['role'] | upper }}: {{ message.content | trim }}{{ eos_token }}
    {% endfor %}
{% set state = namespace(n=0) %}{% set state.n = messages | length %}{{ state.n }}
{% if documents is none %}-{% endif %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


@pytest.mark.parametrize("tools", [None, [{"name": "größe", "html": "<a href='x'>&</a>"}]])
def test_elaborate_template_as_transformers(reference: Any, tools: list | None):
    messages = [*TURNS, {"role": "tool", "content": "4"}]
    ours = ChatTemplate(ELABORATE, "<|im_start|>", "<|im_end|>").render(messages, tools=tools)
    assert ours == reference.apply_chat_template(
        messages, chat_template=ELABORATE, tools=tools, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% for",
        "{{ messages[0].nothing.more }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10**100 }}",
        "{{ 1 // 0 }}",
        "{% include '/etc/passwd' %}",
        "{{ strftime_now(3) }}",
        "{{ messages | tojson(wrong=1) }}",
    ],
)
def test_a_refusing_or_hostile_template_is_one_line(source: str):
    with pytest.raises(UserError, match="chat template") as caught:
        ChatTemplate(source).render(TURNS)
    assert "\n" not in str(caught.value)


def test_template_is_saved_in_the_published_layout(smollm2: GGUF, tokenizer: BPETokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    assert load_chat_template(tmp_path) is None
    template = gguf_chat_template(smollm2.metadata)
    assert template is not None
    template.save(tmp_path)
    tokenizer.save(tmp_path)
    assert load_chat_template(tmp_path) == template
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.apply_chat_template(TURNS, tokenize=False) == template.render(TURNS, add_generation_prompt=False)


def test_older_layout_of_the_template(tmp_path: Path):
    config = {"chat_template": "{{ bos_token }}x", "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_chat_template(tmp_path) == ChatTemplate("{{ bos_token }}x", "<s>", "")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        load_chat_template(tmp_path)


def test_a_file_without_a_template_has_none():
    assert gguf_chat_template({"tokenizer.ggml.tokens": []}) is None
