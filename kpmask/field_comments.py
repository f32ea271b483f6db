"""The comments beside a settings class's fields, as the descriptions that forms show.

What a field means is said once, beside it in the source; `pydantic` would want it said again.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from functools import cache


@cache
def field_comments(cls: type) -> dict[str, str]:
    """The comment above or behind each annotated field of a class and of those it inherits from.

    Where there is no source, as in a frozen program, there are no comments.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        found |= _own_comments(base)
    return found


def _own_comments(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        (tree,) = ast.parse(source).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    if not isinstance(tree, ast.ClassDef):
        return {}
    above, behind = _comments(source)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and _is_public(node.target):
            first = node.lineno
            while first - 1 in above:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            words = [above.get(n) or behind.get(n) for n in lines]
            if text := " ".join(word for word in words if word):
                found[ast.unparse(node.target)] = text
    return found


def _is_public(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and not target.id.startswith("_")


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """The comments by line: those that have a line of their own, and those behind code."""
    above: dict[int, str] = {}
    behind: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (above if alone else behind)[token.start[0]] = token.string.lstrip("# ").rstrip()
    return above, behind
