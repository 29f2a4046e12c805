"""Runs for others: the folder loads to the same logits, its card is true, and nothing private goes along."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from image_networks import SIZE, Residual, photographs
from tiny_networks import message

import zsq
import zsq.cli
from zsq.errors import JobError
from zsq.model_card import model_card
from zsq.models import Teacher
from zsq.publish import CARD, load_pretrained, push, save_pretrained, without_paths

QUICK = {"synthesis.num_images": 6, "synthesis.steps": 2, "reconstruction.steps": 2, "num_holdout": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    teacher = Teacher(Residual().eval(), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3, name="a <b>")
    folder = tmp_path_factory.mktemp("runs") / "run"
    zsq.quantize(teacher, bits="W4A4", overrides=QUICK, out=folder, command="zsq quantize /home/me/x.py:f")
    return folder


def test_the_folder_gives_the_same_logits(finished: Path, tmp_path: Path) -> None:
    folder = save_pretrained(finished, tmp_path / "public", licence="apache-2.0")
    again, run = load_pretrained(folder), zsq.load_run(finished)
    x = photographs(5, SIZE)
    assert torch.equal(again.student(x), run.student(x)) and torch.equal(again.images, run.images)
    card = (folder / CARD).read_text()
    assert card.startswith("---\nlibrary_name: zsq\n") and 'license: "apache-2.0"' in card
    estimate = run.record["results"]["estimated_without_data"]["holdout"]["top1_agreement"]
    assert f"the same class for {estimate:.1f} %" in card and "Nothing was measured" in card
    assert "<b>" not in card and "/home/me" not in card and "x.py:f" in card
    assert "/home/me" not in (folder / "run.json").read_text()


def test_what_was_measured_is_on_the_card(finished: Path) -> None:
    record = zsq.load_run(finished).record
    record["results"]["measured"] = {"data": "/data", "student": {"top1": 61.2, "num_images": 500}}
    card = model_card(without_paths(record), title="x")
    assert "| student | 61.20 % | 500 |" in card and "/data" not in card
    assert "license: unknown" in card and "the teacher's licence was not given" in card


def test_given_images_stay_private(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = Teacher(Residual().eval(), input_size=SIZE, mean=(0.5,) * 3, std=(0.25,) * 3)
    run = zsq.quantize(teacher, recipe="given-nearest", bits="W4A4", images=photographs(6, SIZE))
    folder = save_pretrained(run, tmp_path / "public")
    assert len(load_pretrained(folder).images) == 0 and not (folder / "inspection.json").exists()
    assert "Export the run before" in message(lambda: zsq.export_pt2(folder, tmp_path / "x.pt2"))
    assert "given to the run are not published" in (folder / CARD).read_text()
    open_folder = save_pretrained(run, tmp_path / "open", with_images=True)
    assert len(load_pretrained(open_folder).images) == 6


def test_exports_go_along(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    zsq.export_onnx(finished, finished / "student.onnx", force=True)
    folder = save_pretrained(finished, tmp_path / "public")
    assert (folder / "student.onnx").read_bytes() == (finished / "student.onnx").read_bytes()
    assert "`student.onnx`: checked in onnxruntime" in (folder / CARD).read_text()
    assert json.loads((folder / "student.onnx.json").read_text())["file"] == "student.onnx"


def test_folders_are_not_overwritten(finished: Path, tmp_path: Path) -> None:
    folder = save_pretrained(finished, tmp_path / "public")
    assert "not empty" in message(lambda: save_pretrained(finished, folder))
    save_pretrained(finished, folder, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    assert "not empty" in message(lambda: save_pretrained(finished, tmp_path / "other", force=True))
    assert "run's own folder" in message(lambda: save_pretrained(finished, finished, force=True))


def test_repositories(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is the only thing replaced."""
    hub = pytest.importorskip("huggingface_hub")
    folder = save_pretrained(finished, tmp_path / "public")
    calls: list[tuple[str, dict[str, Any]]] = []

    class Client:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "https://hub/me/model"

    monkeypatch.setattr(hub, "HfApi", Client)
    assert push(folder, "me/model", private=True) == "https://hub/me/model"
    assert calls[0] == ("me/model", {"private": True, "exist_ok": True})
    assert calls[1][1] == {"repo_id": "me/model", "folder_path": str(folder)}
    monkeypatch.setattr(hub, "snapshot_download", lambda name: str(folder))
    assert load_pretrained("me/model").record["bits"] == "W4A4"

    def no_network(name: str) -> str:
        raise OSError("no route")

    monkeypatch.setattr(hub, "snapshot_download", no_network)
    assert "no route" in message(lambda: load_pretrained("me/model"))
    assert "named like user/name" in message(lambda: load_pretrained("nothing here"))
    assert "no model card" in message(lambda: push(finished, "me/model"))
    monkeypatch.setattr(Client, "upload_folder", lambda self, **options: no_network(""))
    with pytest.raises(JobError, match="hf auth login"):
        push(folder, "me/model")


def test_command(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        zsq.cli.main(["push", str(finished), "--out", str(tmp_path / "public"), "--licence", "mit"])
    assert caught.value.code == 0
    assert "zsq.load_pretrained(" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit) as caught:
        zsq.cli.main(["push", str(tmp_path / "nothing")])
    assert caught.value.code == 2
