"""OpenAI's published schemas (data/openai_api.json) as a check of what the gateway answers."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend


def readable(node: Any) -> Any:
    """The schema as JSON Schema reads it: unions in it overlap, so oneOf is anyOf; `nullable` is "or null"."""
    if isinstance(node, list):
        return [readable(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {("anyOf" if key == "oneOf" else key): readable(value) for key, value in node.items()}
    return {"anyOf": [made, {"type": "null"}]} if made.pop("nullable", False) is True else made


@lru_cache
def components() -> dict[str, Any]:
    api = json.loads((Path(__file__).parent / "data" / "openai_api.json").read_text())
    found: dict[str, Any] = readable(api["components"])
    return found


def says_type(branch: dict[str, Any], said: Any) -> bool:
    """Whether that `type` is one that a branch of a union names."""
    named = branch.get("$ref", "").rpartition("/")[2]
    schema = components()["schemas"][named] if named else branch
    return said in schema.get("properties", {}).get("type", {}).get("enum", ())


def any_of(validator: Any, branches: list[Any], value: Any, schema: Any) -> Iterator[ValidationError]:
    """`anyOf` as ever, but first the branch that says the value's own `type`: there are unions of fifty."""
    said = value.get("type") if isinstance(value, dict) else None
    likely = [branch for branch in branches if said and says_type(branch, said)]
    if not any(next(validator.descend(value, branch), None) is None for branch in likely):
        yield from Draft202012Validator.VALIDATORS["anyOf"](validator, branches, value, schema)


Validator = extend(Draft202012Validator, {"anyOf": any_of})


@lru_cache
def validator(schema: str) -> Any:
    assert schema in components()["schemas"], schema
    return Validator({"$ref": f"#/components/schemas/{schema}", "components": components()})


def findings(value: Any, schema: str) -> list[str]:
    """What OpenAI's schema of that name refuses in a value: one line each, with its path."""
    return [told(error) for error in validator(schema).iter_errors(value)]


def told(error: ValidationError) -> str:
    """The problem of the union's branch that says the value's own `type`, else of the one that got deepest."""
    branches: dict[Any, list[ValidationError]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    named = [b for b in branches.values() if not any(list(e.path)[-1:] == ["type"] for e in b)]
    if named:
        return told(max(min(named, key=len), key=lambda e: len(e.absolute_path)))
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
    return f"{path or 'value'}: {error.message[:300]}"
