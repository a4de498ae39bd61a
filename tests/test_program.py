"""A captured program computes what its module computes, to the bit, and says in time what cannot be captured."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- as torch's own documentation calls it
from torch import Tensor, nn

from examples import models
from protos import program_pb2
from wire.capture import Captured, capture
from wire.errors import CutError, StateRejectedError
from wire.interpreter import Runner, activation_bytes, check_state
from wire.program import Graph, decode_program, program_digest

CPU = torch.device("cpu")
UNLIMITED = 2**40


@dataclass(frozen=True, slots=True)
class Case:
    build: Callable[[], nn.Module]
    example: Callable[[int], Tensor]
    rows: tuple[int, ...] = (3, 7)  # the example has 4
    alone: bool = True  # whether it trains on a batch of one


CASES = {
    "resnet18": Case(models.resnet18, models.resnet18_example, rows=(2, 3)),
    "small_resnet_dropout": Case(partial(models.small_resnet, dropout=0.2), models.small_resnet_example),
    "ecg_cnn": Case(models.ecg_cnn, models.ecg_cnn_example),
    "transformer": Case(models.transformer, models.transformer_example),
    "lstm": Case(models.lstm, partial(models.lstm_example, tokens=5)),
    "unet": Case(models.unet, models.unet_example),
    "depthwise": Case(partial(models.depthwise, width=8), models.depthwise_example),
    "depthwise_batch_norm": Case(partial(models.depthwise, width=8, batch_norm=True), models.depthwise_example),
    "llama": Case(models.llama_layers, models.llama_layers_example),
}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@cache
def captured(name: str) -> tuple[nn.Module, Captured]:
    torch.manual_seed(0)
    module = CASES[name].build()
    return module, capture(module, [CASES[name].example(4)])


class Node:
    """A program over copies of its state, as a session holds them."""

    def __init__(self, made: Captured) -> None:
        self.program = made.program
        self.state: dict[str, Tensor] = {}
        for spec in made.program.state:
            own = made.state[spec.name].detach().clone()
            is_parameter = spec.kind == program_pb2.STATE_KIND_PARAMETER
            self.state[spec.name] = nn.Parameter(own, requires_grad=spec.requires_grad) if is_parameter else own

    def run(self, inputs: list[Tensor], *, training: bool) -> list[Tensor]:
        graph = self.program.train if training else self.program.eval
        return Runner(self.program, graph, CPU).run([*self.state.values(), *(x.clone() for x in inputs)])


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def trained_on(outputs: list[Tensor]) -> None:
    """Backward through all of ``outputs``, from gradients that only the seed decides."""
    torch.manual_seed(2)
    wanted = [o for o in outputs if o.requires_grad]
    torch.autograd.backward(wanted, [torch.randn_like(o) for o in wanted])


def assert_same_step(
    module: nn.Module, made: Captured, inputs: list[Tensor], *, training: bool, steps: int = 2
) -> None:
    """The module and its program, each on its own copies, step after step."""
    reference, node = copy.deepcopy(module).train(training), Node(made)
    for step in range(steps):
        ours, theirs = [leaf(x) for x in inputs], [leaf(x) for x in inputs]
        torch.manual_seed(step)
        expected = reference(*(x.clone() for x in ours))
        expected = list(expected) if isinstance(expected, tuple) else [expected]
        trained_on(expected)
        torch.manual_seed(step)
        found = node.run(theirs, training=training)
        trained_on(found)

        assert len(found) == len(expected)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
        for mine, other in zip(ours, theirs, strict=True):
            assert_same_gradient(mine, other, "input")
    parameters = dict(reference.named_parameters())
    buffers = dict(reference.named_buffers())
    for name, value in node.state.items():
        if name in parameters:
            assert_same_gradient(parameters[name], value, name)
        elif name in buffers:
            assert torch.equal(buffers[name], value), name


def assert_same_gradient(expected: Tensor, found: Tensor, name: str) -> None:
    assert (expected.grad is None) == (found.grad is None), name
    assert expected.grad is None or found.grad is None or torch.equal(expected.grad, found.grad), name


# --- The numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", CASES)
def test_a_program_equals_its_module_to_the_bit_at_other_batch_sizes(name: str, training: bool) -> None:  # noqa: FBT001
    module, made = captured(name)

    for rows in CASES[name].rows:
        inputs = [CASES[name].example(rows)]
        assert_same_step(module, made, inputs, training=training, steps=1 if name == "resnet18" else 2)


@pytest.mark.parametrize("name", [name for name in CASES if name != "resnet18"])
def test_a_batch_of_one_equals_the_module_too(name: str) -> None:
    module, made = captured(name)

    assert_same_step(module, made, [CASES[name].example(1)], training=True, steps=1)
    assert_same_step(module, made, [CASES[name].example(1)], training=False, steps=1)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_and_buffer_travels_once_and_is_the_modules_own(name: str) -> None:
    module, made = captured(name)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    used = {n: t for n, t in own.items() if n in made.state}

    assert {n for n, t in module.named_parameters()} <= set(made.state)
    assert all(made.state[n] is t for n, t in used.items())
    assert made.program.parameter_count == sum(p.numel() for p in module.parameters())
    assert [s.name for s in made.program.state] == list(made.state)


@pytest.mark.parametrize("name", CASES)
def test_decoding_what_was_encoded_gives_the_same_program(name: str) -> None:
    _, made = captured(name)

    again = decode_program(made.data)

    assert again == made.program
    assert again.digest == program_digest(made.data) == made.program.digest


def test_dropout_draws_from_the_generator_only_in_training() -> None:
    _, made = captured("transformer")

    assert Runner(made.program, made.program.train, CPU).random
    assert not Runner(made.program, made.program.eval, CPU).random


def test_a_module_that_trains_and_evaluates_alike_travels_as_one_graph() -> None:
    _, made = captured("depthwise")

    assert made.program.eval is made.program.train


# --- The digest names the architecture --------------------------------------------------------------------------------


def small(*, width: int = 4, share: float = 0.5, last: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(share), nn.Linear(width, 2), last())


def digest(module: nn.Module) -> bytes:
    return capture(module, [torch.randn(4, 3)]).program.digest


def test_two_captures_of_one_architecture_have_one_digest_whatever_the_weights_and_the_rows() -> None:
    other = capture(small(), [torch.randn(9, 3)]).program

    assert digest(small()) == digest(small()) == other.digest


@pytest.mark.parametrize("other", [{"width": 5}, {"share": 0.25}, {"last": nn.ReLU6}, {"last": nn.Identity}], ids=str)
def test_another_size_constant_or_operator_gives_another_digest(other: dict[str, Any]) -> None:
    assert digest(small(**other)) != digest(small())


def test_a_frozen_parameter_gives_another_digest_and_gets_no_gradient() -> None:
    module = small()
    module.get_parameter("0.weight").requires_grad_(False)

    made = capture(module, [torch.randn(4, 3)])

    assert made.program.digest != digest(small())
    assert_same_step(module, made, [torch.randn(6, 3)], training=True)


# --- What modules do --------------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Any], **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(3, 3)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.relu(self.first(x)))
        return result


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.linear(a) * b, b, a.argmax(1)


class Rest(Two):
    def forward(self, a: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(a, rest[0] + rest[1])


def test_a_shared_parameter_travels_once_and_gathers_both_gradients() -> None:
    module = Tied()

    made = capture(module, [torch.randn(4, 3)])

    assert sorted(made.state) == ["first.bias", "first.weight", "second.bias"]
    assert made.aliases == {"second.weight": "first.weight"}
    assert_same_step(module, made, [torch.randn(5, 3)], training=True)


def test_several_tensors_go_in_and_come_out() -> None:
    made = capture(Two(), [torch.randn(4, 3), torch.randn(4, 2)])

    assert_same_step(
        module := Two(),
        capture(module, [torch.randn(4, 3), torch.randn(4, 2)]),
        [torch.randn(5, 3), torch.randn(5, 2)],
        training=True,
    )
    assert len(made.program.train.outputs) == 3


def test_the_arguments_of_forward_may_be_variable() -> None:
    module = Rest()
    example = [torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)]

    assert_same_step(module, capture(module, example), [x[:3] for x in example], training=True)


FUNCTIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "in_place_on_the_input": lambda m, x: m.linear(x.mul_(2).add_(1)),
    "in_place_on_an_activation": lambda m, x: F.relu(m.linear(x), inplace=True),
    "a_constant_of_its_own": lambda m, x: m.linear(x) + torch.tensor([1.0, 2.0, 3.0]),
    "sizes": lambda m, x: m.linear(x).repeat(2, 1).view(2, x.shape[0], -1).sum(0) * (x.shape[0] % 3 + 1),
    "a_mean_over_the_batch": lambda m, x: m.linear(x) - m.linear(x).mean(0, keepdim=True) / x.shape[0],
    "a_mask_by_position": lambda m, x: m.linear(x).masked_fill(torch.arange(x.shape[0])[:, None] > 2, -1.0),
    "a_table_read_by_index": lambda m, x: m.linear(x) + m.table[m.index].sum(0),
    "half_precision_inside": lambda m, x: m.linear(x.to(torch.bfloat16).float()),
    "splits": lambda m, x: torch.cat([p * i for i, p in enumerate(m.linear(x).split(1, 1))], 1),
    "topk": lambda m, x: m.linear(x).topk(2, 1)[0],
    "einsum": lambda m, x: torch.einsum("bi,bj->bij", m.linear(x), x),
    "complement": lambda m, x: F.normalize(m.linear(x), dim=1),
    "buffers_in_place": lambda m, x: m.linear(x) * m.index.add_(1).float(),
    "no_gradient_within": lambda m, x: m.linear(x) * _without_gradient(m.linear, x),
    "gradient_within_none": lambda m, x: m.linear(x) * _nested(m.linear, x),
    "an_input_that_returns": lambda m, x: (m.linear(x), x),
    "autocast_switched_off": lambda m, x: _without_autocast(m.linear, x),
}


def _without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate: Tensor = torch.sigmoid(layer(x))
    return gate


def _nested(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        a = layer(x)
        with torch.enable_grad():
            b: Tensor = layer(x)
        return b + torch.tanh(a)


def _without_autocast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        a: Tensor = torch.exp(layer(x))
    with torch.autocast("cpu", enabled=False):
        return a * torch.relu(layer(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_models_do_travels(name: str) -> None:
    module = Lambda(FUNCTIONS[name], table=torch.randn(5, 3), index=torch.tensor([4, 0, -1]))

    made = capture(module, [torch.randn(4, 3)])

    assert_same_step(module, made, [torch.randn(5, 3)], training=True)


def test_no_gradient_flows_through_a_region_without_gradient() -> None:
    made = capture(Lambda(lambda m, x: x + _without_gradient(m.linear, x)), [torch.randn(4, 3)])
    node, x = Node(made), leaf(torch.randn(5, 3))

    (output,) = node.run([x], training=True)
    output.sum().backward()

    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5, 3))
    assert node.state["linear.weight"].grad is None


def test_a_program_never_switches_gradients_on_that_its_caller_switched_off() -> None:
    made = capture(Lambda(lambda m, x: m.linear(_without_gradient(m.linear, x))), [torch.randn(4, 3)])
    node = Node(made)

    with torch.no_grad():
        (output,) = node.run([leaf(torch.randn(5, 3))], training=True)
        still = torch.is_grad_enabled()

    assert not output.requires_grad
    assert not still


def test_a_run_that_fails_leaves_the_gradient_mode_as_it_was() -> None:
    made = capture(Lambda(lambda m, x: m.linear(_without_gradient(m.linear, x))), [torch.randn(4, 3)])
    node = Node(made)
    node.state["linear.weight"] = nn.Parameter(torch.randn(3, 9))

    with pytest.raises(RuntimeError):
        node.run([torch.randn(5, 3)], training=True)

    assert torch.is_grad_enabled()


def test_buffers_outside_the_state_dict_travel_as_constants() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.get_buffer("scale")

    made = capture(module := Scaled(), [torch.randn(4, 3)])

    assert [s.kind for s in made.program.state] == [program_pb2.STATE_KIND_CONSTANT]
    assert_same_step(module, made, [torch.randn(5, 3)], training=False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"bidirectional": True}),
        (nn.GRU, {"batch_first": True, "bias": False, "num_layers": 2}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_recurrent_layers_travel(kind: type[nn.LSTM | nn.GRU | nn.RNN], options: dict[str, Any]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(3, 4, **options)

        def forward(self, x: Tensor) -> Tensor:
            if self.layer.batch_first:
                result: Tensor = self.layer(x)[0]
                return result
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)  # type: ignore[no-any-return]

    module = Recurrent()
    made = capture(module, [torch.randn(4, 2, 3)])

    assert_same_step(module, made, [torch.randn(5, 2, 3)], training=True)
    assert activation_bytes(made.program, made.program.train, 2, UNLIMITED) > 0


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_an_lstm_that_projects_its_output_travels() -> None:
    class Projecting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 6, proj_size=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x)[0]
            return result

    module = Projecting()

    assert_same_step(module, capture(module, [torch.randn(4, 2, 3)]), [torch.randn(5, 2, 3)], training=True)


def test_capturing_changes_nothing_of_the_module_and_says_nothing() -> None:
    module = models.lstm()
    module.train()
    module.get_submodule("fc").eval()
    before = dict(module.state_dict(keep_vars=True))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(module, [models.lstm_example(4, tokens=2)])

    assert [m.training for _, m in module.named_children()] == [True, True, False]
    after = module.state_dict(keep_vars=True)
    assert all(after[name] is t for name, t in before.items())
    assert module(models.lstm_example(3)).shape == (3, 5)


# --- What cannot travel says so ---------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "the_batch_size_in_a_view": (lambda m, x: m.linear(x).view(4, -1), "training mode"),
    "the_batch_size_in_a_constant": (lambda m, x: m.linear(x) + torch.ones(4, 3), "training mode"),
    "control_flow_on_data": (lambda m, x: m.linear(x) if x.sum() > 0 else x, "data-dependent control flow"),
    "a_size_that_depends_on_data": (lambda m, x: m.linear(x)[x.sum(1) > 0], "cannot"),
    "an_operator_off_the_list": (lambda m, x: m.linear(x) + torch.rand_like(x), "aten::rand_like.default"),
    "uninitialised_memory": (lambda _, x: torch.empty_like(x).copy_(x), "aten::empty_like.default"),
    "reinterpreted_memory": (lambda m, x: m.linear(x).view(torch.int32).float(), "aten::view.dtype"),
    "complex_numbers": (lambda _, x: torch.fft.fft(x).real, "cannot travel"),
    "double_precision_out": (lambda m, x: m.linear(x).double(), "torch.float64"),
    "no_tensor_out": (lambda m, x: (m.linear(x), None), "NoneType"),
    "a_text_out": (lambda m, x: (m.linear(x), "text"), "str"),
    "autocast_switched_on": (lambda m, x: _cast(m.linear, x), "wrap_with_autocast"),
    "a_changed_shape_in_place": (lambda m, x: m.linear(x).unsqueeze_(1), "aten::unsqueeze_.default"),
}


def _cast(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result: Tensor = layer(x)
    return result.float()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_travel_is_refused_and_named(name: str) -> None:
    function, complaint = REFUSED[name]

    with pytest.raises(CutError) as caught:
        capture(Lambda(function), [torch.randn(4, 3)])

    assert complaint in str(caught.value)
    assert any(advice in str(caught.value) for advice in ("Move the cut", "keep it on your side"))


def test_an_example_of_one_row_is_refused() -> None:
    with pytest.raises(CutError, match="at least 2 rows"):
        capture(nn.Linear(3, 3), [torch.randn(1, 3)])


def test_an_example_of_a_dtype_that_no_frame_carries_is_refused() -> None:
    with pytest.raises(CutError, match=r"torch\.float64"):
        capture(nn.Linear(3, 3).double(), [torch.randn(4, 3).double()])


def test_a_memory_format_that_does_not_travel_is_refused() -> None:
    module = Lambda(
        lambda _, x: x[:, :, None, None, None].repeat(1, 1, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d)
    )

    with pytest.raises(CutError, match="channels_last_3d"):
        capture(module, [torch.randn(4, 3)])


def test_a_refused_capture_leaves_the_modules_flags_as_they_were() -> None:
    module = Lambda(REFUSED["control_flow_on_data"][0]).eval()

    with pytest.raises(CutError):
        capture(module, [torch.randn(4, 3)])

    assert not module.training


# --- State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("0.weight"), "'0.weight' is missing"),
        (lambda state: state.update(other=torch.zeros(1)), "no tensor 'other'"),
        (lambda state: state.update({"0.weight": torch.zeros(4, 3, dtype=torch.float16)}), "torch.float16"),
        (lambda state: state.update({"0.weight": torch.zeros(3, 4)}), r"\(3, 4\)"),
    ],
)
def test_tensors_that_are_not_the_programs_state_are_refused(
    change: Callable[[dict[str, Tensor]], Any], complaint: str
) -> None:
    made = capture(small(), [torch.randn(4, 3)])
    state = dict(made.state)
    check_state(made.program, state)
    change(state)

    with pytest.raises(StateRejectedError, match=complaint):
        check_state(made.program, state)


# --- What a run holds -------------------------------------------------------------------------------------------------


def kept_bytes(node: Node, x: Tensor) -> int:
    """What autograd really keeps for the backward, less the state and the input."""
    storages: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*node.state.values(), x)}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    graph: Graph = node.program.train
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = Runner(node.program, graph, CPU).run([*node.state.values(), x])
    assert outputs
    return sum(storages.values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "resnet18"])
def test_T02_the_bound_of_a_run_is_no_less_than_what_the_run_keeps_and_no_more_than_a_few_times_it(name: str) -> None:
    _, made = captured(name)
    node, x = Node(made), CASES[name].example(5)

    bound = activation_bytes(made.program, made.program.train, 5, UNLIMITED)

    kept = kept_bytes(node, x)
    assert kept <= bound <= 6 * kept


def test_the_bound_of_a_run_grows_with_its_rows() -> None:
    _, made = captured("ecg_cnn")

    few, many = (activation_bytes(made.program, made.program.train, rows, UNLIMITED) for rows in (8, 64))

    assert 7.5 < many / few < 8.1
