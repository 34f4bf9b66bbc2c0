"""A page as a person's browser shows it: headless Chromium opens a file and tells what it has drawn.

Owns finding the browser and the script that looks at the page. Without a browser, tests skip and say so.
"""

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any, Literal

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
LAPTOP = (1366, 768)

PROBE = """
<script>
function boxOf(element) {
  const box = element.getBoundingClientRect();
  return [box.left, box.top, box.right, box.bottom];
}
function overlap(a, b) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  return width > 1 && height > 3;
}
addEventListener("load", () => {
  const figures = [...document.querySelectorAll("figure[id]")].map((figure) => {
    const svg = figure.querySelector("svg"), frame = boxOf(svg);
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, boxOf(text)]);
    const clashes = [];
    for (let i = 0; i < texts.length; i++) {
      for (let j = 0; j < i; j++) if (overlap(texts[i][1], texts[j][1])) clashes.push([texts[i][0], texts[j][0]]);
    }
    const outside = texts.filter(([_, box]) => box[0] < frame[0] - 1 || box[2] > frame[2] + 1 || box[3] > frame[3] + 1);
    const drawn = [...svg.querySelectorAll("rect, path, circle")].filter((shape) => {
      const box = boxOf(shape);
      return box[2] > box[0] && getComputedStyle(shape).fill !== "rgb(0, 0, 0)";
    });
    return {id: figure.id, width: frame[2] - frame[0], height: frame[3] - frame[1], drawn: drawn.length,
            texts: texts.map(([words]) => words), clashes: clashes, outside: outside.map(([words]) => words),
            smallest: Math.min(...texts.map(([_, box]) => box[3] - box[1]))};
  });
  const style = getComputedStyle(document.body);
  const result = document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify({figures: figures, ink: style.color, paper: style.backgroundColor,
    pageWidth: document.documentElement.scrollWidth, windowWidth: innerWidth,
    fetched: performance.getEntriesByType("resource").map((entry) => entry.name)});
  document.body.append(result);
});
</script>
"""


@dataclass(frozen=True)
class Seen:
    """What the browser drew.

    Attributes:
        figures: of every ``figure`` with an id: size, shapes, words, words that overlap or leave the drawing.
        ink: red, green and blue of the text, 0 to 255.
        paper: of the background.
        page_width: of all that there is, in pixels.
        window_width: of what a person sees without scrolling sideways.
        fetched: addresses that the page asked for.
    """

    figures: dict[str, dict[str, Any]]
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    page_width: int
    window_width: int
    fetched: list[str]

    @property
    def contrast(self) -> float:
        """Of ink on paper, 1 to 21, as WCAG 2 defines it; 4.5 is enough for text."""
        bright, dark = sorted((_luminance(self.ink), _luminance(self.paper)), reverse=True)
        return (bright + 0.05) / (dark + 0.05)


def find_browser() -> str:
    """Path of a Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"no browser to look at the page with (none of {', '.join(NAMES)} is on PATH): `apt install chromium` on "
            "Debian, or any Chrome; what needs no browser has been checked by test_page_stands_alone_..."
        )
    return found


def look(page: Path, scheme: Literal["light", "dark"], window: tuple[int, int] = LAPTOP) -> Seen:
    """Open a file on a laptop's screen."""
    browser = find_browser()
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "page.html"
        probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
        command = [
            browser, *FLAGS, f"--user-data-dir={folder}/profile", f"--window-size={window[0]},{window[1]}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--dump-dom", probed.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    table = json.loads(unescape(match[1]))
    return Seen(
        figures={figure["id"]: figure for figure in table["figures"]},
        ink=_rgb(table["ink"]),
        paper=_rgb(table["paper"]),
        page_width=table["pageWidth"],
        window_width=table["windowWidth"],
        fetched=table["fetched"],
    )


def _rgb(css: str) -> tuple[int, int, int]:
    red, green, blue = (int(number) for number in re.findall(r"\d+", css)[:3])
    return red, green, blue


def _luminance(rgb: tuple[int, int, int]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
