"""Concepts and captions of the emoji data set, from the packages that hold its pictures."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, TypedDict, cast

from sat.errors import UserError


class PackageError(RuntimeError):
    """A package could not be fetched or does not hold what is expected."""


@dataclass(frozen=True)
class Package:
    """One npm package at the version the small model was trained on, with its credits."""

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
    shapes: str | None = None  # the style that it takes its outlines from


LABELS = Package("emojibase-data", "17.0.0", "MIT", "Miles Johnson", "https://github.com/milesj/emojibase")

_NOTO, _FLUENT = "https://github.com/googlefonts/noto-emoji", "https://github.com/microsoft/fluentui-emoji"
_TWITTER, _TWEMOJI = "Twitter, Inc and other contributors", "https://github.com/jdecked/twemoji"
_LOBEHUB = "Microsoft Corporation (drawings), LobeHub (packaging)"
_EMOJITWO, _FIREFOX = "https://github.com/EmojiTwo/emojitwo", "https://github.com/mozilla/fxemoji"
_STREAMLINE = "https://github.com/webalys-hq/streamline-vectors"
_GAME, _MATERIAL = "https://github.com/game-icons/icons", "https://github.com/Templarian/MaterialDesign"
_PARK, _SOLID = "https://github.com/bytedance/IconPark", "https://github.com/FortAwesome/Font-Awesome"
_TABLER = "https://github.com/tabler/tabler-icons"

STYLES: dict[str, Style] = {
    style.word: style
    for style in (
        Style("noto", Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc", _NOTO)),
        Style("twemoji", Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", _TWITTER, _TWEMOJI)),
        Style(
            "flat",
            Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Microsoft Corporation", _FLUENT),
        ),
        Style("blob", Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "Google Inc", _NOTO)),
        Style("emojitwo", Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiTwo", _EMOJITWO)),
        Style("3d", Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", _LOBEHUB, _FLUENT), "webp", "flat"),
        Style("firefox", Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0", "Mozilla", _FIREFOX)),
        Style(
            "contrast",
            Package(
                "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Microsoft Corporation", _FLUENT
            ),
            shapes="flat",
        ),
        Style(
            "monotone",
            Package("@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", "EmojiTwo", _EMOJITWO),
            shapes="emojitwo",
        ),
        Style(
            "streamline",
            Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline", _STREAMLINE),
        ),
        Style("game", Package("@iconify-json/game-icons", "1.2.4", "CC-BY-3.0", "GameIcons", _GAME)),
        Style("material", Package("@iconify-json/mdi", "1.2.3", "Apache-2.0", "Pictogrammers", _MATERIAL)),
        Style("park", Package("@iconify-json/icon-park", "1.2.4", "Apache-2.0", "ByteDance", _PARK)),
        Style("solid", Package("@iconify-json/fa6-solid", "1.2.4", "CC-BY-4.0", "Dave Gandy", _SOLID)),
        Style("tabler", Package("@iconify-json/tabler", "1.2.41", "MIT", "Paweł Kuna", _TABLER)),
    )
}
TRAINING_STYLES = ("noto", "twemoji", "flat", "blob", "emojitwo")
ICON_STYLES = (
    "game",
    "material",
    "park",
    "solid",
    "tabler",
)  # icons of a program, not emoji: of one ink or two
JUDGE_STYLES = ("firefox", "contrast", "monotone", "streamline", *ICON_STYLES)  # the classifier learns shapes
HELD_OUT_STYLE = "3d"  # of all training of the small model: it is what a LoRA learns later

FIREFOX_NAMES: Mapping[str, str] = {  # of icons that are called by neither label nor character
    "green heart": "heartgreen", "yellow heart": "heartyellow",
    "purple heart": "heartpurple", "grinning face": "grin", "smiling face with heart-eyes": "hearteyes",
    "smiling face with sunglasses": "sunglasses", "loudly crying face": "loudlycrying",
    "dog face": "dog", "cat face": "cat", "tiger face": "tiger", "pig face": "pig", "mouse face": "mouse",
    "rabbit face": "bunny", "front-facing baby chick": "frontfacingchick", "spouting whale": "spurtingwhale",
    "evergreen tree": "evergreen", "globe showing Americas": "americasglobe", "wrapped gift": "present",
    "gem stone": "gem", "sun": "sunrays",
}  # fmt: skip


ICON_NAMES: Mapping[str, str] = {  # of icons that are called by no name of the emoji
    "cheese wedge": "cheese", "light bulb": "lightbulb", "wrapped gift": "gift", "honeybee": "bee",
    "red apple": "apple", "red heart": "heart", "gem stone": "diamond", "soccer ball": "soccer",
    "guitar": "guitar-electric", "rose": "flower-rose", "Christmas tree": "pine-tree",
    "castle": "building-castle",
    "electric plug": "plug", "birthday cake": "cake", "jack-o-lantern": "pumpkin-lantern", "fire": "flame",
    "hot beverage": "coffee", "sailboat": "sail-boat", "automobile": "car", "locomotive": "train",
    "french fries": "french-fries", "hamburger": "burger", "evergreen tree": "tree",
}  # fmt: skip


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


# -- captions of one picture, with weights: the recipe the small model is trained on


TAG_VARIANTS = 3  # captions with different pairs of tags


class Caption(NamedTuple):
    """A caption and how often it is drawn (the weights of one picture sum to 1)."""

    text: str
    weight: float


def with_article(label: str) -> str:
    """``label`` with "a" or "an" before it, as people type; unchanged where it is plural or has one."""
    last = label.split(" with ")[0].split(" of ")[0].split()[-1].lower()
    if label.startswith(("a ", "an ", "the ")) or (
        last.endswith("s") and not last.endswith(("ss", "us", "is"))
    ):
        return label
    return f"{'an' if re.match('[aeiouAEIO]', label) and not label.startswith('uni') else 'a'} {label}"


def captions(concept: Concept, style: str) -> list[Caption]:
    """Weighted captions of ``concept`` drawn in ``style``.

    45 % "red apple, noto style"; 20 % "a noto emoji of red apple"; 15 % the label alone, half of it with an
    article; 20 % the label, two of its tags and the style (without tags, the first form takes its place).
    """
    label = concept.label
    named = f"{label}, {style} style"
    tagged = [named]
    if concept.tags:  # the same ones every time
        chooser = random.Random(f"{concept.code}/{style}")
        drawn = (chooser.sample(concept.tags, min(2, len(concept.tags))) for _ in range(TAG_VARIANTS))
        tagged = list(dict.fromkeys(f"{label}, {', '.join(tags)}, {style} style" for tags in drawn))
    weights: dict[str, float] = {}
    article = "an" if style[0] in "aeiou" else "a"
    for caption, weight in (
        (named, 0.45),
        (f"{article} {style} emoji of {label}", 0.20),
        (label, 0.075),
        (with_article(label), 0.075),
        *((caption, 0.20 / len(tagged)) for caption in tagged),
    ):
        weights[caption] = weights.get(caption, 0.0) + weight
    return [Caption(text, round(weight, 6)) for text, weight in weights.items()]


# -- concepts: the thing that an emoji shows, by its English label


PEOPLE_GROUP, COMPONENT_GROUP, FLAG_GROUP = 1, 2, 9  # emojibase's meta/groups.json
JOINER, VARIATION = "200d", "fe0f"


class Entry(TypedDict):
    """The fields used of one entry in emojibase's ``en/data.json``."""

    label: str
    hexcode: str
    tags: list[str]
    group: int
    subgroup: int


@dataclass(frozen=True)
class Concept:
    """One thing an emoji shows."""

    label: str  # "red apple"
    code: str  # code points in lower case without variation selectors: "1f34e"
    tags: tuple[str, ...]  # emojibase's keywords, those of the label itself excluded
    group: int

    @property
    def slug(self) -> str:
        """The label as a file name: "red-apple"."""
        return slug(self.label)

    @property
    def character_slug(self) -> str:
        """Unicode's name of a single character as a file name, "ear-of-maize"; empty for a sequence."""
        return "" if "-" in self.code else slug(unicodedata.name(chr(int(self.code, 16)), ""))


def slug(label: str) -> str:
    """``label`` in ASCII lower case with hyphens, as Iconify names its icons."""
    plain = unicodedata.normalize("NFKD", label.replace("’", "").replace("'", ""))
    plain = plain.encode("ascii", "ignore").decode()
    plain = plain.replace("#", " hash ").replace("*", " asterisk ")
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def code_points(hexcode: str) -> str:
    """``hexcode`` in lower case without variation selectors, which packages write or leave out at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != VARIATION)


def read_concepts(labels: Archive) -> list[Concept]:
    """All usable concepts in emojibase's order: no flags, components, people sequences or skin tones."""
    found = []
    for entry in cast("list[Entry]", labels.json("en/data.json")):
        group = entry.get("group")
        if group is None or group in (COMPONENT_GROUP, FLAG_GROUP):
            continue
        code = code_points(entry["hexcode"])
        if group == PEOPLE_GROUP and JOINER in code.split("-"):
            continue
        words = set(entry["label"].lower().split())
        tags = tuple(
            tag for tag in entry.get("tags", []) if tag.lower() not in words | {entry["label"].lower()}
        )
        found.append(Concept(entry["label"], code, tags, group))
    return found


def core_labels() -> list[str]:
    """The curated labels in ``core_concepts.txt``."""
    return parse_labels(resources.files("sat.apps.emoji").joinpath("core_concepts.txt").read_text("utf-8"))


def parse_labels(text: str) -> list[str]:
    """Labels of a list with one per line; lines that start with ``#`` and empty ones are skipped."""
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class ConceptError(UserError, ValueError):
    """A list of concepts that is not there, or names some that do not exist."""


def chosen_labels(which: str) -> list[str]:
    """Labels named by ``which``: "core" or a file of labels; none for "all"."""
    if which in ("all", "core"):
        return core_labels() if which == "core" else []
    path = Path(which)
    if not path.is_file():
        raise ConceptError(f"--concepts {which!r}: expected 'all', 'core' or a file with one label per line")
    return parse_labels(path.read_text("utf-8"))


def select(concepts: Sequence[Concept], which: str) -> list[Concept]:
    """Concepts named by ``which``: "all", "core" or a file of labels, in which case does not matter."""
    if which == "all":
        return list(concepts)
    wanted = chosen_labels(which)
    by_label: Mapping[str, Concept] = {concept.label.lower(): concept for concept in concepts}
    unknown = [label for label in wanted if label.lower() not in by_label]
    if unknown:
        shown = []
        for label in unknown:
            near = difflib.get_close_matches(label.lower(), list(by_label), n=1)
            shown.append(f"{label!r} (did you mean {near[0]!r}?)" if near else repr(label))
        raise ConceptError(f"unknown concept {', '.join(shown)}")
    return [by_label[label.lower()] for label in dict.fromkeys(wanted)]
