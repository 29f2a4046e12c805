"""Steps of a loop recorded once as a CUDA graph and replayed: then the host launches one thing a step.

Steps of small networks are hundreds of kernels of microseconds each, which cost the host longer to launch
than the device to run. Elsewhere than on CUDA a step is called as it is.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
WARM_UP = 3  # steps that run as they are before one is recorded, so that libraries have chosen their kernels


class Course:
    """What changes from step to step, as tables on the device, so that a recorded step finds its own row.

    Args:
        device: where the tables are put.
        tables: by name, each (steps, ...), one row a step.

    Attributes:
        step: number of the next row, scalar, int64, on the device.
    """

    def __init__(self, device: torch.device, **tables: Tensor) -> None:
        self._tables = {name: table.to(device) for name, table in tables.items()}
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def row(self) -> dict[str, Tensor]:
        """The rows of this step, each of its table's shape without the first axis."""
        return {name: table.index_select(0, self.step).squeeze(0) for name, table in self._tables.items()}

    def advance(self) -> None:
        """Go on to the next step; the host does not wait."""
        self.step.add_(1)


class Replay:
    """Call a step again and again; on CUDA it is recorded in its fourth call and replayed from then on.

    The step reads and writes tensors that stay where they are (what it allocates stays inside the recording),
    has no branch that depends on values, and never waits for the device. What cannot be recorded is called
    as it is, after a line in the log.

    Args:
        step: takes nothing, returns tensors. In replays these are the same tensors with new values.
        device: where it computes.
        generators: on the device, that it draws from besides the device's default one.
    """

    def __init__(
        self,
        step: Callable[[], Sequence[Tensor]],
        device: torch.device,
        *,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._step, self._generators = step, generators
        self._recordable, self._calls = can_record(device), 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self._stream = torch.cuda.Stream(device) if self._recordable else None

    def __call__(self) -> tuple[Tensor, ...]:
        """One step; what it returns, without history."""
        if self._graph is not None:
            self._graph.replay()
            return self._outputs
        self._calls += 1
        if self._recordable and self._calls > WARM_UP:
            return self._record()
        return self._plain()

    def _plain(self) -> tuple[Tensor, ...]:
        if self._stream is None:
            return tuple(t.detach() for t in self._step())
        # Where it will be recorded, so that gradients accumulate on that stream from the start.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = tuple(t.detach() for t in self._step())
        current.wait_stream(self._stream)
        return outputs

    def _record(self) -> tuple[Tensor, ...]:
        assert self._stream is not None
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        try:
            outputs = self._captured(graph)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation that waits, or one that a graph cannot hold
            first_line = str(error).strip().splitlines()[0]
            logger.info("Steps run one kernel at a time, as they cannot be recorded: %s", first_line)
            self._recordable = False
            for generator in (*self._generators, torch.cuda.default_generators[self._stream.device.index]):
                generator.graphsafe_set_state(
                    generator.clone_state()
                )  # it still counts draws of the recording
            return self._plain()
        self._graph, self._outputs = graph, outputs
        graph.replay()
        return outputs

    def _captured(self, graph: torch.cuda.CUDAGraph) -> tuple[Tensor, ...]:
        """What the step returns while its kernels go into the graph.

        `torch.cuda.graph` gives all unused memory back before, and getting it again takes longer than a
        hundred short steps.
        """
        assert self._stream is not None
        device = self._stream.device
        torch.cuda.synchronize(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if unused > torch.cuda.mem_get_info(device)[0]:  # a recording has memory of its own
            torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):
            graph.capture_begin()
            try:
                return tuple(t.detach() for t in self._step())
            finally:
                graph.capture_end()


def replayed(
    step: Callable[[Mapping[str, Tensor], Tensor], Mapping[str, Tensor]],
    course: Course,
    device: torch.device,
    *,
    generators: Sequence[torch.Generator] = (),
) -> Callable[[], dict[str, Tensor]]:
    """Steps along a course: each call is the next one, and returns what `step` did.

    Args:
        step: takes its row of the course and its number (scalar, int64, on the device), returns tensors by
            name, the same names in every step; otherwise as for `Replay`.
        course: of all that changes from step to step.
        device: as for `Replay`.
        generators: as for `Replay`.
    """
    names: list[str] = []

    def next_one() -> tuple[Tensor, ...]:
        found = step(course.row(), course.step)
        names[:] = found
        course.advance()
        return tuple(found.values())

    replay = Replay(next_one, device, generators=generators)
    return lambda: dict(zip(names, replay(), strict=True))


def can_record(device: torch.device) -> bool:
    """Whether steps on a device are recorded; then learning rates and what else changes must be tensors."""
    return device.type == "cuda"
