"""The documentation: its commands and snippets run, every page is in the menu, every recipe has a page."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_readme import write_model
from typer.testing import CliRunner

import zsq
from zsq.bench_file import read_bench
from zsq.cli import app
from zsq.recipe_fields import flat

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PACKAGES = {
    " export ": "onnxruntime",
    "--to openvino": "openvino",
    ".xml": "openvino",
    "latency": "onnxruntime",
}
SMALL = {
    "synthesis.num_images": "8",
    "synthesis.batch_size": "8",
    "synthesis.steps": "2",
    "reconstruction.steps": "2",
    "num_holdout": "4",
    "fine_tuning.epochs": "1",
    "fine_tuning.iterations": "1",
    "fine_tuning.batch_size": "4",
}
NOISE = 'recipe="noise-nearest", overrides={"synthesis.num_images": 8}'


def name_of(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [block for name, block in found if name == language]


def small(command: str) -> list[str]:
    """The arguments of a zsq command, with as small settings as its recipe takes."""
    words = shlex.split(command)[1:]
    if words[0] not in ("quantize", "synthesize"):
        return words
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "genie"
    given = [words[i + 1].split("=") for i, word in enumerate(words) if word == "--set"]
    known = flat(zsq.compose_recipe(recipe, overrides=dict(given)))
    if recipe != "given":  # it takes all images that it is given
        for key, value in SMALL.items():
            words += ["--set", f"{key}={value}"] if key in known and known[key] is not None else []
    elif "reconstruction.steps" in known:
        words += ["--set", "reconstruction.steps=2"]
    return [re.sub(r"gradient_cover:\d+", "gradient_cover:4", word) for word in words]


def run(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name, and a run in runs/mine."""
    folder = tmp_path_factory.mktemp("user")
    write_model(folder)
    model = "path/to/file.py:factory --weights model.safetensors --input-size 3,32,32"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(small(f"zsq quantize {model} --out runs/mine"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=name_of)
def test_commands(page: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "user"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
    assert commands and all(line.startswith("zsq ") for line in commands)
    for line in commands:
        for part, package in PACKAGES.items():
            if part in line:
                pytest.importorskip(package)
        run(small(line))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name_of)
def test_snippets(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = [b for b in blocks(page, "python") if "torchrun" not in b and 'device("cuda")' not in b]
    names: dict[str, object] = {}
    for snippet in snippets:
        settings = {
            "synthesis.num_images": 8,
            "synthesis.steps": 2,
            "reconstruction.steps": 2,
            "num_holdout": 4,
        }
        quick = snippet.replace('budget="quick"', f'budget="quick", overrides={settings!r}')
        exec(quick, names)


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    names: dict[str, object] = {}
    for cell in cells:
        source = "".join(cell["source"]).replace('": 60', '": 2').replace('num_images": 64', 'num_images": 8')
        exec(source.replace('recipe="noise-nearest",', f"{NOISE}, "), names)
    assert (tmp_path / "runs/tutorial/run.json").is_file()


def test_benchmark_file(finished: Path, tmp_path: Path) -> None:
    (file,) = blocks(ROOT / "docs/benchmarks.md", "toml")
    (tmp_path / "small.toml").write_text(file)
    bench = read_bench(tmp_path / "small.toml")
    assert [entry.label for entry in bench.recipes] == ["genie", "noise-nearest", "twice the steps"]


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(menu) == sorted(map(name_of, PAGES))


def test_every_recipe_has_a_page() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in PAGES if p.parent.name == "methods")
    documented = set(re.findall(r"^::: zsq\.recipes\.(\w+)$", text, re.M))
    modules = {p.stem for p in (ROOT / "src/zsq/recipes").glob("*.py")}
    assert modules - documented == {"__init__", "baselines", "sources"}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).is_file(), f"{page}: {target}"
