"""pretrain.py: MoCo v2's mechanics, one process against two, resuming, quality weights, and what users get wrong."""
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
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pretrain  # noqa: E402
from common import Fail, StopSignal, load_checkpoint, load_config  # noqa: E402
from data import write_beton  # noqa: E402
from loss import quality_weights  # noqa: E402
from models import MoCo, SplitBatchNorm2d  # noqa: E402

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = {'arch': 'resnet18', 'stem': 'cifar', 'width': 8}
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
# Mechanics of MoCo v2

def views(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(2)]


def moco(**changes):
    torch.manual_seed(0)
    return MoCo(SMALL, **{'dim': 16, 'queue': 32, 'momentum': 0.9, 'bn_splits': 2, **changes})


def test_split_batch_norm_is_one_batch_norm_per_part():
    x = torch.randn(12, 5, 4, 4)
    split = SplitBatchNorm2d(5, 3)
    nn.init.uniform_(split.weight)
    parts = [nn.BatchNorm2d(5) for _ in range(3)]
    for part in parts:
        part.load_state_dict(split.state_dict())
    expected = torch.cat([part(chunk) for part, chunk in zip(parts, x.chunk(3))])
    assert torch.allclose(split(x), expected, atol=1e-6)
    for name in ('running_mean', 'running_var'):
        assert torch.allclose(getattr(split, name), sum(getattr(p, name) for p in parts) / 3, atol=1e-6)
    assert split.num_batches_tracked == 1
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), plain.eval()(x))


def test_shuffled_keys_come_back_in_order():
    model, (images, _) = moco(), views(8)
    model.eval()  # batch norm does not look at the neighbours: shuffling must not change anything
    orders = [torch.arange(8), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])]
    plain, shuffled = (model.keys(images, order) for order in orders)
    assert torch.allclose(plain, shuffled, atol=1e-6)
    model.train()
    assert not torch.allclose(model.keys(images, orders[0]), model.keys(images, orders[1]), atol=1e-4)


def test_queue_and_momentum_encoder():
    model, (view_1, view_2) = moco(momentum=0.75), views(16)
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(32))
    before = model.queue.clone()
    slow = [p.clone() for p in model.momentum_backbone.parameters()]
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.1
    loss, figures = model(view_1, view_2, 0, look=True)
    assert loss.shape == (16,) and 0 <= figures['contrastive_top1'] <= 1
    for old, new, fast in zip(slow, model.momentum_backbone.parameters(), model.backbone.parameters()):
        assert torch.allclose(new, 0.75 * old + 0.25 * fast, atol=1e-6) and not new.requires_grad
    # buffers are the momentum encoder's own: it saw other images
    assert not torch.equal(model.momentum_backbone.bn1.running_mean, model.backbone.bn1.running_mean)
    assert model.queue_pointer == 16 and torch.equal(model.queue[16:], before[16:])
    assert not torch.equal(model.queue[:16], before[:16])
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(32))
    model(view_1, view_2, 1)
    assert model.queue_pointer == 0
    loss.mean().backward()  # after the queue has moved on
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_symmetric_loss_is_the_sum_of_both_directions():
    view_1, view_2 = views(8)
    both, model = moco(symmetric=True), moco()
    loss = both(view_1, view_2, 0)[0]
    model.update_momentum_encoder = both.update_momentum_encoder = lambda: None
    queue = model.queue.clone()
    first = model(view_1, view_2, 0)[0]
    model.queue.copy_(queue)
    assert torch.allclose(loss, first + model(view_2, view_1, 0)[0], atol=1e-5)
    assert both.queue_pointer == 16


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = {'lr': 0.5, 'warmup_epochs': 2}
    rates = [pretrain.learning_rate(step, 5, 10, settings) for step in range(50)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == pytest.approx(0.5) and rates[10] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0.25) and all(a >= b for a, b in zip(rates[9:], rates[10:])) and rates[-1] < 0.001


# ---------------------------------------------------------------------------------------------------
# One process and two

def _steps(rank, world, folder):
    """Loss, gradient, queue and running statistics of one weighted step on the same global batch of 16."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
    for symmetric in (False, True):
        _one_step(rank, world, symmetric, f'{folder}/{symmetric}.{world}.{rank}')
    if world > 1:
        dist.destroy_process_group()


def _one_step(rank, world, symmetric, path):
    model = moco(symmetric=symmetric)
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    view_1, view_2 = (v[mine] for v in views(16))
    quality = torch.linspace(-1, 1, 16)[mine]
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    loss = (wrapped(view_1, view_2, 7)[0] * quality_weights(quality)).mean()
    loss.backward()
    pretrain.average_running_statistics(model)
    total = pretrain.global_mean(loss.detach().clone())
    torch.save({'loss': total, 'buffers': dict(model.named_buffers()),
                'gradients': {k: p.grad for k, p in model.named_parameters() if p.grad is not None}}, path)


@pytest.fixture(scope='module')
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp('steps')
    _steps(0, 1, folder)
    mp.spawn(_steps, (2, folder), nprocs=2)
    return folder


@pytest.mark.parametrize('symmetric', [False, True])
def test_two_processes_make_the_step_of_one(steps, symmetric):
    """Batch norm groups, shuffling between them, queue, quality weights and DDP's mean: all of the global batch."""
    one, two, other = (torch.load(steps / f'{symmetric}.{name}', weights_only=True) for name in ('1.0', '2.0', '2.1'))
    assert one['loss'] == pytest.approx(two['loss'], rel=1e-5)
    assert torch.equal(two['buffers']['queue'], other['buffers']['queue'])  # queues never drift apart
    for kind in ('gradients', 'buffers'):
        assert one[kind].keys() == two[kind].keys()
        for key, value in one[kind].items():
            scale = value.abs().max().item() + 1e-6
            assert torch.allclose(value, two[kind][key], rtol=1e-4, atol=1e-4 * scale), key


def test_torchrun_trains_as_one_process(workplace, tmp_path):
    """The whole stage with its loader. Rounding grows from step to step, so the first ones are compared."""
    changes = ['quality.enabled=true', f'quality.clip.model={workplace}/clip', f'quality.pc={workplace}/fg.npz']
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


# ---------------------------------------------------------------------------------------------------
# Resuming

LONG = ('epochs=6', 'optimizer.lr=0.1', 'optimizer.warmup_epochs=1')  # 24 steps


@pytest.fixture(scope='module')
def uninterrupted(workplace):
    pretrain.main(config_of(workplace, *LONG, f'output={workplace}/uninterrupted'))
    return workplace / 'uninterrupted'


def assert_same_run(a, b):
    first, second = (load_checkpoint(folder / 'checkpoint.pt') for folder in (a, b))
    assert first.pop('config')['seed'] == second.pop('config')['seed']
    assert_equal(first, second)
    assert_equal(*(load_checkpoint(folder / 'backbone.pt') for folder in (a, b)))
    losses = [{line['step']: line['loss'] for line in lines(folder)} for folder in (a, b)]
    assert losses[0] == losses[1] and len(losses[0]) == 24


def test_killed_run_resumes_bit_exactly(workplace, uninterrupted, tmp_path):
    call = command(workplace, *LONG, f'output={tmp_path}')
    process = subprocess.Popen([*call, 'save_every_steps=1'], env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / 'checkpoint.pt', process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / 'backbone.pt').exists()
    again = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0 and 'resumed at step' in again.stdout, again.stderr
    assert_same_run(uninterrupted, tmp_path)


def test_signals_save_and_leave(workplace, uninterrupted, tmp_path):
    call = command(workplace, *LONG, f'output={tmp_path}', 'save_every_epochs=1000')
    for number in (signal.SIGTERM, signal.SIGUSR1):
        done = len(lines(tmp_path)) if (tmp_path / 'log.jsonl').exists() else 0
        process = subprocess.Popen(call, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begin = time.time()
        while process.poll() is None and time.time() - begin < 900:
            if (tmp_path / 'log.jsonl').exists() and (tmp_path / 'log.jsonl').read_text().count('"loss"') > done:
                break
            time.sleep(0.002)
        process.send_signal(number)
        output, errors = process.communicate(timeout=900)
        assert process.returncode == StopSignal.exit_code, errors
        assert f'{number.name}: saved at step' in output and 'the same command resumes' in output
        assert not (tmp_path / 'backbone.pt').exists()
    pretrain.main(config_of(workplace, *LONG, f'output={tmp_path}', 'save_every_epochs=1000'))
    assert_same_run(uninterrupted, tmp_path)


def test_changed_config_is_refused_and_finished_run_says_so(workplace, uninterrupted, capsys):
    before = (uninterrupted / 'config.yaml').read_text()
    with pytest.raises(Fail, match=r'optimizer.weight_decay \(was 0.0001, now 0.5\)'):
        pretrain.main(config_of(workplace, *LONG, f'output={uninterrupted}', 'optimizer.weight_decay=0.5'))
    assert (uninterrupted / 'config.yaml').read_text() == before
    pretrain.main(config_of(workplace, *LONG, f'output={uninterrupted}', 'log_every=7'))  # bookkeeping may change
    assert 'finished' in capsys.readouterr().out


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


def test_views_are_interpolated_to_the_encoder_and_component_must_fit(workplace, tmp_path):
    settings = {'clip': {'model': str(workplace / 'clip'), 'pretrained': None, 'image_size': None}, 'temperature': 1.0}
    quality = pretrain.Quality({**settings, 'pc': str(workplace / 'fg.npz')}, torch.device('cpu'))
    weights, values = quality(*(torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8) for _ in range(2)))
    assert weights.shape == values.shape == (4,) and weights.mean().item() == pytest.approx(1, abs=1e-5)
    np.save(tmp_path / 'published.npy', np.ones((32, 1)))
    pretrain.Quality({**settings, 'pc': str(tmp_path / 'published.npy')}, torch.device('cpu'))
    np.savez(tmp_path / 'narrow.npz', pc=np.ones(7))
    np.savez(tmp_path / 'other.npz', pc=np.ones(32), encoder='0123456789ab')
    np.savez(tmp_path / 'empty.npz', mean=np.ones(7))
    for name, message in (('narrow.npz', 'width 7, tokens of .* have 32'), ('other.npz', 'other weights'),
                          ('empty.npz', 'no principal component'), ('missing.npz', 'no such file')):
        with pytest.raises(Fail, match=message):
            pretrain.Quality({**settings, 'pc': str(tmp_path / name)}, torch.device('cpu'))


def test_bfloat16_trains(workplace, tmp_path):
    pretrain.main(config_of(workplace, f'output={tmp_path}', 'precision=bf16', 'backbone.arch=resnet50'))
    assert all(np.isfinite(line['loss']) for line in lines(tmp_path))
    backbone = load_checkpoint(tmp_path / 'backbone.pt')
    assert backbone['feature_dim'] == 256
    assert {v.dtype for v in backbone['state_dict'].values()} == {torch.float32, torch.int64}


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


def test_divergence_before_the_first_checkpoint(workplace, tmp_path):
    with pytest.raises(Fail, match=r'step \d: the loss or the weights are not finite; there is no checkpoint yet'):
        pretrain.main(config_of(workplace, f'output={tmp_path}', 'optimizer.lr=1e38'))


# ---------------------------------------------------------------------------------------------------
# What users get wrong

@pytest.mark.parametrize('change, message', [
    ('moco.queue=100', 'moco.queue: 100 is not a multiple of the 16 keys of a step; 96 is'),
    ('moco.bn_splits=3', 'moco.bn_splits: 3'), ('epochs=0', 'epochs: 0'), ('method=simclr', 'method: .simclr'),
    ('backbone.arch=resnet19', 'backbone.arch: .resnet19'), ('backbone.width=7', 'backbone.width: 7'),
    ('normalization=imagnet', 'normalization: .imagnet'), ('precision=fp8', 'precision: .fp8'),
    ('precision=fp16', 'needs a GPU'), ('output=', 'output: must name'), ('data.beton=', 'data.beton: must name'),
    ('optimizer.lr=-1', 'optimizer.lr: -1'), ('optimizer.warmup_epochs=2', 'optimizer.warmup_epochs: 2'),
    ('data.beton=missing.beton', 'missing.beton'), ('data.alpha=2', 'alpha'), ('batch_size=128', 'batch'),
    ('view_1.crop_scale=[2,1]', 'crop_scale'), ('data.swap=both', 'swap'), ('quality.enabled=true', 'quality.pc')])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    changes = [f'output={tmp_path}/out', 'moco.queue=128', change]
    with pytest.raises((Fail, ValueError), match=message) as error:
        pretrain.main(config_of(workplace, *changes))
    assert type(error.value).__name__ in ('Fail', 'DataError') and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_yaml_errors_are_one_line_and_exit_code_2(workplace):
    result = subprocess.run(command(workplace, 'optimiser.lr=1'), capture_output=True, text=True, timeout=900)
    assert result.returncode == 2 and result.stderr.count('\n') == 1, result.stderr
    assert "unknown key 'optimiser'; did you mean 'optimizer'?" in result.stderr
    with pytest.raises(Fail, match="'epochs' must be int"):
        config_of(workplace, 'epochs=many')


@pytest.mark.parametrize('path', sorted((ROOT / 'yamls/pretrain').glob('*.yaml')), ids=lambda p: p.name)
def test_experiments_that_ship_are_valid(path):
    config = load_config(pretrain.DEFAULTS, [str(path)])
    for world in (1, 2, 4, 8):
        pretrain.check(config, world)
    pretrain.normalization(config['normalization'])
