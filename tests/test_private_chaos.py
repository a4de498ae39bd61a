"""An owner that is killed at random moments, and a ledger that is never behind (the long form is a program)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.private_chaos import Recorder, behind, chaos


@pytest.mark.timeout(300)
def test_T11_killing_the_owner_at_random_moments_never_lets_the_ledger_fall_behind(tmp_path: Path) -> None:
    tally = chaos(4, tmp_path, seed=1)

    assert tally.kills == 4
    assert tally.behind == []
    assert tally.frames > 100
    assert tally.midway > 0


def test_T11_a_release_that_the_ledger_does_not_name_is_seen(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.frames["run", 1, 0, 0] = {b"one noise"}

    assert behind(recorder, "run", tmp_path) == ["run: activations of epoch 0 left with 1 noises, and 0 are accounted"]
