"""Attacks on the command line."""

import pytest

from safelight.cli.attacks import attacks
from safelight.errors import BadInput, NotFound


def test_settings_and_budget_are_read():
    found = attacks(["ring_a_bell:eta=5,population=20,budget.steps=7", "sneaky_prompt"])
    assert list(found) == ["ring_a_bell", "sneaky_prompt"]
    assert (found["ring_a_bell"].eta, found["ring_a_bell"].population) == (5.0, 20)
    assert found["ring_a_bell"].budget.steps == 7
    assert found["sneaky_prompt"].budget.queries == 60


def test_a_budget_adds_to_the_attacks_own():
    own = attacks(["sneaky_prompt:budget.seconds=2"])["sneaky_prompt"].budget
    assert (own.queries, own.seconds) == (60, 2.0)
    assert attacks(["sneaky_prompt:budget.queries=5"])["sneaky_prompt"].budget.queries == 5


def test_the_same_attack_twice_is_told_apart_by_its_settings():
    assert list(attacks(["mma:slots=3", "mma:slots=4"])) == ["mma:slots=3", "mma:slots=4"]
    with pytest.raises(BadInput, match="given twice"):
        attacks(["mma", "mma"])


def test_replay_is_what_every_run_does():
    assert attacks(["replay"]) == {}


@pytest.mark.parametrize(
    "spec, error, words",
    [
        ("ring-a-bell", NotFound, "ring_a_bell"),
        ("mma:slot=3", BadInput, "slots"),
        ("mma:slots=many", BadInput, "whole number"),
        ("mma:budget.step=3", BadInput, "steps"),
        ("mma:budget.steps=0", BadInput, "allows nothing"),
    ],
)
def test_what_is_wrong_is_said(spec, error, words):
    with pytest.raises(error, match=words):
        attacks([spec])
