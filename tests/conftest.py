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
TINY = {m: ["--preset", "demo", "--split", "additive", "--steps", "20", "--eval-cells", "8"] for m in METHODS}
TINY["scdfm"] += ["--batch-size", "16", "--conditions-per-batch", "4", "--width", "16", "--layers", "1", "--heads", "2",
                  "--gene-subset", "30", "--ode-steps", "2"]
# flags that make one process do what two do with TINY
TWICE = {"scdfm": ["--batch-size", "32", "--conditions-per-batch", "8"]}
# what it takes to learn a 60-gene demo in about twenty seconds
LEARN = {"scdfm": ["--steps", 500, "--batch-size", 32, "--width", 32, "--layers", 2, "--gene-subset", 30, "--lr", 5e-3,
                   "--ema", 0.97]}


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
