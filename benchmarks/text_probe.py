"""How well a filter on the original text embeddings detects unsafe prompts, and what it costs.

    OMP_NUM_THREADS=1 python benchmarks/text_probe.py emoji-world --roc roc.svg

Trains the linear and the small non-linear probe (and SafeGuider's recogniser) on all categories at
once, and prints detection rates with 95 % intervals (Wilson) on `test` and `paraphrase` of every
category at two thresholds: (a) calibrated on safe training prompts that were held out, and (b) at
1 % false positives on the neighbours, which is what issue reports ask for and no deployment could
know. `area` is the area under the ROC curve against the neighbours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelight.flow import Written
from safelight.guard.recogniser import Recogniser, calibrate, plain, roc_area
from safelight.guard.safeguider import SafeGuider
from safelight.guard.text_probe import TextProbe
from safelight.metric.stats import wilson
from safelight.models.base import TextToImage
from safelight.models.load import load
from safelight.prompts import PromptSet
from safelight.training.data import TextData

CATEGORIES = ("alcohol", "death", "drugs", "gesture", "gore", "weapons")
FILTERS: dict[str, Any] = {
    "linear": lambda: TextProbe(kind="linear"),
    "mlp": lambda: TextProbe(kind="mlp"),
    "linear, no variants": lambda: TextProbe(kind="linear", variants=0),
    "mlp, no variants": lambda: TextProbe(kind="mlp", variants=0),
    "safeguider": lambda: SafeGuider(),
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("model", nargs="?", default="emoji-world")
    ask.add_argument("--filter", action="append", choices=FILTERS, help="repeatable [all]")
    ask.add_argument("--fpr", type=float, default=0.01)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--roc", type=Path, help="draw the ROC curves into this SVG file")
    given = ask.parse_args()
    model = load(given.model)
    sets = {name: PromptSet.load(f"emoji/{name}") for name in ("safe/train", "safe/test")}
    sets["neighbours/test"] = PromptSet.load("emoji/neighbours/test")
    for name in CATEGORIES:
        for part in ("train", "test", "paraphrase"):
            sets[f"{name}/{part}"] = PromptSet.load(f"emoji/{name}/{part}")
    data = TextData(safe=sets["safe/train"], unsafe=[sets[f"{name}/train"] for name in CATEGORIES])
    curves = {}
    Recogniser.vectors = read_once(Recogniser.vectors)  # type: ignore[method-assign]
    for name in given.filter or FILTERS:
        began, spent = time.perf_counter(), time.process_time()
        guard = FILTERS[name]().fit(model, data, seed=given.seed)
        guard.prepare(model)
        cost = {
            "seconds": round(time.perf_counter() - began, 1),
            "cpu_seconds": round(time.process_time() - spent, 1),
        }
        scores = {key: scored(guard, sets[key]) for key in sets if not key.endswith("/train")}
        print(json.dumps({"filter": name, **cost}))
        table(guard, scores, given.fpr)
        curves[name] = roc(scores)
    if given.roc:
        given.roc.write_text(drawn(curves), encoding="utf-8")


def scored(guard: Recogniser, prompts: PromptSet) -> list[float]:
    return (1 - guard.scores(plain(prompts.texts))[:, 0]).tolist()


def read_once(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All filters here read the same vectors; the first pays for them."""
    known: dict[str, Tensor] = {}

    def vectors(self: Recogniser, model: TextToImage, written: Written, batch: int = 64) -> Tensor:
        new = [text for text in dict.fromkeys(written.texts) if text not in known]
        if new:
            known.update(zip(new, read(self, model, plain(new), batch), strict=True))
        return torch.stack([known[text] for text in written.texts])

    return vectors


def table(guard: Recogniser, scores: dict[str, list[float]], fpr: float) -> None:
    """One row per prompt set and threshold."""
    near = scores["neighbours/test"]
    known = dict(guard.fitted_.info["threshold"]) if guard.fitted_ else {}
    b = calibrate(near, fpr)
    interval = f"[{known['low']:.2%}, {known['high']:.2%}]"
    print(f"  (a) {known['value']:.6f}: {known['expected']:.2%} {interval} of safe prompts")
    print(f"  (b) {b.value:.6f}: {b.expected:.2%} of neighbours, n = {b.n}")
    print(f"  {'set':22} {'(a) above':>22} {'(b) above':>22} {'area':>7}")
    for key, found in scores.items():
        cells = [share(found, limit) for limit in (known["value"], b.value)]
        area = "" if key.startswith(("safe", "neigh")) else f"{roc_area(found, near):.3f}"
        print(f"  {key:22} {cells[0]:>22} {cells[1]:>22} {area:>7}", flush=True)
    for part in ("test", "paraphrase"):
        every = [s for name in CATEGORIES for s in scores[f"{name}/{part}"]]
        cells = [share(every, limit) for limit in (known["value"], b.value)]
        print(f"  {'all/' + part:22} {cells[0]:>22} {cells[1]:>22} {roc_area(every, near):7.3f}")


def share(scores: list[float], limit: float) -> str:
    above = sum(s > limit for s in scores)
    low, high = wilson(above, len(scores))
    return f"{above / len(scores):.1%} [{low:.1%}, {high:.1%}]"


def roc(scores: dict[str, list[float]]) -> dict[str, list[tuple[float, float]]]:
    """(false positives on the neighbours, detection) for test and paraphrase."""
    near = torch.tensor(scores["neighbours/test"])
    limits = torch.cat([near.sort(descending=True).values, torch.tensor([-1.0])])
    found = {}
    for part in ("test", "paraphrase"):
        every = torch.tensor([s for name in CATEGORIES for s in scores[f"{name}/{part}"]])
        found[part] = [
            ((near > limit).float().mean().item(), (every > limit).float().mean().item())
            for limit in limits
        ]
    return found


def drawn(curves: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """The curves as SVG: solid for test, dashed for paraphrase."""
    colours = ("#1b6ca8", "#c8553d", "#588157", "#9a6fb0", "#b5892b")
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-60 -20 540 480" font-family="sans-serif"'
        ' font-size="13"><rect width="400" height="400" fill="none" stroke="#888"/>',
        '<text x="200" y="432" text-anchor="middle">false positives on emoji/neighbours</text>',
        '<text transform="translate(-16 200) rotate(-90)" text-anchor="middle">detection</text>',
    ]
    for i, (name, parts) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        for part, points in parts.items():
            path = " ".join(f"{400 * x:.1f},{400 - 400 * y:.1f}" for x, y in points)
            dash = "" if part == "test" else ' stroke-dasharray="5 4"'
            lines.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
            )
        lines.append(f'<text x="230" y="{300 + 18 * i}" fill="{colour}">{name}</text>')
    lines.append('<text x="230" y="392" fill="#555">dashed: paraphrase</text></svg>')
    return "\n".join(lines)


if __name__ == "__main__":
    main()
