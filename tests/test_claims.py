"""Verdicts: what may be averaged, what a verdict needs, and what must never earn one."""

import itertools

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import t, ttest_1samp

from cupel.evaluation import agreement
from cupel.evaluation.claims import NOT_COMPARED, SEEDS, judge, judge_all
from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import destroyed
from cupel.evaluation.settings import validity
from cupel.evaluation.variation import least_effect, mean_effect
from cupel.experiment import PAPERS, Grid
from cupel.reporting.evidence import not_reproduced
from cupel.reporting.paper import load
from cupel.settings import ConfigError, read_yaml
from tests.conftest import REPOSITORY

BLANK = {"paper": "p", "stage": "purified", "dataset": "d", "model": "m", "recipe": "r", "attack": "a", "attack_variant": "",
         "poison_rate": 0.01, "defence": "", "variant": "", "budget": "", "status": "ok", "reason": ""}
CLAIM = {"id": "c", "statement": "s", "source": "x", "scales": ["demo"],
         "test": {"over": "mean", "metric": "asr", "where": {"variant": ""}, "a": {"defence": "ft"}, "b": {"defence": "fst"},
                  "margin": 0.1}}


def rows(values, **names):
    """A cell: one row per metric."""
    base = {**BLANK, **names}
    path = "/".join(str(base[key]) for key in ("attack", "poison_rate", "recipe", "defence", "variant", "budget", "seed"))
    made = []
    for metric, value in values.items():
        low, high = wilson(round(value * 9000), 9000)
        made.append({**base, "metric": metric, "value": value, "n": 9000, "low": low, "high": high, "path": path})
    return made


def grid(left, attacks=("a0", "a1", "a2"), seeds=(0, 1, 2), budgets=("b",), victim=(0.86, 0.97)):
    """Victims and purified models: `left(defence, attack, seed, budget)` is the ASR, or (ASR, ACC), that is left."""
    made = []
    for attack, seed in itertools.product(attacks, seeds):
        made += rows({"acc": victim[0], "asr": victim[1]}, stage="victim", attack=attack, seed=seed)
        for budget, defence in itertools.product(budgets, ("ft", "fst")):
            asr, acc = np.broadcast_to(left(defence, attack, seed, budget), 2) if np.ndim(left(defence, attack, seed, budget)) \
                else (left(defence, attack, seed, budget), 0.84)
            made += rows({"asr": asr, "acc": acc}, attack=attack, seed=seed, budget=budget, defence=defence)
    return pd.DataFrame(made)


def strong(defence, attack, seed, budget):
    """FT leaves nine tenths, FST almost nothing, with a little noise."""
    noise = 0.02 * ((seed * 7 + int(attack[1]) * 3) % 5 - 2) / 2
    return (0.9 if defence == "ft" else 0.05) + noise


def changed(claim=CLAIM, **test):
    return {**claim, "test": {**{k: v for k, v in claim["test"].items() if test.get(k, 0) is not None},
                              **{k: v for k, v in test.items() if v is not None}}}


EVERY = changed(over="every", a={"defence": "fst"}, b=None, constant=0.1, direction="less", margin=0.0)


def test_an_effect_is_found_and_counted():
    found = judge(CLAIM, grid(strong), "demo")
    assert (found.verdict, found.direction, found.n, found.settings) == ("supported", "for", 9, 3)
    assert found.effect.seeds == 3 and found.effect.low < 0.85 == pytest.approx(found.effect.value, abs=0.02)
    assert judge(changed(a={"defence": "fst"}, b={"defence": "ft"}), grid(strong), "demo").verdict == "refuted"
    assert judge(CLAIM, grid(strong), "paper").verdict == "not judged"
    assert judge(EVERY, grid(strong), "demo").verdict == "supported"


def test_fewer_than_three_trainings_give_no_verdict():
    for seeds in ((0,), (0, 1)):
        for claim in (CLAIM, EVERY):
            found = judge(claim, grid(strong, seeds=seeds), "demo")
            assert (found.direction, found.effect.seeds) == ("for", len(seeds))
            assert found.verdict == ("indicated" if found.effect.low > claim["test"]["margin"] else "open")
    assert judge(CLAIM, grid(strong, seeds=(0,)), "demo").verdict == "indicated"


def test_one_training_of_a_metric_without_counts_has_no_interval_and_indicates():
    """An AUROC is no share of anything."""
    table = grid(strong, seeds=(0,)).assign(n=0, low=np.nan, high=np.nan)
    found = judge(CLAIM, table, "demo", {})
    assert found.verdict == "indicated" and np.isnan(found.effect.low)


@pytest.mark.parametrize("claim", [CLAIM, EVERY])
def test_mutations_take_the_support_away(claim):
    """An effect that is gone, one deviant seed, one deviant budget."""
    assert judge(claim, grid(strong, budgets=("b", "c")), "demo").verdict == "supported"
    gone = grid(lambda *cell: strong("ft", *cell[1:]))
    assert judge(claim, gone, "demo").verdict == "refuted"
    seed = grid(lambda *cell: 0.93 if cell[0] == "fst" and cell[2] == 1 else strong(*cell))
    assert judge(claim, seed, "demo").verdict == "open"
    budget = grid(lambda *cell: 0.93 if cell[0] == "fst" and cell[3] == "c" else strong(*cell), budgets=("b", "c"))
    found = judge(claim, budget, "demo")
    assert found.least_in.split()[-1] == "c" and found.least < 0
    assert judge(EVERY, budget, "demo").verdict == "refuted"


def test_one_bad_setting_refutes_every_and_not_the_mean():
    table = grid(lambda *cell: strong("ft", *cell[1:]) if cell[1] == "a1" else strong(*cell))
    assert judge(EVERY, table, "demo").verdict == "refuted" and "a1" in judge(EVERY, table, "demo").least_in
    assert judge(CLAIM, table, "demo").verdict == "supported"


def test_one_counterexample_refutes_every_however_few_settings_were_run():
    table = grid(lambda *cell: strong("ft", *cell[1:]) if cell[1] == "a1" else strong(*cell))
    table.loc[(table.defence == "fst") & (table.attack == "a2"), ["status", "value"]] = ["not run", np.nan]
    assert judge({**EVERY, "min_settings": 9}, table, "demo").verdict == "refuted"
    assert judge({**EVERY, "min_settings": 9}, table[table.attack == "a0"], "demo").verdict == "indicated"
    assert judge({**changed(EVERY, over="mean"), "min_settings": 9}, table, "demo").verdict != "refuted"


def test_nothing_is_averaged_that_the_claim_does_not_name():
    """Two budgets are two settings, two recipes likewise; two variants of one side are refused, or pooled where it says so."""
    assert judge(CLAIM, grid(strong, budgets=("b", "c")), "demo").settings == 6
    other = grid(strong).assign(recipe="other", path=lambda found: "other/" + found.path)
    assert judge(CLAIM, pd.concat([grid(strong), other]), "demo").settings == 6
    several = grid(strong)
    twice = pd.concat([several, several[several.defence == "ft"].assign(variant="v", value=0.3, path="v")])
    found = judge(changed(where=None), twice, "demo")
    assert found.verdict == "not judged" and "variant" in found.reason
    pooled = judge(changed(where=None, pooled=["variant"]), twice, "demo")
    assert pooled.effect.value == pytest.approx((judge(CLAIM, several, "demo").effect.value + 0.25) / 2, abs=0.01)


def test_means_over_matched_variants_are_not_compared_while_one_is_missing():
    table = grid(strong)
    test = changed(a={"defence": ["ft", "fst"]}, b={"defence": ["fst", "ft"]}, pooled=["defence"])
    assert judge(test, table, "demo").verdict != "not judged"
    table.loc[(table.defence == "fst") & (table.seed == 0), ["status", "value"]] = ["not run", np.nan]
    assert judge(test, table, "demo").verdict == "not judged"


def test_pooled_cells_are_the_same_for_every_seed():
    """A defence that ran for one seed only is no part of the mean."""
    several = grid(strong)
    one = several[(several.defence == "ft") & (several.seed == 0)].assign(defence="lp", value=0.0, path="lp")
    claim = changed(a={"defence": ["ft", "lp"]}, pooled=["defence"])
    assert judge(claim, pd.concat([several, one]), "demo").effect.value == judge(CLAIM, several, "demo").effect.value


def test_a_victim_without_backdoor_earns_nobody_credit():
    weak = grid(strong)
    weak.loc[(weak.stage == "victim") & (weak.attack == "a1") & (weak.seed == 1) & (weak.metric == "asr"), "value"] = 0.5
    assert not validity(weak).query("attack == 'a1' and seed == 1").implanted.any()
    found = judge(CLAIM, weak, "demo")
    assert (found.verdict, found.settings) == ("supported", 2) and "a1" in found.reason  # too few trainings of a1 are left
    assert judge({**CLAIM, "min_settings": 3}, weak, "demo").verdict == "indicated"
    assert judge(changed(gated=False), weak, "demo").settings == 3
    none = judge(CLAIM, grid(strong, victim=(0.1, 1.0)), "demo")
    assert none.verdict == "not judged"
    row = pd.DataFrame([{"verdict": none.verdict, "test": none.reason}])
    assert not_reproduced(row, {})[0]["why"] == "none of its settings was run with a valid victim"
    assert judge(CLAIM, grid(strong, victim=(0.86, 0.5)), "demo", {"asr": 0.4}).verdict == "supported"


def test_a_destroyed_network_supports_nothing():
    found = judge(CLAIM, grid(lambda *cell: (strong(*cell), 0.3) if cell[0] == "fst" and cell[1] == "a0" else strong(*cell)),
                  "demo")
    assert found.verdict == "open" and "destroyed" in found.reason


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("compared", "verdict"), [("ft", ["open", "open"]), (["ft"], ["indicated", "supported"])])
def test_a_destroyed_network_indicates_nothing_either_and_one_of_several_compared_with_counts(seeds, compared, verdict):
    table = grid(lambda *cell: (strong(*cell), 0.3) if cell[0] == "ft" and cell[1] == "a0" else strong(*cell))
    claim = {**CLAIM, "test": {**CLAIM["test"], "a": {**CLAIM["test"]["a"], "defence": compared}}}
    found = judge(claim, table[table.seed < seeds], "demo")
    assert found.verdict == verdict[seeds == 3] and "destroyed: a0" in found.reason


def test_a_claim_of_several_defences_alone_is_no_comparison_with_them():
    several = changed(EVERY, a={"defence": ["fst"]})
    table = grid(lambda *cell: (strong(*cell), 0.3) if cell[0] == "fst" and cell[1] == "a0" else strong(*cell))
    assert judge(several, grid(strong), "demo").verdict == "supported" and judge(several, table, "demo").verdict == "open"


@pytest.mark.parametrize(("metric", "worth"), [("cp", lambda acc: acc), ("perplexity", lambda acc: 9 / acc)])
def test_models_of_other_families_are_destroyed_as_well(metric, worth):
    """By clean performance, and by a perplexity above one and a half times the victim's."""
    table = grid(lambda *cell: (strong(*cell), {"a0": 0.3, "a1": 0.7}[cell[1]]) if cell[0] == "fst" and cell[1] != "a2"
                 else strong(*cell))
    use = table.metric == "acc"
    table = table.assign(metric=table.metric.where(~use, metric), value=table.value.where(~use, worth(table.value)))
    gone = validity(table, {"asr": 0.8}).query("destroyed")
    assert set(gone.attack) == {"a0"} and set(gone.defence) == {"fst"}
    found = judge(CLAIM, table, "demo", {"asr": 0.8})
    assert found.verdict == "open" and "destroyed: a0" in found.reason


def test_a_record_says_whether_a_model_was_destroyed():
    assert destroyed({"cp": 0.75}, {"cp": 0.49}) and not destroyed({"cp": 0.75, "asr": 1.0}, {"cp": 0.51, "asr": 0.0})
    assert destroyed({"perplexity": 8.0}, {"perplexity": 12.1}) and not destroyed({"perplexity": 8.0}, {"perplexity": 11.9})
    assert not destroyed({"perplexity": 8.0}, {"asr_template_all": 0.0})  # the defence left the weights alone


def test_runs_that_are_not_there_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        agreement.main([str(tmp_path), str(tmp_path / "none")])
    assert f"there is no {tmp_path}/cells.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"a": {"defnce": "ft"}}, {"where": {"atack": "a"}}, {"pooled": ["attacks"]}])
def test_a_column_that_is_none_is_refused_before_the_first_job(tmp_path, change):
    content = read_yaml(PAPERS / "fst" / "claims.yaml")
    content["claims"][0]["test"] |= change
    (tmp_path / "fst").mkdir()
    (tmp_path / "shared").symlink_to(PAPERS / "shared")
    (tmp_path / "fst" / "experiment.yaml").symlink_to(PAPERS / "fst" / "experiment.yaml")
    (tmp_path / "fst" / "claims.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"claims\.0\.test.*is not allowed; allowed are stage, dataset"):
        Grid(["fst"], "smoke", folder=tmp_path).claims("fst")


def test_a_failed_cell_supports_nothing():
    table = grid(strong)
    table.loc[(table.defence == "fst") & (table.attack == "a2"), ["status", "value"]] = ["failed", np.nan]
    found = judge(CLAIM, table, "demo")
    assert found.verdict == "open" and "failed: a2" in found.reason


def test_what_was_not_run_leaves_an_indication():
    table = grid(strong)
    table.loc[(table.defence == "fst") & (table.attack == "a2"), ["status", "value"]] = ["not run", np.nan]
    found = judge(CLAIM, table, "demo")
    assert (found.verdict, found.direction, found.settings) == ("indicated", "for", 2) and "not run: a2" in found.reason


def test_a_defence_beside_its_victim_at_several_budgets():
    claim = changed(a={"defence": "fst"}, b={"stage": "victim"}, metric="acc", margin=-0.05)
    found = judge(claim, grid(strong, budgets=("b", "c")), "demo")
    assert (found.settings, found.verdict) == (6, "supported") and found.effect.value == pytest.approx(-0.02)


def test_equal_values_have_no_interval_of_zero_width():
    found = judge(CLAIM, grid(lambda defence, *_: 1.0 if defence == "ft" else 0.0), "demo").effect
    assert found.low < found.value


def test_intervals_are_those_of_students_t():
    values, none = np.random.default_rng(0).normal(0.3, 0.1, (4, 5)), np.zeros((4, 5))
    one, expected = mean_effect(values[:1], none[:1]), ttest_1samp(values[0], 0).confidence_interval(0.95)
    assert np.allclose((one.low, one.high), expected)
    shared = np.tile(values[:1], (4, 1))  # settings that vary alike: no more is known than from one
    assert np.allclose((mean_effect(shared, none).low, mean_effect(shared, none).high), expected)
    opposite = np.concatenate([values[:1], -values[:1]])  # blocks that cancel: as independent settings would
    half = t.isf(0.025, 4) * values[0].std(ddof=1) / np.sqrt(2 * 5)
    assert mean_effect(opposite, none[:2]).high == pytest.approx(half)
    least, worst = least_effect(values, none), values.std(1, ddof=1) / np.sqrt(5)
    assert least.low == pytest.approx((values.mean(1) - t.isf(0.025, 4) * worst).min())
    assert least.high == pytest.approx((values.mean(1) + t.isf(0.025 / 4, 4) * worst).min())
    tested = mean_effect(values[:1], np.full((1, 5), 0.2))
    assert tested.high - tested.value == pytest.approx(np.hypot(one.high - one.value, 1.96 * 0.2), abs=1e-3)


def test_verdicts_at_the_line_are_rarely_wrong():
    """A small run of benchmarks/verdicts.py; what it replaces is wrong several times as often."""
    simulation = load(REPOSITORY / "benchmarks" / "verdicts.py")
    for world in ("even", "uneven", "shared"):
        found = simulation.intervals(world, np.zeros(2), 3, 150)
        wrong = {name: ((bounds[:, 0] > 0) | (bounds[:, 1] < 0)).mean() for name, bounds in found.items()}
        assert wrong["t, mean"] <= 0.08 < 2 * 0.08 < wrong["bootstrap"]  # 5 %, and the error of 150 trials


GRIDS = [(paper, scale) for paper in ("fst", "ims", "ims_inner_step", "crow", "bye", "proper_interpretability")
         for scale in ("demo", "desk", "bench", "paper")]


@pytest.mark.parametrize("paper,scale", GRIDS)
def test_every_claim_finds_its_cells_in_every_grid_that_it_names(paper, scale):
    """With every metric measured in every planned cell, no claim finds several cells where it needs one, or none at a scale
    that it names."""
    content = read_yaml(PAPERS / paper / "claims.yaml")
    if scale not in read_yaml(PAPERS / paper / "experiment.yaml")["scales"]:
        pytest.skip(f"{paper} has no scale {scale}")
    planned = Grid([paper], scale).of_paper(paper)
    tests = [claim["test"] for claim in content["claims"]]
    sides = [side for test in tests for side in (test, test["a"], test.get("b", {}))]
    metrics = sorted({side["metric"] for side in sides if "metric" in side} | {"acc"})
    made = []
    for cell in planned:
        (attack, _, kind), (defence, _, variant) = cell["attack"].partition("~"), cell.get("defence", "").partition("~")
        made += rows({metric: 0.0 if metric.startswith("false_") else 0.9 for metric in metrics}, **{
            **cell, "attack": attack, "attack_variant": kind, "defence": defence, "variant": variant,
            "budget": cell.get("budget", ""), "poison_rate": float(cell["rate"]), "paper": paper})
    found = judge_all(content, pd.DataFrame(made), paper, scale)
    assert not found.test.str.contains("several cells").any(), found[["claim", "test"]].to_dict("records")
    assert (found.seeds >= SEEDS).sum() or scale != "desk"
    if paper not in ("bye", "proper_interpretability"):  # what filters and attacks measure is not planned as a cell
        assert not found.claim[found.test.str.startswith(NOT_COMPARED)].tolist()


def test_two_runs_are_compared_cell_by_cell_and_verdict_by_verdict(tmp_path, capsys):
    content, runs = {"claims": [CLAIM, {**EVERY, "id": "every"}]}, {}
    for name, left, seeds in (("a", strong, (0, 1, 2)), ("b", lambda *cell: strong("ft", *cell[1:]), (0, 1, 2)),
                              ("c", strong, (3, 4, 5))):
        table = grid(left, seeds=seeds).assign(device="cpu", precision="bf16", threads=2.0)
        runs[name] = tmp_path / name
        runs[name].mkdir()
        table.to_parquet(runs[name] / "cells.parquet")
        judge_all(content, table, "p", "demo").to_csv(runs[name] / "claims.csv", index=False)
    assert agreement.main([str(runs["a"]), str(runs["b"]), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "54 cells" not in said and "27 cells on cpu, bf16, 2 threads" in said and "2 flip between" in said
    cells = pd.read_csv(tmp_path / "agreement.csv")
    assert set(cells.defence[cells.apart]) == {"fst"} and (cells.difference[~cells.apart] == 0).all()
    assert agreement.main([str(runs["a"]), str(runs["c"]), "--out", str(tmp_path)]) == 0
    assert "0 differ" in capsys.readouterr().out and len(pd.read_csv(tmp_path / "agreement.csv")) == 3 * 3 * 2


def test_a_number_that_failed_in_one_run_and_is_not_in_the_other_is_no_number_of_either():
    first = grid(strong, seeds=(0,))
    second = first[first.defence != "fst"]
    assert agreement.single(agreement.compare_cells(first, second)).sum() == 6
    first.loc[first.defence == "fst", ["status", "value"]] = "failed", np.nan
    assert not agreement.single(agreement.compare_cells(first, second)).any()


def test_a_direction_that_turns_is_said():
    both = [judge_all({"claims": [CLAIM]}, grid(left, seeds=(0,)), "p", "demo")
            for left in (strong, lambda *cell: strong("ft", *cell[1:]))]
    assert list(agreement.compare_claims(*both).change) == ["direction"]
