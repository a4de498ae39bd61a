"""A training job as data: what ``cloister train``, ``eval`` and ``predict`` are told, checked before anything runs.

Each class is a table of the TOML file; its fields are the keys, with their defaults. Unknown keys are errors. How a
file, the environment and the command line come together stands in :mod:`cloister.jobfile`; every key is explained in
``docs/reference/job-file.md``, which a test holds to these classes.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from client_side.durability import Checkpoints
from client_side.link import RECONNECT_S, NodeAddress, addresses
from client_side.opening import DEFAULT_IDENTITY
from privacy.policy import Policy
from wire.errors import ConfigError, SpecRejectedError
from wire.recipe import SGD, Adam, AdamW, DecayName, Loss, LossName, Optimizer, Schedule

__all__ = ["ENV_PREFIX", "Job"]

ENV_PREFIX: Final = "CLOISTER_"

Made = TypeVar("Made")


def _is_factory(text: str) -> str:
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", text):
        raise ValueError("not the name of a function as module:function")
    return text


#: A function by name, imported from the folder that the command runs in or from what is installed.
Factory = Annotated[str, AfterValidator(_is_factory)]
#: TOML has no paths, only strings. Relative ones are relative to the folder that the command runs in.
JobPath = Annotated[Path, Strict(strict=False)]


class _Table(BaseModel):
    """What all tables have in common: nothing is converted silently, unknown keys are errors, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def _spec(self, kind: type[Made], **values: Any) -> Made:  # noqa: ANN401 - any field of a recipe
        """The recipe ``kind`` with this table's values.

        Raises:
            ConfigError: values that do not go together.
        """
        names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # recipes are dataclasses
        own = {name: value for name, value in dict(self).items() if name in names}
        try:
            return kind(**(own | values))
        except SpecRejectedError as error:
            raise ConfigError(str(error)) from error


class ModelTable(_Table):
    """``[model]``: which model is trained."""

    factory: Factory = Field(examples=["cloister.digits:model"])
    args: dict[str, Any] = {}


class CutTable(_Table):
    """``[cut]``: where it is cut."""

    front: str = Field(examples=["layer1"])
    head: str | None = Field(None, examples=["fc"])
    example: Factory | None = Field(None, examples=["my_model:example"])
    example_batch: int = Field(2, ge=2)


class DataTable(_Table):
    """``[data]``: what it is trained and tested on."""

    train: Factory = Field(examples=["my_data:train_loader"])
    test: Factory | None = Field(None, examples=["my_data:test_loader"])
    args: dict[str, Any] = {}


class TrainTable(_Table):
    """``[train]``: for how long, and how."""

    epochs: int = Field(ge=1, examples=[10])
    micro_batches: int = Field(1, ge=1)
    in_flight: int | None = Field(None, ge=1, examples=[2])
    seed: int = Field(0, ge=0, lt=2**63)
    threads: int | None = Field(None, ge=1, examples=[2])


class ScheduleTable(_Table):
    """``[optimizer.schedule]``: the learning rate's factor by step."""

    decay: DecayName = "constant"
    warmup_steps: int = 0
    total_steps: int = 0
    floor: float = 0.0
    milestones: Annotated[tuple[int, ...], Strict(strict=False)] = ()
    gamma: float = 0.1

    def recipe(self) -> Schedule:
        """As both sides build it."""
        return self._spec(Schedule)


class _OptimizerTable(_Table):
    """What every optimizer takes."""

    kind: ClassVar[type[SGD | Adam | AdamW]]
    name: str
    lr: float = Field(examples=[0.001])
    clip_norm: float = 0.0
    clip_value: float = 0.0
    weight_decay: float = 0.0
    schedule: ScheduleTable = ScheduleTable()

    def recipe(self) -> Optimizer:
        """As both sides build it."""
        return self._spec(self.kind, schedule=self.schedule.recipe())


class SgdTable(_OptimizerTable):
    """``[optimizer]`` with ``name = "sgd"``."""

    kind = SGD
    name: Literal["sgd"]
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


class _AdamFields(_OptimizerTable):
    """What Adam and AdamW take."""

    betas: Annotated[tuple[float, float], Strict(strict=False)] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False


class AdamTable(_AdamFields):
    """``[optimizer]`` with ``name = "adam"``."""

    kind = Adam
    name: Literal["adam"]


class AdamWTable(_AdamFields):
    """``[optimizer]`` with ``name = "adamw"``."""

    kind = AdamW
    name: Literal["adamw"]
    weight_decay: float = 0.01


class LossTable(_Table):
    """``[loss]``: the loss, by name."""

    name: LossName = "cross_entropy"
    label_smoothing: float = 0.0

    def recipe(self) -> Loss:
        """As both sides build it."""
        return self._spec(Loss)


class NodeTable(_Table):
    """``[node]``: who computes the middle (of several, the others take over), and who asks."""

    address: str = Field(min_length=1, examples=["gpu.example.org:7700#sha256:…"])
    standby: bool = False
    pin: str | None = Field(None, examples=["sha256:…"])
    certificate: JobPath | None = Field(None, examples=["node.crt"])
    ca: JobPath | None = Field(None, examples=["ca.crt"])
    identity: JobPath = DEFAULT_IDENTITY
    reconnect_seconds: float = Field(RECONNECT_S, ge=0, le=7 * 24 * 3600)

    def where(self) -> list[NodeAddress]:
        """Each node's address, with the one way in which it is known.

        Raises:
            ConfigError: there is none, or more than one.
        """
        if "," in self.address:
            if self.pin is not None or self.certificate is not None:
                raise ConfigError("node.address names several nodes: write each as host:port#sha256:…, or give one ca")
            if self.ca is None:
                return addresses(self.address)
            return [
                NodeAddress(target=part.strip(), ca=_own(self.ca)) for part in self.address.split(",") if part.strip()
            ]
        return [self._one()]

    def _one(self) -> NodeAddress:
        ways = [way for way in (self.pin, self.certificate, self.ca) if way is not None]
        if "#" in self.address:
            if ways:
                raise ConfigError("node.address carries a pin already: leave out pin, certificate and ca")
            return NodeAddress.parse(self.address)
        if len(ways) != 1:
            raise ConfigError(
                f"node.address = {self.address!r}: say how the node is known, by exactly one of "
                'address = "host:port#sha256:…" as `cloister node` prints it, pin, certificate or ca',
            )
        return NodeAddress(target=self.address, pin=self.pin, certificate=_own(self.certificate), ca=_own(self.ca))


class CheckpointTable(_Table):
    """``[checkpoint]``: what is kept of a run while it trains, so that it can be resumed and moved."""

    every: Annotated[int, Field(ge=1)] = 50
    keep: Annotated[int, Field(ge=1)] = 2
    snapshots: Annotated[str | None, Field(examples=["s3://bucket/path"])] = None
    log_gib: Annotated[float, Field(gt=0)] = 16.0
    on_node: bool = True

    def plan(self, folder: Path) -> Checkpoints:
        """As the trainer takes it."""
        return Checkpoints(
            folder=folder,
            every=self.every,
            keep=self.keep,
            snapshots=self.snapshots,
            log_bytes=int(self.log_gib * 2**30),
            keep_on_node=self.on_node,
        )


class PrivacyTable(_Table):
    """``[privacy]``: what may leave, how it is treated, and what all of it may cost."""

    activations: Any = Field(examples=["moments"])
    labels: Any = None
    gradients: Any = None
    front: Any = None
    head: Any = None
    inference: Any = None
    epsilon: float | None = Field(None, gt=0, examples=[1.0])
    delta: float = Field(1e-5, gt=0, lt=1)
    relation: str = "replace_one"
    unit: str = "record"
    records_per_unit: int = Field(1, ge=1)
    classes: int | None = Field(None, ge=2, examples=[10])
    units: Factory | None = Field(None, examples=["my_data:patients"])
    data_set: str | None = Field(None, examples=["cohort-2024"])
    ledger: str | None = Field(None, examples=["sqlite:////srv/cloister/privacy.sqlite"])
    detect_hijacking: bool = True

    def policy(self) -> Policy:
        """As the guard takes it.

        Raises:
            ConfigError: no such treatment, or numbers that it does not take.
        """
        own = {"units", "data_set", "ledger", "detect_hijacking"}
        return Policy.from_json({k: v for k, v in self.model_dump().items() if v is not None and k not in own})


class ProvenanceTable(_Table):
    """``[provenance]``: who signs what is put on record of the run, and where the log of it is anchored."""

    passphrase_file: Annotated[JobPath | None, Field(examples=["owner.passphrase"])] = None
    log: Annotated[str | None, Field(examples=["sqlite:////srv/cloister/provenance.sqlite"])] = None
    anchor: Annotated[str | None, Field(examples=["dev"])] = None
    registry: Annotated[str | None, Field(examples=["0x5FbDB2315678afecb367f032d93F642f64180aa3"])] = None
    chain_id: Annotated[int | None, Field(ge=1, examples=[1])] = None
    confirmations: Annotated[int, Field(ge=0)] = 12
    wait_seconds: Annotated[float, Field(ge=0)] = 600.0
    data_sets: Annotated[tuple[JobPath, ...], Strict(strict=False)] = ()
    receipts: bool = True

    @property
    def wanted(self) -> bool:
        """Whether anything is put on record."""
        return self.anchor is not None or self.passphrase_file is not None


class OutputTable(_Table):
    """``[output]``: where the results go."""

    dir: JobPath = Field(examples=["runs/first"])


class Job(BaseSettings):
    """A whole job file."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", strict=True, env_prefix=ENV_PREFIX, env_nested_delimiter="__"
    )

    model: ModelTable
    cut: CutTable
    data: DataTable
    train: TrainTable
    optimizer: Annotated[SgdTable | AdamTable | AdamWTable, Field(discriminator="name")]
    loss: LossTable = LossTable()
    node: NodeTable
    privacy: PrivacyTable
    checkpoint: CheckpointTable = CheckpointTable()
    provenance: ProvenanceTable = ProvenanceTable()
    output: OutputTable

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Nothing but what is given: :mod:`cloister.jobfile` reads the environment, so that errors can say so."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    def check(self) -> None:
        """What no single key can tell.

        Raises:
            ConfigError: keys that do not go together.
        """
        self.optimizer.recipe()
        self.loss.recipe()
        self.privacy.policy()
        if self.node.standby and len(self.node.where()) == 1:
            raise ConfigError("node.standby = true: name a second node in node.address, after a comma")
        self.node.where()
        if self.train.in_flight is not None and self.train.in_flight > self.train.micro_batches:
            raise ConfigError(
                f"train.in_flight = {self.train.in_flight} of {self.train.micro_batches} micro-batches: write "
                f"micro_batches = {self.train.in_flight} or more, or leave in_flight out (then all of them fly)",
            )


def _own(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()
