"""Amounts of memory as people write them; no torch is needed to read them."""

from __future__ import annotations

import re

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def parse_size(text: str) -> int:
    """Bytes of ``24GB`` (1e9 each) or ``24GiB``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    if found is None:
        raise ValueError(f"expected a size such as 24GB or 80GiB, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])
