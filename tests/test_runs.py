"""The method scripts as a user runs them: on a small demo, resumed, killed, on several processes, misused.

What the four share, the run section and what stands behind it, is tested once, on the cheapest of them."""
import ast
import copy
import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import h5py
import numpy as np
import pytest
import torch

import data
import metrics
from conftest import METHODS, ROOT, TINY, finished, start

ALLOWED = {"torch", "numpy", "scipy", "h5py", "matplotlib", "data", "metrics"} | set(sys.stdlib_module_names)
CHEAP = "celltarnet"
FLAGS = TINY[CHEAP]
FILES = [".lock", "ckpt.pt", "config.json", "genes.tsv", "log.jsonl", "metrics.json", "pred.h5ad", "split.json"]

# what it takes to learn a 60-gene demo in a few seconds
LEARN = {
    "scdfm": ["--steps", 250, "--batch-size", 32, "--width", 32, "--gene-subset", 30, "--lr", 5e-3, "--ema", 0.97],
    "primeflow": ["--steps", 600, "--batch-size", 64, "--lr", 2e-3, "--velocity", "mlp", "--guidance", 1],
    "scbig": ["--layers", 1, "--width", 32, "--pretrain-steps", 300, "--pretrain-batch-size", 64, "--pretrain-lr", 4e-3,
              "--steps", 100, "--batch-size", 128, "--ode-steps", 3, "--structure-cells", 16],
    "celltarnet": ["--steps", 200, "--batch-size", 32, "--lr", 1e-2],
}


def ok(done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def error(done, *words):
    """Exit code 2, one line 'error: ...' with these words, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} not in {done.stderr}"


def read(folder, name="metrics.json"):
    return json.loads((folder / name).read_text())


def weights(folder):
    content = torch.load(folder / "ckpt.pt", weights_only=True)["content"]
    names = [name for name in ("model", "ema") if name in content]
    return {f"{name}.{k}": v for name in names for k, v in content[name].items() if torch.is_tensor(v)}


def same_weights(one, other):
    a, b = weights(one), weights(other)
    return len(a) > 0 and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(folder):
    """Losses and validation of every logged step, without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "seconds")} for line in lines]


@pytest.fixture(scope="module")
def all_trained(demo, tmp_path_factory):
    """One finished tiny run of each method, side by side: {method: (folder, console output)}."""
    folders = {m: tmp_path_factory.mktemp("trained") / "run" for m in METHODS}
    running = {m: start(f"{m}.py", "--data", demo, *TINY[m], "--out", folders[m]) for m in METHODS}
    return {m: (folders[m], ok(finished(process))) for m, process in running.items()}


@pytest.fixture(params=METHODS)
def trained(request, all_trained):
    """(method, folder, console output) of each."""
    return request.param, *all_trained[request.param]


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(method, step, number): within this process, the method gets a signal in the middle of that step."""
    def patch(method, step, number=signal.SIGTERM, stage="training"):
        module = importlib.import_module(method)
        begin = module.Run.start

        def started(run, at):
            begin(run, at)
            if at == step and run.stage == stage:
                os.kill(os.getpid(), number)
        monkeypatch.setattr(module.Run, "start", started)
        return monkeypatch.undo
    return patch


# ------------------------------------------------------------------------------------------------ a whole run

def test_run_prints_the_table_and_writes_its_files(trained):
    method, folder, out = trained
    more = ["modules.tsv"] if method == "scbig" else []
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES + more)
    first = out.splitlines()[0]
    for word in (method, "split additive", "preset demo", "20 steps", "cpu, fp32", str(folder)):
        assert word in first
    table = out[out.index("l2↓"):].strip().splitlines()[1:]
    rows = [line.split()[0] for line in table if line and not line.startswith(("note", "..."))]
    assert rows[:7] == ["control", "mean", "mean_cells", "additive", method, "replicate", "vs"]
    assert max(len(line) for line in table[:7]) <= 120
    result = read(folder)
    assert {"method", "data", "split", "fold", "seed", "seconds", "peak_memory_mb", "config", "versions", "aggregate",
            "n_valid", "groups", "per_condition", "floors", "replicate"} <= set(result)
    assert result["method"] == method and set(result["floors"]) == {"control", "mean", "mean_cells", "additive"}
    split = read(folder, "split.json")
    assert sorted(result["per_condition"]) == split["test"] and len(split["test"]) == 7
    log = log_of(folder)
    assert log[-1]["step"] == 20 and all(np.isfinite(entry["loss"]) for entry in log)
    assert read(folder, "config.json")["steps"] == 20
    genes = (folder / "genes.tsv").read_text().splitlines()
    assert genes[0].split("\t")[:2] == ["condition", "gene"] and len(genes) == 1 + 7 * 40
    with h5py.File(folder / "pred.h5ad") as file:
        assert file.attrs["encoding-type"] == "anndata" and file["X"].shape[1] == len(file["var/_index"])


def test_prediction_file_scores_to_the_same_numbers(trained, demo, call, tmp_path):
    """metrics.py on pred.h5ad and the data file gives what the run itself printed."""
    method, folder, _ = trained
    ok(call("metrics.py", folder / "pred.h5ad", demo, "--reference", demo, "--out", tmp_path / "m.json"))
    again, own = read(tmp_path, "m.json"), read(folder)
    for key in ("l2", "mse", "pearson_delta", "pds", "e_distance", "de_spearman"):
        assert again["aggregate"][key] == pytest.approx(own["aggregate"][key], rel=1e-4), key
    pred, real = data.read_cells(folder / "pred.h5ad"), data.load(demo, data.DataConfig(), "additive")
    assert pred.genes == real.genes and (pred.X.data >= 0).all()
    np.testing.assert_allclose(pred.X[pred.condition == "control"].toarray(), real.controls("test")[""], rtol=1e-6)
    for condition in real.split["test"]:
        assert (pred.condition == condition).sum() == 8


@pytest.mark.parametrize("method", METHODS)
def test_method_beats_the_control_and_mean_floors(method, call, tmp_path):
    data.simulate(tmp_path / "demo.h5ad", cells=2400, genes=60)
    flags = ["--preset", "demo", "--split", "additive", *LEARN[method], "--eval-cells", 60, "--out", tmp_path / "run"]
    ok(call(f"{method}.py", "--data", tmp_path / "demo.h5ad", *flags))
    result = read(tmp_path / "run")
    for key in ("l2", "pearson_delta", "pds", "e_distance"):
        sign = 1 if metrics.KEYS[key].arrow == "↑" else -1
        for floor in ("control", "mean", "mean_cells"):
            assert sign * result["aggregate"][key] > sign * result["floors"][floor][key], (key, floor)


@pytest.mark.parametrize("method", METHODS)
def test_covariates_transfer_and_the_test_conditions_on_other_cells(method, call, tmp_path):
    """Two cell types: groups are CONDITION@type, controls come from the same type. --predict test --controls carries
    the model to cells of another experiment, which lacks a gene and has genes of its own."""
    data.simulate(tmp_path / "two.h5ad", cells=900, genes=40, cell_types=2)
    flags = ["--data", tmp_path / "two.h5ad", *TINY[method], "--covariates", "cell_type", "--split", "transfer"]
    ok(call(f"{method}.py", *flags, "--steps", 5, "--out", tmp_path / "run"))
    test = list(read(tmp_path / "run")["per_condition"])
    assert all("@type" in group for group in test)
    ask = ["--ckpt", tmp_path / "run" / "ckpt.pt", "--cells", 5, "--predict"]
    ok(call(f"{method}.py", *ask, "TF1@type2", "TF2", "--out", tmp_path / "p.h5ad"))
    pred = data.read_cells(tmp_path / "p.h5ad", data.DataConfig(covariates="cell_type"))
    groups = [g for g in zip(pred.condition, pred.covariate) if g[0] != "control"]
    assert {g: groups.count(g) for g in groups} == {("TF1", "type2"): 5, ("TF2", "type1"): 5, ("TF2", "type2"): 5}
    cells = data.read_cells(tmp_path / "two.h5ad")
    rows = np.flatnonzero(cells.condition == "control")[:20]
    X = np.concatenate([cells.X[rows].toarray()[:, :0:-1], np.ones((20, 1), np.float32)], axis=1)
    obs = {"condition": ["control"] * 20, "cell_type": ["type1"] * 20}
    data.write_h5ad(tmp_path / "other.h5ad", X, obs, cells.genes[:0:-1] + ["EXTRA"])
    out = ok(call(f"{method}.py", *ask, "test", "--controls", tmp_path / "other.h5ad", "--out", tmp_path / "q.h5ad"))
    assert "lacks 1 of the model's 40 genes" in out
    carried = data.read_cells(tmp_path / "q.h5ad", data.DataConfig(covariates="cell_type"))
    assert carried.genes == cells.genes[1:] and set(carried.covariate) == {"type1"}
    assert set(carried.condition) == {g.partition("@")[0] for g in test} | {"control"}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_starts_from_another_ones_weights(method, all_trained, demo, call, monkeypatch, tmp_path):
    """The same weights for the same genes and perturbations, whatever their order and number; a fresh optimiser."""
    cells = data.read_cells(demo)
    order = np.random.default_rng(0).permutation(len(cells.genes) - 2)          # two genes fewer, one more
    X = np.concatenate([cells.X.toarray()[:, order], np.ones((len(cells.condition), 1), np.float32)], axis=1)
    names = [cells.genes[i] for i in order] + ["EXTRA"]
    data.write_h5ad(tmp_path / "new.h5ad", X, {"condition": cells.condition}, names)
    module, folder, started = importlib.import_module(method), all_trained[method][0], {}
    begin = module.Run.start

    def first(run, step):
        begin(run, step)
        raise data.DataError("enough")
    resume = module.Run.resume

    def watched(run, state, content, **options):
        out = resume(run, state, content, **options)
        started.update(run=run, model=content["model"])
        return out
    monkeypatch.setattr(module.Run, "start", first)
    monkeypatch.setattr(module.Run, "resume", watched)
    done = call(f"{method}.py", "--data", tmp_path / "new.h5ad", *TINY[method], "--init", folder / "ckpt.pt",
                "--out", tmp_path / "run")
    assert "weights taken over; 1 of 39 genes are new, and 0 perturbations: none" in done.stdout, done
    own = dict(started["model"].named_parameters())
    stored = torch.load(folder / "ckpt.pt", weights_only=True)["content"]["ema"]
    name, axis = {"scdfm": ("encoder.table.weight", 0), "primeflow": ("net.value.0.weight", 1),
                  "scbig": ("autoencoder.to_latent.weight", None), "celltarnet": ("gene", 0)}[method]
    mine, old = own[name].detach(), stored[name]
    if axis is not None:
        mine, old = mine.index_select(axis, torch.arange(38)), old.index_select(axis, torch.from_numpy(order))
    assert torch.equal(mine, old)


def test_split_all_trains_on_everything_and_predicts_without_a_table(demo, call, tmp_path):
    out = ok(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--steps", 2, "--split", "all", "--out", tmp_path / "run"))
    assert "no condition is held out: there will be no table" in out and "l2" not in out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock", "ckpt.pt", "config.json", "log.jsonl", "split.json"]
    assert len(read(tmp_path / "run", "split.json")["train"]) == 40
    ask = ["--ckpt", tmp_path / "run" / "ckpt.pt", "--out", tmp_path / "p.h5ad", "--predict"]
    error(call(f"{CHEAP}.py", *ask, "test"), "--predict test", "held no condition out")
    ok(call(f"{CHEAP}.py", *ask, "TF1+TF2", "--cells", 4))


@pytest.mark.parametrize("width, taken", [(32, True), (25, False), (50, False)])
def test_a_weight_is_taken_over_only_where_its_axes_can_be_told(width, taken):
    """Genes go by their names. A layer may have as many rows as there are genes: such a weight is not taken."""
    genes = [f"g{i}" for i in range(50)]
    order = [3, 0, 1, 2, *range(5, 50)]                             # without g4, and with one more
    old, new = (data.Panel(names, [], [], [], [], [0] * 50, [1] * 50)
                for names in (genes, [f"g{i}" for i in order] + ["more"]))
    stored, weight = torch.rand(50, width), torch.zeros(50, width)
    config = types.SimpleNamespace(width=width)
    assert data.take_over(weight, stored, old, new, config) == taken
    assert torch.equal(weight[:49], stored[order] if taken else torch.zeros(49, width)) and not weight[49].any()
    layer = torch.zeros(2, 3 * width)
    assert data.take_over(layer, torch.ones(2, 3 * width), old, old, config) and layer.all()


def test_init_refuses_what_has_nothing_in_common(all_trained, demo, call, tmp_path):
    flags = ["--data", demo, *FLAGS, "--out", tmp_path / "run", "--init"]
    error(call(f"{CHEAP}.py", *flags, tmp_path / "none.pt"), "no such checkpoint")
    assert not (tmp_path / "run").exists()
    error(call(f"{CHEAP}.py", *flags, all_trained["scbig"][0] / "ckpt.pt"), "--init", "no weight")
    state = torch.load(all_trained[CHEAP][0] / "ckpt.pt", weights_only=True)
    torch.save(state | {"content": {}}, tmp_path / "empty.pt")
    error(call(f"{CHEAP}.py", *flags, tmp_path / "empty.pt"), "--init", "no weight")


# ------------------------------------------------------------------------------------------------ resume and crashes

@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical(method, all_trained, demo, call, signal_at, tmp_path):
    """20 steps = a signal in the 7th + resume, with dropout and EMA, weights and predictions to the last bit. scBIG is
    interrupted in its first stage too. Validation meanwhile, and the place of the data, change nothing."""
    flags = ["--data", demo, *TINY[method], "--out", tmp_path / "run"]
    stages = [("pretraining", 2)] if method == "scbig" else []
    for i, (stage, step) in enumerate([*stages, ("training", 7)]):
        undo = signal_at(method, step, stage=stage)
        done = call(f"{method}.py", *(["--resume", "--out", tmp_path / "run"] if i else flags))
        undo()
        assert done.returncode == 143, done.stdout + done.stderr
        assert "saving after this step" in done.stdout
        assert f"{method}.py --out {tmp_path / 'run'} --resume" in done.stdout
        assert not (tmp_path / "run" / "metrics.json").exists()
    ok(call(f"{method}.py", "--out", tmp_path / "run", "--resume", "--eval-every", 5))
    whole = all_trained[method][0]
    assert same_weights(whole, tmp_path / "run")
    assert read(whole)["aggregate"] == read(tmp_path / "run")["aggregate"]
    log = log_of(tmp_path / "run")
    assert [line for line in log if "val" not in line] == log_of(whole) and sum("val" in line for line in log) == 3


def test_seconds_of_training_go_on_after_a_resume(demo, call, signal_at, tmp_path):
    undo = signal_at(CHEAP, 3)
    call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", tmp_path / "run")
    undo()
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert 0 < state["seconds"] < 1000
    torch.save(state | {"seconds": 1000.0}, tmp_path / "run" / "ckpt.pt")
    ok(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume"))
    assert read(tmp_path / "run")["seconds"] > 1000


@pytest.mark.parametrize("flags", [["--train-on-val"], ["--split", "all"]])
def test_validation_needs_conditions_that_do_not_train(demo, call, tmp_path, flags):
    done = call(f"{CHEAP}.py", "--data", demo, *FLAGS, *flags, "--eval-every", 5, "--out", tmp_path / "run")
    error(done, "--eval-every 5", flags[-1], "no validation conditions")


def test_same_seed_same_numbers_from_disk_and_other_seed_others(all_trained, demo, call, tmp_path):
    """--backed streams the file: losses of every step, scores and cells, to the last bit."""
    folder = all_trained[CHEAP][0]
    out = ok(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--backed", "--out", tmp_path / "same"))
    ok(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", tmp_path / "other", "--seed", 1))
    assert "note: streamed from the file" in out and "streamed" not in all_trained[CHEAP][1]
    assert log_of(folder) == log_of(tmp_path / "same")
    assert read(folder)["aggregate"] == read(tmp_path / "same")["aggregate"]
    cells = [data.read_cells(f / "pred.h5ad").X.toarray() for f in (folder, tmp_path / "same")]
    assert np.array_equal(*cells)
    assert read(folder)["aggregate"]["l2"] != read(tmp_path / "other")["aggregate"]["l2"]


def test_a_finished_run_is_scored_again_and_a_signal_ends_that_at_once(all_trained, call, monkeypatch, tmp_path):
    """Nothing is trained; the same table, or with another number of cells another one."""
    folder, out = all_trained[CHEAP]
    shutil.copytree(folder, tmp_path / "run")
    again = ok(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume"))
    assert again[again.index("l2↓"):] == out[out.index("l2↓"):] and same_weights(folder, tmp_path / "run")
    monkeypatch.setattr(importlib.import_module(CHEAP), "predict", lambda *a, **k: os.kill(os.getpid(), signal.SIGINT))
    assert call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume").returncode == 130


def test_the_seconds_of_a_run_cover_the_generation_of_its_cells(all_trained, call, monkeypatch, tmp_path):
    """From the first step to the table."""
    shutil.copytree(all_trained[CHEAP][0], tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    module, now, late = importlib.import_module(CHEAP), data.time.perf_counter, [0]
    predict = module.predict

    def slow(*args, **options):
        late[0] += 10_000
        return predict(*args, **options)
    monkeypatch.setattr(module, "predict", slow)
    monkeypatch.setattr(data.time, "perf_counter", lambda: now() + late[0])
    out = ok(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume"))
    assert 10_000 < read(tmp_path / "run")["seconds"] < 10_300 and "trained and scored in 2:4" in out


def test_a_run_whose_data_moved_goes_on_and_changed_data_is_noticed(demo, call, signal_at, tmp_path):
    moved = tmp_path / "moved.h5ad"
    signal_at(CHEAP, 3)
    assert call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", tmp_path / "run").returncode == 143
    signal_at(CHEAP, 5)
    shutil.copy(demo, moved)
    out = ["--out", tmp_path / "run", "--resume", "--data", moved]
    assert call(f"{CHEAP}.py", *out).returncode == 143
    data.simulate(moved, cells=560, genes=44, seed=1)
    error(call(f"{CHEAP}.py", *out), "has changed")
    error(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume", "--lr", 1), "--lr 1", "drop the flag")
    error(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume", "--split", "unseen"), "started with additive")


def test_changed_split_is_noticed_on_resume(demo, call, signal_at, tmp_path):
    """Otherwise conditions that were trained on could be scored as test."""
    doubles = [c for c in data.load(demo).split["train"] if "+" in c]
    (tmp_path / "s.json").write_text(json.dumps({"test": doubles[:3]}))
    signal_at(CHEAP, 3)
    call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--split", tmp_path / "s.json", "--out", tmp_path / "run")
    (tmp_path / "s.json").write_text(json.dumps({"test": doubles[3:6]}))
    error(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume"), "s.json", "has changed")


def test_ctrl_c_in_a_terminal_and_a_second_run_in_the_folder(demo, call, tmp_path):
    """The folder is refused while the run lives, and free when it is killed, whatever the way."""
    out = tmp_path / "run"
    process = start(f"{CHEAP}.py", "--data", demo, *FLAGS, "--steps", "100000", "--out", out)
    assert process.stdout.readline().startswith(CHEAP)
    while "parameters" not in process.stdout.readline():
        assert process.poll() is None
    error(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", out), str(out), "another run is using this folder")
    process.send_signal(signal.SIGINT)
    done = finished(process)
    assert done.returncode == 130 and "saving after this step; a second signal ends the run at once" in done.stdout
    assert not done.stderr
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    assert 0 < step < 100_000 and f"stopped at step {step} of 100000" in done.stdout
    process = start(f"{CHEAP}.py", "--out", out, "--resume")
    process.stdout.readline()
    process.kill()
    finished(process)
    assert torch.load(out / "ckpt.pt", weights_only=True)["step"] == step
    error(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", out), "already holds ckpt.pt")


def test_a_diverged_run_keeps_the_last_good_checkpoint(demo, call, monkeypatch, tmp_path):
    module = importlib.import_module(CHEAP)
    monkeypatch.setattr(data, "CHECKPOINT_SECONDS", 0)
    finish = module.Run.finish
    monkeypatch.setattr(module.Run, "finish", lambda run, step, parts, **losses: finish(
        run, step, parts, **{k: v * float("nan") if step > 11 else v for k, v in losses.items()}))
    error(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", tmp_path / "run"), "diverged", "checkpoint")
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 11


def test_kill_during_a_save_leaves_a_loadable_checkpoint(all_trained, demo, run, call, tmp_path):
    """A copy of the script that saves at every step and dies in the middle of its 10th save."""
    for name in (f"{CHEAP}.py", "data.py", "metrics.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "data.py").read_text().replace("CHECKPOINT_SECONDS = 300", "CHECKPOINT_SECONDS = 0")
    text = text.replace("        torch.save(state, temporary)\n", "        torch.save(state, temporary)\n"
                        "        if step == 10:\n            os.truncate(temporary, temporary.stat().st_size // 2)\n"
                        "            os.kill(os.getpid(), 9)\n")
    assert "os.kill" in text
    (tmp_path / "data.py").write_text(text)
    flags = ["--data", demo, *FLAGS, "--out", tmp_path / "run"]
    assert run(f"{CHEAP}.py", *flags, cwd=tmp_path).returncode == -9
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 9
    ok(call(f"{CHEAP}.py", "--out", tmp_path / "run", "--resume"))
    assert same_weights(all_trained[CHEAP][0], tmp_path / "run")


def test_disk_full_while_saving_keeps_the_old_checkpoint_and_a_torn_log_line_is_mended(demo, call, signal_at, tmp_path):
    """The file size limit of the process stands in for a full disk."""
    folder = tmp_path / "run"

    def limit():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    undo = signal_at(CHEAP, 10)
    call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--out", folder)
    undo()
    before = hashlib.sha256((folder / "ckpt.pt").read_bytes()).hexdigest()
    done = finished(start(f"{CHEAP}.py", "--out", folder, "--resume", preexec_fn=limit))
    error(done, "ckpt.pt", "cannot be written", "free some space")
    assert hashlib.sha256((folder / "ckpt.pt").read_bytes()).hexdigest() == before
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"step": 11, "lo')
    ok(call(f"{CHEAP}.py", "--out", folder, "--resume"))
    assert [line["step"] for line in log_of(folder)][-10:] == list(range(11, 21))


# ------------------------------------------------------------------------------------------------ several processes

def torchrun(script, *flags):
    """As `torchrun --nproc-per-node 2 script`, on the CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    return subprocess.run([*command, *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


PROBE = r"""
import hashlib, sys, torch
import {method} as method
{setup}
begin, finish, draw = method.Run.start, method.Run.finish, method.data.Dataset.draw
drawn = []
method.data.Dataset.draw = lambda *args: drawn.append(draw(*args)) or drawn[-1]
def watched(run, step, parts, **losses):
    if step == 4:
        weights = torch.cat([p.detach().flatten() for p in parts["model"].parameters()])
        hashes = [hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in (weights, torch.cat(drawn))]
        sys.stdout.write(" ".join(["RANK", str(run.rank), *hashes]) + "\n")
        sys.stdout.flush()
    finish(run, step, parts, **losses)
method.Run.finish = watched
method.main(sys.argv[1:])
"""


def test_two_processes_end_with_one_model_and_see_different_cells(demo, call, tmp_path):
    """Both save and end at the same step when one of them gets SIGTERM, and one process goes on from there."""
    setup = """
import os, signal
def started(run, step):
    begin(run, step)
    if step == 13 and run.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    probe = tmp_path / "probe.py"
    text = PROBE.format(method=CHEAP, setup=setup)
    text = text.replace("method.Run.finish = watched", "method.Run.finish, method.Run.start = watched, started")
    probe.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{text}")
    done = torchrun(probe, "--data", demo, *FLAGS, "--steps", 30, "--device", "cpu", "--eval-every", 6,
                    "--out", tmp_path / "two")
    ranks = sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RANK"))
    assert len(ranks) == 2 and ranks[0][1] == ranks[1][1] and ranks[0][2] != ranks[1][2], done.stdout + done.stderr
    assert done.stdout.count("validation  l2") == 3             # one process talks
    assert torch.load(tmp_path / "two" / "ckpt.pt", weights_only=True)["step"] == 20
    assert done.stdout.count("stopped at step 20 of 30") == 1
    ok(call(f"{CHEAP}.py", "--out", tmp_path / "two", "--resume"))
    assert log_of(tmp_path / "two")[-1]["step"] == 30


def test_a_process_that_dies_ends_the_run_in_one_clear_line(demo, tmp_path):
    text = PROBE.format(method=CHEAP, setup="import os")
    text = text.replace("    finish(", "    if step == 5 and run.rank == 1:\n        os._exit(1)\n    finish(")
    probe = tmp_path / "probe.py"
    probe.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{text}")
    done = torchrun(probe, "--data", demo, *FLAGS, "--device", "cpu", "--out", tmp_path / "run")
    assert done.stdout.count("RANK") == 2, done.stdout + done.stderr     # both had got to the fourth step
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) <= 1
    assert not (tmp_path / "run" / "metrics.json").exists()
    if errors:                          # torchrun may end the survivor before it notices
        assert "another process of this run has ended" in errors[0] and "--resume" in errors[0]


@pytest.mark.parametrize("environment, words", [({"WORLD_SIZE": "2"}, "torchrun"), ({"WORLD_SIZE": "x"}, "unset it"),
                                                ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1",
                                                  "MASTER_PORT": "1"}, "MASTER_ADDR"),
                                                ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1",
                                                  "MASTER_ADDR": "localhost"}, "WORLD_SIZE=2")])
def test_an_environment_of_half_a_cluster_is_one_clear_line(environment, words, call, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    error(call(f"{CHEAP}.py", "--data", "none.h5ad"), words)


def test_a_rank_left_over_in_the_environment_is_no_other_process(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert data.process() == (0, 1)


# ------------------------------------------------------------------------------------------------ the console

@pytest.mark.parametrize("terminal, wanted", [
    (False, "reading: 1 of 3, 0:00:00 left\nreading: 3 of 3, 0:00:00 left\n"),
    (True, "\rreading: 1 of 3, 0:00:00 left\033[K\rreading: 3 of 3, 0:00:00 left\033[K\n")])
def test_what_takes_long_says_how_far_it_is(terminal, wanted, monkeypatch, capsys):
    """On a terminal the line is written over; in a file there is one a minute, and one at the end."""
    for name, value in (("FIRST_LINE", 0), ("NEXT_LINE", 60)):
        monkeypatch.setattr(data, name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert list(data.progress("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().out == wanted


def test_what_is_quick_says_nothing(capsys):
    assert list(data.progress(range(3), "reading")) == [0, 1, 2] and capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ prediction

def test_predict_singles_doubles_and_triples_never_seen(trained, call, tmp_path):
    method, folder, _ = trained
    single = read(folder, "split.json")["train"][0]
    ask = ["--ckpt", folder / "ckpt.pt", "--predict"]
    ok(call(f"{method}.py", *ask, "TF2+TF1", "TF3+TF1+TF2", single, "--cells", 7, "--out", tmp_path / "p.h5ad"))
    p = data.read_cells(tmp_path / "p.h5ad")
    counts = {c: int((p.condition == c).sum()) for c in set(p.condition)}
    assert counts == {single: 7, "TF1+TF2": 7, "TF1+TF2+TF3": 7, "control": 50}
    x = {c: p.X[p.condition == c].toarray() for c in counts}
    assert not np.array_equal(x[single], x["TF1+TF2"])
    ok(call(f"{method}.py", *ask, "TF1+TF2", "--cells", 7, "--out", tmp_path / "again.h5ad"))
    again = data.read_cells(tmp_path / "again.h5ad")            # whatever else is asked for
    np.testing.assert_array_equal(again.X[again.condition == "TF1+TF2"].toarray(), x["TF1+TF2"])
    ok(call(f"{method}.py", *ask, "test", "--cells", 8, "--out", tmp_path / "test.h5ad"))
    mine, own = data.read_cells(tmp_path / "test.h5ad"), data.read_cells(folder / "pred.h5ad")
    assert sorted(set(mine.condition) - {"control"}) == read(folder, "split.json")["test"]
    for test in set(mine.condition):                            # the EMA weights too
        np.testing.assert_array_equal(mine.X[mine.condition == test].toarray(), own.X[own.condition == test].toarray())


def test_predict_from_own_controls_and_for_all_genes(demo, call, tmp_path):
    """Evaluation genes are fewer than the panel; the controls have other genes too, in another order, and no labels."""
    ok(call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--steps", 2, "--eval-genes", 10, "--out", tmp_path / "run"))
    cells = data.read_cells(demo)
    rows = np.flatnonzero(cells.condition == "control")[:20]
    order = np.random.default_rng(0).permutation(len(cells.genes))
    X = np.concatenate([cells.X[rows].toarray()[:, order], np.ones((20, 1), np.float32)], axis=1)
    data.write_h5ad(tmp_path / "mine.h5ad", X, {}, [cells.genes[i] for i in order] + ["EXTRA"])
    flags = ["--ckpt", tmp_path / "run" / "ckpt.pt", "--predict", "TF1", "--controls", tmp_path / "mine.h5ad"]
    ok(call(f"{CHEAP}.py", *flags, "--cells", 30, "--out", tmp_path / "few.h5ad"))
    ok(call(f"{CHEAP}.py", *flags, "--cells", 30, "--out", tmp_path / "all.h5ad", "--all-genes"))
    few, every = data.read_cells(tmp_path / "few.h5ad"), data.read_cells(tmp_path / "all.h5ad")
    assert len(few.genes) == 10 and every.genes == cells.genes
    assert (few.condition == "TF1").sum() == (every.condition == "TF1").sum() == 30
    expected = np.log1p(1e4 * X / X.sum(1, keepdims=True))[:, np.argsort(order)]
    np.testing.assert_allclose(every.X[every.condition == "control"].toarray(), expected, rtol=1e-4)


def test_predicted_counts_for_other_scorers(all_trained, demo, call, tmp_path):
    """Integers under the labels that were asked for; control cells are the file's own counts; metrics.py scores the
    file as it does the log-normalised one, but for the rounding."""
    ckpt = ["--ckpt", all_trained[CHEAP][0] / "ckpt.pt", "--predict", "test", "--cells", 200]
    ok(call(f"{CHEAP}.py", *ckpt, "--out", tmp_path / "log.h5ad"))
    labels = ["--as-counts", "--as", "target_gene=non-targeting"]
    assert "counts" in ok(call(f"{CHEAP}.py", *ckpt, *labels, "--out", tmp_path / "counts.h5ad"))
    counts, real = data.read_cells(tmp_path / "counts.h5ad"), data.read_cells(demo)
    assert counts.pert_key == "target_gene" and counts.scale == "counts"
    assert counts.genes == real.genes and np.array_equal(counts.X.data, np.rint(counts.X.data))
    own = [cells.X[cells.condition == "control"].toarray() for cells in (counts, real)]
    assert np.array_equal(*own)
    logs = data.read_cells(tmp_path / "log.h5ad")
    for test in read(all_trained[CHEAP][0], "split.json")["test"]:      # each with the size of its own control cell
        size = data.pick_rows(own[1].sum(axis=1), 200, data.seed_of(test, 0))
        mean = np.expm1(logs.X[logs.condition == test].toarray()) * size[:, None] / 1e4
        assert np.abs(counts.X[counts.condition == test].toarray() - mean).max() < 1.001
    score = {}
    for name in ("log", "counts"):
        ok(call("metrics.py", tmp_path / f"{name}.h5ad", demo, "--out", tmp_path / "m.json"))
        score[name] = read(tmp_path, "m.json")["aggregate"]
    assert score["counts"]["l2"] == pytest.approx(score["log"]["l2"], rel=0.1)
    assert score["counts"]["pds"] == pytest.approx(score["log"]["pds"], abs=0.15)
    ok(call(f"{CHEAP}.py", *ckpt, "--as", "pert=", "--out", tmp_path / "alone.h5ad"))
    with h5py.File(tmp_path / "alone.h5ad") as file:
        assert sorted(file["obs/pert/categories"].asstr()[...]) == read(all_trained[CHEAP][0], "split.json")["test"]


def test_counts_are_rounded_at_random_so_that_means_stay():
    """Rounding to the next integer would make every gene of one count in four cells silent."""
    x = np.full((4000, 1), np.log1p(1e4 * 0.25 / 1000), np.float32)
    made = data._counts(x, np.full(50, 1000.0), True, 3)
    assert set(made.ravel()) == {0, 1} and made.mean() == pytest.approx(0.25, abs=0.03)


def test_counts_need_control_cells_with_counts(all_trained, demo, call, tmp_path):
    cells = data.read_cells(demo)
    data.lognormalise(cells)
    data.write_h5ad(tmp_path / "logs.h5ad", cells.X[cells.condition == "control"], {}, cells.genes)
    done = call(f"{CHEAP}.py", "--ckpt", all_trained[CHEAP][0] / "ckpt.pt", "--predict", "TF1", "--as-counts",
                "--controls", tmp_path / "logs.h5ad", "--out", tmp_path / "p.h5ad")
    error(done, "--as-counts", "logs.h5ad", "with counts")
    assert not (tmp_path / "p.h5ad").exists()


def test_a_script_generates_cells_from_an_array_of_controls(all_trained):
    """What the README shows."""
    import celltarnet as method
    folder, own = all_trained[CHEAP][0], data.read_cells(all_trained[CHEAP][0] / "pred.h5ad")
    controls = own.X[own.condition == "control"].toarray()      # (cells, genes of the run's panel), log1p CP10k
    run, model = data.load_model(method, folder / "ckpt.pt")
    test = read(folder, "split.json")["test"][0]
    cells = method.predict(run, model, {test: 8}, {"": controls}, run.panel.eval_genes)[test]
    assert cells.shape == (8, 40)
    np.testing.assert_allclose(cells, own.X[own.condition == test].toarray(), rtol=1e-5)    # as the run predicted


def test_predict_refuses_what_it_cannot_do(all_trained, demo, call, tmp_path):
    folder, script = all_trained[CHEAP][0], f"{CHEAP}.py"
    ckpt = ["--ckpt", folder / "ckpt.pt", "--out", tmp_path / "p.h5ad"]
    error(call(script, *ckpt, "--predict", "TF1+NOGENE"), "NOGENE", "does not know")
    error(call(script, *ckpt, "--predict", "TF33"), "did you mean TF")
    error(call(script, *ckpt, "--predict", "control"), "names no perturbation")
    error(call(script, *ckpt, "--predict", "TF1@nowhere"), "nowhere", "no control cells")
    error(call(script, "--predict", "TF1"), "--ckpt")
    error(call(script, "--ckpt", folder / "ckpt.pt"), "--predict")
    error(call(script, *ckpt, "--predict", "TF1", "--cells", 0), "--cells")
    error(call(script, *ckpt, "--predict", "TF1", "--lr", 32), "--lr 32")
    (tmp_path / "there.h5ad").write_text("precious")
    error(call(script, *ckpt[:2], "--predict", "TF1", "--out", tmp_path / "there.h5ad"), "there.h5ad", "exists")
    error(call(script, *ckpt, "--predict", "TF1", "--controls", tmp_path / "no.h5ad"), "no such file")
    data.write_h5ad(tmp_path / "few.h5ad", np.ones((5, 3), np.float32), {}, ["TF1", "TF2", "TF3"])
    error(call(script, *ckpt, "--predict", "TF1", "--controls", tmp_path / "few.h5ad"), "few.h5ad", "lacks 37 of the")
    odd = {"KO_target": ["NegCtrl", "TF1", "TF2", "NegCtrl"]}
    data.write_h5ad(tmp_path / "odd.h5ad", np.ones((4, 40), np.float32), odd, data.read_cells(demo).genes)
    error(call(script, *ckpt, "--predict", "TF1", "--controls", tmp_path / "odd.h5ad"), "perhaps --pert-key KO_target")
    for flag in ("a/b=NT", "_index", "pert=TF1"):                   # no column of its own, and a predicted condition
        error(call(script, *ckpt, "--predict", "TF1", "--as", flag), f"--as {flag}")
    error(call(script, "--out", tmp_path / "none", "--resume"), "no such checkpoint")
    whole = (folder / "ckpt.pt").read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    for name, content in (("text.pt", b"hello"), ("half.pt", whole[:5000]), ("bit.pt", flipped)):
        (tmp_path / name).write_bytes(content)
        error(call(script, "--ckpt", tmp_path / name, "--predict", "TF1"), name, "damaged")
    error(call("scdfm.py", "--ckpt", folder / "ckpt.pt", "--predict", "TF1"), "checkpoint of celltarnet")
    assert not (tmp_path / "p.h5ad").exists()


def test_generated_values_stay_within_what_training_measured():
    panel = data.Panel(["a", "b"], [0, 1], [], [], [], [1, 1], [2, 0])
    cells, capped = data.as_measured(np.array([[-1, 20], [3, 5]], np.float32), panel, [0, 1])
    np.testing.assert_allclose(cells, [[0, np.log(10_001)], [2, 5]])    # b is silent in training: what CP10k can be
    assert capped == 2


def test_detection_keeps_means_and_makes_small_values_zero_or_typical():
    """Systematic draws: a gene's mean moves by typical / n at most, whatever its values; large values stay."""
    rng = np.random.default_rng(0)
    panel = data.Panel(["a", "b"], [0, 1], [], [], [], [1, 1], [9, 9], {}, [2.0, 1.0])
    x = np.stack([rng.gamma(0.5, 1, 400), rng.gamma(2, 1, 400)], axis=1).astype(np.float32)
    cells, _ = data.as_measured(x, panel, [0, 1], "detect", seed=3)
    for gene, typical in enumerate((2.0, 1.0)):
        low = x[:, gene] < typical
        assert set(cells[low, gene]) == {0, typical} and np.array_equal(cells[~low, gene], x[~low, gene])
        assert abs(cells[:, gene].mean() - x[:, gene].mean()) <= typical / 400 + 1e-5
    other, _ = data.as_measured(x, panel, [0, 1], "detect", seed=4)
    assert not np.array_equal(cells, other)
    kept, _ = data.as_measured(x, panel, [0, 1])
    assert np.array_equal(kept, x)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_that_predicts_has_the_averaged_weights(method, all_trained):
    path = all_trained[method][0] / "ckpt.pt"
    saved = torch.load(path, weights_only=True)["content"]
    got = data.load_model(importlib.import_module(method), path, device="cpu")[1].state_dict()
    assert all(torch.equal(got[name], weight) for name, weight in saved["ema"].items())
    assert not all(torch.equal(got[name], weight) for name, weight in saved["model"].items())


@pytest.mark.parametrize("method", METHODS)
def test_two_models_in_one_process_are_two_compiled_functions(method, all_trained, monkeypatch):
    """Each is compiled once, and predicts by its own weights."""
    module, compiled = importlib.import_module(method), []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    run, model = data.load_model(module, all_trained[method][0] / "ckpt.pt", device="cpu", compile=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.5 * torch.randn_like(p))
    controls = {"": np.random.default_rng(0).random((5, 40)).astype(np.float32)}

    def cells(model):
        return module.predict(run, model, {"TF1": 5}, controls, run.panel.eval_genes)["TF1"]
    first, second = cells(model), cells(other)
    expected = 1 if method == "celltarnet" else 2       # its function takes the model as an argument
    assert len(compiled) == expected and not np.array_equal(first, second)
    assert np.array_equal(cells(model), first) and np.array_equal(cells(other), second)
    assert len(compiled) == expected


@pytest.mark.parametrize("change, words", [
    (lambda state: state["config"].pop("width"), "its Config lacks width"),
    (lambda state: state["config"].update(extra=1), "its Config has extra"),
    (lambda state: state["config"].update(width="wide"), "its width is 'wide'"),
    (lambda state: state["config"].update(width=32), "size mismatch"),
    (lambda state: state["content"]["ema"].popitem(), "Missing key"),
    (lambda state: state.update(seconds=-1e30), "impossible seconds"),
    (lambda state: state["content"].pop("model"), "it has no model"),
    (lambda state: state["content"].update(ema=[]), "its panel, split or content"),
    (lambda state: state["panel"]["mean"].pop(), "its panel")])
def test_a_checkpoint_of_another_version_of_the_file_is_one_line(change, words, all_trained, call, tmp_path):
    """Forkers change the architecture every day."""
    state = torch.load(all_trained[CHEAP][0] / "ckpt.pt", weights_only=True)
    change(state)
    torch.save(state, tmp_path / "ckpt.pt")
    done = call(f"{CHEAP}.py", "--ckpt", tmp_path / "ckpt.pt", "--predict", "TF1", "--out", tmp_path / "p.h5ad")
    error(done, "ckpt.pt: made by another version of this file", words)
    error(call(f"{CHEAP}.py", "--out", tmp_path, "--resume"), words)


def test_a_checkpoint_with_pickled_objects_is_not_loaded(all_trained, call, tmp_path):
    """They could hold any code."""
    state = torch.load(all_trained[CHEAP][0] / "ckpt.pt", weights_only=True)
    torch.save(state | {"more": tmp_path}, tmp_path / "ckpt.pt")
    done = call(f"{CHEAP}.py", "--ckpt", tmp_path / "ckpt.pt", "--predict", "TF1", "--out", tmp_path / "p.h5ad")
    error(done, "no checkpoint, or damaged")


def test_cells_that_are_not_finite_are_refused(all_trained, call, tmp_path):
    state = torch.load(all_trained[CHEAP][0] / "ckpt.pt", weights_only=True)
    state["content"]["ema"]["effects"] *= float("nan")
    torch.save(state, tmp_path / "nan.pt")
    done = call(f"{CHEAP}.py", "--ckpt", tmp_path / "nan.pt", "--predict", "TF1", "--out", tmp_path / "p.h5ad")
    error(done, "not finite")
    assert not (tmp_path / "p.h5ad").exists()


def test_consoles_without_arrows_and_full_disks_behind_them(all_trained):
    """A finished run's table on a console of Windows, and where its lines cannot be written."""
    command = [sys.executable, str(ROOT / f"{CHEAP}.py"), "--out", str(all_trained[CHEAP][0]), "--resume"]
    ascii_only = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.returncode == 0 and b"l2?" in done.stdout, done.stderr
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ascii_only)
        error(done, "output cannot be written")


def test_a_cell_alone_is_detected_as_often_as_its_values_say():
    """One cell of 3,000 genes at 0.3 of their typical value: 0.3 of them are typical, the others 0."""
    n = 3000
    panel = data.Panel([f"g{i}" for i in range(n)], [], [], [], [], [1] * n, [9] * n, {}, [2.0] * n)
    cells, _ = data.as_measured(np.full((1, n), 0.6, np.float32), panel, np.arange(n), "detect", seed=1)
    assert (cells == 2).mean() == pytest.approx(0.3, abs=0.03) and set(cells[0]) == {0, 2}


# ------------------------------------------------------------------------------------------------ misuse

@pytest.mark.parametrize("flags, words", [
    (["--data", "nothing.h5ad"], ["nothing.h5ad", "no such file"]),
    (["--data", "a\x0bb\r\nc"], ["a b c: no such file"]),      # one line on every terminal
    (["--split", "sideways"], ["sideways", "additive"]),
    (["--split", "transfer"], ["--covariates"]),
    (["--nonsense"], ["--nonsense"]),
    (["--steps", "many"], ["--steps"]),
    (["--steps", "0"], ["--steps"]),
    (["--lr", "-1"], ["--lr"]),
    (["--lr", "nan"], ["--lr"]),
    (["--lr", "inf"], ["--lr"]),
    (["--dropout", "nan"], ["--dropout"]),
    (["--lr-min", "1"], ["--lr-min 1.0", "above --lr"]),
    (["--as-counts"], ["--as-counts", "--predict"]),
    (["--layers", "1000000000"], ["--layers", "at most"]),
    (["--seed", "-1"], ["--seed"]),
    (["--seed", "9" * 20], ["--seed"]),
    (["--fold", "9" * 20], ["--fold"]),
    (["--preset", "big"], ["--preset big", "paper"]),
    (["--device", "meta"], ["--device meta"]),
    (["--device", "tpu9"], ["--device tpu9"]),
    (["--pert-key", "nope"], ["nope", "condition"]),
    (["--layer", "nope"], ["nope"]),
    (["--covariates", "nope"], ["nope"]),
    (["--control-label", "nope"], ["nope", "control"]),
    (["--eval-c", "5"], ["--eval-c"]),          # no guessing of abbreviated flags
])
def test_misuse_is_one_clear_line(flags, words, demo, call, tmp_path):
    given = [] if "--data" in flags else ["--data", demo]
    done = call(f"{CHEAP}.py", *given, *FLAGS, "--out", tmp_path / "run", *flags)
    error(done, *words)
    assert done.stdout == "" and not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("method", METHODS)
def test_gpu_with_bf16_and_compile(method, demo, run, tmp_path):
    out = ok(run(f"{method}.py", "--data", demo, *TINY[method], "--device", "cuda", "--out", tmp_path / "run"))
    assert "bf16, compiled" in out
    ok(run(f"{method}.py", "--ckpt", tmp_path / "run" / "ckpt.pt", "--predict", "TF1", "--device", "cpu", "--out",
           tmp_path / "p.h5ad"))
    assert np.isfinite(read(tmp_path / "run")["aggregate"]["l2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(demo, call, tmp_path):
    done = call(f"{CHEAP}.py", "--data", demo, *FLAGS, "--device", "cuda", "--out", tmp_path / "run")
    error(done, "--device cuda", "use --device cpu")


def test_a_papers_configuration_on_a_cpu_warns_before_its_first_step(demo, call, monkeypatch, tmp_path):
    """A step of it may take minutes."""
    monkeypatch.setattr(data, "FIRST_LINE", 0)
    paper = ["paper" if flag == "demo" else flag for flag in FLAGS]
    out = ok(call(f"{CHEAP}.py", "--data", demo, *paper, "--steps", 3, "--out", tmp_path / "run"))
    warning = out.index("warning: a paper's configuration on a CPU")
    assert out.index("--preset demo") > warning and warning < out.index("step 1/3")
    assert re.search(r"step 1/3 .* 0:00:\d\d left", out)


# ------------------------------------------------------------------------------------------------ the house

def run_section(method):
    text = (ROOT / f"{method}.py").read_text()
    return re.search(r"^# -+ run section, the same text in all four methods\n(.*?)^# -+ end of the run section$", text,
                     re.M | re.S).group(1)


def test_run_section_is_the_same_text_in_every_method():
    assert all(len(run_section(m)) > 1000 and run_section(m) == run_section(METHODS[0]) for m in METHODS)


def test_only_the_allowed_packages_are_imported():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert {n.split(".")[0] for n in names} <= ALLOWED, path.name
        assert not {n.split(".")[0] for n in names} & set(METHODS), f"{path.name} imports a method"
        if path.stem == "data":
            assert "metrics" not in names


def test_a_fork_trains_resumes_and_predicts_under_its_own_name(demo, run, tmp_path):
    """One method file with data.py and metrics.py is all that a reader needs to copy."""
    for name in (f"{CHEAP}.py", "data.py", "metrics.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / f"{CHEAP}.py").rename(tmp_path / "mymethod.py")
    ok(run("mymethod.py", "--data", demo, *FLAGS, "--steps", 3, cwd=tmp_path))
    folder = tmp_path / "runs" / "mymethod-small-additive-f0-s0"
    assert read(folder)["method"] == "mymethod"
    assert "l2" in ok(run("mymethod.py", "--resume", "--out", folder, cwd=tmp_path))
    ok(run("mymethod.py", "--ckpt", folder / "ckpt.pt", "--predict", "TF1", cwd=tmp_path))
    assert (tmp_path / "pred.h5ad").exists()


def test_readme_snippet_reads_a_prediction(all_trained, monkeypatch):
    scanpy, plain, *scripts = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(all_trained[CHEAP][0])
    names = {}
    exec(plain, names)
    assert names["cells"].shape == (7 * 8, 40) and len(names["pred"].genes) == 40
    for script in scripts:                          # cells from an array of controls
        script = script.replace("scdfm", CHEAP).replace("runs/X/", "").replace("KLF1+MAP2K6", "TF1+TF2")
        exec(script.replace("500", "5"), names)
        assert names["cells"].shape == (5, 40)
    predict = functools.partial(importlib.import_module(CHEAP).predict, names["run"], names["model"])
    for groups, controls, words in (({"NOGENE": 5}, {"": np.ones((3, 40))}, "no perturbation NOGENE"),
                                    ({"TF1@T": 5}, {"": np.ones((3, 40))}, "no control cells of 'T'"),
                                    ({"TF1": 5}, {"": np.ones((3, 39))}, "have 39 genes; the model has 40")):
        with pytest.raises(data.DataError, match=words):
            predict(groups, controls, [0])
    with h5py.File("pred.h5ad") as file:            # what the scanpy lines rely on, which is no package of ours
        assert "condition" in file["obs"] and b"control" in file["obs/condition/categories"][...]
    assert '"condition", reference="control"' in scanpy


@pytest.fixture(scope="module")
def help_of():
    """help_of(script): the text of --help, from a process of its own, once per script."""
    @functools.cache
    def text(script):
        return subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True).stdout
    return text


def test_readme_commands_are_real(help_of):
    """Every script that the README calls exists, and every flag that it shows is known."""
    readme = (ROOT / "README.md").read_text()
    for script, flags in re.findall(r"(?:python|torchrun[^\n]*?) (\w+\.py)([^\n`|]*)", readme):
        if script != "mymethod.py":
            assert (ROOT / script).exists(), script
            for flag in re.findall(r"--[a-z][a-z-]*", flags):
                assert flag in help_of(script), f"{script} {flag}"
    assert "pip install -r requirements.txt && python scdfm.py" in readme and "python -m pytest" in readme


def test_help_shows_every_flag_with_its_meaning_and_its_defaults(help_of):
    for method in METHODS:
        text = " ".join(help_of(f"{method}.py").split())
        for group in ("data:", "run:", "method:"):
            assert group in text
        for flag, meaning in (("--hvg ", "paper"), ("--covariates ", "matched"), ("--lr ", ", demo "),
                              ("--compile", "default on for CUDA")):
            assert flag in text and meaning in text


def test_a_half_trained_model_says_so(all_trained, call, tmp_path):
    """Predictions of a run that was stopped are no error, but not without a word."""
    state = torch.load(all_trained["primeflow"][0] / "ckpt.pt", weights_only=True)
    state["step"] -= 1
    torch.save(state, tmp_path / "ckpt.pt")
    done = call("primeflow.py", "--ckpt", tmp_path / "ckpt.pt", "--predict", "TF1", "--cells", 3,
                "--out", tmp_path / "pred.h5ad")
    assert done.returncode == 0 and f"has done {state['step']} of" in done.stdout, done.stderr
