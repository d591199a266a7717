"""``convert.py``: a checkpoint from one format to another. Nothing heavy is imported to parse arguments."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat.cli.arguments import Parser, add_messages, lora
from sat.cli.main_guard import UsageError, guard

if TYPE_CHECKING:
    from sat.checkpoint.convert import Sources

DESCRIPTION = """\
Convert the checkpoint SRC to a new folder DST. The format of SRC is found by itself.

  python convert.py weights/cogview3-plus-3b weights/plus --to native \\
      --first-stage weights/imagekl_ch16.pt --text weights/t5-v1_1-xxl
  python convert.py checkpoints/tiny OUT --to diffusers
  python convert.py MINE OUT --to native --base configs/mine.yaml --dtype bf16
  python convert.py checkpoints/tiny OUT --to native --merge-lora runs/lora:0.8
  python convert.py weights/plus OUT --to sat --tensor-parallel 2
  python convert.py runs/sft OUT --to diffusers
  python convert.py runs/lora OUT --to peft
  python convert.py runs/control OUT --to native --dtype int8

Tensors pass through one at a time; DST appears whole or not at all. Damaged input is refused.

  python convert.py verify PATH [--write]   check a folder; --write adds digests of chunks
"""
EPILOG = """\
native     our own: manifest with the config, safetensors
sat        official: latest, 1/mp_rank_00_model_states.pt (one of N), vae/*.pt, t5-v1_1-xxl/
diffusers  a folder for CogView3PlusPipeline.from_pretrained
If SRC is a LoRA (a file, its folder, or the folder of the run that trained it), so is DST: native, peft
(adapter_config.json and names of the unfused layers) or diffusers (pytorch_lora_weights.safetensors).
If SRC is a control, native writes it in another --dtype, int8 too. For diffusers, a ControlNet of a UNet
becomes a folder for ControlNetModel.from_pretrained; of a control of CogView3-Plus, DST has the model of
--model too, and code of its own, for DiffusionPipeline.from_pretrained(DST, trust_remote_code=True). A
control of further channels of CogView4 becomes, with --model, a folder for CogView4ControlPipeline.
If SRC is the folder of any other training, its newest whole checkpoint is read, and the parts that were not
trained from where the training read them.
Exit codes: 0 done, 1 failed, 2 wrong arguments or config, 130 interrupted. See docs/checkpoints.md.
"""
_FORMATS = ("native", "sat", "diffusers", "peft")
_PARTS = ("model", "first_stage", "text")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser.of("convert.py", DESCRIPTION, EPILOG)
    top.usage = "%(prog)s SRC DST --to FORMAT [options]"
    top.add_argument("src", metavar="SRC", type=Path, help="folder or weight file to read")
    top.add_argument("dst", metavar="DST", type=Path, help="folder to write: new or empty")
    top.add_argument("--to", required=True, choices=_FORMATS, help="format to write")
    base = "the network's config, for a SRC that carries none"
    top.add_argument("--base", nargs="+", default=[], metavar="YAML", help=base)
    first_stage = "autoencoder, where SRC does not hold it"
    top.add_argument("--first-stage", type=Path, metavar="PATH", help=first_stage)
    top.add_argument("--text", type=Path, metavar="PATH", help="text encoder, where SRC does not hold it")
    tokenizer = "spiece.model, where none lies beside the text encoder"
    top.add_argument("--tokenizer", type=Path, metavar="PATH", help=tokenizer)
    only = "parts to convert (all there are)"
    top.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS), help=only)
    carrier = "the model that a control of CogView3-Plus or CogView4 is written with"
    top.add_argument("--model", type=Path, metavar="PATH", help=carrier)
    merge = "fold an adapter into the weights; repeat for several"
    top.add_argument("--merge-lora", action="append", default=[], metavar="PATH[:STRENGTH]", help=merge)
    average = "decay of the average to take, where a training kept several (train.ema)"
    top.add_argument("--average", type=float, metavar="DECAY", help=average)
    ranks = "split the network of an official folder into the files of N model-parallel ranks (1)"
    top.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help=ranks)
    dtype = "type to write (as in SRC); int8: a control's alone"
    top.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "int8"), help=dtype)
    shard = "largest safetensors file, e.g. 500MB (5GB)"
    top.add_argument("--max-shard", default="5GB", metavar="SIZE", help=shard)
    pickle = "run the code in SRC's pickles; only if you trust them"
    top.add_argument("--allow-pickle", action="store_true", help=pickle)
    add_messages(top)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["verify"]:
        checked = verify_parser().parse_args(words[1:])
        return guard(lambda: _verify(checked), debug=checked.debug)
    args = parser().parse_args(words)
    return guard(lambda: _convert(args), debug=args.debug, on_stop="nothing was left at the destination")


def verify_parser() -> argparse.ArgumentParser:
    """The command line of ``convert.py verify``."""
    what = "Check every weight file in PATH: its digests, the CRC-32 of .pt files, finite values."
    top = Parser.of("convert.py verify", what, "Exit codes: 0 all good, 1 damaged, 2 wrong arguments.")
    top.add_argument("path", metavar="PATH", type=Path, help="folder or weight file, of any format")
    write = "if all is good, add digests of chunks to the manifest (digests.json where there is none)"
    top.add_argument("--write", action="store_true", help=write)
    top.add_argument("--allow-pickle", action="store_true", help="run pickles' code; only if you trust them")
    add_messages(top)
    return top


def _verify(args: argparse.Namespace) -> int:
    from sat.checkpoint.audit import audit

    verdicts = audit(args.path, write=args.write, allow_pickle=args.allow_pickle)
    for file, good, text in verdicts:
        print(f"{file}: {'good' if good else 'DAMAGED'}: {text}")
    bad = sum(not verdict.good for verdict in verdicts)
    if bad and args.write:
        print(f"error: {bad} of {len(verdicts)} files are damaged: no digests were written", file=sys.stderr)
    return 1 if bad else 0


def size(text: str) -> int:
    """Bytes that ``500MB``, ``5GB`` or ``1000`` say."""
    found = _SIZE.fullmatch(text.strip())
    value = int(float(found.group(1)) * _UNITS[found.group(2).upper()]) if found else 0
    if value < 1:
        raise UsageError(f"--max-shard is {text!r}, expected a size such as 500MB or 5GB")
    return value


def _convert(args: argparse.Namespace) -> int:
    most = size(args.max_shard)
    from tqdm import tqdm

    from sat.adapters.files import is_adapter
    from sat.checkpoint import DTYPES, Options
    from sat.checkpoint.convert import Sources, convert
    from sat.config.build import build_empty
    from sat.config.load import load
    from sat.config.schema import Component, plain
    from sat.control.files import is_control

    experiment = load(args.base) if args.base else None
    config: Mapping[str, Any] | None = None if experiment is None else plain(experiment)
    imports = [] if experiment is None else experiment.imports

    def build(component: Mapping[str, Any]) -> Any:
        return build_empty(Component(**component), imports)

    if is_control(args.src):
        return _convert_control(args, build, imports, most)
    _refuse_words_of_controls(args)
    if is_adapter(args.src):
        return _convert_adapter(args, build, config, imports)
    if args.to == "peft":
        raise UsageError(f"--to peft is for adapters, and {args.src} is none")
    ranks = args.tensor_parallel
    if ranks < 1:
        raise UsageError(f"--tensor-parallel is {ranks}, expected at least 1")
    if ranks > 1 and args.to != "sat":
        raise UsageError(
            f"--tensor-parallel is for --to sat: {args.to} files hold whole tensors, and every layout reads "
            f"them"
        )
    sources = _of_run(
        Sources(
            args.src,
            args.first_stage,
            args.text,
            args.tokenizer,
            tuple(args.only),
            change=_changing(args.merge_lora, ranks, imports),
            allow_unexpected=() if experiment is None else experiment.checkpoint.allow_unexpected,
            lay=_distilling(args.merge_lora, args.to),
        ),  # fmt: skip
        args.average,
    )
    with ExitStack() as stack:

        def progress(total: int) -> Callable[[int], None]:  # silent when standard error is not a terminal
            bar = tqdm(
                total=total, unit="B", unit_scale=True, desc="convert", disable=None, dynamic_ncols=True
            )
            stack.callback(bar.close)
            return lambda nbytes: bar.update(nbytes)

        dtype = DTYPES[args.dtype] if args.dtype else None
        done = convert(
            sources,
            args.dst,
            args.to,
            build,
            config=config,
            options=Options(dtype, most, ranks, control=_own_control(args)),
            allow_pickle=args.allow_pickle,
            progress=progress,
        )
    for note in [*done.notes, *_control_beside(args, dtype)]:
        print(f"note: {note}", file=sys.stderr)
    parts = ", ".join(f"{part} {count} tensors" for part, count in done.tensors.items())
    print(f"{done.path}: {args.to}, {parts}, {done.nbytes / 1e9:.2f} GB read")
    return 0


def _refuse_words_of_controls(args: argparse.Namespace) -> None:
    if args.model is not None:
        raise UsageError(f"--model is for controls, and {args.src} is none")
    if args.dtype == "int8":
        raise UsageError(
            f"--dtype int8 is for a control written --to native, and {args.src} is none: a model is read as "
            f"integers by memory.quantize.network=int8"
        )


def _control_beside(args: argparse.Namespace, dtype: Any) -> list[str]:
    """Write the control in SRC, a CogView4-Control, into DST; a note that says so, none for anything else."""
    from sat.checkpoint.formats.cogview4 import control_folder
    from sat.control.peers import write_published

    published = control_folder(args.src)
    if published is None or args.to != "native" or "model" not in args.only:
        return []
    write_published(published, args.dst / "control", dtype)
    return [f"its control is written beside it: --control {args.dst / 'control'}:IMAGE"]


def _own_control(args: argparse.Namespace) -> Any:
    """The weight of the control in SRC, a CogView4-Control, to write into one; None for anything else."""
    from sat.checkpoint.formats.cogview4 import control_folder
    from sat.control.peers import concatenated

    source = control_folder(args.src)
    if source is None or "model" not in args.only or args.to == "native":
        return None
    if args.to == "sat":
        raise UsageError(
            f"{args.src}: official files have no place for its control's picture: write it --to native first"
        )
    return concatenated(source)


def _of_run(sources: Sources, decay: float | None) -> Sources:
    """``sources`` of a training's folder: its newest checkpoint, and the parts that it did not train."""
    from sat.train.checkpoints import is_run, outcome

    if not is_run(sources.path):
        if decay is not None:
            raise UsageError(f"--average is for the folder of a training, and {sources.path} is none")
        return sources
    run = outcome(sources.path, decay)
    found = {part: sources.own[part] or path for part, path in run.parts.items() if part in sources.only}
    for part, path in found.items():
        if path is None:
            name = part.replace("_", " ")
            flag = f"name one with --{part.replace('_', '-')}, or " if part != "model" else ""
            raise UsageError(
                f"{sources.path}: this training began with a random {name} and left it as it was: {flag}"
                f"convert the other parts alone with --only"
            )
    tokenizer = sources.tokenizer or (run.tokenizer if "text" in run.parts else None)
    own = sources.own | found
    return replace(
        sources, path=run.trained, tokenizer=tokenizer,
        model=own["model"], first_stage=own["first_stage"], text=own["text"],
    )  # fmt: skip


def _changing(wanted: list[str], ranks: int, imports: Sequence[str]) -> Callable[[Any], Any] | None:
    """The change of a checkpoint's parts on the way: adapters folded in; None for nothing.

    A network that does not divide over ``ranks`` is refused here, before anything is written.
    """
    if not wanted and ranks == 1:
        return None
    from sat.adapters.merge import AdapterRef, folded
    from sat.parallel.tensor import check_sharding
    from sat.sharding import family_sharding

    def change(parts: Any) -> Any:
        network = parts.get("model")
        if ranks > 1 and network is None:
            raise UsageError("--tensor-parallel splits the network, which is not among the parts to convert")
        if ranks > 1:
            try:
                check_sharding(network.module, family_sharding(type(network.module)), ranks)
            except ValueError as error:
                raise UsageError(f"--tensor-parallel {ranks}: {error}") from error
        refs = [AdapterRef(*lora(text)) for text in wanted]
        for ref in refs:
            _refuse_other_base(ref.path, {part: parts[part].component for part in parts}, imports)
        return folded(parts, refs) if refs else parts

    return change


def _distilling(wanted: list[str], to: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The change of the config sections: merged few-step adapters say there what they are for."""
    from sat.config.few_steps import SECTION, few_steps_of, preconditioned

    refs = [lora(text) for text in wanted]
    found = [(path, strength, few) for path, strength in refs if strength and (few := few_steps_of(path))]
    if len(found) > 1:
        raise UsageError(
            f"{found[0][0]} and {found[1][0]} are both distilled to few steps: merge one of them"
        )

    def lay(sections: dict[str, Any]) -> dict[str, Any]:
        for path, strength, few in found:
            if SECTION in sections:
                raise UsageError(f"the checkpoint is distilled already, and {path} is for plain weights")
            sections = {**sections, SECTION: few.model_dump(exclude_none=True)}
            if few.prediction is not None:
                diffusion, own = sections["diffusion"], few.prediction
                sections["diffusion"] = {
                    **diffusion,
                    "prediction": preconditioned(diffusion["prediction"], own),
                }
            if strength != 1:
                print(
                    f"note: {path} is merged at {strength:g}: few steps were learned for 1", file=sys.stderr
                )
        if (held := sections.get(SECTION)) is not None and to != "native":
            counts, given = " or ".join(map(str, sorted(held["steps"]))), held["guidance"]
            said = "as an input" if isinstance(given, list) else f"{given:g} in the weights"
            told = f"distilled to {counts} steps, guidance {said}"
            print(f"note: {to} has no place for how these weights are sampled: {told}", file=sys.stderr)
        return sections

    return lay


def _refuse_other_base(adapter: Path, components: Mapping[str, Any], imports: Sequence[str]) -> None:
    """Raise if ``adapter`` was trained on a model of another architecture than ``components`` (by part)."""
    from sat.config.record import adapter_differences

    for found in adapter_differences(adapter, components, imports):
        if found.fatal:
            raise UsageError(found.what)


def _convert_control(
    args: argparse.Namespace, build: Callable[[Mapping[str, Any]], Any], imports: Sequence[str], most: int
) -> int:
    """A control in another type; a UNet's ControlNet for diffusers; a transformer's with its model."""
    import torch

    from sat.checkpoint import DTYPES, Options
    from sat.checkpoint.convert import Sources, convert
    from sat.control.files import read_info
    from sat.control.peers import concatenated, write_controlnet, write_native, write_pipeline

    if args.to not in ("native", "diffusers"):
        raise UsageError(f"{args.src} is a control, which is written --to native or diffusers, not {args.to}")
    given = {
        "--first-stage": args.first_stage, "--text": args.text, "--tokenizer": args.tokenizer,
        "--merge-lora": args.merge_lora, "--average": args.average,
        "--tensor-parallel": args.tensor_parallel > 1, "--only": len(args.only) < len(_PARTS),
    }  # fmt: skip
    alone = [flag for flag, value in given.items() if value] if args.model is None else []
    if alone:
        raise UsageError(f"{args.src} is a control, which is written without a model: leave out {alone[0]}")
    if args.to == "native":
        if args.model is not None:
            raise UsageError(f"{args.src} is a control: --model is for one written --to diffusers")
        dtype = torch.int8 if args.dtype == "int8" else DTYPES.get(args.dtype)
        count = write_native(args.src, args.dst, imports, dtype)
        print(f"{args.dst}: control of {count} tensors, {args.dtype or 'in the types it had'}")
        return 0
    if args.dtype == "int8":
        raise UsageError("--dtype int8 is for a control written --to native: diffusers reads none of it")
    base = read_info(args.src).base.target.rpartition(".")[2]
    beside = {"CogView3Plus": "CogView3-Plus", "CogView4": "CogView4"}.get(base)
    if (beside is None) != (args.model is None):
        advice = "name the model that it is written with, --model PATH" if beside else "leave out --model"
        raise UsageError(f"{args.src}: is a control of {beside or 'a UNet'}: {advice}")
    if args.model is not None:
        dtype = DTYPES[args.dtype] if args.dtype else None
        change = _changing(args.merge_lora, 1, imports) if base == "CogView4" else None
        own = Sources(args.model, args.first_stage, args.text, args.tokenizer, change=change)
        if base == "CogView4":
            options = Options(dtype, most, control=concatenated(args.src))
            done = convert(_of_run(own, None), args.dst, args.to, build, options=options)
            print(f"{args.dst}: CogView4ControlPipeline, model {done.tensors['model']} tensors")
            return 0
        count = write_pipeline(args.src, _of_run(own, None), args.dst, build, imports, Options(dtype, most))
        print(f"{args.dst}: CogView3PlusControlPipeline with a control of {count} tensors")
        print(f'DiffusionPipeline.from_pretrained("{args.dst}", trust_remote_code=True) opens it')
        return 0
    count = write_controlnet(args.src, args.dst, imports, DTYPES[args.dtype] if args.dtype else None)
    print(f"{args.dst}: ControlNetModel of {count} tensors")
    return 0


def _convert_adapter(
    args: argparse.Namespace,
    build: Callable[[Mapping[str, Any]], Any],
    config: Mapping[str, Any] | None,
    imports: Sequence[str],
) -> int:
    """An adapter from one layout to another."""
    from sat.adapters.write import convert_adapter
    from sat.checkpoint import DTYPES

    if args.merge_lora:
        raise UsageError(f"--merge-lora is for checkpoints, and {args.src} is an adapter itself")
    if args.tensor_parallel != 1:
        raise UsageError(f"--tensor-parallel is for checkpoints, and {args.src} is an adapter")
    if config is not None:
        _refuse_other_base(
            args.src, {"model": config["model"], "text": config["conditioning"]["text"]}, imports
        )
    adapter, files = convert_adapter(
        args.src,
        args.dst,
        args.to,
        build,
        config=config,
        dtype=DTYPES[args.dtype] if args.dtype else None,
    )
    target = str(adapter.info.base.get("model", {}).get("target"))
    if args.to == "diffusers" and not target.endswith(".CogView4"):  # whose pipeline does
        print(
            "note: diffusers' CogView3PlusPipeline loads no LoRA files; PEFT does: --to peft", file=sys.stderr
        )
    names = ", ".join(file.relative_to(args.dst).as_posix() for file in files)
    print(f"{args.dst}: LoRA of {len(adapter.layers)} layers as {args.to}: {names}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
