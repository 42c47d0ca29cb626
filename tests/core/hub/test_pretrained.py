"""Models in and out of folders: exact round trips, name maps, and one line for everything that does not fit."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from canon.core.data import assets
from canon.core.data.tokenizers import CharTokenizer
from canon.core.errors import UserError
from canon.core.hub.pretrained import from_plain, load_config, load_pretrained, load_weights, resolve, save_pretrained
from canon.core.hub.tensors import load_tensors


@dataclass(frozen=True)
class Schedule:
    rate: float = 1e-3
    limit: float = float("inf")
    steps: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Config:
    width: int = 4
    vocabulary: int = 7
    depth: int = 2
    kind: Literal["a", "b"] = "a"
    window: int | None = None
    sizes: tuple[int, float] | None = None
    schedule: Schedule = field(default_factory=Schedule)


class Toy(nn.Module):
    """An embedding, two projections a layer, a buffer, and a head tied to the embedding."""

    def __init__(self, config: Config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.register_buffer("noise", torch.zeros(3).normal_(), persistent=False)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        for layer in self.layers:
            nn.init.normal_(layer.weight)


NAMES = {
    "wte.weight": "embedding.weight",
    "h.{i}.fc.weight": ("layers.{i}.weight", "T"),
    "h.{i}.fc.bias": ("layers.{i}.bias", lambda bias: bias.flip(0)),
    "h.{i}.mask": None,
    "scale": "scale",
}
TIED = {"lm_head.weight": "wte.weight"}


def published(model: Toy) -> dict[str, Tensor]:
    tensors = {"wte.weight": model.embedding.weight, "scale": model.scale}
    for index, layer in enumerate(model.layers):
        tensors[f"h.{index}.fc.weight"] = layer.weight.t()
        tensors[f"h.{index}.fc.bias"] = layer.bias.flip(0)
        tensors[f"h.{index}.mask"] = torch.ones(1)
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def published_config(settings: dict[str, Any]) -> Config:
    return Config(width=settings["n_embd"], vocabulary=settings["vocab_size"])


def load(source: str | Path) -> tuple[Toy, Any]:
    return load_pretrained(source, "toy", Config, Toy, NAMES, published_config, tied=TIED)


def trained() -> Toy:
    model = Toy(Config())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_()
    return model


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    state = expected.state_dict()
    assert found.state_dict().keys() == state.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, state[name]), name


# --- Ours -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_bitwise(tmp_path: Path):
    config = Config(kind="b", window=3, sizes=(1, 2.0), schedule=Schedule(rate=0.5, steps=(4, 5, 6)))
    model = trained()
    save_pretrained(model, config, tmp_path / "new", system="toy", tokenizer=CharTokenizer("abc"))
    assert sorted(os.listdir(tmp_path / "new")) == ["characters.json", "config.json", "model.safetensors"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["system"] == "toy"
    for source in (tmp_path / "new", str(tmp_path / "new"), tmp_path / "new" / "model.safetensors"):
        loaded, tokenizer = load(source)
        assert_equal(loaded, model)
        assert loaded.head.weight is loaded.embedding.weight
        assert not loaded.training
        assert tokenizer.encode("cab") == [2, 0, 1]
    settings = load_config(tmp_path / "new")
    assert settings.pop("system") == "toy"
    assert from_plain(Config, settings) == config


def test_the_head_is_stored_once(tmp_path: Path):
    save_pretrained(trained(), Config(width=256, vocabulary=1000), tmp_path, system="toy")
    big = Toy(Config(width=256, vocabulary=1000))
    save_pretrained(big, Config(width=256, vocabulary=1000), tmp_path, system="toy")
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * (1000 * 256 + 2 * 256 * 257) + 2000
    assert load(tmp_path)[1] is None


def test_loading_keeps_buffers_and_the_random_state(tmp_path: Path):
    save_pretrained(trained(), Config(), tmp_path, system="toy")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model, _ = load(tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert model.table.tolist() == [0, 1, 2]
    assert model.noise.all()  # what no checkpoint overwrites is drawn
    assert nn.Linear(64, 64).weight.std() > 0.01  # initialisation works again afterwards


def test_another_system_is_named(tmp_path: Path):
    save_pretrained(trained(), Config(), tmp_path, system="other")
    with pytest.raises(UserError, match="holds the system 'other', not 'toy'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depht": 3}, "a field 'depht'"),
        ({"width": "4"}, "'width' must be of type int, not '4'"),
        ({"width": 4.5}, "'width' must be of type int"),
        ({"width": True}, "'width' must be of type int"),
        ({"window": "3"}, "'window' must be of type int"),
        ({"schedule": {"rate": "fast"}}, "'rate' must be of type float"),
        ({"schedule": {"step": []}}, "a field 'step'"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path: Path, change: dict[str, Any], message: str):
    save_pretrained(trained(), Config(), tmp_path, system="toy")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("written", [b"", b"{", b"[]", b"\xff\xfe", b"3"])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, written: bytes):
    (tmp_path / "config.json").write_bytes(written)
    with pytest.raises(UserError, match=r"config.json is not"):
        load(tmp_path)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no .*config.json"):
        load(tmp_path)
    save_pretrained(trained(), Config(), tmp_path, system="toy")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="there are no weights"):
        load(tmp_path)


# --- The name map -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", [False, True])
def test_published_layout(tmp_path: Path, prefix: str, head: bool):
    model = trained()
    tensors = {prefix + name: tensor for name, tensor in published(model).items()}
    if head:
        tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "toy", "n_embd": 4, "vocab_size": 7}))
    assert_equal(load(tmp_path)[0], model)


def test_a_head_of_its_own_is_not_dropped():
    tensors = published(trained())
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1
    with pytest.raises(UserError, match=r"lm_head.weight is not its wte.weight"):
        load_weights(trained(), tensors, NAMES, tied=TIED)


def test_a_tied_name_fills_a_place_of_its_own():
    tensors = {"wte.weight": torch.randn(7, 4)}
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    names = {"wte.weight": "embedding.weight", "lm_head.weight": "head.weight"}
    load_weights(model, tensors, names, tied=TIED)
    assert torch.equal(model["head"].weight, tensors["wte.weight"])
    load_weights(model, tensors | {"lm_head.weight": torch.ones(7, 4)}, names, tied=TIED)
    assert model["head"].weight.unique().tolist() == [1]


def test_converts_to_the_dtype_of_the_model():
    model, tensors = trained().to(torch.bfloat16), published(trained())
    load_weights(model, tensors, NAMES)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(model.embedding.weight, tensors["wte.weight"].to(torch.bfloat16))


def test_everything_that_does_not_fit_is_in_one_line():
    model, tensors = trained(), published(trained())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["h.1.fc.bias"]
    tensors["h.2.fc.bias"] = torch.zeros(4)
    tensors["pooler.weight"] = torch.zeros(2)
    tensors["wte.weight"] = torch.zeros(9, 4)
    tensors["h.0.fc.weight"] = torch.zeros(4)
    with pytest.raises(UserError) as caught:
        load_weights(model, tensors, NAMES, what="the checkpoint x")
    said = str(caught.value)
    assert "the weights of the checkpoint x do not fit" in said
    assert "1 missing (layers.1.bias)" in said
    assert "2 unexpected (pooler.weight, layers.2.bias)" in said
    assert "2 of another shape (embedding.weight: (9, 4) instead of (7, 4), layers.0.weight: (4,)" in said
    assert "\n" not in said
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed although the checkpoint does not fit"


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path):
    save_file({f"encoder.layer.{i}.weight": torch.zeros(1) for i in range(9)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "n_embd": 4, "vocab_size": 7}))
    with pytest.raises(UserError, match=r"of 'bert' loaded as 'toy'.* 7 missing \(.*\.\.\.\); 9 unexpected") as caught:
        load(tmp_path)
    assert len(str(caught.value)) < 600
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 4}))
    with pytest.raises(UserError, match="describes a 'bert' without 'n_embd': it is not 'toy'"):
        load(tmp_path)


def test_a_name_that_comes_twice_is_unexpected():
    tensors = published(trained())
    tensors["model.wte.weight"] = tensors["wte.weight"] + 1
    with pytest.raises(UserError, match=r"1 unexpected \(model.wte.weight\)"):
        load_weights(trained(), tensors, NAMES)


# --- Finding ----------------------------------------------------------------------------------------------------------


def test_resolve_prefers_what_is_there(in_folder: Path):
    (in_folder / "a" / "b").mkdir(parents=True)
    assert resolve("a/b") == Path("a/b")


def test_resolve_fetches_assets(monkeypatch: pytest.MonkeyPatch, in_folder: Path):
    monkeypatch.setattr(assets, "fetch", lambda name: in_folder / name)
    assert resolve("smollm2-135m-instruct") == in_folder / "smollm2-135m-instruct"


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "../x", "/no/such/folder", "a b/c", "-/--"])
def test_resolve_names_what_it_looked_for(in_folder: Path, source: str):
    with pytest.raises(UserError, match="is no folder, file or asset"):
        resolve(source)


def test_resolve_without_network_is_one_line(in_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        resolve("openai-community/gpt2-that-nobody-has")
    assert "\n" not in str(caught.value)


def test_resolve_brings_a_repository(in_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The hub stands in as a function: what is asked of it, and that its folder loads."""
    asked: dict[str, Any] = {}
    model = trained()

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        save_pretrained(model, Config(), in_folder / "snapshot", system="toy")
        return str(in_folder / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_equal(load("somebody/toy-1.0")[0], model)
    assert asked["name"] == "somebody/toy-1.0"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
    assert load_tensors(in_folder / "snapshot")
