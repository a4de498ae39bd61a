"""Training under encryption through a real node: the numbers, what leaves, what it costs, and what is refused."""

from __future__ import annotations

import contextlib
import math
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from client_side import encrypted, link, stream
from client_side.encrypted import EncryptedPart
from client_side.frames import encode_frame
from privacy import dp_sgd
from privacy.accounting import SampledGaussian, epsilon_of
from privacy.mechanisms import Noise
from privacy.policy import Ckks
from protos import node_pb2
from wire.errors import (
    BudgetSpentError,
    ConfigError,
    MessageRejectedError,
    ReleaseRefusedError,
    StepOutOfOrderError,
    TamperingSuspectedError,
)

FEATURES, HIDDEN, CLASSES, RECORDS = 12, 16, 3, 320
CLIP = 6.0


class Net(nn.Module):
    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())
        self.mid = middle or nn.Linear(HIDDEN, CLASSES)
        self.head = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.head(self.mid(self.front(x)))
        return made


def records() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, FEATURES, generator=generator) * 2
    labels = torch.randint(0, CLASSES, (RECORDS,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(RECORDS, FEATURES, generator=generator), labels)


def batches(size: int = 64) -> DataLoader[Any]:
    return DataLoader(records(), size)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as found:
        yield found


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[cloister.Ledger]:
    with contextlib.closing(cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as found:
        yield found


def policy(*, epsilon: float = math.inf, **settings: Any) -> cloister.Policy:
    return cloister.Policy(activations=Ckks(clip=CLIP, **settings), epsilon=epsilon)


def trained(
    node: cloister.LocalNode,
    ledger: cloister.Ledger,
    of: cloister.Policy,
    loader: Any,
    *,
    model: nn.Module | None = None,
    epochs: int = 1,
    momentum: float = 0.0,
    **more: Any,
) -> nn.Module:
    model = model or Net()
    cut = cloister.cut(model, front="front", head="head", example=torch.randn(4, FEATURES))
    sgd = cloister.SGD(lr=0.3, momentum=momentum)
    with cloister.Trainer(
        cut, node=node.address, identity=node.owner, policy=of, optimizer=sgd, ledger=ledger, **more
    ) as trainer:
        trainer.fit(loader, epochs)
    return model


def unencrypted(loader: Any, *, model: nn.Module | None = None) -> nn.Module:
    """The same training in one process, without encryption or privacy; the clip, which is part of the model, stays."""
    model = model or Net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    for x, y in loader:
        sgd.zero_grad()
        smashed = model.front(x)  # type: ignore[operator]
        norms = smashed.flatten(1).norm(dim=1, keepdim=True)
        made = model.head(model.mid(smashed * (CLIP / norms).clamp_max(1.0)))  # type: ignore[operator]
        nn.functional.cross_entropy(made, y).backward()
        sgd.step()
    return model


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("send_weights", [True, False])
def test_encrypted_training_follows_training_in_the_clear(
    node: cloister.LocalNode,
    ledger: cloister.Ledger,
    send_weights: bool,  # noqa: FBT001
) -> None:
    of = policy(send_weights=send_weights)

    made = trained(node, ledger, of, batches())

    assert difference(made, unencrypted(batches())) < 1e-3
    assert difference(made, Net()) > 0.05  # it moved at all


def test_a_convolution_is_trained_under_encryption(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return Net(nn.Sequential(nn.Unflatten(1, (2, 8)), nn.Conv1d(2, 1, 3, stride=2, padding=1), nn.Flatten()))

    made = trained(node, ledger, policy(), batches(), model=model())

    assert difference(made, unencrypted(batches(), model=model())) < 1e-3


def _poisson(monkeypatch: pytest.MonkeyPatch, seed: int) -> cloister.PoissonLoader:
    loader = cloister.PoissonLoader(records(), expected=64)
    monkeypatch.setattr(loader, "_noise", Noise._seeded(seed))
    return loader


def test_with_noise_the_run_is_the_unencrypted_joint_dp_sgd_of_the_same_draws(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise, clip = 1.2, 0.5
    monkeypatch.setattr(dp_sgd, "Noise", lambda: Noise._seeded(7))
    made = trained(node, ledger, policy(noise=noise, gradient_clip=clip), _poisson(monkeypatch, 3))

    model, drawn = Net(), Noise._seeded(7)
    parameters = list(model.parameters())
    for x, y in _poisson(monkeypatch, 3):
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for row, label in zip(x, y, strict=True):
            smashed = model.front(row[None])
            norm = smashed.norm()
            loss = nn.functional.cross_entropy(model.mid(smashed * (CLIP / norm).clamp_max(1.0)), label[None])
            gradients = torch.autograd.grad(loss, parameters)
            whole = torch.cat([g.flatten() for g in gradients]).norm()
            for total, gradient in zip(sums, gradients, strict=True):
                total.add_(gradient.double() * float((clip / whole).clamp_max(1.0)))
        with torch.no_grad():
            for parameter, total in zip(parameters, sums, strict=True):
                parameter.sub_(0.3 * (drawn.added_to(total, noise * clip) / 64).float())

    assert difference(made, model) < 1e-3
    assert difference(made, Net()) > 0.05


def test_T11_each_pass_is_paid_before_its_first_step(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = _poisson(monkeypatch, 1)

    trained(node, ledger, policy(noise=2.0, epsilon=20.0), loader)

    events = [entry.event for entry in ledger.entries()]
    assert events == [SampledGaussian(rate=0.2, noise_multiplier=2.0, steps=5)]
    assert {entry.treatment for entry in ledger.entries()} == {"ckks"}
    assert 0 < epsilon_of(events, 1e-5, cloister.Relation.REPLACE_ONE) < 20


def test_the_budget_ends_a_run_before_the_pass_that_would_exceed_it(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetSpentError):
        trained(node, ledger, policy(noise=2.0, epsilon=8.0), _poisson(monkeypatch, 1), epochs=50)

    assert 0 < len(ledger.entries()) < 50
    assert ledger.spent(ledger.data_sets()[0], delta=1e-5).epsilon <= 8.0


def test_no_epsilon_is_claimed_where_it_would_not_hold(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    with pytest.raises(ReleaseRefusedError, match="PoissonLoader"):
        trained(node, ledger, policy(epsilon=8.0, noise=1.0), batches())


def _answered(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """A node that changes the answers of its encrypted phases."""
    receive = stream.Stream.receive

    def forged(own: Any) -> Any:
        frame, response = receive(own)
        if response.HasField("ciphertexts"):
            change(frame, response)
        return frame, response

    monkeypatch.setattr(stream.Stream, "receive", forged)


def test_T17_a_run_ends_where_a_step_is_answered_with_an_earlier_ones_ciphertexts(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def replay(_: Any, response: Any) -> None:
        kept.append(response.ciphertexts.SerializeToString())
        response.ciphertexts.ParseFromString(kept[0])

    _answered(monkeypatch, replay)

    with pytest.raises(TamperingSuspectedError, match="what it sent is in") as told:
        trained(node, ledger, policy(), batches())

    assert Path(str(told.value).rpartition(" ")[2]).read_bytes() == kept[0]
    assert len(kept) == 2


def test_T17_without_the_checks_a_replayed_step_would_go_on(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []

    def replay(_: Any, response: Any) -> None:
        kept.append(response.ciphertexts.SerializeToString())
        response.ciphertexts.ParseFromString(kept[0])

    _answered(monkeypatch, replay)
    for check in ("check_results", "check_products"):
        monkeypatch.setattr(encrypted, check, lambda *_, **__: None)

    trained(node, ledger, policy(), batches())

    assert len(kept) == 5


def test_T17_an_answer_without_ciphertexts_is_refused(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answered(monkeypatch, lambda _, response: response.ClearField("ciphertexts"))

    with pytest.raises(MessageRejectedError, match="no ciphertexts"):
        trained(node, ledger, policy(), batches())


def test_T16_a_node_cannot_talk_a_run_out_of_its_encryption(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = link.Link.open
    monkeypatch.setattr(link.Link, "open", lambda own, r: opened(own, _without_scheme(r)))

    with pytest.raises(MessageRejectedError, match="no place"):  # an ordinary session takes no encrypted frame
        trained(node, ledger, policy(), batches())


def _without_scheme(request: Any) -> Any:
    values = {name: getattr(request, name) for name in request.__dataclass_fields__}
    return type(request)(**(values | {"scheme": None}))


def test_an_encrypted_session_takes_its_phases_in_one_order(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = encode_frame

    def twice(**fields: Any) -> Any:
        if fields["phase"] == node_pb2.PHASE_PARAMETER_GRADIENTS:
            fields["phase"] = node_pb2.PHASE_ENCRYPTED_FORWARD
        return encode(**fields)

    monkeypatch.setattr(encrypted, "encode_frame", twice)

    with pytest.raises((StepOutOfOrderError, MessageRejectedError)):
        trained(node, ledger, policy(), batches())


def test_cuts_that_cannot_be_encrypted_are_refused_with_what_to_do() -> None:
    deep = Net(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)))
    cut = cloister.cut(deep, front="front", head="head", example=torch.randn(4, FEATURES))

    with pytest.raises(ConfigError, match="one linear or convolution layer"):
        EncryptedPart(cut, Ckks(clip=CLIP))
    vanilla = cloister.cut(Net(), front="front", example=torch.randn(4, FEATURES))
    with pytest.raises(ConfigError, match="head"):
        EncryptedPart(vanilla, Ckks(clip=CLIP))
    with pytest.raises(ConfigError, match="wrap"):
        EncryptedPart(cloister.cut(Net(), front="front", head="head", example=torch.randn(4, FEATURES)), Ckks(clip=1e5))


def test_a_poisson_loader_draws_each_record_with_its_rate() -> None:
    loader = cloister.PoissonLoader(records(), expected=64)
    sizes = [len(y) for _ in range(40) for _, y in loader]

    assert len(loader) == 5
    assert abs(np.mean(sizes) - 64) < 3
    assert 4 < np.std(sizes) < 11  # √(64 · 0.8) = 7.2
    assert max(sizes) <= loader.capacity
    with pytest.raises(ConfigError, match="at least 32"):
        cloister.PoissonLoader(records(), expected=8)


def test_the_node_counts_the_bytes_that_its_owner_counts(tmp_path: Path, ledger: cloister.Ledger) -> None:
    with cloister.LocalNode(tmp_path / "node", threads=1, options=["--metrics", "localhost:0"]) as counting:
        cut = cloister.cut(Net(), front="front", head="head", example=torch.randn(4, FEATURES))
        with cloister.Trainer(
            cut,
            node=counting.address,
            identity=counting.owner,
            policy=policy(send_weights=False),
            optimizer=cloister.SGD(lr=0.3),
            ledger=ledger,
        ) as trainer:
            trainer.fit(batches(), 1)
            traffic = trainer.traffic
        with urllib.request.urlopen(f"http://{counting.ready['metrics']}/metrics", timeout=10) as answer:
            told = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")

    assert traffic.up > 5 * 2048 * 54 // 8  # a ciphertext a step, at least
    assert float(told["cloister_node_received_bytes_total"]) == traffic.up
    assert float(told["cloister_node_sent_bytes_total"]) == traffic.down
