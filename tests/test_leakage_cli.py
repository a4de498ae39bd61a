"""``cloister leakage``: what it audits, writes and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner

from cloister.exits import ExitCode
from cloister.main import app
from privacy.leakage import CutLeakage, audit_cut
from tests import leakage_audits
from wire.errors import ConfigError

ROOT: Final = Path(__file__).resolve().parents[1]
# pytest finds a file's fixtures by their names in it.
_few_steps = leakage_audits.few_steps


MINE: Final = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from sklearn.datasets import load_digits

def model():
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

class Mute(nn.Linear):
    def forward(self, x):
        return super().forward(0 * x)

def mute():
    return nn.Sequential(Mute(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))

def loader():
    x, y = load_digits(return_X_y=True)
    return DataLoader(TensorDataset(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)), 100)

def unlabelled():
    return [torch.zeros(100, 64)]

def ragged():
    return [(torch.zeros(50, 64), torch.zeros(50)), (torch.zeros(50, 32), torch.zeros(50))]

def wider():
    return [(torch.zeros(50, 65), torch.zeros(50))]

def few():
    return [(torch.rand(30, 64), torch.zeros(30))]

def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))

def sentences():
    return [(torch.zeros(50, 5, dtype=torch.int64), torch.zeros(50, dtype=torch.int64))]

def broken():
    raise RuntimeError("the disk is gone")
"""

JOB: Final = """
[model]
factory = "mine:model"

[cut]
front = "1"
head = "4"

[data]
train = "mine:loader"

[train]
epochs = 1

[optimizer]
name = "sgd"
lr = 0.1

[node]
address = "localhost:7700"
certificate = "tls.crt"
identity = "owner"

[privacy]
activations = {treatment = "rows", clip = 1.0, noise = 3.0}

[output]
dir = "run"
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's module in it, where the command runs."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


def leaked(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["leakage", *arguments], env={"COLUMNS": "120", "NO_COLOR": "1"})


@pytest.mark.timeout(200)
def test_the_command_audits_each_cut_and_writes_the_report(mine: Path) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "cloister", "leakage", "mine:model", "--data", "mine:loader", "--rows", "200"),
            *("--seconds-per-attack", "1", "--out", "r", "--cut", "0", "--cut", "1", "--policy-noise", "1.0,0.1"),
            *("--threads", "1", "--format", "json"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=190,
        check=False,
    )

    assert (ran.returncode, ran.stderr.count("error")) == (ExitCode.OK, 0), ran.stderr
    record = json.loads(ran.stdout)
    assert [cut["cut"] for cut in record["cuts"]] == ["0", "1"]
    assert record == json.loads((mine / "r/leakage.json").read_text())
    assert record["settings"]["treatment"] == {"clip": 1.0, "noise": 0.1}
    assert "0: informed decoder" in ran.stderr
    assert {path.name for path in (mine / "r").iterdir()} == {
        "report.html", "leakage.json", "curves.png", "cut-01-0.png", "cut-02-1.png",
    }  # fmt: skip


def test_a_void_audit_ends_with_exit_code_1_and_says_so(mine: Path) -> None:
    ran = leaked("mine:mute", "--data", "mine:loader", "--rows", "200", "--seconds-per-attack", "0.5", "--cut", "0")

    assert ran.exit_code == ExitCode.FAILED, ran.stderr
    assert "failed" in ran.stdout
    assert "No cut can be recommended" in ran.stdout
    assert (mine / "leakage/report.html").exists()


def test_a_job_names_model_data_cut_and_noise(mine: Path) -> None:
    (mine / "job.toml").write_text(JOB)

    ran = leaked("job.toml", "--set", "train.seed=5", "--rows", "100", "--seconds-per-attack", "0.3", "--cut", "1")

    assert ran.exit_code in (ExitCode.OK, ExitCode.FAILED), ran.stderr
    record = json.loads((mine / "leakage/leakage.json").read_text())
    assert record["settings"]["treatment"] == {"clip": 1.0, "noise": 3.0}
    assert record["settings"]["seed"] == 5
    assert {guess["source"] for guess in record["cuts"][0]["labels"]} == {"activations", "outputs", "gradients"}
    assert "The job cuts behind 1." in ran.stdout


def test_a_real_sigint_keeps_the_cuts_that_are_done_and_ends_with_130(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops_at(monkeypatch, "1", lambda: signal.raise_signal(signal.SIGINT))

    ran = leaked("mine:model", "--data", "mine:loader", "--rows", "100", "--seconds-per-attack", "0.3")

    assert ran.exit_code == 130
    assert "1 of 2 cuts" in ran.stderr
    record = json.loads((mine / "leakage/leakage.json").read_text())
    assert [cut["cut"] for cut in record["cuts"]] == ["0"]
    assert record["left_out"] == {"1": "interrupted"}
    assert "nothing is known of it: 1 (interrupted)" in (mine / "leakage/report.html").read_text()


def test_a_cut_that_cannot_be_audited_does_not_cost_the_others(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise ConfigError("the activations at 0 are NaN")

    stops_at(monkeypatch, "0", refused)

    ran = leaked(
        "mine:model", "--data", "mine:loader", "--rows", "100", "--seconds-per-attack", "0.3", "--cut", "0",
        "--cut", "1",
    )  # fmt: skip

    assert ran.exit_code == ExitCode.FAILED
    assert "Not audited: 0 (the activations at 0 are NaN)." in ran.stdout
    assert [cut["cut"] for cut in json.loads((mine / "leakage/leakage.json").read_text())["cuts"]] == ["1"]


def stops_at(monkeypatch: pytest.MonkeyPatch, cut: str, stop: Callable[[], None]) -> None:
    def audited(name: str, *rest: Any) -> CutLeakage:
        if name == cut:
            stop()
        return audit_cut(name, *rest)

    monkeypatch.setattr("privacy.leakage.audit_cut", audited)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("mine:model",), "name its data too, such as --data"),
        (("mine:model", "--data", "mine:nothing"), "mine has no nothing"),
        (("mine:model", "--data", "mine:unlabelled"), "a batch must be (inputs, labels)"),
        (("mine:model", "--data", "mine:ragged"), "resize or pad them"),
        (("mine:model", "--data", "mine:broken"), "mine:broken failed: RuntimeError: the disk is gone"),
        (("mine:model", "--data", "mine:wider"), "the model does not take inputs of float32 [4, 65]"),
        (("mine:model", "--data", "mine:few"), "30 records: an audit needs at least 40"),
        (("mine:model", "--data", "mine:loader", "--policy-noise", "1"), "write clip and noise"),
        (("mine:model", "--data", "mine:loader", "--policy-noise", "0,1"), "clip must be above 0"),
        (("mine:model", "--data", "mine:loader", "--head", "4", "--vanilla"), "give one of them"),
        (("mine:model", "--data", "mine:loader", "--set", "train.seed=1"), "name a job file"),
        (("mine:model", "--data", "mine:loader", "--out", "mine.py"), "the report cannot be written there"),
        (("gone.toml",), "cannot read the job file gone.toml"),
        (("mine:words", "--data", "mine:sentences"), "put what looks them up"),
    ],
)
def test_the_command_says_what_is_wrong(mine: Path, arguments: tuple[str, ...], complaint: str) -> None:
    ran = leaked(*arguments)

    assert (ran.exit_code, ran.stdout) == (ExitCode.CONFIG, ""), mine
    assert complaint in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("wrong", [("--cut", "9"), ("--cut", "0", "--cut", "9"), ("--head", "9")])
def test_a_cut_that_does_not_exist_is_refused_before_data_are_read(mine: Path, wrong: tuple[str, ...]) -> None:
    ran = leaked("mine:model", "--data", "mine:broken", *wrong)

    assert ran.exit_code == ExitCode.CONFIG, mine
    assert "no submodule '9'; there are 0, 1, 2, 3, 4" in ran.stderr
    assert "the disk is gone" not in ran.stderr


@pytest.mark.timeout(200)
def test_the_package_opens_no_socket_and_knows_no_node() -> None:
    code = (
        "import sys; before = set(sys.modules); import privacy.leakage\n"
        "ours = ('client_side', 'cloister', 'server_side')\n"
        "print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in ours))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=190, check=True
    )

    assert ran.stdout.strip() == "[]"
