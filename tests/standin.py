"""A stand-in GPU: a device that computes on the CPU, refuses what CUDA refuses, and counts what makes the host wait.

    python tests/standin.py METHOD COMMANDS.json      run the method's command lines on it, one after another

A tensor on it wraps a CPU tensor. An operation that mixes the two raises, as on CUDA. Waits (.item(), .tolist(), masks
of unknown size), copies to the CPU and copies to the device are counted: in training steps, from Run.start() to the
return of the step's optimiser, and in predict(), whose groups are its calls. The last line is one JSON object:
{"calls": {"step": n, "generate": n}, "step": {"kind file:line": n}, "generate": {"kind": n},
"operations": {"step": n, "generate": n}}, the operations being what an uncompiled run would launch, views apart.
"""
import collections
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "standin"
backend_registration._setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default,
         aten.equal.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
         aten.repeat_interleave.Tensor, aten.bincount.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
phase, counts, operations = "", collections.defaultdict(collections.Counter), collections.Counter()


def line():
    """The innermost line of the project that asked for the present operation."""
    root = str(Path(__file__).resolve().parent.parent)
    for frame in reversed(traceback.extract_stack()[:-3]):
        if os.path.dirname(os.path.abspath(frame.filename)) == root:
            return f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.line}"
    return "?"


def count(kind):
    counts[phase][f"{kind} {line()}" if phase == "step" else kind] += 1


class Standin(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(cls, inner.size(), strides=inner.stride(), dtype=inner.dtype,
                                                  storage_offset=inner.storage_offset(), device=DEVICE)
        out.inner = inner
        return out

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def tolist(self):
        count("wait")
        return self.inner.detach().tolist()

    def __format__(self, spec):
        count("wait")
        return format(self.inner.detach().item(), spec)

    def numpy(self, **_):
        raise TypeError(f"cannot convert a tensor on {NAME} to numpy; use Tensor.cpu() first")

    __array__ = numpy


def dispatch(function, args, kwargs):
    flat = tree_flatten((args, kwargs))[0]
    ours = [a for a in flat if isinstance(a, Standin)]
    device = kwargs.get("device")
    here = device is not None and torch.device(device).type == NAME
    leaves = function is aten._to_copy.default and ours and device is not None and not here
    out_copy = function is aten.copy_.default and not isinstance(args[0], Standin)
    if ours or here:
        plain = [a for a in flat if isinstance(a, torch.Tensor) and not isinstance(a, Standin)]
        moves = function in (aten._to_copy.default, aten.copy_.default)
        if ours and not moves and any(a.dim() for a in plain) and function not in INDEXED:
            raise RuntimeError(f"{function}: tensors on {NAME} and on cpu are mixed")
        masked = function in INDEXED and any(a.dtype == torch.bool for a in ours if a is not args[0])
        if function in WAITS or masked:
            count("wait")
        if leaves or out_copy:
            count("copy out")
        elif plain and (moves or function in INDEXED) and any(a.dim() for a in plain):
            count("copy in")
        operations[phase] += function not in VIEWS

    def unwrap(a):
        if isinstance(a, torch.device) and a.type == NAME:
            return torch.device("cpu")
        return a.inner if isinstance(a, Standin) else a
    out = function(*tree_map(unwrap, args), **tree_map(unwrap, kwargs))
    if leaves or not (ours or here):
        return out
    if out_copy:
        return args[0]
    same = {id(a.inner): a for a in ours}

    def wrap(o):
        if isinstance(o, torch.Tensor):
            return same[id(o)] if id(o) in same else Standin(o)
        return o
    return tree_map(wrap, out)


VIEWS = {getattr(aten, name).default for name in (
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "detach", "alias", "split",
    "unbind", "as_strided", "diagonal", "unfold") if hasattr(getattr(aten, name), "default")}
VIEWS |= {aten.transpose.int, aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.squeeze.dim, aten.unbind.int}


class Everywhere(TorchDispatchMode):
    """Reaches creations such as torch.rand(n, device=...), which have no tensor among their arguments."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Backend:
    """What torch asks of a device module."""
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: None)


def main(name, commands):
    """Run the command lines of a method on the stand-in; print the counts as JSON."""
    torch._C._set_only_lift_cpu_tensors(True)           # torch.tensor(..., device=) then goes through dispatch
    setattr(torch, NAME, Backend)
    sys.modules[f"torch.{NAME}"] = Backend
    torch.__future__.set_swap_module_params_on_conversion(False)
    generator = torch.Generator

    class Generator:                                    # there can be none for a python backend
        def __new__(cls, device="cpu"):
            return generator()
    torch.Generator = Generator
    save = torch.save                                   # a checkpoint holds plain tensors, wherever they were

    def save_plain(state, file):
        save(tree_map(lambda a: a.inner if isinstance(a, Standin) else a, state), file)
    torch.save = save_plain
    method = importlib.import_module(name)
    calls = collections.Counter()
    init, start, finish, told_of = method.Run.__init__, method.Run.start, method.Run.finish, method.told_of

    def on_standin(run, config):
        init(run, config)
        run.device = DEVICE

    def told(*args):
        calls["generate"] += 1
        return told_of(*args)

    def during(what, function):
        def watched(*args, **kwargs):
            global phase
            before, phase = phase, what
            try:
                return function(*args, **kwargs)
            finally:
                phase = before
        return watched

    def begin(run, step):
        global phase
        start(run, step)
        phase = "step"
        calls["step"] += 1

    def end(run, step, parts, **losses):
        global phase
        phase = ""
        finish(run, step, parts, **losses)
    method.Run.__init__, method.Run.start, method.Run.finish = on_standin, begin, end
    method.told_of, method.predict = told, during("generate", method.predict)
    method.Run.validate = during("", method.Run.validate)
    if hasattr(method, "calibrate"):                    # after the last step
        method.calibrate = during("", method.calibrate)
    with Everywhere():
        for command in commands:
            try:
                method.main(command)
            except SystemExit as stop:
                if stop.code:
                    raise
    print(json.dumps({"calls": calls, "step": counts["step"], "generate": counts["generate"],
                      "operations": operations}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
