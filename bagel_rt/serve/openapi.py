"""The OpenAPI document of the server, for ``/openapi.json``."""

from typing import Any

from pydantic import BaseModel

from bagel_rt import __version__
from bagel_rt.serve.schema import Chat, Edit, Generation

_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": _TEXT, "code": _TEXT},
        }
    },
}
_FILES = {"type": "array", "items": {"type": "string", "format": "binary"}}


def document() -> dict[str, Any]:
    """The document: routes, and the fields of their bodies."""
    definitions: dict[str, Any] = {"Error": _ERROR}

    def reference(model: type[BaseModel]) -> dict[str, str]:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        definitions.update(schema.pop("$defs", {}))
        definitions[model.__name__] = schema
        return {"$ref": f"#/components/schemas/{model.__name__}"}

    json_type, form_type = "application/json", "multipart/form-data"
    paths = {
        "/v1/images/generations": _post("Generate images", json_type, reference(Generation)),
        "/v1/images/edits": _post("Edit images", form_type, reference(Edit)),
        "/v1/chat/completions": _post("Chat about texts and images", json_type, reference(Chat)),
        "/v1/models": _get("List the only model"),
        "/v1/models/{model}": _get("The only model", "model"),
        "/health": _get("Whether requests are accepted"),
        "/health/ready": _get("Whether requests are accepted"),
        "/health/live": _get("Whether the process works"),
        "/metrics": _get("Metrics in Prometheus' text format"),
    }
    definitions["Edit"]["properties"]["image"] = _FILES
    definitions["Edit"]["required"].append("image")
    return {
        "openapi": "3.1.0",
        "info": {"title": "bagel_rt", "version": __version__},
        "paths": paths,
        "components": {"schemas": definitions, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _post(summary: str, kind: str, schema: dict[str, str]) -> dict[str, Any]:
    body = {"required": True, "content": {kind: {"schema": schema}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _responses()}}


def _get(summary: str, *parameters: str) -> dict[str, Any]:
    named = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters]
    return {"get": {"summary": summary, "parameters": named, "responses": _responses()}}


def _responses() -> dict[str, Any]:
    error = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {"200": {"description": "Success"}, "default": error}
