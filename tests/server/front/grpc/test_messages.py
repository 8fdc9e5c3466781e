"""The messages are those of the public protocols, and the descriptors are what the .proto files say."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2

from server.front.grpc.messages import DESCRIPTORS, POOL
from tests.torchserve_protos import FILES, compile_protos, read_wheel

OWN = ("open_inference.proto", "torchserve_inference.proto", "torchserve_management.proto")
Field = tuple[str, str, int, int, int]


def list_fields(messages: Sequence[Any], prefix: str = "") -> Iterator[Field]:
    """Yield message, field, number, type and label of all fields, those of nested messages too."""
    for message in messages:
        name = f"{prefix}{message.name}"
        yield from ((name, field.name, field.number, field.type, field.label) for field in message.field)
        yield from list_fields(message.nested_type, f"{name}.")


def list_rpcs(file: Any) -> set[tuple[str, str, bool, bool]]:
    """The methods of a file's services, with what streams."""
    return {
        (service.name, method.name, method.client_streaming, method.server_streaming)
        for service in file.service
        for method in service.method
    }


@pytest.mark.slow
def test_the_descriptors_are_current(tmp_path: Path) -> None:
    """`make protos` would change nothing."""
    made = compile_protos(DESCRIPTORS.parent, OWN, tmp_path / "made")
    committed = descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())
    assert {file.name: file for file in committed.file if file.name in OWN} == {name: made[name] for name in OWN}


def test_tritons_client_has_the_same_messages() -> None:
    """Every field and method of ours is in its descriptors, with the same number and type."""
    theirs = descriptor_pb2.FileDescriptorProto.FromString(service_pb2.DESCRIPTOR.serialized_pb)
    config = descriptor_pb2.FileDescriptorProto.FromString(service_pb2.DESCRIPTOR.dependencies[0].serialized_pb)
    ours = descriptor_pb2.FileDescriptorProto()
    POOL.FindFileByName("open_inference.proto").CopyToProto(ours)
    known = {*list_fields(theirs.message_type), *list_fields(config.message_type)}
    assert set(list_fields(ours.message_type)) <= known
    assert list_rpcs(ours) <= list_rpcs(theirs)
    types = next(each for each in config.enum_type if each.name == "DataType")
    assert next(each for each in ours.enum_type if each.name == "DataType") == types


@pytest.mark.slow
def test_torchserves_wheel_has_the_same_messages(tmp_path: Path) -> None:
    """Every field and method of its two services is here, with the same number and type, and no other."""
    theirs = read_wheel(tmp_path)
    for name, own in zip(FILES, OWN[1:], strict=True):
        ours = descriptor_pb2.FileDescriptorProto()
        POOL.FindFileByName(own).CopyToProto(ours)
        messages = [each for each in ours.message_type if each.name != "Status"]  # google.rpc's there
        assert set(list_fields(messages)) == set(list_fields(theirs[name].message_type))
        assert list_rpcs(ours) == list_rpcs(theirs[name])
        assert ours.package == theirs[name].package
