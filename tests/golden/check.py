"""Compare stored outputs of the official code with ours: ``python tests/golden/check.py FILE…``.

The kind is the beginning of the file's name. One line is printed for each stored ``mid.`` and ``out.``
tensor:

    ok   dit_plus_square   out.output   abs 1.431e-06  rel 4.1e-07  bound 1e-04 rel

``abs`` is the largest absolute difference, ``rel`` that over the largest stored magnitude of the tensor.
Bounds: float32 network outputs, latents and losses 1e-4 rel; schedules and embedding tables 1e-6 rel; images
in [0, 1] 1e-3 abs; integers exact. NaN agrees with NaN only. Exit code: 0 if every line is ok, 1 if one is
not, 2 if a file cannot be checked (not a golden file, a kind that is not supported, something missing).

What the metadata of a loss or sampler says of its run and is not known here is refused by name.

Models are built from the official-style config in the file's metadata and its weights go through the
checkpoint loader under their official names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.golden.file import Golden, GoldenError  # noqa: E402
from tests.golden.report import Report  # noqa: E402

#: Beginning of a file's name -> module and function that check it.
KINDS = {
    "dit_": "network:check",
    "unet_": "unet:check",
    "vae": "first_stage:check",
    "e2e_": "end_to_end:check",
    "sampler_": "samplers:check",
    "loss_": "losses:check",
    "embeddings": "embeddings:check",
    "conditioner": "conditioning:check",
    "tables_": "tables:check_tables",
}


def check_file(path: Path, *, echo: bool = True) -> Report:
    """Every comparison of one file; raises :class:`GoldenError` if it cannot be made."""
    name = path.name.removesuffix(".safetensors")
    where = next((where for start, where in KINDS.items() if name.startswith(start)), None)
    if where is None:
        raise GoldenError(f"{path}: kind not supported yet; supported names begin with {', '.join(KINDS)}")
    module, _, function = where.partition(":")
    check: Callable[[Golden, Report], None] = getattr(import_module(f"tests.golden.{module}"), function)
    report = Report(name, echo)
    check(Golden(path), report)
    if not report.lines:
        raise GoldenError(f"{path}: holds nothing to compare")
    return report


def main(arguments: Sequence[str]) -> int:
    """Check all files named, also after one failed; the exit code."""
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(__doc__)
        return 0 if arguments else 2
    code = 0
    for argument in arguments:
        try:
            report = check_file(Path(argument))
        except GoldenError as problem:
            print(f"ERROR {problem}", flush=True)
            code = 2
        except Exception as problem:  # a model that cannot be built or run must not hide the other files
            print(f"ERROR {argument}: {type(problem).__name__}: {problem}", flush=True)
            code = 2
        else:
            code = max(code, 0 if report.passed else 1)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
