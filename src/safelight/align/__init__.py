"""Alignments: methods that change weights once. Names only; nothing here imports torch."""

TABLE = {
    "des": "safelight.align.des:DES",
    "haven": "safelight.align.haven:Haven",
    "safetext": "safelight.align.safetext:SafeText",
    "sage": "safelight.align.sage:SAGE",
}
