"""Anchors heads while the writer is killed, the endpoint stalls and dies, and the chain is reorganised and rolled back.

``python -m tests.anchor_chaos --heads 200 --seed 0``: at the end every head is on the chain exactly once, none is lost.
The short form runs with the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from eth_account import Account

from provenance.anchors import ChainAnchor
from provenance.chain import Registry, artifact, connect
from provenance.log import Log
from tests import evm
from wire.errors import AnchorError

SIGNER: Final = Account.from_key("0x" + "44" * 32)
CONFIRMATIONS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened, and the sizes of the heads that the chain tells of in the end."""

    anchored: list[int]
    kills: int
    reorganisations: int
    restarts: int
    stalls: int


def anchor_of(log: Log, url: str, registry: str) -> ChainAnchor:
    return ChainAnchor(
        log,
        Registry.at(connect([url]), registry),
        SIGNER,
        chain_id=evm.CHAIN_ID,
        confirmations=CONFIRMATIONS,
        patience_s=5.0,
    )


def write(folder: str, url: str, registry: str, heads: int) -> None:
    """Appends, signs and anchors until there are so many heads; a new process goes on where the last one died."""
    with contextlib.closing(Log(f"sqlite:///{folder}/log.sqlite")) as log:
        while True:
            with contextlib.suppress(AnchorError):
                anchor = anchor_of(log, url, registry)
                # What was signed, but not handed over before the kill.
                for head in log.heads():
                    anchor.anchor(head)
                while True:
                    if log.size() < heads:
                        log.append([b"record %d" % log.size()])
                        anchor.anchor(log.sign_head(SIGNER))
                    anchor.advance()
            time.sleep(0.1)


def run(folder: Path, *, heads: int, seed: int) -> Report:
    """Chaos, then peace, then the count."""
    chance = random.Random(seed)  # noqa: S311 - when to kill
    context = multiprocessing.get_context("spawn")
    done: dict[str, int] = dict.fromkeys(("kill", "reorganise", "restart", "stall"), 0)
    with evm.running(folder, options=("--block-time", "1", "--mixed-mining")) as anvil:
        anvil.fund(SIGNER.address)
        registry = anvil.deploy()
        anvil.mine(8)
        anvil.write_state()
        with contextlib.closing(Log(f"sqlite:///{folder}/log.sqlite")) as log:
            writer = _started(context, folder, anvil, registry, heads)
            while log.size() < heads or sum(done.values()) < 4:
                time.sleep(chance.uniform(0.2, 2.0))
                what = chance.choice(("kill", "kill", "reorganise", "restart", "stall"))
                done[what] += 1
                if what == "kill":
                    _kill(writer)
                    writer = _started(context, folder, anvil, registry, heads)
                elif what == "reorganise":
                    with contextlib.suppress(RuntimeError):
                        anvil.reorganise(chance.randint(1, CONFIRMATIONS))
                elif what == "restart":
                    anvil.stop(chance.choice((signal.SIGTERM, signal.SIGKILL)))
                    time.sleep(chance.uniform(0.0, 1.0))
                    anvil.start()
                else:
                    anvil.stall()
                    time.sleep(chance.uniform(0.5, 2.0))
                    anvil.go_on()
            _kill(writer)
            # A node restored from an older state has forgotten the account's money too, if it was set since.
            anvil.fund(SIGNER.address)
            anchor = anchor_of(log, anvil.url, registry)
            for head in log.heads():
                anchor.anchor(head)
            if not anchor.wait(180, poll_s=0.3):
                raise RuntimeError(f"not settled: {[line for line in anchor.status() if line.state != 'final']}")
            return Report(
                anchored=_sizes(anvil.url, registry, anchor.log_id),
                kills=done["kill"],
                reorganisations=done["reorganise"],
                restarts=done["restart"],
                stalls=done["stall"],
            )


def _started(context: Any, folder: Path, anvil: evm.Anvil, registry: str, heads: int) -> Any:
    process = context.Process(target=write, args=(str(folder), anvil.url, registry, heads), daemon=True)
    process.start()
    return process


def _kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _sizes(url: str, registry: str, log_id: bytes) -> list[int]:
    def ask(w3: Any) -> list[int]:
        contract = w3.eth.contract(address=registry, abi=artifact()["abi"])
        events = contract.events.HeadAnchored.get_logs(from_block=0, to_block="latest")
        return [int(event["args"]["size"]) for event in events if event["args"]["log"] == log_id]

    return connect([url]).agreed(ask, "the anchored heads")


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder), heads=arguments.heads, seed=arguments.seed)
    sys.stdout.write(f"{report}\n")
    if report.anchored != list(range(1, arguments.heads + 1)):
        sys.exit("a head is missing, or is there twice")
    sys.stdout.write(f"all {arguments.heads} heads are on the chain exactly once\n")


if __name__ == "__main__":
    main()
