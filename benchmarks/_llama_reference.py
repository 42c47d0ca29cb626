"""Record what transformers says with SmolLM2's weights: the fixture of the LLaMA claims.

    python -m benchmarks._llama_reference writes canon/claims/language/smollm2_reference.json

Ten prompts, 64 greedy tokens each, and for every token the reference's two best logits; also how the `tokenizers`
library, fed with the file's vocabulary by transformers, cuts them. Computed in float32 on the dequantised weights.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from canon.core.data import assets

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
TARGET = Path(__file__).parents[1] / "canon/claims/language/smollm2_reference.json"


def record() -> dict[str, object]:
    """The fixture."""
    file = assets.fetch("smollm2-135m-instruct")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    cases = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, len(tokens), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
            # min_new_tokens forbids the end of text, so these are the likeliest other tokens; logits of a full pass.
            logits = model(out).logits[0, len(tokens) - 1 : -1]
            logits[:, tokenizer.eos_token_id] = -torch.inf
            best = logits.topk(2)
        new = out[0, len(tokens) :].tolist()
        assert new == best.indices[:, 0].tolist(), "the cache and the full pass of the reference disagree"
        pairs = [[round(float(a), 4), round(float(b), 4)] for a, b in best.values]
        cases.append({"prompt": prompt, "tokens": tokens, "new_tokens": new, "best_logits": pairs})
    return {"transformers": transformers.__version__, "torch": torch.__version__, "cases": cases}


if __name__ == "__main__":
    TARGET.write_text(json.dumps(record(), ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}")
