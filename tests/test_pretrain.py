"""pretrain.py: every method's run, torchrun, resuming, quality weights, the monitor, and what users get wrong."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import augment  # noqa: E402
import models  # noqa: E402
import pretrain  # noqa: E402
from checkpoints import load_backbone  # noqa: E402
from common import Processes, StopSignal  # noqa: E402
from config import Fail, load_config  # noqa: E402
from files import load_checkpoint  # noqa: E402
from conftest import held  # noqa: E402
from data import write_beton  # noqa: E402
from loss import nt_xent  # noqa: E402
from models import METHODS, VITS  # noqa: E402

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
# Small settings of every method, with as many of the options on as can be. Batch 16 of 64 images.
METHOD = {
    'mocov2': ('moco.symmetric=true', 'moco.negative_mixing=1.6', 'accumulate=2'),
    'mocov3': ('mocov3.dim=16', 'mocov3.hidden=32', 'backbone.arch=vit_small', 'backbone.patch_size=8',
               'optimizer.name=adamw', 'optimizer.lr=0.001', 'optimizer.clip_grad=1'),
    'byol': ('byol.dim=16', 'byol.hidden=32', 'byol.momentum=0.9', 'optimizer.name=lars', 'optimizer.warmup_epochs=1'),
    'simsiam': ('simsiam.dim=32', 'simsiam.hidden=16', 'accumulate=2'),
    'swav': ('swav.dim=16', 'swav.hidden=32', 'swav.prototypes=12', 'swav.queue=32', 'swav.queue_from_epoch=0',
             'swav.freeze_prototypes=2', 'small_crops.count=2', 'small_crops.size=12', 'optimizer.name=lars'),
    'supcon': ('supcon.dim=16',),
    'simclr': ('simclr.dim=16', 'simclr.negative_mixing=1.6', 'optimizer.name=lars'),
    'vicreg': ('vicreg.dim=32', 'vicreg.hidden=32', 'optimizer.name=lars'),
    'nnclr': ('nnclr.dim=16', 'nnclr.hidden=32', 'nnclr.queue=32')}
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """Folder with a beton of 64 images of 16 px (three quarters with a view), a random CLIP and a small experiment."""
    folder = tmp_path_factory.mktemp('pretrain')
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 2, 16, 16, 3), np.uint8)

    def samples(i):
        return images[i, 0], images[i, 1] if i % 4 else None, i % 3, i, 100 if i % 4 else -1
    write_beton(folder / 'pairs.beton', samples, 64, {})
    write_beton(folder / 'known.beton', samples, 48, {})  # to test a monitor on: the first neighbour is the image
    (folder / 'small.yaml').write_text(f"""
output: out
precision: fp32
data: {{beton: {folder}/pairs.beton, num_workers: 1}}
image_size: 16
backbone: {{arch: resnet18, stem: cifar, width: 8}}
moco: {{dim: 16, queue: 64, momentum: 0.9, bn_splits: 2}}
batch_size: 16
epochs: 1
log_every: 1
tensorboard: false
""")
    import open_clip
    vision = {'image_size': 16, 'patch_size': 4, 'width': 32, 'layers': 1, 'head_width': 16}
    text = {'context_length': 8, 'vocab_size': 64, 'width': 16, 'heads': 1, 'layers': 1}
    clip = folder / 'clip'
    clip.mkdir()
    (clip / 'open_clip_config.json').write_text(json.dumps({
        'model_cfg': {'embed_dim': 24, 'vision_cfg': vision, 'text_cfg': text},
        'preprocess_cfg': {'mean': [0.5, 0.5, 0.5], 'std': [0.25, 0.25, 0.25]}}))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(24, vision, text)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, clip / 'open_clip_model.safetensors')
    np.savez(folder / 'fg.npz', pc=random.normal(size=32).astype(np.float32), mean=np.zeros(32, np.float32))
    return folder


def config_of(workplace, *changes):
    return load_config(pretrain.DEFAULTS, [str(workplace / 'small.yaml'), *changes])


def command(workplace, *changes, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / 'pretrain.py'), str(workplace / 'small.yaml'), *changes]


def lines(folder):
    found = [json.loads(text) for text in (folder / 'log.jsonl').read_text().splitlines()]
    return [line for line in found if 'loss' in line]


def wait_for(path, process, seconds=900):
    begin = time.time()
    while not (path.is_file() and path.stat().st_size) and process.poll() is None and time.time() - begin < seconds:
        time.sleep(0.002)
    assert path.is_file(), process.communicate()


def assert_equal(a, b):
    """Nested states, every number the same."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal(x, y)
    elif torch.is_tensor(a):
        assert torch.equal(a, b)
    else:
        assert a == b


# ---------------------------------------------------------------------------------------------------
# Runs

def test_learning_rate_warms_up_and_falls():
    settings = {'lr': 0.5, 'final_lr': 0.0, 'warmup_epochs': 2, 'per_epoch': False}
    rates = [pretrain.learning_rate(step, 5, 10, settings) for step in range(50)]
    assert rates[0] == 0 and rates[9] == pytest.approx(0.45) and rates[10] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.25) and all(a > b for a, b in zip(rates[10:], rates[11:])) and rates[-1] < 0.001
    assert pretrain.learning_rate(50, 5, 10, {**settings, 'final_lr': 0.1}) == pytest.approx(0.1)


def test_learning_rate_per_epoch_is_that_of_cop_gens_code():
    settings = {'lr': 0.02625, 'final_lr': 2.625e-5, 'warmup_epochs': 0, 'per_epoch': True}
    rates = [pretrain.learning_rate(step, 5, 10, settings) for step in range(50)]
    for epoch in range(1, 11):                             # eta_min + (lr - eta_min) (1 + cos(pi epoch / epochs)) / 2
        expected = 2.625e-5 + (0.02625 - 2.625e-5) * (1 + np.cos(np.pi * epoch / 10)) / 2
        assert rates[5 * epoch - 5:5 * epoch] == pytest.approx([expected] * 5, rel=1e-12)
    warm = [pretrain.learning_rate(step, 5, 10, {**settings, 'warmup_epochs': 2}) for step in range(50)]
    assert warm[9] == pytest.approx(0.9 * 0.02625) and len(set(warm[10:15])) == 1 and warm[-1] == 2.625e-5


class StopAfter:
    """In place of StopSignal: true when it is asked for the n-th time, which is at the end of step n."""
    exit_code, name, steps, leave = 143, 'SIGTERM', 3, StopSignal.leave

    def __init__(self):
        self.asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked >= self.steps


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_and_resumes_bit_exactly(workplace, tmp_path, monkeypatch, method):
    """Two epochs of 4 steps at once, and with a break in the middle of the first (queues, momenta, frozen parts)."""
    monkeypatch.setitem(VITS, 'vit_small', 48)
    changes = [f'method={method}', *METHOD[method], 'epochs=2']
    pretrain.main(config_of(workplace, *changes, f'output={tmp_path}/once'))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(pretrain, 'StopSignal', StopAfter)
        pretrain.main(config_of(workplace, *changes, f'output={tmp_path}/twice'))
    assert load_checkpoint(tmp_path / 'twice/checkpoint.pt')['step'] == 3
    pretrain.main(config_of(workplace, *changes, f'output={tmp_path}/twice'))
    assert_same_run(tmp_path / 'once', tmp_path / 'twice', steps=8)
    assert [line['step'] for line in lines(tmp_path / 'twice')] == list(range(1, 9))  # none was made twice
    log = lines(tmp_path / 'once')
    assert all(np.isfinite(line['loss']) and 0.05 < line['feature_std_ratio'] < 1.5 for line in log)
    assert {'contrastive_top1', 'assignment_entropy'} & set(log[0]) == {
        **dict.fromkeys(('mocov2', 'mocov3', 'simclr', 'supcon', 'nnclr'), {'contrastive_top1'}),
        'swav': {'assignment_entropy'}}.get(method, set())
    module, info = load_backbone(tmp_path / 'once/backbone.pt')
    first = load_backbone(tmp_path / 'once/backbone_init.pt')[0].state_dict()
    assert module.feature_dim == info['feature_dim'] and info['image_size'] == 16
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, first[key])}
    assert moved and not moved & {'pos_embed', 'patch_embed.proj.weight'}


def test_labels_of_the_batch_reach_supcon(workplace, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(models, 'sup_con', lambda z1, z2, labels, *_: seen.append(labels) or nt_xent(z1, z2, 0.1))
    pretrain.main(config_of(workplace, 'method=supcon', f'output={tmp_path}/out'))
    loader = pretrain.open_pairs(config_of(workplace), pretrain.Processes('cpu'))
    assert torch.equal(torch.cat(seen), torch.cat([batch['index'] for batch in loader.epoch(0)]) % 3)
    write_beton(tmp_path / 'none.beton', lambda i: (np.zeros((16, 16, 3), np.uint8), None, -1, i, -1), 16, {})
    with pytest.raises(Fail, match='method: supcon needs labels, and images of .*none.beton have none') as error:
        pretrain.main(config_of(workplace, 'method=supcon', f'data.beton={tmp_path}/none.beton',
                                f'output={tmp_path}/none'))
    assert '\n' not in str(error.value) and not (tmp_path / 'none').exists()


def test_several_betons_are_one_training_set(workplace, tmp_path):
    extra = np.random.default_rng(1).integers(0, 256, (16, 16, 16, 3), np.uint8)
    write_beton(tmp_path / 'extra.beton', lambda i: (extra[i], None, 0, i, -1), 16, {})
    betons = f'data.beton=[{workplace}/pairs.beton, {tmp_path}/extra.beton]'
    pretrain.main(config_of(workplace, betons, f'output={tmp_path}/out'))
    assert len(lines(tmp_path / 'out')) == 5               # 80 images in batches of 16
    fewer, more = f'data.beton=[{workplace}/pairs.beton]', betons[:-1] + f', {tmp_path}/extra.beton]'
    for others in (fewer, more):
        with pytest.raises(Fail, match='another content of data.beton;'):
            pretrain.main(config_of(workplace, others, f'output={tmp_path}/out'))
    write_beton(tmp_path / 'extra.beton', lambda i: (extra[15 - i], None, 0, i, -1), 16, {})
    with pytest.raises(Fail, match='another content of data.beton;'):
        pretrain.main(config_of(workplace, betons, f'output={tmp_path}/out'))


def test_labels_of_betons_that_name_other_classes_are_not_joined(workplace, tmp_path):
    def of(name, classes):
        samples = lambda i: (np.full((16, 16, 3), i, np.uint8), None, i % 2, i, -1)
        write_beton(tmp_path / f'{name}.beton', samples, 16, {'classes': classes} if classes else {})
        return f'{tmp_path}/{name}.beton'
    one, other, same, none = of('one', ['a', 'b']), of('other', ['b', 'c']), of('same', ['a', 'b']), of('none', None)
    train = lambda *betons, method='supcon': pretrain.main(config_of(
        workplace, f'method={method}', f"data.beton=[{','.join(betons)}]", f'output={tmp_path}/out_{method}'))
    for betons in ((one, other), (one, none)):
        with pytest.raises(Fail, match='supcon takes images of one number for one class, .*: a, b; ') as error:
            train(*betons)
        assert '\n' not in str(error.value) and not (tmp_path / 'out_supcon').exists()
    train(one, same)
    train(one, other, method='simclr')  # which looks at no label


def test_what_a_run_was_made_from_is_compared_when_it_goes_on_and_when_it_is_finished(workplace, tmp_path):
    for name in ('pairs.beton', 'pairs.beton.json', 'fg.npz'):
        shutil.copy(workplace / name, tmp_path)
    shutil.copytree(workplace / 'clip', tmp_path / 'clip')
    changes = (f'data.beton={tmp_path}/pairs.beton', 'quality.enabled=true', f'quality.clip.model={tmp_path}/clip',
               f'quality.pc={tmp_path}/fg.npz', f'output={tmp_path}/out')
    pretrain.main(config_of(workplace, *changes))
    finished = (tmp_path / 'out/backbone.pt').stat().st_mtime_ns
    pretrain.main(config_of(workplace, *changes))
    assert (tmp_path / 'out/backbone.pt').stat().st_mtime_ns == finished
    other = write_beton(tmp_path / 'other.beton', lambda i: (np.full((16, 16, 3), i, np.uint8), None, 0, i, -1), 64, {})
    pc = dict(np.load(tmp_path / 'fg.npz'))
    np.savez(tmp_path / 'turned.npz', **{**pc, 'pc': -pc['pc']})
    weights = (tmp_path / 'clip/open_clip_model.safetensors').read_bytes()
    (tmp_path / 'weights').write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert other['samples'] == 64
    for name, by, key in (('pairs.beton.json', 'other.beton.json', 'data.beton'),
                          ('fg.npz', 'turned.npz', 'quality.pc'),
                          ('clip/open_clip_model.safetensors', 'weights', 'quality.clip')):
        whole = (tmp_path / name).read_bytes()
        shutil.copy(tmp_path / by, tmp_path / name)
        for gone in (False, True):  # finished, and not
            (tmp_path / 'out/backbone.pt').rename(tmp_path / 'kept') if gone else None
            with pytest.raises(Fail, match=f'was made with another content of {key}; set another'):
                pretrain.main(config_of(workplace, *changes))
        (tmp_path / 'kept').rename(tmp_path / 'out/backbone.pt')
        (tmp_path / name).write_bytes(whole)
    (tmp_path / 'disk').mkdir()  # copied to a disk of the node: the content counts
    for name in ('pairs.beton', 'pairs.beton.json', 'fg.npz'):
        shutil.move(tmp_path / name, tmp_path / 'disk')
    there = f'data.beton={tmp_path}/disk/pairs.beton', f'quality.pc={tmp_path}/disk/fg.npz'
    (tmp_path / 'out/backbone.pt').unlink()
    pretrain.main(config_of(workplace, *changes, *there))
    assert (tmp_path / 'out/backbone.pt').is_file()
    shutil.rmtree(tmp_path / 'disk')  # to make room
    shutil.rmtree(tmp_path / 'clip')
    pretrain.main(config_of(workplace, *changes))


def test_monitor_writes_the_accuracy_and_leaves_the_run_alone(workplace, tmp_path):
    beton = workplace / 'pairs.beton'
    knn = ('knn.every=1', f'knn.train_beton={beton}', f'knn.test_beton={workplace}/known.beton', 'knn.k=1')
    for name, changes in (('off', ()), ('on', knn)):
        pretrain.main(config_of(workplace, 'epochs=2', *changes, f'output={tmp_path}/{name}'))
    found = [json.loads(text) for text in (tmp_path / 'on/log.jsonl').read_text().splitlines()]
    found = [(line['step'], line['knn_accuracy']) for line in found if 'knn_accuracy' in line]
    assert found == [(4, 1.0), (8, 1.0)]                   # the nearest of the very same images is the image itself
    assert_equal(*(load_checkpoint(tmp_path / name / 'backbone.pt') for name in ('off', 'on')))
    # killed between saving the last epoch and its figure
    text = (tmp_path / 'on/log.jsonl').read_text().splitlines(keepends=True)
    (tmp_path / 'on/log.jsonl').write_text(''.join(line for line in text if '"step": 8, "knn' not in line))
    (tmp_path / 'on/backbone.pt').unlink()
    for _ in range(2):
        pretrain.main(config_of(workplace, 'epochs=2', *knn, f'output={tmp_path}/on'))
        assert (tmp_path / 'on/log.jsonl').read_text().count('"step": 8, "knn_accuracy": 1.0') == 1


def test_collapse_is_shown(workplace, tmp_path, capsys):
    grey = np.full((16, 16, 3), 128, np.uint8)
    write_beton(tmp_path / 'grey.beton', lambda i: (grey, None, 0, i, -1), 32, {})
    for method, expected in (('simsiam', True), ('swav', True)):
        pretrain.main(config_of(workplace, f'method={method}', *METHOD[method], f'data.beton={tmp_path}/grey.beton',
                                f'output={tmp_path}/{method}', 'view_1.jitter_prob=0', 'view_2.jitter_prob=0',
                                'view_1.solarize_prob=0', 'view_2.solarize_prob=0'))
        line = lines(tmp_path / method)[0]
        assert line['feature_std_ratio'] < 0.01 and line.get('assignment_entropy', 0) == 0
        said = capsys.readouterr().out.splitlines()
        assert any('COLLAPSED  lr' in line for line in said[:-1])
        assert said[-1].startswith('WARNING: COLLAPSED: the features of all images') and 'backbone.pt' in said[-1]


def test_what_counts_as_collapsed():
    """The second and third: MoCo v2 on pairs of other images of the same class, where the loss fell all the same."""
    for expected, figures in (('', dict(feature_std_ratio=0.5, contrastive_top1=0.16, batch_top1=0.2)),
                              ('nearly the same', dict(feature_std_ratio=0.01, contrastive_top1=0.7, batch_top1=0.016)),
                              ('by their age', dict(feature_std_ratio=0.06, contrastive_top1=0.34, batch_top1=0.016)),
                              ('', dict(feature_std_ratio=0.15, contrastive_top1=0.05, batch_top1=0.03)),
                              ('nearly the same', dict(feature_std_ratio=0.5, assignment_entropy=0.01))):
        assert expected in pretrain.collapsed(figures) and bool(expected) == bool(pretrain.collapsed(figures))


def test_compiled_backbone_saves_the_same_names(workplace, tmp_path, monkeypatch):
    compile_ = torch.nn.Module.compile
    seen = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: (
        seen.append(self), compile_(self, backend='eager')))  # which needs no C++ compiler
    for value in ('false', 'true'):
        pretrain.main(config_of(workplace, f'compile={value}', f'output={tmp_path}/{value}'))
        assert len(seen) == 2 * (value == 'true')          # the backbone and its momentum
    plain, compiled = (load_checkpoint(tmp_path / value / 'checkpoint.pt') for value in ('false', 'true'))
    assert plain['model'].keys() == compiled['model'].keys()
    for key, value in plain['model'].items():
        assert torch.allclose(value.float(), compiled['model'][key].float(), atol=1e-4), key


def test_torchrun_trains_as_one_process(workplace, tmp_path):
    """The whole stage with its loader. Rounding grows from step to step, so the first ones are compared."""
    changes = ['quality.enabled=true', f'quality.clip.model={workplace}/clip', f'quality.pc={workplace}/fg.npz',
               'accumulate=2']
    pretrain.main(config_of(workplace, *changes, f'output={tmp_path}/one'))
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    result = subprocess.run(command(workplace, *changes, f'output={tmp_path}/two', launcher=launcher),
                            env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    one, two = lines(tmp_path / 'one'), lines(tmp_path / 'two')
    assert len(one) == len(two) == 4
    assert [a['loss'] for a in one[:2]] == pytest.approx([a['loss'] for a in two[:2]], rel=1e-4)
    assert len(load_checkpoint(tmp_path / 'two/checkpoint.pt')['random']) == 2
    assert (tmp_path / 'two/backbone.pt').is_file() and (tmp_path / 'two/loss.png').is_file()


def test_two_processes_go_on_where_one_stopped(workplace, tmp_path, monkeypatch):
    """SwAV's queue, prototypes and small crops, synchronised batch norm, the monitor."""
    changes = ('method=swav', *METHOD['swav'], 'knn.every=1', f'knn.train_beton={workplace}/pairs.beton', 'knn.k=1',
               f'knn.test_beton={workplace}/known.beton')
    pretrain.main(config_of(workplace, *changes, f'output={tmp_path}/one'))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(pretrain, 'StopSignal', StopAfter)
        pretrain.main(config_of(workplace, *changes, f'output={tmp_path}/two'))
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    result = subprocess.run(command(workplace, *changes, f'output={tmp_path}/two', launcher=launcher),
                            env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0 and 'resumed at step 3' in result.stdout, result.stderr
    one, two = lines(tmp_path / 'one'), lines(tmp_path / 'two')
    assert [line['step'] for line in two] == [1, 2, 3, 4]
    assert [line['loss'] for line in one] == pytest.approx([line['loss'] for line in two], rel=1e-4)
    a, b = (load_checkpoint(tmp_path / name / 'checkpoint.pt')['model'] for name in ('one', 'two'))
    assert torch.allclose(a['queue'], b['queue'], atol=1e-3) and a['queue'][:, -1].any()
    assert '"knn_accuracy": 1.0' in (tmp_path / 'two/log.jsonl').read_text()


# ---------------------------------------------------------------------------------------------------
# Resuming

LONG = ('epochs=6', 'optimizer.lr=0.1', 'optimizer.warmup_epochs=1')  # 24 steps


@pytest.fixture(scope='module')
def uninterrupted(workplace):
    pretrain.main(config_of(workplace, *LONG, f'output={workplace}/uninterrupted'))
    return workplace / 'uninterrupted'


def assert_same_run(a, b, steps=24):
    first, second = (load_checkpoint(folder / 'checkpoint.pt') for folder in (a, b))
    assert first.pop('config')['seed'] == second.pop('config')['seed']
    assert_equal(first, second)
    for name in ('backbone_init.pt', 'backbone.pt'):       # nothing of folder, process or machine is in them
        assert (a / name).read_bytes() == (b / name).read_bytes()
    losses = [{line['step']: line['loss'] for line in lines(folder)} for folder in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == steps


def test_killed_run_resumes_bit_exactly(workplace, uninterrupted, tmp_path):
    call = command(workplace, *LONG, f'output={tmp_path}')
    launcher = held('pretrain.py', 'step', 20)
    process = subprocess.Popen([*launcher, *call[1:], 'save_every_steps=1'], env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / 'checkpoint.pt', process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / 'backbone.pt').exists()
    again = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0 and 'resumed at step' in again.stdout, again.stderr
    assert_same_run(uninterrupted, tmp_path)


def signalled(call, number, folder, environment):
    """Start, send the signal after a logged step, wait: exit code, output, errors."""
    count = lambda: (folder / 'log.jsonl').exists() and (folder / 'log.jsonl').read_text().count('"loss"')  # noqa: E731
    done, begin = count(), time.time()
    process = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and count() <= done and time.time() - begin < 900:
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


@pytest.fixture
def slurm(tmp_path):
    """Environment of a Slurm job whose scontrol writes its arguments into a file."""
    fake = tmp_path / 'bin/scontrol'
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    fake.chmod(0o755)
    return {**ENVIRONMENT, 'SLURM_JOB_ID': '4711', 'PATH': f"{fake.parent}:{os.environ['PATH']}"}


def test_signals_save_leave_and_requeue(workplace, uninterrupted, tmp_path, slurm):
    """SIGUSR1, Slurm's warning, asks it for another turn; SIGTERM may be scancel and does not."""
    call = command(workplace, *LONG, f'output={tmp_path}', 'save_every_epochs=1000', 'requeue=true')
    for number in (signal.SIGTERM, signal.SIGUSR1):
        code, output, errors = signalled(call, number, tmp_path, slurm)
        assert code == StopSignal.exit_code, errors
        assert f'{number.name}: saved at step' in output and 'the same command resumes' in output
        assert not (tmp_path / 'backbone.pt').exists()
        assert (tmp_path / 'scontrol.txt').exists() == ('job 4711 is requeued' in output) == (number == signal.SIGUSR1)
    assert (tmp_path / 'scontrol.txt').read_text() == 'requeue 4711\n'
    pretrain.main(config_of(workplace, *LONG, f'output={tmp_path}', 'save_every_epochs=1000'))
    assert_same_run(uninterrupted, tmp_path)


def test_torchrun_hands_the_signal_on(workplace, tmp_path, slurm):
    """With the flags that the docstring names; one request to Slurm, not one per process."""
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                '--signals-to-handle', 'SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1', '--shutdown-timeout', '600')
    call = command(workplace, *LONG, f'output={tmp_path}', 'save_every_epochs=1000', 'requeue=true', launcher=launcher)
    code, output, errors = signalled(call, signal.SIGUSR1, tmp_path, slurm)
    assert code and 'SIGUSR1: saved at step' in output, errors
    assert (tmp_path / 'checkpoint.pt').exists() and (tmp_path / 'scontrol.txt').read_text() == 'requeue 4711\n'


def test_changed_config_is_refused_and_finished_run_says_so(workplace, uninterrupted, capsys):
    before = (uninterrupted / 'config.yaml').read_text()
    with pytest.raises(Fail, match=r'optimizer.weight_decay \(was 0.0001, now 0.5\)'):
        pretrain.main(config_of(workplace, *LONG, f'output={uninterrupted}', 'optimizer.weight_decay=0.5'))
    assert (uninterrupted / 'config.yaml').read_text() == before
    pretrain.main(config_of(workplace, *LONG, f'output={uninterrupted}', 'log_every=7'))  # bookkeeping may change
    assert 'finished' in capsys.readouterr().out


def test_a_run_of_before_there_was_view_generated_goes_on(workplace, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / 'run')
    saved = torch.load(tmp_path / 'run/checkpoint.pt', weights_only=True)
    del saved['config']['view_generated']
    torch.save(saved, tmp_path / 'run/checkpoint.pt')
    changes = *LONG, f'output={tmp_path}/run'
    pretrain.main(config_of(workplace, *changes))
    assert 'finished' in capsys.readouterr().out
    with pytest.raises(Fail, match=r'another config: view_generated.blur_prob \(was None, now 0.0\)\. Go back'):
        pretrain.main(config_of(workplace, *changes, 'view_generated.blur_prob=0'))


def test_view_generated_reaches_the_loader(workplace):
    recipes = pretrain.open_pairs(config_of(workplace, 'view_generated.blur_prob=0'), Processes('cpu')).recipes
    assert (recipes[0, :, augment.BLUR] == 0.5).all() and (recipes[1, :, augment.BLUR] == 0).all()
    assert (np.delete(recipes[0], augment.BLUR, 1) == np.delete(recipes[1], augment.BLUR, 1)).all()


# ---------------------------------------------------------------------------------------------------
# Quality, precision, divergence

def test_quality_weights_reach_the_loss(workplace, tmp_path):
    plain = config_of(workplace, f'output={tmp_path}/off')
    pretrain.main(plain)
    pretrain.main(config_of(workplace, f'output={tmp_path}/on', 'quality.enabled=true', 'image_size=16',
                            f'quality.clip.model={workplace}/clip', f'quality.pc={workplace}/fg.npz'))
    off, on = lines(tmp_path / 'off'), lines(tmp_path / 'on')
    assert 'weight_mean' not in off[0] and off[0]['loss'] != on[0]['loss']
    assert on[0]['weight_mean'] == pytest.approx(1, abs=1e-5) and on[0]['weight_min'] < 1 < on[0]['weight_max']
    for key in ('step', 'epoch', 'lr', 'images_per_second', 'data_wait', 'feature_std_ratio', 'quality_min'):
        assert key in on[0]
    checkpoint = load_checkpoint(tmp_path / 'on/checkpoint.pt')
    without = load_checkpoint(tmp_path / 'off/checkpoint.pt')
    assert checkpoint['model'].keys() == without['model'].keys()  # no CLIP in it
    backbone = load_checkpoint(tmp_path / 'on/backbone.pt')
    assert backbone['arch'] == 'resnet18' and backbone['width'] == 8 and backbone['image_size'] == 16
    assert {'conv1.weight', 'layer4.1.bn2.running_var'} < set(backbone['state_dict'])
    assert not any(k.startswith(('fc', 'projector', 'module')) for k in backbone['state_dict'])
    start = load_checkpoint(tmp_path / 'on/backbone_init.pt')
    assert start['mean'] == backbone['mean'] and not torch.equal(
        start['state_dict']['conv1.weight'], backbone['state_dict']['conv1.weight'])


def test_bfloat16_trains(workplace, tmp_path):
    pretrain.main(config_of(workplace, f'output={tmp_path}', 'precision=bf16', 'backbone.arch=resnet50'))
    assert all(np.isfinite(line['loss']) for line in lines(tmp_path))
    backbone = load_checkpoint(tmp_path / 'backbone.pt')
    assert backbone['feature_dim'] == 256
    assert {v.dtype for v in backbone['state_dict'].values()} == {torch.float32, torch.int64}


def test_a_run_does_not_go_on_in_another_precision(workplace, tmp_path, monkeypatch):
    """`precision: auto` is another one on another machine."""
    pretrain.main(config_of(workplace, f'output={tmp_path}'))
    (tmp_path / 'backbone.pt').unlink()
    monkeypatch.setattr(pretrain, 'precision_dtype', lambda *_: torch.bfloat16)
    with pytest.raises(Fail, match='checkpoint.pt: was trained in float32, this device would go on in bfloat16'):
        pretrain.main(config_of(workplace, f'output={tmp_path}'))
    monkeypatch.undo()
    pretrain.main(config_of(workplace, f'output={tmp_path}'))
    assert (tmp_path / 'backbone.pt').is_file()


@pytest.mark.parametrize('every, message', [
    (1, r'step 6: .* not finite; the last good checkpoint is .*/checkpoint.pt \(step 5\)'),     # seen in the weights
    (None, r'step 7: .* not finite; the last good checkpoint is .*/checkpoint.pt \(step 4\)')])  # seen in the loss
def test_divergence_names_the_step_and_the_last_good_checkpoint(workplace, tmp_path, monkeypatch, every, message):
    monkeypatch.setattr(pretrain, 'learning_rate', lambda step, *_: 0.01 if step < 5 else float('inf'))
    with pytest.raises(Fail, match=message):
        pretrain.main(config_of(workplace, 'epochs=3', f'output={tmp_path}', f"save_every_steps={every or 'null'}",
                                'log_every=8'))
    state = load_checkpoint(tmp_path / 'checkpoint.pt')['model']
    assert all(v.isfinite().all() for v in state.values()) and not (tmp_path / 'backbone.pt').exists()


def test_divergence_before_the_first_checkpoint(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, 'learning_rate', lambda *_: 1e38)  # more than a config may ask for
    with pytest.raises(Fail, match=r'step \d: the loss or the weights are not finite; there is no checkpoint yet'):
        pretrain.main(config_of(workplace, f'output={tmp_path}'))


# ---------------------------------------------------------------------------------------------------
# What users get wrong

def test_checkpoint_of_another_method_is_refused(workplace, uninterrupted):
    with pytest.raises(Fail, match=r"made with another config: method \(was 'mocov2', now 'byol'\)"):
        pretrain.main(config_of(workplace, *LONG, f'output={uninterrupted}', 'method=byol'))
    pretrain.main(config_of(workplace, *LONG, f'output={uninterrupted}', 'byol.dim=8'))  # not looked at: no matter


def test_betons_with_other_fields_are_refused(workplace, tmp_path):
    from ffcv.fields import IntField
    from ffcv.writer import DatasetWriter
    DatasetWriter(str(tmp_path / 'other.beton'), {'label': IntField()}, num_workers=1).from_indexed_dataset([(1,)] * 4)
    sidecar = json.loads((workplace / 'pairs.beton.json').read_text())
    path = tmp_path / 'other.beton'
    path.with_name('other.beton.json').write_text(json.dumps(
        {**sidecar, 'fields': ['label'], 'bytes': path.stat().st_size, 'crc32': [0]}))
    with pytest.raises(Fail, match='its fields are label, not image, view, label') as error:
        pretrain.main(config_of(workplace, f'data.beton={path}', f'output={tmp_path}/out'))
    assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('change, message', [
    ('moco.queue=100', 'moco.queue: 100 is not a multiple of the 16 keys of a step; 96 is'),
    ('moco.bn_splits=3', 'moco.bn_splits: 3'), ('epochs=0', 'epochs: 0'),
    ('method=mocov', "method: 'mocov' is none of .*; did you mean 'mocov[23]'"),
    ('method=swav swav.queue=24', 'swav.queue: 24 is not a multiple of the 16 keys of a step; 32 is'),
    ('moco.negative_mixing=-1', 'moco.negative_mixing: -1'),
    ('method=nnclr nnclr.queue=24', 'nnclr.queue: 24 is not a multiple of the 16 keys of a step; 32 is'),
    ('method=nnclr nnclr.queue=0', 'nnclr.queue: 0'),
    ('method=simsiam simsiam.hidden=0', 'simsiam.hidden: 0'), ('method=byol byol.momentum=2', 'byol.momentum: 2'),
    ('method=swav swav.epsilon=0', 'swav.epsilon: 0'), ('optimizer.name=adam', "optimizer.name: 'adam' .* 'adamw'"),
    ('optimizer.clip_grad=-1', 'optimizer.clip_grad: -1'), ('small_crops.count=6', 'small_crops.count: mocov2 takes a'),
    ('accumulate=3', 'batch_size: 16 .* not a multiple of the 1 processes x 3'), ('accumulate=0', 'accumulate: 0'),
    ('accumulate=16 method=byol', 'batch_size: byol needs two samples'), ('knn.every=1', 'knn.train_beton: must name'),
    ('knn.every=1 knn.train_beton=HERE knn.test_beton=KNOWN', 'knn.k: 200 neighbours out of 64'),
    ('backbone.zero_init_residual=3', "'backbone.zero_init_residual' must be bool or null, not 3"),
    ('data.beton=[]', 'data.beton: must name'),
    ('image_size=33', 'image_size: views of 33 px from stored images of 16 px .*: set image_size=16, or'),
    ('backbone.arch=vit_small backbone.patch_size=7', 'patch_size: 7 pixels do not divide'),
    ('backbone.arch=vit_tiny', 'backbone.arch: .vit_tiny'),
    ('method=swav small_crops.count=2 swav.queue=16', 'small_crops.size: views of 96 px'),
    ('method=swav small_crops.count=2 small_crops.size=12 swav.queue=16 backbone.arch=vit_small backbone.patch_size=8',
     'small_crops.size: 12 is not a multiple of backbone.patch_size 8'),
    ('backbone.arch=resnet19', 'backbone.arch: .resnet19'), ('backbone.width=7', 'backbone.width: 7'),
    ('normalization=imagnet', 'normalization: .imagnet'), ('precision=fp8', 'precision: .fp8'),
    ('precision=fp16', 'needs a GPU'), ('output=', 'output: must name'), ('data.beton=', 'data.beton: must name'),
    ('optimizer.lr=-1', 'optimizer.lr: -1'), ('optimizer.warmup_epochs=2', 'optimizer.warmup_epochs: 2'),
    ('data.beton=missing.beton', 'missing.beton'), ('data.alpha=2', 'alpha'), ('batch_size=128', 'batch'),
    ('view_1.crop_scale=[2,1]', 'crop_scale'), ('data.swap=both', 'swap'), ('quality.enabled=true', 'quality.pc')])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    change = change.replace('HERE', f'{workplace}/pairs.beton').replace('KNOWN', f'{workplace}/known.beton')
    changes = [f'output={tmp_path}/out', 'moco.queue=128', *change.split(' ')]
    with pytest.raises(Fail, match=message) as error:
        pretrain.main(config_of(workplace, *changes))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_yaml_errors_are_one_line_and_exit_code_2(workplace):
    result = subprocess.run(command(workplace, 'optimiser.lr=1'), capture_output=True, text=True, timeout=900)
    assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
    assert "unknown key 'optimiser'; did you mean 'optimizer'?" in result.stderr
    with pytest.raises(Fail, match="'epochs' must be int"):
        config_of(workplace, 'epochs=many')
