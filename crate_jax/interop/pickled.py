"""The plain values in PyTorch files: harmless classes are read without these classes.

PyTorch unpickles only what it is told to allow. It is told stand-ins, never the classes themselves:
NumPy's own ``dtype``, for one, takes a state that makes bytes out of a file be followed as
pointers. A stand-in keeps what it needs and does nothing, whatever arguments a file gives it.
"""

import re
from collections import OrderedDict

import numpy as np

# Values that are of no use here and are not kept: module, and the names in it.
_ASIDE = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "typing": "Any Union Optional",
    "builtins": "int float bool str bytes list dict tuple frozenset slice range",
    "numpy": "bool_ bool int8 int16 int32 int64 uint8 float16 float32 float64",
    "torch.torch_version": "TorchVersion",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.base": "Metadata ContainerMetadata SCMode UnionNode",
    "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode PathNode "
    "EnumNode InterpolationResultNode",
    # Before version 1.5 Lightning kept the state of a callback under its class.
    "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
}
# Mappings of other programs, whose entries are kept.
_MAPPINGS = {
    "collections": "defaultdict",
    "pytorch_lightning.utilities.parsing": "AttributeDict",
    "lightning.pytorch.utilities.parsing": "AttributeDict",
    "lightning_fabric.utilities.data": "AttributeDict",
    "lightning.fabric.utilities.data": "AttributeDict",
    "yacs.config": "CfgNode",
    "easydict": "EasyDict",
    "addict.addict": "Dict",
    "munch": "Munch",
    "ml_collections.config_dict.config_dict": "ConfigDict FrozenConfigDict",
}
# Lists of other programs.
_LISTS = {"collections": "deque"}


class Aside:
    """A value of a class that is harmless and of no use here; nothing of it is kept."""

    def __new__(cls, *_: object) -> "Aside":  # noqa: D102 (it takes any arguments)
        return super().__new__(cls)

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Mapping:
    """Makes a mapping that PyTorch fills."""

    def __new__(cls, *_: object) -> OrderedDict:
        return OrderedDict()


class _List:
    """Makes a list that PyTorch fills."""

    def __new__(cls, *_: object) -> list:
        return []


class _Dtype:
    """NumPy's dtype by its name; numbers alone have one here."""

    def __init__(self, name: object = "", *_: object):
        self.name, self.order = str(name), "="

    def __setstate__(self, state: tuple) -> None:
        self.order = "<" if state[1] == "|" else str(state[1])

    def dtype(self) -> np.dtype | None:
        """The dtype of numbers; None: of something else."""
        known = re.fullmatch("b1|[iu][1248]|f[248]|c8|c16", self.name) and self.order in "<>="
        return np.dtype(self.order + self.name) if known else None


class Array:
    """A NumPy array, which may be one of the weights; one of no numbers has neither attribute.

    Attributes:
        value: the array.
        shape: of it.
    """

    value: np.ndarray
    shape: tuple[int, ...]

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        kind = dtype.dtype() if isinstance(dtype, _Dtype) else None
        if kind is not None and isinstance(data, bytes):
            values = np.frombuffer(data, kind)
            self.value = values.reshape(shape, order="F" if fortran else "C").copy()
            self.shape = self.value.shape


_NUMPY = {
    "numpy": {"ndarray": Array, "dtype": _Dtype},
    "numpy.core.multiarray": {"scalar": Aside, "_reconstruct": Array},
    "numpy._core.multiarray": {"scalar": Aside, "_reconstruct": Array},
}


def stand_ins() -> list[type]:
    """One class for each that may stand in a file, under its name, as PyTorch takes them."""
    bases = [(_ASIDE, Aside), (_MAPPINGS, _Mapping), (_LISTS, _List)]
    wanted = [
        (module, name, base)
        for table, base in bases
        for module, names in table.items()
        for name in names.split()
    ]
    wanted += [(module, name, b) for module, table in _NUMPY.items() for name, b in table.items()]
    return [
        type(name, (base,), {"__module__": module, "__qualname__": name})
        for module, name, base in wanted
    ]
