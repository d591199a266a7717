"""Log lines by rank, and a progress line only where somebody looks."""

import io
import logging

import pytest

from sat.util import log as logs
from sat.util.log import progress


@pytest.fixture(autouse=True)
def _restore():
    root, ours = logging.getLogger(), logging.getLogger("sat")
    level, handlers = ours.level, list(root.handlers)
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rank_0_says_everything_and_others_only_warnings(capsys) -> None:
    log = logging.getLogger("sat.somewhere")
    logs.setup(0)
    log.info("loaded")
    log.warning("cut: %s", "dog")
    logs.setup(2)
    log.info("loaded")
    log.warning("cut")
    assert capsys.readouterr().err == "loaded\nwarning: cut: dog\n[rank 2] warning: cut\n"


def test_debug_names_the_module(capsys) -> None:
    logs.setup(0, debug=True)
    logging.getLogger("sat.somewhere").debug("deep")
    assert capsys.readouterr().err == "sat.somewhere: deep\n"


def test_quiet_leaves_warnings_and_verbose_adds_details(capsys) -> None:
    log = logging.getLogger("sat.somewhere")
    for verbosity in (-1, 1):
        logs.setup(0, verbosity=verbosity)
        log.debug("read")
        log.info("loaded")
        log.warning("cut")
    assert capsys.readouterr().err == "warning: cut\nread\nloaded\nwarning: cut\n"


def test_progress_is_silent_off_a_terminal_and_on_other_ranks() -> None:
    logs.setup(0)
    for total, rank, screen in ((10, 0, io.StringIO()), (10, 1, _Terminal()), (0, 0, _Terminal())):
        with progress(total, rank=rank, stream=screen) as bar:
            bar.update(total)
        assert not screen.getvalue()
    logs.setup(0, verbosity=-1)
    with progress(3, stream=(screen := _Terminal())) as bar:
        bar.update(3)
    assert not screen.getvalue()


def test_a_log_gets_a_line_a_minute_with_the_time_left(monkeypatch, caplog) -> None:
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    logs.setup(0)
    with caplog.at_level(logging.INFO, "sat"), progress(10, stream=io.StringIO()) as bar:
        bar.set_description_str("[2/4] a red apple")
        for _ in range(10):
            now[0] += 25.0
            bar.update()
    assert caplog.messages == [
        "[2/4] a red apple: step 3 of 10, 0:02:55 left",
        "[2/4] a red apple: step 6 of 10, 0:01:40 left",
        "[2/4] a red apple: step 9 of 10, 0:00:25 left",
    ]


def test_progress_on_a_terminal_shows_the_note_the_count_and_the_time_left() -> None:
    logs.setup(0)
    screen = _Terminal()
    with progress(4, stream=screen) as bar:
        bar.set_description_str("[1/2] a red apple")
        bar.update(4)
    assert "[1/2] a red apple" in screen.getvalue()
    assert "4/4" in screen.getvalue()
    assert "<" in screen.getvalue()
