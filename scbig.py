"""scBIG: gene modules, a module-aware autoencoder, and latent flow matching with structure losses.

Genes are clustered into balanced modules from gene embeddings and protein interactions (Gene-Relation Clustering, GRC).
An autoencoder reads a cell as one token per module; its attention goes through a few inducing points (GCAE). In its
latent space a flow carries control cells to perturbed cells, given the perturbations' embeddings. Two losses on the
decoded end points keep the correlation between modules and the activity of pathways like those of the real cells.
Prior knowledge comes from public files; where one is not given, a stand-in is made from training and control cells.

Paper: "Beyond independent genes: learning module-inductive representations for single-cell gene perturbation
prediction"; numbers of equations and tables below are the paper's. Official code: github.com/ttruan2426-dot/scBIG
@5659ce9 (MIT), called "official" below; its flow is a fork of CellFlow (theislab, MIT). Nothing here is copied.

    python scbig.py                                             demo data, laptop size, a minute on 2 cores
    python scbig.py --data norman.h5 --split additive --gene-embeddings genecompass.npz --pathways reactome.gmt.zip \
        --ppi 9606.protein.links.v12.0.txt.gz --ppi-info 9606.protein.info.v12.0.txt.gz --pert-embeddings esm2.pt
    python scbig.py --data norman.h5 --split holdout --resume     go on after Ctrl-C or a crash
    python scbig.py --ckpt runs/X/ckpt.pt --predict CEBPA KLF1+MAP2K6 --cells 500 --out pred.h5ad
    python scbig.py --ckpt runs/X/ckpt.pt --data rpe1.h5        score the model on another file (table 18)
    python scbig.py --ckpt runs/X/ckpt.pt --analyse             modules: enrichment, coactivation, attention
    torchrun --nproc-per-node 4 scbig.py --data norman.h5 --split additive
Ablations of table 6: --clustering kmeans or unordered, --encoder transformer, --corr-weight 0, --path-weight 0,
--ppi-weight 0, --condition-embedding learned.

Deviations from paper (P) or official code (C). "demo l2" is the l2 of the demo's test conditions, one run each, seed 0.
Those of 2 and 5 are of one autoencoder (1,500 steps of 256 cells), stage 2 alone, 300 steps, --structure-cells 64
--ode-steps 10 --ema 0.99. Runs that differ by 0.15 are not to be ranked.
 1. Token k is module k (P). C cuts the genes into runs of 64 that drift off the modules and end in an almost empty one.
 2. The time features reach 100 t; C's reach 10,000 t. Demo l2 with structure losses 4.77 against 7.34, without them
    4.85 against 4.92. Our reading, not tested further: features that fast let the network learn other velocities at
    just the time points of the fixed-step structure losses.
 3. Structure losses in every step, on 3 conditions of the batch (P). C's schedule is --structure alternate.
 4. The pathway transport is solved in the log domain, epsilon relative to the mean cost, gradient by the envelope
    theorem. C's kernel form underflows: far predictions have no loss and no gradient. 100 iterations (P), 50 in C.
 5. Structure losses compare with raw cells (C); --structure-target reconstruction passes these through the autoencoder.
    Without structure losses demo l2 is 4.85 (4.77 with them): the demo does not tell the two apart.
 6. Stage 1 is validated on 5% of the training and control cells, at most 1,000. C uses 300 controls and, failing these,
    test controls.
 7. One gene-embedding term in a token, as in C; P describes a second one. It is the mean over the module's genes.
    --module-weights own gives every module a projection of its own: on a 60-gene demo with a small model the training
    loss after 500 steps is 1.22, with the shared one 1.50.
 8. A perturbation without an embedding has a learned one. In C it is a zero vector, the same as no perturbation.
 9. The pooling masks each empty slot. C masks by the first slot, so that the order of a single's slots matters.
10. Embeddings are scaled to a root mean square of 1 and doses logarithmically to 0 to 1; C takes both raw.
11. Fixed midpoint steps; C integrates adaptively, cell by cell.
12. 20 conditions x 1,024 cells are one step, the same estimator as C's 20 accumulated ones. Every drawn control has a
    partner, drawn from its row of the plan; C draws both from the plan.
13. The model that predicts is the last one; C selects on validation conditions. Predictions are clamped at 0.
14. Genes that a file of embeddings lacks are fitted from expression by ridge; C draws them at random or sets them to 0.
15. Pathways need three genes of the panel, which fits P's 969; C takes those with one.
16. Ours: priors from training cells where no file is given, --ema (off in the paper preset), no dropout on attention
    weights (the fused kernels have none).
Modules of the demo (K = 8) against its planted programs, adjusted Rand index, simulator seeds 0 to 3, in brackets
k-means on the same vectors: 0.51 (0.22), 0.28 (0.10), 0.31 (0.12), 0.42 (0.28), where up- and downregulated genes of a
program are one class; 0.49 (0.43), 0.38 (0.30), 0.30 (0.22), 0.46 (0.52) where they are two, and there --ppi-weight 0
is better on three of the four seeds (0.74, 0.35, 0.43, 0.63): the graph of |correlation| joins both signs.
"""
import copy
import datetime
import difflib
import json
import math
import os
import platform
import resource
import signal
import sys
import time
import typing
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import h5py
import numpy as np
import scipy
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
from data import DataError

METHOD = "scbig"


@dataclass
class Config(data.DataConfig):
    """Every default is written here: the paper's configuration. PRESETS lists what --preset demo changes."""
    # run: the same flags in all four methods
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo; with --ckpt alone: the file to score it on
    split: str = "additive"         # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    fold: int = 0                   # which of the seeded splits
    folds: int = 10                 # number of folds of --split cv
    seed: int = 0                   # weights, batches and samples; the split depends on --fold alone
    preset: typing.Literal["", "demo", "paper"] = ""  # size; '' is demo for --data demo and paper otherwise
    out: str = ""                   # run folder; '' is runs/METHOD-DATA-SPLIT-fN-sN. With --predict: the file to write
    steps: int = 25_000             # length of the schedule, stage 2 (paper: 500,000 iterations, 20 to an update)
    stop_at: int = 0                # end at this step as Ctrl-C does; --resume goes on
    time_limit: float = 0           # end after so many minutes as Ctrl-C does; 0 is no limit
    batch_size: int = 20_480        # target cells per step and process (paper: 20 x 1,024)
    lr: float = 5e-5                # Adam, stage 2 (official)
    eval_every: int = 0             # score the validation conditions every so many steps; 0 never
    eval_cells: int = 1000          # cells generated per condition: as many as it really has, at most this
    device: str = ""                # cpu, cuda, cuda:1; '' takes the GPU if there is one
    dtype: typing.Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it
    compile: bool | None = None     # torch.compile; default on for CUDA, off for CPU
    resume: bool = False            # go on with the run in its folder
    ckpt: str = ""                  # with --predict, --data or --analyse: the checkpoint to use
    predict: tuple[str, ...] = ()   # conditions to predict: A A+B A+B+C, with covariates A@cov1,cov2
    controls: str = ""              # with --predict: AnnData file with your own control cells
    cells: int = 500                # with --predict: cells per condition
    all_genes: bool = False         # with --predict: every gene of the panel, not only the evaluation genes
    analyse: bool = False           # write what the modules mean: enrichment, coactivation, attention shift
    # data
    hvg: int = 2000                 # paper A.4.2
    # priors; each '' is made from training and control cells instead
    gene_embeddings: str = ""       # .npz (names, emb), .pt ({name: vector}), .tsv or .csv (paper: GeneCompass)
    ppi: str = ""                   # STRING protein.links, or a list of edges: gene, gene[, score]
    ppi_info: str = ""              # STRING protein.info, which names the proteins of --ppi
    pathways: str = ""              # .gmt, .gmt.gz or .gmt.zip (paper: Reactome)
    pert_embeddings: str = ""       # as --gene-embeddings, of perturbed genes or drugs (paper: ESM2, ChemBERTa)
    # modules
    clustering: typing.Literal["grc", "kmeans", "unordered"] = "grc"    # the others are ablations
    modules: int = 32               # K (paper)
    ppi_weight: float = 1.0         # of the interaction term in eq. 1 (official); 0 removes it (ablation)
    # stage 1: autoencoder
    encoder: typing.Literal["gcae", "transformer"] = "gcae"             # transformer: the plain one (ablation)
    module_weights: typing.Literal["shared", "own"] = "shared"          # one projection for all modules (official)
    width: int = 256                # d (paper table 16)
    layers: int = 3                 # of the encoder, and of the decoder (paper)
    heads: int = 8                  # attention heads (paper)
    inducing: int = 8               # M, inducing points per layer (paper)
    latent: int = 50                # latent dimension (paper)
    dropout: float = 0.1            # in both stages (official)
    pretrain_steps: int = 35_000    # at most (paper: 100 epochs of Norman)
    pretrain_batch_size: int = 256  # cells per step and process (paper)
    pretrain_lr: float = 1e-4       # Adam (official)
    pretrain_check: int = 1750      # steps between validations (official: 5 epochs); 0 never stops early
    patience: int = 4               # validations without improvement that end stage 1 (official)
    # stage 2: flow
    conditions_per_batch: int = 20  # cells are paired within each (official)
    hidden: int = 1024              # width of the velocity network (paper)
    condition_embedding: typing.Literal["fixed", "learned"] = "fixed"   # learned: a table, only for seen perturbations
    condition_dropout: float = 0.9  # per condition, not per cell (official, CellFlow's default)
    coupling: typing.Literal["ot", "independent"] = "ot"                # pairs of control and perturbed cells
    ot_epsilon: float = 1.0         # relative to the mean cost (official): almost independent
    sigma: float = 0.5              # noise on the path (official)
    corr_weight: float = 0.1        # eq. 9, module correlation (paper); 0 removes it (ablation)
    path_weight: float = 0.1        # eq. 9, pathway transport (paper); 0 removes it (ablation)
    structure: typing.Literal["joint", "alternate"] = "joint"           # in every step, or the official schedule
    structure_every: int = 50       # alternate: steps between structure updates (official: 1,000 iterations)
    structure_conditions: int = 3   # conditions per structure loss (official)
    structure_cells: int = 64       # cells of each (official)
    structure_target: typing.Literal["raw", "reconstruction"] = "raw"   # real cells, or these through the autoencoder
    ema: float = 0.0                # decay of averaged weights used for prediction; 0 is none (official)
    ode_steps: int = 10             # midpoint steps, in the structure losses and in sampling


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    cells, conditions = config.batch_size, config.conditions_per_batch
    if conditions < 1 or cells % conditions:
        raise DataError(f"--batch-size {cells} --conditions-per-batch {conditions}: the batch must hold as many cells "
                        "of one condition as of another")
    if not 1 <= config.structure_conditions <= conditions or config.structure_cells < 2:
        raise DataError(f"--structure-conditions {config.structure_conditions}: between 1 and --conditions-per-batch "
                        f"({conditions}), --structure-cells at least 2")
    if config.heads < 1 or config.width % config.heads:
        raise DataError(f"--width {config.width}: must be a multiple of --heads {config.heads}")
    positive = ("modules", "layers", "inducing", "latent", "hidden", "pretrain_steps", "pretrain_batch_size",
                "patience", "ode_steps", "pretrain_lr", "ot_epsilon", "structure_every")
    for name in positive + ("pretrain_check", "sigma", "ppi_weight", "corr_weight", "path_weight"):
        value = getattr(config, name)
        if value < 0 or (name in positive and value == 0):
            raise DataError(f"--{name.replace('_', '-')} {value}: must {'not be negative' if value else 'be positive'}")
    for name in ("dropout", "condition_dropout", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 0 and below 1")
    if config.ppi_info and not config.ppi:
        raise DataError("--ppi-info names the proteins of --ppi; give both")


PRESETS = {"paper": {}, "demo": dict(
    steps=500, batch_size=512, conditions_per_batch=8, lr=1e-3, modules=8, width=64, layers=2, heads=4, inducing=4,
    latent=32, dropout=0.0, pretrain_steps=1200, pretrain_batch_size=128, pretrain_lr=2e-3, pretrain_check=200,
    hidden=256, condition_dropout=0.0, structure_cells=32, ema=0.98, ode_steps=5, eval_cells=100)}
SAMPLING = {"ode_steps", "analyse"}     # flags that --ckpt may change
# times the number of processes is what a step sees
PER_PROCESS = ("batch_size", "conditions_per_batch", "structure_conditions", "pretrain_batch_size")


def variants(config):
    """{suffix of the row in the table: options of generate()}; the first is the method itself."""
    return {"": {}}


# -------------------------------------------------------------------------------- priors

def covered(run, flag, found, wanted, what):
    """Print which share of the panel a file knows; an error under 20%."""
    run.say(f"{flag}: knows {found:,} of {wanted:,} {what}")
    if found < 0.2 * wanted:
        raise DataError(f"{flag}: knows only {found:,} of {wanted:,} {what}; give a file of the same species and "
                        "naming (STRING needs --ppi-info), or leave the flag out: a stand-in is made from the data")


def expression_priors(dataset, width=128, effects=64, neighbours=20):
    """Gene vectors (G, p) and a co-expression graph (G, G), from training and control cells only.

    Vectors: principal axes of the standardised genes, and those of the effects of the training conditions, each scaled
    to length 1 per gene. Graph: mutual nearest neighbours by |correlation|, a cell's total expression held fixed."""
    corr = data.gene_statistics(dataset)[2].cpu()
    delta = torch.from_numpy(data.training_effects(dataset)[1].T.astype(np.float32))               # (G, n)
    blocks = [principal_rows(corr, width, 0.5), principal_rows(delta, effects, 1.0)]
    vectors = F.normalize(torch.cat([F.normalize(block, dim=1) for block in blocks], dim=1), dim=1)

    with_total, G = corr.sum(1) / corr.sum().clamp(min=1e-12).sqrt(), len(corr)
    partial = (corr - torch.outer(with_total, with_total)).abs()
    partial /= (1 - with_total ** 2).clamp(min=1e-3).sqrt()[:, None] * (1 - with_total ** 2).clamp(min=1e-3).sqrt()
    partial.fill_diagonal_(0)
    strength, near = partial.topk(min(neighbours, G - 1), dim=1)
    graph = torch.zeros(G, G).scatter_(1, near, (strength > 0).float())
    return vectors, graph * graph.T


def principal_rows(matrix, rank, power):
    """Rows of U S^power of a truncated SVD: (n, m) -> (n, rank)."""
    u, s, _ = torch.svd_lowrank(matrix, q=min(rank, *matrix.shape), niter=6)
    return u * s ** power


def load_priors(run):
    """Everything that the model takes over from files or training cells, as tensors to be kept with its weights:
    modules (G,), module_vectors (K, p), mean (G,), pathways (Q, G), pert_vectors (N, p'), pert_learned (N,)."""
    config, dataset, panel = run.config, run.dataset, run.panel
    symbol, G = [gene.upper() for gene in panel.genes], len(panel.genes)
    if config.modules > G:
        raise DataError(f"--modules {config.modules}: there are only {G} genes; choose fewer")
    vectors, graph = expression_priors(dataset)
    if config.gene_embeddings:
        table = data.read_vectors(config.gene_embeddings, "--gene-embeddings")
        there = torch.tensor([s in table for s in symbol])
        covered(run, "--gene-embeddings", int(there.sum()), G, "genes of the panel")
        given = torch.from_numpy(np.stack([table[s] for s in symbol if s in table]))
        own, target = vectors[there], given - given.mean(0)     # genes that the file lacks: ridge from expression
        weight = torch.linalg.solve(own.T @ own + torch.eye(own.shape[1]), own.T @ target)
        vectors = given.mean(0) + vectors @ weight
        vectors[there] = given
    if config.ppi:
        column, graph = {s: i for i, s in enumerate(symbol)}, torch.zeros(G, G)
        pairs = data.read_edges(config.ppi, config.ppi_info)
        inside = torch.tensor([(column[a], column[b]) for a, b in pairs if a in column and b in column and a != b])
        covered(run, "--ppi", len(set(symbol) & {gene for pair in pairs for gene in pair}), G, "genes of the panel")
        i, j = inside.reshape(-1, 2).T.long()
        graph[i, j] = graph[j, i] = 1
    elif not config.gene_embeddings and config.clustering == "grc":
        run.say("note: without --gene-embeddings and --ppi both terms of the clustering cost come from the same "
                "expression and tell it much the same")
    modules, changed = gene_modules(vectors, graph, config)
    if changed:
        run.say(f"clustering: {config.modules} modules, genes that changed module in each step: "
                + ", ".join(map(str, changed)))

    if config.pathways:
        sets = list(data.read_gmt(config.pathways).values())
        covered(run, "--pathways", len(set(symbol) & set().union(*sets)), G, "genes of the panel")
        pathways = torch.tensor([[s in genes for s in symbol] for genes in sets], dtype=torch.float32)
    else:                                       # clusters at three granularities
        labels = [kmeans(F.normalize(vectors, dim=1), min(G, n * config.modules)) for n in (1, 2, 4)]
        pathways = torch.cat([F.one_hot(label).T.float() for label in labels])
    pathways = pathways[pathways.sum(1) >= 3]   # as the paper, by its count of pathways (specification 6.2)
    if config.path_weight and not len(pathways):
        raise DataError("no pathway has three genes of the panel; give another --pathways, or --path-weight 0")

    names = token_names(panel, config)
    tokens = {name: i for i, name in enumerate(names)}
    table = {s: v.numpy() for s, v in zip(symbol, vectors)}
    if config.pert_embeddings:
        table = data.read_vectors(config.pert_embeddings, "--pert-embeddings")
        asked = {perturbation_token(p, config, tokens)[0] for p in panel.perturbations}
        found = [i for i in asked if names[i].upper() in table]
        covered(run, "--pert-embeddings", len(found), len(asked), "perturbations")
        trained = {perturbation_token(p, config, tokens)[0] for p in panel.trained}
        if lost := sorted(names[i] for i in asked - trained - set(found)):
            run.say(f"note: {len(lost)} perturbations are neither in --pert-embeddings nor in a training condition "
                    f"({', '.join(lost[:5])}): their embeddings are untrained")
    elif config.condition_embedding == "learned":
        table = {"": np.zeros(128, np.float32)}
    fixed = torch.tensor([n.upper() in table for n in names])
    pert_vectors = torch.zeros(len(names), len(next(iter(table.values()))))
    if fixed.any():
        pert_vectors[fixed] = torch.from_numpy(np.stack([table[n.upper()] for n in names if n.upper() in table]))
    pert_vectors /= pert_vectors.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    learned = torch.where(fixed, -1, (~fixed).cumsum(0) - 1)
    member = F.one_hot(modules, int(modules.max()) + 1).float()                   # (G, K)
    mean = torch.from_numpy(data.gene_moments(dataset.X, dataset.fit_rows)[0] / len(dataset.fit_rows)).float()
    return {"modules": modules, "module_vectors": member.T @ vectors / member.sum(0)[:, None], "mean": mean,
            "pathways": pathways / pathways.sum(1, keepdim=True), "pert_vectors": pert_vectors, "pert_learned": learned}


# -------------------------------------------------------------------------------- gene modules

def sinkhorn(cost, epsilon, iterations, columns=None, tolerance=0.0):
    """Entropic transport plans, fp32 or better: cost (..., n, m) -> plan (..., n, m).

    Rows are uniform and met exactly, columns uniform or as given (m,). epsilon: number or (..., 1, 1). One iteration
    in ten is in the log domain, which holds at any epsilon; the others scale the plan that it gives, for less work: a
    step shrinks no scaling below 1/n or 1/m of what it was, so that nine stay in the range of floats. tolerance: stop
    when the columns are met this well, checked every ten iterations; 0 never looks, hence never syncs."""
    with torch.autocast(cost.device.type, enabled=False):
        kernel = -cost.to(torch.promote_types(cost.dtype, torch.float32)) / epsilon
        n, m = kernel.shape[-2:]
        b = kernel.new_full((m,), 1 / m) if columns is None else columns.to(kernel)
        f = kernel.new_zeros(*kernel.shape[:-1], 1)
        for i in range(0, iterations, 10):
            g = b.log() - (kernel + f).logsumexp(-2, keepdim=True)                   # (..., 1, m)
            f = -math.log(n) - (kernel + g).logsumexp(-1, keepdim=True)              # (..., n, 1)
            plan = (kernel + f + g).exp()
            u, v = torch.ones_like(f), torch.ones_like(g)
            for _ in range(min(10, iterations - i) - 1):
                v = b / (u.mT @ plan)
                u = 1 / (n * (plan @ v.mT))
            f, g = f + u.log(), g + v.log()
            if tolerance and ((kernel + f + g).exp().sum(-2) - b).abs().sum(-1).max() < tolerance:
                break
        return (kernel + f + g).exp()


def kmeans(x, K, seed=42, restarts=10, iterations=300):
    """Labels (n,) of the best of several Lloyd runs from k-means++ starts (scikit-learn's defaults): x (n, p)."""
    generator, best, labels = torch.Generator().manual_seed(seed), math.inf, None
    norm = x.square().sum(1, keepdim=True)

    def distance(centre):
        return (norm - 2 * x @ centre.T + centre.square().sum(1)).clamp(min=0)
    for _ in range(restarts):
        centre = x[torch.randint(len(x), (1,), generator=generator)]
        nearest = distance(centre)[:, 0]
        for _ in range(K - 1):
            centre = torch.cat([centre, x[torch.multinomial(nearest + 1e-12, 1, generator=generator)]])
            nearest = torch.minimum(nearest, distance(centre[-1:])[:, 0])
        label = None
        for _ in range(iterations):
            last, (cost, label) = label, distance(centre).min(1)
            if last is not None and torch.equal(last, label):
                break
            member = F.one_hot(label, K).to(x)
            count = member.sum(0)[:, None]
            centre = torch.where(count > 0, member.T @ x / count.clamp(min=1), centre)
        if (inertia := cost.sum().item()) < best:
            best, labels = inertia, label
    return labels


def gene_modules(vectors, graph, config):
    """Module of every gene (G,), and how many genes changed it in each alternation (algorithm 1, eq. 1).

    vectors (G, p), graph (G, G) 0 or 1. Cost of a gene in a module: distance to its centroid, plus the share of the
    module's genes that it does not interact with; balanced by Sinkhorn, then rounded within capacities."""
    G, K = len(vectors), config.modules
    if config.clustering == "unordered":
        return torch.arange(G) * K // G, []
    e = F.normalize(vectors, dim=1)
    label, changed = kmeans(e, K), []
    if config.clustering == "kmeans":
        return label.unique(return_inverse=True)[1], []                  # without empty modules
    biggest = torch.argsort(torch.bincount(label, minlength=K), descending=True, stable=True)[:G % K]
    capacity = torch.full((K,), G // K)
    capacity[biggest] += 1
    graph, centre = graph.to_sparse(), torch.zeros(K, e.shape[1])
    for _ in range(3):
        member = F.one_hot(label, K).float()                             # (G, K)
        size = member.sum(0)
        centre = torch.where(size[:, None] > 0, F.normalize(member.T @ e, dim=1), centre)
        semantic = 1 - e @ centre.T
        interacting = torch.sparse.mm(graph, member) / size.clamp(min=1)
        cost = (semantic / semantic.max() + config.ppi_weight * (1 - interacting).clamp(0, 1)).double()
        plan = sinkhorn(cost, 0.1, 1000, capacity.double() / G, tolerance=1e-9)
        last, label = label, round_plan(plan, cost, capacity)
        changed.append(int((label != last).sum()))
    return label, changed


def round_plan(plan, cost, capacity):
    """Labels (G,) of a plan (G, K): the largest entries first, ties by lower cost, each gene once, no module over its
    capacity. The capacities sum to G, so every gene is placed."""
    G, K = plan.shape
    i, k = np.divmod(np.arange(G * K), K)
    order = np.lexsort((k, i, cost.flatten().numpy(), -plan.flatten().numpy()))
    room, label = capacity.tolist(), [-1] * G
    for gene, module in zip(i[order].tolist(), k[order].tolist()):
        if label[gene] < 0 and room[module]:
            label[gene] = module
            room[module] -= 1
    return torch.tensor(label)


# -------------------------------------------------------------------------------- model

class Attention(nn.Module):
    """Multi-head attention of x on source. No bias on K: it would cancel in the softmax; none on Q, V (official)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def split(self, x):                                                  # (B, T, d) -> (B, H, T, d/H)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, source):
        """x (B or 1, T, d), source (B, S, d) -> (B, T, d)."""
        q, k, v = (self.split(a) for a in (self.q(x), *self.kv(source).chunk(2, dim=-1)))
        a = F.scaled_dot_product_attention(q.expand(len(k), -1, -1, -1), k, v)
        return self.out(a.transpose(1, 2).flatten(2))

    def weights(self, x, source):
        """How much of the attention goes to each token of source, over heads and queries: (B, S), rows sum to 1."""
        q, k = self.split(self.q(x)), self.split(self.kv(source).chunk(2, dim=-1)[0])
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1).mean((1, 2))


class Block(nn.Module):
    """One layer on module tokens (eq. 3), post-norm: inducing points attend to the modules (compress), to each other
    (process), and the modules to them (broadcast); or plain self-attention."""

    def __init__(self, config):
        super().__init__()
        d = config.width
        self.points = nn.Parameter(0.02 * torch.randn(1, config.inducing, d)) if config.encoder == "gcae" else None
        if self.points is not None:
            self.compress, self.process = Attention(d, config.heads), Attention(d, config.heads)
            self.norm_compress, self.norm_process = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.broadcast = Attention(d, config.heads)
        self.norm_broadcast, self.norm_mlp = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(approximate="tanh"), nn.Dropout(config.dropout),
                                 nn.Linear(2 * d, d), nn.Dropout(config.dropout))

    def forward(self, h):
        """(B, K, d) -> (B, K, d)."""
        u = h
        if self.points is not None:
            u = self.norm_compress(self.points + self.compress(self.points, h))
            u = self.norm_process(u + self.process(u, u))
        h = self.norm_broadcast(h + self.broadcast(h, u))
        return self.norm_mlp(h + self.mlp(h))

    def attention(self, h):
        """Share of the attention that each module receives: (B, K, d) -> (B, K)."""
        return self.broadcast.weights(h, h) if self.points is None else self.compress.weights(self.points, h)


class Autoencoder(nn.Module):
    """Gene-Cluster-Aware autoencoder: token k is module k (eq. 2-5). Expression (B, G) <-> latent (B, D)."""

    def __init__(self, config, modules, module_vectors, mean):
        super().__init__()
        d, K, (G,) = config.width, len(module_vectors), modules.shape
        for name, value in (("module_of", modules), ("module_vectors", module_vectors), ("mean", mean)):
            self.register_buffer(name, value)
        order = torch.argsort(modules, stable=True)
        size = torch.bincount(modules, minlength=K)
        L = int(size.max())
        slot = modules[order] * L + torch.arange(G) - (size.cumsum(0) - size)[modules[order]]
        gather, place = torch.full((K * L,), G), torch.empty(G, dtype=torch.long)
        gather[slot], place[order] = order, slot                         # G stands for an empty slot, holding 0
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("place", place, persistent=False)
        own = K if config.module_weights == "own" else 1
        self.embed = nn.Parameter(torch.randn(own, L, d) / math.sqrt(L))
        self.head = nn.Parameter(torch.randn(own, d, L) / math.sqrt(d))
        self.embed_bias, self.head_bias = nn.Parameter(torch.zeros(own, 1, d)), nn.Parameter(torch.zeros(own, 1, L))
        self.identity = nn.ModuleList(nn.Sequential(nn.Linear(module_vectors.shape[1], d, bias=False),
                                                    nn.LayerNorm(d, eps=1e-6)) for _ in range(2))
        self.encoder, self.decoder = (nn.ModuleList(Block(config) for _ in range(config.layers)) for _ in range(2))
        self.to_latent, self.from_latent = nn.Linear(d, config.latent), nn.Linear(config.latent, d)
        self.drop = nn.Dropout(config.dropout)

    def tokens(self, x):
        """(B, G) -> (B, K, d): expression of the module's genes, plus who the module is (eq. 2)."""
        x = F.pad(x - self.mean, (0, 1)).index_select(1, self.gather).unflatten(1, (len(self.module_vectors), -1))
        x = x.transpose(0, 1) @ self.embed + self.embed_bias             # (K, B, d)
        return self.drop(x.transpose(0, 1) + self.identity[0](self.module_vectors))

    def encode(self, x):
        """(B, G) log1p CP10k -> (B, D) float32."""
        h = self.tokens(x)
        for block in self.encoder:
            h = block(h)
        return self.to_latent(h.mean(1)).float()                         # eq. 4

    def decode(self, z):
        """(B, D) -> (B, G) float32, which may be negative."""
        h = self.drop(self.from_latent(z)[:, None] + self.identity[1](self.module_vectors))
        for block in self.decoder:
            h = block(h)
        x = h.transpose(0, 1) @ self.head + self.head_bias               # (K, B, L)
        return x.transpose(0, 1).flatten(1).index_select(1, self.place).float() + self.mean

    def forward(self, x):
        return self.decode(self.encode(x))

    def attention(self, x):
        """Share of the encoder's attention that each module receives, over layers: (B, G) -> (B, K)."""
        h, share = self.tokens(x), []
        for block in self.encoder:
            share.append(block.attention(h))
            h = block(h)
        return torch.stack(share).mean(0)


class Flow(nn.Module):
    """Velocity v(z_t | t, condition) in latent space: CellFlow's network, its first joint layer split by input, so
    that the condition's part is computed per condition and, over an ODE, the time's part per time point."""

    def __init__(self, config, pert_vectors, pert_learned, covariates):
        """pert_vectors (N, p) of every token; where pert_learned (N,) is not -1, the row of a learned table instead.
        covariates: number of one-hot entries."""
        super().__init__()
        d, h, p = 64, config.hidden, pert_vectors.shape[1]
        self.dropout, self.steps = config.dropout, config.ode_steps
        self.register_buffer("pert_vectors", pert_vectors)
        self.register_buffer("pert_learned", pert_learned)
        self.learned = nn.Parameter(torch.randn(max(1, int(pert_learned.max()) + 1), p))
        self.dose = Dose(p) if config.dose_key else None
        self.query = nn.Parameter(torch.randn(d))
        self.kv = nn.Linear(256 if config.dose_key else p, 2 * d, bias=False)
        self.pooled = nn.Linear(d + covariates, 256)
        self.time_mlp = nn.Sequential(nn.Linear(1024, h), nn.SiLU(), nn.Linear(h, h))
        self.state = nn.ModuleList([nn.Linear(config.latent, h), nn.Linear(h, h)])
        self.join_time, self.join_state, self.join_condition = nn.Linear(h, h), nn.Linear(h, h, bias=False), \
            nn.Linear(256, h, bias=False)
        self.joint, self.out = nn.Linear(h, h), nn.Linear(h, config.latent)

    def condition(self, tokens, mask, dose, covariates):
        """Attention pooling over the slots that hold a perturbation: tokens, mask, dose (C, slots) -> (C, 256)."""
        row = self.pert_learned[tokens]
        a = torch.where(row[..., None] < 0, self.pert_vectors[tokens], self.learned[row.clamp(min=0)])  # (C, slots, p)
        if self.dose is not None:
            a = self.dose(a, dose)
        k, v = (x.unflatten(-1, (8, -1)).transpose(1, 2) for x in self.kv(a).chunk(2, dim=-1))          # 8 heads
        q = self.query.to(k).view(1, 8, 1, -1).expand(len(k), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=1 / 8)    # official scale
        return self.pooled(torch.cat([pooled.flatten(1), covariates], dim=1))

    def time(self, t):
        """(...) times in [0, 1] -> (..., h): their part of the joint layer."""
        angle = 100 * t[..., None] * torch.exp(-math.log(100) * torch.arange(512, device=t.device) / 512)
        return self.join_time(self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1)))

    def velocity(self, z, time, condition, training=False):
        """z (C, b, D), time (C, b, h) or (h,), condition (C, 1, h), both already in the joint layer -> (C, b, D)."""
        def act(x):
            return F.dropout(F.silu(x), self.dropout, training)
        x = act(self.state[1](act(self.state[0](z))))
        x = act(self.join_state(x) + time + condition)
        return self.out(act(self.joint(x))).float()

    def integrate(self, z, condition):
        """Midpoint rule from t=0 to 1: control latents (C, b, D), condition (C, 256) -> perturbed latents."""
        K, condition = self.steps, self.join_condition(condition)[:, None]
        time = self.time(torch.linspace(0, 1, 2 * K + 1, device=z.device))
        for i in range(0, 2 * K, 2):
            middle = z + self.velocity(z, time[i], condition) / (2 * K)
            z = z + self.velocity(middle, time[i + 1], condition) / K
        return z

    def forward(self, z_t, t, condition, keep=None, start=None, chosen=None):
        """Velocity (C, b, D) at z_t (C, b, D) and t (C, b), and the end points of start (S, b', D), control latents of
        the chosen (S,) conditions, without dropout. keep (C, 256): dropout mask of the condition. Either can be left
        out."""
        c, v, end = self.condition(*condition), None, None
        if z_t is not None:
            v = self.velocity(z_t, self.time(t), self.join_condition(c * keep)[:, None], self.training)
        if start is not None:
            end = self.integrate(start, c[chosen])
        return v, end


class Dose(nn.Module):
    """A perturbation's vector, modulated by its dose (official; doses here between 0 and 1, see scaled_dose)."""

    def __init__(self, width):
        super().__init__()
        self.embed, self.norm = nn.Linear(width, 256), nn.LayerNorm(256)
        self.hidden = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.scale, self.shift = nn.Linear(128, 256), nn.Linear(128, 256)

    def forward(self, a, dose):
        """a (C, slots, p), dose (C, slots) -> (C, slots, 256)."""
        d = dose[..., None]
        h = self.hidden(d)
        return self.norm(self.embed(a) * (1 + 0.5 * self.scale(h).tanh()) + d * self.shift(h))


class ScBIG(nn.Module):
    """Autoencoder and flow, with all that they know of the data and the priors as buffers."""

    def __init__(self, config, panel, priors):
        super().__init__()
        self.autoencoder = Autoencoder(config, priors["modules"], priors["module_vectors"], priors["mean"])
        covariates = sum(map(len, panel.covariates.values()))
        self.flow = Flow(config, priors["pert_vectors"], priors["pert_learned"], covariates)
        self.register_buffer("pathways", priors["pathways"])             # (Q, G), rows sum to 1
        for layer in self.modules():
            if isinstance(layer, nn.Linear):                             # LeCun normal (official)
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


# -------------------------------------------------------------------------------- losses

def correlation(x, member):
    """Correlation between modules over the cells: x (S, n, G), member (G, K) averaging -> (S, K, K)."""
    with torch.autocast(x.device.type, enabled=False):
        y = x @ member
        y = y - y.mean(1, keepdim=True)
        y = (y / y.square().mean(1, keepdim=True).clamp(min=1e-12).sqrt()).clamp(-10, 10)
        return y.transpose(1, 2) @ y / y.shape[1]


def correlation_loss(pred, real, member):
    """L_corr (eq. 7): Frobenius distance of the two correlation matrices over K, mean over conditions (S, n, G)."""
    difference = correlation(pred, member) - correlation(real, member)
    return torch.linalg.vector_norm(difference, dim=(1, 2)).mean() / member.shape[1]


def pathway_loss(pred, real, pathways, epsilon=0.1, iterations=100):
    """L_path (eq. 8): transport cost between the pathway activities of predicted and real cells, mean over conditions.

    pred (S, n, G), real (S, m, G), pathways (Q, G) with rows summing to 1. Cost: squared distance over Q; epsilon is
    relative to its mean. The gradient takes the plan as constant (envelope theorem): exact for the entropic value."""
    with torch.autocast(pred.device.type, enabled=False):
        a, b = pred @ pathways.T, real @ pathways.T      # (S, n, Q), (S, m, Q)
        cost = squared_distance(a, b) / len(pathways)
        fixed = cost.detach()
        plan = sinkhorn(fixed, epsilon * fixed.mean((1, 2), keepdim=True).clamp(min=1e-12), iterations)
        return (plan * cost).sum((1, 2)).mean()


def squared_distance(a, b):
    """(S, n, p), (S, m, p) -> (S, n, m). Centred first: the product of large means would cost digits."""
    centre = b.detach().mean(1, keepdim=True)
    a, b = a - centre, b - centre
    norms = a.square().sum(-1)[:, :, None] + b.square().sum(-1)[:, None]
    return (norms - 2 * a @ b.transpose(1, 2)).clamp(min=0)


def ot_partners(z0, z1, u, epsilon):
    """For every control latent a partner among the perturbed ones, drawn from its row of the entropic plan of their
    condition: z0, z1 (C, b, D), u (C, b) uniform -> z1 reordered, with repetition. Cost: squared distance, over its
    mean. The controls are random draws already, so the pairs follow the whole plan (official: draws both)."""
    with torch.autocast(z0.device.type, enabled=False):
        cost = squared_distance(z0, z1)
        plan = sinkhorn(cost, epsilon * cost.mean((1, 2), keepdim=True), OT_ITERATIONS)
        mass = plan.cumsum(-1)
        partner = torch.searchsorted(mass, u[..., None] * mass[..., -1:]).clamp(max=z1.shape[1] - 1)     # (C, b, 1)
        return z1.gather(1, partner.expand(-1, -1, z1.shape[2]))


OT_ITERATIONS = 10      # enough at epsilon 1, where official runs end after one check


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(model, control, condition, integrate=None):
    """One perturbed cell per control cell (n, G) log1p CP10k, of one condition (slots() of it): encode, integrate the
    flow, decode. Returns (n, G) float32, clamped at 0."""
    z = model.autoencoder.encode(control)
    z = (integrate or model.flow.integrate)(z[None], model.flow.condition(*condition))
    return model.autoencoder.decode(z[0]).clamp(min=0)


def token_names(panel, config):
    """What can have an embedding: the genes of the panel, then the perturbations that are none, without their dose."""
    return list(panel.genes) + sorted({base_and_dose(p, config)[0] for p in panel.outside()})


def base_and_dose(name, config):
    """'drug:10' -> ('drug', 10.0) with --dose-key; other names have no dose."""
    base, colon, dose = name.rpartition(":")
    try:
        return (base, float(dose)) if colon and config.dose_key else (name, None)
    except ValueError:
        return name, None


def perturbation_token(name, config, tokens):
    """Token of a perturbation or gene, and its dose; tokens: {name: number}."""
    base, dose = base_and_dose(name, config)
    return tokens[name if name in tokens else base], dose


def slots(groups, panel, config):
    """What the flow is told of groups (CONDITION or CONDITION@COVARIATE): tokens, mask, dose (C, slots) and covariates
    (C, V) one-hot. Doses are log(1 + dose) over the file's highest, 1 where there is none. A covariate value that the
    training file did not have is all zeros."""
    tokens = {name: i for i, name in enumerate(token_names(panel, config))}
    highest = max([d for p in panel.perturbations if (d := base_and_dose(p, config)[1]) is not None], default=1.0)
    parts = [group.partition("@")[0].split("+") for group in groups]
    shape = len(parts), max(2, max(map(len, parts)))
    token, mask, dose = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool), torch.ones(shape)
    for i, names in enumerate(parts):
        for j, name in enumerate(names):
            token[i, j], d = perturbation_token(name, config, tokens)
            mask[i, j] = True
            dose[i, j] = 1.0 if d is None else math.log1p(d) / math.log1p(highest)
    return token, mask, dose, panel.one_hot(groups, strict=False)


def known(panel, config):
    """Names that can be predicted, and those among them whose embedding no training condition has reached."""
    if config.condition_embedding == "learned":
        return set(panel.perturbations), set(panel.perturbations) - set(panel.trained)
    names = set(panel.perturbations) | set(panel.genes)
    trained = {base_and_dose(p, config)[0] for p in panel.trained}
    outside = {p for p in panel.outside() if base_and_dose(p, config)[0] not in trained}
    return names, set() if config.pert_embeddings else outside           # of a file, load_priors has said what it lacks


PRIORS = {"modules": "autoencoder.module_of", "module_vectors": "autoencoder.module_vectors",
          "mean": "autoencoder.mean", "pathways": "pathways",
          "pert_vectors": "flow.pert_vectors", "pert_learned": "flow.pert_learned"}     # their names in a checkpoint


def load_model(config, panel, saved):
    """The model that predicts, from what a checkpoint has saved."""
    if "stopping" in saved:
        raise DataError("the run of this checkpoint is still in stage 1, its flow untrained; go on with --resume")
    model = ScBIG(config, panel, {name: saved["model"][key] for name, key in PRIORS.items()})
    model.load_state_dict(saved["model"])
    if "ema" in saved:
        model.flow.load_state_dict(saved["ema"])
    return model


def generate(model, run, group, control, columns, seed):
    """Predicted cells of one group (CONDITION or CONDITION@COVARIATE), from as many control cells (n, G) log1p CP10k,
    for columns (E,) of the panel, ascending: (n, E) float32. Nothing is drawn: the seed has chosen the controls."""
    condition = [a.to(run.device) for a in slots([group], run.panel, run.config)]
    columns, out = torch.as_tensor(columns, device=run.device), []
    for cells in np.array_split(control, math.ceil(len(control) / 1024)):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            x = sample(model, torch.from_numpy(cells).to(run.device), condition, run.compiled(model.flow.integrate))
        out.append(x.index_select(1, columns).cpu())
    return torch.cat(out).numpy()


# -------------------------------------------------------------------------------- training

class Stopping:
    """Early stopping of stage 1: the best validation loss, its weights, and the checks since."""

    def __init__(self, module):
        self.best, self.checks, self.module = torch.tensor(math.inf, dtype=torch.float64), 0, module
        self.weights = copy.deepcopy(module.state_dict())

    def update(self, loss):
        self.checks += 1
        if loss < self.best:
            self.best, self.checks = loss.cpu(), 0
            self.weights = copy.deepcopy(self.module.state_dict())

    def state_dict(self):
        return {"best": self.best, "checks": self.checks, "weights": self.weights}

    def load_state_dict(self, state):
        self.best, self.checks, self.weights = state["best"], state["checks"], state["weights"]


def pretrain(run, state, model, sampler):
    """Stage 1: reconstruction (eq. 5), validated on training and control cells set aside, the best weights kept.
    Returns the seconds that training has taken so far."""
    config, dataset = run.config, run.dataset
    optimizer = torch.optim.Adam(model.autoencoder.parameters(), lr=config.pretrain_lr, fused=True)
    stopping = Stopping(model.autoencoder)
    saved = {"model": model, "optimizer": optimizer, "stopping": stopping}
    start, seconds = restore(run, state, saved, sampler) if state else (-config.pretrain_steps, 0.0)
    rows = torch.from_numpy(np.random.default_rng(config.seed).permutation(dataset.fit_rows)).to(run.device)
    n = min(1000, len(rows) // 20) if config.pretrain_check else 0
    held, rows = rows[:n], rows[n:]
    net, B = run.wrap(model.autoencoder), config.pretrain_batch_size
    progress = Progress(run, start, seconds, B * run.world, -config.pretrain_steps, 0, "pretraining step")
    for step in range(start + 1, 1):
        if stopping.checks >= config.patience:
            run.say(f"autoencoder: no better in {config.patience} validations, best {stopping.best:.4f}; stage 1 ends")
            break
        pick = torch.randint(len(rows), (B * run.world,), generator=sampler, device=run.device)
        x = dataset.gather(rows[pick[run.rank * B:(run.rank + 1) * B]])
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            loss = F.mse_loss(net(x), x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        if n and (step % config.pretrain_check == 0 or step == 0):
            model.eval()
            stopping.update(reconstruction_error(run, model.autoencoder, held))
            model.train()
        progress.update(step, loss=loss)
        if (stop := progress.should_stop(step)) or progress.checkpoint_due():
            progress.check_finite(step)
            save_checkpoint(run, step, progress.seconds(), saved, sampler)
        if stop:
            progress.stopped(step)
    if n:
        model.autoencoder.load_state_dict(stopping.weights)
    return progress.seconds()


@torch.no_grad()
def reconstruction_error(run, autoencoder, rows):
    """Mean squared error over some cells, the same on all processes."""
    total = sum((autoencoder(x) - x).double().square().sum() for x in map(run.dataset.gather, rows.split(1024)))
    error = total / (len(rows) * len(run.dataset.genes))
    if run.world > 1:
        dist.broadcast(error, 0)
    return error


def train(run, state):
    """Train both stages and return the model that predicts; Ctrl-C and --stop-at save and end the program before."""
    config, dataset, panel = run.config, run.dataset, run.panel
    C, b, S = config.conditions_per_batch, config.batch_size // config.conditions_per_batch, config.structure_conditions

    # model and stage 1; a resumed run takes the priors over from its checkpoint
    torch.manual_seed(config.seed)
    priors = {name: state["saved"]["model"][key] for name, key in PRIORS.items()} if state else load_priors(run)
    model = ScBIG(config, panel, priors).to(run.device)
    sampler = torch.Generator(run.device).manual_seed(config.seed)
    torch.manual_seed(config.seed + run.rank)                            # dropout differs between processes
    resumed = state and "stopping" not in state["saved"]                 # in stage 2
    before = 0.0 if resumed else pretrain(run, state, model, sampler)

    # stage 2: the flow alone is trained
    optimizer = torch.optim.Adam(model.flow.parameters(), lr=config.lr, fused=True)
    saved = {"model": model, "optimizer": optimizer}
    if config.structure == "alternate":                                  # its moments are its own (official)
        saved["structure_optimizer"] = torch.optim.Adam(model.flow.parameters(), lr=config.lr, fused=True)
    predictor = copy.deepcopy(model) if config.ema else model
    if config.ema:
        saved["ema"] = predictor.flow
    start, seconds = restore(run, state, saved, sampler) if resumed else (0, before)
    autoencoder = copy.deepcopy(model.autoencoder).eval().requires_grad_(False)
    predictor.autoencoder.load_state_dict(autoencoder.state_dict())
    if start == 0:
        save_checkpoint(run, 0, seconds, saved, sampler)
        write_modules(run, model)
    net = run.wrap(model.flow)

    # latents of all training cells, once; training conditions: index of their group, and what the flow is told of them
    latents = torch.zeros(dataset.X.shape[0], config.latent, device=run.device)
    with torch.no_grad():
        for rows in torch.from_numpy(dataset.fit_rows).to(run.device).split(4096):
            latents[rows] = autoencoder.encode(dataset.gather(rows))
    names = dataset.part("train")
    group = torch.tensor([dataset.groups.index(g) for g in names], device=run.device)
    told = [a.to(run.device) for a in slots(names, panel, config)]
    modules = autoencoder.module_of
    member = F.one_hot(modules).float() / torch.bincount(modules)        # (G, K): mean over a module's genes
    run.say(f"{sum(p.numel() for p in model.autoencoder.parameters()):,} parameters in the autoencoder, "
            f"{sum(p.numel() for p in model.flow.parameters()):,} in the flow; {len(names)} training conditions, "
            f"{len(panel.genes):,} genes, {member.shape[1]} modules, {len(model.pathways):,} pathways; "
            f"latents have a standard deviation of {latents[dataset.fit_rows].std(0).mean():.2f}")

    def structure_losses(end, real):
        """L_corr and L_path of end points (S, n, D) against real cells (S, n, G)."""
        pred = autoencoder.decode(end.flatten(0, 1)).unflatten(0, end.shape[:2])
        if config.structure_target == "reconstruction":
            with torch.no_grad():
                real = autoencoder(real.flatten(0, 1)).unflatten(0, real.shape[:2])
        zero = end.new_zeros(())
        return (correlation_loss(pred, real, member) if config.corr_weight else zero,
                pathway_loss(pred, real, model.pathways) if config.path_weight else zero)

    cells, m = C * b * run.world, config.structure_cells
    mine, my_C, my_S = (slice(run.rank * n, (run.rank + 1) * n) for n in (C * b, C, S))
    my_m = slice(run.rank * S * m, (run.rank + 1) * S * m)
    spread = torch.arange(S * run.world, device=run.device) * C // S     # which conditions of the batch: every C/S-th
    structured = config.corr_weight + config.path_weight > 0
    corr = path = torch.zeros((), device=run.device)
    progress = Progress(run, start, seconds, cells)
    for step in range(start + 1, config.steps + 1):
        # batch: every process draws all of it and keeps its share, so that N processes equal one with N times the batch
        pick = torch.randint(len(group), (C * run.world,), generator=sampler, device=run.device)
        target = dataset.draw(group[pick], b, sampler)[mine]
        source = dataset.draw(dataset.controls_for(group[pick]), b, sampler)[mine]
        t, u = torch.rand(2, C * run.world, b, generator=sampler, device=run.device)[:, my_C]
        noise = torch.randn(C * run.world, b, config.latent, generator=sampler, device=run.device)[my_C]
        keep = torch.rand(C * run.world, 256, generator=sampler, device=run.device)[my_C] >= config.condition_dropout
        due = structured and (config.structure == "joint" or step % config.structure_every == 0)
        chosen = group[pick[spread]]
        beginning = latents[dataset.draw(dataset.controls_for(chosen), m, sampler)[my_m]].unflatten(0, (S, m))
        real = dataset.gather(dataset.draw(chosen, m, sampler)[my_m]).unflatten(0, (S, m)) if due else None
        condition = [a[pick[my_C]] for a in told]

        # pairs of control and perturbed latents, a point between them, and the velocity to learn (eq. 6)
        z0, z1 = latents[source].unflatten(0, (C, b)), latents[target].unflatten(0, (C, b))
        if config.coupling == "ot":
            z1 = ot_partners(z0, z1, u, config.ot_epsilon)
        z_t = torch.lerp(z0, z1, t[..., None]) + config.sigma * noise
        joint = due and config.structure == "joint"
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            v, end = net(z_t, t, condition, keep / (1 - config.condition_dropout),
                         *((beginning, spread[:S]) if joint else ()))
            flow = (v - (z1 - z0)).square().mean()
            if joint:
                corr, path = structure_losses(end, real)
        loss = flow + config.corr_weight * corr + config.path_weight * path if joint else flow
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.flow.parameters(), 1.0)
        optimizer.step()

        # the official schedule: one update of its own per chosen condition, elementwise clipped
        for i in range(S if due and not joint else 0):
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                _, end = net(None, None, condition, None, beginning[i:i + 1], spread[i:i + 1])
                corr, path = structure_losses(end, real[i:i + 1])
            saved["structure_optimizer"].zero_grad(set_to_none=True)
            (config.corr_weight * corr + config.path_weight * path).backward()
            nn.utils.clip_grad_value_(model.flow.parameters(), 1.0)
            saved["structure_optimizer"].step()
        if config.ema:
            follow(predictor.flow, model.flow, config.ema)

        # console, log, validation, checkpoint; none of it touches the random state
        progress.update(step, loss=loss, flow=flow, corr=corr, path=path)
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            progress.note(step, validate(run, predictor))
        if (stop := progress.should_stop(step)) or step == config.steps or progress.checkpoint_due():
            progress.check_finite(step)
            save_checkpoint(run, step, progress.seconds(), saved, sampler)
        if stop and step < config.steps:
            progress.stopped(step)
    run.deafen()
    if config.analyse and run.main:
        write_analysis(run, predictor.eval())
    return predictor.eval()


# -------------------------------------------------------------------------------- what the modules mean

def write_table(run, name, header, rows):
    """A tab-separated file in the run's folder."""
    if run.main:
        with data.atomic(run.out / name) as temporary:
            lines = ["\t".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) for row in [header, *rows]]
            temporary.write_text("\n".join(lines) + "\n")


def write_modules(run, model):
    """modules.tsv: every gene with its module, numbered as in the other tables."""
    write_table(run, "modules.tsv", ("gene", "module"), zip(run.panel.genes, model.autoencoder.module_of.tolist()))


def enrichment(modules, genes, sets):
    """[(module, pathway, overlap, module size, pathway size, p, adjusted p)] by the hypergeometric test among the
    panel's genes, Benjamini-Hochberg over all pairs, the significant ones (0.05) first and alone. modules (G,)."""
    symbol, rows = np.array([gene.upper() for gene in genes]), []
    inside = {name: np.isin(symbol, list(members)) for name, members in sets.items()}
    inside = {name: mask for name, mask in inside.items() if mask.sum() >= 3}
    for k in range(modules.max() + 1):
        mine = modules == k
        for name, mask in inside.items():
            overlap = int((mine & mask).sum())
            p = scipy.stats.hypergeom.sf(overlap - 1, len(symbol), int(mask.sum()), int(mine.sum()))
            rows.append((k, name, overlap, int(mine.sum()), int(mask.sum()), float(p)))
    adjusted = metrics.benjamini_hochberg(np.array([row[-1] for row in rows])) if rows else []
    rows = [(*row, float(q)) for row, q in zip(rows, adjusted) if q < 0.05]
    return sorted(rows, key=lambda row: (row[-1], row[0], row[1]))


def coactivation(x, member, resamples=200, seed=0):
    """Correlation between modules over cells, and the share of bootstrap resamples of the cells in which it is
    positive: x (n, G), member (G, K) -> two (K, K) (table 5)."""
    generator, y = torch.Generator().manual_seed(seed), x @ member
    pick = torch.randint(len(x), (resamples, len(x)), generator=generator)
    identity = torch.eye(member.shape[1])
    return correlation(y[None], identity)[0], (correlation(y[pick], identity) > 0).float().mean(0)


@torch.no_grad()
def write_analysis(run, model):
    """modules_enrichment.tsv (with --pathways), modules_coactivation.tsv and attention_shift.tsv, the last two of the
    cells predicted for the test conditions (section 3.5, figure 4, table 5)."""
    config, dataset = run.config, run.dataset
    autoencoder, every = copy.deepcopy(model.autoencoder).cpu(), np.arange(len(run.panel.genes))
    modules = autoencoder.module_of
    member = F.one_hot(modules).float() / torch.bincount(modules)
    if config.pathways:
        found = enrichment(modules.numpy(), run.panel.genes, data.read_gmt(config.pathways))
        header = ("module", "pathway", "overlap", "module_genes", "pathway_genes", "p", "p_adjusted")
        write_table(run, "modules_enrichment.tsv", header, found)
    pairs, shifts = [], []
    for group in dataset.part("test"):
        control = dataset.X[data.pick_rows(dataset.control_rows["test"][group.partition("@")[2]], config.eval_cells,
                                           seed_of(group, config.seed))].toarray()
        pred = torch.from_numpy(generate(model, run, group, control, every, 0))
        real = torch.from_numpy(control)
        together, positive = coactivation(pred, member)
        before = correlation((real @ member)[None], torch.eye(member.shape[1]))[0]
        i, j = torch.triu_indices(*together.shape, 1)
        strongest = (together - before)[i, j].abs().argsort(descending=True)[:20]
        pairs += [(group, a, b, float(together[a, b]), float(before[a, b]), float(positive[a, b]))
                  for a, b in zip(i[strongest].tolist(), j[strongest].tolist())]
        shift, base = autoencoder.attention(pred).mean(0), autoencoder.attention(real).mean(0)
        shifts += [(group, k, float(base[k]), float(shift[k]), float(shift[k] / base[k] - 1)) for k in range(len(base))]
    write_table(run, "modules_coactivation.tsv", ("condition", "module_a", "module_b", "coactivation", "in_controls",
                                                  "bootstrap_positive"), pairs)
    header = ("condition", "module", "in_controls", "attention", "relative_shift")
    write_table(run, "attention_shift.tsv", header, shifts)
    run.say(f"wrote {'modules_enrichment.tsv, ' if config.pathways else ''}modules_coactivation.tsv and "
            f"attention_shift.tsv to {run.out}")


# ------------------------------------------------------------------ plumbing, the same in all four methods

FREE_ON_RESUME = {"device", "out", "stop_at", "time_limit", "eval_every", "eval_cells", "compile", "resume", "cache_gb",
                  "backed"}
PREDICTING = {"predict", "controls", "cells", "all_genes"}
FREE_ON_PREDICT = {"ckpt", "out", "data", "device", "dtype", "compile", "seed", "eval_cells", *PREDICTING, *SAMPLING,
                   *(f.name for f in fields(data.DataConfig))}
CHECKPOINT_MINUTES = 5
CHECKPOINT_VERSION = 1


def parse_config(argv=None):
    """Command line -> Config, stored checkpoint (or None) and which of ACTIONS to do with it (or None). A new run
    starts from the preset, --resume and --ckpt from what was stored. Unknown flags, and flags that contradict what was
    stored, are errors."""
    parser = data.Parser(prog=f"{METHOD}.py", description=__doc__)
    data.add_flags(parser, Config)
    typed = parser.parse(argv)
    preset = typed.get("preset") or ("demo" if typed.get("data", "demo") == "demo" else "paper")
    config, state = Config(**PRESETS[preset] | typed), None
    if config.data == "demo" and config.split == "transfer":
        config.covariates = config.covariates or "cell_type"             # the demo has it then
    name = [METHOD, Path(config.data).stem, Path(config.split).stem.replace(":", "_"), f"f{config.fold}-s{config.seed}"]
    config.out = config.out or "runs/" + "-".join(name)
    action = None
    if config.ckpt or PREDICTING & set(typed):
        action = next((name for name in ACTIONS if name in typed), None)
        if not config.ckpt or not action:
            raise DataError(f"--ckpt FILE and --{' or --'.join(ACTIONS)} belong together; to continue a run use "
                            "--resume")
        state, free = load_checkpoint(config.ckpt), FREE_ON_PREDICT
        # the user's own file of controls has columns and units of its own
        units = ("layer", "pert_key", "control_label", "gene_key", "counts", "lognorm")
        own = {name: getattr(data.DataConfig, name) for name in units} if config.controls else {}
        stored = own | {"out": "pred.h5ad"} | typed
    elif config.resume:
        ckpt = Path(config.out, "ckpt.pt")
        if not ckpt.exists():
            raise DataError(f"--resume: {ckpt} does not exist; start without --resume, or name the run's folder, --out")
        state, free = load_checkpoint(ckpt), FREE_ON_RESUME
        stored = {"stop_at": 0, "time_limit": 0.0} | typed | {"out": config.out}
    if state:
        for name in set(typed) - free:
            if state["config"][name] != typed[name]:
                raise DataError(f"--{name.replace('_', '-')} {typed[name]}: this run was started with "
                                f"{state['config'][name]}; drop the flag, or start another run with --out")
        config = Config(**state["config"] | stored)
        if config.resume and 0 < config.stop_at <= state["step"]:
            raise DataError(f"--stop-at {config.stop_at}: the run is at step {state['step']} already; stop later")
    if min(config.steps, config.batch_size, config.cells) < 1 or config.lr <= 0 or config.eval_cells < 2:
        raise DataError("--steps, --batch-size, --lr and --cells must be positive, --eval-cells at least 2")
    if min(config.seed, config.stop_at, config.time_limit, config.eval_every) < 0:
        raise DataError("--seed, --stop-at, --time-limit and --eval-every must not be negative")
    check(config)
    return config, state, action


class Run:
    """Configuration, device, precision, processes and folder of this run; later its dataset and panel."""

    def __init__(self, config):
        self.config, self.out, self._compiled, self.dataset, self.panel = config, Path(config.out), {}, None, None
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.began, self.signal, self.handlers = self.rank == 0, time.perf_counter(), 0, {}
        name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        except RuntimeError:
            raise DataError(f"--device {name}: unknown; use cpu, cuda or cuda:N") from None
        cuda = self.device.type == "cuda"
        if self.device.type not in ("cpu", "cuda"):
            raise DataError(f"--device {name}: not supported; use cpu, cuda or cuda:N")
        if cuda and self.device.index >= torch.cuda.device_count():
            raise DataError(f"--device {name}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu")
        self.bf16 = config.dtype == "bf16" or (config.dtype == "auto" and cuda and torch.cuda.is_bf16_supported(False))
        self.compile = cuda if config.compile is None else config.compile
        if cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            # the others wait while the first process validates
            dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))

    def listen(self):
        """Until deafen(), Ctrl-C and the SIGTERM of a cluster that wants its machine back end training after a step."""
        if not self.handlers and not self.signal:
            self.handlers = {s: signal.signal(s, self.interrupt) for s in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(self, number, _):
        self.signal = number
        self.deafen()                           # a second one ends at once

    def deafen(self):
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def wrap(self, model):
        """The model to call in training: distributed over processes, compiled if asked."""
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model)
            model.broadcast_buffers = False     # they are the same everywhere; as an argument it is deprecated
        return torch.compile(model) if self.compile else model

    def compiled(self, function):
        """A function compiled once, for sampling, which runs it many times."""
        return self._compiled.setdefault(function.__qualname__, torch.compile(function)) if self.compile else function

    def say(self, text):
        if self.main:
            print(text, flush=True)

    def write_json(self, name, content):
        if self.main:
            with data.atomic(self.out / name) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n")


class Progress:
    """Status line, log.jsonl and the clock. Losses stay on the device between log lines: no sync in a step.

    The steps of a stage go from first + 1 to last; the main stage's from 1 to --steps, those of a stage before it
    (name 'pretraining step') end at 0."""

    def __init__(self, run, start, seconds, cells_per_step, first=0, last=None, name="step"):
        self.run, self.cells, self.before, self.name = run, cells_per_step, seconds, name
        self.first, self.steps = first, run.config.steps if last is None else last
        self.every = max(1, min(100, (self.steps - first) // 100))
        self.began = self.last = self.saved = time.perf_counter()
        self.last_step, self.sums, self.log = start, torch.zeros(()), run.out / "log.jsonl"
        if run.main and self.log.exists():      # lines written after the checkpoint will be written again
            lines = [x for x in self.log.read_text().splitlines() if x.endswith("}") and json.loads(x)["step"] <= start]
            with data.atomic(self.log) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines))
        run.listen()

    def seconds(self):
        """Seconds of training so far, over all resumed parts."""
        return self.before + time.perf_counter() - self.began

    def note(self, step, values):
        if not self.run.main:
            return
        try:
            with open(self.log, "a") as handle:
                handle.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise DataError(f"{self.log}: cannot be written ({error.strerror}); free some space and go on with "
                            "--resume") from None

    def update(self, step, **losses):
        self.sums = self.sums + torch.stack([v.detach() for v in losses.values()])
        if step % self.every and step != self.steps:
            return
        n, now = step - self.last_step, time.perf_counter()
        self.check_finite(step)
        means = dict(zip(losses, (self.sums / n).tolist()))              # the only sync
        speed = n * self.cells / (now - self.last)
        self.sums, self.last, self.last_step = torch.zeros_like(self.sums), now, step
        self.note(step, means | {"cells_per_s": round(speed, 1), "seconds": round(self.seconds(), 4)})
        left = data.clock((self.steps - step) * self.cells / speed)
        losses = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
        line = f"{self.name} {step - self.first}/{self.steps - self.first}  {losses}  {speed:,.0f} cells/s  " \
            f"{data.clock(self.seconds())} elapsed  {left} left"
        if self.run.main and sys.stdout.isatty():
            print(f"\r{line}\033[K", end="\n" if step == self.steps else "", flush=True)
        elif (step - self.first) % (10 * self.every) == 0 or step == self.steps:
            self.run.say(line)

    def check_finite(self, step):
        """Before a log line and before a checkpoint: a diverged model is never saved over a good one."""
        if not torch.isfinite(self.sums).all():
            good = self.run.out / "ckpt.pt"
            raise DataError(f"training diverged before step {step}: the loss is not finite. " + (
                f"{good} holds the last good checkpoint; " if good.exists() else "")
                + "start again with a lower --lr and another --out")

    def should_stop(self, step):
        """A signal, --time-limit or --stop-at reached. Several processes agree on the first two every few steps."""
        limit = 60 * self.run.config.time_limit
        stop = self.run.signal or (1 if limit and time.perf_counter() - self.run.began > limit else 0)
        if self.run.world > 1:
            if step % min(10, self.every):      # torchrun kills what has not ended after 30 seconds
                return 0 < step == self.run.config.stop_at
            flag = torch.tensor([self.run.signal, stop], device=self.run.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.run.signal, stop = flag.tolist()
        return stop > 0 or 0 < step == self.run.config.stop_at

    def checkpoint_due(self):
        if due := time.perf_counter() - self.saved >= 60 * CHECKPOINT_MINUTES:
            self.saved = time.perf_counter()
        return due

    def stopped(self, step):
        """After the checkpoint of an unfinished run: say how to go on, and end."""
        self.run.deafen()
        start = f"torchrun --nproc-per-node {self.run.world}" if self.run.world > 1 else "python"
        self.run.say(f"\nstopped at {self.name} {step - self.first} of {self.steps - self.first}; go on with: {start} "
                     f"{METHOD}.py --out {self.run.out} --resume")
        sys.exit(128 + self.run.signal if self.run.signal else 0)


@torch.no_grad()
def follow(ema, model, decay):
    """One step of the average of a model's weights."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(run, step, seconds, saved, sampler):
    """One dict of tensors and plain types, written beside the old checkpoint and renamed over it."""
    if not run.main:
        return
    rng = {"torch": torch.get_rng_state(), "sampler": sampler.get_state()}
    if run.device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(run.device)
    state = {"method": METHOD, "version": CHECKPOINT_VERSION, "config": asdict(run.config), "step": step, "rng": rng,
             "seconds": seconds, "panel": asdict(run.panel), "split": run.dataset.split, "world": run.world,
             "saved": {name: part.state_dict() for name, part in saved.items()}}
    with data.atomic(run.out / "ckpt.pt") as temporary:
        torch.save(state, temporary)


def load_checkpoint(path):
    """A checkpoint of this method, or a DataError that says what else it is."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        method, version = state["method"], state.get("version")
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; it is called ckpt.pt in a run's folder") from None
    except Exception as error:                  # torch.load raises many types on damaged files
        raise DataError(f"{path}: no checkpoint, or damaged ({type(error).__name__}); give a run's ckpt.pt") from None
    if method != METHOD:
        raise DataError(f"{path}: is a checkpoint of {method}, not of {METHOD}; run {method}.py")
    if version != CHECKPOINT_VERSION:
        raise DataError(f"{path}: is a checkpoint of version {version}, this program reads {CHECKPOINT_VERSION}; "
                        "train again")
    return state


def restore(run, state, saved, sampler):
    """Load a checkpoint into its parts and the random states; returns the step and the seconds to go on from."""
    if not state:
        return 0, 0.0
    for name, part in saved.items():
        part.load_state_dict(state["saved"][name])
    rng, step = state["rng"], state["step"]
    if rng["sampler"].numel() == sampler.get_state().numel():
        sampler.set_state(rng["sampler"])
    else:                                       # saved on another kind of device: the batches differ from here on
        sampler.manual_seed(run.config.seed + step)
    torch.manual_seed(run.config.seed + run.rank + run.world * step)     # dropout of the other processes
    if run.main:
        torch.set_rng_state(rng["torch"])
        if run.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], run.device)
    return step, state["seconds"]


def seed_of(group, seed):
    """A seed per group, so that a prediction does not depend on what else is predicted."""
    return zlib.crc32(f"{group} {seed}".encode())


def predict_part(run, model, part, most, **options):
    """{group: (n, E)}: every condition of a part, as many cells as it really has (at most `most`), from controls.

    Each process predicts its share of the conditions; the first gets all, the others none."""
    out, names, began = {}, run.dataset.part(part), time.perf_counter()
    groups = names[run.rank::run.world]
    for i, group in enumerate(groups):
        seed, n = seed_of(group, run.config.seed), min(len(run.dataset.rows[group]), most)
        control = run.dataset.control_rows[part][group.partition("@")[2]]
        control = run.dataset.X[data.pick_rows(control, n, seed)].toarray()
        out[group] = generate(model, run, group, control, run.panel.eval_genes, seed, **options)
        if sys.stdout.isatty() and run.main:
            left = data.clock((time.perf_counter() - began) / (i + 1) * (len(groups) - i - 1))
            print(f"\rpredicted {i + 1}/{len(groups)} {part} conditions  {left} left\033[K", end="", flush=True)
    if run.world > 1:
        shares = [None] * run.world if run.main else None
        dist.gather_object(out, shares)
        out = {group: cells for share in shares or () for group, cells in share.items()}
    return {group: out[group] for group in names if group in out}


def score(run, pred, part, control, **options):
    """metrics.evaluate on the evaluation genes, against the real cells of the part."""
    real = run.dataset.populations(part, run.panel.eval_genes)
    return metrics.evaluate(pred, real, control, run.panel.eval_names(), seed=run.config.seed, **options)


def validate(run, model):
    """Scores of the validation conditions, for the console and the log."""
    if not run.dataset.part("val"):
        return {}
    model.eval()
    pred = predict_part(run, model, "val", min(run.config.eval_cells, 100))
    model.train()
    if not run.main:
        return {}
    control = run.dataset.controls("val", run.panel.eval_genes)
    result = score(run, pred, "val", control, keys=["l2", "pearson_delta", "e_distance"], floors=False)["aggregate"]
    run.say("\nvalidation  " + "  ".join(f"{k} {v:.4f}" for k, v in result.items() if v is not None))
    return {"val": result}


def evaluate(run, model, seconds):
    """Predict and score every test condition; write pred.h5ad and metrics.json; print the table."""
    config, began = run.config, time.perf_counter()
    preds = {name: predict_part(run, model, "test", config.eval_cells, **options)
             for name, options in variants(config).items()}
    if not run.main:
        return
    pred = preds.pop("")
    control = run.dataset.controls("test", run.panel.eval_genes)
    data.write_populations(run.out / "pred.h5ad", pred, control, run.panel.eval_names(), config.covariates, METHOD)
    train = run.dataset.populations("train", run.panel.eval_genes)
    result = score(run, pred, "test", control, train=train)
    rows = metrics.result_rows(result, METHOD)
    for name, cells in preds.items():
        other = score(run, cells, "test", control, train=train, floors=False)
        result.setdefault("variants", {})[name] = {k: other[k] for k in ("aggregate", "n_valid", "per_condition")}
        at = 1 + max(i for i, (row, _) in enumerate(rows) if row.startswith(METHOD))
        rows.insert(at, (METHOD + name, other["aggregate"]))
    took = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated() / 2**20 if run.device.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, np, scipy, h5py)}
    run.write_json("metrics.json", {
        "method": METHOD, "data": config.data, "split": config.split, "fold": config.fold, "seed": config.seed,
        "seconds": round(seconds + took, 1), "peak_memory_mb": round(memory), "config": asdict(config),
        "versions": versions, **result})
    print(f"\n{len(pred)} test conditions, {len(run.panel.eval_genes):,} genes; trained in {data.clock(seconds)}, "
          f"evaluated in {data.clock(took)}, peak memory {memory:,.0f} MB; files in {run.out}\n")
    print(metrics.format_table(rows))
    for note in result["info"]["notes"]:
        print(f"note: {note}")


def predict(run, state):
    """--predict: cells of any conditions, from the control cells of --data or of --controls, written to --out."""
    config, panel = run.config, run.panel
    if run.out.exists():
        raise DataError(f"--out {run.out}: exists; choose another name, or remove it")
    if run.world > 1:
        raise DataError("--predict runs in one process; start it with python")
    names, untrained = known(panel, config)
    asked = []
    for text in config.predict:
        condition, _, covariate = text.partition("@")
        parts = sorted({p for p in condition.split("+") if p in names or not data.is_control_label(p)})
        for name in parts:
            if name not in names:
                close = difflib.get_close_matches(name, names, 3)
                advice = f"did you mean {', '.join(close)}" if close else "check its spelling"
                raise DataError(f"--predict {text}: the model does not know '{name}', which was not in its training "
                                f"file; {advice}")
            if name in untrained:
                run.say(f"note: '{name}' was in no training condition: its embedding is untrained")
        if not parts:
            raise DataError(f"--predict {text}: names no perturbation; control cells are real, not predicted")
        asked.append(("+".join(parts), covariate))
    control = own_controls(run)
    for condition, covariate in asked:
        if covariate and covariate not in control:
            raise DataError(f"--predict {condition}@{covariate}: no control cells with these covariates; there are "
                            f"{', '.join(sorted(control))}")
    model = load_model(config, panel, state["saved"]).to(run.device).eval()
    columns = np.arange(len(panel.genes)) if config.all_genes else np.array(panel.eval_genes)
    pred = {}
    for condition, covariate in asked:
        for value in [covariate] if covariate else sorted(control):
            group = data.group_name(condition, value)
            seed = seed_of(group, config.seed)
            start = data.pick_rows(control[value], config.cells, seed)
            pred[group] = generate(model, run, group, start, columns, seed)
            run.say(f"predicted {group}: {config.cells:,} cells, {len(columns):,} genes")
    control = {v: x[:, columns] for v, x in control.items()}
    data.write_populations(run.out, pred, control, [panel.genes[i] for i in columns], config.covariates, METHOD)
    run.say(f"wrote {run.out}: predicted cells and the control cells, log1p CP10k")


def own_controls(run):
    """{covariate: (n, G)} control cells on the panel's genes, of --controls or of the training file."""
    if run.config.controls:
        return data.read_controls(run.config.controls, run.config, run.panel.genes)
    dataset = data.load_run(run.config, run.device)
    if list(dataset.genes) != run.panel.genes:
        raise DataError(f"{run.config.data}: gives other genes than the model was trained on; it has changed. Name the "
                        "training file with --data, or your own control cells with --controls")
    return dataset.controls("test")


def start_or_resume(run, state):
    """Load the data, check that a resumed run still has the same, write what is known before training."""
    config, out = run.config, run.out
    unfinished = ("config.json", "split.json", "log.jsonl")  # what a run leaves that ended before its first checkpoint
    others = [p.name for p in out.iterdir() if p.name not in unfinished] if out.is_dir() else []
    if run.main and not state and (others or out.is_file()):
        raise DataError(f"{out}: already holds {', '.join(others[:3]) or 'a file'}; go on with --resume, choose "
                        "another --out, or remove it")
    run.say(f"{METHOD} on {config.data}, split {config.split}, fold {config.fold}, seed {config.seed}; {run.device}, "
            f"{'bf16' if run.bf16 else 'tf32' if run.device.type == 'cuda' else 'fp32'}"
            f"{', compiled' if run.compile else ''}; folder {out}")
    run.dataset = dataset = data.load_run(config, run.device)
    run.panel = dataset.panel()
    for note in dataset.source.notes:
        run.say(f"note: {note}")
    if state and (asdict(run.panel), dataset.split) != (state["panel"], state["split"]):
        raise DataError(f"--resume: {config.data} and --split {config.split} no longer give the genes, conditions and "
                        f"parts of the run in {out}: a file has changed; restore it, or start another run with --out")
    if state and run.world != state["world"]:   # the batch of all processes together stays what it was
        for name in PER_PROCESS:
            total = state["config"][name] * state["world"]
            if total % run.world:
                raise DataError(f"--resume: the run in {out} had --{name.replace('_', '-')} {state['config'][name]} in "
                                f"each of {state['world']} processes; {run.world} processes cannot share {total}")
            setattr(config, name, total // run.world)
        check(config)
    test = {p for g in dataset.part("test") for p in g.partition("@")[0].split("+")}
    if untrained := sorted(known(run.panel, config)[1] & test):
        run.say(f"note: {len(untrained)} test perturbations were in no training condition "
                f"({', '.join(untrained[:5])}): their embeddings are untrained")
    dataset.prepare_sampling()
    run.write_json("config.json", asdict(config))
    run.write_json("split.json", dataset.split)


def main(argv=None):
    """Command line: train and evaluate a run, go on with one, or predict from one."""
    with data.clean_errors():
        config, state, action = parse_config(argv)
        run = Run(config)
        if action:
            run.panel = data.Panel(**state["panel"])
            return ACTIONS[action](run, state)
        try:
            start_or_resume(run, state)
            began = time.perf_counter()
            model = train(run, state)
            evaluate(run, model, (state["seconds"] if state else 0) + time.perf_counter() - began)
        except RuntimeError as error:
            if run.world == 1 or not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise DataError(f"process {run.rank}: another process of this run has ended; go on from the last "
                            f"checkpoint in {run.out} with --resume") from None
        finally:
            run.deafen()
            if run.world > 1:
                dist.destroy_process_group()

# ------------------------------------------------------------------ end of plumbing

def transfer(run, state):
    """--ckpt with --data: score the model on every condition of another file that it knows, genes matched by name."""
    config, panel = run.config, run.panel
    if config.out == "pred.h5ad":               # --predict's default
        name = Path(config.ckpt).resolve().parent.name
        run.out = Path("runs", f"{name}-on-{Path(config.data).stem}")
    if run.out.exists():
        raise DataError(f"--out {run.out}: exists; choose another name, or remove it")
    # in memory whatever its size: columns are taken below
    dataset = data.load(data.path_of(config), replace(config, min_cells=0, hvg=0, backed=False, cache_gb=math.inf),
                        device=run.device)
    column = {gene.upper(): i for i, gene in enumerate(dataset.genes)}
    there = np.array([gene.upper() in column for gene in panel.genes])
    covered(run, f"--data {config.data}", int(there.sum()), len(there), "genes of the model")
    model = load_model(config, panel, state["saved"]).to(run.device).eval()

    # cells on the model's genes; one that was not measured stands at its mean in training, and is not scored
    X = scipy.sparse.lil_matrix((1, len(there)), dtype=np.float32)
    X[0, ~there] = model.autoencoder.mean.cpu().numpy()[~there]
    take = [column.get(gene.upper(), 0) for gene in panel.genes]
    cells = dataset.source
    cells.X = cells.X[:, take].multiply(there.astype(np.float32)).tocsr().astype(np.float32)
    if not there.all():
        cells.X = (cells.X + scipy.sparse.vstack([X.tocsr()] * cells.X.shape[0])).tocsr()
    cells.genes = list(panel.genes)
    names, untrained = known(panel, config)
    conditions = [c for c in dict.fromkeys(dataset.condition) if c != data.CONTROL]
    possible = [c for c in conditions if set(c.split("+")) <= names - untrained]
    run.say(f"the model knows the perturbations of {len(possible)} of {len(conditions)} conditions of {config.data}")
    if not possible:
        raise DataError(f"--data {config.data}: shares no perturbation with the model; its names are like "
                        f"{', '.join(sorted(names)[:4])}")
    dataset.split = {"train": [], "val": [], "test": possible}
    run.dataset, run.panel = dataset, replace(panel, eval_genes=[i for i in panel.eval_genes if there[i]])
    evaluate(run, model, 0.0)


def analyse(run, state):
    """--ckpt with --analyse: the same files that --analyse writes after training, into the run's folder."""
    if run.config.out == "pred.h5ad":
        run.out = Path(run.config.ckpt).parent
    run.dataset = data.load_run(run.config, run.device)
    if list(run.dataset.genes) != run.panel.genes:
        raise DataError(f"{run.config.data}: gives other genes than the model was trained on; name its training file "
                        "with --data")
    write_analysis(run, load_model(run.config, run.panel, state["saved"]).to(run.device).eval())


ACTIONS = {"predict": predict, "analyse": analyse, "data": transfer}    # what --ckpt is for, by the flag that asks

if __name__ == "__main__":
    main()
