"""A cut model trained through a real node, and its middle brought home."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Final

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as torch's own documentation calls it
from torch import Tensor, nn

from client_side.cutting import Cut, cut
from client_side.spawn import LocalNode
from client_side.trainer import Trainer
from client_side.unsplit import UnsplitTrainer
from privacy.policy import CLEAR
from tests import cut_models
from tests.cut_models import Skips, Tied
from wire.errors import StateRejectedError
from wire.recipe import SGD, Loss

# pytest finds a file's fixtures by their names in it.
_seeded = cut_models.seeded


# --- Through a real node ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    with LocalNode(tmp_path_factory.mktemp("node"), threads=1) as running:
        yield running


class InPlaceHead(nn.Module):
    """What comes down, and what stayed, is changed in place by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(5, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head, self.skip = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.skip(x)
        out: Tensor = self.head(self.body(self.stem(x)))
        return out.add(kept.relu_())


TRAINED: Final[dict[str, tuple[Callable[[], nn.Module], str, str | None]]] = {
    "skips and several tensors": (Skips, "widen", "head"),
    "vanilla with several tensors": (Skips, "widen", None),
    "a head in place": (InPlaceHead, "stem", "head"),
}


def plainly_trained(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int, count: int
) -> dict[str, Tensor]:
    """The model after a loop as anybody writes it: nothing of Cloister in it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    model.train()
    for _ in range(epochs):
        for x, labels in batches:
            optimizer.zero_grad()
            for part, target in zip(x.chunk(count), labels.chunk(count), strict=True):
                loss = F.cross_entropy(model(part), target) * (len(part) / len(x))
                loss.backward()
            optimizer.step()
    return dict(model.state_dict())


def trained_by_cloister(
    node: LocalNode, made: Cut, batches: list[tuple[Tensor, Tensor]], epochs: int, *, count: int, in_flight: int
) -> dict[str, Tensor]:
    optimizer = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3)
    with Trainer(
        made,
        policy=CLEAR,
        node=node.address,
        identity=node.owner,
        optimizer=optimizer,
        micro_batches=count,
        in_flight=in_flight,
    ) as trainer:
        trainer.fit(batches, epochs)
    return dict(made.reassemble().state_dict())


def trained_unsplit(made: Cut, batches: list[tuple[Tensor, Tensor]], epochs: int, count: int) -> dict[str, Tensor]:
    optimizer = SGD(lr=0.05, momentum=0.9, weight_decay=1e-3)
    UnsplitTrainer(made, optimizer=optimizer, loss=Loss("cross_entropy"), micro_batches=count).fit(batches, epochs)
    return dict(made.reassemble().state_dict())


def assert_same(states: dict[str, dict[str, Tensor]]) -> None:
    reference = next(iter(states.values()))
    for name, state in states.items():
        assert state.keys() == reference.keys()
        for key in reference:
            assert torch.equal(state[key], reference[key]), (name, key)


@pytest.mark.parametrize("case", list(TRAINED))
@pytest.mark.parametrize(("count", "in_flight"), [(1, 1), (3, 2)])
def test_training_through_a_node_equals_a_plain_loop_over_the_uncut_model(
    node: LocalNode, case: str, count: int, in_flight: int
) -> None:
    factory, front, head = TRAINED[case]
    model = factory()
    twins = [copy.deepcopy(model) for _ in range(2)]
    batches = [(torch.randn(12, 5), torch.randint(0, 3, (12,))) for _ in range(4)]
    cuts = [cut(m, front=front, head=head, example=batches[0][0]) for m in (model, twins[0])]

    states = {
        "plain": plainly_trained(twins[1], batches, 3, count),
        "unsplit": trained_unsplit(cuts[1], batches, 3, count),
        "split": trained_by_cloister(node, cuts[0], batches, 3, count=count, in_flight=in_flight),
    }

    assert_same(states)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_weights_tied_between_front_and_head_are_trained_as_in_a_plain_loop(node: LocalNode, in_flight: int) -> None:
    model = Tied()
    plain = copy.deepcopy(model)
    batches = [(torch.randint(0, 11, (8, 4)), torch.randint(0, 11, (8,))) for _ in range(4)]
    made = cut(model, front="embed", head="out", example=batches[0][0])

    split = trained_by_cloister(node, made, batches, 2, count=4, in_flight=in_flight)

    assert model.out.weight is model.embed.weight
    assert_same({"plain": plainly_trained(plain, batches, 2, 4), "split": split})


# --- Bringing the middle home -----------------------------------------------------------------------------------------


def test_a_middle_that_comes_home_is_written_into_the_model() -> None:
    model = Skips()
    made = cut(model, front="widen", head="head", example=torch.randn(4, 5))
    parameter = model.a.weight

    made.load_middle({name: torch.full_like(tensor, 0.25) for name, tensor in made.middle_state().items()})

    assert made.reassemble().get_submodule("a").weight is parameter
    assert parameter.requires_grad
    assert parameter.eq(0.25).all()
    assert model.c.bias.eq(0.25).all()
    assert not model.widen.weight.eq(0.25).any()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda t: t.pop("a.weight"), "the node's state and the middle differ in 'a.weight'"),
        (lambda t: t.update({"head.weight": t["a.weight"]}), "the node's state and the middle differ in 'head.weight'"),
        (lambda t: t.update({"a.bias": torch.zeros(9)}), "the node's 'a.bias' is torch.float32 \\(9,\\)"),
        (lambda t: t.update({"a.bias": t["a.bias"].double()}), "the node's 'a.bias' is torch.float64 \\(8,\\)"),
    ],
)
def test_T17_a_middle_that_is_not_the_same_is_refused_whole(
    change: Callable[[dict[str, Tensor]], object], complaint: str
) -> None:
    model = Skips()
    made = cut(model, front="widen", head="head", example=torch.randn(4, 5))
    before = copy.deepcopy(model.state_dict())
    tensors = {name: torch.full_like(tensor, 0.25) for name, tensor in made.middle_state().items()}
    change(tensors)

    with pytest.raises(StateRejectedError, match=complaint):
        made.load_middle(tensors)

    assert_same({"before": before, "after": dict(model.state_dict())})
