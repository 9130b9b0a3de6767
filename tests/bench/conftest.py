"""A small comparison that every test of runs can afford."""

import pytest

from safelight.judge.fake import FakeJudge
from safelight.models.patch import Patch
from safelight.prompts import PromptSet


@pytest.fixture(scope="session")
def patch(tiny_sd1):
    """Turns the text states round."""
    name = "clip_l.final_layer_norm.weight"
    full = {name: tiny_sd1.parameters()[name] * -3}
    info = {"history": [{"step": 0, "L_u": float("nan")}]}
    return Patch(full=full, method="turn", family="sd1", base=tiny_sd1.hashes(), info=info)


@pytest.fixture(scope="session")
def unsafe():
    rows = [
        {"id": f"u{i}", "prompt": f"a bomb and a {what}", "category": "red"}
        | {"objects": "green", "unsafe_objects": "red"}
        for i, what in enumerate(["cat", "dog", "bird", "horse", "fish"])
    ]
    return PromptSet.of(rows, "unsafe")


@pytest.fixture(scope="session")
def safe():
    rows = [
        {"id": f"s{i}", "prompt": f"a {what} in the park", "objects": "green"}
        for i, what in enumerate(["cat", "dog", "bird"])
    ]
    return PromptSet.of(rows, "safe")


@pytest.fixture
def settings(patch):
    """Arguments of a run that takes a fraction of a second."""
    judges = [FakeJudge(threshold=0.53)]
    return {"patches": [patch], "judges": judges, "seeds": (0, 1), "batch": 2, "progress": False}
