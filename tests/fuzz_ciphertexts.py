"""Malformed ciphertexts by the thousand, for a node and for an owner (THREATS T02, T17).

``python -m tests.fuzz_ciphertexts --cases 10000`` sends half of them to a node in a process of its own, as raw bytes on
its training and evaluation streams, and answers an owner's steps with the other half. Each must end in a documented
error, or in what an honest message would have given; honest ones in between must pass; and neither side may grow.

What an owner notices, and how surely. Whatever is not exactly as many ciphertexts, of exactly their size, every word
below the modulus and no c1 zero, is refused before it is decrypted. A well-formed ciphertext that was changed without
the key (a bit, a word, a ciphertext, another step's answer) decrypts to numbers of the modulus' size in all rows, and
ends the run: here each of them must. A node that adds a *plaintext* to an honest answer can shift one row's result; of
that the owner notices what falls on rows that it computes itself (32 draws a step), and :data:`SHIFTED` is counted
apart: noticed with probability 1 - (1 - 1/B)^32 in each step, B the batch's rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import psutil
import torch
from torch import nn

import cloister
from client_side.encrypted import EncryptedPart, EncryptedRunner
from client_side.frames import SentFrame
from client_side.link import Link
from client_side.spawn import LocalNode
from client_side.stub import _strict
from privacy.ckks.layer import LayerBound
from privacy.guard import Guard
from privacy.policy import Ckks
from protos import encryption_pb2, node_pb2
from server_side.encrypted import EncryptedLayers, apply_matrix
from server_side.rings import evaluations, slot_polynomials
from tests.wire_client import Job, WireClient
from wire.affine import affine_map
from wire.ciphertexts import (
    RINGS,
    SEED_BYTES,
    Ciphertexts,
    Scheme,
    decode,
    encode_into,
    pack,
    packed_counts,
    spreads,
    unpack,
)
from wire.codec import encode
from wire.codec import encode_into as encode_tensor
from wire.errors import (
    LimitExceededError,
    MessageRejectedError,
    NonFiniteError,
    TamperingSuspectedError,
    TensorRejectedError,
    WireError,
    error_from_rpc,
)

__all__ = ["SHIFTED", "Tally", "fuzz_node", "fuzz_owner", "main"]

CPU: Final = torch.device("cpu")
RING: Final = RINGS[0]
OTHER: Final = RINGS[1]
CLIP: Final = 4.0
ROWS: Final = 24
FEATURES: Final = 24
OUTPUTS: Final = 6
CAPACITY: Final = 32  # blocks of so many rows: all features in one ciphertext
HONEST_EVERY: Final = 25
SETTLED: Final = 200  # cases after which memory may no longer grow
MOST_GROWTH: Final = 48 * 2**20
SHIFTED: Final = "one row's result is shifted"
FORWARD, BACKWARD, UPDATE = (
    node_pb2.PHASE_ENCRYPTED_FORWARD,
    node_pb2.PHASE_ENCRYPTED_BACKWARD,
    node_pb2.PHASE_PARAMETER_GRADIENTS,
)
DOCUMENTED: Final = (
    MessageRejectedError,
    LimitExceededError,
    NonFiniteError,
    TensorRejectedError,
    TamperingSuspectedError,
)
REASONS: Final = {"MESSAGE_REJECTED", "LIMIT_EXCEEDED", "TENSOR_REJECTED"}

Message = encryption_pb2.Ciphertexts


@dataclass
class Tally:
    """What became of the cases.

    Attributes:
        side: whose.
        cases: in all.
        ends: how often each kind of case came to each end.
        honest: messages that were as they should be, and passed.
        wrong: what must not be.
        grown: bytes of memory, from the case :data:`SETTLED` on.
    """

    side: str
    cases: int = 0
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    honest: int = 0
    wrong: list[str] = field(default_factory=list)
    grown: int = 0

    def lines(self) -> list[str]:
        """For people."""
        found = [f"{self.side}: {self.cases} cases, {self.honest} honest ones, {self.grown / 2**20:+.1f} MiB"]
        found += [f"  {kind:<44} {end:<26} {count:>6}" for (kind, end), count in sorted(self.ends.items())]
        return found + [f"  WRONG: {what}" for what in self.wrong]


class _Middle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.mid, self.head = nn.Tanh(), nn.Linear(FEATURES, OUTPUTS), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


def _cut() -> cloister.Cut:
    return cloister.cut(_Middle(), front="front", head="head", example=torch.randn(4, FEATURES))


# --- What is done to a message ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fodder:
    """What mutations draw from.

    Attributes:
        rng: seeded.
        earlier: an honest message of another step.
        seeded: whether honest ones carry seeds in place of c1.
    """

    rng: np.random.Generator
    earlier: Message
    seeded: bool

    def below(self, most: int) -> int:
        """A number from 0 to ``most`` - 1."""
        return int(self.rng.integers(max(1, most)))


def _words(message: Message, fodder: Fodder) -> Any:
    polynomials = 1 if fodder.seeded else 2
    return unpack(np.frombuffer(message.words, dtype="<u8").reshape(polynomials, message.count, -1), RING).copy()


def _with_words(message: Message, words: Any) -> None:
    message.words = pack(words, RING).tobytes()


def _count(m: Message, f: Fodder) -> None:
    m.count = int(f.rng.choice([0, m.count - 1, m.count + 1, 2**31, 2**32 - 1, f.below(2**32)]))


def _block(m: Message, f: Fodder) -> None:
    m.block_rows = int(f.rng.choice([0, 1, 3, 31, 33, 2047, 4096, 2**31, 2**32 - 1]))


def _other_block(m: Message, f: Fodder) -> None:
    """It may ask for as many ciphertexts as the right one."""
    m.block_rows = int(f.rng.choice([block for block in (2, 8, 64, 1024, 2048) if block != m.block_rows]))


def _truncated_words(m: Message, f: Fodder) -> None:
    m.words = m.words[: f.below(len(m.words))]


def _more_words(m: Message, f: Fodder) -> None:
    m.words += f.rng.bytes(1 + f.below(4096))


def _foreign_seeds(m: Message, f: Fodder) -> None:
    m.seeds = f.rng.bytes(f.below(300))


def _a_word_beyond(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    flat = words.reshape(-1)
    flat[f.below(len(flat))] = RING.modulus + f.below(2**RING.bits - RING.modulus)
    _with_words(m, words)


def _all_ones(m: Message, f: Fodder) -> None:
    del f
    m.words = b"\xff" * len(m.words)


def _random_words(m: Message, f: Fodder) -> None:
    m.words = f.rng.bytes(len(m.words))


def _bit_of_a_word(m: Message, f: Fodder) -> None:
    data = bytearray(m.words)
    data[f.below(len(data))] ^= 1 << f.below(8)
    m.words = bytes(data)


def _word_exchanged(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    flat = words.reshape(-1)
    flat[f.below(len(flat))] = f.below(RING.modulus)
    _with_words(m, words)


def _polynomials_swapped(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    _with_words(m, np.ascontiguousarray(words[::-1]) if len(words) > 1 else np.roll(words, 1, axis=2))


def _ciphertexts_permuted(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    _with_words(m, np.roll(words, 1, axis=1) if words.shape[1] > 1 else np.roll(words, 1, axis=2))


def _transparent(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    words[-1, f.below(words.shape[1])] = 0
    _with_words(m, words)


def _all_zero(m: Message, f: Fodder) -> None:
    del f
    m.words = bytes(len(m.words))


def _key_extraction(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    number = f.below(words.shape[1])
    if len(words) > 1:
        words[0, number] = 0
    words[-1, number] = 2**32 + f.below(2**32)  # below what a result may err by, it would be a column of zeros
    _with_words(m, words)


def _key_below_an_answer(m: Message, f: Fodder) -> None:
    words = _words(m, f)
    number = f.below(words.shape[1])
    amplitude = 2**32 + f.below(2**32)  # far above what a result may err by, and far below the largest one
    words[-1, number] = (words[-1, number] + np.uint64(amplitude)) % np.uint64(RING.modulus)
    _with_words(m, words)


def _other_ring(m: Message, f: Fodder) -> None:
    polynomials = 1 if f.seeded else 2
    words = f.rng.integers(0, OTHER.modulus, (polynomials, m.count, OTHER.degree), dtype=np.uint64)
    m.words = pack(words, OTHER).tobytes()


def _replayed(m: Message, f: Fodder) -> None:
    m.CopyFrom(f.earlier)


def _words_among_seeds(m: Message, f: Fodder) -> None:
    m.seeds, m.words = m.words, m.seeds
    del f


def _seeds_added_or_lost(m: Message, f: Fodder) -> None:
    m.seeds = m.seeds[:-SEED_BYTES] if m.seeds else f.rng.bytes(SEED_BYTES * m.count)


def _empty(m: Message, f: Fodder) -> None:
    del f
    m.Clear()


def _shifted(m: Message, f: Fodder) -> None:
    """Adds a plaintext that is not zero in one row of one output alone, and far below what no result exceeds."""
    numbers = torch.zeros(RING.degree // 2, dtype=torch.float64)
    numbers[RING.degree // CAPACITY * f.below(CAPACITY // 2)] = 0.25  # the real part of a slot: one row
    plain = evaluations(slot_polynomials(numbers, 2.0**43).remainder(RING.modulus), RING)
    words = _words(m, f)
    number = f.below(words.shape[1])
    words[0, number] = (words[0, number] + plain.numpy().view(np.uint64)) % np.uint64(RING.modulus)
    _with_words(m, words)


STRUCTURED: Final[dict[str, Callable[[Message, Fodder], None]]] = {
    "another count": _count,
    "another block": _block,
    "a block for other rows": _other_block,
    "fewer words": _truncated_words,
    "more words": _more_words,
    "foreign seeds": _foreign_seeds,
    "a word that is not below the modulus": _a_word_beyond,
    "nothing but ones": _all_ones,
    "nothing but zeros": _all_zero,
    "random words": _random_words,
    "a bit of a word": _bit_of_a_word,
    "a word exchanged": _word_exchanged,
    "polynomials swapped": _polynomials_swapped,
    "ciphertexts permuted": _ciphertexts_permuted,
    "a transparent ciphertext": _transparent,
    "(0, K)": _key_extraction,
    "K below an honest answer": _key_below_an_answer,
    "words of another ring": _other_ring,
    "an earlier step's message": _replayed,
    "words among the seeds": _words_among_seeds,
    "seeds where none belong, or fewer": _seeds_added_or_lost,
    "an empty message": _empty,
}


def _raw_truncated(data: bytes, f: Fodder) -> bytes:
    return data[: f.below(len(data))]


def _raw_bit(data: bytes, f: Fodder) -> bytes:
    made = bytearray(data)
    made[f.below(min(len(made), 200))] ^= 1 << f.below(8)  # where sizes and tags are
    return bytes(made)


def _raw_garbage(data: bytes, f: Fodder) -> bytes:
    return f.rng.bytes(f.below(min(len(data), 4096)))


def _raw_claim(data: bytes, f: Fodder) -> bytes:
    return data[: f.below(40)] + b"\xff\xff\xff\xff\x0f" + data[40:]  # a length of 4 GB, wherever it falls


RAW: Final[dict[str, Callable[[bytes, Fodder], bytes]]] = {
    "bytes cut off": _raw_truncated,
    "a bit among the headers": _raw_bit,
    "garbage": _raw_garbage,
    "a huge length": _raw_claim,
}
#: Kinds that never decode, for whomever.
NEVER: Final = frozenset({
    "another count", "another block", "fewer words", "more words", "a word that is not below the modulus",
    "nothing but ones", "words of another ring", "words among the seeds", "seeds where none belong, or fewer",
    "an empty message", "ciphertexts where tensors belong",
})  # fmt: skip
WRONG_FIELD: Final = "ciphertexts where tensors belong"


def _kinds(*more: str) -> list[str]:
    return [*STRUCTURED, *RAW, WRONG_FIELD, *more]


# --- An owner who is answered -----------------------------------------------------------------------------------------


class _Told:
    """A stream whose other end answers as a node does, but for what ``change`` makes of its bytes."""

    def __init__(self, layer: EncryptedLayers, values: dict[str, torch.Tensor]) -> None:
        self._layer, self._values = layer, values
        self._read = _strict(node_pb2.TrainResponse)
        self._frame: SentFrame | None = None
        self.change: Callable[[node_pb2.TrainResponse], bytes] = node_pb2.TrainResponse.SerializeToString
        self.earlier = Message()

    def send(self, frame: SentFrame) -> None:
        self._frame = frame

    def receive(self) -> tuple[SentFrame, node_pb2.TrainResponse]:
        assert self._frame is not None
        asked = node_pb2.TrainRequest.FromString(self._frame.data).frame
        response = node_pb2.TrainResponse(step=asked.step, phase=asked.phase)
        self._layer.forward(asked.ciphertexts, self._values, response.ciphertexts)
        for told in self._layer.told(self._values):
            encode_tensor(response.tensors.add(), told)
        honest = Message.FromString(response.ciphertexts.SerializeToString())
        data = self.change(response)
        self.earlier = honest
        return self._frame, self._read(data)


class _Owner:
    """A runner of encrypted steps over such a stream."""

    def __init__(self, *, send_weights: bool) -> None:
        cut, treatment = _cut(), Ckks(clip=CLIP, send_weights=send_weights)
        self.part = EncryptedPart(cut, treatment, workers=1)
        self._matrix = affine_map(cut.program, cut.middle_state(), CPU)[0].numpy()
        layer = EncryptedLayers(cut.program, self.part.scheme, CPU, 2**28)
        self.told = _Told(layer, cut.middle_state())
        link = Link.__new__(Link)
        link._train, link._up, link._down = self.told, 0, 0  # type: ignore[assignment]  # a stream for this
        capacity = CAPACITY if send_weights else ROWS
        self._runner = EncryptedRunner(
            self.part,
            cut,
            link,
            Guard(cloister.Policy(activations=treatment), cloister.Ledger),
            loss=cloister.Loss("cross_entropy"),
            optimizers=[],
            capacity=capacity,
            expected=None,
            seed=0,
            device=CPU,
        )
        norm = float(np.linalg.norm(self._matrix, axis=0).max())
        norm = norm if send_weights else self._runner._most_norm
        self._bound = LayerBound.of(
            self.part.scheme, features=FEATURES, weight_norm=norm, block_rows=self._runner._block
        ).total

    def ask(self, rng: np.random.Generator, change: Callable[[node_pb2.TrainResponse], bytes] | None) -> str:
        """How one product ended: the error's name, ``right``, or ``accepted, and wrong``."""
        rows = rng.normal(size=(ROWS, FEATURES))
        rows *= CLIP / np.linalg.norm(rows, axis=1, keepdims=True)
        self.told.change = change or node_pb2.TrainResponse.SerializeToString
        try:
            made, _ = self._runner._product(0, FORWARD, rows, OUTPUTS)
        except DOCUMENTED as error:
            return type(error).__name__
        return "right" if np.abs(made - rows @ self._matrix).max() <= self._bound else "accepted, and wrong"


def fuzz_owner(cases: int, seed: int = 0) -> Tally:
    """Answers so many products of an owner with malformed ciphertexts."""
    rng, tally = np.random.default_rng(seed), Tally("owner")
    owners = [_Owner(send_weights=True), _Owner(send_weights=False)]
    memory = _Memory(psutil.Process())
    kinds = _kinds(SHIFTED)
    try:
        for case in range(cases):
            owner, kind = owners[case // len(kinds) % 2], kinds[case % len(kinds)]
            if case % HONEST_EVERY == 0:
                _expect(tally, owner.ask(rng, None) == "right", f"case {case}: an honest answer is refused")
                tally.honest += 1
            fodder = Fodder(rng, owner.told.earlier, seeded=False)
            same: list[bool] = []
            end = owner.ask(rng, lambda r, k=kind, f=fodder, s=same: _changed_answer(r, k, f, s))  # type: ignore[misc]  # bound now
            end = "right" if same[0] and end == "right" else end
            tally.ends[kind, end] += 1
            # Of weights that the node keeps, it may have others: an order of its results, say.
            other_weights = owner is owners[1] and kind == "ciphertexts permuted"
            allowed = end != "accepted, and wrong" or kind == SHIFTED or other_weights
            refused = kind not in NEVER or end.endswith("Error") or same[0]
            _expect(tally, allowed and refused, f"case {case}: {kind}: {end}")
            tally.cases += 1
            memory.look(case)
    finally:
        for owner in owners:
            owner.part.close()
    tally.grown = memory.grown
    _expect(tally, tally.grown < MOST_GROWTH, f"grew by {tally.grown} bytes")
    return tally


def _changed_answer(response: node_pb2.TrainResponse, kind: str, fodder: Fodder, same: list[bool]) -> bytes:
    honest = response.SerializeToString()
    if kind == SHIFTED:
        _shifted(response.ciphertexts, fodder)
    elif kind == WRONG_FIELD:
        response.tensors.add().data = response.ciphertexts.words
        response.ClearField("ciphertexts")
    elif kind in STRUCTURED:
        STRUCTURED[kind](response.ciphertexts, fodder)
    data = response.SerializeToString()
    data = RAW[kind](data, fodder) if kind in RAW else data
    same.append(data == honest)
    return data


# --- A node that is asked ---------------------------------------------------------------------------------------------


class _Client:
    """A session of one node, at whatever step it stands."""

    def __init__(self, node: LocalNode) -> None:
        torch.manual_seed(0)
        module = nn.Linear(FEATURES, OUTPUTS)
        self.scheme = Scheme(row_norm=CLIP)
        job = Job.of(module, torch.randn(4, FEATURES), max_rows=CAPACITY, max_in_flight=1)
        self._client = WireClient(node.address, node.owner)
        self.session = self._client.open(job, encryption=self.scheme.to_proto())
        self._matrix = module.weight.detach().double().T.contiguous()
        self.step, self.forwarded = 0, False
        self._zeros = [encode(torch.zeros_like(p)) for p in module.parameters()]

    def close(self) -> None:
        self._client.close(self.session)
        self._client.channel.close()

    def honest(self, rng: np.random.Generator, phase: node_pb2.Phase.ValueType = FORWARD) -> Message:
        """Ciphertexts as an owner makes them; none that means anything is needed."""
        each, back = RING.degree // CAPACITY, phase == BACKWARD
        features, outputs = (OUTPUTS, FEATURES) if back else (FEATURES, OUTPUTS)
        count, _ = packed_counts(features, outputs, each, spread=back and spreads(features, outputs, each))
        words = rng.integers(0, RING.modulus, (1, count, RING.degree), dtype=np.uint64)
        seeds = rng.integers(0, 256, (count, SEED_BYTES), dtype=np.uint8)
        made = Message()
        encode_into(made, Ciphertexts(CAPACITY, seeds, words), RING)
        return made

    def infer(self, message: Message) -> bytes:
        """A request of the evaluation stream."""
        return node_pb2.InferRequest(batch=node_pb2.Batch(ciphertexts=message)).SerializeToString()

    def train(self, message: Message, phase: node_pb2.Phase.ValueType) -> bytes:
        """A request of the training stream."""
        frame = node_pb2.Frame(step=self.step, phase=phase, ciphertexts=message)
        return node_pb2.TrainRequest(frame=frame).SerializeToString()

    def ask(self, method: str, data: bytes) -> tuple[str, bytes]:
        """How the node ended it: a stable reason, or ``answered``, and with what."""
        attachment = node_pb2.Attachment(session_id=self.session)
        kind = node_pb2.InferRequest if method == "Infer" else node_pb2.TrainRequest
        try:
            answers = self._client.raw(method, kind(attachment=attachment).SerializeToString(), data)
        except grpc.RpcError as error:
            told = error_from_rpc(error)
            return (told.reason if isinstance(told, WireError) else str(error.code())), b""
        return "answered", answers[-1] if answers else b""

    def finish(self) -> str:
        """Ends the step."""
        frame = node_pb2.Frame(step=self.step, phase=UPDATE, update=True, tensors=self._zeros)
        end, _ = self.ask("Train", node_pb2.TrainRequest(frame=frame).SerializeToString())
        self.step, self.forwarded = self.step + 1, False
        return end

    def expected(self, message: Message) -> bytes:
        """What an honest answer's ciphertexts are, to the bit."""
        came = decode(message, RING, count=message.count, block_rows=CAPACITY, seeded=True, max_bytes=2**28)
        made = Message()
        encode_into(made, Ciphertexts(CAPACITY, None, apply_matrix(came, self._matrix, self.scheme, CPU)), RING)
        return made.SerializeToString()


def fuzz_node(cases: int, node: LocalNode, seed: int = 0) -> Tally:
    """Sends a node so many malformed requests, on its training and evaluation streams."""
    rng, tally = np.random.default_rng(seed), Tally("node")
    memory, client = _Memory(psutil.Process(node.process.pid)), _Client(node)
    kinds, earlier = _kinds(), client.honest(rng)
    for case in range(cases):
        kind, place = kinds[case % len(kinds)], case // len(kinds) % 4
        if case % HONEST_EVERY == 0:
            _ask_honestly(client, rng, tally, case)
        method = "Infer" if place < 2 else "Train"
        phase = BACKWARD if place == 3 else FORWARD
        if phase == BACKWARD and not client.forwarded:
            client.ask("Train", client.train(client.honest(rng), FORWARD))
            client.forwarded = True
        elif phase == FORWARD and client.forwarded:
            client.finish()
        message = client.honest(rng, phase)
        fodder = Fodder(rng, earlier, seeded=True)
        data = _changed_request(client, message, method, phase, fodder, kind=kind)
        end, _ = client.ask(method, data)
        if end == "answered" and method == "Train":
            client.finish()
        tally.ends[kind, end] += 1
        documented = REASONS | ({"STEP_OUT_OF_ORDER", "SESSION_NOT_FOUND"} if kind in RAW else set())
        _expect(
            tally,
            end in documented or (end == "answered" and kind not in NEVER),
            f"case {case}: {kind} in {method}: {end}",
        )
        tally.cases += 1
        memory.look(case)
    client.close()
    tally.grown = memory.grown
    _expect(tally, tally.grown < MOST_GROWTH, f"grew by {tally.grown} bytes")
    _expect(tally, node.process.poll() is None, "the node is gone")
    for word in ("Traceback", "a defect in this node"):
        _expect(tally, word not in node.log.read_text(errors="replace"), f"the node's log says {word}")
    return tally


def _ask_honestly(client: _Client, rng: np.random.Generator, tally: Tally, case: int) -> None:
    message = client.honest(rng)
    end, answer = client.ask("Infer", client.infer(message))
    right = end == "answered" and (
        node_pb2.InferResponse.FromString(answer).ciphertexts.SerializeToString() == client.expected(message)
    )
    _expect(tally, right, f"case {case}: an honest request ends as {end}")
    tally.honest += 1


def _changed_request(
    client: _Client, message: Message, method: str, phase: node_pb2.Phase.ValueType, fodder: Fodder, *, kind: str
) -> bytes:
    if kind in STRUCTURED:
        STRUCTURED[kind](message, fodder)
    if kind == WRONG_FIELD:
        tensor = encode(torch.frombuffer(bytearray(message.words), dtype=torch.int8))
        if method == "Infer":
            return node_pb2.InferRequest(batch=node_pb2.Batch(tensors=[tensor])).SerializeToString()
        frame = node_pb2.Frame(step=client.step, phase=phase, tensors=[tensor])
        return node_pb2.TrainRequest(frame=frame).SerializeToString()
    data = client.infer(message) if method == "Infer" else client.train(message, phase)
    return RAW[kind](data, fodder) if kind in RAW else data


# --- Both -------------------------------------------------------------------------------------------------------------


class _Memory:
    """What a process and its children hold."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self._settled = self._now = 0

    def look(self, case: int) -> None:
        """Now and then."""
        if case % 50 == 0:
            family = [self._process, *self._process.children(recursive=True)]
            self._now = sum(each.memory_info().rss for each in family)
            if case <= SETTLED:
                self._settled = max(self._settled, self._now)

    @property
    def grown(self) -> int:
        """Bytes, since things had settled."""
        return self._now - self._settled


def _expect(tally: Tally, holds: bool, what: str) -> None:  # noqa: FBT001 -- an assertion
    if not holds:
        tally.wrong.append(what)


def main(arguments: Sequence[str] | None = None) -> int:
    """Both sides; 0 where all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began, half = time.monotonic(), options.cases // 2
    with tempfile.TemporaryDirectory() as folder, LocalNode(Path(folder), threads=1) as node:
        tallies = [fuzz_owner(options.cases - half, options.seed), fuzz_node(half, node, options.seed)]
    for line in (line for tally in tallies for line in tally.lines()):
        print(line)  # noqa: T201 - a program
    wrong = sum(len(tally.wrong) for tally in tallies)
    print(f"{time.monotonic() - began:.0f} s: {f'{wrong} are wrong' if wrong else 'all is well'}")  # noqa: T201 - as above
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
