"""Seeded damage of tables, shards and pictures: no record is lost in silence, nothing is a traceback.

python -m tests.attack.data --count 2000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

from sat.data.buckets import measure_all
from sat.data.records import BadRecord, DataError, Record, skipped
from sat.data.sources import read_source
from sat.data.survey import inspect_picture
from sat.util.pictures import FORMATS
from tests.attack.corruptions import damage

ROWS = 6


def write(root: Path) -> None:
    """One healthy file of every kind; the pictures differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (ROWS, 9, 7, 3), np.uint8)
    pictures = [io.BytesIO() for _ in pixels]
    for out, one in zip(pictures, pixels, strict=True):
        PIL.Image.fromarray(one).save(out, "PNG")
    for kind in FORMATS:
        with contextlib.suppress(KeyError, OSError):  # AVIF, where this Pillow has none
            PIL.Image.fromarray(pixels[0]).save(root / f"picture.{kind}", kind)
    (root / "a.png").write_bytes(pictures[0].getvalue())
    rows = [{"file_name": "a.png", "text": [f"æble {n}", "y"], "weights": [1, 2.5]} for n in range(ROWS)]
    (root / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "a.csv").write_text("file_name,text\n" + "".join(f'a.png,"æ, {n} ""q"""\n' for n in range(ROWS)))
    with tarfile.open(root / "a.tar", "w") as out:
        for number, picture in enumerate(pictures):
            for ending, data in (("png", picture.getvalue()), ("txt", b"red apple")):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    with contextlib.suppress(ImportError):
        import pyarrow
        import pyarrow.parquet as pq

        columns = {
            "image": [{"bytes": one.getvalue(), "path": None} for one in pictures],
            "text": ["x"] * ROWS,
        }
        pq.write_table(pyarrow.table(columns), root / "a.parquet", row_group_size=3)


def attack(file: Path, rng: random.Random) -> str | None:
    """Damage ``file`` and read it; the failure in a line, None where it was told or did nothing."""
    done = damage(file, rng)
    try:
        if file.suffix.removeprefix(".") in FORMATS:
            records, told = (Record(file, ("x",)),), []
        else:
            found = read_source(file)
            records, told = found.records, found.told()
        bad = [
            one
            for one in [*map(inspect_picture, records), *measure_all(records)]
            if isinstance(one, BadRecord)
        ]
        told_apart = "zeros" not in done or file.suffix != ".tar"  # from the zeros at the end of a shard
        if file.suffix in (".tar", ".parquet") and told_apart and len(records) < ROWS and not told:
            return f"{done}: {len(records)} of {ROWS} records and no word"
        if any("\n" in line for line in (*told, *skipped(bad))):
            return f"{done}: more than a line: {told} {bad}"
    except DataError:
        return None
    except Exception as error:  # noqa: BLE001 - what is looked for
        return f"{done}: {type(error).__name__}: {error}"
    return None


def run(count: int, seed: int) -> list[str]:
    """The failures of ``count`` attacks."""
    rng = random.Random(seed)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root)
        files = {file: file.read_bytes() for file in sorted(root.iterdir())}
        for _ in range(count):
            file = rng.choice([*files])
            failed += [line for line in [attack(file, rng)] if line]
            file.write_bytes(files[file])
    return failed


def main() -> int:
    """Attack by the command line; code 1 if anything fell."""
    parser = argparse.ArgumentParser(description="Damage data and read it.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = run(args.count, args.seed)
    print("\n".join(failed) or f"{args.count} damaged files: none silent, none a traceback")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
