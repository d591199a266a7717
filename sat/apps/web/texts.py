"""Words of the page in two languages: one table from English to Chinese, for labels and for sentences."""

from __future__ import annotations

import re
from functools import cache

CHINESE = {
    # -- the form
    "Prompt": "提示词",
    "a red apple": "a red apple（小模型只认识英文词）",
    "Draw": "绘制",
    "Cancel": "取消",
    "Enhance": "扩写提示词",
    "Text": "文生图",
    "Image": "图生图",
    "Inpaint": "局部重绘",
    "Control": "控制",
    "<h2>Settings</h2>": "<h2>设置</h2>",
    "<h2>Pictures</h2>": "<h2>图片</h2>",
    "Examples: click one": "示例：点击即可使用",
    "Picture to change": "要修改的图片",
    "Strength": "强度",
    "0 keeps the picture, 1 draws another": "0 保持原图，1 完全重画",
    "Picture to paint on": "要涂抹的图片",
    "Paint over what is to be drawn anew.": "请涂抹要重画的部分。",
    "Drop an image file here to upload": "将图像文件拖放到此处以上传",
    "Mask from a file (white is drawn anew)": "从文件读取蒙版（白色部分重画）",
    "Control network": "控制网络",
    "Picture for the control": "控制用的图片",
    "It is a plain picture: make the control's of it": "这是普通图片：由它生成控制图",
    "What the control sees": "控制网络看到的图片",
    "Control strength": "控制强度",
    "Acts from (0: pure noise)": "起点（0：纯噪声）",
    "Acts to (1: clean picture)": "终点（1：清晰图片）",
    "Style": "风格",
    "none": "无",
    "Width": "宽",
    "Height": "高",
    "Swap": "交换宽高",
    "Pictures": "张数",
    "Seed": "种子",
    "Dice": "随机",
    "Keep": "固定",
    "New seed each time": "每次换新种子",
    "Steps": "步数",
    "Guidance": "引导强度",
    "Sampler": "采样器",
    "Negative prompt": "反向提示词",
    "What is not to be seen": "不想出现的内容",
    "0: not used": "0：不使用",
    "Grid": "网格对比",
    "To the right": "横轴",
    "Downwards": "纵轴",
    "Values, such as 1,3,5 or 0..3": "取值，如 1,3,5 或 0..3",
    "Draw the grid": "绘制网格",
    "Settings from a PNG": "从 PNG 读取设置",
    "Enlarge at once, by all stages": "直接放大（运行所有阶段）",
    # -- the pictures
    "Use its settings": "使用它的设置",
    "Enlarge it": "放大",
    "Variations": "变体",
    "Change it": "去图生图",
    "Paint on it": "去局部重绘",
    "Control by it": "用作控制图",
    "Compare": "对比",
    "Copy settings": "复制设置",
    "Delete": "删除",
    "Really delete": "确认删除",
    "Keep it": "不删除",
    "Before and after": "前后对比",
    "Light or dark": "浅色 / 深色",
    "中文": "English",
    "Pictures appear here.": "图片会显示在这里。",
    "Preview": "预览",
    "Drawing": "绘制中",
    "no prompt": "无提示词",
    "Download": "下载",
    "Download these as zip": "打包下载这些图片",
    "Download all below as zip": "打包下载下方全部图片",
    # -- facts of a picture
    "prompt": "提示词",
    "negative prompt": "反向提示词",
    "size": "尺寸",
    "{w} x {h} (width x height)": "{w} x {h}（宽 x 高）",
    "steps": "步数",
    "guidance": "引导强度",
    "seed": "种子",
    "model": "模型",
    "file": "文件",
    "sampler": "采样器",
    "strength": "强度",
    "control": "控制",
    "grid": "网格",
    # -- sentences of the status line
    "Starting …": "正在开始…",
    "In the queue, {n} of yours before it.": "已排队，您前面还有 {n} 个任务。",
    "Waiting: {n} before this one.": "等待中：前面还有 {n} 个任务。",
    "{n} more in the queue.": "队列中还有 {n} 个任务。",
    "Drawing: step {a} of {b}.": "绘制中：第 {a} / {b} 步。",
    "Drawing: step {a} of {b}, about {t} s left.": "绘制中：第 {a} / {b} 步，约剩 {t} 秒。",
    "Drawing: step {a} of {b}, about {t} min left.": "绘制中：第 {a} / {b} 步，约剩 {t} 分钟。",
    "Drawing: picture {k} of {n}, step {a} of {b}.": "绘制中：第 {k} / {n} 张，第 {a} / {b} 步。",
    "Drawing: picture {k} of {n}, step {a} of {b}, about {t} s left.":
        "绘制中：第 {k} / {n} 张，第 {a} / {b} 步，约剩 {t} 秒。",
    "Drawing: picture {k} of {n}, step {a} of {b}, about {t} min left.":
        "绘制中：第 {k} / {n} 张，第 {a} / {b} 步，约剩 {t} 分钟。",
    "Cancelled.": "已取消。",
    "{n} finished before, kept.": "之前完成的 {n} 张已保留。",
    "Done: {n} picture.": "完成：{n} 张图片。",
    "Done: {n} pictures.": "完成：{n} 张图片。",
    "It failed": "绘制失败",
    "The page was closed for longer than {n} s: what it was drawing was ended.":
        "页面关闭超过 {n} 秒，未完成的绘制已停止。",
    "Rewritten from: “{prompt}”.": "由“{prompt}”扩写而成。",
    "What did not fit was cut: “{words}”.": "超长部分已截去：“{words}”。",
    "The settings of the picture are set.": "已使用该图片的设置。",
    "Deleted {n} picture.": "已删除 {n} 张图片。",
    "Deleted {n} pictures.": "已删除 {n} 张图片。",
    "Delete {n} picture? It cannot be brought back.": "要删除 {n} 张图片吗？删除后无法恢复。",
    "Delete {n} pictures? They cannot be brought back.": "要删除 {n} 张图片吗？删除后无法恢复。",
    "The settings are copied.": "设置已复制。",
    "This browser copies nothing from an address without https: mark the text and copy it.":
        "浏览器不允许在非 https 地址复制：请选中文字后手动复制。",
    "The picture is set: {tab}.": "图片已放入“{tab}”。",
    "Left: {what}. Right: the picture.": "左：{what}；右：该图片。",
    "before it was enlarged": "放大之前",
    "the given picture": "给定的图片",
    "the picture shown before": "之前显示的图片",
    "{have} of {most} tokens.": "{have} / {most} 个词元。",
    # -- warnings and errors
    "The negative prompt has no effect: guidance is 1, which looks at the prompt alone":
        "反向提示词不起作用：引导强度为 1，只看提示词",
    "The negative prompt has no effect: this model has no guidance to set":
        "反向提示词不起作用：此模型没有可调的引导",
    "The text encoder does not know {share} of the characters of prompt {prompt} and will ignore them: "
    "translate the prompt into English or rewrite it":
        "文本编码器不认识提示词 {prompt} 中 {share} 的字符，会忽略它们：请译成英文或改写",
    "Prompt {prompt} has {n} tokens, more than the {most} of conditioning.max_length; these words were "
    "dropped: {words}": "提示词 {prompt} 有 {n} 个词元，超过上限 {most}；以下词被截去：{words}",
    "The prompt is empty: say what to draw": "提示词为空：请写下要画什么",
    "Choose a picture first": "请先选一张图片",
    "Choose a picture first.": "请先选一张图片。",
    "Give a picture to change first": "请先放入要修改的图片",
    "Give a picture for the control first": "请先放入控制用的图片",
    "Give a picture to paint on first": "请先放入要涂抹的图片",
    "No mask is painted: paint over what is to be drawn anew": "还没有涂抹：请涂抹要重画的部分",
    "The mask is {a} x {b}, the picture {c} x {d} (width x height): they must be alike":
        "蒙版为 {a} x {b}，图片为 {c} x {d}（宽 x 高）：两者必须一致",
    "The mask is nowhere white: white is what is drawn anew": "蒙版没有白色部分：白色部分才会重画",
    "The picture cannot be read: {why}": "无法读取图片：{why}",
    "The mask cannot be read: {why}": "无法读取蒙版：{why}",
    "There is no {kind} {name}; there are {names}": "没有名为 {name} 的 {kind}；现有：{names}",
    "There is no such picture": "没有这张图片",
    "There is nothing before it to compare with: show another picture first":
        "没有可对比的图片：请先显示另一张",
    "Choose a setting for the grid": "请为网格选择一个设置",
    "Grid: both axes are {name}: choose two settings": "网格：两个轴都是 {name}：请选两个不同的设置",
    "Grid: {name} has no values: write some such as 1,3,5 or 0..3":
        "网格：{name} 没有取值：请写如 1,3,5 或 0..3",
    "Grid: {name} has no effect on this request": "网格：{name} 对当前请求不起作用",
    "The grid has {n} pictures, more than {most}": "网格有 {n} 张图片，超过上限 {most}",
    "{n} pictures are waiting already: try again in a moment": "已有 {n} 个任务在等待：请稍后再试",
    "{name}: expected a whole number, got {value}": "{name}：需要整数，得到 {value}",
    "{name}: expected {low} to {high}, got {value}": "{name}：应在 {low} 到 {high} 之间，得到 {value}",
    "The {name} has {n} characters, more than {most}": "{name} 有 {n} 个字符，超过上限 {most}",
    "Height x width {size} is not possible: {why}. The nearest size is {near} (height x width)":
        "无法绘制高 x 宽 {size}：{why}。最接近的尺寸是 {near}（高 x 宽）",
    "A picture of {size} (height x width) that was enlarged already: no further stage enlarges it":
        "{size}（高 x 宽）的图片已放大过：没有更高的放大阶段",
    "Nothing here enlarges a picture of {size} (height x width)": "没有能放大 {size}（高 x 宽）图片的模型",
    "This is no whole PNG file, so no settings can be read from it": "这不是完整的 PNG 文件，无法读取设置",
    "This picture holds no settings: it was not drawn here, or another program saved it":
        "图片中没有设置：它不是在这里绘制的，或被其他程序重新保存过",
    "The picture is an enlarged one: steps and guidance are the first stage's usual ones.":
        "这是放大后的图片：步数和引导强度使用第一阶段的默认值。",
    "The picture is from another model, {name}: this one draws it differently.":
        "图片来自另一个模型 {name}：当前模型的结果会不同。",
    "It was drawn with the LoRA {name}, which is not offered here.": "它使用了此处没有的 LoRA {name}。",
    "It was drawn with the sampler {name}, which is not offered here.": "它使用了此处没有的采样器 {name}。",
    "The server is closing": "服务器正在关闭",
}  # fmt: skip
"""Chinese by English. Braces stand for what a sentence names."""

CHINESE_TAG = "zh-CN"
"""Gradio's name of the language."""


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Templates with braces as patterns, the longest first."""
    templates = sorted((english for english in CHINESE if "{" in english), key=len, reverse=True)
    found = []
    for english in templates:
        parts = re.split(r"\{(\w+)\}", english)
        pattern = "".join(f"(?P<{part}>.+?)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
        found.append((re.compile(pattern, re.DOTALL), CHINESE[english]))
    return found


def translated(text: str, language: str) -> str:
    """``text``, an English sentence, in ``language``; as it is where the table has nothing for it."""
    if language != CHINESE_TAG:
        return text
    if text in CHINESE:
        return CHINESE[text]
    for pattern, chinese in _patterns():
        if match := pattern.fullmatch(text):
            return chinese.format(**{name: CHINESE.get(v, v) for name, v in match.groupdict().items()})
    return text
