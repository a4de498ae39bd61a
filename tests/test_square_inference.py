"""A middle of linear, square, linear, evaluated under encryption in one go by a real node, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import cloister
from client_side import square_inference, stream
from client_side.link import Query
from client_side.square_inference import square_inference_scheme
from cloister.main import app
from privacy.ckks.square import SquareBatch, rows_at_once
from privacy.policy import CkksSquare, Clear, Policy
from protos import encryption_pb2, node_pb2
from wire.errors import (
    ConfigError,
    LimitExceededError,
    MessageRejectedError,
    NonFiniteError,
    ReleaseRefusedError,
    TamperingSuspectedError,
)

FEATURES, WIDTH, HIDDEN, CLASSES = 12, 16, 8, 3
SQUARE = CkksSquare(row_norm=4.0)  # the front ends in sixteen numbers from -1 to 1
POLICY = Policy(activations=Clear(), inference=SQUARE)
FACTORIES = """
import torch
from torch import nn


class Squared(nn.Module):
    def forward(self, x):
        return x * x


class Net(nn.Module):
    def __init__(self, middle=None):
        super().__init__()
        self.front = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
        self.mid = middle or nn.Sequential(nn.Linear(16, 8), Squared(), nn.Linear(8, 3))
        self.head = nn.Softmax(1)

    def forward(self, x):
        return self.head(self.mid(self.front(x)))


def loader():
    return []
"""
JOB = """
[model]
factory = "square_factories:Net"
[cut]
front = "front"
head = "head"
[data]
train = "square_factories:loader"
[train]
epochs = 1
[optimizer]
name = "sgd"
lr = 0.1
[output]
dir = "run"
[privacy]
activations = "clear"
inference = {{ treatment = "ckks_square", row_norm = 4.0 }}
[node]
address = "{address}"
identity = "{identity}"
"""


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.square(x)


class Net(nn.Module):
    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh())
        self.mid = middle or nn.Sequential(nn.Linear(WIDTH, HIDDEN), Square(), nn.Linear(HIDDEN, CLASSES))
        self.head = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


def records(count: int) -> torch.Tensor:
    return torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(0))


def in_the_clear(model: Net, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(x)
    return made


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as found:
        yield found


@contextlib.contextmanager
def predicting(
    node: cloister.LocalNode, model: Net, folder: Path, policy: Policy = POLICY
) -> Iterator[cloister.Trainer]:
    cut = cloister.cut(model, front="front", head="head", example=torch.randn(4, FEATURES))
    with (
        contextlib.closing(cloister.Ledger(f"sqlite:///{folder / 'privacy.sqlite'}")) as ledger,
        cloister.Trainer(
            cut,
            node=node.address,
            identity=node.owner,
            policy=policy,
            optimizer=cloister.SGD(lr=0.3),
            ledger=ledger,
        ) as trainer,
    ):
        yield trainer
        assert not ledger.entries()


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[node_pb2.Batch]:
    """What goes up to be evaluated."""
    found: list[node_pb2.Batch] = []
    send = stream.Stream.send

    def recorded(own: Any, request: Any) -> None:
        if isinstance(request, node_pb2.InferRequest) and request.HasField("batch"):
            found.append(request.batch)
        send(own, request)

    monkeypatch.setattr(stream.Stream, "send", recorded)
    return found


def forged(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """A node that changes what it answers."""
    receive = stream.Stream.receive

    def other(own: Any) -> Any:
        request, response = receive(own)
        if isinstance(response, node_pb2.InferResponse):
            change(response)
        return request, response

    monkeypatch.setattr(stream.Stream, "receive", other)


def test_batches_of_any_size_go_up_once_and_come_back_in_order_within_the_tolerance(
    node: cloister.LocalNode, tmp_path: Path, queries: list[node_pb2.Batch]
) -> None:
    model, sizes = Net(), [3, 1, 2000, 900, 5000]
    batches = [(part,) for part in torch.split(records(sum(sizes)), sizes)]

    with predicting(node, model, tmp_path) as trainer:
        made = list(trainer.predictions(batches))
        used, sent = trainer.inference_encryption, trainer.guard.sent

    for output, (x,) in zip(made, batches, strict=True):
        assert (output - in_the_clear(model, x)).abs().max() < SQUARE.tolerance
    scheme = square_inference_scheme(
        cloister.cut(model, front="front", head="head", example=torch.randn(4, FEATURES)), SQUARE
    )
    at_once = rows_at_once(scheme.ring)
    assert -(-sum(sizes) // at_once) <= len(queries) <= len(sizes) + sum(sizes) // at_once
    assert used is not None
    assert (used.degree, used.layers) == (scheme.ring.degree, 2)
    assert used.security_bits >= 128
    assert set(sent) == {"inference", "weights"}


def test_T10_T18_nothing_goes_up_but_ciphertexts(
    node: cloister.LocalNode, tmp_path: Path, queries: list[node_pb2.Batch]
) -> None:
    with predicting(node, Net(), tmp_path) as trainer:
        trainer.evaluate(DataLoader(TensorDataset(records(64), torch.zeros(64, dtype=torch.int64)), 64))
        sent = trainer.guard.sent

    (query,) = queries
    assert not query.tensors
    counts = torch.bincount(torch.frombuffer(bytearray(query.ciphertexts.words), dtype=torch.uint8), minlength=256)
    assert float(counts.float().std() / counts.float().mean()) < 0.05  # uniform, as nothing in the clear is
    assert sent["inference"] == len(query.ciphertexts.words) + len(query.ciphertexts.seeds)


def test_evaluation_follows_training_of_the_same_middle(node: cloister.LocalNode, tmp_path: Path) -> None:
    model = Net()
    data = TensorDataset(records(128), torch.arange(128) % CLASSES)
    clear = dataclasses.replace(cloister.CLEAR, inference=SQUARE)
    cut = cloister.cut(model, front="front", head="head", example=torch.randn(4, FEATURES))
    with (
        contextlib.closing(cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as ledger,
        cloister.Trainer(
            cut,
            node=node.address,
            identity=node.owner,
            policy=clear,
            optimizer=cloister.SGD(lr=0.1),
            ledger=ledger,
        ) as trainer,
    ):
        before = trainer.predict(records(16))
        trainer.fit(DataLoader(data, 32), epochs=1)
        after = trainer.predict(records(16))

    assert (after - before).abs().max() > 10 * SQUARE.tolerance
    assert (after - in_the_clear(model, records(16))).abs().max() < SQUARE.tolerance


class _Earlier:
    """Answers everything with what was answered first."""

    def __init__(self) -> None:
        self.kept = b""

    def __call__(self, response: Any) -> None:
        self.kept = self.kept or response.ciphertexts.SerializeToString()
        response.ciphertexts.ParseFromString(self.kept)


def _two_polynomials(response: Any) -> None:
    words = response.ciphertexts.words
    response.ciphertexts.words = words[: 2 * len(words) // 3]


def _transparent(response: Any) -> None:
    words = response.ciphertexts.words
    response.ciphertexts.words = words[: len(words) // 3] + bytes(2 * len(words) // 3)


def _of_the_key(response: Any) -> None:
    """(0, K, 0), which decrypts to K times the key."""
    third = len(response.ciphertexts.words) // 3
    response.ciphertexts.words = bytes(third) + bytes([1, 0, 0, 0, 0, 0, 0] * (third // 7 + 1))[:third] + bytes(third)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (_Earlier(), TamperingSuspectedError),
        (_of_the_key, TamperingSuspectedError),
        (_transparent, MessageRejectedError),
        (_two_polynomials, MessageRejectedError),
        (lambda r: r.ClearField("ciphertexts"), MessageRejectedError),
        (lambda r: r.tensors.add(), MessageRejectedError),
        (lambda r: setattr(r.ciphertexts, "count", 2**31), MessageRejectedError),
        (lambda r: setattr(r, "index", 7), MessageRejectedError),
    ],
)
def test_T17_T18_forged_answers_end_the_prediction(
    node: cloister.LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, error: type[Exception]
) -> None:
    forged(monkeypatch, change)
    batches = [(part,) for part in torch.split(records(9000), 4500)]

    with predicting(node, Net(), tmp_path) as trainer, pytest.raises(error):
        list(trainer.predictions(batches))


def test_T17_T18_what_was_sent_and_answered_is_kept_and_no_number_is_told(
    node: cloister.LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(monkeypatch, _Earlier())
    batches = [(part,) for part in torch.split(records(9000), 4500)]

    with predicting(node, Net(), tmp_path) as trainer, pytest.raises(TamperingSuspectedError) as told:
        list(trainer.predictions(batches))

    said, _, kept = str(told.value).rpartition("; what it sent is in ")
    assert encryption_pb2.Ciphertexts.FromString(Path(kept).read_bytes()).count == CLASSES
    assert not any(char.isdigit() for char in said)


def test_T17_without_the_checks_another_answer_would_pass(
    node: cloister.LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forged(monkeypatch, _Earlier())

    def unchecked(own: Any, made: Any, *_: Any) -> Any:
        return np.ascontiguousarray(made.real.T)[own._places[: len(own._rows_BF)]]

    monkeypatch.setattr(SquareBatch, "results", unchecked)

    with predicting(node, Net(), tmp_path) as trainer:
        made = list(trainer.predictions([(part,) for part in torch.split(records(9000), 4500)]))

    assert [len(part) for part in made] == [4500, 4500]


def test_rows_longer_than_was_said_are_refused_before_they_leave(
    node: cloister.LocalNode, tmp_path: Path, queries: list[node_pb2.Batch]
) -> None:
    policy = Policy(activations=Clear(), inference=CkksSquare(row_norm=0.5))

    with (
        predicting(node, Net(), tmp_path, policy) as trainer,
        pytest.raises(ConfigError, match=r"0\.5: raise it"),
    ):
        trainer.predict(records(4))
    assert not queries


def test_T06_activations_that_are_not_finite_are_refused(node: cloister.LocalNode, tmp_path: Path) -> None:
    x = records(4)
    x[2, 0] = float("nan")

    with predicting(node, Net(), tmp_path) as trainer, pytest.raises(NonFiniteError):
        trainer.predict(x)


def test_what_does_not_fit_is_refused_with_what_to_do(node: cloister.LocalNode, tmp_path: Path) -> None:
    relu = Net(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)))
    exact = Policy(activations=Clear(), inference=CkksSquare(row_norm=4.0, tolerance=1e-9))

    with predicting(node, relu, tmp_path) as trainer, pytest.raises(ConfigError, match="one square"):
        trainer.predict(records(4))
    with predicting(node, Net(), tmp_path, exact) as trainer, pytest.raises(ConfigError, match="allow more"):
        trainer.predict(records(4))


def test_a_node_refuses_weights_with_which_results_could_wrap_and_layers_that_are_not_there(
    node: cloister.LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Net()
    cut = cloister.cut(model, front="front", head="head", example=torch.randn(4, FEATURES))
    scheme = square_inference_scheme(cut, SQUARE)
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr("client_side.trainer.square_inference_scheme", lambda *_: scheme)
        model.mid[0].weight.mul_(2.0)  # type: ignore[index]  # a Sequential
        with predicting(node, model, tmp_path) as trainer, pytest.raises(LimitExceededError, match="wrap"):
            trainer.predict(records(4))

    monkeypatch.setattr(square_inference, "Query", lambda **given: Query(**given | {"layer": 1}))
    with predicting(node, Net(), tmp_path) as trainer, pytest.raises(MessageRejectedError, match="in one go"):
        trainer.predict(records(4))


def test_the_policy_names_it_and_the_guard_knows_it() -> None:
    assert Policy.from_json(POLICY.to_json()) == POLICY
    with pytest.raises(ConfigError, match="row_norm"):
        Policy.from_json({"activations": "clear", "inference": "ckks_square"})
    with pytest.raises(ConfigError, match="row_norm"):
        CkksSquare(row_norm=0.0)
    with pytest.raises(ReleaseRefusedError, match="no activations in the clear"):
        cloister.Guard(POLICY, None).inference([torch.zeros(1)])


def test_the_command_line_predicts_in_one_go_and_says_so(
    node: cloister.LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "square_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("job.toml").write_text(JOB.format(address=node.address, identity=node.owner.folder), encoding="utf-8")
    import square_factories  # type: ignore[import-not-found]  # noqa: PLC0415 -- just written

    model = square_factories.Net()
    safetensors.torch.save_file(model.state_dict(), "model.safetensors")
    np.save("x.npy", records(50).numpy())

    asked = "predict job.toml --weights model.safetensors --input x.npy --out y.npy --encrypted --format json"
    result = CliRunner().invoke(app, asked.split())

    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["encrypted_layers"], told["security_bits"] >= 128) == (2, True)
    assert np.abs(np.load("y.npy") - in_the_clear(model, records(50)).numpy()).max() < SQUARE.tolerance
