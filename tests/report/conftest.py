"""Made-up runs, written once for all tests of the report."""

import pytest
from synthetic import ANCHORED, PAPER, write_run

from safelight.report import Report


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory):
    """The paper's method and the anchored one on the same prompts."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / "safetext", PAPER, size=14),
        write_run(folder / "anchored", ANCHORED, size=14),
    ]


@pytest.fixture(scope="session")
def page(two_runs, tmp_path_factory):
    """The file with the report about both."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    Report(two_runs).html(path)
    return path


@pytest.fixture(scope="session")
def text(page):
    return page.read_text(encoding="utf-8")
