"""Networks whose numbers are wrong: the run ends finite and names the layer, or ends at the step, kept."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_networks import Residual, images, teacher
from torch import Tensor, nn

import zsq
from zsq.cli import main
from zsq.distributed import Group
from zsq.errors import JobError
from zsq.findings import NUM_IMAGES, image_findings
from zsq.graph.capture import capture
from zsq.health import Finding, Watch
from zsq.models import Teacher
from zsq.quant.affine import MIN_SCALE
from zsq.quant.quantizers import ActivationQuantizer, WeightQuantizer

SOURCE: dict[str, Any] = {
    "synthesis.num_images": 12,
    "synthesis.batch_size": 6,
    "synthesis.steps": 3,
    "num_holdout": 4,
}
RECIPES: dict[str, dict[str, Any]] = {
    "genie": {
        **SOURCE,
        "synthesis.latent_size": 8,
        "reconstruction.steps": 3,
        "reconstruction.batch_size": 6,
    },
    "hast": {
        **SOURCE,
        "fine_tuning.epochs": 2,
        "fine_tuning.iterations": 2,
        "fine_tuning.batch_size": 6,
    },
    "dfq": {},
}
BITS = {"genie": "W4A4", "hast": "W4A4", "dfq": "W8A8"}


def no_variance(network: Any) -> None:
    network.block1.first.bn.running_var[0] = 0


def no_variance_at_all(network: Any) -> None:
    network.block1.first.bn.running_var.fill_(1e-30)


def dead_channel(network: Any) -> None:
    network.block1.first.conv.weight.data[0] = 0
    network.block1.first.bn.running_var[0] = 0
    network.block1.first.bn.running_mean[0] = 0


def no_scale(network: Any) -> None:
    network.block1.first.bn.weight.data[0] = 0


def constant(network: Any) -> None:
    network.stem.bn.weight.data.zero_()
    network.stem.bn.bias.data.fill_(0.7)


def dead_classifier(network: Any) -> None:
    network.fc.weight.data.zero_()


PATHOLOGIES: dict[Callable[[Any], None], set[tuple[str, str]]] = {
    no_variance: {("block1.first.bn", "1 of 6 channels: no variance in training")},
    no_variance_at_all: {("block1.first.bn", "6 of 6 channels: no variance in training")},
    dead_channel: {
        ("block1.first.conv", "1 of 6 channels: zero weights only"),
        ("block1.first.bn", "1 of 6 channels: no variance in training"),
    },
    no_scale: {("block1.first.bn", "1 of 6 channels: scaled by 0")},
    constant: {
        ("stem.bn", "6 of 6 channels: scaled by 0"),
        ("silu", "is 0.467731 everywhere in all images"),  # 0.7 / (1 + exp(-0.7))
    },
    dead_classifier: {("fc", "7 of 7 channels: zero weights only")},
}


def broken(change: Callable[[Any], None]) -> Teacher:
    found = teacher(Residual)
    change(found.module)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("change", PATHOLOGIES, ids=lambda change: change.__name__)
def test_a_pathology_is_named_and_the_student_finite(recipe: str, change: Callable[[Any], None]) -> None:
    model = broken(change)
    run = zsq.quantize(model, recipe=recipe, bits=BITS[recipe], overrides=RECIPES[recipe], budget="quick")
    found = [Finding(**one) for one in run.record["results"]["findings"]]
    expected = PATHOLOGIES[change]
    if recipe == "hast":  # its weights are trained: what was constant is not in the end
        expected = {(layer, what) for layer, what in expected if layer != "silu"}
    assert {(one.layer, one.what) for one in found if one.layer not in ("teacher", "student")} == expected
    x = images(5)
    assert bool(run.student(x).isfinite().all()) and bool(run.images.isfinite().all())
    for module in run.student.modules():
        if isinstance(module, (ActivationQuantizer, WeightQuantizer)):
            assert bool((module.scale >= MIN_SCALE).all()) and bool(module.scale.isfinite().all())
    assert json.loads(json.dumps(run.record, allow_nan=False)) == run.record


def test_a_dead_channel_is_stored_as_zeros_and_a_constant_exactly() -> None:
    run = zsq.quantize(broken(dead_channel), recipe="dfq", bits="W8A8", budget="quick")
    weights = {n: m for n, m in run.student.named_modules() if isinstance(m, WeightQuantizer)}
    (rows,) = (m().flatten(1) for n, m in weights.items() if n.startswith("block1.first.conv"))
    assert torch.equal(rows[0], torch.zeros_like(rows[0])) and bool((rows[1:] != 0).any())
    network = broken(constant)
    run = zsq.quantize(network, recipe="dfq", bits="W8A8", budget="quick")
    done = {one["layer"]: one["done"] for one in run.record["results"]["findings"]}
    assert done["silu"] == "a code stands for just this value"
    # Behind the constant everything is one: the same logits for all images, close to the teacher's.
    got, wanted = run.student(images(3)), network.module(images(3))
    torch.testing.assert_close(got, got[:1].expand_as(got))  # sums in another order for other rows
    assert float((got - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_healthy_network_has_no_findings_of_layers() -> None:
    run = zsq.quantize(teacher(Residual), recipe="genie", overrides=RECIPES["genie"], budget="quick")
    assert {one["layer"] for one in run.record["results"]["findings"]} <= {"teacher"}


def test_scales_that_learning_drives_to_their_bound_are_kept_there_and_named() -> None:
    from zsq.findings import student_findings
    from zsq.quant.attach import attach
    from zsq.quant.scheme import parse_bits

    graph = capture(teacher(Residual).module, (3, 8, 8))
    student, quantizers = attach(graph, parse_bits("W4A4"))
    tensor, name = next(iter(quantizers.activations.items()))
    layer, weights = next(iter(quantizers.weights.items()))
    student.get_submodule(name).set_range(torch.tensor(MIN_SCALE), torch.tensor(0.0))
    student.get_submodule(weights).scale[1] = MIN_SCALE  # type: ignore[operator,index]
    about = {name: {"lowest": 0.0, "highest": 3.0, "scale": MIN_SCALE, "bits": 4}}
    found = student_findings(graph, student, quantizers, about)
    assert [(one.stage, one.layer) for one in found] == [
        ("reconstruct", tensor),
        ("reconstruct", "stem.conv"),
    ]
    assert "lower bound 1e-12" in found[0].what and "1 of 6 channels" in found[1].what


def test_epochs_that_were_undone_are_a_finding() -> None:
    overrides = {**RECIPES["hast"], "fine_tuning.lr": 0.01, "fine_tuning.clip": "none"}
    run = zsq.quantize(teacher(Residual), recipe="hast", bits="W3A3", overrides=overrides, budget="quick")
    factor = run.record["results"]["fine_tuning"]["lr_factor"]
    (found,) = (one for one in run.record["results"]["findings"] if one["stage"] == "fine-tune")
    assert factor < 1 and found["layer"] == "student" and found["done"].endswith(f"by {factor:.2g}")


# ---- the teacher on its images


class Says(nn.Module):
    """Logits that do not depend on what is seen, except for one image of large values."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * self.conv(x).mean((2, 3))


def says(logits: list[float], labels: Tensor | None, x: Tensor | None = None, *, noise: bool = False) -> Any:
    x = images(8) if x is None else x
    return image_findings(capture(Says(logits).eval(), (3, 8, 8)), x, labels, noise=noise)


def test_a_teacher_that_is_bad_on_its_own_images() -> None:
    sure, unsure = [9.0, 0.0, 0.0], [0.1, 0.0, 0.0]
    assert says(sure, None) == [] and says(unsure, None, noise=True) == []
    assert says(sure, torch.tensor([0] * 4 + [1] * 4)) == []
    (found,) = says(sure, torch.tensor([0] * 3 + [1] * 5))
    assert found.what == "names the class asked for on 3 of 8 images" and "goes on" in found.done
    (found,) = says(unsure, None)
    assert found.what == "is unsure of 8 images (largest of 3 probabilities: 0.36 on average)"
    assert len(says(unsure, None, images(NUM_IMAGES + 1))) == 1
    with pytest.raises(JobError, match="answers 1 of 8 images with NaN or infinity"):
        x = images(8)
        x[2] = math.inf
        says(sure, None, x)


# ---- losses that are not finite


class Adding(Group):
    """Two processes, of which the other one saw what `others` says."""

    def __init__(self, others: Tensor) -> None:
        super().__init__(size=2, rank=0)
        self.others = others

    def add(self, tensors: Any) -> None:
        tensors[0] += self.others


def test_the_first_step_of_a_loss_that_is_not_finite() -> None:
    def watched(losses: list[float], group: Group | None = None) -> Watch:
        watch = Watch(
            "The job", "Do less.", steps=9, device=torch.device("cpu"), where="part 2", group=group or Group()
        )
        for step, loss in enumerate(losses):
            watch.see(step, [torch.tensor(1.0), torch.tensor(loss)])
        return watch

    watched([1.0, 2.0]).check()
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(JobError) as caught:
            watched([1.0, 2.0, bad, math.nan, 1.0]).check()
        assert str(caught.value) == (
            "The job diverged in part 2: from step 3 of 9 on the loss is NaN or infinity. In a run folder "
            "what was finished before is kept. Do less."
        )
    with pytest.raises(JobError, match="from step 5 of 9"):
        watched([1.0], Adding(torch.tensor([1.0, 4.0], dtype=torch.float64))).check()


DIVERGING = {
    "genie": (
        {"synthesis.lr_generator": 1e38},
        "The synthesis of images diverged in batch 1 of 2: from step 2 of 3",
    ),
    "zeroq": (  # within the bounds of its budget nothing diverges
        {"synthesis.lr": 1e38, "synthesis.valid_pixels": False},
        "The synthesis of images diverged in batch 1 of 2: from step 2 of 3",
    ),
    "gdfq": ({"synthesis.lr": 1e38}, "The training of the generator diverged: from step 2 of 3"),
}


@pytest.mark.parametrize("recipe", DIVERGING)
def test_where_images_diverge(recipe: str) -> None:
    changed, text = DIVERGING[recipe]
    with pytest.raises(JobError, match=text):
        zsq.quantize(teacher(Residual), recipe=recipe, overrides={**SOURCE, **changed}, budget="quick")


NETWORK = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
"""


def test_a_diverging_command_ends_with_the_step_and_its_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NETWORK)
    namespace: dict[str, Any] = {}
    exec(NETWORK, namespace)
    torch.save(namespace["small"]().state_dict(), tmp_path / "net.pt")
    arguments = ["quantize", f"{tmp_path}/net.py:small", "--weights", f"{tmp_path}/net.pt"]
    arguments += ["--input-size", "3,8,8", "--recipe", "hast", "--bits", "W3A3", "--budget", "quick"]
    arguments += [part for key, value in RECIPES["hast"].items() for part in ("--set", f"{key}={value}")]
    arguments += ["--out", f"{tmp_path}/run"]

    def call(*more: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as caught:
            main([*arguments, *more])
        return caught.value.code, capsys.readouterr().err

    code, err = call("--set", "fine_tuning.lr=1e30")
    last = err.strip().splitlines()[-1]
    assert code == 1 and "Traceback" not in err
    assert "Fine-tuning diverged: from step" in last and "fine_tuning.lr (now 1e+30)" in last
    assert "--force and another value goes on from the images" in last
    pieces = {p.name: p.read_bytes() for p in (tmp_path / "run" / "state").glob("*.piece")}
    assert any(name.startswith("synthesis-") for name in pieces)
    again, _ = call("--set", "fine_tuning.lr=1e30")
    assert again == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "state").glob("*.piece")} == pieces
    refused, err = call("--set", "fine_tuning.lr=1e-4")
    assert refused == 2 and "unfinished run that differs in: recipe" in err
    done, err = call("--set", "fine_tuning.lr=1e-4", "--force")
    assert done == 0 and "synthesize: batch 2 of 2" in err and "taken over from the interrupted run" in err


@pytest.mark.parametrize(
    ("recipe", "setting"), [("hast", "fine_tuning.lr"), ("genie", "reconstruction.lr_weight_scale")]
)
def test_another_learning_rate_goes_on_from_the_images(recipe: str, setting: str, tmp_path: Path) -> None:
    def run(out: Path, value: float, **more: Any) -> zsq.Run:
        overrides = {**RECIPES[recipe], setting: value}
        call: dict[str, Any] = {"recipe": recipe, "bits": "W4A4", "budget": "quick", "out": out}
        return zsq.quantize(teacher(Residual), overrides=overrides, **call, **more)

    run(tmp_path / "undisturbed", 1e-4)
    with pytest.raises(JobError, match=f"{setting.split('.')[-1]}.*1e\\+38"):
        run(tmp_path / "run", 1e38)
    assert any(p.name.startswith("synthesis-") for p in (tmp_path / "run" / "state").iterdir())
    resumed = []
    run(tmp_path / "run", 1e-4, force=True, progress=lambda event: resumed.append(event.resumed))
    assert any(resumed)
    for name in ("student.safetensors", "images.safetensors", "inspection.json", "run.json"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("run", "undisturbed"))
        if name == "run.json":
            records = [json.loads(text) for text in (one, two)]
            assert records[0].pop("timings") and records[1].pop("timings")
            assert records[0] == records[1]
        else:
            assert one == two


def test_findings_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = zsq.quantize(broken(dead_channel), recipe="dfq", bits="W8A8", budget="quick")
    from zsq.cli.summaries import quantized_summary
    from zsq.cli.terminal import print_parts
    from zsq.report.page import write_report

    print_parts(*quantized_summary(copy.deepcopy(run.record), tmp_path, None))
    out = capsys.readouterr().out
    assert "findings" in out and "block1.first.conv" in out and "zero weights only" in out
    page = write_report(run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "block1.first.conv: 1 of 6 channels: zero weights only" in page
