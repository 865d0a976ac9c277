"""The decision alone, in a loop, without the transport: ``python -m tests.benchmark.hot FOLDER CORE PROFILES ROUNDS``.

Handed the data directory of a stopped server, it puts a worker's DecisionService together over the same log, state,
champion and learner arrays, and asks it what callers asked: parse, check, queue, one turn of the loop, gather, decide,
reply, record queued. What counts is the CPU time of the loop's own thread; the commit thread's is told apart. Prints
one JSON object: microseconds a decision, one entry a round.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import uvloop

from server.catalog.compile import compile_catalog
from server.config import Settings
from server.decisioning.bundle_columns import bundle_columns
from server.decisioning.live import Live, Watcher, make_live
from server.decisioning.models import align, make_champion
from server.decisioning.service import DecisionService
from server.files import Files
from server.registry.blobs import Blobs
from server.registry.scorers import OnnxScorer
from server.roles import wall_us
from server.rpc import validate
from server.storage.committer import GroupCommitter
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.tokens import TokenKey
from tests.benchmark import world
from tsugi.v1.decision_service_pb2 import DecideRequest, DecisionAck, PlacementRequest

N_DECISIONS: Final = 2_000
TOGETHER: Final = 16
DEADLINE_S: Final = 60.0  # the first decision loads the kernels, and its time is held against those after it
GROWTH: Final = {"1k": (1_000, 300), "10k": (10_000, 60)}  # candidates, decisions a round
_BUILD: Final = "benchmark"
_DURABLE: Final = DecideRequest(
    placements=[PlacementRequest(placement=world.PLACEMENT)], decision_ack=DecisionAck.DECISION_ACK_DURABLE
)


class Hot:
    """A DecisionService over a stopped server's data, asked in a loop.

    Args:
        folder: the data directory.
        n_profiles: how many people it knows.
        make_service: what puts the service together.
    """

    def __init__(
        self, folder: Path, n_profiles: int, make_service: Callable[..., DecisionService] = DecisionService
    ) -> None:
        files, data = Files.below(folder), Settings().data
        log = LmdbLog(files.log, data.log_map_bytes)
        lives: list[Live] = []
        Watcher(log, Blobs(files.registry), files.arrays, _BUILD, lives.append).poll()
        self.live = lives[-1]
        self._committer = GroupCommitter(log, wall_us=wall_us, on_failure=_fail)
        self._service = make_service(
            log=log,
            store=LmdbStore(files.state, data.state_map_bytes),
            committer=self._committer,
            token_key=TokenKey(files.read_secret()),
            clock_us=self._clock_us,
        )
        self._messages: Iterator[bytes] = itertools.cycle(world.decide_messages(n_profiles))

    async def measure(self, live: Live, n_decisions: int, together: int, n_rounds: int) -> dict[str, list[float]]:
        """Return CPU microseconds a decision in each round, of the loop's thread and of the commit thread.

        Args:
            live: what to decide with.
            n_decisions: in a round; a multiple of together.
            together: requests that arrive in one turn of the loop.
            n_rounds: after one to warm up.
        """
        self._service.take(live)
        rounds: dict[str, list[float]] = {"loop": [], "commit": []}
        for n_round in range(1 + n_rounds):
            # When it is answered, all before it is on disk.
            await self._service.decide(_DURABLE, _DURABLE.SerializeToString(), DEADLINE_S)
            loop_ns, all_ns = time.thread_time_ns(), time.process_time_ns()
            for _ in range(n_decisions // together):
                await self._ask(together)
            loop_ns, all_ns = time.thread_time_ns() - loop_ns, time.process_time_ns() - all_ns
            if n_round > 0:
                rounds["loop"].append(loop_ns / 1000 / n_decisions)
                rounds["commit"].append((all_ns - loop_ns) / 1000 / n_decisions)
        return rounds

    def start(self) -> None:
        """Begin to commit; called on the loop."""
        self._committer.start(asyncio.get_running_loop())

    def close(self) -> None:
        """Commit what is queued, and stop."""
        self._committer.close()

    async def run(self, n_rounds: int) -> dict[str, dict[str, list[float]]]:
        """Measure one by one, sixteen together, and over more candidates."""
        self.start()
        results = {
            "alone": await self.measure(self.live, N_DECISIONS, 1, n_rounds),
            "together": await self.measure(self.live, N_DECISIONS, TOGETHER, n_rounds),
        }
        for name, (n_actions, n_decisions) in GROWTH.items():
            results[name] = await self.measure(_larger(n_actions), n_decisions, 1, n_rounds)
        self.close()
        return results

    async def _ask(self, together: int) -> None:
        waiters = []
        for raw in itertools.islice(self._messages, together):
            request = DecideRequest.FromString(raw)
            validate.decide_request(request)
            waiters.append(self._service.decide(request, raw, DEADLINE_S))
        for waiter in waiters:
            await waiter

    def _clock_us(self) -> int:
        """Stand still where the learner stopped, so that nothing is stale; without a learner, go on."""
        return self.live.models.learned_time_us or wall_us()


def _larger(n_actions: int) -> Live:
    """Put a live set of the same world with more actions together."""
    message = world.catalog_message(n_actions)
    catalog = compile_catalog(message)
    bundle = world.make_bundle(catalog)
    columns = bundle_columns(bundle.manifest, catalog)
    champion = make_champion(catalog, bytes(32), bundle.manifest.goal, columns, OnnxScorer(bundle))
    return make_live(catalog, align(catalog, champion, world.make_arrays(catalog)), 1, 1, _BUILD)


def _fail() -> None:
    raise RuntimeError("the log failed")


def main() -> None:
    """Measure and print."""
    folder, core, n_profiles, n_rounds = sys.argv[1:]
    os.sched_setaffinity(0, {int(core)})
    results = uvloop.run(Hot(Path(folder), int(n_profiles)).run(int(n_rounds)))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main()
