"""Putting a log's head where a job or a command says: into the log alone, on the chain in a file, or on a real one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from provenance.log import Log
from wire.errors import ConfigError

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

    from provenance.anchors import AnchorLine

__all__ = ["Anchoring"]


@dataclass(frozen=True, slots=True)
class Anchoring:
    """Where heads go.

    Attributes:
        to: ``log``, ``dev``, or endpoints with commas.
        registry: the contract's address, on a real chain.
        chain_id: of that chain.
        chain_file: of the development chain; beside the log, unless said.
        confirmations: before a head is final.
        timeout_s: to wait for that.
    """

    to: str
    registry: str | None = None
    chain_id: int | None = None
    chain_file: Path | None = None
    confirmations: int = 12
    timeout_s: float = 600.0

    def check(self) -> None:
        """Raises: ConfigError where it does not say which chain and contract."""
        if self.to not in ("log", "dev") and (self.registry is None or self.chain_id is None):
            raise ConfigError("a chain needs --registry ADDRESS and --chain-id ID, so that nothing goes to another one")

    def push(self, log: Log, signer: LocalAccount) -> tuple[list[AnchorLine], bool]:
        """Signs the log's head and anchors it; where all heads stand, and whether they are settled.

        Raises:
            ConfigError: see :meth:`check`.
            ProvenanceError: the log or the chain fails; the same call goes on from there.
        """
        from provenance.anchors import ChainAnchor, LogAnchor  # noqa: PLC0415 - web3 takes a second to import
        from provenance.chain import Registry, connect  # noqa: PLC0415
        from provenance.devchain import DevChain  # noqa: PLC0415

        self.check()
        head = log.sign_head(signer)
        if self.to == "log":
            return LogAnchor(log).status(), True
        if self.to == "dev":
            with DevChain(self.chain_file or _beside(log)) as dev:
                dev.fund(signer.address)
                anchor = ChainAnchor(log, dev.registry, signer, chain_id=dev.chain.chain_id(), confirmations=0)
                anchor.anchor(head)
                settled = anchor.wait(self.timeout_s, poll_s=0.05)
                return anchor.status(), settled
        registry = Registry.at(connect(self.to.split(",")), self.registry or "")
        anchor = ChainAnchor(log, registry, signer, chain_id=self.chain_id or 0, confirmations=self.confirmations)
        anchor.anchor(head)
        settled = anchor.wait(self.timeout_s)
        return anchor.status(), settled


def _beside(log: Log) -> Path:
    """One development chain goes with one log: what was anchored on one is not on another."""
    file = log.engine.url.database if log.engine.dialect.name == "sqlite" else None
    return Path(file).with_name("devchain.sqlite") if file else Path("devchain.sqlite")
