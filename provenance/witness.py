"""Asking a chain for a bundle's anchors: the contract's own event, in the block that the bundle names."""

from __future__ import annotations

from typing import Final

from eth_typing import HexStr
from eth_utils.address import to_checksum_address
from web3 import Web3
from web3.types import FilterParams

from provenance.bundle import AnchorPoint
from provenance.chain import Chain, Registry
from provenance.evidence import Seen
from wire.errors import ProvenanceError

__all__ = ["ChainWitness"]

_EVENT: Final = "HeadAnchored(bytes32,bytes32,uint64)"


class ChainWitness:
    """A chain, as a majority of endpoints tells it."""

    def __init__(self, chain: Chain, *, independent: bool = True) -> None:
        """Asks nothing yet.

        Args:
            chain: its endpoints.
            independent: whether it is a chain that no owner of a log can rewrite alone.
        """
        self._chain, self._independent = chain, independent

    def look(self, log: bytes, point: AnchorPoint) -> Seen | None:
        """How the chain shows an anchor; see :class:`provenance.evidence.Witness`."""
        if self._chain.chain_id() != point.chain_id:
            return None
        block = self._chain.block(point.block)
        if block is None or block.hash.hex() != point.block_hash:
            raise ProvenanceError(f"the chain's block {point.block} is another one than the bundle's")
        if block.time != point.block_time:
            raise ProvenanceError(f"the chain's block {point.block} has the time {block.time}, not {point.block_time}")
        registry = Registry.at(self._chain, point.registry)
        log_id = registry.log_id(to_checksum_address(point.opener), log)
        if (bytes.fromhex(point.root), point.size) not in self._events(registry, log_id, block.number, block.hash):
            raise ProvenanceError(f"the chain's block {point.block} anchors no such head of the log")
        height = self._chain.height()
        return Seen(
            confirmations=max(0, height - block.number),
            revoked=registry.key_of(log_id) is None,
            independent=self._independent,
        )

    def _events(self, registry: Registry, log_id: bytes, number: int, block: bytes) -> set[tuple[bytes, int]]:
        wanted = Web3.keccak(text=_EVENT)
        asked: FilterParams = {
            "address": registry.address,
            "fromBlock": number,
            "toBlock": number,
            "topics": [HexStr(wanted.to_0x_hex()), HexStr("0x" + log_id.hex())],
        }

        def ask(w3: Web3) -> set[tuple[bytes, int]]:
            return {
                (bytes(entry["topics"][2]), int.from_bytes(entry["data"], "big"))
                for entry in w3.eth.get_logs(asked)
                if bytes(entry["blockHash"]) == block
                and entry["address"] == registry.address
                and [bytes(topic) for topic in entry["topics"][:2]] == [bytes(wanted), log_id]
            }

        return self._chain.agreed(ask, f"the anchors in block {number}")
