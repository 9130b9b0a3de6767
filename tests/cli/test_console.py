"""Training takes the idle cores only, and exceptions become one line and a code."""

import os

import pytest
import torch
import typer

from safelight.cli.console import polite, spare_cores
from safelight.errors import BadInput, WorkFailed


@pytest.mark.parametrize("load, expected", [(0.0, 2), (0.4, 2), (1.2, 1), (9.0, 1)])
def test_training_takes_idle_cores_only(monkeypatch, load, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with spare_cores():
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 2
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
