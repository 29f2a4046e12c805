"""Weight files: read without executing pickled code, recognise what training tools leave, load into a
network."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zsq.errors import UsageError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".th", ".tar")
# Averaged weights come first where a checkpoint holds both, as they are what its author evaluated.
WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
# Counters that do not change what a network in eval mode computes.
COUNTERS = ("num_batches_tracked", "n_averaged")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEPTH = 8  # of dictionaries in a checkpoint; one may hold itself
_NAMED = 3  # an error names the first few tensors of a kind


def load_weights(network: nn.Module, path: Path) -> tuple[str, ...]:
    """Copy the weights in the file `path` into `network`, in place and as float32; every tensor must fit.

    Counters of batches may be missing from the file, or be there without a counterpart.

    Returns:
        What was recognised and done on the way, each a sentence for the user: wrappers opened, prefixes
        removed, number formats converted.

    Raises:
        UsageError: the file cannot be read, is not a state dict, or does not fit the network.
    """
    tensors, notes = read_weights(path)
    expected = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    tensors, prefixes = strip_prefixes(tensors, expected.keys())
    if prefixes:
        notes = (*notes, f"removed the prefix {''.join(prefixes)!r} from the names in {path.name}")
    tensors = {name: value for name, value in tensors.items() if not is_counter(name)}
    expected = {name: value for name, value in expected.items() if not is_counter(name)}
    _check_fit(tensors, expected, path)
    formats = sorted(
        {str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point()}
    )
    if formats not in ([], ["float32"]):
        notes = (*notes, f"{path.name} stores {' and '.join(formats)}; its weights were converted to float32")
    network.float().load_state_dict(tensors, strict=False)
    return notes


def read_weights(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name in a `.safetensors` file or one that `torch.save` wrote, and notes for the user.

    They are on the CPU. The dict may lie under a key such as `state_dict` or `model_ema`, also nested.

    Raises:
        UsageError: there is no such file, its kind is unknown, it is damaged, or it holds pickled objects.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UsageError(
            f"The weights file {path} {what}. Give the path of a .safetensors, .pt or .pth file."
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path), ()
        except SafetensorError as error:
            raise UsageError(
                f"The weights file {path} could not be read as safetensors ({error}): it is damaged, cut "
                "short or of another kind. Fetch or save it again."
            ) from error
    if path.suffix in TORCH_SUFFIXES:
        return _unwrap(_load_torch(path), path)
    raise UsageError(
        f"The weights file {path} has the unknown ending {path.suffix!r}. Expected .safetensors or one of "
        f"{', '.join(TORCH_SUFFIXES)} with a PyTorch state dict; convert it with safetensors.torch.save_file."
    )


def is_counter(name: str) -> bool:
    """Whether the tensor `name` of a state dict only counts batches."""
    return name.rpartition(".")[2] in COUNTERS


def strip_prefixes(
    tensors: dict[str, Tensor], expected: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Remove leading `module.`, `_orig_mod.` and `model.`, also repeated, as far as that makes names match
    better.

    Returns:
        The tensors under the names that agree most with `expected`, and the prefixes removed, outermost
        first.
    """
    wanted = set(expected)
    best, best_removed = tensors, list[str]()
    current, removed = tensors, list[str]()
    while prefix := next((p for p in PREFIXES if any(name.startswith(p) for name in current)), None):
        stripped = {name.removeprefix(prefix): value for name, value in current.items()}
        if len(stripped) < len(current):  # two names would become one
            break
        current, removed = stripped, [*removed, prefix]
        if len(wanted & current.keys()) > len(wanted & best.keys()):
            best, best_removed = current, removed
    return best, best_removed


def first_few(names: list[str]) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if (more := len(names) - _NAMED) > 0 else "")


def _load_torch(path: Path) -> object:
    """What `torch.save` wrote, without executing pickled code; a damaged file raises almost any exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch also warns of what the errors below say
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(
            f"The weights file {path} could not be opened ({error}). Check its permissions."
        ) from error
    except Exception as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused or "TorchScript" in str(error):
            what = f"pickled objects ({refused[1]})" if refused else "a TorchScript program"
            raise UsageError(
                f"The weights file {path} contains {what}, not only tensors; loading it would execute code "
                "from the file, which zsq refuses. If you trust the file, load it once where it was made and "
                "save the bare state dict: torch.save(model.state_dict(), 'weights.pt'), or "
                "safetensors.torch.save_file."
            ) from error
        raise UsageError(
            f"The weights file {path} could not be read ({type(error).__name__}): it is damaged, cut short, "
            "or not a file that torch.save wrote. Fetch or save it again."
        ) from error


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict inside what a checkpoint holds."""
    opened: list[str] = []
    notes: list[str] = []
    while isinstance(content, Mapping):
        if len(opened) == _DEPTH:
            raise UsageError(
                f"The weights file {path} holds a dictionary in a dictionary more than {_DEPTH} times, or "
                "one that holds itself. Save the state dict alone: torch.save(model.state_dict(), FILE)."
            )
        found = [key for key in WRAPPERS if _holds_tensors(content.get(key))]
        if not found:
            break
        opened.append(found[0])
        if found[1:]:
            not_taken = ", ".join(map(repr, found[1:]))
            notes.append(
                f"{path.name} holds several sets of weights; {found[0]!r} was taken, not {not_taken}"
            )
        content = content[found[0]]
    if opened:
        notes.insert(0, f"took the weights from {'/'.join(opened)!r} in {path.name}")
    if not isinstance(content, Mapping):
        raise UsageError(
            f"The weights file {path} holds a {type(content).__name__}, not a state dict (names and "
            "tensors). Save it with torch.save(model.state_dict(), FILE)."
        )
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)
    }
    others = [str(name) for name in content if name not in tensors]
    if not tensors:
        raise UsageError(
            f"The weights file {path} holds no tensors by name; its entries are {first_few(others)}. "
            f"Expected a state dict, plain or under one of {', '.join(WRAPPERS)}. Save one with "
            "torch.save(model.state_dict(), FILE)."
        )
    if others:
        notes.append(f"ignored what is no tensor in {path.name}: {first_few(others)}")
    return tensors, tuple(notes)


def _holds_tensors(value: object, depth: int = _DEPTH) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(v, Tensor) or _holds_tensors(v, depth - 1) for v in value.values())


def _kind(tensor: Tensor) -> str:
    """Number format of a tensor, and what else makes it no plain one."""
    layout = "" if tensor.layout == torch.strided else str(tensor.layout).removeprefix("torch.")
    words = (layout, str(tensor.dtype).removeprefix("torch."), "without data" if tensor.is_meta else "")
    return " ".join(word for word in words if word)


def _check_fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    common = [name for name in expected if name in tensors]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in common
        if tensors[name].shape != expected[name].shape
    ]
    problems = ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
    if any(names for names, _ in problems):
        counts = "; ".join(f"{len(names)} {kind}: {first_few(names)}" for names, kind in problems if names)
        raise UsageError(
            f"The weights in {path} do not fit the network, which has {len(expected)} tensors. {counts}. "
            "Expected the state dict of this very architecture with this number of classes; name the "
            "matching model or factory."
        )
    not_float = [
        f"{name} ({_kind(tensors[name])})"
        for name in common
        if (expected[name].is_floating_point() and tensors[name].dtype not in _FLOATS)
        or tensors[name].layout != torch.strided
        or tensors[name].is_meta
    ]
    if not_float:
        raise UsageError(
            f"The weights in {path} are not all plain floating-point numbers: {first_few(not_float)}. zsq "
            "starts from the full-precision model; give its weights as float32, float16 or bfloat16."
        )
