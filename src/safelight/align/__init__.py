"""Alignments: methods that change weights once. Names only; nothing here imports torch."""

TABLE = {
    "advunlearn": "safelight.align.advunlearn:AdvUnlearn",
    "safe_clip": "safelight.align.safe_clip:SafeCLIP",
    "safetext": "safelight.align.safetext:SafeText",
}
