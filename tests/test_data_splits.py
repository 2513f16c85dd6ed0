"""data.py: the guarantees of every split, split files and columns, and that no test cell is ever seen."""
import json

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import data
import test_data
from test_data import GENES, column_file, fitted, make_counts, sparse, write_file

two_types = test_data.two_types         # a fixture


# ------------------------------------------------------------------------------------------------ splits

SINGLES = [f"G{i:02}" for i in range(30)]
DOUBLES = ["+".join(sorted((SINGLES[i], SINGLES[j]))) for i in range(0, 26, 2) for j in (i + 1, i + 2, i + 3)]
ALL = sorted(SINGLES + DOUBLES + ["G00+G01+G05"])
GROUPS = [(c, "") for c in ALL]


def check_parts(split, names):
    listed = split["train"] + split["val"] + split["test"]
    assert sorted(listed) == sorted(names)                                  # cover every condition, once
    assert split["train"] and split["test"] and all(split[p] == sorted(split[p]) for p in split)


@pytest.mark.parametrize("name", ["additive", "holdout", "cv", "combo", "unseen"])
@pytest.mark.parametrize("fold", [0, 1, 3])
def test_named_splits_are_disjoint_and_complete(name, fold):
    split = data.make_split(name, GROUPS, {}, fold)
    check_parts(split, ALL)
    assert split["val"] and split == data.make_split(name, GROUPS[::-1], {}, fold)
    assert split != data.make_split(name, GROUPS, {}, fold + 1)
    if name in ("additive", "cv", "combo"):
        assert set(SINGLES) <= set(split["train"])


@pytest.mark.parametrize("fold", range(4))
def test_additive_split_is_the_official_one(tmp_path, fold):
    """Doubles as spelled in the file, sorted, shuffled by RandomState(42 + fold); int(0.3 n) test, int(0.1 n) val."""
    rng, genes = np.random.default_rng(0), SINGLES
    pairs = [d.split("+") for d in DOUBLES]
    spelled = ["+".join(p if rng.random() < 0.5 else p[::-1]) for p in pairs] + ["G03+G02", "G02+G03"]
    labels = ["ctrl"] * 10 + [f"{s}+ctrl" for s in SINGLES] + spelled
    path = write_file(tmp_path / "file.h5ad", make_counts(len(labels), len(genes)), labels, genes)
    split = data.load(path, split="additive", fold=fold).split
    first = {}
    for label in sorted(set(spelled)):
        first.setdefault(frozenset(label.split("+")), label)
    doubles = sorted(first.values())
    np.random.RandomState(42 + fold).shuffle(doubles)
    n = len(doubles)

    def names(some):
        return sorted("+".join(sorted(label.split("+"))) for label in some)
    assert split["test"] == names(doubles[:int(0.3 * n)])
    assert split["val"] == names(doubles[int(0.3 * n):int(0.3 * n) + int(0.1 * n)])
    assert split != data.make_split("additive", [(c, "") for c in set(names(doubles)) | set(SINGLES)], {}, fold)


@pytest.mark.parametrize("fold", range(4))
def test_holdout_split(fold):
    split = data.make_split("holdout", GROUPS, {}, fold)
    in_doubles = {g for d in DOUBLES for g in d.split("+")}
    n = min(12, round(0.12 * len(in_doubles)))
    held = [{c for c in split[p] if "+" not in c} for p in ("test", "val")]
    assert len(held[0]) == n and len(held[1]) == n // 2 and held[0] | held[1] <= in_doubles
    for condition in ALL:
        genes = set(condition.split("+"))
        part = next((p for p, some in zip(("test", "val"), held) if genes & some), "train")
        assert condition in split[part]
    many = [(f"X{i}+X{i + 1}", "") for i in range(200)] + [(f"X{i}", "") for i in range(201)]
    assert len([c for c in data.make_split("holdout", many, {})["test"] if "+" not in c]) == 12


def test_cv_folds_partition_the_doubles():
    combos = [c for c in ALL if "+" in c]
    folds = [data.make_split("cv", GROUPS, {}, k, 7) for k in range(7)]
    assert sorted(c for s in folds for c in s["test"]) == combos
    for k in range(7):
        assert folds[k]["val"] == folds[(k + 1) % 7]["test"]
        assert abs(len(folds[k]["test"]) - len(combos) / 7) < 1


def test_cv_folds_partition_the_singles_where_there_are_no_doubles():
    groups = [(single, covariate) for single in SINGLES for covariate in ("x", "y")]
    folds = [data.make_split("cv", groups, {}, k, 4) for k in range(4)]
    assert sorted(c for split in folds for c in split["test"]) == SINGLES
    assert folds[0]["val"] == folds[1]["test"] and not set(folds[0]["train"]) & set(folds[0]["test"])


def test_split_of_combosciplex(tmp_path):
    """As typed, in whatever order and with whatever control the file spells its conditions; the rest trains."""
    labels = ["control+control"] * 12 + ["Crizotinib+control", "control+Dacinostat", "Panobinostat+control",
                                         "Alvespimycin+control", "Curcumin+Panobinostat"] * 12
    labels += ["Panobinostat+Crizotinib", "SRT1720+Panobinostat", "Panobinostat+Sorafenib", "SRT2104+Alvespimycin"] * 12
    path = write_file(tmp_path / "file.h5ad", make_counts(len(labels)), labels)
    split = data.load(path, split="combosciplex").split
    assert split["train"] == ["Crizotinib", "Panobinostat"] and len(split["test"]) == 7
    with pytest.raises(data.DataError, match="--split combosciplex: test condition 'Panobinostat.* has no cells"):
        data.make_split("combosciplex", GROUPS, {}, canonical=str, given={"test": data.COMBOSCIPLEX})


def test_combo_split_has_the_sizes_of_perturbench():
    doubles = [(f"D{i:03}+E{i:03}", "") for i in range(131)]
    split = data.make_split("combo", doubles + [(s, "") for s in SINGLES], {})
    assert len(split["val"]) == 45 and len(split["test"]) == 46
    assert len([c for c in split["train"] if "+" in c]) == 40


@pytest.mark.parametrize("fold", range(3))
def test_unseen_split(fold):
    split = data.make_split("unseen", GROUPS, {}, fold)
    held = [{c for c in split[p] if "+" not in c} for p in ("test", "val")]
    assert len(held[0]) == round(0.25 * 30) and len(held[1]) == 3
    assert not any((held[0] | held[1]) & set(c.split("+")) for c in split["train"])  # no double with an unseen gene
    assert not any(held[0] & set(c.split("+")) for c in split["val"])


@pytest.mark.parametrize("fold", range(4))
def test_transfer_split(fold):
    groups = [(c, v) for c in SINGLES[:20] for v in ("A549", "K562", "MCF7")] + [("only", "K562")]
    split = data.make_split("transfer", groups, {}, fold)
    held = {p: [n.split("@") for n in split[p]] for p in ("val", "test")}
    perturbations = [c for p in held for c, _ in held[p]]
    assert len(perturbations) == len(set(perturbations)) == 18              # each in at most one covariate; 3 x 6
    assert "only" in split["train"]
    for line in ("A549", "K562", "MCF7"):
        n = [sum(v == line for _, v in held[p]) for p in ("val", "test")]
        assert sum(n) <= int(0.3 * 20) and 0 <= n[1] - n[0] <= 1            # cap, half and half within the line
    whole = {c for c, _ in groups} - set(perturbations)
    assert sorted(split["train"]) == sorted(whole | {data.group_name(c, v) for c, v in groups if c in perturbations
                                                     and [c, v] not in held["val"] + held["test"]})


def test_transfer_split_with_few_perturbations():
    kang = data.make_split("transfer", [("STIM", f"type{i}") for i in range(13)], {})
    assert len(kang["test"]) == 2 and len(kang["val"]) == 2 and len(kang["train"]) == 9   # round(0.3 x 13) = 4
    one = data.make_split("transfer", [("STIM", "B"), ("STIM", "T")], {})
    assert len(one["test"]) == len(one["train"]) == 1 and one["val"] == []
    three = data.make_split("transfer", [(c, v) for c in "abc" for v in ("1", "2", "3")], {})
    assert len(three["test"]) == 2 and len(three["val"]) == 1


def test_all_trains_on_everything():
    assert data.make_split("all", GROUPS, {}) == {"train": ALL, "val": [], "test": []}


def test_validation_conditions_can_train():
    apart, joined = (data.make_split("additive", GROUPS, {}, train_on_val=on) for on in (False, True))
    assert joined == {"train": sorted(apart["train"] + apart["val"]), "val": [], "test": apart["test"]}
    pairs = [(c, v) for c in "abc" for v in ("1", "2", "3")]
    test = data.make_split("transfer", pairs, {})["test"]
    whole = sorted(set("abc") - {data.split_group(group)[0] for group in test})
    assert set(whole) < set(data.make_split("transfer", pairs, {}, train_on_val=True)["train"])


def test_groups_and_doses_are_taken_apart():
    assert data.split_group("A+B@B cell,1") == ("A+B", "B cell,1") and data.split_group("A") == ("A", "")
    assert data.split_dose("JQ1:0.5") == ("JQ1", "0.5") and data.split_dose("A") == ("A", "")
    assert data.split_dose("PEG:400:10") == ("PEG:400", "10")


@pytest.mark.parametrize("name, groups, message", [
    ("additive", [("A", ""), ("B", "")], "additive: no test condition, .* need no doubles .* of them combinations: 0"),
    ("cv", [("A", ""), ("B", "")], "--split cv with --folds 10: 3 or more are needed, a condition each, of 2"),
    ("combo", [("A", "")], "--split combo: no test condition"),
    ("holdout", [("A", "")], "--split holdout: no test condition"),
    ("unseen", [("A", "")], "no train condition, nothing to learn from; choose another"),
    ("unseen", [("A+B", ""), ("C+D", "")], "no test condition, nothing to predict; choose another: cv, "),
    ("combo", [("A", ""), ("A+B", "")], "no test condition"),
    ("transfer", [("A", ""), ("B", "")], "two covariates .none.; name them with --covariates"),
    ("transfer", [("A", "x"), ("B", "y")], "no perturbation was measured in two covariates .x, y.; name them"),
    ("random", [("A", "")], "--split random: unknown; choose additive, holdout")])
def test_impossible_splits(name, groups, message):
    with pytest.raises(data.DataError, match=message):
        data.make_split(name, groups, {})


def test_impossible_folds():
    with pytest.raises(data.DataError, match="--fold 10: folds are numbered 0 to 9"):
        data.make_split("cv", GROUPS, {}, 10)
    with pytest.raises(data.DataError, match="--folds 100: 3 or more are needed, a condition each, of 40"):
        data.make_split("cv", GROUPS, {}, 0, 100)


SIX = ["A", "B", "C", "A+B", "B+C", "A+B+C"]


@pytest.fixture()
def six(tmp_path):
    """A file with controls and six conditions, spelled in the manner of GEARS."""
    labels = ["ctrl"] * 15 + ["A+ctrl", "ctrl+B", "C+ctrl", "B+A", "B+C", "C+A+B"] * 5
    part = {"A": "train", "B": "train", "C": "valid", "B+A": "test", "B+C": "train", "C+A+B": "train", "ctrl": "none"}
    column = [part[label.replace("+ctrl", "").replace("ctrl+", "")] for label in labels]
    return write_file(tmp_path / "six.h5ad", make_counts(45), labels, ["A", "B", "C"] + GENES[3:],
                      obs={"part": column, "wrong": ["train", "test"] * 22 + ["dev"],
                           "mixed": ["train", "test"] * 22 + ["val"],
                           "twice": ["val" if part == "train" else part for part in column]})


def split_of(path, content, covariates=""):
    file = path.with_name("split.json")
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return data.load(path, data.DataConfig(covariates=covariates), str(file)).split


def test_split_files(six):
    wanted = {"train": ["A", "A+B+C", "B", "B+C"], "val": ["C"], "test": ["A+B"]}
    full = {"train": ["A+ctrl", "control+B", "C+B", "B+C+A", "ctrl"], "val": ["ctrl+C"], "test": ["B+A"]}
    assert split_of(six, full) == wanted
    assert split_of(six, {**full, "train": ["A", "B", "B,C", "A_B_C"], "test": ["A|B"]}) == wanted
    assert split_of(six, {"test": ["A+B"], "valid": ["C"]}) == wanted
    assert split_of(six, {"test": ["A+B", "B+A"]})["train"] == ["A", "A+B+C", "B", "B+C", "C"]
    assert data.load(six, split="obs:part").split == wanted


def test_split_file_with_another_control_spelling(tmp_path):
    path = column_file(tmp_path / "file.h5ad", {"condition": ["mock"] * 12 + ["KLF1"] * 12 + ["CEBPA"] * 12})
    (tmp_path / "split.json").write_text('{"test": ["KLF1+ctrl"], "train": ["CEBPA+control", "ctrl"]}')
    loaded = data.load(path, data.DataConfig(control_label="mock"), str(tmp_path / "split.json"))
    assert loaded.split == {"train": ["CEBPA"], "val": [], "test": ["KLF1"]}


@pytest.mark.parametrize("content, message", [
    ("{not json", "cannot be read as a split .* needs"), ("[1, 2]", "cannot be read as a split"),
    ({"train": ["A"]}, "5 of 6 conditions are in no part"), ({"test": "A"}, "cannot be read as a split"),
    ({"test": [1]}, "'1' has no cells"), ({"test": ["A", None]}, "'None' has no cells"),
    ("\x00", "cannot be read as a split"),
    ({"test": ["A+ctrl"], "train": ["A"]}, "'A.*' is in both (test|train) and (test|train); a split is by condition"),
    ({"test": ["A", "D"]}, "test condition 'D' has no cells in the data; remove it"),
    ({"test": ["A"], "train": ["B"]}, r"4 of 6 conditions are in no part \(A\+B, A\+B\+C, B\+C, C\); list them"),
    ({"test": ["A"], "ood": ["B"]}, "'ood' is no part"), ({"test": ["A"], "Val": ["B"]}, "'Val' is no part"),
    ({"test": ["A"], "val": ["B"], "valid": ["C"]}, "'val' is there twice"),
    ('{"test": ["A"], "test": ["B"]}', "'test' is there twice"), ("[" * 100_000, "cannot be read as a split"),
    ({"test": []}, "no test condition"), ({"test": SIX}, "no train condition"),
    ({"test": ["A@x"]}, "test condition 'A@x' has no cells")])
def test_bad_split_files(six, content, message):
    with pytest.raises(data.DataError, match=message) as error:
        split_of(six, content)
    assert "--split" in str(error.value) and "split.json" in str(error.value)


@pytest.mark.parametrize("name, message", [
    ("obs:wrong", r"cannot be read as a split \('dev' is no part\); .* a column train, val and test"),
    ("obs:twice", r"cannot be read as a split \('val' is there twice\)"),
    ("obs:mixed", "is in both .* a split is by condition, never by cell"),
    ("obs:absent", "obs has no column 'absent' .--split.; it has .*part"),
    ("absent.json", "--split absent.json: cannot be read as a split .No such file or directory.;")])
def test_bad_split_columns(six, name, message):
    with pytest.raises(data.DataError, match=message):
        data.load(six, split=name)


def test_split_file_by_covariate(two_types):
    def split(**parts):
        return split_of(two_types, parts, "cell_type")
    one = split(test=["TF1@type1", "TF2"])
    assert one["test"] == ["TF1@type1", "TF2"] and "TF1@type2" in one["train"] and "TF1" not in one["train"]
    with pytest.raises(data.DataError, match="'TF1@type1' is in both val and test"):
        split(test=["TF1@type1"], val=["TF1"])


def test_a_gene_filter_without_a_split_says_what_it_has_seen(six):
    notes = [" ".join(data.load(six, data.DataConfig(min_cells=30), split).source.notes) for split in ("", "obs:part")]
    assert "in at least 30 cells, those that a later split tests included (--min-cells 0" in notes[0]
    assert "in at least 30 training and control cells" in notes[1]


def test_load_trains_on_validation_conditions(six):
    kept, joined = (data.load(six, split="obs:part", train_on_val=on) for on in (False, True))
    assert kept.part("val") == ["C"] and joined.part("val") == []
    assert sorted([*kept.fit_rows, *kept.rows["C"]]) == joined.fit_rows.tolist()


SPLITS = ["additive", "holdout", "cv", "combo", "unseen", "transfer"]


@pytest.mark.parametrize("name", SPLITS)
def test_the_written_split_gives_the_same_split_and_data(two_types, tmp_path, name):
    config = data.DataConfig(covariates="cell_type", hvg=40)
    first = data.load(two_types, config, name, fold=1)
    (tmp_path / "split.json").write_text(json.dumps(first.split))
    again = data.load(two_types, config, str(tmp_path / "split.json"))
    assert again.split == first.split and again.genes == first.genes
    assert np.array_equal(again.fit_rows, first.fit_rows)
    parts = [set(first.part(p)) for p in data.PARTS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 2 * 40         # by group: disjoint and complete


# ------------------------------------------------------------------------------------------------ leaks

def change_test_cells(path, out, rows, how):
    """A copy of a CSR file whose given rows are zeroed, or have their genes shuffled within and across the cells."""
    with h5py.File(path) as source, h5py.File(out, "w") as target:
        for name in source:
            source.copy(name, target)
        group = target["X"]
        arrays = [group[key][...] for key in ("data", "indices", "indptr")]
        X = sp.csr_matrix(tuple(arrays), group.attrs["shape"]).toarray()
        X[rows] = 0 if how == "zero" else np.random.default_rng(0).permutation(X[rows].ravel()).reshape(len(rows), -1)
        del target["X"]
        sparse()(target, "X", X)


@pytest.mark.parametrize("how", ["zero", "permute"])
@pytest.mark.parametrize("name", SPLITS)
def test_no_test_cell_is_ever_seen(two_types, tmp_path, name, how):
    """Zeroing or permuting test cells leaves everything fitted bit-identical; choosing genes on all cells does not."""
    config = data.DataConfig(covariates="cell_type", hvg=40, min_cells=700, eval_genes=30)
    before = data.load(two_types, config, name)
    rows = np.sort(np.concatenate([before.rows[g] for g in before.part("test")]))
    assert len(rows) and not set(rows) & set(before.fit_rows)
    change_test_cells(two_types, tmp_path / "changed.h5ad", rows, how)
    after = data.load(tmp_path / "changed.h5ad", config, name)
    assert fitted(after) == fitted(before) and len(before.genes) < 70
    by_mean = [data.load(path, data.DataConfig(covariates="cell_type", hvg=20, hvg_by="mean"), name).genes
               for path in (two_types, tmp_path / "changed.h5ad")]
    assert by_mean[0] == by_mean[1]
    assert not np.array_equal(after.X[rows].toarray(), before.X[rows].toarray())
    config.hvg_on = "all"
    assert fitted(data.load(tmp_path / "changed.h5ad", config, name)) != fitted(data.load(two_types, config, name))
