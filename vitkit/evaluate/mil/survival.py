"""Survival: Cox's partial likelihood as a loss, and Harrell's concordance index as a metric.

Times are signed: t > 0 an event after t, t < 0 a follow-up that ended without event (censored) after |t|.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitkit.errors import DataError
from vitkit.evaluate import metrics


def cox_loss(risk: Tensor, time: Tensor) -> Tensor:
    """Negative log partial likelihood (Cox 1972) of `risk` (..., N) given signed `time` (..., N) -> (...).

    At equal times events come before censored cases, and each event's risk set is what follows it in this order; the sum
    over events is divided by the number of all cases, as in owkin/HistoSSLscaling. No event: 0.
    """
    late = _order(time).flip(-1)  # the last to leave first, so that a cumulative sum runs over the risk set
    risk, event = risk.gather(-1, late), (time > 0).gather(-1, late)
    return -((risk - torch.logcumsumexp(risk, -1)) * event).sum(-1) / risk.shape[-1]


def _order(time: Tensor) -> Tensor:
    """Indices that sort by |time|, events before censored ones at ties."""
    first = torch.argsort((time < 0).to(torch.int8), dim=-1, stable=True)
    second = torch.argsort(time.abs().gather(-1, first), dim=-1, stable=True)
    return first.gather(-1, second)


def concordance(time: np.ndarray, risk: np.ndarray) -> float:
    """Harrell's C: the share of comparable pairs in which the higher risk had the earlier event; equal risks count half.

    A pair is comparable when the earlier time is an event; at equal times, when exactly one of the two is. NaN when no
    pair is.
    """
    return float(_concordance(time, risk, np.ones((len(np.asarray(time)), 1)))[0])


def _concordance(time: np.ndarray, risk: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted form: weights (N, B) -> (B,)."""
    time, risk = np.asarray(time, dtype=float).reshape(-1), np.asarray(risk, dtype=float).reshape(-1)
    check_times(time)
    if len(time) != len(risk):
        raise DataError(f"{len(time)} times for {len(risk)} risks", fix="one risk per case")
    if not np.isfinite(risk).all():
        raise DataError(
            f"{int((~np.isfinite(risk)).sum())} risks are not finite", fix="find out why the model gave NaN"
        )
    event, t = time > 0, np.abs(time)
    pairs = np.zeros((2, weights.shape[1]))
    for i in np.flatnonzero(event):  # row by row: the N x N table of pairs is never held
        later = (t[i] < t) | ((t[i] == t) & ~event)
        right = later * ((risk[i] > risk) + 0.5 * (risk[i] == risk))
        pairs += np.stack([right @ weights, later @ weights]) * weights[i]
    return np.divide(pairs[0], pairs[1], out=np.full(pairs.shape[1], np.nan), where=pairs[1] > 0)


metrics.WEIGHTED[concordance] = _concordance  # hundreds of bootstrap draws in one pass


def check_times(time: np.ndarray) -> None:
    """DataError unless every signed time is finite and not 0."""
    wrong = np.flatnonzero(~np.isfinite(time) | (time == 0))
    if len(wrong):
        raise DataError(
            f"the time of case {wrong[0]} is {time[wrong[0]]}",
            fix="signed times: positive for an event, negative for censored; shift times of 0 by a small number",
        )
