"""What of a trainer's data may leave: the claim that is made for it, and the table that a policy releases once."""

from __future__ import annotations

from pathlib import Path

import torch

from client_side.checkpoints import Checkpoint
from client_side.cutting import Cut
from client_side.passes import Loader
from client_side.records import collect, data_set_of, load_table, repeats_no_record, save_table, table_loader
from client_side.sampling import PoissonLoader
from privacy.guard import Guard, Situation
from privacy.policy import CLEAR
from privacy.tables import ReleasedTable
from wire.errors import ConfigError

__all__ = ["Releases"]


class Releases:
    """One trainer's way through its guard, before a step is taken."""

    def __init__(
        self,
        cut: Cut,
        guard: Guard,
        *,
        run: str,
        data_set: str | None,
        units: torch.Tensor | None,
        seed: int,
    ) -> None:
        """Takes what a claim depends on; see :class:`~client_side.trainer.Trainer`."""
        self._cut, self._guard, self._run = cut, guard, run
        self._data_set, self._units, self._seed = data_set, units, seed
        self._claimed: Loader | None = None
        self._table: ReleasedTable | None = None

    def loader(self, loader: Loader, folder: Path | None, resumed: Checkpoint | None) -> Loader:
        """What to train on: ``loader`` itself, or the table that its records are released as.

        Args:
            loader: of the records.
            folder: where the run keeps its table.
            resumed: where the run goes on from; its table was paid for.

        Raises:
            ConfigError: the data set has no name, or is another one than before; or a treatment does not fit it.
            ReleaseRefusedError, BudgetSpentError, LedgerError: see :class:`Guard`.
            CheckpointError: the table of a resumed run is damaged or gone.
        """
        if loader is not self._claimed:
            self._claim(loader, resumed)
            self._claimed = loader
        if self._guard.policy.table is None:
            return loader
        if self._table is None and folder is not None and resumed is not None:
            self._table = load_table(folder)
            self._guard.adopt(self._table)
        if self._table is None:
            self._table = self._guard.table(collect(self._cut, loader, self._units))
            if folder is not None:
                save_table(folder, self._table)
        return table_loader(self._table, loader, self._seed)

    def _claim(self, loader: Loader, resumed: Checkpoint | None) -> None:
        """Tells the guard what is trained on, and how."""
        clear, known = self._guard.policy == CLEAR, self._guard.data_set
        name = self._data_set or data_set_of(loader, read=not clear)
        if not clear and (name is None or known not in (None, name)):
            raise ConfigError(
                "privacy: this policy goes with one data set that has a name in the ledger: give a DataLoader over a "
                'data set that can be read in order, or say data_set = "…"; and a new trainer for other data'
            )
        front, head = self._cut.front, self._cut.head
        situation = Situation(
            data_set=name,
            run=self._run,
            vanilla=head is None,
            front_learns=any(p.requires_grad for p in front.parameters()),
            head_learns=head is not None and any(p.requires_grad for p in head.parameters()),
            once_an_epoch=repeats_no_record(loader),
            sampling_rate=loader.rate if isinstance(loader, PoissonLoader) else None,
        )
        self._guard.begin(situation, None if resumed is None else resumed.ledger)
