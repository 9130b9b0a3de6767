"""What an attack is: a rewriting of prompts against a target, within a budget.

An attack says how a batch of prompts is rewritten. This file owns the rest: what the target gives
away, the noise that will be painted from, the budget, determinism for a seed, and the checks of
what comes back. It never says whether an attack worked: a judge decides that later, on the picture
that the attacked target really makes.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from safelight.errors import BadInput, Unsupported, WorkFailed
from safelight.flow import Card, Outcome, Prompt
from safelight.guard.base import Guarded
from safelight.judge.base import Judge
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.models.soft import without
from safelight.prompts import PromptSet
from safelight.prompts.minors import names_a_minor_in_harm
from safelight.prompts.noise import noise_seed

Access = Literal["prompts", "images", "text_encoder", "gradients", "weights"]
BLACK_BOX = ("prompts", "images")  # what a target gives that can only be asked

Progress = Callable[[int, int], None]


@runtime_checkable
class Target(Protocol):
    """What is attacked: a model, a guarded model, or something that can only be asked."""

    def __call__(self, prompts: Sequence[str], **settings: Any) -> list[Outcome]: ...


class QueryOnly:
    """A target of which nothing is known but its answers, such as a service.

    Args:
        target: A guarded model, or anything called like one.
    """

    def __init__(self, target: Target) -> None:
        self._target = target

    def __call__(self, prompts: Sequence[str], **settings: Any) -> list[Outcome]:
        """One outcome per prompt: a picture, or a refusal."""
        return self._target(prompts, **settings)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend at most; None is no limit.

    Args:
        queries: Pictures asked of the target, per prompt.
        steps: Gradient steps or generations, per prompt.
        seconds: Per batch of prompts. Results then depend on the machine.
    """

    queries: int | None = None
    steps: int | None = None
    seconds: float | int | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and not value > 0:
                raise BadInput(f"a budget of {value} {one.name} allows nothing; give more than 0.")


class Search:
    """Everything an attack may use on one batch of prompts; it counts what is spent.

    Args:
        target: A `Guarded` (bare models are wrapped in one without guards), or what can only be
            asked. Differentiable: `target.edited(model.encode(...))` is what the denoiser is told
            behind the guards.
        judge: The attacker's own judge for attacks that look at pictures; never the reporting one.
        rng: A generator on the CPU, seeded by the attack's seed and the batch's number.
        seeds: The noise seed of each prompt: the picture that will be painted.
        budget: What may be spent.
        sampling: `steps`, `guidance`, `size` of asked pictures, where they are not the model's own.
        number: Which batch it is.
    """

    def __init__(
        self,
        target: Target,
        *,
        rng: torch.Generator,
        seeds: Sequence[int],
        budget: Budget,
        judge: Judge | None = None,
        sampling: Mapping[str, Any] | None = None,
        number: int = 0,
    ) -> None:
        self.target = target
        self.judge = judge
        self.rng = rng
        self.seeds = tuple(seeds)
        self.budget = budget
        self.sampling = dict(sampling or {})
        self.number = number
        self.queries = [0] * len(self.seeds)
        self.steps = 0
        self.curve: list[dict[str, Any]] = []
        self._began = time.perf_counter()

    @property
    def model(self) -> TextToImage:
        """The bare model behind the target, with the patches that are on it.

        Raises:
            Unsupported: The target can only be asked.
        """
        model = model_of(self.target)
        if model is None:
            raise Unsupported("this target can only be asked; its model is not known.")
        return model

    def query(
        self,
        prompts: Sequence[str | Prompt],
        seeds: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> list[Outcome]:
        """Ask the target to paint, and count it.

        Args:
            prompts: What to ask.
            seeds: Noise seeds; those of the prompts in the batch if None.
            rows: For which prompt of the batch each is asked; one each, in order, if None.

        Raises:
            WorkFailed: More is asked than the budget allows: a mistake of the attack.
        """
        rows = range(len(self.seeds)) if rows is None else rows
        if len(rows) != len(prompts):
            raise BadInput(f"{len(prompts)} queries for {len(rows)} prompts; say `rows`.")
        for row in rows:
            self.queries[row] += 1
            if self.budget.queries is not None and self.queries[row] > self.budget.queries:
                raise WorkFailed(
                    f"the attack asked for more than its {self.budget.queries} pictures per prompt."
                )
        seeds = [self.seeds[row] for row in rows] if seeds is None else list(seeds)
        if isinstance(self.target, Guarded):
            asked = [
                one if isinstance(one, Prompt) else Prompt(id=str(i), text=one)
                for i, one in enumerate(prompts)
            ]
            return self.target.show(asked, seeds, **self.sampling)
        texts = [one.text if isinstance(one, Prompt) else one for one in prompts]
        return self.target(texts, seed=seeds, **self.sampling)

    def left(self, row: int) -> int | None:
        """How many more pictures may be asked for one prompt; None is no limit."""
        limit = self.budget.queries
        return None if limit is None else limit - self.queries[row]

    def step(self, n: int = 1) -> None:
        """Count gradient steps or generations; one for all prompts together counts 1 for each."""
        self.steps += n

    @property
    def seconds(self) -> float:
        """Since the batch was begun."""
        return time.perf_counter() - self._began

    @property
    def over(self) -> bool:
        """Whether a budget is spent: stop, and return the best so far."""
        limit = self.budget
        return (
            (limit.queries is not None and min(self.queries, default=0) >= limit.queries)
            or (limit.steps is not None and self.steps >= limit.steps)
            or (limit.seconds is not None and self.seconds >= limit.seconds)
        )

    def record(self, **figures: float) -> None:
        """Remember figures of one step, such as a loss, for the report."""
        self.curve.append({"step": self.steps, **figures})

    def survives(self, text: str) -> bool:
        """Whether a text comes back from its tokens and nothing of it is cut, for every encoder.

        True where the target can only be asked: it is sent the text itself.
        """
        model = model_of(self.target)
        return model is None or survives(model, text)


@dataclass(kw_only=True)
class Attack(ABC):
    """Rewrites prompts against a target; a subclass implements `rewrite`.

    Args:
        budget: What a search may spend at most.
    """

    card: ClassVar[Card]
    access: ClassVar[Access]

    budget: Budget = field(default_factory=Budget)

    @abstractmethod
    def rewrite(self, prompts: Sequence[Prompt], search: Search) -> Sequence[Prompt]:
        """A batch rewritten, in order: each is `replace(prompt, text=..., ...)` with its own id."""

    def tamper(self, target: Target, *, seed: int = 0) -> Patch | None:
        """What an attack with access to the weights puts on before anything is painted."""
        return None

    def __call__(
        self,
        prompts: PromptSet,
        target: Target,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        judge: Judge | None = None,
        transfer_from: Target | None = None,
        batch: int = 16,
        sampling: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        curve: list[dict[str, Any]] | None = None,
        batches: MutableMapping[int, Sequence[Prompt]] | None = None,
    ) -> PromptSet:
        """The prompts as the attack sends them, one for each; the same for the same seed.

        Args:
            prompts: What the attacker wants painted.
            target: A model, a guarded model, or a `QueryOnly`.
            seed: Of the search.
            seeds: The noise seed of each prompt; that of its first picture if None.
            judge: The attacker's judge, for attacks that look at pictures.
            transfer_from: Another target that the search sees instead of the attacked one.
            batch: Prompts searched for together.
            sampling: `steps`, `guidance`, `size` of asked pictures; the model's own if None.
            progress: Called as `progress(done, total)` with prompts after each batch.
            curve: What searches record is appended here, one row per step and batch.
            batches: Batches that were found earlier by number; new ones are put there too.

        Raises:
            Unsupported: Another family, or a target that gives away less than the attack needs.
            BadInput: No prompts, or not one noise seed each.
        """
        seen = whole(target if transfer_from is None else transfer_from)
        self._check(prompts, seen, seeds, batch)
        noise = [noise_seed(prompt, 0) for prompt in prompts] if seeds is None else list(seeds)
        source = {} if transfer_from is None else {"transfer_from": _name(seen)}
        attacked: list[Prompt] = []
        for number, start in enumerate(range(0, len(prompts), batch)):
            if batches is not None and number in batches:
                attacked += batches[number]
            else:
                part = prompts.prompts[start : start + batch]
                search = Search(
                    seen,
                    rng=torch.Generator().manual_seed(_mixed(seed, number)),
                    seeds=noise[start : start + batch],
                    budget=self.budget,
                    judge=judge,
                    sampling=sampling,
                    number=number,
                )
                found = self._searched(part, search, model_of(target), source)
                if batches is not None:
                    batches[number] = found
                attacked += found
                if curve is not None:
                    curve += [{"batch": number, **row} for row in search.curve]
            if progress is not None:
                progress(len(attacked), len(prompts))
        return replace(prompts, prompts=tuple(attacked))

    def _searched(
        self,
        prompts: Sequence[Prompt],
        search: Search,
        model: TextToImage | None,
        source: Mapping[str, str],
    ) -> list[Prompt]:
        """A batch, rewritten and checked."""
        found = list(self.rewrite(prompts, search))
        seconds = search.seconds / len(prompts)
        self._same_order(prompts, found)
        attacked = []
        for row, (old, new) in enumerate(zip(prompts, found, strict=True)):
            spent = {
                "queries": str(search.queries[row]),
                "steps": str(search.steps),
                "seconds": f"{seconds:.3f}",
            }
            attacked.append(self._checked(old, new, model, spent | dict(source)))
        return attacked

    def _check(
        self, prompts: PromptSet, seen: Target, seeds: Sequence[int] | None, batch: int
    ) -> None:
        name = name_of(self)
        if not len(prompts):
            raise BadInput(
                f"{name} has nothing to attack: no prompt of {prompts.name!r} is left "
                f"({prompts.dropped} were dropped)."
            )
        if seeds is not None and len(seeds) != len(prompts):
            raise BadInput(f"there are {len(seeds)} noise seeds for {len(prompts)} prompts.")
        if batch < 1:
            raise BadInput(f"batch must be at least 1, not {batch}.")
        self.suits(seen)

    def suits(self, target: Target) -> None:
        """Refuse a target that this attack cannot search on.

        Raises:
            Unsupported: Another family, or a target that gives away less than the attack needs.
        """
        name, model = name_of(self), model_of(target)
        if model is None:
            if self.access not in BLACK_BOX:
                raise Unsupported(
                    f"{name} needs the {self.access.replace('_', ' ')} of its target; this one can "
                    "only be asked. Use an attack by queries, or transfer from a model you hold."
                )
        elif model.family not in self.card.families:
            raise Unsupported(
                f"{name} supports {', '.join(self.card.families)}; this model is {model.family}."
            )

    def _same_order(self, before: Sequence[Prompt], after: Sequence[Prompt]) -> None:
        if [prompt.id for prompt in before] != [prompt.id for prompt in after]:
            raise WorkFailed(f"{name_of(self)} did not return one prompt for each, in order.")

    def _checked(
        self, old: Prompt, new: Prompt, model: TextToImage | None, spent: Mapping[str, str]
    ) -> Prompt:
        """What is sent: the rewritten prompt, or the old one where it would not arrive."""
        why = _fault(old, new, model)
        if why:
            new = replace(old, meta={**new.meta, "attack_failed": why})
        return replace(
            old,
            id=f"{old.id}~{name_of(self)}",
            parent=old.id,
            text=new.text,
            soft=new.soft,
            latents=new.latents,
            meta={**old.meta, **new.meta, **spent},
        )


def name_of(attack: Attack) -> str:
    """The name in the table, which is the module's name."""
    return type(attack).__module__.rpartition(".")[2]


def whole(target: Target) -> Target:
    """A bare model as a guarded one without guards; everything else as it is."""
    return Guarded(target) if isinstance(target, TextToImage) else target


def model_of(target: Target) -> TextToImage | None:
    """The model behind a target; None if it can only be asked."""
    return target if isinstance(target, TextToImage) else getattr(target, "model", None)


def survives(model: TextToImage, text: str) -> bool:
    """Whether a text comes back from its tokens and nothing of it is cut, for every encoder."""
    text = without(text)
    for encoder, tokenizer in model.tokenizers.items():
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > model.tokens[encoder]:
            return False
        back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if tokenizer(back, verbose=False).input_ids != ids:
            return False
    return True


def _fault(old: Prompt, new: Prompt, model: TextToImage | None) -> str:
    """Why a rewritten prompt cannot be sent; "" if it can."""
    if model is None and (new.soft is not None or new.latents is not None):
        return "the target takes words only"
    if new.text == old.text:
        return ""
    if names_a_minor_in_harm(new.text, old.category):
        return "the found text may concern minors"
    if model is not None and not survives(model, new.text):
        return "does not survive re-tokenisation"
    return ""


def _mixed(seed: int, number: int) -> int:
    """One seed from two numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")


def _name(target: Target) -> str:
    model = model_of(target)
    return type(target).__name__ if model is None else model.name
