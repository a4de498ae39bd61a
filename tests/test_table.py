"""The node's session table, on SQLite and on PostgreSQL."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import sqlite3
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from threading import Barrier
from typing import Final

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from server_side import table as table_module
from server_side.migrations import SCHEMA
from server_side.table import RETENTION, OwnerUsage, SessionRow, SessionState, SessionTable
from tests.disks import small_disk
from wire import database as database_module
from wire.errors import ConfigError, SessionNotFoundError, SessionReusedError, SpecRejectedError, StorageError

ROOT: Final = Path(__file__).parent.parent
NODE: Final = "1f" * 32
OTHER_NODE: Final = "2e" * 32
OWNER: Final = "ab" * 32
OTHER_OWNER: Final = "cd" * 32
NOON: Final = datetime(2026, 5, 4, 12, 0, 0, 250_000, tzinfo=UTC)


def row(
    session_id: bytes | None = None,
    *,
    node: str = NODE,
    owner: str = OWNER,
    next_step: int = 0,
    reserved_bytes: int = 4096,
    parameters: int = 1024,
    opened_at: datetime = NOON,
) -> SessionRow:
    return SessionRow(
        session_id=session_id or secrets.token_bytes(16),
        node=node,
        owner=owner,
        spec_sha256=bytes(range(32)),
        program_sha256=bytes(range(32, 64)),
        next_step=next_step,
        reserved_bytes=reserved_bytes,
        parameters=parameters,
        opened_at=opened_at,
        last_used_at=opened_at,
    )


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/sessions.sqlite"


@pytest.fixture(scope="module")
def postgresql_database(postgres_url: str) -> Iterator[str]:
    name = f"sessions_{uuid.uuid4().hex}"
    server = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield sa.make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with server.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        server.dispose()


@pytest.fixture
def postgresql_url(postgresql_database: str) -> str:
    execute(postgresql_database, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return postgresql_database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
def table(url: str) -> Iterator[SessionTable]:
    with contextlib.closing(SessionTable(url)) as opened:
        yield opened


def execute(url: str, sql: str, *, hold: Barrier | None = None) -> None:
    """Runs one statement behind the table's back."""
    engine = sa.create_engine(url)
    try:
        with engine.begin() as connection:
            connection.execute(sa.text(sql))
            if hold is not None:
                hold.wait()
                hold.wait()
    finally:
        engine.dispose()


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


# What the table remembers


def test_a_session_comes_back_as_it_was_written(table: SessionTable) -> None:
    written = row(next_step=7)

    table.open(written)

    assert table.find(written.session_id) == written


def test_a_session_that_never_was_is_not_found(table: SessionTable) -> None:
    assert table.find(bytes(16)) is None


def test_times_come_back_in_utc_from_whatever_zone_they_were_given_in(table: SessionTable) -> None:
    written = row(opened_at=NOON.astimezone(timezone(timedelta(hours=5, minutes=45))))
    table.open(written)

    found = table.find(written.session_id)

    assert found is not None
    assert found.opened_at == NOON
    assert found.opened_at.utcoffset() == timedelta(0)


def test_the_table_survives_its_process(url: str) -> None:
    written = row()
    with contextlib.closing(SessionTable(url)) as first:
        first.open(written)

    with contextlib.closing(SessionTable(url)) as second:
        assert second.find(written.session_id) == written


def test_touching_a_session_notes_its_step_and_time(table: SessionTable) -> None:
    written = row(next_step=3)
    table.open(written)

    table.touch(written.session_id, 9, NOON + timedelta(minutes=1))

    expected = dataclasses.replace(written, next_step=9, last_used_at=NOON + timedelta(minutes=1))
    assert table.find(written.session_id) == expected


def test_a_late_touch_does_not_take_the_step_back(table: SessionTable) -> None:
    written = row()
    table.open(written)
    table.touch(written.session_id, 9, NOON)

    table.touch(written.session_id, 8, NOON)

    found = table.find(written.session_id)
    assert found is not None
    assert found.next_step == 9


def test_a_session_that_ended_cannot_be_touched(table: SessionTable) -> None:
    written = row()
    table.open(written)
    table.end(written.session_id, SessionState.CLOSED)

    with pytest.raises(SessionNotFoundError, match=f"no open session {written.session_id.hex()}; open a new one"):
        table.touch(written.session_id, 1, NOON)


def test_the_first_end_of_a_session_counts(table: SessionTable) -> None:
    written = row()
    table.open(written)

    ended = table.end(written.session_id, SessionState.EXPIRED, NOON)
    again = table.end(written.session_id, SessionState.CLOSED, NOON + timedelta(hours=1))

    assert (ended, again) == (True, False)
    expected = dataclasses.replace(written, state=SessionState.EXPIRED, ended_at=NOON)
    assert table.find(written.session_id) == expected


def test_a_session_cannot_end_as_open(table: SessionTable) -> None:
    with pytest.raises(ValueError, match="closed, expired or lost"):
        table.end(bytes(16), SessionState.OPEN)


def test_T07_a_node_that_starts_again_marks_its_own_open_sessions_lost(table: SessionTable) -> None:
    mine, closed, others = row(), row(), row(node=OTHER_NODE)
    for each in (mine, closed, others):
        table.open(each)
    table.end(closed.session_id, SessionState.CLOSED, NOON)

    lost = table.mark_lost(NODE, NOON)

    assert lost == 1
    states = [found.state for each in (mine, closed, others) if (found := table.find(each.session_id))]
    assert states == [SessionState.LOST, SessionState.CLOSED, SessionState.OPEN]


def test_open_sessions_lists_a_nodes_own_oldest_first(table: SessionTable) -> None:
    younger, older = row(opened_at=NOON + timedelta(seconds=1)), row()
    ended, elsewhere = row(), row(node=OTHER_NODE)
    for each in (younger, older, ended, elsewhere):
        table.open(each)
    table.end(ended.session_id, SessionState.CLOSED)

    assert table.open_sessions(NODE) == (older, younger)


def test_an_owners_usage_adds_up_its_open_sessions_on_all_nodes(table: SessionTable) -> None:
    ended = row(reserved_bytes=5)
    for each in (
        row(reserved_bytes=2**61, parameters=3),
        row(reserved_bytes=2**61, parameters=4, node=OTHER_NODE),
        row(owner=OTHER_OWNER),
        ended,
    ):
        table.open(each)
    table.end(ended.session_id, SessionState.CLOSED)

    assert table.owner_usage(OWNER) == OwnerUsage(sessions=2, reserved_bytes=2**62, parameters=7)
    assert table.owner_usage("ef" * 32) == OwnerUsage()


# Ids that are spent


@pytest.mark.parametrize("how", [None, *(state for state in SessionState if state is not SessionState.OPEN)])
def test_T04_an_id_is_never_opened_twice_however_its_session_ended(
    table: SessionTable, how: SessionState | None
) -> None:
    written = row()
    table.open(written)
    if how is not None:
        table.end(written.session_id, how)

    with pytest.raises(
        SessionReusedError, match=f"^session id {written.session_id.hex()} was used before; draw a new one$"
    ):
        table.open(row(written.session_id, owner=OTHER_OWNER, node=OTHER_NODE))

    found = table.find(written.session_id)
    assert found is not None
    assert found.owner == OWNER


def test_T04_of_two_threads_with_the_same_id_exactly_one_wins(table: SessionTable) -> None:
    for _ in range(10):
        session_id, start = secrets.token_bytes(16), Barrier(2)

        def attempt(owner: str, session_id: bytes = session_id, start: Barrier = start) -> str | None:
            start.wait()
            try:
                table.open(row(session_id, owner=owner))
            except SessionReusedError:
                return None
            return owner

        with ThreadPoolExecutor(2) as pool:
            winners = [owner for owner in pool.map(attempt, (OWNER, OTHER_OWNER)) if owner]

        found = table.find(session_id)
        assert found is not None
        assert winners == [found.owner]


def test_eight_threads_open_and_touch_sessions_of_their_own(table: SessionTable) -> None:
    def work(_: int) -> list[bytes]:
        mine = [row() for _ in range(5)]
        for each in mine:
            table.open(each)
            table.touch(each.session_id, 1, NOON)
        return [each.session_id for each in mine]

    with ThreadPoolExecutor(8) as pool:
        opened = [session_id for mine in pool.map(work, range(8)) for session_id in mine]

    listed = table.open_sessions(NODE)
    assert sorted(each.session_id for each in listed) == sorted(opened)
    assert {each.next_step for each in listed} == {1}


def test_pruning_forgets_only_what_ended_long_enough_ago(table: SessionTable) -> None:
    now = datetime.now(UTC)
    ancient, recent, running = row(), row(), row(opened_at=NOON - timedelta(days=4000))
    for each in (ancient, recent, running):
        table.open(each)
    table.end(ancient.session_id, SessionState.CLOSED, now - RETENTION - timedelta(hours=1))
    table.end(recent.session_id, SessionState.CLOSED, now - RETENTION + timedelta(hours=1))

    forgotten = table.prune(before=now + timedelta(days=1))

    assert forgotten == 1
    assert [table.find(each.session_id) is None for each in (ancient, recent, running)] == [True, False, False]


def test_pruning_keeps_what_ended_after_the_time_asked_for(table: SessionTable) -> None:
    written = row()
    table.open(written)
    table.end(written.session_id, SessionState.CLOSED, NOON - RETENTION * 3)

    assert table.prune(before=NOON - RETENTION * 4) == 0
    assert table.prune(before=NOON - RETENTION * 2) == 1


# What does not fit


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("session_id", bytes(15), "session_id has 15 bytes; it must have 16"),
        ("spec_sha256", b"", "spec_sha256 has 0 bytes; it must have 32"),
        ("program_sha256", bytes(33), "program_sha256 has 33 bytes; it must have 32"),
        ("next_step", 2**64 - 1, f"next_step is {2**64 - 1}; this node counts from 0 to {2**62}"),
        ("next_step", -1, f"next_step is -1; this node counts from 0 to {2**62}"),
        ("reserved_bytes", 2**63, f"reserved_bytes is {2**63}; this node counts from 0 to {2**62}"),
        ("parameters", -5, f"parameters is -5; this node counts from 0 to {2**62}"),
    ],
)
def test_T02_a_row_that_the_table_cannot_hold_is_refused(field: str, value: object, complaint: str) -> None:
    valid = dataclasses.asdict(row())

    with pytest.raises(SpecRejectedError) as refused:
        SessionRow(**valid | {field: value})

    assert str(refused.value) == complaint


def test_the_largest_row_fits(table: SessionTable) -> None:
    largest = row(next_step=2**62, reserved_bytes=2**62, parameters=2**62)
    table.open(largest)

    table.touch(largest.session_id, 2**62 + 1, NOON)

    assert table.owner_usage(OWNER) == OwnerUsage(sessions=1, reserved_bytes=2**62, parameters=2**62)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("state = 'asleep', ended_at = opened_at", "node_sessions_state_known"),
        ("state = 'closed'", "node_sessions_ended_once"),
        ("ended_at = opened_at", "node_sessions_ended_once"),
        ("next_step = -1", "node_sessions_next_step_counts"),
        ("reserved_bytes = -1", "node_sessions_reserved_bytes_counts"),
        ("parameters = -1", "node_sessions_parameters_counts"),
        ("node = 'me'", "node_sessions_node_size"),
        ("owner = ''", "node_sessions_owner_size"),
        ("session_id = spec_sha256", "node_sessions_session_id_size"),
        ("spec_sha256 = session_id", "node_sessions_spec_size"),
        ("program_sha256 = session_id", "node_sessions_program_size"),
    ],
)
def test_the_database_itself_refuses_nonsense(table: SessionTable, url: str, change: str, constraint: str) -> None:
    table.open(row())

    with pytest.raises(sa.exc.IntegrityError, match=constraint):
        execute(url, f"UPDATE node_sessions SET {change}")  # noqa: S608 - our own words


def test_a_time_without_its_zone_is_a_defect(table: SessionTable) -> None:
    written = row()
    table.open(written)

    with pytest.raises(StorageError) as refused:
        table.touch(written.session_id, 1, NOON.replace(tzinfo=None))

    assert "a time without its zone" in str(refused.value.__cause__)


# Opening a database


def test_the_migrated_schema_is_the_one_that_the_code_uses(table: SessionTable, url: str) -> None:
    assert table.find(bytes(16)) is None
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        options = {"version_table": SCHEMA.version_table, "compare_type": True}
        context = MigrationContext.configure(connection, opts=options)
        difference = compare_metadata(context, table_module._SESSIONS.metadata)
    engine.dispose()

    assert difference == []


def test_a_database_of_a_newer_version_is_refused_and_left_alone(url: str) -> None:
    written = row()
    with contextlib.closing(SessionTable(url)) as table:
        table.open(written)
    execute(url, f"UPDATE {SCHEMA.version_table} SET version_num = '9999'")  # noqa: S608 - our own words

    with pytest.raises(
        StorageError,
        match=r"newer Cloister \(schema 9999, this one knows up to 0001\); upgrade Cloister or name another",
    ):
        SessionTable(url)

    execute(url, f"UPDATE {SCHEMA.version_table} SET version_num = '0001'")  # noqa: S608 - our own words
    with contextlib.closing(SessionTable(url)) as table:
        assert table.find(written.session_id) == written


OPEN_AT_ONCE: Final = """
import sys
from server_side.table import SessionTable
print("ready", flush=True)
sys.stdin.readline()
SessionTable(sys.argv[1]).close()
print("done", flush=True)
"""


def test_two_processes_that_start_at_once_both_open_one_new_database(url: str) -> None:
    command = [sys.executable, "-W", "error", "-c", OPEN_AT_ONCE, url]
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        answers = [process.communicate()[0] for process in started]

    assert answers == ["done\n", "done\n"]


def test_a_new_file_that_another_process_holds_is_waited_for(sqlite_url: str, tmp_path: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(tmp_path / "sessions.sqlite", isolation_level=None)) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        other.execute("BEGIN IMMEDIATE")  # not yet in WAL mode: SQLite itself would not wait for this one
        opening = pool.submit(SessionTable, sqlite_url)
        with pytest.raises(TimeoutError):
            opening.result(timeout=0.3)

        other.execute("COMMIT")

        opening.result(timeout=10).close()


def test_threads_that_open_one_new_database_at_once_all_succeed(url: str) -> None:
    start = Barrier(6)

    def attempt(_: int) -> None:
        start.wait()
        SessionTable(url).close()

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(attempt, range(6))) == [None] * 6


def test_threads_that_open_databases_of_their_own_do_not_mix_them_up(tmp_path: Path) -> None:
    start = Barrier(6)

    def attempt(number: int) -> tuple[SessionRow, ...]:
        start.wait()
        with contextlib.closing(SessionTable(f"sqlite:///{tmp_path}/{number}.sqlite")) as table:
            return table.open_sessions(NODE)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(attempt, range(6))) == [()] * 6


@pytest.mark.parametrize(
    "wrong",
    [
        "not a url with hunter2",
        "mysql://root:hunter2@host/database",
        "postgresql://node:hunter2@host/database",
        "postgresql+psycopg://node:hunter2@host:port/database",
        "",
    ],
)
def test_a_url_of_another_kind_is_refused_without_being_repeated(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"must read sqlite:////path/to/file\.sqlite or postgresql") as refused:
        SessionTable(wrong)

    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("wrong", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_that_dies_with_the_process_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="the session table must outlive the process"):
        SessionTable(wrong)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=rf"{tmp_path}/missing/s\.sqlite: No such file or directory; make its folder"
    ):
        SessionTable(f"sqlite:///{tmp_path}/missing/s.sqlite")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "s.sqlite"
    file.write_bytes(b"my only copy of something else" * 100)

    with pytest.raises(StorageError, match=r"s\.sqlite: file is not a database"):
        SessionTable(f"sqlite:///{file}")

    assert file.read_bytes() == b"my only copy of something else" * 100


def test_T23_an_unreachable_server_is_named_without_its_passwords() -> None:
    with pytest.raises(StorageError, match="Connection refused") as refused:
        SessionTable("postgresql+psycopg://node:hunter2@127.0.0.1:1/sessions?password=hunter3")

    assert "postgresql+psycopg://node:***@127.0.0.1:1/sessions" in str(refused.value)
    assert "hunter" not in str(refused.value)


def test_a_new_sqlite_file_is_for_its_owners_eyes_only(sqlite_url: str, tmp_path: Path) -> None:
    with contextlib.closing(SessionTable(sqlite_url)) as table:
        table.open(row())
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}

    assert modes == dict.fromkeys(["sessions.sqlite", "sessions.sqlite-wal", "sessions.sqlite-shm"], 0o600)


def test_sqlite_waits_for_the_disk_at_every_commit(sqlite_url: str) -> None:
    with contextlib.closing(SessionTable(sqlite_url)) as table, table._transaction("looking") as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
        }

    assert settings == {"journal_mode": "wal", "synchronous": 2, "busy_timeout": 10_000, "foreign_keys": 1}


# Databases that fail


def test_a_failing_database_tells_the_operator_why_and_the_peer_only_what_to_do(
    table: SessionTable, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    execute(url, "DROP TABLE node_sessions")

    with caplog.at_level(logging.ERROR), pytest.raises(StorageError) as refused:
        table.open(row())

    assert str(refused.value) == "the node's session table fails; try again later or take another node"
    assert "opening a session failed" in caplog.text
    assert "node_sessions" in caplog.text
    assert "INSERT" not in caplog.text


def test_a_lock_that_is_never_given_back_becomes_a_storage_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "_WAIT_S", 1)
    written, held = row(), Barrier(2, timeout=20)  # should the table wait for ever, the lock is given back
    lock = "BEGIN IMMEDIATE" if url.startswith("sqlite") else "LOCK TABLE node_sessions"
    with contextlib.closing(SessionTable(url)) as table, ThreadPoolExecutor(1) as pool:
        holder = pool.submit(execute, url, lock, hold=held)
        held.wait()

        with pytest.raises(StorageError):
            table.open(written)

        held.wait()
        holder.result()
        table.open(written)
        assert table.find(written.session_id) == written


def test_a_postgresql_that_dropped_its_connections_is_found_again(postgresql_url: str) -> None:
    written = row()
    with contextlib.closing(SessionTable(postgresql_url)) as table:
        table.open(written)
        everyone_else = "pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
        execute(postgresql_url, f"SELECT pg_terminate_backend(pid) FROM {everyone_else}")  # noqa: S608 - our own words

        assert table.find(written.session_id) == written


def test_a_closed_table_says_that_the_node_shuts_down(table: SessionTable) -> None:
    table.close()

    with pytest.raises(StorageError, match="this node is shutting down; take another node"):
        table.find(bytes(16))


def open_until_refused(table: SessionTable, opened: list[SessionRow]) -> None:
    """Opens sessions and lists them; the last one listed is the one that was refused."""
    for _ in range(1000):
        opened.append(row())
        table.open(opened[-1])


def test_T07_a_full_disk_refuses_sessions_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before, after = row(), row()
    opened: list[SessionRow] = []
    with small_disk(tmp_path), contextlib.closing(SessionTable(f"sqlite:///{tmp_path}/s.sqlite")) as table:
        table.open(before)
        with (tmp_path / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))

        with pytest.raises(StorageError, match="the node's session table fails"):
            open_until_refused(table, opened)
        assert "full" in caplog.text or "disk I/O error" in caplog.text
        refused = opened.pop()
        assert table.find(refused.session_id) is None
        assert set(table.open_sessions(NODE)) == {before, *opened}

        (tmp_path / "ballast").unlink()
        table.open(after)
        assert set(table.open_sessions(NODE)) == {before, *opened, after}


def test_T07_a_database_at_its_size_limit_refuses_sessions_and_loses_none(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[SessionRow] = []
    with contextlib.closing(SessionTable(sqlite_url)) as table:
        with table._transaction("shrinking") as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

        with pytest.raises(StorageError, match="the node's session table fails"):
            open_until_refused(table, opened)

        refused = opened.pop()
        assert "database or disk is full" in caplog.text
        assert table.find(refused.session_id) is None
        assert set(table.open_sessions(NODE)) == set(opened)


WRITE_FOREVER: Final = """
import sys, secrets
from datetime import UTC, datetime
from server_side.table import SessionRow, SessionTable
table = SessionTable(sys.argv[1])
while True:
    session_id, now = secrets.token_bytes(16), datetime.now(UTC)
    table.open(SessionRow(session_id, "1f" * 32, "ab" * 32, bytes(32), bytes(32), 0, 1, 1, now, now))
    table.touch(session_id, 5, now)
    print(session_id.hex(), flush=True)
"""


def test_T07_killed_in_the_middle_of_writing_the_table_opens_with_every_acknowledged_row(url: str) -> None:
    acknowledged: list[str] = []
    for rows in (1, 7, 20):
        with run_python(WRITE_FOREVER, url) as writer:
            assert writer.stdout is not None
            acknowledged += [writer.stdout.readline().strip() for _ in range(rows)]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [line.strip() for line in writer.stdout.read().splitlines(keepends=True) if "\n" in line]

        with contextlib.closing(SessionTable(url)) as table:
            found = {each.session_id.hex(): each.next_step for each in table.open_sessions(NODE)}
        assert set(acknowledged) <= set(found)
        assert {found[session_id] for session_id in acknowledged} == {5}
