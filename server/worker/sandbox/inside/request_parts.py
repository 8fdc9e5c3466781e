"""A request as handlers get it: the dict of its parts, and that of its headers. In a child.

As recorded of TorchServe 0.12 and Multi Model Server 1.1. A body is one part, `body`; a form's fields and files are a
part each, and so are the parameters that a dialect names. The headers hold the content type of each part beside the
request's own fields. A part is its value where it is JSON, `str` where it is text, and else a bytearray.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from server.code_messages import CodeRequest, decode_fields

JSON, FORM, MULTIPART, BYTES = (
    "application/json", "application/x-www-form-urlencoded", "multipart/form-data", "application/octet-stream"
)  # fmt: skip
MAX_PARTS = 1000  #: of one request
_decode_json = msgspec.json.Decoder().decode
_JSON_BODY = {"body": JSON}  #: nobody changes it
SPELT = {"sagemaker": "SageMaker"}  #: words of header names whose first letter is not their only capital


class BadParts(ValueError):
    """A body is no form although its content type says so; the message is for the client."""


class RequestHeaders(dict[str, Any]):
    """The fields of a request's head by their usual spelling; a look-up does not mind the case, as in HTTP."""

    def __missing__(self, key: str) -> Any:
        lower = key.lower()
        for name, value in self.items():
            if name.lower() == lower:
                return value
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or the default."""
        try:
            return self[key]
        except KeyError:
            return default

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self.get(key) is not None)


def read_parts(request: CodeRequest) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The parts, and the content type of each. Raises BadParts."""
    if request.content_type == JSON and not request.parts:  # as it mostly is
        return {"body": _read_json_body(request.body)}, _JSON_BODY
    data: dict[str, Any] = {}
    types: dict[str, str] = {}
    for name, value in request.parts:
        data[name], types[name] = bytearray(value.encode()), ""
    for name, content_type, raw in _split_body(request):
        data[name], types[name] = read_value(raw, content_type), content_type
    return data, types


def read_headers(request: CodeRequest, types: Mapping[str, str]) -> RequestHeaders:
    """The content type of each part, and the fields of the request's head."""
    headers = RequestHeaders((name, {"content-type": content_type}) for name, content_type in types.items())
    headers |= read_fields(request)
    return headers


def read_fields(request: CodeRequest) -> RequestHeaders:
    """The fields of the request's head, and what the dialect adds to them."""
    fields = RequestHeaders(request.properties)
    if request.fields is None:
        known = (("Content-Type", request.content_type), ("Accept", request.accept))
        fields.update((name, value) for name, value in known if value)
        return fields
    fields.update((_spell(name), value) for name, value in decode_fields(request.fields).items())
    if not request.body and "content-length" not in fields:
        fields["content-length"] = "0"
    return fields


def read_value(value: bytes, content_type: str) -> Any:
    """A part by its type. JSON that is malformed stays a bytearray, so that the handler may refuse it."""
    media = content_type.lower()
    if media == JSON:
        return _read_json_body(value)
    if media.startswith("text/"):
        return value.decode(errors="replace")
    return bytearray(value)


def _split_body(request: CodeRequest) -> Iterable[tuple[str, str, bytes]]:
    """Name, content type and bytes of each part of the body. Raises BadParts."""
    media, _, parameters = request.content_type.partition(";")
    media = media.strip()
    if media.lower() == FORM:
        return _split_form(request.body)
    if media.lower() == MULTIPART:
        return _split_multipart(request.body, _find_boundary(parameters))
    return (("body", media, request.body),)


def _split_form(body: bytes) -> Iterator[tuple[str, str, bytes]]:
    try:
        pairs = parse_qsl(body.decode("latin-1"), keep_blank_values=True, encoding="latin-1", max_num_fields=MAX_PARTS)
    except ValueError as error:
        raise BadParts(f"the form cannot be read: {error}") from error
    for name, value in pairs:
        yield name.encode("latin-1").decode(errors="replace"), "", value.encode("latin-1")


def _find_boundary(parameters: str) -> bytes:
    for each in parameters.split(";"):
        name, _, value = each.partition("=")
        if name.strip().lower() == "boundary" and value.strip():
            return b"--" + value.strip().strip('"').encode("latin-1")
    raise BadParts("multipart/form-data says no boundary")


def _split_multipart(body: bytes, boundary: bytes) -> Iterator[tuple[str, str, bytes]]:
    """RFC 7578. A file without a type is bytes; a field without one has none."""
    pieces = (b"\r\n" + body).split(b"\r\n" + boundary, MAX_PARTS + 2)[1:]
    if not pieces or not pieces[-1].startswith(b"--"):
        raise BadParts(f"the multipart body does not end with its boundary, or has more than {MAX_PARTS} parts")
    for piece in pieces[:-1]:
        head, blank, value = piece.partition(b"\r\n\r\n")
        fields = _split_fields(head)
        disposition = _read_parameters(fields.get("content-disposition", ""))
        if not blank or "name" not in disposition:
            raise BadParts("a part of the multipart body has no Content-Disposition with a name")
        usual = BYTES if "filename" in disposition else ""
        yield disposition["name"], fields.get("content-type", usual).partition(";")[0].strip(), value


def _split_fields(head: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in head.decode(errors="replace").split("\r\n"))
    return {name.strip().lower(): value.strip() for name, _, value in lines}


def _read_parameters(value: str) -> dict[str, str]:
    """The parameters of a field, such as `form-data; name="a"; filename="b"`; a quoted value may hold a semicolon."""
    found, rest = dict[str, str](), value.partition(";")[2]
    while rest:
        name, _, rest = rest.partition("=")
        rest = rest.lstrip()
        if rest.startswith('"'):
            text, _, rest = rest[1:].partition('"')
            rest = rest.partition(";")[2]
        else:
            text, _, rest = rest.partition(";")
        found[name.strip().lower()] = text.strip()
    return found


def _read_json_body(value: bytes) -> Any:
    """What `json.loads` gives, in a third of its time; the bytes where it is no JSON.

    What msgspec refuses is read by `json`, which takes more: NaN, other encodings than UTF-8, lone surrogates.
    """
    try:
        return _decode_json(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return bytearray(value)


@lru_cache(1024)
def _spell(name: str) -> str:
    """A header's name as clients write it: the listener has it in lower case."""
    return "-".join(SPELT.get(word, word.capitalize()) for word in name.split("-"))
