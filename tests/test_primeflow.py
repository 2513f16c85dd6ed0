"""primeflow.py: the mathematics of its parts, against guided-diffusion's outputs or slow plain formulas."""
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import primeflow
from conftest import TINY
from primeflow import Config, PRiMeFlow, Space, UNet, condition_vector, couple, flow_loss, path, sample, sinkhorn_plan

ORACLE = Path(__file__).with_name("oracle_primeflow.npz")
OURS = dict(effect_readout=True, standardise=True, control_profile=True)
PAPER = dict(effect_readout=False, standardise=False, control_profile=False, sigma=0.0, p_null=0.2,
             coupling="independent", velocity="unet")
AS_PAPER = ["--no-effect-readout", "--no-standardise", "--no-control-profile", "--sigma", "0", "--p-null", "0.2"]


def tiny(**options):
    """The demo preset with the paper's choices and a small network."""
    sizes = dict(width=16, groups=4, heads=2, multipliers=(1, 2, 2), hidden=24, ode_steps=5, dropout=0.0,
                 split="additive")
    return Config(**primeflow.PRESETS["demo"] | PAPER | sizes | options)


def a_panel(genes=20, perturbations=("A", "B", "C"), **covariates):
    names = [f"g{i}" for i in range(genes)]
    return data.Panel(names, list(range(genes)), list(perturbations), [-1] * len(perturbations), list(perturbations),
                      [0.0] * genes, [9.0] * genes, covariates)


def build(config, panel, seed=0):
    """A model in float64 whose zero-initialised parts are random, so that every path matters."""
    torch.manual_seed(seed)
    model = PRiMeFlow(config, panel).double().eval()
    model.space.profiles.normal_()
    model.space.trained[:] = True
    for p in model.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.3)
    return model


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rand(*shape):
    return torch.rand(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the paper's tables

TABLES = {                              # of appendix E, in the order of the fields
    "paper-mlp": (3072, 0.0, (1, 1, 3, 2), 0.0, "linear", 0.01, 3.71e-5, 4.05e-7, 512),
    "norman-mlp": (2048, 0.1, (2, 3, 5, 1), 0.1, "trigonometric", 0.1, 8.56e-6, 9.58e-7, 1024),
    "paper-pca": (3072, 0.2, (2, 3, 4, 4), 0.4, "trigonometric", 0.1, 8.18e-5, 1.28e-10, 1024),
    "norman-pca": (1792, 0.2, (4, 2, 2, 4), 0.4, "trigonometric", 0.01, 1.73e-4, 6.75e-6, 2048)}
FIELDS = "hidden dropout mlp_layers p_null path sigma lr weight_decay batch_size".split()


def changed(preset, base):
    """{field: value} in which one preset differs from another."""
    a, b = (asdict(Config(**primeflow.PRESETS[name])) for name in (preset, base))
    return {name: a[name] for name in a if a[name] != b[name]}


@pytest.mark.parametrize("preset", TABLES)
def test_an_ablation_is_the_papers_table(preset):
    """And nothing else differs from the method but the steps, which are as many epochs, and the one pass of one GPU."""
    config = Config(**primeflow.PRESETS[preset])
    assert tuple(getattr(config, name) for name in FIELDS) == TABLES[preset]
    assert (config.clip, config.accumulate, config.velocity) == (5, 1, "mlp")
    others = {"velocity", "space", "accumulate", "steps", "guidance", "multipliers", "ot_cells"}
    assert set(changed(preset, preset.split("-")[0])) <= {*FIELDS, *others}
    assert config.space == ("pca" if "pca" in preset else "genes")
    cells = {"paper": 864 * 100_000, "norman": 1600 * 19_000}[preset.split("-")[0]]
    assert config.steps * config.batch_size == pytest.approx(cells, rel=0.03)


def test_optimal_transport_is_the_papers_table_7():
    for name, cells in (("paper", 128), ("norman", 256), ("demo", 16)):
        assert changed(f"{name}-pca-ot", f"{name}-pca") == {"coupling": "ot"}
        assert Config(**primeflow.PRESETS[f"{name}-pca-ot"]).ot_cells == cells


def test_the_demos_ablations_have_the_papers_choices_at_the_demos_size():
    for name in ("mlp", "pca", "pca-ot"):
        demo, paper = (Config(**primeflow.PRESETS[f"{size}-{name}"]) for size in ("demo", "paper"))
        same = {field: getattr(demo, field) for field in asdict(demo) if getattr(demo, field) == getattr(paper, field)}
        ours = set(changed("demo", "paper")) - set(same)
        size = set("steps batch_size lr warmup cosine ema hvg eval_genes eval_cells exact_cells control_split hidden "
                   "weight_decay ode_steps width multipliers heads groups blocks ot_cells guidance".split())
        assert ours <= size, name


def test_every_preset_passes_the_check():
    for name, values in primeflow.PRESETS.items():
        primeflow.check(Config(**values))
        assert Config(**values).exact_cells != name.startswith("demo")


# ------------------------------------------------------------------------------------------------ U-Net

def test_unet_equals_guided_diffusion():
    """The file holds weights in our names and what guided-diffusion's UNetModel gives for them in its own (of K without
    the bias, which a softmax cancels), by a plain rewriting that agrees with the original to 5e-7 on 3,287,553 weights.
    """
    z = np.load(ORACLE)
    unet = UNet(Config(width=4, multipliers=(1, 2, 4), blocks=1, heads=2, groups=2, dropout=0.0)).double().eval()
    weights = {name[2:]: torch.from_numpy(z[name]).double() for name in z.files if name.startswith("w/")}
    unet.load_state_dict({name: w[:, :, None] if w.ndim == 3 else w for name, w in weights.items()})      # 1-D to 2-D
    x, emb, out = (torch.from_numpy(z[name]).double() for name in ("x", "emb", "out"))
    x = x[:, :, None]
    got = unet(x, unet.film(F.silu(emb)))
    torch.testing.assert_close(got, out)
    assert out.std() > 0.1
    torch.testing.assert_close(unet(x[:1], unet.film(F.silu(emb[:1]))), got[:1])       # cells do not see each other


@pytest.mark.parametrize("multipliers, width, official", [
    ((1, 2, 2, 4, 4), 256, 208_826_369), ((1, 1, 2, 2, 4), 256, 150_787_841), ((1, 2, 2, 4, 4), 32, 3_287_553)])
def test_parameter_counts_of_the_papers_unets_are_guided_diffusions(multipliers, width, official):
    """Its count includes its time MLP; ours lacks the biases of six K, which a softmax cancels."""
    with torch.device("meta"):
        unet, time = UNet(Config(width=width, multipliers=multipliers)), primeflow.mlp([width, 4 * width, 4 * width])
    count = sum(p.numel() for module in (unet, time) for p in module.parameters())
    assert count + 6 * width * multipliers[-1] == official


@pytest.mark.parametrize("genes, padding", [(17, 3), (20, 0), (23, 1)])
def test_padding_is_constant_and_gets_no_gradient(genes, padding):
    """Three levels: the gene axis is padded to a multiple of four."""
    model = build(tiny(), a_panel(genes))
    x, c, seen = randn(3, genes), torch.zeros(3, 3).double(), []

    def keep(module, args, out):
        out.retain_grad()
        seen.extend([args[0], out])
    model.net.unet.register_forward_hook(keep)
    flow_loss(model, x, randn(3, genes), rand(3), c, torch.zeros(3).bool(), tiny()).backward()
    embedded, out = seen
    rest = embedded[..., genes:]                                         # (3, 16, 1, padding), one shared identity
    assert model.net.pad == rest.shape[3] == padding and (embedded[0] - embedded[1]).abs().max() > 0.1
    torch.testing.assert_close(rest, rest[:1, ..., :1].expand_as(rest))
    assert (out.grad[:, :genes] != 0).all() and not out.grad[:, genes:].any()


def test_a_gene_is_known_by_its_identity():
    """Equal values everywhere: without identities, genes far from the borders would all get the same velocity."""
    model = build(tiny(), a_panel(64))
    row = model.conditioning(torch.tensor([0.5]).double(), model.null[None])
    assert model.net(torch.ones(1, 64).double(), row)[0].unique().numel() == 64


def test_expression_is_multiplied_by_the_value_scale():
    panel, x, t, c = a_panel(), randn(2, 20), rand(2), torch.eye(3, dtype=torch.float64)[:2]
    one, two = (build(tiny(value_scale=scale), panel) for scale in (3.0, 6.0))
    none = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(one(2 * x, t, c, none), two(x, t, c, none))
    assert not torch.allclose(one(x, t, c, none), two(x, t, c, none), atol=1e-3)


@pytest.mark.parametrize("velocity", ["unet", "mlp"])
@pytest.mark.parametrize("choices", [PAPER, OURS])
def test_every_parameter_learns(velocity, choices):
    """No parameter whose gradient is zero: under Adam its noise would differ between processes."""
    panel = a_panel(18, cell_type=["x", "y"])
    config = tiny(**choices | {"velocity": velocity})
    model = build(config, panel)
    profile = model.space.profiles[:1]
    c = torch.stack([condition_vector(g, model, panel, profile) for g in ("A@x", "control@y", "B+C@x", "C@y")])
    c[:, -1] += 1                                                        # all columns are used
    drop = torch.tensor([False, False, True, False])
    flow_loss(model, randn(4, 18), randn(4, 18), rand(4), c.double(), drop, config).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-9, name


# ------------------------------------------------------------------------------------------------ path and loss

@pytest.mark.parametrize("kind", ["linear", "trigonometric"])
def test_velocity_is_the_derivative_of_the_path(kind):
    t = rand(9).requires_grad_()
    x0, x1 = randn(9), randn(9)
    (a, b), (da, db) = path(t, kind)
    (derivative,) = torch.autograd.grad((a * x0 + b * x1).sum(), t)
    torch.testing.assert_close(derivative, (da * x0 + db * x1).detach())
    for end, expected in ((0.0, x0), (1.0, x1)):
        (a, b), _ = path(torch.full((9,), end, dtype=torch.float64), kind)
        torch.testing.assert_close(a * x0 + b * x1, expected)


@pytest.mark.parametrize("kind", ["linear", "trigonometric"])
def test_loss_of_the_true_velocity_is_zero_and_of_none_is_its_square(kind):
    config, x0, x1, t = tiny(path=kind, sigma=0.5), randn(5, 7), randn(5, 7), rand(5)
    (a, b), (da, db) = path(t[:, None], kind)
    u, seen = da * x0 + db * x1, []

    def none(x, *_):
        seen.append(x)
        return 0 * x
    assert flow_loss(lambda *_: u, x0, x1, t, None, None, config) == 0
    torch.testing.assert_close(flow_loss(none, x0, x1, t, None, None, config), u.square().mean())
    many = x0.repeat(1, 4000), x1.repeat(1, 4000)
    flow_loss(none, *many, t, None, None, config)
    noise = seen[1] - (a * many[0] + b * many[1])
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(0.5, rel=0.02)
    flow_loss(none, x0, x1, t, None, None, tiny(path=kind))
    torch.testing.assert_close(seen[2], a * x0 + b * x1)


# ------------------------------------------------------------------------------------------------ optimal transport

def test_transport_plan_equals_a_plain_loop():
    """Scaling form, one condition at a time."""
    torch.manual_seed(0)
    cost = torch.cdist(randn(2, 7, 3), randn(2, 9, 3)).square()
    for c, got in zip(cost, sinkhorn_plan(cost, 0.5)):
        kernel, u, v = torch.exp(-c / (0.5 * c.mean())), torch.ones(7).double(), torch.ones(9).double()
        for _ in range(300):
            u = (1 / 7) / (kernel @ v)
            v = (1 / 9) / (kernel.T @ u)
        torch.testing.assert_close(got, u[:, None] * kernel * v, rtol=1e-5, atol=1e-12)
    even = torch.full((2, 7), 1 / 7).double()                       # the fixed number of iterations is enough
    torch.testing.assert_close(sinkhorn_plan(cost, 1.0).sum(2), even, rtol=1e-6, atol=0)
    assert torch.isfinite(sinkhorn_plan(torch.zeros(2, 4, 4), 1.0)).all()              # identical cells


def test_coupling_draws_pairs_by_the_plan():
    torch.manual_seed(0)
    x0, x1 = randn(1, 3, 2), randn(1, 3, 2)
    plan = sinkhorn_plan(torch.cdist(x0, x1).square().float(), 0.3)[0]
    a, b = couple(x0.expand(4000, -1, -1), x1.expand(4000, -1, -1), 0.3)
    seen = torch.zeros(3, 3)
    for i in range(3):
        for j in range(3):
            seen[i, j] = ((a == x0[0, i]).all(1) & (b == x1[0, j]).all(1)).float().mean()
    torch.testing.assert_close(seen, plan, atol=0.015, rtol=0)


# ------------------------------------------------------------------------------------------------ space and condition

@pytest.fixture(scope="module")
def dataset(demo):
    return data.load(demo, tiny(), "additive")


@pytest.fixture(scope="module")
def types(tmp_path_factory):
    """A data set of two cell types."""
    file = tmp_path_factory.mktemp("types") / "types.h5ad"
    data.simulate(file, cells=600, genes=40, cell_types=2)
    return data.load(str(file), tiny(covariates="cell_type"), "transfer")


def fitted(dataset, **options):
    space = Space(tiny(**options), dataset.panel())
    space.fit(dataset)
    return space


def test_pca_keeps_what_it_spans_and_matches_the_noise(dataset):
    x, none = torch.from_numpy(dataset.X[:50].toarray()), torch.zeros(1, 40)
    whole = fitted(dataset, space="pca", pcs=40)
    torch.testing.assert_close(whole.decode(whole.encode(x, none), none), x, rtol=1e-4, atol=1e-4)
    space = fitted(dataset, space="pca", pcs=7)
    z = randn(5, 7).float()
    torch.testing.assert_close(space.encode(space.decode(z, none), none), z, rtol=1e-4, atol=1e-4)
    error = space.decode(space.encode(x, none), none) - x
    torch.testing.assert_close(error @ space.loadings, torch.zeros(50, 7), rtol=0, atol=1e-3)        # a projection
    z = space.encode(torch.from_numpy(dataset.X[dataset.fit_rows].toarray()), none)
    assert z.var(0, correction=0).mean() == pytest.approx(1, rel=1e-3) and z.mean(0).abs().max() < 1e-3
    assert (z.var(0).diff() < 0).all()


@pytest.mark.parametrize("options", [{"space": "pca", "pcs": 5}, {"standardise": True}])
def test_space_does_not_see_test_cells(options, dataset, demo):
    other = data.load(demo, tiny(), "additive")
    test = np.concatenate([other.rows[g] for g in other.part("test")])
    row = np.repeat(np.arange(other.X.shape[0]), np.diff(other.X.indptr))
    other.X.data[:] = np.where(np.isin(row, test), 9, other.X.data)
    states = [fitted(d, **options).state_dict() for d in (dataset, other)]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_standardising_centres_each_covariate_on_its_controls(types):
    space = fitted(types, standardise=True)
    for i, covariate in enumerate(space.covariates):
        control = torch.from_numpy(types.controls("train")[covariate])
        profile = space.profiles[i][None]
        z = space.encode(control, profile)
        assert z.mean(0).abs().max() < 1e-4
        torch.testing.assert_close(space.decode(z, profile), control, rtol=1e-4, atol=1e-4)
    x = torch.from_numpy(types.X[types.fit_rows].toarray())
    torch.testing.assert_close((x / space.scale).std(0), torch.ones(40), rtol=1e-2, atol=0)
    distance = (space.profiles[0] - space.profiles[1]).norm()            # the only one, so the median
    assert distance > 0.5 and torch.allclose(space.unit, distance)


def test_a_covariate_without_perturbed_cells_is_a_mixture_of_its_neighbours():
    space = Space(tiny(**OURS), a_panel(6, cell_type=["a", "b", "c", "d"]))
    space.profiles[:, 0] = torch.tensor([0.0, 4.0, 1.0, 9.0])
    space.trained[:] = torch.tensor([True, True, False, True])
    space.unit.fill_(5)                                                  # the median of their distances 4, 5 and 9
    for i in (0, 1, 3):
        assert torch.equal(space.similarity(space.profiles[[i]]), torch.eye(4)[i])
    weight = torch.exp(-4 * torch.tensor([1.0, 9.0, 64.0]) / 25)
    torch.testing.assert_close(space.similarity(space.profiles[[2]])[[0, 1, 3]], weight / weight.sum())
    assert space.similarity(space.profiles[[2]])[2] == 0
    new = space.similarity(torch.full((1, 6), 0.1))                      # of a covariate that training never saw
    assert new.argmax() == 0 and new.max() < 1 and new.sum() == pytest.approx(1)


def test_condition_is_multi_hot_and_control_is_empty():
    panel = a_panel(6, cell_type=["x", "y"], donor=["1;2", "3"])
    model = build(tiny(), panel)

    def vector(group):
        return condition_vector(group, model, panel, torch.zeros(1, 6)).tolist()
    assert vector("A+C@y,1;2") == [1, 0, 1, 0, 1, 1, 0]
    assert vector("control@x,3") == [0, 0, 0, 1, 0, 0, 1]
    with pytest.raises(data.DataError, match="'z' is no cell_type of the training file; it has x, y"):
        vector("A@z,3")
    model, panel = build(tiny(), a_panel(6)), a_panel(6)
    assert vector("B") == [0, 1, 0]
    panel = a_panel(6, cell_type=["x", "y"])
    model = build(tiny(**OURS), panel).float()
    assert condition_vector("B@y", model, panel, model.space.profiles[1:]).tolist() == [0, 1, 0, 0, 1]


def test_effect_readout_starts_at_zero_and_adds_to_every_gene():
    model = PRiMeFlow(tiny(effect_readout=True), a_panel())
    x, t, c = torch.randn(3, 20), torch.rand(3), torch.eye(3)
    drop = torch.tensor([False, False, True])
    before = model(x, t, c, drop)
    assert not before.any()                                         # as the U-Net's head starts at zero too
    torch.nn.init.normal_(model.effect.weight)
    after = model.effect.weight.T.detach().clone()
    after[2] = 0                                                    # the null condition has no effect
    torch.testing.assert_close(model(x, t, c, drop), after, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ sampling

@pytest.mark.parametrize("velocity, readout", [("unet", False), ("mlp", True)])
@pytest.mark.parametrize("w, ode", [(0.0, "euler"), (1.0, "euler"), (3.0, "euler"), (3.0, "midpoint")])
def test_guided_sampling_equals_the_plain_loop(velocity, readout, w, ode):
    config = tiny(velocity=velocity, effect_readout=readout, ode=ode)
    model, x, c = build(config, a_panel(18)), randn(6, 18), torch.tensor([1.0, 0, 1]).double()
    shapes = set()

    def seen(x, row):
        shapes.add((*x.shape, *row.shape))
        return model.net(x, row)
    got = sample(seen, model, x, c, w, config)
    assert len(shapes) == 1                                         # one shape to compile, with guidance too
    y, rows = x, c.expand(6, -1)

    def guided(y, t):
        t = torch.full((6,), t, dtype=torch.float64)
        v, null = (model(y, t, rows, torch.full((6,), drop)) for drop in (False, True))
        return null + w * (v - null)
    with torch.no_grad():
        for i in range(5):
            v = guided(y, i / 5)
            if ode == "midpoint":
                v = guided(y + v / 10, i / 5 + 0.1)
            y = y + v / 5
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)        # the velocity is float32
    one = sample(model.net.forward, model, x, c, 1.0, config)
    assert torch.allclose(got, one, atol=1e-5) == (w == 1)


@pytest.mark.parametrize("coupling", ["independent", "control"])
def test_predictions_depend_on_neither_chunks_nor_columns(coupling, monkeypatch):
    panel, control = a_panel(18), np.random.default_rng(0).random((7, 18)).astype(np.float32)
    run = primeflow.Run(tiny(coupling=coupling, device="cpu", zeros="clamp"))
    run.panel = panel
    model = build(run.config, panel).float()

    def cells(control, columns=np.arange(18), **options):
        return primeflow.predict(run, model, {"A+B": 7}, {"": control}, columns, **options)["A+B"]
    every = cells(control)
    assert every.shape == (7, 18)
    columns = np.array([2, 9, 17])
    np.testing.assert_array_equal(cells(control, columns), every[:, columns])
    assert np.abs(cells(control, guidance=3.0) - every).max() > 1e-3
    assert np.array_equal(cells(control + 1), every) == (coupling == "independent")    # controls are no source then
    monkeypatch.setattr(data, "cells_at_once", lambda device, size: 3)
    np.testing.assert_allclose(cells(control), every, rtol=1e-3, atol=1e-4)


def test_own_controls_of_a_covariate_not_seen_are_its_origin(types):
    """Standardised, a zero velocity gives the control cells back, of whatever cell type."""
    panel = types.panel()
    run = primeflow.Run(tiny(coupling="control", device="cpu", **OURS))
    run.panel = panel
    model = PRiMeFlow(run.config, panel)
    model.space.fit(types)
    control = 5 + np.random.default_rng(0).random((9, 40)).astype(np.float32)
    told = primeflow.told_of(model, run, "TF1@type9", torch.from_numpy(control))
    with torch.no_grad():                                           # the U-Net's head and the readout start at zero
        got = primeflow.generate(model, run, told, torch.from_numpy(control), None, np.arange(40))
    np.testing.assert_allclose(got, control, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ learning

def test_flow_learns_both_modes_of_a_conditional_distribution():
    """Two conditions of two modes each; a regression on the mean would answer their middle, where no cells are."""
    torch.manual_seed(0)
    G, B, steps = 16, 64, 200
    config = tiny(ode_steps=20, multipliers=(1,), groups=2, value_scale=2.0)
    model = PRiMeFlow(config, a_panel(G, ("A", "B")))
    torch.nn.init.normal_(model.net.identity)                       # so few steps have no time to tell the genes apart
    axis = 2.0 * (torch.arange(G) % 3 == 0)                         # what mode 1 adds to mode 0
    base = torch.tensor([0.0, 1.5])[:, None]                        # of the two conditions
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        condition, mode = torch.randint(2, (B,)), torch.randint(2, (B, 1))
        x1, c = base[condition] + mode * axis + 0.2 * torch.randn(B, G), F.one_hot(condition, 2).float()
        loss = flow_loss(model, torch.randn(B, G), x1, torch.rand(B), c, torch.rand(B) < 0.1, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for condition in (0, 1):
        c = F.one_hot(torch.tensor(condition), 2).float()
        got = sample(model.net.forward, model.eval(), torch.randn(400, G), c, 1.0, config)
        where = (got - base[condition]) @ axis / axis.square().sum()               # 0 in one mode, 1 in the other
        mode = where > 0.5
        assert 0.3 < mode.float().mean() < 0.7 and ((where - 0.5).abs() < 0.2).float().mean() < 0.15  # a mean: 1
        for m in (False, True):
            torch.testing.assert_close(got[mode == m].mean(0), base[condition] + m * axis, rtol=0, atol=0.5)


def ok(done):
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def spy(monkeypatch):
    """Arguments of every call of flow_loss in training."""
    seen, original = [], primeflow.flow_loss

    def record(*arguments):
        seen.append(arguments)
        return original(*arguments)
    monkeypatch.setattr(primeflow, "flow_loss", record)
    return seen


def test_a_step_descends_the_mean_loss_of_its_passes(demo, call, tmp_path, spy, monkeypatch):
    """One step of plain gradient descent in place of Adam's shows the gradient; the passes have cells of their own."""
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, **_: torch.optim.SGD(p, lr=1.0))
    ok(call("primeflow.py", "--data", demo, *TINY["primeflow"], *AS_PAPER, "--steps", 1, "--accumulate", 3, "--clip", 0,
            "--warmup", 0, "--dropout", 0, "--seed", 4, "--out", tmp_path / "run"))
    assert len(spy) == 3 and not torch.equal(spy[0][2], spy[1][2]) and not torch.equal(spy[0][3], spy[1][3])
    after, config = spy[0][0], spy[0][-1]
    torch.manual_seed(4)
    before = PRiMeFlow(config, data.load(demo, config, "additive").panel())
    (sum(flow_loss(before, *rest) for _, *rest in spy) / 3).backward()
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        torch.testing.assert_close(p - p.grad, q, rtol=1e-4, atol=1e-6, msg=name)


def test_a_gradient_is_clipped_to_its_norm(demo, call, tmp_path, spy, monkeypatch):
    """A step of plain gradient descent with rate 1 moves the weights by the norm of the gradient."""
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, **_: torch.optim.SGD(p, lr=1.0))
    ok(call("primeflow.py", "--data", demo, *TINY["primeflow"], *AS_PAPER, "--steps", 1, "--clip", 0.01, "--warmup", 0,
            "--seed", 4, "--out", tmp_path / "run"))
    after, config = spy[0][0], spy[0][-1]
    torch.manual_seed(4)
    before = PRiMeFlow(config, data.load(demo, config, "additive").panel())
    moved = [(p - q).norm() for p, q in zip(before.parameters(), after.parameters())]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("cosine", [True, False])
def test_learning_rate_of_every_step(cosine, demo, call, tmp_path, monkeypatch):
    rates, finish = [], primeflow.Run.finish

    def record(run, step, parts, **losses):
        rates.append(parts["optimizer"].param_groups[0]["lr"])           # of the step to come
        finish(run, step, parts, **losses)
    monkeypatch.setattr(primeflow.Run, "finish", record)
    ok(call("primeflow.py", "--data", demo, *TINY["primeflow"], "--steps", 6, "--warmup", 3, "--lr", 1e-3,
            "--cosine" if cosine else "--no-cosine", "--out", tmp_path / "run"))
    warm = np.array([2, 3, 4, 4, 4, 4]) / 4e3
    fall = 0.5 + 0.5 * np.cos(np.pi * np.arange(1, 7) / 6) if cosine else 1
    np.testing.assert_allclose(rates, warm * fall, atol=1e-12)


def test_cells_of_a_batch_and_their_sources(demo, call, tmp_path, spy):
    """Cells are drawn uniformly, controls among them: an eleventh of this file. Where control cells are the source they
    are no targets."""
    real = data.load(demo, tiny(), "additive")
    cells = {row.tobytes(): g for g, rows in real.rows.items() for row in real.X[rows].toarray()}
    flags = ["--data", demo, *TINY["primeflow"], *AS_PAPER, "--batch-size", 64, "--steps", 20]
    for name in ("independent", "control", "ot"):
        ok(call("primeflow.py", *flags, "--coupling", name, "--out", tmp_path / name))
    train, names = set(real.part("train")), real.panel().perturbations
    for i, (_, x0, x1, _, c, _, _) in enumerate(spy):
        groups = [cells[row.tobytes()] for row in x1.numpy()]
        assert set(groups) <= train | {"control"}
        hot = [[float(name in group.split("+")) for name in names] for group in groups]
        assert torch.equal(c, torch.tensor(hot))
        if i >= 20:
            assert "control" not in groups and {cells[row.tobytes()] for row in x0.numpy()} == {"control"}
    targets, share = torch.cat([c for _, _, _, _, c, _, _ in spy[:20]]), len(real.rows["control"]) / len(real.fit_rows)
    assert (targets.sum(1) == 0).float().mean() == pytest.approx(share, abs=0.025) and share > 0.1
    assert abs(torch.cat([x0 for _, x0, *_ in spy[:20]]).std() - 1) < 0.01
    assert torch.cat([drop for *_, drop, _ in spy]).float().mean().item() == pytest.approx(0.2, abs=0.03)   # --p-null


@pytest.mark.parametrize("flags", [
    [*AS_PAPER, "--velocity", "unet", "--dtype", "bf16", "--coupling", "ot", "--ot-cells", "8"],
    [*AS_PAPER, "--space", "pca", "--pcs", "8", "--path", "trigonometric", "--coupling", "independent"]])
def test_ablations_run_and_report_both_guidance_weights(flags, demo, call, tmp_path):
    out = ok(call("primeflow.py", "--data", demo, *TINY["primeflow"], "--steps", "3", "--guidance", "1", "3", "1",
                  *flags, "--out", tmp_path / "run"))
    assert "primeflow w=3" in out and "primeflow w=1" not in out


def test_just_as_many_cells_as_the_paper_generates(demo, call, tmp_path):
    """P: 1,000 of every condition, however few were measured (here a dozen)."""
    flags = ["--data", demo, *TINY["primeflow"], "--steps", 1, "--eval-cells", 30, "--out", tmp_path / "run"]
    ok(call("primeflow.py", *flags, "--exact-cells"))
    info = json.loads((tmp_path / "run" / "metrics.json").read_text())["info"]
    conditions = len(data.load(demo, tiny(), "additive").part("test"))
    assert info["cells_pred"] == 30 * conditions > 2 * info["cells_real"]


@pytest.mark.parametrize("flags, words", [
    (["--multipliers", "0"], "--multipliers"), (["--width", "15"], "--width 15"), (["--heads", "3"], "--heads 3"),
    (["--groups", "5"], "--groups 5"), (["--mlp-layers", "1", "2"], "four"), (["--value-scale", "0"], "--value-scale"),
    (["--coupling", "ot", "--ot-cells", "5"], "--batch-size 16"), (["--ode-steps", "0"], "--ode-steps"),
    (["--p-null", "0", "--guidance", "1", "3"], "--guidance 1.0 3.0"), (["--ema", "1"], "--ema")])
def test_flags_that_cannot_work(flags, words, demo, call, tmp_path):
    done = call("primeflow.py", "--data", demo, *TINY["primeflow"], "--velocity", "unet", "--steps", "1", *flags,
                "--out", tmp_path / "run")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "run").exists()
