"""What lies beside the tensors of PyTorch files: data loads, a program does not run."""

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import re
import sys
import types
import typing

import numpy as np
import pytest
from weights import MODEL, assert_equal_trees, random_params, random_state

from crate_jax import load_weights
from crate_jax.interop import load_fitted, pth
from crate_jax.interop.pickled import Aside, stand_ins

torch = pytest.importorskip("torch")


@pytest.fixture
def tensors():
    return {name: torch.tensor(array) for name, array in random_state(MODEL).items()}


@pytest.fixture
def loads(tmp_path):
    """A function: what torch.save wrote loads as the weights."""

    def check(content, **how):
        torch.save(content, tmp_path / "w.pth", **how)
        loaded = load_fitted(tmp_path / "w.pth", MODEL)
        assert_equal_trees(loaded.params, random_params(MODEL))
        return loaded.report

    return check


@pytest.fixture
def refused(tmp_path):
    def check(content, line, **how):
        torch.save(content, tmp_path / "w.pth", **how)
        with pytest.raises(ValueError, match=line):
            load_weights(tmp_path / "w.pth", MODEL)

    return check


@pytest.fixture
def theirs(monkeypatch):
    """A function: a class of a package that is not installed here."""

    def make(module, name, base=object):
        parts = module.split(".")
        for length in range(1, len(parts) + 1):
            at = ".".join(parts[:length])
            if at not in sys.modules:
                monkeypatch.setitem(sys.modules, at, types.ModuleType(at))
        made = type(name, (base,), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        return made

    return make


def test_plain_values_beside_the_tensors(loads, tensors):
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    beside = {
        "best": np.float64(0.5),
        "step": np.int64(3),
        "flag": np.bool_(True),
        "rng": np.arange(6, dtype=np.uint32),
        "grid": np.asfortranarray(np.ones((2, 3))),
        "names": np.array(["a", "b"]),
        "paths": [pathlib.Path("/a/b"), pathlib.PurePosixPath("x"), pathlib.PureWindowsPath("c:/")],
        "times": (now, now.date(), datetime.timedelta(1)),
        "args": argparse.Namespace(lr=np.float32(1), out=pathlib.Path("o"), flags=[1, None]),
        "simple": types.SimpleNamespace(a=1),
        "ordered": collections.OrderedDict(a=1),
        "default": collections.defaultdict(list, a=[1]),
        "deque": collections.deque([1, 2]),
        "torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.__version__],
        "types": [int, list],
        "bytes": b"x",
    }
    loads({"state_dict": tensors, **beside})
    loads({"model": tensors, **beside}, _use_new_zipfile_serialization=False)
    assert loads({**tensors, "epoch": 3, "lr": np.float32(1), "time": now}) == []


def test_weights_that_are_arrays_of_numpy(loads, tensors):
    state = {name: value.numpy() for name, value in tensors.items()}
    state["cls_token"] = np.asfortranarray(state["cls_token"])
    loads({"state_dict": state})


def test_lightning(loads, tensors, theirs):
    parameters = theirs("lightning_fabric.utilities.data", "AttributeDict", dict)(lr=1.0)
    parameters["out"] = pathlib.Path("runs")
    report = loads(
        {
            "epoch": 1,
            "global_step": 3,
            "pytorch-lightning_version": "2.1.0",
            "state_dict": {f"model.{name}": value for name, value in tensors.items()}
            | {"accuracy.correct": torch.tensor(3)},
            "loops": {"fit_loop": {"state_dict": {}}},
            "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(1.0)}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
            "lr_schedulers": [],
            "hyper_parameters": parameters,
        }
    )
    assert report == ["left aside accuracy (1): no floats, so no parameters"]


def test_omegaconf(loads, tensors, theirs):
    config = theirs("omegaconf.dictconfig", "DictConfig")()
    metadata = theirs("omegaconf.base", "ContainerMetadata")()
    node = theirs("omegaconf.nodes", "AnyNode")()
    metadata.ref_type, metadata.object_type, node._val = typing.Any, dict, 3
    config._metadata, config._content = metadata, {"lr": node}
    loads({"state_dict": tensors, "hyper_parameters": config})


class Payload:
    """Unpickling it calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("within", ["", "namespace", "array", "key"])
@pytest.mark.parametrize("function", [os.mkdir, eval])
def test_a_program_is_refused_and_does_not_run(tmp_path, refused, tensors, function, within):
    ran = tmp_path / "ran"
    payload = Payload(
        function, str(ran) if function is os.mkdir else f"__import__('os').mkdir({str(ran)!r})"
    )
    beside = {
        "": payload,
        "namespace": argparse.Namespace(a=payload),
        "array": np.array([payload], dtype=object),
        "key": {payload: 1},
    }[within]
    name = {"mkdir": "posix.mkdir", "eval": "eval"}[function.__name__]
    refused({"model": tensors, "x": beside}, f"run or build {name}, which is refused")
    assert not ran.exists()
    torch.load(tmp_path / "w.pth", weights_only=False)  # it was a real one
    assert ran.exists()


def test_a_stand_in_does_nothing_whatever_it_is_given():
    for each in stand_ins():
        made = each.__new__(each, "f8", "x")
        assert type(made) in (each, collections.OrderedDict, list)
        if isinstance(made, Aside):
            made.__setstate__({"a": 1})
            assert vars(made) == {}
    array = next(each for each in stand_ins() if each.__qualname__ == "ndarray")()
    dtype = next(each for each in stand_ins() if each.__qualname__ == "dtype")("O8")
    dtype.__setstate__((3, "|", None, None, None, -1, -1, 0))  # objects without their flag
    array.__setstate__((1, (1,), dtype, False, b"\x01" * 8))
    assert not vars(array)


def test_what_the_process_allows_stays_allowed_and_does_not_get_in_the_way(loads, tensors):
    mine = [np.dtype, pathlib.PosixPath, (np.ndarray, "numpy.ndarray"), Payload]
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(mine)
    try:
        allowed = set(torch.serialization.get_safe_globals())
        loads({"model": tensors, "best": np.float64(1), "path": pathlib.Path("x")})
        assert set(torch.serialization.get_safe_globals()) == allowed
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


CALLED = []


class Caller:
    """A file in which it lies calls a function of the program that reads it."""

    def __reduce__(self):
        return call, ("x",)


def call(value):
    CALLED.append(value)
    return {}


def test_what_the_process_allows_is_not_run_here(refused, tensors):
    """PyTorch's own refusal tells users to allow functions, and any file could then call them."""
    with torch.serialization.safe_globals([call]):
        refused({"model": tensors, "x": Caller()}, r"\.call, which is refused\. Ask its")
    assert CALLED == []


def test_files_of_other_things(tmp_path, refused, tensors):
    module = r"build torch\.nn\.modules\.linear\.Linear, .* a whole model: .* model\.state_dict\(\)"
    refused(torch.nn.Linear(2, 2), module)
    refused({"model": tensors, "x": Payload}, r"build \S+\.Payload, which is refused\. Ask its")
    refused(argparse.Namespace(a=1), r"build argparse\.Namespace, which is refused")
    refused({"model": tensors}, "a pickle of another kind, which could run", pickle_protocol=4)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(random_state(MODEL), protocol=2))
    with pytest.raises(ValueError, match="a pickle of another kind, which could run code"):
        load_weights(tmp_path / "w.pkl", MODEL)


def test_tensors_that_are_not_plain(refused, loads, tensors):
    name = "mlp_head.1.weight"
    whole = tensors[name]
    for value, what in (
        (torch.empty(5, 6, device="meta"), "on the meta device, without numbers"),
        (whole.to_sparse(), "of the layout torch.sparse_coo"),
    ):
        line = rf"mlp_head\.1\.weight must be a plain tensor; the one in .*w\.pth is {what}"
        refused(tensors | {name: value}, line)
    refused(tensors | {name: whole.to(torch.complex64)}, "must be of floats; got complex64")
    loads(tensors | {name: whole.T.contiguous().T})
    loads(tensors | {name: torch.nn.Parameter(whole.double())})
    loads(tensors | {name: torch.stack([whole, whole])[1]})  # a view of a larger storage


def test_tensors_in_parts_on_several_devices():
    line = r"must hold whole tensors; .* is a DTensor, a part on each device\. Save full ones: get_"
    part = types.SimpleNamespace(to_local=None)
    with pytest.raises(ValueError, match=line):
        pth._to_numpy(types.SimpleNamespace(detach=lambda: part), "head.weight", "w.pth")
    assert re.search(line, pth._refusal("w.pth", Exception("import it to load DTensors")))


def test_float8_tensors(tmp_path, tensors):
    small = tensors | {"mlp_head.1.bias": tensors["mlp_head.1.bias"].to(torch.float8_e4m3fn)}
    torch.save(small, tmp_path / "w.pth")
    bias = load_weights(tmp_path / "w.pth", MODEL)["head"]["bias"]
    np.testing.assert_array_equal(bias, small["mlp_head.1.bias"].float().numpy())
    from safetensors.torch import save_file

    save_file(small, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="must be of float64, float32, float16 or bfloat16"):
        load_weights(tmp_path / "w.safetensors", MODEL)
