"""Judges: detectors and classifiers that look at pictures."""

TABLE = {
    "emoji": "safelight.judge.emoji:EmojiJudge",
    "emoji-b": "safelight.judge.emoji:EmojiJudgeB",
    "fake": "safelight.judge.fake:FakeJudge",
}
