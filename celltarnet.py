"""CellTARNet: a transformer autoregressive flow with an exact likelihood, contrast and a gene-network prior.

A cell is a sequence of genes. A transformer reads the context, a control cell and the perturbation. N flow blocks, each
a causal transformer over the genes in an order of its own with cross-attention to the context, turn the perturbed cell
into Gaussian noise gene by gene; run backwards they generate cells. Self-attention sees only genes that a sparse or a
low-rank view of the training correlations connects. Training adds a denoising task for the control cell (same weights,
no perturbation) and a contrast between matching and mismatching pairs of cell and context to the likelihood.

Paper: "CellTARNet: single-cell perturbation prediction using transformer based normalizing flow" (anonymous, under
review) (P); no official code exists. It builds on TarFlow (Zhai et al. 2024) and on STARFlow's shifted input.

    python celltarnet.py                                          demo data, laptop size, about 2 minutes on 2 cores
    python celltarnet.py --data norman.h5 --split cv --fold 0       the paper's configuration; GPU if there is one
    python celltarnet.py --data norman.h5 --split cv --fold 0 --resume      go on after Ctrl-C or a crash
    python celltarnet.py --ckpt runs/X/ckpt.pt --predict CEBPA KLF1+MAP2K6 --cells 500 --out pred.h5ad
    python celltarnet.py --ckpt runs/X/ckpt.pt --score cells.h5ad --out scores.h5ad   which condition explains a cell?
    torchrun --nproc-per-node 4 celltarnet.py --data norman.h5 --split cv
Ablations: --contrast-weight 0, --denoise-weight 0, --prior none (dense), --prior sparse (S), --prior low-rank (L).

Deviations (numbers are l2/e_distance on the demo, seeds 0 and 1, where the preset has 3.94/0.86):
 1. v = (u - mu) exp(-a) from cell to noise, log|det| = -sum a, as P's eq. 4-5; its section 3.1 has the opposite signs.
 2. The input is shifted by one slot (STARFlow): P's mask j <= i lets a slot see the value it transforms.
 3. mu and a once per block, after layer K (P says both); |a| < 3 by a soft clip. Cross-attention reads H (P says both).
 4. Values live in R^P and are projected into R^d per block. H has G/P + 2 tokens: CLS, patches, perturbation.
 5. Targets are dequantised: under an atom at 0 a density has no bound. Sampling sets what is under 2 sigma to 0, and
    always cuts at 0 and at the gene's training maximum (data.as_measured).
 6. Genes are standardised by training mean and sqrt(var + sigma^2). Likelihoods are reported in log1p CP10k.
 7. The perturbation's token of H scales and shifts the slots' labels (FiLM, zero at the start).
 8. Noise on the control cell has sd sqrt(var + sigma^2) (P: sqrt(var)) and a level from U(0, 1): sampling uses the
    clean cell. Denoising keeps the covariates.
 9. Contexts are paired: each also encodes a cell of its partner, one negative of each of P's kinds; none if both are
    of one condition. All contexts of a batch, drawn by process, have distinct conditions while there are enough.
10. A perturbation is a learned map of its gene's vector plus a vector of its own that starts at zero (P: the latter).
11. Orders come in pairs, one and its reverse: the file's (clusters of correlated genes if P > 1), then random ones.
12. The prior's correlations are of training and control cells of one fold; the slot before is always seen.
13. Sizes, schedule and cells generated (as many as are real, at most 1,000) are ours; P names none. Perturbed genes
    are in the panel beside P's 1,000, not evaluated. Sampling is sequential with cached keys.
14. --effect-readout (demo; without 3.91/0.88): the flow models what a linear effect per gene and perturbation leaves.
15. --calibration (demo; log p is untouched): generated cells are shifted, linearly in the conditions, to the means of
    the training conditions, which the likelihood of few cells alone misses (without 4.20/0.93).
"""
import copy
import functools
import math
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.cluster.hierarchy as hierarchy
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
from data import DataError

METHOD = Path(__file__).stem


@dataclass
class Config(data.RunConfig):
    """The paper's configuration, where it names one; PRESETS lists what --preset demo changes."""
    split: str = "cv"               # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    steps: int = 100_000            # length of the schedule (ours; the paper names no hyper-parameter)
    batch_size: int = 64            # target cells per step and process (ours)
    lr: float = 3e-4                # AdamW (ours; TarFlow 1e-4 at width 768)
    hvg: int = 1000                 # with the next field the genes of Ahlmann-Eltze et al., whom the paper follows
    hvg_by: typing.Literal["variance", "mean"] = "mean"  # the most expressed ones of control cells
    train_on_val: bool = True       # the paper names no validation part
    width: int = 256                # d (ours)
    heads: int = 4                  # attention heads of 64, as TarFlow
    blocks: int = 4                 # N: flow blocks, each with an order of the genes of its own (ours)
    layers: int = 4                 # K: transformer layers per block (ours)
    context_layers: int = 4         # layers of the context encoder (ours)
    patch: int = 1                  # P: genes per slot (paper 1); more is faster and coarser
    slots: int = 0                  # G / P at most: a larger panel has larger patches; 0 (paper): as many as there are
    dropout: float = 0.1            # ours
    effect_readout: bool = False    # a linear effect per gene and perturbation beside the flow (ours; paper none)
    calibration: float = 0.0        # ridge penalty of shifts that match generated means to training's; 0: none (paper)
    dequantise: float = 0.1         # sigma_d, log1p CP10k: noise on the targets (ours; TarFlow 0.05 to 0.15)
    denoise_weight: float = 0.5     # lambda_denoise; 0 (ablation): the task is computed, but teaches nothing
    contrast_weight: float = 0.05   # lambda_cont after a ramp over a tenth of the steps; 0 (ablation): likewise
    temperature: float = 0.1        # tau of InfoNCE (ours)
    cells_per_context: int = 2      # m: perturbed cells that share a control cell in a batch (ours)
    prior: typing.Literal["both", "sparse", "low-rank", "none"] = "both"  # L+S, S, L or no gene network (ablation)
    neighbours: int = 30            # per gene in S, and in L (ours)
    rank: int = 20                  # r: of the low-rank part of the correlations (ours)
    weight_decay: float = 1e-4      # TarFlow
    warmup: int = 1000              # steps of linear warm-up (TarFlow: an epoch)
    lr_min: float = 1e-6            # end of the cosine (TarFlow)
    ema: float = 0.999              # decay of averaged weights used for prediction; 0 is none
    score: str = ""                 # with --ckpt: AnnData file; log p of its cells under conditions, written to --out
    score_under: tuple[str, ...] = ()  # with --score: these conditions; all of the training file if none is named
    score_controls: int = 1         # with --score: control cells over which p is averaged


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    data.check_numbers(vars(config), "heads width blocks layers context_layers patch neighbours rank cells_per_context "
                       "score_controls dequantise temperature", below_one="dropout ema")
    if config.lr_min > config.lr:
        raise DataError(f"--lr-min {config.lr_min}: must not be above --lr {config.lr}; lower it")
    if config.width % config.heads:
        raise DataError(f"--width {config.width}: must be a multiple of --heads {config.heads}")
    if config.cells_per_context < 2:
        raise DataError("--cells-per-context 1: the contrast takes a second cell of the same context; give 2 or more")
    if config.batch_size % (2 * config.cells_per_context):
        raise DataError(f"--batch-size {config.batch_size}: must be a multiple of {2 * config.cells_per_context}: "
                        "--cells-per-context cells of each of an even number of contexts")


PRESETS = {"paper": {}, "demo": dict(
    folds=5, hvg_by="variance", train_on_val=False, steps=800, lr=5e-3, lr_min=1e-5, warmup=50, width=32, heads=2,
    layers=1, context_layers=1, patch=4, slots=80, dropout=0.0, effect_readout=True, calibration=3.0, ema=0.99,
    neighbours=20, rank=10, zeros="detect", eval_cells=100)}
CALIBRATION_CELLS = 8000                # generated for it in all, 10 to 100 of a condition
SAMPLING = {"score", "score_under", "score_controls"}   # flags that --ckpt may change
UNSEEN = True                           # whether genes that were never perturbed can be predicted
variants = None                         # further rows of the table


# -------------------------------------------------------------------------------- gene network

def gene_prior(corr, kind, k, rank):
    """Boolean (G, G) of section 3.2: S, per gene the k genes of highest |correlation|; L, the k highest of its best
    rank-r approximation; their union, made symmetric, with the diagonal."""
    strengths = [] if kind == "low-rank" else [corr.abs()]
    if kind != "sparse":
        value, vector = torch.linalg.eigh(corr.double())                 # ascending
        vector = vector[:, -rank:]
        strengths.append(((vector * value[-rank:]) @ vector.T).abs().float())
    graph = torch.eye(len(corr), dtype=torch.bool, device=corr.device)
    for strength in strengths:
        strength.fill_diagonal_(-1)                                      # last in its own ranking
        best, neighbour = strength.topk(min(k, len(corr) - 1), dim=1)    # (G, k)
        graph |= torch.zeros_like(graph).scatter_(1, neighbour, best > 1e-6)
    return graph | graph.T


def gene_order(corr):
    """(G,) genes such that correlated ones are neighbours: the leaves of average-linkage clustering."""
    distance = (1 - corr.abs()).clamp(min=0).double().cpu().numpy()
    upper = distance[np.triu_indices(len(distance), 1)]
    return torch.from_numpy(hierarchy.leaves_list(hierarchy.linkage(upper, "average")).astype(np.int64))


def block_orders(n_blocks, first, padding, seed):
    """N orders (T P,) of the genes and padding: `first` (G,) and its reverse, then random ones and theirs."""
    orders, genes = [], first
    generator = torch.Generator().manual_seed(seed)
    while len(orders) < n_blocks:
        order = torch.cat([genes, torch.arange(len(genes), len(genes) + padding)])
        orders += [order, order.flip(0)]
        genes = torch.randperm(len(genes), generator=generator)
    return orders[:n_blocks]


def attention_mask(graph, order, patch):
    """Boolean (T, T): which slots s a slot t may see, from graph (G, G) or None and a block's order (T P,), in which
    numbers from G on are padding. Slot s holds the values of patch s - 1: t sees s <= t if s is the start slot or t
    itself, or if patch s - 1 holds a neighbour of a gene of patch t."""
    T = len(order) // patch
    causal = torch.ones(T, T, dtype=torch.bool, device=order.device).tril()
    if graph is None:
        return causal
    padding = len(order) - len(graph)
    graph = F.pad(graph, (0, padding, 0, padding), value=False)[order][:, order]         # (T P, T P)
    near = graph.view(T, patch, T, patch).any(3).any(1)                  # (T, T) patches
    near = near.roll(1, dims=1)                                          # column s: patch s - 1
    near[:, 0] = True
    return causal & near.fill_diagonal_(True)


# -------------------------------------------------------------------------------- model

def attend(q, k, v, mask, size=256):
    """Attention (B, S, H, d/H) of q (B, H, S, d/H). The mask of many queries is causal: chunks of them see the keys up
    to the chunk's end, so that two fifths of 1,100 x 1,100 pairs are never computed."""
    if mask is None or len(mask) <= size:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    chunks = [(slice(end - size, end), slice(end)) for end in range(size, len(mask) + size, size)]
    return torch.cat([attend(q[:, :, own], k[:, :, to], v[:, :, to], mask[own, to]) for own, to in chunks], dim=1)


class Attention(nn.Module):
    """Multi-head attention. K has no bias: it would cancel in the softmax."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width, bias=False)

    def split(self, x):                                                  # (B, S, d) -> (B, H, S, d/H)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, kv, mask=None):
        """x (B, S, d), kv (B, S', 2 d) as self.kv gives it, mask (S, S') added to the logits or None -> (B, S, d)."""
        k, v = kv.chunk(2, dim=-1)
        return self.out(attend(self.split(self.q(x)), self.split(k), self.split(v), mask).flatten(2))


class Layer(nn.Module):
    """Pre-norm transformer layer: cross-attention to the context in the flow (section 3.1, step 1) and none in the
    context encoder, self-attention, MLP."""

    def __init__(self, config, cross):
        super().__init__()
        d = config.width
        if cross:
            self.norm_cross, self.cross = nn.LayerNorm(d), Attention(d, config.heads)
        self.norm_self, self.attention = nn.LayerNorm(d), Attention(d, config.heads)
        self.drop = nn.Dropout(config.dropout)
        self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d), self.drop)

    def forward(self, h, context=None, mask=None, cache=None, t=None, seen=None):
        """h (B, S, d), context: kv of self.cross, (B, T + 2, 2 d), mask (S, T) -> (B, S, d). In sampling S = 1: cache
        (B, T, 2 d) holds the kv of the earlier slots and takes that of slot t (1,), which sees seen (1, N) or all."""
        if context is not None:
            h = h + self.drop(self.cross(self.norm_cross(h), context))
        x = self.norm_self(h)
        kv = self.attention.kv(x)
        if cache is not None:
            kv = cache.index_copy_(1, t, kv)
        if seen is not None:
            kv = kv.index_select(1, seen[0])
        h = h + self.drop(self.attention(x, kv, mask))
        return h + self.mlp(h)


class FlowBlock(nn.Module):
    """One invertible map v = (u - mu) exp(-a), u in the block's order. The input is shifted: slot t holds the values of
    patch t - 1 and the label of patch t, whose mu and a are read there."""

    def __init__(self, config, order, mask, n_genes):
        super().__init__()
        d, T = config.width, len(mask)
        P = self.patch = len(order) // T
        self.register_buffer("order", order)                             # (T P,)
        self.register_buffer("back", order.argsort())
        self.register_buffer("mask", torch.zeros(T, T, device=mask.device).masked_fill_(~mask, -math.inf))
        real = (order < n_genes).float().view(T, P)                      # 0 for padding
        self.register_buffer("scale", torch.cat([real, real / 3], dim=1))    # (T, 2 P): of mu and a
        self.value = nn.Linear(P, d, bias=False)
        self.label = nn.Parameter(0.5 * torch.randn(T, d))
        self.modulate = nn.Linear(d, 2 * d)
        self.layers = nn.ModuleList(Layer(config, cross=True) for _ in range(config.layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 2 * P)
        for p in (self.modulate.weight, self.modulate.bias, self.head.weight, self.head.bias):
            nn.init.zeros_(p)                                            # the flow starts as the identity

    def slots(self, x):                                                  # (B, T P) -> (B, T, P)
        return x.index_select(-1, self.order).unflatten(-1, (-1, self.patch))

    def genes(self, u):                                                  # (B, T, P) -> (B, T P)
        return u.flatten(-2).index_select(-1, self.back)

    def context(self, H):
        """From n contexts H (n, T + 2, d): labels (n, T, d), modulated by the perturbation's token, and per layer the
        kv (n, T + 2, 2 d) of its cross-attention."""
        shift, scale = self.modulate(H[:, -1])[:, None].chunk(2, dim=-1)  # (n, 1, d)
        return self.label * (1 + scale) + shift, [layer.cross.kv(H) for layer in self.layers]

    def affine(self, h, scale):
        """Hidden states (B, S, d) -> mu and a (B, S, P), |a| < 3; in fp32 also where the layers run in bf16."""
        with torch.autocast(h.device.type, enabled=False):
            mu, a = (self.head(self.norm(h.to(scale))) * scale).chunk(2, dim=-1)
            return mu, 3 * torch.tanh(a)                                 # a soft clip: 3 tanh(a / 3)

    def parameters_of(self, u, context):
        """mu, a (B, T, P) of all slots at once, from the true values u (B, T, P)."""
        label, cross = context
        h = self.value(F.pad(u, (0, 0, 1, -1))) + label                  # (B, T, d); the start slot holds zeros
        for layer, kv in zip(self.layers, cross):
            h = layer(h, kv, self.mask)
        return self.affine(h, self.scale)

    def forward(self, x, H, which):
        """x (B, T P), H (n, T + 2, d), which (B,) -> the same cells one step closer to noise, log|det| (B,)."""
        u, (label, cross) = self.slots(x), self.context(H)
        pick = F.one_hot(which, len(H))                                  # an index's backward pass adds row by row
        cross = [(pick.to(kv) @ kv.flatten(1)).unflatten(1, kv.shape[1:]) for kv in cross]
        mu, a = self.parameters_of(u, (label.index_select(0, which), cross))         # under autocast labels stay fp32
        return self.genes((u - mu) * torch.exp(-a)), -a.sum((-2, -1))

    def step(self, layers, cross, caches, before, v, label, scale, t, seen, mask):
        """One slot of the inverse: its values (B, 1, P), from those of the slot before. v, label, scale, t (1,), its
        number, seen and mask are the slot's own. Shapes are the same for every slot: it is compiled once."""
        h = self.value(before) + label                                   # (B, 1, d)
        for layer, kv, cache in zip(layers, cross, caches):
            h = layer(h, kv, mask, cache, t, seen)
        mu, a = self.affine(h, scale)
        return torch.addcmul(mu, v, torch.exp(a))

    def inverse(self, x, H, step, most):
        """Inverse of forward, slot by slot: x (B, T P), H (B, T + 2, d) -> (B, T P); step: as above, or compiled. No
        slot sees more than `most`: so many are gathered from the cache, which would otherwise be read as a whole."""
        v, (label, cross) = self.slots(x), self.context(H)
        caches = [torch.zeros_like(kv[:, 2:]) for kv in cross]           # of self-attention: (B, T, 2 d)
        layers, mask = copy.deepcopy(self.layers), self.mask.to(cross[0])
        seen = [None] * len(mask)
        if 3 * most < len(mask):                                         # gathering reads, writes and reads again
            mask, seen = mask.sort(dim=1, descending=True, stable=True)  # 0 before -inf
            mask, seen = mask[:, :most], seen[:, :most].split(1)
        for module in layers.modules():
            if isinstance(module, nn.Linear):
                module.to(cross[0].dtype)                                # autocast would do it for every slot
        numbers = torch.arange(v.shape[1], device=v.device)
        slots = zip(v.split(1, 1), label.split(1, 1), self.scale.split(1), numbers.split(1), seen, mask.split(1))
        u = [torch.zeros_like(v[:, :1])]                                 # what the start slot holds
        for slot in slots:
            u.append(step(self, layers, cross, caches, u[-1], *slot))
        return self.genes(torch.cat(u[1:], dim=1))


class CellTARNet(nn.Module):
    """log p(perturbed cell | control cell, perturbation), exact: a context encoder and a flow of N blocks."""

    def __init__(self, config, panel, statistics=None):
        """statistics: mean, variance and correlation of the genes; None where what follows from them is loaded."""
        super().__init__()
        d, G = config.width, len(panel.genes)
        mean, var, corr = statistics or (torch.zeros(G), torch.ones(G), None)
        slots = config.slots or math.ceil(G / config.patch)
        self.patch = max(config.patch, math.ceil(G / slots))
        self.n_genes, self.padding = G, -G % self.patch
        self.n_pert = G + len(panel.perturbations)                       # columns of c that stand for perturbations
        self.register_buffer("mean", mean)
        self.register_buffer("std", (var + config.dequantise ** 2).sqrt())   # of the dequantised values
        n_own = len(panel.perturbations) + sum(map(len, panel.covariates.values()))      # V - G columns of c
        self.register_buffer("shift", torch.zeros(1 + n_own, G))         # of generated cells, see calibrate()

        # context tokens: CLS, the control cell's patches, the perturbation
        self.gene = nn.Parameter(0.5 * torch.randn(G + self.padding, d))
        self.own = nn.Parameter(torch.zeros(n_own, d))
        self.gene_to_pert = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(self.patch, d)
        self.special = nn.Parameter(0.5 * torch.randn(2, d))             # CLS; added to the perturbation
        self.context_layers = nn.ModuleList(Layer(config, cross=False) for _ in range(config.context_layers))
        self.context_norm = nn.LayerNorm(d)
        self.effects = nn.Parameter(torch.zeros(n_own, G), requires_grad=config.effect_readout)

        # flow: the first order is the file's, or clusters of correlated genes where a slot holds several
        graph, first = None, torch.arange(G)
        if corr is not None and config.prior != "none":
            graph = gene_prior(corr, config.prior, config.neighbours, config.rank)
            first = gene_order(corr) if self.patch > 1 else first
        orders = [order.to(mean.device) for order in block_orders(config.blocks, first, self.padding, config.seed)]
        self.blocks = nn.ModuleList(FlowBlock(config, o, attention_mask(graph, o, self.patch), G) for o in orders)
        self.projection = nn.Sequential(nn.LayerNorm(G), nn.Linear(G, 512), nn.GELU(), nn.Linear(512, 128))

    @functools.cached_property
    def most(self):                                                      # slots that one sees, in any block
        return max(int((block.mask == 0).sum(1).max()) for block in self.blocks)

    def standard(self, x, effect=0):
        """log1p CP10k (B, G) -> standardised, without its effect (B, G), and padded (B, T P)."""
        return F.pad((x - self.mean) / self.std - effect, (0, self.padding))

    def encode(self, control, c):
        """control (n, G) log1p CP10k, c (n, V) of multi_hot() -> contexts: tokens (n, T + 2, d), namely CLS, patches of
        the control cell, perturbation; and the perturbation's linear effect (n, G), zero without the readout."""
        y = self.blocks[0].slots(self.standard(control))                 # (n, T, P): patches of the first block
        place = self.gene[self.blocks[0].order].unflatten(0, (-1, self.patch)).mean(1)    # (T, d)
        with torch.autocast(y.device.type, enabled=False):               # the effect is part of the values: fp32
            table = torch.cat([self.gene_to_pert(self.gene[:self.n_genes]), self.own])
            pert = c @ table                                             # a sum: doubles never seen are additive here
            effect = c[:, self.n_genes:] @ self.effects
        h = torch.cat([self.special[0].expand(len(y), 1, -1), self.value(y) + place,
                       (pert + self.special[1])[:, None]], dim=1)
        for layer in self.context_layers:
            h = layer(h)
        return self.context_norm(h), effect

    def flow(self, x, context, which):
        """Cells x (B, G) log1p CP10k, which context each has (B,) -> z (B, G), log p(x | context) (B,), fp32."""
        H, effect = context
        z = self.standard(x, effect.index_select(0, which))
        log_det = -self.std.log().sum()
        for block in self.blocks:
            z, of_block = block(z, H, which)
            log_det = log_det + of_block
        z = z[..., :self.n_genes]
        return z, log_det - (z.square() + math.log(2 * math.pi)).sum(-1) / 2

    def inverse(self, z, context, step):
        """z (B, G) and a context for each -> x (B, G) log1p CP10k with flow(x) = z."""
        H, effect = context
        u = F.pad(z, (0, self.padding))
        for block in reversed(self.blocks):
            u = block.inverse(u, H, step, self.most)
        return (u[:, :self.n_genes] + effect) * self.std + self.mean

    def forward(self, x, which, control, c, contrasted):
        """Cells x (B, G), which context each has (B,), and for the contexts control (n, G) and c (n, V) -> log p (B,),
        embeddings of the first cells (contrasted, 128)."""
        z, log_p = self.flow(x, self.encode(control, c), which)
        return log_p, F.normalize(self.projection(z[:contrasted]).float(), dim=-1)


# -------------------------------------------------------------------------------- losses

def info_nce(own, swapped, partner, condition, temperature):
    """InfoNCE of section 3.1.2, mean over n anchors, each with a positive and one negative of each kind.
    own (n, 2, 128): two cells of context k under it, the anchor and the positive; swapped (n, 128): the anchor of
    context partner[k] under context k. To anchor k, swapped[k] is "same context, other cell", swapped[partner[k]]
    "other context, same cell". Partners of one condition, by its number (n,), are no negatives."""
    anchor, positive = own.unbind(1)
    others = torch.stack([positive, swapped, swapped[partner]], dim=1)   # (n, 3, 128)
    logits = (anchor[:, None] * others).sum(-1) / temperature
    same = condition[partner] == condition
    logits[:, 1:] = logits[:, 1:].masked_fill(same[:, None], -math.inf)
    return F.cross_entropy(logits, torch.zeros_like(partner))


def celltarnet_loss(net, x, control, noisy, c, null, condition, temperature):
    """Negative log-likelihood per gene of perturbed cells and of control cells (denoising), InfoNCE. x (n, m, G) and
    control (n, G): targets, dequantised; noisy (n, G): what the contexts see; c and null (n, V): with and without the
    perturbation; condition (n,) numbers."""
    n, m, G = x.shape
    k = torch.arange(n, device=x.device)
    partner = k ^ 1                                                      # contexts 0 and 1, 2 and 3, ...
    cells = torch.cat([x.flatten(0, 1), x[partner, 0], control])
    which = torch.cat([k.repeat_interleave(m, output_size=n * m), k, n + k])
    log_p, e = net(cells, which, torch.cat([noisy, noisy]), torch.cat([c, null]), n * (m + 1))
    own, swapped = e[:n * m].unflatten(0, (n, m))[:, :2], e[n * m:]
    contrast = info_nce(own, swapped, partner, condition, temperature)
    return -log_p[:n * m].mean() / G, -log_p[-n:].mean() / G, contrast


# -------------------------------------------------------------------------------- sampling and likelihood

@torch.no_grad()
def sample(model, z, control, c, config, step=FlowBlock.step):
    """Cells (B, G) from noise z (B, G), control cells (B, G) log1p CP10k and c (B, V). Values within two deviations of
    the dequantisation noise become zero."""
    context = model.encode(control, c)
    x = model.inverse(z, context, step)
    with torch.autocast(x.device.type, enabled=False):
        x = x + model.shift[0] + c[:, model.n_genes:] @ model.shift[1:]
    return torch.where(x.abs() < 2 * config.dequantise, 0, x)


def multi_hot(groups, panel):
    """c (n, V) of groups CONDITION or CONDITION@COVARIATE, float32: genes of the panel that are perturbed,
    perturbations of the training file, covariates one-hot."""
    G = len(panel.genes)
    columns = {g: [i] for i, g in enumerate(panel.genes)}
    for i, (p, g) in enumerate(zip(panel.perturbations, panel.pert_gene)):
        columns[p] = [G + i, g] if g >= 0 else [G + i]
    c = torch.zeros(len(groups), G + len(panel.perturbations))
    for i, group in enumerate(groups):
        for p in data.split_group(group)[0].split("+"):
            c[i, columns[p]] = 1
    return torch.cat([c, panel.one_hot(groups)], dim=1)


def build(config, panel, weights):
    """The model of a checkpoint, to be given its weights."""
    return CellTARNet(config, panel)


def told_of(model, run, group, control):
    """What the model is told of one group, CONDITION or CONDITION@COVARIATE: c (1, V) of multi_hot()."""
    return multi_hot([group], run.panel).to(run.device)


def cell_bytes(model, config, columns):
    """Memory that one cell takes, with a context of its own: kv of one block, activations of a layer."""
    tokens = 2 + len(model.blocks[0].mask)
    return 4 * tokens * config.width * (4 * config.layers + 16)


def generate(model, run, told, control, noise, columns):
    """Cells (B, G) of one group, from control cells (B, G) log1p CP10k and noise (B, G)."""
    c = told.expand(len(control), -1)
    with run.autocast():
        return sample(model, noise, control, c, run.config, run.compiled(FlowBlock.step))


@torch.no_grad()
def log_likelihood(model, x, control, c):
    """log p (B,) of cells x (B, G), dequantised, in nats and log1p CP10k, under c (1, V): p is the mean over control
    cells (n, G)."""
    n = len(control)
    context = model.encode(control, c.expand(n, -1))
    log_p = [model.flow(x, context, k.expand(len(x)))[1] for k in torch.arange(n, device=x.device)]
    return torch.stack(log_p).logsumexp(0) - math.log(n)


def score(run, state):
    """--score: write log p of the cells of a file under conditions, as an AnnData file of cells x conditions."""
    config, device = run.config, run.device
    model, panel = data.trained_model(run, state, build), run.panel
    controls = data.predict_controls(run)[0]
    texts = config.score_under or [group for part in state["split"].values() for group in part]
    asked = sorted({c for c, _ in data.asked_conditions(texts, panel.known(UNSEEN), "--score-under")})
    cells = data.read_cells(config.score, config, control_required=False, perturbed_required=False)
    data.lognormalise(cells)
    columns, covariate = data.match_genes(cells.genes, panel.genes), cells.covariate
    missing = [panel.genes[i] for i in np.flatnonzero(columns < 0)]
    lost = sorted(set(covariate) - set(controls))
    if missing or lost:
        raise DataError(f"--score {config.score}: lacks {len(missing):,} of the model's {len(columns):,} genes, "
                        f"controls of {len(lost)} of its covariates ({', '.join((missing + lost)[:5])}); add them")

    values = np.empty((len(covariate), len(asked)), dtype=np.float32)
    at_once = data.cells_at_once(device, cell_bytes(model, config, panel.eval_genes))
    alike = [np.flatnonzero(covariate == value) for value in sorted(set(covariate))]
    chunks = [rows for of in alike for rows in np.array_split(of, math.ceil(len(of) / at_once))]
    torch.manual_seed(config.seed)
    for rows in data.progress(chunks, "scoring: chunks of cells"):
        value = covariate[rows[0]]
        control = data.pick_rows(controls[value], config.score_controls, data.seed_of(value, config.seed))
        control = torch.from_numpy(control).to(device)
        x = torch.from_numpy(cells.X[rows][:, columns].toarray()).to(device)
        x = x + config.dequantise * torch.randn_like(x)
        told = multi_hot([data.group_name(condition, value) for condition in asked], panel).to(device)
        with run.autocast():
            log_p = [log_likelihood(model, x, control, c[None]) for c in told]
        values[rows] = torch.stack(log_p, dim=1).float().cpu().numpy()
    best = np.array(asked, dtype=object)[values.argmax(axis=1)]
    obs = {"condition": cells.condition, "best": best} | {key: cells.obs(key) for key in config.covariate_keys}
    data.write_h5ad(run.out, values, obs, asked, {"scale": "log p, nats, of log1p CP10k"}, cells.names)
    right = (best == cells.condition)[np.isin(cells.condition, asked)]
    run.say(f"wrote {run.out}: log p of {len(values):,} cells under {len(asked)} conditions; highest under their own "
            f"for {right.sum():,} of the {len(right):,} whose condition is among these")


USES = {"score": score}                 # {flag: what --ckpt is for besides --predict}


# -------------------------------------------------------------------------------- training

def calibrate(run, model):
    """Set model.shift (1 + perturbations and covariates, G), log1p CP10k: a ridge regression, on an intercept and the
    conditions, of what the means of generated training conditions lack. In float64; every process does the same."""
    names = run.dataset.part("train")
    n = max(10, min(100, CALIBRATION_CELLS // len(names)))
    model.eval()
    model.shift.zero_()
    cells = predict(run, model, dict.fromkeys(names, n), run.dataset.control_cells("train"), np.arange(model.n_genes))
    model.train()
    run.capped = 0                                                       # these cells are not the run's result
    real = [data.gene_moments(run.dataset.X, run.dataset.rows[g])[0] / len(run.dataset.rows[g]) for g in names]
    lacking = np.stack(real) - np.stack([cells[g].mean(axis=0) for g in names])
    design = np.insert(multi_hot(names, run.panel)[:, model.n_genes:].double().numpy(), 0, 1, axis=1)
    penalty = run.config.calibration * np.diag(np.arange(design.shape[1]) > 0)           # the intercept is free
    shift = np.linalg.solve(design.T @ design + penalty, design.T @ lacking)
    model.shift.copy_(torch.from_numpy(shift))


def train(run, state):
    """Train to --steps and return the model that predicts."""
    config, dataset = run.config, run.dataset
    panel, device = run.panel, run.device
    m, G = config.cells_per_context, len(panel.genes)
    n = config.batch_size // m

    # model, optimiser, schedule; a resumed run takes them over, statistics and orders included
    torch.manual_seed(config.seed)
    model = CellTARNet(config, panel, None if state else data.gene_statistics(dataset)).to(device)
    ema = copy.deepcopy(model) if config.ema else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True,
                                  weight_decay=config.weight_decay)
    schedule = data.schedule(optimizer, config.steps, config.warmup, config.lr_min)
    content = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    begin, net = run.resume(state, content), run.wrap(model)

    # training conditions: index of their group, what the model is told of them, once
    names = dataset.part("train")
    group = torch.tensor([dataset.groups.index(g) for g in names], device=dataset.index_device)
    number = np.unique([data.split_group(g)[0] for g in names], return_inverse=True)[1]
    condition = torch.tensor(number, device=device)
    c = multi_hot(names, panel).to(device)
    null = c.clone()
    null[:, :model.n_pert] = 0                                           # covariates stay
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} training conditions, {G:,} genes "
            f"in {len(model.blocks[0].mask):,} slots, of which one sees {ema.most:,} at most")

    for step in range(begin + 1, config.steps + 1):
        # batch: m cells of each of n conditions, dealt as from shuffled decks: none comes twice while there are enough
        run.start(step)
        deck = torch.rand(math.ceil(n / len(group)), len(group), device=dataset.index_device).argsort(dim=1)
        pick = deck.flatten()[:n]
        x = dataset.gather(dataset.draw(group[pick], m)).view(n, m, G)
        clean = dataset.gather(dataset.draw(dataset.controls_for(group[pick]), 1))           # (n, G)
        pick = pick.to(device)

        # dequantised targets; the context sees the control cell under noise of the data's own variance
        noise, level = torch.randn(n, m + 2, G, device=device), torch.rand(n, 1, device=device)
        x = x + config.dequantise * noise[:, :m]
        control = clean + config.dequantise * noise[:, m]
        noisy = clean + level * model.std * noise[:, m + 1]

        # forward in bf16 where chosen; values, scales and likelihoods in fp32
        with run.autocast():
            nll, denoise, contrast = celltarnet_loss(net, x, control, noisy, c[pick], null[pick], condition[pick],
                                                     config.temperature)
        ramp = min(1, 10 * step / config.steps)
        loss = nll + config.denoise_weight * denoise + ramp * config.contrast_weight * contrast
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)                # TarFlow
        optimizer.step()
        schedule.step()
        data.average(ema, model, config.ema)

        if config.calibration and step == config.steps:
            calibrate(run, ema)
        if config.eval_every and step % config.eval_every == 0:
            run.validate(step, ema)
        run.finish(step, content, loss=loss, nll=nll, denoise=denoise, contrast=contrast)      # log, checkpoint, Ctrl-C
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
