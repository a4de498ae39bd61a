"""The provenance log: append-only, provable, and any change to it is found (THREATS T20)."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from eth_account import Account
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from provenance.envelope import seal
from provenance.log import HEAD_TYPE, Log, open_head
from provenance.merkle import EMPTY_ROOT, leaf_hash, root_of
from provenance.migrations import SCHEMA
from wire.errors import ConfigError, ProvenanceError

SIGNER = Account.from_key("0x" + "11" * 32)
TABLES = "provenance_transactions, provenance_outbox, provenance_heads, provenance_nodes, provenance_entries"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'provenance.sqlite'}"
        return
    server = request.getfixturevalue("postgres_url")
    yield server
    engine = sa.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE IF EXISTS {TABLES}, provenance_log, {SCHEMA.version_table}"))
    engine.dispose()


@pytest.fixture
def log(url: str) -> Iterator[Log]:
    with contextlib.closing(Log(url)) as opened:
        yield opened


def entries(count: int, start: int = 0) -> list[bytes]:
    return [b"record %d" % i for i in range(start, start + count)]


def test_records_are_numbered_in_order_and_come_back(log: Log) -> None:
    assert log.append(entries(3)) == [0, 1, 2]
    assert log.append(entries(2, start=3)) == [3, 4]

    assert log.size() == 5
    assert log.entry(4) == b"record 4"
    assert list(log.entries(start=3)) == [(3, b"record 3"), (4, b"record 4")]
    assert log.root() == root_of(leaf_hash(entry) for entry in entries(5))
    assert log.root(2) == root_of(leaf_hash(entry) for entry in entries(2))
    assert log.find(b"record 2") == 2
    assert log.find(b"another") is None


def test_a_record_that_is_there_keeps_its_number(log: Log) -> None:
    log.append(entries(3))

    assert log.append([b"record 1", b"new", b"new", b"record 0"]) == [1, 3, 3, 0]
    assert log.size() == 4


def test_an_empty_log_has_the_empty_root_and_no_head(log: Log) -> None:
    assert log.root() == EMPTY_ROOT
    assert log.append([]) == []
    with pytest.raises(ProvenanceError, match="is empty"):
        log.sign_head(SIGNER)
    with pytest.raises(ProvenanceError, match="no record 0"):
        log.entry(0)


def test_every_record_is_proven_at_every_size(log: Log) -> None:
    log.append(entries(33))
    for size in range(1, 34):
        root = log.root(size)
        log.consistency(size).check(root, log.root())
        for index in range(0, size, 3):
            log.inclusion(index, size).check(b"record %d" % index, root)
    with pytest.raises(ProvenanceError, match="has 33 records, not 34"):
        log.inclusion(0, 34)
    with pytest.raises(ProvenanceError, match="no leaf 33"):
        log.inclusion(33)


def test_a_proof_holds_for_no_other_record(log: Log) -> None:
    log.append(entries(5))

    with pytest.raises(ProvenanceError, match="does not lead to the root"):
        log.inclusion(2).check(b"record 3", log.root())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.integers(0, 40), max_size=6))
def test_batches_make_no_difference(tmp_path_factory: pytest.TempPathFactory, batches: list[int]) -> None:
    with contextlib.closing(Log(f"sqlite:///{tmp_path_factory.mktemp('log') / 'log.sqlite'}")) as log:
        done = 0
        for count in batches:
            log.append(entries(count, start=done))
            done += count

        assert log.root() == root_of(leaf_hash(entry) for entry in entries(done))
        assert log.verify() == done


def test_a_head_is_signed_once_a_size_and_opens_for_anybody(log: Log) -> None:
    log.append(entries(4))
    head = log.sign_head(SIGNER)

    assert open_head(head.envelope) == head == log.sign_head(SIGNER)
    assert (head.log, head.size, head.root, head.signer) == (log.id, 4, log.root(), SIGNER.address)
    log.append(entries(1, start=4))
    assert [h.size for h in (log.sign_head(SIGNER), *log.heads())] == [5, 4, 5]


def test_the_log_keeps_its_id_when_it_is_opened_again(url: str) -> None:
    with contextlib.closing(Log(url)) as first, contextlib.closing(Log(url)) as second:
        assert first.id == second.id
        assert len(first.id) == 32


@pytest.mark.parametrize(
    "payload",
    [
        {},
        [],
        {"log": "00" * 32, "size": 0, "root": "00" * 32, "signedAt": "2026-01-01T00:00:00Z"},
        {"log": "00" * 32, "size": True, "root": "00" * 32, "signedAt": "2026-01-01T00:00:00Z"},
        {"log": "00" * 32, "size": 1.5, "root": "00" * 32, "signedAt": "2026-01-01T00:00:00Z"},
        {"log": "00" * 31, "size": 1, "root": "00" * 32, "signedAt": "2026-01-01T00:00:00Z"},
        {"log": "00" * 32, "size": 1, "root": 7, "signedAt": "2026-01-01T00:00:00Z"},
        {"log": "00" * 32, "size": 1, "root": "00" * 32, "signedAt": "yesterday"},
        {"log": "00" * 32, "size": 1, "root": "00" * 32, "signedAt": "2026-01-01T00:00:00Z", "more": 1},
    ],
)
def test_a_head_that_is_none_is_refused(payload: object) -> None:
    with pytest.raises(ProvenanceError, match="tree head"):
        open_head(seal(payload, HEAD_TYPE, SIGNER))


@pytest.mark.parametrize("table", ["provenance_entries", "provenance_nodes", "provenance_heads", "provenance_log"])
def test_T20_the_database_itself_refuses_to_rewrite_history(log: Log, table: str) -> None:
    log.append(entries(4))
    log.sign_head(SIGNER)
    column = {"provenance_nodes": "hash", "provenance_log": "id"}.get(table, "envelope")
    delete, update = f"DELETE FROM {table}", f"UPDATE {table} SET {column} = {column}"  # noqa: S608 - names from above
    for statement in (delete, update):
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), log.engine.begin() as connection:
            connection.execute(sa.text(statement))


@pytest.mark.parametrize(
    ("statement", "complaint"),
    [
        ("UPDATE provenance_entries SET envelope = 'forged' WHERE number = 2", "over records 2 to 3|before record"),
        ("UPDATE provenance_entries SET leaf = zeroblob(32) WHERE number = 6", "leaf|altered|over records"),
        ("UPDATE provenance_nodes SET hash = zeroblob(32) WHERE place > 281474976710656", "altered|over records"),
        ("DELETE FROM provenance_entries WHERE number = 3", "lacks record 3"),
        ("DELETE FROM provenance_entries WHERE number > 3", "cut off: it once had 7 records|belong to no record"),
        ("DELETE FROM provenance_nodes WHERE place = 281474976710656", "over records 0 to 1|hashes"),
        ("INSERT INTO provenance_nodes VALUES (4222124650659840, zeroblob(32))", "belong to no record"),
    ],
)
def test_T20_whatever_is_changed_in_the_database_is_found(tmp_path: Path, statement: str, complaint: str) -> None:
    with contextlib.closing(Log(f"sqlite:///{tmp_path / 'log.sqlite'}")) as log:
        log.append(entries(7))
        log.sign_head(SIGNER)
        assert log.verify() == 7
        with contextlib.closing(sqlite3.connect(tmp_path / "log.sqlite")) as vandal:
            for (name,) in vandal.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                vandal.execute(f"DROP TRIGGER {name}")
            vandal.execute(statement)
            vandal.commit()

        with pytest.raises(ProvenanceError, match=complaint):
            log.verify()


def test_T20_a_rewritten_log_gets_no_new_head(tmp_path: Path) -> None:
    with contextlib.closing(Log(f"sqlite:///{tmp_path / 'log.sqlite'}")) as log:
        log.append(entries(3))
        log.sign_head(SIGNER)
        with contextlib.closing(sqlite3.connect(tmp_path / "log.sqlite")) as vandal:
            vandal.execute("DROP TRIGGER provenance_entries_no_update")
            vandal.execute("UPDATE provenance_entries SET leaf = zeroblob(32) WHERE number = 2")
            vandal.commit()
        log.append(entries(2, start=3))

        with pytest.raises(ProvenanceError, match="the log was rewritten"):
            log.sign_head(SIGNER)


def append_some(url: str, name: int) -> None:
    with contextlib.closing(Log(url)) as log:
        for batch in range(5):
            log.append([b"%d/%d/%d" % (name, batch, i) for i in range(7)])


def test_processes_append_at_once_and_nothing_is_lost(url: str) -> None:
    Log(url).close()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=append_some, args=(url, name)) for name in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with contextlib.closing(Log(url)) as log:
        assert log.verify() == 3 * 5 * 7


def test_a_log_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ProvenanceError):
        Log(f"sqlite:///{tmp_path / 'file' / 'log.sqlite'}")
    with pytest.raises(ConfigError, match="the provenance log's URL must read"):
        Log("mysql://localhost/x")
