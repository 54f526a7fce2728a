"""What classes say of their fields, in the docstrings under them: for the JSON Schema, and for options of commands."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import GenerateJsonSchema

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import core_schema


def docs_of(model: type) -> dict[str, str]:
    """Field -> the docstring under it, in a class or in one that it derives from.

    pydantic does so too (`use_attribute_docstrings`), but as each class is made: a third of the time that importing
    raysweep takes, in every process.
    """
    docs: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if "__annotations__" in vars(cls) and cls.__module__.partition(".")[0] != "pydantic":
            [tree] = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
            for field, said in pairwise(tree.body):  # type: ignore[attr-defined]
                match field, said:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        docs[name] = inspect.cleandoc(text)
    return docs


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of what a file may say, whose properties say what their fields do."""
    return model.model_json_schema(by_alias=True, schema_generator=_WithDocstrings)


class _WithDocstrings(GenerateJsonSchema):
    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        """Of one class, by its docstrings."""
        found = super().model_schema(schema)
        docs, fields = docs_of(schema["cls"]), schema["cls"].model_fields
        properties = found.get("properties", {})
        for name, text in docs.items():
            if name in fields and (said := properties.get(fields[name].alias or name)) is not None:
                said.setdefault("description", text)
        return found
