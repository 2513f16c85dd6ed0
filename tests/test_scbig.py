"""scbig.py: the mathematics of its parts against slow plain formulas, the prior files, both stages."""
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import scipy
import torch
import torch.nn.functional as F

import data
import scbig
from conftest import ROOT, TINY
from scbig import Config


def tiny(**options):
    small = dict(width=16, layers=2, heads=2, hidden=32, latent=8, modules=4, inducing=3, ode_steps=3)
    return Config(**{**scbig.PRESETS["demo"], **small, **options})


class FakeRun:
    """What load_priors and predict need of a run."""

    def __init__(self, config, dataset, panel):
        self.config, self.dataset, self.panel = config, dataset, panel
        self.capped = 0
        self.device, self.said, self.rank = torch.device("cpu"), [], 1       # rank: only the first process writes

    def say(self, text):
        self.said.append(text)

    def compiled(self, function):
        return function

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


@pytest.fixture(scope="module")
def dataset(demo):
    return data.load(demo, tiny(), "additive")


@pytest.fixture(scope="module")
def panel(dataset):
    return dataset.panel()


def make(dataset, panel, seed=0, **options):
    config = tiny(**options)
    torch.manual_seed(seed)
    run = FakeRun(config, dataset, panel)
    return scbig.ScBIG(config, panel, scbig.load_priors(run)).eval(), run


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def error(done, *words):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, (done.returncode, done.stdout, done.stderr)
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr}"


def checkpoint(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------ transport

@pytest.mark.parametrize("far", [1, 30, 1000])
def test_sinkhorn_equals_updates_of_the_two_potentials(far):
    """In fp32, with given columns, and with a cell on either side that is far from all others, where the kernel form
    underflows."""
    cost = torch.rand(2, 8, 6, generator=torch.Generator().manual_seed(0))
    cost[0, 2] *= far
    cost[0, :, 3] *= far
    column = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.2, 0.1], dtype=torch.float64)
    kernel, f = -cost.double() / 0.05, torch.zeros(2, 8, 1, dtype=torch.float64)
    for _ in range(37):
        g = column.log() - (kernel + f).logsumexp(-2, keepdim=True)
        f = -math.log(8) - (kernel + g).logsumexp(-1, keepdim=True)
    got = scbig.sinkhorn(cost, 0.05, 37, column.float())
    torch.testing.assert_close(got.double(), (kernel + f + g).exp(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.full((2, 8), 1 / 8))


def test_sinkhorn_marginals_hold_however_small_epsilon():
    cost = torch.from_numpy(np.random.default_rng(0).random((2, 30, 20)) * 1e4)
    plan = scbig.sinkhorn(cost, torch.tensor([[[500.0]], [[50.0]]]), 1000)
    torch.testing.assert_close(plan.sum(-1), torch.full((2, 30), 1 / 30, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 20), 1 / 20, dtype=torch.float64), rtol=2e-2, atol=0)


def test_partners_become_the_optimal_assignment_as_epsilon_falls(monkeypatch):
    torch.manual_seed(0)
    z0, z1 = torch.randn(2, 12, 3, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    monkeypatch.setattr(scbig, "OT_ITERATIONS", 4000)
    got = scbig.ot_partners(z0, z1, torch.rand(2, 12, dtype=torch.float64), 1e-3)
    for c in range(2):
        _, best = scipy.optimize.linear_sum_assignment(torch.cdist(z0[c], z1[c]).square())
        torch.testing.assert_close(got[c], z1[c, best])


def test_partners_are_drawn_from_the_plan():
    """Frequencies of the partners of each control over many draws are the rows of the plan."""
    torch.manual_seed(0)
    z0, z1 = torch.randn(1, 4, 2), torch.randn(1, 4, 2)
    cost = torch.cdist(z0, z1).square()
    plan = scbig.sinkhorn(cost, 0.3 * cost.mean(), scbig.OT_ITERATIONS)[0] * 4
    partner = scbig.ot_partners(z0.expand(4000, -1, -1), z1.expand(4000, -1, -1), torch.rand(4000, 4), 0.3)
    count = (partner[:, :, None] == z1[0]).all(-1).float().sum(0)
    assert (count / 4000 - plan).abs().max() < 0.04
    assert (plan - 0.25).abs().max() > 0.1                                # the rows differ from a random draw


# ------------------------------------------------------------------------------------------------ modules

@pytest.mark.parametrize("genes, modules", [(40, 4), (43, 4), (17, 17), (30, 7), (9, 1), (205, 32)])
def test_module_sizes_differ_by_at_most_one(genes, modules):
    rng = np.random.default_rng(genes)
    vectors = torch.from_numpy(rng.normal(size=(genes, 6)).astype(np.float32)) ** 3
    graph = torch.from_numpy((rng.random((genes, genes)) < 0.1).astype(np.float32))
    label, changed = scbig.gene_modules(vectors, graph * graph.T, tiny(modules=modules))
    size = torch.bincount(label, minlength=modules)
    assert len(size) == modules and size.max() - size.min() <= 1 and size.sum() == genes and len(changed) == 3


def test_rounding_is_the_greedy_one():
    rng = np.random.default_rng(0)
    plan, cost = np.round(rng.random((23, 5)), 1), rng.random((23, 5))   # with ties in the plan
    capacity = np.array([5, 4, 5, 4, 5])
    pairs = sorted((-plan[i, k], cost[i, k], i, k) for i in range(23) for k in range(5))
    expected, room = {}, capacity.copy()
    for _, _, i, k in pairs:
        if i not in expected and room[k] > 0:
            expected[i] = k
            room[k] -= 1
    got = scbig.round_plan(torch.from_numpy(plan), torch.from_numpy(cost), torch.from_numpy(capacity))
    assert got.tolist() == [expected[i] for i in range(23)]


def rand_index(a, b):
    """Adjusted Rand index (Hubert and Arabie)."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    counts = (table.sum(1), table.sum(0), table, np.array(len(a)))
    rows, columns, cells, everything = ((x * (x - 1) / 2).sum() for x in counts)
    expected = rows * columns / everything
    return (cells - expected) / ((rows + columns) / 2 - expected)


def test_interactions_pull_genes_together():
    """Random vectors and a graph of four cliques: the modules are the cliques only if the graph counts."""
    torch.manual_seed(0)
    clique = torch.arange(40) % 4
    graph = (clique[:, None] == clique).float() - torch.eye(40)
    vectors = torch.randn(40, 30) + 0.5 * F.one_hot(clique, 30)
    with_graph, without = (scbig.gene_modules(vectors, graph, tiny(ppi_weight=w))[0].numpy() for w in (5, 0))
    assert rand_index(with_graph, clique.numpy()) > 0.8 > rand_index(without, clique.numpy())


def test_kmeans_keeps_its_best_start():
    x, spread = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), {}
    for starts in (1, 10):
        label = scbig.kmeans(x, 6, seed=1, restarts=starts)
        spread[starts] = sum((x[label == k] - x[label == k].mean(0)).square().sum() for k in label.unique())
    assert spread[10] < spread[1]


def test_modules_recover_planted_programs_better_than_kmeans(tmp_path):
    """The simulator's programs, by its own first draws: a gene's is the one with the largest effect."""
    rng, P = np.random.default_rng(0), 16
    effect = np.abs(rng.normal(0, 0.7, (P // 4, 120)) * (rng.random((P // 4, 120)) < 0.25))
    genes, program = np.flatnonzero((effect[:, P:] > 0).any(0)) + P, effect.argmax(0)
    data.simulate(tmp_path / "d.h5ad", seed=0)
    config = tiny(modules=8, min_cells=0)
    dataset = data.load(tmp_path / "d.h5ad", config, "additive")
    run = FakeRun(config, dataset, None)
    corr = data.gene_statistics(dataset)[2]
    vectors, graph, score = scbig.gene_vectors(run, corr), scbig.interaction_graph(run, corr), {}
    for name in ("grc", "kmeans", "unordered"):
        label = scbig.gene_modules(vectors, graph, tiny(modules=8, clustering=name))[0].numpy()
        score[name] = rand_index(label[genes], program[genes])
    assert score["grc"] > score["kmeans"] + 0.1 and score["kmeans"] > score["unordered"]


def test_co_expression_graph_is_mutual_neighbours_by_partial_correlation(dataset, panel):
    graph = scbig.interaction_graph(FakeRun(tiny(), dataset, panel), data.gene_statistics(dataset)[2], neighbours=4)
    x = dataset.X[dataset.fit_rows].toarray().astype(np.float64)
    z = (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)
    total = z.sum(1)
    residual = z - np.outer(total, total @ z / (total @ total))
    with np.errstate(invalid="ignore"):
        corr = np.abs(np.nan_to_num(np.corrcoef(residual.T)))
    np.fill_diagonal(corr, 0)
    near = [set(np.argsort(-row)[:4]) for row in corr]
    expected = np.array([[i in near[j] and j in near[i] for j in range(len(corr))] for i in range(len(corr))])
    assert (graph.numpy().astype(bool) == expected).mean() > 0.999 and graph.sum() > 40
    assert torch.equal(graph, graph.T) and graph.diagonal().sum() == 0


def test_priors_see_no_test_cell(demo):
    """Test cells shuffled within each gene: modules, vectors, graph, mean and pathways stay the same to the bit."""
    priors = []
    for spoil in (False, True):
        dataset = data.load(demo, tiny(), "additive")
        if spoil:
            X, rng = dataset.X.tolil(), np.random.default_rng(0)
            for group in dataset.part("test") + dataset.part("val"):
                rows = dataset.rows[group]
                X[rows] = rng.permuted(X[rows].toarray(), axis=1)
            dataset.source.X = X.tocsr()
        torch.manual_seed(0)
        priors.append(scbig.load_priors(FakeRun(tiny(), dataset, dataset.panel())))
    assert all(torch.equal(priors[0][k], priors[1][k]) for k in priors[0])


# ------------------------------------------------------------------------------------------------ autoencoder

@pytest.mark.parametrize("clustering", ["grc", "kmeans", "unordered"])
def test_token_k_is_module_k(dataset, panel, clustering):
    """A gene moves the token of its own module alone, and every gene comes back from its own place."""
    model, _ = make(dataset, panel, clustering=clustering, modules=5)
    ae, x = model.autoencoder, torch.rand(2, len(panel.genes))
    before = ae.tokens(x)
    for gene in range(len(panel.genes)):
        changed = x.clone()
        changed[:, gene] += 1
        moved = (ae.tokens(changed) - before).abs().sum((0, 2)) > 1e-6
        assert moved.nonzero().flatten().tolist() == [int(ae.module_of[gene])]
    padded = torch.full((len(ae.gather),), -1.0)
    padded[ae.place] = torch.arange(len(panel.genes)).float()
    filled = ae.gather < len(panel.genes)
    assert torch.equal(padded[filled], ae.gather[filled].float())


def test_the_encoder_sees_what_differs_from_the_mean(dataset, panel):
    autoencoder = make(dataset, panel)[0].autoencoder
    expected = autoencoder.embed.bias + autoencoder.identity[0](autoencoder.module_vectors)
    torch.testing.assert_close(autoencoder.tokens(autoencoder.mean[None])[0], expected)


def test_numbering_of_modules_does_not_matter(dataset, panel):
    model, run = make(dataset, panel)
    ae, order = model.autoencoder, torch.tensor([2, 0, 3, 1])            # new number k was old number order[k]
    priors = {"module_of": order.argsort()[ae.module_of], "module_vectors": ae.module_vectors[order], "mean": ae.mean}
    other = scbig.Autoencoder(run.config, priors).eval()
    state = {k: v for k, v in ae.state_dict().items() if k not in ("module_of", "module_vectors")}
    other.load_state_dict(state, strict=False)
    x, z = torch.rand(3, len(panel.genes)), torch.randn(3, 8)
    torch.testing.assert_close(other.encode(x), ae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.decode(z), ae.decode(z), rtol=1e-4, atol=1e-5)


def test_attention_is_its_formula():
    torch.manual_seed(0)
    a, x, y = scbig.Attention(12, 3), torch.randn(1, 4, 12), torch.randn(2, 5, 12)
    expected = torch.zeros(2, 4, 12)
    k, v = a.kv(y).chunk(2, -1)
    for h in range(3):
        s = slice(4 * h, 4 * h + 4)
        w = torch.softmax(a.q(x)[..., s] @ k[..., s].transpose(1, 2) / 2, -1)
        expected[..., s] = w @ v[..., s]
    torch.testing.assert_close(a(x, y), a.out(expected))


@pytest.mark.parametrize("encoder", ["gcae", "transformer"])
def test_a_layer_is_its_formula(encoder):
    """Equation 3, post-norm: what attends is added to, then normalised."""
    torch.manual_seed(0)
    block, h = scbig.Block(tiny(encoder=encoder)).eval(), torch.randn(2, 4, 16)

    def norm(x):
        return torch.nn.functional.layer_norm(x, (16,), eps=1e-6)
    u = h
    if encoder == "gcae":
        points = block.points.expand(2, -1, -1)
        u = norm(points + block.compress(points, h))
        u = norm(u + block.process(u, u))
    expected = norm(h + block.broadcast(h, u))
    first, gelu, _, last, _ = block.mlp
    torch.testing.assert_close(block(h), norm(expected + last(gelu(first(expected)))))


def test_modules_speak_only_through_the_inducing_points(dataset, panel):
    """With the compressed state cut off, a module's token after a block depends on itself alone."""
    model, _ = make(dataset, panel)
    block, h = model.autoencoder.encoder[0], torch.randn(1, 4, 16)
    torch.nn.init.zeros_(block.compress.out.weight)
    other = h.clone()
    other[:, 2] += 1
    moved = (block(other) - block(h)).abs().sum((0, 2)) > 1e-6
    assert moved.tolist() == [False, False, True, False]


# ------------------------------------------------------------------------------------------------ flow

def conditions(model, run, groups):
    return model.flow.condition(*scbig.slots(groups, run.panel, run.config))


def test_slot_order_does_not_matter(dataset, panel):
    model, run = make(dataset, panel, effect_readout=True)
    torch.nn.init.normal_(model.flow.effect)
    for c in conditions(model, run, ["TF1+TF2", "TF2+TF1", "TF1+TF3", "TF1", "TF1+TF2+TF3", "TF3+TF1+TF2"]):
        torch.testing.assert_close(c[0], c[1])
        torch.testing.assert_close(c[4], c[5])
        assert min((c[i] - c[j]).abs().max() for i, j in ((0, 2), (0, 3), (0, 4))) > 1e-3


def test_an_empty_slot_weighs_nothing_wherever_it_is(dataset, panel):
    model, run = make(dataset, panel, effect_readout=True)
    torch.nn.init.normal_(model.flow.effect)
    token, mask, dose, covariates = scbig.slots(["TF1"], panel, run.config)
    alone, junk = conditions(model, run, ["TF1"]), torch.where(mask, token, 7)
    flipped = model.flow.condition(junk.flip(1), mask.flip(1), dose, covariates)
    single = model.flow.condition(token[:, :1], mask[:, :1], dose[:, :1], covariates)
    for i in range(2):
        torch.testing.assert_close(flipped[i], alone[i])
        torch.testing.assert_close(single[i], alone[i])


def test_pooling_is_its_formula(dataset, panel):
    model, run = make(dataset, panel)
    flow, (token, *_) = model.flow, scbig.slots(["TF1+TF2"], panel, run.config)
    k, v = flow.kv(flow.pert_vectors[token[0]]).chunk(2, -1)
    pooled = []
    for h in range(8):
        s = slice(8 * h, 8 * h + 8)
        pooled.append(torch.softmax(k[:, s] @ flow.query[s] / 8, 0) @ v[:, s])
    torch.testing.assert_close(conditions(model, run, ["TF1+TF2"])[0][0], flow.pooled(torch.cat(pooled)))


def test_a_dose_modulates_the_vector_of_its_perturbation(dataset, panel):
    flow = make(dataset, panel, dose_key="dose")[0].flow
    token, dose = torch.tensor([0, 1]), torch.tensor([0.3, -1.0])
    scale, shift = flow.dose(dose[:, None]).chunk(2, dim=1)
    a = flow.norm(flow.embed(flow.pert_vectors[token]) * (1 + 0.5 * torch.tanh(scale)) + dose[:, None] * shift)
    k, v = flow.kv(a).chunk(2, dim=1)
    weight = torch.softmax((k * flow.query).view(2, 8, 8).sum(2) / 8, dim=0)             # (slots, heads)
    expected = flow.pooled((weight[..., None] * v.view(2, 8, 8)).sum(0).flatten())
    got = flow.condition(token[None], torch.ones(1, 2, dtype=torch.bool), dose[None], torch.zeros(1, 0))[0][0]
    torch.testing.assert_close(got, expected)


def test_linear_effects_add_up_and_start_at_zero(dataset, panel):
    model, run = make(dataset, panel, effect_readout=True)
    groups = ["TF1", "TF2", "TF1+TF2"]
    assert conditions(model, run, groups)[1].abs().max() == 0 and model.flow.effect.requires_grad
    torch.nn.init.normal_(model.flow.effect)
    _, effect = conditions(model, run, groups)
    torch.testing.assert_close(effect[0] + effect[1], effect[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(effect[0, 0], model.flow.pert_vectors[panel.genes.index("TF1")] @ model.flow.effect)
    z, t, told = torch.randn(3, 5, 8), torch.rand(3, 5), scbig.slots(groups, panel, run.config)
    v, end = model.flow(z, t, told, 1.0, z, torch.arange(3))
    with torch.no_grad():
        model.flow.effect.zero_()
    without, _ = model.flow(z, t, told, 1.0, z, torch.arange(3))
    torch.testing.assert_close(v - without, effect.expand(-1, 5, -1), rtol=1e-4, atol=1e-4)
    assert make(dataset, panel, effect_readout=False)[0].flow.effect is None    # the paper's


def test_a_missing_embedding_is_not_no_perturbation(dataset, panel, tmp_path):
    names = [g for g in panel.genes if g not in ("TF2", "TF3")]
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(size=(len(names), 6)), np.zeros((1, 6))]).astype(np.float32)
    np.savez(tmp_path / "p.npz", names=np.array(names + ["TF3"]), emb=vectors)           # TF3: zeros, as in some files
    model, run = make(dataset, panel, pert_embeddings=str(tmp_path / "p.npz"))
    c, _ = conditions(model, run, ["TF1", "TF1+TF2", "TF1+TF3", "TF2", "TF3"])
    assert min((c[i] - c[j]).abs().max() for i in range(5) for j in range(i)) > 1e-3
    assert any("14 of 16 perturbations" in text for text in run.said)
    c.sum().backward()
    learned = model.flow.learned.grad[model.flow.pert_learned[[panel.genes.index(g) for g in ("TF2", "TF3")]]]
    assert (learned.abs().sum(1) > 0).all()


def test_what_nothing_is_known_of_is_an_average_perturbation(dataset, panel):
    """Neither an embedding nor a training condition: the trained ones' mean vector, hence their mean linear effect."""
    from dataclasses import replace
    other = replace(panel, perturbations=["DRUG", "NEW", "TF1"], pert_gene=[-1, -1, 0], trained=["DRUG", "TF1"])
    model, run = make(dataset, other, effect_readout=True)
    torch.nn.init.normal_(model.flow.effect)
    effect = conditions(model, run, ["DRUG", "NEW", "TF1"])[1]
    torch.testing.assert_close(effect[1], (effect[0] + effect[2]) / 2, rtol=1e-4, atol=1e-4)
    assert len(model.flow.learned) == 1 and (effect[0] - effect[2]).abs().max() > 0.1
    assert any("1 perturbations have neither an embedding nor a training condition (NEW)" in text for text in run.said)


def test_first_joint_layer_is_split_by_input(dataset, panel):
    model, run = make(dataset, panel)
    flow, z, t = model.flow, torch.randn(2, 3, 8), torch.rand(2, 3)
    c, _ = conditions(model, run, ["TF1", "TF1+TF2"])
    state = F.silu(flow.state[1](F.silu(flow.state[0](z))))
    angle = 10 * t[..., None] * 10 ** (-torch.arange(512) / 512)
    time = flow.time_mlp(torch.cat([angle.cos(), angle.sin()], -1))
    weight = torch.cat([flow.join_time.weight, flow.join_state.weight, flow.join_condition.weight], 1)
    joined = torch.cat([time, state, c[:, None].expand(-1, 3, -1)], -1)
    expected = flow.out(F.silu(flow.joint(F.silu(F.linear(joined, weight, flow.join_time.bias)))))
    got, _ = flow(z, t, scbig.slots(["TF1", "TF1+TF2"], panel, run.config), 1.0, z, torch.arange(2))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_midpoint_rule_agrees_with_a_fine_integration(dataset, panel):
    model, run = make(dataset, panel)
    z, c, ends = torch.randn(2, 5, 8), conditions(model, run, ["TF1", "TF1+TF2"]), {}
    for steps in (10, 20, 160):
        model.flow.steps = steps
        ends[steps] = model.flow.integrate(z, *c)
    coarse, fine = ((ends[s] - ends[160]).norm() / (ends[160] - z).norm() for s in (10, 20))
    assert fine < 0.05 and fine < coarse / 2                              # second order


def test_batch_of_conditions_is_the_mean_of_its_conditions(dataset, panel):
    model, run = make(dataset, panel)
    z, t, u = torch.randn(4, 6, 8), torch.rand(4, 6), torch.randn(4, 6, 8)
    told = scbig.slots(["TF1", "TF1+TF2", "TF3", "TF4"], panel, run.config)

    def gradient(rows):
        model.zero_grad()
        v, _ = model.flow(z[rows], t[rows], [a[rows] for a in told], 1.0, z[:0], torch.zeros(0, dtype=torch.long))
        (v - u[rows]).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.flow.parameters() if p.grad is not None])
    micro = torch.stack([gradient([i]) for i in range(4)]).mean(0)
    torch.testing.assert_close(gradient([0, 1, 2, 3]), micro, rtol=1e-3, atol=1e-6)


def test_dropout_is_off_in_the_structure_losses(dataset, panel):
    model, run = make(dataset, panel, dropout=0.5)
    told, z = scbig.slots(["TF1", "TF2"], panel, run.config), torch.randn(2, 6, 8)
    model.train()
    a, b = (model.flow(z, torch.rand(2, 6), told, torch.zeros(2, 256), z[:1], torch.tensor([1])) for _ in range(2))
    assert torch.equal(a[1], b[1]) and not torch.equal(a[0], b[0])
    c, effect = model.flow.condition(*told)
    torch.testing.assert_close(a[1], model.flow.integrate(z[:1], c[1:], effect[1:]))


def test_the_network_compiles_without_graph_breaks(dataset, panel):
    """The graphs that inductor would get: one of each stage; sampling's is part of the second."""
    model, run = make(dataset, panel, effect_readout=True, layers=1, ode_steps=1)
    told, z, x = scbig.slots(["TF1", "TF2"], panel, run.config), torch.randn(2, 6, 8), torch.rand(3, len(panel.genes))
    for module, args in ((model.autoencoder, (x,)), (model.flow, (z, torch.rand(2, 6), told, 1.0, z, torch.arange(2)))):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), module(*args))


# ------------------------------------------------------------------------------------------------ structure losses

def test_correlation_is_that_of_module_means():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(2, 50, 12)), np.arange(12) % 4
    member = np.eye(4)[label] / 3
    other = rng.normal(size=(2, 40, 12))
    both = [[np.corrcoef((cells @ member).T) for cells in part] for part in (x, other)]
    expected = np.mean([np.linalg.norm(a - b) / 4 for a, b in zip(*both)])
    loss = scbig.correlation_loss(*map(torch.from_numpy, (x, other, member)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert scbig.correlation_loss(*map(torch.from_numpy, (x, x, member))).item() == 0


def test_constant_modules_give_finite_gradients():
    x = torch.zeros(1, 8, 6, requires_grad=True)
    scbig.correlation_loss(x, torch.rand(1, 8, 6), torch.eye(6)).backward()
    assert x.grad.isfinite().all()


def test_structure_losses_are_fp32_inside_autocast():
    torch.manual_seed(0)
    pred, real, weights = torch.rand(1, 8, 6), torch.rand(1, 8, 6), torch.rand(6, 6)
    z0, z1, u = torch.randn(1, 99, 6), torch.randn(1, 99, 6), torch.rand(1, 99)

    def results():
        partners = scbig.ot_partners(z0, z1, u, 0.1)
        return scbig.correlation_loss(pred, real, weights), scbig.pathway_loss(pred, real, weights), partners.sum()
    outside = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert results() == outside


def test_pathway_loss_grows_with_the_shift_where_the_kernel_form_underflows():
    rng = np.random.default_rng(0)
    real = rng.normal(0, 1, (64, 40)).astype(np.float32)
    pathways = (rng.random((30, 40)) < 0.2).astype(np.float32)
    pathways /= pathways.sum(1, keepdims=True)
    direction = np.abs(rng.normal(size=40)).astype(np.float32)
    ours, official = [], []
    for shift in (0, 0.5, 1, 2, 4, 8):
        pred = real[::-1].copy() + shift * direction
        ours.append(scbig.pathway_loss(*map(torch.from_numpy, (pred[None], real[None], pathways))).item())
        cost = scipy.spatial.distance.cdist(pred @ pathways.T, real @ pathways.T, "sqeuclidean")
        kernel = np.exp(-cost / 0.1).astype(np.float32)
        u = np.ones(64, np.float32)
        for _ in range(50):                                               # official: the cost unscaled, in float32
            v = (1 / 64) / (kernel.T @ u + 1e-8)
            u = (1 / 64) / (kernel @ v + 1e-8)
        official.append(float((u[:, None] * kernel * v * cost).sum() / 30))
    assert all(b > a for a, b in zip(ours, ours[1:])) and ours[-1] > 20 * ours[0]
    assert official[-1] < 1e-3 < ours[0]


def test_pathway_loss_has_the_gradient_of_the_entropic_value():
    torch.manual_seed(0)
    pred = torch.randn(1, 5, 6, dtype=torch.float64, requires_grad=True)
    real, pathways = torch.randn(1, 7, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64)
    scbig.pathway_loss(pred, real, pathways, epsilon=0.3, iterations=500).backward()

    def cost(x):
        return torch.cdist(x @ pathways.T, real @ pathways.T).square() / 4
    epsilon = 0.3 * cost(pred.detach()).mean()
    step = 1e-4 * torch.eye(30, dtype=torch.float64).view(30, 5, 6)
    moved = cost(torch.cat([pred.detach() + step, pred.detach() - step]))
    plan = scbig.sinkhorn(moved, epsilon, 500)
    up, down = (plan * moved + epsilon * plan * plan.log()).sum((1, 2)).chunk(2)
    torch.testing.assert_close(pred.grad[0].flatten(), (up - down) / 2e-4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("residual", [False, True])
def test_the_objective_of_a_step_is_one_graph_and_the_sum_of_its_parts(residual, dataset, panel):
    """Compiled without a break, partners and decoder included, the loss is the same and moves the flow alone."""
    model, run = make(dataset, panel, sigma=0.3, dropout=0.0, condition_dropout=0.0)
    objective, flow = scbig.Objective(model, run.config), model.flow
    told, chosen = scbig.slots(["TF1", "TF2", "TF1+TF3"], panel, run.config), torch.tensor([0, 2])
    z0, z1 = torch.randn(2, 3, 5, 8)
    start, real = torch.randn(2, 6, 8), torch.rand(2, 6, len(panel.genes))
    given = z0, z1, told, 1.0, start, real, torch.rand(12, len(panel.genes)) if residual else None, chosen
    torch.manual_seed(1)
    loss, *parts = objective(*given).values()
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(objective, backend="eager", fullgraph=True)(*given)["loss"], loss)

    torch.manual_seed(1)
    t, u = torch.rand(2, 3, 5)
    partner = scbig.ot_partners(z0, z1, u, run.config.ot_epsilon)
    between = torch.lerp(z0, partner, t[..., None]) + 0.3 * torch.randn(3, 5, 8)         # --sigma
    v, end = flow(between, t, told, 1.0, start, chosen)
    pred = scbig.decode(model.autoencoder, start.flatten(0, 1), end.flatten(0, 1), given[6]).unflatten(0, (2, 6))
    member = F.one_hot(model.autoencoder.module_of).float()
    expected = [F.mse_loss(v, partner - z0), scbig.correlation_loss(pred, real, member / member.sum(0)),
                scbig.pathway_loss(pred, real, model.pathways, 0.1, run.config.path_iterations)]
    torch.testing.assert_close(parts, expected)
    torch.testing.assert_close(loss, expected[0] + 0.1 * expected[1] + 0.1 * expected[2])
    loss.backward()
    assert all(p.grad is None for p in [*model.autoencoder.parameters(), *objective.autoencoder.parameters()])
    assert flow.out.weight.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------ prior files

def write_vectors(path, vectors):
    """{name: numbers} as .npz, .pt, .tsv, .csv or .tsv.gz."""
    if path.suffix == ".npz":
        np.savez(path, names=np.array(list(vectors)), emb=np.array(list(vectors.values()), np.float32))
    elif path.suffix == ".pt":
        torch.save({k: torch.tensor(v) for k, v in vectors.items()}, path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        text = "".join(f"{name}{mark}{mark.join(map(str, v))}\n" for name, v in [("name", "xy"), *vectors.items()])
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("kind", ["npz", "pt", "tsv", "csv", "tsv.gz"])
def test_vectors_in_every_format(kind, tmp_path):
    path = tmp_path / f"v.{kind}"
    write_vectors(path, {"Abc": [1.0, 2.5], "DEF": [-3.0, 0.25], "zero": [0.0, 0.0]})
    vectors, known = data.aligned_vectors(str(path), ["def", "Zero", "abc", "other"])
    assert known.tolist() == [True, False, True, False]
    assert vectors.tolist() == [[-3.0, 0.25], [0, 0], [1.0, 2.5], [0, 0]]


@pytest.mark.parametrize("kind", ["gmt", "gmt.gz", "gmt.zip"])
def test_pathways_in_every_format(kind, tmp_path):
    text, path = "One\tR-1\tA\tb\tC\n\nTwo\tR-2\tB\t\n", tmp_path / f"p.{kind}"
    if kind == "gmt.zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("p.gmt", text)
    else:
        path.write_bytes(gzip.compress(text.encode()) if kind == "gmt.gz" else text.encode())
    assert data.read_gmt(str(path)) == {"One": {"A", "B", "C"}, "Two": {"B"}}


def test_interactions_in_every_format(tmp_path):
    info = "#string_protein_id\tpreferred_name\tsize\n9606.P1\tTP53\t393\n9606.P2\tMdm2\t491\n9606.P3\tEGFR\t9\n"
    (tmp_path / "info.txt").write_text(info)
    links = "protein1 protein2 combined_score\n9606.P1 9606.P2 999\n9606.P2 9606.P1 999\n"
    links += "9606.P1 9606.P3 699\n9606.P2 9606.P3 700\n"
    (tmp_path / "links.txt.gz").write_bytes(gzip.compress(links.encode()))
    genes, expected, said = ["EGFR", "TP53", "MDM2"], [[0, 0, 1], [0, 0, 1], [1, 1, 0]], []
    links, info = str(tmp_path / "links.txt.gz"), str(tmp_path / "info.txt")
    assert data.gene_graph(links, info, genes, said.append).tolist() == expected
    scored = "a,b,score\nTP53,MDM2,0.9\nMDM2,TP53,0.7\nMDM2,EGFR,1\nTP53,EGFR,0.69\n"
    for text in ("tp53\tmdm2\nmdm2\ttp53\nmdm2\tegfr\n", scored):
        (tmp_path / "edges.txt").write_text(text)
        assert data.gene_graph(str(tmp_path / "edges.txt"), "", genes, said.append).tolist() == expected


NAMES = [f"TF{i}" for i in range(1, 17)] + [f"GENE{i}" for i in range(1, 25)]      # the demo's genes


@pytest.mark.parametrize("flag, name, content, words", [
    ("--gene-embeddings", "v.pt", {"A": [1.0], "B": [1.0, 2.0]}, ["cannot be read"]),
    ("--gene-embeddings", "v.npz", {"A": [1.0, np.nan]}, ["NaN"]),
    ("--gene-embeddings", "v.tsv", "gene\tx\ty\nA\t1\t2\nB\t1\n", ["v.tsv", "line 3", "numbers"]),
    ("--gene-embeddings", "v.tsv", "A\t1\t2\nB\t1\tx\n", ["line 2"]),
    ("--gene-embeddings", "v.tsv", "A\t1\tnan\n", ["NaN"]),
    ("--gene-embeddings", "v.tsv", "\n", ["v.tsv", "cannot be read"]),
    ("--gene-embeddings", "v.npz", "text", ["v.npz", "cannot be read", "names"]),
    ("--pert-embeddings", "v.pt", "text", ["v.pt", "cannot be read"]),
    ("--pert-embeddings", "v.pt", "", ["v.pt", "cannot be read"]),
    ("--ppi", "p.txt", "A B 900\nA\n", ["p.txt", "line 2"]),
    ("--ppi", "p.txt", "a b score\nA B high\n", ["line 2"]),
    ("--pathways", "p.gmt", "One\tR-1\tA\nTwo\tR-2\n", ["p.gmt", "line 2"]),
    ("--pathways", "p.gmt.gz", "no gzip", ["p.gmt.gz", "cannot be read"]),
    ("--pathways", "p.gmt.zip", "no zip", ["p.gmt.zip", "cannot be read"]),
    ("--pathways", "absent.gmt", None, ["absent.gmt", "cannot be read"]),
    ("--pathways", "p.gmt", "One\tR-1\tMOUSEGENE\tTF1\tTF2\n", ["knows only 2 of 40 genes"]),
    ("--gene-embeddings", "v.npz", {"TF1": [1.0, 2.0], "TF2": [1.0, 3.0]}, ["knows only 2 of 40 genes"]),
    ("--pert-embeddings", "v.pt", {"TF1": [1.0, 2.0], "TF2": [1.0, 3.0]}, ["knows only 2 of 16 perturbations"]),
    ("--ppi", "p.txt", "9606.P1 9606.P2 900\n", ["knows only 0 of 40 genes", "protein.info"]),
    ("--ppi", "p.txt", "", ["knows only 0 of 40 genes"]),
    ("--ppi", "p.txt", "".join(f"{g} {g} 900\n" for g in NAMES), ["knows only 0 of 40 genes"]),
    ("--ppi", "p.txt", "".join(f"9606.{a} {b} 900\n" for a, b in zip(NAMES, NAMES[1:])), ["knows only 0 of 40 genes"]),
    ("--pathways", "p.gmt", "", ["knows only 0 of 40 genes"]),
    ("--pert-embeddings", "v.npz", {"TF1": [0.0, 0.0]}, ["knows only 0 of 16 perturbations"]),
])
def test_bad_prior_files_are_one_clear_line(flag, name, content, words, dataset, panel, tmp_path):
    path = tmp_path / name
    if isinstance(content, dict):
        write_vectors(path, content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(data.DataError) as caught:
        make(dataset, panel, **{flag[2:].replace("-", "_"): str(path)})
    for word in (name, *words):
        assert word in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_objects_are_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))
    torch.save({"A": Evil()}, tmp_path / "v.pt")
    np.savez(tmp_path / "v.npz", names=np.array(["A"], dtype=object), emb=np.array([Evil()], dtype=object))
    for name in ("v.pt", "v.npz"):
        with pytest.raises(data.DataError, match="no pickled objects"):
            data.aligned_vectors(str(tmp_path / name), ["A"])
    assert not (tmp_path / "owned").exists()


def test_genes_that_the_embedding_file_lacks_get_vectors_of_their_own(dataset, panel, tmp_path):
    """Fitted from expression by ridge, never zero: where the file is a linear map of these vectors they are
    recovered."""
    torch.manual_seed(0)
    plain = scbig.gene_vectors(FakeRun(tiny(), dataset, panel), data.gene_statistics(dataset)[2])
    own = plain @ torch.randn(plain.shape[1], 3) * 10
    np.savez(tmp_path / "v.npz", names=np.array(panel.genes[:36]), emb=own[:36].numpy())
    model, run = make(dataset, panel, gene_embeddings=str(tmp_path / "v.npz"))
    assert any("36 of 40 genes" in text for text in run.said)
    got = model.flow.pert_vectors
    unit = own / own.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(got[:36], unit[:36], rtol=1e-4, atol=1e-5)
    assert (F.cosine_similarity(got[36:], unit[36:]) > 0.3).float().mean() >= 0.5 and got.abs().sum(1).min() > 0
    centred = own[:36] - own[:36].mean(0)
    fitted = own[:36].mean(0) + plain[36:] @ torch.linalg.lstsq(
        torch.cat([plain[:36], torch.eye(plain.shape[1])]), F.pad(centred, (0, 0, 0, plain.shape[1]))).solution
    torch.testing.assert_close(F.normalize(got[36:40], dim=1), F.normalize(fitted, dim=1), rtol=1e-3, atol=1e-3)


def test_pathways_default_to_clusters_and_small_sets_are_left_out(dataset, panel, tmp_path):
    model, _ = make(dataset, panel)
    assert len(model.pathways) > 8 and torch.allclose(model.pathways.sum(1), torch.ones(len(model.pathways)))
    lines = [f"P{i}\tx\t" + "\t".join(panel.genes[5 * i:5 * i + n]) for i, n in enumerate((5, 5, 3, 2, 1, 5))]
    (tmp_path / "p.gmt").write_text("\n".join(lines))
    model, _ = make(dataset, panel, pathways=str(tmp_path / "p.gmt"))
    assert (model.pathways > 0).sum(1).tolist() == [5, 5, 3, 5]


# ------------------------------------------------------------------------------------------------ covariates and doses

def test_covariates_are_one_hot_and_unknown_ones_zero(panel):
    from dataclasses import replace
    panel = replace(panel, covariates={"cell": ["a", "b"], "donor": ["d1", "d2", "x"]})
    *_, covariates = scbig.slots(["TF1@b,d1", "TF1@a,x", "TF1@c,d2", "TF1"], panel, tiny())
    assert covariates.int().tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]


def test_doses_share_the_embedding_of_their_drug(call, tmp_path):
    rng, drugs = np.random.default_rng(0), ["X-1", "Y", "Z"]
    label = np.repeat(["control", *drugs], 40)
    dose = np.where(label == "control", 0, rng.choice([10.0, 1000.0], 160))
    strong = (label[:, None] == np.array(drugs * 10)) * (dose > 100)[:, None]
    X = rng.poisson(3 + 9.0 * strong).astype(np.float32)
    obs = {"condition": label.astype(object), "dose": dose}
    data.write_h5ad(tmp_path / "d.h5ad", X, obs, [f"G{i}" for i in range(30)])
    (tmp_path / "s.json").write_text(json.dumps({"test": ["X-1:1000"]}))
    out = ok(call("scbig.py", "--data", tmp_path / "d.h5ad", *TINY["scbig"], "--split", tmp_path / "s.json",
                  "--dose-key", "dose", "--out", tmp_path / "run"))
    assert "nor a training condition" not in out                         # another dose of the drug is in training
    state = checkpoint(tmp_path / "run")
    config, panel = Config(**state["config"]), data.Panel(**state["panel"])
    token, mask, amount, _ = scbig.slots(["X-1:10", "X-1:1000", "Y:10"], panel, config)
    assert token[0, 0] == token[1, 0] != token[2, 0] and scbig.token_table(panel, config)[0][30:] == drugs
    assert amount[:, 0].tolist() == pytest.approx([math.log(11) / math.log(1001), 1, math.log(11) / math.log(1001)])
    flow = data.load_model(scbig, tmp_path / "run" / "ckpt.pt")[1].flow
    c, _ = flow.condition(token, mask, amount, torch.zeros(3, 0))
    assert (c[0] - c[1]).abs().max() > 1e-3 and (c[0] - c[2]).abs().max() > 1e-3


def test_only_a_number_with_dose_key_is_a_dose(panel):
    """Whatever follows the colon, a gene's perturbation has the gene's token and another name a token of its own."""
    from dataclasses import replace
    names = ["D:1e-05", "D:9", "D:high", "TF1:9", "TF1:x"]
    panel = replace(panel, perturbations=names, pert_gene=[-1, -1, -1, 0, 0], trained=names)
    for key, tokens in (("dose", [40, 40, 41, 0, 0]), ("", [40, 41, 42, 0, 0])):
        named, table = scbig.token_table(panel, tiny(dose_key=key))
        assert [table[name][0] for name in names] == tokens
        assert len(named) == max(tokens) + 1 and named[:40] == panel.genes
        low = {name for name in names if 0 < table[name][1] < 1}        # 9 is the highest
        assert low == ({"D:1e-05"} if key else set()) and table["D:high"][1] == table["TF1"][1] == 1


# ------------------------------------------------------------------------------------------------ generated cells

def test_residuals_keep_what_the_autoencoder_loses(dataset, panel):
    """A flow that does not move gives back the control cells themselves; one that moves adds the decoded shift."""
    model, run = make(dataset, panel)
    control, told = torch.rand(5, len(panel.genes)), scbig.slots(["TF1"], panel, run.config)
    still = scbig.sample(lambda z, *_: z, model, control, told, True)
    torch.testing.assert_close(still, control)
    decoded = scbig.sample(lambda z, *_: z, model, control, told, False)
    torch.testing.assert_close(decoded, model.autoencoder(control))
    moved = scbig.sample(lambda z, *_: z + 1, model, control, told, True)
    shift = scbig.sample(lambda z, *_: z + 1, model, control, told, False) - decoded
    torch.testing.assert_close(moved, control + shift)


def test_generated_cells_do_not_depend_on_the_chunks(dataset, panel, monkeypatch):
    model, run = make(dataset, panel, zeros="clamp")
    control, sizes, sample = dataset.controls("test")[""][:9], [], scbig.sample

    def watched(integrate, model, x, *rest):
        sizes.append(len(x))
        return sample(integrate, model, x, *rest)
    monkeypatch.setattr(scbig, "sample", watched)
    columns = np.array([3, 5, 30])
    ask = {"TF1": 9}, {"": control}
    whole = scbig.predict(run, model, *ask, columns)["TF1"]
    monkeypatch.setattr(data, "cells_at_once", lambda device, size: 1)
    single = scbig.predict(run, model, *ask, columns)["TF1"]
    assert sizes == [9] + [1] * 9 and whole.shape == (9, 3)
    np.testing.assert_allclose(whole, single, rtol=1e-4, atol=1e-5)
    every = scbig.predict(run, model, *ask, np.arange(40))["TF1"]
    np.testing.assert_allclose(every[:, columns], single, rtol=1e-4, atol=1e-5)


def test_structure_losses_see_the_cells_as_they_are_generated(demo, call, monkeypatch, tmp_path):
    """In training as in sampling, residuals are those of the control cells that the start latents encode."""
    seen, decode = [], scbig.decode

    def watched(autoencoder, start, end, control=None):
        seen.append((autoencoder.encode(control) - start).abs().max().item())
        return decode(autoencoder, start, end, control)
    monkeypatch.setattr(scbig, "decode", watched)
    ok(call("scbig.py", "--data", demo, *TINY["scbig"], "--steps", 3, "--out", tmp_path / "run"))
    assert len(seen) > 3 and max(seen) < 1e-5


def test_learning_rates_warm_up_and_fall_to_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rates = {}
    for name in ("constant", "cosine"):
        schedule, rates[name] = scbig.learning_rates(optimizer, tiny(schedule=name), 100), []
        for _ in range(100):
            rates[name].append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        optimizer.param_groups[0]["lr"] = 1.0
    assert rates["constant"] == [1.0] * 100
    assert rates["cosine"][:3] == pytest.approx([0.2, 0.4, 0.6]) and rates["cosine"][50] == pytest.approx(0.5)
    assert rates["cosine"][99] < 0.001 and max(rates["cosine"]) == pytest.approx(rates["cosine"][5], abs=0.01)


# ------------------------------------------------------------------------------------------------ whole runs

def test_the_paper_preset_is_the_papers_protocol(demo, call, tmp_path):
    """Appendix A.4.2; table 1 has L2^2 / MSE = 1,689, no 1,000 genes. Cells of so few genes are refused in one line."""
    config = Config(**scbig.PRESETS["paper"])
    assert (config.split, config.hvg, config.eval_genes) == ("additive", 2000, 0)
    assert (config.min_genes, config.min_cells, config.train_on_val) == (1000, 50, True)
    error(call("scbig.py", "--data", demo, "--preset", "paper", "--out", tmp_path / "run"), "lower --min-genes")


STAGES = ["--pretrain-steps", 12, "--steps", 4, "--ema", 0.9, "--dropout", 0.1]


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    scbig.main([str(f) for f in ("--data", demo, *TINY["scbig"], *STAGES, "--modules", 7, "--out", folder)])
    return folder


@pytest.mark.parametrize("flags", [
    ["--clustering", "kmeans", "--encoder", "transformer"], ["--clustering", "unordered", "--corr-weight", "0"],
    ["--path-weight", "0", "--ppi-weight", "0", "--schedule", "constant"], ["--condition-embedding", "learned"],
    ["--corr-weight", "0", "--path-weight", "0", "--ema", "0", "--eval-every", "2"],
    ["--no-effect-readout", "--no-residual", "--condition-dropout", "0.9"]])
def test_variants_run(flags, demo, call, tmp_path):
    done = call("scbig.py", "--data", demo, *TINY["scbig"], "--steps", 3, *flags, "--out", tmp_path / "run")
    assert "replicate" in ok(done) and not done.stderr


def test_a_run_that_ended_before_its_checkpoint_starts_anew(demo, call, tmp_path):
    flags = ["--data", demo, *TINY["scbig"], "--steps", 2, "--out", tmp_path / "run"]
    done = call("scbig.py", *flags, "--pretrain-lr", "1e6")
    assert done.returncode == 2 and "diverged" in done.stderr and (tmp_path / "run" / "modules.tsv").exists()
    assert "replicate" in ok(call("scbig.py", *flags))


@pytest.mark.parametrize("flags, words", [
    (["--conditions-per-batch", "3"], ["--batch-size 16"]),
    (["--structure-conditions", "9"], ["--structure-conditions 9"]), (["--heads", "3"], ["--width 16"]),
    (["--modules", "0"], ["--modules 0"]), (["--modules", "41"], ["--modules 41", "40 genes"]),
    (["--condition-dropout", "1"], ["--condition-dropout"]), (["--ppi-info", "x"], ["--ppi"]),
    (["--pretrain-steps", "0"], ["--pretrain-steps"]), (["--structure-cells", "1"], ["--structure-cells at least 2"])])
def test_misuse(flags, words, demo, call, tmp_path):
    error(call("scbig.py", "--data", demo, *TINY["scbig"], "--out", tmp_path / "run", *flags), *words)


def test_cells_on_disk_are_streamed_to_a_device(demo, tmp_path):
    """Where the matrix is not on the device, neither are the numbers of the rows; standin.py refuses to mix them."""
    flags = ["--data", demo, *TINY["scbig"], "--steps", "3", "--backed", "--out", str(tmp_path / "run")]
    (tmp_path / "commands.json").write_text(json.dumps([flags]))
    command = [sys.executable, ROOT / "tests" / "standin.py", "scbig", tmp_path / "commands.json"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert '"calls": {"step": 7' in ok(done)


def test_exported_modules_are_those_of_the_checkpoint_and_balanced(whole, panel):
    rows = [line.split("\t") for line in (whole / "modules.tsv").read_text().splitlines()]
    assert rows[0] == ["gene", "module"] and [r[0] for r in rows[1:]] == panel.genes
    module = np.array([int(r[1]) for r in rows[1:]])
    size = np.bincount(module, minlength=7)
    assert len(size) == 7 and size.max() - size.min() <= 1
    assert checkpoint(whole)["content"]["ema"]["autoencoder.module_of"].tolist() == module.tolist()


def test_stage_1_is_trained_on_training_and_control_cells_alone(dataset, panel, monkeypatch):
    """On each of them, perturbed or control, and on none of a test or validation condition."""
    drawn, gather = [], data.Dataset.gather
    model, _ = make(dataset, panel)
    dataset.prepare_sampling()
    run = scbig.Run(tiny(pretrain_steps=150, pretrain_batch_size=32))
    run.dataset, run.finish = dataset, lambda *args, **losses: None
    monkeypatch.setattr(data.Dataset, "gather", lambda self, rows: drawn.append(rows.tolist()) or gather(self, rows))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = model.autoencoder.to_latent.weight.clone()
    scbig.pretrain(run, None, model)
    rows = set(dataset.fit_rows.tolist())
    assert len(drawn) == 150 and {row for batch in drawn for row in batch} == rows
    assert not rows & {r for part in ("test", "val") for g in dataset.part(part) for r in dataset.rows[g]}
    assert set(np.concatenate(list(dataset.control_rows["train"].values())).tolist()) < rows
    assert not torch.equal(model.autoencoder.to_latent.weight, before)


@pytest.mark.parametrize("stage, stop", [("pretraining", 12), ("training", 1)])
def test_ctrl_c_and_resume_in_either_stage_are_bit_identical(stage, stop, whole, demo, call, monkeypatch, tmp_path):
    start = scbig.Run.start

    def interrupted(self, step):
        start(self, step)
        if (self.stage, step) == (stage, stop):
            os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(scbig.Run, "start", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    try:
        done = call("scbig.py", "--data", demo, *TINY["scbig"], *STAGES, "--modules", 7, "--out", tmp_path / "parts")
        assert done.returncode == 130 and f"stopped at step {stop} of" in done.stdout
        monkeypatch.setattr(scbig.Run, "start", start)
        if stage == "pretraining":
            early = call("scbig.py", "--ckpt", tmp_path / "parts" / "ckpt.pt", "--predict", "TF1",
                         "--out", tmp_path / "p.h5ad")
            error(early, "pretraining", "--resume")
            assert not (tmp_path / "p.h5ad").exists()
        ok(call("scbig.py", "--out", tmp_path / "parts", "--resume"))
    finally:
        signal.signal(signal.SIGINT, handler)
    a, b = (checkpoint(f)["content"] for f in (whole, tmp_path / "parts"))
    assert all(torch.equal(a[part][k], b[part][k]) for part in ("model", "ema") for k in a[part])
    logs = []
    for folder in (whole, tmp_path / "parts"):
        lines = list(map(json.loads, (folder / "log.jsonl").read_text().splitlines()))
        logs.append([(line.get("stage"), line["step"], line["loss"]) for line in lines])
    assert logs[0] == logs[1] and logs[0][0][:2] == ("pretraining", 1) and logs[0][-1][:2] == (None, 4)


def test_dropout_of_the_condition_keeps_its_mean(demo, call, monkeypatch, tmp_path):
    """Four of five entries are dropped in the demo preset, the others are five times as large."""
    seen, forward = [], scbig.Objective.forward
    monkeypatch.setattr(scbig.Objective, "forward", lambda *args: seen.append(args[4]) or forward(*args))
    ok(call("scbig.py", "--data", demo, *TINY["scbig"], "--steps", 3, "--out", tmp_path / "run"))
    keep = torch.cat(seen)
    assert keep.unique().tolist() == pytest.approx([0, 5]) and keep.mean().item() == pytest.approx(1, abs=0.15)


def test_gradients_are_clipped_to_norm_1(demo, call, monkeypatch, tmp_path):
    norms, finish, forward = [], scbig.Run.finish, scbig.Objective.forward

    def record(run, step, parts, **losses):
        if run.stage == "training":
            grads = [p.grad.norm() for p in parts["model"].flow.parameters() if p.grad is not None]
            norms.append(torch.stack(grads).norm())
        finish(run, step, parts, **losses)

    def large(*args):
        losses = forward(*args)
        return losses | {"loss": 1e4 * losses["loss"]}
    monkeypatch.setattr(scbig.Run, "finish", record)
    monkeypatch.setattr(scbig.Objective, "forward", large)
    done = call("scbig.py", "--data", demo, *TINY["scbig"], "--steps", 3, "--out", tmp_path / "run")
    assert done.returncode == 0 and torch.stack(norms).tolist() == pytest.approx([1.0] * 3, rel=1e-3), done.stderr


def test_ema_follows_the_flow(whole):
    """The model that predicts is an average of the flow's weights; the autoencoder is the same in both."""
    parts = checkpoint(whole)["content"]
    differs = {k.split(".")[0] for k, v in parts["model"].items() if not torch.equal(v, parts["ema"][k])}
    assert differs == {"flow"}
    effect, average = (parts[name]["flow.effect"].norm() for name in ("model", "ema"))              # from zero
    assert 0 < average < effect


def test_prediction_needs_no_prior_file(demo, call, dataset, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    np.savez(tmp_path / "v.npz", names=np.array(dataset.genes), emb=vectors)
    sets = [dataset.genes[i:i + 9] for i in range(0, 34, 3)]
    (tmp_path / "p.gmt").write_text("".join(f"P{i}\tx\t" + "\t".join(genes) + "\n" for i, genes in enumerate(sets)))
    pairs = zip(dataset.genes, dataset.genes[1:])
    (tmp_path / "p.txt").write_text("".join(f"{a} {b}\n" for a, b in pairs))
    out = ok(call("scbig.py", "--data", demo, *TINY["scbig"], "--steps", 4, "--gene-embeddings", tmp_path / "v.npz",
                  "--pert-embeddings", tmp_path / "v.npz", "--pathways", tmp_path / "p.gmt", "--ppi",
                  tmp_path / "p.txt", "--out", tmp_path / "run"))
    assert out.count("knows 40 of 40") == 3 and "knows 16 of 16" in out
    modules = [line.split("\t") for line in (tmp_path / "run" / "modules.tsv").read_text().splitlines()[1:]]
    for line in (tmp_path / "run" / "modules_enrichment.tsv").read_text().splitlines()[1:]:
        k, name, overlap, *_ = line.split("\t")
        mine = {gene for gene, module in modules if module == k}
        assert len(mine & set(sets[int(name[1:])])) == int(overlap)
    for name in ("v.npz", "p.gmt", "p.txt"):
        (tmp_path / name).unlink()
    ok(call("scbig.py", "--ckpt", tmp_path / "run" / "ckpt.pt", "--predict", "TF1+TF9", "--out", tmp_path / "p.h5ad"))
