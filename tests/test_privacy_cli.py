"""``cloister privacy``, and the claims that it must not print: by their numbers in docs/explanation/privacy.md."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner, Result

from cloister.exits import ExitCode
from cloister.main import app
from privacy.accounting import Event
from privacy.guard import Guard, Situation
from privacy.ledger import Ledger
from privacy.policy import CLEAR, Moments, Policy
from privacy.tables import Records

FACTORIES = """
import cloister
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model(frozen=True):
    front = nn.Sequential(nn.Linear(6, 4), cloister.UnitRows()).requires_grad_(not frozen)
    return nn.Sequential(front, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3).requires_grad_(False))


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(60, 6, generator=generator), torch.arange(60) % 3)
    return DataLoader(data, 10, shuffle=True, generator=generator)


def patients():
    return torch.arange(60) // 6


def few():
    return torch.arange(59)
"""
JOB = """
[model]
factory = "factories:model"
args = {{ frozen = {frozen} }}

[cut]
front = "0"
{head}

[data]
train = "factories:loader"

[train]
epochs = {epochs}

[optimizer]
name = "sgd"
lr = 0.1

[node]
address = "localhost:1"
pin = "sha256:0000000000000000000000000000000000000000000000000000000000000000"

[privacy]
ledger = "sqlite:///ledger.sqlite"
data_set = "sixty"
{privacy}

[output]
dir = "run"
"""
FRESH = """
activations = { treatment = "rows", clip = 1.0, noise = %s, once = false }
gradients = { treatment = "gaussian", clip = 1.0, noise = %s }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the job and its factories are, and the ledger."""
    (tmp_path / "factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def ran(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["privacy", *arguments])


def planned(privacy: str, *, head: str = "", epochs: int = 1, frozen: str = "true") -> tuple[int, dict[str, Any]]:
    """The exit code of ``privacy plan`` on that policy, and what it told."""
    text = JOB.format(
        privacy=privacy if "classes" in privacy else f"classes = 3\n{privacy}",
        head=head and f'head = "{head}"',
        epochs=epochs,
        frozen=frozen,
    )
    Path("job.toml").write_text(text, encoding="utf-8")
    result = ran("plan", "job.toml", "--format", "json")
    return result.exit_code, json.loads(result.stdout) if result.stdout.startswith("{") else {"said": result.output}


def situation(*, front_learns: bool) -> Situation:
    return Situation(
        data_set="sixty", run="r", vanilla=True, front_learns=front_learns, head_learns=False, once_an_epoch=True
    )


def test_a_plan_takes_its_noise_from_the_budget_and_fits() -> None:
    code, found = planned('activations = "moments"\nepsilon = 1.0')

    assert (code, found["fits"], found["holes"]) == (0, True, [])
    assert found["spent_after"] == pytest.approx(1.0, abs=1e-3)
    assert [line["treatment"] for line in found["releases"]] == ["moments"]
    assert found["releases"][0]["noise"] > 5


def test_a_plan_per_patient_counts_patients() -> None:
    privacy = 'activations = { treatment = "moments", rows = 60 }\nepsilon = 1.0\n'
    _, by_record = planned(privacy)
    _, by_patient = planned(privacy + 'unit = "patient"\nunits = "factories:patients"')

    assert (by_record["units"], by_patient["units"]) == (60, 10)
    ratios = [found["releases"][0]["signal_to_noise"] for found in (by_record, by_patient)]
    assert ratios[0] == pytest.approx(6 * ratios[1], rel=1e-2)


def test_wrong_claim_1_rows_that_the_node_sees_are_billed_in_full() -> None:
    # Billed as secret Poisson samples of 10 of 60 records, this noise would come to a single-digit ε.
    code, found = planned(FRESH % (4.0, 4.0) + "epsilon = 8.0", head="3", epochs=15)

    assert (code, found["fits"]) == (ExitCode.PRIVACY, False)
    assert found["spent_after"] > 14


def test_wrong_claim_2_no_epsilon_for_a_front_that_trains() -> None:
    code, found = planned('activations = "moments"\nepsilon = 1.0', frozen="false")

    assert (code, found["spent_after"]) == (ExitCode.PRIVACY, "infinite")
    assert any("the front trains on the data without dp_sgd" in hole for hole in found["holes"])


def test_wrong_claim_3_noise_of_one_clip_is_told_as_10_and_not_as_4() -> None:
    privacy = FRESH % (1.0, 1e6) + "epsilon = 20.0\n"
    _, replaced = planned(privacy, head="3")
    _, blanked = planned(privacy + 'relation = "add_remove"', head="3")

    assert replaced["spent_after"] == pytest.approx(9.997, abs=0.01)
    assert blanked["spent_after"] == pytest.approx(4.377, abs=0.01)


def test_wrong_claim_4_all_epochs_are_billed() -> None:
    once, ten = (planned(FRESH % (20.0, 20.0) + "epsilon = 8.0", head="3", epochs=n)[1] for n in (1, 10))

    assert ten["spent_after"] > 3 * once["spent_after"]
    assert [line["times"] for line in ten["releases"]] == [10, 10]


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ('gradients = "clear"', "output gradients leave in the clear"),
        ('gradients = "included"', "output gradients depend on labels"),
        ('inference = "clear"', "evaluation and prediction send activations in the clear"),
    ],
)
def test_wrong_claim_5_what_the_u_shape_tells_beside_the_rows_counts(privacy: str, words: str) -> None:
    rows = 'activations = { treatment = "rows", clip = 1.0 }\nlabels = "never"\nepsilon = 1.0\n'
    code, found = planned(rows + privacy, head="3")

    assert code == ExitCode.PRIVACY
    assert any(words in hole for hole in found["holes"])


def test_wrong_claim_7_a_patient_is_no_record() -> None:
    code, found = planned('activations = { treatment = "moments", rows = 60 }\nepsilon = 1.0\nunit = "patient"')

    assert code == ExitCode.CONFIG
    assert "say whose each record is" in found["said"]


def test_a_plan_refuses_what_training_would_refuse() -> None:
    privacy = 'activations = { treatment = "moments", rows = 60 }\nepsilon = 1.0\n'
    few, found = planned(privacy + 'unit = "patient"\nunits = "factories:few"')
    classes, said = planned(privacy.replace("epsilon", "classes = 2\nepsilon"))

    assert (few, classes) == (ExitCode.CONFIG, ExitCode.CONFIG)
    assert "one integer for each" in found["said"]
    assert "labels from 0 to 1" in said["said"]


@pytest.mark.parametrize("command", [("status",), ("history", "sixty")])
def test_T11_a_ledger_that_is_not_there_is_no_clearance(command: tuple[str, ...], folder: Path) -> None:
    found = ran(*command, "--ledger", "sqlite:///elsewhere.sqlite")

    assert found.exit_code == ExitCode.CONFIG
    assert "there is no privacy ledger sqlite:///elsewhere.sqlite" in found.output
    assert not (folder / "elsewhere.sqlite").exists()


def test_T11_a_plan_names_its_ledger_and_begins_none(folder: Path) -> None:
    code, found = planned('activations = "moments"\nepsilon = 1.0')

    assert code == 0
    assert found["ledger"] == "sqlite:///ledger.sqlite"
    assert not (folder / "ledger.sqlite").exists()


def test_a_plan_says_where_the_noise_drowns_what_is_to_be_learnt() -> None:
    planned('activations = "moments"\nepsilon = 1.0')
    drowned = ran("plan", "job.toml", "--set", "privacy.epsilon=0.001")
    clear = ran("plan", "job.toml", "--set", "privacy.epsilon=8.0")

    assert "expect a model that guesses" in drowned.output
    assert "expect a model that guesses" not in clear.output


def test_a_status_of_nobody_is_no_clearance() -> None:
    Ledger("sqlite:///ledger.sqlite").close()
    found = ran("status", "--data-set", "typo", "--ledger", "sqlite:///ledger.sqlite")

    assert found.exit_code == ExitCode.CONFIG
    assert "knows no data set typo" in found.output


def test_wrong_claim_8_data_that_left_in_the_clear_stays_without_a_claim() -> None:
    with contextlib.closing(Ledger("sqlite:///ledger.sqlite")) as ledger:
        situation = Situation(
            data_set="sixty", run="r", vanilla=True, front_learns=True, head_learns=False, once_an_epoch=True
        )
        Guard(CLEAR, ledger).begin(situation)

    status = ran("status", "--data-set", "sixty", "--ledger", "sqlite:///ledger.sqlite")
    code, found = planned('activations = "moments"\nepsilon = 1.0')

    assert "No differential privacy may be claimed: activations leave in the clear" in status.output
    assert code == ExitCode.PRIVACY
    assert "spent_before" not in found or found["spent_before"] == "infinite"


def test_wrong_claim_9_dp_sgd_on_the_front_alone_is_no_dp() -> None:
    privacy = 'activations = "clear"\nfront = { treatment = "dp_sgd", clip = 1.0, noise = 8.0 }\nepsilon = 8.0'
    code, found = planned(privacy, frozen="false")

    assert code == ExitCode.PRIVACY
    assert any("activations leave in the clear" in hole for hole in found["holes"])


def test_wrong_claim_10_no_key_takes_a_seed_for_the_noise() -> None:
    code, found = planned('activations = "moments"\nepsilon = 1.0\nnoise_seed = 1')

    assert code == ExitCode.CONFIG
    assert "privacy.noise_seed" in found["said"]


def test_wrong_claim_11_what_another_run_spent_is_gone_from_the_budget() -> None:
    code, first = planned('activations = "moments"\nepsilon = 1.0')
    with contextlib.closing(Ledger("sqlite:///ledger.sqlite")) as ledger:
        _release(ledger)
    later, found = planned('activations = "moments"\nepsilon = 1.0')

    assert (code, first["spent_before"]) == (0, 0)
    assert later == ExitCode.PRIVACY
    assert "budget" in found["said"]


def _release(ledger: Ledger) -> None:
    """What a run with that budget releases."""
    guard = Guard(Policy(activations=Moments(), epsilon=1.0, classes=3), ledger)
    guard.begin(situation(front_learns=False))
    guard.table(Records(torch.nn.functional.normalize(torch.randn(60, 4)), torch.arange(60) % 3))


def test_history_tells_each_release_and_draws_what_it_came_to(folder: Path) -> None:
    with contextlib.closing(Ledger("sqlite:///ledger.sqlite")) as ledger:
        _release(ledger)
    ledger_url = ("--ledger", "sqlite:///ledger.sqlite")
    history = ran("history", "sixty", "--plot", "spent.png", "--format", "json", *ledger_url)
    lines = json.loads(history.stdout)

    assert [(line["kind"], line["treatment"]) for line in lines] == [("activations", "moments")]
    assert lines[0]["epsilon"] == pytest.approx(1.0, abs=1e-3)
    assert (folder / "spent.png").read_bytes().startswith(b"\x89PNG")
    status = json.loads(ran("status", "--epsilon", "4", "--format", "json", *ledger_url).stdout)
    assert status[0]["left"] == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize("epsilon", ["-1", "0", "nan"])
def test_a_budget_that_is_none_is_refused(epsilon: str) -> None:
    found = ran("status", "--epsilon", epsilon, "--ledger", "sqlite:///ledger.sqlite")

    assert found.exit_code == ExitCode.CONFIG
    assert f"--epsilon {epsilon}: a budget is above 0" in found.output


def test_every_word_of_an_event_is_explained() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "train-privately.md").read_text(encoding="utf-8")

    words = [field.name.replace("_", " ") for event in get_args(Event) for field in dataclasses.fields(event)]
    assert [word for word in words if f"`{word}`" not in page.partition("| word | means |")[2]] == []


def test_people_read_an_infinite_epsilon_as_one_sign() -> None:
    with contextlib.closing(Ledger("sqlite:///ledger.sqlite")) as ledger:
        Guard(CLEAR, ledger).begin(situation(front_learns=True))
    ledger_url = ("--ledger", "sqlite:///ledger.sqlite")

    told = [ran("status", *ledger_url).output, ran("history", "sixty", *ledger_url).output]
    written = json.loads(ran("status", "--format", "json", *ledger_url).stdout)

    assert all("∞" in said and "infinite" not in said for said in told)
    assert (written[0]["epsilon"], written[0]["left"]) == ("infinite", None)


def test_an_unknown_data_set_is_told_and_where_to_look() -> None:
    Ledger("sqlite:///ledger.sqlite").close()
    found = ran("history", "nobody", "--ledger", "sqlite:///ledger.sqlite")

    assert found.exit_code == ExitCode.CONFIG
    assert "cloister privacy status" in found.output
