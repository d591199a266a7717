"""A few seeded corruptions of every kind: all are told."""

from tests.attack.corruptions import run


def test_no_corruption_is_silent_or_a_traceback():
    assert run(20, seed=1) == []
