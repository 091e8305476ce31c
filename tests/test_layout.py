"""One direction, floor by floor: who may import whom, and what `import crate_jax` must not load."""

import ast
import graphlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first: a file imports only from floors below its own.
FLOORS = [
    "version",
    "interrupts",
    "waiting",
    "errors",
    "streams",
    "columns",
    "buckets",
    "files",
    "pages",
    "options",
    "models.fields",  # of the families, which the section of the model has too
    "models.variants",
    "models.sections",
    "models.sources",
    "models.released",
    "sections",
    "config",
    "placement",
    "objective",
    "models",
    "planning.chips",
    "machine",
    "parallel",
    "analysis",
    "data",
    "tasks",
    "checkpoint",
    "evaluation",
    "interop",
    "api",
    "training",
    "parity",
    "planning",
    "cli",
    "__main__",
]
# Inside a folder, lowest first. A file that is not named here may stand anywhere in its folder, as
# long as there is no circle. The folder's own __init__ is on top of it.
ROOMS = {
    "models": [
        "kernels",
        "gpu",
        "gpu_norm",
        "derivatives",
        "attention",
        "parameters",
        "past",
        "steering",
        "layers",
        "modulation",
        "block",
        "stacked",
        "embedding",
        "intermediates",
        "classifier",
        "heads",
        "image_sizes",
        "stem",
        "transformer",
        "theory",
        "subspaces",
        "tssa",
        "causal_tssa",
        "cbsa",
        "operator_cost",
        "attentions",
        "class_attention",
        "crate",
        "crate_alpha",
        "vit",
        "tost",
        "language",
        "crate_causal",
        "crate_bert",
        "tost_lm",
        "generation",
        "energy",
        "hyper_set",
        "depict",
        "segmenter",
        "adaln",
        "redunet_layer",
        "redunet",
        "mae_decoder",
        "crate_mae",
        "cost",
        "zoo",
    ],
    "data": ["rows", "stores", "text", "images", "workers", "loader"],
    "tasks": [
        *["losses", "pixels", "mixing", "masking", "neighbours", "frozen", "task", "penalties"],
        *["projection", "rates", "coding_losses", "distillation"],
        *["classify", "masked_autoencoding", "mcr2", "simdino", "next_token"],
    ],
    "checkpoint": [
        *["faults", "digest", "best", "record", "shapes", "folder", "lease", "owner"],
        *["s3", "engine", "manager", "reading"],
    ],
    "analysis": [
        *["taps", "layerwise", "coarse_masks", "maskcut", "pca", "rle", "overlays"],
        *["report"],
    ],
    "interop": [
        *["layouts", "names", "kinds", "pickled", "safetensors", "npz", "msgpack", "orbax", "pth"],
        *["download", "folders", "hub", "addresses", "nearby"],
        *["tree", "faults", "resize", "fit", "convert", "stated", "contents"],
        *["floats", "pictures", "load", "hub_folder", "save", "networks", "pretrained", "export"],
    ],
    "parity": [
        *["twin", "crate", "crate_alpha", "vit", "hyper_set"],
        *["text", "crate_causal", "crate_lm", "tost_lm", "crate_bert"],
        *["torch_reference", "runs", "difference", "compare", "comparison"],
    ],
    "training": [
        *["tensorboard", "mirror", "writer", "loggers", "progress", "workdir"],
        *["orthonormal", "layerwise", "optimizer", "state", "step"],
        *["run", "loop"],
    ],
    "planning": [
        *["chips", "hlo", "collectives", "program", "topology", "compiling", "memory", "formulas"],
        *["plan", "report"],
    ],
    "cli": ["mistakes", "parser", "recipes", "flags", "running", "arguments", "train", "main"],
}
# Above the package; nothing inside it may import them.
ROOF = ("train", "configs", "benchmarks", "tests")


def module_name(path: str) -> str:
    name = path.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def place(name: str) -> tuple[str, str]:
    """Floor and room of a module; a floor with a dot is one file out of a folder."""
    name = name.removeprefix("crate_jax.")
    return (name, "") if name in FLOORS else (name.partition(".")[0], name.partition(".")[2])


def imported(name: str, path: str, source: str, known: set[str]) -> set[str]:
    """The modules of this project that a file imports, wherever in the file that is written."""
    package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [parent, node.module]))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return {module for module in found if module in known or module.split(".")[0] in ROOF}


def violations(files: dict[str, str]) -> list[str]:
    """Imports among `files` (path: source) that go up, or round in a circle."""
    known = {module_name(path) for path in files}
    found, within = [], {folder: {} for folder in FLOORS}
    for path, source in files.items():
        name = module_name(path)
        targets = imported(name, path, source, known) - {name}
        if name == "crate_jax":  # it gathers the public names
            found += [f"{name} -> {t}" for t in targets if t.split(".")[0] in ROOF]
            continue
        if name.split(".")[0] == "configs":
            allowed = {t for t in targets if t == "crate_jax.config" or t.startswith("configs")}
            found += [f"{name} -> {t}" for t in targets - allowed]
            continue
        floor, room = place(name)
        within[floor][name] = set()
        for target in targets:
            target_floor, target_room = place(target)
            if target == "crate_jax" or target.split(".")[0] in ROOF:
                found.append(f"{name} -> {target}")
            elif target_floor != floor:
                if FLOORS.index(target_floor) > FLOORS.index(floor):
                    found.append(f"{name} -> {target}")
            else:
                within[floor][name].add(target)
                order = ROOMS.get(floor, [])
                listed = room in order and target_room in order
                if listed and order.index(target_room) > order.index(room):
                    found.append(f"{name} -> {target}")
    for graph in within.values():
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append("circle: " + " -> ".join(error.args[1]))
    return sorted(found)


def sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def test_files_import_only_from_below():
    files = sources("crate_jax", "configs")
    assert len(files) > 20
    assert violations(files) == []


def test_every_file_has_a_floor():
    tops = {path.split("/")[1].removesuffix(".py") for path in sources("crate_jax")}
    assert tops - {"__init__"} <= set(FLOORS)


@pytest.mark.parametrize(
    ("path", "line", "found"),
    [
        ("models/layers.py", "from crate_jax.config import x", []),
        (
            "models/layers.py",
            "from crate_jax.models.crate import Crate",
            ["layers -> models.crate"],
        ),
        ("models/layers.py", "from .crate import Crate", ["layers -> models.crate"]),
        (
            "models/crate.py",
            "def f():\n    from ..training import loop",
            ["crate -> training.loop"],
        ),
        ("models/crate.py", "from crate_jax.models.layers import mssa", []),
        ("models/crate.py", "from crate_jax.models import zoo", ["crate -> models.zoo"]),
        ("objective.py", "import crate_jax.models.crate", ["objective -> models.crate"]),
        ("config.py", "from crate_jax.models.variants import x", []),
        ("models/variants.py", "import crate_jax.config", ["models.variants -> config"]),
        ("config.py", "import crate_jax", ["config -> crate_jax"]),
        ("training/loop.py", "from crate_jax import analysis, objective", []),
        ("training/loop.py", "from crate_jax import create_model", ["loop -> crate_jax"]),
        ("training/loop.py", "from configs import digits", ["loop -> configs"]),
        (
            "analysis/taps.py",
            "from crate_jax.analysis import layerwise",
            ["taps -> analysis.layer"],
        ),
        ("analysis/__init__.py", "from crate_jax.analysis.taps import taps", []),
    ],
)
def test_the_rule_sees_what_it_should(path, line, found):
    names = "config objective models/variants models/layers models/crate models/zoo"
    names += " training/__init__ training/loop analysis/__init__ analysis/layerwise analysis/taps"
    names += " __init__"
    files = {f"crate_jax/{name}.py": "" for name in names.split()} | {f"crate_jax/{path}": line}
    seen = [text.replace("crate_jax.", "") for text in violations(files)]
    assert len(seen) == len(found)
    for text, ending in zip(seen, found, strict=True):
        assert ending in text


def test_the_rule_sees_circles_and_what_recipes_may_not():
    files = {
        "crate_jax/__init__.py": "",
        "crate_jax/training/__init__.py": "",
        "crate_jax/training/one.py": "from crate_jax.training import two",
        "crate_jax/training/two.py": "from crate_jax.training.one import x",
        "configs/mine.py": "from crate_jax.training import one",
    }
    circle, recipe = violations(files)
    assert circle.startswith("circle: ")
    assert recipe == "configs.mine -> crate_jax.training.one"


def test_import_loads_no_more_than_models_need():
    program = """
import json, sys
import crate_jax
names = ["analysis.taps", "analysis.layerwise", "objective.coding_rate", "Crate", "create_model"]
for name in [*names, "list_models", "load_weights", "load_pretrained", "preprocessing"]:
    value = crate_jax
    for part in name.split("."):
        value = getattr(value, part)
print(json.dumps(sorted({module.split(".")[0] for module in sys.modules})))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert {"crate_jax", "jax", "flax"} <= loaded
    heavy = {"grain", "tensorflow", "tensorflow_datasets", "orbax", "cv2", "torch", "matplotlib"}
    heavy |= {"huggingface_hub", "fsspec", "tqdm", "httpx2"}
    assert loaded & (heavy | {"sklearn", "tensorboardX", "ml_collections"}) == set()


def test_the_package_raises_and_logs_but_does_not_assert_or_print():
    found = []
    for path, source in sources("crate_jax").items():
        for node in ast.walk(ast.parse(source)):
            printing = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            if printing or isinstance(node, ast.Assert):
                found.append(f"{path}:{node.lineno}")
    assert found == []


# Lines that a file should have at most, and a model's or an operator's; those with more, each with
# its reason.
CAP, MODEL_CAP = 300, 200
LONG: dict[str, str] = {}
# What all models are made of: the frame, its kernels, its tables. Other files of the folder are a
# model's or an operator's own.
FRAME = {
    *("layers", "attention", "gpu", "tpu", "tpu_programs"),
    *("block", "stacked", "embedding", "classifier", "language"),
    *("fields", "variants", "sources", "released", "zoo"),
}


def test_files_over_the_soft_cap_are_listed():
    lines = {path: source.count("\n") for path, source in sources("crate_jax").items()}
    frame = {f"crate_jax/models/{name}.py" for name in FRAME}
    models = {path for path in lines if path.startswith("crate_jax/models/")} - frame
    assert frame <= set(lines) and len(models) > 20
    over = {path for path, n in lines.items() if n > (MODEL_CAP if path in models else CAP)}
    assert over == set(LONG)


def test_an_objective_is_one_short_file():
    from crate_jax.tasks import TASKS

    files = {Path(inspect.getfile(task)) for task in TASKS.values()}
    assert len(files) == len(TASKS)
    assert all(path.parent == ROOT / "crate_jax/tasks" for path in files)
    assert {path.name for path in files if path.read_text().count("\n") >= 200} == set()


def bare_lines(source: str) -> list[str]:
    """The statements of a file, a line each, without imports, comments and docstrings."""
    tree, said = ast.parse(source), (ast.Import, ast.ImportFrom)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            docstring = node.body[:1] if ast.get_docstring(node) else []
            node.body = [
                each for each in node.body if each not in docstring and not isinstance(each, said)
            ] or [ast.Pass()]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip()]


def copied(files: dict[str, str], length: int) -> set[tuple[str, ...]]:
    """Files (path: source) that have a run of so many statements in common."""
    found: dict[tuple[str, ...], set[str]] = {}
    for path, source in files.items():
        lines = bare_lines(source)
        for i in range(len(lines) - length + 1):
            found.setdefault(tuple(lines[i : i + length]), set()).add(path)
    return {tuple(sorted(paths)) for paths in found.values() if len(paths) > 1}


def test_nothing_is_copied_between_model_files():
    assert copied(sources("crate_jax/models"), 5) == set()


def test_a_copy_is_found_whatever_its_comments_say():
    one = "def f(x):\n    '''Of one.'''\n    y = x + 1  # once\n    return y\n"
    two = "z = 3\ndef f(x):\n    y = (x\n    + 1)\n    return y\n"
    assert copied({"one": one, "two": two}, 3) == {("one", "two")}
    assert copied({"one": one, "two": two}, 4) == set()


def test_rooms_that_are_listed_exist():
    for floor in FLOORS:
        path = ROOT / "crate_jax" / floor.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), floor
    for folder, rooms in ROOMS.items():
        for room in rooms:
            path = ROOT / "crate_jax" / folder / room
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{folder}/{room}"


# These must work for every task and every model, those that nobody has written yet included.
BLIND = ("crate_jax/training", "crate_jax/checkpoint")
BLIND_FILES = ("crate_jax/parallel.py", "crate_jax/data/loader.py")


def names_of_tasks_and_models() -> set[str]:
    """What a task or a model is called, as a class and in a config."""
    from crate_jax.models.zoo import CLASSES, VARIANTS
    from crate_jax.tasks import TASKS

    classes = {each.__name__ for each in (*TASKS.values(), *CLASSES.values())}
    operators = {"MSSA", "MHSA", "ISTA", "MLP", "OvercompleteISTA"}
    return {*TASKS, *VARIANTS, *classes, *operators}


def keys_of_batches() -> set[str]:
    """What a task's batch is made of, by the small run of each, and plurals of it."""
    from objectives import small

    from crate_jax.tasks import TASKS
    from crate_jax.training.run import set_up

    blanks = [set_up(small(task)).task.blank() for task in TASKS]
    return {key + end for blank in blanks for key in blank for end in ("", "s")}


def named_in(source: str, names: set[str], keys: set[str]) -> set[str]:
    """Which of some names stand in a source, as words; and which keys, as texts."""
    words = set(re.findall(r"\w+", source))
    strings = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return words & names | strings & keys


def test_training_checkpoints_and_loader_name_no_task_and_no_model():
    names, keys = names_of_tasks_and_models(), keys_of_batches()
    assert {"classify", "Classify", "Crate", "crate_base_patch16_224"} <= names
    assert {"image", "label", "images", "labels"} <= keys
    files = {
        path: source
        for path, source in sources("crate_jax").items()
        if path.startswith(BLIND) or path in BLIND_FILES
    }
    assert len(files) > 15
    found = {
        path: seen for path, source in files.items() if (seen := named_in(source, names, keys))
    }
    assert found == {}


def test_the_search_finds_names_and_keys(monkeypatch):
    from crate_jax import tasks

    class Unheard(tasks.Task):
        """An objective that nobody has written yet."""

    monkeypatch.setitem(tasks.TASKS, "unheard_of", Unheard)
    names, keys = names_of_tasks_and_models(), {"image", "label"}
    assert named_in("from crate_jax.models.crate import Crate", names, keys) == {"Crate"}
    assert named_in("x = batch['label']  # of classify", names, keys) == {"label", "classify"}
    assert named_in("import crate_jax  # an image of the state", names, keys) == set()
    assert named_in("if task == 'unheard_of': Unheard()", names, keys) == {"unheard_of", "Unheard"}


def test_the_package_lists_its_public_names_and_refuses_others():
    import crate_jax

    assert set(dir(crate_jax)) == {*crate_jax.__all__, "__version__"}
    with pytest.raises(AttributeError) as caught:
        crate_jax.load_pretraned  # noqa: B018
    assert str(caught.value) == "module 'crate_jax' has no attribute 'load_pretraned'"
    assert (caught.value.name, caught.value.obj) == ("load_pretraned", crate_jax)
