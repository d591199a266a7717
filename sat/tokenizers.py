"""T5 tokenisation on sentencepiece alone; ids equal those of ``transformers``' T5 tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sat.models.t5.normalizer import Normalizer
from sat.models.t5.sentencepiece_model import read_model

PAD, EOS, UNKNOWN = 0, 1, 2
_SPECIAL = {"<pad>": PAD, "</s>": EOS, "<unk>": UNKNOWN}
_SPACE = "\u2581"  # how sentencepiece writes a space
_WORD = re.compile(
    r"[^\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"
)  # Unicode White_Space
_PART = re.compile(f"{_SPACE}[^{_SPACE}]*")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CACHE_SIZE = 65_536


class Tokens(NamedTuple):
    """A batch of token ids."""

    ids: Tensor  # (B, T) int64, padded with 0
    mask: Tensor  # (B, T) bool, true = real token, the end of sequence included


class Piece(NamedTuple):
    """One token of a text and where it came from: ``text[start:end]``."""

    id: int
    start: int
    end: int


class T5Tokenizer:
    """Texts to token ids: pad 0, end of sequence 1 appended, unknown 2, ``<extra_id_0>`` the last id.

    ``path`` is a sentencepiece unigram model (``spiece.model``) or the folder it lies in. ``max_length`` is
    the number of tokens T of a batch, the end of sequence included. ``extra_ids`` sentinels ``<extra_id_k>``
    follow the model's own ``trained`` pieces, in reverse order.

    Special tokens written out in a text become their ids, whitespace of any kind and length separates words
    and is otherwise lost: both as in ``transformers``.
    """

    def __init__(self, path: str | Path, max_length: int, extra_ids: int = 100) -> None:
        from sentencepiece import SentencePieceProcessor

        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; the end of sequence alone takes 1 token")
        file = Path(path)
        self.path = file / "spiece.model" if file.is_dir() else file
        self.max_length = max_length
        model = read_model(self.path, (f"<extra_id_{k}>" for k in reversed(range(extra_ids))))
        wrong = {text: i for text, i in _SPECIAL.items() if model.pieces[i : i + 1] != (text,)}
        if wrong:
            raise ValueError(
                f"{self.path} is not a T5 vocabulary: "
                f"ids 0, 1, 2 are {list(model.pieces[:3])}, not {list(_SPECIAL)}"
            )
        self.vocab_size = len(model.pieces)
        self.trained = self.vocab_size - extra_ids
        sentinels = {piece: self.trained + k for k, piece in enumerate(model.pieces[self.trained :])}
        self._special = _SPECIAL | sentinels
        self._special_pattern = re.compile("|".join(map(re.escape, self._special)))
        self._normalize = Normalizer(model.charsmap)
        self._segmenter = SentencePieceProcessor(model_proto=model.segmenter)
        self._parts: dict[str, tuple[tuple[int, int], ...]] = {}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids (B, max_length) of ``texts``; longer ones lose their end, not the end mark."""
        if isinstance(texts, str):
            raise TypeError(f"expected a sequence of texts, got the text {texts[:40]!r}; wrap it in a list")
        ids = torch.full((len(texts), self.max_length), PAD, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens = [piece.id for piece in self.pieces(text)[: self.max_length - 1]]
            ids[row, : len(tokens) + 1] = torch.tensor([*tokens, EOS])
            mask[row, : len(tokens) + 1] = True
        return Tokens(ids, mask)

    def encode(self, text: str) -> list[int]:
        """All token ids of ``text``, end of sequence included, neither cut nor padded."""
        return [*(piece.id for piece in self.pieces(text)), EOS]

    def truncation(self, text: str) -> str | None:
        """The end of ``text`` that does not fit into ``max_length`` tokens, None if all of it does."""
        dropped = self.pieces(text)[self.max_length - 1 :]
        return text[dropped[0].start :].strip() if dropped else None

    def unknown_share(self, text: str) -> float:
        """Share of the characters of ``text``, spaces aside, that became the unknown token; 0 to 1."""
        sizes = [(p.id == UNKNOWN, len("".join(text[p.start : p.end].split()))) for p in self.pieces(text)]
        total = sum(size for _, size in sizes)
        return sum(size for unknown, size in sizes if unknown) / total if total else 0.0

    def pieces(self, text: str) -> list[Piece]:
        """The tokens of ``text`` with the places they came from, without the end of sequence."""
        clean = _SURROGATE.sub("\ufffd", text)
        out: list[Piece] = []
        at = 0
        for special in self._special_pattern.finditer(clean):
            self._plain(clean[at : special.start()], at, out)
            out.append(Piece(self._special[special.group()], *special.span()))
            at = special.end()
        self._plain(clean[at:], at, out)
        return out

    def _plain(self, text: str, offset: int, out: list[Piece]) -> None:
        """Append the pieces of ``text``, which holds no special token and starts at ``offset``."""
        normal, starts, ends = self._normalize(text)
        for word in _WORD.finditer(normal):
            at = word.start()
            marked = word.group()
            added = 0 if marked.startswith(_SPACE) else 1  # characters of the word that are not in the text
            for part in _PART.findall(_SPACE + marked if added else marked):
                for token, length in self._segment(part):
                    stop = at + length - added
                    first, last = min(at, len(starts) - 1), max(stop - 1, at)
                    out.append(
                        Piece(
                            token,
                            offset + starts[first],
                            offset + (ends[last] if stop > at else starts[first]),
                        )
                    )
                    at, added = stop, 0

    def _segment(self, part: str) -> tuple[tuple[int, int], ...]:
        """(id, length in characters) of the most probable pieces of ``part``: a space mark and a word."""
        known = self._parts.get(part)
        if known is not None:
            return known
        tokens, surfaces = (
            self._segmenter.encode(part, out_type=int),
            self._segmenter.encode(part, out_type=str),
        )
        new = tuple(zip(tokens, map(len, surfaces), strict=True))
        if len(self._parts) < _CACHE_SIZE:
            self._parts[part] = new
        return new
