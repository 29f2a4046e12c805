"""Benchmarks: the file, the rows, resuming, the statistics and the table."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import message

from zsq import bench_plan, bench_row
from zsq.architectures import network_from_file
from zsq.bench import run_bench
from zsq.bench_file import read_bench
from zsq.bench_table import (
    T_QUANTILES,
    NetworkResults,
    mean_and_deviation,
    paired_difference,
    summarise,
    to_markdown,
)
from zsq.errors import JobError
from zsq.images.settings import Synthesis
from zsq.pipeline import compose_recipe
from zsq.progress import Progress
from zsq.recipe import GivenImages

NETS = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6),
    )

def dense():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
"""
FILE = """
name = "small"
budget = "quick"
seeds = [0, 1]
bits = ["W4A4", "w8a8"]

[set]
num_holdout = 0
"synthesis.num_images" = 8
"synthesis.batch_size" = 8
synthesis.steps = 3
synthesis.latent_size = 8
"reconstruction.steps" = 4
"reconstruction.batch_size" = 4

[[networks]]
name = "tiny net"
model = "${BENCH_FILES}/nets.py:tiny"
weights = "${BENCH_FILES}/tiny.safetensors"
input_size = [3, 8, 8]
mean = [0.5, 0.5, 0.5]
std = [0.25, 0.25, 0.25]
data = "${BENCH_FILES}/test.npz"
images = "${BENCH_FILES}/train.npz"

[[recipes]]
name = "genie"

[[recipes]]
name = "given-nearest"
label = "real images"
images = true
set = { "synthesis.num_images" = 6 }
"""
Change = Callable[[str, str], Path]


def nothing(line: str) -> None:
    """No progress wanted."""


def write_files(folder: Path) -> None:
    (folder / "nets.py").write_text(NETS)
    (folder / "small.toml").write_text(FILE)
    torch.manual_seed(0)
    network = network_from_file(f"{folder}/nets.py:tiny")
    save_file(network.state_dict(), folder / "tiny.safetensors")
    random = np.random.default_rng(0)
    for name, count in (("test", 30), ("train", 12)):
        images = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(count, dtype=np.uint8) % 6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files and, in `out`, the finished benchmark; tests work on copies."""
    folder = tmp_path_factory.mktemp("bench")
    write_files(folder)
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_FILES", str(folder))
        assert run_bench(folder / "small.toml", out=folder / "out", progress=lines.append) == folder / "out"
    assert any("[8 of 8] tiny net, real images, W8A8, seed 1: top-1" in line for line in lines)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished benchmark."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.setenv("BENCH_FILES", str(copy))
    return copy


@pytest.fixture
def change(folder: Path) -> Change:
    """Replace a text in the benchmark file that occurs in it."""

    def replace(old: str, new: str) -> Path:
        path = folder / "small.toml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        return path

    return replace


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """Recipe, bits and seed of every run that is really made, and ("images", "", seed) of every synthesis."""
    calls: list[tuple[str, str, int]] = []
    quantize, synthesize = bench_row.quantize, bench_row.synthesize_images

    def counted(teacher: Any, **settings: Any) -> Any:
        recipe = settings["recipe"]
        calls.append((recipe.name, recipe.scheme.bits, settings["seed"]))
        return quantize(teacher, **settings)

    def counted_images(teacher: Any, **settings: Any) -> Any:
        calls.append(("images", "", settings["seed"]))
        return synthesize(teacher, **settings)

    monkeypatch.setattr(bench_row, "quantize", counted)
    monkeypatch.setattr(bench_row, "synthesize_images", counted_images)
    return calls


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out" / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_time(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("seconds", "finished")}


def again(folder: Path, **settings: Any) -> Path:
    return run_bench(folder / "small.toml", out=folder / "out", progress=nothing, **settings)


def test_every_combination_is_one_row(finished: Path) -> None:
    found = rows(finished)
    expected = [(r, b, s) for r in ("genie", "real images") for b in ("W4A4", "W8A8") for s in (0, 1)]
    assert [(row["recipe"], row["bits"], row["seed"]) for row in found] == expected
    for row in found:
        assert row["num_images"] == row["float"]["num_images"] == 30
        assert 0 <= row["top1"] <= row["top5"] <= 100
        assert row["agreement"]["on"] == "calibration_images"
        assert {"reconstruct", "synthesize", "evaluate"} <= row["seconds"].keys()
        assert {"torch", "zsq"} <= row["versions"].keys()
    assert len({row["key"] for row in found}) == 8
    assert len({row["settings_sha256"] for row in found}) == 4  # recipe x bits
    made = list((finished / "out" / "images").glob("*.safetensors"))
    assert len(made) == 2  # one set a seed, for all bits
    assert not (finished / "out" / "work").exists()


def test_a_finished_benchmark_computes_nothing(folder: Path, done: list[Any]) -> None:
    lines: list[str] = []
    before = (folder / "out" / "rows.jsonl").read_bytes()
    run_bench(folder / "small.toml", out=folder / "out", progress=lines.append)
    assert done == [] and lines == ["small: 8 rows, 8 of them finished before"]
    assert (folder / "out" / "rows.jsonl").read_bytes() == before


def test_only_missing_rows_are_done(folder: Path, done: list[Any]) -> None:
    path = folder / "out" / "rows.jsonl"
    kept = path.read_text().splitlines()
    path.write_text("\n".join([*kept[:1], *kept[2:]]) + '\n{"damaged')
    again(folder)
    assert done == [("genie", "W4A4", 1)]
    new = json.loads(path.read_text().splitlines()[-1])
    assert without_time(new) == without_time(json.loads(kept[1]))


def test_what_changed_is_done_again(folder: Path, change: Change, done: list[Any]) -> None:
    change('set = { "synthesis.num_images" = 6 }', 'set = { "synthesis.num_images" = 5 }')
    change("seeds = [0, 1]", "seeds = [0]")
    change('"w8a8"', '"W2A4"')
    again(folder)
    assert done == [
        ("genie", "W2A4", 0),  # with the images of before
        ("given-nearest", "W4A4", 0),
        ("given-nearest", "W2A4", 0),
    ]
    done.clear()
    change("synthesis.steps = 3", "synthesis.steps = 2")
    again(folder)
    assert done == [("images", "", 0), ("genie", "W4A4", 0), ("genie", "W2A4", 0)]


def test_diagnostics_are_asked_for_later(folder: Path, change: Change, done: list[Any]) -> None:
    change('budget = "quick"', 'budget = "quick"\ndiagnostics = 3')
    change("seeds = [0, 1]", "seeds = [0]")
    again(folder)
    assert len(done) == 4 and ("images", "", 0) not in done
    assert all(row["diagnostics"]["others"]["num_images"] == 3 for row in rows(folder)[-4:])
    cells = json.loads((folder / "out/results.json").read_text())["networks"][0]["cells"]
    assert cells[0]["diagnostics"]["sharpness"] == rows(folder)[-4]["diagnostics"]["others"]["sharpness"]
    assert "Diagnostics of the student" in (folder / "out/table.md").read_text()
    done.clear()
    again(folder)
    assert done == []


def test_other_data_is_another_row(folder: Path, change: Change, done: list[Any]) -> None:
    shutil.copy(folder / "train.npz", folder / "test.npz")
    change("seeds = [0, 1]", "seeds = [0]")
    change('["W4A4", "w8a8"]', '["W4A4"]')
    again(folder)
    assert done == [("genie", "W4A4", 0), ("given-nearest", "W4A4", 0)]
    assert rows(folder)[-1]["float"]["num_images"] == 12
    assert "on 12 images" in (folder / "out" / "table.md").read_text()


def test_an_interrupted_row_goes_on(folder: Path, change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = rows(folder)[0]
    shutil.rmtree(folder / "out")
    change("seeds = [0, 1]", "seeds = [0]")
    change('["W4A4", "w8a8"]', '["W4A4"]')

    def stop(say: Any, title: str) -> Callable[[Progress], None]:
        def progress(event: Progress) -> None:
            if event.stage == "reconstruct" and event.done > 4:  # in the second unit
                raise KeyboardInterrupt

        return progress

    with monkeypatch.context() as patch:
        patch.setattr(bench_row, "_rarely", stop)
        with pytest.raises(KeyboardInterrupt):
            again(folder)
    pieces = [path.name for path in (folder / "out" / "work").glob("*/state/*")]
    assert len(pieces) == 1 and rows(folder) == []
    again(folder)
    row = rows(folder)[0]
    for key in ("top1", "top5", "agreement", "key"):
        assert row[key] == undisturbed[key]
    assert row["seconds"]["reconstruct"] is None and row["seconds"]["synthesize"] > 0


def test_recipes_that_refine_share_images_with_others(folder: Path, change: Change, done: list[Any]) -> None:
    """Images are made once for all bits and recipes; refined ones depend on bits and are made in the run."""
    settings = '{ "refinement.steps" = 2, "refinement.warmup_steps" = 2 }'
    old = [row for row in rows(folder) if row["recipe"] == "genie" and row["bits"] == "W4A4"]
    change('[[recipes]]\nname = "genie"\n', f'[[recipes]]\nname = "sadag"\nset = {settings}\n')
    change('["W4A4", "w8a8"]', '["W4A4", "W2A2"]')
    again(folder)
    images = [("images", "", 0), ("images", "", 1)]  # made again: genie's rows had kept no generators
    sadag = [("sadag", bits, seed) for bits in ("W4A4", "W2A2") for seed in (0, 1)]
    first = [call for call in done if call[0] in ("images", "sadag")]
    assert first == [images[0], sadag[0], images[1], *sadag[1:]]
    assert len(list((folder / "out" / "images").glob("*.sources.safetensors"))) == 2
    seconds = [row["seconds"] for row in rows(folder) if row["recipe"] == "sadag"]
    assert all({"synthesize", "refine", "reconstruct"} <= found.keys() for found in seconds)
    done.clear()
    before = {row["key"] for row in rows(folder)}
    change('name = "sadag"', 'name = "genie"')
    change(f"set = {settings}\n", "")
    again(folder)  # the genie of before, with the images of now
    assert done == [("genie", "W2A2", 0), ("genie", "W2A2", 1)]
    assert {row["key"] for row in old} <= before


def test_a_failed_row_is_told_and_others_are_done(
    folder: Path, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(folder / "out")
    change("seeds = [0, 1]", "seeds = [0]")
    change('["W4A4", "w8a8"]', '["W8A8"]')

    def diverge(*args: Any, **settings: Any) -> Any:
        raise JobError("The synthesis of images diverged.")

    with monkeypatch.context() as patch:
        patch.setattr(bench_row, "synthesize_images", diverge)
        with pytest.raises(JobError, match="1 of 2 rows failed"):
            again(folder)
    text = (folder / "out" / "table.md").read_text()
    assert "| genie | failed |" in text and "seed 0: The synthesis of images diverged." in text
    assert [row["recipe"] for row in rows(folder)] == ["real images"]
    again(folder)
    assert "| failed |" not in (folder / "out" / "table.md").read_text()


def test_table_in_markdown_and_json(folder: Path) -> None:
    copy = folder / "results" / "small.md"
    again(folder, write=copy)
    summary = json.loads((folder / "out" / "results.json").read_text())
    text = (folder / "out" / "table.md").read_text()
    assert copy.read_text() == text
    assert summary["command"].startswith("zsq bench ") and f"--write {copy}" in summary["command"]
    assert f"    {summary['command']}" in text.splitlines()
    network = summary["networks"][0]
    values = [row["top1"] for row in rows(folder)[:2]]
    assert network["cells"][0]["mean"] == pytest.approx(sum(values) / 2)
    assert network["cells"][0]["top1"] == {"0": values[0], "1": values[1]}
    assert [(c["recipe"], c["bits"]) for c in network["cells"]] == [
        *(("genie", bits) for bits in ("W4A4", "W8A8")),
        *(("real images", bits) for bits in ("W4A4", "W8A8")),
    ]
    top1 = rows(folder)[0]["float"]["top1"]
    assert f"## tiny net: float {top1:.2f} % (top-5 " in text and "on 30 images" in text
    assert "| recipe | W4A4 | W8A8 |" in text and "[95 % t-interval]" in text
    assert "budget quick, ends 8bit, seeds 0 1, device cpu, num_holdout 0" in text
    assert "data ${BENCH_FILES}/test.npz" in text and str(folder / "test.npz") not in text
    assert set(network["seconds"]) == {"genie", "real images"}
    copy.write_text("my notes")
    assert "was not written by `zsq bench`" in message(lambda: again(folder, write=copy))
    assert copy.read_text() == "my notes"


def test_missing_cells_and_numbers_of_seeds() -> None:
    row = {
        "versions": {"zsq": "1"},
        "machine": "abacus, 2 cores",
        "finished": "2026-01-02T03:04:05+00:00",
        "seconds": {"synthesize": 2.0, "reconstruct": None},
    }
    tops = {("a", "W4A4", 0): 60.0, ("a", "W4A4", 1): 62.0, ("b", "W4A4", 1): 61.0}
    network = NetworkResults(
        name="net",
        settings={"model": "m"},
        recipes=["a", "b"],
        bits=["W4A4", "W2A2"],
        seeds=[0, 1],
        float_accuracy={"top1": 70.0, "top5": None, "num_images": 5},
        rows={cell: {**row, "top1": top1} for cell, top1 in tops.items()},
    )
    header = {"name": "x", "command": "zsq bench x.toml", "settings": {"seeds": [0, 1]}, "recipes": {}}
    text = to_markdown(json.loads(json.dumps(summarise(header, [network]))))
    assert "## net: float 70.00 % on 5 images" in text
    assert "| a | 61.00 ± 1.41 | – |\n| b | 61.00 (n=1) | – |" in text  # deviation: sqrt(2)
    assert "| b | −1.00 | – |" in text  # seed 1 alone: 61 - 62
    assert "| a | 2.0 | 2.0 |" in text  # the interrupted stage is left out
    assert "Machine: abacus, 2 cores" in text and "Last row: 2026-01-02 (UTC)" in text


def test_nothing_finished_yet() -> None:
    network = NetworkResults(
        name="net", settings={}, recipes=["a"], bits=["W4"], seeds=[0], float_accuracy=None, rows={}
    )
    header = {"name": "x", "command": "zsq bench x.toml", "settings": {}, "recipes": {}}
    text = to_markdown(summarise(header, [network]))
    assert "float not evaluated yet" in text and "| a | – |" in text and "* Last row: – (UTC)" in text


def test_statistics_by_hand() -> None:
    # mean (1 + 2 + 6) / 3 = 3; squares 4 + 1 + 9 = 14, divided by 2
    assert mean_and_deviation([1, 2, 6]) == (3, pytest.approx(math.sqrt(7)))
    assert mean_and_deviation([5]) == (5, None)
    with pytest.raises(ValueError):
        mean_and_deviation([])
    # differences 1, 2, 6 over the seeds 0, 1, 2; half-width t(0.975, 2) sqrt(7) / sqrt(3) = 6.5727
    found = paired_difference({0: 2, 1: 4, 2: 9, 7: 100}, {0: 1, 1: 2, 2: 3, 8: 5})
    half = 4.303 * math.sqrt(7 / 3)
    assert half == pytest.approx(6.573, abs=1e-3)
    assert found == {"mean": 3, "low": pytest.approx(3 - half), "high": pytest.approx(3 + half), "n": 3}
    assert paired_difference({0: 2}, {0: 1}) == {"mean": 1, "low": None, "high": None, "n": 1}
    assert paired_difference({0: 2}, {1: 1}) is None


def test_t_quantiles() -> None:
    # One degree of freedom is Cauchy: tan(0.475 pi); two: 0.95 / sqrt(2 * 0.975 * 0.025).
    assert T_QUANTILES[0] == pytest.approx(math.tan(0.475 * math.pi), abs=5e-4)
    assert T_QUANTILES[1] == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), abs=5e-4)
    assert len(T_QUANTILES) == 30 and list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)
    many = paired_difference({s: s % 2 for s in range(40)}, dict.fromkeys(range(40), 0))
    assert many is not None
    # deviation sqrt(10 / 39) of forty values 0.5 away from their mean; the quantile of 30 degrees of freedom
    assert many["high"] == pytest.approx(0.5 + 2.042 * math.sqrt(10 / 39) / math.sqrt(40))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "small"', 'nmae = "small"', "unknown keys: nmae"),
        ("mean = [0.5, 0.5, 0.5]", "means = [0.5]", "[[networks]] number 1 has unknown keys: means"),
        ("images = true", "image = true", "[[recipes]] number 2 has unknown keys: image"),
        ("seeds = [0, 1]", "seeds = 2", "seeds is 2. Expected a list of whole numbers"),
        ("seeds = [0, 1]", "seeds = [0, -1]", "not negative"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds are not all different"),
        ("seeds = [0, 1]", "seeds = [false]", "Expected a list of whole numbers"),
        ('"w8a8"', '"w4a4"', "bits of tiny net are not all different"),
        ('"w8a8"', '"W9A4"', "between 2 and 8"),
        ('bits = ["W4A4", "w8a8"]', "", "has no bits"),
        ('name = "genie"', 'name = "genius"', "no recipe 'genius'"),
        ('budget = "quick"', 'budget = "huge"', "budget must be one of"),
        ('budget = "quick"', 'ends = "4bit"', "ends must be one of"),
        ('budget = "quick"', 'device = "cuda:99"', "CUDA devices"),
        ('budget = "quick"', 'device = "gpu"', "device is 'gpu'"),
        ('name = "small"', 'name = "../small"', "names the output folder"),
        ('data = "${BENCH_FILES}/test.npz"', "", "has no 'data'"),
        ("test.npz", "absent.npz", "absent.npz does not exist"),
        ("tiny.safetensors", "absent.safetensors", "does not exist"),
        ("nets.py:tiny", "nets.py:absent", "absent"),
        ("${BENCH_FILES}/test.npz", "${NOT_SET_B}/test.npz", "variable NOT_SET_B is not set"),
        ("${BENCH_FILES}/test.npz", "${NOT_SET_B}/test.npz", "the folder that holds test.npz"),
        ("synthesis.steps = 3", "synthesis.stepz = 3", "No recipe of the benchmark has"),
        ('set = { "synthesis.num_images" = 6 }', 'set = { "synthesis.steps" = 6 }', "synthesis.steps"),
        ("num_holdout = 0", "num_holdout = [0]", "Expected a text, a number, true or false"),
        ("num_holdout = 0", '"scheme.weight_bits" = 2', "keys bits and ends"),
        ("num_holdout = 0", 'num_holdout = "many"', "num_holdout"),
        ("images = true", "images = false", "needs given images"),
        ('images = "${BENCH_FILES}/train.npz"', "", "the network tiny net has none"),
        ('name = "genie"', 'name = "genie"\nimages = true', "makes its own images"),
        ("[set]", "[set", "not valid TOML"),
    ],
)
def test_wrong_files_are_refused_before_anything_runs(
    change: Change, tmp_path: Path, old: str, new: str, expected: str
) -> None:
    path = change(old, new)
    assert expected in message(lambda: run_bench(path, out=tmp_path / "new", progress=nothing))
    assert not (tmp_path / "new").exists()


def test_outputs_that_are_not_a_benchmark_are_left_alone(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "letter.txt").write_text("dear")
    text = message(lambda: run_bench(folder / "small.toml", out=folder / "other", progress=nothing))
    assert "is not the folder of a benchmark" in text
    assert [path.name for path in (folder / "other").iterdir()] == ["letter.txt"]
    assert "cannot be read" in message(lambda: run_bench(folder / "none.toml", progress=nothing))


def test_a_network_without_batch_norm_fails_as_a_row(folder: Path, change: Change) -> None:
    change("nets.py:tiny", "nets.py:dense")
    change('weights = "${BENCH_FILES}/tiny.safetensors"', "")
    change("seeds = [0, 1]", "seeds = [0]")
    with pytest.raises(JobError, match="2 of 4 rows failed"):
        again(folder)
    assert "BatchNorm" in (folder / "out" / "table.md").read_text()


def test_files_of_this_repository_are_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # some are for a GPU
    found = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.toml"))
    benches = {path.stem: read_bench(path) for path in found}
    others = {"engine", "genie", "gradient_cover", "psaq_vit", "quick", "sadag", "w8a8"}
    others |= {"best", "genie_synq", "half", "w2a2", "sadag_quick", "sadag_seeds", "sadag_variants"}
    others |= {"best_imagenet", "sadag_turn", "tiniest", "uniform_imagenet", "units"}
    others |= {"sadag_bits", "sadag_imagenet", "sadag_long", "sadag_ablation", "synq_parts_gdfq"}
    assert benches.keys() == others | {"mixing", "paper", "paper_imagenet", "synq_parts", "uniform"}
    for name, bench in benches.items():
        assert bench.name == name and bench.networks and bench.recipes
        for network in bench.networks:
            assert network.input_size is not None and network.mean is not None and network.std is not None
            assert len(network.mean) == len(network.std) == network.input_size[0]
            for entry, overrides in bench_plan._overrides(bench, network):
                for bits in network.bits:
                    settings = compose_recipe(
                        entry.name, bits=bits, ends=bench.ends, budget=bench.budget, overrides=overrides
                    )
                    assert settings.num_holdout == 0
                    assert isinstance(settings.synthesis, Synthesis) == (
                        entry.name in ("genie", "best", "genie-synq", "sadag")
                    )
                    assert isinstance(settings.synthesis, GivenImages) == entry.images
                    assert network.images is not None or not entry.images
    bits_of = {network.name: network.bits for network in benches["genie"].networks}
    assert bits_of["imagenet_etinynet_1.0"] == ("W4A8", "W4A4", "W3A3", "W2A4")  # its own
    assert bits_of["cifar10_resnet20"] == ("W4A4", "W3A3", "W2A4")
    assert bits_of["cifar100_resnet20s"] == ("W4A4", "W3A3", "W2A4")  # those of the file
    assert {network.bits for network in benches["w8a8"].networks} == {("W8A8",)}
