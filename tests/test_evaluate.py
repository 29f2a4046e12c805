import json
import math

import pytest
import torch
from quantization_networks import Residual, Summing, attached, images
from torch import Tensor, nn

from zsq.evaluate import accuracy, agreement, unit_signal_to_noise
from zsq.quant.calibrate import calibrate
from zsq.recipe import Calibration
from zsq.recover.losses import output_distance, signal_to_noise


class Given(nn.Module):
    """Returns its input: logits by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_accuracy_by_hand() -> None:
    logits = torch.tensor(
        [
            [9.0, 8, 7, 6, 5, 4, 3],  # label 0: first
            [9.0, 8, 7, 6, 5, 4, 3],  # label 4: fifth
            [9.0, 8, 7, 6, 5, 4, 3],  # label 5: sixth
            [0.0, 0, 0, 1, 0, 0, 0],  # label 3: first
        ]
    )
    labels = torch.tensor([0, 4, 5, 3])
    seen: list[int] = []
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    result = accuracy(Given(), batches, progress=seen.append)
    assert (result.top1, result.top5, result.num_images) == (50.0, 75.0, 4)
    assert seen == [3, 4]
    assert result.to_json() == {"top1": 50.0, "top5": 75.0, "num_images": 4}


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_top5_needs_more_than_five_classes(classes: int) -> None:
    logits = torch.eye(classes)
    result = accuracy(Given(), [(logits, torch.zeros(classes, dtype=torch.int64))])
    assert result.top5 is None and result.top1 == pytest.approx(100 / classes)
    six = torch.eye(6)
    assert accuracy(Given(), [(six, torch.arange(6))]).top5 == 100.0


def test_accuracy_of_nothing_or_of_maps_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        accuracy(Given(), [])
    with pytest.raises(ValueError, match=r"logits \(N, K\)"):
        accuracy(Given(), [(torch.zeros(2, 3, 4), torch.zeros(2))])


class Offset(nn.Module):
    def __init__(self, offset: Tensor) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x + self.offset


def test_agreement_by_hand() -> None:
    x = torch.tensor([[3.0, 0.0], [1.0, 0.0]]).repeat(40, 1)  # more than one chunk
    found = agreement(Offset(torch.tensor([0.0, 2.0])), Given(), x)
    # half of the images change their class; signal 40 * (9 + 1), noise 80 * 4
    assert found == {
        "top1_agreement": 50.0,
        "snr": pytest.approx(10 * math.log10(400 / 320)),
        "num_images": 80,
    }
    same = agreement(Given(), Given(), x)
    assert same == {"top1_agreement": 100.0, "snr": 999.0, "num_images": 80}
    json.dumps(same, allow_nan=False)


def test_agreement_of_maps_counts_positions() -> None:
    x = torch.zeros(1, 2, 1, 4)
    x[0, 0] = 1
    other = torch.zeros(1, 2, 1, 4)
    other[0, 1, 0, 0] = 2  # one of four positions
    assert agreement(Offset(other), Given(), x)["top1_agreement"] == 75.0


@pytest.mark.parametrize("shape", [(3, 1), (3,)])
def test_no_classes_no_agreement(shape: tuple[int, ...]) -> None:
    assert set(agreement(Given(), Given(), torch.ones(shape))) == {"snr", "num_images"}


@pytest.mark.parametrize("kind", [Residual, Summing])
def test_error_per_unit(kind: type[nn.Module]) -> None:
    teacher, student, _, units = attached(kind, "W3A3")
    calibrate(student, [images(32)], Calibration())
    found = unit_signal_to_noise(teacher, student, units, images(70, seed=1))
    assert list(found) == [unit.name for unit in units]
    assert all(0 < value < 60 for value in found.values())
    x = images(70, seed=1)
    with torch.no_grad():
        wanted, got = teacher(x).double(), student(x).double()
    last = 10 * math.log10(float(wanted.square().sum() / (wanted - got).square().sum()))
    assert found[units[-1].name] == pytest.approx(last, abs=1e-4)  # float32 sums in other chunks
    same = unit_signal_to_noise(teacher, teacher, units, x)
    assert set(same.values()) == {999.0}


def test_decibels_are_numbers_that_json_has() -> None:
    assert signal_to_noise(100.0, 1.0) == 20.0
    assert signal_to_noise(1.0, 100.0) == -20.0
    assert signal_to_noise(1.0, 0.0) == signal_to_noise(0.0, 0.0) == 999.0
    inf, nan = math.inf, math.nan
    for signal, noise in ((0.0, 1.0), (1.0, inf), (1.0, nan), (nan, 1.0), (inf, inf)):
        assert -999.0 <= signal_to_noise(signal, noise) < 0
    assert signal_to_noise(math.nan, 0.0) == -999.0
    assert signal_to_noise(math.inf, 1.0) == 999.0


def test_output_distance_by_hand() -> None:
    a, b = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    assert float(output_distance(a, b, channel_axis=1)) == pytest.approx(
        3.0
    )  # three channels, mean of the rest
    tokens = torch.zeros(2, 5, 4)
    assert float(output_distance(tokens, tokens + 2, channel_axis=-1)) == pytest.approx(
        16.0
    )  # 4 channels of 2^2
    assert float(output_distance(tokens, tokens + 2, channel_axis=1)) == pytest.approx(20.0)
