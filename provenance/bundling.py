"""Making a bundle: what of a log an auditor of one record needs, and the proofs of it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from provenance.anchors import AnchorLine, anchored
from provenance.bundle import MAX_BUNDLE_FILES, AnchorPoint, Bundle, LogPart, Place, Proofs
from provenance.heads import TreeHead
from provenance.log import Log
from provenance.receipts import MAX_SEGMENTS
from provenance.records import NodeRecord, Record, RevocationRecord, RunRecord, open_record
from wire.errors import ConfigError, ProvenanceError

__all__ = ["RECORD_FILE", "collect", "read_run"]

#: In a run's folder: its record's envelope, and beside it a folder with the receipts.
RECORD_FILE: Final = Path("provenance") / "run.json"
_RECEIPTS: Final = "receipts"


def read_run(folder: Path) -> tuple[bytes, dict[str, tuple[bytes, ...]]]:
    """What a run's folder keeps for its bundle: its record's envelope, and its receipts by their root.

    Raises:
        ConfigError: the run has no record.
    """
    try:
        envelope = (folder / RECORD_FILE).read_bytes()
        kept = sorted((folder / RECORD_FILE).parent.joinpath(_RECEIPTS).glob("*.jsonl"))
        receipts = {path.stem: tuple(path.read_bytes().splitlines()) for path in kept}
    except OSError as error:
        raise ConfigError(
            f"{folder} has no run's record ({error.strerror}): only a finished run has one, and a bundle"
        ) from error
    if any(len(lines) > MAX_SEGMENTS for lines in receipts.values()):
        raise ConfigError(f"{folder} has more than {MAX_SEGMENTS} receipts of a session: too many for a bundle")
    return envelope, receipts


def collect(
    log: Log, subject: bytes, receipts: dict[str, tuple[bytes, ...]] | None = None, others: Sequence[Bundle] = ()
) -> Bundle:
    """The bundle of a record that stands in a log, with all of the log that bears on it.

    Args:
        log: holds the record; its latest signed head must cover it.
        subject: the record's envelope.
        receipts: signed receipts of its run, by their root.
        others: bundles of other owners, whose records and receipts come along.

    Raises:
        ProvenanceError: the log lacks the record, or its head; or the bundle would be too large.
    """
    found = log.find(subject)
    if found is None:
        raise ProvenanceError(f"the log {log.name} does not hold this record: name the right one with --log")
    head = next(iter(reversed(log.heads())), None)
    if head is None or head.size <= found:
        raise ProvenanceError(
            f"no signed head of the log {log.name} covers this record: `cloister anchor push` signs one"
        )
    foreign = {digest: envelope for other in others for digest, envelope in other.records.items()}
    wanted = _wanted(log, head.size, found, foreign.values())
    records = {hashlib.sha256(envelope).hexdigest(): envelope for envelope in wanted.values()}
    places = [
        Place(
            record=hashlib.sha256(envelope).hexdigest(),
            index=index,
            path=[node.hex() for node in log.inclusion(index, head.size).path],
        )
        for index, envelope in sorted(wanted.items())
    ]
    part = LogPart(head=head.envelope, proofs=Proofs(places=places, anchors=_anchors(log, head, found)))
    return Bundle(
        subject=hashlib.sha256(subject).hexdigest(),
        records=foreign | records,
        logs={name: each for other in others for name, each in other.logs.items()} | {log.id.hex(): part},
        receipts={root: tuple(lines) for other in others for root, lines in other.receipts.items()} | (receipts or {}),
    )


def _wanted(log: Log, size: int, start: int, foreign: Iterable[bytes]) -> dict[int, bytes]:
    """The records, by their numbers, that share a digest with the subject, directly or over others."""
    mentions: dict[int, tuple[set[str], set[str]]] = {}
    for number, envelope in itertools.takewhile(lambda entry: entry[0] < size, log.entries()):
        with contextlib.suppress(ProvenanceError):  # not a record that this version knows
            mentions[number] = _mentions(open_record(envelope))
    if start not in mentions:
        raise ProvenanceError(f"entry {start} of the log {log.name} is no record that this version knows")
    reached = set().union(*mentions.pop(start), *(_mentions(open_record(envelope))[0] for envelope in foreign))
    wanted, grown = [start], True
    while grown:
        near = [number for number, (own, _) in mentions.items() if own & reached]
        for number in near:
            reached |= set().union(*mentions.pop(number))
        wanted += near
        grown = bool(near)
    if len(wanted) > MAX_BUNDLE_FILES // 2:
        raise ProvenanceError(f"{len(wanted)} records of the log bear on this one: too many for a bundle")
    return {number: log.entry(number) for number in wanted}


def _mentions(record: Record) -> tuple[set[str], set[str]]:
    """The digests that a record is about, and those that it goes back to."""
    own = {value for subject in record.subject for value in subject.digest.values()}
    predicate = record.predicate
    if isinstance(predicate, RunRecord):
        nodes = {address[2:].lower() for address in predicate.cloister_training.nodes}
        used = {value for each in predicate.build_definition.resolved_dependencies for value in each.digest.values()}
        return own, used | nodes
    if isinstance(predicate, NodeRecord):
        return own | {predicate.address[2:].lower()}, set()
    if isinstance(predicate, RevocationRecord):
        return {value.lower() for value in own}, set()
    return own, set()


def _anchors(log: Log, head: TreeHead, found: int) -> list[AnchorPoint]:
    """The first and the latest anchored head that cover the record, on each chain."""
    kept: dict[str, list[AnchorPoint]] = {}
    for line in anchored(log):
        if found < line.size <= head.size:
            point = _point(log, head, line)
            if point is not None:
                kept.setdefault(line.target, []).append(point)
    return [
        point for points in kept.values() for point in (points[:1] if len(points) == 1 else [points[0], points[-1]])
    ]


def _point(log: Log, head: TreeHead, line: AnchorLine) -> AnchorPoint | None:
    """Where a head stands on a chain, once it is in a block that the outbox knows."""
    if line.state not in ("mined", "final") or line.block is None or line.block_hash is None or line.time is None:
        return None
    chain_id, registry, _ = line.target.split(":")
    return AnchorPoint(
        chain_id=int(chain_id),
        registry=registry,
        opener=head.signer,
        size=line.size,
        root=line.root,
        path=[node.hex() for node in log.consistency(line.size, head.size).path],
        block=line.block,
        block_hash=line.block_hash,
        block_time=line.time,
    )
