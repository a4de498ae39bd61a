"""Cutting models: what crosses, what stays, what is refused, and that nothing of the numbers is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as torch's own documentation calls it
from torch import Tensor, nn

from client_side.cutting import Cut, cut
from client_side.spawn import LocalNode
from client_side.trainer import Trainer
from client_side.unsplit import UnsplitTrainer
from examples import models
from privacy.policy import CLEAR
from wire.errors import CutError, StateRejectedError
from wire.interpreter import Runner
from wire.program import Graph
from wire.recipe import SGD, Loss

ROWS: Final = 6


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
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


# --- Models -----------------------------------------------------------------------------------------------------------


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


class Sizes(nn.Module):
    """Sizes of the input, of the front and of the middle, each used in a later part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        h = self.stem(x)
        flat = self.body(h.view(batch, 4, h.size(2), -1)).reshape(batch * h.shape[2], 4, -1)
        rows = flat.size(0) // batch
        out = self.head(flat.reshape(x.size(0), 4, rows, flat.shape[2]).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(out, size=(height, width))


class Positions(nn.Module):
    """A parameter or buffer read directly in each part."""

    mask: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(5, 8))
        self.gain, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(3))
        self.register_buffer("mask", torch.randn(5, 8))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.positions
        h = torch.relu(self.body(h) * self.gain) + self.mask
        out: Tensor = self.fc(h.mean(1)) + self.bias * self.scale
        return out


class Twice(nn.Module):
    """Modules that are called again: within the front, within the middle, and a plain one everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head, self.relu = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.stem(self.relu(self.stem(x))))
        h = self.relu(self.body(self.relu(self.body(h))))
        out: Tensor = self.head(self.relu(h))
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


class Flagged(nn.Module):
    """Functions that are told the mode, as in many a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.conv1(x), 0.3, training=self.training)
        x = F.dropout(self.conv2(x), 0.5, self.training)
        return F.log_softmax(self.fc(F.dropout(x, training=self.training)), 1)


class Pair(nn.Module):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, None]]:
        return self.left(x), (self.right(x), None)


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.cat([left, right], 1))
        return out


class Pairs(nn.Module):
    """Modules that return structures: taken apart at once, or handed on whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.join, self.head = Pair(), Pair(), Join(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, (right, _) = self.stem(x)
        made = self.body(self.join(left, right))
        out: Tensor = self.head(made[0] * made[1][0]) + right.sum(1, keepdim=True)
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


class Ranges(nn.Module):
    """Positions made from a size; an offset that depends on no input and is used by the middle alone."""

    ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place, self.offset = nn.Linear(4, 8), nn.Embedding(7, 8), nn.Embedding(3, 8)
        self.norm, self.body, self.fc = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("ids", torch.tensor([2]))

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset(self.ids)
        h = self.norm(self.embed(x) + self.place(torch.arange(x.shape[1], device=x.device)))
        out: Tensor = self.fc(torch.relu(self.body(h) + offset).mean(1))
        return out


class Quantised(nn.Module):
    """An integer tensor and a frozen layer among what crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.table, self.head = (
            nn.Linear(4, 6),
            nn.Linear(6, 6),
            nn.Embedding(6, 6),
            nn.Linear(6, 2),
        )
        self.body.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        code = h.argmax(1)
        out: Tensor = self.head(torch.tanh(self.body(h)) + self.table(code))
        return out


CASES: Final[dict[str, tuple[Callable[[], nn.Module], str, str | None, Callable[[int], tuple[Tensor, ...]]]]] = {
    "a skip past the middle and several tensors into it": (
        Skips,
        "widen",
        "head",
        lambda rows: (torch.randn(rows, 5),),
    ),
    "a skip past the middle from the smashed tensor itself": (
        Skips,
        "stem",
        "head",
        lambda rows: (torch.randn(rows, 5),),
    ),
    "vanilla": (Skips, "widen", None, lambda rows: (torch.randn(rows, 5),)),
    "sizes used in later parts": (Sizes, "stem", "head", lambda rows: (torch.randn(rows, 1, 8, 8),)),
    "parameters and buffers read directly": (Positions, "embed", "fc", lambda rows: (torch.randn(rows, 5, 4),)),
    "modules called twice": (Twice, "stem", "head", lambda rows: (torch.randn(rows, 6),)),
    "embedding and output tied": (Tied, "embed", "out", lambda rows: (torch.randint(0, 11, (rows, 4)),)),
    "dropout as a function": (Flagged, "conv1", "fc", lambda rows: (torch.randn(rows, 6),)),
    "dropout as a function, vanilla": (Flagged, "conv1", None, lambda rows: (torch.randn(rows, 6),)),
    "modules that return structures": (Pairs, "stem", "head", lambda rows: (torch.randn(rows, 4),)),
    "a front that ends before a structure is read": (Pairs, "join", "head", lambda rows: (torch.randn(rows, 4),)),
    "two inputs and two defaults": (
        TwoInputs,
        "image",
        "head",
        lambda rows: (torch.randn(rows, 6), torch.randint(0, 9, (rows,))),
    ),
    "positions made from a size": (Ranges, "norm", "fc", lambda rows: (torch.randn(rows, 5, 4),)),
    "what depends on no input": (Ranges, "embed", "fc", lambda rows: (torch.randn(rows, 5, 4),)),
    "integers that cross, a frozen layer": (Quantised, "stem", "head", lambda rows: (torch.randn(rows, 4),)),
    "a cut inside a container": (
        models.small_resnet,
        "layer1.0.bn1",
        "layer4.0.conv2",
        lambda rows: (models.small_resnet_example(rows),),
    ),
    "a U-Net whose skip stays at home": (
        models.unet,
        "encode1",
        "decode1",
        lambda rows: (models.unet_example(rows, 8),),
    ),
}
#: The one thing that is not exact (see `cut`): two or more reads by the middle of a tensor that the head also reads.
SUMMED_ELSEWHERE: Final = {"a skip past the middle from the smashed tensor itself"}


@pytest.mark.parametrize("case", [name for name in CASES if name not in SUMMED_ELSEWHERE])
def test_a_cut_model_computes_what_the_model_does_to_the_bit(case: str) -> None:
    factory, front, head, example = CASES[case]
    model = factory()

    made = cut(model, front=front, head=head, example=example(4))

    for rows in (ROWS, 3):
        model.zero_grad()
        assert_exact(model, made, *example(rows))


def test_a_skip_of_the_smashed_tensor_is_exact_where_the_middle_reads_it_once() -> None:
    class Once(Skips):
        def forward(self, x: Tensor) -> Tensor:
            first = self.stem(x)
            out: Tensor = self.head(torch.relu(self.a(first))) + first.mean(1, keepdim=True)
            return out

    model = Once()
    for module in (model.widen, model.b, model.c):
        module.requires_grad_(False)

    made = cut(model, front="stem", head="head", example=torch.randn(4, 5))

    assert_exact(model, made, torch.randn(ROWS, 5))


def test_front_and_head_hold_the_models_own_modules() -> None:
    model = Skips()

    made = cut(model, front="widen", head="head", example=torch.randn(4, 5))

    assert made.front.get_submodule("stem") is model.stem
    assert made.front.get_submodule("widen") is model.widen
    assert made.head is not None
    assert made.head.get_submodule("head") is model.head
    own = [*model.stem.parameters(), *model.widen.parameters(), *model.head.parameters()]
    assert [id(p) for p in made.owner_parameters()] == [id(p) for p in own]
    assert sorted(made.middle_state()) == sorted(f"{m}.{t}" for m in "abc" for t in ("weight", "bias"))


def test_only_what_the_middle_reads_goes_up() -> None:
    made = cut(Skips(), front="widen", head="head", example=torch.randn(4, 5))

    smashed, kept = made.split_outputs(made.front(torch.randn(ROWS, 5)))

    assert [t.shape for t in smashed] == [(ROWS, 8), (ROWS, 8)]
    assert [t.shape for t in kept] == [(ROWS, 8)]
    assert len(made.program.inputs) == made.crossing == 2


def test_reassembling_gives_the_model_with_its_names_and_its_output() -> None:
    model = models.small_resnet()
    names, x = list(model.state_dict()), models.small_resnet_example(ROWS)
    expected = model.eval()(x)

    whole = cut(model, front="layer1", head="fc", example=x).reassemble()

    assert whole is model
    assert list(whole.state_dict()) == names
    assert torch.equal(whole(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_cutting_changes_nothing_of_the_model(*, training: bool) -> None:
    model = models.small_resnet(dropout=0.5)
    model.train(training)
    model.get_submodule("layer2.0.bn1").train(not training)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    x, generator = models.small_resnet_example(4), torch.get_rng_state()

    cut(model, front="layer1.0.bn1", head="layer4.0.conv2", example=x)

    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1]), name
        assert tensor.grad is None
    assert torch.equal(torch.get_rng_state(), generator)


def test_constants_that_the_forward_makes_do_not_stay_on_the_model() -> None:
    class Constant(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self[2](self[1](self[0](x)) + torch.arange(4.0))
            return out

    model = Constant(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    names = set(vars(model))

    made = cut(model, front="0", head="2", example=torch.randn(4, 4))

    assert set(vars(model)) == names
    assert_exact(model, made, torch.randn(3, 4))


# --- The three parts given by hand ------------------------------------------------------------------------------------


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        outputs, (last, _) = self.lstm(x)
        return outputs * scale, last[0]


class TwoOf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Linear(3, 6), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(x), self.scale(x)


class JoinLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 2)

    def forward(self, outputs: Tensor, last: Tensor) -> Tensor:
        out: Tensor = self.fc(outputs.mean(1) + last)
        return out


def test_parts_given_by_hand_compute_what_they_do_in_a_row() -> None:
    x = torch.randn(4, 7, 3)

    made = Cut(front=TwoOf(), middle=LastState(), head=JoinLast(), example=x)

    whole = made.reassemble()
    assert_exact_parts(whole, made, torch.randn(ROWS, 7, 3))
    assert {name.partition(".")[0] for name in whole.state_dict()} == {"front", "middle", "head"}


def test_parts_given_by_hand_can_be_vanilla() -> None:
    made = Cut(front=nn.Linear(4, 4), middle=nn.BatchNorm1d(4), example=torch.randn(4, 4))

    assert_exact_parts(made.reassemble(), made, torch.randn(ROWS, 4))


def assert_exact_parts(whole: nn.Module, made: Cut, x: Tensor) -> None:
    plain, node = copy.deepcopy(whole), Node(made)
    expected = plain.train()(x)
    learn_from(expected)

    assert torch.equal(split_step(made, node, (x,)), expected)
    parts = {"front.": made.front.named_parameters(), "middle.": node.state.items()}
    parts |= {} if made.head is None else {"head.": made.head.named_parameters()}
    got = {prefix + name: tensor for prefix, named in parts.items() for name, tensor in named}
    for name, tensor in plain.named_parameters():
        assert tensor.grad is not None
        assert same_gradient(got[name], tensor)
    for name, buffer in plain.named_buffers():
        assert torch.equal(got[name], buffer)
    with torch.no_grad():
        smashed, _ = made.split_outputs(made.front.eval()(x))
        out = node.run(made.program.eval, list(smashed))
        assert torch.equal(out[0] if made.head is None else made.head(*out), plain.eval()(x))


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"middle": torch.tanh}, "middle is a builtin_function_or_method: give an nn.Module"),
        ({"front": lambda x: x}, "front is a function: give an nn.Module"),
        ({"head": len}, "head is a builtin_function_or_method: give an nn.Module"),
        ({"front": nn.LSTM(4, 4)}, "parts of a cut exchange tensors or tuples of them, not Tensor, tuple"),
        (
            {"front": nn.Flatten(0)},
            "the tensor number 0 of the front's crosses the cut with shape \\(16,\\) for 4 rows",
        ),
        ({"example": torch.randn(1, 4)}, "at least 2 rows, as dimension 0 of every input; here are \\(1, 4\\)"),
        ({"example": []}, "the example is one tensor, or one for each input of the model"),
    ],
)
def test_parts_that_cannot_be_are_refused(parts: dict[str, object], complaint: str) -> None:
    good: dict[str, object] = {"front": nn.Linear(4, 4), "middle": nn.Linear(4, 4), "example": torch.randn(4, 4)}

    with pytest.raises(CutError, match=complaint):
        Cut(**(good | parts))  # type: ignore[arg-type]  # that is the test


# --- What is refused --------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Three layers around what a test puts between them."""

    def __init__(self, between: Callable[[Chain, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.relu = nn.Linear(4, 4), nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x, self.stem(x))


def reshaped_input(m: Chain, x: Tensor, _: Tensor) -> Any:
    flat = x.view(-1, 4)
    return m.head(m.body(m.stem(flat) + flat))


def scaled_by(size: Callable[[int], int]) -> Callable[[Chain, Tensor, Tensor], Any]:
    def between(m: Chain, _: Tensor, h: Tensor) -> Any:
        factor = size(h.shape[0])
        return m.head(m.body[1](m.body[0](h)) * factor)

    return between


PLAIN: Final = Chain(lambda m, _, h: m.head(m.body(h)))


@pytest.mark.parametrize(
    ("model", "front", "head", "complaint"),
    [
        (PLAIN, "stam", "head", "no submodule 'stam'; there are stem"),
        (PLAIN, "qqq", "head", "no submodule 'qqq'; there are stem, relu, body, head, unused"),
        (PLAIN, "stem", "body.2", "no submodule 'body.2'; there are body.1, body.0"),
        (PLAIN, "", "head", "no submodule ''"),
        (PLAIN, "unused", "head", "'unused' is never called"),
        (PLAIN, "head", "stem", "'stem' runs before 'head'"),
        (PLAIN, "stem", "stem", "front and head are both 'stem'"),
        (PLAIN, "body", "head", "nothing runs between 'body' and 'head'"),
        (PLAIN, "head", None, "nothing runs between 'head' and 'the end'"),
        (PLAIN, "body.0", "body", "front 'body.0' and head 'body': one stands inside the other"),
        (
            Chain(lambda m, x, h: m.head(m.body(h) + x)),
            "stem",
            "head",
            "the middle reads the input 'x' itself \\(at 'add'\\): your raw data would leave",
        ),
        (
            Chain(reshaped_input),
            "stem",
            "head",
            "the tensor 'view' that crosses the cut is an input itself, at most reshaped: your raw data would leave",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h) @ m.weight) @ m.weight),
            "stem",
            "head",
            "'weight' on your side is also 'weight' of the middle",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body[0](h) @ m.stem.weight)),
            "stem",
            "head",
            "'stem.weight' on your side is also 'stem.weight' of the middle",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h.transpose(0, 1).transpose(0, 1)))),
            "stem",
            "head",
            None,
        ),
        (
            Chain(lambda m, _, h: m.head(m.body[1](m.body[0](h).sum(0)))),
            "body.0",
            "head",
            None,
        ),
        (
            Chain(lambda m, _, h: m.head(m.body[1](m.body[0](h.sum(0))))),
            "body.0",
            "head",
            "the tensor 'body.0' crosses the cut with shape \\(4,\\) for 6 rows",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(m.relu(h))) + h),
            "stem",
            "head",
            "the middle changes the tensor 'stem' in place",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body[1](m.relu(m.body[0](h)))) + h),
            "stem",
            "head",
            None,
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h) if h.sum() > 0 else h)),
            "stem",
            "head",
            "torch.fx cannot follow this model's forward .* cloister.Cut\\(front=…, middle=…, head=…\\)",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h) if m.training else m.body[0](h))),
            "stem",
            "head",
            "differs in training \\(at 'body'\\)|another way in training",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(F.dropout(h, 0.5 if m.training else 0.0)))),
            "stem",
            "head",
            "differs in training \\(at 'dropout'\\)",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h + torch.randn(4)))),
            "stem",
            "head",
            "draws or makes another constant in each run",
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h * (h.shape[0] - 1)))),
            "stem",
            "head",
            None,
        ),
        (
            Chain(lambda m, _, h: m.head(m.body(h) * h.shape[0] ** 2)),
            "stem",
            "head",
            "computes sizes with <built-in function pow>, which cannot travel; keep it on your side",
        ),
        (
            Chain(scaled_by(lambda rows: rows**2)),
            "body.0",
            "head",
            "the size 'pow_1' is 36 for 6 rows and 49 for 7: only sizes that are fixed or a multiple of the batch size",
        ),
        (
            Chain(scaled_by(lambda rows: rows * 3)),
            "body.0",
            "head",
            None,
        ),
        (Chain(lambda m, _, h: {"out": m.head(m.body(h))}), "stem", None, "must return the model's output, one tensor"),
        (Chain(lambda m, _, h: (m.head(m.body(h)), h)), "stem", None, "must return the model's output, one tensor"),
        (Chain(lambda m, _, h: (m.body(h), h)[1]), "stem", None, "must return the model's output, one tensor"),
        (Chain(lambda m, _, h: m.head(m.body[0](h)) + m.body[1](h)), "stem", "unused", "'unused' is never called"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_with_what_to_do(
    model: nn.Module, front: str, head: str | None, complaint: str | None
) -> None:
    x = torch.randn(6, 4)
    if complaint is None:  # its neighbour that can be
        assert_exact(model, cut(model, front=front, head=head, example=x), torch.randn(3, 4))
        return

    with pytest.raises(CutError, match=complaint):
        cut(model, front=front, head=head, example=x)


def test_two_parameters_made_of_the_same_memory_are_refused_across_a_cut() -> None:
    model = Chain(lambda m, _, h: m.head(m.body(h)))
    model.body[0].weight = nn.Parameter(model.stem.weight.detach())

    with pytest.raises(CutError, match=r"'stem.weight' on your side is also 'body\.0\.weight' of the middle"):
        cut(model, front="stem", head="head", example=torch.randn(4, 4))


def test_a_submodule_under_two_names_is_named_by_its_first() -> None:
    model = Chain(lambda m, _, h: m.head(m.body(h)))
    model.again = model.stem

    with pytest.raises(CutError, match="the submodule 'again' is also called 'stem': name it so"):
        cut(model, front="again", head="head", example=torch.randn(4, 4))


@pytest.mark.parametrize(
    ("hooked", "complaint"),
    [("", "the model itself has hooks"), ("body", "'body' has hooks"), ("stem", None)],
)
def test_hooks_that_no_part_would_run_are_refused(hooked: str, complaint: str | None) -> None:
    model = Chain(lambda m, _, h: m.head(m.body(h)))
    calls = []
    model.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(1))

    if complaint is not None:
        with pytest.raises(CutError, match=f"{complaint}, which no part of a cut would run"):
            cut(model, front="body.0", head="head", example=torch.randn(4, 4))
        return
    made = cut(model, front="body.0", head="head", example=torch.randn(4, 4))
    calls.clear()
    made.front(torch.randn(3, 4))
    assert calls == [1]


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        (1, "the example gives 1 tensors; the model's forward takes \\(image, codes, scale, mask\\)"),
        (5, "the example gives 5 tensors; the model's forward takes \\(image, codes, scale, mask\\)"),
    ],
)
def test_an_example_with_another_number_of_inputs_is_refused(inputs: int, complaint: str) -> None:
    with pytest.raises(CutError, match=complaint):
        cut(TwoInputs(), front="image", head="head", example=[torch.randn(4, 6)] * inputs)


@pytest.mark.parametrize(
    "example", [torch.randn(1, 5), torch.tensor(1.0), [], [torch.randn(4, 5), torch.randn(3, 5)], ["x"]]
)
def test_an_example_that_is_no_batch_is_refused(example: Any) -> None:
    with pytest.raises(CutError, match="the example"):
        cut(Skips(), front="stem", head="head", example=example)


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


# --- Sizes that another part has built in -----------------------------------------------------------------------------


def test_a_size_that_differs_from_the_one_that_was_cut_for_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(4))
            self.body, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.head(self.body(self.stem(x))), size=x.shape[-2:])

    model = Pooled()
    made = cut(model, front="stem", head="head", example=torch.randn(4, 1, 8, 8))
    assert_exact(model, made, torch.randn(3, 1, 8, 8))

    with pytest.raises(CutError, match="is 16, but 8 when the model was cut: cut it for each such size"):
        made.front(torch.randn(4, 1, 16, 16))
