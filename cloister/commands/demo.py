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
from cloister import digits, quickstart
from cloister.exits import ExitCode
from cloister.output import Format, FormatOption, print_record, progress_console
from cloister.progress import ProgressDisplay
from cloister.weights import save_weights

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
    and says what may be claimed for them. Leaves nothing running.
    """
    console = progress_console()
    # Small layers run faster on one thread, and owner and node share this machine.
    torch.set_num_threads(1)
    started = time.perf_counter()
    display = ProgressDisplay()
    with tempfile.TemporaryDirectory(prefix="cloister-demo-") as folder:
        console.print("[bold]1[/] starting a node in its own process, mutual TLS, keys made for this demo only")
        with LocalNode(Path(folder), threads=1) as node:
            console.print(f"  node {node.address}", soft_wrap=True)
            console.print("[bold]2[/] training: images, labels, stem and head stay here; the body is on the node")
            cut, evaluation = quickstart.train(node.address, node.owner, display)
            console.print(
                "[bold]3[/] training on patients' heart beats: one noisy release leaves, and is written down before"
            )
            private, claim = _privately(Path(folder), node)
    console.print("[bold]4[/] training the same model unsplit, to compare")
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


def _privately(folder: Path, node: LocalNode) -> tuple[cloister.Evaluation, cloister.Claim | None]:
    with contextlib.closing(cloister.Ledger(f"sqlite:///{folder / 'privacy.sqlite'}")) as ledger:
        return quickstart.train_privately(node.address, node.owner, ledger, ProgressDisplay())


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
