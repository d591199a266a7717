"""Pictures of an earlier run as the low-resolution input of relay: found by prompt number, checked early."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from sat.sampling.output import IMAGE, STAGES, folder_name, numbered
from sat.sampling.prompts import Prompt
from sat.util.images import from_pil, read_png_text

log = logging.getLogger(__name__)


class InputError(ValueError):
    """A folder of low-resolution pictures that does not fit the run."""


class Inputs(Protocol):
    """Low-resolution pictures of a run's prompts."""

    def read(self, prompt: Prompt, images: Sequence[int]) -> Tensor:
        """(n, 3, height, width) float32 in [-1, 1] of some pictures of ``prompt``."""
        ...


@dataclass(frozen=True)
class InputFolder:
    """``root/<index>_<name>/000000000.png …`` as the sampler writes them; ``height`` x ``width`` in pixels.

    A folder belongs to the prompt with its number, wherever it stands among the others. ``batch_size``
    pictures are expected for each prompt.
    """

    root: Path
    height: int
    width: int
    batch_size: int

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
            absent = [self._name(i) for i in range(self.batch_size) if self._name(i) not in there]
            if absent or len(there) != self.batch_size:
                missing_one = f", {absent[0]} is missing" if absent else ""
                raise InputError(
                    f"{folder}: holds {len(there)} pictures, but sampling.batch_size is "
                    f"{self.batch_size}{missing_one}"
                )
            for name in there:
                self._check_size(folder / name)

    def read(self, prompt: Prompt, images: Sequence[int]) -> Tensor:
        """(n, 3, height, width) float32 in [-1, 1] of some pictures of ``prompt``."""
        folder = self._folder(prompt, self._folders(quiet=True))
        return torch.stack([_pixels(folder / self._name(i)) for i in images])

    def _name(self, image: int) -> str:
        return f"{image:09d}.png"

    def _check_size(self, path: Path) -> None:
        try:
            with Image.open(path) as picture:
                width, height = picture.size
        except (OSError, SyntaxError) as error:
            raise InputError(f"{path}: not a readable picture ({error})") from error
        if (height, width) != (self.height, self.width):
            raise InputError(
                f"{path}: is {height} x {width} (height x width), expected {self.height} x {self.width}, "
                f"which sampling.height and sampling.width are the enlargement of"
            )

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
"""What our own runs leave beside the folders."""


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    out: list[str] = []
    start = 0
    for i, number in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            out.append(str(number) if start == i else f"{numbers[start]}-{number}")
            start = i + 1
    return ", ".join(out[:10]) + (" …" if len(out) > 10 else "")


def _pixels(path: Path) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    with Image.open(path) as picture:
        return from_pil(picture)
