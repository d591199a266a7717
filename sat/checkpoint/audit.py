"""Check of everything in a folder of weights, and chunk digests for files that have none."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sat.checkpoint.files import SAFETENSORS, TORCH, VOCABULARY, open_file
from sat.checkpoint.format import PARTS, CheckpointError
from sat.checkpoint.formats import Native
from sat.checkpoint.load import refuse_not_finite
from sat.checkpoint.verify import (
    DIGESTS,
    MANIFEST,
    CheckpointPathError,
    Verify,
    digest_file,
    read_json,
    record_of,
    records,
    verify_file,
)
from sat.util.host import write_text


class Verdict(NamedTuple):
    """Outcome for one file: ``good``, and by which means, or what is wrong with it."""

    file: Path
    good: bool
    text: str


def audit(path: Path, *, write: bool = False, allow_pickle: bool = False) -> list[Verdict]:
    """Verdict on every weight file and vocabulary in ``path`` (a file or folder of any format).

    With ``write``, and if all are good, they get chunk digests: in the manifest.json of a native folder, in
    digests.json beside others. Raises :class:`CheckpointError` where there is nothing to check.
    """
    if not path.exists():
        raise CheckpointPathError(f"{path}: no such file or folder")
    kinds = (*SAFETENSORS, *TORCH)
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    files = [p for p in found if p.suffix in kinds or p.name in VOCABULARY or p == path]
    out = [_verdict(file, allow_pickle) for file in files]
    for record in [p for p in found if p.name in (MANIFEST, DIGESTS)]:
        out += _listed(record)
    if not out:
        raise CheckpointError(f"{path}: holds no weight files ({', '.join(kinds)})")
    if write and all(verdict.good for verdict in out):
        groups: dict[Path, list[Path]] = defaultdict(list)
        for file in files:
            above = file.parent.parent if file.name in VOCABULARY else file.parent
            native = (above / MANIFEST).is_file() and (above != file.parent or record_of(file) is not None)
            groups[above / MANIFEST if native else file.parent / DIGESTS].append(file)
        for home, members in groups.items():
            _write(home, members)
    return out


def _verdict(file: Path, allow_pickle: bool) -> Verdict:
    """Verdict on one file: its digests, the CRC-32 of a zip, and whether its values are finite."""
    try:
        record = record_of(file)
        digested, inside = verify_file(file), False
        if file.name not in VOCABULARY:
            with open_file(file, allow_pickle=allow_pickle, verify=Verify()) as tensors:
                tensors.verified()
                inside = tensors.digested and not digested
                for name in tensors:
                    refuse_not_finite(tensors[name], name, str(file))
                    tensors.release(name)
    except CheckpointError as error:
        return Verdict(file, False, str(error).removeprefix(f"{file}: "))
    if not digested:
        if inside:
            return Verdict(file, True, "the digests in its header right")
        return Verdict(file, True, "readable and finite; it has no digests yet")
    kind = "chunk digests" if record is not None and "chunks" in record else "SHA-256"
    return Verdict(file, True, f"{kind} right")


def _listed(file: Path) -> list[Verdict]:
    """Verdicts on what a manifest.json or digests.json says and is not so."""
    try:
        absent = [record["name"] for record in records(file) if not (file.parent / record["name"]).is_file()]
        if absent:
            return [Verdict(file, False, f"names {absent[0]!r}, which is not there")]
        if file.name == MANIFEST and Native().detects(file.parent):
            held = Native().manifest(file.parent)["parts"]
            for part in [part for part in PARTS if part in held]:
                Native().open(file.parent, part, verify=Verify("manifest")).close()
    except CheckpointError as error:
        return [Verdict(file, False, str(error).removeprefix(f"{file}: "))]
    return []


def _write(home: Path, files: list[Path]) -> None:
    """Write records of ``files`` into ``home``, a manifest.json or digests.json; others in it stay."""
    new = {p.relative_to(home.parent).as_posix(): digest_file(p) for p in files}
    made = {name: written.record(name) for name, written in new.items()}
    content: dict[str, Any] = read_json(home) if home.is_file() else {"files": []}

    def renewed(listed: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [made.pop(str(record["name"]), record) for record in listed]

    for part in content.get("parts", {}).values():
        part["files"] = renewed(part["files"])
    rest = "files" if home.name == DIGESTS else "tokenizer"
    content[rest] = [*renewed(content.get(rest, [])), *made.values()]
    if not content[rest]:
        del content[rest]
    try:
        write_text(home, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise CheckpointError(f"{home}: cannot write: {error.strerror or error}") from error
