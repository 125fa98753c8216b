"""NFNet-F0's sizes, the image folder, augmentation, and the command end to end and resumed."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import cfll
from benchmarks.core.records import Records
from benchmarks.data import augment, image_folder
from benchmarks.experiments import imagenet
from benchmarks.experiments.imagenet import recipe, train
from benchmarks.models.nfnet import NFNet, standardize
from benchmarks.reporting.summary import to_markdown

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

CLASSES = ("n01440764", "n01443537", "n02102040")
COLORS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))
TINY = NFNet(depths=(1,), widths=(8,), group_width=4, stem=(4,), dtype=jnp.float32)
SIZES = recipe.Preset(TINY, 16, 16, batch_size=8, epochs=3, warmup_epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The official layout: three classes of eight training and five validation images."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for name, color in zip(CLASSES, COLORS, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                shape = (rng.integers(30, 50), rng.integers(30, 50), 3)
                pixels = np.clip(color + rng.normal(0, 20, shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{split}_{i}.JPEG")
    return root


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "cpu", SIZES)


class NoProgress:
    """Stops a run, as Ctrl-C does, after a number of steps."""

    def __init__(self, steps=math.inf):
        self.left = steps

    def start(self, label, num_steps):
        self.num_steps = num_steps

    def step(self, loss):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


# The network --------------------------------------------------------------------------------------


def test_f0_has_the_parameters_and_shapes_of_the_paper():
    model, images = NFNet(), jnp.zeros((2, 192, 192, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 71_489_284
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert variables["params"]["head"]["kernel"].shape == (3072, 1000)
    features = jax.eval_shape(lambda v: model.apply(v, images, method="features"), variables)
    assert (features.shape, features.dtype) == ((2, 3072), jnp.float32)
    assert jax.eval_shape(lambda v: model.apply(v, images), variables).shape == (2, 1000)


def test_standardized_kernels():
    rng = np.random.default_rng(0)
    kernel = rng.normal(3, 2, (3, 3, 4, 8)).astype(np.float32)
    standard = np.asarray(jax.jit(standardize)(kernel))
    np.testing.assert_allclose(standard.mean(axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(standard.var(axis=(0, 1, 2)) * 36, 1, rtol=1e-4)
    # So white noise keeps its variance.
    assert abs((rng.normal(size=(5000, 36)) @ standard.reshape(36, 8)).var() - 1) < 0.02


def test_training_mode_is_random_and_the_head_sees_the_features():
    model = TINY.clone(depths=(2,), num_features=32, num_outputs=5, stochastic_depth=0.5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 16, 16, 3)).astype(np.float32)
    # Random everywhere, the gains that start at zero included.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        jax.eval_shape(model.init, jax.random.key(0), x)["params"],
    )

    @jax.jit
    def features_and_outputs(key):
        kwargs = {"train": True, "rngs": {"dropout": key}}
        features = model.apply({"params": params}, x, method="features", **kwargs)
        return features, model.apply({"params": params}, x, **kwargs)

    features, outputs = features_and_outputs(jax.random.key(0))
    np.testing.assert_allclose(
        cfll.get_head(params, "head")(features), outputs, rtol=1e-4, atol=1e-4
    )
    assert not np.allclose(outputs, features_and_outputs(jax.random.key(1))[1])
    assert np.mean(np.asarray(features) == 0) == pytest.approx(0.2, abs=0.06)


# Data ---------------------------------------------------------------------------------------------


def test_the_image_folder_reads_the_official_layout(folder):
    splits = image_folder.open_image_folder(folder)
    assert splits.classes == list(CLASSES)
    assert len(splits.train.files) == 24
    assert splits.val.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5

    def epoch(number, workers=2):
        batches = image_folder.train_batches(
            splits.train, size=16, batch_size=7, seed=0, epoch=number, workers=workers
        )
        return list(image_folder.prefetch(batches))

    batches = epoch(0)
    assert len(batches) == 3  # the remainder of 3 is left out
    images, labels = batches[0]
    assert (images.shape, images.dtype) == ((7, 16, 16, 3), np.uint8)
    nearest = [np.abs(COLORS - pixels.mean(axis=(0, 1))).sum(axis=1).argmin() for pixels in images]
    np.testing.assert_array_equal(nearest, labels)  # every image has its own label
    np.testing.assert_array_equal(images, epoch(0, workers=1)[0][0])
    assert not np.array_equal(images, epoch(1)[0][0])

    batches = list(image_folder.eval_batches(splits.val, size=16, batch_size=8, workers=2))
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_array_equal(labels, [*splits.val.labels, image_folder.PADDING])
    assert {images.shape for images, _ in batches} == {(8, 16, 16, 3)}


def test_boxes_of_large_images_are_decoded_small_and_lie_where_they_should(tmp_path):
    ramp = np.linspace(0, 255, 1000)[None, :, None] * np.ones((800, 1, 3))
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "ramp.JPEG", quality=95)
    box = (200.0, 100.0, 700.0, 500.0)
    pixels = image_folder.read_box(str(tmp_path / "ramp.JPEG"), lambda w, h: box, 10)
    expected = 255 / 999 * (200 + 50 * (np.arange(10) + 0.5))
    np.testing.assert_allclose(pixels.mean(axis=(0, 2)), expected, atol=2)
    (tmp_path / "broken.JPEG").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"broken\.JPEG cannot be read"):
        image_folder.read_box(str(tmp_path / "broken.JPEG"), lambda w, h: box, 10)


def test_random_boxes_stay_inside_in_area_and_ratio():
    rng = np.random.default_rng(0)
    for left, top, right, bottom in (image_folder.random_box(500, 375, rng) for _ in range(200)):
        assert 0 <= left < right <= 500 + 1e-9
        assert 0 <= top < bottom <= 375 + 1e-9
        width, height = right - left, bottom - top
        assert width * height >= 0.08 * 500 * 375 - 1e-6
        assert 3 / 4 - 1e-9 <= width / height <= 4 / 3 + 1e-9


def test_missing_images_are_named(folder, tmp_path):
    with pytest.raises(SystemExit, match=r"--data FOLDER.*train/<class>/\*\.JPEG"):
        imagenet.imagenet(out=tmp_path)
    with pytest.raises(SystemExit, match=r"no folder .*nowhere.*--data.*val/<class>"):
        imagenet.imagenet(data=tmp_path / "nowhere", out=tmp_path)
    (tmp_path / "train" / "n1").mkdir(parents=True)
    (tmp_path / "val" / "n1").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no images in .*train"):
        imagenet.imagenet(data=tmp_path, out=tmp_path)
    (tmp_path / "val" / "n2").mkdir()
    with pytest.raises(SystemExit, match=r"e\.g\. n2"):
        imagenet.imagenet(data=tmp_path, out=tmp_path)
    with pytest.raises(SystemExit, match="do not fill a batch"):
        imagenet.imagenet(data=folder, out=tmp_path, batch_size=100)
    with pytest.raises(SystemExit, match="10 warm-up epochs of 10"):
        imagenet.imagenet(data=folder, out=tmp_path, batch_size=8, warmup_epochs=10)


# Augmentation -------------------------------------------------------------------------------------


def test_mixed_targets_sum_to_one_and_follow_the_pixels():
    # Image i is of color 20 i and of class i: the mean pixel tells the shares.
    n = 12
    images = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None] * 20, (n, 32, 32, 3))
    targets = augment.soft_targets(np.arange(n), n, smoothing=0.0)
    mixed, shares = augment.mix(images, targets, np.random.default_rng(0))
    assert (mixed.dtype, mixed.shape, shares.dtype) == (np.uint8, images.shape, np.float32)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), shares @ (20 * np.arange(n)), atol=0.51)
    halves = np.arange(n) // (n // 2)
    for row, (half, share) in enumerate(zip(halves, shares, strict=True)):
        assert set(halves[share > 0]) == {half}  # partners come from the same half
        assert len(set(np.unique(mixed[row]))) <= (1 if half == 0 else 2)
    assert (shares.max(axis=1) < 0.999).any()

    smooth = augment.soft_targets(np.array([2, 0]), 4)
    np.testing.assert_allclose(smooth[0], [0.025, 0.025, 0.925, 0.025], rtol=1e-6)
    _, smooth = augment.mix(images, augment.soft_targets(np.arange(n), n), np.random.default_rng(0))
    np.testing.assert_allclose(smooth.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("index", range(len(augment.OPERATIONS)))
def test_operations_of_rand_augment(index, monkeypatch):
    image = Image.fromarray(np.random.default_rng(0).integers(30, 200, (24, 24, 3), np.uint8))
    monkeypatch.setattr(augment, "OPERATIONS", [augment.OPERATIONS[index]])
    changed = [
        augment.rand_augment(image, np.random.default_rng(1), layers=1, magnitude=magnitude)
        for magnitude in (0, 5, 10)
    ]
    assert {(result.size, result.mode) for result in changed} == {((24, 24), "RGB")}
    assert any(not np.array_equal(result, image) for result in changed)


def test_rand_augment_depends_on_its_generator_alone():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))
    results = [
        np.asarray(augment.rand_augment(image, np.random.default_rng(seed))) for seed in (3, 3, 4)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


def test_normalization():
    images = np.array([[124, 116, 104]], np.uint8)
    np.testing.assert_allclose(augment.normalize(images), 0, atol=0.02)


# The optimizer ------------------------------------------------------------------------------------


def test_clipping_is_unit_wise_and_spares_the_head_decay_spares_gains_and_biases():
    params = {
        "conv": {"kernel": jnp.ones((1, 1, 4, 2)), "gain": jnp.ones(2), "bias": jnp.zeros(2)},
        "head": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)},
    }
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["conv"]["kernel"] = grads["conv"]["kernel"].at[..., 0].set(100.0)  # one of two channels
    grads["head"]["kernel"] = jnp.full((4, 3), 100.0)
    tx = recipe.sgd(lambda count: 1.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    decay, nesterov = 2e-5, 1.9
    steps = jax.tree.map(lambda u: u / -nesterov, updates)
    # A channel of norm 2 moves by 1 % of it, spread over four inputs; the other only decays.
    np.testing.assert_allclose(steps["conv"]["kernel"][..., 0], 0.01 + decay, rtol=1e-5)
    np.testing.assert_allclose(steps["conv"]["kernel"][..., 1], decay, rtol=1e-5)
    np.testing.assert_allclose(steps["conv"]["gain"], 0)
    np.testing.assert_allclose(steps["head"]["kernel"], 100 + decay, rtol=1e-5)
    np.testing.assert_allclose(steps["head"]["bias"], 0)


@pytest.mark.parametrize("method", recipe.CLOSED_FORM)
def test_a_closed_form_head_is_the_solution_neither_decayed_nor_clipped(method):
    plan = recipe.Plan("cpu", SIZES, 1e4, 0.01, seed=0, data={"train": 24})
    tx = recipe.transformation(plan, recipe.Config(method, 1.6))
    rng = np.random.default_rng(0)
    kernel, x, targets = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, 3), (8, 4), (8, 3))
    )
    params = {
        "conv": {"kernel": jnp.ones((1, 1, 4, 2))},
        "head": {"kernel": kernel, "bias": jnp.ones(3)},
    }
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, 100.0), params)
    update = jax.jit(partial(tx.update, feature_fn=lambda p: x))
    updates, state = update(grads, tx.init(params), params, targets=targets)
    head = cfll.get_head(optax.apply_updates(params, updates), "head")
    if method == recipe.RIDGE:
        expected = cfll.ridge_solve(x, targets, beta=0.01)
    else:
        expected = cfll.prox_solve(x, targets, cfll.get_head(params, "head"), lam=1e4 * 8 / 4096)
    np.testing.assert_allclose(head.kernel, expected.kernel, atol=1e-5)
    np.testing.assert_allclose(head.bias, expected.bias, atol=1e-5)
    momentum = optax.tree.get(state, "trace")
    assert [leaf.shape for leaf in jax.tree.leaves(momentum)] == [(1, 1, 4, 2)]


def test_the_moving_average_warms_up():
    average = {"w": jnp.zeros(())}
    for step in range(3):
        average = recipe.moving_average(average, {"w": jnp.ones(())}, jnp.int32(step))
    np.testing.assert_allclose(average["w"], 1 - (1 / 10) * (2 / 11) * (3 / 12), rtol=1e-6)


# The command --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny", "quick_compilation")
def test_imagenet_runs_and_is_not_repeated(folder, tmp_path, capsys):
    methods = ("cross entropy", "proximal")
    run = partial(imagenet.imagenet, data=folder, out=tmp_path, methods=methods, workers=2)
    run()
    lines = (tmp_path / "imagenet.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(methods)
    printed = capsys.readouterr().out
    assert all(method in printed for method in methods)

    summary = imagenet.summarize(Records(tmp_path / "imagenet.jsonl"), tmp_path, "cpu")
    assert [row[0] for row in summary.tables[0].rows] == list(methods)
    assert {claim.holds for claim in summary.claims} == {None}  # far too small to tell
    assert "far smaller" in summary.claims[1].evidence
    assert summary.figures[0].stat().st_size > 10_000
    assert "3 classes" in to_markdown(summary, tmp_path)

    run()
    assert "from disk" in capsys.readouterr().out
    assert (tmp_path / "imagenet.jsonl").read_text().splitlines() == lines


@pytest.mark.usefixtures("quick_compilation")
def test_a_killed_run_goes_on_to_the_same_parameters(folder, tmp_path):
    splits = image_folder.open_image_folder(folder)
    plan = recipe.Plan("cpu", SIZES, 1e4, 0.01, 0, image_folder.fingerprint(splits))
    config = recipe.Config(recipe.PROXIMAL, 1.6)
    assert plan.num_steps == 9
    undisturbed, record = train.Trainer(plan, splits, tmp_path / "a", 2).run(config, NoProgress())
    with pytest.raises(KeyboardInterrupt):  # in the middle of the last epoch
        train.Trainer(plan, splits, tmp_path / "b", 2).run(config, NoProgress(steps=7))
    progress = NoProgress()
    resumed, again = train.Trainer(plan, splits, tmp_path / "b", 2).run(config, progress)
    assert progress.num_steps == 3
    for old, new in zip(jax.tree.leaves(undisturbed), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(old, new)
    assert (again["top1"], again["steps"]) == (record["top1"], record["steps"])
    assert jnp.any(resumed.params["head"]["kernel"] != 0)
    assert optax.tree.get(resumed.opt_state, "info").skipped == 0


def test_without_runs_nothing_is_claimed(tmp_path):
    summary = imagenet.summarize(Records(tmp_path / "imagenet.jsonl"), tmp_path, "paper")
    assert [claim.holds for claim in summary.claims] == [None] * 3
    assert not summary.tables
    assert not summary.figures


def test_claims_are_decided_by_the_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(recipe.PRESETS, "paper", SIZES)
    records = Records(tmp_path / "imagenet.jsonl")
    plan = recipe.Plan("paper", SIZES, 1e4, 0.01, 0, {"classes": 1000, "train": 24, "val": 2})
    configs = [recipe.Config(m, r) for m in recipe.METHODS for r in (1.0, 1.6, 5.0)]
    imagenet.announce(records, plan, configs)
    top1 = {"l2": 0.5, "cross entropy": 0.8, "ridge": 0.6, "proximal": 0.7}
    for config in configs:
        accuracy = top1[config.method] - abs(config.rate - recipe.RATES[config.method]) / 10
        result = {"steps": [3], "top1": [accuracy], "ema_top1": [accuracy]}
        result |= {"seconds_per_step": 1.0, "diverged": config.rate == 5.0}
        records.add(plan.key(config), result)
    summary = imagenet.summarize(records, tmp_path, "paper")
    assert [claim.holds for claim in summary.claims] == [True, True, True]
    assert "70.00 % (proximal) and 50.00 % (l2)" in summary.claims[0].evidence
