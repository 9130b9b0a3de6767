"""Runs: prompts in, pictures judged, rows on disk, figures out."""
