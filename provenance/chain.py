"""An EVM chain as several endpoints tell it, and the registry contract on it.

No endpoint is believed alone where there are several: an answer counts once a majority of them gives it, and where they
contradict each other, nothing is taken as true until they agree again (T24). Nothing is retried here: whoever calls
asks again, and looks for what it sent before it sends again.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, TypeVar, cast

from eth_typing import ChecksumAddress
from eth_utils.address import is_address, to_checksum_address
from hexbytes import HexBytes
from pydantic_core import from_json
from requests.exceptions import RequestException
from web3 import HTTPProvider, Web3
from web3.exceptions import BlockNotFound, TransactionNotFound, Web3Exception, Web3RPCError, Web3ValueError
from web3.types import RPCResponse

from wire.errors import AnchorError, ConfigError

__all__ = ["Block", "Chain", "Mined", "Registry", "artifact", "connect"]

T = TypeVar("T")

_TIMEOUT_S: Final = 10.0  # an endpoint that stalls longer is asked again after a while
_COOL_S: Final = 5.0
_GWEI: Final = 10**9
_ZERO: Final = "0x" + 40 * "0"
# How the clients say that they have this very transaction already.
_KNOWN: Final = ("already known", "already imported", "alreadyknown", "known transaction", "already exists")
_SPENT: Final = ("nonce too low", "nonce is too low", "invalid nonce", "oldnonce")
_UNDERPRICED: Final = ("underpriced", "fee too low", "less than block base fee", "below the base fee")


@dataclass(frozen=True, slots=True)
class Block:
    """A block: its number, hash, and time in seconds."""

    number: int
    hash: bytes
    time: int


@dataclass(frozen=True, slots=True)
class Mined:
    """A transaction in a block, and whether it did what it should."""

    number: int
    hash: bytes
    succeeded: bool


@functools.cache
def artifact() -> dict[str, Any]:
    """ABI and bytecode of the registry, as they were compiled from ``contracts/``."""
    text = resources.files("provenance").joinpath("artifacts/ProvenanceRegistry.json").read_text("utf-8")
    made: dict[str, Any] = json.loads(text)
    return made


def connect(urls: Sequence[str]) -> Chain:
    """The chain behind one or several JSON-RPC endpoints.

    Raises:
        ConfigError: a URL is no ``http://`` or ``https://``.
    """
    wrong = next((url for url in urls if not url.startswith(("http://", "https://"))), None)
    if wrong is not None or not urls:
        raise ConfigError("an anchor's endpoints read https://host/path; several are separated by commas")
    # web3's own retries would send transactions again unasked.
    made = [
        Web3(_Provider(url, request_kwargs={"timeout": _TIMEOUT_S}, exception_retry_configuration=None)) for url in urls
    ]
    return Chain(made)


class _Provider(HTTPProvider):
    """web3's own, but for what it parses: see :func:`provenance.envelope.parse_json`."""

    @staticmethod
    def decode_rpc_response(raw_response: bytes) -> RPCResponse:
        """The answer, if it is an object."""
        answer = from_json(raw_response)
        if not isinstance(answer, dict):
            raise Web3ValueError("the endpoint's answer is no JSON object")
        return cast("RPCResponse", answer)


class Chain:
    """What a majority of the endpoints say."""

    def __init__(self, endpoints: Sequence[Web3]) -> None:
        """Asks nothing yet."""
        self._endpoints = list(endpoints)
        self._quorum = len(self._endpoints) // 2 + 1
        self._asleep: dict[int, float] = {}

    def chain_id(self) -> int:
        """EIP-155's."""
        return self.agreed(lambda w3: int(w3.eth.chain_id), "the chain's id")

    def height(self) -> int:
        """The highest block that a majority has reached."""
        heights = self._answers(lambda w3: int(w3.eth.block_number), "the latest block")
        return sorted(heights, reverse=True)[self._quorum - 1]

    def block(self, number: int) -> Block | None:
        """The block of that number, if it is there."""

        def ask(w3: Web3) -> Block | None:
            try:
                found = w3.eth.get_block(number)
            except BlockNotFound:
                return None
            return Block(int(found["number"]), bytes(found["hash"]), int(found["timestamp"]))

        return self.agreed(ask, f"block {number}")

    def receipt(self, transaction: bytes) -> Mined | None:
        """Where a transaction was mined, if it was."""

        def ask(w3: Web3) -> Mined | None:
            try:
                found = w3.eth.get_transaction_receipt(HexBytes(transaction))
            except TransactionNotFound:
                return None
            if bytes(found["transactionHash"]) != transaction or found["blockNumber"] is None:
                raise AnchorError("an endpoint answered with another transaction's receipt")
            return Mined(int(found["blockNumber"]), bytes(found["blockHash"]), found["status"] == 1)

        return self.agreed(ask, f"the receipt of 0x{transaction.hex()}")

    def nonce(self, address: ChecksumAddress, number: int) -> int:
        """How many transactions of an address the chain holds up to a block."""
        return self.agreed(lambda w3: int(w3.eth.get_transaction_count(address, number)), f"the nonce of {address}")

    def has_code(self, address: ChecksumAddress) -> bool:
        """Whether there is a contract."""
        return self.agreed(lambda w3: bool(w3.eth.get_code(address)), f"the code of {address}")

    def fees(self) -> tuple[int, int]:
        """Base fee of the latest block, and a tip that gets a transaction mined, in wei: the dearest that is said."""

        def ask(w3: Web3) -> tuple[int, int]:
            base = int(w3.eth.get_block("latest").get("baseFeePerGas", _GWEI))
            try:
                return base, int(w3.eth.max_priority_fee)
            except (Web3Exception, ValueError, NotImplementedError):
                return base, _GWEI

        said = self._answers(ask, "the fees")
        return max(base for base, _ in said), max(tip for _, tip in said)

    def call(self, address: ChecksumAddress, function: str, *arguments: Any) -> Any:  # noqa: ANN401 - the ABI's
        """What a view function of the registry returns, as a tuple."""

        def ask(w3: Web3) -> Any:  # noqa: ANN401 - the ABI's
            said = w3.eth.contract(address=address, abi=artifact()["abi"]).functions[function](*arguments).call()
            return tuple(said) if isinstance(said, list | tuple) else (said,)

        return self.agreed(ask, f"{function} of the registry {address}")

    def send(self, raw: bytes) -> None:
        """Hands a signed transaction to every endpoint. One that has it already has it.

        Raises:
            AnchorError: none took it; says why.
        """
        refused: list[str] = []
        took = 0
        for index, w3 in self._awake():
            try:
                w3.eth.send_raw_transaction(HexBytes(raw))
                took += 1
            except Exception as error:  # noqa: BLE001 - a provider may raise anything, and the others are still asked
                text = _said(error)
                if any(known in text.lower() for known in (*_KNOWN, *_SPENT)):
                    took += 1  # whether it is the one that was mined, the receipt tells
                elif any(known in text.lower() for known in _UNDERPRICED):
                    took += 1  # the fee is raised when it has waited for long enough
                else:
                    refused.append(text)
                    self._put_to_sleep(index, error)
        if not took:
            raise AnchorError(f"no endpoint took the transaction: {'; '.join(refused)[:300] or 'none answers'}")

    def agreed(self, ask: Callable[[Web3], T], what: str) -> T:
        """What a majority answers.

        Raises:
            AnchorError: too few answer, or they contradict each other.
        """
        said = self._answers(ask, what)
        for answer in said:
            if said.count(answer) >= self._quorum:
                return answer
        raise AnchorError(
            f"the endpoints contradict each other on {what}: {' | '.join(str(answer)[:80] for answer in said)}; "
            "nothing counts until they agree"
        )

    def _answers(self, ask: Callable[[Web3], T], what: str) -> list[T]:
        said: list[T] = []
        failed: list[str] = []
        for index, w3 in self._awake():
            try:
                said.append(ask(w3))
            except AnchorError as error:
                failed.append(str(error))
            except Exception as error:  # noqa: BLE001 - what an endpoint sends may make web3 raise anything
                failed.append(_said(error))
                self._put_to_sleep(index, error)
        if len(said) < self._quorum:
            raise AnchorError(
                f"{len(said)} of {len(self._endpoints)} endpoints told {what}, and {self._quorum} are needed: "
                f"{'; '.join(failed)[:300] or 'the others did not answer lately'}"
            )
        return said

    def _awake(self) -> list[tuple[int, Web3]]:
        now = time.monotonic()
        return [(i, w3) for i, w3 in enumerate(self._endpoints) if self._asleep.get(i, 0.0) <= now]

    def _put_to_sleep(self, index: int, error: Exception) -> None:
        """An endpoint that did not answer is not waited for again at once, where there are others."""
        if isinstance(error, RequestException | OSError) and len(self._endpoints) > 1:
            self._asleep[index] = time.monotonic() + _COOL_S


@dataclass(frozen=True, slots=True)
class Registry:
    """The registry contract at an address."""

    chain: Chain
    address: ChecksumAddress

    @classmethod
    def at(cls, chain: Chain, address: str) -> Registry:
        """The registry at that address.

        Raises:
            ConfigError: that is no address.
            AnchorError: there is no contract.
        """
        if not is_address(address):
            raise ConfigError(f"{address[:80]!r} is no address of a registry: 0x and 40 hexadecimal digits")
        made = cls(chain, to_checksum_address(address))
        if not chain.has_code(made.address):
            raise AnchorError(f"there is no contract at {address}: deploy the registry, or name the right chain")
        return made

    def log_id(self, opener: str, salt: bytes) -> bytes:
        """The id of a log that ``opener`` opens with this salt."""
        return bytes(Web3.solidity_keccak(["uint256", "bytes32"], [int(opener, 16), salt]))

    def latest(self, log: bytes) -> tuple[bytes, int, int]:
        """Root, size and block of a log's latest head; zeros if there is none."""
        root, size, number = self.chain.call(self.address, "latestOf", log)
        return bytes(root), int(size), int(number)

    def key_of(self, log: bytes) -> str | None:
        """Whose key anchors the log; nobody's if it was not opened, or revoked."""
        key, _ = self.chain.call(self.address, "controlOf", log)
        return None if key == _ZERO else str(key)

    def opening(self, salt: bytes, key: str, recovery: str = _ZERO) -> bytes:
        """The call that opens a log."""
        return self._encoded("openLog", salt, key, recovery)

    def anchoring(self, log: bytes, size: int, root: bytes) -> bytes:
        """The call that anchors a head."""
        return self._encoded("anchor", log, size, root)

    def _encoded(self, function: str, *arguments: Any) -> bytes:  # noqa: ANN401 - the ABI's
        contract = Web3().eth.contract(address=self.address, abi=artifact()["abi"])
        return bytes(HexBytes(contract.encode_abi(function, args=list(arguments))))


def _said(error: Exception) -> str:
    if isinstance(error, Web3RPCError) and error.rpc_response:
        detail = error.rpc_response.get("error")
        if isinstance(detail, dict):
            return str(detail.get("message", detail))[:200]
    return (str(error) or type(error).__name__)[:200]
