"""How each kind of sample becomes a file."""

import io
import warnings
import wave

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def image_png(value: Float[Tensor, "channels height width"] | Image.Image) -> bytes:
    """PNG bytes of an image in [-1, 1] with 1 (grey) or 3 (RGB) channels; values outside are clipped.

    Raises:
        ValueError: the tensor has another shape.
    """
    if isinstance(value, Tensor):
        if value.ndim != 3 or value.shape[0] not in (1, 3):
            raise ValueError(f"an image is (1 or 3, height, width), this is {tuple(value.shape)}")
        pixels = (value.detach().float().cpu().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5
        array = pixels.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        value = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    buffer = io.BytesIO()
    value.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def figure_files(figure: Figure) -> dict[str, bytes]:
    """PNG (160 dots an inch) and SVG bytes of a matplotlib figure, by file suffix."""
    files = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        date = {"Date": None} if kind == "svg" else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands for it
            figure.savefig(buffer, format=kind, dpi=160, bbox_inches="tight", facecolor="white", metadata=date)
        files[f".{kind}"] = buffer.getvalue()
    return files


def audio_wav(value: Float[Tensor, "channels samples"], rate: int) -> bytes:
    """16-bit WAV bytes of a sound in [-1, 1]; values outside are clipped.

    Raises:
        ValueError: the tensor is not (channels, samples).
    """
    if value.ndim != 2:
        raise ValueError(f"audio is (channels, samples), this is {tuple(value.shape)}")
    samples = (value.detach().float().cpu().nan_to_num(0.0).clamp(-1, 1) * 32767).round().to(torch.int16)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(value.shape[0])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.T.contiguous().numpy().astype("<i2").tobytes())
    return buffer.getvalue()
