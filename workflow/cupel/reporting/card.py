"""Reproducibility cards: what a paper states, and what is pinned here."""

import pandas as pd


def card_markdown(card: dict, title: str) -> str:
    """A card.yaml as Markdown: variables, then differences between paper and code with their switches."""
    rows = pd.DataFrame(card["rows"]).rename(columns=str.capitalize)
    text = f"**{title}**\n\n{rows.to_markdown(index=False, disable_numparse=True)}\n"
    if card.get("differences"):
        differences = pd.DataFrame(card["differences"]).rename(columns=str.capitalize)
        text += f"\nWhere paper and code differ:\n\n{differences.to_markdown(index=False, disable_numparse=True)}\n"
    return text
