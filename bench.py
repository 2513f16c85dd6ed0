"""One table for all methods, the baselines that are hard to beat, and any other tool's predictions.

    python bench.py                                                        the demo: every method, two minutes each
    python bench.py --data norman.h5 --split additive --folds 0 1 2 3 --methods scdfm scdfm:no-mmd "scdfm --knn 10"
    python bench.py --data norman.h5 --split additive --methods none --pred GEARS=gears.h5ad CPA=cpa.h5ad
    python bench.py --data norman.h5 --split holdout --embedding scgpt.npz   linear and kernel on those gene vectors
    python bench.py --data sciplex.h5 --split transfer --covariates cell_type --keys rmse rmse_rank mmd mmd_rank
    python bench.py --stages                                               does a method underfit, or not transfer
    python bench.py --speed --preset paper --data norman.h5                ms per step, cells/s, memory, utilisation

Every method runs as a user runs it, python METHOD.py, in a process of its own, with the same data flags, split, fold
and seed; a second call runs only what is missing, and continues what was interrupted. Results are in the folder --out:
bench.json (every condition too), bench.md and the runs themselves. Values are mean and standard deviation over seeds
and folds; the best of a column is **so** and the second best *so*; rows that print the same value share the mark.
Ceilings (the replicate) and published rows do not compete.

Baselines are fitted to the mean effects of the training conditions and added to control cells. Cross-validation, with
five folds of training conditions of the tested kind (doubles for doubles), chooses their hyper-parameters.
  linear   bilinear in a gene embedding: PCA of the training means, or --embedding (Ahlmann-Eltze, Huber, Anders 2025)
  ridge    ridge regression on perturbation indicators, singles and combinations together
  kernel   weighted mean of the effects of the same perturbation in other covariates, or of perturbations of like genes
  pairs    effects of the singles, each times a factor learned from training doubles of similar singles (Norman et al.
           2019), tuned by leaving one double out; ridge where a single was not measured
Simulated data have two ceilings: fresh cells of the truth, and of an oracle that knows all but the interactions.
"""
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import timeit
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import data
import metrics
from data import DataError
from metrics import covariate, perturbations

HERE = Path(__file__).resolve().parent

# methods and their ablations, each the paper's own where it has one: name -> script and flags, {preset} being --preset
METHODS = {
    "scdfm": "scdfm.py",
    "scdfm:no-mmd": "scdfm.py --mmd-weight 0",                          # figure 5, these three
    "scdfm:no-mask": "scdfm.py --knn 0",
    "scdfm:plain-attention": "scdfm.py --no-differential",
    "primeflow": "primeflow.py",
    "primeflow:mlp": "primeflow.py --preset {preset}-mlp",              # tables 3 and 4
    "primeflow:pca": "primeflow.py --preset {preset}-pca",              # tables 5 and 6
    "primeflow:pca-ot": "primeflow.py --preset {preset}-pca-ot",        # table 7
    "scbig": "scbig.py",
    "scbig:kmeans": "scbig.py --clustering kmeans",                     # table 6b, "unbalanced"; 6a's is balanced
    "scbig:transformer": "scbig.py --encoder transformer",              # table 6a
    "scbig:no-correlation": "scbig.py --corr-weight 0",                 # table 6c, these two
    "scbig:no-pathways": "scbig.py --path-weight 0",
    "celltarnet": "celltarnet.py",                                      # its paper has no ablation: these are ours
    "celltarnet:no-contrast": "celltarnet.py --contrast-weight 0",
    "celltarnet:no-denoising": "celltarnet.py --denoise-weight 0",
    "celltarnet:no-prior": "celltarnet.py --prior none",
    "celltarnet:sparse": "celltarnet.py --prior sparse",
    "celltarnet:low-rank": "celltarnet.py --prior low-rank",
    # the demo preset with the paper's choices (each script's Deviations), and no row of another preset
    "scdfm:paper": "scdfm.py --no-effect-readout --no-precondition --zeros clamp",
    "primeflow:paper": "primeflow.py --velocity unet --coupling independent --sigma 0 --no-standardise "
                       "--no-effect-readout --no-control-profile --p-null 0.2 --zeros clamp",
    "scbig:paper": "scbig.py --no-effect-readout --no-residual --condition-dropout 0.9 --schedule constant --ema 0 "
                   "--path-iterations 100 --ode-steps 10 --zeros clamp",
    "celltarnet:paper": "celltarnet.py --no-effect-readout --calibration 0 --zeros clamp",
}
RESERVED = ("truth", "oracle, no interaction", "replicate", "can this metric tell")
DEMO = {"hvg": 1000, "train_on_val": False}     # of the preset demo, the same for all methods and the baselines

# what the papers print of their own methods, by name of the data and split, and the L2 of the paper's control and of
# CellFlow, where it has that row
_SCDFM = ("l2", "mse", "mae", "de_spearman", "pearson_delta", "pds", "pearson_delta_hat", "pearson_delta_hat_top20")
_SCBIG = ("pearson_delta", "pearson_delta_top20", "acc", "acc_top20", "de_spearman", "pds", "l2", "mse", "mae")
_TARNET = ("l2", "mse", "mae", "de_spearman", "pearson_delta", "pds", "pearson_delta_hat")
PUBLISHED = {
    ("norman", "additive"): [
        ("scDFM table 1", _SCDFM, (1.7043, .00315, .02155, .5705, .8853, .9737, .8468, .9260), 3.9937, 1.7064),
        ("scBIG table 1", _SCBIG, (.8496, .8230, .9197, .9906, .8593, .8548, 3.92, .0091, .0689), 9.25, 4.54)],
    ("norman", "holdout"): [
        ("scDFM table 2 single", _SCDFM, (1.6186, .0030, .0190, .6957, .7127, .8914, .6659, .8116), 2.6834, 1.6758),
        ("scDFM table 2 double", _SCDFM, (2.0309, .0047, .0235, .5676, .8357, .9189, .7769, .8688), 4.1882, 2.1042),
        ("scBIG table 2 single", _SCBIG, (.6507, .6537, .7876, .8548, .6333, .7467, 3.26, .0065, .0491), 4.33, 3.40),
        ("scBIG table 2 double", _SCBIG, (.8026, .8719, .8552, .9700, .8313, .7440, 3.68, .0083, .0554), 6.02, 4.12)],
    ("norman", "cv"): [
        ("CellTARNet table 1", _TARNET, (2.3581, .00526, .02765, .7089, .9103, .9066, .8356), 4.9272, 2.5052)],
    ("combosciplex", "combosciplex"): [
        ("scDFM table 3", _SCDFM[:6], (1.6567, .0028, .0220, .8289, .8933, .8776), 5.3716, None)],
}


@dataclass
class Config(data.DataConfig):
    """Flags of bench.py; the data flags are passed on to every method."""
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo
    split: str = "additive"         # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    folds: tuple[int, ...] = (0,)   # seeded splits to run
    n_folds: int = 10               # number of folds of --split cv
    seeds: tuple[int, ...] = (0,)   # seeds to run
    methods: tuple[str, ...] = ("all",)  # all, none, names of METHODS, paths of scripts, or 'NAME FLAGS' in quotes
    baselines: bool = True          # score linear, ridge, kernel and pairs
    embedding: str = ""             # gene vectors for linear and kernel: .npz (names, emb), .pt, .tsv or .csv
    pred: tuple[str, ...] = ()      # other tools' predictions NAME=FILE.h5ad, at most as many cells as of the methods
    eval_cells: int = 0             # cells per condition: as many as it really has, at most this; 0 is 1000, demo 100
    exact_cells: bool = False       # just that many cells of every condition, however few are real (PRiMeFlow's tables)
    train_on_val: bool = True       # validation conditions train too, as in the papers
    preset: str = ""                # of the methods: demo, paper; '' is demo for --data demo, else paper
    device: str = ""                # cpu, cuda, cuda:1; '' takes the GPU if there is one
    out: str = ""                   # folder; '' is runs/bench-DATA-SPLIT
    keys: tuple[str, ...] = ()      # metrics to print; default those of the papers' tables
    jobs: int = 0                   # runs at the same time; 0 is one per CPU core for demo-size models, else 1
    plot: bool = False              # figures as PNG files (needs matplotlib)
    stages: bool = False            # predict training conditions too, and say where each method's error enters
    speed: bool = False             # measure speed instead
    hvg: int = 5000                 # highly variable genes; the same for all methods


# -------------------------------------------------------------------------------- baselines

def indicators(groups, names):
    """(len(groups), len(names)): 1 where a group holds a perturbation."""
    return np.array([[name in perturbations(g) for name in names] for g in groups], dtype=float).reshape(-1, len(names))


def ridge(train, Y, test, lam):
    """Ridge on perturbation indicators: (n, G) effects -> (m, G). A perturbation never seen gets the mean of all."""
    names = sorted({p for g in train for p in perturbations(g)})
    X = indicators(train, names)
    B = np.linalg.solve(X.T @ X + lam * np.eye(len(names)), X.T @ Y)                 # (P, G)
    unknown = np.array([len(perturbations(g)) for g in test]) - indicators(test, names).sum(1)
    return indicators(test, names) @ B + unknown[:, None] * B.mean(0)


def singles_of(group, effects):
    """The two singles of a double, in its covariate, where both have an effect; else None."""
    names = [data.group_name(p, covariate(group)) for p in perturbations(group)]
    return names if len(names) == 2 and all(name in effects for name in names) else None


def pairs(train, Y, test, amp, a0, noise, lam):
    """Interactions of doubles, after Norman et al. 2019: (n, G) -> (m, G).

    The effect of (a, b) is (1 + f(a, b)) d_a + (1 + f(b, a)) d_b, d the effects of singles, f a Gaussian process over
    ordered pairs, K((a, b), (c, d)) = amp^2 C[a, c] C[b, d] + a0^2, C the cosine of d in 16 components; noise: sd of a
    gene's effect. A group that is no double of two measured singles is as ridge has it; all are where fewer than three
    such doubles train."""
    effect, out = dict(zip(train, Y)), ridge(train, Y, test, lam)
    known = [g for g in train if singles_of(g, effect)]
    asked = [i for i, g in enumerate(test) if singles_of(g, effect)]
    if len(known) < 3 or not asked:
        return out
    singles = [g for g in train if len(perturbations(g)) == 1]
    S = np.stack([effect[g] for g in singles])                                       # (P, G)
    gram = S @ S.T
    value, vector = np.linalg.eigh(gram)
    Z = vector[:, -16:] * np.sqrt(np.maximum(value[-16:], 0))
    Z /= np.linalg.norm(Z, axis=1, keepdims=True) + 1e-12
    C = Z @ Z.T

    def ordered(groups):                        # (2n, 2): (a, b), (b, a) of each double
        both = np.array([[singles.index(single) for single in singles_of(g, effect)] for g in groups])
        return np.stack([both, both[:, ::-1]], axis=1).reshape(-1, 2)

    def covariance(x, y):
        return amp ** 2 * C[np.ix_(x[:, 0], y[:, 0])] * C[np.ix_(x[:, 1], y[:, 1])] + a0 ** 2
    x, new = ordered(known), ordered([test[i] for i in asked])
    d = S[x[:, 0]]                                                                   # (2n, G)
    rest = np.stack([effect[g] for g in known]) - d[::2] - d[1::2]                   # (n, G)
    own = np.kron(np.eye(len(known)), np.ones((2, 2))) * gram[np.ix_(x[:, 0], x[:, 0])] / noise ** 2
    right = (d * rest.repeat(2, axis=0)).sum(1) / noise ** 2
    f = covariance(new, x) @ np.linalg.solve(np.eye(len(x)) + own @ covariance(x, x), right)
    d = (1 + f[:, None]) * S[new[:, 0]]
    out[asked] = d[::2] + d[1::2]
    return out


def embed(groups, vectors, width):
    """(len(groups), width): sum of the vectors of a group's perturbations (of 'DRUG' for 'DRUG:dose'), and whether each
    of them has one (len(groups),)."""
    found = [[vectors.get(p, vectors.get(data.split_dose(p)[0])) for p in perturbations(g)] for g in groups]
    sums = [sum((v for v in of if v is not None), np.zeros(width)) for of in found]
    return np.array(sums).reshape(-1, width), np.array([all(v is not None for v in of) for of in found])


def gene_vectors(Y, control, genes, embedding, k):
    """Gene embedding G (genes, width), standardised columns: PCA of the training means (k components) or the given one,
    and {name: vector}. A gene that the file lacks has a zero row."""
    if embedding is None:
        means = (control + Y).T                                                      # (G, n)
        U, S, _ = np.linalg.svd(means - means.mean(0), full_matrices=False)
        G = U[:, :k] * S[:k]
        vectors = dict(zip(genes, G / (G.std(0) + 1e-12)))
    else:
        E = np.stack(list(embedding.values()))
        vectors = {name: (e - E.mean(0)) / (E.std(0) + 1e-12) for name, e in embedding.items()}
    width = len(next(iter(vectors.values())))
    return np.stack([vectors.get(g, np.zeros(width)) for g in genes]), vectors


def linear(train, Y, test, lam, k, control, genes, embedding=None):
    """Bilinear ridge of Ahlmann-Eltze et al.: effect = b + G W p, p the (summed) embedding of the perturbed genes.

    b is one vector per perturbation, so that a double has twice the mean effect of a single. (n, G) -> (m, G)."""
    G, vectors = gene_vectors(Y, control, genes, embedding, k)
    count = np.array([len(perturbations(g)) for g in train], dtype=float)
    b = count @ Y / (count @ count)                                                  # (G,)
    P, _ = embed(train, vectors, G.shape[1])
    centre = count @ P / (count @ count)
    P, eye = P - count[:, None] * centre, np.eye(G.shape[1])
    left = np.linalg.solve(G.T @ G + lam * eye, G.T @ (Y - count[:, None] * b).T)    # (k, n)
    W = np.linalg.solve(P.T @ P + lam * eye, P.T @ left.T).T                         # (k, k)
    count = np.array([len(perturbations(g)) for g in test], dtype=float)
    P = embed(test, vectors, G.shape[1])[0] - count[:, None] * centre
    return count[:, None] * b + P @ W.T @ G.T


def kernel(train, Y, test, k, control, genes, controls, embedding=None):
    """Mean of related training effects, weighted by exp(-4 (d / median d)^2): (n, G) -> (m, G).

    A perturbation that trained in other covariates is related to its own groups there, d being the distance of the
    control means (controls: {covariate: (G,)}). An unseen one is related to the groups of its covariate (to all, where
    there are none), d being the distance of the embeddings. A row is zero where one of its genes has no embedding."""
    G, vectors = gene_vectors(Y, control, genes, embedding, k)
    points, known = embed(train, vectors, G.shape[1])
    effects = np.zeros((len(test), Y.shape[1]))
    for effect, group, point, embedded in zip(effects, test, *embed(test, vectors, G.shape[1])):
        related = [i for i, g in enumerate(train) if perturbations(g) == perturbations(group)]
        if related:
            there = np.stack([controls[covariate(train[i])] for i in related])
            d = np.linalg.norm(there - controls[covariate(group)], axis=1)
        elif embedded and known.any():
            everywhere = np.flatnonzero(known)
            related = [i for i in everywhere if covariate(train[i]) == covariate(group)] or everywhere
            d = np.linalg.norm(points[related] - point, axis=1)
        else:
            continue
        weight = np.exp(-4 * (d / max(np.median(d), 1e-12)) ** 2)
        effect += weight @ Y[related] / weight.sum()
    return effects


GRIDS = {
    "linear": (linear, [dict(lam=lam, k=k) for k in (2, 5, 10, 20, 50) for lam in (1e-3, 0.1, 1.0, 10.0, 100.0)]),
    "ridge": (ridge, [dict(lam=lam) for lam in (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)]),
    "kernel": (kernel, [dict(k=k) for k in (2, 5, 10, 20, 50)]),
    "pairs": (pairs, [dict(amp=a, a0=b, noise=c) for a in (0.5, 1.0, 2.0) for b in (0.1, 0.3) for c in (0.1, 0.2)]),
}


def tune(function, grid, train, Y, test, n_folds=5):
    """The options of a grid with the least squared error in cross-validation over the training groups with as many
    perturbations as the test groups have (over all when there are fewer than five of them)."""
    if len(train) == 1:
        return grid[0]
    orders = {len(perturbations(g)) for g in test}
    like = [i for i, g in enumerate(train) if len(perturbations(g)) in orders]
    like = np.random.default_rng(0).permutation(like if len(like) >= 5 else len(train))
    errors = np.zeros(len(grid))
    for held in np.array_split(like, min(n_folds, len(like))):
        rest = np.setdiff1d(np.arange(len(train)), held)
        for i, options in enumerate(grid):
            y = function([train[j] for j in rest], Y[rest], [train[j] for j in held], **options)
            errors[i] += np.square(y - Y[held]).sum()
    return grid[int(np.argmin(errors))]


def fit_baseline(name, dataset, embedding=None):
    """Effects that one baseline predicts for the test groups on the evaluation genes (m, E); None for a kernel that is
    related to nothing for one of the groups, and for pairs where no group is a double of two trained singles."""
    function, grid = GRIDS[name]
    train, Y, control = data.training_effects(dataset)
    test = dataset.part("test")
    given = {}
    if name in ("linear", "kernel"):
        given = {"control": control, "genes": list(dataset.genes), "embedding": embedding}
        if embedding is not None:               # its width is given
            grid = [options for options in grid if options["k"] == grid[0]["k"]]
    if name == "kernel":
        rows = dataset.control_rows["train"]
        given["controls"] = {v: data.gene_moments(dataset.X, r)[0] / len(r) for v, r in rows.items()}
    if name == "pairs":
        if not any(singles_of(g, train) for g in test):
            return None
        given["lam"] = tune(ridge, GRIDS["ridge"][1], train, Y, test)["lam"]
    folds = len(train) if name == "pairs" else 5
    options = tune(function, [options | given for options in grid], train, Y, test, folds)
    effects = function(train, Y, test, **options)
    if name == "kernel" and not effects.any(axis=1).all():
        return None
    return effects[:, dataset.eval_genes].astype(np.float32)


def baseline_populations(name, dataset, effects, sizes, seed):
    """{group: (n, E)} cells of one baseline for the test groups {group: n}: their controls plus the effect."""
    controls = dataset.controls("test", dataset.eval_genes)
    return {group: data.pick_rows(controls[covariate(group)], n, data.seed_of(name, group, seed)) + effect
            for (group, n), effect in zip(sizes.items(), effects)}


# -------------------------------------------------------------------------------- runs

class Job(typing.NamedTuple):
    """One run of one method."""
    name: str
    fold: int
    seed: int
    folder: Path
    command: tuple

    def __str__(self):
        return f"{self.name} fold {self.fold} seed {self.seed}"


def asked_methods(config):
    """{what --methods calls a method: (its script, its flags)}"""
    texts = [name for name in METHODS if ":" not in name] if "all" in config.methods else []
    texts += [text for text in config.methods if text not in ("all", "none")]
    out = {}
    for text in texts:
        name, *flags = shlex.split(text) or [""]
        script = Path(name).resolve()
        if name.endswith(":paper") and config.preset != "demo":
            raise DataError(f"--methods {text}: is of --preset demo; with --preset {config.preset} the method itself "
                            "has the paper's choices")
        if name in METHODS:
            file, *own = shlex.split(METHODS[name].format(preset=config.preset))
            script = HERE / file
            flags = own + flags
        elif not name.endswith(".py") or not script.is_file():
            raise DataError(f"--methods {text}: no method and no script; choose all, none, the path of a script or "
                            f"{', '.join(METHODS)}")
        out[text] = script, flags
    return out


def common_flags(config):
    """The flags that every method gets: all that it shares with bench, whatever its own default is."""
    flags = ["--folds", str(config.n_folds)]
    for f in fields(data.RunConfig):
        if f.name in ("folds", "out") or not hasattr(config, f.name):
            continue                            # those of bench mean something else
        value, flag = getattr(config, f.name), f.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def jobs(config, out):
    """Every run that the flags ask for."""
    result = []
    common = common_flags(config)
    for text, (script, flags) in asked_methods(config).items():
        # a folder belongs to exactly these flags: other flags never meet its results
        tag = hashlib.sha256(shlex.join([text, *common, *flags]).encode()).hexdigest()[:8]
        name = text.split()[0].replace(":", "-")
        for fold in config.folds:
            for seed in config.seeds:
                folder = out / f"{Path(name).stem}-f{fold}-s{seed}-{tag}"
                where = ["--fold", str(fold), "--seed", str(seed)]
                result.append(Job(text, fold, seed, folder, (str(script), *common, *where, *flags)))
    return result


def child(*command, **env):
    """Run python with these arguments: (seconds, what it printed). Where it fails a DataError with its last line."""
    start = time.perf_counter()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))} | env
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        raise DataError(last.removeprefix("error: "))
    return time.perf_counter() - start, done.stdout


def run_jobs(todo, n_parallel):
    """Start or go on with runs. Returns {job: its error} of those that failed."""
    failed, done = {}, []
    share = str(max(1, (os.cpu_count() or 1) // n_parallel))
    threads = {"OMP_NUM_THREADS": share} if n_parallel > 1 else {}     # other threads give other last digits

    def run(job):
        begun = (job.folder / "ckpt.pt").exists()
        print(f"{'resuming' if begun else 'running'} {job}", flush=True)
        try:
            flags = [job.command[0], "--resume"] if begun else job.command
            how = f"done in {data.clock(child(*flags, '--out', job.folder, **threads)[0])}"
        except DataError as error:
            failed[job], how = error, "FAILED"
        done.append(job)
        print(f"[{len(done)}/{len(todo)}] {job}: {how}", flush=True)

    with ThreadPoolExecutor(n_parallel) as pool:
        try:
            list(pool.map(run, todo))
        except KeyboardInterrupt:               # the methods got the Ctrl-C too, save, and end: the pool waits for them
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def read_cells(file, dataset):
    """Gene names and {group: (n, E) CSR} that a method has written."""
    return metrics.read_prediction(file, data.DataConfig(covariates=dataset.config.covariates))


# -------------------------------------------------------------------------------- scores

def read_pred(text, dataset, config):
    """Name and {group: (n, E)} of one --pred NAME=FILE: the test conditions and the evaluation genes, by name. Prints
    what was guessed."""
    name, file = text.split("=", 1)
    genes, cells = metrics.read_prediction(file, config)
    for note in cells.notes:
        print(f"note: {note}")
    names = [dataset.genes[i] for i in dataset.eval_genes]
    columns = data.match_genes(genes, names)
    missing = [gene for gene, column in zip(names, columns) if column < 0]
    absent = [group for group in dataset.part("test") if group not in cells]
    for what, lacking in (("evaluation genes", missing), ("test conditions", absent)):
        if lacking:
            raise DataError(f"--pred {text}: lacks {len(lacking)} of the {what} ({data.listed(lacking)}); predict all, "
                            "or score the file alone with metrics.py")
    return name, {group: cells[group][:, columns] for group in dataset.part("test")}


def ceilings(dataset, sizes, seed):
    """{row name: {group: (n, E) fresh cells}} of simulated data, {} of others: of the truth, and of an oracle that
    knows every single effect and takes the interaction of two for that of any two."""
    uns, of = dataset.source.uns, dataset.config.covariates
    if not {"simulator", "seed", "truth_means", "truth_conditions"} <= set(uns) or of not in ("", "cell_type"):
        return {}
    kind = {v: int(v.removeprefix("type") or 1) - 1 for v in dataset.covariate}      # of cells
    screen = data.Screen(uns["truth_means"].shape[1], max(kind.values()) + 1, int(uns["seed"]))
    if screen.conditions != list(uns["truth_conditions"]):      # it has cell types, which were not asked for
        return {}
    columns = [screen.names.index(dataset.genes[i]) for i in dataset.eval_genes]
    out = {"truth": {}, "oracle, no interaction": {}}
    for group, n in sizes.items():
        rng, condition = np.random.default_rng(data.seed_of("truth", group, seed)), data.split_group(group)[0]
        shifts = screen.shifts[screen.conditions.index(condition)][None].repeat(n, axis=0)
        for name in out:
            if name != "truth" and "+" in condition:
                shifts = screen.any_double(condition, n, rng)
            cells = screen.cells(shifts, np.full(n, kind[covariate(group)]), rng)
            out[name][group] = cells[:, columns].astype(np.float32)
    return out


def score_fold(config, fold):
    """Floors, replicate, baselines, ceilings and other tools' predictions of one fold, for every seed: the dataset and
    [(row name, kind, result of metrics.evaluate)]."""
    dataset = data.load(data.path_of(config), config, config.split, fold, config.n_folds, "cpu", config.train_on_val)
    embedding = None
    if config.embedding:
        drugs = {data.split_dose(p)[0] for p in dataset.perturbations}
        names = sorted({*dataset.genes, *dataset.perturbations, *drugs})
        vectors, known = data.aligned_vectors(config.embedding, names)
        data.coverage(print, config.embedding, known, "genes")
        embedding = {names[i]: vectors[i].double().numpy() for i in known.nonzero()[:, 0]}
    others = dict(read_pred(text, dataset, config) for text in config.pred)
    fitted = {name: fit_baseline(name, dataset, embedding) for name in GRIDS} if config.baselines else {}
    keys = [k for k in metrics.KEYS if k not in metrics.MMD_RANKS] + list(config.keys)
    sizes, runs = dataset.sizes("test", config.eval_cells, config.exact_cells), []
    for seed in config.seeds:
        score = functools.partial(metrics.evaluate_part, dataset, "test", seed=seed, keys=keys)
        real = {g: data.pick_rows(dataset.cells(g, dataset.eval_genes), n, seed) for g, n in sizes.items()}
        first = score(real)                                         # only floors and replicate of it are wanted
        each = first["floors_per_condition"]
        runs += [(name, "floor", {"aggregate": floor, "per_condition": each[name]})
                 for name, floor in first["floors"].items() if floor]
        for name, effects in fitted.items():
            if effects is not None:
                cells = baseline_populations(name, dataset, effects, sizes, seed)
                runs.append((name, "baseline", score(cells, floors=False)))
        for name, of in others.items():
            cells = {}
            for group, n in sizes.items():                          # distances depend on the number of cells
                rows = np.arange(of[group].shape[0])
                cells[group] = of[group][data.pick_rows(rows, min(n, len(rows)), data.seed_of(name, group, seed))]
            runs.append((name, "prediction", score(cells, floors=False)))
            for note in runs[-1][2]["info"]["notes"]:
                print(f"note: {name}: {note}")
        for name, cells in ceilings(dataset, sizes, seed).items():
            runs.append((name, "ceiling", score(cells, floors=False)))
        again = {"aggregate": first["replicate"], "per_condition": first["replicate_per_condition"]}
        runs.append(("replicate", "ceiling", again))
        runs.append(("can this metric tell", "share", {"aggregate": first["can_tell"], "per_condition": {}}))
    return dataset, runs


def score_run(job, dataset, config):
    """[(row name, kind, result)] of a finished run: its own scores and its variants', and what --keys asks besides.
    DataError where it had another split or other genes than the others."""
    result = json.loads((job.folder / "metrics.json").read_text())
    split = json.loads((job.folder / "split.json").read_text())
    genes, cells = read_cells(job.folder / "pred.h5ad", dataset)
    if split != dataset.split or genes != [dataset.genes[i] for i in dataset.eval_genes]:
        raise DataError(f"{job.folder}: has another split, or other genes, than the data give now; the file has "
                        "changed. Remove the folder, or choose another --out")
    missing = [k for k in config.keys if k not in result["aggregate"]]
    if missing:
        keys = [*result["aggregate"], *missing]
        result |= metrics.evaluate_part(dataset, "test", cells, job.seed, keys=keys, floors=False)
    of = {"": result} | result.get("variants", {})
    return [(job.name + suffix, "method", scores) for suffix, scores in of.items()]


def published_rows(config):
    """Rows of the papers that used data and split of this name: the method that the table is of, and CellFlow."""
    rows = {}
    for table, keys, values, control, cellflow in PUBLISHED.get((Path(config.data).stem.lower(),
                                                                 Path(config.split).stem), ()):
        for name, mean in ((table.split()[0], dict(zip(keys, values))), ("CellFlow", {"l2": cellflow})):
            if mean["l2"]:
                mean["l2/control"] = mean["l2"] / control
                rows[f"{name}, {table}"] = {"kind": "published", "mean": mean, "sd": {}, "per_condition": {}}
    return rows


# -------------------------------------------------------------------------------- rows

def collect(runs):
    """[(name, kind, result)] -> {name: {kind, runs, mean, sd, per_condition, ...}}, over seeds and folds.

    A condition counts in per_condition where every run defines it: a mean over fewer seeds would be another thing."""
    def mean(values):
        return float(np.mean(values)) if values and None not in values else None
    rows = {}
    order = ("floor", "baseline", "prediction", "method", "ceiling", "share")
    for name, kind, result in sorted(runs, key=lambda run: order.index(run[1])):
        rows.setdefault(name, {"kind": kind, "runs": []})["runs"].append(result)
    for row in rows.values():
        several, row["runs"] = row["runs"], len(row["runs"])
        keys = dict.fromkeys(k for r in several for k in r["aggregate"])
        row["values"] = {k: [r["aggregate"][k] for r in several if r["aggregate"].get(k) is not None] for k in keys}
        row["mean"] = {k: mean(values) for k, values in row["values"].items()}
        row["sd"] = {k: float(np.std(values, ddof=1)) for k, values in row["values"].items() if len(values) > 1}
        row["per_condition"] = {}
        for group in dict.fromkeys(g for r in several for g in r["per_condition"]):
            of = [r["per_condition"][group] for r in several if group in r["per_condition"]]
            row["per_condition"][group] = {k: mean([scores.get(k) for scores in of]) for k in of[0]}
        for k in ("seconds", "peak_memory_mb"):
            row[k] = mean([r.get(k) for r in several])
    return rows


def arrow(key):
    """Of a metric, or of its ratio to the control's."""
    return metrics.KEYS[key.partition("/")[0]].arrow


def competing(rows, key):
    """{row name: value} of a column, smaller being better, without ceilings and published rows."""
    sign = -1 if arrow(key) == "↑" else 1
    return {name: sign * row["mean"][key] for name, row in rows.items()
            if row["mean"].get(key) is not None and row["kind"] in ("floor", "baseline", "prediction", "method")}


def marks(rows, key):
    """{row name: 0 for the best of a column, 1 for the second best}; rows that print the same value share a mark."""
    printed = {name: float(number(value)) for name, value in competing(rows, key).items()}
    order = sorted(set(printed.values()))[:2]
    return {name: order.index(value) for name, value in printed.items() if value in order}


def verdicts(rows, keys):
    """One line per method and prediction: in how many metrics it is better than every floor and baseline, and where it
    loses to what has learned nothing."""
    lines = []
    for name in [n for n, row in rows.items() if row["kind"] in ("method", "prediction")]:
        won, lost = [], []
        for key in keys:
            values = competing(rows, key)
            simple = {n: v for n, v in values.items() if rows[n]["kind"] in ("floor", "baseline")}
            if name in values and simple:
                won.append(values[name] < min(simple.values()))
                if any(simple.get(floor, math.inf) < values[name] for floor in ("control", "mean", "mean_cells")):
                    lost.append(key)
        line = f"{name}: better than every floor and baseline in {sum(won)} of {len(won)} metrics"
        lines.append(line + (f"; LOSES to control or mean in {', '.join(lost)}" if lost else ""))
    return lines


# -------------------------------------------------------------------------------- tables

def number(value, sd=None):
    """'0.123', '0.123 ± 0.004'; a standard deviation of zero (a constant) is left out."""
    if value is None or not math.isfinite(value):
        return "-"
    digits = 4 if abs(value) < 0.1 else 3
    return f"{value:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd else "")


def table(rows, keys):
    """Lines of cells of text, titles first: mean ± sd of every metric, the best **so**, the second best *so*; then the
    seconds of a run (training and scoring) and its peak memory."""
    style = ("**{}**", "*{}*", "{}")
    place = {k: marks(rows, k) for k in keys}
    lines = [["", *(k + arrow(k) for k in keys), "seconds", "peak MB"]]
    for name, row in rows.items():
        line = [name]
        for k in keys:
            line.append(style[place[k].get(name, 2)].format(number(row["mean"].get(k), row["sd"].get(k))))
        for value in (row.get("seconds"), row.get("peak_memory_mb")):
            line.append("-" if value is None else f"{value:,.0f}")
        lines.append(line)
    return lines


def render(lines, width=math.inf):
    """Lines of cells as a markdown table that can be read as it stands: as many columns as fit."""
    out = ["|"] * (len(lines) + 1)
    for i, title in enumerate(lines[0]):
        size = max(len(line[i]) for line in lines)
        if i and len(out[0]) + size + 3 > width:
            out.append(f"{len(lines[0]) - i} more columns in bench.md: {', '.join(lines[0][i:])}")
            break
        column = [line[i].rjust(size) if i else line[i].ljust(size) for line in lines]
        column.insert(1, "-" * (size - 1) + ":" if i else "-" * size)
        out = [f"{line} {text} |" for line, text in zip(out, column)]
    return "\n".join(out)


# -------------------------------------------------------------------------------- bench

def bench(config):
    """Run what is missing, score everything, print and write the table. Returns the exit code."""
    out = Path(config.out or f"runs/bench-{Path(config.data).stem}-{Path(config.split).stem.replace(':', '_')}")
    planned = jobs(config, out)
    folds = {fold: score_fold(config, fold) for fold in config.folds}     # cheap, and finds bad input first
    first = folds[config.folds[0]][0]
    todo = [job for job in planned if not (job.folder / "metrics.json").exists()]     # which a run writes last
    if planned:
        print(f"{out} holds {len(planned) - len(todo)} of {len(planned)} runs", flush=True)
    failed = run_jobs(todo, config.jobs)
    good = [job for job in planned if job not in failed]
    runs = [run for _, several in folds.values() for run in several]
    for job in good:
        runs += score_run(job, folds[job.fold][0], config)
    rows = collect(runs)
    every = max(len(row["per_condition"]) for row in rows.values())
    asked = list(metrics.FLOORS) + list(GRIDS) * config.baselines
    partial = [name for name in asked if name not in rows or len(rows[name]["per_condition"]) < every]
    rows = {name: row for name, row in rows.items() if name not in partial}
    control = rows["control"]["mean"]["l2"]
    for row in rows.values():
        l2 = row["mean"].get("l2")
        row["mean"]["l2/control"] = None if l2 is None or row["kind"] == "share" else l2 / control
    rows |= published_rows(config)
    keys = list(config.keys or metrics.TABLE_KEYS)
    notes = [*verdicts(rows, keys), "can this metric tell: in this share of the test conditions the replicate, a draw "
             "of the truth, beats the best floor; where it is near a half, the metric says nothing on these data"]
    if any(row["kind"] == "published" for row in rows.values()):
        notes.append("published rows are of other genes and cells, where control itself has another l2: of them and "
                     "ours only l2/control compares")
    if partial:
        notes.append(f"left out, since not defined for all test conditions: {', '.join(partial)}")
    below = "\n".join(f"- {line}" for line in notes)
    if "l2" in keys:
        keys.insert(keys.index("l2") + 1, "l2/control")
    title = (f"{Path(config.data).name}, split {config.split}, folds {list(config.folds)}, seeds {list(config.seeds)}: "
             f"{len(first.part('train'))} training and {len(first.part('test'))} test conditions, "
             f"{len(first.eval_genes):,} genes, {'just' if config.exact_cells else 'at most'} {config.eval_cells} "
             "cells per condition")
    first_runs = [job for job in good if (job.fold, job.seed) == (config.folds[0], config.seeds[0])]
    data.write_json(out / "bench.json", {
        "data": config.data, "split": config.split, "folds": config.folds, "seeds": config.seeds,
        "eval_cells": config.eval_cells, "torch": torch.__version__, "rows": rows})
    text = [f"# {title}", render(table(rows, keys)), below]
    if config.stages:
        text.append(render(stages(config, first_runs, first, rows)))
    with data.atomic(out / "bench.md") as temporary:
        temporary.write_text("\n\n".join(text) + "\n")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    print("\n" + "\n\n".join([title, render(table(rows, keys), width), below, *text[3:]]))
    for job, error in failed.items():
        print(f"FAILED: {job}: {error}", file=sys.stderr)
    if config.plot:
        plot(config, out, rows, first_runs, first)
    print(f"files in {out}")
    return 1 if failed else 0


# -------------------------------------------------------------------------------- stages

FIT = 1.5       # an error of up to so many times the noise is taken for noise


def stages(config, runs, dataset, rows):
    """Where the error of each run enters, as lines of a table: l2 of five training conditions, of singles of the tested
    doubles where there are such, beside the sampling noise (one half of their real cells against the other, as many
    cells), l2 of the test beside the replicate."""
    doubles = [singles_of(g, dataset.part("train")) for g in dataset.part("test")]
    singles = {single for both in doubles if both for single in both}
    groups = sorted(dataset.part("train"), key=lambda g: (g not in singles, -len(dataset.rows[g])))[:5]
    n = min(config.eval_cells, len(dataset.rows[groups[-1]]) // 2)
    real = {g: data.pick_rows(dataset.cells(g, dataset.eval_genes), 2 * n, data.seed_of("stages", g)) for g in groups}
    noise = np.mean([metrics.l2(real[g][:n].mean(0), real[g][n:].mean(0)) for g in groups])
    replicate = rows["replicate"]["mean"]["l2"]
    lines = [["l2", "training", "noise", "test", "replicate", "where the error enters"]]
    for job in runs:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "pred.h5ad")
            child(job.command[0], "--ckpt", job.folder / "ckpt.pt", "--device", config.device, "--predict", *groups,
                  "--cells", n, "--out", file)
            _, cells = read_cells(file, dataset)
            training = np.mean([metrics.l2(cells[g].toarray().mean(0), real[g][:n].mean(0)) for g in groups])
        test = rows[job.name]["mean"]["l2"]
        where = "within the noise"
        if training > FIT * noise:
            where = "underfits"
        elif test > FIT * replicate:
            where = "interaction not predicted" if all(doubles) else "does not transfer"
        lines.append([job.name, number(training), number(noise), number(test), number(replicate), where])
    return lines


# -------------------------------------------------------------------------------- figures

COLORS = {"scdfm": "#0072B2", "primeflow": "#E69F00", "scbig": "#009E73", "celltarnet": "#CC79A7"}   # Okabe and Ito's
KINDS = {"floor": "#BBBBBB", "baseline": "#56B4E9", "prediction": "#D55E00", "method": "#F0E442", "ceiling": "#666666"}


def row_colors(rows):
    """{row name: colour}: of its method ('scdfm' of 'scdfm:no-mmd' and of 'scdfm --knn 10'), else of its kind."""
    method = {name: re.split(r"[:\s]", name)[0] for name in rows}
    return {name: COLORS.get(method[name], KINDS.get(row["kind"], "black")) for name, row in rows.items()}


def plot(config, out, rows, runs, dataset):
    """errors.png, methods.png, genes.png and pca.png in the folder; the last two from the first seed and fold."""
    try:
        import matplotlib
    except ImportError:
        return print("--plot: matplotlib is not installed; the tables are written, the figures are not")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "figure.constrained_layout.use": True})
    genes, control = dataset.eval_genes, rows["control"]["per_condition"]
    condition = max(dataset.part("test"), key=lambda g: control[g]["l2"])
    cells = {"control": dataset.controls("test", genes)[covariate(condition)], "real": dataset.cells(condition, genes)}
    for text in config.pred:
        name, pred = read_pred(text, dataset, config)
        cells[name] = pred[condition].toarray()
    for job in runs:
        cells[job.name] = read_cells(job.folder / "pred.h5ad", dataset)[1][condition].toarray()
    rows, cells = ({textwrap.fill(name, 32): of[name] for name in of} for of in (rows, cells))
    colors = row_colors(rows) | {"real": "black"}
    figures = {"errors": plot_errors(plt, rows, colors), "methods": plot_methods(plt, rows, colors),
               "genes": plot_genes(plt, condition, cells, colors, [dataset.genes[i] for i in genes]),
               "pca": plot_pca(plt, condition, cells, colors)}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png")


def plot_errors(plt, rows, colors):
    """Error of each test condition, a line per row, the replicate's too (scDFM figure 3)."""
    shown = [name for name, row in rows.items() if row["per_condition"]]
    errors = [[v["l2"] for v in rows[name]["per_condition"].values() if v.get("l2") is not None] for name in shown]
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.3 * len(shown)))
    axis.boxplot(errors, orientation="horizontal", tick_labels=shown, showfliers=False, widths=0.7,
                 medianprops={"color": "black"})
    for i, (name, values) in enumerate(zip(shown, errors)):
        axis.plot(values, [i + 1] * len(values), "o", color=colors[name], markersize=3.5)
    for kind, color in KINDS.items():
        if kind in [rows[name]["kind"] for name in shown if colors[name] == color]:
            axis.plot([], [], "o", color=color, label=kind)
    axis.plot([], [], "-", color="black", label="box: quartiles, line: median")
    axis.invert_yaxis()
    axis.set(xlabel="L2 error of the mean profile (log1p CP10k)", xlim=(0, None),
             title="Error of each test condition, a point each")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def plot_methods(plt, rows, colors):
    """The rows as bars, full where they are better than every floor, whose best is a line; a dot per run (scDFM figure
    5). What is missing has no bar."""
    shown = {name: row for name, row in rows.items() if row["kind"] not in ("published", "share")}
    figure, axes = plt.subplots(1, 4, figsize=(11, 1.2 + 0.3 * len(shown)), sharey=True)
    for axis, k in zip(axes, ("l2", "pearson_delta", "pds", "e_distance")):
        values = competing(rows, k)
        best = min((name for name in values if rows[name]["kind"] == "floor"), key=values.get, default="control")
        for name, row in shown.items():
            mean = math.nan if row["mean"].get(k) is None else row["mean"][k]
            full = row["kind"] == "ceiling" or values.get(name, math.inf) < values.get(best, math.inf)
            axis.barh(name, mean, color=colors[name], height=0.6, alpha=1.0 if full else 0.3)
            runs = row["values"].get(k, [])
            axis.plot(runs, [name] * len(runs), ".", color="black", markersize=3)
        if best in values:
            axis.axvline(rows[best]["mean"][k], color="#888888", lw=1)
        axis.set_title(f"{k} {metrics.KEYS[k].arrow}")
    axes[0].invert_yaxis()
    figure.suptitle("full colour: better than every floor (the line is the best of them); dots: runs")
    return figure


def plot_genes(plt, condition, cells, colors, names):
    """The genes that change most in one condition: mean and sd of real and of predicted cells (scDFM figure 7)."""
    top = np.argsort(-np.abs(cells["real"].mean(0) - cells["control"].mean(0)))[:12]
    x = np.arange(len(top))
    pred = [name for name in cells if name not in ("control", "real")] or ["real"]
    figure, axes = plt.subplots(len(pred), 1, figsize=(8, 1.4 + 0.7 * len(pred)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], pred):
        for shift, of, color in ((-0.12, "real", "#888888"), (0.12, name, colors[name])):
            of = cells[of][:, top]
            axis.errorbar(x + shift, of.mean(0), of.std(0), fmt="o", color=color, markersize=4)
        axis.plot(x, cells["control"][:, top].mean(0), "_", color="black", markersize=14)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    axis.set_xticks(x, [names[i] for i in top], rotation=60, ha="right", rotation_mode="anchor")
    figure.suptitle(f"{condition}, the test condition of largest change, and its 12 genes of largest change\n"
                    "mean and sd (log1p CP10k); colour: predicted, grey: real, dash: mean of control cells")
    return figure


def plot_pca(plt, condition, cells, colors):
    """Real and generated cells in the principal components of the real ones (PRiMeFlow figure 1)."""
    basis = metrics.fit_pca(lambda: (cells["control"], cells["real"]), 2)
    points = {name: (x - basis.mean) @ basis.loadings for name, x in cells.items()}
    control = points.pop("control")
    figure, axes = plt.subplots(1, len(points), figsize=(2.5 * len(points), 3), squeeze=False, sharex=True, sharey=True)
    for axis, (name, point) in zip(axes[0], points.items()):
        axis.plot(control[:, 0], control[:, 1], "o", markersize=2.5, alpha=0.6, color="#BBBBBB")
        axis.plot(point[:, 0], point[:, 1], "o", markersize=2.5, alpha=0.6, color=colors[name])
        axis.set_title(name)
    figure.suptitle(f"{condition}, the test condition of largest change, in two principal components; grey: control")
    return figure


# -------------------------------------------------------------------------------- speed

class Flops(TorchDispatchMode):
    """Counts the FLOPs of what runs within it, as torch's FlopCounterMode, which fails where a module gets a view of a
    weight without gradients (celltarnet), and leaves out the attention of CPUs."""
    formulas = flop_counter.flop_registry | {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop}
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation.overloadpacket in self.formulas:
            self.count += self.formulas[operation.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product: what the device can do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=6)        # item() waits for the device
    return 2 * n ** 3 / min(seconds)


def measure(script, seconds, *flags):
    """In a process of its own: train a script as its main() does, generate cells of one test condition for about these
    seconds, train again for one and for two steps that are not compiled, and print what was found as one JSON object.
    An earlier stage of training takes three steps; what compiles is not timed."""
    sys.path.insert(0, str(Path(script).parent))
    method = importlib.import_module(Path(script).stem)
    shared = method.Config, method.PRESETS, method.SAMPLING, method.USES
    config, _ = data.parse_run(method.METHOD, "", *shared, flags)
    if hasattr(config, "pretrain_steps"):
        config.pretrain_steps = 3
    method.check(config)
    run = method.Run(config)
    data.open_run(run, None)
    model = method.train(run, None)
    found = {"peak MB": data.peak_memory(run.device)}
    lines = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
    log = [line for line in lines if "cells_per_s" in line and "stage" not in line][2:]     # after compilation
    steps = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in zip(log, log[1:])]
    found |= {"ms/step": 1e3 * np.median(steps), "cells/s": np.median([line["cells_per_s"] for line in log])}

    group, controls = min(run.dataset.sizes("test", 1)), run.dataset.control_cells("test")
    options = next(iter(method.variants(config).values())) if method.variants else {}

    def rate(n):
        began = time.perf_counter()
        method.predict(run, model, {group: n}, controls, run.panel.eval_genes, **options)
        return n / (time.perf_counter() - began)
    rate(64)
    found["sampled cells/s"] = rate(min(10_000, max(64, int(float(seconds) * rate(64)))))
    flops = []
    for n in (1, 2):
        short = method.Run(replace(config, steps=n, compile=False, out=f"{config.out}-{n}"))
        short.dataset, short.panel = run.dataset, run.panel
        short.out.mkdir()
        with Flops() as counter:
            method.train(short, None)
        flops.append(counter.count)
    print(json.dumps(found | {"GFLOP/step": (flops[1] - flops[0]) / 1e9}))


def speed(config):
    """Print the table of --speed; the last line is one JSON object. Returns the exit code."""
    where = data.pick_device(config.device)
    cuda = where.type == "cuda"
    peak = matrix_rate(where, torch.bfloat16 if cuda and torch.cuda.is_bf16_supported(False) else torch.float32)
    rows = []
    for text, (script, flags) in asked_methods(config).items():
        with tempfile.TemporaryDirectory() as folder:
            place = ["--steps", 200 if cuda else 40, "--out", Path(folder, "run")]
            code = "import sys, bench; bench.measure(*sys.argv[1:])"
            _, printed = child("-c", code, script, 5, *common_flags(config), *flags, *place)
        found = json.loads(printed.splitlines()[-1])
        found["utilisation"] = found["GFLOP/step"] / found["ms/step"] * 1e12 / peak
        shown = {k: v if v is None else float(f"{v:.4g}") for k, v in found.items()}
        rows.append({"method": text, "preset": config.preset, **shown})
    if not rows:
        raise DataError("--speed: --methods names none to measure")
    print(render([list(rows[0]), *([str(v) for v in row.values()] for row in rows)]))
    print(json.dumps({"methods": rows, "torch": torch.__version__, "threads": torch.get_num_threads(),
                      "TFLOP/s": round(peak / 1e12, 2),
                      "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()}))
    return 0


# -------------------------------------------------------------------------------- command line

def main(argv=None):
    """Command line; exit code 1 when a run failed, 2 for bad input."""
    with data.clean_errors():
        parser = data.Parser(prog="bench.py", description=__doc__)
        data.add_flags(parser, Config, {"demo": DEMO})
        typed = parser.parse(argv)
        preset = typed.get("preset") or ("demo" if typed.get("data", "demo") == "demo" else "paper")
        config = Config(**(DEMO if preset == "demo" else {}) | typed | {"preset": preset})
        if config.split == "all":
            raise DataError("--split all: holds nothing out, so that there is nothing to compare; choose another split")
        for of in (config.seeds, config.folds):
            if len(set(of)) < len(of):
                raise DataError(f"--seeds and --folds: {' '.join(map(str, of))} has one twice")
        names = [text.partition("=")[0] for text in config.pred]
        ours = {*METHODS, *GRIDS, *metrics.FLOORS, *RESERVED, ""}
        clash = sorted({name for name in names if name in ours or names.count(name) > 1})
        if clash or any("=" not in text for text in config.pred):
            raise DataError(f"--pred {' '.join(clash or config.pred)}: give NAME=FILE.h5ad, every name once and none "
                            "of this table's own rows")
        cuda = config.device.startswith("cuda") or (not config.device and torch.cuda.is_available())
        if not config.jobs:
            config.jobs = os.cpu_count() or 1 if config.preset == "demo" and not cuda else 1
        if not config.eval_cells:
            config.eval_cells = 100 if config.data == "demo" else 1000
        if config.data == "demo" and config.split == "transfer":
            config.covariates = config.covariates or "cell_type"
        sys.exit(speed(config) if config.speed else bench(config))


if __name__ == "__main__":
    main()
