"""Train the bundled network `digits` and write its weights to src/zsq/digits.safetensors.

    python scripts/train_digits.py --validate  # fit on 4/5 of the training part, score the remaining 1/5
    python scripts/train_digits.py             # fit on the whole training part, write, score the test part

Data: the 1797 handwritten digits of `sklearn.datasets.load_digits`, split by `zsq.bundled.digits_split`:
every third image of each class is a test image. Test images are used neither for training nor for any choice:
the settings below were chosen with `--validate`, which takes every fifth image of each class out of the
training part, and the test accuracy is computed once, from the weights that were written.

Training: shifts of up to one pixel and rotations of up to 10 degrees, SGD with momentum, cosine schedule,
last epoch. At the end the BatchNorm statistics are estimated again, from one pass over the plain training
images as a single batch, so that they describe exactly the images that the finished network sees.
The same machine kind and versions give the same bits; it takes about ten seconds on one core.
"""

import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zsq.bundled import DIGITS_MEAN, DIGITS_STD, DIGITS_WEIGHTS, DigitsNet, digits_split

SEED = 0
EPOCHS = 40
BATCH_SIZE = 64
LEARNING_RATE = 0.1  # the highest; one epoch of warm-up, then a half cosine to zero
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LABEL_SMOOTHING = 0.05
MAX_SHIFT = 1.0  # pixels
MAX_ANGLE = 10.0  # degrees


def normalised(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """uint8 (N, 8, 8) -> float32 (N, 1, 8, 8) as the network expects them."""
    pixels = torch.from_numpy(images).float().div(255).unsqueeze(1)
    return (pixels - DIGITS_MEAN[0]) / DIGITS_STD[0]


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image (N, 1, H, W) shifted and rotated by its own random amounts; the border is repeated."""
    num_images, _, _, width = images.shape
    angle, shift_x, shift_y = torch.rand(3, num_images, generator=rng) * 2 - 1
    angle = angle * math.radians(MAX_ANGLE)
    shift_x, shift_y = (shift * MAX_SHIFT * 2 / width for shift in (shift_x, shift_y))
    top = torch.stack((angle.cos(), -angle.sin(), shift_x), 1)
    bottom = torch.stack((angle.sin(), angle.cos(), shift_y), 1)
    grid = F.affine_grid(torch.stack((top, bottom), 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """A network fitted to images (N, 1, 8, 8) and labels (N,), in eval mode."""
    torch.manual_seed(SEED)  # the initial weights
    network = DigitsNet()
    rng = torch.Generator().manual_seed(SEED)  # order of the images and augmentation
    steps = EPOCHS * math.ceil(len(images) / BATCH_SIZE)
    optimizer = torch.optim.SGD(
        network.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, steps, pct_start=1 / EPOCHS, cycle_momentum=False
    )
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=rng).split(BATCH_SIZE):
            logits = network(augmented(images[batch], rng))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    estimate_batchnorm(network, images)
    return network.eval()


def estimate_batchnorm(network: nn.Module, images: Tensor) -> None:
    """Replace the running statistics by those of one batch that holds all `images` (N, 1, 8, 8)."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative average: after one batch, that batch's own statistics
    with torch.no_grad():
        network.train()(images)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    with torch.no_grad():
        correct: Tensor = network(images).argmax(1) == labels
    return 100 * correct.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled digits network.")
    parser.add_argument(
        "--validate", action="store_true", help="score a part of the training images, write nothing"
    )
    validate = parser.parse_args().validate
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    train_images, train_labels, test_images, test_labels = digits_split()
    images, labels = normalised(train_images), torch.from_numpy(train_labels)
    start = time.perf_counter()
    if validate:
        rank = torch.stack([labels == digit for digit in range(10)]).cumsum(1)[
            labels, torch.arange(len(labels))
        ]
        held_out = rank % 5 == 0
        network = train(images[~held_out], labels[~held_out])
        top1, part = (
            accuracy(network, images[held_out], labels[held_out]),
            f"{int(held_out.sum())} validation",
        )
    else:
        network = train(images, labels)
        tensors = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
        save_file(tensors, DIGITS_WEIGHTS)
        network.load_state_dict(load_file(DIGITS_WEIGHTS), strict=False)
        top1 = accuracy(network, normalised(test_images), torch.from_numpy(test_labels))
        part = f"{len(test_labels)} test"
    print(f"top-1 {top1:.2f} % on {part} images, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
