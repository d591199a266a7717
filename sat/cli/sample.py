"""``sample.py``: pictures for prompts. Nothing heavy is imported before the arguments are known."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from sat.cli.arguments import Setting, control, lora, parse, reader, settings
from sat.cli.main_guard import UsageError, guard, refuse_tasks, uncollected
from sat.sampling.prompts import check_text
from sat.util.host import prepare_threads

DESCRIPTION = """\
Draw pictures for prompts with the model that --base describes.

  python sample.py --prompt "a red apple"
  python sample.py --base configs/tiny_cascade.yaml --prompt-file configs/tiny_prompts.txt --output-dir OUT
  python sample.py --base configs/plus.yaml --prompt "a red fox in the snow" --width 1536 sampling.dtype=bf16
  torchrun --standalone --nproc_per_node 2 sample.py --base configs/tiny.yaml --prompt-file prompts.txt

Without --base the small model of configs/tiny.yaml draws, which knows single objects such as "blue heart".
Without a prompt, on a terminal, it asks for prompts until end of file (Ctrl-D).
"""
EPILOG = """\
section.key=value sets any key of the config, for example sampling.dtype=bf16 or parallel.device=cpu;
the options above only set such keys. A run writes its whole config to OUT/resolved.yaml, and
--base OUT/resolved.yaml repeats it. Exit codes: 0 done, 1 failed, 2 wrong arguments or config,
130 interrupted.
"""

_OPTIONS = {
    "negative_prompt": "sampling.negative_prompt",
    "output_dir": "output.dir",
    "seed": "sampling.seed",
    "height": "sampling.height",
    "width": "sampling.width",
    "steps": "sampling.steps",
    "guidance": "sampling.guider.params.scale",
    "batch_size": "sampling.batch_size",
    "init_image": "sampling.init_image",
    "strength": "sampling.strength",
    "mask": "sampling.mask",
    "strength_map": "sampling.strength_map",
    "fit": "sampling.fit",
    "outpaint": "sampling.outpaint",
}

_AXIS = re.compile(r"[\w.]+=([^=]*,[^=]*|\d+\.\.\d+)")
_ORIGINAL = {
    "--model-path": "--base configs/plus.yaml checkpoint.path={}",
    "--num-inference-steps": "--steps",
    "--guidance-scale": "--guidance",
    "--num-images-per-prompt": "--batch-size",
    "--dtype": "sampling.dtype={}",
    "--input-file": "--prompt-file",
    "--input-dir": "sampling.input_dir={}",
    "--output-path": "pictures go to a folder, --output-dir OUT, and their paths are printed",
    "--input-type": "leave it out, and give --prompt-file FILE, --prompt TEXT, or nothing to be asked",
}
"""Options of cli_demo.py, sample_dit.py and sample_unet.py of the original code."""


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = reader("sample.py", DESCRIPTION, EPILOG, run_folder=True)
    out.others = _ORIGINAL
    add = out.add_argument_group("pictures").add_argument
    add("--prompt", action="append", metavar="TEXT", help="text to draw, in quotes; repeat for several")
    add("--prompt-file", metavar="FILE", help="a text file with one prompt a line, or .jsonl with settings")
    add("--negative-prompt", metavar="TEXT", help="what the pictures should not show")
    add("--batch-size", type=int, metavar="N", help="images per prompt")
    add("--seed", type=int, help="image i of a prompt uses SEED + i")
    add("--height", type=int, metavar="PIXELS", help="height of the pictures")
    add("--width", type=int, metavar="PIXELS", help="width of the pictures")
    add("--steps", type=int, help="denoising steps")
    add("--guidance", type=float, metavar="SCALE", help="strength of classifier-free guidance; 1 is none")
    add("--lora", action="append", metavar="PATH[:STRENGTH]", help="use an adapter; repeat for several")
    words = "use new words of a textual inversion; repeat for several"
    add("--embedding", action="append", metavar="PATH", help=words)

    add = out.add_argument_group("pictures to start from").add_argument
    add("--init-image", metavar="FILE|FOLDER", help="a picture to change, or one for each prompt")
    add("--strength", type=float, metavar="S", help="how far it is changed, 0 to 1 (docs/edit.md)")
    add("--mask", metavar="FILE|FOLDER", help="white where the picture is drawn anew, black where it stays")
    add("--strength-map", metavar="FILE|FOLDER", help="a grey picture: each place's own strength")
    add("--outpaint", type=_margins, metavar="left=64,top=0,...", help="pixels to add around the picture")
    area = "a prompt for the white part of a picture, beside --prompt; repeat for several"
    add("--region", action="append", metavar="MASK=TEXT", help=area)
    add("--fit", choices=("crop", "pad", "stretch"), help="how pictures are brought to height and width")
    steer = "steer by a picture with a trained control, in a part of the noise range; repeat for several"
    add("--control", action="append", metavar="FILE:IMAGE[:SCALE[:START-END]]", help=steer)
    made = "pictures of --control are plain ones: make the controls' of them (edges, …) as for training"
    add("--control-preprocess", action="store_true", help=made)
    halves = "--control acts in the half of guidance with the prompt alone, which makes it stronger"
    add("--control-guess", action="store_true", help=halves)

    add = out.add_argument_group("several at once").add_argument
    sheet = "a sheet over one or two settings: guidance=1,3,5 seed=0..3; also lora, control, any key"
    add("--grid", nargs="+", action="extend", metavar="KEY=V,V", help=sheet)

    add = out.add_argument_group("output folder").add_argument
    folder = "folder for the pictures (outputs); the next of outputs-2, outputs-3 … where it holds some"
    add("--output-dir", metavar="OUT", help=folder)
    add("--overwrite", action="store_true", help="replace an earlier run's pictures in the output folder")
    again = "go on with an earlier run of the same settings: skip what is there"
    add("--resume", action="store_true", help=again)

    add = out.add_argument_group("prompts written by a language model").add_argument
    first = "have a language model describe each prompt first"
    add("--optimize-prompt", action="store_true", help=first)
    add("--optimizer-url", metavar="URL", help="its OpenAI-compatible server (its key: OPENAI_API_KEY)")
    add("--optimizer-model", metavar="NAME", help="its name on that server")
    return out


def _margins(text: str) -> dict[str, int]:
    """``left=64,top=0`` as ``sampling.outpaint``."""
    out: dict[str, int] = {}
    for item in text.split(","):
        side, _, pixels = item.strip().partition("=")
        if side not in ("left", "top", "right", "bottom") or not pixels.isdecimal() or side in out:
            raise argparse.ArgumentTypeError(f"expected left=64,top=0,right=64,bottom=0, got {text!r}")
        out[side] = int(pixels)
    return out


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The parsed arguments."""
    options = parser()
    args = parse(options, argv, "configs/tiny.yaml", small="configs/tiny.yaml")
    behind = [item for item in args.grid or [] if not _AXIS.fullmatch(item)]  # overrides that stand behind it
    for item in behind:
        if not re.match(r"\w+\.[\w.]+=", item):
            options.error(f"--grid {item}: expected KEY=VALUE,VALUE or KEY=A..B: guidance=1,3,5 seed=0..3")
    args.overrides += behind
    args.grid = [item for item in args.grid or [] if _AXIS.fullmatch(item)]
    if args.prompt and args.prompt_file:
        options.error("--prompt and --prompt-file exclude each other")
    for option in ("control_preprocess", "control_guess"):
        if getattr(args, option) and not args.control:
            options.error(f"--{option.replace('_', '-')} goes with --control")
    if (args.optimizer_url or args.optimizer_model) and not args.optimize_prompt:
        options.error("--optimizer-url and --optimizer-model go with --optimize-prompt")
    return args


def given(args: argparse.Namespace) -> list[Setting]:
    """The config keys that the options set; text in another encoding than UTF-8 is refused."""
    for index, prompt in enumerate(args.prompt or []):
        check_text(prompt, f"prompt {index}")
    check_text(args.negative_prompt or "", "the negative prompt")
    if args.output_dir is not None and not args.output_dir.strip():
        raise UsageError("--output-dir: is empty; name a folder, or . for this one")
    out = settings(args, _OPTIONS)
    if args.prompt:
        out += [
            Setting("sampling.prompt", list(args.prompt), "--prompt"),
            Setting("sampling.prompt_file", None),
        ]
    if args.prompt_file:
        out += [
            Setting("sampling.prompt", None),
            Setting("sampling.prompt_file", args.prompt_file, "--prompt-file"),
        ]
    if args.lora:
        out.append(Setting("adapters.load", [_loaded(text) for text in args.lora], "--lora"))
    if args.control:
        asked = {name: True for name in ("preprocess", "guess") if getattr(args, f"control_{name}")}
        used = (control(text)._asdict() | asked for text in args.control)
        texts = [{k: str(v) if isinstance(v, Path) else v for k, v in one.items()} for one in used]
        out.append(Setting("sampling.controls", texts, "--control"))
    if args.embedding:
        out.append(Setting("adapters.embeddings", list(args.embedding), "--embedding"))
    if args.region:
        out.append(Setting("sampling.regions.areas", [_region(text) for text in args.region], "--region"))
    if args.resume:
        out.append(Setting("output.resume", True))
    return out


def _region(text: str) -> dict[str, object]:
    """``MASK=TEXT`` as an item of ``sampling.regions.areas``."""
    mask, _, prompt = text.partition("=")
    check_text(prompt, "the prompt of a region")
    if not (mask and prompt):
        raise UsageError(f"--region {text}: expected MASK=TEXT, such as left.png=a cat")
    return {"mask": mask, "prompt": prompt}


def _loaded(text: str) -> dict[str, object]:
    """``PATH[:STRENGTH]`` as an item of ``adapters.load``."""
    path, strength = lora(text)
    return {"path": str(path), "strength": strength}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, draw; the exit code."""
    args = arguments(argv)

    def work() -> int:
        refuse_tasks("sample.py", argv)
        prepare_threads()
        with uncollected() if "torch" not in sys.modules else nullcontext():
            from sat.cli.commands import sample as sample_work  # torch: only once the arguments are good

        return sample_work.work(args, given(args))

    return guard(work, debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
