"""CellTARNet: a transformer autoregressive flow with an exact likelihood, contrast and a gene-network prior.

A cell is a sequence of genes. A transformer reads the context, a control cell and the perturbation. N flow blocks, each
a causal transformer over the genes in an order of its own with cross-attention to the context, turn the perturbed cell
into Gaussian noise gene by gene; run backwards they generate cells. Self-attention sees only genes that a sparse or a
low-rank view of the training correlations connects. Training adds a denoising task for the control cell (same weights,
no perturbation) and a contrast between matching and mismatching pairs of cell and context to the likelihood.

Paper: "CellTARNet: single-cell perturbation prediction using transformer based normalizing flow" (anonymous, under
review); no official code exists. It builds on TarFlow (Zhai et al. 2024) and on STARFlow's shifted input.

    python celltarnet.py                                            demo data, laptop size, 1.2 minutes on 2 cores
    python celltarnet.py --data norman.h5 --split cv --fold 0         the paper's configuration; GPU if there is one
    python celltarnet.py --data norman.h5 --split cv --fold 0 --resume
    for k in 0 1 2 3 4 5 6 7 8 9; do python celltarnet.py --data norman.h5 --split cv --fold $k; done
    python celltarnet.py --ckpt runs/X/ckpt.pt --predict CEBPA KLF1+MAP2K6 --cells 500 --out pred.h5ad
    python celltarnet.py --ckpt runs/X/ckpt.pt --score cells.h5ad --out scores.h5ad    which condition explains a cell?
    torchrun --nproc-per-node 4 celltarnet.py --data norman.h5 --split cv
Ablations: --contrast-weight 0, --denoise-weight 0, --prior none (dense), --prior sparse (S), --prior low-rank (L).

Where the paper (P) contradicts itself or is silent, this file is the reference; deviations and choices:
 1. Direction: v = (u - mu) exp(-a) from cell to noise, log|det| = -sum a, as in P's eq. 4-5; its section 3.1 gives the
    same family with the opposite signs and calls the input of that direction noise.
 2. P's mask j <= i lets slot i see the value that its own parameters transform, which cannot be inverted. The input is
    shifted by one slot as in STARFlow; so the first gene, too, has parameters that depend on the context.
 3. mu and a once per block, after layer K (P says both that and after every layer). Keys and values of cross-attention
    are the encoder's normalised output H (P's formula says its input S). |a| < 3 by a soft clip; TarFlow has none.
 4. Values live in R^P and are projected into R^d per block. H has G/P + 2 tokens: CLS, patches, perturbation.
 5. Targets are dequantised: log1p data have an atom at 0, under which a continuous likelihood has no bound. Sampling
    sets values under 2 sigma to 0; the noise stays on the others. P is silent.
 6. Genes are standardised by training mean and sqrt(var + sigma^2), so that the identity flow is already a Gaussian
    with the right moments. Likelihoods are reported in log1p CP10k.
 7. The perturbation's token of H scales and shifts the slots' labels (FiLM, zero at the start). As one key of many it
    is learned slowly: l2 of a 60-gene demo after 400 steps is 5.90 with it and 7.11 without.
 8. Noise on the control cell has a level drawn from U(0, 1) times the standard deviation of 6, so that the clean cell
    that sampling uses has been seen in training; --context-noise full is P's. The denoising task keeps the covariates.
 9. A batch holds n contexts of distinct conditions with m cells each; positives are two cells of a context, negatives
    come from encoding another context's cell in blocks of R + 1 contexts, which gives R of each of P's two kinds for R
    passes. Pairs of one condition are masked. Anchors are the cells that are encoded twice, one per context.
10. A perturbation is a learned map of its gene's vector in the context encoder plus a vector of its own that starts at
    zero (P: the latter). So genes never perturbed can be asked for; nothing here shows that the answer is good.
11. Orders come in pairs, one and its reverse: the file's (clusters of correlated genes if P > 1), then random ones.
12. The correlations of the prior are of training and control cells, of one fold. The slot before is seen, too, whatever
    the prior: its value is in the residual stream.
13. All sizes and the schedule are ours, after TarFlow; P names none. EMA as in diffusion models. Sampling is sequential
    with cached keys and values; --decode jacobi is the parallel fixed point, exact with --jacobi-tol 0.
On that 60-gene demo (P = 4, one run each, one seed, its spread not measured): l2 5.97 without contrast, 6.48
without denoising, 6.24 without prior. It says nothing of S against L: with 20 neighbours among 60 genes in patches of 4
every slot sees every earlier one, and "without prior" differs in the order of the genes alone. The demo's 120 genes
leave 85% of the causal pairs; only P = 1 or many genes make the prior sparse.
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
import scipy.cluster.hierarchy as hierarchy
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
from data import DataError

METHOD = "celltarnet"


@dataclass
class Config(data.DataConfig):
    """Every default is written here: the paper's configuration. PRESETS lists what --preset demo changes."""
    # run: the same flags in all four methods
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo
    split: str = "cv"               # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    fold: int = 0                   # which of the seeded splits
    folds: int = 10                 # number of folds of --split cv
    seed: int = 0                   # weights, batches and samples; the split depends on --fold alone
    preset: typing.Literal["", "demo", "paper"] = ""  # size; '' is demo for --data demo and paper otherwise
    out: str = ""                   # run folder; '' is runs/METHOD-DATA-SPLIT-fN-sN. With --predict: the file to write
    steps: int = 100_000            # length of the schedule (ours; the paper names no hyper-parameter)
    stop_at: int = 0                # end at this step as Ctrl-C does; --resume goes on
    time_limit: float = 0           # end after so many minutes as Ctrl-C does; 0 is no limit
    batch_size: int = 64            # target cells per step and process (ours)
    lr: float = 3e-4                # AdamW (ours; TarFlow 1e-4 at width 768)
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
    hvg: int = 1000                 # the paper's errors mean about 1,000 genes (its scale; scDFM's A.4.1: 5,000)
    # method
    width: int = 256                # d (ours)
    heads: int = 4                  # attention heads of 64, as TarFlow
    blocks: int = 4                 # N: flow blocks, each with an order of the genes of its own (ours)
    layers: int = 4                 # K: transformer layers per block (ours)
    context_layers: int = 4         # layers of the context encoder (ours)
    patch: int = 1                  # P: genes per slot (paper 1); more is faster and coarser
    dropout: float = 0.1            # ours
    dequantise: float = 0.1         # sigma_d, log1p CP10k: noise on the targets (ours; TarFlow 0.05 to 0.15)
    context_noise: typing.Literal["uniform", "full"] = "uniform"  # level of the noise on control cells: U(0, 1), or 1
    denoise_weight: float = 0.5     # lambda_denoise; 0 removes the denoising task (ablation)
    contrast_weight: float = 0.05   # lambda_cont after a ramp over a tenth of the steps; 0: no contrast (ablation)
    temperature: float = 0.1        # tau of InfoNCE (ours)
    rolls: int = 1                  # R: negatives of each kind per anchor, and further flow passes per context
    cells_per_context: int = 2      # m: perturbed cells that share a control cell in a batch (ours)
    prior: typing.Literal["both", "sparse", "low-rank", "none"] = "both"  # L+S, S, L or no gene network (ablation)
    neighbours: int = 30            # per gene in S, and in L (ours)
    rank: int = 20                  # r: of the low-rank part of the correlations (ours)
    weight_decay: float = 1e-4      # TarFlow
    warmup: int = 1000              # steps of linear warm-up (TarFlow: an epoch)
    lr_min: float = 1e-6            # end of the cosine (TarFlow)
    ema: float = 0.999              # decay of averaged weights used for prediction; 0 is none
    decode: typing.Literal["cached", "jacobi"] = "cached"  # gene by gene, or a parallel fixed point
    jacobi_tol: float = 1e-4        # a block's sweeps end when no value moves more; 0: exact, as many sweeps as slots
    samples_per_control: int = 1    # cells generated from one control cell; more share its context
    score: str = ""                 # with --ckpt: AnnData file; log p of its cells under all conditions, or --predict's
    score_controls: int = 4         # with --score: control cells over which p is averaged


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    if config.width % max(1, config.heads) or config.heads < 1:
        raise DataError(f"--width {config.width}: must be a multiple of --heads {config.heads}")
    if min(config.width, config.blocks, config.layers, config.context_layers, config.patch, config.neighbours,
           config.rank, config.rolls, config.cells_per_context, config.samples_per_control, config.score_controls) < 1:
        raise DataError("--width, --blocks, --layers, --context-layers, --patch, --neighbours, --rank, --rolls, "
                        "--cells-per-context, --samples-per-control and --score-controls must be positive")
    if not 0 <= config.dropout < 1 or not 0 <= config.ema < 1:
        raise DataError("--dropout and --ema must be at least 0 and below 1")
    if config.dequantise <= 0 or config.temperature <= 0:
        raise DataError("--dequantise and --temperature must be positive: the likelihood of values with an atom at "
                        "zero has no bound without noise")
    if min(config.denoise_weight, config.contrast_weight, config.weight_decay, config.jacobi_tol, config.warmup) < 0:
        raise DataError("--denoise-weight, --contrast-weight, --weight-decay, --jacobi-tol and --warmup must not be "
                        "negative")
    group = config.cells_per_context * (config.rolls + 1 if config.contrast_weight else 1)
    if config.batch_size % group:
        raise DataError(f"--batch-size {config.batch_size}: must be a multiple of {group}, --cells-per-context"
                        + (" times the --rolls + 1 contexts that are contrasted" if config.contrast_weight else ""))
    if config.contrast_weight and config.cells_per_context < 2:
        raise DataError("--cells-per-context 1: the contrast needs a second cell of the same context; give 2, or "
                        "--contrast-weight 0")
    if config.score and not config.ckpt:
        raise DataError("--score needs the model: give its run's checkpoint with --ckpt")


PRESETS = {"paper": {}, "demo": dict(
    folds=5, steps=1000, lr=5e-3, lr_min=1e-5, warmup=50, width=32, heads=2, layers=1, context_layers=1, patch=4,
    dropout=0.0, ema=0.99, neighbours=20, rank=10, eval_cells=100)}
SAMPLING = {"decode", "jacobi_tol", "samples_per_control", "score", "score_controls"}  # flags that --ckpt may change
# times the number of processes is what a step sees
PER_PROCESS = ("batch_size",)


def variants(config):
    """{suffix of the row in the table: options of generate()}; the first is the method itself."""
    return {"": {}}


# -------------------------------------------------------------------------------- gene network

def gene_prior(corr, kind, k, rank):
    """Boolean (G, G) of section 3.2: S, per gene the k genes of highest |correlation|; L, the k highest of its best
    rank-r approximation; their union, made symmetric, with the diagonal."""
    parts = [corr.abs()] if kind in ("both", "sparse") else []
    if kind in ("both", "low-rank"):
        value, vector = torch.linalg.eigh(corr.double())                 # ascending
        vector = vector[:, -rank:]
        parts.append(((vector * value[-rank:]) @ vector.T).abs().float())
    graph = torch.eye(len(corr), dtype=torch.bool, device=corr.device)
    for strength in parts:
        strength = strength.clone().fill_diagonal_(-1)
        best, neighbour = strength.topk(min(k, len(corr) - 1), dim=1)    # (G, k)
        graph |= torch.zeros_like(graph).scatter_(1, neighbour, best > 1e-6)
    return graph | graph.T


def gene_order(corr):
    """(G,) genes such that correlated ones are neighbours: the leaves of average-linkage clustering."""
    distance = (1 - corr.abs()).clamp(min=0).double().cpu().numpy()
    upper = distance[np.triu_indices(len(distance), 1)]
    return torch.from_numpy(hierarchy.leaves_list(hierarchy.linkage(upper, "average")).astype(np.int64))


def attention_mask(graph, order, patch):
    """Boolean (T, T): which slots a slot may see in a block with this order of the genes.

    graph (G, G) or None, order (T P,) gene numbers; those from G on are padding. Slot s holds the value of patch s - 1
    and slot t stands for patch t, so that t sees s <= t where s is the start slot, t itself, or its patch s - 1 holds a
    neighbour of a gene of patch t.
    """
    T, n = len(order) // patch, len(order)
    seen = torch.ones(T, T, dtype=torch.bool, device=order.device).tril()
    if graph is None:
        return seen
    full = torch.zeros(n, n, dtype=torch.bool, device=order.device)
    full[:len(graph), :len(graph)] = graph
    near = full[order][:, order].view(T, patch, T, patch).any(3).any(1)  # (T, T) patches
    near = near.roll(1, dims=1)                                          # column s: patch s - 1
    near[:, 0] = True
    return seen & (near | torch.eye(T, dtype=torch.bool, device=order.device))


# -------------------------------------------------------------------------------- model

class Attention(nn.Module):
    """Multi-head attention. K has no bias: it would cancel in the softmax."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)

    def split(self, x):                                                  # (B, S, d) -> (B, H, S, d/H)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x):
        """(B, S, d) -> K and V, (B, H, S, d/H) each."""
        return tuple(self.split(a) for a in self.kv(x).chunk(2, dim=-1))

    def forward(self, x, k, v, mask=None):
        """x (B, S, d), k and v (B, H, S', d/H), mask (S, S') bool or None -> (B, S, d)."""
        a = F.scaled_dot_product_attention(self.split(self.q(x)), k, v, attn_mask=mask)
        return self.out(a.transpose(1, 2).flatten(2))


def mlp(width, dropout):
    """The two-layer MLP of a transformer block: (..., width) -> (..., width)."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout))


class ContextLayer(nn.Module):
    """Pre-norm transformer encoder layer."""

    def __init__(self, config):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention, self.drop = Attention(config.width, config.heads), nn.Dropout(config.dropout)
        self.mlp = mlp(config.width, config.dropout)

    def forward(self, h):                                                # (n, T + 2, d)
        x = self.norm_attention(h)
        h = h + self.drop(self.attention(x, *self.attention.keys(x)))
        return h + self.mlp(self.norm_mlp(h))


class FlowLayer(nn.Module):
    """Cross-attention to the context, masked self-attention, MLP (section 3.1, steps 1 to 3)."""

    def __init__(self, config):
        super().__init__()
        self.norm_cross, self.norm_self, self.norm_mlp = (nn.LayerNorm(config.width) for _ in range(3))
        self.cross, self.attention = (Attention(config.width, config.heads) for _ in range(2))
        self.mlp, self.drop = mlp(config.width, config.dropout), nn.Dropout(config.dropout)

    def forward(self, h, context, mask, cache=None):
        """h (n, m, S, d): m cells for each of n contexts; context: K and V of self.cross, (n, H, T + 2, d/H) each.

        cache: K and V (n m, H, T, d/H) of the earlier slots, to be filled, for the one slot S = 1 that is next; mask is
        its row up to itself, (1, t + 1).
        """
        cross = self.cross(self.norm_cross(h).flatten(1, 2), *context)   # one context, m S queries
        h = h + self.drop(cross).view_as(h)
        x = self.norm_self(h).flatten(0, 1)                              # (n m, S, d)
        k, v = self.attention.keys(x)
        if cache is not None:
            t = mask.shape[1]
            cache[0][:, :, t - 1:t], cache[1][:, :, t - 1:t] = k, v
            k, v = cache[0][:, :, :t], cache[1][:, :, :t]
        h = h + self.drop(self.attention(x, k, v, mask)).view_as(h)
        return h + self.mlp(self.norm_mlp(h))


class FlowBlock(nn.Module):
    """One invertible map v = (u - mu) exp(-a), u in the block's order; mu and a of a slot see earlier slots only.

    The input is shifted: slot t holds the values of patch t - 1 and the label of patch t, whose mu and a are read
    there. So also the first slot has parameters that depend on the context.
    """

    def __init__(self, config, order, mask, n_genes):
        super().__init__()
        d, P, T = config.width, config.patch, len(order) // config.patch
        self.patch = P
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.register_buffer("mask", mask)
        self.register_buffer("real", (order < n_genes).float().view(T, P))   # 0 for padding
        self.value, self.label = nn.Linear(P, d, bias=False), nn.Parameter(0.5 * torch.randn(T, d))
        self.modulate = nn.Linear(d, 2 * d)
        self.layers = nn.ModuleList(FlowLayer(config) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 2 * P)
        for linear in (self.head, self.modulate):                        # the flow starts as the identity
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def slots(self, x):                                                  # (n, m, T P) -> (n, m, T, P)
        return x[..., self.order].unflatten(-1, (-1, self.patch))

    def genes(self, u):                                                  # back again
        return u.flatten(-2)[..., self.back]

    def context(self, H):
        """From the context H (n, T + 2, d): labels (n, 1, T, d) as the perturbation's token modulates them, and K and V
        of every layer."""
        shift, scale = self.modulate(H[:, -1])[:, None].chunk(2, dim=-1)  # (n, 1, d)
        return (self.label * (1 + scale) + shift)[:, None], [layer.cross.keys(H) for layer in self.layers]

    def affine(self, h, real):
        """Hidden states (..., S, d) -> mu and a (..., S, P) in the precision of `real`, |a| < 3."""
        mu, a = self.head(self.norm(h)).to(real).chunk(2, dim=-1)
        return mu * real, 3 * torch.tanh(a / 3) * real

    def parameters_of(self, u, context):
        """mu, a (n, m, T, P) of all slots at once, from the true values u (n, m, T, P)."""
        label, keys = context
        h = F.pad(self.value(u[:, :, :-1]), (0, 0, 1, 0)) + label        # (n, m, T, d)
        for layer, kv in zip(self.layers, keys):
            h = layer(h, kv, self.mask)
        return self.affine(h, self.real)

    def forward(self, x, H):
        """x (n, m, T P), H (n, T + 2, d) -> the same cells one step closer to noise, log|det| (n, m)."""
        u = self.slots(x)
        mu, a = self.parameters_of(u, self.context(H))
        return self.genes((u - mu) * torch.exp(-a)), -a.sum((-2, -1))

    def inverse(self, x, H):
        """Inverse of forward, slot by slot, with the K and V of earlier slots cached. x (n, m, T P) -> the same."""
        v, (label, keys) = self.slots(x), self.context(H)
        (n, m, T, _), u, (_, heads, _, width) = v.shape, torch.empty_like(v), keys[0][0].shape
        cache = [tuple(k.new_empty(n * m, heads, T, width) for k in kv) for kv in keys]  # of self-attention
        for t in range(T):
            h = label[:, :, t:t + 1].expand(-1, m, -1, -1)
            h = h if t == 0 else h + self.value(now)
            for layer, kv, c in zip(self.layers, keys, cache):
                h = layer(h, kv, self.mask[t:t + 1, :t + 1], c)
            mu, a = self.affine(h, self.real[t:t + 1])
            u[:, :, t:t + 1] = now = v[:, :, t:t + 1] * torch.exp(a) + mu
        return self.genes(u)

    def jacobi(self, x, H, tol):
        """Inverse of forward as the fixed point u = v exp(a(u)) + mu(u), all slots at once. After i sweeps the first i
        slots are final: T sweeps are exact, fewer (tol > 0) when no value moves more than tol."""
        v, context = self.slots(x), self.context(H)
        u = v.clone()
        for _ in range(v.shape[2]):
            mu, a = self.parameters_of(u, context)
            before, u = u, v * torch.exp(a) + mu
            if tol > 0 and (u - before).abs().max() <= tol:
                break
        return self.genes(u)


class CellTARNet(nn.Module):
    """log p(perturbed cell | control cell, perturbation), exact: a context encoder and a flow of N blocks."""

    def __init__(self, config, panel, statistics=None):
        """statistics: mean, variance and correlation of the genes, or None to load what they determine with the
        weights."""
        super().__init__()
        d, P, G = config.width, config.patch, len(panel.genes)
        T = math.ceil(G / P)
        mean, var, corr = statistics or (torch.zeros(G), torch.ones(G), None)
        self.n_genes, self.padding, self.patch, self.n_pert = G, T * P - G, P, G + len(panel.perturbations)
        self.register_buffer("mean", mean)
        self.register_buffer("std", (var + config.dequantise ** 2).sqrt())   # of the dequantised values

        # context tokens: CLS, the control cell's patches, the perturbation
        self.gene = nn.Parameter(0.5 * torch.randn(G + self.padding, d))
        self.own = nn.Parameter(torch.zeros(len(panel.perturbations) + sum(map(len, panel.covariates.values())), d))
        self.gene_to_pert = nn.Linear(d, d, bias=False)
        self.value, self.special = nn.Linear(P, d), nn.Parameter(0.5 * torch.randn(2, d))  # CLS, place of the pert.
        self.context_layers = nn.ModuleList(ContextLayer(config) for _ in range(config.context_layers))
        self.context_norm = nn.LayerNorm(d)

        # flow: orders come in pairs, one and its reverse; the first is the file's, or clusters where patches are sparse
        graph = None
        if corr is not None and config.prior != "none":
            graph = gene_prior(corr, config.prior, config.neighbours, config.rank)
        pads, generator = torch.arange(G, G + self.padding), torch.Generator().manual_seed(config.seed)
        first = gene_order(corr) if P > 1 and graph is not None else torch.arange(G)
        self.blocks = nn.ModuleList()
        for i in range(config.blocks):
            if i % 2 == 0:
                order = torch.cat([first if i == 0 else torch.randperm(G, generator=generator), pads])
            mine = (order.flip(0) if i % 2 else order).to(mean.device)
            self.blocks.append(FlowBlock(config, mine, attention_mask(graph, mine, P), G))
        self.projection = nn.Sequential(nn.LayerNorm(G), nn.Linear(G, 512), nn.GELU(), nn.Linear(512, 128)) \
            if config.contrast_weight else None

    def standard(self, x):
        """log1p CP10k (..., G) -> standardised and padded (..., T P)."""
        return F.pad((x - self.mean) / self.std, (0, self.padding))

    def encode(self, control, c):
        """control (n, G) log1p CP10k, c (n, V) of multi_hot() -> H (n, T + 2, d)."""
        y = self.standard(control)[:, self.blocks[0].order].unflatten(-1, (-1, self.patch))
        place = self.gene[self.blocks[0].order].unflatten(0, (-1, self.patch)).mean(1)
        table = torch.cat([self.gene_to_pert(self.gene[:self.n_genes]), self.own])
        pert = c @ table.to(c)                                           # a sum: doubles never seen are additive here
        h = torch.cat([self.special[0].expand(len(y), 1, -1), self.value(y) + place,
                       (pert + self.special[1])[:, None]], dim=1)
        for layer in self.context_layers:
            h = layer(h)
        return self.context_norm(h)

    def flow(self, x, H):
        """m cells x (n, m, G) log1p CP10k for each context H -> z (n, m, G), log p(x | context) (n, m), fp32."""
        z, log_det = self.standard(x), -self.std.log().sum()
        for block in self.blocks:
            z, d = block(z, H)
            log_det = log_det + d
        z = z[..., :self.n_genes]
        return z, log_det - (z.square() + math.log(2 * math.pi)).sum(-1) / 2

    def forward(self, x, control, c, pre=None, null=None):
        """z and log p of cells x (n, m, G) under their contexts; log p (n, 1) of `pre` (n, 1, G) under control and
        `null`; embeddings (n, m, 128) of z for the contrast. The last two are None when not asked for."""
        n, log_pre = len(x), None
        H = self.encode(*((control, c) if pre is None else (torch.cat([control, control]), torch.cat([c, null]))))
        z, log_p = self.flow(x, H[:n])
        if pre is not None:
            log_pre = self.flow(pre, H[n:])[1]
        e = None if self.projection is None else F.normalize(self.projection(z).float(), dim=-1)
        return z, log_p, log_pre, e


def multi_hot(groups, panel):
    """c (n, V) of groups CONDITION or CONDITION@COVARIATE, float32: genes of the panel that are perturbed,
    perturbations of the training file, covariates one-hot. A perturbation is its gene, mapped, plus a vector of its own
    that starts at zero: so genes that were never perturbed have an embedding too."""
    G, gene = len(panel.genes), {g: i for i, g in enumerate(panel.genes)}
    own = {p: G + i for i, p in enumerate(panel.perturbations)}
    gene |= {p: g for p, g in zip(panel.perturbations, panel.pert_gene) if g >= 0}
    c = torch.zeros(len(groups), G + len(own))
    for i, group in enumerate(groups):
        for p in group.partition("@")[0].split("+"):
            for table in (gene, own):
                if p in table:
                    c[i, table[p]] = 1
    return torch.cat([c, panel.one_hot(groups)], dim=1)


# -------------------------------------------------------------------------------- losses

def partners(n, rolls, device=None):
    """(R, n): the context whose cell context k also encodes, in blocks of R + 1 contexts: k + r around the block."""
    k, size = torch.arange(n, device=device), rolls + 1
    return torch.stack([k - k % size + (k % size + r) % size for r in range(1, size)])


def info_nce(e, other, condition, temperature):
    """InfoNCE of section 3.1.2, mean over anchors.

    e (n, 2 + R, 128) embeddings under context k: of its own cells 0 (the anchor) and 1 (the positive), then of cell 0
    of context other[r, k]. Negatives of anchor k: these R (same context, other cell), and its own cell under the
    contexts that encode it (other context, same cell). Pairs of one condition are no negatives: condition (n,).
    """
    n, R = len(e), len(other)
    anchor = e[:, 0]
    post = (anchor[:, None] * e[:, 2:]).sum(-1)                          # (n, R)
    by = other.argsort(dim=1)                                            # by[r, j]: the context that encodes cell j
    r = torch.arange(R, device=e.device)[:, None]
    pre = (anchor * e[by, 2 + r]).sum(-1).T                              # (n, R)
    logits = torch.cat([(anchor * e[:, 1]).sum(-1, keepdim=True), post, pre], dim=1) / temperature
    same = torch.cat([condition[other] == condition, condition[by] == condition]).T              # (n, 2 R)
    logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, -math.inf)], dim=1)
    return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long, device=e.device))


def celltarnet_loss(net, x, control, noisy, c, null, condition, config):
    """Negative log-likelihood per gene of perturbed cells and, denoised, of control cells; InfoNCE.

    x (n, m, G), control (n, G): dequantised; noisy (n, G): what the context sees; c and null (n, V), with and without
    the perturbation; condition (n,) numbers.
    """
    if config.contrast_weight:
        other = partners(len(x), config.rolls, x.device)
        x = torch.cat([x, x[other, 0].transpose(0, 1)], dim=1)           # (n, m + R, G)
    denoise = (control[:, None], null) if config.denoise_weight else (None, None)
    _, log_p, log_pre, e = net(x, noisy, c, *denoise)
    m, G = config.cells_per_context, x.shape[-1]
    post = -log_p[:, :m].mean() / G
    pre = -log_pre.mean() / G if config.denoise_weight else torch.zeros_like(post)
    contrast = torch.zeros_like(post)
    if config.contrast_weight:
        e = torch.cat([e[:, :2], e[:, m:]], dim=1)
        contrast = info_nce(e, other, condition, config.temperature)
    return post, pre, contrast


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(model, z, control, c, config):
    """Cells from noise z (n, m, G): m for each context, a control cell (n, G) log1p CP10k and c (n, V). (n, m, G).

    The dequantisation noise is taken back where it shows: values under twice its deviation become zero.
    """
    H = model.encode(control, c)
    x = F.pad(z, (0, model.padding))
    for block in reversed(model.blocks):
        x = block.inverse(x, H) if config.decode == "cached" else block.jacobi(x, H, config.jacobi_tol)
    x = x[..., :model.n_genes] * model.std + model.mean
    return torch.where(x < 2 * config.dequantise, 0, x)


def known(panel, config):
    """Names that can be predicted, and those among them whose embedding no training condition has reached."""
    return set(panel.perturbations) | set(panel.genes), set(panel.outside()) - set(panel.trained)


def load_model(config, panel, saved):
    """The model that predicts, from what a checkpoint has saved."""
    model = CellTARNet(config, panel)
    model.load_state_dict(saved.get("ema", saved["model"]))
    return model


def chunks_of(run, n):
    """In how many chunks n cells go, so that K and V of one block's context and cells stay within the memory."""
    config, T = run.config, math.ceil(len(run.panel.genes) / run.config.patch)
    per_cell = 4 * (4 * config.layers + 12) * (T + 2) * config.width
    return math.ceil(n / min(4096, max(1, (16e9 if run.device.type == "cuda" else 1e9) // per_cell)))


def generate(model, run, group, control, columns, seed):
    """Predicted cells of one group (CONDITION or CONDITION@COVARIATE), from as many control cells (n, G) log1p CP10k,
    for columns (E,) of the panel, ascending: (n, E) float32. Chunks of cells bound the memory; calls are independent.
    """
    config, m = run.config, run.config.samples_per_control
    generator = torch.Generator(run.device).manual_seed(seed)
    contexts = math.ceil(len(control) / m)
    noise = torch.randn(contexts, m, control.shape[1], generator=generator, device=run.device)
    c, out, chunks = multi_hot([group], run.panel).to(run.device), [], chunks_of(run, contexts * m)
    for z, cells in zip(noise.tensor_split(chunks), np.array_split(control[:contexts], chunks)):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            x = sample(model, z, torch.from_numpy(cells).to(run.device), c.expand(len(cells), -1), config)
        out.append(x.flatten(0, 1)[:, torch.as_tensor(columns, device=run.device)].cpu())
    return torch.cat(out).numpy()[:len(control)]


# -------------------------------------------------------------------------------- training

def train(run, state):
    """Train to --steps and return the model that predicts; Ctrl-C and --stop-at save and end the program before."""
    config, dataset, panel = run.config, run.dataset, run.panel
    m, n = config.cells_per_context, config.batch_size // config.cells_per_context

    # model, optimiser, schedule; a resumed run takes them over, statistics included
    torch.manual_seed(config.seed)
    model = CellTARNet(config, panel, None if state else data.gene_statistics(dataset)).to(run.device)
    ema = copy.deepcopy(model) if config.ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True,
                                  weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config) / config.lr)
    sampler = torch.Generator(run.device).manual_seed(config.seed)
    torch.manual_seed(config.seed + run.rank)                            # dropout differs between processes
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"ema": ema} if ema else {})
    start, seconds = restore(run, state, saved, sampler)
    net, predictor = run.wrap(model), ema or model

    # training conditions: index of their group, what the model is told of them, once
    names = dataset.part("train")
    group = torch.tensor([dataset.groups.index(g) for g in names], device=run.device)
    conditions = sorted({g.partition("@")[0] for g in names})
    condition = torch.tensor([conditions.index(g.partition("@")[0]) for g in names], device=run.device)
    c = multi_hot(names, panel).to(run.device)
    null = c.clone()
    null[:, :model.n_pert] = 0                                           # covariates stay
    if config.contrast_weight and len(conditions) == 1:
        run.say("note: there is one training condition; the contrast has no negatives")
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} training conditions, "
            f"{len(panel.genes):,} genes in {len(model.blocks[0].label):,} slots, "
            f"{model.blocks[0].mask.float().mean().item():.0%} of the slots' pairs attended to")

    contexts = n * run.world                                             # per step, over all processes
    mine = slice(run.rank * n, (run.rank + 1) * n)
    G = len(panel.genes)
    progress = Progress(run, start, seconds, contexts * m)
    for step in range(start + 1, config.steps + 1):
        # batch: every process draws all of it and keeps its share, so that N processes equal one with N times the
        # batch. Conditions are dealt as from a shuffled deck: none comes twice while there are enough
        deck = torch.rand(math.ceil(contexts / len(group)), len(group), generator=sampler, device=run.device)
        pick = deck.argsort(dim=1).flatten()[:contexts]
        target = dataset.draw(group[pick], m, sampler).view(contexts, m)[mine]
        source = dataset.draw(dataset.controls_for(group[pick]), 1, sampler)[mine]
        noise = torch.randn(contexts, m + 2, G, generator=sampler, device=run.device)[mine]
        level = torch.rand(contexts, 1, generator=sampler, device=run.device)[mine]
        pick = pick[mine]

        # dequantised targets; the context sees the control cell under noise of the data's own variance
        x = dataset.gather(target.flatten()).view(n, m, G) + config.dequantise * noise[:, :m]
        clean = dataset.gather(source)
        control = clean + config.dequantise * noise[:, m]
        noisy = clean + (level if config.context_noise == "uniform" else 1) * model.std * noise[:, m + 1]

        # forward in bf16 where chosen; values, scales and likelihoods in fp32
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            post, pre, contrast = celltarnet_loss(net, x, control, noisy, c[pick], null[pick], condition[pick], config)
        ramp = min(1, 10 * step / config.steps)
        loss = post + config.denoise_weight * pre + ramp * config.contrast_weight * contrast
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)                # TarFlow
        optimizer.step()
        schedule.step()
        if ema:
            follow(ema, model, config.ema)

        # console, log, validation, checkpoint; none of it touches the random state
        progress.update(step, loss=loss, nll=post, denoise=pre, contrast=contrast)
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            progress.note(step, validate(run, predictor))
        if (stop := progress.should_stop(step)) or step == config.steps or progress.checkpoint_due():
            progress.check_finite(step)
            save_checkpoint(run, step, progress.seconds(), saved, sampler)
        if stop and step < config.steps:
            progress.stopped(step)
    run.deafen()
    return predictor.eval()


def rate(step, config):
    """Learning rate of a step: linear warm-up, then a cosine to --lr-min."""
    if step < config.warmup:
        return config.lr * (step + 1) / (config.warmup + 1)
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * min(1, part))) / 2


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


def log_likelihood(model, x, control, c):
    """log p(x | c) (n,) of cells x (n, G), in nats and log1p CP10k: the mean of p over the R control cells (R, G).
    c (1, V). Dequantise x first."""
    H = model.encode(control, c.expand(len(control), -1))
    return model.flow(x.expand(len(control), -1, -1), H)[1].logsumexp(0) - math.log(len(control))


def score_cells(run, state):
    """--score: log p of every cell of a file under every condition of the training file (or those of --predict), from
    the same control cells of its covariates, written to --out as an AnnData file of cells x conditions."""
    config, panel = run.config, run.panel
    if run.out.exists():
        raise DataError(f"--out {run.out}: exists; choose another name, or remove it")
    if run.world > 1:
        raise DataError("--score runs in one process; start it with python")
    asked = {c.partition("@")[0] for part in state["split"].values() for c in part}
    asked = sorted({"+".join(sorted(c.split("+"))) for c in config.predict or asked})
    for name in {p for c in asked for p in c.split("+")} - known(panel, config)[0]:
        raise DataError(f"--predict: '{name}' is neither a gene of the panel nor a perturbation of the training file; "
                        "--score takes conditions without covariates, as A or A+B")
    cells = data.read_cells(config.score, config, control_required=False, perturbed_required=False)
    data.lognormalise(cells)
    column = {g: i for i, g in enumerate(cells.genes)}
    if missing := [g for g in panel.genes if g not in column]:
        raise DataError(f"--score {config.score}: lacks {len(missing):,} of the {len(panel.genes):,} genes of the "
                        f"model ({', '.join(missing[:5])}); add them (zero where not measured)")
    X, columns, control = cells.X, [column[g] for g in panel.genes], own_controls(run)
    if lost := sorted(set(cells.covariate) - set(control)):
        raise DataError(f"--score {config.score}: no control cells for {lost[0]}; there are "
                        f"{', '.join(sorted(control))}")

    model = load_model(config, panel, state["saved"]).to(run.device).eval()
    generator, log_p = torch.Generator(run.device).manual_seed(config.seed), np.empty((X.shape[0], len(asked)), "f4")
    for value in sorted(set(cells.covariate)):
        own = data.pick_rows(control[value], config.score_controls, seed_of(value, config.seed))
        own, mine = torch.from_numpy(own).to(run.device), np.flatnonzero(cells.covariate == value)
        c = multi_hot([data.group_name(a, value) for a in asked], panel).to(run.device)
        for rows in np.array_split(mine, chunks_of(run, len(mine) * len(own))):
            x = torch.from_numpy(X[rows][:, columns].toarray()).to(run.device)
            x = x + config.dequantise * torch.randn(x.shape, generator=generator, device=run.device)
            with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                log_p[rows] = torch.stack([log_likelihood(model, x, own, one[None]) for one in c], dim=1).cpu()
    best = np.array(asked, dtype=object)[log_p.argmax(1)]
    obs = {"condition": cells.condition, "best": best}
    obs |= {key: cells.obs(key) for key in config.covariate_keys}
    data.write_h5ad(run.out, log_p, obs, asked, {"method": METHOD, "scale": "log p, nats, of log1p CP10k"}, cells.names)

    # what it says of cells whose own condition is among those asked for
    for part, conditions in state["split"].items():
        rows = np.array([i for i, (c, v) in enumerate(zip(cells.condition, cells.covariate))
                         if c in asked and (c in conditions or data.group_name(c, v) in conditions)])
        if len(rows) and len(asked) > 1:
            own = log_p[rows, [asked.index(c) for c in cells.condition[rows]]]
            lower = (log_p[rows] < own[:, None]).sum(1) / (len(asked) - 1)
            other = (log_p[rows].sum(1) - own) / (len(asked) - 1)
            run.say(f"{len(rows):,} cells of {part} conditions: log p {own.mean():.1f} under the own condition, "
                    f"{other.mean():.1f} under others; own above another {lower.mean():.1%}, own first "
                    f"{(lower == 1).mean():.1%} (chance {1 / len(asked):.1%})")
    run.say(f"wrote {run.out}: log p of {len(log_p):,} cells under {len(asked)} conditions")


ACTIONS = {"score": score_cells, "predict": predict}    # what --ckpt can be used for, by the flag that asks for it

if __name__ == "__main__":
    main()
