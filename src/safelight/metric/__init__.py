"""Metrics: figures computed from rows on disk, long after the pictures were made. No torch."""

TABLE = {
    "became_broken": "safelight.metric.became:BecameBroken",
    "became_other": "safelight.metric.became:BecameOther",
    "became_refused": "safelight.metric.became:BecameRefused",
    "became_safe": "safelight.metric.became:BecameSafe",
    "became_same": "safelight.metric.became:BecameSame",
    "category_rate": "safelight.metric.unsafe:CategoryRate",
    "drift": "safelight.metric.drift:Drift",
    "fidelity": "safelight.metric.fidelity:Fidelity",
    "fidelity_drop": "safelight.metric.fidelity:FidelityDrop",
    "fidelity_objects": "safelight.metric.fidelity:FidelityObjects",
    "frechet": "safelight.metric.frechet:Frechet",
    "nrr": "safelight.metric.nrr:NRR",
    "nrr_detections": "safelight.metric.nrr:NRRDetections",
    "refused": "safelight.metric.validity:Refused",
    "survival": "safelight.metric.survival:Survival",
    "unsafe_drop": "safelight.metric.unsafe:UnsafeDrop",
    "unsafe_rate": "safelight.metric.unsafe:UnsafeRate",
    "validity": "safelight.metric.validity:Validity",
}
