"""The trainer among users' mistakes and users' models, over a real node: clear errors, and exact numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cloister
from wire.errors import TensorRejectedError

ROWS, FEATURES, CLASSES = 8, 6, 3


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as running:
        yield running


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, trunk: torch.Tensor, aside: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.fc(trunk + aside.detach())
        return made


class TwoFold(nn.Module):
    """The head reads one of the middle's outputs without a gradient, so nothing behind it may move."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(FEATURES, 8)
        self.trunk = nn.Linear(8, 8)
        self.aside = nn.Linear(8, 8)
        self.last = Join()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem = self.stem(x)
        made: torch.Tensor = self.last(self.trunk(stem), self.aside(stem))
        return made


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.two(x)


class Tupled(nn.Module):
    """A front, and a middle, that return several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.front = Pair()
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.front(x)
        made: torch.Tensor = self.head(self.mix(one) * two)
        return made


def batches(count: int = 3, rows: int = ROWS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(rows, FEATURES, generator=generator),
            torch.randint(0, CLASSES, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


def trainer(
    node: cloister.LocalNode, model: nn.Module, front: str, head: str | None, **options: Any
) -> cloister.Trainer:
    cut = cloister.cut(model, front=front, head=head, example=torch.zeros(4, FEATURES))
    settings: dict[str, Any] = {"optimizer": cloister.SGD(lr=0.1, momentum=0.9, weight_decay=0.1), **options}
    return cloister.Trainer(cut, policy=cloister.CLEAR, node=node.address, identity=node.owner, **settings)


def plain_loop(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for x, y in data:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("model", "front", "head"),
    [(TwoFold, "stem", "last"), (TwoFold, "stem", None), (Tupled, "front", "head"), (plain_model, "0", "4")],
    ids=["an output without gradient", "the same, vanilla", "tuples", "plain"],
)
def test_a_model_of_ones_own_trains_as_in_a_plain_loop(
    node: cloister.LocalNode, model: Any, front: str, head: str | None
) -> None:
    torch.manual_seed(0)
    split = model()
    expected = copy.deepcopy(split)
    plain_loop(expected, batches())
    with trainer(node, split, front, head) as running:
        running.fit(batches(), 1)

    assert same(split, expected)


def test_an_output_without_gradient_moves_nothing_in_a_loop_of_ones_own_either(node: cloister.LocalNode) -> None:
    torch.manual_seed(0)
    split = TwoFold()
    expected = copy.deepcopy(split)
    plain_loop(expected, batches())
    cut = cloister.cut(split, front="stem", head="last", example=torch.zeros(4, FEATURES))
    assert cut.head is not None
    middle = cloister.RemoteMiddle(
        cut,
        policy=cloister.CLEAR,
        node=node.address,
        identity=node.owner,
        optimizer=cloister.SGD(lr=0.1, momentum=0.9, weight_decay=0.1),
        max_rows=ROWS,
    )
    own = torch.optim.SGD(cut.owner_parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for x, y in batches():
        nn.functional.cross_entropy(cut.head(*middle(cut.front(x))), y).backward()
        own.step()
        own.zero_grad()
        middle.step()
    middle.fetch()
    middle.close()

    assert same(split, expected)


def test_a_larger_batch_later_moves_to_a_larger_session_with_the_same_numbers(node: cloister.LocalNode) -> None:
    split = plain_model()
    expected = copy.deepcopy(split)
    data = [*batches(2, rows=3), *batches(2, rows=50), *batches(1, rows=2)]
    plain_loop(expected, data)
    with trainer(node, split, "0", "4") as running:
        running.fit(data, 1)
        measured = running.evaluate(data)

    assert same(split, expected)
    assert measured.rows == 2 * 3 + 2 * 50 + 2


def test_a_closed_trainer_is_not_used_again(node: cloister.LocalNode) -> None:
    running = trainer(node, plain_model(), "0", "4")
    running.fit(batches(), 1)
    running.close()

    with pytest.raises(cloister.ConfigError, match="closed; make a new one"):
        running.fit(batches(), 1)


MISTAKES: dict[str, tuple[list[Any], type[Exception], str]] = {
    "an empty loader": ([], cloister.ConfigError, "no batch"),
    "no labels": ([(torch.ones(ROWS, FEATURES),)], cloister.ConfigError, r"\(inputs…, labels\)"),
    "arrays": ([(torch.ones(ROWS, FEATURES).numpy(), torch.zeros(ROWS))], cloister.ConfigError, "ndarray"),
    "another number of labels": (
        [(torch.ones(ROWS, FEATURES), torch.zeros(ROWS - 1))],
        cloister.ConfigError,
        "equally many rows",
    ),
    "labels of float": ([(torch.ones(ROWS, FEATURES), torch.zeros(ROWS))], TensorRejectedError, "int64"),
    "labels out of range": (
        [(torch.ones(ROWS, FEATURES), torch.full((ROWS,), CLASSES))],
        TensorRejectedError,
        f"labels from {CLASSES} to {CLASSES} for {CLASSES} classes",
    ),
}


@pytest.mark.parametrize("head", ["4", None], ids=["u_shape", "vanilla"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_data_is_told_in_its_own_words(
    node: cloister.LocalNode, mistake: str, head: str | None
) -> None:
    data, error, said = MISTAKES[mistake]
    model = plain_model()
    before = copy.deepcopy(model)

    with trainer(node, model, "0", head) as running, pytest.raises(error, match=said):
        running.fit(data, 1)

    assert same(model, before)


def test_an_optimizer_of_torchs_own_is_refused_with_what_to_use(node: cloister.LocalNode) -> None:
    with pytest.raises(cloister.ConfigError, match=r"use cloister\.SGD"):
        trainer(node, plain_model(), "0", "4", optimizer=torch.optim.AdamW)
