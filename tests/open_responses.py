"""The types of Open Responses (the package openresponses-types) as a second check of what a Responses stream says."""

import json
from typing import Any

import openresponses_types
from openresponses_types import types
from pydantic import BaseModel, ValidationError

# What only OpenAI has, and the specification leaves to each provider.
OWN_ITEMS = {"image_generation_call", "custom_tool_call", "web_search_call"}
OWN_EVENTS = "response.custom_tool_call", "response.web_search_call", "keepalive"
# Its types want a schema to be null, where OpenAI repeats it; pydantic tells the union's other branches as well.
OTHERWISE = "text.format.", "response.text.format."
EVENTS: dict[str, type[BaseModel]] = {
    next(iter(kind.model_fields["type"].annotation)).value: kind  # type: ignore[union-attr, call-overload]
    for name, kind in vars(types).items()
    if name.endswith("StreamingEvent")
}


def open_findings(event: dict[str, Any]) -> list[str]:
    """What the specification refuses in an event."""
    if event["type"].startswith(OWN_EVENTS) or event.get("item", {}).get("type") in OWN_ITEMS:
        return []
    if "response" in event:
        output = [item for item in event["response"]["output"] if item["type"] not in OWN_ITEMS]
        event = event | {"response": event["response"] | {"output": output}}
    return refused(EVENTS[event["type"]], event)


def open_findings_of(response: dict[str, Any]) -> list[str]:
    """What the specification refuses in a response object."""
    output = [item for item in response["output"] if item["type"] not in OWN_ITEMS]
    return refused(openresponses_types.ResponseResource, response | {"output": output})


def refused(kind: type[BaseModel], value: dict[str, Any]) -> list[str]:
    try:
        kind.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors()]
        return [f"{path}: {told}" for path, told in found if not path.startswith(OTHERWISE)]
    return []
