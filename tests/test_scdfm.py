"""scdfm.py: the mathematics of its parts, against the official outputs at hand or slow plain formulas."""
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import scdfm
from conftest import ROOT, TINY
from scdfm import Attention, Config, mmd_squared, sample, timestep_embedding

OFFICIAL = np.load(ROOT / "tests" / "oracle_scdfm.npz")       # outputs of the official code on random weights


def tiny(**options):
    small = dict(width=16, layers=2, heads=2, gene_subset=30, ode_steps=3, knn=5)
    return Config(**{**scdfm.PRESETS["demo"], **small, **options})


@pytest.fixture(scope="module")
def dataset(demo):
    return data.load(demo, tiny(), "additive")


@pytest.fixture(scope="module")
def panel(dataset):
    return dataset.panel()


def build(dataset, panel, config, seed=0, randomise=True):
    """A model in float64 whose zero-initialised parts are random, so that every path matters."""
    torch.manual_seed(seed)
    model = scdfm.ScDFM(config, panel, *scdfm.statistics(dataset, config.knn)).double().eval()
    if randomise:
        torch.nn.init.normal_(model.modulate.weight, std=0.3)
        if config.effect_readout:
            torch.nn.init.normal_(model.readout, std=0.3)
    return model


@pytest.mark.parametrize("options, words", [({"lr_min": 1.0}, "--lr-min 1.0"), ({"width": 33}, "--width 33"),
                                            ({"batch_size": 3}, "--batch-size 3")])
def test_values_that_cannot_work_together_are_refused(options, words):
    with pytest.raises(data.DataError, match=words):
        scdfm.check(Config(**scdfm.PRESETS["demo"] | options))


# ------------------------------------------------------------------------------------------------ attention

def plain_differential_attention(x, y, attention, lam):
    """Equations 8 and 9 with materialised softmax maps, one head at a time: queries from x (T, d), keys and values from
    y (S, d)."""
    d, heads = x.shape[-1], attention.heads
    width, result = d // heads, []
    for h in range(heads):
        rows, maps = slice(h * width, (h + 1) * width), []
        for i in range(2):
            q = x @ attention.q.weight[i * d:(i + 1) * d][rows].T
            k = y @ attention.k.weight[i * d:(i + 1) * d][rows].T
            maps.append(torch.softmax(q @ k.T / math.sqrt(width), dim=-1))
        a = (maps[0] - lam * maps[1]) @ (y @ attention.v.weight[rows].T)
        a = a / torch.sqrt(a.square().mean(-1, keepdim=True) + 1e-5) * attention.norm
        result.append(a * (1 - attention.lam_init))
    return torch.cat(result, dim=-1) @ attention.out.weight.T


@pytest.mark.parametrize("source", ["self", "control"])
def test_differential_attention_equals_its_formula(source):
    torch.manual_seed(0)
    attention = Attention(12, 3, 2, True).double()
    x, y = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    lq1, lk1, lq2, lk2 = attention.lam
    lam = torch.exp(lq1 @ lk1) - torch.exp(lq2 @ lk2) + attention.lam_init
    assert attention.lam_init == pytest.approx(0.8 - 0.6 * math.exp(-0.6))
    expected = plain_differential_attention(x, x if source == "self" else y, attention, lam)
    got = attention(x[None]) if source == "self" else attention(x[None], attention.cache(y[None]))
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=1e-7)


def test_differential_attention_equals_the_official_module():
    """Official MultiheadDiffAttn(16, 4 heads, layer 2), which takes queries and values from x and keys from y."""
    w = {k.rpartition("w/")[2]: torch.from_numpy(OFFICIAL[k]) for k in OFFICIAL.files if "/w/" in k}
    x, y, out = (torch.from_numpy(OFFICIAL[f"diff_attn_keys/{k}"]) for k in ("x", "y", "out"))
    attention = Attention(16, 4, 2, True).double()
    with torch.no_grad():
        attention.lam.copy_(torch.stack([w[f"lambda_{name}"] for name in ("q1", "k1", "q2", "k2")]))
        attention.norm.copy_(w["subln.weight"])
        for name in ("q", "k"):
            weight = torch.cat([w[f"{name}_proj_1.weight"], w[f"{name}_proj_2.weight"]])
            getattr(attention, name).weight.copy_(weight)
        attention.v.weight.copy_(w["v_proj.weight"])
        attention.out.weight.copy_(w["out_proj.weight"])
        got = attention(x, (attention.split(attention.k(y)), attention.split(attention.v(x))))
    torch.testing.assert_close(got, out, rtol=1e-6, atol=1e-6)     # the official lambda is computed in fp32


def test_timestep_embedding_equals_the_official_one():
    got = timestep_embedding(torch.from_numpy(OFFICIAL["timestep/t"]))
    torch.testing.assert_close(got, torch.from_numpy(OFFICIAL["timestep/embedding256"]), rtol=1e-5, atol=1e-5)


def test_plain_attention_is_scaled_dot_product_attention():
    torch.manual_seed(0)
    attention, x = Attention(12, 3, 0, False), torch.randn(2, 5, 12)
    heads = [(p(x).unflatten(-1, (3, 4)).transpose(1, 2)) for p in (attention.q, attention.k, attention.v)]
    a = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / 2, -1) @ heads[2]
    torch.testing.assert_close(attention(x), attention.out(a.transpose(1, 2).flatten(2)))
    assert sum(p.numel() for p in attention.parameters()) == 4 * 12 * 12


# ---------------------------------------------------------------------------------------- graph and gene encoder

def test_graph_is_the_k_nearest_by_absolute_correlation(dataset):
    graph = scdfm.statistics(dataset, 4)[0].numpy()
    x = dataset.X[dataset.fit_rows].toarray().astype(np.float64)
    with np.errstate(invalid="ignore"):
        corr = np.abs(np.corrcoef(x.T))
    expected = np.eye(len(corr), dtype=bool)
    for i, row in enumerate(corr):
        row = np.where(np.arange(len(row)) == i, -1, np.nan_to_num(row, nan=-1))
        for j in np.argsort(-row)[:4]:
            expected[i, j] = expected[j, i] = True
    assert (graph == expected).all()
    assert graph.sum() > 5 * len(graph)         # not only self loops


def test_gene_without_variance_keeps_only_its_self_loop(dataset):
    class Silent:
        X, fit_rows, device = dataset.X.copy().tolil(), dataset.fit_rows, dataset.device
    Silent.X[:, 7] = 0
    Silent.X = Silent.X.tocsr()
    graph = scdfm.statistics(Silent, 4)[0]
    assert graph[7].nonzero().flatten().tolist() == [7] and graph[:, 7].sum() == 1


def test_gene_encoder_sees_exactly_the_graph(dataset, panel):
    """Changing one token's embedding moves the output of a gene if and only if the graph joins them."""
    model = build(dataset, panel, tiny())
    encoder, genes = model.encoder, torch.arange(len(panel.genes))
    before = encoder(genes)
    moved = torch.zeros(len(genes), len(genes), dtype=torch.bool)
    for j in genes:
        with torch.no_grad():
            encoder.table.weight[j] += torch.linspace(-1, 2, 16)
            moved[:, j] = (encoder(genes) - before).abs().max(1).values > 1e-12
            encoder.table.weight[j] -= torch.linspace(-1, 2, 16)
    assert torch.equal(moved, encoder.graph[:len(genes), :len(genes)])
    assert not torch.equal(moved, torch.ones_like(moved))


def test_gene_encoder_is_its_formula(dataset, panel):
    """Pre-norm cross-attention from the tokens asked for to all, masked by the graph, then an MLP: both add."""
    encoder, asked = build(dataset, panel, tiny()).encoder, torch.tensor([3, 17, len(panel.genes)])
    table = encoder.norm_table(encoder.table.weight)
    normed = encoder.norm_attention(table)
    q, (k, v) = encoder.q(normed[asked]), encoder.kv(normed).chunk(2, dim=1)
    heads = []
    for rows in torch.arange(16).view(2, 8):
        logits = (q[:, rows] @ k[:, rows].T / math.sqrt(8)).masked_fill(~encoder.graph[asked], -math.inf)
        heads.append(torch.softmax(logits, dim=1) @ v[:, rows])
    x = table[asked] + encoder.out(torch.cat(heads, dim=1))
    torch.testing.assert_close(encoder(asked), x + encoder.mlp(encoder.norm_mlp(x)))


def test_knn_0_attends_to_every_gene(dataset, panel):
    model = build(dataset, panel, tiny(knn=0))
    assert model.encoder.graph is None
    before = model.encoder(torch.arange(5))
    with torch.no_grad():
        model.encoder.table.weight[30] += torch.linspace(-1, 2, 16)
    assert ((model.encoder(torch.arange(5)) - before).abs().max(1).values > 1e-12).all()


# ------------------------------------------------------------------------------------------------ perturbations

def inputs(panel, conditions, cells=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    genes = torch.randperm(len(panel.genes), generator=generator)[:20]
    x, control = (torch.rand(cells, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens, weight = scdfm.slots(conditions, panel)
    t = torch.rand(cells, generator=generator, dtype=torch.float64)
    return x, t, scdfm.Given(control, genes, tokens, weight.double())


def test_velocity_is_its_formula(dataset, panel):
    """Equations 6 and 10 to 13 written out, one cell at a time, with the model's weights; values end at 512."""
    model = build(dataset, panel, tiny(effect_readout=False, precondition=False))
    x, t, given = inputs(panel, ["TF1+TF2", "TF3"])
    x[0, 0] = given.control[1, 1] = 1000
    x[2, 2] = given.control[3, 3] = 30
    gene = model.encoder(given.genes)
    e = (model.encoder(given.tokens.flatten()).unflatten(0, (2, 2)) * given.weight[..., None]).sum(1)
    got = model(x, t, given)
    for i in range(len(x)):
        h_c = model.value_control(given.control[i].clamp(max=512)[:, None]) + gene
        h = model.value(x[i].clamp(max=512)[:, None]) + gene             # (S, d)
        here = e[i // 3].expand(len(h), -1)
        steps = model.modulate(model.time(timestep_embedding(1000 * t[i:i + 1])))[0].view(2, 2, 6, 1, 16)
        for number, layer in enumerate(model.layers):
            weight = torch.cat([layer.inject.weight, layer.inject_e.weight], dim=1)
            _, _, last, _ = layer.adapter
            both = F.leaky_relu(torch.cat([h, here], dim=1) @ weight.T + layer.inject.bias)
            h = h + F.leaky_relu(last(both))
            for block, (shift, scale, gate, *of_mlp) in zip((layer.self_block, layer.cross_block), steps[number]):
                normed = F.layer_norm(h, (16,)) * (1 + scale) + shift
                source = normed if block is layer.self_block else h_c
                lq1, lk1, lq2, lk2 = block.attention.lam
                lam_init = 0.8 - 0.6 * math.exp(-0.3 * number)
                assert block.attention.lam_init == pytest.approx(lam_init)
                lam = torch.exp(lq1 @ lk1) - torch.exp(lq2 @ lk2) + lam_init
                h = h + gate * plain_differential_attention(normed, source, block.attention, lam)
                shift, scale, gate = of_mlp
                h = h + gate * block.mlp(F.layer_norm(h, (16,)) * (1 + scale) + shift)
        weight = torch.cat([model.inject.weight, model.inject_e.weight], dim=1)
        v = model.decoder(torch.cat([h, here], dim=1) @ weight.T + model.inject.bias)[:, 0]
        torch.testing.assert_close(got[i].double(), v, rtol=1e-5, atol=1e-5)


def test_slot_order_does_not_matter_and_the_perturbation_does(dataset, panel):
    model = build(dataset, panel, tiny())
    v = {c: model(*inputs(panel, [c])) for c in ("TF1+TF2", "TF2+TF1", "TF1+TF3", "TF1", "TF1+TF2+TF3")}
    torch.testing.assert_close(v["TF1+TF2"], v["TF2+TF1"], rtol=1e-6, atol=1e-9)
    for other in ("TF1+TF3", "TF1", "TF1+TF2+TF3"):
        assert (v["TF1+TF2"] - v[other]).abs().max() > 1e-3


def test_single_is_the_mean_with_the_empty_slot(panel):
    tokens, weight = scdfm.slots(["TF1", "TF1+TF2", "TF1+TF2+TF3"], panel)
    G, column = len(panel.genes), {g: i for i, g in enumerate(panel.genes)}
    assert tokens[0].tolist() == [column["TF1"], G, G] and weight[0].tolist() == [0.5, 0.5, 0]
    assert weight[1].tolist() == [0.5, 0.5, 0]
    assert weight[2].tolist() == pytest.approx([1 / 3] * 3)


def test_perturbation_outside_the_panel_has_its_own_row(panel):
    other = dataclasses.replace(panel, perturbations=["DRUG", "TF1", "XYZ"], trained=["DRUG"],
                                pert_gene=[-1, panel.genes.index("TF1"), -1])
    tokens, _ = scdfm.slots(["DRUG", "XYZ", "TF1"], other)
    G = len(panel.genes)
    assert tokens[:, 0].tolist() == [G + 1, G + 2, panel.genes.index("TF1")]
    assert scdfm.ScDFM(tiny(), other).encoder.table.num_embeddings == G + 3


def test_conditions_of_one_batch_do_not_mix(dataset, panel):
    """A batch of two conditions gives each cell what a batch of its own condition gives."""
    config = tiny()
    model = build(dataset, panel, config)
    x, t, given = inputs(panel, ["TF1", "TF2+TF3"])
    both = model(x, t, given)
    for i, condition in enumerate(("TF1", "TF2+TF3")):
        cells = slice(3 * i, 3 * i + 3)
        tokens, weight = scdfm.slots([condition], panel)
        alone = model(x[cells], t[cells], scdfm.Given(given.control[cells], given.genes, tokens, weight.double()))
        torch.testing.assert_close(both[cells], alone, rtol=1e-6, atol=1e-8)


def test_gene_order_of_the_subset_only_permutes_the_output(dataset, panel):
    config = tiny()
    model = build(dataset, panel, config)
    x, t, given = inputs(panel, ["TF1"])
    p = torch.randperm(20)
    whole = model(x, t, given)
    moved = model(x[:, p], t, given._replace(control=given.control[:, p], genes=given.genes[p]))
    torch.testing.assert_close(moved, whole[:, p], rtol=1e-6, atol=1e-8)


def test_adaln_is_zero_at_the_start(dataset, panel):
    """At initialisation the gates are 0: time and control cells cannot matter yet."""
    config = tiny(precondition=False)
    model = build(dataset, panel, config, randomise=False)
    x, t, given = inputs(panel, ["TF1"])
    torch.testing.assert_close(model(x, t, given), model(x, 1 - t, given._replace(control=given.control + 1)))


def test_cross_attention_reads_the_control_cells(dataset, panel):
    model = build(dataset, panel, tiny())
    x, t, given = inputs(panel, ["TF1"])
    other = given._replace(control=given.control + 1)
    assert (model(x, t, given) - model(x, t, other)).abs().max() > 1e-4


def test_time_is_told_apart_and_every_block_has_a_modulation_of_its_own(dataset, panel):
    """The sinusoid sees 1000 t: a hundredth of the way moves it. L layers, two blocks each, with six parts."""
    model = build(dataset, panel, tiny())
    a, b = model.modulation(torch.tensor([0.5, 0.51], dtype=torch.float64))
    assert a.shape == (2, 12, 16) and (a - b).abs().mean() > 0.2 * a.abs().mean()
    assert len({tuple(row.tolist()) for row in a.flatten(0, 1)}) == 24


def test_value_encoders_of_cell_and_control_are_two(dataset, panel):
    model = build(dataset, panel, tiny())
    own, control = (list(part.parameters()) for part in (model.value, model.value_control))
    assert not {id(p) for p in own} & {id(p) for p in control} and not torch.equal(own[0], control[0])


def test_readout_starts_at_zero_and_adds_the_effect_of_what_was_trained(dataset, panel):
    """The velocity moves by e_p W'; of a perturbation that training lacks, by the empty slot's part alone."""
    model = build(dataset, panel, tiny(effect_readout=True), randomise=False)
    assert not model.readout.any() and model.trained.sum() == 17        # 16 perturbations and the empty slot
    x, t, given = inputs(panel, ["TF1+TF2", "TF3"])
    before = model(x, t, given)
    with torch.no_grad():
        model.readout.normal_()
    moved = model(x, t, given) - before
    e = (model.encoder(given.tokens.flatten()).unflatten(0, (2, 2)) * given.weight[..., None]).sum(1)
    expected = (e @ model.readout[given.genes].T).repeat_interleave(3, 0)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-5)
    column = {g: i for i, g in enumerate(panel.genes)}
    other = scdfm.ScDFM(tiny(effect_readout=True), dataclasses.replace(panel, trained=["TF2"]))
    assert other.trained.nonzero().flatten().tolist() == [column["TF2"], len(column)]
    model.trained.copy_(other.trained)                                   # TF1 and TF3 have no effect now
    e = model.encoder(given.tokens.flatten()).unflatten(0, (2, 2))[:, 1] / 2     # TF2 and the empty slot
    expected = (e @ model.readout[given.genes].T).repeat_interleave(3, 0)
    moved = model(x, t, given) - before
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-5)


def test_preconditioning_is_the_velocity_of_a_gaussian_per_gene():
    """Against the regression of x1 - x0 on x_t in many draws, and at both ends of the path."""
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 200_000, 1, generator=generator, dtype=torch.float64)
    x1 = 1.5 + 0.7 * x1
    for t in (0.2, 0.8):
        x_t, u = (1 - t) * x0 + t * x1, x1 - x0
        slope = ((x_t - x_t.mean()) * (u - u.mean())).mean() / x_t.var()
        at = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        got = scdfm.gaussian_velocity(at, torch.tensor([[t]], dtype=torch.float64), 1.5, torch.tensor(0.49))
        torch.testing.assert_close(got, u.mean() + slope * (at - x_t.mean()), rtol=0.02, atol=0.02)


def test_unpreconditioned_paper_preset_has_no_parameter_more(panel):
    config = Config(**{**scdfm.PRESETS["paper"], "width": 16, "heads": 2, "knn": 0})
    assert scdfm.ScDFM(config, panel).readout is None and not config.precondition


def test_paper_preset_is_the_papers_protocol():
    """Appendix A.4; validation doubles train, as in the official code."""
    config = Config(**scdfm.PRESETS["paper"])
    assert (config.hvg, config.hvg_by, config.min_cells, config.min_genes) == (5000, "variance", 0, 0)
    assert (config.eval_genes, config.train_on_val, config.exact_cells) == (1000, True, False)
    assert (config.steps, config.batch_size, config.lr, config.lr_min, config.ema) == (100_000, 96, 5e-5, 1e-6, 0)
    assert (config.width, config.layers, config.heads, config.dropout, config.knn) == (512, 4, 8, 0.1, 30)
    assert (config.mmd_weight, config.gene_subset, config.ode_steps, config.zeros) == (0.5, 1000, 100, "clamp")


# ------------------------------------------------------------------------------------------------ losses

def slow_mmd(x, y):
    """Algorithm 1 as a double loop in float64."""
    def distance(a, b):
        return sum((float(p) - float(q)) ** 2 for p, q in zip(a, b))
    m, n = len(x), len(y)
    pairs = sorted(distance(x[i], x[j]) for i in range(m) for j in range(m) if i != j)
    median = pairs[(len(pairs) - 1) // 2]
    total = 0.0
    for s in (0.5, 1.0, 2.0, 4.0):
        def k(a, b):
            return math.exp(-distance(a, b) / (2 * s * median))
        total += sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
        total += sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        total -= 2 * sum(k(a, b) for a in x for b in y) / (m * n)
    return total / 4


def test_mmd_equals_the_double_loop():
    torch.manual_seed(0)
    x, y = torch.randn(3, 7, 5) + 3, 0.5 * torch.randn(3, 9, 5) + 3.4
    expected = torch.tensor([slow_mmd(a, b) for a, b in zip(x, y)])
    torch.testing.assert_close(mmd_squared(x, y), expected, rtol=1e-4, atol=1e-6)
    assert expected.max() > 0.05


def test_mmd_equals_the_official_value():
    got = mmd_squared(torch.from_numpy(OFFICIAL["mmd/real"])[None], torch.from_numpy(OFFICIAL["mmd/generated"])[None])
    assert got.item() == pytest.approx(float(OFFICIAL["mmd/value"]), rel=1e-4)


def test_mmd_is_unbiased_and_has_no_gradient_through_its_bandwidth():
    torch.manual_seed(0)
    values = torch.stack([mmd_squared(torch.randn(40, 8, 4), torch.randn(40, 8, 4)).mean() for _ in range(50)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(50) and values.std() > 0
    x, y = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 6, 4, requires_grad=True)
    mmd_squared(x.detach(), y).sum().backward()
    assert y.grad.abs().sum() > 0 and x.grad is None


def test_loss_is_flow_matching_plus_mmd_per_condition():
    """With v = 0 both terms have closed forms; without MMD the second is 0."""
    torch.manual_seed(0)
    x1, x0, t = torch.rand(8, 6) + 1, torch.randn(8, 6), torch.rand(8)
    given = scdfm.Given(x1, None, torch.zeros(2, 2, dtype=torch.long), None)

    def net(x, *_):
        return torch.zeros_like(x)
    flow, mmd = scdfm.scdfm_loss(net, x1, x0, t, given, 0.5)
    assert flow.item() == pytest.approx((x1 - x0).square().mean().item())
    x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
    expected = np.mean([slow_mmd(x1[i:i + 4], x_t[i:i + 4]) for i in (0, 4)])
    assert mmd.item() == pytest.approx(expected, rel=1e-4)
    assert scdfm.scdfm_loss(net, x1, x0, t, given, 0)[1] == 0

    def exact(x, *_):
        return x1 - x0
    flow, mmd = scdfm.scdfm_loss(exact, x1, x0, t, given, 0.5)
    assert flow == 0 and mmd < 0            # a sample against itself: the unbiased MMD pairs each cell with itself


# ------------------------------------------------------------------------------------------------ sampling

def test_cached_sampling_equals_uncached(dataset, panel):
    """Against plain Euler steps that call the whole network at every evaluation."""
    config = tiny()
    model = build(dataset, panel, config)
    _, _, given = inputs(panel, ["TF1+TF2"])
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            x = torch.randn(given.control.shape, generator=torch.Generator().manual_seed(3))
            got = sample(model.velocity, model, x, given, config)
            h = 1 / config.ode_steps
            for t in np.arange(config.ode_steps) * h:
                x = x + h * model(x, torch.full((len(x),), t), given)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
    assert got.max() > 0.1


def test_generated_cells_do_not_depend_on_the_chunks(dataset, panel, monkeypatch):
    config = tiny(gene_subset=len(panel.eval_genes))
    model = build(dataset, panel, config).float()
    run = scdfm.Run(config)
    run.panel = panel
    control, sizes = dataset.controls("test")[""][:9], []

    def watched(velocity, model, x, *rest):
        sizes.append(len(x))
        return sample(velocity, model, x, *rest)
    monkeypatch.setattr(scdfm, "sample", watched)

    def cells():
        return scdfm.predict(run, model, {"TF1": 9}, {"": control}, panel.eval_genes)["TF1"]
    whole = cells()
    monkeypatch.setattr(data, "cells_at_once", lambda device, size: 3)
    chunks = cells()
    assert sizes == [9, 3, 3, 3] and whole.shape == (9, len(panel.eval_genes))
    np.testing.assert_allclose(whole, chunks, rtol=1e-4, atol=1e-5)
    run.config.seed = 6
    assert np.abs(whole - cells()).max() > 0.1


def test_the_network_compiles_without_graph_breaks(dataset, panel):
    """The graph that inductor would get: one for training, one for sampling."""
    config = tiny()
    model = build(dataset, panel, config)
    args = inputs(panel, ["TF1", "TF2+TF3"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), model(*args))
    velocity = torch.compile(model.velocity, backend="eager", fullgraph=True)
    x, t, given = args
    torch.testing.assert_close(velocity(x, t, model.modulation(t), model.context(given)), model(*args))


def test_lambda_and_mmd_keep_their_precision_under_bf16(dataset, panel):
    config = tiny()
    model = build(dataset, panel, config).float()
    x, t, given = inputs(panel, ["TF1"])
    x, t = x.float(), t.float()
    given = given._replace(control=given.control.float(), weight=given.weight.float())
    lams, real = [], scdfm.differential_attention

    def watched(q, k, v, lam, *rest):
        lams.append(lam)
        return real(q, k, v, lam, *rest)
    scdfm.differential_attention = watched
    try:
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x, t, given)
            got, exact = mmd_squared(x[None, :3], x[None, 3:]), mmd_squared(x[None, :3].double(), x[None, 3:])
            assert got.item() == pytest.approx(exact.item(), rel=1e-5)
    finally:
        scdfm.differential_attention = real
    assert all(lam.dtype == torch.float32 for lam in lams) and len(lams) == 4
    torch.testing.assert_close(low, model(x, t, given), rtol=0.1, atol=0.1)


def test_more_columns_than_a_pass_holds_come_back_in_their_order(dataset, panel, monkeypatch):
    """In passes of --gene-subset genes, as the network was trained, the evaluation genes too."""
    config = tiny(gene_subset=10)
    run = scdfm.Run(config)
    run.panel = panel
    model = build(dataset, panel, config).float()
    widths = []

    def columns(velocity, model, x, given, config):
        widths.append(len(given.genes))
        return given.genes.expand(len(x), -1).float()
    monkeypatch.setattr(scdfm, "sample", columns)
    control = torch.zeros(2, len(panel.genes))
    told = scdfm.told_of(model, run, "TF1", control)
    got = scdfm.generate(model, run, told, control, control, np.arange(3, 38))
    assert got[:, 3:38].tolist() == [list(range(3, 38))] * 2 and sorted(widths) == [8, 9, 9, 9]
    assert not got[:, :3].any() and not got[:, 38:].any()


def test_dropout_is_on_in_training_alone(dataset, panel):
    model = build(dataset, panel, tiny(dropout=0.5))
    args = inputs(panel, ["TF1"])
    assert torch.equal(model(*args), model(*args))
    model.train()
    assert not torch.equal(model(*args), model(*args))


def test_a_training_step(demo, monkeypatch, tmp_path):
    """What a step sees and what it does: several conditions, each cell from its own, controls from the controls, one
    subset of genes; the loss adds the weighted MMD; the schedule ends at its end; the EMA is the average by hand."""
    seen, states = [], []
    loss, finish = scdfm.scdfm_loss, scdfm.Run.finish

    def spy_loss(net, x1, x0, t, given, mmd_weight):
        seen.append((x1, t, given))
        return loss(net, x1, x0, t, given, mmd_weight)

    def spy_finish(run, step, parts, **losses):
        weights = [parts[name].state_dict()["value.0.weight"].clone() for name in ("model", "ema")]
        states.append((losses, parts["optimizer"].param_groups[0]["lr"], *weights))
        finish(run, step, parts, **losses)
    monkeypatch.setattr(scdfm, "scdfm_loss", spy_loss)
    monkeypatch.setattr(scdfm.Run, "finish", spy_finish)
    flags = ["--data", demo, *TINY["scdfm"], "--steps", "4", "--ema", "0.9", "--lr-min", "1e-7"]
    scdfm.main([*flags, "--out", str(tmp_path / "run")])

    dataset = data.load(demo, data.DataConfig(), "additive")
    column = {g: i for i, g in enumerate(dataset.genes)}
    groups = {tuple(sorted(column[p] for p in g.split("+"))): g for g in dataset.part("train")}
    whole = {name: dataset.cells(name) for name in ["control", *dataset.part("train")]}
    for x1, t, (control, genes, tokens, _) in seen:
        assert len({tuple(row) for row in tokens.tolist()}) > 1 and len(set(t.tolist())) == 16
        assert len(set(genes.tolist())) == 30
        for i, row in enumerate(tokens.tolist()):
            group = groups[tuple(sorted(token for token in row if token < len(column)))]
            for cell in x1[4 * i:4 * i + 4]:
                assert np.isclose(whole[group][:, genes], cell.numpy()).all(1).any()
        for cell in control:
            assert np.isclose(whole["control"][:, genes], cell.numpy()).all(1).any()
    assert not torch.equal(seen[0][2].genes, seen[1][2].genes)
    for losses, *_ in states:
        assert losses["mmd"] != 0
        assert losses["loss"].item() == pytest.approx((losses["flow"] + 0.5 * losses["mmd"]).item())
    assert states[-1][1] == pytest.approx(1e-7, rel=1e-3) and states[0][1] > 1e-3
    for before, after in zip(states, states[1:]):
        torch.testing.assert_close(after[3], 0.9 * before[3] + 0.1 * after[2])
    assert not torch.equal(states[-1][2], states[-1][3])


def test_model_learns_a_bimodal_response():
    """Two modes at 0 and 3 for one perturbation: flow matching must produce both, where a mean regression gives 1.5."""
    torch.manual_seed(0)
    panel = data.Panel([f"g{i}" for i in range(4)], [0, 1, 2, 3], ["P"], [-1], ["P"], [0] * 4, [9] * 4)
    config = tiny(knn=0, width=32, layers=1, ode_steps=20, effect_readout=False, precondition=False)
    model = scdfm.ScDFM(config, panel)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    tokens, weight = scdfm.slots(["P"], panel)
    given = scdfm.Given(torch.ones(128, 4), torch.arange(4), tokens, weight)
    for _ in range(150):
        mode = 3 * (torch.rand(128, 1) < 0.5)
        x1 = mode + 0.2 * torch.randn(128, 4)
        t, x0 = torch.rand(128), torch.randn(128, 4)
        flow, mmd = scdfm.scdfm_loss(model, x1, x0, t, given, 0.5)
        optimizer.zero_grad()
        (flow + 0.5 * mmd).backward()
        optimizer.step()
    model.eval()
    given = given._replace(control=torch.ones(400, 4))
    x = sample(model.velocity, model, torch.randn(400, 4), given, config).mean(1)
    high = (x > 1.5).float().mean().item()
    assert 0.3 < high < 0.7                                     # both modes, about equally often
    assert x[x > 1.5].mean().item() == pytest.approx(3, abs=0.4)
    assert x[x < 1.5].mean().item() == pytest.approx(0.1, abs=0.3)


def test_weights_survive_a_round_trip_through_build(dataset, panel):
    config = tiny()
    model = build(dataset, panel, config)
    clone = scdfm.ScDFM(config, panel).double().eval()
    clone.load_state_dict(model.state_dict())
    args = inputs(panel, ["TF1"])
    torch.testing.assert_close(clone(*args), model(*args))
    assert F.mse_loss(clone(*args), torch.zeros(6, 20, dtype=torch.float64)) > 0
