"""The real pipeline class of diffusers with random weights: runs, resumes, blanked and missing pictures."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_networks import message
from typer.testing import CliRunner

import zsq
from zsq.cli import app
from zsq.errors import JobError
from zsq.images.prompts import Prompt, TextToImage
from zsq.images.text_to_image import load_pipeline, paint, without_broken_torchvision
from zsq.models import Teacher, load_model
from zsq.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers and transformers, about each other

SMALL: dict[str, Any] = {"synthesis.num_images": 7, "synthesis.steps": 2, "synthesis.batch_size": 3}
FAST = {"reconstruction.steps": 2, "calibration.num_images": 7}


@pytest.fixture(scope="session")
def folder(random_pipeline: Path) -> Path:
    return random_pipeline


@pytest.fixture(scope="module")
def digits() -> Teacher:
    return load_model("digits")


def overrides(folder: Path, **more: object) -> dict[str, Any]:
    return {**SMALL, **FAST, "synthesis.pipeline": str(folder), **more}


def test_a_run_and_its_plan(folder: Path, digits: Teacher, tmp_path: Path) -> None:
    events: list[Progress] = []
    call = dict(recipe="mixup_class", bits="W4A4", budget="quick", overrides=overrides(folder))
    run = zsq.quantize(digits, **call, out=tmp_path / "run", progress=events.append)  # type: ignore[arg-type]
    assert run.images.shape == (7, 1, 8, 8) and bool(run.images.isfinite().all())
    assert len(run.prompts) == 7 and all(len(p["classes"]) == 2 for p in run.prompts)
    again = zsq.load_run(tmp_path / "run")
    assert again.prompts == [
        {k: list(v) if isinstance(v, tuple) else v for k, v in p.items()} for p in run.prompts
    ]
    made = [e for e in events if e.stage == "synthesize"]
    assert made[-1].done == made[-1].total == 7
    assert torch.equal(zsq.quantize(digits, **call).images, run.images)  # type: ignore[arg-type]
    other = zsq.quantize(digits, **call, seed=1)  # type: ignore[arg-type]
    assert other.prompts != run.prompts and not torch.equal(other.images, run.images)


def test_stopped_and_gone_on(folder: Path, digits: Teacher, tmp_path: Path) -> None:
    """Stopped after the second batch of three: what is finished is not painted again, same bits."""
    call: dict[str, Any] = dict(recipe="mixup_class", overrides=overrides(folder))
    whole = zsq.synthesize_images(digits, **call)

    def stop(event: Progress) -> None:
        if event.done >= 6 and not event.resumed:
            raise KeyboardInterrupt

    out = tmp_path / "images"
    with pytest.raises(KeyboardInterrupt):
        zsq.synthesize_images(digits, **call, out=out, progress=stop)
    pieces = {p.name: p.read_bytes() for p in (out / "state").iterdir()}
    events: list[Progress] = []
    assert torch.equal(zsq.synthesize_images(digits, **call, out=out, progress=events.append), whole)
    assert len(pieces) == 1 and events[0].resumed and events[0].done == 3
    assert len((out / "prompts.jsonl").read_text().splitlines()) == 7


def test_filters_keep_the_classes(folder: Path, digits: Teacher) -> None:
    settings = overrides(folder, **{"synthesis.num_images": 20, "synthesis.batch_size": 10})
    chosen = {"filter.keep": 10, "filter.then.keep": 10}
    run = zsq.quantize(digits, recipe="genq", overrides=settings | chosen)
    assert len(run.images) == len(run.prompts) == 10
    assert sorted(p["classes"][0] for p in run.prompts) == list(range(10))


def test_mixed_embeddings(folder: Path, digits: Teacher) -> None:
    mixed, plain = (
        zsq.synthesize_images(digits, recipe="mixup_class", overrides=overrides(folder, **o))
        for o in ({"synthesis.mixing": "embeddings"}, {})
    )
    assert mixed.shape == plain.shape and not torch.equal(mixed, plain)


def test_embeddings_of_one_text_are_those_of_the_prompt(folder: Path) -> None:
    settings = TextToImage(pipeline=str(folder), steps=2)
    pipeline = load_pipeline(settings, torch.device("cpu"))
    prompts = [Prompt(0, (0,), ("A photo of a kite",), (1.0,)), Prompt(1, (1,), ("An owl",), (1.0,))]
    found = []
    for mixing in ("prompt", "embeddings"):
        one = TextToImage(pipeline=str(folder), steps=2, mixing=mixing)  # type: ignore[arg-type]
        found.append(paint(pipeline, one, prompts, seed=0, prepare=pixels)[0])
    torch.testing.assert_close(*found, atol=2.0, rtol=0)  # levels 0..255


def pixels(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(list(picture.convert("L").getdata()), dtype=torch.float32)


class Scripted:
    """Answers as pipelines do; `blank` says which calls' pictures the safety checker takes away."""

    def __init__(self, blank: list[set[int]], missing: int = 0, size: int = 5) -> None:
        self.blank, self.missing, self.size = blank, missing, size
        self.seeds: list[list[int]] = []

    def __call__(self, prompt: list[str], generator: list[torch.Generator], output_type: str) -> Any:
        self.seeds.append([g.initial_seed() for g in generator])
        pictures = [Image.new("L", (self.size, self.size), 7) for _ in prompt[self.missing :]]
        self.missing = 0
        flagged = self.blank.pop(0) if self.blank else set()
        return SimpleNamespace(
            images=pictures, nsfw_content_detected=[k in flagged for k in range(len(prompt))]
        )


PROMPTS = [Prompt(k, (k,), (str(k),), (1.0,)) for k in range(10, 14)]


def test_blanked_pictures_are_made_again() -> None:
    pipeline = Scripted([{1, 3}, {0}])
    images, kept = paint(pipeline, TextToImage(), PROMPTS, seed=0, prepare=pixels)
    assert kept == [0, 1, 2, 3] and images.shape == (4, 25)
    assert [len(s) for s in pipeline.seeds] == [4, 2, 1]
    assert len({s for seeds in pipeline.seeds for s in seeds}) == 7  # every attempt has its own


def test_pictures_that_stay_blank_are_left_out() -> None:
    pipeline = Scripted([{0, 2}, {0, 1}, {0}])
    images, kept = paint(pipeline, TextToImage(attempts=3), PROMPTS, seed=0, prepare=pixels)
    assert kept == [1, 2, 3] and len(images) == 3
    _, kept = paint(Scripted([{0, 1, 2, 3}]), TextToImage(attempts=1), PROMPTS, seed=0, prepare=pixels)
    assert kept == []


def test_fewer_pictures_than_prompts() -> None:
    _, kept = paint(Scripted([], missing=3), TextToImage(), PROMPTS, seed=0, prepare=pixels)
    assert kept == [0, 1, 2, 3]


def test_failing_pipeline() -> None:
    def fails(prompt: list[str]) -> Any:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(JobError, match=r"shapes do not fit.*What is finished is kept"):
        paint(fails, TextToImage(), PROMPTS, seed=0, prepare=pixels)


def test_pipelines_that_cannot_be_loaded(folder: Path, tmp_path: Path, digits: Teacher) -> None:
    out = tmp_path / "run"
    call: dict[str, Any] = dict(recipe="genq", out=out)
    text = message(
        lambda: zsq.quantize(digits, **call, overrides={**SMALL, "synthesis.pipeline": str(tmp_path)})
    )
    assert str(tmp_path) in text and "--set synthesis.pipeline=NAME" in text
    assert not out.exists()
    wrong = overrides(folder, **{"synthesis.scheduler": "NoScheduler"})
    assert "NoScheduler" in message(lambda: zsq.synthesize_images(digits, recipe="genq", overrides=wrong))
    other = overrides(folder, **{"synthesis.scheduler": "EulerDiscreteScheduler"})
    assert len(zsq.synthesize_images(digits, recipe="mixup_class", overrides=other)) == 7


def test_names_of_classes(digits: Teacher, tmp_path: Path) -> None:
    from image_networks import SIZE, Residual, trained

    file = tmp_path / "names.txt"
    file.write_text("a\nb\n")
    call = lambda t, **o: message(lambda: zsq.quantize(t, recipe="genq", overrides=o))  # noqa: E731
    assert "2 class names" in call(digits, **{"synthesis.class_names": str(file)})
    own = Teacher(trained(Residual()), input_size=SIZE)
    assert "synthesis.class_names=FILE" in call(own)
    assert "avoid_similar" not in call(own)


def test_missing_extra(monkeypatch: pytest.MonkeyPatch, digits: Teacher) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "zsq[diffusion]" in message(lambda: zsq.synthesize_images(digits, recipe="genq", overrides=SMALL))


def test_torchvision_is_back_afterwards() -> None:
    before = "torchvision" in sys.modules
    with without_broken_torchvision():
        pass
    assert ("torchvision" in sys.modules) >= before and sys.modules.get("torchvision", 1) is not None


def test_readme_commands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_readme import MODEL_FILE, README

    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("path/to/file.py").write_text(MODEL_FILE, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(MODEL_FILE, names)
    save_file(
        {k: v for k, v in names["factory"]().state_dict().items() if "num_batches" not in k}, "w.safetensors"
    )
    Path("names.txt").write_text("cat\ndog\n")
    text = next(b for b in README.read_text(encoding="utf-8").split("```") if "class_names=names.txt" in b)
    real = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(folder),
        "--device cuda": "",
        "224,224": "32,32",
    }
    for there, here in real.items():
        assert there in text
        text = text.replace(there, here)
    commands = [c for c in text.replace("\\\n", " ").splitlines() if c.startswith("zsq ")]
    assert len(commands) == 2
    settings = {"synthesize": [SMALL], "quantize": [FAST]}
    for command in commands:
        options = [f"--set {k}={v}" for s in settings[command.split()[1]] for k, v in s.items()]
        result = CliRunner().invoke(app, shlex.split(" ".join([command, *options]))[1:])
        assert result.exit_code == 0, result.output
    assert Path("images/prompts.jsonl").exists()
