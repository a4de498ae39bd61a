"""The contract that the package ships is the one whose sources stand in contracts/."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from provenance.chain import artifact

ROOT = Path(__file__).resolve().parents[1]
CONTRACTS = ROOT / "contracts"
SHIPPED = ROOT / "provenance" / "artifacts" / "ProvenanceRegistry.json"


def test_the_artifact_was_compiled_from_these_sources() -> None:
    digest = hashlib.sha256()
    for path in sorted((CONTRACTS / "src").glob("*.sol")):
        digest.update(f"{path.name}\n{path.read_text('utf-8')}\n".encode())

    assert artifact()["sources"] == digest.hexdigest(), (
        "run `node tools/build.js ../provenance/artifacts` in contracts/"
    )


def test_the_compiler_is_the_one_that_is_pinned() -> None:
    package = json.loads((CONTRACTS / "package.json").read_text("utf-8"))
    versions = package["dependencies"] | package["devDependencies"]
    lock = json.loads((CONTRACTS / "package-lock.json").read_text("utf-8"))["packages"]

    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())
    assert {name: lock[f"node_modules/{name}"]["version"] for name in versions} == versions
    assert artifact()["compiler"].startswith(versions["solc"] + "+")
    assert f"pragma solidity {versions['solc']};" in (CONTRACTS / "src" / "ProvenanceRegistry.sol").read_text("utf-8")


@pytest.mark.skipif(
    shutil.which("node") is None or not (CONTRACTS / "node_modules" / "solc").exists(),
    reason="run npm ci in contracts/",
)
def test_compiling_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run(["node", CONTRACTS / "tools" / "build.js", tmp_path], check=True, capture_output=True)

    assert (tmp_path / SHIPPED.name).read_bytes() == SHIPPED.read_bytes()


def test_what_others_build_on_keeps_its_names() -> None:
    """The contract's ABI is frozen: auditors and other programs call it."""
    signatures = {
        f"{item['type']} {item['name']}({','.join(part['type'] for part in item['inputs'])})"
        for item in artifact()["abi"]
    }

    assert signatures == {
        "error AlreadyOpen(bytes32)",
        "error NoKey(bytes32)",
        "error NotInControl(bytes32,address)",
        "error NotLarger(bytes32,uint64,uint64)",
        "error NothingAnchored(bytes32)",
        "event HeadAnchored(bytes32,bytes32,uint64)",
        "event HeadPinned(bytes32,bytes32)",
        "event KeyRevoked(bytes32,address)",
        "event KeyRotated(bytes32,address,address)",
        "event LogOpened(bytes32,address,address)",
        "event RecoveryChanged(bytes32,address,address)",
        "function anchor(bytes32,uint64,bytes32)",
        "function changeRecovery(bytes32,address)",
        "function controlOf(bytes32)",
        "function headOf(bytes32,bytes32)",
        "function idOf(address,bytes32)",
        "function latestOf(bytes32)",
        "function openLog(bytes32,address,address)",
        "function pin(bytes32)",
        "function revokeKey(bytes32)",
        "function rotateKey(bytes32,address)",
    }


def test_a_head_costs_at_most_50_000_gas() -> None:
    gas = json.loads((CONTRACTS / "snapshots" / "ProvenanceRegistry.json").read_text("utf-8"))

    assert int(gas["anchor"]) <= 50_000
