"""``cloister doctor`` against a real server over mutual TLS, and against what goes wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from typer.testing import CliRunner

from cloister.commands import doctor
from cloister.main import app
from protos import node_pb2
from wire.certificates import alternative_names, fingerprint_of, new_certificate
from wire.channels import Trust, server_credentials, server_options
from wire.identity import Identity, create_identity, load_identity

if TYPE_CHECKING:
    from collections.abc import Iterator


def describing(
    *, ahead_s: float = 0.0, draining: bool = False, version: str = "1.2.3"
) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
    """A node that only says what it is, by a clock that may be wrong."""

    def describe(_: node_pb2.DescribeRequest, __: grpc.ServicerContext) -> node_pb2.DescribeResponse:
        return node_pb2.DescribeResponse(
            version=version,
            torch_version="2.13.0",
            device="cpu",
            answered_at_unix_s=time.time() + ahead_s,
            draining=draining,
        )

    handler = grpc.unary_unary_rpc_method_handler(
        describe, node_pb2.DescribeRequest.FromString, node_pb2.DescribeResponse.SerializeToString
    )
    return {"Describe": handler}


@contextlib.contextmanager
def serve(node: Identity, trust: Trust, methods: dict[str, grpc.RpcMethodHandler[Any, Any]]) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(2), options=server_options())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("cloister.v1.Node", methods),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(node, trust))
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return create_identity(tmp_path_factory.mktemp("doctor") / "owner", role="owner", passphrase="for a test")


@pytest.fixture(scope="module")
def node() -> Identity:
    pem, key = new_certificate("a node", alternative_names([]), days=30)
    return Identity("node", "0x" + "0" * 40, pem, key, fingerprint_of(pem), Path("/nonexistent"))


@pytest.fixture
def trust(owner: Identity) -> Trust:
    return Trust(owner.folder / "tls.crt")


@pytest.fixture
def node_file(node: Identity, tmp_path: Path) -> Path:
    path = tmp_path / "node.crt"
    path.write_bytes(node.certificate_pem)
    return path


def examine(*arguments: str | Path) -> tuple[int, dict[str, dict[str, str]]]:
    ran = CliRunner().invoke(app, ["doctor", "--format", "json", *map(str, arguments)])
    rows: list[dict[str, Any]] = json.loads(ran.stdout)
    return ran.exit_code, {row["check"]: row for row in rows}


def test_this_machine_is_well() -> None:
    code, rows = examine()

    assert code == 0
    assert {name: row["status"] for name, row in rows.items()} == {
        "python": "ok",
        "torch": "ok",
        "threads": "ok",
        "disk": rows["disk"]["status"],
    }
    assert rows["disk"]["status"] in {"ok", "warn"}
    assert rows["torch"]["found"].startswith("2.")


def test_a_good_node_passes_every_check(owner: Identity, node: Identity, trust: Trust, node_file: Path) -> None:
    with serve(node, trust, describing()) as target:
        code, rows = examine("--identity", owner.folder, "--node", target, "--certificate", node_file)

    assert code == 0
    assert [rows[name]["status"] for name in ("identity", "reach node", "TLS", "describe", "clock")] == ["ok"] * 5
    assert "cloister 1.2.3, torch 2.13.0, cpu" in rows["describe"]["found"]


@pytest.mark.parametrize(
    ("ahead_s", "status", "code", "word"),
    [(0.0, "ok", 0, ""), (30.0, "warn", 0, "ahead"), (-30.0, "warn", 0, "behind"), (61.5, "fail", 1, "ahead"),
     (-4e9, "fail", 1, "behind"), (float("nan"), "fail", 1, "")],
)  # fmt: skip
def test_a_clock_that_is_wrong_is_found(
    owner: Identity, node: Identity, trust: Trust, node_file: Path, *, ahead_s: float, status: str, code: int, word: str
) -> None:
    with serve(node, trust, describing(ahead_s=ahead_s)) as target:
        ended, rows = examine("--identity", owner.folder, "--node", target, "--certificate", node_file)

    assert (rows["clock"]["status"], ended) == (status, code)
    assert word in rows["clock"]["found"]
    assert ("NTP" in rows["clock"]["advice"]) == (status != "ok")


def test_skew_that_the_round_trip_explains_is_no_skew() -> None:
    assert doctor._clock(answered_at_node=107.5, asked_at=100.0, answered_at=106.0).status == "ok"
    assert doctor._clock(answered_at_node=105.0, asked_at=100.0, answered_at=100.1).status == "warn"


def test_a_draining_node_is_a_warning(owner: Identity, node: Identity, trust: Trust, node_file: Path) -> None:
    with serve(node, trust, describing(draining=True)) as target:
        code, rows = examine("--identity", owner.folder, "--node", target, "--certificate", node_file)

    assert (code, rows["describe"]["status"]) == (0, "warn")
    assert "use another one" in rows["describe"]["advice"]


def test_a_node_that_does_not_trust_us_is_told_from_one_that_is_not_there(
    owner: Identity, node: Identity, node_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NODE_TIMEOUT_S", 0.7)

    with serve(node, Trust(), describing()) as target:
        code, rows = examine("--identity", owner.folder, "--node", target, "--certificate", node_file)

    assert (code, rows["reach node"]["status"], rows["TLS"]["status"]) == (1, "ok", "fail")
    assert "cloister keys trust" in rows["TLS"]["advice"]
    assert "describe" not in rows


def test_a_wrong_pin_fails_at_tls(owner: Identity, node: Identity, trust: Trust) -> None:
    with serve(node, trust, describing()) as target:
        code, rows = examine("--identity", owner.folder, "--node", target, "--pin", "0" * 64)

    assert (code, rows["TLS"]["status"]) == (1, "fail")
    assert "nothing was sent" in rows["TLS"]["advice"]


def test_a_nodes_identity_is_no_owners_and_that_is_said_before_anybody_is_dialled(tmp_path: Path) -> None:
    create_identity(tmp_path / "node", role="node", passphrase="of no use", kdf_cost=2)

    code, rows = examine("--identity", tmp_path / "node", "--node", f"localhost:1#sha256:{'a' * 64}")

    assert (code, rows["identity"]["status"]) == (1, "fail")
    assert "is a node's, and only owners dial out" in str(rows["identity"])


def test_where_nobody_listens_the_port_is_the_matter(owner: Identity) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        code, rows = examine(
            "--identity", owner.folder, "--node", f"127.0.0.1:{reserved.getsockname()[1]}", "--pin", "0" * 64
        )

    assert (code, rows["reach node"]["status"]) == (1, "fail")
    assert "that the node runs" in rows["reach node"]["advice"]
    assert "TLS" not in rows


def test_a_server_that_is_no_node_fails_at_describe(
    owner: Identity, node: Identity, trust: Trust, node_file: Path
) -> None:
    with serve(node, trust, {}) as target:  # answers UNIMPLEMENTED
        code, rows = examine("--identity", owner.folder, "--node", target, "--certificate", node_file)

    assert (code, rows["TLS"]["status"], rows["describe"]["status"]) == (1, "ok", "fail")


def test_T23_a_key_that_others_can_read_is_found(owner: Identity, tmp_path: Path) -> None:
    folder = shutil.copytree(owner.folder, tmp_path / "copy")
    (folder / "tls.key").chmod(0o644)

    code, rows = examine("--identity", folder)

    assert (code, rows["identity"]["status"]) == (1, "fail")
    assert rows["identity"]["advice"] == f"run `chmod 600 {folder / 'tls.key'}`"


@pytest.mark.parametrize(("days", "status", "code"), [(20, "warn", 0), (-0.02, "fail", 1)])
def test_a_certificate_that_expires_soon_or_has_expired_is_found(
    owner: Identity, tmp_path: Path, *, days: float, status: str, code: int
) -> None:
    folder = shutil.copytree(owner.folder, tmp_path / "copy")
    pem, key = new_certificate("soon over", alternative_names([]), days=days)  # type: ignore[arg-type]  # part of a day
    (folder / "tls.crt").write_bytes(pem)
    (folder / "tls.key").write_bytes(key)

    ended, rows = examine("--identity", folder)

    assert (rows["identity"]["status"], ended) == (status, code)
    assert "make a new identity" in rows["identity"]["advice"]


def test_T26_what_a_node_says_of_itself_is_shown_not_obeyed(
    owner: Identity, node: Identity, trust: Trust, node_file: Path
) -> None:
    with serve(node, trust, describing(version="[red]\x1b[2J")) as target:
        arguments = ["doctor", "--identity", str(owner.folder), "--node", target, "--certificate", str(node_file)]
        ran = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})

    assert "cloister [red]\ufffd[2J, torch" in ran.stdout
    assert "\x1b[2J" not in ran.stdout


@pytest.mark.parametrize(("free", "status", "code"), [(2**40, "ok", 0), (2**32, "warn", 0), (2**27, "fail", 1)])
def test_a_disk_that_is_full_is_found(monkeypatch: pytest.MonkeyPatch, free: int, status: str, code: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))

    ended, rows = examine()

    assert (rows["disk"]["status"], ended) == (status, code)


def test_a_folder_that_does_not_exist_yet_is_checked_by_the_one_above(tmp_path: Path) -> None:
    _, rows = examine("--state-dir", tmp_path / "a" / "b")

    assert rows["disk"]["found"].endswith(f"free in {tmp_path}")


def test_a_missing_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)

    code, rows = examine()

    assert (code, rows["torch"]["status"]) == (1, "fail")
    assert "constraints.txt" in rows["torch"]["advice"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--node", "localhost:1"], "--node needs --identity"),
        (["--node", "localhost:1", "--identity", "x"], "exactly one of --pin"),
        (["--node", "localhost:1", "--identity", "x", "--pin", "0" * 64, "--ca", "y"], "exactly one of --pin"),
        (["--pin", "0" * 64], "give --node HOST:PORT too"),
        (["--node", "nowhere", "--identity", "x", "--pin", "0" * 64], "is no address of a node"),
        (["--node", "localhost:1", "--identity", "x", "--pin", "00"], "a pin is sha256: and 64 hex digits"),
    ],
)
def test_options_that_do_not_fit_together_end_with_3(arguments: list[str], complaint: str) -> None:
    ran = CliRunner().invoke(app, ["doctor", *arguments])

    assert (ran.exit_code, ran.stdout) == (3, "")
    assert complaint in ran.stderr


def test_the_identity_is_read_without_its_passphrase(owner: Identity) -> None:
    assert load_identity(owner.folder).fingerprint in examine("--identity", owner.folder)[1]["identity"]["found"]
