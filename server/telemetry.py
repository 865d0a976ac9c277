"""What the program tells about itself: every metric in one typed list, and structured logs.

A metric is one line here (name, kind, unit in the name, closed label set, meaning) and a call where it happens; the
type checker refuses a name that is not listed. No label and no log field ever holds personal data.

The processes of one server share a folder of metric files, named by PROMETHEUS_MULTIPROC_DIR before this module is
imported; the supervisor serves their sum.
"""

from __future__ import annotations

import os
from typing import Any
from wsgiref.simple_server import WSGIServer

import orjson
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

_LATENCY_BUCKETS = tuple(step * 10.0**power for power in range(-5, 1) for step in (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
_LAG_BUCKETS = (
    0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0,
)  # fmt: skip

DECISIONS = Counter("tsugi_decisions", "Decisions answered")
DECIDE_SECONDS = Histogram(
    "tsugi_decide_seconds", "From a Decide's arrival to its reply, the oldest of each flush", buckets=_LATENCY_BUCKETS
)
DECIDE_COMPUTE_SECONDS = Counter("tsugi_decide_compute_seconds", "Time spent deciding on the event loop")
DECIDE_FLUSHES = Counter("tsugi_decide_flushes", "Groups of requests decided together")
DECIDE_QUEUE = Gauge("tsugi_decide_queue_requests", "Requests waiting for the next flush", multiprocess_mode="livesum")
DEGRADATIONS = Counter("tsugi_degradations", "Troubles of ours that replies survived", ["degradation"])
ERRORS = Counter("tsugi_errors", "Calls and batch items refused", ["reason"])
RECORDS_ACCEPTED = Counter("tsugi_records_accepted", "Records on disk", ["kind"])
COMMIT_SECONDS = Histogram("tsugi_commit_seconds", "One group commit", buckets=_LATENCY_BUCKETS)
COMMIT_RECORDS = Counter("tsugi_commit_records", "Records committed, all groups")
COMMIT_QUEUE = Gauge("tsugi_commit_queue_records", "Drafts waiting for a commit", multiprocess_mode="livesum")
LOG_MAP_USED = Gauge("tsugi_log_map_used_share", "Share of the log's map in use; raise data.log_map_bytes above 0.7",
                     multiprocess_mode="livemax")  # fmt: skip
APPLIED_LSN = Gauge("tsugi_applied_lsn", "Last log record the state includes", multiprocess_mode="livemax")
RECORDS_QUARANTINED = Counter("tsugi_records_quarantined", "Log records set aside by the projector")
LEARNED_LSN = Gauge(
    "tsugi_learned_lsn", "Last log record the published learner arrays include", multiprocess_mode="livemax"
)
LEARNING_LAG_SECONDS = Histogram(
    "tsugi_learning_lag_seconds",
    "From the log time of the outcome that waited longest to a worker's use of the first arrays that learned from it",
    buckets=_LAG_BUCKETS,
)
LEARNER_BEHIND_RECORDS = Gauge(
    "tsugi_learner_behind_records", "Log records that the learner has yet to read", multiprocess_mode="livemax"
)
LEARNER_BEHIND_SECONDS = Gauge(
    "tsugi_learner_behind_seconds", "Log time from the last record the learner has read to the newest",
    multiprocess_mode="livemax",
)  # fmt: skip
SWAPS = Counter("tsugi_swaps", "Catalogs, champions or learner arrays taken into use", ["what"])
CHOICE_ENTROPY = Gauge(
    "tsugi_choice_entropy", "How evenly a placement's last 1,000 or so choices lie over actions, 0 to 1",
    ["placement"], multiprocess_mode="livemin",
)  # fmt: skip
LEARNER_LOSS = Gauge(
    "tsugi_learner_loss", "Mean log loss of the learner that serves a goal and of the baseline, before learning",
    ["goal", "role"], multiprocess_mode="livemax",
)  # fmt: skip
LEARNER_SERVING = Gauge(
    "tsugi_learner_serving", "Number of the learner that serves a goal; 0 is the baseline", ["goal"],
    multiprocess_mode="livemax",
)  # fmt: skip
LEARNER_FAMILY = Gauge(
    "tsugi_learner_family", "1 for the family of the learner that serves a goal, 0 for the others", ["goal", "family"],
    multiprocess_mode="livemax",
)  # fmt: skip
LEARNER_CHANGES = Gauge(
    "tsugi_learner_changes", "Promotions and demotions since the goal was met", ["goal", "kind"],
    multiprocess_mode="livemax",
)  # fmt: skip
LEARNER_CALIBRATION = Gauge(
    "tsugi_learner_calibration", "Rewards that came / that the learner that serves expected, of its last 3,000 or so",
    ["goal"], multiprocess_mode="livemax",
)  # fmt: skip
ALARMS = Counter("tsugi_alarms", "Times that a bound was crossed which somebody should look at", ["alarm"])
ROLE_STARTS = Counter("tsugi_role_starts", "Starts of process roles", ["role"])


def serve_metrics(port: int, address: str) -> WSGIServer:
    """Serve the sum of all processes' metrics over HTTP and return the server; called by the supervisor alone."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # the library states no types here
    server, _ = start_http_server(port, address, registry)
    return server


def forget_process(pid: int) -> None:
    """Drop a dead process's live gauges; its counters stay."""
    mark_process_dead(pid)  # type: ignore[no-untyped-call]  # the library states no types here


def configure_logs(role: str) -> None:
    """Write one JSON object a line to standard error, stamped with the process role."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(),
            structlog.processors.JSONRenderer(serializer=_json),
        ],
        logger_factory=structlog.BytesLoggerFactory(file=_standard_error()),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(role=role, pid=os.getpid())


def _json(event: object, **_: object) -> bytes:
    return orjson.dumps(event, default=str)


def _standard_error() -> Any:
    return os.fdopen(os.dup(2), "wb", buffering=0)
