"""The small vocabulary: T5's special ids, case folded, nothing in plain English unknown."""

import shutil

import pytest
import sentencepiece

from sat.cli import prepare
from sat.data.sources import captions_of

SAMPLE = ["data/emoji_sample", "data/emoji_sample_3d"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, repository):
    out = tmp_path_factory.mktemp("tokenizer") / "spiece.model"
    folders = [str(repository / folder) for folder in SAMPLE]
    assert prepare.main(["tokenizer", "--captions", *folders, "--vocab", "300", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["spiece.model"]
    return out


@pytest.fixture(scope="module")
def repository(request):
    return request.config.rootpath


def test_special_ids_are_those_of_t5(model):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert (pieces.pad_id(), pieces.eos_id(), pieces.unk_id(), pieces.bos_id()) == (0, 1, 2, -1)
    assert [pieces.id_to_piece(number) for number in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert pieces.vocab_size() <= 300


def test_case_is_folded_and_ascii_is_never_unknown(model):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert pieces.encode("A Red APPLE") == pieces.encode("a red apple")
    assert 2 not in pieces.encode("".join(map(chr, range(0x20, 0x7F))))
    assert pieces.decode(pieces.encode("a red apple, noto style")) == "a red apple, noto style"


@pytest.mark.parity
def test_transformers_reads_it_with_the_same_ids(model, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copy(model, tmp_path / "spiece.model")
    peer = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in ("a red apple", "A Lion, 3D style", " two  spaces ", "ｆｕｌｌ", "日本", "{}~|"):
        assert peer(text).input_ids == [*pieces.encode(text), 1]


def test_held_out_captions_are_read_too(repository):
    found = set(captions_of([repository / SAMPLE[0]]))
    assert "red apple, twemoji style" in found


def test_a_folder_without_captions_is_an_error(tmp_path, capsys):
    assert prepare.main(["tokenizer", "--captions", str(tmp_path), "--out", str(tmp_path / "m")]) == 2
    assert "no captions to train a vocabulary on" in capsys.readouterr().err
