"""Trained models in and out of folders: ours, the published Hugging Face layout, and one name map between the two."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Protocol, TypeVar, get_args, get_origin, get_type_hints, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from canon.core.data import assets
from canon.core.data.tokenizers import CHARACTERS_FILE, TOKENIZER_FILE, Tokenizer, load_tokenizer
from canon.core.errors import UserError, disk_errors
from canon.core.hub.tensors import WEIGHTS_FILE, load_tensors, save_tensors
from canon.core.lab.files import plain, to_json, write_atomic

CONFIG_FILE = "config.json"
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "vocab.txt"]

Transform = Callable[[Tensor], Tensor]
Names = Mapping[str, str | tuple[str, str | Transform] | None]
"""Published name -> ours. ``{i}`` stands for a number on both sides. A pair adds what is done to the tensor: ``"T"``
transposes it, a function makes anything else of it. None: the tensor is known and not needed (a stored mask)."""

C = TypeVar("C")
M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class Saves(Protocol):
    """A tokenizer, as far as saving is concerned."""

    def save(self, folder: str | Path, /) -> object:
        """Write it into a folder."""
        ...


# --- Saving -----------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module, config: object, folder: str | Path, *, system: str, tokenizer: Saves | None = None
) -> None:
    """Write a model as ``config.json``, ``model.safetensors`` and its tokenizer's files.

    Args:
        model: its ``state_dict`` is stored, tied tensors once.
        config: the system's configuration dataclass.
        folder: created if need be.
        system: the catalog's name of the system, by which the folder is recognised.
        tokenizer: stored too, if given.

    Raises:
        UserError: the disk is full or not writable.
    """
    save_description(config, folder, system=system, tokenizer=tokenizer)
    save_tensors(model.state_dict(), Path(folder) / WEIGHTS_FILE)


def save_description(config: object, folder: str | Path, *, system: str, tokenizer: Saves | None = None) -> None:
    """Write what stands beside the weights, which training adds; the arguments are those of `save_pretrained`."""
    folder = Path(folder)
    write_atomic(folder / CONFIG_FILE, to_json({"system": system, **plain(config)}, indent=2) + "\n")
    if tokenizer is not None:
        with disk_errors(str(folder)):
            tokenizer.save(folder)


# --- Loading ----------------------------------------------------------------------------------------------------------


def load_pretrained(
    source: str | Path,
    system: str,
    config_type: type[C],
    model_type: Callable[[C], M],
    names: Names,
    published: Callable[[dict[str, Any]], C],
    *,
    tied: Mapping[str, str] | None = None,
) -> tuple[M, Tokenizer | None]:
    """A trained model, in evaluation mode, and its tokenizer if there is one beside it.

    Args:
        source: see `resolve`.
        system: the catalog's name of the system, as `save_pretrained` stored it.
        config_type: the system's configuration dataclass.
        model_type: makes the model from a configuration.
        names: published name -> ours; see `load_weights`.
        published: makes the configuration from a published ``config.json``.
        tied: see `load_weights`.

    Raises:
        UserError: there is nothing there, it is damaged, or it is another system.
    """
    path = resolve(source)
    folder = path if path.is_dir() else path.parent
    settings = load_config(folder)
    ours = "system" in settings
    kind = settings.pop("system") if ours else settings.get("model_type", "unknown")
    if ours and kind != system:
        raise UserError(f"{folder} holds the system {kind!r}, not {system!r}: load it with that one")
    try:
        config = from_plain(config_type, settings) if ours else published(settings)
    except KeyError as error:
        raise UserError(f"{folder / CONFIG_FILE} describes a {kind!r} without {error}: it is not {system!r}") from error
    with no_initialisation():
        model = model_type(config)
    what = f"{path}, a checkpoint of {kind!r} loaded as {system!r},"
    load_weights(model, load_tensors(path), None if ours else names, tied=tied, what=what)
    has_tokenizer = any((folder / name).is_file() for name in (TOKENIZER_FILE, CHARACTERS_FILE, "vocab.json"))
    return model.eval(), load_tokenizer(folder) if has_tokenizer else None


def load_config(folder: str | Path) -> dict[str, Any]:
    """The object in a folder's ``config.json``: ours has a key ``system``, a published one ``model_type``.

    Raises:
        UserError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"there is no {path}: give a folder that save_pretrained wrote, or one in the published layout")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON ({error}); download or save it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} is not a JSON object; download or save it again")
    return settings


def from_plain(kind: type[C], values: Mapping[str, Any]) -> C:
    """A (nested) configuration dataclass from plain JSON values; fields that are not named keep their defaults.

    Raises:
        UserError: a field is unknown or of the wrong type.
    """
    hints = get_type_hints(kind)
    unknown = values.keys() - hints.keys()
    if unknown:
        known = ", ".join(hints)
        raise UserError(
            f"the configuration has a field {min(unknown)!r}, which {kind.__module__} lacks; it has {known}"
        )
    return kind(**{name: _plain_value(name, hints[name], value) for name, value in values.items()})


def _plain_value(name: str, hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, dict):
        return from_plain(hint, value)
    if get_origin(hint) is tuple and isinstance(value, list):
        inner = get_args(hint)
        hints = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(_plain_value(name, part, item) for part, item in zip(hints, value))
    if isinstance(hint, UnionType) and value is not None:
        options = [option for option in get_args(hint) if option is not NoneType]
        return _plain_value(name, options[0], value) if len(options) == 1 else value
    if hint is float and (type(value) is int or value in ("inf", "-inf", "nan")):
        return float(value)
    if hint in (bool, int, float, str) and type(value) is not hint:
        raise UserError(f"the configuration's field {name!r} must be of type {hint.__name__}, not {value!r:.40}")
    return value


class _SkipRandom(TorchFunctionMode):
    """Leaves parameters as they are allocated: a checkpoint is about to overwrite them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.normal_, Tensor.uniform_) and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def no_initialisation() -> Iterator[None]:
    """Build a model without drawing its random weights, and without moving the caller's random state."""
    with torch.random.fork_rng(devices=[]), _SkipRandom():
        yield


def load_weights(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Names | None = None,
    *,
    tied: Mapping[str, str] | None = None,
    what: str = "the checkpoint",
) -> None:
    """Copy a checkpoint into a model, converting to the model's dtype; nothing is changed unless everything fits.

    Args:
        model: receives the weights.
        tensors: name -> tensor, as stored.
        names: published name -> ours, see `Names`; None: the names are the model's own. A published name may carry one
            more component in front, such as ``transformer.`` or ``model.``.
        tied: published name -> the published name it shares its tensor with (``lm_head.weight`` -> ``wte.weight``).
            Where the first is missing, it is taken to be the second; where the model has no place for it, they must be
            equal.
        what: names the checkpoint in an error.

    Raises:
        UserError: tensors are missing, unexpected, or of another shape; the line names the first few.
    """
    own = model.state_dict()
    weights, unknown = (tensors, []) if names is None else _rename(tensors, names, tied or {})
    check_fit(own, {name: tuple(tensor.shape) for name, tensor in weights.items()}, unknown, what)
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_fit(
    own: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    unknown: Sequence[str] = (),
    what: str = "the checkpoint",
) -> None:
    """Compare a checkpoint with a model, which may be on the meta device: nothing is allocated.

    Args:
        own: the model's ``state_dict``.
        shapes: of the checkpoint's tensors, under the model's names.
        unknown: published names for which there are none.
        what: names the checkpoint.

    Raises:
        UserError: see `load_weights`.
    """
    unexpected = [*unknown, *(name for name in shapes if name not in own)]
    # Of two names for one tensor, either will do; on the meta device all addresses are 0, so storages are compared.
    filled = {own[name].untyped_storage()._cdata for name in shapes if name in own}
    missing = [name for name, tensor in own.items() if tensor.untyped_storage()._cdata not in filled]
    misshapen = [
        f"{name}: {shape} instead of {tuple(own[name].shape)}"
        for name, shape in shapes.items()
        if name in own and shape != tuple(own[name].shape)
    ]
    faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    if any(found for _, found in faults):
        said = [
            f"{len(found)} {fault} ({', '.join(found[:3])}{', ...' * (len(found) > 3)})"
            for fault, found in faults
            if found
        ]
        raise UserError(f"the weights of {what} do not fit: {'; '.join(said)}; take a checkpoint of this very model")


def _rename(
    tensors: Mapping[str, Tensor], names: Names, tied: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the published names that the map does not know."""
    table = [(re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(name))), to) for name, to in names.items()]

    def find(name: str) -> tuple[dict[str, str], str | tuple[str, str | Transform] | None] | None:
        return next(((hit.groupdict(), to) for pattern, to in table if (hit := pattern.fullmatch(name))), None)

    published: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in tensors.items():
        name = next((name for name in (key, key.partition(".")[2]) if name in tied or find(name)), None)
        if name is None or name in published:
            unknown.append(key)
        else:
            published[name] = tensor
    for name, other in tied.items():
        if find(name) and other in published:
            published.setdefault(name, published[other])
        elif not find(name) and name in published:
            if other not in published or not torch.equal(published[name], published[other]):
                raise UserError(f"the checkpoint's {name} is not its {other}, and this model has one tensor for both")
            del published[name]

    renamed: dict[str, Tensor] = {}
    for name, tensor in published.items():
        numbers, to = find(name) or ({}, None)
        if to is None:
            continue
        ours, transform = (to, None) if isinstance(to, str) else to
        renamed[ours.format(**numbers)] = _transformed(tensor, transform)
    return renamed, unknown


def _transformed(tensor: Tensor, transform: str | Transform | None) -> Tensor:
    if transform is None:
        return tensor
    try:
        return transform(tensor) if callable(transform) else tensor.t()
    except RuntimeError:  # not of a shape that can be transformed: reported as it is, with the other wrong shapes
        return tensor


# --- Finding ----------------------------------------------------------------------------------------------------------


def resolve(source: str | Path) -> Path:
    """The local folder or file of a source, fetched first if need be.

    Args:
        source: a folder or file; the name of an asset (``canon fetch --list``); or a repository on the Hugging Face
            hub, such as ``openai-community/gpt2``, of which the safetensors, JSON and tokenizer files are brought.

    Raises:
        UserError: it is none of these, or cannot be reached.
    """
    path = Path(source).expanduser()
    name = str(source)
    if path.exists():
        return path
    if any(asset.name == name for asset in assets.assets()):
        return assets.fetch(name)
    unknown = UserError(f"{name} is no folder, file or asset (canon fetch --list), nor a Hugging Face repository a/b")
    if name.count("/") != 1:
        raise unknown
    from huggingface_hub import snapshot_download  # 0.3 s, and only for this
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["onnx/*"]))
    except HFValidationError as error:
        raise unknown from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name} is no local folder, and no public repository on the Hugging Face hub") from error
    except (HfHubHTTPError, OSError) as error:  # no network, no answer, or no space
        reason = str(error).splitlines()[0][:160]
        raise UserError(
            f"{name} is no local folder, and the Hugging Face hub cannot be reached ({reason}): "
            f"connect, or download the repository elsewhere and give its folder"
        ) from error
