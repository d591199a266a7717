"""What stands in an engine for a part that was left out: its numbers without its weights."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from sat.first_stage.model import AutoencoderKL
from sat.first_stage.posterior import Posterior


class AbsentPartError(RuntimeError):
    """Something needs a part of the engine that was left out."""


def _absent(what: str) -> NoReturn:
    raise AbsentPartError(
        f"the {what} was not loaded, because a cache (data.cache) stands for it: "
        "set data.cache to null, or build the engine with every part"
    )


class AbsentAutoencoder(AutoencoderKL):
    """The sizes of an autoencoder that is not there."""

    def __init__(self, like: AutoencoderKL) -> None:
        nn.Module.__init__(self)
        self.factor, self.channels = like.factor, like.channels
        self.image_channels, self.scale_factor = like.image_channels, like.scale_factor

    def encode(self, image: Tensor) -> Posterior:
        """Raise: there is nothing to encode with."""
        _absent("first stage")

    def decode(self, latent: Tensor) -> Tensor:
        """Raise: there is nothing to decode with."""
        _absent("first stage")


class Absent(nn.Module):
    """Any other module that is not there."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what

    def prepare(self, *args: Any) -> NoReturn:
        """Raise: there is no network."""
        _absent(self._what)

    def forward(self, *args: Any) -> NoReturn:
        """Raise: there is nothing to run."""
        _absent(self._what)
