"""Notebooks of papers, executed, and the reproducibility card that they show."""

import os
from pathlib import Path

import pandas as pd

from cupel.files import atomic, write_text
from cupel.settings import check_schema, read_yaml, schema


def card_markdown(card: dict, title: str) -> str:
    """A card.yaml as Markdown: variables, differences between paper and code with their switches, errors of measures."""
    def table(rows: list[dict]) -> str:
        frame = pd.DataFrame(rows).fillna("").map(lambda text: str(text).replace("|", r"\|"))  # a bar would end a cell
        return frame.rename(columns=str.capitalize).to_markdown(index=False, disable_numparse=True)

    text = f"**{title}**\n\n{table(card['rows'])}\n"
    if card.get("differences"):
        # what a switch is measured by is for the table of switches
        said = [{key: row.get(key, "") for key in ("what", "paper", "code", "switch")} for row in card["differences"]]
        text += f"\nWhere paper and code differ:\n\n{table(said)}\n"
    if card.get("errors"):
        text += f"\nHow often a measure is wrong. {card['errors']['source']}\n\n{table(card['errors']['rows'])}\n"
    return text


def write_card(source: str | Path | None, out: str | Path) -> None:
    """Write the card of a paper as Markdown; one without a card.yaml says so."""
    card = read_yaml(source) if source else None
    if card:
        check_schema(card, schema("card"), source)
    write_text(out, card_markdown(card, f"Reproducibility card: {card['paper']}") if card else "No card.yaml.\n")


def run_notebook(source: str | Path, parameters: dict, out: str | Path) -> None:
    """Execute a notebook with `parameters` in place of those in its cell tagged so."""
    # the kernel belongs to this job alone: no settings of the user's own notebooks
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    import papermill

    with atomic(out) as path:
        papermill.execute_notebook(str(source), str(path), progress_bar=False, kernel_name="python3", parameters=parameters)
