"""The method scripts as a user runs them: subprocesses on a small demo, resume, crashes, several processes, misuse."""
import ast
import functools
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

import data
import metrics
from conftest import LEARN, METHODS, ROOT, TINY, TWICE

ALLOWED = {"torch", "numpy", "scipy", "h5py", "matplotlib", "data", "metrics"} | set(sys.stdlib_module_names)


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


def weights(folder):
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return {f"{p}.{k}": v for p, part in state["saved"].items() if p in ("model", "ema") for k, v in part.items() if torch.is_tensor(v)}


def same_weights(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(folder):
    """Losses and validation of every logged step, without the times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("cells_per_s", "seconds")} for line in lines]


@pytest.fixture(scope="module", params=METHODS)
def trained(request, demo, run, tmp_path_factory):
    """One finished tiny run of each method: (method, folder, console output)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    method = request.param
    return method, folder, ok(run(f"{method}.py", "--data", demo, *TINY[method], "--out", folder))


# ------------------------------------------------------------------------------------------------ a whole run

def test_run_prints_the_table_and_writes_its_files(trained, demo):
    method, folder, out = trained
    more = ["modules.tsv"] if method == "scbig" else []
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt.pt", "config.json", "log.jsonl", "metrics.json", *more, "pred.h5ad", "split.json"]
    table = out[out.index("l2↓"):].strip().splitlines()[1:]
    assert [line.split()[0] for line in table] == ["control", "mean", "mean_cells", "additive", method, "replicate", "vs"]
    for key in ("l2↓", "pearson_delta↑", "pds↑", "e_distance↓"):
        assert key in out
    result = json.loads((folder / "metrics.json").read_text())
    assert {"method", "data", "split", "fold", "seed", "seconds", "peak_memory_mb", "config", "versions", "aggregate", "n_valid", "groups",
            "per_condition", "floors", "replicate"} <= set(result)
    assert result["method"] == method and set(result["floors"]) == {"control", "mean", "mean_cells", "additive"}
    split = json.loads((folder / "split.json").read_text())
    assert sorted(result["per_condition"]) == split["test"] and len(split["test"]) == 7
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 20 and all(np.isfinite(entry["loss"]) for entry in log)
    assert json.loads((folder / "config.json").read_text())["steps"] == 20


def test_prediction_file_scores_to_the_same_numbers(trained, demo, call, tmp_path):
    """metrics.py on pred.h5ad and the data file gives what the run itself printed."""
    method, folder, _ = trained
    ok(call("metrics.py", folder / "pred.h5ad", demo, "--reference", demo, "--out", tmp_path / "m.json"))
    again, own = json.loads((tmp_path / "m.json").read_text()), json.loads((folder / "metrics.json").read_text())
    for key in ("l2", "mse", "pearson_delta", "pds", "e_distance", "de_spearman"):
        assert again["aggregate"][key] == pytest.approx(own["aggregate"][key], rel=1e-4), key


def test_prediction_file_is_anndata_with_real_controls(trained, demo):
    _, folder, _ = trained
    pred, real = data.read_cells(folder / "pred.h5ad"), data.load(demo, data.DataConfig(), "additive")
    assert pred.genes == real.genes and (pred.X.data >= 0).all()
    np.testing.assert_allclose(pred.X[pred.condition == "control"].toarray(), real.controls("test")[""], rtol=1e-6)
    for condition in real.split["test"]:
        assert (pred.condition == condition).sum() == 8


def test_same_seed_same_numbers_other_seed_others(trained, demo, call, tmp_path):
    method, folder, _ = trained
    ok(call(f"{method}.py", "--data", demo, *TINY[method], "--out", tmp_path / "same"))
    ok(call(f"{method}.py", "--data", demo, *TINY[method], "--out", tmp_path / "other", "--seed", 1))
    first, same, other = (json.loads((f / "metrics.json").read_text())["aggregate"] for f in (folder, tmp_path / "same", tmp_path / "other"))
    assert first == same and first["l2"] != other["l2"]


@pytest.mark.parametrize("method", METHODS)
def test_method_beats_the_control_and_mean_floors(method, call, tmp_path):
    data.simulate(tmp_path / "demo.h5ad", cells=2400, genes=60)
    ok(call(f"{method}.py", "--data", tmp_path / "demo.h5ad", "--preset", "demo", "--split", "additive", *LEARN[method], "--eval-cells", 60, "--out", tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for key in ("l2", "pearson_delta", "pds", "e_distance"):
        sign = 1 if metrics.KEYS[key].arrow == "↑" else -1
        for floor in ("control", "mean", "mean_cells"):
            assert sign * result["aggregate"][key] > sign * result["floors"][floor][key], (key, floor)


# ------------------------------------------------------------------------------------------------ resume and crashes

@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_identical(method, demo, call, tmp_path):
    """20 steps = 10 + resume + 10, with dropout and EMA, weights and predictions to the last bit."""
    flags = ["--data", demo, *TINY[method], "--ema", 0.9, "--dropout", 0.1]
    ok(call(f"{method}.py", *flags, "--out", tmp_path / "whole"))
    out = ok(call(f"{method}.py", *flags, "--out", tmp_path / "halves", "--stop-at", 10))
    assert f"python {method}.py --out {tmp_path / 'halves'} --resume" in out
    assert not (tmp_path / "halves" / "metrics.json").exists()
    ok(call(f"{method}.py", "--out", tmp_path / "halves", "--resume"))
    assert same_weights(tmp_path / "whole", tmp_path / "halves")
    aggregates = [json.loads((tmp_path / f / "metrics.json").read_text())["aggregate"] for f in ("whole", "halves")]
    assert aggregates[0] == aggregates[1]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "halves")


def test_a_streamed_run_equals_a_run_from_memory(trained, demo, call, tmp_path):
    """--backed: losses of every step, scores and predicted cells, to the last bit."""
    method, folder, out = trained
    done = ok(call(f"{method}.py", "--data", demo, *TINY[method], "--backed", "--out", tmp_path / "run"))
    assert "note: streamed from the file" in done and "note: streamed from the file" not in out
    assert log_of(folder) and log_of(folder) == log_of(tmp_path / "run")
    scores, cells = zip(*((json.loads((f / "metrics.json").read_text())["aggregate"], data.read_cells(f / "pred.h5ad").X.toarray())
                          for f in (folder, tmp_path / "run")))
    assert scores[0] == scores[1] and np.array_equal(*cells)


def test_validation_during_training_changes_nothing(trained, demo, call, tmp_path):
    method, folder, _ = trained
    out = ok(call(f"{method}.py", "--data", demo, *TINY[method], "--eval-every", 5, "--out", tmp_path / "with"))
    assert out.count("validation  l2") == 3
    assert same_weights(folder, tmp_path / "with")
    entries = [json.loads(line) for line in (tmp_path / "with" / "log.jsonl").read_text().splitlines()]
    assert sum("val" in e for e in entries) == 3


@pytest.mark.parametrize("method", METHODS)
def test_signals_save_and_say_how_to_go_on(method, demo, tmp_path):
    """Ctrl-C for the first method, what a cluster sends for the others."""
    number = signal.SIGINT if method == METHODS[0] else signal.SIGTERM
    command = [sys.executable, str(ROOT / f"{method}.py"), "--data", demo, *TINY[method], "--steps", "5000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "run" / "log.jsonl"
    for _ in range(600):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number, out + err
    assert "--resume" in out and "Traceback" not in err
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert -state["config"].get("pretrain_steps", 0) < state["step"] < 5000


def test_sigterm_and_time_limit_end_a_run_that_goes_on_bit_identically(trained, demo, call, monkeypatch, tmp_path):
    method, folder, _ = trained
    module = importlib.import_module(method)
    flags = ["--data", demo, *TINY[method]]
    update = module.Progress.update

    def kill_at_7(progress, step, **losses):
        update(progress, step, **losses)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(module.Progress, "update", kill_at_7)
    assert call(f"{method}.py", *flags, "--out", tmp_path / "run").returncode == 143
    monkeypatch.undo()
    out = ok(call(f"{method}.py", "--out", tmp_path / "run", "--resume", "--time-limit", 1e-9))   # one step a call
    assert "stopped at step 8 of 20" in out
    ok(call(f"{method}.py", "--out", tmp_path / "run", "--resume"))
    assert same_weights(folder, tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_a_diverged_run_names_the_last_good_checkpoint(method, demo, call, monkeypatch, tmp_path):
    module = importlib.import_module(method)
    flags = ["--data", demo, *TINY[method], "--steps", 500, "--out", tmp_path / "run"]                # a log line every five steps
    monkeypatch.setattr(module, "CHECKPOINT_MINUTES", 0)
    update = module.Progress.update
    monkeypatch.setattr(module.Progress, "update", lambda progress, step, **losses: update(
        progress, step, **{k: v * float("nan") if step > 11 else v for k, v in losses.items()}))
    error(call(f"{method}.py", *flags), "diverged", "last good checkpoint", "ckpt.pt")
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert state["step"] == 11


def test_kill_during_a_save_leaves_a_loadable_checkpoint(trained, demo, run, call, tmp_path):
    """A copy of the script that saves at every step and dies in the middle of its 10th save."""
    method, folder, _ = trained
    for name in (f"{method}.py", "data.py", "metrics.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    script = tmp_path / f"{method}.py"
    text = script.read_text().replace("CHECKPOINT_MINUTES = 5", "CHECKPOINT_MINUTES = 0")
    text = text.replace("        torch.save(state, temporary)\n", "        torch.save(state, temporary)\n        if step == 10:\n"
                        "            size = temporary.stat().st_size\n            os.truncate(temporary, size // 2)\n            os.kill(os.getpid(), 9)\n")
    assert "os.kill" in text
    script.write_text(text)
    flags = ["--data", demo, *TINY[method], "--out", tmp_path / "run"]
    assert run(f"{method}.py", *flags, cwd=tmp_path).returncode == -9
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 9
    ok(call(f"{method}.py", "--out", tmp_path / "run", "--resume"))
    assert same_weights(folder, tmp_path / "run")


@pytest.mark.parametrize("method", METHODS)
def test_disk_full_while_saving_keeps_the_old_checkpoint(method, demo, call, tmp_path):
    """The file size limit of the process stands in for a full disk."""
    folder = tmp_path / "run"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    ok(call(f"{method}.py", "--data", demo, *TINY[method], "--out", folder, "--stop-at", 10))
    before = hashlib.sha256((folder / "ckpt.pt").read_bytes()).hexdigest()
    done = subprocess.run([sys.executable, str(ROOT / f"{method}.py"), "--out", str(folder), "--resume"], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, preexec_fn=limit, env={**os.environ, "OMP_NUM_THREADS": "1"})
    error(done, "ckpt.pt", "cannot be written", "free some space")
    assert hashlib.sha256((folder / "ckpt.pt").read_bytes()).hexdigest() == before
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


# ------------------------------------------------------------------------------------------------ several processes

def torchrun(script, *flags):
    """As `torchrun --nproc-per-node 2 script`, on the CPU."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), *map(str, flags)],
                          cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_with_twice_the_batch(method, demo, call, tmp_path):
    """Begun by two processes, continued by one, against one process throughout."""
    flags = ["--data", demo, *TINY[method], "--steps", 10, "--dropout", 0.0, "--device", "cpu", "--eval-every", 3]
    done = torchrun(ROOT / f"{method}.py", *flags, "--stop-at", 7, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("validation  l2") == 2             # one process talks, both predict, each its share of the conditions
    ok(call(f"{method}.py", *flags, *TWICE[method], "--out", tmp_path / "one"))
    ok(call(f"{method}.py", "--out", tmp_path / "two", "--resume"))
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4, msg=k)     # Adam makes much of the rounding of small gradients
    one, two = (data.read_cells(tmp_path / f / "pred.h5ad") for f in ("one", "two"))
    assert list(one.condition) == list(two.condition)
    np.testing.assert_allclose(one.X.toarray().mean(), two.X.toarray().mean(), rtol=1e-2)
    scores = [[line["val"]["l2"] for line in log_of(tmp_path / f) if "val" in line] for f in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-2) and len(scores[0]) == 3
    untrained = ["--steps", 1, "--stop-at", 1]                  # the comparison can fail: other weights are further away
    ok(call(f"{method}.py", *flags, *untrained, "--seed", 1, "--out", tmp_path / "other"))
    assert max((a[k] - v).abs().max().item() for k, v in weights(tmp_path / "other").items() if v.dtype.is_floating_point) > 1e-2


@pytest.mark.parametrize("method, flags, word", [("celltarnet", ["--batch-size", 4], "--batch-size 2"),
                                                 ("primeflow", ["--coupling", "ot", "--batch-size", 8, "--ot-cells", 8], "--batch-size 4")])
def test_resume_by_more_processes_than_the_batch_allows(method, flags, word, demo, call, tmp_path):
    ok(call(f"{method}.py", "--data", demo, *TINY[method], *flags, "--stop-at", 1, "--out", tmp_path / "run"))
    done = torchrun(ROOT / f"{method}.py", "--out", tmp_path / "run", "--resume")
    assert done.returncode != 0 and f"error: {word}" in done.stderr and f'{method}.py", line' not in done.stderr


def test_a_process_that_dies_ends_the_run_and_both_go_on_from_its_checkpoint(demo, tmp_path):
    """A copy of the script whose second process kills itself after step 5, every step saved."""
    for name in ("scdfm.py", "data.py", "metrics.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    text = (tmp_path / "scdfm.py").read_text().replace("CHECKPOINT_MINUTES = 5", "CHECKPOINT_MINUTES = 0")
    before = "    def update(self, step, **losses):\n"
    assert before in text
    (tmp_path / "scdfm.py").write_text(text.replace(before, before + "        if step == 5 and self.run.rank == 1:\n            os.kill(os.getpid(), 9)\n"))
    done = torchrun(tmp_path / "scdfm.py", "--data", demo, *TINY["scdfm"], "--out", tmp_path / "run")
    assert done.returncode != 0 and "another process of this run has ended" in done.stderr and "--resume" in done.stderr, done.stderr
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] in (4, 5)
    done = torchrun(ROOT / "scdfm.py", "--out", tmp_path / "run", "--resume")
    assert done.returncode == 0 and done.stdout.count("replicate") == 1, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------ prediction

def test_predict_singles_doubles_and_triples_never_seen(trained, demo, call, tmp_path):
    method, folder, _ = trained
    # a gene that was never perturbed, where the method embeds genes
    single = "TF5" if method == "primeflow" else "GENE3"
    ok(call(f"{method}.py", "--ckpt", folder / "ckpt.pt", "--predict", single, "TF2+TF1", "TF1+TF2+TF3", "--cells", 7, "--out", tmp_path / "p.h5ad"))
    p = data.read_cells(tmp_path / "p.h5ad")
    assert {c: int((p.condition == c).sum()) for c in set(p.condition)} == {single: 7, "TF1+TF2": 7, "TF1+TF2+TF3": 7, "control": 50}
    x = {c: p.X[p.condition == c].toarray() for c in set(p.condition)}
    assert not np.array_equal(x[single], x["TF1+TF2"])
    ok(call(f"{method}.py", "--ckpt", folder / "ckpt.pt", "--predict", "TF1+TF2", "--cells", 7, "--out", tmp_path / "again.h5ad"))
    test = json.loads((folder / "split.json").read_text())["test"][0]
    ok(call(f"{method}.py", "--ckpt", folder / "ckpt.pt", "--predict", test, "--cells", 8, "--out", tmp_path / "test.h5ad"))
    mine, own = data.read_cells(tmp_path / "test.h5ad"), data.read_cells(folder / "pred.h5ad")
    np.testing.assert_array_equal(mine.X[mine.condition == test].toarray(), own.X[own.condition == test].toarray())  # the EMA weights too
    again = data.read_cells(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(again.X[again.condition == "TF1+TF2"].toarray(), x["TF1+TF2"])  # whatever else is asked for


def test_predict_from_own_controls_and_for_all_genes(demo, call, tmp_path):
    """Evaluation genes are fewer than the panel here; the controls have other genes too, in another order, and no labels."""
    for method in METHODS:
        folder = tmp_path / method
        ok(call(f"{method}.py", "--data", demo, *TINY[method], "--eval-genes", 10, "--out", folder))
        cells = data.read_cells(demo)
        rows = np.flatnonzero(cells.condition == "control")[:20]
        order = np.random.default_rng(0).permutation(len(cells.genes))
        X = np.concatenate([cells.X[rows].toarray()[:, order], np.ones((20, 1), np.float32)], axis=1)
        data.write_h5ad(tmp_path / f"{method}-mine.h5ad", X, {}, [cells.genes[i] for i in order] + ["EXTRA"])
        flags = ["--ckpt", folder / "ckpt.pt", "--predict", "TF1", "--controls", tmp_path / f"{method}-mine.h5ad", "--cells", 30]
        ok(call(f"{method}.py", *flags, "--out", tmp_path / f"{method}-few.h5ad"))
        ok(call(f"{method}.py", *flags, "--out", tmp_path / f"{method}-all.h5ad", "--all-genes"))
        few, every = data.read_cells(tmp_path / f"{method}-few.h5ad"), data.read_cells(tmp_path / f"{method}-all.h5ad")
        assert len(few.genes) == 10 and every.genes == cells.genes
        assert (few.condition == "TF1").sum() == (every.condition == "TF1").sum() == 30
        assert (every.condition == "control").sum() == 20
        expected = np.log1p(1e4 * X / X.sum(1, keepdims=True))[:, np.argsort(order)]
        np.testing.assert_allclose(every.X[every.condition == "control"].toarray(), expected, rtol=1e-4)


def test_predict_refuses_what_it_cannot_do(trained, demo, call, tmp_path):
    method, folder, _ = trained
    script, ckpt = f"{method}.py", ["--ckpt", folder / "ckpt.pt", "--out", tmp_path / "p.h5ad"]
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
    error(call(script, *ckpt, "--predict", "TF1", "--controls", tmp_path / "few.h5ad"), "few.h5ad", "lacks 37 of the 40 genes")
    assert not (tmp_path / "p.h5ad").exists()


# ------------------------------------------------------------------------------------------------ misuse

def test_checkpoints_that_are_none(trained, call, tmp_path):
    method, folder, _ = trained
    script = f"{method}.py"
    error(call(script, "--ckpt", tmp_path / "no.pt", "--predict", "TF1"), "no such checkpoint")
    (tmp_path / "text.pt").write_text("hello")
    error(call(script, "--ckpt", tmp_path / "text.pt", "--predict", "TF1"), "text.pt", "damaged")
    (tmp_path / "half.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
    error(call(script, "--ckpt", tmp_path / "half.pt", "--predict", "TF1"), "half.pt", "damaged")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    error(call(script, "--ckpt", tmp_path / "foreign.pt", "--predict", "TF1"), "foreign.pt")
    torch.save({"method": "othermethod"}, tmp_path / "other.pt")
    error(call(script, "--ckpt", tmp_path / "other.pt", "--predict", "TF1"), "checkpoint of othermethod")


def test_resume_refuses_another_config(trained, demo, call, tmp_path):
    method, folder, _ = trained
    script = f"{method}.py"
    error(call(script, "--out", folder, "--resume", "--stop-at", 3), "--stop-at 3", "step 20")
    error(call(script, "--out", folder, "--resume", "--lr", 1), "--lr", "drop the flag")
    error(call(script, "--out", folder, "--resume", "--split", "unseen"), "--split unseen", "started with additive")
    error(call(script, "--out", tmp_path / "none", "--resume"), "ckpt.pt does not exist")
    error(call(script, "--data", demo, *TINY[method], "--out", folder), "already holds")


def test_changed_data_is_noticed_on_resume(call, tmp_path):
    data.simulate(tmp_path / "a.h5ad", cells=560, genes=40)
    for method in METHODS:
        flags = ["--data", tmp_path / "a.h5ad", *TINY[method], "--out", tmp_path / method]
        ok(call(f"{method}.py", *flags, "--stop-at", 5))
    data.simulate(tmp_path / "a.h5ad", cells=560, genes=44, seed=1)
    for method in METHODS:
        error(call(f"{method}.py", "--out", tmp_path / method, "--resume"), "has changed")


@pytest.mark.parametrize("method", METHODS)
def test_changed_split_is_noticed_on_resume(method, demo, call, tmp_path):
    """Otherwise conditions that were trained on could be scored as test."""
    doubles = [c for c in data.load(demo).split["train"] if "+" in c]
    (tmp_path / "s.json").write_text(json.dumps({"test": doubles[:3]}))
    flags = ["--data", demo, *TINY[method], "--split", tmp_path / "s.json", "--out", tmp_path / "run"]
    ok(call(f"{method}.py", *flags, "--stop-at", 3))
    (tmp_path / "s.json").write_text(json.dumps({"test": doubles[3:6]}))
    error(call(f"{method}.py", "--out", tmp_path / "run", "--resume"), "s.json", "has changed")


@pytest.mark.parametrize("method", METHODS)
def test_resume_after_a_torn_log_line(method, demo, call, tmp_path):
    flags = ["--data", demo, *TINY[method], "--out", tmp_path / "run"]
    ok(call(f"{method}.py", *flags, "--stop-at", 10))
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write('{"step": 11, "lo')
    ok(call(f"{method}.py", "--out", tmp_path / "run", "--resume"))
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()][-20:] == list(range(1, 21))


@pytest.mark.parametrize("method", METHODS)
def test_covariates_drugs_and_transfer(method, call, tmp_path):
    """Two cell types, labels that are no genes: groups are written CONDITION@type, controls come from the same type."""
    data.simulate(tmp_path / "two.h5ad", cells=900, genes=40, cell_types=2)
    flags = ["--data", tmp_path / "two.h5ad", *TINY[method], "--covariates", "cell_type", "--split", "transfer"]
    ok(call(f"{method}.py", *flags, "--out", tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all("@type" in group for group in result["per_condition"])
    p = ["--ckpt", tmp_path / "run" / "ckpt.pt", "--cells", 5]
    ok(call(f"{method}.py", *p, "--predict", "TF1@type2", "TF2", "--out", tmp_path / "p.h5ad"))
    pred = data.read_cells(tmp_path / "p.h5ad", data.DataConfig(covariates="cell_type"))
    counts = {g: int(((pred.condition == g[0]) & (pred.covariate == g[1])).sum()) for g in set(zip(pred.condition, pred.covariate))}
    assert {g: n for g, n in counts.items() if g[0] != "control"} == {("TF1", "type2"): 5, ("TF2", "type1"): 5, ("TF2", "type2"): 5}


@pytest.mark.parametrize("flags", [["--pert-embedding", "table"], ["--dtype", "bf16"], ["--no-differential", "--ode", "heun"],
                                   ["--cross-attention", "maps", "--ode", "rk4", "--knn", "0"], ["--mmd-weight", "0"]])
def test_scdfm_variants_run(flags, demo, call, tmp_path):
    done = call("scdfm.py", "--data", demo, *TINY["scdfm"], *flags, "--out", tmp_path / "run")
    assert "replicate" in ok(done) and not done.stderr


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flags, words", [
    (["--data", "nothing.h5ad"], ["nothing.h5ad", "no such file"]),
    (["--split", "sideways"], ["sideways", "additive"]),
    (["--split", "transfer"], ["--covariates"]),
    (["--nonsense"], ["--nonsense"]),
    (["--steps", "many"], ["--steps"]),
    (["--steps", "0"], ["--steps"]),
    (["--lr", "-1"], ["--lr"]),
    (["--seed", "-1"], ["--seed"]),
    (["--device", "meta"], ["--device meta"]),
    (["--device", "tpu9"], ["--device tpu9"]),
    (["--pert-key", "nope"], ["nope", "condition"]),
    (["--layer", "nope"], ["nope"]),
    (["--covariates", "nope"], ["nope"]),
    (["--control-label", "nope"], ["nope", "control"]),
    (["--lognorm"], ["--lognorm", "integers"]),
    (["--eval-c", "5"], ["--eval-c"]),          # no guessing of abbreviated flags
])
def test_misuse_is_one_clear_line(method, flags, words, demo, call, tmp_path):
    given = [] if "--data" in flags else ["--data", demo]
    error(call(f"{method}.py", *given, *TINY[method], "--out", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("method", METHODS)
def test_gpu_with_bf16_and_compile(method, demo, run, tmp_path):
    flags = ["--data", demo, *TINY[method], "--device", "cuda"]
    out = ok(run(f"{method}.py", *flags, "--stop-at", 10, "--out", tmp_path / "run"))
    assert "bf16, compiled" in out
    ok(run(f"{method}.py", "--out", tmp_path / "run", "--resume"))
    ok(run(f"{method}.py", "--ckpt", tmp_path / "run" / "ckpt.pt", "--predict", "TF1", "--device", "cpu", "--out", tmp_path / "p.h5ad"))
    assert np.isfinite(json.loads((tmp_path / "run" / "metrics.json").read_text())["aggregate"]["l2"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("method", METHODS)
def test_cuda_where_there_is_none(method, demo, call, tmp_path):
    error(call(f"{method}.py", "--data", demo, *TINY[method], "--device", "cuda", "--out", tmp_path / "run"), "--device cuda", "use --device cpu")


def test_scdfm_batches_that_do_not_divide(demo, call, tmp_path):
    error(call("scdfm.py", "--data", demo, *TINY["scdfm"], "--batch-size", 18, "--out", tmp_path / "run"), "--batch-size 18")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ the house

def plumbing(method):
    text = (ROOT / f"{method}.py").read_text()
    return re.search(r"^# -+ plumbing, the same in all four methods\n(.*?)^# -+ end of plumbing$", text, re.M | re.S).group(1)


def test_plumbing_is_the_same_text_in_every_method():
    assert all(len(plumbing(m)) > 1000 and plumbing(m) == plumbing(METHODS[0]) for m in METHODS)


def test_the_end_of_a_step_is_the_same_text_in_every_method():
    def tail(method):
        text = (ROOT / f"{method}.py").read_text()
        start = text.rindex("        # console, log, validation, checkpoint")
        lines = text[start:text.index("    run.deafen()", start)].splitlines()
        return [line for line in lines if "progress.update" not in line]
    assert len(tail("scdfm")) == 8 and all(tail(m) == tail("scdfm") for m in METHODS)


def test_only_the_allowed_packages_are_imported():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert {n.split(".")[0] for n in names} <= ALLOWED, path.name
        if path.stem in METHODS or path.stem in ("data", "metrics"):
            assert not {n.split(".")[0] for n in names} & set(METHODS), f"{path.name} imports a method"
        if path.stem == "data":
            assert "metrics" not in names


@pytest.mark.parametrize("method", METHODS)
def test_a_fork_runs_in_an_empty_folder(method, demo, run, tmp_path):
    """One method file with data.py and metrics.py is all that a reader needs to copy."""
    for name in (f"{method}.py", "data.py", "metrics.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / f"{method}.py").rename(tmp_path / "mine.py")
    ok(run("mine.py", "--data", demo, *TINY[method], "--steps", 3, "--out", "here", cwd=tmp_path))
    assert (tmp_path / "here" / "metrics.json").exists()


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
        assert (ROOT / script).exists(), script
        for flag in re.findall(r"--[a-z][a-z-]*", flags):
            assert flag in help_of(script), f"{script} {flag}"
    assert "pip install -r requirements.txt && python scdfm.py" in readme and "python -m pytest" in readme


def test_help_shows_every_flag_with_its_meaning(help_of):
    for method in METHODS:
        text = help_of(f"{method}.py")
        for flag, meaning in (("--hvg ", "paper"), ("--steps ", "length of the schedule"), ("--covariates ", "controls are matched"),
                              ("--compile", "default on for CUDA")):
            assert flag in text and meaning in " ".join(text.split())


def test_files_open_in_plain_h5py(trained):
    _, folder, _ = trained
    with h5py.File(folder / "pred.h5ad") as file:
        assert file.attrs["encoding-type"] == "anndata" and file["X"].shape[1] == len(file["var/_index"])
    assert set(metrics.TABLE_KEYS) <= set(json.loads((folder / "metrics.json").read_text())["aggregate"])
