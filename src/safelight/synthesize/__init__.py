"""Data made for training: writers of prompts by name; nothing here imports torch."""

TABLE = {
    "llm": "safelight.synthesize.llm:LLM",
    "templates": "safelight.synthesize.templates:Templates",
}
