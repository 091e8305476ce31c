"""`segment` of a run and of weights, on folders, on VOC's and COCO's; and what it refuses."""

import json
import sys

import cv2
import jax
import numpy as np
import pytest
from command import ROOT

from crate_jax import create_model, save_weights
from crate_jax.analysis import taps
from crate_jax.analysis.coarse_masks import class_attention, share_of_mass
from crate_jax.analysis.maskcut import enlarge, maskcut
from crate_jax.analysis.rle import encode
from crate_jax.checkpoint.reading import read_trained
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.models.zoo import build_model
from crate_jax.training.loop import train

sys.path.append(str(ROOT / "benchmarks"))

import shapes

FIELDS = dict(image_size=(16, 16), patch_size=(4, 4), in_channels=1, width=16, depth=3, num_heads=2)
CONFIG = TrainConfig(
    batch_size=48,
    eval_batch_size=16,
    total_steps=1,
    model=ModelConfig(name="crate_tiny_patch16_224", **FIELDS),
    data=DataConfig(
        eval_split="test[:10]", train_transforms="resize(16)", eval_transforms="resize(16)"
    ),
    optim=OptimConfig(lr=1e-3),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(CONFIG, folder)
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Images of the size that the runs see, so that nothing is resized."""
    folder = tmp_path_factory.mktemp("coco")
    return shapes.write_coco(folder, shapes.drawn_set(seed=2, count=4, side=32, most=2))


@pytest.fixture
def voc(tmp_path):
    shapes.write_voc(tmp_path, shapes.drawn_set(seed=2, count=4, side=32, most=2))
    return tmp_path


@pytest.fixture
def call(capsys):
    """Status, the JSON of a command (None after a mistake), and its lines on stderr."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main(["segment", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, json.loads(out.splitlines()[-1]) if out else None, err

    return call


def tokens_of(workdir, coco, layer):
    """Subspace tokens (N, K, p) of the four images, as the command should see them."""
    params, _, _ = read_trained(workdir, "latest")
    paths = sorted((coco.parent / "images").iterdir())
    grey = np.stack([cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths])
    images = (grey[..., None].astype(np.float32) / 255 - CONFIG.data.mean[0]) / CONFIG.data.std[0]
    _, seen = taps(
        build_model(CONFIG.model).clone(num_classes=10), params, images, names="subspace_tokens"
    )
    return np.asarray(seen["subspace_tokens"])[layer - 1]


def test_objects_of_coco_s_images(workdir, coco, call):
    images = ["--images", coco.parent / "images", "--annotations", coco]
    status, found, err = call("--workdir", workdir, *images, "--size", 32, "--tau", 0.9)
    assert status == 0, err
    output = workdir / "segmentation"
    assert found["output"] == str(output) and found["images"] == 4 and found["step"] == 1
    assert (found["method"], found["layer"], found["objects"]) == ("maskcut", 3, 3)
    results = json.loads((output / "results.json").read_text())
    assert found["masks"] == len(results) > 4
    expected = []
    for tokens in tokens_of(workdir, coco, layer=3):
        for cut in maskcut(tokens[1:].reshape(64, -1), (8, 8), tau=0.9):
            expected.append(encode(enlarge(cut.mask_P, (8, 8), (32, 32))))
    assert [row["segmentation"] for row in results] == expected
    assert {row["image_id"] for row in results} <= {1, 2, 3, 4}
    assert all(0 <= row["score"] <= 1 and row["category_id"] == 1 for row in results)
    assert {"box_ap", "mask_ap50", "mask_ap75"} <= set(found) and 0 <= found["box_ap"] <= 1
    picture = cv2.imread(str(output / "1_0001.png"))
    assert picture.shape == (128, 2 * 128 + 4, 3) and (picture[:, :128] != picture[:, -128:]).any()


def test_the_truth_scores_one(coco, call, workdir, monkeypatch):
    """Masks of COCO's own in the place of those found: what comes out is scored as it is."""
    content = json.loads(coco.read_text())
    truth = {}
    for row in content["annotations"]:
        truth.setdefault(row["image_id"], []).append(row)

    def same(found, grid):
        number = found.picture.number
        rows = [{**row, "score": 1.0, "category_id": 1} for row in truth[number]]
        return rows, None

    monkeypatch.setattr("crate_jax.cli.segmenting.results_of", same)
    images = ["--images", coco.parent / "images", "--annotations", coco]
    _, found, _ = call("--workdir", workdir, *images, "--size", 32, "--limit", 3)
    assert found["images"] == 3
    assert [found[f"{kind}_ap"] for kind in ("box", "mask")] == [1.0, 1.0]


def test_coarse_masks_of_a_folder_as_voc_s(workdir, coco, voc, call, tmp_path):
    flags = ["--method", "coarse", "--share_of", "mass", "--definition", "official_code"]
    flags += ["--layer", 1, "--size", 32, "--output", tmp_path / "out", "--pictures", 1]
    status, found, err = call("--workdir", workdir, "--images", voc, *flags)
    assert status == 0, err
    assert found["masks"] == 8 and len(list((tmp_path / "out").glob("*.png"))) == 1
    maps = class_attention(tokens_of(workdir, coco, layer=1), definition="official_code")
    masks = np.asarray(share_of_mass(maps, 0.6)).reshape(4, 2, 8, 8)
    means = []
    for drawn, heads in zip(shapes.drawn_set(2, 4, 32, 2), masks, strict=True):
        large = heads.repeat(4, axis=1).repeat(4, axis=2)
        fits = []
        for kind in set(drawn.kinds):
            S = sum(m for k, m in zip(drawn.kinds, drawn.masks, strict=True) if k == kind) > 0
            fits.append(max((S & A).sum() / (S.sum() + A.sum() - (S & A).sum()) for A in large))
        means.append(np.mean(fits))
    assert found["miou"] == pytest.approx(np.mean(means), abs=1e-4)
    one = call("--workdir", workdir, "--images", voc, *flags, "--head", 2)[1]
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert one["masks"] == 4
    assert [row["segmentation"] for row in rows] == [
        encode(heads[1].repeat(4, axis=0).repeat(4, axis=1)) for heads in masks
    ]


def test_the_foreground_that_images_share(workdir, voc, call, tmp_path):
    flags = ["--method", "pca", "--size", 32, "--output", tmp_path / "out"]
    status, found, err = call("--workdir", workdir, "--images", voc / "JPEGImages", *flags)
    assert status == 0, err
    assert found["images"] == 4 and 1 <= found["masks"] <= 4 and "miou" not in found
    picture = cv2.imread(str(tmp_path / "out/1_0001.png"))
    assert picture.shape == (128, 3 * 128 + 8, 3)
    colours, shown = picture[:, 132:260], picture[:, 264:]
    outside = (colours == 0).all(axis=-1)  # nothing is drawn there, nor is the image changed
    np.testing.assert_array_equal(shown[outside], picture[:, :128][outside])
    paper = call("--workdir", workdir, "--images", voc, *flags, "--definition", "paper")[1]
    assert paper["definition"] == "paper" and paper["miou"] > 0


def test_weights_and_taps_without_heads(call, coco, tmp_path):
    name = "vit_tiny_patch16_224"
    fields = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)
    fields |= dict(registers=2)
    model = create_model(name, **fields)
    params = model.init(jax.random.key(0), model.sample_input(), train=False)["params"]
    save_weights(tmp_path / "vit.npz", params, model)
    weights = ["--weights", tmp_path / "vit.npz", "--model", name, "--model-kwargs"]
    weights += [f"{field}={value}" for field, value in fields.items()]
    common = [*weights, "--images", coco.parent / "images", "--output", tmp_path / "out"]
    status, _, err = call(*common)
    assert status == 2 and err.count("\n") == 1
    assert "--tap must be among mhsa, z_half, mlp, out for maskcut of this ViT; got subs" in err
    status, found, err = call(*common, "--tap", "out", "--size", 64)
    assert (status, found["step"], found["tap"]) == (0, None, "out"), err
    status, found, err = call(*common, "--method", "coarse", "--tap", "attention", "--size", 64)
    assert (status, found["masks"], found["layer"]) == (0, 8, 1), err
    status, _, err = call(*common, "--tap", "out", "--head", 1)
    assert status == 2 and "--head must be left out for a tap without heads; got 1" in err


def test_what_it_refuses(workdir, call, coco, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"\x89PNG")
    images = coco.parent / "images"
    run = ["--workdir", workdir, "--output", tmp_path / "out"]
    for arguments, message in (
        ([*run], "segment must get --images, a folder"),
        ([*run, "--images", tmp_path / "empty"], "the folder must hold images"),
        ([*run, "--images", tmp_path / "none"], "must be a folder; there is none"),
        ([*run, "--images", tmp_path / "broken"], "x.png must be an image; its 4 bytes do not"),
        ([*run, "--images", images, "--tap", "keys"], "--tap must be among subspace_tokens, mssa,"),
        ([*run, "--images", images, "--layer", 4], "--layer must be 1 … 3 here; got 4"),
        ([*run, "--images", images, "--layer", 0], "--layer must be 1 … 3 here; got 0"),
        ([*run, "--images", images, "--head", 3], "--head must be 1 … 2 here; got 3"),
        (
            [*run, "--images", images, "--size", 30],
            "--size must be a multiple of model.patch_size; got",
        ),
        ([*run, "--images", images, "--size", 2], "got 2x2 and 4x4. Nearest that fits: 4x4"),
        ([*run, "--images", images, "--size", 0], "--size must be at least 1; got 0. Leave it out"),
        ([*run, "--images", images, "--size", -4], "--size must be at least 1; got -4"),
        ([*run, "--images", images, "--size", 80_000], "must fit into memory"),
        ([*run, "--images", images, "--pictures", -1], "--pictures must be at least 0; got -1"),
        ([*run, "--images", images, "--tau", "nan"], "tau must be a finite number; got nan"),
        ([*run, "--images", images, "--tau", 2], "tau must be from -1 to 1, as a cosine is; got 2"),
        ([*run, "--images", images, "--method", "coarse", "--share", 0], "share must be above 0"),
        (
            [*run, "--images", images, "--annotations", coco, "--split", "val"],
            "--split must go without --annotations, which list the images; got val",
        ),
        ([*run, "--images", images, "--objects", 0], "objects must be at least 1; got 0"),
        ([*run, "--images", images, "--limit", 0], "--limit must be at least 1; got 0"),
        ([*run, "--images", images, "--share", 0.5], "--share must go with --method coarse; got"),
        ([*run, "--images", images, "--split", "val"], "--split must go with a folder as VOC's"),
        ([*run, "--images", tmp_path, "--annotations", coco], "of 4 are not there, such as 0001"),
        ([*run, "--images", images, "--annotations", images / "0001.png"], "annotations as COCO's"),
        ([*run, "--images", images, "--model", "x"], "--model must go with --weights"),
        (["--weights", "w", "--step", "1", "--images", images], "--step must go with --workdir"),
        (["--images", images], "segment must get one of --workdir and --weights"),
        ([*run, "--images", images, "--method", "sam"], "invalid choice: 'sam'"),
    ):
        status, found, err = call(*arguments)
        assert status == 2 and found is None, arguments
        assert message in err and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.fixture
def no_work(monkeypatch):
    """A model that must not be run."""

    def run(*_):
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr("crate_jax.cli.segmenting.Reader._layer", run)


def test_nothing_to_score_is_told_before_the_work(workdir, coco, call, tmp_path, no_work):
    content = json.loads(coco.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] > 2]
    (tmp_path / "some.json").write_text(json.dumps(content))
    flags = ["--images", coco.parent / "images", "--annotations", tmp_path / "some.json"]
    status, _, err = call("--workdir", workdir, *flags, "--limit", 2)
    assert status == 2 and "must hold an object of these images that is no crowd; got none" in err


def test_a_broken_image_is_told_before_the_work(workdir, voc, call, no_work):
    (voc / "JPEGImages/0004.png").unlink()
    (voc / "JPEGImages/0004.jpg").write_bytes(b"no")
    status, _, err = call("--workdir", workdir, "--images", voc, "--size", 32)
    assert status == 2 and "0004.jpg must be an image; its 2 bytes do not decode" in err


def test_classes_of_nothing(workdir, voc, call, no_work):
    for number in range(1, 5):
        labels = np.full((32, 32), 255 * (number % 2), np.uint8)
        cv2.imwrite(str(voc / f"SegmentationClass/{number:04d}.png"), labels)
    status, _, err = call("--workdir", workdir, "--images", voc, "--size", 32)
    assert status == 2 and "the images must hold a class to fit, 1 … 254; theirs are all b" in err


def test_attention_has_its_own_definition(workdir, coco, call, tmp_path):
    flags = ["--images", coco.parent / "images", "--size", 32, "--output", tmp_path / "out"]
    flags += ["--method", "coarse", "--tap", "attention"]
    status, found, err = call("--workdir", workdir, *flags)
    assert status == 0 and "definition" not in found, err
    status, _, err = call("--workdir", workdir, *flags, "--definition", "paper")
    assert status == 2 and "--definition must go with --tap subspace_tokens; got paper" in err


def test_large_images_are_drawn_smaller(workdir, call, tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / f"in/{'x' * 250}.png"), np.zeros((640, 2560), np.uint8))
    flags = ["--images", tmp_path / "in", "--output", tmp_path / "out", "--method", "pca"]
    status, found, err = call("--workdir", workdir, *flags, "--size", 32)
    assert (status, found["images"]) == (0, 1), err
    picture = cv2.imread(str(tmp_path / f"out/1_{'x' * 60}.png"))
    assert picture.shape == (320, 3 * 1280 + 2 * 4, 3)


def test_masks_of_another_size_than_their_image(workdir, voc, call, no_work):
    cv2.imwrite(str(voc / "SegmentationClass/0002.png"), np.zeros((5, 5), np.uint8))
    status, _, err = call("--workdir", workdir, "--images", voc, "--size", 32)
    assert status == 2 and "0002.png must be of its image's size, 32 x 32; it is 5 x 5" in err


def test_a_missing_package_is_told_before_the_work(workdir, coco, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    flags = ["--images", coco.parent / "images", "--annotations", coco]
    status, _, err = call("--workdir", workdir, *flags)
    assert status == 2 and "pip install 'crate-jax[segment]'" in err


def test_a_model_of_text_has_no_images(call, coco, tmp_path):
    fields = dict(width=16, depth=1, num_heads=2, vocab_size=50)
    model = create_model("crate_causal_base", **fields)
    variables = model.init(jax.random.key(0), model.sample_input(), train=False)
    save_weights(tmp_path / "text.npz", variables, model)
    weights = ["--weights", tmp_path / "text.npz", "--model", "crate_causal_base"]
    weights += ["--model-kwargs", *(f"{field}={value}" for field, value in fields.items())]
    status, _, err = call(*weights, "--images", coco.parent / "images")
    assert status == 2 and "model must classify images here; got a CrateCausal, of text" in err


def test_without_a_class_token_there_is_no_map(call, coco, tmp_path):
    name = "tost_tiny_patch16_224"
    fields = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)
    model = create_model(name, **fields)
    variables = model.init(jax.random.key(0), model.sample_input(), train=False)
    save_weights(tmp_path / "tost.npz", variables, model)
    weights = ["--weights", tmp_path / "tost.npz", "--model", name, "--model-kwargs"]
    weights += [f"{field}={value}" for field, value in fields.items()]
    common = [*weights, "--images", coco.parent / "images", "--output", tmp_path / "out"]
    status, found, err = call(*common, "--size", 64)
    assert (status, found["images"]) == (0, 4), err
    (tmp_path / "out/results.json").unlink()
    status, _, err = call(*common, "--positions", "official_maps")
    assert status == 2 and "--positions must be right for a ToST, whose positions are not" in err
    status, _, err = call(*common, "--method", "coarse", "--size", 64)
    assert not (tmp_path / "out/results.json").exists()
    assert status == 2 and "coarse must get a model with a class token among its tokens" in err
