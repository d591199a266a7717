"""Writes docs/moved.md from the tables of sat/compat.py: ``python docs/generate_moved.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sat import compat  # noqa: E402

HEAD = """# Moved names

In November 2026 the code was laid out in three rings ([walk.md](walk.md)). Old names in configs, manifests,
adapters and Python imports keep working; each is answered with a notice of today's name. State-dict keys,
file formats and command-line flags did not change. `python docs/generate_moved.py` writes this page from
`sat/compat.py`.
"""

TRANSFORMER = """
## Attributes of a transformer and its context

Speed is put on a built model from outside; the context knows segments, not text.

| before | now |
|---|---|
| `ctx.text_len` | `ctx.segments[0]`, under joint attention |
| `final` of (B, T + N, D), `embed` and `position` with text | of image tokens alone; `sat.mixins.joint_attention.JointAttention` adds and takes away the text |
| `ctx.text_mask` in `attend` | `ctx.key_mask`, (B, 1, 1, L) |
| `transformer.kernel = f` | `sat.kernels.attention.put_kernel(transformer, f)` |
| `transformer.checkpointing = True` | `sat.kernels.compile.recompute(module)` |
| `transformer.run_block`, `transformer.replay` | mixins: `sat.kernels.compile.CompiledBlocks`, `Recorded` |
| `network.fold = tokens` | `sat.kernels.apply.fold(network, tokens)` |
"""  # noqa: E501


def _table(title: str, heads: tuple[str, str], rows: Mapping[str, str]) -> list[str]:
    lines = [f"| {old} | {new} |" for old, new in sorted(rows.items())]
    return [f"\n## {title}\n", f"| {heads[0]} | {heads[1]} |", "|---|---|", *lines]


def _file(module: str) -> str:
    """Path of a module, as one of a file where it is one today."""
    path = module.replace(".", "/")
    return f"`{path}/`" if (ROOT / path).is_dir() or module in compat.FOLDERS else f"`{path}.py`"


def page() -> str:
    """The page."""
    parameters = {
        f"`{old}` of `{target}`": f"`{new}`"
        for target, rows in compat.PARAMETERS.items()
        for old, new in rows.items()
    }
    code = {f"`{old}`": f"`{new}`" for old, new in compat.NAMES.items()}
    keys = {f"`{old}`": f"`{new}`" for old, new in compat.KEYS.items()}
    lines = [
        HEAD.rstrip(),
        *_table("Files", ("before", "now"), {_file(old): _file(new) for old, new in compat.MODULES.items()}),
        *_table("Classes and functions", ("before", "now"), code),
        TRANSFORMER.rstrip(),
        *_table("Keys of a config", ("before", "now"), keys | parameters),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "moved.md").write_text(page(), "utf-8")
