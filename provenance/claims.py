"""A claim, its verdict, and who stands behind it: what a verification is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["SHORT", "Basis", "Claim", "Claims", "Verdict"]

Verdict = Literal["holds", "fails", "revoked", "unknown"]
Basis = Literal["proven", "stated"]

SHORT: Final = 12  # digits of a digest, where it is named for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One line of a report.

    Attributes:
        part: what it is about.
        claim: what is said.
        verdict: ``unknown`` is what nothing given decides.
        basis: ``proven``, or ``stated`` by whoever ``by`` names.
        by: what proves it, or the address that states it.
    """

    part: str
    claim: str
    verdict: Verdict
    basis: Basis
    by: str


class Claims(list[Claim]):
    """Claims as they are found."""

    def proven(self, part: str, claim: str, by: str) -> None:
        """It holds, and ``by`` shows it to whoever looks."""
        self.append(Claim(part=part, claim=claim, verdict="holds", basis="proven", by=by))

    def stated(self, part: str, claim: str, by: str, verdict: Verdict = "holds") -> None:
        """``by`` signed it; nothing more is known."""
        self.append(Claim(part=part, claim=claim, verdict=verdict, basis="stated", by=by))

    def fails(self, part: str, claim: str, by: str) -> None:
        """``by`` shows that it does not hold."""
        self.append(Claim(part=part, claim=claim, verdict="fails", basis="proven", by=by))

    def worst(self) -> Verdict:
        """The verdict over all of them."""
        order: tuple[Verdict, ...] = ("fails", "revoked", "unknown")
        return next((verdict for verdict in order if any(claim.verdict == verdict for claim in self)), "holds")
