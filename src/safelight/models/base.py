"""The model handle: what every family of text-to-image models can be asked, in the same words.

A family's file says which diffusers parts it has, how its encoders are read and how its denoiser is
called; all else is here. Parameters have one name each, wherever they are used:
`<module>.<parameter>`, with the module one of the encoders (`clip_l`, `clip_g`, `t5`), `denoiser`
or `vae`, and the parameter as transformers 5 spells it (without the `text_model.` of version 4).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safelight.errors import BadInput, Unsupported
from safelight.flow import Condition, Outcome, Span, Written
from safelight.models import sampling
from safelight.models.soft import Soft, standing, without, write
from safelight.models.weights import Weights
from safelight.models.weights import plain as plain  # part of how parameters are named

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How a model paints unless it is told otherwise.

    Args:
        steps: Denoiser steps per picture.
        guidance: Classifier-free guidance scale; 1 is none.
        size: Height and width in pixels.
    """

    steps: int
    guidance: float
    size: tuple[int, int]


@dataclass(frozen=True)
class Read:
    """What one encoder said: token states, a pooled vector, or both."""

    states: Float[Tensor, "batch token dim"] | None = None
    pooled: Float[Tensor, "batch pooled"] | None = None


@runtime_checkable
class Change(Protocol):
    """Whatever knows which tensors to put in place of a model's own; a `Patch` does."""

    def applied(
        self, model: TextToImage, *, scale: float = 1.0, force: bool = False
    ) -> Mapping[str, Tensor]:
        """The new tensors by parameter name."""


NAMED = 4  # prompts that are named when they are too long


class TextToImage(ABC):
    """A text-to-image model of any family.

    All modules are put into evaluation mode and frozen; who trains turns on the gradients of what
    is trained.

    Args:
        denoiser: The U-Net or transformer.
        vae: The autoencoder.
        text_encoders: By our names, in the family's order.
        tokenizers: One per encoder, same names.
        scheduler: A diffusers scheduler; it is never changed, each run works on a copy.
        name: How the model is called in runs and reports.
        sampling: Defaults for painting; the family's own where None.
        t5_tokens: How many tokens the T5 encoder reads, where there is one.
        config: Settings of the diffusers pipeline itself.
    """

    family: ClassVar[str]
    pipeline: ClassVar[str]  # the diffusers class
    parts: ClassVar[Mapping[str, str]]  # our name -> the pipeline's name of that module
    defaults: ClassVar[tuple[int, float]]  # steps, guidance
    patch_size: ClassVar[int] = 1  # latents' height and width must be multiples of it
    clip_tokens: ClassVar[int] = 77

    def __init__(
        self,
        *,
        denoiser: Any,
        vae: Any,
        text_encoders: Mapping[str, Any],
        tokenizers: Mapping[str, Any],
        scheduler: Any,
        name: str = "",
        sampling: Sampling | None = None,
        t5_tokens: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.vae = vae
        self.text_encoders = dict(text_encoders)
        self.tokenizers = dict(tokenizers)
        self.scheduler = scheduler
        self.name = name or self.family
        self.config = dict(config or {})
        for module in self.modules.values():
            module.eval().requires_grad_(False)
        self.tokens = {
            encoder: self._length(encoder, t5_tokens or self.t5_tokens)
            for encoder in self.text_encoders
        }
        self.layout: Mapping[str, Span] = MappingProxyType(self._layout())
        steps, guidance = self.defaults
        self.sampling = sampling or Sampling(steps, guidance, self._trained_size())
        self.weights = Weights(self.modules)
        self._cut: set[tuple[str, str]] = set()  # prompts that were said to be too long

    t5_tokens: ClassVar[int] = 256

    def __repr__(self) -> str:
        return f"<{self.name}: {self.family}, {self.dtype} on {self.device}>".replace("torch.", "")

    # What it is made of

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All networks by name: the encoders, `denoiser`, `vae`."""
        return {**self.text_encoders, "denoiser": self.denoiser, "vae": self.vae}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.sampling.size

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by its name; tied ones appear once, under their first name."""
        return self.weights.now()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every module's weights as they are now.

        Values are hashed as float32, so that float16 weights hash alike however they were loaded.
        """
        return self.weights.hashes()

    def cast(self, *, device: torch.device, dtype: torch.dtype) -> None:
        """Move all modules. `hashes` keeps naming the weights as they were before rounding."""
        self.weights.cast(device, dtype)

    # Text

    def encode(
        self,
        prompts: Sequence[str],
        encoders: Sequence[str] | None = None,
        soft: Sequence[Soft | None] | None = None,
        *,
        front: Sequence[Soft | None] | None = None,
        behind: Sequence[Soft | None] | None = None,
    ) -> Condition:
        """What the denoiser reads of each prompt; differentiable in the encoders' parameters.

        A prompt longer than an encoder reads is cut at its end, with a warning in the log, as
        diffusers does it.

        Args:
            prompts: Any number of texts; "" is allowed.
            encoders: Run only these; the others' places stay zero and out of the layout.
            soft: Per prompt None, or by encoder the embeddings that stand at every `<*>` of its
                text; differentiable in them. An encoder without any reads the text without `<*>`.
            front: Per prompt None, or by encoder embeddings that stand before the whole text.
            behind: The same behind it. A text that is too long is cut so that both still fit.

        Raises:
            BadInput: Not a sequence of texts, or embeddings that do not fit.
        """
        given = texts(prompts)
        none: tuple[Soft | None, ...] = (None,) * len(given)
        written = Written(given, *(tuple(none if x is None else x) for x in (soft, front, behind)))
        return self.encode_written(written, encoders)

    def encode_written(self, written: Written, encoders: Sequence[str] | None = None) -> Condition:
        """What the denoiser reads of prompts as `Condition.written` holds them; see `encode`."""
        chosen = self._chosen(encoders)
        tokens, reads = {}, {}
        for name in chosen:
            tokens[name], reads[name] = self._read(name, written)
        pairs = zip(written.texts, written.soft, strict=True)
        n = len(written.texts)
        return Condition(
            prompts=tuple(without(text) if own else text for text, own in pairs),
            states=self._joined(reads, n),
            pooled=self._joined_pooled(reads, n),
            layout={name: self.layout[name] for name in chosen},
            masks={name: mask for name, (_, mask) in tokens.items()},
            encoders=tuple(name for name in chosen if reads[name].states is not None),
            written=written,
        )

    def _read(self, encoder: str, written: Written) -> tuple[tuple[Tensor, Tensor], Read]:
        """Tokens and what the encoder says of them, embeddings in their places."""
        n = len(written.texts)
        soft, front, behind = (
            self._learnt(encoder, n, column)
            for column in (written.soft, written.front, written.behind)
        )
        plain = [
            without(text) if one else text
            for text, one in zip(written.texts, written.soft, strict=True)
        ]
        tokens = self.tokenize(encoder, plain)
        held = sorted({*soft, *front, *behind})
        if not held:
            return tokens, self.read(encoder, *tokens)
        ids, mask = (x.clone() for x in tokens)
        rows: list[Sequence[int]] = [()] * n
        values = []
        length = self.tokens[encoder]
        seen_before: dict[tuple[str, int, int, int], Any] = {}  # searches read one text many times
        for i in held:
            first, own, last = (len(part.get(i, ())) for part in (front, soft, behind))
            key = (written.texts[i] if own else plain[i], first, own, last)
            if key not in seen_before:
                seen_before[key] = write(
                    self.tokenizers[encoder], key[0], own, length, front=first, behind=last
                )
            seen = seen_before[key]
            ids[i] = torch.tensor(seen.ids, device=ids.device)
            mask[i] = (torch.arange(len(seen.ids), device=mask.device) < seen.content).to(mask)
            rows[i] = seen.at
            inside = len(seen.at) - first - last
            values += [front[i]] if first else []
            if own:  # at every placeholder, as far as the text was not cut
                values.append(soft[i].repeat(-(-inside // own), 1)[:inside])
            values += [behind[i]] if last else []
        with standing(self.token_table(encoder), rows, values):
            return (ids, mask), self.read(encoder, ids, mask)

    def _learnt(self, encoder: str, n: int, soft: Sequence[Soft | None]) -> dict[int, Tensor]:
        """One encoder's learnt embeddings by row, checked."""
        if len(soft) != n:
            raise BadInput(f"there are learnt embeddings for {len(soft)} prompts of {n}.")
        width = self.token_table(encoder).weight.shape[1]
        found = {}
        for i, one in enumerate(soft):
            for name in one or {}:
                if name not in self.text_encoders:
                    raise BadInput(
                        f"prompt {i} has embeddings for {name!r}; {self.name} has the encoders "
                        f"{', '.join(self.text_encoders)}."
                    )
            if one and encoder in one:
                value = one[encoder]
                if value.ndim != 2 or not len(value) or value.shape[1] != width:
                    raise BadInput(
                        f"embeddings of prompt {i} for {encoder} have the shape "
                        f"{tuple(value.shape)}; expected (tokens, {width})."
                    )
                found[i] = value.to(self.device, torch.float32)
        return found

    def token_table(self, encoder: str) -> nn.Embedding:
        """Where an encoder looks up its tokens; `weight` has one row per token id."""
        network = self.text_encoders[encoder]
        # T5's stack has a table of its own, which shares the weights of the one T5 names.
        stack = getattr(network, "encoder", None)
        return getattr(stack, "embed_tokens", None) or network.get_input_embeddings()

    def tokenize(
        self, encoder: str, prompts: Sequence[str]
    ) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
        """Token ids and mask (1 for content and its end mark), padded to the encoder's length."""
        length = self.tokens[encoder]
        tokenizer = self.tokenizers[encoder]
        seen = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = seen.input_ids, seen.attention_mask
        for i in (mask.sum(1) == length).nonzero().flatten().tolist():
            needed = len(tokenizer(prompts[i], verbose=False).input_ids)
            if needed > length:
                self._too_long(encoder, prompts[i], needed)
        return ids.to(self.device), mask.to(self.device)

    def _too_long(self, encoder: str, prompt: str, needed: int) -> None:
        """Say once per prompt that it is cut, and after a few that there are more."""
        if (encoder, prompt) in self._cut or len(self._cut) > NAMED:
            return
        self._cut.add((encoder, prompt))
        if len(self._cut) > NAMED:
            log.warning("more prompts are too long for %s; they are not named", encoder)
            return
        log.warning(
            "a prompt has %d tokens; %s reads %d, the rest is cut off: %.60r",
            *(needed, encoder, self.tokens[encoder], prompt),
        )

    def empty(self, n: int) -> Condition:
        """What guidance steers away from by default, for `n` pictures."""
        return self.encode([""] * n)

    def concepts(
        self, prompts: Sequence[str], encoder: str | None = None
    ) -> Float[Tensor, "concept dim"]:
        """The joined text state at the last content token of each prompt.

        The token before the end mark; for "" in CLIP that is the start mark, which sees nothing.

        Args:
            encoder: Whose token positions to read; the first that has token states if None.
        """
        seen = self.encode(prompts)
        encoder = encoder or seen.encoders[0]
        if encoder not in seen.encoders:
            raise BadInput(f"{encoder!r} has no token states; use one of {seen.encoders}.")
        last = (seen.masks[encoder].sum(1) - 2).clamp(min=0)
        rows = torch.arange(len(last), device=last.device)
        return seen.states[:, seen.layout[encoder].tokens][rows, last]

    # Pictures

    def decode(
        self, z: Float[Tensor, "batch channel h w"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Pictures in [0, 1]; differentiable."""
        with self._vae_precision() as dtype:
            x = self.vae.decode(self._unscaled(z.to(dtype)), return_dict=False)[0]
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def encode_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch channel h w"]:
        """Clean latents `z` of pictures in [0, 1]: the autoencoder's mean, as the denoiser saw."""
        with self._vae_precision() as dtype:
            seen = self.vae.encode(2 * images.to(self.device, dtype) - 1)
        z = seen.latent_dist.mode() if hasattr(seen, "latent_dist") else seen.latents
        return self._scaled(z).to(self.dtype)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch: int = 16,
        negative: str | None = None,
        on_noise: Sequence[sampling.OnNoise] = (),
        progress: sampling.Progress | None = None,
    ) -> list[Outcome]:
        """Paint prompts.

        Args:
            prompts: The texts.
            seed: Of the first picture, the next has `seed + 1`; or one seed per picture.
            steps, guidance: The model's own (`model.sampling`) if None.
            size: Height and width in pixels; `height` and `width` may be given singly instead.
            batch: Pictures painted together; it has no influence on any of them.
            negative: A text to steer away from; the family's neutral condition if None.
            on_noise: Functions `(noise, step) -> noise` that may edit every prediction.
            progress: Called as `progress(done, total)` after every step, in picture steps.

        Raises:
            BadInput: Prompts, seeds or sizes of the wrong form.
        """
        given = texts(prompts)
        seeds = sampling.seeds(seed, len(given))
        if batch < 1:
            raise BadInput(f"batch must be at least 1, not {batch}.")
        default = size or self.default_size
        size = (height or default[0], width or default[1])
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        done, total = 0, steps * len(given)
        outcomes = []
        with torch.no_grad():
            away = None if negative is None else self.encode([negative])
            if away is None and self.guides(guidance):
                away = self.empty(1)
            for at in range(0, len(given), batch):
                part, own = given[at : at + batch], seeds[at : at + batch]
                watch = _counted(progress, done, total, len(part))
                condition = self.encode(part)
                z = self.sample(
                    condition,
                    negative=away,
                    seed=own,
                    steps=steps,
                    guidance=guidance,
                    size=size,
                    on_noise=on_noise,
                    progress=watch,
                )
                images = self.decode(z).cpu()
                outcomes += [Outcome(*row) for row in zip(part, own, images.unbind(), strict=True)]
                done += steps * len(part)
        return outcomes

    def sample(
        self,
        condition: Condition,
        *,
        negative: Condition | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: tuple[int, int] | None = None,
        on_noise: Sequence[sampling.OnNoise] = (),
        progress: sampling.Progress | None = None,
        latents: Float[Tensor, "batch channel h w"] | Sequence[Tensor | None] | None = None,
    ) -> Float[Tensor, "batch channel h w"]:
        """Clean latents for a condition; `decode` makes pictures of them.

        Args:
            condition: What to paint.
            negative: What to steer away from, one row or one per picture; `empty` if None.
            seed: Of the first picture, the next has `seed + 1`; or one seed per picture.
            steps, guidance, size: The model's own (`model.sampling`) if None.
            on_noise: Functions `(noise, step) -> noise` that may edit every prediction.
            progress: Called as `progress(done, total)` after every step.
            latents: The noise each picture starts from, of unit variance; where None its seed says.
        """
        steps = self.sampling.steps if steps is None else steps
        guidance = self.sampling.guidance if guidance is None else guidance
        if steps < 1:
            raise BadInput(f"steps must be at least 1, not {steps}.")
        seeds = sampling.seeds(seed, len(condition))
        noise = sampling.noise(self.latent_shape(size or self.default_size), seeds, latents)
        if self.guides(guidance):
            negative = self.empty(1) if negative is None else negative
        elif negative is not None and self.distilled:
            raise Unsupported(
                f"{self.name} has its guidance built in and takes no negative condition."
            )
        return sampling.denoise(
            self,
            condition,
            noise.to(self.device, self.dtype),
            negative=negative if self.guides(guidance) else None,
            generators=sampling.generators(seeds, skip=noise[0]),
            steps=steps,
            guidance=guidance,
            on_noise=on_noise,
            progress=progress,
        )

    @property
    def distilled(self) -> bool:
        """Whether guidance is an input of the denoiser instead of a second call."""
        return False

    def guides(self, guidance: float) -> bool:
        """Whether sampling at this guidance compares with a negative condition."""
        return guidance > 1 and not self.distilled

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Channels, height and width of the latents of a picture of a size in pixels."""
        unit = self.vae_factor * self.patch_size
        if any(side < unit or side % unit for side in size):
            raise BadInput(
                f"height and width must be multiples of {unit} for {self.name}, "
                f"not {size[0]} x {size[1]}."
            )
        return self.latent_channels, size[0] // self.vae_factor, size[1] // self.vae_factor

    # The denoiser

    def predict(
        self,
        z_t: Float[Tensor, "batch channel h w"],
        t: Float[Tensor, "*rows"] | Int[Tensor, "*rows"],
        condition: Condition,
        *,
        guidance: float | None = None,
    ) -> Float[Tensor, "batch channel h w"]:
        """The denoiser's own output (noise, velocity or flow); differentiable.

        Args:
            z_t: Noisy latents.
            t: Time in the scheduler's unit, one for all or one per row.
            condition: One row per latent.
            guidance: Only for families whose denoiser takes it as an input.
        """
        return self._predict(z_t, t.expand(len(z_t)), condition, guidance)

    @abstractmethod
    def _predict(
        self, z_t: Tensor, t: Tensor, condition: Condition, guidance: float | None
    ) -> Tensor: ...

    @abstractmethod
    def noised(
        self,
        z: Float[Tensor, "batch channel h w"],
        eps: Float[Tensor, "batch channel h w"],
        t: Float[Tensor, "*rows"] | Int[Tensor, "*rows"],
    ) -> tuple[Float[Tensor, "batch channel h w"], Float[Tensor, "batch channel h w"]]:
        """`z_t`, and what `predict` should say about it."""

    @abstractmethod
    def random_times(self, n: int, rng: torch.Generator) -> Float[Tensor, " n"]:
        """Times drawn as in the family's training, in the scheduler's unit."""

    @property
    @abstractmethod
    def noisiest(self) -> float:
        """The time at which latents are noise and nothing else, in the scheduler's unit."""

    @abstractmethod
    def schedule(self, steps: int, shape: Sequence[int]) -> Any:
        """A fresh scheduler set to `steps` steps for latents of a shape (..., h, w)."""

    @abstractmethod
    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """Layers of the denoiser that read the text states directly, with their names in it."""

    # Changing weights

    def using(self, values: Mapping[str, Tensor]) -> AbstractContextManager:
        """Run with other tensors in place of the named parameters; gradients reach them.

        The untouched parameters themselves come back on exit, so no bit can differ.

        Raises:
            BadInput: No such parameter, or another shape.
        """
        return self.weights.using(values)

    def patched(
        self, patch: Change, scale: float = 1.0, force: bool = False
    ) -> AbstractContextManager:
        """Run with a patch put on; nested patches add up; every bit comes back on exit.

        Args:
            patch: A saved change of weights.
            scale: 0 is the model as it is, 1 the patch as it was made.
            force: Put it on although it was made for other weights.

        Raises:
            Unsupported: The patch is for another family.
            BadInput: It was made for other weights, or names parameters this model lacks.
        """
        return self.using(patch.applied(self, scale=scale, force=force))

    def unpatched(self) -> AbstractContextManager:
        """Run the untouched model inside `patched` or `using`, e.g. for reference terms."""
        return self.weights.unpatched()

    def untouched(self, name: str) -> Tensor:
        """A parameter as it is without any patch."""
        return self.weights.untouched(name)

    # Per family

    @abstractmethod
    def read(
        self, encoder: str, ids: Int[Tensor, "batch token"], mask: Int[Tensor, "batch token"]
    ) -> Read:
        """What the denoiser is told by one encoder about token ids."""

    @abstractmethod
    def _layout(self) -> dict[str, Span]: ...

    def _joined_shape(self) -> tuple[int, int]:
        """Tokens and dims of the joined states."""
        spans = [span for span in self.layout.values() if span.tokens.stop]
        return max(s.tokens.stop for s in spans), max(s.dims.stop for s in spans)

    def _joined(self, reads: Mapping[str, Read], n: int) -> Tensor:
        shape = (n, *self._joined_shape())
        whole = [read.states for read in reads.values() if read.states is not None]
        if len(whole) == 1 and whole[0].shape == shape:
            return whole[0].to(self.dtype)
        states = torch.zeros(shape, device=self.device, dtype=self.dtype)
        for name, read in reads.items():
            if read.states is not None:
                span = self.layout[name]
                states[:, span.tokens, span.dims] = read.states.to(self.dtype)
        return states

    def _joined_pooled(self, reads: Mapping[str, Read], n: int) -> Tensor | None:
        ends = [span.pooled.stop for span in self.layout.values() if span.pooled]
        if not ends:
            return None
        pooled = torch.zeros(n, max(ends), device=self.device, dtype=self.dtype)
        for name, read in reads.items():
            if read.pooled is not None:
                pooled[:, self.layout[name].pooled] = read.pooled.to(self.dtype)
        return pooled

    def _chosen(self, encoders: Sequence[str] | None) -> tuple[str, ...]:
        if encoders is None:
            return tuple(self.text_encoders)
        missing = [name for name in encoders if name not in self.text_encoders]
        if missing or not encoders:
            raise BadInput(
                f"{self.name} has the encoders {', '.join(self.text_encoders)}; "
                f"asked for {', '.join(missing) or 'none'}."
            )
        return tuple(name for name in self.text_encoders if name in encoders)

    def _length(self, encoder: str, t5_tokens: int) -> int:
        if encoder == "t5":
            return t5_tokens
        tokenizer = self.tokenizers[encoder]
        # A CLIPTokenizer read from files may have forgotten its length (it then says 10^30).
        length = self.text_encoders[encoder].config.max_position_embeddings
        length = min(length, tokenizer.model_max_length)
        tokenizer.model_max_length = length
        return length

    def _trained_size(self) -> tuple[int, int]:
        side = self.denoiser.config.sample_size
        h, w = (side, side) if isinstance(side, int) else side
        return h * self.vae_factor, w * self.vae_factor

    # The autoencoder's scale

    def _scaled(self, z: Tensor) -> Tensor:
        config = self.vae.config
        return (z - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _unscaled(self, z: Tensor) -> Tensor:
        config = self.vae.config
        return z / config.scaling_factor + (config.get("shift_factor") or 0.0)

    @contextmanager
    def _vae_precision(self) -> Iterator[torch.dtype]:
        """float32 for autoencoders that overflow in float16 (SDXL's), else the weights' own."""
        dtype = next(self.vae.parameters()).dtype
        if dtype != torch.float16 or not self.vae.config.get("force_upcast"):
            yield dtype
            return
        own = {name: value for name, value in self.parameters().items() if name[:4] == "vae."}
        self.weights.put({name: value.float() for name, value in own.items()})
        try:
            yield torch.float32
        finally:
            self.weights.put(own)


def texts(prompts: Sequence[Any]) -> tuple[str, ...]:
    """The prompts, checked: a non-empty sequence of texts."""
    if isinstance(prompts, str):
        raise BadInput("prompts is one text; give a list of texts, even for one.")
    given = tuple(prompts)
    if not given:
        raise BadInput("there are no prompts.")
    for i, text in enumerate(given):
        if not isinstance(text, str):
            raise BadInput(f"prompt {i} is a {type(text).__name__}, not a text.")
    return given


def _counted(
    progress: Callable[[int, int], None] | None, done: int, total: int, rows: int
) -> Callable[[int, int], None] | None:
    """Turn "step i of this batch" into "picture step i of all"."""
    if progress is None:
        return None
    return lambda step, _: progress(done + step * rows, total)
