"""The tables of each suite: which variants stand beside which, at which sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from benchmarks.cases import Case
from sat.kernels.attention import Backend


@dataclass(frozen=True)
class Table:
    """Variants by label. ``base``: whose median is 1. ``once``: a row that counts a fiftieth in ``ours``.

    ``once_each``: one sample a row, whose peak counts rather than its time.
    """

    name: str
    title: str
    rows: Mapping[str, Case]
    base: str
    once: str = ""
    ours: Sequence[str] = ()
    once_each: bool = False


def cpu(
    quick: bool, compiled: bool = False, one_step: str = "runs/tiny_base_turbo", beside: str = ""
) -> list[Table]:
    """On a CPU: the small model, the bench model, the autoencoder, the whole command, training.

    ``compiled``: beside the others, both compiled; each takes a minute or more to compile. ``one_step``:
    weights of the small Base drawn in one step. ``beside``: a checkout of another commit, for the cascade's
    parts.
    """
    return [
        _step("step_fp32", Case("step", "", "bench", "fp32"), quick, compiled),
        _step("step_bf16", Case("step", "", "bench", "bf16"), quick, compiled),
        _step("step_small", Case("step", "", "small", "fp32"), quick, compiled),
        Table(
            "picture",
            "50 steps of the small model, loaded",
            {"diffusers pipeline": Case("picture", "diffusers"), "ours": Case("picture", "ours")},
            "diffusers pipeline",
        ),
        _decode("decode", 8 if quick else 24, "cpu"),
        _decode("decode_512", 8 if quick else 64, "cpu"),
        Table(
            "command",
            "50 steps of the small model, cold",
            {
                "diffusers script": Case("command", "diffusers"),
                "`sample.py`": Case("command", "ours"),
                "`sample.py --help`": Case("command", "help"),
            },
            "diffusers script",
        ),
        _lora("lora", Case("lora", "", "bench", "fp32", options=_bench(quick))),
        _distillation(quick),
        *_cascade(one_step, beside),
    ]


def gpu(quick: bool, device: str = "cuda", sizes: Mapping[str, Any] | None = None) -> list[Table]:
    """On a GPU, in bf16, the published sizes; ``sizes`` and ``device`` are for trying the code elsewhere."""
    sizes = sizes or {}
    tables = []
    for side in (1024,) if quick else (512, 1024, 2048):
        for batch in (1,) if quick else (1, 4):
            options = {"cells": side // 8, "batch": batch, **sizes.get("plus", {})}
            case = Case("step", "", "plus", "bf16", device, options)
            tables.append(_gpu_step(f"gpu_step_{side}_{batch}", case, side, batch))
    whole = Case("step", "ours", "plus", "bf16", device, {"cells": 128, "batch": 4, **sizes.get("plus", {})})
    kernels = {
        name: replace(whole, options={**whole.options, "attention": name})
        for name in get_args(Backend)
        if name != "exp"
    }
    wide = max(64, whole.shape.params.get("dim", 2560) // whole.shape.params.get("heads", 64))
    kernels[f"torch, heads padded to {wide}"] = replace(whole, options={**whole.options, "padded": wide})
    tables.append(Table("gpu_attention", "a step by attention kernel, 1024², batch 4", kernels, "torch"))
    tables.append(_decode("gpu_decode", sizes.get("cells", 128), device, sizes.get("vae", {})))
    text = Case("text", "", "plus", "bf16", device, {"text": sizes.get("text", {})})
    tables.append(
        Table(
            "gpu_text",
            "T5-XXL, 224 tokens",
            {"transformers": replace(text, side="transformers"), "ours": replace(text, side="ours")},
            "transformers",
        )
    )
    base = Case("unet", "ours", "base", "bf16", device, sizes.get("unet", {}))
    tables.append(
        Table(
            "gpu_base",
            "a step of CogView3-Base (no peer)",
            {
                "ours": base,
                "channels last": replace(base, options={**base.options, "channels_last": True}),
                "compiled": replace(base, options={**base.options, "compile": True}),
            },
            "ours",
        )
    )
    for side in (512, 1024):
        options = {"cells": side // 8, **sizes.get("plus", {})}
        tables.append(_lora(f"gpu_lora_{side}", Case("lora", "", "plus", "bf16", device, options)))
    return [*tables, *_whole(device, sizes.get("whole", {}))]


def _cascade(one_step: str, beside: str) -> list[Table]:
    """The small cascade by its steps, and what steps do not change: text encoder and autoencoder."""
    plain = {"settings": ["sampling.convolutions=plain"]}
    whole = {
        f"{side} steps": Case("cascade", side, options={"one_step": one_step}) for side in ("4 + 1", "1 + 1")
    }
    parts = {
        "convolutions plain": Case("cascade", "parts", options=plain),
        "ours": Case("cascade", "parts"),
        **({"before": Case("cascade", "parts", options={"tree": beside})} if beside else {}),
    }
    return [
        Table("cascade", "128 pixels by the small cascade, loaded", whole, "4 + 1 steps"),
        Table(
            "cascade_parts",
            "its text encoder and autoencoder",
            parts,
            "before" if beside else "convolutions plain",
        ),
    ]


def _distillation(quick: bool) -> Table:
    """Memory of few-step LoRA trainings beside a LoRA fine-tuning, of a Plus of 0.2 G weights in bf16."""
    sizes = {
        "model.params.dim": 256 if quick else 1024, "model.params.heads": 16, "model.params.depth": 12,
        "model.params.text_dim": 64, "adapters.lora.rank": 32, "train.batch_size": 2, "train.pack": False,
        "conditioning.text.params": "{dim: 64, heads: 2, head_dim: 32, mlp_dim: 64, depth: 1}",
        "first_stage.params.width": 8, "first_stage.params.groups": 4, "train.zero": 1,
        "data.height": 256, "data.width": 256, "data.cache_views": 0, "train.validate_every": "null",
        "data.sources": "[{path: data/emoji_sample}]", "data.validation": "[]", "train.ema": "null",
        "checkpoint.path": "null", "checkpoint.random": 0, "conditioning.tokenizer": _TOKENIZER,
        "train.sample_every": "null",
    }  # fmt: skip
    settings = [f"{key}={value}" for key, value in sizes.items()]
    target = "sat.train.objectives.distillation.Distillation"
    kind = f"train.objective={{{{target: {target}, params: {{{{method: {{}}}}}}}}}}"
    case = Case("training", "ours", "plus", "bf16")
    rows = {
        name: replace(case, options={"bases": ["configs/plus.yaml", "configs/lora.yaml"], "settings": [
            *settings, *more]})
        for name, more in {
            "LoRA fine-tuning": [],
            **{f"{name}, LoRA": [kind.format(name)] for name in ("consistency", "dmd2", "rcm")},
            "progressive, LoRA": [kind.format("progressive, guidance: 4.0, teacher_steps: 8, rounds: [4]")],
        }.items()
    }  # fmt: skip
    title = "three steps of train.py: a few-step LoRA beside a LoRA fine-tuning"
    return Table("distillation", title, rows, "LoRA fine-tuning", once_each=True)


def _whole(device: str, sizes: Mapping[str, Any]) -> list[Table]:
    """Pictures and trainings from their configs, random weights: peaks beside the plan, options' quality."""
    bases = sizes.get("bases", ["configs/plus.yaml"])
    random = ["checkpoint.path=null", "checkpoint.random=0", "model.params.zero_init=false"]
    random += sizes.get("settings", [f"conditioning.tokenizer={_TOKENIZER}"])
    case = Case("whole", "ours", "plus", "bf16", device, {"bases": bases, "steps": sizes.get("steps", 20)})

    def drawn(side: int, *words: str, **more: object) -> Case:
        settings = [*random, f"sampling.height={side}", f"sampling.width={side}", *words]
        return replace(case, options={**case.options, "settings": settings, **more})

    sides = sizes.get("sides", (1024, 512, 2048))
    peaks = {f"{side}²": drawn(side) for side in sides}
    whole, integers = sizes.get("budgets", ("8GB", "6GB"))
    within = {"8 GB": [f"memory.budget={whole}"]}
    within["6 GB, int8"] = [f"memory.budget={integers}", "memory.quantize.network=int8"]
    peaks |= {f"{sides[0]}² within {name}": drawn(sides[0], *words) for name, words in within.items()}

    short = [] if "settings" in sizes else ["conditioning.text.params.depth=1"]
    cached = "sampling.cache={{target: sat.diffusion.step_cache.FirstBlock, params: {{threshold: {}}}}}"
    options = {
        "plain": [], "compiled": ["sampling.compile=true"], "CUDA graphs": ["sampling.graphs=true"],
        "int8": ["memory.quantize.network=int8"], "int4": ["memory.quantize.network=int4"],
        **{f"step cache {threshold}": [cached.format(threshold)] for threshold in (0.05, 0.1, 0.2)},
        "int8, step cache 0.1, compiled": [
            "memory.quantize.network=int8", cached.format(0.1), "sampling.compile=true"
        ],
    }  # fmt: skip
    beside = drawn(sides[0], *short).options["settings"]
    quality = {name: drawn(sides[0], *short, *words, beside=beside) for name, words in options.items()}

    lora = sizes.get("training", [*bases, "configs/lora.yaml"])
    data = "data.sources=[{path: data/emoji_sample}]"
    trained = [*random, data, "data.validation=[]", "train.validate_every=null"]
    trained += sizes.get("trained", ["data.cache_views=0"])
    options = {"bases": lora, "settings": trained}
    training = replace(case, kind="training", options=options)
    trainings = {
        f"LoRA, {side}²": replace(
            training,
            options={**options, "settings": [*trained, f"data.height={side}", f"data.width={side}"]},
        )
        for side in sides
    }
    first = f"{sides[0]}²"
    return [
        Table("gpu_peaks", "a picture by 20 steps, whole", peaks, first, once_each=True),
        Table("gpu_quality", f"a picture by 20 steps at {first}, beside the plain one", quality, "plain"),
        Table("gpu_training", "three steps of train.py", trainings, next(iter(trainings)), once_each=True),
    ]


_TOKENIZER = "checkpoints/tiny/tokenizer/spiece.model"


def _bench(quick: bool) -> dict[str, Any]:
    return {"params": {"depth": 2}, "cells": 32} if quick else {}


def _step(name: str, case: Case, quick: bool, compiled: bool) -> Table:
    if case.size == "bench":
        case = replace(case, options=_bench(quick))
    title = {"bench": "a step of the bench model", "small": "a step of the small model"}[case.size]
    rows = {
        "diffusers": replace(case, side="diffusers"),
        "cache-dit": replace(case, side="cache-dit"),
        "ours": replace(case, side="ours"),
        "ours, packed and folded": replace(
            case, side="ours", options={**case.options, "pack": True, "fold": True}
        ),
        "ours, nothing folded": replace(case, side="ours", options={**case.options, "fold": False}),
        "ours, nothing packed": replace(case, side="plain"),
        "our preparation": replace(case, kind="prepare", side="ours"),
        "matrix products alone": replace(case, kind="floor", side="products"),
        "attention alone": replace(case, kind="floor", side="attention"),
        "products and attention alone": replace(case, kind="floor", side="both"),
    }
    if case.size == "small" or quick:
        rows.pop("cache-dit")
    if compiled:
        rows["diffusers compiled"] = replace(case, side="diffusers compiled")
        rows["ours compiled"] = replace(case, side="ours", options={**case.options, "compile": True})
    ours = [row for row in rows if row.startswith("ours")]
    return Table(name, f"{title}, {case.dtype}", rows, "diffusers", "our preparation", ours)


def _gpu_step(name: str, case: Case, side: int, batch: int) -> Table:
    rows = {
        "diffusers": replace(case, side="diffusers"),
        "diffusers compiled": replace(case, side="diffusers compiled"),
        "cache-dit": replace(case, side="cache-dit"),
        "ours": replace(case, side="ours"),
        "ours compiled": replace(case, side="ours", options={**case.options, "compile": True}),
        "ours with CUDA graphs": replace(case, side="ours", options={**case.options, "graphs": True}),
        "ours, int8": replace(case, side="ours", options={**case.options, "quantize": "int8"}),
        "ours, blocks offloaded": replace(case, side="ours", options={**case.options, "offload": True}),
        "our preparation": replace(case, kind="prepare", side="ours"),
        "matrix products alone": replace(case, kind="floor", side="products"),
        "attention alone": replace(case, kind="floor", side="attention"),
    }
    ours = [row for row in rows if row.startswith("ours")]
    title = f"a step of Plus 3 B, {side}², batch {batch}"
    return Table(name, title, rows, "diffusers", "our preparation", ours)


def _decode(name: str, cells: int, device: str, vae: Mapping[str, Any] | None = None) -> Table:
    case = Case("decode", "", dtype="fp32", device=device, options={"cells": cells, "vae": dict(vae or {})})
    sides = [(f"{side} {dtype}", side, dtype) for dtype in ("fp32", "bf16") for side in ("diffusers", "ours")]
    rows = {label: replace(case, side=side, dtype=dtype) for label, side, dtype in sides}
    if device != "cpu":
        last = {**case.options, "channels_last": True}
        rows["ours bf16, channels last"] = replace(case, side="ours", dtype="bf16", options=last)
    return Table(name, f"decoding {8 * cells}²", rows, "diffusers fp32")


def _lora(name: str, case: Case) -> Table:
    rows = {"diffusers + PEFT": replace(case, side="peft"), "ours": replace(case, side="ours")}
    if case.device != "cpu":
        rows["ours compiled"] = replace(case, side="ours", options={**case.options, "compile": True})
    return Table(name, f"a LoRA step, {case.dtype}", rows, "diffusers + PEFT")
