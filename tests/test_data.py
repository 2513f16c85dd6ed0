"""data.py: every AnnData layout, labels, preprocessing, splits, leaks, sampling, writing, the demo, bad input."""
import ast
import gzip
import json
import math
import os
import resource
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import data

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"         # real files and reference values; tests that need them skip without
GENES = ["KLF1", "MAP2K6", "CEBPA", "HLA-A", "C7orf26", "RP11-34P13.7"] + [f"GENE{i}" for i in range(1, 25)]
TEXT = h5py.string_dtype()


# ------------------------------------------------------------------------------------------------ files, by hand

def make_counts(n, G=len(GENES), seed=0):
    """(n, G) float32 counts, more than half of them zero, no empty cell."""
    rng = np.random.default_rng(seed)
    X = rng.poisson(rng.gamma(0.4, 4, G) + 0.2, (n, G)) * (rng.random((n, G)) < 0.6)
    X[:, -1] += 1
    return X.astype(np.float32)


def log_cp10k(X):
    """log1p of counts per 10,000 by a plain loop, float64."""
    out = np.zeros(X.shape)
    for i, row in enumerate(X):
        total = sum(float(v) for v in row)
        for j, v in enumerate(row):
            out[i, j] = math.log1p(float(v) * 10_000 / total) if total else 0.0
    return out


def text(group, key, values):
    group.create_dataset(key, data=np.asarray(values, dtype=object), dtype=TEXT)


def fixed_bytes(group, key, values):
    group.create_dataset(key, data=np.array([v.encode() for v in values], dtype="S"))


def ascii_bytes(group, key, values):
    group.create_dataset(key, data=[v.encode() for v in values], dtype=h5py.string_dtype("ascii"))


def categorical(group, key, values, codes="int8", write=text):
    """The form of anndata 0.8 and later; '' is missing (code -1); one category is not used."""
    categories = ["unused"] + sorted(set(values) - {""}, reverse=True)
    node = group.create_group(key)
    node.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
    node["codes"] = np.array([categories.index(v) if v else -1 for v in values], dtype=codes)
    write(node, "categories", categories)


def old_categorical(group, key, values):
    """The form of anndata 0.7: codes in place, categories under __categories, linked by a reference."""
    categories = sorted(set(values) - {""})
    group[key] = np.array([categories.index(v) if v else -1 for v in values], dtype="int8")
    text(group.require_group("__categories"), key, categories)
    group[key].attrs["categories"] = group["__categories"][key].ref


def nullable(group, key, values, dtype=None):
    """nullable-integer, nullable-boolean and nullable-string-array: values with a mask; None is missing."""
    node, filler = group.create_group(key), next(v for v in values if v is not None)
    node.attrs["encoding-type"] = "nullable-string-array" if isinstance(filler, str) else "nullable-integer"
    node.create_dataset("values", data=[filler if v is None else v for v in values], dtype=dtype)
    node["mask"] = np.array([v is None for v in values])


def write_frame(file, name, index, columns, index_name="_index", write_index=text):
    group = file.create_group(name)
    group.attrs["encoding-type"], group.attrs["encoding-version"] = "dataframe", "0.2.0"
    group.attrs["_index"] = index_name
    group.attrs.create("column-order", list(columns), dtype=TEXT, shape=(len(columns),))
    write_index(group, index_name, index)
    for key, values in columns.items():
        if callable(values):
            values(group, key)
        elif isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            group[key] = values
        else:
            text(group, key, values)


def dense(dtype="float32", **options):
    return lambda file, key, X: file.create_dataset(key, data=X.astype(dtype), **options)


def sparse(kind="csr", dtype="float32", index="int32", old=False, change=None, **options):
    """A writer of a CSR or CSC group; change(matrix) returns other (data, indices, indptr)."""
    def write(file, key, X):
        M = sp.csr_matrix(X) if kind == "csr" else sp.csc_matrix(X)
        arrays = change(M) if change else (M.data, M.indices, M.indptr)
        group = file.create_group(key)
        group.attrs["h5sparse_format" if old else "encoding-type"] = kind if old else f"{kind}_matrix"
        group.attrs["h5sparse_shape" if old else "shape"] = np.array(X.shape)
        for name, values, kind_ in zip(("data", "indices", "indptr"), arrays, (dtype, index, index)):
            group.create_dataset(name, data=np.asarray(values).astype(kind_), **options)
    return write


def write_file(path, X, labels, genes=None, write=dense(), key="condition", obs=None, var=None, index=None, **frames):
    """A minimal AnnData file. labels: values, or a writer of the column, under `key`; obs, var: more columns."""
    genes = list(genes or GENES[:X.shape[1]])
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        write(file, "X", X)
        write_frame(file, "obs", [f"cell{i}" for i in range(len(X))], {key: labels, **(obs or {})}, **frames)
        write_frame(file, "var", index or genes, var or {}, **frames)
    return path


LABELS = ["control"] * 20 + ["KLF1"] * 15 + ["MAP2K6"] * 15 + ["KLF1+MAP2K6"] * 10


def same_cells(cells, X, condition=LABELS, genes=GENES):
    assert np.array_equal(cells.X.toarray(), X)
    assert cells.X.has_canonical_format and cells.X.dtype == np.float32 and cells.X.nnz == np.count_nonzero(X)
    assert list(cells.condition) == list(condition)
    assert cells.genes == list(genes)
    assert cells.scale == "counts"


def unsorted_rows(M):
    pairs = [list(range(M.indptr[i], M.indptr[i + 1]))[::-1] for i in range(M.shape[0])]
    order = np.array(sum(pairs, []))
    return M.data[order], M.indices[order], M.indptr


def duplicate_entries(M):
    """Every value v is stored as v - 1 and 1 in the same place."""
    return (np.stack([M.data - 1, np.ones_like(M.data)], axis=1).ravel(), np.repeat(M.indices, 2), M.indptr * 2)


def explicit_zeros(M):
    full = np.indices(M.shape)[1].ravel()
    return M.toarray().ravel(), full, np.arange(0, len(full) + 1, M.shape[1])


LAYOUTS = {
    "dense": dense(), "dense-float64": dense("float64"), "dense-int32": dense("int32"), "dense-uint8": dense("uint8"),
    "dense-gzip": dense(compression="gzip"), "dense-by-column": dense(chunks=(60, 1)),
    "csr": sparse(), "csr-int64-indices": sparse(index="int64"), "csr-uint32-indices": sparse(index="uint32"),
    "csr-float64": sparse(dtype="float64"), "csr-integers": sparse(dtype="int64"),
    "csr-float16": sparse(dtype="float16"),
    "csr-gzip": sparse(compression="gzip"), "csr-unsorted": sparse(change=unsorted_rows),
    "csr-duplicates": sparse(change=duplicate_entries), "csr-explicit-zeros": sparse(change=explicit_zeros),
    "csr-chunks": sparse(chunks=(101,), maxshape=(None,)), "csr-big-endian": sparse(dtype=">f4", index=">i8"),
    "csr-old": sparse(old=True), "csc": sparse("csc"),
    "csc-int64-lzf": sparse("csc", "float64", "int64", compression="lzf"),
    "csc-old": sparse("csc", old=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_matrix_layout(tmp_path, layout, monkeypatch):
    X = make_counts(60)
    path = write_file(tmp_path / "file.h5", X, LABELS, write=LAYOUTS[layout])
    same_cells(data.read_cells(path), X)
    for block in (data.BLOCK_NNZ, 50):                                      # from disk; in one block and in many
        monkeypatch.setattr(data, "BLOCK_NNZ", block)
        cells = data.read_cells(path, data.DataConfig(backed=True))
        copied = layout.startswith(("dense", "csc")) or layout == "csr-gzip"
        assert isinstance(cells.X, data.StoredRows) and cells.X.shape == X.shape
        assert any("temporary copy" in note for note in cells.notes) == copied
        for rows in (np.arange(60), np.array([5, 5, 59, 0, 1, 2, 41]), np.array([7]), np.array([], int)):
            part = cells.X[rows]
            assert np.array_equal(part.toarray(), X[rows]) and part.has_canonical_format
            assert part.dtype == np.float32 and part.nnz == np.count_nonzero(X[rows])
        cells.X = cells.X[np.arange(60)]
        same_cells(cells, X)




@pytest.mark.parametrize("missing", ["", " ", "nan", "NaN", "<NA>", "NA", "None"])
def test_missing_labels_are_never_controls(tmp_path, missing):
    path = write_file(tmp_path / "file.h5ad", make_counts(64), LABELS + [missing] * 4)
    cells = data.read_cells(path)
    assert list(cells.condition) == LABELS


def test_numbers_as_covariates(tmp_path):
    X, n = make_counts(60), 60
    obs = {"batch": np.arange(n) % 2, "flag": np.arange(n) % 3 == 0, "dose": np.where(np.arange(n) % 2, 0.1, 1e7),
           "single": np.where(np.arange(n) % 2, 0.1, 2).astype("float32"),
           "maybe": lambda g, k: nullable(g, k, [1 if i else None for i in range(n)])}
    path = write_file(tmp_path / "file.h5ad", X, LABELS, obs=obs)
    cells = data.read_cells(path, data.DataConfig(covariates=" batch, flag,dose,single,maybe"))
    assert list(cells.covariate[:2]) == ["1,False,0.1,0.1,1", "0,False,10000000,2,1"]  # cell0 is dropped
    assert len(cells.covariate) == 59 and any("1 cells without a label or covariate" in note for note in cells.notes)


@pytest.mark.parametrize("write_index", [text, fixed_bytes, lambda g, k, v: nullable(g, k, v, TEXT)])
def test_index_under_another_name(tmp_path, write_index):
    X = make_counts(60)
    path = write_file(tmp_path / "file.h5", X, LABELS, index_name="barcodes", write_index=write_index)
    cells = data.read_cells(path)
    same_cells(cells, X)
    assert list(cells.names[:2]) == ["cell0", "cell1"]


def test_gene_names_from_a_column(tmp_path):
    X, ensembl = make_counts(60), [f"ENSG{i:04}" for i in range(len(GENES))]
    symbols = GENES[:-1] + [""]
    for form in (text, categorical):
        path = write_file(tmp_path / "file.h5", X, LABELS, index=ensembl,
                          var={"chromosome": ensembl, "gene_name": lambda g, k: form(g, k, symbols)})
        same_cells(data.read_cells(path), X, genes=GENES[:-1] + [ensembl[-1]])  # no symbol: the identifier
        assert data.read_cells(path, data.DataConfig(gene_key="chromosome")).genes == ensembl
    path = write_file(tmp_path / "file.h5", X, LABELS, var={"gene_symbol": ensembl})
    same_cells(data.read_cells(path), X)                                        # the index holds more of them


def test_duplicate_gene_names(tmp_path):
    names = GENES[:-4] + ["X", "X", "X-1", "X"]
    cells = data.read_cells(write_file(tmp_path / "file.h5", make_counts(60), LABELS, genes=names))
    assert cells.genes[-4:] == ["X", "X-2", "X-1", "X-3"]                       # as anndata.var_names_make_unique
    assert any("duplicate gene names" in note for note in cells.notes)
    names = GENES[:-1] + ["KLF1"]
    with pytest.raises(data.DataError, match="KLF1 names several rows of var; choose .*--gene-key"):
        data.read_cells(write_file(tmp_path / "file.h5", make_counts(60), LABELS, genes=names))


def test_layers_and_raw(tmp_path):
    X, path = make_counts(60), tmp_path / "file.h5"
    write_file(path, np.log1p(X[:, :5]), LABELS)
    with h5py.File(path, "a") as file:
        layers, raw = file.create_group("layers"), file.create_group("raw")
        sparse("csc")(layers, "counts", X[:, :5])
        sparse()(raw, "X", X)
        write_frame(raw, "var", GENES, {})
    same_cells(data.read_cells(path, data.DataConfig(layer="counts")), X[:, :5], genes=GENES[:5])
    same_cells(data.read_cells(path, data.DataConfig(layer="raw")), X)
    with h5py.File(path, "a") as file:
        del file["raw"], file["X"]
        dense()(file["layers"], "raw", X[:, :5])                                # a layer that is called raw
    same_cells(data.read_cells(path, data.DataConfig(layer="raw")), X[:, :5], genes=GENES[:5])
    with pytest.raises(data.DataError, match=r"has no X; choose another --layer \(it has counts, raw\)"):
        data.read_cells(path)


def test_uns_of_any_kind(tmp_path):
    path = write_file(tmp_path / "file.h5", make_counts(60), LABELS)
    with h5py.File(path, "a") as file:
        uns = file.create_group("uns")
        for key, value in {"n": 3, "name": "x", "mean": np.arange(4.0), "nothing": h5py.Empty("f4")}.items():
            uns[key] = value
        uns["table"] = np.zeros(2, dtype=[("a", int)])
        uns.create_group("deeper")["value"] = 1
        text(uns, "names", ["a", "b"])
    uns = data.read_cells(path).uns
    assert sorted(uns) == ["mean", "n", "name", "names"] and uns["n"] == 3 and uns["name"] == "x"
    assert list(uns["names"]) == ["a", "b"] and list(uns["mean"]) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ labels

@pytest.mark.parametrize("label, expected", [
    ("A", "A"), ("A+ctrl", "A"), ("ctrl+A", "A"), ("A_", "A"), ("A+control", "A"), ("A_ctrl", "A"), ("A+", "A"),
    ("A+B", "A+B"), ("B+A", "A+B"), ("B_A", "A+B"), ("A,B", "A+B"), ("A;B", "A+B"), ("B | A", "A+B"), ("A + B", "A+B"),
    ("A+A", "A"), ("C+A+B", "A+B+C"), ("C_A_B", "A+B+C"), ("A+ctrl+B", "A+B"),
    ("HLA-A", "HLA-A"), ("HLA-A+C7orf26", "C7orf26+HLA-A"), ("RP11-34P13.7", "RP11-34P13.7"), ("Y_RNA", "Y_RNA"),
    ("Y_RNA+A", "A+Y_RNA"), ("Y_RNA_A", "A+Y_RNA"), ("A_guide1", "A_guide1"), ("drug_x", "drug_x"),
    ("(+)-JQ1", "(plus)-JQ1"), ("A+(+)-JQ1", "(plus)-JQ1+A"), ("2,4-DNP", "2,4-DNP"), ("A;Ro[1;2]", "A;Ro[1;2]"),
    ("(x;y)+A", "(x;y)+A"), ("A+B (x|y)", "A+B (x|y)"),
    ("A_NegCtrl0__A_NegCtrl0", "A"), ("A_B__A_B", "A+B"), ("C3orf72_NegCtrl0__C3orf72_NegCtrl0", "C3orf72"),
    ("A_C3orf72__A_C3orf72", "A+C3orf72"), ("NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0", "control"),
    ("ctrl", "control"), ("control", "control"), ("CTRL", "control"), ("Control", "control"), ("ctrl+ctrl", "control"),
    ("non-targeting", "control"), ("non_targeting", "control"), ("NT", "control"), ("NegCtrl7", "control"),
    ("DMSO", "control"), ("vehicle", "control"), ("unperturbed", "control"), ("PBS", "control"),
    ("", ""), ("NTRK1", "NTRK1"), ("PBSX", "PBSX")])
def test_canonical_labels(label, expected):
    genes = {"A", "B", "C", "HLA-A", "C7orf26", "RP11-34P13.7", "Y_RNA", "Y", "RNA"}
    labels = np.array([label, "C3orf72_NegCtrl0__C3orf72_NegCtrl0"], dtype=object)
    rules = data.LabelRules(labels, genes)
    assert rules.canonical(label) == expected == rules.canonical(expected)  # the canonical form stays as it is
    perturbed = {token for token in rules.tokens(label) if not rules.is_control(token)}
    assert len(perturbed) == len(set(expected.split("+")) - {"control", ""})


def column_file(path, columns, **options):
    n = len(next(iter(columns.values())))
    (key, labels), *others = columns.items()
    return write_file(path, make_counts(n), labels, key=key, obs=dict(others), **options)


def conditions(path, **flags):
    return list(data.read_cells(path, data.DataConfig(**flags)).condition)


def test_files_as_they_are_published(tmp_path):
    """The label columns of public data sets, found without a flag."""
    path, wanted = tmp_path / "file.h5ad", ["control", "KLF1", "KLF1+MAP2K6", "CEBPA"]
    gears = {"condition": ["ctrl", "KLF1+ctrl", "MAP2K6+KLF1", "ctrl+CEBPA"], "cell_type": ["K562"] * 4,
             "dose_val": ["1", "1+1", "1+1", "1+1"], "control": np.array([1, 0, 0, 0]),
             "condition_name": ["K562_ctrl_1", "K562_KLF1+ctrl_1+1", "K562_MAP2K6+KLF1_1+1", "K562_ctrl+CEBPA_1+1"],
             "cov_drug_dose_name": ["K562_ctrl_1", "K562_KLF1+ctrl_1+1", "x", "y"]}
    column_file(path, gears, index=[f"ENSG{i}" for i in range(len(GENES))], var={"gene_name": GENES})
    assert conditions(path) == wanted
    assert conditions(path, dose_key="dose_val") == ["control", "KLF1:1", "KLF1:1+MAP2K6:1", "CEBPA:1"]
    column_file(path, {"perturbation": ["control", "KLF1", "KLF1_MAP2K6", "CEBPA"], "nperts": np.array([0, 1, 2, 1])})
    assert conditions(path) == wanted                                       # scPerturb, Norman
    pair = ["NegCtrl10_NegCtrl0", "KLF1_NegCtrl0", "MAP2K6_KLF1", "NegCtrl0_CEBPA"]
    column_file(path, {"guide_identity": [f"{p}__{p}" for p in pair],
                       "guide_ids": ["", "KLF1", "KLF1,MAP2K6", "CEBPA"]})
    assert conditions(path) == wanted                                       # GEO; '' of guide_ids is no control
    column_file(path, {"gene": ["non-targeting", "KLF1", "HLA-A", "CEBPA"], "gene_transcript": ["1", "2", "3", "4"]})
    assert conditions(path) == ["control", "KLF1", "HLA-A", "CEBPA"]        # Replogle
    column_file(path, {"Drug1": ["control", "control", "SRT1720", "(+)-JQ1"],   # ComboSciPlex
                       "Drug2": ["control", "SRT1720", "(+)-JQ1", ""]})
    assert conditions(path, pert_key="Drug1,Drug2") == ["control", "SRT1720", "(plus)-JQ1+SRT1720", "(plus)-JQ1"]
    sciplex = {"perturbation": ["control", "Nutlin-3a", "Nutlin-3a", "AG-490 (Tyrphostin B42)"],
               "treatment": list("SABC"), "dose_value": np.array([np.nan, 10.0, 1e6, 0.5])}
    column_file(path, sciplex)
    assert conditions(path, dose_key="dose_value") == ["control", "Nutlin-3a:10", "Nutlin-3a:1000000",
                                                       "AG-490 (Tyrphostin B42):0.5"]
    column_file(path, {"sample": ["CTRL", "STIM", "STIM", "STIM"]})
    assert conditions(path, pert_key="sample", control_label="CTRL") == ["control", "STIM", "STIM", "STIM"]  # Kang


def test_doses_written_as_text(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"drug": ["DMSO", "A", "A+B", "A+B"],
                                                "dose": ["0", "1e+06", "1+2.5", "1e+06"]})
    assert conditions(path, dose_key="dose") == ["control", "A:1e06", "A:1+B:2.5", "A:1e06+B:1e06"]


def test_several_label_columns(tmp_path):
    path = tmp_path / "file.h5ad"
    same = {"perturbation": ["ctrl", "KLF1+ctrl", "MAP2K6+KLF1", "nan"],
            "condition": ["control", "KLF1", "KLF1_MAP2K6", ""],
            "gene": ["x", "y", "z", "z"]}                                   # no control label: not a candidate
    cells = data.read_cells(column_file(path, same))
    assert cells.pert_key == "condition" and list(cells.condition) == ["control", "KLF1", "KLF1+MAP2K6"]
    with pytest.raises(data.DataError) as error:
        data.read_cells(column_file(path, {**same, "drug": ["DMSO", "drugA", "drugA", "DMSO"]}))
    for part in ("file.h5ad", "condition (, KLF1, KLF1_MAP2K6, control)", "drug (DMSO, drugA)", "disagree",
                 "--pert-key"):
        assert part in str(error.value)
    assert conditions(path, pert_key="drug") == ["control", "drugA", "drugA", "control"]
    ensembl = {"condition": ["ctrl", "KLF1_MAP2K6", "KLF1"], "perturbation": ["ctrl", "KLF1+MAP2K6", "KLF1"]}
    column_file(path, ensembl, index=[f"ENSG{i}" for i in range(len(GENES))], var={"gene_name": GENES})
    assert conditions(path) == ["control", "KLF1+MAP2K6", "KLF1"]           # '_' by the symbols, not the identifiers


def test_files_without_controls_or_perturbations_on_request(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["KLF1", "CEBPA"]})
    assert list(data.read_cells(path, control_required=False).condition) == ["KLF1", "CEBPA"]
    path = column_file(tmp_path / "file.h5ad", {"batch": ["1", "2"]})
    assert list(data.read_cells(path, perturbed_required=False).condition) == ["control", "control"]


def test_controls_without_a_covariate(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["control", "KLF1"], "type": ["", "B"]})
    with pytest.raises(data.DataError, match="no control cell has a value of type; choose other --cov"):
        data.read_controls(path, data.DataConfig(covariates="type"), panel_of(GENES))


def test_covariates_and_dropped_groups(tmp_path):
    labels = ["control", "KLF1"] * 20 + ["KLF1"] * 5
    kinds = ["CD14+ Monocytes, a"] * 20 + ["B"] * 20 + ["alone"] * 5
    path = write_file(tmp_path / "file.h5ad", make_counts(45), labels, obs={"type": kinds, "batch": ["1"] * 45})
    loaded = data.load(path, data.DataConfig(covariates="type, batch"))
    assert loaded.groups == ["control@B,1", "control@CD14+ Monocytes, a,1", "KLF1@B,1", "KLF1@CD14+ Monocytes, a,1"]
    assert any("5 cells of 1 covariate values without control cells (alone,1)" in n for n in loaded.source.notes)
    assert loaded.source.file_shape == (45, len(GENES))
    back = tmp_path / "prepared.h5ad"
    data.write_prepared(back, loaded)
    assert data.load(back, data.DataConfig(covariates="type,batch")).groups == loaded.groups


# ------------------------------------------------------------------------------------------------ preprocessing

def test_normalisation_is_log1p_cp10k(tmp_path):
    X = make_counts(60)
    X[3] = 0                                                                # an empty cell stays empty
    path = write_file(tmp_path / "file.h5ad", X, LABELS, write=sparse())
    cells = data.read_cells(path)
    data.lognormalise(cells)
    assert np.allclose(cells.X.toarray(), log_cp10k(X), rtol=2e-6, atol=0) and cells.scale == "lognorm"
    before = cells.X.copy()
    data.lognormalise(cells)                                                # a second call changes nothing
    assert np.array_equal(cells.X.data, before.data)
    kept = data.load(path, data.DataConfig(min_cells=30))
    columns = [GENES.index(g) for g in kept.genes]
    assert len(columns) < len(GENES) and np.allclose(kept.X.toarray(), log_cp10k(X[:, columns]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("change, flags, expected", [
    (lambda X: X, {}, "counts"), (lambda X: X, {"counts": True}, "counts"),
    (log_cp10k, {}, "lognorm"), (log_cp10k, {"lognorm": True}, "lognorm"),
    (lambda X: X * 1.37, {"counts": True}, "counts"),                       # corrected counts, declared
    (lambda X: np.log1p(log_cp10k(X)), {"lognorm": True}, "lognorm"),       # odd, but the user insists
    (lambda X: X, {"lognorm": True}, "lognorm"), (lambda X: X * 1.37, {"lognorm": True}, "lognorm"),
    (log_cp10k, {"counts": True}, "counts"),                                # a declared unit settles the question
    (log_cp10k, {"counts": True, "lognorm": True}, "--counts and --lognorm contradict"),
    (lambda X: X / X.sum(1, keepdims=True) * 1e4, {}, "neither counts nor log-normalised.*--counts.*--layer"),
    (lambda X: np.log1p(log_cp10k(X)), {}, "log1p was applied twice.*--lognorm.*--layer"),
    (lambda X: X - 1, {}, r"negative values \(lowest -1\).*choose another --layer"),
    (lambda X: log_cp10k(X) - log_cp10k(X).mean(0), {}, "negative values .*--layer"),
    (lambda X: np.where(X == X.max(), np.nan, X), {}, "NaN or infinite"),
    (lambda X: np.where(X == X.max(), np.inf, X), {}, "NaN or infinite"),
    (lambda X: np.where(X == X.max(), -np.inf, X), {}, "NaN or infinite"),
    (lambda X: X * 0, {}, "every value is zero; choose another --layer")])
def test_scale(tmp_path, change, flags, expected):
    path = write_file(tmp_path / "file.h5ad", change(make_counts(60) + 8 * (make_counts(60, seed=1) > 4)), LABELS)
    if expected in ("counts", "lognorm"):
        assert data.read_cells(path, data.DataConfig(**flags)).scale == expected
    else:
        with pytest.raises(data.DataError, match=expected) as error:
            data.read_cells(path, data.DataConfig(**flags))
        assert "contradict" in expected or "file.h5ad: X" in str(error.value)


def test_quality_control(tmp_path):
    """min_genes over all genes of a cell; min_cells over training and control cells alone; perturbed genes stay."""
    X = np.zeros((60, 8), np.float32)
    X[:, 0] = 5                     # everywhere
    X[:55, 1] = 1
    X[:9, 2] = 1                    # nine control cells
    X[20:50, 3] = 7                 # singles only
    X[50:, 4] = 7                   # only the test condition
    X[:10, 5] = 1                   # ten control cells
    genes = ["a", "b", "c", "d", "e", "f", "KLF1", "MAP2K6"]
    path = write_file(tmp_path / "file.h5ad", X, LABELS, genes)
    assert data.load(path).genes == ["a", "b", "d", "e", "f", "KLF1", "MAP2K6"]
    split = tmp_path / "split.json"
    split.write_text('{"test": ["MAP2K6+KLF1"]}')
    loaded = data.load(path, split=str(split))
    assert loaded.genes == ["a", "b", "d", "f", "KLF1", "MAP2K6"]
    assert any("kept 6 of 8 genes" in note for note in loaded.source.notes)
    assert list(loaded.perturbations) == ["KLF1", "MAP2K6"] and list(loaded.pert_gene) == [4, 5]
    loaded = data.load(path, data.DataConfig(min_genes=3, min_cells=0))    # cells 0-9, 20-49 and 50-54
    assert loaded.X.shape == (45, 8) and any("kept 45 of 60 cells" in note for note in loaded.source.notes)
    assert loaded.source.file_shape == (60, 8)
    with pytest.raises(data.DataError, match="no perturbed cells .* are left after quality control; lower --min-genes"):
        data.load(path, data.DataConfig(min_genes=9))


def highly_variable(X, rows, n_top):
    return data.highly_variable(*data.gene_moments(X, rows, torch.expm1), len(rows), n_top)


def slow_highly_variable(X, n_top, bins=20):
    """scanpy's 'seurat' flavour from its definition, gene by gene. X (n, G) log1p CP10k."""
    n, G = X.shape
    mean, dispersion = [], []
    for g in range(G):
        values = [math.expm1(float(v)) for v in X[:, g]]
        m = sum(values) / n
        variance = sum((v - m) ** 2 for v in values) / (n - 1)
        mean.append(math.log1p(m if m else 1e-12))
        dispersion.append(math.log(variance / m) if m and variance else None)
    low, high = min(mean), max(mean)
    width, members = (high - low) / bins, {}
    which = [next(b for b in range(bins) if b == bins - 1 or m <= low + width * (b + 1)) for m in mean]
    for g in range(G):
        if dispersion[g] is not None:
            members.setdefault(which[g], []).append(dispersion[g])
    score = [-math.inf] * G
    for g in range(G):
        if dispersion[g] is not None:
            group = members[which[g]]
            centre = sum(group) / len(group)
            if len(group) == 1:
                score[g] = 1.0
            else:
                spread = math.sqrt(sum((d - centre) ** 2 for d in group) / (len(group) - 1))
                score[g] = (dispersion[g] - centre) / spread
    cut = sorted(score, reverse=True)[n_top - 1]
    return [s >= cut for s in score]


@pytest.mark.parametrize("n_top", [1, 15, 40, 90])
def test_highly_variable_genes_by_the_definition(n_top):
    X = log_cp10k(make_counts(80, 100, seed=3)).astype(np.float32)
    X[:, 7] = 0                                                             # a silent gene is never chosen
    X[:, 8] = 9.2 - 0.1 * (np.arange(80) == 20)                             # the highest, alone in its bin: scores 1
    rows = np.arange(10, 75)
    chosen = highly_variable(sp.csr_matrix(X), rows, n_top)
    assert list(chosen) == slow_highly_variable(X[rows], n_top)
    assert chosen.sum() >= n_top and not chosen[7]


@pytest.mark.parametrize("name, file, flags", [
    ("kang_ifnb", "kang_ifnb/ifnb_2800.h5ad", {"pert_key": "sample", "control_label": "CTRL"}),
    ("papalexi", "papalexi/papalexi2021_lowmoi.h5ad", {})])
def test_scanpy_reference(name, file, flags):
    if not (SHARED / "oracle/preprocess.json").exists() or not (SHARED / "data" / file).exists():
        pytest.skip("the scanpy reference is not here")
    wanted = json.loads((SHARED / "oracle/preprocess.json").read_text())[name]
    loaded = data.load(SHARED / "data" / file, data.DataConfig(**flags))
    rows = np.arange(loaded.X.shape[0])
    assert loaded.X.shape == (wanted["cells"], wanted["genes_after_qc"])
    values = loaded.X.data.astype(np.float64)
    assert values.sum() / np.prod(loaded.X.shape) == pytest.approx(wanted["mean_of_lognorm"], rel=1e-5)
    assert (values ** 2).sum() == pytest.approx(wanted["sum_of_squares"], rel=1e-5)
    chosen = highly_variable(loaded.X, rows, wanted["n_top"])
    assert {g for g, c in zip(loaded.genes, chosen) if c} == set(wanted["hvg"])


def test_perturbed_genes_survive_every_filter(demo, tmp_path):
    loaded = data.load(demo, data.DataConfig(hvg=20), "additive")
    assert {f"TF{i}" for i in range(1, 17)} <= set(loaded.genes) and 20 <= len(loaded.genes) <= 36
    chosen = [g for g in loaded.genes if not g.startswith("TF")]
    full = data.load(demo, split="additive")
    mask = highly_variable(full.X, full.fit_rows, 20)
    assert chosen == [g for g, m in zip(full.genes, mask) if m and not g.startswith("TF")] and chosen
    assert all(p == loaded.genes[i] for p, i in zip(loaded.perturbations, loaded.pert_gene))
    X = make_counts(60)
    X[:, 0] = 0                                                             # KLF1 is perturbed and never seen
    loaded = data.load(write_file(tmp_path / "file.h5ad", X, LABELS), data.DataConfig(hvg=5), "additive")
    assert "KLF1" in loaded.genes and loaded.X[:, loaded.genes.index("KLF1")].nnz == 0


def test_evaluation_genes_and_moments(demo):
    loaded = data.load(demo, data.DataConfig(eval_genes=30, control_split="0.5,0.25,0.25"), "additive")
    controls = loaded.controls("train")[""]
    assert len(controls) == 200 and len(loaded.controls("test")[""]) == 100
    best = np.argsort(-controls.astype(np.float64).mean(0), kind="stable")[:30]
    assert list(loaded.eval_genes) == sorted(best)
    assert len(data.load(demo, data.DataConfig(eval_genes=0)).eval_genes) == 120
    total, square = data.gene_moments(loaded.X, loaded.fit_rows)
    fit = loaded.X[loaded.fit_rows].toarray().astype(np.float64)
    assert np.allclose(total, fit.sum(0)) and np.allclose(square, (fit ** 2).sum(0))
    train = sum(len(loaded.rows[g]) for g in loaded.part("train"))
    assert len(loaded.fit_rows) == train + 200
    panel = loaded.panel()
    assert np.allclose(panel.highest, fit.max(0)) and np.allclose(panel.mean, fit.mean(0))
    parts = [set(loaded.control_rows[part][""]) for part in data.PARTS]
    assert sum(len(p) for p in parts) == len(set.union(*parts)) == 400


# ------------------------------------------------------------------------------------------------ sampling

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.h5ad"
    data.simulate(path)
    return path


@pytest.fixture(scope="module")
def two_types(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "two.h5ad"
    data.simulate(path, cells=1800, cell_types=2)
    return path


@pytest.fixture(scope="module")
def sampled(two_types):
    loaded = data.load(two_types, data.DataConfig(covariates="cell_type", control_split="0.5,0.25,0.25"), "additive")
    loaded.prepare_sampling()
    return loaded


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(loaded, groups, n, generator, genes=None):
    rows = loaded.draw(groups, n, generator)
    return rows, loaded.gather(rows, genes)


def test_sampling_is_deterministic_and_by_group(sampled):
    groups = torch.tensor([5, 9, 5])
    rows, values = sample(sampled, groups, 7, seeded())
    again, same = sample(sampled, groups, 7, seeded())
    assert torch.equal(rows, again) and torch.equal(values, same)
    assert not torch.equal(rows, sample(sampled, groups, 7, seeded(1))[0])
    assert values.shape == (21, len(sampled.genes)) and values.dtype == torch.float32
    for i, group in enumerate(groups.tolist()):
        assert set(rows[7 * i:7 * i + 7].tolist()) <= set(sampled.rows[sampled.groups[group]])
    assert np.array_equal(values.numpy(), sampled.X[rows.numpy()].toarray())
    genes = torch.tensor([3, 1, 60])
    assert torch.equal(sample(sampled, groups, 7, seeded(), genes)[1], values[:, genes])


def test_sampling_is_uniform(sampled):
    group = sampled.groups.index(sampled.part("train")[0])
    rows = sampled.rows[sampled.groups[group]]
    drawn = sampled.draw(torch.tensor([group]), 1000 * len(rows), seeded()).numpy()
    count = np.array([(drawn == r).sum() for r in rows])
    assert count.sum() == len(drawn)                                        # nothing from elsewhere
    chi2 = ((count - 1000) ** 2 / 1000).sum()
    assert chi2 < len(rows) - 1 + 5 * math.sqrt(2 * (len(rows) - 1))        # five standard deviations


def test_controls_match_the_covariate_and_the_part(sampled):
    groups = torch.arange(len(sampled.groups))
    control = sampled.controls_for(groups)
    for g, c in zip(groups.tolist(), control.tolist()):
        assert sampled.condition[c] == "control" and sampled.covariate[c] == sampled.covariate[g]
    drawn = set(sampled.draw(control, 200, seeded()).tolist())
    training = {r for rows in sampled.control_rows["train"].values() for r in rows}
    assert drawn == training                                                # all of them, and no other control
    labels, kinds = sampled.source.condition, sampled.source.obs("cell_type")
    for covariate, values in sampled.controls("test").items():
        rows = sampled.control_rows["test"][covariate]
        assert np.array_equal(values, sampled.X[rows].toarray()) and not set(rows) & training
        assert set(labels[rows]) == {"control"} and set(kinds[rows]) == {covariate}


@pytest.mark.parametrize("while_loading, while_sampling, on_disk, dense", [
    (4, 0, False, False), (0.0001, 0.0001, True, False), (0.0001, 4, True, True)])
def test_every_storage_gives_the_same(two_types, sampled, while_loading, while_sampling, on_disk, dense):
    """Sparse in memory, on disk, dense from disk; `sampled` is dense from memory."""
    config = data.DataConfig(covariates="cell_type", control_split="0.5,0.25,0.25", cache_gb=while_loading)
    other = data.load(two_types, config, "additive")
    config.cache_gb = while_sampling
    other.prepare_sampling()
    assert sampled.dense is not None and sp.issparse(sampled.X)
    assert (other.dense is not None) == dense and isinstance(other.X, data.StoredRows) == on_disk
    for genes in (None, torch.tensor([5, 2])):
        for a, b in zip(sample(sampled, torch.tensor([3, 11]), 20, seeded(), genes),
                        sample(other, torch.tensor([3, 11]), 20, seeded(), genes)):
            assert torch.equal(a, b)


def test_populations_are_the_real_cells(sampled):
    test = sampled.populations("test", sampled.eval_genes[:5])
    assert list(test) == sampled.part("test") and len(test) == len(sampled.part("test"))
    for group in test:
        condition, covariate = group.split("@")
        mine = (sampled.source.condition == condition) & (sampled.source.covariate == covariate)
        assert np.array_equal(test[group], sampled.X.toarray()[mine][:, sampled.eval_genes[:5]])
    assert np.array_equal(sampled.cells(group)[:, sampled.eval_genes[:5]], test[group])


def test_genes_by_mean_in_training_controls(tmp_path):
    """The most expressed genes of controls, whatever they are elsewhere, and the perturbed; no split is needed."""
    X = make_counts(90)
    X[30:, 10] += 500
    path = write_file(tmp_path / "file.h5ad", X, ["ctrl"] * 30 + ["KLF1"] * 30 + ["CEBPA"] * 30)
    loaded = data.load(path, data.DataConfig(hvg=6, hvg_by="mean", min_cells=0))
    mean = log_cp10k(X)[:30].mean(axis=0)
    highest = {GENES[i] for i in np.argsort(-mean)[:6]}
    assert set(loaded.genes) == highest | {"KLF1", "CEBPA"} and GENES[10] not in highest
    with pytest.raises(data.DataError, match="--hvg-on all: the mean of --hvg-by mean is of training controls"):
        data.load(path, data.DataConfig(hvg=6, hvg_by="mean", hvg_on="all"))


# ------------------------------------------------------------------------------------------------ streaming

def fitted(loaded):
    """Every quantity that is fitted, and the values that a method trains on."""
    total, square = data.gene_moments(loaded.X, loaded.fit_rows)
    fit = loaded.X[loaded.fit_rows]
    return {"split": loaded.split, "rows": loaded.fit_rows.tolist(), "genes": loaded.genes,
            "eval": loaded.eval_genes.tolist(), "pert_gene": loaded.pert_gene.tolist(),
            "hvg": highly_variable(loaded.X, loaded.fit_rows, 10).tolist(),
            "mean": (total / len(loaded.fit_rows)).tobytes(), "square": square.tobytes(),
            "values": fit.data.tobytes(), "indices": fit.indices.tobytes()}


def copy_as(path, out, write):
    """The same file with its matrix stored in another way."""
    X = data.read_cells(path).X.toarray()
    with h5py.File(path) as source, h5py.File(out, "w") as target:
        for name in set(source) - {"X"}:
            source.copy(name, target)
        write(target, "X", X)
    return out


FLAGS_OF_SPLITS = {"transfer": dict(covariates="cell_type", hvg=40, min_cells=700, min_genes=25),
                   "additive": dict(hvg=30, hvg_on="all", control_split="0.5,0.25,0.25", eval_genes=20)}


def test_gene_statistics_are_those_of_training_and_control_cells(two_types, monkeypatch):
    """In one block and in many, of all rows and of evenly spaced ones; a silent gene correlates with none, nor does one
    that varies by a rounding."""
    loaded = data.load(two_types, data.DataConfig(covariates="cell_type"), "transfer")
    X = loaded.X.tolil()
    X[:, 4] = 0
    X[:, 6] = 3.3
    X[loaded.fit_rows[0], 6] = np.nextafter(np.float32(3.3), np.float32(4))
    loaded.source.X, n = X.tocsr(), len(loaded.fit_rows)
    for rows, options in ((np.arange(n), {}), (np.linspace(0, n - 1, 100), {"most": 100})):
        x = loaded.X[loaded.fit_rows[rows.astype(int)]].toarray().astype(np.float64)
        with np.errstate(invalid="ignore"):
            expected = np.nan_to_num(np.corrcoef(x.T))
        expected[6] = expected[:, 6] = 0
        for block in (data.BLOCK_NNZ, 5000):
            with monkeypatch.context() as m:
                m.setattr(data, "BLOCK_NNZ", block)
                mean, var, corr = data.gene_statistics(loaded, **options)
            assert np.allclose(mean, x.mean(0), atol=1e-6) and np.allclose(var, x.var(0), atol=1e-5)
            assert np.allclose(corr, expected, atol=1e-5) and corr[[4, 6]].abs().max() == 0


def test_training_effects_are_against_the_controls_of_their_own_covariate(two_types):
    loaded = data.load(two_types, data.DataConfig(covariates="cell_type"), "transfer")
    groups, effects, control = data.training_effects(loaded)
    profiles = {v: cells.mean(0) for v, cells in loaded.controls("train").items()}
    for group, effect in zip(groups, effects):
        own = profiles[data.split_group(group)[1]]
        np.testing.assert_allclose(effect, loaded.cells(group).mean(0) - own, atol=1e-5)
    np.testing.assert_allclose(control, np.mean(list(profiles.values()), axis=0), atol=1e-5)
    assert groups == loaded.part("train") and len(profiles) == 2


@pytest.mark.parametrize("form, split", [("csr-chunks", "transfer"), ("csr-gzip", "additive"),
                                         ("dense-gzip", "transfer"), ("csc", "additive"), ("prepared", "transfer")])
def test_streaming_equals_memory(two_types, tmp_path, monkeypatch, form, split):
    """Same genes, splits, fitted quantities, batches for the same seed, populations, prepared file: to the last bit."""
    config, path = data.DataConfig(**FLAGS_OF_SPLITS[split]), tmp_path / "file.h5"
    if form == "prepared":
        data.write_prepared(path, data.load(two_types, data.DataConfig(covariates="cell_type")))
        config.min_cells = 0
    else:
        copy_as(two_types, path, LAYOUTS[form])
    monkeypatch.setattr(data, "BLOCK_NNZ", 5000)                            # many blocks
    memory = data.load(path, config, split)
    config.backed = True
    disk = data.load(path, config, split)
    assert sp.issparse(memory.X) and isinstance(disk.X, data.StoredRows)
    assert memory.file_scale == disk.file_scale == ("lognorm" if form == "prepared" else "counts")
    assert fitted(disk) == fitted(memory) and disk.groups == memory.groups and len(disk.genes) < 70
    assert disk.X.shape == memory.X.shape and (disk.X[np.arange(disk.X.shape[0])] != memory.X).nnz == 0
    for part in data.PARTS:
        a, b = disk.populations(part, [3, 1]), memory.populations(part, [3, 1])
        assert list(a) == list(b) and all(np.array_equal(a[g], b[g]) for g in a)
        a, b = disk.controls(part), memory.controls(part)
        assert list(a) == list(b) and all(np.array_equal(a[v], b[v]) for v in a)
    assert all(torch.equal(a, b) for a, b in zip(data.gene_statistics(disk), data.gene_statistics(memory)))
    disk.prepare_sampling()
    memory.prepare_sampling()
    assert disk.dense is None
    generators, groups = (seeded(), seeded()), torch.tensor([4, 7, 4])
    for _ in range(3):
        (rows, a), (others, b) = (sample(x, groups, 6, g) for x, g in zip((disk, memory), generators))
        assert torch.equal(rows, others) and torch.equal(a, b)
    for out, loaded in (("disk.h5", disk), ("memory.h5", memory)):
        data.write_prepared(tmp_path / out, loaded)
    assert (tmp_path / "disk.h5").read_bytes() == (tmp_path / "memory.h5").read_bytes()


def test_a_panel_that_fits_moves_into_memory(two_types, tmp_path, monkeypatch):
    """Of a file that does not fit, whatever its layout; what does not fit, and what is --backed, stays on disk."""
    path = copy_as(two_types, tmp_path / "file.h5ad", sparse(compression="gzip"))
    monkeypatch.setattr(data, "BLOCK_NNZ", 5000)                            # many blocks
    most = 4 * data.read_cells(path).X.nnz / 2**30                          # half of the file, in GB

    def load(**flags):
        return data.load(path, data.DataConfig(covariates="cell_type", **flags), "additive")
    memory, moved = load(hvg=20), load(hvg=20, cache_gb=most)
    assert any(note.startswith("streamed") for note in moved.source.notes)
    assert sp.issparse(moved.X) and moved.X.has_canonical_format and fitted(moved) == fitted(memory)
    assert (moved.X != memory.X).nnz == 0 and moved.panel() == memory.panel()
    for stays in (load(cache_gb=most), load(hvg=20, cache_gb=most, backed=True)):
        assert isinstance(stays.X, data.StoredRows)


def test_streaming_takes_a_block_of_memory(tmp_path, monkeypatch):
    """Simulating, loading, sampling and preparing from disk stay far below the matrix; from memory they cannot."""
    monkeypatch.setattr(data, "BLOCK_NNZ", 30_000)
    path, gzip_path = tmp_path / "demo.h5", tmp_path / "gzip.h5"

    def peak(action, *args, **options):
        tracemalloc.start()
        try:
            action(*args, **options)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def use(path, **flags):
        loaded = data.load(path, data.DataConfig(hvg=80, cache_gb=0.02, **flags), "additive")
        loaded.prepare_sampling()
        sample(loaded, torch.arange(5), 10, seeded())
        data.write_prepared(tmp_path / "out.h5", loaded)
    simulated = peak(data.simulate, path, cells=3000, genes=900)
    copy_as(path, gzip_path, sparse(compression="gzip"))
    with h5py.File(path) as file:
        matrix = 8 * len(file["X/data"])
    assert matrix > 8e6 and peak(use, path) > matrix
    for action, *args in ((use, path), (use, gzip_path)):
        assert peak(action, *args, backed=True) < matrix / 3
    assert simulated < matrix / 2


def test_a_file_that_shrinks_while_it_is_used(two_types, tmp_path):
    path = tmp_path / "file.h5ad"
    path.write_bytes(two_types.read_bytes())
    loaded = data.load(path, data.DataConfig(backed=True))
    os.truncate(path, 10_000)
    with pytest.raises(data.DataError, match="file.h5ad: ended while it was read; was it written to.*Start again"):
        loaded.cells(loaded.groups[-1])


def test_no_room_for_the_copy(tmp_path, capsys):
    write_file(tmp_path / "file.h5ad", make_counts(600), LABELS * 10)
    done = run("file.h5ad", "--backed", cwd=tmp_path,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: file.h5ad: X: is streamed from an uncompressed copy, for which ")
    assert "TMPDIR" in done.stderr


# ------------------------------------------------------------------------------------------------ writing

@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_written_files_read_back(tmp_path, form):
    X = make_counts(60)
    obs = {"condition": LABELS, "cell_type": ["T", "B"] * 30, "n": np.arange(60), "ok": np.arange(60) > 3}
    uns = {"name": "x", "n": 3, "mean": np.arange(4.0), "genes": ["a", "b"], "none": [], "deep": {"value": 1.5}}
    path = tmp_path / "new" / "folder" / "file.h5ad"                        # folders are made
    data.write_h5ad(path, form(X), obs, GENES, uns, names=[f"n{i}" for i in range(60)])
    cells = data.read_cells(path, data.DataConfig(covariates="cell_type"))
    same_cells(cells, X)
    assert list(cells.covariate) == obs["cell_type"] and cells.names[3] == "n3"
    assert list(cells.obs("n")) == [str(i) for i in range(60)] and cells.obs("ok")[4] == "True"
    assert cells.uns["name"] == "x" and cells.uns["n"] == 3 and list(cells.uns["genes"]) == ["a", "b"]
    assert list(cells.uns["mean"]) == [0, 1, 2, 3]
    with h5py.File(path) as file:
        assert file["uns/deep/value"][()] == 1.5 and file.attrs["encoding-type"] == "anndata"
        assert list(file["obs"].attrs["column-order"]) == list(obs)
        for name in ("obs", "var", "uns", "layers", "obsm", "varm", "obsp", "varp", "X"):
            assert file[name].attrs["encoding-type"] and file[name].attrs["encoding-version"]
    blocks = (form(X)[i:i + 7] for i in range(0, 60, 7))                    # the same in pieces
    if form is sp.csr_matrix:
        data.write_h5ad(tmp_path / "blocks.h5ad", blocks, obs, GENES)
        same_cells(data.read_cells(tmp_path / "blocks.h5ad"), X)


def test_prepared_file(two_types, tmp_path):
    """Grouped by condition, log1p CP10k, a plain AnnData file that loads as the same data set."""
    path, config = tmp_path / "prepared.h5", data.DataConfig(covariates="cell_type")
    raw = data.load(two_types, config, "holdout")
    data.write_prepared(path, raw)
    with h5py.File(path) as file:
        assert file["X/data"].compression is None and file["X/data"].chunks
    again = data.load(path, config, "holdout")
    labels = again.source.condition
    assert again.file_scale == "lognorm" and sum(labels[1:] != labels[:-1]) == len(set(labels)) - 1
    assert again.split == raw.split and again.groups == raw.groups and again.genes == raw.genes
    assert np.array_equal(again.eval_genes, raw.eval_genes) and np.array_equal(again.pert_gene, raw.pert_gene)
    for group in raw.groups:
        assert np.array_equal(again.cells(group), raw.cells(group))
        assert list(again.source.names[again.rows[group]]) == list(raw.source.names[raw.rows[group]])


def test_populations_written_and_read_back(tmp_path):
    """Predicted and control cells with their covariates, one of which holds a comma and a plus."""
    rng, path = np.random.default_rng(0), tmp_path / "pred.h5ad"
    pred = {"KLF1@CD4+ T, naive": rng.random((4, 3)) * 3, "KLF1+MAP2K6@B": rng.random((2, 3)) * 3}
    control = {"CD4+ T, naive": rng.random((3, 3)) * 3, "B": rng.random((5, 3)) * 3}
    data.write_populations(run_of(panel_of(GENES), "cell_type "), path, pred, control, [0, 1, 2])
    cells = data.read_cells(path, data.DataConfig(covariates="cell_type", lognorm=True))
    names = [data.group_name(c, v) for c, v in zip(cells.condition, cells.covariate)]
    for name, values in [*pred.items(), *((f"control@{v}", x) for v, x in control.items())]:
        rows = [i for i, other in enumerate(names) if other == name]
        assert np.allclose(cells.X[rows].toarray(), values, rtol=1e-6)
    assert cells.uns["method"] == "scdfm"


def run_of(panel, covariates):
    """What of a Run writes predictions."""
    return types.SimpleNamespace(panel=panel, config=data.RunConfig(covariates=covariates), method="scdfm")


def panel_of(genes, mean=0.5):
    return data.Panel(genes, [0], [], [], [], [mean] * len(genes), [9.0] * len(genes))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("Can't write data"),
                                     KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, failure):
    path = tmp_path / "file.h5ad"
    path.write_text("old")
    with pytest.raises((data.DataError, KeyboardInterrupt)) as error:
        with data.atomic(path) as temporary:
            temporary.write_text("half")
            raise failure
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    assert isinstance(failure, KeyboardInterrupt) or "cannot be written" in str(error.value)


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file" / "x.h5ad", tmp_path, "."):              # below a file; directories
        with pytest.raises(data.DataError, match="cannot be written .*--out"):
            data.write_h5ad(path, make_counts(60), {"condition": LABELS}, GENES)
    os.mkfifo(tmp_path / "pipe")                                            # stands for /dev/null: not to be replaced
    with pytest.raises(data.DataError, match="folder or a device"):
        data.write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "pipe").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


# ------------------------------------------------------------------------------------------------ the demo

@pytest.fixture(scope="module")
def truth(demo):
    """{condition: delta of the noise-free mean to control}, {condition: kind}."""
    uns = data.read_cells(demo).uns
    names, means = list(uns["truth_conditions"]), uns["truth_means"]
    return {c: m - means[0] for c, m in zip(names, means)}, dict(zip(names, uns["truth_interactions"]))


def test_demo_size_and_determinism(demo, tmp_path):
    facts = data.describe(data.load(demo, split="additive"), "additive")
    assert facts["cells"] == 400 + 100 * 40 and facts["genes"] == 120 and facts["controls"] == 400
    assert (facts["conditions"], facts["singles"], facts["doubles"], facts["more"]) == (40, 16, 24, 0)
    assert facts["cells_per_condition"] == {"min": 100, "median": 100, "max": 100} and facts["scale"] == "counts"
    assert facts["split"]["test"]["conditions"] == 7
    for seed, equal in ((0, True), (1, False)):
        data.simulate(tmp_path / "again.h5ad", seed=seed)
        assert np.array_equal(data.read_cells(tmp_path / "again.h5ad").X.data, data.read_cells(demo).X.data) == equal
    data.simulate(tmp_path / "big.h5ad", cells=3000, genes=1000, cell_types=3)
    cells = data.read_cells(tmp_path / "big.h5ad", data.DataConfig(covariates="cell_type"))
    assert cells.X.shape == (3000, 1000) and len(set(cells.condition)) == 231       # more categories than a byte holds
    assert len(set(zip(cells.condition, cells.covariate))) == 231 * 3       # every condition in every type


def test_demo_truth_of_the_interactions(truth):
    """The delta of a double is the sum of its singles' deltas where it should be, and more or less elsewhere."""
    delta, kind = truth
    slopes = {}
    for name, k in kind.items():
        if k not in ("none", "single"):
            a, b = name.split("+")
            rest = [i for i in range(120) if f"TF{i + 1}" not in (a, b)]    # without the perturbed genes themselves
            x, y = (delta[a] + delta[b])[rest], delta[name][rest]
            slopes.setdefault(k, []).append((x @ y) / (x @ x))
    assert set(slopes) == set(data.INTERACTIONS) and min(map(len, slopes.values())) >= 2
    mean = {k: np.mean(v) for k, v in slopes.items()}
    assert 0.9 < mean["additive"] < 1.1 and mean["synergistic"] > 1.3
    assert mean["suppressing"] < 0.6 and mean["epistatic"] < 0.8


def test_demo_unseen_singles_follow_from_control_coexpression(demo, truth):
    """Slope of each gene on a regulator, in control cells, foretells what activating the regulator does."""
    loaded, delta = data.load(demo), truth[0]
    control = loaded.cells("control").astype(np.float64)
    centred = control - control.mean(0)
    names = [f"TF{i}" for i in range(1, 17)]
    guess = {n: centred.T @ centred[:, i] for i, n in enumerate(names)}

    def score(a, b):
        rest = [i for i in range(120) if i not in (names.index(a), names.index(b))]
        return np.corrcoef(guess[a][rest], delta[b][rest])[0, 1]
    own = np.array([score(n, n) for n in names])
    other = np.array([np.mean([score(m, n) for m in names if m != n]) for n in names])
    assert own.mean() > 0.3 and own.mean() > other.mean() + 0.2 and (own > other).mean() > 0.8


@pytest.mark.parametrize("flags, message", [
    ({"genes": 39}, "--genes 39"), ({"cell_types": 0}, "--cell-types 0"),
    ({"cells": -5}, "--cells -5"), ({"seed": -1}, "--seed -1")])
def test_demo_sizes_that_cannot_be(tmp_path, flags, message):
    with pytest.raises(data.DataError, match=message):
        data.simulate(tmp_path / "demo.h5ad", **flags)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ the command line

def refused(capsys, folder, *argv):
    """Runs data.py's main on bad input: exit code 2, one line on stderr, nothing written. Returns the message."""
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(SystemExit) as end:
        data.main([*map(str, argv), "--out", str(folder / "out.h5ad")])
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    return output.err


def hdf5(**content):
    """A writer of an HDF5 file with these datasets ('a__b' for a/b)."""
    def write(path):
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file[key.replace("__", "/")] = value
    return write


def labelled(labels, change=None, key="condition", **options):
    """A writer of an AnnData file with these labels and changed values."""
    def write(path):
        X = make_counts(len(labels))
        write_file(path, X if change is None else change(X), labels, key=key, **options)
    return write


def edit(change, write=sparse()):
    """A writer of a file that is valid but for what change(file) does."""
    def writer(path):
        write_file(path, make_counts(60), lambda g, k: categorical(g, k, LABELS), write=write)
        with h5py.File(path, "a") as file:
            change(file)
    return writer


def changed(name, change):
    """The same with an array replaced by change(array)."""
    def replace(file):
        values = change(file[name][...])
        del file[name]
        file[name] = values
    return edit(replace)


def truncated(path):
    labelled(LABELS)(path)
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


OLD = np.zeros(3, dtype=[("index", "S5"), ("condition", "i1")])


DISAGREE = ["disagree", "file.h5ad: X", "damaged"]


def put(values, i, value):
    values[i] = value
    return values


def garble(file):
    """A compressed chunk that does not decompress."""
    file["X"].id.write_direct_chunk((0, 0), b"garbage" * 10)


FILES = {       # name: (writer, what the message must say: what, where, what to do)
    "missing": (lambda p: None, ["file.h5ad: no such file", "give an .h5ad"]),
    "directory": (lambda p: p.mkdir(), ["file.h5ad: is a directory", "give an .h5ad file", "zarr"]),
    "empty": (lambda p: p.write_bytes(b""), ["file.h5ad: is empty", "download it again"]),
    "truncated": (truncated, ["file.h5ad", "damaged", "download it"]),
    "garbled": (edit(garble, dense(compression="gzip")), ["file.h5ad: cannot be read", "damaged", "download it"]),
    "html": (lambda p: p.write_text("\n <!DOCTYPE html><html>"), ["file.h5ad: is a web page"]),
    "html-bom": (lambda p: p.write_bytes(b"\xef\xbb\xbf<head>"), ["is a web page"]),
    "text": (lambda p: p.write_text("a,b\n1,2\n"), ["file.h5ad: is not an HDF5 file", "AnnData"]),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), ["is an archive", "unpack it"]),
    "tar": (lambda p: p.write_bytes(bytes(257) + b"ustar"), ["is an archive", "unpack it"]),
    "10x": (hdf5(matrix__barcodes=[b"A"], matrix__indptr=[0]), ["is a 10x Cell Ranger", "guide calls", ".h5ad"]),
    "loom": (hdf5(matrix=np.zeros((2, 2)), row_attrs__Gene=[1], col_attrs__Cell=[1]), ["is a loom file; convert it"]),
    "mudata": (hdf5(mod__rna__X=1, obs__x=1, var__x=1), ["is a MuData file; save one modality"]),
    "other-hdf5": (hdf5(weights=np.zeros(3)), ["is HDF5 but not AnnData (it holds weights)", "obs, var and X"]),
    "no-content": (hdf5(), ["not AnnData (it holds none)"]),
    "anndata-0.6": (hdf5(X=np.zeros((3, 3)), obs=OLD, var=OLD), ["written by anndata before 0.7", "newer anndata"]),
    "csr-index-too-high": (changed("X/indices", lambda v: put(v, 5, 99)), DISAGREE),
    "csr-index-negative": (changed("X/indices", lambda v: put(v, 5, -1)), DISAGREE),
    "csr-pointers-fall": (changed("X/indptr", lambda v: put(v, 5, 0).astype("uint64")), DISAGREE),
    "csr-pointers-short": (changed("X/indptr", lambda v: v[:-1]), DISAGREE),
    "csr-pointers-start": (changed("X/indptr", lambda v: put(v, 0, 1)), DISAGREE),
    "csr-values-short": (changed("X/data", lambda v: v[:-1]), DISAGREE),
    "csr-shape": (edit(lambda f: f["X"].attrs.update(shape=[10, 10])), DISAGREE),
    "dense-shape": (labelled(LABELS, lambda X: X[:, :9], index=GENES), ["has shape (60, 9)", "(60, 30)"]),
    "other-layout": (edit(lambda f: f["X"].attrs.update({"encoding-type": "coo_matrix"})), ["is stored as coo", ": X"]),
    "zero-cells": (labelled([]), ["holds 0 cells and 30 genes; check how it was written"]),
    "zero-genes": (labelled(LABELS, lambda X: X[:, :0]), ["holds 60 cells and 0 genes"]),
    "no-controls": (labelled(["KLF1", "CEBPA"] * 9),
                    ["no control cells", "condition (CEBPA, KLF1)", "--pert-key", "--control-label"]),
    "only-controls": (labelled(["ctrl"] * 9), ["column condition has only control cells", "--pert-key"]),
    "no-labels": (labelled(["a", "b"] * 9, key="batch"), ["no perturbation column", "batch (a, b)", "--pert-key"]),
    "labels-all-missing": (labelled([""] * 9), ["no control cells", "--pert-key"]),
    "columns-disagree": (labelled(["control", "KLF1"] * 10, obs={"drug": ["DMSO", "A", "B", "C"] * 5}),
                         ["condition (KLF1, control)", "drug (A, B, C, DMSO)", "disagree", "--pert-key"]),
    "ambiguous-gene": (labelled(LABELS, genes=["KLF1"] + GENES[:-1]), ["KLF1 names several rows", "--gene-key"]),
    "negative": (labelled(LABELS, lambda X: X - 1), ["file.h5ad: X: holds negative values", "--layer"]),
    "nan": (labelled(LABELS, lambda X: put(X, (3, 4), np.nan)), ["file.h5ad: X: holds NaN or infinite", "--layer"]),
    "inf": (labelled(LABELS, lambda X: put(X, (3, 4), np.inf)), ["holds NaN or infinite"])}


@pytest.mark.parametrize("flags", [[], ["--backed"]], ids=["memory", "disk"])
@pytest.mark.parametrize("name", FILES)
def test_bad_files(tmp_path, capsys, name, flags):
    write, message = FILES[name]
    write(tmp_path / "file.h5ad")
    error = refused(capsys, tmp_path, tmp_path / "file.h5ad", *flags)
    for part in message:
        assert part in error


FLAGS = [("--pert-key nothing", ["obs has no column 'nothing' (--pert-key); it has condition"]),
         ("--pert-key condition,nothing", ["no column 'nothing' (--pert-key)"]),
         ("--control-label mock", ["none of KLF1, KLF1+MAP2K6, MAP2K6, control is mock", "--control-label"]),
         ("--layer counts", ["has no layer 'counts'", "--layer", "it has none"]),
         ("--layer raw", ["has no layer 'raw'"]),
         ("--covariates condition,type", ["no column 'type' (--covariates); it has condition"]),
         ("--dose-key dose", ["no column 'dose' (--dose-key)"]),
         ("--gene-key symbol", ["var has no column 'symbol' (--gene-key); it has none"]),
         ("--counts --lognorm", ["contradict each other; give one"]),
         ("--min-genes 99", ["no perturbed cells", "lower --min-genes"]),
         ("--min-cells -1", ["--min-cells -1: must be a number, and at least 0"]),
         ("--cache-gb nan", ["--cache-gb nan: must be a number"]),
         ("--hvg 5", ["--hvg chooses genes on the training cells of a split: add --split NAME"]),
         ("--control-split 0.5,0.5", ["--control-split 0.5,0.5: give the shares of train,val,test"]),
         ("--control-split nan,0.5,0.5", ["give the shares"]), ("--control-split 0.7,0,0.3", ["give the shares"]),
         ("--control-split 0.98,0.01,0.01", ["20 control cells", "leave none for val"]),
         ("--split transfer", ["two covariates (none); name them with --covariates"]),
         ("--split nothing", ["--split nothing: unknown"]),
         ("--split cv --folds 3", ["3 or more are needed, a condition each, of 1"]),
         ("--cells 100", ["--cells: belongs to 'python data.py demo'"]),
         ("--nothing", ["unrecognized arguments: --nothing", "--help"]),
         ("--hvg many", ["invalid int value", "--help"]),
         ("--pert condition", ["unrecognized arguments: --pert"])]         # no guessing of abbreviations


@pytest.mark.parametrize("flags, message", FLAGS, ids=[f for f, _ in FLAGS])
def test_bad_flags(tmp_path, capsys, flags, message):
    write_file(tmp_path / "file.h5ad", make_counts(60), LABELS)
    error = refused(capsys, tmp_path, tmp_path / "file.h5ad", *flags.split())
    for part in message:
        assert part in error


def test_doubtful_counts_are_noted(tmp_path):
    """Logarithms that are declared counts, and cells without a count."""
    counts = make_counts(60)
    counts[5] = 0
    X = np.log1p(counts)
    cells = data.read_cells(write_file(tmp_path / "log.h5ad", X, LABELS), data.DataConfig(counts=True))
    assert any("are no integers, as if they were logarithms" in note for note in cells.notes)
    cells = data.read_cells(write_file(tmp_path / "counts.h5ad", counts, LABELS), data.DataConfig(counts=True))
    data.lognormalise(cells)
    assert any(note.startswith("cells without a count in these genes: 1 ") for note in cells.notes)
    assert not any("logarithms" in note for note in cells.notes)


def test_the_demo_takes_no_flag_of_a_file(tmp_path, capsys):
    assert "--covariates: belongs to 'python data.py FILE'" in refused(capsys, tmp_path, "demo", "--covariates", "x")


def test_the_input_is_not_overwritten(tmp_path, capsys):
    path = write_file(tmp_path / "out.h5ad", make_counts(60), LABELS)
    assert "is the input itself" in refused(capsys, tmp_path, path)


def test_command_line_in_text(tmp_path, capsys):
    path = write_file(tmp_path / "file.h5ad", make_counts(64), LABELS + [""] * 4)
    data.main([str(path), "--split", "unseen", "--min-cells", "0"])
    lines = capsys.readouterr().out.splitlines()
    for key, value in (("file", path), ("cells", 60), ("genes", 30), ("scale", "counts"), ("conditions", 3),
                       ("singles", 2), ("doubles", 1), ("controls", 20), ("control labels", "control"),
                       ("cells per condition", "min 10, median 15, max 15"), ("covariates", "none"),
                       ("perturbed genes in panel", 2), ("train", "conditions 1, cells 15"),
                       ("val", "conditions 0, cells 0"), ("test", "conditions 2, cells 25")):
        assert f"{key:<25} {value}" in lines
    assert "note: dropped 4 cells without a label" in lines


def run(*argv, **options):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, argv)], capture_output=True, text=True,
                          timeout=120, **options)


def test_command_line_as_a_user_runs_it(tmp_path):
    made = run("demo", "--out", "small.h5ad", "--cells", 900, "--genes", 60, "--cell-types", 2, "--seed", 3,
               cwd=tmp_path)
    assert made.returncode == 0 and made.stdout == "wrote small.h5ad\n" and made.stderr == ""
    done = run("small.h5ad", "--json", "--split", "transfer", "--covariates", "cell_type", "--out", "prepared.h5",
               "--min-genes", 20, cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert done.returncode == 0 and "wrote prepared.h5: log1p CP10k" in done.stderr
    assert (facts["cells"], facts["genes"]) == (900, 60)                    # of the file, before quality control
    assert (facts["conditions"], facts["singles"], facts["doubles"]) == (40, 16, 24)
    assert facts["covariates"] == {"cell_type": 2} and facts["controls"] <= 81
    assert facts["control_labels"] == ["control"] and facts["scale"] == "counts"
    assert set(facts["split"]) == set(data.PARTS) and facts["split"]["test"]["cells"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prepared.h5", "small.h5ad"]
    again = data.describe(data.load(tmp_path / "prepared.h5"))
    assert again["conditions"] == 40 and again["scale"] == "lognorm"


def test_a_full_disk(tmp_path):
    """No file may grow beyond 50 kB: the demo does not fit, the old file stays, nothing else is left behind."""
    (tmp_path / "demo.h5ad").write_text("old")
    done = run("demo", "--out", "demo.h5ad", cwd=tmp_path,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)))
    assert done.returncode == 2 and done.stderr.startswith("error: demo.h5ad: cannot be written (")
    assert "Traceback" not in done.stderr and "--out" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["demo.h5ad"] and (tmp_path / "demo.h5ad").read_text() == "old"


def test_only_the_declared_packages_are_imported():
    tree = ast.parse((ROOT / "data.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    third = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert third == {"h5py", "numpy", "scipy", "torch"}                     # no anndata, scanpy or pandas


def test_flags_come_from_the_fields():
    parser = data.Parser(prog="x.py")
    data.add_flags(parser, data.DataConfig)
    assert vars(parser.parse_args([])) == {}                                # only what the user gave
    given = vars(parser.parse_args("--hvg 5 --no-counts --lognorm --hvg-on all --cache-gb 0.5 --pert-key a".split()))
    assert given == {"hvg": 5, "counts": False, "lognorm": True, "hvg_on": "all", "cache_gb": 0.5, "pert_key": "a"}
    text_ = parser.format_help()
    for field in data.fields(data.DataConfig):
        assert "--" + field.name.replace("_", "-") in text_
    assert "genes to keep by --hvg-by" in text_                              # help is the comment beside the field


# ------------------------------------------------------------------------------------------------ training

def test_learning_rate_warms_up_and_ends_low():
    weight = torch.zeros(1, requires_grad=True)
    for warmup, least in ((10, 0.02), (0, 0.0)):
        schedule = data.schedule(torch.optim.SGD([weight], 2.0), 100, warmup, least)
        rates = []
        for _ in range(101):
            rates.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        assert rates[0] == pytest.approx(2 / (warmup + 1)) and rates[warmup] == pytest.approx(2)
        assert rates[100] == pytest.approx(least) and rates[(100 + warmup) // 2] == pytest.approx((2 + least) / 2)
        assert np.all(np.diff(rates[:warmup + 1]) > 0) and np.all(np.diff(rates[warmup:]) < 0)


def test_rows_are_picked_once_each_while_there_are_enough():
    rows = np.arange(50)
    assert sorted(data.pick_rows(rows, 50, 0)) == list(rows) and len(set(data.pick_rows(rows, 30, 0))) == 30
    assert not np.array_equal(data.pick_rows(rows, 50, 0), data.pick_rows(rows, 50, 1))
    assert set(np.bincount(data.pick_rows(rows, 120, 0))) == {2, 3}


def test_medians_are_of_the_detected_values_of_a_gene():
    X = np.array([[0, 2, 0, 1], [0, 0, 5, 2], [0, 0, 0, 9], [0, 0, 7, 3]], np.float32)
    assert data.detected_medians(sp.csr_matrix(X), np.arange(4)) == [0, 2, 6, 2.5]
    assert data.detected_medians(sp.csr_matrix(X), np.array([0, 1])) == [0, 2, 5, 1.5]


def test_averaged_weights():
    model, ema = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = ema.weight.detach().clone()
    data.average(ema, model, 0.0)
    assert torch.equal(ema.weight, before)
    data.average(ema, model, 0.75)
    torch.testing.assert_close(ema.weight, 0.75 * before + 0.25 * model.weight)
