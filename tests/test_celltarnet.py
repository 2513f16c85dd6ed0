"""celltarnet.py: the flow is exact, causal and masked as the definition says; contrast, sampling, likelihood."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

import celltarnet as ct
import data
from celltarnet import Config, attention_mask, gene_prior, info_nce, multi_hot, partners, sample
from conftest import TINY

VARIANTS = [{}, {"patch": 4}, {"patch": 7}, {"prior": "none"}, {"prior": "sparse", "layers": 1}, {"prior": "low-rank", "patch": 3}]


def tiny(**options):
    return Config(**{**ct.PRESETS["demo"], "width": 16, "layers": 2, "heads": 2, "blocks": 3, "patch": 1, "neighbours": 4, "rank": 4, **options})


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
    return model


def contexts(dataset, panel, n, dtype=torch.float64):
    groups = dataset.part("train")[:n]
    control = torch.from_numpy(dataset.controls("train")[""][:n]).to(dtype)
    return control, multi_hot(groups, panel).to(dtype)


def cells(dataset, n, m, dtype=torch.float64):
    X = torch.from_numpy(dataset.X[dataset.fit_rows[-n * m:]].toarray()).to(dtype)
    return (X + 0.1 * torch.randn(X.shape, dtype=dtype)).view(n, m, -1)


# ------------------------------------------------------------------------------------------------ the flow is exact

@pytest.mark.parametrize("options", VARIANTS)
def test_inverse_of_forward_is_the_cell(dataset, panel, options):
    """float64 to 1e-10, fp32 to 1e-5 of values of unit size, block by block and as a whole."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = build(dataset, panel, tiny(**options), dtype)
        H = model.encode(*contexts(dataset, panel, 3, dtype))
        x = cells(dataset, 3, 2, dtype)
        z, _ = model.flow(x, H)
        u = torch.nn.functional.pad(z, (0, model.padding))
        for block in reversed(model.blocks):
            u = block.inverse(u, H)
        torch.testing.assert_close(u, model.standard(x), rtol=tolerance, atol=tolerance)
        assert (z - model.standard(x)[..., :40]).abs().max() > 0.1              # it is not the identity


@pytest.mark.parametrize("options", VARIANTS)
def test_jacobian_is_triangular_in_the_blocks_order_and_log_det_is_autograds(dataset, panel, options):
    model = build(dataset, panel, tiny(**options))
    H = model.encode(*contexts(dataset, panel, 1))
    x, P = model.standard(cells(dataset, 1, 1)), options.get("patch", 1)
    for block in model.blocks:
        J = jacobian(lambda v: block(v[None, None], H)[0][0, 0], x[0, 0])
        slots = J[block.order][:, block.order].view(x.shape[-1] // P, P, -1, P).abs().amax((1, 3))  # (T, T)
        assert slots.triu(1).max() == 0 and slots.tril(-1).max() > 1e-3
        diagonal = J[block.order][:, block.order].view(len(slots), P, len(slots), P)[range(len(slots)), :, range(len(slots))]
        assert (diagonal - torch.diag_embed(diagonal.diagonal(dim1=1, dim2=2))).abs().max() == 0   # genes of a patch: no coupling
        torch.testing.assert_close(block(x, H)[1][0, 0], torch.linalg.slogdet(J)[1])
    z, log_p = model.flow(one := cells(dataset, 1, 1), H)
    whole = jacobian(lambda v: model.flow(v[None, None], H)[0][0, 0], one[0, 0])
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() + torch.linalg.slogdet(whole)[1]
    torch.testing.assert_close(log_p.sum(), expected.to(log_p))


@pytest.mark.parametrize("patch", [1, 4])
def test_a_gene_changes_only_slots_after_its_own(dataset, panel, patch):
    """mu and a of slot t see earlier slots only: not its own value (the off-by-one), not later ones."""
    model = build(dataset, panel, tiny(patch=patch, prior="none"))
    H = model.encode(*contexts(dataset, panel, 1))
    x = model.standard(cells(dataset, 1, 1))
    for block in model.blocks:
        before = block.parameters_of(block.slots(x), block.context(H))
        for slot in (0, 3, x.shape[-1] // patch - 1):
            other = x.clone()
            other[..., block.order[slot * patch]] += 1
            after = block.parameters_of(block.slots(other), block.context(H))
            changed = sum((a - b).abs().sum((0, 1, 3)) for a, b in zip(before, after)) > 0
            assert not changed[:slot + 1].any() and changed[slot + 1:].all()


def test_the_first_slot_depends_on_the_context(dataset, panel):
    model = build(dataset, panel, tiny())
    control, c = contexts(dataset, panel, 2)
    u = model.blocks[0].slots(torch.zeros(2, 1, 40, dtype=torch.float64))
    mu = model.blocks[0].parameters_of(u, model.blocks[0].context(model.encode(control[:1].expand(2, -1), c)))[0]
    assert (mu[0, 0, 0] - mu[1, 0, 0]).abs() > 1e-4


def test_log_scale_is_bounded_and_the_flow_starts_as_the_standardised_cell(dataset, panel):
    model = build(dataset, panel, tiny(), scale=50.0)
    H = model.encode(*contexts(dataset, panel, 2))
    _, a = model.blocks[0].parameters_of(model.blocks[0].slots(model.standard(cells(dataset, 2, 1))), model.blocks[0].context(H))
    assert 2.9 < a.abs().max() <= 3
    fresh = ct.CellTARNet(tiny(), panel, data.gene_statistics(dataset))
    x = cells(dataset, 2, 1, torch.float32)
    z, log_p = fresh.flow(x, fresh.encode(*contexts(dataset, panel, 2, torch.float32)))
    torch.testing.assert_close(z, (x - fresh.mean) / fresh.std)
    torch.testing.assert_close(log_p, torch.distributions.Normal(fresh.mean, fresh.std).log_prob(x).sum(-1), rtol=1e-5, atol=1e-3)


def test_standardisation_has_the_moments_of_training_cells(dataset, panel):
    mean, var, corr = data.gene_statistics(dataset)
    X = dataset.X[dataset.fit_rows].toarray()
    np.testing.assert_allclose(mean, X.mean(0), rtol=1e-4)
    np.testing.assert_allclose(var, X.var(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(corr, np.corrcoef(X.T), atol=1e-4)


@pytest.mark.parametrize("m", [1, 3])
def test_cells_of_a_batch_do_not_see_each_other(dataset, panel, m):
    """m cells share a context; each is encoded as if alone."""
    model = build(dataset, panel, tiny())
    control, c = contexts(dataset, panel, 3)
    x = cells(dataset, 3, m)
    z, log_p = model.flow(x, model.encode(control, c))
    for k in range(3):
        for i in range(m):
            one, p = model.flow(x[k:k + 1, i:i + 1], model.encode(control[k:k + 1], c[k:k + 1]))
            torch.testing.assert_close(one[0, 0], z[k, i])
            torch.testing.assert_close(p[0, 0], log_p[k, i])


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
        for s in range(t + 1):
            mine = [g for g in order[t * patch:(t + 1) * patch] if g < G]
            theirs = [g for g in order[(s - 1) * patch:s * patch] if g < G] if s else []
            expected[t, s] = s == 0 or s == t or any(graph[g, h] for g in mine for h in theirs)
    got = attention_mask(torch.from_numpy(graph), torch.from_numpy(order), patch)
    assert np.array_equal(got, expected) and 0 < (~expected & np.tril(np.ones((T, T), bool))).sum()
    assert torch.equal(attention_mask(None, torch.from_numpy(order), patch), torch.ones(T, T).tril().bool())


def test_prior_decides_who_is_attended_to(dataset, panel):
    """With one layer, the value of gene g reaches gene h only through an edge of the graph, or as the slot before."""
    config = tiny(layers=1, neighbours=2, prior="sparse")
    model = build(dataset, panel, config)
    graph = gene_prior(data.gene_statistics(dataset)[2], "sparse", 2, 4)
    H = model.encode(*contexts(dataset, panel, 1))
    for block in model.blocks:
        u = torch.randn(1, 1, 40, 1, dtype=torch.float64)
        J = jacobian(lambda v: block.parameters_of(v, block.context(H))[0], u)[0, 0, :, 0, 0, 0, :, 0] != 0   # (T, T)
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


def test_prior_is_made_of_training_cells_and_silent_genes_stand_alone(demo, panel):
    one, two = data.load(demo, tiny(), "additive"), data.load(demo, tiny(), "additive")
    rows = np.concatenate([two.rows[g] for g in two.part("test")])
    two.source.X = two.X.tolil()
    two.source.X[rows] = 7.0
    two.source.X = two.X.tocsr().astype(np.float32)
    for a, b in zip(data.gene_statistics(one), data.gene_statistics(two)):
        assert torch.equal(a, b)
    one.source.X = one.X.tolil()
    one.source.X[:, 5] = 0
    one.source.X = one.X.tocsr()
    mean, var, corr = data.gene_statistics(one)
    assert mean[5] == var[5] == 0 and corr[5].abs().max() == 0
    graph = gene_prior(corr, "both", 3, 4)
    assert graph[5].sum() == 1 and graph[5, 5]


def test_covariates_are_one_hot_and_an_unknown_value_is_an_error():
    panel = data.Panel(["A", "B"], [0], ["A"], [0], ["A"], {"cell_type": ["T cell", "B cell"], "donor": ["1"]})
    c = multi_hot(["A@B cell,1", "control@T cell,1"], panel)
    assert c.tolist() == [[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 1]]
    with pytest.raises(data.DataError, match="'NK' is no cell_type of the training file; it has T cell, B cell"):
        multi_hot(["A@NK,1"], panel)


def test_patches_of_the_first_block_hold_correlated_genes(dataset, panel):
    corr = data.gene_statistics(dataset)[2]
    model = build(dataset, panel, tiny(patch=4))
    assert sorted(model.blocks[0].order.tolist()) == list(range(40))

    def within(order):
        return np.mean([corr[g, h].abs() for p in order.view(-1, 4) for g in p for h in p if g != h])
    assert within(model.blocks[0].order) > 1.3 * within(torch.arange(40))
    assert torch.equal(model.blocks[1].order, model.blocks[0].order.flip(0))
    assert len({tuple(b.order.tolist()) for b in model.blocks}) == 3


# ------------------------------------------------------------------------------------------------ contrast

@pytest.mark.parametrize("rolls", [1, 3])
def test_info_nce_equals_a_plain_loop(rolls):
    torch.manual_seed(0)
    n, tau = 8, 0.2
    e = torch.nn.functional.normalize(torch.randn(n, 2 + rolls, 6, dtype=torch.float64), dim=-1)
    condition = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6])                      # 2 and 3 share a condition
    other, total = partners(n, rolls), 0.0
    for k in range(n):
        terms = [(e[k, 0] @ e[k, 1] / tau).exp()]
        for r in range(rolls):
            j = int(other[r, k])                                            # cell j under context k: same context, other cell
            if condition[j] != condition[k]:
                terms.append((e[k, 0] @ e[k, 2 + r] / tau).exp())
            j = next(j for j in range(n) if int(other[r, j]) == k)          # cell k under context j: other context, same cell
            if condition[j] != condition[k]:
                terms.append((e[k, 0] @ e[j, 2 + r] / tau).exp())
        total -= (terms[0] / sum(terms)).log()
    torch.testing.assert_close(info_nce(e, other, condition, tau), total / n)


def test_rolls_stay_in_their_block_and_meet_every_other_context_once():
    """Every context of a block of R + 1 meets the R others, and is met by them: so are both kinds of negatives R."""
    for n, rolls in ((8, 1), (12, 2), (8, 3)):
        other, size = partners(n, rolls), rolls + 1
        for k in range(n):
            block = set(range(k // size * size, k // size * size + size))
            assert set(other[:, k].tolist()) == block - {k}
        assert all(sorted(row.tolist()) == list(range(n)) for row in other)
        assert torch.equal(partners(2 * n, rolls)[:, n:], other + n)         # two processes see what one sees


def test_negatives_are_the_cells_and_contexts_that_the_definition_asks_for(dataset, panel):
    """The embeddings that the loss contrasts, recomputed one pair at a time."""
    config = tiny(rolls=2, batch_size=12, cells_per_context=2)
    model = build(dataset, panel, config)
    model.projection.double()
    control, c = contexts(dataset, panel, 6)
    x, seen = cells(dataset, 6, 2), {}

    def spy(e, other, condition, temperature):
        seen.update(e=e, other=other)
        return e.sum()
    original, ct.info_nce = ct.info_nce, spy
    try:
        ct.celltarnet_loss(model, x, control, control, c, torch.zeros_like(c), torch.arange(6), config)
    finally:
        ct.info_nce = original
    H = model.encode(control, c)
    for k in range(6):
        pairs = [x[k, 0], x[k, 1], *(x[seen["other"][r, k], 0] for r in range(2))]
        for i, cell in enumerate(pairs):
            e = torch.nn.functional.normalize(model.projection(model.flow(cell[None, None], H[k:k + 1])[0][0, 0]).float(), dim=-1)
            torch.testing.assert_close(seen["e"][k, i], e)


def test_one_condition_has_no_negatives():
    e = torch.nn.functional.normalize(torch.randn(4, 3, 5), dim=-1)
    assert info_nce(e, partners(4, 1), torch.zeros(4, dtype=torch.long), 0.1) == 0


def test_loss_is_the_likelihood_of_both_tasks(dataset, panel):
    config = tiny(contrast_weight=0.0, cells_per_context=4)
    model = build(dataset, panel, config)
    control, c = contexts(dataset, panel, 4)
    x, noisy = cells(dataset, 4, 4), control + torch.randn_like(control)
    null = torch.zeros_like(c)
    post, pre, contrast = ct.celltarnet_loss(model, x, control, noisy, c, null, torch.arange(4), config)
    expected = -model.flow(x, model.encode(noisy, c))[1].mean() / 40
    torch.testing.assert_close(post, expected)
    torch.testing.assert_close(pre, -model.flow(control[:, None], model.encode(noisy, null))[1].mean() / 40)
    assert contrast == 0 and model.projection is None
    post, pre, _ = ct.celltarnet_loss(model, x, control, noisy, c, null, torch.arange(4), tiny(contrast_weight=0.0, denoise_weight=0.0, cells_per_context=4))
    torch.testing.assert_close(post, expected)
    assert pre == 0


# ------------------------------------------------------------------------------------------------ sampling

def uncached(block, x, H):
    """The inverse by evaluating the whole block once per slot."""
    v, context = block.slots(x), block.context(H)
    u = torch.zeros_like(v)
    for t in range(v.shape[2]):
        mu, a = block.parameters_of(u, context)
        u[:, :, t] = v[:, :, t] * torch.exp(a[:, :, t]) + mu[:, :, t]
    return block.genes(u)


@pytest.mark.parametrize("options", [{}, {"patch": 3}, {"prior": "none"}])
def test_cached_equals_uncached_and_jacobi_with_all_sweeps(dataset, panel, options):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = build(dataset, panel, tiny(**options), dtype)
        H = model.encode(*contexts(dataset, panel, 3, dtype))
        for block in model.blocks:
            x = torch.randn(3, 2, 40 + model.padding, dtype=dtype)
            x[..., 40:] = 0
            cached = block.inverse(x, H)
            torch.testing.assert_close(cached, uncached(block, x, H), rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(block.jacobi(x, H, 0), cached, rtol=tolerance, atol=tolerance)
            assert cached[..., 40:].abs().sum() == 0


def test_jacobi_makes_a_slot_final_with_every_sweep_and_stops_at_its_tolerance(dataset, panel):
    model = build(dataset, panel, tiny(prior="none"))
    H, block = model.encode(*contexts(dataset, panel, 1)), build(dataset, panel, tiny(prior="none")).blocks[1]
    x = torch.randn(1, 1, 40, dtype=torch.float64)
    exact, v = block.slots(block.inverse(x, H)), block.slots(x)
    u = v.clone()
    for i in range(6):
        mu, a = block.parameters_of(u, block.context(H))
        u = v * torch.exp(a) + mu
        torch.testing.assert_close(u[:, :, :i + 1], exact[:, :, :i + 1], rtol=1e-9, atol=1e-9)
    calls, parameters_of = [], block.parameters_of
    block.parameters_of = lambda *a: calls.append(1) or parameters_of(*a)
    torch.testing.assert_close(block.jacobi(x, H, 1e-7), block.genes(exact), rtol=1e-4, atol=1e-4)
    assert 1 < len(calls) < 40


def test_sample_inverts_the_flow_and_removes_the_noise(dataset, panel):
    model, config = build(dataset, panel, tiny(), scale=0.05), tiny()
    control, c = contexts(dataset, panel, 3)
    x = cells(dataset, 3, 2)
    z, _ = model.flow(x, model.encode(control, c))
    got = sample(model, z, control, c, config)
    torch.testing.assert_close(got, torch.where(x < 0.2, 0, x), rtol=1e-8, atol=1e-8)
    jacobi = sample(model, z, control, c, tiny(decode="jacobi", jacobi_tol=0.0))
    torch.testing.assert_close(jacobi, got, rtol=1e-8, atol=1e-8)


def test_dequantised_zeros_come_back_as_zeros(dataset, panel):
    """At least 97 % of the zeros, and every other value within 3 sigma, but for one in 300 as of any Gaussian."""
    model, config = build(dataset, panel, tiny(), torch.float32, scale=0.05), tiny()
    control, c = contexts(dataset, panel, 20, torch.float32)
    clean = torch.from_numpy(dataset.X[dataset.fit_rows[:200]].toarray()).view(20, 10, -1)
    noisy = clean + config.dequantise * torch.randn(clean.shape)
    back = sample(model, model.flow(noisy, model.encode(control, c))[0], control, c, config)
    zero = clean == 0
    assert zero.float().mean() > 0.1
    assert (back[zero] == 0).float().mean() >= 0.97 and (back >= 0).all()
    assert back[zero].max() < 5.5 * config.dequantise
    assert ((back - clean)[~zero].abs() <= 3 * config.dequantise).float().mean() > 0.99


def test_cells_of_one_control_share_its_context(dataset, panel):
    """--samples-per-control: as many cells as asked for, from fewer controls."""
    config = tiny(samples_per_control=4)
    run = SimpleNamespace(config=config, panel=panel, device=torch.device("cpu"), bf16=False)
    model = build(dataset, panel, config, torch.float32)
    control = dataset.controls("test")[""][:10]
    got = ct.generate(model, run, "TF1", control, np.arange(0, 40, 2), 3)
    assert got.shape == (10, 20) and len(np.unique(got, axis=0)) == 10
    changed = control.copy()
    changed[3:] = 0                                                         # ten cells need three controls
    assert np.array_equal(got, ct.generate(model, run, "TF1", changed, np.arange(0, 40, 2), 3))


def test_chunks_change_nothing(dataset, panel, monkeypatch):
    config = tiny()
    run = SimpleNamespace(config=config, panel=panel, device=torch.device("cpu"), bf16=False)
    model = build(dataset, panel, config, torch.float32, scale=0.05)
    control = dataset.controls("test")[""][:9]
    whole = ct.generate(model, run, "TF1+TF2", control, np.arange(40), 3)
    monkeypatch.setattr(ct, "chunks_of", lambda run, n: 4)
    np.testing.assert_allclose(ct.generate(model, run, "TF1+TF2", control, np.arange(40), 3), whole, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------ conditions

def test_multi_hot_is_additive_and_knows_genes_doses_and_covariates():
    panel = data.Panel(["A", "B", "C"], [0], ["A", "B:1", "B:2", "X"], [0, 1, 1, -1], ["A"], {"type": ["t,1", "t2"], "donor": ["d"]})
    c = multi_hot(["A@d,t2", "A+X@d,t2"], data.Panel(**{**panel.__dict__, "covariates": {"donor": ["d"], "type": ["t,1", "t2"]}}))
    assert c.tolist() == [[1, 0, 0, 1, 0, 0, 0, 1, 0, 1], [1, 0, 0, 1, 0, 0, 1, 1, 0, 1]]
    plain = data.Panel(**{**panel.__dict__, "covariates": {}})
    a, b, ab, gene = multi_hot(["A", "B:2", "A+B:2", "C"], plain)
    assert torch.equal(a + b, ab) and b.tolist() == [0, 1, 0, 0, 0, 1, 0] and gene.tolist() == [0, 0, 1, 0, 0, 0, 0]
    comma = multi_hot(["A@d,t,1"], data.Panel(**{**panel.__dict__, "covariates": {"donor": ["d"], "type": ["t,1", "t2"]}}))
    assert comma[0, 7:].tolist() == [1, 1, 0]


def test_a_gene_never_perturbed_is_embedded_by_its_own_vector(dataset, panel):
    model = ct.CellTARNet(tiny(), panel, data.gene_statistics(dataset))
    control, _ = contexts(dataset, panel, 1, torch.float32)
    H = [model.encode(control, multi_hot([g], panel)) for g in ("GENE3", "GENE4", "TF1")]
    assert min((a - b).abs().max() for a, b in ((H[0], H[1]), (H[1], H[2]))) > 1e-3


# ------------------------------------------------------------------------------------------------ likelihood

def test_flow_fits_a_bimodal_conditional_density():
    """Two genes, y in {0, 1} as the control cell decides where the modes are; the truth is a mixture of two Gaussians."""
    torch.manual_seed(0)
    panel = data.Panel(["A", "B"], [0, 1], ["A"], [0], ["A"])
    config = tiny(layers=1, blocks=4, prior="none", contrast_weight=0.0, denoise_weight=0.0)
    model = ct.CellTARNet(config, panel, (torch.zeros(2), torch.full((2,), 3.0), torch.eye(2)))
    c, modes = multi_hot(["A"], panel), torch.tensor([[[-1.5, -1.5], [1.5, 1.5]], [[-1.5, 1.5], [1.5, -1.5]]])

    def truth(x, y):                                                        # (n, m, 2), (n,) -> (n, m)
        d = torch.distributions.Normal(modes[y][:, None], 0.5)              # (n, 1, 2 modes, 2 genes)
        return d.log_prob(x[:, :, None]).sum(-1).logsumexp(-1) - math.log(2)

    def draw(n, m):
        y = torch.arange(n) % 2
        mode = modes[y][:, None].expand(n, m, 2, 2).gather(2, torch.randint(2, (n, m, 1, 1)).expand(n, m, 1, 2))[:, :, 0]
        return mode + 0.5 * torch.randn(n, m, 2), y
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        x, y = draw(2, 128)
        loss = -model.flow(x, model.encode(y[:, None].float().expand(2, 2), c.expand(2, -1)))[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, y = draw(2, 4000)
    with torch.no_grad():
        H = model.encode(y[:, None].float().expand(2, 2), c.expand(2, -1))
        got, best = model.flow(x, H)[1].mean(), truth(x, y).mean()
        z = torch.randn(2, 2000, 2)
        new = sample(model, z, y[:, None].float().expand(2, 2), c.expand(2, -1), tiny(dequantise=1e-9))
    gaussian = -math.log(2 * math.pi * math.e) - 0.5 * math.log((1.5 ** 2 + 0.25) ** 2 - 1.5 ** 4)
    assert best - 0.2 < got < best + 0.05 and got > gaussian + 0.4, (got, best, gaussian)
    assert new.shape == (2, 2000, 2)


def test_score_is_the_likelihood_of_every_cell_under_every_condition(demo, call, tmp_path):
    folder = tmp_path / "run"
    assert call("celltarnet.py", "--data", demo, *TINY["celltarnet"], "--out", folder).returncode == 0
    ckpt = ["--ckpt", folder / "ckpt.pt", "--score", demo]
    done = call("celltarnet.py", *ckpt, "--predict", "TF1", "TF3+TF2", "GENE3", "--out", tmp_path / "s.h5ad")
    assert done.returncode == 0, done.stderr
    scores = data.read_cells(tmp_path / "s.h5ad", check=False)
    real = data.load(demo, data.DataConfig(), "additive")
    assert scores.genes == ["GENE3", "TF1", "TF2+TF3"] and scores.X.shape[0] == 560
    assert sorted(scores.condition) == sorted(c for g in real.groups for c in [g] * len(real.rows[g]))
    log_p = scores.X.toarray()
    assert np.isfinite(log_p).all() and list(scores.obs("best")) == [scores.genes[i] for i in log_p.argmax(1)]

    # one cell by hand: the mean of the density over the same controls, up to its noise
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    panel = data.Panel(**state["panel"])
    model = ct.load_model(Config(**state["config"]), panel, state["saved"]).eval()
    own = torch.from_numpy(data.pick_rows(real.controls("test")[""], 4, ct.seed_of("", 0)))
    x = torch.from_numpy(data.read_cells(demo).X.toarray())
    x = torch.log1p(1e4 * x / x.sum(1, keepdim=True)) + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = torch.stack([model.flow(x[None], model.encode(own[i:i + 1], multi_hot(["TF1"], panel)))[1][0].double().exp() for i in range(4)])
    np.testing.assert_allclose(p.mean(0).log(), log_p[:, 1], rtol=1e-3)

    some = data.read_cells(demo)
    some.take(np.arange(0, 560, 10))
    data.write_h5ad(tmp_path / "some.h5ad", some.X, {"condition": some.condition}, some.genes[::-1])
    ckpt[-1] = tmp_path / "some.h5ad"
    done = call("celltarnet.py", *ckpt, "--score-controls", 1, "--out", tmp_path / "all.h5ad")
    assert done.returncode == 0 and "cells of test conditions" in done.stdout and "40 conditions" in done.stdout
    few = call("celltarnet.py", *ckpt, "--predict", "NOGENE", "--out", tmp_path / "no.h5ad")
    assert few.returncode == 2 and "NOGENE" in few.stderr and not (tmp_path / "no.h5ad").exists()
    again = call("celltarnet.py", *ckpt, "--out", tmp_path / "all.h5ad")
    assert again.returncode == 2 and "exists" in again.stderr
    assert call("celltarnet.py", "--data", demo, *TINY["celltarnet"], "--score", demo, "--out", tmp_path / "x").returncode == 2
    data.write_h5ad(tmp_path / "thin.h5ad", np.ones((5, 3), np.float32), {}, ["TF1", "TF2", "TF3"])
    thin = call("celltarnet.py", "--ckpt", folder / "ckpt.pt", "--score", tmp_path / "thin.h5ad", "--out", tmp_path / "no.h5ad")
    assert thin.returncode == 2 and "lacks 37 of the 40 genes" in thin.stderr


# ------------------------------------------------------------------------------------------------ training

def test_denoising_task_sees_no_perturbation_and_keeps_covariates(tmp_path, monkeypatch):
    """What train() hands to the loss: null contexts without perturbation, the same covariates; distinct conditions."""
    data.simulate(tmp_path / "two.h5ad", cells=900, genes=40, cell_types=2)
    seen, original = [], ct.celltarnet_loss

    def spy(net, x, control, noisy, c, null, condition, config):
        seen.append((c.clone(), null.clone(), condition.clone(), (noisy - control).std().item()))
        return original(net, x, control, noisy, c, null, condition, config)
    monkeypatch.setattr(ct, "celltarnet_loss", spy)
    ct.main(["--data", str(tmp_path / "two.h5ad"), *TINY["celltarnet"], "--covariates", "cell_type", "--split", "transfer", "--steps", "3",
             "--out", str(tmp_path / "run")])
    for c, null, condition, noise in seen:
        assert (null[:, :-2] == 0).all() and torch.equal(null[:, -2:], c[:, -2:]) and (c[:, -2:].sum(1) == 1).all()
        assert (c[:, :-2].sum(1) >= 1).all() and 0.1 < noise
    assert len(seen) == 3


def test_batches_hold_distinct_conditions(demo, tmp_path, monkeypatch):
    picked, original = [], ct.celltarnet_loss
    monkeypatch.setattr(ct, "celltarnet_loss", lambda *a: picked.append(a[6]) or original(*a))
    ct.main(["--data", demo, *TINY["celltarnet"], "--batch-size", "32", "--steps", "4", "--out", str(tmp_path / "run")])
    assert all(len(p) == 16 and len(set(p.tolist())) == 16 for p in picked) and len(picked) == 4


def test_learning_rate_warms_up_and_ends_low():
    config = tiny(steps=100, warmup=10, lr=1.0, lr_min=0.01)
    rates = [ct.rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.01)
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)


@pytest.mark.parametrize("flags", [["--contrast-weight", "0", "--denoise-weight", "0"], ["--prior", "none", "--dtype", "bf16"],
                                   ["--prior", "sparse", "--patch", "3", "--decode", "jacobi"], ["--prior", "low-rank", "--rolls", "3"],
                                   ["--context-noise", "full", "--cells-per-context", "1", "--contrast-weight", "0"]])
def test_variants_run(flags, demo, call, tmp_path):
    done = call("celltarnet.py", "--data", demo, *TINY["celltarnet"], *flags, "--out", tmp_path / "run")
    assert done.returncode == 0 and "replicate" in done.stdout and not done.stderr, done.stderr


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "10"], "--batch-size 10"), (["--width", "15"], "--width 15"), (["--dequantise", "0"], "--dequantise"),
    (["--cells-per-context", "1"], "second cell"), (["--rolls", "0"], "--rolls"), (["--ema", "1"], "--ema"),
    (["--contrast-weight", "-1"], "--contrast-weight")])
def test_values_that_cannot_work_are_refused(flags, words, demo, call, tmp_path):
    done = call("celltarnet.py", "--data", demo, *TINY["celltarnet"], *flags, "--out", tmp_path / "run")
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "run").exists()
