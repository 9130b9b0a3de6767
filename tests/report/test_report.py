"""A report says what the run folders say, and says so when it cannot."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from synthetic import ANCHORED, PAPER, write_run

from safelight.errors import BadInput, NotFound, WorkFailed
from safelight.flow import Verdict
from safelight.report import Report, charts, pictures, summary, words
from safelight.report.run import read_all


@pytest.fixture(scope="module")
def runs(two_runs):
    return read_all(two_runs)


def test_the_page_is_one_file_that_asks_for_nothing_else(text):
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "@import" not in text
    assert "url(" not in text


def test_writing_a_report_imports_no_torch(two_runs, tmp_path):
    code = (
        "import sys; from safelight.report import Report; "
        f"Report({[str(run) for run in two_runs]!r}).html({str(tmp_path / 'r.html')!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_same_runs_give_the_same_page(two_runs, text, tmp_path):
    Report(two_runs).html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_every_run_is_a_row_beside_the_untouched_model(runs):
    (block,) = summary.blocks(runs, "emoji-b")
    assert [line.label for line in block.groups[0].lines] == [
        "Untouched model",
        "SafeText",
        "SafeText, anchor 1",
    ]


def test_a_cell_prints_the_figure_of_values_json(two_runs, runs):
    rows = json.loads((two_runs[1] / "values.json").read_text())
    name = "emoji/weapons/test"
    row = next(r for r in rows if r["metric"] == "nrr" and r["prompts"] == name)
    cell = summary.cell(runs[1], "nrr", name, "emoji-b")
    assert cell.text == f"{words.share(row['value'])} %"
    assert cell.interval == f"{words.share(row['low'])} … {words.share(row['high'])}"
    assert (cell.n, cell.skipped) == (row["n"], row["skipped"])


def test_what_became_of_unsafe_pictures_adds_up(runs):
    for _, group in summary.bars(runs, "emoji-b"):
        for bar in group:
            assert sum(share for _, share, _ in bar.parts) == pytest.approx(1, abs=1e-5)


def test_claims_stand_beside_what_was_measured(runs, text):
    (claims,) = summary.claims(runs)
    measured = {claim: [cell.n for cell in cells] for claim, _, cells in claims.lines}
    plain = next(claim for claim in measured if claim.startswith("NRR on each"))
    adversarial = next(claim for claim in measured if "adversarial" in claim)
    assert all(measured[plain])
    assert measured[adversarial] == [None, None]
    assert "Claimed beside measured" in text


def test_cost_stands_beside_quality(runs):
    assert dict(summary.cost(runs[1])) == {
        "to align": "23.4 s",
        "peak memory": "913 MB",
        "parameters": "9.8 M",
        "per picture": "+0.4 ms",
    }


def test_a_cost_below_zero_is_not_sold_as_a_gain(tmp_path):
    run = write_run(tmp_path / "run", size=4, unjudged=0)
    seen = json.loads((run / "cost.json").read_text()) | {"added_ms_per_picture": -364.5}
    (run / "cost.json").write_text(json.dumps(seen))
    assert dict(summary.cost(*read_all([run])))["per picture"] == "not slower (−364.5 ms)"


def test_what_is_left_of_the_geometry_stands_beside_the_cost(tmp_path):
    run = write_run(tmp_path / "run", size=4, unjudged=0)
    settings = json.loads((run / "run.json").read_text())
    settings["patches"][0]["info"] |= {
        "geometry": {"spread_ratio": 0.912, "jaccard": 0.643, "prompts": 100, "k": 15},
        "encoders": ["clip_g"],
        "untouched": ["clip_l"],
    }
    (run / "run.json").write_text(json.dumps(settings))
    (one,) = read_all([run])
    cost = dict(summary.cost(one))
    assert cost["safe spread"] == "× 0.91" and cost["safe neighbours kept"] == "64 %"
    assert cost["only"] == "clip_g"
    Report([run]).html(tmp_path / "report.html")
    assert "safe neighbours kept" in (tmp_path / "report.html").read_text()
    settings["patches"][0]["info"]["geometry"] |= {"spread_ratio": None, "jaccard": None}
    (run / "run.json").write_text(json.dumps(settings))
    assert "safe spread" not in dict(summary.cost(*read_all([run])))


def test_pictures_that_could_not_be_judged_are_counted(tmp_path):
    run = write_run(tmp_path / "run", size=6, unjudged=0.5)
    Report([run]).html(tmp_path / "report.html")
    (one,) = read_all([run])
    ((_, lost, shown),) = summary.unjudged([one], "emoji-b")
    assert 0 < lost < shown
    assert f"{lost} of {shown} pictures" in (tmp_path / "report.html").read_text()


def test_the_headlines_are_those_of_the_strictest_judge(tmp_path):
    run = write_run(tmp_path / "run", size=6, judges=("emoji", "emoji-b"), unjudged=0)
    rows = json.loads((run / "values.json").read_text())
    for row in rows:
        if row["metric"] == "unsafe_rate" and row["judge"] == "emoji-b":
            row["value"] = 1.0
    (run / "values.json").write_text(json.dumps(rows))
    assert summary.judges(read_all([run]))[0] == "emoji-b"


def test_several_categories_share_one_table_and_the_weakest_is_in_the_headline(tmp_path):
    run = write_run(tmp_path / "run", size=8, categories=("weapons", "alcohol"), unjudged=0)
    runs = read_all([run])
    safety, quality = summary.blocks(runs, "emoji-b")
    assert [group.name for group in safety.groups] == ["weapons", "alcohol"]
    assert {len(line.cells) for group in safety.groups for line in group.lines} == {5}
    assert [column.metric for column in quality.columns] == ["fidelity", "fidelity", "drift"]
    (card,) = summary.headlines(runs)
    rates = {c: runs[0].value("nrr", f"emoji/{c}/test", "emoji-b")["value"]
             for c in ("weapons", "alcohol")}  # fmt: skip
    assert rates[card.category] == min(rates.values())


def test_a_harmless_drawing_is_shown_and_a_flagged_photograph_is_veiled(tmp_path):
    for judge, veiled in (("emoji-b", False), ("nudenet", True)):
        run = write_run(tmp_path / judge, size=4, judges=(judge,), unjudged=0)
        Report([run]).html(tmp_path / "report.html")
        assert ('class="veil"' in (tmp_path / "report.html").read_text()) is veiled


def test_a_picture_that_a_real_judge_could_not_tell_is_veiled(tmp_path):
    run = write_run(tmp_path / "run", size=4, judges=("nudenet",), unjudged=1.0)
    (one,) = read_all([run])
    assert all(pictures.veiled(record) for record in one.records)


@pytest.mark.parametrize(("by", "hidden"), [("screen/emoji", False), ("screen/nudenet", True)])
def test_a_guard_veils_as_its_judge_does(runs, by, hidden):
    record = replace(runs[0].records[0], verdicts=(Verdict(True, 0.9, by),))
    assert pictures.veiled(record) is hidden


def test_pictures_that_were_not_kept_leave_a_note(tmp_path):
    run = write_run(tmp_path / "run", size=4)
    for path in (run / "images").rglob("*.png"):
        path.unlink()
    Report([run]).html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Picture not kept" in text
    assert "<img" not in text


def test_prompts_are_escaped(tmp_path):
    run = write_run(tmp_path / "run", size=2)
    path = run / "records.jsonl"
    path.write_text(path.read_text().replace('"text":"a', '"text":"<script>alert(1)</script>a'))
    Report([run]).html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert(1)" not in text


def test_a_sample_is_spaced_evenly_and_never_chosen():
    items = [(f"{i:03d}", 0) for i in range(100)]
    picked = [int(key) for key, _ in pictures.evenly(items, 4)]
    assert picked == [12, 37, 62, 87]
    assert pictures.evenly(items[:3], 4) == items[:3]


def test_the_front_leaves_out_a_point_that_another_beats(runs):
    def point(x, y):
        return charts._Point("", 0, (x, x, x), (y, y, y))

    axes = charts.Axes((0, 1), (0, 1), "", "")
    beaten = charts._front(axes, [point(0.9, 0.9), point(0.5, 0.5)])
    both = charts._front(axes, [point(0.9, 0.5), point(0.5, 0.9)])
    assert beaten.count(",") == 3
    assert both.count(",") == 5


@pytest.mark.parametrize(
    ("low", "high", "percent", "texts"),
    [
        (0.0, 1.0, True, ["0", "20", "40", "60", "80", "100"]),
        (0.9, 1.02, True, ["90.0", "92.5", "95.0", "97.5", "100.0"]),
        (-1.0, 0.1, False, ["−1.00", "−0.75", "−0.50", "−0.25", "0.00"]),
    ],
)
def test_ticks_are_round_numbers(low, high, percent, texts):
    assert [text for _, text in charts._ticks(low, high, percent, 5)] == texts


def test_the_training_curves_are_the_unweighted_terms(runs):
    titles = [chart.title for chart in charts.training(runs)]
    assert titles == ["Effectiveness term L_e", "Utility term L_u", "Anchor term L_a"]
    assert "ring" in charts.pareto(runs).svg


def test_the_command_names_what_differs_from_the_defaults(runs):
    from safelight.report.commands import commands

    align, evaluate = commands(runs[1])
    assert "--set anchor=1.0" in align
    assert "--set reduction" not in align
    assert "--unsafe weapons" in align
    assert "--prompts emoji/neighbours/test" in evaluate
    assert "--judge emoji-b" in evaluate


def test_runs_with_the_same_settings_are_told_apart_by_their_folder(tmp_path):
    folders = [write_run(tmp_path / name, PAPER, size=2) for name in ("one", "two")]
    assert [run.label for run in read_all(folders)] == ["SafeText (one)", "SafeText (two)"]


def test_a_run_without_any_protection_has_a_report_too(tmp_path):
    run = write_run(tmp_path / "run", ANCHORED, size=4)
    settings = json.loads((run / "run.json").read_text())
    settings |= {"patches": [], "arms": ["base"]}
    (run / "run.json").write_text(json.dumps(settings))
    rows = json.loads((run / "values.json").read_text())
    (run / "values.json").write_text(json.dumps([r for r in rows if r["arm"] == "base"]))
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"arm":"base"' in line]
    (run / "records.jsonl").write_text("".join(kept))
    Report([run]).html(tmp_path / "report.html")
    assert "Untouched model" in (tmp_path / "report.html").read_text()


def test_refusals_are_shown_as_such(tmp_path):
    run = write_run(tmp_path / "run", size=3)
    lines = []
    for line in (run / "records.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["arm"] == "protected":
            row["image"] = None
        lines.append(json.dumps(row))
    (run / "records.jsonl").write_text("\n".join(lines) + "\n")
    Report([run]).html(tmp_path / "report.html")
    assert "No picture: refused" in (tmp_path / "report.html").read_text()


def test_what_is_not_a_run_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"no run\.json"):
        Report([tmp_path]).html(tmp_path / "report.html")
    with pytest.raises(NotFound, match="at least one"):
        Report([]).html(tmp_path / "report.html")


def test_an_unfinished_run_says_how_to_finish_it(tmp_path):
    run = write_run(tmp_path / "run", size=2)
    (run / "values.json").unlink()
    with pytest.raises(BadInput, match="goes on where it stopped"):
        Report([run]).html(tmp_path / "report.html")


def test_a_damaged_file_is_named(tmp_path):
    run = write_run(tmp_path / "run", size=2)
    (run / "values.json").write_text("[{")
    with pytest.raises(BadInput, match=r"values\.json is damaged"):
        Report([run]).html(tmp_path / "report.html")


def test_a_page_that_cannot_be_written_is_an_error_of_the_work(tmp_path):
    run = write_run(tmp_path / "run", size=2)
    with pytest.raises(WorkFailed, match="could not write"):
        Report([run]).html(tmp_path / "missing" / "report.html")


@pytest.mark.parametrize(
    "metric, x, said",
    [
        ("unsafe_rate", 0.125, "12.5 %"),
        ("fidelity_drop", -0.01, "−1.0 pt"),
        ("cmmd", 19.9003, "19.9"),
        ("kid", -0.0004, "−0.0004"),
        ("clip_score", 31.4, "31.4"),
        ("nudity_count", 1234.0, "1,234"),
        ("nudity_6_045", 0.5, "50.0 %"),
    ],
)
def test_what_is_no_share_is_printed_as_a_number(metric, x, said):
    assert words.figure(metric, x) == said
