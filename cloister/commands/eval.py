"""``cloister eval``: evaluate a trained model through a node."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import typer

from cloister.assembly import (
    at_home,
    cut_model,
    first_inputs,
    greet_node,
    inference_policy,
    make_loader,
    make_model,
    new_trainer,
    owner_of,
)
from cloister.joboptions import (
    EncryptedOption,
    IdentityOption,
    JobArgument,
    NodeOption,
    SetOption,
    WeightsOption,
    job_from,
)
from cloister.output import HEADING, Format, FormatOption, print_record
from cloister.progress import ProgressDisplay
from cloister.runs import remarks
from cloister.weights import load_weights

__all__ = ["EvalResult", "app"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """What an evaluation came to.

    Attributes:
        loss: the mean over ``data.test``; nothing where it is no number.
        accuracy: 0 to 1, where labels are classes.
        labels: how many there were.
        seconds: all of it, but for making model and data.
        bytes_up: of tensors.
        bytes_down: of tensors.
        weights: the file.
        weights_sha256: of the file.
        program_sha256: the middle's architecture.
        encryption: the scheme, its ring's degree and its modulus; nothing where all left in the clear, or nothing left.
        security_bits: of the encryption, by the HomomorphicEncryption.org standard.
        encrypted_layers: how many of the middle's layers the node evaluated on ciphertexts.
    """

    loss: float | None = field(metadata={HEADING: "test loss"})
    accuracy: float | None
    labels: int
    seconds: float
    bytes_up: int
    bytes_down: int
    weights: Path
    weights_sha256: str
    program_sha256: str
    encryption: str | None
    security_bits: int | None
    encrypted_layers: int | None


@app.command("eval")
def evaluate(
    job_file: JobArgument,
    *,
    weights: WeightsOption,
    encrypted: EncryptedOption = False,
    settings: SetOption = None,
    node: NodeOption = None,
    identity: IdentityOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Evaluate a trained model on a job's test data through a node.

    Inputs, labels, front and head stay here, as in training; the node gets the middle of these weights. Where the job's
    policy keeps inference at home, no node is asked.

    Example: [bold]cloister eval examples/digits.toml --weights runs/digits/model.safetensors[/]
    """
    job = job_from(job_file, settings, node=node, identity=identity)
    loader = make_loader(job, "test")
    owner = owner_of(job)
    display = ProgressDisplay()
    with remarks(display):
        policy = inference_policy(job, encrypted=encrypted)
        display.say("at home: nothing leaves" if at_home(policy) else greet_node(job, owner))
        model = make_model(job)
        digest = load_weights(model, weights)
        made = cut_model(job, model, first_inputs(job, "test"))
        began = time.perf_counter()
        with new_trainer(job, made, owner, [], policy=policy) as trainer:
            found = trainer.evaluate(loader)
            traffic, used = trainer.traffic, trainer.inference_encryption
    print_record(
        EvalResult(
            loss=round(found.loss, 6) if math.isfinite(found.loss) else None,
            accuracy=None if found.accuracy is None else round(found.accuracy, 6),
            labels=found.rows,
            seconds=round(time.perf_counter() - began, 3),
            bytes_up=traffic.up,
            bytes_down=traffic.down,
            weights=weights,
            weights_sha256=digest,
            program_sha256=made.program.digest.hex(),
            encryption=None if used is None else str(used),
            security_bits=None if used is None else used.security_bits,
            encrypted_layers=None if used is None else used.layers,
        ),
        fmt,
    )
