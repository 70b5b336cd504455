"""Cumulative-logit (ordinal) heads, and the weighted loss.

May use: names.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import nn

from ..names import SEVERITY_WEIGHTS


def cumulative_log_probabilities(score: torch.Tensor, cutpoints: torch.Tensor) -> torch.Tensor:
    """Log probabilities of ordered classes from one logit each, all heads at once.

    score: (...,) float; cutpoints: (..., K - 1) ascending, broadcast against score. Returns (..., K) float32 log p.
    P(y <= k) = sigmoid(cutpoint_k - score) (McCullagh 1980; spacecutter's LogisticCumulativeLink). In log space,
    with log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)) for a > b: finite, with
    a gradient, for scores at which differences of sigmoids round to 0.
    """
    below = cutpoints.float() - score.float()[..., None]
    first = F.logsigmoid(below[..., :1])
    last = F.logsigmoid(-below[..., -1:])
    gap = (below[..., 1:] - below[..., :-1]).clamp(min=1e-6)
    middle = F.logsigmoid(below[..., 1:]) + F.logsigmoid(-below[..., :-1]) + torch.log(-torch.expm1(-gap))
    return torch.cat([first, middle, last], -1)


def weighted_losses(
    log_probabilities: torch.Tensor, grades: torch.Tensor, share: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of w * nll, sum of w), scalar tensors float32: what losses over several batches are put together from.

    log_probabilities: (..., 3); grades: (...) int64, -1 = missing label, weighs nothing; share: broadcast against
    grades, multiplies the weights (of labels that stand for a part of a mixed input). The weights are the metric's, and
    so is the first sum over the second; over the number of graded entries it is spacecutter's CumulativeLinkLoss.
    """
    safe = grades.clamp(min=0)
    nll = -log_probabilities.gather(-1, safe[..., None])[..., 0]
    weight = torch.as_tensor(SEVERITY_WEIGHTS, dtype=nll.dtype, device=nll.device)[safe] * (grades >= 0)
    if share is not None:
        weight = weight * share
    return (weight * nll).sum(), weight.sum()


MARGIN = 0.15  # between the two cut points of a head, at least


class CumulativeHeads(nn.Module):
    """The cut points of many ordinal heads, one LogisticCumulativeLink of spacecutter for each.

    `links` holds them in row order, so the state of a spacecutter link loads into any of them and the other way round.
    spacecutter's own forward takes differences of sigmoids; cumulative_log_probabilities evaluates all heads at once
    and in log space instead, from the same cut points.

    Parameters
    ----------
    prior : (*shape, 3) array
        Class probabilities at score 0, so that training starts from the class prior. `shape` is that of the heads.
    """

    def __init__(self, prior: ArrayLike) -> None:
        from spacecutter.models import LogisticCumulativeLink  # Kaggle's image lacks it until start_notebook

        super().__init__()
        start = torch.as_tensor(np.asarray(prior), dtype=torch.float64)
        first, second = torch.logit(start.cumsum(-1)[..., :-1].clamp(1e-4, 1 - 1e-4)).unbind(-1)
        cutpoints = torch.stack([first, torch.maximum(second, first + MARGIN)], -1).float()
        self.shape = start.shape[:-1]
        self.links: Any = nn.ModuleList(LogisticCumulativeLink(start.shape[-1]) for _ in range(self.shape.numel()))
        for link, cut in zip(self.links, cutpoints.view(-1, 2), strict=True):
            link.cutpoints = nn.Parameter(cut.clone())

    @property
    def cutpoints(self) -> torch.Tensor:
        """(*shape, 2) tensor, ascending along the last axis."""
        return torch.stack([link.cutpoints for link in self.links]).view(*self.shape, 2)

    @torch.no_grad()
    def keep_ascending(self) -> None:
        """Keep each head's cut points MARGIN apart, as spacecutter's AscensionCallback for skorch does. Call it after
        every step of the optimizer, which does not know that they are ordered."""
        for link in self.links:
            link.cutpoints[0].clamp_(max=link.cutpoints[1] - MARGIN)


def current_heads(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier's state dict, its heads named as CumulativeHeads names them now.

    Earlier weights hold each head's first cut point (`heads.first`) and the gap to the second as the argument of a
    softplus (`heads.gap`); the cut points are the same. Any other state is returned as it is.
    """
    first, gap = state.get("heads.first"), state.get("heads.gap")
    if first is None or gap is None or first.shape != gap.shape or first.numel() > 25:
        return state
    second = first + MARGIN + F.softplus(gap.float())
    cutpoints = torch.stack([first, second], -1).reshape(-1, 2)
    others = {name: value for name, value in state.items() if name not in ("heads.first", "heads.gap")}
    return others | {f"heads.links.{number}.cutpoints": cut.clone() for number, cut in enumerate(cutpoints)}
