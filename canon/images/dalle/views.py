"""What a person wants to see of a run: the codebook at work, samples, and what CLIP makes of them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from canon.core.data.images import Pictures, sheet, to_float
from canon.core.data.tokenizers import BPETokenizer
from canon.core.errors import UserError
from canon.core.hub.tensors import WEIGHTS_FILE
from canon.core.lab import Run
from canon.core.lab.maps import picture_figure
from canon.images.clip.model import CLIP
from canon.images.clip.weights import from_pretrained as load_clip
from canon.images.dalle.captions import Captions
from canon.images.dalle.dvae import DVAE
from canon.images.dalle.model import DALLE, generate_images, rank
from canon.images.dalle.transformer import PATTERNS

CODES_SHOWN = 256


def show(model: DALLE, captions: Captions, pictures: Pictures, held: Pictures, run: Run) -> None:
    """Put all views into the report of a run."""
    images = to_float(held.images[:: max(1, len(held.images) // 12)][:12])
    texts = list(dict.fromkeys(ways[0] for ways in held.captions))
    prompts = texts[:: max(1, len(texts) // 8)][:8]
    run.figure("pictures held out, and decoded from their codes", reconstructions(model.dvae, images))
    run.image("what each code decodes to, the most used first", codebook(model.dvae, to_float(held.images[:256])))
    run.figure("samples and their nearest training pictures", neighbours(model, captions, prompts, pictures.images))
    if judge := clip_beside(run):
        run.figure(f"64 samples of {prompts[0]!r}, ranked by CLIP", ranking(model, captions, prompts[0], *judge))
    run.figure("which codes the last code sees, by layer", attention_patterns(model))


@torch.no_grad()
def reconstructions(dvae: DVAE, images: Float[Tensor, "n 3 size size"]) -> Figure:
    """Pictures, and what is left of them in their codes."""
    back = dvae.decode(dvae.codes(images.to(next(dvae.parameters()).device))).cpu()
    return picture_figure(torch.stack([images, back]), ["picture", "decoded"])


@torch.no_grad()
def codebook(dvae: DVAE, images: Float[Tensor, "n 3 size size"]) -> Image.Image:
    """A tile of each code, the most used first: the middle of a picture that has this code everywhere."""
    device = next(dvae.parameters()).device
    uses = dvae.codes(images.to(device)).flatten().bincount(minlength=dvae.config.codebook_size)
    shown = uses.argsort(descending=True, stable=True)[:CODES_SHOWN]
    tiles = torch.cat([dvae.decode(part[:, None, None].expand(-1, 3, 3)).cpu() for part in shown.split(64)])
    side = tiles.shape[-1] // 3
    return sheet(tiles[:, :, side:-side, side:-side], columns=16, scale=max(1, 24 // side))


@torch.no_grad()
def neighbours(
    model: DALLE, captions: Captions, prompts: list[str], images: UInt8[Tensor, "n 3 size size"], samples: int = 4
) -> Figure:
    """Samples of each caption, and the training picture nearest to the first: to see what was learned by heart."""
    text = captions.encode([prompt for prompt in prompts for _ in range(samples)])
    made = generate_images(model, text).unflatten(0, (len(prompts), samples))
    training = to_float(images)
    nearest = torch.cdist(made[:, 0].flatten(1), training.flatten(1)).argmin(1)
    columns = [*(f"sample {i + 1}" for i in range(samples)), "nearest"]
    return picture_figure(torch.cat([made, training[nearest][:, None]], 1), prompts, columns)


@torch.no_grad()
def ranking(
    model: DALLE, captions: Captions, prompt: str, clip: CLIP, tokenizer: BPETokenizer, samples: int = 64
) -> Figure:
    """The best and the worst samples of a caption in CLIP's eyes."""
    images = generate_images(model, captions.encode([prompt] * samples))
    order, _ = rank(clip, tokenizer, prompt, images)
    shown = min(8, samples // 2)
    return picture_figure(torch.stack([images[order[:shown]], images[order[-shown:]]]), ["best", "worst"])


def clip_beside(run: Run, folder: str = "") -> tuple[CLIP, BPETokenizer] | None:
    """A trained CLIP and its tokenizer: of the run in ``folder``, or of the latest beside this one if it fits.

    Raises:
        UserError: ``folder`` is named and holds no trained CLIP.
    """
    if folder:
        clip, tokenizer = load_clip(Run.open(folder).path / "model")
        if tokenizer is None:
            raise UserError(f"{folder} has no tokenizer beside its CLIP: name the run that trained it")
        return clip, tokenizer
    try:
        found = Run.latest("clip", run.path.resolve().parents[1])
        knows, needed = found.config.get("data"), run.config.get("data")
        known = knows == needed or (knows, needed) == ("emoji", "things")  # things are some of the emoji
        if not known or not (found.path / "model" / WEIGHTS_FILE).is_file():
            return None
        clip, tokenizer = load_clip(found.path / "model")
    except UserError:  # there is none
        return None
    return (clip, tokenizer) if tokenizer is not None else None


def attention_patterns(model: DALLE) -> Figure:
    """The grid as the last code sees it in each kind of layer: dark squares are seen."""
    c = model.config
    last = model.transformer.masks[:, -1, c.text_length + 1 :].float().cpu()
    grids = F.pad(last, (0, 1)).view(len(PATTERNS), 1, 1, c.side, c.side)  # the very last code is read by none
    pictures = (0.9 - 1.6 * grids).expand(-1, -1, 3, -1, -1).transpose(0, 1)
    return picture_figure(pictures, columns=list(PATTERNS), size=1.6)
