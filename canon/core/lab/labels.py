"""Names beside pictures: captions are no formulas, whatever dollars they have, may be Chinese, and may be long."""

from typing import Any

from matplotlib import font_manager

LONGEST = 60  # characters
CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "SimHei")
INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
TEXT: dict[str, Any] = {
    "parse_math": False,
    "fontfamily": ["DejaVu Sans", *(name for name in CHINESE if name in INSTALLED)],
}
"""How matplotlib is to draw what people wrote."""


def cut(name: str) -> str:
    """The beginning of a long one."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
