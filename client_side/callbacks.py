"""What a training run tells while it runs, under the names that Hugging Face's ``TrainerCallback`` made common."""

from __future__ import annotations

from dataclasses import dataclass, field

from client_side.link import Traffic
from privacy.accounting import PrivacySpent

__all__ = ["Callback", "Control", "EpochEnd", "Evaluation", "StepEnd", "TrainState"]


@dataclass(slots=True)
class TrainState:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        batch: batches of the next epoch that are done; more than 0 within one, and where a run resumes within one.
        epochs: epochs asked for so far.
        global_step: steps finished.
        steps_per_epoch: where the loader tells.
        log_history: one entry an epoch: ``epoch``, ``step``, ``loss``.
        spent: on the data set, by all runs; ``None`` where nothing is accounted.
    """

    epoch: int = 0
    epochs: int = 0
    global_step: int = 0
    steps_per_epoch: int | None = None
    batch: int = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    spent: PrivacySpent | None = None


@dataclass(slots=True)
class Control:
    """What a callback may ask for: set ``should_training_stop`` to end after the step at hand."""

    should_training_stop: bool = False


@dataclass(frozen=True, slots=True)
class StepEnd:
    """One finished step: its number (from 1), mean loss, rows, seconds, all traffic so far, and the node's seconds.

    ``node_s`` is how long the node computed for this step, as the node says.
    """

    step: int
    loss: float
    rows: int
    seconds: float
    traffic: Traffic
    node_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """One finished epoch: its number (from 1), mean loss, rows, seconds."""

    epoch: int
    loss: float
    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation measured over ``rows`` labels; ``accuracy`` where labels are classes."""

    loss: float
    accuracy: float | None
    rows: int


class Callback:
    """Override what you want to hear."""

    def on_train_begin(self, state: TrainState, control: Control) -> None:
        """Before the first epoch."""

    def on_epoch_begin(self, state: TrainState, control: Control) -> None:
        """Before an epoch's first batch."""

    def on_step_begin(self, state: TrainState, control: Control) -> None:
        """Before a batch is sent."""

    def on_step_end(self, state: TrainState, control: Control, end: StepEnd) -> None:
        """After every optimizer moved."""

    def on_epoch_end(self, state: TrainState, control: Control, end: EpochEnd) -> None:
        """After an epoch's last step."""

    def on_evaluate(self, state: TrainState, control: Control, result: Evaluation) -> None:
        """After an evaluation."""

    def on_train_end(self, state: TrainState, control: Control) -> None:
        """After the middle came home."""
