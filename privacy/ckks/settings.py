"""What a run was encrypted with, for its record: nothing here is secret."""

from __future__ import annotations

from dataclasses import dataclass

from privacy.policy import Ckks
from wire.ciphertexts import Scheme

__all__ = ["EncryptionSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptionSettings:
    """The parameters of an encrypted layer.

    Attributes:
        ring_degree: of the polynomials.
        modulus_bits: of their coefficients.
        security_bits: by the HomomorphicEncryption.org table.
        value_bits: what goes up is scaled by two to the power of so many.
        weight_bits: the same for the layer's weights.
        clip: L2 norm of a row that goes up, at most.
        gradient_clip: L2 norm of a record's gradient over all that learns, at most; nothing where it is not noised.
        noise: standard deviation on the sum of gradients, in units of ``gradient_clip``.
        weights: ``sent``: the layer's weights come down with each step. ``kept``: gradients go up encrypted instead.
    """

    ring_degree: int
    modulus_bits: int
    security_bits: int
    value_bits: int
    weight_bits: int
    clip: float
    gradient_clip: float | None
    noise: float | None
    weights: str

    @classmethod
    def of(cls, scheme: Scheme, treatment: Ckks) -> EncryptionSettings:
        """Of a run by ``scheme``, its noise settled."""
        return cls(
            ring_degree=scheme.ring.degree,
            modulus_bits=scheme.ring.modulus.bit_length(),
            security_bits=scheme.ring.security_bits,
            value_bits=scheme.value_bits,
            weight_bits=scheme.weight_bits,
            clip=treatment.clip,
            gradient_clip=None if treatment.noise is None else treatment.gradient_clip,
            noise=treatment.noise,
            weights="sent" if treatment.send_weights else "kept",
        )

    def __str__(self) -> str:
        """One line."""
        gradient = "Enc(G) up, Enc(G Wᵀ) down" if self.weights == "kept" else "weights sent with each step"
        return (
            f"CKKS, {self.security_bits}-bit secure: ring degree {self.ring_degree}, modulus of {self.modulus_bits} "
            f"bits, scales 2^{self.value_bits} and 2^{self.weight_bits}, rows of norm {self.clip:g} at most; {gradient}"
        )
