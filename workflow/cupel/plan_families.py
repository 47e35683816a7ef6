"""The papers on other than image classifiers in the plan of a scale: cells, their work, other jobs, downloads.

Work is counted in teraFLOP, so that a record of any cell of a family tells how long another takes:

    seconds = work * seconds of the record / work of the record

where the record is of the same rule, if there is one, and of the nearest work; records are of whole jobs. With N parameters
(read off the model's name) a forward pass takes 2N FLOP a token, and its backward pass through frozen weights to adapters as
much again; training all weights takes 6N, recomputing activations 2N more.

    language           a training text has 150 tokens, a prompt 75 (or the cutoff, if less); answers are as long as they may
                       be; CROW takes 2.5 plain steps (2.3 to 2.7 were measured), CleanGen two models' answers
    multimodal         tokens of the picture (576 for LLaVA-1.5, else 256, or as built), 60 of text (20 where the model is
                       built here) and 8 of an answer; the tower of published models is left out; a refit trains on all
                       samples, though a filter removed some
    interpretability   images * passes; a pass (forward and backward) takes 3 forward passes of the network, by its shapes.
                       A step of training: the outer pass, one more for a penalty, and the inner steps from where ε begins;
                       with integrated gradients 10 times that. Attacks: their steps times points, see `ATTACKS`

Of disk, megabytes are those that stay: adapters and weights, and pictures, of 0.3 MB where their sizes differ. At scale paper
the weights of a multimodal victim (14 GB) stay only while jobs look into them.

What this leaves out is how well work fills a machine: on a GPU, answers take longer for their FLOP than training does, and
small networks, or 200 points, leave it idle. Records of that machine and of a model of like size are worth more than any
formula.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace

from cupel.grid import Grid
from cupel.images import datasets
from cupel.robust.grid import Plan as Robust
from cupel.text.data.sources import find as known_text
from cupel.text.grid import LanguageGrid
from cupel.text.known import find as known_model
from cupel.vision_language import data as pictures
from cupel.vision_language.grid import GENERATED
from cupel.vision_language.grid import Plan as Multimodal

#: rules that take a GPU: family, and the name of the benchmark file
RULES = {
    "train_language_victim": ("language", "language_victim"), "purify_language": ("language", "language_purify"),
    "build_model": ("multimodal", "build"), "train_multimodal": ("multimodal", "victim"),
    "read_attention": ("multimodal", "attention"), "refit": ("multimodal", "refit"),
    "purify_pictures": ("multimodal", "purify_pictures"),
    "train_robust": ("interpretability", "train"), "attack_network": ("interpretability", "attack"),
}
#: other rules, by the folder of their benchmark files and these files' name
BENCHMARKS = {("poisoned", "poison"): "poison_samples", ("triggered", "trigger"): "trigger_samples",
              ("filtered", "filters"): "measure_filters", ("victims", "texts"): "compose_texts"}
REPORTS = {"language": "report_language", "multimodal": "report_multimodal", "interpretability": "report_interpretability"}

TEXT, PROMPT, CROW = 150, 75, 2.5
TALK, TALK_BUILT, ANSWER = 60, 20, 8
PICTURE = 0.3  # MB of a photograph as PNG, about; where sizes are equal they are known
#: defaults of the models that are built here, of those parameters on which their size depends
BUILT = {"tiny_llava": {"image_size": 64, "patch_size": 8, "vision_width": 96, "vision_layers": 2, "width": 128, "layers": 4},
         "smollm2_llava": {"image_size": 224, "patch_size": 14, "vision_width": 384, "vision_layers": 8}}
#: what a pass with integrated gradients costs beside a plain one
GRADIENTS = 10
#: passes of an evaluation, by its settings s and number of points n; the search for a least ε takes 11 attacks of 10 steps
ATTACKS: dict[str, Callable] = {
    "pgd": lambda s, n: n * sum(1 for eps in s["eps"] if eps) * max(s.get("steps", [200])),
    "restarts": lambda s, n: n * len(s["eps"]) * s.get("steps", 200) * s.get("restarts", 10),
    "autoattack": lambda s, n: n * len(s["eps"]) * (2 * s.get("iterations", 100) * s.get("restarts", 1)
                                                    + s.get("queries", 1000) / 3),
    "aai": lambda s, n: n * len(s["eps"]) * s.get("steps", 200),
    "bound": lambda s, n: 110 * min(s.get("count", 100), n),
    "isa": lambda s, n: 110 * n * sum(
        (1 if kind == "repr" else len(s.get("scopes", "123"))) * len(s.get("norms", "12"))
        * (1 + len(s["multipliers"]) * (GRADIENTS if kind == "ig" else 2)) for kind in s.get("kinds", ["cam"])),
    "unforeseen": lambda s, n: 6 * n * s.get("iterations", 200),
    "gallery": lambda s, n: s.get("count", 5) * (s.get("steps", 200) + 220),
    "features": lambda s, n: s.get("count", 6) * s.get("steps", 100),
}


def parameters(name: str) -> float | None:
    """Number of weights that a model's name tells, such as `llama-2-7b-chat`; None: it tells none."""
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    return float(found[-1][0]) * {"b": 1e9, "m": 1e6}[found[-1][1]] if found else None


# --- cells, each with its rule, its folder, its paper's plan, and the file that says how it went


def cells_of(grid: Grid, seeds: Iterable[int] | None = None) -> list[dict]:
    """Cells of the papers of these families, and the models that are built for them."""
    makers = {"language": _language, "multimodal": _multimodal, "interpretability": _interpretability}
    found = [cell for family, make in makers.items() for paper in grid.papers_of(family)
             for cell in make(grid, paper, grid.experiments[paper], seeds)]
    return [{"record": "metrics.json", **cell, "folder": cell["folder"].format(**cell)} for cell in found]


def _language(grid: Grid, paper: str, experiment: dict, seeds) -> list[dict]:
    plan = LanguageGrid(experiment, grid.scale, seeds, grid.known[paper])
    stem = "language/{dataset}/{model}/{recipe}/{attack}@{rate}/seed{seed}"
    kinds = {"victim": ("train_language_victim", f"victims/{stem}"),
             "purified": ("purify_language", f"purified/{stem}/{{defence}}@{{budget}}")}
    return [{**cell, "plan": plan, **dict(zip(("rule", "folder"), kinds[cell["stage"]], strict=True))} for cell in plan.cells]


def _multimodal(grid: Grid, paper: str, experiment: dict, seeds) -> list[dict]:
    plan = Multimodal(paper, experiment, grid.known[paper], grid.scale, seeds)
    stem, found = "{dataset}/{model}/{recipe}/{attack}@{rate}/seed{seed}", {}
    for cell in plan.cells:
        if cell["model"] in plan.built():
            base = {**cell, "stage": "built", "attack": "", "recipe": "", "rule": "build_model", "record": "base.json",
                    "folder": "bases/{dataset}/{model}/seed{seed}", "plan": plan}
            found.setdefault((cell["dataset"], cell["model"], cell["seed"]), base)
    for number, cell in enumerate(plan.cells):
        about = {"victim": {"rule": "train_multimodal", "folder": f"victims/{stem}"},
                 "filtered": {"rule": "read_attention", "folder": f"filtered/{stem}", "record": "attention.json"},
                 "purified": {"folder": f"purified/{stem}/{{defence}}"}}[cell["stage"]]
        if cell["stage"] == "purified":
            filtered = plan.defences[cell["defence"]]["kind"] == "filter"
            about["rule"] = "refit" if filtered else "purify_pictures"
        found[number] = {**cell, "plan": plan, **about}
    return list(found.values())


def _interpretability(grid: Grid, paper: str, experiment: dict, seeds) -> list[dict]:
    plan = Robust(paper, experiment, grid.known[paper], grid.scale, seeds)
    stem = "{dataset}/{model}/{recipe}/{method}/seed{seed}"
    return [{**cell, "plan": plan, "budget": cell["evaluation"],
             "rule": "attack_network" if cell["evaluation"] else "train_robust",
             "folder": f"attacked/{stem}/{{evaluation}}" if cell["evaluation"] else f"trained/{stem}"} for cell in plan.cells]


# --- work


def work_of(cell: dict) -> tuple[float | None, float]:
    """TeraFLOP of a cell, None where they are not known, and megabytes that stay."""
    family = {"language": _texts, "multimodal": _pictures, "interpretability": _networks}[RULES[cell["rule"]][0]]
    return family(cell["plan"], cell)


def _texts(plan: LanguageGrid, cell: dict) -> tuple[float | None, float]:
    size, settings, prompt = parameters(plan.model(cell["model"])["name"]), plan.recipe(cell), PROMPT
    data, tuning, asked = settings["data"], settings["training"], settings["evaluation"]
    text, prompt = min(data["cutoff"], TEXT), min(data["cutoff"], PROMPT)
    tests = min(data.get("test") or 200, 164 if cell["dataset"] == "codeinjection" else math.inf)
    answers = 2 * len(asked["prompts"]) * tests * (prompt + asked["max_new_tokens"])
    answers += asked.get("humaneval", 0) * (2 * PROMPT + asked.get("humaneval_tokens", 512))
    base = tests * text + 2 * (asked.get("layers") or 0) * prompt
    read = base + ((asked.get("choices") or {}).get("count", 0)) * 4 * prompt
    # tokens of forward passes
    if cell["stage"] == "victim":
        adapter, tokens = True, 2 * data["items"] * tuning["epochs"] * text + answers + read + base
    else:
        defence = plan.defence_spec(cell)
        function, clean = defence["function"], defence["budget"]["size"] * text
        adapter = function in ("finetune", "crow")
        tokens = 2 * answers if function == "cleangen" else answers + read
        if adapter:
            tokens += 2 * clean * defence["settings"]["training"]["epochs"] * (CROW if function == "crow" else 1)
        tokens += clean * (function == "wanda")
    # rank 8 on all linear layers of 32 blocks of this width
    megabytes = 1 + (tuning.get("rank", 8) * 32 * 19 * math.sqrt(size / 384) * 4 / 1e6 if adapter and size else 0)
    return 2 * size * tokens / 1e12 if size else None, megabytes


def _vision(entry: dict) -> tuple[float | None, int, int]:
    """Weights of a vision-language model, tokens of a picture, and bytes of a weight."""
    if "built" not in entry:
        name = entry.get("hub") or entry["folder"].rpartition("/")[2]
        return parameters(name.replace("_", "-")), 576 if "llava" in name.lower() else 256, 2
    own = SimpleNamespace(**{**BUILT[entry["built"]], **entry.get("parameters", {})})
    text = parameters(entry["language_model"]) if "language_model" in entry else 12 * own.layers * own.width**2
    return text + 12 * own.vision_layers * own.vision_width**2, (own.image_size // own.patch_size) ** 2, 4


def samples(plan: Multimodal, dataset: str) -> dict[str, int]:
    """Samples of a multimodal set, by split."""
    entry = plan.datasets[dataset]
    known = SimpleNamespace(drawn={}, published={}) if entry["dataset"] == GENERATED else pictures.describe(entry["dataset"])
    return {split: entry.get(split) or known.drawn.get(split) or known.published.get(split, 0)
            for split in ("train", "test")} | {"pretrain": entry.get("pretrain", 0)}


def _pictures(plan: Multimodal, cell: dict) -> tuple[float | None, float]:
    size, image, width = _vision(plan.models[cell["model"]])
    count, built = samples(plan, cell["dataset"]), "built" in plan.models[cell["model"]]
    talk = TALK_BUILT if built else TALK
    tested = 2 * count["test"] * (image + talk + ANSWER)
    if cell["rule"] == "build_model":
        settings = plan.models[cell["model"]]["pretraining"]
        rows = settings.get("questions", 1)
        tokens = 3 * settings["epochs"] * count["pretrain"] * (image / rows + talk) + tested / 2
    elif cell["rule"] == "read_attention":
        tokens = count["train"] * (image + talk)
    else:
        settings, tokens = plan.find("recipes", cell["recipe"])["settings"], tested
        if cell["rule"] != "purify_pictures":
            steps = (2 if settings.get("trained", "lora") == "lora" else 3) + bool(settings.get("recompute"))
            tokens += steps * settings["epochs"] * count["train"] * (image + talk)
    # a victim's weights are temporary at scale paper
    stays = cell["rule"] == "build_model" or (cell["rule"] == "train_multimodal" and plan.scale != "paper")
    return (2 * size * tokens / 1e12 if size else None), size * width / 1e6 if stays and size else 1.0


@functools.cache
def _network(model: str, dataset: str) -> tuple[float, float]:
    """FLOP of a forward pass of one image, and megabytes of the weights."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cupel.robust.models import blank

    about = datasets.describe(dataset)
    network = blank(model, len(about.classes), about.shape[2]).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, about.shape[2], *about.shape[:2], device="meta"))
    return float(counter.get_total_flops()), sum(value.numel() for value in network.parameters()) * 4 / 1e6


def _networks(plan: Robust, cell: dict) -> tuple[float | None, float]:
    from cupel.robust.objectives import METHODS

    flop, megabytes = _network(cell["model"], cell["dataset"])
    spec = plan.training(cell["dataset"], cell["model"], cell["recipe"], cell["method"], cell["seed"])
    if cell["evaluation"]:
        asked = plan.evaluation(cell["evaluation"], cell["dataset"])
        points = asked.get("points", {}).get("count", 200)
        return 3 * flop * sum(ATTACKS[kind](s, points) for kind, s in asked.items() if kind != "points") / 1e12, 1.0
    settings, about = spec["settings"], datasets.describe(cell["dataset"])
    trained = min(settings.get("train_size") or math.inf, (about.sizes[0] or math.inf) - settings.get("validation", 0))
    if trained == math.inf:
        return None, megabytes
    epochs, method, inner = settings["training"]["epochs"], METHODS[spec["objective"]], settings["inner"]
    steps = epochs * (trained // settings["training"].get("batch_size", 128))
    passes = 1.0
    if method.search != "none":
        share = min(1 - max(inner["ramp"][0], 0) / max(steps, 1), 1)
        dear = GRADIENTS if spec["objective"] in ("ig", "igsum", "intig", "intigadv") else 1
        if spec["objective"].startswith("intig") and not spec["parameters"].get("as_released", True):
            dear *= len(about.classes)  # attributions of every class
        passes += max(share, 0) * dear * (inner["steps"] + bool(method.penalty))
    return 3 * flop * epochs * trained * passes / 1e12, megabytes


# --- what is beside the cells


def others(cells: Iterable[dict]) -> dict[str, tuple[int, float]]:
    """Jobs of the rules that make no cells: how many, and megabytes of all of them."""
    cells, found = list(cells), {}
    by = {rule: [cell for cell in cells if cell["rule"] == rule] for rule in RULES}
    language = by["train_language_victim"] + by["purify_language"]
    models = {cell["model"]: 2 * (parameters(cell["plan"].model(cell["model"])["name"]) or 0) / 1e6 for cell in language}
    victims = by["train_multimodal"]
    plans = {cell["dataset"]: cell["plan"] for cell in victims}
    sets = {name: samples(plan, name) for name, plan in plans.items()}
    size = {name: _megabytes(plan.datasets[name]["dataset"]) for name, plan in plans.items()}

    def distinct(*keys: str) -> list[tuple]:
        return list({tuple(cell[key] for key in keys) for cell in victims})

    found["prepare_text"] = len({text for cell in language for text in cell["plan"].texts(cell)}), 0.0
    found["prepare_language_model"] = len(models), sum(models.values())
    found["compose_texts"] = len(by["train_language_victim"]), float(len(by["train_language_victim"]))
    found["prepare_multimodal"] = len(sets), sum(size[name] * sum(count.values()) for name, count in sets.items())
    for rule, split, keys in (("poison_samples", "train", ("dataset", "attack", "rate", "seed")),
                              ("trigger_samples", "test", ("dataset", "attack", "seed"))):
        jobs = distinct(*keys)
        found[rule] = len(jobs), sum(size[job[0]] * sets[job[0]][split] for job in jobs)
    found["measure_filters"] = len(by["read_attention"]), 0.0
    return {rule: entry for rule, entry in found.items() if entry[0]}


def _megabytes(dataset: str) -> float:
    """Of one picture."""
    size = (64, 64) if dataset == GENERATED else pictures.describe(dataset).size
    return math.prod(size) * 3 / 1e6 if size else PICTURE


def sources_of(cells: Iterable[dict]) -> tuple[dict[str, tuple], list[tuple]]:
    """What is fetched for cells: sources by data set or model; and models of the hub as (key, what, megabytes, False), of
    which the size is 2 bytes a weight."""
    named, hub = {}, {}
    for cell in cells:
        plan, key = cell["plan"], cell["model"]
        if isinstance(plan, LanguageGrid):
            named |= {text: known_text(text).sources for text in plan.texts(cell)}
            _model(key, plan.model(key)["name"], named, hub)
        elif isinstance(plan, Multimodal):
            entry, dataset = plan.models[key], plan.datasets[cell["dataset"]]
            if dataset["dataset"] != GENERATED:
                about = pictures.describe(dataset["dataset"])
                named[cell["dataset"]] = about.excerpts if dataset.get("excerpt") else about.sources
            if "hub" in entry:
                hub[key] = (f"{entry['hub']} of the hub", parameters(entry["hub"].replace("_", "-")))
            elif "language_model" in entry:
                _model(entry["language_model"], entry["language_model"], named, hub)
        else:
            named[cell["dataset"]] = datasets.describe(cell["dataset"]).sources
    return named, [(key, f"{what} (estimate)", 2 * size / 1e6 if size else None, False) for key, (what, size) in hub.items()]


def _model(key: str, name: str, named: dict, hub: dict) -> None:
    if name in named or key in hub:
        return
    known = known_model(name)
    if known.sources:
        named[name] = known.sources
    elif known.hub:
        gated = {True: ", gated", False: "", None: ", perhaps gated"}[known.gated]
        hub[key] = (f"{known.hub} of the hub{gated}", parameters(name))
