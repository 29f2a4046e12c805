"""The scripts in benchmarks/ that write tables and plots, on tiny networks and made-up rows."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_speed import BENCHMARKS, NETS

from zsq.architectures import network_from_file


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_time_to_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both programs do all of their work and are measured; a finished seed is not done again."""
    import to_accuracy

    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    save_file(network_from_file(f"{tmp_path}/nets.py:tiny").state_dict(), tmp_path / "tiny.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "test.npz", images=images, labels=np.arange(20) % 5)
    rows, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    options = [
        *(f"{tmp_path}/nets.py:tiny", "--weights", f"{tmp_path}/tiny.safetensors", "--input-size", "3,8,8"),
        *("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25", "--data", f"{tmp_path}/test.npz"),
        *("--published", "10,2,2", "--ours", "6,2,2", "--bits", "W4A4,W2A4"),
        *("--rows", str(rows), "--write", str(table)),
    ]
    to_accuracy.main(options)
    (row,) = [json.loads(line) for line in rows.read_text().splitlines()]
    for bits in ("W4A4", "W2A4"):
        assert set(row["top1"][bits]) == {"published", "zsq"}
        assert min(row["reconstruction"][bits].values()) > 0
    assert "| W2A4 |" in table.read_text() and "published 10,2,2, zsq 6,2,2" in table.read_text()
    before = rows.read_bytes()
    to_accuracy.main(options)
    assert rows.read_bytes() == before


def test_growth(tmp_path: Path) -> None:
    import growth

    assert growth.exponent([1, 10, 20, 40], [5, 3, 12, 48]) == pytest.approx(2)
    found = growth.measure(growth.Case(images=4, size=8, blocks=1), "reconstruction")
    assert found["seconds"] > 0 and found["macs"] > 0
    case = {"seconds": 1.0, "mib": 2.0, "macs": 3e6}
    results = {
        axis: [dict.fromkeys(growth.STAGES, case) for _ in cases] for axis, cases in growth.AXES.items()
    }
    text = growth.tables(results)
    assert text.count("| exponent | 0.00 |") == 3 and "| 1024 | 3.0 |" in text


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plots

    def row(recipe: str, seed: int, **more: Any) -> dict[str, Any]:
        seconds = {"synthesize": 10.0 + seed, "reconstruct": 5.0, "evaluate": 99.0}
        return {"network": "n", "recipe": recipe, "bits": "W2A2", "seed": seed, "top1": 40.0 + seed} | {
            "seconds": seconds,
            **more,
        }

    on_real = {"diagnostics": {"others": {"sharpness": 0.2, "loss": 2.0}}}
    rows = [row("genie", 0, **on_real), row("genie", 1), row("sadag", 0, **on_real)]
    assert plots.cost(rows[1]) == 16.0
    assert plots.cost(rows[1] | {"seconds": {"synthesize": None}}) is None
    rows.append(row("genie", 0, top1=90.0))  # run again
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = plots.read_rows(tmp_path / "rows.jsonl", None, ["genie"])
    assert [found["top1"] for found in read] == [90.0, 41.0]
    assert plots.read_rows(tmp_path / "rows.jsonl", ["W3A3"], None) == []
    files = [tmp_path / name for name in ("cost.svg", "sharpness.svg")]
    options = ["--network", "n", "n", "--bits", "W2A2", "--cost", str(files[0]), "--sharpness", str(files[1])]
    plots.main([str(tmp_path / "rows.jsonl"), *options])
    assert all("<svg" in file.read_text() for file in files)


def test_correlations() -> None:
    pytest.importorskip("matplotlib")
    import plots

    def row(top1: float, loss: float, means: float) -> dict[str, Any]:
        found = {"others": {"sharpness": loss, "loss": loss}, "alignment": {"of_means": means}}
        return {"network": "n", "bits": "W3A3", "top1": top1, "diagnostics": found}

    rows = [row(40.0, 9.0, 0.1), row(50.0, 7.0, 0.3), row(45.0, 8.0, 0.2)]
    for index, measured in enumerate(rows):
        measured["diagnostics"]["others"]["sharpness"] *= 1 + index
    assert "| n | W3A3 | 3 | 0.50 | -1.00 | 1.00 |" in plots.correlations([*rows, {"network": "n"}])


def test_detections(tmp_path: Path) -> None:
    """Decoding, suppression and precision of a detector's output, small enough to count by hand."""
    from detector import Boxes, average_precision, decode, mean_average_precision, overlap, table

    output = torch.full((1, 85, 2, 2), -20.0)
    output[:, 0], output[:, 5:] = 0.0, 0.0
    # The cell in row 1, column 0: middle (0 + 0) / 2, (0 + 1) / 2, both sides sigmoid(0) = 0.5.
    output[0, 0, 1, 0], output[0, 1:5, 1, 0], output[0, 5 + 7, 1, 0] = 0.25, 0.0, 0.5
    (found,) = decode(output)
    assert torch.allclose(found.corners, torch.tensor([[-0.25, 0.25, 0.25, 0.75]]))
    assert found.classes.tolist() == [7]
    assert float(found.scores) == pytest.approx(0.25**0.6 * 0.5**0.4)
    # A worse box of the same class on top of it goes, one of another class stays.
    for column, (of_class, objectness) in enumerate(((7, 0.2), (8, 0.1))):
        output[0, 0, 0, column], output[0, 5 + of_class, 0, column] = objectness, 0.5
        output[0, 1:5, 0, column] = torch.tensor([float(np.arctanh(-0.999 * column)), 3.0, 0.0, 0.0])
    (found,) = decode(output)
    assert found.classes.tolist() == [7, 8]
    unit = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert float(overlap(unit, torch.tensor([[0.5, 0.0, 1.5, 1.0]]))) == pytest.approx(1 / 3)

    def boxes(*rows: tuple[float, int, float]) -> Boxes:
        """Squares of side 1 by place, class and score."""
        places = torch.tensor([[x, 0.0, x + 1, 1.0] for x, _, _ in rows]).reshape(-1, 4)
        return Boxes(places, torch.tensor([c for _, c, _ in rows]), torch.tensor([s for _, _, s in rows]))

    wanted = [boxes((0.0, 1, 1.0), (5.0, 1, 1.0)), boxes((0.0, 2, 1.0))]
    # Class 1: a hit, a second box for the same target, a hit: recall 1/2, 1/2, 1, precision 1, 1/2, 2/3.
    seen = [boxes((0.1, 1, 0.9), (0.0, 1, 0.8), (5.0, 1, 0.7)), boxes((9.0, 2, 0.9))]
    assert average_precision(seen, wanted, 1) == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)
    assert average_precision(seen, wanted, 2) == 0
    assert mean_average_precision(seen, wanted) == pytest.approx((51 + 100 / 3) / 202)
    assert mean_average_precision(wanted, wanted) == 1
    assert "0.390" in table([], 0.39, 244490)


def test_processes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes make what one makes; of made-up times the efficiency is that by hand."""
    import processes

    processes.main(["digits", "--batch-size", "4", "--steps", "1", "2", "--turns", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("| turn | one process")
    assert "| median | 0.900 | 0.500 | 0.90 |" in processes.table([{1: 0.9, 2: 0.5}, {1: 0.9, 2: 0.5}])
    with pytest.raises(SystemExit, match="no-such-model"):
        processes.main(["no-such-model", "--steps", "1", "2", "--turns", "1"])


def test_families(timm: ModuleType, tmp_path: Path) -> None:
    """A network that is exported and one that is refused, each measured once."""
    import families

    rows, file = tmp_path / "rows.jsonl", tmp_path / "table.md"
    refused = {"network": "other", "parameters": 2e6, "error": "It draws random numbers."}
    rows.write_text(json.dumps(refused) + "\n")
    for _ in range(2):
        families.main(["test_byobnet", "other", "--rows", str(rows), "--write", str(file)])
    (_, row) = map(json.loads, rows.read_text().splitlines())
    assert row["network"] == "test_byobnet" and row["layers"] == 23 and row["units"] == 6
    assert row["decibels"] > 20 and row["relative_error"] < 0.02 and row["bytes"] < row["parameters"] * 2
    text = file.read_text()
    assert "1 of 2 networks" in text and "| other | 2.0 | – |" in text and "* other: It draws" in text
