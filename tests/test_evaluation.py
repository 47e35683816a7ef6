"""Rates, intervals, derived metrics and verdicts."""

import numpy as np
import pytest
from scipy.stats import binomtest

from cupel.evaluation.intervals import wilson
from cupel.evaluation.metrics import arr, confusion, der, rates, rdr
from cupel.evaluation.redirection import redirected
from cupel.rng import rng


@pytest.mark.parametrize("k,n", [(0, 10), (3, 10), (10, 10), (57, 1800)])
def test_wilson_equals_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert np.allclose(wilson(k, n), (expected.low, expected.high))


def test_rates_by_hand():
    found = rates(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), np.array([0, 0, 2]), np.array([0, 0, 0]), np.array([1, 2, 2]))
    assert (found["acc"].value, found["asr"].value, found["ra"].value) == (0.75, 2 / 3, 1 / 3)
    assert found["asr"].n == 3 and found["asr"].record("asr")["asr_n"] == 3


def test_where_triggered_images_go():
    """Classes 1 to 3, ten images each, target 0: half of them go to class 2, of which it keeps its own."""
    true = np.repeat([1, 2, 3], 10)
    taken = np.where(np.arange(30) % 2, 2, true)
    found = redirected({"triggered": confusion(true, taken, 4).tolist()})
    assert found["redirected"] == pytest.approx(10 / 30) and found["redirected_n"] == 30
    hits = redirected({"triggered": confusion(true, np.zeros(30, int), 4).tolist()})
    assert hits["redirected"] == 0  # the target is no other class
    assert redirected({}) == redirected({"triggered": confusion(np.arange(4), np.arange(4), 4).tolist()}) == {}


def test_derived_metrics_have_the_documented_signs():
    assert der(0.9, 0.9, 1.0, 1.0) == 0.5 and der(0.9, 0.9, 1.0, 0.0) == 1.0
    assert der(0.9, 0.5, 1.0, 0.0) == pytest.approx(0.8)
    assert arr(0.8, 0.6) == pytest.approx(0.25) and rdr(0.8, 0.2) == pytest.approx(0.75) and arr(0.8, 0.9) < 0


def test_effects_are_the_derived_rates_with_intervals_that_shrink():
    from cupel.evaluation.metrics import effects

    def record(n):
        return ({"acc": 0.9, "acc_n": n, "asr": 0.95, "asr_n": n}, {"acc": 0.85, "acc_n": n, "asr": 0.1, "asr_n": n, "ra": 0.8})

    widths = []
    for n in (200, 20000):
        before, after = record(n)
        found = effects(before, {**after, "ra_n": n}, rng(0, "test"))
        assert found["der"] == der(0.9, 0.85, 0.95, 0.1)
        assert found["arr"] == arr(0.9, 0.85)
        assert found["rdr"] == rdr(0.9, 0.8)
        for name in ("der", "arr", "rdr"):
            assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
        widths.append(found["arr_high"] - found["arr_low"])
    # the ratio's delta-method error, four standard errors wide
    expected = 2 * 1.96 * np.sqrt(0.85 * 0.15 / 0.9**2 + 0.85**2 * 0.9 * 0.1 / 0.9**4) / np.sqrt(20000)
    assert widths[1] == pytest.approx(expected, rel=0.1)
    assert widths[0] == pytest.approx(10 * widths[1], rel=0.1)


def test_gather_reads_rows_and_named_metrics(tmp_path):
    from cupel.files import write_json
    from cupel.reporting.tables import gather, misfit

    cell = {"paper": "p", "stage": "trained", "dataset": "mnist", "model": "small", "recipe": "r", "attack": "none",
            "rate": "0", "seed": "0", "defence": "int", "budget": ""}
    base = {**cell, "attack_variant": "", "poison_rate": 0.0, "variant": "", "seed": 0, "status": "ok"}
    write_json(tmp_path / "a" / "metrics.json", {**base, "rows": [
        {"metric": "acc", "value": 0.5, "n": 10, "low": 0.2, "high": 0.8},
        {"metric": "acc", "value": 0.25, "n": 10, "low": 0.1, "high": 0.5, "attack": "pgd", "attack_variant": "0.3"}]})
    write_json(tmp_path / "b" / "metrics.json", {**base, "metrics": ["perplexity", "acc"], "perplexity": 12.5, "acc": 0.5,
                                                  "acc_n": 4})
    write_json(tmp_path / "c" / "metrics.json", {**base, "acc": 0.5, "acc_n": 4, "acc_before": 0.5, "acc_stage_2": 0.25,
                                                  "acc_stage_2_n": 4, "acc_stage_2_low": 0.1, "acc_stage_2_high": 0.7})
    write_json(tmp_path / "pictures" / "metrics.json", {**base, "rows": []})
    expected = [{**cell, "folder": str(tmp_path / name)} for name in ("a", "b", "c", "missing", "pictures")]
    table = gather(expected)
    assert not misfit(table, expected) and table.path.iloc[-1].endswith("pictures") and np.isnan(table.value.iloc[-1])
    assert table[table.path.str.endswith("a")][["attack", "attack_variant", "value"]].values.tolist() == [
        ["none", "", 0.5], ["pgd", "0.3", 0.25]]
    second = table[table.path.str.endswith("b")].set_index("metric")
    assert second.value.to_dict() == {"perplexity": 12.5, "acc": 0.5}
    assert second.n.to_dict() == {"perplexity": 0, "acc": 4}
    third = table[table.path.str.endswith("c")]
    assert third[["metric", "value", "n"]].values.tolist() == [["acc", 0.5, 4], ["acc_stage_2", 0.25, 4]]
    assert set(table[table.path.str.endswith("missing")].status) == {"not run"}


def test_each_paper_has_its_own_gate_and_readers_are_told_the_same_everywhere(tmp_path):
    from cupel.evaluation.settings import NO_VICTIM, validity
    from cupel.files import write_json
    from cupel.reporting.evidence import cells_behind
    from cupel.reporting.tables import MARKS, gather, marked, summary, with_names

    cells = []
    for stage, defence in (("victim", ""), ("purified", "ft")):
        cell = {"stage": stage, "dataset": "d", "model": "m", "recipe": "r", "attack": "badnets", "attack_variant": "",
                "poison_rate": 0.1, "defence": defence, "variant": "", "budget": "", "seed": 0, "status": "ok",
                "acc": 0.9, "acc_n": 100, "asr": 0.7, "asr_n": 100}
        write_json(tmp_path / stage / "metrics.json", cell)
        cells += [{"paper": paper, "folder": str(tmp_path / stage)} for paper in ("strict", "lax")]
    table = gather(cells, {"lax": {"asr": 0.6}})
    assert table.groupby("paper").valid.agg(["all", "any"]).to_numpy().tolist() == [[True, True], [False, False]]
    shown = marked(summary(with_names(table[table.paper == "strict"], {})))
    assert shown.setting.str.endswith("‡").all() and NO_VICTIM in MARKS
    assert not marked(summary(with_names(table[table.paper == "lax"], {}))).setting.str.endswith("‡").any()
    claim = {"test": {"metric": "asr", "over": "mean", "a": {"stage": "purified"}, "constant": 0.5}}
    strict = table[table.paper == "strict"]
    assert [row["state"] for row in cells_behind(claim, strict, {"asr": 0.8}, str)] == [NO_VICTIM]
    assert [row["state"] for row in cells_behind(claim, strict, {"asr": 0.6}, str)] == ["counts"]
    # of a rate that should be low the gate is the highest
    noisy = strict.assign(metric=strict.metric.replace("acc", "false_clean"))
    assert [validity(noisy, {"false_clean": bound}).implanted.all() for bound in (0.89, 0.9)] == [False, True]
