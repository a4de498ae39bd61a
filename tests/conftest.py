"""Fixtures that tests of several areas share."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import torch

from tests.inside import Inside

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

ROOT: Final = Path(__file__).resolve().parents[1]
POSTGRES_START_S: Final = 30.0
POSTGRES_MISSING: Final = "no PostgreSQL server here (initdb and postgres): apt-get install postgresql"
DRIVER_MISSING: Final = "no PostgreSQL driver here: pip install 'cloister[postgres]'"
NO_SKIPS: Final = "CLOISTER_NO_SKIPS"
NO_CUDA: Final = "no CUDA device here"  # how the reason of a skip for want of a GPU starts


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where ``NO_SKIPS`` is set, as in CI, a test that is skipped for want of anything but a GPU fails."""
    del item, call
    report = yield
    if os.environ.get(NO_SKIPS) and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if NO_CUDA not in reason:
            report.outcome, report.longrepr = "failed", f"with {NO_SKIPS} set, no test may be skipped: {reason}"
    return report


@pytest.fixture
def inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Inside:
    """The program, called in this process and in the checkout's folder."""
    monkeypatch.chdir(ROOT)
    return Inside(capsys)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """As many as the tests' nodes have: bits depend on it. And two that wait for each other make small tensors slow."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Also where a script started the tests in the background, whose processes ignore SIGINT and pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _a_ledger_of_the_tests_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the ledger of whoever runs it; processes that tests start inherit the variable."""
    before = os.environ.get("CLOISTER_LEDGER")
    os.environ["CLOISTER_LEDGER"] = f"sqlite:///{tmp_path_factory.mktemp('ledger') / 'privacy.sqlite'}"
    yield
    if before is None:
        del os.environ["CLOISTER_LEDGER"]
    else:
        os.environ["CLOISTER_LEDGER"] = before


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The SQLAlchemy URL of a PostgreSQL that starts empty and lives as long as the test run."""
    binaries = _postgres_binaries()
    if binaries is None:
        pytest.skip(POSTGRES_MISSING)
    pytest.importorskip("psycopg", reason=DRIVER_MISSING)
    # Not pytest's tmp_path: the path of a socket must stay under 108 characters.
    home = Path(tempfile.mkdtemp(prefix="cloister-pg-"))
    try:
        with _postgres_running(binaries, home):
            yield f"postgresql+psycopg://postgres@/postgres?host={home}"
    finally:
        shutil.rmtree(home)


def _postgres_binaries() -> Path | None:
    """The folder of a server's programs: the newest where Debian puts them, or the one on the PATH."""
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: float(folder.parent.name), reverse=True
    )
    initdb = shutil.which("initdb")
    folders = [*debian, *([Path(initdb).resolve().parent] if initdb else [])]
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@contextlib.contextmanager
def _postgres_running(binaries: Path, home: Path) -> Iterator[None]:
    """Runs a server in `home`, on a socket there and on no port."""
    uid, gid = _postgres_owner()
    os.chown(home, uid, gid)
    data = home / "data"
    initdb: list[str | Path] = [
        binaries / "initdb",
        "-D",
        data,
        "-U",
        "postgres",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-sync",
    ]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, cwd=home, user=uid, group=gid, extra_groups=[])
    # Should the test run be killed, the kernel tells the server to stop.
    guard: list[str | Path] = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []
    postgres = [*guard, binaries / "postgres", "-D", data, "-k", home, "-c", "listen_addresses=", "-c", "fsync=off"]
    with (
        (home / "log").open("wb") as log,
        subprocess.Popen(postgres, stderr=log, cwd=home, user=uid, group=gid, extra_groups=[]) as server,
    ):
        try:
            _wait_for_postgres(server, binaries, home)
            yield
        finally:
            server.send_signal(signal.SIGINT)  # a "fast" shutdown: it does not wait for clients to leave


def _postgres_owner() -> tuple[int, int]:
    """Whom the server runs as: it refuses to run as root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    accounts = {account.pw_name: account for account in pwd.getpwall()}
    account = accounts.get("postgres") or accounts["nobody"]
    return account.pw_uid, account.pw_gid


def _wait_for_postgres(server: subprocess.Popen[bytes], binaries: Path, home: Path) -> None:
    give_up_at = time.monotonic() + POSTGRES_START_S
    while subprocess.run([binaries / "pg_isready", "-q", "-h", home], check=False).returncode:
        if server.poll() is not None or time.monotonic() > give_up_at:
            pytest.fail(f"PostgreSQL does not start:\n{(home / 'log').read_text(errors='replace')}")
        time.sleep(0.05)
