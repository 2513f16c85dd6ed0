"""data.py on the files that people have: each kind of oddity, several members of each, with the right value stated."""
import json
import os
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
import torch

import data
from test_data import (GENES, LABELS, TEXT, ascii_bytes, categorical, column_file, conditions, edit, fixed_bytes,
                       log_cp10k, make_counts, nullable, old_categorical, panel_of, refused, run_of, sample, sparse,
                       text, write_file, write_frame)


def read(path, **flags):
    return data.read_cells(path, data.DataConfig(**flags))


def noted(cells, *parts):
    """The one note that holds all of these."""
    found = [note for note in cells.notes if all(part in note for part in parts)]
    assert len(found) == 1, cells.notes
    return found[0]


# ------------------------------------------------------------------------------------------------ controls

@pytest.mark.parametrize("label", [
    "NT_1", "NT-02", "sgNT_3", "non-targeting_00001", "Non-Targeting sgRNA 4", "non_targeting_guide2", "control_rep1",
    "ctrl.replicate2", "NegCtrl0", "neg_ctrl_7", "DMSO_24hr", "DMSO_24 h_rep2", "DMSO_0.1%", "control_day3",
    "INTERGENIC1216445", "safe-targeting_12", "NTC-1", "Vehicle 6h", "PBS_d7", "NT_sg1",
    "non-targeting_non-targeting_3"])
def test_numbered_controls_are_controls(tmp_path, label):
    labels = [label] * 3 + ["KLF1", "KLF1_1", "CEBPA"]
    wanted = ["control"] * 3 + ["KLF1", "KLF1_1", "CEBPA"]
    for others in ([], ["control"]):            # alone and beside an ordinary one
        cells = read(column_file(tmp_path / "file.h5ad", {"condition": labels + others}))
        assert list(cells.condition) == wanted + others
        assert "--control-label" in noted(cells, "taken for controls")


@pytest.mark.parametrize("label", ["NTRK1_1", "NT5M", "NT5E", "PBX1", "controlled_1", "KLF1_24hr", "CTRL9X"])
def test_other_names_stay_perturbations(tmp_path, label):
    assert conditions(column_file(tmp_path / "file.h5ad", {"condition": ["control", label]})) == ["control", label]


def test_control_labels_with_wildcards_undo_the_guess(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["NT", "NT_1", "mock 2", "mock 3", "KLF1"]})
    assert conditions(path, control_label="NT") == ["control", "NT_1", "mock 2", "mock 3", "KLF1"]
    assert conditions(path, control_label="NT*, mock*") == ["control"] * 4 + ["KLF1"]
    assert conditions(path, control_label="mock 2,NT_1") == ["NT", "control", "control", "mock 3", "KLF1"]


@pytest.mark.parametrize("column, values, marker", [
    ("is_control", np.array([True, True, False, False]), "is_control=True"),
    ("control", np.array([1, 1, 0, 0]), "control=1"), ("nperts", np.array([0, 0, 1, 2]), "nperts=0"),
    ("vehicle", ["TRUE", "TRUE", "FALSE", "FALSE"], "vehicle=True")])
def test_a_column_marks_the_controls(tmp_path, column, values, marker):
    """Where no label is one; with --control-label COLUMN=VALUE in any case. Cells without a label can be controls."""
    labels = {"condition": ["unchanged", "", "KLF1", "MAP2K6+KLF1"]}
    wanted = ["control", "control", "KLF1", "KLF1+MAP2K6"]
    path = column_file(tmp_path / "file.h5ad", {**labels, column: values})
    cells = read(path)
    assert list(cells.condition) == wanted
    noted(cells, f"2 cells with {marker} for controls", "--control-label")
    column_file(path, {"condition": ["DMSO", "", "KLF1", "MAP2K6+KLF1"], column: values})
    assert conditions(path) == ["control", "KLF1", "KLF1+MAP2K6"]           # a label is one: the column is not asked
    assert conditions(path, control_label=marker) == wanted
    with pytest.raises(data.DataError, match="--control-label .*=maybe: 0 of 4 cells are controls then; .* holds"):
        read(path, control_label=f"{column}=maybe")


def test_columns_disagree_where_another_marks_the_controls(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["x", "KLF1"], "drug": ["x", "JQ1"],
                                                "is_control": np.array([True, False])})
    with pytest.raises(data.DataError, match="condition .KLF1, control. and drug .JQ1, control. disagree"):
        read(path)


def test_a_control_label_that_is_a_gene_too(tmp_path):
    """CTRL is a gene; it is the control only where nothing else is."""
    genes = GENES[:-1] + ["CTRL"]
    path = column_file(tmp_path / "file.h5ad", {"condition": ["CTRL", "STIM", "STIM"]}, genes=genes)
    noted(read(path), "taken for controls", "--control-label")
    assert conditions(path) == ["control", "STIM", "STIM"]
    column_file(path, {"condition": ["CTRL", "NT", "KLF1"]}, genes=genes)
    assert conditions(path) == ["CTRL", "control", "KLF1"]


@pytest.mark.parametrize("label", [
    "Non-Targeting Control", "Safe-Targeting Control", "ctrl_guide", "DMSO control", "no-guide", "No sgRNA",
    "NO-TARGET", "NonTargetingControlGuideForHuman_0001", "10753_non-targeting_non-targeting_non-targeting",
    "non-targeting_00025|non-targeting_00734", "NT-1|NT-2", "NT_1-NT_2", "neg_ctrl_1/neg_ctrl_2"])
def test_controls_with_more_words_and_pairs_of_them(tmp_path, label):
    for others in ([], ["control"]):
        labels = [label, "KLF1", "MAP2K6", *others]
        path = column_file(tmp_path / "file.h5ad", {"condition": labels})
        assert conditions(path) == ["control", "KLF1", "MAP2K6", *others]


@pytest.mark.parametrize("label, more, wanted", [
    ("DMSO_TF", [], "control"), ("DMSO_plate B", [], "control"), ("DMSO_TF", ["TF"], "TF"),
    ("DMSO_TF", ["DMSO_KLF1", "DMSO_CEBPA"], "TF"), ("DMSO_TF", ["TF_drugX"], "TF"), ("DMSO+TF", [], "TF"),
    ("DMSO_KLF1-1", [], "KLF1-1")])
def test_a_remark_on_a_control_is_no_perturbation(tmp_path, label, more, wanted):
    """Unless it stands alone or with others, or the file's labels put perturbations beside controls."""
    cells = read(column_file(tmp_path / "file.h5ad", {"condition": ["DMSO", "drugX", "drug Y", label, *more]}))
    assert cells.condition[3] == wanted and list(cells.condition[:3]) == ["control", "drugX", "drug Y"]
    if wanted == "control":
        noted(cells, "taken for controls", label)
        assert conditions(cells.path, control_label="DMSO")[3] == label


def test_a_remark_may_be_the_name_of_a_gene(tmp_path):
    """TF is one; where other labels name genes too, it is perturbed."""
    genes = GENES[:-1] + ["TF"]
    path = column_file(tmp_path / "file.h5ad", {"condition": ["DMSO", "drugX", "DMSO_TF"]}, genes=genes)
    assert conditions(path) == ["control", "drugX", "control"]
    column_file(path, {"condition": ["DMSO", "KLF1", "DMSO_TF"]}, genes=genes)
    assert conditions(path) == ["control", "KLF1", "TF"]


def test_where_all_labels_stand_beside_a_control_they_are_perturbations(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["DMSO", "drugX_DMSO", "DMSO_drugY"]})
    assert conditions(path) == ["control", "drugX", "drugY"]


@pytest.mark.parametrize("labels, controls", [
    (["DMSO", "NT157", "JQ1"], 1), (["PBS", "NT-3", "NT-4", "IL-4"], 1),    # a drug, proteins
    (["NT-1", "NT-2", "KLF1"], 2), (["control", "NT1", "NT2", "NT3", "KLF1"], 4), (["NT", "NT-1", "KLF1"], 2)])
def test_two_letters_and_a_number_are_a_control_only_without_another_or_with_many(tmp_path, labels, controls):
    cells = read(column_file(tmp_path / "file.h5ad", {"drug": labels}))
    assert list(cells.condition) == ["control"] * controls + labels[controls:]
    if controls == 1:
        noted(cells, labels[1], "not taken for numbered controls", "--control-label")


@pytest.mark.parametrize("label", ["unassigned", "Negative", "Doublet", "multiplet", "ambiguous", "not assigned",
                                   "none", "N/A", "null", "unknown", "Multiple guides"])
def test_what_a_guide_call_says_of_a_cell_without_one_is_no_label(tmp_path, label):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["control", label, "KLF1"]})
    cells = read(path)
    assert list(cells.condition) == ["control", "KLF1"]
    noted(cells, "cells without a label", label, "--control-label")
    assert conditions(path, control_label=label) == ["control", "control", "KLF1"]  # 'control' always is one


@pytest.mark.parametrize("label", ["Negative", "none"])
def test_a_gene_is_no_status(tmp_path, label):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["control", label]}, genes=GENES[:-1] + [label])
    assert conditions(path) == ["control", label]


# ------------------------------------------------------------------------------------------------ which columns

@pytest.mark.parametrize("key", ["gene_target", "cytokine", "Gene Target", "target.gene", "Perturbation"])
def test_usual_columns_in_any_spelling(tmp_path, key):
    assert conditions(column_file(tmp_path / "file.h5ad", {key: ["control", "KLF1"]})) == ["control", "KLF1"]


@pytest.mark.parametrize("key", ["Symbol", "GeneSymbol", "gene_names"])
def test_gene_names_in_columns_of_any_spelling(tmp_path, key):
    ensembl = [f"ENSG{i}" for i in range(len(GENES))]
    path = column_file(tmp_path / "file.h5ad", {"gene": ["control", "KLF1"]}, index=ensembl, var={key: GENES})
    assert read(path).genes == GENES


def test_a_column_that_may_hold_the_labels_is_suggested(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"stim": ["CTRL", "STIM"], "batch": ["1", "2"]})
    with pytest.raises(data.DataError, match="no perturbation column .*perhaps --pert-key stim, which holds CTRL"):
        read(path)


def test_a_column_of_genes_is_not_passed_over_for_a_clinical_one(tmp_path):
    """For want of a usual control; a column without genes is, and one that names genes itself wins."""
    columns = {"condition": ["ctrl", "AD", "AD"], "perturbation": ["wild type", "KLF1", "CEBPA"]}
    path = column_file(tmp_path / "file.h5ad", columns)
    with pytest.raises(data.DataError, match=r"condition .AD, ctrl. names no gene, and column perturbation has no "
                                             r"control cells.*\(only wild type are no gene\).*--pert-key"):
        read(path)
    assert conditions(path, pert_key="condition") == ["control", "AD", "AD"]
    column_file(path, {**columns, "condition": ["CTRL", "AD", "AD"]}, genes=GENES[:-1] + ["CTRL"])
    with pytest.raises(data.DataError, match="names no gene"):              # but for that of the control
        read(path)
    column_file(path, {**columns, "perturbation": ["x", "y", "z"]})
    assert conditions(path) == ["control", "AD", "AD"]
    column_file(path, {**columns, "condition": ["ctrl", "KLF1", "CEBPA"]})
    assert conditions(path) == ["control", "KLF1", "CEBPA"]


def test_each_of_two_drugs_has_its_dose(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {
        "drug1": ["DMSO", "A", "A", "B"], "drug2": ["DMSO", "DMSO", "B", "A"],
        "dose1": ["0", "1", "1", "10"], "dose2": ["0", "0", "10", "1"], "dose3": ["0"] * 4})
    own = conditions(path, pert_key="drug1,drug2", dose_key="dose1,dose2")
    assert own == ["control", "A:1", "A:1+B:10", "A:1+B:10"]
    cells = read(path, pert_key="drug1,drug2", dose_key="dose1,dose1")
    assert list(cells.condition[1:]) == ["A:1", "A:1+B:1", "A:10+B:10"]
    for key in ("dose1", "dose1,dose2,dose3"):
        with pytest.raises(data.DataError, match=f"--dose-key {key}: give one column for each of --pert-key A,B"):
            read(path, pert_key="drug1,drug2", dose_key=key)


# ------------------------------------------------------------------------------------------------ one or several

ONE = ["1S,3R-RSL-3", "N,N-Dimethyltryptamine", "(+)-JQ1", "JQ1_1e+05 nM", "Trifluridine; Tipiracil", "STAT1_1",
       "CD4+ T", "Vitamin B12, hydroxo", "Na+/K+-ATPase inhibitor", "KLF1_P1P2", "KLF1_+_53715438.23-P1P2", "A|B-13",
       "KLF1_2"]


@pytest.mark.parametrize("label", ONE)
def test_a_separator_within_a_name(tmp_path, label):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["DMSO", label, "KLF1", "CEBPA"]})
    cells = read(path)
    name = data.perturbation_name(label)
    assert list(cells.condition) == ["control", name, "KLF1", "CEBPA"]
    assert "+" not in name and "@" not in name and not any("several" in note for note in cells.notes)
    combined = f"{label}+KLF1" if "(" in label else f"KLF1|{label}"         # in a combination it is still one
    column_file(path, {"condition": ["DMSO", label, combined, f"{label}_DMSO"]})
    assert conditions(path) == ["control", name, "+".join(sorted(("KLF1", name))), name]


@pytest.mark.parametrize("label, wanted", [
    ("MAP2K6_KLF1", "KLF1+MAP2K6"), ("MAP2K6|KLF1", "KLF1+MAP2K6"), ("KLF1; drugX", "KLF1+drugX"),
    ("drugX,drug Y", "drug Y+drugX"), ("drugX_DMSO", "drugX"), ("NT_1_drugX", "drugX"),
    ("KLF1_drugX_CEBPA", "CEBPA+KLF1+drugX"),
    ("newA+newB", "newA+newB"), ("newA + KLF1", "KLF1+newA"), ("drugX_new", "drugX_new"), ("KLF1_", "KLF1")])
def test_evidence_splits_a_label(tmp_path, label, wanted):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["DMSO", "drugX", "drug Y", label]})
    cells = read(path)
    assert list(cells.condition) == ["control", "drugX", "drug Y", wanted]
    if "+" in wanted:
        noted(cells, "1 label read as several perturbations", label, "--separator none")


@pytest.mark.parametrize("label", ["NT_" + "0" * 60 + "x", "1+" * 60 + "1", "NT" + "1d" * 60 + "x", "A_" * 60 + "?",
                                   "NT_1." * 60 + "x", "_" * 300 + "x" + " " * 300 + "y"])
def test_no_label_takes_long(label):
    began = time.process_time()
    assert data.LabelRules([label, "A"], {"A"}).tokens(label)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("label, wanted", [
    ("KLF1-1|CEBPA-2", "CEBPA-2+KLF1-1"), ("sgKLF1_1;sgCEBPA_2", "sgCEBPA_2+sgKLF1_1"),
    ("KLF1g1_CEBPAg2", "CEBPAg2+KLF1g1"),
    ("KLF1_+_5.23-P1P2|CEBPA_-_7.2-P1", "CEBPA_-_7.2-P1+KLF1_plus_5.23-P1P2"), ("HLA-A-1|NT-2", "HLA-A-1")])
def test_guides_of_genes_need_not_stand_alone(tmp_path, label, wanted):
    cells = read(column_file(tmp_path / "file.h5ad", {"condition": ["NT-1", "KLF1-3", label]}))
    assert list(cells.condition) == ["control", "KLF1-3", wanted]


def test_another_cell_named_control_is_one_too_with_a_note(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["NT", "control", "KLF1"]})
    cells = read(path, control_label="NT")
    assert list(cells.condition) == ["control", "control", "KLF1"]
    noted(cells, "1 label taken for controls too: control")
    assert not any("too" in note for note in read(path).notes)


def test_a_pair_that_is_taken_whole_is_noted(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["NT-1", "KLF1-3", "one-1|two-2"]})
    cells = read(path)
    assert cells.condition[2] == "one-1|two-2"
    noted(cells, "1 label with | or ; taken as one name each", "one-1|two-2", "--separator '|'")
    assert conditions(path, separator="|")[2] == "one-1+two-2"


def test_a_flag_fixes_the_separator(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["DMSO", "KLF1", "MAP2K6", "KLF1_MAP2K6", "KLF1+MAP2K6"]})
    whole = ["control", "KLF1", "MAP2K6"]
    assert conditions(path) == whole + ["KLF1+MAP2K6"] * 2
    assert conditions(path, separator="none") == whole + ["KLF1_MAP2K6", "KLF1plusMAP2K6"]
    assert conditions(path, separator="_") == whole + ["KLF1+MAP2K6", "KLF1plusMAP2K6"]
    column_file(path, {"condition": ["DMSO", "x.1", "x.y"]})
    assert conditions(path, separator=".") == ["control", "1+x", "x+y"]


@pytest.mark.parametrize("text, wanted", [
    ("A_B", "A+B"), ("A|B", "A+B"), ("B+A", "A+B"), ("B , A", "A+B"), ("A+ctrl", "A"), ("(+)-JQ1", "(plus)-JQ1"),
    ("A+(+)-JQ1", "(plus)-JQ1+A"), ("(plus)-JQ1", "(plus)-JQ1"), ("JQ1_1e+05", "JQ1_1e05"), ("N,N-DMT|A", "A+N,N-DMT"),
    ("A", "A"), ("CTRL", "CTRL"), ("DMSO", "DMSO")])
def test_predict_takes_the_spellings_of_files(text, wanted):
    names = {"A", "B", "(plus)-JQ1", "JQ1_1e05", "N,N-DMT", "KLF1", "CTRL", "DMSO"}
    assert data.asked_conditions([text], names) == [(wanted, "")]
    assert data.asked_conditions([text + "@T,1"], names) == [(wanted, "T,1")]


@pytest.mark.parametrize("text, message", [
    ("klf1", "does not know 'klf1', .* did you mean KLF1"), ("A_b", "did you mean B"),
    ("KLF2+A", "'KLF2', .* mean KLF1"),
    ("XYZ123", "'XYZ123', .* check its spelling"), ("", "--predict '': an empty name; give"), (" ", "an empty name"),
    ("@T", "an empty name"), ("ctrl", "names no perturbation"), ("NT_1+ctrl", "names no perturbation")])
def test_predict_refuses_what_the_model_does_not_know(text, message):
    with pytest.raises(data.DataError, match=message):
        data.asked_conditions([text], {"A", "B", "KLF1"})


# ------------------------------------------------------------------------------------------------ encodings

def nullable_categories(group, key, values):
    categorical(group, key, values)
    names = group[key]["categories"][...]
    del group[key]["categories"]
    node = group[key].create_group("categories")
    node["values"], node["mask"] = names, np.zeros(len(names), dtype=bool)


def r_factor(group, key, values):
    names = sorted(set(values) - {""})
    codes = np.array([names.index(v) if v else len(names) for v in values], dtype="int8")
    levels = {name: i for i, name in enumerate([*names, "NA"])}
    group.create_dataset(key, data=codes, dtype=h5py.enum_dtype(levels, basetype="int8"))


def padded(group, key, values):
    group.create_dataset(key, data=np.array([v.ljust(20).encode() for v in values], dtype="S30"))


def column_matrix(group, key, values):
    group.create_dataset(key, data=np.array(values, dtype=object)[:, None], dtype=TEXT)


def r_attributes(group, key, values):
    """Attributes are arrays of one element, and the index is among them."""
    categorical(group, key, values)
    for node in (group, group[key], group.file["X"]):
        for name, value in list(node.attrs.items()):
            if isinstance(value, str):
                node.attrs[name] = np.array([value], dtype=object)


def int16_categories(group, key, values):
    categorical(group, key, values, "int16")


def bytes_categories(group, key, values):
    categorical(group, key, values, write=fixed_bytes)


def nullable_strings(group, key, values):
    nullable(group, key, [value or None for value in values], TEXT)


def replaced(name, value):
    def change(file):
        del file[name]
        file[name] = value
    return edit(change)


FORMS = [text, fixed_bytes, ascii_bytes, categorical, int16_categories, bytes_categories, old_categorical,
         nullable_strings, nullable_categories, r_factor, padded, column_matrix, r_attributes]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_encodings_of_columns(tmp_path, form):
    X = make_counts(64)
    labels = LABELS + [""] * 4                                              # without a label: dropped
    path = write_file(tmp_path / "file.h5ad", X, lambda g, k: form(g, k, labels), write=sparse(),
                      obs={"cell_type": lambda g, k: form(g, k, ["T", "B"] * 32)})
    cells = read(path, covariates="cell_type")
    assert list(cells.condition) == LABELS and list(cells.covariate) == ["T", "B"] * 30
    assert np.array_equal(cells.X.toarray(), X[:60])
    assert cells.file_shape == (60, len(GENES)) and list(cells.kept) == list(range(60))
    noted(cells, "dropped 4 cells without a label")


def test_logicals_of_r(tmp_path):
    """NA is no value of a covariate."""
    def logical(group, key):
        kind = h5py.enum_dtype({"FALSE": 0, "TRUE": 1, "NA": 2}, basetype="int8")
        group.create_dataset(key, data=np.array([0, 1, 2] * 20), dtype=kind)
    path = write_file(tmp_path / "file.h5ad", make_counts(60), LABELS, obs={"fresh": logical})
    cells = read(path, covariates="fresh")
    assert list(cells.covariate) == ["False", "True"] * 20
    noted(cells, "dropped 20 cells without a label or covariate")


def test_columns_whose_names_hold_slashes(tmp_path):
    X = make_counts(60)
    def cell_type(group, key):
        categorical(group.require_group("a/cell"), "type", ["T", "B"] * 30)
    obs = {"condition/2": np.arange(60), "a/cell/type": cell_type}
    path = write_file(tmp_path / "file.h5ad", X, LABELS, key="drug/name", obs=obs, var={"gene/id": GENES[::-1]})
    cells = read(path, pert_key="drug/name", covariates="a/cell/type", gene_key="gene/id")
    assert list(cells.condition) == LABELS and cells.covariate[1] == "B" and cells.genes == GENES[::-1]
    with pytest.raises(data.DataError, match="no perturbation column .* a/cell/type .B, T.; condition/2 .*drug/name"):
        read(path)
    with h5py.File(path, "a") as file:
        file["layers/raw/counts"] = X
    assert np.array_equal(read(path, pert_key="drug/name", layer="raw/counts").X.toarray(), X)


def test_names_that_are_no_text(tmp_path, capsys):
    path = write_file(tmp_path / "file.h5ad", make_counts(60), LABELS)
    with h5py.File(path, "a") as file:
        for name in (b"x\xff", b"obs/x\xff", b"layers/x\xff"):
            file.create_dataset(name, data=np.zeros(60))
    assert list(read(path).condition) == LABELS
    with pytest.raises(data.DataError, match="it has none"):
        read(path, layer="x")
    with h5py.File(path, "a") as file:
        del file["obs"]
    assert "is HDF5 but not AnnData" in refused(capsys, tmp_path, path)


@pytest.mark.parametrize("name", ["uns", "layers", "layers/counts", "raw", "uns/x", "obs/empty", "obsm"])
def test_null_datasets_are_nothing(tmp_path, name):
    X = make_counts(60)
    path = write_file(tmp_path / "file.h5ad", X, LABELS)
    with h5py.File(path, "a") as file:
        file[name] = h5py.Empty("f4")
    assert np.array_equal(read(path).X.toarray(), X)
    with pytest.raises(data.DataError, match=r"has no layer 'counts'; choose another --layer \(it has none\)"):
        read(path, layer="counts")


@pytest.mark.parametrize("key, other", [("feature_types", "CRISPR Guide Capture"),
                                        ("feature_type", "Antibody Capture")])
@pytest.mark.parametrize("backed", [False, True])
def test_features_that_are_no_genes(tmp_path, key, other, backed):
    X = make_counts(60)
    kinds = ["Gene Expression"] * 26 + [other] * 4
    path = write_file(tmp_path / "file.h5ad", X, LABELS, write=sparse(), var={key: kinds})
    cells = read(path, backed=backed)
    assert cells.genes == GENES[:26] and np.array_equal(cells.X[np.arange(60)].toarray(), X[:, :26])
    assert cells.file_shape == (60, 26)
    noted(cells, "left out 4 features", other, key)


def test_controls_of_the_user(tmp_path):
    """By gene name, which an Ensembl index keeps in a column; genes that the file lacks are at their training mean."""
    X, wanted = make_counts(60), ["GENE3", "KLF1"]
    columns = [GENES.index(g) for g in wanted]
    path = write_file(tmp_path / "file.h5ad", X, ["a"] * 60, key="batch", obs={"type": ["B", "T"] * 30})
    found, missing, totals = data.read_controls(path, data.DataConfig(covariates="type"), panel_of(wanted))
    assert np.allclose(found["T"], log_cp10k(X)[1::2, columns], rtol=2e-6) and len(missing) == 0   # all are controls
    assert np.array_equal(totals["T"], X[1::2].sum(1))
    ensembl = [f"ENSG{i}" for i in range(len(GENES))]
    write_file(path, X, ["a"] * 60, key="batch", index=ensembl, var={"gene_name": GENES})    # no label tells which
    found, missing, _ = data.read_controls(path, data.DataConfig(), panel_of(["GENE3", "ABC", "KLF1"]))
    assert np.allclose(found[""][:, [0, 2]], log_cp10k(X)[:, columns], rtol=2e-6)
    assert list(missing) == [1] and np.all(found[""][:, 1] == 0.5)
    write_file(path, X, LABELS, index=ensembl, var={"symbols of ours": GENES})
    with pytest.raises(data.DataError, match="lacks 2 of the model's 2 genes .GENE3, KLF1.; .* with --gene-key"):
        data.read_controls(path, data.DataConfig(), panel_of(wanted))


# ------------------------------------------------------------------------------------------------ damage

def hole(path):
    """Zeros where text stands, as an unfinished download leaves them: HDF5 itself would never return."""
    write_file(path, make_counts(60), LABELS)
    content = bytearray(path.read_bytes())
    heap = content.find(b"GCOL") + 2000
    content[heap:heap + 600] = bytes(600)
    path.write_bytes(content)


def half(path):
    edit(lambda file: None)(path)
    path.write_bytes(path.read_bytes()[:-3000] + bytes(3000))


def plugin(path):
    """A chunk by a filter that nobody has."""
    def change(file):
        del file["X"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((60, 30))
        properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((60, 30))
        node = h5py.h5d.create(file.id, b"X", h5py.h5t.IEEE_F32LE, space, properties)
        node.write_direct_chunk((0, 0), b"x" * 99)
    edit(change)(path)


def number_lists(file):
    """An attribute that a flipped byte makes no text: HDF5 may crash on reading it."""
    space, kind = h5py.h5s.create(h5py.h5s.SCALAR), h5py.h5t.vlen_create(h5py.h5t.STD_I32LE)
    file["var"].attrs.pop("_index")
    h5py.h5a.create(file["var"].id, b"_index", kind, space)


DAMAGE = {
    "codes-beyond": (replaced("obs/condition/codes", np.full(60, 9)), ["obs/condition", "beyond its 5 categories"]),
    "codes-negative": (replaced("obs/condition/codes", np.full(60, -2)), ["beyond its"]),
    "codes-float": (replaced("obs/condition/codes", np.zeros(60)), ["beyond its"]),
    "codes-short": (replaced("obs/condition/codes", np.zeros(59, int)), ["has 59 entries for 60 in the index"]),
    "column-long": (edit(lambda f: text(f["obs"], "drug", ["DMSO", "A"] * 40)), ["obs/drug", "has 80 entries for 60"]),
    "column-table": (edit(lambda f: f["obs"].create_dataset("drug", data=np.zeros(60, [("a", int)]))), ["obs/drug"]),
    "column-square": (edit(lambda f: f["obs"].create_dataset("drug", data=np.zeros((6, 10)))), ["shape (6, 10)"]),
    "link-outside": (replaced("obs/condition", h5py.ExternalLink("nowhere.h5", "/x")), ["cannot be read"]),
    "link-of-matrix": (replaced("X", h5py.ExternalLink("nowhere.h5", "/x")), ["cannot be read"]),
    "link-inside": (replaced("obs/condition", h5py.SoftLink("/nowhere")), ["cannot be read"]),
    "type-for-column": (replaced("obs/condition", np.dtype("f4")), ["obs/condition"]),
    "type-for-index": (replaced("var/_index", np.dtype("f4")), ["var/_index: is no column"]),
    "attribute": (edit(number_lists), ["var: its attribute _index is no text"]),
    "no-index": (edit(lambda f: f["obs"].pop("_index")), ["obs: has no index"]),
    "matrix-of-text": (replaced("X", np.full((60, 30), b"x", dtype="S1")), ["X", "numbers in 2 dimensions"]),
    "hole": (hole, ["a hole in its text"]), "half": (half, ["file.h5ad"])}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(tmp_path, capsys, name):
    write, parts = DAMAGE[name]
    write(tmp_path / "file.h5ad")
    message = refused(capsys, tmp_path, tmp_path / "file.h5ad")
    for part in ["file.h5ad", "damaged", *parts]:
        assert part in message


def test_files_that_need_something_else(tmp_path, capsys, monkeypatch):
    store = tmp_path / "x.zarr"
    store.mkdir()
    assert "of a zarr store" in refused(capsys, tmp_path, store)
    plugin(tmp_path / "plugin.h5ad")
    assert "is compressed with a plugin" in refused(capsys, tmp_path, tmp_path / "plugin.h5ad")
    path = write_file(tmp_path / "file.h5ad", make_counts(60), LABELS)
    hold = f"import h5py, sys; f = h5py.File({str(path)!r}, 'a'); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        assert "another program has it open" in refused(capsys, tmp_path, path)
        writer.stdin.close()

    def forbidden(*args, **options):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(data.DataError, match="permission denied; give an .h5ad file that may be read"):
        read(path)


def test_what_is_not_h5py_is_not_damage(tmp_path):
    """A mistake of ours shows itself."""
    path = write_file(tmp_path / "file.h5ad", make_counts(60), LABELS)
    with pytest.raises(KeyError, match="ours"):
        with data._open(path):
            raise KeyError("ours")


# ------------------------------------------------------------------------------------------------ scale, small things

@pytest.mark.parametrize("name", ["unseen", "transfer"])
def test_splits_of_many_groups_are_quick(name):
    """2,500 conditions in 56 covariates; quadratic code takes minutes."""
    groups = [(f"P{c}", f"batch{v}") for c in range(2500) for v in range(56)]
    began = time.process_time()
    split = data.make_split(name, groups, {})
    assert time.process_time() - began < 6 and split["test"]


def test_covariates_with_commas_are_different_groups(tmp_path):
    obs = {"a": ["T", "T,x"] * 30, "b": ["x,1", "1"] * 30}
    labels = ["control", "control", "KLF1", "KLF1"] * 15
    path = write_file(tmp_path / "file.h5ad", make_counts(60), labels, obs=obs)
    loaded = data.load(path, data.DataConfig(covariates="a,b", min_cells=0))
    assert len(loaded.groups) == 4
    panel = loaded.panel()
    assert panel.covariates == {"a": ["T", "T,x"], "b": ["1", "x;1"]}
    assert panel.one_hot(loaded.groups).sum(1).tolist() == [2] * 4
    back = tmp_path / "pred.h5ad"
    pred = {g: loaded.cells(g) for g in loaded.groups if not g.startswith("control")}
    data.write_populations(run_of(panel, "a,b"), back, pred, loaded.controls(), np.arange(len(loaded.genes)))
    assert sorted(set(read(back, covariates="a,b").pairs)) == sorted(loaded.source.pairs)


def test_a_byte_order_mark_in_any_table(tmp_path):
    def table(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        return str(tmp_path / name)
    edges = data.gene_graph(table("e.txt", "KLF1 CEBPA 900\n"), "", ["KLF1", "CEBPA"], print)
    assert edges.tolist() == [[0, 1], [1, 0]]
    assert data.read_gmt(table("p.gmt", "path\tx\tKLF1\n")) == {"path": {"KLF1"}}
    split = table("s.json", json.dumps({"test": ["KLF1"]}))
    assert data.load(write_file(tmp_path / "file.h5ad", make_counts(60), LABELS), split=split).split["test"] == ["KLF1"]


def test_the_demo_lies_beside_out_where_the_working_folder_is_read_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = data.RunConfig(out=str(tmp_path / "elsewhere" / "run"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert data.path_of(config).parent == tmp_path / "elsewhere" and not (tmp_path / "runs").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert str(data.path_of(config).parent) == "runs"


@pytest.mark.parametrize("high, scale", [(18.9, "lognorm"), (34.6, "lognorm"), (5000.0, "lognorm")])
def test_predictions_may_leave_the_range(tmp_path, high, scale):
    X = np.log1p(make_counts(60))
    X[3, 4] = high
    path = write_file(tmp_path / "file.h5ad", X, LABELS)
    cells = data.read_cells(path, check=False)
    assert cells.scale == scale and cells.X[3, 4] == np.float32(high)
    noted(cells, f"values from 0 to {high:.4g}, while log1p CP10k", "--counts")
    with pytest.raises(data.DataError, match="neither counts nor log-normalised"):
        read(path)
    for flags, unit in (({"counts": True}, "counts"), ({"lognorm": True}, "lognorm")):      # a declaration settles it
        assert read(path, **flags).scale == data.read_cells(path, data.DataConfig(**flags), check=False).scale == unit


def test_predictions_in_other_units(tmp_path):
    path = write_file(tmp_path / "file.h5ad", make_counts(60), LABELS)
    assert data.read_cells(path, check=False).scale == "counts"
    write_file(path, np.log1p(make_counts(60)) - 0.1, LABELS)
    noted(data.read_cells(path, check=False), "values from -0.1 to")
    write_file(path, make_counts(60) - 1, LABELS)
    with pytest.raises(data.DataError, match="negative"):                   # integers below 0 have no logarithm
        data.read_cells(path, check=False)
    write_file(path, make_counts(60) * 97.3, LABELS)                        # normalised, not logged
    with pytest.raises(data.DataError, match="--counts .* --lognorm"):
        data.read_cells(path, check=False)


def test_correlations_are_computed_in_full_precision(tmp_path, monkeypatch):
    """Whatever a method has set for its model; afterwards that is set again."""
    loaded = data.load(write_file(tmp_path / "file.h5ad", make_counts(60), LABELS))
    seen = []
    product = torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *args: (
        seen.append(torch.get_float32_matmul_precision()), product(self, *args))[1])
    torch.set_float32_matmul_precision("high")
    try:
        data.gene_statistics(loaded)
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_streamed_batch_is_drawn_on_the_host(tmp_path):
    """With the matrix on disk the index and the rows are on the CPU, whatever the device, the values on the device."""
    loaded = data.load(write_file(tmp_path / "file.h5ad", make_counts(60), LABELS), data.DataConfig(backed=True))
    loaded.device = torch.device("meta")
    loaded.prepare_sampling()
    rows, values = sample(loaded, torch.tensor([0, 1]), 3, torch.Generator().manual_seed(0))
    assert rows.device.type == loaded.index_device.type == loaded.controls_for(torch.tensor([1])).device.type == "cpu"
    assert values.device.type == "meta" and values.shape == (6, len(loaded.genes))


def test_the_command_line_is_quick_on_many_labels(tmp_path):
    """Labels nearly as many as Replogle's, 1,500 x 56, in a few genes."""
    labels = [f"P{i}" if i else "non-targeting" for i in range(1500) for _ in range(56)]
    with h5py.File(tmp_path / "file.h5ad", "w") as file:
        sparse()(file, "X", np.repeat(make_counts(1500, 5), 56, axis=0))
        batches = [f"b{i}" for i in range(56)] * 1500
        columns = {"gene": lambda g, k: categorical(g, k, labels, "int16"),
                   "batch": lambda g, k: categorical(g, k, batches)}
        write_frame(file, "obs", [str(i) for i in range(len(labels))], columns)
        write_frame(file, "var", GENES[:5], {})
    began = time.process_time()
    data.main([str(tmp_path / "file.h5ad"), "--covariates", "batch", "--split", "transfer"])
    assert time.process_time() - began < 10
