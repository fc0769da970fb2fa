"""linear_eval.py and load_backbone: kNN against numpy, the probe, resuming, two processes, foreign state dicts."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import linear_eval  # noqa: E402
from common import Fail, Processes, StopSignal, load_config  # noqa: E402
from data import write_beton  # noqa: E402
from models import build_backbone, load_backbone  # noqa: E402

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """A random backbone and betons of 67 and 31 images whose 3 classes differ in colour: separable in any network."""
    folder = tmp_path_factory.mktemp('linear_eval')
    random = np.random.default_rng(0)

    def samples(i):
        image = random.integers(0, 60, (16, 16, 3), np.uint8)
        image[..., i % 3] += 150
        return image, None, i % 3, i, -1
    write_beton(folder / 'train.beton', samples, 67, {}, num_workers=1)
    write_beton(folder / 'test.beton', samples, 31, {}, num_workers=1)
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


# ---------------------------------------------------------------------------------------------------
# Loading

def test_own_backbone(workplace):
    module, info = load_backbone(workplace / 'backbone.pt')
    assert not module.training and info['mean'] == MEAN and info['std'] == STD and info['image_size'] == 16
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, 64) and info['feature_dim'] == 64


@pytest.mark.parametrize('arch, width', [('resnet18', 512), ('resnet50', 2048)])
def test_torchvision_and_timm(tmp_path, arch, width):
    images = torch.randn(1, 3, 64, 64)
    for source in (getattr(torchvision.models, arch)(), timm.create_model(arch)):
        source.eval()
        torch.save(source.state_dict(), tmp_path / 'plain.pth')
        module, info = load_backbone(tmp_path / 'plain.pth')
        assert (info['arch'], info['stem'], info['width'], info['feature_dim']) == (arch, 'imagenet', 64, width)
        assert info['mean'] is None and 'fc.weight' in info['note']
        source.fc = torch.nn.Identity()
        assert torch.allclose(module(images), source(images), atol=1e-5)


def test_prefixes_containers_and_files_without_counters(tmp_path):
    source = torchvision.models.resnet18().state_dict()
    counters = [k for k in source if k.endswith('num_batches_tracked')]  # files from before PyTorch 0.4.1 have none
    state = {f'module.encoder_q.{k}': v for k, v in source.items() if k not in counters}
    other = {f'module.encoder_k.{k}': v + 1 for k, v in source.items()}
    torch.save({'state_dict': {**state, **other, 'module.queue': torch.zeros(3)}, 'epoch': 3}, tmp_path / 'moco.pth')
    module, info = load_backbone(tmp_path / 'moco.pth')
    assert torch.equal(module.state_dict()['layer4.1.conv2.weight'], source['layer4.1.conv2.weight'])
    assert 'module.encoder_q.' in info['note'] and 'module.queue' in info['note']
    save_file({k: v.contiguous() for k, v in source.items()}, tmp_path / 'plain.safetensors')
    module, _ = load_backbone(tmp_path / 'plain.safetensors')
    assert torch.equal(module.conv1.weight, source['conv1.weight'])


def test_missing_and_unexpected_keys_are_named(tmp_path):
    state = build_backbone('resnet18', 'cifar', 8).state_dict()
    extra = {'surprise': torch.zeros(1), 'layer1.0.extra': torch.zeros(1)}
    wrong = {'missing layer1.0.conv1.weight': {k: v for k, v in state.items() if k != 'layer1.0.conv1.weight'},
             'unexpected layer1.0.extra, surprise': {**state, **extra},
             r'of another shape bn1.bias \(9,\) for \(8,\)': {**state, 'bn1.bias': torch.zeros(9)},
             'no ResNet in it': {'cls_token': torch.zeros(3)},
             'several networks': {f'{p}.{k}': v for k, v in state.items() for p in ('a', 'b')}}
    for message, content in wrong.items():
        torch.save(content, tmp_path / 'wrong.pth')
        with pytest.raises(Fail, match=message) as error:
            load_backbone(tmp_path / 'wrong.pth')
        assert 'wrong.pth' in str(error.value) and '\n' not in str(error.value)
    (tmp_path / 'noise.pth').write_bytes(b'noise')
    for name, message in (('noise.pth', 'cannot be read'), ('none.pth', 'no such checkpoint')):
        with pytest.raises(Fail, match=message):
            load_backbone(tmp_path / name)


# ---------------------------------------------------------------------------------------------------
# kNN and probe

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
    found = linear_eval.knn_accuracy(torch.tensor(train), torch.tensor(train_labels), torch.tensor(test),
                                     torch.tensor(test_labels), 8, 20, 0.07, 16, Processes('cpu'))
    assert found == [pytest.approx(100 * first / 41, abs=1e-3), pytest.approx(100 * five / 41, abs=1e-3)]


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


def test_finished_results_are_shown_and_new_questions_asked(workplace, tmp_path, capsys):
    linear_eval.main(config_of(workplace, f'output={tmp_path}'))
    written = (tmp_path / 'results.json').stat().st_mtime_ns
    linear_eval.main(config_of(workplace, f'output={tmp_path}', 'batch=7'))
    assert 'finished before' in capsys.readouterr().out
    assert (tmp_path / 'results.json').stat().st_mtime_ns == written
    linear_eval.main(config_of(workplace, f'output={tmp_path}', 'knn.k=3'))
    assert (tmp_path / 'results.json').stat().st_mtime_ns != written and results(tmp_path)['config']['knn']['k'] == 3


def test_two_processes_find_the_same(workplace, tmp_path):
    """67 and 31 images do not divide by 2: none may count twice. Also the gradient of the probe is the mean of both."""
    linear_eval.main(config_of(workplace, f'output={tmp_path}/one', 'linear.augment=true'))
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    run = subprocess.run(command(workplace, f'output={tmp_path}/two', 'linear.augment=true', launcher=launcher),
                         env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    one, two = results(tmp_path / 'one'), results(tmp_path / 'two')
    assert one['knn'] == two['knn'] and one['linear'] == two['linear']
    logs = [[json.loads(t) for t in (tmp_path / n / 'log.jsonl').read_text().splitlines()] for n in ('one', 'two')]
    rates = [[line['lr'] for line in log if 'lr' in line] for log in logs]
    assert rates[0] == rates[1] and len(rates[0]) == 6


def test_killed_probe_resumes_bit_exactly(workplace, tmp_path):
    changes = ('linear.augment=true', 'linear.epochs=30')
    linear_eval.main(config_of(workplace, *changes, f'output={tmp_path}/reference'))
    for number in (signal.SIGKILL, signal.SIGTERM):
        folder = tmp_path / number.name
        call = command(workplace, *changes, f'output={folder}')
        process = subprocess.Popen(call, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
            log = [json.loads(text) for text in (run / 'log.jsonl').read_text().splitlines()]
            losses.append({line['step']: line['loss'] for line in log if 'loss' in line})
        assert losses[0] == losses[1] and len(losses[0]) == 30
        assert results(folder)['linear'] == results(tmp_path / 'reference')['linear']
        assert not (folder / 'linear.pt').exists()


@pytest.mark.parametrize('change, message', [
    ('checkpoint=', 'checkpoint: must name a file'), ('checkpoint=none.pt', 'none.pt: no such checkpoint'),
    ('train_beton=none.beton', 'none.beton'), ('knn.k=68', 'knn.k: 68 neighbours out of 67'), ('knn.k=0', 'knn.k: 0'),
    ('linear.batch_size=68', 'linear.batch_size: 68'), ('linear.epochs=0', 'linear.epochs: 0'),
    ('linear.lr=0', 'linear.lr: 0'), ('normalization=imagnet', 'normalization: .imagnet'),
    ('precision=fp8', 'precision')])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    with pytest.raises((Fail, ValueError), match=message) as error:
        linear_eval.main(config_of(workplace, f'output={tmp_path}/out', change))
    assert type(error.value).__name__ in ('Fail', 'DataError') and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_yaml_errors_are_one_line_and_exit_code_2(workplace):
    run = subprocess.run(command(workplace, 'linear.learning_rate=1'), capture_output=True, text=True, timeout=900)
    assert run.returncode == 2 and "unknown key 'linear.learning_rate'" in run.stderr and run.stderr.count('\n') == 1
