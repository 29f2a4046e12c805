"""Import timm where torchvision's wheel does not fit the installed torch (a CPU build of torch, for one).

timm imports torchvision. A torchvision whose compiled part does not load fails at import, because it
registers shape rules for operators that do not exist then: `RuntimeError: operator torchvision::nms does not
exist`. Only in that case the two operators are declared, without an implementation, and the import is
repeated; timm's models never call them. For tests only.
"""

import importlib
import sys
from types import ModuleType

import torch

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_library: list[torch.library.Library] = []  # the declarations live as long as this reference


def _purge(package: str) -> None:
    """Forget the half-imported modules of `package`."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]


def import_timm() -> ModuleType:
    """timm, with torchvision importable.

    Raises:
        ModuleNotFoundError: timm or torchvision is not installed.
        RuntimeError: torchvision fails to import for another reason.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING_OPERATOR not in str(error):
            raise
        _purge("torchvision")
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.append(library)
        importlib.import_module("torchvision")
    return importlib.import_module("timm")
