"""A chain to test against: anvil from npm, which can be killed, restarted from its state, reorganised and stalled."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import requests
from eth_account import Account
from eth_account.signers.local import LocalAccount
from web3 import HTTPProvider, Web3

from provenance.chain import artifact

ROOT: Final = Path(__file__).resolve().parents[1]
CHAIN_ID: Final = 31337
MISSING: Final = "no anvil here: npm ci in contracts/, or Foundry's own on the PATH"
#: anvil's first account: everybody knows its key.
RICH: Final[LocalAccount] = Account.from_key("0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")


def anvil_binary() -> Path | None:
    """The program itself, without npm's wrapper, so that a kill reaches it."""
    found = sorted((ROOT / "contracts" / "node_modules" / "@foundry-rs").glob("anvil-*/bin/anvil"))
    system = shutil.which("anvil")
    return found[0] if found else Path(system) if system else None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Anvil:
    """One anvil, with its state in a file."""

    def __init__(self, folder: Path, *, chain_id: int = CHAIN_ID, options: tuple[str, ...] = ()) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._state, self._chain_id, self._options = folder / "anvil.json", chain_id, options
        self._process: subprocess.Popen[bytes] | None = None
        self._kept = b""
        self.start()

    def start(self) -> None:
        binary = anvil_binary()
        if binary is None:
            raise RuntimeError(MISSING)
        guard = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        options = ["--port", str(self.port), "--chain-id", str(self._chain_id), "--silent", "--order", "fifo"]
        state = ["--state", str(self._state), "--state-interval", "1", "--preserve-historical-states"]
        command = [*guard, str(binary), *options, *state, *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        give_up = time.monotonic() + 60
        while True:
            try:
                self.rpc("eth_chainId")
            except requests.ConnectionError:
                if time.monotonic() > give_up or self._process.poll() is not None:
                    raise
                time.sleep(0.05)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """SIGTERM writes the state first; SIGKILL loses what came after the last interval.

        anvil writes its state in place: what a kill tears is put back as it was shortly before.
        """
        if self._process is not None:
            self._keep_state()
            self._process.send_signal(how)
            self._process.wait()
            if self._kept and not _is_json(self._state):
                self._state.write_bytes(self._kept)

    def write_state(self) -> None:
        """Waits until the state as it is now is in the file."""
        began, give_up = time.time(), time.monotonic() + 60
        while not self._state.exists() or self._state.stat().st_mtime < began + 1 or not self._keep_state():
            if time.monotonic() > give_up:
                raise RuntimeError("anvil writes no state")
            time.sleep(0.1)

    def _keep_state(self) -> bool:
        """Remembers the file, unless it is being written at this moment."""
        if not _is_json(self._state):
            return False
        self._kept = self._state.read_bytes()
        return True

    def stall(self) -> None:
        """Accepts connections, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def rpc(self, method: str, *params: Any) -> Any:
        body: Any = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}
        answer = requests.post(self.url, json=body, timeout=30).json()
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def mine(self, count: int = 1) -> None:
        self.rpc("anvil_mine", hex(count))

    def reorganise(self, depth: int) -> None:
        """The last blocks fall out; as many empty ones stand in their place."""
        self.rpc("anvil_reorg", depth, [])

    def deploy(self) -> str:
        """The registry, by anvil's first account."""
        w3 = Web3(HTTPProvider(self.url))
        contract = w3.eth.contract(abi=artifact()["abi"], bytecode=artifact()["bytecode"])
        transaction = contract.constructor().build_transaction(
            {"from": RICH.address, "nonce": w3.eth.get_transaction_count(RICH.address), "chainId": self._chain_id}
        )
        digest = w3.eth.send_raw_transaction(RICH.sign_transaction(transaction).raw_transaction)
        if not self._mines_itself():
            self.mine()
        return str(w3.eth.wait_for_transaction_receipt(digest, timeout=30)["contractAddress"])

    def fund(self, address: str) -> None:
        self.rpc("anvil_setBalance", address, hex(10**20))

    def _mines_itself(self) -> bool:
        return bool(self.rpc("anvil_getAutomine"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Anvil]:
    with Anvil(folder, **options) as anvil:
        yield anvil
