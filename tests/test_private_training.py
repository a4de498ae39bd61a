"""Private runs through a real node: what leaves, what it costs, and what a run in between two processes pays."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from bench.relay import Relay
from client_side import link, stream
from client_side.records import load_released
from privacy.accounting import epsilon_of
from privacy.tables import ReleasedTable
from protos import node_pb2
from wire.errors import BudgetSpentError, CheckpointError, ConfigError, LedgerError, ReleaseRefusedError
from wire.state import chunks

FEATURES, CLASSES, RECORDS = 12, 3, 600
DELTA = 1e-5


def records(seed: int = 0, count: int = RECORDS) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, FEATURES, generator=generator), labels)


def loader(seed: int = 0) -> DataLoader[Any]:
    return DataLoader(records(seed), 50, shuffle=True, generator=torch.Generator().manual_seed(1))


def model(*, learns: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    front = nn.Sequential(nn.Linear(FEATURES, FEATURES), cloister.UnitRows())
    front.requires_grad_(learns)
    return nn.Sequential(front, nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def policy(activations: Any, **more: Any) -> cloister.Policy:
    settings: dict[str, Any] = {
        "labels": cloister.Included(),
        "classes": CLASSES,
        "epsilon": 8.0,
        "delta": DELTA,
        **more,
    }
    return cloister.Policy(activations=activations, **settings)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as found:
        yield found


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[cloister.Ledger]:
    with contextlib.closing(cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as found:
        yield found


def trainer(
    node: cloister.LocalNode,
    ledger: cloister.Ledger,
    of: cloister.Policy,
    *,
    head: bool = False,
    learns: bool = False,
    address: str | None = None,
    **more: Any,
) -> cloister.Trainer:
    cut = cloister.cut(model(learns=learns), front="0", head="3" if head else None, example=torch.zeros(4, FEATURES))
    settings: dict[str, Any] = {"optimizer": cloister.AdamW(lr=5e-3), "seed": 3, **more}
    return cloister.Trainer(
        cut, policy=of, node=address or node.address, identity=node.owner, ledger=ledger, data_set="data", **settings
    )


TABLES = {
    "rows": policy(cloister.Rows(clip=1.0), labels=cloister.RandomizedLabels(epsilon=3.0), epsilon=40.0),
    "moments": policy(cloister.Moments(), epsilon=8.0),
    "aggregate": policy(cloister.Aggregate(clip=1.0, rate=0.2, releases=60), epsilon=8.0),
}


@pytest.mark.parametrize("head", [False, True], ids=["vanilla", "u-shape"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_trains_a_model_that_knows_something_within_its_budget(
    name: str, node: cloister.LocalNode, ledger: cloister.Ledger, *, head: bool
) -> None:
    with trainer(node, ledger, TABLES[name], head=head) as found:
        found.fit(loader(), epochs=15)
        result = found.evaluate(DataLoader(records(5), 100))
        spent = found.guard.spent

    assert result.accuracy is not None
    assert result.accuracy > 0.75
    assert spent is not None
    assert 0.5 * TABLES[name].epsilon < spent.epsilon <= TABLES[name].epsilon * 1.001


def test_rows_that_were_released_once_cost_no_bytes_in_later_epochs(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    up = []
    with trainer(node, ledger, TABLES["rows"]) as found:
        for _ in range(3):
            found.fit(loader(), epochs=1)
            up.append(found.traffic.up)
    table = RECORDS * (FEATURES * 4 + 8)

    assert up[1] - up[0] == up[2] - up[1] < 0.08 * table
    assert len(ledger.entries("data")) == 2


def test_T10_the_socket_carries_what_the_guard_released_and_framing(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    port = int(node.address.partition("#")[0].rpartition(":")[2])
    clear = cloister.CLEAR
    with Relay(port, 0.0, 1e9) as relay:
        address = f"localhost:{relay.port}#{node.address.partition('#')[2]}"
        with trainer(node, ledger, clear, head=True, learns=True, address=address, micro_batches=1) as found:
            found.fit(DataLoader(records(count=6000), 500), epochs=2)
            sent = sum(found.guard.sent.values())
        counted = relay.traffic().up

    # Activations and output gradients of 12,000 rows, and the middle once; TLS, HTTP/2 and headers around it.
    assert sent > 12_000 * (FEATURES + 32) * 4
    assert sent < counted < 1.03 * sent + 40_000


def test_T10_a_private_run_sends_neither_records_nor_labels_nor_the_front(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bytes] = []

    send, chunked = stream.Stream.send, chunks

    def seen_frame(self: stream.Stream, frame: node_pb2.Frame) -> None:
        left.append(_bytes(frame))
        send(self, frame)

    def seen_chunks(data: Any) -> Any:
        left.append(bytes(data))
        return chunked(data)

    monkeypatch.setattr(stream.Stream, "send", seen_frame)
    monkeypatch.setattr(link, "chunks", seen_chunks)
    with trainer(node, ledger, TABLES["moments"]) as found:
        front = [p.detach().numpy().tobytes() for p in found.cut.front.parameters()]
        activations = found.cut.front(records().tensors[0]).detach()
        found.fit(loader(), epochs=1)
    everything = b"".join(left)

    assert len(everything) > RECORDS * FEATURES * 4  # the table went
    assert not any(part in everything for part in front)
    assert not any(row.numpy().tobytes() in everything for row in (*records().tensors[0], *activations))


def _bytes(frame: Any) -> bytes:
    data = getattr(frame, "data", None)
    return data if isinstance(data, bytes) else frame.SerializeToString()


def test_evaluation_of_a_private_run_stays_at_home(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    with trainer(node, ledger, TABLES["moments"]) as found:
        found.fit(loader(), epochs=1)
        up = found.traffic.up
        found.evaluate(loader(7))
        found.predict(torch.zeros(3, FEATURES))

        assert found.traffic.up == up
        assert "inference" not in found.guard.sent


def test_a_second_run_beyond_the_budget_is_refused_before_anything_leaves(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    with trainer(node, ledger, TABLES["moments"]) as first:
        first.fit(loader(), epochs=1)
    with trainer(node, ledger, TABLES["moments"]) as second:
        with pytest.raises(BudgetSpentError, match="is spent on this data set"):
            second.fit(loader(), epochs=1)

        assert second.traffic.up == 0
        assert second.guard.sent == {}


def test_a_front_that_learns_is_refused_before_anything_leaves(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    with trainer(node, ledger, TABLES["moments"], learns=True) as found:
        with pytest.raises(ReleaseRefusedError, match="the front trains on the data without dp_sgd"):
            found.fit(loader(), epochs=1)

        assert found.guard.sent == {}
        assert ledger.entries() == []


def test_a_run_in_the_clear_says_so_in_the_ledger(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    with trainer(node, ledger, cloister.CLEAR, learns=True) as found:
        found.fit(loader(), epochs=1)
        claim = found.guard.claim

    assert claim is not None
    assert math.isinf(claim.spent.epsilon)
    assert "activations leave in the clear" in claim.sentence


class Stop(cloister.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.StepEnd) -> None:
        del state
        if end.step == self.at:
            raise KeyboardInterrupt
        del control


def interrupted(
    node: cloister.LocalNode, ledger: cloister.Ledger, folder: Path, of: cloister.Policy, at: int = 7, **more: Any
) -> None:
    plan = cloister.Checkpoints(folder=folder, every=5)
    with (
        trainer(node, ledger, of, checkpoints=plan, callbacks=[Stop(at)], **more) as found,
        pytest.raises(KeyboardInterrupt),
    ):
        found.fit(loader(), epochs=3)


@pytest.mark.parametrize("name", TABLES)
def test_T11_a_resumed_table_run_has_the_same_bits_and_pays_nothing_again(
    name: str, node: cloister.LocalNode, ledger: cloister.Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(node, ledger, tmp_path / "run", TABLES[name])
    before = ledger.entries("data")
    table = (tmp_path / "run" / "released.safetensors").read_bytes()
    plan = cloister.Checkpoints(folder=tmp_path / "run", every=5)
    with trainer(node, ledger, TABLES[name], checkpoints=plan) as found:
        found.fit(loader(), epochs=3, resume=True)
        state = {k: v.clone() for k, v in found.cut.reassemble().state_dict().items()}
    # A third run from the same table, never interrupted.
    whole = cloister.Checkpoints(folder=tmp_path / "whole", every=5)
    with trainer(node, ledger, TABLES[name], checkpoints=whole, callbacks=[Stop(1)]) as found:
        monkeypatch.setattr(found._guard, "_spend", lambda *_args, **_more: None)  # the budget is spent
        monkeypatch.setattr(found._guard, "table", lambda _: _adopted(found, tmp_path / "run"))
        found._callbacks = []
        found.fit(loader(), epochs=3)
        expected = found.cut.reassemble().state_dict()

    assert ledger.entries("data") == before
    assert (tmp_path / "run" / "released.safetensors").read_bytes() == table
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def _adopted(found: cloister.Trainer, folder: Path) -> Any:
    tensors = load_released(folder, "rows")
    table = ReleasedTable(tensors["rows"], tensors.get("labels"))
    found.guard.adopt(table)
    return table


ROWS_ANEW = policy(
    cloister.Rows(clip=1.0, noise=0.5, once=False), labels=cloister.RandomizedLabels(epsilon=2.0), epsilon=300.0
)


class Labels:
    """What a guard lets leave as labels, by record."""

    def __init__(self, guard: cloister.Guard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[int, set[int]] = {}
        self._let = guard.labels
        monkeypatch.setattr(guard, "labels", self._labels)

    def _labels(self, indices: torch.Tensor) -> Any:
        released = self._let(indices)
        for index, label in zip(indices.tolist(), released.tensor.tolist(), strict=True):
            self.of.setdefault(index, set()).add(label)
        return released


def test_labels_beside_rows_that_leave_anew_are_drawn_and_paid_once(
    node: cloister.LocalNode, ledger: cloister.Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer(node, ledger, ROWS_ANEW) as found:
        seen = Labels(found.guard, monkeypatch)
        for _ in range(2):
            found.fit(loader(), epochs=2)
        result = found.evaluate(DataLoader(records(5), 100))
    true = records().tensors[1].tolist()
    kept = sum(seen.of[index] == {true[index]} for index in range(RECORDS)) / RECORDS

    assert result.accuracy is not None
    assert result.accuracy > 0.6
    assert {len(labels) for labels in seen.of.values()} == {1}
    assert kept == pytest.approx(math.exp(2) / (math.exp(2) + CLASSES - 1), abs=0.08)
    assert Counter(entry.kind for entry in ledger.entries("data")) == {"labels": 1, "activations": 4}


def test_T11_a_resumed_run_sends_the_labels_that_it_drew_and_pays_nothing_for_them(
    node: cloister.LocalNode, ledger: cloister.Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(node, ledger, tmp_path / "run", ROWS_ANEW)
    drawn = load_released(tmp_path / "run", "labels")["labels"].tolist()
    plan = cloister.Checkpoints(folder=tmp_path / "run", every=5)
    with trainer(node, ledger, ROWS_ANEW, checkpoints=plan) as found:
        seen = Labels(found.guard, monkeypatch)
        found.fit(loader(), epochs=3, resume=True)

    assert all(labels == {drawn[index]} for index, labels in seen.of.items())
    assert [entry.kind for entry in ledger.entries("data")].count("labels") == 1


def test_T10_records_that_cannot_be_told_apart_get_no_labels(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    of = policy(cloister.Clear(), labels=cloister.RandomizedLabels(epsilon=1.0), epsilon=math.inf)
    batches = [list(range(8))] * 3
    with trainer(node, ledger, of) as found, pytest.raises(ConfigError, match="told apart by their records"):
        found.fit(DataLoader(records(), batch_sampler=batches), epochs=1)

    assert [entry.kind for entry in ledger.entries("data")].count("labels") == 0


def test_T11_a_run_whose_table_is_gone_does_not_draw_another(
    node: cloister.LocalNode, ledger: cloister.Ledger, tmp_path: Path
) -> None:
    interrupted(node, ledger, tmp_path / "run", TABLES["moments"])
    (tmp_path / "run" / "released.safetensors").unlink()
    plan = cloister.Checkpoints(folder=tmp_path / "run", every=5)
    with trainer(node, ledger, TABLES["moments"], checkpoints=plan) as found, pytest.raises(CheckpointError):
        found.fit(loader(), epochs=3, resume=True)


def test_T11_a_run_does_not_resume_on_a_ledger_that_has_forgotten(
    node: cloister.LocalNode, ledger: cloister.Ledger, tmp_path: Path
) -> None:
    interrupted(node, ledger, tmp_path / "run", TABLES["moments"])
    plan = cloister.Checkpoints(folder=tmp_path / "run", every=5)
    other = cloister.Ledger(f"sqlite:///{tmp_path / 'other.sqlite'}")
    with (
        contextlib.closing(other),
        trainer(node, other, TABLES["moments"], checkpoints=plan) as found,
        pytest.raises(LedgerError, match="has forgotten"),
    ):
        found.fit(loader(), epochs=3, resume=True)


FRESH = cloister.Policy(
    activations=cloister.Rows(clip=1.0, noise=20.0, once=False),
    labels=cloister.Never(),
    gradients=cloister.GaussianRows(clip=1.0, noise=20.0),
    front=cloister.DpSgd(clip=1.0, noise=20.0),
    head=cloister.DpSgd(clip=1.0, noise=20.0),
    epsilon=50.0,
    delta=DELTA,
)


def test_what_is_noised_anew_in_each_epoch_is_paid_in_each(node: cloister.LocalNode, ledger: cloister.Ledger) -> None:
    with trainer(node, ledger, FRESH, head=True, learns=True, micro_batches=2) as found:
        found.fit(loader(), epochs=2)
    entries = ledger.entries("data")

    assert [entry.kind for entry in entries] == ["activations", "gradients", "front", "head"] * 2
    assert ledger.spent("data", delta=DELTA).epsilon == pytest.approx(
        epsilon_of([entry.event for entry in entries], DELTA), rel=1e-6
    )


def test_T11_a_killed_private_run_pays_for_what_it_may_draw_again(
    node: cloister.LocalNode, ledger: cloister.Ledger, tmp_path: Path
) -> None:
    interrupted(node, ledger, tmp_path / "run", FRESH, 17, head=True, learns=True)
    plan = cloister.Checkpoints(folder=tmp_path / "run", every=5)
    with trainer(node, ledger, FRESH, checkpoints=plan, head=True, learns=True) as found:
        found.fit(loader(), epochs=3, resume=True)

    # Epochs 0 and 1 before, 1 again and 2 after: a release that may have been made twice is paid twice.
    assert len(ledger.entries("data")) == 4 * 4


def test_dp_sgd_without_noise_and_with_a_large_clip_is_plain_training(
    node: cloister.LocalNode, ledger: cloister.Ledger
) -> None:
    tiny = 1e-9
    private = cloister.Policy(
        activations=cloister.Clear(),
        labels=cloister.Clear(),
        gradients=cloister.Clear(),
        inference=cloister.Clear(),
        front=cloister.DpSgd(clip=1e3, noise=tiny),
        head=cloister.DpSgd(clip=1e3, noise=tiny),
    )
    made = []
    for of in (private, cloister.CLEAR):
        with trainer(
            node, ledger, of, head=True, learns=True, micro_batches=2, optimizer=cloister.SGD(lr=0.1)
        ) as found:
            found.fit(loader(), epochs=2)
            made.append(found.cut.reassemble().state_dict())

    for name, tensor in made[0].items():
        torch.testing.assert_close(tensor, made[1][name], rtol=1e-4, atol=1e-5)
