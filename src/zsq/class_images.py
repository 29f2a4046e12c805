"""Images of a generator of classes: its training on the teacher as a stage of a run, with progress."""

import torch
from torch import Tensor, fx

from zsq.account import Account
from zsq.distributed import spread
from zsq.images.class_losses import number_of_classes
from zsq.images.class_settings import ClassGuide
from zsq.images.forward import observe
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.generator_training import GeneratorTraining, warm_up
from zsq.images.pixel_settings import PixelSynthesis
from zsq.images.pixels import make_centres
from zsq.images.prior import input_prior
from zsq.models import ModelSpec
from zsq.out_of_memory import no_room
from zsq.progress import Progress
from zsq.rng import rng_for
from zsq.state import State

PIECE = "generator"  # under which the generator is kept once it is trained on the teacher alone


def check_generator(graph: fx.GraphModule) -> None:
    """Refuse a model that a generator cannot be trained on.

    Raises:
        UsageError: it has no BatchNorm, or returns no classes.
    """
    observe(graph)
    number_of_classes(graph)


def generated_images(
    graph: fx.GraphModule,
    settings: GeneratorSynthesis,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and labels (N,) of a generator that is trained on the teacher alone, on the CPU.

    Args:
        graph: captured teacher with its BatchNorm layers.
        settings: of the generator.
        spec: of the model.
        seed: of the run.
        state: of the run; the trained generator is taken from there, else added to it, and so are any
            centres.
        account: told of progress. One of its processes trains the generator, all make centres.
    """
    total = settings.steps
    centres = _centres(graph, settings, spec, seed, state, account)

    def log(step: int, values: dict[str, float]) -> None:
        account(Progress("synthesize", "generator", step + 1, total, values))

    def make(_: int) -> dict[str, Tensor]:
        training = _untrained(graph, settings, spec, seed, centres)
        with no_room(f"Lower synthesis.batch_size (now {settings.batch_size}); the images are then others."):
            warm_up(training, rng_for(seed, PIECE, "steps"), log)
            images, labels = drawn_images(training, settings.num_images, seed)
        return {**training.state(), "images": images, "labels": labels}

    if PIECE in state:
        account(Progress("synthesize", "generator", total, total, {}, True))
    spread([PIECE], make, state, account.group)
    piece = state[PIECE]
    return piece["images"].cpu(), piece["labels"].cpu()


def trained_generator(
    graph: fx.GraphModule,
    settings: GeneratorSynthesis,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
) -> GeneratorTraining:
    """The generator as `generated_images` left it in the state; arguments as there."""
    training = _untrained(graph, settings, spec, seed, _centres(graph, settings, spec, seed, state, account))
    training.load(state[PIECE])
    return training


def drawn_images(training: GeneratorTraining, num_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a seed, on the device: the same latents and labels whenever it is asked."""
    return training.draw(num_images, rng_for(seed, PIECE, "images"))


def _untrained(
    graph: fx.GraphModule,
    settings: GeneratorSynthesis,
    spec: ModelSpec,
    seed: int,
    centres: Tensor | None,
) -> GeneratorTraining:
    rng = rng_for(seed, PIECE, "parameters")
    return GeneratorTraining(
        graph, settings, spec.input_size, rng=rng, prior=input_prior(spec), centres=centres
    )


def _centres(
    graph: fx.GraphModule,
    settings: GeneratorSynthesis,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
) -> Tensor | None:
    """One image a class, in order; None if the settings have none."""
    if settings.centres is None:
        return None
    pixels = PixelSynthesis(
        precision=settings.precision, bn=settings.bn, classes=ClassGuide(), centres=settings.centres
    )

    def log(batch: str, step: int, steps: int, values: dict[str, float]) -> None:
        account(Progress("centres", batch, step + 1, steps, values))

    names = make_centres(
        graph,
        pixels,
        spec.input_size,
        seed=seed,
        finished=state,
        log=log,
        prior=input_prior(spec),
        group=account.group,
    )
    return torch.cat([state[name]["images"] for name in names])
