"""bench.py: baselines on cases whose answer is known, the table, runs that are interrupted, other tools, misuse.

Most runs here are of a stub: a script that takes the flags of a method and copies a run that a fixture has made.
"""
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
from scipy.spatial.distance import cdist

import bench
import data
import metrics
from conftest import ROOT

NAMES = [f"P{i}" for i in range(8)]
PAIRS = ["+".join(pair) for pair in itertools.combinations(NAMES, 2)]
LAST = ["truth", "oracle, no interaction", "replicate", "can this metric tell"]      # of simulated data

STUB = """
import json, shutil, signal, sys, time
from pathlib import Path

given = sys.argv[1:]
out = Path(given[given.index("--out") + 1])
if "--predict" in given:
    args = (Path(given[given.index("--ckpt") + 1]).parent / "args.json").read_text()
    shutil.copy(Path(__file__).parent / ("lazy.h5ad" if "--lazy" in args else "exact.h5ad"), out)
    sys.exit()
if "--resume" in given:
    args = json.loads((out / "args.json").read_text())
else:
    args = given
    out.mkdir(parents=True)
    (out / "args.json").write_text(json.dumps(args))
if "--fail" in args:
    sys.exit("error: --fail: as asked")
if "--wait" in args and "--resume" not in given:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (out / "ckpt.pt").touch()
    try:
        time.sleep(100)
    except KeyboardInterrupt:
        sys.exit(130)
fold, seed = (args[args.index(flag) + 1] for flag in ("--fold", "--seed"))
shutil.copytree(Path(__file__).parent / f"f{fold}-s{seed}", out, dirs_exist_ok=True)
"""

SPEED_STUB = """
import json, time, types
from dataclasses import dataclass
import data, torch

METHOD, PRESETS, SAMPLING, USES = "stub", {"paper": {}, "demo": {}}, set(), {}

@dataclass
class Config(data.RunConfig):
    pretrain_steps: int = 99

class Run:
    say, rank = print, 0
    bf16 = compile = False
    method = METHOD

    def __init__(self, config):
        self.config, self.out, self.device = config, data.Path(config.out), torch.device("cpu")

def check(config):
    assert config.pretrain_steps == 3

def variants(config):
    return {"": {"guidance": 2}}

def predict(run, model, sizes, controls, columns, guidance):
    (n,) = sizes.values()
    assert model == "trained" and guidance == 2
    time.sleep(n / 2000)

def train(run, state):
    torch.ones(900, 900) @ torch.ones(900, 900)                  # outside the steps
    for step in range(run.config.steps if run.config.steps < 3 else 0):
        weight = torch.nn.Parameter(torch.ones(500, 500))
        q = torch.ones(1, 4, 512, 64, requires_grad=True)
        loss = (torch.ones(500, 500) @ weight).sum() + torch.nn.functional.scaled_dot_product_attention(q, q, q).sum()
        loss.backward()
    lines = [{"step": 5, "seconds": 9.0, "cells_per_s": 1.0, "stage": "pretraining"}, {"step": 5, "val": {"l2": 1.0}}]
    lines += [{"step": step, "seconds": 3 + 0.02 * step, "cells_per_s": 100.0} for step in range(1, 41)]
    (run.out / "log.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    return "trained"
"""


def main(capsys, *flags):
    """bench.main in this process: (exit code, output, errors)."""
    with pytest.raises(SystemExit) as stop:
        bench.main([str(f) for f in flags])
    done = capsys.readouterr()
    return subprocess.CompletedProcess(flags, stop.value.code or 0, done.out, done.err)


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def written(folder):
    return json.loads((folder / "bench.json").read_text())["rows"]


# ------------------------------------------------------------------------------------------------ baselines

@pytest.fixture
def additive():
    """Effects of 8 singles and their pairs: exactly additive. (train, Y, test, truth)"""
    effect = dict(zip(NAMES, np.random.default_rng(0).normal(size=(8, 30))))
    effect |= {pair: sum(effect[p] for p in pair.split("+")) for pair in PAIRS}
    train, test = NAMES + PAIRS[:20], PAIRS[20:]
    return train, np.array([effect[g] for g in train]), test, np.array([effect[g] for g in test])


def test_ridge_is_exact_on_additive_data(additive):
    train, Y, test, truth = additive
    np.testing.assert_allclose(bench.ridge(train, Y, test, 1e-9), truth, atol=1e-6)
    assert np.abs(bench.ridge(train, Y, test, 100.0) - truth).max() > 0.5            # too much shrinkage


def test_unseen_perturbations_get_the_mean_effect(additive):
    effect = additive[1][:8]
    np.testing.assert_allclose(bench.ridge(NAMES, effect, ["NEW"], 1e-9)[0], effect.mean(0), atol=1e-6)


def interacting(kind):
    """Singles P0 to P7 of two modules, even and odd, and their doubles: within a module kind[0] of the sum, else
    kind[1] of the first's effect and kind[2] of the second's, even first. (train, Y, test, truth)"""
    rng = np.random.default_rng(0)
    module = rng.normal(size=(2, 60))
    effect = {p: module[i % 2] + rng.normal(0, 0.3, 60) for i, p in enumerate(NAMES)}
    for pair in PAIRS:
        a, b = sorted(pair.split("+"), key=lambda p: int(p[1:]) % 2)
        same = int(a[1:]) % 2 == int(b[1:]) % 2
        effect[pair] = (kind[0] if same else kind[1]) * effect[a] + (kind[0] if same else kind[2]) * effect[b]
    train, test = NAMES + PAIRS[::2], PAIRS[1::2]
    return train, np.array([effect[g] for g in train]), test, np.array([effect[g] for g in test])


def test_pairs_learns_interactions_from_doubles_of_similar_singles_and_their_order():
    train, Y, test, truth = interacting((0.4, 1.5, 0.5))
    options = {"amp": 1.0, "a0": 0.3, "noise": 0.05, "lam": 1.0}
    error = np.square(bench.pairs(train, Y, test, **options) - truth).mean()
    additive = np.square(sum(Y[[NAMES.index(g.split("+")[i]) for g in test]] for i in (0, 1)) - truth).mean()
    assert error < 0.02 * additive
    swapped = ["+".join(reversed(g.split("+"))) for g in test]                       # the order of a name says nothing
    np.testing.assert_allclose(bench.pairs(train, Y, swapped, **options), bench.pairs(train, Y, test, **options))
    there = bench.pairs([f"{g}@T" for g in train], Y, [f"{g}@T" for g in test], **options)
    np.testing.assert_allclose(there, bench.pairs(train, Y, test, **options))


def test_pairs_is_ridge_where_a_single_was_not_measured_or_few_doubles_train(additive):
    train, Y, _, _ = additive
    options = {"amp": 1.0, "a0": 0.3, "noise": 0.1, "lam": 1.0}
    test = ["P6+P7", "NEW+P1", "P1", "P1+P2+P3"]
    ridge = bench.ridge(train, Y, test, 1.0)
    same = (bench.pairs(train, Y, test, **options) == ridge).all(axis=1)
    assert same.tolist() == [False, True, True, True]
    few = bench.pairs(train[:10], Y[:10], test, **options)                           # two doubles
    np.testing.assert_array_equal(few, bench.ridge(train[:10], Y[:10], test, 1.0))


def test_cross_validation_finds_the_right_hyperparameters(additive):
    train, Y, test, truth = additive
    grid = bench.GRIDS["ridge"][1]
    noisy = Y + np.random.default_rng(1).normal(0, 0.05, Y.shape)
    options = bench.tune(bench.ridge, grid, train, noisy, test)
    errors = [np.square(bench.ridge(train, noisy, test, **o) - truth).sum() for o in grid]
    assert errors[grid.index(options)] < 1.5 * min(errors) < max(errors) / 10


def test_tuning_holds_out_conditions_of_the_tested_kind_and_never_trains_on_them(additive):
    """Asked for doubles, every double is held out once per option, no single; what is held out is not in training."""
    train, Y, test, _ = additive
    held = []

    def spy(known, effects, asked):
        assert not set(known) & set(asked) and len(known) + len(asked) == len(train) == len(effects) + len(asked)
        held.extend(asked)
        return np.zeros((len(asked), Y.shape[1]))
    bench.tune(spy, [{}, {}], train, Y, test)
    assert sorted(held) == sorted(PAIRS[:20] * 2)
    held.clear()
    bench.tune(spy, [{}, {}], train, Y, ["A+B+C"])          # no triple to learn from: all count
    assert sorted(held) == sorted(train * 2)


def test_linear_recovers_a_planted_low_rank_map():
    """Effects count * b + G W p, genes being their own perturbations: unseen singles and doubles are predicted, from
    singles and doubles."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(60)]
    embedding = {g: rng.normal(size=4) for g in genes}
    E = np.stack(list(embedding.values()))
    G = (E - E.mean(0)) / E.std(0)
    W, b = rng.normal(size=(4, 4)), rng.normal(size=60)

    def effects(groups):
        return np.array([sum(b + G @ W @ G[genes.index(p)] for p in g.split("+")) for g in groups])
    train = genes[:20] + [f"{a}+{b}" for a, b in zip(genes[20:30], genes[:10])]
    test = ["G40", "G50", "G40+G50", "G1+G55"]
    options = {"lam": 1e-9, "k": 4, "control": np.zeros(60), "genes": genes, "embedding": embedding}
    np.testing.assert_allclose(bench.linear(train, effects(train), test, **options), effects(test), atol=1e-5)
    few = bench.linear(train[:3], effects(train[:3]), test, **options)               # cannot know W
    assert np.abs(few - effects(test)).max() > 1


def test_linear_with_its_own_embedding_beats_the_mean():
    """Genes of one program have the same PCA row; a perturbation of its members has the same effect."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(40)]
    program = np.arange(40) % 2
    effect = np.where(program[:, None] == program, 1.0, -0.5) + rng.normal(0, 0.05, (40, 40))   # (perturbed, gene)
    predicted = bench.linear(genes[:20], effect[:20], genes[20:], lam=0.1, k=2, control=np.full(40, 2.0), genes=genes)
    error = np.square(predicted - effect[20:]).mean()
    assert error < 0.05 * np.square(effect[:20].mean(0) - effect[20:]).mean()


def kernel_options(embedding=None, controls=None):
    return {"k": 2, "control": np.zeros(20), "genes": [f"G{i}" for i in range(20)], "embedding": embedding,
            "controls": controls or {}}


def test_kernel_transfers_a_perturbation_by_the_distance_of_control_means():
    """d = 1, 2, 4 from the covariate that is asked for: weights exp(-4 (d / 2)^2). Other perturbations say nothing."""
    controls = {v: np.full(20, d) / 20 ** 0.5 for v, d in {"here": 0, "near": 1, "far": 2, "away": 4}.items()}
    train = ["X@away", "Y@near", "X@far", "X@near", "Y@here"]
    Y = np.random.default_rng(0).normal(size=(5, 20))
    weight = np.exp([-16, -np.inf, -4, -1, -np.inf])
    predicted = bench.kernel(train, Y, ["X@here"], **kernel_options(controls=controls))
    np.testing.assert_allclose(predicted[0], weight / weight.sum() @ Y, atol=1e-12)


def test_kernel_finds_the_twin_of_an_unseen_perturbation_in_its_covariate():
    """The effect of training group i is the i-th unit vector: a predicted effect is the weights."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10, 5))
    embedding = {f"G{i}": vectors[i % 10] + rng.normal(0, 0.01, 5) for i in range(20)}          # G3 and G13 are twins
    genes = list(embedding)
    weights = bench.kernel(genes[:10], np.eye(10), genes[10:], **kernel_options(embedding))
    E = np.stack(list(embedding.values()))
    d = cdist(E[10:] / E.std(0), E[:10] / E.std(0))
    expected = np.exp(-4 * (d / np.median(d, axis=1, keepdims=True)) ** 2)
    np.testing.assert_allclose(weights, expected / expected.sum(1, keepdims=True), rtol=1e-6)
    assert weights.argmax(1).tolist() == list(range(10))
    groups = [f"{g}@{c}" for g in genes[:10] for c in ("a", "b")]
    weights = bench.kernel(groups, np.eye(20), ["G13@b", "G14@a", "G14@c"], **kernel_options(embedding))
    assert weights[:2].argmax(1).tolist() == [7, 8] and not weights[0, ::2].any() and not weights[1, 1::2].any()
    np.testing.assert_allclose(weights[2, 8:10], weights[2].max())                  # a covariate without any: all


def test_kernel_says_nothing_about_what_it_cannot_relate():
    Y = np.ones((2, 20))
    effects = bench.kernel(["G1", "G2"], Y, ["DRUG", "G1+DRUG", "G3:0.5"], **kernel_options())
    assert effects.any(axis=1).tolist() == [False, False, True]                      # a dose of a gene: the gene's
    assert not bench.kernel(["D1", "D2"], Y, ["G3"], **kernel_options()).any()


def test_what_is_not_defined_for_all_conditions_is_left_out(demo, capsys, monkeypatch, tmp_path):
    """Additive for a single, a kernel that is related to nothing for one of the conditions."""
    double = next(c for c in data.read_cells(demo).condition if "+" in c and "TF1" not in c.split("+"))
    data.write_json(tmp_path / "split.json", {"test": ["TF1", double]})
    effects = np.array([[1.0], [0.0]]) * np.ones(40)
    monkeypatch.setitem(bench.GRIDS, "kernel", (lambda train, Y, test, **_: np.resize(effects, (len(test), 40)), [{}]))
    out = ok(main(capsys, *flags_of(demo, tmp_path / "b", "none"), "--split", tmp_path / "split.json"))
    assert list(written(tmp_path / "b")) == ["control", "mean", "mean_cells", "linear", "ridge", "pairs", *LAST]
    assert "left out, since not defined for all test conditions: additive, kernel" in out


def test_baseline_cells_are_shifted_controls_of_the_same_covariate(tmp_path):
    data.simulate(tmp_path / "a.h5ad", cells=900, genes=40, cell_types=2)
    dataset = data.load(tmp_path / "a.h5ad", data.DataConfig(covariates="cell_type"), "transfer")
    effects = bench.fit_baseline("kernel", dataset)
    sizes = dataset.sizes("test", 20)
    cells, other = (bench.baseline_populations("kernel", dataset, effects, sizes, seed) for seed in (0, 1))
    groups = dataset.part("test")
    assert list(cells) == groups and len({bench.covariate(g) for g in groups}) == 2
    for group, effect in zip(groups, effects):
        controls = dataset.controls("test", dataset.eval_genes)[bench.covariate(group)]
        assert len(cells[group]) == min(len(dataset.rows[group]), 20)
        distance = np.abs((cells[group] - effect)[:, None] - controls).max(axis=2)
        assert (distance.min(axis=1) < 1e-5).all()
        assert not np.array_equal(cells[group], other[group])                        # another seed draws others


def test_baselines_never_see_test_cells(tmp_path):
    data.simulate(tmp_path / "a.h5ad", cells=900, genes=40)
    dataset = data.load(tmp_path / "a.h5ad", data.DataConfig(), "additive")
    before = {name: bench.fit_baseline(name, dataset) for name in bench.GRIDS}
    for group in dataset.part("test") + dataset.part("val"):
        for r in dataset.rows[group]:
            dataset.X.data[dataset.X.indptr[r]:dataset.X.indptr[r + 1]] = 7.0
    for name in bench.GRIDS:
        assert np.array_equal(before[name], bench.fit_baseline(name, dataset)), name


def test_ceilings_are_fresh_cells_of_the_simulators_truth(tmp_path):
    """With cell types, and none where the data are not simulated or their types were not asked for."""
    data.simulate(tmp_path / "a.h5ad", cells=900, genes=40, cell_types=2)
    dataset = data.load(tmp_path / "a.h5ad", data.DataConfig(covariates="cell_type"), "transfer")
    sizes = dict.fromkeys(dataset.part("test"), 400)
    cells, again, other = (bench.ceilings(dataset, sizes, seed)["truth"] for seed in (0, 0, 1))
    for group in sizes:
        assert np.array_equal(cells[group], again[group]) and not np.array_equal(cells[group], other[group])
        real = np.concatenate([dataset.cells(g, dataset.eval_genes) for g in dataset.groups if g == group])
        noise = real.std(0).mean() * (1 / len(real) + 1 / 400) ** 0.5
        assert np.abs(cells[group].mean(0) - real.mean(0)).mean() < 1.5 * noise
        other_type = cells[next(g for g in sizes if bench.covariate(g) != bench.covariate(group))]
        assert np.abs(other_type.mean(0) - real.mean(0)).mean() > 1.5 * noise
    assert not bench.ceilings(data.load(tmp_path / "a.h5ad", data.DataConfig(), "additive"), sizes, 0)
    for name in ("simulator", "seed"):                               # whole, or not at all
        uns, dataset.source.uns = dataset.source.uns, {k: v for k, v in dataset.source.uns.items() if k != name}
        assert not bench.ceilings(dataset, sizes, 0)
        dataset.source.uns = uns


def test_the_truth_of_doubles_has_their_interaction_and_the_oracles_has_none(tmp_path):
    data.simulate(tmp_path / "a.h5ad", cells=4000, genes=40)
    dataset = data.load(tmp_path / "a.h5ad", data.DataConfig(), "additive")
    kind = dict(zip(dataset.source.uns["truth_conditions"], dataset.source.uns["truth_interactions"]))
    real = {g: dataset.cells(g, dataset.eval_genes).mean(0) for g in dataset.part("test") if kind[g] != "additive"}
    off = {name: np.mean([np.abs(cells[g].mean(0) - real[g]).mean() for g in real])
           for name, cells in bench.ceilings(dataset, dict.fromkeys(real, 200), 0).items()}
    assert off["truth"] < 0.6 * off["oracle, no interaction"]


def test_pairs_is_tuned_by_leaving_out_one_double_at_a_time(demo, monkeypatch):
    folds, tune = [], bench.tune
    monkeypatch.setattr(bench, "tune", lambda *args: folds.append(args[5:]) or tune(*args))
    dataset = data.load(demo, data.DataConfig(), "additive")
    bench.fit_baseline("pairs", dataset)
    assert folds == [(), (len(dataset.part("train")),)]                              # ridge's five, and its own
    assert bench.fit_baseline("pairs", data.load(demo, data.DataConfig(), "unseen")) is None     # no double is tested


def test_the_oracle_knows_singles_and_takes_interactions_at_random():
    screen = data.Screen(seed=0)
    singles = dict(zip(screen.conditions, screen.shifts))
    i = screen.kinds.index("synergistic")
    a, b = sorted(int(name[2:]) - 1 for name in screen.conditions[i].split("+"))
    shifts = screen.any_double(screen.conditions[i], 2000, np.random.default_rng(0))
    known = np.stack([screen.double(a, b, kind) for kind in data.INTERACTIONS] + [screen.double(b, a, "epistatic")])
    which = np.abs(shifts[:, None] - known).sum(2)
    share = np.bincount(which.argmin(1), minlength=5) / 2000                         # of 120 pairs: 32, 32, 24, 16, 16
    np.testing.assert_allclose(which.min(1), 0, atol=1e-9)
    np.testing.assert_allclose(share, np.array([32, 32, 24, 16, 16]) / 120, atol=0.03)
    np.testing.assert_allclose(known[0], singles[f"TF{a + 1}"] + singles[f"TF{b + 1}"])


# ------------------------------------------------------------------------------------------------ the table

def row(kind, l2, n=2):
    return {"kind": kind, "mean": {"l2": l2}, "sd": {}, "values": {},
            "per_condition": {f"C{i}": {"l2": l2} for i in range(n)}}


def test_a_row_is_the_mean_and_the_sd_over_its_runs():
    runs = [("c", "floor", {"aggregate": {"l2": None}, "per_condition": {}})]
    for v, b in ((1.0, 2.0), (2.0, None), (9.0, 4.0)):
        runs.append(("m", "method", {"aggregate": {"l2": v}, "seconds": 10 * v,
                                     "per_condition": {"A": {"l2": v}, "B": {"l2": b}}}))
    rows = bench.collect(runs)
    m = rows["m"]
    assert (m["kind"], m["runs"], m["mean"]["l2"], m["seconds"]) == ("method", 3, 4, 40)
    assert m["sd"]["l2"] == pytest.approx(np.std([1, 2, 9], ddof=1))
    assert m["per_condition"] == {"A": {"l2": 4.0}, "B": {"l2": None}}               # undefined for one seed: undefined
    assert rows["c"]["mean"]["l2"] is rows["c"]["seconds"] is None


def test_rows_that_print_the_same_share_a_mark_and_replicate_and_published_rows_do_not_compete():
    rows = {"a": row("floor", 1.00004), "b": row("baseline", 1.0), "c": row("method", 2.0), "d": row("prediction", 2.0),
            "e": row("method", 3.0), "replicate": row("ceiling", 0.5, 0), "paper": row("published", 4.0, 0)}
    assert bench.marks(rows, "l2") == {"a": 0, "b": 0, "c": 1, "d": 1}
    for r in rows.values():
        r["mean"] = {"pds": r["mean"]["l2"]}
    assert bench.marks(rows, "pds") == {"e": 0, "c": 1, "d": 1}                      # the larger the better
    assert [line[1] for line in bench.table(rows, ["pds"])] == ["pds↑", "1.000", "1.000", "*2.000*", "*2.000*",
                                                                "**3.000**", "0.500", "4.000"]


def test_a_method_is_compared_with_the_best_floor_or_baseline():
    rows = {"control": row("floor", 3.0), "additive": row("floor", 1.5), "ridge": row("baseline", 2.0),
            "good": row("method", 1.0), "fair": row("method", 2.9), "bad": row("method", 4.0),
            "replicate": row("ceiling", 0.5, 0)}
    lines = bench.verdicts(rows, ["l2"])
    assert [line.partition(";")[0] for line in lines] == [
        f"{name}: better than every floor and baseline in {won} of 1 metrics"
        for name, won in (("good", 1), ("fair", 0), ("bad", 0))]
    assert ["LOSES to control or mean in l2" in line for line in lines] == [False, False, True]


def test_the_table_reads_as_markdown_and_drops_columns_that_do_not_fit():
    rows = {"a" * 20: row("method", 1.0) | {"seconds": 1234.0, "peak_memory_mb": None}, "b": row("floor", 2.0)}
    wide, narrow = (bench.render(bench.table(rows, ["l2", "mse"]), width) for width in (1000, 50))
    title, rule, first, _ = wide.splitlines()
    assert title.split() == ["|", "|", "l2↓", "|", "mse↓", "|", "seconds", "|", "peak", "MB", "|"]
    assert first == f"| {'a' * 20} | **1.000** |    - |   1,234 |       - |" and rule.count("-:") == 4
    assert "2 more columns in bench.md: seconds, peak MB" in narrow and max(map(len, narrow.splitlines())) <= 50


def test_published_rows_are_own_methods_and_only_for_their_data():
    rows = bench.published_rows(bench.Config(data="x/norman.h5", split="additive"))
    assert {name: (row["mean"]["l2"], row["mean"]["l2/control"]) for name, row in rows.items()} == {
        "scDFM, scDFM table 1": (1.7043, 1.7043 / 3.9937), "CellFlow, scDFM table 1": (1.7064, 1.7064 / 3.9937),
        "scBIG, scBIG table 1": (3.92, 3.92 / 9.25), "CellFlow, scBIG table 1": (4.54, 4.54 / 9.25)}
    assert list(bench.published_rows(bench.Config(data="combosciplex.h5", split="combosciplex.json"))) == [
        "scDFM, scDFM table 3"]                                                      # which has no CellFlow
    for other in (("papalexi.h5", "additive"), ("norman19_devel.h5ad", "additive"), ("norman.h5", "unseen")):
        assert not bench.published_rows(bench.Config(data=other[0], split=other[1]))
    for table, keys, values, control, _ in itertools.chain(*bench.PUBLISHED.values()):
        l2 = dict(zip(keys, values, strict=True))["l2"]
        assert set(keys) <= set(metrics.KEYS) and 0.3 < l2 / control < 0.8, table


def test_l2_stands_beside_its_ratio_to_the_papers_own_control(demo, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.PUBLISHED, ("small", "additive"), [("X table 1", ("l2",), (3.0,), 4.0, 2.0)])
    out = ok(main(capsys, *flags_of(demo, tmp_path / "b", "none")))
    ratio = {name: row["mean"]["l2/control"] for name, row in written(tmp_path / "b").items()}
    assert (ratio["X, X table 1"], ratio["CellFlow, X table 1"], ratio["control"]) == (0.75, 0.5, 1)
    lines = [[cell.strip(" *") for cell in line.split("|")] for line in out.splitlines() if line.startswith("| ")]
    assert lines[0][2:4] == ["l2↓", "l2/control↓"]
    assert ["X, X table 1", "3.000", "0.750"] in [line[1:4] for line in lines]
    assert ["ridge", bench.number(ratio["ridge"])] in [[line[1], line[3]] for line in lines]
    assert "only l2/control compares" in out


# fields in which a row differs from its method, and where the paper has the row
PRIMEFLOW = "velocity accumulate batch_size lr weight_decay p_null path sigma steps"
PCA = f"{PRIMEFLOW} space dropout mlp_layers"
OURS = "control_profile coupling effect_readout sigma standardise zeros mlp_layers"
ROWS = {
    "scdfm:no-mmd": ("figure 5, without MMD", "mmd_weight"),
    "scdfm:no-mask": ("figure 5, without the gene-gene mask", "knn"),
    "scdfm:plain-attention": ("figure 5, without the differential transformer", "differential"),
    "primeflow:mlp paper": ("table 3", f"{PRIMEFLOW} dropout guidance".replace(" path", "")),
    "primeflow:mlp norman": ("table 4", f"{PRIMEFLOW} hidden mlp_layers multipliers"),
    "primeflow:mlp demo": ("table 3 at the demo's size", f"{OURS} dropout"),
    "primeflow:pca paper": ("table 5", PCA),
    "primeflow:pca norman": ("table 6", f"{PCA} hidden multipliers ot_cells"),
    "primeflow:pca demo": ("table 5 at the demo's size", f"{OURS} p_null path space"),
    "primeflow:pca-ot paper": ("table 7", f"{PCA} coupling"),
    "primeflow:pca-ot norman": ("table 7", f"{PCA} hidden multipliers ot_cells coupling"),
    "primeflow:pca-ot demo": ("table 7 at the demo's size", f"{OURS} p_null path space"),
    "scbig:kmeans": ("table 6b, K-means unbalanced", "clustering"),
    "scbig:transformer": ("table 6a, encoding: normal", "encoder"),
    "scbig:no-correlation": ("table 6c", "corr_weight"),
    "scbig:no-pathways": ("table 6c", "path_weight"),
    "celltarnet:no-contrast": ("none: ours", "contrast_weight"),
    "celltarnet:no-denoising": ("none: ours", "denoise_weight"),
    "celltarnet:no-prior": ("none: ours", "prior"),
    "celltarnet:sparse": ("none: ours", "prior"),
    "celltarnet:low-rank": ("none: ours", "prior"),
    "scdfm:paper demo": ("none: the demo with the paper's choices", "effect_readout precondition zeros"),
    "primeflow:paper demo": ("none: the demo with the paper's choices", "velocity coupling sigma standardise "
                             "effect_readout control_profile p_null zeros"),
    "scbig:paper demo": ("none: the demo with the paper's choices", "effect_readout residual condition_dropout "
                         "schedule ema path_iterations ode_steps zeros"),
    "celltarnet:paper demo": ("none: the demo with the paper's choices", "effect_readout calibration zeros"),
}


@pytest.mark.parametrize("preset", ["paper", "norman", "demo"])
def test_a_row_differs_from_its_method_in_what_the_papers_row_does_and_runs_once(preset):
    """Every name of METHODS passes check(), in every preset of its method. No two rows are the same run."""
    seen = {}
    for name in bench.METHODS:
        method = importlib.import_module(name.partition(":")[0])
        config = bench.Config(data="x.h5ad", methods=(name,), preset=preset)
        if name.endswith(":paper") and preset != "demo":
            with pytest.raises(data.DataError, match="of --preset demo"):
                bench.asked_methods(config)
        elif preset in method.PRESETS:
            (_, flags), = bench.asked_methods(config).values()
            flags = ["--data", "x.h5ad", "--preset", preset, *flags]
            shared = method.Config, method.PRESETS, method.SAMPLING, method.USES
            row = data.parse_run(method.METHOD, "", *shared, flags)[0]
            method.check(row)
            row = asdict(row) | {"preset": ""}
            of = seen.setdefault(method.METHOD, row)
            place, listed = ROWS.get(f"{name} {preset}", ROWS.get(name, ("the method", "")))
            assert place and {field for field in row if row[field] != of[field]} == set(listed.split()), name
            assert ":" not in name or row not in seen.values(), name
            seen[name] = row


# ------------------------------------------------------------------------------------------------ the whole program

@pytest.fixture(scope="module")
def stub(demo, tmp_path_factory):
    """Path of a script that answers as a method does, for some folds and seeds: controls moved half of the way. Of
    training conditions it predicts the mean, with --lazy a control cell."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.py").write_text(STUB)
    for fold, seed in ((0, 0), (0, 1), (1, 1)):
        dataset = data.load(demo, data.DataConfig(hvg=1000), "additive", fold)
        genes, train, test = dataset.eval_genes, dataset.part("train"), dataset.part("test")
        names = [dataset.genes[i] for i in genes]
        controls = dataset.controls("test", genes)[""]
        start = data.pick_rows(controls, 8, seed) - controls.mean(0) / 2
        cells = {g: start + dataset.cells(g, genes).mean(0) / 2 for g in test}
        result = metrics.evaluate(cells, dataset.populations("test", genes), controls, names,
                                  dataset.populations("train", genes), seed=seed)
        variant = {key: result[key] for key in ("aggregate", "per_condition")}
        result |= {"seconds": 10 + fold, "peak_memory_mb": 100 + fold, "variants": {" w=3": variant}}
        place = folder / f"f{fold}-s{seed}"
        place.mkdir()
        data.write_json(place / "split.json", dataset.split)
        data.write_json(place / "metrics.json", result)
        exact = np.stack([dataset.cells(g, genes).mean(0) for g in train])
        for path, X, labels in ((place / "pred.h5ad", np.concatenate(list(cells.values())), np.repeat(test, 8)),
                                (folder / "exact.h5ad", exact, train),
                                (folder / "lazy.h5ad", controls[:len(train)], train)):
            data.write_h5ad(path, X, {"condition": np.array(labels, dtype=object)}, names)
    return folder / "stub.py"


def flags_of(demo, folder, *methods):
    return ["--data", demo, "--preset", "demo", "--eval-cells", 8, "--out", folder, "--methods", *methods]


def test_the_table_holds_what_the_runs_printed(demo, stub, capsys, tmp_path):
    """A fork on two folds: its values, and the floors and the replicate that its runs had."""
    out = ok(main(capsys, *flags_of(demo, tmp_path / "b", stub), "--seeds", 1, "--folds", 0, 1))
    rows = written(tmp_path / "b")
    fork = str(stub)
    assert list(rows) == [*metrics.FLOORS, *bench.GRIDS, fork, f"{fork} w=3", *LAST]
    results = [json.loads(path.read_text()) for path in stub.parent.glob("f*-s1/metrics.json")]
    assert (rows[fork]["runs"], rows[fork]["seconds"], rows[fork]["peak_memory_mb"]) == (2, 10.5, 100.5)
    for key in metrics.TABLE_KEYS:
        values = [r["aggregate"][key] for r in results]
        assert rows[fork]["mean"][key] == rows[f"{fork} w=3"]["mean"][key] == pytest.approx(np.mean(values))
        assert rows[fork]["sd"][key] == pytest.approx(np.std(values, ddof=1))
        for floor in metrics.FLOORS:
            values = [r["floors"][floor][key] for r in results]
            assert None in values or rows[floor]["mean"][key] == pytest.approx(np.mean(values)), (floor, key)
    assert rows["replicate"]["mean"]["l2"] == pytest.approx(np.mean([r["replicate"]["l2"] for r in results]))
    line = next(line for line in out.splitlines() if line.startswith("| ridge"))
    assert bench.number(rows["ridge"]["mean"]["l2"], rows["ridge"]["sd"]["l2"]) in line
    table = (tmp_path / "b" / "bench.md").read_text()
    assert line in table and "**" in table and "l2↓" in table and "seconds" in table
    tells = rows["can this metric tell"]["mean"]
    assert tells["l2"] == pytest.approx(np.mean([r["can_tell"]["l2"] for r in results]))
    several = [r["replicate_per_condition"] for r in results]
    of = {g: np.mean([each[g]["l2"] for each in several if g in each]) for each in several for g in each}
    assert of == pytest.approx({g: v["l2"] for g, v in rows["replicate"]["per_condition"].items()})


def test_a_method_of_the_repository_runs_and_loses_after_twenty_steps(demo, capsys, tmp_path):
    name = "scdfm --steps 20 --batch-size 16 --width 16 --layers 1 --heads 2 --gene-subset 30 --ode-steps 2"
    out = ok(main(capsys, *flags_of(demo, tmp_path / "b", name)))
    found = written(tmp_path / "b")[name]
    assert found["seconds"] > 0 and found["peak_memory_mb"] > 50 and found["mean"]["l2"] > 0
    assert "LOSES to control or mean in" in out


def test_stages_tell_what_underfits_from_what_does_not_transfer(demo, stub, capsys, monkeypatch, tmp_path):
    flags = flags_of(demo, tmp_path / "b", stub, f"{stub} --lazy")
    ok(main(capsys, *flags))
    for folder in (tmp_path / "b").glob("stub-*"):
        (folder / "ckpt.pt").touch()
    rows = written(tmp_path / "b")
    for fit, verdict in ((0.8, "interaction not predicted"), (1.0, "within the noise")):
        monkeypatch.setattr(bench, "FIT", fit)
        out = ok(main(capsys, *flags, "--stages"))
        lines = [[cell.strip() for cell in line.split("|")[2:-1]] for line in out.partition("| l2 ")[2].splitlines()]
        exact, lazy = lines[2:4]
        assert exact[4] == verdict and lazy[4] == "underfits"
        assert exact[1:4] == lazy[1:4] and float(exact[0]) < 0.8 * float(exact[1]) < float(lazy[0])
        assert exact[2:4] == [bench.number(rows[name]["mean"]["l2"]) for name in (str(stub), "replicate")]


def test_mmd_ranks_are_computed_only_where_asked(demo, stub, capsys, tmp_path):
    flags = flags_of(demo, tmp_path / "b", stub)
    ok(main(capsys, *flags))
    assert "mmd_rank" not in written(tmp_path / "b")["ridge"]["mean"]
    ok(main(capsys, *flags, "--keys", "l2", "mmd_rank"))
    rows = written(tmp_path / "b")
    assert all(rows[name]["mean"]["mmd_rank"] is not None for name in (str(stub), "ridge"))
    assert "mmd_pca30_rank" not in rows["ridge"]["mean"]


def test_a_killed_bench_goes_on_to_the_same_table(demo, stub, capsys, tmp_path):
    """Ctrl-C while the second run trains: it saves; the next call continues it, and repeats nothing."""
    methods = [stub, f"{stub} --wait"]
    flags = [*flags_of(demo, tmp_path / "b", *methods), "--jobs", 1]
    process = subprocess.Popen([sys.executable, ROOT / "bench.py", *map(str, flags)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in background
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not list((tmp_path / "b").glob("*/ckpt.pt")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, out + err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*/metrics.json")}
    assert len(before) == 1 and not (tmp_path / "b" / "bench.json").exists()
    out = ok(main(capsys, *flags))
    assert "holds 1 of 2 runs" in out and "/1]" in out and "resuming" in out
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    rows = written(tmp_path / "b")
    assert rows[str(stub)] == rows[f"{stub} --wait"]


def test_a_failed_run_is_reported_and_does_not_stop_the_rest(demo, stub, capsys, tmp_path):
    done = main(capsys, *flags_of(demo, tmp_path / "b", f"{stub} --fail", stub), "--no-baselines")
    assert done.returncode == 1
    assert "FAILED" in done.stderr and "--fail: as asked" in done.stderr
    rows = written(tmp_path / "b")
    assert str(stub) in rows and f"{stub} --fail" not in rows and "ridge" not in rows
    done = main(capsys, *flags_of(demo, tmp_path / "c", stub), "--no-baselines", "--train-on-val")
    assert done.returncode == 2 and "has another split" in done.stderr               # the stub's has a validation part
    for path in (tmp_path / "b").glob("*/split.json"):
        data.write_json(path, {"train": [], "val": [], "test": ["TF1"]})
    done = main(capsys, *flags_of(demo, tmp_path / "b", stub), "--no-baselines")
    assert done.returncode == 2 and "has another split" in done.stderr               # the data changed since


def test_other_tools_predictions_and_two_folds(demo, capsys, tmp_path):
    """The truth itself, whole and as many of its cells as a method generates: others for each seed."""
    dataset = data.load(demo, data.DataConfig(), "additive")
    X, condition = dataset.X.toarray(), data.read_cells(demo).condition
    files = {"oracle": (X[:, ::-1], condition, dataset.genes[::-1]), "few": (X[:60], condition[:60], dataset.genes),
             "narrow": (X[:, :9], condition, dataset.genes[:9])}
    for name, (cells, labels, genes) in files.items():
        data.write_h5ad(tmp_path / f"{name}.h5ad", cells, {"condition": labels}, genes)
    flags = [*flags_of(demo, tmp_path / "b", "none"), "--no-baselines", "--pred", f"ORACLE={tmp_path / 'oracle.h5ad'}"]
    out = ok(main(capsys, *flags, "--eval-cells", 99, "--folds", 0, 1))
    assert f"note: {tmp_path / 'oracle.h5ad'}: found labels" in out
    found = written(tmp_path / "b")["ORACLE"]
    assert found["mean"]["l2"] < 1e-5 and found["runs"] == 2 and found["mean"]["pds"] == 1
    ok(main(capsys, *flags, "--seeds", 0, 1))
    one, other = written(tmp_path / "b")["ORACLE"]["values"]["l2"]
    assert one > 0.1 < other != one
    for name, words in (("few", "test conditions"), ("narrow", "evaluation genes")):
        done = main(capsys, *flags_of(demo, tmp_path / "c", "none"), "--pred", f"X={tmp_path / name}.h5ad")
        assert done.returncode == 2 and words in done.stderr
    assert not (tmp_path / "c").exists()


def commands(monkeypatch, *flags):
    """The runs that bench.main would start."""
    planned = []
    monkeypatch.setattr(bench, "bench", planned.append)
    with pytest.raises(SystemExit):
        bench.main(["--data", "x.h5ad", *map(str, flags)])
    return [(job.name, job.fold, job.seed, " ".join(job.command)) for job in bench.jobs(planned[0], ROOT)]


def test_every_method_gets_the_same_flags_fold_and_seed(monkeypatch):
    runs = commands(monkeypatch, "--methods", "scdfm", "scdfm:no-mmd", "--folds", 0, 3, "--seeds", 1, 2)
    assert [run[:3] for run in runs] == [(name, fold, seed) for name in ("scdfm", "scdfm:no-mmd") for fold in (0, 3)
                                         for seed in (1, 2)]
    assert all(f"--fold {fold} --seed {seed}" in command for _, fold, seed, command in runs)
    assert ["--mmd-weight 0" in command for *_, command in runs] == [False] * 4 + [True] * 4
    runs = commands(monkeypatch, "--methods", "all", str(ROOT / "bench.py"))
    assert [run[0] for run in runs] == ["scdfm", "primeflow", "scbig", "celltarnet", str(ROOT / "bench.py")]
    for flags, words in (([], "--hvg 5000 --train-on-val --preset paper"),
                         (["--preset", "demo"], "--hvg 1000 --no-train-on-val --preset demo"),
                         (["--preset", "demo", "--hvg", 0, "--train-on-val"], "--hvg 0 --train-on-val --preset demo")):
        (_, _, _, command), = commands(monkeypatch, "--methods", "celltarnet", *flags)
        words = words.split(" --")
        assert all(f"--{word.removeprefix('--')} " in f"{command} " for word in words), command
        assert "--hvg-by variance" in command and "--no-exact-cells" in command      # celltarnet has another default


def test_a_folder_belongs_to_one_set_of_flags(demo):
    def folder(**flags):
        (job,) = bench.jobs(bench.Config(data=demo, **{"methods": ("scdfm",)} | flags), ROOT)
        return job.folder
    folders = [folder(), folder(hvg=70), folder(methods=("scdfm --knn 0",)), folder(methods=("scdfm:no-mmd",)),
               folder(split="cv", n_folds=3), folder(split="cv", n_folds=4), folder(seeds=(1,)), folder(folds=(1,))]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("flags, words", [
    (["--methods", "gpt5"], ["gpt5", "scdfm"]),
    (["--methods", "nothing.py"], ["nothing.py", "no script"]),
    (["--keys", "l3"], ["l3", "pearson_delta"]),
    (["--pred", "x.h5ad"], ["NAME=FILE"]),
    (["--pred", "scdfm=x.h5ad", "A=x", "B=x"], ["--pred scdfm:", "own rows"]),
    (["--pred", "A=x.h5ad", "B=x", "A=y"], ["--pred A:", "once"]),
    (["--pred", "truth=x.h5ad"], ["--pred truth:"]),
    (["--pred", "X=nothing.h5ad"], ["nothing.h5ad", "no such file"]),
    (["--seeds", "0", "0"], ["twice"]),
    (["--jobs", "-1"], ["--jobs -1"]),
    (["--cache-gb", "inf"], ["--cache-gb inf: must be a number"]),
    (["--split", "all"], ["--split all", "nothing"]),
    (["--embedding", "nothing.npz"], ["nothing.npz"]),
])
def test_misuse(flags, words, demo, capsys, tmp_path):
    done = main(capsys, "--data", demo, "--out", tmp_path / "b", "--methods", "none", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "b").exists()


def test_speed_of_a_script_whose_speed_is_known(demo, capsys, monkeypatch, tmp_path):
    """20 ms, two products of matrices and an attention forth and back per step, 2,000 sampled cells/s; JSON last."""
    (tmp_path / "stub.py").write_text(SPEED_STUB)
    monkeypatch.setattr(bench, "matrix_rate", lambda device, dtype: 50e9)
    out = ok(main(capsys, "--speed", "--data", demo, "--device", "cpu", "--methods", tmp_path / "stub.py"))
    (found,) = json.loads(out.strip().splitlines()[-1])["methods"]
    assert (found["ms/step"], found["cells/s"]) == (20, 100) and found["peak MB"] > 50
    per_step = 2 * 2 * 500 ** 3 + (4 + 10) * 4 * 512 * 512 * 64
    assert found["GFLOP/step"] == pytest.approx(per_step / 1e9, rel=1e-3)
    assert found["utilisation"] == pytest.approx(per_step / .02 / 50e9, rel=1e-3)
    assert 1900 < found["sampled cells/s"] <= 2000


def test_figures_and_what_is_missing_in_them(demo, stub, capsys, monkeypatch, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    flags = [*flags_of(demo, tmp_path / "b", stub), "--plot", "--pred", f"X={stub.parent / 'f0-s0' / 'pred.h5ad'}"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in ok(main(capsys, *flags)) and not (tmp_path / "b" / "pca.png").exists()
    monkeypatch.undo()
    ok(main(capsys, *flags))
    for name in ("errors", "methods", "genes", "pca"):
        assert (tmp_path / "b" / f"{name}.png").stat().st_size > 5000
    rows = {"control": row("floor", 3.0), "scdfm": row("method", 2.0), "scdfm:b": row("method", None),
            "c": row("method", 4.0), "replicate": row("ceiling", 0.5)}
    rows["scdfm"]["values"]["l2"] = [1.5, 2.5]
    colors = bench.row_colors(rows)
    assert colors["scdfm"] == colors["scdfm:b"] == bench.COLORS["scdfm"] != colors["c"]
    figure = bench.plot_methods(plt, rows, colors)
    bars, dots = figure.axes[0].patches, figure.axes[0].lines[1]
    np.testing.assert_array_equal([bar.get_width() for bar in bars], [3.0, 2.0, np.nan, 4.0, 0.5])
    assert [bar.get_alpha() for bar in bars] == [0.3, 1, 0.3, 0.3, 1]                # better than control, or a ceiling
    assert list(dots.get_xdata()) == [1.5, 2.5]
    assert figure.axes[0].lines[-1].get_xdata() == [3.0, 3.0]                        # the best floor
    figure = bench.plot_errors(plt, rows, colors)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == list(rows) and "method" in [text.get_text() for text in figure.legends[0].get_texts()]
    plt.close("all")
