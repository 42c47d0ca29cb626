"""Writes `data/clip_open_clip.json.gz`: what open_clip computes with weights that anyone can draw again.

open_clip is the only independent source of CLIP's modified ResNet. It needs torchvision, which has no build for CPU
torch here: its operators are declared, not defined, since nothing calls them. To make the file again:

    python -m venv /tmp/oc
    /tmp/oc/bin/pip install --no-deps open_clip_torch==3.3.0 torchvision==0.28.0 timm ftfy wcwidth
    echo $PWD/.venv/lib/python3.11/site-packages > /tmp/oc/lib/python3.11/site-packages/house.pth
    PYTHONPATH=. /tmp/oc/bin/python -m tests.images.make_clip_resnet_fixture
"""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_name("data") / "clip_open_clip.json.gz"
TEXT = {"context_length": 12, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2}
TINY: dict[str, dict[str, Any]] = {
    "resnet": {"layers": [1, 2, 1, 1], "width": 4, "image_size": 64, "patch_size": None},
    "vit": {"layers": 2, "width": 128, "image_size": 24, "patch_size": 8},
}
SIZES = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336")
WHOLE_LAYOUT = ("RN50", "ViT-B-32")
SENTENCES = (
    "A photo of a cat.",
    "  They're   SURE it's\tthe dog's 2nd bone -- isn't it?!\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis",
    "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "天地玄黄 宇宙洪荒。日月盈昃 辰宿列张。1234",
    "いろはにほへと ちりぬるを 다람쥐 헌 쳇바퀴에 타고파",
    "نص حكيم له سر قاطع وذو شأن عظيم",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण",
    "😀👍🏽👩‍🚀 naïve café (e\u0301) @user #tag https://example.org/a?b=1&c=%20",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "",
)


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of this name; NumPy keeps the numbers of RandomState for ever."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    if name.endswith("running_var"):
        return torch.from_numpy(np.abs(values) + 0.5).float()
    if name == "logit_scale":
        return torch.tensor(1.5)
    if len(shape) == 1:  # gains around one, biases and means around zero
        return torch.from_numpy(0.2 * values + float(name.endswith("weight"))).float()
    return torch.from_numpy(values * 1.2 / np.prod(shape[1:]) ** 0.5).float()


def inputs(image_size: int) -> tuple[Tensor, Tensor]:
    """Six pictures and six captions, whose ends have the highest id and come at different places."""
    images = draw(f"images {image_size}", (6, 3, image_size, image_size))
    tokens = torch.from_numpy(np.random.RandomState(0).randint(1, 38, (6, TEXT["context_length"])))
    tokens[:, 0] = 38
    for row in range(6):
        tokens[row, 3 + row] = 39
        tokens[row, 4 + row :] = 0
    return images, tokens


def fingerprint(name: str, gradient: Tensor) -> list[float]:
    """Norm of a gradient, and its product with a fixed direction."""
    direction = np.random.RandomState(zlib.crc32(b"direction " + name.encode())).standard_normal(tuple(gradient.shape))
    gradient = gradient.double()
    return [float(gradient.norm()), float((gradient * torch.from_numpy(np.asarray(direction))).sum())]


def computed(tiny: dict[str, Any]) -> dict[str, Any]:
    """Outputs in evaluation mode, and the loss and its gradients in training mode.

    In double precision: in single, an activation near zero is now on one side of its ReLU and now on the other.
    """
    import torch.nn.functional as F
    from open_clip.model import CLIP

    model = CLIP(embed_dim=20, vision_cfg=tiny, text_cfg=TEXT, quick_gelu=True)
    state = {name: draw(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    model.double()
    images, tokens = inputs(tiny["image_size"])
    images = images.double()
    model.eval()
    with torch.no_grad():
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    model.train()
    out = model(images, tokens)
    logits = out[2] * out[0] @ out[1].t()
    labels = torch.arange(6)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    loss.backward()
    gradients = {name: fingerprint(name, p.grad) for name, p in model.named_parameters()}
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in state.items()},
        "image": image.tolist(),
        "text": text.tolist(),
        "loss": loss.item(),
        "gradients": gradients,
    }


def main() -> None:
    """Write the file."""
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor"):
        library.define(operator)
    import open_clip
    from open_clip.model import CLIP

    torch.set_num_threads(1)
    found: dict[str, Any] = {"open_clip": open_clip.__version__, "parameters": {}, "layouts": {}}
    for size in SIZES:
        config = open_clip.get_model_config(size)
        with torch.device("meta"):
            model = CLIP(**config)
        found["parameters"][size] = sum(p.numel() for p in model.parameters())
        if size in WHOLE_LAYOUT:
            layout = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
            found["layouts"][size] = layout
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    found["tokens"] = {text: tokenizer.encode(text) for text in SENTENCES}
    for name, tiny in TINY.items():
        found[name] = computed(tiny)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


if __name__ == "__main__":
    main()
