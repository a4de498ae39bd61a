"""The models and the data that examples, tests and benchmarks share are what their documentation says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor, fx, nn

from cloister import digits
from examples import models

SPLITS: tuple[Literal["train"], Literal["test"]] = ("train", "test")
RESNET = "conv1 bn1 relu layer1 layer2 layer3 layer4 avgpool dropout fc"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    example: Callable[[int], Tensor]
    output: tuple[int, ...]
    calls: str  # the submodules in the order in which the model calls them


CASES = [
    Case("resnet18", models.resnet18, models.resnet18_example, (10,), RESNET),
    Case(
        "small_resnet",
        partial(models.small_resnet, dropout=0.1, channels=3),
        partial(models.small_resnet_example, size=16, channels=3),
        (10,),
        RESNET,
    ),
    Case("ecg_cnn", models.ecg_cnn, models.ecg_cnn_example, (5,), "stem block1 block2 block3 head"),
    Case("transformer", models.transformer, models.transformer_example, (10,), "embed layers fc"),
    Case("lstm", models.lstm, models.lstm_example, (5,), "embed recurrent fc"),
    Case(
        "unet",
        models.unet,
        models.unet_example,
        (2, 32, 32),
        "stem encode1 pool encode2 pool bottom up2 decode2 up1 decode1 head",
    ),
    Case("depthwise", models.depthwise, models.depthwise_example, (10,), "stem block1 block2 block3 block4 head"),
    Case(
        "depthwise_batch_norm",
        partial(models.depthwise, batch_norm=True),
        models.depthwise_example,
        (10,),
        "stem block1 block2 block3 block4 head",
    ),
    Case(
        "llama_sdpa",
        partial(models.llama_layers, layers=2),
        models.llama_layers_example,
        (12, 64),
        "rotary layers layers",
    ),
    Case(
        "llama_eager",
        partial(models.llama_layers, layers=1, attention="eager", dropout=0.1),
        models.llama_layers_example,
        (12, 64),
        "rotary layers",
    ),
    Case("mlp", models.mlp, models.mlp_example, (10,), "fc1 relu1 fc2 relu2 fc3"),
    Case("small_cnn", models.small_cnn, models.small_cnn_example, (10,), "stem body head"),
    Case("digits", digits.model, models.small_resnet_example, (10,), "stem body head"),
]


every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class LeafTracer(fx.Tracer):
    """Traces a model's own ``forward`` and nothing below it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  (fx's signature)
        return True


@every_model
def test_a_model_trains_at_any_batch_size_with_finite_gradients(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().train()

    for batch in (1, 2, 5):
        model.zero_grad()
        output = model(case.example(batch))
        output.square().mean().backward()
        assert output.shape == (batch, *case.output)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_a_model_traces_into_its_named_submodules_in_the_documented_order(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().train()

    traced = fx.GraphModule(model, LeafTracer().trace(model))

    called = [str(node.target).split(".")[0] for node in traced.graph.nodes if node.op == "call_module"]
    assert called == case.calls.split()
    assert torch.equal(_output(traced, case.example(3)), _output(model, case.example(3)))


@every_model
@pytest.mark.filterwarnings("ignore:.*were assigned during export:UserWarning")  # torch re-lists an LSTM's weights
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # transformers copies a deprecated torch object
def test_a_model_exports_for_training_with_a_dynamic_batch(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().train()

    program = torch.export.export(
        model, (case.example(4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )

    exported = program.module()
    for batch in (1, 2, 5):
        assert torch.equal(_output(exported, case.example(batch)), _output(model, case.example(batch)))


@every_model
def test_the_same_seed_builds_the_same_weights(case: Case) -> None:
    torch.manual_seed(3)
    first = case.build().state_dict()
    torch.manual_seed(3)
    second = case.build().state_dict()
    other = case.build().state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@every_model
def test_a_state_dict_loads_into_a_model_built_anew(case: Case) -> None:
    torch.manual_seed(0)
    model, other = case.build().eval(), case.build().eval()
    x = case.example(2)

    other.load_state_dict(model.state_dict())

    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_token_sees_no_later_token(attention: Literal["sdpa", "eager"]) -> None:
    torch.manual_seed(0)
    model = models.llama_layers(layers=2, attention=attention)
    hidden = models.llama_layers_example(2)
    changed = hidden.clone()
    changed[:, -1] += 1

    before, after = model(hidden), model(changed)

    assert torch.allclose(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_a_llama_token_sees_where_the_earlier_tokens_stand() -> None:
    torch.manual_seed(0)
    model = models.llama_layers(layers=1)
    hidden = models.llama_layers_example(2)

    in_order, swapped = model(hidden), model(hidden[:, [1, 0, *range(2, 12)]])

    assert not torch.allclose(in_order[:, -1], swapped[:, -1])


def test_the_ecg_cnn_holds_a_sensible_middle() -> None:
    model = models.ecg_cnn()

    middle = sum(p.numel() for name, p in model.named_parameters() if name.startswith("block"))
    assert 100_000 < middle < 1_000_000


def test_resnet18_has_the_parameters_of_the_paper_and_the_names_of_torchvision() -> None:
    names = dict(models.resnet18().named_parameters())

    assert sum(p.numel() for p in names.values()) == 11_173_962  # ResNet-18 with a 3x3 stem and ten classes
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.bias", "fc.weight"} <= names.keys()


def test_the_digits_are_split_once_for_all_with_every_class_on_both_sides() -> None:
    images, labels = digits.load("train").tensors
    test_images, test_labels = digits.load("test").tensors

    assert (images.shape, test_images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min().item(), images.max().item()) == (0, 1)
    shares = torch.bincount(test_labels) / (torch.bincount(labels) + torch.bincount(test_labels))
    assert shares.sub(0.2).abs().max() < 0.01
    assert torch.equal(images, digits.load("train").tensors[0])
    assert not torch.equal(images, digits.load("train", seed=1).tensors[0])


def test_no_digit_is_on_both_sides_of_the_split() -> None:
    train, test = ({tuple(scan.tolist()) for scan in digits.load(split).tensors[0].flatten(1)} for split in SPLITS)

    assert not train & test
    assert len(train | test) == 1797  # no two scans are alike, so an overlap would show


def test_the_training_order_follows_the_seed_and_changes_with_the_epoch() -> None:
    loader, again = digits.train_loader(seed=5), digits.train_loader(seed=5)

    epochs = [_labels(loader), _labels(loader)]

    assert [epochs[0].tolist(), epochs[1].tolist()] == [_labels(again).tolist(), _labels(again).tolist()]
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(_labels(digits.test_loader()), _labels(digits.test_loader()))


def test_reading_the_digits_draws_nothing_from_the_global_generator() -> None:
    state = torch.get_rng_state()

    _labels(digits.train_loader())
    _labels(digits.test_loader())

    assert torch.equal(torch.get_rng_state(), state)


def test_the_body_of_the_digits_model_holds_nearly_all_of_it() -> None:
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in digits.model().named_children()}

    assert list(sizes) == ["stem", "body", "head"]
    assert sizes["body"] / sum(sizes.values()) > 0.9


def test_five_epochs_on_the_digits_reach_97_percent() -> None:
    torch.manual_seed(0)
    model = digits.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = digits.train_loader()

    for _ in range(5):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            torch.autograd.backward(loss)
            optimizer.step()

    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in digits.test_loader())
    assert right / 360 >= 0.97


def _output(model: nn.Module, x: Tensor) -> Tensor:
    """What a copy of ``model`` gives for ``x``'s shape from fixed seeds: dropout repeats, running statistics stay."""
    torch.manual_seed(1)
    output: Tensor = copy.deepcopy(model)(torch.randn_like(x))
    return output


def _labels(loader: torch.utils.data.DataLoader[tuple[Tensor, ...]]) -> Tensor:
    return torch.cat([labels for _, labels in loader])
