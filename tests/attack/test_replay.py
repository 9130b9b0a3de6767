"""Replay sends what it is given."""

from safelight.attack.replay import Replay
from safelight.prompts import PromptSet


def test_replay_changes_no_text(tiny_sd1):
    prompts = PromptSet.of(["a cat", "a dog é " * 40], "x")
    replayed = Replay()(prompts, tiny_sd1)
    assert replayed.texts == prompts.texts
    assert not any("attack_failed" in prompt.meta for prompt in replayed)
