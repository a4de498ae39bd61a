"""Kills the owner of a private run at random moments, and holds its ledger to what a node was sent (THREATS T11).

A node in this process writes down a digest of everything that it gets: each frame's tensors by step, micro-batch and
phase, and each table. A record's activation that came with two different noises was released twice, and the ledger must
say so: ``python -m tests.private_chaos --kills 200``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cloister
from protos import node_pb2
from server_side.node import NodeConfig, start_node
from server_side.session import Session
from wire.state import rows_of, tensor_digest
from wire.trust import Trust

FEATURES: Final = 8
CLASSES: Final = 3
RECORDS: Final = 240
BATCH: Final = 20
STEPS: Final = RECORDS // BATCH
EPOCHS: Final = 6
POLICIES: Final = {
    "fresh": cloister.Policy(
        activations=cloister.Rows(clip=1.0, noise=30.0, once=False),
        gradients=cloister.GaussianRows(clip=1.0, noise=30.0),
        front=cloister.DpSgd(clip=1.0, noise=30.0),
        head=cloister.DpSgd(clip=1.0, noise=30.0),
        epsilon=1e6,
    ),
    "table": cloister.Policy(
        activations=cloister.Rows(clip=1.0, noise=30.0),
        labels=cloister.RandomizedLabels(epsilon=0.01),
        epsilon=1e6,
        classes=CLASSES,
    ),
}


@dataclass
class Recorder:
    """What came: digests of frames' tensors by (run, phase, step, micro-batch), and of tables by run."""

    frames: dict[tuple[str, int, int, int], set[bytes]] = field(default_factory=lambda: defaultdict(set))
    tables: dict[str, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    run: str = ""
    heard: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        train, made = Session.train, Session.__init__

        def recorded(session: Session, frame: node_pb2.Frame, *more: Any) -> node_pb2.TrainResponse:
            with self.lock:
                self.heard += 1
            if frame.tensors:
                digest = hashlib.sha256(b"".join(t.SerializeToString(deterministic=True) for t in frame.tensors))
                with self.lock:
                    self.frames[self.run, frame.phase, frame.step, frame.micro_batch].add(digest.digest())
            return train(session, frame, *more)

        def opened(session: Session, plan: Any, program: Any, tensors: Any, device: Any) -> None:
            rows = rows_of(tensors)
            if rows:
                with self.lock:
                    self.tables[self.run].add(tensor_digest(rows["0"]))
            made(session, plan, program, tensors, device)

        Session.train, Session.__init__ = recorded, opened  # type: ignore[assignment,method-assign]  # the node's own ear
        try:
            yield
        finally:
            Session.train, Session.__init__ = train, made  # type: ignore[method-assign]  # as above


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(RECORDS, FEATURES, generator=generator)
    y = torch.randint(0, CLASSES, (RECORDS,), generator=generator)
    return DataLoader(TensorDataset(x, y), BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))


def owner(mode: str, folder: Path, address: str, identity: Path) -> None:
    """One process of a run; finishes it, or is killed."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    front = nn.Linear(FEATURES, FEATURES).requires_grad_(mode == "fresh")
    layers = [front, nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, CLASSES)]
    cut = cloister.cut(
        nn.Sequential(*layers), front="0", head="3" if mode == "fresh" else None, example=torch.zeros(4, FEATURES)
    )
    ledger = cloister.Ledger(f"sqlite:///{folder / 'privacy.sqlite'}")
    with cloister.Trainer(
        cut,
        node=address,
        identity=identity,
        policy=POLICIES[mode],
        ledger=ledger,
        data_set="data",
        optimizer=cloister.SGD(lr=0.01),
        micro_batches=2,
        checkpoints=cloister.Checkpoints(folder=folder / "run", every=5),
        detect_hijacking=False,
    ) as trainer:
        print("ready", flush=True)  # noqa: T201 - whoever kills waits for it
        trainer.fit(data(), EPOCHS, resume=True)


def behind(recorder: Recorder, run: str, folder: Path) -> list[str]:
    """Where the ledger says less than what came; nothing, if all is well."""
    with contextlib.closing(cloister.Ledger(f"sqlite:///{folder / 'privacy.sqlite'}")) as ledger:
        entries = ledger.entries("data")
        ledger.verify()
    found = []
    released: dict[tuple[str, int], int] = defaultdict(int)
    kinds = {node_pb2.PHASE_FORWARD: "activations", node_pb2.PHASE_BACKWARD: "gradients"}
    for (of, phase, step, _), digests in recorder.frames.items():
        if of == run:
            key = kinds[node_pb2.Phase.ValueType(phase)], step // STEPS
            released[key] = max(released[key], len(digests))
    for (kind, epoch), count in sorted(released.items()):
        paid = sum(entry.kind == kind and entry.step // STEPS == epoch for entry in entries)
        if paid < count:
            found.append(f"{run}: {kind} of epoch {epoch} left with {count} noises, and {paid} are accounted")
    paid = sum(entry.kind == "activations" for entry in entries)
    if len(recorder.tables[run]) > paid:
        found.append(f"{run}: {len(recorder.tables[run])} tables left, and {paid} are accounted")
    return found


@dataclass
class Tally:
    kills: int = 0
    midway: int = 0
    runs: int = 0
    frames: int = 0
    drawn_again: int = 0
    tables: int = 0
    behind: list[str] = field(default_factory=list)


def chaos(kills: int, folder: Path, seed: int = 0) -> Tally:
    """Runs, killed ``kills`` times in all; each is finished in the end."""
    rng, tally, recorder = random.Random(seed), Tally(), Recorder()  # noqa: S311 - repeatable
    own = cloister.create_identity(folder / "node", role="node", passphrase="chaos")
    identity = cloister.create_identity(folder / "owner", role="owner", passphrase="chaos")
    (folder / "trusted").mkdir()
    (folder / "trusted" / "owner.crt").write_bytes(identity.certificate_pem)
    (folder / "state").mkdir()
    trust = Trust(folder / "trusted")
    config = NodeConfig(listen="localhost:0", identity=own, trust=trust, state_dir=folder / "state", device="cpu")
    with recorder.listening():
        node = start_node(config)
        address = f"localhost:{node.port}#sha256:{own.fingerprint}"
        try:
            while tally.kills < kills:
                mode = ("fresh", "table")[tally.runs % 3 == 2]
                recorder.run = f"{mode}-{tally.runs}"
                home = folder / recorder.run
                home.mkdir()
                command = [sys.executable, "-m", "tests.private_chaos", "--owner", mode, str(home), address]
                _until_done([*command, str(folder / "owner")], kills, rng, tally, recorder)
                tally.behind += behind(recorder, recorder.run, home)
                tally.runs += 1
        finally:
            node.stop()
    tally.frames = len(recorder.frames)
    tally.drawn_again = sum(len(digests) > 1 for digests in recorder.frames.values())
    tally.tables = sum(len(digests) for digests in recorder.tables.values())
    return tally


def _until_done(command: list[str], kills: int, rng: random.Random, tally: Tally, recorder: Recorder) -> None:
    """Starts the owner until it is done; kills it at most twelve times: after some frames, or while it begins."""
    here = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if process.stdout is not None:
            process.stdout.readline()  # torch is loaded
        if tally.kills < kills and here < 12:
            # Counted in frames, which come whatever else the machine does; a quarter fall before the first.
            wait = 0 if rng.random() < 0.25 else rng.randrange(1, 48)
            before = recorder.heard
            pause, until = rng.uniform(0.0, 0.5 if not wait else 0.02), before + wait
            while recorder.heard < until and process.poll() is None:
                time.sleep(0.001)
            time.sleep(pause)
            process.kill()
            tally.midway += recorder.heard > before
        _, said = process.communicate()
        if process.returncode == -signal.SIGKILL:
            tally.kills += 1
            here += 1
        elif process.returncode:
            raise RuntimeError(f"the owner failed:\n{said.decode()}")
        else:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--owner", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.owner:
        mode, folder, address, identity = options.owner
        owner(mode, Path(folder), address, Path(identity))
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = chaos(options.kills, Path(folder), options.seed)
    print(  # noqa: T201 - a program
        f"{tally.kills} kills ({tally.midway} while training) in {tally.runs} runs, {tally.frames} frames, "
        f"{tally.drawn_again} drawn again, "
        f"{tally.tables} tables, {time.monotonic() - began:.0f} s: "
        + ("the ledger was never behind" if not tally.behind else "\n".join(tally.behind))
    )
    return 1 if tally.behind else 0


if __name__ == "__main__":
    sys.exit(main())
