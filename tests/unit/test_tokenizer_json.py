"""The vocabulary as transformers 5 writes it, tokenizer.json, gives the ids of spiece.model."""

from __future__ import annotations

import pytest

from sat.tokenizers import T5Tokenizer

PROMPTS = ["a red apple", "A green   car, with the blue ship!", "", "zebra ß 12"]


def test_ids_of_tokenizer_json_equal_those_of_spiece_model(tmp_path):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    transformers.T5Tokenizer.from_pretrained("checkpoints/tiny/tokenizer").save_pretrained(tmp_path)
    ours = T5Tokenizer("checkpoints/tiny/tokenizer", 16)
    json = T5Tokenizer(tmp_path / "tokenizer.json", 16)
    assert json.trained == ours.trained
    for prompt in PROMPTS:
        assert json.encode(prompt) == ours.encode(prompt)
        assert json.truncation(prompt * 9) is None or isinstance(json.truncation(prompt * 9), str)
