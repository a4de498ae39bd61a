"""The recorded wire of encrypted training, between two processes: what every byte of it is, and what none of it tells.

The recorder stands at the socket (:mod:`tests.wire_recorder`). What may not leave is written down as it is made, by
hooks into the owner; then it is looked for, in every form that a number travels in. And because a search that finds
nothing proves nothing, each way to leak that somebody could build by mistake is built here, and must be found.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from client_side import encrypted, stream
from client_side.encrypted import EncryptedRunner
from client_side.frames import encode_frame
from privacy import dp_sgd
from privacy.ckks.layer import unpack_rows
from privacy.ckks.seal import Key
from privacy.ckks.workers import CipherWorkers, Encrypted, StepKey
from privacy.guard import Guard, Released
from privacy.mechanisms import Noise
from protos import encryption_pb2, node_pb2
from server_side.rings import evaluations, slot_polynomials
from tests.wire_recorder import Recorder, Wire, read
from wire.ciphertexts import RINGS, SEED_BYTES, decode, pack
from wire.errors import CloisterError
from wire.state import load_state

FEATURES: Final = 24
HIDDEN: Final = 16
WIDE: Final = 96  # outputs of the encrypted layer: above any batch, as the published attack needs it
CLASSES: Final = 5
RECORDS: Final = 200
EXPECTED: Final = 40
STEPS: Final = RECORDS // EXPECTED
CLIP: Final = 6.0
NOISE: Final = 1.1
RING: Final = RINGS[0]

FORWARD, BACKWARD, UPDATE = (
    node_pb2.PHASE_ENCRYPTED_FORWARD,
    node_pb2.PHASE_ENCRYPTED_BACKWARD,
    node_pb2.PHASE_PARAMETER_GRADIENTS,
)

#: All that an owner says in a whole encrypted run, and nothing else.
MAY_GO_UP: Final = {
    "CloseSession.session_id",
    "OpenSession.program_chunk",
    "OpenSession.state_chunk",
    "Train.attachment.session_id",
    *(f"OpenSession.spec.{name}" for name in (
        "session_id", "node_fingerprint", "program_sha256", "program_bytes", "state_sha256", "state_bytes", "topology",
        "seed", "max_rows", "max_in_flight", "want_input_gradients", "optimizer.sgd.lr", "optimizer.schedule.decay",
        "optimizer.schedule.gamma", "encryption.ring_degree", "encryption.moduli", "encryption.value_bits",
        "encryption.weight_bits", "encryption.row_norm", "encryption.send_weights",
    )),
    *(f"Train.frame.{name}" for name in ("step", "phase", "update")),
    *(f"Train.frame.ciphertexts.{name}" for name in ("count", "block_rows", "seeds", "words")),
    *(f"Train.frame.tensors.{name}" for name in ("dtype", "codec", "shape", "data")),
    *(f"Snapshot.{name}" for name in ("session_id", "with_optimizer", "known", "keep")),
}  # fmt: skip
#: Names of headers, whose values are the method, the address and gRPC's own.
HEADERS: Final = {
    b":method", b":scheme", b":path", b":authority", b"te", b"content-type", b"user-agent", b"grpc-accept-encoding",
    b"grpc-timeout", b"accept-encoding",
}  # fmt: skip


class Net(nn.Module):
    """Its head is bent, so that the rows of G are independent: the published attack inverts them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
        self.mid = nn.Linear(HIDDEN, WIDE)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(WIDE, CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


def records() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, FEATURES, generator=generator) * 2
    labels = torch.randint(0, CLASSES, (RECORDS,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(RECORDS, FEATURES, generator=generator), labels)


@dataclass
class Secrets:
    """What must not leave, as it was made.

    Attributes:
        numbers: arrays of floats, by what they are.
        scalars: single ones, by what they are.
        labels: of each batch.
        keys: the secrets of the steps' keys.
        activations: of each step's rows, as they were encrypted.
        sums: of each step, the clipped gradients of the layer's parameters before noise, and after.
    """

    numbers: dict[str, list[Any]] = field(default_factory=dict)
    scalars: dict[str, list[float]] = field(default_factory=dict)
    labels: list[Any] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    activations: list[Any] = field(default_factory=list)
    sums: list[tuple[Any, Any]] = field(default_factory=list)

    def keep(self, what: str, *arrays: Any) -> None:
        found = [
            (a.detach().double().numpy().copy() if isinstance(a, torch.Tensor) else np.array(a, dtype=np.float64))
            for a in arrays
        ]
        self.numbers.setdefault(what, []).extend(found)


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """Writes them down."""
    found = Secrets()
    _hear_steps(found, monkeypatch)
    _hear_updates(found, monkeypatch)
    return found


def _hear_steps(found: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    product, head, run, made = EncryptedRunner._product, EncryptedRunner._head, EncryptedRunner.run, StepKey.__init__

    def products(own: Any, step: int, phase: Any, rows: Any, *more: Any, **options: Any) -> Any:
        if phase == FORWARD:
            found.activations.append(np.array(rows))
        results, told = product(own, step, phase, rows, *more, **options)
        found.keep("activations" if phase == FORWARD else "output gradients", rows)
        found.keep("outputs without bias" if phase == FORWARD else "input gradients", results)
        return results, told

    def heads(own: Any, step: int, batch: Any, outputs: Any, kept: Any) -> Any:
        loss, gradients = head(own, step, batch, outputs, kept)
        with torch.no_grad():
            logits = own._cut.head(outputs)
        found.keep("inputs", *batch.inputs)
        found.keep("outputs", outputs)
        found.keep("output gradients", gradients)
        found.keep("logits", logits)
        found.keep("losses of records", nn.functional.cross_entropy(logits, batch.labels, reduction="none"))
        right = (logits.argmax(1) == batch.labels).double().mean().item()
        found.scalars.setdefault("accuracy", []).append(right)
        found.labels.append(batch.labels.numpy().copy())
        for name, parameter in (*own._cut.front.named_parameters(), *own._cut.head.named_parameters()):
            found.keep(f"parameters of {name}", parameter)
        return loss, gradients

    def runs(own: Any, step: int, batch: Any) -> float:
        loss = run(own, step, batch)
        found.scalars.setdefault("loss", []).append(loss)
        return loss

    def keyed(own: Any, *arguments: Any) -> None:
        made(own, *arguments)
        found.keys.append(own.secret)

    monkeypatch.setattr(EncryptedRunner, "_product", products)
    monkeypatch.setattr(EncryptedRunner, "_head", heads)
    monkeypatch.setattr(EncryptedRunner, "run", runs)
    monkeypatch.setattr(StepKey, "__init__", keyed)


def _hear_updates(found: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Guard.update

    def updated(own: Any, gradients: Any, rows: int, parameters: Any) -> Any:
        before = {}
        if gradients is not None:
            pairs = zip(gradients._parameters, gradients._sums, strict=True)
            before = {id(p): (total / rows).numpy().copy() for p, total in pairs}
            found.keep("gradients before noise", *before.values())
        released = update(own, gradients, rows, parameters)
        sent = [r.tensor.double().numpy() for r in released]
        if before:
            found.sums += [(before[id(p)], after) for p, after in zip(parameters, sent, strict=True)]
        return released

    monkeypatch.setattr(Guard, "update", updated)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def recorder(node: cloister.LocalNode) -> Iterator[Recorder]:
    with Recorder(node) as found:
        yield found


Trained = Callable[..., Wire]


@pytest.fixture
def trained(node: cloister.LocalNode, recorder: Recorder, tmp_path: Path) -> Trained:
    """One pass through the recorder; what it recorded."""

    def train(*, noise: float | None = NOISE, send_weights: bool = True, may_fail: bool = False) -> Wire:
        recorder.take()
        treatment = cloister.Ckks(clip=CLIP, noise=noise, gradient_clip=0.5, send_weights=send_weights)
        cut = cloister.cut(Net(), front="front", head="head", example=torch.randn(4, FEATURES))
        loader: Any = DataLoader(records(), EXPECTED)
        if noise is not None:
            loader = cloister.PoissonLoader(records(), expected=EXPECTED)
        with (
            contextlib.closing(cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as ledger,
            contextlib.suppress(*((CloisterError,) if may_fail else ())),
            cloister.Trainer(
                cut,
                node=recorder.address,
                identity=node.owner,
                policy=cloister.Policy(activations=treatment, epsilon=math.inf if noise is None else 200.0),
                optimizer=cloister.SGD(lr=0.3),
                ledger=ledger,
                seed=2**40 + 12345,
            ) as trainer,
        ):
            trainer.fit(loader, 1)
        return read(recorder.take())

    return train


# --- The audit --------------------------------------------------------------------------------------------------------


def audit(wire: Wire, secrets: Secrets) -> list[str]:
    """What is wrong with a recording; nothing, where it holds ciphertexts, W, noised updates and framing alone."""
    found = list(wire.odd)
    if sum(wire.sizes().values()) != wire.total:
        found.append(f"{wire.total - sum(wire.sizes().values())} bytes are not accounted for")
    found += [f"{leaf.path} goes up" for leaf in wire.leaves if leaf.way == "up" and leaf.path not in MAY_GO_UP]
    found += [f"a header {name!r}" for way, name, _ in wire.headers if way == "up" and name not in HEADERS]
    found += _places(wire)
    found += _shown(_pieces(wire), secrets)
    found += _readable(wire)
    found += _unnoised(secrets)
    return list(dict.fromkeys(found))


def frames_of(wire: Wire) -> list[node_pb2.Frame]:
    """All that went up."""
    requests = [message for way, name, message in wire.messages if (way, name) == ("up", "Train")]
    return [
        request.frame
        for request in requests
        if isinstance(request, node_pb2.TrainRequest) and request.HasField("frame")
    ]


def _places(wire: Wire) -> Iterator[str]:
    """Tensors go up in updates alone, and ciphertexts nowhere else than where they belong."""
    seeds: set[bytes] = set()
    for frame in frames_of(wire):
        shapes = [tuple(t.shape) for t in frame.tensors]
        if shapes != ([(WIDE, HIDDEN), (WIDE,)] if frame.phase == UPDATE else []):
            yield f"tensors {shapes} in phase {frame.phase}"
        if frame.HasField("ciphertexts") != (frame.phase in (FORWARD, BACKWARD)):
            yield f"ciphertexts in phase {frame.phase}"
        own = frame.ciphertexts.seeds
        drawn = {own[at : at + SEED_BYTES] for at in range(0, len(own), SEED_BYTES)}
        if drawn & seeds or len(drawn) * SEED_BYTES != len(own):
            yield "a seed that came before"
        seeds |= drawn
    for state in (leaf.value for leaf in wire.leaves if leaf.path == "OpenSession.state_chunk"):
        if sorted(tuple(tensor.shape) for tensor in load_state(state).values()) != [(WIDE,), (WIDE, HIDDEN)]:
            yield f"the state {sorted(load_state(state))} goes up"


def _pieces(wire: Wire) -> list[bytes]:
    """All that went up, and all that came down, field by field; headers too."""
    leaves = [leaf.value for leaf in wire.leaves]
    text = [value.encode() for value in leaves if isinstance(value, str)]
    numbers = [struct.pack("<d", value) + struct.pack("<f", value) for value in leaves if isinstance(value, float)]
    headers = [b"".join(pair) for _, *pair in wire.headers]
    return [*(value for value in leaves if isinstance(value, bytes)), *text, *numbers, *headers]


def _forms(values: Any) -> Iterator[tuple[str, Any]]:
    """Eight bytes of an array, everywhere in it and in every form in which floats travel; uint64 [·]."""
    flat = np.ascontiguousarray(values, dtype=np.float64).reshape(-1)
    flat = flat[np.abs(flat) > 1e-4]  # zeros are everywhere, and so are halves that are next to none
    if len(flat) < 4:
        return
    yield "float64", flat.view(np.uint64)
    single = flat.astype(np.float32)
    forms: dict[str, Any] = {"float32": single, "float16": flat.astype(np.float16)}
    forms["bfloat16"] = torch.from_numpy(single).to(torch.bfloat16).view(torch.int16).numpy()
    for name, narrow in forms.items():
        windows = np.lib.stride_tricks.sliding_window_view(narrow, 8 // narrow.itemsize)
        yield name, np.ascontiguousarray(windows).view(np.uint64).reshape(-1)


def _any_in(pattern: Any, there: Any) -> bool:
    """Whether one of the numbers is among those, which are in order."""
    at = np.searchsorted(there, pattern).clip(max=len(there) - 1)
    return bool((there[at] == pattern).any())


def _shown(pieces: list[bytes], secrets: Secrets) -> Iterator[str]:
    """Secrets that stand in the clear somewhere, at whatever place."""
    joined = bytes(8).join(pieces)
    at_each = [np.frombuffer(joined[at : at + (len(joined) - at) // 8 * 8], dtype="<u8") for at in range(8)]
    there = np.sort(np.concatenate(at_each))  # quicker than np.unique, by far
    for what, arrays in secrets.numbers.items():
        for form, pattern in (each for array in arrays for each in _forms(array)):
            if _any_in(pattern, there):
                yield f"{what} as {form}"
    if any(_any_in(np.frombuffer(key, dtype="<u8"), there) for key in secrets.keys):
        yield "a step's key"
    small = bytes(8).join(piece for piece in pieces if len(piece) < 256)  # four bytes are found in any megabyte
    for what, value in ((what, value) for what, values in secrets.scalars.items() for value in values):
        if value not in (0.0, 0.5, 1.0):
            yield from (f"{what} as float64" for _ in [0] if struct.pack("<d", value) in joined)
            yield from (f"{what} as float32" for _ in [0] if struct.pack("<f", value) in small)
            yield from (f"{what} as text" for _ in [0] if f"{value:.4g}".encode() in small)
    for labels in secrets.labels:
        windows = [labels[at : at + 8] for at in range(0, len(labels) - 8, 4)]
        for kind in ("<i8", "<i4", "<i2", "i1", "<f4", "<f8"):
            if any(window.any() and window.astype(kind).tobytes() in joined for window in windows):
                yield f"labels as {np.dtype(kind).name}"


def _readable(wire: Wire) -> Iterator[str]:
    """Ciphertexts that are none: whose bytes are not uniform, or that can be read without the key."""
    up = [frame.ciphertexts for frame in frames_of(wire) if frame.HasField("ciphertexts")]
    answers = [message for _, _, message in wire.messages if isinstance(message, node_pb2.TrainResponse)]
    for carried in (*up, *(answer.ciphertexts for answer in answers if answer.HasField("ciphertexts"))):
        counts = np.bincount(np.frombuffer(carried.words, dtype=np.uint8), minlength=256)
        expected = len(carried.words) / 256
        squares = float(((counts - expected) ** 2 / expected).sum())
        if abs(squares - 255) > 8 * math.sqrt(2 * 255):  # χ² of 255 degrees of freedom
            yield f"words that are not uniform, χ² = {squares:.0f}"
    for carried in up:
        if np.abs(_without_key(carried)).max() < 2 * CLIP * HIDDEN:
            yield "activations that anybody can read"


def _without_key(carried: encryption_pb2.Ciphertexts) -> Any:
    """What c0 alone decodes to."""
    block = carried.block_rows
    made = decode(carried, RING, count=carried.count, block_rows=block, seeded=True, max_bytes=2**28)
    alone = np.concatenate([made.words, np.zeros_like(made.words)])
    return unpack_rows(Key(RING, bytes(64)).decrypt(alone, 2.0**23), block)


def _unnoised(secrets: Secrets) -> Iterator[str]:
    for clear, sent in secrets.sums:
        if clear.size < 100:
            continue
        noise = (sent - clear) * EXPECTED
        if not 0.8 < noise.std() / (NOISE * 0.5) < 1.2:
            yield "an update without its noise"


# --- Honest runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("send_weights", [True, False])
def test_T10_every_byte_of_an_encrypted_run_is_ciphertext_weights_noised_updates_or_framing(
    trained: Trained,
    secrets: Secrets,
    send_weights: bool,  # noqa: FBT001
) -> None:
    wire = trained(send_weights=send_weights)

    assert audit(wire, secrets) == []
    frames = frames_of(wire)
    phases = [FORWARD, UPDATE] if send_weights else [FORWARD, BACKWARD, UPDATE]
    assert [frame.phase for frame in frames] == phases * STEPS
    assert len({len(f.ciphertexts.words) for f in frames if f.phase == FORWARD}) == 1  # whatever the batch's size
    sizes = wire.sizes()
    assert sizes["up Train.frame.tensors.data"] == STEPS * 4 * (WIDE * HIDDEN + WIDE)
    told = STEPS * 4 * ((WIDE * HIDDEN if send_weights else 0) + WIDE)
    assert sizes["down Train.tensors.data"] == told
    ciphertexts = sum(size for name, size in sizes.items() if "ciphertexts" in name)
    framing = sizes["HTTP/2"] + sizes["gRPC"] + sizes["protobuf"]
    assert ciphertexts > 0.7 * wire.total
    assert framing < 0.02 * wire.total
    assert {len(secrets.activations), len(secrets.labels)} == {STEPS}  # the hooks heard every step
    assert len(set(secrets.keys)) == len(secrets.keys) == 1 + STEPS * (1 if send_weights else 2)


# --- Leaks, each of which the audit must find -------------------------------------------------------------------------


def _with_tensors(monkeypatch: pytest.MonkeyPatch, phase: int, tensors: Callable[[], list[Any]], **more: Any) -> None:
    """Frames of ``phase`` carry something beside what they should."""
    encode = encode_frame

    def leaky(**fields: Any) -> Any:
        if fields["phase"] == phase:
            extra = [_released(t) for t in tensors()]
            fields |= {"tensors": [*fields.get("tensors", ()), *extra]} | {k: make() for k, make in more.items()}
        return encode(**fields)

    monkeypatch.setattr(encrypted, "encode_frame", leaky)


def _released(tensor: Any) -> Any:
    """As if a guard had let it out."""
    made = object.__new__(Released)
    for name, value in (("tensor", torch.as_tensor(tensor)), ("kind", "leak"), ("seal", None)):
        object.__setattr__(made, name, value)
    return made


def _activations_beside(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    del secrets
    front = EncryptedRunner._front
    kept: list[Any] = []

    def fronts(own: Any, *more: Any) -> Any:
        smashed, rest = front(own, *more)
        kept[:] = [smashed.detach().clone()]
        return smashed, rest

    monkeypatch.setattr(EncryptedRunner, "_front", fronts)
    _with_tensors(monkeypatch, FORWARD, lambda: kept)


def _half_precision(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    _with_tensors(monkeypatch, UPDATE, lambda: [torch.from_numpy(secrets.numbers["outputs"][-1]).to(torch.bfloat16)])


def _output_gradients_with_the_update(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    _with_tensors(monkeypatch, UPDATE, lambda: [torch.from_numpy(secrets.numbers["output gradients"][-1]).float()])


def _labels_where_labels_go(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    _with_tensors(monkeypatch, UPDATE, list, labels=lambda: _released(secrets.labels[-1]))


def _loss_in_its_field(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    _with_tensors(
        monkeypatch, FORWARD, list, loss_weight=lambda: secrets.scalars["loss"][-1] if secrets.scalars else 0.0
    )


def _loss_in_a_field_of_nobody(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    send = stream.Stream.send

    def sent(own: Any, request: Any) -> None:
        told = struct.pack("<d", secrets.scalars["loss"][-1]) if "loss" in secrets.scalars else b""
        extra = b"\xa2\x06" + bytes([len(told)]) + told if told else b""  # field 100
        object.__setattr__(request, "data", request.data + extra)
        send(own, request)

    monkeypatch.setattr(stream.Stream, "send", sent)


def _accuracy_in_a_header(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    del secrets
    attach = stream.Stream._attach

    def attached(own: Any) -> None:
        dial = own._dial
        own._dial = lambda messages: dial(messages, metadata=(("accuracy", "0.9375"),))
        attach(own)
        own._dial = dial

    monkeypatch.setattr(stream.Stream, "_attach", attached)


def _update_without_noise(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    del secrets

    class Silent(Noise):
        def added_to(self, tensor: torch.Tensor, sigma: float) -> torch.Tensor:
            del sigma
            return tensor.to(torch.float64)

    monkeypatch.setattr(dp_sgd, "Noise", Silent)


def _words_without_a_mask(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    """An encryption that forgot a·s: its words look as random as any, and anybody decodes them."""
    del secrets

    def encrypt(own: Any, key: Any, slots: Any, scale: float) -> Encrypted:
        del own, key
        polynomials = slot_polynomials(torch.from_numpy(slots.real.copy()), scale).remainder(RING.modulus)
        words = evaluations(polynomials, RING).numpy().view(np.uint64)
        seeds = np.random.default_rng().integers(0, 256, (len(slots), SEED_BYTES), dtype=np.uint8)
        return Encrypted(seeds, pack(words, RING).view(np.uint8).reshape(-1))

    monkeypatch.setattr(CipherWorkers, "encrypt", encrypt)


def _keys_for_seeds(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    encrypt = CipherWorkers.encrypt

    def encrypted_(own: Any, key: StepKey, slots: Any, scale: float) -> Encrypted:
        made = encrypt(own, key, slots, scale)
        told = np.frombuffer(key.secret, dtype=np.uint8)
        return Encrypted(np.concatenate([told[None], made.seeds[1:]]), made.words)

    del secrets
    monkeypatch.setattr(CipherWorkers, "encrypt", encrypted_)


def _the_first_ciphertexts_again(monkeypatch: pytest.MonkeyPatch, secrets: Secrets) -> None:
    encrypt, kept = CipherWorkers.encrypt, list[Encrypted]()

    def encrypted_(own: Any, key: StepKey, slots: Any, scale: float) -> Encrypted:
        kept.append(encrypt(own, key, slots, scale))
        return kept[0]

    del secrets
    monkeypatch.setattr(CipherWorkers, "encrypt", encrypted_)


LEAKS: Final = {
    "activations as float32": _activations_beside,
    "outputs as bfloat16": _half_precision,
    "output gradients as float32": _output_gradients_with_the_update,
    "labels as int64": _labels_where_labels_go,
    "loss as float64": _loss_in_its_field,
    "up: a message to Train that holds more than its fields": _loss_in_a_field_of_nobody,
    "a header b'accuracy'": _accuracy_in_a_header,
    "an update without its noise": _update_without_noise,
    "activations that anybody can read": _words_without_a_mask,
    "a step's key": _keys_for_seeds,
    "a seed that came before": _the_first_ciphertexts_again,
}


@pytest.mark.parametrize("what", LEAKS)
def test_T10_the_audit_finds_whatever_leaks(
    what: str, trained: Trained, secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    LEAKS[what](monkeypatch, secrets)

    found = audit(trained(may_fail=True), secrets)

    assert what in found


# --- The published attack ---------------------------------------------------------------------------------------------


def attacked(wire: Wire) -> list[Any]:
    """Khan et al.'s wire carries G and dW in the clear; then pinv(Gᵀ) dW is every activation of the batch.

    On a wire without G, the attacker takes for it what comes nearest: the ciphertexts of G, or of the activations, read
    without a key.

    Returns:
        A guess at the activations of each step, float64 [rows, HIDDEN].
    """
    guesses, nearest = [], np.zeros((0, WIDE))
    for frame in frames_of(wire):
        if frame.HasField("ciphertexts"):
            noise = np.resize(_without_key(frame.ciphertexts)[:EXPECTED], (EXPECTED, WIDE))
            nearest = noise / np.abs(noise).max()
            continue
        tensors = [np.frombuffer(t.data, "<f4").reshape(t.shape).astype(np.float64) for t in frame.tensors]
        told = [t for t in tensors[2:] if t.ndim == 2 and t.shape[1] == WIDE]
        guesses.append(np.linalg.pinv((told or [nearest])[0].T) @ tensors[0])
    return guesses


def closest(guesses: list[Any], secrets: Secrets) -> float:
    """How well the guesses of each step meet any of that step's activations: the mean of the best correlations."""
    found = []
    for guess, real in zip(guesses, secrets.activations, strict=True):
        one, other = (
            (rows - rows.mean(1, keepdims=True)) / np.maximum(rows.std(1, keepdims=True), 1e-12)
            for rows in (guess, real)
        )
        found.append(np.abs(one @ other.T / HIDDEN).max(axis=0).mean())  # each record, by whatever guess is nearest
    return float(np.mean(found))


@pytest.mark.parametrize("send_weights", [True, False])
def test_the_published_attack_recovers_nothing_from_the_recorded_wire(
    trained: Trained,
    secrets: Secrets,
    send_weights: bool,  # noqa: FBT001
) -> None:
    guesses = attacked(trained(send_weights=send_weights))

    generator = np.random.default_rng(0)
    by_chance = [closest([generator.normal(size=(EXPECTED, HIDDEN)) for _ in guesses], secrets) for _ in range(20)]
    of_others = closest([*guesses[1:], guesses[0]], secrets)
    assert len(guesses) == STEPS
    assert closest(guesses, secrets) < max(by_chance) + 0.1
    # An update tells something of all records alike, which ε covers; of those that made it no more than of others.
    assert closest(guesses, secrets) < of_others + 0.05


def test_the_published_attack_recovers_everything_where_output_gradients_leave(
    trained: Trained, secrets: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_tensors(
        monkeypatch, UPDATE, lambda: [torch.from_numpy(secrets.numbers["output gradients"][-1]).double().float()]
    )

    wire = trained(noise=None, may_fail=True)

    guesses = attacked(wire)
    assert guesses
    real = secrets.activations[: len(guesses)]
    error = max(float(np.abs(g - r).max()) for g, r in zip(guesses, real, strict=True))
    assert error < 1e-2
    assert closest(guesses, Secrets(activations=real)) > 0.999
