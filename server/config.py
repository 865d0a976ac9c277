"""What an operator may choose: one TOML file, every key overridable from the environment, defaults embedded and safe.

``TSUGI_SECTION_KEY`` overrides ``key`` in ``[section]``. An unknown key, a wrong type or an impossible pair stops the
start with every fault listed. Other variables that begin with ``TSUGI_`` are not settings unless they name a section.
"""

from __future__ import annotations

import functools
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec


class ConfigError(Exception):
    """The settings cannot be used.

    Attributes:
        faults: every one of them.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = faults


class Serve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where and with how many processes the API is served."""

    address: str = "127.0.0.1"  # loopback only, until access control exists
    port: int = 7410  # 0: the system picks one
    metrics_port: int = 7411  # Prometheus text over HTTP; 0: none
    workers: int = 0  # 0: one a core
    listeners: int = 16  # listening sockets a worker; more of them gather more requests a turn
    connection_age_ms_max: int = 45_000  # connections are closed gracefully at this age, give or take a tenth
    connection_age_grace_ms: int = 5_000  # and their calls have this long to finish
    reflection: bool = True  # tells callers' tools which methods there are


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where everything is kept."""

    dir: str = "data"  # log, registry, state and keys; made when absent, for one server at a time
    log_map_bytes: int = 256 * 1024**3  # the most the log may ever hold; sparse
    state_map_bytes: int = 256 * 1024**3  # the same for the state


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How records are grouped on their way to the disk."""

    wait_ms_max: float = 5.0  # how long a record nobody waits for may wait for company
    queue_records_max: int = 8_192  # above it decisions are not recorded, and everything else is refused


class Decide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How decisions treat time and load."""

    deadline_ms_default: int = 250  # where the caller sets none
    queue_requests_max: int = 4_096  # above it requests are refused as OVERLOADED


class Learner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The learner process."""

    enabled: bool = True  # false: no learner process; decisions rest on champion and base rates
    publish_ms_min: int = 100  # at most this often are new arrays published
    snapshot_ms_min: int = 2_000  # at most this often is the learner's state made durable


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it."""

    serve: Serve = Serve()
    data: Data = Data()
    commit: Commit = Commit()
    decide: Decide = Decide()
    learner: Learner = Learner()


_BOUNDS: Final = {
    "serve.port": (0, 65_535),
    "serve.metrics_port": (0, 65_535),
    "serve.workers": (0, 256),
    "serve.listeners": (1, 64),
    "serve.connection_age_ms_max": (100, 3_600_000),
    "serve.connection_age_grace_ms": (0, 600_000),
    "data.log_map_bytes": (1 << 20, 1 << 46),
    "data.state_map_bytes": (1 << 20, 1 << 46),
    "commit.wait_ms_max": (0, 1_000),
    "commit.queue_records_max": (16, 1_000_000),
    "decide.deadline_ms_default": (1, 60_000),
    "decide.queue_requests_max": (1, 1_000_000),
    "learner.publish_ms_min": (10, 60_000),
    "learner.snapshot_ms_min": (100, 600_000),
}
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


def load(path: Path | None, environment: Mapping[str, str] | None = None) -> tuple[Settings, dict[str, str]]:
    """Read settings and return them with the origin of each: "default", "file" or the variable's name.

    Args:
        path: the TOML file; None: defaults and environment alone.
        environment: by default that of the process.

    Raises:
        ConfigError: with every fault.
    """
    environment = os.environ if environment is None else environment
    faults: list[str] = []
    given = _from_file(path, faults) if path is not None else {}
    given |= _from_environment(environment, faults)
    chosen: dict[str, dict[str, Any]] = {section: {} for section in Settings.__struct_fields__}
    for (section, key), (value, origin) in given.items():
        try:
            chosen[section][key] = msgspec.convert(value, _types()[section, key])
        except msgspec.ValidationError as error:
            faults.append(f"{section}.{key}: {error}, from {origin}")
    settings = Settings(**{field.name: field.type(**chosen[field.name]) for field in msgspec.structs.fields(Settings)})
    faults.extend(_faults(settings))
    if faults:
        raise ConfigError(faults)
    origins = {setting: origin for setting, (_, origin) in given.items()}
    return settings, {f"{section}.{key}": origins.get((section, key), "default") for section, key in _types()}


def as_environment(settings: Settings) -> dict[str, str]:
    """Return variables from which load gives these settings again, for processes this one starts."""
    return {_variable(section, key): _literal(getattr(getattr(settings, section), key)) for section, key in _types()}


_Setting = tuple[str, str]  # section and key
_Given = dict[_Setting, tuple[Any, str]]  # value and origin


def _from_file(path: Path, faults: list[str]) -> _Given:
    """Read the file's known settings; whatever else is wrong with it goes to faults."""
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        faults.append(f"{path}: {error}")
        return {}
    given: _Given = {}
    for section, entries in tree.items():
        if section not in Settings.__struct_fields__:
            faults.append(f"[{section}]: no such section")
        elif not isinstance(entries, dict):
            faults.append(f"[{section}]: a section is required, got {entries!r}")
        else:
            faults.extend(f"{section}.{key}: no such setting" for key in entries if (section, key) not in _types())
            given |= {(section, key): (value, "file") for key, value in entries.items() if (section, key) in _types()}
    return given


def _from_environment(environment: Mapping[str, str], faults: list[str]) -> _Given:
    """Read the settings among the variables; those that name a section and no setting of it go to faults."""
    names = {_variable(section, key): (section, key) for section, key in _types()}
    sections = tuple(_variable(section, "") for section in Settings.__struct_fields__)
    faults.extend(f"{name}: no such setting" for name in environment if name.startswith(sections) and name not in names)
    return {
        setting: (_plain(environment[name], _types()[setting]), name)
        for name, setting in names.items()
        if name in environment
    }


def _faults(settings: Settings) -> list[str]:
    faults = []
    for name, (least, most) in _BOUNDS.items():
        section, key = name.split(".")
        value = getattr(getattr(settings, section), key)
        if not least <= value <= most:
            faults.append(f"{name}: {least} to {most}, got {value}")
    if settings.serve.port and settings.serve.port == settings.serve.metrics_port:
        faults.append(f"serve.port and serve.metrics_port: both are {settings.serve.port}; one port serves one of them")
    if not settings.data.dir:
        faults.append("data.dir: a folder is required, got nothing")
    if settings.serve.address not in _LOOPBACK:
        faults.append(
            f"serve.address: {settings.serve.address} is not a loopback address; Tsugi has no access control yet, "
            "so it listens on 127.0.0.1, ::1 or localhost only"
        )
    return faults


@functools.cache
def _types() -> dict[_Setting, type]:
    return {
        (section.name, key.name): key.type
        for section in msgspec.structs.fields(Settings)
        for key in msgspec.structs.fields(section.type)
    }


def _variable(section: str, key: str) -> str:
    return f"TSUGI_{section}_{key}".upper()


def _literal(value: object) -> str:
    # Text, numbers and booleans TOML and JSON write the same, but for what JSON escapes in halves and TOML must escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _plain(text: str, wanted: type) -> Any:
    """Read a variable's text as TOML would: true, 5, 1.5, "text"; what is none of it stands for itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if wanted is str and not isinstance(value, str) else value
