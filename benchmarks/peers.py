"""The same network, ours or diffusers', with random weights, and the same inputs for both."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sat.checkpoint.formats.diffusers import transformer_config, vae_config
from sat.conditioning.conditioner import Condition, SizeConditioner, Sizes
from sat.first_stage import AutoencoderKL
from sat.models.cogview3_plus import CogView3Plus

STEPS = 50
"""Of a picture: what is done once for all steps counts a fiftieth in each."""
TIMESTEPS = [float(1000 - 20 * i - 1) for i in range(STEPS)]


@dataclass(frozen=True)
class Size:
    """A network and a latent. ``batch`` is pictures; guidance doubles the rows."""

    name: str
    params: Mapping[str, Any]
    cells: int = 64  # side of the latent
    batch: int = 1
    vae: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows that go through the network with classifier-free guidance."""
        return 2 * self.batch


BENCH = Size("bench Plus", {"dim": 640, "heads": 16, "depth": 8})
SMALL = Size(
    "small Plus",
    {
        "dim": 256, "heads": 8, "depth": 6, "text_dim": 192, "text_len": 16, "emb_dim": 64,
        "size_dim": 192, "table_size": [8, 8],
    },
    cells=8,
    vae={"width": 16, "multipliers": [1, 2, 4, 8], "res_blocks": 1, "groups": 8, "scale_factor": 0.65},
)  # fmt: skip


@dataclass
class Side:
    """One of the two networks, alone so that a process's peak memory is its own, and the inputs."""

    network: Any
    latent: Tensor
    text: Tensor
    vector: Tensor
    pixels: int  # side of the picture

    def prepare(self) -> Any:
        """What our sampling loop does once per picture."""
        cells = self.latent.shape[2]
        return self.network.prepare(Condition(self.text, self.vector), (cells, cells), TIMESTEPS)

    def our_step(self, network: nn.Module | None = None) -> Callable[[], Tensor]:
        """One denoising step of ours."""
        prepared, net = self.prepare(), network or self.network
        return lambda: net(self.latent, TIMESTEPS[10], prepared)

    def their_step(self, network: nn.Module | None = None) -> Callable[[], Tensor]:
        """The same step of diffusers', called as its pipeline does."""
        net, rows = network or self.network, len(self.latent)
        size = torch.tensor(
            [[self.pixels, self.pixels]] * rows, device=self.latent.device, dtype=self.latent.dtype
        )
        crop = torch.zeros_like(size)
        at = torch.full((rows,), int(TIMESTEPS[10]), device=self.latent.device)

        def step() -> Tensor:
            out: Tensor = net(
                hidden_states=self.latent, encoder_hidden_states=self.text, timestep=at, original_size=size,
                target_size=size, crop_coords=crop, return_dict=False,
            )[0]  # fmt: skip
            return out

        return step


def plus(size: Size, dtype: torch.dtype, device: torch.device | str = "cpu", *, peer: bool = True) -> Side:
    """The network of ``size``: diffusers' if ``peer``, else ours."""
    params = {"double_norm": False, **size.params}
    torch.manual_seed(0)
    with torch.device(device):
        network = their_transformer(params) if peer else CogView3Plus(**params, zero_init=False)
    network = network.to(dtype).eval()
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    pixels = 8 * size.cells
    sizer = SizeConditioner(params.get("size_dim", 1536) // 6)
    vector = sizer(*Sizes.uncropped(pixels, pixels, size.rows)).to(device)
    latent = normal(size.rows, params.get("channels", 16), size.cells, size.cells)
    text = normal(size.rows, params.get("text_len", 224), params.get("text_dim", 4096))
    text[: size.batch] = 0  # the unconditional half, as both implementations have it
    return Side(network, latent, text, vector, pixels)


def their_transformer(params: Mapping[str, Any]) -> nn.Module:
    """diffusers' CogView3-Plus transformer of our parameters."""
    quiet()
    from diffusers import CogView3PlusTransformer2DModel

    config = {k: v for k, v in transformer_config(params).items() if not k.startswith("_")}
    made: nn.Module = CogView3PlusTransformer2DModel(**config)
    return made


def decoder(
    params: Mapping[str, Any], cells: int, dtype: torch.dtype, device: torch.device | str, *, peer: bool
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A 16-channel autoencoder, diffusers' or ours, and its decoding of one latent of ``cells`` squared.

    ``params`` are ours, empty for the published one.
    """
    torch.manual_seed(0)
    made: Any
    with torch.device(device):
        if peer:
            quiet()
            from diffusers import AutoencoderKL as Theirs

            config = {k: v for k, v in vae_config(params).items() if not k.startswith("_")}
            made = Theirs(**config)
        else:
            made = AutoencoderKL(**params)
    made = made.to(dtype).eval()
    channels = params.get("latent_channels", 16)
    latent = torch.randn(1, channels, cells, cells, generator=torch.Generator().manual_seed(1))
    latent = latent.to(device, dtype)
    if peer:
        return made, lambda: made.decode(latent, return_dict=False)[0]
    return made, lambda: made.decode(latent)


def quiet() -> None:
    """The peers' advice is not part of a table."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
