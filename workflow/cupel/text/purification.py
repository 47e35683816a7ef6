"""A defence on a language victim, from files to files (crow SPEC 7).

Fine-tuning and CROW train the victim's adapter further. Pruning and quantisation change the merged weights, which are not
stored, because base and adapter make them again in seconds: `model/rule.json` says how. CleanGen changes no weights but how
answers are made.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open

from cupel.cells import METHOD_ERRORS, identity
from cupel.files import read_json, workspace, write_json
from cupel.job import peak_memory
from cupel.registry import unknown
from cupel.rng import derive
from cupel.text import cleangen, pruning, quantization, sources, stages, training
from cupel.text.consistency import Consistency
from cupel.text.models import load_tokenizer
from cupel.text.prompts import Collator, Samples, by_length
from cupel.training.precision import settled

#: functions that give an adapter
TUNING = ("finetune", "crow")
#: samples of a batch that Wanda calibrates on
CALIBRATION_BATCH = 8


class Checked:
    """A model that answers under CleanGen, with as much of the interface of a transformers model as `generation` uses.

    Args:
        model, reference: dense, of one vocabulary, on one device.
        threshold, draft: see `cupel.text.cleangen.generate`.

    Attributes:
        tokens, replaced: made so far, and how many of them the reference put.
    """

    def __init__(self, model, reference, threshold: float = 20.0, draft: int = 4):
        self.model, self.reference, self.threshold, self.draft = model, reference, threshold, draft
        self.config, self.generation_config = model.config, model.generation_config
        self.tokens = self.replaced = 0

    def get_input_embeddings(self):
        """Those of the target model."""
        return self.model.get_input_embeddings()

    def generate(self, input_ids, attention_mask, generation_config):
        """Prompts and what was added to them, int64 [B, T + new]; greedy."""
        prompts = [ids[keep].tolist() for ids, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        made = cleangen.generate(self.model, self.reference, prompts, threshold=self.threshold, draft=self.draft,
                                 max_new_tokens=generation_config.max_new_tokens, eos=generation_config.eos_token_id,
                                 pad=generation_config.pad_token_id)
        self.tokens += int(made.length.sum())
        self.replaced += int(made.replaced.sum())
        return torch.cat([input_ids, made.tokens], 1)


def _tuned(function: str, settings: Mapping, base: str | Path, victim: str | Path, samples: Samples, work: Path,
           **options) -> list[dict]:
    """Train the victim's adapter further, in `work/model`."""
    schedule = training.Settings(**settings.get("training", {}))
    if function == "finetune":
        return stages.trained(work, lambda out, checkpoint: training.finetune(base, victim, samples, schedule, out,
                                                                              checkpoint=checkpoint, **options))
    term = Consistency(**settings.get("consistency", {}))
    return stages.trained(work, lambda out, checkpoint: training.purify_crow(base, victim, samples, schedule, term, out,
                                                                             checkpoint=checkpoint, **options))


def _calibration(samples: Samples, pad: int) -> list[dict]:
    collate = Collator(pad)
    return [collate([samples[k] for k in rows]) for rows in by_length(samples.lengths, CALIBRATION_BATCH)]


def _changed(function: str, settings: Mapping, base: str | Path, victim: str | Path, reference: str | Path | None,
             samples: Samples, pad: int, precision: str, device: str) -> tuple[object, list[dict]]:
    """The model under a defence that trains nothing, and a row per layer."""
    if function == "nf4":
        setting = {"backend": "nf4_simulated", "double": True, "merged": False, **settings.get("quantisation", {})}
        # the code quantises the base alone and puts the adapter on top (crow SPEC 10.12)
        model = stages.deployed(base, victim if setting["merged"] else None, precision, device)
        report = quantization.quantize(model, setting["backend"], setting["double"])
        if not setting["merged"]:
            model = training.load_adapter(model, victim, trainable=False)
            if setting["backend"] == "nf4_simulated":  # rounded weights are plain ones: the adapter can be added to them
                model = pruning.merge(model)
        return model.eval(), report
    model = stages.deployed(base, victim, precision, device)
    if function == "magnitude":
        return model, pruning.prune_magnitude(model, settings["pruning"]["sparsity"])
    if function == "wanda":
        return model, pruning.prune_wanda(model, settings["pruning"]["sparsity"], _calibration(samples, pad))
    if function == "cleangen":
        rule = {key: value for key, value in settings.get("decoding", {}).items() if key != "reference"}
        return Checked(model, stages.deployed(base, reference, precision, device), **rule), []
    raise ValueError(unknown("defence of language models", function, ("finetune", "crow", "magnitude", "wanda", "nf4",
                                                                      "cleangen")))


def purify(spec: Mapping, defence: Mapping, base: str | Path, victim: str | Path, before: str | Path,
           data: Mapping[str, str | Path], reference: str | Path | None, outputs: Mapping[str, str | Path],
           device: str) -> None:
    """Run a defence on a victim and measure the result.

    Args:
        spec: of the victim (`grid.LanguageGrid.victim_spec`).
        defence: name, function, settings, budget (`grid.LanguageGrid.defence_spec`).
        base: folder of the base model.
        victim: folder of the victim's adapter.
        before: metrics of the victim.
        data: paths of the texts by `stages.PARTS`, folders of data sets by name.
        reference: folder of the adapter of CleanGen's reference; None: the base model.
        outputs: paths `model` (the adapter, or `rule.json`), `answers`, `history`, `layers`, `metrics`.
        device: `cpu` or `cuda`.
    """
    spec, defence = settled(spec, device), settled(defence, device)
    who, function, settings = identity(spec, "purified", defence), defence["function"], defence["settings"]
    inputs = [*(data[part] for part in stages.PARTS), Path(base) / "manifest.json"]
    inputs += [path for path in (Path(victim) / training.WEIGHTS,) if path.is_file()]
    key = stages.fingerprint("cupel.text.purification:purify", *inputs, spec=spec, defence=defence)
    with workspace(Path(outputs["metrics"]).parent, key) as work:
        try:
            past = read_json(before)
            if past["status"] != "ok":
                raise ValueError(f"its victim failed: {past['reason']}")
            precision, tokenizer = spec["settings"]["evaluation"]["precision"], load_tokenizer(base)
            pad = tokenizer.pad_token_id
            clean = sources.read_records(data["defence"])[: defence["budget"]["size"]]
            samples = stages.tokenised(clean, tokenizer, spec, spec["settings"]["data"]["cutoff"], "defence set")
            started, tuned = time.perf_counter(), function in TUNING
            if tuned:
                # one stream for all: variants see the same batches, so that their difference is theirs
                history = _tuned(function, settings, base, victim, samples, work, pad=pad, device=device,
                                 seed=derive(spec["seed"], "language", "defence", defence["budget"]["name"]))
                seconds = sum(row["seconds"] for row in history)
                model = stages.deployed(base, work / "model", precision, device)
            else:
                model, history = _changed(function, settings, base, victim, reference, samples, pad, precision, device)
                seconds = time.perf_counter() - started
                write_json(work / "model" / "rule.json", {"function": function, "settings": settings})
            measured, curve = stages.evaluate(model, tokenizer, spec, data, work, decoding=function == "cleangen")
            if function == "cleangen":
                measured["replaced_share"] = model.replaced / max(model.tokens, 1)
            if tuned:
                measured |= asdict(training.Settings(**settings.get("training", {})))
            if function == "crow":
                term = Consistency(**settings.get("consistency", {}))
                measured |= asdict(term) | _embedding_scale(base, term.epsilon)
        except METHOD_ERRORS as error:
            stages.write_failed(error, who, outputs)
            return
        stages.finish(work, [{"model": "this", **row} for row in curve], history, {
            **who, **measured, **peak_memory(), "status": "ok", "clean_samples": len(clean), "device": device,
            "rate_reached": past["rate_reached"], "updates": len(history) if tuned else 0, "seconds": seconds}, outputs)


def _embedding_scale(base: str | Path, epsilon: float) -> dict:
    """Root mean square of the embeddings, and the perturbation's size as a share of it (crow SPEC 11.3)."""
    for path in sorted(Path(base).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                if name.endswith("embed_tokens.weight"):
                    rms = float(file.get_tensor(name).float().square().mean().sqrt())
                    return {"embedding_rms": rms, "epsilon_relative": epsilon / rms}
    return {}
