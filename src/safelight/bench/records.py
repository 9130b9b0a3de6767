"""Rows on disk: one JSON line per picture, appended, flushed, and never lost to a kill.

A line is written after its picture. A process that dies while writing leaves at most one unfinished
last line, which reading ignores and the next append removes. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safelight.errors import BadInput
from safelight.flow import Record, Verdict

FORMAT = 1
RECORDS = "records.jsonl"


def to_line(record: Record) -> str:
    """A record as one JSON line; scores of exactly 0 are left out, an absent score reads as 0."""
    row = asdict(record)
    for verdict in row["verdicts"]:
        verdict["scores"] = {label: x for label, x in verdict["scores"].items() if x}
    return json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_line(line: str) -> Record:
    """The record in a line.

    Raises:
        BadInput: The line is not a record.
    """
    try:
        row = json.loads(line)
        row["verdicts"] = tuple(Verdict(**verdict) for verdict in row["verdicts"])
        return Record(**row)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise BadInput(f"not a record: {line[:80]!r} ({error})") from None


def read(folder: Path) -> list[Record]:
    """All complete records of a run folder, in the order in which they were written.

    Raises:
        BadInput: A line before the last is damaged.
    """
    path = folder / RECORDS
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
    records = []
    for number, line in enumerate(whole.split("\n")[:-1], start=1):
        try:
            records.append(from_line(line))
        except BadInput as error:
            raise BadInput(f"{path.name}, line {number}: {error}") from None
    return records


def append(folder: Path, records: Iterable[Record]) -> None:
    """Add records durably: they are on the disk when this returns."""
    append_lines(folder / RECORDS, map(to_line, records))


def heal(folder: Path) -> None:
    """Cut off a last line that was never finished."""
    heal_lines(folder / RECORDS)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file durably: they are on the disk when this returns."""
    content = "".join(line + "\n" for line in lines).encode("utf-8")
    with path.open("ab") as file:
        end = file.tell()
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:  # a full disk took half a line: the next append must not follow it
            os.truncate(file.fileno(), end)
            raise


def heal_lines(path: Path) -> None:
    """Cut off a file's last line if it was never finished."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def put_image(folder: Path, png: bytes, *, store: bool = True) -> str:
    """Store a PNG under its own hash and return its path inside the run folder.

    Args:
        folder: The run folder.
        png: The encoded picture.
        store: False keeps only the name, for pictures that must not stay on a disk.
    """
    digest = hashlib.sha256(png).hexdigest()
    name = f"images/{digest[:2]}/{digest}.png"
    path = folder / name
    if store and not path.exists():
        write(path, png)
    return name


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and machines, whole or not at all."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1)
    write(path, (text + "\n").encode("utf-8"))
