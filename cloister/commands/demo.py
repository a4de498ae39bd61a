"""``cloister demo``: real models through a real node on this machine: one proven exact, and one proven private."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.panel import Panel

import cloister
from client_side.spawn import LocalNode
from cloister import digits, heartbeats, quickstart
from cloister.exits import ExitCode
from cloister.output import Format, FormatOption, print_record, progress_console
from cloister.progress import ProgressDisplay
from cloister.weights import save_weights

__all__ = ["app"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True)
class _Proven:
    """What the demo found.

    Attributes:
        test_accuracy: of the digits.
        test_loss: the mean over them.
        seconds: all of it.
        bytes_up: of the digits' tensors.
        bytes_down: the same.
        tensors_compared: parameters and buffers.
        equal_to_the_bit: whether split and unsplit training gave the same.
        model: the digits' file.
        model_sha256: of the file.
        private_accuracy: of the heart beats, on patients who are in no training.
        accuracy_without_privacy: of the same model, trained on the same beats for as long, at home and without noise.
        accuracy_of_guessing: of saying the commonest class each time.
        epsilon: spent on the heart beats, per patient.
        delta: that goes with it.
        claim: what may be said of them.
    """

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
    accuracy_without_privacy: float
    accuracy_of_guessing: float
    epsilon: float | None
    delta: float | None
    claim: str | None


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
    and says what may be claimed for them, and how accurate the same model is without privacy. What left is written into
    a ledger that goes with the demo: your own learns nothing of it. Leaves nothing running.
    """
    console = progress_console()
    # Small layers run faster on one thread, and owner and node share this machine.
    torch.set_num_threads(1)
    started = time.perf_counter()
    display = ProgressDisplay()
    with (
        tempfile.TemporaryDirectory(prefix="cloister-demo-") as folder,
        contextlib.closing(cloister.Ledger(f"sqlite:///{folder}/privacy.sqlite")) as ledger,
    ):
        console.print("[bold]1[/] starting a node in its own process, mutual TLS, keys made for this demo only")
        with LocalNode(Path(folder), threads=1) as node:
            console.print(f"  node {node.address}", soft_wrap=True)
            console.print("[bold]2[/] training: images, labels, stem and head stay here; the body is on the node")
            cut, evaluation = quickstart.train(node.address, node.owner, ledger, display)
            console.print(
                "[bold]3[/] training on patients' heart beats: one noisy release leaves, and is written down before"
            )
            private, claim = quickstart.train_privately(node.address, node.owner, ledger, ProgressDisplay())
    console.print("[bold]4[/] training both models unsplit at home, to compare")
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
            accuracy_without_privacy=round(_without_privacy(), 4),
            accuracy_of_guessing=round(_guessing(), 4),
            epsilon=None if claim is None else round(claim.spent.epsilon, 4),
            delta=None if claim is None else claim.spent.delta,
            claim=None if claim is None else claim.sentence,
        ),
        fmt,
        leave_out=["claim"],
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
    if claim is not None and fmt is Format.TABLE:  # JSON has it among the result
        console.print(Panel.fit("\n".join(claim.lines()), title="the heart beats: what may be claimed"))


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


def _without_privacy() -> float:
    """The accuracy of the private example's model where nothing is noised: trained at home, on the beats themselves."""
    torch.manual_seed(0)
    model = heartbeats.model(front="pca")
    cut = cloister.cut(model, front="stem", example=torch.zeros(64, 1, 128))
    trainer = cloister.UnsplitTrainer(cut, optimizer=cloister.AdamW(lr=2e-3), loss=cloister.Loss("cross_entropy"))
    trainer.fit(heartbeats.train_loader(count=2048, most=24), epochs=2)
    whole, right, rows = cut.reassemble().eval(), 0, 0
    with torch.no_grad():
        for beats, labels in heartbeats.test_loader(count=2048, most=24):
            right += int((whole(beats).argmax(1) == labels).sum())
            rows += len(labels)
    return right / rows


def _guessing() -> float:
    labels = torch.cat([labels for _, labels in heartbeats.test_loader(count=2048, most=24)])
    return int(labels.bincount().max()) / len(labels)
