"""A run as OpenVINO's own form, the IR: an .xml with a .bin beside it."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zsq.errors import JobError, UsageError, import_extra
from zsq.export.account import account_of, read_account, spec_in, to_bytes
from zsq.export.engine import EngineFile, check_input
from zsq.export.onnx import checked, metadata_of, require_packages
from zsq.export.openvino import EXTRA, OpenVinoCheck, OpenVinoModel, check_in_openvino
from zsq.export.targets import TARGETS, container_widths
from zsq.files import check_free, write_atomic
from zsq.run import Run, load_run


@dataclass(frozen=True)
class Representation:
    """A written IR.

    Attributes:
        path, weights: the .xml and the .bin.
        settings: the file that says how to run it (`path` with .json after it).
        size: bytes of both.
        check: how it compared with the student, read back from where it was written.
        notes: what was changed or has to be known, in sentences.
    """

    path: Path
    weights: Path
    settings: Path
    size: int
    check: OpenVinoCheck
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What the settings file holds."""
        return {
            "file": self.path.name,
            "bytes": self.size,
            **self.check.to_json(),
            "notes": list(self.notes),
        }


def export_openvino(
    run: Run | str | Path, path: str | Path, *, container: str | None = None, force: bool = False
) -> Representation:
    """Write a run as OpenVINO's IR, after its runtime has computed the same with it as PyTorch.

    Args:
        run: a Run, or the folder of one.
        path: file to write, .xml; beside it go the weights (.bin) and `path`.json with the check.
        container: "int4" or "int8", see `export_onnx`.
        force: replace the files if they exist.

    Raises:
        UsageError: `path` does not end in .xml, or as for `export_onnx`.
        JobError: as for `export_onnx`.
    """
    target = TARGETS["openvino"]
    widths = container_widths(target, container)
    require_packages()
    openvino: Any = import_extra("openvino", EXTRA)
    file = Path(path)
    if file.suffix != ".xml":
        raise UsageError(f"The file of an OpenVINO IR ends in .xml, got {file}.")
    files = file, file.with_suffix(".bin"), account_of(file)
    check_free(files, force=force)
    loaded = run if isinstance(run, Run) else load_run(run)
    about = metadata_of(loaded, target, container)
    found = checked(loaded, target, widths, about)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "student.xml"
        model = openvino.Core().read_model(found.content)
        for key, value in about.items():
            model.set_rt_info(value, key.split("."))
        openvino.save_model(model, str(whole), compress_to_fp16=False)
        check = check_in_openvino(whole, found.reference)
        written = [whole.read_bytes(), whole.with_suffix(".bin").read_bytes()]
    result = Representation(*files, sum(map(len, written)), check, (*found.notes, *target.notes))
    settings = to_bytes({**about, **result.to_json()})
    # The .xml last: without it there is no model.
    for name, part in zip((files[1], files[2], files[0]), (written[1], settings, written[0]), strict=True):
        write_atomic(name, part)
    return result


def open_representation(path: str | Path) -> EngineFile:
    """Load a written IR.

    Raises:
        UsageError: it cannot be read, OpenVINO does not load it, or zsq did not write it.
    """
    file = Path(path)
    about, (spec, properties) = read_account(
        file, "openvino", lambda account: (spec_in(account), dict(account["properties"]))
    )
    if not file.is_file():
        raise UsageError(f"There is no file {file}.")
    try:
        model = OpenVinoModel(file, properties)
    except JobError as error:
        raise UsageError(f"{file} does not run here: {error} Export the run again.") from error
    check_input(file, model.input_shape, spec)
    return EngineFile(model, spec, about)
