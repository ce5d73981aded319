"""What an unlearning step minimises, one small function for each method; all of them differentiable, all batched.

Every loss is per row and is made of a row's mean cross-entropy over its response tokens ("loss", in nats a token), so
that it depends neither on a row's length nor on its batch mates. log pi(y|x) of a row is -loss x tokens. Sources:

* ga, graddiff: gradient ascent on the forget rows, without and with descent on retained ones (Liu et al., 2022).
* npo: negative preference optimisation against the model before unlearning (Zhang et al., 2024, eq. 3).
* simnpo: the same without a reference, by length-normalised likelihood (Fan et al., 2024, eq. 4).
* loreun: gradient difference with forget rows weighted by their own loss (LoReUn, 2025).
* relabel: descent on clean answers in place of the forgotten ones. renew: the same after fisher's dampening; ours.
* fisher, dampen: no loss; see fisher.py.
* bounded: rapidun with npo's bounded ascent in place of its own; ours (docs/results.md).
* rapidun: weighted descent on clean answers, weighted ascent on the forgotten ones (RapidUn, 2025; METHODS section 4).
"""

from __future__ import annotations

import torch
from torch.nn import functional


def npo(forget: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, beta: float) -> torch.Tensor:
    """(2 / beta) log(1 + (pi / pi_ref) ** beta), bounded below by 0 where ascent has no bound.

    Args:
        forget: [batch], loss of the model that is trained.
        reference: [batch], loss of the model before unlearning.
        tokens: [batch], response tokens.
    """
    log_ratio = (reference - forget) * tokens  # log pi - log pi_ref
    return 2 / beta * functional.softplus(beta * log_ratio)


def simnpo(forget: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """-(2 / beta) log sigmoid(-(beta / tokens) log pi - gamma)."""
    return -2 / beta * functional.logsigmoid(beta * forget - gamma)


def weighted_ascent(clean: torch.Tensor, forget: torch.Tensor, descent: float, climb: float) -> torch.Tensor:
    """rapidun's forget term before its weight: descent x loss(clean answer) - climb x loss(forgotten answer)."""
    return descent * clean - climb * forget


def loss_weights(losses: torch.Tensor, temperature: float) -> torch.Tensor:
    """loreun: rows that the model knows best (lowest loss) weigh most; mean 1.

    Args:
        losses: [rows], of the forget rows before unlearning.
    """
    return torch.softmax(-losses / temperature, 0) * len(losses)
