"""Alignments: methods that change weights once. Names only; nothing here imports torch."""

TABLE = {
    "des": "safelight.align.des:DES",
    "sage": "safelight.align.sage:SAGE",
    "safetext": "safelight.align.safetext:SafeText",
}
