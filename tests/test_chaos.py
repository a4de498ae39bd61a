"""The short form of ``make chaos``: real processes, killed at random moments, and numbers that do not show it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import pytest
import safetensors.torch
import torch

from client_side.checkpoints import list_checkpoints, write_checkpoint
from tests.chaos import Chaos, ChaosError, Plan
from tests.chaos_job import compare

PATIENCE_S: Final = 600  # a minute where nothing else runs


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Chaos:
    """What became of a run under four kills and one full disk."""
    made = Chaos(
        Plan(kills=4, steps=40, seed=2, full_disks=1, tear=0.7, owner=0.25),
        tmp_path_factory.mktemp("chaos") / "here",
        say=print,
    )
    made.go()
    return made


@pytest.mark.timeout(PATIENCE_S)
def test_T07_T14_a_run_that_is_killed_at_random_moments_ends_with_the_same_bits(chaos: Chaos) -> None:
    assert chaos.tally.kills.total() == 4
    assert chaos.tally.runs >= 1  # each of them was compared
    assert chaos.tally.full_disks.total() == 1


@pytest.mark.timeout(PATIENCE_S)
def test_a_single_other_bit_in_a_checkpoint_is_seen_by_the_comparison(chaos: Chaos, tmp_path: Path) -> None:
    run = chaos.copy_of_reference(tmp_path / "altered")
    compare(chaos.reference, run)
    [newest, *_] = list_checkpoints(run / "state" / "checkpoints")
    checkpoint = newest.read()
    tensors = dict(checkpoint.tensors)
    name = next(name for name in tensors if name.startswith("optimizer/") and tensors[name].is_floating_point())
    tensors[name] = torch.nextafter(tensors[name], torch.full_like(tensors[name], torch.inf))
    newest.remove()
    write_checkpoint(run / "state" / "checkpoints", dataclasses.replace(checkpoint, tensors=tensors))

    with pytest.raises(ChaosError, match=name):
        compare(chaos.reference, run)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("lines", ["missing", "twice"])
def test_a_step_that_is_logged_twice_or_not_at_all_is_seen_by_the_comparison(
    chaos: Chaos, tmp_path: Path, lines: str
) -> None:
    run = chaos.copy_of_reference(tmp_path / "altered")
    logged = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    changed = logged[:5] + logged[6:] if lines == "missing" else logged[:6] + logged[5:]
    (run / "metrics.jsonl").write_text("".join(changed))

    with pytest.raises(ChaosError, match="metrics, line"):
        compare(chaos.reference, run)


@pytest.mark.timeout(PATIENCE_S)
def test_another_model_file_is_seen_by_the_comparison(chaos: Chaos, tmp_path: Path) -> None:
    run = chaos.copy_of_reference(tmp_path / "altered")
    weights = safetensors.torch.load_file(run / "model.safetensors")
    name = next(name for name in weights if name.endswith("running_mean"))
    weights[name][0] = -weights[name][0]
    safetensors.torch.save_file(weights, run / "model.safetensors", {"format": "pt"})

    with pytest.raises(ChaosError, match=r"model\.safetensors"):
        compare(chaos.reference, run)
