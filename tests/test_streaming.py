"""--backed: a run that reads its batches from disk is the run that reads them from memory, to the last bit."""
import json

import pytest

from conftest import METHODS, TINY

import data


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_run_equals_a_run_from_memory(method, demo, call, tmp_path):
    """Losses of every step, scores, predicted cells."""
    found = []
    for flags in ([], ["--backed"]):
        out = tmp_path / f"run{len(found)}"
        done = call(f"{method}.py", "--data", demo, *TINY[method], "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        assert ("note: streamed from the file" in done.stdout) == bool(flags)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        log = [{k: v for k, v in line.items() if k not in ("cells_per_s", "seconds")} for line in log]
        found.append((log, json.loads((out / "metrics.json").read_text())["aggregate"],
                      data.read_cells(out / "pred.h5ad").X.toarray().tobytes()))
    assert found[0][0] and found[0] == found[1]
