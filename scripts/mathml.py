"""A hook of mkdocs: formulas between dollars become MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Replace what arithmatex marked."""
    content = INLINE.sub(lambda found: convert(html.unescape(found[1].strip())), content)
    return DISPLAY.sub(
        lambda found: f'<div class="formula">{convert(html.unescape(found[1].strip()), display="block")}</div>', content
    )
