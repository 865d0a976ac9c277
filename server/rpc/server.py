"""One worker's listeners: many gRPC servers on one port, in one event loop.

A gRPC server in Python hands over one request a turn of the loop. Several of them on the same port, each with its own
socket, hand over several, which are then decided together: that is worth a factor of two at load and costs a lone
caller nothing. Everything here is public API.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from server.rpc.methods import MESSAGE_BYTES_MAX, SERVICES

CONNECTION_IDLE_MS_MAX: Final = 300_000
KEEPALIVE_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 10_000
PING_INTERVAL_MS_MIN: Final = 10_000
STREAMS_MAX: Final = 100
CALLS_MAX: Final = 2_048  # at once, each listener
DRAIN_POLL_S: Final = 0.02


class Listening(NamedTuple):
    """Where and how to listen."""

    address: str
    port: int
    listeners: int
    connection_age_ms_max: int
    connection_age_grace_ms: int
    reflection: bool


class Server:
    """The listeners of one worker, started and drained together.

    Args:
        handlers: of every method, see methods.handlers.
        listening: where.
    """

    def __init__(
        self, handlers: Mapping[str, dict[str, grpc.RpcMethodHandler[Any, Any]]], listening: Listening
    ) -> None:
        self._listening = listening
        self._health = health.aio.HealthServicer()
        self._servers = [self._listener(handlers) for _ in range(listening.listeners)]

    async def start(self) -> None:
        """Begin to accept calls; health says SERVING."""
        for server in self._servers:
            await server.start()
        await self.set_health(serving=True)

    async def set_health(self, *, serving: bool) -> None:
        """Tell callers whether to come here."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(service.full_name for service in SERVICES)):
            await self._health.set(name, state)

    async def drain(self, is_orphan: Callable[[], bool]) -> None:
        """Stop taking new connections, let the present ones end by their age, then stop: no accepted call fails.

        Health turns first; then the listening sockets are shut, so that new connections go to other workers; every
        connection is told to go away when its age is reached and has a grace to finish its calls. Stopping earlier
        would cancel them.

        Args:
            is_orphan: says that nobody looks after this worker any more; then calls have a second to finish.
        """
        await self.set_health(serving=False)
        sockets = _own_sockets(self._listening.port)
        for listener in sockets.listening:
            with contextlib.suppress(OSError):  # shut already
                listener.shutdown(socket.SHUT_RD)
        sockets.close()
        loop = asyncio.get_running_loop()
        # A tenth is the library's jitter of the age.
        age_ms = 1.1 * self._listening.connection_age_ms_max + self._listening.connection_age_grace_ms
        until = loop.time() + age_ms / 1000 + 0.5
        while loop.time() < until and not is_orphan():
            sockets = _own_sockets(self._listening.port)
            n_connected = len(sockets.connected)
            sockets.close()
            if not n_connected:
                break
            await asyncio.sleep(DRAIN_POLL_S)
        await asyncio.gather(*(server.stop(1.0) for server in self._servers))

    def _listener(self, handlers: Mapping[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]) -> grpc.aio.Server:
        listening = self._listening
        server = grpc.aio.server(
            maximum_concurrent_rpcs=CALLS_MAX,
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_concurrent_streams", STREAMS_MAX),
                ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS_MAX),
                ("grpc.max_connection_age_ms", listening.connection_age_ms_max),
                ("grpc.max_connection_age_grace_ms", listening.connection_age_grace_ms),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_INTERVAL_MS_MIN),
                ("grpc.keepalive_permit_without_calls", 0),
                ("grpc.server_handshake_timeout_ms", 10_000),
                # Compressed requests could be small on the wire and vast in memory.
                ("grpc.compression_enabled_algorithms_bitset", 1),
            ],
        )
        for service, methods in handlers.items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
            server.add_registered_method_handlers(service, methods)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if listening.reflection:
            names = (*(service.full_name for service in SERVICES), health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        host = f"[{listening.address}]" if ":" in listening.address else listening.address
        bound = server.add_insecure_port(f"{host}:{listening.port}")
        assert bound == listening.port, "the supervisor has reserved the port"
        return server


class _Sockets(NamedTuple):
    listening: list[socket.socket]
    connected: list[socket.socket]

    def close(self) -> None:
        for each in (*self.listening, *self.connected):
            each.close()


def _own_sockets(port: int) -> _Sockets:
    """Return duplicates of this process's sockets on a port; gRPC gives no handle to its own."""
    sockets = _Sockets([], [])
    # All names first: a duplicate takes the lowest free number, and must not be met on the way as one of gRPC's.
    for name in [name for name in os.listdir("/proc/self/fd") if _is_socket(name)]:  # noqa: PTH208  # fastest
        try:
            duplicate = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # gone since
            continue
        try:
            is_ours = duplicate.family in {socket.AF_INET, socket.AF_INET6} and duplicate.getsockname()[1] == port
            is_listening = is_ours and duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listening:
                sockets.listening.append(duplicate)
                continue
            if is_ours:
                duplicate.getpeername()
                sockets.connected.append(duplicate)
                continue
        except OSError:  # bound or shut, but not connected
            pass
        duplicate.close()
    return sockets


def _is_socket(name: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{name}").startswith("socket:")  # noqa: PTH115  # fastest
    except OSError:  # gone since, as the folder's own descriptor is
        return False
