"""Text normalisation of a sentencepiece model, cluster by cluster, with the place each character came from.

``transformers`` runs the compiled table of the model (NFKC with changes, a double-array trie) over grapheme
clusters: a cluster of fewer than six bytes becomes the replacement of the *shortest* key it starts with,
anything else is replaced character by character. sentencepiece itself takes the *longest* key at each
position. The two differ only where combining marks pile up (a decomposed Vietnamese letter loses its second
mark here), and transformers is the peer whose token ids are matched. Source: the ``spm_precompiled`` crate
used by ``tokenizers``; Unicode Standard Annex 29 for the clusters.
"""

from __future__ import annotations

import struct
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

_MAX_CLUSTER_BYTES = 5
_CACHE_SIZE = 65_536


class Normalized(NamedTuple):
    """Normalised text and, for each of its characters, where in the original it came from."""

    text: str
    starts: list[int]  # original index of the cluster a character came from
    ends: list[int]  # original index after that cluster


class Normalizer:
    """Applies a compiled sentencepiece table; the empty table changes nothing."""

    def __init__(self, charsmap: bytes) -> None:
        self._units: tuple[int, ...] = ()
        self._replacements = b""
        self._cache: dict[str, str] = {}
        if charsmap:
            (size,) = struct.unpack_from("<I", charsmap)
            if size % 4 or size + 4 > len(charsmap):
                raise ValueError(
                    f"the normalisation table says {size} bytes of trie but holds {len(charsmap) - 4}"
                )
            self._units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
            self._replacements = charsmap[4 + size :]

    def __call__(self, text: str) -> Normalized:
        """Normalised ``text``. Lone surrogates, which no encoding can hold, count as U+FFFD."""
        if not self._units:
            return Normalized(text, list(range(len(text))), list(range(1, len(text) + 1)))
        parts: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        for start, end in clusters(text):
            new = self._cluster(text[start:end])
            parts.append(new)
            starts += [start] * len(new)
            ends += [end] * len(new)
        return Normalized("".join(parts), starts, ends)

    def _cluster(self, cluster: str) -> str:
        known = self._cache.get(cluster)
        if known is not None:
            return known
        data = cluster.encode()
        whole = self._replacement(data) if len(data) <= _MAX_CLUSTER_BYTES else None
        new = whole if whole is not None else "".join(self._character(c) for c in cluster)
        if len(self._cache) < _CACHE_SIZE:
            self._cache[cluster] = new
        return new

    def _character(self, character: str) -> str:
        new = self._replacement(character.encode())
        return character if new is None else new

    def _replacement(self, data: bytes) -> str | None:
        """Replacement of the shortest key that starts ``data``, None if there is none.

        A trie unit holds its label in the low byte, "a key ends here" in bit 8, and the distance to its
        children in the upper bits, times 256 if bit 9 is set (the "darts-clone" layout).
        """
        units = self._units
        at = _children(units[0])
        for byte in data:
            at ^= byte
            if byte == 0 or at >= len(units) or units[at] & 0x800000FF != byte:
                return None
            unit = units[at]
            at ^= _children(unit)
            if unit >> 8 & 1:
                begin = units[at] & 0x7FFFFFFF
                return self._replacements[begin : self._replacements.index(0, begin)].decode()
        return None


def _children(unit: int) -> int:
    return unit >> 10 << ((unit & 1 << 9) >> 6)


def clusters(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the extended grapheme clusters of ``text``, in order.

    Flag pairs, emoji joined by U+200D and Indic conjuncts are left apart: each has six bytes or more with or
    without the joining, so normalisation cannot tell.
    """
    if not text:
        return
    start, before = 0, _kind(text[0])
    for index in range(1, len(text)):
        kind = _kind(text[index])
        if not _joins(before, kind) and text[index - 1 : index + 1] != "\r\n":
            yield start, index
            start = index
        before = kind
    yield start, len(text)


def _joins(before: str, kind: str) -> bool:
    """Whether a character of ``kind`` stays in the cluster of the one before (rules GB4 to GB9b)."""
    if "control" in (before, kind):
        return False
    if kind == "mark" or before == "prepend":
        return True
    follows = {"L": ("L", "V", "LV", "LVT"), "LV": ("V", "T"), "V": ("V", "T"), "LVT": ("T",), "T": ("T",)}
    return kind in follows.get(before, ())


_EXTRA_MARKS = (  # joined to what precedes without being combining marks: joiners, skin tones, tags, vowels
    *(
        (0x200C, 0x200D),
        (0xFF9E, 0xFF9F),
        (0x0E33, 0x0E33),
        (0x0EB3, 0x0EB3),
        (0x1F3FB, 0x1F3FF),
        (0xE0020, 0xE007F),
    ),
    # Combining marks of Unicode 15 to 17, which an older Python does not know yet.
    *(
        (0x0897, 0x0897),
        (0x0CF3, 0x0CF3),
        (0x0ECE, 0x0ECE),
        (0x1ACF, 0x1ADD),
        (0x1AE0, 0x1AEB),
        (0x10D69, 0x10D6D),
    ),
    *((0x10EFA, 0x10EFF), (0x11241, 0x11241), (0x113B8, 0x113C0), (0x113C2, 0x113C2), (0x113C5, 0x113C5)),
    *((0x113C7, 0x113CA), (0x113CC, 0x113D0), (0x113D2, 0x113D2), (0x113E1, 0x113E2), (0x11B60, 0x11B67)),
    *((0x11F00, 0x11F01), (0x11F03, 0x11F03), (0x11F34, 0x11F3A), (0x11F3E, 0x11F42), (0x11F5A, 0x11F5A)),
    *((0x13440, 0x13440), (0x13447, 0x13455), (0x1611E, 0x1612F), (0x1E08F, 0x1E08F), (0x1E4EC, 0x1E4EF)),
    *((0x1E5EE, 0x1E5EF), (0x1E6E3, 0x1E6E3), (0x1E6E6, 0x1E6E6), (0x1E6EE, 0x1E6EF), (0x1E6F5, 0x1E6F5)),
)
_NOT_MARKS = (  # spacing marks that start a cluster of their own (Myanmar, Tai Tham, Ahom)
    *(
        (0x102B, 0x102C),
        (0x1038, 0x1038),
        (0x1062, 0x1064),
        (0x1067, 0x106D),
        (0x1083, 0x1083),
        (0x1087, 0x108C),
    ),
    *(
        (0x108F, 0x108F),
        (0x109A, 0x109C),
        (0x1A61, 0x1A61),
        (0x1A63, 0x1A64),
        (0xAA7B, 0xAA7B),
        (0xAA7D, 0xAA7D),
    ),
    (0x11720, 0x11721),
)
_PREPEND = (  # signs that enclose or precede what follows, joined to it
    *(
        (0x0600, 0x0605),
        (0x06DD, 0x06DD),
        (0x070F, 0x070F),
        (0x0890, 0x0891),
        (0x08E2, 0x08E2),
        (0x0D4E, 0x0D4E),
    ),
    *((0x110BD, 0x110BD), (0x110CD, 0x110CD), (0x111C2, 0x111C3), (0x113D1, 0x113D1), (0x1193F, 0x1193F)),
    *((0x11941, 0x11941), (0x11A84, 0x11A89), (0x11D46, 0x11D46), (0x11F02, 0x11F02)),
)
_HANGUL = (
    ("L", ((0x1100, 0x115F), (0xA960, 0xA97C))),
    ("V", ((0x1160, 0x11A7), (0xD7B0, 0xD7C6))),
    ("T", ((0x11A8, 0x11FF), (0xD7CB, 0xD7FB))),
)


@lru_cache(maxsize=_CACHE_SIZE)
def _kind(character: str) -> str:
    """Class of a character for cluster breaking: mark, control, prepend, a Hangul class or other."""
    code, category = ord(character), unicodedata.category(character)
    if _within(code, _PREPEND):
        return "prepend"
    if _within(code, _EXTRA_MARKS) or (category in ("Mn", "Me", "Mc") and not _within(code, _NOT_MARKS)):
        return "mark"
    if category in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return "control"
    if 0xAC00 <= code <= 0xD7A3:
        return "LV" if (code - 0xAC00) % 28 == 0 else "LVT"
    for name, ranges in _HANGUL:
        if _within(code, ranges):
            return name
    return "other"


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= code <= high for low, high in ranges)
