"""One process at a time works on a run folder; a dead one's hold on it is gone."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quantization_networks import Residual, teacher
from test_pipeline import TINY
from tiny_networks import message

from zsq.models import Teacher
from zsq.pipeline import quantize, synthesize_images

HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model() -> Teacher:
    return teacher(Residual)


def test_a_second_process_is_refused(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        for call in (quantize, synthesize_images):
            text = message(lambda call=call: call(model, overrides=TINY, out=out))  # type: ignore[misc]
            assert "Another process is at work" in text and str(out) in text
        assert not list(out.iterdir())
        other.send_signal(signal.SIGKILL)
    assert quantize(model, overrides=TINY, out=out).images.shape[0] > 0


def test_the_hold_ends_with_the_call(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def stop(event: Any) -> None:
        descriptor = os.open(out, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, overrides=TINY, out=out, progress=stop)
    quantize(model, overrides=TINY, out=out)
    assert "not empty" in message(lambda: quantize(model, overrides=TINY, out=out))


def test_refused_calls_leave_no_folder(model: Teacher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wrong = {**TINY, "filter": "on", "filter.method": "patch_entropy"}
    message(lambda: quantize(model, overrides=wrong, out=out))
    assert not out.exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in message(lambda: quantize(model, overrides=TINY, out=tmp_path / "file"))
