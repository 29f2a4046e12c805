"""The allocator's settings: asked for once, harmless where they do not exist."""

import ctypes
import subprocess
import sys

import pytest

from zsq import allocator

FAULTS = """
import resource, sys, torch, zsq
if sys.argv[1] == "keep" and not zsq.keep_freed_memory():
    print("unsupported"); raise SystemExit
x = torch.ones(12_000_000)
for _ in range(5):
    y = x + 1; del y
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    y = x + 1; del y
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> str:
        command = [sys.executable, "-W", "ignore", "-c", FAULTS, how]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    kept = faults("keep")
    if kept == "unsupported":
        pytest.skip("this C library has no mallopt")
    assert 4 * int(kept) < int(faults("default"))  # 20 tensors of 48 MB: 240,000 pages of 4 kB


@pytest.mark.parametrize("problem", ["platform", "library", "symbol"])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    def none(name: object) -> object:
        if problem == "library":
            raise OSError("no such library")
        return object()

    if problem == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", none)
    assert allocator.keep_freed_memory() is False
