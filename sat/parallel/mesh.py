"""The one mesh of ranks: data x guidance x sequence x tensor, and what DeepSpeed asks of it."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sat.parallel.launch import Runtime

AXES = ("data", "guidance", "sequence", "tensor")


class Mesh:
    """Ranks laid out as (data, guidance, sequence, tensor), tensor ranks adjacent.

    Also DeepSpeed's ``mpu``. Its "data parallel" group is data x guidance x sequence, because gradients are
    averaged over all of them; the class defines none of the sequence methods DeepSpeed probes for, which
    would scale gradients wrongly.
    """

    def __init__(self, runtime: Runtime, *, tensor: int = 1, sequence: int = 1, guidance: int = 1) -> None:
        inner = tensor * sequence * guidance
        if min(tensor, sequence, guidance) < 1 or runtime.world % inner:
            raise ValueError(
                f"parallel.tensor {tensor} x sequence {sequence} x guidance {guidance} = {inner} ranks: "
                f"expected a divisor of the {runtime.world} processes of this run"
            )
        shape = (runtime.world // inner, guidance, sequence, tensor)
        mesh: DeviceMesh = init_device_mesh(runtime.device.type, shape, mesh_dim_names=AXES)
        self._sizes = dict(zip(AXES, shape, strict=True))
        self._data = mesh["data"].get_local_rank()
        self._tensor: dist.ProcessGroup = mesh["tensor"].get_group()
        if inner == 1:
            self._gradient: dist.ProcessGroup = mesh["data"].get_group()
        else:
            self._gradient = mesh[AXES[:3]]._flatten("gradient").get_group()

    @property
    def data_ranks(self) -> int:
        """Number of ranks that read different images."""
        return self._sizes["data"]

    @property
    def data_rank(self) -> int:
        """This rank's place among them."""
        return self._data

    # DeepSpeed's mpu: the seven methods the engine calls.
    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks over which gradients are averaged and optimizer state is sharded."""
        return self._gradient

    def get_data_parallel_world_size(self) -> int:
        """Size of the gradient group."""
        return self._gradient.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor ranks of one model."""
        return self._tensor

    def get_model_parallel_world_size(self) -> int:
        """Number of tensor ranks."""
        return self._tensor.size()

    def get_model_parallel_rank(self) -> int:
        """This rank's place among the tensor ranks; names the checkpoint file."""
        return self._tensor.rank()

    def get_tensor_model_parallel_rank(self) -> int:
        """The same under its newer name."""
        return self._tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """The same under its newer name."""
        return self._tensor.size()
