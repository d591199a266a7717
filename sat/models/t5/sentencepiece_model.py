"""A sentencepiece model file taken apart, so that normalisation and segmentation can run separately.

The file is a protocol-buffer message (``sentencepiece_model.proto``). Only four of its fields matter here, so
it is read with the few lines the wire format needs instead of a protobuf dependency.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_PIECE, _TRAINER, _NORMALIZER, _SELF_TEST = 1, 2, 3, 4  # fields of ModelProto
_TEXT, _SCORE, _KIND = 1, 2, 3  # fields of SentencePiece
_MODEL_TYPE, _CHARSMAP = 3, 2  # fields of TrainerSpec, NormalizerSpec
_NORMAL, _UNKNOWN = 1, 2  # values of SentencePiece.type
_UNIGRAM = 1  # value of TrainerSpec.model_type, and its default
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class SentencePieceModel(NamedTuple):
    """What a tokenizer needs of a unigram model file."""

    pieces: tuple[str, ...]  # piece of each id, added ones included
    segmenter: bytes  # the same model without normalisation, every piece but the unknown one plain text
    charsmap: bytes  # compiled normalisation table, empty if the model normalises nothing


def read_model(path: Path, added: Iterable[str]) -> SentencePieceModel:
    """The unigram model in ``path`` with the pieces ``added`` behind its own.

    The segmenter treats control pieces and the added ones as plain text of score 0, as the ``tokenizers``
    library does: what *normalises to* a special token (full-width brackets) becomes that token in both.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(
            f"cannot read the sentencepiece model {path}: {error.strerror or error}"
        ) from error
    try:
        return _take_apart(data, tuple(added))
    except (ValueError, IndexError, struct.error) as error:
        raise ValueError(f"{path} is not a usable sentencepiece unigram model: {error}") from error


def _take_apart(data: bytes, added: tuple[str, ...]) -> SentencePieceModel:
    pieces: list[str] = []
    kept: list[bytes] = []
    charsmap = b""
    seen = set()
    for number, wire, value in _fields(data):
        seen.add(number)
        if wire != _BYTES:
            raise ValueError(f"unexpected wire type {wire} of field {number}")
        if number == _PIECE:
            text, encoded = _as_plain(value)
            pieces.append(text)
            kept.append(_field(_PIECE, encoded))
        elif number == _TRAINER:
            model_type = next((v for n, _, v in _fields(value) if n == _MODEL_TYPE), _varint(_UNIGRAM))
            if _number(model_type, 0)[0] != _UNIGRAM:
                raise ValueError("its pieces were not trained with model_type=unigram")
            kept.append(_field(_TRAINER, value))
        elif number == _NORMALIZER:
            charsmap = next((v for n, _, v in _fields(value) if n == _CHARSMAP), b"")
        elif number != _SELF_TEST:  # the self-test would fail without the normalisation
            kept.append(_field(number, value))
    if not seen >= {_PIECE, _TRAINER, _NORMALIZER}:
        raise ValueError(
            "its pieces, training settings or normalisation are missing: cut off, or another file"
        )
    kept += [_field(_PIECE, _field(_TEXT, text.encode()) + _score(0.0)) for text in added]
    bare = bytes([3 << 3, 0, 4 << 3, 0, 5 << 3, 1])  # no dummy prefix, spaces kept, spaces escaped
    return SentencePieceModel((*pieces, *added), b"".join(kept) + _field(_NORMALIZER, bare), charsmap)


def _as_plain(message: bytes) -> tuple[str, bytes]:
    """Text of one piece, and the piece made plain text unless it is the unknown piece."""
    text, kind, rest = "", _NORMAL, b""
    for number, wire, value in _fields(message):
        if number == _TEXT:
            text = value.decode()
        if number == _KIND:
            kind = _number(value, 0)[0]
        elif number in (_TEXT, _SCORE):
            rest += _field(number, value) if wire == _BYTES else bytes([number << 3 | wire]) + value
    return text, rest + bytes([_KIND << 3, _UNKNOWN if kind == _UNKNOWN else _NORMAL])


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(field number, wire type, raw value) of each field of a message, in file order."""
    at = 0
    while at < len(message):
        key, at = _number(message, at)
        wire = key & 7
        if wire == _VARINT:
            end = _number(message, at)[1]
        elif wire == _BYTES:
            size, at = _number(message, at)
            end = at + size
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if end > len(message):
            raise ValueError(f"it ends at byte {len(message)}, inside a field that runs to byte {end}")
        yield key >> 3, wire, message[at:end]
        at = end


def _number(data: bytes, at: int) -> tuple[int, int]:
    """The base-128 number at byte ``at`` and the byte after it."""
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError(f"it ends at byte {len(data)}, inside a number")
        value |= (data[at] & 127) << shift
        at += 1
        if not data[at - 1] & 128:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _score(value: float) -> bytes:
    return bytes([_SCORE << 3 | _FIXED32]) + struct.pack("<f", value)
