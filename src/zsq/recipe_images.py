"""The images of a recipe: given, noise or synthesised, then shaped by a student where the recipe says so."""

import logging
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from zsq.account import Account
from zsq.class_images import PIECE, drawn_images, generated_images, trained_generator
from zsq.errors import UsageError
from zsq.images.batches import batch_names, batch_sizes, is_complete
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.low_pass import low_pass, low_pass_gain
from zsq.images.pixel_settings import MadeInBatches, PixelSynthesis
from zsq.images.pixels import synthesize_pixels
from zsq.images.prior import input_prior, pixel_limits
from zsq.images.prompts import TextToImage
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize
from zsq.models import ModelSpec, Teacher
from zsq.progress import Progress
from zsq.recipe import GaussianNoise, GivenImages, Recipe
from zsq.rng import derived_seed, rng_for
from zsq.state import State
from zsq.student_images import kept_images, refined_images, refines
from zsq.student_networks import Networks
from zsq.text_images import prompt_records, prompts_of, text_images, text_names

logger = logging.getLogger(__name__)
Batches = MutableMapping[str, dict[str, Tensor]]


@dataclass(frozen=True)
class ImageSet:
    """Images with what is known of them.

    Attributes:
        images: (N, C, H, W), normalised.
        labels: (N,) int64, on the CPU: the class that each was made for, or that came with it; None if that
            is not one each.
        prompts: of each image, see `zsq.images.prompts.Prompt`; empty if they did not come from text.
    """

    images: Tensor
    labels: Tensor | None = None
    prompts: Sequence[dict[str, Any]] = ()

    def only(self, index: Tensor) -> "ImageSet":
        """Those at some positions, an index on the CPU."""
        labels = None if self.labels is None else self.labels[index]
        prompts = [self.prompts[k] for k in index.tolist()] if self.prompts else []
        return ImageSet(self.images[index.to(self.images.device)], labels, prompts)


def make_images(
    graph: fx.GraphModule,
    teacher: Teacher,
    settings: Recipe,
    given: ImageSet | None,
    seed: int,
    device: torch.device,
    state: State,
    account: Account,
    *,
    keep_sources: bool = False,
) -> ImageSet:
    """The images before any student shapes them, on `device`.

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
        total = len(given.images)
        count = min(source.num_images, total) if source.num_images else total
        chosen = given.only(torch.randperm(total, generator=rng_for(seed, "given"))[:count])
        return replace(chosen, images=chosen.images.to(device))
    if isinstance(source, GaussianNoise):
        shape = (source.num_images, *teacher.spec.input_size)
        noise = torch.randn(shape, generator=rng_for(seed, "noise"))
        return ImageSet(input_prior(teacher.spec).apply(noise).to(device))
    if isinstance(source, TextToImage):
        prompts = prompts_of(graph, teacher, source, seed)
        images = text_images(prompts, teacher, source, seed, device, state, account)
        records = prompt_records(prompts, state)
        single = source.classes_per_prompt == 1 and source.mixing in ("prompt", "embeddings")
        labels = torch.tensor([record["classes"][0] for record in records]) if single else None
        return ImageSet(images.to(device), labels, records)
    if isinstance(source, GeneratorSynthesis):
        images, drawn = generated_images(graph, source, teacher.spec, seed, state, account)
        return ImageSet(images.to(device), drawn)
    keep = isinstance(source, Synthesis) and (keep_sources or refines(settings))
    images = _synthesize(graph, source, teacher.spec, seed, state, account, keep_sources=keep)
    labels = None
    if source.classes is not None:
        labels = torch.cat([state[name]["labels"] for name in batch_names(source)])
    return ImageSet(images.to(device), labels)


def shape_images(
    networks: Networks,
    made: ImageSet,
    settings: Recipe,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
) -> ImageSet:
    """Refinement against a student, the filters, the low-pass; the images as they are without any of them."""
    if refines(settings):
        with account.timed("refine"):
            images = refined_images(networks, made.images, settings, spec, seed, state, state, account)
            made = replace(made, images=images)
    if settings.filter is not None:
        with account.timed("filter"):
            made = made.only(kept_images(networks, made.images, settings, seed, labels=made.labels))
    return replace(made, images=blurred_images(made.images, settings))


def blurred_images(images: Tensor, settings: Recipe) -> Tensor:
    """The images after the recipe's low-pass filter, if it has one."""
    if settings.low_pass is None:
        return images
    height, width = images.shape[-2:]
    return low_pass(images, low_pass_gain(settings.low_pass, height, width, images.device))


def made_names(settings: Recipe) -> list[str]:
    """Names of the batches of synthesis; none if the recipe's images come from elsewhere."""
    source = settings.synthesis
    if isinstance(source, TextToImage):
        return text_names(source)
    if isinstance(source, GeneratorSynthesis):
        return [PIECE]
    return batch_names(source) if isinstance(source, MadeInBatches) else []


def check_made(made: Batches, settings: Recipe, spec: ModelSpec) -> None:
    """Refuse batches that are not those of this recipe's synthesis."""
    source = settings.synthesis
    if not made or not isinstance(source, MadeInBatches):
        return
    sizes = batch_sizes(source.num_images, source.batch_size)
    expected = {name: (n, *spec.input_size) for name, n in zip(batch_names(source), sizes, strict=True)}
    got = {name: tuple(piece["images"].shape) for name, piece in made.items()}
    if got != expected:
        raise UsageError(f"The images made before have the shapes {got}, expected {expected}.")


def _synthesize(
    graph: fx.GraphModule,
    settings: MadeInBatches,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
    *,
    stage: str = "synthesize",
    keep_sources: bool = False,
) -> Tensor:
    names = batch_names(settings)
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
        item, total = f"batch {index + 1} of {len(names)}", len(names) * settings.steps
        account(Progress(stage, item, index * settings.steps + steps, total, values, resumed))

    def log(batch: str, step: int, steps: int, values: dict[str, float]) -> None:
        if batch not in names:  # centres, of which the images of classes take targets
            account(Progress("centres", batch, step + 1, steps, values))
            return
        index = names.index(batch)
        if size > 1:  # the other processes are about as far with theirs
            before = missing.index(index) // size * size
            together = min(size, len(missing) - before)
            done = (len(names) - len(missing) + before) * settings.steps + (step + 1) * together
            item = f"batch {index + 1} of {len(names)}, {together} at once"
            account(Progress(stage, item, done, len(names) * settings.steps, values))
        else:
            report(index, step + 1, values)

    for index, name in enumerate(names):
        if is_complete(state.get(name), keep_sources):
            report(index, settings.steps, {}, resumed=True)
    shared: Any = {"seed": seed, "finished": state, "log": log, "prior": input_prior(spec)}
    if isinstance(settings, PixelSynthesis):
        limits = pixel_limits(spec)
        return synthesize_pixels(
            graph, settings, spec.input_size, **shared, limits=limits, group=account.group
        )
    return synthesize(
        graph, settings, spec.input_size, **shared, group=account.group, keep_sources=keep_sources
    )


def make_holdout(
    graph: fx.GraphModule, teacher: Teacher, settings: Recipe, seed: int, state: State, account: Account
) -> Tensor | None:
    """Images of a batch of their own, which nothing is calibrated on; None if the recipe makes no images."""
    source = settings.synthesis
    if not isinstance(source, MadeInBatches | GeneratorSynthesis) or settings.num_holdout < 2:
        return None
    if "holdout" not in state:
        own_seed = derived_seed(seed, "holdout")
        if isinstance(source, GeneratorSynthesis):  # other latents of the generator before any student
            training = trained_generator(graph, source, teacher.spec, seed, state, account)
            images, _ = drawn_images(training, settings.num_holdout, own_seed)
        else:
            alone: MadeInBatches = replace(source, num_images=settings.num_holdout)
            if isinstance(alone, PixelSynthesis):  # centres take longer than these few images
                alone = replace(alone, centres=None)
            images = _synthesize(graph, alone, teacher.spec, own_seed, {}, account, stage="holdout")
        state["holdout"] = {"images": blurred_images(images, settings)}
    return state["holdout"]["images"]
