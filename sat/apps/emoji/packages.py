"""The npm packages the images and captions come from: pinned versions, fetching, reading."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal


class PackageError(RuntimeError):
    """A package could not be fetched or does not hold what is expected."""


@dataclass(frozen=True)
class Package:
    """One npm package at the version the small model was trained on, with whom to credit."""

    name: str
    version: str
    licence: str  # SPDX identifier of the drawings (or of the texts, for emojibase-data)
    author: str
    source: str  # address of the upstream project

    @property
    def tarball(self) -> str:
        """File name ``npm pack`` gives the package."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """One drawing style: the word used in captions and the package that draws it."""

    word: str
    package: Package
    kind: Literal["svg", "webp"] = "svg"


LABELS = Package("emojibase-data", "17.0.0", "MIT", "Miles Johnson", "https://github.com/milesj/emojibase")

STYLES: dict[str, Style] = {
    style.word: style
    for style in (
        Style(
            "noto",
            Package(
                "@iconify-json/noto",
                "1.2.9",
                "Apache-2.0",
                "Google Inc",
                "https://github.com/googlefonts/noto-emoji",
            ),
        ),
        Style(
            "twemoji",
            Package(
                "@iconify-json/twemoji",
                "1.2.5",
                "CC-BY-4.0",
                "Twitter, Inc and other contributors",
                "https://github.com/jdecked/twemoji",
            ),
        ),
        Style(
            "flat",
            Package(
                "@iconify-json/fluent-emoji-flat",
                "1.2.6",
                "MIT",
                "Microsoft Corporation",
                "https://github.com/microsoft/fluentui-emoji",
            ),
        ),
        Style(
            "blob",
            Package(
                "@iconify-json/noto-v1",
                "1.2.5",
                "Apache-2.0",
                "Google Inc",
                "https://github.com/googlefonts/noto-emoji",
            ),
        ),
        Style(
            "emojitwo",
            Package(
                "@iconify-json/emojione",
                "1.2.3",
                "CC-BY-4.0",
                "EmojiTwo",
                "https://github.com/EmojiTwo/emojitwo",
            ),
        ),
        Style(
            "3d",
            Package(
                "@lobehub/fluent-emoji-3d",
                "1.1.0",
                "MIT",
                "Microsoft Corporation (drawings), LobeHub (packaging)",
                "https://github.com/microsoft/fluentui-emoji",
            ),
            "webp",
        ),
    )
}
TRAINING_STYLES = ("noto", "twemoji", "flat", "blob", "emojitwo")
HELD_OUT_STYLE = "3d"  # of all training of the small model: it is what a LoRA learns later


def fetch(package: Package, folder: Path) -> Path:
    """Path of the package's tarball in ``folder``, downloaded there with ``npm pack`` if absent."""
    path = folder / package.tarball
    if path.exists():
        return path
    others = sorted(other.name for other in folder.glob(package.tarball.replace(package.version, "[0-9]*")))
    npm = shutil.which("npm")
    if npm is None:
        found = f" (found another version: {', '.join(others)})" if others else ""
        raise PackageError(
            f"{path} is missing{found} and npm is not installed: install npm, or run "
            f"'npm pack {package.name}@{package.version}' elsewhere and give its folder as --packages"
        )
    folder.mkdir(parents=True, exist_ok=True)
    spec = f"{package.name}@{package.version}"
    command = [npm, "pack", "--silent", spec, "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.exists():
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise PackageError(f"npm pack {spec} failed with code {done.returncode}: {reason}")
    return path


class Archive:
    """Read-only view of one package tarball; nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tar = tarfile.open(path, "r:gz")  # noqa: SIM115 (closed in __exit__)
            self.names = frozenset(self._tar.getnames())
        except (tarfile.TarError, OSError, EOFError) as error:
            raise PackageError(f"{path} is not a readable npm tarball: {error}") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()

    def read(self, name: str) -> bytes:
        """Content of ``package/name``."""
        try:
            member = self._tar.extractfile(f"package/{name}")
        except KeyError as error:
            raise PackageError(f"{self.path}: no file package/{name}") from error
        if member is None:
            raise PackageError(f"{self.path}: package/{name} is not a file")
        return member.read()

    def json(self, name: str) -> object:
        """Parsed content of the JSON file ``package/name``."""
        return json.loads(self.read(name))

    def sha256(self) -> str:
        """Digest of the tarball."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()
