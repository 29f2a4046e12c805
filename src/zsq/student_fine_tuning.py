"""The fine-tuning stage of a run: whether it takes place, and its progress."""

from torch import Tensor, fx

from zsq.account import Account
from zsq.class_images import drawn_images, trained_generator
from zsq.errors import UsageError
from zsq.graph.blocks import split
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.models import ModelSpec
from zsq.progress import Progress
from zsq.recipe import Recipe
from zsq.recover.feature_nodes import logits_node
from zsq.recover.fine_tune import PIECE, FineTuningResult, fine_tune
from zsq.recover.network_outputs import looked_at
from zsq.recover.unit_maps import map_unit
from zsq.state import State
from zsq.student_networks import Networks


def check_losses(graph: fx.GraphModule, settings: Recipe) -> None:
    """Refuse what reconstruction or fine-tuning need and the model, or the recipe, does not have.

    Raises:
        UsageError: so.
    """
    units = split(graph.graph)
    if settings.reconstruction is not None and settings.reconstruction.maps is not None:
        map_unit(graph.graph, units)
        logits_node(graph.graph)
    if settings.fine_tuning is not None:
        looked_at(graph.graph, units, settings.fine_tuning)
        if settings.fine_tuning.turns is not None:
            _check_turns(settings)


def _check_turns(settings: Recipe) -> None:
    if not isinstance(settings.synthesis, GeneratorSynthesis):
        raise UsageError(
            f"fine_tuning.turns trains the generator of the images on, and the recipe {settings.name!r} has "
            f"images of the kind {type(settings.synthesis).__name__}. Take a recipe with a generator of "
            "classes (gdfq), or give --set fine_tuning.turns=none."
        )
    assert settings.fine_tuning is not None and settings.fine_tuning.turns is not None
    share = settings.synthesis.second_share
    if share > 0 and settings.fine_tuning.turns.adaptability is not None:
        raise UsageError(
            f"synthesis.second_share is {share}, but fine_tuning.turns.adaptability asks for images of one "
            "class. Give --set fine_tuning.turns.adaptability=none, or --set synthesis.second_share=0."
        )
    if settings.low_pass is not None:
        raise UsageError(
            "low_pass filters the images once, before anything is learned on them; with fine_tuning.turns "
            "every step has new ones. Give --set low_pass=none --set fine_tuning.low_pass=on, which filters "
            "them too."
        )


def fine_tuned(
    networks: Networks,
    images: Tensor,
    labels: Tensor | None,
    settings: Recipe,
    spec: ModelSpec,
    seed: int,
    state: State,
    account: Account,
) -> tuple[FineTuningResult | None, Tensor, Tensor | None]:
    """Fine-tune the student in place, if the recipe says so and it has fewer than 8 bits somewhere.

    Args:
        networks: with a student that is calibrated, or reconstructed if the recipe does that.
        images: that it was calibrated on, on the device to compute on.
        labels: (N,), the classes that they were made for or came with; None takes the teacher's.
        settings: the recipe.
        spec: of the model.
        seed: of the run.
        state: of the run; the state after the last epoch is kept in it.
        account: told of progress; its processes share every minibatch.

    Returns:
        What became of it, and the images with their labels; if a generator was trained in turns, as many of
        its last ones, from the same latents.
    """
    tuning = settings.fine_tuning
    if tuning is None or settings.scheme.is_eight_bit:
        return None, images, labels
    total = tuning.epochs * tuning.iterations

    def event(done: int, values: dict[str, float], *, resumed: bool = False) -> None:
        epoch = max(0, done - 1) // tuning.iterations + 1
        account(Progress("fine-tune", f"epoch {epoch} of {tuning.epochs}", done, total, values, resumed))

    if PIECE in state:
        event(int(state[PIECE]["epochs"]) * tuning.iterations, {}, resumed=True)
    with account.timed("fine-tune"):
        generator = None
        if tuning.turns is not None:
            assert isinstance(settings.synthesis, GeneratorSynthesis)
            generator = trained_generator(networks.graph, settings.synthesis, spec, seed, state, account)
        result = fine_tune(
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
            generator=generator,
        )
        if generator is not None:
            images, drawn = drawn_images(generator, settings.synthesis.num_images, seed)
            labels = drawn.cpu()
    return result, images, labels
