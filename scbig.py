"""scBIG: gene modules, a module-aware autoencoder, and latent flow matching with structure losses.

Genes are clustered into balanced modules from gene embeddings and protein interactions (Gene-Relation Clustering, GRC).
An autoencoder reads a cell as one token per module; its attention goes through a few inducing points (GCAE). In its
latent space a flow carries control cells to perturbed cells, given the perturbations' embeddings. Two losses on the
decoded end points keep the correlation between modules and the activity of pathways like those of the real cells.
Prior knowledge comes from public files; where one is not given, a stand-in is made from training and control cells.

Paper: "Beyond independent genes: learning module-inductive representations for single-cell gene perturbation
prediction" (P). Official code: github.com/ttruan2426-dot/scBIG @5659ce9 (MIT) (C); its flow is a fork of CellFlow
(theislab, MIT). Nothing here is copied.

    python scbig.py                                             demo data, laptop size, a minute on 2 cores
    python scbig.py --data norman.h5 --split additive --gene-embeddings genecompass.npz --pathways reactome.gmt.zip \
        --ppi 9606.protein.links.v12.0.txt.gz --ppi-info 9606.protein.info.v12.0.txt.gz --pert-embeddings esm2.pt
    python scbig.py --data norman.h5 --split holdout --resume     go on after Ctrl-C or a crash
    python scbig.py --ckpt runs/X/ckpt.pt --predict CEBPA KLF1+MAP2K6 --cells 500 --out pred.h5ad
    torchrun --nproc-per-node 4 scbig.py --data norman.h5 --split additive
Ablations of table 6: --clustering kmeans (the unbalanced one of 6b, first row) or unordered, --encoder transformer,
--corr-weight 0, --path-weight 0, --ppi-weight 0. Of no table: --condition-embedding learned.

Deviations (numbers are l2/e_distance on the demo, seeds 0 and 1, where the preset has 4.97/1.33):
 1. Token k is module k (P). C cuts the genes into runs of 64 that drift off the modules.
 2. The time features reach 10 t. At C's 10,000 t the structure losses, which see the velocity at a few fixed times,
    teach it other values at just these.
 3. Structure losses in every step, on 3 conditions of the batch (P); C: an optimiser of its own, now and then.
 4. The pathway transport is solved in the log domain, epsilon relative to the mean cost, 100 iterations (P): C's
    kernel form underflows, so that far predictions have no loss.
 5. Stage 1 has a fixed length (P); C stops it early, by the error on 300 controls, where these lack on test controls.
 6. One gene-embedding term in a token, the mean over the module's genes, as in C; P describes a second one.
 7. A perturbation without an embedding has a learned one, and the trained ones' mean where it was in no training
    condition; in C a zero vector, the same as no perturbation.
 8. The pooling masks each empty slot; C masks by the first slot, so that the order of a single's slots matters.
 9. Embeddings are scaled to a root mean square of 1 and doses logarithmically to 0 to 1; C takes both raw.
10. Fixed midpoint steps; C integrates adaptively, cell by cell.
11. 20 conditions x 1,024 cells are one step (C: 20 accumulated ones). Every drawn control has a partner, drawn from its
    row of the plan; C draws both from the plan.
12. The last model predicts, validation conditions train (P, C select on them); 30% of the doubles are tested (P: 32).
13. Genes that a file of embeddings lacks are fitted from expression by ridge; C draws them at random or takes 0.
14. Pathways need three genes of the panel, which fits P's 969; C takes those with one.
15. --effect-readout and --residual (demo): 30 conditions teach the network no additivity, and its decoder returns
    conditional means, without the variance and the zeros of cells. Without: 4.76/1.35, 4.92/1.37.
16. --schedule cosine, --condition-dropout 0.8 (without 4.80/1.27, on screen 1 5.34/1.66 for 5.19/1.55), --ema, --zeros
    detect (without 4.97/1.57), demo: short training of a small model.
17. Ours: priors from training cells where no file is given, genes counted and chosen in them, no attention dropout.
18. As many cells are generated as were measured, at most 1,000 (C: 500); no value is below 0 or above training's.
"""
import copy
import math
import sys
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.cluster import vq

import data
import metrics
from data import DataError

METHOD = Path(__file__).stem


@dataclass
class Config(data.RunConfig):
    """The paper's configuration; PRESETS lists what --preset demo changes."""
    steps: int = 25_000             # length of stage 2 (paper: 500,000 iterations, 20 to an update)
    batch_size: int = 20_480        # target cells per step and process (paper: 20 x 1,024)
    lr: float = 5e-5                # Adam, stage 2 (official)
    train_on_val: bool = True       # P chooses on the validation conditions, here nothing does
    hvg: int = 2000                 # paper A.4.2, the perturbed genes are added
    eval_genes: int = 0             # genes that are evaluated: all (paper, by the MSE and L2 of its table 1)
    min_genes: int = 1000           # cells with fewer detected genes are dropped (paper A.4.2)
    min_cells: int = 50             # genes detected in fewer training and control cells (paper A.4.2: in fewer cells)
    # priors; each '' is made from training and control cells instead
    gene_embeddings: str = ""       # .npz (names, emb), .pt ({name: vector}), .tsv or .csv (paper: GeneCompass)
    ppi: str = ""                   # STRING protein.links, or a list of edges: gene, gene[, score]
    ppi_info: str = ""              # STRING protein.info, which names the proteins of --ppi
    pathways: str = ""              # .gmt, .gmt.gz or .gmt.zip (paper: Reactome)
    pert_embeddings: str = ""       # as --gene-embeddings, of perturbed genes or drugs (paper: ESM2, ChemBERTa)
    schedule: typing.Literal["constant", "cosine"] = "constant"         # of both stages (official); ours: cosine
    # modules
    clustering: typing.Literal["grc", "kmeans", "unordered"] = "grc"    # the others are ablations
    modules: int = 32               # K (paper)
    ppi_weight: float = 1.0         # of the interaction term in eq. 1 (official); 0 removes it (ablation)
    # stage 1: autoencoder
    encoder: typing.Literal["gcae", "transformer"] = "gcae"             # transformer: the plain one (ablation)
    width: int = 256                # d (paper table 16)
    layers: int = 3                 # of the encoder, and of the decoder (paper)
    heads: int = 8                  # attention heads (paper)
    inducing: int = 8               # M, inducing points per layer (paper)
    latent: int = 50                # D, latent dimension (paper)
    dropout: float = 0.1            # in both stages (official)
    pretrain_steps: int = 35_000    # length of stage 1 (paper: 100 epochs of Norman)
    pretrain_batch_size: int = 256  # cells per step and process (paper)
    pretrain_lr: float = 1e-4       # Adam (official)
    # stage 2: flow
    conditions_per_batch: int = 20  # cells are paired within each (official)
    hidden: int = 1024              # width of the velocity network (paper)
    condition_embedding: typing.Literal["fixed", "learned"] = "fixed"   # learned: a table, only for seen perturbations
    condition_dropout: float = 0.9  # per condition, not per cell (official, CellFlow's default)
    ot_epsilon: float = 1.0         # relative to the mean cost (official): almost independent
    sigma: float = 0.5              # noise on the path (official)
    corr_weight: float = 0.1        # eq. 9, module correlation (paper); 0 removes it (ablation)
    path_weight: float = 0.1        # eq. 9, pathway transport (paper); 0 removes it (ablation)
    path_iterations: int = 100      # of its Sinkhorn plan (paper A.1.2; official 50)
    structure_conditions: int = 3   # conditions per structure loss (official)
    structure_cells: int = 64       # cells of each (official)
    effect_readout: bool = False    # a linear map of the perturbations' sum, from zero, in the velocity (ours)
    residual: bool = False          # what the autoencoder loses of a control cell is given to the generated one (ours)
    ema: float = 0.0                # decay of averaged weights used for prediction; 0 is none (official)
    ode_steps: int = 10             # midpoint steps, in the structure losses and in sampling


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    data.check_numbers(vars(config), "modules width layers heads inducing latent hidden pretrain_steps pretrain_lr "
                       "pretrain_batch_size conditions_per_batch structure_conditions path_iterations ode_steps "
                       "ot_epsilon", below_one="dropout condition_dropout ema")
    conditions = config.conditions_per_batch
    if config.batch_size % conditions:
        raise DataError(f"--batch-size {config.batch_size}: must be a multiple of --conditions-per-batch {conditions}")
    if config.structure_conditions > conditions or config.structure_cells < 2:
        raise DataError(f"--structure-conditions {config.structure_conditions}: at most --conditions-per-batch "
                        f"({conditions}), --structure-cells at least 2")
    if config.width % config.heads:
        raise DataError(f"--width {config.width}: must be a multiple of --heads {config.heads}")
    if config.ppi_info and not config.ppi:
        raise DataError("--ppi-info names the proteins of --ppi; give both")


PRESETS = {"paper": {}, "demo": dict(
    steps=500, batch_size=512, conditions_per_batch=8, lr=1e-3, schedule="cosine", hvg=1000, eval_genes=1000,
    min_genes=0, min_cells=10, train_on_val=False, modules=8, width=64, layers=2, heads=4, inducing=4, latent=32,
    dropout=0.0, pretrain_steps=1200, pretrain_batch_size=128, pretrain_lr=2e-3, hidden=256, condition_dropout=0.8,
    effect_readout=True, residual=True, structure_cells=32, path_iterations=20, ema=0.98, ode_steps=3, zeros="detect",
    eval_cells=100)}
SAMPLING = {"ode_steps"}                # flags that --ckpt may change
UNSEEN = True                           # whether genes that were never perturbed can be predicted
variants = None                         # further rows of the table
USES = {}                               # {flag: what --ckpt is for besides --predict}


# -------------------------------------------------------------------------------- priors

FIXED, UNKNOWN = -1, -2                 # in pert_learned: has a given vector; has none and was not trained


def load_priors(run):
    """What the model takes over from files or training cells, by the names of its buffers: module_of (G,),
    module_vectors (K, p), mean (G,), pathways (Q, G), and the three of perturbation_vectors. Writes modules.tsv, the
    module of every gene, and with --pathways modules_enrichment.tsv, the pathways of every module."""
    corr = data.gene_statistics(run.dataset)[2].cpu()
    vectors = gene_vectors(run, corr)
    module_of, changed = gene_modules(vectors, interaction_graph(run, corr), run.config)
    if changed:
        run.say(f"clustering: {run.config.modules} modules, genes that changed module in each step: "
                + ", ".join(map(str, changed)))
    if run.rank == 0:
        genes, modules = run.panel.genes, module_of.numpy()
        data.write_table(run.out / "modules.tsv", ("gene", "module"), zip(genes, modules))
        if run.config.pathways:
            found = metrics.enrichment(modules, genes, data.read_gmt(run.config.pathways))
            data.write_table(run.out / "modules_enrichment.tsv", metrics.ENRICHMENT, found)
    member = F.one_hot(module_of).float()                                # (G, K)
    return {"module_of": module_of, "module_vectors": member.T @ vectors / member.sum(0)[:, None],
            "mean": torch.tensor(run.panel.mean), "pathways": pathway_sets(run, vectors),
            **perturbation_vectors(run, vectors)}


def gene_vectors(run, corr, width=128, effects=64):
    """Vector of every gene (G, p): from --gene-embeddings, or own: from corr (G, G), the correlation of the genes, and
    the effects of the training conditions. Genes that the file lacks are fitted to their own by ridge."""
    def principal_rows(matrix, rank, power):                             # U S^power of a truncated SVD: (G, rank)
        u, s = torch.svd_lowrank(matrix, q=min(rank, *matrix.shape), niter=6)[:2]
        return F.normalize(u * s ** power, dim=1)
    delta = torch.from_numpy(data.training_effects(run.dataset)[1].T.astype(np.float32))           # (G, n)
    own = torch.cat([principal_rows(corr, width, 0.5), principal_rows(delta, effects, 1.0)], dim=1)
    own = F.normalize(own, dim=1)                                        # (G, p), from the data alone
    if not run.config.gene_embeddings:
        return own

    given, known = data.aligned_vectors(run.config.gene_embeddings, run.panel.genes)
    data.coverage(run.say, run.config.gene_embeddings, known, "genes of the panel")
    own_known, mean = own[known], given[known].mean(0)
    ridge = own_known.T @ own_known + torch.eye(own.shape[1])
    fitted = mean + own @ torch.linalg.solve(ridge, own_known.T @ (given[known] - mean))
    return torch.where(known[:, None], given, fitted)


def interaction_graph(run, corr, neighbours=20):
    """Symmetric (G, G), 0 or 1: pairs of --ppi, or mutual nearest neighbours by |correlation| in training and control
    cells, a cell's total expression held fixed."""
    config, G = run.config, len(corr)
    if config.ppi:
        return data.gene_graph(config.ppi, config.ppi_info, run.panel.genes, run.say)
    if not config.gene_embeddings and config.clustering == "grc":
        run.say("note: without --gene-embeddings and --ppi both terms of the clustering cost come from expression")
    with_total = corr.sum(1) / corr.sum().clamp(min=1e-12).sqrt()        # (G,) correlation of a gene with the total
    rest = (1 - with_total ** 2).clamp(min=1e-3).sqrt()                  # (G,) deviation that the total leaves
    partial = (corr - torch.outer(with_total, with_total)).abs() / torch.outer(rest, rest)
    strength, near = partial.fill_diagonal_(0).topk(min(neighbours, G - 1), dim=1)       # each (G, neighbours)
    graph = torch.zeros(G, G).scatter_(1, near, (strength > 0).float())
    return graph * graph.T


def pathway_sets(run, vectors):
    """(Q, G), rows sum to 1: sets of --pathways with at least three genes of the panel, or clusters of the genes at
    three granularities."""
    config = run.config
    if config.pathways:
        member = data.gene_sets(config.pathways, run.panel.genes, run.say)
    else:
        unit = F.normalize(vectors, dim=1)
        sizes = [min(len(unit), n * config.modules) for n in (1, 2, 4)]
        member = torch.cat([F.one_hot(kmeans(unit, K)).T.float() for K in sizes])
    member = member[member.sum(1) >= 3]
    if config.path_weight and not len(member):
        raise DataError("no pathway has three genes of the panel; give another --pathways, or --path-weight 0")
    return F.normalize(member, p=1, dim=1)


def token_table(panel, config):
    """Names [N] of what can have an embedding, genes first, then the other perturbations without their dose; and of all
    that can be predicted {name: (token, dose)}, the dose log(1 + dose) over the highest, or 1 where there is none."""
    names, doses = list(panel.genes), {}
    tokens = {name: i for i, name in enumerate(names)}
    for p, gene in zip(panel.perturbations, panel.pert_gene):
        drug, dose = data.split_dose(p) if config.dose_key else (p, "")
        try:
            doses[p] = math.log1p(float(dose))
        except ValueError:                                               # no dose, or one in words
            drug = p
        if gene < 0 and drug not in tokens:
            tokens[drug] = len(names)
            names.append(drug)
        tokens[p] = tokens[drug] if gene < 0 else gene
    highest = max(doses.values(), default=1.0) or 1.0
    return names, {name: (token, doses.get(name, highest) / highest) for name, token in tokens.items()}


def perturbation_vectors(run, vectors):
    """What the flow knows of every token: pert_vectors (N, p) of root mean square 1, from --pert-embeddings or the
    gene's own; pert_learned (N,), its row of a learned table if it has no vector but was trained, else FIXED or
    UNKNOWN; pert_trained, the tokens of training conditions."""
    config, panel = run.config, run.panel
    names, table = token_table(panel, config)
    N, asked = len(names), {p: table[p][0] for p in panel.perturbations}
    if config.pert_embeddings:
        out, fixed = data.aligned_vectors(config.pert_embeddings, names)
        data.coverage(run.say, config.pert_embeddings, fixed[sorted(set(asked.values()))], "perturbations")
    elif config.condition_embedding == "learned":
        out, fixed = torch.zeros(N, 128), torch.zeros(N, dtype=torch.bool)
    else:
        out, fixed = F.pad(vectors, (0, 0, 0, N - len(vectors))), torch.arange(N) < len(vectors)
    trained = torch.tensor(sorted({asked[p] for p in panel.trained}))
    learned = torch.where(fixed, FIXED, UNKNOWN)
    own = trained[~fixed[trained]]                                       # have a row of the learned table
    learned[own] = torch.arange(len(own))
    lost = [p for p, i in asked.items() if learned[i] == UNKNOWN]
    if lost:
        run.say(f"note: {len(lost)} perturbations have neither an embedding nor a training condition "
                f"({', '.join(lost[:5])}): each is predicted as an average perturbation")
    size = out.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    return {"pert_vectors": out / size, "pert_learned": learned, "pert_trained": trained}


# -------------------------------------------------------------------------------- gene modules

def sinkhorn(cost, epsilon, iterations, columns=None):
    """Entropic transport plans, in the log domain, fp32 or better: cost (..., n, m) -> plan (..., n, m). Rows are
    uniform and met exactly, columns uniform or as given (m,). epsilon: number or (..., 1, 1)."""
    with torch.autocast(cost.device.type, enabled=False):
        score = -cost.to(torch.promote_types(cost.dtype, torch.float32)) / epsilon
        f = torch.zeros_like(score[..., :1])                             # potentials of the rows, g of the columns
        for _ in range(iterations):                                      # nothing as large as the cost is written
            g = (score - f).logsumexp(-2, keepdim=True)                  # the columns are met
            if columns is not None:                                      # uniform ones cancel in the next line
                g = g - columns.log()
            f = (score - g).logsumexp(-1, keepdim=True)                  # the rows are met
        return (score - g).softmax(-1) / score.shape[-2]


def kmeans(x, K, seed=42, restarts=10):
    """Labels (n,) of the best of several k-means runs from k-means++ starts: x (n, p). Some of the K may be empty."""
    x, generator = x.numpy(), np.random.default_rng(seed)
    with warnings.catch_warnings(action="ignore"):                       # of empty clusters
        runs = [vq.kmeans2(x, K, iter=30, minit="++", seed=generator) for _ in range(restarts)]
    inertia = [np.square(x - centres[labels]).sum() for centres, labels in runs]
    return torch.from_numpy(runs[np.argmin(inertia)][1]).long()


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
    for _ in range(3):
        member = F.one_hot(label, K).float()                             # (G, K)
        semantic = 1 - e @ F.normalize(member.T @ e, dim=1).T
        interacting = graph @ member / member.sum(0).clamp(min=1)
        cost = (semantic / semantic.max() + config.ppi_weight * (1 - interacting)).double()
        plan = sinkhorn(cost, 0.1, 1000, capacity.double() / G)
        last, label = label, round_plan(plan, cost, capacity)
        changed.append(int((label != last).sum()))
    return label, changed


def round_plan(plan, cost, capacity):
    """Labels (G,) of a plan (G, K): the largest entries first, ties by lower cost (G, K), no module over its capacity
    (K,). The capacities sum to G, so every gene is placed."""
    order = np.lexsort((cost.flatten().numpy(), -plan.flatten().numpy()))
    room, label = capacity.tolist(), [-1] * len(plan)
    for place in order.tolist():
        gene, module = divmod(place, len(room))
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
        """x (B or 1, T, d), source (B, N, d) -> (B, T, d)."""
        k, v = self.kv(source).chunk(2, dim=-1)                          # each (B, N, d)
        q = self.split(self.q(x)).expand(len(source), -1, -1, -1)        # (B, H, T, d/H)
        a = F.scaled_dot_product_attention(q, self.split(k), self.split(v))
        return self.out(a.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One layer on module tokens (eq. 3), post-norm: inducing points attend to the modules (compress) and to each other
    (process), then the modules to them (broadcast). Without inducing points: plain self-attention."""

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


class Autoencoder(nn.Module):
    """Gene-Cluster-Aware autoencoder: token k is module k (eq. 2-5). Expression (B, G) <-> latent (B, D)."""

    def __init__(self, config, priors):
        """priors: see load_priors."""
        super().__init__()
        for name in ("module_of", "module_vectors", "mean"):
            self.register_buffer(name, priors[name])
        d = config.width
        K, p = self.module_vectors.shape
        G = len(self.module_of)
        member = F.one_hot(self.module_of, K)                            # (G, K)
        rank = (member.cumsum(0) * member).sum(1) - 1                    # (G,) of a gene within its module
        L = int(rank.max()) + 1                                          # slots of a module
        place = self.module_of * L + rank                                # (G,) slot of a gene
        gather = torch.full((K * L,), G)                                 # gene of a slot; G is an empty one, holding 0
        gather[place] = torch.arange(G)
        self.register_buffer("gather", gather, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.embed, self.head = nn.Linear(L, d), nn.Linear(d, L)         # shared by all modules (official)
        # who a module is, for the encoder and for the decoder
        self.identity = nn.ModuleList(nn.Sequential(nn.Linear(p, d, bias=False), nn.LayerNorm(d, eps=1e-6))
                                      for _ in range(2))
        self.encoder = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.to_latent, self.from_latent = nn.Linear(d, config.latent), nn.Linear(config.latent, d)
        self.drop = nn.Dropout(config.dropout)

    def tokens(self, x):
        """(B, G) -> (B, K, d): expression of the module's genes, plus who the module is (eq. 2)."""
        x = F.pad(x - self.mean, (0, 1)).index_select(1, self.gather)    # (B, K L)
        x = self.embed(x.unflatten(1, (len(self.module_vectors), -1)))
        return self.drop(x + self.identity[0](self.module_vectors))

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
        return self.head(h).flatten(1).index_select(1, self.place).float() + self.mean

    def forward(self, x):
        return self.decode(self.encode(x))


class Flow(nn.Module):
    """Velocity v(z_t | t, condition) in latent space: CellFlow's network. Its first joint layer is split by input: the
    condition's part is computed once per condition, the time's part of an ODE once per time point."""

    def __init__(self, config, priors, covariates):
        """priors: see perturbation_vectors; covariates: number of one-hot entries."""
        super().__init__()
        for name in ("pert_vectors", "pert_learned", "pert_trained"):
            self.register_buffer(name, priors[name])
        d, h = 64, config.hidden
        p = self.pert_vectors.shape[1]
        self.dropout, self.steps = config.dropout, config.ode_steps
        self.learned = nn.Parameter(torch.randn(max(1, int(self.pert_learned.max()) + 1), p))
        self.dosed = bool(config.dose_key)
        if self.dosed:
            self.dose = nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 512))
            self.embed, self.norm = nn.Linear(p, 256), nn.LayerNorm(256)
        self.query = nn.Parameter(torch.randn(d))
        self.kv = nn.Linear(256 if self.dosed else p, 2 * d, bias=False)
        self.pooled = nn.Linear(d + covariates, 256)
        self.effect = nn.Parameter(torch.zeros(self.kv.in_features, config.latent)) if config.effect_readout else None
        self.register_buffer("frequency", 10 ** (1 - torch.arange(512) / 512), persistent=False)     # 10 to 1
        self.time_mlp = nn.Sequential(nn.Linear(1024, h), nn.SiLU(), nn.Linear(h, h))
        self.state = nn.ModuleList([nn.Linear(config.latent, h), nn.Linear(h, h)])
        self.join_time, self.join_state = nn.Linear(h, h), nn.Linear(h, h, bias=False)
        self.join_condition = nn.Linear(256, h, bias=False)
        self.joint, self.out = nn.Linear(h, h), nn.Linear(h, config.latent)

    def vectors(self, tokens):
        """(...) tokens -> (..., p)."""
        row = self.pert_learned[tokens]
        return torch.where(row[..., None] < 0, self.pert_vectors[tokens], self.learned[row.clamp(min=0)])

    def condition(self, tokens, mask, dose, covariates):
        """Embedding (C, 256) of conditions by attention pooling over the slots that hold a perturbation: tokens, mask,
        dose (C, slots); and effect (C, 1, D), the part of the velocity that is the same at all times and states: the
        last layer's bias and, with --effect-readout, a linear map of the perturbations' sum."""
        def split(x):                                                    # (C, slots, 64) -> (C, 8 heads, slots, 8)
            return x.unflatten(-1, (8, -1)).transpose(1, 2)
        a = self.vectors(tokens)                                         # (C, slots, p)
        if not self.training:
            unknown = self.pert_learned[tokens] == UNKNOWN
            a = torch.where(unknown[..., None], self.vectors(self.pert_trained).mean(0), a)
        if self.dosed:                                                   # its dose modulates a vector (official)
            scale, shift = self.dose(dose[..., None]).chunk(2, dim=-1)   # each (C, slots, 256)
            a = self.norm(self.embed(a) * (1 + 0.5 * scale.tanh()) + dose[..., None] * shift)
        k, v = self.kv(a).chunk(2, dim=-1)
        q = self.query.to(k).view(1, 8, 1, -1).expand(len(k), -1, -1, -1)
        pooled = F.scaled_dot_product_attention(q, split(k), split(v), attn_mask=mask[:, None, None],
                                                scale=1 / 8)             # official scale
        c = self.pooled(torch.cat([pooled.flatten(1), covariates], dim=1))
        if self.effect is None:
            return c, self.out.bias.expand(len(c), 1, -1)
        return c, (a * mask[..., None]).sum(1, keepdim=True) @ self.effect + self.out.bias

    def time(self, t):
        """(...) times in [0, 1] -> (..., h): their part of the joint layer."""
        angle = t[..., None] * self.frequency
        return self.join_time(self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1)))

    def velocity(self, z, joined, effect, training=False):
        """z (C, b, D), joined (C, b or 1, h) of time and condition, effect (C, 1, D) -> (C, b, D) float32."""
        def act(x):
            return F.dropout(F.silu(x), self.dropout, training)
        x = act(self.state[1](act(self.state[0](z))))
        x = act(self.join_state(x) + joined)
        return (F.linear(act(self.joint(x)), self.out.weight) + effect).float()

    def integrate(self, z, c, effect):
        """Midpoint rule from t=0 to 1, without dropout: control latents z (C, b, D) -> perturbed latents. c, effect:
        of condition()."""
        K = self.steps
        time = self.time(torch.linspace(0, 1, 2 * K + 1, device=z.device)[:-1])             # (2 K, h): start and middle
        joined = (time[:, None, None] + self.join_condition(c)[:, None]).unbind()           # each (C, 1, h)
        for i in range(0, 2 * K, 2):
            middle = torch.add(z, self.velocity(z, joined[i], effect), alpha=0.5 / K)
            z = torch.add(z, self.velocity(middle, joined[i + 1], effect), alpha=1 / K)
        return z

    def forward(self, z_t, t, told, keep, start, among):
        """Velocity (C, b, D) at z_t (C, b, D) and t (C, b), told slots() of the conditions, their embedding times its
        dropout mask, keep (C, 256); and the end points of start (S, n, D), control latents of the S among the C."""
        c, effect = self.condition(*told)
        joined = self.time(t) + self.join_condition(c * keep)[:, None]                      # (C, b, h)
        v = self.velocity(z_t, joined, effect, self.training)
        return v, self.integrate(start, c[among], effect[among])


class ScBIG(nn.Module):
    """Autoencoder and flow, with all that they know of the data and the priors as buffers."""

    def __init__(self, config, panel, priors):
        """priors: see load_priors, or a checkpoint's weights, which hold them: autoencoder.module_of, ..."""
        super().__init__()
        priors = {name.rpartition(".")[2]: value for name, value in priors.items()}
        self.autoencoder = Autoencoder(config, priors)
        self.flow = Flow(config, priors, sum(map(len, panel.covariates.values())))
        self.register_buffer("pathways", priors["pathways"])             # (Q, G), rows sum to 1
        for layer in self.modules():
            if isinstance(layer, nn.Linear):                             # LeCun normal (official)
                nn.init.normal_(layer.weight, std=layer.in_features ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def decode(autoencoder, start, end, control=None):
    """Cells (n, G) at the latents end (n, D); given the control cells (n, G) that start (n, D) encodes, plus what the
    autoencoder loses of them."""
    if control is None:
        return autoencoder.decode(end)
    cells, controls = autoencoder.decode(torch.cat([end, start])).chunk(2)
    return cells + (control - controls)


# -------------------------------------------------------------------------------- losses

OT_ITERATIONS = 10      # enough at epsilon 1, where official runs end after one check


def correlation_loss(pred, real, member):
    """L_corr (eq. 7): distance of the modules' correlation over predicted and over real cells, mean over conditions.

    pred (S, n, G), real (S, m, G), member (G, K) averaging; Frobenius norm over K. C also clips the standardised values
    at 10, which no value reaches among 101 cells or fewer."""
    def correlation(x):                                                  # (S, n, G) -> (S, K, K)
        y = F.layer_norm((x @ member).mT, x.shape[1:2], eps=1e-12)       # (S, K, n), standardised over the cells
        return y @ y.mT / x.shape[1]
    with torch.autocast(pred.device.type, enabled=False):
        return torch.linalg.vector_norm(correlation(pred) - correlation(real), dim=(1, 2)).mean() / member.shape[1]


def pathway_loss(pred, real, pathways, epsilon=0.1, iterations=100):
    """L_path (eq. 8): transport cost between the pathway activities of predicted and real cells, mean over conditions.

    pred (S, n, G), real (S, m, G), pathways (Q, G), rows sum to 1. Cost: squared distance over Q; epsilon: relative to
    its mean. The plan is constant for the gradient: exact for the entropic value (envelope theorem)."""
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
    return torch.baddbmm(norms, a, b.mT, alpha=-2).clamp(min=0)


def ot_partners(z0, z1, u, epsilon):
    """For every control latent a partner among the perturbed ones, drawn from its row of the condition's entropic plan:
    z0, z1 (C, b, D), u (C, b) uniform -> z1 reordered, with repetition. Cost: squared distance over its mean."""
    with torch.autocast(z0.device.type, enabled=False):
        cost = squared_distance(z0, z1)
        plan = sinkhorn(cost, epsilon * cost.mean((1, 2), keepdim=True), OT_ITERATIONS)
        mass = plan.cumsum(-1)
        partner = torch.searchsorted(mass, u[..., None] * mass[..., -1:]).clamp(max=z1.shape[1] - 1)     # (C, b, 1)
        return z1.gather(1, partner.expand(-1, -1, z1.shape[2]))


class Objective(nn.Module):
    """The losses of a step of stage 2, from partners to pathways: one module, so that compiled it is one graph."""

    def __init__(self, model, config):
        super().__init__()
        self.config, self.flow = config, model.flow
        self.autoencoder = copy.deepcopy(model.autoencoder).eval().requires_grad_(False)     # frozen, no dropout
        # (G, K): mean of a module's genes
        self.register_buffer("member", F.normalize(F.one_hot(model.autoencoder.module_of).float(), p=1, dim=0))
        self.register_buffer("pathways", model.pathways)

    def forward(self, z0, z1, told, keep, start, real, control, among):
        """z0, z1 (C, b, D) latents of control and perturbed cells, not yet paired; told, keep, among: see Flow; for
        the structure losses start (S, n, D), latents of control cells, these cells (S n, G) or None, and real cells
        (S, n, G). Returns {name: loss (eq. 9), or one of its terms}."""
        config = self.config
        # pairs of control and perturbed latents, a point between them, and the velocity to learn (eq. 6)
        t, u = torch.rand(2, *z0.shape[:2], device=z0.device)
        z1 = ot_partners(z0, z1, u, config.ot_epsilon)
        z_t = torch.lerp(z0, z1, t[..., None]).add(torch.randn_like(z0), alpha=config.sigma)
        v, end = self.flow(z_t, t, told, keep, start, among)
        flow = F.mse_loss(v, z1 - z0)
        pred = decode(self.autoencoder, start.flatten(0, 1), end.flatten(0, 1), control).view_as(real)
        zero = torch.zeros_like(flow)
        corr = correlation_loss(pred, real, self.member) if config.corr_weight else zero
        path = pathway_loss(pred, real, self.pathways, 0.1, config.path_iterations) if config.path_weight else zero
        loss = flow + config.corr_weight * corr + config.path_weight * path
        return {"loss": loss, "flow": flow, "corr": corr, "path": path}


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(integrate, model, control, told, residual):
    """A perturbed cell for each control cell (n, G) log1p CP10k, of one condition, told its slots(): (n, G) float32,
    which may be negative. integrate: model.flow.integrate, compiled or not."""
    start = model.autoencoder.encode(control)
    end = integrate(start[:, None], *model.flow.condition(*told))[:, 0]
    return decode(model.autoencoder, start, end, control if residual else None)


def slots(groups, panel, config):
    """What the flow is told of groups (CONDITION or CONDITION@COVARIATE): tokens, mask, dose (C, slots), 1 where there
    is none, and covariates (C, V) one-hot. A covariate value that the training file did not have is all zeros."""
    table = token_table(panel, config)[1]
    parts = [data.split_group(group)[0].split("+") for group in groups]
    shape = len(parts), max(2, max(map(len, parts)))
    token, dose = torch.zeros(shape, dtype=torch.long), torch.ones(shape)
    mask = torch.zeros(shape, dtype=torch.bool)
    for i, names in enumerate(parts):
        for j, name in enumerate(names):
            mask[i, j] = True
            token[i, j], dose[i, j] = table[name]
    return token, mask, dose, panel.one_hot(groups, strict=False)


def build(config, panel, weights):
    """The model of a checkpoint, to be given its weights."""
    return ScBIG(config, panel, weights)


def told_of(model, run, group, control):
    """What the model is told of one group, CONDITION or CONDITION@COVARIATE: its slots()."""
    return [a.to(run.device) for a in slots([group], run.panel, run.config)]


def cell_bytes(model, config, columns):
    """Memory that one generated cell takes: activations."""
    return 4 * (20 * len(model.autoencoder.gather) + 12 * config.modules * config.width + 8 * config.hidden)


def generate(model, run, told, control, noise, columns):
    """Cells (B, G) of one group, from control cells (B, G) log1p CP10k; nothing is drawn."""
    with run.autocast():
        return sample(run.compiled(model.flow.integrate), model, control, told, run.config.residual)


# -------------------------------------------------------------------------------- training

def learning_rates(optimizer, config, steps):
    """Schedule of a stage: constant, or 5% of linear warm-up and a cosine to 0."""
    if config.schedule == "constant":
        return data.schedule(optimizer, steps, least=optimizer.defaults["lr"])
    return data.schedule(optimizer, steps, 0.05 * steps - 1, overlap="lower")


def pretrain(run, state, model):
    """Stage 1: model.autoencoder learns to reconstruct training and control cells (eq. 5). state: a checkpoint of this
    stage, or None."""
    config, dataset = run.config, run.dataset
    B = config.pretrain_batch_size
    optimizer = torch.optim.Adam(model.autoencoder.parameters(), lr=config.pretrain_lr, fused=True)
    schedule = learning_rates(optimizer, config, config.pretrain_steps)
    content = {"model": model, "optimizer": optimizer, "schedule": schedule}
    begin = run.resume(state, content, stage="pretraining", steps=config.pretrain_steps, cells=B)
    net = run.wrap(model.autoencoder)
    rows = torch.from_numpy(dataset.fit_rows).to(dataset.index_device)
    for step in range(begin + 1, config.pretrain_steps + 1):
        run.start(step)
        x = dataset.gather(rows[torch.randint(len(rows), (B,), device=rows.device)])         # (B, G)
        with run.autocast():
            loss = F.mse_loss(net(x), x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        run.finish(step, content, loss=loss)


def train(run, state):
    """Train both stages and return the model that predicts."""
    config, dataset = run.config, run.dataset
    panel, device = run.panel, run.device
    C, b = config.conditions_per_batch, config.batch_size // config.conditions_per_batch     # conditions, cells of each
    S, n = config.structure_conditions, config.structure_cells
    if config.modules > len(panel.genes):
        raise DataError(f"--modules {config.modules}: there are only {len(panel.genes)} genes; choose fewer")

    # model and stage 1; a resumed run takes the priors over
    torch.manual_seed(config.seed)
    priors = state["content"]["model"] if state else load_priors(run)
    model = ScBIG(config, panel, priors).to(device)
    second = state if state and state["stage"] == "training" else None
    if not second:
        pretrain(run, state, model)

    # stage 2: the flow alone is trained
    ema = copy.deepcopy(model) if config.ema else model
    optimizer = torch.optim.Adam(model.flow.parameters(), lr=config.lr, fused=True)
    schedule = learning_rates(optimizer, config, config.steps)
    content = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    begin = run.resume(second, content)
    objective = Objective(model, config)
    net = run.wrap(objective)

    # latents of all training and control cells, once; training conditions: number of their group, and slots() of it
    latents = torch.zeros(dataset.X.shape[0], config.latent, device=device)
    with torch.no_grad():
        for rows in torch.from_numpy(dataset.fit_rows).to(device).split(4096):
            latents[rows] = objective.autoencoder.encode(dataset.gather(rows))
    names = dataset.part("train")
    group = torch.tensor([dataset.groups.index(g) for g in names], device=dataset.index_device)
    conditions = [a.to(device) for a in slots(names, panel, config)]
    among = torch.arange(S, device=dataset.index_device) * C // S        # of the C, those for the structure losses
    run.say(f"{sum(p.numel() for p in model.autoencoder.parameters()):,} parameters in the autoencoder, "
            f"{sum(p.numel() for p in model.flow.parameters()):,} in the flow; {len(names)} training conditions, "
            f"{len(panel.genes):,} genes, {config.modules} modules, {len(model.pathways):,} pathways; "
            f"latents have a standard deviation of {latents[dataset.fit_rows].std(0).mean():.2f}")

    for step in range(begin + 1, config.steps + 1):
        run.start(step)
        # batch: latents of b cells of each of C conditions and of their controls; dropout of the condition
        pick = torch.randint(len(group), (C,), device=dataset.index_device)
        both = torch.cat([group[pick], dataset.controls_for(group[pick])])
        z1, z0 = latents[dataset.draw(both, b)].unflatten(0, (2, C, b))
        told = [a[pick.to(device)] for a in conditions]
        keep = (torch.rand(C, 256, device=device) >= config.condition_dropout) / (1 - config.condition_dropout)

        # for the structure losses, of S of the conditions: latents of n controls, and n real cells
        chosen = group[pick[among]]
        rows = dataset.draw(dataset.controls_for(chosen), n)
        start = latents[rows].unflatten(0, (S, n))                                           # (S, n, D)
        real = dataset.gather(dataset.draw(chosen, n)).unflatten(0, (S, n))                  # (S, n, G)
        control = dataset.gather(rows) if config.residual else None                          # (S n, G)

        with run.autocast():
            losses = net(z0, z1, told, keep, start, real, control, among.to(device))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.flow.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        data.average(ema.flow, model.flow, config.ema)

        if config.eval_every and step % config.eval_every == 0:
            run.validate(step, ema)
        run.finish(step, content, **losses)                              # log line, checkpoint, Ctrl-C
    return ema.eval()

# ---------------------------------------------------------------- run section, the same text in all four methods

class Run:
    """What is not the method: device, precision, processes, random numbers, the log line, the checkpoint."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.out)
        self.method = METHOD
        self.device = data.pick_device(config.device)
        self.rank, self.world = data.join_processes(self.device)
        cuda = self.device.type == "cuda"
        self.bf16 = config.dtype == "bf16" or (config.dtype == "auto" and cuda and torch.cuda.is_bf16_supported(False))
        self.compile = cuda if config.compile is None else config.compile
        self.functions = {}                     # compiled ones
        self.dataset = self.panel = None        # of the data, or of a checkpoint
        self.stage, self.steps = "", 0          # of training
        self.cells = 0                          # of one step
        self.journal = None                     # of the present stage
        self.capped = 0                         # generated values that were cut
        self.signals = data.Signals(self.say)

    def say(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def wrap(self, model):
        """The model to call in training: distributed over processes, compiled if asked."""
        if self.world > 1:
            model = nn.parallel.DistributedDataParallel(model)
            model.broadcast_buffers = False     # they are the same everywhere; as an argument it is deprecated
        return torch.compile(model) if self.compile else model

    def compiled(self, function):
        """A function of sampling, compiled once, if asked, for any number of cells: the first size of its arguments."""
        if not self.compile:
            return function
        if function not in self.functions:      # two models have two, of one name
            self.functions[function] = torch.compile(function)
        return lambda *args: self.functions[function](*data.of_any_length(args))

    def resume(self, state, content, stage="training", steps=0, cells=0):
        """Begin a stage of training; returns the last step that was done. state: a checkpoint of it, or None; content:
        {name: model or optimiser} of its checkpoints; steps: of the stage (0: --steps); cells: per step and process
        (0: --batch-size)."""
        data.restore(self, state, content)
        self.stage, self.steps = stage, steps or self.config.steps
        self.cells = (cells or self.config.batch_size) * self.world
        self.journal = data.Journal(self, state)
        done = state["step"] if state else 0
        if done < self.steps:
            self.signals.hold()
        return done

    def start(self, step):
        """Before a step: its random numbers follow from (seed, stage, step, process); a checkpoint needs none."""
        seed = data.seed_of(self.config.seed, self.stage, step, self.rank)
        torch.default_generator.manual_seed(seed)       # torch.manual_seed looks for every kind of device, each time
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def finish(self, step, content, **losses):
        """After a step: now and then a log line, a line on the console and a checkpoint; all three at the end of the
        stage and on a signal, which ends the program. Until then the losses stay on the device."""
        stop = self.signals.agreed(step, self.world, self.device)
        self.journal.step(step, content, losses, last=stop or step == self.steps)
        if stop or step == self.steps:
            self.signals.release()
        if stop:
            self.say(f"stopped at step {step} of {self.steps} ({self.stage}); go on with: python {METHOD}.py --out "
                     f"{self.out} --resume")
            sys.exit(128 + stop)

    def validate(self, step, model):
        """Scores of the validation conditions, for console and log; training's random numbers are not touched."""
        if self.rank == 0 and self.dataset.part("val"):
            model.eval()
            sizes = self.dataset.sizes("val", min(self.config.eval_cells, 100))
            cells = predict(self, model, sizes, self.dataset.control_cells("val"), self.panel.eval_genes)
            model.train()
            metrics.validation(self, step, cells)


@torch.no_grad()
def predict(run, model, sizes, controls, columns, **options):
    """Cells {group: (n, E)} of the groups {group: n}, from control cells {covariate: (m, G)}, for columns (E,) of the
    panel. A group's cells do not depend on the other groups, nor a cell on the chunk that it is generated in."""
    data.check_groups(run.panel, sizes, controls, UNSEEN)
    out, chosen = {}, torch.as_tensor(columns, device=run.device)
    at_once = data.cells_at_once(run.device, cell_bytes(model, run.config, columns))
    for group, n in data.progress(sizes.items(), "generating: conditions"):
        seed = data.seed_of(group, run.config.seed)
        control = torch.from_numpy(data.pick_rows(controls[data.split_group(group)[1]], n, seed))
        noise = torch.randn(control.shape, generator=torch.Generator(run.device).manual_seed(seed), device=run.device)
        told, cells = told_of(model, run, group, control), []
        chunks = math.ceil(n / at_once)
        for start, z in zip(control.tensor_split(chunks), noise.tensor_split(chunks)):
            made = generate(model, run, told, start.to(run.device), z, columns, **options)       # (b, G)
            cells.append(made.index_select(1, chosen).cpu())
        out[group], capped = data.as_measured(torch.cat(cells).numpy(), run.panel, columns, run.config.zeros, seed)
        run.capped += capped
    return out


def main(argv=None):
    """Command line: train and score a run, go on with one, or use its checkpoint."""
    with data.clean_errors():
        config, state = data.parse_run(METHOD, __doc__, Config, PRESETS, SAMPLING, USES, argv)
        check(config)
        run = Run(config)
        if config.ckpt and not config.predict:
            return next(use for flag, use in USES.items() if getattr(config, flag))(run, state)
        if config.ckpt:
            model = data.trained_model(run, state, build)
            return data.write_prediction(run, state, model, predict, UNSEEN)
        data.open_run(run, state)
        model = train(run, state)
        if run.world > 1:
            torch.distributed.destroy_process_group()
        if run.rank == 0 and run.dataset.part("test"):
            sizes = run.dataset.sizes("test", config.eval_cells, config.exact_cells)
            controls = run.dataset.control_cells("test")
            rows = {name: predict(run, model, sizes, controls, run.panel.eval_genes, **options)
                    for name, options in (variants(config) if variants else {"": {}}).items()}
            data.write_populations(run, run.out / "pred.h5ad", rows[""], controls, run.panel.eval_genes)
            metrics.report(run, METHOD, rows)

# ---------------------------------------------------------------- end of the run section

if __name__ == "__main__":
    main()
