"""Checkpoints: formats, key rules, strict streaming loading and atomic writing.

The walk-through is docs/checkpoints.md.
"""

from sat.checkpoint.format import DTYPES, PARTS, CheckpointError, InMemory, LazyStateDict, Part, TensorInfo
from sat.checkpoint.formats import detect, digest, find_part, find_tokenizer, open_part
from sat.checkpoint.load import LoadReport, load, match
from sat.checkpoint.save import WRITERS, Options, save_diffusers, save_native, save_sat

__all__ = [
    "DTYPES",
    "PARTS",
    "WRITERS",
    "CheckpointError",
    "InMemory",
    "LazyStateDict",
    "LoadReport",
    "Options",
    "Part",
    "TensorInfo",
    "detect",
    "digest",
    "find_part",
    "find_tokenizer",
    "load",
    "match",
    "open_part",
    "save_diffusers",
    "save_native",
    "save_sat",
]
