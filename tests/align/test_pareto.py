"""The sweep over lambda and epochs: one reference, every epoch a point, a fixed rule."""

import pytest

from safelight.align.base import TextData
from safelight.align.pareto import choose, front, sweep
from safelight.align.safetext import SafeText
from safelight.errors import BadInput
from safelight.prompts import PromptSet

POINTS = [
    {"lam": 1.0, "epoch": 1, "drift": 0.1, "cosine": 0.9},
    {"lam": 1.0, "epoch": 2, "drift": 0.3, "cosine": 0.4},
    {"lam": 2.0, "epoch": 1, "drift": 0.3, "cosine": 0.5},
    {"lam": 2.0, "epoch": 2, "drift": 0.2, "cosine": 0.6},
]


@pytest.fixture
def data():
    safe = [f"a {c} {t}" for c in ("red", "big") for t in ("cat", "dog", "car", "tree", "hat")]
    unsafe = [f"a {c} sword" for c in ("red", "big", "old", "new", "odd")]
    return TextData(safe=PromptSet.of(safe, "safe"), unsafe=PromptSet.of(unsafe, "swords"))


def test_the_front_holds_what_nothing_beats():
    assert [(p["lam"], p["epoch"]) for p in front(POINTS)] == [(1.0, 1), (2.0, 2), (1.0, 2)]


def test_the_rule_takes_the_least_cosine_within_the_allowed_drift():
    assert choose(POINTS, 0.25)["cosine"] == 0.6
    assert choose(POINTS, 0.5)["cosine"] == 0.4
    with pytest.raises(BadInput, match="the least is 0.1"):
        choose(POINTS, 0.05)


def test_a_sweep_reads_the_original_once_and_any_point_can_be_made_again(
    tiny_sd1, data, monkeypatch
):
    gatherd = []
    gather = SafeText.gather
    monkeypatch.setattr(SafeText, "gather", lambda *a, **k: gatherd.append(1) or gather(*a, **k))
    found = sweep(SafeText(lr=3e-3, epochs=3, batch=8), tiny_sd1, data, lams=(0.1, 1.0))
    assert gatherd == [1]
    assert [(p["lam"], p["epoch"]) for p in found.points] == [
        (lam, epoch) for lam in (0.1, 1.0) for epoch in (1, 2, 3)
    ]
    patch = found.fit(found.points[1])
    assert patch.info["stopped"]["kept_epoch"] == 2 and patch.settings["lam"] == 0.1
    assert len(patch.info["pareto"]) == 6
    method = SafeText(lam=0.1)
    untouched = gather(method, tiny_sd1, data, seed=0)
    with tiny_sd1.patched(patch):
        again = method.check(tiny_sd1, untouched)
    for axis in ("drift", "cosine"):
        assert again[axis] == pytest.approx(found.points[1][axis], abs=1e-4)
    assert set(map(id, found.front)) <= set(map(id, found.points))
