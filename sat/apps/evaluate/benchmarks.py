"""Pictures in the folders that the programs of GenEval, DPG-Bench and T2I-CompBench read.

Their detectors and question models do not ship: this writes what they take, and they give the score.

- geneval (``evaluation_metadata.jsonl``): ``00007/metadata.jsonl``, ``00007/samples/0000.png``, …
- dpg (a folder of ``<item>.txt`` or ``dpg_bench.csv``): ``<item>.png`` with 4 pictures of a prompt, 2 x 2
- t2i_compbench (``color_val.txt``, …: one prompt a line): ``samples/<prompt>_000042.png``, numbered through
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from sat.apps.evaluate.pictures import Opened, Picture, found, read_list
from sat.data.records import DataError
from sat.sampling.output import grid, write_png
from sat.sampling.prompts import MOST_BYTES, PromptError
from sat.util.host import read_bounded

Layout = Callable[[Sequence[Sequence[Picture]], Sequence[str], Path], Mapping[str, Image.Image | Path | str]]
"""Files below the new folder by name; given each prompt's pictures, the prompts' names, and their list."""


def write_layout(layout: str, images: Path, prompts: Path, out: Path) -> int:
    """Write the pictures of ``prompts`` in ``images`` to the new folder ``out``; the number of pictures."""
    listed = read_list(prompts)
    pictures = found(images, listed.prompts)
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: is not empty; name a new folder with --out")
    if bad := [name for name in listed.names if Path(name).name != name]:
        raise DataError(f"{prompts}: item_id {bad[0]!r} is no file name, and pictures are named by it")
    groups = [list(group) for _, group in groupby(pictures, lambda picture: picture.prompt)]
    files = LAYOUTS[layout](groups, listed.names or [f"{i:05d}" for i in range(len(groups))], prompts)
    for name, content in files.items():
        (path := out / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, "utf-8")
        else:
            write_png(path, Opened([content])[0] if isinstance(content, Path) else content)
    return len(pictures)


def _geneval(
    groups: Sequence[Sequence[Picture]], names: Sequence[str], prompts: Path
) -> dict[str, Path | str]:
    """Each prompt's folder holds its line of the list, which tells the detector what to count."""
    text = read_bounded(prompts, MOST_BYTES).decode("utf-8-sig") if prompts.suffix == ".jsonl" else ""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) != len(groups) or not all("include" in json.loads(line) for line in lines):
        raise PromptError(
            f"{prompts}: expected GenEval's evaluation_metadata.jsonl (tag, include, prompt a line)"
        )
    files: dict[str, Path | str] = {}
    for name, group, line in zip(names, groups, lines, strict=True):
        files[f"{name}/metadata.jsonl"] = line + "\n"
        files |= {f"{name}/samples/{one.image:04d}.png": one.path for one in group}
    return files


def _dpg(groups: Sequence[Sequence[Picture]], names: Sequence[str], prompts: Path) -> dict[str, Image.Image]:
    """One file a prompt, which the program cuts into squares of its ``--resolution``."""
    files = {}
    for name, group in zip(names, groups, strict=True):
        images = list(Opened([one.path for one in group]))
        columns, (width, height) = math.isqrt(len(images)), images[0].size
        if columns**2 != len(images) or {image.size for image in images} != {(width, width)}:
            raise DataError(
                f"{group[0].path.parent}: DPG-Bench takes 1 or 4 square pictures of one size a prompt, found "
                f"{len(images)} of {width} x {height}; draw with --batch-size 4"
            )
        files[f"{name}.png"] = grid(images, columns, padding=0)
    return files


def _compbench(groups: Sequence[Sequence[Picture]], names: Sequence[str], prompts: Path) -> dict[str, Path]:
    """Its programs read the prompt up to the first ``_`` of a name, and sort by the number at its end."""
    files: dict[str, Path] = {}
    for one in (one for group in groups for one in group):
        if set(one.caption) & set("_/") or len(one.caption.encode()) > 240:
            raise DataError(
                f"prompt {one.prompt}, {one.caption[:60]!r}: T2I-CompBench keeps prompts in file names, "
                "which take no _, no / and at most 240 bytes"
            )
        files[f"samples/{one.caption}_{len(files):06d}.png"] = one.path
    return files


LAYOUTS: Mapping[str, Layout] = {"geneval": _geneval, "dpg": _dpg, "t2i_compbench": _compbench}
