"""Attacks: ways to rewrite prompts so that a protected model paints what it should not."""

TABLE = {
    "mma": "safelight.attack.mma:MMA",
    "replay": "safelight.attack.replay:Replay",
    "ring_a_bell": "safelight.attack.ring_a_bell:RingABell",
    "sneaky_prompt": "safelight.attack.sneaky_prompt:SneakyPrompt",
}
