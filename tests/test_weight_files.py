"""Weight files: what trainers leave, number formats, and each wrong file."""

import argparse
import builtins
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_networks import NORM, message, same_weights
from torch import Tensor, nn

from zsq.models import load_model
from zsq.weight_files import strip_prefixes


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def under(*keys: str) -> Callable[[Mapping[str, Tensor]], object]:
    """A checkpoint that holds the state dict under `keys`, with what trainers add."""

    def wrap(state: Mapping[str, Tensor]) -> object:
        content: object = dict(state)
        for key in reversed(keys):
            content = {"epoch": 3, key: content, "optimizer": {"lr": 0.1}}
        return content

    return wrap


def prefixed(prefix: str) -> Callable[[Mapping[str, Tensor]], object]:
    return lambda state: {prefix + name: value for name, value in state.items()}


class Touch:
    """An object whose unpickling would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return builtins.open, (self.path, "w")


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (dict, None),
        (under("state_dict"), "from 'state_dict'"),
        (under("model"), "from 'model'"),
        (under("model_state_dict"), "from 'model_state_dict'"),
        (under("ema", "model"), "from 'ema/model'"),
        (under("state_dict_ema"), "from 'state_dict_ema'"),
        (under("model_ema"), "from 'model_ema'"),
        (prefixed("module."), "prefix 'module.'"),
        (prefixed("_orig_mod."), "prefix '_orig_mod.'"),
        (prefixed("model."), "prefix 'model.'"),
        (prefixed("module._orig_mod."), "prefix 'module._orig_mod.'"),
        (prefixed("model.module.module."), "prefix 'model.module.module.'"),
        (lambda state: {**state, "n_averaged": torch.tensor(3)}, None),
        (lambda state: {**state, "epoch": 3}, "no tensor in w.pt: epoch"),
        (lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, None),
        (
            lambda state: {"model": {k: 0 * v for k, v in state.items()}, "model_ema": dict(state)},
            "'model_ema' was taken, not 'model'",
        ),
        (lambda state: {"ema": {"decay": 0.99}, "model": dict(state)}, "from 'model'"),
    ],
)
def test_recognises_what_trainers_leave(
    code: Path,
    network: nn.Module,
    tmp_path: Path,
    wrap: Callable[[Mapping[str, Tensor]], object],
    note: str | None,
) -> None:
    file = save(wrap(network.state_dict()), tmp_path / "w.pt")
    teacher = load_model(f"{code}:tiny", weights=file, **NORM)
    assert same_weights(teacher, network)
    assert (note in " ".join(teacher.notes)) if note else teacher.notes == ()


def test_prefixes_are_kept_where_the_network_has_them() -> None:
    state = {"model.weight": torch.zeros(1), "model.bias": torch.zeros(1)}
    assert strip_prefixes(state, state.keys()) == (state, [])
    clash = {"model.weight": torch.zeros(1), "weight": torch.zeros(1)}
    assert strip_prefixes(clash, ["weight", "bias"]) == (clash, [])


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted(
    code: Path, network: nn.Module, tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    state, file = network.to(dtype).state_dict(), tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    teacher = load_model(f"{code}:tiny", weights=file, **NORM)
    assert same_weights(teacher, network) and f"stores {str(dtype)[6:]};" in teacher.notes[0]


def test_says_what_does_not_fit(code: Path, network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    state["extra"] = state.pop("conv.weight")
    state["model.bias"] = torch.zeros(7)
    file = save(state, tmp_path / "w.pt")
    text = message(lambda: load_model(f"{code}:tiny", weights=file, **NORM))
    assert "1 missing: conv.weight; 1 unexpected: extra; 1 of another shape: model.bias (7,)" in text
    assert "instead of (5,)" in text


def test_names_only_the_first_few(code: Path, tmp_path: Path) -> None:
    file = save({"w": torch.zeros(1)}, tmp_path / "w.pt")
    text = message(lambda: load_model(f"{code}:tiny", weights=file, **NORM))
    assert "8 missing: conv.weight, conv.bias, bn.weight and 5 more; 1 unexpected: w." in text


def test_refuses_pickled_objects(code: Path, network: nn.Module, tmp_path: Path) -> None:
    with_arguments = {"args": argparse.Namespace(lr=0.1), "model": network.state_dict()}
    contents: list[tuple[object, str]] = [(with_arguments, "argparse.Namespace"), (nn.ReLU(), "torch.nn")]
    for content, what in contents:
        save(content, tmp_path / "w.pt")
        text = message(lambda: load_model(f"{code}:tiny", weights=tmp_path / "w.pt", **NORM))
        assert f"pickled objects ({what}" in text and "torch.save(model.state_dict()" in text


def test_refused_code_is_not_executed(code: Path, tmp_path: Path) -> None:
    file = save({"w": Touch(str(tmp_path / "touched"))}, tmp_path / "w.pt")
    assert "zsq refuses" in message(lambda: load_model(f"{code}:tiny", weights=file, **NORM))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.pt", b"", "could not be read (EOFError)"),
        ("text.pth", b"version https://git-lfs.github.com/spec/v1\n", "could not be read"),
        ("text.bin", b"hello world\n", "could not be read"),
        ("text.safetensors", b"hello world\n", "could not be read as safetensors"),
        ("empty.safetensors", b"", "could not be read as safetensors"),
        ("weights.h5", b"x", "unknown ending '.h5'"),
    ],
)
def test_rejects_other_files(code: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert words in message(lambda: load_model(f"{code}:tiny", weights=tmp_path / name, **NORM))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_rejects_files_cut_short(code: Path, network: nn.Module, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(network.state_dict(), file)
    else:
        torch.save(network.state_dict(), file)
    file.write_bytes(file.read_bytes()[:-200])
    assert "cut short" in message(lambda: load_model(f"{code}:tiny", weights=file, **NORM))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        (torch.zeros(1), "holds a Tensor, not a state dict"),
        ({"epoch": 3, "lr": 0.1}, "holds no tensors by name; its entries are epoch, lr"),
        ({}, "holds no tensors by name"),
    ],
)
def test_rejects_what_is_no_state_dict(code: Path, tmp_path: Path, content: object, words: str) -> None:
    file = save(content, tmp_path / "w.pt")
    assert words in message(lambda: load_model(f"{code}:tiny", weights=file, **NORM))


def test_rejects_integer_weights(code: Path, network: nn.Module, tmp_path: Path) -> None:
    state = network.state_dict()
    state["conv.weight"] = state["conv.weight"].to(torch.int8)
    file = save(state, tmp_path / "w.pt")
    assert "conv.weight (int8)" in message(lambda: load_model(f"{code}:tiny", weights=file, **NORM))


@pytest.mark.parametrize(("name", "words"), [("absent.pt", "does not exist"), ("", "is a folder")])
def test_rejects_a_missing_file(code: Path, tmp_path: Path, name: str, words: str) -> None:
    assert words in message(lambda: load_model(f"{code}:tiny", weights=tmp_path / name, **NORM))
