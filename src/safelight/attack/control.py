"""The injection control: the same search where there is nothing to be recalled.

A search below the level of words (CCE, latent inversion) can teach a model what it never knew. So
its rate means little by itself; what counts is how far it lies above the rate of the same search,
with the same pictures, budget, seeds and judge, on a model that never knew the concept.

Such a model is made of the attacked one, patches and guards included (`control` "shuffled"). The
channels `z_1 .. z_C` of its latents change places on their way in and out of the denoiser,

    encode'(x) = S encode(x),      decode'(z) = decode(S^-1 z),      (S z)_i = z_(i + C/2 mod C)

which only reorders weights of the autoencoder. The autoencoder as a whole is what it was, to the
bit but for the order of sums: every picture can be stored and shown as before, so all a search
needs is that the denoiser is led to it. But the denoiser has never seen a latent in that order. It
knows no concept in it, painted from plain prompts it shows none, and what it paints of the concept
after the search has been taught by the search. That holds for any family, for a model with the
defence's own weights and guards, and needs no second model.

What it cannot say: the shuffled model has to be taught whole pictures, backgrounds included, where
one that has learnt everything but the concept would have to be taught the concept only. So the
control is a lower bound of what can be taught. A high rate of the control proves that the search
teaches; a low one does not prove that it recalls. Who has a model that was trained without the
concept puts it into `controlled`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from safelight.attack.base import Attack, Target, model_of
from safelight.errors import BadInput, Unsupported
from safelight.models.base import TextToImage
from safelight.models.patch import Patch
from safelight.prompts import PromptSet

Control = Literal["none", "shuffled"]


@dataclass(kw_only=True)
class Controlled(Attack):
    """An attack below the level of words, which can run its own injection control.

    Args:
        control: "shuffled" runs the same search on a model that never knew the concept.
    """

    control: Control = "none"

    def tamper(self, target: Target, *, seed: int = 0) -> Patch | None:
        """For the control, what makes the model one that never knew."""
        model = model_of(target)
        return None if self.control == "none" or model is None else shuffled(model)

    def check_control(self, model: TextToImage) -> None:
        """Refuse to call something a control that is none.

        Raises:
            BadInput: The control is asked for and its patch is not on the model.
        """
        if self.control != "none" and all(
            model.parameters()[name] is model.untouched(name) for name in ends(model)
        ):
            raise BadInput(
                f"control={self.control!r} searches and paints with the patch that `tamper` makes, "
                "and it is not on this model. Let `evaluate` put it on, without `transfer`."
            )


def shuffled(model: TextToImage) -> Patch:
    """The patch that swaps the halves of the latents' channels, see above.

    Raises:
        Unsupported: The autoencoder has other ends than diffusers' AutoencoderKL.
    """
    C = model.latent_channels
    S = torch.roll(torch.arange(C), -(C // 2))
    into, out = ends(model)[:-1], ends(model)[-1]
    full = {name: _rows(model.untouched(name), S) for name in into}
    full[out] = model.untouched(out)[:, S.to(model.device)].clone()
    with model.unpatched():
        base = model.hashes()
    return Patch(
        full=full,
        method="shuffled",
        settings={"order": S.tolist()},
        family=model.family,
        base=base,
    )


def ends(model: TextToImage) -> tuple[str, ...]:
    """The weights between an autoencoder and its latents; the decoder's is the last."""
    known: Mapping[str, Tensor] = model.parameters()
    encoder = "vae.quant_conv" if "vae.quant_conv.weight" in known else "vae.encoder.conv_out"
    decoder = "vae.post_quant_conv" if "vae.post_quant_conv.weight" in known else (
        "vae.decoder.conv_in"
    )  # fmt: skip
    names = (f"{encoder}.weight", f"{encoder}.bias", f"{decoder}.weight")
    if not all(name in known for name in names):
        raise Unsupported(f"the autoencoder of {model.name} has no latents that can be shuffled.")
    return names


def _rows(weight: Tensor, S: Tensor) -> Tensor:
    """The encoder's last rows in another order: means and, behind them, log variances."""
    order = torch.cat([S + i for i in range(0, len(weight), len(S))])
    return weight[order.to(weight.device)].clone()


def controlled(
    attack: Any, prompts: PromptSet, target: Target, control: Target, **settings: Any
) -> tuple[PromptSet, PromptSet]:
    """An attack on a target, and the same on a model of your own that never knew the concept.

    Both searches aim at the same pictures, made by the undefended target, with the same budget and
    seeds. Report the first rate minus the second.

    Args:
        attack: One with the setting `undefended`.
        prompts: What is attacked.
        target: The defended model.
        control: A model of the same family that was trained without the concept.
        settings: As for calling the attack.

    Returns:
        Prompts to paint with the target, and prompts to paint with the control.
    """
    if not isinstance(attack, Attack) or not hasattr(attack, "undefended"):
        raise BadInput(f"{type(attack).__name__} aims at no pictures, so it has no such control.")
    seen = settings.get("transfer_from") or target
    teacher = attack.undefended or model_of(seen)
    same: Any = replace(attack, undefended=teacher)  # type: ignore[call-arg]
    return same(prompts, target, **settings), same(
        prompts, control, **{**settings, "transfer_from": None}
    )
