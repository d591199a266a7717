"""Weight files and folders of shards, opened by their content; folders written whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from uuid import uuid4

from sat.checkpoint.format import CheckpointError, Joined, LazyStateDict, SafetensorsFile, listing
from sat.checkpoint.torch_file import TorchFile
from sat.checkpoint.verify import CheckpointPathError, Verify, check_file, read_json
from sat.util import host

SAFETENSORS = (".safetensors",)
TORCH = (".pt", ".pth", ".bin", ".ckpt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})$")
_NOT_WEIGHTS = (  # beginnings of files that are surely not weights, and what to do about them
    (
        (b"version https://git-lfs",),
        "a git-lfs pointer instead of the weights; fetch them with `git lfs pull`",
    ),
    (
        (b"<!doctype", b"<html", b"<?xml"),
        "an HTML or XML page instead of weights: the download got an error page, get the file itself",
    ),
    ((b"gguf",), "a GGUF file, which is not supported; use safetensors or PyTorch weights"),
    ((b"{", b"["), "a JSON file, not weights; name the weight file or its folder"),
)


_FULL = Verify()


def open_file(  # noqa: C901 - one kind of file after the other
    path: Path, *, allow_pickle: bool = False, verify: Verify = _FULL
) -> LazyStateDict:
    """The tensors of one file, safetensors or PyTorch, told apart by content; checked as ``verify`` says."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        raise CheckpointError(f"{path}: {kind}, not a file of weights")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if not head.strip(b"\0"):
        raise CheckpointError(f"{path}: empty or all zeros: the copy or download failed, get it again")
    for beginnings, complaint in _NOT_WEIGHTS:
        if head.lstrip().lower().startswith(beginnings):
            raise CheckpointError(f"{path}: {complaint}")
    check = check_file(path, verify)
    if head[:2] == b"PK" or head[:1] == b"\x80" and head[8:9] != b"{":
        return TorchFile(path, allow_pickle=allow_pickle, check=check, verify=verify)
    if head[8:9] == b"{" or path.suffix in SAFETENSORS:
        return SafetensorsFile(path, check, verify.mode)
    if check is not None:
        check.finish()
    if path.suffix in TORCH:
        raise CheckpointError(
            f"{path}: truncated or corrupt: does not begin as a PyTorch file; copy or download it again"
        )
    raise CheckpointError(
        f"{path}: no known weight format (safetensors or PyTorch), it begins with {head[:8]!r}"
    )


VOCABULARY = ("spiece.model", "tokenizer.json")  # sentencepiece's own file, and the one of `tokenizers`


def vocabulary(folder: Path) -> Path | None:
    """The file of the tokenizer in ``folder``: spiece.model, else tokenizer.json, else None."""
    return next((folder / name for name in VOCABULARY if (folder / name).is_file()), None)


def weight_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files of ``folder`` with one of ``suffixes``, sorted."""
    wanted = tuple(suffixes)
    return sorted(path for path in folder.iterdir() if path.suffix in wanted and path.is_file())


def open_folder(folder: Path, *, allow_pickle: bool = False, verify: Verify = _FULL) -> LazyStateDict:
    """The tensors of a folder: those of its index, else its only weight file, else its numbered shards.

    Safetensors win over PyTorch files, plain names over variants (``model.fp16.safetensors``).
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    for kind, suffixes in (("safetensors", SAFETENSORS), ("bin", TORCH)):
        if found := list(folder.glob(f"*.{kind}.index*.json")):
            index = min(found, key=lambda path: (path.name.count("."), path.name))
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise CheckpointError(f"{index}: has no weight_map of tensor names to files")
            tensors = open_shards(
                folder, sorted(set(places.values())), allow_pickle=allow_pickle, verify=verify
            )
            if absent := sorted(set(places) - set(tensors)):
                raise CheckpointError(
                    f"{index}: names {len(absent)} tensors that the shards do not hold: {listing(absent)}"
                )
            return tensors
        if files := _plain(weight_files(folder, suffixes)):
            names = [path.name for path in files]
            return open_shards(folder, names, allow_pickle=allow_pickle, verify=verify)
    raise CheckpointError(f"{folder}: holds no weight files ({', '.join((*SAFETENSORS, *TORCH))})")


def _plain(files: list[Path]) -> list[Path]:
    """The one file, or one complete set of numbered shards, to read of ``files``."""
    if not files:
        return []
    fewest = min(path.name.count(".") for path in files)
    files = [path for path in files if path.name.count(".") == fewest]
    shards = [found for path in files if (found := _SHARD.match(path.stem))]
    if len(shards) == len(files) and len({(s.group(1), s.group(3)) for s in shards}) == 1:
        stem, total = shards[0].group(1), int(shards[0].group(3))
        suffix = files[0].suffix
        return [files[0].with_name(f"{stem}-{i:05}-of-{total:05}{suffix}") for i in range(1, total + 1)]
    if len(files) > 1:
        names = [path.name for path in files]
        raise CheckpointError(f"{files[0].parent}: {len(names)} weight files, name one of {listing(names)}")
    return files


def open_shards(
    folder: Path, names: list[str], *, allow_pickle: bool = False, verify: Verify = _FULL
) -> LazyStateDict:
    """The tensors of the files ``names`` in ``folder`` as one; all of them must be there."""
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{folder}: shard names must be plain file names, got {listing(outside)}")
    if absent := [name for name in names if not (folder / name).exists()]:
        raise CheckpointError(f"{folder}: {len(absent)} of {len(names)} shards missing: {listing(absent)}")
    shards = {name: open_file(folder / name, allow_pickle=allow_pickle, verify=verify) for name in names}
    return next(iter(shards.values())) if len(shards) == 1 else Joined(shards, str(folder))


# -- folders that appear whole or not at all


@contextmanager
def atomic_folder(folder: Path, nbytes: int = 0) -> Iterator[Path]:
    """A folder beside ``folder`` to write in, which takes its name at the end; a failure leaves nothing.

    ``folder`` must not exist, or be empty; ``nbytes`` must be free on its disk. What a killed process has
    left of it is removed.
    """
    refuse_occupied(folder)
    folder = folder.absolute()
    owner = f"{host.machine()}-{os.getpid()}-{uuid4().hex[:12]}"
    partial = folder.parent / f".{folder.name}.{owner}{host.TEMPORARY}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for draft in folder.parent.glob(f".{escape(folder.name)}.*{host.TEMPORARY}"):
            if host.abandoned(draft):  # of a process that was killed
                shutil.rmtree(draft, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free
        if nbytes > free:
            raise CheckpointError(f"{folder}: needs {nbytes / 1e9:.2f} GB, only {free / 1e9:.2f} GB are free")
        partial.mkdir()
        yield partial
        if folder.exists():
            folder.rmdir()  # empty: checked above
        partial.rename(folder)
        if os.name == "posix":  # make the new name durable
            handle = os.open(folder.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_occupied(folder: Path) -> None:
    """An error if ``folder`` is a file or holds anything."""
    if folder.is_dir() and next(folder.iterdir(), None) is None:
        return
    if folder.exists() or folder.is_symlink():
        raise CheckpointPathError(
            f"{folder}: exists and is not an empty folder; give a new destination or empty it first"
        )
