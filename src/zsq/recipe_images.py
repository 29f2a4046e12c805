"""The images of a recipe: given, noise or synthesised, then shaped by a student where the recipe says so."""

import logging
from collections.abc import MutableMapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from zsq.account import Account
from zsq.errors import UsageError
from zsq.images.low_pass import low_pass, low_pass_gain
from zsq.images.prior import input_prior
from zsq.images.settings import Synthesis
from zsq.images.synthesize import batch_name, batch_sizes, is_complete, synthesize
from zsq.models import ModelSpec, Teacher
from zsq.progress import Progress
from zsq.recipe import GaussianNoise, GivenImages, Recipe
from zsq.rng import derived_seed, rng_for
from zsq.run import State
from zsq.student_images import Networks, filtered_images, refined_images, refines

logger = logging.getLogger(__name__)
Batches = MutableMapping[str, dict[str, Tensor]]


def make_images(
    graph: fx.GraphModule,
    teacher: Teacher,
    settings: Recipe,
    given: Tensor | None,
    seed: int,
    device: torch.device,
    state: State,
    account: Account,
    *,
    keep_sources: bool = False,
) -> Tensor:
    """The images before any student shapes them: (N, C, H, W), normalised, on `device`.

    Args:
        graph: captured teacher with its BatchNorm layers.
        teacher: where it came from, with its input.
        settings: the recipe.
        given: what the user brought, for recipes that take it.
        seed: of the run.
        device: where to compute.
        state: finished batches; new ones are added.
        account: told of progress; its processes share the batches.
        keep_sources: keep latents and generators in `state`, even if the recipe does not refine.
    """
    source = settings.synthesis
    if isinstance(source, GivenImages):
        assert given is not None
        count = min(source.num_images, len(given)) if source.num_images else len(given)
        chosen = torch.randperm(len(given), generator=rng_for(seed, "given"))[:count]
        return given[chosen].to(device)
    if isinstance(source, GaussianNoise):
        shape = (source.num_images, *teacher.spec.input_size)
        noise = torch.randn(shape, generator=rng_for(seed, "noise"))
        return input_prior(teacher.spec).apply(noise).to(device)
    keep = keep_sources or refines(settings)
    return _synthesize(graph, source, teacher.spec, seed, state, account, keep_sources=keep).to(device)


def shape_images(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
) -> Tensor:
    """Refinement against a student, the filter, the low-pass; the images as they are without any of them."""
    if refines(settings):
        with account.timed("refine"):
            images = refined_images(networks, images, settings, spec, seed, state, state, account)
    if settings.filter is not None:
        with account.timed("filter"):
            images = filtered_images(networks, images, settings, seed)
    return blurred_images(images, settings)


def blurred_images(images: Tensor, settings: Recipe) -> Tensor:
    """The images after the recipe's low-pass filter, if it has one."""
    if settings.low_pass is None:
        return images
    height, width = images.shape[-2:]
    return low_pass(images, low_pass_gain(settings.low_pass, height, width, images.device))


def batch_names(settings: Recipe) -> list[str]:
    """Names of the batches of synthesis."""
    source = settings.synthesis
    if not isinstance(source, Synthesis):
        return []
    return [batch_name(k) for k in range(len(batch_sizes(source.num_images, source.batch_size)))]


def check_made(made: Batches, settings: Recipe, spec: ModelSpec) -> None:
    """Refuse batches that are not those of this recipe's synthesis."""
    source = settings.synthesis
    if not made or not isinstance(source, Synthesis):
        return
    sizes = batch_sizes(source.num_images, source.batch_size)
    expected = {name: (n, *spec.input_size) for name, n in zip(batch_names(settings), sizes, strict=True)}
    got = {name: tuple(piece["images"].shape) for name, piece in made.items()}
    if got != expected:
        raise UsageError(f"The images made before have the shapes {got}, expected {expected}.")


def _synthesize(
    graph: fx.GraphModule,
    settings: Synthesis,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
    *,
    stage: str = "synthesize",
    keep_sources: bool = False,
) -> Tensor:
    sizes = batch_sizes(settings.num_images, settings.batch_size)
    names = [batch_name(index) for index in range(len(sizes))]
    size = account.group.size
    missing = [i for i, name in enumerate(names) if not is_complete(state.get(name), keep_sources)]
    if stage == "synthesize" and len(missing) % size:
        idle = size - len(missing) % size
        logger.info(
            "%d batches of images for %d processes: in the last turn %d of them %s nothing to make. Smaller "
            "batches (--set synthesis.batch_size=...) are more, but then the images are others.",
            len(missing),
            size,
            idle,
            "has" if idle == 1 else "have",
        )

    def report(index: int, steps: int, values: dict[str, float], *, resumed: bool = False) -> None:
        item, total = f"batch {index + 1} of {len(sizes)}", len(sizes) * settings.steps
        account(Progress(stage, item, index * settings.steps + steps, total, values, resumed))

    def log(batch: str, step: int, _: int, values: dict[str, float]) -> None:
        index = names.index(batch)
        if size > 1:  # the other processes are about as far with theirs
            before = missing.index(index) // size * size
            together = min(size, len(missing) - before)
            done = (len(names) - len(missing) + before) * settings.steps + (step + 1) * together
            item = f"batch {index + 1} of {len(sizes)}, {together} at once"
            account(Progress(stage, item, done, len(sizes) * settings.steps, values))
        else:
            report(index, step + 1, values)

    for index, name in enumerate(names):
        if is_complete(state.get(name), keep_sources):
            report(index, settings.steps, {}, resumed=True)
    return synthesize(
        graph,
        settings,
        spec.input_size,
        seed=seed,
        finished=state,
        log=log,
        prior=input_prior(spec),
        group=account.group,
        keep_sources=keep_sources,
    )


def make_holdout(
    graph: fx.GraphModule, teacher: Teacher, settings: Recipe, seed: int, state: State, account: Account
) -> Tensor | None:
    """Images of a batch of their own, which nothing is calibrated on; None if the recipe makes no images."""
    source = settings.synthesis
    if not isinstance(source, Synthesis) or settings.num_holdout < 2:
        return None
    if "holdout" not in state:
        alone = replace(source, num_images=settings.num_holdout)
        own_seed = derived_seed(seed, "holdout")
        state["holdout"] = {
            "images": blurred_images(
                _synthesize(graph, alone, teacher.spec, own_seed, {}, account, stage="holdout"), settings
            )
        }
    return state["holdout"]["images"]


def with_given_images(settings: Recipe, teacher: Teacher, images: Tensor) -> Recipe:
    """The recipe with given images in place of its own.

    Raises:
        UsageError: they are not what the teacher takes, or not finite floating-point numbers.
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
    if isinstance(settings.synthesis, GivenImages):
        return settings
    return replace(settings, synthesis=GivenImages(num_images=0), refinement=None)
