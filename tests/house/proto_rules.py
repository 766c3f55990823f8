"""The rules of proto/baton/v1, after buf's STANDARD category and its COMMENTS for services and calls.

Read from descriptors that protoc makes, with their source places, so a broken rule names file and line.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

Place = tuple[int, ...]  # path into a FileDescriptorProto, as SourceCodeInfo has it

# Where we differ from buf's STANDARD, and why.
EXCEPTIONS = {
    "SERVICE_SUFFIX": "baton.v1.Inference, Transfer and Worker are public names without `Service` behind them",
}

_FLOATS = (FieldDescriptorProto.TYPE_DOUBLE, FieldDescriptorProto.TYPE_FLOAT)
_PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")
_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_UPPER = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")

# Numbers in FileDescriptorProto, DescriptorProto and so on, of which places are made.
_MESSAGE, _ENUM, _SERVICE = 4, 5, 6
_FIELD, _NESTED_MESSAGE, _NESTED_ENUM, _ONEOF, _VALUE, _CALL = 2, 3, 4, 8, 2, 2


def compile_protos(root: Path) -> FileDescriptorSet:
    """Descriptors of all .proto files under `root`. Raises ValueError with protoc's words where it refuses them."""
    sources = sorted(str(p.relative_to(root)) for p in root.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "set.pb"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", f"-I{files('grpc_tools') / '_proto'}"]
        command += ["--include_source_info", f"--descriptor_set_out={out}", *sources]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or "warning" in done.stderr:
            raise ValueError(done.stderr)
        return FileDescriptorSet.FromString(out.read_bytes())


def broken_rules(root: Path) -> list[str]:
    """One line a broken rule, in the form `file:line: RULE: what is wrong`."""
    found: list[str] = []
    uses: dict[str, str] = {}
    for file in compile_protos(root).file:
        locations = file.source_code_info.location
        lines = {tuple(at.path): at.span[0] + 1 for at in locations}
        comments = {tuple(at.path) for at in locations if at.leading_comments.strip()}
        for place, rule, what in _file_rules(file, comments, uses):
            found.append(f"{file.name}:{lines.get(place, 1)}: {rule}: {what}")
    return found


def _file_rules(
    file: FileDescriptorProto, comments: set[Place], uses: dict[str, str]
) -> Iterator[tuple[Place, str, str]]:
    directory = file.name.rpartition("/")[0]
    if file.package != directory.replace("/", "."):
        yield (2,), "PACKAGE_DIRECTORY_MATCH", f"package {file.package} lies in {directory}"
    if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*\.v\d+", file.package):
        yield (2,), "PACKAGE_VERSION_SUFFIX", f"package {file.package} should be lower case and end like .v1"
    if not _SNAKE.fullmatch(Path(file.name).stem):
        yield (), "FILE_LOWER_SNAKE_CASE", f"{file.name} should be lower_snake_case"
    if file.syntax != "proto3":
        yield (12,), "SYNTAX_SPECIFIED", f"syntax is {file.syntax or 'not given'}; it should be proto3"
    if file.public_dependency or file.weak_dependency:
        yield (3,), "IMPORT_NO_PUBLIC", "imports are neither public nor weak"
    for i, message in enumerate(file.message_type):
        yield from _message_rules(message, (_MESSAGE, i), comments)
    for i, enum in enumerate(file.enum_type):
        yield from _enum_rules(enum, (_ENUM, i))
    for i, service in enumerate(file.service):
        yield from _service_rules(service, (_SERVICE, i), comments, uses)


def _message_rules(message: DescriptorProto, place: Place, comments: set[Place]) -> Iterator[tuple[Place, str, str]]:
    if not _PASCAL.fullmatch(message.name):
        yield place, "MESSAGE_PASCAL_CASE", f"message {message.name} should be PascalCase"
    for i, field in enumerate(message.field):
        at = (*place, _FIELD, i)
        if not _SNAKE.fullmatch(field.name):
            yield at, "FIELD_LOWER_SNAKE_CASE", f"field {field.name} should be lower_snake_case"
        named = field.name.endswith(("seconds", "_ms", "_bytes"))
        if field.type in _FLOATS and not named and at not in comments:
            yield at, "FIELD_UNIT", f"field {field.name} says its unit neither in its name nor in a comment"
    for i, oneof in enumerate(message.oneof_decl):
        if not _SNAKE.fullmatch(oneof.name.removeprefix("_")):  # `optional` makes oneofs called _field
            yield (*place, _ONEOF, i), "ONEOF_LOWER_SNAKE_CASE", f"oneof {oneof.name} should be lower_snake_case"
    used = {f.number for f in message.field}
    reserved = {n for r in message.reserved_range for n in range(r.start, r.end)}
    gaps = sorted(set(range(1, max(used, default=0))) - used - reserved)
    if gaps:
        yield place, "FIELD_NUMBER_GAP", f"{message.name} neither uses nor reserves number {gaps[0]}"
    for i, nested in enumerate(message.nested_type):
        if not nested.options.map_entry:
            yield from _message_rules(nested, (*place, _NESTED_MESSAGE, i), comments)
    for i, enum in enumerate(message.enum_type):
        yield from _enum_rules(enum, (*place, _NESTED_ENUM, i))


def _enum_rules(enum: EnumDescriptorProto, place: Place) -> Iterator[tuple[Place, str, str]]:
    if not _PASCAL.fullmatch(enum.name):
        yield place, "ENUM_PASCAL_CASE", f"enum {enum.name} should be PascalCase"
    if enum.options.allow_alias:
        yield place, "ENUM_NO_ALLOW_ALIAS", f"enum {enum.name} gives one number two names"
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    for i, value in enumerate(enum.value):
        at = (*place, _VALUE, i)
        if not _UPPER.fullmatch(value.name):
            yield at, "ENUM_VALUE_UPPER_SNAKE_CASE", f"value {value.name} should be UPPER_SNAKE_CASE"
        if not value.name.startswith(prefix):
            yield at, "ENUM_VALUE_PREFIX", f"value {value.name} should begin with {prefix}"
        if value.number == 0 and value.name != f"{prefix}UNSPECIFIED":
            yield at, "ENUM_ZERO_VALUE_SUFFIX", f"value {value.name} should be {prefix}UNSPECIFIED"


def _service_rules(
    service: ServiceDescriptorProto, place: Place, comments: set[Place], uses: dict[str, str]
) -> Iterator[tuple[Place, str, str]]:
    if not _PASCAL.fullmatch(service.name):
        yield place, "SERVICE_PASCAL_CASE", f"service {service.name} should be PascalCase"
    if place not in comments:
        yield place, "COMMENT_SERVICE", f"service {service.name} has no comment"
    for i, call in enumerate(service.method):
        at = (*place, _CALL, i)
        if not _PASCAL.fullmatch(call.name):
            yield at, "RPC_PASCAL_CASE", f"rpc {call.name} should be PascalCase"
        if at not in comments:
            yield at, "COMMENT_RPC", f"rpc {call.name} has no comment"
        for kind, type_name in (("Request", call.input_type), ("Response", call.output_type)):
            name = type_name.rpartition(".")[2]
            if name not in (f"{call.name}{kind}", f"{service.name}{call.name}{kind}"):
                yield at, f"RPC_{kind.upper()}_STANDARD_NAME", f"{name} should be {call.name}{kind}"
            user = f"{service.name}.{call.name}"
            if uses.setdefault(type_name, user) != user:
                yield at, "RPC_REQUEST_RESPONSE_UNIQUE", f"{name} serves {uses[type_name]} and {user}"
