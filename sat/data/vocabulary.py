"""Training of a small sentencepiece vocabulary that T5 tokenizers read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

CAPTION_KEYS = ("text", "prompt", "caption")


def captions_of(folders: Sequence[Path]) -> Iterator[str]:
    """All captions in the folders' ``metadata.jsonl`` and ``heldout.jsonl``, or in their ``.txt`` files."""
    for folder in folders:
        tables = [path for name in ("metadata.jsonl", "heldout.jsonl") if (path := folder / name).is_file()]
        if tables:
            for table in tables:
                yield from _captions_of_table(table)
        else:
            texts = sorted(folder.rglob("*.txt"))
            if not texts:
                raise ValueError(f"{folder}: no metadata.jsonl and no .txt files to read captions from")
            yield from (path.read_text("utf-8").strip() for path in texts)


def _captions_of_table(table: Path) -> Iterator[str]:
    for line in table.read_text("utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            found = next((row[key] for key in CAPTION_KEYS if key in row), [])
            yield from [found] if isinstance(found, str) else found


def train_vocabulary(captions: Iterable[str], out: Path, size: int, extra_words: Sequence[str] = ()) -> int:
    """Trains a unigram model of at most ``size`` pieces into ``out``; returns the number of pieces.

    Ids as T5's: 0 padding, 1 end of sequence, 2 unknown, no beginning of sequence. Case is folded ("A Red Apple"
    and "a red apple" are the same) and every printable ASCII character is a piece, so that plain English is
    never unknown. ``extra_words`` are seen as often as the rarest captions (words no caption holds, such as the
    name of a style that is added later).
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
