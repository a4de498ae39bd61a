"""What a leakage audit advises, and its report."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from privacy.leakage import (
    Attack,
    CutLeakage,
    Exhibit,
    LabelGuess,
    Outcome,
    Score,
    Settings,
    Treatment,
    advise,
    write_report,
)
from tests import leakage_audits
from tests.leakage_audits import QUICK
from wire.errors import ConfigError

# pytest finds a file's fixtures by their names in it.
_few_steps, scans = leakage_audits.few_steps, leakage_audits.scans
bench, stem = leakage_audits.bench, leakage_audits.stem


def leakage_of(cut: str, mse: float, *, works: bool = True, trains: bool = True) -> CutLeakage:
    """A finding with these figures; the mean input's error is 1."""
    score = Score(mse, 1 - mse, 0.9)
    outcome = Outcome.RECONSTRUCTS if works else Outcome.VOID
    pictures = np.zeros((2, 1, 8, 8), dtype=np.float32)
    return CutLeakage(
        cut=cut,
        dimensions=64,
        input_dimensions=64,
        measure="SSIM",
        known=100,
        attacked=100,
        front_trains=trains,
        treatment=None,
        distance_correlation=0.5,
        treated_distance_correlation=None,
        chance=0.1,
        baselines={"mean input": Score(1.0, 0.1, 0.1), "nearest neighbour": Score(0.9, 0.2, 0.5)},
        originals_accuracy=0.97,
        attacks=(Attack("informed decoder", "100 pairs", outcome, clear=score),),
        labels=(LabelGuess("gradients", "k-means", "nothing", 0.99),),
        labels_note="",
        exhibits=(Exhibit("originals", pictures), Exhibit("informed decoder", pictures)),
    )


def test_the_cut_that_gives_attacks_the_least_is_recommended_and_the_first_of_equals() -> None:
    advice = advise(
        [leakage_of("a", 0.1), leakage_of("b", 0.62), leakage_of("c", 0.64), leakage_of("d", 0.9, works=False)]
    )

    assert advice.cut == "b"
    assert "38.0 % of what varies" in advice.reasons[0]
    assert "the least is 36.0 %, behind c" in advice.reasons[1]
    assert "leaves less work here" in advice.reasons[1]
    assert any("does not hide labels" in reason for reason in advice.reasons)
    assert any("Audit failed" in reason and ": d." in reason for reason in advice.reasons)
    assert any("proves nothing" in limit for limit in advice.limits)
    assert any("no claim of differential privacy" in limit for limit in advice.limits)


def test_noise_that_hides_is_recommended_with_a_frozen_front_alone() -> None:
    noised = Score(1.1, 0.1, 0.1)
    found = leakage_of("a", 0.1)
    attack = dataclasses.replace(found.attacks[0], treated=noised, treated_beats_mean=False)
    found = dataclasses.replace(found, treatment=Treatment(1, 3), attacks=(attack,))

    trains, frozen = advise([found]), advise([dataclasses.replace(found, front_trains=False)])

    assert frozen.treatment == "rows, clip 1, noise 3 (in units of the clip)"
    assert trains.treatment == f"freeze the front; then {frozen.treatment}"
    assert any("can steer it" in reason for reason in trains.reasons)
    assert all(any("not this" in reason for reason in one.reasons) for one in (trains, frozen))


def test_cuts_that_all_give_nearly_everything_away_are_called_so() -> None:
    leaky, tight = (
        advise([leakage_of("a", 0.01), leakage_of("b", 0.02)]),
        advise([leakage_of("a", 0.01), leakage_of("b", 0.7)]),
    )

    assert any("choosing among them protects nothing" in reason for reason in leaky.reasons)
    assert not any("choosing among them" in reason for reason in tight.reasons)


def test_a_front_that_trains_gets_another_treatment_than_a_frozen_one() -> None:
    assert advise([leakage_of("a", 0.5)]).treatment == "freeze the front and use moments"
    assert advise([leakage_of("a", 0.5, trains=False)]).treatment == "moments or aggregate"


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE: Final = "</style><script>alert(1)</script>\"'><img src=x onerror=alert(1)>$\\frac{&amp;\x1b[31m\x00../../etc"


def test_T26_hostile_names_become_text_in_the_report_and_harmless_in_files(tmp_path: Path) -> None:
    write_report([leakage_of(HOSTILE, 0.5)], tmp_path / "out", model=HOSTILE, settings=QUICK)

    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert "<script>alert(1)</script>" in "".join(page.texts)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert all(str(a["src"]).startswith("data:image/png;base64,") and a["alt"] for t, a in page.tags if t == "img")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\x1b" not in text
    assert "\x00" not in text
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert [re.sub(r"cut-01-[\w.-]{1,40}\.png", "cut", name) for name in written] == [
        "out/curves.png",
        "out/cut",
        "out/leakage.json",
        "out/report.html",
    ]


def test_the_report_needs_nothing_else_and_is_readable_by_a_screen_reader(stem: CutLeakage, tmp_path: Path) -> None:
    write_report([stem], tmp_path, model="m:f", settings=QUICK)

    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert ("html", {"lang": "en"}) in page.tags
    assert names.count("h1") == names.count("main") == 1
    assert names.count("table") == names.count("caption") == 3
    assert all(a.get("scope") in ("row", "col") for t, a in page.tags if t == "th")
    assert not re.search(r"(?:https?:)?//|@import|url\(", re.sub(r"base64,[^\"]+", "", text))
    assert "@media print" in text


def test_no_report_calls_a_cut_by_words_that_nothing_here_can_prove(stem: CutLeakage, tmp_path: Path) -> None:
    noised = Settings(treatment=Treatment(1, 1))
    cases = [[stem], [leakage_of("a", 0.99)], [leakage_of("a", 0.99, works=False)]]
    for number, found in enumerate(cases):
        write_report(found, tmp_path / str(number), model="m:f", settings=noised if number else QUICK)

        for name in ("report.html", "leakage.json"):
            text = re.sub(r"base64,[^\"]+", "", (tmp_path / str(number) / name).read_text()).lower()
            assert not re.search(r"\bsafe|no leakage|\bsecure|\bprivate\b", text)
            assert "an attack that fails proves nothing" in text
            assert "no claim of differential privacy" in text


def test_the_json_holds_every_figure_and_no_picture(stem: CutLeakage, tmp_path: Path) -> None:
    write_report([stem], tmp_path, model="m:f", settings=QUICK)

    record = json.loads((tmp_path / "leakage.json").read_text())
    (cut,) = record["cuts"]
    assert record["format"] == "cloister.leakage/1"
    assert record["settings"]["rows"] == QUICK.rows
    assert record["left_out"] == {}
    assert record["advice"]["cut"] == cut["cut"] == "stem"
    assert cut["void"] is False
    assert cut["attacks"][0]["clear"]["similarity"] == stem.decoder.clear.similarity  # type: ignore[union-attr]  # it has one
    assert {guess["source"] for guess in cut["labels"]} == {"activations", "outputs", "gradients"}
    assert "exhibits" not in cut


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match=r"file: the report cannot be written"):
        write_report([leakage_of("a", 0.5)], tmp_path / "file", model="m:f", settings=QUICK)
