"""The feature-space hijacking attack as a real node (THREATS T12), and the owner's alarm against it, in numbers.

``python -m tests.fsha --seeds 20`` trains through a node that is Cloister's own in everything but its input gradients:
those are the attack's (Pasquini, Ateniese and Bernaschi 2021, section 3). A *pilot* network maps public data to the
shape of the smashed data, a *decoder* inverts it, a *critic* tells the pilot's activations from the owner's, and the
owner's front receives the gradient that makes its activations look like the pilot's: then the decoder inverts them too.
``--honest`` trains through honest nodes instead. Both print a table. The owner is a :class:`cloister.Trainer` as
anybody makes it: the alarm is its own, on by default.

The node is a process of its own, over gRPC and mutual TLS; its public data is the part of the data set that owners do
not train on.

Shapes: ``B`` rows; smashed data ``[B, ...]``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import cloister
from cloister import digits, heartbeats
from cloister import main as cli
from examples import models
from server_side import keeper
from server_side.session import Session
from wire.errors import HijackSuspectedError
from wire.identity import Identity, create_identity

__all__ = ["EXAMPLES", "Attack", "Hijacker", "HijackingNode", "Setting", "Verdict", "train"]

_RATE: Final = 1e-3  # of the attacker's own networks
_PENALTY: Final = 10.0  # on the critic's slope (Gulrajani et al. 2017)


@dataclass(frozen=True, slots=True)
class Attack:
    """How a node attacks.

    Attributes:
        critic: ``wasserstein`` with a gradient penalty, as the paper's code has it, or ``bce``, a plain discriminator.
        mix: the attack's share of each row's gradient, whose length is that of the honest one.
        first_step: until then the node is honest.
    """

    critic: Literal["wasserstein", "bce"] = "wasserstein"
    mix: float = 1.0
    first_step: int = 0


class Hijacker:
    """The attacker's networks, which learn from every batch of smashed data."""

    def __init__(self, attack: Attack, public: Tensor, smashed: Sequence[int], seed: int = 0) -> None:
        """Makes them for smashed data of shape ``[B, *smashed]`` and public data ``public`` [P, ...]."""
        self._attack, self._public, self._steps = attack, public, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inside, outside = math.prod(smashed), math.prod(public.shape[1:])
            self._pilot, self._decoder = _pilot(public.shape[1:], smashed), _network(inside, outside, public.shape[1:])
            self._critic = _network(inside, 1, (1,))
        self._generator = torch.Generator().manual_seed(seed)
        mapping = [*self._pilot.parameters(), *self._decoder.parameters()]
        self._optimizers = torch.optim.Adam(mapping, _RATE), torch.optim.Adam(self._critic.parameters(), _RATE)

    def gradients(self, smashed: Tensor, honest: Tensor) -> Tensor:
        """What the owner gets in place of ``honest``, both [B, ...]; the networks learn one step."""
        self._steps += 1
        if self._steps <= self._attack.first_step:
            return honest
        fooled = smashed.detach().clone().requires_grad_()
        (steering,) = torch.autograd.grad(self._fooled(self._critic(fooled)), fooled)
        self._learn(smashed.detach())
        lengths = _lengths(honest) / _lengths(steering).clamp_min(1e-30)
        mixed: Tensor = (1 - self._attack.mix) * honest + self._attack.mix * lengths * steering
        return mixed

    def reconstruct(self, smashed: Tensor) -> Tensor:
        """What the attacker sees [B, ...]."""
        with torch.no_grad():
            made: Tensor = self._decoder(smashed)
        return made

    def _fooled(self, scores: Tensor) -> Tensor:
        return -scores.mean() if self._attack.critic == "wasserstein" else functional.softplus(-scores).mean()

    def _learn(self, smashed: Tensor) -> None:
        rows = torch.randint(len(self._public), (len(smashed),), generator=self._generator)
        public = self._public[rows]
        mapped = self._pilot(public)
        _move(self._optimizers[0], functional.mse_loss(self._decoder(mapped), public))
        mapped = mapped.detach()
        real, fake = self._critic(mapped), self._critic(smashed)
        if self._attack.critic == "bce":
            loss = functional.softplus(-real).mean() + functional.softplus(fake).mean()
        else:
            loss = fake.mean() - real.mean() + _PENALTY * self._steepness(mapped, smashed)
        _move(self._optimizers[1], loss)

    def _steepness(self, mapped: Tensor, smashed: Tensor) -> Tensor:
        share = torch.rand(len(mapped), *[1] * (mapped.ndim - 1), generator=self._generator)
        between = (share * mapped + (1 - share) * smashed).requires_grad_()
        (slope,) = torch.autograd.grad(self._critic(between).sum(), between, create_graph=True)
        steepness: Tensor = (_lengths(slope) - 1).square().mean()
        return steepness


def _network(inside: int, outside: int, shape: Sequence[int]) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inside, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, outside),
        nn.Unflatten(1, tuple(shape)),
    )


def _pilot(public: Sequence[int], smashed: Sequence[int]) -> nn.Module:
    return nn.Sequential(_network(math.prod(public), math.prod(smashed), smashed), nn.ReLU())


def _lengths(rows: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
    return lengths.view(-1, *[1] * (rows.ndim - 1))


def _move(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@dataclass(frozen=True, slots=True)
class Example:
    """A model, where it is cut, the owner's data and the attacker's."""

    model: Callable[[], nn.Module]
    front: str
    head: str
    data: Callable[[Literal["train", "test"]], TensorDataset]


def _digits(split: Literal["train", "test"]) -> TensorDataset:
    return digits.load(split)


def _tokens(split: Literal["train", "test"]) -> TensorDataset:
    images, labels = digits.load(split).tensors
    return TensorDataset(images[:, 0], labels)


def _large(split: Literal["train", "test"]) -> TensorDataset:
    images, labels = digits.load(split).tensors
    return TensorDataset(functional.interpolate(images, size=(28, 28)), labels)


def _flat(split: Literal["train", "test"]) -> TensorDataset:
    images, labels = _large(split).tensors
    return TensorDataset(images.flatten(1), labels)


def _beats(split: Literal["train", "test"]) -> TensorDataset:
    return heartbeats.load(split, 24)


EXAMPLES: Final = {
    "digits": Example(digits.model, "stem", "head", _digits),
    "resnet": Example(partial(models.small_resnet, dropout=0.1), "relu", "fc", _digits),
    "ecg": Example(models.ecg_cnn, "stem", "head", _beats),
    "transformer": Example(partial(models.transformer, tokens=8, features=8), "embed", "fc", _tokens),
    "lstm": Example(partial(models.lstm, classes=10), "embed", "fc", _tokens),
    "mlp": Example(models.mlp, "relu1", "fc3", _flat),
    "small cnn": Example(models.small_cnn, "stem", "head", _large),
}


class _HijackingSession(Session):
    """A session that is honest but for the input gradients; ``attack`` and ``public`` are set before it is made."""

    attack: ClassVar[Attack]
    public: ClassVar[Tensor]
    _hijacker: Hijacker | None = None

    def _input_gradients(self, pending: Any) -> list[Tensor | None]:
        honest, *others = super()._input_gradients(pending)
        if honest is None:
            return [None, *others]
        smashed = pending.inputs[0].detach()
        if self._hijacker is None:
            seed = int.from_bytes(self.session_id[:4], "little")
            self._hijacker = Hijacker(self.attack, self.public, smashed.shape[1:], seed)
        return [self._hijacker.gradients(smashed, honest), *others]


def _serve(example: str, attack: Attack, arguments: Sequence[str]) -> None:
    """``cloister node`` with another kind of session."""
    _HijackingSession.attack = attack
    _HijackingSession.public = EXAMPLES[example].data("test").tensors[0]
    with mock.patch.object(keeper, "Session", _HijackingSession):
        cli.app(["node", *arguments])


class HijackingNode:
    """The attack as a process; ``attack=None`` is an honest node."""

    def __init__(self, folder: Path, example: str, attack: Attack | None) -> None:
        self.owner = _identity(folder / "owner", "owner")
        _identity(folder / "node", "node")
        (folder / "trusted").mkdir()
        (folder / "trusted" / "owner.crt").write_bytes(self.owner.certificate_pem)
        options = {"identity": "node", "trust": "trusted", "listen": "localhost:0", "state-dir": "state"}
        told = [text for name, value in options.items() for text in (f"--{name}", value)]
        told += ["--format", "json", "--drain-seconds", "0", "--threads", "1"]
        program = (
            ["cloister", "node"] if attack is None else ["tests.fsha", "serve", example, json.dumps(asdict(attack))]
        )
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.folder, self._log = folder, folder / "node.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *program, *told],
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
        self.address = self._ready()

    def _ready(self) -> str:
        said = ""
        for line in self._process.stdout or ():
            said += line.decode()
            with suppress(json.JSONDecodeError):
                return str(json.loads(said)["address"])
        raise AssertionError(f"the node did not start: {said}{self._log.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.terminate()
        self._process.communicate(timeout=30)


def _identity(folder: Path, role: Literal["owner", "node"]) -> Identity:
    return create_identity(folder, role=role, passphrase="hijack", kdf_cost=2)


@dataclass(frozen=True, slots=True)
class Setting:
    """How an owner trains."""

    vanilla: bool = False
    optimizer: cloister.Optimizer = field(default_factory=lambda: cloister.AdamW(lr=1e-3))
    batch: int = 64
    micro_batches: int = 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run ended.

    Attributes:
        alarm: the step (from 0) at which the alarm sounded, if it did.
        highest: score of the alarm over all steps.
        evidence: what the owner kept.
    """

    alarm: int | None
    highest: float
    evidence: Path | None = None


def train(
    node: HijackingNode, name: str, seed: int, *, last_step: int = 100, setting: Setting | None = None
) -> Verdict:
    """A run of the owner's through ``node``, until the alarm or the end."""
    example, setting = EXAMPLES[name], setting or Setting()
    torch.manual_seed(seed)
    whole, data = example.model(), example.data("train")
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, setting.batch, shuffle=True, drop_last=True, generator=order)
    head = None if setting.vanilla else example.head
    cut = cloister.cut(whole, front=example.front, head=head, example=data.tensors[0][: setting.batch])
    watch = _Watch(last_step)
    with (
        mock.patch.object(tempfile, "tempdir", str(node.folder)),  # the evidence goes there
        cloister.Trainer(
            cut,
            node=node.address,
            policy=cloister.CLEAR,
            identity=node.owner,
            optimizer=setting.optimizer,
            micro_batches=setting.micro_batches,
            seed=seed,
            callbacks=[watch],
        ) as owner,
    ):
        watch.owner = owner
        try:
            owner.fit(loader, epochs=1 + last_step // len(loader))
        except HijackSuspectedError as error:
            told = re.search(r"the evidence is in (\S+)", str(error))
            return Verdict(owner.state.global_step, _score(owner), Path(told[1]) if told else None)
    return Verdict(None, watch.highest)


class _Watch(cloister.Callback):
    """Stops after a step, and remembers how near the alarm came."""

    owner: cloister.Trainer

    def __init__(self, after: int) -> None:
        self._after, self.highest = after, 0.0

    def on_step_end(self, state: cloister.TrainState, control: cloister.Control, end: cloister.StepEnd) -> None:  # noqa: ARG002
        self.highest = max(self.highest, _score(self.owner))
        control.should_training_stop = end.step >= self._after


def _score(owner: cloister.Trainer) -> float:
    assert owner._hijack is not None, "the alarm is on where the front learns"
    return owner._hijack._score


#: What varies with the seed, in turn.
_SETTINGS: Final = (
    Setting(),
    Setting(optimizer=cloister.SGD(lr=0.02, momentum=0.9)),
    Setting(vanilla=True, batch=32),
    Setting(vanilla=True, optimizer=cloister.SGD(lr=0.05, momentum=0.9), micro_batches=4),
    Setting(batch=128, micro_batches=2),
)


def _table(names: Sequence[str], seeds: range, attack: Attack | None, last_step: int, log: Path | None) -> bool:
    """Prints a line an example; whether all runs went as they should."""
    _print(f"{'example':12} {'runs':>4} {'alarms':>6} {'first':>6} {'median':>6} {'last':>6} {'highest score':>13}")
    fine = True
    for name in names:
        with tempfile.TemporaryDirectory() as folder, HijackingNode(Path(folder), name, attack) as node:
            verdicts = [_logged(log, node, name, seed, last_step) for seed in seeds]
        alarms = sorted(verdict.alarm for verdict in verdicts if verdict.alarm is not None)
        when = [f"{step:6g}" for step in (alarms[0], median(alarms), alarms[-1])] if alarms else ["     -"] * 3
        highest = max(verdict.highest for verdict in verdicts)
        _print(f"{name:12} {len(seeds):4} {len(alarms):6} {' '.join(when)} {highest:13.3f}")
        fine &= not alarms if attack is None else len(alarms) >= 0.95 * len(seeds)
    return fine


def _logged(log: Path | None, node: HijackingNode, name: str, seed: int, last_step: int) -> Verdict:
    """One run, in the setting that its seed has the turn of; a line of JSON is added to ``log``."""
    number = seed % len(_SETTINGS)
    verdict = train(node, name, seed, last_step=last_step, setting=_SETTINGS[number])
    if log is not None:
        kept = verdict.evidence is not None and verdict.evidence.stat().st_size
        line = {"example": name, "seed": seed, "setting": number, "alarm": verdict.alarm, "highest": verdict.highest}
        with log.open("a") as file:
            file.write(json.dumps(line | {"evidence_bytes": kept}) + "\n")
    return verdict


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command's output


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fsha", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--honest", action="store_true", help="through honest nodes: no alarm is the right answer")
    parser.add_argument("--example", choices=sorted(EXAMPLES), action="append", help="again and again; all unless said")
    parser.add_argument("--critic", choices=("wasserstein", "bce"), default="wasserstein")
    parser.add_argument("--mix", type=float, default=1.0, help="the attack's share of each gradient")
    parser.add_argument("--begin", type=int, default=0, help="the step before which the node is honest")
    parser.add_argument("--log", type=Path, help="a file, to which a line of JSON is added after each run")
    wishes = parser.parse_args()
    attack = None if wishes.honest else Attack(wishes.critic, wishes.mix, wishes.begin)
    seeds = range(wishes.first_seed, wishes.first_seed + wishes.seeds)
    torch.set_num_threads(1)
    return 0 if _table(wishes.example or list(EXAMPLES), seeds, attack, wishes.steps, wishes.log) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        _serve(sys.argv[2], Attack(**json.loads(sys.argv[3])), sys.argv[4:])
    else:
        sys.exit(_main())
