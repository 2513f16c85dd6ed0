"""Mutants of valid AnnData files through data.py: each must load or end in one line `error: ...` with exit code 2.

    python tests/fuzz_data.py [mutants per file and kind, default 80] [seed, default 0]

Four files (dense, CSR with old categories, compressed CSC, nullable columns) are damaged in two ways: bytes (a few
overwritten, a range zeroed, the end cut off) and structure (a node deleted, emptied, replaced by another type, length,
dtype or shape; an attribute changed; a link that leads nowhere). Each mutant is read in a process of its own, forked,
so that a crash or a hang (a minute) counts too. Prints the numbers and every failure; exit code 1 if there is one.
"""
import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import h5py
import numpy as np

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import data  # noqa: E402
import test_data as forms  # noqa: E402

SECONDS = 60


def valid_files(folder):
    """Four files that load, each in encodings of its own."""
    X = forms.make_counts(60)
    kinds = ["T", "B"] * 30
    files = {
        "dense": dict(write=forms.dense(), labels=forms.LABELS, obs={"cell_type": kinds}),
        "csr-old": dict(write=forms.sparse(), labels=lambda g, k: forms.old_categorical(g, k, forms.LABELS),
                        obs={"cell_type": lambda g, k: forms.old_categorical(g, k, kinds)}),
        "csc-gzip": dict(write=forms.sparse("csc", compression="gzip"),
                         labels=lambda g, k: forms.categorical(g, k, forms.LABELS), obs={"cell_type": kinds}),
        "nullable": dict(write=forms.sparse(index="int64"),
                         labels=lambda g, k: forms.nullable(g, k, forms.LABELS, forms.TEXT),
                         obs={"cell_type": lambda g, k: forms.nullable(g, k, kinds, forms.TEXT)})}
    for name, parts in files.items():
        path = folder / f"{name}.h5ad"
        forms.write_file(path, X, parts["labels"], write=parts["write"], obs=parts["obs"],
                         var={"gene_name": forms.GENES, "feature_types": ["Gene Expression"] * len(forms.GENES)})
        with h5py.File(path, "a") as file:
            file.create_group("layers")["counts"] = X
            file.create_group("uns")["note"] = "x"
        yield path


def mutate_bytes(source, target, rng):
    content = bytearray(source.read_bytes())
    how = rng.choice(["overwrite", "overwrite", "zero", "cut"])
    at = rng.randrange(len(content))
    if how == "overwrite":
        for _ in range(rng.choice([1, 4, 32])):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif how == "zero":
        size = rng.choice([8, 64, 512])
        content[at:at + size] = bytes(len(content[at:at + size]))
    else:
        del content[at:]
    target.write_bytes(content)
    return how


def mutate_structure(source, target, rng):
    target.write_bytes(source.read_bytes())
    with h5py.File(target, "a") as file:
        names = []
        file.visit(names.append)
        name = rng.choice(names)
        node = file[name]
        replacements = {
            "delete": None, "scalar": 3, "null": h5py.Empty("f4"), "text": "x", "table": np.zeros(3, [("a", "i4")]),
            "numbers": np.arange(rng.choice([1, 59, 60, 61])), "square": np.zeros((3, 3)), "nan": np.full(60, np.nan),
            "huge": np.full(60, 2**62), "negative": np.full(60, -7), "group": "group", "link": "link",
            "shorter": "shorter", "column": "column", "bytes": "bytes", "attribute": "attribute"}
        how = rng.choice(list(replacements))
        value = replacements[how]
        if how == "attribute":
            node.attrs[rng.choice([*node.attrs, "encoding-type", "shape", "_index", "categories"])] = rng.choice(
                [0, "", "x", b"\xff", np.arange(3), h5py.Empty("f4"), np.array(["csr_matrix"], dtype="S"), -1.5])
            return how
        if how in ("shorter", "column", "bytes"):
            if not isinstance(node, h5py.Dataset) or not node.shape:
                return "none"
            values = node[...]
            value = {"shorter": values[:-1], "column": values.reshape(-1, 1),
                     "bytes": np.full(node.shape, b"\xff\x00", dtype="S4")}[how]
        del file[name]
        if how == "group":
            file.create_group(name)
        elif how == "link":
            file[name] = h5py.ExternalLink("nowhere.h5", "/x")
        elif value is not None:
            file[name] = value
    return how


def outcome(path, flags):
    """How data.py ends on a file, in a forked process: 'loads', 'error', or what went wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)                   # the default action ends a child that hangs
        out, err = io.StringIO(), io.StringIO()
        verdict = "loads"
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                data.main([str(path), *flags])
        except SystemExit as end:
            one_line = err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1
            clean = end.code == 2 and one_line and not out.getvalue()
            verdict = "error" if clean else f"unclear: {end.code} {err.getvalue()}"
        except BaseException:
            verdict = "traceback: " + traceback.format_exc()
        os.write(writer, verdict.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        verdict = pipe.read().decode(errors="replace")
    if os.WIFSIGNALED(status):
        return "hangs" if os.WTERMSIG(status) == signal.SIGALRM else f"crashes: signal {os.WTERMSIG(status)}"
    return verdict


def main(n=80, seed=0):
    rng = random.Random(seed)
    count, failures = Counter(), []
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        for source in valid_files(Path(folder)):
            assert outcome(source, []) == "loads", source
            for mutate in (mutate_bytes, mutate_structure):
                for _ in range(n):
                    target = Path(folder, "mutant.h5ad")
                    how = mutate(source, target, rng)
                    flags = ["--covariates", "cell_type"] + rng.choice([[], ["--backed"], ["--layer", "counts"]])
                    verdict = outcome(target, flags)
                    count[verdict.split(":")[0]] += 1
                    if verdict not in ("loads", "error"):
                        failures.append((source.stem, how, flags, verdict))
    for failure in failures:
        print(*failure)
    print(f"{sum(count.values())} mutants in {time.time() - began:.0f} s: "
          + ", ".join(f"{number} {verdict}" for verdict, number in count.most_common()))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
