"""Cumulative-logit (ordinal) heads, and the weighted loss.

May use: nothing of the kit.
"""

import numpy as np
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from ..names import SEVERITY_WEIGHTS


def cumulative_log_probabilities(score, cutpoints):
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


def weighted_losses(log_probabilities, grades, share=None):
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


class CumulativeHeads(nn.Module):
    """Cut points of many ordinal heads, kept ascending by construction.

    shape: of the heads; each has K - 1 = 2 cut points, the second at `margin` or more above the first (what
    spacecutter's AscensionCallback enforces after each step holds here by a softplus). prior: (*shape, 3)
    probabilities that a score of 0 shall give: training starts from the class prior.
    """

    def __init__(self, prior, margin=0.15):
        super().__init__()
        prior = torch.as_tensor(np.asarray(prior), dtype=torch.float64)
        cumulative = prior.cumsum(-1)[..., :-1].clamp(1e-4, 1 - 1e-4)
        cut = torch.logit(cumulative)
        gap = (cut[..., 1] - cut[..., 0] - margin).clamp(min=1e-3)
        self.margin = margin
        self.first = nn.Parameter(cut[..., 0].float())
        self.gap = nn.Parameter(torch.log(torch.expm1(gap)).float())

    @property
    def cutpoints(self):
        """(*shape, 2), ascending; spacecutter's `cutpoints` for each head."""
        return torch.stack([self.first, self.first + self.margin + F.softplus(self.gap)], -1)
