"""Data sources by path, and the training of a vocabulary on their captions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sat.data.formats import expand, read_csv, read_jsonl, read_parquet, read_shard
from sat.data.records import (
    HELD_OUT,
    IMAGE_SUFFIXES,
    TABLE,
    BadRecord,
    DataError,
    DataPathError,
    Record,
    RecordSet,
    check_bad_share,
)

TABLES = (TABLE, "metadata.csv")
_READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".tar": read_shard, ".parquet": read_parquet}
log = logging.getLogger(__name__)
_KNOWN = "a folder, a .jsonl, .csv, .tar or .parquet file"


class Source(NamedTuple):
    """One data source. ``repeats``: copies of it in an epoch; ``weight``: its share of the stream instead."""

    path: Path
    repeats: int = 1
    weight: float | None = None


def read_sources(sources: Sequence[Source | tuple[Path, int]], max_bad_share: float = 0.05) -> RecordSet:
    """The records of all ``sources``; raises if one has none or too many bad ones."""
    if not sources:
        raise DataError("no data sources (data.sources)")
    records: list[Record] = []
    bad: list[BadRecord] = []
    shares: list[tuple[int, float]] = []
    for source in (Source(*one) for one in sources):
        found = read_source(source.path)
        check_bad_share(found.bad, len(found) + len(found.bad), max_bad_share, str(source.path))
        if not found.records:
            raise DataError(
                f"{source.path}: no pairs of image and caption; expected {' or '.join(TABLES)} with "
                "file_name and text, .tar or .parquet shards, or images with .txt files of the same name"
            )
        records += found.records * source.repeats
        bad += found.bad
        if source.weight is not None:
            shares.append((len(found.records) * source.repeats, source.weight))
    if shares and len(shares) < len(sources):
        raise DataError("data.sources: either every source has a weight or none has")
    return RecordSet(tuple(records), tuple(bad), tuple(shares))


def read_source(path: Path) -> RecordSet:
    """The records of one folder, table, shard, or range of shards ``name-{000..012}.tar``.

    A folder with ``metadata.jsonl`` or ``metadata.csv`` is read through it alone; else one with ``.tar`` or
    ``.parquet`` files through these, in order of their names; else every image below it with a ``.txt`` file
    of the same name counts, in order of their paths.
    """
    if path.is_dir():
        return _read(_folder(path), path)
    files = expand(path)
    for file in files:
        if not file.is_file():
            raise DataPathError(f"{file}: no such folder or file; expected {_KNOWN} (data.sources)")
        if file.suffix.lower() not in _READERS:
            raise DataError(f"{file}: expected {_KNOWN} (data.sources)")
    return _read((item for file in files for item in _READERS[file.suffix.lower()](file)), path.parent)


def _read(items: Iterator[Record | BadRecord], source: Path) -> RecordSet:
    records: list[Record] = []
    bad: list[BadRecord] = []
    for item in items:
        if isinstance(item, BadRecord):
            bad.append(item)
        else:
            records.append(replace(item, source=source))
    return RecordSet(tuple(records), tuple(bad))


def _folder(folder: Path) -> Iterator[Record | BadRecord]:
    """One record or complaint for each row, member or image of ``folder``."""
    tables = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder}: holds {' and '.join(TABLES)}; name the one to read as the source")
    for table in tables:
        yield from _READERS[table.suffix](table)
    if tables:
        return
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".tar", ".parquet"))
    for file in files:
        yield from _READERS[file.suffix.lower()](file)
    if files:
        return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        text = path.with_suffix(".txt")
        try:
            caption = " ".join(text.read_text("utf-8").split())
        except FileNotFoundError:
            yield BadRecord(str(path), f"no caption file {text.name}", "caption")
            continue
        except (OSError, ValueError) as error:
            yield BadRecord(str(text), str(error), "caption")
            continue
        yield Record(path, (caption,)) if caption else BadRecord(str(text), "empty caption", "caption")


# -- training of a small sentencepiece vocabulary that T5 tokenizers read


def captions_of(folders: Sequence[Path]) -> Iterator[str]:
    """All captions of data folders (see :mod:`sat.data.records`), those of their ``heldout.jsonl`` too."""
    for folder in folders:
        sources = [folder, *(path for path in (folder / HELD_OUT,) if path.is_file())]
        for found in map(read_source, sources):
            for bad in found.bad:
                log.warning("skipped %s", bad)
            for record in found.records:
                yield from record.captions


def train_vocabulary(captions: Iterable[str], out: Path, size: int, extra_words: Sequence[str] = ()) -> int:
    """Trains a unigram model of at most ``size`` pieces into ``out``; returns the number of pieces.

    Ids as T5's: 0 padding, 1 end of sequence, 2 unknown, no beginning of sequence. Case is folded ("A Red
    Apple" and "a red apple" are the same) and every printable ASCII character is a piece, so that plain
    English is never unknown. ``extra_words`` are seen once each: words no caption holds, such as the name of
    a style that is added later.
    """
    import sentencepiece

    lines = [caption for caption in captions if caption]
    if not lines:
        raise ValueError("no captions to train a vocabulary on")
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = out.with_suffix("")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *extra_words]),
        model_prefix=str(prefix),
        model_type="unigram",
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars="".join(chr(code) for code in range(0x21, 0x7F)),
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        num_threads=1,
        minloglevel=2,
    )
    prefix.with_suffix(".model").replace(out)
    prefix.with_suffix(".vocab").unlink(missing_ok=True)
    model = sentencepiece.SentencePieceProcessor(model_file=str(out))
    return int(model.vocab_size())
