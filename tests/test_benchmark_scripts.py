"""The scripts in benchmarks/ that write tables and plots, on tiny networks and made-up rows."""

import json
from pathlib import Path
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
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [tmp_path / name for name in ("cost.svg", "sharpness.svg")]
    options = ["--network", "n", "--cost", str(files[0]), "--sharpness", str(files[1])]
    plots.main([str(tmp_path / "rows.jsonl"), *options])
    assert all("<svg" in file.read_text() for file in files)
