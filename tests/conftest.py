"""Shared by all tests: the repository on the path, the small demo file, and a way to run the scripts as a user does."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

torch.set_num_threads(1)                # models this small lose more to waking threads than they win

METHODS = ["scdfm", "primeflow", "scbig", "celltarnet"]

# per method: the smallest run that goes through every line, in seconds, not minutes, on the file of `demo`
SHORT = ["--preset", "demo", "--split", "additive", "--steps", "20", "--eval-cells", "8", "--dropout", "0.1"]
TINY = {
    "scdfm": [*SHORT, "--batch-size", "16", "--conditions-per-batch", "4", "--width", "16", "--layers", "1",
              "--heads", "2", "--gene-subset", "30", "--ode-steps", "2"],
    "primeflow": [*SHORT, "--batch-size", "16", "--width", "16", "--groups", "4", "--multipliers", "1", "2",
                  "--heads", "2", "--guidance", "1", "--ode-steps", "2"],
    "scbig": [*SHORT, "--batch-size", "16", "--conditions-per-batch", "4", "--width", "16", "--layers", "1",
              "--heads", "2", "--hidden", "32", "--latent", "8", "--modules", "4", "--inducing", "2",
              "--pretrain-steps", "4", "--pretrain-batch-size", "16", "--structure-conditions", "2",
              "--structure-cells", "8", "--ode-steps", "2"],
    "celltarnet": [*SHORT, "--batch-size", "16", "--cells-per-context", "2", "--width", "16", "--blocks", "2",
                   "--patch", "2", "--neighbours", "5"],
}


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small simulated file: 40 genes, 16 singles, 24 doubles, 12 cells each."""
    path = tmp_path_factory.mktemp("demo") / "small.h5ad"
    data.simulate(path, cells=560, genes=40)
    return str(path)


def start(script, *flags, cwd=None, **options):
    """A script as from a shell, in a process of its own: the Popen."""
    return subprocess.Popen([sys.executable, script if cwd else str(ROOT / script), *map(str, flags)], cwd=cwd or ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finished(process):
    """The CompletedProcess of a started script, when it has ended."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def run():
    """run(script, *flags, cwd=None) -> CompletedProcess, as from a shell: a new process."""
    return lambda script, *flags, cwd=None: finished(start(script, *flags, cwd=cwd))


@pytest.fixture
def call(capsys):
    """The same within this process, which saves the seconds of importing torch: call(script, *flags)."""
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
