"""A hook of mkdocs: formulas between dollars become MathML, which browsers show without a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Replace what arithmatex marked.

    Raises:
        PluginError: a command of TeX's that the converter does not know, and would show as it is.
    """

    def shown(found: re.Match[str], display: str) -> str:
        text = html.unescape(found[1].strip())
        made = convert(text, display=display)
        if "\\" in made:
            raise PluginError(f"{page.file.src_uri}: a formula that cannot be shown: {text}")
        return made

    content = INLINE.sub(lambda found: shown(found, "inline"), content)
    return DISPLAY.sub(lambda found: f'<div class="formula">{shown(found, "block")}</div>', content)
