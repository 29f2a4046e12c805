"""A run as an ONNX file: integer weights with scales, activations quantized at their true width."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zsq._version import __version__
from zsq.errors import UsageError, import_extra
from zsq.export.account import account_of, write_with_account
from zsq.export.builder import EXTRA
from zsq.export.integer import reads_codes
from zsq.export.lower import lower, serialized
from zsq.export.openvino import OpenVinoCheck, check_in_openvino
from zsq.export.prepare import prepared
from zsq.export.targets import Target, container_widths, get_target
from zsq.export.verify import NUM_IMAGES, Reference, Verification, verify
from zsq.files import check_free
from zsq.run import Run, load_run

PACKAGES = ("onnx", "onnx_ir", "onnxruntime", "ml_dtypes")


@dataclass(frozen=True)
class Export:
    """A written ONNX file.

    Attributes:
        path: of the file.
        settings: of the file that says how to run it (`path` with .json after it).
        size: bytes of `path`.
        verification: how the file compared with the student, with the session options that it needs.
        notes: what was changed or has to be known, in sentences.
        in_openvino: the same comparison there, where OpenVINO is the target and installed.
    """

    path: Path
    settings: Path
    size: int
    verification: Verification
    notes: tuple[str, ...]
    in_openvino: OpenVinoCheck | None = None

    def to_json(self) -> dict[str, Any]:
        """What the settings file holds."""
        return {
            "file": self.path.name,
            "bytes": self.size,
            **self.verification.to_json(),
            **({"openvino": self.in_openvino.to_json()} if self.in_openvino else {}),
            "notes": list(self.notes),
        }


def export_onnx(
    run: Run | str | Path,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    container: str | None = None,
    force: bool = False,
) -> Export:
    """Write a run as an ONNX file, after ONNX Runtime has computed the same with it as PyTorch.

    Args:
        run: a Run, or the folder of one.
        path: file to write; beside it goes `path`.json with the verification and the session options needed.
        target: "onnxruntime", "openvino" or "tensorrt".
        container: narrowest integers to store codes in, "int2", "int4" or "int8"; None is the narrowest that
            the target loads. With "int8" ONNX Runtime computes some layers in integers and rounds their
            biases: faster, and less exact.
        force: replace the file if it exists.

    Raises:
        UsageError: an unknown target or container, a model with an operation that has no ONNX form, a missing
            package, a file that exists already, a damaged run.
        JobError: the file does not compute what the student computes, or cannot be written; nothing is left.
    """
    engine = get_target(target)
    widths = container_widths(engine, container)
    require_packages()
    file = Path(path)
    settings = account_of(file)
    check_free([file, settings], force=force)
    loaded = run if isinstance(run, Run) else load_run(run)
    about = metadata_of(loaded, engine, container)
    found = checked(loaded, engine, widths, about)
    notes, in_target = [*found.notes, *engine.notes], None
    if engine.name == "openvino":
        try:
            in_target = check_in_openvino(found.content, found.reference)
        except UsageError:  # it is not installed
            notes.append("OpenVINO is not installed here: the file was checked in ONNX Runtime only")
    export = Export(file, settings, len(found.content), found.verification, tuple(notes), in_target)
    write_with_account(file, found.content, {**about, **export.to_json()})
    return export


def require_packages() -> None:
    """Refuse to begin without what ONNX files are made and checked with.

    Raises:
        UsageError: a package is missing.
    """
    for package in PACKAGES:
        import_extra(package, EXTRA)


@dataclass(frozen=True)
class Checked:
    """A file that computes in ONNX Runtime what the student computes, not yet written.

    Attributes:
        content: its bytes.
        verification: how it compared.
        reference: what it was compared with.
        notes: what was changed, in sentences.
    """

    content: bytes
    verification: Verification
    reference: Reference
    notes: tuple[str, ...]


def checked(run: Run, target: Target, widths: tuple[int, ...], metadata: dict[str, str]) -> Checked:
    """Lower a run and compare the file with the student; arguments as for `lower`.

    Raises:
        UsageError: an operation that has no ONNX form, or a damaged run.
        JobError: the file does not compute what the student computes.
    """
    student, notes = prepared(run.student, run.images, target)
    content = serialized(lower(student, target, widths, metadata))
    reference = Reference(student, run.images[:NUM_IMAGES])
    return Checked(content, verify(content, reference, run.student), reference, tuple(notes))


def metadata_of(run: Run, target: Target, container: str | None) -> dict[str, str]:
    """What a file says about itself, as text: recipe, bits, teacher, preprocessing."""
    record = run.record
    model = record.get("model", {})
    about = {
        "zsq.version": __version__,
        "zsq.target": target.name,
        "zsq.container": container or f"int{min(target.widths)}",
        "zsq.recipe": str(record.get("recipe", {}).get("name", "")),
        "zsq.bits": str(record.get("bits", "")),
        "zsq.ends": str(record.get("recipe", {}).get("scheme", {}).get("ends", "")),
        "zsq.placement": "engine" if reads_codes(run.student) else "research",
        "zsq.seed": str(record.get("seed", "")),
        "zsq.teacher": str(model.get("name", "")),
        "zsq.teacher_sha256": str(model.get("sha256", "")),
        "zsq.preprocessing": json.dumps(asdict(run.spec)),
    }
    return {key: value for key, value in about.items() if value}
