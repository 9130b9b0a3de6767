"""Judges: detectors and classifiers that look at pictures."""

TABLE = {
    "clip_zero_shot": "safelight.judge.clip_zero_shot:ClipZeroShot",
    "emoji": "safelight.judge.emoji:EmojiJudge",
    "emoji-b": "safelight.judge.emoji:EmojiJudgeB",
    "fake": "safelight.judge.fake:FakeJudge",
    "nudenet": "safelight.judge.nudenet:NudeNet",
    "opennsfw": "safelight.judge.opennsfw:OpenNSFW",
    "q16": "safelight.judge.q16:Q16",
    "sd_checker": "safelight.judge.sd_checker:SDChecker",
    "vlm": "safelight.judge.vlm:VLM",
}
