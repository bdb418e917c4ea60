"""A client that knows nothing of this project: it builds its messages from the server's reflection.

Like grpcurl, it takes requests and gives answers as JSON, by protobuf's mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2

__all__ = ["ReflectionClient"]


class ReflectionClient:
    """Calls the unary methods of the services that a server reflects. A context manager.

    `version` is that of reflection, v1 or v1alpha: their messages are the same on the wire. `metadata` is
    what the questions to reflection carry.
    """

    def __init__(
        self,
        target: str,
        version: str = "v1",
        options: Sequence[tuple[str, int]] = (),
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._metadata = tuple(metadata)
        most = ("grpc.max_receive_message_length", 64 << 20)
        self.channel = grpc.insecure_channel(target, [most, *options])
        self._reflect = self.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()
        self._methods: dict[str, Any] = {}

    def __enter__(self) -> ReflectionClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def services(self) -> list[str]:
        """Return the names of the services that the server has."""
        answer = self._ask(reflection_pb2.ServerReflectionRequest(list_services="*"))
        return [service.name for service in answer.list_services_response.service]

    def method(self, name: str) -> Any:
        """Return the descriptor of a method, `package.Service/Method`."""
        if name not in self._methods:
            service, _, method = name.partition("/")
            request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
            self._learn(self._ask(request))
            self._methods[name] = self._pool.FindServiceByName(service).methods_by_name[method]
        return self._methods[name]

    def request(self, name: str, data: object) -> Any:
        """Return a method's request made of JSON data; raise json_format.ParseError where it is none."""
        kind = message_factory.GetMessageClass(self.method(name).input_type)
        return json_format.ParseDict(data, kind(), descriptor_pool=self._pool)  # type: ignore[arg-type]

    def call(self, name: str, data: object, **options: Any) -> dict[str, Any]:
        """Call a method with JSON data and return its answer as such; raise grpc.RpcError."""
        method = self.method(name)
        answer_kind = message_factory.GetMessageClass(method.output_type)
        answer = self.raw(name, self.request(name, data).SerializeToString(), **options)
        return json_format.MessageToDict(
            answer_kind.FromString(answer), preserving_proto_field_name=True, descriptor_pool=self._pool
        )

    def raw(self, name: str, payload: bytes, **options: Any) -> bytes:
        """Call a method with bytes as they are and return the answer's."""
        call = self.channel.unary_unary(f"/{name}", request_serializer=None, response_deserializer=None)
        return call(payload, timeout=options.pop("timeout", 20), **options)  # type: ignore[no-any-return]

    def _ask(self, request: Any) -> Any:
        [answer] = self._reflect(iter([request]), timeout=20, metadata=self._metadata)
        return answer

    def _learn(self, answer: Any) -> None:
        waiting = []
        for serialized in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(serialized)
            if file.name not in self._known:
                waiting.append((file, serialized))
        while waiting:
            ready = [entry for entry in waiting if set(entry[0].dependency) <= self._known]
            if not ready:
                missing = {name for file, _ in waiting for name in file.dependency} - self._known
                names = missing - {file.name for file, _ in waiting}
                for name in sorted(names):
                    request = reflection_pb2.ServerReflectionRequest(file_by_filename=name)
                    self._learn(self._ask(request))
                continue
            for entry in ready:
                self._pool.AddSerializedFile(entry[1])
                self._known.add(entry[0].name)
                waiting.remove(entry)
