"""Models: one handle for every family of text-to-image models.

`TABLE` names those that come with Safelight; `safelight.models.load.load` also takes a diffusers
folder, a hub id or a live diffusers pipeline.
"""

TABLE = {
    "emoji-world": "safelight.models.load:emoji_world",
    "tiny-flux": "safelight.models.tiny:tiny_flux",
    "tiny-sd1": "safelight.models.tiny:tiny_sd1",
    "tiny-sd3": "safelight.models.tiny:tiny_sd3",
    "tiny-sdxl": "safelight.models.tiny:tiny_sdxl",
}
