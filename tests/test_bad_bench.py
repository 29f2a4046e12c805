"""Malformed benchmark files through the command line: exit code 2, one paragraph, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from bad_input import Case, cases, check, run_command, write

GOOD = """
name = "small"
bits = ["W4A4"]
seeds = [0]

[[networks]]
name = "net"
model = "nets.py:small"
weights = "weights.pt"
input_size = [3, 8, 8]
mean = [0, 0, 0]
std = [1, 1, 1]
data = "labelled.npz"

[[recipes]]
name = "noise-nearest"
"""


def edited(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


TEXTS = (
    ("that is empty", "", "networks"),
    ("that is no TOML", "[networks", "not valid TOML"),
    ("of two equal keys", 'name = "a"\nname = "b"\n', "not valid TOML"),
    ("that is no UTF-8", b"\xff\xfe", "not valid TOML"),
    ("of zeros", bytes(100), "not valid TOML"),
    ("of 100000 brackets", "a = " + "[" * 100_000, "not valid TOML"),
    ("without networks", edited("[[networks]]", "[other]"), "networks"),
    ("without recipes", edited("[[recipes]]", "[[recipe]]"), "recipes"),
    ("of one network in single brackets", edited("[[networks]]", "[networks]"), "networks"),
    ("of networks by name", edited("[[networks]]", 'networks = ["net"]\n[[nets]]'), "networks"),
    ("of an unknown key", edited("seeds", "seed"), "seed"),
    ("of a name in numbers", edited('"small"', "3"), "name is 3"),
    ("of a name that is a path", edited('"small"', '"../../small"'), "../../small"),
    ("of a name of nothing", edited('"small"', '""'), "name is ''"),
    ("of a name of 5000 letters", edited('"small"', f'"{"n" * 5000}"'), "nnn"),
    ("of no bits", edited('["W4A4"]', "[]"), "bits"),
    ("of bits in numbers", edited('["W4A4"]', "[4]"), "bits is [4]"),
    ("of bits as one text", edited('["W4A4"]', '"W4A4"'), "bits is 'W4A4'"),
    ("of bits that are none", edited("W4A4", "W0A4"), "0"),
    ("of bits twice", edited('["W4A4"]', '["W4A4", "w4a4"]'), "not all different"),
    ("of seeds as one number", edited("[0]", "0"), "seeds is 0"),
    ("of half a seed", edited("[0]", "[0.5]"), "seeds is [0.5]"),
    ("of a seed below zero", edited("[0]", "[-1]"), "seeds is [-1]"),
    ("of a truth as seed", edited("[0]", "[true]"), "seeds is [True]"),
    ("of a date as seed", edited("[0]", "2026-01-01"), "seeds"),
    ("of an unknown budget", edited("seeds", 'budget = "tiny"\nseeds'), "tiny"),
    ("of a budget in numbers", edited("seeds", "budget = 1\nseeds"), "budget is 1"),
    ("of unknown ends", edited("seeds", 'ends = "5bit"\nseeds'), "5bit"),
    ("of an unknown device", edited("seeds", 'device = "tpu"\nseeds'), "tpu"),
    ("of a device that is not there", edited("seeds", 'device = "cuda:99"\nseeds'), "cuda:99"),
    ("of diagnostics below zero", edited("seeds", "diagnostics = -1\nseeds"), "diagnostics is -1"),
    ("of settings in a list", edited("seeds", "set = [1]\nseeds"), "set is [1]"),
    ("of an unknown setting", edited("seeds", 'set = { "a.b" = 1 }\nseeds'), "a.b"),
    ("of a setting of a list", edited("seeds", 'set = { "num_holdout" = [1] }\nseeds'), "num_holdout"),
    ("of a setting in words", edited("seeds", 'set = { "num_holdout" = "x" }\nseeds'), "num_holdout"),
    ("of a setting of nan", edited("seeds", 'set = { "calibration.exponent" = nan }\nseeds'), "nan"),
    (
        "of bits as a setting",
        edited("seeds", 'set = { "scheme.weight_bits" = 2 }\nseeds'),
        "scheme.weight_bits",
    ),
    ("without a model", edited('model = "nets.py:small"\n', ""), "model"),
    ("of a model that is not there", edited("nets.py:small", "gone.py:small"), "gone.py"),
    ("of a factory that is not there", edited("nets.py:small", "nets.py:gone"), "gone"),
    ("of a model in a list", edited('"nets.py:small"', '["nets.py:small"]'), "model is"),
    ("of weights that are not there", edited("weights.pt", "gone.pt"), "gone.pt"),
    ("of weights of a zero byte", edited("weights.pt", "w\\u0000.pt"), "cannot be reached"),
    ("of weights of 5000 letters", edited("weights.pt", "w" * 5000), "www"),
    ("of weights of an unset variable", edited("weights.pt", "${NO_SUCH_VARIABLE}/w.pt"), "NO_SUCH_VARIABLE"),
    ("of weights that are data", edited("weights.pt", "labelled.npz"), ".npz"),
    ("of an input of two", edited("[3, 8, 8]", "[8, 8]"), "8,8"),
    ("of an input of zero", edited("[3, 8, 8]", "[3, 0, 8]"), "3,0,8"),
    ("of an input of half", edited("[3, 8, 8]", "[3, 8.5, 8]"), "input_size"),
    ("of an input beyond all numbers", edited("[3, 8, 8]", "[3, 8, 9223372036854775807]"), "input size"),
    ("of a mean of one", edited("[0, 0, 0]", "[0]"), "mean"),
    ("of a mean of nan", edited("[0, 0, 0]", "[nan, 0, 0]"), "nan"),
    ("of a std of zero", edited("[1, 1, 1]", "[1, 0, 1]"), "1,0,1"),
    ("of a std in words", edited("[1, 1, 1]", '["a", "b", "c"]'), "std"),
    ("without data", edited('data = "labelled.npz"\n', ""), "data"),
    ("of data that is not there", edited("labelled.npz", "gone.npz"), "gone.npz"),
    ("of data of another kind", edited("labelled.npz", "weights.pt"), "weights.pt"),
    ("of an unknown recipe", edited("noise-nearest", "jeanie"), "jeanie"),
    ("of a recipe in numbers", edited('"noise-nearest"', "1"), "name is 1"),
    ("of a recipe that needs images", edited("noise-nearest", "given"), "given"),
    ("of images for a recipe that makes some", GOOD + "images = true\n", "noise-nearest"),
    ("of images in words", GOOD + 'images = "yes"\n', "images is 'yes'"),
    ("of an unknown placement", GOOD + 'placement = "moon"\n', "moon"),
    ("of a recipe twice", GOOD + '[[recipes]]\nname = "noise-nearest"\n', "not all different"),
    ("of an unknown key in a recipe", GOOD + "steps = 3\n", "steps"),
)
CASES = cases(
    *((f"a file {name}", "bench bench.toml", says, write("bench.toml", text)) for name, text, says in TEXTS),
    ("a file that is not there", "bench gone.toml", "gone.toml"),
    ("a file that is a folder", "bench run", "run"),
    ("a file of 5000 letters", "bench " + "b" * 5000, "bbb"),
    ("a folder of something else", "bench bench.toml --out run", "run", write("bench.toml", GOOD)),
    ("a folder that is a file", "bench bench.toml --out nets.py", "nets.py", write("bench.toml", GOOD)),
    ("a folder below a file", "bench bench.toml --out nets.py/b", "nets.py/b", write("bench.toml", GOOD)),
    (
        "a table over something else",
        "bench bench.toml --out o --write nets.py",
        "nets.py",
        write("bench.toml", GOOD),
    ),
    (
        "a table below a file",
        "bench bench.toml --out o --write nets.py/t",
        "nets.py/t",
        write("bench.toml", GOOD),
    ),
    ("a table that is a folder", "bench bench.toml --out o --write run", "run", write("bench.toml", GOOD)),
)


@pytest.mark.parametrize("case", CASES)
def test_files(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


ROWS = (
    "",
    "{}\n3\n[1]\n",
    "[" * 100_000,
    '{"key": [1], "top1": 1, "seconds": {}, "versions": {}, "machine": "", "finished": ""}\n',
)


def test_damaged_rows_are_done_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    quick = edited('name = "noise-nearest"', 'name = "noise-nearest"\nset = { "synthesis.num_images" = 4 }')
    (tmp_path / "bench.toml").write_text(quick)
    assert run_command(["bench", "bench.toml", "--out", "o"])[0] == 0
    row = json.loads((tmp_path / "o/rows.jsonl").read_text())
    wrong = {"key": 3, "top1": "x", "seconds": [], "versions": None, "machine": {}, "finished": 0}
    for text in (*(json.dumps({**row, key: value}) for key, value in wrong.items()), *ROWS):
        (tmp_path / "o/rows.jsonl").write_text(text)
        (tmp_path / "o/float.json").write_text(text)
        code, err = run_command(["bench", "bench.toml", "--out", "o"])
        assert code == 0 and "1 rows, 0 of them finished before" in err, (text[:200], err)
