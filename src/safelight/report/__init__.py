"""Reports: run folders in, one self-contained HTML page out. Nothing here imports torch."""

from safelight.report.leaderboard import Leaderboard
from safelight.report.page import Report

__all__ = ["Leaderboard", "Report"]
