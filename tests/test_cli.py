"""The commands: exit codes, messages, JSON, progress; an interrupted run ends with the same bytes."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import network_code
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress as Bars

import zsq.cli
from zsq.amounts import bytes_text, seconds_text
from zsq.cli import jobs, summaries, terminal
from zsq.cli.arguments import default_out, read_numbers
from zsq.cli.recipe_help import attribute_meanings, recipe_settings
from zsq.errors import UsageError
from zsq.models import load_model
from zsq.progress import Progress
from zsq.recipe import Reconstruction
from zsq.recipe_fields import with_overrides
from zsq.recipes import RECIPES

NETWORK = (
    network_code.SMALL
    + """
print("the model file talks")

def small():
    torch.manual_seed(SEED)
    return Small()
"""
)
SETTINGS = {
    "synthesis.num_images": 8,
    "synthesis.steps": 2,
    "synthesis.latent_size": 8,
    "reconstruction.steps": 3,
    "num_holdout": 4,
}
SMALL = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
INPUT = ["--input-size", "3,8,8", "--mean", "0.5 0.5 0.5", "--std", "0.25,0.25,0.25"]

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        zsq.cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


def refusal(capsys: Capture, *arguments: object) -> str:
    """The one paragraph with which a wrong call is refused."""
    code, out, err = call(capsys, *arguments)
    assert code == 2 and not out, err
    lines = [line for line in err.splitlines() if not line.startswith(("Note: ", "the model file talks"))]
    assert len(lines) == 1 and lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's model file and labelled images."""
    path = tmp_path_factory.mktemp("user")
    (path / "nets.py").write_text(NETWORK.replace("SEED", "0"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    np.savez(path / "labelled.npz", images=images, labels=np.arange(20) % 6)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return f"{folder / 'nets.py'}:small"


@pytest.fixture(scope="module")
def finished(folder: Path, model: str) -> Path:
    """A finished run of the same call that the tests interrupt."""
    with pytest.raises(SystemExit) as caught:
        zsq.cli.main(["quantize", model, *INPUT, *SMALL, "--out", str(folder / "finished")])
    assert caught.value.code == 0
    return folder / "finished"


def test_version_and_help(capsys: Capture) -> None:
    assert call(capsys, "--version") == (0, f"zsq {zsq.__version__}\n", "")
    code, out, _ = call(capsys, "--help")
    assert code == 0
    assert all(
        name in out
        for name in (
            "quantize",
            "synthesize",
            "evaluate",
            "export",
            "recipes",
            "show",
            "models",
            "bench",
            "--debug",
        )
    )


def test_help_does_not_import_torch() -> None:
    script = "import sys, zsq.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL', 'timm')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_quantize_json(folder: Path, model: str, capsys: Capture) -> None:
    data, out = folder / "labelled.npz", folder / "with data"
    arguments = ["quantize", model, *INPUT, *SMALL, "--bits", "w3a4", "--data", str(data), "--out", str(out)]
    code, stdout, err = call(capsys, *arguments, "--json")
    record = json.loads(stdout)
    assert code == 0 and record == json.loads((out / "run.json").read_text())
    assert record["command"] == shlex.join(["zsq", *arguments, "--json"]) and record["bits"] == "W3A4"
    measured = record["results"]["measured"]
    assert measured["data"] == str(data)
    assert measured["teacher"]["num_images"] == measured["student"]["num_images"] == 20
    assert "the model file talks" in err and "Note: no weights file" in err
    assert "\nsynthesize: batch 1 of 1, 2 of 2 steps, loss" in err
    assert "\nevaluate: student, 20 of 20 images" in err
    text = summary(capsys, record, out, str(data))
    assert "estimated without data" in text and "4 held-out synthetic images" in text
    estimated, measured_text = text.split(f"measured on {data}")
    assert "accuracy" not in estimated and "top-1 accuracy" in measured_text
    assert f"{measured['student']['top1']:.2f} %" in measured_text
    assert f"zsq evaluate '{out}' --data {data}" in text

    code, stdout, _ = call(capsys, "evaluate", out, "--teacher", "--data", data, "--batch-size", 7, "--json")
    assert code == 0 and json.loads(stdout) == {"model": str(out), **measured}


def summary(capsys: Capture, record: dict[str, Any], out: Path, data: str | None) -> str:
    capsys.readouterr()
    terminal.print_parts(*summaries.quantized_summary(record, out, data))
    return capsys.readouterr().out


def test_quantize_says_what_came_of_it(finished: Path, capsys: Capture) -> None:
    record = json.loads((finished / "run.json").read_text())
    text = summary(capsys, record, finished, None)
    assert "W4A4, first and last layer 8 bits" in text and f"zsq evaluate {finished} --data PATH" in text
    assert "agreement with the teacher" in text and "Time: capture" in text and "measured on" not in text


def test_quantize_with_given_images_and_without_activations(
    folder: Path, model: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    settings = ["--set", "reconstruction.steps=2", "--images", "labelled.npz", "--seed", 3]
    code, out, err = call(capsys, "quantize", model, *INPUT, *settings, "--bits", "W4", "--ends", "same")
    assert code == 0, err
    assert "images it was calibrated on" in out and "20 calibration images" in out
    assert "small, recipe genie, W4, budget standard, seed 3 -> runs/small-genie-W4-seed3" in err
    assert (folder / "runs/small-genie-W4-seed3/student.safetensors").is_file()


def test_evaluate(finished: Path, model: str, folder: Path, capsys: Capture) -> None:
    data = folder / "labelled.npz"
    code, out, _ = call(capsys, "evaluate", finished, "--data", data)
    assert code == 0 and "student" in out and "teacher" not in out and "top-1 accuracy" in out
    code, out, _ = call(capsys, "evaluate", model, *INPUT, "--data", data, "--limit", 8, "--json")
    assert code == 0 and json.loads(out)["teacher"]["num_images"] == 8
    assert "knows its weights" in refusal(capsys, "evaluate", finished, "--data", data, *INPUT)
    np.savez(folder / "more classes.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 6]))
    assert "labels 0 to 6" in last_line(capsys, "evaluate", finished, "--data", folder / "more classes.npz")


def test_diagnostics(finished: Path, model: str, folder: Path, capsys: Capture) -> None:
    data = folder / "labelled.npz"
    code, out, err = call(capsys, "evaluate", finished, "--data", data, "--diagnostics", 5)
    assert code == 0, err
    assert "student" in out and "teacher (before)" not in out and "none of them is an accuracy" in out
    code, out, _ = call(capsys, "evaluate", finished, "--data", data, "--diagnostics", 5, "--json")
    found = json.loads(out)["diagnostics"]
    assert found["others"]["num_images"] == 5 and found["own"]["num_images"] == 8
    text = refusal(capsys, "evaluate", model, *INPUT, "--data", data, "--diagnostics", 5)
    assert "is no run folder" in text


def test_a_run_names_its_teacher(finished: Path, model: str, folder: Path, capsys: Capture) -> None:
    code, out, _ = call(capsys, "synthesize", finished, *SMALL, "--out", folder / "images", "--json")
    assert code == 0 and json.loads(out) == {"out": str(folder / "images"), "shape": [8, 3, 8, 8]}
    assert (folder / "images/images.png").is_file()
    assert "knows its input" in refusal(capsys, "quantize", finished, "--mean", "0,0,0")
    file = folder / "nets.py"
    try:
        file.write_text(NETWORK.replace("SEED", "1"))
        assert "sha256" in refusal(capsys, "quantize", finished)
    finally:
        file.write_text(NETWORK.replace("SEED", "0"))


def test_synthesize_says_where(model: str, folder: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "synthesize", model, *INPUT, *SMALL, "--out", folder / "more")
    assert code == 0 and "8 images of 3x8x8" in out and str(folder / "more/images.png") in out
    assert f"images for small, recipe genie, budget standard, seed 0 -> {folder / 'more'}" in err


def test_filters_and_bits_of_images(model: str, folder: Path, capsys: Capture) -> None:
    out = folder / "chosen"
    options = [*INPUT, *SMALL, "--filter", "gradient_cover:3", "--bits", "W2A2", "--out", out]
    code, text, err = call(capsys, "synthesize", model, *options)
    assert code == 0 and "3 images of 3x8x8" in text, err
    for wrong in ("gradient_cover", "gradient_cover:many", ":3"):
        assert "METHOD:N" in refusal(capsys, "quantize", model, *INPUT, "--filter", wrong)
    both = ["--filter", "energy:5", "--filter", "bn_sensitivity:3"]
    assert call(capsys, "synthesize", model, *INPUT, *SMALL, *both, "--out", folder / "both")[0] == 0
    assert "'patch_entropy', 'random'" in refusal(capsys, "quantize", model, *INPUT, "--filter", "best:3")


def test_recipes_and_models(capsys: Capture) -> None:
    code, out, _ = call(capsys, "recipes")
    assert code == 0 and all(name in out for name in RECIPES)
    assert [entry["name"] for entry in json.loads(call(capsys, "recipes", "--json")[1])] == list(RECIPES)
    code, out, _ = call(capsys, "models")
    assert code == 0 and "digits" in out and "factory" in out
    assert json.loads(call(capsys, "models", "--json")[1])[0]["model"] == "digits"


def test_show(capsys: Capture) -> None:
    code, out, _ = call(
        capsys, "show", "genie", "--budget", "quick", "--bits", "W2A4", "--set", "num_holdout=7"
    )
    assert code == 0 and "arXiv:2212.04780" in out and "names them the other way round" in out
    assert "synthesis.steps = 150  (int)\n    optimizer steps a batch" in out
    assert "scheme.weight_bits = 2" in out and "num_holdout = 7" in out
    assert (
        "synthesis.steps = 100 "
        in call(capsys, "show", "genie", "--budget", "quick", "--input-size", "3,224,224")[1]
    )
    assert "Baselines" in call(capsys, "show", "noise")[1]
    settings = json.loads(call(capsys, "show", "genie", "--json", "--budget", "paper")[1])["settings"]
    assert settings["synthesis.precision"]["type"] == "float32 or bfloat16"
    assert settings["synthesis.steps"] == {
        "value": 4000,
        "type": "int",
        "meaning": "optimizer steps a batch",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_is_explained_and_can_be_set(name: str) -> None:
    for setting in recipe_settings(RECIPES[name]):
        assert setting.meaning and setting.type, setting
        value = "none" if setting.value is None else str(setting.value)
        assert with_overrides(RECIPES[name], {setting.name: value}) == RECIPES[name]


def test_two_names_share_a_meaning() -> None:
    meanings = attribute_meanings(Reconstruction)
    assert meanings["lr_weight_scale"] == meanings["lr_activation_scale"] != meanings["lr_rounding"]


WRONG: list[tuple[list[str], str]] = [
    (["quantize", "--bits", "W44"], "between 2 and 8, got 44"),
    (["quantize", "--bits", "four"], "Bits must look like W4A4"),
    (["quantize", "--recipe", "jeanie"], "no recipe 'jeanie'. There are: genie"),
    (["quantize", "--recipe", "given"], "--images PATH"),
    (["quantize", "--budget", "tiny"], "one of quick, standard, paper"),
    (["quantize", "--ends", "7bit"], "ends must be one of 8bit, same"),
    (["quantize", "--set", "synthesis.stepps=3"], "no setting 'synthesis.stepps'"),
    (["quantize", "--set", "synthesis.steps=few"], "value of type int, got 'few'"),
    (["quantize", "--set", "synthesis.steps"], "--set takes KEY=VALUE"),
    (["quantize", "--device", "tpu"], "--device is cpu or cuda, got 'tpu'"),
    (["quantize", "--seed", "-1"], "Invalid value for '--seed'"),
    (["quantize", "--data", "/nowhere/test.npz"], "/nowhere/test.npz does not exist"),
    (["quantize", "--images", "/nowhere/images"], "/nowhere/images does not exist"),
    (["quantize", "nets/none.py:small"], "nets/none.py does not exist"),
    (["quantize", "somewhere/run"], "no run folder"),
    (["quantize", "--input-size", "3x32"], "--input-size takes whole numbers"),
    (["quantize", "--input-size", "32,32"], "takes channels, height and width"),
    (["quantize", "--mean", "dark"], "--mean takes numbers"),
    (["quantize", "--weights", "none.safetensors"], "none.safetensors"),
    (["quantize", "digits", "extra"], "zsq quantize --help"),
    (["evaluate", "digits"], "Missing option '--data'"),
    (["show", "jeanie"], "no recipe 'jeanie'"),
    (["bench", "/nowhere/bench.toml"], "/nowhere/bench.toml"),
    (["quantise"], "No such command 'quantise'"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG)
def test_wrong_calls(
    arguments: list[str], text: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert text in last_line(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def last_line(capsys: Capture, *arguments: object) -> str:
    """As `refusal`, but lines of a job that had begun may stand before."""
    code, out, err = call(capsys, *arguments)
    assert code == 2 and not out and "Traceback" not in err, err
    return err.splitlines()[-1]


def test_an_existing_folder_is_refused(finished: Path, model: str, folder: Path, capsys: Capture) -> None:
    before = (finished / "run.json").read_bytes()
    text = last_line(capsys, "quantize", model, *INPUT, *SMALL, "--out", finished, "--seed", 1)
    assert "exists and is not empty" in text and "--force" in text
    assert (finished / "run.json").read_bytes() == before
    text = last_line(capsys, "quantize", model, *INPUT, *SMALL, "--out", folder, "--force")
    assert "is not a run folder" in text and (folder / "nets.py").is_file()


@pytest.mark.parametrize("where", ["before", "after", "nowhere"])
def test_unexpected_errors(where: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom\nbang")

    monkeypatch.setattr(jobs, "read_teacher", fail)
    arguments = {
        "before": ["--debug", "quantize"],
        "after": ["quantize", "--debug"],
        "nowhere": ["quantize"],
    }
    code, out, err = call(capsys, *arguments[where])
    assert code == 1 and not out
    if where == "nowhere":
        assert err == "Error: RuntimeError: boom bang. Run again with --debug for the traceback.\n"
    else:
        assert "Traceback (most recent call last)" in err and err.endswith(
            "Error: RuntimeError: boom bang.\n"
        )


@pytest.mark.parametrize("stage", ["synthesize", "reconstruct"])
def test_an_interrupted_run_goes_on(
    stage: str, model: str, finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []

    @contextmanager
    def interrupting(*, plain: bool) -> Iterator[Any]:
        def callback(event: Progress) -> None:
            seen.append(event)
            if event.stage == stage and event.done == (1 if stage == "synthesize" else 5):
                raise KeyboardInterrupt

        yield callback

    arguments = ["quantize", model, *INPUT, *SMALL, "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "reported_progress", interrupting)
        code, out, err = call(capsys, *arguments)
    assert code == 130 and not out and "Traceback" not in err
    hint = err.splitlines()[-1]
    assert hint.startswith("Stopped. What was finished is kept in") and hint.endswith(
        shlex.join(["zsq", *arguments])
    )
    interrupted_at = len(seen)

    @contextmanager
    def watching(*, plain: bool) -> Iterator[Any]:
        yield seen.append

    monkeypatch.setattr(jobs, "reported_progress", watching)
    code, _, err = call(capsys, *arguments)
    assert code == 0, err
    if stage == "reconstruct":  # neither the images nor the first unit (steps 1 to 3) were made again
        again = [event for event in seen[interrupted_at:] if "loss" in event.values]
        assert again[0].stage == "reconstruct" and again[0].done == 4
    for name in ("student.safetensors", "images.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes()


def test_stopping_after_the_run_names_the_way_to_measure(
    model: str, folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "measure", stop)
    out, data = tmp_path / "run", folder / "labelled.npz"
    noise = ["--recipe", "noise-nearest", "--set", "synthesis.num_images=8"]
    code, _, err = call(capsys, "quantize", model, *INPUT, *noise, "--data", data, "--out", out)
    assert code == 130 and err.splitlines()[-1].endswith(f"zsq evaluate {out} --data {data}")
    assert json.loads((out / "run.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_a_signal_stops_the_process_in_order(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zsq", "quantize", model, *INPUT, *SMALL, "--out", str(tmp_path / "run")]
    command += ["--set", "reconstruction.steps=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A parent that runs in the background ignores SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("reconstruct: conv1"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out and "Traceback" not in err
    assert "the same command goes on from there" in err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"


@pytest.mark.parametrize("as_json", [False, True])
def test_bench_prints_the_table(
    as_json: bool, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zsq.bench

    def run_bench(path: Path, *, out: Path | None, write: Path | None, jobs: int, progress: Any) -> Path:
        assert (path.name, out, write, jobs) == ("file.toml", tmp_path, None, 1)
        progress("row 1")
        (tmp_path / "table.md").write_text("| table |\n")
        (tmp_path / "results.json").write_text('{"name": "file"}\n')
        return tmp_path

    monkeypatch.setattr(zsq.bench, "run_bench", run_bench)
    code, out, err = call(capsys, "bench", "file.toml", "--out", tmp_path, *(["--json"] if as_json else []))
    assert (code, out, err) == (0, '{"name": "file"}\n' if as_json else "| table |\n", "row 1\n")


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_ignores_what_was_taken_over() -> None:
    clock = Clock()
    pace = terminal.Pace(clock)
    assert pace.seconds_left(Progress("reconstruct", "a", 100, 400)) is None
    clock.now = 0.1
    assert pace.seconds_left(Progress("reconstruct", "b", 201, 400)) is None
    clock.now = 10.1
    # 10 s for 50 steps, 149 are left
    assert pace.seconds_left(Progress("reconstruct", "b", 251, 400)) == pytest.approx(29.8)
    assert pace.seconds_left(Progress("evaluate", "teacher", 0, 10)) is None


def test_plain_lines_come_now_and_then() -> None:
    clock, lines = Clock(), list[str]()
    callback = terminal.plain_lines(lines.append, clock)
    for step in range(1, 31):
        clock.now = float(step)
        callback(Progress("synthesize", "batch 1 of 1", step, 30, {"loss": 1 / step}))
    callback(Progress("reconstruct", "conv1", 30, 90))
    assert lines == [
        "synthesize: batch 1 of 1, 1 of 30 steps, loss 1",
        "synthesize: batch 1 of 1, 11 of 30 steps, loss 0.09091, about 19 s left",
        "synthesize: batch 1 of 1, 21 of 30 steps, loss 0.04762, about 9.0 s left",
        "synthesize: batch 1 of 1, 30 of 30 steps, loss 0.03333",
        "reconstruct: conv1, 30 of 90 steps",
    ]


def test_bars() -> None:
    screen = io.StringIO()
    with Bars(
        *terminal.columns(), console=Console(file=screen, force_terminal=True, width=100), auto_refresh=False
    ) as bars:
        callback = terminal.stage_bars(bars)
        for done in (1, 5, 10):
            callback(Progress("synthesize", "batch [1] of 1", done, 10, {"loss": 0.5}))
        callback(Progress("evaluate", "teacher", 10, 10))
        callback(Progress("evaluate", "student", 10, 10))
        callback(Progress("reconstruct", "layer1", 3, 10))
        bars.refresh()
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
            ("synthesize", 10, 10),
            ("evaluate teacher", 10, 10),
            ("evaluate student", 10, 10),
            ("reconstruct", 3, 10),
        ]
    assert "synthesize" in screen.getvalue() and "layer1" in screen.getvalue() and "took" in screen.getvalue()


def test_bars_need_a_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with terminal.reported_progress(plain=False) as callback:
        callback(Progress("synthesize", "batch 1 of 1", 1, 2))
    assert capsys.readouterr().err == "synthesize: batch 1 of 1, 1 of 2 steps\n"


def test_texts() -> None:
    assert [seconds_text(s) for s in (0.42, 42.3, 200, 7300)] == [
        "0.4 s",
        "42 s",
        "3 min 20 s",
        "2 h 1 min",
    ]
    assert [bytes_text(n) for n in (12, 1234, 56_789_000, 2e9)] == [
        "12 B",
        "1.2 kB",
        "56.8 MB",
        "2.0 GB",
    ]
    assert read_numbers("3, 32 32", "--input-size", int) == (3, 32, 32)
    assert read_numbers(" 0.5,-1", "--mean", float) == (0.5, -1.0)
    with pytest.raises(UsageError, match="--std"):
        read_numbers("", "--std", float)
    teacher = load_model("digits")
    assert default_out("runs", teacher, "genie", "W4A4", 0) == Path("runs/digits-genie-W4A4")
    teacher.name = "hf-hub:timm/net"
    assert default_out("runs", teacher, "genie", "W4", 2) == Path("runs/hf-hub_timm_net-genie-W4-seed2")


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("--no-such-option", 2)])
def test_a_process_of_a_job_ends_at_once(argument: str, code: int) -> None:
    """What it printed is there, and nothing of the interpreter's own end happens, in which threads abort."""
    program = (
        "import atexit, sys; atexit.register(print, 'the interpreter ends'); from zsq.cli import main; "
        f"sys.argv = ['zsq', {argument!r}]; main()"
    )
    for size in ("1", "2"):
        environment = os.environ | {"WORLD_SIZE": size, "RANK": "0"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == code
        assert ("the interpreter ends" in done.stdout) == (size == "1")
        assert "zsq" in done.stdout or "no-such-option" in done.stderr
