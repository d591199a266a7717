"""Initial latents given by the user instead of seeded noise."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

NAME = "latents"
"""The key looked for in a file that holds several tensors."""


class LatentsError(ValueError):
    """Initial latents that do not fit the run, or a file of them that cannot be read."""


def read_latents(path: Path) -> Tensor:
    """The tensor in a ``.safetensors`` or ``.pt`` file: the only one, or the one named ``latents``.

    ``.pt`` files are read with ``weights_only``: nothing in them is executed.
    """
    kind = path.suffix.lower()
    if kind not in (".safetensors", ".pt", ".pth"):
        raise LatentsError(f"initial latents {path}: expected a .safetensors or .pt file")
    try:
        found: object = _read_safetensors(path) if kind == ".safetensors" else _read_pt(path)
    except FileNotFoundError as error:
        raise LatentsError(f"initial latents {path}: no such file") from error
    except pickle.UnpicklingError as error:
        whole = zipfile.is_zipfile(path)
        reason = "holds more than tensors; save the bare tensor" if whole else "damaged or not a tensor file"
        raise LatentsError(f"initial latents {path}: {reason}") from error
    except Exception as error:  # both readers have many ways to say that a file is damaged
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LatentsError(f"initial latents {path}: damaged or not a tensor file ({reason})") from error
    if isinstance(found, dict):
        if NAME in found:
            found = found[NAME]
        elif len(found) == 1:
            found = next(iter(found.values()))
        else:
            raise LatentsError(
                f"initial latents {path}: holds {sorted(map(str, found))}; name the tensor {NAME!r}"
            )
    if not isinstance(found, Tensor):
        raise LatentsError(f"initial latents {path}: expected a tensor, got {type(found).__name__}")
    return found


def checked_latents(latents: Tensor, shape: Sequence[int], prompts: int, batch_size: int) -> Tensor:
    """``latents`` as unit noise (n, C, h, w) float32 on the CPU, if they fit the run.

    ``shape`` is (C, h, w) of one image. Accepted are one image's latents (for one image), ``batch_size`` of
    them (used for every prompt), or one for each image, prompt by prompt.
    """
    want = tuple(shape)
    given = latents.detach().to("cpu")
    total = prompts * batch_size
    if given.dim() == len(want):
        given = given.unsqueeze(0)
    layouts = sorted({batch_size, total})
    if tuple(given.shape[1:]) != want or given.shape[0] not in layouts:
        counts = " or ".join(str(n) for n in layouts)
        raise LatentsError(
            f"initial latents have shape {tuple(latents.shape)}: "
            f"expected {counts} images of (C, h, w) = {want}"
        )
    if not given.is_floating_point():
        raise LatentsError(f"initial latents are {latents.dtype}: expected a floating-point tensor")
    given = given.float()
    if not bool(torch.isfinite(given).all()):
        raise LatentsError("initial latents hold NaN or infinity")
    return given


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_pt(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)
