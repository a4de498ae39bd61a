"""``cloister demo``: real models through a real node on this machine: one proven exact, and one proven private."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

import cloister
from client_side.spawn import LocalNode, passphrase_file
from cloister import digits, quickstart
from cloister.exits import ExitCode
from cloister.jobfile import to_toml
from cloister.jobs import Job
from cloister.output import Format, FormatOption, print_record, progress_console
from cloister.progress import ProgressDisplay
from cloister.weights import save_weights
from provenance.commitments import commit
from provenance.sources import Items
from wire.errors import ConfigError

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class _Proven:
    """What the demo found."""

    test_accuracy: float
    test_loss: float
    seconds: float
    bytes_up: int
    bytes_down: int
    tensors_compared: int
    equal_to_the_bit: bool
    model: Path
    model_sha256: str
    private_accuracy: float
    epsilon: float | None
    delta: float | None
    claim: str | None
    provenance: str


@app.command()
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where the trained model goes.")] = Path("digits.safetensors"),
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Train real models through a real node on this machine; prove one exact, and account for the other's privacy.

    Starts a node as a process of its own, with mutual TLS between throw-away identities. Cuts a small convolutional
    network: its stem, its head, the images and the labels stay in this process; the node gets the body. Trains on
    scikit-learn's digits (1,437 scans), evaluates on 360 others, saves the whole model, then trains the same model
    without a split and compares every parameter and buffer, bit for bit.

    Then trains on the heart beats of 1,536 (synthetic) patients, which leave in one differentially private release,
    and says what may be claimed for them.

    Last, `cloister train` trains the digits once more from a job file: the node signs what it computes, the run's
    records go into a log, whose head is anchored on a chain in a file, and a process that has neither data nor keys
    verifies the bundle. Leaves nothing running.
    """
    console = progress_console()
    # Small layers run faster on one thread, and owner and node share this machine.
    torch.set_num_threads(1)
    started = time.perf_counter()
    display = ProgressDisplay()
    with tempfile.TemporaryDirectory(prefix="cloister-demo-") as folder:
        console.print("[bold]1[/] starting a node in its own process, mutual TLS, keys made for this demo only")
        with LocalNode(Path(folder), threads=1, receipts=True) as node:
            console.print(f"  node {node.address}", soft_wrap=True)
            console.print("[bold]2[/] training: images, labels, stem and head stay here; the body is on the node")
            cut, evaluation = quickstart.train(node.address, node.owner, display)
            console.print(
                "[bold]3[/] training on patients' heart beats: one noisy release leaves, and is written down before"
            )
            private, claim = _privately(Path(folder), node)
            console.print("[bold]4[/] a run on record: receipts, a log, an anchor, a bundle, verified by a stranger")
            verified = _on_record(Path(folder), node)
    console.print("[bold]5[/] training the same model unsplit, to compare")
    trained = {name: tensor.clone() for name, tensor in cut.reassemble().state_dict().items()}
    different = [name for name, tensor in _unsplit().items() if not torch.equal(tensor, trained[name])]
    digest = save_weights(cut.reassemble(), out)
    traffic = display.traffic
    print_record(
        _Proven(
            test_accuracy=round(evaluation.accuracy or 0.0, 4),
            test_loss=round(evaluation.loss, 4),
            seconds=round(time.perf_counter() - started, 1),
            bytes_up=traffic.up,
            bytes_down=traffic.down,
            tensors_compared=len(trained),
            equal_to_the_bit=not different,
            model=out,
            model_sha256=digest,
            private_accuracy=round(private.accuracy or 0.0, 4),
            epsilon=None if claim is None else round(claim.spent.epsilon, 4),
            delta=None if claim is None else claim.spent.delta,
            claim=None if claim is None else claim.sentence,
            provenance=verified["verdict"],
        ),
        fmt,
    )
    if different:
        console.print(f"[bold red]not equal[/]: {', '.join(different[:5])}")
        raise typer.Exit(ExitCode.FAILED)
    console.print(
        Panel.fit(
            f"Split and unsplit training gave the same model: all {len(trained)} parameters and buffers are "
            "[bold green]equal to the bit[/]. No image, no label and no layer of yours went over the wire. "
            "The node saw activations at the cut and gradients at its outputs, in the clear: images can be "
            "reconstructed in part from the former, labels inferred from the latter. Exactness is proven here, "
            "[bold]not privacy[/].",
            title="the digits: exact",
        ),
    )
    if claim is not None:
        console.print(Panel.fit("\n".join(claim.lines()), title="the heart beats: what may be claimed"))
    table = Table("about", "claim", "verdict", "basis", "by", title="the run on record: what a stranger verified")
    for line in verified["claims"]:
        table.add_row(*(escape(str(line[name])) for name in ("part", "claim", "verdict", "basis", "by")))
    console.print(table)
    if verified["verdict"] in ("fails", "revoked"):
        raise typer.Exit(ExitCode.FAILED)


def _privately(folder: Path, node: LocalNode) -> tuple[cloister.Evaluation, cloister.Claim | None]:
    with contextlib.closing(cloister.Ledger(f"sqlite:///{folder / 'privacy.sqlite'}")) as ledger:
        return quickstart.train_privately(node.address, node.owner, ledger, ProgressDisplay())


def _on_record(folder: Path, node: LocalNode) -> dict[str, Any]:
    """Trains, bundles and verifies by the commands themselves, each a process of its own; the verification's report."""
    run = folder / "run"
    made = commit(Items(digits.load("train")), folder / "digits.commitment")
    tables: dict[str, Any] = {
        "model": {"factory": "cloister.digits:model"},
        "cut": {"front": "stem", "head": "head"},
        "data": {"train": "cloister.digits:train_loader"},
        "train": {"epochs": 1, "micro_batches": 2, "threads": 1},
        "optimizer": {"name": "adamw", "lr": 2e-3},
        "node": {"address": node.address, "identity": str(node.owner.folder)},
        "privacy": {"activations": "clear", "ledger": f"sqlite:///{folder / 'privacy.sqlite'}"},
        "provenance": {
            "passphrase_file": str(passphrase_file(node.owner.folder)),
            "log": f"sqlite:///{folder / 'provenance.sqlite'}",
            "anchor": "dev",
            "data_sets": [str(folder / "digits.commitment")],
        },
        "output": {"dir": str(run)},
    }
    file = folder / "job.toml"
    file.write_text(to_toml(Job(**tables)), encoding="utf-8")
    log = ("--log", f"sqlite:///{folder / 'provenance.sqlite'}")
    _command("train", file)
    _command("bundle", run, *log)
    with tempfile.TemporaryDirectory(prefix="cloister-auditor-") as auditor:
        # All that the auditor gets: the bundle, the model and the chain.
        for name in (run / "bundle.zip", run / "model.safetensors", folder / "devchain.sqlite"):
            shutil.copy(name, auditor)
        arguments = ("--model", "model.safetensors", "--rpc", "dev:devchain.sqlite", "--format", "json")
        report: dict[str, Any] = json.loads(_command("verify", "bundle.zip", *arguments, cwd=Path(auditor)))
    return report | {"dataset": made.root}


def _command(*arguments: object, cwd: Path | None = None) -> str:
    called = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-m", "cloister", *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd
    )
    if called.returncode not in (ExitCode.OK, ExitCode.FAILED) or not called.stdout:
        raise ConfigError(f"`cloister {arguments[0]}` failed: {called.stderr.strip()[-500:]}")
    return called.stdout


def _unsplit() -> dict[str, torch.Tensor]:
    """The model that the very same training gives without a split."""
    torch.manual_seed(0)
    model = digits.model()
    cut = cloister.cut(model, front="stem", head="head", example=torch.zeros(64, 1, 8, 8))
    trainer = cloister.UnsplitTrainer(
        cut,
        optimizer=cloister.AdamW(lr=2e-3),
        loss=cloister.Loss("cross_entropy"),
        micro_batches=2,
    )
    trainer.fit(digits.train_loader(), epochs=3)
    return dict(cut.reassemble().state_dict())
