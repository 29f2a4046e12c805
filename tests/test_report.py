"""The report page: complete, self-contained, escaped, and clear about what a run does not hold."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import CaptureFixture
from quantization_networks import Residual, Summing, Tokens, attached, teacher
from tiny_networks import message
from torch import nn

import zsq
from zsq.cli import main
from zsq.inspection import BINS, NUM_IMAGES
from zsq.models import Teacher
from zsq.report.charts import (
    Histogram,
    Row,
    Series,
    dot_rows,
    histogram,
    line_chart,
    log_ticks,
    number,
    ticks,
)
from zsq.report.comparison import Summary, differences, run_labels
from zsq.report.page import write_report
from zsq.report.placement import placement
from zsq.report.sections import SECTIONS
from zsq.report.settings import settings_of

HOSTILE = "</script><script>alert(1)</script>"
TINY: dict[str, Any] = {
    "synthesis.num_images": 12,
    "synthesis.batch_size": 6,
    "synthesis.steps": 4,
    "synthesis.latent_size": 8,
    "num_holdout": 4,
    "reconstruction.steps": 6,
    "reconstruction.batch_size": 6,
}


class Page(HTMLParser):
    """What a page holds: sections, tags, text, and all that a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sections: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br", "wbr"):
            self.open.append(tag)
        if tag == "section":
            self.sections.append(found["id"] or "")
        self.loaded += [
            value or "" for key, value in found.items() if key in ("src", "href", "srcset", "data")
        ]
        assert not any(key.startswith("on") for key in found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data + " "


def page(path: Path) -> Page:
    """A page that is well formed and loads nothing from elsewhere."""
    found = Page(path)
    assert found.open == [] and "script" not in found.tags
    assert all(url.startswith(("data:", "#")) for url in found.loaded), found.loaded
    assert "http://" not in found.source and "https://" not in found.source
    assert "@import" not in found.source and "url(" not in found.source
    return found


def run_of(model: Teacher, **options: Any) -> zsq.Run:
    return zsq.quantize(model, **{"recipe": "genie", "bits": "W3A3", "overrides": TINY, "seed": 3, **options})


def named(network: type[nn.Module], name: str) -> Teacher:
    plain = teacher(network)
    return Teacher(plain.module, input_size=plain.spec.input_size, name=name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of one network: two seeds at W3A3, one at W8A8."""
    root = tmp_path_factory.mktemp("runs")
    model = named(Residual, HOSTILE)
    runs: dict[str, dict[str, Any]] = {"a": {}, "b": {"seed": 4}, "c": {"bits": "W8A8"}}
    return [run_of(model, **options).save(root / name) for name, options in runs.items()]


# ---- the page


def test_a_page_of_one_run(folders: list[Path], tmp_path: Path) -> None:
    path = zsq.write_report(folders[0], tmp_path / "page.html")
    found = page(path)
    assert found.sections == ["summary", *(section.name for section in SECTIONS)]
    assert HOSTILE in found.text and "alert" not in found.tags
    for text in (
        "Measured",
        "No accuracy was measured",
        "Estimated without data",
        "not an accuracy",
        "held-out",
    ):
        assert text in found.text
    for stage in ("synthesize", "reconstruct", "holdout"):
        assert stage in found.text
    assert "stem.conv" in found.text and "block1.first.conv" in found.text
    assert found.tags.count("img") == 12 and "of them both networks name the same class" in found.text
    assert "prefers-color-scheme: dark" in found.source
    assert path.stat().st_size < 300_000
    assert "exists already" in message(lambda: write_report(folders[0], path))
    assert write_report(folders[0], path, force=True) == path


def test_measured_figures_stand_apart(folders: list[Path], tmp_path: Path) -> None:
    run = zsq.load_run(folders[0])
    values = {"top1": 91.5, "top5": None, "num_images": 500}
    run.record["results"]["measured"] = {
        "data": "/some/where/test.npz",
        "teacher": values,
        "student": {**values, "top1": 90.25},
    }
    found = page(write_report(run, tmp_path / "page.html"))
    assert "91.50 %" in found.text and "90.25 %" in found.text and "−1.25 points" in found.text
    assert "test.npz" in found.text and "/some/where" not in found.text


def test_several_runs_and_paired_differences(folders: list[Path], tmp_path: Path) -> None:
    found = page(write_report(folders, tmp_path / "page.html"))
    assert found.sections[:2] == ["summary", "compare"]
    assert "W8A8 · seed 3" in found.text and "W3A3 · seed 4" in found.text
    assert "W8A8 minus W3A3" in found.text and "Paired by seed, 1 pair" in found.text
    again = page(write_report([folders[0], folders[1]], tmp_path / "seeds.html"))
    assert "There are no pairs" in again.text


def test_an_old_run_says_what_it_does_not_hold(folders: list[Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folders[0], old)
    (old / "inspection.json").unlink()
    (old / "metrics.jsonl").write_text("")
    found = page(write_report(old, tmp_path / "page.html"))
    assert found.text.count("Not recorded") == 4 and "not recorded in this run" in found.text
    assert "Nothing was optimised" in found.text and "Bits over the network" in found.text
    run = zsq.load_run(old)
    published = page(write_report(replace(run, images=run.images[:0]), tmp_path / "published.html"))
    assert "holds no images" in published.text


@pytest.mark.parametrize("network", [Summing, Tokens])
def test_other_networks(network: type[nn.Module], tmp_path: Path) -> None:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run = run_of(teacher(network), recipe="given-nearest", images=images, overrides={})
    found = page(write_report(run, tmp_path / "page.html"))
    if network is Tokens:
        assert "no BatchNorm" in found.text
    assert "No rounding was learned" in found.text and "fc" in found.text


def test_exports_and_latency_are_shown(folders: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    zsq.export_onnx(folder, folder / "student.onnx")
    line = {
        "date": "2026-01-02T03:04Z",
        "engine": "ORT 1",
        "container": "int8",
        "batch_size": 1,
        "threads": 1,
    }
    line |= {"float_ms": 2.0, "quantized_ms": 1.0, "ratio": 2.0, "ratio_quartiles": [1.9, 2.1]}
    (folder / "latency.jsonl").write_text(json.dumps(line) + "\n")
    found = page(write_report(folder, tmp_path / "page.html"))
    assert "student.onnx" in found.text and "1 file, 1 timing" in found.text
    assert "ORT 1, int8" in found.text and "another run" not in found.text
    about = json.loads((folder / "student.onnx.json").read_text())
    (folder / "student.onnx.json").write_text(json.dumps({**about, "zsq.seed": "99"}))
    assert "another run" in page(write_report(folder, tmp_path / "stale.html")).text


# ---- wrong calls


def test_command(folders: list[Path], tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["report", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    run = tmp_path / "run"
    shutil.copytree(folders[0], run)
    code, out, _ = call(run)
    assert code == 0 and "report.html" in out and page(run / "report.html")
    assert call(run)[0] == 2
    code, out, _ = call(run, folders[1], "--out", tmp_path / "two.html", "--json")
    assert code == 0 and json.loads(out)["bytes"] == (tmp_path / "two.html").stat().st_size
    for wrong in (tmp_path, tmp_path / "nowhere", run / "run.json"):
        code, out, err = call(wrong, "--out", tmp_path / "no.html")
        assert code == 2 and out == "" and "run.json" in err and err.count("\n") == 1
    assert "report needs at least one" in message(lambda: write_report([], tmp_path / "no.html"))
    assert not (tmp_path / "no.html").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"results": {}},
        {"recipe": {"name": "genie"}},
        {"recipe": 3},
        {"timings": {"capture": "soon"}},
        {"seed": None},
        {"model": {"name": "x", "spec": None, "source": {}}},
        {"bits": "W99"},
    ],
)
def test_a_damaged_record_is_said(damage: dict[str, Any], folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, **damage}))
    if damage == {"bits": "W99"}:  # the recipe's own settings are then unknown
        write_report(folder, tmp_path / "page.html")
        return
    assert "damaged" in message(lambda: write_report(folder, tmp_path / "page.html"))
    for others in ([folder, folders[1]], [folders[1], folder]):
        assert "damaged" in message(lambda: write_report(others, tmp_path / "page.html"))  # noqa: B023
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "damage", [[], {"num_images": "x"}, {"weights": {"a": {"bits": 99}}}, {"batch_norm": [{}]}]
)
def test_a_damaged_inspection_is_said(damage: Any, folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(folders[0], folder)
    good = json.loads((folder / "inspection.json").read_text())
    (folder / "inspection.json").write_text(
        json.dumps({**good, **damage} if isinstance(damage, dict) else damage)
    )
    assert "damaged" in message(lambda: write_report(folder, tmp_path / "page.html"))


# ---- inspection


def test_inspection_counts_everything_once(folders: list[Path]) -> None:
    run = zsq.load_run(folders[0])
    found = run.inspection
    assert found is not None and found["num_images"] == min(12, NUM_IMAGES)
    for name, about in found["weights"].items():
        quantizer = run.student.get_submodule(name)
        codes = quantizer.codes.flatten()  # type: ignore[union-attr, operator]
        assert about["codes"] == torch.bincount(codes.long(), minlength=2 ** about["bits"]).tolist()
        assert len(about["histogram"]) == BINS
        assert sum(about["histogram"]) + about["below"] + about["above"] == len(codes)
    assert {len(a["histogram"]) for a in found["activations"].values()} == {BINS}
    assert any(about["changed"] for about in found["weights"].values())
    assert [layer["name"] for layer in found["batch_norm"]][0] == "stem.bn"
    assert len(found["classes"]["teacher"]["class"]) == 12
    nearest = zsq.load_run(folders[2]).inspection  # at 8 bits nothing is learned
    assert nearest is not None and not any(about["changed"] for about in nearest["weights"].values())


def test_batch_norm_gap_by_hand() -> None:
    """One channel, stored mean 0 and variance 1; half of the images are 1, half 3: mean 2, deviation 1."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        network[0].weight.fill_(1.0)  # type: ignore[operator]
    images = torch.cat([torch.ones(4, 1, 8, 8), torch.full((4, 1, 8, 8), 3.0)])
    model = Teacher(network, input_size=(1, 8, 8))
    run = run_of(model, recipe="given-nearest", images=images, overrides={})
    assert run.inspection is not None
    (layer,) = run.inspection["batch_norm"]
    # 512 values: biased variance 1, unbiased 512 / 511; the stored deviation is the root of 1 + 1e-5.
    assert layer["mean_gap"] == pytest.approx(2 / (1 + 1e-5) ** 0.5, rel=1e-5)
    assert layer["deviation_gap"] == pytest.approx((512 / 511 / (1 + 1e-5)) ** 0.5 - 1, rel=1e-3)


# ---- parts


def test_placement_rows_join_where_tensors_do() -> None:
    _, student, _, _ = attached(Residual, "W3A3")
    steps = placement(student)
    assert [s.name for s in steps] == [
        "image",
        "stem.conv",
        "block1.first.conv",
        "block1.second.conv",
        "add",
        "block2.first.conv",
        "block2.second.conv",
        "block2.shortcut.conv",
        "add",
        "fc",
    ]
    assert steps[1].operation == "conv 3×3, 3 → 6" and steps[5].operation == "conv 3×3, 6 → 10, stride 2"
    assert steps[-1].operation == "linear, 10 → 7" and steps[-1].weights == 70
    assert all(step.weight_bits for step in steps if step.weights)
    assert steps[0].rail.count("<path") == 1 and steps[4].rail.count("<path") == 3


def test_settings_say_why_they_differ(folders: list[Path]) -> None:
    record = zsq.load_run(folders[0]).record
    found, known = settings_of(record)
    by_name = {setting.name: setting for setting in found}
    assert known and by_name["synthesis.steps"].reason == "set" and by_name["synthesis.steps"].value == "4"
    assert by_name["scheme.weight_bits"].reason == "bits"
    assert by_name["reconstruction.lr_rounding"].reason == "budget standard"
    assert by_name["synthesis.swing"].reason == ""
    found, known = settings_of({**record, "recipe": {**record["recipe"], "name": "my own"}})
    assert not known and not any(setting.reason for setting in found)


def test_differences_pair_seeds() -> None:
    one = Summary("a · seed 0", 0, "net", "first", {"x": 1.0, "y": None}, {"u": 10.0})
    other = replace(
        one, label="b · seed 0", configuration="second", figures={"x": 3.0, "y": 2.0}, units={"u": 11.0}
    )
    runs = [one, other]
    for seed in (1, 2):
        runs += [
            replace(one, label=f"a · seed {seed}", seed=seed, figures={"x": 2.0}),
            replace(other, label=f"b · seed {seed}", seed=seed, figures={"x": 4.0 + seed}),
        ]
    runs.append(replace(one, label="c", network="another", configuration="second"))
    (found,) = differences(runs)
    # Differences of x by seed: 2, 3, 4; their mean 3, deviation 1, t(0.975, 2) = 4.303.
    assert found.pairs == 3 and (found.label, found.reference) == ("b", "a")
    ((title, mean, low, high),) = found.figures
    assert (title, mean) == ("x", 3.0) and low == pytest.approx(3 - 4.303 / 3**0.5)
    assert high is not None and found.units[0].dots == ((0, 1.0),)
    assert differences([one, replace(other, seed=5)])[0].pairs == 0


def test_labels_are_never_twice_the_same() -> None:
    record = {"model": {"name": "m"}, "recipe": {"name": "r", "scheme": {}}, "bits": "W4A4", "seed": 0}
    assert run_labels([record], ["x"]) == [""]
    assert run_labels([record, record], ["x", "y"]) == ["x", "y"]
    assert run_labels([record, record], ["x", "x"]) == ["x (1)", "x (2)"]
    assert run_labels([record, {**record, "seed": 1}], ["x", "y"]) == ["seed 0", "seed 1"]


def test_charts() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] or ticks(0, 10) == [0, 5, 10]
    assert ticks(1, 1) == [1] and log_ticks(0.01, 100) == [0.01, 0.1, 1, 10, 100]
    assert [number(v) for v in (0, 0.5, -3, 123456, 1e-7)] == [
        "0",
        "0.5",
        "−3",
        "1.2e5",
        "1e-7".replace("-", "−"),
    ]
    assert line_chart([], about="x") == "" and dot_rows([], labels=("a",), unit="x") == ""
    drawn = line_chart([Series("<b>", [[(1, 5.0)], [(2, 5.0), (3, 5.0)]])], about="<i>")
    assert "<b>" not in drawn and "<i>" not in drawn and drawn.count("<polyline") == 2
    rows = dot_rows([Row("<b>", ((0, None),)), Row("b", ((0, -1.0),), joined=True)], labels=("a",), unit="x")
    assert "<b>" not in rows and rows.count('class="dot s0"') == 1
    flat = histogram(Histogram([0] * 4, 0, 1, range(300), [1] * 8, rare=True), about="x")
    assert flat.count('class="code"') == 4 and "nan" not in flat
