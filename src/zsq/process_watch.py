"""Processes of one job that watch one another: who is lost, who failed and why."""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from zsq.errors import ZsqError

logger = logging.getLogger(__name__)
BEAT_SECONDS = 1.0  # between signs of life
SILENCE_SECONDS = 120.0  # without a sign of life a process counts as lost
STOP_SECONDS = 5.0  # that the end waits for the last sign of life
AGAIN = "The same command goes on from what was finished, with any number of processes."


class ProcessWatch:
    """A thread that shows that this process lives and ends it when another one no longer does."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=SILENCE_SECONDS)
        # A connection of its own: that of the collectives may be held by a wait.
        tcp = TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        self._store = PrefixStore("zsq-watch", tcp)
        self._over = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._run, name="zsq-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more signs of life; nothing is watched any more.

        Waits for the thread, unless the store does not answer: one that is in the store's code while the
        interpreter ends aborts the process.
        """
        self._over.set()
        self._thread.join(STOP_SECONDS)

    def report(self, error: BaseException) -> None:
        """Leave word of why this process fails, if it is the first to."""
        text = str(error) if isinstance(error, ZsqError) else f"{type(error).__name__}: {error}"
        text = text.rstrip(": .") + "."
        with contextlib.suppress(RuntimeError):
            if self._store.add("failures", 1) == 1:
                self._store.set("failure", f"Process {self.rank} (of 0 to {self.size - 1}) failed: {text}")

    def failure(self) -> str | None:
        """What the process that failed first reported, if one did."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["failure"]):
                return str(self._store.get("failure").decode())
        return None

    def reason(self) -> str | None:
        """Why the others cannot be reached: a reported failure or a process that shows no life; else None."""
        with contextlib.suppress(RuntimeError):
            if (failure := self.failure()) is not None:
                return failure
            before = self._beats()
            time.sleep(4 * BEAT_SECONDS)
            silent = [rank for rank, beat in self._beats().items() if beat == before[rank]]
            if silent:
                return self._lost(silent)
        return None

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._store.add(f"beat-{self.rank}", 1)
                silent = self._silent()
            except RuntimeError:  # the store ends with the process that holds it
                if self._over.wait(10 * BEAT_SECONDS):
                    return
                self._end("The first process of the job, or torchrun itself, ended.")
            else:
                if silent and not self._over.is_set():
                    self._end(self._lost(silent))

    def _beats(self) -> dict[int, int]:
        others = (rank for rank in range(self.size) if rank != self.rank)
        return {rank: self._store.add(f"beat-{rank}", 0) for rank in others}

    def _silent(self) -> list[int]:
        now = time.monotonic()
        for rank, beat in self._beats().items():
            if rank not in self._heard or self._heard[rank][0] != beat:
                self._heard[rank] = (beat, now)
        return [rank for rank, (_, at) in self._heard.items() if now - at > SILENCE_SECONDS]

    def _lost(self, ranks: Sequence[int]) -> str:
        which = " and ".join(map(str, ranks))
        return (
            f"Process {which} (of 0 to {self.size - 1}) was lost: it ended or froze without a word (killed? "
            "out of memory?)."
        )

    def _end(self, text: str) -> None:
        logger.error("%s %s", text, AGAIN)
        os._exit(1)  # the main thread may wait for the lost one in code that cannot be interrupted
