"""Both stages together: the loss of the second, sampling, and re-ranking (sections 2.2 and 2.3)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from canon.core.data.tokenizers import BPETokenizer
from canon.core.generation.decode import Sampling, generate
from canon.images.clip.model import CLIP
from canon.images.clip.tokenizer import tokenize
from canon.images.dalle.config import Config
from canon.images.dalle.dvae import DVAE
from canon.images.dalle.transformer import Transformer

TEXT_WEIGHT, IMAGE_WEIGHT = 1 / 8, 7 / 8


class DALLE(nn.Module):
    """A frozen dVAE, and the Transformer that learns captions and their codes as one stream."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dvae = DVAE(config).requires_grad_(False)
        self.transformer = Transformer(config)

    def forward(
        self, text: Int[Tensor, "batch text_length"], images: Float[Tensor, "batch 3 size size"]
    ) -> tuple[Float[Tensor, "batch time stream_ids"], Int[Tensor, "batch time_and_next"]]:
        """Logits of the next token at each position, and the stream itself, one token longer."""
        stream = self.transformer.stream(text, self.dvae.codes(images))
        return self.transformer(stream[:, :-1]), stream

    def loss(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Weighted mean cross-entropy in nats a token of ``tokens`` (captions) and ``images`` in [-1, 1]."""
        logits, stream = self(batch["tokens"], batch["images"])
        length = batch["tokens"].shape[1]
        # "we normalize the cross-entropy losses for the text and image tokens by the total number of each kind in a
        # batch of data"; "we multiply the cross-entropy loss for the text by 1/8 and [that] for the image by 7/8"
        text = cross_entropy(logits[:, : length - 1], stream[:, 1:length])
        image = cross_entropy(logits[:, length:], stream[:, length + 1 :])
        return TEXT_WEIGHT * text + IMAGE_WEIGHT * image, {"text_loss": text.detach(), "image_loss": image.detach()}


def cross_entropy(logits: Float[Tensor, "batch time ids"], targets: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """Mean over tokens, in nats."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def generate_codes(
    model: DALLE, text: Int[Tensor, "n text_length"], *, temperature: float = 1.0, seed: int = 0
) -> Int[Tensor, "n side side"]:
    """Sample a grid of codes for each caption; equal ones are read once.

    Args:
        model: trained.
        text: captions as tokens.
        temperature: divides the logits; the paper has "no temperature reduction".
        seed: another seed, other codes.
    """
    transformer, side = model.transformer, model.config.side
    prompts = [[*row, transformer.start_of_image] for row in text.tolist()]
    sampling = Sampling(max_tokens=side**2, temperature=temperature, seed=seed)
    drawn = torch.tensor([found.tokens for found in generate(transformer, prompts, sampling)])
    return rearrange(drawn - transformer.first_code, "n (h w) -> n h w", h=side)


@torch.no_grad()
def generate_images(
    model: DALLE, text: Int[Tensor, "n text_length"], *, temperature: float = 1.0, seed: int = 0, batch_size: int = 64
) -> Float[Tensor, "n 3 size size"]:
    """Pictures in [-1, 1] of captions; see :func:`generate_codes`."""
    codes = generate_codes(model, text, temperature=temperature, seed=seed)
    device = model.transformer.token_embedding.weight.device
    return torch.cat([model.dvae.decode(part.to(device)).cpu() for part in codes.split(batch_size)])


@torch.no_grad()
def rank(
    clip: CLIP, tokenizer: BPETokenizer, caption: str, images: Float[Tensor, "n 3 height width"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Which pictures fit a caption, the best first, and the cosine similarity of each.

    "We rerank the samples drawn from the transformer using a pretrained contrastive model" (section 2.6).

    Args:
        clip: judges pictures of its own size, to which these are resized.
        tokenizer: of the CLIP.
        caption: what they should show.
        images: in [-1, 1].
    """
    size, device = clip.config.image_size, clip.logit_scale.device
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    text = clip.encode_text(tokenize(tokenizer, [caption], clip.config.context_length).to(device))
    scores = torch.cat([clip.encode_image(part.to(device)) @ text[0] for part in images.split(64)]).cpu()
    return scores.argsort(descending=True, stable=True), scores
