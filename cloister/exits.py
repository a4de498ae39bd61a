"""What a command's exit code means, and the one place where an error becomes one.

====  =====================================================================================
code  meaning
====  =====================================================================================
0     done
1     failed: a check did not pass, or a defect (``CLOISTER_DEBUG=1`` shows the traceback)
2     the command line is wrong
3     a job file, an option's value or a cut is wrong, or a checkpoint or its disk
4     an identity, certificate, pin or passphrase is missing, damaged or refused
5     no node answered
6     the node rejected what was asked, or failed at it
7     the node has no room or is about to stop: the same command may succeed later
8     the privacy policy, the budget or the ledger forbids it: nothing left
9     the node's gradients look like an attack on the front: training stopped, the evidence is kept
130   interrupted
====  =====================================================================================

The codes are frozen: scripts depend on them.
"""

from __future__ import annotations

import enum
import os
import sys
from typing import TYPE_CHECKING, Final, TypeVar

import typer

from cloister.output import print_error

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ExitCode", "exit_code_of", "main", "run"]

T = TypeVar("T")

#: What an auditor's installation lacks, or one that trains, and the extra that brings it.
_EXTRAS: Final = {
    **dict.fromkeys(("torch", "sklearn", "opacus", "dp_accounting", "structlog", "prometheus_client"), "train"),
    **dict.fromkeys(("grpc_health", "fsspec", "pydantic_settings", "eth_tester", "eth", "matplotlib"), "train"),
    **dict.fromkeys(("fastapi", "jinja2", "uvicorn", "python_multipart"), "audit"),
}


class ExitCode(enum.IntEnum):
    """See the module's table."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CONFIG = 3
    IDENTITY = 4
    UNREACHABLE = 5
    REJECTED = 6
    TRY_LATER = 7
    PRIVACY = 8
    HIJACKED = 9
    INTERRUPTED = 130


def main() -> None:
    """The ``cloister`` program."""
    # gRPC's core logs each refused handshake, and each pin that is looked up, as if something were wrong.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Both sides wait for each other much of the time, and OpenMP's threads would spin meanwhile, on cores that gRPC
    # and the other sessions need: with two threads a process on two cores, small models train half as fast.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from cloister.main import app  # noqa: PLC0415 - it imports this module

    app()


def run(call: Callable[[], T]) -> T:
    """Calls ``call``; an error of ours becomes one line on stderr and its exit code, never a traceback.

    Raises:
        typer.Exit: With the code. Errors of the command line itself pass through: typer reports them.
    """
    try:
        return call()
    except (typer.Abort, KeyboardInterrupt):
        print_error("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does; Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.OK) from None
    except Exception as error:
        code, message = _explain(error)
        if code is ExitCode.USAGE:
            raise
        if os.environ.get("CLOISTER_DEBUG") == "1":
            raise
        print_error(message)
        raise typer.Exit(code) from None


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code that ``error`` ends a command with."""
    # Imported here: whoever raises one of these has imported the module already, and `--help` has no need of gRPC.
    from wire import errors  # noqa: PLC0415

    table: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], ExitCode], ...] = (
        (KeyboardInterrupt, ExitCode.INTERRUPTED),
        ((errors.ConfigError, errors.CutError, errors.CheckpointError), ExitCode.CONFIG),
        ((errors.IdentityError, errors.NotAuthorizedError), ExitCode.IDENTITY),
        (errors.UnreachableError, ExitCode.UNREACHABLE),
        ((errors.ReleaseRefusedError, errors.LedgerError), ExitCode.PRIVACY),
        (errors.HijackSuspectedError, ExitCode.HIJACKED),
        ((errors.BusyError, errors.DrainingError), ExitCode.TRY_LATER),
        (errors.WireError, ExitCode.REJECTED),
    )
    return next((code for kind, code in table if isinstance(error, kind)), ExitCode.FAILED)


def _explain(error: Exception) -> tuple[ExitCode, str]:
    import grpc  # noqa: PLC0415 - as in exit_code_of

    from wire.errors import CloisterError, error_from_rpc  # noqa: PLC0415

    if isinstance(error, typer.Exit) or _is_usage(error):
        return ExitCode.USAGE, ""
    if isinstance(error, grpc.RpcError):
        error = error_from_rpc(error)
    if isinstance(error, CloisterError):
        return exit_code_of(error), str(error)
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in _EXTRAS:
        return ExitCode.CONFIG, f"this needs {missing}, which is not here: pip install 'cloister[{_EXTRAS[missing]}]'"
    return ExitCode.FAILED, f"unexpected {type(error).__name__}: {error} (CLOISTER_DEBUG=1 shows where)"


def _is_usage(error: Exception) -> bool:
    """Whether typer itself reports this error; what it carries is the one thing all of its versions share."""
    return isinstance(error, typer.BadParameter) or (hasattr(error, "show") and hasattr(error, "exit_code"))
