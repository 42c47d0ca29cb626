import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from canon.claims.language.llama import digest, reference
from canon.core import native
from canon.core.data import assets, text
from canon.core.errors import UserError
from canon.core.generation.cache import KVCache
from canon.core.generation.decode import Sampling, generate
from canon.core.generation.sampling import sample_with_log_probability
from canon.core.hub import llama_layouts as layouts
from canon.core.hub.gguf import GGUF
from canon.core.hub.pretrained import save_pretrained
from canon.core.hub.tokenizer import gguf_tokenizer
from canon.core.nn import fused
from canon.core.nn.quantized import PackedMatrix
from canon.language import llama
from canon.language.llama import RMSNorm, rotate, rotations

HF = transformers.models.llama.modeling_llama
SIZES = {
    "vocab_size": 96, "context_length": 64, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96,
    "norm_eps": 1e-5,
}  # fmt: skip
needs_compiler = pytest.mark.skipif(fused.library() is None, reason="no C compiler")


def hugging_face(tied: bool = False, n_kv_heads: int = 2) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=96, max_position_embeddings=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=n_kv_heads, intermediate_size=96, rms_norm_eps=1e-5, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.1)
    return model


@pytest.mark.parametrize(("tied", "n_kv_heads"), [(False, 2), (True, 2), (False, 4)])
def test_outputs_loss_and_gradients_equal_transformers(tmp_path: Path, tied: bool, n_kv_heads: int):
    reference = hugging_face(tied, n_kv_heads)
    reference.save_pretrained(tmp_path)
    ours, tokenizer = llama.from_pretrained(tmp_path)
    tokens = torch.randint(96, (3, 33))
    assert tokenizer is None
    assert ours.config.tied is tied
    expected = reference(tokens[:, :-1]).logits
    torch.testing.assert_close(ours(tokens[:, :-1]), expected, rtol=0, atol=1e-4)
    loss, metrics = ours.loss({"tokens": tokens})
    expected_loss = F.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss)
    assert metrics["tokens"] == 96
    loss.backward()
    expected_loss.backward()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(p.grad)
    gradients = llama.to_hugging_face(ours)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_weights_go_back_to_hugging_face_unchanged(tmp_path: Path):
    reference = hugging_face()
    reference.save_pretrained(tmp_path)
    published = llama.to_hugging_face(llama.from_pretrained(tmp_path)[0])
    assert published.keys() == reference.state_dict().keys()
    for name, weight in reference.state_dict().items():
        assert torch.equal(published[name], weight), name


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_release_is_the_same_model(tmp_path: Path, shards: int):
    """Its names, its order of rows (neighbours are turned), its split over files."""
    reference = hugging_face()
    meta, state = {}, reference.state_dict()
    ours_to_hf, ours_to_meta = layouts.names(2, False, "hugging_face"), layouts.names(2, False, "meta")
    for ours, parts in ours_to_hf.items():
        for hf_name, meta_name in zip(parts, ours_to_meta[ours]):
            turned = hf_name.endswith(("q_proj.weight", "k_proj.weight"))
            weight = state[hf_name]
            if turned:  # each head's rows 0, 16, 1, 17, ... one by one, independently of halves_to_pairs
                order = [
                    head * 16 + half * 8 + i for head in range(len(weight) // 16) for i in range(8) for half in (0, 1)
                ]
                weight = weight[order]
            meta[meta_name] = weight
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(
        json.dumps({"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1})
    )
    for shard in range(shards):

        def part(name: str, weight: Tensor, shard: int = shard) -> Tensor:
            if weight.dim() == 1:
                return weight
            by_columns = any(key in name for key in ("tok_embeddings", "wo.", "w2."))
            return weight.chunk(shards, dim=1 if by_columns else 0)[shard].clone()

        torch.save({name: part(name, w) for name, w in meta.items()}, folder / f"consolidated.{shard:02}.pth")
    tokens = torch.randint(96, (2, 20))
    ours, _ = llama.from_pretrained(folder)
    torch.testing.assert_close(ours(tokens), reference(tokens).logits, rtol=0, atol=1e-4)


def test_permutation_both_ways():
    weight = torch.randn(48, 8)
    pairs = layouts.halves_to_pairs(weight, 16)
    assert torch.equal(layouts.pairs_to_halves(pairs, 16), weight)
    assert torch.equal(pairs[:4], weight[[0, 8, 1, 9]])


def test_units_equal_transformers():
    x = torch.randn(2, 5, 32)
    ours, theirs = RMSNorm(32, 1e-5), HF.LlamaRMSNorm(32, 1e-5)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.normal_())
    torch.testing.assert_close(ours(x), theirs(x))

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    theirs = HF.LlamaMLP(config)
    ours = llama.FeedForward(replace(llama.Config(), d_model=32, n_heads=2, n_kv_heads=2, d_ff=64))
    with torch.no_grad():
        ours.gate_up.weight.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
        ours.down.weight.copy_(theirs.down_proj.weight)
    torch.testing.assert_close(ours(x), theirs(x))

    q = torch.randn(2, 2, 5, 16)  # theirs turns halves; the same numbers as pairs
    cos, sin = HF.LlamaRotaryEmbedding(config)(x, torch.arange(5)[None])
    turned, _ = HF.apply_rotary_pos_emb(q, q, cos, sin)
    as_pairs: Callable[[Tensor], Tensor] = lambda y: y.unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2)  # noqa: E731
    torch.testing.assert_close(rotate(as_pairs(q), rotations(16, 5, 10_000.0)), as_pairs(turned))


def test_rotation_is_the_papers_complex_product_and_depends_on_distance_only():
    x = torch.randn(1, 2, 7, 16)
    rotation = rotations(16, 32, 10_000.0)
    complex_product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(rotation[:7])
    torch.testing.assert_close(rotate(x, rotation[:7]), torch.view_as_real(complex_product).flatten(-2))
    q, k = x[:, :, :1], x[:, :, 1:2]
    at = lambda i, j: (rotate(q, rotation[i : i + 1]) * rotate(k, rotation[j : j + 1])).sum(-1)  # noqa: E731
    torch.testing.assert_close(at(3, 8), at(20, 25))
    assert (at(3, 8) - at(3, 9)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("preset", "billions"), [("6.7b", 6.7), ("13b", 13.0), ("32.5b", 32.5), ("65.2b", 65.2), ("smollm2-135m", 0.135)]
)
def test_published_sizes(preset: str, billions: float):
    config = llama.PRESETS[preset]
    with torch.device("meta"):
        model = llama.Llama(config)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


@pytest.mark.parametrize(
    ("name", "d_model", "n_heads", "n_layers", "learning_rate", "trillions"),
    [
        ("6.7b", 4096, 32, 32, 3e-4, 1.0),
        ("13b", 5120, 40, 40, 3e-4, 1.0),
        ("32.5b", 6656, 52, 60, 1.5e-4, 1.4),
        ("65.2b", 8192, 64, 80, 1.5e-4, 1.4),
    ],
)
def test_published_presets_are_table_2_and_section_2_3(
    name: str, d_model: int, n_heads: int, n_layers: int, learning_rate: float, trillions: float
):
    c = llama.PRESETS[name]
    t = c.training
    assert (c.d_model, c.n_heads, c.n_kv_heads, c.n_layers) == (d_model, n_heads, n_heads, n_layers)
    assert (c.vocab_size, c.context_length, c.norm_eps, c.rope_theta) == (32_000, 2048, 1e-6, 10_000.0)
    assert not c.tied
    assert (t.optimizer, t.beta1, t.beta2, t.weight_decay, t.clip_norm) == ("adamw", 0.9, 0.95, 0.1, 1.0)
    assert (t.schedule, t.final_fraction, t.learning_rate, t.warmup_steps) == ("cosine", 0.1, learning_rate, 2000)
    assert t.batch_size * c.context_length == pytest.approx(4e6, rel=0.05)
    assert t.steps * t.batch_size * c.context_length == pytest.approx(trillions * 1e12, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"n_heads": 3, "n_kv_heads": 3}, "n_heads 3"),
        ({"n_heads": 0, "n_kv_heads": 0}, "n_heads 0"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads 3"),
        ({"n_heads": 4, "n_kv_heads": 0}, "n_kv_heads 0"),
        ({"d_model": 12, "n_heads": 4, "n_kv_heads": 4}, "even multiple"),
    ],
)
def test_a_shape_that_does_not_divide_is_one_line(shape: dict[str, int], says: str):
    with pytest.raises(UserError, match=says) as error:
        llama.Config(**(SIZES | shape))
    assert "\n" not in str(error.value)


def test_feed_forward_width_of_the_published_sizes():
    assert [llama.feed_forward_width(d) for d in (4096, 5120, 6656, 8192)] == [11008, 13824, 17920, 22016]


def test_cache_equals_the_full_forward():
    model = llama.Llama(llama.Config(**SIZES)).eval()
    tokens = torch.randint(96, (3, 20))
    with torch.no_grad():
        full = model(tokens)
        cache = model.new_cache(3, 20)
        parts = [model(part, cache) for part in tokens.split([7, 1, 1, 5, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-5)
        cache.rewind([4, 4, 4])
        torch.testing.assert_close(model(tokens[:, 4:9], cache, last_only=True), full[:, 8:9], rtol=0, atol=1e-5)


def test_ours_saves_and_loads(tmp_path: Path):
    model = llama.Llama(replace(llama.Config(**SIZES), tied=True))
    save_pretrained(model, model.config, tmp_path, system="llama")
    again, _ = llama.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.head.weight is again.token_embedding.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


# --- GGUF and the packed path -----------------------------------------------------------------------------------------


def write_gguf(path: Path, kind: str, head: bool = False, heads: tuple[int, int] = (4, 2), **metadata: float) -> Path:
    """A small random LLaMA whose matrices are of one type."""
    n_heads, n_kv_heads = heads
    d_kv = 128 // n_heads * n_kv_heads
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(192)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    for key, value in metadata.items():
        writer.add_float32(key, value)
    pieces = ["<s>", *map(chr, range(33, 126)), "Ġ", '!"']
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(pieces)
    writer.add_token_merges(['! "'])
    writer.add_token_types([3, *[1] * 95])
    writer.add_eos_token_id(0)
    quantised = gguf.GGMLQuantizationType[kind]

    def add(name: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType = quantised) -> None:
        weight = rng.normal(0, 0.08, (rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    add("token_embd.weight", 96, 128, gguf.GGMLQuantizationType.Q8_0)
    if head:
        add("output.weight", 96, 128)
    writer.add_tensor("output_norm.weight", rng.normal(1, 0.1, 128).astype(np.float32))
    shapes = {"attn_q": (128, 128), "attn_k": (d_kv, 128), "attn_v": (d_kv, 128), "attn_output": (128, 128)}
    shapes |= {"ffn_gate": (192, 128), "ffn_up": (192, 128), "ffn_down": (128, 192)}
    for i in range(2):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", rng.normal(1, 0.1, 128).astype(np.float32))
        for name, shape in shapes.items():
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@needs_compiler
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_matrix_equals_the_references_dequantisation(tmp_path: Path, kind: str):
    path = write_gguf(tmp_path / "model.gguf", kind)
    tensor = GGUF(path).tensors["blk.0.ffn_down.weight"]
    reference = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor.name)
    dense = torch.from_numpy(gguf.quants.dequantize(reference.data, reference.tensor_type))
    library = fused.library()
    assert library is not None
    packed = PackedMatrix(tensor, library=library)
    x = torch.randn(192)
    torch.testing.assert_close(packed.times(x), dense @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.take(torch.tensor([[3, 127], [0, 17]])), dense[torch.tensor([[3, 127], [0, 17]])])
    assert torch.equal(packed.transposed(), dense.bfloat16().T)


@needs_compiler
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("head", [False, True])
def test_fused_decoding_equals_the_exact_model(tmp_path: Path, kind: str, head: bool):
    path = write_gguf(tmp_path / "model.gguf", kind, head)
    fast, exact = (llama.from_pretrained(path, precision)[0] for precision in ("fast", "exact"))
    assert fast.fused is not None
    assert fast.config == exact.config
    tokens = torch.randint(96, (1, 50))
    with torch.inference_mode():
        expected = exact(tokens)
        cache = fast.new_cache(1, 64)
        cache_fp32 = fast.new_cache(1, 64)
        steps = torch.cat([fast(tokens[:, t : t + 1], cache) for t in range(50)], 1)
        mixed = torch.cat([fast(tokens[:, :33], cache_fp32), fast(tokens[:, 33:34], cache_fp32)], 1)
    spread = float(expected.std())
    assert (steps - expected).abs().max() < 0.02 * spread  # keys and values are bfloat16
    assert (mixed - expected[:, :34]).abs().max() < 0.15 * spread  # the prompt is, altogether


@needs_compiler
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_fused_reading_equals_the_exact_model(tmp_path: Path, kind: str):
    """Prompts of any length, in one piece or in several, and what is decoded behind them."""
    path = write_gguf(tmp_path / "model.gguf", kind)
    fast, exact = (llama.from_pretrained(path, precision)[0] for precision in ("fast", "exact"))
    fast.fused._reads_prompts = True  # also on processors on which it is slow
    tokens = torch.randint(96, (1, 60))
    with torch.inference_mode():
        expected = exact(tokens)
        read, cache = [], fast.new_cache(1, 64)
        for piece in tokens.split([2, 11, 13, 30, 3, 1], dim=1):
            read.append(fast(piece, cache, last_only=True))
            assert cache.filled == sum(p.shape[1] for p in tokens.split([2, 11, 13, 30, 3, 1], dim=1)[: len(read)])
        whole, all_at_once = fast.new_cache(1, 64), []
        for length in (2, 13, 26, 56, 59):
            whole.rewind([0])
            all_at_once.append(fast(tokens[:, :length], whole, last_only=True))
        decoded = fast(tokens[:, 59:], whole)
    spread = float(expected.std())
    for logits, length in zip(read, (2, 13, 26, 56, 59, 60)):
        assert (logits - expected[:, length - 1 : length]).abs().max() < 0.1 * spread
    for pieces, one in zip(read, all_at_once):
        torch.testing.assert_close(pieces, one, rtol=0, atol=1e-3 * spread)
    assert (decoded - expected[:, 59:]).abs().max() < 0.1 * spread


@needs_compiler
def test_a_long_prompt_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, _ = llama.from_pretrained(write_gguf(tmp_path / "model.gguf", "Q4_1"), "fast")
    model.fused._reads_prompts = True
    tokens = torch.randint(96, (1, 50))
    with torch.inference_mode():
        whole = model(tokens, model.new_cache(1, 64), last_only=True)
        monkeypatch.setattr(fused, "PROMPT", 16)
        assert (model(tokens, model.new_cache(1, 64), last_only=True) - whole).abs().max() < 1e-3 * whole.std()
        cache = model.new_cache(1, 64)
        with pytest.raises(UserError, match="100 tokens do not fit"):
            model(torch.cat([tokens, tokens], 1), cache, last_only=True)
        assert cache.filled == 0


@needs_compiler
@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (1, 1)])  # of 32, 64 and 128
def test_fused_reading_needs_no_particular_number_of_threads(tmp_path: Path, heads: tuple[int, int]):
    path = write_gguf(tmp_path / "model.gguf", "Q4_1", heads=heads)
    (model, _), (exact, _) = (llama.from_pretrained(path, precision) for precision in ("fast", "exact"))
    model.fused._reads_prompts = True
    tokens, before, results = torch.randint(96, (1, 45)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                results.append(model(tokens, model.new_cache(1, 64), last_only=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    expected = exact(tokens)[:, -1:]
    assert (results[0] - expected).abs().max() < 0.1 * expected.std()


@needs_compiler
def test_what_c_does_not_serve_goes_to_pytorch(tmp_path: Path):
    model, _ = llama.from_pretrained(write_gguf(tmp_path / "model.gguf", "Q4_1"), "fast")
    model.fused._reads_prompts = True
    tokens, c = torch.randint(96, (1, 9)), model.config
    with torch.inference_mode():
        expected = model(tokens)[:, -1:].float()
        for empty in (tokens[:, :0], tokens[:0]):
            assert model.fused(empty, model.new_cache(1, 64), True) is None
        for dtype in (torch.float32, torch.float64):
            cache = KVCache(c.n_layers, 1, c.n_kv_heads, 64, c.d_head, dtype)
            assert model.fused(tokens, cache, True) is None
            assert cache.filled == 0
        longer = KVCache(c.n_layers, 1, c.n_kv_heads, 200, c.d_head, torch.bfloat16)
        given = model(tokens, longer, last_only=True)
        assert (given - expected).abs().max() < 0.1 * expected.std()
        with pytest.raises(IndexError):  # there are 64 positions
            model(torch.randint(96, (1, 60)), longer, last_only=True)
        assert longer.filled == 9


@needs_compiler
def test_fused_decoding_needs_no_particular_number_of_threads(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", "Q4_1")
    model, _ = llama.from_pretrained(path, "fast")
    tokens, before, results = torch.randint(96, (12,)), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            cache = model.new_cache(1, 64)
            with torch.inference_mode():
                results.append(torch.cat([model(token.view(1, 1), cache) for token in tokens]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4)


@needs_compiler
def test_a_default_type_changes_nothing(tmp_path: Path):
    """In C, everything is float32: with memory of another type it would write beyond the end."""
    model, _ = llama.from_pretrained(write_gguf(tmp_path / "model.gguf", "Q4_1"), "fast")
    packed, x, token, logits = model.head.matrix, torch.randn(128), torch.tensor([[5]]), torch.randn(4, 96)
    uniform, found = torch.rand(4, 2, dtype=torch.float64), []
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with torch.inference_mode():
                decoded = model(token, model.new_cache(1, 64))
                drawn = sample_with_log_probability(logits, logits, uniform, Sampling(max_tokens=1))
                found.append([packed.times(x), decoded, *drawn])
    finally:
        torch.set_default_dtype(torch.float32)
    for other in found[1:]:
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(other, found[0]))


@needs_compiler
def test_fused_decoding_outlives_a_change_of_type(tmp_path: Path):
    model, _ = llama.from_pretrained(write_gguf(tmp_path / "model.gguf", "Q4_1"), "fast")
    token = torch.tensor([[5]])
    with torch.inference_mode():
        before = model(token, model.new_cache(1, 64))
    model.to(torch.float64)
    with torch.inference_mode():
        assert torch.equal(model(token, model.new_cache(1, 64)), before)


@needs_compiler
def test_a_packed_layer_keeps_shapes_and_gradients(tmp_path: Path):
    model, _ = llama.from_pretrained(write_gguf(tmp_path / "model.gguf", "Q4_1"), "fast")
    with pytest.raises(RuntimeError):
        model.head(torch.randn(1, 2, 64))  # as many numbers as a row of 128
    x = torch.randn(1, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.head(x).float().sum(), x)
    dense = model.head.matrix.take(torch.arange(96))
    torch.testing.assert_close(gradient[0], dense.sum(0), atol=0.02 * float(dense.sum(0).abs().max()), rtol=0.02)


def test_without_a_compiler_the_model_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_gguf(tmp_path / "model.gguf", "Q4_1")
    native.load_c.cache_clear()
    monkeypatch.setenv("CANON_NATIVE", "0")
    model, _ = llama.from_pretrained(path, "fast")
    native.load_c.cache_clear()
    exact, _ = llama.from_pretrained(path, "exact")
    assert model.fused is None
    results = [generate(m, [[5, 6, 7]], Sampling(max_tokens=2, temperature=0))[0].log_probs for m in (model, exact)]
    assert results[0] == pytest.approx(results[1], abs=0.1)


def test_what_is_not_the_papers_model_is_refused(tmp_path: Path):
    scaled = write_gguf(tmp_path / "scaled.gguf", "Q4_1", **{"llama.rope.scaling.type": 1.0})
    with pytest.raises(UserError, match="scaled rotations"):
        llama.from_pretrained(scaled)
    for wrong in ({"attention_bias": True}, {"rope_scaling": {"rope_type": "llama3"}}, {"model_type": "opt"}):
        settings = {"model_type": "llama", **wrong}
        with pytest.raises(UserError):
            layouts.hugging_face_settings(settings)
    with pytest.raises(UserError, match="missing"):
        layouts.from_published({}, {"n_layers": 2, "tied": False}, "meta", "an empty checkpoint")


# --- SmolLM2 ----------------------------------------------------------------------------------------------------------


def test_smollm2_says_what_transformers_recorded():
    """Two of the ten prompts of the claim, in float32."""
    recorded = reference()
    exact, tokenizer = llama.from_pretrained("smollm2-135m-instruct")
    assert exact.config == replace(llama.PRESETS["smollm2-135m"], training=exact.config.training)
    for case in recorded["cases"][:2]:
        prompt, new = case["tokens"], case["new_tokens"][:24]
        assert tokenizer is not None
        assert tokenizer.encode(case["prompt"]) == prompt
        with torch.no_grad():
            logits = exact(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :]
        for name, ours in (
            ("best_logits", logits.gather(1, torch.tensor(case["best_ids"][:24]))),
            ("fixed_logits", logits[:, recorded["fixed_ids"]]),
            ("logsumexp", logits.logsumexp(-1)),
        ):
            torch.testing.assert_close(ours, torch.tensor(case[name][:24]), rtol=0, atol=1e-3)
        logits[:, tokenizer.eot] = -torch.inf
        assert logits.argmax(-1).tolist() == new


def test_smollm2_tokenizer_equals_llama_cpp_on_4000_lines():
    """Half of them with digits, which SmolLM2 cuts apart; lines that this Python does not have are passed over."""
    recorded = reference()["lines"]
    ours = gguf_tokenizer(GGUF(assets.fetch("smollm2-135m-instruct")).metadata)
    lines = [line for line in set(text.standard_library().splitlines()) if digest(line) in recorded]
    assert len(lines) >= 2000
    assert sum(any(c.isdigit() for c in line) for line in lines) >= 800
    for line, ids in zip(lines, ours.encode_batch(lines)):
        assert digest(ids) == recorded[digest(line)], line
    assert ours.encode("x = 1024") == [*ours.encode("x = "), *(ours.encode(digit)[0] for digit in "1024")]
