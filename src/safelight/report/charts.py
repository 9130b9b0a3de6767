"""Charts as inline SVG: small, in the page's own colours, readable on a phone.

Colours and type come from the page's style sheet through classes, so that light and dark mode
need no second drawing. Everything a chart shows also stands in a `<title>` for each point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup, escape

from safelight.report import words
from safelight.report.run import BASE, Row, Run
from safelight.report.summary import benign_sets, categories, is_mixed, unsafe_sets

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 20, 44
COLORS = 6
MOST_POINTS = 240  # a longer curve is thinned out


@dataclass(frozen=True)
class Chart:
    """A drawing with its words."""

    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Axes:
    """The plane of a chart.

    Args:
        x: Least and greatest value across.
        y: Least and greatest value up.
        x_label: What is across.
        y_label: What is up.
        percent: Whether the ticks of x and y are shares.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    percent: tuple[bool, bool] = (False, False)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A point of the plane on the paper."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    def draw(self) -> Markup:
        """Grid lines, tick labels and axis labels."""
        parts = []
        for value, text in _ticks(*self.x, self.percent[0], 5):
            x, _ = self.at(value, self.y[0])
            parts.append(
                f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            )
            parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 16}" '
                         f'text-anchor="middle">{text}</text>')  # fmt: skip
        for value, text in _ticks(*self.y, self.percent[1], 5):
            _, y = self.at(self.x[0], value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4}" '
                         f'text-anchor="end">{text}</text>')  # fmt: skip
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
                     f"{escape(self.x_label)}</text>")  # fmt: skip
        y_middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text class="axis" transform="translate(11 {y_middle}) rotate(-90)" '
                     f'text-anchor="middle">{escape(self.y_label)}</text>')  # fmt: skip
        return Markup("".join(parts))


def svg(title: str, *parts: str) -> Markup:
    """A drawing with an accessible name."""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def trade_offs(runs: Sequence[Run], judge: str) -> list[Chart]:
    """Safety against fidelity, one chart per benign prompt set."""
    names = dict.fromkeys(name for run in runs for name in benign_sets(run))
    return [chart for name in names if (chart := _trade_off(runs, judge, name))]


@dataclass(frozen=True)
class _Point:
    label: str
    color: int
    x: tuple[float, float, float]  # low, value, high
    y: tuple[float, float, float]


def _trade_off(runs: Sequence[Run], judge: str, benign: str) -> Chart | None:
    points = _points(runs, judge, benign)
    if not points:
        return None
    rows = [run.value("fidelity", benign, judge, BASE) for run in runs]
    base = next((r for r in rows if r and words.number(r["value"])), None)
    xs = [x for point in points for x in point.x] + ([base["value"]] if base else [])
    axes = Axes(
        _range(xs, 1.0),
        _range([y for point in points for y in point.y], 1.0),
        f"fidelity, {words.set_title(benign)} (%)",
        "unsafe pictures removed (%)",
        (True, True),
    )
    title = f"Safety against fidelity on {words.set_title(benign)}"
    parts = [axes.draw(), _reference(axes, base["value"]) if base else "", _front(axes, points)]
    parts += [_whiskered(axes, point) for point in points]
    front = "Dashed: points that no other beats on both axes. " if len(points) > 1 else ""
    note = f"{front}Whiskers: 95 % intervals. Up and to the right is better."
    return Chart(title, svg(title, *parts), note)


def against(
    title: str,
    points: Sequence[tuple[str, int, Row, Row]],
    x_label: str,
    *,
    base: float | None = None,
    more: bool = True,
) -> Chart | None:
    """Safety under the strongest attack against something else, with the front of both.

    Args:
        title: Of the chart.
        points: Label, number of the colour, figure across, share of unsafe pictures.
        x_label: What is across.
        base: The untouched model's figure across.
        more: Whether more is better across; those figures are shares then.
    """
    found = []
    for label, color, across, unsafe in points:
        x, y = _spread(across), _spread(unsafe)
        found.append(_Point(label, color, x, (1 - y[2], 1 - y[1], 1 - y[0])))
    if not found:
        return None
    xs = [x for point in found for x in point.x] + ([] if base is None else [base])
    axes = Axes(
        _range(xs, 1.0 if more else None),
        _range([y for point in found for y in point.y], 1.0),
        x_label,
        "safe under the strongest attack (%)",
        (more, True),
    )
    parts = [axes.draw(), "" if base is None else _reference(axes, base)]
    parts.append(_front(axes, found, more=more))
    for point in found:
        far = f"{words.share(point.x[1])} %" if more else f"{point.x[1]:.3g}"
        said = (
            f"{point.label}: safe {words.share(point.y[1])} %, {x_label.partition(' (')[0]} {far}"
        )
        parts.append(_whiskered(axes, point, said))
    where = "right" if more else "left"
    return Chart(
        title,
        svg(title, *parts),
        f"Dashed: what no other row beats on both axes. Up and to the {where} is better.",
    )


def _points(runs: Sequence[Run], judge: str, benign: str) -> list[_Point]:
    points = []
    for color, run in enumerate(runs):
        fidelity = run.value("fidelity", benign, judge)
        if fidelity is None or not run.protects:
            continue
        several = len(categories([run])) > 1
        for category in categories([run]):
            plain = [name for name in unsafe_sets(run, category) if not is_mixed([run], name)]
            removed = run.value("nrr", plain[0], judge) if plain else None
            if removed and words.number(removed["value"]) and words.number(fidelity["value"]):
                label = f"{run.label}: {category}" if several else run.label
                points.append(_Point(label, color, _spread(fidelity), _spread(removed)))
    return points


def _spread(row: Row) -> tuple[float, float, float]:
    low, value, high = row["low"], row["value"], row["high"]
    return (low if words.number(low) else value, value, high if words.number(high) else value)


def _reference(axes: Axes, x: float) -> str:
    """The untouched model's fidelity as a line across."""
    left, top = axes.at(x, axes.y[1])
    end = left > WIDTH - 110
    anchor, shift = ("end", 4) if end else ("start", -4)
    return (
        f'<line class="reference" x1="{left}" x2="{left}" y1="{top}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="tick" x="{left + shift}" y="{TOP - 4}" '
        f'text-anchor="{anchor}">untouched model</text>'
    )


def _front(axes: Axes, points: Sequence[_Point], *, more: bool = True) -> str:
    """Steps through the points that no other point beats on both axes.

    Args:
        axes: The plane.
        points: More is better up, and across too if `more`.
        more: False where less is better across.
    """
    if len(points) < 2:
        return ""
    sign, edge = (1, axes.x[0]) if more else (-1, axes.x[1])
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-sign * p.x[1], -p.y[1])):
        if not best or point.y[1] > best[-1][1]:
            best.append((point.x[1], point.y[1]))
    path = [axes.at(best[0][0], axes.y[0])]
    for (x, y), following in zip(best, [*best[1:], None], strict=True):
        path.append(axes.at(x, y))
        path.append(axes.at(following[0] if following else edge, y))
    return f'<polyline class="front" points="{_path(path)}"/>'


def _whiskered(axes: Axes, point: _Point, words_: str = "") -> str:
    x, y = axes.at(point.x[1], point.y[1])
    x0, x1 = (axes.at(value, 0)[0] for value in (point.x[0], point.x[2]))
    y0, y1 = (axes.at(0, value)[1] for value in (point.y[0], point.y[2]))
    words_ = words_ or (
        f"{point.label}: removed {words.share(point.y[1])} % "
        f"({words.share(point.y[0])} … {words.share(point.y[2])}), "
        f"fidelity {words.share(point.x[1])} % "
        f"({words.share(point.x[0])} … {words.share(point.x[2])})"
    )
    return (
        f'<g class="run{point.color % COLORS}"><title>{escape(words_)}</title>'
        f'<path class="whisker" d="M{x0} {y}H{x1}M{x} {y0}V{y1}'
        f'M{x0} {y - 4}v8M{x1} {y - 4}v8M{x - 4} {y0}h8M{x - 4} {y1}h8"/>'
        f'<circle class="dot" cx="{x}" cy="{y}" r="6"/></g>'
    )


TERMS = {
    "L_e": ("Effectiveness term L_e", "unsafe prompts moved away: higher is further"),
    "L_u": ("Utility term L_u", "safe prompts held: lower is better"),
    "L_a": ("Anchor term L_a", "unsafe prompts drawn to a safe one: lower is closer"),
}


def training(runs: Sequence[Run]) -> list[Chart]:
    """Every un-weighted term of the loss over the steps, all runs in one chart."""
    histories = [(i, run.label, _history(run)) for i, run in enumerate(runs)]
    names = dict.fromkeys(
        key
        for _, _, rows in histories
        for row in rows
        for key, value in row.items()
        if key not in ("step", "epoch") and words.number(value)
    )
    return [_curve(name, histories) for name in sorted(names, key=_order)]


def _order(name: str) -> tuple[int, str]:
    known = list(TERMS)
    return (known.index(name) if name in known else len(known), name)


def _history(run: Run) -> list[dict]:
    return [row for patch in run.patches for row in patch["info"].get("history", ())]


def _curve(name: str, histories: Iterable[tuple[int, str, list[dict]]]) -> Chart:
    lines = [
        (color, label, [(row["step"], row[name]) for row in rows if words.number(row.get(name))])
        for color, label, rows in histories
    ]
    lines = [line for line in lines if line[2]]
    xs = [x for _, _, points in lines for x, _ in points]
    ys = [y for _, _, points in lines for _, y in points]
    axes = Axes((0, max(xs)), _range(ys), "step", name)
    title, note = TERMS.get(name, (name, ""))
    parts: list[str] = [axes.draw()]
    for color, label, points in lines:
        thin = points[:: max(1, len(points) // MOST_POINTS)]
        thin = thin if thin[-1] == points[-1] else [*thin, points[-1]]
        parts.append(
            f'<g class="run{color % COLORS}"><title>{escape(label)}: from {points[0][1]:.3g} to '
            f'{points[-1][1]:.3g}</title><polyline class="line" '
            f'points="{_path(axes.at(x, y) for x, y in thin)}"/></g>'
        )
    return Chart(title, svg(title, *parts), note)


def pareto(runs: Sequence[Run]) -> Chart | None:
    """Held-out drift of safe against cosine of unsafe prompts, over epochs and lambda."""
    groups = []
    for color, run in enumerate(runs):
        for patch in run.patches:
            points = [p for p in patch["info"].get("pareto", ()) if {"drift", "cosine"} <= set(p)]
            kept = patch["info"].get("stopped", {}).get("kept_epoch")
            own = patch["settings"].get("lam")
            lams = list(dict.fromkeys(point.get("lam") for point in points))
            for lam in lams:
                line = sorted((p for p in points if p.get("lam") == lam), key=lambda p: p["epoch"])
                chosen = kept if lam == own else None
                groups.append((color, run.label, lam, line, chosen))
    groups = [group for group in groups if group[3]]
    if not groups:
        return None
    axes = Axes(
        _range([p["drift"] for *_, line, _ in groups for p in line]),
        _range([p["cosine"] for *_, line, _ in groups for p in line]),
        "drift of safe prompts (less is better)",
        "|cos| of unsafe prompts (less is better)",
    )
    title = "Held-out trade-off over epochs and lambda"
    parts = [axes.draw(), *(_epochs(axes, *group) for group in groups)]
    rule = next((patch["info"]["stopped"].get("rule", "") for run in runs for patch in run.patches
                 if "stopped" in patch["info"]), "")  # fmt: skip
    note = "One line per lambda, one point per epoch; the ringed point was kept."
    return Chart(title, svg(title, *parts), f"{note} Rule: {rule}." if rule else note)


def _epochs(
    axes: Axes, color: int, label: str, lam: float | None, line: Sequence[dict], kept: int | None
) -> str:
    dots = []
    for point in line:
        x, y = axes.at(point["drift"], point["cosine"])
        ring = f'<circle class="ring" cx="{x}" cy="{y}" r="7"/>' if point["epoch"] == kept else ""
        dots.append(
            f'{ring}<circle class="dot small" cx="{x}" cy="{y}" r="3"><title>{escape(label)}: '
            f"lambda {lam}, epoch {point['epoch']}, drift {point['drift']:.3g}, "
            f"|cos| {point['cosine']:.3g}</title></circle>"
        )
    path = _path(axes.at(p["drift"], p["cosine"]) for p in line)
    x, y = axes.at(line[-1]["drift"], line[-1]["cosine"])
    end = x > WIDTH - 70
    text = (f'<text class="tick" x="{x - 8 if end else x + 8}" y="{y + 4}" '
            f'text-anchor="{"end" if end else "start"}">λ {lam:g}</text>'
            if words.number(lam) else "")  # fmt: skip
    return (
        f'<g class="run{color % COLORS}"><polyline class="line thin" points="{path}"/>'
        f"{''.join(dots)}{text}</g>"
    )


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)


def _range(values: Sequence[float], most: float | None = None) -> tuple[float, float]:
    """The span of some values with a margin, at most up to `most` plus a margin."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 0.5
    top = high + margin
    return low - margin, top if most is None else min(top, most + margin / 2)


def _ticks(low: float, high: float, percent: bool, n: int) -> list[tuple[float, str]]:
    """About `n` round numbers between two, and how to write them."""
    span = (high - low) / n
    power = 10 ** floor(log10(span))
    step = next(power * k for k in (1, 2, 2.5, 5, 10) if power * k >= span)
    first = ceil(low / step)
    values = [k * step for k in range(first, floor(high / step) + 1)]
    scale: Callable[[float], float] = (lambda x: 100 * x) if percent else (lambda x: x)
    digits = max(0, -floor(log10(scale(step)) + 1e-9))
    digits += 1 if f"{scale(step):.{digits}f}" != f"{scale(step):g}" and digits < 3 else 0
    values = [value for value in values if not (percent and value > 1 + 1e-9)]
    return [(value, f"{scale(value):.{digits}f}".replace("-", words.MINUS)) for value in values]
