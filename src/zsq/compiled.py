"""C beside the code, compiled for this machine when it is first used, if there is a compiler.

Nothing is kept between processes: a file of a few loops takes less than half a second, and what is compiled
for one processor may not run on another.
"""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

COMPILER = "ZSQ_COMPILER"
"""Variable of the environment: the compiler to use; empty for none."""

_EXACT = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")  # they change no result
_TIMEOUT = 60  # seconds


def shared_library(source: Path) -> ctypes.CDLL | None:
    """The compiled file, or None, with a line in the log at level debug, where that fails.

    It runs in PyTorch's own threads where the compiler knows OpenMP, else in one.

    Args:
        source: of C.
    """
    log = logging.getLogger("zsq")
    compiler = os.environ.get(COMPILER)
    if compiler is None:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    if not compiler:
        log.debug("No C compiler: %s is not used.", source.name)
        return None
    said = ""
    with tempfile.TemporaryDirectory(prefix="zsq-", ignore_cleanup_errors=True) as folder:
        library = Path(folder) / f"{source.stem}.so"
        output = ["-shared", "-fPIC", "-o", str(library), str(source), "-lm"]
        for options in _choices():
            try:
                command = [compiler, *_EXACT, *options, *output]
                subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT)
                return ctypes.CDLL(str(library))  # stays when its file is gone
            except subprocess.CalledProcessError as error:
                said = error.stderr
            except (OSError, subprocess.TimeoutExpired) as error:
                said = str(error)
                break
    log.debug("%s is not used, as it was not compiled: %s", source.name, said)
    return None


def _choices() -> Iterator[list[str]]:
    """Options to try, the best first."""
    # Without its vector instructions, the loops are slower than PyTorch's on an Intel or AMD processor.
    processors = [["-march=native"]]
    if platform.machine().lower() not in ("x86_64", "amd64"):
        processors += [["-mcpu=native"], []]
    # PyTorch brings its OpenMP along, sometimes under another name; two would fight for the processors.
    brought = [str(p) for p in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")]
    for processor in processors:
        yield [*processor, "-fopenmp", *brought]
        yield processor
