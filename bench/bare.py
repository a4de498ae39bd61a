"""The baseline: a bare gRPC loop that carries the same messages with the same tensor maths as a split training step.

A stream of raw bytes over mutual TLS (ECDSA P-256): no protobuf, no session, no step numbers, no check of anything, no
second attempt. What Cloister needs beyond it is the price of being safe. The same work is in it: front forward, smashed
data up, middle forward, (loss there, or output down and its gradient up), middle backward and update, input gradient
down, front backward and update; SGD with momentum, float32, one batch in flight. Where sync code can overlap for
nothing, it does: the head updates while the node computes.

What was tried for speed, server-client, in one run with interleaved blocks, one thread a process, on two cores that
were busy with other work too (median samples/s). The differences are within that noise (a second run of the first line
gave 1,588 and 1,717 for the CNN), so the plain sync stream is kept; larger HTTP/2 frames, read chunks and write buffers
changed nothing either.

    ==================  ===========  ===========  ===========  ===========
    variant             MLP vanilla  MLP U-shape  CNN vanilla  CNN U-shape
    ==================  ===========  ===========  ===========  ===========
    sync-sync stream    12,992       8,977        1,697        1,442
    sync-sync unary     13,134       8,006        1,715        1,404
    aio-sync stream     13,639       8,832        1,747        1,683
    sync-aio stream     13,805       9,196        1,733        1,492
    aio-aio stream      12,803       9,288        1,476        1,710
    aio-aio unary       11,306       7,319        -            -
    ==================  ===========  ===========  ===========  ===========

    python -m bench.bare --model cnn --topology u_shape --threads 1
"""

from __future__ import annotations

import argparse
import datetime as dt
import ipaddress
import queue
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, Self, TypeAlias

import grpc
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["BATCH", "CLASSES", "MODELS", "BareLoop", "Parts", "Topology", "measure_bare"]

Topology: TypeAlias = Literal["vanilla", "u_shape"]

BATCH: Final = 64
CLASSES: Final = 10
BLOCKS: Final = 5  # the median of so many blocks is reported: one hiccup of the machine spoils one block
LR: Final = 0.01
MOMENTUM: Final = 0.9
_OPTIONS: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_SERVICE: Final = "bare"
_FLOAT_BYTES: Final = 4

with warnings.catch_warnings():
    # torch warns once a process that the buffer is read-only, which is the point: let that once be now.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class Parts:
    """A cut model: in the vanilla topology the node computes middle and head."""

    front: nn.Module
    middle: nn.Module
    head: nn.Module
    sample_shape: tuple[int, ...]
    smashed_shape: tuple[int, ...]


def mlp() -> Parts:
    """784-256-256-10, cut behind the first layer."""
    front = nn.Sequential(nn.Linear(784, 256), nn.ReLU())
    middle = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
    return Parts(front, middle, nn.Linear(256, CLASSES), (784,), (256,))


def cnn() -> Parts:
    """Two convolutions and two linear layers on 28x28, cut behind the first pooling."""
    front = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    middle = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 128), nn.ReLU()
    )
    return Parts(front, middle, nn.Linear(128, CLASSES), (1, 28, 28), (16, 14, 14))


MODELS: Final[dict[str, Callable[[], Parts]]] = {"mlp": mlp, "cnn": cnn}


def _parts(name: str) -> Parts:
    torch.manual_seed(0)  # both processes build the same model
    return MODELS[name]()


def _sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)


def _floats(data: bytes, *shape: int, count: int = -1) -> Tensor:
    return torch.frombuffer(data, dtype=torch.float32, count=count).view(shape)


def _raw(*tensors: Tensor | None) -> bytes:
    """The tensors' bytes one after another, copied once."""
    return b"".join(tensor.detach().numpy().data for tensor in tensors if tensor is not None)


class _Node:
    """The node's side of the loop: one message in, one message out."""

    def __init__(self, parts: Parts, topology: Topology) -> None:
        self._vanilla = topology == "vanilla"
        self._middle = nn.Sequential(parts.middle, parts.head) if self._vanilla else parts.middle
        self._optimizer = _sgd(self._middle)
        self._shape = (BATCH, *parts.smashed_shape)
        self._floats = torch.Size(self._shape).numel()
        self._waiting: tuple[Tensor, Tensor] | None = None

    def answer(self, data: bytes) -> bytes:
        if self._vanilla:
            return self._loss(data)
        return self._forward(data) if self._waiting is None else self._backward(data, *self._waiting)

    def _loss(self, data: bytes) -> bytes:
        smashed = _floats(data, *self._shape, count=self._floats).requires_grad_()
        labels_B = torch.frombuffer(data, dtype=torch.int64, offset=self._floats * _FLOAT_BYTES)
        self._optimizer.zero_grad()
        loss = cross_entropy(self._middle(smashed), labels_B)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimizer.step()
        return _raw(smashed.grad, loss)

    def _forward(self, data: bytes) -> bytes:
        smashed = _floats(data, *self._shape).requires_grad_()
        output_BD = self._middle(smashed)
        self._waiting = smashed, output_BD
        return _raw(output_BD)

    def _backward(self, data: bytes, smashed: Tensor, output_BD: Tensor) -> bytes:
        self._waiting = None
        self._optimizer.zero_grad()
        output_BD.backward(_floats(data, *output_BD.shape))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._optimizer.step()
        return _raw(smashed.grad)


class _Owner:
    """The owner's side of the loop."""

    def __init__(self, parts: Parts, topology: Topology) -> None:
        self._vanilla = topology == "vanilla"
        self.front, self.head = parts.front, parts.head
        self._front_optimizer, self._head_optimizer = _sgd(self.front), _sgd(self.head)
        self._samples = torch.randn(BATCH, *parts.sample_shape)
        self._labels_B = torch.randint(CLASSES, (BATCH,))
        self._shape = (BATCH, *parts.smashed_shape)
        self._floats = torch.Size(self._shape).numel()
        self.loss = float("nan")

    def step(self, send: Callable[[bytes], None], receive: Callable[[], bytes]) -> None:
        smashed = self.front(self._samples)
        if self._vanilla:
            send(_raw(smashed, self._labels_B))
            data = receive()
            self.loss = _floats(data[-_FLOAT_BYTES:]).item()
        else:
            send(_raw(smashed))
            send(self._head(receive()))
            self._head_optimizer.step()  # while the node computes
            data = receive()
        self._front_optimizer.zero_grad()
        smashed.backward(_floats(data, *self._shape, count=self._floats))
        self._front_optimizer.step()

    def _head(self, data: bytes) -> bytes:
        output_BD = _floats(data, BATCH, -1).requires_grad_()
        self._head_optimizer.zero_grad()
        loss = cross_entropy(self.head(output_BD), self._labels_B)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.loss = loss.item()
        return _raw(output_BD.grad)


class BareLoop:
    """An owner here and a node in a process of its own, connected and ready; a context manager.

    Args:
        model: a name in :data:`MODELS`.
        topology: who computes the loss.
        threads: torch's threads in each process; this process gets its old number back at the end.
    """

    def __init__(self, model: str, topology: Topology, threads: int) -> None:
        self._model, self._topology, self._threads = model, topology, threads

    def __enter__(self) -> Self:
        """Starts the node and connects to it.

        Raises:
            ChildProcessError: the node's process could not start.
        """
        self._threads_before = torch.get_num_threads()
        key, certificate = _identity()
        arguments = ["--serve", "--model", self._model, "--topology", self._topology, "--threads", str(self._threads)]
        # By path and with -P: the modules of this folder may not shadow others.
        command = [sys.executable, "-P", __file__, *arguments]
        self._node = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603  our own file
        port = self._started(key + certificate)
        credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
        self._channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, _OPTIONS)
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        train = self._channel.stream_stream(f"/{_SERVICE}/Train", request_serializer=None, response_deserializer=None)
        self._answers: Iterator[bytes] = iter(train(iter(self._requests.get, None)))
        torch.set_num_threads(self._threads)
        self._owner = _Owner(_parts(self._model), self._topology)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the stream and the node's process."""
        self._requests.put(None)
        self._channel.close()
        self._node.communicate()  # closes its stdin: it ends
        torch.set_num_threads(self._threads_before)

    @property
    def loss(self) -> float:
        """The last step's loss."""
        return self._owner.loss

    def run(self, steps: int) -> float:
        """Trains ``steps`` steps.

        Returns:
            Samples per second.
        """
        started = time.perf_counter()
        for _ in range(steps):
            self._owner.step(self._requests.put, self._answers.__next__)
        return steps * BATCH / (time.perf_counter() - started)

    def _started(self, identity: bytes) -> int:
        if self._node.stdin is None or self._node.stdout is None:
            raise ChildProcessError("the bare node has no pipes")
        self._node.stdin.write(identity + b"\n")
        self._node.stdin.flush()
        line = self._node.stdout.readline()
        if not line:
            raise ChildProcessError("the bare node died; its standard error says why")
        return int(line)


def measure_bare(model_factory_name: str, topology: Topology, steps: int, warmup: int, threads: int) -> float:
    """Times the bare loop.

    Args:
        model_factory_name: a name in :data:`MODELS`.
        topology: who computes the loss.
        steps: timed steps, in :data:`BLOCKS` blocks.
        warmup: steps before them.
        threads: torch's threads in each of the two processes.

    Returns:
        Samples per second, the median of the blocks.
    """
    with BareLoop(model_factory_name, topology, threads) as loop:
        loop.run(warmup)
        return statistics.median(loop.run(max(1, steps // BLOCKS)) for _ in range(BLOCKS))


def _identity() -> tuple[bytes, bytes]:
    """A key and its certificate, which both sides present and both sides trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bare")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, certificate.public_bytes(Encoding.PEM)


def _serve(model: str, topology: Topology, threads: int) -> None:
    """The node's process: takes the identity from stdin, says its port, ends with its stdin."""
    torch.set_num_threads(threads)
    node = _Node(_parts(model), topology)

    def train(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        return map(node.answer, requests)

    key, mark, certificate = b"".join(iter(sys.stdin.buffer.readline, b"\n")).partition(b"-----BEGIN CERTIFICATE")
    credentials = grpc.ssl_server_credentials([(key, mark + certificate)], mark + certificate, require_client_auth=True)
    handlers = {"Train": grpc.stream_stream_rpc_method_handler(train)}
    server = grpc.server(ThreadPoolExecutor(2), options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    print(port, flush=True)  # noqa: T201  whoever started the node needs it
    sys.stdin.buffer.read()
    server.stop(0).wait()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bare", description="The bare gRPC loop's samples per second."
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="mlp")
    parser.add_argument("--topology", choices=["vanilla", "u_shape"], default="u_shape")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", action="store_true", help="be the node's process")
    return parser.parse_args()


def main() -> None:
    """Measures, or is the node that is measured."""
    args = _arguments()
    if args.serve:
        _serve(args.model, args.topology, args.threads)
        return
    rate = measure_bare(args.model, args.topology, args.steps, args.warmup, args.threads)
    print(f"{args.model} {args.topology}, {args.threads} thread(s) a process: {rate:,.0f} samples/s")  # noqa: T201  a CLI


if __name__ == "__main__":
    main()
