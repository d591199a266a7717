"""What holds for every prompt: ids, offsets, and what of a caption reaches the encoder."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.mixins.text_encoder import buckets_of
from sat.tokenizers import T5Tokenizer
from tests.vocabulary import write_vocabulary

TEXT = st.text(max_size=60) | st.text("a red apple,\n\t</s>é中😀", max_size=60)
LENGTH = 7


@functools.cache
def tokenizer() -> T5Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return T5Tokenizer(write_vocabulary(Path(folder)), LENGTH)


@given(TEXT)
def test_a_row_is_the_ids_cut_ended_and_padded(text):
    ids, (row,), (mask,) = tokenizer().encode(text), *tokenizer()([text])
    kept = int(mask.sum())
    assert row.tolist() == [*ids[: LENGTH - 1], 1][: len(ids)] + [0] * (LENGTH - kept)
    assert kept == min(len(ids), LENGTH)


@given(TEXT, st.sampled_from([" ", "\n", "\t ", "\u3000", "  \r\n "]))
def test_space_around_a_text_says_nothing(text, space):
    assert tokenizer().encode(space + text + space) == tokenizer().encode(text)


@given(st.lists(st.text("abcde", min_size=1, max_size=8), max_size=6))
def test_words_are_encoded_one_by_one(words):
    apart = [token for word in words for token in tokenizer().encode(word)[:-1]]
    assert tokenizer().encode(" ".join(words)) == [*apart, 1]


@given(TEXT)
def test_a_text_cut_where_truncation_says_fits(text):
    dropped = tokenizer().truncation(text)
    if dropped is not None and text.count(dropped) == 1:
        kept = text[: text.index(dropped)]
        assert tokenizer().truncation(kept) is None
        assert text.strip() == (kept + dropped).strip()


@given(TEXT)
def test_unknown_share_is_a_share(text):
    share = tokenizer().unknown_share(text)
    assert 0 <= share <= 1
    assert share == 0 or 2 in tokenizer().encode(text)


@given(st.sampled_from([4, 8, 12, 32]), st.integers(9, 300), st.integers(0, 2000))
def test_buckets_grow_with_distance_and_tell_the_sides_apart(buckets, max_distance, distance):
    ahead = buckets_of(torch.arange(distance + 2), buckets, max_distance)
    behind = buckets_of(-torch.arange(distance + 2), buckets, max_distance)
    assert (behind.diff() >= 0).all()
    assert behind.min() == 0
    assert behind.max() < buckets // 2
    assert ahead[1:].equal(behind[1:] + buckets // 2)
