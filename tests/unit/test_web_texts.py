"""Words of the page in two languages, and what a person may type for a grid."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from PIL import Image

from sat.apps.web.grid import changed, parse
from sat.apps.web.request import ControlUse, GenerationRequest, RequestError
from sat.apps.web.texts import CHINESE, translated

REQUEST = GenerationRequest("a red apple", 64, 64, 8, 3.0, 5)
SERVICE = SimpleNamespace(guidance=3.0, adapters={"fur": None})


def test_both_languages_name_the_same_things() -> None:
    for english, chinese in CHINESE.items():
        names = set(re.findall(r"\{(\w+)\}", chinese))
        assert names == set(re.findall(r"\{(\w+)\}", english)), english


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("Draw", "绘制"),
        ("Done: 3 pictures.", "完成：3 张图片。"),
        (
            "Drawing: picture 2 of 4, step 3 of 32, about 9 s left.",
            "绘制中：第 2 / 4 张，第 3 / 32 步，约剩 9 秒。",
        ),
        ("Steps: expected 1 to 200, got 999", "步数：应在 1 到 200 之间，得到 999"),
        ("Grid: strength has no effect on this request", "网格：强度 对当前请求不起作用"),
        ("something that no table knows", "something that no table knows"),
    ],
)
def test_sentences_are_found_by_their_templates(english, chinese) -> None:
    assert translated(english, "zh-CN") == chinese
    assert translated(english, "en") == translated(english, "") == english


def test_an_axis_is_values_or_a_range() -> None:
    assert parse("guidance", " 1, 2.5 ,3", 9).values == [1, 2.5, 3]
    assert parse("seed", " 2 .. 4 ", 9).values == [2, 3, 4]
    assert parse("prompt", "red,dark green", 9).values == ["red", "dark green"]
    for text, match in (("", "no values"), (" , ", "no values"), ("0..4000000000", "more than 9")):
        with pytest.raises(RequestError, match=match):
            parse("seed", text, 9)


def test_each_axis_changes_its_setting() -> None:
    def of(name: str, text: str, request: GenerationRequest = REQUEST) -> GenerationRequest:
        return changed(SERVICE, request, parse(name, text, 9), 1)

    control = ControlUse("edges", Image.new("RGB", (2, 2)))
    assert of("prompt", "red,green").prompt == "a green apple"
    assert of("seed", "1,2").seed == 2 and of("steps", "1,2").steps == 2
    assert of("guidance", "1,2").guidance == 2.0 and of("sampler", "DDIM,Heun").sampler == "Heun"
    assert of("fur", "0,0.5").adapters == {"fur": 0.5}
    assert (
        of("strength", "0,1", GenerationRequest("a", 2, 2, 1, None, 0, image=control.image)).strength == 1.0
    )
    assert (
        of("control", "1,0.5", GenerationRequest("a", 2, 2, 1, None, 0, control=control)).control.scale == 0.5
    )


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("strength", "0,1", "strength has no effect on this request"),
        ("control", "0,1", "control has no effect on this request"),
        ("prompt", "blue,green", "'blue', is not in the prompt"),
        ("seed", "1,2.5", "expected whole numbers .* got 2.5"),
        ("steps", "1,many", "expected whole numbers .* got 'many'"),
        ("guidance", "1,nan", "expected numbers .* got nan"),
    ],
)
def test_an_axis_without_effect_is_refused(name, text, match) -> None:
    with pytest.raises(RequestError, match=match):
        changed(SERVICE, REQUEST, parse(name, text, 9), 1)
