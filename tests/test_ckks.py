"""Encryption and decryption in worker processes, how far results err, and what a malicious node can make of them."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from privacy.ckks import layer, worker
from privacy.ckks.layer import (
    LayerBound,
    block_rows_for,
    check_combinations,
    check_probes,
    check_products,
    check_results,
    pack_rows,
    probes,
    unpack_rows,
)
from privacy.ckks.pipes import PREPARE, REQUEST
from privacy.ckks.seal import Key
from privacy.ckks.workers import CipherWorkers, StepKey
from protos import encryption_pb2
from server_side.encrypted import apply_matrix
from server_side.rings import evaluations, slot_polynomials
from wire.ciphertexts import RINGS, Ciphertexts, Scheme, decode, encode_into, unpack
from wire.errors import ConfigError, EncryptionError, MessageRejectedError, TamperingSuspectedError, WireError

RING = RINGS[0]
FEATURES, OUTPUTS, NORM = 24, 3, 8.0
SCHEME = Scheme(row_norm=NORM)
MOST_STALL_S = 0.05


@pytest.fixture(scope="module")
def workers() -> Iterator[CipherWorkers]:
    found = CipherWorkers(RING, 2)
    yield found
    found.close()


def rows_of(count: int, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).normal(size=(count, FEATURES))
    return rows * (NORM / np.linalg.norm(rows, axis=1, keepdims=True))


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(FEATURES, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 4


class Exchange:
    """One step's rows through a node, whose answer may be changed before it is decrypted."""

    def __init__(
        self,
        workers: CipherWorkers,
        count: int = 100,
        *,
        block: int | None = None,
        key: StepKey | None = None,
        seed: int = 0,
    ) -> None:
        self.workers, self.key, self.rows, self.matrix = workers, key or StepKey(), rows_of(count, seed), weights()
        self.block = block or RING.degree
        slots = pack_rows(self.rows, self.block, RING.degree)
        made = workers.encrypt(self.key, slots, 2.0**SCHEME.value_bits)
        words = unpack(made.words.view(np.uint64).reshape(1, len(made.seeds), -1), RING)
        self.up = Ciphertexts(self.block, made.seeds, words)
        self.answer = apply_matrix(self.up, self.matrix, SCHEME, torch.device("cpu"))

    def results(self, answer: Any = None) -> Any:
        words = self.answer if answer is None else answer
        came = Ciphertexts(self.block, None, np.ascontiguousarray(words))
        return unpack_rows(self.workers.decrypt(self.key, came, SCHEME.result_scale), self.block)

    @property
    def bound(self) -> LayerBound:
        norm = float(self.matrix.norm(dim=0).max())
        return LayerBound.of(SCHEME, features=FEATURES, weight_norm=norm, block_rows=self.block)

    def checked(self, answer: Any = None) -> Any:
        """As the owner does it: decoded strictly, decrypted, compared."""
        message = encryption_pb2.Ciphertexts()
        words = self.answer if answer is None else answer
        encode_into(message, Ciphertexts(self.block, None, words), RING)
        came = decode(message, RING, count=OUTPUTS, block_rows=self.block, seeded=False, max_bytes=2**28)
        results = unpack_rows(self.workers.decrypt(self.key, came, SCHEME.result_scale), self.block)
        most = NORM * float(self.matrix.norm(dim=0).max()) + self.bound.total
        check_results(results, len(self.rows), most=most, tolerance=self.bound.total)
        check_products(results, self.rows, self.matrix.numpy(), tolerance=self.bound.total, checked=32)
        return results[: len(self.rows)]


@pytest.mark.parametrize(("count", "block"), [(2048, 2048), (100, 2048), (256, 256), (60, 64), (4, 4), (1, 2)])
def test_results_err_by_no_more_than_the_bound_that_is_derived_for_them(
    workers: CipherWorkers, count: int, block: int
) -> None:
    exchange = Exchange(workers, count, block=block)

    error = np.abs(exchange.results()[:count] - exchange.rows @ exchange.matrix.numpy()).max()

    assert 0 < error < exchange.bound.total
    assert exchange.bound.total < 1e-3
    assert count < 200 or error > exchange.bound.total / 50  # a bound that says nothing would hold as well


def test_rows_that_were_packed_come_back() -> None:
    rows = rows_of(5)

    for block in (2048, 512, 8):
        summed = unpack_rows(pack_rows(rows, block, RING.degree), block)
        alone = np.add.reduceat(rows, range(0, FEATURES, RING.degree // block), axis=1)
        assert np.allclose(summed[:5], alone)
        assert not summed[5:].any()


def test_rows_that_were_spread_come_back_one_by_one() -> None:
    rows = rows_of(5)[:, :3]

    for block in (512, 8):
        slots = pack_rows(rows, block, RING.degree, spread=True)
        found = unpack_rows(slots, block, spread=True)
        each = RING.degree // block
        assert slots.shape == (3, RING.degree // 2)
        assert (found[:5] == rows.repeat(each, axis=1)).all()
        assert not found[5:].any()


def test_the_packing_follows_the_largest_batch() -> None:
    assert [block_rows_for(n, 2048) for n in (1, 3, 4, 64, 65, 512, 513, 2048)] == [2, 4, 4, 64, 128, 512, 2048, 2048]
    with pytest.raises(ConfigError, match="up to 2049 rows"):
        block_rows_for(2049, 2048)


def test_each_step_has_a_key_of_its_own_that_is_never_shown(workers: CipherWorkers) -> None:
    one, other = StepKey(), StepKey()

    assert one.secret != other.secret
    assert one.secret.hex() not in repr(one)
    assert "secret" not in repr(one)
    first, second = (workers.encrypt(one, np.ones((1, 1024), dtype=np.complex128), 1.0) for _ in range(2))
    assert not np.array_equal(first.seeds, second.seeds)  # encryption itself is not derived from the secret
    assert not np.array_equal(first.words, second.words)


def test_a_worker_holds_the_latest_keys_and_makes_none_of_them_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[bytes] = []
    monkeypatch.setattr(worker, "Key", lambda _, secret: made.append(secret))
    monkeypatch.setattr(worker, "_KEYS", 2)
    secrets = [StepKey().secret for _ in range(3)]
    keys: dict[bytes, Any] = {}

    for secret in (secrets[0], secrets[0], secrets[1], secrets[0], secrets[2], secrets[1]):
        asked = io.BytesIO(REQUEST.pack(PREPARE, 0, 0, 0, 0.0, secret))
        assert worker._answered(asked, keys) is None

    assert made == secrets
    assert list(keys) == secrets[1:]


def test_a_request_that_fails_leaves_the_next_one_readable(workers: CipherWorkers) -> None:
    key, slots = StepKey(), np.ones((1, 1024), dtype=np.complex128)
    with pytest.raises(EncryptionError, match="failed"):
        workers.encrypt(key, slots, 2.0**80)

    workers.prepare(key, 1)
    assert len(workers.encrypt(key, slots, 2.0**20).seeds) == 1


def test_a_worker_that_dies_is_told_and_replaced() -> None:
    dying = CipherWorkers(RING, 1)
    try:
        dying.start()
        os.kill(dying.processes[0], signal.SIGKILL)
        with pytest.raises(EncryptionError, match="died"):
            dying.encrypt(StepKey(), np.ones((1, 1024), dtype=np.complex128), 1.0)

        assert len(dying.encrypt(StepKey(), np.ones((1, 1024), dtype=np.complex128), 1.0).seeds) == 1
    finally:
        dying.close()


def test_no_other_thread_of_the_owner_stalls_while_a_step_is_encrypted(workers: CipherWorkers) -> None:
    longest, over = 0.0, threading.Event()

    def beat() -> None:  # as an event loop or a health check would
        nonlocal longest
        last = time.thread_time(), time.monotonic()
        while not over.wait(0.001):
            now = time.thread_time(), time.monotonic()
            longest, last = max(longest, now[1] - last[1]), now

    rows = np.random.default_rng(0).normal(size=(2048, 256))
    stalls = []
    for _ in range(3):  # a loaded machine may keep any thread waiting: one quiet attempt proves that we do not
        longest, over = 0.0, threading.Event()
        watching = threading.Thread(target=beat)
        watching.start()
        key = StepKey()
        made = workers.encrypt(key, pack_rows(rows, 2048, 2048), 2.0**20)
        words = unpack(made.words.view(np.uint64).reshape(1, 256, -1), RING)
        workers.decrypt(key, Ciphertexts(2048, None, np.concatenate([words, words])), 2.0**20)
        over.set()
        watching.join()
        stalls.append(longest)

    assert min(stalls) < MOST_STALL_S


def test_T17_an_honest_answer_passes(workers: CipherWorkers) -> None:
    exchange = Exchange(workers)

    assert np.allclose(exchange.checked(), exchange.rows @ exchange.matrix.numpy(), atol=exchange.bound.total)


def _secret_key(exchange: Exchange) -> Any:
    """The step's key itself, as polynomials' coefficients: what an attack is after."""
    key = Key(RING, exchange.key.secret)
    words = np.zeros((2, 1, RING.degree), dtype=np.uint64)
    words[1] = 1  # (0, 1) decrypts to s
    return key.decrypt(words, 1.0)[0]


def test_T17_T18_a_ciphertext_of_the_key_itself_is_found_out(workers: CipherWorkers) -> None:
    exchange = Exchange(workers)
    amplitude = 2**36
    forged = exchange.answer.copy()
    forged[0], forged[1] = 0, amplitude  # (0, K) decrypts to K times the key

    leaked = exchange.results(forged)[:, 0] * SCHEME.result_scale / amplitude
    with pytest.raises(TamperingSuspectedError):
        exchange.checked(forged)

    secret = _secret_key(exchange)  # without the check, what was decrypted is the key, coefficient by coefficient
    assert np.allclose(leaked, np.concatenate([secret.real, secret.imag]), atol=1e-3)


def test_T17_a_key_hidden_below_an_honest_answer_is_found_out(workers: CipherWorkers) -> None:
    exchange = Exchange(workers)
    forged = exchange.answer.copy()
    # Added to honest results, and far smaller than the largest of them.
    forged[1] = (forged[1] + np.uint64(2**36)) % np.uint64(RING.modulus)

    assert np.abs(exchange.results(forged)).max() < NORM
    with pytest.raises(TamperingSuspectedError):
        exchange.checked(forged)


def test_T17_swapped_replayed_and_rescaled_answers_are_found_out(workers: CipherWorkers) -> None:
    exchange, earlier = Exchange(workers), Exchange(workers)
    swapped = exchange.answer[:, [1, 0, 2]]
    doubled = exchange.answer * np.uint64(2) % np.uint64(RING.modulus)  # as if its scale were another
    shifted = np.roll(exchange.answer, 1, axis=-1)
    zero = exchange.answer.copy()
    zero[:, 0] = (np.uint64(RING.modulus) - zero[:, 0]) % np.uint64(RING.modulus)

    for forged in (swapped, doubled, shifted, earlier.answer, zero):
        with pytest.raises(TamperingSuspectedError):
            exchange.checked(forged)


def test_T17_T18_without_the_checks_each_attack_gets_what_it_wants(workers: CipherWorkers) -> None:
    exchange = Exchange(workers)
    earlier = Exchange(workers, key=exchange.key, seed=1)  # as if a key were of more than one step
    honest, before = exchange.results()[:100], earlier.results()[:100]
    chosen = torch.linspace(-1.0, 1.0, 1024, dtype=torch.float64)
    made = evaluations(slot_polynomials(chosen, SCHEME.result_scale).remainder(RING.modulus), RING)
    transparent = np.zeros_like(exchange.answer)
    transparent[0] = made.numpy().view(np.uint64)

    for forged, wanted in (
        (exchange.answer[:, [1, 0, 2]], honest[:, [1, 0, 2]]),
        (exchange.answer * np.uint64(2) % np.uint64(RING.modulus), 2 * honest),
        (earlier.answer, before),
        (transparent, chosen[:100, None].numpy()),
    ):
        assert np.allclose(exchange.results(forged)[:100], wanted, atol=1e-3)
        with pytest.raises((TamperingSuspectedError, MessageRejectedError)):
            exchange.checked(forged)


def test_T17_numbers_that_would_escape_one_check_alone_meet_another(workers: CipherWorkers) -> None:
    exchange = Exchange(workers)
    results = exchange.results()
    bound = exchange.bound.total
    padded = results.copy()
    padded[-1, 0] = 10 * bound
    for forged, check in (
        (np.full_like(results, 1e9), lambda r: check_results(r, 100, most=20, tolerance=bound)),
        (np.full_like(results, np.nan), lambda r: check_results(r, 100, most=20, tolerance=bound)),
        (padded, lambda r: check_results(r, 100, most=20, tolerance=bound)),
        (padded.T, lambda r: check_results(r, r.shape[0], most=20, tolerance=bound, outputs=100)),
        (
            results + 10 * bound,
            lambda r: check_products(r, exchange.rows, exchange.matrix.numpy(), tolerance=bound, checked=4),
        ),
    ):
        with pytest.raises(TamperingSuspectedError):
            check(forged)


def test_T17_probes_find_out_what_is_no_linear_map_of_all_rows() -> None:
    rows, matrix = rows_of(100), weights().numpy()
    drawn = probes(100)
    honest = np.concatenate([rows, drawn @ rows]) @ matrix
    check_probes(honest, drawn, tolerance=1e-6)

    for forged in (honest + 1e-3, honest + 1e-3 * np.arange(len(honest))[:, None], honest[::-1]):
        with pytest.raises(TamperingSuspectedError):
            check_probes(forged, drawn, tolerance=1e-6)
    assert np.abs(drawn).sum(axis=1).max() <= 1 + 1e-9  # so no probe is longer than the longest row
    assert len(drawn) == layer.PROBES


def test_what_rounding_makes_of_the_rows_beside_is_no_suspicion_in_a_combination() -> None:
    rows, bound = np.zeros((64, 1)), LayerBound(noise=0.0, rounding=1e-3)
    rows[:32] = NORM
    errors = np.roll(rows, 32, axis=0) / NORM * bound.rounding * 0.999  # as large as they may be, and of other rows

    def check(pairs: int) -> None:
        for _ in range(20):  # what is combined is drawn anew each time
            check_combinations(errors, rows, np.zeros_like, bound=bound, row_norm=NORM, pairs=pairs)

    check(pairs=32)
    with pytest.raises(TamperingSuspectedError):
        check(pairs=0)


def fuzzed(exchange: Exchange, cases: int, seed: int) -> dict[str, int]:
    """Malformed answers, in every way that bytes and words can be wrong; how each ended."""
    generator = np.random.default_rng(seed)
    honest = encryption_pb2.Ciphertexts()
    encode_into(honest, Ciphertexts(exchange.block, None, exchange.answer), RING)
    ends: dict[str, int] = {}
    for _ in range(cases):
        message = encryption_pb2.Ciphertexts.FromString(honest.SerializeToString())
        words = bytearray(message.words)
        kind = generator.integers(7)
        if kind == 0:
            for place in generator.integers(0, len(words), generator.integers(1, 9)):
                words[place] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            words = words[: generator.integers(len(words))]
        elif kind == 2:
            words += generator.bytes(int(generator.integers(1, 64)))
        elif kind == 3:
            message.count = int(generator.integers(0, 2**32))
        elif kind == 4:
            message.block_rows = int(generator.integers(0, 2**32))
        elif kind == 5:
            message.seeds = generator.bytes(int(generator.integers(1, 256)))
        else:
            start = int(generator.integers(len(words)))
            words[start:] = bytes(len(words) - start)
        message.words = bytes(words)
        try:
            came = decode(message, RING, count=OUTPUTS, block_rows=exchange.block, seeded=False, max_bytes=2**24)
            results = unpack_rows(exchange.workers.decrypt(exchange.key, came, SCHEME.result_scale), exchange.block)
            check_results(results, len(exchange.rows), most=40.0, tolerance=exchange.bound.total)
            check_products(results, exchange.rows, exchange.matrix.numpy(), tolerance=exchange.bound.total, checked=32)
            end = "passed"
        except (WireError, TamperingSuspectedError) as error:
            end = type(error).__name__
        ends[end] = ends.get(end, 0) + 1
    return ends


def test_T17_malformed_ciphertexts_end_in_the_documented_errors(workers: CipherWorkers) -> None:
    exchange = Exchange(workers)

    ends = fuzzed(exchange, int(os.environ.get("CLOISTER_FUZZ_CASES", "300")), seed=1)

    assert ends.keys() <= {"MessageRejectedError", "LimitExceededError", "TamperingSuspectedError"}
    assert len(ends) >= 2
