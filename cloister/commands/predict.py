"""``cloister predict``: predict with a trained model through a node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

from client_side.cutting import Cut
from cloister.arrays import load_arrays, save_array
from cloister.assembly import (
    at_home,
    call_factory,
    cut_model,
    greet_node,
    inference_policy,
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
from cloister.jobs import Job
from cloister.output import Format, FormatOption, print_record
from cloister.progress import ProgressDisplay
from cloister.runs import remarks
from cloister.weights import load_weights
from wire.errors import ConfigError, CutError

__all__ = ["PredictResult", "app"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictResult:
    """What was predicted.

    Attributes:
        rows: how many.
        shape: of the whole output.
        dtype: of the output, as NumPy calls it.
        seconds: all of it, but for making the model.
        bytes_up: of tensors.
        bytes_down: of tensors.
        out: the file.
        weights_sha256: of the weights' file.
        program_sha256: the middle's architecture.
        encryption: the scheme, its ring's degree and its modulus; nothing where all left in the clear, or nothing left.
        security_bits: of the encryption, by the HomomorphicEncryption.org standard.
        encrypted_layers: how many of the middle's layers the node evaluated on ciphertexts.
    """

    rows: int
    shape: tuple[int, ...]
    dtype: str
    seconds: float
    bytes_up: int
    bytes_down: int
    out: Path
    weights_sha256: str
    program_sha256: str
    encryption: str | None
    security_bits: int | None
    encrypted_layers: int | None


@app.command()
def predict(
    job_file: JobArgument,
    *,
    weights: WeightsOption,
    inputs: Annotated[
        str,
        typer.Option("--input", metavar="FILE", help="An .npy or .npz file with rows first, or module:function."),
    ],
    out: Annotated[Path, typer.Option(help="Where the model's outputs go: an .npy file.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows that go to the node at a time.")] = 256,
    encrypted: EncryptedOption = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file that is there.")] = False,
    settings: SetOption = None,
    node: NodeOption = None,
    identity: IdentityOption = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Predict with a trained model through a node: the outputs of the whole model, row by row.

    Of an .npz file each array is one of the model's inputs, in the file's order. Inputs, outputs, front and head stay
    here.

    Example: [bold]cloister predict job.toml --weights model.safetensors --input x.npy --out y.npy[/]

    With [bold]--encrypted[/] the node gets ciphertexts in place of activations, and the result says by which scheme.
    """
    job = job_from(job_file, settings, node=node, identity=identity)
    if out.suffix != ".npy":
        raise ConfigError(f"--out {out}: outputs are written as .npy; write --out {out.with_suffix('.npy')}")
    if out.exists() and not force:
        raise ConfigError(f"{out} is there already: give another --out, or --force")
    owner = owner_of(job)
    rows = _inputs(job, inputs)
    display = ProgressDisplay()
    with remarks(display):
        policy = inference_policy(job, encrypted=encrypted)
        display.say("at home: nothing leaves" if at_home(policy) else greet_node(job, owner))
        model = make_model(job)
        digest = load_weights(model, weights)
        _refuse_other_floats(model, rows, inputs)
        made = _cut(job, model, rows, inputs)
        began = time.perf_counter()
        with new_trainer(job, made, owner, [], policy=policy) as trainer:
            outputs = torch.cat(list(display.counted(trainer.predictions(_batches(rows, batch)), of=len(rows[0]))))
            traffic, used = trainer.traffic, trainer.inference_encryption
    save_array(out, outputs)
    print_record(
        PredictResult(
            rows=len(outputs),
            shape=tuple(outputs.shape),
            dtype=str(np.load(out, mmap_mode="r", allow_pickle=False).dtype),
            seconds=round(time.perf_counter() - began, 3),
            bytes_up=traffic.up,
            bytes_down=traffic.down,
            out=out,
            weights_sha256=digest,
            program_sha256=made.program.digest.hex(),
            encryption=None if used is None else str(used),
            security_bits=None if used is None else used.security_bits,
            encrypted_layers=None if used is None else used.layers,
        ),
        fmt,
    )


def _inputs(job: Job, source: str) -> tuple[torch.Tensor, ...]:
    if source.endswith((".npy", ".npz")):
        return load_arrays(Path(source))
    if ":" not in source:
        raise ConfigError(f"--input {source}: give an .npy or .npz file, or module:function")
    made = call_factory(job, "--input", source)
    tensors = tuple(made) if isinstance(made, list | tuple) else (made,)
    if not tensors or not all(isinstance(t, torch.Tensor) and t.ndim and len(t) for t in tensors):
        raise ConfigError(f"--input {source} returned no tensor with rows; it must return a tensor, or a tuple of them")
    if len({len(t) for t in tensors}) != 1:
        raise ConfigError(f"--input {source} returned tensors that differ in rows: rows come first in every tensor")
    return tensors


def _refuse_other_floats(model: nn.Module, inputs: tuple[torch.Tensor, ...], source: str) -> None:
    """NumPy's float64 is what people have by accident; torch's own message would not say what to do."""
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for tensor in inputs:
        if wanted is not None and tensor.is_floating_point() and tensor.dtype != wanted:
            name = str(wanted).removeprefix("torch.")
            raise ConfigError(
                f"--input {source} holds {str(tensor.dtype).removeprefix('torch.')}, and the model computes in {name}: "
                f"save it with x.astype(numpy.{name})",
            )


def _cut(job: Job, model: nn.Module, inputs: tuple[torch.Tensor, ...], source: str) -> Cut:
    try:
        # A program is captured from two rows at least; what they hold does not matter.
        return cut_model(job, model, [torch.cat([x[:2]] * 2)[:2] for x in inputs])
    except CutError as error:
        shapes = ", ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in inputs)
        raise CutError(f"{error}; --input {source} holds {shapes}") from error


def _batches(inputs: tuple[torch.Tensor, ...], rows: int) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(x, rows) for x in inputs), strict=True)
