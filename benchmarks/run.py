"""Speed and memory beside other implementations and beside the bare matrix products, all tables.

    python benchmarks/run.py [--suite cpu|gpu|all] [--quick] [--only step,decode] [--threads 2]

Every variant runs in a process of its own; they take turns (:mod:`benchmarks.measure`). Times are medians
with the 10th and 90th percentile, ratios are of medians within one run, memory is the peak of the process
(GPU: of the allocator). Writes ``benchmarks/results/<machine>/performance.json``, where tables that are not
measured this time stay as they were, and brings the tables of docs/performance.md up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.machine import RESULTS, facts, results_folder  # noqa: E402
from benchmarks.measure import compare, timing  # noqa: E402
from benchmarks.peers import STEPS  # noqa: E402
from benchmarks.tables import Table, cpu, gpu  # noqa: E402
from benchmarks.worker import Worker  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"


@dataclass(frozen=True)
class Limits:
    """How long to measure: turns, seconds for a table, and threads of each process."""

    rounds: int
    seconds: float
    threads: int


def measure(table: Table, limits: Limits) -> dict[str, Any]:
    """One table's result: rows that cannot run say why instead."""
    workers: dict[str, Worker] = {}
    rows: list[dict[str, Any]] = []
    for label, case in table.rows.items():
        worker = Worker(case, limits.threads)
        try:
            first = worker.ready()
            if table.once_each:  # one process after the other
                own = {"peak_mb": worker.peak, "facts": worker.facts}
                rows.append({"label": label, **timing([first]).plain(), **own})
                worker.close()
            else:
                workers[label] = worker
        except RuntimeError as error:
            print(f"{table.name}: {label} left out: {error}", file=sys.stderr)
            rows.append({"label": label, "left_out": str(error)})
    if not workers:
        return rated(table, rows, limits.threads)
    takes = {label: worker.sample for label, worker in workers.items()}
    times = compare(takes, rounds=limits.rounds, seconds=limits.seconds, warm=limits.seconds / 6)
    for worker in workers.values():
        worker.close()
    peaks = {label: worker.peak for label, worker in workers.items()}
    rows += [{"label": label, **taken.plain(), "peak_mb": peaks[label]} for label, taken in times.items()]
    return rated(table, rows, limits.threads)


def rated(table: Table, rows: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    """A table's result: ``rows`` with their ratios to the base, or to the first where that is left out."""
    timed = {row["label"]: row for row in rows if "median" in row}
    prepared = timed.pop(table.once, None)
    base = timed.get(table.base) or next(iter(timed.values()), None)
    for label, row in timed.items():
        assert base is not None, "there is a row"
        extra, extra_cpu = 0.0, 0.0
        if prepared is not None and label in table.ours:
            extra, extra_cpu = prepared["median"] / STEPS, prepared["cpu"] / STEPS
        row["once_per_picture"] = extra * STEPS
        row["ratio"] = (row["median"] + extra) / base["median"]
        row["cpu_ratio"] = (row["cpu"] + extra_cpu) / base["cpu"]
    shown = [row for row in rows if "median" not in row or row["label"] in timed]
    return {"title": table.title, "base": table.base, "threads": threads, "rows": shown}


def text(result: dict[str, Any]) -> str:
    """A result as a Markdown table."""
    more = list(dict.fromkeys(key for row in result["rows"] for key in row.get("facts", {})))
    lines = [
        f"| {result['title']} | ms | 10 % to 90 % | ratio | CPU ms | ratio | peak MB | samples |"
        + "".join(f" {key} |" for key in more),
        "|---|---|---|---|---|---|---|---|" + "---|" * len(more),
    ]
    for row in result["rows"]:
        if "left_out" in row:
            lines.append(f"| {row['label']} | left out: {row['left_out']} | | | | | | |" + " |" * len(more))
            continue
        spread = f"{row['low'] * 1e3:.4g} to {row['high'] * 1e3:.4g}"
        counted = f"{row['kept']}" + (f" of {row['kept'] + row['disturbed']}" if row["disturbed"] else "")
        lines.append(
            f"| {row['label']} | {row['median'] * 1e3:.4g} | {spread} | {row['ratio']:.2f} | "
            f"{row['cpu'] * 1e3:.4g} | {row['cpu_ratio']:.2f} | {row['peak_mb']:.0f} | {counted} |"
            + "".join(
                f" {row.get('facts', {}).get(key, ''):.4g} |" if key in row.get("facts", {}) else " |"
                for key in more
            )
        )
    return "\n".join(lines)


def write(found: dict[str, dict[str, Any]], arguments: Sequence[str]) -> Path:
    """Add ``found`` to this machine's file, each table with where it is from."""
    path = results_folder() / "performance.json"
    kept = json.loads(path.read_text())["tables"] if path.is_file() else {}
    command = " ".join(["python", "benchmarks/run.py", *arguments])
    about = facts({}) | {"command": command}
    origin = {key: about[key] for key in ("command", "code", "versions", "written")}
    kept |= {name: {**result, **origin} for name, result in found.items()}
    path.write_text(json.dumps(about | {"tables": kept}, indent=1) + "\n")
    return path


def update_page(page: Path = PAGE) -> None:
    """Put the tables of all result files between the page's ``<!-- table NAME -->`` and ``<!-- end -->``."""
    written = page.read_text()
    for file in sorted(RESULTS.glob("*/performance.json")):
        content = json.loads(file.read_text())
        for name, result in content["tables"].items():
            when = datetime.fromisoformat(result["written"]).astimezone(timezone.utc).date()
            made = (
                f"{text(result)}\n\n`{result['command']}`, {content['machine']}, {content['device']}, "
                f"{result['threads']} threads, torch {result['versions']['torch']}, {when}."
            )
            mark = re.compile(rf"(<!-- table {re.escape(name)} -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL)
            written = mark.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", written)
    page.write_text(written)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the tables that are asked for, print, write."""
    reader = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = reader.add_argument
    add("--suite", choices=("cpu", "gpu", "all"), default="cpu")
    add("--quick", action="store_true", help="smaller sizes and few turns; nothing is written")
    add("--only", default="", metavar="NAMES", help="tables by name, separated by commas")
    add("--compiled", action="store_true", help="CPU steps also compiled, which takes minutes")
    add(
        "--one-step",
        default="runs/tiny_base_turbo",
        help="weights of configs/tiny_base_turbo.yaml, for `cascade`",
    )
    add(
        "--beside",
        default="",
        metavar="TREE",
        help="checkout of another commit beside this, for `cascade_parts`",
    )
    add("--threads", type=int, default=2, help="of each CPU process")
    add("--rounds", type=int, default=9, help="samples that count, of each variant")
    add("--seconds", type=float, default=120.0, help="for a table at most, after the warm-up")
    given = list(sys.argv[1:] if argv is None else argv)
    args = reader.parse_args(given)
    suites = ("cpu", "gpu") if args.suite == "all" else (args.suite,)
    tables = [*(cpu(args.quick, args.compiled, args.one_step, args.beside) if "cpu" in suites else ())]
    tables += gpu(args.quick) if "gpu" in suites else ()
    wanted = set(filter(None, args.only.split(",")))
    if strange := wanted - {table.name for table in tables}:
        reader.error(f"--only {', '.join(sorted(strange))}: there are {', '.join(t.name for t in tables)}")
    if "gpu" in suites and not _has_gpu():
        reader.error("--suite gpu needs a GPU, and torch sees none here: use --suite cpu")
    limits = Limits(3 if args.quick else args.rounds, 20.0 if args.quick else args.seconds, args.threads)
    found = {}
    for table in tables:
        if not wanted or table.name in wanted:
            found[table.name] = measure(table, limits)
            print(f"{text(found[table.name])}\n", flush=True)
    if not args.quick:
        print(write(found, given).relative_to(ROOT))
        update_page()
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
