"""scdfm.py: the mathematics of its parts, against the official outputs at hand or slow plain formulas."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import scdfm
from conftest import SHARED
from scdfm import Attention, Config, mmd_squared, sample, timestep_embedding

COMPONENTS = SHARED / "oracle" / "components.npz"
needs_oracle = pytest.mark.skipif(not COMPONENTS.exists(), reason="the reference values are not at hand")


def tiny(**options):
    return Config(**{**scdfm.PRESETS["demo"], "width": 16, "layers": 2, "heads": 2, "gene_subset": 30, "ode_steps": 3, "knn": 5, **options})


@pytest.fixture(scope="module")
def dataset(demo):
    return data.load(demo, tiny(), "additive")


@pytest.fixture(scope="module")
def panel(dataset):
    return dataset.panel()


def build(dataset, panel, config, seed=0, randomise=True):
    """A model in float64 whose zero-initialised parts are random, so that every path matters."""
    torch.manual_seed(seed)
    model = scdfm.ScDFM(config, panel, scdfm.coexpression_graph(dataset, config.knn) if config.knn else None).double().eval()
    if randomise:
        torch.nn.init.normal_(model.modulate.weight, std=0.3)
    return model


# ------------------------------------------------------------------------------------------------ attention

def plain_differential_attention(x, y_key, y_value, q, k, v, out, lam, norm, lam_init, heads):
    """Equations 8 and 9 with materialised softmax maps, one head at a time. q and k hold the weights of both maps."""
    d = x.shape[-1]
    dh = d // heads
    result = []
    for h in range(heads):
        rows = slice(h * dh, (h + 1) * dh)
        maps = []
        for i in range(2):
            Q, K = x[i] @ q[i * d:(i + 1) * d][rows].T, y_key[i] @ k[i * d:(i + 1) * d][rows].T
            maps.append(torch.softmax(Q @ K.T / math.sqrt(dh), dim=-1))
        a = (maps[0] - lam * maps[1]) @ (y_value @ v[rows].T)
        a = a / torch.sqrt(a.square().mean(-1, keepdim=True) + 1e-5) * norm
        result.append(a * (1 - lam_init))
    return torch.cat(result, dim=-1) @ out.T


@pytest.mark.parametrize("source", ["self", "paper", "maps"])
def test_differential_attention_equals_its_formula(source):
    torch.manual_seed(0)
    attention = Attention(12, 3, 2, True, source).double()
    x, y = torch.randn(7, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    lq1, lk1, lq2, lk2 = attention.lam
    lam = torch.exp(lq1 @ lk1) - torch.exp(lq2 @ lk2) + attention.lam_init
    assert attention.lam_init == pytest.approx(0.8 - 0.6 * math.exp(-0.6))
    keys = {"self": (x, x), "paper": (y, y), "maps": (x, y)}[source]
    queries = {"self": (x, x), "paper": (x, x), "maps": (x, y)}[source]
    expected = plain_differential_attention(torch.stack(queries), keys, y if source == "paper" else x, attention.q.weight, attention.k.weight,
                                            attention.v.weight, attention.out.weight, lam, attention.norm, attention.lam_init, 3)
    got = attention(x[None]) if source == "self" else attention(x[None], attention.cache(y[None]))
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=1e-7)


@needs_oracle
@pytest.mark.parametrize("mode", ["maps", "keys"])
def test_differential_attention_equals_the_official_module(mode):
    """Official MultiheadDiffAttn(16, 4 heads, layer 2). 'keys' takes queries and values from x and keys from y."""
    z = np.load(COMPONENTS)
    w = {k: torch.from_numpy(z[f"diff_attn_{mode}/w/{k}"]) for k in
         ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "q_proj_1.weight", "q_proj_2.weight", "k_proj_1.weight", "k_proj_2.weight",
          "v_proj.weight", "out_proj.weight", "subln.weight")}
    x, y, out = (torch.from_numpy(z[f"diff_attn_{mode}/{k}"]) for k in ("x", "y", "out"))
    attention = Attention(16, 4, 2, True, "maps").double()
    with torch.no_grad():
        attention.lam.copy_(torch.stack([w["lambda_q1"], w["lambda_k1"], w["lambda_q2"], w["lambda_k2"]]))
        attention.norm.copy_(w["subln.weight"])
        for name in ("q", "k"):
            getattr(attention, name).weight.copy_(torch.cat([w[f"{name}_proj_1.weight"], w[f"{name}_proj_2.weight"]]))
        attention.v.weight.copy_(w["v_proj.weight"])
        attention.out.weight.copy_(w["out_proj.weight"])
        if mode == "maps":
            got = attention(x, attention.cache(y))
        else:
            lq1, lk1, lq2, lk2 = attention.lam
            lam = (lq1 @ lk1).exp() - (lq2 @ lk2).exp() + attention.lam_init
            a = scdfm.differential_attention(attention.split(attention.q(x)), attention.split(attention.k(y)),
                                             attention.split(attention.v(x)), lam, attention.norm, attention.lam_init)
            got = attention.out(a.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, out, rtol=1e-6, atol=1e-6)     # the official lambda is computed in fp32


@needs_oracle
def test_timestep_embedding_equals_the_official_one():
    z = np.load(COMPONENTS)
    got = timestep_embedding(torch.from_numpy(z["timestep/t"]))
    torch.testing.assert_close(got, torch.from_numpy(z["timestep/embedding256"]), rtol=1e-5, atol=1e-5)


def test_plain_attention_is_scaled_dot_product_attention():
    torch.manual_seed(0)
    attention, x = Attention(12, 3, 0, False, "self"), torch.randn(2, 5, 12)
    heads = [(p(x).unflatten(-1, (3, 4)).transpose(1, 2)) for p in (attention.q, attention.k, attention.v)]
    a = torch.softmax(heads[0] @ heads[1].transpose(-1, -2) / 2, -1) @ heads[2]
    torch.testing.assert_close(attention(x), attention.out(a.transpose(1, 2).flatten(2)))
    assert sum(p.numel() for p in attention.parameters()) == 4 * 12 * 12


# ------------------------------------------------------------------------------------------------ graph and gene encoder

def test_graph_is_the_k_nearest_by_absolute_correlation(dataset):
    graph = scdfm.coexpression_graph(dataset, 4).numpy()
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
    graph = scdfm.coexpression_graph(Silent, 4)
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


def test_knn_0_attends_to_every_gene(dataset, panel):
    model = build(dataset, panel, tiny(knn=0))
    assert model.encoder.graph is None
    before = model.encoder(torch.arange(5))
    with torch.no_grad():
        model.encoder.table.weight[30] += torch.linspace(-1, 2, 16)
    assert ((model.encoder(torch.arange(5)) - before).abs().max(1).values > 1e-12).all()


# ------------------------------------------------------------------------------------------------ perturbations

def inputs(panel, conditions, config, cells=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    genes = torch.randperm(len(panel.genes), generator=generator)[:20]
    x, control = (torch.rand(cells, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens, weight = scdfm.slots(conditions, panel, config)
    return x, torch.rand(cells, generator=generator, dtype=torch.float64), control, genes, tokens, weight.double()


@pytest.mark.parametrize("embedding", ["gene", "table"])
def test_slot_order_does_not_matter_and_the_perturbation_does(dataset, panel, embedding):
    config = tiny(pert_embedding=embedding)
    model = build(dataset, panel, config)
    v = {c: model(*inputs(panel, [c], config)) for c in ("TF1+TF2", "TF2+TF1", "TF1+TF3", "TF1", "TF1+TF2+TF3")}
    torch.testing.assert_close(v["TF1+TF2"], v["TF2+TF1"], rtol=1e-6, atol=1e-9)
    for other in ("TF1+TF3", "TF1", "TF1+TF2+TF3"):
        assert (v["TF1+TF2"] - v[other]).abs().max() > 1e-3


def test_single_is_the_mean_with_the_empty_slot(panel):
    tokens, weight = scdfm.slots(["TF1", "TF1+TF2", "TF1+TF2+TF3"], panel, tiny())
    G, column = len(panel.genes), {g: i for i, g in enumerate(panel.genes)}
    assert tokens[0].tolist() == [column["TF1"], G, G] and weight[0].tolist() == [0.5, 0.5, 0]
    assert weight[1].tolist() == [0.5, 0.5, 0]
    assert weight[2].tolist() == pytest.approx([1 / 3] * 3)


def test_perturbation_outside_the_panel_has_its_own_row(panel):
    other = data.Panel(panel.genes, panel.eval_genes, ["DRUG", "TF1", "XYZ"], [-1, panel.genes.index("TF1"), -1], ["DRUG"])
    tokens, _ = scdfm.slots(["DRUG", "XYZ", "TF1"], other, tiny())
    G = len(panel.genes)
    assert tokens[:, 0].tolist() == [G + 1, G + 2, panel.genes.index("TF1")]
    assert scdfm.ScDFM(tiny(), other).encoder.table.num_embeddings == G + 3
    assert scdfm.known(other, tiny())[1] == {"XYZ"}             # neither trained nor a gene: untrained embedding
    tokens, _ = scdfm.slots(["DRUG"], other, tiny(pert_embedding="table"))
    assert tokens.tolist() == [[0, 3]]


def test_conditions_of_one_batch_do_not_mix(dataset, panel):
    """A batch of two conditions gives each cell what a batch of its own condition gives."""
    config = tiny()
    model = build(dataset, panel, config)
    x, t, control, genes, tokens, weight = inputs(panel, ["TF1", "TF2+TF3"], config)
    both = model(x, t, control, genes, tokens, weight)
    for i, condition in enumerate(("TF1", "TF2+TF3")):
        cells = slice(3 * i, 3 * i + 3)
        tokens, weight = scdfm.slots([condition], panel, config)
        alone = model(x[cells], t[cells], control[cells], genes, tokens, weight.double())
        torch.testing.assert_close(both[cells], alone, rtol=1e-6, atol=1e-8)


def test_gene_order_of_the_subset_only_permutes_the_output(dataset, panel):
    config = tiny()
    model = build(dataset, panel, config)
    x, t, control, genes, tokens, weight = inputs(panel, ["TF1"], config)
    p = torch.randperm(20)
    torch.testing.assert_close(model(x[:, p], t, control[:, p], genes[p], tokens, weight), model(x, t, control, genes, tokens, weight)[:, p],
                               rtol=1e-6, atol=1e-8)


def test_adaln_is_zero_at_the_start(dataset, panel):
    """At initialisation the gates are 0: time and control cells cannot matter yet."""
    config = tiny()
    model = build(dataset, panel, config, randomise=False)
    x, t, control, *rest = inputs(panel, ["TF1"], config)
    torch.testing.assert_close(model(x, t, control, *rest), model(x, 1 - t, control + 1, *rest))


def test_cross_attention_reads_the_control_cells(dataset, panel):
    for source in ("paper", "maps"):
        config = tiny(cross_attention=source)
        model = build(dataset, panel, config)
        x, t, control, *rest = inputs(panel, ["TF1"], config)
        assert (model(x, t, control, *rest) - model(x, t, control + 1, *rest)).abs().max() > 1e-4


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


@needs_oracle
def test_mmd_equals_the_official_value():
    z = np.load(COMPONENTS)
    got = mmd_squared(torch.from_numpy(z["mmd/real"])[None], torch.from_numpy(z["mmd/generated"])[None])
    assert got.item() == pytest.approx(float(z["mmd/value"]), rel=1e-4)


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
    tokens = torch.zeros(2, 2, dtype=torch.long)

    def net(x, *_):
        return torch.zeros_like(x)
    flow, mmd = scdfm.scdfm_loss(net, x1, x1, t, x0, None, tokens, None, 0.5)
    assert flow.item() == pytest.approx((x1 - x0).square().mean().item())
    x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
    expected = np.mean([slow_mmd(x1[i:i + 4], x_t[i:i + 4]) for i in (0, 4)])
    assert mmd.item() == pytest.approx(expected, rel=1e-4)
    assert scdfm.scdfm_loss(net, x1, x1, t, x0, None, tokens, None, 0)[1] == 0

    def exact(x, *_):
        return x1 - x0
    flow, mmd = scdfm.scdfm_loss(exact, x1, x1, t, x0, None, tokens, None, 0.5)
    assert flow == 0 and mmd < 0            # the generated cells are the real ones: unbiased MMD of a sample with itself


# ------------------------------------------------------------------------------------------------ sampling

@pytest.mark.parametrize("ode", ["euler", "heun", "rk4"])
@pytest.mark.parametrize("source", ["paper", "maps"])
def test_cached_sampling_equals_uncached(dataset, panel, ode, source):
    """Against plain Euler, Heun and Runge-Kutta steps that call the whole network at every evaluation."""
    config = tiny(ode=ode, cross_attention=source)
    model = build(dataset, panel, config)
    _, _, control, genes, tokens, weight = inputs(panel, ["TF1+TF2"], config)
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            x = torch.randn(control.shape, generator=torch.Generator().manual_seed(3))
            got = sample(model, x, control, genes, tokens, weight, config)

            def v(x, t):
                return model(x, torch.full((len(x),), t), control, genes, tokens, weight)
            h = 1 / config.ode_steps
            for t in np.arange(config.ode_steps) * h:
                if ode == "euler":
                    x = x + h * v(x, t)
                elif ode == "heun":
                    a = v(x, t)
                    x = x + h / 2 * (a + v(x + h * a, t + h))
                else:
                    a = v(x, t)
                    b = v(x + h / 2 * a, t + h / 2)
                    c = v(x + h / 2 * b, t + h / 2)
                    x = x + h / 6 * (a + 2 * b + 2 * c + v(x + h * c, t + h))
        finally:
            torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, x.clamp(min=0), rtol=1e-5, atol=1e-5)
    assert got.max() > 0.1


@pytest.mark.parametrize("ode, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_order_of_the_integrators(ode, order):
    """dx/dt = x t from a known start: halving the step divides the error by 2^order."""
    class Model:
        def context(self, *_):
            return None

        def modulation(self, t):
            return t.double()

        def velocity(self, x, t, _):
            return x * t
    control = torch.zeros(1, 500, dtype=torch.float64)
    start = torch.randn(control.shape, generator=torch.Generator().manual_seed(0)).double()
    exact = (start * math.exp(0.5)).clamp(min=0)
    errors = []
    for steps in (4, 8):
        got = sample(Model(), start, control, None, None, None, tiny(ode=ode, ode_steps=steps))
        errors.append((got - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_generated_cells_do_not_depend_on_the_chunks(dataset, panel, monkeypatch):
    config = tiny()
    model = build(dataset, panel, config).float()
    run = scdfm.Run(config)
    run.panel = panel
    control, sizes = dataset.controls("test", covariate="")[:9], []

    def watched(model, x, *rest):
        sizes.append(len(x))
        return sample(model, x, *rest)
    monkeypatch.setattr(scdfm, "sample", watched)
    whole = scdfm.generate(model, run, "TF1", control, panel.eval_genes, seed=5)
    monkeypatch.setattr(scdfm.math, "ceil", lambda x: 4)
    chunks = scdfm.generate(model, run, "TF1", control, panel.eval_genes, seed=5)
    assert sizes == [9, 3, 2, 2, 2] and whole.shape == (9, len(panel.eval_genes)) and (whole >= 0).all()
    np.testing.assert_allclose(whole, chunks, rtol=1e-4, atol=1e-5)
    other = scdfm.generate(model, run, "TF1", control, panel.eval_genes, seed=6)
    assert np.abs(whole - other).max() > 0.1


def test_the_network_compiles_without_graph_breaks(dataset, panel):
    """The graph that inductor would get: one for training, one for sampling."""
    config = tiny()
    model = build(dataset, panel, config)
    args = inputs(panel, ["TF1", "TF2+TF3"], config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*args), model(*args))
    velocity = torch.compile(model.velocity, backend="eager", fullgraph=True)
    x, t, *rest = args
    torch.testing.assert_close(velocity(x, model.modulation(t), model.context(*rest)), model(*args))


def test_lambda_and_mmd_keep_their_precision_under_bf16(dataset, panel):
    config = tiny()
    model = build(dataset, panel, config).float()
    x, t, control, genes, tokens, weight = (a.float() if a.is_floating_point() else a for a in inputs(panel, ["TF1"], config))
    lams, real = [], scdfm.differential_attention

    def watched(q, k, v, lam, *rest):
        lams.append(lam)
        return real(q, k, v, lam, *rest)
    scdfm.differential_attention = watched
    try:
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x, t, control, genes, tokens, weight)
            assert mmd_squared(x[None, :3], x[None, 3:]).item() == pytest.approx(mmd_squared(x[None, :3].double(), x[None, 3:]).item(), rel=1e-5)
    finally:
        scdfm.differential_attention = real
    assert all(lam.dtype == torch.float32 for lam in lams) and len(lams) == 4
    torch.testing.assert_close(low, model(x, t, control, genes, tokens, weight), rtol=0.1, atol=0.1)


def test_model_learns_a_bimodal_response():
    """Two modes at 0 and 3 for one perturbation: flow matching must produce both, where a mean regression gives 1.5."""
    torch.manual_seed(0)
    panel = data.Panel([f"g{i}" for i in range(4)], [0, 1, 2, 3], ["P"], [-1], ["P"])
    config = tiny(knn=0, width=32, layers=1, ode_steps=20, dropout=0.0)
    model = scdfm.ScDFM(config, panel)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    tokens, weight = scdfm.slots(["P"], panel, config)
    genes, control = torch.arange(4), torch.ones(128, 4)
    for _ in range(250):
        mode = 3 * (torch.rand(128, 1) < 0.5)
        x1 = mode + 0.2 * torch.randn(128, 4)
        flow, mmd = scdfm.scdfm_loss(model, x1, control, torch.rand(128), torch.randn(128, 4), genes, tokens, weight, 0.5)
        optimizer.zero_grad()
        (flow + 0.5 * mmd).backward()
        optimizer.step()
    x = sample(model.eval(), torch.randn(400, 4), torch.ones(400, 4), genes, tokens, weight, config).mean(1)
    high = (x > 1.5).float().mean().item()
    assert 0.3 < high < 0.7                                     # both modes, about equally often
    assert x[x > 1.5].mean().item() == pytest.approx(3, abs=0.4) and x[x < 1.5].mean().item() == pytest.approx(0.1, abs=0.3)


def test_weights_survive_a_round_trip_through_build(dataset, panel):
    config = tiny()
    model = build(dataset, panel, config)
    clone = scdfm.ScDFM(config, panel).double().eval()
    clone.load_state_dict(model.state_dict())
    args = inputs(panel, ["TF1"], config)
    torch.testing.assert_close(clone(*args), model(*args))
    assert F.mse_loss(clone(*args), torch.zeros(6, 20, dtype=torch.float64)) > 0
