"""What `zsq doctor` says of packages that are there, missing or broken."""

import json
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zsq.cli import app, doctor

REAL = doctor.EXTRAS
EXTRAS = {
    "good": (("numpy", "safetensors"), "something"),
    "bad": (("no_such_package", "numpy"), "another thing"),
    "sad": (("broken_package",), "a third"),
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", EXTRAS)
    (tmp_path / "broken_package.py").write_text(
        "raise RuntimeError('operator  torchvision::nms is not there')"
    )
    info = tmp_path / "broken_package-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken_package\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_table() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0].startswith("zsq ") and f"Python {sys.version.split()[0]}" in lines[0]
    assert lines[1].startswith("devices: cpu")
    assert lines[2].startswith("C compiler: ")
    assert "good ready: something" in lines and "bad missing no_such_package: another thing" in lines
    assert "pip install 'zsq[bad]'" in lines and "pip install 'zsq[good]'" not in lines
    assert "broken_package: operator torchvision::nms is not there" in lines


def test_json() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["extras"]["good"]["packages"]["numpy"]["usable"] is True
    assert found["extras"]["bad"]["packages"]["no_such_package"]["version"] is None
    broken = found["extras"]["sad"]["packages"]["broken_package"]
    assert broken["version"] == "1.2" and not broken["usable"]


def test_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsq.quant.fused.kernels", lambda: None)
    output = " ".join(CliRunner().invoke(app, ["doctor"]).output.split())
    assert "C compiler: none that works; results are the same" in output and "ZSQ_COMPILER" in output
    monkeypatch.setattr("zsq.quant.fused.kernels", lambda: "some")
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert found["compiled_loops"] == {"usable": True, "problem": None}


def test_every_extra_of_the_package_is_known() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(tomllib.loads(text)["project"]["optional-dependencies"])
    assert set(REAL) == extras - {"dev", "docs", "all"}
