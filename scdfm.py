"""scDFM: flow matching in expression space with an MMD term, on a perturbation-aware differential transformer.

A cell is a sequence of gene tokens. A transformer predicts the velocity that turns Gaussian noise into a perturbed
cell, given a control cell (cross-attention), the perturbation (an adapter in every layer) and the flow time
(adaLN-Zero). Attention is differential: the difference of two softmax maps. An encoder masked by the co-expression
graph embeds genes and CRISPR perturbations, also those never perturbed in training. The loss is flow matching plus the
MMD between the generated and the real cells of one condition.

Paper: Yu, Wang, Liao, Wu, "scDFM: Distributional flow matching for robust single-cell perturbation prediction" (P).
Official code: github.com/AI4Science-WestlakeU/scDFM @2cf6bca (MIT) (C). Nothing here is copied from it.

    python scdfm.py                                             demo data, laptop size, about 2 minutes on 2 cores
    python scdfm.py --data norman.h5 --split holdout              the paper's configuration; GPU if there is one
    python scdfm.py --data norman.h5 --split holdout --resume     go on after Ctrl-C or a crash
    python scdfm.py --ckpt runs/X/ckpt.pt --predict CEBPA KLF1+MAP2K6 --cells 500 --out pred.h5ad
    torchrun --nproc-per-node 4 scdfm.py --data norman.h5 --split additive
Ablations of figure 5: --mmd-weight 0 (no MMD), --knn 0 (no gene mask), --no-differential (plain attention).

Deviations:
 1. The adapter adds to h, h + MLP([h ; e_p]); P and C replace h.
 2. The sinusoid encodes 1000 t; C encodes t in [0, 1], where most frequencies are nearly constant.
 3. Cross-attention is the paper's, Q from h, K and V from the control cells (eq. 12); C: map 1 on h, map 2 on control.
 4. h and h_c start as value + gene embedding (eq. 6). C: an MLP of both, re-injected in every layer.
 5. adaLN-Zero starts at zero; a later initialisation pass of C overwrites that.
 6. The co-expression graph is of training and control cells, log1p CP10k; the encoder attends to all G genes as in C.
 7. One gene subset per step, shared by the batch, as in C (P draws one per cell): the encoder runs once per step.
 8. Evaluation genes have the highest means in training control cells (P A.4.1; P 4.1 and C: variable ones, in C
    of the test cells). Variable genes of the panel are chosen on training cells; P on all (--hvg-on all).
 9. Validation doubles train, as in C (P has a validation part), and the last model predicts; C selects on its test
    set. As many cells are generated as a condition really has, at most 1,000; in C 128.
10. --conditions-per-batch takes the MMD within each condition and averages; 1 in P and C. As in P's algorithm 1 x1_hat
    is made from the x1 that it is compared with, so at equal laws the MMD is below 0: -0.05 for 8 cells, -0.004 for 96.
11. Ours: --ema, no dropout on attention weights, no bias where softmax cancels it, the mean over more than two slots
    for triples. Always: inputs are clamped at 512, output at 0 and at the gene's training maximum (data.as_measured).
12. A perturbation that is no gene of the panel (a drug) has its own token with a self loop: a learned vector.
13. --effect-readout and --precondition (demo): the velocity starts as that of a Gaussian per gene, a linear readout
    of e_p adds a constant per gene, and the network learns the rest: small data do not teach it a table of effects.
    l2/e_distance on the demo, seeds 0 and 1: 4.39/1.14; without them 5.15/1.55, 4.59/1.26; --zeros clamp 4.38/1.42.
    A constant of 0.3 alone moves the mean by 0.12, 0.20, 0.32, 0.37 at variances 0.02, 0.1, 0.5, 1; the factor of t
    under which it would arrive whole gained nothing.
14. Every process draws its own batch and gene subset, from (seed, step, process).
"""
import copy
import math
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
from data import DataError

METHOD = Path(__file__).stem


@dataclass
class Config(data.RunConfig):
    """The paper's configuration; PRESETS lists what --preset demo changes."""
    steps: int = 100_000            # length of the schedule (paper A.4.3)
    batch_size: int = 96            # target cells per step and process (paper; official run.sh 48)
    lr: float = 5e-5                # Adam (paper)
    hvg: int = 5000                 # paper A.4.1
    min_cells: int = 0              # paper A.4.1 filters no genes
    train_on_val: bool = True       # official; the paper has a validation part, of no stated size
    width: int = 512                # d (paper A.4.3, official run.py)
    layers: int = 4                 # PAD-Transformer layers (official)
    heads: int = 8                  # attention heads (official)
    dropout: float = 0.1            # official
    gene_subset: int = 1000         # S: genes drawn per step, shared by the batch (official run.py:85)
    knn: int = 30                   # co-expression neighbours per gene; 0 removes the mask (ablation)
    mmd_weight: float = 0.5         # lambda of eq. 4 (official gamma); 0 removes the MMD (ablation)
    differential: bool = True       # differential attention (eq. 8-9); off is plain attention (ablation)
    effect_readout: bool = False    # velocity += e_p W', W (G, d) from zero (ours; paper: none)
    precondition: bool = False      # the network learns what a Gaussian per gene leaves (ours; paper: none)
    conditions_per_batch: int = 1   # the MMD is taken within each; paper 1
    lr_min: float = 1e-6            # end of the cosine (paper)
    ema: float = 0.0                # decay of averaged weights used for prediction; 0 is none, as in the paper
    ode_steps: int = 100            # K of Euler (paper); official 20 of rk4


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    data.check_numbers(vars(config), "width heads layers gene_subset conditions_per_batch ode_steps",
                       below_one="dropout ema")
    cells, conditions = config.batch_size, config.conditions_per_batch
    least = 2 if config.mmd_weight else 1
    if cells % conditions or cells // conditions < least:
        raise DataError(f"--batch-size {cells} --conditions-per-batch {conditions}: the batch must hold as many cells "
                        "of one condition as of another, at least two with the MMD")
    if config.lr_min > config.lr:
        raise DataError(f"--lr-min {config.lr_min}: must not be above --lr {config.lr}; lower it")
    if config.width % config.heads:
        raise DataError(f"--width {config.width}: must be a multiple of --heads {config.heads}")


PRESETS = {"paper": {}, "demo": dict(
    steps=500, hvg=1000, min_cells=10, train_on_val=False, batch_size=64, conditions_per_batch=8, lr=3e-3, lr_min=1e-5,
    width=64, layers=2, heads=2, dropout=0.0, ema=0.99, gene_subset=60, effect_readout=True, precondition=True,
    ode_steps=12, zeros="detect", eval_cells=100)}
SAMPLING = {"ode_steps"}                # flags that --ckpt may change
UNSEEN = True                           # whether genes that were never perturbed can be predicted
variants = None                         # further rows of the table
USES = {}                               # {flag: what --ckpt is for besides --predict}


# -------------------------------------------------------------------------------- model

def statistics(dataset, k):
    """Of training and control cells: the co-expression graph (G, G) bool, None for k = 0, and the mean and variance of
    each gene (2, G). The graph joins each gene to itself and to the k genes of highest |Pearson|, made symmetric
    (eq. 7); a gene without variance only to itself."""
    mean, variance, corr = data.gene_statistics(dataset)
    moments = torch.stack([mean, variance])
    if k == 0:
        return None, moments
    corr = corr.abs().fill_diagonal_(-1)                                 # last in its own ranking
    strength, neighbour = corr.topk(min(k, len(corr) - 1), dim=1)        # (G, k)
    graph = torch.zeros_like(corr, dtype=torch.bool).scatter_(1, neighbour, strength > 0)
    return (graph | graph.T).fill_diagonal_(True), moments


class GeneEncoder(nn.Module):
    """E_g: table -> LayerNorm -> one pre-norm transformer layer in which the Q tokens asked for attend to all that the
    graph allows (official layers.py). N tokens: genes, the empty slot, perturbations that are no gene of the panel."""

    def __init__(self, n_tokens, width, heads, dropout, graph):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.table = nn.Embedding(n_tokens, width)
        self.norm_table = nn.LayerNorm(width)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)                # a bias of K would cancel in the softmax
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(4 * width, width))
        mask = None
        if graph is not None:                                            # tokens that are no gene see only themselves
            mask = torch.eye(n_tokens, dtype=torch.bool, device=graph.device)
            mask[:len(graph), :len(graph)] = graph
        self.register_buffer("graph", mask)                              # (N, N)

    def forward(self, tokens):
        """(Q,) token numbers -> (Q, d)."""
        def split(x):                                                    # (n, d) -> (1, H, n, d/H)
            return x.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
        table = self.norm_table(self.table.weight)                       # (N, d)
        normed = self.norm_attention(table)
        k, v = self.kv(normed).chunk(2, dim=-1)
        mask = None if self.graph is None else self.graph[tokens]        # (Q, N)
        a = F.scaled_dot_product_attention(split(self.q(normed[tokens])), split(k), split(v), attn_mask=mask)
        x = table[tokens] + F.dropout(self.out(a[0].transpose(0, 1).flatten(1)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm_mlp(x)), self.dropout, self.training)


def differential_attention(q, k, v, lam, norm_weight, lam_init):
    """(softmax(q1 k1') - lam softmax(q2 k2')) v, RMS-normalised per head (eq. 8-9; official blocks.py).

    q (B, 2H, T, d/H), k (B, 2H, S, d/H): the heads of map 1, then of map 2; v (B, H, S, d/H). Returns (B, H, T, d/H).
    """
    a1, a2 = F.scaled_dot_product_attention(q, k, torch.cat([v, v], dim=1)).chunk(2, dim=1)
    return (1 - lam_init) * F.rms_norm(a1 - lam.to(a1) * a2, v.shape[-1:], norm_weight.to(a1), eps=1e-5)


class Attention(nn.Module):
    """Differential (or plain) multi-head attention, to x itself or to control cells (eq. 12)."""

    def __init__(self, width, heads, layer, differential):
        super().__init__()
        self.width, self.heads = width, heads
        self.differential = differential
        maps = 2 if differential else 1
        self.q, self.k = nn.Linear(width, maps * width, bias=False), nn.Linear(width, maps * width, bias=False)
        self.v, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        if differential:
            self.lam_init = 0.8 - 0.6 * math.exp(-0.3 * layer)           # layer counts from 0
            self.lam = nn.Parameter(0.1 * torch.randn(4, width // heads))  # lq1, lk1, lq2, lk2
            self.norm = nn.Parameter(torch.ones(width // heads))

    def split(self, x):                                                  # (B, S, n d) -> (B, n H, S, d/H)
        return x.unflatten(-1, (-1, self.width // self.heads)).transpose(1, 2)

    def cache(self, control):
        """What depends on the control cells (B, S, d) alone; constant over the ODE."""
        return self.split(self.k(control)), self.split(self.v(control))

    def forward(self, x, cached=None):
        """x (B, S, d) -> (B, S, d)."""
        q = self.split(self.q(x))
        k, v = cached or self.cache(x)
        if self.differential:
            lq1, lk1, lq2, lk2 = self.lam.unbind()
            lam = (lq1 * lk1).sum().exp() - (lq2 * lk2).sum().exp() + self.lam_init  # no matmul: fp32 under autocast
            a = differential_attention(q, k, v, lam, self.norm, self.lam_init)
        else:
            a = F.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """DiT block: adaLN-Zero attention, then an adaLN-Zero MLP (Peebles and Xie)."""

    def __init__(self, config, layer):
        super().__init__()
        self.attention = Attention(config.width, config.heads, layer, config.differential)
        self.mlp = nn.Sequential(nn.Linear(config.width, 4 * config.width), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * config.width, config.width), nn.Dropout(config.dropout))

    def forward(self, x, modulation, cached=None):
        """x (B, S, d), modulation (B or 1, 6, d) -> (B, S, d)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, :, None].unbind(1)  # each (B or 1, 1, d)
        width = x.shape[-1:]
        x = x + gate_a * self.attention(F.layer_norm(x, width) * (1 + scale_a) + shift_a, cached)
        return x + gate_m * self.mlp(F.layer_norm(x, width) * (1 + scale_m) + shift_m)


class Layer(nn.Module):
    """PAD-Transformer layer: perturbation injection, self- and cross-differential attention (eq. 10-12)."""

    def __init__(self, config, number):
        super().__init__()
        d = config.width
        self.inject, self.inject_e = nn.Linear(d, d), nn.Linear(d, d, bias=False)    # one map of [h ; e_p], in halves
        self.adapter = nn.Sequential(nn.LeakyReLU(), nn.Dropout(config.dropout), nn.Linear(d, d), nn.LeakyReLU())
        self.self_block = Block(config, number)
        self.cross_block = Block(config, number)

    def forward(self, h, modulation, e, cached):
        """h (B, S, d), modulation (B or 1, 12, d), e (B, 1, d), keys and values of the control cells -> (B, S, d)."""
        h = h + self.adapter(self.inject(h) + e)
        h = self.self_block(h, modulation[:, :6])
        return self.cross_block(h, modulation[:, 6:], cached)


class Given(typing.NamedTuple):
    """What the velocity of B = C * b cells is conditioned on; the cells of a condition are consecutive."""
    control: torch.Tensor   # (B, S) control cells, log1p CP10k
    genes: torch.Tensor     # (S,) columns of the panel
    tokens: torch.Tensor    # (C, K) of slots()
    weight: torch.Tensor    # (C, K) of slots()


class Context(typing.NamedTuple):
    """All that depends on neither x_t nor t: computed once per batch in training, once per ODE in sampling."""
    gene: torch.Tensor      # (S, d) gene embeddings
    inject: list            # per layer (B, 1, d), the perturbation's half of its injection
    control: list           # per layer, keys and values of the control cells
    decoder: torch.Tensor   # (B, 1, d), the perturbation's half of the last injection
    effect: torch.Tensor    # (B, S), the perturbation's effect on each gene by the readout, or 0
    moments: torch.Tensor   # (2, S), mean and variance of each gene


class ScDFM(nn.Module):
    """Velocity field v(x_t | t, control, perturbation) over S gene tokens (eq. 6-13)."""

    def __init__(self, config, panel, graph=None, moments=None):
        """graph (G, G) bool, moments (2, G) mean and variance of each gene, or None to load them with the weights."""
        super().__init__()
        d, G = config.width, len(panel.genes)
        if graph is None and config.knn:
            graph = torch.zeros(G, G, dtype=torch.bool)
        n_tokens = G + 1 + len(panel.outside())                          # genes, the empty slot, other perturbations
        self.encoder = GeneEncoder(n_tokens, d, config.heads, config.dropout, graph)

        def value_mlp():                                                 # (B, S, 1) -> (B, S, d)
            return nn.Sequential(nn.Linear(1, d), nn.ReLU(), nn.Linear(d, d), nn.LayerNorm(d),
                                 nn.Dropout(config.dropout))
        self.value, self.value_control = value_mlp(), value_mlp()
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.modulate = nn.Linear(d, config.layers * 12 * d)             # adaLN of all blocks in one product
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.inject, self.inject_e = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.decoder = nn.Sequential(nn.LeakyReLU(), nn.Linear(d, d), nn.LeakyReLU(), nn.Linear(d, 1))
        self.precondition = config.precondition
        self.register_buffer("moments", torch.zeros(2, G) if moments is None else moments)
        self.readout = nn.Parameter(torch.zeros(G, d)) if config.effect_readout else None
        trained = slots(panel.trained, panel)[0].flatten()               # the empty slot among them
        self.register_buffer("trained", torch.zeros(n_tokens).index_fill(0, trained, 1))
        nn.init.zeros_(self.modulate.weight)                             # the Zero of adaLN-Zero
        nn.init.zeros_(self.modulate.bias)

    def modulation(self, t):
        """(n,) times in [0, 1] -> (n, L, 12, d): shift, scale and gate of every block."""
        return self.modulate(self.time(timestep_embedding(1000 * t))).unflatten(-1, (len(self.layers), 12, -1))

    def context(self, given):
        """Given -> Context."""
        control, genes, tokens, weight = given
        B, S = control.shape
        embedded = self.encoder(torch.cat([genes, tokens.flatten()]))    # once for the batch: (S + C K, d)
        gene, slot = embedded[:S], embedded[S:].unflatten(0, tokens.shape)       # (S, d), (C, K, d)

        def per_cell(a):                                                 # (C, n) -> (B, n)
            return a.repeat_interleave(B // len(tokens), dim=0, output_size=B)
        e = (slot * weight[..., None]).sum(1)                            # mean over slots: (C, d)
        effect = torch.zeros((), device=control.device)
        if self.readout is not None:                                     # what training never saw has no effect
            seen = (slot * (weight * self.trained[tokens])[..., None]).sum(1)
            effect = per_cell((seen @ self.readout[genes].T).float())
        h_c = self.value_control(control.clamp(max=512)[..., None]) + gene       # eq. 6: (B, S, d)
        inject = [per_cell(layer.inject_e(e))[:, None] for layer in self.layers]
        cached = [layer.cross_block.attention.cache(h_c) for layer in self.layers]
        return Context(gene, inject, cached, per_cell(self.inject_e(e))[:, None], effect, self.moments[:, genes])

    def velocity(self, x, t, modulation, context):
        """x (B, S), t (B or 1,), modulation (B or 1, L, 12, d) of these times -> velocity (B, S) float32."""
        h = self.value(x.clamp(max=512)[..., None]) + context.gene               # eq. 6
        for i, layer in enumerate(self.layers):
            h = layer(h, modulation[:, i], context.inject[i], context.control[i])
        v = self.decoder(self.inject(h) + context.decoder).squeeze(-1).float()    # eq. 13
        if self.precondition:
            v = v + gaussian_velocity(x, t[:, None], context.moments[0], context.moments[1])
        return v + context.effect

    def forward(self, x, t, given):
        return self.velocity(x, t, self.modulation(t), self.context(given))


def gaussian_velocity(x, t, mean, variance):
    """E[x1 - x0 | x_t = x] on the linear path from N(0, 1) to N(mean, variance): x (B, S), t (B or 1, 1) -> (B, S)."""
    slope = (t * variance - (1 - t)) / (t ** 2 * variance + (1 - t) ** 2).clamp(min=1e-6)
    return mean + slope * (x - t * mean)


def timestep_embedding(t):
    """(n,) -> (n, 256): cosines, then sines, at geometric frequencies from 1 to 1 / 10,000 (eq. 14)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# -------------------------------------------------------------------------------- losses

def mmd_squared(real, generated):
    """Unbiased squared MMD with four Gaussian kernels (algorithm 1), per condition: (C, m, S), (C, n, S) -> (C,).
    Bandwidths: sigma^2 = s x the lower median squared distance of the real cells, s in {0.5, 1, 2, 4}, no gradient.
    In fp64: a squared distance is a small difference of large products."""
    with torch.autocast(real.device.type, enabled=False):
        x, y = real.double(), generated.double()
        m, n = x.shape[1], y.shape[1]
        z = torch.cat([x, y], dim=1)
        norm = z.square().sum(-1)
        distance = (norm[:, :, None] + norm[:, None] - 2 * z @ z.transpose(1, 2)).clamp(min=0)  # (C, m + n, m + n)
        i, j = torch.triu_indices(m, m, 1, device=x.device)
        median = distance[:, i, j].detach().median(dim=1).values.clamp(min=1e-6)
        kernel = sum(torch.exp(-distance / (2 * s * median[:, None, None])) for s in (0.5, 1.0, 2.0, 4.0)) / 4
        kernel = kernel - torch.diag_embed(kernel.diagonal(dim1=1, dim2=2))      # unbiased: self-similarities drop out
        xx, yy = kernel[:, :m, :m].sum((1, 2)), kernel[:, m:, m:].sum((1, 2))
        xy = kernel[:, :m, m:].sum((1, 2))
        return (xx / (m * (m - 1)) + yy / (n * (n - 1)) - 2 * xy / (m * n)).float()


def scdfm_loss(net, x1, x0, t, given, mmd_weight):
    """Both terms of eq. 4: flow matching, and MMD^2 of the one-step endpoint. x1 cells and x0 noise (B, S), t (B,)."""
    x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
    v = net(x_t, t, given)
    flow = (v - (x1 - x0)).square().mean()
    if mmd_weight == 0:
        return flow, torch.zeros_like(flow)
    C = len(given.tokens)
    x1_hat = x_t + (1 - t)[:, None] * v
    return flow, mmd_squared(x1.unflatten(0, (C, -1)), x1_hat.unflatten(0, (C, -1))).mean()


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(velocity, model, x, given, config):
    """Integrate the flow from noise x (B, S) at t=0 to cells (B, S) float32 at t=1 (algorithm 3); velocity:
    model.velocity, compiled or not."""
    K, context = config.ode_steps, model.context(given)
    t = torch.linspace(0, 1, K + 1, device=x.device)[:-1]
    for now, modulation in zip(t.split(1), model.modulation(t).split(1)):
        x = x + velocity(x, now, modulation, context) / K
    return x


def slots(conditions, panel):
    """Tokens and weights (C, K) of conditions. e_p is the mean over at least two slots, as in the official code: a
    single perturbation is half its own embedding and half that of the empty token."""
    empty = len(panel.genes)
    number = {g: i for i, g in enumerate(panel.genes)}
    number |= {p: g for p, g in zip(panel.perturbations, panel.pert_gene) if g >= 0}
    number |= {p: empty + 1 + i for i, p in enumerate(panel.outside())}
    parts = [c.split("+") for c in conditions]
    K = max(2, max(map(len, parts)))
    tokens, weight = torch.full((len(parts), K), empty), torch.zeros(len(parts), K)
    for i, names in enumerate(parts):
        tokens[i, :len(names)] = torch.tensor([number[name] for name in names])
        used = max(2, len(names))
        weight[i, :used] = 1 / used
    return tokens, weight


def build(config, panel, weights):
    """The model of a checkpoint, to be given its weights."""
    return ScDFM(config, panel)


def told_of(model, run, group, control):
    """What the model is told of one group, CONDITION or CONDITION@COVARIATE: tokens and weight (1, K)."""
    tokens, weight = slots([data.split_group(group)[0]], run.panel)
    return tokens.to(run.device), weight.to(run.device)


def cell_bytes(model, config, columns):
    """Memory that one generated cell takes: cached K and V, activations of one pass."""
    return min(len(columns), config.gene_subset) * config.width * 4 * (4 * config.layers + 24)


def generate(model, run, told, control, noise, columns):
    """Cells (B, G) of one group, from control cells (B, G) log1p CP10k and noise (B, G); columns (E,) are asked for,
    the others stay 0: in passes of --gene-subset random genes, as in training."""
    mixed = np.random.default_rng(run.config.seed).permutation(columns)
    cells = torch.zeros_like(noise)
    for genes in np.array_split(mixed, math.ceil(len(mixed) / run.config.gene_subset)):
        genes = torch.from_numpy(np.sort(genes)).to(run.device)
        given = Given(control.index_select(1, genes), genes, *told)
        with run.autocast():
            made = sample(run.compiled(model.velocity), model, noise.index_select(1, genes), given, run.config)
        cells.index_copy_(1, genes, made)
    return cells


# -------------------------------------------------------------------------------- training

def train(run, state):
    """Train to --steps and return the model that predicts."""
    config, dataset = run.config, run.dataset
    panel, device = run.panel, run.device
    G, S = len(panel.genes), min(config.gene_subset, len(panel.genes))
    C, b = config.conditions_per_batch, config.batch_size // config.conditions_per_batch

    # model, optimiser, schedule; a resumed run takes them over, the graph included
    torch.manual_seed(config.seed)
    graph, moments = (None, None) if state else statistics(dataset, config.knn)
    model = ScDFM(config, panel, graph, moments).to(device)
    ema = copy.deepcopy(model) if config.ema else model
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    schedule = data.schedule(optimizer, config.steps, least=config.lr_min)
    content = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    begin, net = run.resume(state, content), run.wrap(model)

    # training conditions: index of their group, and their slots, once
    names = dataset.part("train")
    group = torch.tensor([dataset.groups.index(g) for g in names], device=dataset.index_device)
    tokens, weight = (a.to(device) for a in slots([data.split_group(g)[0] for g in names], panel))
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} training conditions, {G:,} genes "
            f"({S:,} per step)")

    for step in range(begin + 1, config.steps + 1):
        # batch: b cells of each of C conditions, their controls, a gene subset, times and noise
        run.start(step)
        pick = torch.randint(len(group), (C,), device=dataset.index_device)
        genes = torch.randperm(G, device=device)[:S]
        x1 = dataset.gather(dataset.draw(group[pick], b), genes)                             # (B, S)
        control = dataset.gather(dataset.draw(dataset.controls_for(group[pick]), b), genes)
        t, x0 = torch.rand(C * b, device=device), torch.randn(C * b, S, device=device)
        pick = pick.to(device)
        given = Given(control, genes, tokens[pick], weight[pick])

        # forward in bf16 where chosen, loss in fp32
        with run.autocast():
            flow, mmd = scdfm_loss(net, x1, x0, t, given, config.mmd_weight)
        loss = flow + config.mmd_weight * mmd
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        data.average(ema, model, config.ema)

        if config.eval_every and step % config.eval_every == 0:
            run.validate(step, ema)
        run.finish(step, content, loss=loss, flow=flow, mmd=mmd)         # log line, checkpoint, Ctrl-C
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
