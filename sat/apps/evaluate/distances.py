"""Distances between two sets of pictures by their features: Fréchet, kernel, precision and recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import PIL.Image
import torch
from torch import Tensor

NEIGHBOURS = 3
"""Neighbours whose distance is the radius around a picture: the paper's choice."""


class Extractor(Protocol):
    """A feature network. ``name`` goes into notes, since values compare only under the same network."""

    name: str

    def __call__(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Features (B, F), float32 on the CPU, of a batch of pictures."""
        ...


def features_of(extract: Extractor, images: Sequence[PIL.Image.Image], batch_size: int) -> Tensor:
    """Features (B, F) of pictures of any number, ``batch_size`` at a time."""
    starts = range(0, len(images), batch_size)
    return torch.cat([extract(images[start : start + batch_size]) for start in starts])


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (width) and covariance (width, width), float64, of features (B, width); B at least 2."""
    if len(features) < 2:
        raise ValueError(f"statistics of features need at least 2 pictures, got {len(features)}")
    double = features.double()
    return double.mean(0), torch.cov(double.T).reshape(features.shape[1], features.shape[1])


def frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Fréchet distance of two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2).

    Source: Dowson and Landau 1982; as in FID (arXiv:1706.08500). Values compare only under the same network
    and number of pictures.
    """
    values, vectors = torch.linalg.eigh(cov_a.double())
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T  # C_a^1/2
    middle = root @ cov_b.double() @ root
    cross = torch.linalg.eigvalsh((middle + middle.T) / 2).clamp_min(0).sqrt().sum()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + cov_a.double().trace() + cov_b.double().trace() - 2 * cross))


class Coverage(NamedTuple):
    """Shares from 0 to 1."""

    precision: float  # made pictures that lie among real ones
    recall: float  # real pictures that lie among made ones


def precision_recall(made: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> Coverage:
    """Share of ``made`` (B, F) that is like ``real`` (N, F), and share of ``real`` that is covered.

    A picture lies among others if it is within the distance from some one of them to its k-th nearest
    neighbour. Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, eq. 1 to 3, with k = 3.
    """
    fewest = min(len(made), len(real))
    if fewest <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} pictures on both sides, got {fewest}"
        )
    made, real = made.double(), real.double()
    return Coverage(_inside(made, real, neighbours), _inside(real, made, neighbours))


def _inside(points: Tensor, others: Tensor, neighbours: int) -> float:
    """Share of ``points`` (B, F) within the radius of at least one of ``others`` (N, F)."""
    nearest = (
        torch.cdist(part, others).topk(neighbours + 1, largest=False).values  # the first is the point itself
        for part in torch.split(others, 512)
    )
    radii = torch.cat([distances[:, -1] for distances in nearest])
    hits = [(torch.cdist(part, others) <= radii).any(1) for part in torch.split(points, 512)]
    return torch.cat(hits).double().mean().item()


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """Squared maximum mean discrepancy of features ``made`` (M, width) and ``real`` (N, width).

    Its expectation does not depend on the number of pictures, unlike a Fréchet distance's: about 0, also
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


FEWEST = 100
"""Different things shown on each side: with 50 the value is still up to 1.8 times that of many."""

SHARES = (0.5, 0.625, 0.75, 0.875)
DRAWS = 40


def frechet_of_many(
    made: Tensor, real: Tensor, made_of: Sequence[str], real_of: Sequence[str]
) -> float | None:
    """The Fréchet distance of features (M, width) and (N, width) that many pictures would have.

    Few pictures make it larger, by about c / N: it is taken of all pictures and of random parts of them, and
    the line through the values over 1 / N is read at 0. ``made_of`` and ``real_of`` name the thing that each
    picture shows; a part has all pictures of its things on both sides. None where either side shows fewer
    than ``FEWEST`` things.
    Source: FID-infinity, arXiv:1911.07023, section 3, where the real pictures are many and stay whole.
    """
    if min(len(set(made_of)), len(set(real_of))) < FEWEST:
        return None
    shown = sorted({*real_of, *made_of})  # so that the order of files does not matter
    number = {name: i for i, name in enumerate(shown)}
    ours, theirs = (torch.tensor([number[name] for name in names]) for names in (made_of, real_of))
    noise = torch.Generator().manual_seed(0)
    inverse, distances = [1.0], [frechet(*statistics(made), *statistics(real))]
    for share in SHARES:
        for _ in range(DRAWS):
            part = torch.randperm(len(shown), generator=noise) < share * len(shown)
            inverse.append(1 / share)
            distances.append(frechet(*statistics(made[part[ours]]), *statistics(real[part[theirs]])))
    x, y = torch.tensor([inverse, distances], dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())
