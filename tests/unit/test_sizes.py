"""The size rule: what is refused, in which words, and what is offered instead."""

import pytest

from sat.config.schema.base import SizeError, SizeRule

PLUS = SizeRule()


@pytest.mark.parametrize("size", [(512, 512), (1024, 2048), (2048, 1024), (1440, 1440), (544, 512)])
def test_sizes_of_the_official_model_are_allowed(size: tuple[int, int]) -> None:
    PLUS.check(*size)
    assert PLUS.allows(*size)


@pytest.mark.parametrize(
    ("size", "broken", "nearest"),
    [
        ((480, 1024), "height 480 is not between 512 and 2048", "512 x 1024"),
        ((1024, 2080), "width 2080 is not between 512 and 2048", "1024 x 2048"),
        ((1000, 1024), "height 1000 is not a multiple of 32", "992 x 1024"),
        ((1024, 1016), "width 1016 is not a multiple of 32", "1024 x 1024"),
        ((2048, 2048), "height x width is 4194304, more than 2097152", "1440 x 1440"),
        ((0, -5), "height 0 is not between", "512 x 512"),
        ((10**9, 512), "height 1000000000 is not between", "2048 x 512"),
    ],
)
def test_refusal_names_the_rule_and_the_nearest_size(size, broken, nearest) -> None:
    with pytest.raises(SizeError) as error:
        PLUS.check(*size)
    assert broken in str(error.value)
    assert f"nearest size is {nearest} (height x width)" in str(error.value)


def test_every_broken_rule_is_named() -> None:
    with pytest.raises(SizeError) as error:
        PLUS.check(500, 3000)
    for part in ("height 500 is not between", "height 500 is not a multiple", "width 3000 is not between"):
        assert part in str(error.value)


def test_equally_near_sizes_give_the_larger() -> None:
    assert PLUS.nearest(1008, 1024) == (1024, 1024)


def test_height_and_width_are_not_exchanged() -> None:
    assert PLUS.nearest(520, 1990) == (512, 1984)


@pytest.mark.parametrize(
    "rule", [(64, 32, 8, 4096), (20, 30, 16 * 2, 10**6), (64, 64, 8, 64), (8, 64, 0, 99)]
)
def test_a_rule_without_any_size_is_refused(rule: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="size"):
        SizeRule(*rule)
