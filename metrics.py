"""Metrics for perturbation prediction: those of scDFM, PRiMeFlow, scBIG, CellTARNet and the Virtual Cell Challenge.

A score compares predicted cells Y with real cells X of one condition, both log1p CP10k. q and m are their means over
cells (the pseudobulks), c is the mean of the real control cells, dp = q - c and dr = m - c are the predicted and the
real effect. G genes, P predicted and N real conditions, n and k cells.

    python metrics.py pred.h5ad real.h5ad                       score anybody's predictions, print the table
    python metrics.py pred.h5ad real.h5ad --reference train.h5ad --out metrics.json
    python metrics.py pred.h5ad real.h5ad --keys vcc            five of the six scores of the challenge of 2026
    python metrics.py pred.h5ad real.h5ad --pert-key perturbation --control NT --covariates cell_type --keys all

    result = evaluate(pred, real, control, genes, train)        the same from arrays, for scripts
    print(format_table(result_rows(result, "my method")))

Files are AnnData; obs names the condition, 'A+ctrl' meets 'A'. The prediction's genes are scored, matched by name; the
real file is normalised over all its genes first. --reference: training cells, for Systema and the floors.

What to keep in mind when reading the numbers:
- One real control serves both sides. A tool that gives each side its own (cell-eval) differs where the two differ.
- L2, MSE, MAE and all correlations are of means over cells, then averaged over conditions. The published formulas that
  sum over cells rank a fresh draw of the truth below a constant.
- NaN is an answer: a condition for which a metric is undefined is left out of the mean, and missing in `n_valid`.
- Ties share the mid-rank, so a model that predicts the same for every condition scores 0.5, never a perfect 0.
- e_distance, mmd and mmd_pca30 are V-statistics: they grow as cells become fewer. Floors therefore have as many cells
  as the prediction; the replicate has half of the real cells on each side, so a good model can pass it.
- Distances grow with the number of genes, and PCA is fitted on the real cells at hand: values of different gene sets or
  different sets of conditions cannot be compared.
- On one reference case the keys agree with the reference implementations to 1e-6 (mmd and mmd_pca30, float32 there, to
  2e-4). The five keys of the Virtual Cell Challenge 2026 agree with cell-eval 2 where both files hold counts, which
  pds_cosine_panel pools; the challenge's sixth score, expr_mse_unbiased_capped_norm, is left to it.
"""
import argparse
import dataclasses
import math
import platform
import shutil
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import scipy
import torch
from scipy import linalg, sparse, special, stats
from scipy.spatial.distance import cdist

import data


class Key(NamedTuple):
    """One metric. A new one is a function and a line of KEYS."""
    arrow: str       # direction of a better value
    perfect: float   # value of a perfect prediction
    title: str
    score: Callable  # of a Condition: its value; with `of`, of the Conditions of a covariate: the values of all (P,)
    of: str = ""     # what the Conditions then hold of every _Population


KEYS = {
    # of the pseudobulks; hat: from the mean of training, not of control (Systema); top20: genes of largest real effect
    "l2": Key("↓", 0, "Euclidean distance", lambda x: l2(x.q, x.m)),
    "mse": Key("↓", 0, "mean squared error", lambda x: mse(x.q, x.m)),
    "mae": Key("↓", 0, "mean absolute error", lambda x: mae(x.q, x.m)),
    "rmse": Key("↓", 0, "root mean squared error", lambda x: rmse(x.q, x.m)),
    "pearson_delta": Key("↑", 1, "Pearson of effects", lambda x: pearson_delta(x.q, x.m, x.c)),
    "pearson_delta_top20": Key("↑", 1, "the same", lambda x: pearson_delta(x.q, x.m, x.c, x.top20)),
    "pearson_delta_hat": Key("↑", 1, "Pearson of deviations", lambda x: pearson_delta(x.q, x.m, x.reference)),
    "pearson_delta_hat_top20": Key("↑", 1, "the same", lambda x: pearson_delta(x.q, x.m, x.reference, x.top20)),
    "spearman_delta": Key("↑", 1, "Spearman of effects", lambda x: spearman_delta(x.q, x.m, x.c)),
    # of the tests for differential expression (DE) against the real control
    "de_spearman": Key("↑", 1, "Spearman of lfc, DE genes", lambda x: de_spearman(x.p.lfc, x.r.lfc, x.r.significant)),
    "acc": Key("↑", 1, "share of genes with the right sign of effect", lambda x: acc(x.q, x.m, x.c)),
    "acc_top20": Key("↑", 1, "share of genes with the right sign of effect", lambda x: acc(x.q, x.m, x.c, x.top20)),
    "direction_match": Key("↑", 1, "signs of DE genes", lambda x: direction_match(x.p.lfc, x.r.lfc, x.r.significant)),
    "overlap_at_n": Key("↑", 1, "overlap of real and predicted DE genes (the DES of VCC 2025)",
                        lambda x: overlap_at_n(x.p.lfc, x.p.significant, x.r.lfc, x.r.significant)),
    "sig_jaccard": Key("↑", 1, "overlap of DE genes, VCC 2026", lambda x: sig_jaccard(x.p.changes, x.r.changes)),
    "direction_fidelity": Key("↑", 1, "their signs", lambda x: direction_fidelity(x.p.changes, x.r.changes)),
    "direction_reach": Key("↑", 1, "their order", lambda x: direction_reach(x.p.changes, x.r.changes)),
    "lfc_nmae": Key("↓", 0, "relative error of their fold changes", lambda x: lfc_nmae(x.p.changes, x.r.changes)),
    "deg_recall_50": Key("↑", 1, "recall of the top 50 genes by t-score", lambda x: deg_recall(x.p.t, x.r.t)),
    # perturbation discrimination: whether the own real condition is the nearest
    "pds": Key("↑", 1, "L1, own targets excluded", lambda x: discrimination(x.p, x.r, targets=x.targets), "mean"),
    "pds_all_genes": Key("↑", 1, "L1", lambda x: discrimination(x.p, x.r), "mean"),
    "pds_l2": Key("↑", 1, "L2", lambda x: discrimination(x.p, x.r, "euclidean"), "mean"),
    "pds_cosine": Key("↑", 1, "of effects", lambda x: discrimination(x.p, x.r, "cosine"), "effect"),
    "pds_cosine_panel": Key("↑", 1, "of effects on pooled counts, without the targets of all conditions (VCC 2026)",
                            lambda x: discrimination(x.p, x.r, "cosine"), "effect_off_panel"),
    # of the distributions of cells
    "e_distance": Key("↓", 0, "energy distance in 50 PCs", lambda x: energy_distance(x.p.pcs, x.r.pcs)),
    "wasserstein": Key("↓", 0, "entropic transport cost in 50 PCs", lambda x: wasserstein(x.p.pcs, x.r.pcs)),
    "discr_cos": Key("↑", 1, "cosine of the effects", lambda x: discr_cos(x.q, x.m, x.c)),
    "mmd": Key("↓", 0, "PerturBench's MMD, half the energy distance", lambda x: x.energy_in_genes() / 2),
    "mmd_pca30": Key("↓", 0, "the same in 30 PCs", lambda x: mmd_energy(x.p.pcs[:, :30], x.r.pcs[:, :30])),
    "mmd_rbf": Key("↓", 0, "squared MMD with four RBF kernels (scDFM), unbiased", lambda x: x.mmd_rbf()),
    "cosine_logfc": Key("↑", 1, "cosine of PerturBench's log fold changes", lambda x: cosine_logfc(x.q, x.m, x.c)),
    # rank of the own prediction among all, by the measure that the name begins with (PerturBench)
    "rmse_rank": Key("↓", 0, "rank", lambda x: prediction_rank(cdist(x.p, x.truth)), "mean"),
    "cosine_logfc_rank": Key("↓", 0, "rank", lambda x: prediction_rank(cdist(x.p, x.truth, "cosine")), "logfc"),
    "mmd_rank": Key("↓", 0, "rank", lambda x: prediction_rank(mmd_matrix(x.p, x.truth), MMD_TIE), "ranked_cells"),
    "mmd_pca30_rank": Key("↓", 0, "rank", lambda x: prediction_rank(mmd_matrix(x.p, x.truth), MMD_TIE), "ranked_pcs"),
    "deg_recall_50_rank": Key("↓", 0, "rank", lambda x: prediction_rank(-deg_recall(x.p, x.truth)), "t"),
}
TABLE_KEYS = ("l2", "pearson_delta", "pds", "e_distance", "de_spearman", "pearson_delta_hat", "mse", "mae",
              "pearson_delta_top20", "pearson_delta_hat_top20", "pds_all_genes")  # a narrow table lacks the last ones
VCC = ("pds_cosine_panel", "sig_jaccard", "direction_fidelity", "direction_reach", "lfc_nmae")  # of 2026
MMD_RANKS = ("mmd_rank", "mmd_pca30_rank")  # take longer than all others together: computed when asked for
SYSTEMA = ("pearson_delta_hat", "pearson_delta_hat_top20")  # need the mean of training-perturbation centroids
CORRELATIONS = ("pearson_delta", "pearson_delta_top20", *SYSTEMA, "spearman_delta", "de_spearman", "discr_cos",
                "cosine_logfc")
FLOORS = ("control", "mean", "mean_cells", "additive")
POOLED_DEPTH = 50_000     # counts to which the VCC scales the pooled counts of a condition
MIN_CPM = 5               # mean counts per million in control of the genes that the VCC's keys test
TELLS = 0.7               # share of conditions in which the replicate must beat the best floor, a half being chance
MOST_APART = 0.7          # ratio of mean expressions: a second logarithm makes it .37 to .62, perturbations seldom < .8
NO_EFFECT = 1e-6          # below this, float32 rounding of a mean is all there is
MMD_TIE = 1e-6            # relative accuracy of the float32 distances behind the MMD ranks
RANK_CELLS = 1000         # cells per condition in the pairwise MMD ranks (PRiMeFlow's sample size) ...
MANY_CONDITIONS, FEW_CELLS = 100, 100  # ... and above so many conditions, since there are N^2 pairs of them


# -------------------------------------------------------------------------------- pseudobulk metrics

def l2(q, m):
    """||q - m||_2 of means over cells (G,). scDFM (eq. 15), scBIG (eq. 11), CellTARNet. Grows with sqrt(G)."""
    return float(np.linalg.norm(q - m))


def mse(q, m):
    """mean_g (q_g - m_g)^2. scDFM, scBIG, CellTARNet; the papers print a sum over cells, which is 30 times larger."""
    return float(np.mean((q - m) ** 2))


def mae(q, m):
    """mean_g |q_g - m_g|. Used where mse is."""
    return float(np.mean(np.abs(q - m)))


def rmse(q, m):
    """sqrt(mean_g (q_g - m_g)^2) per condition, not the root of the mean mse. PRiMeFlow."""
    return float(np.sqrt(np.mean((q - m) ** 2)))


def top_k(score, k):
    """Indices of the k largest scores; ties go to the first gene (evaluate() orders genes by name)."""
    return np.argsort(-np.asarray(score), kind="stable")[..., :k]


def no_effect(d, against=None):
    """True where an effect is nothing but rounding: max|d| < 1e-6, or < 1e-6 of the largest effect in `against`."""
    scale = 1.0 if against is None else max(1.0, np.abs(against).max(initial=0))
    return np.abs(d).max(initial=0) < NO_EFFECT * scale


def constant(x):
    """True where values differ by nothing but rounding, or where there are fewer than two of them."""
    return len(x) < 2 or np.ptp(x) <= NO_EFFECT * max(1.0, np.abs(x).max())


def pearson(x, y):
    """Pearson correlation; NaN when either side is constant."""
    if constant(x) or constant(y):
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x, y):
    """Spearman correlation with average ranks; NaN as pearson."""
    if constant(x) or constant(y):
        return math.nan
    return pearson(stats.rankdata(x), stats.rankdata(y))


def of_effects(measure, q, m, reference, genes=None):
    """measure(q - reference, m - reference), NaN where either is nothing but rounding; genes: subset (indices)."""
    dp, dr = q - reference, m - reference
    if genes is not None:
        dp, dr = dp[genes], dr[genes]
    return math.nan if no_effect(dp, dr) or no_effect(dr) else measure(dp, dr)


def pearson_delta(q, m, reference, genes=None):
    """Pearson correlation of the effects: pearson_delta against the mean of real controls (scBIG's r_all). The mean of
    training scores high where perturbations share a response, so read it beside pearson_delta_hat (Systema; scDFM,
    CellTARNet), where that mean is the reference. ..._top20: genes with the largest |m - c| (scBIG's r_de)."""
    return of_effects(pearson, q, m, reference, genes)


def spearman_delta(q, m, reference):
    """Spearman correlation of the effects. Of profiles (reference 0, CellTARNet's text) the control reaches 0.92."""
    return of_effects(spearman, q, m, reference)


def acc(q, m, c, genes=None):
    """Share of genes with (dp > 0) == (dr > 0): zero counts as 'not up', so genes silent everywhere are always right.
    Random 0.5; control (dp = 0): share of genes that are not up. scBIG's ACC and, on 20 genes, its ACC-DEG."""
    dp, dr = q - c, m - c
    if no_effect(dp, dr):
        dp = np.zeros_like(dp)
    if genes is not None:
        dp, dr = dp[genes], dr[genes]
    return float(np.mean((dp > 0) == (dr > 0)))


def cosine(x, y):
    """x.y / (|x||y|), NaN when either is zero."""
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / norm) if norm > 0 else math.nan


def discr_cos(q, m, reference):
    """Cosine of the effects in gene space. scBIG (eq. 18, no released code)."""
    return of_effects(cosine, q, m, reference)


def log_fold_change(q, c, pseudocount=1e-9, exp=True):
    """log2((f(q) + pseudocount) / (f(c) + pseudocount)) per gene, f = expm1 or the identity; means below 0 count as 0.
    Default: pdex's and scanpy's up to the pseudocount. PerturBench's logFC: pseudocount=0.1, exp=False."""
    q, c = np.maximum(q, 0), np.maximum(c, 0)
    if exp:
        q, c = np.expm1(q), np.expm1(c)
    return np.log2(q + pseudocount) - np.log2(c + pseudocount)


def cosine_logfc(q, m, c):
    """Cosine of PerturBench's log fold changes, all genes, not centred. PRiMeFlow."""
    if no_effect(q - c, m - c) or no_effect(m - c):
        return math.nan
    return cosine(log_fold_change(q, c, 0.1, exp=False), log_fold_change(m, c, 0.1, exp=False))


# -------------------------------------------------------------------------------- differential expression

class ValueCounts(NamedTuple):
    """The distinct values of every gene, sorted: what ranking with ties needs of one population."""
    n: int               # cells
    keys: np.ndarray     # (D,) uint64, gene << 32 | order-preserving bits of the float32 value
    gene: np.ndarray     # (D,) gene of each distinct value
    count: np.ndarray    # (D,) cells with this value
    below: np.ndarray    # (D + 1,) cells of the same gene with a smaller value, plus gene * n
    ties: np.ndarray     # (G,) _ties()


def _ties(count, gene, n_genes):
    """(G,) sum of t^3 - t over the distinct values of a gene, each shared by t cells."""
    count = count.astype(np.float64)
    return np.bincount(gene, count ** 3 - count, n_genes)


def value_counts(x):
    """Sort every gene of x (n, G) and count equal values; the zeros of a gene are one tie.
    Gene and value become one integer, so that one sorted array serves all genes and no loop runs over genes."""
    n, n_genes = x.shape
    x = np.array(x.T, dtype=np.float32, order="C")
    x.sort(axis=1)
    x += np.float32(0)                                               # makes -0.0 a plain zero
    first = np.ones(x.shape, dtype=bool)
    first[:, 1:] = x[:, 1:] != x[:, :-1]
    position = np.flatnonzero(first)
    bits = x.ravel()[position].view(np.uint32)
    bits ^= np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))      # now ordered like the floats
    gene = position // n
    keys = gene.astype(np.uint64) << np.uint64(32) | bits
    count = np.diff(position, append=x.size)
    return ValueCounts(n, keys, gene, count, np.concatenate([[0], np.cumsum(count)]), _ties(count, gene, n_genes))


def rank_sum_test(x, control):
    """Two-sided Wilcoxon rank-sum (Mann-Whitney) test of every gene, normal approximation: p (G,).

    x (n, G) cells, control (k, G): cells, or their value_counts() (sorted once, used for every condition).
        U = #(x > control) + #(x = control) / 2,  z = (|U - nk/2| - 0.5) / s,
        s^2 = nk/12 (n + k + 1 - sum_t (t^3 - t) / ((n + k)(n + k - 1))) over ties t, p = 2 Phi(-z), p = 1 if s = 0.
    As pdex and scipy's mannwhitneyu; scanpy's has no continuity correction (the 0.5) and by default none for ties."""
    control = control if isinstance(control, ValueCounts) else value_counts(control)
    n_genes = x.shape[1]
    x = value_counts(x)
    at = np.searchsorted(control.keys, x.keys)                       # first distinct control value >= x, over all genes
    here = np.minimum(at, len(control.keys) - 1)
    tied = np.where(control.keys[here] == x.keys, control.count[here], 0)
    below = control.below[at] - x.gene * control.n
    u = np.bincount(x.gene, x.count * (below + 0.5 * tied), n_genes)
    n, k = float(x.n), float(control.n)
    ties = control.ties + _ties(x.count + tied, x.gene, n_genes) - _ties(tied, x.gene, n_genes)
    s = np.sqrt(np.maximum(n * k / 12 * (n + k + 1 - ties / ((n + k) * (n + k - 1))), 0))
    distance = np.maximum(np.abs(u - n * k / 2) - 0.5, 0)
    z = np.divide(distance, s, out=np.zeros(n_genes), where=s > 0)
    return special.erfc(z / math.sqrt(2))


def welch_t(mean, var, n, control_mean, control_var):
    """scanpy's t-test_overestim_var: Welch's t with n cells on both sides, (mean - control) / sqrt((var + var_c) / n).
    var: unbiased. An infinite t counts as 0 (PerturBench), and so does 0/0 (scanpy). NaN where a variance is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (mean - control_mean) / np.sqrt((var + control_var) / n)
    return np.where(np.isfinite(t) | np.isnan(var + control_var), t, 0.0)


def de_spearman(lfc_pred, lfc_real, significant):
    """Spearman correlation of log fold changes over truly significant genes (rank-sum test, BH < 0.05 per condition).
    scDFM's DE-Spearman, CellTARNet's 'DE-Spearman rho', cell-eval's de_spearman_lfc_sig; cell-eval's 'de_spearman_sig'
    correlates numbers of genes over conditions: another metric."""
    return spearman(lfc_pred[significant], lfc_real[significant])


def direction_match(lfc_pred, lfc_real, significant):
    """Share of truly DE genes whose log changes have the same sign, 0 being one: cell-eval's de_direction_match."""
    same = np.sign(lfc_pred[significant]) == np.sign(lfc_real[significant])
    return float(same.mean()) if len(same) else math.nan


def overlap_at_n(lfc_pred, significant_pred, lfc_real, significant):
    """|top-k real DE genes & top-k predicted DE genes| / k, by |log fold change|, k = number of real DE genes; 0 when
    either side has none. cell-eval's overlap_at_N, the 'DES' of the Virtual Cell Challenge 2025. The prediction's own
    test depends on its number and spread of cells: a point mass has spurious DE genes."""
    def strongest(significant, lfc):
        genes = np.flatnonzero(significant)
        return genes[top_k(np.abs(lfc[genes]), k)]

    k = int(np.sum(significant))
    if k == 0:
        return 0.0
    return len(np.intersect1d(strongest(significant, lfc_real), strongest(significant_pred, lfc_pred))) / k


def deg_recall(t_pred, t_real, k=50):
    """|top-k genes by |t_pred| & top-k by |t_real|| / k, t = welch_t against the real control, no p-value filter.

    Random k / G. NaN for a single cell, and for a point mass at the control. t: (G,), or (P, G) and (N, G) for a recall
    of every pair (P, N). PRiMeFlow's DEG recall; PerturBench 2025 up to its unstable order of equal scores."""
    def member(t):
        """1 for the top k genes of a row, 0 for the others; NaN where t is."""
        out = np.zeros(t.shape)
        np.put_along_axis(out, top_k(np.abs(t), k), 1, axis=-1)
        return np.where(np.isnan(t), math.nan, out)

    t_pred, t_real = np.asarray(t_pred), np.asarray(t_real)
    k = min(k, t_real.shape[-1])
    return member(t_pred) @ member(t_real).T / k


# -------------------------------------------------------------------------------- Virtual Cell Challenge 2026

class Changes(NamedTuple):
    """The test of every gene of one side against the real control, as cell-eval 2 makes it (preset vcc2026)."""
    lfc: np.ndarray         # (G',) log2 fold change of mean counts per million, pseudocount 1e-9
    p: np.ndarray           # (G',) rank-sum test
    adjusted: np.ndarray    # (G',) Benjamini-Hochberg

    @property
    def significant(self):
        return self.adjusted < 0.05


def changes(p, cpm, control_cpm, targets=()):
    """Changes of the genes with more than 5 counts per million in control, the condition's own targets left out.
    p (G,): rank_sum_test's; cpm, control_cpm (G,) means over cells of 100 expm1(log1p CP10k); targets: indices."""
    genes = np.flatnonzero(control_cpm > MIN_CPM)
    adjusted = stats.false_discovery_control(p[genes])
    others = ~np.isin(genes, targets)
    genes = genes[others]
    with np.errstate(invalid="ignore"):                              # a mean below zero has no logarithm
        lfc = np.log2(cpm[genes] + 1e-9) - np.log2(control_cpm[genes] + 1e-9)
    return Changes(lfc, p[genes], adjusted[others])


def sig_jaccard(pred, real):
    """|R & P| / |R or P| of the significant genes of two Changes; 1 when neither has any."""
    union = np.sum(real.significant | pred.significant)
    return float(np.sum(real.significant & pred.significant) / union) if union else 1.0


def direction_fidelity(pred, real):
    """Predicted DE genes with the real direction / max(predicted, real DE genes). NaN when neither side has any.
    Only genes with a real fold change count as predicted."""
    calls = pred.significant & np.isfinite(real.lfc) & (real.lfc != 0)
    most = max(np.sum(calls), np.sum(real.significant))
    return float(np.sum(np.sign(pred.lfc[calls]) == np.sign(real.lfc[calls])) / most) if most else math.nan


def direction_reach(pred, real):
    """How deep the real DE genes can be read in the prediction's order (adjusted p, p, |log fold change|, name) while
    90% of directions are right: deepest such position / number of real DE genes, 0 without any. NaN without these."""
    if not real.significant.any():
        return math.nan
    directed = real.significant & np.isfinite(real.lfc) & (real.lfc != 0)
    order = np.lexsort((-np.abs(pred.lfc), pred.p, pred.adjusted))   # stable: genes are in the order of their names
    order = order[directed[order]]
    right = np.cumsum(np.sign(pred.lfc[order]) == np.sign(real.lfc[order]))
    deep = np.flatnonzero(right / np.arange(1, len(order) + 1) >= 0.9)
    return float((deep[-1] + 1) / np.sum(real.significant)) if len(deep) else 0.0


def lfc_nmae(pred, real):
    """sum |lfc_pred - lfc_real| / sum |lfc_real| over real DE genes, NaN with fewer than 10. The control scores 1.
    A predicted fold change that is not finite counts as 0."""
    genes = real.significant
    if np.sum(genes) < 10:
        return math.nan
    lfc = np.where(np.isfinite(pred.lfc[genes]), pred.lfc[genes], 0)
    return float(np.abs(lfc - real.lfc[genes]).sum() / np.abs(real.lfc[genes]).sum())


# -------------------------------------------------------------------------------- gene sets

ENRICHMENT = ("module", "pathway", "overlap", "module_genes", "pathway_genes", "p", "p_adjusted")


def enrichment(modules, genes, sets):
    """Gene sets that a module holds more of than chance, most significant first: rows of the columns ENRICHMENT.

    Hypergeometric test (upper tail) among the given genes, Benjamini-Hochberg over all pairs, adjusted p < 0.05.
    modules (G,): module of every gene; genes: their names; sets {name: names in capitals}, those with fewer than three
    of the genes left out."""
    capitals = [gene.upper() for gene in genes]
    known = {name: np.isin(capitals, list(members)) for name, members in sets.items()}
    rows = [(module, name, np.sum(inside[modules == module]), np.sum(modules == module), np.sum(inside))
            for module in np.unique(modules).tolist() for name, inside in known.items() if inside.sum() >= 3]
    counts = np.array([row[2:] for row in rows]).reshape(-1, 3)
    p = np.minimum(stats.hypergeom.sf(counts[:, 0] - 1, len(genes), counts[:, 2], counts[:, 1]), 1)  # 1 + 1e-16
    adjusted = stats.false_discovery_control(p)
    found = [(*row, p[i], adjusted[i]) for i, row in enumerate(rows) if adjusted[i] < 0.05]
    return sorted(found, key=lambda row: (row[-1], row[:2]))


# -------------------------------------------------------------------------------- ranks and discrimination

def own_rank(distance, rtol=1e-9):
    """Where distance[i, i] stands within row i of (P, N), 0 the smallest, 1 the largest, ties half: (P,).

    (#smaller + #equal / 2) / (N - 1), equal up to rtol * the largest distance. Undefined own: 0.5; undefined
    competitor: last. NaN with fewer than two columns."""
    rows, columns = distance.shape
    if columns < 2:
        return np.full(rows, math.nan)
    value = np.diagonal(distance)[:, None]
    other = np.where(np.isnan(distance), np.inf, distance)
    slack = rtol * np.abs(np.nan_to_num(distance)).max(initial=0)
    smaller = np.sum(other < value - slack, axis=1)
    equal = np.sum(np.abs(other - value) <= slack, axis=1) - 1
    rank = (smaller + 0.5 * equal) / (columns - 1)
    return np.where(np.isnan(value[:, 0]), 0.5, rank)


def prediction_rank(distance, rtol=1e-9):
    """PerturBench's rank (PRiMeFlow's tables): for each REAL condition (column) of (N, N), the place of its own among
    all predictions (rows). For a similarity pass its negative. own_rank(distance) is the other direction, PDS's."""
    return own_rank(distance.T, rtol=rtol)


def discrimination(q, m, metric="cityblock", targets=None):
    """Perturbation discrimination score of each prediction: 1 - rank of the own REAL pseudobulk among all real ones.

    q (P, G) predictions, m (N, G) truths, those of the predictions first; metric of scipy's cdist; pass effects
    (q - c, m - c) for 'cosine'. targets: a list of gene indices per prediction that are left out of an L1 distance.
    Random or collapsed 0.5; cell-eval and the Virtual Cell Challenge 2025 divide by N instead of N - 1.
    pds: L1 without the perturbed genes of the condition (scDFM eq. 16-20, scBIG eq. 15). Each prediction then has its
    own gene set, which leaks: a constant prediction scores above 0.5 (0.60 on the reference case)."""
    q, m = np.asarray(q), np.asarray(m)
    distance = cdist(q, m, metric)                                   # cosine of a zero effect: NaN, undefined
    for i, genes in enumerate(targets or []):
        distance[i] -= np.abs(q[i, genes] - m[:, genes]).sum(axis=1)
    return 1 - own_rank(distance)


# -------------------------------------------------------------------------------- distributions

class Basis(NamedTuple):
    """Principal components: scores are (x - mean) @ loadings."""
    mean: np.ndarray        # (G,)
    loadings: np.ndarray    # (G, k), by decreasing variance
    explained: np.ndarray   # (k,) share of the variance


def fit_pca(populations, k=50):
    """Exact PCA (centred, unscaled) of all cells of the (n, G) arrays that populations() gives, in float64.

    Eigenvectors of the covariance, so memory does not grow with cells; populations() is called twice. The largest
    loading of each component is positive. k is reduced to min(k, G, cells - 1)."""
    total, n = 0.0, 0
    for x in populations():
        total = total + x.sum(axis=0, dtype=np.float64)
        n += len(x)
    mean = total / n
    covariance = np.zeros((len(mean), len(mean)))
    for x in populations():
        x = x - mean
        covariance += x.T @ x
    k = max(1, min(k, len(mean), n - 1))
    variance, loadings = linalg.eigh(covariance, subset_by_index=[len(mean) - k, len(mean) - 1])
    variance, loadings = variance[::-1], loadings[:, ::-1]
    loadings = loadings * np.sign(loadings[np.argmax(np.abs(loadings), axis=0), np.arange(k)])
    return Basis(mean, loadings, np.maximum(variance, 0) / max(np.trace(covariance), 1e-300))


def squared_distances(x, y, dtype=np.float64):
    """(n, m) squared Euclidean distances by one matrix product."""
    x, y = np.asarray(x, dtype), np.asarray(y, dtype)
    d = x @ y.T
    d *= -2
    d += np.einsum("ij,ij->i", x, x)[:, None]
    d += np.einsum("ij,ij->i", y, y)
    return np.maximum(d, 0, out=d)


def mean_distance(x, y):
    """E||x - y|| over all pairs, x (n, d), y (m, d)."""
    d = squared_distances(x, y)
    return np.sqrt(d, out=d).mean()


def pair_distances(x):
    """Squared Euclidean distances of all pairs of different cells of x (n, d): (n (n - 1) / 2,) float64."""
    x = np.asarray(x, dtype=np.float64)                              # once: the product of an array with itself is half
    return squared_distances(x, x)[~np.tri(len(x), dtype=bool)]


def energy_distance(x, y):
    """2 E||x-y|| - E||x-x'|| - E||y-y'|| with Euclidean norms, all pairs (V-statistic). x (n, d) and y (m, d) cells.
    e_distance: in the 50 PCs of all real cells that are scored and their controls. scBIG's E-Dist (its tables fix
    unsquared norms). With squared norms, as in CellFlow and scPerturb, it is 2 ||mean(x) - mean(y)||^2."""
    return _energy(mean_distance(x, x), mean_distance(y, y), mean_distance(x, y))


def _energy(within_x, within_y, between):
    """The energy distance from three mean distances; rounding could make it negative."""
    return float(max(2 * between - within_x - within_y, 0))


def mmd_energy(x, y):
    """PerturBench's and PRiMeFlow's 'mmd' (geomloss 'energy'): half the energy distance, not comparable with RBF.
    mmd: gene space; mmd_pca30: the first 30 PCs (PerturBench's code defaults to 100, the paper says 30)."""
    return 0.5 * energy_distance(x, y)


def kernel_sum(d, median):
    """Sum over squared distances d of the mean of four kernels exp(-d / (2 s median)), s in 4, 2, 1, 0.5: each is the
    square of the one before."""
    total = 0.0
    for start in range(0, d.size, 1_000_000):
        kernel = np.exp(d.reshape(-1)[start:start + 1_000_000] / (-8 * median))
        for _ in range(4):
            total += kernel.sum() / 4
            kernel *= kernel
    return total


def real_kernel(pairs):
    """Of real cells' pair_distances: the bandwidth of mmd_rbf, their lower median, and the kernel_sum."""
    middle = (len(pairs) - 1) // 2
    median = max(np.partition(pairs, middle)[middle], 1e-12)
    return median, kernel_sum(pairs, median)


def mmd_rbf(x, y):
    """Squared MMD, unbiased, mean over kernels exp(-d^2 / (2 s m)), s in 0.5, 1, 2, 4; scDFM's Algorithm 1 and loss.
    x predicted, y real cells; m: lower median of the squared distances between different REAL cells. About 0 for a
    fresh draw of the truth, slightly negative for the same cells. NaN with one real or one predicted cell."""
    if min(len(x), len(y)) < 2:
        return math.nan
    return _mmd_rbf(pair_distances(x), squared_distances(x, y), len(y), real_kernel(pair_distances(y)))


def _mmd_rbf(within_x, between, k, of_real):
    """mmd_rbf from pair_distances(x), none for a point mass, squared_distances(x, y) and the real_kernel of k cells."""
    median, sum_y = of_real
    mean_x = kernel_sum(within_x, median) / len(within_x) if len(within_x) else 1.0
    mean_y = 2 * sum_y / (k * (k - 1))
    return float(mean_x + mean_y - 2 * kernel_sum(between, median) / between.size)


def sinkhorn(cost, epsilon):
    """Entropic transport plan P of cost (n, m) with uniform weights: (<P, cost>, marginal error at the end).

    P = exp((f + g - cost) / epsilon) with potentials f, g in the log domain, which holds at any epsilon. They are
    improved by 20 cheap scalings of the current plan; at the start, or where these leave the range of floats, by one
    update in the log domain."""
    n, m = cost.shape
    a, b = 1 / n, 1 / m
    g = np.zeros(m)
    scaled = False
    for _ in range(100):
        if not scaled:
            f = epsilon * (math.log(a) - special.logsumexp((g - cost) / epsilon, axis=1))
            g = epsilon * (math.log(b) - special.logsumexp((f[:, None] - cost) / epsilon, axis=0))
        plan = np.exp((f[:, None] + g - cost) / epsilon)
        error = np.abs(plan.sum(axis=1) - a).sum()
        if error < 1e-6:
            break
        with np.errstate(all="ignore"):
            v = np.ones(m)
            for _ in range(20):
                u = a / (plan @ v)
                v = b / (u @ plan)
            u, v = epsilon * np.log(u), epsilon * np.log(v)
        scaled = np.isfinite(u).all() and np.isfinite(v).all()
        if scaled:
            f, g = f + u, g + v
    return float(np.sum(plan * cost)), float(error)


def wasserstein(x, y):
    """Transport cost <P, C> of cells x (n, d) and y (m, d), C Euclidean, P the entropic plan with epsilon 0.05 mean(C).
    NaN where P has not converged. scBIG's tables (no code). NOT calibrated: in many dimensions a fresh draw of the
    truth scores like the point mass at its mean, so read it beside e_distance."""
    cost = np.sqrt(squared_distances(x, y))
    if not cost.any():
        return 0.0
    value, error = sinkhorn(cost, 0.05 * cost.mean())
    return value if error < 1e-4 else math.nan


def mmd_matrix(pred, real, block=16_000_000):
    """mmd_energy of every prediction with every truth: lists of (n_i, d) cells -> (P, N).
    Distances between populations are float32: the cells should be centred, so that little is lost to cancellation."""
    cells = np.concatenate(real)
    start = np.cumsum([0] + [len(y) for y in real])
    step = max(1, block // start[-1])
    within_real = np.array([mean_distance(y, y) for y in real])
    out = np.zeros((len(pred), len(real)))
    for i, x in enumerate(pred):
        for rows in range(0, len(x), step):
            d = squared_distances(x[rows:rows + step], cells, np.float32)
            out[i] += np.add.reduceat(np.sqrt(d, out=d).sum(axis=0, dtype=np.float64), start[:-1])
        out[i] = out[i] / (len(x) * np.diff(start)) - 0.5 * (mean_distance(x, x) + within_real)
    return out


# -------------------------------------------------------------------------------- populations

def perturbations(group):
    """'A+B@cov' -> ['A', 'B']"""
    return data.split_group(group)[0].split("+")


def covariate(group):
    """'A+B@cov' -> 'cov'"""
    return data.split_group(group)[1]


def _rng(seed, *purpose):
    """A generator of its own for every purpose and group: removing one condition changes nothing for the others."""
    return np.random.default_rng([seed, zlib.crc32("/".join(purpose).encode())])


class _World:
    """What all populations of one evaluation share: conditions, gene order, controls, principal components."""

    def __init__(self, groups, control, genes, seed, totals=None):
        self.groups, self.seed = groups, seed
        self.pooled = bool(totals)
        self.order = np.argsort(np.asarray(genes, dtype=str), kind="stable")   # by name: no tie depends on the input
        self.column = {genes[i]: k for k, i in enumerate(self.order)}
        self.covariates = sorted({covariate(g) for g in groups})
        control = control if isinstance(control, Mapping) else {"": control}
        missing = set(self.covariates) - set(control)
        if missing:
            raise data.DataError(f"there are no control cells of {sorted(missing)}, but of {sorted(control)}; check "
                                 "--covariates and --control")
        of_real = totals[1] if totals else {}
        self.control = {v: _Population(x, v, self, "control", of_real.get(v)) for v, x in control.items()}
        self.panel_targets = sorted({i for g in groups for i in self.targets(g)})
        self.reference = {}                          # {group: (G,)} the mean training perturbation
        self.levels = {}                             # {group: mean of all values of what was scored last}
        self.basis = None

    def targets(self, group):
        """Columns of the perturbed genes that are in the panel ('drug:dose' counts as 'drug')."""
        named = {name for p in perturbations(group) for name in (p, data.split_dose(p)[0])}
        return [self.column[name] for name in sorted(named & self.column.keys())]

    def rank_cells(self, group):
        """Most cells of a condition that enter the pairwise MMDs."""
        n = sum(covariate(g) == covariate(group) for g in self.groups)
        return FEW_CELLS if n > MANY_CONDITIONS else RANK_CELLS


class _Population:
    """One population of cells and what is derived from it, computed when first asked for.

    source (n, G): array or CSR. side: what a user's cells are, for error messages; they are checked, and their genes
    put in order. '' for cells that were made here. totals (n,): counts that each cell had before it was normalised."""

    def __init__(self, source, group, world, side="", totals=None):
        self.group, self.world = group, world
        self.source, self.n = source, source.shape[0]
        self.totals = np.ones(self.n) if totals is None else totals
        if not side:
            return
        if source.ndim != 2 or self.n == 0 or source.shape[1] != len(world.order):
            raise data.DataError(f"{side} cells of '{group}' have shape {source.shape}; expected (cells, "
                                 f"{len(world.order)} genes)")
        if not np.isfinite(source.data if sparse.issparse(source) else source).all():
            raise data.DataError(f"{side} cells of '{group}' hold NaN or infinite values")
        # take() and not an index, whose result lies column by column
        self.source = source[:, world.order] if sparse.issparse(source) else np.take(source, world.order, axis=1)

    @property
    def cells(self):
        """(n, G) float32, genes ordered by name. Not kept: a sparse source stays sparse."""
        x = self.source.toarray() if sparse.issparse(self.source) else self.source
        return np.ascontiguousarray(x, dtype=np.float32)

    @property
    def control(self):
        return self.world.control[covariate(self.group)]

    @cached_property
    def mean(self):
        return self.cells.mean(axis=0, dtype=np.float64)

    @cached_property
    def variance(self):
        return self.cells.var(axis=0, ddof=1, dtype=np.float64) if self.n > 1 else np.full(len(self.mean), math.nan)

    @cached_property
    def counts(self):
        return value_counts(self.cells)

    @cached_property
    def cpm(self):
        return 100 * np.expm1(self.cells).mean(axis=0, dtype=np.float64)

    @cached_property
    def effect(self):
        """Mean minus control mean; exactly zero when it is nothing but rounding."""
        d = self.mean - self.control.mean
        return np.zeros_like(d) if no_effect(d) else d

    @cached_property
    def p(self):
        """(G,) p-values of the rank-sum test against the real control."""
        return rank_sum_test(self.cells, self.control.counts)

    @cached_property
    def adjusted_p(self):
        return stats.false_discovery_control(self.p)

    @cached_property
    def significant(self):
        return (self.adjusted_p < 0.05) & self.effect.any()

    @cached_property
    def changes(self):
        return changes(self.p, self.cpm, self.control.cpm, self.world.targets(self.group))

    @cached_property
    def lfc(self):
        return log_fold_change(self.mean, self.control.mean) * self.effect.any()

    @cached_property
    def logfc(self):
        """PerturBench's."""
        return log_fold_change(self.mean, self.control.mean, 0.1, exp=False) * self.effect.any()

    @cached_property
    def t(self):
        t = welch_t(self.mean, self.variance, self.n, self.control.mean, self.control.variance)
        return t if self.effect.any() else np.full_like(t, math.nan)

    @cached_property
    def is_point(self):
        """Whether all cells are the same. A point mass is one point in distances: quicker, and its ties are exact."""
        cells = self.cells
        return bool((cells == cells[0]).all())

    @property
    def points(self):
        """(n, G) cells, or the one (1, G) of a point mass."""
        return self.cells[:1] if self.is_point else self.cells

    @cached_property
    def pcs(self):
        """(n, 50) principal components of its points."""
        return (self.points - self.world.basis.mean) @ self.world.basis.loadings

    @cached_property
    def profile(self):
        """(G,) log1p(50,000 x pooled counts / their total), from shares of a cell and totals; the mean without counts.
        Means below 0, as of an additive floor, count as 0."""
        if not self.world.pooled:
            return self.mean
        share = np.einsum("i,ij", self.totals, np.expm1(self.cells)) / max(self.totals.sum(), 1) / 1e4
        return np.log1p(POOLED_DEPTH * np.maximum(share, 0))

    @property
    def effect_off_panel(self):
        """Of the profile, without the targets of all conditions; zero when it is nothing but rounding."""
        d = self.profile - self.control.profile
        return np.delete(np.zeros_like(d) if no_effect(d) else d, self.world.panel_targets)

    @cached_property
    def in_genes(self):
        """The same in gene space, and real_kernel()."""
        pairs = pair_distances(self.cells)
        return 2 * np.sqrt(pairs).sum() / self.n**2, real_kernel(pairs) if self.n > 1 else None

    @cached_property
    def ranked_rows(self):
        limit = self.world.rank_cells(self.group)
        if self.is_point:
            return np.zeros(1, dtype=int)
        if self.n <= limit:
            return np.arange(self.n)
        return np.sort(_rng(self.world.seed, "rank", self.group).choice(self.n, limit, replace=False))

    @cached_property
    def ranked_cells(self):
        return self.cells[self.ranked_rows] - self.control.mean.astype(np.float32)

    @cached_property
    def ranked_pcs(self):
        return self.pcs[self.ranked_rows, :30].astype(np.float32)


class _Training:
    """What floors and the Systema reference need of the training perturbations, from one pass over them.
    The mean of each, and `share` cells of each, so that a draw from these weights conditions equally."""

    def __init__(self, train, world, most_cells):
        self.world = world
        self.groups = [g for g in train if perturbations(g) != ["control"]]
        self.share = math.ceil(max(2000, 2 * most_cells) / min(len(self.like(v)) for v in world.covariates))
        self.mean = {}
        self.cells = np.empty((len(self.groups), self.share, len(world.column)), np.float32)
        for i, g in enumerate(data.progress(self.groups, "reading training conditions")):
            x = _Population(train[g], g, world, "training")
            self.mean[g] = x.mean
            self.cells[i] = x.cells[_rng(world.seed, "train", g).choice(x.n, self.share, replace=self.share > x.n)]

    def like(self, value):
        """Training groups of the same covariate if there are any, else all."""
        return [g for g in self.groups if covariate(g) == value] or self.groups

    def centroid(self, value):
        """Unweighted mean of the training perturbations' means: the Systema reference and the `mean` floor."""
        return np.mean([self.mean[g] for g in self.like(value)], axis=0)

    def draw(self, group, n):
        """n cells of the training perturbations, conditions equally weighted."""
        like = np.flatnonzero(np.isin(self.groups, self.like(covariate(group))))
        drawn = _rng(self.world.seed, "mean_cells", group).choice(len(like) * self.share, n, replace=False)
        return self.cells[like[drawn // self.share], drawn % self.share]

    def additive(self, group):
        """Sum of the effects of its single perturbations (G,), or None when one of them is not in training.

        A single's effect is that in the group's own covariate if it was trained there, else the average over the
        others, each against its own control."""
        world, total = self.world, 0.0
        for perturbation in perturbations(group):
            singles = [g for g in self.groups if perturbations(g) == [perturbation]
                       and covariate(g) in world.control]
            singles = [g for g in singles if covariate(g) == covariate(group)] or singles
            if not singles:
                return None
            effects = [self.mean[g] - world.control[covariate(g)].mean for g in singles]
            total = total + np.mean(effects, axis=0)
        return total


def _floor(name, world, training, sizes):
    """The populations of one floor, one after another, each with as many cells as the prediction."""
    for group, n in data.progress(sizes.items(), f"scoring the {name} floor"):
        control = world.control[covariate(group)]
        shift = training.additive(group) if name == "additive" else np.zeros(1)
        if shift is None:
            continue
        totals = None
        if name == "mean":
            cells = np.tile(world.reference[group].astype(np.float32), (n, 1))
        elif name == "mean_cells":
            cells = training.draw(group, n)
        else:
            rows = _rng(world.seed, name, group).choice(control.n, n, replace=n > control.n)
            cells = control.cells[rows] + shift.astype(np.float32)   # not clamped
            totals = control.totals[rows]
        yield _Population(cells, group, world, totals=totals)


# -------------------------------------------------------------------------------- scoring

class Condition:
    """What a metric sees of one condition. p, r: its predicted and its real _Population; (G,) q and m: their means, c:
    that of the real control, reference: the mean training perturbation; top20: genes with the largest real effect."""

    def __init__(self, p, r):
        self.p, self.r = p, r
        self.q, self.m = p.mean, r.mean
        self.c = r.control.mean
        self.reference = r.world.reference.get(r.group)
        self.top20 = top_k(np.abs(self.m - self.c), 20)

    @cached_property
    def squared(self):
        """Squared distances in gene space, of pairs within p and between p and r: shared by mmd and mmd_rbf."""
        x = self.p.points.astype(np.float64)
        return pair_distances(x), squared_distances(x, self.r.cells)

    def energy_in_genes(self):
        within, between = self.squared
        return _energy(2 * np.sqrt(within).sum() / self.p.n**2, self.r.in_genes[0], np.sqrt(between).mean())

    def mmd_rbf(self):
        return _mmd_rbf(*self.squared, self.r.n, self.r.in_genes[1]) if min(self.p.n, self.r.n) > 1 else math.nan


class Conditions(NamedTuple):
    """What a metric sees of all conditions of a covariate: PDS looks for the truth among all real conditions, the ranks
    compare the predictions that there are."""
    p: list        # what Key.of names, of the P predictions
    r: list        # the same of the N real conditions, those of the predictions first
    targets: list  # of P lists of genes

    @property
    def truth(self):
        """The real conditions that were predicted."""
        return self.r[:len(self.p)]


def _score(populations, real, world, keys, tables=None):
    """{group: {key: value}} of predicted populations; an iterable: each is freed once it has been looked at.
    tables: a dict that receives of every group {column of genes.tsv: (G,) array}."""
    compared = {k: KEYS[k].of for k in keys if KEYS[k].of}
    out, kept = {}, {}
    for p in populations:
        r = real[p.group]
        condition = Condition(p, r)
        world.levels[p.group] = p.mean.mean()
        out[p.group] = {k: KEYS[k].score(condition) for k in keys if k not in compared}
        kept[p.group] = {name: getattr(p, name) for name in compared.values()}
        if tables is not None:
            tables[p.group] = {"gene": np.array(list(world.column)), "control_mean": r.control.mean,
                               "pred_mean": p.mean, "real_mean": r.mean, "pred_lfc": p.lfc, "real_lfc": r.lfc,
                               "real_p_adjusted": r.adjusted_p}
    for value in {covariate(g) for g in kept}:
        mine = [g for g in kept if covariate(g) == value]
        others = [g for g in real if covariate(g) == value and g not in kept]
        targets = [world.targets(g) for g in mine]
        for key, name in compared.items():
            both = Conditions([kept[g][name] for g in mine], [getattr(real[g], name) for g in mine + others], targets)
            for g, score in zip(mine, KEYS[key].score(both)):
                out[g][key] = float(score)
    return out


def _replicate(truth, world, keys):
    """Scores of one random half of the real cells of each condition against the other half."""
    one, other = {}, {}
    for g, r in truth.items():
        if r.n > 1:
            order = _rng(world.seed, "replicate", g).permutation(r.n)
            for half, rows in ((one, np.sort(order[:r.n // 2])), (other, np.sort(order[r.n // 2:]))):
                half[g] = _Population(r.source[rows], g, world, totals=r.totals[rows])
    return _score(data.progress(one.values(), "scoring halves of the real cells"), other, world, keys)


# -------------------------------------------------------------------------------- evaluation

def evaluate(pred, real, control, genes, train=None, keys=None, seed=0, floors=True, train_mean=None, totals=None,
             tables=None):
    """Every metric of a prediction, with floors, a replicate reference and intervals. All values log1p CP10k.

    pred, real: {group: (cells, G)}, arrays or CSR; a group is a condition 'A' or 'A+B', with covariates
    'A+B@cov1,cov2'. Groups that only one of them has are left out, with a note. control: real control cells (cells, G),
    or {covariates: (cells, G)}. genes: G names. train: {group: (cells, G)} of the training perturbations, read once,
    for the Systema reference and the floors; without it these are absent, save what train_mean allows, the mean (G,)
    of the training perturbations' means. keys: what is computed, default all but the two MMD ranks, 'all' for these
    too. floors=False leaves out floors and replicate, most of the time. totals (of pred {group: (cells,)}, of real
    {group, or covariates of controls: (cells,)}): where both sides were counts, how many each cell had, by which
    pds_cosine_panel pools them. tables: a dict that receives {group: {column of genes.tsv: (G,) array}}, genes by name.

    Returns a dict that json can write, with None for NaN:
      aggregate {key: mean over the conditions where it is defined}, n_valid {key: their number};
      ci95 {key: [low, high]}; groups {'single', 'double', ...: {key: mean}}; per_condition {group: {key: value}};
      floors {name of FLOORS: {key: mean} or None}, floors_per_condition, without the keys *_rank;
      replicate {key: mean}, one half of the real cells scored against the other; replicate_per_condition;
      score_vs_floor {key: (score - best floor) / (replicate - best floor)};
      can_tell {key: share of conditions in which the replicate beats that floor, or None}: near a half or below, the
      metric cannot tell a draw of the truth from a constant on these data;
      info: numbers of conditions, genes and cells, seed, notes.
    Raises data.DataError for inputs that do not fit together."""
    keys = KEYS if keys == "all" else keys or [k for k in KEYS if k not in MMD_RANKS]
    measured = set(real)                                             # `in` would read the cells of a lazy mapping
    groups = [g for g in pred if g in measured]
    unknown = sorted(set(keys) - set(KEYS))
    if not groups:
        raise data.DataError(f"there are no real cells of any predicted condition ({data.listed(sorted(pred))}), but "
                             f"of {data.listed(sorted(measured))}; check --pert-key and --covariates")
    if unknown:
        raise data.DataError(f"--keys: unknown metrics {data.listed(unknown)}; the metrics are {' '.join(KEYS)}")
    if len(set(genes)) != len(genes):
        raise data.DataError("gene names are not unique")
    notes = [f"{len(names)} {what} and left out: {data.listed(sorted(names))}"
             for what, names in (("predicted conditions were not measured", set(pred) - measured),
                                 ("measured conditions are not predicted", measured - set(pred))) if names]
    world = _World(groups, control, genes, seed, totals)
    of_pred, of_real = totals or ({}, {})
    truth = {g: _Population(real[g], g, world, "real", of_real.get(g)) for g in groups}
    pred = {g: pred[g] for g in groups}
    sizes = {g: x.shape[0] for g, x in pred.items()}
    training = _Training(train, world, max(sizes.values())) if train else None
    if training:
        centroids = {v: training.centroid(v) for v in world.covariates}
        world.reference = {g: centroids[covariate(g)] for g in groups}
    elif train_mean is not None:
        world.reference = dict.fromkeys(groups, np.asarray(train_mean, np.float64)[world.order])
    keys = [k for k in KEYS if k in keys and (world.reference or k not in SYSTEMA)]
    if {"e_distance", "wasserstein", "mmd_pca30", "mmd_pca30_rank"} & set(keys):
        fitted_on = [*truth.values(), *(world.control[v] for v in world.covariates)]
        world.basis = fit_pca(lambda: (x.cells for x in fitted_on))

    predicted = (_Population(x, g, world, "predicted", of_pred.get(g))
                 for g, x in data.progress(pred.items(), "scoring the prediction"))
    scores = _score(predicted, truth, world, keys, tables)
    result = _summary(scores, keys)
    result["ci95"] = _intervals(result["per_condition"], keys, _rng(seed, "bootstrap"))
    result["groups"] = {}
    for n in sorted({len(perturbations(g)) for g in groups}):
        members = {g: scores[g] for g in groups if len(perturbations(g)) == n}
        name = {1: "single", 2: "double", 3: "triple"}.get(n, f"{n}_perturbations")
        result["groups"][name] = _summary(members, keys)["aggregate"]
    result["info"] = {"conditions": len(groups), "genes": len(genes), "seed": seed, "notes": notes,
                      "cells_pred": sum(sizes.values()), "cells_real": sum(r.n for r in truth.values()),
                      "cells_control": {v: world.control[v].n for v in world.covariates}}
    levels = np.mean([*world.levels.values()]), np.mean([r.mean.mean() for r in truth.values()])
    if min(levels) < MOST_APART * max(levels):
        notes.append(f"predicted values average {levels[0]:.3g}, real ones {levels[1]:.3g}: are both log1p CP10k? (a "
                     "logarithm taken twice, counts declared --lognorm)")
    ranked = truth if set(MMD_RANKS) & set(keys) else ()
    limits = [world.rank_cells(g) for g in ranked if max(truth[g].n, sizes[g]) > world.rank_cells(g)]
    if limits:
        notes.append(f"MMD ranks use at most {min(limits)} cells per condition; {len(limits)} had more")
    result |= {"floors": {}, "floors_per_condition": {}, "replicate": {}, "replicate_per_condition": {},
               "score_vs_floor": {}, "can_tell": {}}
    if floors:
        _add_references(result, world, training, truth, sizes, keys)
    return result


def _add_references(result, world, training, truth, sizes, keys):
    """The floors, the replicate and how a prediction stands between them, into an evaluate() result."""
    possible = {"control": True, "mean": world.reference, "mean_cells": training, "additive": training}
    partial = set()
    no_ranks = [k for k in keys if not k.endswith("_rank")]
    for name in FLOORS:
        values = _score(_floor(name, world, training, sizes), truth, world, no_ranks) if possible[name] else {}
        summary = _summary(values, keys)
        result["floors"][name] = summary["aggregate"] if values else None
        result["floors_per_condition"][name] = summary["per_condition"]
        if 0 < len(values) < len(truth):
            partial.add(name)
            result["info"]["notes"].append(f"the {name} floor exists for {len(values)} of {len(truth)} conditions and "
                                           "averages over these; score_vs_floor leaves it out")
    replicate = _summary(_replicate(truth, world, keys), keys)
    result["replicate"], result["replicate_per_condition"] = replicate["aggregate"], replicate["per_condition"]
    for k in keys:
        result["score_vs_floor"][k], result["can_tell"][k] = _against_floor(k, result, partial)


def _summary(scores, keys):
    """aggregate, n_valid and per_condition, as evaluate() returns them, of {group: {key: value}}; JSON has no NaN."""
    per_condition = {g: {k: float(values[k]) if math.isfinite(values.get(k, math.nan)) else None for k in keys}
                     for g, values in scores.items()}
    defined = {k: [values[k] for values in per_condition.values() if values[k] is not None] for k in keys}
    return {"aggregate": {k: float(np.mean(values)) if values else None for k, values in defined.items()},
            "n_valid": {k: len(values) for k, values in defined.items()}, "per_condition": per_condition}


def _intervals(per_condition, keys, rng, resamples=1000):
    """95% percentile bootstrap over conditions: {key: [low, high], or None with fewer than two defined conditions}."""
    table = np.array([[values[k] for k in keys] for values in per_condition.values()], dtype=float)  # None becomes NaN
    defined = np.isfinite(table)
    weights = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), resamples).astype(float)
    with np.errstate(invalid="ignore"):                              # 0 / 0: a resample without a defined condition
        means = (weights @ np.where(defined, table, 0)) / (weights @ defined)
    return {k: [float(v) for v in np.nanpercentile(means[:, i], [2.5, 97.5])]
            if defined[:, i].sum() > 1 else None for i, k in enumerate(keys)}


def _against_floor(key, result, partial):
    """score_vs_floor and can_tell of a key: (score - best floor) / (replicate - best floor), None when the replicate is
    not better than it; and the share of conditions in which the replicate is better than it, a tie being half.

    A correlation that is undefined for a floor counts as 0. Left out: other undefined values, and the floors in
    `partial`, which average over other conditions than the score does."""
    def value(values):
        return 0.0 if values[key] is None and key in CORRELATIONS else values[key]

    sign = 1 if KEYS[key].arrow == "↑" else -1
    means = {name: value(floor) for name, floor in result["floors"].items() if floor and name not in partial}
    name = max((n for n, mean in means.items() if mean is not None), key=lambda n: sign * means[n], default=None)
    if name is None:
        return None, None
    pairs = [(values[key], value(result["floors_per_condition"][name][group]))
             for group, values in result["replicate_per_condition"].items()]
    wins = [(1 + np.sign(sign * (ours - floor))) / 2 for ours, floor in pairs if None not in (ours, floor)]
    share = float(np.mean(wins)) if wins else None
    score, replicate = result["aggregate"][key], result["replicate"][key]
    if None in (score, replicate) or sign * (replicate - means[name]) <= 0:
        return None, share
    return (score - means[name]) / (replicate - means[name]), share


# -------------------------------------------------------------------------------- tables, command line

def result_rows(result, name, intervals=False):
    """[(row, {key: value})] of an evaluate() result for format_table: floors, the method, with intervals below it,
    variants that a run's result may hold, replicate, 'vs floor'."""
    rows = [*result["floors"].items(), (name, result["aggregate"])]
    for i, end in enumerate(("from", "to") if intervals else ()):
        rows.append((f"  95% {end}", {k: v and v[i] for k, v in result["ci95"].items()}))
    rows += [(name + suffix, other["aggregate"]) for suffix, other in result.get("variants", {}).items()]
    rows += [("replicate", result["replicate"]), ("vs floor", result["score_vs_floor"])]
    return [(row, values) for row, values in rows if values]


def format_table(rows, keys=None, rest="metrics.json"):
    """Text table: a line per (name, {key: value}), a column per key (default TABLE_KEYS) with the better direction.
    Columns beyond the terminal (120 characters without one) are left out; a last line says how many `rest` holds."""
    measured = {k for _, values in rows for k in values}
    keys = list(keys or (k for k in TABLE_KEYS if k in measured))
    width = shutil.get_terminal_size((120, 24)).columns
    names = ["", *(name for name, _ in rows)]
    start = max(map(len, names))
    lines = [name.ljust(start) for name in names]
    shown = []
    for k in keys:
        column = [k + KEYS[k].arrow] + [_number(values.get(k)) for _, values in rows]
        size = 1 + max(map(len, column))
        if shown and len(lines[0]) + size > width:
            break
        shown.append(k)
        lines = [line + cell.rjust(size) for line, cell in zip(lines, column)]
    more = len(measured.union(keys).difference(shown))
    if more:
        lines.append(f"{more} more metric{'s' if more > 1 else ''} in {rest}")
    return "\n".join(lines)


def cannot_tell(result, keys=None):
    """[note] below a table that names its metrics which hardly tell the replicate from the best floor, [] for none."""
    shares = [(result.get("can_tell", {}).get(k), k) for k in keys or TABLE_KEYS]
    few = ", ".join(f"{k} {100 * share:.0f}%" for share, k in shares if share is not None and share < TELLS)
    return [f"hardly tell the truth from a floor on these data: {few} (share of conditions in which the replicate "
            "beats the best floor)"] if few else []


def _number(value):
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


# -------------------------------------------------------------------------------- the report of a run

def evaluate_part(dataset, part, pred, seed, **options):
    """evaluate() of predicted cells {group: (n, E)} of the conditions of a part of a data set, "val" or "test", these
    also against the training perturbations."""
    columns = dataset.eval_genes
    train = dataset.populations("train", columns) if part == "test" else None
    return evaluate(pred, dataset.populations(part, columns), dataset.controls(part, columns),
                    [dataset.genes[i] for i in columns], train, seed=seed, **options)


def report(run, method, rows):
    """Score a run's predicted test conditions: writes metrics.json and genes.tsv, prints the table.

    rows {suffix: {group: (n, E)}}: the method's own prediction under '', and further rows of the table, which get no
    floors. run: with config, dataset, out, device, journal (seconds) and capped (values that were cut)."""
    config, tables = run.config, {}
    result = evaluate_part(run.dataset, "test", rows[""], config.seed, tables=tables)
    if run.capped:
        result["info"]["notes"].append(f"{run.capped:,} generated values were above the training maximum of their gene "
                                       "and were set to it")
    for name, cells in rows.items():
        if name:
            other = evaluate_part(run.dataset, "test", cells, config.seed, floors=False)
            result.setdefault("variants", {})[name] = {k: other[k] for k in ("aggregate", "n_valid", "per_condition")}
    _write_genes(run.out / "genes.tsv", tables)
    versions = {module.__name__: module.__version__ for module in (torch, np, scipy, h5py)}
    seconds, memory = round(run.journal.seconds(), 1), data.peak_memory(run.device)
    data.write_json(run.out / "metrics.json", {
        "method": method, "data": config.data, "split": config.split, "fold": config.fold, "seed": config.seed,
        "seconds": seconds, "peak_memory_mb": memory, "config": dataclasses.asdict(config),
        "versions": {"python": platform.python_version(), **versions}, **result})
    print(f"\n{result['info']['conditions']} test conditions, {result['info']['genes']:,} genes; trained and scored in "
          f"{data.clock(seconds)}, peak memory {memory or 0:,} MB; files in {run.out}\n")
    print(format_table(result_rows(result, method)))
    for note in [*cannot_tell(result), *result["info"]["notes"]]:
        print(f"note: {note}")


def _write_genes(path, tables):
    """genes.tsv: per condition and gene the means of real control, predicted and real cells (log1p CP10k), predicted
    and real log2 fold change, adjusted p-value of the real change (as in de_spearman); the smallest p first."""
    rows = []
    for condition, table in sorted(tables.items()):
        order = np.argsort(table["real_p_adjusted"], kind="stable")
        for gene, *numbers in zip(*(column[order].tolist() for column in table.values())):
            rows.append((condition, gene, *(f"{number:.6g}" for number in numbers)))
    data.write_table(path, ["condition", *table], rows)


def validation(run, step, pred):
    """Console line and log of three metrics of predicted cells {group: (n, E)} of the validation conditions: {key:
    value}, without floors."""
    result = evaluate_part(run.dataset, "val", pred, run.config.seed, keys=["l2", "pearson_delta", "e_distance"],
                           floors=False)
    scores = {k: v for k, v in result["aggregate"].items() if v is not None}
    run.say("validation  " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    run.journal.log(step, {"val": scores})
    return scores


class _Groups(data.Lazy):
    """{group: (cells, genes) CSR} of the perturbed cells of a file, cut out when asked for.
    controls: {covariate: CSR} of its control cells; totals {group, or covariate of controls: (cells,)}: how many counts
    each cell had, empty for a file of log-normalised values; notes: what was guessed, dropped or done to values."""

    def __init__(self, cells, columns=slice(None)):
        super().__init__({}, lambda group: cut(self.names[group]))   # the rows of each group
        self.cells, self.columns = cells, columns
        self.controls, self.totals = {}, {}
        data.lognormalise(cells)
        self.notes = [f"{cells.path}: {note}" for note in cells.notes]
        if cells.totals is not None:
            self.notes.append(f"{cells.path}: counts, normalised to log1p CP10k over its {len(cells.genes):,} genes, "
                              "which should be all that were measured")

        def cut(rows):
            return cells.X[rows][:, columns]

        for (condition, value), rows in cells.pairs.items():
            name = value if condition == "control" else data.group_name(condition, value)
            if condition == "control":
                self.controls[name] = cut(rows)
            else:
                self.names[name] = rows
            if cells.totals is not None:
                self.totals[name] = cells.totals[rows]


def _load(path, config, genes, **options):
    """Log-normalised cells of a real file over the genes of the prediction, as _Groups."""
    cells = data.read_cells(path, config, **options)
    columns = data.match_genes(cells.genes, genes)
    missing = [gene for gene, column in zip(genes, columns) if column < 0]
    if missing:
        raise data.DataError(f"{path}: lacks {len(missing)} of the {len(genes)} genes of the prediction "
                             f"({data.listed(missing)}); genes are matched by name: check --gene-key, or leave them "
                             "out")
    return _Groups(cells, columns)


def read_prediction(path, config):
    """Any tool's prediction file: gene names, and {group: (cells, G)} of its predicted cells, log1p CP10k.

    config: data.ReadConfig, whose columns are used as far as the file has them, else searched for. Counts are
    normalised; other values are taken as they are, even those that log1p CP10k does not have, which a note says."""
    config = dataclasses.replace(config, layer="", counts=False, lognorm=False)
    config = dataclasses.replace(config, **dict.fromkeys(data.missing_columns(path, config), ""))
    cells = data.read_cells(path, config, control_required=False, check=False)
    return list(cells.genes), _Groups(cells)


@dataclasses.dataclass
class ScoreConfig(data.ReadConfig):
    """The flags of metrics.py; --layer, --counts and --lognorm describe the real file and the reference."""
    reference: str = ""     # training cells, for the Systema reference and the floors
    keys: str = ""          # metrics to compute and print, comma-separated, 'all' or 'vcc'; '' for all but MMD ranks
    floors: bool = True     # floors and replicate, most of the time
    seed: int = 0           # of floors, replicate and bootstrap
    out: str = ""           # JSON file for every number


def _configs(config, paths):
    """How to read each file: by the flags that name columns, but for those columns that it lacks and another file has;
    they are searched for."""
    lacks = [data.missing_columns(path, config) for path in paths]
    nowhere = set.intersection(*lacks)
    return [dataclasses.replace(config, **dict.fromkeys(keys - nowhere, "")) for keys in lacks]


def _reference(config, genes, pred, real):
    """(training cells, mean of their perturbations' means), either may be None: --reference, or the real file's uns."""
    if config.reference:
        train = _load(config.reference, config, genes, control_required=False)
        train.names = {g: rows for g, rows in train.names.items() if g not in pred.names}
        if not train:
            raise data.DataError(f"{config.reference}: holds only predicted conditions; give the training cells")
        return train, None
    if "train_pert_mean" not in real.cells.uns:
        return None, None
    mean = np.ravel(real.cells.uns["train_pert_mean"])
    if len(mean) != len(real.cells.genes) or mean.dtype.kind not in "fiu" or not np.isfinite(mean).all():
        raise data.DataError(f"{real.cells.path}: uns['train_pert_mean'] must hold a number for each of the "
                             f"{len(real.cells.genes)} genes; mend it, or give --reference")
    return None, mean[real.columns]


def main(argv=None):
    """Score a prediction file: print the table, write --out; 'error: ...' and exit code 2 for unusable input."""
    parser = data.Parser(prog="metrics.py", description=__doc__)
    parser.add_argument("pred", help="predicted cells, counts or log1p CP10k; obs names the condition")
    parser.add_argument("real", help="real cells with their controls; counts are normalised over all genes of the file")
    parser.add_argument("--control", dest="control_label", default=argparse.SUPPRESS, help="short for --control-label")
    data.add_flags(parser, ScoreConfig)
    with data.clean_errors():
        args = parser.parse(argv)
        paths = args.pop("pred"), args.pop("real")
        config = ScoreConfig(**args)
        if config.out and Path(config.out).resolve() in [Path(p).resolve() for p in (*paths, config.reference) if p]:
            raise data.DataError(f"--out {config.out}: is an input and would be lost; choose another name")
        asked = [k.strip() for k in config.keys.split(",") if k.strip()]
        keys = {"all": list(KEYS), "vcc": list(VCC)}.get(config.keys, asked)
        of = _configs(config, [*paths, config.reference] if config.reference else paths)
        genes, pred = read_prediction(paths[0], of[0])
        real = _load(paths[1], of[1], genes)
        train, train_mean = _reference(of[-1], genes, pred, real)
        counts = pred.totals and real.totals
        result = evaluate(pred, real, real.controls, genes, train, keys, config.seed, config.floors,
                          train_mean=train_mean, totals=(pred.totals, real.totals) if counts else None)
        info = result["info"]
        info["notes"] = [*pred.notes, *real.notes, *info["notes"]]
        if keys == list(VCC) and not counts:
            info["notes"].append("pds_cosine_panel is the challenge's where both files hold counts; here it is of "
                                 "means of log1p CP10k")
        if len(real.cells.genes) > len(genes):
            info["notes"].append(f"{len(real.cells.genes) - len(genes):,} genes are not in the prediction, and ignored")
        if train is None:
            more = ", and no Systema reference" if train_mean is None else " and mean"
            info["notes"].append(f"without --reference there is no floor but control{more}")
        print(f"{info['conditions']} conditions, {info['genes']:,} genes; {info['cells_pred']:,} predicted and "
              f"{info['cells_real']:,} real cells")
        rest = config.out or "the file that --out FILE writes"
        print(format_table(result_rows(result, "prediction", intervals=True), keys, rest))
        for note in [*cannot_tell(result, keys), *info["notes"]]:
            print(f"note: {note}")
        if config.out:
            data.write_json(config.out, result)
            print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
