"""Perturbation data: read any AnnData file, label, preprocess, split, sample, write, simulate.

A file becomes a `Dataset` in seven steps, all in `load()`: read the matrix and the labels with h5py alone; turn every
spelling of a condition into one canonical name; drop cells that fail quality control; split by condition, never by
cell; drop genes that are hardly detected; log-normalise; choose genes. The last three look at training and control
cells only: nothing here is fitted on a test cell.

    python data.py norman.h5ad                          what is in this file, and will it load
    python data.py norman.h5ad --json --split additive  the same as one JSON object, with the parts of a split
    python data.py norman.h5ad --out norman.h5          log-normalised, cells grouped by condition, quick to read
    python data.py demo --out demo.h5ad                 simulated counts, known truth (--cells, --genes, --cell-types)

Size: a matrix above --cache-gb is read in blocks of rows, uncompressed CSR in place, anything else from a temporary
copy. Once the genes are chosen, their values move into memory where they fit, sparse and, for drawing batches, dense on
the device (float16 on a GPU); else, and with --backed, a batch is read when it is drawn. Results are the same.

Units: `counts` are raw UMI counts; everything a method sees is log1p of counts per 10,000 ("log1p CP10k").
Names: a condition is its perturbations sorted and joined by '+', or 'control'; a group is a condition within one
combination of covariates, written CONDITION@cov1,cov2 where covariates are used.
"""
import argparse
import contextlib
import datetime
import difflib
import errno
import gzip
import inspect
import io
import json
import math
import mmap
import os
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import typing
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp
import torch
from torch.utils._pytree import tree_leaves

CONTROL = "control"
# usual columns, in any case and with any separator: gene_target is also Gene Target
PERT_KEYS = ("condition", "perturbation", "target", "perturbation_name", "pert", "gene", "target_gene", "gene_target",
             "guide_identity", "guide_ids", "perturbations", "drug", "treatment", "cov_drug", "cytokine", "compound")
CONTROL_LABELS = ("control", "ctrl", "non-targeting", "non_targeting", "NT", "NegCtrl", "DMSO", "vehicle", "PBS", "NTC",
                  "unperturbed", "non-target", "safe-targeting", "intergenic", "scramble", "scrambled", "neg-ctrl",
                  "neg-control", "negative-control", "no-target", "no-guide", "no-sgRNA", "no-gRNA")
CONTROL_MARKERS = ("is_control=True", "is_control=1", "control=True", "control=1", "is_ctrl=True", "is_ctrl=1",
                   "vehicle=True", "vehicle=1", "nperts=0", "n_perts=0")     # obs columns that mark controls
GENE_KEYS = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "feature_name", "symbol", "symbols")
MISSING = {"", "nan", "NaN", "<NA>", "NA", "None"}
PARTS = ("train", "val", "test")
LOG_MAX = 15.0         # log1p CP10k cannot exceed log(10001) = 9.2; other target sums reach 14
BLOCK_NNZ = 4_000_000  # values touched at once: bounds temporary memory to about 100 MB


class DataError(Exception):
    """Bad input or usage. The message says what is wrong, where, and what to do; scripts print it and exit with 2."""


@dataclass
class ReadConfig:
    """How a file is read. Flags of data.py, metrics.py and every method."""
    layer: str = ""             # matrix to use: '' for X, a layer's name, or 'raw' for raw/X
    pert_key: str = ""          # obs column of the perturbation; two columns as Drug1,Drug2; '' to search
    control_label: str = ""     # labels of controls: a,b or 'NT_*', or COLUMN=VALUE (nperts=0); '' for the usual ones
    separator: str = ""         # what joins the perturbations of a label (+ or _ ...), or none; '' for what is evident
    gene_key: str = ""          # var column with gene names; '' for the index, or the column with the perturbed genes
    covariates: str = ""        # obs columns, comma-separated, within which controls are matched (cell_type,...)
    dose_key: str = ""          # obs column of the dose, one per --pert-key: a drug becomes 'drug:dose'
    counts: bool = False        # declare the values raw counts
    lognorm: bool = False       # declare the values log-normalised
    cache_gb: float = 4.0       # matrix dense on the device up to this size, else sparse in memory, else on disk
    backed: bool = False        # leave the matrix on disk, whatever its size

    @property
    def covariate_keys(self):
        return [key.strip() for key in self.covariates.split(",") if key.strip()]


@dataclass
class DataConfig(ReadConfig):
    """How its cells are prepared. The flags of data.py, and the data flags of every method."""
    min_genes: int = 0          # drop cells with fewer detected genes
    min_cells: int = 10         # drop genes detected in fewer training and control cells (perturbed genes stay)
    hvg: int = 0                # genes to keep by --hvg-by, plus perturbed ones; 0 keeps all
    hvg_by: typing.Literal["variance", "mean"] = "variance"  # scanpy's 'seurat' score, or mean in training controls
    hvg_on: typing.Literal["train", "all"] = "train"  # cells that choose them; 'all' leaks the test, as papers do
    eval_genes: int = 1000      # genes that are evaluated: highest mean in training control cells; 0 takes all
    control_split: str = ""     # controls' shares in train,val,test (PerturBench: 0.5,0.25,0.25); '' shares them all


# ------------------------------------------------------------------------------------------------ AnnData files

# what a file may be instead: by its first bytes, by a name that an HDF5 file holds, by what HDF5 says when it reads
NOT_HDF5 = (
    (rb"\Z", "is empty (0 bytes); download it again"),
    (rb"(\xef\xbb\xbf)?\s*<(!|html|head|\?xml)", "is a web page; the link needs a login or has moved"),
    (rb"version https://git-lfs", "is a pointer to a file in Git LFS; fetch it with git lfs pull"),
    (rb"\x1f\x8b|PK|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|(?s:.{257}ustar)",
     "is an archive (zip, gz, zst, tar; a checkpoint is one too); unpack it until there is an .h5ad file"))
NOT_ANNDATA = {
    "row_attrs": "is a loom file; convert it to .h5ad (anndata.read_loom, then write_h5ad)",
    "matrix": "is a 10x Cell Ranger matrix, without perturbations; join it with the guide calls and save it as .h5ad",
    "mod": "is a MuData file; save one modality alone (mdata['rna'].write_h5ad)"}
HDF5_SAYS = {
    "signature not found": "is not an HDF5 file; AnnData (.h5ad) is needed",
    "lock file": "another program has it open for writing; close it there, or read a copy",
    "plugin": "is compressed with a plugin that is not installed (zstd, blosc, ...); pip install hdf5plugin and set "
              "HDF5_PLUGIN_PATH to its plugins, or write the file again with gzip"}


def listed(names, most=5):
    """Some names for a message, which never holds an empty list."""
    names = [str(name) for name in names]
    return ", ".join(names[:most] + ["..."] * (len(names) > most)) or "none"


def _damaged(node, why):
    """The error for content that contradicts itself."""
    return DataError(f"{node.file.filename}: {node.name.strip('/')}: {why}; the file is damaged: download it or write "
                     "it again")


@contextlib.contextmanager
def _open(path):
    """An AnnData file, open for reading. What else the file may be, and whatever h5py raises within, is one clear
    DataError; exceptions of other origin are our mistakes, and pass."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(512)
    except (OSError, ValueError) as error:          # ValueError: no path at all
        reason = str(getattr(error, "strerror", None) or error).lower()
        raise DataError(f"{path}: {reason}; give an .h5ad file that may be read (README, 'Data sets', says where to "
                        "get some; of a zarr store, anndata.read_zarr and write_h5ad make one)") from None
    for pattern, message in NOT_HDF5:
        if re.match(pattern, head, re.I):
            raise DataError(f"{path}: {message}")
    try:
        with h5py.File(path, "r", rdcc_nbytes=2**26) as file:         # no chunk below 64 MB is decompressed twice
            for name, message in NOT_ANNDATA.items():
                if name in file and "X" not in file:
                    raise DataError(f"{path}: {message}")
            if not {"obs", "var"} <= set(file):
                raise DataError(f"{path}: is HDF5 but not AnnData (it holds {listed(sorted(map(str, file)), 8)}): "
                                "obs, var and X are expected; save it as .h5ad")
            yield file
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, DataError) or not any("h5py" in Path(f.f_code.co_filename).parts for f in frames):
            raise
        reason = " ".join(str(error.args[-1] if error.args else error).split())
        problem = next((problem for sign, problem in HDF5_SAYS.items() if sign in reason),
                       f"cannot be read ({reason}); it is damaged, or not yet whole: download it or write it again")
        raise DataError(f"{path}: {problem}") from None


def _check_heaps(path):
    """HDF5 never returns from a heap of strings with an object of size 0, as a hole in a file leaves: look first."""
    if os.path.getsize(path) > 2**30:               # so large a file is hardly all text
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in re.finditer(b"GCOL\1\0\0\0", content):
            heap = content[found.start():found.start() + int.from_bytes(content[found.end():found.end() + 8], "little")]
            at = 16
            while at + 16 <= len(heap):
                index, size = struct.unpack_from("<H6xQ", heap, at)
                if index == 0 and size < 16:
                    raise DataError(f"{path}: has a hole in its text; it is truncated or damaged: download it again")
                at += size if index == 0 else 16 + -(-size // 8) * 8


def _attr(node, name):
    """A text attribute, '' without it; R writes arrays of one element."""
    if name not in node.attrs:
        return ""
    kind = node.attrs.get_id(name).dtype
    if kind.hasobject and h5py.check_string_dtype(kind) is None:        # HDF5 may crash on reading it
        raise _damaged(node, f"its attribute {name} is no text")
    value = next(iter(np.ravel(node.attrs[name]).tolist()), "")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _leaves(group, depth=4):
    """Names of the columns or matrices below a group: one whose name holds slashes is stored as nested groups."""
    names = []
    for key in (key for key in group if isinstance(key, str)):     # h5py gives names that are no text as bytes
        node = group.get(key)
        if isinstance(node, h5py.Group) and depth and not node.attrs and not {"codes", "mask"} & set(node):
            names += [f"{key}/{rest}" for rest in _leaves(node, depth - 1)]
        elif getattr(node, "shape", ()) is not None:        # a null dataset is nothing
            names.append(key)
    return names


def _array(node):
    """Entries of a dataset, or of a group of values and a mask, as a 1-D array; '' where one is missing."""
    if isinstance(node, h5py.Group):
        values, missing = _array(node["values"]).astype(object), _array(node["mask"]).astype(bool)
        if len(missing) != len(values):
            raise _damaged(node, f"{len(values)} values have a mask of {len(missing)}")
        values[missing] = ""
        return values
    is_text = h5py.check_string_dtype(node.dtype) is not None
    if not getattr(node, "shape", ()) or node.size != max(node.shape) or not (is_text or node.dtype.kind in "biuf"):
        raise _damaged(node, f"is {node}, where one column of text or numbers is expected")
    if is_text:
        return np.asarray(node.asstr(errors="replace")[...], dtype=object).reshape(-1)
    values, levels = node[...].reshape(-1), h5py.check_enum_dtype(node.dtype)
    if levels:                                  # R's factors, and its logicals: TRUE, FALSE, NA
        names = {number: {"TRUE": "True", "FALSE": "False"}.get(name, name) for name, number in levels.items()}
        values = np.array([names.get(v, "") for v in values.tolist()], dtype=object)
    return values


def _text(values):
    """One str per entry, equal ones shared: 10.0 is '10', no exponents, and '' is what MISSING names."""
    names, out = {}, np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        if value not in names:
            text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
            if isinstance(value, (float, np.floating)):
                text = np.format_float_positional(value, trim="-")
            names[value] = "" if text.strip() in MISSING else text.strip()
        out[i] = names[value]
    return out


class Frame:
    """obs or var of an open file: frame[column] is one str per entry, '' where missing, in any layout of anndata 0.7 to
    0.12 or of R, as long as the index says. n: entries; columns: their names, without the index."""

    def __init__(self, node):
        self.node, self.name = node, node.name.strip("/")
        found = [name for name in (_attr(node, "_index"), "_index", "index")
                 if isinstance(node, h5py.Group) and name and name in node]
        if not found:
            raise _damaged(node, "has no index, as if written by anndata before 0.7 (write it with a newer anndata)")
        self.index = found[0]
        self.columns = [name for name in _leaves(node) if name != self.index and not name.startswith("__categories")]
        entries = node[self.index]
        if isinstance(entries, h5py.Group):
            entries = entries["codes" if "codes" in entries else "values"]
        if not isinstance(entries, h5py.Dataset):
            raise _damaged(entries, "is no column")
        self.n = int(entries.size or 0)

    def __getitem__(self, name):
        node, old = self.node[name], f"__categories/{name}"
        codes, names = node, None
        if isinstance(node, h5py.Group) and "codes" in node:
            codes, names = node["codes"], _array(node["categories"])
        elif old in self.node:                      # anndata 0.7
            names = _array(self.node[old])
        codes = _array(codes)
        if len(codes) != self.n:
            raise _damaged(node, f"has {len(codes)} entries for {self.n} in the index")
        if names is None:
            return _text(codes)
        if codes.dtype.kind not in "iu" or self.n and not -1 <= codes.min() <= codes.max() < len(names):
            raise _damaged(node, f"has codes beyond its {len(names)} categories")
        return np.append(_text(names), "")[codes]   # -1 is missing

    def usual(self, keys):
        """The columns that go by usual names, whatever their case and separators, in the order of the names."""
        def plain(name):
            return re.sub(r"[\W_]", "", name).lower()
        return [name for key in keys for name in self.columns if plain(name) == plain(key)]

    def named(self, text):
        """Names of the columns of a flag: one, or several with commas between them."""
        return [text] if text in self.columns else [name.strip() for name in text.split(",")]

    def column(self, name, flag):
        """The column that a flag names; an error if there is none."""
        if name not in [*self.columns, self.index]:
            raise DataError(f"{self.node.file.filename}: {self.name} has no column '{name}' ({flag}); it has "
                            f"{listed(self.columns, 30)}")
        return self[name]


def _uns(group):
    """The arrays, strings and numbers of uns; anything deeper is left alone."""
    out = {}
    for key, node in group.items() if isinstance(group, h5py.Group) else ():
        if isinstance(node, h5py.Dataset) and node.shape is not None and node.dtype.names is None:
            value = node.asstr(errors="replace")[...] if h5py.check_string_dtype(node.dtype) else node[...]
            out[key] = np.asarray(value) if node.shape else np.asarray(value).item()
    return out


# ------------------------------------------------------------------------------------------------ matrices

def _matrix(node, shape, where, limit):
    """X or a layer, dense, CSR and CSC alike, as CSR float32; StoredRows of it if it takes more than `limit` bytes."""
    n, G = shape
    arrays, dimensions = [node], 2
    if isinstance(node, h5py.Group):
        layout = (_attr(node, "encoding-type") or _attr(node, "h5sparse_format")).removesuffix("_matrix")
        if layout not in ("csr", "csc"):
            raise DataError(f"{where}: is stored as {layout or 'an unknown layout'}; write it again as a dense, CSR or "
                            "CSC matrix")
        arrays, dimensions = [node[name] for name in ("data", "indices", "indptr")], 1
    for array in arrays:
        if len(getattr(array, "shape", None) or ()) != dimensions or array.dtype.kind not in "biuf":
            raise _damaged(array, f"is {array}, where numbers in {dimensions} dimensions are expected")
    stored = node.attrs.get("shape", node.attrs.get("h5sparse_shape", getattr(node, "shape", ())))
    if tuple(np.ravel(stored)) != shape:
        raise _damaged(node, f"has shape {stored}, but obs and var say {shape}: they disagree")
    step = max(1, BLOCK_NNZ // G)
    starts = progress(range(0, n, step), "reading the cells")
    if dimensions == 2:
        parts = (sp.csr_matrix(node[i:i + step].astype(np.float32)) for i in starts)
        return _spool(parts, G, where) if 4 * n * G > limit else sp.vstack(list(parts), format="csr")
    data, indices, indptr = arrays
    indptr, size = indptr.astype(np.int64)[...], len(data)
    n_major = n if layout == "csr" else G
    if (len(indptr) != n_major + 1 or size != len(indices)
            or indptr[0] != 0 or indptr[-1] != size or np.any(np.diff(indptr) < 0)):
        raise _damaged(node, f"its {layout.upper()} arrays disagree with one another or with {n} cells and {G} genes")
    if layout == "csc":                             # columns are turned to rows in memory, whatever the limit
        X = _csr(data[...], indices[...], indptr, n, where).T.tocsr()
        return _spool([X], G, where) if 8 * size > limit else X
    flat = [_FlatArray.of(array) for array in (data, indices)] if 8 * size > limit else [None]
    if all(flat):
        return StoredRows(flat, indptr, G, where)
    bounds = (indptr[i:i + step + 1] for i in starts)
    parts = (_csr(data[of[0]:of[-1]], indices[of[0]:of[-1]], of - of[0], G, where) for of in bounds)
    if 8 * size > limit:
        return _spool(parts, G, where)
    return _stacked(parts, shape, np.empty(size, dtype=np.float32), np.empty(size, dtype=np.int32))


def _csr(values, indices, indptr, width, where):
    """Rows as a file holds them, as CSR float32: one stored value, not zero, for each detected gene of a cell."""
    if len(indices) and (indices.min() < 0 or indices.max() >= width):
        raise DataError(f"{where}: its values and indices disagree (indices from {indices.min()} to {indices.max()}, "
                        f"{width} are possible); the file is damaged: write it again")
    arrays = values.astype(np.float32, copy=False), indices.astype(np.int32, copy=False), indptr
    X = sp.csr_matrix(arrays, shape=(len(indptr) - 1, width))
    X.sum_duplicates()                              # no-op on canonical input; log1p needs one entry per value
    X.eliminate_zeros()
    return X


def _stacked(parts, shape, data, indices):
    """CSR of its rows in parts, written to arrays that are long enough (memory is taken by what is written)."""
    indptr = [np.zeros(1, dtype=np.int64)]
    for part in parts:
        end = indptr[-1][-1]
        data[end:end + part.nnz], indices[end:end + part.nnz] = part.data, part.indices
        indptr.append(end + part.indptr[1:])
    indptr = np.concatenate(indptr)
    end = indptr[-1]
    # a copy frees the arrays; where little was dropped it would cost more than it frees
    data, indices = (a[:end].copy() if 2 * end < len(a) else a[:end] for a in (data, indices))
    return sp.csr_matrix((data, indices, indptr), shape=shape)


class StoredRows:
    """A matrix that stays in a file: X[rows] reads some rows as CSR float32, cut to the kept columns and normalised.
    Takes 16 bytes per cell and what is asked for. Files are read past HDF5, whose reads of single rows are slow."""

    def __init__(self, arrays, indptr, width, where, note="streamed from the file"):
        self.arrays = arrays                                    # values and columns
        self.where, self.note = where, note
        self.start, self.size = indptr[:-1], np.diff(indptr)    # of each row, in stored values
        self.keep = np.ones(width, dtype=bool)                  # columns
        self.factor = None                                      # per cell; counts times this are CP10k

    @property
    def shape(self):
        return len(self.start), int(self.keep.sum())

    def take(self, keep):
        """From now on only these rows (boolean mask)."""
        self.start, self.size = self.start[keep], self.size[keep]

    def __getitem__(self, rows):
        start, size = self.start[rows], self.size[rows]
        stop = start + size
        apart = np.ones(len(start) + 1, dtype=bool)             # rows that follow one another are one read
        apart[1:-1] = start[1:] != stop[:-1]
        runs = list(zip(start[apart[:-1]].tolist(), stop[apart[1:]].tolist()))
        values, indices = (array.read(runs) for array in self.arrays)
        X = _csr(values, indices, np.append(0, np.cumsum(size)), len(self.keep), self.where)
        if not self.keep.all():
            X = X[:, self.keep]
        if self.factor is not None:
            X.data *= np.repeat(self.factor[rows], np.diff(X.indptr))
            torch.from_numpy(X.data).log1p_()
        return X

    def in_memory(self):
        """All rows, as CSR."""
        most = int(self.size.sum())
        parts = (part for _, part in blocks(self, "taking the chosen genes into memory"))
        return _stacked(parts, self.shape, np.empty(most, np.float32), np.empty(most, np.int32))


class _FlatArray:
    """1-D values that lie uncompressed in a file, read past HDF5: pieces of `chunk` values, each at its byte offset."""

    def __init__(self, file, dtype, offsets, chunk=2**40):
        self.file, self.dtype = file, np.dtype(dtype)
        self.offsets, self.chunk = offsets, chunk

    @classmethod
    def of(cls, dataset):
        """Of a dataset; None where that is not how HDF5 stores it."""
        flat = dataset.dtype.kind in "iuf" and not dataset.id.get_create_plist().get_nfilters()
        if not flat or dataset.file.userblock_size:
            return None
        if dataset.chunks is None:
            offsets, chunk = [dataset.id.get_offset()], 2**40
        else:
            chunk = dataset.chunks[0]
            offsets = [dataset.id.get_chunk_info_by_coord((i,)).byte_offset for i in range(0, len(dataset), chunk)]
        file = open(dataset.file.filename, "rb", buffering=0)
        return None if None in offsets else cls(file, dataset.dtype, offsets, chunk)

    def read(self, runs):
        """Values from start to stop of every (start, stop), one run after the other."""
        pieces, width = [], self.dtype.itemsize                 # (byte offset, bytes)
        for start, stop in runs:
            while start < stop:
                piece, within = divmod(start, self.chunk)
                values = min(stop - start, self.chunk - within, 2**24)      # the system reads 2 GB at most
                pieces.append((self.offsets[piece] + within * width, values * width))
                start += values
        descriptor = self.file.fileno()
        if len(pieces) > 1 and hasattr(os, "posix_fadvise"):    # ask for all before waiting for any
            for offset, size in pieces:
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
        out, at = np.empty(sum(size for _, size in pieces) // width, dtype=self.dtype), 0
        view = memoryview(out.view(np.uint8))
        for offset, size in pieces:
            if os.preadv(descriptor, [view[at:at + size]], offset) < size:
                raise DataError(f"{self.file.name}: ended while it was read; was it written to? Start again")
            at += size
        return out


def _spool(parts, width, where):
    """StoredRows of a temporary uncompressed copy, for files whose rows cannot be read one by one: compressed, dense,
    stored by column. The copy has no name and is gone when the program ends, however it ends."""
    folder, indptr = tempfile.gettempdir(), [np.zeros(1, dtype=np.int64)]
    try:
        files = [tempfile.TemporaryFile() for _ in range(2)]
        for part in parts:
            for file, values in zip(files, (part.data, part.indices)):
                file.write(values)
                file.flush()
            indptr.append(indptr[-1][-1] + part.indptr[1:].astype(np.int64))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(f"{where}: is streamed from an uncompressed copy, for which {folder} has no room "
                        f"({error.strerror}); set TMPDIR to a larger folder") from None
    indptr = np.concatenate(indptr)
    arrays = [_FlatArray(file, dtype, [0]) for file, dtype in zip(files, (np.float32, np.int32))]
    note = (f"streamed from a temporary copy of {indptr[-1] / 2**27:.1f} GB in {folder}; a file prepared with data.py "
            "FILE --out needs none")
    return StoredRows(arrays, indptr, width, where, note)


def blocks(X, what, rows=None):
    """A pass over some rows of a matrix, all by default: (rows, CSR of them) of at most BLOCK_NNZ entries, one by one.
    The borders depend on the number of rows alone. what: for the status line."""
    rows = np.arange(X.shape[0]) if rows is None else rows
    step = max(1, BLOCK_NNZ // max(1, X.shape[1]))
    for i in progress(range(0, len(rows), step), what):
        yield rows[i:i + step], X[rows[i:i + step]]


# ------------------------------------------------------------------------------------------------ names and labels

def group_name(condition, covariate):
    """'A' or 'A@cov1,cov2'."""
    return f"{condition}@{covariate}" if covariate else condition


def split_group(group):
    """'A@cov1,cov2' -> ('A', 'cov1,cov2'); 'A' -> ('A', ''). No perturbation has an '@' in its name."""
    condition, _, covariate = group.partition("@")
    return condition, covariate


def split_dose(perturbation):
    """'DRUG:10' -> ('DRUG', '10'); without a dose ('A', ''). What follows the last colon is the dose."""
    drug, _, dose = perturbation.rpartition(":")
    return (drug, dose) if drug else (perturbation, "")


def covariate_name(values):
    """The covariates of a cell as one name: 'B,1'. A comma within one that is not the first becomes ';'."""
    first, *rest = [*values] or [""]
    return ",".join([first, *(value.replace(",", ";") for value in rest)])


def covariate_values(name, n):
    """The n covariates that a name joins."""
    return name.rsplit(",", n - 1)


def perturbation_name(token):
    """'+' joins perturbations and '@' starts the covariates: no name holds them. 1e+05 is 1e05."""
    return re.sub(r"(?<=\d[eE])\+(?=\d)", "", token).replace("+", "plus").replace("@", "at")


# a run of separators, blanks around it: + ; | , and _
_JOINT = re.compile(r"[\s+;|,_]*[+;|,_][\s+;|,_]*")
# the plus of A+B and A + B, but not of CD4+ T, Na+/K+, 1e+05 or GENE_+_12345.1
_PLUS = re.compile(r"(?<=[^\s+_/])(?: \+ |(?:(?<!\d[eE])|(?=\+\D))\+)(?=[^\s+_/\-])")
# what may follow the word for a control, a few times: _1, -00001, _rep2, _24hr, sg3, _0.1%
_MARK = r"[-_. #:]*(?:replicate|rep|sgrna|grna|guide|sg|batch|lane|day|[rgdt])?[-_. #:]*\d+(?!\d)" \
        r"(?: ?(?:hours|hour|hrs|hr|h|days|day|d|mins|min|[nuµm]M|%))?"
_MARKS = re.compile(f"(?:{_MARK}){{1,4}}", re.I)
_WORDS = "|".join(re.sub("[-_]", "[-_ ]?", word) for word in CONTROL_LABELS)
_UNIT = (f"(?:sg[-_ ]?)?(?:{_WORDS})(?:[-_ ]?(?:control|ctrl|guide|sgrna|grna|for|human|mouse|pool|cell)s?){{0,4}}"
         f"(?:{_MARK}){{0,4}}")
# Non-Targeting Control 3, NT-1-NT-2, 10753_non-targeting_non-targeting
_CONTROL = re.compile(rf"(?:\d+[-_ ])?{_UNIT}(?:[-_ .:/|;,&]{{1,3}}{_UNIT}){{0,3}}", re.I)
# NT-3 and NT157 are a protein and a drug too
_SHORT = re.compile(r"NT[- ]?[1-9]\d*", re.I)
# what guide calls and tables say of a cell that has no label
_NO_LABEL = re.compile(r"#?n/a|none|null|negatives?|unknown|undetermined|undefined|ambiguous|no[-_ ]?call|"
                       r"(?:un|not[-_ ]?)(?:assigned|mapped|matched|called|labell?ed)|"
                       r"(?:multiple|multiplet|doublet)s?(?:[-_ ]?(?:guide|sgrna|grna)s?)?", re.I)
# a guide of a gene: KLF1-2, sgKLF1_1, KLF1g2, KLF1_+_53715438.23-P1P2
_GUIDE = re.compile(r"(?:sg)?(.+?)(?:(?:[-_. ](?:guide|sg|g)?|sg|g)[-_. ]?\d{1,2}|_[-+]_\d[\d.]*(?:-P\d(?:P\d)?)?)")


def is_control_label(token):
    """Is this one of the usual names for a control, in any case, alone, numbered (NegCtrl0, NT_1, DMSO_24hr) or a pair
    of them?"""
    return _CONTROL.fullmatch(token) is not None


def _cuts(label, joint=_JOINT):
    """(left, right) for each separator of a label; within brackets there is none: '(+)-JQ1' stays whole."""
    for match in joint.finditer(label):
        left = label[:match.start()]
        if left.count("(") == left.count(")") and left.count("[") == left.count("]"):
            yield left, label[match.end():]


def _pieces(label):
    """Everything in a label that may be a name."""
    return {label, *_JOINT.split(label), *(side for cut in _cuts(label) for side in cut)} - {""}


class LabelRules:
    """Turns every spelling of a condition into its canonical name: perturbations sorted, joined by '+', no controls.

    A label is several perturbations where there is evidence for each of them: a gene of the file or a guide of one, a
    label that stands alone or beside a control, or a control; whatever else has a separator in it is one name. A plus
    between two words, as this program writes it, needs no evidence. separator: the only one there is, or 'none'.
    """

    def __init__(self, labels, genes=(), control_label="", separator=""):
        self.genes, self.separator = set(genes), separator
        patterns = [p.strip() for p in (control_label, *control_label.split(",")) if p.strip()]
        self.declared = [re.compile(re.escape(p).replace(r"\*", ".*")) for p in patterns]
        self.known = set()                      # perturbations by evidence, genes apart
        self.control_genes = set()              # names of genes that are the control, since no other label is
        self.remarks = set()                    # controls with a word for what they are: DMSO_TF
        self.short = set()                      # perturbations that look like a numbered control: NT157
        texts = {self._bare(label) for label in labels} - {""}
        if not self.declared:
            controls = {text for text in texts if self.is_control(text)}
            if not controls:
                self.control_genes = {text for text in texts if is_control_label(text)}
                self.genes -= self.control_genes
            short = {text for text in controls if _SHORT.fullmatch(text)}
            if len(short) < 3 and any(not text.lower().startswith("nt") for text in controls):
                self.short = short
        self._find_remarks(texts)
        todo = [text for text in texts if not self.is_control(text)]
        for text in todo:                       # what stands beside a plus or a control counts as if it stood alone
            sides = {side for cut in _cuts(text, _PLUS) for side in cut} | self._beside_control(text)
            found = {side for side in sides if side and not _MARKS.fullmatch(side)} - texts
            texts |= found
            todo += [side for side in found if not self.is_control(side)]
        for text in sorted(texts, key=len):     # what a label may be made of is shorter, and known by then
            if self.tokens(text) == [text]:
                self.known.add(text)
        tokens = {token for label in labels for token in self.tokens(label)}
        self.seen_controls = set(filter(self.is_control, tokens))
        others = tokens - self.seen_controls - self.genes
        self.unlabelled = set(filter(_NO_LABEL.fullmatch, others))      # what names no perturbation, such as a doublet

    def _beside_control(self, text):
        """What stands beside a control in a label, the longest there is: {'A'} of A_NT_1."""
        if text in self.remarks:
            return set()
        after = [right for left, right in _cuts(text) if self.is_control(left)]
        before = [left for left, right in _cuts(text) if self.is_control(right)]
        return {*after[-1:], *before[:1]} - {""}

    def _find_remarks(self, texts):
        """TF of DMSO_TF is no perturbation where DMSO stands alone and TF is found nowhere else, unless this file's
        labels put perturbations beside controls. One gene may have the name by chance, two have not."""
        beside = {text: self._beside_control(text) for text in texts if not self.is_control(text)}
        pieces = Counter(piece for text in texts for piece in _pieces(text))
        genes = self.genes & set(pieces)
        alone = texts | (genes if len(genes) > 1 else set())
        if any(map(self.is_control, texts)) and not any(sides & alone for sides in beside.values()):
            found = {text for text, sides in beside.items() if sides and not _PLUS.search(text)
                     and all(pieces[side] == 1 and not self._is_guide(side) for side in sides)}
            self.remarks = found if len(found) < len(beside) else set()

    def is_control(self, token):
        return token == CONTROL or self.is_asked(token)     # no perturbation can be called control

    def is_asked(self, token):
        """Does --control-label name it; without that flag, is it a usual name?"""
        if self.declared:
            return any(pattern.fullmatch(token) for pattern in self.declared)
        if token in CONTROL_LABELS or token in self.remarks:
            return True
        return is_control_label(token) and token not in self.genes and token not in self.short

    def _is_guide(self, token):
        guide = _GUIDE.fullmatch(token)
        return guide is not None and guide[1] in self.genes

    def _knows(self, token):
        return token in self.genes or token in self.known or self.is_control(token) or self._is_guide(token)

    def _bare(self, label):
        """Without separators at its ends, and once where it is written twice (A_B__A_B)."""
        if label in self.genes or self.separator or self.is_control(label):
            return label
        twice = re.fullmatch(r"(.+)__\1", label)
        return (twice[1] if twice else label).strip("+;|,_ ")

    def _known_parts(self, text):
        """The known perturbations and controls that make up a text, or None."""
        if self._knows(text):
            return [text]
        for left, right in reversed(list(_cuts(text))):         # the longest name first
            if self._knows(left):
                rest = self._known_parts(right) if right else []
                if rest is not None:
                    return [left, *rest]
        return None

    def tokens(self, label):
        """The perturbations and controls that a label names, in its order."""
        label = self._bare(label)
        if self.separator:
            parts = [label] if self.separator == "none" else label.split(self.separator)
            return [part.strip() for part in parts if part.strip()]
        parts, start = self._known_parts(label) or [], 0
        for left, right in [] if parts else [*_cuts(label, _PLUS), (label, "")]:
            part = self._bare(label[start:len(left)])
            parts += self._known_parts(part) or [part]
            start = len(label) - len(right)
        if not all(self._knows(part) or re.search(r"[^\W\d_]", part) for part in parts):
            parts = [label]                     # 05 is no name
        return [part for part in parts if part]

    def canonical(self, *labels, doses=()):
        """'ctrl+B_A' -> 'A+B', and of a cell with several labels all of them; 'control' when only controls are named;
        '' for a missing label. doses: of each label, for every perturbation in it: 'A:10+B:10'."""
        nothing = MISSING | self.unlabelled
        of_label = [[token for token in self.tokens(label) if token not in nothing] for label in labels]
        perturbations = set()
        for tokens, dose in zip(of_label, doses or [""] * len(labels)):
            dose = re.sub(r"(?<=\d[eE])\+", "", dose)      # 1e+06 is one number, 1+1 (GEARS) one dose for each token
            each = dose.split("+") if dose.count("+") == len(tokens) - 1 else [dose.replace("+", "/")] * len(tokens)
            for token, its_dose in zip(tokens, each):
                if not self.is_control(token):
                    perturbations.add(perturbation_name(token) + (f":{its_dose}" if its_dose else ""))
        if not any(of_label):
            return ""
        return "+".join(sorted(perturbations)) or CONTROL


class Labels:
    """The label columns of one --pert-key, and what rules make of them: texts, the distinct labels; genes, those that
    name genes; condition (n,); spelling {condition: its first label in sorted order}."""

    def __init__(self, key, columns, doses, symbols, control_label, separator):
        self.key, self.texts = key, sorted(set().union(*columns))
        self.asked = control_label or f"a usual label of controls: {', '.join(CONTROL_LABELS)}"
        self.rules = LabelRules(self.texts, symbols, control_label, separator)
        cells = list(zip(*columns, *doses))
        k = len(columns)
        names = {cell: self.rules.canonical(*cell[:k], doses=cell[k:]) for cell in set(cells)}
        self.condition = np.array([names[cell] for cell in cells], dtype=object)
        self.spelling = {}
        for label, name in sorted(("+".join(filter(None, cell[:k])), name) for cell, name in names.items()):
            self.spelling.setdefault(name, label)
        self.genes = {text for text in self.texts if symbols & _pieces(text)} - self.rules.seen_controls

    def __str__(self):
        return f"{self.key} ({listed(self.texts, 4)})"

    def lacks(self, control_required, perturbed_required):
        """Why these cannot be the labels, or ''."""
        if perturbed_required and set(self.spelling) - {""} == {CONTROL}:
            return f"column {self.key} has only control cells; nothing is perturbed"
        found = CONTROL in self.spelling and any(map(self.rules.is_asked, self.rules.seen_controls))
        if control_required and not found:
            others = sorted(set(self.texts) - self.genes - {""})
            hint = f" (only {listed(others)} are no gene)" if self.genes and 0 < len(others) < 4 else ""
            return f"column {self.key} has no control cells: none of {listed(self.texts, 4)} is {self.asked}{hint}"
        return ""

    def notes(self):
        """What was guessed about the labels, and how to undo it."""
        rules, usual = self.rules, {word.lower() for word in CONTROL_LABELS}
        guessed = {token for token in rules.seen_controls if token.lower() not in usual and not rules.declared}
        guessed |= rules.seen_controls & rules.control_genes
        notes = [
            (guessed, "taken for controls", "--control-label NAME takes that label alone, 'NAME*' all that begin so"),
            (rules.seen_controls & ({CONTROL} if rules.declared and not rules.is_asked(CONTROL) else set()),
             "taken for controls too", "no perturbation can have this name; rename it"),
            (rules.short, "not taken for numbered controls", "another is there; --control-label A,B names all of them"),
            (rules.unlabelled, "taken for cells without a label", "--control-label, if one is the control")]
        if not rules.separator:
            several = {text for text in self.texts if "+" in rules.canonical(text)}
            whole = {text for text in self.texts if re.search("[|;]", rules.canonical(text))}
            notes += [(several, "read as several perturbations", "--separator none takes each label whole"),
                      (whole, "with | or ; taken as one name each", "--separator '|' takes them apart")]
        return [f"{len(names):,} label{'s' * (len(names) > 1)} {what}: {listed(sorted(names), 9)} ({undo})"
                for names, what, undo in notes if names]


def _find_labels(obs, config, symbols, control_required, perturbed_required, notes):
    """Labels of --pert-key, or of the first usual column that holds what is required. Where no label is a control, a
    column may mark the controls: that of --control-label COLUMN=VALUE, or a usual one."""
    path = obs.node.file.filename
    keys = [config.pert_key] if config.pert_key else obs.usual(PERT_KEYS)
    columns = {key: [obs.column(name, "--pert-key") for name in obs.named(key)] for key in keys}

    def hints():
        """Advice for each other column that holds a usual control beside other labels."""
        for key in obs.columns[:12]:
            labels = sorted(set(obs[key]))
            for label in labels if key not in columns and len(labels) > 1 else ():
                if is_control_label(label):
                    yield f", perhaps --pert-key {key}, which holds {label}"
    if not columns and not perturbed_required and not any(hints()):
        columns["(no label column)"] = [np.full(obs.n, CONTROL, dtype=object)]
        notes.append("took every cell for a control, since there is no label column (--pert-key)")
    doses = [obs.column(name, "--dose-key") for name in obs.named(config.dose_key)] if config.dose_key else []
    if doses and any(len(of_key) != len(doses) for of_key in columns.values()):
        raise DataError(f"{path}: --dose-key {config.dose_key}: give one column for each of --pert-key A,B (the same "
                        "column twice, where both perturbations have one dose)")

    def read(controls):
        """{Labels of a column: what it lacks, or ''}."""
        labels = [Labels(key, columns[key], doses, symbols, controls, config.separator) for key in columns]
        return {each: each.lacks(control_required, perturbed_required) for each in labels}
    lacks = read(config.control_label)
    if config.control_label or control_required and all(lacks.values()):
        marked = _mark_controls(obs, config.control_label, control_required, columns.values())
        if marked:
            notes.append(marked)
            lacks = read(CONTROL)
    found = [labels for labels, problem in lacks.items() if not problem]
    how = ("Name the column of the perturbations with --pert-key (or rename it to condition), and their controls with "
           "--control-label LABEL or COLUMN=VALUE")
    if not found:
        problem = next(iter(lacks.values()), f"no perturbation column (looked for {', '.join(PERT_KEYS)})")
        listing = "; ".join(f"{key} ({listed(sorted(set(obs[key])), 4)})" for key in obs.columns[:12])
        raise DataError(f"{path}: {problem}; obs has {listing or 'no columns'}. {how}{next(hints(), '')}")
    chosen = found[0]
    for other, problem in lacks.items():
        if not problem and np.any(other.condition != chosen.condition):
            raise DataError(f"{path}: obs columns {chosen} and {other} disagree; choose one with --pert-key")
        if problem and len(other.genes) > 1 and not chosen.genes:
            raise DataError(f"{path}: obs column {chosen} names no gene, and {problem}. {how}")
    notes += chosen.notes()
    return chosen


def _mark_controls(obs, asked, required, columns):
    """Label as controls the cells that an obs column marks: that of --control-label COLUMN=VALUE, or a usual one.
    Returns a note of it, or ''."""
    for marker in [asked] if asked else CONTROL_MARKERS:
        name, equals, value = marker.partition("=")
        if not equals or name not in obs.columns:
            continue
        values = np.array([v.lower() for v in obs[name]], dtype=object)
        marked = values == value.lower()
        says_so = asked or value == "0" or {"true", "false", "1", "0", ""}.issuperset(values)
        if says_so and marked.any() and not marked.all():
            for of_key in columns:
                for i, column in enumerate(of_key):
                    column[marked] = "" if i else CONTROL
            return (f"took the {int(marked.sum()):,} cells with {marker} for controls (--control-label LABEL or "
                    "COLUMN=VALUE chooses others)")
        if asked and required:
            raise DataError(f"{obs.node.file.filename}: --control-label {marker}: {int(marked.sum())} of {obs.n} cells "
                            f"are controls then; {name} holds {listed(sorted(set(obs[name])))}: choose another value")
    return ""


# ------------------------------------------------------------------------------------------------ cells of a file

@dataclass
class Cells:
    """The labelled cells of one AnnData file: n cells, G genes. Conditions and covariates are canonical."""
    path: str
    X: "sp.csr_matrix | StoredRows"  # (n, G) float32, in the unit that `scale` says
    genes: list
    condition: np.ndarray       # (n,) 'A', 'A+B' or 'control'
    covariate: np.ndarray       # (n,) 'cov1,cov2', or '' without covariates
    scale: str                  # 'counts' or 'lognorm'
    uns: dict
    rules: "LabelRules"         # found for this file: rules.canonical(label) is a condition
    spelling: dict              # canonical condition -> its first spelling in sorted order
    pert_key: str
    kept: np.ndarray            # (n,) rows of the file that these cells are
    file_shape: tuple           # labelled cells and genes of the file, before anything is filtered
    notes: list = field(default_factory=list)  # what was dropped or renamed, to be printed
    totals: "np.ndarray | None" = None         # (n,) counts of each cell, where lognormalise() has found counts

    @property
    def pairs(self):
        """{(condition, covariate): rows of its cells}, sorted."""
        number = {}
        of_cell = [number.setdefault(pair, len(number)) for pair in zip(self.condition, self.covariate)]
        rows = np.split(np.argsort(of_cell, kind="stable"), np.cumsum(np.bincount(of_cell))[:-1])
        return {pair: rows[i] for pair, i in sorted(number.items())}

    def take(self, keep):
        """Keep only these cells (boolean mask)."""
        if isinstance(self.X, StoredRows):
            self.X.take(keep)
        else:
            self.X = self.X[keep]
        self.condition, self.covariate = self.condition[keep], self.covariate[keep]
        self.kept = self.kept[keep]

    def keep_genes(self, keep):
        """Keep only these genes (boolean mask), in place."""
        X, self.genes = self.X, [g for g, k in zip(self.genes, keep) if k]
        if isinstance(X, StoredRows):
            X.keep[X.keep] = keep
        else:
            kept = (part[:, keep] for _, part in blocks(X, "dropping genes"))   # each is written where it was read
            self.X = _stacked(kept, (X.shape[0], len(self.genes)), X.data, X.indices)

    def obs(self, column="", flag="--covariates"):
        """Another obs column of the file, as text, for these cells: (n,); without a column their names, the index."""
        with _open(self.path) as file:
            frame = Frame(file["obs"])
            return frame.column(column or frame.index, flag)[self.kept]

    names = property(obs)


def read_cells(path, config=None, control_required=True, perturbed_required=True, check=True, genes=()):
    """The Cells of an AnnData file, with values as stored; their notes say what was guessed. Raises DataError.

    config: ReadConfig. control_required: an error when the file holds no control cells. perturbed_required: an error
    when it holds nothing else; if False, a file without labels is all control cells. check: refuse values that measured
    cells cannot have and a prediction may: below zero, a few far above log1p CP10k, or all lower than it goes. NaN and
    Inf never pass. genes: names by which to choose the var column of gene names.
    """
    config = config or DataConfig()
    notes = []
    with _open(path) as file:
        _check_heaps(path)
        matrix, var, where = _choose_layer(file, config.layer, path)
        obs, var = Frame(file["obs"]), Frame(var)
        if obs.n == 0 or var.n == 0:
            raise DataError(f"{path}: holds {obs.n} cells and {var.n} genes; check how it was written")
        expressed = _expressed(var, notes)
        gene_keys = dict.fromkeys([var.index, *var.usual(GENE_KEYS), config.gene_key or var.index])
        names = {key: np.where(expressed, var.column(key, "--gene-key"), "") for key in gene_keys}
        labels = _find_labels(obs, config, set().union(*names.values()), control_required, perturbed_required, notes)
        covariates = [obs.column(key, "--covariates") for key in config.covariate_keys]
        wanted = set(genes) or {piece for text in labels.texts for piece in _pieces(text)}
        genes = _gene_names(names, config.gene_key, wanted, notes)
        X = _matrix(matrix, (obs.n, var.n), where, -1 if config.backed else config.cache_gb * 2**30)
        uns = _uns(file.get("uns"))
    if isinstance(X, StoredRows):
        notes.append(X.note)
    labelled = np.all([column != "" for column in [labels.condition, *covariates]], axis=0)
    values = list(zip(*covariates)) or [()] * obs.n
    known = {each: covariate_name(each) for each in set(values)}
    covariate = np.array([known[each] for each in values], dtype=object)
    cells = Cells(str(path), X, genes, labels.condition, covariate, "", uns, labels.rules, labels.spelling, labels.key,
                  np.arange(obs.n), (), notes)
    if not expressed.all():
        cells.keep_genes(expressed)
    cells.genes, duplicated = _unique(cells.genes)
    if duplicated:
        notes.append(f"made {len(duplicated):,} duplicate gene names unique (NAME-1, NAME-2, ...; --gene-key names "
                     "another column)")
    ambiguous = sorted({p for c in labels.spelling for p in c.split("+")} & duplicated)
    if ambiguous:
        raise DataError(f"{path}: perturbed gene {ambiguous[0]} names several rows of var; choose a column of unique "
                        "names with --gene-key, or remove the duplicates")
    if not labelled.all():
        notes.append(f"dropped {int((~labelled).sum()):,} cells without a label{' or covariate' if covariates else ''}")
        cells.take(labelled)
    cells.file_shape = cells.X.shape
    if control_required and CONTROL not in cells.condition:
        raise DataError(f"{path}: no control cell has a value of {config.covariates}; choose other --covariates")
    cells.scale = _scale(cells.X, config, where, notes, check)
    scale = "raw counts (--lognorm)" if cells.scale == "counts" else "log-normalised values (--counts)"
    found = [(config.pert_key, f"labels in obs column {labels.key} (--pert-key)"),
             (config.control_label, f"controls {listed(sorted(labels.rules.seen_controls))} (--control-label)"),
             (config.counts or config.lognorm, scale)]
    if not all(said for said, _ in found):
        notes.insert(0, "found " + ", ".join(guess for said, guess in found if not said))
    return cells


def missing_columns(path, config):
    """Those of --pert-key, --dose-key and --gene-key that name no column of this file, as fields of the config."""
    with _open(path) as file:
        _check_heaps(path)
        obs, var = Frame(file["obs"]), Frame(_choose_layer(file, config.layer, path)[1])
        of = {"pert_key": obs, "dose_key": obs, "gene_key": var}
        return {key for key, frame in of.items()
                if not {*frame.named(getattr(config, key))} <= {*frame.columns, frame.index, ""}}


def _choose_layer(file, layer, path):
    """The matrix that --layer names, the var group that belongs to it, and what to call it in messages."""
    layers = file.get("layers")
    choices = {name: f"layers/{name}" for name in (_leaves(layers) if isinstance(layers, h5py.Group) else ())}
    choices |= {name: matrix for name, matrix in (("raw", "raw/X"), ("", "X")) if matrix in file}
    if layer not in choices:
        raise DataError(f"{path}: has no {f'layer {layer!r}' if layer else 'X'}; choose another --layer (it has "
                        f"{listed(sorted(filter(None, choices)), 30)})")
    matrix = choices[layer]
    return file[matrix], file["raw/var" if matrix == "raw/X" else "var"], f"{path}: {matrix}"


def _expressed(var, notes):
    """(G,) bool: the features that are genes, where the file says that some are guides or antibodies."""
    for key in ("feature_types", "feature_type"):
        kinds = var[key] if key in var.columns else []
        genes = np.array([kind.lower() == "gene expression" for kind in kinds])
        if genes.any() and not genes.all():
            notes.append(f"left out {int((~genes).sum()):,} features that are no genes: "
                         f"{listed(sorted(set(kinds[~genes])))} in var column {key} (rename it to keep them)")
            return genes
    return np.ones(var.n, dtype=bool)


def _gene_names(names, gene_key, wanted, notes):
    """Of {column of var: names of the genes}, index first: those of --gene-key, else of the index, unless a column
    holds more of the wanted names (Ensembl index). A gene without a symbol goes by its identifier."""
    index = next(iter(names))
    best = gene_key or max(names, key=lambda key: len(wanted & set(names[key])))    # the first of equals: the index
    if best not in (index, gene_key):
        notes.append(f"took gene names from var column {best}, which holds more of the perturbed genes than the index "
                     f"(--gene-key {index})")
    return np.where(names[best] == "", names[index], names[best])


def _unique(names):
    """Duplicates get -1, -2, ... in order of appearance, skipping names that exist, as anndata does.
    Returns the unique names and the set of names that were duplicated."""
    taken, counter = set(names), {}
    out = []
    for name in names:
        unique = name
        while name in counter and unique in taken:
            counter[name] += 1
            unique = f"{name}-{counter[name]}"
        counter.setdefault(name, 0)
        taken.add(unique)
        out.append(unique)
    return out, {name for name, n in counter.items() if n}


def _scale(X, config, where, notes, check=True):
    """'counts' or 'lognorm', from the declaration or from the values; anything else is a DataError."""
    if config.counts and config.lognorm:
        raise DataError("--counts and --lognorm contradict each other; give one")
    low, high = np.inf, -np.inf
    integer = True
    stored = outside = 0
    for _, part in blocks(X, "looking at the values"):
        values = part.data
        if len(values):
            low, high = np.minimum(low, values.min()), np.maximum(high, values.max())  # NaN stays NaN
            integer = integer and np.array_equal(values, np.rint(values))
            stored += len(values)
            outside += int((values >= LOG_MAX).sum())
    declared = config.counts or config.lognorm
    scale = "counts" if config.counts or integer and not config.lognorm else "lognorm"
    problem = ""
    if low > high:
        problem = "every value is zero"
    elif not np.isfinite([low, high]).all():
        problem = "holds NaN or infinite values"
    elif low < 0 and (check or scale == "counts"):
        problem = f"holds negative values (lowest {low:.3g}), as scaled or centred data do"
    elif not declared and not integer and outside > (0 if check else 0.005 * stored):   # a prediction may have a few
        problem = (f"{outside:,} of {stored:,} values are above {LOG_MAX:g}, the highest {high:.6g}, and not all are "
                   "integers: neither counts nor log-normalised; declare --counts or --lognorm")
    elif not declared and not integer and high < 2.33 and check:        # log1p(log1p(10,000))
        problem = f"values end at {high:.3g}: log1p was applied twice, or data are scaled; declare --lognorm if not"
    if problem:
        raise DataError(f"{where}: {problem}; choose another --layer, of raw counts or log-normalised values")
    if scale == "lognorm" and (low < 0 or high > math.log1p(1e4)):
        notes.append(f"values from {min(low, 0):.3g} to {high:.4g}, while log1p CP10k lies between 0 and 9.21; they "
                     "are taken as they are (--counts if they are counts)")
    if config.counts and not integer and high < LOG_MAX:
        notes.append(f"values end at {high:.3g} and are no integers, as if they were logarithms; counts, as declared")
    if integer and not declared and high < 10:
        notes.append(f"integers up to {high:.3g}, taken for counts, which seldom end so low; --lognorm if they are "
                     "logarithms that were cast to integers")
    return scale


def lognormalise(cells, rows=()):
    """In place: counts -> log1p(counts per 10,000), over all genes that the matrix has; log-normalised data stay.
    Returns gene_moments of the counts per 10,000 of some rows, (2, G), which the same pass adds up."""
    X, sums = cells.X, np.zeros((2, cells.X.shape[1]))
    if cells.scale == "lognorm":
        return gene_moments(X, rows, torch.expm1) if len(rows) else sums
    n, G = X.shape
    cells.totals, factor = np.zeros(n), np.zeros(n, dtype=np.float32)
    chosen = np.isin(np.arange(n), rows)
    for block, part in blocks(X, "normalising"):
        cells.totals[block] = total = part @ np.ones(G)
        factor[block] = np.divide(1e4, total, out=np.zeros_like(total), where=total > 0)
        part.data *= np.repeat(factor[block], np.diff(part.indptr))
        if len(rows):
            _add(sums, part, chosen[block])
        if not isinstance(X, StoredRows):
            X.data[X.indptr[block[0]]:X.indptr[block[-1] + 1]] = torch.from_numpy(part.data).log1p_()
    if isinstance(X, StoredRows):
        X.factor = factor
    if not cells.totals.all():
        cells.notes.append(f"cells without a count in these genes: {int((cells.totals == 0).sum()):,} (--min-genes 1 "
                           "drops them)")
    cells.scale = "lognorm"
    return sums


# ------------------------------------------------------------------------------------------------ gene statistics

def gene_moments(X, rows, transform=None):
    """Sum and sum of squares of every gene over some rows, (2, G) float64, of transform(values), transform(0) = 0."""
    sums = np.zeros((2, X.shape[1]))
    for _, part in blocks(X, "adding up the genes", rows):
        if transform:
            part.data = transform(torch.from_numpy(part.data)).numpy()
        _add(sums, part, np.ones(part.shape[0]))
    return sums


def _add(sums, part, weights):
    """The values of some cells and their squares, times the weights of the cells, to the sums of the genes."""
    part = part.astype(np.float64)
    sums[0] += weights @ part
    part.data **= 2
    sums[1] += weights @ part


def gene_statistics(dataset, most=100_000):
    """Mean (G,), variance (G,) and correlation (G, G) of genes over training and control cells, float32 on the device.

    Of more than `most` cells that many are taken, evenly spaced: a correlation is then known to 0.003. A gene without
    variance correlates with none, itself included.
    """
    X, rows = dataset.X, dataset.fit_rows
    rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]
    total, square = gene_moments(X, rows)
    mean = total / len(rows)
    var = np.maximum(square / len(rows) - mean ** 2, 0)
    varies = torch.from_numpy(var > 1e-12 * np.maximum(mean, 1e-6) ** 2).to(dataset.device)
    mean, var = (torch.from_numpy(a.astype(np.float32)).to(dataset.device) for a in (mean, var))
    std = torch.where(varies, var, 1).sqrt()
    corr = mean.new_zeros(len(mean), len(mean))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")       # whatever a method has set for its model
    for _, part in blocks(X, "correlating the genes", rows):
        z = (torch.from_numpy(part.toarray()).to(dataset.device) - mean) / std
        corr.addmm_(z.T, z)
    torch.set_float32_matmul_precision(before)
    return mean, var, corr / len(rows) * (varies & varies[:, None])


def training_effects(dataset):
    """Training groups [n], their mean effects (n, G): mean of the cells minus the mean of their controls, and the mean
    control profile (G,); float64."""
    def mean(rows):
        return gene_moments(dataset.X, rows)[0] / len(rows)
    control = {v: mean(rows) for v, rows in dataset.control_rows["train"].items()}
    groups = dataset.part("train")
    effects = [mean(dataset.rows[g]) - control[split_group(g)[1]] for g in progress(groups, "averaging conditions")]
    return groups, np.stack(effects), np.mean(list(control.values()), axis=0)


def detected_medians(X, rows, most=20_000):
    """Median of every gene's values that are not 0, [G], 0 for a silent gene; of more than `most` rows that many are
    taken, evenly spaced."""
    rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(np.int64)]
    by_gene = sp.vstack([part for _, part in blocks(X, "looking for typical values", rows)], format="csc")
    ends = by_gene.indptr
    return [float(np.median(by_gene.data[i:j])) if j > i else 0.0 for i, j in zip(ends[:-1], ends[1:])]


def highly_variable(total, square, n, n_top, bins=20):
    """Boolean (G,): the n_top highly variable genes by scanpy's 'seurat' flavour, from the sum and the sum of squares
    of counts per 10,000 over n cells.

    Dispersion var/mean of the un-logged values, standardised within 20 equal-width bins of log1p(mean). As in scanpy,
    a gene alone in its bin scores 1, genes that tie with the last one are kept, and silent genes never are.
    """
    mean = total / n
    variance = (square - n * mean ** 2) / max(n - 1, 1)
    mean[mean == 0] = 1e-12
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.log(np.where(variance > 0, variance / mean, np.nan))
    level = np.log1p(mean)
    edges = np.linspace(level.min(), level.max(), bins + 1)
    which = np.clip(np.searchsorted(edges, level, side="left") - 1, 0, bins - 1)  # right-closed bins, as pandas.cut
    score = np.full(len(mean), -np.inf)
    for i in range(bins):
        genes = np.flatnonzero((which == i) & np.isfinite(dispersion))
        here = dispersion[genes]
        if len(genes) == 1:
            score[genes] = 1.0
        elif len(genes) and here.min() < here.max():
            score[genes] = (here - here.mean()) / here.std(ddof=1)
    lowest = np.sort(score)[-min(n_top, len(score))]
    return (score >= lowest) & (score > -np.inf)


# ------------------------------------------------------------------------------------------------ splits

# test conditions of scDFM's table 3 (official code); two are single drugs, though the paper says that all of them train
COMBOSCIPLEX = ["Panobinostat+Crizotinib", "Panobinostat+Curcumin", "Panobinostat+SRT1720", "Panobinostat+Sorafenib",
                "SRT2104+Alvespimycin", "Alvespimycin", "Dacinostat"]


def make_split(name, groups, spelling, fold=0, folds=10, canonical=None, given=None, train_on_val=False):
    """Assign every group to train, val or test. Returns {part: sorted condition or group names}.

    groups: [(condition, covariate)] without controls. spelling: {condition: first spelling in the file}.
    name: additive | holdout | cv | combo | transfer | unseen, or one whose parts are `given`, as in a file or a column;
    'all' trains on every condition. fold: seed 42 + fold, except cv where it picks the test fold; it tests each double
    once, or each single where there are no doubles. train_on_val: the validation conditions train too.
    """
    conditions = sorted({c for c, _ in groups})
    multiple = sorted((c for c in conditions if "+" in c), key=lambda c: spelling.get(c, c))
    val, test = [], []                  # conditions or groups; what is in both is test
    if given is not None:
        val, test = _given_split(name, groups, canonical, given)
    elif name == "transfer":
        val, test = _transfer(groups, np.random.RandomState(42 + fold))
    elif name != "all":
        val, test = _held_out(name, conditions, multiple, fold, folds)
    held = dict.fromkeys([] if train_on_val else val, "val") | dict.fromkeys(test, "test")
    groups_of = {condition: {} for condition in conditions}         # {its group: part}
    for condition, covariate in groups:
        group = group_name(condition, covariate)
        groups_of[condition][group] = held.get(group) or held.get(condition, "train")
    split = {part: set() for part in PARTS}
    for condition, part_of in groups_of.items():
        apart = len(set(part_of.values())) > 1
        for group, part in part_of.items():
            split[part].add(group if apart else condition)
    for part, use in (("test", "to predict"), ("train", "to learn from")):
        if not split[part] and name != "all":
            raise DataError(f"--split {name}: no {part} condition, nothing {use}; choose another: cv, unseen, transfer "
                            f"and split files need no doubles (conditions here: {len(conditions)}, of them "
                            f"combinations: {len(multiple)})")
    return {part: sorted(names) for part, names in split.items()}


def _held_out(name, conditions, multiple, fold, folds):
    """Validation and test conditions of a split by conditions. multiple: those of several perturbations."""
    rng = np.random.RandomState(42 + fold)
    if name == "additive":      # official scDFM folds: data.py:128-141; validation is ours
        rng.shuffle(multiple)
        n_test, n_val = max(1, int(0.3 * len(multiple))), int(0.1 * len(multiple))
        return multiple[n_test:n_test + n_val], multiple[:n_test]
    if name == "cv":
        pool = multiple or conditions
        if not 3 <= folds <= len(pool):
            raise DataError(f"--split cv with --folds {folds}: 3 or more are needed, a condition each, of {len(pool)}")
        if fold >= folds:
            raise DataError(f"--fold {fold}: folds are numbered 0 to {folds - 1}")
        parts = np.array_split(np.random.RandomState(42).permutation(pool), folds)
        return parts[(fold + 1) % folds], parts[fold]
    if name == "combo":         # PerturBench: 91 of 131 held out, 45 val, 46 test
        rng.shuffle(multiple)
        n = int(0.7 * len(multiple))
        return multiple[:n // 2], multiple[n // 2:n]
    if name not in ("holdout", "unseen"):
        raise DataError(f"--split {name}: unknown; choose additive, holdout, cv, combo, transfer, unseen, all, "
                        "combosciplex, FILE.json or obs:COLUMN")
    pool = multiple if name == "holdout" else [c for c in conditions if "+" not in c]
    genes = sorted({g for c in pool for g in c.split("+")})
    rng.shuffle(genes)
    if name == "holdout":
        n_test = min(12, max(1, round(0.12 * len(genes))))
        n_val = n_test // 2
    else:                       # GEARS: 75% of the singles are training
        n_test, n_val = max(1, round(0.25 * len(genes))), round(0.10 * len(genes))
    chosen = set(genes[n_test:n_test + n_val]), set(genes[:n_test])
    return [[c for c in conditions if of & set(c.split("+"))] for of in chosen]


def _transfer(groups, rng):
    """Validation and test groups, each perturbation held out in at most one covariate (PerturBench)."""
    covariates = sorted({v for _, v in groups})
    where = {}
    for condition, covariate in sorted(groups):
        where.setdefault(condition, []).append(covariate)
    where = {c: v for c, v in where.items() if len(v) > 1}
    if not where:
        raise DataError("--split transfer: no perturbation was measured in two covariates "
                        f"({listed(filter(None, covariates))}); name them with --covariates cell_type")
    if len(where) < 4:          # few perturbations, many covariates (Kang): hold 30% of the covariates out for each
        pairs = []
        for condition, present in where.items():
            n = min(len(present) - 1, max(1, round(0.3 * len(present))))
            pairs += [(covariate, condition) for covariate in rng.permutation(present)[:n]]
        pairs.sort()
        held = [[group_name(*pairs[i][::-1]) for i in rng.permutation(len(pairs))]]
    else:
        out, cap = {v: [] for v in covariates}, max(1, int(0.3 * len(where)))
        for condition in rng.permutation(list(where)):
            free = [v for v in where[condition] if len(out[v]) < cap]
            if free:
                covariate = free[rng.randint(len(free))]
                out[covariate].append(group_name(condition, covariate))
        held = list(out.values())
    return [g for of in held for g in of[:len(of) // 2]], [g for of in held for g in of[len(of) // 2:]]


def _read_split(name, cells):
    """{part: names} of a user's split: {"train", "val", "test"} or {"test"} alone in a file, or an obs column of parts;
    or of the paper's for one file. None for the split of another name."""
    if name == "combosciplex":
        return {"test": COMBOSCIPLEX}
    if not name.startswith("obs:") and not name.endswith(".json"):
        return None
    try:
        if name.endswith(".json"):
            pairs = json.loads(Path(name).read_text(encoding="utf-8-sig"), object_pairs_hook=list)
        else:
            members = {}
            labels = zip(cells.condition, cells.covariate, cells.obs(name[4:], "--split"))
            for condition, covariate, part in sorted(set(labels)):
                if condition != CONTROL:
                    members.setdefault(part, []).append(group_name(condition, covariate))
            pairs = members.items()
        given = {}
        for spelling, names in pairs:
            part = {"valid": "val", "validation": "val"}.get(spelling, spelling)
            if part not in PARTS or part in given:
                raise ValueError(f"'{spelling}' is no part" if part not in PARTS else f"'{part}' is there twice")
            if not isinstance(names, list):
                raise ValueError(f"no list of condition names under '{spelling}'")
            given[part] = names
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", error)          # of a file that is not there, just that
        raise DataError(f"--split {name}: cannot be read as a split ({reason}); a file needs "
                        '{"train": [...], "val": [...], "test": [...]} or {"test": [...]}, a column train, val and '
                        "test") from None
    return given


def _given_split(name, groups, canonical, given):
    """Validation and test groups of names in any order and control form, whole conditions or single groups."""
    members = {}
    for condition, covariate in groups:
        group = group_name(condition, covariate)
        members.setdefault(condition, []).append(group)
        members[group] = [group]
    part_of = {}
    for part in PARTS:
        for entry in map(str, given.get(part, ())):
            label, covariate = split_group(entry)
            condition = canonical(label)
            if condition and condition not in members:      # the file may spell its controls in another way: A+ctrl
                condition = "+".join(t for t in condition.split("+") if not is_control_label(t)) or CONTROL
            if condition == CONTROL:
                continue                    # controls are shared by all parts, as in the split files of GEARS
            whole = group_name(condition, covariate)
            if whole not in members:
                raise DataError(f"--split {name}: {part} condition '{entry}' has no cells in the data; remove it")
            for group in members[whole]:
                if part_of.setdefault(group, part) != part:
                    raise DataError(f"--split {name}: '{entry}' is in both {part_of[group]} and {part}; a split is by "
                                    "condition, never by cell")
    missing = sorted({group_name(*group) for group in groups} - set(part_of))
    if "train" in given and missing:
        raise DataError(f"--split {name}: {len(missing)} of {len(groups)} conditions are in no part "
                        f'({listed(missing)}); list them, or leave "train" out: the rest then trains')
    return [[group for group, p in part_of.items() if p == part] for part in ("val", "test")]


# ------------------------------------------------------------------------------------------------ the data set

class Dataset:
    """Log-normalised cells of one split, ready to sample. Rows of X are cells, columns the G genes of the panel.

    genes [G], eval_genes (E,) columns that are evaluated; groups [names], condition, covariate: per group, controls
    first (one control group per covariate); perturbations [P] sorted; pert_gene (P,) their column in the panel, or -1;
    split {part: names}; fit_rows: training cells and training controls, the only cells that anything may be fitted on.
    """

    def __init__(self, cells, split, config, device="cpu"):
        self.source, self.split = cells, split
        self.config, self.device = config, torch.device(device)
        self.file_scale = cells.scale
        pairs = sorted(cells.pairs.items(), key=lambda pair: pair[0][0] != CONTROL)
        self.rows = {group_name(*pair): rows for pair, rows in pairs}
        self.groups = list(self.rows)
        self.condition = [split_group(group)[0] for group in self.groups]
        self.covariate = [split_group(group)[1] for group in self.groups]
        self.perturbations = sorted({p for c in self.condition if c != CONTROL for p in c.split("+")})
        controls = {v: rows for (condition, v), rows in pairs if condition == CONTROL}
        self.control_rows = _control_parts(controls, config.control_split)
        self.fit_rows = np.sort(np.concatenate([self.rows[g] for g in self.part("train")]
                                               + list(self.control_rows["train"].values())))

    X = property(lambda self: self.source.X)                # (n, G) log1p CP10k: X[rows] is CSR float32
    genes = property(lambda self: self.source.genes)

    def part(self, name):
        """Groups (never controls) of 'train', 'val' or 'test'."""
        names = set(self.split[name])
        return [g for g, c in zip(self.groups, self.condition) if c != CONTROL and (g in names or c in names)]

    def most_expressed(self, n):
        """Columns of the n genes of the highest mean (log1p CP10k) in training controls, sorted."""
        controls = np.sort(np.concatenate(list(self.control_rows["train"].values())))
        mean = gene_moments(self.X, controls)[0] / len(controls)
        return np.sort(np.argsort(-mean, kind="stable")[:n])

    def prepare_sampling(self):
        """Index of every group, training controls only, and the dense matrix when it fits --cache-gb, on the device.
        Where the matrix is not resident the index (`index_device`) is on the CPU, so that drawing rows waits for
        nothing."""
        n, G = self.X.shape
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32  # log1p CP10k in fp16: 3 decimal digits
        self.dense, self.index_device = None, torch.device("cpu")
        if not self.config.backed and n * G * dtype.itemsize <= self.config.cache_gb * 2**30:
            self.index_device = self.device
            self.dense = torch.empty((n, G), dtype=dtype, device=self.device)
            for rows, part in blocks(self.X, "moving the cells to the device"):
                self.dense[rows[0]:rows[-1] + 1] = torch.from_numpy(part.toarray()).to(self.device, dtype)
        training = {group_name(CONTROL, v): rows for v, rows in self.control_rows["train"].items()}
        rows = list((self.rows | training).values())
        self._index = torch.from_numpy(np.concatenate(rows)).to(self.index_device)
        self._size = torch.tensor([len(r) for r in rows], device=self.index_device)
        self._start = self._size.cumsum(0) - self._size
        control = [self.covariate.index(v) for v in self.covariate]         # the first of a covariate, of all groups
        self._control = torch.tensor(control, device=self.index_device)

    def draw(self, groups, n, generator=None):
        """Rows of n cells, with replacement, from each group, of training controls where it is one: groups (C,) long ->
        (C * n,) long, both on `index_device`, where a generator has to be."""
        groups = groups.to(self.index_device)
        u = torch.rand(len(groups), n, generator=generator, device=self.index_device, dtype=torch.float64)
        offset = (u * self._size[groups, None]).long()
        return self._index[self._start[groups, None] + offset].flatten()

    def gather(self, rows, genes=None):
        """Values of some cells, for some genes: (n,) long, (S,) long or None -> (n, S) float32 on the device."""
        if self.dense is not None:
            x = self.dense.index_select(0, rows)
        else:
            x = torch.from_numpy(self.X[rows.cpu().numpy()].toarray())
            if self.device.type == "cuda":          # a pinned batch is copied while the host goes on
                x = x.pin_memory()
            x = x.to(self.device, non_blocking=True)
        return (x if genes is None else x.index_select(1, genes)).float()

    def controls_for(self, groups):
        """Index of the control group (same covariates) of each group: (C,) long -> (C,) long on `index_device`."""
        return self._control[groups.to(self.index_device)]

    def sizes(self, part, most, exact=False):
        """{group: cells to generate}: as many as the real condition has, at most `most`; or exactly `most`."""
        return {g: most if exact else min(len(self.rows[g]), most) for g in self.part(part)}

    def cells(self, group, genes=None):
        """All real cells of a group as float32 (n, G'), genes: column indices or None for all."""
        return Rows(self.X, self.rows[group], genes)[:]

    def populations(self, part, genes=None):
        """Lazy mapping {group: (n, G')} of the perturbed cells of a part, for metrics.evaluate."""
        return Lazy(self.part(part), lambda group: self.cells(group, genes))

    def control_cells(self, part, genes=None):
        """{covariate: Rows} of a part's control cells, to be read when indexed."""
        return {v: Rows(self.X, rows, genes) for v, rows in self.control_rows[part].items()}

    def controls(self, part="train", genes=None):
        """Lazy mapping {covariate: (n, G')} of the real control cells of a part."""
        cells = self.control_cells(part, genes)
        return Lazy(cells, lambda covariate: cells[covariate][:])

    def panel(self):
        """The plain facts of this data set that a model needs to predict."""
        trained = sorted({p for g in self.part("train") for p in split_group(g)[0].split("+")})
        keys = self.config.covariate_keys
        values = zip(*(covariate_values(name, len(keys)) for name in set(self.covariate)))
        covariates = {key: sorted(set(of_key)) for key, of_key in zip(keys, values)}
        mean = gene_moments(self.X, self.fit_rows)[0] / len(self.fit_rows)
        highest = np.zeros(len(self.genes), dtype=np.float32)
        for _, part in blocks(self.X, "looking for the highest values", self.fit_rows):
            highest = np.maximum(highest, part.max(axis=0).toarray()[0])
        return Panel(list(self.genes), self.eval_genes.tolist(), list(self.perturbations), self.pert_gene.tolist(),
                     trained, mean.tolist(), highest.tolist(), covariates, detected_medians(self.X, self.fit_rows))


class Rows:
    """Some cells of a matrix, read when indexed: cells[i] is float32 (len(i), G'), of all genes or of some columns."""

    def __init__(self, X, rows, genes=None):
        self.X, self.rows = X, rows
        self.genes = slice(None) if genes is None else genes

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.X[self.rows[i]][:, self.genes].toarray()


class Lazy(Mapping):
    """{name: read(name)} of what is too large to be held at once: read when asked for."""

    def __init__(self, names, read):
        self.names, self.read = names, read

    def __getitem__(self, name):
        return self.read(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def _control_parts(controls, shares):
    """{part: {covariate: rows}} of control cells {covariate: rows}: shared by all parts, or cut by --control-split."""
    if not shares:
        return {part: controls for part in PARTS}
    share = [float(s) for s in re.findall(r"-?\d*\.?\d+", shares)]
    if len(share) != 3 or min(share) <= 0 or abs(sum(share) - 1) > 1e-6:
        raise DataError(f"--control-split {shares}: give the shares of train,val,test, which sum to 1: 0.5,0.25,0.25")
    out, rng = {part: {} for part in PARTS}, np.random.RandomState(42)
    for covariate in sorted(controls):
        rows = rng.permutation(controls[covariate])
        cuts = np.round(np.cumsum(share[:2]) * len(rows)).astype(int)
        for part, piece in zip(PARTS, np.split(rows, cuts)):
            if len(piece) == 0:
                raise DataError(f"--control-split {shares}: {len(rows)} control cells {covariate} leave none for "
                                f"{part}; use fewer parts or share the controls")
            out[part][covariate] = np.sort(piece)
    return out


@dataclass
class Panel:
    """What a model knows of its data, as plain types: kept in its checkpoint, enough to predict without the file."""
    genes: list             # names of the G genes, in the order of the columns
    eval_genes: list        # columns that are evaluated
    perturbations: list     # names of the P perturbations of the file
    pert_gene: list         # column of each perturbation's gene, or -1
    trained: list           # perturbations that a training condition holds
    mean: list              # of each gene, over training and control cells: what stands in for a gene that was not seen
    highest: list           # largest value of each gene in these cells
    covariates: dict = field(default_factory=dict)  # {obs column: its values}, the columns of --covariates in order
    typical: list = field(default_factory=list)     # median of each gene's values there that are not 0

    def one_hot(self, groups, strict=True):
        """Covariates of groups CONDITION@COVARIATES, (n, values of all columns) float32. A value that the training file
        did not have is an error, or all zeros."""
        levels = [(column, value) for column, values in self.covariates.items() for value in values]
        out = torch.zeros(len(groups), len(levels))
        for i, group in enumerate(groups):
            values = covariate_values(split_group(group)[1], len(self.covariates))
            for level in zip(self.covariates, values):
                if level in levels:
                    out[i, levels.index(level)] = 1
                elif strict:
                    raise DataError(f"{group}: '{level[1]}' is no {level[0]} of the training file; it has "
                                    f"{listed(self.covariates[level[0]], 9)}")
        return out

    def known(self, unseen):
        """Names of perturbations that a model can predict; unseen: also genes that no training cell has perturbed."""
        return {*self.perturbations, *(self.genes if unseen else ())}

    def outside(self):
        """Perturbations that are no gene of the panel."""
        return [p for p, g in zip(self.perturbations, self.pert_gene) if g < 0]


def match_genes(have, want):
    """Where each wanted gene stands in a list of gene names, -1 where it is missing: [G], [E] -> (E,) int64."""
    where = {gene: i for i, gene in enumerate(have)}
    return np.array([where.get(gene, -1) for gene in want], dtype=np.int64)


def pick_rows(x, n, seed):
    """n rows of x, at random: without replacement while there are enough, else each as often as any other."""
    return x[np.random.default_rng(seed).permutation(max(n, len(x)))[:n] % len(x)]


def load(path, config=None, split="", fold=0, folds=10, device="cpu", train_on_val=False):
    """Read, label, filter, split, choose genes, log-normalise. Returns a Dataset; raises DataError.

    split: a name that make_split knows, a split file, or '' for none (then every condition is training). Cells are
    normalised over the genes that --min-cells leaves, as scanpy's usual script does; then come HVG.
    """
    config = config or DataConfig()
    if config.hvg_by == "mean" and config.hvg_on == "all":
        raise DataError("--hvg-on all: the mean of --hvg-by mean is of training controls; drop one of the two")
    cells = read_cells(path, config)
    notes = cells.notes
    if config.min_genes > 0:
        detected = np.concatenate([np.diff(part.indptr) for _, part in blocks(cells.X, "counting the cells' genes")])
        keep = detected >= config.min_genes
        notes.append(f"kept {int(keep.sum()):,} of {len(keep):,} cells with {config.min_genes} detected genes")
        cells.take(keep)
    lost = sorted(set(cells.covariate) - set(cells.covariate[cells.condition == CONTROL]))
    if lost:
        keep = ~np.isin(cells.covariate, lost)
        notes.append(f"dropped {int((~keep).sum()):,} cells of {len(lost)} covariate values without control cells "
                     f"({listed(lost, 4)})")
        cells.take(keep)
    groups = [pair for pair in cells.pairs if pair[0] != CONTROL]
    if not groups:
        raise DataError(f"{path}: no perturbed cells with controls beside them are left after quality control; lower "
                        "--min-genes, or match controls in fewer --covariates")
    if not split and config.hvg and config.hvg_by == "variance" and config.hvg_on == "train":
        raise DataError("--hvg chooses genes on the training cells of a split: add --split NAME, or --hvg-on all")
    parts = make_split(split or "all", groups, cells.spelling, fold, folds, cells.rules.canonical,
                       _read_split(split, cells), train_on_val)
    dataset = Dataset(cells, parts, config, device)
    _choose_panel(dataset, split)
    return dataset


def _choose_panel(dataset, split):
    """Genes of a data set: enough detections or perturbed, then --hvg of the log-normalised, the evaluation genes. The
    cells of the panel move into memory where they fit. Nothing after this sees another gene."""
    cells, config = dataset.source, dataset.config
    notes = cells.notes
    drugs = [split_dose(p)[0] for p in dataset.perturbations]
    perturbed = dataset.perturbations + drugs
    detected = sum(part.getnnz(axis=0) for _, part in blocks(cells.X, "counting the genes' cells", dataset.fit_rows))
    keep = (detected >= config.min_cells) | np.isin(cells.genes, perturbed)
    if not keep.any():
        raise DataError(f"{cells.path}: no gene is detected in {config.min_cells} training and control cells; lower "
                        "--min-cells")
    if not keep.all():
        of = ("training and control cells" if split else
              "cells, those that a later split tests included (--min-cells 0 drops none)")
        notes.append(f"kept {int(keep.sum()):,} of {len(keep):,} genes: perturbed, or detected in at least "
                     f"{config.min_cells} {of}")
        cells.keep_genes(keep)
        detected = detected[keep]
    choosing = 0 < config.hvg < len(cells.genes)
    rows = dataset.fit_rows if config.hvg_on == "train" else np.arange(cells.X.shape[0])
    sums = lognormalise(cells, rows if choosing and config.hvg_by == "variance" else ())
    if choosing:
        keep = np.isin(cells.genes, perturbed)
        if config.hvg_by == "mean":
            chosen = "of the highest mean in training controls"
            keep[dataset.most_expressed(config.hvg)] = True
        else:
            chosen = f"highly variable in {'training and control' if config.hvg_on == 'train' else 'ALL'} cells"
            keep |= highly_variable(*sums, len(rows), config.hvg)
        notes.append(f"chose {int(keep.sum()):,} genes: {config.hvg:,} {chosen}, and the perturbed")
        cells.keep_genes(keep)
        detected = detected[keep]
    stored = detected.sum() / len(dataset.fit_rows) * cells.X.shape[0]      # values of the panel, as near as matters
    if isinstance(cells.X, StoredRows) and not config.backed and 8 * stored <= config.cache_gb * 2**30:
        cells.X = cells.X.in_memory()
    with_dose, without = (match_genes(cells.genes, names) for names in (dataset.perturbations, drugs))
    dataset.pert_gene = np.where(with_dose >= 0, with_dose, without)
    dataset.eval_genes = dataset.most_expressed(config.eval_genes or len(cells.genes))
    silent = [p for p, i in zip(dataset.perturbations, dataset.pert_gene) if i < 0]
    if silent:
        notes.append(f"{len(silent)} of {len(dataset.perturbations)} perturbations are no gene of the panel "
                     f"({listed(silent, 4)}): each gets an embedding of its own")


# ------------------------------------------------------------------------------------------------ writing

@contextlib.contextmanager
def atomic(path):
    """Write to a temporary file beside `path` and rename: a reader, a crash or a full disk never sees half a file."""
    path = Path(path)
    if path.exists() and not path.is_file():            # renaming would put a file in the place of /dev/null
        raise DataError(f"{path}: cannot be written (it is a folder or a device); name a file with --out")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):      # renamed, or its folder could not be made
                temporary.unlink()


@contextlib.contextmanager
def writing(path):
    """Around writing: what the system refuses is one clear DataError."""
    try:
        yield
    except (OSError, RuntimeError) as error:        # h5py and torch report a full disk as the one or the other
        raise DataError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]}); free some space, or choose "
                        "another folder with --out") from None


def write_json(path, content):
    """A JSON file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_table(path, header, rows):
    """A tab-separated file, atomically."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines("\t".join(map(str, row)) + "\n" for row in [header, *rows])


class _Disk(io.FileIO):
    """A file for h5py that raises a failed write when it is closed: HDF5 crashes when the disk is full as it writes."""
    failure = None

    def write(self, content):
        content = memoryview(content).cast("B")
        done = 0
        try:
            while done < len(content) and not self.failure:
                done += super().write(content[done:])
        except OSError as error:
            self.failure = error
        return len(content)

    def truncate(self, size=None):
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = error

    def __exit__(self, *exception):
        self.close()
        if self.failure:
            raise self.failure


def _write(parent, name, value):
    """A value as anndata encodes it: dict, text, number, or an array of one of these."""
    if isinstance(value, dict):
        _encode(parent.create_group(name), "dict", "0.1.0")
        for key, item in value.items():
            _write(parent[name], key, item)
        return
    value = np.asarray(value)
    kind = "array" if value.ndim else "numeric-scalar"
    if value.dtype.kind in "OU":
        kind = "string-array" if value.ndim else "string"
        value = value.astype(h5py.string_dtype())
    _encode(parent.create_dataset(name, data=value), kind)


def _encode(node, kind, version="0.2.0"):
    """The attributes by which anndata knows what a node is."""
    node.attrs["encoding-type"], node.attrs["encoding-version"] = kind, version


def _write_frame(parent, name, index, columns):
    """obs or var; text becomes categorical, as anndata writes it."""
    group = parent.create_group(name)
    _encode(group, "dataframe")
    group.attrs["_index"] = "_index"
    group.attrs.create("column-order", list(columns), dtype=h5py.string_dtype(), shape=(len(columns),))
    _write(group, "_index", np.asarray(index, dtype=object))
    for key, values in columns.items():
        values = np.asarray(values)
        if values.dtype.kind not in "OU":
            _write(group, key, values)
            continue
        names, codes = np.unique(values.astype(object), return_inverse=True)
        node = group.create_group(key)
        _encode(node, "categorical")
        node.attrs["ordered"] = False
        _write(node, "codes", codes.astype(np.int32 if len(names) > 127 else np.int8))
        _write(node, "categories", names)


def write_h5ad(path, X, obs, genes, uns=None, names=None):
    """Write a valid AnnData file, atomically. X: (n, G) ndarray or sparse matrix, or its rows as CSR blocks one after
    another; obs {column: n values}, genes [G] unique, uns {key: str, number, array or dict}, names [n] cell names.
    Opens in anndata and scanpy without a warning. CSR lies in pieces without compression, as StoredRows reads it."""
    n, G = X.shape if hasattr(X, "shape") else (len(next(iter(obs.values()))), len(genes))
    with atomic(path) as temporary, _Disk(temporary, "w+") as disk, h5py.File(disk, "w") as file:
        _encode(file, "anndata", "0.1.0")
        if isinstance(X, np.ndarray):
            _write(file, "X", np.ascontiguousarray(X))
        else:
            group, indptr = file.create_group("X"), [np.zeros(1, dtype=np.int64)]
            data, indices = (group.create_dataset(key, (0,), dtype, maxshape=(None,), chunks=(65536,))
                             for key, dtype in (("data", np.float32), ("indices", np.int32)))
            for block in [X.tocsr()] if sp.issparse(X) else X:
                end = indptr[-1][-1]
                for dataset, values in ((data, block.data), (indices, block.indices)):
                    dataset.resize((end + len(values),))
                    dataset[end:] = values
                indptr.append(end + block.indptr[1:].astype(np.int64))
            indptr = np.concatenate(indptr)
            group["indptr"] = indptr.astype(np.int32) if indptr[-1] < 2**31 else indptr
            _encode(group, "csr_matrix", "0.1.0")
            group.attrs["shape"] = np.array([n, G], dtype=np.int64)
        _write_frame(file, "obs", names if names is not None else [f"cell{i}" for i in range(n)], obs)
        _write_frame(file, "var", genes, {})
        for name in ("layers", "obsm", "varm", "obsp", "varp"):
            _write(file, name, {})
        _write(file, "uns", uns or {})


def write_prepared(path, dataset):
    """The data set as a plain AnnData file: log1p CP10k CSR, cells grouped by condition, one range each."""
    cells = dataset.source
    rows = np.concatenate([dataset.rows[g] for g in dataset.groups])
    obs = {"condition": cells.condition[rows]}
    obs |= {key: cells.obs(key)[rows] for key in dataset.config.covariate_keys}
    notes = [note for note in cells.notes if not note.startswith("streamed")]  # where cells lay is no fact of the data
    uns = {"preprocessing": {"scale": "log1p CP10k", "source": Path(cells.path).name,
                             "notes": np.array(notes, dtype=object), "min_genes": dataset.config.min_genes,
                             "min_cells": dataset.config.min_cells, "hvg": dataset.config.hvg}}
    parts = (part for _, part in blocks(cells.X, "writing the cells", rows))
    write_h5ad(path, parts, obs, cells.genes, uns, _unique(cells.names[rows])[0])


# ------------------------------------------------------------------------------------------------ the demo

INTERACTIONS = {"additive": 1.0, "synergistic": 1.6, "suppressing": 0.4, "epistatic": 1.0}  # factor on the effects


class Screen:
    """What the simulator knows: conditions [C], controls first, and their kinds ("none", "single", or of INTERACTIONS),
    shifts (C, genes) of log expression in a cell that responds; and how cells come of it.

    Regulators (TF1, TF2, ...) belong to modules; a module is a sparse set of target genes, and each regulator adds
    targets of its own. In every cell a regulator's activity varies and moves its own expression and its targets, so
    co-expression in control cells foretells what activating it does. A perturbation raises the activity in three of
    four cells (the others do not respond). Two regulators together act additively, more (synergistic), less
    (suppressing: same module) or only one counts (epistatic); which, depends on their modules alone, so that it can be
    learned from other doubles. Counts are negative binomial around library size x expression. With cell_types > 1 each
    type has its own baseline and responds with its own strength.
    """

    def __init__(self, genes=120, cell_types=1, seed=0):
        self.genes, self.rng = genes, np.random.default_rng(seed)
        rng = self.rng
        P, n_doubles = (16, 24) if genes < 1000 else (100, 130)
        self.names = [f"TF{i + 1}" for i in range(P)] + [f"GENE{i + 1}" for i in range(genes - P)]

        def sparse(shape, share, scale):
            return rng.normal(0, scale, shape) * (rng.random(shape) < share)
        self.effect = 0.8 * sparse((P // 4, genes), 0.25, 0.7)[np.arange(P) % (P // 4)] + sparse((P, genes), 0.10, 0.5)
        self.effect[:, :P] *= 0.3           # regulators are mostly moved by themselves
        self.own = np.eye(P, genes)
        self.baseline = rng.normal(0, 1.0 if genes < 1000 else 1.7, genes)
        self.type_shift = np.concatenate([np.zeros((1, genes)), sparse((cell_types - 1, genes), 0.3, 0.8)])
        self.type_strength = np.concatenate([[1.0], rng.uniform(0.6, 1.2, cell_types - 1)])

        pairs = [(a, b) for a in range(P) for b in range(a + 1, P)]
        pairs = [pairs[i] for i in sorted(rng.choice(len(pairs), n_doubles, replace=False))]
        self.conditions = [CONTROL, *self.names[:P]]
        self.kinds = ["none"] + ["single"] * P
        self.shifts = [np.zeros(genes), *(2.5 * (self.effect + self.own))]  # 2.5: five standard deviations of activity
        for a, b in pairs:
            self.conditions.append("+".join(sorted((self.names[a], self.names[b]))))
            self.kinds.append(self.kind(a, b))
            self.shifts.append(self.double(a, b, self.kind(a, b)))
        self.shifts = np.stack(self.shifts)

    def double(self, a, b, kind):
        """(genes,) shift of two regulators together, were their interaction of this kind; epistatic: a alone counts."""
        joint = self.effect[a] if kind == "epistatic" else self.effect[a] + self.effect[b]
        return 2.5 * (INTERACTIONS[kind] * joint + self.own[a] + self.own[b])

    def any_double(self, condition, n, rng):
        """(n, genes) shifts of a double whose interaction is not known: in each cell it is that of two at random."""
        a, b = sorted(self.names.index(name) for name in condition.split("+"))
        out = []
        for _ in range(n):
            c, d = rng.choice(len(self.own), 2, replace=False)
            out.append(self.double(a, b, self.kind(c, d)) if c < d else self.double(b, a, self.kind(c, d)))
        return np.stack(out)

    def cells(self, shifts, types, rng):
        """(n, genes) log1p CP10k of fresh cells of these shifts (n, genes) and types (n,)."""
        counts = self.counts(self.rates(shifts, types, rng), self.depths(len(types), rng), rng)
        return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))

    def kind(self, a, b):
        """Of the interaction of two regulators."""
        modules = len(self.own) // 4
        if a % modules == b % modules:
            return "suppressing"
        return ("additive", "synergistic", "epistatic")[(a % modules + b % modules) % 3]

    def rates(self, shifts, types, rng):
        """(n, genes) shares of the counts that n cells of these shifts (n, genes) and types (n,) have on average."""
        activity = rng.normal(0, 0.5, (len(types), len(self.own)))
        responds = (rng.random(len(types)) < 0.75) * self.type_strength[types]
        rate = self.baseline + self.type_shift[types] + activity @ (self.effect + self.own) + responds[:, None] * shifts
        rate = np.exp(rate - rate.max(axis=1, keepdims=True))
        return rate / rate.sum(axis=1, keepdims=True)

    def depths(self, n, rng):
        """(n,) expected counts of n cells: large, since one value in ten is zero, as measured."""
        return self.genes * (6 if self.genes < 1000 else 0.45) * rng.lognormal(0, 0.3, n)

    def counts(self, rates, depths, rng):
        """(n, genes): gamma-Poisson, dispersion 1/5."""
        return rng.poisson(rates * (depths[:, None] * rng.gamma(5.0, 1 / 5.0, rates.shape)))


def simulate(path, cells=0, genes=120, cell_types=1, seed=0):
    """Write a simulated Perturb-seq file of raw counts; uns holds the truth, for tests only.

    cells: total, a part in eleven of it controls; 0 for 400 controls and 100 of each condition, per cell type, which
    obs.cell_type names if there are several.
    """
    if genes < 40 or cell_types < 1 or min(cells, seed) < 0:
        raise DataError(f"demo: --genes {genes} --cell-types {cell_types} --cells {cells} --seed {seed}: at least 40 "
                        "genes and one cell type are needed, and nothing below 0")
    screen = Screen(genes, cell_types, seed)
    rng, conditions = screen.rng, np.array(screen.conditions, dtype=object)
    n_conditions = len(conditions) - 1
    total = cells or (400 + 100 * n_conditions) * cell_types
    n_control = total // 11 if cells else 400 * cell_types
    label = np.concatenate([np.zeros(n_control, np.int64), 1 + np.arange(total - n_control) % n_conditions])
    kind = (np.arange(total) // n_conditions) % cell_types
    kind[:n_control] = np.arange(n_control) % cell_types
    shuffle = rng.permutation(total)
    label, kind = label[shuffle], kind[shuffle]
    depth = screen.depths(total, rng)
    truth = np.zeros((len(conditions), genes))
    step = max(1, BLOCK_NNZ // genes)

    def pieces():                           # written one by one, and nothing is kept but the sums of the truth
        for i in range(0, total, step):
            c = label[i:i + step]
            rates = screen.rates(screen.shifts[c], kind[i:i + step], rng)
            np.add.at(truth, c, np.log1p(1e4 * rates))
            yield sp.csr_matrix(screen.counts(rates, depth[i:i + step], rng).astype(np.float32))
        truth[:] /= np.maximum(np.bincount(label, minlength=len(conditions)), 1)[:, None]

    obs = {"condition": conditions[label]}
    if cell_types > 1:
        obs["cell_type"] = np.array([f"type{i + 1}" for i in range(cell_types)], dtype=object)[kind]
    uns = {"truth_conditions": conditions, "truth_interactions": np.array(screen.kinds, dtype=object),
           "truth_means": truth, "simulator": "data.py demo", "seed": seed}
    write_h5ad(path, pieces(), obs, screen.names, uns)


def path_of(config):
    """The file of --data. The demo is simulated on first use, with two cell types where covariates are asked for, in
    runs/, or beside --out where runs/ cannot be written."""
    if config.data != "demo":
        return config.data
    folder = Path("runs")
    if not os.access(folder if folder.is_dir() else ".", os.W_OK):
        folder = Path(config.out or "runs/demo").parent
    path = folder / ("demo-v1-2types.h5ad" if config.covariates else "demo-v1.h5ad")     # v1: change with the simulator
    if not path.exists():
        simulate(path, cell_types=2 if config.covariates else 1)
    return path


# ------------------------------------------------------------------------------------------------ prior knowledge

def _records(path, parse, wanted, header=False):
    """parse(line) of every line of a text file: plain, .gz, or the first member of a .zip; empty lines are left out.
    One for which parse raises ValueError is an error that says what is `wanted`; the first line may be a header."""
    try:
        if path.endswith(".zip"):
            archive = zipfile.ZipFile(path)
            handle = io.TextIOWrapper(archive.open(archive.namelist()[0]), "utf-8-sig")
        else:
            handle = (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig")
        with handle:
            for number, line in enumerate(handle, 1):
                try:
                    if line.strip():
                        yield parse(line.rstrip("\r\n"))
                except ValueError:
                    if number > 1 or not header:
                        raise DataError(f"{path}: line {number}: expected {wanted}, found '{line[:40].strip()}'; mend "
                                        "or remove it") from None
    except (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, IndexError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}); check the path, or download it again") from None


def aligned_vectors(path, names):
    """Vectors for some names, (n, p) float32, of an .npz (names, emb), a .pt ({name: tensor}) or a .tsv or .csv (name,
    numbers), and known (n,) bool: zeros where the file has none, or has zeros, as some files do. Pickled objects are
    not loaded."""
    length = []

    def vector(line):
        name, *values = line.split("," if ".csv" in Path(path).name else "\t")
        row = np.array(values, dtype=np.float32)
        if len(row) != (length or [len(row)])[0]:
            raise ValueError
        length.append(len(row))
        return name, row

    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                found, rows = file["names"].tolist(), np.asarray(file["emb"], np.float32)
        elif path.endswith(".pt"):
            table = torch.load(path, map_location="cpu", weights_only=True)
            found, rows = list(table), np.stack([table[name].float().numpy() for name in table])
        else:
            found, rows = zip(*_records(path, vector, "a name and as many numbers as elsewhere", header=True))
            rows = np.stack(rows)
        if rows.ndim != 2 or len(found) != len(rows) or not np.isfinite(rows).all():
            raise ValueError(f"{len(found)} names, vectors of shape {rows.shape}, perhaps NaN")
    except DataError:
        raise
    except Exception as error:                  # np.load and torch.load raise many types on other content
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read ({reason}); it needs arrays 'names' and 'emb' (.npz), a dict {{name: "
                        "1-d tensor} (.pt), no pickled objects, or lines of a name and numbers (.tsv, .csv)") from None
    table = {str(name).upper(): row for name, row in zip(found, rows) if row.any()}
    nothing = np.zeros(rows.shape[1], dtype=np.float32)
    known = torch.tensor([name.upper() in table for name in names])
    return torch.from_numpy(np.stack([table.get(name.upper(), nothing) for name in names])), known


def gene_graph(path, info, genes, say):
    """Which genes interact, (G, G) float32, 0 or 1, symmetric, nothing on the diagonal: of STRING's protein.links
    (with its protein.info) or lines gene, gene[, score], separated by blanks, tabs or commas. Kept: no score, or at
    least 700 of 1,000 (0.7 where scores end at 1; paper 2.1)."""
    def protein(line):
        identifier, name, *_ = line.split("\t")
        return identifier, name

    def edge(line):
        first, second, *score = line.replace(",", " ").split()
        if len(score) > 1:
            raise ValueError
        return first, second, float(score[0]) if score else 1.0
    symbol = dict(_records(info, protein, "a protein and its name, separated by a tab")) if info else {}
    column = {gene.upper(): i for i, gene in enumerate(genes)}
    graph = torch.zeros(len(genes), len(genes))
    for first, second, score in _records(path, edge, "gene, gene and perhaps a score", header=True):
        a, b = (column.get(symbol.get(name, name).upper()) for name in (first, second))
        if None not in (a, b) and score >= (700 if score > 1 else 0.7):
            graph[a, b] = 1
    graph = graph.maximum(graph.T).fill_diagonal_(0)
    coverage(say, path, graph.any(0), "genes of the panel (by an edge to another)")
    return graph


def read_gmt(path):
    """{pathway: {GENE}} of a GMT file: name, description, genes, separated by tabs."""
    def pathway(line):
        name, _, *genes = line.split("\t")
        genes = {gene.strip().upper() for gene in genes} - {""}
        if not genes:
            raise ValueError
        return name, genes
    return dict(_records(path, pathway, "a name, a description and genes, separated by tabs"))


def gene_sets(path, genes, say):
    """Which of the genes are in the sets of read_gmt: (Q, G) float32, 0 or 1."""
    names, sets = [gene.upper() for gene in genes], list(read_gmt(path).values())
    member = torch.tensor([[name in of for name in names] for of in sets], dtype=torch.float32).view(-1, len(names))
    coverage(say, path, member.any(0), "genes of the panel")
    return member


def coverage(say, path, known, what):
    """Print how many of the names that are needed a file knows, known (n,) bool; under 20% are an error."""
    found, wanted = int(known.sum()), len(known)
    say(f"{path}: knows {found:,} of {wanted:,} {what}")
    if found < 0.2 * wanted:
        raise DataError(f"{path}: knows only {found:,} of {wanted:,} {what}; give a file of the same species and "
                        "naming (STRING's needs its protein.info), or none: a stand-in is made from the data")


# ------------------------------------------------------------------------------------------------ a run

CHECKPOINT_VERSION = 5
PREDICTING = {"controls", "cells", "all_genes", "as_counts", "as_"}         # flags of --ckpt --predict alone
FREE_ON_RESUME = {"device", "out", "data", "eval_every", "eval_cells", "exact_cells", "compile", "resume", "cache_gb",
                  "backed"}
FREE_WITH_CKPT = {"ckpt", "predict", "dtype", "seed", "zeros"} | PREDICTING


@dataclass
class RunConfig(DataConfig):
    """The flags that all methods share. A method's Config adds its own and overrides defaults."""
    data: str = "demo"              # AnnData file (.h5ad, .h5), or demo
    split: str = "additive"         # additive, holdout, cv, combo, transfer, unseen, all, FILE.json, obs:COLUMN
    fold: int = 0                   # which of the seeded splits
    folds: int = 10                 # number of folds of --split cv
    train_on_val: bool = False      # validation conditions train too, as in the papers
    seed: int = 0                   # weights, batches and samples; the split depends on --fold alone
    preset: str = ""                # recipe: demo (laptop) or paper; '' is demo for --data demo and paper otherwise
    out: str = ""                   # run folder; '' is runs/METHOD-DATA-SPLIT-fN-sN. With --ckpt: the file to write
    steps: int = 100_000            # length of the schedule
    batch_size: int = 64            # target cells per step and process
    lr: float = 1e-4                # learning rate
    zeros: typing.Literal["clamp", "detect"] = "clamp"  # small generated values: kept, or 0 or typical (as_measured)
    eval_every: int = 0             # score the validation conditions every so many steps; 0 never
    eval_cells: int = 1000          # cells generated per condition: as many as it really has, at most this
    exact_cells: bool = False       # just --eval-cells of every condition, however few are real
    device: str = ""                # cpu, cuda, cuda:1; '' takes the GPU if there is one
    dtype: typing.Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on GPUs that have it
    compile: bool | None = None     # torch.compile; default on for CUDA, off for CPU
    resume: bool = False            # go on with the run in its folder
    ckpt: str = ""                  # a run's ckpt.pt, to --predict with it
    predict: tuple[str, ...] = ()   # conditions to predict: A A+B A@covariates, or test for the run's test conditions
    controls: str = ""              # with --predict: AnnData file with your own control cells
    cells: int = 500                # with --predict: cells per condition
    all_genes: bool = False         # with --predict: every gene of the panel, not only the evaluation genes
    as_counts: bool = False         # with --predict: integer counts, as many in a cell as in its control cell
    as_: str = ""                   # with --predict: obs column, or COLUMN=LABEL of controls; COLUMN= leaves them out
    init: str = ""                  # start from another run's ckpt.pt, as far as its weights, genes and labels agree


def parse_run(method, doc, cls, presets, sampling, uses, argv=None):
    """Command line -> (Config, stored checkpoint or None). A new run starts from its preset, --resume and --ckpt from
    what was stored; a flag that contradicts it is an error. sampling: flags of the method that --ckpt may change; uses:
    those that say what --ckpt is for, besides --predict."""
    parser = Parser(prog=f"{method}.py", description=doc)
    add_flags(parser, cls, presets)
    typed = parser.parse(argv)
    state = None
    preset = typed.get("preset") or ("demo" if typed.get("data", "demo") == "demo" else "paper")
    if preset not in presets:
        raise DataError(f"--preset {preset}: unknown; choose from {', '.join(presets)}")
    config = cls(**presets[preset] | typed | {"preset": preset})
    if config.data == "demo" and config.split == "transfer":
        config.covariates = config.covariates or "cell_type"             # the demo has it then
    if not config.out:
        split = Path(config.split).stem.replace(":", "_")
        config.out = f"runs/{method}-{Path(config.data).stem}-{split}-f{config.fold}-s{config.seed}"
    if config.ckpt or config.resume:
        stored, state = load_checkpoint(config.ckpt or Path(config.out, "ckpt.pt"), method, cls)
        kept, free = {"out": config.out}, set(FREE_ON_RESUME)
        if config.ckpt:
            reading = {f.name: f.default for f in fields(ReadConfig) if f.name not in ("covariates", "dose_key")}
            kept = {"out": "pred.h5ad"} | (reading if config.controls else {})      # another file, other columns
            free |= FREE_WITH_CKPT | set(sampling) | {f.name for f in fields(DataConfig)}
        for name in sorted(set(typed) - free):
            if typed[name] != getattr(stored, name):
                raise DataError(f"{_flag(name)} {typed[name]}: this run was started with "
                                f"{_shown(getattr(stored, name))}; drop the flag, or start another run with --out")
        config = replace(stored, **kept | typed)
    uses = ["predict", *uses]
    if bool(config.ckpt) != sum(bool(getattr(config, name)) for name in uses):
        raise DataError(f"--ckpt FILE and {' or '.join(map(_flag, uses))} belong together; to go on with a run use "
                        "--resume")
    for name in [] if config.ckpt else sorted(PREDICTING & set(typed)):
        raise DataError(f"{_flag(name)}: belongs to --ckpt FILE --predict; remove it")
    if config.eval_every and (config.train_on_val or config.split == "all"):
        raise DataError(f"--eval-every {config.eval_every}: --split all and --train-on-val leave no validation "
                        "conditions to score; drop one of the two (--no-train-on-val)")
    column, _, label = config.as_.partition("=")
    if "/" in column or column in ["_index", *config.covariate_keys] or label and label in config.predict:
        raise DataError(f"--as {config.as_}: give COLUMN, or COLUMN=LABEL of the controls; neither may be in use")
    if config.ckpt and Path(config.out).exists():
        raise DataError(f"--out {config.out}: exists; choose another name, or remove it")
    if config.ckpt and process()[1] > 1:
        raise DataError("--ckpt: runs in one process; start it with python")
    check_numbers(vars(config), "steps batch_size lr cells eval_cells")
    if config.init and not state:
        load_checkpoint(config.init, method, None)      # refused before the data are read and a folder is made
    return config, state


def load_run(config, device="cpu"):
    """load() with a method's Config: its data (or the demo), split and fold."""
    return load(path_of(config), config, config.split, config.fold, config.folds, device, config.train_on_val)


def open_run(run, state):
    """Give a run its dataset and panel, say what it is, and write what is known before training to its folder, which is
    claimed; a resumed run must find the genes, conditions and split that it had. A refused run leaves no folder."""
    config, out = run.config, run.out
    unfinished = {"config.json", "split.json", "log.jsonl", ".lock"}   # of a run that ended before its checkpoint
    held = sorted(path.name for path in out.glob("*") if path.name not in unfinished and path.suffix != ".tsv")
    if run.rank == 0 and held and not state:
        raise DataError(f"{out}: already holds {listed(held, 3)}; go on with --resume, or choose another --out")
    dataset = load_run(config, run.device)
    panel = dataset.panel()
    if state:
        for name in ("genes", "eval_genes", "perturbations", "split"):
            if getattr(dataset if name == "split" else panel, name) != (state | state["panel"])[name]:
                raise DataError(f"--resume: --data {config.data} --split {config.split} no longer give the {name} of "
                                f"the run in {out}: a file has changed; restore it, or start another run with --out")
    dataset.prepare_sampling()
    run.dataset, run.panel = dataset, panel
    if run.rank == 0:
        claim(out)
        write_json(out / "config.json", asdict(config))
        write_json(out / "split.json", dataset.split)
        log = out / "log.jsonl"
        if log.exists():                        # a last line that was not written whole goes
            os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    precision = "bf16" if run.bf16 else "fp32"
    run.say(f"{run.method} on {config.data}, split {config.split}, fold {config.fold}, seed {config.seed}; preset "
            f"{config.preset}, {config.steps:,} steps; {run.device}, {precision}{', compiled' if run.compile else ''}; "
            f"folder {out}")
    for note in dataset.source.notes:
        run.say(f"note: {note}")
    if not dataset.split["test"]:
        run.say(f"note: no condition is held out: there will be no table and no pred.h5ad; predict with --ckpt {out}/"
                "ckpt.pt --predict")
    if config.preset != "demo" and run.device.type == "cpu" and not state:
        run.say("warning: a paper's configuration on a CPU: steps may take minutes; --preset demo is a recipe for "
                "laptops. Ctrl-C ends the run after its step, a second one at once")


_claims = []        # open lock files of this process: closing one gives its folder up


def claim(folder):
    """Make a run's folder and take it for this process until it ends, whatever the way; one that is taken is an
    error."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "w")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:                    # file systems without locks: nothing is claimed
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise DataError(f"{folder}: another run is using this folder; choose another --out") from None
    _claims.append(handle)


def save_checkpoint(run, step, content):
    """One dict of tensors and plain types, written beside the old checkpoint and renamed over it."""
    state = {"method": run.method, "version": CHECKPOINT_VERSION, "config": asdict(run.config), "stage": run.stage,
             "step": step, "seconds": run.journal.seconds(), "panel": asdict(run.panel), "split": run.dataset.split,
             "content": {name: part.state_dict() for name, part in content.items()}}
    with atomic(run.out / "ckpt.pt") as temporary:
        torch.save(state, temporary)


def load_checkpoint(path, method, cls):
    """(Config, stored dict) of a checkpoint of this method, whose Config is cls; without cls, of any method, (None,
    dict). DataError for anything else."""
    try:
        if zipfile.ZipFile(path).testzip():     # torch does not look whether its bytes are those that were written
            raise ValueError
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, version = state["method"], state["version"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such checkpoint; a run has its ckpt.pt after five minutes or when it is "
                        "stopped") from None
    except Exception as error:                  # torch.load raises many types on damaged files
        raise DataError(f"{path}: no checkpoint, or damaged ({type(error).__name__}); give a run's ckpt.pt") from None
    if version != CHECKPOINT_VERSION or cls and found != method:
        raise DataError(f"{path}: is a checkpoint of {found}, version {version}; {method} reads its own of version "
                        f"{CHECKPOINT_VERSION}: give another, or train again")
    with same_version(path):
        panel, split = Panel(**state["panel"]), state["split"]
        G, P = len(panel.genes), len(panel.perturbations)
        lengths = [len(values) for values in (panel.mean, panel.highest, panel.typical, panel.pert_gene)]
        columns = {-1, *panel.pert_gene, *panel.eval_genes}
        sound = lengths == [G, G, G, P] and columns <= set(range(-1, G)) and set(split) == set(PARTS)
        sound = sound and all(type(name) is str for names in split.values() for name in names)
        sound = sound and all(isinstance(state["content"].get(name, {}), dict) for name in ("model", "ema"))
        if not sound or not np.isfinite([panel.mean, panel.highest, panel.typical]).all():
            raise ValueError("its panel, split or content is no such")
        if not cls:
            return None, state
        kinds = typing.get_type_hints(cls) | {"stage": str, "step": int, "seconds": float, "content": dict}
        held = state["config"] | {name: state[name] for name in ("stage", "step", "seconds", "content")}
        for name in sorted(set(kinds) ^ set(held)):
            raise ValueError(f"its Config {'has' if name in held else 'lacks'} {name}")
        for name, value in held.items():
            if not _fits(value, kinds[name]):
                raise ValueError(f"its {name} is {value!r}")
        if "model" not in state["content"] or not 0 <= state["seconds"] < 1e9:
            raise ValueError("it has no model, or impossible seconds")
        return cls(**state["config"]), state


def _fits(value, kind):
    """Whether a value is of the type of a field."""
    of = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in of
    if typing.get_origin(kind) is tuple:
        return type(value) is tuple and all(_fits(each, of[0]) for each in value)
    return type(value) in (of or (kind,)) or kind is float and type(value) is int


@contextlib.contextmanager
def same_version(path):
    """Around the use of what a checkpoint holds: whatever does not fit the present code becomes a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{path}: made by another version of this file: {' '.join(str(error).split())[:400]}; use the "
                        "file that made it, or train again") from None


def restore(run, state, content):
    """Load a checkpoint into the content {name: model or optimiser} of a stage of training, or else, into the models of
    the first stage, what --init has: weights of the same name, along genes and perturbations by their names."""
    if state:
        with same_version(run.out / "ckpt.pt"):
            for name, part in content.items():
                part.load_state_dict(state["content"][name])
    if state or run.stage or not run.config.init:
        return
    path, panel = run.config.init, run.panel
    other = load_checkpoint(path, run.method, None)[1]
    old = Panel(**other["panel"])
    weights = other["content"].get("ema", other["content"].get("model", {}))
    for model in [content[name] for name in ("model", "ema") if name in content]:
        own = dict(model.named_parameters())
        taken = sum(take_over(own[name], weights[name], old, panel, run.config) for name in own.keys() & weights.keys())
    if not taken:
        raise DataError(f"--init {path}: no weight has the name and the size of one here; give a run of this method")
    new = sorted(set(panel.perturbations) - set(old.perturbations))
    run.say(f"--init {path}: {taken} of {len(own)} weights taken over; {len(set(panel.genes) - set(old.genes)):,} of "
            f"{len(panel.genes):,} genes are new, and {len(new)} perturbations: {listed(new)}")


@torch.no_grad()
def take_over(weight, stored, old, panel, config):
    """Copy a stored weight of the panel old, axis by axis. Returns whether it could be told what each axis follows: the
    names of one list, or none of them; a size that lists share, or a list and a layer, may be either."""
    columns = []                                # for each axis: where each of its rows stands in the stored one, or -1
    for have, want in zip(stored.shape, weight.shape):
        pairs = zip(axis_names(old, have), axis_names(panel, want))
        places = {tuple(match_genes(names, others)) for names, others in pairs if names and others}
        layer = any(have % getattr(config, name, have + 1) == 0 for name in ("width", "hidden", "latent"))
        if have == want and (layer or not places):
            places.add(tuple(range(have)))
        if len(places) != 1:
            return False
        columns.append(np.array(places.pop()))
    if stored.dim() == weight.dim():
        rows = np.ix_(*(column[column >= 0] for column in columns))
        weight[np.ix_(*(np.flatnonzero(column >= 0) for column in columns))] = stored[rows].to(weight)
    return stored.dim() == weight.dim()


def axis_names(panel, size):
    """The lists that an axis of this length may follow, None for those that it cannot: perturbations; these and
    covariates; genes, an empty token and what is no gene; genes, padded."""
    levels = [f"{column}={value}" for column, values in panel.covariates.items() for value in values]
    padding = [f"padding {i}" for i in range(min(40, size - len(panel.genes)))]
    lists = [panel.perturbations, panel.perturbations + levels, panel.genes + ["padding 0"] + panel.outside(),
             panel.genes + padding]
    return [names if len(names) == size else None for names in lists]


# ------------------------------------------------------------------------------------------------ training

CHECKPOINT_SECONDS = 300                                # between two checkpoints


def process():
    """(rank, world) of this process, as torchrun says; a RANK that is left over in an environment says nothing."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    numbers = [int(text) for text in map(os.environ.get, names) if text and text.isdecimal()]
    if len(numbers) < len(names) or numbers[0] >= numbers[1] or not os.environ.get("MASTER_ADDR"):
        raise DataError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} in the environment: several processes are started with "
                        f"torchrun, which sets {', '.join(names)} and MASTER_ADDR; unset it for one process")
    return numbers[0], numbers[1]


def pick_device(name):
    """The torch.device of --device, '' being the GPU if there is one; under torchrun each process has its own. On a
    GPU, matrix products of float32 may then use TF32."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK'] if process()[1] > 1 else 0}"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in ["cpu", *gpus]:
        raise DataError(f"--device {name}: is not here; use --device cpu, or a GPU that is visible: {listed(gpus, 9)}")
    device = torch.device(name)
    if name in gpus:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    return device


def join_processes(device):
    """(rank, world) of this process, which has joined the others, if there are any."""
    rank, world = process()
    if world > 1:                               # the others wait while the first process validates
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    return rank, world


def peak_memory(device):
    """Most memory that this process has had, in MB: of the GPU where it ran on one, else resident; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if os.name == "nt":
        return None
    import resource
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def seed_of(*what):
    """A seed of its own for every purpose: what is drawn beside it, or by whom, changes nothing."""
    return zlib.crc32(" ".join(map(str, what)).encode())


def schedule(optimizer, steps, warmup=0, least=0.0, overlap=""):
    """Learning rate from step to step: a linear warm-up, then a cosine down to the least (constant where that is the
    rate itself). overlap: the cosine begins at step 0, and the rate is the 'lower' of the two or their 'product'."""
    low, begin = least / optimizer.defaults["lr"], 0 if overlap else warmup

    def factor(step):
        warm = min(1.0, (step + 1) / (warmup + 1))
        part = min(1, max(0, step - begin) / max(1, steps - begin))
        cosine = low + (1 - low) * (1 + math.cos(math.pi * part)) / 2
        return warm * cosine if overlap == "product" else min(warm, cosine)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def average(ema, model, decay):
    """Averaged weights after a step: decay x the former + (1 - decay) x the model's. decay 0: none are kept."""
    if decay:
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class Signals:
    """SIGINT and SIGTERM in training: kept until a step has ended. A second one acts at once."""

    def __init__(self, say):
        self.say, self.came = say, 0

    def hold(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.keep)

    def release(self):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def keep(self, number, _):
        self.came = number
        self.release()
        self.say("\nsaving after this step; a second signal ends the run at once")

    def agreed(self, step, world, device):
        """The signal that came, or 0. Of several processes (world) all end at the same step, one of every ten."""
        if world == 1:
            return self.came
        if step % 10:
            return 0
        flag = torch.tensor(self.came, device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return flag.item()


class Journal:
    """What a stage of training leaves behind: lines of log.jsonl and on the console, now and then a checkpoint."""

    def __init__(self, run, state):
        self.run, now = run, time.perf_counter()
        self.logged = self.saved = self.began = now             # the first step, of the first stage
        if state:
            self.began = now - state["seconds"]
        elif run.journal:
            self.began = run.journal.began
        self.due = now + FIRST_LINE                             # the next line on the console
        self.sums, self.counted = 0.0, 0                        # losses since the last line of the log

    def seconds(self):
        """Since the first step, in this process and in those that it goes on from."""
        return time.perf_counter() - self.began

    def step(self, step, content, losses, last):
        """After a step: add its losses (), tensors; from time to time, and the last time, write."""
        run, now = self.run, time.perf_counter()
        self.sums = self.sums + torch.stack([value.detach() for value in losses.values()])
        self.counted += 1
        show, save = last or now > self.due, last or now > self.saved + CHECKPOINT_SECONDS
        if not show and not save and step % max(1, min(100, run.steps // 100)):
            return
        values = dict(zip(losses, (self.sums / self.counted).tolist()))     # the only wait for the device
        each = (time.perf_counter() - self.logged) / self.counted           # seconds
        self.log(step, values | {"cells_per_s": round(run.cells / each, 1)})
        if show:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            stage = "step" if run.stage == "training" else f"{run.stage} step"
            status_line(f"{stage} {step}/{run.steps}  {shown}  {run.cells / each:,.0f} cells/s  "
                        f"{clock(self.seconds())} elapsed  {clock((run.steps - step) * each)} left", last)
            self.due = now + NEXT_LINE
        if save and run.rank == 0:
            save_checkpoint(run, step, content)
            self.saved = now
        self.sums, self.counted = 0.0, 0
        self.logged = time.perf_counter()

    def log(self, step, values):
        """A line of log.jsonl, by the first process; a stage before the main one is named. DataError for a loss that is
        not finite."""
        run = self.run
        if not all(math.isfinite(value) for value in values.values() if isinstance(value, float)):
            raise DataError(f"training diverged before step {step}: the loss is not finite. Start again with a lower "
                            f"--lr and another --out; if there is a checkpoint in {run.out}, it is from before")
        if run.rank == 0:
            stage = {} if run.stage == "training" else {"stage": run.stage}
            with writing(run.out / "log.jsonl"), open(run.out / "log.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **stage, "seconds": round(self.seconds(), 4), **values}) + "\n")


# ------------------------------------------------------------------------------------------------ prediction

def trained_model(run, state, build):
    """The model that predicts, of a checkpoint; build (config, panel, weights) -> model, to be given these weights."""
    if "ema" not in state["content"]:
        raise DataError(f"{run.config.ckpt}: the run is still in an early stage, {state['stage']}; go on with --resume")
    with same_version(run.config.ckpt):
        run.panel = Panel(**state["panel"])
        weights = state["content"]["ema"]
        model = build(run.config, run.panel, weights)
        model.load_state_dict(weights)
    if state["step"] < run.config.steps:
        run.say(f"note: {run.config.ckpt}: training has done {state['step']} of {run.config.steps} steps")
    return model.to(run.device).eval()


def load_model(method, path, **changes):
    """(run, model) of a checkpoint, for method.predict() in a script of yours. method: the imported file; changes:
    fields of its Config, as device="cpu" or seed=1."""
    config, state = load_checkpoint(path, method.METHOD, method.Config)
    run = method.Run(replace(config, **{"ckpt": str(path), "device": ""} | changes))
    return run, trained_model(run, state, method.build)


def asked_conditions(texts, names, flag="--predict"):
    """[(condition, covariate)] of a flag, canonical, in any spelling that files may have: A_B, B|A, (+)-JQ1.
    names: the perturbations that the model knows. Raises DataError for others, and for controls."""
    pieces = {piece for text in texts for piece in {text} | _pieces(split_group(text)[0])}
    known = {piece for piece in pieces if perturbation_name(piece) in names}
    rules, asked = LabelRules((), known), []
    for text in texts:
        label, covariate = split_group(text)
        if perturbation_name(text) in names:                    # a name with '@' in it
            label, covariate = text, ""
        if not label.strip():
            raise DataError(f"{flag} '{text}': an empty name; give conditions such as A, A+B or A@covariates")
        tokens = rules.tokens(label.strip())
        tokens = [t for t in tokens if perturbation_name(t) in names or not rules.is_control(t)]
        if not tokens:
            raise DataError(f"{flag} {text}: names no perturbation; control cells are real, not predicted")
        for token in [token for token in tokens if perturbation_name(token) not in names]:
            members = [member for member in _JOINT.split(token) if member]
            strange = [member for member in members if member not in known]
            if 0 < len(strange) < len(members):                 # of A_B, the one that is not known
                token = strange[0]
            lower = {name.lower(): name for name in names}
            close = difflib.get_close_matches(perturbation_name(token).lower(), lower, 3)
            advice = f"did you mean {', '.join(lower[name] for name in close)}?" if close else "check its spelling"
            raise DataError(f"{flag} {text}: the model does not know '{token}', which was not in its training file; "
                            f"{advice}")
        asked.append(("+".join(sorted(set(map(perturbation_name, tokens)))), covariate))
    return asked


def read_controls(path, config, panel):
    """predict_controls of a user's file; genes that it lacks are at their training mean. A file without labels is all
    control cells."""
    cells = read_cells(path, config, perturbed_required=False, genes=panel.genes)
    lognormalise(cells)
    for note in cells.notes:
        print(f"note: {path}: {note}")
    column = match_genes(cells.genes, panel.genes)
    missing = np.flatnonzero(column < 0)
    if 2 * len(missing) > len(column):
        raise DataError(f"--controls {path}: lacks {len(missing):,} of the model's {len(column):,} genes "
                        f"({listed(panel.genes[i] for i in missing)}); genes are matched by name: choose the var "
                        "column that holds these names with --gene-key")
    if len(missing):
        print(f"note: {path} lacks {len(missing):,} of the model's {len(column):,} genes: they are at their training "
              "mean, and not in the prediction")
    controls, totals = {}, {}
    for (condition, covariate), rows in cells.pairs.items():
        if condition == CONTROL:
            x = np.tile(np.array(panel.mean, dtype=np.float32), (len(rows), 1))
            x[:, column >= 0] = cells.X[rows][:, column[column >= 0]].toarray()
            controls[covariate] = x
            totals[covariate] = None if cells.totals is None else cells.totals[rows]
    return controls, missing, totals


def predict_controls(run):
    """Control cells {covariate: (m, G)} to predict from, log1p CP10k: those of --controls, or of the run's data; which
    genes (M,) of the panel they lack; and their counts {covariate: (m,)}, None of cells that are log-normalised."""
    config, panel = run.config, run.panel
    if config.controls:
        return read_controls(config.controls, config, panel)
    dataset = load_run(config, run.device)
    if list(dataset.genes) != panel.genes:
        raise DataError(f"{config.data}: gives other genes than the model was trained on; name the training file with "
                        "--data, or your own control cells with --controls")
    controls, counts = dataset.control_cells("test"), dataset.source.totals
    return controls, [], {v: None if counts is None else counts[cells.rows] for v, cells in controls.items()}


def write_prediction(run, state, model, predict, unseen):
    """What --predict asks for, generated and written. predict: the method's; unseen: as Panel.known."""
    config, panel = run.config, run.panel
    test = config.predict == ("test",)          # the run's test conditions, perhaps of other cells
    asked = state["split"]["test"] if test else config.predict
    if test and not asked:
        raise DataError("--predict test: the run held no condition out; name the conditions")
    controls, missing, totals = predict_controls(run)
    if config.as_counts and any(counts is None for counts in totals.values()):
        raise DataError(f"--as-counts: {config.controls or config.data} holds log-normalised values, and so no library "
                        "sizes of control cells; give --controls with counts")
    columns = np.setdiff1d(np.arange(len(panel.genes)) if config.all_genes else panel.eval_genes, missing)
    sizes = {}
    for condition, covariate in asked_conditions(asked, panel.known(unseen)):
        anywhere = not covariate or test and covariate not in controls
        for value in sorted(controls) if anywhere else [covariate]:
            sizes[group_name(condition, value)] = config.cells
    untrained = sorted({p for g in sizes for p in split_group(g)[0].split("+")} - set(panel.trained))
    if untrained:
        run.say(f"note: {listed(untrained)}: in no training condition")
    cells = predict(run, model, sizes, controls, columns)
    write_populations(run, run.out, cells, controls, columns, totals if config.as_counts else None)
    run.say(f"wrote {run.out}: {len(cells)} predicted conditions, {'counts' if config.as_counts else 'log1p CP10k'}")
    if config.as_counts and len(columns) < len(panel.genes):
        run.say("note: scorers normalise counts over the genes of the file: --all-genes writes all that the model has")


def write_populations(run, path, pred, controls, columns, totals=None):
    """Predicted cells {group: (n, E)} of columns (E,) of the panel, and real control cells {covariate: (m, G)}, as one
    AnnData file, log1p CP10k; with totals {covariate: (m,)}, the control cells' counts, as counts. Labels by --as."""
    column, asked, label = run.config.as_.partition("=")
    real = {group_name(CONTROL, v): x[:][:, columns] for v, x in controls.items()}
    cells = pred | (real if label or not asked else {})
    labels = [split_group(group) for group, x in cells.items() for _ in range(len(x))]
    names = [label if label and condition == CONTROL else condition for condition, _ in labels]
    obs = {column or "condition": np.array(names, dtype=object)}
    keys = run.config.covariate_keys
    for i, key in enumerate(keys):
        obs[key] = np.array([covariate_values(name, len(keys))[i] for _, name in labels], dtype=object)
    if totals:
        cells = {group: _counts(x, totals[split_group(group)[1]], group in pred, seed_of(group, run.config.seed))
                 for group, x in cells.items()}
    uns = {"method": run.method, "scale": "counts" if totals else "log1p CP10k"}
    X = np.concatenate(list(cells.values())).astype(np.float32)
    write_h5ad(path, X, obs, [run.panel.genes[i] for i in columns], uns)


def _counts(x, totals, predicted, seed):
    """Counts of cells x (n, E) log1p CP10k: of control cells by their own totals (n,), of predicted ones by that of the
    control cell that predict() made each from, of totals (m,); these are rounded at random, so that means stay."""
    if not predicted:
        return np.rint(np.expm1(x) * totals[:, None] / 1e4)
    mean = np.expm1(x.astype(np.float64)) * pick_rows(totals, len(x), seed)[:, None] / 1e4
    return np.floor(mean + np.random.default_rng(seed).random(mean.shape))


def check_groups(panel, groups, controls, unseen):
    """Raise DataError for groups, CONDITION or CONDITION@COVARIATE, that a model of this panel cannot predict from
    control cells {covariate: (m, G)}. unseen: as Panel.known."""
    known, G = panel.known(unseen), len(panel.genes)
    for group in groups:
        condition, covariate = split_group(group)
        strange = sorted(set(condition.split("+")) - known)
        if strange:
            raise DataError(f"predict {group}: no perturbation {strange[0]}; known are {listed(sorted(known))}")
        if covariate not in controls:
            raise DataError(f"predict {group}: no control cells of '{covariate}'; choose from {listed(controls, 20)}, "
                            "or leave it out")
    for covariate, x in controls.items():
        if x[:1].shape[1] != G:
            raise DataError(f"predict: control cells '{covariate}' have {x[:1].shape[1]} genes; the model has {G}, in "
                            "the order of run.panel.genes")


def cells_at_once(device, size):
    """How many cells are generated together, where one takes `size` bytes of memory."""
    room = 0.5 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1.2e9
    return min(1024, max(1, int(room // size)))


def of_any_length(args):
    """Arguments of a compiled function, their tensors marked so that it is compiled for any length of the first one's
    first dimension, the number of cells."""
    tensors = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor) and a.dim()]
    for a in tensors:
        if len(a) == len(tensors[0]):
            torch._dynamo.maybe_mark_dynamic(a, 0)
    return args


def as_measured(cells, panel, columns, zeros="clamp", seed=0):
    """Generated cells (n, E) of one group, for columns (E,) of the panel, as values that a measurement can have: not
    below 0, nor above the gene's training maximum (log(10001) for a gene that is silent there).

    zeros="detect": expression has an atom at zero, which a flow does not learn. A value x below v, the gene's median
    detected value in training, becomes v with probability x / v and else 0. Cells are drawn systematically in random
    order, so a gene's mean moves by v / n at most; a cell then depends on its population. Returns the cells, float32,
    and how many values were capped. Raises DataError for values that are not finite.
    """
    if not np.isfinite(cells).all():
        raise DataError("the model generates values that are not finite: its training diverged, or its checkpoint is "
                        "damaged; train again with a lower --lr")
    highest = np.array(panel.highest, dtype=np.float32)[columns]
    highest = np.where(highest > 0, highest, np.float32(np.log(10_001)))
    capped = int((cells > highest).sum())
    cells = np.clip(cells, 0, highest).astype(np.float32)
    if zeros == "detect":
        typical = np.array(panel.typical, dtype=np.float32)[columns]
        rng = np.random.default_rng(seed)
        order = np.argsort(rng.random(cells.shape), axis=0)              # of the cells, for every gene
        x = np.take_along_axis(cells, order, axis=0)
        low = x < typical
        share = np.where(low, x / np.maximum(typical, 1e-6), 0).astype(np.float64)
        mass = np.cumsum(share, axis=0) + rng.random((1, x.shape[1]))
        detected = np.floor(mass) > np.floor(mass - share)               # where the running mass passes a whole number
        np.put_along_axis(cells, order, np.where(low, detected * typical, x), axis=0)
    return cells, capped


# ------------------------------------------------------------------------------------------------ command line

class Parser(argparse.ArgumentParser):
    """argparse with the project's error style, and without guessing abbreviated flags."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse(self, argv):
        """{field: value} of the flags that were given; lists as tuples."""
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(self.parse_args(argv)).items()}
        check_numbers(given)
        return given

    def error(self, message):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def add_flags(parser, cls, presets=None):
    """One flag per field of a dataclass: name, type and default from the field, help from the comment beside it, in a
    group for each class of the hierarchy. presets {name: {field: value}}: their values are shown beside the default.
    Flags that are not given are absent from what is parsed."""
    comments, group_of = {}, {}
    for base in reversed(cls.__mro__[:-1]):
        source = Path(inspect.getfile(base)).read_text(encoding="utf-8")  # inspect.getsource takes ten times as long
        body = re.search(rf"^class {base.__name__}\b.*?(?=^\S)", source, re.M | re.S)[0]
        comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", body, re.M))
        group = parser.add_argument_group(base.__name__.removesuffix("Config").lower() or "method")
        group_of = {name: group for name in vars(base).get("__annotations__", ())} | group_of
    kinds = typing.get_type_hints(cls)
    for f in fields(cls):
        kind, flag = kinds[f.name], _flag(f.name)
        shown = {"": f.default} | {name: values[f.name] for name, values in (presets or {}).items() if f.name in values}
        default = ", ".join(f"{name} {_shown(value)}".strip() for name, value in shown.items())
        shown = f"{comments.get(f.name, '')} [{default}]".replace("%", "%%")
        options = {"dest": f.name, "default": argparse.SUPPRESS, "help": shown}
        if bool in (kind, *typing.get_args(kind)):          # bool, or bool | None where the default is decided later
            options |= {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is typing.Literal:
            options |= {"choices": typing.get_args(kind)}
        elif typing.get_origin(kind) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": "X"}
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        group_of[f.name].add_argument(flag, **options)


def check_numbers(values, positive="", below_one=""):
    """Refuse numbers that mean nothing in flags {field: value}: negative, huge or NaN; 0, and more than any machine
    holds, in fields that are positive; 1 in shares and decays. Names of fields are separated by blanks."""
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            problem = ""
            if isinstance(number, (int, float)) and not 0 <= number < 2 ** 31:      # what seeds may be
                problem = "must be a number, and at least 0 (and below 2 ** 31)"
            elif name in positive.split() and not 0 < number <= 1e6:
                problem = "must be positive, and at most a million"
            elif name in below_one.split() and number >= 1:
                problem = "must be below 1"
            if problem:
                raise DataError(f"{_flag(name)} {_shown(value)}: {problem}")


def _flag(name):
    return "--" + name.rstrip("_").replace("_", "-")        # as_: --as, a word of Python


def _shown(value):
    """A default as it would be typed."""
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return {"True": "on", "False": "off", "None": "auto", "": "''"}.get(str(value), value)


FIRST_LINE, NEXT_LINE = 10, 2 if sys.stdout.isatty() else 60    # seconds of training before a line on the console


def clock(seconds):
    """'0:02:03'"""
    return str(datetime.timedelta(seconds=int(seconds)))


def status_line(text, last=False):
    """A line on how far something is; on a terminal the next one is written over it, and the last one stays."""
    if process()[0] == 0:
        terminal = sys.stdout.isatty()
        print(f"\r{text}\033[K" if terminal else text, end="" if terminal and not last else "\n", flush=True)


def progress(items, what):
    """The items one by one, as in `for block in progress(blocks, "reading")`. Where they take more than ten seconds a
    status line says what is done, how far it is and how long it will take."""
    began, total = time.perf_counter(), len(items)
    shown, due = False, began + FIRST_LINE
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now > due or shown and done == total:
            left = clock((now - began) / done * (total - done))
            status_line(f"{what}: {done:,} of {total:,}, {left} left", last=done == total)
            shown, due = True, now + NEXT_LINE


@contextlib.contextmanager
def clean_errors():
    """Around a main(): a DataError ends the program with 'error: ...' on stderr, exit code 2 and no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a console without UTF-8 shows ? for an arrow
            stream.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except DataError as error:
        _fail(*str(error).splitlines())         # one line, whatever a label or a path holds
    except (RuntimeError, MemoryError) as error:
        text, full = str(error), (torch.OutOfMemoryError, MemoryError)
        if isinstance(error, full) or "allocate memory" in text or "calculation overflowed" in text:    # on a CPU
            _fail(f"out of memory ({text.split('. ')[0]}); lower --batch-size, --hvg or the model's size")
        partner = isinstance(error, torch.distributed.DistError) or "gloo" in text
        if not partner or process()[1] == 1:    # gloo and NCCL, where another process of a run has died
            raise
        _fail("another process of this run has ended; go on from the last checkpoint with --resume")
    except KeyboardInterrupt:
        print("\ninterrupted; a run with a ckpt.pt in its folder goes on with --resume, another with the same command",
              file=sys.stderr)
        sys.exit(130)
    except OSError as error:                    # of stdout: its reader has gone (head, less), or its disk is full
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            _fail("the output cannot be written: no space is left where it goes")
        sys.exit(1)
    finally:
        _claims.clear()


def _fail(*words):
    print("error:", *words, file=sys.stderr)
    sys.exit(2)


def describe(dataset, split=""):
    """What `python data.py FILE` prints, as one JSON-serialisable object. cells and genes are those of the file, before
    quality control; conditions, controls and parts are counted after it."""
    cells, size = dataset.source, Counter(dataset.source.condition)
    controls = size.pop(CONTROL)
    orders, sizes = Counter(c.count("+") + 1 for c in size), list(size.values())
    facts = {"file": cells.path, "cells": cells.file_shape[0], "genes": cells.file_shape[1],
             "scale": dataset.file_scale, "conditions": len(size), "singles": orders[1], "doubles": orders[2],
             "more": len(size) - orders[1] - orders[2], "pert_key": cells.pert_key, "controls": controls,
             "control_labels": sorted(cells.rules.seen_controls),
             "cells_per_condition": {"min": min(sizes), "median": float(np.median(sizes)), "max": max(sizes)},
             "covariates": {key: len(set(cells.obs(key))) for key in dataset.config.covariate_keys},
             "panel_genes": len(dataset.genes), "perturbations": len(dataset.perturbations),
             "perturbed_genes_in_panel": int((dataset.pert_gene >= 0).sum())}
    if split:
        facts["split"] = {part: {"conditions": len(dataset.split[part]),
                                 "cells": sum(len(dataset.rows[g]) for g in dataset.part(part))} for part in PARTS}
    return facts | {"notes": cells.notes}


@dataclass
class FileConfig(DataConfig):
    """The flags of data.py's own command line."""
    json: bool = False          # print one JSON object
    out: str = ""               # write the prepared (or simulated) file here
    split: str = ""             # additive, holdout, cv, combo, transfer, unseen, all, FILE.json, obs:COLUMN
    fold: int = 0               # which fold of the split
    folds: int = 10             # number of folds of --split cv
    cells: int = 0              # of the demo; 0 for 400 controls and 100 of each condition, per cell type
    genes: int = 120            # of the demo
    cell_types: int = 1         # of the demo
    seed: int = 0               # of the demo


def main(argv=None):
    """Command line: describe or prepare a file, or simulate one."""
    parser = Parser(prog="data.py", description=__doc__)
    parser.add_argument("file", help="AnnData file (.h5ad, .h5), or demo to simulate one")
    add_flags(parser, FileConfig)
    with clean_errors():
        args = parser.parse(argv)
        file = args.pop("file")
        config = FileConfig(**args)
        of_demo = {"cells", "genes", "cell_types", "seed"}
        other = "FILE" if file == "demo" else "demo"
        for name in set(args) - of_demo - {"out"} if file == "demo" else of_demo & set(args):
            raise DataError(f"{_flag(name)}: belongs to 'python data.py {other}'; remove it")
        if file == "demo":
            config.out = config.out or "demo.h5ad"
            simulate(config.out, config.cells, config.genes, config.cell_types, config.seed)
            return print(f"wrote {config.out}")
        if config.out and Path(config.out).resolve() == Path(file).resolve():
            raise DataError(f"--out {file}: is the input itself and would be lost; choose another name")
        with contextlib.redirect_stdout(sys.stderr if config.json else sys.stdout):     # how far it is, is no JSON
            dataset = load(file, config, config.split, config.fold, config.folds)
            facts = describe(dataset, config.split)
            if config.out:
                write_prepared(config.out, dataset)
                print(f"wrote {config.out}: log1p CP10k, grouped by condition")
        if config.json:
            return print(json.dumps(facts))
        notes, parts = facts.pop("notes"), facts.pop("split", {})
        for key, value in (facts | parts).items():
            if isinstance(value, dict):
                value = [f"{name} {number:,g}" for name, number in value.items()]
            print(f"{key.replace('_', ' '):<25} {listed(value, 9) if isinstance(value, list) else value}")
        for note in notes:
            print(f"note: {note}")


if __name__ == "__main__":
    main()
