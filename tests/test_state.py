"""Pieces of an interrupted run: every bit is kept, damaged ones do not count."""

import math
from pathlib import Path

import pytest
import torch

from zsq.errors import JobError
from zsq.state import StateFolder


def test_state_keeps_every_bit(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    assert list(state) == [] and "batch-000" not in state
    piece = {
        "images": torch.tensor([0.0, -0.0, math.nan, math.inf]).view(2, 2).t(),
        "codes": torch.arange(4, dtype=torch.uint8),
        "snr": torch.tensor(1 / 3, dtype=torch.float64),
    }
    state["unit-001"], state["batch-000"] = piece, {"images": torch.ones(2)}
    again = StateFolder(tmp_path / "state")
    assert list(again) == ["batch-000", "unit-001"] and len(again) == 2
    found = again["unit-001"]
    assert found.keys() == piece.keys()
    for name, value in piece.items():
        assert found[name].dtype == value.dtype
        assert found[name].numpy().tobytes() == value.contiguous().numpy().tobytes()
    del again["batch-000"]
    assert list(state) == ["unit-001"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "longer", "folder"])
def test_a_damaged_piece_counts_as_not_finished(damage: str, tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state["piece"] = {"images": torch.ones(100)}
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:300] + bytes([content[300] ^ 1]) + content[301:]
        path.write_bytes(
            {"cut": content[:-5], "empty": b"", "flip": flipped, "longer": content + b"x"}[damage]
        )
    with pytest.raises(JobError, match="piece.piece, which this run wrote, was removed or damaged"):
        state["piece"]
    later = StateFolder(tmp_path)
    assert "piece" not in later
    with pytest.raises(KeyError):
        later["piece"]
