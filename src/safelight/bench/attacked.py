"""Attacked prompts of a run: searched for once, batch by batch, and kept in the run folder.

    attacks/<attack>/<number of the set>/<batch>.jsonl           the prompts as they are sent
    attacks/<attack>/<number of the set>/<batch>.safetensors     learnt embeddings, start noise
    attacks/<attack>/patch/                                      what an attack on weights put on

Whatever is there is not searched for again, so a killed run loses the batch it was at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from safelight.attack.base import Attack, Target, name_of
from safelight.bench import records as rows
from safelight.errors import BadInput
from safelight.flow import Prompt
from safelight.guard.base import Guarded
from safelight.judge.base import Judge
from safelight.models.patch import Patch
from safelight.prompts import PromptSet

FOLDER = "attacks"
LOOKS = ("images", "gradients")  # access of attacks that may look at pictures with a judge


@dataclass(frozen=True, kw_only=True)
class Assault:
    """An attack in a run.

    Args:
        name: What rows and figures call it.
        attack: The method with its settings.
        judge: The attacker's judge.
        seed: Of the search.
        transfer: Search on the untouched model instead of the protected one.
    """

    name: str
    attack: Attack
    judge: Judge | None = None
    seed: int = 0
    transfer: bool = False

    def about(self) -> dict[str, Any]:
        """Its part of `run.json`."""
        from safelight.bench.settings import of_attack

        return {
            **of_attack(self.name, self.attack),
            "judge": self.judge.name if self.judge else "",
            "judge_threshold": self.judge.threshold if self.judge else None,
            "judge_groups": {k: list(v) for k, v in self.judge.groups.items()}
            if self.judge
            else {},
            "seed": self.seed,
            "transfer": self.transfer,
        }


def named(attacks: Sequence[Attack] | dict[str, Attack], **settings: Any) -> tuple[Assault, ...]:
    """Attacks under their own names, or under given ones.

    Raises:
        BadInput: Two have the same name.
    """
    pairs = (
        list(attacks.items())
        if isinstance(attacks, dict)
        else [(name_of(attack), attack) for attack in attacks]
    )
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1 or name == "replay"]
    if twice:
        why = (
            "'replay' is what every run does anyway"
            if twice[0] == "replay"
            else f"two attacks are named {twice[0]!r}"
        )
        raise BadInput(f"{why}; leave one out or rename it.")
    return tuple(Assault(name=name, attack=attack, **settings) for name, attack in pairs)


def check(assaults: Sequence[Assault], judges: Sequence[Judge]) -> None:
    """Refuse an attack that searches with a judge that also reports.

    Raises:
        BadInput: An attack that may look at pictures would look with a reporting judge.
    """
    for one in assaults:
        if one.attack.access not in LOOKS:
            continue
        if one.judge is not None and one.judge.name in {judge.name for judge in judges}:
            raise BadInput(
                f"{one.name} would search with the judge {one.judge.name!r} that also reports its "
                "success. Give the attacker another judge."
            )


def asked(prompts: Sequence[PromptSet]) -> list[PromptSet]:
    """The sets worth attacking: those that ask for something unsafe, or all if none says so."""
    return [one for one in prompts if one.categories] or list(prompts)


def tampered(one: Assault, target: Guarded, out: Path) -> AbstractContextManager:
    """The model as an attack with access to the weights leaves it."""
    folder = out / FOLDER / slug(one.name) / "patch"
    if folder.is_dir():
        return target.model.patched(Patch.load(folder))
    with torch.enable_grad():
        patch = one.attack.tamper(target, seed=one.seed)
    if patch is None:
        return nullcontext()
    patch.save(folder)
    return target.model.patched(patch)


def search(
    one: Assault,
    number: int,
    prompts: PromptSet,
    target: Guarded,
    out: Path,
    **settings: Any,
) -> PromptSet:
    """One set's attacked prompts, from the run folder where they are there already.

    Args:
        one: The attack.
        number: Which set of the run it is.
        prompts: The set.
        target: What is attacked.
        out: The run folder.
        **settings: `seeds`, `batch`, `sampling`, `progress` as for calling an attack.
    """
    folder = out / FOLDER / slug(one.name) / str(number)
    seen: Target = target
    on: AbstractContextManager = nullcontext()
    if one.transfer:
        seen, on = Guarded(target.model), target.model.unpatched()
    curve: list[dict[str, Any]] = []
    with on, torch.enable_grad():
        found = one.attack(
            prompts,
            target,
            seed=one.seed,
            judge=one.judge,
            transfer_from=seen if one.transfer else None,
            batches=Batches(folder),
            curve=curve,
            **settings,
        )
    if curve:
        rows.write_json(folder / "curve.json", curve)
    return found


class Batches(MutableMapping):
    """Batches of attacked prompts in a folder, by number.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, number: int) -> tuple[Prompt, ...]:
        path = self._path(number)
        if not path.exists():
            raise KeyError(number)
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        tensors = path.with_suffix(".safetensors")
        held = load(tensors.read_bytes()) if tensors.exists() else {}
        return tuple(_read(i, line, held) for i, line in enumerate(lines))

    def __setitem__(self, number: int, prompts: Sequence[Prompt]) -> None:
        held = dict(pair for i, prompt in enumerate(prompts) for pair in _tensors(i, prompt))
        path = self._path(number)
        if held:
            rows.write(path.with_suffix(".safetensors"), save(held))
        lines = "".join(_line(prompt) + "\n" for prompt in prompts)
        rows.write(path, lines.encode("utf-8"))  # last: with it the batch is there

    def __delitem__(self, number: int) -> None:
        self._path(number).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(path.stem) for path in self.folder.glob("*.jsonl")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.jsonl"


def cost(sets: Sequence[PromptSet]) -> dict[str, Any]:
    """What a search spent, from what its prompts remember."""
    meta = [prompt.meta for one in sets for prompt in one]
    n = len(meta)
    total = {
        key: sum(float(one.get(key, 0)) for one in meta) for key in ("queries", "steps", "seconds")
    }
    return {
        "prompts": n,
        "seconds": total["seconds"],
        "queries_per_prompt": total["queries"] / n if n else None,
        "steps_per_prompt": total["steps"] / n if n else None,
        "failed": sum("attack_failed" in one for one in meta),
    }


def slug(name: str) -> str:
    """A name as a folder can have it."""
    return re.sub(r"[^\w.=-]+", "-", name)


def _line(prompt: Prompt) -> str:
    row = asdict(replace(prompt, soft=None, latents=None, meta=dict(prompt.meta)))
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def _tensors(i: int, prompt: Prompt) -> Iterator[tuple[str, Tensor]]:
    for encoder, value in (prompt.soft or {}).items():
        yield f"{i}/soft/{encoder}", value.detach().cpu().contiguous()
    if prompt.latents is not None:
        yield f"{i}/latents", prompt.latents.detach().cpu().contiguous()


def _read(i: int, line: str, held: dict[str, Tensor]) -> Prompt:
    start = f"{i}/soft/"
    soft = {name.removeprefix(start): x for name, x in held.items() if name.startswith(start)}
    return Prompt(**{**json.loads(line), "soft": soft or None, "latents": held.get(f"{i}/latents")})
