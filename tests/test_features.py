"""features.py: kNN against numpy, and features that several processes compute together."""
import atexit
import os
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import features  # noqa: E402
from common import Processes  # noqa: E402
from config import Fail  # noqa: E402
from conftest import coloured_samples  # noqa: E402
from data import write_beton  # noqa: E402
from features import (Encoder, Monitor, all_features, class_map, hits, knn_accuracy, labelled, percent,  # noqa: E402
                      plain_images)
from models import build_backbone  # noqa: E402

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
pytestmark = pytest.mark.usefixtures('one_thread')


def test_knn_against_numpy():
    random = np.random.default_rng(0)
    train, test = random.normal(size=(90, 12)).astype(np.float32), random.normal(size=(41, 12)).astype(np.float32)
    train_labels, test_labels = random.integers(0, 8, 90), random.integers(0, 8, 41)
    first = five = 0
    for query, label in zip(test, test_labels):
        cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosine)[:20]
        votes = np.zeros(8)
        for i in nearest:
            votes[train_labels[i]] += np.exp(cosine[i] / 0.07)
        ranking = np.argsort(-votes)
        first, five = first + (ranking[0] == label), five + (label in ranking[:5])
    found = knn_accuracy(torch.tensor(train), torch.tensor(train_labels), torch.tensor(test),
                         torch.tensor(test_labels), 8, 20, 0.07, 16, Processes('cpu'))
    assert found == [pytest.approx(100 * first / 41, abs=1e-3), pytest.approx(100 * five / 41, abs=1e-3)]


def test_more_processes_than_images():
    processes, features = Processes('cpu'), torch.eye(2)
    processes.rank, processes.world = 3, 4
    assert knn_accuracy(features, torch.tensor([0, 1]), features, torch.tensor([0, 1]), 2, 1, 0.1, 3,
                        processes) == [0, 0]


@pytest.mark.parametrize('n, block', [(10, 2), (10, 100), (12, 4), (2, 1)])
def test_rows_of_all_processes_in_order_block_by_block(n, block, monkeypatch):
    whole, share = torch.randn(n, 5), -(-n // 3)
    padded = [torch.cat([whole[rank::3], torch.zeros(share - len(whole[rank::3]), 5)]) for rank in range(3)]
    starts = iter(range(0, share, block))

    def gathered(part):
        at = next(starts)
        assert torch.equal(part, padded[1][at:at + block])
        return torch.cat([rows[at:at + block] for rows in padded])
    monkeypatch.setattr(features, 'gather', gathered)
    processes = types.SimpleNamespace(rank=1, world=3, device=torch.device('cpu'))
    assert torch.equal(features.everywhere(whole[1::3], n, processes, block), whole)
    assert next(starts, None) is None


def test_hits_and_percent():
    scores = torch.tensor([[9., 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9]])
    counts = hits(scores, torch.tensor([0, 1, 0]))
    assert counts.tolist() == [1, 2] and percent(counts, 3, Processes('cpu')) == [33.333, 66.667]
    assert percent(torch.tensor([1., 3.]), torch.tensor([2, 4]), Processes('cpu')) == [50, 75]
    assert hits(scores[:, :2], torch.tensor([0, 1, 0])).tolist() == [2, 3]  # of two classes


def test_features_are_those_of_each_image_in_order(tmp_path):
    samples = coloured_samples()
    images = [samples(i) for i in range(11)]
    write_beton(tmp_path / 'b', images.__getitem__, 11, {}, num_workers=1)
    torch.manual_seed(0)
    encoder = Encoder(build_backbone('resnet18', 'cifar', 8), MEAN, STD, torch.device('cpu'), torch.float32)
    found, labels = all_features(partial(plain_images, tmp_path / 'b', {'size': 16}, 4, 1), 11, encoder,
                                 Processes('cpu'), 'all')
    pixels = torch.from_numpy(np.stack([image for image, *_ in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        expected = encoder.backbone((pixels - mean) / std)
    assert labels.tolist() == [i % 3 for i in range(11)] and torch.allclose(found, expected, atol=1e-5)
    assert labelled(tmp_path / 'b', {'size': 16}, Processes('cpu')).sidecar['samples'] == 11
    write_beton(tmp_path / 'b', lambda i: (*images[i][:2], i - 1, i, -1), 11, {}, num_workers=1)
    with pytest.raises(Fail, match='there are images without label'):
        labelled(tmp_path / 'b', {'size': 16}, Processes('cpu'))


def classified(path, labels, classes=None, name='folder', split='train', shift=0):
    """A loader on a beton whose images of label l have the colour of classes[l], as gen_views.py writes it."""
    settings = {'dataset': {'name': name, 'root': 'r', 'split': split}} | ({'classes': classes} if classes else {})
    colour = lambda i: 255 - 60 * 'abcde'.index(classes[labels[i]]) if classes else 9
    image = lambda i: np.full((16, 16, 3), max(0, colour(i) - i % 7 - shift), np.uint8)
    write_beton(path, lambda i: (image(i), None, labels[i], i, -1), len(labels), settings if name else {},
                num_workers=1)
    return labelled(path, {'size': 16}, Processes('cpu'))


def test_labels_of_two_betons_are_joined_by_name(tmp_path):
    train = classified(tmp_path / 'train', [0, 1, 2] * 9, ['a', 'b', 'c'])
    test = lambda *of, **more: classified(tmp_path / 'test', *of, **{'split': 'test', **more})
    assert class_map(train, test([0, 1, 2], ['a', 'b', 'c'])).tolist() == [0, 1, 2]
    assert class_map(train, test([0, 1], ['a', 'c'])).tolist() == [0, 2]        # a tree without the folder of b
    assert class_map(train, test([0, 1, 2], ['c', 'a', 'b'])).tolist() == [2, 0, 1]
    assert class_map(train, test([0, 2], ['a', 'x', 'c'])).tolist()[::2] == [0, 2]  # no image of x
    for of, words in ((([0, 1, 2], ['a', 'd', 'e']), 'other classes: d, e of the test images are not among a, b, c'),
                      (([0, 1, 2],), 'do not both name their classes'),
                      (([0, 1], None, 'CIFAR10'), 'of the datasets folder and CIFAR10')):
        with pytest.raises(Fail, match=words):
            class_map(train, test(*of))
    old = [classified(tmp_path / f'old{k}', [0, 1, 2], None, 'CIFAR10', f'{k}', k) for k in range(2)]
    assert class_map(*old).tolist() == [0, 1, 2]                                # one set, one order of its classes
    for settings in (None, 'text', {'dataset': 'birds'}, {'dataset': None}):    # of other writers: any JSON
        write_beton(tmp_path / 'foreign', coloured_samples(), 6, settings, num_workers=1)
        assert class_map(train, labelled(tmp_path / 'foreign', {'size': 16}, Processes('cpu'))).tolist() == [0, 1, 2]
    plain = [classified(tmp_path / n, [0, 1, 2], name=None, shift=k) for k, n in enumerate('xy')]
    assert class_map(*plain).tolist() == [0, 1, 2]                              # written by hand: numbers
    for same in (train, classified(tmp_path / 'other', [0, 1], ['a', 'b'])):    # equal bytes; the same split
        with pytest.raises(Fail, match='hold the same images'):
            class_map(train, same)
    for name, split in (('DTD', 'val'), ('FGVCAircraft', 'val'), ('CIFAR10', 'train')):  # train has val's images too
        sets = [classified(tmp_path / f'{name}{k}', [0, 1], ['a', 'b'], name, split=s, shift=k)
                for k, s in enumerate(('train', split, 'test'))]
        assert class_map(sets[0], sets[2]).tolist() == [0, 1]
        with pytest.raises(Fail, match='or some of them'):
            class_map(*sets[:2])


def test_monitor_maps_labels_by_name(tmp_path):
    classified(tmp_path / 'train', [0, 1, 2] * 9, ['a', 'b', 'c'])
    classified(tmp_path / 'test', [0, 1] * 5, ['b', 'c'], split='test')
    config = {'image_size': 16, 'data': {'num_workers': 1}, 'knn': {
        'k': 3, 'temperature': 0.07, **{f'{part}_beton': str(tmp_path / part) for part in ('train', 'test')}}}
    torch.manual_seed(0)
    monitor = Monitor(config, (MEAN, STD), torch.float32, Processes('cpu'))
    assert monitor.accuracy(build_backbone('resnet18', 'cifar', 8)) == 1


def _stop_on_one_process(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    atexit.register(dist.destroy_process_group)  # its threads would abort a process that ends before them
    os.environ.update(RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='localhost', MASTER_PORT='1')
    processes = Processes('cpu', group=False)
    encoder = Encoder(build_backbone('resnet18', 'cifar', 8), MEAN, STD, processes.device, torch.float32)

    images = partial(plain_images, f'{folder}/train.beton', {'size': 16}, 33, 1)
    found = all_features(images, 67, encoder, processes, 'all')  # 34 and 33 images: two batches and one
    assert found[1].tolist() == [i % 3 for i in range(67)]
    assert all_features(images, 67, encoder, processes, 'all', stop=rank == 1) is None
    Path(folder, f'stopped.{rank}').touch()


def test_a_stop_on_one_process_ends_all_of_them(tmp_path):
    write_beton(tmp_path / 'train.beton', coloured_samples(), 67, {}, num_workers=1)
    mp.spawn(_stop_on_one_process, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob('stopped.*')} == {'stopped.0', 'stopped.1'}
