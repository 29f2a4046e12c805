"""The whole job: one seed one result, interrupted anywhere and continued, refused without a trace."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import SIZE, Residual, Tokens, images, teacher
from tiny_networks import message
from torch import nn

import zsq
import zsq.run as run_module
import zsq.state as state_module
from zsq.errors import JobError
from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images
from zsq.progress import Progress
from zsq.recipe_images import Batches
from zsq.run import load_run
from zsq.student import student_to_bytes

TINY: dict[str, Any] = {
    "synthesis.num_images": 20,
    "synthesis.batch_size": 10,
    "synthesis.steps": 4,
    "synthesis.latent_size": 8,
    "num_holdout": 8,
    "reconstruction.steps": 4,
    "reconstruction.batch_size": 8,
}


def tiny(model: Teacher, **options: Any) -> zsq.Run:
    arguments: dict[str, Any] = {"recipe": "genie", "bits": "W3A3", "overrides": TINY, "seed": 3}
    return quantize(model, **{**arguments, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


RESULTS = ("student.safetensors", "images.safetensors", "images.png", "inspection.json")


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


@pytest.fixture(scope="module")
def undisturbed(model: Teacher, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    tiny(model, out=folder)
    return contents(folder)


# ---- the result


def test_run_folder_and_record(model: Teacher, tmp_path: Path) -> None:
    before = model.sha256
    events: list[Progress] = []
    run = tiny(model, out=tmp_path / "run", progress=events.append, command="zsq quantize tiny")
    assert model.sha256 == before
    assert sorted(contents(tmp_path / "run")) == [
        "images.png",
        "images.safetensors",
        "inspection.json",
        "metrics.jsonl",
        "run.json",
        "student.safetensors",
    ]
    assert not (tmp_path / "run" / "state").exists()
    again = load_run(tmp_path / "run")
    x = images(6)
    assert torch.equal(again.student(x), run.student(x)) and torch.equal(again.images, run.images)
    assert again.record == run.record and again.metrics == run.metrics
    record = run.record
    assert (record["status"], record["command"], record["seed"]) == ("done", "zsq quantize tiny", 3)
    assert record["bits"] == "W3A3" and record["recipe"]["synthesis"]["steps"] == 4
    assert record["model"]["sha256"] == before and record["overrides"] == TINY
    results = record["results"]
    assert results["measured"] == {}
    estimates = results["estimated_without_data"]
    assert "not accuracy" in estimates["note"]
    assert estimates["holdout"]["num_images"] == 8 and estimates["calibration_images"]["num_images"] == 20
    assert list(estimates["unit_snr"]) == [unit["name"] for unit in results["units"]]
    assert results["size"]["student_bytes"] == len((tmp_path / "run" / "student.safetensors").read_bytes())
    assert set(record["timings"]) == {
        "capture",
        "synthesize",
        "quantize",
        "reconstruct",
        "holdout",
        "inspect",
    }
    assert "accuracy" not in json.dumps(record).replace("not accuracy", "")
    for stage in ("synthesize", "reconstruct"):
        seen = [event for event in events if event.stage == stage]
        assert seen and all(0 < event.done <= event.total for event in seen)
    assert len(run.metrics) == sum(bool(event.values) for event in events)


def test_same_seed_same_bits_another_seed_others(
    model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    tiny(model, out=tmp_path / "same")
    tiny(model, out=tmp_path / "other", seed=4)
    same, other = contents(tmp_path / "same"), contents(tmp_path / "other")
    for name in RESULTS:
        assert same[name] == undisturbed[name] != other[name]
    first, second = (json.loads(files["run.json"]) for files in (same, undisturbed))
    for record in (first, second):
        record.pop("timings")
    assert first == second
    assert same["metrics.jsonl"] == undisturbed["metrics.jsonl"]


def test_bit_placement_is_in_the_record(model: Teacher) -> None:
    """Section (f), test 17; the placement itself has its own tests."""
    bits = tiny(model, bits="W2A3").record["results"]["bits"]
    assert list(bits["weights"].values()) == [8, 2, 2, 2, 2, 2, 8]
    # input of block1 (also its shortcut), inside it, input of block2, inside it, input of fc
    assert list(bits["activations"].values()) == [8, 3, 3, 3, 8]
    assert tiny(model, bits="W2").record["results"]["bits"]["activations"] == {}


def test_eight_bits_keep_the_outputs(model: Teacher) -> None:
    """Section (f), test 20: a smoke test for wiring errors."""
    # Adam's first steps are as large as the learning rate, and so would be those of tiny 8-bit scales.
    run = tiny(model, bits="W8A8", overrides={**TINY, "reconstruction.lr_weight_scale": 0.0})
    x = run.images
    with torch.no_grad():
        wanted, got = model.module(x), run.student(x)
    assert float((wanted - got).square().sum() / wanted.square().sum()) < 1e-3
    assert bool((wanted.argmax(1) == got.argmax(1)).float().mean() > 0.9)


def test_folding_batch_norm(model: Teacher) -> None:
    run = tiny(model, overrides={**TINY, "fold_batch_norm": True}, bits="W8A8")
    assert not any(node.target is torch.ops.aten.batch_norm.default for node in run.student.graph.nodes)
    assert run.record["results"]["estimated_without_data"]["holdout"]["snr"] > 20


def test_given_images_replace_synthesis(model: Teacher) -> None:
    given = images(12).double()
    run = tiny(model, images=given)
    assert torch.equal(run.images.sort(0).values, given.float().sort(0).values)
    assert run.record["recipe"]["synthesis"] == {"kind": "GivenImages", "num_images": 0}
    assert "holdout" not in run.record["results"]["estimated_without_data"]
    few = quantize(model, recipe="given-nearest", images=given, overrides={"synthesis.num_images": 5})
    assert few.images.shape == (5, *SIZE)
    rows = {tuple(row.flatten().tolist()) for row in given.float()}
    assert all(tuple(row.flatten().tolist()) in rows for row in few.images)


def test_networks_without_batch_norm_take_given_images_or_noise(tmp_path: Path) -> None:
    model = teacher(Tokens)
    assert tiny(model, images=images(12)).images.shape == (12, *SIZE)
    out = tmp_path / "run"
    assert "BatchNorm" in message(lambda: tiny(model, out=out)) and not out.exists()
    assert "BatchNorm" in message(lambda: synthesize_images(model, out=out)) and not out.exists()
    quantize(model, recipe="noise-nearest", overrides={"synthesis.num_images": 8})


def test_images_made_before_give_the_same_result(model: Teacher, undisturbed: dict[str, bytes]) -> None:
    made: Batches = {}
    found = synthesize_images(model, recipe="genie", overrides=TINY, seed=3, made=made)
    assert list(made) == ["synthesis-000", "synthesis-001"]
    assert torch.equal(torch.cat([piece["images"] for piece in made.values()]), found)
    assert student_to_bytes(tiny(model, made=made).student) == undisturbed["student.safetensors"]
    assert all("latents" in piece for piece in made.values())
    del made["synthesis-001"]
    assert "The images made before" in message(lambda: tiny(model, made=made))


# ---- wrong calls write nothing


def test_wrong_calls_leave_nothing_behind(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"recipe": "genei"}, "There is no recipe 'genei'"),
        ({"bits": "4"}, "Bits must look like W4A4"),
        ({"bits": "W9A4"}, "between 2 and 8"),
        ({"ends": "float"}, "ends must be one of"),
        ({"budget": "fast"}, "The budget must be one of"),
        ({"overrides": {"steps": 3}}, "There is no setting 'steps'"),
        ({"recipe": "given"}, "needs images"),
        ({"images": images(4)[:, :, :5]}, "The given images have shape (4, 3, 5, 8)"),
        ({"images": images(4)[0]}, "The given images have shape (3, 8, 8)"),
        ({"images": images(0)}, "The given images have shape (0, 3, 8, 8)"),
        ({"images": images(4) / 0}, "NaN"),
        ({"images": torch.zeros(4, *SIZE, dtype=torch.uint8)}, "uint8"),
        ({"device": "gpu"}, "The device 'gpu' is unknown"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "no CUDA device")]),
    ]
    for options, text in wrong:
        call = {"overrides": None, **options} if "recipe" in options else options
        assert text in message(lambda call=call: tiny(model, out=out, **call))  # type: ignore[misc]
        assert not out.exists()
    assert "makes no images" in message(lambda: synthesize_images(model, recipe="given", out=out))
    assert "unknown" in message(lambda: synthesize_images(model, out=out, device="gpu"))
    plain = Teacher(nn.Sequential(nn.ReLU(), nn.Flatten()), input_size=SIZE, mean=(0,) * 3, std=(1,) * 3)
    assert "nothing to quantize" in message(lambda: quantize(plain, recipe="noise-nearest", out=out))
    assert not out.exists()


def test_a_student_of_nan_is_a_job_error(model: Teacher) -> None:
    with pytest.raises(JobError, match="NaN or infinity"):
        tiny(model, overrides={**TINY, "reconstruction.lr_weight_scale": 1e38})


# ---- interrupted and continued


class Killer:
    """Raises KeyboardInterrupt at one of the events of progress, of what is not taken over."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, progress: Progress) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= not progress.resumed


def test_interrupted_at_any_event_and_continued(
    model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    events: list[Progress] = []
    tiny(model, out=tmp_path / "count", progress=events.append)
    holdout = [i for i, e in enumerate(events) if e.stage == "holdout"]
    batches = [i for i, e in enumerate(events) if e.stage == "synthesize"]
    units = [i for i, e in enumerate(events) if e.stage == "reconstruct"]
    assert (
        holdout and len({events[i].item for i in batches}) == 2 and len({events[i].item for i in units}) == 4
    )
    # In the middle of both batches, at the start, in the middle and at the end of units, in the holdout.
    chosen = sorted({0, batches[2], batches[-1], *units[2::6], units[-1], holdout[1], holdout[-1]})
    for at in chosen:
        out = tmp_path / f"run-{at}"
        with pytest.raises(KeyboardInterrupt):
            tiny(model, out=out, progress=Killer(at))
        assert json.loads((out / "run.json").read_text())["status"] == "running"
        assert "is not finished" in message(lambda out=out: load_run(out))  # type: ignore[misc]
        seen: list[Progress] = []
        tiny(model, out=out, progress=seen.append)
        after = contents(out)
        assert set(after) == set(undisturbed)
        for name in RESULTS:
            assert after[name] == undisturbed[name], (at, name)
        first, second = json.loads(after["run.json"]), json.loads(undisturbed["run.json"])
        assert first["results"] == second["results"]
        if at > batches[-1]:  # finished batches are not made again
            made = [e for e in seen if e.stage == "synthesize"]
            assert len(made) == 2 and all(e.resumed and not e.values for e in made)


def test_interrupted_again_and_again(model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupted = 0
    while True:
        try:
            tiny(model, out=out, progress=Killer(9), force=True)  # the same call, --force included
            break
        except KeyboardInterrupt:
            interrupted += 1
            assert interrupted < 20
    assert interrupted > 2
    assert all(contents(out)[name] == undisturbed[name] for name in RESULTS)


def test_eight_bits_are_not_learned(model: Teacher) -> None:
    """At W8A8 units are calibrated only; with fewer bits somewhere they are learned."""
    for bits, learned in (("W8A8", False), ("W8", False), ("W8A4", True), ("W4A8", True)):
        steps: list[dict[str, float]] = []

        def watch(event: Progress, found: list[dict[str, float]] = steps) -> None:
            if event.stage == "reconstruct":
                found.append(event.values)

        tiny(model, bits=bits, progress=watch)
        assert any("loss" in values for values in steps) is learned


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_write(
    force: bool,
    model: Teacher,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also between the last files: before, during (a temporary file stays) and after every atomic write."""
    out = tmp_path / "run"
    if force:
        tiny(model, out=out, seed=5)
    original = run_module.write_atomic
    writes = {"left": 0}

    def write(path: Path, content: bytes) -> None:
        if writes["left"] == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f".{path.name}.a1b2c3d4").write_bytes(content[: len(content) // 2])
            raise KeyboardInterrupt
        writes["left"] -= 1
        original(path, content)

    for module in (run_module, state_module):
        monkeypatch.setattr(module, "write_atomic", write)
    # The record; eight pieces of state; then each of the six files that are left.
    for allowed in (0, 1, 2, 3, 2, 0, 1, 2, 3, 4, 5):
        writes["left"] = allowed
        with pytest.raises(KeyboardInterrupt):
            tiny(model, out=out, force=force)
    assert set(contents(out)) > set(undisturbed) - {"run.json"}  # all but the finished record
    writes["left"] = 6
    tiny(model, out=out, force=force)
    after = contents(out)
    assert set(after) == set(undisturbed)
    assert all(after[name] == undisturbed[name] for name in RESULTS)


def test_damaged_pieces_are_made_again(model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tiny(model, out=out, progress=Killer(24))
    pieces = sorted((out / "state").iterdir())
    assert {p.stem.split("-")[0] for p in pieces} == {"synthesis", "unit"}
    for number, piece in enumerate(pieces):
        content = bytearray(piece.read_bytes())
        if number % 2:
            content[len(content) // 2] ^= 0xFF
        else:
            del content[-20:]
        piece.write_bytes(bytes(content))
    tiny(model, out=out)
    assert all(contents(out)[name] == undisturbed[name] for name in RESULTS)


def interrupted_run(model: Teacher, out: Path, **options: Any) -> dict[str, bytes]:
    with pytest.raises(KeyboardInterrupt):
        tiny(model, out=out, progress=Killer(12), **options)
    return contents(out)


@pytest.mark.parametrize(
    ("options", "different"),
    [
        ({"seed": 4}, "seed"),
        ({"bits": "W4A4"}, "bits, recipe"),
        ({"overrides": {**TINY, "reconstruction.steps": 5}}, "recipe"),
        ({"images": images(4)}, "given_images_sha256, recipe"),
    ],
)
def test_another_call_on_an_unfinished_folder_is_refused(
    options: dict[str, Any], different: str, model: Teacher, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    before = interrupted_run(model, out, command="zsq quantize tiny --out run")
    text = message(lambda: tiny(model, out=out, **options))
    assert f"an unfinished run that differs in: {different}. Nothing was changed." in text
    assert "(zsq quantize tiny --out run)" in text
    assert contents(out) == before


def test_other_models_and_jobs_on_an_unfinished_folder(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = interrupted_run(model, out)
    assert "differs in: model." in message(lambda: tiny(teacher(Residual, seed=1), out=out))
    call: Callable[[], object] = lambda: synthesize_images(  # noqa: E731
        model, recipe="genie", budget="standard", overrides=TINY, seed=3, out=out
    )
    assert "differs in: job" in message(call)
    assert contents(out) == before
    tiny(model, out=out, seed=9, force=True)  # what the message offers
    assert load_run(out).record["seed"] == 9


def test_a_finished_folder_is_refused_without_force(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    tiny(model, out=out)
    before = contents(out)
    for seed in (3, 4):
        assert "exists and is not empty; nothing in it was changed" in message(
            lambda seed=seed: tiny(model, out=out, seed=seed)  # type: ignore[misc]
        )
    assert contents(out) == before
    tiny(model, out=out, seed=4, force=True)
    assert load_run(out).record["seed"] == 4


def test_force_refuses_a_folder_that_is_not_a_run(model: Teacher, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for force in (False, True):
        message(lambda force=force: tiny(model, out=tmp_path, force=force))  # type: ignore[misc]
    assert contents(tmp_path) == {"thesis.txt": b"years"}


def test_a_damaged_record_needs_force(model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupted_run(model, out)
    (out / "run.json").write_text("{")
    assert "cannot be read" in message(lambda: tiny(model, out=out))
    tiny(model, out=out, force=True)
    assert all(contents(out)[name] == undisturbed[name] for name in RESULTS)


def test_a_full_disk_keeps_what_was_finished(
    model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        original = os.replace
        calls = iter(range(100))
        patch.setattr(os, "replace", lambda a, b: original(a, b) if next(calls) < 4 else full())
        with pytest.raises(JobError, match="No space left on device"):
            tiny(model, out=out)
    assert len(list((out / "state").iterdir())) == 3
    tiny(model, out=out)
    assert all(contents(out)[name] == undisturbed[name] for name in RESULTS)


# ---- only the images


def test_synthesize_images(model: Teacher, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "images"
    arguments: dict[str, Any] = {"recipe": "genie", "overrides": TINY, "seed": 3, "out": out}
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(model, **arguments, progress=Killer(6))
    made = synthesize_images(model, **arguments)
    assert made.shape == (20, *SIZE) and made.device.type == "cpu"
    assert set(contents(out)) == {"images.safetensors", "images.png"}
    assert contents(out)["images.safetensors"] == undisturbed["images.safetensors"]
    assert "not empty" in message(lambda: synthesize_images(model, **arguments))
    again = synthesize_images(model, **arguments, force=True)  # its own folder may be replaced
    assert torch.equal(again, made)
    noise = synthesize_images(model, recipe="noise", overrides={"synthesis.num_images": 4})
    assert noise.shape == (4, *SIZE)


def test_outputs_without_classes(tmp_path: Path) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(self.bn(self.conv(x)).relu().mean((2, 3))).squeeze(1)
            return y

    model = Teacher(Single(), input_size=SIZE, mean=(0,) * 3, std=(1,) * 3)
    run = tiny(model, out=tmp_path / "run")
    assert "top1_agreement" not in run.record["results"]["estimated_without_data"]["holdout"]
    assert load_run(tmp_path / "run").student(images(3)).shape == (3,)
