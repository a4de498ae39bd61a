"""The ``cloister`` program as a user runs it: its frame, its exit codes, and ``cloister keys``."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import pytest
import typer

from cloister import exits, output
from cloister.commands.keys import read_passphrase
from cloister.exits import ExitCode, exit_code_of
from wire import errors
from wire.certificates import alternative_names, fingerprint_of, new_certificate
from wire.identity import load_identity, load_signer

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[1]
PASSPHRASE = "correct horse battery staple"


def cloister(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cloister", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An owner's identity, made by the program itself; its keystore takes seconds."""
    folder = tmp_path_factory.mktemp("cli") / "owner"
    ran = cloister("keys", "init", "--role", "owner", "--out", folder, CLOISTER_PASSPHRASE=PASSPHRASE)
    assert ran.returncode == 0, ran.stderr
    return folder


def certificate(path: Path, *, days: float = 30) -> Path:
    path.write_bytes(new_certificate("cloister owner of elsewhere", alternative_names([]), days=days)[0])  # type: ignore[arg-type]  # part of a day
    return path


def test_help_lists_the_commands_without_importing_what_they_need() -> None:
    code = (
        "import sys; sys.argv = ['cloister', '--help']\n"
        "try:\n  from cloister.exits import main; main()\n"
        "except SystemExit as end: code = end.code\n"
        "loaded = {'torch', 'grpc', 'eth_account', 'cryptography', 'sqlalchemy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else code)"
    )

    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )

    assert ran.returncode == 0, ran.stderr
    assert "keys" in ran.stdout
    assert "doctor" in ran.stdout


@pytest.mark.parametrize("command", [["keys"], ["keys", "init"], ["keys", "show"], ["keys", "trust"], ["doctor"]])
def test_every_help_teaches_with_an_example_or_lists_commands(command: list[str]) -> None:
    ran = cloister(*command, "--help")

    assert ran.returncode == 0
    assert "Example: cloister " + " ".join(command) in " ".join(ran.stdout.split()) or "Commands" in ran.stdout


def test_the_exit_codes_are_frozen() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "CONFIG": 3,
        "IDENTITY": 4,
        "UNREACHABLE": 5,
        "REJECTED": 6,
        "TRY_LATER": 7,
        "PRIVACY": 8,
        "HIJACKED": 9,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("x"), 3),
        (errors.CutError("x"), 3),
        (errors.IdentityError("x"), 4),
        (errors.NotAuthorizedError("x"), 4),
        (errors.UnreachableError("x"), 5),
        (errors.ProgramRejectedError("x"), 6),
        (errors.SessionLostError("x"), 6),
        (errors.InternalError("x"), 6),
        (errors.BusyError("x"), 7),
        (errors.DrainingError("x"), 7),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
    ],
)
def test_each_error_has_its_exit_code(error: BaseException, code: int) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        exits.run(fail)

    assert (exit_code_of(error), ended.value.exit_code) == (code, code)


def test_a_call_that_found_nobody_ends_as_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    def call() -> None:
        with grpc.insecure_channel("127.0.0.1:1") as channel:
            channel.unary_unary("/a/b", bytes, bytes)(b"", timeout=5)

    with pytest.raises(typer.Exit) as ended:
        exits.run(call)

    assert ended.value.exit_code == ExitCode.UNREACHABLE
    assert capsys.readouterr().err.startswith("error: ")


def test_a_defect_shows_one_line_and_its_traceback_only_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def defect() -> None:
        raise ZeroDivisionError("by nobody")

    with pytest.raises(typer.Exit):
        exits.run(defect)
    assert capsys.readouterr().err == "error: unexpected ZeroDivisionError: by nobody (CLOISTER_DEBUG=1 shows where)\n"
    monkeypatch.setenv("CLOISTER_DEBUG", "1")

    with pytest.raises(ZeroDivisionError):
        exits.run(defect)


@pytest.mark.parametrize(
    "arguments", [["kees"], ["keys", "init"], ["keys", "show"], ["--nope"], ["keys", "show", "--x", "y"]]
)
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    ran = cloister(*arguments)

    assert (ran.returncode, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr


def test_a_typo_is_answered_with_the_command_that_was_meant() -> None:
    assert "Did you mean 'keys'?" in cloister("kees").stderr


def test_the_version_is_told() -> None:
    assert cloister("--version").stdout.startswith("cloister ")


def test_init_makes_an_identity_that_opens_with_its_passphrase(made: Path) -> None:
    assert load_signer(made, PASSPHRASE).address == load_identity(made).address


def test_show_says_what_peers_need(made: Path) -> None:
    shown = cloister("keys", "show", made)
    told = json.loads(cloister("keys", "show", made, "--format", "json").stdout)
    identity = load_identity(made)

    assert shown.returncode == 0
    assert f"fingerprint  sha256:{identity.fingerprint}\n" in shown.stdout
    assert (told["fingerprint"], told["address"]) == (f"sha256:{identity.fingerprint}", identity.address)
    assert (told["role"], told["expired"], told["names"][0]) == ("owner", False, "cloister-node")
    assert sorted(told) == ["address", "certificate", "expired", "fingerprint", "names", "role", "valid_until"]


def test_T23_neither_command_prints_a_secret(made: Path) -> None:
    secret = (made / "tls.key").read_text().splitlines()[1]
    ran = cloister("keys", "show", made)

    assert secret not in ran.stdout + ran.stderr
    assert PASSPHRASE not in ran.stdout + ran.stderr


def test_T23_no_option_takes_the_passphrase_itself() -> None:
    ran = cloister("keys", "init", "--role", "owner", "--out", "/nonexistent", "--passphrase", PASSPHRASE)

    assert ran.returncode == 2
    assert "No such option" in ran.stderr


def test_init_refuses_a_folder_that_holds_an_identity_with_4(made: Path) -> None:
    ran = cloister("keys", "init", "--role", "owner", "--out", made, CLOISTER_PASSPHRASE="x")

    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith("error: ")
    assert "never overwritten" in ran.stderr


def test_without_a_passphrase_and_a_terminal_init_says_what_to_give(tmp_path: Path) -> None:
    ran = cloister("keys", "init", "--role", "owner", "--out", tmp_path / "new")

    assert ran.returncode == 3
    assert (
        ran.stderr == "error: no passphrase: give --passphrase-file, or set CLOISTER_PASSPHRASE, or run in a terminal\n"
    )


def test_at_a_terminal_the_passphrase_is_asked_for_unseen_and_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "cloister", "keys", "init", "--role", "owner", "--out", str(tmp_path / "new")],
        cwd=ROOT,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    ) as process:
        os.close(follower)
        try:
            seen = read_until(leader, b"assphrase: ", seconds=30)  # the space comes when echo is off
            os.write(leader, b"hunter2")
            for _ in range(20):  # Python notices none that comes just before it begins to read
                process.send_signal(signal.SIGINT)
                seen += read_until(leader, b"interrupted", seconds=1)
                if b"interrupted" in seen:
                    break
            assert process.wait(20) == 130
        finally:
            process.kill()
    os.close(leader)

    assert b"hunter2" not in seen
    assert not (tmp_path / "new").exists()


def read_until(descriptor: int, text: bytes, *, seconds: float) -> bytes:
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen and (left := deadline - time.monotonic()) > 0:
        if select.select([descriptor], [], [], left)[0]:
            seen += os.read(descriptor, 1024)
    return seen


def write_secret(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("content", [b"pass word", b"pass word\n", b"pass word\r\n", b"pass word\nsecond line"])
def test_the_first_line_of_the_file_is_the_passphrase(tmp_path: Path, content: bytes) -> None:
    assert read_passphrase(write_secret(tmp_path / "p", content)) == "pass word"


@pytest.mark.parametrize("content", [b"", b"\nsecond", b"\xff\xfe", b"x" * 2000])
def test_a_file_without_a_passphrase_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(errors.ConfigError, match="holds no passphrase"):
        read_passphrase(write_secret(tmp_path / "p", content))


def test_T23_a_passphrase_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match=r"mode 0644\): run `chmod 600"):
        read_passphrase(write_secret(tmp_path / "p", b"pass word", 0o644))


def test_the_file_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_PASSPHRASE", "from the environment")

    assert read_passphrase(None) == "from the environment"
    assert read_passphrase(write_secret(tmp_path / "p", b"from the file")) == "from the file"


def test_trust_copies_the_certificate_and_says_its_fingerprint(made: Path, tmp_path: Path) -> None:
    arguments = ("keys", "trust", made / "tls.crt", "--into", tmp_path / "trust", "--format", "json")
    first, second = (json.loads(cloister(*arguments).stdout) for _ in range(2))
    fingerprint = load_identity(made).fingerprint

    assert (first["fingerprint"], first["already_there"]) == (f"sha256:{fingerprint}", False)
    assert second["already_there"] is True
    assert [path.name for path in (tmp_path / "trust").iterdir()] == [f"{fingerprint}.pem"]
    assert fingerprint_of(Path(first["file"]).read_bytes()) == fingerprint


def test_T03_trust_takes_only_the_certificate_whose_fingerprint_it_says(tmp_path: Path) -> None:
    shown, hidden = certificate(tmp_path / "a.crt"), certificate(tmp_path / "b.crt")
    two = tmp_path / "two.crt"
    two.write_bytes(shown.read_bytes() + hidden.read_bytes())

    told = json.loads(cloister("keys", "trust", two, "--into", tmp_path / "trust", "--format", "json").stdout)

    assert told["fingerprint"] == f"sha256:{fingerprint_of(shown.read_bytes())}"
    assert Path(told["file"]).read_bytes().count(b"BEGIN CERTIFICATE") == 1


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path, "cannot read"),
        (lambda path: write_secret(path, b"garbage"), "is no certificate in PEM"),
        (lambda path: write_secret(path, b"-----BEGIN PRIVATE KEY-----\n"), "contains a private key"),
        (lambda path: certificate(path, days=-0.02), "ask the peer for its new certificate"),
    ],
)
def test_what_is_no_good_certificate_is_not_trusted(
    tmp_path: Path, make: Callable[[Path], Path], complaint: str
) -> None:
    ran = cloister("keys", "trust", make(tmp_path / "peer.crt"), "--into", tmp_path / "trust")

    assert (ran.returncode, complaint in ran.stderr) == (4, True)
    assert not (tmp_path / "trust").exists()


@dataclass(frozen=True, slots=True)
class Told:
    name: str
    place: Path


def test_foreign_strings_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "[bold]x[/bold] \x1b[31mred\x07 \u202egnp"

    output.print_rows([Told(hostile, Path("/a"))], output.Format.TABLE)
    output.print_record(Told(hostile, Path("/a")), output.Format.TABLE)
    output.print_error(hostile)
    captured = capsys.readouterr()

    for shown in (captured.out, captured.err):
        assert "[bold]x[/bold] \ufffd[31mred\ufffd \ufffdgnp" in shown
        assert "\x1b" not in shown


def test_results_as_json_hold_what_the_table_holds(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_rows([Told("x", Path("/a"))], output.Format.JSON)

    assert json.loads(capsys.readouterr().out) == [{"name": "x", "place": "/a"}]


@dataclass(frozen=True, slots=True)
class File:
    file: str
    sent_bytes: int
    epsilon: float
    loss: float | None = field(default=None, metadata={output.HEADING: "step loss"})
    left: float | None = field(default=None, metadata={output.ABSENT: "∞"})


FILES: Final = [File(f"step-{n:012d}.{'ab' * 32}.safetensors", 2_500_000 * n, math.inf) for n in (1, 2)]


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_narrow_terminal_breaks_no_name_that_someone_may_copy(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    output.print_rows(FILES, output.Format.TABLE)
    said = capsys.readouterr().out

    assert all(file.file in said for file in FILES)
    assert (said.count("sent bytes") == len(FILES)) == (columns == "80")


def test_a_narrow_terminal_folds_prose_and_leaves_the_table_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    output.print_rows([Told("a word and another " * 6, Path("p" * 40))], output.Format.TABLE)
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)

    assert "p" * 40 in said
    assert max(len(line) for line in said.splitlines()) <= 80
    assert said.count("name") == 1


def test_a_pipe_gets_every_row_on_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    output.print_rows(FILES, output.Format.TABLE)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if ".safetensors" in line]

    assert rows == [[file.file, size, "MB", "∞", "-", "∞"] for file, size in zip(FILES, ("2.5", "5.0"), strict=True)]


def test_people_read_megabytes_and_infinity_and_programs_bytes_and_the_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    output.print_record(FILES[0], output.Format.TABLE)
    told = capsys.readouterr().out
    output.print_record(FILES[0], output.Format.JSON)
    written = json.loads(capsys.readouterr().out)

    assert re.search(r"^sent bytes +2\.5 MB$", told, re.MULTILINE)
    assert re.search(r"^step loss +-$", told, re.MULTILINE)
    assert re.search(r"^epsilon +∞$", told, re.MULTILINE)
    assert re.search(r"^left +∞$", told, re.MULTILINE)
    assert (written["sent_bytes"], written["epsilon"], written["loss"]) == (2_500_000, "infinite", None)


def test_a_reader_who_leaves_early_is_no_error(made: Path) -> None:
    ran = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m cloister keys show {made} --format json | true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (ran.returncode, ran.stderr) == (0, "")
