"""Inputs of a sampling run: low-resolution pictures and initial latents from files."""

from __future__ import annotations

import logging
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sat.config.yaml_source import ConfigError, Problem
from sat.errors import UserError
from sat.sampling.output import IMAGE, STAGES, folder_name, from_pil, numbered, opened, read_png_text
from sat.sampling.prompts import Prompt
from sat.util.host import check_regular
from sat.util.pictures import PictureError, Pixels, open_picture, open_whole

if TYPE_CHECKING:
    from sat.config.schema import SamplingConfig
    from sat.diffusion.process import ProcessInput

log = logging.getLogger(__name__)


class InputError(UserError, ValueError):
    """Input pictures that do not fit the run, or cannot be read."""


@dataclass(frozen=True)
class PictureInput:
    """Pictures that a run starts from beside noise, of ``height`` x ``width`` pixels.

    A process asks for them (:class:`~sat.diffusion.process.ProcessInput`); they come from a folder, from
    files or from the caller.
    """

    height: int
    width: int
    factor: int = field(default=1, kw_only=True)  # that a prompt's own size is larger by

    def size(self, prompt: Prompt) -> tuple[int, int]:
        """(height, width) of the pictures of ``prompt``."""
        row = prompt.row
        if row.height is None or row.width is None:
            return self.height, self.width
        return row.height // self.factor, row.width // self.factor

    def open(self, prompt: Prompt, image: int) -> Image.Image:
        """Picture number ``image`` of ``prompt``."""
        raise NotImplementedError

    def read(self, prompt: Prompt, images: Sequence[int]) -> Tensor:
        """(n, 3, height, width) float32 in [-1, 1] of some pictures of ``prompt``."""
        pictures = [self.open(prompt, image) for image in images]
        height, width = self.size(prompt)
        for picture in pictures:
            if (picture.height, picture.width) != (height, width):
                raise InputError(
                    f"an input picture is {picture.height} x {picture.width} (height x width), expected "
                    f"{height} x {width}"
                )
        return torch.stack([from_pil(picture) for picture in pictures])


@dataclass(frozen=True)
class InputList(PictureInput):
    """Given pictures or files of them, prompt by prompt from number ``first`` on, ``batch_size`` of each."""

    pictures: Sequence[Image.Image | Path]
    batch_size: int
    first: int = 0

    def open(self, prompt: Prompt, image: int) -> Image.Image:
        """Picture number ``image`` of ``prompt``."""
        given = self.pictures[(prompt.index - self.first) * self.batch_size + image]
        return opened(given) if isinstance(given, Path) else given


@dataclass(frozen=True)
class InputFolder(PictureInput):
    """``root/<index>_<name>/000000000.png …`` as the sampler writes them.

    A folder belongs to the prompt with its number, wherever it stands among the others. ``batch_size``
    pictures are expected for each prompt.
    """

    root: Path
    batch_size: int

    @classmethod
    def of(cls, sampling: SamplingConfig, wanted: ProcessInput | None) -> InputFolder | None:
        """The folder that ``sampling.input_dir`` names, for a process that wants one; else None.

        :class:`ConfigError` where only one of the two is.
        """
        if wanted is None and sampling.input_dir is not None:
            what = (
                f"is {sampling.input_dir}, but this model draws from noise alone: "
                f"only a relay model enlarges pictures"
            )
            raise ConfigError([Problem("", "sampling.input_dir", what)])
        if wanted is not None and wanted.required and sampling.input_dir is None:
            what = (
                "this model enlarges pictures: name the output folder of a base model's run here, or draw "
                "both with a cascade (configs/cascade.yaml)"
            )
            raise ConfigError([Problem("", "sampling.input_dir", what)])
        if wanted is None or sampling.input_dir is None:
            return None
        size = wanted.size(sampling.height, sampling.width)
        return cls(*size, sampling.input_dir, sampling.batch_size, factor=wanted.factor)

    def prompts(self) -> list[Prompt]:
        """The prompts that the pictures themselves name, for a run that is given none."""
        found = []
        for index, names in sorted(self._folders().items()):
            path = self._only(index, names) / f"{0:09d}.png"
            text = (read_png_text(path) or {}).get("prompt")
            if text is None:
                raise InputError(f"{path}: names no prompt in its PNG text; give the prompts of this run")
            found.append(Prompt(index, text))
        return found

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise unless the pictures of all ``prompts`` are there, as many and as large as expected."""
        folders = self._folders()
        missing = [prompt.index for prompt in prompts if prompt.index not in folders]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
            raise InputError(
                f"{self.root}: no folder for prompt {shown} (expected {missing[0]}_NAME; it holds the "
                f"numbers {_ranges(sorted(folders))})"
            )
        for prompt in prompts:
            folder = self._folder(prompt, folders)
            there = sorted(path.name for path in folder.iterdir() if IMAGE.fullmatch(path.name))
            expected = [f"{i:09d}.png" for i in range(self.batch_size)]
            absent = [name for name in expected if name not in there]
            if absent or len(there) != self.batch_size:
                missing_one = f", {absent[0]} is missing" if absent else ""
                raise InputError(
                    f"{folder}: holds {len(there)} pictures, but sampling.batch_size is "
                    f"{self.batch_size}{missing_one}"
                )
            for path in (folder / name for name in there):
                try:
                    with open_picture(path) as picture:
                        width, height = picture.size
                except PictureError as error:
                    raise InputError(f"{path}: {error}") from error
                expected_size = self.size(prompt)
                if (height, width) != expected_size:
                    raise InputError(
                        f"{path}: is {height} x {width} (height x width), expected {expected_size[0]} x "
                        f"{expected_size[1]}, which sampling.height and sampling.width are the enlargement of"
                    )

    def open(self, prompt: Prompt, image: int) -> Image.Image:
        """Picture number ``image`` of ``prompt``."""
        return opened(self._folder(prompt, self._folders(quiet=True)) / f"{image:09d}.png")

    def _folders(self, *, quiet: bool = False) -> dict[int, list[str]]:
        """Folder names by number; what else lies there is noted."""
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such folder (sampling.input_dir)")
        folders = numbered(self.root)
        if not folders:
            raise InputError(
                f"{self.root}: holds no folder named INDEX_NAME, as a base model's run writes them "
                f"(sampling.input_dir)"
            )
        known = {name for names in folders.values() for name in names} | _OWN
        strays = [entry.name for entry in sorted(self.root.iterdir()) if entry.name not in known]
        if strays and not quiet:
            log.info("%s: ignored %s", self.root, ", ".join(strays[:5]) + (" …" if len(strays) > 5 else ""))
        return folders

    def _folder(self, prompt: Prompt, folders: dict[int, list[str]]) -> Path:
        names = folders[prompt.index]
        own = folder_name(prompt)
        if own in names:
            return self.root / own
        return self._only(prompt.index, names)

    def _only(self, index: int, names: list[str]) -> Path:
        if len(names) > 1:
            raise InputError(
                f"{self.root}: several folders for prompt {index}: {', '.join(names[:3])}; keep one"
            )
        return self.root / names[0]


_OWN = frozenset({"resolved.yaml", "run.json", STAGES})
"""Left beside the folders by our own runs."""


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    out: list[str] = []
    start = 0
    for i, number in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            out.append(str(number) if start == i else f"{numbers[start]}-{number}")
            start = i + 1
    return ", ".join(out[:10]) + (" …" if len(out) > 10 else "")


# -- pictures that the user names for prompts: to begin with, as masks, as controls


@dataclass(frozen=True)
class PictureFiles:
    """Pictures under ``path``, which the config calls ``key``: one file for all images, or a folder.

    A folder as a run writes it (``INDEX_NAME/000000000.png``) has a picture for each image of a prompt, or
    one for all of them. Of any other folder the pictures are those of prompt 0, 1 and so on, sorted by name.
    """

    path: Path
    key: str

    @cached_property
    def files(self) -> list[Path]:
        """The pictures of a plain folder; the file itself; nothing for a run's folder."""
        if not self.path.is_dir():
            return [self.path]
        if self._folders:
            return []
        from sat.data.records import IMAGE_SUFFIXES

        found = sorted(path for path in self.path.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise InputError(f"{self.key}: {self.path} holds no pictures")
        return found

    @property
    def each(self) -> int | None:
        """Number of pictures that a plain folder has, one for each prompt; None for others."""
        return len(self.files) if self.path.is_dir() and self.files else None

    def find(self, prompt: Prompt, image: int) -> Path:
        """The file for image number ``image`` of ``prompt``; :class:`InputError` if there is none."""
        if not self.path.is_dir():
            return self.path
        if not self._folders:
            if prompt.index < len(self.files):
                return self.files[prompt.index]
            raise InputError(
                f"{self.key}: {self.path} holds {len(self.files)} pictures, none for prompt {prompt.index}: "
                f"give as many as there are prompts, or one file for all"
            )
        names = self._folders.get(prompt.index, [])
        folder = self.path / (
            folder_name(prompt) if folder_name(prompt) in names else names[0] if names else ""
        )
        if len(names) > 1 and folder.name != folder_name(prompt):
            raise InputError(
                f"{self.key}: {self.path} holds several folders for prompt {prompt.index}: keep one"
            )
        there = sorted(path for path in folder.iterdir() if IMAGE.fullmatch(path.name)) if names else []
        if len(there) == 1:
            return there[0]
        own = folder / f"{image:09d}.png"
        if own in there:
            return own
        raise InputError(f"{self.key}: {self.path} holds no picture {image} for prompt {prompt.index}")

    def open(self, prompt: Prompt, image: int) -> Pixels:
        """The picture for image number ``image`` of ``prompt``, decoded whole."""
        try:
            return open_whole(self.find(prompt, image))
        except PictureError as error:
            raise InputError(f"{self.key}: {error}") from error

    @cached_property
    def _folders(self) -> dict[int, list[str]]:
        return numbered(self.path)


# -- initial latents given by the user instead of seeded noise


NAME = "latents"
"""The key looked for in a file that holds several tensors."""


class LatentsError(UserError, ValueError):
    """Initial latents that do not fit the run, or a file of them that cannot be read."""


def read_latents(path: Path) -> Tensor:  # noqa: C901 - one fault after the other
    """The tensor in a ``.safetensors`` or ``.pt`` file: the only one, or the one named ``latents``.

    ``.pt`` files are read with ``weights_only``: nothing in them is executed.
    """
    from safetensors.torch import load_file

    from sat.checkpoint.torch_file import check_zip
    from sat.checkpoint.verify import CheckpointError, Verify

    kind = path.suffix.lower()
    if kind not in (".safetensors", ".pt", ".pth"):
        raise LatentsError(f"initial latents {path}: expected a .safetensors or .pt file")
    try:
        check_regular(path)
        check_zip(path, Verify("manifest"), crc=False)
        if kind == ".safetensors":
            found: object = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise LatentsError(f"initial latents {path}: {reason}") from error
    except CheckpointError as error:
        raise LatentsError(f"initial latents {error}") from error
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
