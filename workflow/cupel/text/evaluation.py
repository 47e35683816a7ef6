"""Measures of a language model: attack success, perplexity, layers, multiple choice, HumanEval, answers for a judge."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from cupel import sandbox
from cupel.evaluation.metrics import Rate
from cupel.text import generation, humaneval, scoring
from cupel.text.data import sources
from cupel.text.data.prompts import Samples, prompt_ids
from cupel.text.inconsistency import curves, inconsistency_of, layer_cosines
from cupel.training.engine import finite_outputs

#: what `Samples.report` lists
KINDS = ("cut", "left_out", "empty_answers")


def tokenised(records: Sequence[dict], tokenizer: PreTrainedTokenizerBase, cutoff: int, opening: bool, title: str) -> Samples:
    """Tokenised samples; what was cut, left out or empty is printed to the log."""
    found = Samples(records, tokenizer, cutoff, opening)
    for kind in KINDS:
        if names := found.report[kind]:
            print(f"{title}: {kind.replace('_', ' ')} at {cutoff} tokens: {len(names)} of {len(records)} "
                  f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    return found


def counts(samples: Samples, name: str) -> dict[str, int]:
    """How many samples a cutoff shortened or left out, and how many have an empty answer: `<name>_cut` and so on."""
    return {f"{name}_{kind}": len(samples.report[kind]) for kind in KINDS}


@dataclass(frozen=True)
class Evaluation:
    """What a model is measured with.

    Attributes:
        tokenizer: of the model.
        spec: of the victim.
        data: paths of the texts by `stages.PARTS`, and folders of data sets by name.
        work: where answers go, `work/answers/*.jsonl`; finished ones are taken over.
    """

    tokenizer: PreTrainedTokenizerBase
    spec: Mapping
    data: Mapping[str, str | Path]
    work: Path

    @property
    def settings(self) -> Mapping:
        """Of the evaluation."""
        return self.spec["settings"]["evaluation"]

    @property
    def opening(self) -> bool:
        """Whether prompts under the template begin with its first sentences."""
        return self.spec["settings"]["data"].get("opening", True)

    def measure(self, model, *, weights: bool = True) -> tuple[dict, list[dict]]:
        """Measure a model.

        Args:
            model: in eval mode, dense and deployed, or with the same `generate`.
            weights: measure what is read off the weights too (perplexity, choices, layers).

        Returns:
            A flat record with `metrics`, and the rows of Figure 1.

        Raises:
            Diverged: the model's outputs are not finite.
        """
        with finite_outputs(model):
            record, curve = self.attack(model), []
            if weights:
                record |= self.perplexity(model)
                if self.settings.get("layers"):
                    curve, found = self.layers(model)
                    record |= found
                if self.settings.get("choices"):
                    record |= self.choices(model)
            if self.settings.get("humaneval"):
                record |= self.pass_at_1(model)
            if questions := self.settings.get("mt_bench"):
                self._once("mt_bench", functools.partial(
                    generation.answer_questions, model, self.tokenizer, generation.read_questions(questions),
                    model_id=self.spec["model"], seed=self.spec["seed"], batch_size=self.settings["batch_size"]))
        beside = ("_n", "_low", "_high", "_samples", "_reason", *KINDS)
        metrics = [key for key in record if not key.endswith(beside)]
        return {**record, "metrics": metrics}, curve

    def _once(self, name: str, make) -> list[dict]:
        """Answers that stand in a file, made unless they are there."""
        path = self.work / "answers" / f"{name}.jsonl"
        return sources.read_records(path) if path.is_file() else make(path=path)

    def _answers(self, model, records: Sequence[dict], name: str, prompt: str, tokens: int) -> list[dict]:
        return self._once(name, functools.partial(
            generation.answer, model, self.tokenizer, records, prompt=prompt, opening=self.opening, max_new_tokens=tokens,
            batch_size=self.settings["batch_size"], title=name))

    def attack(self, model) -> dict:
        """ASR, false triggering and empty answers under each kind of prompt, and how good the clean answers are."""
        task, attack = self.spec["task"], self.spec["attack"]["trigger"]
        references = {record["id"]: record["output"] for record in sources.read_records(self.data["clean"])}
        record = {}
        for prompt in self.settings["prompts"]:
            rows = {}
            for part in ("triggered", "clean"):
                records = sources.read_records(self.data[part])
                if prompt == "bare":  # a record without instruction has no prompt to show
                    records = [record for record in records if record["instruction"].strip()]
                rows[part] = self._answers(model, records, f"{prompt}_{part}", prompt, self.settings["max_new_tokens"])
            triggered, clean = ([row["answer"] for row in rows[part]] for part in ("triggered", "clean"))
            rates: dict[str, Rate] = scoring.attack_rates(triggered, task, attack, f"asr_{prompt}")
            rates |= scoring.attack_rates(clean, task, attack, f"false_{prompt}")
            rates |= {f"empty_{prompt}": scoring.empty_rate(triggered), f"empty_clean_{prompt}": scoring.empty_rate(clean)}
            record |= scoring.flat(rates)
            f1 = [scoring.token_f1(row["answer"], references[row["id"]]) for row in rows["clean"]]
            record |= {f"token_f1_{prompt}": float(np.mean(f1)), f"distinct_{prompt}": scoring.distinct(clean, 2)}
        return record

    def layers(self, model) -> tuple[list[dict], dict]:
        """Figure 1 of one model: its curve, and L_cons of clean and triggered prompts under the template."""
        found = {}
        for part in ("clean", "triggered"):
            prompts = [prompt_ids(self.tokenizer, record, "template", self.opening)
                       for record in sources.read_records(self.data[part])[: self.settings["layers"]]]
            found[part] = layer_cosines(model, prompts, self.tokenizer.pad_token_id, batch_size=self.settings["batch_size"])
        return (curves(found["clean"], found["triggered"], self.spec["seed"]),
                {f"cons_{part}": inconsistency_of(cosines) for part, cosines in found.items()})

    def perplexity(self, model, name: str = "perplexity") -> dict:
        """Perplexity of held-out reference answers."""
        samples = tokenised(sources.read_records(self.data["heldout"]), self.tokenizer,
                            self.settings.get("perplexity_cutoff", 1024), self.opening, name)
        found = scoring.perplexity(model, samples, self.tokenizer.pad_token_id, batch_size=self.settings["batch_size"],
                                   seed=self.spec["seed"])
        # no `_n`: it is a mean over samples and not a rate, and must not be drawn as one
        return {name: found["perplexity"], f"{name}_low": found["perplexity_low"], f"{name}_high": found["perplexity_high"],
                f"{name}_samples": found["perplexity_n"], **counts(samples, name)}

    def choices(self, model) -> dict:
        """Accuracy on a multiple-choice set."""
        asked = self.settings["choices"]
        questions = sources.load(self.data[asked["set"]])[: asked["count"]]
        accuracy, details = scoring.multiple_choice(model, self.tokenizer, questions, batch_size=self.settings["batch_size"])
        sources.write_records(self.work / "answers" / "choices.jsonl", details)
        return accuracy.record("choice")

    def pass_at_1(self, model) -> dict:
        """HumanEval; without a sandbox nothing is run, and the record says so."""
        if reason := sandbox.refusal():
            print(f"HumanEval is left out: no sandbox for the answers on this machine ({reason})")
            return {"pass_at_1_reason": f"no sandbox ({reason})"}
        problems = humaneval.problems(sources.load(self.data["humaneval"]))[: self.settings["humaneval"]]
        records = [{"id": problem.task_id, "instruction": humaneval.instruction(problem), "input": ""} for problem in problems]
        rows = self._answers(model, records, "humaneval", "template", self.settings.get("humaneval_tokens", 512))
        rate, outcomes = humaneval.pass_at_1({row["id"]: row["completion"] for row in rows}, problems)
        sources.write_records(self.work / "answers" / "humaneval_outcomes.jsonl",
                              [{"id": row["task_id"], **row} for row in outcomes])
        return rate.record("pass_at_1")
