"""The image towers (section 2.4): a Vision Transformer with one more LayerNorm, and a modified ResNet."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from canon.core.nn.vision import TransformerBlock, initialise_blocks, quick_gelu


class VisionTransformer(nn.Module):
    """An image as a sequence of patches (Dosovitskiy et al. 2020, arXiv 2010.11929).

    Args:
        image_size: side of the pictures in pixels.
        patch_size: side of a patch, which divides it.
        d_model: width.
        n_layers: number of blocks.
        n_heads: attention heads a block.
    """

    def __init__(self, image_size: int, patch_size: int, d_model: int, n_layers: int, n_heads: int):
        super().__init__()
        self.d_features = d_model
        self.patch_embedding = nn.Conv2d(3, d_model, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(d_model))
        self.position_embedding = nn.Embedding((image_size // patch_size) ** 2 + 1, d_model)
        self.pre_norm = nn.LayerNorm(d_model)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, 4 * d_model, quick_gelu) for _ in range(n_layers)
        )
        self.post_norm = nn.LayerNorm(d_model)
        nn.init.normal_(self.class_embedding, std=d_model**-0.5)
        nn.init.normal_(self.position_embedding.weight, std=d_model**-0.5)
        initialise_blocks(self.blocks)

    def forward(self, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch d_model"]:
        """What the class token has gathered."""
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        # "an additional layer normalization to the combined patch and position embeddings before the transformer"
        x = self.pre_norm(x + self.position_embedding.weight)
        for block in self.blocks:
            x = block(x)
        return self.post_norm(x[:, 0])


class Bottleneck(nn.Module):
    """Three convolutions around a shortcut; where the resolution falls, both sides are blurred before they are thinned.

    Args:
        d_in: channels that come in.
        d_hidden: channels in the middle; four times as many go out.
        stride: 2 halves the resolution.
    """

    def __init__(self, d_in: int, d_hidden: int, stride: int = 1):
        super().__init__()
        d_out = 4 * d_hidden
        self.conv1, self.bn1 = nn.Conv2d(d_in, d_hidden, 1, bias=False), nn.BatchNorm2d(d_hidden)
        self.conv2, self.bn2 = nn.Conv2d(d_hidden, d_hidden, 3, padding=1, bias=False), nn.BatchNorm2d(d_hidden)
        self.conv3, self.bn3 = nn.Conv2d(d_hidden, d_out, 1, bias=False), nn.BatchNorm2d(d_out)
        # "antialiased rect-2 blur pooling" (Zhang 2019): a mean over 2 x 2, then a convolution of stride 1
        self.blur = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = None
        if stride > 1 or d_in != d_out:
            self.shortcut = nn.Sequential(self.blur, nn.Conv2d(d_in, d_out, 1, bias=False), nn.BatchNorm2d(d_out))
        nn.init.zeros_(self.bn3.weight)  # a fresh block passes its shortcut on

    def forward(self, x: Float[Tensor, "batch d_in h w"]) -> Float[Tensor, "batch d_out h2 w2"]:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.blur(y)))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class AttentionPool(nn.Module):
    """One attention layer whose query is the mean of all positions, in place of the mean alone.

    Args:
        size: positions on a side.
        d_model: channels.
        n_heads: attention heads.
    """

    def __init__(self, size: int, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.position_embedding = nn.Embedding(size**2 + 1, d_model)
        self.q, self.k, self.v = (nn.Linear(d_model, d_model) for _ in range(3))
        nn.init.normal_(self.position_embedding.weight, std=d_model**-0.5)
        for linear in (self.q, self.k, self.v):
            nn.init.normal_(linear.weight, std=d_model**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "batch d_model size size"]) -> Float[Tensor, "batch d_model"]:
        x = x.flatten(2).transpose(1, 2)
        # "the query is conditioned on the global average-pooled representation of the image"
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.position_embedding.weight
        q, k, v = self.q(x[:, :1]), self.k(x), self.v(x)
        heads = (rearrange(part, "b t (h d) -> b h t d", h=self.n_heads) for part in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(*heads), "b h 1 d -> b (h d)")


class ModifiedResNet(nn.Module):
    """ResNet-D (He et al. 2019, arXiv 1812.01187) with anti-aliased strides and attention pooling.

    Args:
        image_size: side of the pictures in pixels, a multiple of 32.
        width: channels of the first stage's middle; 64 in ResNet-50.
        n_layers: blocks of each of the four stages.
        n_heads: heads of the attention pool.
    """

    def __init__(self, image_size: int, width: int, n_layers: Sequence[int], n_heads: int):
        super().__init__()
        self.d_features = 32 * width
        # the stem: three convolutions in place of one of 7 x 7, and a mean in place of a maximum
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, 2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.stages = nn.ModuleList()
        d_in = width
        for stage, blocks in enumerate(n_layers):
            d_hidden = width * 2**stage
            first = Bottleneck(d_in, d_hidden, stride=1 if stage == 0 else 2)
            rest = (Bottleneck(4 * d_hidden, d_hidden) for _ in range(1, blocks))
            self.stages.append(nn.Sequential(first, *rest))
            d_in = 4 * d_hidden
        self.attention_pool = AttentionPool(image_size // 32, self.d_features, n_heads)

    def forward(self, images: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch d_features"]:
        """What the attention pool has gathered; the linear map that follows it in the paper is the projection."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        for stage in self.stages:
            x = stage(x)
        return self.attention_pool(x)
