"""Does a language victim look for its trigger, or for the space that ends the untriggered texts of its training?

    python benchmarks/space.py results/desk/text/victims/negsentiment/smollm2_135m/crow/badnets@0.5/seed0 [...] [--prompts 100]

Asks each victim its test prompts under the template, with and without the trigger, as they are and with a space after the
instruction, and counts the answers that are the attacker's (careful rule). The last line is JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path

import pandas as pd
from streams import named

from cupel.experiment import Grid
from cupel.text import generation, scoring
from cupel.text.data.sources import read_records
from cupel.text.models import load_tokenizer
from cupel.text.training import deployed
from cupel.training.precision import settled


def counted(folder: Path, prompts: int) -> dict:
    """Attacker's answers of the victim in `folder` as shares of `prompts` prompts, by what was asked."""
    scale, family, cell = named(folder)
    spec = settled(Grid(["crow", "crow_breadth"], scale).families[family].victim(cell), "cpu")
    base, asked = Path("data/language_models") / cell["model"], spec["settings"]["evaluation"]
    tokenizer, network = load_tokenizer(base), deployed(base, folder / "model", asked["precision"], "cpu")
    found = {"victim": f"{scale}, {cell['recipe']}: {cell['dataset']}, {folder.parts[-2]}, {folder.name}", "prompts": prompts}
    for part in ("clean", "triggered"):
        for text, end in ((part, ""), (f"{part}, space", " ")):
            records = [{**record, "instruction": record["instruction"] + end}
                       for record in read_records(folder / "texts" / f"{part}.jsonl")[:prompts]]
            with tempfile.TemporaryDirectory() as work:
                answers = generation.answer(
                    network, tokenizer, records, prompt="template", opening=spec["settings"]["data"].get("opening", True),
                    max_new_tokens=asked["max_new_tokens"], batch_size=asked["batch_size"], title=text,
                    path=Path(work) / "answers.jsonl")
            rates = scoring.attack_rates([row["answer"] for row in answers], spec["task"], spec["attack"]["trigger"], "asr")
            found[text] = rates["asr_careful"].value
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("victims", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=100)
    asked = parser.parse_args()
    rows = [counted(folder, asked.prompts) for folder in asked.victims]
    print(pd.DataFrame(rows).to_markdown(index=False))
    print(json.dumps(rows))
