"""`safelight doctor`: what is installed, what is missing, how to fix it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import typer

from safelight.cli.console import FAILED, Json, emit, out
from safelight.names import find, table

NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "scipy")
OPTIONAL = {  # package to import -> its name for pip, and the extra
    "pyarrow": ("pyarrow", "safelight[parquet]"),
    "lpips": ("lpips", "safelight[lpips]"),
    "cleanfid": ("clean-fid", "safelight[fid]"),
}
FREE_GB = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `fix` says what to do when it is not well."""

    what: str
    state: str
    well: bool
    fix: str = ""


def doctor(json: Json = False) -> None:
    """What is installed, what is missing and how to fix it."""
    findings = list(examine())
    if json:
        emit([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if not all(finding.well for finding in findings):
        raise typer.Exit(FAILED)


def examine() -> Iterator[Finding]:
    """Everything worth knowing, without importing torch before it is known to be there."""
    python = platform.python_version()
    yield Finding("python", python, sys.version_info >= (3, 11), "Install Python 3.11 or newer.")
    for name in NEEDED:
        yield _package(name)
    for module, (name, extra) in OPTIONAL.items():
        has = find_spec(module) is not None
        yield Finding(name, version(name) if has else f"optional: pip install '{extra}'", True)
    yield _torchvision()
    yield from _weights()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    room = f"Free some; a run writes up to {FREE_GB} GB."
    yield Finding("disk", f"{free:.1f} GB free here", free >= FREE_GB, room)
    if find_spec("torch") is not None:
        yield Finding("device", _device(), True)
        for name in table("judge"):
            yield Finding(f"judge {name}", _judge(name), True)


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name), True)
    except PackageNotFoundError:
        return Finding(name, "missing", False, f"pip install {name}")


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks importing diffusers and transformers."""
    if find_spec("torchvision") is None:
        return Finding("torchvision", "absent, and not needed", True)
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        fix = "It does not match torch; pip uninstall torchvision."
        return Finding("torchvision", f"broken: {error}".splitlines()[0], False, fix)
    return Finding("torchvision", version("torchvision"), True)


def _weights() -> Iterator[Finding]:
    fix = "Reinstall safelight; the wheel carries it."
    world = Path(str(files("safelight") / "world"))
    has = (world / "model" / "model_index.json").is_file()
    yield Finding("emoji-world", "installed" if has else "missing", has, fix)
    inside = Path(str(files("safelight")))
    sets = [name for name, paths in table("prompts").items()
            if not all((inside / path).is_file() for path in paths.split())]  # fmt: skip
    total = len(table("prompts"))
    yield Finding("prompt sets", f"{total - len(sets)} of {total}", not sets, fix)


def _judge(name: str) -> str:
    """Whether a judge could look at a picture now, and what it would need or fetch first."""
    wants = find("judge", name)().wants()
    missing = [package for package in wants.packages if find_spec(package) is None]
    needs = []
    if missing:
        needs.append(f"needs {', '.join(missing)}: pip install 'safelight[{wants.extra}]'")
    if wants.setting:
        needs.append(f"needs {wants.setting}")
    if wants.download and not _fetched(wants.download):
        needs.append(f"would download {wants.download} ({wants.size}) at first use")
    return f"not ready (optional): {'; '.join(needs)}" if needs else "ready"


def _fetched(hub_id: str) -> bool:
    """Whether a model's weights are a local folder or in the hub's cache, asking nobody."""
    from huggingface_hub import try_to_load_from_cache

    if Path(hub_id).is_dir():
        return True
    names = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu: {torch.get_num_threads()} threads on {os.cpu_count()} cores"


def _print(findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for one in findings:
        mark = "[green]ok[/]" if one.well else "[red]no[/]"
        grid.add_row(mark, one.what, escape(one.state), "" if one.well else escape(one.fix))
    out().print(grid)
