"""Train a generator of classes: on the teacher alone, or step by step with a student in between."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from zsq.distributed import ALONE, Group
from zsq.graph.tensors import device_of
from zsq.health import Watch
from zsq.images.batches import batch_sizes
from zsq.images.class_generator import ClassGenerator
from zsq.images.class_losses import (
    SecondClass,
    balanced_labels,
    hard_sample_loss,
    number_of_classes,
    second_labels,
)
from zsq.images.forward import observe
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_objective import Targets
from zsq.images.prior import STANDARD, InputPrior
from zsq.images.schedules import LOGS_A_BATCH, check_finite
from zsq.images.statistics import StatisticsDistance, image_statistics, with_targets, with_units
from zsq.kernels import computing_in

ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter
BETA2 = 0.999

# Parts of a generator's loss that take the place of the class loss: images, teacher's logits, labels -> parts
ClassLoss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Made:
    """What one step of a generator gave.

    Attributes:
        images: (N, C, H, W), normalised, float32, without history; from before the step.
        labels: (N,) int64, on the device of the images.
        logits: what the teacher says of them, (N, K), float32, without history.
        parts: of its loss, weighted, by name, without history; "loss" is their sum.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    parts: dict[str, Tensor]


class GeneratorTraining:
    """A generator with its optimizer and what its images are held to.

    Args:
        teacher: captured network with its BatchNorm layers, on the device to compute on; untouched.
        settings: of the generator and its loss.
        input_size: (C, H, W) of the teacher's images.
        rng: on the CPU; draws the parameters.
        prior: mean and deviation that the images have; None for 0 and 1.
        centres: (K, C, H, W), one image a class, for settings with centres.

    Raises:
        UsageError: the teacher has no BatchNorm or returns no classes.

    Source: GDFQ (arXiv:2003.03603); the loss is the class's cross-entropy and the BatchNorm distance, as in
    its code.
    """

    def __init__(
        self,
        teacher: fx.GraphModule,
        settings: GeneratorSynthesis,
        input_size: tuple[int, int, int],
        *,
        rng: torch.Generator,
        prior: InputPrior | None = None,
        centres: Tensor | None = None,
    ) -> None:
        self.settings, self.device = settings, device_of(teacher)
        self.num_classes = number_of_classes(teacher)
        self._observer = observe(teacher, logits=True, fold=True)
        self._prior = prior or STANDARD
        match = with_units(settings.bn, teacher)
        self._distance = StatisticsDistance(match)
        self._to_centres = StatisticsDistance(
            replace(match, over="image", enhance=False, shallow=0.0, deep=1.0)
        )
        self._centres: Targets | None = None
        if settings.centres is not None and centres is not None:
            with torch.no_grad():
                self._centres = image_statistics(self._observer(centres.to(self.device)))
        self._reduced = computing_in(settings.precision, self.device)
        self.generator = ClassGenerator(
            input_size,
            self.num_classes,
            latent_size=settings.latent_size,
            condition=settings.condition,
            rng=rng,
        ).to(self.device)
        self._named = dict(self.generator.named_parameters())
        self._optimizer = torch.optim.Adam(
            self._named.values(), lr=settings.lr, betas=(settings.beta1, BETA2), fused=True
        )

    def step(
        self,
        num_images: int,
        rng: torch.Generator,
        *,
        class_loss: ClassLoss | None = None,
        lr_factor: float = 1.0,
        group: Group = ALONE,
    ) -> Made:
        """Draw latents and classes (uniformly), descend once.

        Args:
            num_images: of this step.
            rng: on the CPU.
            class_loss: in the place of the cross-entropy of the teacher's logits.
            lr_factor: of the learning rate.
            group: all make the same images and average their gradients, so that they stay together.
        """
        latents = torch.randn(num_images, self.settings.latent_size, generator=rng).to(self.device)
        labels = torch.randint(self.num_classes, (num_images,), generator=rng).to(self.device)
        second = None
        if self.settings.second_share > 0:
            distance = torch.randint(1, self.num_classes, (num_images,), generator=rng).to(self.device)
            second = SecondClass((labels + distance) % self.num_classes, self.settings.second_share)
        with self._reduced:
            images = self._images(latents, labels, second)
            forward = self._observer(images)
        assert forward.logits is not None
        logits = forward.logits.float()
        parts = {"bn": self.settings.bn.weight * self._distance(forward)}
        if class_loss is None:
            parts["class"] = self.settings.class_weight * hard_sample_loss(logits, labels, 0.0, second)
        else:
            parts |= class_loss(images, logits, labels)
        if self._centres is not None:
            assert self.settings.centres is not None
            of_images = [(mean[labels], var[labels]) for mean, var in self._centres]
            to_centres = self._to_centres(with_targets(forward, of_images))
            parts["centres"] = self.settings.centres.weight * to_centres
        loss = torch.stack(list(parts.values())).sum()
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = self.settings.lr * lr_factor
        self._optimizer.zero_grad()
        (loss / group.size).backward(inputs=list(self._named.values()))
        group.add([p.grad for p in self._named.values() if p.grad is not None])
        self._optimizer.step()
        parts = {"loss": loss, **parts}
        parts = {name: part.detach() for name, part in parts.items()}
        return Made(images.detach(), labels, logits.detach(), parts)

    @torch.no_grad()
    def draw(self, num_images: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels (N,), int64, of all classes equally often; both on the device."""
        labels = balanced_labels(num_images, self.num_classes, rng)
        latents = torch.randn(num_images, self.settings.latent_size, generator=rng)
        share = self.settings.second_share
        seconds = second_labels(labels, self.num_classes, rng) if share > 0 else labels
        sizes = batch_sizes(num_images, self.settings.batch_size)
        images = []
        for z, y, other in zip(
            *(t.to(self.device).split(sizes) for t in (latents, labels, seconds)), strict=True
        ):
            with self._reduced:
                images.append(self._images(z, y, SecondClass(other, share) if share > 0 else None))
        joined = torch.cat(images).contiguous()
        check_finite(joined, "generator", generator_advice(self.settings))
        return joined, labels.to(self.device)

    def state(self) -> dict[str, Tensor]:
        """Parameters and what the optimizer keeps of them, by name."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            found[f"parameter.{name}"] = parameter.detach().clone()
            kept = self._optimizer.state.get(parameter, {})
            found |= {f"{key}.{name}": kept[key].clone() for key in ADAM if key in kept}
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` returned."""
        for name, parameter in self._named.items():
            parameter.copy_(state[f"parameter.{name}"])
            kept = {key: state[f"{key}.{name}"] for key in ADAM if f"{key}.{name}" in state}
            if kept:
                self._optimizer.state[parameter] = {key: t.clone().to(self.device) for key, t in kept.items()}

    def _images(self, latents: Tensor, labels: Tensor, second: SecondClass | None) -> Tensor:
        images = self._prior.apply(self.generator(latents, labels, second))
        return images.contiguous(memory_format=torch.channels_last)


def generator_advice(settings: GeneratorSynthesis) -> str:
    """What to try if a generator's numbers are not finite."""
    return f"Lower synthesis.lr (now {settings.lr:g}) or take synthesis.precision=float32."


def warm_up(
    training: GeneratorTraining, rng: torch.Generator, log: Callable[[int, dict[str, float]], None]
) -> None:
    """Train a generator on the teacher alone, for the steps of its settings.

    Args:
        training: changed in place.
        rng: on the CPU.
        log: called as log(step, values) about 20 times; only then the host waits for the device.

    Raises:
        JobError: the training diverged.
    """
    settings = training.settings
    of, advice = "The training of the generator", generator_advice(settings)
    watch = Watch(of, advice, steps=settings.steps, device=training.device)
    log_every = math.ceil(settings.steps / LOGS_A_BATCH)
    for step in range(settings.steps):
        made = training.step(settings.batch_size, rng)
        watch.see(step, [made.parts["loss"]])
        if step % log_every == 0 or step == settings.steps - 1:
            watch.check()
            log(step, {name: part.item() for name, part in made.parts.items()})
