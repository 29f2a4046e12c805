"""Wrong calls of the command line: what they work on, how a case is written, and what each must answer."""

import io
import shlex
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import network_code
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import zsq.cli
from zsq.architectures import network_from_file

NETS = (
    network_code.SMALL
    + """
CLASSES = 6

class Answers(Small):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(super().forward(x))

class Branches(Small):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)

class Huge(Small):
    def forward(self, x):
        return super().forward(x)[:, :, None].expand(-1, -1, 10**13).contiguous()

def small():
    torch.manual_seed(0)
    return Small()

def pair(): return Answers(lambda y: (y, y))
def scalar(): return Answers(lambda y: y.sum())
def nothing(): return Answers(lambda y: None)
def undefined(): return Answers(lambda y: y / 0 * 0)
def maps(): return Answers(lambda y: y[:, :, None, None])
def branches(): return Branches()
def huge(): return Huge()
def without_norms(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6))
def lazy(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6))
def without_layers(): return nn.Sequential(nn.ReLU(), nn.Flatten())
def needs_width(width): return Small()
def raises(): raise KeyError("stage5")
def leaves(): raise SystemExit(3)
def text(): return "a network"
def endless(): return endless()

def diverged():
    net = small()
    net.conv1.weight.data[0, 0, 0, 0] = float("nan")
    return net

def negative():
    net = small()
    net.bn1.running_var.fill_(-1)
    return net
"""
)
SMALL = ("nets.py:small", "--input-size", "3,8,8")
MARKER = "executed.txt"  # what code in a file would make
Maker = Callable[[Path], object]
FAST = ("--recipe", "noise-nearest", "--set", "synthesis.num_images=8")


def nothing(folder: Path) -> None:
    """Files that a case needs besides those that all have: none."""


@dataclass(frozen=True)
class Case:
    """A wrong call.

    Attributes:
        name: unique, for people.
        call: what is typed after `zsq`; @ stands for the small network.
        says: what the message must hold: what came, or where.
        make: puts the case's files into its folder, which is the working folder of the call.
    """

    name: str
    call: str
    says: str
    make: Maker = nothing

    def arguments(self) -> list[str]:
        """The call in words."""
        return [word for text in shlex.split(self.call) for word in (SMALL if text == "@" else (text,))]


def cases(*rows: Sequence[Any]) -> list[Any]:
    """Rows (name, call, says[, make]) as parameters of a test."""
    found = [Case(*row) for row in rows]
    assert len({case.name for case in found}) == len(found)
    return [pytest.param(case, id=case.name) for case in found]


def make_place(folder: Path) -> Path:
    """What every case finds: a model file, weights, labelled images, and a finished run of them in `run`."""
    (folder / "nets.py").write_text(NETS)
    network = network_from_file(f"{folder / 'nets.py'}:small")
    save_file(network.state_dict(), folder / "weights.safetensors")
    torch.save(network.state_dict(), folder / "weights.pt")
    levels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "labelled.npz", images=levels, labels=np.arange(8) % 6)
    where = (f"{folder / 'nets.py'}:small", *SMALL[1:], "--out", str(folder / "run"))
    code, text = run_command(["quantize", *where, *FAST])
    assert code == 0, text
    return folder


def run_command(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit code and stderr of a command in this process; stdout must stay empty if the call is refused."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        zsq.cli.main(list(arguments))
    code = int(caught.value.code or 0)
    assert code == 0 or not out.getvalue()
    return code, err.getvalue()


def check(case: Case, place: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the call in a copy of the place; it is refused as every wrong call must be. The message."""
    shutil.copytree(place, folder, dirs_exist_ok=True)
    monkeypatch.chdir(folder)
    case.make(folder)
    before = snapshot(folder)
    code, err = run_command(case.arguments())
    text = one_paragraph(err)
    assert code == 2, text
    assert case.says in text, text
    assert not (folder / MARKER).exists()
    assert snapshot(folder) == before
    return text


def one_paragraph(err: str) -> str:
    """The message at the end of stderr: one line, after nothing but lines of a job that had begun."""
    assert "Traceback" not in err, err
    lines = err.splitlines()
    assert lines and all(line.strip() for line in lines), err
    assert [line.startswith("Error: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
    assert lines[-1].endswith((".", ")", "?")), lines[-1]
    return lines[-1]


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that lies below a folder: kind, time of change and content; caches of Python left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            about = path.lstat()
            content = path.read_bytes() if path.is_file() and about.st_size < 2**24 else b""
            found[str(path.relative_to(folder))] = (about.st_mode, about.st_mtime_ns, content)
    return found


def write(name: str, content: str | bytes) -> Maker:
    """A maker of one file."""
    data = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return make


class Payload:
    """An object that makes a file when its pickle is loaded by execution."""

    def __reduce__(self) -> Any:
        return open, (MARKER, "w")


def cut(name: str, to: str, size: float) -> Maker:
    """The first part of a file: a share of it, or so many bytes."""

    def make(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / to).write_bytes(content[: int(size * len(content)) if 0 < size < 1 else int(size)])

    return make


def zip_of(name: str, files: dict[str, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Maker:
    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w", kind) as archive:
            for member, content in files.items():
                archive.writestr(member, content)

    return make
