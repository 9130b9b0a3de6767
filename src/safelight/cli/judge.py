"""`safelight judge`: how far a judge can be trusted, and figures from stored pictures."""

from __future__ import annotations

import csv
import json as reader
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from safelight.cli.console import Json, emit, out, polite, say, working
from safelight.errors import BadInput, NotFound, unknown
from safelight.flow import Value, Verdict

app = typer.Typer(
    help="How far a judge can be trusted, and figures from stored pictures.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
YES, NO = {"1", "true", "yes", "unsafe"}, {"0", "false", "no", "safe"}
BATCH = 16
Key = tuple[str, str]


@dataclass(frozen=True)
class Picture:
    """One picture to be judged.

    Args:
        key: Its prompt, and what tells it from other pictures.
        path: Where it is.
        prompt: What was asked for; "" if that is not known.
        verdicts: What a run already holds about it.
        unsafe: Its label, if it has one.
    """

    key: Key
    path: Path
    prompt: str = ""
    verdicts: tuple[Verdict, ...] = ()
    unsafe: bool | None = None


def agreement(
    source: Annotated[
        Path, typer.Argument(help="A run folder, or a CSV file with a column 'image'.")
    ],
    judge: Annotated[
        list[str] | None,
        typer.Option(help="A judge, NAME or NAME:key=value, repeatable. [default: the run's]"),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A CSV file with the columns 'image' and 'unsafe'.")
    ] = None,
    json: Json = False,
) -> None:
    """Judges against labels, or against each other: tables, kappa, best thresholds."""
    pictures = read_pictures(source)
    if labels is not None:
        pictures = labelled(pictures, labels)
    known = {picture.key: picture.unsafe for picture in pictures if picture.unsafe is not None}
    names = list(dict.fromkeys(judge or stored_judges(source, pictures)))
    if not names:
        raise BadInput("name judges with --judge; this file holds no verdicts.")
    if not known and len(names) < 2:
        raise BadInput(
            "there are no labels: name two judges, or a file with the columns image and unsafe "
            "by --labels."
        )
    from safelight.metric.agreement import against_labels, as_row, between_judges

    thresholds, verdicts = opinions(source, pictures, names)
    single = [against_labels(n, thresholds[n], verdicts[n], known) for n in verdicts if known]
    double = [between_judges(a, b, verdicts[a], verdicts[b]) for a, b in combinations(verdicts, 2)]
    if json:
        rows = {"labels": [as_row(one) for one in single], "judges": [as_row(x) for x in double]}
        emit({"pictures": len(pictures), "labelled": len(known), **rows})
        return
    for one in single:
        print_against(one)
    for two in double:
        print_between(two)


def measure(
    run: Annotated[Path, typer.Argument(help="A run folder with its pictures.")],
    figure: Annotated[
        list[str],
        typer.Option(help="lpips, clean_fid or vqa_score, repeatable.", show_default=False),
    ],
    real: Annotated[
        Path | None, typer.Option(help="A folder of real pictures, for clean_fid.")
    ] = None,
    mode: Annotated[str, typer.Option(help="How clean_fid resizes.")] = "clean",
    net: Annotated[str, typer.Option(help="The network of lpips.")] = "alex",
    model: Annotated[
        str, typer.Option(help="The vision-language model of vqa_score, a folder or hub id.")
    ] = "",
    json: Json = False,
) -> None:
    """LPIPS, FID and VQAScore of a finished run, by networks of their own."""
    from safelight.metric.measure import MEASURES

    for name in figure:
        if name not in MEASURES:
            raise NotFound(unknown("figure", name, MEASURES))
    if real is not None and not real.is_dir():
        raise NotFound(f"there is no folder of pictures at {real}.")
    with working("loading torch"):
        from safelight.bench.records import write_json
        from safelight.bench.run import Run
        from safelight.models.load import best_device

    settings: dict[str, dict[str, Any]] = {
        "lpips": {"net": net},
        "clean_fid": {"real": real, "mode": mode},
        "vqa_score": {"model": model},
    }
    rows = []
    with working("measuring"):
        for name in dict.fromkeys(figure):
            rows += MEASURES[name](Run(run), device=str(best_device()), **settings[name])
    plain = [{k: None if x != x else x for k, x in row.items()} for row in rows]
    write_json(run / "measured.json", plain)
    if json:
        emit(rows)
        return
    from safelight.cli.evaluate import print_values

    print_values([{**row, "metric": f"{row['metric']} {row['network']}"} for row in rows])
    say(f"written to [bold]{run / 'measured.json'}[/]")


app.command("agreement")(polite(agreement))
app.command("measure")(polite(measure))


# Pictures


def read_pictures(source: Path) -> list[Picture]:
    """The pictures of a run folder, or those a CSV file names."""
    if source.is_dir():
        found = list(_of_run(source))
        if not found:
            raise NotFound(f"{source} holds no stored pictures.")
        return found
    return list(_of_file(source))


def _of_run(folder: Path) -> Iterator[Picture]:
    from safelight.bench import records

    if not (folder / "run.json").is_file():
        raise NotFound(f"{folder} is not a run folder; expected one that evaluate has made.")
    for row in records.read(folder):
        if row.image is not None and (folder / row.image).is_file():
            which = f"{row.image}|{row.prompts}|{row.arm}|{row.attack}|{row.seed}"
            path = folder / row.image
            yield Picture((row.prompt_id, which), path, row.text, row.verdicts)


def _of_file(file: Path) -> Iterator[Picture]:
    for number, row in enumerate(_rows(file), start=2):
        path = file.parent / row["image"]
        if not path.is_file():
            raise NotFound(f"{file.name}, line {number}: there is no picture at {path}.")
        prompt, said = row.get("prompt") or "", (row.get("unsafe") or "").strip()
        key = row.get("id") or prompt or row["image"], row["image"]
        label = _label(said, file, number) if said else None
        yield Picture(key, path, prompt, unsafe=label)


def labelled(pictures: Sequence[Picture], file: Path) -> list[Picture]:
    """Pictures with the labels of a file, by the picture's path or by its file name."""
    from dataclasses import replace

    given: dict[str, bool] = {}
    for number, row in enumerate(_rows(file, "unsafe"), start=2):
        label, name = _label(row["unsafe"], file, number), Path(row["image"]).name
        if given.setdefault(name, label) != label:
            raise BadInput(f"{file.name}, line {number}: {name} is labelled twice, differently.")
    found = [replace(p, unsafe=given.get(p.path.name, p.unsafe)) for p in pictures]
    if all(picture.unsafe is None for picture in found):
        raise BadInput(f"{file.name} labels none of these pictures; 'image' is their file name.")
    return found


def _rows(file: Path, *needed: str) -> list[dict[str, str]]:
    if not file.is_file():
        raise NotFound(f"no file at {file}.")
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            table = csv.DictReader(text)
            missing = {"image", *needed} - set(table.fieldnames or ())
            rows = list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{file.name} is not a readable CSV file: {error}.") from None
    if missing:
        raise BadInput(f"{file.name} has no column {sorted(missing)[0]!r}.")
    for number, row in enumerate(rows, start=2):
        if not (row["image"] or "").strip():
            raise BadInput(f"{file.name}, line {number}: no picture is named.")
    if not rows:
        raise BadInput(f"{file.name} names no picture.")
    return rows


def _label(text: str | None, file: Path, number: int) -> bool:
    word = (text or "").strip().lower()
    if word not in YES | NO:
        raise BadInput(f"{file.name}, line {number}: unsafe is 1 or 0; {text!r} is neither.")
    return word in YES


# Opinions


def stored_judges(source: Path, pictures: Sequence[Picture]) -> list[str]:
    """The judges of a run."""
    path = source / "run.json"
    if not path.is_file():
        return []
    return [one["name"] for one in reader.loads(path.read_text(encoding="utf-8"))["judges"]]


def opinions(
    source: Path, pictures: Sequence[Picture], specs: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[Key, Verdict]]]:
    """Thresholds and verdicts by judge: a run's stored ones, or fresh ones.

    A judge named with settings of its own is always asked again.
    """
    path = source / "run.json"
    settings = reader.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"judges": []}
    stored: Mapping[str, float] = {one["name"]: one["threshold"] for one in settings["judges"]}
    thresholds: dict[str, float] = {}
    found: dict[str, dict[Key, Verdict]] = {}
    for spec in specs:
        if spec in stored:
            thresholds[spec] = stored[spec]
            found[spec] = {p.key: v for p in pictures for v in p.verdicts if v.by == spec}
        else:
            thresholds[spec], found[spec] = _asked(spec, pictures)
    return thresholds, found


def _asked(spec: str, pictures: Sequence[Picture]) -> tuple[float, dict[Key, Verdict]]:
    from safelight.cli import guards

    with working(f"loading {spec}"):
        judge = guards.judge(spec)
    found: dict[Key, Verdict] = {}
    with working(f"asking {judge.name}"):
        for part in _batches(pictures):
            images = _tensor([picture.path for picture in part])
            said = judge(images, [picture.prompt for picture in part])
            found |= zip([picture.key for picture in part], said, strict=True)
    return judge.threshold, found


def _batches(pictures: Sequence[Picture]) -> Iterator[list[Picture]]:
    """Up to 16 pictures of one size at a time."""
    from PIL import Image, UnidentifiedImageError

    by_size: dict[tuple[int, int], list[Picture]] = {}
    for picture in pictures:
        try:
            with Image.open(picture.path) as image:
                by_size.setdefault(image.size, []).append(picture)
        except UnidentifiedImageError:
            raise BadInput(f"{picture.path} is not a picture.") from None
    for some in by_size.values():
        for start in range(0, len(some), BATCH):
            yield some[start : start + BATCH]


def _tensor(paths: Sequence[Path]) -> Any:
    import numpy as np
    import torch
    from PIL import Image

    arrays = []
    for path in paths:
        with Image.open(path) as image:
            arrays.append(np.array(image.convert("RGB")))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


# Tables


def print_against(one: Any) -> None:
    """One judge against the labels."""
    from rich.markup import escape
    from rich.table import Table

    t = one.table
    grid = Table(title=f"{escape(one.judge)} against labels, threshold {one.threshold:g}")
    for column in ("", "flagged", "not flagged", "could not tell"):
        grid.add_column(column, justify="right" if column else "left")
    grid.add_row("unsafe", str(t["tp"]), str(t["fn"]), str(t["unknown_unsafe"]))
    grid.add_row("safe", str(t["fp"]), str(t["tn"]), str(t["unknown_safe"]))
    out().print(grid)
    figures = [
        ("sensitivity", one.sensitivity),
        ("specificity", one.specificity),
        ("kappa", one.kappa),
        ("area under ROC", one.auroc),
        ("best threshold", one.best_threshold),
    ]
    plain = [
        ("F1", one.f1),
        ("average precision", one.auprc),
        ("false positives at 95 % sensitivity", one.fpr_at_95),
        ("calibration error", one.calibration_error),
        ("sensitivity at the best threshold", one.best_sensitivity),
        ("specificity at the best threshold", one.best_specificity),
    ]
    _print_figures(figures, plain)
    if not one.enough:
        say("fewer than 100 labelled pictures of either kind: read the intervals, not the figures.")


def print_between(two: Any) -> None:
    """Two judges."""
    from rich.markup import escape
    from rich.table import Table

    first, second = escape(two.first), escape(two.second)
    both, only_first, only_second, neither = (str(n) for n in two.table.values())
    grid = Table(title=f"{first} against {second}", caption=f"could not tell: {two.unknown}")
    for column in ("", f"{second} flagged", f"{second} not"):
        grid.add_column(column, justify="right" if column else "left")
    grid.add_row(f"{first} flagged", both, only_first)
    grid.add_row(f"{first} not", only_second, neither)
    out().print(grid)
    figures = [
        ("agreement", two.agreement),
        ("kappa", two.kappa),
        ("either flags", two.either),
        ("both flag", two.both),
        (f"threshold of {two.first} nearest to {two.second}", two.best_threshold),
    ]
    _print_figures(figures, [("McNemar's p", two.p)])


def _print_figures(
    figures: Sequence[tuple[str, Value]], plain: Sequence[tuple[str, float]]
) -> None:
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for name, value in figures:
        between = f"[dim]{_number(value.low)} .. {_number(value.high)}[/]"
        grid.add_row(escape(name), _number(value.value), between, f"n = {value.n}")
    for name, number in plain:
        grid.add_row(escape(name), _number(number))
    out().print(grid)


def _number(x: float) -> str:
    return "-" if x != x else f"{x:.3f}"
