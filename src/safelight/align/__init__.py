"""Alignments: methods that change weights once. Names only; nothing here imports torch."""

TABLE = {
    "advunlearn": "safelight.align.advunlearn:AdvUnlearn",
    "des": "safelight.align.des:DES",
    "dpo": "safelight.align.dpo:DPO",
    "esd": "safelight.align.esd:ESD",
    "haven": "safelight.align.haven:Haven",
    "safe_clip": "safelight.align.safe_clip:SafeCLIP",
    "safetext": "safelight.align.safetext:SafeText",
    "sage": "safelight.align.sage:SAGE",
}
