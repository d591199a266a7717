"""Prompts: files, numbers, shares."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sat.cli.commands.sample import _wanted
from sat.config.load import load
from sat.config.schema.base import parse_share
from sat.config.yaml_source import ConfigError
from sat.sampling.inputs import LatentsError, read_latents
from sat.sampling.prompts import Prompt, PromptError, checked_prompts, read_prompt_file


def _file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    return path


def test_one_prompt_a_line_without_blank_lines_and_outer_spaces(tmp_path) -> None:
    path = _file(tmp_path, b"a red apple\n\n  a dog \r\n\t\nthe end")
    assert read_prompt_file(path) == ["a red apple", "a dog", "the end"]


def test_a_byte_order_mark_is_not_part_of_the_prompt(tmp_path) -> None:
    assert read_prompt_file(_file(tmp_path, b"\xef\xbb\xbfcaf\xc3\xa9\n")) == ["café"]


def test_unicode_separators_do_not_cut_a_prompt(tmp_path) -> None:
    text = "a\u2028b\x0cc\x85d"
    assert read_prompt_file(_file(tmp_path, text.encode())) == [text]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no prompt: expected one per line"),
        (b" \n\n\t", "holds no prompt"),
        (b"fine\ncaf\xe9\n", r"line 2: byte 0xe9 is not UTF-8; save it as UTF-8"),
        (b"\xff\xfea\0", r"line 1: byte 0xff is not UTF-8"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, data: bytes, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        read_prompt_file(_file(tmp_path, data))


def test_a_missing_file_and_a_folder_are_refused(tmp_path) -> None:
    with pytest.raises(PromptError, match="gone.txt does not exist"):
        read_prompt_file(tmp_path / "gone.txt")
    with pytest.raises(PromptError, match="cannot be read: Is a directory"):
        read_prompt_file(tmp_path)


def test_an_argument_in_another_encoding_is_refused() -> None:
    with pytest.raises(PromptError, match=r"prompt 1 is not valid UTF-8 at character 3 \('\\udce9'\)"):
        checked_prompts(["fine", "caf\udce9"])


def test_shares_take_every_prompt_exactly_once_by_its_place() -> None:
    prompts, experiment = checked_prompts("abcdefg"), load(["configs/tiny.yaml"])
    shares = [
        _wanted(replace(experiment, sampling=replace(experiment.sampling, share=text)), prompts)
        for text in ("0/3", "1/3", "2/3")
    ]
    assert shares[1] == [Prompt(1, "b"), Prompt(4, "e")]
    assert sorted((p for s in shares for p in s), key=lambda p: p.index) == prompts
    assert _wanted(experiment, prompts) == prompts


@pytest.mark.parametrize("text", ["", "3/3", "-1/3", "1", "1/", "0/0", "1/2/3", "a/b", " 1/2", "\u0661/2"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected K/N with K from 0 to N - 1"):
        parse_share(text)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name, kind in (("fifo", "a FIFO"), ("link", "a device")):
        with pytest.raises(PromptError, match=f"is {kind}, expected a regular file"):
            read_prompt_file(tmp_path / name)
        with pytest.raises(ConfigError, match=f"is {kind}, expected a regular file"):
            load([tmp_path / name])
        (tmp_path / name).rename(tmp_path / f"{name}.pt")
        with pytest.raises(LatentsError, match=f"is {kind}, expected a regular file"):
            read_latents(tmp_path / f"{name}.pt")


def test_a_file_that_is_no_prompt_file_is_not_read(tmp_path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(PromptError, match="has 67108865 bytes, more than 67108864"):
        read_prompt_file(tmp_path / "large")


def test_a_nul_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt 1 holds a NUL at character 1"):
        checked_prompts(["a", "b\0c"])
