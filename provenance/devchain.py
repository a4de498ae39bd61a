"""A chain inside the process, for everybody without one: eth-tester and py-evm, kept in an SQLite file.

The same contract and the same code as on any other chain; no server, no network, no real money. What it proves is less:
its blocks stand in a file that its owner can rewrite. One process at a time has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from eth.db.atomic import AtomicDB
from eth.db.backends.base import BaseDB
from eth.exceptions import CanonicalHeadNotFound
from eth_tester import EthereumTester, PyEVMBackend
from eth_typing import ChecksumAddress
from web3 import EthereumTesterProvider, Web3
from web3.types import Nonce, Wei
from web3.utils import get_create_address

from provenance.chain import Chain, Registry, artifact
from wire.errors import AnchorError

__all__ = ["DevChain"]

_ALLOWANCE: Final = 10**20  # 100 ether, of a genesis with a million in each account


class _Store(BaseDB):
    """py-evm's key-value store in SQLite; a block's writes become durable together (:meth:`DevChain.committed`)."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __getitem__(self, key: bytes) -> bytes:
        row = self._connection.execute("SELECT value FROM states WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        return bytes(row[0])

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self._connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (key, value))

    def __delitem__(self, key: bytes) -> None:
        if not self._connection.execute("DELETE FROM states WHERE key = ?", (key,)).rowcount:
            raise KeyError(key)

    def _exists(self, key: bytes) -> bool:
        return self._connection.execute("SELECT 1 FROM states WHERE key = ?", (key,)).fetchone() is not None


class _Backend(PyEVMBackend):  # type: ignore[misc]  # eth-tester ships no types
    """eth-tester's own, on a store that lasts."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        self.chain: Any = None  # the base class makes one
        super().__init__()

    def reset_to_genesis(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - eth-tester's own
        super().reset_to_genesis(*arguments, **options)
        kept = type(self.chain)
        try:
            self.chain = kept(AtomicDB(self._store))
        except CanonicalHeadNotFound:  # a new file: it begins with what was just made in memory
            for key, value in self.chain.chaindb.db.wrapped_db.kv_store.items():
                self._store[key] = value
            self.chain = kept(AtomicDB(self._store))


class DevChain:
    """The chain in a file, with the registry deployed and money for whoever anchors.

    Use it as a context manager, or close it: while it is open no other process may.
    """

    def __init__(self, path: Path) -> None:
        """Opens the chain, and makes it if there is none.

        Raises:
            AnchorError: another process has it open, or the file is damaged.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise AnchorError(f"another process has the development chain {path} open: wait for it") from error
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("CREATE TABLE IF NOT EXISTS states (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
            with self._committed():
                self._w3 = Web3(_Provider(EthereumTester(_Backend(_Store(self._connection))), self))
                self._address = self._deployed()
        except (sqlite3.Error, KeyError, ValueError) as error:
            self.close()
            raise AnchorError(f"the development chain {path} is damaged: move it away to start a new one") from error
        self.chain = Chain([self._w3])
        self.registry = Registry.at(self.chain, self._address)

    def fund(self, address: str) -> None:
        """Gives an address money, if it has little; it is worth nothing elsewhere."""
        to = Web3.to_checksum_address(address)
        if self._w3.eth.get_balance(to) < _ALLOWANCE // 2:
            self._w3.eth.send_transaction({"from": self._w3.eth.accounts[0], "to": to, "value": Wei(_ALLOWANCE)})

    def close(self) -> None:
        """Lets go of the file."""
        with contextlib.suppress(AttributeError):  # it was never opened
            self._connection.close()
        os.close(self._lock)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes."""
        self.close()

    @contextlib.contextmanager
    def _committed(self) -> Iterator[None]:
        """What is written meanwhile becomes durable together, or is forgotten: killed within a block, it never was."""
        if self._connection.in_transaction:
            yield
            return
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")

    def _deployed(self) -> ChecksumAddress:
        """The registry's address: the first thing that the chain's first account did."""
        first = self._w3.eth.accounts[0]
        address = get_create_address(first, Nonce(0))
        if not self._w3.eth.get_code(address):
            contract = self._w3.eth.contract(abi=artifact()["abi"], bytecode=artifact()["bytecode"])
            contract.constructor().transact({"from": first})
        return address


class _Provider(EthereumTesterProvider):
    """Every request is one transaction of the store."""

    def __init__(self, tester: EthereumTester, owner: DevChain) -> None:
        super().__init__(tester)
        self._owner = owner

    def make_request(self, method: Any, params: Any) -> Any:  # noqa: ANN401 - web3's own
        with self._owner._committed():  # noqa: SLF001 - of the same module
            return super().make_request(method, params)
