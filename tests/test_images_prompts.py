"""Plans of prompts: every class equally often, deterministic, without near-synonyms; mixing of images."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_networks import message

from zsq.images.prompts import Prompt, TextToImage, mixed, plan, read_class_names

NAMES = ["kite", "owl", "hamster", "apple", "one", "unicycle", "tench"]


def planned(count: int = 50, names: list[str] = NAMES, seed: int = 0, **options: object) -> list[Prompt]:
    return plan(TextToImage(num_images=count, **options), names, seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("per_prompt", [1, 2, 3, 7])
def test_every_class_equally_often(per_prompt: int) -> None:
    for count in (1, 7, 20, 50):
        prompts = planned(count, classes_per_prompt=per_prompt)
        assert [p.index for p in prompts] == list(range(count))
        assert all(len(set(p.classes)) == per_prompt for p in prompts)
        shown = Counter(c for p in prompts for c in p.classes)
        times = [shown[k] for k in range(len(NAMES))]
        assert max(times) - min(times) <= 1 and sum(times) == count * per_prompt


def test_a_plan_follows_from_its_seed() -> None:
    assert planned(seed=3) == planned(seed=3) != planned(seed=4)
    options = {"classes_per_prompt": 2, "adjectives": "small,large", "mixing": "embeddings"}
    assert planned(**options, weights="random") == planned(**options, weights="random")


def test_words() -> None:
    texts = {p.classes: p.texts for p in planned(7)}
    assert texts[(0,)] == ("A photo of a kite",) and texts[(1,)] == ("A photo of an owl",)
    assert texts[(4,)] == ("A photo of a one",) and texts[(5,)] == ("A photo of a unicycle",)
    for p in planned(classes_per_prompt=3, template="{classes} in rain"):
        first, second, third = (("an " if k in (1, 3) else "a ") + NAMES[k] for k in p.classes)
        assert p.texts == (f"{first}, {second} and {third} in rain",) and p.weights == (1.0,)
    said = {word for p in planned(adjectives="small, old") for word in p.texts[0].split()}
    assert {"small", "old", "an"} <= said
    apart = planned(classes_per_prompt=2, mixing="embeddings", weights="random")
    assert all(len(p.texts) == 2 and sum(p.weights) == pytest.approx(1) for p in apart)
    assert len({p.weights for p in apart}) == len(apart)


def test_definitions(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("kite\ta bird of prey\ncrane\ta machine\n")
    names, definitions = read_class_names(file)
    settings = TextToImage(num_images=2, definitions=True)
    texts = {p.classes[0]: p.texts[0] for p in plan(settings, names, 0, definitions=definitions)}
    assert texts == {0: "A photo of a kite, a bird of prey", 1: "A photo of a crane, a machine"}
    assert "behind a tab" in message(lambda: plan(settings, names, 0))


def test_near_synonyms_do_not_meet() -> None:
    similarity = torch.eye(6)
    for a, b in ((0, 1), (2, 3), (4, 5)):
        similarity[a, b] = similarity[b, a] = 0.9
    settings = TextToImage(num_images=90, classes_per_prompt=2, avoid_similar=0.2)
    prompts = plan(settings, NAMES[:6], 0, similarity=similarity)
    assert not any({k // 2 for k in p.classes} == {p.classes[0] // 2} for p in prompts)
    together = planned(90, NAMES[:6], classes_per_prompt=2)
    assert any(p.classes[0] // 2 == p.classes[1] // 2 for p in together)
    shown = Counter(c for p in prompts for c in p.classes)
    assert max(shown.values()) - min(shown.values()) <= 2
    everything = TextToImage(num_images=9, classes_per_prompt=2, avoid_similar=0.999)
    assert len(plan(everything, NAMES[:2], 0, similarity=torch.ones(2, 2))) == 9  # no other way


def test_mixup_and_cutmix() -> None:
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 2, 8, 8)
    assert mixed(images, TextToImage(), 0) is images
    half = mixed(images, TextToImage(mixing="mixup"), 0)
    partners = (2 * half[:, 0, 0, 0] - torch.arange(5.0)).tolist()
    assert sorted(partners) == list(range(5)) and all(p != k for k, p in enumerate(partners))
    random = mixed(images, TextToImage(mixing="mixup", weights="random"), 0)
    assert len(random[:, 0, 0, 0].unique()) == 5 and not torch.equal(random, half)
    cut = mixed(images, TextToImage(mixing="cutmix"), 0)
    for k, (image, partner) in enumerate(zip(cut[:, 0], partners, strict=True)):
        pasted = image == partner
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns[None]) and bool(((image == k) | pasted).all())
        assert int(rows.sum()) == int(columns.sum()) == 6  # sqrt(1 / 2) of 8


def test_files_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("great_white_shark\n\n tench \n")
    assert read_class_names(tmp_path / "a.txt") == (["great white shark", "tench"], [])
    (tmp_path / "a.json").write_text('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}')
    assert read_class_names(tmp_path / "a.json")[0] == ["tench", "goldfish"]
    (tmp_path / "b.json").write_text('["tench", "goldfish"]')
    assert read_class_names(tmp_path / "b.json")[0] == ["tench", "goldfish"]
    for name, content in {
        "c.json": '{"1": "tench"}',
        "d.json": "{",
        "e.txt": "\n",
        "f.json": '["a", ""]',
    }.items():
        (tmp_path / name).write_text(content)
        assert name in message(lambda name=name: read_class_names(tmp_path / name))  # type: ignore[misc]
    assert "cannot be read" in message(lambda: read_class_names(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"template": "A photo"},
        {"template": "{classes} {style}"},
        {"num_images": 0},
        {"mixing": "paste"},
        {"mixing": "mixup", "classes_per_prompt": 2},
        {"precision": "int8"},
        {"avoid_similar": 1.0},
    ],
)
def test_wrong_settings(wrong: dict[str, object]) -> None:
    text = message(lambda: TextToImage(**wrong))  # type: ignore[arg-type]
    assert f"synthesis.{next(iter(wrong))}" in text and "Expected" in text


def test_more_classes_than_there_are() -> None:
    assert "at most as many" in message(lambda: planned(classes_per_prompt=8))
