"""The fine-tuning stage of a run: whether it takes place, and its progress."""

from torch import Tensor, fx

from zsq.account import Account
from zsq.graph.blocks import split
from zsq.progress import Progress
from zsq.recipe import Recipe
from zsq.recover.feature_nodes import logits_node
from zsq.recover.fine_tune import PIECE, FineTuningResult, fine_tune
from zsq.recover.network_outputs import looked_at
from zsq.recover.unit_maps import map_unit
from zsq.run import State
from zsq.student_images import Networks


def check_losses(graph: fx.GraphModule, settings: Recipe) -> None:
    """Refuse a model that has not what the recipe's reconstruction or fine-tuning looks at.

    Raises:
        UsageError: so.
    """
    units = split(graph.graph)
    if settings.reconstruction is not None and settings.reconstruction.maps is not None:
        map_unit(graph.graph, units)
        logits_node(graph.graph)
    if settings.fine_tuning is not None:
        looked_at(graph.graph, units, settings.fine_tuning)


def fine_tuned(
    networks: Networks,
    images: Tensor,
    labels: Tensor | None,
    settings: Recipe,
    seed: int,
    state: State,
    account: Account,
) -> FineTuningResult | None:
    """Fine-tune the student in place, if the recipe says so and it has fewer than 8 bits somewhere.

    Args:
        networks: with a student that is calibrated, or reconstructed if the recipe does that.
        images: that it was calibrated on, on the device to compute on.
        labels: (N,), the classes that they were made for; None takes the teacher's.
        settings: the recipe.
        seed: of the run.
        state: of the run; the state after the last epoch is kept in it.
        account: told of progress; its processes share every minibatch.
    """
    tuning = settings.fine_tuning
    if tuning is None or settings.scheme.is_eight_bit:
        return None
    total = tuning.epochs * tuning.iterations

    def event(done: int, values: dict[str, float], *, resumed: bool = False) -> None:
        epoch = max(0, done - 1) // tuning.iterations + 1
        account(Progress("fine-tune", f"epoch {epoch} of {tuning.epochs}", done, total, values, resumed))

    if PIECE in state:
        event(int(state[PIECE]["epochs"]) * tuning.iterations, {}, resumed=True)
    with account.timed("fine-tune"):
        return fine_tune(
            networks.original,
            networks.student,
            networks.quantizers,
            networks.units,
            images,
            labels,
            settings=tuning,
            reconstructed=settings.reconstruction is not None,
            seed=seed,
            finished=state,
            log=lambda step, values: event(step + 1, values),
            group=account.group,
        )
