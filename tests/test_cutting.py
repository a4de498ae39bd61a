"""Cutting models: what crosses, what stays, and that nothing of the numbers is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Final

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as torch's own documentation calls it
from torch import Tensor, nn

from client_side.cutting import Cut, cut
from examples import models
from tests import cut_models
from tests.cut_models import Node, Skips, Tied, TwoInputs, assert_exact, learn_from, same_gradient, split_step
from wire.errors import CutError

ROWS: Final = 6
# pytest finds a file's fixtures by their names in it.
_seeded = cut_models.seeded


# --- Models -----------------------------------------------------------------------------------------------------------


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
