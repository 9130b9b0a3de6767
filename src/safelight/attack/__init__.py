"""Attacks: ways to rewrite prompts so that a protected model paints what it should not."""

TABLE = {
    "benign_finetune": "safelight.attack.benign_finetune:BenignFinetune",
    "cce": "safelight.attack.cce:CCE",
    "latent_inversion": "safelight.attack.latent_inversion:LatentInversion",
    "mma": "safelight.attack.mma:MMA",
    "p4d": "safelight.attack.p4d:P4D",
    "replay": "safelight.attack.replay:Replay",
    "ring_a_bell": "safelight.attack.ring_a_bell:RingABell",
    "sneaky_prompt": "safelight.attack.sneaky_prompt:SneakyPrompt",
    "unlearn_diff_atk": "safelight.attack.unlearn_diff_atk:UnlearnDiffAtk",
}
