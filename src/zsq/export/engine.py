"""An ONNX file in ONNX Runtime, called like a PyTorch module."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zsq.errors import JobError, UsageError, import_extra, one_line
from zsq.export.account import account_of
from zsq.export.builder import EXTRA
from zsq.models import ModelSpec
from zsq.run import spec_from_json

LEVELS = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL")


@dataclass(frozen=True)
class SessionOptions:
    """How a session of ONNX Runtime is made.

    Attributes:
        optimization: its GraphOptimizationLevel.
        disabled: optimizers that are left out, by name.
    """

    optimization: str = LEVELS[0]
    disabled: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a dictionary."""
        return {"graph_optimization_level": self.optimization, "disabled_optimizers": list(self.disabled)}


class EngineModel(nn.Module):
    """A network in ONNX Runtime's CPU provider: images (N, C, H, W) -> logits, or a tuple of outputs."""

    def __init__(
        self,
        content: bytes,
        options: SessionOptions | None = None,
        *,
        threads: int | None = None,
        saved: str = "",
    ) -> None:
        """Load a network.

        Args:
            content: an ONNX file's bytes.
            options: None is the runtime's default.
            threads: inside an operator; None is as many as PyTorch uses.
            saved: where to write the optimized graph; "" is nowhere.

        Raises:
            UsageError: onnxruntime is not installed.
            JobError: the runtime does not load the network.
        """
        super().__init__()
        runtime: Any = import_extra("onnxruntime", EXTRA)
        options = options or SessionOptions()
        chosen = runtime.SessionOptions()
        chosen.log_severity_level = 4
        chosen.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        chosen.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, options.optimization)
        if saved:
            chosen.optimized_model_filepath = saved
        try:
            self._session = runtime.InferenceSession(
                content,
                chosen,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(options.disabled) or None,
                enable_fallback=0,  # it prints, and there is nothing to fall back to
            )
        except Exception as error:  # its exceptions share no base class
            reason = one_line(error, limit=300)
            raise JobError(
                f"ONNX Runtime {runtime.__version__} does not load the network: {reason}."
            ) from error
        self.outputs = [output.name for output in self._session.get_outputs()]
        self._input = self._session.get_inputs()[0]

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says about itself."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def input_shape(self) -> Sequence[Any]:
        """Of its input; names stand for free sizes."""
        shape: Sequence[Any] = self._input.shape
        return shape

    def forward(self, images: Tensor) -> Any:
        """The outputs, float32, on the CPU; one tensor if there is one.

        Raises:
            JobError: the runtime fails.
        """
        array = images.detach().cpu().float().contiguous().numpy()
        try:
            outputs = self._session.run(None, {self._input.name: array})
        except Exception as error:  # its exceptions share no base class
            reason = one_line(error, limit=300)
            raise JobError(f"ONNX Runtime does not run the network: {reason}.") from error
        found = [torch.from_numpy(y) for y in outputs]
        return found[0] if len(found) == 1 else tuple(found)


@dataclass(frozen=True)
class EngineFile:
    """A file that zsq exported: the network in its engine and what it expects."""

    model: nn.Module
    spec: ModelSpec
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_engine(path: str | Path) -> EngineFile:
    """Load an exported file with the session options written beside it.

    Raises:
        UsageError: it cannot be read, the runtime does not load it, or zsq did not write it.
    """
    file = Path(path)
    import_extra("onnxruntime", EXTRA)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(f"The file {file} cannot be read: {error.strerror}.") from error
    options = _options_beside(file)
    try:
        model = EngineModel(content, options)
    except JobError as error:
        raise UsageError(f"{file} does not run here: {error} Export the run again.") from error
    try:
        spec = spec_from_json(json.loads(model.metadata["zsq.preprocessing"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{file} does not say how its images are prepared, so zsq did not export it, or it was changed "
            "since. Export it with zsq export RUN --to onnx."
        ) from error
    check_input(file, model.input_shape, spec)
    return EngineFile(model, spec, model.metadata)


def check_input(file: Path, shape: Sequence[Any], spec: ModelSpec) -> None:
    """Refuse a file that takes other images than are prepared for it.

    Raises:
        UsageError: so.
    """
    if tuple(shape[1:]) != spec.input_size:
        raise UsageError(
            f"{file} takes images of shape {tuple(shape[1:])}, and its account says {spec.input_size}: it "
            "was changed since zsq wrote it. Export the run again."
        )


def _options_beside(file: Path) -> SessionOptions:
    settings = account_of(file)
    try:
        session = json.loads(settings.read_text(encoding="utf-8"))["session"]
        level, disabled = session["graph_optimization_level"], tuple(session["disabled_optimizers"])
        levels: Any = import_extra("onnxruntime", EXTRA).GraphOptimizationLevel
        if level not in levels.__members__ or not all(isinstance(name, str) for name in disabled):
            raise ValueError(f"it names the options {level!r} and {disabled!r}")
        return SessionOptions(level, disabled)
    except FileNotFoundError:
        return SessionOptions()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{settings}, which says how to run {file.name}, cannot be read ({error}). Export the run again."
        ) from error
