"""Split training equals unsplit training to the bit: the contract, over a real node process and mutual TLS."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from bench.relay import Relay
from client_side.link import NodeAddress
from examples import models

EPOCHS = 3
ROWS, BATCH = 40, 16  # a last batch of 8 rows: not every step has the same size
CLASSES = 5


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    example: torch.Tensor
    front: str
    head: str


RESNET = Case(
    lambda: models.small_resnet(classes=CLASSES, dropout=0.2), models.small_resnet_example(4), front="layer1", head="fc"
)
TRANSFORMER = Case(
    lambda: models.transformer(classes=CLASSES, dropout=0.1), models.transformer_example(4), front="layers.0", head="fc"
)
OPTIMIZERS: dict[str, cloister.SGD | cloister.AdamW] = {
    "sgd": cloister.SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": cloister.AdamW(
        lr=2e-3, schedule=cloister.Schedule(decay="cosine", warmup_steps=2, total_steps=9), clip_value=1.0
    ),
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as running:
        yield running


def loader(case: Case) -> DataLoader[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, *case.example.shape[1:], generator=generator)
    y = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=torch.Generator().manual_seed(2))


def unsplit(
    case: Case, model: nn.Module, head: str | None, optimizer: cloister.SGD | cloister.AdamW, count: int
) -> list[float]:
    cut = cloister.cut(model, front=case.front, head=head, example=case.example)
    trainer = cloister.UnsplitTrainer(cut, optimizer=optimizer, loss=cloister.Loss(), micro_batches=count, seed=7)
    return trainer.fit(loader(case), EPOCHS)


class Losses(cloister.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.StepEnd) -> None:  # noqa: ARG002
        self.seen.append(end.loss)


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("head", ["u_shape", "vanilla"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", [RESNET, TRANSFORMER], ids=["resnet", "transformer"])
def test_split_training_equals_unsplit_training_to_the_bit(
    node: cloister.LocalNode, case: Case, optimizer: str, head: str
) -> None:
    torch.manual_seed(0)
    initial = case.make()
    name = case.head if head == "u_shape" else None
    split = copy.deepcopy(initial)
    cut = cloister.cut(split, front=case.front, head=name, example=case.example)
    for count, in_flight in ((1, 1), (4, 1), (4, 2), (4, 4)):
        if in_flight == 1:
            expected = copy.deepcopy(initial)
            losses = unsplit(case, expected, name, OPTIMIZERS[optimizer], count)
        split.load_state_dict(initial.state_dict())
        heard = Losses()
        with cloister.Trainer(
            cut,
            policy=cloister.CLEAR,
            node=node.address,
            identity=node.owner,
            optimizer=OPTIMIZERS[optimizer],
            micro_batches=count,
            in_flight=in_flight,
            seed=7,
            callbacks=[heard],
        ) as trainer:
            trainer.fit(loader(case), EPOCHS)

        assert differing(expected, split) == []
        assert heard.seen == losses
        # The comparison means something only if training moved everything that can move.
        moved = set(differing(initial, split))
        assert moved >= {n for n, p in initial.named_parameters() if p.requires_grad}


@pytest.fixture
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
def test_two_threads_a_process_are_exact_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = models.small_resnet(classes=CLASSES, width=16)
    split = copy.deepcopy(expected)
    unsplit(RESNET, expected, RESNET.head, OPTIMIZERS["sgd"], 2)
    cut = cloister.cut(split, front=RESNET.front, head=RESNET.head, example=RESNET.example)
    with (
        cloister.LocalNode(tmp_path, threads=2) as two,
        cloister.Trainer(
            cut,
            policy=cloister.CLEAR,
            node=two.address,
            identity=two.owner,
            optimizer=OPTIMIZERS["sgd"],
            micro_batches=2,
            seed=7,
        ) as trainer,
    ):
        trainer.fit(loader(RESNET), EPOCHS)

    assert differing(expected, split) == []


def test_the_reference_is_a_plain_loop_over_the_uncut_model(node: cloister.LocalNode) -> None:
    torch.manual_seed(0)
    plain = models.small_resnet(classes=CLASSES)
    split = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    batches = loader(RESNET)
    for _ in range(EPOCHS):
        for x, y in batches:
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    cut = cloister.cut(split, front=RESNET.front, head=RESNET.head, example=RESNET.example)
    with cloister.Trainer(
        cut,
        policy=cloister.CLEAR,
        node=node.address,
        identity=node.owner,
        optimizer=cloister.SGD(lr=0.05, momentum=0.9),
    ) as trainer:
        trainer.fit(loader(RESNET), EPOCHS)
        predicted = trainer.predict(RESNET.example)
        measured = trainer.evaluate(loader(RESNET))

    assert differing(plain, split) == []
    plain.eval()
    with torch.no_grad():
        assert torch.equal(plain(RESNET.example), predicted)
    assert measured.rows == ROWS
    assert measured.accuracy is not None


def test_a_loop_of_ones_own_through_a_remote_middle_is_exact(node: cloister.LocalNode) -> None:
    torch.manual_seed(0)
    plain = models.small_resnet(classes=CLASSES)
    split = copy.deepcopy(plain)
    cut = cloister.cut(split, front=RESNET.front, head=RESNET.head, example=RESNET.example)
    assert cut.head is not None
    middle = cloister.RemoteMiddle(
        cut,
        policy=cloister.CLEAR,
        node=node.address,
        identity=node.owner,
        optimizer=cloister.SGD(lr=0.05),
        max_rows=BATCH,
    )
    theirs = torch.optim.SGD(plain.parameters(), lr=0.05)
    own = torch.optim.SGD(cut.owner_parameters(), lr=0.05)
    for x, y in loader(RESNET):
        for half in (slice(0, 4), slice(4, 8)):  # two backwards before one step: gradients add up on both sides
            nn.functional.cross_entropy(plain(x[half]), y[half]).backward()
            nn.functional.cross_entropy(cut.head(middle(cut.front(x[half]))), y[half]).backward()
        theirs.step()
        theirs.zero_grad()
        own.step()
        own.zero_grad()
        middle.step()
    middle.fetch()

    assert differing(plain, split) == []
    cut.head(middle(cut.front(RESNET.example)))  # a forward without a backward
    with pytest.raises(cloister.ConfigError, match="1 forwards had no backward"):
        middle.step()
    middle.close()


def test_T14_a_link_that_breaks_again_and_again_changes_no_number(node: cloister.LocalNode) -> None:
    torch.manual_seed(0)
    initial = RESNET.make()
    expected, split = copy.deepcopy(initial), copy.deepcopy(initial)
    losses = unsplit(RESNET, expected, RESNET.head, OPTIMIZERS["adamw"], 4)
    cut = cloister.cut(split, front=RESNET.front, head=RESNET.head, example=RESNET.example)
    heard = Losses()
    with Relay(node.port, 0.0, float("inf")) as relay:

        class Saboteur(cloister.Callback):
            def on_step_begin(self, state: cloister.TrainState, control: cloister.Control) -> None:  # noqa: ARG002
                if state.global_step in (1, 3, 5, 6):
                    # Somewhere inside the next frames: in a header, in the middle of a tensor, before an answer.
                    relay.cut_after((0, 777, 0, 20_000, 0, 4_096, 65_000)[state.global_step])

        with cloister.Trainer(
            cut,
            policy=cloister.CLEAR,
            node=NodeAddress(target=f"localhost:{relay.port}", pin=node.identity.fingerprint),
            identity=node.owner,
            optimizer=OPTIMIZERS["adamw"],
            micro_batches=4,
            seed=7,
            callbacks=[heard, Saboteur()],
        ) as trainer:
            trainer.fit(loader(RESNET), EPOCHS)

        assert trainer.traffic.reconnects >= 4

    assert differing(expected, split) == []
    assert heard.seen == losses
