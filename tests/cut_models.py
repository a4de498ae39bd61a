"""Models to cut, and what a cut of one must compute: to the bit what the uncut model does."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as torch's own documentation calls it
from torch import Tensor, nn

from client_side.cutting import Cut
from wire.interpreter import Runner
from wire.program import Graph

__all__ = ["Node", "Skips", "Tied", "TwoInputs", "assert_exact", "learn_from", "same_gradient", "seeded", "split_step"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# --- The middle by its program alone: what a node would compute, without a network ------------------------------------


class Node:
    """Runs a cut's program on tensors of its own, as a node does."""

    def __init__(self, cut: Cut) -> None:
        self.program = cut.program
        self.state = {
            s.name: nn.Parameter(cut.captured.state[s.name].detach().clone(), requires_grad=s.requires_grad)
            if s.name in dict(cut.middle.named_parameters())
            else cut.captured.state[s.name].detach().clone()
            for s in cut.program.state
        }

    def run(self, graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
        values = [self.state[s.name] for s in self.program.state]
        return Runner(self.program, graph, torch.device("cpu")).run([*values, *(x.clone() for x in inputs)])


def leaves_of(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(t.is_floating_point() and t.requires_grad) for t in tensors]


def learn_from(output: Tensor) -> None:
    """A backward whose every element has a weight of its own, so that no two can be mixed up."""
    output.backward(torch.linspace(-1, 1, output.numel()).reshape(output.shape))


def same_gradient(one: Tensor, other: Tensor) -> bool:
    """Whether neither has one, or both have the same."""
    if one.grad is None or other.grad is None:
        return one.grad is other.grad
    return torch.equal(one.grad, other.grad)


def split_step(cut: Cut, node: Node, inputs: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward through the three parts; gradients gather in the parts' parameters."""
    smashed, kept = cut.split_outputs(cut.front(*inputs))
    up, stayed = leaves_of(smashed), leaves_of(kept)
    for tensor in up:
        tensor.requires_grad_(tensor.is_floating_point())
    made = node.run(cut.program.train, up)
    down = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in made]
    output: Tensor = made[0] if cut.head is None else cut.head(*(t.clone() for t in down), *stayed)
    learn_from(output)
    if cut.head is not None:
        backward(made, down)
    backward([*smashed, *kept], [*up, *stayed])
    return output.detach()


def backward(tensors: list[Tensor], leaves: list[Tensor]) -> None:
    pairs = [
        (t, leaf.grad) for t, leaf in zip(tensors, leaves, strict=True) if leaf.grad is not None and t.requires_grad
    ]
    if pairs:
        torch.autograd.backward([t for t, _ in pairs], [g for _, g in pairs])


def assert_exact(model: nn.Module, made: Cut, *inputs: Tensor) -> None:
    """One training step and one evaluation through the parts equal the uncut model's, to the bit."""
    plain, node = copy.deepcopy(model), Node(made)
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    twins = tuple(x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs)
    for part in (plain, made.front, made.head):
        if part is not None:
            part.train()

    torch.manual_seed(7)
    expected = plain(*twins)
    learn_from(expected)
    torch.manual_seed(7)
    output = split_step(made, node, inputs)

    assert torch.equal(output, expected)
    for mine, twin in zip(inputs, twins, strict=True):
        assert same_gradient(mine, twin)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, tensor in [*plain.named_parameters(remove_duplicate=False), *plain.named_buffers()]:
        held = node.state.get(made.captured.aliases.get(name, name), own[name])
        assert torch.equal(held, tensor), name
        assert same_gradient(held, tensor), name

    for part in (plain, made.front, made.head):
        if part is not None:
            part.eval()
    with torch.no_grad():
        smashed, kept = made.split_outputs(made.front(*twins))
        evaluated = node.run(made.program.eval, list(smashed))
        whole = evaluated[0] if made.head is None else made.head(*evaluated, *kept)
        assert torch.equal(whole, plain(*twins))


# --- Models that several files cut ------------------------------------------------------------------------------------


class Skips(nn.Module):
    """A skip past the middle, a skip into it, several tensors across both cuts, and functions between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.widen = nn.Linear(8, 8)
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        second = torch.tanh(self.widen(first))
        left = self.a(second) + first
        right = F.gelu(self.b(left)) * self.c(second)
        out: Tensor = self.head(left + right) + first.mean(1, keepdim=True)
        return out


class Tied(nn.Module):
    """A language model's embedding that is also its output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.body(self.embed(tokens)))).mean(1)
        return out


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = nn.Linear(6, 8), nn.Embedding(9, 8)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, image: Tensor, codes: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        h = torch.cat([self.table(codes), self.image(image) * scale], dim=1)
        h = torch.relu(self.body(h))
        if mask is not None:
            h = h * mask
        out: Tensor = self.head(h)
        return out
