"""The benchmark beside Sony's toolkit, as far as it goes without the toolkit."""

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_speed import BENCHMARKS, NETS
from torch import Tensor, nn

from zsq.models import load_model


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_programs_take_turns() -> None:
    """Every turn begins with another program; the first step of a block does not count."""
    import toolkit

    order: list[str] = []

    def program(name: str, seconds: float) -> toolkit.Program:
        def run(steps: int) -> tuple[Tensor, list[float]]:
            order.append(name)
            return torch.zeros(1), [100.0 + seconds * step for step in range(steps)]

        return run

    programs = {name: program(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    for turn in range(4):
        assert toolkit.take_turns(programs, 4, turn) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert "".join(order) == "abcbcacababc"
    assert toolkit.step_seconds([9.0, 10.0, 13.0, 14.0]) == 1.0


def test_tables() -> None:
    import toolkit

    options = argparse.Namespace(
        num_images=128, batch_size=128, block=6, bits="W4A8", unit_steps=200, num_test=None
    )
    steps = [{"toolkit": 2.0, "zsq float32": 1.0, "zsq bfloat16": 0.5}] * 2
    steps.append({"toolkit": 9.0, "zsq float32": 3.0, "zsq bfloat16": 1.0})
    rows = [
        *({"stage": "speed", "round": turn, "step": step} for turn, step in enumerate(steps)),
        {"stage": "images", "program": "toolkit", "steps": 100, "seconds": 9, "bn": 2.5, "deviation": 0.5},
        *(
            {"stage": "accuracy", "images": "toolkit", "steps": 100, "learner": "zsq", "seed": seed}
            | {"seconds": 7.0, "top1": 60.0 + seed}
            for seed in range(3)
        ),
    ]
    text = toolkit.report(rows, options, "the command", "1.2.3")
    assert "`the command`" in text and "toolkit 1.2.3" in text and "3 rounds" in text
    assert "| toolkit | 2.000 | 4.00 | 2.00 |" in text
    assert "| 100 | toolkit | 2.500 | 0.50 | 9 |" in text
    assert "| toolkit | 100 | zsq | 61.00 ± 1.00 |  | 0, 1, 2 | 7 |" in text
    rows[-1]["top1_quantized_output"] = 50.0
    assert "| 61.00 ± 1.00 | 50.00 | 0, 1, 2 |" in toolkit.accuracy_table(rows[4:])
    assert "## Accuracy" not in toolkit.report(rows[:4], options, "the command", "1.2.3")


def test_finished_rows_are_kept(tmp_path: Path) -> None:
    import toolkit

    work = toolkit.Work(tmp_path / "work")
    key = {"stage": "images", "program": "toolkit, tuned", "steps": 100}
    assert work.row(key, lambda: {"bn": 1.0}) == key | {"bn": 1.0}
    again = toolkit.Work(tmp_path / "work")
    assert again.row(key, lambda: pytest.fail("made again")) == key | {"bn": 1.0}
    assert again.row(key | {"steps": 300}, lambda: {"bn": 0.5})["bn"] == 0.5
    assert len((tmp_path / "work" / "rows.jsonl").read_text().splitlines()) == 2
    assert again.images("toolkit, tuned", 100).name == "toolkit-tuned-100.safetensors"


def test_our_side(tmp_path: Path) -> None:
    """zsq's images in blocks with the end of every step, their distance, and which layers have 8 bits."""
    import toolkit
    import toolkit_programs

    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    teacher = load_model(f"{tmp_path}/nets.py:tiny", input_size=(3, 8, 8))
    for pixels in (False, True):
        images, ends = toolkit.zsq_images(
            teacher, 5, num_images=8, batch_size=8, precision="bfloat16", seed=0, pixels=pixels
        )
        assert images.shape == (8, 3, 8, 8) and len(ends) == 5 and toolkit.step_seconds(ends) >= 0
        assert toolkit.bn_distance(teacher, images) < toolkit.bn_distance(teacher, 10 * images)
    assert toolkit_programs.eight_bit_layers(teacher, "W4A8") == {"0", "8"}
    bar = toolkit_programs.Marks(range(3))
    for _ in bar:
        bar.set_description("")
    assert len(bar.ends) == 3 and bar.ends == sorted(bar.ends)


def test_free_output() -> None:
    from toolkit_programs import free_output

    names = ("a_activation_holder_quantizer", "linear", "linear_activation_holder_quantizer")
    student = nn.Sequential(OrderedDict((name, nn.ReLU()) for name in names))
    free_output(student)
    assert [type(module) for module in student] == [nn.ReLU, nn.ReLU, nn.Identity]


def test_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toolkit
    import toolkit_programs

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(toolkit_programs.importlib, "import_module", missing)
    options = "--input-size 3,8,8 --mean 0,0,0 --std 1,1,1 --data d.npz --work"
    with pytest.raises(SystemExit, match="pip install model-compression-toolkit torchvision") as error:
        toolkit.main(["nets.py:tiny", *options.split(), str(tmp_path / "work")])
    assert "\n" not in str(error.value) and not (tmp_path / "work").exists()
    assert json.dumps(str(error.value)).isascii()
