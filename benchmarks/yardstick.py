"""Two programs on one network that take turns: zsq and Genie as published."""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from published import Losses, published_student, reconstruction, synthesis
from torch import Tensor, fx
from work import Work, count_work, median, synchronise

from zsq.graph.blocks import Unit, split
from zsq.graph.nodes import aten
from zsq.images.batches import batch_sizes
from zsq.images.settings import Synthesis
from zsq.images.synthesize import synthesize
from zsq.kernels import reproducible
from zsq.models import load_model
from zsq.pipeline import compose_recipe
from zsq.quant.attach import attach
from zsq.recipe import Recipe, Reconstruction
from zsq.recover.reconstruct import reconstruct
from zsq.rng import rng_for
from zsq.stages import captured

SIDES = ("published", "zsq")
Precision = Literal["float32", "bfloat16"]


@dataclass
class Clocked:
    """What one side took in one stage.

    Attributes:
        steps: seconds a step by item (batch or unit), one entry for every turn but its first.
        total: seconds in all, preparation included.
        losses: the logged values of the last step of every item.
    """

    steps: dict[str, list[float]] = field(default_factory=dict)
    total: float = 0.0
    losses: dict[str, Losses] = field(default_factory=dict)

    @property
    def seconds_a_step(self) -> float:
        """Mean over items, which differ, of the medians of their turns; NaN if there were none.

        Turns in which something is prepared (a step recorded as a CUDA graph) are in `total` alone.
        """
        medians = [median(turns) for turns in self.steps.values()]
        return sum(medians) / len(medians) if medians else math.nan


class Race:
    """Lets two sides take turns and keeps their times apart."""

    def __init__(self, rivals: Callable[[str], Iterator[Losses]], device: torch.device) -> None:
        self.clocked = {side: Clocked() for side in SIDES}
        self._rivals, self._device = rivals, device
        self._running: dict[str, Iterator[Losses]] = {}
        self._reached: dict[str, int] = {}
        self._mark = time.perf_counter()

    def start(self) -> None:
        """Begin to count for zsq."""
        self._lap()

    def log(self, item: str, step: int, values: Losses) -> None:
        """Called by zsq when it has done `step` of an item: the rival catches up. -1 is the item's end."""
        self._note("zsq", item, step, values, self._lap())
        if item not in self._running:
            self._running[item] = self._rivals(item)
        rival, reached = self._running[item], self._reached.get(item, -1)
        last: Losses = {}
        # With PyTorch's own choice of kernels, not the one that zsq makes for itself while it runs.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
            if step >= 0:
                for _ in range(step - reached):
                    last = next(rival)
            else:
                exhaust(rival)
        self._note("published", item, step, last, self._lap())
        self._reached[item] = step

    def finish(self) -> None:
        """What zsq does after the last step of the last item."""
        self.clocked["zsq"].total += self._lap()

    def _lap(self) -> float:
        synchronise(self._device)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds

    def _note(self, side: str, item: str, step: int, values: Losses, seconds: float) -> None:
        clocked = self.clocked[side]
        clocked.total += seconds
        if step >= 0 and item in self._reached and step > self._reached[item]:
            clocked.steps.setdefault(item, []).append(seconds / (step - self._reached[item]))
        if step >= 0 and values:
            clocked.losses[item] = values


class Yardstick:
    """One network with one recipe; every job is a program of one side."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        size = tuple(int(v) for v in options.input_size.split(",")) if options.input_size else None
        numbers = [tuple(map(float, v.split(","))) if v else None for v in (options.mean, options.std)]
        self.teacher = load_model(
            options.model, weights=options.weights, input_size=size, mean=numbers[0], std=numbers[1]
        )
        self.graph = captured(self.teacher, self.device)
        self.units = split(self.graph.graph)
        self.size = self.teacher.spec.input_size
        recipe = compose_recipe("genie", bits=options.bits, budget="paper")
        assert isinstance(recipe.synthesis, Synthesis) and recipe.reconstruction is not None
        self.recipe: Recipe = recipe
        self.images = replace(
            recipe.synthesis,
            num_images=options.num_images,
            batch_size=options.batch_size,
            steps=options.steps,
        )
        self.learning = replace(recipe.reconstruction, steps=options.reconstruction_steps or options.steps)
        self.seed: int = options.seed

    def published_batch(
        self, settings: Synthesis, index: int, made: list[Tensor] | None = None
    ) -> Iterator[Losses]:
        """The published loop of one batch."""
        return synthesis(
            self.teacher.module,
            settings,
            self.size,
            batch_sizes(settings.num_images, settings.batch_size)[index],
            rng=rng_for(self.seed, "synthesis", index),
            device=self.device,
            made=made,
        )

    def zsq_batches(self, settings: Synthesis, log: Callable[[str, int, Losses], None]) -> Tensor:
        """All batches as zsq makes them."""
        return synthesize(
            self.graph,
            settings,
            self.size,
            seed=self.seed,
            finished={},
            log=lambda name, step, _, values: log(name, step, values),
        ).to(self.device)

    def published_units(self, images: Tensor, settings: Reconstruction) -> Callable[[str], Iterator[Losses]]:
        """The published loop of a unit, by the unit's name."""
        return self.published_student(images, settings)[1]

    def published_student(
        self, images: Tensor, settings: Reconstruction
    ) -> tuple[fx.GraphModule, Callable[[str], Iterator[Losses]]]:
        """A student as published, and the loop of each of its units by name, to be run in order."""
        draw = torch.Generator(self.device).manual_seed(self.seed)
        student, quantizers = published_student(self.graph, self.recipe.scheme, draw)
        units = {unit.name: unit for unit in self.units}
        return student, lambda name: reconstruction(
            self.graph,
            student,
            quantizers,
            units[name],
            images,
            settings=settings,
            channel_axis=self._channel_axis(units[name]),
            rng=draw,
        )

    def zsq_units(
        self, images: Tensor, settings: Reconstruction, log: Callable[[str, int, Losses], None]
    ) -> None:
        """All units as zsq learns them."""
        student, quantizers = attach(self.graph, self.recipe.scheme)
        with reproducible(self.device):
            reconstruct(
                self.graph,
                student,
                quantizers,
                self.units,
                images,
                settings=settings,
                calibration=self.recipe.calibration,
                seed=self.seed,
                finished={},
                log=lambda name, step, _, values: log(name, step, values),
            )

    def _channel_axis(self, unit: Unit) -> int:
        layer = next(n for n in self.graph.graph.nodes if n.name == unit.layers[-1])
        return -1 if layer.target is aten.linear.default else 1

    def alone(self, side: str, stage: str, precision: Precision, steps: int) -> None:
        """One side of one stage with a few steps, for its work and its memory."""
        noise = torch.randn(self.images.num_images, *self.size, generator=rng_for(self.seed, "noise"))
        if stage == "synthesis":
            size = min(self.images.batch_size, self.images.num_images)
            settings = replace(self.images, num_images=size, steps=steps, precision=precision)
            if side == "zsq":
                self.zsq_batches(settings, ignore)
            else:
                exhaust(self.published_batch(settings, 0))
            return
        learning, images = replace(self.learning, steps=steps, precision=precision), noise.to(self.device)
        if side == "zsq":
            self.zsq_units(images, learning, ignore)
        else:
            by_name = self.published_units(images, learning)
            for unit in self.units:
                exhaust(by_name(unit.name))

    def work(self, side: str, stage: str, precision: Precision) -> Work:
        """What one step does: two steps minus one, so that preparations cancel."""
        kept, self.images = self.images, replace(self.images, num_images=self.step_images(stage))
        two, one = (count_work(partial(self.alone, side, stage, precision, steps)) for steps in (2, 1))
        self.images = kept
        share = 1 if stage == "synthesis" else len(self.units)
        return Work((two.macs - one.macs) / share, (two.moved - one.moved) / share)

    def step_images(self, stage: str) -> int:
        """Images of one step."""
        size = self.images.batch_size if stage == "synthesis" else self.learning.batch_size
        return min(size, self.images.num_images)

    def race_images(self, precision: Precision) -> tuple[dict[str, Clocked], Tensor]:
        """Both make all images, taking turns."""
        settings = replace(self.images, precision=precision)
        race = Race(lambda name: self.published_batch(settings, int(name.rpartition("-")[2])), self.device)
        race.start()
        images = self.zsq_batches(settings, race.log)
        race.finish()
        return race.clocked, images

    def race_units(self, images: Tensor, precision: Precision) -> dict[str, Clocked]:
        """Both learn all units from the same images, taking turns."""
        started = time.perf_counter()
        learning = replace(self.learning, precision=precision)
        race = Race(self.published_units(images, learning), self.device)
        synchronise(self.device)
        race.clocked["published"].total = time.perf_counter() - started
        race.start()
        self.zsq_units(images, learning, race.log)
        race.finish()
        return race.clocked


def ignore(item: str, step: int, values: Losses) -> None:
    """Takes no notice."""


def exhaust(steps: Iterator[Losses]) -> None:
    """Run a loop to its end."""
    for _ in steps:
        pass
