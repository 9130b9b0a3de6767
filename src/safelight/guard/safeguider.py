"""SafeGuider: recognise unsafe prompts at the end mark, and delete words until none is left.

With `e(p)` the untouched text encoder's state at the end mark of the prompt `p`:

    P(safe | p) = softmax(MLP(e(p)))[safe],   MLP: d -> 1024 -> 512 -> 2, ReLU, dropout 0.5

A prompt with P(safe) above one half passes as it is, to the bit. Any other is edited:

1. g_i = P(safe | p without word i) - P(safe | p); the words are sorted by g.
2. Beam search: each of the `width` candidates loses one more word, in that order. A candidate is
   accepted if P(safe) >= `safe` and cos(e(candidate), e(p)) >= `near`; if none is, the `width`
   safest go on, to a depth of min(`depth`, words - 1).
3. The first depth with an accepted candidate ends it; the safest of those is what is painted.

Source: Qi et al., "SafeGuider", ACM CCS 2025, arXiv:2510.05173, and its code (MIT). Needs two lists
of prompts, no gradients of the model, no pictures.

Ours differs:
- *It fails closed.* Where nothing is accepted the code paints the safest candidate with
  cos >= `near`, else the prompt as it was; so do we with `fallback = "original"`. By default the
  prompt is refused (in the condition: it reads as ""). Deleting nothing is never an answer then.
- Every prompt of a batch is decided by itself. All encoders of a family are read, one after the
  other in one vector; the cosine is the mean over them. Vectors are standardised first.
- Candidates of one depth are encoded together. Decisions never depend on patches, the edited
  prompt is then read by the encoders as they are, patches included.
- *Below the words.* Learnt embeddings are read like words, and the placeholder they stand at may be
  deleted like one. Where an attack searches words by gradients (a lone `<*>`, `Written.soft`), each
  word keeps its embeddings, so gradients reach those that stay; which ones stay is decided as for
  words and has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from safelight.errors import BadInput, unknown
from safelight.flow import Card, Condition, Verdict, Written
from safelight.guard.recogniser import Recogniser, read_vector
from safelight.guard.wording import Wish, joined, wished
from safelight.models.base import TextToImage
from safelight.models.soft import Soft, without

Fallback = Literal["refuse", "original"]
REMEMBERED = 4096  # prompts whose decision is kept


@dataclass(frozen=True, kw_only=True)
class SafeGuider(Recogniser):
    """Paint unsafe prompts without the words that make them so.

    Args:
        safe: P(safe) that an edited prompt must reach.
        near: Cosine to the asked prompt that it must keep.
        width: Candidates that are kept at each depth.
        depth: Words that are deleted at most.
        fallback: What happens where no edit is good enough: "refuse", or paint the safest, else the
            "original" prompt, as the authors' code does.
        momentum: Of the training.
        calibrated: Whether the recogniser flags above its calibrated threshold instead of one half.
    """

    card: ClassVar[Card] = Card(
        title="SafeGuider",
        source="arXiv:2510.05173",
        summary="deletes words from a prompt until its end mark's embedding looks safe",
        needs=("prompts",),
        claims={"attack success over all attacks, SD 1.4, at most": 0.0548},
    )

    epochs: int = 50
    batch: int = 32
    lr: float | None = 1e-3
    anneal: bool = False
    patience: int = 0
    dropout: float = 0.5
    counterparts: bool = False
    safe: float = 0.95
    near: float = 0.1
    width: int = 6
    depth: int = 25
    fallback: Fallback = "refuse"
    momentum: float = 0.9
    calibrated: bool = False

    known_ = None  # type: dict[str, Decision] | None
    widths_: ClassVar[Any] = ()  # of the encoders' vectors

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fallback not in get_args(Fallback):
            raise BadInput(f"fallback: {unknown('choice', self.fallback, get_args(Fallback))}")
        for name in ("width", "depth"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}.")

    # The recogniser

    def hidden_widths(self) -> tuple[int, ...]:
        return 1024, 512

    def classes(self, labels: tuple[str, ...]) -> tuple[str, ...]:
        return "safe", "unsafe"

    def optimiser(self, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum, weight_decay=self.decay)

    @property
    def limit(self) -> float:
        """Prompts whose P(unsafe) is above it are edited; one half is the paper's argmax."""
        return super().limit if self.calibrated or self.threshold is not None else 0.5

    def prepare(self, model: TextToImage) -> None:
        super().prepare(model)
        seen = model.encode([""])
        each = [read_vector(model, seen, name, self.which) for name in self.chosen(model)]
        object.__setattr__(self, "widths_", [x.shape[1] for x in each])
        object.__setattr__(self, "known_", {})

    # The guard

    def screen_learnt(
        self, prompts: Sequence[str], soft: Sequence[Soft | None]
    ) -> Sequence[Verdict]:
        none = (None,) * len(prompts)
        written = Written(tuple(prompts), tuple(soft), none, none)
        words = [without(text) if own else text for text, own in zip(prompts, soft, strict=True)]
        return [one.verdict for one in self.decide(written, words)]

    def edit_condition(self, condition: Condition) -> Condition:
        if condition.written is None:
            raise BadInput(
                "safeguider encodes prompts again, which would undo the guards before it; name it "
                "before guards that edit the text states."
            )
        written, words = condition.written, condition.prompts
        decisions = self.decide(written, words)
        edits = {i: one.deleted for i, one in enumerate(decisions) if one.deleted}
        if not edits:
            return condition
        wishes = {i: wished(self.model_, written.rows([i]), words[i]) for i in edits}
        new = joined([wishes[i].keeping(deleted) for i, deleted in edits.items()])
        return condition.put(list(edits), self.model_.encode_written(new, tuple(condition.layout)))

    @torch.no_grad()
    def decide(self, written: Written, words: Sequence[str]) -> list[Decision]:
        """What becomes of each prompt.

        Args:
            written: The prompts as the encoders are given them.
            words: The same without learnt embeddings, or the words that those stand for.
        """
        rows = [written.rows([i]) for i in range(len(written.texts))]
        known = [self._known(row) for row in rows]
        new = [i for i, decision in enumerate(known) if decision is None]
        if new:
            x = self.vectors(self.model_, written.rows(new))
            safety = self._safety(x)
            for i, here, p in zip(new, x, safety.tolist(), strict=True):
                known[i] = self._decide(rows[i], words[i], here, p)
                self._remember(rows[i], known[i])
        return [decision for decision in known if decision is not None]

    def _decide(
        self, row: Written, words: str, x: Float[Tensor, " dim"], safety: float
    ) -> Decision:
        unsafe = 1 - safety
        if unsafe <= self.limit:
            return Decision(Verdict(False, unsafe, "safeguider"))
        wish = wished(self.model_, row, words)
        best = self.search(wish, x, safety)
        if best is not None:
            why = f"reads {wish.said(best)!r} instead"
            return Decision(Verdict(False, unsafe, "safeguider", why), best)
        if self.fallback == "original":
            return Decision(Verdict(False, unsafe, "safeguider", "no safe wording found"))
        why = "no wording without its unsafe words is near enough and safe enough"
        everything = frozenset(range(max(1, len(wish.words))))
        return Decision(Verdict(True, unsafe, "safeguider", why), everything)

    def search(self, wish: Wish, x: Float[Tensor, " dim"], safety: float) -> frozenset[int] | None:
        """The words to delete; None if no deletion is good enough."""
        n = len(wish.words)
        tried: dict[frozenset[int], tuple[float, float]] = {}

        def look(candidates: Iterable[frozenset[int]]) -> None:
            new = [c for c in dict.fromkeys(candidates) if c not in tried]
            if new:
                there = self.vectors(self.model_, joined([wish.keeping(c) for c in new]))
                pairs = zip(self._safety(there).tolist(), self._nearness(there, x), strict=True)
                tried.update(zip(new, pairs, strict=True))

        alone = [frozenset({i}) for i in range(n)] if n > 1 else []
        look(alone)
        order = sorted(range(len(alone)), key=lambda i: safety - tried[alone[i]][0])
        beam = [frozenset[int]()]
        for _ in range(min(self.depth, n - 1)):
            candidates = list(dict.fromkeys(b | {i} for b in beam for i in order if i not in b))
            look(candidates)
            good = [c for c in candidates if tried[c][0] >= self.safe and tried[c][1] >= self.near]
            if good:
                return max(good, key=lambda c: tried[c][0])
            beam = sorted(candidates, key=lambda c: -tried[c][0])[: self.width]
        close = [c for c in tried if tried[c][1] >= self.near]
        if self.fallback == "original" and close:
            return max(close, key=lambda c: tried[c][0])
        return None

    def _safety(self, x: Float[Tensor, "prompt dim"]) -> Float[Tensor, " prompt"]:
        return self.judged(self.network_, x)[:, 0].cpu()

    def _nearness(self, x: Float[Tensor, "prompt dim"], to: Float[Tensor, " dim"]) -> list[float]:
        """The cosine to one vector, in the mean over the encoders."""
        pairs = zip(x.split(self.widths_, 1), to.split(self.widths_), strict=True)
        each = [F.cosine_similarity(a, b[None], dim=1) for a, b in pairs]
        return torch.stack(each).mean(0).tolist()

    def _known(self, row: Written) -> Decision | None:
        assert self.known_ is not None
        return self.known_.get(row.texts[0]) if _words_only(row) else None

    def _remember(self, row: Written, decision: Decision | None) -> None:
        assert self.known_ is not None
        if _words_only(row) and decision is not None:
            if len(self.known_) >= REMEMBERED:
                self.known_.clear()
            self.known_[row.texts[0]] = decision


@dataclass(frozen=True)
class Decision:
    """What becomes of a prompt.

    Args:
        verdict: What is said about it.
        deleted: Which of its words are not painted; none if it stays as it is.
    """

    verdict: Verdict
    deleted: frozenset[int] = frozenset()


def _words_only(row: Written) -> bool:
    return not (row.soft[0] or row.front[0] or row.behind[0])
