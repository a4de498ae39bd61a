"""The sampler that can be entered anywhere: the same order whatever happens around it, and nothing read twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cloister
from client_side.callbacks import Callback, Control, StepEnd, TrainState


class Counted(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Twenty-four samples that know how often they were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append(index)
        return torch.full((3,), float(index)), torch.tensor(index % 2)


@given(st.integers(0, 200), st.integers(0, 2**63 - 1), st.integers(0, 100), st.integers(0, 250))
def test_an_order_is_a_permutation_and_can_be_entered_anywhere(size: int, seed: int, epoch: int, start: int) -> None:
    sampler = cloister.SeededSampler(range(size), seed=seed)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    torch.rand(3)
    sampler.start_at(start)

    assert sorted(whole) == list(range(size))
    assert list(sampler) == whole[start:]
    assert list(sampler) == whole


def test_orders_differ_by_seed_and_by_epoch() -> None:
    orders = set()
    for seed in (0, 1):
        sampler = cloister.SeededSampler(range(50), seed=seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))

    assert len(orders) == 4


class Stop(Callback):
    def __init__(self, at: int) -> None:
        self._at = at

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        del state
        control.should_training_stop = end.step == self._at


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as running:
        yield running


def test_a_resumed_run_reads_nothing_twice_and_ends_in_the_same_bits(node: cloister.LocalNode, tmp_path: Path) -> None:
    def fit(folder: Path, stop: int = 0) -> tuple[list[int], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        cut = cloister.cut(model, front="1", head="4", example=torch.zeros(4, 3))
        data = Counted()
        loader = DataLoader(data, batch_size=4, sampler=cloister.SeededSampler(data, seed=7))
        with cloister.Trainer(
            cut,
            policy=cloister.CLEAR,
            node=node.address,
            identity=node.owner,
            optimizer=cloister.SGD(lr=0.01, momentum=0.9),
            checkpoints=cloister.Checkpoints(folder=folder),
            callbacks=[Stop(stop)],
        ) as trainer:
            trainer.fit(loader, 2, resume=True)
        return data.read, cut.reassemble().state_dict()

    undisturbed, wanted = fit(tmp_path / "undisturbed")
    before, _ = fit(tmp_path / "run", stop=9)
    after, found = fit(tmp_path / "run")

    assert before + after == undisturbed
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
