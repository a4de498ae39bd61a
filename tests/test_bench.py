"""The benchmarks measure what they say: turns, ratios, bounds, sentences. How fast anything is, no test asserts."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import __main__ as program
from bench import loopback, memory, privacy, small, subjects, wan
from bench.blocks import Contender, Measured, Spread, race
from bench.models import ECG_CNN, MLP
from bench.plots import draw
from bench.privacy import Measured as Measured_
from bench.report import Chapter, Finding, Table, as_json, as_markdown, merged
from bench.runs import SplitRun, addressed
from bench.treatments import FRESH_EPOCHS, TREATMENTS, Treatment
from bench.wan import Crossing, Wire, bound_s
from client_side.link import NodeAddress, Traffic
from client_side.spawn import LocalNode
from privacy.accounting import Relation, epsilon_of
from privacy.guard import fresh_releases
from privacy.ledger import Budget
from privacy.tables import label_releases, plan_table
from wire.errors import ConfigError


def contender(name: str, step_s: Callable[[int], float], log: list[str], rows: int = 64) -> Contender:
    """Trains in no time and says that its ``n``-th run took ``step_s(n)`` a step."""
    runs = 0

    def run(steps: int) -> float:
        nonlocal runs
        log.append(name)
        runs += 1
        return steps * step_s(runs)

    return Contender(name, run, rows)


def chapter(*findings: Finding) -> Chapter:
    return Chapter("A title", "How.", (Table("T", ("", "x"), (("row", "1"),)),), findings)


# --- blocks


def test_contenders_take_turns_with_the_baseline_and_every_other_round_runs_backwards() -> None:
    log: list[str] = []
    a, b, c = (contender(name, lambda _: 1.0, log) for name in "ABC")

    race(a, [b, c], rounds=2, block_s=1.0)

    warm_up = ["A", "A", "B", "B", "C", "C"]
    assert log == [*warm_up, "A", "B", "A", "C", "A", "A", "C", "A", "B", "A"]


def test_a_stride_spares_blocks_of_the_baseline() -> None:
    log: list[str] = []
    a, b, c = (contender(name, lambda _: 1.0, log) for name in "ABC")

    race(a, [b, c], rounds=1, block_s=1.0, stride=2)

    assert log[6:] == ["A", "B", "C", "A"]


def test_a_ratio_is_taken_against_the_blocks_around_it_so_that_drift_cancels() -> None:
    # The machine slows down by a second each block; the contender always needs twice what the machine gives.
    blocks = [0]

    def machine(factor: float) -> Callable[[int], float]:
        def step_s(run: int) -> float:
            if run <= 2:  # warm-up
                return 1.0
            blocks[0] += 1
            return factor * (10.0 + blocks[0])

        return step_s

    log: list[str] = []
    _, measured = race(contender("A", machine(1.0), log), [contender("B", machine(2.0), log)], rounds=3, block_s=1.0)

    assert measured.ratios == pytest.approx((0.5, 0.5, 0.5))


def test_a_block_has_as_many_steps_as_fill_its_time() -> None:
    asked: list[int] = []

    def run(steps: int) -> float:
        asked.append(steps)
        return 0.1 * steps

    race(Contender("A", run, 64), [], rounds=1, block_s=1.0)

    assert asked == [1, 1, 10, 10]


def test_throughputs_are_compared_where_steps_have_different_rows() -> None:
    log: list[str] = []
    a, b = contender("A", lambda _: 1.0, log, rows=64), contender("B", lambda _: 1.0, log, rows=32)

    _, measured = race(a, [b], rounds=1, block_s=1.0)

    assert measured.ratio.median == 0.5
    assert measured.rate.median == 32


def test_a_spread_is_median_smallest_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


# --- bounds


SLOW = Wire(0.05, 100e6)


def crossing(direct: float, over: float, topology: str = "u_shape", up: int = 1000, down: int = 1000) -> Crossing:
    one, two = Measured("direct", 64, (direct,), (1.0,)), Measured("over", 64, (over,), (1.0,))
    return Crossing(SLOW, topology, 8, one, two, Traffic(up, down, 0))  # type: ignore[arg-type]  # one of the two


def test_the_bound_is_the_larger_of_compute_and_the_busier_direction() -> None:
    assert bound_s(0.5, Traffic(12_500_000, 1, 0), SLOW) == 1.0
    assert bound_s(0.5, Traffic(1, 12_500_000, 0), SLOW) == 1.0
    assert bound_s(2.0, Traffic(12_500_000, 1, 0), SLOW) == 2.0


def test_the_share_is_the_bound_over_the_step() -> None:
    assert crossing(direct=0.8, over=1.0).share.median == pytest.approx(0.8)


@pytest.mark.parametrize(("topology", "trips"), [("u_shape", 2), ("vanilla", 1)])
def test_the_round_trips_of_the_topology_count_into_the_second_bound(topology: str, trips: int) -> None:
    assert crossing(0.8, 1.0, topology).share_with_latency.median == pytest.approx(0.8 + trips * 0.05)


# --- what is told


@pytest.mark.parametrize(
    ("finding", "sentence"),
    [
        (Finding("x", 0.954, 0.95), "x: 0.95 (wanted: at least 0.95; **met**)."),
        (Finding("x", 0.9, 0.95), "x: 0.90 (wanted: at least 0.95; **not met**)."),
        (Finding("x", 1.2, 1.3, at_most=True), "x: 1.20 (wanted: at most 1.3; **met**)."),
        (Finding("x", 1.4, 1.3, at_most=True), "x: 1.40 (wanted: at most 1.3; **not met**)."),
        (Finding("x", 7.0, unit=" ms"), "x: 7.00 ms."),
    ],
)
def test_a_sentence_says_whether_the_number_reaches_its_target(finding: Finding, sentence: str) -> None:
    assert finding.sentence == sentence


def test_the_report_names_the_machine_and_the_command_and_holds_every_table() -> None:
    text = as_markdown([chapter(Finding("f", 1.0))], "make bench", 60.0)

    assert "Measured on: " in text
    assert "`make bench` (it took 1.0 minutes)" in text
    assert "|  | x |\n| --- | ---: |\n| row | 1 |" in text
    assert "- f: 1.00." in text


def test_what_is_not_measured_anew_stays_in_the_report() -> None:
    both = "# Results\n\n## First\n\nold\n\n## Second\n\nold\n"
    kept = merged(both, "# Results\n\nwords\n\n## Second\n\nnew\n")

    assert kept == "# Results\n\nwords\n\n## First\n\nold\n\n## Second\n\nnew\n"
    assert merged("", both) == both


def test_the_json_report_says_what_was_met() -> None:
    told = json.loads(as_json([chapter(Finding("f", 1.0, 2.0))], "make bench", 60.0))

    assert told["chapters"][0]["findings"][0]["met"] is False
    assert told["chapters"][0]["tables"][0]["rows"] == [["row", "1"]]


def test_results_are_written_only_where_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "RESULTS.md"
    monkeypatch.setattr(program, "RESULTS", file)
    monkeypatch.setitem(program._BENCHMARKS, "memory", lambda _: chapter())

    program.main(["memory"])
    assert not file.exists()
    assert program.main(["memory", "--write"]) == 0

    assert file.read_text().startswith("# Results")
    assert "A title" in capsys.readouterr().out


def test_a_data_folder_is_in_the_command_that_repeats_a_benchmark_but_not_by_name() -> None:
    assert program._command("privacy", quick=True, data=True) == "python -m bench privacy --quick --data FOLDER"
    assert program._command("all", quick=False) == "make bench"


# --- accuracy against ε


def measured(treatment: str, epsilon: float, *percents: float, front: str = "a", subject: str = "beats") -> Measured_:
    return Measured_(subject, "patient", front, treatment, epsilon, Relation.REPLACE_ONE, percents)


FOUND = [
    measured("no DP", math.inf, 97.0, 99.0),
    measured("rows, once", 1.0, 20.0, 22.0),
    measured("moments", 1.0, 90.0, 92.0),
    measured("no DP", math.inf, 96.0, 96.0, front="b"),
    measured("moments", 1.0, 93.0, 93.0, front="b"),
    measured("no DP, end to end, without a cut", math.inf, 99.5, front=""),
]


def test_a_chapter_names_the_best_front_and_treatment_of_each_epsilon_and_both_distances() -> None:
    (finding,) = privacy.chapter(FOUND, privacy.Extent(epsilons=(1.0,))).findings

    assert finding.sentence == (
        "beats, ε = 1: best is moments, front b, 93.0 %; that is 6.5 points below no DP end to end, and below no DP "
        "with the same front by: 3.00 points."
    )


def test_a_chapter_has_a_row_for_each_treatment_and_front_with_mean_and_spread() -> None:
    (table,) = privacy.chapter(FOUND, privacy.Extent(epsilons=(1.0,))).tables

    assert table.columns == ("treatment", "front", "ε = 1", "∞")
    assert table.rows[0] == ("no DP", "a", "", "98.0 ± 1.4")
    assert table.rows[2] == ("moments", "a", "91.0 ± 1.4", "")


def test_a_figure_that_is_known_from_elsewhere_becomes_a_target() -> None:
    found = [
        measured("moments", 1.0, 89.0, subject="digits"),
        measured("moments", 1.0, 90.0, front="b", subject="digits"),
    ]

    (finding,) = privacy._reached(found)

    assert (finding.measured, finding.met) == (90.0, True)


def test_the_chapter_says_that_choosing_by_these_figures_is_tuning_on_private_data() -> None:
    assert "tuning on private data" in privacy.chapter([], privacy.QUICK).what


def test_the_plot_shows_each_treatment_on_its_best_front(tmp_path: Path) -> None:
    (panel,) = privacy.panels(FOUND)
    draw([panel], tmp_path / "images" / "plot.png")

    assert {curve.name: curve.points for curve in panel.curves} == {
        "rows, once": ((1.0, 21.0),),
        "moments": ((1.0, 93.0),),
    }
    assert panel.level == 98.0
    assert (tmp_path / "images" / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("treatment", TREATMENTS, ids=lambda t: t.name)
@pytest.mark.parametrize("patients", [False, True])
def test_every_treatment_that_is_measured_settles_within_its_budget(treatment: Treatment, *, patients: bool) -> None:
    features = subjects.Features("f", torch.eye(4).repeat(30, 1), torch.eye(4))
    units = torch.arange(120) // 6 if patients else None
    labels = torch.arange(4).repeat(30), torch.arange(4)
    subject = subjects.Subject(
        "s", 4, (features,), labels, units, "patient", (features.train, features.test), torch.nn.Identity
    )
    trial = privacy.Trial(subject, features, treatment, 2.0, Relation.REPLACE_ONE, 0)
    policy = treatment.policy(privacy._more(trial))

    releases = (
        [*label_releases(policy), *fresh_releases(policy, epochs=FRESH_EPOCHS)]
        if treatment.fresh
        else plan_table(policy, Budget(policy.epsilon, policy.delta, policy.relation)).releases
    )

    assert policy.unit == ("patient" if patients else "record")
    assert 1.9 < epsilon_of([release.event for release in releases], policy.delta, policy.relation) <= 2.002


def test_T10_a_trial_through_a_node_learns_and_spends_what_was_asked(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres, labels = torch.eye(6)[:3], torch.arange(3).repeat(400)
    rows = centres[labels] + 0.1 * torch.randn(1200, 6, generator=generator)
    features = subjects.Features("f", rows[:1000], rows[1000:])
    subject = subjects.Subject(
        "s",
        3,
        (features,),
        (labels[:1000], labels[1000:]),
        None,
        "record",
        (rows[:1000], rows[1000:]),
        torch.nn.Identity,
    )
    by_name = {treatment.name: treatment for treatment in TREATMENTS}
    with LocalNode(tmp_path, threads=1) as node:
        trial = privacy.Trial(subject, features, by_name["moments"], 2.0, Relation.REPLACE_ONE, 0)
        percent = privacy.accuracy(trial, node)

    assert percent > 95


def test_a_missing_or_foreign_mnist_file_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no \*images\*.gz"):
        subjects._idx(tmp_path, "images", 3)
    (tmp_path / "t10k-labels.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x09abc"))
    with pytest.raises(ConfigError, match="no whole IDX file"):
        subjects._idx(tmp_path, "labels", 1)


# --- small runs of the real thing


def test_loopback_measures_split_and_unsplit_and_the_bytes_between() -> None:
    plan = loopback.Plan((MLP,), (1,), ((1, 1), (2, 1), (2, 2)), closer=1, sweep=1, block_s=0.01)

    (table,) = loopback.loopback(plan).tables

    rows = {row[0]: row for row in table.rows}
    assert list(rows) == [
        "unsplit",
        "unsplit, 2 micro-batches",
        "U-shaped, whole batches",
        "U-shaped, 1 of 2 in flight",
        "U-shaped, 2 of 2 in flight",
        "vanilla, whole batches",
        "vanilla, 1 of 2 in flight",
        "vanilla, 2 of 2 in flight",
    ]
    # Smashed data and, U-shaped, output gradients, of 64 rows and 256 features in float32; vanilla labels, in int64.
    assert rows["U-shaped, whole batches"][-2:] == ("131,072", "131,072")
    assert rows["vanilla, 2 of 2 in flight"][-2:] == ("66,048", "65,536")
    assert rows["U-shaped, 2 of 2 in flight"][3]


def test_a_small_model_runs_against_the_bare_loop_and_every_microsecond_of_a_step_is_told() -> None:
    told = small.small(small.Plan((MLP,), (1,), rounds=1, block_s=0.01, steps=5))

    rates, spans = told.tables
    assert [row[0] for row in rates.rows] == [
        "MLP, U-shaped, 1 thread",
        "MLP, vanilla, 1 thread",
    ]
    assert [finding.target for finding in told.findings] == [0.9, 0.9]
    for column in (1, 2):
        numbers = [int(row[column].replace(",", "")) for row in spans.rows]
        assert sum(numbers[:-2]) == pytest.approx(numbers[-2], abs=len(numbers))
        assert all(numbers[:4])
        assert 0 < numbers[-1] < numbers[-2]
    heads = next(row for row in spans.rows if row[0] == "head, forward")
    assert int(heads[1]) > 0
    assert int(heads[2]) == 0


def test_a_step_over_a_link_takes_its_latency_and_its_bytes() -> None:
    wire = Wire(0.06, 50e6)
    plan = dataclasses.replace(wan.QUICK, links=(wire,), subjects=(MLP,), micro_batches=(1,), rounds=1, block_s=0.01)

    (table,) = wan.wan(plan).tables

    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert table.title.startswith("60 ms, 50 Mbit/s")
    assert cells["transfer ms"] == "21.0"  # 131,072 bytes at 50 Mbit/s
    assert float(cells["step ms"]) > 2 * 60 + 2 * 10  # two round trips, and the smashed data and their gradients


def test_a_node_behind_a_relay_is_still_the_pinned_one() -> None:
    class _Node:
        address = "localhost:7700#sha256:" + 64 * "a"

    assert addressed(_Node(), 99) == NodeAddress(target="localhost:99", pin="sha256:" + 64 * "a")  # type: ignore[arg-type]


def test_idle_sessions_hold_at_least_their_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "IDLE_S", 0.0)

    told = memory.memory(memory.Plan(2))

    rows = {row[0]: row[1] for row in told.tables[0].rows}
    assert rows["parameters of each middle"] == "1,001,000"
    assert rows["sum of states (parameters and momentum), MiB"] == "15.3"
    assert told.findings[0].measured > 0.9


def test_a_run_counts_the_bytes_of_a_step_and_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SplitRun.__new__(SplitRun)
    run.steps = 4
    monkeypatch.setattr(run, "trainer", type("_Trained", (), {"traffic": Traffic(400, 80, 1)})(), raising=False)

    assert run.bytes_per_step == Traffic(100, 20, 1)


def test_the_quick_benchmarks_are_smaller_than_the_full_ones() -> None:
    assert len(loopback.QUICK.in_flight) < len(loopback.FULL.in_flight)
    assert small.QUICK.rounds < small.FULL.rounds
    assert wan.QUICK.subjects == (ECG_CNN,)
    assert memory.QUICK.sessions < memory.FULL.sessions == 50
