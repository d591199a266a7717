"""A few seeded corruptions of every kind: all are told."""

import pytest

from tests.attack.corruptions import KINDS, attacks
from tests.attack.runs import unchanged


@pytest.mark.parametrize("kinds", [KINDS[:7], KINDS[7:]], ids=["weights", "runs"])
def test_no_corruption_is_silent_or_a_traceback(kinds):
    with unchanged():
        failures, ends = attacks(2 * len(kinds), 1, kinds)
    assert not failures, "\n".join(failures)
    assert ends["refused"] >= 1
