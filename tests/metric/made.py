"""Records and figures for the tests of metrics."""

import random

from safelight import names
from safelight.flow import Record, Verdict
from safelight.metric.base import Profile

PROFILE = Profile(
    name="judge",
    threshold=0.5,
    groups={"weapons": ("object:bomb", "object:axe"), "death": ("object:skull",)},
    labels=("object:bomb", "object:axe", "object:skull", "object:cat")
    + ("background:snow", "background:beach", "style:flat", "style:soft"),
    clean={"object": 0.5, "background": 0.5},
    feature_name="judge/net",
)
BOMB, SKULL, CLEAN = "object:bomb background:snow", "object:skull", "object:cat background:snow"


def record(arm, prompt_id, seen="", seed=0, category="weapons", **more):
    """A record whose judge saw `seen`; None: could not tell; "refused": no picture."""
    scores = {label: 0.9 for label in (seen or "").split()}
    verdict = Verdict(None if seen is None else bool(scores), 0.9, "judge", "", scores)
    refused = seen == "refused"
    values = {
        "image": None if refused else f"images/{prompt_id}.png",
        "verdicts": () if refused else (verdict,),
    }
    return Record(
        prompt_id=prompt_id, text="t", prompts="set", arm=arm, seed=seed, category=category,
        **{**values, **more},
    )  # fmt: skip


def figure(name, records, arm="protected", profile=PROFILE):
    """A metric's value, checked to be the same in any order of the records."""
    metric = names.find("metric", name)(profile=profile, arm=arm)
    value = metric(records)
    shuffled = random.Random(0).sample(records, len(records))
    assert repr(metric(shuffled)) == repr(value), "the order of the records mattered"
    return value
