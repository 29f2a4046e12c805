"""Prompts of text-to-image sources: which classes each image shows and in which words, from a seed alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from zsq.errors import UsageError
from zsq.paths import user_path
from zsq.rng import rng_for

ADJECTIVES = "good,bad,large,small,clean,dirty,bright,dark,blurry,cropped,weird,cool"
Mixing = Literal["prompt", "embeddings", "mixup", "cutmix"]


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """Images that a text-to-image pipeline of diffusers paints of the model's classes.

    Attributes:
        num_images: how many.
        pipeline: a name on the Hugging Face hub, or a folder that `save_pretrained` wrote; its weights must
            be safetensors.
        class_names: file with the classes in the model's order: one a line, a definition after a tab if
            there is one; or JSON, a list of names or {"0": name}. "": those that come with the model.
        classes_per_prompt: K, different classes in one prompt.
        template: of the prompt; {classes} becomes "a kite and a small owl".
        adjectives: between commas; each class gets one of them at random; "" for none.
        definitions: put the definition behind each name, against names of several meanings.
        avoid_similar: of all pairs of classes, the share that is most similar to the model (cosine of the
            rows of its last linear layer) and never shares a prompt: near-synonyms.
        mixing: of the classes of an image, for K > 1: "prompt": in the text; "embeddings": a weighted mean
            of the text embeddings of one prompt a class; for K = 1 also "mixup" (weighted means) and "cutmix"
            (a rectangle) of pairs of finished images.
        weights: of "embeddings", "mixup" and "cutmix": "equal" or "random" (uniform over all that sum to 1).
        steps: of the sampler.
        guidance: scale of classifier-free guidance; lower is more diverse.
        scheduler: name of a scheduler class of diffusers; "" keeps that of the pipeline.
        size: pixels a side of the painted picture, before it is resized for the model; 0: the pipeline's own.
        batch_size: pictures at once; a batch is what an interrupted run repeats at most.
        precision: of the pipeline's weights.
        attempts: seeds that are tried for a picture that the pipeline's safety checker blanks.
    """

    num_images: int = 1024
    pipeline: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    class_names: str = ""
    classes_per_prompt: int = 1
    template: str = "A photo of {classes}"
    adjectives: str = ""
    definitions: bool = False
    avoid_similar: float = 0.0
    mixing: Mixing = "prompt"
    weights: Literal["equal", "random"] = "equal"
    steps: int = 50
    guidance: float = 3.5
    scheduler: str = ""
    size: int = 0
    batch_size: int = 4
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    attempts: int = 3

    def __post_init__(self) -> None:
        for name in ("num_images", "classes_per_prompt", "steps", "batch_size", "attempts"):
            if getattr(self, name) < 1:
                raise UsageError(f"synthesis.{name} is {getattr(self, name)}. Expected at least 1.")
        allowed = {"mixing": get_args(Mixing), "weights": ("equal", "random")}
        for name, values in {**allowed, "precision": ("float32", "float16", "bfloat16")}.items():
            if getattr(self, name) not in values:
                raise UsageError(
                    f"synthesis.{name} is {getattr(self, name)!r}. Expected one of {', '.join(values)}."
                )
        if "{classes}" not in self.template or _other_fields(self.template):
            raise UsageError(
                f"synthesis.template is {self.template!r}. Expected a text with {{classes}} in it and no "
                'other braces, such as "A photo of {classes}".'
            )
        if not 0 <= self.avoid_similar < 1:
            raise UsageError(f"synthesis.avoid_similar is {self.avoid_similar}. Expected a share below 1.")
        if self.mixing in ("mixup", "cutmix") and self.classes_per_prompt != 1:
            raise UsageError(
                f"synthesis.mixing={self.mixing} mixes finished images of one class each, and "
                f"synthesis.classes_per_prompt is {self.classes_per_prompt}. Expected 1."
            )


def _other_fields(template: str) -> bool:
    rest = template.replace("{classes}", "")
    return "{" in rest or "}" in rest


@dataclass(frozen=True)
class Prompt:
    """What one image is made from.

    Attributes:
        index: of the image.
        classes: what it is to show, in the order of the text.
        texts: one prompt; or for mixed embeddings one a class.
        weights: of the texts, with the sum 1.
    """

    index: int
    classes: tuple[int, ...]
    texts: tuple[str, ...]
    weights: tuple[float, ...]


def plan(
    settings: TextToImage,
    names: Sequence[str],
    seed: int,
    *,
    definitions: Sequence[str] = (),
    similarity: Tensor | None = None,
) -> list[Prompt]:
    """Prompts of all images; every class is shown equally often, but for one image (two, where classes wait).

    Classes are dealt out from random permutations, K a prompt; one that is too similar to a class already in
    the prompt waits for the next one (if all are, the first is taken).

    Args:
        settings: how.
        names: of the classes, K or more of them.
        seed: of the run.
        definitions: one a class, for `settings.definitions`.
        similarity: (classes, classes), symmetric; needed if `settings.avoid_similar` is above 0.

    Raises:
        UsageError: fewer classes than a prompt has, or no definitions.

    Source: mixup-class prompting (arXiv:2507.21947); wording and sampling are not published in full.
    """
    count = settings.classes_per_prompt
    if count > len(names):
        raise UsageError(
            f"synthesis.classes_per_prompt is {count}, but the model has {len(names)} classes. Expected at "
            "most as many."
        )
    if settings.definitions and len(definitions) != len(names):
        raise UsageError(
            "synthesis.definitions puts a definition behind each class, and there are none. Write them into "
            "the file of class names, behind a tab."
        )
    rng = rng_for(seed, "prompts")
    blocked = _most_similar(similarity, settings.avoid_similar)
    adjectives = [word.strip() for word in settings.adjectives.split(",") if word.strip()]
    waiting: list[int] = []
    prompts = []
    for index in range(settings.num_images):
        chosen: list[int] = []
        while len(chosen) < count:
            picked = _first_fitting(waiting, chosen, blocked)
            if picked is None:
                waiting += torch.randperm(len(names), generator=rng).tolist()
                picked = _first_fitting(waiting, chosen, blocked)
            if picked is None:
                picked = next(c for c in waiting if c not in chosen)
            chosen.append(picked)
            waiting.remove(picked)
        phrases = []
        for c in chosen:
            words = [adjectives[int(torch.randint(len(adjectives), (), generator=rng))]] if adjectives else []
            phrase = _with_article(" ".join([*words, names[c]]))
            phrases.append(f"{phrase}, {definitions[c]}" if settings.definitions else phrase)
        separate = settings.mixing == "embeddings"
        texts = phrases if separate else [_listed(phrases)]
        prompts.append(
            Prompt(
                index,
                tuple(chosen),
                tuple(settings.template.replace("{classes}", text) for text in texts),
                _weights(len(texts), settings.weights, rng),
            )
        )
    return prompts


def _first_fitting(
    waiting: Sequence[int], chosen: Sequence[int], blocked: set[tuple[int, int]]
) -> int | None:
    """The first class that is not in the prompt yet and not too similar to one that is."""
    for c in waiting:
        if c not in chosen and not any((min(c, d), max(c, d)) in blocked for d in chosen):
            return c
    return None


def _most_similar(similarity: Tensor | None, share: float) -> set[tuple[int, int]]:
    """The `share` of all pairs (a, b), a < b, with the highest similarity."""
    if similarity is None or share == 0:
        return set()
    rows, columns = torch.triu_indices(len(similarity), len(similarity), 1)
    order = similarity[rows, columns].argsort(descending=True, stable=True)[: int(share * len(rows))]
    return set(zip(rows[order].tolist(), columns[order].tolist(), strict=True))


def _with_article(phrase: str) -> str:
    vowel = phrase[:1].lower() in "aeiou" and not phrase.lower().startswith(("one", "uni", "eu", "u "))
    return f"{'an' if vowel else 'a'} {phrase}"


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _weights(count: int, kind: str, rng: torch.Generator) -> tuple[float, ...]:
    """Equal, or uniform over the simplex (normalised exponential variables)."""
    drawn = torch.ones(count) if kind == "equal" else -torch.rand(count, generator=rng).clamp(min=1e-9).log()
    return tuple((drawn / drawn.sum()).tolist())


def mixed(images: Tensor, settings: TextToImage, seed: int) -> Tensor:
    """Each image with another one: mixup or cutmix; as they are for other kinds of mixing.

    Partners follow one random cycle, so that none is its own. With w the weight of the image itself, mixup is
    w x + (1 - w) y; cutmix pastes a rectangle of y of the share 1 - w of the area, at a random place.

    Args:
        images: (N, C, H, W).
        settings: how.
        seed: of the run.

    Source: mixup (arXiv:1710.09412) and cutmix (arXiv:1905.04899), without labels.
    """
    if settings.mixing not in ("mixup", "cutmix") or len(images) < 2:
        return images
    rng = rng_for(seed, "mixing")
    order = torch.randperm(len(images), generator=rng)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    own = (
        torch.rand(len(images), generator=rng)
        if settings.weights == "random"
        else torch.full((len(images),), 0.5)
    )
    if settings.mixing == "mixup":
        share = own.view(-1, 1, 1, 1).to(images)
        return share * images + (1 - share) * images[partner]
    height, width = images.shape[2:]
    result = images.clone()
    for i, side in enumerate((1 - own).sqrt().tolist()):
        h, w = round(side * height), round(side * width)
        top, left = (int(torch.randint(n + 1, (), generator=rng)) for n in (height - h, width - w))
        result[i, :, top : top + h, left : left + w] = images[partner[i], :, top : top + h, left : left + w]
    return result


def read_class_names(path: str | Path) -> tuple[list[str], list[str]]:
    """Names and definitions (none if no class has one) from a file, see `TextToImage.class_names`.

    Raises:
        UsageError: the file is not there or not as expected.
    """
    try:
        text = user_path(path, "file of class names").read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The file of class names {path} cannot be read ({error}). Expected a text with one name a line, "
            "in the order of the model's classes."
        ) from error
    if Path(path).suffix.lower() == ".json":
        rows = [(name, "") for name in _from_json(text, path)]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        rows = [(name.strip(), rest.strip()) for name, _, rest in (line.partition("\t") for line in lines)]
    names = [name.replace("_", " ") for name, _ in rows]
    if not names or not all(names):
        raise UsageError(f"The file of class names {path} has classes without a name. Expected one a line.")
    definitions = [definition for _, definition in rows]
    return names, definitions if all(definitions) else []


def _from_json(text: str, path: str | Path) -> list[str]:
    try:
        value: Any = json.loads(text)
        if isinstance(value, dict):  # {"0": name}, or {"0": [WordNet id, name]}
            value = [value[str(i)] for i in range(len(value))]
        return [str(v[-1] if isinstance(v, list) else v) for v in value]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UsageError(
            f"The file of class names {path} is not as expected ({error}). Expected a list in JSON, or "
            '{"0": name}.'
        ) from error
