"""Networks by name: a user's own Python file with a factory, and timm's collection."""

import difflib
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from zsq.errors import UsageError, import_extra
from zsq.paths import user_path

HUB_PREFIXES = ("hf-hub:", "hf_hub:")


def is_file_name(name: str) -> bool:
    """Whether `name` means a Python file, with or without `:factory`."""
    return name.endswith(".py") or ".py:" in name


def network_from_file(name: str) -> nn.Module:
    """What the factory of `name` = `path/to/file.py:factory` returns, called without arguments.

    The file is executed under a module name of its own, with its folder on `sys.path` until the factory is
    done. A module-level `nn.Module` in place of the factory is taken as it is.

    Raises:
        UsageError: file or factory are missing, raise, or give something else than an `nn.Module`.
    """
    file, _, factory = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    path = user_path(file, "model file")
    if not path.is_file():
        raise UsageError(
            f"The model file {file} does not exist. Give an existing one as path/to/file.py:factory."
        )
    if not factory:
        raise UsageError(
            f"The model {name} names a file but no factory in it. Expected path/to/file.py:factory, where "
            f"factory() returns the network, for example {name.removesuffix(':')}:make_model."
        )
    with _import_path(path.resolve().parent):
        module = _execute(path.resolve())
        made = getattr(module, factory, None)
        if not callable(made):
            found = [key for key, value in vars(module).items() if _is_own_callable(value, key, module)]
            found.sort(key=lambda key: -difflib.SequenceMatcher(a=factory, b=key).ratio())  # likeliest first
            listed = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
            raise UsageError(
                f"The file {file} has no function {factory!r}. It has: {listed or 'none at all'}."
            )
        if not isinstance(made, nn.Module):
            try:
                made = made()
            except (Exception, SystemExit) as error:
                raise UsageError(
                    f"The factory {name} raised {_where(error, path)}. It is called without arguments and "
                    "must return the network."
                ) from error
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"The factory {name} returned an object of type {type(made).__name__}. It must return the "
            "network as a torch.nn.Module."
        )
    return made


def network_from_timm(name: str, *, pretrained: bool) -> tuple[nn.Module, str, dict[str, Any]]:
    """A network of timm, with its published weights or random ones.

    Returns:
        The network, its full name (architecture and tag of the weights), and timm's preprocessing:
        `input_size` (C, H, W), `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation`.

    Raises:
        UsageError: timm is not installed or does not know the name, or the weights could not be fetched.
    """
    timm = _import_timm(name)
    hub = name.startswith(HUB_PREFIXES)
    if not hub and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UsageError(
            f"The model {name!r} is unknown. Expected 'digits', path/to/file.py:factory, or a name that timm "
            "knows" + (f", such as {', '.join(close)}." if close else ".")
        )
    if pretrained and not hub and not timm.is_model_pretrained(name):
        architecture = name.partition(".")[0]
        tagged = timm.list_pretrained(f"{architecture}.*")
        raise UsageError(
            f"There are no published weights called {name!r} in timm. Published for {architecture}: "
            f"{', '.join(tagged) or 'none'}. Name one of these or give your own weights with --weights FILE."
        )
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        if pretrained or hub:
            raise UsageError(
                f"The weights of {name!r} could not be fetched from the model hub ({error_summary(error)}). "
                "Connect to the network, or fetch the file elsewhere and give a timm name with --weights "
                "FILE."
            ) from error
        raise UsageError(
            f"timm could not build {name!r}: {error_summary(error)}. Give another model name."
        ) from error
    config: dict[str, Any] = timm.data.resolve_model_data_config(network)
    tag = getattr(network, "pretrained_cfg", {}).get("tag")
    full_name = f"{name}.{tag}" if pretrained and tag and not hub and "." not in name else name
    return network, full_name, config


def error_summary(error: BaseException) -> str:
    """Type and first line of an error."""
    first_line = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _import_timm(name: str) -> ModuleType:
    try:
        import_extra("timm.data", "timm")
        return import_extra("timm", "timm")
    except UsageError as error:
        raise UsageError(
            f"The model {name!r} is not bundled, so it is looked for in timm. {error}"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"The model {name!r} is looked for in timm, which is installed but failed to import "
            f"({error_summary(error)}). Most often torchvision does not fit torch: install both from one "
            "source, for a CPU with pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu."
        ) from error


@contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _execute(path: Path) -> ModuleType:
    """The Python file as a module, freshly executed."""
    module_name = "zsq_model_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # the ending is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UsageError(
            f"The model file {path} raised {_where(error, path)} when it was imported."
        ) from error
    return module


def _is_own_callable(value: object, key: str, module: ModuleType) -> bool:
    return (
        callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def _where(error: BaseException, path: Path) -> str:
    """The error and the last line of the user's file that it passed through."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name
    ]
    return error_summary(error) + (f" (line {frames[-1].lineno} of {path.name})" if frames else "")
