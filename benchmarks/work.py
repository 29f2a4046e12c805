"""How much a step computes, moves and holds, and how much the machine can: for the other scripts here."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zsq.quant.choice import Choice
from zsq.quant.fused import Kernels

aten = torch.ops.aten
ALLOCATIONS = (aten.empty_like.default, aten.empty.memory_format, aten.empty_strided.default)
GEMM_SIZE, COPY_FLOATS = 2048, 2**25


@dataclass(frozen=True)
class Work:
    """What one step does.

    Attributes:
        macs: multiplications with addition of convolutions and matrix products, all passes.
        moved: bytes of the tensors that operations read and write, each as often as it is read or written.
    """

    macs: float
    moved: float


class WorkCounter(TorchDispatchMode):
    """Counts the operations that run inside it, forward and backward; views and allocations count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.moved = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = _tensors(result)
        inputs = _tensors((args, kwargs))
        self.macs += _macs(func, args, outputs)
        if func.is_view or not outputs or func in ALLOCATIONS:
            return result
        written = {t.data_ptr() for t in inputs}
        fresh = [t for t in outputs if t.data_ptr() not in written]
        self.moved += sum(t.numel() * t.element_size() for t in (*inputs, *(fresh or outputs)))
        return result


def count_work(program: Callable[[], Any]) -> Work:
    """Run a program and count what it does."""
    with WorkCounter() as counter, compiled_loops_counted(counter):
        program()
    return Work(macs=counter.macs, moved=counter.moved)


@contextmanager
def compiled_loops_counted(counter: WorkCounter) -> Iterator[None]:
    """Within it the counter also sees the bytes of zsq's compiled loops, no operations of PyTorch."""
    plain = {name: getattr(Kernels, name) for name in ("learned_step", "learned_step_backward", "mixed_rows")}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = plain[name](*args, **options)
            written = _tensors(result)
            read = [t for t in _tensors(args) if t.ndim]  # scalars are read beforehand, as numbers
            read += [arg.draws for arg in args if isinstance(arg, Choice)]
            if name == "mixed_rows":  # of both tensors as many rows as are written
                read = [*read[2:], *written, *written]
            counter.moved += sum(t.numel() * t.element_size() for t in (*read, *written))
            return result

        return call

    try:
        for name in plain:
            setattr(Kernels, name, counted(name))
        yield
    finally:
        for name, function in plain.items():
            setattr(Kernels, name, function)


def added_memory(program: Callable[[], Any], device: torch.device) -> float:
    """MiB that a program adds to this process (on CUDA: to the device), at its highest."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        program()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # Linux: the peak so far, of loading and capturing, is forgotten
    before = _highest()
    program()
    return _highest() - before


def _highest() -> float:
    """MiB of this process at its highest. (What getrusage says on Linux includes the parent before exec.)"""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def peak_macs(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications with addition a second, the best of several runs of two things.

    A product of two square matrices and a 3x3 convolution of many channels: the libraries behind them differ,
    and on some processors the second is faster.
    """
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype) for _ in range(2))
    product = GEMM_SIZE**3 / _fastest(lambda: a @ b, device)
    side, channels = GEMM_SIZE // 16, GEMM_SIZE // 16
    images = torch.randn(1, channels, side, side, device=device).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype)
    macs = 9 * images.numel() * channels
    with torch.no_grad():
        return max(product, macs / _fastest(lambda: torch.conv2d(images, weight, padding=1), device))


def peak_copy(device: torch.device) -> float:
    """Bytes a second that a copy of a large float32 tensor reads and writes, the best of several."""
    source = torch.randn(COPY_FLOATS, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * COPY_FLOATS / _fastest(lambda: target.copy_(source), device)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(values: list[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else math.nan


def _fastest(program: Callable[[], Any], device: torch.device, times: int = 6) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        program()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _macs(func: Any, args: Any, outputs: list[Tensor]) -> int:
    if func is aten.convolution.default:  # input, weight, ..., transposed
        image = args[0] if args[6] else outputs[0]
        return int(image[:, 0].numel() * args[1].numel())
    if func is aten.convolution_backward.default:  # grad, input, weight, ..., output_mask
        image = args[1] if args[7] else args[0]
        return int(image[:, 0].numel() * args[2].numel() * sum(args[10][:2]))
    if func in (aten.mm.default, aten.addmm.default, aten.bmm.default):
        left, right = args[-2:]
        return int(left.numel() * right.shape[-1])
    return 0
