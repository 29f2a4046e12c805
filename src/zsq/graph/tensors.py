"""Tensors and modules at dotted names of a module tree."""

import operator

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors live (of the first one; cpu if it has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer at a dotted name."""
    value = operator.attrgetter(name)(module)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is not a tensor")
    return value


def make_submodule(root: nn.Module, name: str) -> nn.Module:
    """The submodule at a dotted name ("" is the root); plain modules are made on the way where missing."""
    module = root
    for part in name.split(".") if name else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module
