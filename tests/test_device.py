"""Every script on the stand-in GPU of standin.py: nothing left on the CPU, no wait for the device inside a step."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import data
from conftest import METHODS, ROOT, TINY

# flags of the ablations, and what else a checkpoint is for
ABLATIONS = {
    "scdfm": [["--mmd-weight", "0"], ["--knn", "0", "--no-differential"], ["--no-effect-readout", "--no-precondition"]],
    "primeflow": [["--velocity", "unet", "--p-null", "0.2", "--guidance", "1", "3"],
                  ["--coupling", "independent", "--sigma", "0", "--no-standardise", "--no-effect-readout"],
                  ["--space", "pca", "--no-standardise", "--coupling", "ot", "--ot-cells", "8", "--path",
                   "trigonometric"]],
    "scbig": [["--clustering", "kmeans"], ["--encoder", "transformer"], ["--corr-weight", "0"]],
    "celltarnet": [["--prior", "none", "--contrast-weight", "0"], ["--prior", "sparse"], ["--denoise-weight", "0"]],
}
OTHER = {"celltarnet": ["--score", "DEMO"]}


@pytest.fixture(scope="module")
def measured(demo, tmp_path_factory):
    """{method: what standin.py counted}, all four side by side."""
    folder, processes = tmp_path_factory.mktemp("standin"), {}
    cells = data.read_cells(demo)
    rows = np.flatnonzero(cells.condition == "control")[:20]
    data.write_h5ad(folder / "own.h5ad", cells.X[rows].toarray()[:, 1:], {}, cells.genes[1:])
    doubles = sorted({condition for condition in cells.condition if "+" in condition})
    (folder / "split.json").write_text(json.dumps({"val": doubles[:1], "test": doubles[1:2]}))   # few, since it is slow
    for method in METHODS:
        flags = ["--data", demo, *TINY[method], "--steps", "3", "--split", f"{folder}/split.json"]
        run, ckpt = ["--out", f"{folder}/{method}"], ["--ckpt", f"{folder}/{method}/ckpt.pt"]
        commands = [flags + run + ["--eval-every", "2"], run + ["--resume", "--eval-cells", "6"],
                    ckpt + ["--predict", "TF1+TF2", "--cells", "5", "--out", f"{folder}/{method}-p.h5ad"],
                    ckpt + ["--predict", "test", "--controls", f"{folder}/own.h5ad", "--cells", "5",
                            "--out", f"{folder}/{method}-q.h5ad"]]
        for i, ablation in enumerate(ABLATIONS[method]):
            commands.append(flags + ablation + ["--out", f"{folder}/{method}{i}"])
        if method in OTHER:
            other = [demo if flag == "DEMO" else flag for flag in OTHER[method]]
            commands.append(ckpt + other + ["--out", f"{folder}/{method}-other.h5ad"])
        (folder / f"{method}.json").write_text(json.dumps(commands))
        command = [sys.executable, str(ROOT / "tests" / "standin.py"), method, str(folder / f"{method}.json")]
        processes[method] = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                             stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    out = {}
    for method, process in processes.items():
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, method + printed[-2000:] + errors
        out[method] = json.loads(printed.splitlines()[-1])
    return out


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device_or_copies(measured, method):
    assert measured[method]["calls"]["step"] >= 12 and measured[method]["step"] == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_prediction_copies_its_inputs_in_and_its_cells_out_once(measured, method):
    calls, generated = measured[method]["calls"]["generate"], measured[method]["generate"]
    once = 4 if method == "celltarnet" else 0           # two checkpoints, of two blocks whose masks are looked at
    assert calls >= 8 and generated.get("wait", 0) <= once
    assert generated["copy out"] == calls               # one chunk each at this size
    assert generated["copy in"] <= 6 * calls


@pytest.mark.parametrize("method, most", [("scdfm", 700), ("primeflow", 700), ("scbig", 560), ("celltarnet", 1200)])
def test_launches_of_a_step_do_not_grow(measured, method, most):
    """Kernels of an uncompiled tiny step, views apart; what the demo's model needs stands in the README."""
    assert measured[method]["operations"]["step"] / measured[method]["calls"]["step"] < most


@pytest.mark.parametrize("method", METHODS)
def test_graphs_of_a_compiled_run(method, demo, call, monkeypatch, tmp_path):
    """In bf16, as on a GPU: no graph break; one graph for the step of each stage and one for sampling any number of
    cells, validation, test and --predict together (but for a single cell, a shape of its own). The counting backend
    stands for inductor."""
    torch._dynamo.reset()
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled(function, backend=counter, fullgraph=True))
    folder, as_on_a_gpu = tmp_path / "run", ["--compile", "--dtype", "bf16"]
    done = call(f"{method}.py", "--data", demo, *TINY[method], "--steps", "4", "--eval-every", "2", *as_on_a_gpu,
                "--out", folder)
    assert done.returncode == 0, done.stderr
    stages = 2 if method == "scbig" else 1
    assert counter.frame_count == stages + 1
    for cells in (5, 7):
        done = call(f"{method}.py", "--ckpt", folder / "ckpt.pt", "--predict", "TF1+TF2", *as_on_a_gpu,
                    "--cells", cells, "--out", tmp_path / f"{cells}.h5ad")
        assert done.returncode == 0, done.stderr
    assert counter.frame_count == stages + 1
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_training_in_bf16_follows_fp32(method, demo, call, tmp_path):
    """The same 100 steps in both, from the same random numbers: the losses of each stay within a few per cent."""
    losses = {}
    for dtype in ("fp32", "bf16"):
        done = call(f"{method}.py", "--data", demo, *TINY[method], "--steps", "100", "--dtype", dtype,
                    "--out", tmp_path / dtype)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / dtype / "log.jsonl").read_text().splitlines()]
        losses[dtype] = np.array([line["loss"] for line in lines])
    assert len(losses["fp32"]) >= 100 and np.isfinite(losses["bf16"]).all()
    difference = np.abs(losses["bf16"] - losses["fp32"]) / np.abs(losses["fp32"]).mean()
    assert 0 < difference.mean() < 0.02 and difference.max() < 0.1
