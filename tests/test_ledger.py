"""The privacy ledger: durable, chained, per data set, and never behind what it once said (THREATS T11)."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from privacy.accounting import (
    Event,
    Gaussian,
    RandomizedResponse,
    Relation,
    SampledGaussian,
    Unbounded,
    epsilon_of,
)
from privacy.ledger import Budget, Ledger, Release, event_from_json, event_to_json
from privacy.migrations import SCHEMA
from wire.errors import BudgetSpentError, ConfigError, LedgerError

GAUSSIAN = Gaussian(sensitivity=1.0, sensitivity_replace=2.0, noise=4.0)
DELTA = 1e-5
REPLACE = Relation.REPLACE_ONE


def release(event: Event = GAUSSIAN) -> Release:
    return Release(kind="activations", treatment="rows", event=event)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'privacy.sqlite'}"
        return
    server = request.getfixturevalue("postgres_url")
    yield server
    engine = sa.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sa.text(f"DROP TABLE IF EXISTS privacy_releases, privacy_data_sets, {SCHEMA.version_table}"))
    engine.dispose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "privacy.sqlite"


def test_T11_releases_on_one_data_set_add_up_over_runs_and_processes(url: str) -> None:
    with contextlib.closing(Ledger(url)) as first:
        first.spend("a", "run-1", [release()])
        first.spend("b", "run-1", [release()])
    with contextlib.closing(Ledger(url)) as second:
        second.spend("a", "run-2", [release(), release()])

        assert second.spent("a", delta=DELTA).epsilon == pytest.approx(epsilon_of([GAUSSIAN] * 3, DELTA, REPLACE))
        assert second.spent("b", delta=DELTA).epsilon == pytest.approx(epsilon_of([GAUSSIAN], DELTA, REPLACE))
        assert second.data_sets() == ["a", "b"]
        assert second.verify() == 4


def test_a_release_beyond_the_budget_is_refused_and_not_written(url: str) -> None:
    budget = Budget(epsilon_of([GAUSSIAN] * 2, DELTA, REPLACE), DELTA, REPLACE)
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.spend("a", "run", [release()], budget=budget)
        ledger.spend("a", "run", [release()], budget=budget)
        with pytest.raises(BudgetSpentError, match=r"would bring a from ε .* to .* of .* Raise privacy.epsilon"):
            ledger.spend("a", "run", [release()], budget=budget)

        assert len(ledger.entries("a")) == 2
        ledger.spend("b", "run", [release()], budget=budget)  # another data set has a budget of its own


def test_T11_records_that_were_released_keep_their_name(url: str) -> None:
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.check_name("other", "sha256:1")  # nothing left yet, and any name will do
        ledger.spend("a", "run", [release()], content="sha256:1")
        ledger.spend("a", "run", [release()], content="sha256:2")  # it grew
        for content in ("sha256:1", "sha256:2"):
            with pytest.raises(ConfigError, match=r'in the ledger already, as a: .* data_set = "a"'):
                ledger.spend("b", "run", [release()], content=content)
        with pytest.raises(ConfigError, match="as a"):
            ledger.check_name("sha256:1", "sha256:1")

        assert ledger.name_of("sha256:1") == "a"
        assert ledger.data_sets() == ["a"]


def test_T11_records_that_had_no_name_keep_their_digest(url: str) -> None:
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.spend("sha256:1", "run", [release()])
        with pytest.raises(ConfigError, match="as sha256:1"):
            ledger.check_name("a", "sha256:1")

        assert ledger.name_of("sha256:1") == "sha256:1"
        assert ledger.name_of("sha256:2") is None


def test_a_ledger_is_not_begun_by_looking_for_it(file: Path) -> None:
    assert Ledger.existing(f"sqlite:///{file}") is None
    assert not file.exists()
    Ledger(f"sqlite:///{file}").close()
    found = Ledger.existing(f"sqlite:///{file}")

    assert found is not None
    found.close()


def test_all_releases_of_one_call_are_written_or_none(url: str) -> None:
    budget = Budget(epsilon_of([GAUSSIAN], DELTA, REPLACE), DELTA, REPLACE)
    with contextlib.closing(Ledger(url)) as ledger:
        with pytest.raises(BudgetSpentError):
            ledger.spend("a", "run", [release(), release()], budget=budget)

        assert ledger.entries() == []


def test_what_left_in_the_clear_is_never_a_finite_epsilon_again(url: str) -> None:
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.spend("a", "run", [release(Unbounded(reason="labels leave in the clear"))])
        with pytest.raises(BudgetSpentError, match="labels leave in the clear"):
            ledger.spend("a", "run", [release()], budget=Budget(100.0, DELTA, REPLACE))

        assert math.isinf(ledger.spent("a", delta=DELTA).epsilon)


def test_a_data_set_is_accounted_per_one_unit(url: str) -> None:
    with contextlib.closing(Ledger(url)) as ledger:
        ledger.spend("a", "run", [release()], unit="record")
        with pytest.raises(LedgerError, match="accounted per record; a claim per patient does not hold"):
            ledger.spend("a", "run", [release()], unit="patient")


@pytest.mark.parametrize(
    "event",
    [
        GAUSSIAN,
        SampledGaussian(rate=0.01, noise_multiplier=1.1, steps=100),
        RandomizedResponse(epsilon=1.0, classes=10),
        Unbounded(reason="x"),
    ],
)
def test_an_event_comes_back_from_its_text(event: Event) -> None:
    assert event_from_json(event_to_json(event)) == event


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"mechanism": "magic"}', '{"mechanism": "gaussian", "noise": -1}'])
def test_a_text_that_is_no_event_is_refused(text: str) -> None:
    with pytest.raises(LedgerError, match="no release"):
        event_from_json(text)


def test_T11_a_restored_backup_is_found_by_the_witness_beside_the_file(file: Path, tmp_path: Path) -> None:
    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        ledger.spend("a", "run", [release()])
    backup = tmp_path / "backup"
    shutil.copy(file, backup)
    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        ledger.spend("a", "run", [release()])
    for extra in (file.with_name(file.name + "-wal"), file.with_name(file.name + "-shm")):
        extra.unlink(missing_ok=True)
    shutil.copy(backup, file)

    with pytest.raises(LedgerError, match="has forgotten: it once held entry 2"):
        Ledger(f"sqlite:///{file}")


def test_T11_a_ledger_that_was_deleted_is_found_by_its_witness(file: Path) -> None:
    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        ledger.spend("a", "run", [release()])
    file.unlink()

    with pytest.raises(LedgerError, match="has forgotten"):
        Ledger(f"sqlite:///{file}")


def test_T11_a_position_that_a_checkpoint_names_must_still_be_there(url: str) -> None:
    with contextlib.closing(Ledger(url)) as ledger:
        position = ledger.spend("a", "run", [release()])
        ledger.check(position)
        with pytest.raises(LedgerError, match="has forgotten"):
            ledger.check(type(position)(2, bytes(32)))


@pytest.mark.parametrize(
    ("change", "at"),
    [
        ("UPDATE privacy_releases SET event = replace(event, '4.0', '9.0') WHERE number = 2", 2),
        ("UPDATE privacy_releases SET data_set = 'b' WHERE number = 1", 1),
        ("DELETE FROM privacy_releases WHERE number = 1", 1),
        ("UPDATE privacy_releases SET at = '2001-01-01' WHERE number = 3", 3),
    ],
)
def test_T11_an_altered_entry_is_found(change: str, at: int, file: Path) -> None:
    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        ledger.spend("a", "run", [release()] * 3)
        with contextlib.closing(sqlite3.connect(file)) as raw:
            raw.execute(change)
            raw.commit()
        with pytest.raises(LedgerError, match=f"was altered at entry {at}"):
            ledger.verify()


def test_T11_a_clock_that_is_set_back_changes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Past:
        UTC = None

        class datetime:  # noqa: N801 - as the module names it
            @staticmethod
            def now(_zone: object) -> Past.datetime:
                return Past.datetime()

            def isoformat(self, timespec: str) -> str:
                del timespec
                return "1970-01-01T00:00:00.000+00:00"

    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        ledger.spend("a", "run", [release()])
        monkeypatch.setattr("privacy.ledger.dt", Past)
        ledger.spend("a", "run", [release()])

        assert [entry.at[:4] for entry in ledger.entries("a")][1] == "1970"
        assert ledger.spent("a", delta=DELTA).epsilon == pytest.approx(epsilon_of([GAUSSIAN] * 2, DELTA, REPLACE))
        assert ledger.verify() == 2


def _spend_for_ever(url: str, told: str) -> None:
    ledger = Ledger(url)
    with open(told, "ab", buffering=0) as out:  # noqa: PTH123 - unbuffered
        while True:
            ledger.spend("a", "run", [release()])
            out.write(b".")  # "the bytes leave"


def test_T11_a_process_killed_at_any_moment_has_written_down_all_that_left(url: str, tmp_path: Path) -> None:
    told = tmp_path / "left"
    for number in range(5):
        process = multiprocessing.get_context("spawn").Process(target=_spend_for_ever, args=(url, str(told)))
        process.start()
        while not told.exists() or told.stat().st_size < 3 * (number + 1):
            time.sleep(0.01)
        time.sleep(0.013 * number)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()

    with contextlib.closing(Ledger(url)) as ledger:
        assert 0 <= ledger.verify() - told.stat().st_size <= 5


def test_several_processes_write_one_chain(url: str, tmp_path: Path) -> None:
    told = [tmp_path / str(number) for number in range(3)]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_spend_for_ever, args=(url, str(path))) for path in told]
    for process in processes:
        process.start()
    while not all(path.exists() and path.stat().st_size >= 10 for path in told):
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()

    with contextlib.closing(Ledger(url)) as ledger:
        assert ledger.verify() >= sum(path.stat().st_size for path in told)


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LedgerError, match="making its folder failed"):
        Ledger(f"sqlite:///{tmp_path / 'file' / 'privacy.sqlite'}")
    with pytest.raises(ConfigError, match="the privacy ledger's URL must read"):
        Ledger("mysql://nowhere")


def test_a_new_ledger_is_for_its_owners_eyes_only(file: Path) -> None:
    with contextlib.closing(Ledger(f"sqlite:///{file}")) as ledger:
        ledger.spend("a", "run", [release()])

    assert file.stat().st_mode & 0o077 == 0
