from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from server import files as files_module
from server.files import Files, OwnedError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_created_directory_is_for_its_owner_alone_and_holds_a_secret(tmp_path: Path) -> None:
    files = Files.below(tmp_path / "data")
    files.create()
    assert [mode(path) for path in (files.root, files.registry, files.learner, files.secret.parent)] == [0o700] * 4
    for secret in (files.secret, files.receipt_key):
        assert mode(secret) == 0o600
        assert len(secret.read_bytes()) == 32
    assert {path.name for path in files.secret.parent.iterdir()} == {files.secret.name, files.receipt_key.name}


def test_secret_is_made_once_for_ever_and_differs_between_installations(tmp_path: Path) -> None:
    files, other = Files.below(tmp_path / "data"), Files.below(tmp_path / "other")
    files.create()
    other.create()
    secret = files.read_secret()
    files.create()
    assert files.read_secret() == secret != other.read_secret()


def test_paths_are_absolute_whatever_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Files.below("data").log == tmp_path.resolve() / "data" / "log"


def test_secret_gets_its_name_only_when_it_is_on_disk_and_its_name_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files.below(tmp_path / "data")
    steps: list[str] = []
    fsync, link = os.fsync, os.link

    def traced_fsync(handle: int) -> None:
        steps.append(f"fsync {Path(f'/proc/self/fd/{handle}').readlink().suffix or 'folder'}")
        fsync(handle)

    def traced_link(source: Path, target: Path) -> None:
        assert len(source.read_bytes()) == 32
        steps.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "link", traced_link)
    files.create()
    assert steps == ["fsync .unfinished", "link", "fsync folder"] * 2


def test_start_after_one_that_was_killed_while_it_made_the_secret_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files.below(tmp_path / "data")

    def killed(_handle: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            files.create()
    assert not files.secret.exists()
    files.create()
    assert len(files.read_secret()) == 32


def test_secret_that_somebody_else_made_meanwhile_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files.below(tmp_path / "data")
    fsync = os.fsync

    def traced_fsync(handle: int) -> None:
        if not files.secret.exists():
            files.secret.write_bytes(b"of the other one, which was here")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    files.create()
    assert files.read_secret() == b"of the other one, which was here"


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the one in memory; and the environment is put back."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(files_module, "MEMORY", folder)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    return folder


def test_what_ends_with_the_processes_lies_in_memory_and_is_made_anew(tmp_path: Path, memory: Path) -> None:
    files = Files.below(tmp_path / "data")
    files.create()
    files.create_volatile()
    assert files.metrics.resolve().is_relative_to(memory)
    assert os.environ["PROMETHEUS_MULTIPROC_DIR"] == str(files.metrics)
    assert mode(files.volatile.resolve()) == mode(files.metrics) == 0o700
    files.control.write_text("of an owner that was killed")
    files.create_volatile()
    assert not files.control.exists()
    assert len(list(memory.iterdir())) == 1
    files.remove_volatile()
    files.remove_volatile()
    assert list(memory.iterdir()) == []
    assert not files.volatile.is_symlink()


def test_without_memory_it_lies_in_the_data_directory(tmp_path: Path, memory: Path) -> None:
    memory.rmdir()
    files = Files.below(tmp_path / "data")
    files.create()
    for _ in range(2):
        files.create_volatile()
        assert files.metrics.is_dir()
        assert not files.volatile.is_symlink()
    files.remove_volatile()
    assert not files.volatile.exists()


@pytest.mark.parametrize("target", ["gone", "home"])
def test_folder_of_somebody_else_behind_the_link_is_left_alone(tmp_path: Path, memory: Path, target: str) -> None:
    files = Files.below(tmp_path / "data")
    files.create()
    (tmp_path / "home").mkdir()
    files.volatile.symlink_to(tmp_path / target)
    files.create_volatile()
    assert (tmp_path / "home").is_dir()
    assert files.volatile.readlink().parent == memory


def test_start_on_a_copy_leaves_what_the_running_server_uses(tmp_path: Path, memory: Path) -> None:
    running, copy = Files.below(tmp_path / "data"), Files.below(tmp_path / "copy")
    running.create()
    running.create_volatile()
    running.control.touch()
    shutil.copytree(running.root, copy.root, symlinks=True)
    copy.create_volatile()
    assert running.control.exists()
    assert copy.volatile.readlink() != running.volatile.readlink()
    copy.remove_volatile()
    running.remove_volatile()
    assert list(memory.iterdir()) == []


def test_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    files = Files.below(tmp_path)
    with files.own():
        with pytest.raises(OwnedError) as refusal:
            files.own()
        assert refusal.value.owner == str(os.getpid())
    files.own().close()
