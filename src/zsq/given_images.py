"""Images that the user brings, with their labels where they are known, in place of a recipe's own."""

from dataclasses import replace

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.models import Teacher
from zsq.recipe import GivenImages, Recipe

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def with_given_images(
    settings: Recipe, teacher: Teacher, images: Tensor, labels: Tensor | None = None
) -> Recipe:
    """The recipe with given images in place of its own.

    Raises:
        UsageError: they are not what the teacher takes, or not finite floating-point numbers; or the labels
            are not one class of the teacher an image.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != teacher.spec.input_size or len(images) == 0:
        raise UsageError(
            f"The given images have shape {tuple(images.shape)}; the model takes (N, "
            f"{', '.join(map(str, teacher.spec.input_size))})."
        )
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise UsageError(
            f"The given images (of type {str(images.dtype).removeprefix('torch.')}) are integers or hold NaN "
            "or infinity. Expected finite floating-point numbers, normalised as the model's input: "
            "(pixel - mean) / std for pixels in [0, 1]."
        )
    if labels is not None:
        _check_labels(labels, len(images), teacher.output_shape)
    if isinstance(settings.synthesis, GivenImages):
        return settings
    return replace(settings, synthesis=GivenImages(num_images=0), refinement=None)


def _check_labels(labels: Tensor, num_images: int, output_shape: tuple[int, ...]) -> None:
    if len(output_shape) != 1:
        raise UsageError(
            f"The images were given with labels, and the model gives outputs of shape (N, "
            f"{', '.join(map(str, output_shape))}): it has no classes. Leave the labels out."
        )
    kind = str(labels.dtype).removeprefix("torch.")
    if tuple(labels.shape) != (num_images,) or labels.dtype not in INTEGERS:
        raise UsageError(
            f"The labels of the given images are {kind} of shape {tuple(labels.shape)}. Expected one integer "
            f"an image, shape ({num_images},)."
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= output_shape[0]:
        raise UsageError(
            f"The labels of the given images are {lowest} to {highest}, and the model has the classes 0 to "
            f"{output_shape[0] - 1}. Expected classes in the model's order, or no labels."
        )
