"""A process that has imported zsq and forks a child for every command, so that killing one costs no import.

`Server` is the test's side of it. A child is killed at an instant that the request names: after so many
seconds, so long after a stage began, or when it is in the middle of writing a file.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import network_code

NETS = (
    network_code.SMALL
    + """
from torch.nn import functional as F

class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        self.norm1, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))

def small():
    torch.manual_seed(0)
    return Small()

def attends():
    torch.manual_seed(0)
    return Attends()
"""
)
LOG = "log.txt"
POLL = 2e-4  # seconds between two looks at a child


class Server:
    """The test's side: starts the process, asks for children, ends it.

    Args:
        folder: for the model file, which is `folder`/nets.py.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "nets.py").write_text(NETS)
        self.nets = folder / "nets.py"
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._answer()

    def call(self, folder: Path, arguments: Sequence[str], **at: Any) -> dict[str, Any]:
        """Run a command in `folder`, which is its working folder; stderr goes to `LOG` there.

        Args:
            folder: for the command.
            arguments: after `zsq`.
            at: when to kill it: `seconds`; or `stage` with `seconds` after its first line; or `write`, the
                number of the temporary file at whose sight it is killed. `number`: the signal, by default
                SIGKILL. `limit`: bytes that no file may exceed.

        Returns:
            "killed": whether it was; "code": exit code if not; "seconds"; "stages": {name: begin in seconds}.
        """
        assert self.process.stdin is not None
        folder.mkdir(parents=True, exist_ok=True)
        request = {"folder": str(folder), "arguments": list(arguments), **at}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


def serve(folder: Path) -> None:
    """Import, capture a network once, then fork a child for every request on stdin."""
    import torch

    import zsq
    import zsq.cli.jobs
    from zsq.data import load_images
    from zsq.graph.capture import capture

    torch.set_num_threads(1)
    teacher = zsq.load_model(f"{folder / 'nets.py'}:small", input_size=(3, 8, 8))
    capture(teacher.module, teacher.spec.input_size)
    assert load_images is not None
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(watched(json.loads(line))), flush=True)


def watched(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for a request, look after it, kill it when it is time; what became of it."""
    work = Path(request["folder"])
    log = work / LOG
    log.write_bytes(b"")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        become(request, log)
    stages: dict[str, float] = {}
    seen: set[str] = set()
    killed = False
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic() - began
        if pid:
            break
        for text in log.read_text(errors="replace").splitlines():
            name, colon, _ = text.partition(": ")
            if colon and " " not in name and name[0].islower():
                stages.setdefault(name, now)
        if not killed and is_time(request, work, now, stages, seen):
            os.kill(
                child, request.get("number", signal.SIGKILL)
            )  # it is not waited for, so the number is its own
            killed = True
        time.sleep(POLL)
    died = os.WIFSIGNALED(status)
    code = None if died else os.WEXITSTATUS(status)
    return {"killed": died, "code": code, "seconds": now, "stages": stages}


def is_time(
    request: dict[str, Any], work: Path, now: float, stages: dict[str, float], seen: set[str]
) -> bool:
    """Whether the child is to be killed now."""
    if "write" in request:
        for place in (work / "run", work / "run/state"):
            try:
                seen |= {name for name in os.listdir(place) if name.startswith(".")}
            except FileNotFoundError:
                continue
        return len(seen) >= int(request["write"])
    if "seconds" not in request:
        return False
    start = stages.get(request["stage"]) if "stage" in request else 0.0
    return start is not None and now >= start + float(request["seconds"])


def become(request: dict[str, Any], log: Path) -> None:
    """In the child: be the command."""
    code = 70
    try:
        os.chdir(request["folder"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdin.close()
        limit = request.get("limit")
        if limit is not None:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        import zsq.cli

        zsq.cli.main(request["arguments"])
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
