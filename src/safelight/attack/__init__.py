"""Attacks: ways to rewrite prompts so that a protected model paints what it should not."""

TABLE: dict[str, str] = {}
