"""The command that tells what is installed here and what each part enables."""

import importlib
import importlib.metadata
import platform
from contextlib import nullcontext
from typing import Any

from zsq._version import __version__
from zsq.cli.arguments import DebugOption, JsonOption
from zsq.cli.terminal import print_json, print_parts

# What an extra brings, and what it is for.
EXTRAS = {
    "onnx": (("onnx", "onnx_ir", "onnxruntime", "ml_dtypes"), "zsq export, zsq evaluate FILE.onnx"),
    "openvino": (("openvino",), "exported files checked in OpenVINO, zsq export --to openvino"),
    "executorch": (("executorch", "torchao"), "zsq export --to executorch, zsq evaluate FILE.pte"),
    "timm": (("timm", "torchvision"), "models by timm's names"),
    "diffusion": (("diffusers", "transformers", "accelerate"), "recipes genq and mixup_class"),
    "hf": (("datasets", "huggingface_hub"), "data sets and models of the Hugging Face hub"),
    "report": (("jinja2", "matplotlib"), "zsq report, plots of benchmarks"),
    "tensorboard": (("tensorboard",), "zsq quantize --log tensorboard"),
    "demo": (("sklearn",), "make demo"),
}


LOOPS = "used for the loops of quantizers"


def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show versions, devices and extras, and what each extra enables."""
    found = diagnosis()
    if as_json:
        print_json(found)
        return
    lines = [f"zsq {found['zsq']}, torch {found['torch']}, Python {found['python']}, {found['platform']}"]
    lines.append(f"devices: {', '.join(found['devices'])}; {found['threads']} threads")
    lines.append(f"C compiler: {found['compiled_loops']['problem'] or LOOPS}")
    for name, extra in found["extras"].items():
        packages = extra["packages"]
        missing = [package for package, state in packages.items() if state["version"] is None]
        broken = [
            package for package in packages if package not in missing and not packages[package]["usable"]
        ]
        states = [
            f"{word} {', '.join(names)}"
            for word, names in (("missing", missing), ("broken", broken))
            if names
        ]
        lines.append(f"{name:10} {'; '.join(states) or 'ready'}: {extra['enables']}")
        lines += [f"{'':10} {package}: {packages[package]['problem']}" for package in broken]
        if missing:
            lines.append(f"{'':10} pip install 'zsq[{name}]'")
    print_parts("\n".join(lines))


def diagnosis() -> dict[str, Any]:
    """Versions, devices and extras, for JSON."""
    import torch

    devices = ["cpu"] + [
        f"cuda:{k} ({torch.cuda.get_device_name(k)})" for k in range(torch.cuda.device_count())
    ]
    return {
        "zsq": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices,
        "threads": torch.get_num_threads(),
        "compiled_loops": _compiled_loops(),
        "extras": {
            name: {"enables": enables, "packages": _states(name, packages)}
            for name, (packages, enables) in EXTRAS.items()
        },
    }


def _compiled_loops() -> dict[str, Any]:
    """Whether the loops of quantizers are compiled here."""
    from zsq.compiled import COMPILER
    from zsq.quant.fused import kernels

    without = (
        "none that works; results are the same, learning on a CPU takes longer. Install gcc or clang, or "
        f"name one in {COMPILER}"
    )
    usable = kernels() is not None
    return {"usable": usable, "problem": None if usable else without}


def _states(extra: str, packages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """State of each package of an extra, imported as it is where zsq uses it."""
    from zsq.images.text_to_image import without_broken_torchvision

    with without_broken_torchvision() if extra == "diffusion" else nullcontext():
        return {package: _state(package) for package in packages}


def _state(package: str) -> dict[str, Any]:
    """Version of an installed package, and whether it can be imported here."""
    distribution = {"sklearn": "scikit-learn", "onnx_ir": "onnx-ir"}.get(package, package)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return {"version": None, "usable": False, "problem": "not installed"}
    try:
        importlib.import_module(package)
    except Exception as error:  # packages fail in many ways, e.g. torchvision beside another build of torch
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        return {"version": version, "usable": False, "problem": problem}
    return {"version": version, "usable": True, "problem": None}
