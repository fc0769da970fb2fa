"""load_backbone reads what others publish to the same features, refuses what it cannot know; export."""
import argparse
import copy
import gzip
import json
import re
import runpy
import resource
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from checkpoints import NORMALIZATIONS, export, load_backbone  # noqa: E402
from common import Processes, answered, earlier  # noqa: E402
from config import Fail  # noqa: E402
from files import atomic, load_checkpoint, save_checkpoint, save_json  # noqa: E402
from conftest import damages  # noqa: E402
from models import build_backbone  # noqa: E402
from vit import ViT  # noqa: E402

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
pytestmark = pytest.mark.usefixtures('one_thread')


def shaken(module):
    """Evaluation mode, batch norm statistics other than 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for name, buffer in module.named_buffers():
        if name.endswith(('running_mean', 'running_var')):
            buffer.uniform_(*((0.5, 1.5) if name.endswith('var') else (-0.2, 0.2)), generator=generator)
    return module.eval()


@pytest.fixture(scope='module')
def resnets():
    """Small networks by stem, and the features of two images."""
    torch.manual_seed(0)
    found = {}
    for stem in ('imagenet', 'cifar'):
        network = shaken(build_backbone('resnet18', stem, 8))
        images = torch.randn(2, 3, 64 if stem == 'imagenet' else 16, 64 if stem == 'imagenet' else 16)
        found[stem] = network, images, network(images)
    return found


@pytest.fixture(scope='module')
def vit():
    """A ViT-Ti of 8-pixel patches as timm makes it, and the features of two images."""
    torch.manual_seed(0)
    network = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    return network, images, network(images)


def loaded(path, content, images, features, **hints):
    """Write the file, read it back; the features must be those of its maker."""
    torch.save(content, path)
    module, info = load_backbone(path, **hints)
    assert not module.training and features.std() > 1e-3
    assert torch.allclose(module(images), features, atol=1e-5), (module(images) - features).abs().max()
    return info


def under(prefix, state):
    return {f'{prefix}{k}': v for k, v in state.items()}


def moved(state):
    """Another network with the same names."""
    return {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}


# ---------------------------------------------------------------------------------------------------
# ResNets

def test_ours(tmp_path, resnets):
    network, images, features = resnets['cifar']
    known = {'arch': 'resnet18', 'stem': 'cifar', 'width': 8, 'mean': MEAN, 'std': STD, 'image_size': 16}
    info = loaded(tmp_path / 'backbone.pt', {'state_dict': network.state_dict(), **known}, images, features)
    assert {k: info[k] for k in known} == known and info['feature_dim'] == 64 and info['note'] == ''
    config = {'backbone': {'arch': 'resnet18', 'stem': 'cifar', 'width': 8, 'patch_size': 16}, 'method': 'mocov2',
              'normalization': None, 'image_size': 16}
    model = {**under('backbone.', network.state_dict()), **under('momentum_backbone.', moved(network.state_dict())),
             'queue': torch.zeros(3, 4)}
    momentum = {'state': {0: {'momentum_buffer': torch.zeros(8, 3, 3, 3)}}}
    content = {'model': model, 'optimizer': momentum, 'config': config}
    info = loaded(tmp_path / 'checkpoint.pt', content, images, features)
    assert (info['mean'], info['std']) == NORMALIZATIONS['clip'] and info['image_size'] == 16
    assert info['patch_size'] is None and 'momentum_backbone' in info['note']


@pytest.mark.parametrize('arch, width', [('resnet18', 512), ('resnet50', 2048)])
def test_torchvision_and_timm_with_classifier(tmp_path, arch, width):
    images = torch.randn(1, 3, 64, 64)
    for source in (getattr(torchvision.models, arch)(), timm.create_model(arch)):
        state = shaken(source).state_dict()
        source.fc = nn.Identity()
        info = loaded(tmp_path / 'plain.pth', state, images, source(images))
        assert (info['arch'], info['stem'], info['width'], info['feature_dim']) == (arch, 'imagenet', 64, width)
        assert info['mean'] is None and 'fc.weight' in info['note']


RELEASES = {  # name: (what it writes, with names as in its code; what load_backbone says)
    'MoCo v1/v2': lambda s: {'epoch': 200, 'arch': 'resnet50', 'optimizer': {}, 'state_dict': {
        **under('module.encoder_q.', s), **under('module.encoder_k.', moved(s)), 'module.queue': torch.zeros(2, 3),
        'module.encoder_q.fc.0.weight': torch.zeros(2, 2), 'module.encoder_q.fc.2.bias': torch.zeros(2)}},
    'MoCo v3': lambda s: {'arch': 'resnet50', 'state_dict': {
        **under('module.base_encoder.', s), **under('module.momentum_encoder.', moved(s)),
        'module.base_encoder.fc.0.weight': torch.zeros(2, 2), 'module.predictor.0.weight': torch.zeros(2, 2)}},
    'SimSiam': lambda s: {'arch': 'resnet50', 'state_dict': {
        **under('module.encoder.', s), 'module.encoder.fc.6.bias': torch.zeros(2),
        'module.predictor.0.weight': torch.zeros(2, 2)}},
    'SwAV': lambda s: {**under('module.', s), 'module.projection_head.0.weight': torch.zeros(2, 2),
                       'module.prototypes.weight': torch.zeros(2, 2)},
    'VICReg': lambda s: {'epoch': 1, 'model': {**under('module.backbone.', s),
                                               'module.projector.0.weight': torch.zeros(2, 2)}},
    'BYOL': lambda s: {**under('net.', s), **under('online_encoder.net.', s),  # byol-pytorch
                       **under('target_encoder.net.', moved(s)), 'online_predictor.net.0.weight': torch.zeros(2, 2)},
    'VISSL': lambda s: {'phase_idx': 3, 'classy_state_dict': {'base_model': {'model': {
        'trunk': under('_feature_blocks.', s), 'heads': {'0.clf.weight': torch.zeros(2, 2)}}}}},
    'COP-Gen': lambda s: {'epoch': 100, 'model': {'head.0.weight': torch.zeros(2, 2), **under('encoder.module.', {
        re.sub('^conv1', 'stem.0', re.sub('^bn1', 'stem.1', k)).replace('downsample', 'shortcut'): v
        for k, v in s.items()})}},
    'mmpretrain': lambda s: {'meta': {'epoch': 100}, 'state_dict': {
        **under('backbone.', s), **under('momentum_encoder.module.0.', moved(s)), 'neck.fc0.weight': torch.zeros(2, 2),
        'clip_model.visual.trunk.stem.0.weight': torch.zeros(4, 3, 4, 4)}}}


@pytest.mark.parametrize('name', RELEASES)
def test_releases_of_resnets(tmp_path, resnets, name):
    network, images, features = resnets['imagenet']
    info = loaded(tmp_path / 'release.pth.tar', RELEASES[name](network.state_dict()), images, features)
    assert f'layout of {name}' in info['note'] and 'found under' in info['note']
    assert (info['arch'], info['stem'], info['width']) == ('resnet18', 'imagenet', 8)
    assert info['std'] == ([0.228, 0.224, 0.225] if name == 'SwAV' else None)  # what the official code learned with


def test_prefixes_compiled_safetensors_and_files_without_counters(tmp_path, resnets):
    network, images, features = resnets['imagenet']
    state = {k: v for k, v in network.state_dict().items() if not k.endswith('num_batches_tracked')}  # PyTorch < 0.4.1
    for prefix in ('module._orig_mod.', 'trunk.', 'backbone.', 'student.encoder.model.'):
        info = loaded(tmp_path / 'a.pth', {'network': under(prefix, state)}, images, features)
        assert f"found under 'network.{prefix}'" in info['note']
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / 'plain.safetensors')
    assert torch.equal(load_backbone(tmp_path / 'plain.safetensors')[0](images), features)


def test_children_of_a_resnet_lightly_and_pytorch_byol(tmp_path, resnets):
    for stem in ('imagenet', 'cifar'):
        network, images, features = resnets[stem]
        children = nn.Sequential(*list(network.children())[:-1]).state_dict()
        content = {'state_dict': {**under('backbone.', children), **under('backbone_momentum.', moved(children)),
                                  'projection_head.layers.0.weight': torch.zeros(2, 2)}}
        assert 'lightly' in loaded(tmp_path / 'lightly.ckpt', content, images, features)['note']
        content = {**under('online_network.encoder.', children), **under('target_network.encoder.', moved(children))}
        assert 'layout of BYOL' in loaded(tmp_path / 'byol.pth', content, images, features)['note']


def test_lightlys_own_resnet_has_no_relu_after_its_stem_when_it_is_a_sequence(tmp_path, resnets):
    network, images, _ = resnets['cifar']
    sequence = nn.Sequential(network.conv1, network.bn1, network.layer1, network.layer2, network.layer3, network.layer4,
                             nn.AdaptiveAvgPool2d(1), nn.Flatten())
    state = {k.replace('downsample', 'shortcut'): v for k, v in sequence.state_dict().items()}
    info = loaded(tmp_path / 'own.ckpt', {'state_dict': under('backbone.', state)}, images, sequence(images))
    assert info['stem'] == 'cifar (lightly)'


def test_solo_learns_stem_for_small_images_is_padded_by_two(tmp_path, resnets):
    network, images, features = copy.deepcopy(resnets['cifar'][0]), *resnets['cifar'][1:]
    network.conv1.padding = (2, 2)
    assert not torch.allclose(network(images), features)
    state = {**under('backbone.', network.state_dict()), **under('momentum_backbone.', moved(network.state_dict())),
             'classifier.weight': torch.zeros(2, 2), 'projector.0.weight': torch.zeros(2, 2)}
    info = loaded(tmp_path / 'solo.ckpt', {'pytorch-lightning_version': '2', 'state_dict': state}, images,
                  network(images))
    assert info['stem'] == 'cifar (solo-learn)' and 'layout of solo-learn' in info['note']


def test_mmengine_checkpoints_tell_their_normalisation_and_none_of_their_code_runs(tmp_path, resnets, monkeypatch):
    network, images, features = resnets['imagenet']
    module = types.ModuleType('mmengine.logging.history_buffer')
    module.HistoryBuffer = type('HistoryBuffer', (), {'__module__': module.__name__, '__setstate__': None})
    for name in ('mmengine', 'mmengine.logging', module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    buffer = module.HistoryBuffer()
    buffer.values = MEAN
    content = {'state_dict': under('backbone.', network.state_dict()), 'message_hub': {'log_scalars': {'loss': buffer}},
               'meta': {'cfg': 'lr = 1\ndata_preprocessor = dict(\n    mean=[\n        102.0,\n        127.5,\n'
                               '        153.0,\n    ],\n    std=[51.0, 63.75, 76.5],\n    to_rgb=True)\n'}}
    torch.save(content, tmp_path / 'epoch_100.pth')
    monkeypatch.undo()
    module, info = load_backbone(tmp_path / 'epoch_100.pth')
    assert torch.allclose(module(images), features) and info['mean'] == MEAN and info['std'] == STD


# ---------------------------------------------------------------------------------------------------
# ViTs and other networks

def test_vits_of_timm_torchvision_and_mmpretrain(tmp_path, vit):
    network, images, features = vit
    state = network.state_dict()
    info = loaded(tmp_path / 'timm.pth', {'model': {**state, 'head.weight': torch.zeros(9, 192)}}, images, features)
    assert (info['arch'], info['patch_size'], info['image_size'], info['heads']) == ('vit_tiny_patch16_224', 8, 32, 3)
    names = {'patch_embed.proj': 'patch_embed.projection', 'blocks.': 'layers.', 'norm1': 'ln1', 'norm2': 'ln2',
             'mlp.fc1': 'ffn.layers.0.0', 'mlp.fc2': 'ffn.layers.1'}
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[re.sub('^norm', 'ln1', key)] = value
    info = loaded(tmp_path / 'mm.pth', {'meta': {}, 'state_dict': under('backbone.', renamed)}, images, features)
    assert 'layout of mmpretrain' in info['note']
    torch.manual_seed(1)
    other = torchvision.models.VisionTransformer(32, 8, 12, 3, 192, 768).eval()
    state = other.state_dict()
    other.heads = nn.Identity()
    assert 'heads.head.bias' in loaded(tmp_path / 'tv.pth', state, images, other(images))['note']


def test_vit_small_of_moco_v3_has_12_heads_and_others_are_asked_for(tmp_path):
    torch.manual_seed(0)
    twelve, images = ViT('vit_small', 8, 16).eval(), torch.randn(2, 3, 16, 16)
    state, features = twelve.state_dict(), twelve(images)
    known = {'state_dict': state, 'arch': 'vit_small', 'patch_size': 8, 'image_size': 16, 'mean': MEAN, 'std': STD}
    assert '12 heads' in loaded(tmp_path / 'ours.pt', known, images, features)['text']
    official = {**under('module.base_encoder.', state), **under('module.momentum_encoder.', moved(state)),
                'module.base_encoder.head.0.weight': torch.zeros(2, 2)}
    info = loaded(tmp_path / 'moco.pth', {'arch': 'vit_small', 'state_dict': official}, images, features)
    assert info['heads'] == 12 and 'layout of MoCo v3' in info['note']
    assert loaded(tmp_path / 'fixed.pth', state, images, features)['heads'] == 12  # by its position embedding
    learned = {**state, 'pos_embed': torch.randn_like(state['pos_embed'])}
    torch.save(learned, tmp_path / 'unknown.pth')
    with pytest.raises(Fail, match='6 heads .* or 12 .*: set backbone.heads'):
        load_backbone(tmp_path / 'unknown.pth')
    six = timm.create_model('vit_small_patch16_224', img_size=16, patch_size=8, num_classes=0).eval()
    six.load_state_dict(learned)
    twelve.load_state_dict(learned)
    assert not torch.allclose(six(images), twelve(images), atol=1e-3)
    for hints, content, source in (({'heads': 6}, learned, six), ({'heads': 12}, learned, twelve),
                                   ({'arch': 'vit_small_patch16_224'}, learned, six),
                                   ({}, {'arch': 'vit_small_patch16_224', 'state_dict': learned}, six)):
        info = loaded(tmp_path / 'vit.pth', content, images, source(images), **hints)
        assert info['heads'] == (12 if source is twelve else 6) and f"{info['heads']} heads" in info['text']
    for wrong in (7, 'six', -1):
        with pytest.raises(Fail, match=f'backbone.heads: {wrong} does not divide the width of this ViT, 384'):
            load_backbone(tmp_path / 'unknown.pth', heads=wrong)
    for arch, given in (('vit_base_patch16_224', None), ('vit_base', 6), ('resnet18', 6)):
        with pytest.raises(Fail, match=f'not a {arch}'):
            load_backbone(tmp_path / 'vit.pth', arch=arch, heads=given)


def test_a_named_timm_architecture_and_efficientnet_under_its_other_names(tmp_path):
    torch.manual_seed(0)
    source, images = shaken(timm.create_model('tf_efficientnet_lite0', num_classes=10)), torch.randn(1, 3, 64, 64)
    state = source.state_dict()
    other = dict(zip(['_conv_stem.weight', *(f'_blocks.{n}' for n in range(len(state) - 3)), '_fc.weight', '_fc.bias'],
                     state.values()))
    source.reset_classifier(0)
    for content in (state, {'state_dict': under('module.', state)}, other):
        info = loaded(tmp_path / 'lite.pth', content, images, source(images), arch='tf_efficientnet_lite0')
        assert info['arch'] == 'tf_efficientnet_lite0' and info['feature_dim'] == 1280 and info['mean'] is None
    loaded(tmp_path / 'lite.pth', {'arch': 'tf_efficientnet_lite0', 'state_dict': state}, images, source(images))
    torch.save(state, tmp_path / 'lite.pth')
    for arch, message in ((None, 'For another network name its timm architecture'), ('resnet50', 'no ResNet'),
                          ('tf_eficientnet_lite0', "mean 'tf_efficientnet_lite0'"),
                          ('tf_efficientnet_lite1', 'not a timm.s tf_efficientnet_lite1: missing')):
        with pytest.raises(Fail, match=message):
            load_backbone(tmp_path / 'lite.pth', arch=arch)


# ---------------------------------------------------------------------------------------------------
# What is refused

def test_missing_unexpected_misshapen_and_competing_are_named(tmp_path, resnets):
    state = resnets['cifar'][0].state_dict()
    extra = {'surprise': torch.zeros(1), 'layer1.0.extra': torch.zeros(1)}
    wrong = {'missing layer1.0.conv1.weight': {k: v for k, v in state.items() if k != 'layer1.0.conv1.weight'},
             'unexpected layer1.0.extra, surprise': {**state, **extra},
             r'of another shape bn1.bias \(9,\) for \(8,\)': {**state, 'bn1.bias': torch.zeros(9)},
             'no ResNet in it': {'cls_token': torch.zeros(3)}, 'holds list': [state],
             r"several networks in it \('student.', 'teacher.'\)": {
                 **under('student.', state), **under('teacher.', moved(state))},
             r"several networks in it \('ema_state_dict.', 'state_dict.'\)": {
                 'state_dict': state, 'ema_state_dict': moved(state)},
             'is none of resnet18': {k: v for k, v in state.items() if not k.startswith('layer3')}}
    for message, content in wrong.items():
        torch.save(content, tmp_path / 'wrong.pth')
        with pytest.raises(Fail, match=message) as error:
            load_backbone(tmp_path / 'wrong.pth')
        assert 'wrong.pth' in str(error.value) and '\n' not in str(error.value)
    (tmp_path / 'noise.pth').write_bytes(b'noise')
    for name, message in (('noise.pth', 'is text'), ('none.pth', 'no such checkpoint')):
        with pytest.raises(Fail, match=message):
            load_backbone(tmp_path / name)


def test_a_file_that_is_no_checkpoint_says_what_it_is(tmp_path, resnets):
    state = resnets['cifar'][0].state_dict()
    torch.save(state, tmp_path / 'whole.pth')
    save_file(state, tmp_path / 'whole.safetensors')
    torch_bytes, safe_bytes = ((tmp_path / f'whole.{suffix}').read_bytes() for suffix in ('pth', 'safetensors'))
    with tarfile.open(tmp_path / 'archive.tar', 'w') as tar:
        tar.add(tmp_path / 'whole.pth', 'whole.pth')
    for words, suffixes, content in (
            ('is empty; copy', 'pth safetensors', b''), ('is a web page', 'pth safetensors', b'\n<html lang="en">'),
            ('is a Git LFS pointer, not the file itself; `git lfs pull`', 'pth safetensors',
             b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n'),
            ('is cut short', 'pth', torch_bytes[:-99_999]), ('is cut short', 'safetensors', safe_bytes[:-1]),
            ('is cut short', 'safetensors', safe_bytes[:1000]), ('is text', 'pth safetensors', b'{"state_dict": 1}'),
            ('cannot be read as', 'safetensors', (30).to_bytes(8, 'little') + b'{"w": {"data_offsets": []}}   '),
            ('in the format of safetensors; let its name end in', 'pth', safe_bytes),
            ('is a tar archive; unpack', 'pth', (tmp_path / 'archive.tar').read_bytes()),
            ('is compressed; unpack', 'pth', gzip.compress(torch_bytes)),
            ('begins with zeros', 'pth safetensors', bytes(5000)), ('cannot be read as', 'pth', b'\xfe\0' * 99)):
        for suffix in suffixes.split():
            path = tmp_path / f'downloaded.{suffix}'
            path.write_bytes(content)
            with pytest.raises(Fail, match=f'downloaded.{suffix}: .*{words}') as error:
                load_backbone(path)
            assert '\n' not in str(error.value) and 'delete' not in str(error.value)
        (tmp_path / 'checkpoint.pt').write_bytes(content)  # ours is not the user's only one
        with pytest.raises(Fail, match='checkpoint.pt: .*; delete it to start again') as error:
            earlier(tmp_path / 'checkpoint.pt', {}, ())
        assert '\n' not in str(error.value)


def test_what_an_earlier_run_wrote(tmp_path):
    config, results = {'lr': 1}, tmp_path / 'results.json'
    save_json(results, {'summary': 'good', 'config': config})
    for damaged in damages(results):
        with pytest.raises(Fail, match='results.json: .*; delete it to start again') as error:
            answered(results, config, (), Processes('cpu'))
        assert damaged in str(error.value) and '\n' not in str(error.value)
    for content, message in ((config, 'no config in it'), ({'config': config}, r'lacks summary\); del'), ([], 'list')):
        save_json(results, content)
        with pytest.raises(Fail, match=f'results.json: .*{message}'):
            answered(results, config, (), Processes('cpu'))
    save_checkpoint(tmp_path / 'checkpoint.pt', {'config': config, 'step': 1})
    with pytest.raises(Fail, match='lacks model'):
        earlier(tmp_path / 'checkpoint.pt', config, (), needs=('model', 'step'))
    assert earlier(tmp_path / 'checkpoint.pt', config, (), needs=('step',))['step'] == 1
    save_checkpoint(tmp_path / 'checkpoint.pt', torch.ones(1))  # another stage's, or a backbone.pt under this name
    with pytest.raises(Fail, match='is not what this stage writes there'):
        earlier(tmp_path / 'checkpoint.pt', config, ())


def test_equal_states_are_equal_files_and_a_full_disk_is_one_line(tmp_path, monkeypatch):
    state = {'model': {'w': torch.arange(9e4)}, 'step': 3}
    for process in (1, 22):  # their numbers are in the names of temporary files
        monkeypatch.setattr('os.getpid', lambda process=process: process)
        save_checkpoint(tmp_path / f'{process}/x.pt', state)
        atomic(tmp_path / f'{process}/x.npz', lambda p: np.savez(p, a=np.ones(3), b=np.zeros(2)))
    for name in ('x.pt', 'x.npz'):
        assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '22' / name).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
    try:
        for write in (lambda: save_checkpoint(tmp_path / '1/x.pt', {**state, 'step': 4}),
                      lambda: atomic(tmp_path / '1/x.npz', lambda p: np.savez(p, a=np.ones(99_999)))):
            with pytest.raises(Fail, match='cannot be written: File too large'):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert load_checkpoint(tmp_path / '1/x.pt')['step'] == 3 and len(list((tmp_path / '1').iterdir())) == 2


def test_the_competing_network_that_is_meant_can_be_named(tmp_path, resnets):
    network, images, features = resnets['cifar']
    state = network.state_dict()
    content = {'student': under('module.backbone.', moved(state)), 'teacher': under('backbone.', state)}
    loaded(tmp_path / 'dino.pth', content, images, features, prefix='teacher.backbone')
    with pytest.raises(Fail, match="prefix 'backbone' fits 2 of the networks in it: 'student.module.backbone.'"):
        load_backbone(tmp_path / 'dino.pth', prefix='backbone')
    content = {'encoder_q': moved(state), 'encoder_k': state}
    loaded(tmp_path / 'moco.pth', content, images, features, prefix='encoder_k.')  # the other one, if asked for
    content = {**under('backbone.', state), **under('student.backbone.', moved(state))}  # one ends as the other
    loaded(tmp_path / 'ends.pth', content, images, features, prefix='backbone')


def test_files_that_pickle_objects_are_refused_by_name(tmp_path, resnets):
    torch.save({'state_dict': resnets['cifar'][0].state_dict(), 'args': argparse.Namespace(lr=1)}, tmp_path / 'a.pth')
    with pytest.raises(Fail, match='a.pth: holds objects of argparse.Namespace') as error:
        load_backbone(tmp_path / 'a.pth')
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------------------------------------------
# Export

def test_exported_files_load_in_torchvision_and_here(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    source, images = shaken(torchvision.models.resnet18()), torch.randn(1, 3, 64, 64)
    known = {'arch': 'resnet18', 'stem': 'imagenet', 'width': 64, 'mean': MEAN, 'std': STD, 'image_size': 64}
    state = {k: v for k, v in source.state_dict().items() if not k.startswith('fc.')}
    torch.save({'state_dict': state, **known}, tmp_path / 'backbone.pt')
    monkeypatch.setattr(sys, 'argv', ['checkpoints.py', str(tmp_path / 'backbone.pt'), str(tmp_path / 'out')])
    runpy.run_path(str(ROOT / 'checkpoints.py'), run_name='__main__')
    assert 'resnet18' in capsys.readouterr().out
    source.fc = nn.Identity()
    other = torchvision.models.resnet18()
    other.fc = nn.Identity()
    other.load_state_dict(torch.load(tmp_path / 'out/backbone.pth', weights_only=True))
    module, info = load_backbone(tmp_path / 'out/backbone.pth')
    assert torch.equal(other.eval()(images), source(images)) and torch.allclose(module(images), source(images))
    card = json.loads((tmp_path / 'out/backbone.json').read_text())
    assert {k: card[k] for k in known} == known and {k: info[k] for k in known} == known
    detectron = torch.load(tmp_path / 'out/detectron2.pth', weights_only=True)
    assert detectron['matching_heuristics'] and torch.equal(detectron['model']['res3.0.shortcut.norm.weight'],
                                                            state['layer2.0.downsample.1.weight'])
    assert {'stem.conv1.weight', 'stem.conv1.norm.running_var', 'res5.1.conv2.norm.bias'} <= detectron['model'].keys()
    card = json.loads((tmp_path / 'out/detectron2.json').read_text())
    assert card['settings']['MODEL.PIXEL_MEAN'] == [255 * v for v in MEAN]
    assert sorted(card['names'].values()) == sorted(detectron['model'])
    monkeypatch.setattr(sys, 'argv', ['checkpoints.py', 'none.pt', 'out'])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / 'checkpoints.py'), run_name='__main__')
    assert left.value.code == 2 and capsys.readouterr().err == 'checkpoints.py: none.pt: no such checkpoint\n'


def test_what_is_peculiar_travels_with_the_export(tmp_path, resnets, vit):
    network, images, _ = resnets['cifar']
    network = copy.deepcopy(network)
    network.conv1.padding = (2, 2)
    state = {**under('backbone.', network.state_dict()), 'classifier.weight': torch.zeros(2, 2)}
    torch.save({'pytorch-lightning_version': '2', 'state_dict': state}, tmp_path / 'solo.ckpt')
    export(tmp_path / 'solo.ckpt', tmp_path / 'solo')
    assert torch.allclose(load_backbone(tmp_path / 'solo/backbone.pth')[0](images), network(images), atol=1e-6)
    assert not (tmp_path / 'solo/detectron2.pth').exists()
    network, images, features = vit
    torch.save(network.state_dict(), tmp_path / 'vit.pth')
    export(tmp_path / 'vit.pth', tmp_path / 'vit')
    module, info = load_backbone(tmp_path / 'vit/backbone.pth')
    assert torch.allclose(module(images), features, atol=1e-6) and info['heads'] == 3
