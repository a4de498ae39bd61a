"""``cloister inspect``, the survey behind it, and the functions that commands are told by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, Final
from unittest.mock import ANY

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from client_side.cutting import cut
from client_side.survey import CLASS_LABEL_BYTES, Candidate, survey
from cloister.commands.inspect import inspect as inspect_command
from cloister.factories import example_inputs, load_model, random_inputs
from examples import models
from wire.errors import ConfigError, CutError

ROOT: Final = Path(__file__).resolve().parents[1]


def inspected(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloister", "inspect", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=110,
        check=False,
    )


def by_front(model: nn.Module, *example: Tensor, **options: Any) -> dict[str, Candidate]:
    return {c.front: c for c in survey(model, example, **options).candidates}


# --- The survey -------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_where_they_are_trained() -> None:
    model = models.small_resnet()

    found = by_front(model, models.small_resnet_example(4))

    made = cut(model, front="layer2", head="fc", example=models.small_resnet_example(4))
    assert found["layer2"].owner_parameters == sum(p.numel() for p in made.owner_parameters())
    assert found["layer2"].node_parameters == made.program.parameter_count


@pytest.mark.parametrize("vanilla", [False, True])
def test_bytes_are_those_that_a_step_sends(*, vanilla: bool) -> None:
    model, x = models.unet(), models.unet_example(4, 16)
    head = None if vanilla else "head"
    made = cut(model, front="encode2", head=head, example=x)
    smashed, _ = made.split_outputs(made.front(x))
    up = sum(t.nbytes for t in smashed) // 4
    down = 16 * 16 * (2 if vanilla else 16) * 4

    found = by_front(model, x, vanilla=vanilla)["encode2"]

    assert found.tensors == len(smashed) == 2
    assert found.bytes_up == up + (CLASS_LABEL_BYTES if vanilla else down)
    assert found.bytes_down == up + (0 if vanilla else down)


def test_a_frozen_front_gets_no_gradients_back() -> None:
    model = models.mlp()
    trained = by_front(model, torch.randn(4, 784))["relu1"]
    model.get_submodule("fc1").requires_grad_(False)

    frozen = by_front(model, torch.randn(4, 784))["relu1"]

    assert trained.bytes_down - frozen.bytes_down == 256 * 4
    assert frozen.bytes_up == trained.bytes_up


@pytest.mark.parametrize("name", ["mlp", "ecg_cnn", "transformer", "unet"])
def test_work_adds_up_to_what_a_whole_step_does(name: str) -> None:
    torch.manual_seed(0)
    model, x = getattr(models, name)(), getattr(models, f"{name}_example")(4)
    if name == "transformer":
        for layer in model.layers:
            layer.self_attn.forward = _unfused(layer.self_attn)
    with FlopCounterMode(display=False) as counter:
        model.train()(x).sum().backward()

    candidates = survey(model, x).candidates

    for candidate in candidates:
        assert candidate.owner_flops + candidate.node_flops == counter.get_total_flops() // 4


def _unfused(attention: nn.MultiheadAttention) -> Any:
    """With its weights asked for, attention is plain products, which the counter of a real run knows too."""
    plain = type(attention).forward
    return lambda *args, **kwargs: plain(attention, *args, **(kwargs | {"need_weights": True}))


def test_a_recurrent_layers_work_is_counted() -> None:
    found = by_front(models.lstm(features=8, hidden=64), models.lstm_example(4, tokens=20))["embed"]

    products = 2 * 20 * (4 * 64) * (64 + 64)  # one layer's four gates over 20 steps, for inputs and states of 64
    assert found.node_flops == pytest.approx(3 * 2 * products, rel=0.03)  # the first step's state needs no gradient


def test_every_child_of_a_sequential_is_a_place_to_cut_and_the_last_is_its_own_name() -> None:
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
            body=nn.Sequential(
                OrderedDict(a=nn.Linear(4, 4), b=nn.Sequential(nn.Linear(4, 4), nn.ReLU()), c=nn.Tanh())
            ),
            head=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)),
        )
    )

    found = survey(model, torch.randn(4, 4))

    assert found.head == "head"
    assert [c.front for c in found.candidates] == ["stem.0", "stem", "body.a", "body.b"]


def test_a_head_inside_a_block_can_be_named() -> None:
    found = survey(models.small_resnet(), models.small_resnet_example(4), head="layer4.0.conv2")

    # The block calls its one relu again after the head has begun.
    assert [c.front for c in found.candidates][-2:] == ["layer4.0.conv1", "layer4.0.bn1"]
    assert all(c.possible for c in found.candidates)


class Entangled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.relu, self.place, self.e = nn.ReLU(inplace=True), nn.Embedding(3, 4), nn.Linear(4, 2)
        self.d.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, 4)
        a = self.a(flat)
        b = self.b(a) + flat
        c = self.c(self.relu(b))
        c = c + self.place(x.shape[1] * torch.ones(1, dtype=torch.int64) // 4)
        out: Tensor = self.e(self.d(c)) + a.mean(1, keepdim=True)
        return out


def test_what_forbids_a_cut_is_said_and_is_what_cutting_says() -> None:
    model, x = Entangled(), torch.randn(6, 4)

    found = by_front(model, x)

    reasons = {front: c.reason for front, c in found.items()}
    for front, reason in reasons.items():
        with pytest.raises(CutError) as raised:
            cut(model, front=front, head="e", example=x)
        assert str(raised.value) == reason
    assert "an input itself, at most reshaped" in reasons["a"]
    assert "'place' crosses the cut with shape (1, 4) for 6 rows" in reasons["place"]
    assert "'d.weight' of the middle" in reasons["c"]
    assert survey(model, x).recommended(1.0) is None


def test_a_check_finds_what_only_a_real_cut_can() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = torch.special.i0e(x)
            return made

    model = nn.Sequential(nn.Linear(4, 4), Odd(), nn.Linear(4, 4), nn.Linear(4, 2))

    assert by_front(model, torch.randn(4, 4))["0"].possible
    checked = by_front(model, torch.randn(4, 4), check=True)

    assert [c.possible for c in checked.values()] == [False, True]
    assert "'aten::special_i0e.default' is not on the allow-list" in checked["0"].reason


def test_a_survey_changes_nothing_of_the_model() -> None:
    model, x = models.small_resnet(dropout=0.5).eval(), models.small_resnet_example(4)
    state = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    generator = torch.get_rng_state()

    survey(model, x)

    assert not any(module.training for module in model.modules())
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert tensor.grad is None
        assert torch.equal(tensor, state[name][1])
    assert torch.equal(torch.get_rng_state(), generator)


def test_recommended_is_the_deepest_of_the_cheapest_that_leave_little_work_here() -> None:
    found = survey(models.resnet18(), models.resnet18_example(2))

    names = [found.recommended(share) for share in (0.25, 0.3, 0.55, 1.0, 0.0)]
    assert [c.front if c else None for c in names] == ["layer1.0", "layer1", "layer2", "layer4.0", "relu"]


def test_a_model_that_cannot_be_surveyed_says_what_to_do() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.neg(x) if x.sum() > 0 else torch.abs(x)

    with pytest.raises(CutError, match=r"cloister\.Cut\(front=…, middle=…, head=…\)"):
        survey(Deciding(), torch.randn(4, 4))
    with pytest.raises(CutError, match="name a head, or survey it without one"):
        survey(nn.Sequential(nn.ReLU(), nn.Tanh()), torch.randn(4, 4))
    with pytest.raises(CutError, match="no submodule 'fd'; there are"):
        survey(models.mlp(), torch.randn(4, 784), head="fd")


# --- Functions by name ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's with a module in it, which the command runs in."""
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "number = 3\n"
        "def tabular():\n"
        "    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))\n"
        "def not_a_model():\n"
        "    return 'weights'\n"
        "def failing():\n"
        "    raise RuntimeError('no such disk')\n"
        "def rows(count):\n"
        "    return torch.zeros(count, 8)\n"
        "def pair(count):\n"
        "    return torch.zeros(count, 8), torch.zeros(count, 2, dtype=torch.int64)\n"
        "def fixed(count):\n"
        "    return torch.zeros(3, 8)\n"
        "class Shelf:\n"
        "    tabular = staticmethod(tabular)\n",
    )
    (tmp_path / "my_broken.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("my_models", "my_broken", "my_raw"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_a_function_is_found_in_the_folder_that_the_command_runs_in() -> None:
    assert isinstance(load_model("my_models:tabular"), nn.Sequential)
    assert isinstance(load_model("my_models:Shelf.tabular"), nn.Sequential)
    assert [x.dtype for x in example_inputs("my_models:pair", 5)] == [torch.float32, torch.int64]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("my_models", "'my_models' names no function: write module:function"),
        (":tabular", "':tabular' names no function"),
        ("no_such_module_here:f", "cannot import no_such_module_here: ModuleNotFoundError"),
        ("my_broken:f", "cannot import my_broken: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("my_models:tabula", "my_models has no tabula"),
        ("my_models:number", "is a int, not a function"),
        ("my_models:not_a_model", "returned a str: it must return an nn.Module"),
        ("my_models:failing", "my_models:failing failed: RuntimeError: no such disk"),
        ("my_models:rows", "my_models:rows failed: TypeError"),
    ],
)
def test_a_name_that_makes_no_model_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_model(name)

    assert complaint in str(raised.value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("my_models:fixed", "was asked for 5 rows and returned (3, 8): the batch is dimension 0"),
        ("my_models:str", "my_models has no str"),
        ("builtins:str", "builtins:str returned str: it must return a tensor"),
        ("builtins:range", "builtins:range returned range: it must return a tensor"),
    ],
)
def test_a_name_that_makes_no_example_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        example_inputs(name, 5)

    assert complaint in str(raised.value)


def test_inputs_can_be_given_by_their_shapes() -> None:
    image, codes = random_inputs(["1,28,28", " 7 "], ["float32", "int64"], 3)

    assert (image.shape, image.dtype) == ((3, 1, 28, 28), torch.float32)
    assert (codes.shape, codes.dtype) == ((3, 7), torch.int64)
    assert image.std() > 0
    assert not codes.any()
    assert torch.equal(random_inputs(["4"], [], 2)[0], random_inputs(["4"], ["float32"], 2)[0])
    assert [x.dtype for x in random_inputs(["4", "5"], ["bfloat16"], 2)] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("shapes", "dtypes", "complaint"),
    [
        (["3x32"], [], "'3x32' is no list of sizes"),
        (["3,,2"], [], "'3,,2' is no list of sizes"),
        (["0,2"], [], "'0,2' is no list of sizes"),
        (["-1"], [], "'-1' is no list of sizes"),
        ([""], [], "'' is no list of sizes"),
        (["99999,99999"], [], "has more than 268435456 elements a row"),
        (["2"], ["float"], "the dtype 'float' is none of float32, "),
        (["2", "3"], ["int64", "int64", "int64"], "3 dtypes for 2 inputs"),
    ],
)
def test_shapes_and_dtypes_that_are_none_are_refused(shapes: list[str], dtypes: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        random_inputs(shapes, dtypes, 2)

    assert complaint in str(raised.value)


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_shows_every_cut_and_how_to_use_the_best() -> None:
    ran = inspected("examples.models:resnet18", "--batch", "32", "--link-mbit", "1000")

    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    best = next(line.split() for line in ran.stdout.splitlines() if line.split()[-1:] == ["best"])
    assert best == ["layer1.0", "81.0k/11.1M", "460M/2.9G", "264k/264k", "1", "135.3", "best"]
    assert ran.stdout.endswith(
        '[model]\nfactory = "examples.models:resnet18"\n\n[cut]\nfront = "layer1.0"\nhead = "fc"\n',
    )


def test_the_commands_json_is_for_programs(here: Path) -> None:
    options = ["--input-shape", "8", "--head", "3", "--batch", "10", "--owner-share", "100", "--format", "json"]
    ran = inspected("my_models:tabular", *options, folder=here)

    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert {key: found[key] for key in ("model", "head", "batch", "link_mbit", "recommended_front")} == {
        "model": "my_models:tabular",
        "head": "3",
        "batch": 10,
        "link_mbit": 100.0,
        "recommended_front": "1",
    }
    assert found["cuts"][0] == {
        "front": "0",
        "possible": True,
        "recommended": False,
        "reason": "",
        "owner_parameters": 8 * 16 + 16 + 16 * 2 + 2,
        "node_parameters": 16 * 16 + 16,
        "owner_flops_per_sample": 2 * (2 * 8 * 16 + 3 * 16 * 2),
        "node_flops_per_sample": 2 * 3 * 16 * 16,
        "bytes_up_per_sample": 128,
        "bytes_down_per_sample": 128,
        "tensors_up": 1,
        "link_ms_per_step": 0.205,  # 256 B of each of 10 samples
        "encryption": None,
        "no_encryption": ANY,
    }


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "there is no my_models:tabular_example to make inputs with: give --input-shape"),
        ({"dtype": ["int64"]}, "--dtype says what --input-shape is made of: give that too"),
        ({"input_shape": ["8"], "head": "9"}, "the model has no submodule '9'; there are 0, 1, 2, 3"),
        ({"head": "3", "vanilla": True}, "--head and --vanilla: give one of them"),
        ({"example": "my_models:rows", "input_shape": ["8"]}, "--example and --input-shape: give one of them"),
        ({"example": "my_models:pair"}, "the example gives 2 tensors; the model's forward takes (input)"),
    ],
)
def test_the_command_says_what_is_wrong(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((ConfigError, CutError)) as raised:
        inspect_command("my_models:tabular", **options)

    assert str(raised.value).startswith(complaint)


def test_a_model_that_fails_on_its_example_ends_the_command_in_one_line(here: Path) -> None:
    ran = inspected("my_models:tabular", "--input-shape", "9", folder=here)

    assert ran.returncode == 3
    assert ran.stderr.startswith("error: '0' fails on the example (RuntimeError: a and b must have same reduction dim")
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


@pytest.mark.usefixtures("here")
def test_the_command_works_without_a_head(capsys: pytest.CaptureFixture[str]) -> None:
    inspect_command("my_models:tabular", example="my_models:rows", vanilla=True, check=True)

    assert capsys.readouterr().out.endswith('[cut]\nfront = "1"\n')


def test_the_command_names_what_cannot_be(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my_raw.py").write_text(
        "from torch import nn\n"
        "class Raw(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)\n"
        "    def forward(self, x):\n"
        "        return self.c(self.b(self.a(x)) + x)\n",
    )

    inspect_command("my_raw:Raw", input_shape=["8"])

    told = capsys.readouterr().out
    assert "Not behind a: the middle reads the input 'x' itself (at 'add'): your raw data would leave." in told
    assert "[cut]" not in told
