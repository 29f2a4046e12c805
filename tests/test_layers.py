"""Imports follow the layout: stages know only what comes before them; optional packages load when needed."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import zsq

ROOT = Path(zsq.__file__).parent

# What each part may import, besides itself. `SETTINGS` are the recipe's dataclasses: plain numbers that every
# stage takes, below all stages but graph, which has no settings.
GROUND = {
    "errors",
    "rng",
    "distributed",
    "_version",
    "allocator",
    "out_of_memory",
    "amounts",
    "health",
    "paths",
    "replay",
    "kernels",
    "compiled",
    "process_watch",
}
MODELS = {"architectures", "bundled", "weight_files", "teacher", "models"}
SETTINGS = {
    "recipe",
    "images.prompts",
    "images.setting_checks",
    "images.class_settings",
    "images.look_settings",
    "images.settings",
    "images.pixel_settings",
    "images.generator_settings",
    "quant.scheme",
    "recover.settings",
}
LOOKS = {"images.setting_checks", "images.class_settings", "images.look_settings"}
DATA = {"data", "data_arrays", "data_files", "data_hub", "data_tensors", "pictures"}
BENCH = {"bench", "bench_file", "bench_folder", "bench_jobs", "bench_plan", "bench_row", "bench_worker"}
ALLOWED: dict[str, set[str]] = {
    **{name: GROUND | MODELS for name in MODELS},
    **{name: GROUND | MODELS | DATA for name in DATA},
    "graph": GROUND | MODELS,
    "images.prompts": GROUND,
    "images.setting_checks": GROUND,
    "images.class_settings": GROUND | {"images.setting_checks"},
    "images.look_settings": GROUND | {"images.setting_checks"},
    "images.settings": GROUND | LOOKS,
    "images.pixel_settings": GROUND | LOOKS | {"images.settings"},
    "images.generator_settings": GROUND | LOOKS | {"images.settings", "images.pixel_settings"},
    "recover.settings": GROUND | {"images.settings"},
    "quant.scheme": GROUND,
    "recipe": GROUND | SETTINGS,
    "recipe_fields": GROUND | SETTINGS,
    "quant": GROUND | MODELS | SETTINGS | {"graph"},
    "images": GROUND | MODELS | SETTINGS | {"graph", "quant"},
    "recover": GROUND | MODELS | SETTINGS | {"graph", "quant", "images"},
    "evaluate": GROUND | MODELS | SETTINGS | {"graph", "quant", "recover"},
    # Recipes are data: what they compose is parts of stages, never the flow.
    "recipes": GROUND | SETTINGS | {"graph", "quant", "images", "recover"},
    "image_budget": GROUND | SETTINGS,
    "budget": GROUND | SETTINGS | {"image_budget"},
    "progress": set(),
    "student": GROUND | {"graph", "quant"},
    "files": {"errors", "paths"},
    "state": {"errors", "files"},
    "run": GROUND | MODELS | {"images", "student", "run_record", "files"},
    "run_record": {"errors"},
    "without_images": GROUND | SETTINGS | {"graph", "quant", "images", "recover"},
    "student_networks": GROUND
    | MODELS
    | SETTINGS
    | {"graph", "quant", "images", "recover", "progress", "state", "without_images"},
    "student_images": GROUND
    | MODELS
    | SETTINGS
    | {"graph", "images", "progress", "state", "student_networks"},
    "account": {"distributed", "progress", "health"},
    "student_fine_tuning": GROUND
    | SETTINGS
    | MODELS
    | {"graph", "recover", "images", "account", "progress", "state", "student_networks", "class_images"},
    "recipe_images": GROUND
    | MODELS
    | SETTINGS
    | {"graph", "images", "account", "progress", "state", "student_networks", "student_images"}
    | {"text_images", "class_images"},
    "given_images": GROUND | MODELS | SETTINGS,
    "class_images": GROUND | MODELS | SETTINGS | {"graph", "images", "account", "progress", "state"},
    "text_images": GROUND | MODELS | SETTINGS | DATA | {"graph", "images", "account", "progress", "state"},
    "model_card": GROUND | MODELS | {"run", "files", "export"},
    "publish": GROUND | MODELS | {"run", "files", "export", "model_card"},
    "resume": GROUND | MODELS | SETTINGS | {"run", "state", "recipe_fields"},
    "generalisation": GROUND | MODELS | SETTINGS | {"graph", "quant", "images", "recover"},
    "sharpness": GROUND | MODELS | SETTINGS | {"graph", "quant", "images", "recover"},
    "export": GROUND | MODELS | SETTINGS | {"graph", "quant", "student", "run", "files"},
    "distributed": {"errors", "process_watch"},
    "process_watch": {"errors"},
    "out_of_memory": {"errors"},
    "health": {"errors", "distributed"},
    "paths": {"errors"},
    "memory": GROUND | {"graph", "images"},
    "inspection": GROUND | {"graph", "quant", "images"},
    "estimate": GROUND,
    "findings": GROUND | {"graph", "quant", "images"},
    **{name: set() for name in GROUND - {"distributed", "out_of_memory", "health", "paths", "process_watch"}},
}
TOP = {
    "",
    "pipeline",
    "stages",
    "diagnostics",
    "forecast",
    *BENCH,
    "bench_table",
    "report",
    "cli",
    "__main__",
}  # anything below
ABOVE_PIPELINE = {"diagnostics", "forecast", *BENCH, "report", "cli", "__main__"}
REQUIRED = {"torch", "numpy", "safetensors", "typer", "rich", "PIL"}


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name below zsq -> its syntax tree; "" is zsq itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, *, everywhere: bool) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of imports; of those that run when the module loads, or of all of them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", [alias.name for alias in node.names]
        elif everywhere or not (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(node)
        ):
            yield from imports(node, everywhere=everywhere)


def inner(name: str, *, everywhere: bool) -> set[str]:
    """Modules of zsq that a module imports, by dotted name below zsq."""
    found = set()
    for module, names in imports(modules()[name], everywhere=everywhere):
        if module == "zsq" or module.startswith("zsq."):
            below = module.removeprefix("zsq").removeprefix(".")
            members = [f"{below}.{n}".removeprefix(".") for n in names]
            submodules = {m for m in members if m in modules()}
            found |= submodules or {below}
    return found


def part(name: str, known: set[str]) -> str:
    """The entry of the table that a module belongs to: itself or the package that holds it."""
    return name if name in known else name.split(".")[0]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_follow_the_layout(name: str) -> None:
    own = part(name, set(ALLOWED) | TOP)
    imported = inner(name, everywhere=True)
    if own in TOP:
        if own not in ABOVE_PIPELINE and own != "":
            assert not {part(i, TOP) for i in imported} & ABOVE_PIPELINE
        return
    assert own in ALLOWED, f"{name} is in no layer: say in this table what it may import"
    allowed = ALLOWED[own]
    for other in sorted(imported):
        target = part(other, set(ALLOWED) | TOP)
        package = other.split(".")[0]
        assert (
            target == own or target in allowed or package in allowed or package == own.split(".")[0] == own
        ), f"{name} imports {other}, which the layout puts after it"


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_required_packages_at_module_level(name: str) -> None:
    """Optional ones (timm, torchvision, onnx, datasets, sklearn ...) are imported where they are used."""
    packages = {module.split(".")[0] for module, _ in imports(modules()[name], everywhere=False)}
    assert packages <= {"zsq", *REQUIRED, *sys.stdlib_module_names}


def test_no_import_cycles() -> None:
    order = graphlib.TopologicalSorter(
        {name: inner(name, everywhere=False) - {name} for name in modules() if name}
    )
    order.prepare()


def test_the_parser_sees_what_matters() -> None:
    tree = ast.parse(
        "import a.b\n"
        "if TYPE_CHECKING:\n    import c\n"
        "try:\n    from d import e\nexcept ImportError:\n    pass\n"
        "class F:\n    import g\n    def h(self):\n        import i\n"
    )
    assert [module for module, _ in imports(tree, everywhere=False)] == ["a.b", "d", "g"]
    assert [module for module, _ in imports(tree, everywhere=True)] == ["a.b", "c", "d", "g", "i"]
    assert inner("quant.calibrate", everywhere=True) >= {"recipe", "quant.ranges"}


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OPTIONAL = {"timm", "torchvision", "onnx", "onnxruntime", "openvino", "datasets", "sklearn", "diffusers"}


def test_import_zsq_is_light() -> None:
    heavy = OPTIONAL | REQUIRED
    assert fresh(f"import sys, zsq; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_public_names_load_when_used_and_bring_no_optional_package() -> None:
    code = (
        "import sys\n"
        "from zsq import quantize\n"
        "import zsq\n"
        "assert callable(quantize) and quantize is zsq.quantize\n"
        "values = [getattr(zsq, name) for name in zsq.__all__]\n"
        f"print(sorted({OPTIONAL} & set(sys.modules)))\n"
    )
    assert fresh(code) == "[]"


def test_public_names_are_listed_and_others_are_errors() -> None:
    assert len(zsq.__all__) == len(set(zsq.__all__))
    assert set(zsq._WHERE) <= set(zsq.__all__)
    with pytest.raises(AttributeError, match="module 'zsq' has no attribute 'quantise'"):
        zsq.quantise  # noqa: B018
