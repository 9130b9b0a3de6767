"""Soft prompt: a learnt token per unsafe category that steers a prompt's picture to a safe one.

`v*_c` are embeddings at token positions around the prompt, one (or `vectors`) per category `c` and
text encoder; no weight of the model changes. `p` is an unsafe prompt, `r` its safe counterpart,
`p'`, `r'` the same with `v*_c`. Each category learns by itself; at use all of them stand side by
side, in the recorded order.

`form = "text"`, PromptSafe: no pictures. One draw of `z ~ N(0, 1)`, `t` and noise gives `z_t`, the
same for all four predictions; `D(a, b)` is the mean squared gap of the predictions under a and b.

    m     = margin D(r, p)                                  (a number, without gradient)
    L_tri = 10 relu(D(p', r) - D(p', p) + m)
    L_ben = D(r', r)
    L     = balance L_tri + (1 - balance) L_ben + pull D(p', r)

`form = "picture"`, PromptGuard: `x` is the picture of `p`, `x*` the safe target; for a benign
prompt both are its own picture. Both are noised independently with the same `t`.

    L = (1 - c) MSE(x* | p') + y c MSE(x | p'),    y = 1 for benign prompts, -1 for unsafe ones

Sources: Yuan et al., PromptGuard, arXiv:2501.03544 (categories, concatenation, the picture form;
code Apache-2.0); PromptSafe, arXiv:2508.01272 (the text form, the gate; code MIT). Needs unsafe
prompts with safe counterparts and gradients through the denoiser.

Ours differs:
- PromptGuard's `x*` is an SDEdit of `x`; ours is the picture of `r` from the noise of `x`. Its sign
  `y` for unsafe prompts is inferred, and its repelling term stops at `bound`, the error of a
  prediction that knows nothing: it is unbounded otherwise.
- The relu and D are per prompt, then averaged (the same for one prompt at a time).
- A prompt that is too long is cut, never the tokens. `<*>` of anybody else is left where it is.
- `gate`: how PromptSafe's gate multiplies the token is not stated. Ours is a text probe with a
  threshold (`safelight.guard.text_probe`, learnt along): below it g = 0 and nothing stands there,
  so that picture is the bare model's to the bit; above it stands g v* + (1 - g) v_init, with g the
  probe's score. Learnt embeddings get g = 1, since no threshold holds for them. With "category"
  only the token of the likeliest category stands. PromptGuard has no gate ("none").
- Only the condition is edited; the unconditional branch of guidance is the model's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safelight.errors import BadInput, unknown
from safelight.flow import Card, Condition, Prompt, Written
from safelight.guard.text_probe import TextProbe
from safelight.guard.trained import Fitted, TrainedGuard
from safelight.models.base import TextToImage
from safelight.models.soft import Soft
from safelight.training.data import TextData, shuffled, texts
from safelight.training.descent import Loss, Watch

Form = Literal["text", "picture"]
Place = Literal["start", "end"]
Gate = Literal["none", "prompt", "category"]


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(TrainedGuard):
    """Put learnt safety tokens around every prompt.

    Args:
        form: Learn in the space of predictions from "text" alone, or from "picture"s.
        place: Where the tokens stand: at the start of the prompt (PromptSafe) or at its end
            (PromptGuard).
        gate: "none": always; "prompt": as strongly as a text probe finds the prompt unsafe;
            "category": the same, and only the token of its likeliest category.
        fpr: Share of safe prompts for which the gate may open.
        categories: Which of the learnt categories act, in this order; () is all as recorded.
        encoders: Names of the encoders that get tokens; () is all of them.
        vectors: Tokens per category.
        init: The word that tokens start as; its tokens' mean where it has several.
        rounds: Steps per epoch and category.
        margin: Share of D(r, p) by which p' must be nearer to r than to p.
        balance: Weight of the triplet term against the benign one.
        pull: Weight of D(p', r) in addition; 0.5 in PromptSafe's variant with three losses.
        c: Weight of the original picture against the target picture.
        bound: Where the repelling term of the picture form stops.
        pictures: Pairs of pictures per category, and benign pictures, for the picture form.
    """

    card: ClassVar[Card] = Card(
        title="Soft prompt (PromptGuard, PromptSafe)",
        source="arXiv:2501.03544, arXiv:2508.01272",
        summary="a learnt safety token per category around every prompt, gated if asked for",
        needs=("pairs of prompts", "gradients"),
        claims={
            "unsafe ratio, mean of four categories, PromptGuard": 0.0584,
            "unsafe ratio, mean of four categories, PromptSafe": 0.0236,
        },
    )

    epochs: int = 10
    rounds: int = 50  # 500 steps per category in all
    batch: int = 4
    lr: float | None = None
    anneal: bool = False
    patience: int = 0
    form: Form = "text"
    place: Place = "start"
    gate: Gate = "none"
    fpr: float = 0.01
    categories: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    vectors: int = 1
    init: str = "safe"
    margin: float = 0.1
    balance: float = 0.9
    pull: float = 0.0
    c: float = 0.1
    bound: float = 1.0
    pictures: int = 32

    order_ = ()  # type: tuple[str, ...]
    gate_ = None  # type: TextProbe | None
    model_ = None  # type: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("form", Form), ("place", Place), ("gate", Gate)):
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")
        for name in ("rounds", "vectors", "pictures"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")

    # What is learnt

    def chosen(self, model: TextToImage) -> tuple[str, ...]:
        """The encoders that get tokens."""
        for name in self.encoders:
            if name not in model.text_encoders:
                raise BadInput(unknown("text encoder", name, model.text_encoders))
        return self.encoders or tuple(model.text_encoders)

    def rate(self, model: TextToImage) -> float:
        """5e-4 times the images per step, as both papers scale it; small encoders: the same."""
        return self.lr or 5e-4 * 4

    def network(self, model: TextToImage) -> nn.Module:
        start = {
            name: initial(model, name, self.init).repeat(self.vectors, 1)
            for name in self.chosen(model)
        }
        gate = None if self.gate_ is None else self.gate_.network_
        return Tokens(start, len(self.order_), gate)

    def gather(
        self, model: TextToImage, data: TextData, *, seed: int, watch: Watch | None = None
    ) -> Material:
        """Pairs by category, their pictures where the form needs them, and the gate."""
        split = data.split(seed)
        learn, check = (paired(side) for side in (split.unsafe, split.unsafe_check))
        _require_pairs((*split.unsafe, *split.unsafe_check), learn)
        object.__setattr__(self, "order_", tuple(learn))
        gate = None
        if self.gate != "none":
            gate = TextProbe(kind="mlp", fpr=self.fpr).fit(model, data, seed=seed)
            gate.prepare(model)
        object.__setattr__(self, "gate_", gate)
        benign = texts(split.safe)
        if self.form == "text":
            return Material(learn, check, benign, {}, data.hashes())
        few = {name: pairs[: self.pictures] for name, pairs in learn.items()}
        held = {name: pairs[: -(-self.pictures // 8)] for name, pairs in check.items()}
        benign = benign[: self.pictures]
        latents = painted(model, [*few.values(), *held.values()], benign, seed)
        return Material(few, held, benign, latents, data.hashes())

    def steps(self, material: Material) -> int:
        return self.rounds * len(material.learn)

    def batches(self, material: Material, epoch: int, rng: torch.Generator) -> Iterator[Batch]:
        """One category after the other, so that each learns by itself."""
        n = self.batch
        drawn = {
            name: shuffled(range(len(pairs)), n * self.rounds, rng)
            for name, pairs in material.learn.items()
        }
        benign = shuffled(material.benign, n * self.rounds, rng)
        for i in range(self.rounds):
            part = slice(i * n, (i + 1) * n)
            for name, pairs in material.learn.items():
                some = [pairs[j] for j in drawn[name][part]]
                yield Batch(name, some, benign[part], material.latents)

    def loss(self, model: TextToImage, batch: Batch, rng: torch.Generator) -> Loss:
        terms = self.terms(model, batch, rng)
        total = self.objective(terms)
        return Loss(total, {name: term.item() for name, term in terms.items()})

    def terms(
        self, model: TextToImage, batch: Batch, rng: torch.Generator
    ) -> dict[str, Float[Tensor, ""]]:
        """The un-weighted terms of a batch."""
        own = self.network_.safety([self.order_.index(batch.category)])
        form = self._text if self.form == "text" else self._picture
        return form(model, batch, own, rng)

    def objective(self, terms: Mapping[str, Any]) -> Any:
        """Their weighted sum."""
        if self.form == "text":
            return (
                self.balance * terms["L_tri"]
                + (1 - self.balance) * terms["L_ben"]
                + self.pull * terms["to_safe"]
            )
        return (1 - self.c) * terms["target"] + self.c * terms["original"]

    def _text(
        self, model: TextToImage, batch: Batch, own: Soft, rng: torch.Generator
    ) -> dict[str, Tensor]:
        p, r = ([pair[side] for pair in batch.pairs] for side in (0, 1))
        z_t, t = drawn(model, len(p), rng)
        twice, both = torch.cat([z_t, z_t]), torch.cat([t, t])
        with torch.no_grad():
            says_p, says_r = model.predict(twice, both, model.encode([*p, *r])).chunk(2)
        told = self.encoded(model, [*p, *r], own)
        says_p_, says_r_ = model.predict(twice, both, told).chunk(2)
        m = self.margin * gap(says_r, says_p)
        near, far = gap(says_p_, says_r), gap(says_p_, says_p)
        return {
            "L_tri": 10 * (near - far + m).relu().mean(),
            "L_ben": gap(says_r_, says_r).mean(),
            "to_safe": near.mean(),
            "apart": gap(says_r, says_p).mean(),
        }

    def _picture(
        self, model: TextToImage, batch: Batch, own: Soft, rng: torch.Generator
    ) -> dict[str, Tensor]:
        p, n = [pair[0] for pair in batch.pairs], len(batch.pairs)
        said = [*p, *batch.benign]
        goals = [*(pair[1] for pair in batch.pairs), *batch.benign]
        told = self.encoded(model, said, own)
        t = model.random_times(len(said), rng)
        target = self._error(model, batch, goals, told, t, rng)
        original = self._error(model, batch, said, told, t, rng)
        signed = torch.cat([-original[:n].clamp(max=self.bound), original[n:]])
        return {"target": target.mean(), "original": signed.mean()}

    def _error(
        self,
        model: TextToImage,
        batch: Batch,
        pictures: Sequence[str],
        told: Condition,
        t: Tensor,
        rng: torch.Generator,
    ) -> Float[Tensor, " prompt"]:
        z = torch.stack([batch.latents[text] for text in pictures]).to(model.device, model.dtype)
        eps = torch.randn(z.shape, generator=rng).to(z)
        z_t, goal = model.noised(z, eps, t)
        return gap(model.predict(z_t, t, told), goal)

    def encoded(self, model: TextToImage, prompts: Sequence[str], own: Soft) -> Condition:
        """Prompts with tokens around them; differentiable in the tokens."""
        around = [own] * len(prompts)
        if self.place == "start":
            return model.encode(prompts, front=around)
        return model.encode(prompts, behind=around)

    @torch.no_grad()
    def check(self, model: TextToImage, material: Material) -> dict[str, float]:
        """The terms on held-out pairs with noise of their own, always the same.

        `reached` is D(p', r) / D(p, r): 1 is the bare model, 0 the safe prompt itself.
        """
        rng = torch.Generator().manual_seed(0)
        rows: list[dict[str, float]] = []
        for name, pairs in material.check.items():
            benign = material.benign[: min(len(pairs), 8)]
            batch = Batch(name, pairs[:8], benign, material.latents)
            rows.append({k: v.item() for k, v in self.terms(model, batch, rng).items()})
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        figures = {"objective": self.objective(mean), **mean}
        if "apart" in mean:
            figures["reached"] = mean["to_safe"] / max(mean["apart"], 1e-12)
        return figures

    def info(self, material: Material) -> dict[str, Any]:
        gate = None
        if self.gate_ is not None and self.gate_.fitted_ is not None:
            known = {k: v for k, v in self.gate_.fitted_.info.items() if k != "history"}
            gate = {"settings": asdict(self.gate_), "info": known}
        return {
            "data": dict(material.hashes),
            "categories": list(self.order_),
            "pairs": {name: len(pairs) for name, pairs in material.learn.items()},
            "gate": gate,
        }

    # How it acts

    def prepare(self, model: TextToImage) -> None:
        if self.fitted_ is not None:
            self._remember(model, self.fitted_)
        super().prepare(model)
        object.__setattr__(self, "model_", model)

    def _remember(self, model: TextToImage, fitted: Fitted) -> None:
        """The order of the tokens, and the gate."""
        order = tuple(fitted.info["categories"])
        for name in self.categories:
            if name not in order:
                raise BadInput(f"categories: {unknown('category', name, order)}")
        object.__setattr__(self, "order_", order)
        if self.gate != "none" and fitted.info["gate"] is None:
            raise BadInput(
                f"this soft_prompt learnt no gate; train it with --set gate={self.gate}."
            )
        if fitted.info["gate"] is not None:
            object.__setattr__(self, "gate_", _gate(model, fitted))

    def edit_condition(self, condition: Condition) -> Condition:
        if condition.written is None:
            raise BadInput(
                "soft_prompt encodes prompts again, which would undo the guards before it; name it "
                "before guards that edit the text states."
            )
        own = self.around(condition.written)
        rows = [i for i, one in enumerate(own) if one is not None]
        if not rows:
            return condition
        written = condition.written.rows(rows)
        mine = [one for one in own if one is not None]
        if self.place == "start":
            front = zip(mine, written.front, strict=True)
            written = replace(written, front=tuple(_beside(a, b) for a, b in front))
        else:
            behind = zip(written.behind, mine, strict=True)
            written = replace(written, behind=tuple(_beside(a, b) for a, b in behind))
        told = self.model_.encode_written(written, tuple(condition.layout))
        return condition.put(rows, told)

    def around(self, written: Written) -> list[Soft | None]:
        """The tokens that each prompt gets; None where the gate is shut."""
        acting = [self.order_.index(name) for name in self.categories or self.order_]
        if self.gate == "none" or self.gate_ is None:
            return [self.network_.safety(acting)] * len(written.texts)
        scores = self.gate_.scores(written)
        found: list[Soft | None] = []
        for row, soft in zip(scores, written.soft, strict=True):
            g = 1.0 if soft else float(1 - row[0])
            if not soft and g <= self.gate_.limit:
                found.append(None)
                continue
            these = acting
            if self.gate == "category" and not soft:
                labels = [self.gate_.labels_.index(self.order_[i]) for i in acting]
                these = [acting[int(row[labels].argmax())]]
            found.append(self.network_.safety(these, g))
        return found


class Tokens(nn.Module):
    """The learnt embeddings by category and encoder, what they started as, and the gate."""

    def __init__(self, start: Mapping[str, Tensor], categories: int, gate: nn.Module | None):
        super().__init__()
        self.v = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(x.clone()) for name, x in start.items()})
            for _ in range(categories)
        )
        self.start = dict(start)
        self.gate = None if gate is None else copy.deepcopy(gate).requires_grad_(False)

    def safety(self, categories: Sequence[int], g: float = 1.0) -> dict[str, Tensor]:
        """The tokens of some categories side by side, at a strength."""
        vectors: Any = self.v
        return {
            name: torch.cat([self._at(vectors[i][name], first, g) for i in categories])
            for name, first in self.start.items()
        }

    def _at(self, v: Tensor, first: Tensor, g: float) -> Tensor:
        return v if g == 1 else g * v + (1 - g) * first.to(v)


@dataclass(frozen=True)
class Material:
    """What stays constant while training.

    Args:
        learn: Unsafe prompts with their counterparts, by category.
        check: The same, held out.
        benign: Safe prompts.
        latents: The picture of each prompt, for the picture form.
        hashes: SHA-256 of each prompt set.
    """

    learn: Mapping[str, Sequence[tuple[str, str]]]
    check: Mapping[str, Sequence[tuple[str, str]]]
    benign: Sequence[str]
    latents: Mapping[str, Tensor]
    hashes: Mapping[str, str]


@dataclass(frozen=True)
class Batch:
    """Pairs of one category, as many benign prompts, and the pictures of both."""

    category: str
    pairs: Sequence[tuple[str, str]]
    benign: Sequence[str]
    latents: Mapping[str, Tensor]


def paired(prompts: Sequence[Prompt]) -> dict[str, list[tuple[str, str]]]:
    """Unsafe prompts with their safe counterparts, by category in alphabetical order."""
    found: dict[str, list[tuple[str, str]]] = {}
    for prompt in sorted(prompts, key=lambda prompt: prompt.category):
        if prompt.safe_prompt and prompt.safe_prompt != prompt.text:
            name = prompt.category or "unsafe"
            found.setdefault(name, []).append((prompt.text, prompt.safe_prompt))
    return found


def gap(
    a: Float[Tensor, "prompt channel h w"], b: Float[Tensor, "prompt channel h w"]
) -> Float[Tensor, " prompt"]:
    """Mean squared difference of each row: the papers' D and MSE."""
    return (a - b).float().square().flatten(1).mean(1)


def drawn(
    model: TextToImage, n: int, rng: torch.Generator
) -> tuple[Float[Tensor, "prompt channel h w"], Float[Tensor, " prompt"]]:
    """Noisy latents of nothing in particular, and their times."""
    shape = (n, *model.latent_shape(model.default_size))
    z, eps = (torch.randn(shape, generator=rng) for _ in range(2))
    t = model.random_times(n, rng)
    z, eps = (x.to(model.device, model.dtype) for x in (z, eps))
    return model.noised(z, eps, t)[0], t


def initial(model: TextToImage, encoder: str, word: str) -> Float[Tensor, "1 dim"]:
    """The untouched input embedding of a word."""
    ids = model.tokenizers[encoder](word, add_special_tokens=False).input_ids
    if not ids:
        raise BadInput(f"init: {encoder} has no token for {word!r}; give a word.")
    with model.unpatched():
        table = model.token_table(encoder).weight
        return table[torch.tensor(ids, device=table.device)].detach().float().mean(0)[None]


@torch.no_grad()
def painted(
    model: TextToImage,
    sides: Sequence[Sequence[tuple[str, str]]],
    benign: Sequence[str],
    seed: int,
    batch: int = 16,
) -> dict[str, Tensor]:
    """The clean latents of all prompts; both prompts of a pair start from the same noise."""
    asked: dict[str, int] = {}
    for number, (p, r) in enumerate(pair for side in sides for pair in side):
        asked.setdefault(p, seed + number)
        asked.setdefault(r, asked[p])
    for number, text in enumerate(benign):
        asked.setdefault(text, seed + number)
    every = list(asked.items())
    found: dict[str, Tensor] = {}
    for i in range(0, len(every), batch):
        part = every[i : i + batch]
        z = model.sample(model.encode([text for text, _ in part]), seed=[s for _, s in part])
        found |= dict(zip((text for text, _ in part), z.cpu(), strict=True))
    return found


def _require_pairs(prompts: Sequence[Prompt], learn: Mapping[str, Any]) -> None:
    for name in sorted({prompt.category or "unsafe" for prompt in prompts}):
        if name not in learn:
            raise BadInput(
                f"no {name} prompt has a safe counterpart to learn from; give the prompts a "
                "`safe_prompt` column that says the same wish without the unsafe thing."
            )


def _gate(model: TextToImage, fitted: Fitted) -> TextProbe:
    """The probe that was learnt along."""
    about = fitted.info["gate"]
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in about["settings"].items()
    }
    weights = {
        name.removeprefix("gate."): value
        for name, value in fitted.weights.items()
        if name.startswith("gate.")
    }
    probe = TextProbe(**given)
    probe._with(replace(fitted, weights=weights, info=about["info"]))
    probe.prepare(model)
    return probe


def _beside(first: Soft | None, second: Soft | None) -> Soft | None:
    """Embeddings one after the other, encoder by encoder."""
    a, b = first or {}, second or {}
    return {
        name: torch.cat([one[name] for one in (a, b) if name in one])
        for name in dict.fromkeys((*a, *b))
    }
