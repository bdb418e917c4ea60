"""Server reflection, versions v1 and v1alpha. Their messages differ only in the name of the package."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

__all__ = ["enable"]

_V1 = reflection.SERVICE_NAME.replace("v1alpha", "v1")


def enable(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Add reflection to the server, for these services (full names) and for reflection itself."""
    names = (*services, reflection.SERVICE_NAME, _V1)
    reflection.enable_server_reflection(names, server)
    # grpcio-reflection implements only v1alpha, and newer clients ask only for v1.
    _add_v1_descriptors()
    servicer = reflection.aio.ReflectionServicer(names)
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handler = grpc.method_handlers_generic_handler(_V1, {"ServerReflectionInfo": method})
    server.add_generic_rpc_handlers((handler,))


def _add_v1_descriptors() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("v1alpha", "v1")
    file = text_format.Parse(text, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
