"""What a job names, made: the model, its data, the cut, the trainer; and the node, asked whether it is there."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from client_side.callbacks import Callback
from client_side.cutting import Cut, cut
from client_side.durability import Checkpoints
from client_side.link import Link, NodeAddress
from client_side.trainer import Loader, Trainer
from cloister.factories import load_factory
from cloister.jobs import Job
from privacy.ledger import Ledger
from privacy.policy import Never
from wire.errors import CloisterError, ConfigError
from wire.identity import Identity, load_identity

__all__ = [
    "at_home",
    "call_factory",
    "cut_model",
    "first_inputs",
    "greet_node",
    "make_loader",
    "make_model",
    "new_trainer",
    "owner_of",
]


_log = logging.getLogger(__name__)


def owner_of(job: Job) -> Identity:
    """The identity that ``node.identity`` names.

    Raises:
        IdentityError: see :func:`wire.identity.load_identity`.
    """
    return load_identity(job.node.identity.expanduser())


def at_home(job: Job) -> bool:
    """Whether evaluation and prediction need no node."""
    return isinstance(job.privacy.policy().inference, Never)


def greet_node(job: Job, identity: Identity) -> str:
    """Asks the node what it is, before anything costly is made: a wrong address or pin shows at once.

    Of several nodes, the first that answers.

    Raises:
        CloisterError: the node cannot be reached, or does not let this owner in; of several, the last one.
    """
    *others, final = job.node.where()
    for node in others:
        try:
            return _greeted(node, identity)
        except CloisterError as error:
            _log.warning("%s: %s", node.target, error)
    return _greeted(final, identity)


def _greeted(node: NodeAddress, identity: Identity) -> str:
    link = Link(node, identity, reconnect_s=0)
    try:
        told = link.describe()
    finally:
        link.close(end_session=False)
    return f"node {node.target}: cloister {told.version}, torch {told.torch_version}, {told.device}"


def make_model(job: Job) -> nn.Module:
    """The model, its initial weights drawn from ``train.seed``.

    Raises:
        ConfigError: the factory cannot be had, fails, or makes something else.
    """
    if job.train.threads is not None:
        torch.set_num_threads(job.train.threads)
    model = call_factory(job, "model.factory", job.model.factory, **job.model.args)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.factory {job.model.factory} returned a {_name(model)}; it must return an nn.Module")
    return model


def make_loader(job: Job, key: str) -> Loader:
    """The loader that ``data.train`` or ``data.test`` names, made anew.

    Raises:
        ConfigError: the factory cannot be had, fails, or makes something else.
    """
    name = job.data.train if key == "train" else job.data.test
    if name is None:
        raise ConfigError('data.test is missing; write test = "my_data:test_loader" under [data]')
    loader = call_factory(job, f"data.{key}", name, **job.data.args)
    if not hasattr(loader, "__iter__"):
        raise ConfigError(f"data.{key} {name} returned a {_name(loader)}; it must return a DataLoader or the like")
    made: Loader = loader
    return made


def first_inputs(job: Job, key: str) -> tuple[torch.Tensor, ...]:
    """What the model is cut with: inputs of ``cut.example_batch`` rows.

    They come from ``cut.example``, else from the first batch of a loader that is then thrown away: the run's own loader
    must start where it would have started without.

    Raises:
        ConfigError: the factory fails, or what it makes is no batch.
    """
    rows = job.cut.example_batch
    if job.cut.example is not None:
        made = call_factory(job, "cut.example", job.cut.example, rows)
        return _tensors(made, f"cut.example {job.cut.example} returned", "a tensor, or a tuple of tensors")
    batch = next(iter(make_loader(job, key)), None)
    if batch is None:
        raise ConfigError(f"data.{key} is empty")
    wanted = "a batch is (inputs…, labels), all of them tensors"
    *inputs, _ = _tensors(batch, f"data.{key} yields", wanted)
    if not inputs:
        raise ConfigError(f"data.{key} yields one tensor a batch; {wanted}")
    if len(inputs[0]) < rows:
        raise ConfigError(
            f"the first batch of data.{key} has {len(inputs[0])} rows, and cut.example_batch wants {rows}: use larger "
            "batches, or name a cut.example",
        )
    return tuple(tensor[:rows] for tensor in inputs)


def cut_model(job: Job, model: nn.Module, example: Sequence[torch.Tensor]) -> Cut:
    """The model, cut as ``[cut]`` says.

    Raises:
        CutError: the model cannot be cut so.
        ConfigError: the front does not take what the example holds.
    """
    try:
        return cut(model, front=job.cut.front, head=job.cut.head, example=tuple(example))
    except CloisterError:
        raise
    except Exception as error:  # the model's own forward may raise anything
        shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in example)
        raise ConfigError(
            f"the model does not take inputs of {shapes} ({_name(error)}: {str(error).splitlines()[0][:200]}); rows "
            "come first in every tensor",
        ) from error


def new_trainer(
    job: Job, made: Cut, identity: Identity, callbacks: Sequence[Callback], checkpoints: Checkpoints | None = None
) -> Trainer:
    """The trainer that the job describes; with ``checkpoints``, on all of its nodes."""
    return Trainer(
        made,
        node=job.node.where() if checkpoints is not None else job.node.where()[:1],
        optimizer=job.optimizer.recipe(),
        loss=job.loss.recipe(),
        micro_batches=job.train.micro_batches,
        in_flight=job.train.in_flight,
        identity=identity,
        seed=job.train.seed,
        callbacks=callbacks,
        reconnect_s=job.node.reconnect_seconds,
        checkpoints=checkpoints,
        policy=job.privacy.policy(),
        ledger=None if job.privacy.ledger is None else Ledger(job.privacy.ledger),
        data_set=job.privacy.data_set,
        units=units_of(job),
        detect_hijacking=job.privacy.detect_hijacking,
        standby=checkpoints is not None and job.node.standby,
        receipts=job.provenance.receipts,
    )


def units_of(job: Job) -> torch.Tensor | None:
    """Whose each record is; ``None`` where the job does not say.

    Raises:
        ConfigError: the factory fails, or returns something else than one integer for each record.
    """
    if job.privacy.units is None:
        return None
    made = call_factory(job, "privacy.units", job.privacy.units, **job.data.args)
    units = torch.as_tensor(made)
    if units.ndim != 1 or units.is_floating_point():
        raise ConfigError(
            f"privacy.units {job.privacy.units} returned {tuple(units.shape)}; one integer for each record"
        )
    return units


def call_factory(job: Job, key: str, name: str, /, *args: object, **kwargs: Any) -> Any:  # noqa: ANN401 - a user's function
    """Calls a user's factory with torch's generator at ``train.seed``, so that the same job makes the same things."""
    function = load_factory(name)
    torch.manual_seed(job.train.seed)
    try:
        return function(*args, **kwargs)
    except CloisterError:
        raise
    except Exception as error:  # a user's function may raise anything
        given = ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())])
        raise ConfigError(
            f"{key}: {name}({given}) failed: {_name(error)}: {error} (CLOISTER_DEBUG=1 shows where)",
        ) from error


def _tensors(made: object, what: str, wanted: str) -> tuple[torch.Tensor, ...]:
    tensors = tuple(made) if isinstance(made, list | tuple) else (made,)
    odd = next((item for item in tensors if not isinstance(item, torch.Tensor)), None)
    if odd is not None or not tensors:
        raise ConfigError(f"{what} {_name(made if odd is made else odd)}; {wanted}")
    return tuple(item for item in tensors if isinstance(item, torch.Tensor))


def _name(value: object) -> str:
    return type(value).__name__
