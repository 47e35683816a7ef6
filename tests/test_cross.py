"""The cross table: means, shared and failed cells, ranks, Pareto fronts, and the page."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from cupel.evaluation.metrics import der
from cupel.files import write_json
from cupel.reporting import cross as c
from cupel.reporting.evidence import best_buys
from cupel.reporting.tables import gather
from cupel.rng import rng

LABELS = {"ft": "FT", "fst": "FST", "anp": "ANP"}
ACC, ASR = 0.9, 1.0


@pytest.fixture
def make(tmp_path):
    """Builds a tidy table from entries (attack, defence, asr or reason) through real records on disk."""

    def build(entries, papers=("fst",), victims="ok", budgets=("heldout",), seeds=(0,), absent=(), recipe="r"):
        cells = []

        def cell(stage, attack, seed, **more):
            name = "_".join([stage, recipe, attack, str(seed), *more.values()])
            identity = {"stage": stage, "dataset": "cifar10", "model": "net", "recipe": recipe, "attack": attack, "seed": seed,
                        "rate": "0.1", "defence": "", "budget": "", **more}
            cells.extend({**identity, "paper": paper, "folder": str(tmp_path / name)} for paper in papers)
            return tmp_path / name / "metrics.json", {k: v for k, v in identity.items() if k != "rate"} | {
                "attack_variant": "", "variant": "", "poison_rate": 0.1}

        for attack in dict.fromkeys(attack for attack, _, _ in entries):
            for seed in seeds:
                path, record = cell("victim", attack, seed)
                values = {"acc": ACC, "asr": ASR, "ra": 0.0} if victims == "ok" else {"reason": "Diverged"}
                write_json(path, {**record, **values, "status": victims})
        for attack, defence, result in entries:
            for seed in seeds:
                for budget in budgets:
                    path, record = cell("purified", attack, seed, defence=defence, budget=budget)
                    if defence in absent:
                        continue
                    if isinstance(result, str):
                        write_json(path, {**record, "status": "failed", "reason": result})
                        continue
                    asr = result + 0.01 * seed
                    write_json(path, {**record, "status": "ok", "acc": 0.8, "asr": asr, "ra": 0.5, "arr": 0.1, "rdr": 0.4,
                                      "der": der(ACC, 0.8, ASR, asr), "seconds": 2.0 + len(defence), "clean_samples": 50,
                                      "peak_memory_mb": 100.0, "peak_vram_mb": 0.0})
        return gather(cells)

    return build


GRID = [("badnets", "ft", 0.9), ("badnets", "fst", 0.1), ("badnets", "anp", 0.5),
        ("blended", "ft", 0.2), ("blended", "fst", 0.2), ("blended", "anp", 0.4),
        ("wanet", "ft", 0.3), ("wanet", "fst", 0.1), ("wanet", "anp", 0.05)]


def test_the_best_buy_of_a_budget(make):
    def buys(cells):
        return best_buys(c.cross_table(cells, LABELS), {"heldout": ["demo"], "spc100": ["bench", "paper"]})

    found, absent = buys(make(GRID))
    assert (found["best"], found["settings"], found["defences"], found["images"]) == ("FST", 3, 3, 50)
    assert found["der"] == pytest.approx(np.mean([der(ACC, 0.8, ASR, asr) for asr in (0.1, 0.2, 0.1)]))
    assert found["near"] == ["ANP", "FT"]
    assert absent["why"] == "not enough cells to say: not run; it is at scale bench, paper"
    assert buys(make(GRID[:3]))[0]["why"] == "not enough cells to say: 3 defences in 1 setting in common"


def test_gather_keeps_the_costs(make):
    cells = make(GRID[:1])
    assert set(cells.clean_samples[cells.stage == "purified"]) == {50}
    assert cells.clean_samples[cells.stage == "victim"].isna().all()
    assert set(cells.peak_vram_mb.dropna()) == {0.0}


def test_rows_are_means_over_seeds_and_shared_cells_count_once(make):
    table = c.cross_table(make(GRID, papers=("fst", "ims"), seeds=(0, 1)), LABELS)
    assert len(table) == 9 and set(table.papers) == {"fst, ims"} and set(table.seeds) == set(table.planned) == {2}
    row = table[(table.attack == "badnets") & (table.method == "fst")].iloc[0]
    assert row.asr == pytest.approx(0.105) and row.asr_victim == ASR and row.acc_victim == ACC and row.label == "FST"
    assert row.der == pytest.approx((der(ACC, 0.8, ASR, 0.1) + der(ACC, 0.8, ASR, 0.11)) / 2)
    assert (row.clean_samples, row.seconds, row.peak_memory_mb, row.failed) == (50, 5, 100, False)


def test_columns_are_asked_for(make):
    with pytest.raises(ValueError, match="clean_samples"):
        c.cross_table(make(GRID).drop(columns="clean_samples"), LABELS)


def test_same_labels_are_told_apart(make):
    assert set(c.cross_table(make(GRID[:2]), {"ft": "FT", "fst": "FT"}).label) == {"FT (ft)", "FT (fst)"}


def test_ranks_by_hand(make):
    table = c.cross_table(make(GRID), LABELS)
    ranking = c.ranks(table, rng=rng(0))
    expected = np.mean([rankdata([0.9, 0.1, 0.5]), rankdata([0.2, 0.2, 0.4]), rankdata([0.3, 0.1, 0.05])], axis=0)
    found = ranking.table.set_index("method")
    assert np.allclose(found["rank"].loc[["ft", "fst", "anp"]], expected) and ranking.settings == ranking.victims == 3
    assert ranking.table.method[0] == "fst" and ((found.low <= found["rank"]) & (found["rank"] <= found.high)).all()
    assert ranking.table.equals(c.ranks(table, rng=rng(0)).table)


def test_interval_is_that_of_the_mean_of_ranks(make):
    """Many settings, two defences: the bootstrap interval is that of a share."""
    entries = [(f"a{k}", d, asr) for k in range(60) for d, asr in (("ft", 0.5), ("fst", 0.1 if k % 4 else 0.9))]
    found = c.ranks(c.cross_table(make(entries), LABELS), rng=rng(0)).table.set_index("method").loc["fst"]
    half = 1.96 * np.sqrt(0.25 * 0.75 / 60)
    assert found["rank"] == 1.25 and [found.low, found.high] == pytest.approx([1.25 - half, 1.25 + half], abs=0.02)


def test_failed_cells_rank_last_and_keep_their_reason(make):
    entries = [(a, d, "Diverged: loss nan" if (a, d) == ("badnets", "fst") else v) for a, d, v in GRID]
    table = c.cross_table(make(entries), LABELS)
    row = table[(table.attack == "badnets") & (table.method == "fst")].iloc[0]
    assert row.failed and row.failed_seeds == 1 and row.seeds == 0 and np.isnan(row.acc) and row.acc_victim == ACC
    assert "Diverged" in row.reason
    found = c.ranks(table, rng=rng(0)).table.set_index("method")
    assert found["rank"]["fst"] == pytest.approx((3 + 1.5 + 2) / 3) and found.failed["fst"] == 1
    assert found["mean"]["fst"] == pytest.approx((der(ACC, 0.8, ASR, 0.2) + der(ACC, 0.8, ASR, 0.1)) / 2)


def test_means_are_over_settings_without_failures(make):
    entries = [(a, d, "Diverged" if (a, d) == ("badnets", "fst") else v) for a, d, v in GRID]
    entries += [("lf", "ft", 0.4), ("lf", "fst", 0.3), ("lf", "anp", 0.6)]
    means = c.trade_offs(c.cross_table(make(entries), LABELS)).set_index("method")
    assert set(means.settings) == {3} and means.failed.to_dict() == {"fst": 1, "anp": 0, "ft": 0}
    assert means.asr["ft"] == pytest.approx(0.3) and means.acc_loss["ft"] == pytest.approx(0.1)
    assert set(means.index[means.front_loss]) == {"fst"} and set(means.index[means.front_cost]) == {"fst", "ft"}


def test_what_did_not_run_or_had_no_victim_is_no_failure_of_the_defence(make):
    absent = c.cross_table(make(GRID, absent=("anp",)), LABELS)
    rows = absent[absent.method == "anp"]
    assert rows.failed.all() and not rows.failed_seeds.any() and rows.reason.str.contains("has not begun").all()
    ranking = c.ranks(absent, rng=rng(0))
    assert set(ranking.table.method) == {"ft", "fst"} and ranking.not_ranked.to_dict("records") == [
        {"method": "anp", "label": "ANP", "settings": 0}]
    entries = [(a, d, "ValueError: its victim failed: Diverged") for a, d, _ in GRID]
    broken = c.cross_table(make(entries, victims="failed"), LABELS)
    assert broken.failed.all() and not broken.failed_seeds.any() and c.ranks(broken, rng=rng(0)).table.empty


def test_defences_with_few_settings_are_left_out(make):
    ranking = c.ranks(c.cross_table(make([e for e in GRID if e[1] != "anp" or e[0] == "wanet"]), LABELS), rng=rng(0))
    assert ranking.settings == 3 and list(ranking.not_ranked.settings) == [1]


def test_block_is_the_largest():
    present = rng(0, "block").random((7, 5)) < 0.6
    methods, settings = c._block(present)
    assert present[np.ix_(settings, methods)].all()
    subsets = [[k for k in range(5) if code >> k & 1] for code in range(32)]
    best = max(len(s) * present[:, s].all(1).sum() for s in subsets if len(s) >= 2)
    assert len(methods) * len(settings) == best


def test_one_setting_has_ranks_without_interval(make):
    ranking = c.ranks(c.cross_table(make(GRID[:3]), LABELS), rng=rng(0))
    assert list(ranking.table["rank"]) == [1, 2, 3] and ranking.table.low.isna().all() and ranking.settings == 1
    budgets = c.ranks(c.cross_table(make(GRID[:3], budgets=("spc2", "spc10")), LABELS), rng=rng(0))
    assert budgets.settings == 2 and budgets.victims == 1 and budgets.table.low.isna().all()


@pytest.mark.parametrize("count", [0, 1, 40])
def test_pareto_equals_brute_force(count):
    points = np.round(rng(0, "pareto").random((count, 2)), 1)
    points[3:5] = np.nan

    def dominates(q, p):
        return q[0] <= p[0] and q[1] >= p[1] and (q[0] < p[0] or q[1] > p[1])

    expected = [not np.isnan(p).any() and not any(dominates(q, p) for q in points) for p in points]
    assert list(c.pareto(points)) == expected


def page_of(cells, tmp_path):
    out = tmp_path / "o"
    run = {"scale": "demo", "papers": [], "registry": list(LABELS.values()), "cross": True, "compare": False}
    c.write_cross(cells, LABELS, run,
                  {"page": out / "cross.html", "table": out / "cross.csv", "figures": out / "cross"})
    return (out / "cross.html").read_text()


def test_page(make, tmp_path):
    entries = [(a, d, "Diverged: <nan>" if (a, d) == ("badnets", "fst") else v) for a, d, v in GRID]
    cells = pd.concat([make(entries), make(GRID[:6], recipe="s")])
    page = page_of(cells, tmp_path)
    assert page.count("data-sort=") == 15 * 22 and page.count('class="bad"') == 1
    assert 'data-sort="failed Diverged: &lt;nan&gt;"' in page and 'data-sort="0.9"' in page and 'data-sort=""' in page
    assert "http" not in page and "src=" in page and 'aria-label="Every cell"' in page
    assert "all recipes: numbers" in page and "recipe s: numbers" in page
    for name in ("ranks", "fronts", "asr"):
        assert f'src="cross/{name}.svg"' in page and (tmp_path / "o" / "cross" / f"{name}.svg").stat().st_size > 1000
    table = pd.read_csv(tmp_path / "o" / "cross.csv")
    assert list(table.columns) == c.COLUMNS and len(table) == 15 and 'href="cross.csv"' in page


def test_page_without_purified_cells(make, tmp_path):
    cells = make(GRID)
    page = page_of(cells[cells.stage == "victim"], tmp_path)
    assert "No purified cells" in page and 'id="cells"' not in page
    out = tmp_path / "o"
    assert pd.read_csv(out / "cross.csv").empty and (out / "cross" / "asr.svg").is_file()
    assert not (out / "cross" / "overview.svg").exists()


def test_page_where_everything_failed_and_with_one_defence(make, tmp_path):
    assert "failed: Diverged" in page_of(make([(a, d, "Diverged") for a, d, _ in GRID]), tmp_path)
    assert "nothing is ranked" in page_of(make(GRID[:1]), tmp_path)
