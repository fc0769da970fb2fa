"""Augmentations on the training device beside the loader's; pairs made while training; pretraining on them."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import pretrain  # noqa: E402
from common import Processes  # noqa: E402
from augment import parameters, recipe_row  # noqa: E402
from config import Fail, default_config  # noqa: E402
from conftest import FULL, picture, small_gan  # noqa: E402
from data import PairLoader, write_beton  # noqa: E402
from online import OnlinePairs, augment  # noqa: E402
from test_latents import move, spec  # noqa: E402

CROP = dict(size=24, crop_scale=[0.2, 1.0])
COUNT = 200


@pytest.fixture(scope='module')
def images():
    return np.stack([picture(seed, 40, 48) for seed in range(COUNT)])


@pytest.fixture(scope='module')
def beton(images, tmp_path_factory):
    path = tmp_path_factory.mktemp('beton') / 'pairs.beton'
    write_beton(path, lambda i: (images[i], None, -1, i, -1), COUNT, {}, num_workers=1)
    return path


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return small_gan(tmp_path_factory.mktemp('gan'))


@pytest.mark.parametrize('recipe, close, most', [
    (CROP, 0.5, 1.01), (dict(size=24, crop_scale=None, resize=28), 0.5, 1.01),
    (dict(size=60, crop_scale=None), 0.5, 1.01),
    ({**CROP, 'flip': 0.5}, 0.5, 1.01), ({**CROP, 'gray_prob': 0.5}, 0.6, 1.6),
    ({**CROP, 'jitter': [0.4, 0, 0, 0], 'jitter_prob': 0.8}, 0.7, 2.6),
    ({**CROP, 'jitter': [0, 0.4, 0, 0], 'jitter_prob': 0.8}, 0.7, 2.6),
    ({**CROP, 'jitter': [0, 0, 0.4, 0], 'jitter_prob': 0.8}, 0.7, 2.6),
    ({**CROP, 'jitter': [0, 0, 0, 0.1], 'jitter_prob': 0.8}, 1.0, 20),     # the loader's hue has 256 values
    ({**CROP, 'size': 64, 'blur_prob': 0.7}, 0.7, 2.1), ({**FULL, 'solarize_prob': 0.0}, 1.5, 40)])
def test_views_are_the_loaders(images, beton, recipe, close, most):
    """The same images and parameters: equal but for the loader's rounding to grey levels after each operation."""
    loader = PairLoader(beton, [recipe], batch_size=COUNT, seed=5, num_workers=1, shuffle=False, swap='first')
    expected = next(iter(loader.epoch(0)))['views'][0].float()
    row = np.array(recipe_row(recipe, 'recipe'))
    drawn = torch.from_numpy(parameters(5, 0, np.arange(COUNT), 0, row, *images.shape[1:3]))
    found = augment(torch.from_numpy(images).permute(0, 3, 1, 2).float(), row, drawn)
    difference = (found - expected).abs()
    assert difference.mean() < close and difference.max() < most
    # a truncated blend costs half a level
    assert (found.mean((0, 2, 3)) - expected.mean((0, 2, 3))).abs().max() < 1.3
    assert (found.std((0, 2, 3)) - expected.std((0, 2, 3))).abs().max() < 0.8
    shuffled = augment(torch.from_numpy(images).permute(0, 3, 1, 2).float(), row, drawn.roll(1, 0))
    assert (shuffled - expected).abs().mean() > 3 * difference.mean() or recipe.get('crop_scale') is None


def test_solarized_where_the_loader_does(images, beton):
    """A value at the threshold may fall to either side; all others agree."""
    recipe = {**CROP, 'solarize_prob': 0.5}
    loader = PairLoader(beton, [recipe], batch_size=COUNT, seed=5, num_workers=1, shuffle=False, swap='first')
    row = np.array(recipe_row(recipe, 'recipe'))
    drawn = torch.from_numpy(parameters(5, 0, np.arange(COUNT), 0, row, 40, 48))
    found = augment(torch.from_numpy(images).permute(0, 3, 1, 2).float(), row, drawn)
    difference = (found - next(iter(loader.epoch(0)))['views'][0]).abs()
    assert (difference > 1.01).float().mean() < 0.005 and difference.mean() < 0.5


def test_gradient_reaches_the_image():
    """Through all operations but solarize, as numerical differences say."""
    torch.manual_seed(0)
    image = (torch.rand(3, 3, 10, 12, dtype=torch.float64) * 120 + 60).requires_grad_()
    row = np.array(recipe_row({**FULL, 'size': 8, 'blur_prob': 1.0, 'jitter_prob': 1.0, 'solarize_prob': 0.0}, 'r'))
    drawn = torch.from_numpy(parameters(1, 0, np.arange(3), 0, row, 10, 12))
    weight = torch.randn(3, 3, 8, 8)
    value = lambda x: (augment(x.float(), row, drawn) * weight).sum().double()
    gradient, = torch.autograd.grad(value(image), image)
    direction = torch.randn_like(image)
    numerical = (value(image + 0.01 * direction) - value(image - 0.01 * direction)) / 0.02
    assert abs((gradient * direction).sum() - numerical) < 0.02 * gradient.norm()


def online(folder, rank=0, world=1, batch=8, **changes):
    return OnlinePairs({**spec(folder), 'chunks': {'1-5': move(std=1.0)}}, [FULL, FULL], **{**dict(
        alpha=1.0, swap='random', batch_size=batch, steps_per_epoch=5, seed=3, device=torch.device('cpu'), rank=rank,
        world=world), **changes})


def test_batches_of_two_processes_are_those_of_one(folder):
    one, two = online(folder), [online(folder, rank, 2, 4) for rank in range(2)]
    for whole, *parts in zip(one.epoch(1), *(loader.epoch(1) for loader in two)):
        assert torch.equal(whole['index'], torch.cat([part['index'] for part in parts]))
        for v in range(2):
            assert (whole['views'][v] - torch.cat([part['views'][v] for part in parts])).abs().max() < 1e-2


def test_no_sample_comes_twice_and_a_resumed_epoch_goes_on(folder):
    loader = online(folder)
    epochs = [list(loader.epoch(e)) for e in (0, 1)]
    every = torch.cat([batch['index'] for epoch in epochs for batch in epoch])
    assert len(every.unique()) == len(every) == 2 * 5 * 8
    rest = list(loader.epoch(1, 3))
    assert len(rest) == 2 and all(torch.equal(a['views'][v], b['views'][v])
                                  for a, b in zip(rest, epochs[1][3:]) for v in range(2))
    assert not torch.equal(epochs[0][0]['views'][0], epochs[1][0]['views'][0])


def test_which_view_is_the_positive(folder):
    plain = dict(size=32, crop_scale=None)
    of = lambda **changes: next(iter(OnlinePairs(
        {**spec(folder), 'chunks': {'1-5': move(std=1.0)}}, [plain, plain], batch_size=64, steps_per_epoch=1, seed=3,
        device=torch.device('cpu'), **{**dict(alpha=1.0, swap='second'), **changes}).epoch(0)))
    second, first, half, never = of(), of(swap='first'), of(alpha=0.5), of(alpha=0.0)
    anchors, positives = second['views']
    assert (anchors - positives).abs().mean() > 3
    assert torch.equal(first['views'][0], positives) and torch.equal(first['views'][1], anchors)
    assert torch.equal(never['views'][0], never['views'][1]) and (never['synthetic'] == -1).all()
    moved = half['synthetic'] == 1
    assert 15 < moved.sum() < 49 and torch.equal(half['views'][1][moved], positives[moved])
    assert torch.equal(half['views'][1][~moved], anchors[~moved])
    random = of(swap='random')['synthetic']
    assert 15 < (random == 0).sum() < 49 and (random >= 0).all()


def config(folder, tmp_path, **changes):
    found = default_config(pretrain.DEFAULTS)
    found.update(output=str(tmp_path / 'run'), image_size=24, method='simclr', epochs=2, batch_size=16, log_every=4,
                 tensorboard=False)
    found['backbone'].update(arch='resnet18', stem='cifar', width=8)
    found['data']['online'].update({**{k: v for k, v in spec(folder).items()}, 'images_per_epoch': 64, 'size': None,
                                    'chunks': {'1-5': move(std=1.0)}})
    found.update(changes)
    return found


def test_pretraining_online_resumes_bit_exactly(folder, tmp_path, one_thread, monkeypatch):
    settings = config(folder, tmp_path)
    pretrain.main(settings)
    whole = torch.load(tmp_path / 'run/backbone.pt', weights_only=True)['state_dict']

    stopped, counted = {**settings, 'output': str(tmp_path / 'stopped'), 'save_every_steps': 1}, []

    def stop(loader, indices, batch=OnlinePairs.batch):
        counted.append(indices)
        if len(counted) == 6:
            raise KeyboardInterrupt
        return batch(loader, indices)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OnlinePairs, 'batch', stop)
        pretrain.main(stopped)
    with monkeypatch.context() as patch:
        batch = OnlinePairs.batch
        patch.setattr(OnlinePairs, 'batch', lambda loader, ids: (counted.append(ids), batch(loader, ids))[1])
        pretrain.main(stopped)
    assert [list(indices) for indices in counted[6:]][0] == list(counted[5])          # it went on at the sixth step
    again = torch.load(tmp_path / 'stopped/backbone.pt', weights_only=True)['state_dict']
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(Fail, match='data.online.chunks'):
        pretrain.main({**stopped, 'data': {**settings['data'], 'online': {**settings['data']['online'], 'chunks': {}}}})


def test_generated_images_have_the_size_asked_for(folder, tmp_path):
    settings = config(folder, tmp_path)
    settings['data']['online'].update(crop=24, size=16)
    settings['image_size'] = 16
    loader = pretrain.open_pairs(settings, Processes('cpu'))
    assert loader.metadata['f0']['height'].tolist() == [16]
    anchors, _ = loader.pairs.images(range(2))
    assert anchors.shape == (2, 3, 16, 16) and loader.batch(np.arange(2))['views'][0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize('changes, message', [
    ({'images_per_epoch': 8}, 'images_per_epoch: 8 is less than batch_size 16'),
    ({'model': ''}, 'data.online.model: must name a file'), ({'size': 6}, 'size: 6 must be')])
def test_wrong_settings_are_one_line(folder, tmp_path, changes, message):
    settings = config(folder, tmp_path)
    settings['data']['online'].update(changes)
    with pytest.raises(Fail, match=message):
        pretrain.main(settings)
    assert not (tmp_path / 'run').exists()


def test_beton_and_online_exclude_each_other(folder, tmp_path):
    settings = config(folder, tmp_path)
    settings['data']['beton'] = 'pairs.beton'
    with pytest.raises(Fail, match='makes the pairs, data.beton holds them'):
        pretrain.main(settings)


def test_what_there_is_not_online(folder, tmp_path):
    with pytest.raises(Fail, match='method: supcon needs labels, and pairs made while training have none'):
        pretrain.main(config(folder, tmp_path, method='supcon'))
    settings = config(folder, tmp_path)
    settings['view_2']['randaugment'] = 2
    with pytest.raises(Fail, match='randaugment: is not there for pairs made while training'):
        pretrain.main(settings)
    settings['view_generated']['blur_prob'] = 0.0
    with pytest.raises(Fail, match='view_generated: pairs made while training are generated altogether; set view_1'):
        pretrain.main(settings)
    assert not (tmp_path / 'run').exists()
