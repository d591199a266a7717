"""A Fréchet distance without most of what the number of pictures adds to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sat.apps.evaluate.distances import frechet, statistics

FEWEST = 100
"""Different things shown on each side: with 50 the value is still up to 1.8 times that of many."""

SHARES = (0.5, 0.625, 0.75, 0.875)
DRAWS = 40


def frechet_of_many(
    made: Tensor, real: Tensor, made_of: Sequence[str], real_of: Sequence[str]
) -> float | None:
    """The Fréchet distance of features (M, width) and (N, width) that many pictures would have.

    Few pictures make it larger, by about c / N: it is taken of all pictures and of random parts of them, and
    the line through the values over 1 / N is read at 0. ``made_of`` and ``real_of`` say what each picture
    shows; a part has all pictures of what it shows on both sides. None where either side shows fewer than
    ``FEWEST`` things.
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
