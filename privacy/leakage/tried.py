"""What an attack hands to the audit to be judged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Tried"]


@dataclass(frozen=True, slots=True)
class Tried:
    """What came out.

    Attributes:
        guessed: reconstructions of the attacked inputs, or of the first of them; ``None``: the attack has no channel.
        labels: share of their labels guessed, where the attack guesses any.
        note: why there is no channel, or how it went.
    """

    guessed: Tensor | None
    labels: float | None = None
    note: str = ""
