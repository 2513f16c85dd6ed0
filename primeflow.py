"""PRiMeFlow: flow matching in expression space with a 1-D U-Net over the genes and classifier-free guidance.

A network predicts the velocity that turns Gaussian noise into a cell, all genes at once, given the perturbations
(multi-hot) and the covariates (one-hot). Control cells are training targets too, with an empty perturbation; they are
never the source. Each gene is a position of a U-Net: its encoded value plus a learned identity. In a fifth of the
training cells the condition is replaced by a learned null vector, so that sampling can exaggerate the condition:
v = v_null + w (v_condition - v_null). The MLP, PCA and optimal transport ablations are flags.

Paper: "PRiMeFlow: capturing complex expression heterogeneity in perturbation response modelling" (P; the numbers of
its tables count those of its appendix E). An official repository exists under a licence that asks for rights in
return: nobody who wrote this file has looked at it. The U-Net follows the paper's description of OpenAI's
guided-diffusion (MIT), called GD; protocol and optimiser where the paper is silent are PerturBench's.

    python primeflow.py                                         demo data, laptop size, 1.5 minutes on 2 cores
    torchrun --nproc-per-node 4 primeflow.py --data sciplex.h5 --covariates cell_type      the paper: table 1
    torchrun --nproc-per-node 4 primeflow.py --data norman.h5 --preset norman              the paper: table 2
    python primeflow.py --data sciplex.h5 --covariates cell_type --accumulate 16           one GPU, the same batch
    python primeflow.py --data sciplex.h5 --covariates cell_type --accumulate 16 --resume  go on after Ctrl-C or a crash
    python primeflow.py --ckpt runs/X/ckpt.pt --predict TF1@type2 TF1+TF2 --guidance 3 --cells 500 --out pred.h5ad
Ablations, with the hyper-parameters of tables 3 to 8 (--mlp-layers: value, condition, time, decoder); on the demo add
--lr 1e-3 --batch-size 64 --steps 3000, whose schedule is otherwise the U-Net's (MLP: l2 3.46, without 5.51):
    PRiMeFlow-MLP, transfer   --velocity mlp --accumulate 1 --batch-size 512 --hidden 3072 --mlp-layers 1 1 3 2
                              --dropout 0 --p-null 0 --guidance 1 --sigma .01 --lr 3.71e-5 --weight-decay 4.05e-7
    PRiMeFlow-MLP, Norman     --velocity mlp --accumulate 1 --batch-size 1024 --hidden 2048 --mlp-layers 2 3 5 1
                              --p-null .1 --path trigonometric --sigma .1 --lr 8.56e-6 --weight-decay 9.58e-7
    FM-PCA, transfer          --velocity mlp --space pca --accumulate 1 --batch-size 1024 --hidden 3072 --dropout .2
                              --mlp-layers 2 3 4 4 --p-null .4 --path trigonometric --sigma .1 --lr 8.18e-5
                              --weight-decay 1.28e-10
    FM-PCA, Norman            --velocity mlp --space pca --accumulate 1 --batch-size 2048 --hidden 1792 --dropout .2
                              --mlp-layers 4 2 2 4 --p-null .4 --path trigonometric --sigma .01 --lr 1.73e-4
                              --weight-decay 6.75e-6
    FM-PCA-OT                 the same and --coupling ot --ot-cells 128 (Norman 256); close to CellFlow

Deviations from paper (P) or guided-diffusion (GD), and what P leaves open. "Loss" is the mean training loss of steps
151 to 200 on a 60-gene demo, one run each: 2.68 with width 32, two levels, two groups, value scale 2, lr 1e-2,
identities of N(0, 1).
 1. Value and identity of a gene are added. P's equation 3, which says how, is lost in the text at hand.
 2. The identity starts at N(0, 0.02): at N(0, 1) it drowns the value. Loss 2.64 at 0.2, 2.57 at 0.05; with three
    levels 2.53 at 0.05, 2.51 at 0.02.
 3. The sinusoid encodes 10 x expression (--value-scale) and 1000 t; P gives no frequencies. Loss 2.67 at 10.
 4. FiLM (scale-shift norm) is on, as in GD's scripts; off in its class. Condition and time add up before it, as GD adds
    its class. Attention stands at the deepest level, which is P's downsample factor 16 with five levels. GD's K has a
    bias, which the softmax cancels: ours has none.
 5. The null is one learned vector for the whole condition, covariates included. Zeroing the multi-hot would be control.
 6. Predictions are clamped at 0 (--no-clamp): raises the mean of nearly silent genes a little.
 7. P gives no schedule: constant rate (--warmup, --cosine), the last model predicts (--ema), 100,000 steps.
 8. Highly variable genes come from training and control cells, scanpy's 'seurat', all covariates together; P takes
    4,000 by 'seurat_v3' per covariate and adds DE genes that were chosen on the test pairs too.
 9. MLP: --mlp-layers counts linear layers, of the decoder the hidden ones: were table 4's one layer all of it, nothing
    would mix cell, condition and time. PCA: 50 components over one scale, chosen so that their mean
    variance is the noise's (whitening was not tried). OT: targets are perturbed cells, controls the source; conditions
    are drawn by their cells; P's "unbalanced" with tau 1 is ordinary Sinkhorn; the entropy is CellFlow's.
10. Convolutions run on (B, C, L): on a CPU 1.3 to 2.5 times as fast as channels-last, and 0.7 to 1.8 times, by shape,
    as one matrix product over unfolded neighbours, whose input takes three times the memory. Not measured on GPUs.
11. A perturbation that no training condition holds has an untrained input; a gene that the file never perturbs has
    none, and is refused. The order of the genes matters to a convolution: all genes are generated, in training's order.
The demo does not show P's advantage of the U-Net. Test l2 (e_distance), one run each. U-Net, 254 s of CPU: 4.96 (1.64),
not with today's preset but lr 3e-3, 1,800 steps, identities of N(0, 1), 50 cells per condition. The others, 100 cells,
3,000 steps of 64 cells, lr 1e-3: MLP 3.46 (0.97), 41 s; --space pca --path trigonometric --sigma .1 3.47 (0.80), 42 s;
that and --coupling ot 3.45 (0.88), 88 s. Guidance 3 makes all of them worse: l2 above 10.
"""
import contextlib
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
from torch.utils.checkpoint import checkpoint

import data
import metrics
from data import DataError

METHOD = "primeflow"


@dataclass
class Config(data.DataConfig):
    """Every default is written here: the paper's covariate transfer. PRESETS lists what --preset demo changes."""
    # run: the same flags in all four methods
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo
    split: str = "transfer"         # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    fold: int = 0                   # which of the seeded splits
    folds: int = 10                 # number of folds of --split cv
    seed: int = 0                   # weights, batches and samples; the split depends on --fold alone
    preset: typing.Literal["", "demo", "paper", "norman"] = ""  # size; '' is demo for --data demo and paper otherwise
    out: str = ""                   # run folder; '' is runs/METHOD-DATA-SPLIT-fN-sN. With --predict: the file to write
    steps: int = 100_000            # length of the schedule (500 epochs of sci-Plex, PerturBench's limit)
    stop_at: int = 0                # end at this step as Ctrl-C does; --resume goes on
    time_limit: float = 0           # end after so many minutes as Ctrl-C does; 0 is no limit
    batch_size: int = 54            # cells per forward pass and process (paper; --accumulate passes make a step)
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
    hvg: int = 4000                 # paper and PerturBench, per covariate; the perturbed genes are added
    eval_genes: int = 0             # genes that are evaluated: PerturBench scores all
    control_split: str = "0.5,0.25,0.25"  # controls' shares in train,val,test (PerturBench)
    # method
    velocity: typing.Literal["unet", "mlp"] = "unet"        # mlp: PRiMeFlow-MLP (ablation)
    space: typing.Literal["genes", "pca"] = "genes"         # pca: the flow runs in principal components (ablation)
    coupling: typing.Literal["independent", "ot"] = "independent"  # ot: control cells as source, matched (ablation)
    width: int = 256                # D, base channels of the U-Net; features of value and time (paper)
    multipliers: tuple[int, ...] = (1, 2, 2, 4, 4)  # channels per level, in D; a level halves the genes (paper)
    blocks: int = 2                 # residual blocks per level (paper)
    heads: int = 8                  # attention heads, at the deepest level (paper)
    groups: int = 32                # of GroupNorm (GD)
    dropout: float = 0.1            # paper
    value_scale: float = 10.0       # expression is multiplied by it before its sinusoid (ours)
    hidden: int = 3072              # H, width of the MLP velocity (paper, table 3)
    mlp_layers: tuple[int, ...] = (1, 1, 3, 2)  # of its value, condition and time MLPs and its decoder (paper, table 3)
    pcs: int = 50                   # principal components (ours; CellFlow's usual)
    p_null: float = 0.2             # share of cells trained with the null condition (paper)
    path: typing.Literal["linear", "trigonometric"] = "linear"  # paper
    sigma: float = 0.0              # noise added on the path (paper)
    ot_cells: int = 128             # cells per condition in a coupling; --batch-size is a multiple (paper, table 7)
    ot_epsilon: float = 1.0         # entropy, in units of the mean cost (CellFlow)
    ot_tau_a: float = 1.0           # marginal of the controls: tau = rho / (rho + epsilon), 1 is exact (paper)
    ot_tau_b: float = 1.0           # marginal of the perturbed cells (paper)
    accumulate: int = 4             # forward passes per step (paper)
    clip: float = 5.0               # largest norm of the gradient; 0 does not clip (paper)
    weight_decay: float = 0.0       # of Adam, as L2 (paper)
    warmup: int = 0                 # steps of linear warm-up (paper: none given)
    cosine: bool = False            # let the learning rate fall to 0 over --steps (paper: none given)
    ema: float = 0.0                # decay of averaged weights used for prediction; 0 is none, as in the paper
    recompute: bool = False         # recompute activations in the backward pass: slower, far less memory
    guidance: tuple[float, ...] = (1.0, 3.0, 5.0)  # w; the first is the method, the others are further rows (paper)
    ode_steps: int = 100            # K, Euler (paper)
    clamp: bool = True              # no negative expression in predictions (ours)


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    if config.width < 2 or config.width % 2 or not config.multipliers or min(config.multipliers) < 1:
        raise DataError(f"--width {config.width}: must be even and positive, and --multipliers positive")
    deepest = config.width * config.multipliers[-1]
    if config.velocity == "unet" and (config.heads < 1 or deepest % config.heads):
        raise DataError(f"--heads {config.heads}: must divide the {deepest} channels of the deepest level")
    if config.velocity == "unet" and (config.groups < 1 or config.width % config.groups):
        raise DataError(f"--groups {config.groups}: must divide --width {config.width}")
    if len(config.mlp_layers) != 4 or min(config.mlp_layers) < 1 or config.hidden < 1:
        raise DataError("--mlp-layers takes four positive numbers: value, condition, time, decoder; --hidden is "
                        "positive")
    if config.coupling == "ot" and (config.ot_cells < 1 or config.batch_size % config.ot_cells):
        raise DataError(f"--batch-size {config.batch_size}: must be a multiple of --ot-cells {config.ot_cells}")
    if config.ot_epsilon <= 0 or not 0 < config.ot_tau_a <= 1 or not 0 < config.ot_tau_b <= 1:
        raise DataError("--ot-epsilon must be positive, --ot-tau-a and --ot-tau-b above 0 and at most 1")
    if any(w != 1 for w in config.guidance) and config.p_null == 0:
        raise DataError(f"--guidance {' '.join(map(str, config.guidance))}: without --p-null the null condition is not "
                        "trained; use --guidance 1")
    if min(config.blocks, config.pcs, config.accumulate, config.ode_steps) < 1:
        raise DataError("--blocks, --pcs, --accumulate and --ode-steps must be positive")
    if not all(0 <= p < 1 for p in (config.dropout, config.ema, config.p_null)):
        raise DataError("--dropout, --ema and --p-null must be at least 0 and below 1")
    if min(config.sigma, config.clip, config.weight_decay, config.warmup) < 0 or config.value_scale <= 0:
        raise DataError("--sigma, --clip, --weight-decay and --warmup must not be negative, --value-scale positive")


PRESETS = {"paper": {}, "norman": dict(split="combo", multipliers=(1, 1, 2, 2, 4), batch_size=100), "demo": dict(
    steps=1500, batch_size=32, accumulate=1, lr=1e-2, warmup=50, cosine=True, ema=0.99, hvg=0, eval_genes=1000,
    control_split="", width=32, multipliers=(1, 1, 1), heads=4, groups=8, blocks=1, dropout=0.0, hidden=256,
    mlp_layers=(2, 2, 2, 2), ot_cells=16, guidance=(1.0, 3.0), ode_steps=10, eval_cells=100)}
SAMPLING = {"guidance", "ode_steps", "clamp"}   # flags that --ckpt may change
# times the number of processes is what a step sees
PER_PROCESS = ("batch_size",)
SINKHORN_ITERATIONS = 100               # at epsilon 1 both marginals then hold to 1e-6


def variants(config):
    """{suffix of the row in the table: options of generate()}; the first is the method itself."""
    first, *others = dict.fromkeys(config.guidance)
    return {"": {"guidance": first}} | {f" w={w:g}": {"guidance": w} for w in others}


# -------------------------------------------------------------------------------- model

def sinusoid(x, width):
    """(B, L) -> (B, width, L): cosines, then sines, at geometric frequencies from 1 to 1 / 10,000 (GD)."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=x.device) / (width // 2))
    angle = frequency[:, None] * x[:, None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def mlp(sizes, dropout=0.0):
    """Linear layers of these sizes with SiLU and dropout between them."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for a, b in zip(sizes[1:-1], sizes[2:]):
        layers += [nn.SiLU(), nn.Dropout(dropout), nn.Linear(a, b)]
    return nn.Sequential(*layers)


def zeroed(layer):
    """The layer, starting at zero."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Attention(nn.Module):
    """Multi-head self-attention over positions, GroupNorm before it, the input added (GD's AttentionBlock)."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, channels)
        self.k = nn.Conv1d(channels, channels, 1, bias=False)            # a bias of K would cancel in the softmax
        self.qv, self.out = nn.Conv1d(channels, 2 * channels, 1), zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x):
        """(B, C, L) -> (B, C, L)."""
        def split(y):                                                    # (B, C, L) -> (B, H, L, C/H)
            return y.unflatten(1, (self.heads, -1)).transpose(2, 3).contiguous()         # fused kernels need it
        y = self.norm(x)
        q, v = self.qv(y).chunk(2, dim=1)
        a = F.scaled_dot_product_attention(split(q), split(self.k(y)), split(v))
        return x + self.out(a.transpose(2, 3).flatten(1, 2))


class ResBlock(nn.Module):
    """GN-SiLU-conv, GN-FiLM-SiLU-dropout-conv, and the input added; attention after it at the deepest level."""

    def __init__(self, c_in, c_out, config, attention=False):
        super().__init__()
        self.norm_in, self.conv_in = nn.GroupNorm(config.groups, c_in), nn.Conv1d(c_in, c_out, 3, padding=1)
        self.norm_out = nn.GroupNorm(config.groups, c_out)
        self.dropout, self.conv_out = nn.Dropout(config.dropout), zeroed(nn.Conv1d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv1d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, config.heads, config.groups) if attention else nn.Identity()

    def forward(self, x, film):
        """x (B, C_in, L), film (B or 1, 2 C_out): scale, then shift -> (B, C_out, L)."""
        scale, shift = film[..., None].chunk(2, dim=1)                   # each (B or 1, C_out, 1)
        h = self.conv_in(F.silu(self.norm_in(x)))
        norm = self.norm_out                                             # its affine part and FiLM: one pass over h
        weight = norm.weight[:, None] * (1 + scale)
        bias = norm.bias[:, None] * (1 + scale) + shift
        h = F.silu(torch.addcmul(bias, F.group_norm(h, norm.num_groups, eps=norm.eps), weight))
        return self.attention(self.skip(x) + self.conv_out(self.dropout(h)))


class UNet(nn.Module):
    """GD's UNetModel with dims=1, scale-shift norm and learned resampling. Layout (B, C, L) throughout: chosen by
    measurement (deviation 10); nothing is permuted between layers."""

    def __init__(self, config):
        super().__init__()
        D, channels = config.width, [m * config.width for m in config.multipliers]
        self.stem, self.recompute = nn.Conv1d(D, channels[0], 3, padding=1), config.recompute
        self.down, self.middle, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        c, skips, deepest = channels[0], [channels[0]], len(channels) - 1
        for level, wide in enumerate(channels):
            for _ in range(config.blocks):
                self.down.append(ResBlock(c, wide, config, level == deepest))
                c = wide
                skips.append(c)
            if level < deepest:
                self.down.append(nn.Conv1d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle.extend([ResBlock(c, c, config, True), ResBlock(c, c, config)])
        for level, wide in reversed(list(enumerate(channels))):
            for _ in range(config.blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), wide, config, level == deepest))
                c = wide
            if level > 0:
                self.up.append(nn.Conv1d(c, c, 3, padding=1))
        self.norm, self.head = nn.GroupNorm(config.groups, c), zeroed(nn.Conv1d(c, 1, 3, padding=1))
        blocks = [m for part in (self.down, self.middle, self.up) for m in part if isinstance(m, ResBlock)]
        self.sizes = [2 * m.conv_out.out_channels for m in blocks]
        self.film = nn.Linear(4 * D, sum(self.sizes))                    # FiLM of all blocks in one product

    def forward(self, x, film):
        """x (B, D, L), L a multiple of 2^(levels - 1); film (B or 1, F) -> (B, L)."""
        films = iter(film.split(self.sizes, dim=-1))

        def block(m, x):
            if self.recompute and self.training:
                return checkpoint(m, x, next(films), use_reentrant=False)
            return m(x, next(films))
        x = self.stem(x)
        skips = [x]
        for m in self.down:
            x = block(m, x) if isinstance(m, ResBlock) else m(x)
            skips.append(x)
        for m in self.middle:
            x = block(m, x)
        for m in self.up:
            if isinstance(m, ResBlock):
                x = block(m, torch.cat([x, skips.pop()], dim=1))
            else:
                x = m(F.interpolate(x, scale_factor=2.0))                # nearest
        return self.head(F.silu(self.norm(x))).squeeze(1)


class UNetVelocity(nn.Module):
    """A coordinate (gene) is a position: encoded value + identity, then the U-Net, conditioned by FiLM."""

    def __init__(self, size, config):
        super().__init__()
        D = config.width
        self.width, self.size, self.scale = D, size, config.value_scale
        self.pad = -size % 2 ** (len(config.multipliers) - 1)
        self.value = nn.Sequential(nn.Conv1d(D, D, 1), nn.SiLU(), nn.Conv1d(D, D, 1))
        self.identity = nn.Parameter(0.02 * torch.randn(D, size + (self.pad > 0)))   # the last is the padding's
        self.unet = UNet(config)

    def conditioning(self, time, condition):
        """(n, 4D) and (n or 1, 4D) -> (n, F)."""
        return self.unet.film(F.silu(time + condition))

    def embed(self, x):
        """(B, S) -> (B, D, L): padded, to what the U-Net can halve, with zeros of one shared identity."""
        identity = torch.cat([self.identity[:, :self.size], self.identity[:, self.size:].expand(-1, self.pad)], dim=1)
        return self.value(sinusoid(self.scale * F.pad(x, (0, self.pad)), self.width)) + identity

    def forward(self, x, film):
        """x (B, S), film (B or 1, F) -> velocity (B, S)."""
        return self.unet(self.embed(x), film)[:, :self.size].float()


class MLPVelocity(nn.Module):
    """The ablation without U-Net: MLPs of cell, condition and time, concatenated, and a decoder."""

    def __init__(self, size, config):
        super().__init__()
        H, (n_value, _, _, n_decoder), drop = config.hidden, config.mlp_layers, config.dropout
        self.value = mlp([size] + [H] * n_value, drop)
        # the decoder's first layer in two parts: that of condition and time is the same for all cells when sampling
        self.join, self.join_conditioning = nn.Linear(H, H), nn.Linear(2 * H, H, bias=False)
        self.decoder = nn.Sequential(nn.SiLU(), nn.Dropout(drop), mlp([H] * n_decoder + [size], drop))

    def conditioning(self, time, condition):
        """(n, H) and (n or 1, H) -> (n, H)."""
        return self.join_conditioning(torch.cat([condition.expand_as(time), time], dim=-1))

    def forward(self, x, conditioning):
        """x (B, S), conditioning (B or 1, H) -> velocity (B, S)."""
        return self.decoder(self.join(self.value(x)) + conditioning).float()


class Space(nn.Module):
    """The coordinates of the flow: log1p expression of the G genes, or S principal components over one scale, chosen
    so that their mean variance is that of the noise."""

    def __init__(self, config, panel):
        super().__init__()
        G = len(panel.genes)
        self.pca = config.space == "pca"
        self.size = min(config.pcs, G) if self.pca else G
        if self.pca:
            self.register_buffer("mean", torch.zeros(G))
            self.register_buffer("loadings", torch.zeros(G, self.size))
            self.register_buffer("scale", torch.ones(()))

    def fit(self, dataset):
        """PCA of training cells and training controls."""
        if not self.pca:
            return
        X, rows = dataset.X, dataset.fit_rows
        if len(rows) <= self.size:
            raise DataError(f"--pcs {self.size}: there are {len(rows)} training cells; use fewer components")
        basis = metrics.fit_pca(lambda: (X[block].toarray() for block in data.row_blocks(X, rows)), self.size)
        self.mean.copy_(torch.from_numpy(basis.mean))
        self.loadings.copy_(torch.from_numpy(basis.loadings.copy()))
        self.scale.copy_(standard_deviation(dataset, self, rows).square().mean().sqrt())

    def encode(self, x):
        """(n, G) log1p CP10k -> (n, S)."""
        return (x - self.mean) @ self.loadings / self.scale if self.pca else x

    def decode(self, z):
        """(n, S) -> (n, G) log1p CP10k."""
        return z * self.scale @ self.loadings.T + self.mean if self.pca else z


@torch.no_grad()
def standard_deviation(dataset, space, rows):
    """(S,) float64, of some cells in the space."""
    if space.pca:
        total = square = 0.0
        for block in data.row_blocks(dataset.X, rows):
            z = space.encode(torch.from_numpy(dataset.X[block].toarray()).to(dataset.device)).double()
            total, square = total + z.sum(0), square + z.square().sum(0)
    else:
        total, square = (torch.from_numpy(a).to(dataset.device) for a in data.gene_moments(dataset.X, rows))
    return (square / len(rows) - (total / len(rows)).square()).clamp(min=0).sqrt()


class PRiMeFlow(nn.Module):
    """Velocity v(x_t, t, condition) over the S coordinates of the space."""

    def __init__(self, config, panel):
        super().__init__()
        self.width, self.space = config.width, Space(config, panel)
        columns = len(panel.perturbations) + sum(map(len, panel.covariates.values()))
        if config.velocity == "unet":                                    # GD: two layers, no dropout
            E, n_condition, n_time, drop = 4 * config.width, 2, 2, 0.0
            self.net = UNetVelocity(self.space.size, config)
        else:
            E, (_, n_condition, n_time, _), drop = config.hidden, config.mlp_layers, config.dropout
            self.net = MLPVelocity(self.space.size, config)
        self.time, self.condition = mlp([config.width] + [E] * n_time, drop), mlp([columns] + [E] * n_condition, drop)
        self.null = nn.Parameter(torch.zeros(E))

    def time_embedding(self, t):
        """(n,) times in [0, 1] -> (n, E)."""
        return self.time(sinusoid(1000 * t[:, None], self.width).squeeze(-1))

    def forward(self, x, t, c, drop):
        """x (B, S), t (B,), c (B, columns) condition, drop (B,) bool: where the null replaces it -> (B, S)."""
        h = torch.where(drop[:, None], self.null, self.condition(c).float())
        return self.net(x, self.net.conditioning(self.time_embedding(t), h))


# -------------------------------------------------------------------------------- losses

def path(t, kind):
    """Weights of source and cell at time t, and their derivatives: x_t = a x0 + b x1, velocity = da x0 + db x1."""
    if kind == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    a, b = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return a, b, -math.pi / 2 * b, math.pi / 2 * a


def flow_loss(net, x0, x1, t, c, drop, eps, config):
    """Mean squared error of the velocity, over cells and coordinates. x0, x1 (B, S), t (B,), eps (B, S) or None."""
    a, b, da, db = path(t[:, None], config.path)
    x_t = a * x0 + b * x1
    x_t = x_t if eps is None else x_t + config.sigma * eps
    return (net(x_t, t, c, drop) - (da * x0 + db * x1)).square().mean()


def gaussian_reference(source, target, config, steps=2000):
    """The least loss if all coordinates were independent Gaussians of standard deviations source, target (S,): float.

    That is the mean over time of Var(u) - Cov(u, x_t)^2 / Var(x_t), u the velocity; pi/2 target for the linear path
    from unit noise. Above it a network has learned nothing; below it, it may still be poor.
    """
    s, r, total = source.double().square(), target.double().square(), 0.0
    for t in (torch.arange(steps, dtype=torch.float64, device=s.device) + 0.5) / steps:
        a, b, da, db = path(t, config.path)
        variance = (a**2 * s + b**2 * r + config.sigma**2).clamp(min=1e-300)
        total = total + (da**2 * s + db**2 * r - (a * da * s + b * db * r) ** 2 / variance).mean()
    return (total / steps).item()


def sinkhorn_plan(cost, epsilon, tau_a=1.0, tau_b=1.0, iterations=SINKHORN_ITERATIONS):
    """Entropic optimal transport plans between uniform marginals, in the log domain: (C, n, m) -> (C, n, m).

    epsilon is in units of the mean cost. tau < 1 relaxes a marginal: tau = rho / (rho + epsilon), rho the weight of its
    KL divergence. The number of iterations is fixed, so that nothing waits for the device.
    """
    n, m = cost.shape[1:]
    cost = cost / (epsilon * cost.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12))
    g = cost.new_zeros(len(cost), m)
    for _ in range(iterations):
        f = -tau_a * (torch.logsumexp(g[:, None] - cost, dim=2) - math.log(m))          # (C, n)
        g = -tau_b * (torch.logsumexp(f[:, :, None] - cost, dim=1) - math.log(n))       # (C, m)
    return torch.exp(f[:, :, None] + g[:, None] - cost) / (n * m)


@torch.no_grad()
def couple(x0, x1, u, config):
    """Pairs drawn from each condition's transport plan, as many as cells: x0, x1 (C, n, S), u (C, n) uniform -> both
    (C n, S). Squared Euclidean cost; float32 under autocast too."""
    with torch.autocast(x0.device.type, enabled=False):
        cost = torch.cdist(x0.float(), x1.float()).square()
        plan = sinkhorn_plan(cost, config.ot_epsilon, config.ot_tau_a, config.ot_tau_b)
    n = x1.shape[1]
    mass = plan.flatten(1).double().cumsum(1)                            # (C, n n)
    pair = torch.searchsorted(mass, u.double() * mass[:, -1:]).clamp(max=n * n - 1)
    i, j = pair // n, pair % n                                           # (C, n)
    return tuple(torch.take_along_dim(x, k[..., None], dim=1).flatten(0, 1) for x, k in ((x0, i), (x1, j)))


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(model, x, c, guidance, config, velocity=None):
    """Carry x (B, S) from t=0 to t=1 in K Euler steps of v_null + w (v_condition - v_null), w the guidance.

    x is noise (encoded control cells with --coupling ot), c (columns,) the condition of all of them. The conditioning
    of all steps is computed at once; null and condition are one batch; w = 1 needs no null. Returns (B, S) float32.
    """
    K, B, velocity = config.ode_steps, len(x), velocity or model.net
    time = model.time_embedding(torch.arange(K, dtype=x.dtype, device=x.device) / K)
    hidden = [model.condition(c[None]).float()] + ([model.null[None]] if guidance != 1 else [])
    rows = torch.stack([model.net.conditioning(time, h) for h in hidden], dim=1)         # (K, 1 or 2, F)
    for row in rows:
        if guidance == 1:
            v = velocity(x, row)
        else:
            v, null = velocity(torch.cat([x, x]), row.repeat_interleave(B, dim=0)).chunk(2)
            v = null + guidance * (v - null)
        x = x + v / K
    return x


def condition_vector(group, panel):
    """(columns,) float32: multi-hot of the perturbations (none for control), then a one-hot per covariate column."""
    condition = group.partition("@")[0]
    names = [] if condition == data.CONTROL else condition.split("+")
    hot = torch.from_numpy(np.isin(panel.perturbations, names).astype(np.float32))
    return torch.cat([hot, panel.one_hot([group])[0]])


def known(panel, config):
    """Names that can be predicted, and those among them whose embedding no training condition has reached."""
    return set(panel.perturbations), set(panel.perturbations) - set(panel.trained)


def load_model(config, panel, saved):
    """The model that predicts, from what a checkpoint has saved."""
    model = PRiMeFlow(config, panel)
    model.load_state_dict(saved.get("ema", saved["model"]))
    return model


@torch.no_grad()
def generate(model, run, group, control, columns, seed, guidance=None):
    """Predicted cells of one group (CONDITION or CONDITION@COVARIATE), as many as control cells (n, G) log1p CP10k, for
    columns (E,) of the panel, ascending: (n, E) float32. All genes are generated, in the order of training, and the
    columns cut out. The values of the control cells are used by --coupling ot alone."""
    config, S = run.config, model.space.size
    w = config.guidance[0] if guidance is None else guidance
    c = condition_vector(group, run.panel).to(run.device)
    if config.coupling == "ot":
        x = model.space.encode(torch.from_numpy(control).to(run.device))
    else:
        generator = torch.Generator(run.device).manual_seed(seed)
        x = torch.randn(len(control), S, generator=generator, device=run.device)         # the same for any chunks
    per_cell = 4 * (24 * S * config.width if config.velocity == "unet" else 8 * (S + config.hidden))   # bytes
    per_cell *= 1 if w == 1 else 2
    room = 16e9 if run.device.type == "cuda" else 1.2e9
    out, columns = [], torch.as_tensor(columns, device=run.device)
    for part in x.split(int(min(1000, max(1, room // per_cell)))):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
            z = sample(model, part, c, w, config, run.compiled(model.net.forward))
        cells = model.space.decode(z).index_select(1, columns)
        out.append((cells.clamp(min=0) if config.clamp else cells).cpu())
    return torch.cat(out).numpy()


# -------------------------------------------------------------------------------- training

def train(run, state):
    """Train to --steps and return the model that predicts; Ctrl-C and --stop-at save and end the program before."""
    config, dataset, panel, ot = run.config, run.dataset, run.panel, run.config.coupling == "ot"

    # model, optimiser, schedule; a resumed run takes them over, the PCA included
    torch.manual_seed(config.seed)
    model = PRiMeFlow(config, panel).to(run.device)
    if not state:
        model.space.fit(dataset)
    ema = copy.deepcopy(model) if config.ema else None
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=True)

    def rate(step):                                                      # factor on --lr
        warm = min(1.0, (step + 1) / (config.warmup + 1))
        return warm * (0.5 + 0.5 * math.cos(math.pi * step / config.steps)) if config.cosine else warm
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    sampler = torch.Generator(run.device).manual_seed(config.seed)
    torch.manual_seed(config.seed + run.rank)                            # dropout differs between processes
    saved = {"model": model, "optimizer": optimizer, "schedule": schedule} | ({"ema": ema} if ema else {})
    start, seconds = restore(run, state, saved, sampler)
    net, predictor, space, S = run.wrap(model), ema or model, model.space, model.space.size

    # training cells: perturbed and control alike, but controls are no targets where they are the source
    condition = torch.stack([condition_vector(g, panel) for g in dataset.groups]).to(run.device)     # (groups, columns)
    group_of = np.zeros(dataset.X.shape[0], dtype=np.int64)
    for i, g in enumerate(dataset.groups):
        group_of[dataset.rows[g]] = i
    controls = np.concatenate(list(dataset.control_rows["train"].values()))
    cells = np.setdiff1d(dataset.fit_rows, controls) if ot else dataset.fit_rows
    source = standard_deviation(dataset, space, controls) if ot else torch.ones(S, device=run.device)
    reference = gaussian_reference(source, standard_deviation(dataset, space, dataset.fit_rows), config)
    cells, group_of = torch.from_numpy(cells).to(run.device), torch.from_numpy(group_of).to(run.device)
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(cells):,} training cells, "
            f"{len(panel.genes):,} genes; loss of independent Gaussians {reference:.4f}")

    A, B, W = config.accumulate, config.batch_size, run.world
    N, n = A * W * B, config.ot_cells                                    # cells per step, over all processes
    progress, recent = Progress(run, start, seconds, N), None
    for step in range(start + 1, config.steps + 1):
        # batch: every process draws all of it and keeps its share, so that N processes equal one with N times the batch
        rows = cells[torch.randint(len(cells), (N // n if ot else N,), generator=sampler, device=run.device)]
        if ot:                                                           # n cells of the condition of each, n controls
            group = group_of[rows]
            rows = dataset.draw(group, n, sampler)
            source_rows = dataset.draw(dataset.controls_for(group), n, sampler)
            u = torch.rand(N // n, n, generator=sampler, device=run.device)
        else:
            noise = torch.randn(N, S, generator=sampler, device=run.device)
        eps = torch.randn(N, S, generator=sampler, device=run.device) if config.sigma else None
        t = torch.rand(N, generator=sampler, device=run.device)
        drop = torch.rand(N, generator=sampler, device=run.device) < config.p_null

        # forward in bf16 where chosen, loss in fp32; processes exchange gradients in the last pass only
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for a in range(A):
            mine = slice((a * W + run.rank) * B, (a * W + run.rank + 1) * B)
            x1, c = space.encode(dataset.gather(rows[mine])), condition[group_of[rows[mine]]]
            if ot:
                x0 = space.encode(dataset.gather(source_rows[mine]))
                pairs = x0.unflatten(0, (-1, n)), x1.unflatten(0, (-1, n))
                x0, x1 = couple(*pairs, u[mine.start // n:mine.stop // n], config)
            else:
                x0 = noise[mine]
            with net.no_sync() if W > 1 and a < A - 1 else contextlib.nullcontext():
                with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bf16):
                    loss = flow_loss(net, x0, x1, t[mine], c, drop[mine], None if eps is None else eps[mine], config)
                (loss / A).backward()
            total = total + loss.detach() / A
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip, foreach=True)
        optimizer.step()
        schedule.step()
        if ema:
            follow(ema, model, config.ema)
        recent = total if recent is None else recent.lerp(total, 0.01)

        # console, log, validation, checkpoint; none of it touches the random state
        progress.update(step, loss=total)
        if config.eval_every and step % config.eval_every == 0 and step < config.steps:
            progress.note(step, validate(run, predictor))
        if (stop := progress.should_stop(step)) or step == config.steps or progress.checkpoint_due():
            progress.check_finite(step)
            save_checkpoint(run, step, progress.seconds(), saved, sampler)
        if stop and step < config.steps:
            progress.stopped(step)
    run.deafen()
    if recent is not None:
        run.say(f"loss {recent.item():.4f} over the last steps; independent Gaussians {reference:.4f}")
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
