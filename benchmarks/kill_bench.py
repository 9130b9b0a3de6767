"""Does a bench that is killed again and again end like one that was left alone?

    python benchmarks/kill_bench.py --kills 20 --seed 0

Runs a small suite of the Emoji World (two rows, three columns, one of them an attack) by the
`safelight bench` command: once undisturbed, then in other folders, where it is killed (SIGKILL,
with all that it started) at random moments and called again. A folder is finished when a call comes
through before its moment; then the next one is begun, until there were enough kills. Moments count
from the first cell's line on, so that kills fall into the work and not into importing torch. They
are drawn evenly from a third of the time that the undisturbed bench worked: a bench is killed about
six times before it comes through, each time further on.

Compared are `leaderboard.json` and every cell's `values.json`, as they are. `cost.json` holds times
and memory and is left out. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SUITE = """
title = "Killed"
model = "emoji-world"
judges = ["emoji-b"]
attack_judge = "emoji"
minimum = 2
batch = 2

[sampling]
steps = 6

[size.quick]
prompts = 8
attacked = 4

[[rows]]
name = "Untouched model"

[[rows]]
name = "Screen"
guards = [{ name = "screen", judge = "emoji" }]

[[columns]]
prompts = ["emoji/weapons/test"]
attacks = ["replay", { name = "mma", slots = 4, candidates = 8, steps = 3, restarts = 1 }]

[[columns]]
prompts = ["emoji/safe/test"]
"""


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--kills", type=int, default=20)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--suite", type=Path, help="a suite of your own [a small one]")
    given = ask.parse_args()
    with tempfile.TemporaryDirectory() as room:
        told = compare(Path(room), given.suite, given.kills, random.Random(given.seed))
    print(json.dumps({"seed": given.seed, **told}, indent=1))
    return 1 if told["different"] else 0


def compare(room: Path, suite: Path | None, kills: int, dice: random.Random) -> dict:
    """An undisturbed bench, and benches that are killed."""
    if suite is None:
        suite = room / "killed.toml"
        suite.write_text(SUITE)
    began = time.perf_counter()
    whole = room / "undisturbed"
    first = Call(suite, whole)
    first.wait(None)
    worked = time.perf_counter() - first.working
    expected = result(whole)
    cells: list[int] = []  # finished when the kill came
    finished: list[str] = []
    different: list[str] = []
    while len(cells) < kills or not finished:
        folder = room / f"killed-{len(finished)}"
        while Call(suite, folder).wait(dice.uniform(0, worked / 3) if len(cells) < kills else None):
            cells.append(len(list(folder.glob("cells/*/*/cell.json"))))
        found = result(folder)
        different += [f"{folder.name}/{name}" for name in expected.keys() | found.keys()
                      if expected.get(name) != found.get(name)]  # fmt: skip
        finished.append(folder.name)
    return {
        "kills": len(cells),
        "cells_finished_at_each": cells,
        "benches_compared": len(finished),
        "files_compared": len(expected) * len(finished),
        "undisturbed_work_seconds": round(worked, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "different": sorted(different),
    }


class Call:
    """One call of `safelight bench`, in a process group of its own."""

    def __init__(self, suite: Path, out: Path) -> None:
        command = [sys.executable, "-m", "safelight", "bench", str(suite), "-o", str(out)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self.started = threading.Event()  # the first cell, or the end
        self.working = 0.0
        self.listener = threading.Thread(target=self._listen)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("[") and not self.started.is_set():
                self.working = time.perf_counter()
                self.started.set()
        self.started.set()

    def wait(self, seconds: float | None) -> bool:
        """Kill it `seconds` after its first cell began; False if it was done before.

        Raises:
            RuntimeError: It failed by itself.
        """
        self.started.wait()
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        self.listener.join()
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError("".join(self.said))
        return code != 0


def result(folder: Path) -> dict[str, str]:
    """The leaderboard and every cell's figures, by file."""
    found = {"leaderboard.json": (folder / "leaderboard.json").read_text()}
    for cell in json.loads(found["leaderboard.json"])["cells"]:
        run = cell["run"]
        found[f"{run}/values.json"] = (folder / run / "values.json").read_text()
    return found


if __name__ == "__main__":
    sys.exit(main())
