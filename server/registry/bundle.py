"""What a pushed bundle is: its bytes taken apart, its manifest checked.

Runs in a worker, on bytes that anybody may have made: sizes come before parsing, and the graph inside is never looked
at here. That is done by ``gate.py`` in a disposable process, which this module starts and whose verdict it reads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from server.errors import TsugiError, Violation
from tsugi.log.v1.bundle_pb2 import Bundle, Feature, GoldenRows, Manifest, OutputKind
from tsugi.v1.error_reason_pb2 import ErrorReason

Floats = NDArray[np.float32]

BUNDLE_BYTES_MAX: Final = 64 * 1024 * 1024
MANIFEST_BYTES_MAX: Final = 256 * 1024
FORMAT_VERSION: Final = 1
FEATURES_MAX: Final = 512
GOLDEN_ROWS_MAX: Final = 256
NAME_BYTES_MAX: Final = 128
VIOLATIONS_MAX: Final = 64

_VERDICT_BYTES_MAX: Final = 64 * 1024  # what a pipe holds with nobody reading, so that the child never waits for us
_FLOAT32_MAX: Final = float(np.finfo(np.float32).max)
_SUGGESTIONS_MAX: Final = 16  # comparing names costs milliseconds, and a hostile manifest has 512 wrong ones

# Each field of a Bundle is one length-delimited section: its tag byte, its name, and the most it can hold.
_SECTIONS: Final = {
    0x0A: ("manifest", MANIFEST_BYTES_MAX),
    0x12: ("onnx_model", BUNDLE_BYTES_MAX),
    0x1A: ("golden_rows", 4 * GOLDEN_ROWS_MAX * (FEATURES_MAX + 1) + 16),
}

# Formats that are never read, by how they begin. None begins like a bundle, whose first byte is a tag from above.
_FORMATS: Final = {
    "a zip archive (or npz)": (b"PK",),
    "compressed": (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x78\x01", b"\x78\x9c", b"\x78\xda"),
    "an archive": (b"7z\xbc\xaf", b"Rar!"),
    "an array file": (b"\x93NUMPY", b"\x89HDF"),
    "a pickle": (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
}
_TAR_OFFSET: Final = 257

_VERDICTS: Final = {
    ErrorReason.Name(reason): reason
    for reason in (
        ErrorReason.ERROR_REASON_BUNDLE_MALFORMED,
        ErrorReason.ERROR_REASON_BUNDLE_FORMAT_REFUSED,
        ErrorReason.ERROR_REASON_BUNDLE_EXTERNAL_DATA,
        ErrorReason.ERROR_REASON_BUNDLE_OPERATOR_REFUSED,
        ErrorReason.ERROR_REASON_BUNDLE_TOO_COMPLEX,
        ErrorReason.ERROR_REASON_BUNDLE_CONTRACT_MISMATCH,
        ErrorReason.ERROR_REASON_BUNDLE_OUTPUT_INVALID,
        ErrorReason.ERROR_REASON_BUNDLE_TOO_SLOW,
        ErrorReason.ERROR_REASON_BUNDLE_CRASHED_VALIDATOR,
    )
}


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What the disposable process may take for one bundle.

    Attributes:
        memory_bytes: address space beyond the 160 MB of its libraries. Forests need 25 times their bytes, tables 7.
        cpu_s: seconds of processor time, imports not counted.
        wall_s: seconds from start to verdict, everything counted.
        score_us_max: processor time that scoring 100 rows may take.
    """

    memory_bytes: int = 2 * 1024 * 1024 * 1024
    cpu_s: int = 5
    wall_s: float = 20.0
    score_us_max: int = 5_000


GATE_LIMITS: Final = GateLimits()


def parse(data: bytes) -> Bundle:
    """Return the bundle that data is, complete and consistent in itself; its graph has not been looked at.

    Raises:
        TsugiError: BUNDLE_TOO_COMPLEX, BUNDLE_FORMAT_REFUSED, BUNDLE_MALFORMED, or BUNDLE_CONTRACT_MISMATCH with a
            violation for each fault of manifest and golden rows, at most VIOLATIONS_MAX.

    Cost: milliseconds, and two copies of data.
    """
    if len(data) > BUNDLE_BYTES_MAX:
        raise _too_complex("the bundle", len(data), BUNDLE_BYTES_MAX)
    _refuse_other_formats(data)
    _check_sections(data)
    try:
        bundle = Bundle.FromString(data)
    except DecodeError as error:
        raise _malformed("the bytes are not a tsugi.log.v1.Bundle message") from error
    if bundle.manifest.format_version != FORMAT_VERSION:
        path = "manifest.format_version"
        raise contract_mismatch([Violation(path, f"must be {FORMAT_VERSION}, is {bundle.manifest.format_version}")])
    for part in (bundle.manifest, bundle.golden_rows):
        size = part.ByteSize()
        part.DiscardUnknownFields()
        if part.ByteSize() != size:
            raise _malformed(f"the bundle holds fields that format version {FORMAT_VERSION} does not have")
    faults = [*_manifest_faults(bundle.manifest), *_golden_faults(bundle)]
    if faults:
        raise contract_mismatch(faults)
    return bundle


def check_in_sandbox(data: bytes, *, limits: GateLimits = GATE_LIMITS) -> None:
    """Return when the serialised bundle may serve: ``gate.py`` says so, in a process of its own that is gone again.

    Blocks; to be called in a thread, one call at a time. The thread must outlive the call, or the child dies with it.

    Raises:
        TsugiError: one of the BUNDLE_* reasons; BUNDLE_CRASHED_VALIDATOR when the child dies or exceeds a limit.

    Cost: about 0.4 s of a niced process for a small graph, half of it imports; at most limits.wall_s.
    """
    with (
        TemporaryDirectory(prefix="tsugi-gate-") as folder,
        # A file in memory and not a pipe: nothing blocks, whatever the child does.
        os.fdopen(os.memfd_create("bundle"), "w+b") as upload,
    ):
        Path(folder).chmod(0o500)
        upload.write(data)
        upload.seek(0)
        arguments = [str(os.getpid()), json.dumps(asdict(limits))]
        with subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-I", "-m", "server.registry.gate", *arguments],
            stdin=upload,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"OPENBLAS_NUM_THREADS": "1"},  # nothing of ours is in its environment; and it stays one thread
            start_new_session=True,
        ) as child:
            assert child.stdout is not None, "a pipe was asked for"
            try:
                status = child.wait(limits.wall_s)
            except subprocess.TimeoutExpired as error:
                raise crashed("wall-clock limit") from error
            finally:
                child.kill()
            verdict = os.read(child.stdout.fileno(), _VERDICT_BYTES_MAX)
    if status != 0:
        raise crashed({-signal.SIGXCPU: "processor time limit"}.get(status, "signal" if status < 0 else "no verdict"))
    if refusal := read_verdict(verdict):
        raise refusal


def read_verdict(verdict: bytes) -> TsugiError | None:
    """Read what the child wrote: None when the bundle passed. A child that a graph took over may have written it."""
    try:
        answer = json.loads(verdict)
        if answer == {}:
            return None
        violations = [Violation(str(path), str(description)) for path, description in answer["violations"]]
        metadata = {str(name): str(value) for name, value in answer["metadata"].items()}
        return TsugiError(_VERDICTS[answer["reason"]], str(answer["message"]), violations=violations, **metadata)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return crashed("no verdict")


def crashed(how: str) -> TsugiError:
    """Build the refusal of a bundle that the disposable process did not survive."""
    message = f"the process that checked the bundle ended without passing it: {how}"
    return TsugiError(ErrorReason.ERROR_REASON_BUNDLE_CRASHED_VALIDATOR, message, how=how)


def golden_rows(bundle: Bundle) -> tuple[Floats, Floats]:
    """Return the golden inputs, float32[n, d], and outputs, float32[n], of a parsed bundle, as read-only views."""
    rows: GoldenRows = bundle.golden_rows
    outputs = np.frombuffer(rows.outputs, "<f4")
    return np.frombuffer(rows.inputs, "<f4").reshape(outputs.size, len(bundle.manifest.features)), outputs


def contract_mismatch(faults: list[Violation]) -> TsugiError:
    """Build the refusal of a bundle that differs from what it must be, naming the first VIOLATIONS_MAX faults."""
    first = faults[0]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return TsugiError(
        ErrorReason.ERROR_REASON_BUNDLE_CONTRACT_MISMATCH,
        f"{first.path}: {first.description}{more}",
        violations=faults[:VIOLATIONS_MAX],
        field=first.path,
        faults=len(faults),
    )


def _malformed(message: str) -> TsugiError:
    return TsugiError(ErrorReason.ERROR_REASON_BUNDLE_MALFORMED, message)


def _too_complex(what: str, got: int, limit: int) -> TsugiError:
    message = f"{what} has {got} bytes, at most {limit} are taken"
    return TsugiError(ErrorReason.ERROR_REASON_BUNDLE_TOO_COMPLEX, message, limit=limit, got=got)


def _refuse_other_formats(data: bytes) -> None:
    found = next((name for name, magics in _FORMATS.items() if data.startswith(magics)), None)
    if data[:1] in (b"(", b"c", b"]", b"}") and data[-1:] == b".":
        found = "a pickle"  # protocols 0 and 1 have no magic, but an opcode first and the stop opcode last
    if data[_TAR_OFFSET : _TAR_OFFSET + 5] == b"ustar" and data[0] not in _SECTIONS:
        found = "a tar archive"
    if found:
        message = f"the upload is {found}; send one serialised tsugi.log.v1.Bundle message"
        raise TsugiError(ErrorReason.ERROR_REASON_BUNDLE_FORMAT_REFUSED, message, format=found)


def _check_sections(data: bytes) -> None:
    """Walk the outermost fields: each there once, within its bytes. What a parser then allocates is bounded."""
    offset, seen = 0, set()
    while offset < len(data):
        name, bytes_max = _SECTIONS.get(data[offset], ("", 0))
        if not name or name in seen:
            raise _malformed(f"byte {offset}: no field of a bundle, or one that was there before")
        seen.add(name)
        length, offset = _varint(data, offset + 1)
        if length > len(data) - offset:
            raise _malformed(f"{name} is cut short")
        if length > bytes_max:
            raise _too_complex(name, length, bytes_max)
        offset += length
    if missing := [name for name, _ in _SECTIONS.values() if name not in seen]:
        raise _malformed(f"the bundle has no {' and no '.join(missing)}")


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):  # five bytes are enough for any length below 2 GiB
        if offset >= len(data):
            break
        byte = data[offset]
        value |= (byte & 0x7F) << shift
        offset += 1
        if byte < 0x80:
            return value, offset
    raise _malformed(f"byte {offset}: the length of a field is cut short or too long")


def _manifest_faults(manifest: Manifest) -> Iterator[Violation]:
    for name in ("goal", "input_name", "output_name"):
        if not 1 <= len(getattr(manifest, name).encode()) <= NAME_BYTES_MAX:
            yield Violation(f"manifest.{name}", f"must have 1 to {NAME_BYTES_MAX} bytes")
    if manifest.output_kind not in (OutputKind.OUTPUT_KIND_PROBABILITY, OutputKind.OUTPUT_KIND_LOG_ODDS):
        yield Violation("manifest.output_kind", "must be OUTPUT_KIND_PROBABILITY or OUTPUT_KIND_LOG_ODDS")
    if not 1 <= len(manifest.features) <= FEATURES_MAX:
        yield Violation("manifest.features", f"must be 1 to {FEATURES_MAX}, are {len(manifest.features)}")
    for i, feature in enumerate(manifest.features[:FEATURES_MAX]):
        path = f"manifest.features[{i}]"
        if not 1 <= len(feature.fact.encode()) <= NAME_BYTES_MAX:
            yield Violation(f"{path}.fact", f"must have 1 to {NAME_BYTES_MAX} bytes")
        yield from _encoding_faults(path, feature)


def _encoding_faults(path: str, feature: Feature) -> Iterator[Violation]:
    encoding = feature.WhichOneof("encoding")
    if encoding is None:
        yield Violation(path, "one of scaled, equals and is_unknown must be set")
    elif encoding == "equals" and not 1 <= len(feature.equals.encode()) <= NAME_BYTES_MAX:
        yield Violation(f"{path}.equals", f"must have 1 to {NAME_BYTES_MAX} bytes")
    elif encoding == "is_unknown" and not feature.is_unknown:
        yield Violation(f"{path}.is_unknown", "must be true where it is set")
    elif encoding == "scaled":
        for name in ("center", "spread", "limit", "when_unknown"):
            number = getattr(feature.scaled, name)
            if not abs(number) <= _FLOAT32_MAX:  # this way round, so that NaN is a fault
                yield Violation(f"{path}.scaled.{name}", "must be a finite 32-bit number")
            elif name in ("spread", "limit") and number <= 0.0:
                yield Violation(f"{path}.scaled.{name}", "must be above 0")


def _golden_faults(bundle: Bundle) -> Iterator[Violation]:
    rows, d = bundle.golden_rows, len(bundle.manifest.features)
    n, rest = divmod(len(rows.outputs), 4)
    if rest or not 1 <= n <= GOLDEN_ROWS_MAX:
        yield Violation("golden_rows.outputs", f"must be float32[n], n 1 to {GOLDEN_ROWS_MAX}")
    elif len(rows.inputs) != 4 * n * d:
        yield Violation("golden_rows.inputs", f"must be float32[{n}, {d}], {4 * n * d} bytes, has {len(rows.inputs)}")
    elif not np.isfinite(np.frombuffer(rows.inputs, "<f4")).all():
        yield Violation("golden_rows.inputs", "must be finite")
    elif not np.isfinite(np.frombuffer(rows.outputs, "<f4")).all():
        yield Violation("golden_rows.outputs", "must be finite")
