"""Makes dalle_released.safetensors: the released dVAE's own code (PyPI DALL_E 0.1) on small random weights.

It holds weights, inputs, outputs and the gradients of a weighted sum of the outputs. To make it anew:

    pip install --target /tmp/dalle_reference --no-deps DALL_E==0.1 attrs requests urllib3 idna certifi
    pip install --target /tmp/dalle_reference --no-deps charset_normalizer
    PYTHONPATH=/tmp/dalle_reference python tests/images/data/make_dalle_released.py
"""

from pathlib import Path

import attr
import torch
from dall_e.decoder import Decoder
from dall_e.encoder import Encoder
from dall_e.utils import map_pixels, unmap_pixels
from safetensors.torch import save_file

WIDTH, CODES, BLOCKS = 4, 12, 2


def main() -> None:
    attr.validators.set_disabled(True)  # they ask for 64 channels and 512 codes at least
    torch.manual_seed(0)
    shape = {"n_hid": WIDTH, "n_blk_per_group": BLOCKS, "vocab_size": CODES}
    networks = {
        "encoder": Encoder(**shape),
        "decoder": Decoder(**shape, n_init=WIDTH // 2),
    }
    pixels = torch.rand(2, 3, 16, 16)
    inputs = {"encoder": map_pixels(pixels), "decoder": torch.randn(2, CODES, 2, 2).softmax(1)}
    found = {"pixels": pixels, "mapped": inputs["encoder"], "unmapped": unmap_pixels(pixels)}
    for part, network in networks.items():
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.3)
        x = inputs[part].requires_grad_()
        y = network(x)
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        found |= {f"{part}.input": x, f"{part}.output": y, f"{part}.weight": weight, f"{part}.input_grad": x.grad}
        for name, p in network.named_parameters():
            found |= {f"{part}/{name}": p, f"{part}.grad/{name}": p.grad}
    tensors = {name: value.detach().clone().contiguous() for name, value in found.items()}
    save_file(tensors, Path(__file__).with_name("dalle_released.safetensors"))


if __name__ == "__main__":
    main()
