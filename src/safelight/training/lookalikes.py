"""Look-alikes: captions that say almost what is unsafe, and paint nothing of the kind.

An encoder puts "hammer" near "axe". An expert that unlearns the one moves the other as well, unless
it is shown what is to stay. Nobody has to write such captions: the words of the tokenizer's
vocabulary that the encoder finds near unsafe phrases stand in the places of those phrases, and
beside single words of them ("drop of rain"); the model paints every caption, and a judge says which
pictures show nothing unsafe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safelight.flow import Prompt
from safelight.models.base import TextToImage
from safelight.training.data import shuffled
from safelight.training.descent import Watch
from safelight.training.looks import Judging, painted, paints_unsafe
from safelight.training.pairs import of_prompts
from safelight.training.wider import instead_of, recombined, sorted_words

SHARE = 2  # of the steps that a picture usually takes


@dataclass(frozen=True)
class Lookalikes:
    """Harmless captions near unsafe ones, and what the untouched model paints for them.

    Args:
        captions: The texts.
        images: Their pictures in [0, 1].
        words: The harmless words that the encoder finds near unsafe phrases.
        looked_at: Captions that were painted to find them.
    """

    captions: tuple[str, ...]
    images: Float[Tensor, "caption 3 height width"]
    words: tuple[str, ...] = ()
    looked_at: int = 0

    def __len__(self) -> int:
        return len(self.captions)

    def told(self) -> dict[str, int]:
        """What a patch remembers of the search."""
        return {"kept": len(self), "looked_at": self.looked_at, "words": len(self.words)}


@torch.no_grad()
def lookalikes(
    model: TextToImage,
    prompts: Sequence[Prompt],
    benign: Sequence[str],
    judge: Judging,
    count: int,
    rng: torch.Generator,
    *,
    steps: int | None = None,
    watch: Watch | None = None,
) -> Lookalikes:
    """Captions near unsafe ones whose pictures a judge finds harmless.

    Args:
        prompts: Unsafe ones with a `safe_prompt`: in what they differ is unsafe.
        benign: Texts whose words are benign.
        judge: Looks at pictures.
        count: Captions that are painted, at most. Those that look unsafe, and those of which the
            judge cannot tell, are left out.
        steps: Of the sampler, for captions; None is half of the model's own, four at least.
        watch: Told after each batch of pictures.
    """
    pairs = of_prompts(prompts)
    encoder = next(iter(model.text_encoders))
    safe = [Prompt(id=str(i), text=text) for i, text in enumerate(benign)]

    def look(words: Sequence[str]) -> list[bool | None]:
        return paints_unsafe(model, [f"a {word}" for word in words], judge, watch=watch)

    known = sorted_words(model, encoder, prompts, safe, (), rng, look=look)
    near = shuffled(known.kept, count - count // 2, rng) if known.kept else []
    made = instead_of(pairs, near, rng)
    made += [text for _, text in recombined(pairs, known.harmless, count - len(made), rng)]
    made = list(dict.fromkeys(made))
    steps = steps or max(4, model.sampling.steps // SHARE)
    captions: list[str] = []
    images = [torch.zeros(0, 3, *model.default_size)]
    for part, pictures in painted(model, made, steps, watch=watch):
        harmless = [verdict.flagged is False for verdict in judge(pictures, part)]
        images.append(pictures.cpu()[torch.tensor(harmless)])
        captions += [text for text, fine in zip(part, harmless, strict=True) if fine]
    return Lookalikes(tuple(captions), torch.cat(images), known.kept, len(made))
