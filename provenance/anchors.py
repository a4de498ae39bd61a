"""Anchoring: a log's tree heads put where nobody can rewrite them, each exactly once (T24).

Every head goes through an outbox in the log's own database, so a process may die at any point:

1. ``waiting``: written down, before :meth:`ChainAnchor.anchor` returns.
2. ``sent``: it has its nonce, and its signed transaction is written down *before* it is sent. From here on all that
   is ever done is to send these same bytes again, or a dearer transaction of the same nonce: a chain takes one of them.
3. ``mined``: its receipt names a block. Where that block falls out of the chain, it is ``sent`` again.
4. ``final``: so many blocks stand on it, and it is the chain's block of that number. Should the chain lose even that
   (a development node restored from an older state), it is ``sent`` again too.

``covered`` is a head that a larger one overtook: the contract takes only growing ones, and the consistency proof to the
larger one shows what this one would have. Whatever the outbox has forgotten (a restored backup), the contract has not:
what stands in the registry is never sent again, and a second transaction for it would be refused there.

Any number of processes may work on one outbox: its rows change in transactions, and what is sent twice is one
transaction. One key must not anchor from two outboxes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

import sqlalchemy as sa
from hexbytes import HexBytes

from provenance.chain import Block, Chain, Mined, Registry
from provenance.log import Log, TreeHead
from wire.errors import AnchorError, ProvenanceError

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

__all__ = ["Anchor", "AnchorLine", "ChainAnchor", "LogAnchor", "State", "anchored"]

State = Literal["waiting", "sent", "mined", "final", "covered"]

_WINDOW: Final = 16  # transactions in the mempool at once: geth keeps 16 of one sender for sure
_GAS: Final = 60_000  # a head takes under 36,000
_GAS_OPEN: Final = 120_000  # opening a log takes under 75,000
_BUMP: Final = 1.25  # clients replace a transaction that pays 10 % more (geth), or 12.5 % (others)

_META: Final = sa.MetaData()
_OUTBOX: Final = sa.Table(
    "provenance_outbox",
    _META,
    sa.Column("target", sa.String(200), primary_key=True),
    sa.Column("size", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("root", sa.LargeBinary(32), nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("nonce", sa.BigInteger),
    sa.Column("transaction", sa.LargeBinary(32)),
    sa.Column("block_number", sa.BigInteger),
    sa.Column("block_hash", sa.LargeBinary(32)),
    sa.Column("block_time", sa.BigInteger),
)
_SIGNED: Final = sa.Table(
    "provenance_transactions",
    _META,
    sa.Column("hash", sa.LargeBinary(32), primary_key=True),
    sa.Column("target", sa.String(200), nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("nonce", sa.BigInteger, nullable=False),
    sa.Column("raw", sa.LargeBinary, nullable=False),
    sa.Column("fee", sa.Numeric(40, 0), nullable=False),
    sa.Column("tip", sa.Numeric(40, 0), nullable=False),
    sa.Column("signed_at", sa.Float, nullable=False),
)
_O: Final = _OUTBOX.c


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorLine:
    """One head on its way.

    Attributes:
        size: records that the head covers.
        root: of the head, in hexadecimal.
        state: see the module.
        transaction: hash of the one that was mined, or was sent last.
        block: its number.
        block_hash: in hexadecimal.
        time: of the block, in seconds since 1970.
        target: chain id, registry and log id, or ``log``.
    """

    size: int
    root: str
    state: State
    transaction: str | None
    block: int | None
    block_hash: str | None
    time: int | None
    target: str


class Anchor(Protocol):
    """Where tree heads are put."""

    def anchor(self, head: TreeHead) -> None:
        """Takes a head; durable when it returns, and on its way from then on."""

    def advance(self) -> bool:
        """Does what can be done now; whether nothing is left to do."""

    def status(self) -> list[AnchorLine]:
        """Every head that was taken, the smallest first."""


class LogAnchor:
    """No chain: the log's own signed heads. Whoever was shown one can hold the log to it; nobody else can."""

    def __init__(self, log: Log) -> None:
        """Takes heads of this log."""
        self._log = log

    def anchor(self, head: TreeHead) -> None:
        """Checks that the log holds the head.

        Raises:
            ProvenanceError: it does not.
        """
        _check_ours(self._log, head)

    def advance(self) -> bool:
        """There is nothing to do."""
        return True

    def status(self) -> list[AnchorLine]:
        """The log's signed heads."""
        return [
            AnchorLine(
                size=head.size,
                root=head.root.hex(),
                state="final",
                transaction=None,
                block=None,
                block_hash=None,
                time=None,
                target="log",
            )
            for head in self._log.heads()
        ]


def anchored(log: Log) -> list[AnchorLine]:
    """What the outbox of a log holds, of all chains; asks no chain."""
    with log.transaction("reading the outbox") as connection:
        rows = connection.execute(sa.select(_OUTBOX).where(_O.size > 0).order_by(_O.target, _O.size)).all()
    return [_line(row) for row in rows]


class ChainAnchor:
    """The registry contract on an EVM chain."""

    def __init__(
        self,
        log: Log,
        registry: Registry,
        signer: LocalAccount,
        *,
        chain_id: int,
        confirmations: int = 12,
        patience_s: float = 90.0,
        max_fee: int = 500 * 10**9,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Asks the chain nothing yet.

        Args:
            log: whose heads.
            registry: the contract.
            signer: pays, and controls the registry's log.
            chain_id: EIP-155's; an endpoint of another chain is refused.
            confirmations: blocks that must stand on one before it counts as final: 0 where blocks never fall out.
            patience_s: how long a transaction may wait for a block before its fee is raised.
            max_fee: wei a gas at most, whatever the chain asks.
            clock: seconds.
        """
        self._log, self._registry, self._signer = log, registry, signer
        self._chain: Chain = registry.chain
        self._chain_id, self._confirmations = chain_id, confirmations
        self._patience_s, self._max_fee, self._clock = patience_s, max_fee, clock
        self.log_id = registry.log_id(signer.address, log.id)
        self.target = f"{chain_id}:{registry.address}:0x{self.log_id.hex()}"

    def anchor(self, head: TreeHead) -> None:
        """Writes the head into the outbox; :meth:`advance` brings it to the chain.

        Raises:
            ProvenanceError: the log does not hold this head.
        """
        _check_ours(self._log, head)
        with self._log.transaction("writing the outbox") as connection:
            # The log must be opened in the registry first: that is the head of no records.
            for size, root in ((0, bytes(32)), (head.size, head.root)):
                known = connection.execute(sa.select(_O.root).where(*self._row(size))).scalar_one_or_none()
                if known is None:
                    values = {"target": self.target, "size": size, "root": root, "state": "waiting"}
                    connection.execute(sa.insert(_OUTBOX).values(values))

    def status(self) -> list[AnchorLine]:
        """Every head in the outbox; asks no chain."""
        return [_line(row) for row in self._rows(_O.size > 0)]

    def advance(self) -> bool:
        """Looks where every head stands, sends what must be sent; safe at any time, from any process.

        Returns:
            Whether every head is final or covered.

        Raises:
            AnchorError: the chain does not answer, contradicts itself, is another one, or refuses. What was reached
                stays reached: call again.
        """
        found = self._chain.chain_id()
        if found != self._chain_id:
            raise AnchorError(
                f"the endpoint is chain {found}, not {self._chain_id}: nothing was sent; name the right one"
            )
        height = self._chain.height()
        self._recheck_final()
        settled = self._chain.nonce(self._signer.address, max(0, height - self._confirmations))
        for row in self._rows(_O.state.in_(("sent", "mined"))):
            self._follow(row, height, settled)
        waiting = self._rows(_O.state == "waiting")
        if waiting:
            self._send_waiting(waiting, height)
        return not self._rows(_O.state.in_(("waiting", "sent", "mined")))

    def wait(self, timeout_s: float, poll_s: float = 1.0) -> bool:
        """Advances until every head is settled; whether that was reached in time.

        Raises:
            AnchorError: the chain failed to the end.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            failure: AnchorError | None = None
            try:
                if self.advance():
                    return True
            except AnchorError as error:
                failure = error
            if time.monotonic() + poll_s > deadline:
                if failure is not None:
                    raise failure
                return False
            time.sleep(poll_s)

    def _recheck_final(self) -> None:
        """Heads whose final block the chain has lost are on their way again."""
        query = (
            sa.select(_OUTBOX).where(_O.target == self.target, _O.state == "final").order_by(_O.size.desc()).limit(1)
        )
        while True:
            with self._log.transaction("reading the outbox") as connection:
                row = connection.execute(query).one_or_none()
            block = None if row is None else self._chain.block(row.block_number)
            if row is None or (block is not None and block.hash == row.block_hash):
                return
            state = "waiting" if row.nonce is None else "sent"
            self._change(row, state=state, block_number=None, block_hash=None, block_time=None)

    def _follow(self, row: sa.Row[Any], height: int, settled: int) -> None:
        if row.nonce is None:  # found in the registry, without its transaction
            block = self._chain.block(row.block_number)
            if block is None or block.hash != row.block_hash:
                self._change(row, state="waiting", block_number=None, block_hash=None, block_time=None)
            else:
                self._settle(row, block, final=height - block.number >= self._confirmations, transaction=None)
            return
        attempts = self._attempts(row)
        mined = next(((a, m) for a in attempts if (m := self._chain.receipt(a.hash)) is not None), None)
        if mined is not None:
            self._note(row, *mined, height)
        elif settled > row.nonce:
            # The nonce went to a transaction of somebody else with this key: the head needs another one.
            self._change(row, state="waiting", nonce=None, block_number=None, block_hash=None, block_time=None)
        else:
            if row.state == "mined":  # its block fell out of the chain
                self._change(row, state="sent", block_number=None, block_hash=None, block_time=None)
            self._chain.send(self._dearer(row, attempts[0]) if self._is_stuck(attempts[0]) else attempts[0].raw)

    def _note(self, row: sa.Row[Any], attempt: sa.Row[Any], mined: Mined, height: int) -> None:
        block = self._chain.block(mined.number)
        if block is None or block.hash != mined.hash:
            return  # the chain is changing at this moment: the next look tells
        if not mined.succeeded:
            self._note_refusal(row, block)
            return
        final = height - mined.number >= self._confirmations
        self._settle(row, block, final=final, transaction=attempt.hash)

    def _note_refusal(self, row: sa.Row[Any], block: Block) -> None:
        if row.size == 0 and self._registry.key_of(self.log_id) is not None:
            self._settle(row, block, final=True, transaction=None)  # it had been opened before
            return
        root, size, number = self._registry.latest(self.log_id)
        if row.size and size >= row.size:
            self._change(row, **self._standing(row, root, size, number))
            return
        raise self._not_in_control(row)

    def _not_in_control(self, row: sa.Row[Any]) -> AnchorError:
        return AnchorError(
            f"the registry refuses the head of {row.size} records: {self._signer.address} may not anchor this log (was "
            "the key revoked or rotated?)"
        )

    def _send_waiting(self, waiting: Sequence[sa.Row[Any]], height: int) -> None:
        key = self._registry.key_of(self.log_id)
        root, size, number = self._registry.latest(self.log_id)
        opened = self._rows(_O.size == 0, _O.state.in_(("mined", "final")))
        if opened and key != self._signer.address:
            raise self._not_in_control(waiting[0])
        under_way = len(self._rows(_O.state == "sent"))
        for row in waiting:
            if row.size == 0 and key is not None:
                block = self._chain.block(height)
                if block is not None:
                    self._settle(row, block, final=True, transaction=None)
            elif row.size and size >= row.size:
                self._change(row, **self._standing(row, root, size, number))
            elif under_way < _WINDOW:
                raw = self._signed(row)
                under_way += 1
                if raw is not None:
                    self._chain.send(raw)

    def _standing(self, row: sa.Row[Any], root: bytes, size: int, number: int) -> dict[str, Any]:
        """What the registry says of a head whose transaction the outbox does not know."""
        block = self._chain.block(number) if size == row.size and root == row.root else None
        if block is None:
            return {"state": "covered"}
        return {
            "state": "mined",
            "transaction": None,
            "nonce": None,
            "block_number": block.number,
            "block_hash": block.hash,
            "block_time": block.time,
        }

    def _signed(self, row: sa.Row[Any]) -> bytes | None:
        """Gives a head its nonce and its transaction, durably; ``None`` where another process was quicker."""
        fee, tip = self._price()
        latest = self._chain.nonce(self._signer.address, self._chain.height())
        with self._log.transaction("signing for the chain") as connection:
            state = connection.execute(sa.select(_O.state).where(*self._row(row.size))).scalar_one()
            if state != "waiting":
                return None
            used = connection.execute(sa.select(sa.func.max(_O.nonce)).where(_O.target == self.target)).scalar_one()
            nonce = latest if used is None else max(latest, used + 1)
            raw = self._write_signed(connection, row, nonce, fee, tip)
            connection.execute(sa.update(_OUTBOX).where(*self._row(row.size)).values(state="sent", nonce=nonce))
        return raw

    def _dearer(self, row: sa.Row[Any], attempt: sa.Row[Any]) -> bytes:
        """The same transaction at a higher fee, written down before it is sent; or the old one at the limit."""
        fee, tip = self._price()
        fee, tip = max(fee, int(attempt.fee * Decimal(_BUMP)) + 1), max(tip, int(attempt.tip * Decimal(_BUMP)) + 1)
        if fee > self._max_fee:
            return cast("bytes", attempt.raw)
        with self._log.transaction("raising a fee") as connection:
            return self._write_signed(connection, row, attempt.nonce, fee, min(tip, fee))

    def _write_signed(self, connection: sa.Connection, row: sa.Row[Any], nonce: int, fee: int, tip: int) -> bytes:
        signed = self._signer.sign_transaction(
            {
                "type": 2,
                "chainId": self._chain_id,
                "nonce": nonce,
                "to": self._registry.address,
                "value": 0,
                "gas": _GAS if row.size else _GAS_OPEN,
                "maxFeePerGas": fee,
                "maxPriorityFeePerGas": tip,
                "data": HexBytes(
                    self._registry.anchoring(self.log_id, row.size, row.root)
                    if row.size
                    else self._registry.opening(self._log.id, self._signer.address)
                ),
            }
        )
        raw, digest = bytes(signed.raw_transaction), bytes(signed.hash)
        if connection.execute(sa.select(_SIGNED.c.hash).where(_SIGNED.c.hash == digest)).first() is None:
            values = {"hash": digest, "target": self.target, "size": row.size, "nonce": nonce, "raw": raw}
            fees = {"fee": Decimal(fee), "tip": Decimal(tip), "signed_at": self._clock()}
            connection.execute(sa.insert(_SIGNED).values(values | fees))
        connection.execute(sa.update(_OUTBOX).where(*self._row(row.size)).values(transaction=digest))
        return raw

    def _price(self) -> tuple[int, int]:
        base, tip = self._chain.fees()
        fee = 2 * base + tip  # holds while blocks are full for six blocks in a row
        return min(fee, self._max_fee), min(tip, self._max_fee)

    def _is_stuck(self, attempt: sa.Row[Any]) -> bool:
        return self._clock() - cast("float", attempt.signed_at) > self._patience_s

    def _attempts(self, row: sa.Row[Any]) -> list[sa.Row[Any]]:
        """The row's transactions of its present nonce, the dearest first."""
        query = sa.select(_SIGNED).where(
            _SIGNED.c.target == self.target, _SIGNED.c.size == row.size, _SIGNED.c.nonce == row.nonce
        )
        with self._log.transaction("reading the outbox") as connection:
            return list(connection.execute(query.order_by(_SIGNED.c.fee.desc())).all())

    def _settle(self, row: sa.Row[Any], block: Block, *, final: bool, transaction: bytes | None) -> None:
        values: dict[str, Any] = {"block_number": block.number, "block_hash": block.hash, "block_time": block.time}
        if transaction is not None:
            values["transaction"] = transaction
        self._change(row, state="final" if final else "mined", **values)

    def _change(self, row: sa.Row[Any], **values: Any) -> None:  # noqa: ANN401 - the columns'
        """Changes a row that is still as it was read; another process may have been quicker."""
        same = (_O.state == row.state, _O.nonce.is_not_distinct_from(row.nonce))
        with self._log.transaction("writing the outbox") as connection:
            connection.execute(sa.update(_OUTBOX).where(*self._row(row.size), *same).values(values))

    def _rows(self, *where: sa.ColumnElement[bool]) -> list[sa.Row[Any]]:
        query = sa.select(_OUTBOX).where(_O.target == self.target, *where).order_by(_O.size)
        with self._log.transaction("reading the outbox") as connection:
            return list(connection.execute(query).all())

    def _row(self, size: int) -> tuple[sa.ColumnElement[bool], ...]:
        return (_O.target == self.target, _O.size == size)


def _check_ours(log: Log, head: TreeHead) -> None:
    if head.log != log.id or log.root(head.size) != head.root:
        raise ProvenanceError(f"the head of {head.size} records is not of the log {log.name}")


def _line(row: sa.Row[Any]) -> AnchorLine:
    return AnchorLine(
        size=row.size,
        root=row.root.hex(),
        state=cast("State", row.state),
        transaction=None if row.transaction is None else f"0x{row.transaction.hex()}",
        block=row.block_number,
        block_hash=None if row.block_hash is None else row.block_hash.hex(),
        time=row.block_time,
        target=row.target,
    )
