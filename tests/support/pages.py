"""Pages as another reader sees them."""

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
