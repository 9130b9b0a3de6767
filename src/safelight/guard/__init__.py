"""Guards: protections that act while pictures are made."""

TABLE = {
    "screen": "safelight.guard.screen:Screen",
}
