"""Images that depend on a student: refined against it, or chosen by the gradients that they give it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from zsq.errors import UsageError
from zsq.graph.tensors import device_of
from zsq.images.batches import Batch, batch_from_piece, batch_names, room_advice
from zsq.images.filters import cover, least_sensitive, lowest
from zsq.images.forward import observe
from zsq.images.gradients import Probe, gradient_probe
from zsq.images.prior import input_prior
from zsq.images.refine import refine, refined_name
from zsq.images.scores import (
    energy,
    gives_logits,
    logits_of,
    mean_patch_entropy,
    norm_sums,
    patch_nodes,
)
from zsq.images.settings import Filter, Refinement, Scope, Synthesis
from zsq.models import ModelSpec
from zsq.out_of_memory import no_room
from zsq.progress import Callback, Progress, silent
from zsq.recipe import Recipe
from zsq.rng import derived_seed, rng_for
from zsq.state import Prefixed, State
from zsq.student_networks import Networks, learn


def refines(settings: Recipe) -> bool:
    """Whether the images are moved after synthesis; at 8 bits a student gives no residual worth following."""
    return settings.refinement is not None and not settings.scheme.is_eight_bit


def refined_images(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    spec: ModelSpec,
    seed: int,
    state: State,
    batches: Mapping[str, Mapping[str, Tensor]],
    report: Callback,
) -> Tensor:
    """Learn a student shortly on the images, then refine their batches against it; in rounds, if so set.

    Args:
        networks: not changed; the short student is a copy.
        images: those of synthesis, on the device to compute on.
        settings: a recipe with synthesis and refinement.
        spec: of the model.
        seed: of the run; the short student and the refinement have streams of their own.
        state: finished pieces of the run; units of the short student and refined batches are added.
        batches: finished batches of synthesis with their sources.
        report: called with progress.

    Returns:
        (N, C, H, W) on the device of `images`.
    """
    source, refinement = settings.synthesis, settings.refinement
    assert isinstance(source, Synthesis) and refinement is not None
    device, prior, rounds = device_of(networks.graph), input_prior(spec), refinement.rounds
    names, made = batch_names(source), batches
    refined_names = [refined_name(k) for k in range(len(names))]
    advice = room_advice(source)
    if refinement.gradients != "last_layer":
        advice += (
            f" Gradients of the last layer take the least (refinement.gradients, now {refinement.gradients})."
        )

    def batch(made: Mapping[str, Mapping[str, Tensor]], name: str) -> Batch:
        return batch_from_piece(made[name], device)

    for index in range(rounds):
        first, end = (refinement.steps * k // rounds for k in (index, index + 1))
        part = replace(refinement, steps=end - first, rounds=1)
        state_of_it = state if index == 0 else Prefixed(state, f"round-{index}-")
        seed_of_it = seed if index == 0 else derived_seed(seed, "round", index)

        def shown(progress: Progress, index: int = index, first: int = first) -> None:
            """The progress of this round as that of all."""
            before, total = index * progress.total, rounds * progress.total
            if progress.stage == "refine":
                before, total = (len(refined_names) * steps for steps in (first, refinement.steps))
            of = f", round {index + 1} of {rounds}" if rounds > 1 else ""
            report(replace(progress, item=progress.item + of, done=before + progress.done, total=total))

        student = _short_student(networks, images, settings, part, seed_of_it, state_of_it, shown)
        log = _batch_log(shown, refined_names, part.steps, state_of_it)
        with no_room(advice):
            refined = refine(
                networks.graph,
                _probe(networks, student, part.gradients),
                [partial(batch, made, name) for name in names],
                part,
                source,
                seed=seed_of_it,
                finished=state_of_it,
                log=log,
                prior=prior,
                keep_sources=index + 1 < rounds,
            )
            images = refined.to(device)
        names, made = refined_names, state_of_it
    return images


def _batch_log(
    report: Callback, names: Sequence[str], steps: int, finished: State
) -> Callable[[str, int, dict[str, float]], None]:
    """A `log` for `refine` that becomes Progress; that of finished batches is reported at once."""

    def event(index: int, done: int, values: dict[str, float], *, resumed: bool = False) -> None:
        item, total = f"batch {index + 1} of {len(names)}", len(names) * steps
        report(Progress("refine", item, index * steps + done, total, values, resumed))

    for index, name in enumerate(names):
        if name in finished:
            event(index, steps, {}, resumed=True)
    return lambda name, step, values: event(names.index(name), step + 1, values)


def kept_images(
    networks: Networks, images: Tensor, settings: Recipe, seed: int, *, labels: Tensor | None = None
) -> Tensor:
    """Which images the recipe's filters keep: their indices, in increasing order.

    Args:
        networks: teacher and student.
        images: (N, C, H, W), normalised, on the device to compute on.
        settings: a recipe with a filter.
        seed: of the run.
        labels: (N,) int64, the class that each image was made for or came with; None if that is not known.
    """
    kept = torch.arange(len(images))
    for chosen in settings.filter.chain if settings.filter is not None else ():
        if chosen.keep < len(kept):
            of_these = images[kept.to(images.device)]
            groups = labels[kept] if labels is not None and chosen.balanced else torch.zeros_like(kept)
            index = _kept(networks, of_these, groups.to(images.device), settings, chosen, seed)
            kept = kept[index.sort().values.cpu()]
    return kept


def _kept(
    networks: Networks, images: Tensor, groups: Tensor, settings: Recipe, chosen: Filter, seed: int
) -> Tensor:
    """Indices of `chosen.keep` of more images; where single images count, the same share of every group."""
    graph, keep = networks.graph, chosen.keep
    if chosen.method == "random":
        return torch.randperm(len(images), generator=rng_for(seed, "filter"))[:keep]
    if chosen.method == "gradient_cover":  # by a student that rounds to nearest, calibrated on all images
        student = copy.deepcopy(networks.student)
        learn(networks, student, images, settings, None, seed, {}, silent)
        return cover(_probe(networks, student, chosen.gradients), images, keep)
    if chosen.method == "bn_sensitivity":
        return least_sensitive(norm_sums(observe(graph), images), groups, keep)
    if chosen.method == "energy":
        return lowest(energy(logits_of(graph, images)), groups, keep)
    return lowest(-mean_patch_entropy(graph, images), groups, keep)


def check_shaping(graph: fx.GraphModule, settings: Recipe) -> None:
    """Refuse a refinement of images that nothing synthesised, or a filter that the model cannot serve.

    Raises:
        UsageError: so.
    """
    for chosen in settings.filter.chain if settings.filter is not None else ():
        if chosen.method == "bn_sensitivity":
            observe(graph)
        elif chosen.method == "patch_entropy":
            patch_nodes(graph.graph)
        elif chosen.method == "energy" and not gives_logits(graph.graph):
            raise UsageError(
                "The filter energy needs a classifier (outputs of shape (N, K)), and this model is none. "
                "Choose another, such as bn_sensitivity."
            )
    if settings.refinement is not None and not isinstance(settings.synthesis, Synthesis):
        raise UsageError(
            f"The recipe {settings.name!r} refines images, which needs the generators that made them, but "
            f"its images are {type(settings.synthesis).__name__}. Give refinement=None, or synthesise."
        )


def _probe(networks: Networks, student: fx.GraphModule, scope: Scope) -> Probe:
    return gradient_probe(networks.original, student, networks.units, scope)


def _short_student(
    networks: Networks,
    images: Tensor,
    settings: Recipe,
    refinement: Refinement,
    seed: int,
    state: State,
    report: Callback,
) -> fx.GraphModule:
    learning = settings.reconstruction
    if learning is not None:
        steps, rate = refinement.warmup_steps, refinement.warmup_lr_rounding
        learning = replace(learning, steps=steps, lr_rounding=rate)
    student = copy.deepcopy(networks.student)
    finished, seed = Prefixed(state, "warmup-"), derived_seed(seed, "warmup")
    learn(networks, student, images, settings, learning, seed, finished, report, stage="warm-up")
    return student
