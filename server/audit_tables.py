"""What AuditSources tells, as tables for a terminal."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.table import Table

from tsugi.v1.profile_service_pb2 import AuditSourcesResponse, SourceAudit

PIPED_WIDTH: Final = 160  # columns: a pipe has no width, and tables are not to be cut


def print_audit(reply: AuditSourcesResponse) -> None:
    """Print one table of all sources and one of each source's attributes."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    sources = Table("source", "owner", "party", "records", "say nothing new", "no effect", "last record", "stale")
    for audit in reply.sources:
        last = audit.last_record_time.ToDatetime().isoformat(" ", "seconds") if audit.records else "never"
        sources.add_row(
            audit.source, audit.owner, audit.party, f"{audit.records:,}", f"{audit.duplicates:,}",
            f"{audit.quarantined:,}", last, "yes" if audit.stale else "",
        )  # fmt: skip
    console.print(sources)
    for audit in reply.sources:
        if audit.records:
            console.print(_attributes(audit))
        if audit.unused_event_types:
            console.print(f"{audit.source} never reported: {', '.join(audit.unused_event_types)}")
    if reply.missing_attributes:
        console.print(f"no source has ever stated: {', '.join(reply.missing_attributes)}")


def _attributes(audit: SourceAudit) -> Table:
    table = Table("attribute", "stated by", "conflicts", "not cleansed", "read by nobody", title=audit.source)
    for each in audit.attributes:
        table.add_row(
            each.attribute, f"{each.completeness_share:.1%}", f"{each.conflicts:,}", f"{each.uncleansed:,}",
            "yes" if each.unused else "",
        )  # fmt: skip
    return table
