"""Guards: protections that act while pictures are made."""

TABLE = {
    "safeguider": "safelight.guard.safeguider:SafeGuider",
    "sanitizer": "safelight.guard.sanitizer:Sanitizer",
    "screen": "safelight.guard.screen:Screen",
    "soft_prompt": "safelight.guard.soft_prompt:SoftPrompt",
    "text_probe": "safelight.guard.text_probe:TextProbe",
}
