"""Training of a small sentencepiece vocabulary that T5 tokenizers read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sat.data.records import HELD_OUT
from sat.data.sources import read_source

log = logging.getLogger(__name__)


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
