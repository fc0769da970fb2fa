"""augment.py: the kernels and the drawn parameters against torchvision on PIL, and recipes that cannot be."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from timm.data import auto_augment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import augment  # noqa: E402
from config import Fail  # noqa: E402
from conftest import FULL, picture  # noqa: E402


def planar(image):
    return np.ascontiguousarray(image.reshape(-1, 3).T)


def interleaved(p, size):
    return p.T.reshape(size, size, 3).astype(int)


@pytest.mark.parametrize('size', [7, 32, 96, 224])
@pytest.mark.parametrize('name, ours, theirs', [
    ('brightness', lambda p: augment._brightness(p, 1.37), lambda x: F.adjust_brightness(x, 1.37)),
    ('darkness', lambda p: augment._brightness(p, 0.0), lambda x: F.adjust_brightness(x, 0.0)),
    ('contrast', lambda p: augment._contrast(p, 0.61), lambda x: F.adjust_contrast(x, 0.61)),
    ('more contrast', lambda p: augment._contrast(p, 1.8), lambda x: F.adjust_contrast(x, 1.8)),
    ('saturation', lambda p: augment._saturation(p, 1.21), lambda x: F.adjust_saturation(x, 1.21)),
    ('less saturation', lambda p: augment._saturation(p, 0.3), lambda x: F.adjust_saturation(x, 0.3)),
    ('grayscale', lambda p: augment._grayscale(p), lambda x: F.rgb_to_grayscale(x, 3)),
    ('solarize', lambda p: augment._solarize(p), lambda x: F.solarize(x, 128))])
def test_colour_operations_are_exact(size, name, ours, theirs):
    image = picture(size, size, size)
    p = planar(image)
    ours(p)
    want = np.asarray(theirs(Image.fromarray(image))).astype(int)
    assert (interleaved(p, size) == want).all() and (want != image).any()


@pytest.mark.parametrize('shift', [-0.5, -0.37, -0.01, 0.08, 0.1, 0.5])
def test_hue_is_exact(shift):
    levels = np.r_[0:256:3, 1:256:29, 255].astype(np.uint8)
    levels = np.unique(levels)
    n = int(len(levels) ** 1.5) + 1
    colours = np.zeros((n * n, 3), np.uint8)
    every = np.stack(np.meshgrid(levels, levels, levels, indexing='ij'), -1).reshape(-1, 3)
    colours[:len(every)] = every
    p = planar(colours)
    augment._hue(p, shift)
    assert (interleaved(p, n) == np.asarray(F.adjust_hue(Image.fromarray(colours.reshape(n, n, 3)), shift))).all()


def taps(size, sigma):
    return 2 * augment.blur_reach(size, sigma, 0) + 1


@pytest.mark.parametrize('size, kernel, expected', [
    (32, 3, [3, 3, 3, 3]), (32, 0, [3, 5, 7, 13]), (96, 0, [9, 9, 9, 13]), (224, 0, [23, 23, 23, 23]),
    (8, 0, [3, 5, 7, 9])])
def test_blur_is_within_one_level(size, kernel, expected):
    image = picture(size, size, size)
    for sigma, wide in zip((0.1, 0.5, 1.0, 2.0), expected):
        p = planar(image)
        augment._blur(p, size, sigma, kernel, np.empty(2 * size * size, np.float32))
        difference = interleaved(p, size) - np.asarray(F.gaussian_blur(Image.fromarray(image), wide, [sigma]))
        assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.01


@pytest.mark.parametrize('size', [32, 64, 224])
def test_blur_of_small_views_is_as_wide_as_pils(size):
    """MoCo v2's and mmpretrain's: ImageFilter.GaussianBlur(radius=sigma), whatever the size of the view."""
    image, far = picture(size, size, size), {}
    theirs = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.0))).astype(int)
    for kernel in (0, 3):
        p = planar(image)
        augment._blur(p, size, 2.0, kernel, np.empty(2 * size * size, np.float32))
        inside = (interleaved(p, size).astype(int) - theirs)[8:-8, 8:-8]  # PIL repeats the border's pixels
        far[kernel] = abs(inside).mean()
    assert far[0] < 2 and far[3] > 4 * far[0]


RANDAUGMENT = auto_augment._RAND_TRANSFORMS               # also PyContrast's list and order


def by_timm(image, name, level, cubic):
    """timm's operation on a PIL image, with our sign in the place of its own random one."""
    argument, negate = auto_augment.LEVEL_TO_ARG[name], auto_augment._randomly_negate
    auto_augment._randomly_negate = lambda value: value * (-1 if level < 0 else 1)
    arguments = argument(abs(level), {}) if argument else ()
    auto_augment._randomly_negate = negate
    if name == 'Posterize' and not arguments[0]:           # newer versions of Pillow refuse to keep no bit
        return Image.new('RGB', image.size)
    resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[cubic]
    return auto_augment.NAME_TO_OP[name](image, *arguments, fillcolor=tuple(augment.FILL.tolist()), resample=resample)


@pytest.mark.parametrize('operation', range(15))
def test_operations_of_randaugment_are_timms(operation):
    name = RANDAUGMENT[operation]
    moves, changed = name.startswith(('Rotate', 'Shear', 'Translate')), False
    for size in (7, 32, 97):
        image = picture(size, size, size)
        narrow = (image // 3 + 60).astype(np.uint8)        # levels for AutoContrast and Equalize to spread
        for level in (0, 1.3, 4.9, 7.2, 9.8, 10):
            for sign, cubic in ((1, 0), (-1, 0), (1, 1), (-1, 1)) if moves else ((1, 0),):
                for source in (image, narrow, narrow * 0 + 7):
                    p = planar(source)
                    augment._randaugment(p, size, float(operation), float(sign * level), cubic > 0)
                    want = np.asarray(by_timm(Image.fromarray(source), name, sign * level, cubic)).astype(int)
                    off = abs(interleaved(p, size) - want)
                    assert off.max() <= (name == 'Rotate') and (off > 0).mean() < 0.001, (size, level, sign, cubic)
                    changed |= (want != source).any()
    assert changed


def render(image, recipe, key):
    """One view of an image by our kernel and by torchvision with the same parameters; and the parameters."""
    row = np.array(augment.recipe_row(recipe, 'recipe'))
    size, (h, w) = recipe['size'], image.shape[:2]
    d = augment._draw(np.uint64(key), row, h, w)
    out = np.empty(3 * size * size, np.uint8)
    augment._augment(image.reshape(-1), h, w, row, d, np.empty(3 * h * size, np.uint8),
                  np.empty(3 * size * size, np.uint8), np.empty(2 * size * size, np.float32), out)
    x = Image.fromarray(image)
    if recipe.get('crop_scale'):
        box = [int(d[k]) for k in (augment.TOP, augment.LEFT, augment.HEIGHT, augment.WIDTH)]
        direct, full = F.resized_crop(x, *box, [size, size]), (size, size)
        x = F.crop(x, *box)
    else:
        full = F.resize(x, recipe.get('resize', size)).size
        direct = F.center_crop(F.resize(x, recipe.get('resize', size)), size)
    # Pillow up to 12 resizes across, then down, as we do; Pillow 13 swaps the passes of some shapes: one level at most
    x = F.center_crop(x.resize((full[0], x.height), Image.BILINEAR).resize(full, Image.BILINEAR), size)
    assert abs(np.asarray(x).astype(int) - np.asarray(direct)).max() <= 1
    x = F.hflip(x) if d[augment.FLIPPED] else x
    for k in augment.ORDERS[int(d[augment.ORDER])] if d[augment.FH] else ():
        x = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[k](x, d[augment.FB + k])
    operations = d[augment.OPS:].reshape(-1, 3)
    x = F.rgb_to_grayscale(x, 3) if d[augment.GRAYED] and not len(operations) else x
    x = F.gaussian_blur(x, taps(size, d[augment.SIGMA]), [d[augment.SIGMA]]) if d[augment.SIGMA] else x
    for operation, level, cubic in operations[operations[:, 0] >= 0]:
        x = by_timm(x, RANDAUGMENT[int(operation)], level, int(cubic))
    x = F.rgb_to_grayscale(x, 3) if d[augment.GRAYED] and len(operations) else x
    x = F.solarize(x, 128) if d[augment.SOLARIZED] else x
    return out.reshape(size, size, 3).astype(int), np.asarray(x).astype(int), d


@pytest.mark.parametrize('size', [24, 64, 160])           # of a 90 x 130 image: shrinks, both, enlarges
def test_whole_view_equals_torchvision(size):
    image, blurred = picture(5, 90, 130), 0
    for key in range(60):
        ours, theirs, d = render(image, {**FULL, 'size': size}, key)
        off = abs(ours - theirs)
        if not d[augment.SIGMA]:
            assert off.max() == 0, key
        elif not d[augment.SOLARIZED]:                      # which turns a blurred 127 or 128 into far apart levels
            assert off.max() <= 1 and (off > 0).mean() < 0.01, key
        blurred += d[augment.SIGMA] > 0
    assert 10 < blurred < 50


def test_randaugment_within_a_view_equals_timm():
    image, recipe, seen = picture(5, 90, 130), {**FULL, 'size': 48, 'blur_prob': 0, 'randaugment': 2}, set()
    for key in range(150):
        ours, theirs, d = render(image, recipe, key)
        drawn = d[augment.OPS:].reshape(2, 3)[:, 0]
        seen |= set(drawn)
        assert (abs(ours - theirs) > 1).mean() < 0.01 and ((ours == theirs).all() or augment.ROTATE in drawn), key
    assert seen == set(range(-1, 15))


def test_view_without_randaugment_is_as_if_there_were_none():
    image = picture(5, 90, 130)
    for key in range(20):
        (plain, _, d), (off, _, e) = (render(image, recipe, key) for recipe in (FULL, {**FULL, 'randaugment': 0}))
        with_it = render(image, {**FULL, 'randaugment': 3}, key)[2]
        assert (plain == off).all() and len(d) == len(e) == augment.OPS
        assert (with_it[:augment.OPS] == d).all() and len(with_it) == augment.OPS + 9  # the other draws stay


@pytest.mark.parametrize('h, w', [(90, 130), (131, 77), (40, 40), (20, 33)])
def test_evaluation_crop_equals_torchvision(h, w):
    ours, theirs, _ = render(picture(6, h, w), {'size': 40, 'resize': 46}, 0)
    assert (ours == theirs).all()
    ours, theirs, _ = render(picture(6, h, w), {'size': 40}, 0)
    assert (ours == theirs).all()


@pytest.mark.parametrize('h, w', [(90, 130), (200, 60), (32, 32)])
def test_draws_have_torchvisions_distribution(h, w):
    n, row = 3000, np.array(augment.recipe_row({**FULL, 'crop_scale': [0.08, 1.0]}, 'recipe'))
    ours = np.array([augment._draw(np.uint64(augment._key(1, 2, i, 0)), row, h, w) for i in range(n)])
    torch.manual_seed(0)
    image = Image.new('RGB', (w, h))
    theirs = np.array([T.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    a = np.column_stack([ours[:, :4], ours[:, 2] * ours[:, 3], ours[:, 2] / ours[:, 3]])
    b = np.column_stack([theirs, theirs[:, 2] * theirs[:, 3], theirs[:, 2] / theirs[:, 3]])
    for k in range(6):                                   # two-sample Kolmogorov-Smirnov: 1.95 is the 0.1 % level
        grid = np.unique(np.concatenate([a[:, k], b[:, k]]))
        gap = abs(np.searchsorted(np.sort(a[:, k]), grid, 'right') - np.searchsorted(np.sort(b[:, k]), grid, 'right'))
        assert gap.max() / n < 1.95 * (2 / n) ** 0.5, k
    jittered = ours[ours[:, augment.FH] != 0]
    near = lambda x, p: abs(x.mean() - p) < 4 * (p * (1 - p) / len(x)) ** 0.5
    assert near(ours[:, augment.FLIPPED], 0.5) and near(ours[:, augment.FH] != 0, 0.8)
    assert near(ours[:, augment.GRAYED], 0.2)
    assert near(ours[:, augment.SIGMA] > 0, 0.5) and near(ours[:, augment.SOLARIZED], 0.2)
    assert (np.bincount(jittered[:, augment.ORDER].astype(int), minlength=24) > 50).all()
    factors = augment.FB, augment.FC, augment.FS, augment.FH
    for column, lo, hi in zip(factors, (0.6, 0.6, 0.8, -0.1), (1.4, 1.4, 1.2, 0.1)):
        x = jittered[:, column]
        assert lo <= x.min() < lo + 0.01 and hi - 0.01 < x.max() <= hi
        assert abs(x.mean() - (lo + hi) / 2) < 0.05 * (hi - lo)
    independent = np.corrcoef(ours[:, [0, 1, 2, augment.FLIPPED, *factors, augment.GRAYED]].T)
    assert abs(independent[3:, :][:, :3]).max() < 0.1 and abs(np.triu(independent[3:, 3:], 1)).max() < 0.1


def test_draws_of_randaugment_have_timms_distribution():
    row = np.array(augment.recipe_row({**FULL, 'randaugment': 2, 'randaugment_magnitude': [9, 0.5]}, 'recipe'))
    drawn = [augment._draw(np.uint64(augment._key(1, 2, i, 0)), row, 40, 40)[augment.OPS:] for i in range(10_000)]
    drawn = np.array(drawn).reshape(-1, 2, 3)
    first, second = drawn[:, 0, 0], drawn[:, 1, 0]
    applied, moves = drawn[..., 0] >= 0, np.isin(drawn[..., 0], (3, 11, 12, 13, 14))
    assert abs(applied.mean(0) - 0.5).max() < 0.02 and abs((applied[:, 0] & applied[:, 1]).mean() - 0.25) < 0.02
    counts = np.bincount(drawn[..., 0][applied].astype(int), minlength=15)
    assert abs(counts - applied.sum() / 15).max() < 5 * (applied.sum() / 15) ** 0.5
    assert ((first == second) & applied[:, 0]).any()       # with replacement
    level = abs(drawn[..., 1])
    assert level.max() == 10 and abs((level == 10).mean() - 0.0228) < 0.005     # two standard deviations above
    assert abs(np.median(level) - 9) < 0.02 and abs((level < 8.5).mean() - 0.1587) < 0.01
    assert abs((drawn[..., 1] < 0)[moves].mean() - 0.5) < 0.02 and not (drawn[..., 1] < 0)[~moves].any()
    assert abs(drawn[..., 2].mean() - 0.5) < 0.02 and set(drawn[..., 2].flat) == {0, 1}


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

@pytest.mark.parametrize('recipe, words', [
    ({'flip': 0.5}, 'size is None'),
    ({'size': 1500}, 'size is 1500'),
    ({'size': 32.5}, 'size'),
    ({'size': 32, 'resize': 31}, 'resize is 31'),
    ({'size': 32, 'crop_scale': [0.5, 0.2]}, 'crop_scale'),
    ({'size': 32, 'crop_scale': 0.5}, 'crop_scale'),
    ({'size': 32, 'flip': 1.1}, 'flip is 1.1'),
    ({'size': 32, 'jitter': [0.4, 0.4]}, 'jitter is'),
    ({'size': 32, 'jitter': [0, 0, 0, 0.6]}, 'jitter'),
    ({'size': 32, 'blur_sigma': [0, 2]}, 'blur_sigma'), ({'size': 32, 'blur_kernel': 4}, 'blur_kernel'),
    ({'size': 32, 'randaugment': 1.5}, 'randaugment is 1.5'),
    ({'size': 32, 'randaugment': -1}, 'randaugment is -1'),
    ({'size': 32, 'randaugment_magnitude': [11, 0]}, 'randaugment_magnitude'),
    ({'size': 32, 'randaugment_magnitude': 10}, 'randaugment_magnitude is 10'),
    ({'size': 32, 'flip': 'yes'}, "flip is 'yes'")])
def test_impossible_recipes_are_refused(recipe, words):
    with pytest.raises(Fail, match=words) as error:
        augment.recipe_row(recipe, 'here')
    assert str(error.value).startswith('here: ') and '\n' not in str(error.value)


@pytest.mark.parametrize('owner', ['mine', 'of another'])
def test_kernels_where_numba_finds_no_folder_to_cache_them(owner, tmp_path):
    """As in a read-only installation without a home: a folder of this user among the temporary ones, or no cache."""
    if owner == 'of another':
        if os.getuid():
            pytest.skip('only root can give a folder away')
        (tmp_path / 'numba-0').mkdir()
        os.chown(tmp_path / 'numba-0', 12345, 12345)
    script = 'import augment; print(augment.JIT["cache"], augment.permutation_keys(0, 0, 1)[0])'
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=300,
                          cwd=Path(augment.__file__).parent, env={
                              **os.environ, 'NUMBA_CACHE_LOCATOR_CLASSES': 'UserProvidedCacheLocator',
                              'NUMBA_CACHE_DIR': '', 'TMPDIR': str(tmp_path)})
    assert done.stdout.split() == [str(owner == 'mine'), str(augment.permutation_keys(0, 0, 1)[0])], done.stderr
    assert done.stderr == '' and len(list(tmp_path.rglob('*.nbc'))) == (3 if owner == 'mine' else 0)
