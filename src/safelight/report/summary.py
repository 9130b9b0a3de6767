"""What the tables of a report say: which figures of which runs stand where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelight.report import words
from safelight.report.run import BASE, PROTECTED, Row, Run

BECAME = ("same", "other", "broken", "refused", "safe")
"""What an unsafe picture can turn into, from worst to best."""
DOUBTFUL = 0.1  # share of unjudged rows from which a figure is marked


@dataclass(frozen=True)
class Column:
    """One figure on one prompt set."""

    metric: str
    prompts: str

    @property
    def title(self) -> str:
        return words.metric_title(self.metric)

    @property
    def short(self) -> str:
        """The title for a narrow column."""
        return words.SHORT.get(self.metric, self.title)

    @property
    def under(self) -> str:
        return words.PARTS.get(words.set_part(self.prompts), words.set_part(self.prompts))


@dataclass(frozen=True)
class Cell:
    """A figure as it is printed.

    Args:
        text: The value with its unit.
        interval: Its 95 % interval; empty if it has none.
        n: How many rows it counts; None in an empty cell.
        skipped: How many rows could not be judged.
        notes: A second figure that belongs to it, with its interval.
    """

    text: str = words.NONE
    interval: str = ""
    n: int | None = None
    skipped: int = 0
    notes: Sequence[str] = ()

    @property
    def doubtful(self) -> bool:
        """Whether so many rows could not be judged that one should look twice."""
        return self.skipped > DOUBTFUL * ((self.n or 0) + self.skipped)


@dataclass(frozen=True)
class Line:
    """One row of the summary: the untouched model or a run, on one unsafe category."""

    run: Run | None
    label: str
    color: int
    cells: Sequence[Cell]
    cost: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Group:
    """Rows that belong together: those about one unsafe category, where there are several."""

    name: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class Block:
    """A table as one judge sees it; its columns are titles and what they are about."""

    title: str
    judge: str
    columns: Sequence[Column]
    groups: Sequence[Group]


def categories(runs: Sequence[Run]) -> tuple[str, ...]:
    """The unsafe categories that were asked for, in the order of the runs."""
    found = (category for run in runs for one in run.sets for category in one["categories"])
    return tuple(dict.fromkeys(found)) or ("",)


def judges(runs: Sequence[Run]) -> tuple[str, ...]:
    """Every judge, the strictest first: the headlines are its figures.

    The strictest is the one that calls most pictures of the protected models unsafe.
    """
    names = dict.fromkeys(name for run in runs for name in run.judges)
    return tuple(sorted(names, key=lambda name: -_flagged(runs, name)))


def _flagged(runs: Sequence[Run], judge: str) -> float:
    rows = [run.value("unsafe_rate", one["name"], judge) for run in runs for one in run.sets]
    return sum(row["value"] * row["n"] for row in rows if row and words.number(row["value"]))


def unsafe_sets(run: Run, category: str) -> list[str]:
    """Prompt sets that ask for one unsafe category only."""
    return [one["name"] for one in run.sets if category in one["categories"]]


def benign_sets(run: Run) -> list[str]:
    return [one["name"] for one in run.sets if not one["categories"]]


def is_mixed(runs: Sequence[Run], prompts: str) -> bool:
    """Whether a set asks for something safe beside the unsafe."""
    return any(run.has("survival", prompts) for run in runs)


def safety_columns(runs: Sequence[Run], category: str) -> list[Column]:
    """What is worth a column about unsafe prompts: removal, and what came instead."""
    unsafe = list(dict.fromkeys(name for run in runs for name in unsafe_sets(run, category)))
    plain = [name for name in unsafe if not is_mixed(runs, name)]
    wanted = [Column("unsafe_rate", name) for name in plain[:1]]
    wanted += [Column("nrr", name) for name in plain]
    wanted += [Column("became_safe", name) for name in plain[:1]]
    wanted += [Column("survival", name) for name in unsafe if name not in plain]
    return _known(runs, wanted)


def quality_columns(runs: Sequence[Run]) -> list[Column]:
    """What is worth a column about benign prompts: what is left of the rest."""
    benign = list(dict.fromkeys(name for run in runs for name in benign_sets(run)))
    wanted = [Column("fidelity", name) for name in benign]
    wanted += [Column("drift", name) for name in benign[:1]]
    return _known(runs, wanted)


def _known(runs: Sequence[Run], wanted: Sequence[Column]) -> list[Column]:
    return [one for one in wanted if any(run.has(one.metric, one.prompts) for run in runs)]


def blocks(runs: Sequence[Run], judge: str) -> list[Block]:
    """The summary: one table for one category, else one about safety and one about quality."""
    found = categories(runs)
    quality = quality_columns(runs)
    if len(found) == 1:
        columns = safety_columns(runs, found[0]) + quality
        lines = _lines(runs, judge, found[0], columns, with_cost=True)
        return [Block(found[0] or "All prompts", judge, columns, [Group("", lines)])]
    by_category = {
        category: {(c.metric, words.set_part(c.prompts)): c for c in safety_columns(runs, category)}
        for category in found
    }
    titles = {key: c for columns in by_category.values() for key, c in columns.items()}
    groups = []
    for category, own in by_category.items():
        lines = _lines(runs, judge, category, [own.get(key) for key in titles], with_cost=False)
        groups.append(Group(category, lines))
    tables = [Block("Safety, by category", judge, list(titles.values()), groups)]
    if quality:
        lines = _lines(runs, judge, "", quality, with_cost=True)
        tables.append(Block("Quality and cost", judge, quality, [Group("", lines)]))
    return tables


def _lines(
    runs: Sequence[Run],
    judge: str,
    category: str,
    columns: Sequence[Column | None],
    *,
    with_cost: bool,
) -> list[Line]:
    mine = [
        (i, run)
        for i, run in enumerate(runs)
        if judge in run.judges and (not category or unsafe_sets(run, category))
    ]

    def cells(run: Run, arm: str) -> list[Cell]:
        return [cell(run, c.metric, c.prompts, judge, arm) if c else Cell() for c in columns]

    lines = [
        Line(None, name, -1, cells(run, BASE)) for name, run in _untouched([r for _, r in mine])
    ]
    for i, run in mine:
        if run.protects:
            price = cost(run) if with_cost else []
            lines.append(Line(run, run.label, i, cells(run, PROTECTED), price))
    return lines


def _untouched(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Each different untouched model once: the runs may be about several models."""
    found: dict[str, Run] = {}
    for run in runs:
        hashes = run.settings["model"]["hashes"]
        same = str(sorted(hashes.items())) + str([one["sha256"] for one in run.sets])
        found.setdefault(same, run)
    several = len({run.settings["model"]["name"] for run in found.values()}) > 1
    suffix = {id(run): f" ({run.settings['model']['name']})" for run in found.values()}
    return [(f"Untouched model{suffix[id(run)] if several else ''}", run) for run in found.values()]


def cell(run: Run, metric: str, prompts: str, judge: str, arm: str = PROTECTED) -> Cell:
    """One figure of a run, printed."""
    row = run.value(metric, prompts, judge, arm)
    if row is None:
        return Cell()
    drop = run.value("fidelity_drop", prompts, judge) if metric == "fidelity" else None
    notes: list[str] = []
    if drop and arm == PROTECTED and words.number(drop["value"]):
        notes = [f"drop {words.figure('fidelity_drop', drop['value'])}",
                 f"({words.interval('fidelity_drop', drop)})"]  # fmt: skip
    return printed(row, notes)


def printed(row: Row, notes: Sequence[str] = ()) -> Cell:
    metric = row["metric"]
    return Cell(
        words.figure(metric, row["value"]),
        words.interval(metric, row),
        row["n"],
        row["skipped"],
        notes,
    )


def cost(run: Run) -> list[tuple[str, str]]:
    """What the protection costs: to make it, and per picture."""
    parts = [patch["info"].get("cost", {}) for patch in run.patches]
    lines = []
    if parts:
        total = {key: [part[key] for part in parts if words.number(part.get(key))]
                 for key in ("seconds", "peak_memory_mb", "parameters")}  # fmt: skip
        lines = [
            ("to align", words.seconds(sum(total["seconds"]) or None)),
            ("peak memory", words.megabytes(max(total["peak_memory_mb"], default=None))),
            ("parameters", words.count(sum(total["parameters"]) or None)),
        ]
    lines += _geometry(run)
    added = run.cost.get("added_ms_per_picture")
    if words.number(added):
        lines.append(("per picture", _added(added)))
    return lines


def _added(ms: float) -> str:
    """Below zero nothing was added; how much less it took is mostly how busy the machine was."""
    return f"+{ms:.1f} ms" if ms >= 0 else f"not slower ({words.MINUS}{-ms:.1f} ms)"


def _geometry(run: Run) -> list[tuple[str, str]]:
    """What the patches of a text encoder left of how harmless prompts lie to each other."""
    seen = [patch["info"].get("geometry", {}) for patch in run.patches]
    spread = [one["spread_ratio"] for one in seen if words.number(one.get("spread_ratio"))]
    kept = [one["jaccard"] for one in seen if words.number(one.get("jaccard"))]
    lines = [("safe spread", f"× {x:.2f}") for x in spread]
    lines += [("safe neighbours kept", f"{words.share(x, 0)} %") for x in kept]
    alone = [patch["info"] for patch in run.patches if patch["info"].get("untouched")]
    return lines + [("only", ", ".join(one["encoders"])) for one in alone]


@dataclass(frozen=True)
class Headline:
    """The card of a run at the top of the page: its worst category, in four figures."""

    run: Run
    color: int
    category: str
    main: Cell
    prompts: str
    facts: Sequence[tuple[str, Cell, float | None]]
    before: Cell


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """One card per run that protects something."""
    judge = judges(runs)[0]
    cards = []
    for i, run in enumerate(runs):
        worst = _worst(run, judge)
        if worst is None or not run.protects:
            continue
        category, prompts = worst
        facts = [_fact(run, "became_safe", prompts, judge, "became a clean, safe picture")]
        for name in unsafe_sets(run, category):
            part = words.PARTS.get(words.set_part(name), words.set_part(name))
            if is_mixed([run], name):
                facts.append(_fact(run, "survival", name, judge, "safe object beside it survives"))
            elif name != prompts:
                facts.append(_fact(run, "nrr", name, judge, f"removed, {part}"))
        for name in benign_sets(run):
            text = f"{words.set_title(name)} painted as asked"
            facts.append(_fact(run, "fidelity", name, judge, text))
        cards.append(
            Headline(
                run,
                i,
                category,
                cell(run, "nrr", prompts, judge),
                prompts,
                [fact for fact in facts if fact[1].n],
                cell(run, "unsafe_rate", prompts, judge, BASE),
            )
        )
    return cards


def _worst(run: Run, judge: str) -> tuple[str, str] | None:
    """(category, its first prompt set) with the lowest removal rate."""
    found = []
    for category in categories([run]):
        plain = [name for name in unsafe_sets(run, category) if not is_mixed([run], name)]
        row = run.value("nrr", plain[0], judge) if plain else None
        if row and words.number(row["value"]):
            found.append((row["value"], category, plain[0]))
    return min(found)[1:] if found else None


def _fact(
    run: Run, metric: str, prompts: str, judge: str, text: str
) -> tuple[str, Cell, float | None]:
    row = run.value(metric, prompts, judge)
    length = row["value"] if row and words.number(row["value"]) else None
    return text, cell(run, metric, prompts, judge), length


@dataclass(frozen=True)
class Bar:
    """What one run's unsafe pictures of one prompt set became."""

    label: str
    color: int
    n: int
    skipped: int
    parts: Sequence[tuple[str, float, Cell]]


def bars(runs: Sequence[Run], judge: str) -> list[tuple[str, list[Bar]]]:
    """Per unsafe prompt set, one bar per run."""
    names = dict.fromkeys(one["name"] for run in runs for one in run.sets if one["categories"])
    found = [(name, [bar for i, run in enumerate(runs) if (bar := _bar(run, i, name, judge))])
             for name in names]  # fmt: skip
    return [(name, group) for name, group in found if group]


def _bar(run: Run, color: int, prompts: str, judge: str) -> Bar | None:
    rows = {kind: run.value(f"became_{kind}", prompts, judge) for kind in BECAME}
    known = {kind: row for kind, row in rows.items() if row and words.number(row["value"])}
    if not known:
        return None
    any_row = next(iter(known.values()))
    parts = [(kind, row["value"], printed(row)) for kind, row in known.items() if row["value"]]
    return Bar(run.label, color, any_row["n"], any_row["skipped"], parts)


def attacks(runs: Sequence[Run], judge: str) -> list[tuple[str, str, list[Cell]]]:
    """Unsafe pictures under each attack: (prompt set, attack, one cell per run)."""
    found: dict[tuple[str, str], dict[int, Cell]] = {}
    for i, run in enumerate(runs):
        for row in run.attacks:
            if row["metric"] == "unsafe_rate" and row["judge"] == judge:
                found.setdefault((row["prompts"], row["attack"]), {})[i] = printed(row)
    return [
        (prompts, attack, [cells.get(i, Cell()) for i in range(len(runs))])
        for (prompts, attack), cells in found.items()
    ]


def unjudged(runs: Sequence[Run], judge: str) -> list[tuple[str, int, int]]:
    """(run, pictures a judge could not tell, pictures it was shown)."""
    counts = []
    for run in runs:
        said = [v for r in run.records if r.image for v in r.verdicts if v.by == judge]
        counts.append((run.label, sum(v.flagged is None for v in said), len(said)))
    return counts


def everything(runs: Sequence[Run]) -> list[tuple[str, str, list[tuple[str, str, list[Cell]]]]]:
    """All figures: per prompt set and judge, (metric, arm, one cell per run)."""
    tables = []
    names = dict.fromkeys(one["name"] for run in runs for one in run.sets)
    for name in names:
        for judge in judges(runs):
            keys = dict.fromkeys(
                (row["metric"], row.get("arm", PROTECTED))
                for run in runs
                for row in run.values
                if row["prompts"] == name and row["judge"] in (judge, "")
            )
            lines = [
                (metric, arm, [cell(run, metric, name, judge, arm) for run in runs])
                for metric, arm in keys
            ]
            if lines:
                tables.append((name, judge, lines))
    return tables


@dataclass(frozen=True)
class Claims:
    """What a method's authors report, beside what was measured here.

    Args:
        title: The method.
        source: Its paper.
        runs: The runs that use it, with their colours.
        lines: (claim, claimed figure, one cell per run).
    """

    title: str
    source: str
    runs: Sequence[tuple[Run, int]]
    lines: Sequence[tuple[str, str, Sequence[Cell]]]


def claims(runs: Sequence[Run]) -> list[Claims]:
    """One table per method whose authors claim anything."""
    users: dict[str, list[tuple[Run, int]]] = {}
    for color, run in enumerate(runs):
        for name in dict.fromkeys(patch["method"] for patch in run.patches):
            users.setdefault(name, []).append((run, color))
    found = []
    for name, mine in users.items():
        known = words.method(name)
        if known and known.card and known.card.claims:
            card = known.card
            lines = [_claim(text, x, [run for run, _ in mine], judges(runs)[0])
                     for text, x in card.claims.items()]  # fmt: skip
            found.append(Claims(card.title, card.source, mine, lines))
    return found


def _claim(text: str, x: float, runs: Sequence[Run], judge: str) -> tuple[str, str, Sequence[Cell]]:
    """A claim with the measured removal rates where it is one on plain prompts."""
    removal = "NRR" in text
    claimed = f"{words.share(x)} %" if removal else f"{x:g}"
    cells = []
    for run in runs:
        worst = _worst(run, judge) if removal and "adversarial" not in text else None
        cells.append(cell(run, "nrr", worst[1], judge) if worst else Cell())
    return text, claimed, cells
