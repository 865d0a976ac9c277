"""A small caller's command: one call of tsugi.client each, the reply as JSON on standard output.

A refusal goes to standard error as JSON too, with its reason and every field at fault, and the exit code is 1.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
from google.protobuf import json_format
from google.protobuf.message import Message

if TYPE_CHECKING:
    from tsugi.client import Client
    from tsugi.v1.model_pb2 import ModelRole

_ADDRESS = click.option(
    "--address", envvar="TSUGI_ADDRESS", default="127.0.0.1:7410", show_default=True, help="Where the server is."
)
_IDENTITY = click.option(
    "--identity", "identities", multiple=True, metavar="NAMESPACE=VALUE",
    help="Who it is about; may be given several times.",
)  # fmt: skip
_FIELD = click.option(
    "--field", default="", metavar="PATH", help="Print one value of the reply alone, such as slots.0.action."
)
_ROLE = click.option(
    "--role", type=click.Choice(["champion", "challenger"]), default="champion", show_default=True,
    help="The model role that changes.",
)  # fmt: skip
_VALIDATE_ONLY = click.option("--validate-only", is_flag=True, help="Check, and change nothing.")
_TYPED = 'numbers, true and false are typed, "text in double quotes" and anything else is text'
_LSN = click.IntRange(0, (1 << 64) - 1)
_COUNT_MAX: Final = (1 << 32) - 1
ERASURE_POLL_S: Final = 0.1


@click.command()
@_ADDRESS
@_FIELD
@_IDENTITY
@click.option("--profile-id", default="", help="Who it is about, by the server's own id.")
@click.option("--placement", "placements", multiple=True, required=True, metavar="NAME[:COUNT]", help="What to fill.")
@click.option("--context", multiple=True, metavar="NAME=VALUE", help=f"A fact of this request; {_TYPED}.")
@click.option("--request-id", default="", help="Makes the call idempotent.")
@click.option("--at-least-lsn", type=_LSN, default=0, help="Decide on a state that includes this record.")
@click.option("--durable", is_flag=True, help="Answer when the record is on disk.")
@click.option("--preview", is_flag=True, help="Decide, and record nothing.")
@click.option(
    "--outcome",
    "outcomes",
    type=(str, str, str),
    multiple=True,
    metavar="DECISION_ID ACTION TYPE",
    help="What came of an earlier decision, such as a rejection; reported first.",
)
def decide(address: str, field: str, placements: tuple[str, ...], **options: Any) -> None:
    """Ask for the best next actions."""
    from tsugi.client import outcome

    options["identities"] = _identities(options["identities"])
    options["context"] = _facts(options["context"])
    # The id follows from what is told, so that the same command again tells nothing new.
    options["outcomes"] = [
        outcome(decision_id, action, f"{type_} of {action}"[:128], type_)
        for decision_id, action, type_ in options["outcomes"]
    ]
    with _calling(address) as client:
        _show(field, client.decide(_counted(placements), **options))


@click.command("get-decision")
@_ADDRESS
@_FIELD
@click.argument("decision_id")
@click.option("--explain", is_flag=True, help="Every candidate's fate, and the choice in words.")
def get_decision(address: str, field: str, decision_id: str, explain: bool) -> None:
    """Show a recorded decision, and why it is what it is."""
    with _calling(address) as client:
        _show(field, client.get_decision(decision_id, explained=explain))


@click.command("outcome")
@_ADDRESS
@_FIELD
@click.argument("decision_id")
@click.argument("action")
@click.argument("outcome_type")
@click.option("--outcome-id", default="", help="Your id of this outcome; by default a new one.")
@click.option("--value", type=float, default=0.0, help="A number that belongs to it.")
def report_outcome(
    address: str, field: str, decision_id: str, action: str, outcome_type: str, outcome_id: str, value: float
) -> None:
    """Tell what happened after a decision."""
    with _calling(address) as client:
        _show(
            field, client.report_outcome(decision_id, action, outcome_id or uuid.uuid4().hex, outcome_type, value=value)
        )


@click.command()
@_ADDRESS
@_FIELD
@click.option("--identity", default="", metavar="NAMESPACE=VALUE", help="Who it is about.")
@click.option("--profile-id", default="", help="The server's own id of the person.")
@click.option("--at-least-lsn", type=_LSN, default=0, help="Answer from a state that includes this record.")
@click.option("--timeline", type=click.IntRange(0, 500), default=0, help="With so many of the latest touchpoints.")
def profile(address: str, field: str, identity: str, profile_id: str, at_least_lsn: int, timeline: int) -> None:
    """Show one golden record."""
    with _calling(address) as client:
        reply = client.get_profile(
            profile_id=profile_id, identity=_identity(identity), at_least_lsn=at_least_lsn, timeline_page_size=timeline
        )
        _show(field, reply)


@click.command()
@_ADDRESS
@_FIELD
@_IDENTITY
@click.option("--at-least-lsn", type=_LSN, default=0, help="Answer from a state that includes this record.")
def resolve(address: str, field: str, identities: tuple[str, ...], at_least_lsn: int) -> None:
    """Show where identities lead."""
    with _calling(address) as client:
        _show(field, client.resolve_identity(_identities(identities), at_least_lsn=at_least_lsn))


@click.command()
@_ADDRESS
@_FIELD
@click.argument("identity", metavar="NAMESPACE=VALUE")
@click.argument("other", metavar="NAMESPACE=VALUE")
@click.option("--different", is_flag=True, help="State that they are of two people.")
@click.option("--by", "stated_by", default="command_line", show_default=True, help="Who says so.")
@click.option("--request-id", default="", help="Your id of this statement; by default a new one.")
@_VALIDATE_ONLY
def link(
    address: str, field: str, identity: str, other: str, different: bool, stated_by: str, request_id: str,
    validate_only: bool,
) -> None:  # fmt: skip
    """State that two identities are of one person."""
    from tsugi.v1.profile_service_pb2 import LinkVerdict

    verdict = LinkVerdict.LINK_VERDICT_DIFFERENT if different else LinkVerdict.LINK_VERDICT_SAME
    left, right = _identities((identity, other))
    with _calling(address) as client:
        reply = client.link_identities(
            left, right, verdict, stated_by=stated_by,
            request_id=request_id or uuid.uuid4().hex, validate_only=validate_only,
        )  # fmt: skip
        _show(field, reply)


@click.command()
@_ADDRESS
@_FIELD
@click.argument("profile_id")
@click.argument("identities", nargs=-1, required=True, metavar="NAMESPACE=VALUE…")
@click.option("--by", "stated_by", default="command_line", show_default=True, help="Who says so.")
@click.option("--request-id", default="", help="Your id of this statement; by default a new one.")
@_VALIDATE_ONLY
def split(
    address: str, field: str, profile_id: str, identities: tuple[str, ...], stated_by: str, request_id: str,
    validate_only: bool,
) -> None:  # fmt: skip
    """Take identities out of a profile, with all that was recorded under them."""
    with _calling(address) as client:
        reply = client.split_profile(
            profile_id, _identities(identities), stated_by=stated_by, request_id=request_id or uuid.uuid4().hex,
            validate_only=validate_only,
        )  # fmt: skip
        _show(field, reply)


@click.command()
@_ADDRESS
@_FIELD
@click.option("--page-size", type=click.IntRange(1, 500), default=50, show_default=True)
@click.option("--page-token", default="", help="The nextPageToken of the page before.")
def reviews(address: str, field: str, page_size: int, page_token: str) -> None:
    """List pairs that may be one person, the most certain first."""
    with _calling(address) as client:
        _show(field, client.list_match_reviews(page_size=page_size, page_token=page_token))


@click.command("export")
@_ADDRESS
@click.option("--identity", default="", metavar="NAMESPACE=VALUE", help="Who it is about.")
@click.option("--profile-id", default="", help="The server's own id of the person.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Where to; by default standard output.")
def export_profile(address: str, identity: str, profile_id: str, out: Path | None) -> None:
    """Write all that is known of one person as JSON; a file that this makes is its owner's alone."""
    with _calling(address) as client:
        document = client.export_profile(profile_id=profile_id, identity=_identity(identity))
    if out is None:
        click.echo(document.decode())
        return
    try:
        with open(out, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(document)
    except OSError as error:
        _fail({"message": f"{out} cannot be written: {error.strerror}"})


@click.command()
@_ADDRESS
@_FIELD
@click.option("--identity", default="", metavar="NAMESPACE=VALUE", help="Who is to be forgotten.")
@click.option("--profile-id", default="", help="The server's own id of the person.")
@click.option("--request-id", default="", help="Your id of this wish; by default a new one.")
@click.option("--wait-s", default=60.0, show_default=True, help="How long to wait for the receipt; 0: not at all.")
def erase(address: str, field: str, identity: str, profile_id: str, request_id: str, wait_s: float) -> None:
    """Forget one person, and show the signed receipt once nothing is left."""
    from tsugi.v1.profile_service_pb2 import ErasureState

    with _calling(address) as client:
        accepted = client.erase_profile(
            request_id or uuid.uuid4().hex, profile_id=profile_id, identity=_identity(identity)
        )
        until = time.monotonic() + wait_s
        reply = client.get_erasure(accepted.erasure_id)
        while reply.state != ErasureState.ERASURE_STATE_FULFILLED and time.monotonic() < until:
            time.sleep(ERASURE_POLL_S)
            reply = client.get_erasure(accepted.erasure_id)
        if reply.state != ErasureState.ERASURE_STATE_FULFILLED:
            later = f"tsugi get-erasure {accepted.erasure_id}"
            click.echo(f"accepted, not fulfilled yet; for the receipt ask later: {later}", err=True)
        elif not reply.receipt.erased_records:
            click.echo("nobody was known by this identity; there was nothing to erase", err=True)
        _show(field, reply, with_zeros=True)


@click.command("get-erasure")
@_ADDRESS
@_FIELD
@click.argument("erasure_id")
def get_erasure(address: str, field: str, erasure_id: str) -> None:
    """Show how far an erasure has come, and the signed receipt once nothing is left."""
    with _calling(address) as client:
        _show(field, client.get_erasure(erasure_id), with_zeros=True)


@click.command("verify-receipt")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--public-key", required=True, metavar="HEX", help="The key that the installation published.")
def verify_receipt(file: Path, public_key: str) -> None:
    """Exit 0 when a receipt, as erase or get-erasure printed it, was signed with a key; 1 when it was not."""
    from cryptography.exceptions import InvalidSignature

    from server.outcomes import eraser
    from tsugi.v1.profile_service_pb2 import ErasureReceipt

    try:
        key = bytes.fromhex(public_key)
    except ValueError:
        raise click.BadParameter("64 hexadecimal digits are expected", param_hint="--public-key") from None
    try:
        told = json.loads(file.read_bytes())
        receipt = json_format.ParseDict(told.get("receipt", told), ErasureReceipt())
    except (ValueError, AttributeError, json_format.ParseError, RecursionError):
        _fail({"message": f"{file.name} holds no receipt as erase prints it"})
    if receipt.public_key != key:
        _fail({"message": f"it was signed with another key: {receipt.public_key.hex() or 'none'}"})
    try:
        eraser.verify_receipt(receipt)
    except (InvalidSignature, ValueError):
        _fail({"message": "its signature does not fit: it was altered, or is none"})
    click.echo(f"erasure {receipt.erasure_id}, {receipt.erased_records} records: signed with this key, and unaltered")


@click.command("audit-sources")
@_ADDRESS
@_FIELD
@click.option("--json", "as_json", is_flag=True, help="The reply as JSON in place of tables.")
def audit_sources(address: str, field: str, as_json: bool) -> None:
    """Show how complete, fresh and consistent each source is."""
    with _calling(address) as client:
        reply = client.audit_sources()
    if as_json or field:
        _show(field, reply, with_zeros=True)
        return
    from server.audit_tables import print_audit

    print_audit(reply)


@click.command("count-people")
@_ADDRESS
@_FIELD
def count_people(address: str, field: str) -> None:
    """Show how many people there are, in each segment and at each stage of the journey."""
    with _calling(address) as client:
        _show(field, client.count_people(), with_zeros=True)


@click.command()
@_ADDRESS
@_FIELD
@_IDENTITY
@click.option("--source", default="command_line", show_default=True, help="Who says so.")
@click.option("--record-id", default="", help="The source's id of this record; by default a new one.")
@click.option("--attribute", "attributes", multiple=True, metavar="NAME=VALUE", help=f"A lasting fact; {_TYPED}.")
@click.option("--event", "event_type", default="", help="The type of something that happened.")
@click.option("--property", "properties", multiple=True, metavar="NAME=VALUE", help="A fact of the event.")
def ingest(
    address: str, field: str, identities: tuple[str, ...], source: str, record_id: str, attributes: tuple[str, ...],
    event_type: str, properties: tuple[str, ...],
) -> None:  # fmt: skip
    """Record facts about one person."""
    from tsugi.client import event, source_record
    from tsugi.v1.error_reason_pb2 import ErrorReason

    with _calling(address) as client:
        record = source_record(
            record_id or uuid.uuid4().hex,
            source,
            _identities(identities),
            attributes=_facts(attributes),
            event=event(event_type, _facts(properties)) if event_type else None,
        )
        reply = client.ingest_records([record])
        if reply.results[0].HasField("error"):  # of a batch of one, the item's error is the call's
            error = reply.results[0].error
            _fail(
                {"reason": ErrorReason.Name(error.reason), "message": error.message, "metadata": dict(error.metadata)}
            )
        _show(field, reply)


@click.command("push-catalog")
@_ADDRESS
@_FIELD
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--etag", default="", help="Refuse unless this is the present etag.")
@click.option("--request-id", default="", help="Makes the call idempotent.")
@_VALIDATE_ONLY
def push_catalog(address: str, field: str, file: Path, etag: str, request_id: str, validate_only: bool) -> None:
    """Put the catalog of a YAML file in force."""
    from server.catalog.loading import load_catalog
    from server.errors import TsugiError
    from tsugi.v1.error_reason_pb2 import ErrorReason

    try:
        catalog = load_catalog(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise click.BadParameter(f"{file} is not text in UTF-8") from None
    except TsugiError as error:
        _fail(
            {
                "reason": ErrorReason.Name(error.reason),
                "message": error.message,
                "metadata": error.metadata,
                "violations": [{"field": path, "description": text} for path, text in error.violations],
            }
        )
    with _calling(address) as client:
        _show(field, client.push_catalog(catalog, etag=etag, request_id=request_id, validate_only=validate_only))


@click.command("get-catalog")
@_ADDRESS
@_FIELD
@click.option("--revision", default="", help="By default the one in force.")
def get_catalog(address: str, field: str, revision: str) -> None:
    """Show a catalog revision."""
    with _calling(address) as client:
        _show(field, client.get_catalog(revision))


@click.command("list-catalogs")
@_ADDRESS
@_FIELD
def list_catalogs(address: str, field: str) -> None:
    """List the catalogs that were put in force, newest first."""
    with _calling(address) as client:
        _show(field, client.list_catalog_revisions())


@click.command("rollback-catalog")
@_ADDRESS
@_FIELD
@click.option("--revision", default="", help="By default the one before the present.")
@click.option("--etag", default="", help="Refuse unless this is the present etag.")
@_VALIDATE_ONLY
def rollback_catalog(address: str, field: str, revision: str, etag: str, validate_only: bool) -> None:
    """Put an earlier catalog in force again."""
    with _calling(address) as client:
        _show(field, client.rollback_catalog(revision, etag=etag, validate_only=validate_only))


@click.command("push-model")
@_ADDRESS
@_FIELD
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--label", required=True, help="A name for people.")
@_VALIDATE_ONLY
def push_model(address: str, field: str, file: Path, label: str, validate_only: bool) -> None:
    """Store a model bundle as a revision; its role does not change."""
    with _calling(address) as client:
        _show(field, client.push_model(file.read_bytes(), label, validate_only=validate_only))


@click.command("list-models")
@_ADDRESS
@_FIELD
def list_models(address: str, field: str) -> None:
    """List the stored model revisions, newest first."""
    with _calling(address) as client:
        _show(field, client.list_model_revisions())


@click.command("assign-champion")
@_ADDRESS
@_FIELD
@click.argument("revision", default="")
@_ROLE
@click.option("--etag", default="", help="Refuse unless this is the role's present etag.")
@_VALIDATE_ONLY
def assign_champion(address: str, field: str, revision: str, role: str, etag: str, validate_only: bool) -> None:
    """Make a stored revision the champion, or what --role says; without one, nobody is."""
    with _calling(address) as client:
        _show(field, client.assign_model_role(revision, role=_role(role), etag=etag, validate_only=validate_only))


@click.command("rollback-champion")
@_ADDRESS
@_FIELD
@_ROLE
@click.option("--etag", default="", help="Refuse unless this is the role's present etag.")
@_VALIDATE_ONLY
def rollback_champion(address: str, field: str, role: str, etag: str, validate_only: bool) -> None:
    """Give the role champion, or what --role says, back to who had it before."""
    with _calling(address) as client:
        _show(field, client.rollback_model(role=_role(role), etag=etag, validate_only=validate_only))


@click.command()
@_ADDRESS
def health(address: str) -> None:
    """Exit 0 when the server is up and takes calls, 1 when it does not."""
    with _calling(address) as client:
        if not client.is_serving():
            _fail({"message": "the server is up and takes no calls"})


ALL: tuple[click.Command, ...] = (
    decide, get_decision, report_outcome, profile, resolve, ingest, link, split, reviews, export_profile, erase,
    get_erasure, verify_receipt, audit_sources, count_people, push_catalog, get_catalog, list_catalogs,
    rollback_catalog, push_model, list_models, assign_champion, rollback_champion, health,
)  # fmt: skip


@contextmanager
def _calling(address: str) -> Iterator[Client]:
    """Give a client, and tell a refusal."""
    from tsugi.client import CallError, Client

    try:
        with Client(address) as client:
            yield client
    except CallError as error:
        _fail(
            {
                "code": error.code.name,
                "reason": error.reason,
                "message": f"no server answers at {address}: {error.message}" if error.is_unanswered else error.message,
                "metadata": error.metadata,
                "violations": [{"field": path, "description": text} for path, text in error.violations],
            }
        )
    except UnicodeEncodeError:  # the shell gave bytes that are no text
        raise click.UsageError("arguments must be text in UTF-8") from None


def _show(path: str, message: Message, *, with_zeros: bool = False) -> None:
    """Print a reply as JSON, or one value of it: a text as it stands, anything else as JSON.

    Zeros and what is empty are left out where nobody asks for them: of a whole reply unless ``with_zeros``.
    """
    try:
        value = _value(_as_json(message, with_zeros=with_zeros), path)
    except LookupError:
        try:
            value = _value(_as_json(message, with_zeros=True), path)
        except LookupError:
            raise click.ClickException(f"the reply has no field {path!r}") from None
    click.echo(value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False))


def _as_json(message: Message, *, with_zeros: bool) -> dict[str, Any]:
    return _by_name(json_format.MessageToDict(message, always_print_fields_with_no_presence=with_zeros), message)


def _value(told: Any, path: str) -> Any:
    """Return what a path leads to.

    Raises:
        LookupError: it leads nowhere.
    """
    for step in path.split(".") if path else ():
        try:
            told = told[int(step)] if isinstance(told, list) else told[step]
        except (ValueError, TypeError) as error:
            raise LookupError(path) from error
    return told


def _by_name(told: dict[str, Any], message: Message) -> dict[str, Any]:
    """Put the entries of maps in order, which have none on the wire: the same reply reads the same each time."""
    for field in message.DESCRIPTOR.fields:
        part = told.get(field.json_name)
        if not isinstance(part, dict) or field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            told[field.json_name] = dict(sorted(part.items()))
        else:
            _by_name(part, getattr(message, field.name))
    return told


def _fail(told: dict[str, object]) -> NoReturn:
    click.echo(json.dumps({name: value for name, value in told.items() if value}, indent=2), err=True)
    sys.exit(1)


def _identity(text: str) -> tuple[str, str] | None:
    return _identities((text,))[0] if text else None


def _identities(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Read identities; blanks around a value are no part of it, as in files."""
    return [(name, value.strip()) for name, value in _pairs(texts)]


def _role(name: str) -> ModelRole:
    from tsugi.v1.model_pb2 import ModelRole

    return ModelRole.MODEL_ROLE_CHALLENGER if name == "challenger" else ModelRole.MODEL_ROLE_CHAMPION


def _pairs(texts: tuple[str, ...]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
        pairs.append((name, value))
    return pairs


def _counted(texts: tuple[str, ...]) -> list[tuple[str, int]]:
    asked = []
    for text in texts:
        name, _, count = text.partition(":")
        if count and not (count.isascii() and count.isdecimal() and int(count) <= _COUNT_MAX):
            raise click.BadParameter(f"{text!r} is not NAME or NAME:COUNT")
        asked.append((name, int(count or 1)))
    return asked


def _facts(texts: tuple[str, ...]) -> dict[str, str | float | bool]:
    return {name: _fact(value) for name, value in _pairs(texts)}


def _fact(text: str) -> str | float | bool:
    """Read a fact as JSON has it; what is no JSON is text."""
    try:
        fact = json.loads(text, parse_int=float, parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return fact if isinstance(fact, str | float | bool) else text
