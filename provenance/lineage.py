"""What came of what: data sets, runs and models over many owners' records, and who revoked any of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from provenance.claims import SHORT, Claim
from provenance.evidence import Evidence, Placed
from provenance.records import (
    DATASET_DIGEST,
    MODEL_DIGEST,
    DatasetRecord,
    ModelRecord,
    RevocationRecord,
    RunRecord,
    Subject,
)

__all__ = ["Edge", "Graph", "Trail", "Vertex", "committed", "revoked", "trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vertex:
    """Something in the graph.

    Attributes:
        id: kind and digest.
        kind: what it is.
        name: for people, as whoever signed it wrote.
        by: addresses that signed records of it; empty where nobody did.
    """

    id: str
    kind: Literal["dataset", "run", "model"]
    name: str
    by: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """``target`` came of ``source``."""

    source: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What came of what."""

    vertices: tuple[Vertex, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trail:
    """What a record goes back to.

    Attributes:
        runs: the subject's own first, then those whose models it began with, and so on.
        datasets: digests of all data sets that these consumed.
        models: digests of all models that these consumed or made.
        graph: of all that.
    """

    runs: tuple[Placed, ...]
    datasets: frozenset[str]
    models: frozenset[str]
    graph: Graph


def trace(subject: str, found: Evidence) -> Trail:
    """Goes back from a record to every data set, as far as records lead."""
    first = found.records.get(subject)
    waiting = [] if first is None else [first, *_makers(_digests(first.record.subject, MODEL_DIGEST), found)]
    drawn = _Drawing(found)
    if first is not None and isinstance(first.record.predicate, DatasetRecord):
        for digest in _digests(first.record.subject, DATASET_DIGEST):
            drawn.vertex("dataset", digest, first.record.subject[0].name)
    runs: dict[str, Placed] = {}
    while waiting:
        placed = waiting.pop(0)
        run = placed.record.predicate
        if placed.digest not in runs and isinstance(run, RunRecord):
            runs[placed.digest] = placed
            waiting += _makers(drawn.run(placed, run), found)
    return Trail(
        runs=tuple(runs.values()),
        datasets=drawn.digests("dataset"),
        models=drawn.digests("model"),
        graph=Graph(
            vertices=tuple(drawn.vertices.values()), edges=tuple(Edge(source=a, target=b) for a, b in drawn.edges)
        ),
    )


class _Drawing:
    """The graph, as far as it is drawn."""

    def __init__(self, found: Evidence) -> None:
        self.vertices: dict[str, Vertex] = {}
        self.edges: dict[tuple[str, str], None] = {}
        self._found = found

    def vertex(self, kind: Literal["dataset", "model"], digest: str, name: str) -> str:
        """Draws a data set or a model, once; returns its id."""
        made = f"{kind}:{digest}"
        if made not in self.vertices:
            by = tuple(dict.fromkeys(each.record.signer for each in committed(digest, self._found)))
            self.vertices[made] = Vertex(id=made, kind=kind, name=name, by=by)
        return made

    def run(self, placed: Placed, run: RunRecord) -> list[str]:
        """Draws a run with all that it consumed and made; returns the digests of the models that it began with."""
        here, name = f"run:{placed.digest}", run.run_details.metadata.invocation_id
        self.vertices[here] = Vertex(id=here, kind="run", name=name, by=(placed.record.signer,))
        for subject in placed.record.subject:
            if MODEL_DIGEST in subject.digest:
                self.edges[here, self.vertex("model", subject.digest[MODEL_DIGEST], subject.name)] = None
        began: list[str] = []
        for resource in run.build_definition.resolved_dependencies:
            if DATASET_DIGEST in resource.digest:
                self.edges[self.vertex("dataset", resource.digest[DATASET_DIGEST], resource.name), here] = None
            if MODEL_DIGEST in resource.digest:
                began.append(resource.digest[MODEL_DIGEST])
                self.edges[self.vertex("model", began[-1], resource.name), here] = None
        return began

    def digests(self, kind: str) -> frozenset[str]:
        """Of all vertices of a kind."""
        return frozenset(each.id.partition(":")[2] for each in self.vertices.values() if each.kind == kind)


def _makers(models: list[str], found: Evidence) -> list[Placed]:
    return [
        each
        for digest in models
        for each in found.about.get(digest, [])
        if isinstance(each.record.predicate, RunRecord)
    ]


def committed(digest: str, found: Evidence) -> list[Placed]:
    """The data sets', models' and runs' records that speak of a digest as their own."""
    kinds = (DatasetRecord, ModelRecord, RunRecord)
    return [placed for placed in found.about.get(digest, []) if isinstance(placed.record.predicate, kinds)]


def revoked(trail: Trail, found: Evidence) -> Iterator[Claim]:
    """What was revoked of all that a trail goes over, and by whom; who may not revoke it is named, and not obeyed."""
    for placed in sorted(found.records.values(), key=lambda each: (each.log, each.index)):
        revocation = placed.record.predicate
        if not isinstance(revocation, RevocationRecord):
            continue
        for subject in placed.record.subject:
            what, touched, own = _aimed(placed, revocation, subject, trail, found)
            where, signer = f"record {placed.index} of log {placed.log[:SHORT]}", placed.record.signer
            if touched and own:
                because = f": {revocation.reason}" if revocation.reason else ""
                claim = f"it was revoked, in {where}{because}"
                yield Claim(part=what, claim=claim, verdict="revoked", basis="stated", by=signer)
            elif touched:
                claim = f"its revocation in {where} is not by who signed for it, and does not count"
                yield Claim(part=what, claim=claim, verdict="unknown", basis="stated", by=signer)


def _aimed(
    placed: Placed, revocation: RevocationRecord, subject: Subject, trail: Trail, found: Evidence
) -> tuple[str, bool, bool]:
    """What a revocation is aimed at, whether that matters here, and whether its signer may."""
    signer = placed.record.signer
    if revocation.what == "key":
        address = "0x" + subject.digest.get("address", "").lower()
        signed = [each for each in found.records.values() if each.record.signer.lower() == address and each != placed]
        # What the key signed before, in the same log, counts on; elsewhere nothing shows that it is older.
        later = any(each.log != placed.log or each.index > placed.index for each in signed)
        serves = any(address in _nodes(run) for run in trail.runs)
        return f"key {address}", later or serves, signer.lower() == address
    if revocation.what == "record":
        digest = subject.digest.get("sha256", "")
        target = found.records.get(digest)
        return f"record {digest[:SHORT]}", target is not None, target is not None and target.record.signer == signer
    digest = subject.digest.get(DATASET_DIGEST if revocation.what == "dataset" else MODEL_DIGEST, "")
    own = any(each.record.signer == signer for each in committed(digest, found))
    what = "data set" if revocation.what == "dataset" else "model"
    return f"{what} {digest[:SHORT]}", digest in trail.datasets | trail.models, own


def _nodes(placed: Placed) -> set[str]:
    run = placed.record.predicate
    return {node.lower() for node in run.cloister_training.nodes} if isinstance(run, RunRecord) else set()


def _digests(subjects: tuple[Subject, ...], name: str) -> list[str]:
    return [subject.digest[name] for subject in subjects if name in subject.digest]
