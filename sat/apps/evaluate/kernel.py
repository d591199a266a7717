"""The kernel distance of two sets of features, which few pictures suffice for."""

from __future__ import annotations

from torch import Tensor


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """Squared maximum mean discrepancy of features ``made`` (M, width) and ``real`` (N, width).

    Its expectation does not depend on how many pictures there are, unlike a Fréchet distance's: about 0, also
    below, for two draws from one source. Kernel (x y / width + 1)^3.
    Source: KID, arXiv:1801.01401, section 4 and eq. 4.
    """
    if min(len(made), len(real)) < 2:
        raise ValueError(f"a kernel distance needs 2 pictures on each side, got {len(made)} and {len(real)}")
    ours, theirs = made.double(), real.double()
    within = _off_diagonal(_kernel(ours, ours)) + _off_diagonal(_kernel(theirs, theirs))
    return float(within - 2 * _kernel(ours, theirs).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) of features (M, width) and (N, width)."""
    products: Tensor = (a @ b.T / a.shape[1] + 1) ** 3
    return products


def _off_diagonal(square: Tensor) -> Tensor:
    """The mean of a matrix without its diagonal."""
    count = len(square)
    return (square.sum() - square.trace()) / (count * (count - 1))
