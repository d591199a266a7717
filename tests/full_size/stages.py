"""The members of the family at their published sizes, and the commands that each is put through, in order.

Nothing heavy is imported: the process that starts the commands must be small, for its own memory would count
in theirs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORK = "-m tests.full_size.work"
FOX = ["--prompt", "a red fox in the snow"]
PUBLISHED = {
    "plus": "cogview3-plus-3b",
    "base": "cogview3-base-3b",
    "relay": "cogview3-relay-3b",
    "base_distill": "cogview3-base-3b-distill-4step",
    "relay_distill": "cogview3-relay-3b-distill-1step",
}
"""Folders of SAT files by the config of the member, as published."""


def _over(tree: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with the values of ``over``."""
    out = dict(tree)
    for key, value in over.items():
        out[key] = _over(out.get(key) or {}, value) if isinstance(value, Mapping) else value
    return out


_TEXT = {"params": {"dim": 24, "heads": 3, "head_dim": 8, "mlp_dim": 32, "depth": 2, "vocab": 2048}}
_IMAGES = {"width": 8, "res_blocks": 1, "groups": 4}
_SMALL_UNET = {
    "model": {
        "params": {
            "width": 16, "multipliers": [1, 2, 3], "attention": [2, 4], "depths": [1, 1, 2],
            "head_dim": 8, "text_dim": 24, "text_len": 8, "size_dim": 48, "groups": 8,
        }
    },
    "conditioning": {"text": _TEXT, "size": {"params": {"dim": 8}}, "max_length": 8},
    "first_stage": {"params": _IMAGES},
    "sampling": {"sizes": {"min": 32}},
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "plus": {
        "model": {
            "params": {
                "dim": 32, "heads": 4, "depth": 2, "text_dim": 24, "text_len": 8, "emb_dim": 16,
                "size_dim": 48,
            }
        },
        "conditioning": {"text": _TEXT, "size": {"params": {"dim": 8}}, "max_length": 8},
        "first_stage": {"params": _IMAGES},
        "sampling": {"sizes": {"min": 32}},
    },
    "cogview4": {
        "model": {
            "params": {
                "dim": 32, "heads": 4, "depth": 2, "text_dim": 24, "emb_dim": 16, "size_dim": 48,
            }
        },
        "conditioning": {
            "text": {
                "params": {
                    "dim": 24, "heads": 3, "kv_heads": 1, "head_dim": 8, "mlp_dim": 32, "depth": 2,
                    "vocab": 2048,
                }
            },
            "size": {"params": {"dim": 8}},
            "max_length": 16,
        },
        "first_stage": {"params": _IMAGES},
        "sampling": {"sizes": {"min": 32}},
    },
    "base": _SMALL_UNET,
    "relay": _SMALL_UNET,
    "base_distill": _over(_SMALL_UNET, {"model": {"params": {"guidance_dim": 32}}}),
    "relay_distill": _over(_SMALL_UNET, {"model": {"params": {"guidance_dim": 16}}}),
}  # fmt: skip
"""Sizes of the same members that take a second, laid over the config of each."""


class Stage(NamedTuple):
    """A command, as typed in a member's folder, with what must not be there yet and what it leaves."""

    name: str
    words: list[str]
    makes: str = ""  # a folder or file; pictures in it must show something
    frees: tuple[str, ...] = ()  # no longer needed when the stage begins


class Choice(NamedTuple):
    """Choices of the command line. ``dtype``: of sampling and training; ``depth``: text blocks kept."""

    member: str
    small: bool
    dtype: str
    depth: int

    @property
    def side(self) -> int:
        """Pixels of a picture's side."""
        return 64 if self.small else 512


def plus(choice: Choice) -> list[Stage]:
    """CogView3-Plus with its 16-channel autoencoder."""
    sat, native, diffusers = "weights/cogview3-plus-3b", "weights/plus", "weights/CogView3-Plus-3B-diffusers"
    images, text = "weights/imagekl_ch16.pt", "weights/t5-v1_1-xxl"
    base = ["--base", "configs/plus.yaml"]
    parts = [f"checkpoint.model={sat}", f"checkpoint.first_stage={images}", f"checkpoint.text={text}"]
    return [
        Stage("write", [WORK, "write", "plus"], sat),
        _draw(choice, "sample, SAT files", [*base, "--prompt", "a red fox", *parts]),
        _convert(choice, base, sat, native, images, text),
        *_common(choice, "plus", sat, native),
        Stage(
            "convert to diffusers",
            ["convert.py", native, diffusers, "--to", "diffusers"],
            diffusers,
            frees=(sat, images, text),
        ),
        Stage("compare diffusers", [WORK, "check", "plus", diffusers]),
        _draw(choice, "sample, diffusers folder", [*base, *FOX, f"checkpoint.path={diffusers}"]),
        Stage("a step as diffusers'", [WORK, "parity", "plus", choice.dtype, diffusers]),
    ]  # fmt: skip


def unet(choice: Choice) -> list[Stage]:
    """CogView3-Base or Relay with the 4-channel autoencoder."""
    name = choice.member
    sat, native, base = f"weights/cogview3-{name}-3b", f"weights/{name}", ["--base", f"configs/{name}.yaml"]
    images, text = "weights/sdxl_vae.safetensors", "weights/t5-v1_1-xxl"
    parts = [f"checkpoint.model={sat}", f"checkpoint.first_stage={images}", f"checkpoint.text={text}"]
    inputs = [] if name == "base" else ["sampling.input_dir=inputs"]
    return [
        Stage("write", [WORK, "write", name], sat),
        _draw(choice, "sample, SAT files", [*base, *FOX, "checkpoint.path=null", *parts, *inputs]),
        _convert(choice, base, sat, native, images, text),
        *_common(choice, name, sat, native, inputs),
        Stage("a step as diffusers'", [WORK, "parity", name, choice.dtype, sat]),
    ]  # fmt: skip


def t5(choice: Choice) -> list[Stage]:
    """T5-v1.1-XXL."""
    text, native = "weights/t5-v1_1-xxl", "weights/text"
    return [
        Stage("write", [WORK, "write", "plus", "text"], text),
        Stage("convert to native", ["convert.py", text, native, "--to", "native", "--only", "text"], native),
        Stage("compare native", [WORK, "check", "plus", native]),
        Stage("blocks as transformers'", [WORK, "blocks", "plus", native, text]),
        *(Stage(f"load {kind}", [WORK, "load", "plus", "text", native, kind]) for kind in _kinds(choice)),
    ]


def cogview4(choice: Choice) -> list[Stage]:
    """CogView4, 6 B, and its GLM: each part quantised as it is read, then one after the other."""
    folder = "weights/CogView4-6B"
    return [
        Stage("write", [WORK, "write", "cogview4"], folder),
        Stage("load int8", [WORK, "load", "cogview4", "model", folder, "int8"]),
        Stage("load GLM in int8", [WORK, "load", "cogview4", "text", folder, "int8"]),
        Stage("GLM and then the network, int8", [WORK, "turns", "cogview4", folder, "int8"]),
        Stage("compare diffusers", [WORK, "check", "cogview4", folder]),
    ]


def cascade(choice: Choice) -> list[Stage]:
    """Base, then Relay, each a folder of its own; ``distilled``: to few steps, and of one folder's size."""
    ending, config = {"cascade": ("", "cascade"), "distilled": ("_distill", "cascade_distill")}[choice.member]
    images, text, stages = "weights/sdxl_vae.safetensors", "weights/t5-v1_1-xxl", list[Stage]()
    once, free = [f"sampling.dtype={choice.dtype}"], ["memory.text_encoder=free"]
    for kind in ("base", "relay"):
        name = kind + ending
        sat, native = f"weights/{PUBLISHED[name]}", f"weights/{name}"
        base = ["--base", f"configs/{name}.yaml"]
        stages += [
            Stage(f"write {kind}", [WORK, "write", name], sat),
            _convert(choice, base, sat, native, images, text)._replace(name=f"convert {kind} to native"),
            Stage(f"compare {kind}", [WORK, "check", name, native], frees=(sat, images, text)),
        ]
        once.append(f"cascade.{kind}.sampling.steps=1")
    if choice.small:
        free += ["sampling.height=64", "sampling.width=64"]
    out = "out/cascade"
    words = ["sample.py", "--base", f"configs/{config}.yaml", *FOX, *once, *free, "--output-dir", out]
    stages.append(Stage("two stages, one step each", words, out))
    if ending:  # as published: 4 steps, then 1
        published = [word for word in words if not word.startswith("cascade.base")]
        published[-1] = "out/published"
        stages.append(Stage("4 steps and 1, as published", published, published[-1]))
    return stages


def sft(choice: Choice) -> list[Stage]:
    """Training of all weights, which the plan refuses in the memory of a host."""
    words = ["configs/plus.yaml", "configs/sft.yaml", "data.sources.0.path=pictures", "parallel.device=cpu"]
    size = [f"data.height={choice.side}", f"data.width={choice.side}", f"train.dtype={choice.dtype}"]
    return [Stage("plan", ["train.py", "--base", *words, *size, "--plan", "--fit", "16GB"])]


MEMBERS = {
    "cascade": cascade,
    "distilled": cascade,
    "sft": sft,
    "plus": plus,
    "base": unet,
    "relay": unet,
    "t5": t5,
    "cogview4": cogview4,
}
DEPTHS = {"t5": 24, "cogview4": 39}
"""Blocks of the text encoder where none are named: all that are loaded; elsewhere 1 of T5-XXL."""


def _kinds(choice: Choice) -> list[str]:
    """Types to load the largest part in, the smallest first; T5-XXL in float32 is 19 GB."""
    return ["int4", "int8", "bf16", *(["fp32"] if choice.member != "t5" or choice.small else [])]


def _draw(choice: Choice, name: str, words: list[str]) -> Stage:
    """A picture by one step, the text encoder freed when the prompt is encoded."""
    out = "out/" + name.replace(" ", "_")
    side = str(choice.side)
    least = ["--steps", "1", "--height", side, "--width", side, f"sampling.dtype={choice.dtype}"]
    free = ["memory.text_encoder=free", "--output-dir", out]
    return Stage(name, ["sample.py", *words, *least, *free], out)


def _convert(choice: Choice, base: list[str], sat: str, native: str, images: str, text: str) -> Stage:
    """The official files to one native folder. Only the published sizes are known without their config."""
    words = ["convert.py", sat, native, "--to", "native", "--first-stage", images, "--text", text]
    known = choice.member == "plus" and not choice.small
    return Stage("convert to native", [*words, *([] if known else base)], native)


def _common(choice: Choice, name: str, sat: str, native: str, inputs: list[str] | None = None) -> list[Stage]:
    """Stages that read the native folder."""
    base = ["--base", f"configs/{name}.yaml"]
    drawn = [*FOX, *(inputs or [])]
    lora = [
        *base, "configs/lora.yaml", "data.sources.0.path=pictures", f"data.height={choice.side}",
        f"data.width={choice.side}", "data.cache=cache", f"train.dtype={choice.dtype}", "parallel.device=cpu",
    ]  # fmt: skip
    short = [
        "train.steps=1",
        "train.warmup=0",
        "train.accumulate=1",
        "train.wandb=disabled",
        "data.workers=0",
    ]
    return [
        Stage("load bf16, SAT file", [WORK, "load", name, "model", sat, "bf16"]),
        *(Stage(f"load {kind}", [WORK, "load", name, "model", native, kind]) for kind in _kinds(choice)),
        *(Stage(f"open {kind}", [WORK, "open", name, native, kind]) for kind in _kinds(choice)),
        _draw(choice, "sample", [*base, *drawn]),
        *(
            _draw(choice, f"sample {kind}", [*base, *drawn, f"memory.quantize.network={kind}"])
            for kind in ("int8", "int4")
        ),
        Stage("cache latents and text", ["-m sat.cli.prepare", "cache", *lora, *short], "cache"),
        Stage("a LoRA step", ["train.py", *lora, *short, "--output-dir", "runs/lora"], "runs/lora"),
        _draw(choice, "sample with the LoRA", [*base, *drawn, "--lora", "runs/lora:0.8"]),
        Stage("verify", ["convert.py", "verify", native]),
        Stage("compare native", [WORK, "check", name, native]),
    ]


def workspace(folder: Path, choice: Choice) -> None:
    """The folder that the commands are typed in: the project's files, and the configs at the sizes chosen."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    for script in ("sample.py", "train.py", "convert.py"):
        (folder / script).unlink(missing_ok=True)
        (folder / script).symlink_to(ROOT / script)
    for config in (ROOT / "configs").glob("*.yaml"):
        tree = yaml.safe_load(config.read_text())
        over = SMALL.get(config.stem, {}) if choice.small else {}
        if config.stem in SMALL and not choice.small:
            over = {"conditioning": {"text": {"params": {"depth": choice.depth}}}}
        (folder / "configs" / config.name).write_text(json.dumps(_over(tree, over)))
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    inputs = folder / "inputs" / "0_a_red_fox"  # what a base model would have drawn, for relay to enlarge
    inputs.mkdir(parents=True, exist_ok=True)
    for picture in sorted((ROOT / "data" / "emoji_sample" / "noto").glob("*.png"))[:2]:
        shutil.copyfile(picture, pictures / picture.name)
        (pictures / picture.name).with_suffix(".txt").write_text(picture.stem)
        half = (choice.side // 2, choice.side // 2)
        Image.open(picture).convert("RGB").resize(half).save(inputs / "000000000.png")


def remove(path: Path) -> None:
    """Delete a file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
