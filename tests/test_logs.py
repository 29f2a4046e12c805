"""`--log tensorboard`: every logged value becomes a scalar, in the folder that the run has claimed."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pytest import CaptureFixture
from tiny_networks import message

from zsq.cli import main
from zsq.cli.logs import both, logged
from zsq.progress import Progress

written: list[tuple[str, str, float, int]] = []
closed: list[str] = []


class Writer:
    def __init__(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        self.folder = folder

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        written.append((self.folder, tag, value, step))

    def close(self) -> None:
        closed.append(self.folder)


@pytest.fixture(autouse=True)
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which is optional."""
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    written.clear()
    closed.clear()


def test_scalars_by_stage_and_step(tmp_path: Path) -> None:
    told: list[Progress] = []
    with logged("tensorboard", tmp_path) as log:
        tell = both(told.append, log)
        tell(Progress("synthesize", "batch 1", 1, 4))
        assert not list(tmp_path.iterdir())
        tell(Progress("synthesize", "batch 1", 2, 4, {"loss": 0.5, "bn": 0.25}))
    folder = str(tmp_path / "tensorboard")
    assert written == [(folder, "synthesize/loss", 0.5, 2), (folder, "synthesize/bn", 0.25, 2)]
    assert closed == [folder] and len(told) == 2


def test_nothing_or_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with logged(None, tmp_path) as log:
        log(Progress("synthesize", "batch 1", 2, 4, {"loss": 0.5}))
    assert not written
    assert "--log is tensorboard" in message(lambda: logged("csv", tmp_path).__enter__())
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert "zsq[tensorboard]" in message(lambda: logged("tensorboard", tmp_path).__enter__())


def test_command(tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    words = ["quantize", "digits", "--budget", "quick", "--recipe", "noise", "--out", str(tmp_path / "run")]
    words += ["--set", "synthesis.num_images=8", "--set", "reconstruction.steps=2", "--log", "tensorboard"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code, capsys.readouterr().err
    assert {tag for _, tag, _, _ in written} >= {"reconstruct/loss", "reconstruct/snr"}
    assert {folder for folder, *_ in written} == {str(tmp_path / "run" / "tensorboard")}
