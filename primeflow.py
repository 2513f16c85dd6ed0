"""PRiMeFlow: flow matching in expression space with a 1-D U-Net over the genes and classifier-free guidance.

A network predicts the velocity that turns Gaussian noise into a cell, all genes at once, given the perturbations
(multi-hot) and the covariates (one-hot). Control cells are targets too, with an empty perturbation, and never the
source. Each gene is a position of a U-Net: its encoded value plus a learned identity. In a fifth of the training cells
a learned null vector replaces the condition, so that sampling can exaggerate it: v = v_null + w (v_condition - v_null).
--preset demo is for small data: an MLP, its flow started at control cells.

Paper: "PRiMeFlow: capturing complex expression heterogeneity in perturbation response modelling" (P; its tables: of
appendix E). The official repository's licence asks for rights in return: nobody who wrote this file has looked at it.
The U-Net follows P's description of OpenAI's guided-diffusion (MIT), called GD; where P is silent, PerturBench.

    python primeflow.py                                         demo data, laptop size, half a minute
    torchrun --nproc-per-node 4 primeflow.py --data sciplex.h5 --covariates cell_type      the paper: table 1
    torchrun --nproc-per-node 4 primeflow.py --data norman.h5 --preset norman              the paper: table 2
    python primeflow.py --data sciplex.h5 --covariates cell_type --accumulate 16           one GPU, the same batch
    python primeflow.py --ckpt runs/X/ckpt.pt --predict TF1@type2 TF1+TF2 --cells 500 --out pred.h5ad
Ablations: --preset paper-mlp (PRiMeFlow-MLP), paper-pca (FM-PCA) and paper-pca-ot (FM-PCA-OT, close to CellFlow), each
for Norman as norman-mlp, ... and at the demo's size as demo-mlp, ...; PRESETS holds the paper's tables 3 to 7.

Deviations from P or GD, and what P leaves open:
 1. Value and identity of a gene are added. P's equation 3, which says how, is lost in the text at hand.
 2. The identity starts at N(0, 0.02): at N(0, 1) it drowns the value.
 3. The sinusoid encodes 10 x expression (--value-scale) and 1000 t; P gives no frequencies.
 4. FiLM is on, as in GD's scripts; off in its class. Condition and time add up before it. GD's K has a bias, which the
    softmax cancels: ours has none. Attention stands at P's downsample factor 16, the deepest of five levels.
 5. The null is one learned vector for the whole condition, covariates included. Zeroing the multi-hot would be control.
 6. P gives no schedule: constant rate (--warmup, --cosine), the last model predicts (--ema), 500 epochs.
 7. Highly variable genes: of training and control cells, scanpy's 'seurat', all covariates together. P: 4,000 by
    'seurat_v3' per covariate, and DE genes, which were chosen on the test pairs too.
 8. MLP: --mlp-layers counts linear layers, of the decoder the hidden ones: were table 4's one layer all of it, nothing
    would mix cell, condition and time. PCA: 50 components over one scale, so that their mean variance is the noise's.
 9. OT: targets are perturbed cells, conditions drawn by their cells; P's "unbalanced" with tau 1 is ordinary Sinkhorn.
10. A perturbation that no training condition holds has an untrained input; a gene that the file never perturbs has
    none, and is refused. A convolution needs the order of the genes: all are generated, in training's order.
11. A generated value is between 0 and its gene's training maximum; P does not say. Table 3 trains no null condition, so
    that its guidance is 1 alone.
12. Ours, for small data, not in the paper's presets. l2/e_distance on the demo, four seeds, 3.73/0.82; without it:
    --coupling control (P: for OT alone) 4.27/0.99, --sigma 1, which smooths the velocity over cells, 4.14/1.06,
    --standardise, so that baselines need not be learned, 3.79/0.88, --effect-readout, an additive effect, 3.83/0.88,
    --zeros detect 3.73/1.14; --control-profile, as similar covariates respond alike: Kang 5.52/3.99 for 4.75/3.20.
13. --ode midpoint --ode-steps 5, ours, takes a tenth of P's evaluations: 4.33/1.33 (demo-mlp, seeds 0 and 1), where
    Euler with 5, 10, 20 and 100 steps has 4.25/1.60, 4.27/1.45, 4.29/1.38 and 4.31/1.33.
"""
import contextlib
import copy
import itertools
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
    """The paper's covariate transfer, table 1; PRESETS lists what the other presets change."""
    split: str = "transfer"         # additive, holdout, cv, combo, transfer, unseen, FILE.json or obs:COLUMN
    steps: int = 100_000            # of 864 cells on four GPUs: 500 epochs of sci-Plex, PerturBench's limit
    batch_size: int = 54            # cells per forward pass and process (paper); --accumulate passes make a step
    lr: float = 5e-5                # Adam (paper)
    hvg: int = 4000                 # paper and PerturBench, per covariate; the perturbed genes are added
    eval_genes: int = 0             # genes that are evaluated: PerturBench scores all
    exact_cells: bool = True        # 1,000 cells of every condition (paper), not as many as were measured
    control_split: str = "0.5,0.25,0.25"  # controls' shares in train,val,test (PerturBench)
    velocity: typing.Literal["unet", "mlp"] = "unet"        # mlp: PRiMeFlow-MLP (ablation)
    space: typing.Literal["genes", "pca"] = "genes"         # pca: the flow runs in principal components (ablation)
    coupling: typing.Literal["independent", "control", "ot"] = "independent"  # source: noise, controls, matched ones
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
    effect_readout: bool = False    # a linear map from the condition to the genes is added to the velocity (ours)
    standardise: bool = False       # centre covariates on their controls, divide by the gene's deviation (ours)
    control_profile: bool = False   # a covariate is known by the similarity of its controls, not by its name (ours)
    accumulate: int = 4             # forward passes per step (paper)
    clip: float = 5.0               # largest norm of the gradient; 0 does not clip (paper)
    weight_decay: float = 0.0       # of Adam, as L2 (paper)
    warmup: int = 0                 # steps of linear warm-up (paper: none given)
    cosine: bool = False            # let the learning rate fall to 0 over --steps (paper: none given)
    ema: float = 0.0                # decay of averaged weights used for prediction; 0 is none, as in the paper
    guidance: tuple[float, ...] = (1.0, 3.0, 5.0)  # w; the first is the method, the others are further rows (paper)
    ode: typing.Literal["euler", "midpoint"] = "euler"      # euler: paper; midpoint evaluates twice a step
    ode_steps: int = 100            # K (paper); 5 of midpoint sample as well, ten times as fast (13)


def check(config):
    """Refuse values that cannot work together, before anything is read or written."""
    data.check_numbers(vars(config), "width multipliers blocks heads groups hidden mlp_layers pcs accumulate "
                       "ode_steps value_scale ot_cells", below_one="dropout ema p_null")
    deepest = config.width * config.multipliers[-1]
    unet = config.velocity == "unet"
    if config.width % 2 or unet and (config.width % config.groups or deepest % config.heads):
        raise DataError(f"--width {config.width}: must be even; in the U-Net --groups {config.groups} must divide it, "
                        f"--heads {config.heads} the {deepest} channels of the deepest level")
    if config.standardise and config.space == "pca":
        raise DataError("--space pca: components are of expression as it is; add --no-standardise")
    if len(config.mlp_layers) != 4:
        raise DataError("--mlp-layers takes four numbers: value, condition, time, decoder")
    if config.coupling == "ot" and config.batch_size % config.ot_cells:
        raise DataError(f"--batch-size {config.batch_size}: must be a multiple of --ot-cells {config.ot_cells}")
    if any(w != 1 for w in config.guidance) and config.p_null == 0:
        raise DataError(f"--guidance {' '.join(map(str, config.guidance))}: needs --p-null; or use --guidance 1")


MLP = dict(velocity="mlp", accumulate=1, mlp_layers=(1, 1, 3, 2), dropout=0.0, p_null=0.0, guidance=(1.0,), sigma=0.01)
PCA = dict(velocity="mlp", space="pca", accumulate=1, mlp_layers=(2, 3, 4, 4), dropout=0.2, p_null=0.4,
           path="trigonometric", sigma=0.1)
DEMO = dict(
    steps=1500, batch_size=64, accumulate=1, lr=2e-3, warmup=50, cosine=True, ema=0.99, hvg=1000, eval_genes=1000,
    eval_cells=100, exact_cells=False, control_split="", velocity="mlp", hidden=256, mlp_layers=(2, 2, 2, 2),
    dropout=0.2, coupling="control", sigma=1.0, standardise=True, effect_readout=True, control_profile=True, p_null=0.0,
    guidance=(1.0,), ode_steps=10, zeros="detect", width=32, multipliers=(1, 1, 1), heads=4, groups=8, blocks=1,
    ot_cells=16)
AS_PAPER = dict(coupling="independent", standardise=False, effect_readout=False, control_profile=False, zeros="clamp")
PRESETS = {                             # steps: 500 epochs each; tables: of P
    "paper": {},
    "norman": dict(split="combo", steps=19_000, multipliers=(1, 1, 2, 2, 4), batch_size=100),               # table 2
    "demo": DEMO,
    "paper-mlp": MLP | dict(steps=170_000, batch_size=512, lr=3.71e-5, weight_decay=4.05e-7),               # table 3
    "norman-mlp": dict(split="combo", steps=30_000, velocity="mlp", hidden=2048, mlp_layers=(2, 3, 5, 1),   # table 4
                       batch_size=1024, accumulate=1, lr=8.56e-6, weight_decay=9.58e-7, p_null=0.1,
                       path="trigonometric", sigma=0.1),
    "demo-mlp": DEMO | AS_PAPER | MLP,
    "paper-pca": PCA | dict(steps=85_000, batch_size=1024, lr=8.18e-5, weight_decay=1.28e-10),              # table 5
    "norman-pca": PCA | dict(split="combo", steps=15_000, hidden=1792, mlp_layers=(4, 2, 2, 4), batch_size=2048,
                             lr=1.73e-4, weight_decay=6.75e-6, sigma=0.01, ot_cells=256),                   # table 6
    "demo-pca": DEMO | AS_PAPER | PCA}
PRESETS |= {f"{name}-ot": PRESETS[name] | dict(coupling="ot") for name in PRESETS if name.endswith("-pca")}  # table 7
SAMPLING = {"guidance", "ode", "ode_steps"}     # flags that --ckpt may change
UNSEEN = False                          # whether genes that were never perturbed can be predicted
USES = {}                               # {flag: what --ckpt is for besides --predict}


def variants(config):
    """{suffix of the row in the table: options of generate()}; the first is the method itself."""
    return {"": {}} | {f" w={w:g}": {"guidance": w} for w in dict.fromkeys(config.guidance) if w != config.guidance[0]}


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


def conv(c_in, c_out, kernel, stride=1, bias=True):
    """Convolution over the genes of (B, C, 1, L), in 2-D: GPUs copy a 1-D one to channels-last layout and back."""
    return nn.Conv2d(c_in, c_out, (1, kernel), (1, stride), (0, kernel // 2), bias=bias)


class Attention(nn.Module):
    """Multi-head self-attention over positions, GroupNorm before it, the input added (GD's AttentionBlock)."""

    def __init__(self, channels, heads, groups):
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(groups, channels)
        self.k = conv(channels, channels, 1, bias=False)                 # a bias of K would cancel in the softmax
        self.qv, self.out = conv(channels, 2 * channels, 1), zeroed(conv(channels, channels, 1))

    def forward(self, x):
        """(B, C, 1, L) -> the same."""
        def split(y):                                                    # (B, C, 1, L) -> (B, H, L, C/H)
            return y.squeeze(2).mT.contiguous().unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = self.norm(x)
        q, v = self.qv(y).chunk(2, dim=1)
        a = F.scaled_dot_product_attention(split(q), split(self.k(y)), split(v))
        return x + self.out(a.transpose(1, 2).flatten(2).mT[:, :, None])


class ResBlock(nn.Module):
    """GN-SiLU-conv, GN-FiLM-SiLU-dropout-conv, and the input added; attention after it at the deepest level."""

    def __init__(self, c_in, c_out, config, attention=False):
        super().__init__()
        self.norm_in, self.conv_in = nn.GroupNorm(config.groups, c_in), conv(c_in, c_out, 3)
        self.norm_out = nn.GroupNorm(config.groups, c_out)
        self.dropout, self.conv_out = nn.Dropout(config.dropout), zeroed(conv(c_out, c_out, 3))
        self.skip = conv(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = Attention(c_out, config.heads, config.groups) if attention else nn.Identity()

    def forward(self, x, film):
        """x (B, C_in, 1, L), film (B or 1, 2 C_out): scale, then shift -> (B, C_out, 1, L)."""
        scale, shift = film[..., None, None].chunk(2, dim=1)             # each (B or 1, C_out, 1, 1)
        h = self.conv_in(F.silu(self.norm_in(x)))
        norm = self.norm_out                                             # its affine part and FiLM in one pass over h
        weight = norm.weight[:, None, None] * (1 + scale)                # (B or 1, C_out, 1, 1), as bias
        bias = norm.bias[:, None, None] * (1 + scale) + shift
        h = F.silu(torch.addcmul(bias, F.group_norm(h, norm.num_groups, eps=norm.eps), weight))
        return self.attention(self.skip(x) + self.conv_out(self.dropout(h)))


class UNet(nn.Module):
    """GD's UNetModel with dims=1, scale-shift norm and learned resampling."""

    def __init__(self, config):
        super().__init__()
        D, channels = config.width, [m * config.width for m in config.multipliers]
        c, deepest = channels[-1], len(channels) - 1
        self.stem = conv(D, channels[0], 3)
        self.down, skips = nn.ModuleList(), channels[:1]                 # channels of what the way up gets
        for level, wide in enumerate(channels):
            for _ in range(config.blocks):
                self.down.append(ResBlock(skips[-1], wide, config, level == deepest))
                skips.append(wide)
            if level < deepest:
                self.down.append(conv(wide, wide, 3, stride=2))
                skips.append(wide)
        self.middle = nn.ModuleList([ResBlock(c, c, config, True), ResBlock(c, c, config)])
        self.up = nn.ModuleList()
        for level, wide in reversed(list(enumerate(channels))):
            for _ in range(config.blocks + 1):
                self.up.append(ResBlock(c + skips.pop(), wide, config, level == deepest))
                c = wide
            if level > 0:
                self.up.append(conv(c, c, 3))
        self.norm, self.head = nn.GroupNorm(config.groups, c), zeroed(conv(c, 1, 3))
        self.sizes = [2 * m.conv_out.out_channels for m in self.modules() if isinstance(m, ResBlock)]
        self.film = nn.Linear(4 * D, sum(self.sizes))                    # FiLM of all blocks in one product

    def forward(self, x, film):
        """x (B, D, 1, L), L a multiple of 2^(levels - 1); film (B or 1, sum of sizes) -> (B, L)."""
        films = iter(film.split(self.sizes, dim=-1))                     # each block takes the next
        x = self.stem(x)
        skips = [x]
        for m in self.down:
            x = m(x, next(films)) if isinstance(m, ResBlock) else m(x)
            skips.append(x)
        for m in self.middle:
            x = m(x, next(films))
        for m in self.up:
            if isinstance(m, ResBlock):
                x = m(torch.cat([x, skips.pop()], dim=1), next(films))
            else:
                x = m(F.interpolate(x, scale_factor=(1.0, 2.0)))         # nearest
        return self.head(F.silu(self.norm(x))).flatten(1)


class UNetVelocity(nn.Module):
    """A coordinate (gene) is a position: encoded value + identity, then the U-Net, conditioned by FiLM."""

    def __init__(self, size, columns, config):
        super().__init__()
        D, E = config.width, 4 * config.width
        self.scale, self.pad = config.value_scale, -size % 2 ** (len(config.multipliers) - 1)
        self.value = nn.Sequential(conv(D, D, 1), nn.SiLU(), conv(D, D, 1))
        self.identity = nn.Parameter(0.02 * torch.randn(D, size + (self.pad > 0)))   # the last is the padding's
        self.unet = UNet(config)
        self.time, self.condition = mlp([D, E, E]), mlp([columns, E, E])             # GD

    def conditioning(self, time, condition):
        """(n, 4D) and (n or 1, 4D) -> film of all blocks (n, sum of sizes)."""
        return self.unet.film(F.silu(time + condition))

    def forward(self, x, conditioning):
        """x (B, S), conditioning (B or 1, sum of sizes) -> velocity (B, S)."""
        S = x.shape[1]                                                   # padded to what the U-Net can halve, L
        identity = torch.cat([self.identity[:, :S], self.identity[:, S:].expand(-1, self.pad)], dim=1)
        features = sinusoid(self.scale * F.pad(x, (0, self.pad)), len(identity))[:, :, None]          # (B, D, 1, L)
        if x.is_cuda:
            features = features.contiguous(memory_format=torch.channels_last)            # and so all that follows
        return self.unet(self.value(features) + identity[:, None], conditioning)[:, :S].float()


class MLPVelocity(nn.Module):
    """The ablation without U-Net: MLPs of cell, condition and time, concatenated, and a decoder."""

    def __init__(self, size, columns, config):
        super().__init__()
        H, drop = config.hidden, config.dropout
        self.value = mlp([size] + [H] * config.mlp_layers[0], drop)
        # the decoder's first layer in two parts: that of condition and time is the same for all cells when sampling
        self.join, self.join_conditioning = nn.Linear(H, H), nn.Linear(2 * H, H, bias=False)
        self.decoder = nn.Sequential(nn.SiLU(), nn.Dropout(drop), mlp([H] * config.mlp_layers[3] + [size], drop))
        self.time = mlp([config.width] + [H] * config.mlp_layers[2], drop)
        self.condition = mlp([columns] + [H] * config.mlp_layers[1], drop)

    def conditioning(self, time, condition):
        """(n, H) and (n or 1, H) -> (n, H)."""
        return self.join_conditioning(torch.cat([condition.expand_as(time), time], dim=-1))

    def forward(self, x, conditioning):
        """x (B, S), conditioning (B or 1, H) -> velocity (B, S)."""
        return self.decoder(self.join(self.value(x)) + conditioning).float()


class Space(nn.Module):
    """The S coordinates of the flow: log1p expression of the G genes, as it is or standardised; or principal components
    over one scale. Profiles are the mean control cells of the V combinations of covariates."""

    def __init__(self, config, panel):
        super().__init__()
        G = len(panel.genes)
        self.pca, self.standardise = config.space == "pca", config.standardise
        self.size = min(config.pcs, G) if self.pca else G
        self.covariates = [data.covariate_name(values) for values in itertools.product(*panel.covariates.values())]
        self.register_buffer("profiles", torch.zeros(len(self.covariates), G))
        self.register_buffer("trained", torch.zeros(len(self.covariates), dtype=torch.bool))     # has perturbed cells
        self.register_buffer("unit", torch.ones(()))                     # median distance of the trained profiles
        self.register_buffer("mean", torch.zeros(G))
        self.register_buffer("scale", torch.ones(self.size))
        self.register_buffer("loadings", torch.zeros(G, self.size) if self.pca else None)

    def fit(self, dataset):
        """From training cells and training controls."""
        X, rows = dataset.X, dataset.fit_rows
        for covariate, controls in dataset.control_rows["train"].items():
            mean = data.gene_moments(X, controls)[0] / len(controls)
            self.profiles[self.covariates.index(covariate)] = torch.from_numpy(mean)
        self.trained[[self.covariates.index(data.split_group(g)[1]) for g in dataset.part("train")]] = True
        self.unit.copy_(torch.pdist(self.profiles[self.trained]).median().nan_to_num(1))         # 1 if one is trained
        total, square = data.gene_moments(X, rows)
        variance = np.maximum(square / len(rows) - (total / len(rows)) ** 2, 0)
        if self.standardise:
            self.scale.copy_(torch.from_numpy(np.sqrt(variance)).clamp(min=0.01))        # a silent gene stays silent
        if self.pca:
            basis = metrics.fit_pca(lambda: (part.toarray() for _, part in data.blocks(X, "PCA", rows)), self.size)
            self.mean.copy_(torch.from_numpy(basis.mean))
            self.loadings[:, :len(rows) - 1] = torch.from_numpy(basis.loadings.copy())   # few cells span fewer
            self.scale.fill_(math.sqrt(variance.sum() * basis.explained.mean()))         # root mean eigenvalue

    def encode(self, x, profile):
        """x (n, G) log1p CP10k, profile (n or 1, G) the mean control cells of their covariates -> (n, S)."""
        x = x - (profile if self.standardise else self.mean)
        return (x @ self.loadings if self.pca else x) / self.scale

    def decode(self, z, profile):
        """z (n, S), profile (n or 1, G) -> (n, G) log1p CP10k."""
        x = z * self.scale
        return (x @ self.loadings.T if self.pca else x) + (profile if self.standardise else self.mean)

    def similarity(self, profile):
        """profile (1, G) -> (V,): a one-hot for a covariate that has perturbed training cells; another one is a mixture
        of those, weighted by exp(-4 (d / median d)^2), d the distance of the mean control cells."""
        distance = (profile - self.profiles).norm(dim=1)
        same = (distance == 0) & self.trained
        mixture = torch.softmax((-4 * (distance / self.unit) ** 2).masked_fill(~self.trained, -torch.inf), dim=0)
        return torch.where(same.any(), same.float(), mixture)


class PRiMeFlow(nn.Module):
    """Velocity v(x_t, t, condition) over the S coordinates of the space."""

    def __init__(self, config, panel):
        super().__init__()
        self.width, self.control_profile = config.width, config.control_profile
        self.space = Space(config, panel)
        covariates = len(self.space.covariates) if self.control_profile else sum(map(len, panel.covariates.values()))
        columns = len(panel.perturbations) + covariates                  # of condition_vector
        velocity = UNetVelocity if config.velocity == "unet" else MLPVelocity
        self.net = velocity(self.space.size, columns, config)
        self.null = nn.Parameter(torch.zeros(self.net.condition[-1].out_features))
        self.effect = zeroed(nn.Linear(columns, self.space.size, bias=False)) if config.effect_readout else None

    def conditioning(self, t, condition):
        """t (n,) in [0, 1], condition (n or 1, E), embedded or the null -> what the net takes, a row for each t."""
        return self.net.conditioning(self.net.time(sinusoid(1000 * t[:, None], self.width)[..., 0]), condition)

    def forward(self, x, t, c, drop):
        """x (B, S), t (B,), c (B, columns) condition, drop (B,) bool: where the null replaces it -> (B, S)."""
        condition = torch.where(drop[:, None], self.null, self.net.condition(c).float())         # (B, E)
        v = self.net(x, self.conditioning(t, condition))
        return v if self.effect is None else v + self.effect(c * ~drop[:, None]).float()


# -------------------------------------------------------------------------------- losses

def path(t, kind):
    """(a, b), (da, db), weights of source and cell at time t: x_t = a x0 + b x1, its velocity = da x0 + db x1."""
    if kind == "linear":
        return (1 - t, t), (-1, 1)
    a, b = torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    return (a, b), (-math.pi / 2 * b, math.pi / 2 * a)


def flow_loss(net, x0, x1, t, c, drop, config):
    """Mean squared error of the velocity: source x0 and cells x1 (B, S), t (B,), c (B, columns), drop (B,) bool."""
    (a, b), (da, db) = path(t[:, None], config.path)
    x_t = a * x0 + b * x1
    if config.sigma:
        x_t = x_t + config.sigma * torch.randn_like(x_t)
    return (net(x_t, t, c, drop) - (da * x0 + db * x1)).square().mean()


def sinkhorn_plan(cost, epsilon, iterations=100):
    """Entropic optimal transport plans between uniform marginals, in the log domain: (C, n, m) -> (C, n, m). epsilon is
    in units of the mean cost; at 1 both marginals hold to 1e-6 after 100 iterations."""
    log_plan = -cost / (epsilon * cost.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12))
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(dim=1).log_softmax(dim=2)        # the columns are met, then the rows
    return log_plan.exp() / cost.shape[1]


@torch.no_grad()
def couple(x0, x1, epsilon=1.0):                                         # CellFlow's
    """Pairs drawn from the plans of C conditions, squared Euclidean cost: x0, x1 (C, n, S) -> both (C n, S)."""
    n = x1.shape[1]
    plan = sinkhorn_plan(torch.cdist(x0, x1).square(), epsilon)
    pair = torch.multinomial(plan.flatten(1), n, replacement=True)       # (C, n)
    source = torch.take_along_dim(x0, (pair // n)[..., None], dim=1)     # (C, n, S)
    target = torch.take_along_dim(x1, (pair % n)[..., None], dim=1)
    return source.flatten(0, 1), target.flatten(0, 1)


# -------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(velocity, model, x, c, guidance, config):
    """Carry x (B, S), noise or encoded control cells, from t=0 to t=1 in K steps; guidance is w, c (columns,) the
    condition. velocity: model.net.forward, compiled or not. Returns (B, S) float32."""
    K, per_step = config.ode_steps, 2 if config.ode == "midpoint" else 1         # evaluations
    t = torch.arange(K * per_step, dtype=x.dtype, device=x.device) / (K * per_step)
    conditioned = model.conditioning(t, model.net.condition(c[None]).float())    # a row for each evaluation
    null = model.conditioning(t, model.null[None])
    effect = 0.0 if model.effect is None else model.effect(c[None]).float()      # (1, S)

    def guided(x, i):
        v = velocity(x, conditioned[i:i + 1]) + effect
        if guidance == 1:
            return v
        v_null = velocity(x, null[i:i + 1])
        return v_null + guidance * (v - v_null)
    for i in range(0, len(t), per_step):
        v = guided(x, i)
        if config.ode == "midpoint":
            v = guided(x + v / (2 * K), i + 1)
        x = x + v / K
    return x


def condition_vector(group, model, panel, profile):
    """(columns,) of a group: multi-hot of its perturbations, then a one-hot per covariate column or, with
    --control-profile, the similarity of profile (1, G), its mean control cell, to those of training."""
    hot = torch.from_numpy(np.isin(panel.perturbations, data.split_group(group)[0].split("+")))
    covariates = model.space.similarity(profile) if model.control_profile else panel.one_hot([group])[0]
    return torch.cat([hot.to(profile), covariates.to(profile)])


def build(config, panel, weights):
    """The model of a checkpoint, to be given its weights."""
    return PRiMeFlow(config, panel)


def told_of(model, run, group, control):
    """What the model is told of one group, CONDITION or CONDITION@COVARIATE: its condition_vector, and the mean control
    cell (1, G) of the covariate: training's, or that of control (n, G) log1p CP10k if the covariate is new."""
    space, covariate = model.space, data.split_group(group)[1]
    profile = control.mean(dim=0, keepdim=True).to(run.device)
    if covariate in space.covariates:
        profile = space.profiles[[space.covariates.index(covariate)]]
    return condition_vector(group, model, run.panel, profile), profile


def cell_bytes(model, config, columns):
    """Memory that one generated cell takes: activations."""
    size = model.space.size
    return 4 * (24 * size * config.width if config.velocity == "unet" else 8 * (size + config.hidden))


def generate(model, run, told, control, noise, columns, guidance=None):
    """Cells (B, G) of one group, from control cells (B, G) log1p CP10k or noise (B, G), whichever is the source."""
    config, space = run.config, model.space
    c, profile = told
    w = config.guidance[0] if guidance is None else guidance
    x = noise[:, :space.size] if config.coupling == "independent" else space.encode(control, profile)
    with run.autocast():
        z = sample(run.compiled(model.net.forward), model, x, c, w, config)
    return space.decode(z, profile)


# -------------------------------------------------------------------------------- training

def train(run, state):
    """Train to --steps and return the model that predicts."""
    config, dataset = run.config, run.dataset
    panel, device = run.panel, run.device
    A, B = config.accumulate, config.batch_size
    n = config.ot_cells if config.coupling == "ot" else 1                # cells of a group in a batch

    # model, optimiser, schedule; a resumed run takes them over, the PCA included
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True                                # every step has the same shapes
    model = PRiMeFlow(config, panel).to(device)
    if not state:
        model.space.fit(dataset)
    ema = copy.deepcopy(model) if config.ema else model
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    least = 0.0 if config.cosine else config.lr
    schedule = data.schedule(optimizer, config.steps, config.warmup, least, overlap="product")
    content = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    begin = run.resume(state, content, cells=A * B)
    net, space = run.wrap(model), model.space

    # groups: covariate, condition, chance to be drawn; controls are targets where they are not the source
    covariate = torch.tensor([space.covariates.index(v) for v in dataset.covariate], device=device)
    condition = torch.stack([condition_vector(g, model, panel, space.profiles[v][None])
                             for g, v in zip(dataset.groups, covariate.tolist())])       # (groups, columns)
    cells = {g: len(dataset.rows[g]) for g in dataset.part("train")}
    if config.coupling == "independent":
        cells |= {data.group_name(data.CONTROL, v): len(rows) for v, rows in dataset.control_rows["train"].items()}
    share = torch.tensor([float(cells.get(g, 0)) for g in dataset.groups], device=dataset.index_device)
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {sum(cells.values()):,} training cells, "
            f"{len(panel.genes):,} genes")

    for step in range(begin + 1, config.steps + 1):
        run.start(step)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for a in range(A):
            # batch: n cells of each of B / n groups
            group = torch.multinomial(share, B // n, replacement=True)
            each = group.to(device).repeat_interleave(n, output_size=B)
            profile = space.profiles[covariate[each]]                     # (B, G)
            x1, c = space.encode(dataset.gather(dataset.draw(group, n)), profile), condition[each]
            if config.coupling == "independent":
                x0 = torch.randn_like(x1)
            else:
                x0 = space.encode(dataset.gather(dataset.draw(dataset.controls_for(group), n)), profile)
            if config.coupling == "ot":
                x0, x1 = couple(x0.unflatten(0, (-1, n)), x1.unflatten(0, (-1, n)))
            t, drop = torch.rand(B, device=device), torch.rand(B, device=device) < config.p_null

            # forward in bf16 where chosen, loss in fp32; processes exchange gradients in the last pass only
            with net.no_sync() if run.world > 1 and a < A - 1 else contextlib.nullcontext():
                with run.autocast():
                    loss = flow_loss(net, x0, x1, t, c, drop, config)
                (loss / A).backward()
            total = total + loss.detach() / A
        nn.utils.clip_grad_norm_(model.parameters(), config.clip or math.inf, foreach=True)
        optimizer.step()
        schedule.step()
        data.average(ema, model, config.ema)

        if config.eval_every and step % config.eval_every == 0:
            run.validate(step, ema)
        run.finish(step, content, loss=total)                            # log line, checkpoint, Ctrl-C
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
