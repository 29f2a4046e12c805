"""Text-to-image sources in a run: names of the model's classes, the plan of prompts, pictures in batches."""

import hashlib
import json
import logging
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from zsq.account import Account
from zsq.distributed import spread
from zsq.errors import JobError, UsageError
from zsq.graph.nodes import activations, weight_node
from zsq.graph.tensors import get_tensor
from zsq.images.prompts import Prompt, TextToImage, mixed, plan, read_class_names
from zsq.images.text_to_image import estimate, imagenet_names, load_pipeline, paint
from zsq.models import Teacher
from zsq.pictures import mode_of, prepare
from zsq.progress import Progress
from zsq.recipe import Recipe
from zsq.state import State

logger = logging.getLogger(__name__)
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def prompts_of(graph: fx.GraphModule, teacher: Teacher, settings: TextToImage, seed: int) -> list[Prompt]:
    """The plan of a run.

    Raises:
        UsageError: the model is no classifier, or the names of its classes are not known.
    """
    mode_of(teacher.spec)
    names, definitions = class_names(teacher, settings)
    similarity = classifier_similarity(graph) if settings.avoid_similar > 0 else None
    return plan(settings, names, seed, definitions=definitions, similarity=similarity)


def class_names(teacher: Teacher, settings: TextToImage) -> tuple[list[str], list[str]]:
    """Names and, where there are any, definitions of the model's classes.

    Raises:
        UsageError: the model is no classifier; no names are known; or they are too many or too few.
    """
    if len(teacher.output_shape) != 1:
        raise UsageError(
            f"Prompts name the classes of a model, and {teacher.name} gives outputs of shape (N, "
            f"{', '.join(map(str, teacher.output_shape))}): it is no classifier. Give images with --images."
        )
    count = teacher.output_shape[0]
    if settings.class_names:
        names, definitions = read_class_names(settings.class_names)
    elif teacher.source.kind == "bundled":
        names, definitions = DIGITS, []
    elif teacher.source.kind == "timm" and count == 1000:
        names, definitions = imagenet_names(), []
    else:
        raise UsageError(
            f"Prompts need the names of the {count} classes of {teacher.name}. Write them into a file, one a "
            "line in the model's order, and give --set synthesis.class_names=FILE."
        )
    if len(names) != count:
        raise UsageError(
            f"There are {len(names)} class names, but {teacher.name} has {count} outputs. Expected one name "
            "a class, in the model's order."
        )
    return names, definitions


def classifier_similarity(graph: fx.GraphModule) -> Tensor:
    """Cosines between the rows of the last weight of a classifier: (K, K).

    Raises:
        UsageError: the last weighted layer does not give the logits.
    """
    nodes = [weight_node(n) for n in activations(graph.graph)]
    last = next((n for n in reversed(nodes) if n is not None), None)
    (returned,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
    weight = get_tensor(graph, str(last.target)).flatten(1) if last is not None else torch.empty(0, 0)
    classes = getattr(getattr(returned, "meta", {}).get("val"), "shape", (0,))[-1]
    if len(weight) != classes:
        raise UsageError(
            "synthesis.avoid_similar compares classes by the rows of the layer that gives the logits, and "
            "the last layer of this model is another. Set it to 0."
        )
    rows = F.normalize(weight.float(), dim=1)
    return (rows @ rows.T).cpu()


def text_images(
    prompts: list[Prompt],
    teacher: Teacher,
    settings: TextToImage,
    seed: int,
    device: torch.device,
    state: State,
    account: Account,
) -> Tensor:
    """The pictures of a plan: (N, C, H, W), normalised; N may be smaller where a safety checker blanked some.

    Args:
        prompts: from `prompts_of`.
        teacher: for its input.
        settings: how.
        seed: of the run.
        device: where to compute.
        state: finished batches; new ones are added.
        account: told of progress; its processes share the batches.

    Raises:
        UsageError: the pipeline cannot be loaded.
        JobError: it fails, or every picture was blanked.
    """
    batches = [prompts[k : k + settings.batch_size] for k in range(0, len(prompts), settings.batch_size)]
    names = text_names(settings)
    made = sum(len(batch) for name, batch in zip(names, batches, strict=True) if name in state)
    if made:
        account(Progress("synthesize", f"{made} pictures", made, len(prompts), {}, True))
    pipeline: Any = None
    if any(name not in state for name in names):
        pipeline = load_pipeline(settings, device)
        seconds, weights = estimate(pipeline, settings, prompts)
        logger.info(
            "%.2g pictures a second on %s: about %.0f minutes for the %d that are to be made; the pipeline's "
            "weights take %.1f GiB.",
            len(prompts) / seconds,
            device,
            seconds / 60 * (len(prompts) - made) / len(prompts),
            len(prompts) - made,
            weights / 2**30,
        )

    def make(index: int) -> dict[str, Tensor]:
        nonlocal made
        batch = batches[index]
        reader = partial(prepare, spec=teacher.spec)
        images, kept = paint(pipeline, settings, batch, seed=seed, prepare=reader)
        made += len(batch) * account.group.size
        account(
            Progress(
                "synthesize", f"batch {index + 1} of {len(batches)}", min(made, len(prompts)), len(prompts)
            )
        )
        return {"images": images, "index": torch.tensor([batch[k].index for k in kept], dtype=torch.int64)}

    spread(names, make, state, account.group)
    found = [state[name] for name in names]
    total = sum(len(piece["index"]) for piece in found)
    if total == 0:
        raise JobError(
            f"The safety checker of {settings.pipeline} blanked every picture. Choose other class names, a "
            "larger synthesis.attempts, or another pipeline."
        )
    if total < len(prompts):
        logger.warning(
            "%d pictures were blanked by the safety checker and are left out.", len(prompts) - total
        )
    return mixed(torch.cat([piece["images"] for piece in found if len(piece["index"])]), settings, seed)


def text_names(settings: TextToImage) -> list[str]:
    """Names of the finished batches of pictures in a run's state."""
    return [f"text-{index:05d}" for index in range(-(-settings.num_images // settings.batch_size))]


def prompt_records(prompts: list[Prompt], state: State) -> list[dict[str, Any]]:
    """The plan of the pictures that there are, in their order, for JSON."""
    there = sorted(int(k) for name in state if name.startswith("text-") for k in state[name]["index"])
    return [asdict(prompts[k]) for k in there]


def plan_identity(graph: fx.GraphModule, teacher: Teacher, settings: Recipe, seed: int) -> dict[str, str]:
    """What images depend on besides the settings: a hash of the prompts, which hold the content of a file."""
    source = settings.synthesis
    if not isinstance(source, TextToImage):
        return {}
    listed = [asdict(prompt) for prompt in prompts_of(graph, teacher, source, seed)]
    return {"prompts_sha256": hashlib.sha256(json.dumps(listed).encode()).hexdigest()}
