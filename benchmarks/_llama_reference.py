"""Record what transformers and llama.cpp say with SmolLM2's weights: the fixture of the LLaMA claims.

    python -m benchmarks._llama_reference writes canon/claims/language/smollm2_reference.json

Logits of ten prompts, 64 greedy tokens each, are transformers', computed in float32 on the dequantised weights: for
every token the eight best, sixteen of fixed tokens wherever they rank, and the logarithm of the softmax's denominator,
on which all of them bear. Token ids are llama.cpp's, which cuts digits apart as SmolLM2 was trained to; transformers
does not when it reads a GGUF file.
"""

import json
from pathlib import Path
from typing import Any

import llama_cpp
import torch
import transformers

from canon.claims.language.llama import digest
from canon.core.data import assets, text

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "The three primary colours are",
    "To make bread you need flour,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a short poem about autumn.<|im_end|>\n<|im_start|>assistant\n",
    "Question: What is 7 times 8?\nAnswer:",
    "In 1969, the first human beings",
    "Dear Sir or Madam,\n\nI am writing to",
)
NEW_TOKENS = 64
BEST = 8
FIXED = list(range(1536, 49_152, 3072))  # sixteen tokens from all over the vocabulary
LINES = 4000  # half of them with digits: enough that another Python release still has 2,000
TARGET = Path(__file__).parents[1] / "canon/claims/language/smollm2_reference.json"


def record() -> dict[str, object]:
    """The fixture."""
    file = assets.fetch("smollm2-135m-instruct")
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)

    def encode(written: str) -> list[int]:
        return vocabulary.tokenize(written.encode(), add_bos=False, special=True)

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "llama_cpp": llama_cpp.__version__,
        "fixed_ids": FIXED,
        "cases": [_case(model, prompt, encode(prompt), vocabulary.token_eos()) for prompt in PROMPTS],
        "lines": {digest(line): digest(encode(line)) for line in _lines()},
    }


def _case(model: Any, prompt: str, tokens: list[int], end: int) -> dict[str, object]:
    """One prompt: its greedy continuation without the end of text, and the logits that led to it."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([tokens]),
            attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,  # which forbids the end of text
            do_sample=False,
        )
        logits = model(out).logits[0, len(tokens) - 1 : -1]  # of a full pass
    denominators = logits.logsumexp(-1)
    fixed = logits[:, FIXED]
    logits[:, end] = -torch.inf
    best = logits.topk(BEST)
    new = out[0, len(tokens) :].tolist()
    assert new == best.indices[:, 0].tolist(), "the cache and the full pass of the reference disagree"
    return {
        "prompt": prompt,
        "tokens": tokens,
        "new_tokens": new,
        "best_ids": best.indices.tolist(),
        "best_logits": _rounded(best.values),
        "fixed_logits": _rounded(fixed),
        "logsumexp": _rounded(denominators),
    }


def _lines() -> list[str]:
    """Different lines from all over the standard library, half of them with digits."""
    lines = [line for line in dict.fromkeys(text.standard_library().splitlines()) if line.strip()]
    chosen: list[str] = []
    for digits in (True, False):
        kind = [line for line in lines if any(c.isdigit() for c in line) is digits]
        chosen += kind[:: len(kind) // (LINES // 2)][: LINES // 2]
    return chosen


def _rounded(values: torch.Tensor) -> Any:
    """Nested lists with four decimals, which say enough of a claim about 1e-3."""
    return [_rounded(row) if row.dim() else round(float(row), 4) for row in values]


if __name__ == "__main__":
    TARGET.write_text(json.dumps(record(), ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")
