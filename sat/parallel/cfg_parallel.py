"""CFG parallelism: the two halves of classifier-free guidance on two ranks, one exchange a step."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from sat.conditioning.conditioner import Condition
from sat.diffusion.guidance import Denoise, Guider
from sat.diffusion.schedule import Level
from sat.parallel.collectives import stacked
from sat.parallel.launch import Axis


class CfgParallel:
    """Guider over two ranks: the first predicts without the condition, the second with it.

    Both get both predictions and guide alike. A guider that asks for the conditional rows alone, as outside a
    guidance interval, gets the second rank's prediction on both: no faster than one rank, and no slower.
    """

    def __init__(self, guider: Guider, axis: Axis) -> None:
        self.guider, self.axis = guider, axis

    def rows(self, cond: Condition, uncond: Condition) -> Condition:
        """This rank's half of the guider's rows (2 B -> B)."""
        rows, count = self.guider.rows(cond, uncond), len(cond)
        if len(rows) != 2 * count:
            raise ValueError(
                f"parallel.guidance 2 shares the two halves of guidance, and {type(self.guider).__name__} "
                f"evaluates each image once here: set parallel.guidance to 1"
            )
        return rows.rows(slice(self.axis.rank * count, (self.axis.rank + 1) * count))

    def __call__(self, denoise: Denoise, x: Tensor, level: Level) -> Tensor:
        """Guided x0, the same to the last bit on both ranks."""
        rank, group = self.axis.rank, self.axis.group

        def both(rows: Tensor, level: Level) -> Tensor:
            if len(rows) == 2 * len(x):
                return stacked(self.axis, denoise(rows.chunk(2)[rank], level)).flatten(0, 1)
            assert group is not None, "an axis of two ranks has a group"
            out = denoise(rows, level).contiguous() if rank else rows.new_empty(rows.shape)
            dist.broadcast(out, dist.get_global_rank(group, 1), group=group)
            return out

        return self.guider(both, x, level)
