"""How fast SmolLM2-135M speaks from its Q4_1 file: Canon against llama.cpp and transformers, in turn.

    python -m benchmarks llm_inference
    python -m benchmarks.llm_inference [--rounds 5] [--threads 2] [--prompt 512] [--new 128] [--json]

Every side is a process of its own that lives through all rounds; a round loads the file, reads the same prompt and
decodes greedily, batch 1, one side after the other, in an order that turns from round to round (transformers, which
takes long to load, does so once, before the first round). Ratios are taken within a round. Loading includes the
tokenizer, not the import of the libraries. What is timed is what a caller of each library's usual interface gets,
sampling included.

llama-cpp-python is built from source for this processor: `pip install llama-cpp-python`. Where that build crashes on a
processor with AMX, use CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON
-DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON". If it stands in another environment, name that one's interpreter in
CANON_LLAMA_CPP_PYTHON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXT = "The history of the printing press is long, and it begins with clay, ink and patience. "
Measured = dict[str, float]


def canon_side(model_file: str, threads: int, prompt: int, new: int) -> Callable[[], Measured]:
    """Canon, as `canon chat` uses it."""
    import torch

    sys.path.insert(0, str(ROOT))
    from canon.core.generation.decode import Sampling, generate
    from canon.language.llama import from_pretrained

    torch.set_num_threads(threads)

    def measure() -> Measured:
        start = time.perf_counter()
        model, tokenizer = from_pretrained(model_file, "fast")
        loaded = time.perf_counter() - start
        assert tokenizer is not None
        tokens = (tokenizer.encode(TEXT) * prompt)[:prompt]
        # No tokenizer: nothing ends the text early.
        timing = generate(model, [tokens], Sampling(max_tokens=new, temperature=0))[0].timing
        return {"load": loaded, "prefill": timing.prefill_speed, "decode": timing.decode_speed}

    return measure


def llama_cpp_side(model_file: str, threads: int, prompt: int, new: int) -> Callable[[], Measured]:
    """llama.cpp through llama-cpp-python, with flash attention, which is faster here."""
    import llama_cpp

    def measure() -> Measured:
        start = time.perf_counter()
        model = llama_cpp.Llama(
            model_file, n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, flash_attn=True,
            verbose=False,
        )  # fmt: skip
        loaded = time.perf_counter() - start
        tokens = (model.tokenize(TEXT.encode(), add_bos=False) * prompt)[:prompt]
        start = time.perf_counter()
        stream = model.generate(tokens, temp=0.0, top_k=1)
        next(stream)
        first = time.perf_counter()
        for _ in range(new):
            next(stream)
        return {
            "load": loaded,
            "prefill": prompt / (first - start),
            "decode": new / (time.perf_counter() - first),
        }

    return measure


def transformers_side(model_file: str, threads: int, prompt: int, new: int, dtype: str) -> Callable[[], Measured]:
    """transformers, which unpacks the file into ``dtype`` on loading; that takes so long that it is done once."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    path = Path(model_file)

    class Clock(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    start = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
    )
    loaded = time.perf_counter() - start

    def measure() -> Measured:
        tokens = torch.tensor([(tokenizer(TEXT, add_special_tokens=False).input_ids * prompt)[:prompt]])
        clock = Clock()
        model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new + 1, min_new_tokens=new + 1,
            do_sample=False, streamer=clock,
        )  # fmt: skip
        prompted, first, *_, last = clock.times
        return {"load": loaded, "prefill": prompt / (first - prompted), "decode": new / (last - first)}

    return measure


SIDES: dict[str, Callable[..., Callable[[], Measured]]] = {
    "canon": canon_side,
    "llama.cpp": llama_cpp_side,
    "transformers float32": lambda *args: transformers_side(*args, dtype="float32"),
    "transformers bfloat16": lambda *args: transformers_side(*args, dtype="bfloat16"),
}


def serve(side: str, arguments: list[str]) -> None:
    """The process of one side: a measurement for every line on standard input."""
    model_file, *numbers = arguments
    measure = SIDES[side](model_file, *map(int, numbers))
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


class Side:
    """A side seen from outside."""

    def __init__(self, name: str, arguments: list[str], threads: int):
        python = os.environ.get("CANON_LLAMA_CPP_PYTHON", sys.executable) if name == "llama.cpp" else sys.executable
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        self.name = name
        self.process = subprocess.Popen(
            [python, __file__, "--side", name, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        if self._answer() != "ready":
            sys.exit(f"{name} does not start: is it installed? See the top of {Path(__file__).name}")

    def measure(self) -> Measured:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        answer = self._answer()
        if not answer:
            sys.exit(f"{self.name} stopped with code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def compare(rounds: int, threads: int, prompt: int, new: int) -> dict[str, Any]:
    """The record: medians of each side, and of Canon's ratios with their range over the rounds."""
    from canon.core.data import assets
    from canon.core.lab.environment import machine

    arguments = [str(assets.fetch("smollm2-135m-instruct")), str(threads), str(prompt), str(new)]
    sides = [Side(name, arguments, threads) for name in SIDES]
    results: dict[str, list[Measured]] = {name: [] for name in SIDES}
    try:
        for side in sides:
            side.measure()  # warm-up: libraries load, Canon compiles its C file
        for number in range(rounds):
            turn = number % len(sides)
            for side in sides[turn:] + sides[:turn]:
                results[side.name].append(side.measure())
                print(f"round {number + 1} {side.name}: {results[side.name][-1]}", file=sys.stderr, flush=True)
    finally:
        for side in sides:
            side.close()

    rows = []
    for name, measured in results.items():
        row: dict[str, Any] = {"side": name}
        for quantity, unit in (("decode", "tokens/s"), ("prefill", "tokens/s"), ("load", "s")):
            row[f"{quantity}, {unit}"] = round(statistics.median(m[quantity] for m in measured), 2)
            ratios = [ours[quantity] / m[quantity] for ours, m in zip(results["canon"], measured)]
            if quantity == "load":
                ratios = [1 / ratio for ratio in ratios]
            if name != "canon":
                spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
                row[f"{quantity}: Canon faster by"] = f"{statistics.median(ratios):.2f} ({spread})"
        rows.append(row)
    return {
        "benchmark": "llm_inference",
        "title": "SmolLM2-135M from its Q4_1 file, batch 1",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "note": f"{prompt} prompt tokens, {new} new tokens, {threads} threads, {rounds} rounds in turn; medians, and "
        "in brackets the range of the ratio over the rounds. Canon keeps the weights packed, decodes in float32 and "
        "reads prompts by 8-bit integers, as llama.cpp does.",
        "rows": rows,
    }


def main() -> None:
    """Compare, or be a side."""
    if sys.argv[1:2] == ["--side"]:
        serve(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    record = compare(options.rounds, options.threads, options.prompt, options.new)
    if options.json:
        print(json.dumps(record))
    else:
        for row in record["rows"]:
            print("  ".join(f"{key}: {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
