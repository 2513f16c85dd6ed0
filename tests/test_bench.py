"""bench.py: baselines on cases whose answer is known, runs that are interrupted, other tools' predictions, misuse."""
import csv
import json
import re
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import data
import metrics
from conftest import METHODS, ROOT, TINY
from test_runs import error, ok

NAMES = [f"P{i}" for i in range(8)]
PAIRS = [f"{a}+{b}" for i, a in enumerate(NAMES) for b in NAMES[i + 1:]]
RUN = "scdfm " + " ".join(f for f in TINY["scdfm"] if f not in ("--split", "additive", "--eval-cells", "8", "--preset", "demo"))


@pytest.fixture
def additive():
    """Effects of 8 singles and their pairs: exactly additive. (train, Y, test, truth)"""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(8, 30))
    both = {p: sum(effect[NAMES.index(n)] for n in p.split("+")) for p in PAIRS}
    train, test = NAMES + PAIRS[:20], PAIRS[20:]
    Y = np.concatenate([effect, [both[p] for p in PAIRS[:20]]])
    return train, Y, test, np.array([both[p] for p in test])


# ------------------------------------------------------------------------------------------------ baselines

def test_ridge_and_latent_additive_are_exact_on_additive_data(additive):
    train, Y, test, truth = additive
    np.testing.assert_allclose(bench.ridge(train, Y, test, 1e-9), truth, atol=1e-6)
    np.testing.assert_allclose(bench.latent_additive(train, Y, test, 8), truth, atol=1e-8)
    assert np.abs(bench.latent_additive(train, Y, test, 2) - truth).max() > 0.5      # too few components
    assert np.abs(bench.ridge(train, Y, test, 100.0) - truth).max() > 0.5            # too much shrinkage


def test_unseen_perturbations_get_the_mean_effect(additive):
    train, Y, _, _ = additive
    singles, effect = train[:8], Y[:8]
    for predicted in (bench.ridge(singles, effect, ["NEW"], 1e-9), bench.latent_additive(singles, effect, ["NEW"], 8)):
        np.testing.assert_allclose(predicted[0], effect.mean(0), atol=1e-6)


def test_cross_validation_finds_the_right_hyperparameters(additive):
    train, Y, test, truth = additive
    noisy = Y + np.random.default_rng(1).normal(0, 0.05, Y.shape)
    options = bench.tune(bench.ridge, bench.GRIDS["ridge"][1], train, noisy, test)
    errors = [np.square(bench.ridge(train, noisy, test, **o) - truth).sum() for o in bench.GRIDS["ridge"][1]]
    assert errors[bench.GRIDS["ridge"][1].index(options)] < 1.5 * min(errors) < max(errors) / 10
    assert bench.tune(bench.latent_additive, bench.GRIDS["latent_additive"][1], train, Y, test)["k"] >= 8


def test_linear_recovers_a_planted_low_rank_map():
    """Effects b + G W p of genes that are their own perturbations: singles never seen, and doubles, are predicted."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(60)]
    embedding = {g: rng.normal(size=4) for g in genes}
    E = np.stack(list(embedding.values()))
    G = (E - E.mean(0)) / E.std(0)
    W, b = rng.normal(size=(4, 4)), rng.normal(size=60)
    effect = {g: b + G @ W @ G[i] for i, g in enumerate(genes)}
    train, test = genes[:30], ["G40", "G50", "G40+G50", "G1+G55"]
    truth = np.array([sum(effect[p] for p in t.split("+")) for t in test])
    options = dict(lam=1e-9, k=4, control=np.zeros(60), genes=genes, embedding=embedding)
    predicted = bench.linear(train, np.array([effect[g] for g in train]), test, **options)
    np.testing.assert_allclose(predicted, truth, atol=1e-5)
    few = bench.linear(train[:3], np.array([effect[g] for g in train[:3]]), test, **options)     # cannot know W
    assert np.abs(few - truth).max() > 1


def test_linear_with_its_own_embedding_beats_the_mean():
    """Genes of one program have the same PCA row; a perturbation of its members has the same effect."""
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(40)]
    program = np.arange(40) % 2
    effect = np.where(program[:, None] == program, 1.0, -0.5) + rng.normal(0, 0.05, (40, 40))   # (perturbed, gene)
    train, test = list(range(0, 20)), list(range(20, 40))
    options = dict(lam=0.1, k=2, control=np.full(40, 2.0), genes=genes)
    predicted = bench.linear([genes[i] for i in train], effect[train], [genes[i] for i in test], **options)
    assert np.square(predicted - effect[test]).mean() < 0.05 * np.square(effect[train].mean(0) - effect[test]).mean()


def test_nearest_neighbour_finds_the_twin():
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(20)]
    vectors = rng.normal(size=(10, 5))
    embedding = {g: vectors[i % 10] + rng.normal(0, 0.01, 5) for i, g in enumerate(genes)}      # G3 and G13 are twins
    options = dict(k=5, control=np.zeros(20), genes=genes, embedding=embedding)
    Y = rng.normal(size=(10, 20))
    found = bench.twins(genes[:10], Y, genes[10:], **options)
    np.testing.assert_array_equal(found, np.arange(10))
    np.testing.assert_array_equal(bench.nearest(genes[:10], Y, genes[10:], **options), Y)
    cells = [f"{g}@{c}" for g in genes[:10] for c in ("a", "b")]                                # the twin of the same cell type
    assert bench.twins(cells, np.repeat(Y, 2, 0), ["G13@b", "G14@a"], **options).tolist() == [7, 8]


def test_baseline_cells_have_the_predicted_mean_and_never_see_test_cells(tmp_path):
    data.simulate(tmp_path / "a.h5ad", cells=900, genes=40)
    dataset = data.load(tmp_path / "a.h5ad", data.DataConfig(), "additive")
    before = {name: bench.baseline_populations(name, dataset, bench.fit_baseline(name, dataset)[0], 20, 0) for name in bench.GRIDS}
    for rows in (dataset.rows[g] for part in ("test", "val") for g in dataset.part(part)):
        for r in rows:
            dataset.X.data[dataset.X.indptr[r]:dataset.X.indptr[r + 1]] = 7.0
    for name in bench.GRIDS:
        after = bench.baseline_populations(name, dataset, bench.fit_baseline(name, dataset)[0], 20, 0)
        assert list(after) == dataset.part("test")
        assert all(np.array_equal(before[name][g], after[g]) and len(after[g]) <= 20 for g in after), name


# ------------------------------------------------------------------------------------------------ the whole program

def rows_of(folder):
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return {name: {k: v for k, v in row.items() if k not in ("seconds", "peak_memory_mb")} for name, row in rows.items()}


@pytest.fixture(scope="module")
def whole(demo, run, tmp_path_factory):
    """An uninterrupted bench of two tiny methods: (folder, console output)."""
    folder = tmp_path_factory.mktemp("bench") / "b"
    out = ok(run("bench.py", "--data", demo, "--preset", "demo", "--eval-cells", 8, "--methods", RUN, f"{RUN} --knn 0", "--seeds", 0, 1, "--out",
                 folder))
    return folder, out


def test_the_table_holds_what_the_runs_printed(whole):
    folder, out = whole
    rows = rows_of(folder)
    assert list(rows) == ["control", "mean", "mean_cells", "additive", *bench.GRIDS, RUN, f"{RUN} --knn 0", "replicate"]
    for name in (RUN, f"{RUN} --knn 0"):
        results = [json.loads((f / "metrics.json").read_text()) for f in folder.iterdir() if (f / "metrics.json").exists()]
        mine = [r for r in results if (r["config"]["knn"] == 0) == name.endswith("--knn 0")]
        assert sorted(r["seed"] for r in mine) == [0, 1]
        for key in metrics.TABLE_KEYS:
            values = [r["aggregate"][key] for r in mine]
            assert rows[name]["mean"][key] == pytest.approx(np.mean(values)) and rows[name]["sd"][key] == pytest.approx(np.std(values, ddof=1))
        for floor in metrics.FLOORS:                                    # the floors are those of the runs
            for key in metrics.TABLE_KEYS:
                values = [r["floors"][floor][key] for r in mine]
                if None not in values:
                    assert rows[floor]["mean"][key] == pytest.approx(np.mean(values)), (floor, key)
        assert rows["replicate"]["mean"]["l2"] == pytest.approx(np.mean([r["replicate"]["l2"] for r in mine]))
    line = next(line for line in out.splitlines() if line.startswith("ridge"))
    assert bench.number(rows["ridge"]["mean"]["l2"], rows["ridge"]["sd"]["l2"]) in line
    assert "LOSES to control or mean" in out                            # 20 steps of training learn nothing


def test_files_of_a_bench(whole):
    folder, _ = whole
    table = (folder / "bench.md").read_text()
    assert "**" in table and "<u>" in table and "l2↓" in table and "Wilcoxon" in table
    with open(folder / "bench.csv") as file:
        lines = list(csv.DictReader(file))
    rows = rows_of(folder)
    assert {line["row"] for line in lines} == set(rows) - {"replicate"}
    mine = [float(line["l2"]) for line in lines if line["row"] == "ridge"]
    assert len(mine) == 7 and np.mean(mine) == pytest.approx(rows["ridge"]["mean"]["l2"])


def test_paired_tests_are_scipys(whole):
    from scipy.stats import wilcoxon
    folder, _ = whole
    content = json.loads((folder / "bench.json").read_text())
    test = content["tests"][RUN]["l2"]
    a, b = (content["rows"][n]["per_condition"] for n in (RUN, test["against"]))
    assert test["p"] == pytest.approx(wilcoxon([a[g]["l2"] - b[g]["l2"] for g in a]).pvalue) and not test["better"]
    simple = {n: r["mean"]["l2"] for n, r in content["rows"].items() if r["kind"] in ("floor", "baseline")}
    assert test["against"] == min(simple, key=simple.get)


def test_a_killed_bench_goes_on_to_the_same_table(whole, demo, run, capsys, tmp_path):
    """Ctrl-C while the second run trains: it saves; the next call continues it, and repeats nothing that is finished."""
    common = ["--data", demo, "--preset", "demo", "--eval-cells", 8, "--methods", RUN, f"{RUN} --knn 0", "--jobs", 1, "--out"]
    flags = [*common, tmp_path / "b"]
    process = subprocess.Popen([sys.executable, str(ROOT / "bench.py"), *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # ignored, if the tests run in the background
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and len(list((tmp_path / "b").glob("*/log.jsonl"))) < 2:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, out + err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*/metrics.json")}
    assert len(before) == 1 and not (tmp_path / "b" / "bench.json").exists()
    out = ok(run("bench.py", *flags))
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert "/1]" in out
    shutil.copytree(whole[0], tmp_path / "uninterrupted")       # has both runs of seed 0, and those of seed 1
    ok(main(capsys, *common, tmp_path / "uninterrupted"))
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "uninterrupted")


def test_a_failed_run_is_reported_and_does_not_stop_the_rest(demo, run, tmp_path):
    done = run("bench.py", "--data", demo, "--preset", "demo", "--eval-cells", 8, "--methods", f"{RUN} --lr -1", RUN, "--no-baselines", "--out",
               tmp_path / "b")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "FAILED" in done.stderr and "--lr" in done.stderr
    rows = rows_of(tmp_path / "b")
    assert RUN in rows and f"{RUN} --lr -1" not in rows and "linear" not in rows
    assert json.loads((tmp_path / "b" / "bench.json").read_text())["failed"][0]["name"].endswith("--lr -1")


def main(capsys, *flags):
    """bench.main in this process: (exit code, output, errors)."""
    with pytest.raises(SystemExit) as stop:
        bench.main([str(f) for f in flags])
    done = capsys.readouterr()
    return subprocess.CompletedProcess(flags, stop.value.code or 0, done.out, done.err)


def test_other_tools_predictions_and_two_folds(demo, capsys, tmp_path):
    dataset = data.load(demo, data.DataConfig(hvg=5000), "additive")
    X = dataset.X.toarray()
    obs = {"condition": np.array(["control"] * 3 + ["TF1"] * 3, dtype=object)}
    real = data.read_cells(demo)
    data.write_h5ad(tmp_path / "oracle.h5ad", X, {"condition": real.condition}, dataset.genes)        # the truth itself
    done = main(capsys, "--data", demo, "--methods", "none", "--pred", f"ORACLE={tmp_path / 'oracle.h5ad'}", "--folds", 0, 1, "--eval-cells", 8,
                "--out", tmp_path / "b")
    ok(done)
    rows = rows_of(tmp_path / "b")
    assert rows["ORACLE"]["mean"]["l2"] < 1e-5 and rows["ORACLE"]["runs"] == 2 and rows["ORACLE"]["mean"]["pds"] == 1
    assert "ORACLE" in (tmp_path / "b" / "bench.md").read_text()
    data.write_h5ad(tmp_path / "few.h5ad", X[:6], obs, dataset.genes)
    error(main(capsys, "--data", demo, "--methods", "none", "--pred", f"X={tmp_path / 'few.h5ad'}", "--out", tmp_path / "c"), "test conditions")
    data.write_h5ad(tmp_path / "narrow.h5ad", X[:, :9], {"condition": real.condition}, dataset.genes[:9])
    error(main(capsys, "--data", demo, "--methods", "none", "--pred", f"X={tmp_path / 'narrow.h5ad'}", "--out", tmp_path / "c"), "evaluation genes")
    assert not (tmp_path / "c").exists()


def test_dry_run_prints_commands_and_starts_nothing(demo, capsys, tmp_path):
    out = ok(main(capsys, "--data", demo, "--methods", "scdfm", "scdfm:no-mmd", "--dry-run", "--out", tmp_path / "b"))
    assert out.count("python scdfm.py") == 2 and out.count("--mmd-weight 0") == 1 and not (tmp_path / "b").exists()
    ablation = ["--data", demo, "--methods", "primeflow:mlp", "--dry-run", "--out", tmp_path / "b"]
    assert "--steps 3000" in ok(main(capsys, *ablation, "--preset", "demo")) and "--steps" not in ok(main(capsys, *ablation))
    out = ok(main(capsys, "--data", demo, "--methods", "all", "--seeds", 3, 4, "--dry-run", "--out", tmp_path / "b"))
    assert out.count("--seed 3") == out.count("--seed 4") == len(METHODS) and "--mmd-weight" not in out


def test_a_folder_belongs_to_one_number_of_folds(demo, capsys, tmp_path):
    out = [ok(main(capsys, "--data", demo, "--split", "cv", "--n-folds", n, "--methods", "scdfm", "--dry-run", "--out", tmp_path / "b"))
           for n in (3, 4)]
    assert "--folds 3" in out[0] and "--folds 4" in out[1]
    folders = [re.search(r"--out (\S+)", text)[1] for text in out]
    assert folders[0] != folders[1]


def test_a_floor_that_exists_for_some_conditions_is_not_ranked():
    def row(kind, l2, n):
        return {"kind": kind, "mean": {"l2": l2}, "sd": {}, "per_condition": {f"C{i}": {"l2": l2} for i in range(n)}}
    rows = {"control": row("floor", 3.0, 2), "additive": row("floor", 0.5, 1), "ridge": row("baseline", 2.0, 2), "scdfm": row("method", 1.0, 2)}
    assert bench.best_and_second(rows, "l2") == ["scdfm", "ridge"]
    tests = bench.paired_tests(rows, ["l2"])
    assert tests["scdfm"]["l2"]["against"] == "ridge" and tests["scdfm"]["l2"]["better"]
    assert any("additive exists for 1 of 2" in line for line in bench.reading(rows, tests, ["l2"]))
    rows["additive"] = row("floor", 0.5, 2)
    assert bench.best_and_second(rows, "l2") == ["additive", "scdfm"]


def test_published_numbers_are_marked_and_only_for_their_data():
    rows = bench.published_rows(bench.Config(data="x/norman.h5", split="additive"))
    assert rows["scDFM, scDFM table 1"]["l2"] == 1.7043 and rows["scBIG, scBIG table 1"]["l2"] == 3.92
    assert not bench.published_rows(bench.Config(data="papalexi.h5", split="additive"))
    assert not bench.published_rows(bench.Config(data="norman19_devel.h5ad", split="additive"))
    assert not bench.published_rows(bench.Config(data="norman.h5", split="unseen"))
    for (_, _), published in bench.PUBLISHED.items():
        assert all(len(keys) == len(values) and set(keys) <= set(metrics.KEYS) for _, keys, values in published)


def test_every_method_of_the_repository_is_in_the_list():
    assert {m for m in bench.METHODS if ":" not in m} == set(METHODS)


@pytest.mark.parametrize("flags, words", [
    (["--methods", "gpt5"], ["gpt5", "scdfm"]),
    (["--keys", "l3"], ["l3", "pearson_delta"]),
    (["--pred", "x.h5ad"], ["NAME=FILE"]),
    (["--pred", "scdfm=x.h5ad"], ["none of ours"]),
    (["--pred", "replicate=x.h5ad"], ["none of ours"]),
    (["--plot", "--condition", "TF99"], ["--condition TF99", "choose from"]),
    (["--pred", "X=nothing.h5ad"], ["nothing.h5ad", "no such file"]),
    (["--seeds", "0", "0"], ["twice"]),
    (["--seeds", "-1"], ["--seeds"]),
    (["--jobs", "-1"], ["--jobs"]),
    (["--data", "nothing.h5ad"], ["nothing.h5ad", "no such file"]),
    (["--split", "sideways"], ["sideways"]),
    (["--embedding", "nothing.npz"], ["nothing.npz"]),
])
def test_misuse(flags, words, demo, capsys, tmp_path):
    given = [] if "--data" in flags else ["--data", demo]
    error(main(capsys, *given, "--out", tmp_path / "b", *(["--methods", "none"] if "--methods" not in flags else []), *flags), *words)
    assert not (tmp_path / "b").exists()


def test_flop_count_of_a_known_network():
    """A linear layer and attention, forward and backward, against the formulas."""
    layer, x = torch.nn.Linear(32, 48), torch.randn(10, 32)
    q = torch.randn(2, 4, 64, 16, requires_grad=True)
    with bench.flop_counter() as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 10 * 32 * 48 * 2             # forward, gradient of the weight
    with bench.flop_counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.get_total_flops() >= 3 * 2 * 2 * (2 * 4 * 64 * 64 * 16)


def test_speed_prints_one_json_object_last(run, tmp_path):
    for name in ("bench.py", "data.py", "metrics.py", "scdfm.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    tiny = "scdfm --width 16 --layers 1 --heads 2 --gene-subset 30 --ode-steps 2 --eval-cells 8"
    out = ok(run("bench.py", "--speed", "--methods", tiny, cwd=tmp_path))
    result = json.loads(out.strip().splitlines()[-1])
    (row,) = result["methods"]
    assert row["ms_per_step"] > 0 and row["gflop_per_step"] > 0 and 0 < row["utilisation"] < 1 and row["sampled_cells_per_s"] > 0
    assert row["peak_memory_mb"] > 50 and result["evaluate_40x300x1000_s"] > 0 and Path(tmp_path / "runs").exists()


def test_figures(whole, demo, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder, _ = whole
    done = main(capsys, "--data", demo, "--preset", "demo", "--eval-cells", 8, "--methods", RUN, f"{RUN} --knn 0", "--seeds", 0, 1, "--out", folder,
                "--plot")
    ok(done)
    for name in ("errors", "ablations", "genes", "pca"):
        assert (folder / f"{name}.png").stat().st_size > 5000


def test_plot_without_matplotlib_says_so(whole, demo, capsys, monkeypatch):
    folder, _ = whole
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = ok(main(capsys, "--data", demo, "--preset", "demo", "--eval-cells", 8, "--methods", RUN, f"{RUN} --knn 0", "--seeds", 0, 1, "--out", folder,
                  "--plot"))
    assert "matplotlib is not installed" in out
