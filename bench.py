"""One table for all methods, the baselines that are hard to beat, and any other tool's predictions.

    python bench.py                                                        the demo: every method, two minutes each
    python bench.py --data norman.h5 --split additive --seeds 0 1 2 3        four seeds of every method
    python bench.py --data norman.h5 --split additive --folds 0 1 2 3 --methods scdfm scdfm:no-mmd "scdfm --knn 10"
    python bench.py --data norman.h5 --split additive --methods none --pred GEARS=gears.h5ad CPA=cpa.h5ad
    python bench.py --data norman.h5 --split holdout --embedding scgpt.npz   linear baseline on those gene vectors
    python bench.py --speed                                                ms per step, cells/s, memory, utilisation

Every method runs as a user runs it, python METHOD.py, in a process of its own, with the same data flags, split, fold
and seed; a second call runs only what is missing, and continues what was interrupted. Results are in the folder --out:
bench.json, bench.csv (a line per condition), bench.md and the runs themselves. Values are mean and standard deviation
over seeds and folds; the best of a column is bold and the second best underlined, floors and baselines included.

Baselines, fitted to the mean effects (mean of cells minus mean of their controls) of the training conditions. Their
hyper-parameters are chosen by five-fold cross-validation over training conditions of the kind that is tested (doubles
for doubles). All but the nearest neighbour add the predicted effect to control cells.
  linear            Y ~ b + G W P': genes G and perturbations P in the space of a gene embedding, W by ridge
                    (Ahlmann-Eltze, Huber, Anders 2025). The embedding is the PCA of the training means, or --embedding
  latent_additive   sum of the effects of its singles, projected on principal components of the training effects
  ridge             ridge regression on perturbation indicators, singles and combinations together
  nearest           cells of the training condition with the closest embedding
"""
import csv
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

import data
import metrics
from data import DataError

HERE = Path(__file__).resolve().parent

# methods and their ablations: name -> script and flags. Add a line to compare your own.
METHODS = {
    "scdfm": "scdfm.py",
    "scdfm:no-mmd": "scdfm.py --mmd-weight 0",
    "scdfm:no-mask": "scdfm.py --knn 0",
    "scdfm:plain-attention": "scdfm.py --no-differential",
    "primeflow": "primeflow.py",
    "primeflow:mlp": "primeflow.py --velocity mlp",
    "primeflow:pca": "primeflow.py --velocity mlp --space pca --path trigonometric --sigma 0.1",
    "primeflow:pca-ot": "primeflow.py --velocity mlp --space pca --path trigonometric --sigma 0.1 --coupling ot",
    "scbig": "scbig.py",
    "scbig:kmeans": "scbig.py --clustering kmeans",
    "scbig:transformer": "scbig.py --encoder transformer",
    "scbig:no-correlation": "scbig.py --corr-weight 0",
    "scbig:no-pathways": "scbig.py --path-weight 0",
    "celltarnet": "celltarnet.py",
    "celltarnet:no-contrast": "celltarnet.py --contrast-weight 0",
    "celltarnet:no-denoising": "celltarnet.py --denoise-weight 0",
    "celltarnet:no-prior": "celltarnet.py --prior none",
    "celltarnet:sparse": "celltarnet.py --prior sparse",
    "celltarnet:low-rank": "celltarnet.py --prior low-rank",
}
# and what a demo-size run of one needs besides: that preset's schedule is the U-Net's, with which an MLP learns badly
DEMO = dict.fromkeys(("primeflow:mlp", "primeflow:pca", "primeflow:pca-ot"), "--lr 1e-3 --batch-size 64 --steps 3000")

# what the papers print, by name of the data and split; another gene set or split file gives other numbers
_SCDFM = ("l2", "mse", "mae", "de_spearman", "pearson_delta", "pds", "pearson_delta_hat", "pearson_delta_hat_top20")
_SCBIG = ("pearson_delta", "pearson_delta_top20", "acc", "acc_top20", "de_spearman", "pds", "l2", "mse", "mae")
_TARNET = ("l2", "mse", "mae", "de_spearman", "pearson_delta", "pds", "pearson_delta_hat")
PUBLISHED = {
    ("norman", "additive"): [
        ("control, scDFM table 1", _SCDFM, (3.9937, .01839, .03953, None, None, .5135, -.1695, -.1297)),
        ("additive, scDFM table 1", _SCDFM, (1.9395, .00448, .02276, .5564, .9024, .9686, .8584, .9244)),
        ("GEARS, scDFM table 1", _SCDFM, (3.5531, .01387, .06624, .5624, .7421, .8601, -.0089, .2032)),
        ("CellFlow, scDFM table 1", _SCDFM, (1.7064, .00392, .02207, .5503, .8678, .9321, .8395, .8988)),
        ("scDFM, scDFM table 1", _SCDFM, (1.7043, .00315, .02155, .5705, .8853, .9737, .8468, .9260)),
        ("linear, scBIG table 1", _SCBIG, (.6211, .7075, .8007, .8906, .3192, .5363, 6.76, .0265, .1233)),
        ("linear-scGPT, scBIG table 1", _SCBIG, (.6925, .7514, .8424, .9688, .5023, .7913, 5.31, .0155, .0942)),
        ("CellFlow, scBIG table 1", _SCBIG, (.7892, .7275, .9151, .9391, .8113, .7581, 4.54, .0114, .0775)),
        ("scBIG, scBIG table 1", _SCBIG, (.8496, .8230, .9197, .9906, .8593, .8548, 3.92, .0091, .0689))],
    ("norman", "holdout"): [
        ("CellFlow, scDFM table 2 single", _SCDFM, (1.6758, .0035, .0191, .2860, .7109, .8072, .6138, .6753)),
        ("scDFM, scDFM table 2 single", _SCDFM, (1.6186, .0030, .0190, .6957, .7127, .8914, .6659, .8116)),
        ("CellFlow, scDFM table 2 double", _SCDFM, (2.1042, .0049, .0236, .5074, .8095, .8622, .6780, .7155)),
        ("scDFM, scDFM table 2 double", _SCDFM, (2.0309, .0047, .0235, .5676, .8357, .9189, .7769, .8688)),
        ("linear-scGPT, scBIG table 2 single", _SCBIG, (.6072, .6352, .7620, .8095, .4584, .6571, 3.60, .0072, .0575)),
        ("scBIG, scBIG table 2 single", _SCBIG, (.6507, .6537, .7876, .8548, .6333, .7467, 3.26, .0065, .0491)),
        ("linear-scGPT, scBIG table 2 double", _SCBIG, (.7351, .7230, .8282, .9100, .6118, .7000, 3.91, .0080, .0626)),
        ("scBIG, scBIG table 2 double", _SCBIG, (.8026, .8719, .8552, .9700, .8313, .7440, 3.68, .0083, .0554))],
    ("norman", "cv"): [
        ("control, CellTARNet table 1", _TARNET, (4.9272, .02495, .05149, None, None, .6471, .1552)),
        ("Geneformer, CellTARNet table 1", _TARNET, (2.4677, .00612, .02862, .5049, .8857, .8879, .7353)),
        ("CellFlow, CellTARNet table 1", _TARNET, (2.5052, .00547, .02852, .6098, .8361, .8937, .7809)),
        ("CellTARNet, CellTARNet table 1", _TARNET, (2.3581, .00526, .02765, .7089, .9103, .9066, .8356))],
    ("combosciplex", "combosciplex"): [
        ("control, scDFM table 3", _SCDFM[:6], (5.3716, .0324, .0698, None, None, .5714)),
        ("CPA, scDFM table 3", _SCDFM[:6], (1.6592, .0029, .0240, .7906, .8150, .8980)),
        ("scDFM, scDFM table 3", _SCDFM[:6], (1.6567, .0028, .0220, .8289, .8933, .8776))],
}


@dataclass
class Config(data.DataConfig):
    """Flags of bench.py; the data flags are passed on to every method."""
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo
    split: str = "additive"         # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    folds: tuple[int, ...] = (0,)   # seeded splits to run
    n_folds: int = 10               # number of folds of --split cv
    seeds: tuple[int, ...] = (0,)   # seeds to run
    methods: tuple[str, ...] = ("all",)  # all, none, names of METHODS, or 'NAME FLAGS' in quotes
    baselines: bool = True          # score linear, latent_additive, ridge and nearest
    embedding: str = ""             # gene vectors for linear and nearest: .npz (names, emb), .pt, .tsv or .csv
    pred: tuple[str, ...] = ()      # other tools' predictions: NAME=FILE.h5ad
    eval_cells: int = 0             # cells per condition: as many as it really has, at most this; 0 is 1000, demo 100
    preset: str = ""                # size of the methods: demo, paper; '' is demo for --data demo, else paper
    device: str = ""                # cpu, cuda, cuda:1; '' takes the GPU if there is one
    out: str = ""                   # folder; '' is runs/bench-DATA-SPLIT
    keys: tuple[str, ...] = ()      # metrics to print; default those of the papers' tables
    jobs: int = 0                   # runs at the same time; 0 is one per CPU core for demo-size models, else 1
    plot: bool = False              # figures as PNG files (needs matplotlib)
    condition: str = ""             # condition of the gene and PCA figures; '' is the one with the largest effect
    dry_run: bool = False           # print the commands and stop
    speed: bool = False             # measure speed instead
    hvg: int = 5000                 # highly variable genes; the same for all methods


# -------------------------------------------------------------------------------- baselines

def perturbations(group):
    """'A+B@cov' -> ('A', 'B')"""
    return tuple(group.partition("@")[0].split("+"))


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


def latent_additive(train, Y, test, k):
    """Sum of the effects of single perturbations, in the space of the first k right singular vectors of the training
    effects: (n, G) -> (m, G). A perturbation without a single gets the mean of the singles."""
    V = np.linalg.svd(Y, full_matrices=False)[2][:k]                                 # (k, G)
    single = {}
    for g, y in zip(train, Y):
        if len(perturbations(g)) == 1:
            single.setdefault(perturbations(g)[0], []).append(y)
    single = {p: np.mean(y, axis=0) for p, y in single.items()}
    mean = np.mean(list(single.values()), axis=0) if single else Y.mean(0)
    sums = np.stack([sum(single.get(p, mean) for p in perturbations(g)) for g in test])
    return sums @ V.T @ V


def embed(groups, vectors, width):
    """(len(groups), width): sum over the perturbations of a group of their vectors, zero where there is none."""
    zero = np.zeros(width)
    return np.stack([sum((vectors.get(p, vectors.get(p.partition(":")[0], zero)) for p in perturbations(g)), zero)
                     for g in groups])


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

    b is one vector per perturbation, so that a double has twice the mean effect of a single. (n, G) -> (m, G).
    """
    G, vectors = gene_vectors(Y, control, genes, embedding, k)
    count = np.array([len(perturbations(g)) for g in train], dtype=float)
    b = count @ Y / (count @ count)                                                  # (G,)
    P = embed(train, vectors, G.shape[1])
    centre = count @ P / (count @ count)
    P, eye = P - count[:, None] * centre, np.eye(G.shape[1])
    left = np.linalg.solve(G.T @ G + lam * eye, G.T @ (Y - count[:, None] * b).T)    # (k, n)
    W = np.linalg.solve(P.T @ P + lam * eye, P.T @ left.T).T                         # (k, k)
    count = np.array([len(perturbations(g)) for g in test], dtype=float)
    P = embed(test, vectors, G.shape[1]) - count[:, None] * centre
    return count[:, None] * b + P @ W.T @ G.T


def twins(train, Y, test, k, control, genes, embedding=None):
    """Index of the training group that is nearest to each test group: highest cosine of the embeddings, of the same
    covariate where possible; of nearly equal ones that with more perturbations in common. (m,)"""
    G, vectors = gene_vectors(Y, control, genes, embedding, k)
    a, b = embed(test, vectors, G.shape[1]), embed(train, vectors, G.shape[1])
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    same_cell = np.array([[g.partition("@")[2] == h.partition("@")[2] for h in train] for g in test])
    shared = np.array([[len({*perturbations(g)} & {*perturbations(h)}) / len({*perturbations(g)} | {*perturbations(h)})
                        for h in train] for g in test])
    return np.argmax(a @ b.T + 1e-3 * shared + 4 * same_cell, axis=1)


def nearest(train, Y, test, **options):
    """Effect of the nearest training group: (n, G) -> (m, G)."""
    return Y[twins(train, Y, test, **options)]


LAMBDAS = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
GRIDS = {
    "linear": (linear, [dict(lam=lam, k=k) for k in (2, 5, 10, 20, 50) for lam in (1e-3, 0.1, 1.0, 10.0, 100.0)]),
    "latent_additive": (latent_additive, [dict(k=k) for k in (1, 2, 4, 8, 16, 32, 64, 128, 10_000)]),
    "ridge": (ridge, [dict(lam=lam) for lam in LAMBDAS]),
    "nearest": (nearest, [dict(k=k) for k in (2, 5, 10, 20, 50)]),
}


def tune(function, grid, train, Y, test, n_folds=5):
    """The options of a grid with the least squared error in cross-validation over the training groups with as many
    perturbations as the test groups have (over all when there are fewer than five of them)."""
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
    """Of one baseline, for the test groups: predicted effects on the evaluation genes (m, E), or for nearest the names
    of the training groups [m]; and the options that cross-validation chose."""
    function, grid = GRIDS[name]
    train, Y, control = data.training_effects(dataset)
    test = dataset.part("test")
    if name in ("linear", "nearest"):
        grid = grid if embedding is None else [g for g in grid if g["k"] == grid[0]["k"]]
        grid = [g | dict(control=control, genes=list(dataset.genes), embedding=embedding) for g in grid]
    options = tune(function, grid, train, Y, test) if len(train) > 1 else grid[0]
    chosen = {k: v for k, v in options.items() if k in ("lam", "k")}
    if name == "nearest":
        return [train[i] for i in twins(train, Y, test, **options)], chosen
    return function(train, Y, test, **options)[:, dataset.eval_genes].astype(np.float32), chosen


def baseline_populations(name, dataset, fitted, eval_cells, seed):
    """{group: (n, E)} cells of one baseline for the test groups: of the training group, or controls plus the effect."""
    out = {}
    for group, of in zip(dataset.part("test"), fitted):
        n, draw = min(len(dataset.rows[group]), eval_cells), zlib.crc32(f"{name} {group} {seed}".encode())
        if name == "nearest":
            out[group] = data.pick_rows(dataset.cells(of, dataset.eval_genes), n, draw)
        else:
            cells = dataset.controls("test", dataset.eval_genes, group.partition("@")[2])
            out[group] = data.pick_rows(cells, n, draw) + of
    return out


# -------------------------------------------------------------------------------- runs

@dataclass
class Job:
    """One run of one method."""
    name: str
    fold: int
    seed: int
    folder: Path
    command: list


def preset_of(config):
    """The size that the methods will take: demo or paper."""
    return config.preset or ("demo" if config.data == "demo" else "paper")


def jobs(config, out):
    """Every run that the flags ask for."""
    asked = [m for m in METHODS if ":" not in m] if config.methods == ("all",) else config.methods
    asked, passed = () if asked == ("none",) else asked, []
    for f in fields(data.DataConfig):
        # always those of which the methods have defaults of their own: all must see the same genes and controls
        if (value := getattr(config, f.name)) != f.default or f.name in ("hvg", "eval_genes", "control_split"):
            flag = "--" + f.name.replace("_", "-")
            passed += [flag] if value is True else [flag, str(value)]
    common = ["--data", config.data, "--split", config.split, *passed, "--eval-cells", str(config.eval_cells)]
    common += ["--folds", str(config.n_folds)] if config.split == "cv" else []
    for name in ("preset", "device"):
        common += [f"--{name}", getattr(config, name)] if getattr(config, name) else []
    result = []
    for text in asked:
        name, *extra = shlex.split(text)
        if name not in METHODS:
            raise DataError(f"--methods {text}: unknown method {name}; choose all, none or {', '.join(METHODS)}")
        script, *flags = shlex.split(METHODS[name])
        flags += shlex.split(DEMO.get(name, "")) if preset_of(config) == "demo" else []
        # a folder belongs to exactly these flags: other flags never meet its results
        tag = hashlib.sha256(shlex.join([script, *common, *flags, *extra]).encode()).hexdigest()[:8]
        for fold in config.folds:
            for seed in config.seeds:
                folder = out / f"{name.replace(':', '-')}-f{fold}-s{seed}-{tag}"
                command = [sys.executable, str(HERE / script), *common, "--fold", str(fold), "--seed", str(seed),
                           *flags, *extra]
                result.append(Job(text, fold, seed, folder, command))
    return result


def finished(job):
    """Whether its scores are there: a run writes them last."""
    return (job.folder / "metrics.json").exists()


def command_now(job):
    """The command that starts a job, or goes on with it."""
    resume = (job.folder / "ckpt.pt").exists()
    return ([*job.command[:2], "--resume"] if resume else job.command) + ["--out", str(job.folder)]


def run_jobs(todo, n_parallel):
    """Run what is missing. Returns {(name, fold, seed): last line of the error} of those that failed."""
    failed, lock, began, done = {}, threading.Lock(), time.perf_counter(), []
    env = dict(os.environ)
    if n_parallel > 1:                          # whatever is left to do: other threads give other last digits
        env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_parallel))

    def run(job):
        title = f"{job.name} fold {job.fold} seed {job.seed}"
        print(f"{'resuming' if (job.folder / 'ckpt.pt').exists() else 'running'} {title}", flush=True)
        start = time.perf_counter()
        process = subprocess.run(command_now(job), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True)
        error = process.stderr.strip().splitlines()
        with lock:
            done.append(job)
            took, left, how = time.perf_counter() - start, len(todo) - len(done), "done"
            if process.returncode or not finished(job):
                failed[job.name, job.fold, job.seed] = error[-1] if error else f"ended with code {process.returncode}"
                how = "FAILED"
            eta = data.clock((time.perf_counter() - began) / len(done) * left)
            print(f"[{len(done)}/{len(todo)}] {title}: {how} in {data.clock(took)}"
                  + (f", {left} left, about {eta}" if left else ""), flush=True)

    with ThreadPoolExecutor(n_parallel) as pool:
        futures = [pool.submit(run, job) for job in todo]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:               # the methods got the Ctrl-C too, save, and end: the pool waits for them
            for future in futures:
                future.cancel()
            raise
    return failed


def check_run(job, dataset):
    """The metrics of a finished run, after checking that it had the split and the genes of the others."""
    result = json.loads((job.folder / "metrics.json").read_text())
    split = json.loads((job.folder / "split.json").read_text())
    genes, _ = metrics.read_prediction(job.folder / "pred.h5ad", data.DataConfig(covariates=dataset.config.covariates))
    if split != dataset.split or genes != [dataset.genes[i] for i in dataset.eval_genes]:
        raise DataError(f"{job.folder}: has another split, or other genes, than the data gives now; the file has "
                        "changed. Remove the folder, or choose another --out")
    return result


# -------------------------------------------------------------------------------- results

def score_fold(config, fold, embedding):
    """Floors, replicate, baselines and other tools' predictions of one fold, for every seed.

    Returns the dataset and {seed: {row name: (kind, result of metrics.evaluate)}}.
    """
    dataset = data.load(data.path_of(config), config, config.split, fold, config.n_folds)
    genes = dataset.eval_genes
    if embedding is not None:
        of = sorted({*dataset.genes, *dataset.perturbations, *(p.partition(":")[0] for p in dataset.perturbations)})
        found = {name: embedding[name.upper()].astype(float) for name in of if name.upper() in embedding}
        if len(found) < 0.2 * len(of):
            raise DataError(f"--embedding {config.embedding}: knows only {len(found):,} of {len(of):,} genes; give a "
                            "file of the same species and naming")
        embedding = found
    names, control = [dataset.genes[i] for i in genes], dataset.controls("test", genes)
    real, train = dataset.populations("test", genes), dataset.populations("train", genes)
    others = {}
    for text in config.pred:
        name, _, file = text.partition("=")
        columns, cells = metrics.read_prediction(file, config)
        where, absent = {g: i for i, g in enumerate(columns)}, sorted(set(dataset.part("test")) - set(cells))
        missing = [g for g in names if g not in where]
        if missing or absent:
            what = f"{len(missing)} of the {len(names)} evaluation genes ({', '.join(missing[:4])})" if missing else \
                f"{len(absent)} of the test conditions ({', '.join(absent[:4])})"
            raise DataError(f"--pred {text}: lacks {what}; predict all, or score the file alone with metrics.py")
        others[name] = {g: cells[g][:, [where[n] for n in names]] for g in dataset.part("test")}
    results, fitted = {}, {name: fit_baseline(name, dataset, embedding) for name in GRIDS if config.baselines}
    for seed in config.seeds:
        rows, floors = {}, True
        for name in fitted:
            effects, chosen = fitted[name]
            pred = baseline_populations(name, dataset, effects, config.eval_cells, seed)
            rows[name] = "baseline", metrics.evaluate(pred, real, control, names, train, seed=seed, floors=floors)
            rows[name][1]["options"], floors = chosen, False
        if floors:
            pred = {g: data.pick_rows(dataset.controls("test", genes, g.partition("@")[2]),
                                      min(len(dataset.rows[g]), config.eval_cells), seed) for g in real}
            first = metrics.evaluate(pred, real, control, names, train, seed=seed)
        else:
            first = rows[next(iter(GRIDS))][1]
        floor_rows = {name: ("floor", {"aggregate": first["floors"][name], "n_valid": first["floors_n_valid"][name],
                                       "per_condition": first["floors_per_condition"][name]})
                      for name in metrics.FLOORS if first["floors"][name]}
        for name, pred in others.items():
            rows[name] = "prediction", metrics.evaluate(pred, real, control, names, train, seed=seed, floors=False)
        replicate = {"aggregate": first["replicate"], "n_valid": {}, "per_condition": {}}
        results[seed] = floor_rows | rows | {"replicate": ("replicate", replicate)}
    return dataset, results


def published_rows(config):
    """{row name: {key: value}} of the papers that used data and split of this name."""
    stem, split = Path(config.data).stem.lower(), Path(config.split).stem
    return {name: dict(zip(keys, values)) for (start, of), rows in PUBLISHED.items() for name, keys, values in rows
            if (stem, split) == (start, of)}


def collect(runs):
    """[(name, kind, result)] -> {name: {kind, mean, sd, runs, n_valid, per_condition, seconds, peak_memory_mb}}."""
    rows = {}
    for name, kind, result in runs:
        row = rows.setdefault(name, {"kind": kind, "all": []})
        row["all"].append(result)
    for row in rows.values():
        several = row.pop("all")
        keys = {k: None for r in several for k in r["aggregate"]}
        values = {k: [r["aggregate"][k] for r in several if r["aggregate"].get(k) is not None] for k in keys}
        row["runs"] = len(several)
        row["mean"] = {k: float(np.mean(v)) if v else None for k, v in values.items()}
        row["sd"] = {k: float(np.std(v, ddof=1)) if len(v) > 1 else None for k, v in values.items()}
        row["n_valid"] = {k: sum(r["n_valid"].get(k, 0) for r in several) for k in keys}
        by_group = {}
        for r in several:
            for g, scores in r["per_condition"].items():
                for k, v in scores.items():
                    by_group.setdefault(g, {}).setdefault(k, []).append(v)
        row["per_condition"] = {g: {k: float(np.mean(v)) if None not in v else None for k, v in scores.items()}
                                for g, scores in by_group.items()}
        for k in ("seconds", "peak_memory_mb"):
            row[k] = round(float(np.mean([r[k] for r in several])), 1) if all(k in r for r in several) else None
        row["options"] = [r["options"] for r in several if "options" in r]
    return rows


def partial_floors(rows):
    """{name of a floor that exists for some of the conditions only: how many of how many}."""
    every = max((len(row["per_condition"]) for row in rows.values()), default=0)
    return {name: (len(row["per_condition"]), every) for name, row in rows.items()
            if row["kind"] == "floor" and len(row["per_condition"]) < every}


def best_and_second(rows, key):
    """Names of the best and the second best row of a column. Published rows, the replicate and a floor that exists for
    some of the conditions only do not compete."""
    sign, partial = -1 if metrics.KEYS[key].arrow == "↑" else 1, partial_floors(rows)
    rank = sorted((sign * row["mean"][key], name) for name, row in rows.items()
                  if row["kind"] not in ("replicate", "published") and row["mean"].get(key) is not None
                  and name not in partial)
    return [name for _, name in rank[:2]] + [None] * (2 - len(rank))


def paired_tests(rows, keys):
    """{method: {key: {against, p, better}}}: Wilcoxon over conditions against the best floor or baseline, per key."""
    out, partial = {}, partial_floors(rows)
    simple = {n: r for n, r in rows.items() if r["kind"] in ("floor", "baseline") and n not in partial}
    for name, row in rows.items():
        if row["kind"] not in ("method", "prediction"):
            continue
        for key in keys:
            against = best_and_second(simple, key)[0]
            if against is None or row["mean"].get(key) is None:
                continue
            better = (row["mean"][key] > rows[against]["mean"][key]) == (metrics.KEYS[key].arrow == "↑")
            p = metrics.compare(row, rows[against], key)
            out.setdefault(name, {})[key] = {"against": against, "p": p, "better": better}
    return out


def number(value, sd=None):
    """'0.123', '0.123 ± 0.004'; a standard deviation of zero (a constant) is left out."""
    if value is None or not math.isfinite(value):
        return "-"
    digits = 4 if abs(value) < 0.1 else 3
    return f"{value:.{digits}f}" + (f" ± {sd:.{digits}f}" if sd else "")


STYLE = {"console": (("\033[1m", "\033[0m"), ("\033[4m", "\033[0m")), "plain": (("", "*"), ("", "'")),
         "markdown": (("**", "**"), ("<u>", "</u>"))}


def format_rows(rows, keys, style, width=170):
    """Text of the table: a line per row, a column per metric, mean ± sd, best and second marked in a style."""
    marked = {k: best_and_second(rows, k) for k in keys}
    cells = {}
    for name, row in rows.items():
        for k in keys:
            text = number(row["mean"].get(k), row["sd"].get(k))
            mark = STYLE[style][marked[k].index(name)] if name in marked[k] and text != "-" else ("", "")
            cells[name, k] = (mark[0] + text + mark[1], len(text) + (0 if style == "console" else sum(map(len, mark))))
    if style == "markdown":
        lines = ["| | " + " | ".join(k + metrics.KEYS[k].arrow for k in keys) + " |", "|---|" + "---:|" * len(keys)]
        for name, row in rows.items():
            title = f"{name} *(published)*" if row["kind"] == "published" else name
            lines.append(f"| {title} | " + " | ".join(cells[name, k][0] for k in keys) + " |")
        return "\n".join(lines)
    start, blocks, used = max(map(len, rows)), [[]], 0
    for k in keys:
        size = 2 + max(len(k) + 1, *(cells[name, k][1] for name in rows))
        if blocks[-1] and start + used + size > width:
            blocks.append([])
            used = 0
        blocks[-1].append((k, size))
        used += size
    texts = []
    for block in blocks:
        lines = [" " * start + "".join((k + metrics.KEYS[k].arrow).rjust(size) for k, size in block)]
        for name in rows:
            lines.append(name.ljust(start) + "".join(" " * (size - cells[name, k][1]) + cells[name, k][0]
                                                     for k, size in block))
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def reading(rows, tests, keys):
    """One line per method: on how many metrics it beats the best floor or baseline, and where it loses to a floor."""
    lines = []
    for name in tests:
        won = [k for k in keys if k in tests[name] and tests[name][k]["better"]]
        sure = [k for k in won if tests[name][k]["p"] is not None and tests[name][k]["p"] < 0.05]
        floors = {n: r for n, r in rows.items() if r["kind"] == "floor" and n != "additive"}
        lost = [k for k in keys if (b := best_and_second(floors, k)[0]) and rows[name]["mean"].get(k) is not None
                and (rows[name]["mean"][k] > floors[b]["mean"][k]) != (metrics.KEYS[k].arrow == "↑")]
        text = f"{name}: better than every floor and baseline in {len(won)} of {len(tests[name])} metrics"
        text += f" ({', '.join(won)}; p < 0.05 in {len(sure)})" if won else ""
        text += f"; LOSES to control or mean in {', '.join(lost)}" if lost else ""
        lines.append(text)
    return lines + [f"{name} exists for {n} of {every} conditions and averages over these: it is not ranked"
                    for name, (n, every) in partial_floors(rows).items()]


def bench(config):
    """Run what is missing, score everything, print and write the table. Returns the exit code."""
    out = Path(config.out or f"runs/bench-{Path(config.data).stem}-{Path(config.split).stem.replace(':', '_')}")
    planned = jobs(config, out)
    if config.dry_run:
        for job in planned:
            print("# done: " * finished(job) + shlex.join(["python", Path(job.command[1]).name, *command_now(job)[2:]]))
        return 0
    keys = list(config.keys or metrics.TABLE_KEYS)
    embedding = data.read_vectors(config.embedding, "--embedding") if config.embedding else None
    folds = {fold: score_fold(config, fold, embedding) for fold in config.folds}     # cheap, and finds bad input first
    first = folds[config.folds[0]][0]
    if config.condition and config.condition not in first.part("test"):
        raise DataError(f"--condition {config.condition}: is no test condition; choose from "
                        f"{', '.join(first.part('test'))}")
    failed = run_jobs([job for job in planned if not finished(job)], config.jobs)
    runs = [(name, kind, result) for dataset, by_seed in folds.values() for rows in by_seed.values()
            for name, (kind, result) in rows.items()]
    good = [job for job in planned if (job.name, job.fold, job.seed) not in failed]
    for job in good:
        result = check_run(job, folds[job.fold][0])
        runs.append((job.name, "method", result))
        for suffix, other in result.get("variants", {}).items():
            runs.append((job.name + suffix, "method", other))
    rows = collect(runs)
    rows |= {name: {"kind": "published", "mean": values, "sd": {}, "per_condition": {}}
             for name, values in published_rows(config).items()}
    order = ("floor", "baseline", "prediction", "method", "replicate", "published")
    rows = dict(sorted(rows.items(), key=lambda item: order.index(item[1]["kind"])))
    tests = paired_tests(rows, keys)
    lines = reading(rows, tests, keys)
    title = f"{Path(config.data).name}, split {config.split}, folds {list(config.folds)}, " \
        f"seeds {list(config.seeds)}: {len(first.part('train'))} training and {len(first.part('test'))} test " \
        f"conditions, {len(first.eval_genes):,} genes, at most {config.eval_cells} cells per condition"
    write_results(out, config, rows, tests, failed, title, lines, keys)
    print(f"\n{title}\n")
    print(format_rows(rows, keys, "console" if sys.stdout.isatty() else "plain"))
    if not sys.stdout.isatty():
        print("* best, ' second best of the floors, baselines, methods and predictions")
    print()
    for line in lines:
        print(textwrap.fill(line, 150, subsequent_indent="    "))
    for (name, fold, seed), error in failed.items():
        print(f"FAILED: {name} fold {fold} seed {seed}: {error}", file=sys.stderr)
    if config.plot:
        plot(config, out, rows, good, first)
    print(f"files in {out}")
    return 1 if failed else 0


def write_results(out, config, rows, tests, failed, title, lines, keys):
    """bench.json, bench.csv and bench.md."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    content = {"title": title, "data": config.data, "split": config.split, "folds": config.folds, "seeds": config.seeds,
               "versions": versions, "threads": torch.get_num_threads(), "rows": rows, "tests": tests,
               "failed": [{"name": n, "fold": f, "seed": s, "error": e} for (n, f, s), e in failed.items()]}
    with data.atomic(out / "bench.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    with data.atomic(out / "bench.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, ["row", "kind", "condition", *metrics.KEYS])
        writer.writeheader()
        for name, row in rows.items():
            for group, scores in row["per_condition"].items():
                writer.writerow({"row": name, "kind": row["kind"], "condition": group, **scores})
    columns = [k for k in keys if any(k in t for t in tests.values())]
    parts = [f"# {title}", format_rows(rows, keys, "markdown")]
    if tests:
        head = "| p against the best floor or baseline | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns)
        body = []
        for name, of in tests.items():
            cell = [f"{'better' if of[k]['better'] else 'worse'} than {of[k]['against']}, p = {number(of[k]['p'])}"
                    if k in of else "-" for k in columns]
            body.append(f"| {name} | " + " | ".join(cell) + " |")
        parts += ["\n".join([head, *body]), "Paired Wilcoxon signed-rank tests over the conditions, two-sided, not "
                  "corrected for their number; with fewer than six conditions p cannot fall below 0.05.",
                  "\n".join(f"- {line}" for line in lines)]
    with data.atomic(out / "bench.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")


# -------------------------------------------------------------------------------- figures

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # Okabe and Ito


def plot(config, out, rows, good, dataset):
    """errors.png, ablations.png, genes.png and pca.png in the folder, from the first seed and fold."""
    try:
        import matplotlib
    except ImportError:
        print("--plot: matplotlib is not installed; the tables are written, the figures are not")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"figure.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    genes = dataset.eval_genes
    names = [dataset.genes[i] for i in genes]
    pred = {}
    for job in good:
        if (job.fold, job.seed) == (config.folds[0], config.seeds[0]):
            pred[job.name] = metrics.read_prediction(job.folder / "pred.h5ad", config)[1]
    condition = config.condition or max(dataset.part("test"), key=lambda g: np.linalg.norm(_effect(dataset, g, genes)))
    real, control = dataset.cells(condition, genes), dataset.controls("test", genes, condition.partition("@")[2])

    # error of each condition (scDFM figure 3)
    shown = {n: r for n, r in rows.items() if r["per_condition"]}
    figure, axis = plt.subplots(figsize=(1 + 0.7 * len(shown), 4), layout="constrained")
    errors = [[v["l2"] for v in r["per_condition"].values() if v.get("l2") is not None] for r in shown.values()]
    kinds = {"floor": "#BBBBBB", "baseline": COLORS[4], "prediction": COLORS[3], "method": COLORS[1]}
    boxes = axis.boxplot(errors, showfliers=False, patch_artist=True, medianprops={"color": "black"}, widths=0.6)
    for box, row in zip(boxes["boxes"], shown.values()):
        box.set_facecolor(kinds[row["kind"]])
    for i, values in enumerate(errors):
        axis.plot(np.full(len(values), i + 1), values, "o", color="black", markersize=2.5, alpha=0.6)
    axis.set_xticks(range(1, len(shown) + 1), list(shown), rotation=40, ha="right")
    axis.set(ylabel="L2 error of the mean profile (log1p CP10k)", ylim=(0, None), title="Error of each test condition")
    present = [k for k in kinds if k in {r["kind"] for r in shown.values()}]
    axis.legend([plt.Rectangle((0, 0), 1, 1, facecolor=kinds[k]) for k in present], present, frameon=False)
    figure.savefig(out / "errors.png")

    # methods and their ablations (scDFM figure 5)
    shown = {n: r for n, r in rows.items() if r["kind"] == "method"}
    if shown:
        figure, axes = plt.subplots(1, 4, figsize=(12, 1 + 0.4 * len(shown)), layout="constrained", sharey=True)
        for axis, k in zip(axes, ("l2", "pearson_delta", "pds", "e_distance")):
            values, sd = ([r[part].get(k) or 0 for r in shown.values()] for part in ("mean", "sd"))
            colors = [COLORS[0] if ":" not in n and " " not in n else COLORS[4] for n in shown]
            axis.barh(list(shown), values, xerr=sd, color=colors, height=0.6)
            axis.set_title(f"{k} {metrics.KEYS[k].arrow}")
            if k in rows.get("additive", {"mean": ()})["mean"]:
                axis.axvline(rows["additive"]["mean"][k], color="black", linestyle=":")
        axes[0].invert_yaxis()
        figure.suptitle("Methods and ablations (dotted: the additive floor)")
        figure.savefig(out / "ablations.png")

    # the genes that change most in one condition (scDFM figure 7)
    change = real - control.mean(0)
    top = np.argsort(-np.abs(change.mean(0)))[:20]
    figure, axis = plt.subplots(figsize=(12, 4.5), layout="constrained")
    axis.boxplot(change[:, top], showfliers=False, medianprops={"linewidth": 0}, patch_artist=True, showmeans=True,
                 meanline=True, meanprops={"color": "black", "linestyle": "-"}, boxprops={"facecolor": "#DDDDDD"})
    for i, (name, groups) in enumerate(pred.items()):
        mean = groups[condition].toarray().mean(0) - control.mean(0)
        axis.plot(np.arange(1, len(top) + 1) + 0.12 * (i + 1), mean[top], "osD^vP*X"[i % 8], label=name, markersize=5,
                  color=COLORS[i % len(COLORS)])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(range(1, len(top) + 1), [names[i] for i in top], rotation=60)
    axis.set_xlim(0.4, len(top) + 1)
    axis.set(ylabel="change from the mean control (log1p CP10k)",
             title=f"{condition}: real cells (boxes, line at their mean) and predicted means; genes of largest change")
    axis.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    figure.savefig(out / "genes.png")

    # real and generated cells in the same principal components (PRiMeFlow figure 1)
    basis = metrics.fit_pca(lambda: (x for x in (control, real)), 2)
    panels = {"real": real} | {name: groups[condition].toarray() for name, groups in pred.items()}
    figure, axes = plt.subplots(1, len(panels), figsize=(3 * len(panels), 3.2), layout="constrained", squeeze=False,
                                sharex=True, sharey=True)
    for i, (axis, (name, cells)) in enumerate(zip(axes[0], panels.items())):
        for x, color in ((control, "#BBBBBB"), (cells, COLORS[0] if not i else COLORS[1])):
            scores = (x - basis.mean) @ basis.loadings
            axis.plot(scores[:, 0], scores[:, 1], "o", markersize=2.5, alpha=0.6, color=color)
        axis.set(title=textwrap.fill(name, 30), xlabel="PC 1 of the real cells")
    axes[0][0].set_ylabel("PC 2")
    figure.suptitle(f"{condition}; grey: control cells")
    figure.savefig(out / "pca.png")
    plt.close("all")
    print("figures: errors.png, ablations.png, genes.png, pca.png")


def _effect(dataset, group, genes):
    control = dataset.controls("test", genes, group.partition("@")[2])
    return dataset.cells(group, genes).mean(0) - control.mean(0)


# -------------------------------------------------------------------------------- speed

def matrix_rate(device, dtype):
    """FLOP/s of a large matrix product: what the device can do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(6):
        _synchronise(device)
        start = time.perf_counter()
        a @ a
        _synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flop_counter():
    """torch's counter, with the attention kernel of CPUs, which it does not know."""
    from torch.utils import flop_counter as fc
    aten = torch.ops.aten

    def forward(q, k, v, *args, out_shape=None, **kwargs):
        return fc.sdpa_flop_count(q, k, v)

    def backward(grad, q, k, v, *args, out_shape=None, **kwargs):
        return fc.sdpa_backward_flop_count(grad, q, k, v)
    return fc.FlopCounterMode(display=False, custom_mapping={
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward})


def measure(method, preset, path, device, steps, extra, folder):
    """Speed of one method in a process of its own: its main() is called as the command line calls it."""
    import contextlib
    import importlib
    import io
    import resource
    module = importlib.import_module(method)

    def call(*flags):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            start = time.perf_counter()
            module.main([str(f) for f in flags])
        return time.perf_counter() - start
    place = ["--device", device] if device else []
    flags = ["--data", path, "--split", "additive", "--preset", preset, *place, *extra]
    folder = Path(folder)
    call(*flags, "--steps", steps, "--out", folder / "run")
    log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    log = [line for line in log if line["step"] > 0 and "seconds" in line]
    result = json.loads((folder / "run" / "metrics.json").read_text())
    ms = [1e3 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in zip(log[2:], log[3:])]
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = where.type == "cuda" and torch.cuda.is_bf16_supported(False)
    row = {"method": method, "preset": preset, "device": str(where), "dtype": "bf16" if bf16 else "fp32",
           "first_step_s": round(log[0]["seconds"], 2), "ms_per_step": round(float(np.median(ms)), 2),
           "ms_quartiles": [round(float(q), 2) for q in np.percentile(ms, [25, 75])],
           "cells_per_s": round(float(np.median([line["cells_per_s"] for line in log[2:]])), 1),
           "peak_memory_mb": result["peak_memory_mb"],
           "evaluation_s": round(result["seconds"] - log[-1]["seconds"], 2)}

    flops = []
    for stop in (1, 3):                         # the difference is two steps, whatever comes before
        with flop_counter() as counter:
            call(*flags, "--no-compile", "--steps", steps, "--stop-at", stop, "--out", folder / f"flops{stop}")
        flops.append(counter.get_total_flops())
    rate = matrix_rate(where, torch.bfloat16 if bf16 else torch.float32)
    row["gflop_per_step"] = round((flops[1] - flops[0]) / 2e9, 2)
    row["device_gflops"] = round(rate / 1e9, 1)
    row["utilisation"] = round((flops[1] - flops[0]) / 2 / (row["ms_per_step"] / 1e3) / rate, 3)

    condition = next(iter(result["per_condition"]))
    few, many = (25, 825) if where.type == "cpu" else (100, 1100)

    def sampling(tag):
        """Cells per second: the difference of two calls, the first of which also compiles."""
        times = [call("--ckpt", folder / "run" / "ckpt.pt", "--predict", condition, "--cells", n, "--out",
                      folder / f"{tag}{i}.h5ad", *place)
                 for i, n in enumerate((few, few, many))]
        return round((many - few) / (times[2] - times[1]), 1) if times[2] > times[1] else None     # lost in the noise
    row["sampled_cells_per_s"] = sampling("cached")
    row["sampled_cells_per_s_uncached"] = None
    if method in UNCACHED:
        UNCACHED[method](module)
        row["sampled_cells_per_s_uncached"] = sampling("uncached")
    row["process_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10
    return row


def _uncached_scdfm(module):
    """The network as a whole at every evaluation, without what is constant over the ODE."""
    context, velocity = module.ScDFM.context, module.ScDFM.velocity
    module.ScDFM.context = lambda self, *given: given
    module.ScDFM.velocity = lambda self, x, modulation, given: velocity(self, x, modulation, context(self, *given))


UNCACHED = {"scdfm": _uncached_scdfm}


def speed(config):
    """Print the table of --speed; the last line is one JSON object. Returns the exit code."""
    import multiprocessing
    import tempfile
    cuda = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    presets = [config.preset] if config.preset else ["demo", "paper"] if cuda else ["demo"]
    large = Path("runs/speed-5000.h5ad")
    if "paper" in presets and not large.exists():
        data.simulate(large, cells=20_000, genes=5_000)
    asked = [m for m in METHODS if ":" not in m] if config.methods == ("all",) else config.methods
    result = {"methods": [], "torch": torch.__version__, "threads": torch.get_num_threads(),
              "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()}
    for text in asked:
        name, *extra = shlex.split(text)
        if name not in METHODS:
            raise DataError(f"--methods {text}: unknown method {name}; choose all or {', '.join(METHODS)}")
        script, *flags = shlex.split(METHODS[name])
        for preset in presets:
            path = str(large) if preset == "paper" else str(data.demo_file())
            given = Path(script).stem, preset, path, config.device, 400 if cuda else 40, flags + extra
            with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (*given, folder)) | {"method": text}
            result["methods"].append(row)
            print(f"{text} {preset}: {row['ms_per_step']:g} ms/step (quartiles {row['ms_quartiles'][0]:g} to "
                  f"{row['ms_quartiles'][1]:g}), first step {row['first_step_s']:g} s, {row['cells_per_s']:g} cells/s, "
                  f"{row['peak_memory_mb']} MB, {row['gflop_per_step']:g} GFLOP/step, "
                  f"{100 * row['utilisation']:.0f}% of {row['device_gflops']:g} GFLOP/s; sampling "
                  f"{row['sampled_cells_per_s'] or '-'} cells/s, "
                  f"uncached {row['sampled_cells_per_s_uncached'] or '-'}; "
                  f"evaluation {row['evaluation_s']:g} s", flush=True)

    path, start = data.demo_file(), time.perf_counter()
    data.load(path, data.DataConfig(), "additive")
    result["load_demo_s"] = round(time.perf_counter() - start, 3)
    rng = np.random.default_rng(0)
    pred, real, train = ({f"P{i}": np.log1p(rng.poisson(0.3, (300, 1000))).astype(np.float32) for i in range(40)}
                         for _ in range(3))
    control = np.log1p(rng.poisson(0.3, (2000, 1000))).astype(np.float32)
    start = time.perf_counter()
    metrics.evaluate(pred, real, control, [f"G{i}" for i in range(1000)], train, floors=False)
    result["evaluate_40x300x1000_s"] = round(time.perf_counter() - start, 2)
    print(f"loading the demo {result['load_demo_s']:g} s; all metrics of 40 conditions x 300 cells x 1,000 genes "
          f"{result['evaluate_40x300x1000_s']:g} s")
    print(json.dumps(result))
    return 0


# -------------------------------------------------------------------------------- command line

def main(argv=None):
    """Command line; exit code 1 when a run failed, 2 for bad input."""
    with data.clean_errors():
        parser = data.Parser(prog="bench.py", description=__doc__)
        data.add_flags(parser, Config)
        config = Config(**parser.parse(argv))
        unknown = sorted(set(config.keys) - set(metrics.KEYS))
        if unknown:
            raise DataError(f"--keys {' '.join(unknown)}: unknown; the metrics are {' '.join(metrics.KEYS)}")
        if config.jobs < 0 or config.eval_cells < 0 or min(*config.seeds, *config.folds) < 0:
            raise DataError("--jobs, --seeds, --folds and --eval-cells must not be negative")
        names = [text.partition("=")[0] for text in config.pred]
        if any("=" not in text for text in config.pred) or len(set(names)) < len(names) or \
                set(names) & {*METHODS, *GRIDS, *metrics.FLOORS, "replicate", ""}:
            raise DataError(f"--pred {' '.join(config.pred)}: give NAME=FILE.h5ad, every name once and none of ours")
        for repeated in (config.seeds, config.folds, config.methods):
            if len(set(repeated)) < len(repeated):
                raise DataError(f"{' '.join(map(str, repeated))}: something is asked for twice")
        cuda = config.device.startswith("cuda") or (not config.device and torch.cuda.is_available())
        small = preset_of(config) == "demo" and not cuda
        config.jobs = config.jobs or (os.cpu_count() or 1 if small else 1)
        config.eval_cells = config.eval_cells or (100 if config.data == "demo" else 1000)
        if config.data == "demo" and config.split == "transfer":
            config.covariates = config.covariates or "cell_type"
        sys.exit(speed(config) if config.speed else bench(config))


if __name__ == "__main__":
    main()
