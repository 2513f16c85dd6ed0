"""primeflow.py: the mathematics of its parts, against guided-diffusion's outputs at hand or slow plain formulas."""
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import data
import primeflow
from conftest import ROOT, SHARED, TINY
from primeflow import Config, PRiMeFlow, UNet, UNetVelocity, condition_vector, couple, flow_loss, path, sample, sinkhorn_plan

COMPONENTS = SHARED / "oracle" / "components.npz"
needs_oracle = pytest.mark.skipif(not COMPONENTS.exists(), reason="the reference values are not at hand")


def tiny(**options):
    return Config(**{**primeflow.PRESETS["demo"], "width": 16, "groups": 4, "heads": 2, "multipliers": (1, 2, 2), "hidden": 24, "ode_steps": 5,
                     "split": "additive", **options})


def a_panel(genes=20, perturbations=("A", "B", "C"), **covariates):
    return data.Panel([f"g{i}" for i in range(genes)], list(range(genes)), list(perturbations), [-1] * len(perturbations),
                      list(perturbations), covariates)


def build(config, panel, seed=0):
    """A model in float64 whose zero-initialised parts are random, so that every path matters."""
    torch.manual_seed(seed)
    model = PRiMeFlow(config, panel).double().eval()
    for p in model.parameters():
        if not p.detach().any():
            torch.nn.init.normal_(p, std=0.3)
    return model


def count(module):
    return sum(p.numel() for p in module.parameters())


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ U-Net

def load_official(unet, w):
    """guided-diffusion's weights, by their names there, into our U-Net. K's bias, which a softmax cancels, is dropped."""
    def conv(ours, name):
        ours.weight.copy_(w[f"{name}.weight"])
        ours.bias.copy_(w[f"{name}.bias"])

    def block(ours, name):
        conv(ours.norm_in, f"{name}.0.in_layers.0")
        conv(ours.conv_in, f"{name}.0.in_layers.2")
        film.append((w[f"{name}.0.emb_layers.1.weight"], w[f"{name}.0.emb_layers.1.bias"]))
        conv(ours.norm_out, f"{name}.0.out_layers.0")
        conv(ours.conv_out, f"{name}.0.out_layers.3")
        if f"{name}.0.skip_connection.weight" in w:
            conv(ours.skip, f"{name}.0.skip_connection")
        if f"{name}.1.qkv.weight" in w:
            attention(ours.attention, f"{name}.1")

    def attention(ours, name):
        conv(ours.norm, f"{name}.norm")
        weight, bias = (w[f"{name}.qkv.{k}"].unflatten(0, (ours.heads, 3, -1)) for k in ("weight", "bias"))
        ours.k.weight.copy_(weight[:, 1].flatten(0, 1))
        ours.qv.weight.copy_(torch.cat([weight[:, i].flatten(0, 1) for i in (0, 2)]))
        ours.qv.bias.copy_(torch.cat([bias[:, i].flatten() for i in (0, 2)]))
        conv(ours.out, f"{name}.proj_out")

    film, position = [], 0
    with torch.no_grad():
        conv(unet.stem, "input_blocks.0.0")
        for i, m in enumerate(unet.down, 1):
            block(m, f"input_blocks.{i}") if isinstance(m, primeflow.ResBlock) else conv(m, f"input_blocks.{i}.0.op")
        middle = {f"middle.0.{k[15:]}": v for k, v in w.items() if k.startswith("middle_block.0.")}
        middle |= {f"middle.1.{k[15:]}": v for k, v in w.items() if k.startswith("middle_block.1.")}
        middle |= {f"last.0.{k[15:]}": v for k, v in w.items() if k.startswith("middle_block.2.")}
        w = w | middle
        block(unet.middle[0], "middle")
        block(unet.middle[1], "last")
        for m in unet.up:
            if isinstance(m, primeflow.ResBlock):
                block(m, f"output_blocks.{position}")
                position += 1
            else:
                last = f"output_blocks.{position - 1}"
                conv(m, f"{last}.2.conv" if f"{last}.2.conv.weight" in w else f"{last}.1.conv")
        conv(unet.norm, "out.0")
        conv(unet.head, "out.2")
        unet.film.weight.copy_(torch.cat([a for a, _ in film]))
        unet.film.bias.copy_(torch.cat([b for _, b in film]))


@needs_oracle
def test_unet_equals_guided_diffusion():
    z = np.load(COMPONENTS)
    w = {k[7:]: torch.from_numpy(z[k]).double() for k in z.files if k.startswith("unet/w/")}
    unet = UNet(Config(width=32, heads=4, dropout=0.0)).double().eval()
    load_official(unet, w)
    x, emb, out = (torch.from_numpy(z[f"unet/{k}"]).double() for k in ("x", "emb", "out"))
    got = unet(x, unet.film(F.silu(emb)))
    torch.testing.assert_close(got[:, None], out, rtol=1e-4, atol=1e-5)
    assert out.std() > 0.1
    torch.testing.assert_close(unet(x[:1], unet.film(F.silu(emb[:1]))), got[:1])       # cells do not see each other


@needs_oracle
@pytest.mark.parametrize("name, multipliers, width", [("A256", (1, 2, 2, 4, 4), 256), ("B256", (1, 1, 2, 2, 4), 256), ("A32", (1, 2, 2, 4, 4), 32)])
def test_parameter_counts_are_guided_diffusions(name, multipliers, width):
    """Its count includes its time MLP; ours lacks the biases of six K, which a softmax cancels."""
    with torch.device("meta"):
        unet, time = UNet(Config(width=width, multipliers=multipliers)), primeflow.mlp([width, 4 * width, 4 * width])
    assert count(unet) + count(time) + 6 * width * multipliers[-1] == int(np.load(COMPONENTS)[f"unet/params_{name}"])


def test_residual_block_and_attention_equal_their_formulas():
    torch.manual_seed(0)
    block = primeflow.ResBlock(8, 16, tiny(), attention=True).double().eval()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, film = randn(3, 8, 6), randn(3, 32)
    h = F.conv1d(F.silu(F.group_norm(x, 4, block.norm_in.weight, block.norm_in.bias)), block.conv_in.weight, block.conv_in.bias, padding=1)
    h = F.group_norm(h, 4, block.norm_out.weight, block.norm_out.bias) * (1 + film[:, :16, None]) + film[:, 16:, None]
    h = F.conv1d(F.silu(h), block.conv_out.weight, block.conv_out.bias, padding=1) + F.conv1d(x, block.skip.weight, block.skip.bias)
    a, y = block.attention, F.group_norm(h, 4, block.attention.norm.weight, block.attention.norm.bias)
    q, v = F.conv1d(y, a.qv.weight, a.qv.bias).chunk(2, dim=1)
    k, heads = F.conv1d(y, a.k.weight), []
    for i in (slice(0, 8), slice(8, 16)):
        maps = torch.softmax(q[:, i].transpose(1, 2) @ k[:, i] / math.sqrt(8), dim=-1)     # (B, L, L)
        heads.append(v[:, i] @ maps.transpose(1, 2))
    expected = h + F.conv1d(torch.cat(heads, dim=1), a.out.weight, a.out.bias)
    torch.testing.assert_close(block(x, film), expected)


@pytest.mark.parametrize("genes, padding", [(17, 3), (20, 0), (23, 1), (5, 3)])
def test_padding_is_constant_and_gets_no_gradient(genes, padding):
    """Three levels: the gene axis is padded to a multiple of four."""
    model = build(tiny(), a_panel(genes))
    net, seen = model.net, []
    assert net.pad == padding
    x, t, c = randn(3, genes), torch.rand(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    embedded = net.embed(x)
    assert embedded.shape == (3, 16, genes + padding)
    if padding:
        at_rest = net.embed(torch.full((1, genes), 7.0, dtype=torch.float64))[:, :, genes:]
        torch.testing.assert_close(embedded[:, :, genes:], at_rest.expand(3, -1, -1))
        torch.testing.assert_close(at_rest[0], at_rest[0, :, :1].expand(-1, padding))      # one shared identity

    def keep(module, args, out):
        out.retain_grad()
        seen.append(out)
    net.unet.register_forward_hook(keep)
    loss = flow_loss(model, x, randn(3, genes), t, c, torch.zeros(3, dtype=torch.bool), None, tiny())
    loss.backward()
    assert seen[0].shape == (3, genes + padding)
    assert (seen[0].grad[:, :genes] != 0).all() and not seen[0].grad[:, genes:].any()


def test_a_gene_is_known_by_its_identity():
    """Equal values everywhere: without identities, genes far from the borders would all get the same velocity."""
    model = build(tiny(), a_panel(64))
    film = model.net.conditioning(model.time_embedding(torch.tensor([0.5], dtype=torch.float64)), model.null[None])
    x = torch.ones(1, 64, dtype=torch.float64)
    assert model.net(x, film)[0].unique().numel() == 64


def test_swapping_genes_permutes_the_mlp_and_changes_the_unet():
    """Order is arbitrary to the MLP. It matters to a convolution, so it is frozen with the checkpoint."""
    order = torch.arange(20)
    order[[3, 11]] = order[[11, 3]]
    x = randn(4, 20)
    for velocity in ("mlp", "unet"):
        model = build(tiny(velocity=velocity), a_panel(20))
        row = model.net.conditioning(model.time_embedding(torch.tensor([0.5], dtype=torch.float64)), model.null[None])
        before = model.net(x, row)[:, order]
        with torch.no_grad():
            if velocity == "mlp":
                first, last = model.net.value[0], model.net.decoder[-1][-1]
                first.weight.copy_(first.weight[:, order].clone())
                last.weight.copy_(last.weight[order].clone())
                last.bias.copy_(last.bias[order].clone())
            else:
                model.net.identity.copy_(model.net.identity[:, order].clone())
        after = model.net(x[:, order], row)
        assert torch.allclose(before, after, atol=1e-6) == (velocity == "mlp")


@pytest.mark.parametrize("velocity", ["unet", "mlp"])
def test_every_parameter_learns(velocity):
    """No parameter whose gradient is zero: under Adam its noise would differ between processes."""
    panel, config = a_panel(18, cell_type=["x", "y"]), tiny(velocity=velocity)
    model = build(config, panel)
    c = torch.stack([condition_vector(g, panel) for g in ("A@x", "control@y", "B+C@x", "C@y")]).double()
    drop = torch.tensor([False, False, True, False])
    flow_loss(model, randn(4, 18), randn(4, 18), torch.rand(4, dtype=torch.float64), c, drop, None, config).backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().max() > 1e-9, name


def test_recomputing_activations_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = build(tiny(recompute=recompute, dropout=0.3), a_panel()).train()
        torch.manual_seed(1)
        flow_loss(model, randn(4, 20), randn(4, 20), torch.rand(4).double(), torch.zeros(4, 3).double(), torch.zeros(4, dtype=torch.bool), None,
                  tiny()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ path and loss

@pytest.mark.parametrize("kind", ["linear", "trigonometric"])
def test_velocity_is_the_derivative_of_the_path(kind):
    t = torch.rand(9, dtype=torch.float64, requires_grad=True)
    x0, x1 = randn(9), randn(9)
    a, b, da, db = path(t, kind)
    (derivative,) = torch.autograd.grad((a * x0 + b * x1).sum(), t)
    torch.testing.assert_close(derivative, (da * x0 + db * x1).detach())
    for end, expected in ((0.0, x0), (1.0, x1)):
        a, b, _, _ = path(torch.full((9,), end, dtype=torch.float64), kind)
        torch.testing.assert_close(a * x0 + b * x1, expected)


@pytest.mark.parametrize("kind", ["linear", "trigonometric"])
def test_loss_of_the_true_velocity_is_zero_and_of_none_is_its_square(kind):
    config, x0, x1, t = tiny(path=kind, sigma=0.5), randn(5, 7), randn(5, 7), torch.rand(5, dtype=torch.float64)
    _, _, da, db = path(t[:, None], kind)
    u, eps, seen = da * x0 + db * x1, randn(5, 7), []
    assert flow_loss(lambda x, *_: u, x0, x1, t, None, None, None, config) == 0
    got = flow_loss(lambda x, *_: (seen.append(x), 0 * x)[1], x0, x1, t, None, None, eps, config)
    torch.testing.assert_close(got, u.square().mean())
    a, b, _, _ = path(t[:, None], kind)
    torch.testing.assert_close(seen[0], a * x0 + b * x1 + 0.5 * eps)


def test_gaussian_reference_is_the_least_loss():
    s, one = torch.tensor([0.3, 0.7, 1.0, 2.0]), torch.ones(4)
    assert primeflow.gaussian_reference(one, s, tiny()) == pytest.approx(math.pi / 2, rel=1e-5)          # mean of s is 1
    assert primeflow.gaussian_reference(one, s, tiny(path="trigonometric")) == pytest.approx(math.pi ** 2 / 4, rel=1e-5)
    torch.manual_seed(0)                # regression of the velocity on x_t, time by time, on many samples
    s0, s1, sigma, residual = 0.8, 1.7, 0.4, []
    for t in (torch.arange(50, dtype=torch.float64) + 0.5) / 50:
        x0, x1 = s0 * randn(20000), s1 * randn(20000)
        a, b, da, db = path(t, "linear")
        x_t, u = a * x0 + b * x1 + sigma * randn(20000), da * x0 + db * x1
        residual.append((u - (u @ x_t) / (x_t @ x_t) * x_t).square().mean())
    got = primeflow.gaussian_reference(torch.tensor([s0]), torch.tensor([s1]), tiny(sigma=sigma))
    assert got == pytest.approx(float(sum(residual) / 50), rel=0.01)


# ------------------------------------------------------------------------------------------------ optimal transport

def test_transport_plan_has_its_marginals_and_is_independent_at_large_epsilon():
    torch.manual_seed(0)
    cost = torch.cdist(randn(3, 12, 4), randn(3, 12, 4) + 1).square()
    for epsilon in (0.05, 1.0):
        plan = sinkhorn_plan(cost, epsilon, iterations=500)
        torch.testing.assert_close(plan.sum(1), torch.full((3, 12), 1 / 12, dtype=torch.float64))
        torch.testing.assert_close(plan.sum(2), torch.full((3, 12), 1 / 12, dtype=torch.float64), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sinkhorn_plan(cost, 1e5), torch.full_like(cost, 1 / 144), rtol=1e-3, atol=0)
    assert sinkhorn_plan(cost, 0.05).max() > 2 / 144                # and not independent at a small one
    default = sinkhorn_plan(cost, 1.0)                              # the fixed number of iterations is enough
    torch.testing.assert_close(default.sum(2), torch.full((3, 12), 1 / 12, dtype=torch.float64), rtol=1e-6, atol=0)


def test_transport_plan_equals_a_plain_loop():
    """Scaling form, one condition at a time, with relaxed marginals."""
    torch.manual_seed(0)
    cost = torch.cdist(randn(2, 7, 3), randn(2, 9, 3)).square()
    for taus in ((1.0, 1.0), (0.9, 0.6)):
        for c, got in zip(cost, sinkhorn_plan(cost, 0.5, *taus)):
            k, u, v = torch.exp(-c / (0.5 * c.mean())), torch.ones(7).double(), torch.ones(9).double()
            for _ in range(300):
                u = ((1 / 7) / (k @ v)) ** taus[0] * (1 / 7) ** (1 - taus[0])
                v = ((1 / 9) / (k.T @ u)) ** taus[1] * (1 / 9) ** (1 - taus[1])
            torch.testing.assert_close(got, u[:, None] * k * v, rtol=1e-5, atol=1e-12)
    assert abs(float(sinkhorn_plan(cost, 0.5, 0.5, 0.5).sum()) - 2) > 0.01      # relaxed: mass is not kept


def test_transport_plan_of_identical_cells_is_finite():
    assert torch.isfinite(sinkhorn_plan(torch.zeros(2, 4, 4), 1.0)).all()


def test_coupling_pairs_the_closest_cells_of_each_condition():
    torch.manual_seed(0)
    config, x1 = tiny(ot_epsilon=1e-3), randn(2, 6, 3) * 3
    x0 = x1[:, torch.randperm(6)] + 0.01 * randn(2, 6, 3)
    best = [linear_sum_assignment(torch.cdist(a, b).square().numpy())[1] for a, b in zip(x0, x1)]
    assert any((b != np.arange(6)).any() for b in best)
    a, b = couple(x0, x1, torch.rand(2, 6), config)
    assert a.shape == b.shape == (12, 3)
    assert (a - b).norm(dim=1).max() < 0.2 < torch.cdist(x1[0], x1[0])[~torch.eye(6, dtype=bool)].min()
    ones = torch.arange(2.0)[:, None, None].expand(2, 6, 3)         # conditions are not mixed, whatever u
    a, b = couple(ones, ones, torch.tensor([[0.0] * 3 + [1.0] * 3] * 2), config)
    assert torch.equal(a, ones.flatten(0, 1)) and torch.equal(b, a)


def test_coupling_draws_pairs_by_the_plan():
    torch.manual_seed(0)
    x0, x1 = randn(1, 3, 2), randn(1, 3, 2)
    plan = sinkhorn_plan(torch.cdist(x0, x1).square().float(), 0.3)[0]
    u = torch.rand(4000, 3)
    a, b = couple(x0.expand(4000, -1, -1), x1.expand(4000, -1, -1), u, tiny(ot_epsilon=0.3))
    seen = torch.zeros(3, 3)
    for i in range(3):
        for j in range(3):
            seen[i, j] = ((a == x0[0, i]).all(1) & (b == x1[0, j]).all(1)).float().mean()
    torch.testing.assert_close(seen, plan, atol=0.015, rtol=0)


# ------------------------------------------------------------------------------------------------ space and condition

@pytest.fixture(scope="module")
def dataset(demo):
    return data.load(demo, tiny(), "additive")


def test_pca_keeps_what_it_spans_and_matches_the_noise(dataset):
    panel, x = dataset.panel(), torch.from_numpy(dataset.X[:50].toarray())
    whole = primeflow.Space(tiny(space="pca", pcs=len(panel.genes)), panel)
    whole.fit(dataset)
    torch.testing.assert_close(whole.decode(whole.encode(x)), x, rtol=1e-4, atol=1e-4)
    space = primeflow.Space(tiny(space="pca", pcs=7), panel)
    space.fit(dataset)
    z = randn(5, 7).float()
    torch.testing.assert_close(space.encode(space.decode(z)), z, rtol=1e-4, atol=1e-4)
    error = space.decode(space.encode(x)) - x
    torch.testing.assert_close(error @ space.loadings, torch.zeros(50, 7), rtol=0, atol=1e-3)        # a projection
    z = space.encode(torch.from_numpy(dataset.X[dataset.fit_rows].toarray()))
    assert z.var(0, correction=0).mean() == pytest.approx(1, rel=1e-3) and z.mean(0).abs().max() < 1e-3
    assert (z.var(0).diff() < 0).all()


def test_pca_does_not_see_test_cells(dataset, demo):
    other = data.load(demo, tiny(), "additive")
    test = np.concatenate([other.rows[g] for g in other.part("test")])
    other.X.data[:] = np.where(np.isin(np.repeat(np.arange(other.X.shape[0]), np.diff(other.X.indptr)), test), 9, other.X.data)
    spaces = [primeflow.Space(tiny(space="pca", pcs=5), d.panel()) for d in (dataset, other)]
    for space, d in zip(spaces, (dataset, other)):
        space.fit(d)
    assert torch.equal(spaces[0].loadings, spaces[1].loadings) and torch.equal(spaces[0].scale, spaces[1].scale)


def test_condition_is_multi_hot_and_control_is_empty():
    panel = a_panel(6, cell_type=["x", "y"], donor=["1,2", "3"])
    assert condition_vector("A+C@y,1,2", panel).tolist() == [1, 0, 1, 0, 1, 1, 0]
    assert condition_vector("control@x,3", panel).tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert condition_vector("B", a_panel(6)).tolist() == [0, 1, 0]
    with pytest.raises(data.DataError, match="'z' is no cell_type of the training file; it has x, y"):
        condition_vector("A@z,3", panel)


def test_null_condition_is_not_control():
    panel = a_panel(20, cell_type=["x", "y"])
    for velocity in ("unet", "mlp"):
        model = build(tiny(velocity=velocity), panel)
        x, t, control = randn(2, 20), torch.rand(2).double(), condition_vector("control@x", panel).double().expand(2, -1)
        kept, dropped = (model(x, t, control, torch.full((2,), drop)) for drop in (False, True))
        assert (kept - dropped).abs().min() > 1e-6
        other = condition_vector("A@y", panel).double().expand(2, -1)          # the null hides the covariates too
        assert torch.equal(dropped, model(x, t, other, torch.full((2,), True)))


# ------------------------------------------------------------------------------------------------ sampling

@pytest.mark.parametrize("velocity", ["unet", "mlp"])
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_guided_sampling_equals_the_plain_loop(velocity, w):
    config = tiny(velocity=velocity)
    model, x, c = build(config, a_panel(18)), randn(6, 18), torch.tensor([1.0, 0, 1]).double()
    sizes = []
    got = sample(model, x, c, w, config, lambda x, row: (sizes.append(len(x)), model.net(x, row))[1])
    assert sizes == [6 if w == 1 else 12] * 5                       # one evaluation at w = 1, two in one batch else
    y, rows = x, c.expand(6, -1)
    with torch.no_grad():
        for i in range(5):
            t = torch.full((6,), i / 5, dtype=torch.float64)
            v, null = (model(y, t, rows, torch.full((6,), drop)) for drop in (False, True))
            y = y + (null + w * (v - null)) / 5
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)        # the velocity is float32
    one = sample(model, x, c, 1.0, config)
    assert torch.allclose(got, one, atol=1e-5) == (w == 1)


class OneRun:
    """What generate() needs of a run."""
    def __init__(self, config, panel):
        self.config, self.panel, self.device, self.bf16 = config, panel, torch.device("cpu"), False

    def compiled(self, function):
        return function


@pytest.mark.parametrize("coupling", ["independent", "ot"])
def test_predictions_depend_on_neither_chunks_nor_columns(coupling, monkeypatch):
    panel, control = a_panel(18), np.random.default_rng(0).random((7, 18)).astype(np.float32)
    run = OneRun(tiny(coupling=coupling), panel)
    model = build(run.config, panel).float()
    torch.nn.init.constant_(model.net.unet.head.bias, -2.0)         # some values would be negative
    every = primeflow.generate(model, run, "A+B", control, np.arange(18), 5)
    assert every.shape == (7, 18) and every.min() == 0              # clamped
    columns = np.array([2, 9, 17])
    np.testing.assert_array_equal(primeflow.generate(model, run, "A+B", control, columns, 5), every[:, columns])
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size, dim=0, split=torch.Tensor.split: split(x, 3 if size == 1000 else size, dim))
    np.testing.assert_allclose(primeflow.generate(model, run, "A+B", control, np.arange(18), 5), every, rtol=1e-3, atol=1e-4)
    run.config.clamp = False
    free = primeflow.generate(model, run, "A+B", control, np.arange(18), 5)
    assert free.min() < 0
    other = primeflow.generate(model, run, "A+B", control + 1, np.arange(18), 5)
    assert np.array_equal(free, other) == (coupling == "independent")          # controls are a source with ot alone


def test_rows_of_the_table_are_the_guidance_weights():
    assert primeflow.variants(Config()) == {"": {"guidance": 1.0}, " w=3": {"guidance": 3.0}, " w=5": {"guidance": 5.0}}
    assert primeflow.variants(tiny(guidance=[2.5])) == {"": {"guidance": 2.5}}


# ------------------------------------------------------------------------------------------------ learning

@pytest.mark.parametrize("velocity, space, steps, lr", [("unet", "genes", 250, 5e-3), ("mlp", "pca", 300, 1e-2)])
def test_flow_learns_both_modes_of_a_conditional_distribution(velocity, space, steps, lr):
    """Two conditions of two modes each; a regression on the mean would answer their middle, where there are no cells."""
    torch.manual_seed(0)
    G, B = 16, 64
    config = tiny(velocity=velocity, space=space, pcs=2, p_null=0.1, ode_steps=20, hidden=64, multipliers=(1,), groups=2, value_scale=2.0)
    model = PRiMeFlow(config, a_panel(G, ("A", "B")))
    if velocity == "unet":
        torch.nn.init.normal_(model.net.identity)                   # so few steps have no time to tell the genes apart
    axis = 2.0 * (torch.arange(G) % 3 == 0)                         # what mode 1 adds to mode 0
    base = torch.tensor([0.0, 1.5])[:, None]                        # of the two conditions

    def cells(condition):
        return base[condition] + torch.randint(2, (len(condition), 1)) * axis + 0.2 * torch.randn(len(condition), G)
    if space == "pca":
        x = cells(torch.arange(2000) % 2)
        model.space.mean.copy_(x.mean(0))
        model.space.loadings.copy_(torch.linalg.svd(x - x.mean(0), full_matrices=False)[2].T[:, :2])
        model.space.scale.copy_(((x - x.mean(0)) @ model.space.loadings).square().mean().sqrt())
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        condition = torch.randint(2, (B,))
        x1 = model.space.encode(cells(condition))
        loss = flow_loss(model, torch.randn_like(x1), x1, torch.rand(B), F.one_hot(condition, 2).float(), torch.rand(B) < 0.1, None, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    for condition in (0, 1):
        c = F.one_hot(torch.tensor(condition), 2).float()
        got = model.space.decode(sample(model.eval(), torch.randn(400, model.space.size), c, 1.0, config))
        where = (got - base[condition]) @ axis / axis.square().sum()               # 0 in one mode, 1 in the other
        mode = where > 0.5
        assert 0.3 < mode.float().mean() < 0.7 and ((where - 0.5).abs() < 0.2).float().mean() < 0.15  # a mean: 1
        for m in (False, True):
            torch.testing.assert_close(got[mode == m].mean(0), base[condition] + m * axis, rtol=0, atol=0.5)


def weights(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["saved"]["model"]


def ok(done):
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


def test_accumulation_equals_one_large_batch(demo, call, tmp_path):
    flags = ["--data", demo, *TINY["primeflow"], "--steps", 12, "--dropout", 0]
    ok(call("primeflow.py", *flags, "--accumulate", 4, "--batch-size", 8, "--out", tmp_path / "four"))
    ok(call("primeflow.py", *flags, "--accumulate", 1, "--batch-size", 32, "--out", tmp_path / "one"))
    ok(call("primeflow.py", *flags, "--accumulate", 1, "--batch-size", 8, "--out", tmp_path / "small"))
    one, four, small = (weights(tmp_path / name) for name in ("one", "four", "small"))
    for k in one:
        torch.testing.assert_close(one[k], four[k], rtol=1e-3, atol=2e-5, msg=k)
    assert max((one[k] - small[k]).abs().max() for k in one) > 1e-3


def test_two_processes_equal_one_with_optimal_transport_and_accumulation(demo, call, tmp_path):
    flags = ["--data", demo, *TINY["primeflow"], "--steps", 6, "--dropout", 0, "--velocity", "mlp", "--space", "pca", "--pcs", 8, "--coupling",
             "ot", "--ot-cells", 8, "--accumulate", 2, "--sigma", 0.1, "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "primeflow.py")]
    done = subprocess.run([*torchrun, *map(str, flags), "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    ok(call("primeflow.py", *flags, "--batch-size", 32, "--out", tmp_path / "one"))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for k in one:
        torch.testing.assert_close(one[k], two[k], rtol=1e-3, atol=2e-5, msg=k)


def test_controls_are_training_targets_with_an_empty_perturbation(demo, call, tmp_path, monkeypatch):
    """Cells are drawn uniformly, controls among them: an eleventh of this file. With --coupling ot they are the source."""
    seen, original = [], primeflow.flow_loss

    def record(net, x0, x1, t, c, *rest):
        seen.append((x0, x1, c))
        return original(net, x0, x1, t, c, *rest)
    monkeypatch.setattr(primeflow, "flow_loss", record)
    real = data.load(demo, tiny(), "additive")
    cells = {row.tobytes(): g for g, rows in real.rows.items() for row in real.X[rows].toarray()}
    flags = ["--data", demo, *TINY["primeflow"], "--velocity", "mlp", "--batch-size", 64]
    ok(call("primeflow.py", *flags, "--out", tmp_path / "a"))
    ok(call("primeflow.py", *flags, "--coupling", "ot", "--out", tmp_path / "b"))
    panel, train = real.panel(), set(real.part("train"))
    for i, (x0, x1, c) in enumerate(seen):
        groups = [cells[row.tobytes()] for row in x1.numpy()]
        assert set(groups) <= train | {"control"}
        assert torch.equal(c, torch.stack([condition_vector(g, panel) for g in groups]))
        if i >= 20:
            assert "control" not in groups and {cells[row.tobytes()] for row in x0.numpy()} == {"control"}
    targets = torch.cat([c for _, _, c in seen[:20]])
    share = len(real.rows["control"]) / len(real.fit_rows)
    assert (targets.sum(1) == 0).float().mean() == pytest.approx(share, abs=0.03) and share > 0.1
    assert abs(torch.cat([x0 for x0, _, _ in seen[:20]]).std() - 1) < 0.01


@pytest.mark.parametrize("flags", [["--velocity", "mlp"], ["--velocity", "mlp", "--space", "pca", "--path", "trigonometric", "--sigma", "0.1"],
                                   ["--velocity", "mlp", "--space", "pca", "--coupling", "ot", "--ot-cells", "8"], ["--coupling", "ot"],
                                   ["--dtype", "bf16", "--recompute", "--dropout", "0.1", "--clip", "0"]])
def test_ablations_run_and_report_both_guidance_weights(flags, demo, call, tmp_path):
    out = ok(call("primeflow.py", "--data", demo, *TINY["primeflow"], "--steps", "5", "--guidance", "1", "3", *flags, "--out", tmp_path / "run"))
    assert "primeflow w=3" in out and out.count("independent Gaussians") == 2


@pytest.mark.parametrize("flags, words", [
    (["--multipliers", "0"], "--multipliers"), (["--width", "15"], "--width 15"), (["--velocity", "mlp", "--width", "15"], "--width 15"), (["--heads", "3"], "--heads 3"), (["--groups", "5"], "--groups 5"),
    (["--mlp-layers", "1", "2"], "four"), (["--coupling", "ot", "--ot-cells", "5"], "--batch-size 16"), (["--ot-tau-a", "2"], "--ot-tau-a"),
    (["--p-null", "0", "--guidance", "1", "3"], "--guidance 1.0 3.0"), (["--ode-steps", "0"], "--ode-steps"), (["--ema", "1"], "--ema"),
    (["--sigma", "-1"], "--sigma"), (["--space", "pca", "--pcs", "30", "--split", "unseen", "--min-cells", "0"], None)])
def test_flags_that_cannot_work(flags, words, demo, call, tmp_path):
    done = call("primeflow.py", "--data", demo, *TINY["primeflow"], "--steps", "1", *flags, "--out", tmp_path / "run")
    if words is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "run").exists()
