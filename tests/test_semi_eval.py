"""semi_eval.py: which labels it uses, that it learns with them, resumes exactly, and does the same in two processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import semi_eval  # noqa: E402
from common import StopSignal  # noqa: E402
from config import Fail, load_config  # noqa: E402
from files import load_checkpoint  # noqa: E402
from conftest import coloured_samples, named_betons  # noqa: E402
from data import write_beton  # noqa: E402
from models import build_backbone, decayed  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """A random backbone, betons of 96 and 31 images whose 3 classes differ in colour, and the 96 as files."""
    folder = tmp_path_factory.mktemp('semi_eval')
    samples = coloured_samples()
    for name, shift in (('unlabelled', -2), ('foreign', 1)):
        write_beton(folder / f'{name}.beton', lambda i: (*samples(i)[:2], max(i % 3 + shift, -1), i, -1), 31, {},
                    num_workers=1)
    dataset = {'name': 'folder', 'root': str(folder / 'images'), 'split': 'train', 'subset': None}
    write_beton(folder / 'train.beton', samples, 96, {'dataset': dataset}, num_workers=1)
    write_beton(folder / 'test.beton', samples, 31, {}, num_workers=1)
    for i in range(96):  # of which the beton knows: n{class}_{number}.png, in the order of the beton
        path = folder / 'images/one' / f'{i:03d}_n{i % 3}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(path)
    torch.manual_seed(0)
    torch.save({'state_dict': build_backbone('resnet18', 'cifar', 8).state_dict(), 'arch': 'resnet18', 'stem': 'cifar',
                'width': 8, 'mean': [0.4, 0.5, 0.6], 'std': [0.2, 0.25, 0.3], 'image_size': 16}, folder / 'backbone.pt')
    return folder


SMALL = ('precision=fp32', 'num_workers=1', 'batch=16', 'batch_size=8', 'epochs=4', 'image_size=16', 'resize=16',
         'subset.share=0.25', 'lr_backbone=0.02', 'lr_head=0.2', 'log_every=1')


def changes_of(workplace, *changes):
    return [str(ROOT / 'yamls/semi_eval/cifar10.yaml'), f'checkpoint={workplace}/backbone.pt',
            f'train_beton={workplace}/train.beton', f'test_beton={workplace}/test.beton', *SMALL, *changes]


def main(workplace, *changes):
    semi_eval.main(load_config(semi_eval.DEFAULTS, changes_of(workplace, *changes)))


def lines(folder):
    log = [json.loads(text) for text in (folder / 'log.jsonl').read_text().splitlines()]
    return {line['step']: line for line in log if 'loss' in line}


def results(folder):
    return json.loads((folder / 'results.json').read_text())


# ---------------------------------------------------------------------------------------------------
# The subset

def test_balanced_subset():
    labels = np.repeat(np.arange(10), [5, *[200] * 9])
    chosen = semi_eval.balanced(labels, 0.1, 0)
    counts = np.bincount(labels[chosen])
    assert len(chosen) == round(0.1 * len(labels)) == 180 and counts[0] == 5 and set(counts[1:]) <= {19, 20}
    assert (np.diff(chosen) > 0).all() and (chosen == semi_eval.balanced(labels, 0.1, 0)).all()
    other = semi_eval.balanced(labels, 0.1, 1)
    assert len(set(chosen) & set(other)) < 60
    assert len(semi_eval.balanced(labels, 1.0, 0)) == len(labels) and len(semi_eval.balanced(labels, 1e-9, 0)) == 1
    few = semi_eval.balanced(labels, 7 / len(labels), 3)  # less than one per class: never two of one
    assert len(few) == 7 and np.bincount(labels[few]).max() == 1


def test_lists_of_names_and_of_indices(workplace, tmp_path):
    sidecar = json.loads((workplace / 'train.beton.json').read_text())
    indices = np.arange(96)
    for text in ('005_n2.png\n004_n1.png\n', 'one/004_n1.png\none/005_n2.png', '5\n\n4\n'):
        (tmp_path / 'list.txt').write_text(text)
        chosen, lost = semi_eval.listed(tmp_path / 'list.txt', None, sidecar, indices)
        assert chosen.tolist() == [4, 5] and lost == 0
    chosen, _ = semi_eval.listed(tmp_path / 'list.txt', None, {'settings': {}}, indices[::-1])  # a beton in other order
    assert chosen.tolist() == [90, 91]
    for text, message in (('7\n96\n', '1 of its 2 images are not in the training beton, e.g. 96'), ('', r'0 of its 0'),
                          ('other.png', 'e.g. other.png')):
        (tmp_path / 'list.txt').write_text(text)
        with pytest.raises(Fail, match=message):
            semi_eval.listed(tmp_path / 'list.txt', None, sidecar, indices)
    with pytest.raises(Fail, match='does not say of which dataset'):
        semi_eval.listed(tmp_path / 'list.txt', None, {'settings': {}}, indices)
    with pytest.raises(Fail, match='has 96 images, the beton was written from more'):
        semi_eval.listed(tmp_path / 'list.txt', None, sidecar, np.arange(97))


def test_schedules_of_the_papers():
    cosine = {'milestones': [], 'epochs': 20}
    assert decayed(0, 5, cosine) == 1 and decayed(50, 5, cosine) == pytest.approx(0.5)
    steps = {'milestones': [12, 16], 'gamma': 0.2, 'epochs': 20}
    assert [decayed(5 * epoch, 5, steps) for epoch in (0, 11, 12, 15, 16, 19)] == pytest.approx(
        [1, 1, 0.2, 0.2, 0.04, 0.04])


# ---------------------------------------------------------------------------------------------------
# Runs

class StopAfter:
    """In the place of StopSignal: true from the n-th question on."""
    name, exit_code, questions, leave = 'SIGTERM', StopSignal.exit_code, 0, StopSignal.leave

    def __bool__(self):
        StopAfter.questions += 1
        return StopAfter.questions > 5


def test_learns_resumes_exactly_and_shows_what_is_finished(workplace, tmp_path, monkeypatch, capsys):
    main(workplace, f'output={tmp_path}/once')
    found, log = results(tmp_path / 'once'), lines(tmp_path / 'once')
    assert found['top1'] > 60 and found['top5'] == 100 and (found['train_images'], found['all_images']) == (24, 96)
    assert len(log) == 12 and log[12]['loss'] < log[1]['loss']
    assert (log[1]['lr_backbone'], log[1]['lr_head']) == (0.02, 0.2)
    chosen = [int(i) for i in (tmp_path / 'once/subset.txt').read_text().split()]
    assert np.bincount(np.array(chosen) % 3).tolist() == [8, 8, 8]
    assert not (tmp_path / 'once/checkpoint.pt').exists() and 'fine-tuned on 24 of 96 images' in capsys.readouterr().out

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(semi_eval, 'StopSignal', StopAfter)
        main(workplace, f'output={tmp_path}/twice')
    assert error.value.code == StopSignal.exit_code and load_checkpoint(tmp_path / 'twice/checkpoint.pt')['step'] == 6
    with pytest.raises(Fail, match=r'made with another config: lr_head \(was 0.2, now 0.3\)'):
        main(workplace, f'output={tmp_path}/twice', 'lr_head=0.3')
    main(workplace, f'output={tmp_path}/twice', f'subset.root={workplace}/images')
    assert {s: v['loss'] for s, v in lines(tmp_path / 'twice').items()} == {s: v['loss'] for s, v in log.items()}
    assert (tmp_path / 'twice/log.jsonl').read_text().count('"loss"') == 12  # none again
    assert results(tmp_path / 'twice')['top1'] == found['top1']
    capsys.readouterr()
    main(workplace, f'output={tmp_path}/twice')
    assert 'finished before' in capsys.readouterr().out

    # The list that a run leaves behind is the subset of another
    main(workplace, f'output={tmp_path}/list', f'subset.file={tmp_path}/once/subset.txt', 'subset.share=1')
    assert lines(tmp_path / 'list')[12]['loss'] == log[12]['loss']


@pytest.mark.parametrize('name', ['in1k_1percent', 'in1k_10percent_swav', 'in1k_5percent_copgen'])
def test_runs_from_the_experiments_that_ship(workplace, tmp_path, name):
    changes = [str(ROOT / f'yamls/semi_eval/{name}.yaml'), *changes_of(workplace, f'output={tmp_path}')[1:]]
    semi_eval.main(load_config(semi_eval.DEFAULTS, [
        change for change in changes if not change.startswith('lr_')] + ['epochs=1', 'subset.file=null']))
    assert results(tmp_path)['train_images'] == 24 and len(lines(tmp_path)) == 3


@pytest.fixture(scope='module')
def named(workplace):
    return named_betons(workplace)


def test_labels_of_the_test_tree_are_matched_by_name(named, tmp_path):
    changes = f'train_beton={named}/abc.beton', f'output={tmp_path}/run', 'subset.share=0.5', 'epochs=8'
    main(named, *changes, f'test_beton={named}/bc.beton')
    assert results(tmp_path / 'run')['top1'] > 90
    for test, words in (('de', 'other classes: d, e of the test images'), ('abc', 'hold the same images')):
        with pytest.raises(Fail, match=words):
            main(named, *changes, f'test_beton={named}/{test}.beton')


def test_the_backbone_moves_at_its_own_rate(workplace, tmp_path):
    main(workplace, f'output={tmp_path}/frozen', 'lr_backbone=1e-30', 'epochs=1')
    main(workplace, f'output={tmp_path}/both', 'epochs=1')
    first = [lines(tmp_path / name)[1]['loss'] for name in ('frozen', 'both')]
    last = [lines(tmp_path / name)[3]['loss'] for name in ('frozen', 'both')]
    assert first[0] == first[1] and last[0] != last[1]


def test_two_processes_do_the_same(workplace, tmp_path):
    main(workplace, f'output={tmp_path}/one', 'epochs=2')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    run = subprocess.run([*launcher, str(ROOT / 'semi_eval.py'),
                          *changes_of(workplace, f'output={tmp_path}/two', 'epochs=2')], capture_output=True, text=True,
                         timeout=1800, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr
    one, two = (lines(tmp_path / name) for name in ('one', 'two'))
    assert len(one) == len(two) == 6
    assert [line['loss'] for line in one.values()] == pytest.approx([line['loss'] for line in two.values()], rel=1e-3)
    assert results(tmp_path / 'one')['test_images'] == results(tmp_path / 'two')['test_images'] == 31


@pytest.mark.parametrize('change, message', [
    ('checkpoint=', 'checkpoint: must name a file'), ('train_beton=none.beton', 'none.beton'),
    ('subset.share=0', 'subset.share: 0'), ('subset.file=none.txt', 'none.txt: cannot be read'),
    ('batch_size=25', 'batch_size: 25 is more than the 24 images'), ('batch_size=1', 'batch_size: 1'),
    ('epochs=0', 'epochs: 0'), ('lr_head=0', 'lr_head: 0'), ('milestones=[0]', 'milestones: 0'),
    ('normalization=imagnet', 'normalization: .imagnet'), ('precision=fp8', 'precision'),
    ('test_beton=FOLDER/unlabelled.beton', 'images without label'), ('momentum=-1', 'momentum: -1'),
    ('test_beton=FOLDER/foreign.beton', 'has a label 3; those of the training images end at 2'),
    ('nesterov=true momentum=0', 'nesterov: needs a momentum'), ('weight_decay=-1', 'weight_decay: -1')])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    with pytest.raises(Fail, match=message) as error:
        main(workplace, f'output={tmp_path}/out', *change.replace('FOLDER', str(workplace)).split(' '))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content', [b'', b'\xff\xfe\0', b'\0\1', '\u00b2\n'.encode(), b'<html>\n<body>', b'99\n'])
def test_a_list_of_images_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / 'list.txt').write_bytes(content)
    with pytest.raises(Fail, match='subset.file: .*list.txt: ') as error:
        semi_eval.listed(tmp_path / 'list.txt', None, {'settings': {}}, np.arange(9))
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('path', sorted((ROOT / 'yamls/semi_eval').glob('*.yaml')), ids=lambda p: p.name)
def test_experiments_that_ship_are_valid(path):
    config = load_config(semi_eval.DEFAULTS, [str(path)])
    for world in (1, 2, 4, 8):
        semi_eval.check(config, world)
