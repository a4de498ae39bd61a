"""``cloister train --resume`` and ``cloister runs``, as their users call them: real processes, really killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import cloister
from tests.inside import Inside

ROOT: Final = Path(__file__).resolve().parents[1]
JOB: Final = ROOT / "examples" / "digits.toml"
EPOCHS: Final = 4


def environment() -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cloister", *map(str, arguments)]


def run(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=100,
        check=False,
    )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as running:
        yield running


def training(node: cloister.LocalNode, out: Path, *more: object) -> list[object]:
    where = ["--node", node.address, "--identity", node.owner.folder, "--out", out]
    return ["train", JOB, *where, "--set", "train.threads=1", "--set", "checkpoint.every=7", "--epochs", EPOCHS, *more]


@pytest.fixture(scope="module")
def undisturbed(node: cloister.LocalNode, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ran = run(*training(node, folder))
    assert ran.returncode == 0, ran.stderr
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def interrupted(node: cloister.LocalNode, folder: Path, number: signal.Signals, steps: int) -> tuple[int, str]:
    """A run that gets a signal once it has done ``steps``; its exit code, and what it said."""
    started = subprocess.Popen(
        command(*training(node, folder)), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    metrics = folder / "metrics.jsonl"
    give_up = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        assert started.poll() is None, started.stderr and started.stderr.read().decode()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    started.send_signal(number)
    _, said = started.communicate(timeout=60)
    return started.returncode, said.decode()


@pytest.mark.timeout(240)  # six commands, each of which loads torch
def test_T07_a_killed_run_that_is_resumed_is_the_undisturbed_one_to_the_bit(
    node: cloister.LocalNode, undisturbed: Path, tmp_path: Path
) -> None:
    code, _ = interrupted(node, tmp_path / "run", signal.SIGKILL, 30)
    assert code == -signal.SIGKILL
    carried = (tmp_path / "run").rename(tmp_path / "carried")  # as to another machine

    listed = json.loads(run("runs", "list", tmp_path, "--format", "json").stdout)
    resumed = run("train", "--resume", carried)

    assert [(line["state"], line["run"]) for line in listed] == [("stopped", str(carried))]
    assert resumed.returncode == 0, resumed.stderr
    assert (carried / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert losses(carried) == losses(undisturbed)
    shown: dict[str, Any] = json.loads(run("runs", "show", carried, "--format", "json").stdout)
    assert [event["kind"] for event in shown["events"]] == ["began", "resumed"]
    assert shown["run"]["state"] == "finished"
    assert 1 <= len(shown["checkpoints"]) <= 2


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(
    node: cloister.LocalNode, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    code, said = interrupted(node, folder, signal.SIGINT, 12)
    stopped_at = losses(folder)[-1][0]

    assert code == 130
    finished = f"{stopped_at // 23} of {EPOCHS}"
    assert f"stopped after step {stopped_at}, {finished} epochs finished; go on with `cloister train --resume" in said
    assert f" --resume '{folder}'`" in said
    assert stopped_at % 23 == 0 or f"step {stopped_at}  " in said.partition("(the epoch is not finished)")[0]
    (listed,) = json.loads(run("runs", "list", tmp_path, "--format", "json").stdout)
    assert (listed["step"], listed["epochs"], listed["state"]) == (stopped_at, finished, "stopped")
    assert (
        int(next((folder / "state" / "checkpoints").iterdir()).name.split(".")[0].removeprefix("step-")) <= stopped_at
    )

    resumed = run("runs", "resume", folder, "--format", "json")

    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == losses(undisturbed)[-1][0]
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert losses(folder) == losses(undisturbed)


def test_a_finished_run_goes_on_for_more_epochs_and_keeps_its_lines(
    node: cloister.LocalNode, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(*training(node, folder, "--epochs", EPOCHS - 1)).returncode == 0

    went_on = run("train", "--resume", folder, "--epochs", EPOCHS)

    assert went_on.returncode == 0, went_on.stderr
    assert losses(folder) == losses(undisturbed)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_another_optimizer_is_not_the_same_run(undisturbed: Path) -> None:
    before = [(undisturbed / name).read_bytes() for name in ("job.json", "result.json", "model.safetensors")]

    refused = run("train", "--resume", undisturbed, "--set", "optimizer.lr=0.5", "--epochs", EPOCHS + 1)

    assert refused.returncode == 3
    assert "belongs to another run: optimizer was" in refused.stderr
    assert "lr=0.5" in refused.stderr
    assert [(undisturbed / name).read_bytes() for name in ("job.json", "result.json", "model.safetensors")] == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "model.factory=cloister.heartbeats:model",
            "model.factory was cloister.digits:model and is cloister.heartbeats",
        ),
        ("cut.front=stem.0", "middle was "),
    ],
)
def test_another_model_or_cut_is_not_the_same_run(undisturbed: Path, setting: str, said: str, inside: Inside) -> None:
    refused = inside("train", "--resume", undisturbed, "--set", setting)

    assert refused.returncode == 3
    assert f"to another run: {said}" in refused.stderr


def test_a_model_whose_code_changed_so_that_it_cannot_be_cut_is_not_the_same_run(
    undisturbed: Path, tmp_path: Path, inside: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    job = json.loads((changed / "job.json").read_text())
    (tmp_path / "mine_changed.py").write_text("from cloister.heartbeats import model\n")
    (changed / "job.json").write_text(json.dumps(job | {"model": {"factory": "mine_changed:model", "args": {}}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    refused = inside("train", "--resume", changed)

    assert refused.returncode == 3
    assert (
        "belong to another run: what mine_changed:model and cloister.digits:train_loader make changed" in refused.stderr
    )


def test_a_run_that_ended_before_its_first_checkpoint_is_started_again(
    node: cloister.LocalNode, tmp_path: Path, inside: Inside
) -> None:
    folder = tmp_path / "run"
    (folder / "state" / "checkpoints").mkdir(parents=True)
    printed = inside(*training(node, folder, "--epochs", 1, "--print-job", "--format", "json"))
    (folder / "job.json").write_text(printed.stdout)

    resumed = inside("train", "--resume", folder)
    again = inside("runs", "resume", folder)
    started = inside(*training(node, folder, "--epochs", 1))

    assert (resumed.returncode, again.returncode) == (3, 3)
    assert "has nothing to resume: the run ended before its first checkpoint" in resumed.stderr
    assert "start it again with the command that began it" in again.stderr
    assert started.returncode == 0, started.stderr


@pytest.mark.parametrize("when", ["the trainer is made", "the run begins"])
def test_a_run_that_is_refused_before_its_first_step_leaves_nothing(
    when: str, node: cloister.LocalNode, tmp_path: Path, inside: Inside
) -> None:
    folder = tmp_path / "runs" / "refused"
    refusals = {
        "the trainer is made": f"privacy.ledger=sqlite:///{tmp_path}",  # a folder is no ledger
        "the run begins": "privacy.epsilon=1.0",  # of a front that learns
    }

    refused = inside(*training(node, folder, "--set", refusals[when]))

    assert refused.returncode == 8, refused.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train"], 2, "name a job file, or a run to go on with"),
        (["train", JOB, "--resume", "runs/none"], 2, "leave out JOB.toml"),
        (["train", "--resume", "runs/none"], 3, "runs/none holds no run"),
        (["runs", "show", "runs/none"], 3, "runs/none holds no run"),
        (["runs", "rm", "--yes", "runs/none"], 3, "runs/none holds no run"),
    ],
)
def test_what_is_no_run_is_named(words: list[object], code: int, said: str) -> None:
    refused = run(*words)

    assert refused.returncode == code, refused.stderr
    assert said in refused.stderr.replace("\n", " ")


def test_removing_a_run_leaves_what_is_the_users_own(node: cloister.LocalNode, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    store = tmp_path / "elsewhere"
    assert run(*training(node, folder, "--epochs", 1, "--set", f"checkpoint.snapshots={store}")).returncode == 0
    assert any(store.rglob("*.safetensors"))
    (folder / "notes.txt").write_text("mine")

    removed = run("runs", "rm", "--yes", folder)

    assert removed.returncode == 0, removed.stderr
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert not any(store.rglob("*.safetensors"))
    assert "no runs in" in run("runs", "list", tmp_path / "nothing").stderr
