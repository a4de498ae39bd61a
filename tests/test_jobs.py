"""Job files: what is read, what is refused and with which words, and that the documentation says the same."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from torch import nn

from client_side.callbacks import Control, EpochEnd, Evaluation, StepEnd, TrainState
from client_side.link import Traffic
from cloister.arrays import load_arrays, save_array
from cloister.jobfile import MAX_JOB_BYTES, load_job, to_json, to_toml
from cloister.jobs import AdamTable, AdamWTable, Job, ScheduleTable, SgdTable
from cloister.progress import COLUMNS, Column, ProgressDisplay
from cloister.weights import load_weights, save_weights
from wire.errors import ConfigError
from wire.recipe import SGD, Adam, AdamW, Schedule

ROOT: Final = Path(__file__).resolve().parents[1]
EXAMPLE: Final = ROOT / "examples" / "digits.toml"
OPTIMIZERS: Final = [(SgdTable, SGD), (AdamTable, Adam), (AdamWTable, AdamW)]


def job(*settings: str, env: dict[str, str] | None = None, file: Path = EXAMPLE) -> Job:
    overrides = [(f"--set {text}", *text.split("=", 1)) for text in settings]
    return load_job(file, [(option, key, value) for option, key, value in overrides], env or {})


def complaint(*settings: str, env: dict[str, str] | None = None, file: Path = EXAMPLE) -> str:
    with pytest.raises(ConfigError) as caught:
        job(*settings, env=env, file=file)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    file = folder / "job.toml"
    file.write_text(text)
    return file


def test_the_example_job_says_what_its_file_says() -> None:
    read = job()

    assert (read.cut.front, read.cut.head, read.train.epochs, read.train.micro_batches) == ("stem", "head", 5, 2)
    assert read.optimizer.recipe() == AdamW(lr=0.001)
    assert read.node.where()[0].certificate == Path("node/tls.crt")


def test_options_win_over_the_environment_and_the_environment_over_the_file() -> None:
    env = {"CLOISTER_TRAIN__EPOCHS": "7", "cloister_train__seed": "9", "CLOISTER_DATA__ARGS": '{"batch_size": 8}'}

    read = job("train.epochs=3", env=env)

    assert (read.train.epochs, read.train.seed, read.data.args) == (3, 9, {"batch_size": 8})


def test_text_from_outside_becomes_the_type_that_its_key_takes() -> None:
    read = job(
        "cut.front=0",
        "optimizer.betas=[0.5, 0.6]",
        "optimizer.amsgrad=true",
        "model.args={ width = 64, kind = 'wide' }",
        "output.dir=2026-01-01",
    )

    assert read.cut.front == "0"
    assert read.optimizer.recipe() == AdamW(lr=0.001, betas=(0.5, 0.6), amsgrad=True)
    assert read.model.args == {"width": 64, "kind": "wide"}
    assert read.output.dir == Path("2026-01-01")


def test_a_node_with_a_pin_from_outside_replaces_how_the_file_knows_its_node() -> None:
    (where,) = job("node.address=gpu:7700#sha256:ab").node.where()

    assert (where.target, where.pin, where.certificate) == ("gpu:7700", "sha256:ab", None)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "train.epohcs=3",
            ["--set train.epohcs=3: train.epohcs: no such key", "did you mean epochs?", "seed, threads"],
        ),
        ("tarin.epochs=3", ["tarin: no such table", "did you mean train?"]),
        ("optimizer.momentum=0.9", ["optimizer.momentum: no such key", "betas"]),
        ("train.epochs=0", ["train.epochs: 0 should be greater than or equal to 1; write epochs = 10"]),
        ("train.epochs=three", ["train.epochs: 'three' should be a valid integer; write epochs = 10"]),
        ("optimizer.name=lion", ["optimizer.name: no optimizer is called 'lion'", '"adamw", "adam" or "sgd"']),
        ("loss.name=hinge", ["loss.name: 'hinge' should be 'cross_entropy'"]),
        ("model.factory=model", ["'model' is not the name of a function as module:function"]),
        ("model.factory=__import__('os'):system", ["is not the name of a function"]),
        ("train.in_flight=3", ["train.in_flight = 3 of 2 micro-batches: write micro_batches = 3"]),
        ("optimizer.lr=-1", ["optimizer lr = -1.0: a finite number from 0"]),
        ("optimizer.schedule.decay=cosine", ["schedule cosine: total_steps above warmup_steps"]),
        ("loss.label_smoothing=2", ["label_smoothing: from 0 to below 1"]),
        ("node.pin=sha256:ab", ["node.address = 'localhost:7700': say how the node is known, by exactly one of"]),
        ("epochs=3", ["write --set table.key=value"]),
        ("train.=3", ["write --set table.key=value"]),
    ],
)
def test_a_wrong_setting_is_refused_with_its_place_and_what_to_write(setting: str, words: list[str]) -> None:
    said = complaint(setting)

    assert all(word in said for word in words), said


def test_a_wrong_variable_is_named() -> None:
    assert "CLOISTER_TRAIN__EPOCHS: train.epochs: 'x' should be" in complaint(env={"CLOISTER_TRAIN__EPOCHS": "x"})
    assert "CLOISTER_TRIAN__EPOCHS: no such table; did you mean train?" in complaint(
        env={"CLOISTER_TRIAN__EPOCHS": "3"}
    )
    assert "CLOISTER_TRAIN__EPOHCS: train.epohcs: no such key" in complaint(env={"CLOISTER_TRAIN__EPOHCS": "3"})
    assert "CLOISTER_MODEL__ARGS" in complaint(env={"CLOISTER_MODEL__ARGS": "{"})


def test_variables_of_other_commands_are_left_alone() -> None:
    assert job(env={"CLOISTER_DEBUG": "1", "CLOISTER_PASSPHRASE": "secret", "PATH": "/bin"}) == job()


def test_a_file_is_read_strictly(tmp_path: Path) -> None:
    text = EXAMPLE.read_text()

    assert "train.epochs: '5' should be a valid integer" in complaint(
        file=written(tmp_path, text.replace("epochs = 5", 'epochs = "5"'))
    )
    assert "cut.front: 0 should be a valid string" in complaint(
        file=written(tmp_path, text.replace('front = "stem"', "front = 0"))
    )


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    said = complaint(file=written(tmp_path, "[train]\n[optimizer]\nlr = 0.1\n"))

    assert "8 things to mend in the job" in said
    assert "train.epochs: is missing; write epochs = 10" in said
    assert "model: is missing; write [model] with factory" in said
    assert 'optimizer.name: is missing; write name = "adamw", "adam" or "sgd"' in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[train\n", "is not TOML"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"#" * (MAX_JOB_BYTES + 1), "is larger than"),
        (b"a = " + b"[" * 100_000, "is not TOML"),
    ],
)
def test_what_is_no_job_file_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_bytes(content)

    assert words in complaint(file=file)


def test_a_job_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"cannot read the job file {tmp_path / 'none.toml'}: No such file" in complaint(file=tmp_path / "none.toml")


TOML_VALUES: Final = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.dates()
    | st.datetimes(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), TOML_VALUES, max_size=4))
def test_a_job_written_as_toml_reads_back_as_the_same_job(args: dict[str, Any]) -> None:
    before = job().model_copy(update={"model": job().model.model_copy(update={"args": args})})

    read = tomllib.loads(to_toml(before))

    assert Job(**read) == before


def test_a_job_as_json_has_every_key() -> None:
    read = json.loads(to_json(job()))

    assert read.keys() == Job.model_fields.keys()
    assert read["train"] == {"epochs": 5, "micro_batches": 2, "in_flight": None, "seed": 0, "threads": None}


@pytest.mark.parametrize(("table", "recipe"), [*OPTIMIZERS, (ScheduleTable, Schedule)])
def test_a_table_has_the_fields_and_the_defaults_of_its_recipe(table: type[BaseModel], recipe: type) -> None:
    defaults = {name: _default(field) for name, field in table.model_fields.items() if name not in ("name", "schedule")}

    own = {f.name: f.default for f in dataclasses.fields(recipe) if f.name != "schedule"}
    assert defaults == {name: None if default is dataclasses.MISSING else default for name, default in own.items()}


def test_the_reference_lists_every_key_with_its_default() -> None:
    text = (ROOT / "docs" / "reference" / "job-file.md").read_text()
    told = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        table = re.match(r"`\[([\w.]+)\]`", section)
        for key, _, default in re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", section, flags=re.MULTILINE):
            told[f"{table.group(1) if table else '?'}.{key}"] = default.strip("` ")

    assert told == dict(_documented(Job, ""))


def _documented(table: type[BaseModel], at: str) -> Iterator[tuple[str, str]]:
    for name, field in table.model_fields.items():
        kind = field.annotation
        if name == "optimizer":
            adamw, sgd = dict(_documented(AdamWTable, "optimizer.")), dict(_documented(SgdTable, "optimizer."))
            yield from {**adamw, **sgd}.items()
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _documented(kind, f"{at}{name}.")
        else:
            yield f"{at}{name}", _shown(field)


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "none" if value is None else json.dumps(str(value) if isinstance(value, Path) else value)


def _default(field: FieldInfo) -> object:
    return None if field.default is PydanticUndefined else field.default


class _Tied(nn.Module):
    flat: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("flat", torch.arange(6.0))
        self.register_buffer("view", self.flat[2:4])  # a part of another tensor's memory
        self.register_buffer("empty", torch.zeros(0))


def test_tied_weights_and_views_survive_a_file_and_the_same_model_hashes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    before = _Tied()
    first = save_weights(before, tmp_path / "a.safetensors")
    again = save_weights(before, tmp_path / "b.safetensors")
    torch.manual_seed(2)
    after = _Tied()

    loaded = load_weights(after, tmp_path / "a.safetensors")

    assert first == again == loaded
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == {"embed.weight", "flat", "view", "empty"}
    assert after.out.weight is after.embed.weight
    assert all(torch.equal(after.state_dict()[name], t) for name, t in before.state_dict().items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_safetensors_own_loader_reads_tied_weights_too(tmp_path: Path) -> None:
    before, after = (nn.ModuleDict({"a": layer, "b": layer}) for layer in (nn.Linear(3, 2), nn.Linear(3, 2)))
    save_weights(before, tmp_path / "w.safetensors")

    safetensors.torch.load_model(after, tmp_path / "w.safetensors")

    assert torch.equal(after.state_dict()["b.weight"], before.state_dict()["b.weight"])


def test_weights_of_another_model_are_refused_with_what_differs(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_weights(nn.Linear(3, 2), file)

    for other, words in (
        (nn.Linear(4, 2), r"weight is float32 \[2, 3\], the model's is float32 \[2, 4\]"),
        (nn.Linear(3, 2).double(), "the model's is float64"),
        (nn.Linear(3, 2, bias=False), "also holds bias"),
        (nn.Sequential(nn.Linear(3, 2)), "lacks 0.weight, 0.bias and also holds"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_weights(other, file)


def test_T01_a_weights_file_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    torch.save(nn.Linear(3, 2).state_dict(), file)

    with pytest.raises(ConfigError, match="is not a safetensors file"):
        load_weights(nn.Linear(3, 2), file)


def test_weights_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "x").touch()

    with pytest.raises(ConfigError, match="cannot write"):
        save_weights(nn.Linear(3, 2), tmp_path / "w")

    assert [p.name for p in tmp_path.iterdir()] == ["w"]


def test_arrays_come_back_from_both_kinds_of_files(tmp_path: Path) -> None:
    x, ids = np.arange(6, dtype=">f4").reshape(3, 2), np.array([1, 2, 3])
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    np.savez_compressed(tmp_path / "x.npz", x=x, ids=ids)

    (alone,) = load_arrays(tmp_path / "x.npy")
    first, second = load_arrays(tmp_path / "x.npz")

    assert alone.dtype == torch.float32
    assert alone.tolist() == first.tolist() == x.tolist()
    assert second.tolist() == [1, 2, 3]


def test_bfloat16_is_written_as_float32(tmp_path: Path) -> None:
    save_array(tmp_path / "y.npy", torch.ones(2, dtype=torch.bfloat16))

    assert np.load(tmp_path / "y.npy").dtype == np.float32


def _npy(shape: tuple[int, ...], data: bytes) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_T02_an_array_that_claims_more_than_its_file_holds_is_refused(suffix: str, tmp_path: Path) -> None:
    lie, file = _npy((2**40,), b"\0" * 64), tmp_path / f"x.{suffix}"
    if suffix == "npy":
        file.write_bytes(lie)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x.npy", lie)

    with pytest.raises(ConfigError, match="is no NumPy file of numbers"):
        load_arrays(file)


def test_T01_an_array_of_python_objects_is_refused(tmp_path: Path) -> None:
    objects = np.array([{}], dtype=object)
    np.save(tmp_path / "x.npy", objects)
    np.savez(tmp_path / "x.npz", objects)

    for name in ("x.npy", "x.npz"):
        with pytest.raises(ConfigError, match="is no NumPy file of numbers"):
            load_arrays(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ([np.zeros((3, 2)), np.zeros((2, 2))], r"holds \[3, 2\], \[2, 2\]"),
        ([np.float32(1)], "same number of rows"),
        ([np.zeros((0, 2))], "one at least"),
        ([], "holds nothing"),
        ([np.array(["a"])], "a model takes numbers"),
    ],
)
def test_arrays_without_common_rows_of_numbers_are_refused(arrays: list[Any], words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", *arrays)

    with pytest.raises(ConfigError, match=words):
        load_arrays(tmp_path / "x.npz")


def _shown_run(display: ProgressDisplay) -> None:
    state, control = TrainState(epochs=2, steps_per_epoch=1), Control()
    display.on_train_begin(state, control)
    display.on_epoch_begin(state, control)
    display.on_step_end(state, control, StepEnd(1, 0.5, 64, 0.1, Traffic(1500, 2_000_000, 3), node_s=0.05))
    display.on_epoch_end(state, control, EpochEnd(1, 0.5, 64, 0.1))
    display.on_train_end(state, control)
    display.on_evaluate(state, control, Evaluation(0.25, 0.987, 360))


def test_without_a_terminal_an_epoch_is_one_plain_line() -> None:
    stream = io.StringIO()

    _shown_run(ProgressDisplay(Console(file=stream, width=40)))

    assert stream.getvalue().splitlines() == [
        "epoch 1/2  step 1  epoch loss 0.5000  samples/s 640  ε ∞  up 1.5 kB  down 2.0 MB  node 50 %  reconnects 3",
        "evaluated on 360 labels  test loss 0.2500  accuracy 98.70 %",
    ]


def test_an_epoch_that_was_broken_off_is_told_as_such() -> None:
    stream = io.StringIO()
    display = ProgressDisplay(Console(file=stream))
    state, control = TrainState(epochs=6, steps_per_epoch=23, epoch=1, global_step=23), Control()

    display.on_epoch_begin(state, control)
    state.global_step = 24
    display.on_step_end(state, control, StepEnd(24, 0.5, 64, 0.1, Traffic(0, 0, 0)))
    state.epoch = 2
    display.on_epoch_end(state, control, EpochEnd(2, 0.5, 64, 0.1))

    assert stream.getvalue().startswith("epoch 2/6  step 24  epoch loss 0.5000")
    assert stream.getvalue().endswith("  (the epoch is not finished)\n")


def test_in_a_terminal_there_are_columns_and_whoever_adds_one_sees_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system=None)

    _shown_run(ProgressDisplay(console, columns=[*COLUMNS, Column("twice", 8, lambda m: f"{m.step / 2}")], live=True))

    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert (
        "  epoch      step  epoch loss  samples/s       ε         up       down   node  reconnects     twice\n" in text
    )
    assert (
        "    1/2         1      0.5000        640       ∞     1.5 kB     2.0 MB   50 %           3       0.5\n" in text
    )
    assert stream.getvalue().rstrip().endswith("98.70 %")  # the cursor came back before
    assert stream.getvalue().count("\x1b[?25h") == 1


def test_in_a_narrow_terminal_the_last_columns_are_left_out() -> None:
    stream = io.StringIO()

    _shown_run(ProgressDisplay(Console(file=stream, width=40, force_terminal=True, color_system=None), live=True))

    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).splitlines()
    assert "  epoch      step  epoch loss  samples/s" in lines
