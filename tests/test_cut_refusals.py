"""Cuts that cannot be are refused, and the complaint says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as torch's own documentation calls it
from torch import Tensor, nn

from client_side.cutting import cut
from tests import cut_models
from tests.cut_models import Skips, TwoInputs, assert_exact
from wire.errors import CutError

# pytest finds a file's fixtures by their names in it.
_seeded = cut_models.seeded


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
