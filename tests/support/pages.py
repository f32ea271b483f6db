"""Pages as another reader sees them, and what a browser can tell of one."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = frozenset({"meta", "link", "img", "input", "br", "hr"})


class Page(HTMLParser):
    """What a page holds: elements with their attributes, its text, and its blocks of data."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.data: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "elements that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in {"script", "style"}:
            self.text += data
        elif self._open and self._open[-1] == "script":
            block = self.elements[-1][1].get("id", "")
            self.data[block] = self.data.get(block, "") + data

    def of(self, tag: str, **having: str) -> list[dict[str, str]]:
        return [
            attrs
            for name, attrs in self.elements
            if name == tag and all(attrs.get(key) == value for key, value in having.items())
        ]

    def programs(self) -> list[dict[str, str]]:
        """Scripts that run."""
        return [attrs for attrs in self.of("script") if attrs.get("type") != "application/json"]

    def links(self) -> list[str]:
        return [a[k] for _, a in self.elements for k in ("href", "src") if k in a]


# --- JavaScript expressions ------------------------------------------------------------------

# Whether nothing is wider than the screen. Not by innerWidth: a phone shows a page that is too wide
# from further away, so that it always fits.
FITS = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
# Controls that can be seen and are in the tab order; of radio buttons one a group.
CONTROLS = """
(() => {
  const known = "a[href], button, input, select, textarea, summary, video[controls], [tabindex]";
  return [...document.querySelectorAll(known)].filter((e) => {
    if (e.tabIndex < 0 || e.disabled) return false;
    if (!e.checkVisibility({ visibilityProperty: true })) return false;
    if (e.type !== "radio") return true;
    const group = [...document.querySelectorAll(`[name="${e.name}"]`)];
    return e === (group.find((other) => other.checked) ?? group[0]);
  });
})()
"""
# Whether the element with the focus says so, where one can see it: by a ring around it or around
# what stands for it, or in a drawing by a stroke.
SHOWS_FOCUS = """
((e) => {
  const box = e.getBoundingClientRect();
  const standIn = e.closest("label")?.querySelector(":focus-visible + *") ?? e;
  const ringed = [e, standIn].map((one) => getComputedStyle(one))
    .some((style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2);
  const stroked = e instanceof SVGElement && [...e.children].map((one) => getComputedStyle(one))
    .some((style) => style.stroke !== "none" && parseFloat(style.strokeWidth) >= 1.5);
  const below = box.bottom > 0 && box.top < innerHeight;
  const beside = box.right > 0 && box.left < innerWidth;
  return e.matches(":focus-visible") && (ringed || stroked) && below && beside;
})(document.activeElement)
"""
# Texts whose contrast with what is behind them is less than 4.5 (3 where they are large). What
# stands on a picture or a gradient is left out: its colour is not known.
FAINT_TEXTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) =>
    0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const ratio = (one, other) => {
    const [most, least] = [light(one), light(other)].sort((p, q) => q - p);
    return (most + 0.05) / (least + 0.05);
  };
  const above = function* (element) { for (let e = element; e; e = e.parentElement) yield e; };
  const behind = (element) => {
    const layers = [];
    for (const e of above(element)) {
      const style = getComputedStyle(e);
      if (style.backgroundImage !== "none") return null;
      const colour = rgba(style.backgroundColor);
      if (colour[3] > 0) layers.push(colour);
      if (colour[3] === 1) break;
      // A caption laid over its picture.
      if (style.position === "absolute" && e.parentElement.querySelector("img, video")) return null;
    }
    return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim();
    const element = walker.currentNode.parentElement;
    if (!text || /^(SCRIPT|STYLE|NOSCRIPT)$/.test(element.tagName)) continue;
    if (!element.checkVisibility({ visibilityProperty: true })) continue;
    const ground = behind(element);
    if (element.closest(".sr, .skip, :disabled") || !ground) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color);
    for (const e of above(element)) ink[3] *= Number(getComputedStyle(e).opacity);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const found = ratio(over(ink, ground), ground);
    if (found < (large ? 3 : 4.5)) faint.push(`${text.slice(0, 40)}: ${found.toFixed(2)}`);
  }
  return faint;
})()
"""
