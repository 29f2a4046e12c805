"""What a run will take: time from a trial of a few steps of each stage, memory from shapes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsq.graph.blocks import split
from zsq.images.batches import batch_sizes
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import MadeInBatches, PixelSynthesis
from zsq.images.prompts import TextToImage
from zsq.images.settings import Filter, Synthesis
from zsq.memory import estimate, read_bytes
from zsq.models import Teacher, load_model
from zsq.pipeline import compose_recipe, quantize
from zsq.progress import Progress
from zsq.recipe import GaussianNoise, GivenImages, Recipe
from zsq.recover.unit_tensors import CHUNK
from zsq.stages import captured

TRIAL_STEPS = 4  # of each stage; the first one is not timed, as it is slower
TRIAL_IMAGES = 128  # that units are learned on, where the recipe's images are not made in batches
# Stages as progress names them, by the stage whose time they are part of.
PARTS = {"synthesize": ("centres", "synthesize"), "refine": ("warm-up", "refine")}


@dataclass(frozen=True)
class Stage:
    """A stage as a run's timings name it: its optimizer steps (0 for none) and the seconds it will take."""

    name: str
    steps: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        stages: in order.
        synthesis_bytes, reconstruction_bytes: at the peaks of these stages, computed from shapes, without the
            program and its libraries.
        cache_bytes: of the second, tensors between units, which are in files where --memory is below that.
        trial_seconds: that the trial took.
        notes: what is not in it, in sentences.
    """

    stages: tuple[Stage, ...]
    synthesis_bytes: int
    reconstruction_bytes: int
    cache_bytes: int
    trial_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return {**asdict(self), "seconds": self.seconds}


@dataclass
class _Clock:
    """A callback that times the steps between two events of one item."""

    now: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)
    last: Progress | None = None
    at: float = 0.0

    def __call__(self, event: Progress) -> None:
        now, last = self.now(), self.last
        if (
            last is not None
            and (last.stage, last.item) == (event.stage, event.item)
            and event.done > last.done
        ):
            self.seconds[event.stage] = self.seconds.get(event.stage, 0.0) + now - self.at
            self.steps[event.stage] = self.steps.get(event.stage, 0) + event.done - last.done
        self.totals[event.stage] = event.total
        self.last, self.at = event, now


def forecast(
    model: Teacher | str | Path,
    *,
    recipe: str | Recipe = "genie",
    bits: str | None = None,
    ends: str | None = None,
    placement: str | None = None,
    budget: str = "standard",
    overrides: Mapping[str, Any] | None = None,
    images: Tensor | None = None,
    device: torch.device | str = "cpu",
    memory: int | str | None = None,
) -> Forecast:
    """Time and memory of `quantize` with the same arguments; nothing is written.

    A trial makes one batch of images and runs every stage with it, `TRIAL_STEPS` steps each. What a step took
    is multiplied by the steps of the run, what a stage took besides by its batches or its images.

    Raises:
        UsageError, JobError: as `quantize` would.
    """
    teacher = load_model(model)
    size = teacher.spec.input_size
    chosen: dict[str, Any] = {"bits": bits, "ends": ends, "placement": placement, "overrides": overrides}
    settings = compose_recipe(recipe, budget=budget, input_size=size, **chosen)
    clock, started = _Clock(), time.perf_counter()
    given = None if images is None else images[:TRIAL_IMAGES]
    trial = quantize(
        teacher,
        recipe=trial_recipe(settings),
        budget="paper",
        images=given,
        device=device,
        progress=clock,
    )
    source = settings.synthesis
    count = len(images) if images is not None else getattr(source, "num_images", TRIAL_IMAGES)
    if settings.filter is not None:
        count = settings.filter.chain[-1].keep
    more = {"reconstruct": count / max(len(trial.images), 1)}
    if isinstance(source, MadeInBatches) and images is None:
        batches = len(batch_sizes(source.num_images, source.batch_size))
        more |= {"synthesize": batches, "refine": batches, "filter": batches}
    planned = planned_steps(settings)
    stages = []
    for name, wall in trial.record["timings"].items():
        seconds, steps, inside = 0.0, 0, 0.0
        for part in PARTS.get(name, (name,)):
            if part in clock.totals and part in planned:
                rate = clock.seconds.get(part, 0.0) / max(clock.steps.get(part, 0), 1)
                total = round(clock.totals[part] * planned[part])
                steps += total
                seconds += rate * total
                inside += rate * clock.totals[part]
        seconds += max(0.0, wall - inside) * more.get(name, 1.0)
        stages.append(Stage(name, steps, seconds))
    graph = captured(teacher, torch.device("cpu"))
    reconstruction = settings.reconstruction
    needed = estimate(
        graph,
        split(graph.graph),
        num_images=count,
        synthesis_batch=getattr(source, "batch_size", 0) if images is None else 0,
        latent_size=source.latent_size if isinstance(source, Synthesis) else 0,
        batch_size=reconstruction.batch_size if reconstruction is not None else 0,
        chunk=CHUNK,
    )
    notes = []
    if isinstance(source, TextToImage) and images is None:
        notes.append("The time of making images from text is not in it: the trial took noise in their place")
    return Forecast(
        stages=tuple(stages),
        synthesis_bytes=needed.weights + needed.images + needed.synthesis,
        reconstruction_bytes=needed.reconstruction(None if memory is None else read_bytes(memory)),
        cache_bytes=needed.caches,
        trial_seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )


def trial_recipe(settings: Recipe) -> Recipe:
    """The recipe with one batch of images and at most `TRIAL_STEPS` steps of everything."""
    source = settings.synthesis
    if isinstance(source, MadeInBatches | GeneratorSynthesis):
        count = min(source.num_images, source.batch_size)
        source = replace(source, num_images=count, steps=_few(source.steps))
        if isinstance(source, PixelSynthesis | GeneratorSynthesis) and source.centres is not None:
            source = replace(source, centres=replace(source.centres, steps=_few(source.centres.steps)))
    elif not isinstance(source, GivenImages):
        count = min(source.num_images, TRIAL_IMAGES)
        source = GaussianNoise(num_images=count)
    else:
        count = TRIAL_IMAGES
    settings = replace(settings, synthesis=source)
    if settings.filter is not None:
        settings = replace(settings, filter=_fewer(settings.filter, count))
    if settings.refinement is not None:
        steps, warmup = _few(settings.refinement.steps), _few(settings.refinement.warmup_steps)
        shorter = replace(settings.refinement, steps=steps, warmup_steps=warmup, rounds=1)
        settings = replace(settings, refinement=shorter)
    if settings.reconstruction is not None:
        few = _few(settings.reconstruction.steps)
        settings = replace(settings, reconstruction=replace(settings.reconstruction, steps=few))
    if settings.fine_tuning is not None:
        settings = replace(
            settings, fine_tuning=replace(settings.fine_tuning, epochs=1, iterations=TRIAL_STEPS)
        )
    return settings


def planned_steps(settings: Recipe) -> dict[str, float]:
    """By stage, how many times as many steps the run has as its trial; at 8 bits nothing is learned."""
    found: dict[str, float] = {}
    source = settings.synthesis
    batches = 1
    if isinstance(source, MadeInBatches):
        batches = len(batch_sizes(source.num_images, source.batch_size))
        again = getattr(source, "reuse_steps", 0) or source.steps
        found["synthesize"] = (source.steps + (batches - 1) * again) / _few(source.steps)
        found["holdout"] = source.steps / _few(source.steps)
    if isinstance(source, GeneratorSynthesis):  # one generator, whatever the number of its images
        found["synthesize"] = source.steps / _few(source.steps)
    if isinstance(source, PixelSynthesis | GeneratorSynthesis) and source.centres is not None:
        found["centres"] = source.centres.steps / _few(source.centres.steps)
    if settings.scheme.is_eight_bit:
        return found
    if settings.refinement is not None:
        steps, warmup = settings.refinement.steps, settings.refinement.warmup_steps
        found |= {
            "refine": batches * steps / _few(steps),
            "warm-up": settings.refinement.rounds * warmup / _few(warmup),
        }
    if settings.reconstruction is not None:
        found["reconstruct"] = settings.reconstruction.steps / _few(settings.reconstruction.steps)
    if settings.fine_tuning is not None:
        found["fine-tune"] = settings.fine_tuning.epochs * settings.fine_tuning.iterations / TRIAL_STEPS
    return found


def _few(steps: int) -> int:
    return max(1, min(steps, TRIAL_STEPS))


def _fewer(chosen: Filter, count: int) -> Filter:
    then = None if chosen.then is None else _fewer(chosen.then, count)
    return replace(chosen, keep=min(chosen.keep, count), then=then)
