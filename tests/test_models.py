"""models.py: the methods' initial state, schedules and steps against their papers' codes; one process against two."""
import atexit
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import models  # noqa: E402
import pretrain  # noqa: E402
from checkpoints import load_backbone, save_backbone  # noqa: E402
from config import Fail, load_config  # noqa: E402
from loss import info_nce_batch, nt_xent, quality_weights, sinkhorn, sup_con, swapped_prediction  # noqa: E402
from models import (BYOL, METHODS, NNCLR, VITS, MoCoV2, MoCoV3, SimCLR, SimSiam, SplitBatchNorm2d,  # noqa: E402
                    build_backbone, cosine, mixing, synchronize_batch_norm)
from vit import ViT  # noqa: E402

SMALL = ('backbone.arch=resnet18', 'backbone.stem=cifar', 'backbone.width=8', 'image_size=16', 'batch_size=8',
         'normalization=imagenet', 'epochs=4', 'optimizer.lr=0.05', 'output=out', 'data.beton=none')
TINY = {'mocov2': ('moco.dim=16', 'moco.queue=32', 'moco.momentum=0.9', 'moco.bn_splits=2'),
        'mocov3': ('mocov3.dim=16', 'mocov3.hidden=32', 'mocov3.momentum=0.9'),
        # residuals of zero: the steps of so small a network would otherwise enlarge rounding a thousandfold
        'byol': ('byol.dim=16', 'byol.hidden=32', 'byol.momentum=0.9', 'backbone.zero_init_residual=true'),
        'simsiam': ('simsiam.dim=32', 'simsiam.hidden=16'),
        'swav': ('swav.dim=16', 'swav.hidden=32', 'swav.prototypes=12', 'swav.queue=8', 'swav.queue_from_epoch=0',
                 'swav.freeze_prototypes=1', 'small_crops.count=2', 'small_crops.size=12'),
        'simclr': ('simclr.dim=16',), 'supcon': ('supcon.dim=16',), 'vicreg': ('vicreg.dim=32', 'vicreg.hidden=32'),
        'nnclr': ('nnclr.dim=16', 'nnclr.hidden=32', 'nnclr.queue=32', 'backbone.zero_init_residual=true')}
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def empty(tmp_path_factory):
    path = tmp_path_factory.mktemp('models') / 'empty.yaml'
    path.write_text('')
    return str(path)


def config_of(empty, method, *changes):
    return load_config(pretrain.DEFAULTS, [empty, *SMALL, *TINY[method], f'method={method}', *changes])


def views_of(config, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [config['image_size']] * 2 + [config['small_crops']['size']] * config['small_crops']['count']
    return [torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator) for size in sizes]


def labels_of(model, mine=slice(None)):
    return (torch.tensor([0, 1, 2, 0, 1, 1, 3, 0])[mine],) if model.labelled else ()


def steps(config, rank, world, weighted):
    """Two steps on the same global batches of 8 for any world, as pretrain.py makes them: losses, model, figures."""
    torch.manual_seed(0)
    model = pretrain.build_model(config, 2)
    model = synchronize_batch_norm(model, torch.device('cpu')) if model.sync_bn else model
    optimizer = pretrain.build_optimizer(model, config)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    losses = []
    for step in range(2):
        mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
        views = [view[mine] for view in views_of(config, 8, step)]
        weights = quality_weights(torch.linspace(-1, 1, 8)[mine]) if weighted else 1.0
        for group in optimizer.param_groups:
            group['lr'] = config['optimizer']['lr']
        model.before_step(step)
        loss, extra, figures = wrapped(views, step, step == 1, *labels_of(model, mine))
        assert loss.shape == (8 // world,) and extra.shape == () and bool(figures) == (step == 1)
        optimizer.zero_grad()
        total = (loss * weights).mean() + extra
        total.backward()
        for parameter in model.frozen(step):
            parameter.grad = None
        optimizer.step()
        model.after_step(step)
        losses.append(pretrain.global_mean(total.detach().clone()))
    return losses, model, {key: pretrain.global_mean(value) for key, value in figures.items()}


# ---------------------------------------------------------------------------------------------------
# One process and two

def _both(rank, world, configs, folder):
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=world)
        atexit.register(dist.destroy_process_group)
    for name, config in configs.items():
        for weighted in (False, True):
            losses, model, figures = steps(config, rank, world, weighted)
            pretrain.average_running_statistics(model)
            torch.save({'losses': losses, 'figures': figures, 'state': model.state_dict()},
                       f'{folder}/{name}.{weighted}.{world}.{rank}')


@pytest.fixture(scope='module')
def both(empty, tmp_path_factory):
    """All methods in one pair of processes."""
    folder = tmp_path_factory.mktemp('both')
    configs = {method: config_of(empty, method) for method in METHODS}
    # residuals of zero: otherwise one activation that rounding puts on the other side of a ReLU moves weights by 0.01
    configs['mixed'] = config_of(empty, 'simclr', 'simclr.negative_mixing=1.6')
    configs['mixed queue'] = config_of(empty, 'mocov2', 'moco.negative_mixing=1.6', 'backbone.zero_init_residual=true')
    configs['symmetric'] = config_of(empty, 'mocov2', 'moco.symmetric=true', 'backbone.zero_init_residual=true')
    _both(0, 1, configs, folder)
    mp.spawn(_both, (2, configs, folder), nprocs=2)
    return folder


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('method', [*METHODS, 'mixed', 'mixed queue', 'symmetric'])
def test_two_processes_make_the_steps_of_one(both, method, weighted):
    """Batch norm, negatives, codes, queues, statistics, weights and the mean over samples are of the global batch.

    Rounding: SwAV divides by 0.05 and normalises few numbers; a permutation of the batch does as much to it."""
    tolerance = 0.01 if method == 'swav' else 5e-4
    one, two, other = (torch.load(both / f'{method}.{weighted}.{name}', weights_only=True)
                       for name in ('1.0', '2.0', '2.1'))
    assert one['losses'] == pytest.approx(two['losses'], rel=1e-4, abs=1e-5)
    for key in one['figures']:
        assert one['figures'][key] == pytest.approx(two['figures'][key], abs=1e-5)
    assert one['state'].keys() == two['state'].keys()
    for key, value in one['state'].items():
        scale = value.float().abs().max().item()
        assert torch.allclose(value.float(), two['state'][key].float(), rtol=0, atol=tolerance * scale + 1e-6), key
        if not key.endswith(('running_mean', 'running_var')):
            assert torch.equal(two['state'][key], other['state'][key]), key  # the processes never drift apart
    plain = torch.load(both / f'{method}.{not weighted}.1.0', weights_only=True)
    assert plain['losses'] != one['losses']


@pytest.mark.parametrize('method', METHODS)
def test_half_precision_gives_float32_losses_near_those_of_float32(empty, method):
    config, results = config_of(empty, method), []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = pretrain.build_model(config, 2)
        model.before_step(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            loss, extra, _ = model(views_of(config, 8), 0, False, *labels_of(model))
        (loss.mean() + extra).backward()
        assert loss.dtype == torch.float32
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        results.append((loss.mean() + extra).item())
    assert results[0] == pytest.approx(results[1], rel=0.1)


# ---------------------------------------------------------------------------------------------------
# Initial state

def on_meta(method, arch='resnet50', **settings):
    with torch.device('meta'):
        return METHODS[method]({'arch': arch}, **settings)


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('method, arch, expected', [
    # backbones: torchvision's 25,557,032 and DeiT-S's 22,050,664, DeiT-B's 86,567,656 without their classifiers
    ('mocov2', 'resnet50', (23_508_032, 2048 * 2049 + 2049 * 128, 0)),
    ('mocov3', 'resnet50', (23_508_032, 2048 * 4096 + 2 * 4096 + 4096 * 256, 256 * 4096 + 2 * 4096 + 4096 * 256)),
    ('mocov3', 'vit_small', (21_665_664, 384 * 4096 + 4096 ** 2 + 4 * 4096 + 4096 * 256, 2 * 256 * 4096 + 2 * 4096)),
    ('mocov3', 'vit_base', (85_798_656, 768 * 4096 + 4096 ** 2 + 4 * 4096 + 4096 * 256, 2 * 256 * 4096 + 2 * 4096)),
    ('byol', 'resnet50', (23_508_032, 2049 * 4096 + 2 * 4096 + 4096 * 256, 257 * 4096 + 2 * 4096 + 4096 * 256)),
    # the whole SimSiam: 38,201,408 in the official code
    ('simsiam', 'resnet50', (23_508_032, 3 * 2048 ** 2 + 4 * 2048 + 2048, 2048 * 512 + 2 * 512 + 513 * 2048)),
    ('swav', 'resnet50', (23_508_032, 2049 * 2048 + 2 * 2048 + 2049 * 128, 0)),
    ('simclr', 'resnet50', (23_508_032, 2048 ** 2 + 2 * 2048 + 2048 * 128 + 2 * 128, 0)),
    ('supcon', 'resnet50', (23_508_032, 2048 * 2049 + 2049 * 128, 0)),
    ('vicreg', 'resnet50', (23_508_032, 2049 * 8192 + 8193 * 8192 + 4 * 8192 + 8192 ** 2, 0)),
    ('nnclr', 'resnet50', (23_508_032, 2 * 2049 * 2048 + 4 * 2048 + 2049 * 256 + 2 * 256,
                           257 * 4096 + 2 * 4096 + 4097 * 256))])
def test_number_of_parameters(method, arch, expected):
    model = on_meta(method, arch, **{'norm': False} if method == 'supcon' else {})
    assert (size(model.backbone), size(model.projector), size(getattr(model, 'predictor', nn.Identity()))) == expected
    if method == 'simsiam':
        assert size(model) == 38_201_408
    if method == 'swav':
        assert size(model.prototypes) == 3000 * 128


def kinds(module):
    """Layers as text: L linear, with b bias; N norm, with s scale and b bias that learn."""
    text = []
    for layer in module:
        if isinstance(layer, nn.Linear):
            text.append('L' + 'b' * (layer.bias is not None and layer.bias.requires_grad))
        elif isinstance(layer, nn.BatchNorm1d):
            text.append('N' + ('s' + 'b' * layer.bias.requires_grad if layer.affine else ''))
        elif isinstance(layer, nn.ReLU):
            text.append('R')
    return ' '.join(text)


@pytest.mark.parametrize('method, arch, projector, predictor', [
    ('mocov2', 'resnet50', 'Lb R Lb', ''), ('mocov3', 'resnet50', 'L Nsb R L N', 'L Nsb R L'),
    ('mocov3', 'vit_small', 'L Nsb R L Nsb R L N', 'L Nsb R L N'), ('byol', 'resnet50', 'Lb Nsb R L', 'Lb Nsb R L'),
    ('simsiam', 'resnet50', 'L Nsb R L Nsb R L N', 'L Nsb R Lb'), ('swav', 'resnet50', 'Lb Nsb R Lb', ''),
    ('simclr', 'resnet50', 'L Nsb R L Ns', ''), ('vicreg', 'resnet50', 'Lb Nsb R Lb Nsb R L', ''),
    ('nnclr', 'resnet50', 'Lb Nsb R Lb Nsb R Lb Nsb', 'Lb Nsb R Lb')])
def test_heads_are_those_of_the_official_codes(method, arch, projector, predictor):
    model = on_meta(method, arch)
    assert kinds(model.projector) == projector and kinds(getattr(model, 'predictor', [])) == predictor
    if hasattr(model, 'momentum_projector'):
        assert not any(p.requires_grad for p in (*model.momentum_backbone.parameters(),
                                                 *model.momentum_projector.parameters()))


def test_simclr_of_cop_gen_has_no_batch_norm_in_its_head():
    assert kinds(on_meta('simclr', norm=False).projector) == 'Lb R Lb'
    assert kinds(on_meta('simclr', layers=3).projector) == 'L Nsb R L Nsb R L Ns'


@pytest.mark.parametrize('arch, last', [('resnet18', 'bn2'), ('resnet50', 'bn3')])
def test_zero_residuals_follow_the_method_unless_said(arch, last):
    backbone = {'arch': arch, 'stem': 'cifar', 'width': 8}
    starts = {name: getattr(METHODS[name](backbone, **small).backbone.layer2[1], last).weight.sum().item()
              for name, small in (('mocov2', {'queue': 4}), ('mocov3', {'hidden': 8}), ('byol', {'hidden': 8}),
                                  ('simsiam', {'dim': 8}), ('swav', {}), ('simclr', {}),
                                  ('vicreg', {'hidden': 8, 'dim': 8}))}
    zero = {'mocov3', 'simsiam', 'simclr', 'vicreg'} | ({'byol'} if last == 'bn3' else set())  # haiku: bottlenecks only
    assert {name for name, total in starts.items() if total == 0} == zero
    for said in (True, False):
        model = SimSiam({**backbone, 'zero_init_residual': said}, dim=8)
        assert (getattr(model.backbone.layer2[1], last).weight.sum() == 0) == said


def test_initialisation_of_the_heads():
    torch.manual_seed(0)
    backbone = {'arch': 'resnet18', 'stem': 'cifar', 'width': 8}
    byol = BYOL(backbone, hidden=1024)
    assert byol.projector[0].weight.std().item() == pytest.approx(0.88 / 8, rel=0.02)   # truncated at two std
    assert byol.projector[0].weight.abs().max() <= 2 / 8 and not byol.projector[0].bias.any()
    assert not torch.equal(byol.projector[0].weight, byol.momentum_projector[0].weight)  # a draw of its own
    assert SimCLR(backbone).projector[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    moco = MoCoV3(backbone, hidden=64)
    assert torch.equal(moco.projector[0].weight, moco.momentum_projector[0].weight)


def test_vit_is_that_of_moco_v3():
    torch.manual_seed(0)
    small, base = ViT('vit_small'), on_meta('mocov3', 'vit_base').backbone
    assert small.blocks[0].attn.num_heads == base.blocks[0].attn.num_heads == 12 and small.feature_dim == 384
    trained = {name for name, p in small.named_parameters() if p.requires_grad}
    assert not trained & {'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'} and 'cls_token' in trained
    assert small.pos_embed.shape == (1, 197, 384) and not small.pos_embed[0, 0].any()
    for row, column in ((0, 0), (3, 5), (13, 13)):          # facebookresearch/moco-v3 vits.py
        omega = 1 / 10_000 ** (torch.arange(96) / 96)
        expected = torch.cat([(row * omega).sin(), (row * omega).cos(), (column * omega).sin(), (column * omega).cos()])
        assert torch.allclose(small.pos_embed[0, 1 + 14 * row + column], expected, atol=1e-5)
    for weight, bound in ((small.patch_embed.proj.weight, math.sqrt(6 / (768 + 384))),
                          (small.blocks[3].attn.qkv.weight, math.sqrt(6 / (384 + 384))),
                          (small.blocks[3].mlp.fc1.weight, math.sqrt(6 / (384 + 1536)))):
        assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.01)
    assert not small.blocks[3].attn.qkv.bias.any() and small.norm.eps == 1e-6


# ---------------------------------------------------------------------------------------------------
# Mechanics of MoCo v2

def pair(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(2)]


def moco(**changes):
    torch.manual_seed(0)
    return MoCoV2({'arch': 'resnet18', 'stem': 'cifar', 'width': 8},
                  **{'dim': 16, 'queue': 32, 'momentum': 0.9, 'bn_splits': 2, **changes})


def test_batch_norms_that_hold_their_activation_keep_it(monkeypatch):
    monkeypatch.setattr(models, 'world_size', lambda: 2)
    network = timm.create_model('tf_efficientnet_lite0', num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = network(images)
    with pytest.raises(Fail, match='BatchNormAct2d of this network cannot be trained by several processes on CPUs'):
        synchronize_batch_norm(network, torch.device('cpu'))
    network = synchronize_batch_norm(network, torch.device('cuda'))
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert torch.allclose(network(images), expected, atol=1e-5) and expected.abs().max() > 0


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
    model, (images, _) = moco(), pair(8)
    model.eval()  # batch norm does not look at the neighbours: shuffling must not change anything
    orders = [torch.arange(8), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])]
    plain, shuffled = (model.keys(images, order) for order in orders)
    assert torch.allclose(plain, shuffled, atol=1e-6)
    model.train()
    assert not torch.allclose(model.keys(images, orders[0]), model.keys(images, orders[1]), atol=1e-4)


def test_top1_of_keys_that_are_told_by_their_age():
    """All keys of a batch alike, but newer than the queue's: nearer than all of the queue, chance within the batch."""
    model = moco()
    drift = F.normalize(torch.ones(16, model.queue.shape[1]), dim=1)
    noise = 1e-4 * torch.randn(2, 16, model.queue.shape[1], generator=torch.Generator().manual_seed(0))
    found = model.figures(drift, F.normalize(drift + noise[0], dim=1))
    assert found['contrastive_top1'] == 1 and found['batch_top1'] <= 0.25 and found['feature_std'] < 1e-3
    images = F.normalize(1e4 * noise[0], dim=1)
    assert model.figures(images, images)['batch_top1'] == 1


def test_queue_and_momentum_encoder():
    model, views = moco(momentum=0.75), pair(16)
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(32))
    before = model.queue.clone()
    slow = [p.clone() for p in model.momentum_backbone.parameters()]
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter += 0.1
    model.before_step(0)
    loss, extra, figures = model(views, 0, look=True)
    assert loss.shape == (16,) and extra == 0 and 0 <= figures['contrastive_top1'] <= 1
    for old, new, fast in zip(slow, model.momentum_backbone.parameters(), model.backbone.parameters()):
        assert torch.allclose(new, 0.75 * old + 0.25 * fast, atol=1e-6) and not new.requires_grad
    # buffers are the momentum encoder's own: it saw other images
    assert not torch.equal(model.momentum_backbone.bn1.running_mean, model.backbone.bn1.running_mean)
    assert model.queue_pointer == 16 and torch.equal(model.queue[16:], before[16:])
    assert not torch.equal(model.queue[:16], before[:16])
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(32))
    model(views, 1)
    assert model.queue_pointer == 0
    loss.mean().backward()  # after the queue has moved on
    assert model.backbone.conv1.weight.grad.abs().sum() > 0


def test_symmetric_loss_is_the_sum_of_both_directions():
    view_1, view_2 = pair(8)
    both, model = moco(symmetric=True), moco()
    loss = both([view_1, view_2], 0)[0]
    queue = model.queue.clone()
    first = model([view_1, view_2], 0)[0]
    model.queue.copy_(queue)
    assert torch.allclose(loss, first + model([view_2, view_1], 0)[0], atol=1e-5)
    assert both.queue_pointer == 16


# ---------------------------------------------------------------------------------------------------
# Negative feature transformation

def test_mixing_is_one_beta_per_step_and_a_permutation():
    shares = [mixing(1.6, 3, step, 10)[0] for step in range(4000)]
    assert abs(np.mean(shares) - 0.5) < 0.015 and np.var(shares) == pytest.approx(1 / (4 * 2 * 1.6 + 4), rel=0.05)
    (share, partner), again = mixing(1.6, 3, 7, 10), mixing(1.6, 3, 7, 10)
    assert share == again[0] == shares[7] and torch.equal(partner, again[1])
    assert partner.sort()[0].equal(torch.arange(10)) and not partner.equal(mixing(1.6, 3, 8, 10)[1])
    assert share != mixing(1.6, 4, 7, 10)[0]


def test_negatives_are_mixed_and_nothing_else():
    views = pair(8)
    plain, mixed = moco(bn_splits=1), moco(bn_splits=1, negative_mixing=1.6)
    share, partner = mixing(1.6, 0, 5, 32)
    queue = share * plain.queue + (1 - share) * plain.queue[partner]
    loss = mixed(views, 5)[0]
    plain.queue.copy_(queue)
    assert torch.allclose(loss, plain(views, 5)[0], atol=1e-6)
    assert torch.equal(mixed.queue[:8], plain.queue[:8]) and torch.equal(mixed.queue[8:], moco().queue[8:])
    simclr = SimCLR({'arch': 'resnet18', 'stem': 'cifar', 'width': 8}, dim=16, negative_mixing=1.6)
    z1, z2 = F.normalize(simclr.projector(simclr.features(torch.cat(views))), dim=1).chunk(2)
    assert torch.allclose(simclr(views, 5)[0], 2 * nt_xent(z1, z2, 0.1, mixing(1.6, 0, 5, 16)), atol=1e-5)
    assert not torch.allclose(simclr(views, 5)[0], simclr(views, 6)[0], atol=1e-2)  # another draw


def test_loss_factor_of_simclr_is_that_of_the_mean():
    views, losses = pair(8), {}
    for factor in (None, 1.4286):
        torch.manual_seed(0)
        simclr = SimCLR({'arch': 'resnet18', 'stem': 'cifar', 'width': 8}, dim=16, loss_factor=factor)
        losses[factor] = simclr(views, 0)[0]
    assert torch.allclose(losses[1.4286], 1.4286 / 2 * losses[None], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------
# Steps and schedules

def test_momentum_goes_to_its_end_on_a_cosine():
    values = [cosine(0.99, 1.0, step, 100) for step in (0, 25, 50, 100)]
    assert values == pytest.approx([0.99, 1 - 0.01 * (math.cos(math.pi / 4) + 1) / 2, 0.995, 1.0], abs=1e-12)
    assert cosine(0.996, 0.996, 37, 100) == 0.996


@pytest.mark.parametrize('method, hook', [('mocov3', 'before_step'), ('byol', 'after_step')])
def test_momentum_encoder_follows_the_parameters_with_the_schedule(empty, method, hook):
    config = config_of(empty, method)
    model = pretrain.build_model(config, 2)                # 4 epochs of 2 steps
    slow = [p.clone() for p in model.momentum_projector.parameters()]
    statistics = model.momentum_backbone.bn1.running_mean.clone()
    with torch.no_grad():
        for parameter in (*model.backbone.parameters(), *model.projector.parameters()):
            parameter += 0.1
    getattr(model, {'before_step': 'after_step', 'after_step': 'before_step'}[hook])(6)
    assert all(torch.equal(a, b) for a, b in zip(slow, model.momentum_projector.parameters()))
    getattr(model, hook)(6)
    momentum = 1 - 0.1 * (math.cos(math.pi * 6 / 8) + 1) / 2
    for old, new, fast in zip(slow, model.momentum_projector.parameters(), model.projector.parameters()):
        assert torch.allclose(new, momentum * old + (1 - momentum) * fast, atol=1e-6)
    assert torch.equal(statistics, model.momentum_backbone.bn1.running_mean)


def test_moco_v3_is_symmetric_and_scaled_by_its_temperature(empty):
    config = config_of(empty, 'mocov3', 'mocov3.temperature=0.2')
    torch.manual_seed(0)
    model, views = pretrain.build_model(config, 2), views_of(config, 8)
    loss, _, figures = model(views, 0, True)
    q1, q2 = (F.normalize(model.predictor(model.projector(model.features(v))), dim=1) for v in views)
    k1, k2 = (F.normalize(model.target(v), dim=1) for v in views)
    expected = 0.4 * (info_nce_batch(q1, k2, 0.2) + info_nce_batch(q2, k1, 0.2))
    assert torch.allclose(loss, expected, atol=1e-5)
    assert figures['contrastive_top1'] == ((q1 @ k2.T).argmax(1) == torch.arange(8)).float().mean()


def test_predictor_keeps_its_learning_rate(empty):
    for method, fixed in (('simsiam', True), ('byol', False), ('mocov3', False)):
        config = config_of(empty, method)
        model = pretrain.build_model(config, 2)
        groups = pretrain.build_optimizer(model, config).param_groups
        alone = [id(p) for group in groups if group['fixed_lr'] for p in group['params']]
        assert alone == [id(p) for p in model.predictor.parameters()] * fixed
    config = config_of(empty, 'byol', 'byol.fix_predictor_lr=true')
    assert len(pretrain.build_optimizer(pretrain.build_model(config, 2), config).param_groups) == 2


def test_swav_freezes_normalises_and_queues(empty, monkeypatch):
    config = config_of(empty, 'swav', 'swav.queue=16', 'swav.queue_from_epoch=1', 'swav.freeze_prototypes=2')
    torch.manual_seed(0)
    model = pretrain.build_model(config, 2)                # 2 steps an epoch: the queue begins at step 2
    with torch.no_grad():
        model.prototypes.weight *= 3
    model.before_step(0)
    assert torch.allclose(model.prototypes.weight.norm(dim=1), torch.ones(12))
    assert [len(list(model.frozen(step))) for step in (0, 1, 2)] == [1, 1, 0]
    held, rows = [], []
    monkeypatch.setattr(models, 'sinkhorn', lambda scores, *a: rows.append(len(scores)) or sinkhorn(scores, *a))
    for step in range(6):
        before = model.queue.clone()
        model(views_of(config, 8, step), step)
        held.append(model.queue[:, :, 0].count_nonzero().item())
        assert torch.equal(model.queue[:, 8:], before[:, :8]) == (step >= 2 or not model.queue.any())
    assert held == [0, 0, 16, 32, 32, 32]
    assert rows == [8, 8] * 4 + [24, 24] * 2  # both crops use the queue from the step on at whose start it was full
    assert torch.allclose(model.queue.norm(dim=2), torch.ones(2, 16), atol=1e-5)


def test_swav_predicts_the_codes_of_a_large_crop_from_all_other_crops(empty):
    config = config_of(empty, 'swav', 'swav.queue=0')
    torch.manual_seed(0)
    model, views = pretrain.build_model(config, 2), views_of(config, 8)
    loss, _, figures = model(views, 0, True)
    features = torch.cat([model.features(torch.cat(views[:2])), model.features(torch.cat(views[2:]))])
    scores = model.prototypes(F.normalize(model.projector(features), dim=1)).view(4, 8, -1)
    codes = []
    for large in scores[:2].detach():
        q = torch.exp(large / 0.05).T                      # facebookresearch/swav distributed_sinkhorn
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * len(q)
            q /= q.sum(0, keepdim=True) * q.shape[1]
        codes.append((q * q.shape[1]).T)
    terms = [swapped_prediction(scores[v], codes[crop], 0.1) for crop in (0, 1) for v in range(4) if v != crop]
    expected = sum(terms) / 6
    assert torch.allclose(loss, expected, atol=1e-4)
    assert 0 <= figures['assignment_entropy'] <= 1
    assert model.figures(torch.ones(8, 16), torch.eye(1, 12).repeat(8, 1))['assignment_entropy'] == 0
    assert model.figures(torch.ones(8, 16), torch.eye(12)[:8])['assignment_entropy'] == pytest.approx(1)


def test_supcon_takes_all_views_of_the_label_as_positives(empty):
    model, views = pretrain.build_model(config_of(empty, 'supcon'), 2), pair(8)
    assert kinds(model.projector) == 'Lb R Lb' and model.backbone.layer2[1].bn2.weight.all()
    z1, z2 = F.normalize(model.projector(model.features(torch.cat(views))), dim=1).chunk(2)
    labels = torch.tensor([5, 0, 5, 2, 0, 1, 5, 3])
    assert torch.allclose(model(views, 0, False, labels)[0], sup_con(z1, z2, labels, 0.1) / 0.7, atol=1e-4)
    alone = model(views, 0, False, torch.arange(8))[0]         # a positive each: SimCLR's loss, but for the factor
    assert torch.allclose(alone, nt_xent(z1, z2, 0.1) / 0.7, atol=1e-4)


def test_vicreg_keeps_the_weights_off_variance_and_covariance(empty):
    config = config_of(empty, 'vicreg')
    torch.manual_seed(0)
    model, views = pretrain.build_model(config, 2), views_of(config, 8)
    loss, extra, _ = model(views, 0)
    z1, z2 = (model.projector(model.features(v)) for v in views)
    assert torch.allclose(loss, 25 * (z1 - z2).square().mean(1), rtol=1e-4)
    variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2 for z in (z1, z2))
    covariance = sum((torch.cov(z.T) - torch.diag(z.var(0))).square().sum() / 32 for z in (z1, z2))
    assert extra.item() == pytest.approx((25 * variance + covariance).item(), rel=1e-4)


def test_nnclr_looks_neighbours_up_before_the_batch_joins_and_wraps():
    torch.manual_seed(0)
    model = NNCLR({'arch': 'resnet18', 'stem': 'cifar', 'width': 8}, dim=16, hidden=32, queue=24)
    queue = model.queue.clone()
    for step in range(5):                                  # 40 projections through a queue of 24
        views = pair(8, step)
        loss, extra, figures = model(views, step, True)
        z1, z2 = (model.projector(model.features(v)) for v in views)
        p1, p2 = (F.normalize(model.predictor(z), dim=1) for z in (z1, z2))
        expected = 0
        for z, p in ((z1, p2), (z2, p1)):
            z = F.normalize(z.detach(), dim=1)
            near = torch.stack([queue[(queue - row).norm(dim=1).argmin()] for row in z])
            expected = expected - torch.log_softmax(near @ p.T / 0.1, 1).diagonal() / 2
        assert torch.allclose(loss, expected, atol=1e-4) and extra == 0
        ours, theirs = (torch.autograd.grad(x.mean(), model.backbone.conv1.weight)[0] for x in (loss, expected))
        assert torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max())
        for row, new in enumerate(F.normalize(z1.detach(), dim=1)):
            queue[(8 * step + row) % 24] = new
        assert torch.allclose(model.queue, queue, atol=1e-5) and model.queue_pointer == (8 * step + 8) % 24
        assert not model.queue.requires_grad and 0 <= figures['contrastive_top1'] <= 1


def test_a_step_of_nnclr_has_the_numbers_of_solo_learn():
    """Weights, queue and images are waves: no random number. The numbers are what its code gives with them."""
    def wave(shape, frequency):
        return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * frequency).float().view(shape)

    model = NNCLR({'arch': 'resnet18', 'stem': 'cifar', 'width': 8}, dim=16, hidden=32, queue=32)
    for k, p in enumerate(model.parameters()):
        p.data = wave(p.shape, 1 + 0.37 * k) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1)
    model.queue.copy_(F.normalize(wave((32, 16), 0.7), dim=1))
    views = [(127.5 * (1 + wave((8, 3, 16, 16), frequency))).to(torch.uint8) for frequency in (0.311, 0.173)]
    loss = model(views, 0)[0].mean()
    loss.backward()
    found = [loss, *(w.grad.norm() for w in (model.backbone.conv1.weight, model.projector[0].weight,
                                             model.predictor[3].weight))]
    assert [x.item() for x in found] == pytest.approx([2.11143, 28.5285, 8.26904, 0.715255], rel=1e-3)


# ---------------------------------------------------------------------------------------------------
# Optimizers

def test_lars_is_that_of_the_official_codes(empty):
    """Against facebookresearch/moco-v3's formula. timm (as apex and mmselfsup) divides by |g| + wd |w|, MoCo v3 by
    |g + wd w|: with the weight decays in use, around 1e-6, the two agree."""
    config = config_of(empty, 'byol', 'optimizer.name=lars', 'optimizer.weight_decay=1e-6')
    torch.manual_seed(0)
    model = pretrain.build_model(config, 2)
    optimizer = pretrain.build_optimizer(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = [p.detach().clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in range(3):
        for group in optimizer.param_groups:
            group['lr'] = 0.3
        for p in parameters:
            p.grad = torch.randn_like(p)
        for p, w, mu in zip(parameters, expected, momenta):
            update = p.grad.clone()
            if p.ndim > 1:
                update += 1e-6 * w
                if w.any():
                    update *= 0.001 * w.norm() / update.norm()
            w.sub_(0.3 * mu.mul_(0.9).add_(update))
        optimizer.step()
    assert all(torch.allclose(p, w, rtol=1e-4, atol=1e-5) for p, w in zip(parameters, expected))


@pytest.mark.parametrize('method, name, exclude, expected', [
    ('mocov2', 'sgd', 'null', False), ('mocov3', 'adamw', 'null', False), ('byol', 'lars', 'null', True),
    ('swav', 'lars', 'null', False), ('swav', 'lars', 'true', True), ('vicreg', 'lars', 'false', False)])
def test_norms_and_biases_are_excluded_as_in_the_official_codes(empty, method, name, exclude, expected):
    config = config_of(empty, method, f'optimizer.name={name}', f'optimizer.exclude_1d={exclude}')
    model = pretrain.build_model(config, 2)
    groups = pretrain.build_optimizer(model, config).param_groups
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(len(group['params']) for group in groups) == len(trained)
    plain = {id(p) for group in groups if group['weight_decay'] == 0 for p in group['params']}
    assert plain == ({id(p) for p in trained if p.ndim <= 1} if expected else set())
    if name == 'lars':
        assert all(group['always_adapt'] == (group['weight_decay'] > 0) for group in groups)


# ---------------------------------------------------------------------------------------------------
# Files

def test_exported_vit_comes_back_and_takes_other_sizes(empty, tmp_path, monkeypatch):
    monkeypatch.setitem(VITS, 'vit_small', 48)
    config = config_of(empty, 'mocov3', 'backbone.arch=vit_small', 'backbone.patch_size=8')
    torch.manual_seed(0)
    model = pretrain.build_model(config, 2).eval()
    save_backbone(tmp_path / 'backbone.pt', model.backbone, config, (0.5,) * 3, (0.25,) * 3)
    module, info = load_backbone(tmp_path / 'backbone.pt')
    assert (info['arch'], info['patch_size'], info['image_size'], info['feature_dim']) == ('vit_small', 8, 16, 48)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(module(images), model.backbone(images)) and module(images).shape == (2, 48)
        assert module(torch.randn(2, 3, 24, 24)).shape == (2, 48)
    assert torch.load(tmp_path / 'backbone.pt', weights_only=True)['heads'] == 12
    with pytest.raises(Fail, match='patch_size: 7 pixels do not divide the 16'):
        build_backbone('vit_small', patch_size=7, image_size=16)
