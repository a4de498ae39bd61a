"""What training a layer under encryption would cost, before a run: bytes counted, seconds measured for a moment.

Measured are, in a second or so and on this machine alone: encrypting and decrypting a ciphertext, the node's product
of ciphertexts by weights (on a node like this machine), and the same layer in the clear, forward and backward. All else
is counted. What is left out costs the same with and without encryption: front, head, and each record's gradients.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import torch

from client_side.cutting import Cut
from client_side.sampling import PoissonLoader
from privacy.ckks.layer import block_rows_for
from privacy.ckks.workers import MOST_WORKERS, require_library
from server_side.encrypted import apply_matrix
from wire.affine import check_affine
from wire.ciphertexts import SEED_BYTES, Ciphertexts, Ring, Scheme, expected_bytes
from wire.errors import ConfigError, LimitExceededError, SpecRejectedError

__all__ = ["EncryptedCost", "encrypted_cost"]

_MANY: Final = 2**40  # records: of so many, the sample of a batch varies most
_LEAST_SAMPLED: Final = 32  # rows: what a PoissonLoader expects at least
_MEASURE_S: Final = 0.25  # for each of four figures
_MEASURED: Final = 16  # ciphertexts that a measurement works on
_MEASURED_OUTPUTS: Final = 8
_MEASURED_ROWS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptedCost:
    """One layer's training under encryption, its weights sent down with each step.

    Attributes:
        features: that go up for each row.
        outputs: that come down.
        security_bits: by the HomomorphicEncryption.org table.
        capacity: rows that a batch has room for: what a secret sample may come to.
        bytes_up_per_sample: ciphertexts and the layer's noised gradients, in a batch of the expected size.
        bytes_down_per_sample: ciphertexts and the layer's weights.
        owner_ms_per_sample: of one core, to encrypt and decrypt.
        node_ms_per_sample: to multiply, on a node like this machine.
        home_ms_per_sample: what computing the layer here would take instead, forward and backward.
        times_home: the owner's encryption over that. A layer so many times as wide on both sides would break even.
        bytes_per_epoch: both ways; where the number of records is told.
        seconds_per_epoch: encryption on all cores, the node and the link, one after the other; as above.
    """

    features: int
    outputs: int
    security_bits: int
    capacity: int
    bytes_up_per_sample: int
    bytes_down_per_sample: int
    owner_ms_per_sample: float | None
    node_ms_per_sample: float | None
    home_ms_per_sample: float | None
    times_home: float | None
    bytes_per_epoch: int | None
    seconds_per_epoch: float | None


def encrypted_cost(made: Cut, *, batch: int, records: int | None, link_mbit: float) -> EncryptedCost:
    """What a run with ``made`` would cost.

    Args:
        made: the model's parts.
        batch: rows that are expected in one.
        records: of an epoch, where that is known.
        link_mbit: rate of the line, each way.

    Raises:
        ConfigError: the cut cannot be encrypted so, and why.
    """
    scheme = Scheme(row_norm=1.0)
    ring = scheme.ring
    try:
        features, outputs = check_affine(made.program)
    except (SpecRejectedError, LimitExceededError) as error:
        raise ConfigError(str(error)) from error
    capacity = batch
    if batch >= _LEAST_SAMPLED:
        capacity = PoissonLoader(range(records or _MANY), expected=batch).capacity
    block = block_rows_for(capacity, ring.degree)
    count = -(-features // (ring.degree // block))
    parameters = sum(s.nbytes for s in made.program.state if s.requires_grad)
    up = expected_bytes(ring, count, seeded=True) + parameters
    down = expected_bytes(ring, outputs, seeded=False) + parameters
    home_s = _home(made, min(batch, _MEASURED_ROWS))
    owner_s, node_s = _measured(scheme, count, outputs, block)
    steps = None if records is None else max(1, round(records / batch))
    return EncryptedCost(
        features=features,
        outputs=outputs,
        security_bits=ring.security_bits,
        capacity=capacity,
        bytes_up_per_sample=round(up / batch),
        bytes_down_per_sample=round(down / batch),
        owner_ms_per_sample=_ms(owner_s, batch),
        node_ms_per_sample=_ms(node_s, batch),
        home_ms_per_sample=_ms(home_s, 1),
        times_home=None if owner_s is None else round(owner_s / batch / home_s, 1),
        bytes_per_epoch=None if steps is None else steps * (up + down),
        seconds_per_epoch=None
        if steps is None or owner_s is None or node_s is None
        else round(steps * (owner_s / _cores() + node_s + (up + down) * 8 / (link_mbit * 1e6)), 2),
    )


def _measured(scheme: Scheme, count: int, outputs: int, block: int) -> tuple[float | None, float | None]:
    """Seconds of a step: the owner's, of one core, and the node's; nothing where there is no library to ask."""
    try:
        require_library()
    except ConfigError:
        return None, None
    encrypt_s, decrypt_s = _library(scheme.ring)
    terms = _product(scheme, block) * count * outputs
    return count * encrypt_s + outputs * decrypt_s, terms


@lru_cache(maxsize=4)
def _library(ring: Ring) -> tuple[float, float]:
    """Seconds to encrypt, and to decrypt, one ciphertext."""
    from privacy.ckks.seal import Key  # noqa: PLC0415 -- the library may not be there

    key = Key(ring, os.urandom(SEED_BYTES))
    slots = np.random.default_rng(0).normal(size=(_MEASURED, ring.degree // 2)).astype(np.complex128)
    words = np.random.default_rng(0).integers(0, ring.modulus, (2, _MEASURED, ring.degree), dtype=np.uint64)
    return (
        _timed(lambda: key.encrypt(slots, 2.0**20)) / _MEASURED,
        _timed(lambda: key.decrypt(words, 2.0**40)) / _MEASURED,
    )


@lru_cache(maxsize=8)
def _product(scheme: Scheme, block: int) -> float:
    """Seconds of the node for one ciphertext that comes and one output."""
    ring = scheme.ring
    generator = np.random.default_rng(0)
    words = generator.integers(0, ring.modulus, (1, _MEASURED, ring.degree), dtype=np.uint64)
    seeds = generator.integers(0, 256, (_MEASURED, SEED_BYTES), dtype=np.uint8)
    came = Ciphertexts(block, seeds, words)
    matrix = torch.randn(_MEASURED * (ring.degree // block), _MEASURED_OUTPUTS, dtype=torch.float64)
    seconds = _timed(lambda: apply_matrix(came, matrix, scheme, torch.device("cpu")))
    return seconds / (_MEASURED * _MEASURED_OUTPUTS)


def _home(made: Cut, rows: int) -> float:
    """Seconds of one row, forward and backward, as torch computes the layer here."""
    layer = copy.deepcopy(made.middle)
    inputs = torch.randn(rows, *made.program.inputs[0].shape, requires_grad=True)

    def step() -> None:
        out = layer(inputs)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    return _timed(step) / rows


def _timed(call: Callable[[], object]) -> float:
    """Seconds of the fastest of as many calls as fit; the first one warms up."""
    call()
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < _MEASURE_S:
        at = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - at)
    return fastest


def _cores() -> int:
    return min(MOST_WORKERS, os.cpu_count() or 1)


def _ms(seconds: float | None, rows: int) -> float | None:
    return None if seconds is None else float(f"{1000 * seconds / rows:.4g}")
