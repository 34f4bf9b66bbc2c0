"""What can be told of a page without a browser: that it needs nothing else, and that its drawings hold their words.

Owns the reading of the page's HTML. Widths of words are estimates, on the wide side, for a font that nobody has loaded
here; what a browser really draws is ``tests.support.browser``'s.
"""

import re
from dataclasses import dataclass
from html.parser import HTMLParser
from xml.etree import ElementTree

NARROW, WIDE, OTHER = 0.36, 0.92, 0.58
"""Widths of letters over the font's size, on the wide side of system fonts."""
FONT_SIZES = {"tick": 12.0, "cell": 12.0, "inside": 12.0}
"""By the class of a text in page.css; 13 for all others."""
FETCHES = ("src", "href", "xlink:href", "srcset", "data", "poster", "action")
"""Attributes that make a browser ask for something."""
FETCHING = ("script", "link", "img", "iframe", "object", "embed", "video", "audio", "image", "use", "base")
"""Tags that do, or that run."""


@dataclass(frozen=True)
class Chart:
    """A figure's drawing: how many shapes it has, and its words that leave it or are no larger than a speck."""

    shapes: int
    texts: int
    outside: list[str]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in FETCHING:
            self.wrong.append(f"<{tag}>")
        for name, value in attrs:
            if (name in FETCHES and not (value or "").startswith("#")) or name.startswith("on"):
                self.wrong.append(f"{name}={value}")
        if tag not in ("meta", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")


def needs(html: str) -> list[str]:
    """What the page asks of a network or runs, and tags that do not match; empty for one that stands alone."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    return [*reader.wrong, *reader.open, *re.findall(r"@import[^;]*|url\([^)]*\)", style)]


def charts(html: str) -> dict[str, Chart]:
    """The drawing of every figure with an id; it must be XML that a strict reader takes."""
    found = {}
    for name, inner in re.findall(r'<figure id="([^"]+)"[^>]*>(.*?)</figure>', html, re.DOTALL):
        (svg,) = re.findall(r"<svg.*?</svg>", inner, re.DOTALL)
        found[name] = _chart(ElementTree.fromstring(svg))
    return found


def _chart(svg: ElementTree.Element) -> Chart:
    left, top, width, height = (float(number) for number in svg.attrib["viewBox"].split())
    outside, texts = [], list(svg.iter("text"))
    for text in texts:
        words, size = "".join(text.itertext()), FONT_SIZES.get(text.attrib["class"].split()[0], 13.0)
        long = size * sum(_width(letter) for letter in words)
        start = float(text.attrib["x"]) - {"start": 0.0, "middle": long / 2, "end": long}[text.attrib["text-anchor"]]
        base = float(text.attrib["y"])
        is_inside = left <= start and start + long <= left + width and top <= base - 0.8 * size
        if not (is_inside and base + 0.25 * size <= top + height):
            outside.append(words)
    shapes = [item for tag in ("rect", "path", "circle") for item in svg.iter(tag)]
    return Chart(len(shapes), len(texts), outside)


def _width(letter: str) -> float:
    return NARROW if letter in " iljtfrI.,:;'()|" else WIDE if letter in "mwMW%@" else OTHER


def schemes(html: str) -> tuple[set[str], set[str], set[str]]:
    """Names of the colours that the page uses, and those that its light and its dark scheme define."""
    style = "".join(re.findall(r"<style>(.*?)</style>", html, re.DOTALL))
    dark = re.search(r"@media \(prefers-color-scheme: dark\) \{(.*?\})\s*\}", style, re.DOTALL)
    assert dark is not None, "no dark scheme"
    light = style[: dark.start()]
    return set(re.findall(r"var\((--\w+)\)", style)), *(set(re.findall(r"(--\w+):", text)) for text in (light, dark[1]))
