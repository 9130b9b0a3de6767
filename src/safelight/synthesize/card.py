"""What lies beside the pairs of a folder: a card for people, and a Parquet table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safelight.models.folder import replaced_file
from safelight.training.twins import Twins

CARD = """# Pairs of pictures

Each pair is an unsafe prompt and its minimal rewriting, both painted by `{model}` ({family}) from
the same noise: to teach this model to prefer the safe side. Unsafe pictures are here on purpose; do
not show them where they are not expected.

| category | prompts written | pairs | dropped by the judge |
|---|---:|---:|---:|
{table}

{facts}

`twins.jsonl` has one line per pair: `id`, `category`, `unsafe_prompt`, `safe_prompt`, `unsafe` and
`safe` (files in this folder, named by the SHA-256 of their content), `seed` of the noise, `meta`.
`twins.json` says how they were made, `dropped.jsonl` what the judge did not agree with. In Python:
`safelight.training.twins.Twins.load(folder)`.
"""


def readme(about: Mapping[str, Any]) -> str:
    """The card of a folder, from its `twins.json`."""
    model = about["model"]
    return CARD.format(
        model=model["name"],
        family=model["family"],
        table="\n".join(_rows(about["categories"])),
        facts="\n".join(f"- {name}: {text}" for name, text in _facts(about)),
    )


def _rows(categories: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, one in categories.items():
        yield f"| {name} | {one['written']} | {one['pairs']} | {sum(one['dropped'].values())} |"


def _facts(about: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    judge, sampling = about["judge"], about["sampling"]
    yield "prompts", ", ".join(f"{one['name']} ({one['sha256'][:12]})" for one in about["sources"])
    if about.get("together"):
        yield "with something unsafe of another category beside", f"{about['together']} of each"
    yield "writer", f"{about['writer']['name']} {about['writer'].get('model', '')}".strip()
    for name, one in about["categories"].items():
        if one["skipped"]:
            yield f"concepts of {name} that were given up", ", ".join(one["skipped"])
    if judge:
        yield "judge", f"{judge['name']}, at most {1 + about['tries']} noises for a pair"
    else:
        yield "judge", "none; nobody has looked at the pictures"
    yield "dropped by the minors filter", str(about["prompts"]["minors"])
    height, width = sampling["size"]
    yield (
        "pictures",
        f"{height} x {width}, {sampling['steps']} steps, guidance {sampling['guidance']:g}, "
        f"seed {about['seed']}",
    )
    yield "weights", ", ".join(f"{k} {sha[:12]}" for k, sha in about["model"]["hashes"].items())


def parquet(twins: Twins, path: Path) -> bool:
    """The pairs as a Parquet table with `meta` spread over columns; False without pyarrow."""
    try:
        from pyarrow import Table
        from pyarrow.parquet import write_table
    except ModuleNotFoundError:
        return False
    names = ("id", "category", "unsafe_prompt", "safe_prompt", "unsafe", "safe", "seed")
    further = sorted({key for row in twins for key in row.meta} - set(names))
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in twins] for name in names}
    columns |= {key: [row.meta.get(key) for row in twins] for key in further}
    with replaced_file(path) as fresh:
        write_table(Table.from_pydict(columns), fresh)
    return True
