"""Texts: known data sets and where they come from (`sources`), poisoned sets (`poison`), prompts and samples (`prompts`)."""
