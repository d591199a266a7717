"""Pictures of runs, denoising, attention, data, benchmarks (``sat.cli.plot``), and ``sample.py --grid``."""

from __future__ import annotations

import argparse
import html
import io
import itertools
import json
import logging
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat.cli.arguments import Setting
from sat.cli.main_guard import UsageError
from sat.config.load import load_full

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image
    from torch import Tensor

    from sat.pipeline import Pipeline
    from sat.sampling.output import GridAxis
    from sat.sampling.prompts import Prompt
    from sat.transformer.hooks import Attend, Context

log = logging.getLogger(__name__)

Row = Mapping[str, float]
METRICS = "metrics.jsonl"
PANELS = {
    "loss": ("loss", "validation/loss"),
    "held-out loss by timestep": (),  # validation/loss_<timestep>, a line each
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "images a second": ("images_per_second",),
}
BY_LEVEL = "validation/loss_"
LEVEL = re.compile(rf"{BY_LEVEL}\d+")


# -- runs


def read_rows(run: Path) -> list[Row]:
    """Rows of a run's ``metrics.jsonl`` by step; of a step that was done again after a resume, the last.

    Lines that a killed run left half written are left out, with a line that counts them.
    """
    path = run / METRICS if run.is_dir() else run
    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected the folder of a training")
    rows: dict[tuple[int, bool], Row] = {}
    bad = 0
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            row = {name: float(value) for name, value in json.loads(line).items() if value is not None}
            key = int(row["step"]), any(name.startswith("validation/") for name in row)
        except (ValueError, KeyError, TypeError, AttributeError):
            bad += 1
            continue
        for later in [known for known in rows if known[0] > key[0]]:
            del rows[later]  # of before the resume
        rows[key] = row
    if bad:
        log.warning("%s: %d lines are no rows of metrics and are left out", path, bad)
    if not rows:
        raise UsageError(f"{path}: no rows yet; train.log_every steps make one")
    return [rows[key] for key in sorted(rows)]


def curve(rows: Sequence[Row], name: str, smooth: float = 0.0) -> tuple[list[float], list[float]]:
    """(steps, values) of one number; ``smooth`` S averages with weights S^n of the values n rows before."""
    found = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    out: list[float] = []
    total, weight = 0.0, 0.0
    for _, value in found:
        total, weight = smooth * total + value, smooth * weight + 1
        out.append(total / weight)
    return [step for step, _ in found], out


def runs(args: argparse.Namespace) -> list[Path]:
    """Curves of the runs beside each other, a colour each; the files written."""
    if not 0 <= args.smooth < 1:
        raise UsageError(f"--smooth {args.smooth:g}: expected at least 0, and less than 1")
    found: list[Path] = []
    for run in args.runs:  # a folder of runs stands for all of them
        inside = [] if (run / METRICS).is_file() else sorted(path.parent for path in run.glob(f"*/{METRICS}"))
        found += inside or [run]
    tables = {str(run): read_rows(run) for run in found}
    levels = sorted(
        {name for rows in tables.values() for row in rows for name in row if LEVEL.fullmatch(name)},
        key=lambda name: float(name.removeprefix(BY_LEVEL)),
    )
    wanted = {title: names or levels for title, names in PANELS.items()}
    there = {
        title: names
        for title, names in wanted.items()
        if any(name in row for rows in tables.values() for row in rows for name in names)
    }
    figure, axes = _figure(len(there))
    for axis, (title, names) in zip(axes, there.items(), strict=False):
        for number, (run, rows) in enumerate(tables.items()):
            for place, name in enumerate(names):
                x, y = curve(rows, name, args.smooth if name == "loss" else 0.0)
                if not x:
                    continue
                several = names is levels
                label = (
                    f"{Path(run).name} {name.removeprefix('validation/loss_')}" if several else Path(run).name
                )
                shade = 1 - 0.75 * place / max(1, len(names) - 1) if several else 1
                dashed = name.startswith("validation/") and not several
                label += " held out" if dashed else ""
                style = "--" if dashed else "-"
                axis.plot(
                    x,
                    y,
                    style,
                    color=f"C{number}",
                    alpha=shade,
                    marker="." if len(x) < 20 else "",
                    label=label,
                )
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    table = [["run", "step", *(name for names in there.values() for name in names)]]
    for run, rows in tables.items():
        last = [curve(rows, name)[1][-1:] for names in there.values() for name in names]
        table.append(
            [run, f"{rows[-1]['step']:.0f}", *(f"{value[0]:.4g}" if value else "" for value in last)]
        )
    folder = args.runs[0] if args.runs[0].is_dir() else args.runs[0].parent
    outs = [args.out] if args.out else [folder / "plot.png", folder / "plot.html"]
    return [_write(figure, out, "Training runs", table) for out in outs]


def _figure(count: int, width: float = 5.0, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` axes, at most three in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, max(1, count))
    lines = -(-max(1, count) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained"
    )
    flat = list(axes.flat)
    for axis in flat[count:]:
        axis.axis("off")
    return figure, flat[:count]


def _write(figure: Figure, out: Path, title: str, table: Sequence[Sequence[str]] = ()) -> Path:
    """Write ``figure`` to ``out``: an image by its suffix, or a page with the drawing and ``table`` in it."""
    from sat.util.host import write_text

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() != ".html":
        figure.savefig(out, dpi=120)
        return out
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg")
    svg = drawing.getvalue()
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for tag, row in zip(["th", *["td"] * len(table)], table, strict=False)
    ]
    write_text(
        out,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font:14px sans-serif;margin:2em}svg{max-width:100%;height:auto}"
        "td,th{padding:.2em .8em;text-align:right}td:first-child{text-align:left}</style>\n"
        f"<h1>{title}</h1>\n{svg[svg.index('<svg') :]}\n<table>{''.join(lines)}</table></html>\n",
    )
    return out


# -- how a model draws


def _pipeline(args: argparse.Namespace, *more: tuple[str, object]) -> Pipeline:
    """The model of ``--base``, loaded."""
    from sat.pipeline import Pipeline

    keys = [] if args.steps is None else [("sampling.steps", args.steps)]
    return Pipeline.from_config(args.base, [*args.overrides, *keys, *more])


def steps(args: argparse.Namespace) -> list[Path]:
    """A strip of the predicted picture after ``--count`` of the steps, the first and the last among them."""
    from PIL import Image

    if args.count < 1:
        raise UsageError(f"--count {args.count}: expected at least 1")
    pipe, seen = _pipeline(args), dict[int, Any]()

    def keep(step: int, total: int, preview: Tensor) -> None:
        count = min(args.count, total)
        if step in {total - round(i * (total - 1) / max(1, count - 1)) for i in range(count)}:
            seen[step] = preview[:1].float().cpu()

    pipe(args.prompt, seed=args.seed, callback=keep)
    pictures = [pipe.generator.images(latents)[0] for _, latents in sorted(seen.items())]
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * (width + 2) - 2, height), "white")
    for place, picture in enumerate(pictures):
        strip.paste(picture, (place * (width + 2), 0))
    strip.save(args.out)
    log.info("steps %s of %d", ", ".join(map(str, sorted(seen))), pipe.experiment.sampling.steps)
    return [args.out]


def attention(args: argparse.Namespace) -> list[Path]:
    """The picture, and for each word the attention that image tokens give it, mean of layers and steps."""
    from sat.mixin import Mixin, wraps
    from sat.transformer import Transformer, TransformerHooks

    # Plain attention on all tokens: packed or folded text would hide single words.
    pipe = _pipeline(args, ("sampling.fold", False), ("sampling.attention", "torch"))
    network = pipe.generator.engine.network
    transformer = getattr(network, "transformer", None)
    tokenizer = pipe.generator.engine.conditioner.tokenizer
    if not isinstance(transformer, Transformer) or tokenizer is None or not hasattr(tokenizer, "pieces"):
        raise UsageError(f"attention per word needs CogView3-Plus, and this is {type(network).__name__}")
    found: list[Tensor] = []
    scale = transformer.spec.scale

    class Probe(Mixin):
        """Keeps the shares (N, T) that image queries of the prompt's row give to text keys."""

        host = TransformerHooks

        @wraps("attend")
        def attend(self, inner: Attend, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
            t = ctx.segments[0]
            assert ctx.tokens is not None, "joint attention has text"
            row = int(ctx.tokens.float().var((1, 2)).argmax()) if len(ctx.tokens) > 1 else 0
            logits = q[row, :, t:].float() @ k[row].float().mT * (scale or q.shape[-1] ** -0.5)
            found.append(logits.softmax(-1)[:, :, :t].mean(0).cpu())  # (N, T)
            return inner(q, k, v, ctx)

    transformer.extend("attention_probe", Probe())
    output = pipe(args.prompt, seed=args.seed)
    grid = pipe.generator.engine.latent_shape(output.images[0].height, output.images[0].width)[1:]
    shares = sum(found[1:], found[0]) / len(found)  # (N, T)
    side = math.isqrt(grid[0] * grid[1] // len(shares))  # latent cells of a patch
    maps = shares.reshape(grid[0] // side, grid[1] // side, -1)
    words: dict[tuple[int, int], list[int]] = {}
    for place, piece in enumerate(tokenizer.pieces(args.prompt)[: maps.shape[-1]]):
        start = args.prompt.rfind(" ", 0, max(piece.start, 1)) + 1 if piece.start else 0
        if args.prompt[piece.start : piece.end].startswith(" "):
            start = piece.start + 1
        end = args.prompt.find(" ", start)
        words.setdefault((start, len(args.prompt) if end < 0 else end), []).append(place)
    figure, axes = _figure(1 + len(words), 2.4, 2.6)
    axes[0].imshow(output.images[0])
    axes[0].set(title="picture", xticks=[], yticks=[])
    for axis, ((start, end), places) in zip(axes[1:], words.items(), strict=True):
        axis.imshow(output.images[0])
        extent = (-0.5, output.images[0].width - 0.5, output.images[0].height - 0.5, -0.5)
        axis.imshow(maps[..., places].sum(-1).numpy(), alpha=0.75, extent=extent, cmap="magma")
        axis.set(title=args.prompt[start:end] or "(space)", xticks=[], yticks=[])
    return [_write(figure, args.out, args.prompt)]


PER_PICTURE = ("seed", "guidance", "steps", "height", "width", "strength")
"""Axes of a grid that need no other model: arguments of :class:`Pipeline`'s call."""
KEYS = {
    "lora": "adapters.load.0.strength",
    "control": "sampling.controls.0.scale",
    "guidance": "sampling.guider.params.scale",
} | {name: f"sampling.{name}" for name in PER_PICTURE if name != "guidance"}
"""Axes of a grid that stand for a key of the config."""
CELLS = 400
"""Pictures of a grid at most."""


def _axis(text: str, args: argparse.Namespace, given: Sequence[tuple[str, object]]) -> GridAxis:
    """The axis ``text`` of ``--grid``, if the config takes its values; of numbers, the ends."""
    from sat.sampling.output import GridAxis

    ends = re.fullmatch(r".*=(\d+)\.\.(\d+)", text)
    if ends is not None and not int(ends[1]) <= int(ends[2]) < int(ends[1]) + CELLS:
        raise UsageError(f"--grid {text}: expected the lower end first, and at most {CELLS} values")
    axis, words = GridAxis.of(text), {"lora": args.lora, "control": args.control}
    if axis.name in words and not words[axis.name]:
        raise UsageError(f"--grid {axis.name}: strengths of --{axis.name}, of which there is none")
    numbers = [value for value in axis.values if not isinstance(value, str)]
    if axis.name in KEYS and len(numbers) < len(axis.values):
        raise UsageError(f"--grid {axis.name}: expected numbers, got {', '.join(map(str, axis.values))}")
    key = KEYS.get(axis.name, axis.name)
    for value in {min(numbers), max(numbers)} if len(numbers) == len(axis.values) else axis.values:
        load_full(args.base, [*args.overrides, *given, Setting(key, value, "--grid")])
    return axis


def grid(args: argparse.Namespace, settings: Sequence[tuple[str, object]], prompts: Sequence[Prompt]) -> int:
    """``sample.py --grid``: a sheet for each prompt, the first axis downwards, the second to the right.

    Each picture is also written by itself. Axes of :data:`PER_PICTURE` share a loaded model; others are keys
    of the config, and each of their values loads one.
    """
    from sat.pipeline import Pipeline
    from sat.sampling.output import (
        GridAxis,
        folder_name,
        labelled_grid,
        prove_writable,
        run_folder,
        write_png,
    )

    given = [*settings, ("sampling.batch_size", 1)]
    axes = [_axis(text, args, given) for text in args.grid]
    if not 1 <= len(axes) <= 2:
        raise UsageError("--grid: expected one or two of KEY=VALUE,VALUE,… such as guidance=1,3,5 seed=0..3")
    if (count := math.prod(len(axis.values) for axis in axes)) > CELLS:
        raise UsageError(f"--grid: {count} pictures on a sheet: expected at most {CELLS}")
    down, right = axes if len(axes) == 2 else (GridAxis("", [""]), axes[0])
    root = Path(args.output_dir or "outputs/grid")
    cells: dict[tuple[int, int, int], Image.Image] = {}
    root = root if args.overwrite else run_folder(root, "", join=False)[0]
    prove_writable(root)
    loaded: tuple[object, Pipeline | None] = None, None
    for i, j in itertools.product(range(len(down.values)), range(len(right.values))):
        chosen = {axis.name: axis.values[k] for axis, k in ((down, i), (right, j)) if axis.name}
        keys = [(KEYS.get(name, name), value) for name, value in chosen.items() if name not in PER_PICTURE]
        if loaded[1] is None or loaded[0] != keys:
            loaded = keys, Pipeline.from_config(args.base, [*args.overrides, *given, *keys])
        pipe = loaded[1]
        own: dict[str, Any] = {name: value for name, value in chosen.items() if name in PER_PICTURE}
        assert pipe is not None, "just loaded"
        log.info("%s", ", ".join(f"{name} {value}" for name, value in chosen.items()))
        for prompt in prompts:
            (picture,) = pipe(prompt.text, **own).images
            cells[prompt.index, i, j] = picture
            name = "_".join(f"{name}={value}" for name, value in chosen.items())
            path = root / folder_name(prompt) / (re.sub(r"[^-\w.=]", "_", name) + ".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, picture, {"prompt": prompt.text, **{n: str(v) for n, v in chosen.items()}})
    for prompt in prompts:
        path = root / folder_name(prompt) / "sheet.png"
        across = range(len(right.values))
        rows = [[cells[prompt.index, i, j] for j in across] for i in range(len(down.values))]
        write_png(
            path, labelled_grid(rows, down, right), {"prompt": prompt.text, "grid": " ".join(args.grid)}
        )
        print(path)
    return 0


# -- data and benchmarks


def data(args: argparse.Namespace) -> list[Path]:
    """Sizes and buckets of the pictures as bars, and a contact sheet of the first."""
    from sat.data.buckets import BucketRule, Buckets
    from sat.data.survey import contact_sheet, survey

    surveys = [survey(source, None) for source in args.sources]
    records = [record for one in surveys for record in one.readable]
    sizes = [picture.size for one in surveys for picture in one.pictures]
    if not sizes:
        raise UsageError(f"{args.sources[0]}: no pair of picture and caption that can be used")
    areas = args.area or [int(statistics.median(height * width for height, width in sizes))]
    try:
        buckets = Buckets.of(sizes, BucketRule(tuple(areas), args.step))
    except ValueError as error:
        raise UsageError(str(error)) from error
    figure, (bars, sheet) = _figure(2, 6.0, 5.0)
    order = sorted(range(len(buckets.sizes)), key=lambda i: -len(buckets.items[i]))
    names = [f"{buckets.sizes[i][0]} x {buckets.sizes[i][1]}" for i in order]
    drawn = bars.barh(names, [len(buckets.items[i]) for i in order])
    bars.bar_label(drawn)
    bars.invert_yaxis()
    bars.set(title="pictures by bucket (height x width)", xlabel="pictures")
    shown = records[: args.pictures]
    sheet.imshow(contact_sheet(shown, min(8, len(shown)), 64, 64))
    sheet.set(title=f"the first {len(shown)} of {len(records)}")
    sheet.axis("off")
    table = [
        ["bucket", "pictures"],
        *([name, str(len(buckets.items[i]))] for name, i in zip(names, order, strict=True)),
    ]
    return [_write(figure, args.out, "Data", table)]


def memory(args: argparse.Namespace) -> list[Path]:
    """Estimated memory of each stage of sampling on a GPU, of square pictures; nothing is loaded."""
    from sat.config.settle import settle_dtype
    from sat.estimate.budget import STAGES, SamplingEstimator

    experiment = settle_dtype(load_full(args.base, args.overrides).experiment, None)
    sampling = experiment.sampling
    sizes = sampling.sizes
    usual = [side for side in (256, 512, 768, 1024, 1280, 1440, 2048) if sizes.allows(side, side)]
    sides = args.sides or usual or [sampling.height]
    for side in sides:
        sizes.check(side, side)
    estimator = SamplingEstimator(host=False)
    peaks = [
        estimator.peaks(replace(experiment, sampling=replace(sampling, height=side, width=side)))
        for side in sides
    ]
    figure, (axis,) = _figure(1, 6.5, 4.0)
    table = [["side", *STAGES]]
    for number, stage in enumerate(STAGES):
        places = [k + 0.27 * (number - 1) for k in range(len(sides))]
        axis.bar(places, [getattr(peak, stage) / 1e9 for peak in peaks], 0.25, label=stage)
    axis.set_xticks(range(len(sides)), [str(side) for side in sides])
    axis.set(title="memory of sampling on a GPU, estimated", xlabel="side in pixels", ylabel="GB")
    axis.legend()
    axis.grid(alpha=0.3, axis="y")
    table += [
        [str(side), *(f"{getattr(peak, stage) / 1e9:.2f}" for stage in STAGES)]
        for side, peak in zip(sides, peaks, strict=True)
    ]
    for row in table:
        log.info("%s", "  ".join(f"{cell:>10}" for cell in row))
    return [_write(figure, args.out, "Memory", table)]


def benchmarks(args: argparse.Namespace) -> list[Path]:
    """Times of each table of the result files as bars, relative to the table's first row."""
    found: list[tuple[str, list[tuple[str, float]]]] = []
    for file in args.files:
        found += list(_tables(file))
    if not found:
        raise UsageError(f"{args.files[0]}: no tables of times; expected a result of benchmarks/run.py")
    figure, axes = _figure(len(found), 5.5, 3.0)
    for axis, (title, rows) in zip(axes, found, strict=True):
        drawn = axis.barh([label for label, _ in rows], [ratio for _, ratio in rows])
        axis.bar_label(drawn, fmt="%.2f", fontsize=7)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
    table = [
        ["table", "row", "time"],
        *([t, label, f"{ratio:.2f}"] for t, rows in found for label, ratio in rows),
    ]
    return [_write(figure, args.out, "Time, less is better", table)]


def _tables(file: Path) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    try:
        result = json.loads(file.read_text("utf-8"))
        for table in result.get("tables", {}).values():
            rows = [
                (row["label"], float(row["ratio"])) for row in table["rows"] if row.get("ratio") is not None
            ]
            if rows:
                yield f"{table['title']}\n{result.get('machine', file.parent.name)}", rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not a result file of benchmarks/run.py ({error})") from error


COMMANDS = {
    "runs": runs,
    "steps": steps,
    "attention": attention,
    "data": data,
    "memory": memory,
    "benchmarks": benchmarks,
}
