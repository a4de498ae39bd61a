"""Linear, square, linear in one go under encryption: exact on the node, bounded and checked at the owner's."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tenseal.sealapi as seal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from client_side.cutting import cut
from privacy.ckks.seal import Key, _context
from privacy.ckks.square import SquareBatch, SquareBound, rows_at_once, square_scheme
from privacy.ckks.workers import CipherWorkers, StepKey
from protos import encryption_pb2
from server_side.expansion import expand
from server_side.squares import _add_constants, _squared, apply_square
from wire.ciphertexts import (
    SQUARE_RINGS,
    Ciphertexts,
    Ring,
    decode,
    encode_into,
    expected_bytes,
    scheme_from_proto,
    unpack,
)
from wire.errors import (
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    SpecRejectedError,
    TamperingSuspectedError,
    WireError,
)
from wire.squares import SquareMap, SquareScheme, check_square, square_from_proto, square_map

CPU = torch.device("cpu")
FEATURES, HIDDEN, OUTPUTS, NORM = 12, 5, 3, 4.0
SMALL = SQUARE_RINGS[0]


def layers(features: int = FEATURES, hidden: int = HIDDEN, outputs: int = OUTPUTS, seed: int = 0) -> SquareMap:
    generator = torch.Generator().manual_seed(seed)
    shapes = (features, hidden), (hidden,), (hidden, outputs), (outputs,)
    made = [torch.randn(shape, dtype=torch.float32, generator=generator).double() / 4 for shape in shapes]
    return SquareMap(*made)


def scheme_for(weights: SquareMap, *, tolerance: float = math.inf, row_norm: float = NORM) -> SquareScheme:
    return square_scheme(
        features=len(weights.first),
        hidden=len(weights.bias),
        row_norm=row_norm,
        weight_norm=weights.weight_norm,
        bias_most=weights.bias_most,
        second_sum=weights.second_sum,
        offset_most=weights.offset_most,
        tolerance=tolerance,
    )


def rows_of(count: int, features: int = FEATURES, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).normal(size=(count, features))
    return rows * (NORM / np.linalg.norm(rows, axis=1, keepdims=True))


def random_up(ring: Ring, count: int = FEATURES, seed: int = 0) -> Ciphertexts:
    generator = np.random.default_rng(seed)
    words = generator.integers(0, min(ring.moduli), (1, count, ring.words), dtype=np.uint64)
    return Ciphertexts(ring.degree // 2, generator.integers(0, 256, (count, 64), dtype=np.uint8), words)


@pytest.fixture(scope="module")
def workers() -> Iterator[CipherWorkers]:
    found = CipherWorkers(SMALL, 2)
    yield found
    found.close()


class Exchange:
    """One batch through a node, whose answer may be changed before it is decrypted."""

    def __init__(self, workers: CipherWorkers, scheme: SquareScheme, count: int = 100) -> None:
        self.workers, self.scheme, self.key = workers, scheme, StepKey()
        self.rows, self.layers = rows_of(count), layers()
        self.sent = SquareBatch(self.rows, scheme)
        made = workers.encrypt(self.key, self.sent.slots, 2.0**scheme.value_bits)
        words = unpack(made.words.view(np.uint64).reshape(1, FEATURES, -1), scheme.ring)
        self.up = Ciphertexts(scheme.block_rows, made.seeds, words)
        self.answer = apply_square(self.up, self.layers, scheme, CPU)
        self.bound = SquareBound.of(scheme, features=FEATURES, hidden=HIDDEN)

    def decrypted(self, answer: Any = None) -> Any:
        """As the owner does it: decoded strictly first."""
        message = encryption_pb2.Ciphertexts()
        words = self.answer if answer is None else answer
        encode_into(message, Ciphertexts(self.scheme.block_rows, None, words), self.scheme.ring)
        return self.workers.decrypt(self.key, self.decode(message), self.scheme.result_scale)

    def decode(self, message: encryption_pb2.Ciphertexts) -> Ciphertexts:
        return decode(
            message,
            self.scheme.ring,
            count=OUTPUTS,
            block_rows=self.scheme.block_rows,
            seeded=False,
            max_bytes=2**28,
            polynomials=3,
        )

    def results(self, answer: Any = None, *, known: bool = False) -> Any:
        return self.sent.results(self.decrypted(answer), self.bound, self.layers if known else None)

    def zero(self) -> Any:
        return np.zeros_like(self.answer)


@pytest.mark.parametrize("ring", SQUARE_RINGS)
def test_results_of_linear_square_linear_err_by_no_more_than_their_bound(ring: Ring) -> None:
    weights = layers()
    wide = scheme_for(weights)
    room = int(math.log2(ring.modulus / 4 / wide.result_most))
    scheme = SquareScheme(
        ring=ring,
        value_bits=min(28, room // 4 + 4),
        weight_bits=min(22, room // 4 - 8),
        second_bits=min(24, room - 2 * (min(28, room // 4 + 4) + min(22, room // 4 - 8))),
        row_norm=NORM,
        weight_norm=weights.weight_norm,
        bias_most=weights.bias_most,
        second_sum=weights.second_sum,
        offset_most=weights.offset_most,
    )
    found = CipherWorkers(ring, 1)
    try:
        exchange = Exchange(found, scheme, 1000)
        results = exchange.results(known=True)
    finally:
        found.close()

    error = np.abs(results - weights(torch.from_numpy(exchange.rows)).numpy()).max()

    assert exchange.bound.total / 500 < error < exchange.bound.total


def test_linear_square_linear_equals_seals_evaluator_to_the_bit() -> None:
    weights = layers()
    scheme = scheme_for(weights)
    ring = scheme.ring
    key = Key(ring, bytes(range(64)))
    seeds, words = key.encrypt(np.random.default_rng(0).normal(size=(FEATURES, ring.degree // 2)), 2.0**20)
    came = Ciphertexts(scheme.block_rows, seeds, words[None])
    made = apply_square(came, weights, scheme, CPU)

    context = _context(ring)
    evaluator, encoder = seal.Evaluator(context), seal.CKKSEncoder(context)
    ciphers = []
    for c0, c1 in zip(words, expand(seeds, ring), strict=True):
        os.ftruncate(key._file, 0)
        os.pwritev(key._file, [key._template, c0.tobytes(), c1.tobytes()], 0)
        ciphers.append(seal.Ciphertext())
        ciphers[-1].load(key._context, key._path)

    def plain(value: float, bits: int) -> Any:
        found = seal.Plaintext()
        encoder.encode(float(round(math.ldexp(value, bits))), 1.0, found)
        return found

    def linear(terms: list[Any], by: Any, bits: int, constant: float, constant_bits: int) -> Any:
        products = []
        for cipher, weight in zip(terms, by.tolist(), strict=True):
            products.append(seal.Ciphertext())
            evaluator.multiply_plain(cipher, plain(weight, bits), products[-1])
        total = seal.Ciphertext()
        evaluator.add_many(products, total)
        evaluator.add_plain_inplace(total, plain(constant, constant_bits))
        return total

    squares = []
    for number in range(HIDDEN):
        total = linear(
            ciphers, weights.first[:, number], scheme.weight_bits, float(weights.bias[number]), scheme.hidden_bits
        )
        evaluator.square_inplace(total)
        squares.append(total)
    for number in range(OUTPUTS):
        total = linear(
            squares, weights.second[:, number], scheme.second_bits, float(weights.offset[number]), scheme.result_bits
        )
        data = total.dyn_array()
        assert total.size() == 3
        assert made[:, number].ravel().tolist() == [data.at(i) for i in range(3 * ring.words)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(-(2**20), 2**20, width=32), st.integers(1, 120))
def test_squares_and_constants_are_exact(seed: int, constant: float, bits: int) -> None:
    for part, _ in SQUARE_RINGS[seed % len(SQUARE_RINGS)].parts():
        q = part.modulus
        drawn = np.random.default_rng(seed).integers(0, q, (2, 2, 4))
        drawn[:, 0, 0] = q - 1
        words = torch.from_numpy(drawn)

        squares = _squared(words, part)
        _add_constants(squares, torch.tensor([constant, -constant], dtype=torch.float64), bits, part)

        whole = round(math.ldexp(constant, bits))
        for output, place in ((0, 0), (1, 3)):
            zero, one = (int(v) for v in drawn[:, output, place])
            added = -whole if output else whole
            expected = [(zero * zero + added) % q, 2 * zero * one % q, one * one % q]
            assert squares[:, output, place].tolist() == expected


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32))
def test_every_word_of_a_result_is_what_python_makes_of_the_same_integers(seed: int) -> None:
    weights = layers(4, 3, 2, seed)
    scheme = scheme_for(weights)
    came = random_up(scheme.ring, 4, seed)

    made = apply_square(came, weights, scheme, CPU)

    one = expand(came.seeds, scheme.ring)  # type: ignore[arg-type]
    for part, place in scheme.ring.parts():
        q, word = part.modulus, place.start + seed % scheme.ring.degree
        halves = [[int(x[feature, word]) for feature in range(4)] for x in (came.words[0], one)]
        hidden = [
            [
                sum(round(float(w) * 2**scheme.weight_bits) * x for w, x in zip(weights.first[:, h], half, strict=True))
                for h in range(3)
            ]
            for half in halves
        ]
        for h in range(3):
            hidden[0][h] += round(float(weights.bias[h]) * 2**scheme.hidden_bits)
        pairs = list(zip(*hidden, strict=True))
        for output in range(2):
            by = [round(float(w) * 2**scheme.second_bits) for w in weights.second[:, output]]
            expected = [
                sum(w * a * a for w, (a, _) in zip(by, pairs, strict=True))
                + round(math.ldexp(float(weights.offset[output]), scheme.result_bits)),
                sum(w * 2 * a * b for w, (a, b) in zip(by, pairs, strict=True)),
                sum(w * b * b for w, (_, b) in zip(by, pairs, strict=True)),
            ]
            assert made[:, output, word].tolist() == [value % q for value in expected]


def test_the_smallest_ring_that_errs_by_no_more_than_allowed_is_taken() -> None:
    weights = layers(256, 64, 5)

    taken = [scheme_for(weights, tolerance=allowed) for allowed in (1e6, 1.0, 1e-2, 1e-3)]

    places = [SQUARE_RINGS.index(scheme.ring) for scheme in taken]
    assert places == sorted(places)
    assert len(set(places)) >= 3
    for scheme, allowed in zip(taken, (1e6, 1.0, 1e-2, 1e-3), strict=True):
        assert SquareBound.of(scheme, features=256, hidden=64).total <= allowed
    with pytest.raises(ConfigError, match="would err by up to"):
        scheme_for(weights, tolerance=1e-12)
    with pytest.raises(ConfigError, match="norms"):
        scheme_for(weights, row_norm=math.nan)


def test_T16_rings_of_fewer_than_128_bits_of_security_are_refused() -> None:
    good = scheme_for(layers()).to_proto()
    assert square_from_proto(good) == scheme_for(layers())
    for ring in SQUARE_RINGS:
        assert ring.security_bits >= 128
        assert Ring(ring.degree // 2, ring.moduli, ring.reserved).security_bits == 0

    weaker = encryption_pb2.Encryption()
    weaker.CopyFrom(good)
    weaker.ring_degree //= 2
    with pytest.raises(SpecRejectedError, match="less than 128-bit secure"):
        square_from_proto(weaker)
    longer = encryption_pb2.Encryption()
    longer.CopyFrom(good)
    longer.moduli.append(longer.moduli[0])  # the prime that is kept back counts as well
    with pytest.raises(SpecRejectedError, match="less than 128-bit secure"):
        square_from_proto(longer)
    other = encryption_pb2.Encryption()
    other.CopyFrom(good)
    other.moduli[0] -= 2
    with pytest.raises(SpecRejectedError, match="not on the list"):
        square_from_proto(other)


def test_parameters_of_one_kind_of_session_are_not_taken_for_the_other() -> None:
    good = scheme_for(layers()).to_proto()
    with pytest.raises(SpecRejectedError, match="linear, square, linear"):
        scheme_from_proto(good)
    good.ClearField("square")
    with pytest.raises(SpecRejectedError, match="one layer"):
        square_from_proto(good)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("row_norm", 1e5),
        ("row_norm", math.nan),
        ("row_norm", 0.0),
        ("weight_norm", math.inf),
        ("second_sum", -1.0),
        ("bias_most", math.nan),
        ("offset_most", 2.0**40),
        ("value_bits", 0),
        ("weight_bits", 41),
        ("second_bits", 2**31),
    ],
)
def test_scales_and_norms_that_could_wrap_are_refused(field: str, value: float) -> None:
    message = scheme_for(layers()).to_proto()
    setattr(message.square if field in message.square.DESCRIPTOR.fields_by_name else message, field, value)

    with pytest.raises(SpecRejectedError):
        square_from_proto(message)


@pytest.mark.parametrize("name", ["first", "bias", "second", "offset"])
@pytest.mark.parametrize("factor", [1.01, math.nan, math.inf])
def test_T06_a_node_refuses_weights_with_which_results_could_wrap(name: str, factor: float) -> None:
    weights = layers()
    scheme = scheme_for(weights)
    values = {field: getattr(weights, field) for field in ("first", "bias", "second", "offset")}
    values[name] = values[name] * factor

    with pytest.raises(LimitExceededError, match="the session allows"):
        apply_square(random_up(scheme.ring), SquareMap(**values), scheme, CPU)


def test_T02_a_node_takes_one_seeded_ciphertext_for_each_feature() -> None:
    scheme = scheme_for(layers())
    up = random_up(scheme.ring)
    for odd in (random_up(scheme.ring, FEATURES - 1), Ciphertexts(up.block_rows, None, np.repeat(up.words, 2, axis=0))):
        with pytest.raises(SpecRejectedError, match="with seeds"):
            apply_square(odd, layers(), scheme, CPU)


def test_rows_that_are_too_many_or_too_long_are_refused() -> None:
    scheme = scheme_for(layers())
    most = rows_at_once(scheme.ring)
    SquareBatch(rows_of(most), scheme)
    with pytest.raises(ConfigError, match="send more in several batches"):
        SquareBatch(rows_of(most + 1), scheme)
    with pytest.raises(ConfigError, match="clip"):
        SquareBatch(rows_of(3) * 1.001, scheme)
    with pytest.raises(ConfigError, match="clip"):
        SquareBatch(rows_of(3) * math.nan, scheme)


def test_where_rows_stand_is_drawn_anew_each_time() -> None:
    scheme = scheme_for(layers())

    rows = rows_of(100)

    one, other = (SquareBatch(rows, scheme).slots for _ in range(2))

    places = [[int(np.nonzero((row == slots.T).all(axis=1))[0][0]) for row in rows] for slots in (one, other)]
    assert len(set(places[0])) == len(set(places[1])) == len(rows)
    assert sum(a == b for a, b in zip(*places, strict=True)) < 10


class _Around(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.front, self.mid, self.head = nn.Tanh(), middle, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


class _Squares(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = first, second, how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        made = {
            "pow": lambda: x**2,
            "float": lambda: x**2.0,
            "mul": lambda: x * x,
            "square": lambda: torch.square(x),
            "cube": lambda: x**3,
            "twice": lambda: torch.square(torch.square(x)),
            "none": lambda: x,
            "past": lambda: torch.square(x) + x,
            "relu": lambda: torch.square(torch.relu(x)),
        }[self.how]()
        found: torch.Tensor = self.second(made)
        return found


@pytest.mark.parametrize(
    ("first", "second", "how", "shape"),
    [
        (nn.Linear(6, 4), nn.Linear(4, 3), "pow", (6,)),
        (nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False), "mul", (6,)),
        (nn.Linear(6, 4), nn.Linear(4, 3), "float", (6,)),
        (nn.Conv1d(2, 3, 3, stride=2), nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "square", (2, 9)),
    ],
)
def test_a_middle_of_linear_square_linear_is_lowered_to_its_numbers(
    first: nn.Module, second: nn.Module, how: str, shape: tuple[int, ...]
) -> None:
    x = torch.randn(3, *shape)
    middle = _Squares(first, second, how)
    made = cut(_Around(middle), front="front", head="head", example=x)

    sizes = check_square(made.program)
    found = square_map(made.program, made.middle_state(), CPU)

    assert sizes == (len(found.first), len(found.bias), len(found.offset))
    assert torch.allclose(found(x.double().flatten(1)), middle.double()(x.double()).flatten(1), atol=1e-12)


@pytest.mark.parametrize("how", ["cube", "twice", "none", "past", "relu"])
def test_a_middle_that_is_something_else_is_refused(how: str) -> None:
    middle = _Squares(nn.Linear(6, 4), nn.Linear(4, 3), how)
    made = cut(_Around(middle), front="front", head="head", example=torch.randn(3, 6))

    with pytest.raises(SpecRejectedError):
        check_square(made.program)


def test_T17_an_honest_answer_passes_whether_or_not_the_weights_are_known(workers: CipherWorkers) -> None:
    exchange = Exchange(workers, scheme_for(layers()))
    expected = exchange.layers(torch.from_numpy(exchange.rows)).numpy()

    for known in (True, False):
        assert np.abs(exchange.results(known=known) - expected).max() < exchange.bound.total


def test_an_answer_is_the_right_one_where_a_batch_is_full(workers: CipherWorkers) -> None:
    exchange = Exchange(workers, scheme_for(layers()), rows_at_once(SMALL))
    expected = exchange.layers(torch.from_numpy(exchange.rows)).numpy()

    assert np.abs(exchange.results() - expected).max() < exchange.bound.total


def _secret_key(exchange: Exchange) -> Any:
    """The batch's key itself, as its slots: what an attack is after."""
    key = Key(exchange.scheme.ring, exchange.key.secret)
    words = np.zeros((2, 1, exchange.scheme.ring.words), dtype=np.uint64)
    words[1] = 1  # (0, 1) decrypts to s
    return key.decrypt(words, 1.0)[0]


def _added(answer: Any, polynomial: int, amplitude: int, ring: Ring) -> Any:
    """``amplitude`` times s (or s²) added to all results."""
    made = answer.copy()
    for part, place in ring.parts():
        words = made[polynomial, :, place].astype(object) + amplitude % part.modulus
        made[polynomial, :, place] = (words % part.modulus).astype(np.uint64)
    return made


@pytest.mark.parametrize("polynomial", [1, 2])
def test_T17_T18_ciphertexts_of_the_key_and_of_its_square_are_found_out(
    workers: CipherWorkers, polynomial: int
) -> None:
    exchange = Exchange(workers, scheme_for(layers()))
    amplitude = 2 ** (exchange.scheme.result_bits - 7)
    bare = exchange.zero()
    bare[1] = 1  # transparent ciphertexts are refused before: what decides here is what was decrypted
    forged = _added(bare, polynomial, amplitude, exchange.scheme.ring)
    hidden = _added(exchange.answer, polynomial, amplitude, exchange.scheme.ring)

    leaked = exchange.decrypted(forged)[0] * 2**7
    for odd in (forged, hidden):
        with pytest.raises(TamperingSuspectedError):
            exchange.results(odd)

    # Without the check, what was decrypted is the key, or its square, from which it follows.
    assert np.allclose(leaked, _secret_key(exchange) ** polynomial, atol=1e-3)


def test_T17_swapped_replayed_shifted_and_rescaled_answers_are_found_out(workers: CipherWorkers) -> None:
    scheme = scheme_for(layers())
    exchange, earlier = Exchange(workers, scheme), Exchange(workers, scheme)
    moduli = np.repeat(np.array(SMALL.moduli, dtype=np.uint64), SMALL.degree)
    swapped = exchange.answer[:, [1, 0, 2]]
    doubled = exchange.answer * np.uint64(2) % moduli
    shifted = np.roll(exchange.answer, 1, axis=-1) % moduli
    negated = (moduli - exchange.answer) % moduli
    turned = exchange.answer[[0, 2, 1]]
    one_prime = exchange.answer.copy()
    one_prime[0, :, : SMALL.degree] = np.roll(one_prime[0, :, : SMALL.degree], 1, axis=-1)

    for forged in (shifted, turned, earlier.answer):
        with pytest.raises(TamperingSuspectedError):
            exchange.results(forged)
    for forged in (
        swapped,
        doubled,
        negated,
        one_prime,
    ):  # quadratic maps all the same: found out by who has the weights
        with pytest.raises(TamperingSuspectedError):
            exchange.results(forged, known=True)


def test_T17_what_is_no_one_map_of_all_rows_meets_one_of_the_checks(workers: CipherWorkers) -> None:
    exchange = Exchange(workers, scheme_for(layers()))
    honest, bound = exchange.decrypted(), exchange.bound
    more = 20 * bound.total
    exchange.sent.results(honest, bound)
    slots = np.arange(honest.shape[1])

    for forged, why in (
        (np.full_like(honest, np.nan), "larger than any"),
        (honest + 1e6, "larger than any"),
        (honest + 1j * more, "not real"),
        (honest + (slots % 2) * more, "where nothing was sent"),
        (np.where(np.isin(slots, exchange.sent._empty), honest, honest + more), "no one middle"),
    ):
        with pytest.raises(TamperingSuspectedError, match=why):
            exchange.sent.results(forged, bound)
    with pytest.raises(TamperingSuspectedError, match="own weights"):
        exchange.sent.results(honest + more, bound, exchange.layers)


def _message(exchange: Exchange, words: Any) -> encryption_pb2.Ciphertexts:
    made = encryption_pb2.Ciphertexts()
    encode_into(made, Ciphertexts(exchange.scheme.block_rows, None, words), exchange.scheme.ring)
    return made


def test_T17_answers_of_another_size_or_with_foreign_words_are_refused(workers: CipherWorkers) -> None:
    exchange = Exchange(workers, scheme_for(layers()))
    answer = exchange.answer
    assert (exchange.decode(_message(exchange, answer)).words == answer).all()

    for odd in (answer[:2], np.concatenate([answer, answer[:1]]), answer[:, :2]):
        with pytest.raises(MessageRejectedError):
            exchange.decode(_message(exchange, odd))
    for place, prime in enumerate(SMALL.moduli):
        for word in (prime, 2**SMALL.bits - 1):
            foreign = answer.copy()
            foreign[2, 1, place * SMALL.degree + 7] = word
            with pytest.raises(MessageRejectedError, match="not below the modulus"):
                exchange.decode(_message(exchange, foreign))
    most = answer.copy()
    for part, words in SMALL.parts():
        most[..., words] = part.modulus - 1
    exchange.decode(_message(exchange, most))
    with pytest.raises(LimitExceededError):
        decode(
            _message(exchange, answer),
            SMALL,
            count=OUTPUTS,
            block_rows=exchange.scheme.block_rows,
            seeded=False,
            max_bytes=answer.nbytes - 1,
            polynomials=3,
        )
    assert expected_bytes(SMALL, 1, seeded=True) == 64 + SMALL.polynomial_bytes


def test_T17_transparent_ciphertexts_are_refused_modulo_every_prime(workers: CipherWorkers) -> None:
    exchange = Exchange(workers, scheme_for(layers()))
    for _, place in SMALL.parts():
        transparent = exchange.answer.copy()
        transparent[1:, 2, place] = 0
        with pytest.raises(MessageRejectedError, match="transparent"):
            exchange.decode(_message(exchange, transparent))
        transparent[2, 2, place.start] = 1
        exchange.decode(_message(exchange, transparent))


def test_T17_malformed_answers_end_in_the_documented_errors(workers: CipherWorkers) -> None:
    exchange = Exchange(workers, scheme_for(layers()))
    generator = np.random.default_rng(2)
    honest, ends = _message(exchange, exchange.answer), set()
    for case in range(int(os.environ.get("CLOISTER_FUZZ_CASES", "200"))):
        odd = encryption_pb2.Ciphertexts.FromString(honest.SerializeToString())
        words = bytearray(odd.words)
        kind = case % 6
        if kind == 0:
            for place in generator.integers(0, len(words), generator.integers(1, 9)):
                words[place] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            words = words[: generator.integers(len(words))]
        elif kind == 2:
            odd.count = int(generator.integers(2**32))
        elif kind == 3:
            odd.block_rows = int(generator.integers(2**32))
        elif kind == 4:
            odd.seeds = generator.bytes(int(generator.integers(1, 256)))
        else:
            start = int(generator.integers(len(words)))
            words[start:] = bytes(len(words) - start)
        odd.words = bytes(words)
        try:
            exchange.sent.results(
                workers.decrypt(exchange.key, exchange.decode(odd), exchange.scheme.result_scale), exchange.bound
            )
            ends.add("passed")
        except (WireError, TamperingSuspectedError) as error:
            ends.add(type(error).__name__)

    assert ends <= {"MessageRejectedError", "LimitExceededError", "TamperingSuspectedError"}
    assert len(ends) >= 2
