"""zsq: low-bit vision models from the trained model alone, without its data.

>>> import zsq
>>> run = zsq.quantize("digits", recipe="genie", bits="W4A4", budget="quick")  # doctest: +SKIP
>>> logits = run.student(images)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from zsq._version import __version__
from zsq.errors import JobError, UsageError, ZsqError

if TYPE_CHECKING:
    from zsq.allocator import keep_freed_memory
    from zsq.diagnostics import Diagnostics, diagnose
    from zsq.evaluate import accuracy
    from zsq.export.latency import Latency, bench_latency
    from zsq.export.onnx import Export, export_onnx
    from zsq.export.pt2 import Program, export_pt2
    from zsq.models import ModelSpec, Teacher, load_model
    from zsq.pipeline import compose_recipe, quantize, synthesize_images
    from zsq.publish import load_pretrained, push, save_pretrained
    from zsq.recipe import Recipe
    from zsq.recipes import RECIPES
    from zsq.report.page import write_report
    from zsq.run import Run, load_run

_WHERE = {
    "Diagnostics": "zsq.diagnostics",
    "Export": "zsq.export.onnx",
    "Latency": "zsq.export.latency",
    "ModelSpec": "zsq.models",
    "Program": "zsq.export.pt2",
    "RECIPES": "zsq.recipes",
    "Recipe": "zsq.recipe",
    "Run": "zsq.run",
    "Teacher": "zsq.models",
    "accuracy": "zsq.evaluate",
    "bench_latency": "zsq.export.latency",
    "compose_recipe": "zsq.pipeline",
    "diagnose": "zsq.diagnostics",
    "export_onnx": "zsq.export.onnx",
    "export_pt2": "zsq.export.pt2",
    "keep_freed_memory": "zsq.allocator",
    "load_model": "zsq.models",
    "load_pretrained": "zsq.publish",
    "load_run": "zsq.run",
    "push": "zsq.publish",
    "save_pretrained": "zsq.publish",
    "quantize": "zsq.pipeline",
    "synthesize_images": "zsq.pipeline",
    "write_report": "zsq.report.page",
}

__all__ = [
    "Diagnostics",
    "Export",
    "RECIPES",
    "JobError",
    "Latency",
    "ModelSpec",
    "Program",
    "Recipe",
    "Run",
    "Teacher",
    "UsageError",
    "ZsqError",
    "__version__",
    "accuracy",
    "bench_latency",
    "compose_recipe",
    "diagnose",
    "export_onnx",
    "export_pt2",
    "keep_freed_memory",
    "load_model",
    "load_pretrained",
    "load_run",
    "push",
    "quantize",
    "save_pretrained",
    "synthesize_images",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import zsq` and `zsq --help` stay quick."""
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'zsq' has no attribute {name!r}")
