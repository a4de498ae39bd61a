"""Anchoring: every head on the chain exactly once, whatever happens on the way (THREATS T24)."""

from __future__ import annotations

import contextlib
import http.server
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import sqlalchemy as sa
from eth_account import Account
from eth_account.signers.local import LocalAccount

from provenance.anchors import ChainAnchor, LogAnchor, anchored
from provenance.chain import Chain, Registry, artifact, connect
from provenance.devchain import DevChain
from provenance.log import Log
from tests import evm
from wire.errors import AnchorError, ConfigError, ProvenanceError

SIGNER: LocalAccount = Account.from_key("0x" + "33" * 32)
needs_anvil = pytest.mark.skipif(evm.anvil_binary() is None, reason=evm.MISSING)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with contextlib.closing(Log(f"sqlite:///{tmp_path / 'log.sqlite'}")) as opened:
        yield opened


def grow(log: Log, anchor: ChainAnchor | LogAnchor, count: int = 1) -> None:
    for _ in range(count):
        log.append([b"record %d" % log.size()])
        anchor.anchor(log.sign_head(SIGNER))


def dev_anchor(log: Log, dev: DevChain) -> ChainAnchor:
    dev.fund(SIGNER.address)
    return ChainAnchor(log, dev.registry, SIGNER, chain_id=dev.chain.chain_id(), confirmations=0)


# The chain inside the process


def test_heads_are_anchored_on_the_chain_inside_the_process_and_stay_there(log: Log, tmp_path: Path) -> None:
    with DevChain(tmp_path / "chain.sqlite") as dev:
        anchor = dev_anchor(log, dev)
        grow(log, anchor, 2)
        assert [line.state for line in anchor.status()] == ["waiting", "waiting"]
        assert anchor.wait(60, poll_s=0)
        before = anchor.status()
    with DevChain(tmp_path / "chain.sqlite") as dev:
        anchor = dev_anchor(log, dev)

        assert anchor.advance()
        assert anchor.status() == before == anchored(log)
        assert [line.state for line in before] == ["final", "final"]
        assert dev.registry.latest(anchor.log_id) == (log.root(), 2, before[1].block)
        grow(log, anchor)
        assert anchor.wait(60, poll_s=0)
        assert dev.registry.latest(anchor.log_id)[1] == 3


def test_the_chain_inside_the_process_is_one_processs_at_a_time(tmp_path: Path) -> None:
    with DevChain(tmp_path / "chain.sqlite"), pytest.raises(AnchorError, match="another process has"):
        DevChain(tmp_path / "chain.sqlite")


def test_a_damaged_chain_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "chain.sqlite").write_bytes(b"no database" * 1000)

    with pytest.raises(AnchorError, match=r"chain\.sqlite is damaged"):
        DevChain(tmp_path / "chain.sqlite")


def test_a_head_of_another_log_is_refused(log: Log, tmp_path: Path) -> None:
    with contextlib.closing(Log(f"sqlite:///{tmp_path / 'other.sqlite'}")) as other:
        other.append([b"x"])
        head = other.sign_head(SIGNER)
        with pytest.raises(ProvenanceError, match="is not of the log"):
            LogAnchor(log).anchor(head)


def test_the_log_itself_is_an_anchor(log: Log) -> None:
    anchor = LogAnchor(log)
    grow(log, anchor, 2)

    assert anchor.advance()
    assert [(line.size, line.state, line.target) for line in anchor.status()] == [
        (1, "final", "log"),
        (2, "final", "log"),
    ]


def anchor_forever(folder: str) -> None:
    """Anchors a head after the other, until it is killed."""
    with (
        contextlib.closing(Log(f"sqlite:///{folder}/log.sqlite")) as log,
        DevChain(Path(folder, "chain.sqlite")) as dev,
    ):
        anchor = dev_anchor(log, dev)
        anchor.wait(60, poll_s=0)
        while True:
            grow(log, anchor)
            anchor.advance()


@pytest.mark.timeout(300)
def test_T24_killed_at_any_point_every_head_is_anchored_exactly_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with contextlib.closing(Log(f"sqlite:///{tmp_path / 'log.sqlite'}")) as log:
        for kill in range(3):
            child = context.Process(target=anchor_forever, args=(str(tmp_path),))
            child.start()
            give_up = time.monotonic() + 60
            while log.size() < 2 * (kill + 1) and time.monotonic() < give_up:
                time.sleep(0.01)
            time.sleep(0.037 * kill)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        with DevChain(tmp_path / "chain.sqlite") as dev:
            anchor = dev_anchor(log, dev)
            grow(log, anchor)
            assert anchor.wait(60, poll_s=0)

            found = anchored_sizes(dev.chain, dev.registry, anchor)
            signed = [head.size for head in log.heads()]
            lines = {line.size: line.state for line in anchor.status()}
            # A head that was signed, but whose process died before it was handed over, is covered by the next.
            assert found == sorted(lines) == sorted(set(found))
            assert set(lines) <= set(signed)
            assert set(lines.values()) == {"final"}


def anchored_sizes(chain: Chain, registry: Registry, anchor: ChainAnchor) -> list[int]:
    """The size of every head that the registry tells of, by its events."""

    def ask(w3: Any) -> list[int]:
        contract = w3.eth.contract(address=registry.address, abi=artifact()["abi"])
        events = contract.events.HeadAnchored.get_logs(from_block=0, to_block="latest")
        return [int(event["args"]["size"]) for event in events if event["args"]["log"] == anchor.log_id]

    return chain.agreed(ask, "the anchored heads")


# A chain of its own


@pytest.fixture
def anvil(tmp_path: Path) -> Iterator[evm.Anvil]:
    with evm.running(tmp_path, options=("--no-mining",)) as started:
        started.fund(SIGNER.address)
        yield started


def http_anchor(log: Log, anvil: evm.Anvil, registry: str, **options: Any) -> ChainAnchor:
    chain = connect([anvil.url])
    settings: dict[str, Any] = {"chain_id": evm.CHAIN_ID, "confirmations": 2} | options
    return ChainAnchor(log, Registry.at(chain, registry), SIGNER, **settings)


def settle(anchor: ChainAnchor, anvil: evm.Anvil) -> None:
    for _ in range(20):
        if anchor.advance():
            return
        anvil.mine()
    raise AssertionError(f"not settled: {anchor.status()}")


@needs_anvil
def test_a_head_is_sent_then_mined_then_final(log: Log, anvil: evm.Anvil) -> None:
    anchor = http_anchor(log, anvil, anvil.deploy())
    grow(log, anchor, 3)
    states = []
    for _ in range(4):
        states.append((anchor.advance(), {line.state for line in anchor.status()}))
        anvil.mine()

    assert states == [(False, {"sent"}), (False, {"mined"}), (False, {"mined"}), (True, {"final"})]
    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1, 2, 3]


@needs_anvil
def test_T24_what_falls_out_of_the_chain_is_anchored_again(log: Log, anvil: evm.Anvil) -> None:
    anchor = http_anchor(log, anvil, anvil.deploy(), confirmations=4)
    anvil.mine(5)
    grow(log, anchor, 3)
    anchor.advance()
    anvil.mine()
    anchor.advance()
    assert {line.state for line in anchor.status()} == {"mined"}

    anvil.reorganise(1)
    anchor.advance()

    assert {line.state for line in anchor.status()} == {"sent"}
    settle(anchor, anvil)
    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1, 2, 3]


@needs_anvil
def test_T24_a_final_head_that_the_chain_loses_all_the_same_is_anchored_again(log: Log, anvil: evm.Anvil) -> None:
    anchor = http_anchor(log, anvil, anvil.deploy(), confirmations=0)
    anvil.mine(5)
    grow(log, anchor, 2)
    settle(anchor, anvil)
    anvil.reorganise(1)

    anchor.advance()
    assert "sent" in {line.state for line in anchor.status()}
    settle(anchor, anvil)

    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1, 2]


@needs_anvil
def test_T24_a_transaction_that_waits_for_too_long_pays_more_and_is_still_one(log: Log, anvil: evm.Anvil) -> None:
    now = [0.0]
    anchor = http_anchor(log, anvil, anvil.deploy(), confirmations=0, patience_s=60.0, clock=lambda: now[0])
    grow(log, anchor)
    anchor.advance()
    (first,) = anchor.status()
    now[0] = 61.0
    anchor.advance()

    (second,) = anchor.status()
    assert first.transaction is not None
    assert second.state == "sent"
    fees = fees_of(log)
    assert len(fees) == 4  # two of the opening, two of the head
    assert all(dearer >= 1.125 * cheap for cheap, dearer in zip(fees[::2], fees[1::2], strict=True))
    settle(anchor, anvil)
    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1]


def fees_of(log: Log) -> list[int]:
    query = sa.text("SELECT fee FROM provenance_transactions ORDER BY size, fee")
    with log.engine.begin() as connection:
        return [int(fee) for (fee,) in connection.execute(query)]


@needs_anvil
def test_T24_fees_never_rise_above_the_limit(log: Log, anvil: evm.Anvil) -> None:
    now = [0.0]
    registry = anvil.deploy()
    anchor = http_anchor(log, anvil, registry, patience_s=60.0, clock=lambda: now[0], max_fee=2 * 10**9)
    grow(log, anchor)
    for _ in range(10):
        anchor.advance()
        now[0] += 61.0

    assert max(fees_of(log)) <= 2 * 10**9


@needs_anvil
def test_T24_the_wrong_chain_gets_nothing(log: Log, anvil: evm.Anvil) -> None:
    anchor = http_anchor(log, anvil, anvil.deploy(), chain_id=1)
    grow(log, anchor)

    with pytest.raises(AnchorError, match="chain 31337, not 1: nothing was sent"):
        anchor.advance()
    assert [line.state for line in anchor.status()] == ["waiting"]


@needs_anvil
def test_a_missing_contract_and_a_bad_address_are_named(anvil: evm.Anvil) -> None:
    chain = connect([anvil.url])
    with pytest.raises(AnchorError, match="no contract at"):
        Registry.at(chain, SIGNER.address)
    with pytest.raises(ConfigError, match="no address"):
        Registry.at(chain, "0x12")
    with pytest.raises(ConfigError, match="endpoints read https"):
        connect(["ftp://x"])


@needs_anvil
def test_T24_a_restored_outbox_anchors_nothing_twice(log: Log, anvil: evm.Anvil) -> None:
    anchor = http_anchor(log, anvil, anvil.deploy(), confirmations=0)
    grow(log, anchor, 2)
    settle(anchor, anvil)
    with log.engine.begin() as connection:  # the backup was taken before anything was sent
        connection.execute(sa.text("DELETE FROM provenance_transactions"))
        connection.execute(
            sa.text("UPDATE provenance_outbox SET state='waiting', nonce=NULL, \"transaction\"=NULL, block_number=NULL")
        )
    settle(anchor, anvil)

    assert [line.state for line in anchor.status()] == ["covered", "final"]
    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1, 2]


@needs_anvil
def test_T24_a_nonce_that_somebody_else_spent_is_no_loss(log: Log, anvil: evm.Anvil) -> None:
    anchor = http_anchor(log, anvil, anvil.deploy(), confirmations=0)
    grow(log, anchor)
    settle(anchor, anvil)
    grow(log, anchor)
    anchor.advance()
    nonce = 2  # of the head that was just sent
    dear: dict[str, Any] = {
        "type": 2,
        "chainId": evm.CHAIN_ID,
        "nonce": nonce,
        "to": SIGNER.address,
        "value": 0,
        "gas": 21000,
    }
    dear |= {"maxFeePerGas": 10**12, "maxPriorityFeePerGas": 10**12}
    anvil.rpc("eth_sendRawTransaction", "0x" + SIGNER.sign_transaction(dear).raw_transaction.hex().removeprefix("0x"))
    settle(anchor, anvil)

    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1, 2]


@needs_anvil
def test_T23_a_revoked_key_is_told_and_nothing_is_lost(log: Log, anvil: evm.Anvil) -> None:
    registry = anvil.deploy()
    anchor = http_anchor(log, anvil, registry, confirmations=0)
    grow(log, anchor)
    settle(anchor, anvil)
    data = anchor._registry._encoded("revokeKey", anchor.log_id)
    call: dict[str, Any] = {
        "type": 2,
        "chainId": evm.CHAIN_ID,
        "nonce": 2,
        "to": registry,
        "value": 0,
        "gas": 60000,
        "data": data,
    }
    call |= {"maxFeePerGas": 10**11, "maxPriorityFeePerGas": 10**9}
    anvil.rpc("eth_sendRawTransaction", "0x" + SIGNER.sign_transaction(call).raw_transaction.hex().removeprefix("0x"))
    anvil.mine()
    grow(log, anchor)
    with pytest.raises(AnchorError, match="may not anchor this log"):
        settle(anchor, anvil)

    assert [line.state for line in anchor.status()] == ["final", "waiting"]


# Endpoints that lie, stall or die


class Relay:
    """An endpoint in front of an anvil, whose answers a test may change."""

    def __init__(self, url: str, change: Callable[[str, Any], Any]) -> None:
        relay = self
        self.change = change

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = requests.post(url, json=asked, timeout=30).json()
                if "result" in answer:
                    answer["result"] = relay.change(asked["method"], answer["result"])
                body = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def lies_about_receipts(method: str, result: Any) -> Any:
    if method == "eth_getTransactionReceipt" and result is None:
        return None
    if method == "eth_getTransactionReceipt":
        return result | {"blockHash": "0x" + "00" * 32}
    return result


@needs_anvil
def test_T24_one_lying_endpoint_of_three_is_outvoted_and_of_two_stops_everything(log: Log, anvil: evm.Anvil) -> None:
    registry = anvil.deploy()
    relay = Relay(anvil.url, lies_about_receipts)
    with contextlib.closing(relay):
        for urls in ([anvil.url, relay.url], [anvil.url, relay.url, anvil.url]):
            chain = connect(urls)
            anchor = ChainAnchor(log, Registry.at(chain, registry), SIGNER, chain_id=evm.CHAIN_ID, confirmations=0)
            grow(log, anchor)
            if len(urls) == 2:
                with pytest.raises(AnchorError, match="contradict each other on the receipt"):
                    settle(anchor, anvil)
                assert "final" not in {line.state for line in anchor.status()}
            else:
                settle(anchor, anvil)
    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1, 2]


@needs_anvil
def test_T24_a_dead_endpoint_of_three_is_done_without(log: Log, anvil: evm.Anvil) -> None:
    chain = connect([f"http://127.0.0.1:{evm.free_port()}", anvil.url, anvil.url])
    anchor = ChainAnchor(log, Registry.at(chain, anvil.deploy()), SIGNER, chain_id=evm.CHAIN_ID, confirmations=0)
    grow(log, anchor)
    settle(anchor, anvil)

    assert [line.state for line in anchor.status()] == ["final"]
    dead = connect([f"http://127.0.0.1:{evm.free_port()}"])
    with pytest.raises(AnchorError, match="0 of 1 endpoints told the chain's id"):
        dead.chain_id()


@needs_anvil
@pytest.mark.parametrize("junk", [None, "x", 17, [], {}, "0x", "0x" + "f" * 100])
def test_T24_junk_from_an_endpoint_is_an_anchor_error(log: Log, anvil: evm.Anvil, junk: Any) -> None:
    registry = anvil.deploy()
    asked: list[str] = []
    spoil = ["none"]

    def change(method: str, result: Any) -> Any:
        asked.append(method)
        return junk if method == spoil[0] else result

    with contextlib.closing(Relay(anvil.url, change)) as relay:
        anchor = ChainAnchor(
            log, Registry.at(connect([relay.url]), registry), SIGNER, chain_id=evm.CHAIN_ID, confirmations=0
        )
        grow(log, anchor)
        anchor.advance()
        anvil.mine()
        for method in sorted({*asked, "eth_getTransactionReceipt", "eth_getBlockByNumber"}):
            spoil[0] = method
            with contextlib.suppress(AnchorError):
                anchor.advance()
        spoil[0] = "none"
        settle(anchor, anvil)
    assert anchored_sizes(connect([anvil.url]), anchor._registry, anchor) == [1]


@needs_anvil
@pytest.mark.timeout(400)
def test_T24_chaos_in_short(tmp_path: Path) -> None:
    from tests.anchor_chaos import run  # noqa: PLC0415 - its long form is a program

    report = run(tmp_path, heads=12, seed=1)

    assert report.anchored == list(range(1, 13))
    assert report.kills >= 1
