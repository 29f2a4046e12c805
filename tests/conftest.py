"""Fixtures that several test files share."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
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
