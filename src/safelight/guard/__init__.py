"""Guards: protections that act while pictures are made."""

TABLE = {
    "sanitizer": "safelight.guard.sanitizer:Sanitizer",
    "screen": "safelight.guard.screen:Screen",
}
