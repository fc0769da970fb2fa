"""linear_eval.py: the probe, resuming, two processes."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import linear_eval  # noqa: E402
from checkpoints import load_backbone  # noqa: E402
from common import Processes, StopSignal  # noqa: E402
from config import Fail, load_config  # noqa: E402
from files import load_checkpoint  # noqa: E402
from conftest import coloured_samples, damages, held, named_betons  # noqa: E402
from data import write_beton  # noqa: E402
from models import build_backbone, decayed  # noqa: E402

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """A random backbone and betons of 67 and 31 images whose 3 classes differ in colour: separable in any network."""
    folder = tmp_path_factory.mktemp('linear_eval')
    samples = coloured_samples()
    write_beton(folder / 'train.beton', samples, 67, {}, num_workers=1)
    write_beton(folder / 'test.beton', samples, 31, {}, num_workers=1)
    write_beton(folder / 'unlabelled.beton', lambda i: (*samples(i)[:2], -1, i, -1), 31, {}, num_workers=1)
    torch.manual_seed(0)
    backbone = build_backbone('resnet18', 'cifar', 8)
    torch.save({'state_dict': backbone.state_dict(), 'arch': 'resnet18', 'stem': 'cifar', 'width': 8, 'feature_dim': 64,
                'mean': MEAN, 'std': STD, 'image_size': 16}, folder / 'backbone.pt')
    (folder / 'small.yaml').write_text(f"""
checkpoint: {folder}/backbone.pt
train_beton: {folder}/train.beton
test_beton: {folder}/test.beton
precision: fp32
num_workers: 1
batch: 16
knn: {{k: 5, batch: 8}}
linear: {{epochs: 6, batch_size: 16, augment: false}}
""")
    return folder


def config_of(workplace, *changes):
    return load_config(linear_eval.DEFAULTS, [str(workplace / 'small.yaml'), *changes])


def command(workplace, *changes, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / 'linear_eval.py'), str(workplace / 'small.yaml'), *changes]


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def text_of_results(folder):
    return (folder / 'results.json').read_text().replace(str(folder), 'FOLDER')


def log_of(folder):
    return [json.loads(text) for text in (folder / 'log.jsonl').read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------
# Loading

def test_own_backbone(workplace):
    module, info = load_backbone(workplace / 'backbone.pt')
    assert not module.training and info['mean'] == MEAN and info['std'] == STD and info['image_size'] == 16
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, 64) and info['feature_dim'] == 64


# ---------------------------------------------------------------------------------------------------
# kNN and probe

def test_mean_per_class_is_the_mean_over_the_classes_that_occur():
    labels = torch.tensor([0] * 8 + [2] * 2)
    scores = torch.nn.functional.one_hot(torch.tensor([0] * 6 + [1, 2] + [2, 0]), 4).float()
    found = linear_eval.accuracies(torch.nn.Identity(), scores, labels, 4, 3, Processes('cpu'))
    assert found == {'top1': 70.0, 'top5': 100.0, 'mean_per_class': (75 + 50) / 2}


def test_schedules_and_lars_of_the_protocols():
    moco = {'milestones': [60, 80], 'epochs': 100, 'final_share': 0.0}
    assert [decayed(7 * epoch, 7, moco) for epoch in (0, 59, 60, 79, 80)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01])
    cosine = {'milestones': [], 'epochs': 60, 'final_share': 0.1}
    assert [decayed(7 * epoch, 7, cosine) for epoch in (0, 30, 60)] == pytest.approx([1, 0.55, 0.1])
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))]
    expected, buffers = [p.detach().clone() for p in parameters], [0.0, 0.0]
    optimizer = linear_eval.OPTIMIZERS['lars']([{'params': parameters}], lr=1.6, momentum=0.9, weight_decay=0.0)
    for step in range(3):  # apex LARC without clipping: the bias too
        for k, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter)
            rate = 0.001 * expected[k].norm() / parameter.grad.norm()
            buffers[k] = 0.9 * buffers[k] + rate * parameter.grad
            expected[k] = expected[k] - 1.6 * buffers[k]
        optimizer.step()
        for parameter, value in zip(parameters, expected):
            assert torch.allclose(parameter, value, atol=1e-6)


@pytest.mark.parametrize('name, lr', [('cifar10', 0.2), ('in1k_simsiam', 1.6), ('in1k_moco', 30), ('transfer', 30)])
def test_runs_from_the_experiments_that_ship(workplace, tmp_path, name, lr):
    linear_eval.main(load_config(linear_eval.DEFAULTS, [
        str(ROOT / f'yamls/linear_eval/{name}.yaml'), f'checkpoint={workplace}/backbone.pt', 'image_size=16',
        'resize=18', f'train_beton={workplace}/train.beton', f'test_beton={workplace}/test.beton', 'batch=16',
        f'output={tmp_path}', 'knn.k=5', 'num_workers=1', 'linear.batch_size=16', 'linear.epochs=2']))
    found = results(tmp_path)
    assert found['linear']['lr'] == lr and found['knn']['top1'] == 100 and found['test_images'] == 31
    assert len([line for line in log_of(tmp_path) if 'loss' in line]) == 2


def test_more_processes_than_images():
    processes, features = Processes('cpu'), torch.eye(2)
    processes.rank, processes.world = 3, 4
    assert linear_eval.accuracies(torch.nn.Identity(), features, torch.tensor([0, 1]), 2, 3, processes)['top1'] == 0


def test_several_learning_rates_in_one_pass_are_each_as_if_alone(workplace, tmp_path, capsys):
    linear_eval.main(config_of(workplace, f'output={tmp_path}/all', 'linear.more_lrs=[1.0, 0.01, 0.2]'))
    found = results(tmp_path / 'all')
    assert [probe['lr'] for probe in found['probes']] == [0.2, 1.0, 0.01]
    assert [probe['protocol'] for probe in found['probes']] == [True, False, False]
    assert found['linear'] == found['probes'][0] and "other than the protocol's lr 0.2: 1.0: " in found['summary']
    losses = [line['losses'] for line in log_of(tmp_path / 'all') if 'losses' in line]
    for k, probe in enumerate(found['probes']):
        linear_eval.main(config_of(workplace, f'output={tmp_path}/{k}', f"linear.lr={probe['lr']}"))
        assert results(tmp_path / str(k))['linear'] == {**probe, 'protocol': True}
        alone = [line['loss'] for line in log_of(tmp_path / str(k)) if 'loss' in line]
        assert alone == pytest.approx([epoch[k] for epoch in losses], rel=1e-6)


def test_the_metric_is_that_of_the_set(workplace, tmp_path):
    write_beton(tmp_path / 'pets.beton', lambda i: (np.full((8, 8, 3), i, np.uint8), None, min(i, 2), i, -1), 9,
                {'dataset': {'name': 'OxfordIIITPet'}}, num_workers=1)
    linear_eval.main(config_of(workplace, f'output={tmp_path}/out', f'test_beton={tmp_path}/pets.beton'))
    found = results(tmp_path / 'out')
    assert found['metric'] == 'mean_per_class' and found['linear']['mean_per_class'] != found['linear']['top1']
    assert f"linear mean per class {found['linear']['mean_per_class']:.2f}" in found['summary']


def test_features_are_kept_for_the_next_question_and_a_stop_is_seen_while_they_are_computed(
        workplace, tmp_path, monkeypatch, capsys):
    class Stop:
        name, exit_code, questions, leave = 'SIGTERM', StopSignal.exit_code, 0, StopSignal.leave

        def __bool__(self):
            Stop.questions += 1
            return Stop.questions > 6

    config = config_of(workplace, f'output={tmp_path}/out', 'keep_features=true')
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(linear_eval, 'StopSignal', Stop)
        linear_eval.main(config)  # 5 batches of training images, then the second one of the test images
    assert error.value.code == StopSignal.exit_code and 'left while the test features' in capsys.readouterr().out
    assert {p.name for p in (tmp_path / 'out').glob('*.pt')} == {'train_features.pt'}
    linear_eval.main(config)
    linear_eval.main(config_of(workplace, f'output={tmp_path}/reference'))
    assert text_of_results(tmp_path / 'out') == text_of_results(tmp_path / 'reference').replace(
        '"keep_features": false', '"keep_features": true')
    assert not list((tmp_path / 'reference').glob('*.pt'))
    with monkeypatch.context() as patch:
        patch.setattr(linear_eval, 'all_features', None)
        linear_eval.main(config_of(workplace, f'output={tmp_path}/out', 'linear.lr=0.3'))
        assert results(tmp_path / 'out')['linear']['lr'] == 0.3
        with pytest.raises(TypeError):  # other pixels are another question
            linear_eval.main(config_of(workplace, f'output={tmp_path}/out', 'resize=20', 'keep_features=true'))


def test_probe_learns_and_leaves_the_backbone_alone(workplace, tmp_path, capsys):
    before = (workplace / 'backbone.pt').read_bytes()
    linear_eval.main(config_of(workplace, f'output={tmp_path}', 'linear.epochs=60'))
    found, output = results(tmp_path), capsys.readouterr().out
    assert found['knn']['top1'] == 100 and found['linear']['top1'] > 90 and found['linear']['top5'] == 100
    assert (found['train_images'], found['test_images'], found['classes']) == (67, 31, 3)
    assert found['mean'] == MEAN and found['std'] == STD and found['image_size'] == 16  # the checkpoint's own
    assert found['summary'] in output and 'not scaled by the batch' in output
    assert (workplace / 'backbone.pt').read_bytes() == before
    assert {'config.yaml', 'versions.json', 'log.jsonl'} < {p.name for p in tmp_path.iterdir()}


@pytest.fixture(scope='module')
def named(workplace):
    return named_betons(workplace)


def test_labels_of_the_test_tree_are_matched_by_name(named, tmp_path):
    changes = f'train_beton={named}/abc.beton', f'output={tmp_path}/run'
    linear_eval.main(config_of(named, *changes, f'test_beton={named}/bc.beton'))
    found = results(tmp_path / 'run')
    assert found['knn']['top1'] == 100 and found['linear']['top1'] > 90 and found['classes'] == 3
    for test, words in (('de', 'other classes: d, e of the test images'), ('abc', 'hold the same images')):
        with pytest.raises(Fail, match=words):
            linear_eval.main(config_of(named, *changes, f'test_beton={named}/{test}.beton'))


def test_finished_results_are_shown_and_new_questions_asked(workplace, tmp_path, capsys):
    linear_eval.main(config_of(workplace, f'output={tmp_path}'))
    written = (tmp_path / 'results.json').stat().st_mtime_ns
    linear_eval.main(config_of(workplace, f'output={tmp_path}', 'batch=7'))
    assert 'finished before' in capsys.readouterr().out
    assert (tmp_path / 'results.json').stat().st_mtime_ns == written
    linear_eval.main(config_of(workplace, f'output={tmp_path}', 'knn.k=3'))
    assert (tmp_path / 'results.json').stat().st_mtime_ns != written and results(tmp_path)['config']['knn']['k'] == 3
    kept, = tmp_path.glob('results_*.json')  # the first answer
    assert kept.stat().st_mtime_ns == written and json.loads(kept.read_text())['config']['knn']['k'] == 5


def test_an_unfinished_probe_is_not_replaced(workplace, tmp_path, monkeypatch):
    changes = ('linear.augment=true', f'output={tmp_path}')
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(linear_eval, 'in_words', lambda *_: 1 / 0)
        linear_eval.main(config_of(workplace, *changes))
    unfinished = (tmp_path / 'linear.pt').read_bytes()
    with pytest.raises(Fail, match=r'linear.pt was made with another config: knn.k .was 5, now 3.*set another output'):
        linear_eval.main(config_of(workplace, *changes, 'knn.k=3'))
    assert (tmp_path / 'linear.pt').read_bytes() == unfinished
    kept = (tmp_path / 'linear.pt').rename(tmp_path / 'kept')
    linear_eval.main(config_of(workplace, *changes, 'knn.k=3'))
    kept.rename(tmp_path / 'linear.pt')
    linear_eval.main(config_of(workplace, *changes, 'knn.k=3'))  # to see that answer again touches nothing
    assert (tmp_path / 'linear.pt').read_bytes() == unfinished
    linear_eval.main(config_of(workplace, *changes))
    assert not (tmp_path / 'linear.pt').exists()


def test_other_statistics_in_the_file_are_another_question(workplace, tmp_path, capsys):
    content = torch.load(workplace / 'backbone.pt', weights_only=True)
    for mean, again in ((MEAN, False), (MEAN, True), ([0.1, 0.1, 0.1], False)):
        torch.save({**content, 'mean': mean}, tmp_path / 'copy.pt')
        linear_eval.main(config_of(workplace, f'checkpoint={tmp_path}/copy.pt', f'output={tmp_path}/out'))
        assert ('finished before' in capsys.readouterr().out) == again
        assert results(tmp_path / 'out')['mean'] == mean


def test_images_of_one_class_are_no_question(workplace, tmp_path):
    write_beton(tmp_path / 'one.beton', lambda i: (*coloured_samples()(i)[:2], 0, i, -1), 31, {'classes': ['images']},
                num_workers=1)
    with pytest.raises(Fail, match=r'one.beton: all images are of one class \(images\), which any encoder finds'):
        linear_eval.main(config_of(workplace, f'test_beton={tmp_path}/one.beton', f'output={tmp_path}/out'))


def test_batch_norm_before_the_classifier_is_vissls(workplace, tmp_path):
    """Features of any scale are learned from at one rate; the statistics of the batch train, running ones measure."""
    changes = ('linear.batch_norm=true', 'linear.weight_decay=0.1', 'linear.nesterov=true')
    linear = config_of(workplace, *changes)['linear']
    torch.manual_seed(0)
    probes, optimizer, _ = linear_eval.build_probes(linear, [0.1, 1.0], 4, 3, None, torch.device('cpu'))
    assert [type(part).__name__ for part in probes[0]] == ['BatchNorm1d', 'Linear']
    assert [(g['base_lr'], g['weight_decay'], g['nesterov']) for g in optimizer.param_groups] == [
        (0.1, 0.0, True), (0.1, 0.1, True), (1.0, 0.0, True), (1.0, 0.1, True)]
    x = torch.randn(64, 4) * 1000 + 5
    assert torch.allclose(probes[0](x), probes[0][1]((x - x.mean(0)) / x.std(0, unbiased=False)), atol=1e-4)
    linear_eval.main(config_of(workplace, 'linear.batch_norm=true', 'linear.more_lrs=[0.01]', f'output={tmp_path}/a'))
    found = results(tmp_path / 'a')
    assert found['linear']['top1'] > 90 and len(found['probes']) == 2


def test_damaged_kept_features_are_computed_again(workplace, tmp_path):
    linear_eval.main(config_of(workplace, f'output={tmp_path}', 'keep_features=true'))
    expected, path = results(tmp_path)['linear'], tmp_path / 'test_features.pt'
    for _ in damages(path):
        (tmp_path / 'results.json').unlink()
        linear_eval.main(config_of(workplace, f'output={tmp_path}', 'keep_features=true'))
        assert results(tmp_path)['linear'] == expected and len(load_checkpoint(path)['labels']) == 31


def test_two_processes_find_the_same(workplace, tmp_path):
    """67 and 31 images do not divide by 2: none may count twice. Also the gradient of the probe is the mean of both."""
    linear_eval.main(config_of(workplace, f'output={tmp_path}/one', 'linear.augment=true'))
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    run = subprocess.run(command(workplace, f'output={tmp_path}/two', 'linear.augment=true', launcher=launcher),
                         env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    one, two = results(tmp_path / 'one'), results(tmp_path / 'two')
    assert one['knn'] == two['knn'] and one['linear'] == two['linear']
    logs = [[(line['lr'], line['loss']) for line in log_of(tmp_path / n) if 'lr' in line] for n in ('one', 'two')]
    assert np.allclose(*logs, rtol=1e-3) and len(logs[0]) == 6


def test_killed_probe_resumes_bit_exactly(workplace, tmp_path):
    changes = ('linear.augment=true', 'linear.epochs=30')
    linear_eval.main(config_of(workplace, *changes, f'output={tmp_path}/reference'))
    for number in (signal.SIGKILL, signal.SIGTERM):
        folder = tmp_path / number.name
        call = command(workplace, *changes, f'output={folder}')
        launcher = held('linear_eval.py', 'epoch', 25) if number == signal.SIGKILL else call[:1]
        process = subprocess.Popen([*launcher, *call[1:]], env=ENVIRONMENT, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True)
        begin = time.time()
        while not (folder / 'linear.pt').is_file() and process.poll() is None and time.time() - begin < 900:
            time.sleep(0.002)
        process.send_signal(number)
        output, errors = process.communicate(timeout=900)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else StopSignal.exit_code), errors
        assert not (folder / 'results.json').exists()
        if number == signal.SIGKILL:
            again = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
            assert again.returncode == 0 and 'resumed at epoch' in again.stdout, again.stderr
        else:
            assert 'SIGTERM: left in epoch' in output
            linear_eval.main(config_of(workplace, *changes, f'output={folder}'))
        losses = []
        for run in (tmp_path / 'reference', folder):
            losses.append({line['step']: line['loss'] for line in log_of(run) if 'loss' in line})
        assert losses[0] == losses[1] and len(losses[0]) == 30
        assert results(folder)['linear'] == results(tmp_path / 'reference')['linear']
        assert not (folder / 'linear.pt').exists()


@pytest.mark.parametrize('change, message', [
    ('checkpoint=', 'checkpoint: must name a file'), ('checkpoint=none.pt', 'none.pt: no such checkpoint'),
    ('train_beton=none.beton', 'none.beton'), ('knn.k=68', 'knn.k: 68 neighbours out of 67'), ('knn.k=0', 'knn.k: 0'),
    ('linear.batch_size=68', 'linear.batch_size: 68'), ('linear.epochs=0', 'linear.epochs: 0'),
    ('linear.lr=0', 'linear.lr: 0'), ('normalization=imagnet', 'normalization: .imagnet'),
    ('linear.more_lrs=[0.1, a]', 'linear.more_lrs: .a. must be a number'),
    ('linear.milestones=[0]', 'linear.milestones: 0'),
    ('linear.optimizer=lar', 'linear.optimizer: .lar. is none of sgd, lars'), ('metric=top2', 'metric: .top2'),
    ('linear.crop_scale=[0.5, 2]', 'crop_scale is .0.5, 2.'), ('linear.flip=2', 'flip is 2'),
    ('resize=8', 'resize is 8'), ('linear={batch_norm: true, batch_size: 1}', 'linear.batch_norm: one feature'),
    ('linear.momentum=-1', 'linear.momentum: -1'),
    ('linear.weight_decay=-1', 'linear.weight_decay: -1'),
    ('num_workers=0', 'num_workers: 0'), ('test_beton=FOLDER/unlabelled.beton', 'images without label'),
    ('precision=fp8', 'precision')])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    with pytest.raises(Fail, match=message) as error:
        linear_eval.main(config_of(workplace, f'output={tmp_path}/out', change.replace('FOLDER', str(workplace))))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_the_patches_of_a_vit_must_divide_the_image(workplace, tmp_path):
    network = build_backbone('vit_small', patch_size=8, image_size=16)
    torch.save({'state_dict': network.state_dict(), 'arch': 'vit_small', 'patch_size': 8, 'mean': MEAN, 'std': STD,
                'image_size': 16}, tmp_path / 'vit.pt')
    with pytest.raises(Fail, match='image_size: 20 is not a multiple of the 8 px patches of vit_small'):
        linear_eval.main(config_of(workplace, f'checkpoint={tmp_path}/vit.pt', 'image_size=20'))


def test_yaml_errors_are_one_line_and_exit_code_2(workplace):
    run = subprocess.run(command(workplace, 'linear.learning_rate=1'), capture_output=True, text=True, timeout=900)
    assert run.returncode == 2 and "unknown key 'linear.learning_rate'" in run.stderr and run.stderr.count('\n') == 1
