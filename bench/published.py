"""The published protocols' shapes, by the library's own tensors: ``python -m bench.published``, a process of its own.

What *Split Ways* (Khan, Nguyen, Frimpong and Michalas 2023) and its successor do with one batch: the owner encrypts the
activations with TenSEAL's ``CKKSTensor``, the node multiplies them by its weights with the public context, the owner
decrypts the logits. In *batched* mode a ciphertext holds one activation of all rows; otherwise each scalar has its own.
The successor also sends the transposed activations encrypted, and its weights are updated under encryption and go home
to be decrypted. What they do in the clear (front, gradients, sockets) is not counted here, which is in their favour.

Nothing else of the benchmarks imports TenSEAL. One line of JSON goes to stdout: :class:`Published`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Published", "Shape", "main", "measured"]

FEATURES: Final = 256
OUTPUTS: Final = 5
_RATE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Shape:
    """One published way to compute the layer.

    Attributes:
        degree: of the ring.
        primes: bits of each, the special one last.
        scale_bits: what values are scaled by.
        batched: whether the rows of a batch share ciphertexts.
        transposed: whether the activations go up a second time, transposed, for an encrypted update of the weights.
    """

    name: str
    degree: int
    primes: tuple[int, ...]
    scale_bits: int
    batched: bool = True
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """What some batches cost.

    Attributes:
        batches: measured, after one that was not.
        compute_s: CPU-seconds to encrypt, multiply and decrypt, of all of them.
        carry_s: CPU-seconds to write and read what travels.
        wall_s: all of it, by the clock.
        nbytes: that would travel.
        error: the largest of a logit.
    """

    batches: int
    compute_s: float
    carry_s: float
    wall_s: float
    nbytes: int
    error: float


def measured(shape: Shape, batch: int, batches: int) -> Published:
    """Runs ``shape`` in a process of its own."""
    asked = json.dumps({**dataclasses.asdict(shape), "batch": batch, "batches": batches})
    command = [sys.executable, "-m", "bench.published", asked]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 -- our own program
    return Published(**json.loads(done.stdout))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and prints it."""
    parser = argparse.ArgumentParser(prog="python -m bench.published")
    parser.add_argument("asked", type=json.loads, help="a shape, batch and batches, as JSON")
    asked = parser.parse_args(arguments).asked
    batch, batches = asked.pop("batch"), asked.pop("batches")
    found = _measure(Shape(**asked), batch, batches)
    print(json.dumps(dataclasses.asdict(found)))  # noqa: T201 -- the result goes to stdout
    return 0


class _Meter:
    """CPU-seconds by kind, and bytes."""

    def __init__(self) -> None:
        self.compute_s = self.carry_s = 0.0
        self.nbytes, self.error = 0, 0.0
        self._last = time.process_time()

    def compute(self) -> None:
        """What was done since the last call was computing."""
        now = time.process_time()
        self.compute_s, self._last = self.compute_s + now - self._last, now

    def carry(self, data: bytes) -> None:
        """What was done since the last call brought ``data`` to the other side."""
        now = time.process_time()
        self.carry_s, self._last = self.carry_s + now - self._last, now
        self.nbytes += len(data)


def _measure(shape: Shape, batch: int, batches: int) -> Published:
    import tenseal as ts  # noqa: PLC0415 -- here alone, in a process of its own

    # TenSEAL's contexts, not ours: keys are made once.
    context = ts.context(ts.SCHEME_TYPE.CKKS, shape.degree, coeff_mod_bit_sizes=list(shape.primes))
    context.global_scale = 2.0**shape.scale_bits
    public = ts.context_from(context.serialize(save_secret_key=False))
    draws = np.random.default_rng(0)
    weights_FO = draws.normal(size=(FEATURES, OUTPUTS)) / FEATURES**0.5
    _step(ts, shape, (context, public), draws.normal(size=(batch, FEATURES)), weights_FO, _Meter())
    started, meter = time.perf_counter(), _Meter()
    for _ in range(batches):
        _step(ts, shape, (context, public), draws.normal(size=(batch, FEATURES)), weights_FO, meter)
    wall_s = time.perf_counter() - started
    return Published(batches, meter.compute_s, meter.carry_s, wall_s, meter.nbytes, meter.error)


def _step(  # noqa: PLR0917 -- the baseline's few parts
    ts: Any,  # noqa: ANN401 -- a module without types
    shape: Shape,
    contexts: tuple[Any, Any],
    rows_BF: npt.NDArray[np.float64],
    weights_FO: npt.NDArray[np.float64],
    meter: _Meter,
) -> None:
    """One batch: up, the layer, down; and the encrypted update, where the shape has one."""
    own, public = contexts

    def sent(values: npt.NDArray[np.float64]) -> Any:  # noqa: ANN401 -- as above
        tensor = ts.ckks_tensor(own, values.tolist(), batch=shape.batched)
        if shape.batched:
            tensor.reshape_([1, *tensor.shape])
        meter.compute()
        return carried(tensor, public)

    def carried(tensor: Any, context: Any) -> Any:  # noqa: ANN401 -- as above
        data = tensor.serialize()  # TenSEAL reads no foreign bytes safely; these are this process's own
        made = ts.ckks_tensor_from(context, data)
        meter.carry(data)
        return made

    at_node = sent(rows_BF)
    transposed = sent(rows_BF.T) if shape.transposed else None
    logits = at_node.mm(weights_FO.tolist())
    meter.compute()
    home = carried(logits, own)
    found = np.array(home.decrypt().tolist()).reshape(len(rows_BF), OUTPUTS)
    meter.compute()
    if transposed is not None:
        gradient = transposed.mm((found / len(rows_BF)).tolist())
        weights = ts.ckks_tensor(public, weights_FO.tolist(), batch=shape.batched)
        weights.reshape_([1, *weights.shape])
        updated = weights - gradient * _RATE
        meter.compute()
        carried(updated, own).decrypt()
        meter.compute()
    meter.error = max(meter.error, float(np.abs(found - rows_BF @ weights_FO).max()))


if __name__ == "__main__":
    sys.exit(main())
