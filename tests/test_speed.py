"""The yardstick of speed: what zsq is compared with computes the same, and the tables are printed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NETS = """
from torch import nn

def tiny():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )
"""
COUNTS = "--input-size 3,8,8 --num-images 12 --batch-size 8 --no-memory --plain-allocator".split()


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return f"{tmp_path}/nets.py:tiny"


def test_prints_tables(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import speed
    import work

    monkeypatch.setattr(work, "GEMM_SIZE", 32)
    monkeypatch.setattr(work, "COPY_FLOATS", 1000)
    torch.manual_seed(0)
    files = tmp_path / "out.json", tmp_path / "out.md"
    speed.main([tiny, *COUNTS, "--steps", "8", "--json", str(files[0]), "--append", str(files[1])])
    printed = capsys.readouterr().out
    assert files[1].read_text() == f"\n{printed}" and printed.startswith("## tiny\n")
    rows = [line for line in printed.splitlines() if line.startswith("| synthesis | ")]
    assert len(rows) == 2 + 4  # two precisions; each with both programs
    assert all(f"| reconstruction | {p} |" in printed for p in ("float32", "bfloat16"))
    assert "GMAC/s" in printed
    report = json.loads((tmp_path / "out.json").read_text())
    float32, _, reconstruction, half = report["rows"]
    for row in (float32, reconstruction, half):
        assert row["published"]["seconds_a_step"] > 0 and row["zsq"]["seconds_a_step"] > 0
        assert row["zsq"]["loss"] == pytest.approx(row["published"]["loss"], rel=0.3)
    assert float32["zsq"]["macs"] < float32["published"]["macs"]
    assert reconstruction["zsq"]["macs"] == reconstruction["published"]["macs"] > 0
    assert half["zsq"]["macs"] == pytest.approx(reconstruction["zsq"]["macs"], rel=0.01)
    assert half["zsq"]["moved"] < reconstruction["zsq"]["moved"]


def test_work_is_left_out_if_asked(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    import speed

    torch.manual_seed(0)
    speed.main([tiny, *COUNTS, "--steps", "4", "--precision", "float32", "--no-work"])
    printed = capsys.readouterr().out
    assert "| synthesis | float32 |" in printed and "GMAC" not in printed


def test_steps_are_medians_of_items_that_differ() -> None:
    from yardstick import Clocked

    assert Clocked(steps={"a": [1.0, 1.0, 9.0], "b": [3.0]}).seconds_a_step == 2.0
    assert Clocked().seconds_a_step != Clocked().seconds_a_step  # NaN


def test_first_losses_are_equal(tiny: str) -> None:
    """The same latents, generator and shifts: what is compared differs in how it computes only."""
    import speed
    from yardstick import Yardstick

    torch.manual_seed(0)
    yardstick = Yardstick(speed.parse([tiny, *COUNTS, "--steps", "3"]))
    clocked, images = yardstick.race_images("float32")
    assert images.shape == (12, 3, 8, 8)
    for item, values in clocked["zsq"].losses.items():
        for name in ("bn", "image", "loss"):
            assert values[name] == pytest.approx(clocked["published"].losses[item][name], rel=1e-3), item
    assert list(clocked["zsq"].losses) == ["synthesis-000", "synthesis-001"]
    yardstick.teacher.module.requires_grad_(False)
    assert all(p.grad is None for p in yardstick.teacher.module.parameters())


def test_published_generator_is_that_of_zsq() -> None:
    from published import published_generator

    from zsq.images.sources import LatentGenerator

    start = LatentGenerator((3, 8, 12), latent_size=16, rng=torch.Generator().manual_seed(0))
    layers = published_generator(start)
    latents = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layers(latents), start(latents))
    assert sum(isinstance(layer, nn.Upsample) for layer in layers) == 2
    with pytest.raises(ValueError, match="multiples of 4"):
        published_generator(LatentGenerator((3, 9, 12), rng=torch.Generator()))


def test_published_rounding_starts_as_the_clipped_weight() -> None:
    from published import RoundedWeight

    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    rounded = RoundedWeight(weight, bits=8, axis=0)
    nearest = rounded().detach()
    rounded.soft = True
    inside = (nearest > nearest.amin((1, 2, 3), keepdim=True)) & (
        nearest < nearest.amax((1, 2, 3), keepdim=True)
    )
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(rounded().detach()[inside], weight[inside])


def test_work_counts_convolutions_with_groups() -> None:
    from work import count_work

    conv = nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False)
    images = torch.randn(2, 4, 5, 5, requires_grad=True)
    forward = 2 * 25 * 8 * 9
    assert count_work(lambda: conv(images)).macs == forward
    assert count_work(lambda: conv(images).sum().backward()).macs == 3 * forward
    assert count_work(lambda: torch.zeros(10).add(1)).moved >= 80
    assert sys.modules["work"].__file__ == str(BENCHMARKS / "work.py")
