"""What a bundle proves, and what it only repeats: every claim with its verdict, and who stands behind it.

A claim is *proven* where a signature, a Merkle path, a digest or a chain shows it to whoever looks; it is *stated*
where somebody signed it, and nothing more is known. That a run used exactly this data, and what privacy it spent, is
stated by its owner; what a node computed is stated by the node.

Nothing here opens a socket or needs a key; a chain is asked through a :class:`~provenance.evidence.Witness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from provenance.bundle import Bundle
from provenance.claims import SHORT, Claim, Claims, Verdict
from provenance.evidence import Evidence, Placed, Witness, gather
from provenance.lineage import Graph, Trail, committed, revoked, trace
from provenance.receipts import Receipt, check_chain, check_receipts
from provenance.records import DATASET_DIGEST, MODEL_DIGEST, DatasetRecord, NodeRecord, PrivacyCost, RunRecord
from wire.errors import ProvenanceError

__all__ = ["Report", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What verification found.

    Attributes:
        subject: SHA-256 of the record that the bundle is about.
        verdict: the worst of the claims': ``fails``, ``revoked``, ``unknown``, ``holds``.
        claims: all of them.
        graph: data sets, runs and models, and what came of what.
    """

    subject: str
    verdict: Verdict
    claims: tuple[Claim, ...]
    graph: Graph


def verify(
    bundle: Bundle,
    others: Sequence[Bundle] = (),
    *,
    model: Path | None = None,
    dataset_root: str | None = None,
    witness: Witness | None = None,
    confirmations: int = 12,
) -> Report:
    """Verifies all that a bundle claims; whatever it holds, there is a report.

    Args:
        bundle: whose subject is asked about.
        others: more evidence: other owners' bundles, or later ones. A revocation counts wherever it stands.
        model: a safetensors file that should hold the subject's model.
        dataset_root: of a data set that was hashed again with its seed; it should be one that was consumed.
        witness: the chain.
        confirmations: blocks on top from which on an anchor is final.
    """
    found = gather((bundle, *others), witness, confirmations)
    claims = found.claims
    trail = trace(bundle.subject, found)
    subject = found.records.get(bundle.subject)
    if subject is None:
        claims.fails(f"record {bundle.subject[:SHORT]}", "the bundle's own subject is not shown to be in a log", "-")
    used: set[str] = set()
    for run in trail.runs:
        used |= _run(run, found)
    for root in found.receipts.keys() - used:
        claims.fails(f"receipts {root[:SHORT]}", "no run's record here has this root", "the runs' records")
    claims.extend(revoked(trail, found))
    if model is not None:
        _model_file(model, subject, claims)
    if dataset_root is not None:
        _data(dataset_root, trail, claims)
    return Report(subject=bundle.subject, verdict=claims.worst(), claims=tuple(claims), graph=trail.graph)


def _run(placed: Placed, found: Evidence) -> set[str]:
    """The claims about a run; returns the roots of the receipts that it speaks of."""
    run, owner, claims = placed.record.predicate, placed.record.signer, found.claims
    if not isinstance(run, RunRecord):
        return set()
    name = f"run {run.run_details.metadata.invocation_id}"
    for subject in placed.record.subject:
        digest = subject.digest.get(MODEL_DIGEST, "")
        claims.stated(name, f"it made the model {digest[:SHORT] or '(no digest)'} ({subject.name})", owner)
    _consumed(name, placed, run, found)
    asked = run.build_definition.external_parameters
    policy = ", ".join(f"{kind}: {treatment}" for kind, treatment in sorted(asked.policy.items())) or "none"
    claims.stated(name, f"program {asked.program[:SHORT]}, policy: {policy}", owner)
    for cost in run.cloister_training.privacy:
        claims.stated(name, _privacy(cost), owner)
    if not run.cloister_training.privacy:
        claims.stated(name, "no privacy is accounted for", owner, "unknown")
    _computed(name, run, owner, found)
    return {group.root for group in run.cloister_training.receipts}


def _privacy(cost: PrivacyCost) -> str:
    epsilon = "infinite" if isinstance(cost.epsilon, str) else f"{cost.epsilon:.4g}"
    return (
        f"privacy spent on {cost.data_set}, by all its runs: ε = {epsilon} at δ = {cost.delta:g} for a {cost.unit} "
        f"({cost.relation}, {cost.entries} releases)"
    )


def _consumed(name: str, placed: Placed, run: RunRecord, found: Evidence) -> None:
    owner, claims = placed.record.signer, found.claims
    data = 0
    for resource in run.build_definition.resolved_dependencies:
        kind = DATASET_DIGEST if DATASET_DIGEST in resource.digest else MODEL_DIGEST
        digest = resource.digest.get(kind, "")
        what = f"data set {resource.name}" if kind == DATASET_DIGEST else f"model {resource.name}"
        data += kind == DATASET_DIGEST
        used = "was trained on" if kind == DATASET_DIGEST else "began with"
        claims.stated(what, f"{name} {used} it ({digest[:SHORT]})", owner)
        makers = [each for each in committed(digest, found) if each.digest != placed.digest]
        if not makers:
            claims.stated(what, "no record here commits to it: ask its owner for a bundle (--with)", owner, "unknown")
        for maker in makers:
            claims.proven(what, f"{_made(maker)}, record {maker.index} of log {maker.log[:SHORT]}", "its signature")
            if maker.log == placed.log:
                _order(what, maker, placed, claims)
    if not data:
        claims.stated(name, "it names no data set: nothing says what the model was trained on", owner, "unknown")


def _made(maker: Placed) -> str:
    predicate, signer = maker.record.predicate, maker.record.signer
    if isinstance(predicate, DatasetRecord):
        return f"{signer} committed to it: {predicate.records} records ({predicate.kind})"
    if isinstance(predicate, RunRecord):
        return f"the run {predicate.run_details.metadata.invocation_id} of {signer} made it"
    return f"{signer} signed for it"


def _order(what: str, maker: Placed, placed: Placed, claims: Claims) -> None:
    if maker.index < placed.index:
        claims.proven(what, "its record is older than the run's", "their places in one log")
    else:
        claims.stated(
            what, "its record is younger than the run's: it was committed to afterwards", "the log", "unknown"
        )


def _computed(name: str, run: RunRecord, owner: str, found: Evidence) -> None:
    training, claims = run.cloister_training, found.claims
    chain: list[Receipt] = []
    whole = True
    for group in training.receipts:
        lines = found.receipts.get(group.root)
        if lines is None:
            claims.stated(name, f"{group.segments} receipts of {group.node} are not here", owner, "unknown")
            whole = False
            continue
        try:
            receipts = check_receipts(group, lines)
        except ProvenanceError as error:
            claims.fails(f"receipts {group.root[:SHORT]}", str(error), "the run's record")
            whole = False
            continue
        chain += receipts
        claims.proven(
            name,
            f"{group.node} signed steps {group.first_step} to {group.last_step} in {group.segments} segments, each "
            "from the state that the one before ended in",
            "its signatures",
        )
        claims.stated(name, f"that it computed steps {group.first_step} to {group.last_step} so", group.node)
    try:
        if whole:
            check_chain(chain)
    except ProvenanceError as error:
        claims.fails(f"receipts of {name}", str(error), "the receipts")
    signed = sum(group.last_step - group.first_step + 1 for group in training.receipts)
    if signed != training.steps:
        nodes = ", ".join(training.nodes) or "no node"
        claim = f"{training.steps} steps by {nodes}; nodes signed for {signed}"
        claims.stated(name, claim, owner, "unknown" if signed < training.steps else "fails")
    for node in dict.fromkeys(training.nodes):
        _node(node, found)


def _node(node: str, found: Evidence) -> None:
    for each in found.records.values():
        said = each.record.predicate
        if isinstance(said, NodeRecord) and said.address.lower() == node.lower() == each.record.signer.lower():
            found.claims.stated(f"node {node}", f"it computes on {said.device}", node)


def _model_file(path: Path, subject: Placed | None, claims: Claims) -> None:
    from provenance.models import digest_model  # noqa: PLC0415 - numpy takes a while to import

    stated = [each.digest.get(MODEL_DIGEST) for each in subject.record.subject] if subject is not None else []
    try:
        root = digest_model(path).root.hex()
    except ProvenanceError as error:
        claims.fails("model file", str(error), "its digest")
        return
    if root in stated:
        claims.proven("model file", f"{path.name} is the model {root[:SHORT]} of the bundle's subject", "its digest")
    else:
        claims.fails(
            "model file", f"{path.name} is another model than the bundle's: its digest is {root}", "its digest"
        )


def _data(root: str, trail: Trail, claims: Claims) -> None:
    if root in trail.datasets:
        claims.proven("data set", f"what was given has the root {root[:SHORT]}, and was used", "its digest")
    else:
        claims.fails("data set", f"what was given has the root {root}, which no run here used", "its digest")
