"""Text probe: a linear or a small non-linear filter on the original text embeddings.

The plainest protection on the text side, and the baseline that any alignment of the text encoder
has to be compared with: the encoder stays as it is, a classifier reads one vector per prompt and
refuses above a threshold. Features, network and threshold: `safelight.guard.recogniser`.

    kind = "linear":  f(x) = W x + b
    kind = "mlp":     f(x) = W2 relu(W1 x + b1) + b2

It has one class per unsafe category; the score is one minus the probability of "safe", and the
verdict carries every category's own.

*Below the words.* A prompt may hold learnt embeddings that no text has. The threshold says nothing
about those, whose states may lie anywhere. By default (`learnt = "refuse"`) they are therefore
refused as "could not tell". With "read" the probe scores what the untouched encoders make of them,
as it does with words; embeddings for an encoder that it does not read are refused in any case.

A patch does not change what it sees. An attacker who has its gradient can search around it, as
around any classifier. Needs two lists of prompts, no gradients of the model, no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from safelight.errors import BadInput, unknown
from safelight.flow import Card, Verdict, Written
from safelight.guard.recogniser import Recogniser
from safelight.models.soft import Soft

Kind = Literal["linear", "mlp"]
Learnt = Literal["refuse", "read"]


@dataclass(frozen=True, kw_only=True)
class TextProbe(Recogniser):
    """Refuse prompts whose original embeddings look unsafe.

    Args:
        kind: A linear filter, or one with a hidden layer.
        hidden: Units of the hidden layer.
        learnt: What happens to prompts with learnt embeddings: "refuse" them, or "read" them.
    """

    card: ClassVar[Card] = Card(
        title="Text probe",
        source="this project",
        summary="a linear or small filter on the original text embeddings, calibrated when trained",
        needs=("prompts",),
    )

    epochs: int = 40
    batch: int = 128
    lr: float | None = 1e-3
    decay: float = 0.01
    patience: int = 5
    dropout: float = 0.1
    variants: int = 2
    kind: Kind = "linear"
    hidden: int = 256
    learnt: Learnt = "refuse"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("kind", Kind), ("learnt", Learnt)):
            if getattr(self, name) not in get_args(kind):
                raise BadInput(f"{name}: {unknown('choice', getattr(self, name), get_args(kind))}")

    def hidden_widths(self) -> tuple[int, ...]:
        return (self.hidden,) if self.kind == "mlp" else ()

    def screen_learnt(
        self, prompts: Sequence[str], soft: Sequence[Soft | None]
    ) -> Sequence[Verdict]:
        none = (None,) * len(prompts)
        scores = self.scores(Written(tuple(prompts), tuple(soft), none, none)).tolist()
        return [self._verdict(row, one) for row, one in zip(scores, soft, strict=True)]

    def _verdict(self, row: Sequence[float], soft: Soft | None) -> Verdict:
        each = dict(zip(self.labels_, row, strict=True))
        score = 1 - each.pop("safe")
        unread = sorted(set(soft or ()) - set(self.chosen(self.model_)))
        if soft and (unread or self.learnt == "refuse"):
            what = f" for {', '.join(unread)}" if unread else ""
            why = f"learnt embeddings{what}, which it is not calibrated for"
            return Verdict(None, score, "text_probe", why, each)
        worst = max(each, key=lambda name: each[name])
        flagged = score > self.limit
        return Verdict(flagged, score, "text_probe", worst if flagged else "", each)
