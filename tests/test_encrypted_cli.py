"""Encrypted training as a data owner meets it: job file, plan, run, record, card, and what is refused, and why."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from typer.testing import CliRunner, Result

import cloister
from client_side.records import by_chance
from cloister.assembly import make_loader
from cloister.exits import ExitCode
from cloister.jobfile import load_job
from cloister.main import app
from cloister.runs import Interruption
from privacy.accounting import Relation, SampledGaussian, epsilon_of
from privacy.ckks.workers import CipherWorkers
from wire.ciphertexts import RINGS
from wire.errors import ConfigError

RECORDS, BATCH, RATE, STEPS = 640, 64, 0.1, 10
FACTORIES = """
import torch
from collections import OrderedDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def model(depth=1):
    front = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
    mid = nn.Linear(16, 3) if depth == 1 else nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    return nn.Sequential(OrderedDict(front=front, mid=mid, head=nn.Identity()))


def model_example(rows):
    return torch.randn(rows, 12)


def _rows(seed, count):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 12, generator=torch.Generator().manual_seed(9)) * 2
    labels = torch.randint(0, 3, (count,), generator=generator)
    return TensorDataset(centres[labels] + torch.randn(count, 12, generator=generator), labels)


def train_loader(batch_size=64):
    return DataLoader(_rows(1, 640), batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))


def test_loader(batch_size=64):
    return DataLoader(_rows(2, 200), batch_size, generator=torch.Generator().manual_seed(0))
"""
JOB = """
[model]
factory = "encrypted_factories:model"

[cut]
front = "front"
head = "head"

[data]
train = "encrypted_factories:train_loader"
test = "encrypted_factories:test_loader"

[train]
epochs = 3

[optimizer]
name = "sgd"
lr = 0.5

[node]
address = "{address}"
identity = "{identity}"

[privacy]
activations = {{ treatment = "ckks", clip = 4.0, gradient_clip = 0.5 }}
epsilon = 4.0
delta = 1e-4
data_set = "sixty"
ledger = "sqlite:///ledger.sqlite"

[output]
dir = "run"
"""
NOWHERE = "localhost:1#sha256:" + "0" * 64


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cloister.LocalNode]:
    with cloister.LocalNode(tmp_path_factory.mktemp("node"), threads=1) as found:
        yield found


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the job and its factories are, and the ledger."""
    (tmp_path / "encrypted_factories.py").write_text(FACTORIES, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write_job()
    return tmp_path


def write_job(address: str = NOWHERE, identity: object = "owner") -> None:
    Path("job.toml").write_text(JOB.format(address=address, identity=identity), encoding="utf-8")


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(*settings: str) -> tuple[int, dict[str, Any], str]:
    result = ran("privacy", "plan", "job.toml", "--format", "json", *(w for s in settings for w in ("--set", s)))
    return result.exit_code, json.loads(result.stdout) if result.stdout.startswith("{") else {}, result.output


def spent() -> list[Any]:
    with contextlib.closing(cloister.Ledger("sqlite:///ledger.sqlite")) as ledger:
        return ledger.entries("sixty")


def test_a_job_trains_under_encryption_with_the_noise_that_its_budget_leaves(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)

    code, plan, _ = planned()
    result = ran("train", "job.toml")

    assert (code, result.exit_code) == (0, 0), result.output
    record, card = json.loads(Path("run/result.json").read_text()), Path("run/model-card.md").read_text()
    events = [entry.event for entry in spent()]
    noise = record["encryption"]["noise"]
    assert events == [SampledGaussian(rate=RATE, noise_multiplier=noise, steps=STEPS)] * 3
    assert 3.9 < epsilon_of(events, 1e-4, Relation.REPLACE_ONE) <= 4.0
    assert plan["releases"][0] | {"epsilon": 0, "signal_to_noise": 0} == {
        "kind": "update",
        "treatment": "ckks",
        "noise": round(noise, 4),
        "times": 3 * STEPS,
        "epsilon": 0,
        "signal_to_noise": 0,
    }
    assert (plan["fits"], plan["holes"]) == (True, [])
    assert record["encryption"] == {
        "ring_degree": 2048,
        "modulus_bits": 54,
        "security_bits": 128,
        "value_bits": 23,
        "weight_bits": 20,
        "clip": 4.0,
        "gradient_clip": 0.5,
        "noise": noise,
        "weights": "sent",
    }
    assert record["test_accuracy"] > 0.5
    assert record["epsilon"] == pytest.approx(4.0, abs=0.1)
    for told in ("## Encryption", "128 bits", "ring degree 2048, modulus of 54 bits", "clipped to 0.5 over all layers"):
        assert told in card
    for said in (result.output, card):
        assert "per record" in said
        assert "which records joined which sample stays secret" in said
        assert "nobody breaks the encryption" in said
        assert "that the node's answers ended a run, tell nothing" in said


def test_epsilon_is_shown_while_it_trains(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)

    said = ran("train", "job.toml", "--set", "privacy.activations={treatment='ckks',clip=4,noise=2.0}").output

    shown = [float(value) for value in re.findall(r"epoch \d/3 .* ε (\S+)", said)]
    assert len(shown) == 3
    assert 0 < shown[0] < shown[1] < shown[2] < 4.01


def test_a_second_run_gets_nothing_from_a_spent_budget(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)
    assert ran("train", "job.toml", "--epochs", 1).exit_code == 0

    again = ran("train", "job.toml", "--epochs", 1, "--out", "again")

    assert again.exit_code == ExitCode.PRIVACY
    assert "is spent on this data set" in again.output
    assert len(spent()) == 1


def test_a_part_of_the_budget_goes_as_far_as_it_goes(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)
    assert ran("train", "job.toml", "--epochs", 1, "--set", "privacy.epsilon=2").exit_code == 0
    assert ran("train", "job.toml", "--epochs", 1, "--out", "again").exit_code == 0

    one, two = (entry.event for entry in spent())
    assert 3.9 < epsilon_of([one, two], 1e-4, Relation.REPLACE_ONE) <= 4.0
    assert one.noise_multiplier != two.noise_multiplier


def test_the_weights_may_stay_with_the_node(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)
    kept = "privacy.activations={treatment='ckks',clip=4.0,send_weights=false}"

    assert ran("train", "job.toml", "--epochs", 1, "--set", kept).exit_code == 0

    assert json.loads(Path("run/result.json").read_text())["encryption"]["weights"] == "kept"
    assert "output gradients went up encrypted" in Path("run/model-card.md").read_text()


def test_without_a_budget_nothing_is_claimed_and_batches_are_the_loaders_own(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)
    text = Path("job.toml").read_text().replace("epsilon = 4.0\n", "")
    Path("job.toml").write_text(text)

    said = ran("train", "job.toml", "--epochs", 1)

    assert said.exit_code == 0, said.output
    assert "No differential privacy may be claimed: the encrypted layer's gradients leave without noise" in said.output
    record = json.loads(Path("run/result.json").read_text())
    assert (record["epsilon"], record["encryption"]["noise"]) == (None, None)
    assert "without noise" in Path("run/model-card.md").read_text()


def test_a_run_that_was_stopped_within_an_epoch_goes_on_and_pays_for_what_it_draws_anew(
    node: cloister.LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(node.address, node.owner.folder)

    def stop(own: Interruption, state: Any, control: Any, end: Any) -> None:
        del state
        own.requested = end.step == 14
        control.should_training_stop |= own.requested

    with monkeypatch.context() as patched:
        patched.setattr(Interruption, "on_step_end", stop)
        noised = "privacy.activations={treatment='ckks',clip=4.0,noise=4.0}"
        stopped = ran("train", "job.toml", "--set", noised)
    before = len(spent())
    done = ran("train", "--resume", "run")

    assert (stopped.exit_code, done.exit_code) == (ExitCode.INTERRUPTED, 0), done.output
    assert (before, len(spent())) == (2, 4)
    assert len({entry.event for entry in spent()}) == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["train.micro_batches=4"], "train.micro_batches = 4: a step under encryption is one; write micro_batches = 1"),
        (["privacy.activations=ckks"], 'ckks also needs clip: write activations = { treatment = "ckks", clip = … }'),
        (["privacy.activations={treatment='ckks',clip=4.0,nosie=1.0}"], "privacy.activations.nosie: ckks takes"),
        (["model.args={depth=2}"], "one linear or convolution layer"),
        (["data.args={batch_size=16}"], "expected = 16; at least 32"),
        (["data.args={batch_size=640}", "privacy.activations={treatment='ckks',clip=1e4}"], "wrap"),
        (["privacy.unit=patient"], "ckks draws samples of records"),
    ],
)
def test_what_cannot_be_encrypted_is_refused_with_what_to_do(settings: list[str], complaint: str) -> None:
    code, _, said = planned(*settings)

    assert code in (ExitCode.CONFIG, ExitCode.PRIVACY)
    assert complaint in " ".join(said.split())


def test_a_cut_without_a_head_is_refused_before_anything_is_made() -> None:
    Path("job.toml").write_text(Path("job.toml").read_text().replace('head = "head"\n', ""))

    code, _, said = planned()

    assert code == ExitCode.CONFIG
    assert "cut.head is missing: under encryption the loss stays here" in said


def test_batches_are_secret_samples_of_the_loaders_size_wherever_noise_is_counted() -> None:
    with_epsilon = make_loader(load_job(Path("job.toml")), "train")
    noised = [("--set", "privacy.activations", "{treatment='ckks',clip=4.0,noise=1.0}")]

    assert isinstance(with_epsilon, cloister.PoissonLoader)
    assert (with_epsilon.expected, with_epsilon.rate, len(with_epsilon)) == (BATCH, RATE, STEPS)
    assert isinstance(make_loader(load_job(Path("job.toml"), noised), "train"), cloister.PoissonLoader)
    assert isinstance(make_loader(load_job(Path("job.toml")), "test"), DataLoader)


def test_a_loader_whose_batches_are_not_plain_is_not_replaced_by_samples() -> None:
    data = TensorDataset(torch.zeros(100, 2))
    weighted = DataLoader(data, 50, sampler=WeightedRandomSampler([1.0] * 100, 100))
    collated = DataLoader(data, 50, collate_fn=lambda rows: rows)

    for odd in (weighted, collated, [(torch.zeros(1), torch.zeros(1))]):
        with pytest.raises(ConfigError, match="secret Poisson samples"):
            by_chance(odd)
    own = cloister.PoissonLoader(data, expected=40)
    assert by_chance(own) is own


def test_a_machine_without_the_library_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tenseal" else find(name, *a))

    with pytest.raises(ConfigError, match=re.escape("encryption needs tenseal on this machine")):
        CipherWorkers(RINGS[0])
    code, _, said = planned()
    assert code == ExitCode.CONFIG
    assert 'pip install "cloister[ckks]"' in " ".join(said.split())


# --- cloister inspect -------------------------------------------------------------------------------------------------


def inspected(*options: object) -> Result:
    return ran("inspect", "encrypted_factories:model", "--head", "head", *options)


def test_inspect_tells_what_encryption_would_cost() -> None:
    found = json.loads(inspected("--batch", 64, "--records", 640, "--format", "json").stdout)

    behind = {cut["front"]: cut for cut in found["cuts"]}
    cost = behind["front"]["encryption"]
    assert (cost["features"], cost["outputs"], cost["security_bits"]) == (16, 3, 128)
    assert cost["capacity"] == cloister.PoissonLoader(range(RECORDS), expected=BATCH).capacity == 125
    # 16 features in blocks of 128 rows: one ciphertext with a seed; three come back whole; and 51 parameters each way.
    up, down = 2048 * 54 // 8 + 64 + 4 * 51, 3 * 2 * 2048 * 54 // 8 + 4 * 51
    assert (cost["bytes_up_per_sample"], cost["bytes_down_per_sample"]) == (round(up / 64), round(down / 64))
    assert cost["bytes_per_epoch"] == 10 * (up + down)
    assert 0 < cost["home_ms_per_sample"] < cost["owner_ms_per_sample"]
    assert cost["node_ms_per_sample"] > 0
    assert cost["times_home"] > 1
    assert cost["seconds_per_epoch"] > 10 * (up + down) * 8 / 1e8
    assert behind["front.0"]["encryption"] is None or behind["front.0"]["encryption"]["features"] == 16


def test_inspect_says_so_for_people_too() -> None:
    said = " ".join(inspected("--batch", 64).output.split())

    assert "Encryption is possible" in said
    assert "16 to 3" in said
    assert "measured here just now" in said
    assert "times what computing the layer here would" in said
    assert "It buys confidentiality, not compute" in said


def test_the_bytes_that_inspect_tells_are_those_that_a_run_moves(node: cloister.LocalNode) -> None:
    write_job(node.address, node.owner.folder)
    found = json.loads(inspected("--batch", 64, "--records", 640, "--format", "json").stdout)
    cost = next(cut["encryption"] for cut in found["cuts"] if cut["front"] == "front")

    assert ran("train", "job.toml", "--epochs", 1).exit_code == 0

    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    first, last = lines[0], lines[-1]
    moved = (last["bytes_up"] + last["bytes_down"]) - (first["bytes_up"] + first["bytes_down"])
    assert moved == cost["bytes_per_epoch"] * (STEPS - 1) // STEPS


def test_inspect_says_why_a_middle_cannot_be_encrypted() -> None:
    deep = ran("inspect", "examples.models:mlp", "--format", "json")
    vanilla = ran("inspect", "encrypted_factories:model", "--vanilla", "--format", "json")

    reasons = {cut["no_encryption"] for cut in json.loads(deep.stdout)["cuts"]}
    assert any("layers that multiply" in reason for reason in reasons)
    assert {cut["no_encryption"] for cut in json.loads(vanilla.stdout)["cuts"]} == {
        "without a head the node computes the loss"
    }
    assert "Encryption: behind no front" in ran("inspect", "encrypted_factories:model", "--vanilla").output


def test_inspect_counts_bytes_where_nothing_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "tenseal" else find(name, *a))

    said = inspected("--batch", 64)
    cost = json.loads(inspected("--batch", 64, "--format", "json").stdout)["cuts"][-1]["encryption"]

    assert 'pip install "cloister[ckks]"' in said.output
    assert (cost["owner_ms_per_sample"], cost["times_home"]) == (None, None)
    assert cost["bytes_up_per_sample"] > 0


def test_inspect_says_where_a_batch_does_not_fit_a_ciphertext() -> None:
    found = json.loads(inspected("--batch", 2000, "--format", "json").stdout)

    assert {cut["encryption"] for cut in found["cuts"]} == {None}
    assert any("take smaller batches" in cut["no_encryption"] for cut in found["cuts"])
