"""Images that a text-to-image pipeline of diffusers paints from prompts."""

import importlib
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zsq.errors import JobError, UsageError, import_extra, one_line
from zsq.images.prompts import Prompt, TextToImage
from zsq.paths import user_path
from zsq.rng import derived_seed

Prepare = Callable[[Image.Image], Tensor]  # a picture -> (C, H, W), normalised


def load_pipeline(settings: TextToImage, device: torch.device) -> Any:
    """The pipeline that the settings name, on a device, without its own progress bar.

    Raises:
        UsageError: diffusers is not installed or not usable, nothing is there, or its weights are pickled.
    """
    with _diffusers(settings) as (diffusers, place):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            **place, dtype=getattr(torch, settings.precision), use_safetensors=True
        )
        if settings.scheduler:
            kind = getattr(diffusers, settings.scheduler)
            pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_pipeline(settings: TextToImage) -> None:
    """Refuse a pipeline that is not there, without loading its weights.

    Raises:
        UsageError: so.
    """
    with _diffusers(settings) as (diffusers, place):
        diffusers.DiffusionPipeline.load_config(**place)
        if settings.scheduler:
            getattr(diffusers, settings.scheduler)


@contextmanager
def _diffusers(settings: TextToImage) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The package, and where the pipeline is; what it raises becomes one paragraph."""
    path = user_path(settings.pipeline, "text-to-image pipeline")
    local = path.is_dir()
    place = {
        "pretrained_model_name_or_path": str(path) if local else settings.pipeline,
        "local_files_only": local,
    }
    with without_broken_torchvision():
        diffusers = import_extra("diffusers", "diffusion")
        for package in ("diffusers", "transformers"):  # what they load is none of the user's concern
            import_extra(f"{package}.utils.logging", "diffusion").disable_progress_bar()
        try:
            yield diffusers, place
        except AttributeError as error:
            raise UsageError(
                f"diffusers has no scheduler {settings.scheduler!r}. Expected the name of a class, such as "
                "DPMSolverMultistepScheduler."
            ) from error
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            summary = one_line(error, limit=300)
            raise UsageError(
                f"The text-to-image pipeline {settings.pipeline!r} cannot be loaded ({summary}). Expected a "
                "name on the Hugging Face hub with safetensors weights, or a folder that save_pretrained of "
                "a diffusers pipeline wrote; set it with --set synthesis.pipeline=NAME."
            ) from error


@contextmanager
def without_broken_torchvision() -> Iterator[None]:
    """Hide a torchvision whose compiled part does not fit the installed torch: text needs none of it.

    transformers imports torchvision if it is there, and fails with it; that it is not there is fine.
    """
    try:
        importlib.import_module("torchvision")
        hidden = False
    except ImportError:
        hidden = False
    except RuntimeError:
        hidden = True
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # importlib's way to say: not there
    try:
        yield
    finally:
        if hidden:
            del sys.modules["torchvision"]


def estimate(pipeline: Any, settings: TextToImage, prompts: Sequence[Prompt]) -> tuple[float, int]:
    """Seconds that all images take, and bytes of the pipeline's weights, before anything is made.

    One batch is made with one step of the sampler and one with two; the difference is what a step takes.
    """
    batch = list(prompts[: settings.batch_size])
    seconds = []
    for steps in (1, 1, 2):  # the first one warms up
        started = time.perf_counter()
        _call(pipeline, settings, batch, [0] * len(batch), steps=steps)
        seconds.append(time.perf_counter() - started)
    once = seconds[1] + max(0.0, seconds[2] - seconds[1]) * (settings.steps - 1)
    weights = sum(
        p.numel() * p.element_size()
        for part in pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for p in part.parameters()
    )
    return once * len(prompts) / len(batch), weights


def paint(
    pipeline: Any, settings: TextToImage, prompts: Sequence[Prompt], *, seed: int, prepare: Prepare
) -> tuple[Tensor, list[int]]:
    """Pictures of some prompts; each has a seed of its own, derived from its index.

    A picture that the safety checker blanks, or that the pipeline does not return, is made again with other
    seeds; what is still not there after `settings.attempts` is left out.

    Args:
        pipeline: from `load_pipeline`.
        settings: how.
        prompts: a batch of the plan.
        seed: of the run.
        prepare: makes of a picture what the model takes.

    Returns:
        images (n, C, H, W), and the positions in `prompts` of those that there are, n of them.

    Raises:
        JobError: the pipeline fails.
    """
    found: dict[int, Tensor] = {}
    for attempt in range(settings.attempts):
        missing = [k for k in range(len(prompts)) if k not in found]
        if not missing:
            break
        seeds = [derived_seed(seed, "text-to-image", prompts[k].index, attempt) for k in missing]
        try:
            pictures = _call(pipeline, settings, [prompts[k] for k in missing], seeds)
        except (RuntimeError, ValueError, TypeError) as error:
            summary = one_line(error, limit=300)
            raise JobError(
                f"The text-to-image pipeline failed ({summary}). Check synthesis.size, a smaller "
                "synthesis.batch_size, and that the pipeline takes prompts alone. What is finished is kept."
            ) from error
        found |= {k: prepare(picture) for k, picture in zip(missing, pictures, strict=True) if picture}
    kept = sorted(found)
    return torch.stack([found[k] for k in kept]) if kept else torch.empty(0), kept


def _call(
    pipeline: Any,
    settings: TextToImage,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
) -> list[Image.Image | None]:
    """One picture a prompt; None where the safety checker blanked it or the pipeline returned none."""
    wanted: dict[str, Any] = {
        "num_inference_steps": settings.steps if steps is None else steps,
        "guidance_scale": settings.guidance,
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
        "output_type": "pil",
        **({"height": settings.size, "width": settings.size} if settings.size else {}),
    }
    accepted = inspect.signature(pipeline.__call__).parameters
    options = {name: value for name, value in wanted.items() if name in accepted}
    if settings.mixing == "embeddings":
        options |= _embeddings(pipeline, settings, prompts)
    else:
        options["prompt"] = [p.texts[0] for p in prompts]
    with torch.no_grad():
        result = pipeline(**options)
    flags = getattr(result, "nsfw_content_detected", None) or []
    pictures: list[Image.Image | None] = list(result.images[: len(prompts)])
    pictures += [None] * (len(prompts) - len(pictures))
    return [None if k < len(flags) and flags[k] else picture for k, picture in enumerate(pictures)]


def _embeddings(pipeline: Any, settings: TextToImage, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Weighted means of the embeddings of each prompt's texts: (N, tokens, width) each."""
    texts = [text for p in prompts for text in p.texts]
    guided = settings.guidance > 1
    found = (
        pipeline.encode_prompt(texts, pipeline.device, 1, guided)
        if hasattr(pipeline, "encode_prompt")
        else ()
    )
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError("synthesis.mixing=embeddings needs a pipeline with one text encoder")
    conditional, unconditional = found
    weights = torch.tensor([p.weights for p in prompts]).to(conditional)
    each = conditional.view(len(prompts), -1, *conditional.shape[1:])
    options = {"prompt_embeds": torch.einsum("nk,nktd->ntd", weights, each)}
    if guided:
        options["negative_prompt_embeds"] = unconditional[: len(prompts)]
    return options


def imagenet_names() -> list[str]:
    """The 1000 classes of ImageNet-1k in their usual order, one name each, as timm has them.

    Raises:
        UsageError: timm is not installed or not usable.
    """
    import_extra("timm", "timm")
    info = importlib.import_module("timm.data").ImageNetInfo("imagenet-1k")
    return [info.index_to_description(k).split(",")[0] for k in range(info.num_classes())]
