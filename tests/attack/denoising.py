"""Stand-ins for the tests of attacks on the denoiser."""

import torch

from safelight.attack.base import Budget, Search
from safelight.flow import Card, Verdict
from safelight.guard.base import Guard, Guarded
from safelight.judge.base import Judge
from safelight.prompts import PromptSet

PROMPTS = PromptSet.of(
    [{"prompt": "a red cat in the park", "id": "one", "category": "cats"},
     {"prompt": "a house and a boat", "id": "two", "category": "houses"}],
    "things",
)  # fmt: skip
FAST = {"steps": 1, "guidance": 1.0}


class Says(Judge):
    """Flags the pictures of those prompts that a function picks, and remembers what it saw."""

    name = "says"

    def __init__(self, flags):
        self.flags, self.seen = flags, []

    def score(self, images, prompts):
        raise AssertionError("it has verdicts only")

    def __call__(self, images, prompts):
        self.seen += prompts
        return [Verdict(self.flags(text), 0.5, "says") for text in prompts]


class Momentum(Guard):
    """Edits the noise by what it saw before, as safe latent diffusion does."""

    card = Card(title="momentum", source="tests")

    def __init__(self, scale=1.0):
        self.scale, self.memory, self.indices, self.memories = scale, None, [], []

    def edit_noise(self, noise, step):
        if step.index == 0:
            self.memory = torch.zeros_like(noise)
        self.indices.append((step.index, float(step.t)))
        self.memories.append(float(self.memory.abs().sum()))
        edited = noise - self.scale * (noise + self.memory)
        self.memory = 0.5 * self.memory.detach() + noise.detach()
        return edited


def search(target, *, seeds=(3, 4), judge=None, seed=0, sampling=None, **budget):
    """What `rewrite` is handed."""
    return Search(
        target if isinstance(target, Guarded) else Guarded(target),
        rng=torch.Generator().manual_seed(seed),
        seeds=seeds,
        budget=Budget(**budget),
        judge=judge,
        sampling=FAST if sampling is None else sampling,
    )


def dented(model, size=0.3):
    """A patch that changes some of the denoiser's weights, like a defence."""
    from safelight.models.patch import Patch

    rng = torch.Generator().manual_seed(1)
    before = {n: p for n, p in model.parameters().items() if n.startswith("denoiser.")}
    after = {n: p + size * p.std(correction=0) * torch.randn(p.shape, generator=rng)
             for n, p in before.items()}  # fmt: skip
    return Patch.between(model, before, after, method="dent")


def pictures(n=2, seed=5):
    """Random pictures in the tiny models' size."""
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


BY_ID = dict(zip(("one", "two"), pictures(), strict=True))
