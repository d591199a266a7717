"""The tokenizer's own promises: lengths, what was dropped, what is unknown, and its messages."""

from __future__ import annotations

import shutil

import pytest
import sentencepiece

from sat.tokenizers import T5Tokenizer
from tests.vocabulary import odd_strings, write_vocabulary


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def tokenizer(path):
    return T5Tokenizer(path, 6)


def test_a_batch_is_padded_with_0_and_ends_with_1(tokenizer):
    tokens = tokenizer(["a red apple", "", "a red apple on the mountain under the sky"])
    a, red, apple = tokenizer.encode("a red apple")[:3]
    assert tokens.ids[0].tolist() == [a, red, apple, 1, 0, 0]
    assert tokens.ids[1].tolist() == [1, 0, 0, 0, 0, 0]
    assert tokens.ids[2, -1] == 1
    assert tokens.mask.sum(1).tolist() == [4, 1, 6]


def test_encode_neither_cuts_nor_pads(tokenizer):
    assert len(tokenizer.encode("a red apple " * 50)) == 151


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("a red apple on the mountain", "mountain"),
        ("a red apple on the", None),
        ("a red  apple on\n the mountain,  under a   sky ", "mountain,  under a   sky"),
        ("A red apple", None),
        ("a red apple on the <extra_id_5> sky", "<extra_id_5> sky"),
        ("a red apple on the ｆｕｌｌ 中文", "ｆｕｌｌ 中文"),
        ("", None),
    ],
)
def test_truncation_is_the_exact_text_that_is_lost(tokenizer, text, dropped):
    assert tokenizer.truncation(text) == dropped


def test_what_is_kept_and_what_is_dropped_make_the_whole(tokenizer):
    for text in odd_strings(400, seed=1):
        dropped = tokenizer.truncation(text)
        if dropped is None:
            assert len(tokenizer.encode(text)) <= 6
        else:
            assert text.strip().endswith(dropped)
            assert len(tokenizer.encode(text)) > 6


def test_pieces_cover_the_text_in_order(tokenizer):
    for text in odd_strings(400, seed=2):
        pieces = tokenizer.pieces(text)
        assert [p.id for p in pieces] == tokenizer.encode(text)[:-1]
        starts = [piece.start for piece in pieces]
        assert starts == sorted(starts)
        assert all(0 <= piece.start <= piece.end <= len(text) for piece in pieces)


@pytest.mark.parametrize(
    ("text", "share"),
    [("a red apple", 0), ("一只狗", 1), ("red 一只狗", 0.5), ("", 0), ("\n", 0), ("<unk>", 0), ("a </s>", 0)],
)
def test_unknown_share_counts_characters(tokenizer, text, share):
    assert tokenizer.unknown_share(text) == share


def test_special_tokens_typed_into_a_text_are_text(tokenizer):
    ids = tokenizer.encode("</s> <pad> <extra_id_0>")
    assert min(ids[:-1]) > 2
    assert max(ids) < tokenizer.trained == tokenizer.vocab_size - 100


def test_lone_surrogates_count_as_unknown_characters(tokenizer):
    assert tokenizer.encode("a \ud800 red") == tokenizer.encode("a \ufffd red")


def test_a_folder_with_spiece_model_will_do(tokenizer, path):
    assert T5Tokenizer(path.parent, 6).encode("a red apple") == tokenizer.encode("a red apple")


def test_one_text_in_place_of_a_list_is_refused(tokenizer):
    with pytest.raises(TypeError, match="sequence of texts, got the text 'a red apple'"):
        tokenizer("a red apple")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="cannot read the sentencepiece model .*none/spiece.model"):
        T5Tokenizer(tmp_path / "none" / "spiece.model", 6)


@pytest.mark.parametrize("size", [0, 1, 17, 100, 2000, -2, -1])
def test_a_truncated_file_is_one_line(path, tmp_path, size):
    cut = tmp_path / "spiece.model"
    cut.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="spiece.model is not a usable sentencepiece model") as raised:
        T5Tokenizer(cut, 6)
    assert "\n" not in str(raised.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    other = tmp_path / "spiece.model"
    other.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n")
    with pytest.raises(ValueError, match="not a usable sentencepiece model"):
        T5Tokenizer(other, 6)


def test_a_vocabulary_without_the_ids_of_t5_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red apple", "abc def ghi"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=24,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="not a T5 vocabulary: ids 0, 1, 2 are \\['<unk>', '<s>', '</s>'\\]"):
        T5Tokenizer(tmp_path, 6)


def test_a_limit_without_room_is_refused(path):
    with pytest.raises(ValueError, match="max_length is 0"):
        T5Tokenizer(path, 0)


def test_the_original_file_is_left_alone(path, tmp_path):
    copy = tmp_path / "spiece.model"
    shutil.copy(path, copy)
    T5Tokenizer(copy, 6).encode("a red apple")
    assert copy.read_bytes() == path.read_bytes()
