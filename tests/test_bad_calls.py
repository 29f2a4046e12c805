"""Wrong options, names and settings: exit code 2, one paragraph that names what came, nothing written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import Case, cases, check, one_paragraph, snapshot, write

LONG = "x" * 5000


OPTIONS = cases(
    ("no such command", "quantise", "quantise"),
    ("no such option", "quantize --fast", "--fast"),
    ("an option without its value", "quantize --bits", "--bits"),
    ("an argument too many", "quantize digits extra", "extra"),
    ("a flag with a value", "recipes --json=yes", "--json"),
    ("bits in words", "quantize @ --bits four", "four"),
    ("bits without a letter", "quantize @ --bits 4", "4"),
    ("no bits", "quantize @ --bits ''", "''"),
    ("bits of the wrong letter", "quantize @ --bits A4W4", "A4W4"),
    ("half a bit", "quantize @ --bits W4.5A4", "W4.5A4"),
    ("one bit", "quantize @ --bits W1A4", "1"),
    ("nine bits", "quantize @ --bits W4A9", "9"),
    ("very many bits", f"quantize @ --bits W{'9' * 5000}", "9"),
    ("bits below zero", "quantize @ --bits W-4A4", "W-4A4"),
    ("bits in other digits", "quantize @ --bits W٤A٤", "٤"),
    ("ends", "quantize @ --ends 7bit", "7bit"),
    ("placement", "quantize @ --placement gpu", "gpu"),
    ("budget", "quantize @ --budget tiny", "tiny"),
    ("recipe", "quantize @ --recipe jeanie", "jeanie"),
    ("no recipe", "quantize @ --recipe ''", "''"),
    ("a path as a recipe", "quantize @ --recipe ../genie.py", "../genie.py"),
    ("a recipe that needs images", "quantize @ --recipe given", "--images"),
    ("device", "quantize @ --device tpu", "tpu"),
    ("device number", "quantize @ --device cuda:one", "cuda:one"),
    ("device that is not there", "quantize @ --device cuda:77", "cuda"),
    ("seed below zero", "quantize @ --seed -1", "--seed"),
    ("seed in words", "quantize @ --seed zero", "--seed"),
    ("half a seed", "quantize @ --seed 0.5", "--seed"),
    ("input size with crosses", "quantize nets.py:small --input-size 3x8x8", "3x8x8"),
    ("input size of two", "quantize nets.py:small --input-size 8,8", "8,8"),
    ("input size of four", "quantize nets.py:small --input-size 1,3,8,8", "1,3,8,8"),
    ("input size of zero", "quantize nets.py:small --input-size 3,0,8", "3,0,8"),
    ("input size below zero", "quantize nets.py:small --input-size 3,-8,8", "3,-8,8"),
    ("input size with a fraction", "quantize nets.py:small --input-size 3,8.5,8", "3,8.5,8"),
    ("input size of channels that do not fit", "quantize nets.py:small --input-size 5,8,8", "5, 8, 8"),
    ("input size beyond all memory", "quantize nets.py:small --input-size 3,9999999,9999999", "9999999"),
    ("input size beyond all numbers", f"quantize nets.py:small --input-size 3,{'9' * 40},8", "9999"),
    ("no input size", "quantize nets.py:small", "--input-size"),
    ("mean in words", "quantize @ --mean dark", "dark"),
    ("mean of two", "quantize @ --mean 0.5,0.5", "0.5,0.5"),
    ("mean of nan", "quantize @ --mean nan,0,0", "nan"),
    ("mean of infinity", "quantize @ --mean 0,inf,0", "inf"),
    ("no mean", "quantize @ --mean ''", "''"),
    ("std of zero", "quantize @ --std 1,0,1", "1,0,1"),
    ("std below zero", "quantize @ --std -1,1,1", "-1,1,1"),
    ("std of one", "quantize @ --std 0.5", "0.5"),
    ("std that overflows", "quantize @ --std 1e999,1,1", "inf"),
    ("memory in words", "quantize @ --memory plenty", "plenty"),
    ("memory below zero", "quantize @ --memory -1GiB", "-1GiB"),
    ("no memory", "quantize @ --memory 0", "0"),
    ("memory of an unknown unit", "quantize @ --memory 4XB", "4XB"),
    ("memory of 5000 digits", f"quantize @ --memory {'9' * 5000}", "999"),
    ("log", "quantize @ --log csv", "csv"),
    ("filter without a number", "quantize @ --filter energy", "energy"),
    ("filter without a name", "quantize @ --filter :3", ":3"),
    ("filter with words", "quantize @ --filter energy:many", "energy:many"),
    ("unknown filter", "quantize @ --filter best:3", "best"),
    ("filter of nothing", "quantize @ --filter energy:0", "filter.keep"),
    ("filter for transformers", "quantize @ --filter patch_entropy:3", "patch_entropy"),
    ("batch of nothing", "evaluate run --data labelled.npz --batch-size 0", "--batch-size"),
    ("limit of nothing", "evaluate run --data labelled.npz --limit 0", "--limit"),
    ("diagnostics of a model", "evaluate @ --data labelled.npz --diagnostics 3", "nets.py:small"),
    ("no data", "evaluate run", "--data"),
    ("weights of a run", "evaluate run --data labelled.npz --weights weights.pt", "run"),
    ("input size of a run", "quantize run --input-size 3,8,8", "run"),
    ("jobs below one", "bench bench.toml --jobs 0", "--jobs"),
    ("kind of export", "export run --to tflite", "tflite"),
    ("target of export", "export run --target coral", "coral"),
    ("target of a program", "export run --to pt2 --target openvino", "--target"),
    ("container of export", "export run --container int5", "int5"),
    ("container of a program", "export run --to pt2 --container int8", "--container"),
    ("ending of an IR", "export run --to openvino --out student.onnx", "student.onnx"),
    ("latency of no images", "bench-latency run --batch-size 0", "--batch-size"),
    ("latency of no rounds", "bench-latency run --rounds 0", "--rounds"),
    ("repository", "push run --to name/of/too/many", "name/of/too/many"),
    ("repository without a user", "push run --to name", "name"),
    ("report of nothing", "report", "RUN"),
    ("show nothing", "show", "RECIPE"),
    ("show what is not there", "show jeanie", "jeanie"),
    ("show for half an image", "show genie --input-size 3,8", "3,8"),
)

SETTINGS = cases(
    *(
        (f"{where} {name}", f"{where} --set {text}", says)
        for where in ("quantize @", "show genie", "synthesize @")
        for name, text, says in (
            ("a setting that is not there", "synthesis.stepps=3", "synthesis.stepps"),
            ("a setting in words", "synthesis.steps=few", "few"),
            ("a setting of nan", "reconstruction.lr_rounding=nan", "nan"),
        )
    ),
    ("a setting without a value", "quantize @ --set synthesis.steps", "synthesis.steps"),
    ("a setting with nothing", "quantize @ --set synthesis.steps=", "synthesis.steps="),
    ("a value without a setting", "quantize @ --set =3", "=3"),
    ("nothing to set", "quantize @ --set ''", "''"),
    ("a setting below zero", "quantize @ --set synthesis.steps=-3", "-3"),
    ("a setting of infinity", "quantize @ --set calibration.exponent=inf", "inf"),
    ("a setting with a fraction", "quantize @ --set synthesis.num_images=1.5", "1.5"),
    ("no images", "quantize @ --set synthesis.num_images=0", "num_images"),
    ("no steps", "quantize @ --set reconstruction.steps=0", "reconstruction.steps"),
    ("a batch of none", "quantize @ --set reconstruction.batch_size=0", "reconstruction.batch_size"),
    ("a probability above one", "quantize @ --set reconstruction.drop_prob=1.5", "1.5"),
    ("a share above one", "quantize @ --set calibration.percentile=2", "2"),
    ("one of several", "quantize @ --set calibration.method=best", "best"),
    ("precision", "quantize @ --set synthesis.precision=float8", "float8"),
    ("a truth value", "quantize @ --set fold_batch_norm=perhaps", "perhaps"),
    ("none for a number", "quantize @ --set synthesis.steps=none", "none"),
    ("a stage as a number", "quantize @ --set synthesis=3", "synthesis"),
    ("inside a number", "quantize @ --set num_holdout.steps=3", "num_holdout"),
    ("inside a stage that is off", "quantize @ --set refinement.steps=3", "refinement"),
    ("an attribute of the code", "quantize @ --set synthesis.__class__=3", "__class__"),
    ("bits as a setting", "quantize @ --set scheme.weight_bits=99", "99"),
    ("dots", "quantize @ --set synthesis..steps=3", "synthesis..steps"),
    ("a name of 5000 letters", f"quantize @ --set {LONG}=3", "xxx"),
    ("turns without a generator", "quantize @ --set fine_tuning=on --set fine_tuning.turns=on", "turns"),
    (
        "class names that are not there",
        "quantize @ --recipe genq --set synthesis.class_names=no.txt",
        "no.txt",
    ),
    (
        "class names that are a folder",
        "quantize @ --recipe genq --set synthesis.class_names=run",
        "run",
    ),
    *(
        (
            name,
            "quantize @ --recipe genq --set synthesis.class_names=names" + ending,
            says,
            write("names" + ending, text),
        )
        for name, ending, text, says in (
            ("too few class names", ".txt", "cat\ndog\n", "2 class names"),
            ("too many class names", ".txt", "a\nb\nc\nd\ne\nf\ng\n", "7 class names"),
            ("no class names", ".txt", "", "names.txt"),
            ("class names without a name", ".txt", "\tcat\n" * 6, "names.txt"),
            ("class names that are no text", ".txt", b"\xff\xfe\x00", "names.txt"),
            ("class names that are no JSON", ".json", "{", "names.json"),
            ("class names as a number", ".json", "6", "names.json"),
            ("class names with gaps", ".json", '{"0": "a", "2": "b"}', "names.json"),
            ("class names of nothing", ".json", '{"0": []}', "names.json"),
            ("class names in 100000 brackets", ".json", "[" * 100_000, "names.json"),
        )
    ),
)

MODELS = cases(
    ("a model with a line break and colours", "quantize 'sub/\n\n\x1b[31mrun'", "x1b[31mrun"),
    ("an option with a line break", "quantize '--bi\n\nts'", "--bi"),
    ("no model", "quantize ''", "''"),
    ("a file that is not there", "quantize none.py:small --input-size 3,8,8", "none.py"),
    ("a folder that is no run", "quantize sub/run", "sub/run"),
    (
        "a folder called like a file",
        "quantize sub.py:small --input-size 3,8,8",
        "sub.py",
        lambda f: (f / "sub.py").mkdir(),
    ),
    ("a model of 5000 letters", f"quantize {LONG}", "xxx"),
    ("a file of 5000 letters", f"quantize {LONG}.py:small --input-size 3,8,8", "xxx"),
    ("an unknown network", "quantize resnet1800", "resnet1800"),
    ("weights as a model", "quantize weights.safetensors", "weights.safetensors"),
    ("no factory", "quantize nets.py --input-size 3,8,8", "nets.py"),
    ("an empty factory", "quantize nets.py: --input-size 3,8,8", "nets.py:"),
    ("a factory that is not there", "quantize nets.py:smal --input-size 3,8,8", "smal"),
    ("a factory that is a number", "quantize nets.py:CLASSES --input-size 3,8,8", "CLASSES"),
    ("a factory that is a class with arguments", "quantize nets.py:Answers --input-size 3,8,8", "Answers"),
    *(
        (f"a factory: {name}", f"quantize nets.py:{name} --input-size 3,8,8", says)
        for name, says in (
            ("needs_width", "needs_width"),
            ("raises", "stage5"),
            ("leaves", "SystemExit"),
            ("text", "str"),
            ("endless", "RecursionError"),
            ("pair", "tuple"),
            ("scalar", "scalar"),
            ("nothing", "NoneType"),
            ("undefined", "NaN"),
            ("diverged", "conv1.weight"),
            ("negative", "NaN"),
            ("branches", "nets.py, line"),
            ("huge", "huge"),
            ("without_layers", "nothing to quantize"),
            ("without_norms", "BatchNorm"),
            ("lazy", "lazy"),
        )
    ),
    (
        "a network without classes",
        "evaluate nets.py:maps --input-size 3,8,8 --data labelled.npz",
        "classifier",
    ),
    *(
        (f"a model file: {name}", "quantize user.py:small --input-size 3,8,8", says, write("user.py", text))
        for name, text, says in (
            ("of bad grammar", "def small(:\n", "SyntaxError"),
            ("that raises", "1 / 0\n", "ZeroDivisionError"),
            ("that exits", "raise SystemExit('no')\n", "SystemExit"),
            ("that lacks a package", "import no_such_package\n", "no_such_package"),
            ("of zeros", b"\0" * 100, "user.py"),
            ("of bytes", bytes(range(128, 256)), "user.py"),
            ("that is empty", "", "small"),
        )
    ),
)


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", MODELS)
def test_models(case: Case, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, place, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantize", "--bits"], "--bits"),
        (["bench", "gone.toml"], "gone.toml"),
        (["quantize", "nets.py:raises", "--input-size", "3,8,8"], "stage5"),
    ],
)
def test_a_process_of_its_own(arguments: list[str], says: str, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    before = snapshot(tmp_path)
    command = [sys.executable, "-m", "zsq", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert says in one_paragraph(done.stderr)
    assert snapshot(tmp_path) == before
