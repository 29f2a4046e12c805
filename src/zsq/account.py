"""What a run keeps track of on the way."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from zsq.distributed import ALONE, Group
from zsq.health import Finding
from zsq.progress import Callback, Progress

logger = logging.getLogger(__name__)


@dataclass
class Account:
    """What a run keeps track of on the way: its processes, time by stage, logged steps and findings."""

    progress: Callback
    group: Group = ALONE
    timings: dict[str, float] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = round(self.timings.get(stage, 0.0) + time.perf_counter() - started, 3)

    def add(self, findings: Iterable[Finding]) -> None:
        """Keep findings, and log them when they are found."""
        for finding in findings:
            self.findings.append(finding)
            if self.group.rank == 0:
                logger.info("%s", finding)

    def __call__(self, event: Progress) -> None:
        if event.values:
            self.metrics.append(
                {"stage": event.stage, "item": event.item, "done": event.done, **event.values}
            )
        self.progress(event)
