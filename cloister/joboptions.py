"""The options that all commands on a job share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from cloister.jobfile import load_job
from cloister.jobs import Job

__all__ = ["EncryptedOption", "IdentityOption", "JobArgument", "NodeOption", "SetOption", "WeightsOption", "job_from"]

JobArgument: TypeAlias = Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.")]
SetOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="TABLE.KEY=VALUE", help="Set any key of the job, again and again; wins over the file."
    ),
]
NodeOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The node, as host:port#sha256:… (what `cloister node` prints), or several with commas; sets node.address."
    ),
]
IdentityOption: TypeAlias = Annotated[
    Path | None, typer.Option(help="The owner's identity folder; sets node.identity.")
]
EncryptedOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--encrypted",
        help="Let the node compute on ciphertexts (CKKS), whatever the job's policy says of inference: it sees no "
        "activation, and returns none that you can read without your key, which never leaves. The node multiplies by "
        "the middle's linear, conv1d and conv2d layers; what lies between two of them is computed here, and goes up "
        "encrypted anew. Buys confidentiality, not speed.",
    ),
]
WeightsOption: TypeAlias = Annotated[Path, typer.Option(help="The weights: a safetensors file, such as train wrote.")]


def job_from(file: Path, settings: list[str] | None, **shorthands: object) -> Job:
    """The job of ``file``, with ``--set`` over the environment over it, and the options that stand for a key over all.

    Args:
        file: TOML.
        settings: what each ``--set`` says.
        shorthands: by option (``node``, ``identity``, ``epochs``, ``out``); ``None`` where it was not given.

    Raises:
        ConfigError: see :func:`cloister.jobfile.load_job`.
    """
    keys = {
        "standby": "node.standby",
        "node": "node.address",
        "identity": "node.identity",
        "epochs": "train.epochs",
        "out": "output.dir",
    }
    overrides = []
    for setting in settings or []:
        key, _, text = setting.partition("=")
        overrides.append((f"--set {setting}", key, text))
    for option, value in shorthands.items():
        if value is not None:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            overrides.append((f"--{option} {text}", keys[option], text))
    return load_job(file, overrides)
