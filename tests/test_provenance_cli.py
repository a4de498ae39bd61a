"""``cloister dataset`` and ``cloister anchor``, as users run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cloister.main import app
from provenance.log import Log
from wire.identity import create_identity

SMALL_KDF = 2  # what the tests encrypt guards nothing


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for name in ("1.txt", "2.txt", "4.txt"):
        (tmp_path / "scans" / name).write_text(f"patient {name}")
    return tmp_path / "scans"


def test_a_data_set_is_committed_to_and_one_record_opened_and_checked(scans: Path, tmp_path: Path) -> None:
    kept, proof = tmp_path / "kept", tmp_path / "2.proof"
    made = run("dataset", "commit", scans, "--out", kept, "--format", "json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert (told["records"], told["order"]) == (3, "name")

    assert run("dataset", "prove", scans, "2.txt", "--commitment", kept, "--out", proof).exit_code == 0
    checked = ("dataset", "check", proof, "--commitment", kept)
    good = run(*checked, "--record", scans / "2.txt", "--format", "json")
    assert (good.exit_code, json.loads(good.stdout)["root"]) == (0, told["root"])
    bad = run(*checked, "--record", scans / "1.txt")
    assert (bad.exit_code, "not the one that was committed to" in bad.output) == (1, True)
    assert "patient" not in proof.read_text()


def test_absence_is_proven_and_presence_is_not_hidden(scans: Path, tmp_path: Path) -> None:
    kept, proof = tmp_path / "kept", tmp_path / "3.proof"
    run("dataset", "commit", scans, "--out", kept)

    assert run("dataset", "prove-absent", scans, "3.txt", "--commitment", kept, "--out", proof).exit_code == 0
    assert run("dataset", "check", proof, "--commitment", kept).exit_code == 0
    there = run("dataset", "prove-absent", scans, "2.txt", "--commitment", kept, "--out", proof)
    assert (there.exit_code, "is in the data set" in there.output) == (3, True)


def test_a_factorys_items_are_committed_to_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cohort.py").write_text("def make():\n    return [(1, 'a'), (2, 'b')]\n")
    monkeypatch.syspath_prepend(tmp_path)
    kept = tmp_path / "kept"

    assert run("dataset", "commit", "cohort:make", "--out", kept).exit_code == 0
    proven = run("dataset", "prove", "cohort:make", "1", "--commitment", kept, "--out", tmp_path / "proof")
    assert proven.exit_code == 0, proven.output


def test_a_log_is_anchored_on_the_dev_chain_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'log.sqlite'}"
    create_identity(tmp_path / "owner", role="owner", passphrase="invented", kdf_cost=SMALL_KDF)
    monkeypatch.setenv("CLOISTER_PASSPHRASE", "invented")
    empty = run("anchor", "status", "--log", url)
    assert (empty.exit_code, "nothing was anchored yet" in empty.output) == (0, True)
    log = Log(url)
    log.append([b"one", b"two"])

    chain = ("--chain-file", tmp_path / "chain.sqlite")
    pushed = run("anchor", "push", "--identity", tmp_path / "owner", "--log", url, *chain, "--format", "json")

    assert pushed.exit_code == 0, pushed.output
    (line,) = json.loads(pushed.stdout)
    assert (line["size"], line["state"], line["root"]) == (2, "final", log.root().hex())
    shown = run("anchor", "status", "--log", url, "--format", "json")
    assert json.loads(shown.stdout) == [line]
    log.close()


def test_a_chain_without_its_registry_and_id_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'log.sqlite'}"
    create_identity(tmp_path / "owner", role="owner", passphrase="invented", kdf_cost=SMALL_KDF)
    monkeypatch.setenv("CLOISTER_PASSPHRASE", "invented")
    log = Log(url)
    log.append([b"one"])
    log.close()

    refused = run("anchor", "push", "--identity", tmp_path / "owner", "--log", url, "--to", "http://127.0.0.1:1")

    assert (refused.exit_code, "--registry ADDRESS and --chain-id" in refused.output) == (3, True)
