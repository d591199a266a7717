"""Tokenizers of the text encoders, by the libraries sentencepiece and tokenizers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sat.conditioning.conditioner import Tokens
from sat.errors import UserError
from sat.util.host import install, read_bounded

PAD, EOS, UNKNOWN = 0, 1, 2
_SPECIAL = ["<pad>", "</s>", "<unk>"]  # by id
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_BYTES = 1 << 26  # of a vocabulary


NEEDS = "{} needs the tokenizers library (there is no spiece.model): {}"


class MissingTokenizersError(UserError, RuntimeError):
    """A vocabulary is a tokenizer.json, and the library that reads it is not installed."""


class Piece(NamedTuple):
    """One token of a text and where it came from: ``text[start:end]``."""

    id: int
    start: int
    end: int


class T5Tokenizer:
    """Texts to token ids: pad 0, end of sequence 1 appended, unknown 2.

    ``path`` is a sentencepiece model (``spiece.model``) or the folder it lies in. ``max_length`` is the
    number of tokens T of a batch, the end of sequence included. ``trained`` is the number of pieces in the
    model; ``vocab_size`` counts T5's sentinels too: ``<extra_id_k>`` has the id ``vocab_size - 1 - k``.

    The ids equal those of ``transformers``' T5 tokenizer except in four places, where these are
    sentencepiece's own: special tokens typed into a text (``</s>``, ``<extra_id_0>``) are read as plain text;
    piled-up combining marks and Korean letters typed one by one are normalised by the longest match, not
    the shortest; U+0085 does not separate words. tests/parity/test_t5_tokenizer.py has an example of each.
    """

    multiple: int | None = None  # every batch is padded to max_length

    def __init__(self, path: str | Path, max_length: int, extra_ids: int = 100) -> None:
        from sentencepiece import SentencePieceProcessor

        if max_length < 1:
            raise ValueError(f"max_length is {max_length}; the end of sequence alone takes 1 token")
        file = Path(path)
        self.path = file / "spiece.model" if file.is_dir() else file
        self.max_length = max_length
        self._json: Any = None
        if self.path.suffix == ".json":
            self._open()
            return
        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(read_bounded(self.path, _MOST_BYTES))
        except OSError as error:
            raise FileNotFoundError(
                f"cannot read the sentencepiece model {self.path}: {error.strerror or error}"
            ) from error
        except RuntimeError as error:
            raise ValueError(f"{self.path} is not a usable sentencepiece model: {error}") from error
        self.trained: int = self._model.vocab_size()
        self.vocab_size = self.trained + extra_ids
        first = self._model.id_to_piece(list(range(min(3, self.trained))))
        if first != _SPECIAL:
            raise ValueError(f"{self.path} is not a T5 vocabulary: ids 0, 1, 2 are {first}, not {_SPECIAL}")

    def _open(self) -> None:
        """Read tokenizer.json, which transformers 5 writes instead of spiece.model."""
        self._json = open_json(self.path)
        self._json.encode_special_tokens = True  # typed into a text they are plain text, as in sentencepiece
        vocabulary: dict[str, int] = self._json.get_vocab()
        self.vocab_size = len(vocabulary)
        self.trained = min(
            (i for t, i in vocabulary.items() if t.startswith("<extra_id_")), default=len(vocabulary)
        )
        first = [self._json.id_to_token(i) for i in range(3)]
        if first != _SPECIAL:
            raise ValueError(f"{self.path} is not a T5 vocabulary: ids 0, 1, 2 are {first}, not {_SPECIAL}")

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids (B, max_length) of ``texts``; longer ones lose their end, not the end mark."""
        if isinstance(texts, str):
            raise TypeError(f"expected a sequence of texts, got the text {texts[:40]!r}; wrap it in a list")
        ids = torch.full((len(texts), self.max_length), PAD, dtype=torch.int64)  # (B, T)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens = [*self.encode(text)[:-1][: self.max_length - 1], EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return Tokens(ids, mask)

    def encode(self, text: str) -> list[int]:
        """All token ids of ``text``, end of sequence included, neither cut nor padded."""
        if self._json is not None:
            clean = _SURROGATE.sub("\ufffd", text)
            return [*self._json.encode(clean, add_special_tokens=False).ids, EOS]
        return [*self._model.encode(_SURROGATE.sub("\ufffd", text), out_type=int), EOS]

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
        """The tokens of ``text`` with the places they came from, without the end of sequence.

        The pieces put together are the normalised text, and sentencepiece tells the place in ``text`` of each
        of its characters.
        """
        clean = _SURROGATE.sub("\ufffd", text)
        if self._json is not None:
            found = self._json.encode(clean, add_special_tokens=False)
            return [Piece(token, *place) for token, place in zip(found.ids, found.offsets, strict=True)]
        _, places = self._model.normalize(clean, with_offsets=True)
        out, end = [], 0
        for token, surface in zip(
            self.encode(text)[:-1], self._model.encode(clean, out_type=str), strict=True
        ):
            start, end = end, end + len(surface)
            out.append(Piece(token, places[start], places[end]))
        return out


def open_json(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, which neither cuts nor pads."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingTokenizersError(NEEDS.format(path, install("tokenizers"))) from error
    try:
        found = Tokenizer.from_buffer(read_bounded(path, _MOST_BYTES))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} is not a usable tokenizer.json: {error}") from error
    found.no_padding()
    found.no_truncation()
    return found


class GLMTokenizer:
    """Texts to token ids as CogView4 takes them: padded in *front*, to the longest and a multiple of 16.

    ``path`` is GLM's ``tokenizer.json``, whose special tokens come first; or a T5 ``spiece.model``, whose end
    of sequence comes last, for small models; or the folder that either lies in. ``max_length`` is the largest
    number of tokens, special ones included; a text loses its end beyond. Source: diffusers'
    ``CogView4Pipeline`` with the tokenizer of ``GlmModel`` (tests/parity/test_cogview4_pipeline.py).
    """

    multiple: int | None = 16
    pad: int
    _json: Any

    def __init__(self, path: str | Path, max_length: int) -> None:
        file = Path(path)
        if file.is_dir():
            found = [file / name for name in ("tokenizer.json", "spiece.model") if (file / name).is_file()]
            file = found[0] if found else file / "tokenizer.json"
        self.path, self.max_length = file, max_length
        self._pieces = T5Tokenizer(file, max_length) if file.suffix != ".json" else None
        if self._pieces is not None:
            self._json, self.trained, self.pad = None, self._pieces.trained, PAD
            self._before, self._after = [], [EOS]
        else:
            if not file.is_file():
                raise FileNotFoundError(f"cannot read the tokenizer {file}: no such file")
            self._json = open_json(file)
            self.trained = 1 + max(self._json.get_vocab(with_added_tokens=True).values(), default=-1)
            pads = (self._json.token_to_id(name) for name in ("<|endoftext|>", "<pad>"))
            pad = next((token for token in pads if token is not None), None)
            if pad is None:
                raise ValueError(f"{file} has neither <|endoftext|> nor <pad>: it is not a GLM vocabulary")
            self.pad = pad
            self._before, self._after = self._json.encode("").ids, []
        if max_length <= len(self._before) + len(self._after):
            raise ValueError(f"max_length is {max_length}; special tokens alone take {len(self.encode(''))}")

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Ids (B, T) of ``texts``, the padding in front."""
        if isinstance(texts, str):
            raise TypeError(f"expected a sequence of texts, got the text {texts[:40]!r}; wrap it in a list")
        most = self._room
        cut = [[*self._before, *self._ids(text)[:most], *self._after] for text in texts]
        assert self.multiple is not None, "of this class"
        length = -(-max(map(len, cut), default=0) // self.multiple) * self.multiple
        ids = torch.full((len(texts), length), self.pad, dtype=torch.int64)  # (B, T)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(cut):
            ids[row, length - len(tokens) :] = torch.tensor(tokens)
            mask[row, length - len(tokens) :] = True
        return Tokens(ids, mask)

    @property
    def _room(self) -> int:
        """Tokens of the text itself that fit."""
        return self.max_length - len(self._before) - len(self._after)

    def _ids(self, text: str) -> list[int]:
        if self._pieces is not None:
            return self._pieces.encode(text)[:-1]
        clean = _SURROGATE.sub("\ufffd", text)
        ids: list[int] = self._json.encode(clean, add_special_tokens=False).ids
        return ids

    def encode(self, text: str) -> list[int]:
        """All token ids of ``text`` with the special ones, neither cut nor padded."""
        return [*self._before, *self._ids(text), *self._after]

    def truncation(self, text: str) -> str | None:
        """The end of ``text`` that does not fit into ``max_length`` tokens, None if all of it does."""
        if self._pieces is not None:
            return self._pieces.truncation(text)
        clean = _SURROGATE.sub("\ufffd", text)
        places = self._json.encode(clean, add_special_tokens=False).offsets[self._room :]
        return text[places[0][0] :].strip() if places else None

    def unknown_share(self, text: str) -> float:
        """Share of the characters of ``text`` that became the unknown token; GLM's bytes know them all."""
        return 0.0 if self._pieces is None else self._pieces.unknown_share(text)
