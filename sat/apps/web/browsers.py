"""State of the browsers: drawings in order, what their pages had, pictures that they asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from PIL import Image

from sat.apps.web.job_queue import Job
from sat.util.host import write_text

log = logging.getLogger(__name__)


class Browser:
    """State of one browser: its drawings in order, and what its page had."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.drawings: list[Drawing] = []
        self.shown: list[list[str]] = []  # names shown large, the last ones
        self.before: dict[str, tuple[str, Path | Image.Image]] = {}  # name -> words, picture it was made of
        self.uploads: dict[str, Path] = {}  # by tab
        self.painted: tuple[Image.Image, Image.Image | None] | None = None
        self.ended = False  # its drawings were, as nobody waited


@dataclass
class Drawing:
    """A job of one browser, and what was told of it."""

    job: Job
    count: int  # pictures
    prompt: str = ""
    notices: tuple[str, ...] = ()
    given: Image.Image | None = None  # that it changes, or is steered by
    titled: str = ""  # grid: a sheet comes first
    seen: tuple[str, int] = ("waiting", -1)
    began: tuple[float, int] | None = None  # time and step when it was first seen drawing


class History:
    """Names of the pictures that each browser asked for, the newest first, in a file beside them."""

    MOST = 500
    """Names of a browser, and browsers."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self._names: dict[str, list[str]] = {}
        try:
            found = json.loads(path.read_text("utf-8"))
            self._names = {str(key): [str(name) for name in names] for key, names in found.items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError) as error:
            log.warning("%s: damaged, the page's history begins anew: %s", path, error)

    def of(self, browser: str) -> list[str]:
        """Those of ``browser``."""
        return list(self._names.get(browser, ()))

    def add(self, browser: str, names: Sequence[str]) -> None:
        """Put ``names`` first."""
        with self._lock:
            before = [name for name in self._names.pop(browser, ()) if name not in names]
            self._names = dict(
                [*self._names.items(), (browser, [*names, *before][: self.MOST])][-self.MOST :]
            )
            write_text(self.path, json.dumps(self._names))
