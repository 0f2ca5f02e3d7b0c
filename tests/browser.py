"""A page in headless Chromium: what does not fit, what cannot be read, and a screenshot."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any, Literal

Scheme = Literal["light", "dark"]

# Runs after the page is laid out, and tells the frame around it what it found.
_LOOK = """
<script>
addEventListener("load", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
  const width = document.documentElement.clientWidth, wide = [], cut = [], faint = [];
  const inScroll = e => e.parentElement && e.parentElement.closest(".scroll");
  const light = text => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const name = e => e.tagName + "." + e.className + ": " + (e.textContent || "").slice(0, 40);
  for (const e of document.querySelectorAll("body *")) {
    if (/SCRIPT|STYLE|TITLE/i.test(e.tagName) || e.closest("svg") && e.tagName !== "svg") continue;
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!box.width || style.display === "none") continue;
    if ((box.right > width + 1 || box.left < -1) && !inScroll(e)) wide.push(name(e));
    if (/hidden|clip/.test(style.overflowX) && e.scrollWidth > e.clientWidth + 1) cut.push(name(e));
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (own) {
      const a = light(style.color), b = light(behind(e));
      const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      if (contrast < 4.5) faint.push(name(e) + " " + contrast.toFixed(1));
    }
  }
  for (const e of document.querySelectorAll("svg text")) {
    const box = e.getBoundingClientRect(), around = e.ownerSVGElement.getBoundingClientRect();
    const beyond = [around.left - box.left, box.right - around.right, box.bottom - around.bottom];
    if (Math.max(...beyond) > 1)
      cut.push("svg text: " + e.textContent);
  }
  const broken = [...document.images].filter(i => !i.naturalWidth).map(i => i.alt);
  const scrolls = [...document.querySelectorAll(".scroll")]
    .filter(e => e.scrollWidth > e.clientWidth + 1).length;
  const thin = [...document.querySelectorAll(".track")].filter(e =>
    e.getBoundingClientRect().width < e.parentElement.getBoundingClientRect().width / 3)
    .map(e => name(e.previousElementSibling));
  const found = {width, page: document.documentElement.scrollWidth, wide, cut, faint, broken,
    thin, scrolls, background: light(getComputedStyle(document.body).backgroundColor)};
  parent.postMessage(JSON.stringify(found), "*");
});
</script>
"""
# A window is at least 500 pixels wide; a frame in it may be as narrow as a phone.
_FRAME = """<!doctype html><html><body style="margin: 0">
<iframe src="{page}" style="border: 0; display: block; width: {width}px; height: {height}px">
</iframe><script>
addEventListener("message", told => document.body.setAttribute("data-found", told.data));
</script></body></html>
"""
HEIGHT = 3600


def chromium() -> str | None:
    """The browser's command, if there is one."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def look(page: Path, width: int, scheme: Scheme, folder: Path) -> dict[str, Any]:
    """Open a page; what was found, and `screenshot`, a file in the folder.

    wide: elements beyond the window's edges. cut: those with hidden content. faint: texts of a
    contrast under 4.5 (WCAG 2.2, AA). broken: pictures that do not show. thin: bars with less than
    a third of their plot's width to grow in. scrolls: how many tables have to be scrolled sideways.
    background: its luminance.
    """
    copy = folder / f"{page.stem}-{width}-{scheme}.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{_LOOK}</body>"))
    frame = folder / f"{copy.stem}-frame.html"
    frame.write_text(_FRAME.format(page=copy.as_uri(), width=width, height=HEIGHT))
    told = _run(frame, width, scheme, "--dump-dom")
    found = re.search(r'data-found="([^"]*)"', told)
    assert found, "the browser did not run the page"
    screenshot = copy.with_suffix(".png")
    _run(frame, width, scheme, f"--screenshot={screenshot}")
    return json.loads(unescape(found[1])) | {"screenshot": screenshot}


def _run(page: Path, width: int, scheme: Scheme, *arguments: str) -> str:
    command = chromium()
    assert command
    return subprocess.run(
        [
            *(command, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--virtual-time-budget=3000", f"--window-size={width},{HEIGHT}"),
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            *(f"--user-data-dir={page.parent / 'profile'}", *arguments, page.as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
