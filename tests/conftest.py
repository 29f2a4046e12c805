"""Fixtures that several test files share."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bad_input import make_place
from timm_shim import import_timm
from tiny_networks import CODE
from torch import nn

from zsq.architectures import network_from_file


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The networks of the tests are so small that threads only cost time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, importable even where torchvision's compiled part is not."""
    return import_timm()


@pytest.fixture(scope="session")
def random_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a real text-to-image pipeline of diffusers, with random weights."""
    if importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
    try:
        from tiny_pipeline import build
    finally:
        del sys.path[0]
    path = tmp_path_factory.mktemp("pipeline")
    build().save_pretrained(path)
    return path


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A user's model file that imports a sibling."""
    (tmp_path / "sibling.py").write_text("WIDTH = 4\n")
    path = tmp_path / "nets.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def network(code: Path) -> nn.Module:
    """The user's network with its own random weights."""
    return network_from_file(f"{code}:tiny")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What wrong calls work on: a model file, weights, labelled images and a finished run; to be copied."""
    return make_place(tmp_path_factory.mktemp("place"))
