"""Shared by all tests: the repository on the path, the small demo file, and a way to run the scripts as a user does."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"         # real data and reference values; tests that need them skip without
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

torch.set_num_threads(1)                # models this small lose more to waking threads than they win

METHODS = [m for m in ("scdfm", "primeflow", "scbig", "celltarnet") if (ROOT / f"{m}.py").exists()]

# per method: the smallest run that goes through every line, in seconds, not minutes, on the file of `demo`
TINY = {m: ["--preset", "demo", "--split", "additive", "--steps", "20", "--eval-cells", "8", "--dropout", "0.1"] for m in METHODS}
TINY["scdfm"] += ["--batch-size", "16", "--conditions-per-batch", "4", "--width", "16", "--layers", "1", "--heads", "2",
                  "--gene-subset", "30", "--ode-steps", "2"]
if "celltarnet" in METHODS:
    TINY["celltarnet"] += ["--batch-size", "16", "--cells-per-context", "2", "--width", "16", "--blocks", "2", "--patch", "2", "--neighbours", "5"]
if "scbig" in METHODS:
    TINY["scbig"] += ["--batch-size", "16", "--conditions-per-batch", "4", "--width", "16", "--layers", "1", "--heads", "2",
                      "--hidden", "32", "--latent", "8", "--modules", "4", "--inducing", "2", "--pretrain-steps", "4",
                      "--pretrain-batch-size", "16", "--pretrain-check", "2", "--structure-conditions", "2",
                      "--structure-cells", "8", "--ode-steps", "2"]
if "primeflow" in METHODS:
    TINY["primeflow"] += ["--batch-size", "16", "--width", "16", "--groups", "4", "--multipliers", "1", "2", "--heads", "2", "--guidance", "1",
                          "--ode-steps", "2"]
# flags that make one process do what two do with TINY
TWICE = {"scdfm": ["--batch-size", "32", "--conditions-per-batch", "8"]}
TWICE["celltarnet"] = ["--batch-size", "32"]
TWICE["scbig"] = ["--batch-size", "32", "--conditions-per-batch", "8", "--structure-conditions", "4", "--pretrain-batch-size", "32"]
TWICE["primeflow"] = ["--batch-size", "32"]
# what it takes to learn a 60-gene demo in about twenty seconds
LEARN = {"scdfm": ["--steps", 500, "--batch-size", 32, "--width", 32, "--layers", 2, "--gene-subset", 30, "--lr", 5e-3,
                   "--ema", 0.97]}
LEARN["celltarnet"] = ["--steps", 300, "--batch-size", 32, "--lr", 1e-2]
LEARN["scbig"] = ["--module-weights", "own", "--layers", 1, "--width", 32, "--pretrain-steps", 500, "--pretrain-batch-size", 64, "--pretrain-lr", 4e-3,
                  "--steps", 120, "--batch-size", 128, "--ode-steps", 3, "--structure-cells", 16]

# the U-Net needs minutes, on the demo itself; the rest of the script is the same for the MLP
LEARN["primeflow"] = ["--steps", 1200, "--batch-size", 64, "--lr", 2e-3, "--velocity", "mlp"]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small simulated file: 40 genes, 16 singles, 24 doubles, 12 cells each."""
    path = tmp_path_factory.mktemp("demo") / "small.h5ad"
    data.simulate(path, cells=560, genes=40)
    return str(path)


@pytest.fixture(scope="session")
def run():
    """run(script, *flags, cwd=None) -> CompletedProcess, as from a shell: a new process."""
    def call(script, *flags, cwd=None):
        return subprocess.run([sys.executable, script if cwd else str(ROOT / script), *map(str, flags)], cwd=cwd or ROOT, timeout=300,
                              capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return call


@pytest.fixture
def call(capsys):
    """The same within this process, which saves the seconds of importing torch: call(script, *flags) -> CompletedProcess."""
    def call(script, *flags):
        capsys.readouterr()
        try:
            importlib.import_module(script.removesuffix(".py")).main([str(f) for f in flags])
            code = 0
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
        done = capsys.readouterr()
        return subprocess.CompletedProcess([script, *flags], code, done.out, done.err)
    return call
