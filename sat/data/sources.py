"""Data sources by path, and the training of a vocabulary on their captions."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from sat.data.formats import (
    LONGEST_TEXT,
    NO_COLUMNS,
    TEXTS,
    Columns,
    Item,
    Keys,
    Row,
    beside_captions,
    expand,
    file_captions,
    lists_addresses,
    read_csv,
    read_jsonl,
    read_parquet,
    read_prompts,
    read_shard,
)
from sat.data.records import (
    CAPTION_KEYS,
    HELD_OUT,
    IMAGE_SUFFIXES,
    NO_EXTRAS,
    TABLE,
    BadRecord,
    DataError,
    DataPathError,
    ExtraRule,
    FieldError,
    PictureFile,
    Record,
    RecordSet,
    check_bad_share,
    note,
)
from sat.util.host import check_regular, read_bounded

TABLES = (TABLE, "metadata.csv", "metadata.tsv")
_SHARDS = (".tar", ".parquet")
_CAPTIONS = (*TEXTS, "json")  # endings beside pictures; the first there is counts
_READERS: Mapping[str, Callable[[Path, Keys, Columns], Iterator[Item]]] = {
    ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_csv, ".tar": read_shard, ".parquet": read_parquet,
}  # fmt: skip
_UNREAD = frozenset(  # pictures of formats that are not read
    {".heic", ".heif", ".jxl", ".psd", ".tga", ".exr", ".hdr", ".qoi", ".ppm", ".pgm", ".pnm"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".raw"}
)
_ARCHIVES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar")
_PACKED = dict.fromkeys(_ARCHIVES, "is packed; unpack it") | {
    ".arrow": "is of save_to_disk; write parquet instead (Dataset.to_parquet)"
}
_CLUTTER = frozenset({"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"})
_SPLIT = re.compile(r"(?:^|/)(train|test|valid|val|validation|dev|eval)(?=[-_./]|$)")
log = logging.getLogger(__name__)
_KNOWN = "a folder, a .jsonl, .csv, .tsv, .tar or .parquet file"
PROMPTS = ".txt"
"""Ending of a list of prompts without pictures."""


class Source(NamedTuple):
    """One data source. ``repeats``: copies of it in an epoch; ``weight``: its share of the stream instead.

    ``caption``: the name of the captions in its rows, if it is none of the usual ones, or several names with
    the weights that their captions are drawn by. ``extras``: places of
    further pictures by name. ``loss_weight``: factor of its pictures' losses.
    """

    path: Path
    repeats: int = 1
    weight: float | None = None
    caption: str | Mapping[str, float] | None = None
    extras: Mapping[str, ExtraRule] = NO_EXTRAS
    loss_weight: float = 1.0


def read_sources(sources: Sequence[Source | tuple[Path, int]], max_bad_share: float = 0.05) -> RecordSet:
    """The records of all ``sources``; raises if one has none or too many bad ones."""
    if not sources:
        raise DataError("no data sources (data.sources)")
    records: list[Record] = []
    bad: list[BadRecord] = []
    notes: list[str] = []
    shares: list[tuple[int, float]] = []
    for source in (Source(*one) for one in sources):
        found = read_source(source.path, source.caption, source.extras)
        check_bad_share(found.bad, len(found) + len(found.bad), max_bad_share, str(source.path))
        if not found.records:
            raise DataPathError(
                f"{source.path}: no pairs of image and caption; expected {' or '.join(TABLES)} with "
                "file_name and text, .tar or .parquet shards, or images with .txt files of the same name"
                + "".join(f"; {one}" for one in (*found.bad[:2], *found.notes[:2]))
            )
        own = found.records
        if source.loss_weight != 1:
            own = tuple(replace(record, loss_weight=source.loss_weight) for record in own)
        records += own * source.repeats
        bad += found.bad
        notes += found.notes
        if source.weight is not None:
            shares.append((len(found.records) * source.repeats, source.weight))
    if shares and len(shares) < len(sources):
        raise DataError("data.sources: either every source has a weight or none has")
    return RecordSet(tuple(records), tuple(bad), tuple(shares), tuple(notes))


def read_source(
    path: Path, caption: str | Mapping[str, float] | None = None, extras: Mapping[str, ExtraRule] = NO_EXTRAS
) -> RecordSet:
    """The records of one folder, table, shard, or range of shards ``name-{000..012}.tar``.

    A folder with ``metadata.jsonl``, ``.csv`` or ``.tsv`` is read through it alone; else one with ``.tar`` or
    ``.parquet`` files through these, in order of their names; else every image in it with a ``.txt`` file
    of the same name counts, and the folders in it are read likewise, in order of their paths. A ``.txt`` file
    is a list of prompts without pictures, for objectives that look at none. ``caption`` names the captions in
    rows; ``extras`` are places of further pictures by their names, such as ``mask``.
    """
    keys: Keys = CAPTION_KEYS if caption is None else (caption,) if isinstance(caption, str) else caption
    columns = {name: rule.column for name, rule in extras.items() if rule.column is not None}
    if path.is_dir():
        beside = [rule.folder for rule in extras.values() if rule.folder is not None]
        return _read(_folder(path, keys, columns, beside), path, extras)
    files = expand(path)
    for file in files:
        try:
            check_regular(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            reason = "no such folder or file" if isinstance(error, FileNotFoundError) else reason
            raise DataPathError(f"{file}: {reason}; expected {_KNOWN} (data.sources)") from error
        if file.suffix.lower() == PROMPTS:
            continue
        if file.suffix.lower() not in _READERS:
            reason = _PACKED.get(file.suffix.lower(), f"expected {_KNOWN}")
            raise DataPathError(f"{file}: {reason} (data.sources)")
    return _read((item for file in files for item in _rows(file, keys, columns)), path.parent, extras)


def _rows(file: Path, keys: Keys, columns: Columns) -> Iterator[Item]:
    """The items of a table or shard, or a note that there are none."""
    empty = True
    prompts = file.suffix.lower() == PROMPTS
    for item in read_prompts(file) if prompts else _READERS[file.suffix.lower()](file, keys, columns):
        empty = False
        yield item
    if empty:
        yield f"{file}: is empty"


def _read(items: Iterator[Item], source: Path, extras: Mapping[str, ExtraRule]) -> RecordSet:
    records: list[Record] = []
    bad: list[BadRecord] = []
    notes: list[str] = []
    for item in items:
        if isinstance(item, BadRecord):
            bad.append(item)
        elif isinstance(item, str):
            notes.append(item)
        else:
            records.append(replace(item, source=source))
    for name, rule in extras.items():
        records = _with_extra(records, name, rule, source, bad, notes)
    often = [name for name, count in Counter(record.name for record in records).items() if count > 1]
    notes += note("pictures that several rows name", often)
    return RecordSet(tuple(records), tuple(bad), notes=tuple(notes))


def _with_extra(  # noqa: C901, PLR0913 - three places, and what is said of them
    records: Sequence[Record],
    name: str,
    rule: ExtraRule,
    source: Path,
    bad: list[BadRecord],
    notes: list[str],
) -> list[Record]:
    """``records`` with their picture ``name``; those without it are skipped if it is required, else noted."""
    beside: dict[str, Path] = {}
    if rule.folder is not None:
        if not rule.folder.is_dir():
            raise DataPathError(f"{rule.folder}: no such folder of pictures (data.sources, {name})")
        for file in reversed(files_below(rule.folder)):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                beside[os.path.splitext(file.relative_to(rule.folder))[0]] = file
    out, without = list[Record](), list[str]()
    for record in records:
        found = record.extras.get(name)
        if rule.alpha:
            found = PictureFile(record.path, inside=record.inside)
        elif rule.folder is not None and not isinstance(record.inside, Row):
            place = os.path.relpath(record.path, source) if record.inside is None else str(record.inside)
            if (root := os.path.splitext(place)[0]) in beside:
                found = PictureFile(beside[root], source=rule.folder)
        if found is not None:
            found = found if found.source is not None else replace(found, source=source)
            out.append(replace(record, extras={**record.extras, name: found}))
            continue
        without.append(record.name)
        if rule.required:
            bad.append(BadRecord(record.name, f"no picture {name}", "picture"))
        else:
            out.append(record)
    if without and len(without) == len(records):
        ending = f"{rule.column or name}.png"
        where = f"in {rule.folder}" if rule.folder is not None else f"under {rule.column!r}"
        raise DataPathError(
            f"{source}: no picture has a {name} {where}; expected a column of tables, a member 0001.{ending} "
            f"of shards, fox.{ending} beside fox.jpg, or a folder of pictures of the same paths and names "
            f"(data.sources, {name})"
        )
    if not rule.required:
        notes += note(f"pictures without a {name}, which count as a whole", without)
    return out


@dataclass
class _Tree:
    """The files of the folders from one on, and what is not looked at."""

    files: dict[Path, list[Path]] = field(default_factory=dict)
    bad: list[BadRecord] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)  # other ways to a folder that is there
    beside: list[Path] = field(default_factory=list)  # folders where shards stand for theirs
    addresses: list[Path] = field(default_factory=list)


def files_below(top: Path) -> list[Path]:
    """Regular files below ``top`` in order of their paths, hidden ones left out, each folder once."""
    return sorted(itertools.chain.from_iterable(_walk(top, everything=True).files.values()))


def _walk(top: Path, *, everything: bool = False) -> _Tree:  # noqa: C901 - what can lie in a folder
    """The files below ``top``; but a table or shards stand for a folder, unless ``everything``.

    Links to folders are followed after all others, each folder once, and none to a folder that holds ``top``.
    """
    tree, seen = _Tree(), set[tuple[int, int]]()
    waiting, linked, real = [top], list[Path](), os.path.realpath(top)
    while waiting or linked:
        folder, link = (waiting.pop(), False) if waiting else (linked.pop(0), True)
        try:
            stat = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            tree.bad.append(BadRecord(str(folder), error.strerror or str(error)))
            continue
        above = link and os.path.commonpath([real, target := os.path.realpath(folder)]) == target
        if above or (stat.st_dev, stat.st_ino) in seen:
            tree.again.append(folder)
            continue
        seen.add((stat.st_dev, stat.st_ino))
        files, below, hidden, odd = list[Path](), list[Path](), list[Path](), list[BadRecord]()
        for entry in entries:
            path = folder / entry.name
            found = path if entry.is_symlink() else entry  # which is faster, and fails on loops
            if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
                hidden.append(path)
            elif re.search("[\ud800-\udfff]", entry.name):
                odd.append(BadRecord(str(path), "its name is not in UTF-8"))
            elif found.is_dir():
                below.append(path)
            elif found.is_file():
                files.append(path)
            else:
                what = "no regular file" if path.exists() else "a link to nothing"
                odd.append(BadRecord(str(path), what, "picture"))
        names = {entry.name for entry in entries}
        lists = {one for one in files if {one.stem, f"{one.stem}.tar"} & names and lists_addresses(one)}
        tree.addresses += sorted(lists)
        tree.files[folder] = files = [one for one in files if one not in lists]
        if not everything and any(one.name in TABLES for one in files):
            continue
        tree.hidden += hidden
        tree.bad += odd
        if not everything and any(one.suffix.lower() in _SHARDS for one in files):
            tree.beside += below
            continue
        for path in below:
            (linked if path.is_symlink() else waiting).append(path)
    return tree


def _folder(
    top: Path, keys: Keys, columns: Columns = NO_COLUMNS, beside: Sequence[Path] = ()
) -> Iterator[Item]:
    """One record or complaint for each row, member or image below ``top``, and notes on the rest.

    The folders ``beside`` hold further pictures.
    """
    tree, others = _walk(top), [os.path.realpath(folder) for folder in beside]
    if others:
        own = {
            folder: files
            for folder, files in tree.files.items()
            if not any(Path(os.path.realpath(folder)).is_relative_to(other) for other in others)
        }
        tree.files = own
    read, plain = list[Path](), list[Path]()
    yield from tree.bad
    for folder, files in sorted(tree.files.items()):
        tables = [folder / name for name in TABLES if folder / name in files]
        if len(tables) > 1:
            names = " and ".join(table.name for table in tables)
            raise DataPathError(f"{folder}: holds {names}; name the one to read as the source")
        shards = tables or [file for file in files if file.suffix.lower() in _SHARDS]
        for file in shards:
            yield from _rows(file, keys, columns)
        read += shards
        if tables:
            continue
        packed = [
            file
            for file in files
            if file.suffix.lower() in _PACKED
            and {".tar", ".tgz", ".arrow"} & {*map(str.lower, file.suffixes)}
        ]
        for file in packed:
            yield BadRecord(str(file), _PACKED[file.suffix.lower()])
        left = sorted({*files} - {*shards, *packed})
        if shards:
            tree.beside += left
        else:
            plain += left
    yield from _pairs(sorted(plain), keys, columns)
    places = [path.relative_to(top).as_posix() for path in (*read, *{file.parent for file in plain})]
    splits = sorted({match[1] for place in places for match in _SPLIT.finditer(place)})
    if len(splits) > 1:
        yield f"{top}: the splits {', '.join(splits)} are all read; name a file or folder to read it alone"
    yield from note("hidden files and folders left out", tree.hidden)
    yield from note("links to folders that are read anyway or hold this one", tree.again)
    yield from note("files and folders beside shards, which are read alone", tree.beside)
    yield from note("lists of addresses beside their pictures left out", tree.addresses)


def _pairs(  # noqa: C901 - pictures, and what is none
    files: Sequence[Path], keys: Keys, columns: Columns
) -> Iterator[Item]:
    """One record or complaint for each picture of ``files``, and notes on the rest."""
    pictures, others = list[tuple[str, Path]](), list[tuple[str, Path]]()  # by path without ending
    texts: dict[str, dict[str, Path]] = {}  # by path without ending, then by ending
    for file in files:
        root, suffix = os.path.splitext(file)
        ending = suffix.lower().removeprefix(".")
        if ending in _CAPTIONS:
            texts.setdefault(root, {}).setdefault(ending, file)
        else:
            (pictures if suffix.lower() in IMAGE_SUFFIXES else others).append((root, file))
    extras, pictures = _beside(pictures, columns)
    shared = Counter(root for root, _ in pictures)
    for root, picture in pictures:
        found = texts.get(root, {})
        if isinstance(keys, Mapping):
            found = dict(found) | {
                f"{key}.{end}": file for key in keys for end, file in texts.pop(f"{root}.{key}", {}).items()
            }
        ending = next((one for one in (*_CAPTIONS, *found) if one in found), "")
        if not ending:
            yield BadRecord(str(picture), f"no caption file {picture.stem}.txt", "caption")
            continue
        try:
            if isinstance(keys, Mapping):
                read = {end: read_bounded(file, LONGEST_TEXT) for end, file in found.items()}
                captions = beside_captions(read, keys)
            else:
                captions = file_captions(ending, read_bounded(found[ending], LONGEST_TEXT), keys)
        except (OSError, FieldError) as error:
            yield BadRecord(str(found[ending]), str(getattr(error, "strerror", None) or error), "caption")
        else:
            yield Record(picture, captions.texts, captions.weights, extras=extras.get(root, {}))
    alone = {root: found for root, found in texts.items() if root not in shared}
    captioned = {root for root, found in alone.items() if found.keys() - {"json"}}
    left, tables, packed = list[Path](), list[Path](), list[Path]()
    for root, file in others:
        suffix = file.suffix.lower()
        if suffix in _UNREAD or root in captioned:
            alone.pop(root, None)
            yield BadRecord(str(file), f"pictures of the format {file.suffix} are not read", "picture")
        else:
            named = suffix in _READERS and file.name != HELD_OUT
            (packed if suffix in _PACKED else tables if named else left).append(file)
    orphans = [file for found in alone.values() for file in found.values()]
    twins = [picture for root, picture in pictures if shared[root] > 1]
    several = [root for root in shared if len(texts.get(root, {})) > 1]
    yield from note("caption or .json files without a picture", orphans)
    yield from note("pictures that share a caption file", twins)
    yield from note(
        f"pictures with several caption files, read in the order .{', .'.join(_CAPTIONS)}", several
    )
    yield from note("tables that are not read; name one as the source", tables)
    yield from note("packed files that are not read; unpack them", packed)
    yield from note("other files left out", left)


def _beside(
    pictures: Sequence[tuple[str, Path]], columns: Columns
) -> tuple[dict[str, dict[str, PictureFile]], list[tuple[str, Path]]]:
    """Further pictures (``fox.mask.png``) by the path of theirs without ending, and all that are none."""
    roots, extras, left = {root for root, _ in pictures}, dict[str, dict[str, PictureFile]](), []
    for root, picture in pictures:
        for name, column in columns.items():
            base = root[: -len(column) - 1]
            if base in roots and root[len(base) :] in (f".{column}", f"-{column}", f"_{column}"):
                extras.setdefault(base, {})[name] = PictureFile(picture)
                break
        else:
            left.append((root, picture))
    return extras, left


# -- training of a small sentencepiece vocabulary that T5 tokenizers read


def captions_of(folders: Sequence[Path]) -> Iterator[str]:
    """All captions of data folders (see :mod:`sat.data.records`), those of their ``heldout.jsonl`` too."""
    for folder in folders:
        sources = [folder, *(path for path in (folder / HELD_OUT,) if path.is_file())]
        sets = [read_source(path) for path in sources]
        if not any(found.records for found in sets):
            raise DataPathError(f"{folder}: no captions to train a vocabulary on")
        for found in sets:
            for line in found.told():
                log.warning("%s", line)
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
        raise DataPathError("no captions to train a vocabulary on")
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
