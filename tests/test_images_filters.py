"""Choosing images so that every image has a similar one among the chosen."""

from itertools import combinations

import pytest
import torch
from image_networks import SIZE, Residual, photographs
from student_networks import calibrated

from zsq.images.filters import cover, gradient_cover
from zsq.images.gradients import gradient_probe, unit_rows


def test_by_hand() -> None:
    """Two pairs of near twins and a loner: one of each pair first, then the loner."""
    matrix = torch.tensor(
        [
            [1.0, 0.9, 0.1, 0.1, 0.0],
            [0.9, 1.0, 0.0, 0.0, 0.0],
            [0.1, 0.0, 1.0, 0.8, 0.0],
            [0.1, 0.0, 0.8, 1.0, 0.0],
            [0.0, 0.0, 0.0, 0.0, 1.0],
        ]
    )
    # sums 2.1, 1.9, 1.9, 1.9, 1; after image 0: gains 0.1, 1.6, 1.6, 1.0; after image 2: 0.1, 0.2, 1.0
    assert gradient_cover(matrix, 3).tolist() == [0, 2, 4]
    assert sorted(gradient_cover(matrix, 5).tolist()) == [0, 1, 2, 3, 4]
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"cannot choose {count} of 5"):
            gradient_cover(matrix, count)


def test_greedy_is_near_the_best_set() -> None:
    for seed in range(5):
        rows = unit_rows(torch.rand(10, 3, generator=torch.Generator().manual_seed(seed)))
        matrix = rows @ rows.T
        chosen = gradient_cover(matrix, 3)
        assert len(set(chosen.tolist())) == 3
        best = max(float(matrix[list(s)].amax(0).sum()) for s in combinations(range(10), 3))
        assert float(matrix[chosen].amax(0).sum()) >= 0.95 * best


def test_negative_similarities() -> None:
    rows = unit_rows(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))
    matrix = rows @ rows.T
    chosen = gradient_cover(matrix, 4)
    random = [
        float(matrix[torch.randperm(12, generator=torch.Generator().manual_seed(s))[:4]].amax(0).sum())
        for s in range(32)
    ]
    assert float(matrix[chosen].amax(0).sum()) > sum(random) / 32


def test_duplicates_are_chosen_once() -> None:
    teacher, student, units = calibrated(Residual)
    probe = gradient_probe(teacher, student, units, "last_layer")
    x = photographs(6, SIZE)
    chosen = cover(probe, x.repeat(3, 1, 1, 1), 6)
    assert sorted((chosen % 6).tolist()) == list(range(6))
