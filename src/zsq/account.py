"""What a run keeps track of on the way."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zsq.distributed import ALONE, Group
from zsq.progress import Callback, Progress


@dataclass
class Account:
    """What a run keeps track of on the way: its processes, time by stage and logged steps."""

    progress: Callback
    group: Group = ALONE
    timings: dict[str, float] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - started, 3)

    def __call__(self, event: Progress) -> None:
        if event.values:
            self.metrics.append(
                {"stage": event.stage, "item": event.item, "done": event.done, **event.values}
            )
        self.progress(event)
