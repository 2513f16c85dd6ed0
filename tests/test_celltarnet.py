"""celltarnet.py: the flow is exact, causal and masked as the definition says; contrast, sampling, likelihood."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd.functional import jacobian
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode

import celltarnet as ct
import data
from celltarnet import Config, FlowBlock, attention_mask, gene_prior, info_nce, multi_hot, sample
from conftest import TINY

VARIANTS = [{}, {"patch": 4}, {"patch": 7}, {"prior": "none"}, {"prior": "sparse", "layers": 1},
            {"prior": "low-rank", "patch": 3, "effect_readout": False}]


def tiny(**options):
    sizes = dict(width=16, layers=2, heads=2, blocks=3, patch=1, neighbours=4, rank=4)
    return Config(**{**ct.PRESETS["demo"], **sizes, **options})


@pytest.fixture(scope="module")
def dataset(demo):
    return data.load(demo, tiny(), "additive")


@pytest.fixture(scope="module")
def panel(dataset):
    return dataset.panel()


def build(dataset, panel, config, dtype=torch.float64, scale=0.15, seed=0):
    """A model whose zero-initialised parts are random, so that every path matters."""
    torch.manual_seed(seed)
    model = ct.CellTARNet(config, panel, data.gene_statistics(dataset)).to(dtype).eval().requires_grad_(False)
    for block in model.blocks:
        torch.nn.init.normal_(block.head.weight, std=scale)
        torch.nn.init.normal_(block.head.bias, std=scale)
        torch.nn.init.normal_(block.modulate.weight, std=scale)
    torch.nn.init.normal_(model.own)
    torch.nn.init.normal_(model.effects, std=float(config.effect_readout))
    return model


def contexts(dataset, panel, n, dtype=torch.float64):
    """Control cells (n, G) and codes (n, V) of n training conditions."""
    control = torch.from_numpy(dataset.controls("train")[""][:n]).to(dtype)
    return control, multi_hot(dataset.part("train")[:n], panel).to(dtype)


def cells(dataset, n, dtype=torch.float64):
    x = torch.from_numpy(dataset.X[dataset.fit_rows[-n:]].toarray()).to(dtype)
    return x + 0.1 * torch.randn(x.shape, dtype=dtype)


def fake_run(config, panel):
    return SimpleNamespace(config=config, panel=panel, device=torch.device("cpu"), compiled=lambda f: f, capped=0,
                           autocast=lambda: torch.autocast("cpu", enabled=False))


# ------------------------------------------------------------------------------------------------ the flow is exact

@pytest.mark.parametrize("options", VARIANTS)
def test_inverse_of_forward_is_the_cell(dataset, panel, options):
    """float64 to 1e-10, fp32 to 1e-4, for cells that share contexts."""
    which = torch.tensor([0, 2, 2, 1])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = build(dataset, panel, tiny(**options), dtype)
        context, x = model.encode(*contexts(dataset, panel, 3, dtype)), cells(dataset, 4, dtype)
        z, _ = model.flow(x, context, which)
        back = model.inverse(z, [of[which] for of in context], FlowBlock.step)
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
        assert (z - model.standard(x)[..., :40]).abs().max() > 0.1       # it is not the identity


def test_inverse_of_forward_under_autocast(dataset, panel):
    """In bf16 both directions round alike: the labels and the stream of hidden states stay in fp32 in both."""
    model, which = build(dataset, panel, tiny(layers=3), torch.float32), torch.tensor([0, 2, 2, 1])
    with torch.autocast("cpu", torch.bfloat16):
        context, x = model.encode(*contexts(dataset, panel, 3, torch.float32)), cells(dataset, 4, torch.float32)
        z, _ = model.flow(x, context, which)
        back = model.inverse(z, [of[which] for of in context], FlowBlock.step)
    assert (back - x).abs().mean() < 2e-4


@pytest.mark.parametrize("options", VARIANTS)
def test_jacobian_is_triangular_in_the_blocks_order_and_log_det_is_autograds(dataset, panel, options):
    model, one = build(dataset, panel, tiny(**options)), torch.zeros(1, dtype=torch.long)
    context, P = model.encode(*contexts(dataset, panel, 1)), options.get("patch", 1)
    cell = cells(dataset, 1)
    x = model.standard(cell)
    T = x.shape[-1] // P
    for block in model.blocks:
        J = jacobian(lambda v: block(v[None], context[0], one)[0][0], x[0])
        ordered = J[block.order][:, block.order].view(T, P, T, P)
        slots = ordered.abs().amax((1, 3))                               # (T, T)
        assert slots.triu(1).max() == 0                                  # a slot sees no later one ...
        assert slots.diagonal(-1).min() > 1e-9 and slots.tril(-1).max() > 1e-3   # ... and always the one before
        within = ordered[range(T), :, range(T)]                          # (T, P, P): genes of a patch are not coupled
        assert (within - torch.diag_embed(within.diagonal(dim1=1, dim2=2))).abs().max() == 0
        torch.testing.assert_close(block(x, context[0], one)[1][0], torch.linalg.slogdet(J)[1])
    z, log_p = model.flow(cell, context, one)
    whole = jacobian(lambda v: model.flow(v[None], context, one)[0][0], cell[0])
    expected = Normal(0, 1).log_prob(z).sum() + torch.linalg.slogdet(whole)[1]
    torch.testing.assert_close(log_p.sum(), expected.to(log_p))


def test_the_first_slot_depends_on_the_context(dataset, panel):
    model, (control, c) = build(dataset, panel, tiny()), contexts(dataset, panel, 2)
    block, u = model.blocks[0], torch.zeros(2, 40, 1, dtype=torch.float64)
    for told in ((control[:1].expand(2, -1), c), (control, c[:1].expand(2, -1))):
        mu = block.parameters_of(u, block.context(model.encode(*told)[0]))[0]
        assert (mu[0, 0] - mu[1, 0]).abs() > 1e-4


def test_labels_are_modulated_by_the_perturbations_token(dataset, panel):
    """The last one of the context."""
    model = build(dataset, panel, tiny())
    H = model.encode(*contexts(dataset, panel, 1))[0]
    for block in model.blocks:
        shift, scale = block.modulate(H[0, -1]).chunk(2)
        torch.testing.assert_close(block.context(H)[0][0], block.label * (1 + scale) + shift)


def test_log_scale_is_bounded_and_the_flow_starts_as_the_standardised_cell(dataset, panel):
    model, which = build(dataset, panel, tiny(), scale=50.0), torch.arange(2)
    block = model.blocks[0]
    told = block.context(model.encode(*contexts(dataset, panel, 2))[0])
    _, a = block.parameters_of(block.slots(model.standard(cells(dataset, 2))), told)
    assert 2.9 < a.abs().max() <= 3
    fresh = ct.CellTARNet(tiny(), panel, data.gene_statistics(dataset))
    x = cells(dataset, 2, torch.float32)
    z, log_p = fresh.flow(x, fresh.encode(*contexts(dataset, panel, 2, torch.float32)), which)
    torch.testing.assert_close(z, (x - fresh.mean) / fresh.std)
    torch.testing.assert_close(log_p, Normal(fresh.mean, fresh.std).log_prob(x).sum(-1), rtol=1e-5, atol=1e-3)


def test_standardisation_has_the_moments_of_training_cells(dataset, panel):
    model, X = ct.CellTARNet(tiny(), panel, data.gene_statistics(dataset)), dataset.X[dataset.fit_rows].toarray()
    np.testing.assert_allclose(model.mean, X.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.std, np.sqrt(X.var(0) + 0.01), rtol=1e-3)


def test_effects_shift_the_cells_of_a_condition_and_of_no_other(dataset, panel):
    """At the flow's start a cell is Gaussian around mean + effect; doubles add up; a gene never perturbed has none."""
    model = ct.CellTARNet(tiny(), panel, data.gene_statistics(dataset)).requires_grad_(False)
    control, x, which = dataset.controls("train")[""][:1], cells(dataset, 4, torch.float32), torch.arange(4)
    c = multi_hot(["TF1", "TF2", "TF1+TF2", "GENE3"], panel)
    told = torch.from_numpy(control).expand(4, -1), c
    before = model.flow(x, model.encode(*told), which)[0]
    torch.nn.init.normal_(model.effects)
    z, log_p = model.flow(x, model.encode(*told), which)
    shift = before - z
    torch.testing.assert_close(shift[2], shift[0] + shift[1], rtol=1e-4, atol=1e-4)
    assert shift[3].abs().max() == 0 and shift[:2].abs().min(1).values.max() > 0
    expected = Normal(model.mean + shift * model.std, model.std).log_prob(x).sum(-1)
    torch.testing.assert_close(log_p, expected, rtol=1e-4, atol=1e-2)
    assert not ct.CellTARNet(Config(width=16, heads=2), panel).effects.requires_grad     # the paper has none


# ------------------------------------------------------------------------------------------------ mask and prior

@pytest.mark.parametrize("patch", [1, 2, 3])
def test_mask_equals_its_definition(patch):
    rng = np.random.default_rng(0)
    G, T = 23, math.ceil(23 / patch)
    graph = rng.random((G, G)) < 0.05
    graph = graph | graph.T | np.eye(G, dtype=bool)
    order = np.concatenate([rng.permutation(G), np.arange(G, T * patch)])
    expected = np.zeros((T, T), bool)
    for t in range(T):
        mine = [g for g in order[t * patch:(t + 1) * patch] if g < G]
        for s in range(t + 1):
            theirs = [g for g in order[max(0, s - 1) * patch:s * patch] if g < G]
            expected[t, s] = s == 0 or s == t or any(graph[g, h] for g in mine for h in theirs)
    got = attention_mask(torch.from_numpy(graph), torch.from_numpy(order), patch)
    assert np.array_equal(got, expected) and 0 < (~expected & np.tril(np.ones((T, T), bool))).sum()
    assert torch.equal(attention_mask(None, torch.from_numpy(order), patch), torch.ones(T, T).tril().bool())


def test_prior_decides_who_is_attended_to(dataset, panel):
    """With one layer, the value of gene g reaches gene h only through an edge of the graph, or as the slot before."""
    model = build(dataset, panel, tiny(layers=1, neighbours=2, prior="sparse"))
    graph = gene_prior(data.gene_statistics(dataset)[2], "sparse", 2, 4)
    H = model.encode(*contexts(dataset, panel, 1))[0]
    for block in model.blocks:
        told, u = block.context(H), torch.randn(1, 40, 1, dtype=torch.float64)
        J = jacobian(lambda v: block.parameters_of(v, told)[0], u)[0, :, 0, 0, :, 0] != 0            # (T, T)
        allowed = graph[block.order][:, block.order].tril(-1) | torch.eye(40).roll(1, dims=0).tril(-1).bool()
        assert torch.equal(J, allowed)


@pytest.mark.parametrize("kind", ["sparse", "low-rank", "both"])
def test_prior_equals_a_plain_loop(dataset, kind):
    corr = data.gene_statistics(dataset)[2]
    C, k, rank = corr.numpy().astype(float), 3, 5
    value, vector = np.linalg.eigh(C)
    low = sum(value[-i] * np.outer(vector[:, -i], vector[:, -i]) for i in range(1, rank + 1))
    expected = np.eye(len(C), dtype=bool)
    for matrix in [C] * (kind != "low-rank") + [low] * (kind != "sparse"):
        for g in range(len(C)):
            ranked = [h for h in np.argsort(-abs(matrix[g]), kind="stable") if h != g]
            expected[g, ranked[:k]] = expected[ranked[:k], g] = True
    got = gene_prior(corr, kind, k, rank).numpy()
    assert np.array_equal(got, expected) and got.sum(1).min() > k


def test_silent_genes_stand_alone_in_the_prior(demo):
    silent = data.load(demo, tiny(), "additive")
    X = silent.X.tolil()
    X[:, 5] = 0
    silent.source.X = X.tocsr()
    graph = gene_prior(data.gene_statistics(silent)[2], "both", 3, 4)
    assert graph[5].sum() == 1 and graph[5, 5]


def test_patches_of_the_first_block_hold_correlated_genes_and_orders_come_in_pairs(dataset, panel):
    corr, model = data.gene_statistics(dataset)[2], build(dataset, panel, tiny(patch=4))

    def within(order):
        return np.mean([corr[g, h].abs() for p in order.view(-1, 4) for g in p for h in p if g != h])
    orders = [block.order for block in model.blocks]
    assert all(sorted(order.tolist()) == list(range(40)) for order in orders)
    assert within(orders[0]) > 1.3 * within(torch.arange(40))
    assert torch.equal(orders[1], orders[0].flip(0))
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_a_large_panel_has_larger_patches(dataset, panel):
    for slots, patch in ((0, 2), (20, 2), (19, 3), (10, 4)):
        model = ct.CellTARNet(tiny(patch=2, slots=slots), panel, data.gene_statistics(dataset))
        assert model.patch == patch and len(model.blocks[0].mask) == -(-40 // patch)


def test_paper_preset_has_the_papers_genes_and_cells():
    """The 1,000 most expressed genes of control cells (Ahlmann-Eltze et al.), no validation part, one gene a slot."""
    config = Config(**ct.PRESETS["paper"])
    assert (config.hvg, config.hvg_by, config.eval_genes) == (1000, "mean", 1000)
    assert (config.split, config.folds, config.train_on_val) == ("cv", 10, True)
    assert config.patch == 1 and config.slots == 0 and config.calibration == 0 and not config.effect_readout


# ------------------------------------------------------------------------------------------------ contrast

def test_info_nce_equals_a_plain_loop():
    torch.manual_seed(0)
    n, tau = 8, 0.2
    e = torch.nn.functional.normalize(torch.randn(n, 3, 6, dtype=torch.float64), dim=-1)
    own, swapped, condition, total = e[:, :2], e[:, 2], torch.tensor([0, 1, 2, 2, 3, 4, 5, 6]), 0.0
    for k in range(n):
        j = k + 1 if k % 2 == 0 else k - 1                               # the partner
        terms = [(own[k, 0] @ own[k, 1] / tau).exp()]
        if condition[j] != condition[k]:                                 # contexts 2 and 3 share a condition
            terms.append((own[k, 0] @ swapped[k] / tau).exp())           # same context, other cell
            terms.append((own[k, 0] @ swapped[j] / tau).exp())           # other context, same cell
        total -= (terms[0] / sum(terms)).log()
    torch.testing.assert_close(info_nce(own, swapped, torch.arange(n) ^ 1, condition, tau), total / n)
    assert info_nce(own, swapped, torch.arange(n) ^ 1, torch.zeros(n, dtype=torch.long), tau) == 0


def test_contrasted_are_the_cells_and_contexts_that_the_definition_asks_for(dataset, panel, monkeypatch):
    """The embeddings that the loss contrasts, recomputed one pair of cell and context at a time."""
    model, seen = build(dataset, panel, tiny()), {}
    control, c = contexts(dataset, panel, 6)
    x, zero = cells(dataset, 12).view(6, 2, -1), torch.zeros(1, dtype=torch.long)

    def spy(own, swapped, partner, condition, temperature):
        seen.update(own=own, swapped=swapped)
        return own.sum()
    monkeypatch.setattr(ct, "info_nce", spy)
    ct.celltarnet_loss(model, x, control, control, c, torch.zeros_like(c), torch.arange(6), 0.1)
    norm, first, gelu, last = model.projection
    assert last.weight.shape == (128, 512) and seen["own"].shape == (6, 2, 128)
    for k in range(6):
        context = model.encode(control[k:k + 1], c[k:k + 1])
        got = [seen["own"][k, 0], seen["own"][k, 1], seen["swapped"][k]]
        for cell, e in zip((x[k, 0], x[k, 1], x[k ^ 1, 0]), got):
            expected = last(gelu(first(norm(model.flow(cell[None], context, zero)[0]))))[0].float()
            torch.testing.assert_close(e, expected / expected.norm())


def test_loss_is_the_likelihood_of_both_tasks(dataset, panel):
    control, c = contexts(dataset, panel, 4)
    x, noisy, null = cells(dataset, 16).view(4, 4, -1), control + torch.randn_like(control), torch.zeros_like(c)
    model = build(dataset, panel, tiny(cells_per_context=4))
    post, pre, _ = ct.celltarnet_loss(model, x, control, noisy, c, null, torch.arange(4), 0.1)
    own = torch.arange(4).repeat_interleave(4)
    torch.testing.assert_close(post, -model.flow(x.flatten(0, 1), model.encode(noisy, c), own)[1].mean() / 40)
    torch.testing.assert_close(pre, -model.flow(control, model.encode(noisy, null), torch.arange(4))[1].mean() / 40)


def test_every_parameter_takes_part_in_the_loss(dataset, panel):
    """No layer, the last ones included, is left out of what is trained."""
    model = build(dataset, panel, tiny(layers=2, context_layers=2)).requires_grad_(True)
    control, c = contexts(dataset, panel, 4)
    x = cells(dataset, 8).view(4, 2, -1)
    sum(ct.celltarnet_loss(model, x, control, control, c, torch.zeros_like(c), torch.arange(4), 0.1)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9]


# ------------------------------------------------------------------------------------------------ sampling

def test_masked_attention_in_chunks_is_attention():
    """Values and gradients, to rounding; the last chunk is a short one, and some keys of every chunk are masked."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 40, 8, requires_grad=True)                  # q, k, v
    mask = torch.zeros(40, 40).masked_fill(~torch.ones(40, 40).tril().bool() | (torch.rand(40, 40) < 0.5), -math.inf)
    mask.fill_diagonal_(0)
    (whole, expected), (chunks, got) = ((a, torch.autograd.grad(a.square().sum(), x)[0]) for a in (
        ct.attend(*x, mask, size=size) for size in (40, 16)))
    torch.testing.assert_close(chunks, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"patch": 3}, {"prior": "none"}, {"prior": "sparse", "neighbours": 2}])
def test_cached_decoding_equals_the_whole_block_once_per_slot(dataset, panel, options):
    """Few neighbours: what a slot sees is gathered from the cache."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = build(dataset, panel, tiny(**options), dtype)
        assert (3 * model.most < len(model.blocks[0].mask)) == ("neighbours" in options)
        H = model.encode(*contexts(dataset, panel, 3, dtype))[0]
        for block in model.blocks:
            x = torch.randn(3, 40 + model.padding, dtype=dtype)
            x[:, 40:] = 0
            v, told = block.slots(x), block.context(H)
            u = torch.zeros_like(v)
            for t in range(v.shape[1]):
                mu, a = block.parameters_of(u, told)
                u[:, t] = v[:, t] * torch.exp(a[:, t]) + mu[:, t]
            cached = block.inverse(x, H, FlowBlock.step, model.most)
            torch.testing.assert_close(cached, block.genes(u), rtol=tolerance, atol=tolerance)
            assert cached[:, 40:].abs().sum() == 0


def test_calibration_matches_the_means_of_training_conditions(dataset, panel):
    """Ridge regression, on an intercept and the perturbations, of what the generated means lack."""
    config = tiny(calibration=0.5, patch=20, blocks=1, layers=1)
    model, names = ct.CellTARNet(config, panel, data.gene_statistics(dataset)), dataset.part("train")
    run = fake_run(config, panel)
    run.dataset, run.capped = dataset, 0

    def means():
        cells = ct.predict(run, model, dict.fromkeys(names, 100), dataset.control_cells("train"), np.arange(40))
        return np.stack([cells[g].mean(0) for g in names])
    before, real = means(), np.stack([dataset.cells(g).mean(0) for g in names])
    model.shift.fill_(1)                                                 # of an earlier run, which is forgotten
    ct.calibrate(run, model)
    assert run.capped == 0                                               # of the cells that the run reports
    X = np.array([[1] + [p in g.split("+") for p in panel.perturbations] for g in names], float)
    penalty = np.diag([0.0] + [0.5] * len(panel.perturbations))
    expected = np.linalg.solve(X.T @ X + penalty, X.T @ (real - before))
    np.testing.assert_allclose(model.shift, expected, rtol=1e-3, atol=1e-4)
    after = means()
    assert np.linalg.norm(after - real) < 0.6 * np.linalg.norm(before - real)
    assert abs((after - real).mean(0)).mean() < 0.3 * abs((before - real).mean(0)).mean()   # the intercept is free


@pytest.mark.parametrize("most, cells", [(10_000, 100), (31 * 40, 40), (1, 10)])
def test_calibration_generates_fewer_cells_of_many_conditions(dataset, panel, monkeypatch, most, cells):
    run, sizes = fake_run(tiny(calibration=1), panel), []
    run.dataset = dataset

    def predict(run, model, asked, *_):
        sizes.extend(asked.values())
        return {g: np.zeros((1, 40)) for g in asked}
    monkeypatch.setattr(ct, "predict", predict)
    monkeypatch.setattr(ct, "CALIBRATION_CELLS", most)
    ct.calibrate(run, ct.CellTARNet(run.config, panel, data.gene_statistics(dataset)))
    assert sizes == [cells] * 31


def test_sample_inverts_the_flow_and_removes_the_noise(dataset, panel):
    """A dequantised zero comes back as zero, but for one in twenty; other values as they were."""
    config = tiny()
    model = build(dataset, panel, config, scale=0.05)
    control, c = contexts(dataset, panel, 20)
    clean = torch.from_numpy(dataset.X[dataset.fit_rows[:20]].toarray()).double()
    x = clean + config.dequantise * torch.randn(clean.shape, dtype=torch.float64)
    z, _ = model.flow(x, model.encode(control, c), torch.arange(20))
    back = sample(model, z, control, c, config)
    torch.testing.assert_close(back, torch.where(x.abs() < 0.2, 0, x), rtol=1e-8, atol=1e-8)
    zero = clean == 0
    assert zero.float().mean() > 0.1 and (back[zero] == 0).float().mean() > 0.93


def test_chunks_change_nothing(dataset, panel, monkeypatch):
    model, control = build(dataset, panel, tiny(), torch.float32, scale=0.05), dataset.controls("test")[""][:9]
    run = fake_run(tiny(), panel)
    ask = ({"TF1+TF2": 9}, {"": control}, np.arange(0, 40, 2))
    whole = ct.predict(run, model, *ask)["TF1+TF2"]
    assert whole.shape == (9, 20) and len(np.unique(whole, axis=0)) == 9
    monkeypatch.setattr(data, "cells_at_once", lambda device, size: 4)
    np.testing.assert_allclose(ct.predict(run, model, *ask)["TF1+TF2"], whole, rtol=1e-3, atol=1e-3)


class Operations(TorchDispatchMode):
    """Counts what runs eagerly, views apart."""
    views = {"view", "_unsafe_view", "transpose", "expand", "slice", "select", "unsqueeze", "t", "split", "detach"}

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.__name__.split(".")[0] not in self.views
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16, in_layer, around", [(False, 17.6, 10), (True, 22.2, 12)])
def test_a_slot_takes_few_operations(dataset, panel, bf16, in_layer, around):
    """On a GPU each costs microseconds, for every layer and slot: 17, and 0.4 for the copy of its weights per block."""
    took = []
    for layers in (1, 3):
        model = build(dataset, panel, tiny(layers=layers), torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            H = model.encode(*contexts(dataset, panel, 2, torch.float32))[0]
            with Operations() as count:
                model.blocks[0].inverse(torch.randn(2, 40), H, FlowBlock.step, model.most)
        took.append(count.n / 40)
    per_layer = (took[1] - took[0]) / 2
    assert per_layer < in_layer and took[0] - per_layer < around, took


@pytest.mark.parametrize("options", [{}, {"prior": "sparse", "neighbours": 2}])
def test_a_slot_is_one_graph_whatever_the_block(dataset, panel, options):
    """Also where what a slot sees is gathered: as many of every block."""
    torch._dynamo.reset()
    model, counter = build(dataset, panel, tiny(**options)), CompileCounter()
    told = model.encode(*contexts(dataset, panel, 3))
    with torch.no_grad():
        model.inverse(torch.randn(3, 40).double(), told, torch.compile(FlowBlock.step, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_flow_is_one_graph(dataset, panel):
    model = build(dataset, panel, tiny(), torch.float32)
    control, c = contexts(dataset, panel, 2, torch.float32)
    told = torch._dynamo.explain(model)(cells(dataset, 4, torch.float32), torch.tensor([0, 0, 1, 1]), control, c, 4)
    assert told.graph_count == 1 and told.graph_break_count == 0


# ------------------------------------------------------------------------------------------------ conditions

def test_multi_hot_is_additive_and_knows_genes_doses_and_covariates():
    def panel(**covariates):
        return data.Panel(["A", "B", "C"], [0], ["A", "B:1", "B:2", "X"], [0, 1, 1, -1], ["A"], [0] * 3, [1] * 3,
                          covariates)
    types = panel(donor=["d"], type=["t;1", "t2"])
    c = multi_hot(["A@d,t2", "A+X@d,t2"], types)
    assert c.tolist() == [[1, 0, 0, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0, 1, 1, 0, 1]]
    a, b, ab, gene = multi_hot(["A", "B:2", "A+B:2", "C"], panel())
    assert torch.equal(a + b, ab) and b.tolist() == [0, 1, 0, 0, 0, 1, 0] and gene.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert multi_hot(["A@d,t;1"], types)[0, 7:].tolist() == [1, 1, 0]
    with pytest.raises(data.DataError, match="'NK' is no type of the training file; it has t;1, t2"):
        multi_hot(["A@d,NK"], types)


def test_a_gene_never_perturbed_is_embedded_by_its_own_vector(dataset, panel):
    model = ct.CellTARNet(tiny(), panel, data.gene_statistics(dataset))
    control, _ = contexts(dataset, panel, 1, torch.float32)
    H = [model.encode(control, multi_hot([g], panel))[0] for g in ("GENE3", "GENE4", "TF1")]
    assert min((a - b).abs().max() for a, b in ((H[0], H[1]), (H[1], H[2]))) > 1e-3


# ------------------------------------------------------------------------------------------------ likelihood

def test_flow_fits_a_bimodal_conditional_density():
    """Two genes; the control cell decides where the two modes are. The truth is a mixture of Gaussians."""
    torch.manual_seed(0)
    panel = data.Panel(["A", "B"], [0, 1], ["A"], [0], ["A"], [0, 0], [1, 1])
    config = tiny(layers=1, blocks=4, prior="none", contrast_weight=0.0, denoise_weight=0.0)
    model = ct.CellTARNet(config, panel, (torch.zeros(2), torch.full((2,), 3.0), torch.eye(2)))
    modes = torch.tensor([[[-1.5, -1.5], [1.5, 1.5]], [[-1.5, 1.5], [1.5, -1.5]]])       # (y, mode, gene)
    control, c = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), multi_hot(["A", "A"], panel)

    def draw(n):
        y, mode = torch.arange(n) % 2, torch.randint(2, (n,))
        return modes[y, mode] + 0.5 * torch.randn(n, 2), y
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        x, y = draw(192)
        loss = -model.flow(x, model.encode(control, c), y)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, y = draw(4000)
    with torch.no_grad():
        got = model.flow(x, model.encode(control, c), y)[1].mean()
    mixture = Normal(modes[y], 0.5).log_prob(x[:, None]).sum(-1).logsumexp(-1) - math.log(2)
    gaussian = -math.log(2 * math.pi * math.e) - 0.5 * math.log((1.5 ** 2 + 0.25) ** 2 - 1.5 ** 4)
    assert mixture.mean() - 0.2 < got < mixture.mean() + 0.05 and got > gaussian + 0.4


def test_score_is_the_likelihood_of_every_cell_under_every_condition(demo, call, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert call("celltarnet.py", "--data", demo, *TINY["celltarnet"], "--out", folder).returncode == 0
    ckpt = ["--ckpt", folder / "ckpt.pt", "--score", demo]
    flags = ["--score-under", "TF1", "TF3+TF2", "GENE3", "--score-controls", 2]
    done = call("celltarnet.py", *ckpt, *flags, "--out", tmp_path / "s.h5ad")
    assert done.returncode == 0 and "their own" in done.stdout, done.stderr
    scores, real = data.read_cells(tmp_path / "s.h5ad", check=False), data.load(demo, data.DataConfig(), "additive")
    log_p = scores.X.toarray()
    assert scores.genes == ["GENE3", "TF1", "TF2+TF3"] and list(scores.condition) == list(real.source.condition)
    assert np.isfinite(log_p).all() and list(scores.obs("best")) == [scores.genes[i] for i in log_p.argmax(1)]

    # by hand, up to the noise of the dequantisation: the mean of the density over the same controls
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    panel = data.Panel(**state["panel"])
    model = data.load_model(ct, folder / "ckpt.pt")[1]
    own = torch.from_numpy(data.pick_rows(real.controls("test")[""], 2, data.seed_of("", 0)))
    x = torch.from_numpy(data.read_cells(demo).X.toarray())
    x = torch.log1p(1e4 * x / x.sum(1, keepdim=True))
    torch.manual_seed(0)
    x = x + 0.1 * torch.randn_like(x)
    with torch.no_grad():
        p = [model.flow(x, model.encode(y[None], multi_hot(["TF1"], panel)), torch.zeros(len(x), dtype=torch.long))[1]
             for y in own]
    np.testing.assert_allclose(torch.stack(p).double().exp().mean(0).log(), log_p[:, 1], rtol=1e-3)

    # all conditions by default, and the cells in parts
    monkeypatch.setattr(data, "cells_at_once", lambda device, size: 100)
    assert call("celltarnet.py", *ckpt, "--out", tmp_path / "all.h5ad").returncode == 0
    every = data.read_cells(tmp_path / "all.h5ad", check=False)
    assert len(every.genes) == 40 and list(every.names) == list(data.read_cells(demo).names)

    data.write_h5ad(tmp_path / "thin.h5ad", np.ones((5, 3), np.float32), {}, ["TF1", "TF2", "TF3"])
    for flags, words in ((["--score-under", "NOGENE"], "--score-under NOGENE"), (["--predict", "TF1"], "or --score"),
                         (["--score", tmp_path / "thin.h5ad"], "lacks 37 of the model's 40 genes")):
        done = call("celltarnet.py", *ckpt, *flags, "--out", tmp_path / "no.h5ad")
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "no.h5ad").exists()
    assert "exists" in call("celltarnet.py", *ckpt, "--out", tmp_path / "all.h5ad").stderr


# ------------------------------------------------------------------------------------------------ training

def spied(monkeypatch, call, folder, *flags):
    """Arguments of the loss in every step of a tiny run, and its log."""
    seen, loss = [], ct.celltarnet_loss
    with monkeypatch.context() as patch:
        patch.setattr(ct, "celltarnet_loss", lambda *args: seen.append(args) or loss(*args))
        done = call("celltarnet.py", *TINY["celltarnet"], "--steps", 4, "--calibration", 0, *flags, "--out", folder)
    assert done.returncode == 0, done.stderr
    return seen, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_gradients_are_clipped_to_norm_1(demo, call, tmp_path, monkeypatch):
    norms, finish, loss = [], ct.Run.finish, ct.celltarnet_loss

    def record(run, step, parts, **losses):
        norms.append(torch.stack([p.grad.norm() for p in parts["model"].parameters() if p.grad is not None]).norm())
        finish(run, step, parts, **losses)
    monkeypatch.setattr(ct.Run, "finish", record)
    monkeypatch.setattr(ct, "celltarnet_loss", lambda *args: [1e4 * part for part in loss(*args)])
    spied(monkeypatch, call, tmp_path / "run", "--data", demo)
    assert torch.stack(norms).tolist() == pytest.approx([1.0] * 4, rel=1e-3)


def test_targets_and_context_carry_their_noise(demo, call, tmp_path, monkeypatch):
    """With silent cells, what the loss gets is noise alone: sigma on both targets, a level of the genes' own deviation
    in the context, all of it independent."""
    monkeypatch.setattr(data.Dataset, "gather", lambda self, rows, genes=None: torch.zeros(len(rows), len(self.genes)))
    seen = spied(monkeypatch, call, tmp_path / "run", "--data", demo)[0]
    size = torch.cat([noisy for _, _, _, noisy, *_ in seen]).abs().mean(0)               # (G,)
    assert torch.corrcoef(torch.stack([size, seen[0][0].std]))[0, 1] > 0.8
    for net, x, control, noisy, *_ in seen:
        assert x.std() == pytest.approx(0.1, rel=0.15) and control.std() == pytest.approx(0.1, rel=0.15)
        level = (noisy / net.std).std(dim=1)                             # (n,)
        assert 0 < level.min() and level.max() < 1.3 and level.max() > 2 * level.min()
        pairs = torch.corrcoef(torch.stack([x[:, 0].flatten(), x[:, 1].flatten(), control.flatten(), noisy.flatten()]))
        assert (pairs - torch.eye(4)).abs().max() < 0.25


def test_batches_hold_distinct_conditions_with_cells_of_their_own(demo, call, tmp_path, monkeypatch):
    """Targets are cells of their condition, controls are control cells: each cell says which row it is."""
    dataset = data.load(demo, tiny(), "additive")
    names = dataset.part("train")

    def rows_as_values(self, rows, genes=None):
        return (1000 + rows.float())[:, None].expand(-1, len(self.genes)).contiguous()
    monkeypatch.setattr(data.Dataset, "gather", rows_as_values)
    flags = ["--data", demo, "--batch-size", "32", "--dequantise", "0.01"]
    for net, x, control, noisy, c, null, condition, _ in spied(monkeypatch, call, tmp_path / "run", *flags)[0]:
        assert len(set(condition.tolist())) == 16
        groups = [sorted(n.partition("@")[0] for n in names)[i] for i in condition]
        assert torch.equal(c, multi_hot(groups, dataset.panel()))
        rows = (x.mean(2) - 1000).round().long()
        assert all(set(r.tolist()) <= set(dataset.rows[g].tolist()) for g, r in zip(groups, rows))
        assert set((control.mean(1) - 1000).round().long().tolist()) <= set(dataset.rows["control"].tolist())


def test_denoising_task_sees_no_perturbation_and_keeps_covariates(call, tmp_path, monkeypatch):
    data.simulate(tmp_path / "two.h5ad", cells=900, genes=40, cell_types=2)
    flags = ["--data", tmp_path / "two.h5ad", "--covariates", "cell_type", "--split", "transfer"]
    for _, _, _, _, c, null, *_ in spied(monkeypatch, call, tmp_path / "run", *flags)[0]:
        assert (null[:, :-2] == 0).all() and torch.equal(null[:, -2:], c[:, -2:]) and (c[:, -2:].sum(1) == 1).all()
        assert (c[:, :-2].sum(1) >= 1).all()


def test_loss_weighs_its_terms_as_asked(demo, call, tmp_path, monkeypatch):
    """The contrast comes in over a tenth of the steps."""
    flags = ["--data", demo, "--steps", 20, "--denoise-weight", 0.7, "--contrast-weight", 0.3]
    for line in spied(monkeypatch, call, tmp_path / "run", *flags)[1]:
        ramp = min(1, line["step"] / 2)
        expected = line["nll"] + 0.7 * line["denoise"] + 0.3 * ramp * line["contrast"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4) and line["contrast"] > 0.01


@pytest.mark.parametrize("flags", [["--contrast-weight", 0, "--denoise-weight", 0],
                                   ["--prior", "none", "--no-effect-readout", "--ema", 0]])
def test_variants_run(flags, demo, call, tmp_path):
    done = call("celltarnet.py", "--data", demo, *TINY["celltarnet"], "--steps", 4, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0 and "replicate" in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "10"], "--batch-size 10"), (["--width", "15"], "--width 15"), (["--ema", "1"], "--ema"),
    (["--cells-per-context", "1"], "second cell"), (["--dequantise", "0"], "--dequantise")])
def test_values_that_cannot_work_are_refused(flags, words, demo, call, tmp_path):
    done = call("celltarnet.py", "--data", demo, *TINY["celltarnet"], *flags, "--out", tmp_path / "run")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "run").exists()
