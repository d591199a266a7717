"""Guidance parallelism: the two halves of classifier-free guidance on two ranks, one exchange a step."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sat.conditioning.condition import Condition
from sat.diffusion.guidance import Denoise, Guider
from sat.diffusion.schedule import Level
from sat.parallel.collectives import stacked
from sat.parallel.mesh import Axis


class CfgParallel:
    """The first rank predicts without the condition, the second with it; both get both and guide alike.

    Where a guider asks for the conditional rows alone, as outside an interval, the second rank predicts for
    both: no faster than one rank, and no slower.
    """

    def __init__(self, guider: Guider, axis: Axis) -> None:
        self.guider, self.axis = guider, axis

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        """This rank's half of the guider's rows."""
        rows, count = self.guider.rows(cond, uncond), len(cond)
        if len(rows) != 2 * count:
            raise ValueError(
                f"parallel.guidance 2 shares the two halves of guidance, and {type(self.guider).__name__} "
                f"looks once at each image here: set parallel.guidance to 1"
            )
        return rows.rows(slice(self.axis.rank * count, (self.axis.rank + 1) * count))

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        """Guided x0, the same to the last bit on both ranks."""

        def both(rows: Tensor, level: Level) -> Tensor:
            if len(rows) == len(x):
                return self._conditional(denoise, rows, level)
            return stacked(self.axis, denoise(rows.chunk(2)[self.axis.rank], level)).flatten(0, 1)

        return self.guider(both, x, level)

    def _conditional(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        """The second rank's prediction."""
        assert self.axis.group is not None, "an axis of two ranks has a group"
        out = denoise(x, level).contiguous() if self.axis.rank else x.new_empty(x.shape)
        dist.broadcast(out, dist.get_global_rank(self.axis.group, 1), group=self.axis.group)
        return out
