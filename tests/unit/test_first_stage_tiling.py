"""Slicing and tiling: what is exact, what is near, what is bounded and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sat.first_stage import AutoencoderKL
from sat.first_stage.tiling import Tiling, decode_tiled, encode_tiled
from tests.tolerances import F32


@pytest.fixture
def net() -> AutoencoderKL:
    """Factor 4, 3 latent channels."""
    return AutoencoderKL(4, (1, 2, 2), 1, 3, 2).eval()


class Recorder(nn.Module):
    """Passes its input on to ``inner`` and notes the shapes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.shapes = inner, []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        return self.inner(x)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_slicing_changes_nothing(net: AutoencoderKL, batch: int) -> None:
    image, latent = torch.randn(3, 3, 12, 20), torch.randn(3, 3, 3, 5)
    slices = Tiling(batch=batch)
    assert (decode_tiled(net, latent, slices) - net.decode(latent)).abs().max() < F32
    assert (encode_tiled(net, image, slices).moments - net.encode(image).moments).abs().max() < F32


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (5, 8), (8, 3)])
def test_one_tile_is_the_plain_path_exactly(net: AutoencoderKL, size: tuple[int, int]) -> None:
    latent, image = torch.randn(1, 3, *size), torch.randn(1, 3, 4 * size[0], 4 * size[1])
    assert torch.equal(decode_tiled(net, latent, Tiling(8)), net.decode(latent))
    assert torch.equal(encode_tiled(net, image, Tiling(8)).moments, net.encode(image).moments)


@torch.no_grad()
def test_no_pass_exceeds_the_tile_or_the_batch(net: AutoencoderKL) -> None:
    net.encoder, net.decoder = Recorder(net.encoder), Recorder(net.decoder)  # type: ignore[assignment]
    decode_tiled(net, torch.randn(3, 3, 21, 9), Tiling(8, batch=2))
    encode_tiled(net, torch.randn(3, 3, 84, 28), Tiling(8, batch=2))
    assert set(net.decoder.shapes) == {(2, 3, 8, 8), (1, 3, 8, 8)}
    assert set(net.encoder.shapes) == {(2, 3, 32, 28), (1, 3, 32, 28)}


class Local(AutoencoderKL):
    """Every cell on its own: encodes to its mean colour, decodes to a constant square. Tiling is exact."""

    def __init__(self) -> None:
        super().__init__(4, (1, 2, 2), 1, 3, 2)

        class Enlarge(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.repeat_interleave(4, 2).repeat_interleave(4, 3)

        class Shrink(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.avg_pool2d(x, 4).repeat(1, 2, 1, 1)

        self.encoder, self.decoder = Shrink(), Enlarge()  # type: ignore[assignment]

    dtype = torch.float32  # type: ignore[assignment]


@pytest.mark.parametrize("overlap", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("size", [(9, 9), (8, 30), (31, 5), (17, 23)])
def test_tiles_land_where_they_were_cut(size: tuple[int, int], overlap: int) -> None:
    """A first stage without context is reproduced exactly, whatever the overlap."""
    local, tiling = Local(), Tiling(8, overlap)
    latent, image = torch.randn(2, 3, *size), torch.randn(2, 3, 4 * size[0], 4 * size[1])
    assert (decode_tiled(local, latent, tiling) - local.decode(latent)).abs().max() < F32
    assert (encode_tiled(local, image, tiling).moments - local.encode(image).moments).abs().max() < F32


@torch.no_grad()
def test_seams_are_blended(net: AutoencoderKL) -> None:
    """What tiling adds to the plain image steps where tiles begin; with overlap no more than anywhere."""
    latent = nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=(30, 30), mode="bicubic")
    plain = net.decode(latent)

    def error(overlap: int) -> Tensor:
        return decode_tiled(net, latent, Tiling(10, overlap)) - plain

    def seam(overlap: int) -> float:
        """Mean step at the first row of every tile but the first, relative to that of all rows."""
        steps = error(overlap).diff(dim=2).abs().mean(dim=(0, 1, 3))
        starts = [4 * window.start for window in Tiling(10, overlap).windows(30)[1:]]
        return float(steps[[start - 1 for start in starts]].mean() / steps.mean())

    assert seam(0) > 1.5
    assert seam(4) < 0.9


@torch.no_grad()
def test_tiled_is_near_plain_where_tiles_resemble_the_whole(net: AutoencoderKL) -> None:
    """Even statistics all over the picture leave the context at borders, which blending fades out."""
    latent, image = torch.randn(1, 3, 40, 50), torch.randn(1, 3, 160, 200)
    plain, moments = net.decode(latent), net.encode(image).moments
    tiling = Tiling(20)
    assert (decode_tiled(net, latent, tiling) - plain).abs().mean() < 0.2 * plain.std()
    assert (encode_tiled(net, image, tiling).moments - moments).abs().mean() < 0.2 * moments.std()


@torch.no_grad()
def test_half_precision_comes_back_as_it_was(net: AutoencoderKL) -> None:
    net.to(torch.bfloat16)
    assert decode_tiled(net, torch.randn(1, 3, 9, 9), Tiling(8)).dtype == torch.bfloat16


def test_bad_tiles_are_refused(net: AutoencoderKL) -> None:
    with pytest.raises(
        ValueError, match=r"tile is 7 latent cells \(memory.decode_tile\), expected at least 8"
    ):
        Tiling(7)
    with pytest.raises(ValueError, match="overlap is 8 latent cells, expected 0 to 7"):
        Tiling(8, 8)
    for use in (lambda: Tiling(8, batch=0), lambda: Tiling(batch=0)):
        with pytest.raises(ValueError, match="batch is 0, expected at least 1 image"):
            use()
    with pytest.raises(ValueError, match="multiples of 4"):
        encode_tiled(net, torch.zeros(1, 3, 42, 40), Tiling(8))
    with pytest.raises(ValueError, match="latent batch"):
        decode_tiled(net, torch.zeros(1, 4, 40, 40), Tiling(8))
