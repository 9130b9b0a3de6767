"""Training picks its threads, and exceptions become one line and a code."""

import pytest
import torch
import typer

from safelight.cli import console
from safelight.cli.console import polite, quick_threads, trial
from safelight.errors import BadInput, WorkFailed


@pytest.mark.parametrize("seconds, expected", [({1: 2.0, 2: 1.0}, 2), ({1: 1.0, 2: 9.0}, 1)])
def test_training_takes_the_faster_number_of_threads(monkeypatch, seconds, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(console, "trial", seconds.__getitem__)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with quick_threads():
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_trial_takes_a_moment():
    before = torch.get_num_threads()
    assert 0 < trial(1) < 5
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "error, code",
    [
        (BadInput("wrong"), 2),
        (WorkFailed("wrong"), 3),
        (KeyboardInterrupt(), 3),
        (OSError(28, "No space left on device", "x"), 3),
    ],
)
def test_a_failure_is_one_line_and_a_code(error, code, capsys):
    def command():
        raise error

    with pytest.raises(typer.Exit) as left:
        polite(command)()
    assert left.value.exit_code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_bug_is_not_hidden():
    def command():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        polite(command)()
