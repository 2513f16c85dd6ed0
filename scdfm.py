"""scDFM: flow matching in expression space with an MMD term, on a perturbation-aware differential transformer.

A cell is a sequence of gene tokens. A transformer predicts the velocity that turns Gaussian noise into a perturbed
cell, given a control cell (cross-attention), the perturbation (an adapter in every layer) and the flow time
(adaLN-Zero). Attention is differential: the difference of two softmax maps. Gene tokens come from an encoder whose
attention is masked by the co-expression graph; a CRISPR perturbation is embedded by the same encoder, so that genes
never perturbed in training can be predicted. Training adds the MMD between the generated and the real cells of one
condition to the flow matching loss.

Paper: Yu, Wang, Liao, Wu, "scDFM: Distributional flow matching for robust single-cell perturbation prediction"; numbers
of equations, tables and algorithms below are the paper's. Official code: github.com/AI4Science-WestlakeU/scDFM @2cf6bca
(MIT), called "official" below. Nothing here is copied from it.

    python scdfm.py                                             demo data, laptop size, about 2 minutes on 2 cores
    python scdfm.py --data norman.h5 --split holdout              the paper's configuration; GPU if there is one
    python scdfm.py --data norman.h5 --split holdout --resume     go on after Ctrl-C or a crash
    python scdfm.py --ckpt runs/X/ckpt.pt --predict CEBPA KLF1+MAP2K6 --cells 500 --out pred.h5ad
    torchrun --nproc-per-node 4 scdfm.py --data norman.h5 --split additive
Ablations of figure 5: --mmd-weight 0 (no MMD), --knn 0 (no gene mask), --no-differential (plain attention).

Deviations from paper (P) or official code (C). "demo l2" is the l2 of the demo's test conditions, one run each, with
--ema 0 --ode euler --ode-steps 10: 4.67 as the code stands. Seeds and thread counts move it by 0.15.
 1. The adapter adds to h, h + MLP([h ; e_p]); P and C replace h. It learns much faster: demo l2 5.37 when replaced.
 2. The sinusoid encodes 1000 t; C encodes t in [0, 1], where most frequencies are nearly constant: demo l2 4.92.
 3. Cross-attention is the paper's, Q from h, K and V from the control cells (eq. 12). C takes map 1 on h, map 2 on the
    control cells and V from h (--cross-attention maps): demo l2 4.64. Keys come from the modulated h; C's do not.
 4. h and h_c start as value + gene embedding (eq. 6). C starts from an MLP of both and re-injects the gene embedding in
    every layer: demo l2 5.85 and 4.71 with them, not kept.
 5. adaLN-Zero starts at zero; a later initialisation pass of C overwrites that.
 6. The co-expression graph is computed on training and control cells; C takes log1p of log data and its mask is shifted
    by the special tokens. The encoder attends to all G genes as in C (P writes the subgraph of the subset).
 7. One gene subset per step, shared by the batch, as in C (P draws one per cell): the encoder runs once per step.
 8. Evaluation genes have the highest means in training control cells; C picks variable genes on the test cells.
 9. The model that predicts is the last one; C selects on its test set, by a row of counts.
10. --conditions-per-batch takes the MMD within each condition and averages; 1, as in P and C, gives demo l2 5.60.
11. Ours: --ema (off in the paper preset; on in the demo: l2 4.44 at the same seed), no dropout on attention weights
    (the fused kernels have none), no bias where softmax cancels it, the mean over more than two slots for triples,
    PyTorch's initialisation. As in C: two value encoders, an MLP in each DiT block, values clamped at 512, output at 0.
12. A perturbation that is no gene of the panel has its own token with a self loop. If no training condition holds it,
    its embedding is untrained; the run says so.
The demo does not tell the paper's ablations apart: demo l2 4.62 without MMD, 4.49 with plain attention, 4.74 without
the gene mask.
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
from dataclasses import asdict, dataclass, fields
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

METHOD = "scdfm"


@dataclass
class Config(data.DataConfig):
    """Every default is written here: the paper's configuration. PRESETS lists what --preset demo changes."""
    # run: the same flags in all four methods
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo
    split: str = "additive"         # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    fold: int = 0                   # which of the seeded splits
    folds: int = 10                 # number of folds of --split cv
    seed: int = 0                   # weights, batches and samples; the split depends on --fold alone
    preset: typing.Literal["", "demo", "paper"] = ""  # size; '' is demo for --data demo and paper otherwise
    out: str = ""                   # run folder; '' is runs/METHOD-DATA-SPLIT-fN-sN. With --predict: the file to write
    steps: int = 100_000            # length of the schedule (paper A.3)
    stop_at: int = 0                # end at this step as Ctrl-C does; --resume goes on
    time_limit: float = 0           # end after so many minutes as Ctrl-C does; 0 is no limit
    batch_size: int = 96            # target cells per step and process (paper; official run.sh 48)
    lr: float = 5e-5                # Adam (paper)
    eval_every: int = 0             # score the validation conditions every so many steps; 0 never
    eval_cells: int = 1000          # cells generated per condition: as many as it really has, at most this
    device: str = ""                # cpu, cuda, cuda:1; '' takes the GPU if there is one
    dtype: typing.Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it
    compile: bool | None = None     # torch.compile; default on for CUDA, off for CPU
    resume: bool = False            # go on with the run in its folder
    ckpt: str = ""                  # with --predict: the checkpoint to use
    predict: tuple[str, ...] = ()   # conditions to predict: A A+B A+B+C, with covariates A@cov1,cov2
    controls: str = ""              # with --predict: AnnData file with your own control cells
    cells: int = 500                # with --predict: cells per condition
    all_genes: bool = False         # with --predict: every gene of the panel, not only the evaluation genes
    # data
    hvg: int = 5000                 # paper A.4.1
    # method
    width: int = 512                # d (paper A.3, official run.py)
    layers: int = 4                 # PAD-Transformer layers (official)
    heads: int = 8                  # attention heads (official)
    dropout: float = 0.1            # official
    gene_subset: int = 1000         # S: genes drawn per step, shared by the batch (official run.py:85)
    knn: int = 30                   # co-expression neighbours per gene; 0 removes the mask (ablation)
    mmd_weight: float = 0.5         # lambda of eq. 4 (official gamma); 0 removes the MMD (ablation)
    differential: bool = True       # differential attention (eq. 8-9); off is plain attention (ablation)
    cross_attention: typing.Literal["paper", "maps"] = "paper"  # eq. 12, or the official code's variant
    pert_embedding: typing.Literal["gene", "table"] = "gene"    # table: for drugs
    conditions_per_batch: int = 1   # the MMD is taken within each; paper 1
    lr_min: float = 1e-6            # end of the cosine (paper)
    ema: float = 0.0                # decay of averaged weights used for prediction; 0 is none, as in the paper
    ode: typing.Literal["euler", "heun", "rk4"] = "euler"       # paper; official rk4
    ode_steps: int = 100            # K (paper); official 20 of rk4


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    cells, conditions = config.batch_size, config.conditions_per_batch
    if conditions < 1 or cells % conditions or cells // conditions < (2 if config.mmd_weight else 1):
        raise DataError(f"--batch-size {cells} --conditions-per-batch {conditions}: the batch must hold as many cells "
                        "of one condition as of another, at least two with the MMD")
    if config.cross_attention == "maps" and not config.differential:
        raise DataError("--cross-attention maps is a differential attention; remove --no-differential")
    if config.heads < 1 or config.width % config.heads:
        raise DataError(f"--width {config.width}: must be a multiple of --heads {config.heads}")
    if min(config.layers, config.gene_subset, config.ode_steps) < 1 or config.knn < 0:
        raise DataError("--layers, --gene-subset and --ode-steps must be positive, --knn not negative")
    if not 0 <= config.dropout < 1 or not 0 <= config.ema < 1:
        raise DataError("--dropout and --ema must be at least 0 and below 1")


PRESETS = {"paper": {}, "demo": dict(
    steps=800, batch_size=64, conditions_per_batch=8, lr=3e-3, lr_min=1e-5, width=64, layers=2, heads=2, dropout=0.0,
    ema=0.99, gene_subset=60, ode="heun", ode_steps=6, eval_cells=100)}
SAMPLING = {"ode", "ode_steps"}         # flags that --ckpt may change
# times the number of processes is what a step sees
PER_PROCESS = ("batch_size", "conditions_per_batch")


def variants(config):
    """{suffix of the row in the table: options of generate()}; the first is the method itself."""
    return {"": {}}


# -------------------------------------------------------------------------------- model

def coexpression_graph(dataset, k):
    """Boolean (G, G): per gene the k genes of highest |Pearson| over training and control cells, symmetrised by union,
    and self loops (eq. 7). A gene without variance keeps only its self loop."""
    corr = data.gene_statistics(dataset)[2].abs().fill_diagonal_(-1)
    strength, neighbour = corr.topk(min(k, len(corr) - 1), dim=1)        # (G, k)
    graph = torch.zeros_like(corr, dtype=torch.bool).scatter_(1, neighbour, strength > 0)
    return (graph | graph.T).fill_diagonal_(True)


class GeneEncoder(nn.Module):
    """E_g: table -> LayerNorm -> one pre-norm transformer layer in which the asked tokens attend to all tokens that the
    graph allows (official layers.py). Tokens: G genes, the empty slot, perturbations that are no gene of the panel."""

    def __init__(self, tokens, width, heads, dropout, graph):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.table = nn.Embedding(tokens, width)
        self.norm_table, self.norm_attention, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)                # a bias of K would cancel in the softmax
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout),
                                 nn.Linear(4 * width, width))
        self.register_buffer("graph", None)
        if graph is not None:
            self.graph = torch.eye(tokens, dtype=torch.bool, device=graph.device)
            self.graph[:len(graph), :len(graph)] = graph

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
    """Differential (or plain) multi-head attention. source: 'self'; 'paper', K and V from the control cells (eq. 12);
    or 'maps', the official cross-attention: map 1 on h itself, map 2 on the control cells, V from h."""

    def __init__(self, width, heads, layer, differential, source):
        super().__init__()
        self.width, self.heads, self.source, self.differential = width, heads, source, differential
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
        if self.source == "maps":
            return tuple(self.split(F.linear(control, p.weight[self.width:])) for p in (self.q, self.k))
        return self.split(self.k(control)), self.split(self.v(control))

    def forward(self, x, cached=None):
        """x (B, S, d) -> (B, S, d)."""
        if self.source == "maps":
            q, k = (torch.cat([self.split(F.linear(x, p.weight[:self.width])), c], dim=1)
                    for p, c in zip((self.q, self.k), cached))
            v = self.split(self.v(x))
        else:
            q, (k, v) = self.split(self.q(x)), cached or self.cache(x)
        if self.differential:
            lq1, lk1, lq2, lk2 = self.lam.unbind()
            lam = (lq1 * lk1).sum().exp() - (lq2 * lk2).sum().exp() + self.lam_init  # no matmul: fp32 under autocast
            a = differential_attention(q, k, v, lam, self.norm, self.lam_init)
        else:
            a = F.scaled_dot_product_attention(q, k, v)
        return self.out(a.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """DiT block: adaLN-Zero attention, then an adaLN-Zero MLP (Peebles and Xie)."""

    def __init__(self, config, layer, source):
        super().__init__()
        self.attention = Attention(config.width, config.heads, layer, config.differential, source)
        self.mlp = nn.Sequential(nn.Linear(config.width, 4 * config.width), nn.GELU(approximate="tanh"),
                                 nn.Linear(4 * config.width, config.width), nn.Dropout(config.dropout))

    def forward(self, x, modulation, cached=None):
        """x (B, S, d), modulation (B or 1, 6, d) -> (B, S, d)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation[:, :, None].unbind(1)  # each (B or 1, 1, d)
        norm = x.shape[-1:]
        x = x + gate_a * self.attention(F.layer_norm(x, norm) * (1 + scale_a) + shift_a, cached)
        return x + gate_m * self.mlp(F.layer_norm(x, norm) * (1 + scale_m) + shift_m)


class Injection(nn.Module):
    """First layer of an MLP on [h ; e_p], its linear map split in two: the half of e_p is computed per condition."""

    def __init__(self, width):
        super().__init__()
        self.h, self.e = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, h, e):                                             # h (B, S, d), e = self.e(e_p) (B or 1, 1, d)
        return F.leaky_relu(self.h(h) + e)


class Layer(nn.Module):
    """PAD-Transformer layer: perturbation injection, self- and cross-differential attention (eq. 10-12)."""

    def __init__(self, config, number):
        super().__init__()
        self.inject = Injection(config.width)
        self.adapter = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.width, config.width), nn.LeakyReLU())
        self.self_block = Block(config, number, "self")
        self.cross_block = Block(config, number, config.cross_attention)

    def forward(self, h, modulation, e, cached):
        h = h + self.adapter(self.inject(h, e))
        h = self.self_block(h, modulation[:, :6])
        return self.cross_block(h, modulation[:, 6:], cached)


class ScDFM(nn.Module):
    """Velocity field v(x_t | t, control, perturbation) over S gene tokens (eq. 6-13)."""

    def __init__(self, config, panel, graph=None):
        """graph (G, G) bool, or None to load one with the weights."""
        super().__init__()
        d, G, self.n_layers = config.width, len(panel.genes), config.layers
        graph = torch.zeros(G, G, dtype=torch.bool) if graph is None and config.knn else graph
        tokens = G + 1 + len(panel.outside())                            # genes, the empty slot, other perturbations
        self.encoder = GeneEncoder(tokens, d, config.heads, config.dropout, graph)
        self.pert_table = nn.Embedding(len(panel.perturbations) + 1, d) if config.pert_embedding == "table" else None
        self.value, self.value_control = (nn.Sequential(nn.Linear(1, d), nn.ReLU(), nn.Linear(d, d), nn.LayerNorm(d),
                                                        nn.Dropout(config.dropout)) for _ in range(2))
        self.time = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU())
        self.modulate = nn.Linear(d, config.layers * 12 * d)             # adaLN of all blocks in one product
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.inject = Injection(d)
        self.decoder = nn.Sequential(nn.Linear(d, d), nn.LeakyReLU(), nn.Linear(d, 1))
        nn.init.zeros_(self.modulate.weight)                             # the Zero of adaLN-Zero
        nn.init.zeros_(self.modulate.bias)

    def modulation(self, t):
        """(n,) times in [0, 1] -> (n, L, 12, d): shift, scale and gate of every block."""
        return self.modulate(self.time(timestep_embedding(1000 * t))).unflatten(-1, (self.n_layers, 12, -1))

    def context(self, control, genes, tokens, weight):
        """All that depends on neither x_t nor t. control (B, S), genes (S,), tokens, weight (C, K slots), B = C * b."""
        (B, S), (C, K) = control.shape, tokens.shape
        asked = genes if self.pert_table is not None else torch.cat([genes, tokens.flatten()])
        embedded = self.encoder(asked)                                   # once for the batch: (S [+ C K], d)
        slots = self.pert_table(tokens) if self.pert_table is not None else embedded[S:].unflatten(0, (C, K))
        e = (slots * weight[..., None]).sum(1)                           # mean over slots: (C, d)

        def per_cell(e):                                                 # (C, d) -> (B, 1, d)
            return e.repeat_interleave(B // C, dim=0, output_size=B)[:, None]
        gene = embedded[:S]
        h_c = self.value_control(control.clamp(max=512)[..., None]) + gene       # eq. 6: (B, S, d)
        layers = [(per_cell(layer.inject.e(e)), layer.cross_block.attention.cache(h_c)) for layer in self.layers]
        return {"gene": gene, "layers": layers, "decoder": per_cell(self.inject.e(e))}

    def velocity(self, x, modulation, context):
        """x (B, S), modulation (B or 1, L, 12, d) -> velocity (B, S) float32."""
        h = self.value(x.clamp(max=512)[..., None]) + context["gene"]            # eq. 6
        for i, layer in enumerate(self.layers):
            h = layer(h, modulation[:, i], *context["layers"][i])
        return self.decoder(self.inject(h, context["decoder"])).squeeze(-1).float()  # eq. 13

    def forward(self, x, t, control, genes, tokens, weight):
        return self.velocity(x, self.modulation(t), self.context(control, genes, tokens, weight))


def timestep_embedding(t):
    """(n,) -> (n, 256): cosines, then sines, at geometric frequencies from 1 to 1 / 10,000 (eq. 14)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


# -------------------------------------------------------------------------------- losses

def mmd_squared(real, generated):
    """Unbiased squared MMD with four Gaussian kernels (algorithm 1), per condition: (C, m, S), (C, n, S) -> (C,).

    In fp64, whatever the network runs in: a squared distance is a small difference of large products, and few.

    Bandwidths: sigma^2 = s x the lower median squared distance of the real cells, s in {0.5, 1, 2, 4}, no gradient.
    """
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
        xx, yy, xy = kernel[:, :m, :m].sum((1, 2)), kernel[:, m:, m:].sum((1, 2)), kernel[:, :m, m:].sum((1, 2))
        return (xx / (m * (m - 1)) + yy / (n * (n - 1)) - 2 * xy / (m * n)).float()


def scdfm_loss(net, x1, control, t, x0, genes, tokens, weight, mmd_weight):
    """Both terms of eq. 4: flow matching, and MMD^2 of the one-step endpoint. x1, control, x0 (B, S), t (B,)."""
    x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
    v = net(x_t, t, control, genes, tokens, weight)
    flow = (v - (x1 - x0)).square().mean()
    if mmd_weight == 0:
        return flow, torch.zeros_like(flow)
    C = len(tokens)
    x1_hat = x_t + (1 - t)[:, None] * v
    return flow, mmd_squared(x1.unflatten(0, (C, -1)), x1_hat.unflatten(0, (C, -1))).mean()


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(model, x, control, genes, tokens, weight, config, velocity=None):
    """Generate one cell per control cell by integrating the flow from noise at t=0 to t=1 (algorithm 3).

    x (B, S) noise, control (B, S) log1p CP10k, genes (S,) columns of the panel, tokens and weight (1, K). Everything
    constant over the ODE is computed once: the context, and the modulation of all time points. Returns (B, S) float32,
    clamped at 0.
    """
    velocity = velocity or model.velocity
    context = model.context(control, genes, tokens, weight)
    K = config.ode_steps
    modulation = model.modulation(torch.linspace(0, 1, 2 * K + 1, device=control.device))  # step borders and middles

    def v(x, i):
        return velocity(x, modulation[i:i + 1], context)
    for i in range(0, 2 * K, 2):
        k1 = v(x, i)
        if config.ode == "euler":
            x = x + k1 / K
        elif config.ode == "heun":
            x = x + (k1 + v(x + k1 / K, i + 2)) / (2 * K)
        else:
            k2 = v(x + k1 / (2 * K), i + 1)
            k3 = v(x + k2 / (2 * K), i + 1)
            x = x + (k1 + 2 * k2 + 2 * k3 + v(x + k3 / K, i + 2)) / (6 * K)
    return x.clamp(min=0)


def slots(conditions, panel, config):
    """Tokens and weights (C, K) of conditions: e_p is the mean over two or more slots; unused ones hold the empty
    token."""
    if config.pert_embedding == "table":
        number, empty = {p: i for i, p in enumerate(panel.perturbations)}, len(panel.perturbations)
    else:
        number, empty = {g: i for i, g in enumerate(panel.genes)}, len(panel.genes)
        number |= {p: g for p, g in zip(panel.perturbations, panel.pert_gene) if g >= 0}
        number |= {p: empty + 1 + i for i, p in enumerate(panel.outside())}
    parts = [c.split("+") for c in conditions]
    K = max(2, max(map(len, parts)))
    tokens, weight = torch.full((len(parts), K), empty), torch.zeros(len(parts), K)
    for i, names in enumerate(parts):
        tokens[i, :len(names)] = torch.tensor([number[name] for name in names])
        weight[i, :max(2, len(names))] = 1 / max(2, len(names))
    return tokens, weight


def known(panel, config):
    """Names that can be predicted, and those among them whose embedding no training condition has reached."""
    if config.pert_embedding == "table":
        return set(panel.perturbations), set(panel.perturbations) - set(panel.trained)
    return set(panel.perturbations) | set(panel.genes), set(panel.outside()) - set(panel.trained)


def load_model(config, panel, saved):
    """The model that predicts, from what a checkpoint has saved."""
    model = ScDFM(config, panel)
    model.load_state_dict(saved.get("ema", saved["model"]))
    return model


def generate(model, run, group, control, columns, seed):
    """Predicted cells of one group (CONDITION or CONDITION@COVARIATE), from as many control cells (n, G) log1p CP10k,
    for columns (E,) of the panel, ascending: (n, E) float32. Chunks of cells bound the memory; calls are independent.

    More columns than --gene-subset and the evaluation genes are generated in passes, from the same control cells."""
    config, most = run.config, max(run.config.gene_subset, len(run.panel.eval_genes))
    if len(columns) > most:
        mixed = np.random.default_rng(config.seed).permutation(columns)
        passes = [np.sort(p) for p in np.array_split(mixed, math.ceil(len(columns) / most))]
        out = [generate(model, run, group, control, p, seed + i) for i, p in enumerate(passes)]
        return np.concatenate(out, axis=1)[:, np.argsort(np.concatenate(passes))]
    generator = torch.Generator(run.device).manual_seed(seed)
    noise = torch.randn(len(control), len(columns), generator=generator, device=run.device)  # the same for any chunks
    tokens, weight = (a.to(run.device) for a in slots([group.partition("@")[0]], run.panel, config))
    per_cell = len(columns) * config.width * 4 * (4 * config.layers + 24)        # bytes: cached K and V, activations
    room = 16e9 if run.device.type == "cuda" else 1.2e9
    chunks = math.ceil(len(control) / min(256, max(1, room // per_cell)))
    columns, out = torch.as_tensor(columns, device=run.device), []
    for x, cells in zip(noise.tensor_split(chunks), np.array_split(control, chunks)):
        cells = torch.from_numpy(cells).to(run.device).index_select(1, columns)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            out.append(sample(model, x, cells, columns, tokens, weight, config, run.compiled(model.velocity)).cpu())
    return torch.cat(out).numpy()


# -------------------------------------------------------------------------------- training

def train(run, state):
    """Train to --steps and return the model that predicts; Ctrl-C and --stop-at save and end the program before."""
    config, dataset, panel = run.config, run.dataset, run.panel
    G, S = len(panel.genes), min(config.gene_subset, len(panel.genes))
    C, b = config.conditions_per_batch, config.batch_size // config.conditions_per_batch

    # model, optimiser, schedule; a resumed run takes them over, the graph included
    torch.manual_seed(config.seed)
    graph = coexpression_graph(dataset, config.knn) if config.knn and not state else None
    model = ScDFM(config, panel, graph).to(run.device)
    ema = copy.deepcopy(model) if config.ema else None
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps, config.lr_min)
    sampler = torch.Generator(run.device).manual_seed(config.seed)
    torch.manual_seed(config.seed + run.rank)                            # dropout differs between processes
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"ema": ema} if ema else {})
    start, seconds = restore(run, state, saved, sampler)
    net, predictor = run.wrap(model), ema or model

    # training conditions: index of their group, and their slots, once
    names = dataset.part("train")
    group = torch.tensor([dataset.groups.index(g) for g in names], device=run.device)
    tokens, weight = (a.to(run.device) for a in slots([g.partition("@")[0] for g in names], panel, config))
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} training conditions, {G:,} genes "
            f"({S:,} per step)")

    cells = C * b * run.world                                            # per step, over all processes
    mine, my_C = slice(run.rank * C * b, (run.rank + 1) * C * b), slice(run.rank * C, (run.rank + 1) * C)
    progress = Progress(run, start, seconds, cells)
    for step in range(start + 1, config.steps + 1):
        # batch: every process draws all of it and keeps its share, so that N processes equal one with N times the batch
        pick = torch.randint(len(group), (C * run.world,), generator=sampler, device=run.device)
        target = dataset.draw(group[pick], b, sampler)[mine]
        source = dataset.draw(dataset.controls_for(group[pick]), b, sampler)[mine]
        genes = torch.randperm(G, generator=sampler, device=run.device)[:S]
        t = torch.rand(cells, generator=sampler, device=run.device)[mine]
        x0 = torch.randn(cells, S, generator=sampler, device=run.device)[mine]
        x1, control = dataset.gather(target, genes), dataset.gather(source, genes)
        pick = pick[my_C]

        # forward in bf16 where chosen, loss in fp32
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            flow, mmd = scdfm_loss(net, x1, control, t, x0, genes, tokens[pick], weight[pick], config.mmd_weight)
        loss = flow + config.mmd_weight * mmd
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if ema:
            follow(ema, model, config.ema)

        # console, log, validation, checkpoint; none of it touches the random state
        progress.update(step, loss=loss, flow=flow, mmd=mmd)
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            progress.note(step, validate(run, predictor))
        if (stop := progress.should_stop(step)) or step == config.steps or progress.checkpoint_due():
            progress.check_finite(step)
            save_checkpoint(run, step, progress.seconds(), saved, sampler)
        if stop and step < config.steps:
            progress.stopped(step)
    run.deafen()
    return predictor.eval()


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

ACTIONS = {"predict": predict}          # what --ckpt can be used for, by the flag that asks for it

if __name__ == "__main__":
    main()
