"""Comments beside fields, and the schema of a form that is made with them."""

from __future__ import annotations

import ast
import inspect

from kpmask import config
from kpmask.field_comments import field_comments
from kpmask.model_config import Part, PositiveInt


class Base(Part):
    """A docstring with a # hash: it is none."""

    # Above it, and
    # on a second line.
    first: int = 1
    second: str = "# no comment"
    # Of no field.

    third: PositiveInt = 3  # behind it
    fourth: tuple[
        int,  # inside
        str,
    ] = (1, "")


class Derived(Base):
    second: str = ""  # said here
    nested: Base = Base()

    def method(self) -> int:
        # In a method.
        local: int = 1  # of a local variable
        return local


def test_comments_above_behind_and_inside() -> None:
    assert field_comments(Base) == {
        "first": "Above it, and on a second line.",
        "third": "behind it",
        "fourth": "inside",
    }


def test_inherited_comments_and_those_over_them() -> None:
    assert field_comments(Derived) == field_comments(Base) | {"second": "said here"}


def test_what_has_no_source_has_no_comments() -> None:
    made = type("Made", (), {"__annotations__": {"x": int}})
    assert field_comments(made) == {}
    assert field_comments(int) == {}


def test_the_schema_has_them_as_descriptions() -> None:
    schema = Derived.model_json_schema()
    assert schema["properties"]["second"]["description"] == "said here"
    assert schema["properties"]["third"]["exclusiveMinimum"] == 0
    assert "description" not in schema["$defs"]["Base"]["properties"]["second"]
    assert schema["$defs"]["Base"]["properties"]["third"]["description"] == "behind it"


def test_every_comment_beside_a_setting_of_preprocessing_is_in_its_form() -> None:
    """Counted another way: lines of the classes' sources that are a field and have a `  # `."""
    parts = [config.PreprocessJob, config.Clips, config.Download, config.Retry, config.Subject]
    for part in parts:
        fields = part.model_json_schema()["properties"]
        for line in inspect.getsource(part).splitlines():
            code, mark, words = line.partition("  # ")
            if mark and code.strip():
                (field,) = ast.parse(code.strip()).body
                assert isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                assert fields[field.target.id]["description"].endswith(words)
