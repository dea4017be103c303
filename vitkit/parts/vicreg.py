"""VICReg's three terms, exact and cheap for wide embeddings, and what is logged beside them.

Paper: Bardes, Ponce & LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022
(arXiv 2105.04906).

For n embeddings of E dimensions, centred (z) and with C = z^T z / (n - 1): the covariance term is the sum of squared
off-diagonal entries of C over E. The sum of all squared entries is the same for the E x E matrix z^T z and for the n x n
Gram matrix z z^T, and the diagonal is a column sum, so for n < E the small matrix is enough: n^2 E instead of n E^2
multiplications and no E x E matrix in memory; value and gradient are the same.

Everything here computes in float32 (or double), under autocast, too: squares of half-precision covariances lose the term.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitkit.errors import ConfigError, TrainingError

EPS = 1e-4  # inside the square root of the deviation


def invariance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of two views' embeddings (n, E)."""
    with full_precision(x):
        return (_wide(x) - _wide(y)).square().mean()


def centred(x: Tensor) -> Tensor:
    """`x` (n, E) minus its mean over the batch, in float32 (doubles stay)."""
    with full_precision(x):
        wide = _wide(x)
        return wide - wide.mean(0)


def variance(z: Tensor, target: float = 1.0) -> Tensor:
    """Mean over dimensions of relu(target - deviation) of centred embeddings (n, E); unbiased variance."""
    with full_precision(z):
        return (target - (_wide(z).square().sum(0) / _below(z) + EPS).sqrt()).relu().mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of squared off-diagonal entries of the covariance of centred embeddings (n, E), over E."""
    with full_precision(z):
        return _Covariance.apply(_wide(z))


class _Covariance(torch.autograd.Function):
    """f(z) = (|z z^T|^2 - sum_d (sum_i z_id^2)^2) / ((n - 1)^2 E), d f / d z = 4 (z z^T z - z * diag) / ((n - 1)^2 E).

    The product z z^T z is one matrix product from the smaller of z z^T and z^T z: half of what autograd would do.
    """

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:  # type: ignore[override]
        n, dim = z.shape
        scale = 1.0 / (_below(z) ** 2 * dim)
        ctx.scale, ctx.gram = scale, n < dim
        if ctx.gram:
            matrix, diagonal = z @ z.T, z.square().sum(0)
            value = matrix.square().sum() - diagonal.square().sum()
        else:
            matrix = z.T @ z
            diagonal = torch.zeros_like(matrix[0])
            matrix.fill_diagonal_(0)  # nothing to subtract, so nothing cancels
            value = matrix.square().sum()
        ctx.save_for_backward(z, matrix, diagonal)
        return value * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        z, matrix, diagonal = ctx.saved_tensors
        product = matrix @ z if ctx.gram else z @ matrix
        return (product.addcmul_(z, diagonal, value=-1) if ctx.gram else product) * (4 * ctx.scale * grad)


@torch.no_grad()
def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean deviation of a dimension, dimensions in use) of embeddings (n, E), both 0-dim and cheap enough for every step.

    Dimensions in use are the participation ratio of the covariance's eigenvalues, (sum)^2 / sum of squares: 1 when all lie
    on a line, at most min(n - 1, E).
    """
    z = centred(x)
    with full_precision(z):
        total = z.square().sum()
        matrix = z @ z.T if z.shape[0] < z.shape[1] else z.T @ z
        return (z.square().sum(0) / _below(z)).sqrt().mean(), total.square() / matrix.square().sum().clamp_min(1e-30)


def gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, with gradients; `x` itself where there is one process.

    Every process then computes the loss of the whole batch. Gradients of the gathered rows are summed over processes, and
    DistributedDataParallel's mean over processes makes them those of one process with the whole batch.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    if torch.distributed.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    counts = [torch.zeros((), dtype=torch.int64, device=x.device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, torch.tensor(len(x), device=x.device))
    if len({int(count) for count in counts}) > 1:
        raise TrainingError(
            f"the processes hold {', '.join(str(int(count)) for count in counts)} samples of a batch, and VICReg compares all",
            fix="a batch_size that the data fill: the last incomplete batch of an epoch is dropped then",
        )
    return torch.cat(all_gather(x))


def full_precision(x: Tensor) -> AbstractContextManager:
    """Autocast switched off on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _below(z: Tensor) -> int:
    """n - 1, where that is above 0."""
    require_many(len(z))
    return len(z) - 1


def require_many(n: int) -> None:
    """ConfigError for a batch of one."""
    if n < 2:
        raise ConfigError(
            "VICReg compares the samples of a batch, and this batch has 1", fix="batch_size 2 or more (the paper: 512)"
        )
