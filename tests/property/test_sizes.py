"""The nearest size is allowed and none is nearer, for any rule and any wish."""

from hypothesis import given
from hypothesis import strategies as st

from sat.config.schema.base import SizeRule


@st.composite
def rules(draw) -> SizeRule:
    multiple = draw(st.integers(1, 40))
    first = multiple * draw(st.integers(1, 3))  # the smallest allowed side
    low = draw(st.integers(first - multiple + 1, first))
    high = first + draw(st.integers(0, 120))
    area = draw(st.integers(first * first, high * high + 10))
    return SizeRule(low, high, multiple, area)


@given(rules(), st.integers(-50, 400), st.integers(-50, 400))
def test_nearest_is_the_best_of_all_allowed(rule: SizeRule, height: int, width: int) -> None:
    sides = range(0, rule.max + 1, rule.multiple)
    allowed = [(h, w) for h in sides for w in sides if rule.allows(h, w)]

    def key(size: tuple[int, int]) -> tuple[int, int]:
        return (size[0] - height) ** 2 + (size[1] - width) ** 2, -size[0] * size[1]

    near = rule.nearest(height, width)
    assert near in allowed
    assert key(near) == min(map(key, allowed))


@given(rules(), st.integers(1, 300), st.integers(1, 300))
def test_nearest_of_an_allowed_size_is_itself(rule: SizeRule, height: int, width: int) -> None:
    near = rule.nearest(height, width)
    assert rule.nearest(*near) == near
