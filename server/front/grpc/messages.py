"""The messages of the services, made from `protos/descriptors.binpb`, which `make protos` writes from the .proto files.

INVARIANT: they are in a pool of their own. Protobuf's common pool has room for one definition of a name, and a program
that imports a client of the same protocol, such as tritonclient, has one there already.
"""

from pathlib import Path
from typing import Any, cast

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

DESCRIPTORS = Path(__file__).parent / "protos" / "descriptors.binpb"


def make_pool(descriptors: bytes) -> DescriptorPool:
    """A pool of the files of a serialized FileDescriptorSet, in which files stand behind those that they import."""
    pool = DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(descriptors).file:
        pool.Add(file)
    return pool


POOL = make_pool(DESCRIPTORS.read_bytes())


def find_message(name: str) -> Any:
    """The class of a message by its full name. Its fields are known at run time alone, so it has no type."""
    return cast("Any", GetMessageClass(POOL.FindMessageTypeByName(name)))
