"""The echo: what the transport alone costs. ``python -m tests.benchmark.echo REPLY CORE [--same-transport]``.

It parses every DecideRequest and answers with one constant DecideResponse, read from a file: a real reply of the server
under test. The stock echo is what anybody would write, one grpc.aio server on uvloop; ``--same-transport`` gives it the
recipe our workers use, sixteen listeners on the port and SCHED_BATCH.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


async def _serve(reply: bytes, listeners: int) -> None:
    import grpc  # noqa: PLC0415  # after the scheduling policy is set, as in our workers

    from tsugi.v1.decision_service_pb2 import DecideRequest, DecideResponse  # noqa: PLC0415  # as late as grpc

    answer = DecideResponse.FromString(reply)

    async def decide(request: DecideRequest, context: object) -> DecideResponse:
        return answer

    method = grpc.unary_unary_rpc_method_handler(decide, DecideRequest.FromString, DecideResponse.SerializeToString)
    handlers = grpc.method_handlers_generic_handler("tsugi.v1.DecisionService", {"Decide": method})
    servers, port = [], 0
    for _ in range(listeners):
        server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        servers.append(server)
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await servers[0].wait_for_termination()


def main() -> None:
    """Serve until killed."""
    os.sched_setaffinity(0, {int(sys.argv[2])})
    is_same_transport = "--same-transport" in sys.argv
    if is_same_transport:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    import uvloop  # noqa: PLC0415  # starts no thread, but belongs after the policy like all else

    uvloop.run(_serve(Path(sys.argv[1]).read_bytes(), 16 if is_same_transport else 1))


if __name__ == "__main__":
    main()
