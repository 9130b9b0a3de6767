"""Alignments: methods that change weights once. Names only; nothing here imports torch."""

TABLE = {
    "safetext": "safelight.align.safetext:SafeText",
}
