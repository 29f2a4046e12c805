"""Images optimised as pixels: losses fall, classes are met, the same bits whatever is resumed."""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from image_networks import SIZE, AfterReLU, NoBatchNorm, Residual, captured, trained
from torch import Tensor, fx

from zsq.distributed import Group
from zsq.errors import JobError, UsageError
from zsq.graph.capture import capture
from zsq.images.class_losses import labels_for
from zsq.images.class_settings import ClassGuide
from zsq.images.forward import observe
from zsq.images.generator_settings import GeneratorSynthesis
from zsq.images.pixel_settings import Centres, Crops, PixelSynthesis, StatisticsMatch
from zsq.images.pixels import optimise_pixels, synthesize_pixels
from zsq.images.prior import InputPrior
from zsq.images.statistics import StatisticsDistance

SHORT = PixelSynthesis(num_images=10, batch_size=5, steps=4, lr=0.1)
GUIDED = replace(SHORT, classes=ClassGuide(weight=1.0), crops=Crops(), bn=StatisticsMatch(spread="variance"))
Pieces = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def residual() -> fx.GraphModule:
    return captured(Residual)


def make(
    teacher: fx.GraphModule, settings: PixelSynthesis, finished: Pieces | None = None, **options: Any
) -> tuple[Tensor, list[tuple[str, int, int, dict[str, float]]]]:
    logged: list[tuple[str, int, int, dict[str, float]]] = []
    images = synthesize_pixels(
        teacher,
        settings,
        SIZE,
        **{"seed": 0, "log": lambda *event: logged.append(event), **options},
        finished={} if finished is None else finished,
    )
    return images, logged


FORMS = {
    "zeroq": replace(SHORT, image_weight=1.0, bn=StatisticsMatch(over="image", channels="sum")),
    "dsg": replace(SHORT, bn=StatisticsMatch(over="image", slack=0.5, enhance=True)),
    "hast": replace(GUIDED, classes=ClassGuide(weight=10.0, hardness=2.0), crops=None),
    "intraq": replace(
        GUIDED,
        classes=ClassGuide(
            loss="probability", soft_lowest=0.9, distance_weight=1.0, distance_min=0.05, distance_max=0.8
        ),
    ),
    "centres": replace(GUIDED, centres=Centres(steps=3)),
    "two classes": replace(GUIDED, classes=ClassGuide(weight=10.0, hardness=2.0, second_share=0.5)),
    "bfloat16": replace(GUIDED, precision="bfloat16", limit=3.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_reproducible_and_lowers_its_loss(form: str, residual: fx.GraphModule) -> None:
    settings = replace(FORMS[form], num_images=20, batch_size=20, steps=40)
    state = {name: value.clone() for name, value in residual.state_dict().items()}
    images, logged = make(residual, settings)
    assert images.shape == (20, *SIZE) and images.dtype == torch.float32 and images.is_contiguous()
    losses = [values["loss"] for name, _, _, values in logged if name == "synthesis-000"]
    assert losses[-1] < 0.7 * losses[0]
    assert all(
        sum(v for k, v in values.items() if k not in ("loss", "lr"))
        == pytest.approx(values["loss"], rel=1e-3)
        for _, _, _, values in logged
    )
    assert torch.equal(make(residual, settings)[0], images)
    for name, value in residual.state_dict().items():
        assert torch.equal(value, state[name]), name
    if settings.limit:
        assert float(images.abs().max()) <= 3


def test_statistics_and_classes_are_met(residual: fx.GraphModule) -> None:
    settings = replace(GUIDED, num_images=30, batch_size=30, steps=150, crops=None)
    finished: Pieces = {}
    images, logged = make(residual, settings, finished)
    first, last = logged[0][3], logged[-1][3]
    assert last["bn"] < first["bn"] / 10
    labels = finished["synthesis-000"]["labels"]
    observer = observe(residual, logits=True)
    logits = observer(images).logits
    assert logits is not None and float((logits.argmax(1) == labels).float().mean()) > 0.9
    start = torch.randn(30, *SIZE, generator=torch.Generator().manual_seed(0))
    distance = StatisticsDistance(settings.bn)
    assert float(distance(observer(images))) < float(distance(observer(start))) / 5


@pytest.mark.parametrize("form", ["zeroq", "intraq", "centres", "two classes"])
def test_batches_in_any_order(form: str, residual: fx.GraphModule) -> None:
    settings = replace(FORMS[form], num_images=17, batch_size=5)
    whole: Pieces = {}
    images, _ = make(residual, settings, whole)
    half = {name: piece for name, piece in whole.items() if name in ("synthesis-002", "centres-000")}
    assert torch.equal(make(residual, settings, half)[0], images)
    for name in whole:
        for kind, tensor in whole[name].items():
            assert torch.equal(half[name][kind], tensor), (name, kind)
    assert not torch.equal(make(residual, settings, seed=1)[0], images)
    assert not torch.equal(images[:5], images[5:10])
    done: Pieces = {name: piece for name, piece in whole.items() if name.startswith("synthesis")}
    again, logged = make(residual, settings, done)
    assert torch.equal(again, images) and not logged  # no centres are made for nothing


class Thread(Group):
    """A process of two, as a thread."""

    barrier = threading.Barrier(2)
    sent = [b"", b""]

    def exchange(self, own: bytes) -> list[bytes]:
        self.sent[self.rank] = own
        self.barrier.wait(60)
        result = list(self.sent)
        self.barrier.wait(60)
        return result


def test_two_processes_make_the_images_of_one(residual: fx.GraphModule) -> None:
    settings = replace(FORMS["centres"], num_images=17, batch_size=4)
    alone: Pieces = {}
    images, _ = make(residual, settings, alone)
    pieces: list[Pieces] = [{}, {}]
    logged: list[Any] = [None, None]

    def work(rank: int) -> None:
        logged[rank] = make(residual, settings, pieces[rank], group=Thread(rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for (found, events), own in zip(logged, pieces, strict=True):
        assert torch.equal(found, images) and own.keys() == alone.keys()
        assert all(torch.equal(own[name]["labels"], alone[name]["labels"]) for name in alone)
        assert 0 < len({name for name, *_ in events}) < len(alone)  # each made a part


def test_labels_of_batches(residual: fx.GraphModule) -> None:
    settings = replace(GUIDED, num_images=23, batch_size=9)
    finished: Pieces = {}
    make(residual, settings, finished)
    labels = torch.cat([finished[name]["labels"] for name in sorted(finished)])
    expected = labels_for(residual, settings.classes, settings.num_images, 0)
    assert expected is not None and torch.equal(labels, expected)
    assert sorted(torch.bincount(labels, minlength=5).tolist()) == [4, 4, 5, 5, 5]
    assert all(len(piece["labels"]) == len(piece["images"]) for piece in finished.values())
    plain: Pieces = {}
    make(residual, SHORT, plain)
    assert all(list(piece) == ["images"] for piece in plain.values())
    assert labels_for(residual, SHORT.classes, 4, 0) is None


def test_centres_have_each_class_once(residual: fx.GraphModule) -> None:
    finished: Pieces = {}
    _, logged = make(residual, replace(GUIDED, batch_size=3, centres=Centres(steps=2)), finished)
    centres = [finished[name]["labels"] for name in sorted(finished) if name.startswith("centres")]
    assert torch.cat(centres).tolist() == list(range(5))
    assert {(name, steps) for name, _, steps, _ in logged if name.startswith("centres")} == {
        ("centres-000", 2),
        ("centres-001", 2),
    }
    assert all("centres" in values for name, _, _, values in logged if name.startswith("synthesis"))


def test_centres_of_some_classes(residual: fx.GraphModule) -> None:
    """Which ones is drawn; more than there are is all."""
    drawn: set[tuple[int, ...]] = set()
    for seed in range(4):
        finished: Pieces = {}
        make(residual, replace(GUIDED, centres=Centres(steps=1, classes=3)), finished, seed=seed)
        labels = finished["centres-000"]["labels"].tolist()
        assert len(finished["centres-000"]["images"]) == 3 and labels == sorted(set(labels))
        drawn.add(tuple(labels))
    assert len(drawn) > 1
    all_of_them: Pieces = {}
    make(residual, replace(GUIDED, centres=Centres(steps=1, classes=9)), all_of_them)
    assert all_of_them["centres-000"]["labels"].tolist() == list(range(5))


def test_pixels_start_from_the_prior_and_take_the_learning_rate(residual: fx.GraphModule) -> None:
    prior = InputPrior((1.0, 0.0, -1.0), (0.5, 1.0, 2.0))
    settings = replace(SHORT, num_images=400, batch_size=400, steps=1, lr=0.25)

    def one(**changes: Any) -> Tensor:
        return optimise_pixels(
            residual,
            replace(settings, **changes),
            SIZE,
            400,
            labels=None,
            rng=torch.Generator().manual_seed(0),
            log=lambda *_: None,
            prior=prior,
        )

    start = one(lr=0.0)
    torch.testing.assert_close(start.mean((0, 2, 3)), torch.tensor(prior.mean), atol=0.03, rtol=0)
    torch.testing.assert_close(start.std((0, 2, 3)), torch.tensor(prior.std), atol=0.03, rtol=0)
    smooth = one(lr=0.0, start="natural")
    torch.testing.assert_close(smooth.mean((0, 2, 3)), torch.tensor(prior.mean), atol=0.2, rtol=0)
    torch.testing.assert_close(smooth.std((0, 2, 3)), torch.tensor(prior.std), atol=0, rtol=0.15)
    steps = [(x[..., 1:] - x[..., :-1]).square().mean() for x in (start, smooth)]
    assert steps[1] < 0.5 * steps[0]
    moved = (one() - start) / torch.tensor(prior.std).view(-1, 1, 1)
    assert float(moved.abs().median()) == pytest.approx(0.25, rel=1e-2)  # Adam's first step, in deviations


def test_randomness_and_gradients_stay_outside(residual: fx.GraphModule) -> None:
    before = torch.random.get_rng_state()
    teacher = captured(Residual)
    for parameter in teacher.parameters():
        parameter.requires_grad_(True)
    make(teacher, GUIDED)
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_embedding_is_what_the_last_layer_receives(residual: fx.GraphModule) -> None:
    images = torch.randn(3, *SIZE)
    forward = observe(residual, logits=True, embedding=True, fold=True)(images)
    assert forward.embedding is not None and forward.embedding.shape == (3, 16)
    weight, bias = residual.get_parameter("linear.weight"), residual.get_parameter("linear.bias")
    torch.testing.assert_close(torch.nn.functional.linear(forward.embedding, weight, bias), forward.logits)


def test_errors(residual: fx.GraphModule) -> None:
    with pytest.raises(UsageError, match="no BatchNorm.*--images"):
        make(capture(NoBatchNorm().eval(), SIZE), SHORT)
    with pytest.raises(UsageError, match=r"shape \(N, 8, 25\)"):
        labels_for(capture(trained(Swapped()), SIZE), GUIDED.classes, 4, 0)
    with pytest.raises(JobError, match="diverged.*synthesis.lr"):
        make(residual, replace(SHORT, lr=float("inf")))
    for settings, match in (
        ({"num_images": 1}, "synthesis.num_images is 1. Expected at least 2"),
        ({"steps": 0}, "synthesis.steps is 0"),
        ({"plateau_factor": 1.0}, "synthesis.plateau_factor"),
        ({"precision": "int8"}, "float32 or bfloat16"),
        ({"start": "pink"}, "white or natural"),
        ({"centres": Centres()}, "synthesis.classes=on"),
        ({"image_weight": float("nan")}, "synthesis.image_weight"),
    ):
        with pytest.raises(UsageError, match=match):
            PixelSynthesis(**settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="synthesis.crops.smallest 0"):
        Crops(smallest=0.0)
    with pytest.raises(UsageError, match="distance_min is 0.9"):
        ClassGuide(distance_min=0.9, distance_max=0.1)
    with pytest.raises(UsageError, match="second_share is 0.7"):
        ClassGuide(second_share=0.7)
    with pytest.raises(UsageError, match="goes with the cross-entropy"):
        ClassGuide(second_share=0.5, loss="probability")
    with pytest.raises(UsageError, match="synthesis.centres.steps"):
        Centres(steps=0)
    with pytest.raises(UsageError, match="synthesis.centres.classes"):
        Centres(classes=0)
    with pytest.raises(UsageError, match="held to the centre of its class"):
        GeneratorSynthesis(centres=Centres(classes=4))


class Swapped(AfterReLU):
    """Its features (N, C, L) are the first output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vector, features = super().forward(x)
        return features, vector
