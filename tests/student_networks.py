"""Students of tiny networks: weights rounded, ranges calibrated, nothing learned."""

import torch
from image_networks import SIZE, Residual, captured, photographs
from torch import Tensor, fx, nn

from zsq.graph.blocks import Unit, split
from zsq.images.batches import Batch
from zsq.images.sources import LatentGenerator
from zsq.quant.attach import attach
from zsq.quant.scheme import parse_bits
from zsq.recipe import Calibration
from zsq.recover.reconstruct import reconstruct


def calibrated(
    kind: type[nn.Module] = Residual, bits: str = "W2A4"
) -> tuple[fx.GraphModule, fx.GraphModule, tuple[Unit, ...]]:
    """Teacher, student and units of a network that takes images of `SIZE`."""
    teacher = captured(kind)
    student, quantizers = attach(teacher, parse_bits(bits))
    units = split(teacher.graph)
    reconstruct(
        teacher,
        student,
        quantizers,
        units,
        photographs(32, SIZE, seed=5),
        settings=None,
        calibration=Calibration(num_images=32),
        seed=0,
        finished={},
        log=lambda *_: None,
    )
    return teacher, student, units


def batch_of(num_images: int, *, latent_size: int = 16, seed: int = 0) -> Batch:
    """Latents and a generator that nothing has trained."""
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(num_images, latent_size, generator=rng)
    generator = LatentGenerator(SIZE, latent_size=latent_size, rng=rng).requires_grad_(False)
    return Batch(generator(latents).contiguous(), latents, generator)


def bits_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a module holds."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
