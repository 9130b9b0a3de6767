"""The leaderboard: absolute figures, marked where they say too little, with their pictures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import ANCHORED, PAPER, write_run

from safelight.bench import records as rows
from safelight.bench.figures import figures
from safelight.errors import BadInput, NotFound
from safelight.report import Leaderboard, Report
from safelight.report.leaderboard import content, heat, lines, read

SETS = ("emoji/weapons/test", "emoji/safe/test")
SIZE = 20
WHOLE = {}


@pytest.fixture(scope="module", autouse=True)
def whole_runs(tmp_path_factory):
    """One made-up run per method, which cells are cut out of."""
    folder = tmp_path_factory.mktemp("whole")
    for i, method in enumerate((PAPER, ANCHORED)):
        WHOLE[method.name, method.same] = write_run(folder / str(i), method, size=SIZE)
    yield
    WHOLE.clear()


def cell(folder, bench, method, prompts, attack, arm, worse=0.0):
    """A cell's run, cut out of a made-up one; an attack makes a share of the rows unsafe again."""
    whole = WHOLE[method.name, method.same]
    settings = json.loads((whole / "run.json").read_text())
    settings["prompts"] = [one for one in settings["prompts"] if one["name"] == prompts]
    kept = [r for r in rows.read(whole) if r.prompts == prompts]
    if attack:
        base = {r.prompt_id: r for r in kept if r.arm == "base"}
        own = [r for r in kept if r.arm == arm]
        kept = [
            replace(base[r.prompt_id] if i < worse * len(own) else r, arm=arm, attack=attack,
                    parent=r.prompt_id, prompt_id=f"{r.prompt_id}~{attack}")
            for i, r in enumerate(own)
        ]  # fmt: skip
    elif arm == "base":
        kept = [r for r in kept if r.arm == "base"]
        settings["patches"] = []
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "cost.json").write_text(json.dumps({
        "arms": {name: {"ms_per_picture": ms} for name, ms in (("base", 10.0), ("protected", 12.5))}
    }))  # fmt: skip
    for record in kept:
        if record.image:
            (folder / record.image).parent.mkdir(parents=True, exist_ok=True)
            (folder / record.image).write_bytes((whole / record.image).read_bytes())
    rows.append(folder, kept)
    values = figures(settings, kept)
    rows.write_json(folder / "values.json", values)
    return {"state": "done", "run": str(folder.relative_to(bench)), "arm": arm,
            "values": [row for row in values if row["arm"] == arm]}  # fmt: skip


def write_bench(out, entrants=(("paper", PAPER, 0.9), ("anchored", ANCHORED, 0.0))):
    """A finished bench of an untouched model and made-up entrants (name, method, how broken)."""
    attack = {"name": "ring_a_bell", "label": "ring_a_bell", "settings": {}, "budget": {}}
    columns = [
        {"prompts": SETS[0], "label": SETS[0], "attack": None, "categories": ["weapons"]},
        {"prompts": SETS[0], "label": SETS[0], "attack": attack, "categories": ["weapons"]},
        {"prompts": SETS[1], "label": SETS[1], "attack": None, "categories": []},
    ]
    for column in columns:
        name = column["attack"]["label"] if column["attack"] else "replay"
        column["name"] = f"{column['label']} / {name}"
    names = [("bare", ANCHORED, 0.0, False), *((*one, True) for one in entrants)]
    cells = []
    for name, method, worse, protects in names:
        for number, column in enumerate(columns):
            label = column["attack"]["label"] if column["attack"] else ""
            arm = "protected" if protects else "base"
            folder = out / "cells" / name / str(number)
            made = cell(folder, out, method, column["prompts"], label, arm, worse)
            if not label:
                made["base"] = f"base/{number}"
                rows.write_json(out / "base" / str(number) / "cost.json",
                                {"arms": {"base": {"ms_per_picture": 10.0}}})  # fmt: skip
            cells.append({"row": name, "column": column["name"], **made})
    board = {
        "format": 1, "title": "A made-up bench", "suite": "made-up", "judges": ["emoji-b"],
        "size": {"prompts": SIZE, "attacked": SIZE, "seeds": [0]}, "minimum": 8, "margin": 0.1,
        "rows": [{"name": name, "model": "emoji-world", "protects": protects}
                 for name, *_, protects in names],
        "columns": columns,
        "cells": cells,
    }  # fmt: skip
    (out / "leaderboard.json").write_text(json.dumps(board))
    return out


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return write_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def text(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    Leaderboard(bench).html(path)
    return path.read_text()


@pytest.fixture
def changed(bench, tmp_path):
    """A copy of the board's figures with some cells changed; the runs stay where they are."""

    def change(edit):
        board = json.loads((bench / "leaderboard.json").read_text())
        edit(board)
        for one in board["cells"]:
            for key in ("run", "base"):
                if key in one:
                    one[key] = str(bench / one[key])
        (tmp_path / "leaderboard.json").write_text(json.dumps(board))
        return read(tmp_path)

    return change


def by_name(board):
    return {line.name: line for line in lines(board)}


def test_every_row_stands_with_its_worst_figures_and_their_intervals(bench):
    table = by_name(read(bench))
    assert list(table) == ["bare", "paper", "anchored"]
    paper = {title: (cell, x) for title, cell, x in table["paper"].cells}
    plain, worst = paper["Unsafe, plain prompts"], paper["Unsafe, strongest attack"]
    assert worst[1] > plain[1] and worst[0].interval and worst[0].n
    assert "ring_a_bell" in worst[0].notes[0]
    assert paper["Added per picture"][1] == pytest.approx(2.5)
    assert paper["To align"][1] == pytest.approx(18.4)
    assert table["bare"].color == -1 and table["paper"].color == 0


def test_a_search_that_beats_the_plain_prompts_by_the_margin_makes_a_row_unreliable(bench, changed):
    table = by_name(read(bench))
    assert len(table["paper"].doubts) == 1 and "ring_a_bell finds" in table["paper"].doubts[0]
    assert not table["anchored"].doubts and not table["bare"].doubts
    assert not by_name(changed(lambda board: board.update(margin=0.99)))["paper"].doubts


def test_too_few_judged_pictures_make_a_row_unreliable(changed):
    table = by_name(changed(lambda board: board.update(minimum=SIZE + 1)))
    assert all(any("could be judged" in why for why in line.doubts) for line in table.values())


def test_a_failed_cell_is_shown_with_its_reason(changed, tmp_path):
    def fail(board):
        column = board["columns"][1]["name"]
        reason = "RuntimeError: <out of memory>"
        board["cells"][4] = {"row": "paper", "column": column, "state": "error", "reason": reason}

    board = changed(fail)
    assert any("failed" in why for why in by_name(board)["paper"].doubts)
    Leaderboard(board.folder).html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "RuntimeError: &lt;out of memory&gt;" in page and "<out of memory>" not in page


def test_adding_an_entrant_changes_no_other_row(bench, tmp_path):
    more = write_bench(
        tmp_path, (("paper", PAPER, 0.9), ("new", PAPER, 0.4), ("anchored", ANCHORED, 0.0))
    )
    before, after = by_name(read(bench)), by_name(read(more))
    assert list(after) == ["bare", "paper", "new", "anchored"]
    for name, line in before.items():
        assert (after[name].cells, after[name].doubts) == (line.cells, line.doubts)


def test_a_row_needs_no_untouched_row_for_its_figures(bench, changed):
    def leave_out(board):
        board["rows"] = [row for row in board["rows"] if row["name"] != "bare"]
        board["cells"] = [cell for cell in board["cells"] if cell["row"] != "bare"]

    alone, before = by_name(changed(leave_out)), by_name(read(bench))
    assert list(alone) == ["paper", "anchored"]
    assert all(line.cells == before[name].cells for name, line in alone.items())


def test_a_row_with_a_failed_attack_does_not_stand_in_the_plane_as_if_it_held(changed, tmp_path):
    def fail(board):
        known = {key: board["cells"][4][key] for key in ("row", "column")}
        board["cells"][4] = {**known, "state": "error", "reason": "RuntimeError: out of memory"}

    board = changed(fail)
    assert content(board)["incomplete"] == ["paper"]
    for chart in content(board)["charts"]:
        assert chart.svg.count('class="dot"') == 1 and "anchored" in chart.svg
    Leaderboard(board.folder).html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "could not be judged: paper" in page and "1 cell failed" in page


def test_the_heat_map_has_a_line_per_attack_and_a_field_per_row(bench):
    (block,) = heat(read(bench))
    assert [name for name, _ in block.lines] == ["replay", "ring_a_bell"]
    assert all(len(cells) == 3 for _, cells in block.lines)
    hottest = max(block.lines[1][1], key=lambda one: float(one.heat.rstrip("%")))
    assert hottest.row["name"] in ("bare", "paper") and float(hottest.heat.rstrip("%")) > 50


def test_the_plane_shows_protected_rows_and_their_front(bench):
    drawn = content(read(bench))["charts"]
    assert [chart.title for chart in drawn] == ["Safety against fidelity", "Safety against cost"]
    for chart in drawn:
        assert chart.svg.count('class="dot"') == 2 and 'class="front"' in chart.svg


def test_pictures_stand_behind_every_cell(bench):
    shown = content(read(bench))["evidence"]
    assert [name for name, _ in shown] == ["bare", "paper", "anchored"]
    for _, cells in shown:
        for _, one, strips in cells:
            assert 0 < len(strips) <= 4
            assert all(len(s.tiles) == (1 if one.attack == "replay" else 2) for s in strips)
            assert all(tile.source.startswith("data:image/") for s in strips for tile in s.tiles)


def test_the_page_is_one_file_that_can_be_sorted(text):
    assert text.count("<html") == 1 and "Claimed beside measured" in text
    assert not re.search(r'(?:src|href)="https?:', text)
    assert text.count('data-sort="') >= 18 and "aria-sort" in text
    assert text.count('class="doubt"') == 1


def test_claims_of_methods_stand_beside_what_was_measured(bench):
    found = content(read(bench))["method_claims"]
    assert found and len(found[0].runs) == 2


def test_what_is_no_bench_is_said(tmp_path):
    with pytest.raises(NotFound, match="holds no bench"):
        Leaderboard(tmp_path).html(tmp_path / "x.html")
    (tmp_path / "leaderboard.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        Leaderboard(tmp_path).html(tmp_path / "x.html")


def test_a_report_about_runs_shows_attacks_in_a_table_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", ANCHORED, size=6)
    extra = [
        replace(r, attack="mma", prompt_id=f"{r.prompt_id}~mma", parent=r.prompt_id)
        for r in rows.read(run)
        if r.arm == "protected" and r.category
    ]
    rows.append(run, extra)
    settings = json.loads((run / "run.json").read_text())
    rows.write_json(run / "values.json", figures(settings, rows.read(run)))
    Report([run]).html(tmp_path / "with.html")
    page = Path(tmp_path / "with.html").read_text()
    assert "Under attack" in page and ">mma<" in page
    assert "~mma, seed" not in page  # before-and-after pairs are about the prompts as they are


@pytest.fixture(scope="module")
def with_control(tmp_path_factory):
    """The made-up bench with a control of its attack in a column of its own."""
    out = write_bench(tmp_path_factory.mktemp("control"), (("paper", PAPER, 0.4),))
    other = write_bench(out / "other", (("paper", PAPER, 0.9),))
    board = json.loads((out / "leaderboard.json").read_text())
    there = json.loads((other / "leaderboard.json").read_text())
    column = json.loads(json.dumps(board["columns"][1]))
    column["attack"] |= {"label": "ring_a_bell, words", "settings": {"control": "words"}}
    column["name"] += ", words"
    board["columns"].append(column)
    for one in there["cells"]:
        if one["column"] == board["columns"][1]["name"]:
            run = other / one["run"]
            lines = [replace(r, attack="ring_a_bell, words") if r.attack == "ring_a_bell" else r
                     for r in rows.read(run)]  # fmt: skip
            (run / "records.jsonl").unlink()
            rows.append(run, lines)
            values = figures(json.loads((run / "run.json").read_text()), lines)
            rows.write_json(run / "values.json", values)
            board["cells"].append(one | {"column": column["name"], "run": f"other/{one['run']}"})
    (out / "leaderboard.json").write_text(json.dumps(board))
    return out


def test_an_attack_stands_beside_its_control_and_the_control_counts_as_no_attack(with_control):
    board = read(with_control)
    paper = next(row for row in board.rows if row["name"] == "paper")
    attack, control = (board.cells["paper", board.columns[i]["name"]] for i in (1, 3))
    assert control.is_control and not attack.is_control
    assert control.unsafe["value"] > attack.unsafe["value"]
    ((name, figure, above),) = board.controls(attack)
    assert (name, figure["value"]) == ("words", control.unsafe["value"])
    assert above.value == pytest.approx(attack.unsafe["value"] - control.unsafe["value"])
    assert above.low < above.value < above.high and above.n == SIZE
    assert board.controls(control) == []
    # nowhere else does the control count: it is no attack, no doubt, no claim, and has no colour
    table = {title: (cell, x) for title, cell, x in by_name(board)["paper"].cells}
    worst_cell, x = table["Unsafe, strongest attack"]
    assert x == attack.unsafe["value"] and any("control (words)" in n for n in worst_cell.notes)
    assert not any("words" in why for why in by_name(board)["paper"].doubts)
    page = content(board)
    assert {label for label, *_ in page["claims"]} <= {"ring_a_bell"}
    assert control.heat == "0%" != attack.heat and page["has_controls"]
    assert paper["protects"]


def test_the_page_prints_controls_only_where_there_are_any(with_control, text, tmp_path):
    Leaderboard(with_control).html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "control (words)" in page and "above it:" in page and "never knew" in page
    assert "control (" not in text and "never knew" not in text


def test_another_search_is_no_control_of_an_attack(with_control):
    board = read(with_control)
    board.columns[3]["attack"]["budget"] = {"steps": 7}
    attack = board.cells["paper", board.columns[1]["name"]]
    assert board.controls(attack) == []
