"""`key=value` texts become typed settings, and wrong ones say what was meant."""

from dataclasses import dataclass
from typing import Literal

import pytest

from safelight.cli.settings import build, split
from safelight.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method with one setting of each type."""

    concept: str
    steps: int = 3
    weight: float = 0.5
    loud: bool = False
    kind: Literal["soft", "hard"] = "soft"
    names: tuple[str, ...] = ()
    limit: float | None = None


def test_each_type_is_read():
    made = build(
        Method,
        ["concept=a=b", "steps=4", "weight=1e-3", "loud=yes", "kind=hard", "names=a,b", "limit=2"],
    )
    assert made == Method(
        concept="a=b", steps=4, weight=1e-3, loud=True, kind="hard", names=("a", "b"), limit=2.0
    )
    assert build(Method, ["concept=x", "limit=none"]).limit is None


@pytest.mark.parametrize(
    "pair, says",
    [
        ("step=4", "no setting named 'step'. Did you mean 'steps'"),
        ("steps=4.5", "steps is a whole number; '4.5' is not"),
        ("weight=much", "weight is a number"),
        ("loud=maybe", "loud is yes or no"),
        ("kind=sort", "Did you mean 'soft'"),
        ("steps", "write it as key=value"),
    ],
)
def test_wrong_pairs_say_what_is_meant(pair, says):
    with pytest.raises(BadInput, match=says):
        build(Method, ["concept=x", pair])


def test_a_missing_setting_is_named():
    with pytest.raises(BadInput, match="--set concept="):
        build(Method, [])


def test_a_guards_judge_takes_settings_which_come_last():
    from safelight.cli.guards import _apart, guards

    (screen,) = guards(["screen:judge=nudenet:classes=9,threshold=0.6"])
    assert (screen.judge.classes, screen.judge.threshold) == ("9", 0.6)
    assert guards(["screen"])[0].judge.name == "emoji"
    assert _apart(["a=1", "judge=fake", "b=2"]) == (["a=1", "b=2"], "fake")
    assert _apart(["a=1", "judge=fake:b=2", "c=3"]) == (["a=1"], "fake:b=2,c=3")
    with pytest.raises(BadInput, match="Did you mean 'threshold'"):
        guards(["screen:judge=fake:treshold=0.6"])


def test_a_spec_is_a_name_and_pairs():
    assert split("screen") == ("screen", [])
    assert split("screen:judge=emoji,threshold=0.4") == ("screen", ["judge=emoji", "threshold=0.4"])
