"""``cloister train``, ``eval`` and ``predict`` as a user runs them: through a real node, over mutual TLS."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import safetensors.torch
import torch

import cloister
from cloister import digits, quickstart
from cloister.exits import ExitCode
from cloister.jobfile import load_job
from cloister.modelcard import model_card
from cloister.runs import RunFolder
from tests.inside import Inside

ROOT: Final = Path(__file__).resolve().parents[1]
JOB: Final = ROOT / "examples" / "digits.toml"
HOW_TO: Final = ROOT / "docs" / "how-to" / "train-a-job.md"
RESULT: Final = [
    "epochs",
    "steps",
    "final_loss",
    "test_loss",
    "test_accuracy",
    "seconds",
    "samples_per_second",
    "bytes_up",
    "bytes_down",
    "reconnects",
    "model",
    "model_sha256",
    "program_sha256",
    "epsilon",
    "delta",
    "data_set",
    "ledger",
    "claim",
    "encryption",
    "card",
    "interrupted",
]
METRICS: Final = "step epoch loss lr rows seconds node_seconds bytes_up bytes_down reconnects".split()  # noqa: SIM905
EVALUATED: Final = """loss accuracy labels seconds bytes_up bytes_down weights weights_sha256 program_sha256
    encryption security_bits encrypted_layers""".split()  # noqa: SIM905
PREDICTED: Final = """rows shape dtype seconds bytes_up bytes_down out weights_sha256 program_sha256
    encryption security_bits encrypted_layers""".split()  # noqa: SIM905


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "cloister", *map(str, arguments)]


def environment(**env: str) -> dict[str, str]:
    return {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}


def run(*arguments: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**env),
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


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run of two epochs."""

    folder: Path
    said: str
    result: dict[str, Any]


def training(node: cloister.LocalNode, out: Path, *more: object) -> list[object]:
    """The arguments of a run at one thread, as exactness asks for."""
    return [
        "train",
        JOB,
        "--node",
        node.address,
        "--identity",
        node.owner.folder,
        "--out",
        out,
        "--set",
        "train.threads=1",
        *more,
    ]


@pytest.fixture(scope="module")
def trained(node: cloister.LocalNode, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "new" / "digits"
    ran = run(*training(node, folder, "--epochs", 2, "--format", "json"))
    assert ran.returncode == 0, ran.stderr
    return Run(folder, ran.stderr, json.loads(ran.stdout))


def test_the_result_has_its_frozen_shape_and_the_folder_holds_it_too(trained: Run) -> None:
    result = trained.result

    assert list(result) == RESULT
    assert (result["epochs"], result["steps"], result["reconnects"], result["interrupted"]) == (2, 46, 0, False)
    assert result["test_accuracy"] > 0.9
    assert json.loads((trained.folder / "result.json").read_text()) == result
    names = {path.name for path in trained.folder.iterdir()}
    assert names == {"model.safetensors", "model-card.md", "job.json", "metrics.jsonl", "result.json", "state"}


def test_the_claim_is_told_once(trained: Run, node: cloister.LocalNode, inside: Inside, tmp_path: Path) -> None:
    table = inside(*training(node, tmp_path / "run", "--epochs", 1))

    assert (table.stdout + table.stderr).count(trained.result["claim"]) == 1
    assert trained.result["claim"] not in trained.said


def test_the_models_card_says_how_many_records_there_are_and_how_many_units(trained: Run) -> None:
    card = (trained.folder / "model-card.md").read_text()
    job = load_job(JOB)

    counted = model_card(job, trained.result, None, records=36_864, units=1536)

    assert "| records | 1,437 |" in card
    assert "| unit of privacy | record |" in card
    assert "| records | 36,864 |" in counted
    assert "| unit of privacy | record, of which there are 1,536 |" in counted


def test_the_model_equals_unsplit_training_to_the_bit(trained: Run) -> None:
    torch.manual_seed(0)
    model = digits.model()
    cut = cloister.cut(model, front="stem", head="head", example=torch.zeros(2, 1, 8, 8))
    loss = cloister.Loss("cross_entropy")
    unsplit = cloister.UnsplitTrainer(cut, optimizer=cloister.AdamW(lr=1e-3), loss=loss, micro_batches=2, seed=0)

    losses = unsplit.fit(digits.train_loader(), 2)

    file = trained.folder / "model.safetensors"
    found = safetensors.torch.load_file(file)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert hashlib.sha256(file.read_bytes()).hexdigest() == trained.result["model_sha256"]
    assert [line["loss"] for line in metrics(trained.folder)] == losses


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_has_its_line_of_metrics(trained: Run) -> None:
    lines = metrics(trained.folder)

    assert [line["step"] for line in lines] == list(range(1, 47))
    assert {tuple(line) for line in lines} == {tuple(METRICS)}
    assert [line["epoch"] for line in lines] == [1] * 23 + [2] * 23
    assert sum(line["rows"] for line in lines) == 2 * 1437
    # Over all steps: an update that the node ends after its answer counts with the next step's.
    assert 0 < sum(line["node_seconds"] for line in lines) < sum(line["seconds"] for line in lines)


def test_without_a_terminal_progress_is_one_line_an_epoch_on_stderr(trained: Run) -> None:
    lines = trained.said.splitlines()

    assert [line.split("  ")[0] for line in lines if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert "96 % of them on the node (U-shaped: labels stay here)" in trained.said
    assert "\x1b" not in trained.said


def test_a_folder_that_holds_a_run_is_only_overwritten_by_force_and_the_same_job_gives_the_same_file(
    node: cloister.LocalNode, trained: Run, inside: Inside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "run"
    old.mkdir()
    (old / "model.safetensors").write_text("precious")
    (old / "result.json").write_text("{}")

    monkeypatch.setenv("CLOISTER_TRAIN__EPOCHS", "2")
    refused = inside(*training(node, old))
    kept = (old / "model.safetensors").read_text()
    forced = inside(*training(node, old, "--force"))

    assert refused.returncode == ExitCode.CONFIG
    assert f"{old} holds a run already (result.json, model.safetensors)" in refused.stderr
    assert f"`cloister train --resume {old}`, or give --out FOLDER, or --force" in refused.stderr
    assert kept == "precious"
    assert forced.returncode == 0, forced.stderr
    assert trained.result["model_sha256"] in forced.stdout
    assert re.search(r"^epsilon +∞$", forced.stdout, re.MULTILINE)
    assert re.search(r"^bytes up +[\d.]+ MB$", forced.stdout, re.MULTILINE)
    assert json.loads((old / "job.json").read_text())["train"]["epochs"] == 2


FAILURES: Final = [
    (["train.epohcs=3"], ExitCode.CONFIG, "train.epohcs: no such key; did you mean epochs?"),
    (["model.factory=cloister.digits:modle"], ExitCode.CONFIG, "modle"),
    (["cut.front=stme"], ExitCode.CONFIG, "stme"),
    (["node.address=localhost:1#sha256:" + "a" * 64], ExitCode.UNREACHABLE, "localhost:1"),
    (["node.pin=sha256:" + "a" * 64], ExitCode.IDENTITY, "pin"),
]
MORE_FAILURES: Final = [
    (["model.args.width=3"], ExitCode.CONFIG, "model.factory: cloister.digits:model(width=3) failed: TypeError"),
    (["model.factory=cloister.digits:load", "model.args.split=test"], ExitCode.CONFIG, "must return an nn.Module"),
    (
        ["data.train=cloister.digits:model"],
        ExitCode.CONFIG,
        "data.train yields Sequential; a batch is (inputs…, labels)",
    ),
    (["data.train=cloister.digits:load", "data.args.split=train"], ExitCode.CONFIG, "it must return a DataLoader or"),
    (["data.args.batch_size=1"], ExitCode.CONFIG, "has 1 rows, and cut.example_batch wants 2"),
    (["cut.example=builtins:str"], ExitCode.CONFIG, "cut.example builtins:str returned str; a tensor"),
    (["cut.example=torch:zeros"], ExitCode.CONFIG, "stem"),
    (["node.identity=nowhere"], ExitCode.IDENTITY, "nowhere"),
    (["node.identity=NODE"], ExitCode.IDENTITY, "is a node's, and only owners dial out: make your own with `cloister"),
    (["output.dir=/proc/nowhere"], ExitCode.CONFIG, "cannot write to /proc/nowhere"),
    (["output.dir=README.md"], ExitCode.CONFIG, "cannot write to README.md"),
]


def failing(node: cloister.LocalNode, folder: Path, settings: list[str]) -> list[object]:
    """The arguments of a run that fails by ``settings``; the file itself says nothing of how the node is known."""
    job = folder / "job.toml"
    job.write_text(JOB.read_text().replace('certificate = "node/tls.crt"\n', ""))
    pinned = node.address.partition("#")[0] if settings[0].startswith("node.pin") else node.address
    known = [f"node.identity={node.owner.folder}", f"output.dir={folder / 'run'}", f"node.address={pinned}"]
    said = [text.replace("=NODE", f"={node.folder / 'node'}") for text in [*known, *settings]]
    return ["train", job, *(word for text in said for word in ("--set", text))]


@pytest.mark.parametrize(("settings", "code", "words"), FAILURES)
def test_what_is_wrong_ends_with_its_code_and_its_words_and_writes_nothing(
    settings: list[str], code: ExitCode, words: str, node: cloister.LocalNode, tmp_path: Path
) -> None:
    ran = run(*failing(node, tmp_path, settings))

    assert ran.returncode == code, ran.stderr
    assert words in ran.stderr.splitlines()[-1]
    assert ran.stdout == ""
    assert list(tmp_path.glob("run/*")) == []


@pytest.mark.parametrize("failure", MORE_FAILURES)
def test_what_a_factory_or_a_folder_has_wrong_is_told_too(
    failure: tuple[list[str], ExitCode, str], node: cloister.LocalNode, inside: Inside, tmp_path: Path
) -> None:
    settings, code, words = failure

    ran = inside(*failing(node, tmp_path, settings))

    assert ran.returncode == code, ran.stderr
    assert words in ran.stderr.splitlines()[-1]


def test_print_job_prints_a_job_that_reads_back_and_trains_nothing(inside: Inside, tmp_path: Path) -> None:
    printed = inside("train", JOB, "--epochs", 9, "--out", tmp_path / "run", "--print-job")
    again = tmp_path / "again.toml"
    again.write_text(printed.stdout)

    ran = inside("train", again, "--print-job", "--format", "json")

    assert json.loads(ran.stdout)["train"]["epochs"] == 9
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def long_run(node: cloister.LocalNode, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A run that would take for ever, a few steps after its beginning."""
    with subprocess.Popen(
        command(*training(node, folder, "--epochs", 100_000, "--format", "json")),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            give_up_at = time.monotonic() + 60
            while not (folder / "metrics.jsonl").exists() or len(metrics_text(folder)) < 3:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < give_up_at
                time.sleep(0.05)
            yield process
        finally:
            process.kill()


def metrics_text(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_interrupt_finishes_the_step_and_saves_the_model_so_far(
    number: signal.Signals, node: cloister.LocalNode, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with long_run(node, folder) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)

    result = json.loads(out)
    assert process.returncode == ExitCode.INTERRUPTED
    assert result["interrupted"] is True
    assert result["steps"] == len(metrics(folder))
    assert result["test_loss"] is None
    assert "finishing this step, then writing a checkpoint" in err
    assert f"stopped after step {result['steps']}, {result['epochs']} of 100000 epochs finished; go on with" in err
    assert f" `cloister train --resume {folder}`" in err
    assert json.loads((folder / "result.json").read_text()) == result
    assert f"The model so far is in {folder / 'model.safetensors'}" in err
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == result["model_sha256"]


def test_a_second_interrupt_stops_at_once_even_where_the_node_hangs(node: cloister.LocalNode, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with long_run(node, folder) as process:
        node.process.send_signal(signal.SIGSTOP)
        try:
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=15)
        finally:
            node.process.send_signal(signal.SIGCONT)

    assert process.returncode == ExitCode.INTERRUPTED
    assert err.splitlines()[-1] == "error: interrupted"
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "result.json").exists()


def test_two_runs_do_not_write_into_one_folder(node: cloister.LocalNode, inside: Inside, tmp_path: Path) -> None:
    job = load_job(JOB, [("--out", "output.dir", str(tmp_path))])

    with RunFolder(job, force=False):
        second = inside(*training(node, tmp_path))

    assert second.returncode == ExitCode.CONFIG
    assert f"another run is writing to {tmp_path}" in second.stderr


def test_the_demo_writes_what_left_into_a_ledger_of_its_own(
    inside: Inside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The demo's first half; the second, which takes longer, would write into the same ledger."""
    ledgers: list[cloister.Ledger] = []

    def stop(_node: str, _owner: object, ledger: cloister.Ledger, *_callbacks: object) -> None:
        ledgers.append(ledger)
        assert len(ledger.data_sets()) == 2  # trained on, and evaluated
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "train_privately", stop)
    monkeypatch.setenv("CLOISTER_LEDGER", f"sqlite:///{tmp_path / 'own' / 'privacy.sqlite'}")

    ran = inside("demo", "--out", tmp_path / "model.safetensors")

    assert ran.returncode == ExitCode.INTERRUPTED
    assert "cloister-demo-" in ledgers[0].name
    assert not (tmp_path / "own").exists()


def owned(node: cloister.LocalNode) -> list[object]:
    return ["--node", node.address, "--identity", node.owner.folder, "--set", "train.threads=1"]


def test_eval_says_what_train_measured(node: cloister.LocalNode, trained: Run, inside: Inside) -> None:
    weights = trained.folder / "model.safetensors"

    ran = inside("eval", JOB, "--weights", weights, "--format", "json", *owned(node))

    found = json.loads(ran.stdout)
    assert list(found) == EVALUATED
    assert (found["loss"], found["accuracy"]) == (trained.result["test_loss"], trained.result["test_accuracy"])
    assert (found["labels"], found["weights_sha256"]) == (360, trained.result["model_sha256"])
    assert found["program_sha256"] == trained.result["program_sha256"]


def test_predict_writes_what_the_whole_model_says(
    node: cloister.LocalNode, trained: Run, inside: Inside, tmp_path: Path
) -> None:
    weights = trained.folder / "model.safetensors"
    images = digits.load("test").tensors[0]
    np.savez_compressed(tmp_path / "x.npz", images=images.numpy())
    ask = ["predict", JOB, "--weights", weights, "--input", tmp_path / "x.npz", "--out", tmp_path / "y.npy"]

    ran = inside(*ask, "--batch", 360, "--format", "json", *owned(node))
    again = inside(*ask, *owned(node))

    told = json.loads(ran.stdout)
    assert list(told) == PREDICTED
    assert told["encryption"] is None
    assert (told["rows"], told["shape"], told["dtype"]) == (360, [360, 10], "float32")
    model = digits.model().eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    with torch.no_grad():
        assert torch.equal(model(images), torch.from_numpy(np.load(tmp_path / "y.npy")))
    assert again.returncode == ExitCode.CONFIG
    assert "is there already: give another --out, or --force" in again.stderr


def test_predict_and_eval_under_encryption_say_by_which_scheme_and_what_the_model_says(
    node: cloister.LocalNode, trained: Run, tmp_path: Path
) -> None:
    text = JOB.read_text().replace('front = "stem"\nhead = "head"', 'front = "body"')  # the last layer is the node's
    (tmp_path / "job.toml").write_text(text)
    images, labels = digits.load("test").tensors
    np.save(tmp_path / "x.npy", images.numpy())
    weights = ["--weights", trained.folder / "model.safetensors", "--encrypted", "--format", "json", *owned(node)]
    ask = ["predict", tmp_path / "job.toml", "--input", tmp_path / "x.npy", "--out", tmp_path / "y.npy", *weights]

    predicted, evaluated = run(*ask), run("eval", tmp_path / "job.toml", *weights)

    assert predicted.returncode == evaluated.returncode == 0, predicted.stderr + evaluated.stderr
    told, found = json.loads(predicted.stdout), json.loads(evaluated.stdout)
    assert (list(told), list(found)) == (PREDICTED, EVALUATED)
    used = "CKKS, ring degree 2048, modulus of 54 bits"
    for result in (told, found):
        assert (result["encryption"], result["security_bits"], result["encrypted_layers"]) == (used, 128, 1)
    model = digits.model().eval()
    model.load_state_dict(safetensors.torch.load_file(trained.folder / "model.safetensors"))
    with torch.no_grad():
        wanted = model(images)
    made = torch.from_numpy(np.load(tmp_path / "y.npy"))
    assert 0 < float((made - wanted).abs().max()) < 1e-3
    assert told["bytes_up"] > 1_000_000  # ciphertexts: 64 numbers a row would be 92,160 bytes
    assert found["accuracy"] == pytest.approx(float((wanted.argmax(1) == labels).float().mean()), abs=1e-6)


def test_predict_says_why_an_input_does_not_fit(
    node: cloister.LocalNode, trained: Run, inside: Inside, tmp_path: Path
) -> None:
    wrong = {
        "double": np.zeros((4, 1, 8, 8)),
        "channels": np.zeros((4, 2, 8, 8), dtype="float32"),
    }
    ask = ["predict", JOB, "--weights", trained.folder / "model.safetensors", "--out", tmp_path / "y.npy"]

    said = {}
    for name, array in wrong.items():
        np.save(tmp_path / f"{name}.npy", array)
        ran = inside(*ask, "--input", tmp_path / f"{name}.npy", *owned(node))
        assert ran.returncode == ExitCode.CONFIG
        said[name] = ran.stderr.splitlines()[-1]

    assert "holds float64, and the model computes in float32: save it with x.astype(numpy.float32)" in said["double"]
    assert f"--input {tmp_path / 'channels.npy'} holds float32 [4, 2, 8, 8]" in said["channels"]
    assert not (tmp_path / "y.npy").exists()


@pytest.mark.timeout(240)  # five commands, each of which loads torch
def test_the_how_to_does_what_it_says(node: cloister.LocalNode, tmp_path: Path) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", HOW_TO.read_text(), flags=re.MULTILINE | re.DOTALL)
    for language, text in blocks:
        if language in ("toml", "python"):
            (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    (tmp_path / "owner").symlink_to(node.owner.folder)
    program = tmp_path / "bin" / "cloister"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cloister "$@"\n')
    program.chmod(0o755)

    script = "\n".join(text for language, text in blocks if language == "sh")
    path = f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["sh", "-euc", script],
        cwd=tmp_path,
        env=environment(NODE=node.address, PATH=path),
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert len([language for language, _ in blocks if language == "sh"]) == 4
    assert "lr = 0.05" in ran.stdout
    assert np.load(tmp_path / "y.npy").shape == (10, 2)
    assert json.loads((tmp_path / "runs" / "first" / "result.json").read_text())["test_accuracy"] > 0.9
