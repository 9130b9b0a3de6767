"""Training in processes: one that is killed, two that share every batch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs_run import learn

from safelight.align.base import Checkpoint
from safelight.models.patch import Patch
from safelight.training.team import Team

SCRIPT = Path(__file__).with_name("pairs_run.py")


@pytest.fixture(scope="module")
def alone():
    """What one undisturbed process learns."""
    return learn()


def start(*words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("step", [2, 5])  # in the first epoch, and in the middle of the second
def test_killed_in_the_middle_of_an_epoch_it_goes_on_to_the_same_weights(step, alone, tmp_path):
    file = tmp_path / "checkpoint"
    done = start(SCRIPT, tmp_path / "patch", "--checkpoint", file, "--kill", step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert file.is_file() and not (tmp_path / "patch").exists()
    steps = []
    patch = learn(Checkpoint(file, every=0.0), lambda tick: steps.append(tick.step))
    assert steps == list(range(step, 7))
    for name, (down, up, alpha) in alone.low_rank.items():
        assert torch.equal(patch.low_rank[name][0], down)
        assert torch.equal(patch.low_rank[name][1], up) and patch.low_rank[name][2] == alpha
    assert patch.info["history"] == alone.info["history"]
    assert patch.info["pareto"] == alone.info["pareto"]


def test_two_processes_learn_what_one_does(alone, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2,
              "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    done = start(*launch, SCRIPT, tmp_path / "patch")
    assert done.returncode == 0, done.stderr
    patch = Patch.load(tmp_path / "patch")
    for name, (down, up, _) in alone.low_rank.items():
        torch.testing.assert_close(patch.low_rank[name][0], down, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(patch.low_rank[name][1], up, rtol=1e-3, atol=2e-5)
        assert up.any()
    for own, other in zip(patch.info["history"], alone.info["history"], strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert own["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)


def test_without_a_launcher_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert Team.here() == Team(0, 1)
    x = [torch.ones(2), torch.zeros(3)]
    assert all(a is b for a, b in zip(Team().total(x), x, strict=True))
    assert Team().agreed({"a": 1.0}) == {"a": 1.0}
