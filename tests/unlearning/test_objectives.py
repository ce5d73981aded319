"""Each objective against its formula, written out on log-probabilities made by hand."""

import math

import pytest
import torch

from app.unlearning.objectives import loss_weights, npo, simnpo, weighted_ascent

LOSS = torch.tensor([0.3, 2.0], dtype=torch.float64)
BEFORE = torch.tensor([0.2, 2.5], dtype=torch.float64)
TOKENS = torch.tensor([7.0, 3.0], dtype=torch.float64)


def test_npo_is_the_log_of_one_plus_the_ratio_to_the_power_beta() -> None:
    beta = 0.1
    ratio = [math.exp(-loss * n) / math.exp(-old * n) for loss, old, n in zip(LOSS, BEFORE, TOKENS, strict=True)]
    expected = [2 / beta * math.log(1 + one**beta) for one in ratio]
    assert npo(LOSS, BEFORE, TOKENS, beta).tolist() == pytest.approx(expected, rel=1e-12)


def test_npo_falls_as_the_row_becomes_unlikely_and_is_bounded_below() -> None:
    losses = torch.tensor([0.1, 1.0, 10.0, 1000.0])
    found = npo(losses, torch.zeros(4), torch.ones(4), 0.5)
    assert (found.diff() < 0).all()
    assert found[-1] >= 0


def test_simnpo_is_a_log_sigmoid_of_the_length_normalised_likelihood() -> None:
    beta, gamma = 2.5, 0.3
    expected = [-2 / beta * math.log(1 / (1 + math.exp(-(beta * float(loss) - gamma)))) for loss in LOSS]
    assert simnpo(LOSS, beta, gamma).tolist() == pytest.approx(expected, rel=1e-12)


def test_rapidun_descends_on_the_clean_answer_and_climbs_on_the_forgotten_one() -> None:
    clean = torch.tensor([1.0, 4.0], dtype=torch.float64)
    assert weighted_ascent(clean, LOSS, 0.5, 1.0).tolist() == pytest.approx([0.5 - 0.3, 2.0 - 2.0])
    assert weighted_ascent(torch.zeros(2), LOSS, 0.5, 2.0).tolist() == pytest.approx([-0.6, -4.0])


def test_loreun_weighs_the_best_known_rows_most_with_mean_one() -> None:
    weights = loss_weights(torch.tensor([0.1, 1.0, 3.0]), 1.0)
    assert float(weights.mean()) == pytest.approx(1)
    assert (weights.diff() < 0).all()
    assert float(weights[0] / weights[1]) == pytest.approx(math.exp(0.9), rel=1e-5)
