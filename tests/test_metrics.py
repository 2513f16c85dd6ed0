"""metrics.py against slow plain versions of every metric, against reference values, and on the inputs people bring.

The slow versions below use scipy and loops, share no code with metrics.py and follow the published formulas literally.
oracle_metrics.npz holds values of the reference implementations (cell-eval, pdex, PerturBench's and scBIG's functions;
cell-eval 2 for the Virtual Cell Challenge 2026) with the cells that they belong to.
"""
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy import optimize, stats
from scipy.spatial.distance import cdist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import metrics  # noqa: E402

RANK_KEYS = ("pds", "pds_all_genes", "pds_l2", "pds_cosine", "pds_cosine_panel", "rmse_rank", "cosine_logfc_rank",
             "mmd_rank", "mmd_pca30_rank", "deg_recall_50_rank")  # depend on the other conditions
PCA_KEYS = ("e_distance", "wasserstein", "mmd_pca30")


# -------------------------------------------------------------------------------- a small case

def cells(rng, n, base, effect=0.0, depth=8.0):
    """n cells of log1p CP10k-like values: sparse, with ties."""
    mean = base * np.exp(effect) * rng.gamma(depth, 1 / depth, (n, 1))
    return np.log1p(rng.poisson(mean) * 2.0).astype(np.float32)


def small_case(n_genes=90, sizes=(40, 25, 33, 30, 28), seed=3):
    """Five test conditions, three of them doubles, six training singles, 70 controls; g07 is silent."""
    rng = np.random.default_rng(seed)
    genes = [f"g{i:02d}" for i in range(n_genes)]
    base = rng.gamma(0.8, 1.2, n_genes)
    base[7] = 0
    effect = {g: np.where(rng.random(n_genes) < 0.3, rng.normal(0, 1.2, n_genes), 0)
              for g in ["g00", "g01", "g02", "g03", "g04", "absent", "g20", "g21"]}
    names = ["g00+g01", "g02", "g03+g04", "g20", "absent+g21"]

    def total(name):
        return np.sum([effect[p] for p in name.split("+")], axis=0)

    real = {c: cells(rng, n, base, total(c)) for c, n in zip(names, sizes)}
    blend = dict(zip(names, [(0.6, 0.2), (0.3, 0.5), (0.5, 0.3), (0.2, 0.7), (0.6, 0)]))  # own effect, that of the next
    pred = {c: cells(rng, n, base, blend[c][0] * total(c) + blend[c][1] * total(names[(i + 1) % 5]))
            for i, (c, n) in enumerate(zip(names, sizes))}
    trained = ["g00", "g01", "g03", "g04", "absent", "g21"]           # 'absent' is no gene of the panel
    train = {p: cells(rng, 30 + i, base, effect[p]) for i, p in enumerate(trained)}
    return dict(pred=pred, real=real, control=cells(rng, 70, base), genes=genes, train=train, keys="all")


@pytest.fixture(scope="module")
def case():
    return small_case()


@pytest.fixture(scope="module")
def result(case):
    return metrics.evaluate(**case)


def changed(case, **changes):
    return {**case, **changes}


def with_cells(case, change):
    """The case with change() applied to all its cells."""
    parts = {k: {c: change(x) for c, x in case[k].items()} for k in ("pred", "real", "train")}
    return changed(case, **parts, control=change(case["control"]))


def close(a, b, tol=1e-9):
    """Equal numbers, or both undefined."""
    undefined = [x is None or math.isnan(x) for x in (a, b)]
    return all(undefined) if any(undefined) else math.isclose(a, b, rel_tol=tol, abs_tol=tol)


# -------------------------------------------------------------------------------- slow versions

def slow_p(x, control):
    """scipy's Mann-Whitney test, gene by gene."""
    x, control = x.astype(float), control.astype(float)                # in float32 scipy loses digits
    p = [stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=True).pvalue for a, b in zip(x.T, control.T)]
    return np.nan_to_num(np.array(p), nan=1.0)


def slow_t(x, control):
    """Welch's t with equal n, gene by gene."""
    x, control = x.astype(float), control.astype(float)
    moments = (x.mean(0), x.std(0, ddof=1), len(x), control.mean(0), control.std(0, ddof=1), len(x))
    return np.nan_to_num(stats.ttest_ind_from_stats(*moments, equal_var=False).statistic, nan=0, posinf=0, neginf=0)


def slow_mid_rank(values, own):
    """(number of smaller + half the number of equal others) / (N - 1)."""
    smaller = sum(v < values[own] - 1e-9 for v in values)
    equal = sum(abs(v - values[own]) <= 1e-9 for v in values) - 1
    return (smaller + equal / 2) / (len(values) - 1)


def slow_energy(x, y):
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


def slow_mmd_rbf(x, y):
    """Algorithm 1 of the scDFM paper, x generated, y real, with the lower median."""
    distances = sorted(math.dist(a, b) ** 2 for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
    m = distances[(len(distances) - 1) // 2]
    total = 0.0
    for s in (0.5, 1.0, 2.0, 4.0):
        def k(a, b):
            return math.exp(-math.dist(a, b) ** 2 / (2 * s * m))
        xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (len(x) * (len(x) - 1))
        yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (len(y) * (len(y) - 1))
        total += xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return total / 4


def slow_sinkhorn(cost, epsilon, iterations=3000):
    """Plain Sinkhorn scaling in float64."""
    kernel = np.exp(-cost / epsilon)
    u, v = np.ones(len(cost)), np.ones(cost.shape[1])
    for _ in range(iterations):
        u = 1 / len(cost) / (kernel @ v)
        v = 1 / cost.shape[1] / (kernel.T @ u)
    return float((u[:, None] * kernel * v * cost).sum())


def slow_scores(pred, real, control, genes):
    """{condition: {key: value}} of what takes the cells of all conditions, and of what has exceptions on the panel."""
    names = list(pred)
    everything = np.concatenate([*real.values(), control]).astype(float)
    centre = everything.mean(0)
    axes = np.linalg.svd(everything - centre, full_matrices=False)[2][:50].T
    p, r = ({k: (x - centre) @ axes for k, x in side.items()} for side in (pred, real))
    c = control.mean(0, dtype=float)
    q, m = ({k: x.mean(0, dtype=float) for k, x in side.items()} for side in (pred, real))
    t = [{k: slow_t(x, control) for k, x in side.items()} for side in (pred, real)]
    top = [{k: set(sorted(range(90), key=lambda i: (-abs(v[i]), i))[:50]) for k, v in side.items()} for side in t]

    def differences(a, b, names):
        """|prediction of a - truth of b| without the genes of some conditions."""
        targets = {g for k in names for g in k.split("+")}
        return [abs(x - y) for g, x, y in zip(genes, q[a], m[b]) if g not in targets]

    def angle(a, b):
        others = [i for i, g in enumerate(genes) if not any(g in k.split("+") for k in names)]
        u, v = (q[a] - c)[others], (m[b] - c)[others]
        return -u @ v / math.sqrt(u @ u) / math.sqrt(v @ v)

    out = {}
    for k in names:
        cost = cdist(p[k], r[k])
        own = names.index(k)
        out[k] = {
            "e_distance": slow_energy(p[k], r[k]), "wasserstein": slow_sinkhorn(cost, 0.05 * cost.mean()),
            "mmd": slow_energy(pred[k], real[k]) / 2, "mmd_pca30": slow_energy(p[k][:, :30], r[k][:, :30]) / 2,
            "mmd_rbf": slow_mmd_rbf(pred[k], real[k]), "deg_recall_50": len(top[0][k] & top[1][k]) / 50,
            "pds": 1 - slow_mid_rank([sum(differences(k, other, [k])) for other in names], own),
            "pds_all_genes": 1 - slow_mid_rank([sum(differences(k, other, [])) for other in names], own),
            "pds_cosine_panel": 1 - slow_mid_rank([angle(k, other) for other in names], own),
            "mmd_rank": slow_mid_rank([slow_energy(pred[other], real[k]) for other in names], own),
            "mmd_pca30_rank": slow_mid_rank([slow_energy(p[other][:, :30], r[k][:, :30]) for other in names], own),
            "deg_recall_50_rank": slow_mid_rank([-len(top[0][other] & top[1][k]) for other in names], own),
        }
    return out


# -------------------------------------------------------------------------------- numbers

def test_keys_equal_the_slow_version(case, result):
    for group, values in slow_scores(*(case[k] for k in ("pred", "real", "control", "genes"))).items():
        for key, value in values.items():
            assert close(result["per_condition"][group][key], value, 1e-6), (group, key, value)
    for key in metrics.KEYS:
        values = [v[key] for v in result["per_condition"].values() if v[key] is not None]
        assert result["n_valid"][key] == len(values) and close(result["aggregate"][key], np.mean(values))


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).parent / "oracle_metrics.npz") as file:
        return dict(file)


def expected_of(oracle, condition):
    return dict(zip(oracle["keys"], oracle["values"][list(oracle["conditions"]).index(condition)]))


def test_pseudobulk_keys_agree_with_the_reference_implementations(oracle):
    """Twelve conditions, each as one cell: its mean."""
    names = list(oracle["conditions"])
    pred, real = ({c: x[None] for c, x in zip(names, oracle[side])} for side in ("pred_means", "real_means"))
    keys = ["l2", "mse", "mae", "rmse", "pearson_delta", "pearson_delta_top20", "pearson_delta_hat",
            "pearson_delta_hat_top20", "spearman_delta", "acc", "acc_top20", "pds", "pds_all_genes", "pds_l2",
            "pds_cosine", "discr_cos", "cosine_logfc", "rmse_rank", "cosine_logfc_rank"]
    result = metrics.evaluate(pred, real, oracle["control_mean"][None], list(oracle["genes"]), keys=keys, floors=False,
                              train_mean=oracle["train_mean"])
    assert list(result["aggregate"]) == keys
    for condition, values in result["per_condition"].items():
        expected = expected_of(oracle, condition)
        for key, value in values.items():
            tolerance = 2e-4 if key == "spearman_delta" else 1e-5    # float32 means: the order of silent genes
            assert value == pytest.approx(expected[key], rel=tolerance), (condition, key)


def test_cell_keys_agree_with_the_reference_implementations(oracle):
    control, real = (np.log1p(x / x.sum(1, keepdims=True) * 1000.0) for x in (oracle["control_counts"],
                                                                              oracle["real_counts"]))
    keys = ["de_spearman", "direction_match", "overlap_at_n", "deg_recall_50", "mmd", "mmd_rbf"]
    result = metrics.evaluate({"G217": oracle["pred_cells"]}, {"G217": real}, control, list(oracle["genes"]), keys=keys,
                              floors=False)
    expected = expected_of(oracle, "G217")
    for key, value in result["aggregate"].items():                     # PerturBench's mmd: float32
        assert value == pytest.approx(expected[key], rel=3e-4 if key == "mmd" else 1e-6), key


def test_challenge_files_are_scored_without_a_flag(oracle, score, tmp_path):
    """As the Virtual Cell Challenge has them: counts, 'target', 'non-targeting'."""
    for side in ("pred", "real"):
        labels = [label.replace("control", "non-targeting") for label in oracle[f"vcc_{side}_labels"]]
        data.write_h5ad(tmp_path / f"{side}.h5ad", sp.csr_matrix(oracle[f"vcc_{side}_counts"].astype(np.float32)),
                        {"target": labels}, list(oracle["vcc_genes"]))
    done = score(tmp_path / "pred.h5ad", tmp_path / "real.h5ad")
    assert done.code == 0, done.error
    assert done.text.count("counts, normalised to log1p CP10k over its 120 genes") == 2
    written = done.written["per_condition"]
    assert list(written) == ["TF1", "TF12", "mix18", "mix7"]
    for condition, values in zip(oracle["vcc_conditions"], oracle["vcc_values"]):
        for key, value in zip(oracle["vcc_keys"][:4], values):
            assert condition not in written or written[condition][key] == pytest.approx(value, abs=1e-6), key


def test_challenge_discrimination_pools_the_counts_of_a_condition(score, tmp_path):
    """Of cells of very different depth, where the mean of log1p CP10k ranks otherwise; real control on both sides."""
    rng = np.random.default_rng(5)
    genes = [f"g{i}" for i in range(30)]
    names = [f"g{i}" for i in range(8)]
    shares = {c: rng.dirichlet(np.full(30, 2.0)) for c in [*names, "non-targeting"]}

    def counts(share):
        return rng.poisson(share * rng.lognormal(6, 1.5, (12, 1))).astype(np.float32)

    real = {c: counts(share) for c, share in shares.items()}
    pred = {c: counts(0.3 * shares[c] + 0.7 * shares["non-targeting"]) for c in names}
    pooled = {side: {c: np.log1p(50_000 * x.sum(0, dtype=float) / x.sum(dtype=float)) for c, x in cells.items()}
              for side, cells in (("pred", pred), ("real", real))}
    control = pooled["real"]["non-targeting"]
    for c in names:
        p, *r = (profile[8:] - control[8:] for profile in (pooled["pred"][c], *(pooled["real"][k] for k in names)))
        angles = [-p @ x / np.linalg.norm(p) / np.linalg.norm(x) for x in r]
        pooled[c] = 1 - slow_mid_rank(angles, names.index(c))
    files = [write(tmp_path / f"{side}.h5ad", cells, genes, key="target")
             for side, cells in (("pred", pred), ("real", real))]
    done = score(*files, "--keys", "vcc")
    assert done.code == 0 and "pds_cosine_panel↑ sig_jaccard↑" in done.text and "of means" not in done.text, done.error
    assert {c: v["pds_cosine_panel"] for c, v in done.written["per_condition"].items()} == {
        c: pytest.approx(pooled[c], abs=1e-9) for c in names}
    assert done.written["replicate"]["pds_cosine_panel"] > 0.8                     # halves are pooled too
    logged = write(tmp_path / "logged.h5ad", {c: np.log1p(x / x.sum(1, keepdims=True) * 1e4) for c, x in pred.items()},
                   genes, key="target")
    other = score(logged, files[1], "--keys", "vcc")
    assert "is the challenge's where both files hold counts" in other.text
    assert other.written["per_condition"] != done.written["per_condition"]


def test_profiles_pool_what_each_cell_counted():
    """Of predictions, controls, halves of the replicate and the control floor; below 0 there are no counts."""
    counts = {k: np.random.default_rng(i).poisson(3, (n, 4)) * [[1], [9]] * np.ones(4)
              for i, (k, n) in enumerate([("x", 2), ("", 2)])}

    def logged(x):
        return np.log1p(x / x.sum(1, keepdims=True) * 1e4).astype(np.float32)

    def profile(x):
        return pytest.approx(np.log1p(50_000 * x.sum(0) / x.sum()), rel=1e-5)

    of = {k: x.sum(1) for k, x in counts.items()}
    world = metrics._World(["x"], logged(counts[""]), list("abcd"), 0, (of, of))
    real = metrics._Population(logged(counts["x"]), "x", world, "real", of["x"])
    assert real.profile == profile(counts["x"]) and world.control[""].profile == profile(counts[""])
    [floor] = metrics._floor("control", world, None, {"x": 2})
    assert floor.profile == profile(counts[""])                       # all controls once
    below = metrics._Population(-real.cells, "x", world)
    assert not below.profile.any()


def test_halves_of_the_replicate_keep_what_each_cell_counted(monkeypatch):
    monkeypatch.setattr(metrics, "_score", lambda *halves: halves)
    world = metrics._World(["x"], numbered(5), ["p", "q", "r"], 0)
    truth = metrics._Population(numbered(21), "x", world, "real", np.arange(21.0))
    one, other = metrics._replicate({"x": truth}, world, ["l2"])[:2]
    for half in (*one, other["x"]):
        assert np.array_equal(half.totals, half.cells[:, 0])


def test_challenge_discrimination_is_cosine_without_the_targets_of_the_panel(oracle):
    """cell-eval 2 takes log1p counts per million of the counts summed over a condition."""
    q, m = (np.log1p(x / x.sum(1, keepdims=True) * 1e6) for x in (oracle["vcc_pred_sums"], oracle["vcc_real_sums"]))
    others = ~np.isin(oracle["vcc_genes"], oracle["vcc_conditions"])
    values = metrics.discrimination((q - m[-1])[:, others], (m[:-1] - m[-1])[:, others], metric="cosine")
    assert values == pytest.approx(oracle["vcc_values"][:, 4], abs=1e-6)


def test_challenge_keys_at_their_limits():
    def side(lfc, adjusted):
        return metrics.Changes(np.array(lfc, float), np.array(adjusted, float), np.array(adjusted, float))

    none, all_up = side([1, 1], [1, 1]), side([1, 2], [0.01, 0.01])
    assert metrics.sig_jaccard(none, none) == 1 and metrics.sig_jaccard(all_up, none) == 0
    assert math.isnan(metrics.direction_fidelity(none, none)) and metrics.direction_fidelity(all_up, none) == 1
    assert math.isnan(metrics.direction_reach(all_up, none)) and metrics.direction_reach(none, all_up) == 1
    assert metrics.direction_reach(side([-1, -1], [0, 0]), all_up) == 0
    assert metrics.direction_reach(side([-1, 1], [0.9, 0.01]), all_up) == 0.5        # the significant one is read first
    assert metrics.direction_fidelity(all_up, side([1, 0], [0.01, 0.01])) == 0.5     # no real change: no call
    real = side(np.arange(1, 11), np.full(10, 0.01))
    assert math.isnan(metrics.lfc_nmae(real, side(np.arange(1, 10), np.full(9, 0.01))))
    assert metrics.lfc_nmae(real, real) == 0 and metrics.lfc_nmae(real._replace(lfc=np.full(10, np.nan)), real) == 1


def test_changes_are_tested_among_expressed_genes_and_targets_left_out_afterwards():
    p, control = np.array([0.01, 0.02, 0.05, 1e-9]), np.array([100.0, 5.1, 50, 5.0])
    found = metrics.changes(p, np.array([200.0, -1, 50, 9]), control, targets=[0])   # the last gene is too low to test
    assert found.p.tolist() == [0.02, 0.05] and found.adjusted == pytest.approx([0.03, 0.05])
    assert np.isnan(found.lfc[0]) and found.lfc[1] == 0


# -------------------------------------------------------------------------------- differential expression

def tied_cells():
    """Cells with zeros, ties, negative values, both signs of zero, a silent gene and a constant one."""
    rng = np.random.default_rng(0)
    x, control = (np.round(rng.normal(0.3, 1, (n, 40)), 1) * (rng.random((n, 40)) < 0.5) for n in (23, 61))
    x, control = x.astype(np.float32), control.astype(np.float32)
    x[:, 3], control[:, 3] = 0, 0
    x[:, 4], control[:, 4] = 1.5, 1.5
    x[:, 5] += 3
    x[:5, 6], control[:9, 6] = -0.0, 0.0
    return x, control


def test_rank_sum_equals_scipy():
    x, control = tied_cells()
    for some in (x, x[:1]):
        p = metrics.rank_sum_test(some, control)
        assert p == pytest.approx(slow_p(some, control), rel=1e-9) and p[3] == p[4] == 1
    assert np.array_equal(metrics.rank_sum_test(x[:1], metrics.value_counts(control)), p)       # sorted before
    assert (metrics.rank_sum_test(control, control) == 1).all()


def test_welch_t_equals_scipy_and_treats_degenerate_genes_as_scanpy():
    x, control = tied_cells()
    own, other = ((a.mean(0, dtype=float), a.var(0, ddof=1, dtype=float)) for a in (x, control))
    t = metrics.welch_t(*own, len(x), *other)
    assert t == pytest.approx(slow_t(x, control)) and (t[[3, 4]] == 0).all()
    world = metrics._World(["g"], control, [f"g{i:02d}" for i in range(40)], 0)
    assert metrics._Population(x, "g", world, "real").t == pytest.approx(t)
    assert metrics.deg_recall(t[:10], t[:10]) == 1                    # of fewer than 50 genes
    assert metrics.welch_t(np.ones(2), np.zeros(2), 5, np.zeros(2), np.zeros(2)).tolist() == [0, 0]   # infinite
    assert np.isnan(metrics.welch_t(np.ones(2), np.full(2, np.nan), 1, np.zeros(2), np.ones(2))).all()


def test_log_fold_changes():
    q, c = np.log1p([3.0, 0, 0, 1]), np.log1p([1.0, 2, 0, 1])
    assert metrics.log_fold_change(q, c) == pytest.approx(np.log2((np.expm1(q) + 1e-9) / (np.expm1(c) + 1e-9)))
    assert metrics.log_fold_change(q, c, 0.1, exp=False) == pytest.approx(np.log2((q + 0.1) / (c + 0.1)))
    assert np.isfinite(metrics.log_fold_change(np.array([-0.5]), np.array([0.5]))).all()  # a model that does not clamp


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 50).astype(np.float32), rng.normal(size=50)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert math.isnan(metrics.spearman(np.ones(5), y[:5])) and math.isnan(metrics.spearman(x[:1], y[:1]))


def test_overlap_and_direction_by_hand():
    lfc_real, lfc_pred = np.array([3.0, -2, 1, 0.5, 0]), np.array([2.5, 2, 0, 9, 4])
    real, pred = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 1, 1], bool)
    none = np.zeros(5, bool)
    assert metrics.overlap_at_n(lfc_pred, pred, lfc_real, real) == pytest.approx(1 / 3)  # predicted: 9, 4, 2.5
    assert metrics.overlap_at_n(lfc_pred, none, lfc_real, real) == 0
    assert metrics.overlap_at_n(lfc_pred, pred, lfc_real, none) == 0
    assert metrics.direction_match(lfc_pred, lfc_real, real) == pytest.approx(1 / 3)
    assert math.isnan(metrics.direction_match(lfc_pred, lfc_real, none))
    assert math.isnan(metrics.de_spearman(lfc_pred, lfc_real, none))


def test_enrichment_is_the_hypergeometric_test_of_every_pair():
    genes = [f"g{i}" for i in range(60)]
    sets = {"planted": {f"G{i}" for i in (*range(15), 40, 41)} | {"ELSEWHERE"}, "small": {"G0", "G1"},
            "spread": {f"G{i}" for i in range(0, 60, 5)}}
    [row] = metrics.enrichment(np.arange(60) // 20, genes, sets)
    tables = [(15, 2, 5, 38), (0, 17, 20, 23), (2, 15, 18, 25), *[(4, 8, 16, 32)] * 3]      # two sets in three modules
    p = [stats.fisher_exact([[a, b], [c, d]], "greater")[1] for a, b, c, d in tables]
    assert row[:5] == (0, "planted", 15, 20, 17) and len(row) == len(metrics.ENRICHMENT)
    assert row[5:] == pytest.approx((p[0], stats.false_discovery_control(p)[0]))
    assert metrics.enrichment(np.arange(60) // 20, genes, {}) == []


# -------------------------------------------------------------------------------- ranks

def test_ranks_share_ties_and_place_undefined_values():
    nan = math.nan
    distance = np.array([[1.0, 2, 3, 4], [5, 5, 5, 5], [nan, 1, 2, 3], [1, 0, nan, nan]])
    assert metrics.own_rank(distance).tolist() == [0, 0.5, 1 / 3, 0.5]        # an undefined one is last, or is half
    assert metrics.own_rank(distance[:1, ::-1]).tolist() == [1] and np.isnan(metrics.own_rank(np.ones((1, 1)))).all()
    square = np.array([[2.0, 0, 9], [1, 4, 8], [3, 5, 7]])
    assert metrics.prediction_rank(square).tolist() == [0.5, 0.5, 0]           # column by column
    assert metrics.own_rank(square).tolist() == [0.5, 0.5, 1]                  # the transpose of it
    for gap, rank in ((1e-12, 0.5), (1e-7, 1)):                                # rounding does not break a tie
        assert metrics.own_rank(np.array([[1.0, 1 - gap]])).tolist() == [rank]


def test_mmd_ranks_tie_within_the_accuracy_of_float32(case, monkeypatch):
    """own distance 1, all others below it by a little: what float32 cannot tell is a tie, the rest is not."""
    for gap, rank in ((1e-7, 0.5), (1e-5, 1.0)):
        monkeypatch.setattr(metrics, "mmd_matrix", lambda p, r: 1 - gap * (1 - np.eye(len(p))))
        result = metrics.evaluate(**changed(case, keys=["mmd_rank"]), floors=False)
        assert result["aggregate"]["mmd_rank"] == rank


def test_equal_scores_go_to_the_first_gene():
    score = (np.arange(5000) % 3 == 0).astype(float)
    assert metrics.top_k(score, 40).tolist() == list(range(0, 120, 3))


def test_targets_are_the_perturbed_genes_without_their_dose(case):
    world = metrics._World(["g03:0.5+g01", "g00"], case["control"], case["genes"], 0)
    assert world.targets("g03:0.5+g01") == [1, 3] and world.panel_targets == [0, 1, 3]
    p = metrics._Population(case["pred"]["g02"], "g00", world)
    assert np.array_equal(p.effect_off_panel, p.effect[[2, *range(4, 90)]])     # those of all conditions are left out


def test_collapsed_prediction_scores_one_half(case):
    one = np.repeat(case["train"]["g00"].mean(0, keepdims=True), 31, axis=0)
    for pred in ({c: one[:20 + i] for i, c in enumerate(case["real"])},       # point masses of different sizes
                 {c: case["train"]["g00"] for c in case["real"]}):            # the same cells for all
        result = metrics.evaluate(**changed(case, pred=pred), floors=False)
        for key in RANK_KEYS[1:]:
            assert set(v[key] for v in result["per_condition"].values()) == {0.5} or key.startswith("pds")
            assert result["aggregate"][key] == pytest.approx(0.5), key


# -------------------------------------------------------------------------------- distributions

def test_energy_distance_equals_the_plain_formula():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (13, 4)), rng.normal(0.5, 2, (9, 4))
    assert metrics.energy_distance(x, y) == pytest.approx(slow_energy(x, y))
    assert metrics.mmd_energy(x, y) == pytest.approx(slow_energy(x, y) / 2)
    assert metrics._energy(1.0, 1.0, 1 - 1e-12) == 0                           # rounding never makes it negative
    assert metrics.mean_distance(x, y) == pytest.approx(cdist(x, y).mean())


def test_mmd_rbf_equals_algorithm_1():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (12, 5)), rng.normal(0.4, 1.5, (9, 5))
    assert metrics.mmd_rbf(x, y) == pytest.approx(slow_mmd_rbf(x.tolist(), y.tolist()))
    assert metrics.pair_distances(x) == pytest.approx(cdist(x, x)[np.triu_indices(12, 1)] ** 2)
    assert math.isnan(metrics.mmd_rbf(x, y[:1])) and math.isnan(metrics.mmd_rbf(x[:1], y))
    assert math.isfinite(metrics.mmd_rbf(x, np.repeat(y[:1], 4, axis=0)))      # a median of zero


def test_mmd_matrix_equals_the_pairs():
    rng = np.random.default_rng(0)
    pred, real = ([rng.normal(i / 3, 1, (n, 20)).astype(np.float32) for i, n in enumerate(sizes)]
                  for sizes in ((5, 1, 30), (8, 40)))
    expected = np.array([[metrics.mmd_energy(x, y) for y in real] for x in pred])
    for block in (50, 10_000):
        assert metrics.mmd_matrix(pred, real, block) == pytest.approx(expected, rel=1e-6)


def test_sinkhorn_approaches_exact_transport(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (12, 3)), rng.normal(1, 1, (12, 3))
    cost = cdist(x, y)
    constraints = np.vstack([np.repeat(np.eye(12), 12, axis=1), np.tile(np.eye(12), 12)])
    exact = optimize.linprog(cost.ravel(), A_eq=constraints, b_eq=np.full(24, 1 / 12)).fun
    assert metrics.sinkhorn(cost, 0.002)[0] == pytest.approx(exact, rel=5e-3)
    for n in (12, 5):
        expected = slow_sinkhorn(cost[:n], 0.05 * cost[:n].mean())
        assert metrics.wasserstein(x[:n], y) == pytest.approx(expected, rel=1e-5)
        assert metrics.sinkhorn(cost[:n], 0.05 * cost[:n].mean())[1] < 1e-6
    far = np.vstack([y, y[:1] + 1000])                                # out of reach of exp(-cost / epsilon)
    assert math.isfinite(metrics.sinkhorn(cdist(x, far), 0.01)[0])
    assert metrics.wasserstein(np.ones((4, 2)), np.ones((3, 2))) == 0
    monkeypatch.setattr(metrics, "sinkhorn", lambda cost, epsilon: (1.0, 2e-4))
    assert math.isnan(metrics.wasserstein(x, y))                      # not converged


def test_pca_is_the_svd_with_fixed_signs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12)) @ rng.normal(size=(12, 12))
    basis = metrics.fit_pca(lambda: [x[:15], x[15:]], k=5)
    s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)[1:]
    assert np.abs(basis.loadings.T @ v[:5].T) == pytest.approx(np.eye(5), abs=1e-8)
    assert basis.explained == pytest.approx((s ** 2 / (s ** 2).sum())[:5])
    largest = np.argmax(np.abs(basis.loadings), axis=0)
    assert (basis.loadings[largest, np.arange(5)] > 0).all()
    assert metrics.fit_pca(lambda: [x[:3]], k=50).loadings.shape == (12, 2)
    assert metrics.fit_pca(lambda: [np.zeros((4, 3))]).explained.sum() == 0


# -------------------------------------------------------------------------------- properties

def test_perfect_prediction_gets_the_perfect_value(case):
    result = metrics.evaluate(**changed(case, pred=case["real"]))
    for group, values in result["per_condition"].items():
        for key, value in values.items():
            if key == "mmd_rbf":                                      # unbiased: slightly below 0 for the same cells
                assert -0.1 < value <= 0
            elif key != "lfc_nmae" or value is not None:              # undefined below ten genes
                tolerance = 1e-2 if key == "wasserstein" else 1e-6    # up to what the entropy spreads
                assert value == pytest.approx(metrics.KEYS[key].perfect, abs=tolerance), (group, key)


def test_control_as_point_mass_gets_the_documented_values(case, result):
    mean = case["control"].mean(0, keepdims=True)
    pred = {c: np.repeat(mean, len(x), axis=0) for c, x in case["real"].items()}
    scored = metrics.evaluate(**changed(case, pred=pred), floors=False)
    values = scored["aggregate"]
    for key in ("pearson_delta", "pearson_delta_top20", "spearman_delta", "de_spearman", "discr_cos", "cosine_logfc",
                "deg_recall_50"):
        assert values[key] is None and scored["n_valid"][key] == 0
    assert values["direction_match"] == 0 and values["overlap_at_n"] == 0
    effects = [x.mean(0, dtype=float) - case["control"].mean(0, dtype=float) for x in case["real"].values()]
    assert values["acc"] == pytest.approx(np.mean([np.mean(d <= 0) for d in effects]))
    assert values["l2"] == pytest.approx(np.mean([np.linalg.norm(d) for d in effects]), rel=1e-5)
    for key in ("cosine_logfc_rank", "deg_recall_50_rank", "pds_cosine", "rmse_rank", "mmd_rank"):
        assert values[key] == 0.5
    assert {v["pds_cosine_panel"] for v in scored["per_condition"].values()} == {0.5}      # no effect is undefined
    assert values["e_distance"] > result["floors"]["control"]["e_distance"]        # no spread
    some = metrics.evaluate(**changed(case, pred=case["pred"] | {"g02": pred["g02"]}), floors=False)
    defined = [v["pearson_delta"] for c, v in some["per_condition"].items() if c != "g02"]
    assert some["per_condition"]["g02"]["pearson_delta"] is None and some["n_valid"]["pearson_delta"] == 4
    assert some["aggregate"]["pearson_delta"] == pytest.approx(np.mean(defined))


def test_conditions_do_not_influence_each_other(case, result):
    """Removing conditions changes only what is defined over them: ranks, and what lives in the common PCA."""
    some = ["g02", "absent+g21"]
    part = metrics.evaluate(**changed(case, pred={c: case["pred"][c] for c in some}))
    for c in some:
        for key in set(metrics.KEYS) - set(RANK_KEYS) - set(PCA_KEYS):
            assert close(part["per_condition"][c][key], result["per_condition"][c][key]), key
    for name in ("control", "mean_cells"):                                     # nor what is drawn for a floor
        drawn = []
        for groups in (["g02"], list(case["pred"])):
            world = metrics._World(groups, case["control"], case["genes"], 0)
            training = metrics._Training(case["train"], world, 40)
            floor = metrics._floor(name, world, training, dict.fromkeys(groups, 25))
            drawn.append({p.group: p.cells for p in floor}["g02"])
        assert np.array_equal(*drawn)


@pytest.mark.parametrize("expressed", [90, 30])
def test_order_of_cells_genes_and_conditions_does_not_matter(case, expressed):
    """Nor where genes tie because they are silent: which of them is among the top genes is decided by name."""
    rng = np.random.default_rng(5)
    genes = rng.permutation(90)

    def shuffled(populations):
        return {c: populations[c][rng.permutation(len(populations[c]))][:, genes] for c in reversed(populations)}

    case = with_cells(case, lambda x: x * (np.arange(90) < expressed))
    moved = {k: shuffled(case[k]) for k in ("pred", "real", "train")}
    moved = changed(case, **moved, control=shuffled({"": case["control"]})[""], genes=[case["genes"][i] for i in genes])
    a, b = (metrics.evaluate(**x, floors=False)["per_condition"] for x in (case, moved))
    assert all(close(a[c][k], b[c][k], 1e-5) for c in a for k in metrics.KEYS)


def test_sparse_and_float64_inputs_are_the_same(case, result):
    sparse = changed(with_cells(case, sp.csr_matrix), pred={c: x.astype(float) for c, x in case["pred"].items()})
    other = metrics.evaluate(**sparse)
    for part in ("aggregate", "replicate", "score_vs_floor"):
        assert all(close(other[part][k], result[part][k]) for k in metrics.KEYS)
    assert all(close(other["floors"][f][k], result["floors"][f][k]) for f in metrics.FLOORS for k in metrics.KEYS)


def test_one_condition_has_no_rank(case):
    result = metrics.evaluate(**changed(case, pred={"g20": case["pred"]["g20"]}))
    assert {k for k in metrics.KEYS if not result["n_valid"][k]} == {*RANK_KEYS, "lfc_nmae"}   # fewer than ten genes
    assert result["aggregate"]["pds"] is None and result["ci95"]["l2"] is None
    json.dumps(result, allow_nan=False)


def test_one_cell_conditions(case):
    result = metrics.evaluate(**changed(case, pred={c: x[:1] for c, x in case["pred"].items()},
                                        real={c: x[:1] for c, x in case["real"].items()}))
    hardly = ("de_spearman", "direction_match", "direction_fidelity", "direction_reach", "lfc_nmae")
    for key, n in result["n_valid"].items():
        if key in ("deg_recall_50", "mmd_rbf"):
            assert n == 0                                                          # no variance, no pairs
        else:
            assert n < 3 if key in hardly else n == 5, key                         # hardly a significant gene
    assert set(result["replicate"].values()) == {None}                             # nothing to halve


def test_constant_and_silent_populations_raise_nothing(case):
    offset = {c: np.repeat(case["control"].mean(0, keepdims=True) + 0.1, len(x), 0) for c, x in case["pred"].items()}
    constant = metrics.evaluate(**changed(case, pred=offset))
    assert constant["n_valid"]["pearson_delta"] == 0 and constant["n_valid"]["discr_cos"] == 5
    silent = metrics.evaluate(**with_cells(case, np.zeros_like))
    values = silent["aggregate"]
    assert values["l2"] == values["wasserstein"] == values["e_distance"] == 0
    assert values["pearson_delta"] is None and values["acc"] == 1 and values["pds"] == 0.5
    json.dumps([constant, silent], allow_nan=False)


def test_tiny_effects_are_no_effects_and_those_of_a_hundred_thousandth_are():
    m, c = np.array([1.0, 2, 3]), np.zeros(3)
    for correlation in (metrics.pearson_delta, metrics.spearman_delta, metrics.discr_cos, metrics.cosine_logfc):
        assert math.isnan(correlation(1e-7 * m, m, c))
        assert correlation(1e-5 * m, m, c) == pytest.approx(1, abs=0.1)
    assert metrics.acc(1e-7 * m, m, c) == 0 == metrics.acc(-1e-5 * m, m, c)
    assert metrics.acc(np.array([1.0, 0, -1, 0]), np.array([1.0, -1, 1, 0]), np.zeros(4)) == 0.75   # 0 is not up


def test_control_means_with_rounding_have_no_fold_changes(case):
    """float32 moves a mean by 1e-8; a log fold change of that size must not be ranked or correlated."""
    world = metrics._World(["g02"], case["control"], case["genes"], 0)
    p = metrics._Population(np.tile(case["control"].mean(0), (9, 1)), "g02", world, "predicted")
    assert (p.mean != world.control[""].mean).any() and np.isnan(p.t).all()
    assert not p.effect.any() and not p.lfc.any() and not p.logfc.any() and not p.significant.any()


# -------------------------------------------------------------------------------- floors and references

def test_mean_floor_is_a_point_mass_at_the_centroid_mean(case, result):
    centroid = np.mean([x.mean(0, dtype=float) for x in case["train"].values()], axis=0).astype(np.float32)
    pred = {c: np.tile(centroid, (len(x), 1)) for c, x in case["pred"].items()}
    expected = metrics.evaluate(**changed(case, pred=pred), floors=False)["aggregate"]
    assert all(close(result["floors"]["mean"][k], expected[k], 1e-6) for k in metrics.KEYS if not k.endswith("_rank"))
    assert expected["pearson_delta_hat"] is None                      # it is the reference itself
    for key, distance in (("mmd", metrics.mmd_energy), ("mmd_rbf", metrics.mmd_rbf)):     # evaluated as one point
        values = [distance(pred[c], x) for c, x in case["real"].items()]
        assert expected[key] == pytest.approx(np.mean(values), rel=1e-6)


def test_additive_floor_adds_the_single_effects(case, result):
    c = case["control"].mean(0, dtype=float)
    single = {p: x.mean(0, dtype=float) - c for p, x in case["train"].items()}
    doubles = ["g00+g01", "g03+g04", "absent+g21"]
    world = metrics._World(doubles, case["control"], case["genes"], 0)
    training = metrics._Training(case["train"], world, 40)
    for g in doubles:
        assert training.additive(g) == pytest.approx(sum(single[p] for p in g.split("+")), abs=1e-9)
    [floor] = metrics._floor("additive", world, training, {doubles[0]: 70})   # every control once, and not clamped
    expected = np.sort(case["control"], 0) + training.additive(doubles[0])
    assert np.sort(floor.cells, 0) == pytest.approx(expected, abs=1e-5)
    assert floor.cells.min() < 0
    assert list(result["floors_per_condition"]["additive"]) == doubles            # g02 and g20 are not in training
    assert any("additive" in note for note in result["info"]["notes"])
    part = metrics.evaluate(**changed(case, pred={g: case["pred"][g] for g in doubles}, keys=["pearson_delta"]))
    assert not any("additive" in note for note in part["info"]["notes"])
    assert part["floors"]["additive"]["pearson_delta"] > 0.8 > part["floors"]["mean"]["pearson_delta"]


def numbered(n, start=0):
    """n cells of three genes that hold their own number."""
    return np.repeat(np.arange(start, start + n, dtype=np.float32)[:, None], 3, axis=1)


def test_floors_have_as_many_cells_as_the_prediction(case, monkeypatch):
    """Also where more are generated than were measured, of the condition or of controls."""
    sizes, scored = {c: 75 + i for i, c in enumerate(case["real"])}, []
    monkeypatch.setattr(metrics, "_replicate", lambda *_: {})
    monkeypatch.setattr(metrics, "_score", lambda populations, real, world, keys, tables=None:
                        scored.append({p.group: p.n for p in populations}) or world.levels.update(x=1.0) or
                        dict.fromkeys(real, {}))
    pred = {c: np.repeat(x, 4, axis=0)[:sizes[c]] for c, x in case["pred"].items()}
    metrics.evaluate(**changed(case, pred=pred))
    additive = {c: n for c, n in sizes.items() if c in ("g00+g01", "g03+g04", "absent+g21")}
    assert scored == [sizes] * 4 + [additive]                         # the prediction, then metrics.FLOORS


def test_scoring_that_takes_long_says_how_far_it_is(case, monkeypatch, capsys):
    monkeypatch.setattr(data, "FIRST_LINE", 0)
    metrics.evaluate(**changed(case, keys=["l2"]))
    lines = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    floors = [f"scoring the {name} floor" for name in metrics.FLOORS]
    what = ["reading training conditions", "scoring the prediction", *floors, "scoring halves of the real cells"]
    assert lines == [f"{each}: {i} of {n}" for each in what for n in [6 if "training" in each else 5] for i in (1, n)]
    ticks, scored = [], []
    monkeypatch.setattr(data, "progress", lambda items, what: (ticks.append(i) or i for i in items))
    key = metrics.KEYS["l2"]._replace(score=lambda x: scored.append(len(ticks)) or 0.0)
    monkeypatch.setitem(metrics.KEYS, "l2", key)
    metrics.evaluate(**changed(case, keys=["l2"], train=None), floors=False)
    assert scored == [1, 2, 3, 4, 5]


def draws(seed=0, groups=("x", "y"), sizes=(1500, 1500)):
    """Training of two conditions a and b with numbered cells, for groups x and y."""
    world = metrics._World(list(groups), numbered(5), ["p", "q", "r"], seed)
    return metrics._Training({"a": numbered(sizes[0]), "b": numbered(sizes[1], 10000)}, world, 400)


def test_training_cells_are_drawn_at_random_without_replacement():
    kept = [draws(seed).cells[:, :, 0] for seed in (0, 1)]
    a, b = kept[0]
    assert len(a) == 1000 == len(set(a)) == len(set(b)) and a.max() > 1400    # not the first 1,000
    assert not np.array_equal(np.sort(a), np.sort(b - 10000))                 # each condition its own draw
    assert not np.array_equal(np.sort(a), np.sort(kept[1][0]))                # and each seed
    few = draws(sizes=(1500, 10)).cells[:, :, 0]
    assert len(set(few[0])) == 1000 and set(few[1]) <= set(range(10000, 10010))


def test_mean_cells_floor_weights_conditions_equally_and_draws_for_each_group():
    """One training condition has 150 times the cells of the other; the floor must not notice."""
    training = draws(sizes=(1500, 10))
    assert (training.draw("x", 2000)[:, 0] >= 10000).sum() == 1000            # all that there is: half of each
    assert training.centroid("") == pytest.approx((1499 / 2 + 10004.5) / 2)
    training = draws()
    drawn = training.draw("x", 1500)[:, 0]
    assert len(set(drawn)) == 1500                                            # no cell twice
    assert not np.array_equal(drawn, training.draw("y", 1500)[:, 0])          # each group its own draw
    training.world.seed = 1
    assert not np.array_equal(drawn, training.draw("x", 1500)[:, 0])          # and each seed


def test_replicate_halves_share_no_cell(monkeypatch):
    world = metrics._World(["x"], numbered(5), ["p", "q", "r"], 0)
    monkeypatch.setattr(metrics, "_score", lambda *halves: halves)
    halves = metrics._replicate({"x": metrics._Population(numbered(21), "x", world, "real")}, world, ["l2"])
    one, other = next(iter(halves[0])).cells[:, 0], halves[1]["x"].cells[:, 0]
    assert len(one) == 10 and sorted([*one, *other]) == list(range(21)) and max(one) > 10 > min(other)


def test_control_floor_draws_real_controls_without_replacement(case):
    world = metrics._World(["g02"], case["control"], case["genes"], 0)
    drawn, again = ([*metrics._floor("control", world, None, {"g02": n})][0].cells for n in (70, 100))
    assert np.array_equal(np.sort(drawn, 0), np.sort(case["control"], 0)) and len(again) == 100
    other = metrics._World(["g02"], case["control"], case["genes"], 1)
    assert not np.array_equal(drawn, [*metrics._floor("control", other, None, {"g02": 70})][0].cells)


def test_seed_decides_the_draws_and_nothing_else(case, result):
    same, other = metrics.evaluate(**case), metrics.evaluate(**case, seed=1)
    assert same == result
    assert other["aggregate"] == result["aggregate"] and other["floors"]["mean"] == result["floors"]["mean"]
    assert other["floors"]["control"] != result["floors"]["control"] and other["replicate"] != result["replicate"]


def test_score_vs_floor(result):
    complete = ["control", "mean", "mean_cells"]                      # additive exists for three of five conditions
    for key, better in (("l2", min), ("pearson_delta", max), ("e_distance", min)):
        best = better(result["floors"][f][key] for f in complete)
        expected = (result["aggregate"][key] - best) / (result["replicate"][key] - best)
        assert result["score_vs_floor"][key] == pytest.approx(expected)
    floors = {"control": {"pearson_delta": None, "l2": None}, "mean": {"pearson_delta": -0.2, "l2": 4.0},
              "additive": None}
    made_up = {"floors": floors, "aggregate": {"pearson_delta": 0.4, "l2": 3.0},
               "replicate": {"pearson_delta": 0.8, "l2": 5.0}, "replicate_per_condition": {}}
    made_up["floors_per_condition"] = dict.fromkeys(floors, {})
    assert metrics._against_floor("pearson_delta", made_up, ())[0] == pytest.approx(0.5)   # undefined is 0
    assert metrics._against_floor("l2", made_up, ()) == (None, None)  # the replicate is no better than the floor
    made_up["replicate"]["l2"] = 2.0
    assert metrics._against_floor("l2", made_up, ())[0] == pytest.approx(0.5)


def test_share_of_conditions_in_which_the_replicate_beats_the_best_floor(result):
    of = {"l2": [3.0, 2.0, 1.0, 4.0], "pearson_delta": [0.5, None, -0.1, 0.0]}
    floors = {"l2": [4.0, 1.0, 1.0, 5.0], "pearson_delta": [None, 0.2, None, 0.1]}

    def table(values):
        return {c: {k: values[k][i] for k in values} for i, c in enumerate("abcd")}

    worse = {k: [v and {"l2": 9.0, "pearson_delta": -0.5}[k] for v in values] for k, values in floors.items()}
    made_up = {"floors": {"control": {"l2": 9.0, "pearson_delta": -0.5}, "mean": {"l2": 2.75, "pearson_delta": 0.15}},
               "floors_per_condition": {"control": table(worse), "mean": table(floors)},
               "replicate_per_condition": table(of), "aggregate": dict.fromkeys(of), "replicate": dict.fromkeys(of)}

    def share(key, made_up=made_up, partial=()):
        return metrics._against_floor(key, made_up, partial)[1]

    assert share("l2") == pytest.approx(2.5 / 4)          # a tie is half
    assert share("pearson_delta") == pytest.approx(1 / 3)  # 'b' has none; undefined is 0
    assert share("l2", partial=("mean",)) == 1                         # which is partial: not compared
    assert share("l2", made_up | {"floors": {}}) is None
    best = min(("control", "mean", "mean_cells"), key=lambda name: result["floors"][name]["l2"])
    wins = [v["l2"] < result["floors_per_condition"][best][c]["l2"]
            for c, v in result["replicate_per_condition"].items()]
    assert result["can_tell"]["l2"] == np.mean(wins) and result["can_tell"]["rmse_rank"] is None
    [note] = metrics.cannot_tell({"can_tell": {"l2": 0.5, "pds": 0.7, "mse": 0.699, "mae": None, "acc": 0.1}})
    assert "l2 50%, mse 70% (" in note and metrics.cannot_tell({"can_tell": {"l2": 1.0}}) == []


def test_without_training_there_is_only_the_control_floor(case, result):
    alone = metrics.evaluate(**changed(case, train=None))
    assert not set(metrics.SYSTEMA) & set(alone["aggregate"])
    assert alone["floors"]["mean"] is alone["floors"]["mean_cells"] is alone["floors"]["additive"] is None
    assert alone["floors"]["control"]["l2"] == result["floors"]["control"]["l2"]
    centroid = np.mean([x.mean(0, dtype=float) for x in case["train"].values()], axis=0)
    given = metrics.evaluate(**changed(case, train=None), train_mean=centroid)
    assert given["aggregate"]["pearson_delta_hat"] == pytest.approx(result["aggregate"]["pearson_delta_hat"])
    assert given["floors"]["mean"]["l2"] == pytest.approx(result["floors"]["mean"]["l2"])
    assert given["floors"]["mean_cells"] is None


def test_cells_are_read_once(case, result):
    class Once(data.Lazy):
        def __init__(self, populations):
            super().__init__(list(populations), dict(populations).pop)

    once = {k: Once(case[k]) for k in ("pred", "real", "train")}
    assert metrics.evaluate(**changed(case, **once))["floors"] == result["floors"]


def test_groups_by_number_of_perturbations(case, result):
    values = {c: v["l2"] for c, v in result["per_condition"].items()}
    assert result["groups"]["single"]["l2"] == pytest.approx(np.mean([values["g02"], values["g20"]]))
    doubles = [values[c] for c in ("g00+g01", "g03+g04", "absent+g21")]
    assert list(result["groups"]) == ["single", "double"]
    assert result["groups"]["double"]["l2"] == pytest.approx(np.mean(doubles))


# -------------------------------------------------------------------------------- covariates

def covariate_case():
    """Two cell types with different controls in one case, and the two cases that it joins."""
    a, b = small_case(seed=3), small_case(seed=4)
    joined = {k: {f"{c}@{v}": x for v, half in (("one", a), ("two", b)) for c, x in half[k].items()}
              for k in ("pred", "real", "train")}
    return changed(a, **joined, control={"one": a["control"], "two": b["control"]}), {"one": a, "two": b}


def test_covariates_are_scored_each_against_its_own_control_and_ranked_apart():
    both, halves = covariate_case()
    result, alone = metrics.evaluate(**both), {v: metrics.evaluate(**half) for v, half in halves.items()}
    for v, half in alone.items():
        for c, values in half["per_condition"].items():
            for key in set(metrics.KEYS) - set(PCA_KEYS) - {"mmd_pca30_rank"}:
                assert close(result["per_condition"][f"{c}@{v}"][key], values[key]), (c, v, key)
    for key in ("pds", "mmd_rank", "pearson_delta_hat"):
        assert result["aggregate"][key] == pytest.approx(np.mean([half["aggregate"][key] for half in alone.values()]))
    mean_floors = [half["floors"]["mean"]["l2"] for half in alone.values()]
    assert result["floors"]["mean"]["l2"] == pytest.approx(np.mean(mean_floors))
    assert result["info"]["cells_control"] == {"one": 70, "two": 70}


def test_additive_floor_across_covariates():
    both = covariate_case()[0]
    control = both["control"] | {"three": both["control"]["one"] + 1}
    train = {g: x for g, x in both["train"].items() if g != "g00@one"} | {"g02@two": both["train"]["g01@two"]}

    def training(train):
        return metrics._Training(train, metrics._World(list(both["pred"]), control, both["genes"], 0), 40)

    def effect(group):
        return train[group].mean(0, dtype=float) - control[group.partition("@")[2]].mean(0, dtype=float)

    of = training(train)
    assert of.additive("g00+g01@one") == pytest.approx(effect("g00@two") + effect("g01@one"))
    assert of.additive("g00+g01@two") == pytest.approx(effect("g00@two") + effect("g01@two"))
    assert of.additive("g02@one") == pytest.approx(effect("g02@two"))                # transfer
    assert of.additive("g20@one") is None
    train["g02@three"] = train["g01@one"]
    average = (effect("g02@two") + effect("g02@three")) / 2
    assert training(train).additive("g02@one") == pytest.approx(average)
    elsewhere = training({g: x for g, x in train.items() if g.endswith("two")})
    assert elsewhere.centroid("one") == pytest.approx(elsewhere.centroid("two"))     # no training there: all of it


def test_controls_of_other_covariates_do_not_matter():
    both = covariate_case()[0]
    one = {k: {g: x for g, x in both[k].items() if g.endswith("@one")} for k in ("pred", "real")}
    results = [metrics.evaluate(**changed(both, **one, keys=PCA_KEYS, control={"one": both["control"]["one"], **more}),
                                floors=False)["aggregate"] for more in ({}, {"two": both["control"]["two"] + 3})]
    assert results[0] == results[1]


# -------------------------------------------------------------------------------- results

def test_result_is_plain_json(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {"aggregate", "n_valid", "ci95", "groups", "per_condition", "floors", "floors_per_condition",
                           "replicate", "replicate_per_condition", "score_vs_floor", "can_tell", "info"}
    assert list(result["aggregate"]) == list(metrics.KEYS)


def test_intervals_are_those_of_a_bootstrap_over_conditions(result):
    values = [v["l2"] for v in result["per_condition"].values()]
    means = np.random.default_rng(0).choice(values, (20000, 5)).mean(axis=1)
    many = metrics._intervals(result["per_condition"], ["l2"], np.random.default_rng(1), 20000)["l2"]
    assert many == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=0.005)
    assert result["ci95"]["l2"] == pytest.approx(many, rel=0.05)
    some = {name: {"l2": value} for name, value in zip("abcd", (1.0, None, 1.0, None))}      # over those defined
    assert metrics._intervals(some, ["l2"], np.random.default_rng(0), 500) == {"l2": [1.0, 1.0]}


def test_keys_select_what_is_computed(case, result):
    some = metrics.evaluate(**changed(case, keys=["mmd_rank", "l2", "overlap_at_n"]))
    assert list(some["aggregate"]) == ["l2", "overlap_at_n", "mmd_rank"] == list(some["floors"]["mean"])
    default = metrics.evaluate(**changed(case, keys=None))
    assert list(default["aggregate"]) == [k for k in metrics.KEYS if k not in ("mmd_rank", "mmd_pca30_rank")]
    for part in (some, default):
        assert part["aggregate"] == {k: result["aggregate"][k] for k in part["aggregate"]}
    assert default["replicate"]["rmse_rank"] is not None and default["score_vs_floor"]["rmse_rank"] is None
    for floor in default["floors"].values():                          # their ranks are costly, and tell little
        assert floor["rmse_rank"] is None and floor["pds"] is not None


def test_a_metric_of_ones_own_is_a_function_and_a_line_of_the_table(monkeypatch, case):
    furthest = metrics.Key("↓", 0, "largest error of a gene", lambda x: float(np.abs(x.q - x.m).max()))
    monkeypatch.setitem(metrics.KEYS, "furthest", furthest)
    result = metrics.evaluate(**changed(case, keys=None))
    for c, x in case["real"].items():
        error = np.abs(case["pred"][c].mean(0, dtype=float) - x.mean(0, dtype=float)).max()
        assert result["per_condition"][c]["furthest"] == pytest.approx(error)
    assert result["floors"]["mean"]["furthest"] > result["replicate"]["furthest"] > 0
    assert metrics.format_table(metrics.result_rows(result, "ours"), ["furthest"]).startswith("           furthest↓")


def test_many_conditions_cap_the_pairwise_ranks(monkeypatch, case, result):
    monkeypatch.setattr(metrics, "MANY_CONDITIONS", 4)
    monkeypatch.setattr(metrics, "FEW_CELLS", 20)
    capped = metrics.evaluate(**case, floors=False)
    assert "20 cells" in capped["info"]["notes"][0] and not any("MMD" in note for note in result["info"]["notes"])
    assert capped["aggregate"]["mmd"] == result["aggregate"]["mmd"]              # only the ranks
    assert 0 <= capped["aggregate"]["mmd_rank"] <= 1
    drawn = []
    for seed in (0, 1):
        world = metrics._World(list(case["real"]), case["control"], case["genes"], seed)
        rows = metrics._Population(case["real"]["g00+g01"], "g00+g01", world, "real").ranked_rows
        assert len(set(rows)) == 20 and max(rows) >= 20                          # not the first, none twice
        drawn.append(rows)
    assert not np.array_equal(*drawn)
    both = covariate_case()[0]                                                  # pairs within a covariate count
    monkeypatch.setattr(metrics, "MANY_CONDITIONS", 5)
    world = metrics._World(list(both["pred"]), both["control"], both["genes"], 0)
    assert world.rank_cells("g02@one") == metrics.RANK_CELLS


@pytest.mark.parametrize("width", [20, 60, 100, 1000])
def test_table(result, width, monkeypatch):
    """It fits the width, and says what it leaves out."""
    monkeypatch.setenv("COLUMNS", str(width))
    rows = metrics.result_rows(result, "ours", intervals=True)
    lines = metrics.format_table(rows, list(metrics.KEYS)[:-1], "there").splitlines()
    last = lines.pop()
    assert [line.split()[0] for line in lines[1:]] == [*metrics.FLOORS, "ours", "95%", "95%", "replicate", "vs"]
    assert f"{result['aggregate']['l2']:.3f}" in lines[5] and f"{result['ci95']['l2'][0]:.3f}" in lines[6]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= width and lines[0].split()[0] == "l2↓"
    left_out = len(metrics.KEYS) - len(lines[0].split())
    assert last == f"{left_out} more metric{'s' * (left_out > 1)} in there" and (width < 1000 or left_out == 1)
    assert metrics.format_table([("x", {})], ["l2"]).split() == ["l2↓", "x", "-"]
    assert metrics.format_table([("x", {"l2": 1.0})]).split() == ["l2↓", "x", "1.000"]    # what nobody measured


@pytest.mark.parametrize("change, message", [
    (lambda c: {"pred": {}}, "no real cells of any predicted condition"),
    (lambda c: {"pred": {"g99": c["pred"]["g02"]}}, "no real cells of any predicted condition"),
    (lambda c: {"keys": ["l3"]}, "unknown metrics.*l3"),
    (lambda c: {"genes": c["genes"][:-1]}, "shape"),
    (lambda c: {"genes": ["g00"] * 90}, "not unique"),
    (lambda c: {"pred": {"g02": c["pred"]["g02"][:0]}}, "predicted cells of 'g02' have shape"),
    (lambda c: {"pred": {"g02": c["pred"]["g02"][0]}}, "predicted cells of 'g02' have shape"),
    (lambda c: {"pred": {"g02": c["pred"]["g02"] * np.nan}}, "predicted cells of 'g02' hold NaN"),
    (lambda c: {"control": {"other": c["control"]}}, "no control cells"),
])
def test_inputs_that_do_not_fit(case, change, message):
    with pytest.raises(data.DataError, match=message):
        metrics.evaluate(**{**case, **change(case)})


# -------------------------------------------------------------------------------- the report of a run

class Dataset:
    """What report() asks of a data.Dataset, on the small case with its genes from the last to the first."""

    def __init__(self, case, part="test"):
        self.genes, self.eval_genes = case["genes"], np.arange(90)[::-1]
        self.case, self.part = case, part

    def populations(self, part, genes):
        return {c: x[:, genes] for c, x in self.case["real" if part == self.part else "train"].items()}

    def controls(self, part, genes):
        return self.case["control"][:, genes]


@pytest.fixture
def reported(case, tmp_path, capsys):
    """The folder of a reported run, and what was printed."""
    run = SimpleNamespace(config=data.RunConfig(data="file.h5ad", split="additive", seed=5), dataset=Dataset(case),
                          out=tmp_path, device=torch.device("cpu"), capped=7,
                          journal=SimpleNamespace(seconds=lambda: 3661.2))
    own, other = ({c: x[:, ::-1] for c, x in case[side].items()} for side in ("pred", "real"))
    metrics.report(run, "ours", {"": own, " (raw)": other})
    return tmp_path, capsys.readouterr().out


def test_report_writes_scores_and_prints_the_table(case, result, reported):
    folder, text = reported
    written = json.loads((folder / "metrics.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == ["genes.tsv", "metrics.json"]
    assert all(close(value, result["aggregate"][k]) for k, value in written["aggregate"].items())
    given = {"method": "ours", "data": "file.h5ad", "split": "additive", "fold": 0, "seed": 5}
    assert {k: written[k] for k in given} == given and written["seconds"] >= 3661.2 and written["peak_memory_mb"] > 0
    assert written["config"]["seed"] == 5 and {"python", "torch", "numpy"} <= set(written["versions"])
    assert written["variants"][" (raw)"]["aggregate"]["l2"] == 0
    assert "5 test conditions, 90 genes; trained and scored in 1:01:01" in text
    assert "note: 7 generated values were above" in text and "more metrics in metrics.json" in text
    rows = [line[:10].strip() for line in text.splitlines()]
    assert rows[rows.index("additive"):][:5] == ["additive", "ours", "ours (raw)", "replicate", "vs floor"]


def test_validation_scores_its_conditions_and_logs_them(case, capsys):
    result = metrics.evaluate(case["pred"], case["real"], case["control"], case["genes"], floors=False)["aggregate"]
    lines = []
    run = SimpleNamespace(config=data.RunConfig(), dataset=Dataset(case, "val"), say=print,
                          journal=SimpleNamespace(log=lambda *line: lines.append(line)))
    score = metrics.validation(run, 30, {c: x[:, ::-1] for c, x in case["pred"].items()})
    assert score == {k: pytest.approx(result[k]) for k in ("l2", "pearson_delta", "e_distance")}
    assert lines == [(30, {"val": score})]
    assert f"validation  l2 {score['l2']:.4f}  pearson_delta" in capsys.readouterr().out


def test_genes_tsv_holds_what_happens_to_every_gene(case, reported):
    rows = [line.split("\t") for line in (reported[0] / "genes.tsv").read_text().splitlines()]
    assert rows.pop(0) == ["condition", "gene", "control_mean", "pred_mean", "real_mean", "pred_lfc", "real_lfc",
                           "real_p_adjusted"]
    assert [r[0] for r in rows] == sorted(c for c in case["real"] for _ in range(90))
    c = case["control"].mean(0, dtype=float)
    for condition, x in case["real"].items():
        mine = {r[1]: [float(v) for v in r[2:]] for r in rows if r[0] == condition}
        q, m = case["pred"][condition].mean(0, dtype=float), x.mean(0, dtype=float)
        p = stats.false_discovery_control(slow_p(x, case["control"]))
        lfc = [np.log2((np.expm1(mean) + 1e-9) / (np.expm1(c) + 1e-9)) for mean in (q, m)]
        table = np.array([mine[g] for g in case["genes"]]).T
        assert table == pytest.approx(np.array([c, q, m, *lfc, p]), rel=1e-4, abs=1e-5)
        listed = [values[-1] for values in mine.values()]
        assert listed == sorted(listed)


# -------------------------------------------------------------------------------- command line

def write(path, populations, genes, key="condition", **options):
    """An AnnData file of {condition: (cells, G)}; with '@' in a name, of a condition and a cell type."""
    labels = [c.partition("@") for c, x in populations.items() for _ in x]
    obs = {key: [c for c, _, _ in labels]}
    if any(v for _, _, v in labels):
        obs["cell_type"] = [v for _, _, v in labels]
    data.write_h5ad(path, np.vstack(list(populations.values())), obs, genes, **options)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory, case):
    """pred.h5ad, real.h5ad (more genes and conditions, other order and spelling) and train.h5ad of the small case."""
    folder = tmp_path_factory.mktemp("files")
    write(folder / "pred.h5ad", case["pred"], case["genes"])
    spelled = {"g02": "g02+ctrl", "g00+g01": "g01+g00"}
    real = {"ctrl": case["control"], "g40+ctrl": case["train"]["g00"]}
    real |= {spelled.get(c, c): x for c, x in case["real"].items()}
    more = {c: np.hstack([np.ones((len(x), 2)), x])[:, ::-1].astype(np.float32) for c, x in real.items()}
    write(folder / "real.h5ad", more, [*case["genes"][::-1], "z2", "z1"])
    train = case["train"] | {"g02": case["real"]["g02"]}                      # a predicted condition: must be dropped
    write(folder / "train.h5ad", train, case["genes"])
    return folder


class Done(NamedTuple):
    code: int
    text: str
    error: str
    written: dict | None


@pytest.fixture
def score(capsys, tmp_path):
    """score(pred, real, *flags) -> exit code, standard output, standard error, and the JSON file that was written."""
    def score(*flags):
        out = tmp_path / "sub" / "m.json"
        out.unlink(missing_ok=True)
        try:
            metrics.main([*map(str, flags), "--out", str(out)])
            code = 0
        except SystemExit as end:
            code = end.code
        return Done(code, *capsys.readouterr(), json.loads(out.read_text()) if out.exists() else None)
    return score


def test_cells_without_a_count_are_noted(tmp_path):
    counts = np.ones((6, 3), np.float32)
    counts[4] = 0
    labels = {"condition": ["control", "control", "a", "a", "a", "a"]}
    data.write_h5ad(tmp_path / "pred.h5ad", counts, labels, ["a", "b", "c"])
    _, cells = metrics.read_prediction(tmp_path / "pred.h5ad", data.ReadConfig(counts=True))
    assert any("cells without a count in these genes: 1 " in note for note in cells.notes), cells.notes


def test_the_scores_replace_no_input(files, capsys):
    for name in ("pred.h5ad", "real.h5ad", "train.h5ad"):
        before = (files / name).read_bytes()
        with pytest.raises(SystemExit) as end:
            metrics.main([str(files / "pred.h5ad"), str(files / "real.h5ad"), "--reference", str(files / "train.h5ad"),
                          "--out", str(files / ".." / files.name / name)])
        assert end.value.code == 2 and "is an input" in capsys.readouterr().err
        assert (files / name).read_bytes() == before


def test_command_line_scores_two_files(files, result, score, tmp_path):
    done = score(files / "pred.h5ad", files / "real.h5ad", "--reference", files / "train.h5ad")
    assert done.code == 0 and not done.error
    assert "l2↓" in done.text and "replicate" in done.text and "95% from" in done.text and "vs floor" in done.text
    assert f"more metrics in {tmp_path / 'sub' / 'm.json'}" in done.text
    assert "1 measured conditions are not predicted and left out: g40" in done.text
    assert "2 genes are not in the prediction" in done.text
    assert set(done.written["aggregate"]) == set(metrics.KEYS) - set(metrics.MMD_RANKS)
    for key, value in done.written["aggregate"].items():
        assert close(value, result["aggregate"][key], 1e-6), key
        assert close(done.written["floors"]["additive"][key], result["floors"]["additive"][key], 1e-6), key


def test_command_line_as_a_user_runs_it(files):
    command = [sys.executable, "metrics.py", str(files / "pred.h5ad"), str(files / "real.h5ad"), "--keys", "l2,pds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prediction" in done.stdout and "without --reference" in done.stdout and "pds↑" in done.stdout


def test_systema_reference_from_uns_is_matched_by_gene(case, result, files, score, tmp_path):
    centroid = np.mean([x.mean(0, dtype=float) for x in case["train"].values()], axis=0)
    real = {"control": case["control"]} | case["real"]
    real = {c: np.hstack([x[:, ::-1], x[:, :3]]) for c, x in real.items()}
    write(tmp_path / "real.h5ad", real, case["genes"][::-1] + ["z1", "z2", "z3"],
          uns={"train_pert_mean": np.append(centroid[::-1], [9, 9, 9])})
    done = score(files / "pred.h5ad", tmp_path / "real.h5ad")
    assert done.code == 0 and "no floor but control and mean" in done.text, done.error
    key = "pearson_delta_hat"
    assert close(done.written["aggregate"][key], result["aggregate"][key], 1e-6)
    assert done.written["floors"]["mean"]["l2"] == pytest.approx(result["floors"]["mean"]["l2"], rel=1e-5)


def test_seed_of_the_command_line(files, score):
    zero, one = (score(files / "pred.h5ad", files / "real.h5ad", "--seed", seed, "--keys", "l2,pds").written
                 for seed in (0, 1))
    assert list(zero["aggregate"]) == ["l2", "pds"] and zero["aggregate"] == one["aggregate"]
    assert zero["floors"]["control"] != one["floors"]["control"] and one["info"]["seed"] == 1


def test_conditions_that_only_one_file_has(files, case, result, score, tmp_path):
    """Control cells in the prediction do not matter."""
    pred = {("g98" if c == "g20" else c): x for c, x in case["pred"].items()} | {"g99": case["pred"]["g02"]}
    write(tmp_path / "pred.h5ad", pred | {"control": case["control"] * 0.5}, case["genes"])
    done = score(tmp_path / "pred.h5ad", files / "real.h5ad", "--no-floors")
    assert done.code == 0 and set(done.written["per_condition"]) == set(case["pred"]) - {"g20"}, done.error
    assert done.written["per_condition"]["g02"]["l2"] == pytest.approx(result["per_condition"]["g02"]["l2"])
    assert done.written["floors"] == {} == done.written["replicate"]
    for note in ("2 predicted conditions were not measured and left out: g98, g99",
                 "2 measured conditions are not predicted and left out: g20, g40"):
        assert note in done.written["info"]["notes"] and f"note: {note}" in done.text


def test_counts_in_the_real_file_are_normalised_over_all_its_genes(case, score, tmp_path):
    """One's own run: the prediction holds some genes, log-normalised; the real file holds counts of all genes."""
    rng = np.random.default_rng(0)
    counts = {c: rng.poisson(1.5, (30, 90)).astype(np.float32) for c in [*case["real"], "control"]}
    logged = {c: np.log1p(x / x.sum(1, keepdims=True) * 1e4)[:, 10:30] for c, x in counts.items()}
    done = score(write(tmp_path / "pred.h5ad", logged, case["genes"][10:30]),
                 write(tmp_path / "real.h5ad", counts, case["genes"]))
    assert done.code == 0 and done.written["aggregate"]["l2"] < 1e-4 and done.written["info"]["genes"] == 20


def test_columns_and_labels_apply_to_the_files_that_have_them(files, case, score, tmp_path):
    """A column that only one file has is searched for in the others; one that no file has is an error."""
    def renamed(name, cells, key="what"):
        """A file with other names: the column, and the genes but for one column of var."""
        path = write(tmp_path / name, cells, [f"ENSG{i}" for i in range(90)], key=key)
        with h5py.File(path, "r+") as file:
            file["var/my_symbol"] = np.array(case["genes"], dtype=bytes)
        return path

    pred, real, train = (renamed(f"{name}.h5ad", case[name] | ({"NTC": case["control"]} if name == "real" else {}))
                         for name in ("pred", "real", "train"))
    usual = write(tmp_path / "usual.h5ad", {"NTC": case["control"]} | case["real"], case["genes"])
    flags = ("--pert-key", "what", "--control", "NTC", "--gene-key", "my_symbol", "--keys", "l2")
    for three in ((files / "pred.h5ad", real), (pred, real), (pred, usual),
                  (files / "pred.h5ad", usual, "--reference", train)):
        done = score(*three, *flags)
        assert done.code == 0 and done.written["per_condition"].keys() == case["pred"].keys(), (three, done.error)
    done = score(files / "pred.h5ad", usual, *flags)
    assert done.code == 2 and "no column 'my_symbol' (--gene-key)" in done.error
    config = data.ReadConfig(pert_key="what", gene_key="my_symbol")                  # of bench.py's data
    genes, cells = metrics.read_prediction(files / "pred.h5ad", config)
    assert genes == case["genes"] and set(cells) == set(case["pred"])


def test_a_column_that_marks_the_controls_marks_none_of_a_prediction(case, score, tmp_path):
    for side, cells in (("pred", case["pred"]), ("real", case["real"] | {"NTC": case["control"]})):
        labels = np.repeat(list(cells), [len(x) for x in cells.values()])
        data.write_h5ad(tmp_path / f"{side}.h5ad", np.vstack(list(cells.values())),
                        {"condition": labels, "nperts": (labels != "NTC").astype(int)}, case["genes"])
    done = score(tmp_path / "pred.h5ad", tmp_path / "real.h5ad", "--control", "nperts=0", "--keys", "l2")
    assert done.code == 0 and done.written["per_condition"].keys() == case["pred"].keys(), done.error


def test_covariates_on_the_command_line(score, tmp_path):
    both = covariate_case()[0]
    control = {f"control@{v}": x for v, x in both["control"].items()}
    pred, train = (write(tmp_path / f"{k}.h5ad", both[k], both["genes"]) for k in ("pred", "train"))
    real = write(tmp_path / "real.h5ad", both["real"] | control, both["genes"])
    done = score(pred, real, "--covariates", "cell_type", "--reference", train)
    assert done.code == 0, done.error
    expected = metrics.evaluate(**both)
    assert set(done.written["per_condition"]) == set(both["pred"])
    assert all(close(value, expected["aggregate"][k], 1e-6) for k, value in done.written["aggregate"].items())
    half = write(tmp_path / "half.h5ad", both["real"] | {"control@one": control["control@one"]}, both["genes"])
    done = score(pred, half, "--covariates", "cell_type")
    assert done.code == 2 and "no control cells of ['two']" in done.error


@pytest.mark.parametrize("change, limits", [
    (lambda x: x - 0.05, "from -0.05 to"), (lambda x: x / 8, ""),
    (lambda x: np.where(x == x.max(), 18.9, x), "to 18.9"), (lambda x: np.where(x == x.max(), 34.6, x), "to 34.6"),
])
def test_predictions_that_no_cell_could_have_are_scored_with_a_note(files, case, score, tmp_path, change, limits):
    """A model that does not clamp, one that runs away, a mean over few cells that ends low."""
    x = change(np.vstack(list(case["pred"].values())))
    ends = np.cumsum([len(cells) for cells in case["pred"].values()])[:-1]
    write(tmp_path / "pred.h5ad", dict(zip(case["pred"], np.split(x, ends))), case["genes"])
    done = score(tmp_path / "pred.h5ad", files / "real.h5ad", "--no-floors")
    assert done.code == 0 and "l2" in done.text, done.error
    assert limits in done.text and ("while log1p CP10k lies between 0 and 9.21" in done.text) == bool(limits)


@pytest.mark.parametrize("side, change, flags, notes", [
    ("pred", lambda x: x, (), ()),
    ("pred", np.log1p, (), ("predicted values average",)),
    ("pred", lambda x: 2 * x, (), ("predicted values average",)),
    ("pred", np.trunc, (), ("pred.h5ad: integers up to", "that were cast to integers")),
    ("real", np.expm1, ("--lognorm",), ("real.h5ad: values from 0 to", "are both log1p CP10k?")),
])
def test_values_of_another_kind_than_the_other_file_has_are_noted(case, score, tmp_path, side, change, flags, notes):
    """A logarithm taken twice or cast to integers; counts that were declared log-normalised."""
    cells = {"pred": case["pred"], "real": {"control": case["control"]} | case["real"]}
    cells[side] = {c: change(x) for c, x in cells[side].items()}
    pred, real = (write(tmp_path / f"{name}.h5ad", x, case["genes"]) for name, x in cells.items())
    done = score(pred, real, "--no-floors", "--keys", "l2", *flags)
    assert done.code == 0 and all(note in done.text for note in notes), done
    assert bool(notes) == any(word in done.text for word in ("integers", "average", "while log1p"))


def test_unusable_input_is_refused(files, case, score, tmp_path):
    genes, real = case["genes"], {"control": case["control"]} | case["real"]
    holes = write(tmp_path / "holes.h5ad", {"g02": np.full((5, 90), np.nan)}, genes)
    other = write(tmp_path / "other.h5ad", {"g98": case["pred"]["g02"]}, genes)
    renamed = write(tmp_path / "renamed.h5ad", case["pred"], [*genes[:-1], "nowhere"])
    alone = write(tmp_path / "alone.h5ad", case["real"], genes)
    short = write(tmp_path / "short.h5ad", real, genes, uns={"train_pert_mean": np.ones(7)})
    hole = write(tmp_path / "hole.h5ad", real, genes, uns={"train_pert_mean": np.full(90, np.nan)})
    pred, good = files / "pred.h5ad", files / "real.h5ad"
    for flags, message in (((holes, good), "NaN"), ((other, good), "no real cells of any predicted condition (g98)"),
                           ((renamed, good), "lacks 1 of the 90 genes of the prediction (nowhere)"),
                           ((pred, alone), "control"), ((pred, short), "train_pert_mean"), ((pred, hole), "a number"),
                           ((pred, good, "--reference", alone), "holds only predicted conditions"),
                           ((tmp_path / "none.h5ad", good), "error: "), ((pred, good, "--keys", "l2,l3"), "l3"),
                           ((pred, good, "--frobnicate"), "--frobnicate"), ((pred, good, "--seed", -1), "--seed -1: "),
                           ((pred, good, "--cache-gb", "nan"), "--cache-gb nan: must be a number")):
        done = score(*flags)
        assert done.code == 2 and done.error.startswith("error: ") and message in done.error, message
        assert not done.text and done.written is None
