"""One way from a request body to a checked Struct, and from a fault to the field it lies in.

Ranges and shapes are written once, as `msgspec.Meta` on the Struct's fields: they validate, they
appear in the OpenAPI description, and their `description` completes the sentence "<field> must be".
"""

import re
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from shared.errors import InvalidRequest

__all__ = ("decode_body", "expectation")

S = TypeVar("S", bound=msgspec.Struct)

_AT = re.compile(r"^(?P<what>.*?) - at (?P<key>`key` in )?`\$(?P<path>[^`]*)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]+)`$")
_SEGMENT = re.compile(r"\.([^.\[]+)|\[([^\]]*)\]")


def decode_body(decoder: msgspec.json.Decoder[S], body: bytes) -> S:
    """Decode a body into the decoder's Struct.

    Raises:
        InvalidRequest: the body is not UTF-8, not JSON, or not what the Struct asks for; `param`
            names the field.
    """
    try:
        # msgspec skips fields it does not know without looking at their bytes.
        body.decode()
        return decoder.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid UTF-8: byte {error.start} is {error.reason}."
        ) from error
    except msgspec.ValidationError as error:
        raise _fault(str(error), decoder.type) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest("The body is nested too deeply.") from error


def _fault(text: str, struct: type) -> InvalidRequest:
    """Turn msgspec's sentence into ours, naming the field and what would be right."""
    match = _AT.match(text)
    what = match["what"] if match else text
    path = match["path"] if match else ""
    if missing := _MISSING.match(what):
        param = f"{path}.{missing['field']}".lstrip(".")
        wanted = expectation(struct, param)
        suffix = f"; it must be {wanted}" if wanted else ""
        return InvalidRequest(f"Missing required field '{param}'{suffix}.", param=param)
    param = path.lstrip(".")
    if not param:
        return InvalidRequest(f"The body must be a JSON object: {what[0].lower()}{what[1:]}.")
    wanted = expectation(struct, param)
    found = f"{what[0].lower()}{what[1:]}"
    if match and match["key"]:
        found = f"a key of it: {found}"
    if wanted:
        return InvalidRequest(f"'{param}' must be {wanted} ({found}).", param=param)
    return InvalidRequest(f"'{param}': {found}.", param=param)


def expectation(kind: Any, path: str) -> str:
    """The description of the type that lies at `path` under `kind`; empty if it has none."""
    kinds = [kind]
    for match in _SEGMENT.finditer(f".{path}"):
        name = match[1]
        kinds = [
            child
            for candidate in kinds
            for branch in _branches(candidate)
            for child in (_field(branch, name) if name else _items(branch))
        ]
    if described := next((text for candidate in kinds if (text := _describe(candidate))), ""):
        return described
    allowed = dict.fromkeys(repr(value) for candidate in kinds for value in _literals(candidate))
    return f"{'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}"


def _literals(kind: Any) -> list[Any]:
    return [
        value
        for branch in _branches(kind)
        if get_origin(branch) is Literal
        for value in get_args(branch)
    ]


def _branches(kind: Any) -> list[Any]:
    """The plain types a type may stand for: unions opened, annotations taken off."""
    if get_origin(kind) is Annotated:
        return _branches(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [branch for part in get_args(kind) for branch in _branches(part)]
    return [kind]


def _field(kind: Any, name: str) -> list[Any]:
    if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return []
    if name == kind.__struct_config__.tag_field:
        return [Literal[kind.__struct_config__.tag]]
    hints = get_type_hints(kind, include_extras=True)
    return [hints[f.name] for f in msgspec.structs.fields(kind) if f.encode_name == name]


def _items(kind: Any) -> list[Any]:
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return [arguments[1]]
    return [arguments[0]] if get_origin(kind) in (list, tuple) else []


def _describe(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        for extra in get_args(kind)[1:]:
            if isinstance(extra, msgspec.Meta) and extra.description:
                return extra.description
        return _describe(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return next((text for part in get_args(kind) if (text := _describe(part))), "")
    return ""
