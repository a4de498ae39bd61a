"""Ciphertexts as they travel, and a node's exact arithmetic on them, beside SEAL's own."""

from __future__ import annotations

import os
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
from protos import encryption_pb2
from server_side.encrypted import EncryptedLayers, apply_matrix
from server_side.expansion import expand
from server_side.rings import combine, evaluations, multiply, slot_polynomials
from wire.affine import affine_map, bias_names, check_affine
from wire.ciphertexts import (
    RINGS,
    SQUARE_RINGS,
    Ciphertexts,
    Ring,
    Scheme,
    decode,
    encode_into,
    pack,
    packed_counts,
    scheme_from_proto,
    security_bits,
    spreads,
    unpack,
)
from wire.errors import ConfigError, LimitExceededError, MessageRejectedError, SpecRejectedError

CPU = torch.device("cpu")
RING = RINGS[0]
SECRET = bytes(range(64))


def random_words(*shape: int, ring: Ring = RING, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, min(ring.moduli), shape, dtype=np.uint64)


def encrypted(slots: Any, ring: Ring = RING, scale: float = 2.0**23) -> Ciphertexts:
    seeds, words = Key(ring, SECRET).encrypt(slots, scale)
    return Ciphertexts(ring.degree, seeds, words[None])


def in_seal(ciphertexts: Ciphertexts, ring: Ring = RING) -> list[Any]:
    """The same ciphertexts as SEAL's own objects."""
    key = Key(ring, SECRET)
    both = [ciphertexts.words[0], expand(ciphertexts.seeds, ring)]  # type: ignore[arg-type]
    made = []
    for c0, c1 in zip(*both, strict=True):
        os.ftruncate(key._file, 0)
        os.pwritev(key._file, [key._template, c0.tobytes(), c1.tobytes()], 0)
        made.append(seal.Ciphertext())
        made[-1].load(key._context, key._path)
    return made


def words_of(cipher: Any, words: int) -> Any:
    data = cipher.dyn_array()
    return np.array([data.at(i) for i in range(2 * words)], dtype=np.uint64).reshape(2, words)


@pytest.mark.parametrize("ring", [*RINGS, *SQUARE_RINGS])
def test_a_seed_expands_to_the_very_words_that_seal_encrypted_with(ring: Ring) -> None:
    key = Key(ring, SECRET)
    key._encoder.encode([0.25, -3.0], 2.0**20, key._plain)
    serial = key._encryptor.encrypt_symmetric(key._plain)
    serial.save(key._path)
    loaded = seal.Ciphertext()
    loaded.load(key._context, key._path)
    seed = np.frombuffer(key._raw(97 + 8 * ring.words + 81), dtype=np.uint8)[-64:]

    assert (expand(seed[None], ring)[0] == words_of(loaded, ring.words)[1]).all()


@pytest.mark.parametrize("moduli", [(2**63 + 29,), (2**63 + 29, 2**62 + 135)])
def test_words_that_a_generator_refuses_are_replaced_in_its_order(moduli: tuple[int, ...]) -> None:
    half = Ring(2048, moduli)  # refuses about every second word, and every fourth
    seed = list(range(8))
    generator = seal.Blake2xbPRNG(seed)
    drawn = iter(lambda: generator.generate() | generator.generate() << 32, None)
    first = [next(drawn) for _ in range(half.words)]
    expected = []
    for place, value in enumerate(first):
        modulus = moduli[place // half.degree]
        bound = 2**64 - 1 - (2**64 - 1) % modulus - 1
        while value >= bound:
            value = next(drawn)  # noqa: PLW2901 -- as SEAL does it
        expected.append(value % modulus)

    made = expand(np.array([seed], dtype="<u8").view(np.uint8), half)

    assert made[0].tolist() == expected


@pytest.mark.parametrize("ring", RINGS)
def test_the_transform_is_that_of_seals_encoder(ring: Ring) -> None:
    numbers = torch.randn(ring.degree // 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    key = Key(ring, SECRET)
    key._encoder.encode(numbers.tolist(), 2.0**20, key._plain)

    made = evaluations(slot_polynomials(numbers, 2.0**20).remainder(ring.modulus), ring)

    assert made.tolist() == [key._plain.data(i) for i in range(ring.degree)]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("period", [2, 8, 1024])
def test_slots_that_repeat_themselves_are_transformed_once(ring: Ring, period: int) -> None:
    numbers = torch.randn(period, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    key = Key(ring, SECRET)
    key._encoder.encode(numbers.repeat(ring.degree // 2 // period).tolist(), 2.0**20, key._plain)

    made = evaluations(slot_polynomials(numbers, 2.0**20).remainder(ring.modulus), ring)

    assert made.shape == (2 * period,)
    whole = made.repeat_interleave(ring.degree // 2 // period)
    assert whole.tolist() == [key._plain.data(i) for i in range(ring.degree)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 26), st.integers(0, 2**32))
def test_a_product_of_words_and_weights_is_exact(features: int, outputs: int, bits: int, seed: int) -> None:
    ring = RINGS[seed % 2]
    words = torch.from_numpy(random_words(2, features, 8, ring=ring, seed=seed).view(np.int64))
    words[0, 0, 0] = ring.modulus - 1
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-(2**bits), 2**bits + 1, (features, outputs), generator=generator)

    made = combine(words, weights, ring)

    for half, output, place in ((0, 0, 0), (1, outputs - 1, 7)):
        column = zip(words[half, :, place].tolist(), weights[:, output].tolist(), strict=True)
        assert int(made[half, output, place]) == sum(w * x for w, x in column) % ring.modulus


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**57), st.integers(0, 2**57), st.booleans())
def test_a_product_of_words_is_exact(one: int, other: int, wide: bool) -> None:  # noqa: FBT001
    ring = RINGS[wide]
    one, other = one % ring.modulus, other % ring.modulus

    assert int(multiply(torch.tensor([one]), torch.tensor([other]), ring)) == one * other % ring.modulus


def test_the_encrypted_layer_equals_seals_evaluator_to_the_bit() -> None:
    features, outputs = 12, 3
    slots = np.random.default_rng(0).normal(size=(features, RING.degree // 2)) + 0j
    came = encrypted(slots)
    weights = torch.randn(features, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(row_norm=8.0)
    made = apply_matrix(came, weights, scheme, CPU)

    context = _context(RING)
    evaluator, encoder = seal.Evaluator(context), seal.CKKSEncoder(context)
    for output in range(outputs):
        terms = []
        for cipher, weight in zip(in_seal(came), weights[:, output], strict=True):
            plain = seal.Plaintext()
            encoder.encode(float(round(float(weight) * 2.0**scheme.weight_bits)), 1.0, plain)
            product = seal.Ciphertext()
            evaluator.multiply_plain(cipher, plain, product)
            terms.append(product)
        total = seal.Ciphertext()
        evaluator.add_many(terms, total)
        assert (words_of(total, RING.degree) == made[:, output]).all()


def test_shared_ciphertexts_equal_seals_evaluator_to_the_bit() -> None:
    features, block = 40, 64  # 32 features in the first ciphertext, 8 in the second
    slots = np.random.default_rng(0).normal(size=(2, RING.degree // 2)) + 0j
    alone = encrypted(slots)
    came = Ciphertexts(block, alone.seeds, alone.words)
    weights = torch.randn(features, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(row_norm=8.0)
    made = apply_matrix(came, weights, scheme, CPU)

    context = _context(RING)
    evaluator, encoder = seal.Evaluator(context), seal.CKKSEncoder(context)
    padded = torch.zeros(64, dtype=torch.float64)
    padded[:features] = weights[:, 0]
    terms = []
    for cipher, own in zip(in_seal(alone), padded.reshape(2, 32), strict=True):
        plain, product = seal.Plaintext(), seal.Ciphertext()
        encoder.encode(own.repeat(block // 2).tolist(), 2.0**scheme.weight_bits, plain)
        evaluator.multiply_plain(cipher, plain, product)
        terms.append(product)
    total = seal.Ciphertext()
    evaluator.add_many(terms, total)
    assert (words_of(total, RING.degree) == made[:, 0]).all()


def test_outputs_that_share_ciphertexts_equal_seals_evaluator_to_the_bit() -> None:
    features, outputs, block = 3, 40, 64  # 32 outputs in the first ciphertext that comes down, 8 in the second
    slots = np.random.default_rng(0).normal(size=(features, RING.degree // 2)) + 0j
    alone = encrypted(slots)
    weights = torch.randn(features, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scheme = Scheme(row_norm=8.0)
    made = apply_matrix(Ciphertexts(block, alone.seeds, alone.words), weights, scheme, CPU, spread=True)

    context = _context(RING)
    evaluator, encoder = seal.Evaluator(context), seal.CKKSEncoder(context)
    padded = torch.zeros(features, 64, dtype=torch.float64)
    padded[:, :outputs] = weights
    assert made.shape == (2, 2, RING.degree)
    for place in range(2):
        terms = []
        for cipher, own in zip(in_seal(alone), padded[:, 32 * place : 32 * place + 32], strict=True):
            plain, product = seal.Plaintext(), seal.Ciphertext()
            encoder.encode(own.repeat(block // 2).tolist(), 2.0**scheme.weight_bits, plain)
            evaluator.multiply_plain(cipher, plain, product)
            terms.append(product)
        total = seal.Ciphertext()
        evaluator.add_many(terms, total)
        assert (words_of(total, RING.degree) == made[:, place]).all()


def test_many_shared_ciphertexts_are_summed_exactly() -> None:
    """More of them, and more outputs, than are multiplied at once."""
    features, outputs, block = 1200, 70, 512
    draws = np.random.default_rng(0)
    words = random_words(1, 300, RING.degree)
    seeds = draws.integers(256, size=(300, 64), dtype=np.uint8)
    weights = torch.from_numpy(draws.normal(size=(features, outputs)))
    scheme = Scheme(row_norm=1.0)

    made = apply_matrix(Ciphertexts(block, seeds, words), weights, scheme, CPU)

    for output in (0, 69):
        total = 0
        for number, own in enumerate(weights[:, output].reshape(300, 4)):
            polynomial = slot_polynomials(own, 2.0**scheme.weight_bits).remainder(RING.modulus)
            first = int(evaluations(polynomial, RING)[0])
            total += int(words[0, number, 0]) * first
        assert int(made[0, output, 0]) == total % RING.modulus


def test_outputs_share_ciphertexts_where_that_is_cheaper() -> None:
    assert spreads(5, 256, 512)
    assert packed_counts(5, 256, 512, spread=True) == (5, 1)
    assert not spreads(256, 5, 512)
    assert packed_counts(256, 5, 512, spread=False) == (1, 5)
    assert not spreads(5, 256, 1)  # nothing shares anything


class _Around(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.front, self.mid, self.head = nn.Tanh(), middle, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


@pytest.mark.parametrize(
    ("middle", "shape"),
    [
        (nn.Linear(6, 4), (6,)),
        (nn.Linear(6, 4, bias=False), (6,)),
        (nn.Sequential(nn.Conv1d(2, 3, 3, stride=2, padding=1), nn.Flatten()), (2, 9)),
        (nn.Conv2d(2, 4, 3, padding="same", groups=2), (2, 5, 6)),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 4)),
    ],
)
def test_a_linear_middle_is_lowered_to_its_matrix(middle: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(3, *shape)
    made = cut(_Around(middle), front="front", head="head", example=x)

    features, outputs = check_affine(made.program)
    matrix, bias = affine_map(made.program, made.middle_state(), CPU)

    assert matrix.shape == (features, outputs)
    assert torch.allclose(x.double().flatten(1) @ matrix + bias, middle.double()(x.double()).flatten(1), atol=1e-12)
    assert bool(bias_names(made.program)) == bool(bias.abs().sum() > 0)


@pytest.mark.parametrize(
    "middle", [nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), nn.ReLU()]
)
def test_a_middle_that_is_more_than_one_linear_map_is_refused(middle: nn.Module) -> None:
    made = cut(_Around(middle), front="front", head="head", example=torch.randn(3, 6))

    with pytest.raises(SpecRejectedError, match="one linear or convolution layer"):
        check_affine(made.program)


@pytest.mark.parametrize("ring", [*RINGS, *SQUARE_RINGS])
def test_packing_gives_back_what_it_packed(ring: Ring) -> None:
    words = random_words(2, 3, ring.words, ring=ring)

    packed = pack(words, ring)

    assert packed.nbytes * 64 == words.nbytes * ring.bits
    assert (unpack(packed, ring) == words).all()


def test_T16_fewer_than_128_bits_of_security_are_refused() -> None:
    assert security_bits(2048, 54) == 128
    assert security_bits(2048, 55) == 0
    assert security_bits(4096, 58) == 256
    with pytest.raises(ConfigError, match="less than 128-bit secure"):
        Scheme(ring=Ring(1024, (18014398509404161,)), row_norm=1.0)
    with pytest.raises(ConfigError, match="not on the list"):
        Scheme(ring=SQUARE_RINGS[0], row_norm=1.0)
    with pytest.raises(SpecRejectedError, match="less than 128-bit secure"):
        scheme_from_proto(
            encryption_pb2.Encryption(ring_degree=2048, moduli=[2**55 + 1], value_bits=20, weight_bits=20)
        )
    for count in (0, 5, 10_000):
        with pytest.raises(SpecRejectedError, match="primes"):
            scheme_from_proto(encryption_pb2.Encryption(ring_degree=2048, moduli=[3] * count))


def test_scales_and_weights_that_could_wrap_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave no room"):
        Scheme(value_bits=30, weight_bits=30, row_norm=1.0)
    scheme = Scheme(row_norm=10.0)
    scheme.check_weights(scheme.largest_result / 10.001)
    with pytest.raises(LimitExceededError, match="wrap"):
        scheme.check_weights(scheme.largest_result / 9.999)
    with pytest.raises(LimitExceededError, match="wrap"):
        scheme.check_weights(float("nan"))


def message(count: int = 3, *, seeded: bool = True) -> encryption_pb2.Ciphertexts:
    made = encryption_pb2.Ciphertexts()
    seeds = np.zeros((count, 64), dtype=np.uint8) if seeded else None
    encode_into(made, Ciphertexts(2048, seeds, random_words(1 if seeded else 2, count, RING.degree)), RING)
    return made


def decoded(of: encryption_pb2.Ciphertexts, count: int = 3, *, seeded: bool = True) -> Ciphertexts:
    return decode(of, RING, count=count, block_rows=2048, seeded=seeded, max_bytes=2**24)


@pytest.mark.parametrize("seeded", [True, False])
def test_decoding_gives_back_what_was_encoded(seeded: bool) -> None:  # noqa: FBT001
    made = decoded(message(seeded=seeded), seeded=seeded)

    assert (made.words == random_words(1 if seeded else 2, 3, RING.degree)).all()


def test_T17_inflated_sizes_and_foreign_words_are_refused_before_they_are_used() -> None:
    def changed(**fields: Any) -> encryption_pb2.Ciphertexts:
        made = message()
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    whole = message()
    for odd, why in (
        (changed(count=2**31), "ciphertexts in blocks"),
        (changed(count=2), "ciphertexts in blocks"),
        (changed(block_rows=1024), "ciphertexts in blocks"),
        (changed(words=whole.words[:-1]), "bytes of words"),
        (changed(words=whole.words + b"\0"), "bytes of words"),
        (changed(words=b""), "bytes of words"),
        (changed(seeds=whole.seeds[1:]), "bytes of seeds"),
        (changed(words=b"\xff" * len(whole.words)), "not below the modulus"),
    ):
        with pytest.raises(MessageRejectedError, match=why):
            decoded(odd)
    with pytest.raises(LimitExceededError):
        decode(whole, RING, count=3, block_rows=2048, seeded=True, max_bytes=2**10)


def test_T17_a_transparent_ciphertext_is_refused() -> None:
    words = random_words(2, 3, RING.degree)
    words[1, 1] = 0  # c1: anybody reads it
    made = encryption_pb2.Ciphertexts()
    encode_into(made, Ciphertexts(2048, None, words), RING)

    with pytest.raises(MessageRejectedError, match="transparent"):
        decoded(made, seeded=False)


def test_T02_T17_a_node_answers_malformed_ciphertexts_with_the_documented_errors() -> None:
    made = cut(_Around(nn.Linear(6, 4)), front="front", head="head", example=torch.randn(3, 6))
    layer = EncryptedLayers(made.program, Scheme(row_norm=1.0), CPU, 2**28)
    values = made.middle_state()
    honest, generator, ends = message(6), np.random.default_rng(0), set()
    for case in range(int(os.environ.get("CLOISTER_FUZZ_CASES", "200"))):
        odd = encryption_pb2.Ciphertexts.FromString(honest.SerializeToString())
        kind = case % 6
        if kind == 0:
            odd.count = int(generator.integers(2**32))
        elif kind == 1:
            odd.block_rows = int(generator.choice([0, 1, 2, 3, 64, 1024, 2047, 4096, 2**31]))
        elif kind == 2:
            odd.words = odd.words[: generator.integers(len(odd.words))]
        elif kind == 3:
            odd.seeds = generator.bytes(int(generator.integers(1000)))
        elif kind == 4:
            odd.words = generator.bytes(len(odd.words))
        else:  # other ciphertexts than were sent are ciphertexts all the same
            odd.seeds = generator.bytes(len(odd.seeds))
        answer = encryption_pb2.Ciphertexts()
        try:
            layer.forward(odd, values, answer)
            ends.add("answered")
            assert answer.count == 4
        except (MessageRejectedError, LimitExceededError) as error:
            ends.add(type(error).__name__)

    assert ends == {"answered", "MessageRejectedError", "LimitExceededError"}


def test_T02_a_layer_whose_matrix_would_not_fit_is_refused_before_it_is_made() -> None:
    wide = cut(_Around(nn.Conv1d(1, 1, 3, padding=1)), front="front", head="head", example=torch.randn(2, 1, 20_000))

    with pytest.raises(LimitExceededError, match="a matrix of 20000 by 20000"):
        check_affine(wide.program)


def test_T06_weights_that_are_not_finite_are_refused() -> None:
    made = cut(_Around(nn.Linear(6, 4)), front="front", head="head", example=torch.randn(3, 6))
    layer = EncryptedLayers(made.program, Scheme(row_norm=1.0), CPU, 2**28)
    values = {name: torch.full_like(t, float("nan")) for name, t in made.middle_state().items()}

    with pytest.raises(LimitExceededError, match="not finite"):
        layer.forward(message(6), values, encryption_pb2.Ciphertexts())
