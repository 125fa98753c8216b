"""The loaders on small files of the official layouts, synthetic data against their formulas."""

import io
import pickle
import sys
import zipfile

import numpy as np
import pytest
import scipy.integrate
import scipy.io
from PIL import Image

from benchmarks.data import (
    burgers,
    cifar,
    demand,
    dsprites,
    kdv,
    lorenz,
    navier_stokes,
    omniglot,
    ope,
)

HEARTS = dsprites.render_hearts()


def hearts_at(scale=5, orientation=0, x=15, y=15):
    axes = np.broadcast_arrays(*map(np.atleast_1d, (scale, orientation, x, y)))
    return HEARTS(np.stack(axes, axis=1)).reshape(-1, 64, 64)


# dSprites -----------------------------------------------------------------------------------------


def test_hearts_have_the_published_area():
    for scale, value in ((5, 1), (0, 0.5)):
        areas = hearts_at(scale, 0, np.arange(32), np.arange(32)).sum((1, 2))
        # The curve encloses 180 pi square units; pixels on its border are counted or not.
        assert abs(areas.mean() - 180 * np.pi * (0.63 * value) ** 2) < 5
    assert abs(hearts_at(5, 0, np.arange(32), np.arange(32)).sum((1, 2)).mean() - 226) < 4


def test_hearts_are_upright_and_turn_counter_clockwise():
    def lean(profile):
        """How far the centre of the ink is from the middle between its ends, in pixels."""
        inked = np.flatnonzero(profile)
        return profile @ np.arange(64) / profile.sum() - inked[[0, -1]].mean()

    image, quarter = hearts_at(orientation=[0, 10])  # 10 of 39 steps: 92 degrees
    # A notch between two lobes above, the tip below: more ink in the upper half.
    rows = np.flatnonzero(image.any(1))
    assert np.abs(np.diff(image[rows[0]])).sum() == 4
    assert lean(image.sum(1)) < -1
    assert abs(lean(image.sum(0))) < 0.3
    # A quarter turn counter-clockwise brings the tip to the right.
    assert lean(quarter.sum(0)) < -1
    assert abs(lean(quarter.sum(1))) < 0.5


def test_hearts_move_by_a_pixel_per_position():
    steps = np.arange(32)
    for axis, images in enumerate((hearts_at(y=steps), hearts_at(x=steps))):
        profile = images.sum(2 - axis)
        centres = profile @ np.arange(64) / profile.sum(1)
        # 32 pixels in 31 steps; the centroid of a drawn heart is off by a fraction of a pixel.
        np.testing.assert_allclose(centres - centres[0], steps * 32 / 31, atol=0.4)


def test_no_heart_is_clipped_by_the_patch_it_is_drawn_in(monkeypatch):
    classes = np.stack([np.full(40, 5), np.arange(40), np.arange(40) % 32, np.full(40, 16)], axis=1)
    expected = HEARTS(classes)
    monkeypatch.setattr(dsprites, "PATCH", 30)
    np.testing.assert_array_equal(HEARTS(classes), expected)


@pytest.fixture
def official_dsprites(tmp_path):
    """A file of the official format with every shape, but few positions, in the official order."""
    sizes = (1, 3, 6, 40, 2, 1)
    classes = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
    images = HEARTS(classes[:, 2:]).reshape(-1, 64, 64).astype(np.uint8)
    images[classes[:, 1] != dsprites.HEART] = 1
    path = tmp_path / dsprites.FILE
    np.savez_compressed(
        path,
        metadata=np.array({b"title": b"dSprites dataset", b"latents_sizes": sizes}, dtype=object),
        imgs=images,
        latents_classes=classes,
        latents_values=classes.astype(float),
    )
    return path


def test_official_hearts_have_the_same_interface(official_dsprites):
    rng = np.random.default_rng(0)
    classes = rng.integers((6, 40, 2, 1), size=(50, 4))
    for path in (official_dsprites, official_dsprites.parent):
        images = dsprites.read_hearts(path)(classes)
        assert images.dtype == np.float32
        np.testing.assert_array_equal(images, HEARTS(classes))
    with pytest.raises(ValueError, match="no heart"):
        dsprites.read_hearts(official_dsprites)(np.array([[0, 0, 0, 0], [0, 0, 5, 0]]))


def test_iv_data_follow_the_paper():
    data = dsprites.make_iv(1000, 3, HEARTS)
    assert data.train.treatment.shape == (1000, 4096)
    assert data.validation.treatment.shape == (100, 4096)
    assert data.test.treatment.shape == (488, 4096)
    assert {values.dtype for part in data for values in part} == {np.dtype(np.float32)}

    # Pixel noise of deviation 0.1 on images of 0 and 1.
    pixels = data.train.treatment
    assert abs((pixels - np.round(pixels.clip(0, 1))).std() - 0.1) < 1e-3

    # Equation (47), written out; then what (46) adds: the confounder and noise of deviation 0.5.
    b = np.array([[abs(32 - j) / 32 for j in range(64)] for _ in range(64)]).reshape(-1)
    f = ((pixels @ b) ** 2 - 3000) / 500
    rest = data.train.outcome[:, 0] - f
    ink = np.round(pixels.clip(0, 1)).reshape(-1, 64, 64).sum(2)
    row = ink @ np.arange(64) / ink.sum(1)  # 32 posY, and an offset that varies a little by shape
    slope, intercept = np.polyfit(row, rest, 1)
    assert abs(slope - 1) < 0.02
    assert (rest - slope * row - intercept).std() < 1.5
    expected = ((data.test.treatment @ b) ** 2 - 3000) / 500
    np.testing.assert_allclose(data.test.structural[:, 0], expected, rtol=1e-4, atol=1e-4)

    # The instrument's values, in physical units.
    low, high = data.train.instrument.min(0), data.train.instrument.max(0)
    np.testing.assert_allclose(low, [0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(high, [1, 2 * np.pi, 1], rtol=1e-6)


def test_iv_data_are_deterministic_and_share_their_grid():
    one, same, other = (dsprites.make_iv(20, seed, HEARTS) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.train.outcome, same.train.outcome)
    assert not np.array_equal(one.train.outcome, other.train.outcome)
    np.testing.assert_array_equal(one.test.structural, other.test.structural)
    classes = dsprites.grid_classes()
    assert len(np.unique(classes, axis=0)) == 588
    assert (classes.max(0) == [5, 30, 30, 30]).all()


# Offline policy evaluation ------------------------------------------------------------------------


def test_cartpole_obeys_its_equations_of_motion():
    """Newton's, implicit in the accelerations: of cart and pole along x, of the pole around it."""
    states = np.random.default_rng(0).normal(size=(50, 4)) * [1, 1, 0.1, 1]
    actions = np.arange(50) % 2
    after, rewards, ended = ope.cartpole_step(states, actions)
    (_, speed, angle, turning), rates = states.T, ((after - states) / 0.02).T
    np.testing.assert_allclose(rates[0], speed)
    np.testing.assert_allclose(rates[2], turning)
    along = rates[3] * np.cos(angle) - turning**2 * np.sin(angle)
    np.testing.assert_allclose(1.1 * rates[1] + 0.05 * along, np.where(actions == 1, 10, -10))
    lever = rates[1] * np.cos(angle) + 0.5 * 4 / 3 * rates[3]
    np.testing.assert_allclose(lever, 9.8 * np.sin(angle), atol=1e-12)
    assert rewards.tolist() == [1] * 50
    np.testing.assert_array_equal(ended, (abs(after[:, 0]) > 2.4) | (abs(after[:, 2]) > np.pi / 15))


def test_mountain_car_rests_in_the_valley_stops_at_the_wall_and_ends_at_the_top():
    valley = -np.pi / 6
    states = np.array([[valley, 0], [valley, 0], [-1.19, -0.07], [0.49, 0.05], [-1.0, 0.07]])
    after, rewards, ended = ope.mountain_car_step(states, np.array([1, 2, 0, 2, 2]))
    np.testing.assert_allclose(after[:2], [[valley, 0], [valley + 0.001, 0.001]], atol=1e-12)
    np.testing.assert_array_equal(after[2], [-1.2, 0])
    assert after[4, 1] == 0.07
    assert ended.tolist() == [False, False, False, True, False]
    assert rewards.tolist() == [-1] * 5


@pytest.mark.parametrize("name", ["cartpole", "mountain_car"])
def test_transitions_are_those_of_the_behaviour_policy(name):
    environment = ope.ENVIRONMENTS[name]
    num_actions = environment.num_actions
    rows = ope.make_transitions(name, 20_000, seed=0)
    states, chosen = np.split(rows.now, [-num_actions], axis=1)
    states = states * environment.scale + environment.center
    target = environment.policy(states)
    behaviour = 0.5 * target + 0.5 / num_actions
    np.testing.assert_allclose(chosen.mean(0), behaviour.mean(0), atol=0.02)
    likely = np.arange(num_actions) == target.argmax(1)[:, None]
    np.testing.assert_allclose(chosen[likely].mean(), behaviour[likely].mean(), atol=0.02)
    # The state that follows is that of the chosen action, but for the noise.
    after, *_ = environment.step(states, chosen.argmax(1))
    later, next_chosen = np.split(rows.later, [-num_actions], axis=1)
    seen = later * environment.scale + environment.center
    as_chosen = np.all(np.abs(seen - after) < 1e-4, axis=1).mean()
    np.testing.assert_allclose(as_chosen, 1 - 0.2 * (1 - 1 / num_actions), atol=0.02)
    np.testing.assert_allclose(next_chosen.mean(0), environment.policy(seen).mean(0), atol=0.02)
    # What may follow, in the mean, is what did.
    pairs, probabilities = ope.continuations(name, rows.now)
    weights = probabilities.sum(0)
    assert weights.max() < 1 + 1e-6
    np.testing.assert_allclose(weights.mean(), rows.continues.mean(), atol=3e-3)
    expected = np.sum(probabilities * pairs, axis=0)
    difference = rows.continues * rows.later - expected
    noise = difference.std(0) / np.sqrt(len(difference))
    np.testing.assert_array_less(np.abs(difference.mean(0)), 5 * noise + 1e-6)
    # Episodes follow one another: where one goes on, the next row starts at its next state.
    goes_on = rows.continues[:-1, 0] == 1
    same = np.all(later[:-1] == rows.now[1:, : later.shape[1]], axis=1)
    assert same[goes_on].mean() > 0.99
    assert not same[~goes_on].any()
    np.testing.assert_allclose(ope.make_starts(name, 50, 0).weights.sum(), 1, rtol=1e-5)


def test_returns_are_discounted_rewards():
    cartpole = ope.returns("cartpole", 50, seed=1)
    steps = np.log(1 - cartpole * 0.05) / np.log(0.95)  # 1 + .95 + ... of a whole number of steps
    np.testing.assert_allclose(steps[cartpole < 15], np.round(steps[cartpole < 15]), atol=1e-6)
    assert np.all(ope.returns("mountain_car", 50, uniform=1.0, seed=1) < -95)


# Demand design ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0.9])
def test_demand_follows_its_formula(rho):
    train, validation, test = demand.make_demand(20_000, seed=1, rho=rho)
    p, y = train.treatment[:, 0], train.outcome[:, 0]
    c, t, s = train.instrument.T
    np.testing.assert_array_equal(train.covariate, train.instrument[:, 1:])
    psi = 2 * ((t - 5) ** 4 / 600 + np.exp(-4 * (t - 5) ** 2) + t / 10 - 2)
    price_noise = p - 25 - (c + 3) * psi
    sales_noise = y - (100 + (10 + p) * s * psi - 2 * p)
    # Standard errors at 20,000 samples are 0.005 to 0.01.
    noise = [price_noise, sales_noise]
    np.testing.assert_allclose(np.cov(noise), [[1, rho], [rho, 1]], atol=0.04)
    assert abs(np.corrcoef(c, sales_noise)[0, 1]) < 0.03
    assert set(np.unique(s)) == set(range(1, 8))
    assert 0 <= t.min() < 0.01 < 9.99 < t.max() <= 10

    assert (len(validation.treatment), len(test.treatment)) == (400, 2400)
    grid = demand.Grid(*map(np.concatenate, zip(validation, test, strict=True)))
    assert len(np.unique(np.hstack(grid[:2]), axis=0)) == 2800
    p, (t, s) = grid.treatment[:, 0], grid.covariate.T
    psi = 2 * ((t - 5) ** 4 / 600 + np.exp(-4 * (t - 5) ** 2) + t / 10 - 2)
    expected = 100 + (10 + p) * s * psi - 2 * p
    np.testing.assert_allclose(grid.structural[:, 0], expected, rtol=1e-4, atol=1e-3)


def test_demand_is_deterministic_and_checks_rho():
    one, same = (demand.sample(10, seed=4).outcome for _ in range(2))
    np.testing.assert_array_equal(one, same)
    with pytest.raises(ValueError, match="correlation"):
        demand.sample(10, seed=0, rho=2)


# CIFAR --------------------------------------------------------------------------------------------


def write_pickle(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def cifar_batch(rng, n, labels, num_classes):
    rows = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    return {b"data": rows, labels: rng.integers(0, num_classes, n).tolist(), b"batch_label": b"x"}


def test_cifar10_reads_the_official_layout(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    names = [f"data_batch_{i}" for i in range(1, 6)]
    batches = {name: cifar_batch(rng, 20, b"labels", 10) for name in (*names, "test_batch")}
    for name, batch in batches.items():
        write_pickle(folder / name, batch)
    write_pickle(folder / "batches.meta", {b"label_names": [b"cat"] * 10})

    data = cifar.load_cifar10(tmp_path, seed=1)
    assert [len(part.labels) for part in data[:3]] == [80, 20, 20]
    assert data.train.images.dtype == np.uint8
    assert data.names == ("cat",) * 10
    np.testing.assert_array_equal(data.test.labels, batches["test_batch"][b"labels"])
    # Pixel (row 2, column 5) of the green channel.
    np.testing.assert_array_equal(
        data.test.images[:, 2, 5, 1], batches["test_batch"][b"data"][:, 1024 + 2 * 32 + 5]
    )
    # Every training image is in exactly one part, with its label.
    images = np.concatenate([data.train.images, data.validation.images])
    labels = np.concatenate([data.train.labels, data.validation.labels])
    read = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for batch in list(batches.values())[:5]:
        for row, label in zip(batch[b"data"], batch[b"labels"], strict=True):
            assert read[row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes()] == label
    assert len(read) == 100

    again = cifar.load_cifar10(folder, seed=1)
    np.testing.assert_array_equal(again.train.images, data.train.images)
    assert not np.array_equal(cifar.load_cifar10(folder).train.images, data.train.images)


def test_cifar100_reads_the_official_layout(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-python"
    for name, n in (("train", 50), ("test", 10)):
        batch = cifar_batch(rng, n, b"fine_labels", 100)
        write_pickle(folder / name, batch | {b"coarse_labels": [0] * n})
    write_pickle(folder / "meta", {b"fine_label_names": [b"%d" % i for i in range(100)]})
    data = cifar.load_cifar100(tmp_path)
    assert [part.images.shape[0] for part in data[:3]] == [40, 10, 10]
    assert data.names[7] == "7"


def test_normalize_and_augment():
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    normalized = cifar.normalize(images)
    assert normalized.dtype == np.float32
    np.testing.assert_allclose(
        normalized, (images / 255 - cifar.MEAN) / cifar.STD, rtol=1e-4, atol=1e-5
    )

    one, same, other = (cifar.augment(images, np.random.default_rng(s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    shifts, flips = set(), 0
    for before, after in zip(padded, one, strict=True):
        found = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (1, -1)
            if np.array_equal(before[top : top + 32, left : left + 32][:, ::flip], after)
        ]
        assert len(found) == 1
        shifts.add(found[0][:2])
        flips += found[0][2] == -1
    assert len(shifts) > 30
    assert 20 <= flips <= 44  # 32 expected, standard deviation 4


# Omniglot -----------------------------------------------------------------------------------------


def drawing(row):
    """A PNG as the official ones: 105 x 105, 1 bit, ink black; one block of 15 x 15."""
    pixels = np.ones((105, 105), bool)
    pixels[row : row + 15, 30:45] = False
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def omniglot_files(folder, alphabets):
    return {
        f"{folder}/{alphabet}/character{c:02d}/{100 + c:04d}_{d:02d}.png": drawing(15 * c + d)
        for alphabet in alphabets
        for c in (1, 2)
        for d in range(1, 21)
    }


def test_omniglot_reads_archives_and_folders(tmp_path):
    small1 = omniglot_files("images_background_small1", ["Greek", "Latin"])
    small2 = omniglot_files("images_background_small2", ["Greek", "Tagalog"])
    with zipfile.ZipFile(tmp_path / "omniglot_background_small1.zip", "w") as archive:
        for name, content in small1.items():
            archive.writestr(name, content)
    extracted = tmp_path / "extracted"
    for name, content in small1.items():
        (extracted / name).parent.mkdir(parents=True, exist_ok=True)
        (extracted / name).write_bytes(content)

    data = omniglot.load_omniglot(tmp_path / "omniglot_background_small1.zip", seed=2)
    assert data.names == tuple(f"{a}/character{c:02d}" for a in ("Greek", "Latin") for c in (1, 2))
    for part, drawers in zip(data[:3], (12, 4, 4), strict=True):
        assert part.images.shape == (drawers * 4, 28, 28, 1)
        assert part.images.dtype == np.float32
        assert (np.bincount(part.labels) == drawers).all()
        assert len(np.unique(part.drawer)) == drawers
        # Ink is one; its area survives: 15 x 15 of 105 x 105, in bytes.
        np.testing.assert_allclose(part.images.mean((1, 2, 3)), (15 / 105) ** 2, atol=1e-3)
        row = np.argmax(part.images[..., 0].sum(2), axis=1) * 105 / 28
        assert (np.abs(row - (15 * (part.labels % 2 + 1) + part.drawer + 1)) < 8).all()
    drawers = [set(part.drawer) for part in data[:3]]
    assert set.union(*drawers) == set(range(20))

    same = omniglot.load_omniglot(extracted, seed=2)
    np.testing.assert_array_equal(same.train.images, data.train.images)
    assert set(omniglot.load_omniglot(extracted, seed=3).test.drawer) != drawers[2]

    # Two archives in one folder: what both have is one class.
    with zipfile.ZipFile(tmp_path / "omniglot_background_small2.zip", "w") as archive:
        for name, content in small2.items():
            archive.writestr(name, content)
    (tmp_path / "extracted").rename(tmp_path.with_name("elsewhere"))
    both = omniglot.load_omniglot(tmp_path)
    assert len(both.names) == 6
    assert len(both.train.labels) == 6 * 12


# Burgers' equation --------------------------------------------------------------------------------


def test_burgers_reads_the_papers_file(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((32, 8192)) for name in ("a", "u")}
    path = tmp_path / burgers.MAT_FILE
    scipy.io.savemat(path, {**arrays, "a_smooth": np.ones((32, 4))})
    for where in (path, tmp_path):
        splits = burgers.load_burgers(tmp_path, mat=where)
    assert [part.initial.shape for part in splits] == [(22, 256), (3, 256), (7, 8192)]
    expected = arrays["a"].astype(np.float32)
    np.testing.assert_array_equal(splits.train.initial, expected[:22, ::32])
    np.testing.assert_array_equal(splits.test.final, arrays["u"].astype(np.float32)[25:])
    assert [file.name for file in tmp_path.iterdir()] == [burgers.MAT_FILE]  # nothing is cached

    scipy.io.savemat(path, {"a": np.ones((2, 3))})
    with pytest.raises(ValueError, match="must hold"):
        burgers.read_mat(path)


def test_burgers_says_how_to_convert_hdf5(tmp_path, monkeypatch):
    path = tmp_path / burgers.MAT_FILE
    header = b"MATLAB 7.3 MAT-file".ljust(124) + bytes([0, 2]) + b"IM"
    path.write_bytes(header.ljust(1024, b"\0"))
    monkeypatch.setitem(sys.modules, "h5py", None)  # as if not installed
    with pytest.raises(ImportError, match="-v7"):
        burgers.read_mat(path)


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (dsprites.read_hearts, dsprites.FILE),
        (cifar.load_cifar10, "data_batch_1"),
        (cifar.load_cifar100, "cifar-100-python"),
        (lambda path: omniglot.load_omniglot(path / "nowhere"), "nowhere"),
        (omniglot.load_omniglot, "characterNN"),
        (burgers.read_mat, burgers.MAT_FILE),
    ],
)
def test_a_missing_file_is_named_with_its_source(tmp_path, load, name):
    with pytest.raises(FileNotFoundError, match=name) as error:
        load(tmp_path)
    for word in ("Expected", "https://", "--data"):
        assert word in str(error.value)


# Equations ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_soliton_of_korteweg_and_de_vries_keeps_its_shape(monkeypatch):
    speed, points = 2.0, 256
    x = np.arange(points) * kdv.DOMAIN / points

    def soliton(start):
        return -speed / 2 / np.cosh(np.sqrt(speed) / 2 * (x - start)) ** 2

    monkeypatch.setattr(kdv, "initial_states", lambda settings: soliton(12.0)[None])
    _, final = kdv.solve_kdv(kdv.DEFAULTS._replace(num_samples=1, num_points=points))
    # The fourth-order term takes a few hundredths of it.
    np.testing.assert_allclose(final[0], soliton(12.0 + speed)[::2], atol=0.03)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_vortices_of_taylor_and_green_decay_and_do_not_move(monkeypatch):
    settings = navier_stokes.DEFAULTS
    angle = 2 * np.pi * np.arange(settings.num_points) / settings.num_points
    vortices = settings.scale * (np.cos(angle)[:, None] * np.cos(angle)).astype(np.float32)
    monkeypatch.setattr(navier_stokes, "initial_states", lambda settings: vortices[None])
    initial, final = navier_stokes.solve_navier_stokes(settings)
    assert initial.std() == pytest.approx(0.5)
    decay = np.exp(-navier_stokes.VISCOSITY * 2 * (2 * np.pi) ** 2)
    np.testing.assert_allclose(final, decay * initial, atol=1e-4)  # float32 over 100 steps


def test_vorticity_is_random_with_the_scale_that_was_asked_for_and_no_mean():
    settings = navier_stokes.DEFAULTS._replace(num_samples=100)
    initial = navier_stokes.initial_states(settings)
    np.testing.assert_allclose(initial.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(initial.std(), settings.scale, rtol=0.05)


def test_sequences_follow_lorenz():
    settings = lorenz.DEFAULTS._replace(num_sequences=5, num_steps=10)
    inputs, targets = lorenz.sequences(settings)
    assert inputs.shape == (5, 10, 1)
    # What is seen is the first coordinate of what is to be predicted, `horizon` times before.
    np.testing.assert_array_equal(
        inputs[:, settings.horizon :, 0], targets[:, : -settings.horizon, 0]
    )
    state = np.array([1.0, 2.0, 20.0])
    expected = scipy.integrate.solve_ivp(
        lambda t, state: lorenz.velocity(state[:, None])[:, 0], (0, 0.05), state, rtol=1e-10
    )
    found = state[:, None]
    for _ in range(settings.substeps):
        found = lorenz.runge_kutta(found, settings.dt / settings.substeps)
    np.testing.assert_allclose(found[:, 0], expected.y[:, -1], rtol=1e-4)
