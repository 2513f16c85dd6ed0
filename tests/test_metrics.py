"""metrics.py against slow plain versions of every metric, against reference values, and on the inputs people bring.

The slow versions below use scipy and loops, share no code with metrics.py and follow the published formulas literally.
"""
import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import optimize, stats
from scipy.spatial.distance import cdist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import metrics  # noqa: E402

ORACLE = ROOT.parent / "shared" / "oracle" / "case_1"
ORACLE_KEYS = {
    "l2": "l2_mean", "mse": "mse", "mae": "mae", "rmse": "rmse_mean", "pearson_delta": "pearson_delta_realctrl",
    "pearson_delta_top20": "pearson_delta_top20", "pearson_delta_hat": "pearson_delta_hat",
    "pearson_delta_hat_top20": "pearson_delta_hat_top20", "spearman_delta": "spearman_delta",
    "de_spearman": "de_spearman_lfc_sig", "acc": "acc", "acc_top20": "acc_top20",
    "direction_match": "de_direction_match",
    "overlap_at_n": "overlap_at_N", "deg_recall_50": "deg_recall_top50", "pds": "pds_l1_paper_midrank",
    "pds_all_genes": "pds_all_genes", "pds_l2": "pds_l2_all_genes", "pds_cosine": "pds_cosine_all_genes",
    "e_distance": "edistance_pca50", "wasserstein": "wasserstein_sinkhorn_rel0.05_pca50", "discr_cos": "discr_cos",
    "mmd": "mmd_gex_perturbench", "mmd_pca30": "mmd_pca30_perturbench", "mmd_rbf": "mmd_rbf_median_gex",
    "cosine_logfc": "cosine_logfc", "rmse_rank": "rmse_mean_rank_midrank",
    "cosine_logfc_rank": "cosine_logfc_rank_half",
    "mmd_rank": "mmd_gex_rank_midrank", "mmd_pca30_rank": "mmd_pca30_rank_midrank",
    "deg_recall_50_rank": "deg_recall_top50_rank_midrank",
}
RANK_KEYS = ("pds", "pds_all_genes", "pds_l2", "pds_cosine", "rmse_rank", "cosine_logfc_rank", "mmd_rank",
             "mmd_pca30_rank", "deg_recall_50_rank")  # depend on the other conditions
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
    return dict(pred=pred, real=real, control=cells(rng, 70, base), genes=genes, train=train,
                keys="all")


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

def slow_de(x, control):
    """Per gene: scipy's Mann-Whitney and Welch t with equal n; BH over genes."""
    p, t = [], []
    for g in range(x.shape[1]):
        p.append(stats.mannwhitneyu(x[:, g], control[:, g], method="asymptotic", use_continuity=True).pvalue)
        a, b = x[:, g].astype(float), control[:, g].astype(float)
        sides = (a.mean(), a.std(ddof=1), len(a), b.mean(), b.std(ddof=1), len(a))
        score = stats.ttest_ind_from_stats(*sides, equal_var=False).statistic
        t.append(score if np.isfinite(score) else 0.0)
    p = np.nan_to_num(np.array(p), nan=1.0)
    return stats.false_discovery_control(p) < 0.05, np.array(t)


def slow_mid_rank(values, own):
    """(number of smaller + half the number of equal others) / (N - 1)."""
    smaller = sum(v < values[own] - 1e-9 for v in values)
    equal = sum(abs(v - values[own]) <= 1e-9 for v in values) - 1
    return (smaller + equal / 2) / (len(values) - 1)


def slow_energy(x, y):
    def mean(a, b):
        return sum(math.dist(u, v) for u in a for v in b) / (len(a) * len(b))
    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


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


def slow_scores(pred, real, control, genes, train, keys):
    """{condition: {key: value}} by scipy and loops."""
    names, c = list(pred), control.astype(float).mean(0)
    q, m = ({k: x.astype(float).mean(0) for k, x in side.items()} for side in (pred, real))
    reference = sum(x.astype(float).mean(0) for x in train.values()) / len(train)
    everything = np.concatenate([*real.values(), control]).astype(float)
    centre = everything.mean(0)
    axes = np.linalg.svd(everything - centre, full_matrices=False)[2][:50].T
    pcs = {side: {k: (x - centre) @ axes for k, x in cells.items()} for side, cells in (("p", pred), ("r", real))}
    de = {side: {k: slow_de(x, control) for k, x in cells.items()} for side, cells in (("p", pred), ("r", real))}

    def lfc(mean):
        return np.log2((np.expm1(mean) + 1e-9) / (np.expm1(c) + 1e-9))

    def perturbench(mean):
        return np.log2(mean + 0.1) - np.log2(c + 0.1)

    def cosine(a, b):
        return sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b))

    def largest(score, k):
        return sorted(range(len(score)), key=lambda i: (-abs(score[i]), i))[:k]

    def energy(a, b):
        return 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()

    def recall(a, b):
        return len(set(largest(de["p"][a][1], 50)) & set(largest(de["r"][b][1], 50))) / 50

    def distance(kind, a, b):
        """Prediction of a, truth of b."""
        if kind == "pds":
            keep = [i for i, g in enumerate(genes) if g not in a.split("+")]
            return sum(abs(q[a][i] - m[b][i]) for i in keep)
        return {"pds_all_genes": lambda: np.abs(q[a] - m[b]).sum(), "pds_l2": lambda: math.dist(q[a], m[b]),
                "pds_cosine": lambda: 1 - cosine(q[a] - c, m[b] - c), "rmse_rank": lambda: math.dist(q[a], m[b]),
                "cosine_logfc_rank": lambda: 1 - cosine(perturbench(q[a]), perturbench(m[b])),
                "mmd_rank": lambda: energy(pred[a], real[b]),
                "mmd_pca30_rank": lambda: energy(pcs["p"][a][:, :30], pcs["r"][b][:, :30]),
                "deg_recall_50_rank": lambda: -recall(a, b)}[kind]()

    out = {}
    for k in names:
        top = largest(m[k] - c, 20)
        sig_p, sig_r = de["p"][k][0], de["r"][k][0]
        where_p, where_r = np.flatnonzero(sig_p), np.flatnonzero(sig_r)
        n = len(where_r)
        best = [set(w[largest(lfc(mean)[w], n)]) for w, mean in ((where_p, q[k]), (where_r, m[k]))]
        cost = cdist(pcs["p"][k], pcs["r"][k])
        out[k] = {
            "l2": math.sqrt(sum((q[k] - m[k]) ** 2)), "mse": sum((q[k] - m[k]) ** 2) / len(c),
            "mae": sum(abs(q[k] - m[k])) / len(c), "rmse": math.sqrt(sum((q[k] - m[k]) ** 2) / len(c)),
            "pearson_delta": stats.pearsonr(q[k] - c, m[k] - c)[0],
            "pearson_delta_top20": stats.pearsonr((q[k] - c)[top], (m[k] - c)[top])[0],
            "pearson_delta_hat": stats.pearsonr(q[k] - reference, m[k] - reference)[0],
            "pearson_delta_hat_top20": stats.pearsonr((q[k] - reference)[top], (m[k] - reference)[top])[0],
            "spearman_delta": stats.spearmanr(q[k] - c, m[k] - c)[0],
            "de_spearman": stats.spearmanr(lfc(q[k])[sig_r], lfc(m[k])[sig_r])[0],
            "acc": sum((a > 0) == (b > 0) for a, b in zip(q[k] - c, m[k] - c)) / len(c),
            "acc_top20": sum(((q[k] - c)[i] > 0) == ((m[k] - c)[i] > 0) for i in top) / 20,
            "direction_match": np.mean(np.sign(q[k] - c)[sig_r] == np.sign(m[k] - c)[sig_r]),
            "overlap_at_n": len(best[0] & best[1]) / n, "deg_recall_50": recall(k, k),
            "e_distance": energy(pcs["p"][k], pcs["r"][k]), "wasserstein": slow_sinkhorn(cost, 0.05 * cost.mean()),
            "discr_cos": cosine(q[k] - c, m[k] - c), "mmd": energy(pred[k], real[k]) / 2,
            "mmd_pca30": energy(pcs["p"][k][:, :30], pcs["r"][k][:, :30]) / 2,
            "mmd_rbf": slow_mmd_rbf(pred[k], real[k]),
            "cosine_logfc": cosine(perturbench(q[k]), perturbench(m[k])),
        }
        for kind in ("pds", "pds_all_genes", "pds_l2", "pds_cosine"):
            out[k][kind] = 1 - slow_mid_rank([distance(kind, k, other) for other in names], names.index(k))
        for kind in ("rmse_rank", "cosine_logfc_rank", "mmd_rank", "mmd_pca30_rank", "deg_recall_50_rank"):
            out[k][kind] = slow_mid_rank([distance(kind, other, k) for other in names], names.index(k))
    return out


# -------------------------------------------------------------------------------- numbers

# aggregate values of small_case() by slow_scores()
EXPECTED = {
    "l2": 3.09158756, "mse": 0.10960701, "mae": 0.20929849, "rmse": 0.32588194, "pearson_delta": 0.66748731,
    "pearson_delta_top20": 0.81823528, "pearson_delta_hat": 0.56784589, "pearson_delta_hat_top20": 0.73669315,
    "spearman_delta": 0.52384878, "de_spearman": 0.69363409, "acc": 0.67111111, "acc_top20": 0.94000000,
    "direction_match": 0.98823529, "overlap_at_n": 0.33488004, "deg_recall_50": 0.66000000, "pds": 0.85000000,
    "pds_all_genes": 0.85000000, "pds_l2": 0.85000000, "pds_cosine": 0.85000000, "e_distance": 1.52261547,
    "wasserstein": 6.77684711, "discr_cos": 0.66006348, "mmd": 0.72921554, "mmd_pca30": 0.82414029, "mmd_rbf":
    0.05687703, "cosine_logfc": 0.55104372, "rmse_rank": 0.25000000, "cosine_logfc_rank": 0.15000000, "mmd_rank":
    0.25000000, "mmd_pca30_rank": 0.25000000, "deg_recall_50_rank": 0.15000000,
}


def test_every_key_equals_the_slow_version(case, result):
    slow = slow_scores(**case)
    assert set(slow["g02"]) == set(metrics.KEYS)
    for group, values in slow.items():
        for key, value in values.items():
            assert close(result["per_condition"][group][key], value, 1e-6), (group, key, value)
    for key in metrics.KEYS:
        values = [v[key] for v in slow.values()]
        assert result["n_valid"][key] == 5 and close(result["aggregate"][key], sum(values) / 5, 1e-6)


@pytest.mark.parametrize("key", metrics.KEYS)
def test_numbers_of_the_small_case(result, key):
    assert close(result["aggregate"][key], EXPECTED[key], 1e-5)


@pytest.fixture(scope="module")
def oracle():
    if not ORACLE.exists():
        pytest.skip("reference values are not at hand")
    real, pred = data.read_cells(ORACLE / "real.h5ad"), data.read_cells(ORACLE / "pred.h5ad")
    populations = [{c: x.X[x.condition == c] for c in set(x.condition) - {"control"}} for x in (pred, real)]
    control = real.X[real.condition == "control"]
    result = metrics.evaluate(*populations, control, real.genes, train_mean=real.uns["train_pert_mean"], floors=False,
                              keys="all")
    return result, json.loads((ORACLE / "expected.json").read_text())["metrics"]


@pytest.mark.parametrize("key", metrics.KEYS)
def test_agrees_with_the_reference_implementations(oracle, key):
    result, expected = oracle[0], oracle[1][ORACLE_KEYS[key]]
    rel = {"mmd": 3e-4, "mmd_pca30": 2e-4}.get(key, 1e-6)
    assert result["aggregate"][key] == pytest.approx(expected["value"], rel=rel)
    assert result["n_valid"][key] == expected["n_valid"]
    for name, value in expected["per_perturbation"].items():
        canonical = "+".join(sorted(name.split("+")))
        assert result["per_condition"][canonical][key] == pytest.approx(value, rel=rel, abs=1e-9)


def test_documented_variants_agree_too(oracle):
    """Keyword arguments, against the values of the tools that compute these."""
    expected = oracle[1]
    real, pred = data.read_cells(ORACLE / "real.h5ad"), data.read_cells(ORACLE / "pred.h5ad")
    names = sorted(set(real.condition) - {"control"})
    side = {s: [x.X[x.condition == c].toarray() for c in names] for s, x in (("p", pred), ("r", real))}
    control = real.X[real.condition == "control"].toarray()
    c = control.mean(0, dtype=float)
    q, m = (np.array([x.mean(0, dtype=float) for x in side[s]]) for s in "pr")
    pairs = list(zip(side["p"], side["r"]))

    def check(name, values):
        assert np.nanmean(values) == pytest.approx(expected[name]["value"], rel=1e-3), name

    basis = metrics.fit_pca(lambda: [*side["r"], control])
    pcs = [[(x - basis.mean) @ basis.loadings for x in pair] for pair in pairs]
    check("edistance_pca50_unbiased", [metrics.energy_distance(x, y, unbiased=True) for x, y in pcs])
    check("edistance_sq_pca50", [metrics.energy_distance(x, y, squared=True) for x, y in pcs])
    check("edistance_gex", [metrics.energy_distance(x, y) for x, y in pairs])
    check("wasserstein1_exact_pca50", [metrics.wasserstein(x, y, exact=True)[0] for x, y in pcs])
    check("wasserstein_sinkhorn_eps1.0_pca50", [metrics.wasserstein(x, y, epsilon=1.0)[0] for x, y in pcs])
    check("mmd_rbf_median_biased_gex", [metrics.mmd_rbf(x, y, unbiased=False) for x, y in pairs])
    c_pcs = (c - basis.mean) @ basis.loadings
    check("discr_cos_pca50", [metrics.discr_cos(a.mean(0), b.mean(0), c_pcs) for a, b in pcs])
    check("spearman_profile", [metrics.spearman_delta(a, b, 0) for a, b in zip(q, m)])
    check("pds_l1_midrank_over_N", metrics.discrimination(q - c, m - c, norm="N"))
    tests = [[metrics.rank_sum_test(x, control) for x in pair] for pair in pairs]
    counts = [[(metrics.benjamini_hochberg(p) < 0.05).sum() for _, p in pair] for pair in tests]
    check("de_nsig_counts_real", [b for _, b in counts])
    check("de_spearman_sig_counts", [metrics.spearman(*np.array(counts).T)])
    plain = [metrics.rank_sum_test(y, control, continuity=False, tie_correct=False) for _, y in pairs]
    lfc = [[metrics.log_fold_change(mean, c, 1e-10, exp=False) for mean in pair] for pair in zip(q, m)]
    check("des_scbig", [metrics.de_spearman(*lfc[i], plain[i][1] * len(c) < 0.05) for i in range(len(names))])
    top = [metrics.top_k(np.abs(z), 20) for z, _ in plain]
    check("pearson_delta_top20_wilcoxon", [metrics.pearson_delta(a, b, c, g) for a, b, g in zip(q, m, top)])
    centred = [[x - c.astype(np.float32) for x in side[s]] for s in "pr"]
    check("mmd_gex_rank_transpose", metrics.own_rank(metrics.mmd_matrix(*centred)))
    check("rmse_mean_rank_midrank", metrics.prediction_rank(cdist(q, m)))


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
    x, control = (a.astype(float) for a in tied_cells())               # in float32 scipy loses digits
    z, p = metrics.rank_sum_test(x, control)
    expected = [stats.mannwhitneyu(x[:, g], control[:, g], method="asymptotic").pvalue for g in range(40)]
    assert p == pytest.approx(np.nan_to_num(expected, nan=1.0), rel=1e-9)
    assert p[3] == p[4] == 1 and p[5] < 1e-4 and z[5] > 0
    z, p = metrics.rank_sum_test(x, control, continuity=False, tie_correct=False)
    expected = [stats.ranksums(x[:, g], control[:, g]) for g in range(40)]
    assert z == pytest.approx([e.statistic for e in expected], abs=1e-9)
    assert p == pytest.approx([e.pvalue for e in expected])


def test_rank_sum_takes_sparse_cells_sorted_controls_and_gene_blocks():
    x, control = tied_cells()
    expected = metrics.rank_sum_test(x, control)[1]
    sorted_once = metrics.value_counts(sp.csr_matrix(control), block=100)
    assert np.array_equal(metrics.rank_sum_test(sp.csr_matrix(x), sorted_once)[1], expected)
    assert np.array_equal(metrics.rank_sum_test(x, metrics.value_counts(control, block=1))[1], expected)


def test_rank_sum_of_one_cell_and_identical_populations():
    x, control = tied_cells()
    p = metrics.rank_sum_test(x[:1], control)[1]
    expected = [stats.mannwhitneyu(x[:1, g], control[:, g], method="asymptotic").pvalue for g in range(40)]
    assert p == pytest.approx(np.nan_to_num(expected, nan=1.0), rel=1e-5)
    assert (metrics.rank_sum_test(control, control)[1] == 1).all()


def test_benjamini_hochberg_equals_scipy():
    p = np.random.default_rng(0).random(200) ** 3
    p[:20] = p[0]
    assert metrics.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


def test_welch_t_equals_scipy_and_treats_degenerate_genes_as_scanpy():
    x, control = tied_cells()
    mean, var = (lambda v: v.mean(0, dtype=float)), (lambda v: v.var(0, ddof=1, dtype=float))
    t = metrics.welch_t(mean(x), var(x), len(x), mean(control), var(control))
    ok = np.setdiff1d(np.arange(40), [3, 4])
    expected = stats.ttest_ind_from_stats(mean(x), np.sqrt(var(x)), 23, mean(control), np.sqrt(var(control)), 23, False)
    assert t[ok] == pytest.approx(expected.statistic[ok]) and (t[[3, 4]] == 0).all()
    assert metrics.welch_t(np.ones(2), np.zeros(2), 5, np.zeros(2), np.zeros(2)).tolist() == [0, 0]   # infinite
    assert np.isnan(metrics.welch_t(np.ones(2), np.full(2, np.nan), 1, np.zeros(2), np.ones(2))).all()


def test_scores_and_significant_genes_of_a_population(case):
    world = metrics._World(["g02"], case["control"], case["genes"], 0)
    population = metrics._Population(case["real"]["g02"], "g02", world)
    significant, t = slow_de(case["real"]["g02"], case["control"])
    assert population.t == pytest.approx(t, rel=1e-5) and np.array_equal(population.significant, significant)
    other = metrics._Population(case["pred"]["g02"], "g02", world)
    expected = metrics.cosine_logfc(other.mean, population.mean, world.control[""].mean)
    assert metrics.cosine(other.logfc, population.logfc) == pytest.approx(expected)


def test_log_fold_changes():
    q, c = np.log1p([3.0, 0, 0, 1]), np.log1p([1.0, 2, 0, 1])
    assert metrics.log_fold_change(q, c, 0).tolist() == [pytest.approx(np.log2(3)), -np.inf, 0, 0]
    assert metrics.log_fold_change(q, c) == pytest.approx(np.log2((np.expm1(q) + 1e-9) / (np.expm1(c) + 1e-9)))
    assert metrics.log_fold_change(q, c, 0.1, exp=False) == pytest.approx(np.log2((q + 0.1) / (c + 0.1)))
    assert np.isfinite(metrics.log_fold_change(np.array([-0.5]), np.array([0.5]))).all()  # a model that does not clamp


def test_spearman_equals_scipy_with_ties_and_infinities():
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 6, 50).astype(float), rng.normal(size=50)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    x[3], x[4] = np.inf, -np.inf
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    assert math.isnan(metrics.spearman(np.ones(5), y[:5])) and math.isnan(metrics.spearman(x[:1], y[:1]))


def test_overlap_and_direction_by_hand():
    lfc_real, lfc_pred = np.array([3.0, -2, 1, 0.5, 0]), np.array([2.5, 2, 0, 9, 4])
    real, pred = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 1, 1], bool)
    assert metrics.overlap_at_n(lfc_pred, pred, lfc_real, real) == pytest.approx(1 / 3)  # predicted: 9, 4, 2.5
    assert metrics.direction_match(lfc_pred, lfc_real, real) == pytest.approx(1 / 3)
    nothing = np.zeros(5, bool)
    assert metrics.overlap_at_n(lfc_pred, nothing, lfc_real, real) == 0
    assert metrics.overlap_at_n(lfc_pred, pred, lfc_real, nothing) == 0
    assert math.isnan(metrics.direction_match(lfc_pred, lfc_real, nothing))
    assert math.isnan(metrics.de_spearman(lfc_pred, lfc_real, nothing))


# -------------------------------------------------------------------------------- ranks

def test_ranks_share_ties_and_place_undefined_values():
    nan = math.nan
    distance = np.array([[1.0, 2, 3], [5, 5, 5], [nan, 1, 2], [1, nan, 0]])
    assert metrics.own_rank(distance, [0, 1, 2, 2]).tolist() == [0, 0.5, 0.5, 0]
    assert metrics.own_rank(distance[2:], [0, 0]).tolist() == [0.5, 0.5]      # undefined; one of two smaller
    assert metrics.own_rank(distance[:1], [2]).tolist() == [1]
    assert np.isnan(metrics.own_rank(np.ones((1, 1)))).all()
    square = np.array([[2.0, 0, 9], [1, 4, 8], [3, 5, 7]])
    assert metrics.prediction_rank(square).tolist() == [0.5, 0.5, 0]           # column by column
    assert metrics.own_rank(square).tolist() == [0.5, 0.5, 1]                  # the transpose of it


def test_discrimination_leaves_targets_out():
    m = np.array([[0.0, 0, 0], [1, 0, 0], [0, 3, 0]])
    q = np.array([[0.0, 9, 0], [1, 0, 0], [0, 3, 0]])
    assert metrics.discrimination(q, m).tolist() == [0.5, 1, 1]
    assert metrics.discrimination(q, m, targets=[[1], [], []]).tolist() == [0.75, 1, 1]  # gene 1 out: tied
    assert metrics.discrimination(q, m, norm="N").tolist() == [pytest.approx(2 / 3), 1, 1]


def test_collapsed_prediction_scores_one_half(case):
    one = np.repeat(case["train"]["g00"].mean(0, keepdims=True), 31, axis=0)
    for pred in ({c: one[:20 + i] for i, c in enumerate(case["real"])},       # point masses of different sizes
                 {c: case["train"]["g00"] for c in case["real"]}):            # the same cells for all
        result = metrics.evaluate(**changed(case, pred=pred), floors=False)
        for key in RANK_KEYS[1:]:
            assert set(v[key] for v in result["per_condition"].values()) == {0.5} or key.startswith("pds")
            assert result["aggregate"][key] == pytest.approx(0.5), key


# -------------------------------------------------------------------------------- distributions

def test_energy_distance_equals_a_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (13, 4)), rng.normal(0.5, 2, (9, 4))
    assert metrics.energy_distance(x, y) == pytest.approx(slow_energy(x.tolist(), y.tolist()))
    assert metrics.energy_distance(x, y, squared=True) == pytest.approx(2 * ((x.mean(0) - y.mean(0)) ** 2).sum())
    unbiased = 2 * cdist(x, y).mean() - cdist(x, x).sum() / (13 * 12) - cdist(y, y).sum() / (9 * 8)
    assert metrics.energy_distance(x, y, unbiased=True) == pytest.approx(unbiased)
    assert metrics.mmd_energy(x, y) == pytest.approx(metrics.energy_distance(x, y) / 2)
    assert metrics.energy_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert metrics.mean_distance(x, y, block=5) == pytest.approx(cdist(x, y).mean())


def test_energy_distance_of_many_cells_needs_little_memory():
    x = np.random.default_rng(0).normal(size=(5000, 10)).astype(np.float32)
    tracemalloc.start()
    assert 0 < metrics.energy_distance(x, x + 1) < 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6                                                        # all pairs at once would take 200 MB


def test_mmd_rbf_equals_algorithm_1():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (12, 5)), rng.normal(0.4, 1.5, (9, 5))
    assert metrics.mmd_rbf(x, y) == pytest.approx(slow_mmd_rbf(x.tolist(), y.tolist()))
    assert metrics.mmd_rbf(x, x) < 0 and metrics.mmd_rbf(x, x, unbiased=False) == pytest.approx(0, abs=1e-12)
    assert math.isnan(metrics.mmd_rbf(x, y[:1])) and math.isnan(metrics.mmd_rbf(x[:1], y))
    assert math.isfinite(metrics.mmd_rbf(x, np.repeat(y[:1], 4, axis=0)))      # a median of zero


def test_mmd_matrix_equals_the_pairs():
    rng = np.random.default_rng(0)
    pred, real = ([rng.normal(i / 3, 1, (n, 20)).astype(np.float32) for i, n in enumerate(sizes)]
                  for sizes in ((5, 1, 30), (8, 40)))
    expected = np.array([[metrics.mmd_energy(x, y) for y in real] for x in pred])
    assert metrics.mmd_matrix(pred, real) == pytest.approx(expected, rel=1e-6)
    assert metrics.mmd_matrix(pred, real, block=50) == pytest.approx(expected, rel=1e-6)


def test_sinkhorn_approaches_exact_transport():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (12, 3)), rng.normal(1, 1, (12, 3))
    cost = cdist(x, y)
    rows = np.repeat(np.eye(12), 12, axis=1)
    columns = np.tile(np.eye(12), 12)
    exact = optimize.linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.full(24, 1 / 12)).fun
    assert metrics.wasserstein(x, y, exact=True)[0] == pytest.approx(exact)
    value, epsilon, error = metrics.wasserstein(x, y, epsilon=0.002)
    assert value == pytest.approx(exact, rel=5e-3) and epsilon == 0.002
    value, epsilon, error = metrics.wasserstein(x, y)
    assert epsilon == pytest.approx(0.05 * cost.mean()) and error < 1e-6
    assert value == pytest.approx(slow_sinkhorn(cost, epsilon), rel=1e-5) and value > exact
    assert metrics.wasserstein(x[:5], y)[0] == pytest.approx(slow_sinkhorn(cost[:5], 0.05 * cost[:5].mean()), rel=1e-5)
    far = np.vstack([y, y[:1] + 1000])                                # out of reach of exp(-cost / epsilon)
    assert math.isfinite(metrics.wasserstein(x, far, epsilon=0.01)[0])
    assert metrics.wasserstein(np.ones((4, 2)), np.ones((3, 2)))[0] == 0


def test_pca_is_the_svd_with_fixed_signs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 12)) @ rng.normal(size=(12, 12))
    basis = metrics.fit_pca(lambda: [x[:15], x[15:]], k=5)
    u, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
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
            if key == "mmd_rbf":                          # unbiased: slightly below 0 for the same cells
                assert -0.1 < value <= 0
            else:                                         # wasserstein: up to what the entropy spreads
                tolerance = 1e-2 if key == "wasserstein" else 1e-6
                assert value == pytest.approx(metrics.KEYS[key].perfect, abs=tolerance), (group, key)


def test_control_as_point_mass_gets_the_documented_values(case):
    mean = case["control"].mean(0, keepdims=True)
    pred = {c: np.repeat(mean, len(x), axis=0) for c, x in case["real"].items()}
    result = metrics.evaluate(**changed(case, pred=pred), floors=False)
    values = result["aggregate"]
    for key in ("pearson_delta", "pearson_delta_top20", "spearman_delta", "de_spearman", "discr_cos", "cosine_logfc",
                "deg_recall_50"):
        assert values[key] is None and result["n_valid"][key] == 0
    assert values["direction_match"] == 0 and values["overlap_at_n"] == 0
    c = case["control"].mean(0, dtype=float)
    not_up = [np.mean(x.mean(0, dtype=float) <= c) for x in case["real"].values()]
    assert values["acc"] == pytest.approx(np.mean(not_up))
    effects = [np.linalg.norm(x.mean(0, dtype=float) - c) for x in case["real"].values()]
    assert values["l2"] == pytest.approx(np.mean(effects), rel=1e-5)
    for key in ("cosine_logfc_rank", "deg_recall_50_rank", "pds_cosine", "rmse_rank", "mmd_rank"):
        assert values[key] == 0.5
    assert values["e_distance"] > metrics.evaluate(**case)["floors"]["control"]["e_distance"]   # no spread


def test_control_cells_predict_nothing(case, result):
    floor = result["floors"]["control"]
    for key in ("pearson_delta", "spearman_delta", "discr_cos", "cosine_logfc"):
        assert abs(floor[key]) < 0.25
    assert 0.3 < floor["acc"] < 0.7 and floor["overlap_at_n"] == 0
    assert floor["l2"] > result["aggregate"]["l2"]


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


def test_order_of_cells_genes_and_conditions_does_not_matter(case, result):
    rng = np.random.default_rng(5)
    genes = rng.permutation(len(case["genes"]))

    def shuffled(populations):
        return {c: populations[c][rng.permutation(len(populations[c]))][:, genes] for c in reversed(populations)}

    control, names = case["control"][rng.permutation(70)][:, genes], [case["genes"][i] for i in genes]
    other = metrics.evaluate(shuffled(case["pred"]), shuffled(case["real"]), control, names, shuffled(case["train"]),
                             "all", floors=False)
    for c, values in result["per_condition"].items():
        for key, value in values.items():
            assert close(value, other["per_condition"][c][key], 1e-5), (c, key)


def test_gene_order_does_not_matter_where_scores_tie(case):
    """Silent genes tie at zero; which of them is among the top genes is decided by name, not by position."""
    few = with_cells(case, lambda x: x * (np.arange(90) < 30))
    back = changed(with_cells(few, lambda x: x[:, ::-1]), genes=few["genes"][::-1])
    a, b = (metrics.evaluate(**x, floors=False)["per_condition"] for x in (few, back))
    assert all(close(a[c][k], b[c][k], 1e-5) for c in a for k in metrics.KEYS)


def test_sparse_and_float64_inputs_are_the_same(case, result):
    sparse = changed(with_cells(case, sp.csr_matrix), pred={c: x.astype(float) for c, x in case["pred"].items()})
    other = metrics.evaluate(**sparse)
    for part in ("aggregate", "replicate", "score_vs_floor"):
        assert all(close(other[part][k], result[part][k]) for k in metrics.KEYS)
    assert all(close(other["floors"][f][k], result["floors"][f][k]) for f in metrics.FLOORS for k in metrics.KEYS)


def test_one_condition_has_no_rank(case):
    result = metrics.evaluate(**changed(case, pred={"g20": case["pred"]["g20"]}))
    for key in RANK_KEYS:
        assert result["aggregate"][key] is None and result["n_valid"][key] == 0
    assert result["aggregate"]["l2"] > 0 and result["ci95"]["l2"] is None
    json.dumps(result, allow_nan=False)


def test_one_cell_conditions(case):
    result = metrics.evaluate(**changed(case, pred={c: x[:1] for c, x in case["pred"].items()},
                                        real={c: x[:1] for c, x in case["real"].items()}))
    for key, n in result["n_valid"].items():
        if key in ("deg_recall_50", "mmd_rbf"):                                    # no variance, no pairs
            assert n == 0
        elif key in ("de_spearman", "direction_match"):                            # hardly a significant gene
            assert n < 3
        else:
            assert n == 5, key
    assert set(result["replicate"].values()) == {None}                             # nothing to halve


def test_constant_and_silent_populations_raise_nothing(case):
    silent = {c: np.zeros_like(x) for c, x in case["pred"].items()}
    offset = {c: np.repeat(case["control"].mean(0, keepdims=True) + 0.1, len(x), 0) for c, x in case["pred"].items()}
    for pred in (silent, offset):
        json.dumps(metrics.evaluate(**changed(case, pred=pred)), allow_nan=False)
    constant = metrics.evaluate(**changed(case, pred=offset), floors=False)
    assert constant["n_valid"]["pearson_delta"] == 0 and constant["n_valid"]["discr_cos"] == 5
    values = metrics.evaluate(**with_cells(case, np.zeros_like))["aggregate"]
    assert values["l2"] == values["wasserstein"] == values["e_distance"] == 0
    assert values["pearson_delta"] is None and values["acc"] == 1 and values["pds"] == 0.5


def test_tiny_effects_are_no_effects():
    m, c = np.array([1.0, 2, 3]), np.zeros(3)
    assert math.isnan(metrics.pearson_delta(c + [1e-7, 2e-7, 3e-7], m, c))
    assert math.isnan(metrics.discr_cos(c + 1e-7 * m, m, c))
    assert metrics.pearson_delta(1e-3 * m, m, c) == pytest.approx(1) == metrics.discr_cos(1e-3 * m, m, c)
    assert math.isnan(metrics.cosine_logfc(c + 1e-8 * m, m, c))
    assert math.isnan(metrics.spearman_delta(c + 1e-8 * m, m, c))
    assert metrics.acc(c + 1e-8 * m, m, c) == 0


def test_signs():
    c = np.zeros(4)
    assert metrics.acc(np.array([1.0, 0, -1, 0]), np.array([1.0, -1, 1, 0]), c) == 0.75
    assert metrics.acc(np.array([1.0, 0, -1, 0]), np.array([1.0, -1, 1, 0]), c, three_valued=True) == 0.5


# -------------------------------------------------------------------------------- floors and references

def floor_as_prediction(case, pred, **changes):
    return metrics.evaluate(**changed(case, pred=pred, **changes), floors=False)["aggregate"]


def test_mean_floor_is_a_point_mass_at_the_centroid_mean(case, result):
    centroid = np.mean([x.mean(0, dtype=float) for x in case["train"].values()], axis=0).astype(np.float32)
    pred = {c: np.tile(centroid, (len(x), 1)) for c, x in case["pred"].items()}
    expected = floor_as_prediction(case, pred)
    assert all(close(result["floors"]["mean"][k], expected[k], 1e-6) for k in metrics.KEYS if not k.endswith("_rank"))
    assert expected["pearson_delta_hat"] is None                      # it is the reference itself


def test_additive_floor_adds_the_single_effects(case, result):
    c = case["control"].mean(0, dtype=float)
    single = {p: x.mean(0, dtype=float) - c for p, x in case["train"].items()}
    doubles = ["g00+g01", "g03+g04", "absent+g21"]
    part = metrics.evaluate(**changed(case, pred={g: case["pred"][g] for g in doubles}))
    mean = {}
    for g in doubles:                                                 # a draw of the controls, shifted, is close
        mean[g] = c + sum(single[p] for p in g.split("+"))
    expected = np.mean([np.linalg.norm(mean[g] - case["real"][g].mean(0, dtype=float)) for g in doubles])
    noise = np.sqrt((case["control"].var(0) / 30).sum())
    assert abs(part["floors"]["additive"]["l2"] - expected) < noise
    assert part["floors_n_valid"]["additive"]["l2"] == 3 and not part["info"]["notes"]
    assert part["floors"]["additive"]["pearson_delta"] > 0.8 > part["floors"]["mean"]["pearson_delta"]
    world = metrics._World(doubles, case["control"], case["genes"], 0)
    training = metrics._Training(case["train"], world, 40)
    assert training.additive("g00+g01") == pytest.approx(single["g00"] + single["g01"], abs=1e-9)
    assert result["floors_n_valid"]["additive"]["l2"] == 3            # g02 and g20 are not in training
    assert any("additive" in note for note in result["info"]["notes"])


def test_mean_cells_floor_weights_conditions_equally():
    """One training condition has 50 times the cells of the other; the floor must not notice."""
    rng = np.random.default_rng(0)
    train = {"a": rng.normal(1, 0.1, (500, 3)).astype(np.float32), "b": rng.normal(3, 0.1, (10, 3)).astype(np.float32)}
    world = metrics._World(["x"], np.ones((5, 3), np.float32), ["p", "q", "r"], 0)
    training = metrics._Training(train, world, 400)
    drawn = training.draw("x", 400)
    assert drawn.shape == (400, 3) and drawn.mean() == pytest.approx(2, abs=0.15)
    assert training.centroid("") == pytest.approx(np.mean([x.mean(0, dtype=float) for x in train.values()], 0))


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


def test_replicate_is_half_against_half():
    case = small_case(sizes=(80, 80, 80, 80, 80))
    result = metrics.evaluate(**case)
    rng = np.random.default_rng(0)
    halves = [{c: x[rows] for c, x in case["real"].items()} for rows in np.split(rng.permutation(80), 2)]
    expected = floor_as_prediction(case, halves[0], real=halves[1])
    for key in ("l2", "pearson_delta", "e_distance", "mmd", "wasserstein"):
        assert result["replicate"][key] == pytest.approx(expected[key], rel=0.15), key
        assert not close(result["replicate"][key], metrics.KEYS[key].perfect)


def test_score_vs_floor(result):
    complete = ["control", "mean", "mean_cells"]                      # additive exists for three of five conditions
    for key, better in (("l2", min), ("pearson_delta", max), ("e_distance", min)):
        best = better(result["floors"][f][key] for f in complete)
        expected = (result["aggregate"][key] - best) / (result["replicate"][key] - best)
        assert result["score_vs_floor"][key] == pytest.approx(expected)
    floors = {"control": {"pearson_delta": None, "l2": None}, "mean": {"pearson_delta": -0.2, "l2": 4.0},
              "additive": None}
    made_up = {"floors": floors, "aggregate": {"pearson_delta": 0.4, "l2": 3.0},
               "replicate": {"pearson_delta": 0.8, "l2": 5.0}}
    assert metrics._versus_floor("pearson_delta", made_up, ()) == pytest.approx(0.5)   # an undefined correlation is 0
    assert metrics._versus_floor("l2", made_up, ()) is None           # the replicate is no better than the floor
    made_up["replicate"]["l2"] = 2.0
    assert metrics._versus_floor("l2", made_up, ()) == pytest.approx(0.5)


def test_without_training_there_is_only_the_control_floor(case, result):
    alone = metrics.evaluate(**changed(case, train=None))
    assert not set(metrics.SYSTEMA) & set(alone["aggregate"])
    assert alone["floors"]["mean"] is alone["floors"]["mean_cells"] is alone["floors"]["additive"] is None
    assert alone["floors"]["control"]["l2"] == result["floors"]["control"]["l2"]
    assert list(alone["groups"]) == ["single", "double"]
    centroid = np.mean([x.mean(0, dtype=float) for x in case["train"].values()], axis=0)
    given = metrics.evaluate(**changed(case, train=None), train_mean=centroid)
    assert given["aggregate"]["pearson_delta_hat"] == pytest.approx(result["aggregate"]["pearson_delta_hat"])
    assert given["floors"]["mean"]["l2"] == pytest.approx(result["floors"]["mean"]["l2"])
    assert given["floors"]["mean_cells"] is None


def test_training_cells_are_read_once(case, result):
    class Once(Mapping):
        def __init__(self):
            self.left = dict(case["train"])

        def __getitem__(self, group):
            return self.left.pop(group)

        def __iter__(self):
            return iter(case["train"])

        def __len__(self):
            return 6

    assert metrics.evaluate(**changed(case, train=Once()))["floors"] == result["floors"]


def test_groups_by_number_of_perturbations_and_by_what_was_trained(case, result):
    values = {c: v["l2"] for c, v in result["per_condition"].items()}
    assert result["groups"]["single"]["l2"] == pytest.approx(np.mean([values["g02"], values["g20"]]))
    assert result["groups"]["single_unseen"]["l2"] == result["groups"]["single"]["l2"]
    assert set(result["groups"]) == {"single", "double", "single_unseen"}
    train = {c: x for c, x in case["train"].items() if c not in ("g00", "g01", "g03")}
    train["g02+g77"] = case["train"]["g00"]
    groups = metrics.evaluate(**changed(case, train=train), floors=False)["groups"]
    assert groups["double_two_unseen"]["l2"] == pytest.approx(values["g00+g01"])
    assert groups["double_one_unseen"]["l2"] == pytest.approx(values["g03+g04"])
    assert groups["single_unseen"]["l2"] == pytest.approx(values["g20"])            # g02 was trained within a double
    triple = changed(case, pred={"a+b+c": case["pred"]["g02"]}, real={"a+b+c": case["real"]["g02"]})
    triple = metrics.evaluate(**triple, floors=False)
    assert set(triple["groups"]) == {"triple", "triple_three_unseen"}


# -------------------------------------------------------------------------------- covariates

def covariate_case():
    """Two cell types with different controls; every group in one of them, x trained in both."""
    a, b = small_case(seed=3), small_case(seed=4)
    joined = {k: {f"{c}@{v}": x for v, half in (("one", a), ("two", b)) for c, x in half[k].items()}
              for k in ("pred", "real", "train")}
    return dict(**joined, control={"one": a["control"], "two": b["control"]}, genes=a["genes"],
                keys="all"), a, b


def test_covariates_are_scored_each_against_its_own_control_and_ranked_apart():
    both, a, b = covariate_case()
    result, one, two = metrics.evaluate(**both), metrics.evaluate(**a), metrics.evaluate(**b)
    for v, alone in (("one", one), ("two", two)):
        for c, values in alone["per_condition"].items():
            for key in set(metrics.KEYS) - set(PCA_KEYS) - {"mmd_pca30_rank"}:
                assert close(result["per_condition"][f"{c}@{v}"][key], values[key]), (c, v, key)
    for key in ("pds", "mmd_rank", "pearson_delta_hat"):
        assert result["aggregate"][key] == pytest.approx((one["aggregate"][key] + two["aggregate"][key]) / 2)
    both_floors = [r["floors"]["mean"]["l2"] for r in (one, two)]
    assert result["floors"]["mean"]["l2"] == pytest.approx(np.mean(both_floors))
    assert result["info"]["cells_control"] == {"one": 70, "two": 70}


def test_additive_floor_across_covariates():
    both, a, b = covariate_case()
    train = {g: x for g, x in both["train"].items() if g != "g00@one"} | {"g02@two": both["train"]["g01@two"]}
    world = metrics._World(list(both["pred"]), both["control"], both["genes"], 0)
    training = metrics._Training(train, world, 40)

    def effect(group):
        return train[group].mean(0, dtype=float) - both["control"][group.partition("@")[2]].mean(0, dtype=float)

    assert training.additive("g00+g01@one") == pytest.approx(effect("g00@two") + effect("g01@one")) 
    assert training.additive("g00+g01@two") == pytest.approx(effect("g00@two") + effect("g01@two"))
    assert training.additive("g02@one") == pytest.approx(effect("g02@two"))  # transfer
    assert training.additive("g20@one") is None
    both["control"]["three"], train["g02@three"] = both["control"]["one"] + 1, train["g01@one"]
    world = metrics._World(list(both["pred"]), both["control"], both["genes"], 0)
    average = (effect("g02@two") + effect("g02@three")) / 2
    assert metrics._Training(train, world, 40).additive("g02@one") == pytest.approx(average)
    only_two = {g: x for g, x in train.items() if g.endswith("two")}
    elsewhere = metrics._Training(only_two, world, 40)
    assert elsewhere.centroid("one") == pytest.approx(elsewhere.centroid("two"))     # no training there: all of it


def test_plain_groups_with_a_control_mapping(case, result):
    other = metrics.evaluate(**changed(case, control={"": case["control"]}), floors=False)
    assert other["aggregate"] == result["aggregate"]


# -------------------------------------------------------------------------------- results

def test_result_is_plain_json(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {"aggregate", "n_valid", "ci95", "groups", "per_condition", "floors", "floors_n_valid", "floors_per_condition",
                           "replicate", "score_vs_floor", "info"}
    assert list(result["aggregate"]) == list(metrics.KEYS)
    assert 0 < result["info"]["pca_variance_explained"]["30"] < result["info"]["pca_variance_explained"]["50"] <= 1
    assert result["info"]["sinkhorn_epsilon"]["median"] > 0 and result["info"]["rank_cells"] is None


def test_undefined_conditions_are_left_out_and_counted(case):
    pred = changed(case)["pred"] | {"g02": np.repeat(case["control"].mean(0, keepdims=True), 25, 0)}
    result = metrics.evaluate(**changed(case, pred=pred), floors=False)
    defined = [v["pearson_delta"] for c, v in result["per_condition"].items() if c != "g02"]
    assert result["per_condition"]["g02"]["pearson_delta"] is None and result["n_valid"]["pearson_delta"] == 4
    assert result["aggregate"]["pearson_delta"] == pytest.approx(np.mean(defined))


def test_intervals_are_those_of_a_bootstrap_over_conditions(case):
    result = metrics.evaluate(**changed(case, keys=["l2"]), floors=False, bootstrap=20000)
    values = [v["l2"] for v in result["per_condition"].values()]
    means = np.random.default_rng(0).choice(values, (20000, 5)).mean(axis=1)
    assert result["ci95"]["l2"] == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=0.005)


def test_keys_select_what_is_computed(case, result):
    some = metrics.evaluate(**changed(case, keys=["mmd_rank", "l2", "overlap_at_n"]), bootstrap=0)
    assert list(some["aggregate"]) == ["l2", "overlap_at_n", "mmd_rank"] == list(some["floors"]["mean"])
    assert some["aggregate"]["l2"] == result["aggregate"]["l2"] and some["ci95"]["l2"] is None
    assert some["aggregate"]["mmd_rank"] == result["aggregate"]["mmd_rank"]


def test_many_conditions_cap_the_pairwise_ranks(monkeypatch, case, result):
    monkeypatch.setattr(metrics, "MANY_CONDITIONS", 4)
    monkeypatch.setattr(metrics, "FEW_CELLS", 20)
    capped = metrics.evaluate(**case, floors=False)
    assert capped["info"]["rank_cells"] == 20 and "20 cells" in capped["info"]["notes"][0]
    assert capped["aggregate"]["mmd"] == result["aggregate"]["mmd"]              # only the ranks
    assert 0 <= capped["aggregate"]["mmd_rank"] <= 1


def test_compare_is_the_signed_rank_test():
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(12)]
    a, b = ({"aggregate": {"l2": 0, "pds": 0},
             "per_condition": {n: {"l2": rng.normal(mean), "pds": 1.0} for n in names}} for mean in (0, 1))
    a["per_condition"]["c3"]["l2"] = None
    del b["per_condition"]["c5"]
    shared = [n for n in names if n not in ("c3", "c5")]
    x, y = ([r["per_condition"][n]["l2"] for n in shared] for r in (a, b))
    assert metrics.compare(a, b, "l2") == pytest.approx(stats.wilcoxon(x, y).pvalue) == metrics.compare(b, a, "l2")
    assert metrics.compare(a, b) == {"l2": metrics.compare(a, b, "l2"), "pds": 1.0}
    assert metrics.compare(a, {"aggregate": {}, "per_condition": {}}, "l2") is None


def test_default_keys_are_all_but_the_mmd_ranks(case, result):
    default = metrics.evaluate(**changed(case, keys=None))
    assert list(default["aggregate"]) == [k for k in metrics.KEYS if k not in ("mmd_rank", "mmd_pca30_rank")]
    assert default["aggregate"] == {k: result["aggregate"][k] for k in default["aggregate"]}
    assert default["replicate"]["rmse_rank"] is not None
    for floor, n_valid in zip(default["floors"].values(), default["floors_n_valid"].values()):  # ranks cost, tell little
        assert floor["rmse_rank"] is None and n_valid["rmse_rank"] == 0 and floor["pds"] is not None
    assert default["score_vs_floor"]["rmse_rank"] is None


def test_table(result):
    text = metrics.format_table(metrics.result_rows(result, "ours"), ci=result["ci95"], width=160)
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [*metrics.FLOORS, "ours", "95%", "95%", "replicate", "vs"]
    assert "l2↓" in lines[0] and "pearson_delta_hat_top20↑" in lines[0] and "-" in lines[2].split()
    assert len({len(line) for line in lines[:-1]}) == 1 and len(lines[0]) <= 160
    assert f"{result['aggregate']['l2']:.3f}" in lines[5] and f"{result['ci95']['l2'][0]:.3f}" in lines[6]
    assert metrics.format_table([("x", {})], ["l2"]).split() == ["l2↓", "x", "-"]
    assert metrics.format_table([("x", {"l2": 1.0})]).split() == ["l2↓", "x", "1.000"]    # what nobody measured


@pytest.mark.parametrize("width", [20, 60, 100, 1000])
def test_table_fits_the_width_and_says_what_it_leaves_out(result, width):
    rows = metrics.result_rows(result, "ours")
    *lines, last = metrics.format_table(rows, list(metrics.KEYS), width=width, rest="there").splitlines()
    if width == 1000:
        assert last.startswith("vs floor") and len(lines[0].split()) == len(metrics.KEYS)
    else:
        assert max(map(len, lines)) <= width and lines[0].split()[0] == "l2↓"
        assert last == f"{len(metrics.KEYS) - len(lines[0].split())} more metrics in there"


def test_table_is_as_wide_as_the_terminal(result, monkeypatch):
    rows = metrics.result_rows(result, "ours")
    for columns in (70, 150):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert metrics.format_table(rows) == metrics.format_table(rows, width=columns)


def test_scores_between_floor_and_replicate_are_cut_where_they_mean_nothing():
    versus = {"l2": -9.99, "mse": -9.991, "mae": 1.5, "rmse": 1.51, "pds": 0.05}
    lines = metrics.format_table([("ours", versus), ("vs floor", versus)], list(versus)).splitlines()
    assert lines[1].split() == ["ours", "-9.990", "-9.991", "1.500", "1.510", "0.0500"]
    assert lines[2].split() == ["vs", "floor", "-9.990", "<-10", "1.500", ">1.5", "0.0500"]


@pytest.mark.parametrize("change, message", [
    (lambda c: {"pred": {}}, "nothing is predicted"),
    (lambda c: {"pred": {"g99": c["pred"]["g02"]}}, "no real cells of predicted conditions"),
    (lambda c: {"keys": ["l3"]}, "unknown metrics.*l3"),
    (lambda c: {"genes": c["genes"][:-1]}, "shape"),
    (lambda c: {"genes": ["g00"] * 90}, "not unique"),
    (lambda c: {"pred": {"g02": c["pred"]["g02"][:0]}}, "predicted cells of 'g02' have shape"),
    (lambda c: {"pred": {"g02": c["pred"]["g02"][0]}}, "predicted cells of 'g02' have shape"),
    (lambda c: {"pred": {"g02": c["pred"]["g02"] * np.nan}}, "predicted cells of 'g02' hold NaN"),
    (lambda c: {"control": {"other": c["control"]}}, "no control cells"),
])
def test_inputs_that_do_not_fit(case, change, message):
    with pytest.raises(ValueError, match=message):
        metrics.evaluate(**{**case, **change(case)})


# -------------------------------------------------------------------------------- the report of a run

class Run:
    """What report() asks of a data.Dataset, on the small case with its genes from the last to the first."""
    def __init__(self, case):
        self.genes, self.eval_genes, self.case = case["genes"], np.arange(90)[::-1], case

    def populations(self, part, genes):
        return {c: x[:, genes] for c, x in self.case["real" if part == "test" else "train"].items()}

    def controls(self, part, genes):
        return self.case["control"][:, genes]


@pytest.fixture
def reported(case, tmp_path, capsys):
    """The folder of a reported run, its predicted cells, and what was printed."""
    config = data.RunConfig(data="file.h5ad", split="additive", seed=5)
    pred = {c: x[:, ::-1] for c, x in case["pred"].items()}
    other = [(" (raw)", {c: x[:, ::-1] for c, x in case["real"].items()})]
    metrics.report(tmp_path, "ours", config, Run(case), pred, 3661.2, 2048, other, ["said on the way"])
    return tmp_path, pred, capsys.readouterr().out


def test_report_writes_scores_and_prints_the_table(case, result, reported):
    folder, _, text = reported
    written = json.loads((folder / "metrics.json").read_text())
    assert sorted(p.name for p in folder.iterdir()) == ["genes.tsv", "metrics.json"]
    assert all(close(value, result["aggregate"][k]) for k, value in written["aggregate"].items())
    given = {"method": "ours", "data": "file.h5ad", "split": "additive", "fold": 0, "seed": 5, "peak_memory_mb": 2048}
    assert {k: written[k] for k in given} == given and written["seconds"] >= 3661.2
    assert written["config"]["seed"] == 5 and {"python", "torch", "numpy"} <= set(written["versions"])
    assert written["info"]["notes"][-1] == "said on the way" and "note: said on the way" in text
    assert written["variants"][" (raw)"]["aggregate"]["l2"] == 0 and "per_gene" not in written
    assert "5 test conditions, 90 genes; trained and scored in 1:01:0" in text and "2,048 MB" in text
    rows = [line[:10].strip() for line in text.splitlines()]
    assert rows[rows.index("additive"):][:5] == ["additive", "ours", "ours (raw)", "replicate", "vs floor"]
    assert max(map(len, text.splitlines()[3:12])) <= 120 and "more metrics in metrics.json" in text


def test_show_prints_the_stored_table_again(reported, capsys):
    metrics.show(reported[0])
    assert capsys.readouterr().out == reported[2]


def test_genes_tsv_holds_what_happens_to_every_gene(case, reported):
    header, *lines = (reported[0] / "genes.tsv").read_text().splitlines()
    assert header.split("\t") == ["condition", "gene", "control_mean", "pred_mean", "real_mean", "pred_lfc", "real_lfc",
                                  "real_p_adjusted"]
    rows = [line.split("\t") for line in lines]
    assert [r[0] for r in rows] == sorted(c for c in case["real"] for _ in range(90))
    c = case["control"].mean(0, dtype=float)
    for condition, x in case["real"].items():
        mine = {r[1]: [float(v) for v in r[2:]] for r in rows if r[0] == condition}
        table = np.array([mine[g] for g in case["genes"]]).T
        q, m = case["pred"][condition].mean(0, dtype=float), x.mean(0, dtype=float)
        p = [stats.mannwhitneyu(x[:, g], case["control"][:, g], method="asymptotic").pvalue for g in range(90)]
        expected = [c, q, m, np.log2((np.expm1(q) + 1e-9) / (np.expm1(c) + 1e-9)),
                    np.log2((np.expm1(m) + 1e-9) / (np.expm1(c) + 1e-9)),
                    stats.false_discovery_control(np.nan_to_num(p, nan=1.0))]
        assert table == pytest.approx(np.array(expected), rel=1e-4, abs=1e-5)
        listed = [float(r[-1]) for r in rows if r[0] == condition]
        assert listed == sorted(listed)


def test_report_runs_no_test_twice(case, tmp_path, monkeypatch):
    tested = []
    once = metrics.rank_sum_test
    monkeypatch.setattr(metrics, "rank_sum_test", lambda x, control: tested.append(len(x)) or once(x, control))
    metrics.evaluate(**changed(case, keys=None), floors=False)
    alone = len(tested)
    table = metrics.evaluate(**changed(case, keys=None), floors=False, per_gene=True)["per_gene"]
    assert len(tested) == 2 * alone and set(table) == set(case["real"])


@pytest.mark.parametrize("name", ["genes.tsv", "metrics.json"])
def test_report_that_cannot_be_written(case, tmp_path, name):
    (tmp_path / name).mkdir()                                          # a folder is in the way
    with pytest.raises(data.DataError, match=name):
        metrics.report(tmp_path, "ours", data.RunConfig(), Run(case), case["pred"], 1.0, None)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_quick_score_is_a_part_of_the_evaluation(case, result):
    pred = {c: x[:, ::-1] for c, x in case["pred"].items()}
    score = metrics.quick_score(Run(case), pred, "test", 0)
    assert score == {k: pytest.approx(result["aggregate"][k]) for k in ("l2", "pearson_delta", "e_distance")}


# -------------------------------------------------------------------------------- command line

@pytest.fixture(scope="module")
def files(tmp_path_factory, case):
    """pred.h5ad, real.h5ad (more genes and conditions, other order and spelling) and train.h5ad of the small case."""
    folder = tmp_path_factory.mktemp("files")
    write_pred(folder / "pred.h5ad", case)
    extra = np.random.default_rng(0).random((1000, 2)).astype(np.float32)
    spelled = {"g02": "g02+ctrl", "g00+g01": "g01+g00"}
    real = [("ctrl", case["control"]), ("g40+ctrl", case["train"]["g00"])]
    real += [(spelled.get(c, c), x) for c, x in case["real"].items()]
    labels = [c for c, x in real for _ in x]
    X = np.vstack([x for _, x in real])
    X = np.hstack([extra[:len(X)], X])[:, ::-1]
    data.write_h5ad(folder / "real.h5ad", sp.csr_matrix(X), {"condition": labels}, (["z1", "z2"] + case["genes"])[::-1])
    train = [*case["train"].items(), ("g02", case["real"]["g02"])]            # a predicted condition: must be dropped
    write(folder / "train.h5ad", train, case["genes"])
    return folder


def write(path, populations, genes, key="condition", **options):
    labels = [c for c, x in populations for _ in x]
    data.write_h5ad(path, np.vstack([x for _, x in populations]), {key: labels}, genes, **options)


def write_pred(path, case, **options):
    write(path, list(case["pred"].items()), case["genes"], **options)


def score(capsys, *flags):
    """metrics.main(flags) -> exit code, standard output, standard error."""
    try:
        metrics.main([str(f) for f in flags])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_command_line_scores_two_files(files, case, result, capsys, tmp_path):
    out = tmp_path / "sub" / "metrics.json"
    code, text, error = score(capsys, files / "pred.h5ad", files / "real.h5ad", "--reference", files / "train.h5ad",
                              "--out", out)
    assert code == 0 and not error
    assert "l2↓" in text and "replicate" in text and "95% from" in text and "vs floor" in text
    assert f"more metrics in {out}" in text
    assert "1 conditions are not predicted" in text and "2 genes are not in the prediction" in text
    written = json.loads(out.read_text())
    assert [p.name for p in out.parent.iterdir()] == ["metrics.json"]
    assert set(written["aggregate"]) == set(metrics.KEYS) - set(metrics.MMD_RANKS)
    for key, value in written["aggregate"].items():
        assert close(value, result["aggregate"][key], 1e-6), key
        assert close(written["floors"]["additive"][key], result["floors"]["additive"][key], 1e-6), key


def test_systema_reference_from_uns_is_matched_by_gene(case, result, capsys, tmp_path):
    write_pred(tmp_path / "pred.h5ad", case)
    centroid = np.mean([x.mean(0, dtype=float) for x in case["train"].values()], axis=0)
    real = [(c, np.hstack([x[:, ::-1], x[:, :3]])) for c, x in [("control", case["control"]), *case["real"].items()]]
    write(tmp_path / "real.h5ad", real, case["genes"][::-1] + ["z1", "z2", "z3"],
          uns={"train_pert_mean": np.append(centroid[::-1], [9, 9, 9])})
    code, text, error = score(capsys, tmp_path / "pred.h5ad", tmp_path / "real.h5ad", "--out", tmp_path / "m.json")
    written = json.loads((tmp_path / "m.json").read_text())
    assert code == 0 and "train_pert_mean" in text, error
    assert written["aggregate"]["pearson_delta_hat"] == pytest.approx(result["aggregate"]["pearson_delta_hat"], rel=1e-6)
    assert written["floors"]["mean"]["l2"] == pytest.approx(result["floors"]["mean"]["l2"], rel=1e-5)


def test_command_line_as_a_user_runs_it(files):
    command = [sys.executable, "metrics.py", str(files / "pred.h5ad"), str(files / "real.h5ad"), "--keys", "l2,pds"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prediction" in done.stdout and "without --reference" in done.stdout and "pds↑" in done.stdout


def test_command_line_equals_the_reference_values(capsys, tmp_path):
    if not ORACLE.exists():
        pytest.skip("reference values are not at hand")
    code, text, _ = score(capsys, ORACLE / "pred.h5ad", ORACLE / "real.h5ad", "--keys", "all",
                           "--out", tmp_path / "m.json")
    expected = json.loads((ORACLE / "expected.json").read_text())["metrics"]
    written = json.loads((tmp_path / "m.json").read_text())
    assert code == 0 and "train_pert_mean" in text
    for key, name in ORACLE_KEYS.items():
        assert written["aggregate"][key] == pytest.approx(expected[name]["value"], rel=1e-3), key


def test_counts_in_the_real_file_are_normalised_over_all_its_genes(case, capsys, tmp_path):
    """One's own run: the prediction holds some genes, log-normalised; the real file holds counts of all genes."""
    rng = np.random.default_rng(0)
    names = ["g00+g01", "g02", "g03+g04", "g20", "absent+g21"]
    counts = {c: rng.poisson(1.5, (30, 90)).astype(np.float32) for c in names + ["control"]}
    write(tmp_path / "real.h5ad", list(counts.items()), case["genes"])
    logged = {c: np.log1p(x / x.sum(1, keepdims=True) * 1e4) for c, x in counts.items()}
    write(tmp_path / "pred.h5ad", [(c, logged[c][:, 10:30]) for c in names], case["genes"][10:30])
    code, _, error = score(capsys, tmp_path / "pred.h5ad", tmp_path / "real.h5ad", "--out", tmp_path / "m.json")
    written = json.loads((tmp_path / "m.json").read_text())
    assert code == 0 and written["aggregate"]["l2"] < 1e-4 and written["info"]["genes"] == 20


def test_control_cells_of_the_prediction_do_not_matter(files, case, capsys, tmp_path):
    write(tmp_path / "with.h5ad", [*case["pred"].items(), ("control", case["control"] * 0.5)], case["genes"])
    for name in (files / "pred.h5ad", tmp_path / "with.h5ad"):
        score(capsys, name, files / "real.h5ad", "--no-floors", "--out", tmp_path / f"{name.stem}.json")
    a, b = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("pred", "with"))
    assert a == b and a["floors"] == {} and a["replicate"] == {}


def test_other_columns_and_labels(files, case, capsys, tmp_path):
    """The flags describe the real file; a prediction whose column is called otherwise is read all the same."""
    real = [("NTC", case["control"]), *case["real"].items()]
    write(tmp_path / "real.h5ad", real, case["genes"], key="what")
    flags = ["--pert-key", "what", "--control", "NTC", "--no-floors", "--out", tmp_path / "m.json"]
    assert score(capsys, files / "pred.h5ad", tmp_path / "real.h5ad", *flags)[0] == 0
    write_pred(tmp_path / "pred.h5ad", case, key="what")
    assert score(capsys, tmp_path / "pred.h5ad", tmp_path / "real.h5ad", *flags)[0] == 0


def test_covariates_on_the_command_line(case, capsys, tmp_path):
    both, *_ = covariate_case()

    def write_both(path, populations):
        labels = [g.partition("@")[::2] for g, x in populations.items() for _ in x]
        obs = {"condition": [c for c, _ in labels], "cell_type": [v for _, v in labels]}
        data.write_h5ad(path, np.vstack(list(populations.values())), obs, both["genes"])

    write_both(tmp_path / "pred.h5ad", both["pred"])
    write_both(tmp_path / "real.h5ad", both["real"] | {f"control@{v}": x for v, x in both["control"].items()})
    write_both(tmp_path / "train.h5ad", both["train"])
    code, text, error = score(capsys, tmp_path / "pred.h5ad", tmp_path / "real.h5ad", "--covariates", "cell_type",
                              "--reference", tmp_path / "train.h5ad", "--out", tmp_path / "m.json")
    assert code == 0, error
    written, expected = json.loads((tmp_path / "m.json").read_text()), metrics.evaluate(**both)
    assert set(written["per_condition"]) == set(both["pred"])
    assert all(close(value, expected["aggregate"][k], 1e-6) for k, value in written["aggregate"].items())
    write_both(tmp_path / "half.h5ad", both["real"] | {"control@one": both["control"]["one"]})
    code, _, error = score(capsys, tmp_path / "pred.h5ad", tmp_path / "half.h5ad", "--covariates", "cell_type")
    assert code == 2 and "no control cells of two" in error


def bad_prediction(case, what):
    pred = {c: x.copy() for c, x in case["pred"].items()}
    if what == "counts":
        return {c: np.round(np.expm1(x)) for c, x in pred.items()}
    if what == "nan":
        pred["g02"][0, 0] = np.nan
    if what == "unknown condition":
        pred["g99"] = pred.pop("g02")
    return pred


@pytest.mark.parametrize("what, message", [
    ("counts", "holds counts"), ("nan", "NaN"), ("unknown condition", "no cells of 1 predicted conditions (g99)"),
])
def test_bad_predictions_are_refused(files, case, capsys, tmp_path, what, message):
    write(tmp_path / "pred.h5ad", list(bad_prediction(case, what).items()), case["genes"])
    code, text, error = score(capsys, tmp_path / "pred.h5ad", files / "real.h5ad", "--out", tmp_path / "m.json")
    assert code == 2 and error.startswith("error: ") and message in error and "Traceback" not in error
    assert not text and not (tmp_path / "m.json").exists()


def test_genes_that_the_real_file_lacks(files, case, capsys, tmp_path):
    write(tmp_path / "pred.h5ad", list(case["pred"].items()), [*case["genes"][:-1], "nowhere"])
    code, _, error = score(capsys, tmp_path / "pred.h5ad", files / "real.h5ad")
    assert code == 2 and "lacks 1 of the 90 genes of the prediction (nowhere)" in error


def test_negative_and_low_predictions_are_scored(files, case, capsys, tmp_path):
    """A model that does not clamp; a mean over few cells that ends below what log1p CP10k reaches."""
    for i, change in enumerate((lambda x: x - 0.05, lambda x: x / 8)):
        write(tmp_path / f"{i}.h5ad", [(c, change(x)) for c, x in case["pred"].items()], case["genes"])
        code, text, error = score(capsys, tmp_path / f"{i}.h5ad", files / "real.h5ad", "--no-floors")
        assert code == 0 and "l2" in text, error


def test_files_without_what_is_needed(files, case, capsys, tmp_path):
    write(tmp_path / "real.h5ad", list(case["real"].items()), case["genes"])
    code, _, error = score(capsys, files / "pred.h5ad", tmp_path / "real.h5ad")
    assert code == 2 and "control" in error
    write(tmp_path / "train.h5ad", list(case["real"].items()), case["genes"])
    code, _, error = score(capsys, files / "pred.h5ad", files / "real.h5ad", "--reference", tmp_path / "train.h5ad")
    assert code == 2 and "holds only predicted conditions" in error
    real = [("control", case["control"]), *case["real"].items()]
    write(tmp_path / "uns.h5ad", real, case["genes"], uns={"train_pert_mean": np.ones(7)})
    code, _, error = score(capsys, files / "pred.h5ad", tmp_path / "uns.h5ad")
    assert code == 2 and "train_pert_mean" in error
    code, _, error = score(capsys, tmp_path / "none.h5ad", files / "real.h5ad")
    assert code == 2 and error.startswith("error: ")
    code, _, error = score(capsys, files / "pred.h5ad", files / "real.h5ad", "--keys", "l2,l3")
    assert code == 2 and "l3" in error
    code, _, error = score(capsys, files / "pred.h5ad", files / "real.h5ad", "--frobnicate")
    assert code == 2 and "--frobnicate" in error
