"""Chaos: a run whose owner and nodes are killed at seeded random moments, and whose numbers must not show it.

A small ResNet is trained twice through real processes: once undisturbed, once while SIGKILL hits the owner, either node
or both, during steps, snapshots, restores and replays, while files are torn between the owner's lives and the disk
fills up. Weights, optimizer state, random generators and logged losses must be equal to the bit (THREATS T07, T14)::

    python -m tests.chaos --kills 100 --seed 0 --steps 200
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from client_side.checkpoints import CheckpointFile, list_checkpoints
from client_side.durability import holds_run
from client_side.snapshots import SnapshotStore
from client_side.spawn import LocalNode
from tests.chaos_job import EVERY, STATE, STEPS_PER_EPOCH, ChaosError, compare, job
from tests.disks import mount
from wire.errors import CheckpointError

__all__ = ["Chaos", "ChaosError", "Plan", "main"]

ROOT: Final = Path(__file__).resolve().parents[1]
PATIENCE_S: Final = 240.0  # for anything that must happen; far beyond what it takes on a loaded machine
DISK_BYTES: Final = 64 * 2**20

_EXIT_DISK: Final = 3
_EXIT_UNREACHABLE: Final = 5
_MOST_RESTART_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much chaos.

    Attributes:
        kills: SIGKILLs, each counted once whomever it hits.
        steps: of one run, rounded up to whole epochs; where it ends before its kills are spent, another one begins.
        seed: of every choice. Moments are the machine's own, so no two runs are alike.
        full_disks: how often the disk fills up.
        tear: how often files are torn before the owner is resumed, from 0 to 1.
        owner: of the kills, the part that hits it; whoever resumes waits for torch to be imported.
        standby: the second node waits at the latest snapshot.
    """

    kills: int = 100
    steps: int = 200
    seed: int = 0
    full_disks: int = 4
    tear: float = 0.5
    owner: float = 0.4
    standby: bool = False

    @property
    def epochs(self) -> int:
        """Passes over the data."""
        return math.ceil(self.steps / STEPS_PER_EPOCH)


class _Node:
    """A node that comes back after each kill: the same port, the same state on its disk."""

    def __init__(self, name: str, folder: Path, owner: Path | None = None) -> None:
        self.name, self._folder = name, folder
        if owner is not None:
            shutil.copytree(owner, folder / "owner")
        self._local: LocalNode | None = LocalNode(folder, threads=1)
        self.address, self.owner, self._port = self._local.address, self._local.owner.folder, self._local.port
        self._restart: threading.Thread | None = None
        self._over = threading.Event()

    @property
    def is_up(self) -> bool:
        return self._local is not None

    def kill(self, delay_s: float) -> None:
        local, self._local = self._local, None
        if local is None:
            return
        local.kill()
        self._restart = threading.Thread(target=self._come_back, args=(delay_s,), name=f"restart-{self.name}")
        self._restart.start()

    def end(self) -> None:
        self._over.set()
        if self._restart is not None:
            self._restart.join()
        if self._local is not None:
            self._local.kill()

    def _come_back(self, delay_s: float) -> None:
        if not self._over.wait(delay_s):
            self._local = LocalNode(self._folder, threads=1, listen=f"localhost:{self._port}")


class _Owner:
    """One life of the owner's process."""

    def __init__(self, arguments: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloister", "train", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self.has_full_disk = False
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), name="owner-stderr")
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def said(self, text: str) -> int:
        return sum(text in line for line in list(self.lines))

    def kill(self) -> None:
        self.process.kill()
        self.ended()

    def ended(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        return code

    def _read(self, stderr: IO[str]) -> None:
        with stderr:
            self.lines += stderr


@dataclass(slots=True)
class _Tally:
    """What happened."""

    kills: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    torn: Counter[str] = field(default_factory=Counter)
    full_disks: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumes: int = 0
    moves: int = 0
    fallbacks: int = 0
    unreachable: int = 0
    largest: int = 0


class Chaos:
    """Two nodes, a reference, and runs that are disturbed until all kills are spent."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        """Starts nothing yet; everything goes into ``folder``."""
        self._plan, self._folder, self._say = plan, folder, say
        self._random = random.Random(plan.seed)  # noqa: S311 - moments, no secrets
        self.tally = _Tally()
        self._nodes: list[_Node] = []
        self._owner: _Owner | None = None
        self._disk, self._mounted = folder / "disk", False
        self._run = self._disk / "run"
        self.reference = folder / "reference"
        self._full_at: list[int] = []

    def go(self) -> _Tally:
        """All of it.

        Raises:
            ChaosError: the numbers differ, or something else that must not be.
        """
        began = time.monotonic()
        self._disk.mkdir(parents=True)
        self._mounted = mount(self._disk, DISK_BYTES) is None
        try:
            self._nodes.append(_Node("A", self._folder / "A"))
            with ThreadPoolExecutor(1) as meanwhile:
                other = meanwhile.submit(_Node, "B", self._folder / "B", self._nodes[0].owner)
                try:
                    self._start(["--out", str(self.reference)], self._job_file())
                    self._finish()
                finally:
                    self._nodes.append(other.result())
            self._job_file()
            self._say(f"reference: {self._plan.epochs * STEPS_PER_EPOCH} steps in {time.monotonic() - began:.1f} s")
            # Never two full disks at the same kill: a slot in each stretch of kills.
            stretch = self._plan.kills / max(self._plan.full_disks, 1)
            self._full_at = [int(stretch * (n + 0.5)) for n in range(self._plan.full_disks)]
            while self._spent < self._plan.kills or self._full_at:
                self._one_run()
                compare(self.reference, self._run)
                self.tally.runs += 1
                self._say(f"run {self.tally.runs} ended: equal to the bit")
                shutil.rmtree(self._run)
        finally:
            if self._owner is not None and self._owner.is_alive:
                self._owner.kill()
            for node in self._nodes:
                node.end()
            if self._mounted:
                subprocess.run(["umount", "--lazy", str(self._disk)], check=True)
        self._say(self._summary(time.monotonic() - began))
        return self.tally

    def copy_of_reference(self, to: Path) -> Path:
        """The undisturbed run, to be spoilt."""
        return Path(shutil.copytree(self.reference, to))

    @property
    def _spent(self) -> int:
        return self.tally.kills.total()

    @property
    def _state(self) -> Path:
        return self._run / STATE

    def _job_file(self) -> Path:
        file = self._folder / "job.toml"
        addresses = [node.address for node in self._nodes]
        text = job(
            self._run,
            self._nodes[0].owner,
            addresses,
            epochs=self._plan.epochs,
            standby=self._plan.standby and len(addresses) > 1,
        )
        file.write_text(text)
        return file

    # One run

    def _one_run(self) -> None:
        self._start([], self._folder / "job.toml")
        while True:
            if self._full_at and self._spent >= self._full_at[0]:
                self._fill_the_disk()
            elif self._spent < self._plan.kills:
                self._disturb()
            else:
                if self._finish():
                    return
                self._resume()
                continue
            if not self._alive().is_alive and not self._over():
                self._resume()
            elif not self._alive().is_alive:
                return

    def _over(self) -> bool:
        return (self._run / "result.json").exists()

    def _alive(self) -> _Owner:
        if self._owner is None:
            raise ChaosError("no owner was started")
        return self._owner

    def _start(self, options: list[str], job: Path | None) -> None:
        if not any(node.is_up for node in self._nodes):  # the first thing that an owner does is to greet one
            self._wait(lambda: any(node.is_up for node in self._nodes), "a node is back", always=True)
        self._owner = _Owner([*([str(job)] if job else []), *options])

    def _resume(self) -> None:
        self._count_life()
        if holds_run(self._state):
            if self._random.random() < self._plan.tear:
                self._tear()
            self.tally.resumes += 1
            self._start(["--resume", str(self._run)], None)
        else:  # killed before there was anything to resume
            self._start([], self._folder / "job.toml")

    def _finish(self) -> bool:
        """Lets the owner end by itself; false where it must be resumed."""
        code = self._alive().ended()
        self._check_exit(code)
        if code == 0:
            self._count_life()
        return code == 0

    def _check_exit(self, code: int) -> None:
        owner = self._alive()
        if code == _EXIT_UNREACHABLE and not owner.said("of them on the node"):
            self.tally.unreachable += 1  # both nodes were down when it greeted them
            return
        if code not in (0, -signal.SIGKILL) and not (code == _EXIT_DISK and owner.has_full_disk):
            raise ChaosError(f"the owner ended with {code}:\n{''.join(owner.lines[-15:])}")

    def _count_life(self) -> None:
        owner = self._alive()
        self._check_exit(owner.ended())
        self.tally.moves += owner.said("training goes on at")
        self.tally.fallbacks += owner.said("trying the one before it")
        if owner.said("comes out otherwise"):
            raise ChaosError(f"a step came out otherwise when it was computed again:\n{''.join(owner.lines)}")
        self.tally.largest = max(self.tally.largest, _bytes_under(self._run))

    # Disturbances

    def _disturb(self) -> None:
        moment = self._moment()
        if not self._alive().is_alive:
            return  # it ended meanwhile, by itself
        self._kill(self._victim(), moment)
        if self._spent < self._plan.kills and self._random.random() < 0.4 and self._alive().is_alive:
            time.sleep(self._random.uniform(0, 2.5))  # while the owner moves: it dials, restores, replays
            if self._alive().is_alive:
                self._kill(self._victim(), "move")

    def _victim(self) -> str:
        if self._random.random() < self._plan.owner:
            return "owner"
        return self._random.choice(("A", "B", "both"))

    def _kill(self, whom: str, moment: str) -> None:
        step = _lines(self._run / "metrics.jsonl")
        delay = self._random.uniform(0, _MOST_RESTART_S)
        hit = [node for node in self._nodes if whom in (node.name, "both") and node.is_up]
        if whom != "owner" and not hit:
            self._wait(lambda: any(node.is_up for node in self._nodes), "a node is back", always=True)
            hit = [next(node for node in self._nodes if node.is_up)]
            whom = hit[0].name
        if whom == "owner":
            self._alive().kill()
        for node in hit:
            node.kill(delay)
        names = "owner" if whom == "owner" else " and ".join(f"node {node.name}" for node in hit)
        self.tally.kills[names] += 1
        self.tally.moments[moment] += 1
        self.tally.largest = max(self.tally.largest, _bytes_under(self._run))
        self._say(f"kill {self._spent} of {self._plan.kills}: {names}, {moment}, after step {step}")

    def _moment(self) -> str:
        """Waits for a moment to strike at."""
        metrics, frames = self._run / "metrics.jsonl", self._state / "frames"
        kind = self._random.choice(("step", "step", "step", "snapshot", "snapshot", "write", "restore", "start"))
        if kind == "step":
            wanted = _lines(metrics) + self._random.randint(1, 12)
            self._wait(lambda: _lines(metrics) >= wanted or _lines(metrics) < wanted - 12, "steps")
            time.sleep(self._random.uniform(0, 0.05))
        elif kind == "snapshot":  # a segment of the frame log begins with each
            newest = _newest_segment(frames)
            self._wait(lambda: _newest_segment(frames) != newest, "a snapshot")
            time.sleep(self._random.uniform(0, 0.03))
        elif kind == "write":
            begun, places = _lines(metrics), (self._state / "checkpoints", self._state / "snapshots")

            def writing() -> bool:
                return any(name.endswith(".partial") for place in places for name in _names(place))

            self._wait(lambda: writing() or not begun <= _lines(metrics) <= begun + 2 * EVERY, "a file being written")
            kind = "write" if writing() else "step"
        elif kind == "restore":  # what was sent before is put aside, then the session opened and brought to the present
            before, begun = _changed(frames), _lines(metrics)
            self._wait(lambda: _changed(frames) != before or _lines(metrics) > begun + 2, "a restore")
            time.sleep(self._random.uniform(0, 0.6))
            kind = "restore" if _lines(metrics) <= begun else "step"
        else:
            time.sleep(self._random.uniform(0, 4))
        return kind

    def _wait(self, until: Callable[[], bool], what: str, *, always: bool = False) -> None:
        """Until then, or until the owner ends."""
        give_up_at = time.monotonic() + PATIENCE_S
        while not until() and (always or self._alive().is_alive):
            if time.monotonic() > give_up_at:
                said = "" if self._owner is None else "".join(self._owner.lines[-15:])
                raise ChaosError(f"waited for {what} in vain:\n{said}")
            time.sleep(0.004)

    def _tear(self) -> None:
        """Damages what a torn write, a bad disk or a careless hand may damage; one checkpoint stays whole."""
        tears = {
            "checkpoint truncated": self._truncate_checkpoint,
            "checkpoint altered": self._alter_checkpoint,
            "snapshot truncated": self._truncate_snapshot,
            "frames truncated": self._truncate_frames,
            "journal garbage": self._spoil_journal,
            "metrics torn": self._tear_metrics,
            "partial files": self._leave_partials,
        }
        name = self._random.choice(list(tears))
        if tears[name]():
            self.tally.torn[name] += 1
            self._say(f"  before the resume: {name}")

    def _spare(self) -> CheckpointFile | None:
        """The newest checkpoint, where another one is whole."""
        files = list_checkpoints(self._state / "checkpoints")
        return files[0] if sum(map(self._is_whole, files)) > 1 and self._is_whole(files[0]) else None

    def _is_whole(self, file: CheckpointFile) -> bool:
        try:
            SnapshotStore(str(self._state / "snapshots")).load(file.read().snapshot)
        except CheckpointError:
            return False
        return True

    def _truncate_checkpoint(self) -> bool:
        file = self._spare()
        if file is not None:
            os.truncate(file.path, self._random.randrange(file.path.stat().st_size))
        return file is not None

    def _alter_checkpoint(self) -> bool:
        file = self._spare()
        if file is not None:
            data = bytearray(file.path.read_bytes())
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            file.path.write_bytes(data)
        return file is not None

    def _truncate_snapshot(self) -> bool:
        file = self._spare()
        if file is None:
            return False
        others = [f for f in list_checkpoints(self._state / "checkpoints")[1:] if self._is_whole(f)]
        own = file.read().snapshot.objects.difference(*(f.read().snapshot.objects for f in others[:1]))
        for digest in sorted(own)[:1]:
            path = self._state / "snapshots" / f"{digest.hex()}.safetensors"
            os.truncate(path, self._random.randrange(path.stat().st_size))
        return bool(own)

    def _truncate_frames(self) -> bool:
        segments = sorted((self._state / "frames").glob("*.frames"))
        if segments and segments[-1].stat().st_size:
            os.truncate(segments[-1], self._random.randrange(segments[-1].stat().st_size))
        return bool(segments)

    def _spoil_journal(self) -> bool:
        file = self._state / "run.sqlite"
        if file.exists():
            file.write_bytes(self._random.randbytes(max(file.stat().st_size, 100)))
        return file.exists()

    def _tear_metrics(self) -> bool:
        """Mid-line, and only after the newest checkpoint: what that vouches for was on the disk before it was."""
        file, newest = self._run / "metrics.jsonl", next(iter(list_checkpoints(self._state / "checkpoints")), None)
        if newest is None or not file.exists():
            return False
        lines = file.read_bytes().splitlines(keepends=True)
        kept, loose = b"".join(lines[: newest.step]), b"".join(lines[newest.step :])
        if loose:
            os.truncate(file, len(kept) + self._random.randrange(len(loose)))
        else:
            file.write_bytes(kept + b'{"step": 1')
        return True

    def _leave_partials(self) -> bool:
        junk = self._random.randbytes(3000)
        for place, name in (
            ("state/checkpoints", ".step-000000000007.partial"),
            ("state/snapshots", f"{'ab' * 32}.safetensors.partial"),
            (".", ".metrics.jsonl.1.partial"),
        ):
            with contextlib.suppress(FileNotFoundError):
                (self._run / place / name).write_bytes(junk)
        return True

    def _fill_the_disk(self) -> None:
        """The owner must say so and stop; with room again it is resumed like any other."""
        metrics = self._run / "metrics.jsonl"
        wanted = _lines(metrics) + self._random.randint(1, 12)
        self._wait(lambda: _lines(metrics) >= wanted, "steps")
        owner = self._alive()
        if not owner.is_alive:
            return
        filler = self._disk / "filler"
        if self._mounted and self._random.random() < 0.7:
            how = "ENOSPC"
            _fill(filler)
        else:
            how = "EFBIG"
            most = self._random.choice((10_000, 60_000))
            resource.prlimit(owner.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        code = owner.ended()
        filler.unlink(missing_ok=True)
        said = "".join(owner.lines)
        if code == 0:
            return  # it was done just then
        told = "cannot write" in said or "the journal" in said
        if code != _EXIT_DISK or not told or "--resume" not in said:
            raise ChaosError(f"with a full disk ({how}) the owner ended with {code}, and said:\n{said}")
        owner.has_full_disk = True
        self._full_at.pop(0)
        self.tally.full_disks[how] += 1
        self._say(f"disk full ({how}): {owner.lines[-1].strip()[:150]}")

    def _summary(self, seconds: float) -> str:
        tally = self.tally

        def shown(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items())) or "none"

        return "\n".join(
            [
                f"all equal to the bit: {tally.runs} runs of {self._plan.epochs * STEPS_PER_EPOCH} steps",
                f"kills       {self._spent}: {shown(tally.kills)}",
                f"  during    {shown(tally.moments)}",
                f"torn        {shown(tally.torn)}; {tally.fallbacks} times the checkpoint before was taken",
                f"full disks  {shown(tally.full_disks)}",
                f"resumes     {tally.resumes}, moves {tally.moves}, found no node {tally.unreachable} times",
                f"disk        {tally.largest / 1e6:.2f} MB at most for a run",
                f"time        {seconds:.0f} s",
            ]
        )


def _lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _newest_segment(folder: Path) -> str:
    return max((name for name in _names(folder) if name.endswith(".frames")), default="")


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


def _fill(file: Path) -> None:
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(4096))


@contextlib.contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="cloister-chaos-") as made:
        yield Path(made)


def _print(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - a command's output


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where anything differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Kills a run, and compares its numbers.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disks", type=int, default=4)
    parser.add_argument("--standby", action="store_true", help="let the second node wait at the latest snapshot")
    parser.add_argument("--folder", type=Path, help="kept, for a look afterwards")
    given = parser.parse_args(arguments)
    plan = Plan(
        kills=given.kills, steps=given.steps, seed=given.seed, full_disks=given.full_disks, standby=given.standby
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left running
    with _folder(given.folder) as folder:
        try:
            Chaos(plan, folder, say=_print).go()
        except ChaosError as error:
            _print(f"FAILED: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
