from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import ConfigError, Settings, as_environment, load

SECTIONS = msgspec.structs.fields(Settings)
NAMES = [f"{section.name}.{key.name}" for section in SECTIONS for key in msgspec.structs.fields(section.type)]


def value_of(settings: Settings, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(settings, section), key)


def faults(tmp_path: Path, text: str | bytes = "", **environment: str) -> list[str]:
    path = tmp_path / "tsugi.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path, environment)
    assert str(caught.value) == "; ".join(caught.value.faults)
    return caught.value.faults


def test_defaults_are_embedded_and_safe() -> None:
    settings, origins = load(None, {})
    assert settings == Settings()
    assert settings.serve.address == "127.0.0.1"
    assert origins == dict.fromkeys(NAMES, "default")


def test_file_overrides_defaults_and_environment_overrides_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tsugi.toml"
    path.write_text(
        """
        [serve]
        port = 7500
        workers = 3
        [data]
        dir = "/srv/tsugi/データ"
        [commit]
        wait_ms_max = 2
        """,
        "utf-8",
    )
    environment = {
        "TSUGI_SERVE_WORKERS": "5",
        "TSUGI_LEARNER_ENABLED": "false",
        "TSUGI_COMMIT_QUEUE_RECORDS_MAX": "1_000",
        "HOME": "/root",
        "TSUGI_ADDRESS": "the caller's command knows this one",
    }
    settings, origins = load(path, environment)
    assert (settings.serve.port, settings.serve.workers, settings.data.dir) == (7500, 5, "/srv/tsugi/データ")
    assert (settings.commit.wait_ms_max, settings.commit.queue_records_max) == (2.0, 1_000)
    assert not settings.learner.enabled
    assert {name: origin for name, origin in origins.items() if origin != "default"} == {
        "serve.port": "file",
        "serve.workers": "TSUGI_SERVE_WORKERS",
        "data.dir": "file",
        "commit.wait_ms_max": "file",
        "commit.queue_records_max": "TSUGI_COMMIT_QUEUE_RECORDS_MAX",
        "learner.enabled": "TSUGI_LEARNER_ENABLED",
    }


@pytest.mark.parametrize(
    "folder", ["data", "/srv/a b", "2024", "true", "2024-01-01", "1.5", "a#b", 'a"b', "'a'", "[a]"]
)
def test_text_from_the_environment_is_taken_as_it_is(folder: str) -> None:
    assert load(None, {"TSUGI_DATA_DIR": folder})[0].data.dir == folder.strip("'")


def test_unknown_section_key_and_variable_are_named(tmp_path: Path) -> None:
    assert faults(tmp_path, "port = 1\n[server]\nport = 1\n[serve]\nprot = 1\n", TSUGI_SERVE_PROT="1") == [
        "[port]: no such section",
        "[server]: no such section",
        "serve.prot: no such setting",
        "TSUGI_SERVE_PROT: no such setting",
    ]


@pytest.mark.parametrize("environment", [{}, {"TSUGI_SERVE_WORKERS": "2"}])
@pytest.mark.parametrize("text", ["serve = 5", "[[serve]]\nport = 1", "serve = 'x'"])
def test_section_that_is_none_is_named(tmp_path: Path, text: str, environment: dict[str, str]) -> None:
    (fault,) = faults(tmp_path, text, **environment)
    assert fault.startswith("[serve]: a section is required")


@pytest.mark.parametrize(
    ("name", "literal", "wanted"),
    [
        ("serve.port", '"7410"', "`int`"),
        ("serve.port", "7410.0", "`int`"),
        ("serve.port", "true", "`int`"),
        ("serve.reflection", "1", "`bool`"),
        ("serve.address", "127", "`str`"),
        ("data.dir", "[]", "`str`"),
        ("commit.wait_ms_max", '"5 ms"', "`float`"),
        ("learner.enabled", '"yes"', "`bool`"),
    ],
)
def test_value_of_another_type_is_named_with_its_origin(tmp_path: Path, name: str, literal: str, wanted: str) -> None:
    section, key = name.split(".")
    (fault,) = faults(tmp_path, f"[{section}]\n{key} = {literal}\n")
    assert fault.startswith(f"{name}: Expected {wanted}")
    assert fault.endswith("from file")
    if wanted != "`str`":  # what is no text in a variable is taken as text where one is wanted
        variable = f"TSUGI_{section}_{key}".upper()
        (fault,) = faults(tmp_path, **{variable: literal})
        assert fault.startswith(f"{name}: Expected {wanted}")
        assert fault.endswith(f"from {variable}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("serve.port", -1), ("serve.port", 65_536), ("serve.metrics_port", 65_536), ("serve.workers", 257),
        ("serve.listeners", 0), ("serve.connection_age_ms_max", 99), ("serve.connection_age_grace_ms", -1),
        ("data.log_map_bytes", 1 << 19), ("data.state_map_bytes", 1 << 47),
        ("commit.wait_ms_max", -0.1), ("commit.wait_ms_max", "nan"), ("commit.wait_ms_max", "inf"),
        ("commit.queue_records_max", 15), ("decide.deadline_ms_default", 0), ("decide.queue_requests_max", 0),
        ("learner.publish_ms_min", 9), ("learner.snapshot_ms_min", 99),
    ],
)  # fmt: skip
def test_impossible_value_is_named_with_its_bounds(tmp_path: Path, name: str, value: float | str) -> None:
    section, key = name.split(".")
    (fault,) = faults(tmp_path, f"[{section}]\n{key} = {value}\n")
    assert fault.startswith(f"{name}: ")
    assert fault.endswith(f", got {value}")
    assert " to " in fault


def test_every_number_has_bounds_that_its_default_keeps() -> None:
    settings = Settings()
    for section in SECTIONS:
        for key in msgspec.structs.fields(section.type):
            if key.type in {int, float}:
                with pytest.raises(ConfigError, match=f"{section.name}.{key.name}: .* to .*, got -1"):
                    load(None, as_environment(settings) | {f"TSUGI_{section.name}_{key.name}".upper(): "-1"})


def test_pairs_that_cannot_be_are_named(tmp_path: Path) -> None:
    assert faults(tmp_path, "[serve]\nport = 7000\nmetrics_port = 7000\n") == [
        "serve.port and serve.metrics_port: both are 7000; one port serves one of them"
    ]
    assert load(None, {"TSUGI_SERVE_PORT": "0", "TSUGI_SERVE_METRICS_PORT": "0"})[0].serve.port == 0


def test_data_folder_without_a_name_is_refused(tmp_path: Path) -> None:
    assert faults(tmp_path, TSUGI_DATA_DIR="") == ["data.dir: a folder is required, got nothing"]


@pytest.mark.parametrize(
    "address", ["0.0.0.0", "::", "10.0.0.7", "192.168.1.1", "example.org", "", " 127.0.0.1", "127.0.0.1:7410", "[::1]"]
)
def test_address_that_is_not_loopback_is_refused_with_the_reason(tmp_path: Path, address: str) -> None:
    (fault,) = faults(tmp_path, f"[serve]\naddress = '{address}'\n")
    assert fault == (
        f"serve.address: {address} is not a loopback address; Tsugi has no access control yet, "
        "so it listens on 127.0.0.1, ::1 or localhost only"
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "localhost"])
def test_loopback_address_is_taken(address: str) -> None:
    assert load(None, {"TSUGI_SERVE_ADDRESS": address})[0].serve.address == address


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = """
        [serve]
        port = "x"
        workers = 1000
        colour = "red"
        address = "0.0.0.0"
        [commit]
        wait_ms_max = -1
        queue_records_max = true
        [shop]
        """
    told = faults(tmp_path, text, TSUGI_DECIDE_DEADLINE_MS_DEFAULT="soon", TSUGI_LEARNER_COLOUR="red")
    assert [fault.split(": ")[0] for fault in told] == [
        "serve.colour", "[shop]", "TSUGI_LEARNER_COLOUR",
        "serve.port", "commit.queue_records_max", "decide.deadline_ms_default",
        "serve.workers", "commit.wait_ms_max", "serve.address",
    ]  # fmt: skip


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[serve", b"port = ", b"a = 1\na = 2"])
def test_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    (fault,) = faults(tmp_path, text)
    assert fault.startswith(f"{tmp_path / 'tsugi.toml'}: ")


def test_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml: .*No such file"):
        load(tmp_path / "absent.toml", {})


def test_environment_of_the_process_is_read_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSUGI_SERVE_WORKERS", "7")
    assert load(None)[0].serve.workers == 7


FOLDERS = st.text(st.characters(exclude_characters="\0", codec=None), min_size=1)


@given(FOLDERS, st.floats(0, 1_000), st.booleans(), st.integers(0, 65_535), st.sampled_from(["127.0.0.1", "::1"]))
def test_settings_handed_to_a_child_process_are_the_same_there(
    folder: str, wait_ms: float, is_enabled: bool, port: int, address: str
) -> None:
    defaults = Settings()
    settings = Settings(
        serve=msgspec.structs.replace(
            defaults.serve, port=port, metrics_port=0, address=address, reflection=is_enabled
        ),
        data=msgspec.structs.replace(defaults.data, dir=folder, log_map_bytes=1 << 40),
        commit=msgspec.structs.replace(defaults.commit, wait_ms_max=wait_ms),
        learner=msgspec.structs.replace(defaults.learner, enabled=is_enabled),
    )
    again, origins = load(None, as_environment(settings))
    assert again == settings
    assert all(value_of(again, name) == value_of(settings, name) for name in NAMES)
    assert set(origins.values()) == set(as_environment(settings))
