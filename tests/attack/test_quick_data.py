"""A few seeded damages of data: every lost record is told."""

from tests.attack.data import run


def test_no_damage_of_data_is_silent_or_a_traceback():
    assert run(150, seed=1) == []
