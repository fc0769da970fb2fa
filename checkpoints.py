"""Checkpoints of backbones: ours and those that others publish, recognised by the names in them; and exporting.

    python checkpoints.py CHECKPOINT FOLDER [arch=...] [heads=...] [prefix=...]

writes any backbone that load_backbone knows into FOLDER: backbone.pth (plain torchvision or timm state dict),
backbone.json (architecture and normalisation) and, of a ResNet, detectron2.pth with detectron2.json."""
import difflib
import hashlib
import json
import math
import re
import sys
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from config import Fail, flat
from start import open_streams, say
from files import load_checkpoint, save_checkpoint, save_json
from models import BLOCKS, VITS, build_backbone, describe

NORMALIZATIONS = {'clip': ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
                  'imagenet': ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                  'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))}


def normalization(spec, own=None):
    """Mean and std, 3 floats each for values in [0, 1]. spec: a key of NORMALIZATIONS or [mean, std]; None: `own`
    (mean, std) or, where that is not known, ImageNet's."""
    if spec is None:
        spec = own if own and own[0] else 'imagenet'
    try:
        mean, std = (tuple(map(float, v)) for v in (NORMALIZATIONS[spec] if isinstance(spec, str) else spec))
        if len(mean) == len(std) == 3 and min(std) > 0 and all(map(math.isfinite, mean + std)):
            return mean, std
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise Fail(f"normalization: {spec!r} is none of {', '.join(NORMALIZATIONS)}, [[r, g, b], [r, g, b]] "
               '(mean, std > 0)')


# ---------------------------------------------------------------------------------------------------
# Loading: our backbones and the files that others publish

# The first convolution, by which a network is found in a file, and what its names become: torchvision's for a ResNet,
# timm's for everything else.
LAYOUTS = {
    'conv1.weight': ((r'\.shortcut\.', '.downsample.'),),       # torchvision and most others; `shortcut`: lightly
    'stem.0.weight': ((r'^stem\.0\.', 'conv1.'), (r'^stem\.1\.', 'bn1.'), (r'\.shortcut\.', '.downsample.')),  # COP-Gen
    '0.weight': (                                               # nn.Sequential of a ResNet's children
        (r'^0\.', 'conv1.'), (r'^1\.', 'bn1.'), *((rf'^{k + 3}\.', f'layer{k}.') for k in (1, 2, 3, 4))),
    'patch_embed.proj.weight': (),                              # timm, MoCo v3
    'patch_embed.projection.weight': (                          # mmpretrain
        (r'^patch_embed\.projection', 'patch_embed.proj'), (r'^layers\.(\d+)\.ln', r'blocks.\1.norm'),
        (r'^layers\.(\d+)\.ffn\.layers\.0\.0', r'blocks.\1.mlp.fc1'),
        (r'^layers\.(\d+)\.ffn\.layers\.1', r'blocks.\1.mlp.fc2'), ('^layers', 'blocks'), ('^ln1', 'norm')),
    'conv_proj.weight': (                                       # torchvision
        ('^conv_proj', 'patch_embed.proj'), ('^class_token', 'cls_token'), (r'^encoder\.pos_embedding', 'pos_embed'),
        (r'^encoder\.ln', 'norm'), (r'^encoder\.layers\.encoder_layer_(\d+)', r'blocks.\1'), (r'\.ln_', '.norm'),
        (r'\.self_attention\.in_proj_', '.attn.qkv.'), (r'\.self_attention\.out_proj', '.attn.proj'),
        (r'\.mlp\.(0|linear_1)\.', '.mlp.fc1.'), (r'\.mlp\.(3|linear_2)\.', '.mlp.fc2.')),
    '_conv_stem.weight': ()}                                    # EfficientNet-PyTorch: timm's order, other names
LIGHTLY = (*LAYOUTS['0.weight'][:2], *((rf'^{k + 1}\.', f'layer{k}.') for k in (1, 2, 3, 4)),
           *LAYOUTS['conv1.weight'])                            # children of lightly's own ResNet
MOMENTUM_NAMES = ('encoder_k', 'momentum', 'target')            # MoCo and BYOL evaluate the other network
HEADS = ('fc', '_fc', 'head', 'heads', 'classifier', 'linear', 'projector', 'predictor', 'projection_head',
         'prototypes')
SWAV_NORMALIZATION = [0.485, 0.456, 0.406], [0.228, 0.224, 0.225]   # a slip of the official code that it learned with
TIMM_VITS = {192: 'vit_tiny_patch16_224', 384: 'vit_small_patch16_224', 768: 'vit_base_patch16_224',
             1024: 'vit_large_patch16_224', 1280: 'vit_huge_patch14_224'}
MMENGINE = ('mmengine.logging.history_buffer.HistoryBuffer', 'builtins.getattr', '_codecs.encode', 'numpy.ndarray',
            'numpy.dtype', *(f'numpy.{core}.multiarray.{name}' for core in ('core', '_core')
                             for name in ('_reconstruct', 'scalar')))


class _Inert:
    """Stands for what mmengine pickles beside the weights, the losses that it logged: none of its code runs."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def digest(module, info):
    """sha256 of all parameters and buffers, byte for byte, and of what they do not tell of the network: `info`."""
    total = hashlib.sha256(json.dumps([info[key] for key in (
        'arch', 'stem', 'width', 'patch_size', 'heads', 'mean', 'std', 'image_size')]).encode())
    for name, value in module.state_dict().items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _names(keys):
    keys = sorted(keys)
    return ', '.join(keys[:8]) + (f', ... ({len(keys)})' if len(keys) > 8 else '')


def _find(tensors, layouts, prefix, path):
    """The network that is meant: its prefix and the name of its first convolution, a key of layouts."""
    found = {}
    for key, value in tensors.items():
        fits = [name for name in layouts if f'.{key}'.endswith(f'.{name}')]
        if fits and value.dim() == 4 and value.shape[1] == 3 and not re.search(r'(^|\.)clip', key):  # GenView's judge
            first = max(fits, key=len)
            found[key[:-len(first)]] = first
    if prefix is not None:
        asked = f"{prefix.rstrip('.')}." if prefix else ''
        fits = {p: first for p, first in found.items() if p == asked} or {
            p: first for p, first in found.items() if f'.{p}'.endswith(f'.{asked}')}
        if len(fits) != 1:
            raise Fail(f"{path}: backbone.prefix '{prefix}' fits {len(fits)} of the networks in it: "
                       f'{_names(map(repr, found))}')
        return fits.popitem()
    found = {p: first for p, first in found.items() if not any(m in p for m in MOMENTUM_NAMES)} or found
    parts = {p: {k[len(p):]: v for k, v in tensors.items() if k.startswith(p)} for p in found}
    for p, q in combinations(sorted(found, key=len), 2):  # byol-pytorch writes one network under two names
        if parts[p].keys() == parts[q].keys() and all(torch.equal(v, parts[q][k]) for k, v in parts[p].items()):
            found.pop(p, None)
    if not found:
        raise Fail(f'{path}: no ResNet in it and no ViT; keys: {_names(tensors)}. For another network name its timm '
                   'architecture in backbone.arch')
    if len(found) > 1:
        raise Fail(f'{path}: several networks in it ({_names(map(repr, found))}): set backbone.prefix to the one that '
                   'is meant')
    return found.popitem()


def _origin(content, tensors, prefix, first):
    """Whose file it is, as far as the names tell."""
    beside = {key[len(prefix):].partition('.')[0] for key in tensors if key.startswith(prefix)}
    tests = {'MoCo v1/v2': 'encoder_q.' in prefix, 'MoCo v3': 'base_encoder.' in prefix,
             'BYOL': 'online_' in prefix, 'VISSL': '_feature_blocks.' in prefix,
             'SwAV': {'projection_head', 'prototypes'} <= beside, 'COP-Gen': first == 'stem.0.weight',
             'lightly': first == '0.weight', 'mmpretrain': 'meta' in content or 'projection' in first,
             'SimSiam': prefix.endswith('module.encoder.'), 'VICReg': prefix.endswith('module.backbone.'),
             'solo-learn': 'pytorch-lightning_version' in content and 'state_dict.classifier.weight' in tensors}
    return next((name for name, true in tests.items() if true), None)


def _guess_resnet(state, where):
    """arch, stem and width from the shapes of a ResNet."""
    width, _, kernel, _ = state['conv1.weight'].shape
    block = Bottleneck if 'layer1.0.conv3.weight' in state else BasicBlock
    layers = tuple(len({k.split('.')[1] for k in state if k.startswith(f'layer{i}.')}) for i in (1, 2, 3, 4))
    for arch, known in BLOCKS.items():
        if known == (block, layers):
            return {'arch': arch, 'stem': 'cifar' if kernel == 3 else 'imagenet', 'width': width}
    raise Fail(f"{where}: a ResNet of {block.__name__} {layers} is none of {', '.join(BLOCKS)}; if timm has it, name "
               'its architecture in backbone.arch')


def _guess_vit(state, named, heads, origin, where):
    """arch, patch_size, image_size and heads of a ViT, of which timm's name may be known. No shape tells the heads:
    they are 64 wide, but for MoCo v3's ViT-S, which one knows by its fixed position embedding."""
    width, _, _, patch = state['patch_embed.proj.weight'].shape
    places = state['pos_embed'].shape[1] - 1 if {'pos_embed', 'cls_token'} <= state.keys() else -1
    size = patch * math.isqrt(max(places, 0))
    if width not in TIMM_VITS or places < 1 or (size // patch) ** 2 != places:
        raise Fail(f'{where}: a ViT without cls_token, square pos_embed or a width of {_names(map(str, TIMM_VITS))}; '
                   'if timm has it, name its architecture in backbone.arch')
    if named not in (None, TIMM_VITS[width]):
        raise Fail(f'{where}: a ViT of width {width}, not a {named}')
    if heads is None and named is None and width == VITS['vit_small']:
        from vit import ViT
        fixed = ViT('vit_small', patch, size).pos_embed
        if origin != 'MoCo v3' and not torch.allclose(fixed, state['pos_embed'].float(), atol=0.01):
            raise Fail(f'{where}: this ViT-S has 6 heads (timm, DeiT, DINO) or 12 (MoCo v3), which the file does not '
                       'say: set backbone.heads')
        heads = 12
    heads = heads or min(width // 64, 16)
    if type(heads) is not int or heads < 1 or width % heads:
        raise Fail(f'backbone.heads: {heads} does not divide the width of this ViT, {width}')
    ours = [name for name in VITS if VITS[name] == width and heads == 12]
    return {'arch': ours[0] if ours else TIMM_VITS[width], 'patch_size': patch, 'image_size': size, 'heads': heads}


def _build(info):
    """The network that `info` names, and words for it."""
    arch, patch, stem = info['arch'], info['patch_size'], info['stem'] or ''
    if arch in VITS or arch in BLOCKS:
        module = build_backbone(arch, stem.partition(' ')[0], info['width'], patch, info['image_size'])
        if stem.endswith('(solo-learn)'):
            module.conv1.padding = (2, 2)
        if stem.endswith('(lightly)'):
            module.relu = nn.Identity()
        return module, describe(info)[1]
    import timm  # takes as long as torch
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), 1)
        raise Fail(f"backbone.arch: timm has no '{arch}'" + (f"; did you mean '{near[0]}'?" if near else ''))
    options = {'patch_size': patch, 'img_size': info['image_size'], 'num_heads': info['heads']} if patch else {}
    try:
        module = timm.create_model(arch, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:  # no ViT
        module = timm.create_model(arch, num_classes=0)
    module.feature_dim = getattr(module, 'head_hidden_size', None) or module.num_features
    return module, f"timm's {arch}" + (f" (patches of {patch} px, {info['heads']} heads)" if patch else '')


def _known(content, path):
    """What our own files say of their backbone: backbone.pt, checkpoint.pt, an exported file; {} of others."""
    if 'arch' in content and ('stem' in content or 'patch_size' in content):
        return content
    config = content.get('config')
    if isinstance(config, dict) and {'backbone', 'normalization', 'method'} <= config.keys():
        mean, std = normalization(config['normalization'], NORMALIZATIONS['clip'])
        return {**describe(config['backbone'])[0], 'mean': mean, 'std': std, 'image_size': config['image_size']}
    with suppress(OSError, ValueError, TypeError):
        card = json.loads(Path(path).with_suffix('.json').read_text(encoding='utf-8'))
        return card if {'arch', 'feature_dim', 'text'} <= set(card) else {}
    return {}


def _mmpretrain_normalization(content):
    """Mean and std for values in [0, 1] from the config that mmengine's checkpoints carry, or None twice."""
    meta = content.get('meta')
    numbers = re.search(r'data_preprocessor\s*=\s*dict\(.*?mean=\[([^]]*)].*?std=\[([^]]*)]',
                        str(meta.get('cfg')) if isinstance(meta, dict) else '', re.DOTALL)
    if not numbers:
        return None, None
    return [[float(v) / 255 for v in part.split(',') if v.strip()] for part in numbers.groups()]


def load_backbone(path, arch=None, heads=None, prefix=None):
    """Backbone in evaluation mode and what is known of it, from our files or those of others.

    Recognised by their names: our backbone.pt and checkpoint.pt; torchvision and timm (ResNet, ViT); the official
    releases of MoCo v1, v2 and v3, SimSiam, SwAV and VICReg; byol-pytorch and PyTorch-BYOL; VISSL, solo-learn, lightly,
    mmpretrain (GenView's releases) and COP-Gen; any prefix (module., _orig_mod., backbone., ...) and container
    (state_dict, model, ...). What `export` wrote is read with the JSON beside it.

    arch: timm architecture of another network. heads: of a ViT-S that does not tell. prefix: of the network that is
    meant where several compete; with MoCo and BYOL the momentum encoder does not.

    Returns (module, {'arch', 'mean', 'std', 'image_size', 'feature_dim', 'stem' and 'width' or 'patch_size' and
    'heads', 'text', 'note'}). mean, std and image_size are None where the file does not say; text describes the
    network, note how it was found and what was left out. Raises Fail that names missing and unexpected keys, wrong
    shapes, competing networks, or the classes that a file would have to unpickle."""
    with torch.serialization.safe_globals([(_Inert, name) for name in MMENGINE]):
        content = load_checkpoint(path)
    if not isinstance(content, dict):
        raise Fail(f'{path}: holds {type(content).__name__}, not a state dict')
    keys, info = ('arch', 'stem', 'width', 'patch_size', 'heads', 'mean', 'std', 'image_size'), _known(content, path)
    info, ours = dict.fromkeys(keys) | {k: info[k] for k in keys if k in info}, bool(info)
    if not ours:
        named = arch or content.get('arch')  # timm's training script writes it
        if not arch and named is not None:
            import timm
            named = named if isinstance(named, str) and timm.is_model(named) else None
        info['arch'] = None if named in (*BLOCKS, *VITS) else named
    layouts, vits = LAYOUTS, TIMM_VITS.values()
    if info['arch'] and info['arch'] not in (*BLOCKS, *VITS, *vits):
        module, text = _build(info)
        layouts = {**LAYOUTS, **{k: () for k, v in module.state_dict().items() if v.dim() == 4 and v.shape[1] == 3}}

    tensors = {name: value for name, value in flat(content).items() if torch.is_tensor(value)}
    found, first = _find(tensors, layouts, prefix, path)
    origin = _origin(content, tensors, found, first)
    state = {k[len(found):]: v for k, v in tensors.items() if k.startswith(found)}
    renames = LIGHTLY if first == '0.weight' and '2.0.conv1.weight' in state else layouts[first]
    for pattern, name in renames:
        state = {re.sub(pattern, name, k): v for k, v in state.items()}
    if not ours and 'patch_embed.proj.weight' in state and info['arch'] in (None, *vits):
        info |= _guess_vit(state, info['arch'], heads, origin, path)
    elif not ours and 'conv1.weight' in state and info['arch'] is None:
        info |= _guess_resnet(state, path)
        quirk = renames is LIGHTLY or origin == 'solo-learn' and info['stem'] == 'cifar'
        info['stem'] += f' ({origin})' if quirk else ''
    if info['arch'] is None or arch in (*BLOCKS, *VITS) and arch != info['arch']:
        raise Fail(f"{path}: {'not a ' + arch if arch else 'no network that is known'}; keys: {_names(state)}")
    if layouts is LAYOUTS:
        module, text = _build(info)
    expected = module.state_dict()
    if first == '_conv_stem.weight':
        body = [v for k, v in state.items() if not k.startswith('_fc.')]
        state = dict(zip(expected, body)) if len(body) == len(expected) else state
    if not ours:
        info['mean'], info['std'] = SWAV_NORMALIZATION if origin == 'SwAV' else _mmpretrain_normalization(content)
    left = {k for k in state if k not in expected and k.partition('.')[0] in HEADS}
    state = {k: v for k, v in state.items() if k not in left}
    missing = {k for k in expected if k not in state and not k.endswith('num_batches_tracked')}  # absent in old files
    shapes = [f'{k} {tuple(state[k].shape)} for {tuple(v.shape)}' for k, v in expected.items()
              if k in state and state[k].shape != v.shape]
    problems = [f'{what} {_names(keys)}' for what, keys in (
        ('missing', missing), ('unexpected', state.keys() - expected.keys()), ('of another shape', shapes)) if keys]
    if problems:
        raise Fail(f'{path}: not a {text}: ' + '; '.join(problems))
    module.load_state_dict({k: state.get(k, v) for k, v in expected.items()})
    outside = {re.match(r'((state_dict|model|module)\.)*[^.]*', k)[0] for k in tensors if not k.startswith(found)}
    notes = [words for words in (
        origin and f'layout of {origin}', found and not ours and f"found under '{found}'",
        left and f'head left out ({_names(left)})', outside and f'left out: {_names(outside)}') if words]
    return module.eval(), {**info, 'text': text, 'feature_dim': module.feature_dim, 'note': '; '.join(notes)}


def backbone_of(config):
    """The backbone that the config of an evaluation names, and load_backbone's `info` of it, in which `mean`, `std` and
    `image_size` are those to be used and `text` says all of it for the log.

    config: checkpoint, backbone (keywords of load_backbone), normalization and image_size (null: the checkpoint's)."""
    module, info = load_backbone(config['checkpoint'], **config['backbone'])
    size = config['image_size'] or info['image_size'] or 224
    if size % (info['patch_size'] or 1):
        raise Fail(f"image_size: {size} is not a multiple of the {info['patch_size']} px patches of {info['arch']}")
    source = config['normalization'] or ('its own' if info['mean'] else 'imagenet (the file names none)')
    mean, std = normalization(config['normalization'], (info['mean'], info['std']))
    text = (f"{config['checkpoint']}: {info['text']}, {info['feature_dim']} features{'; ' * bool(info['note'])}"
            f"{info['note']}; normalisation {source}, {size} px")
    return module, {**info, 'mean': mean, 'std': std, 'image_size': size, 'text': text}


# ---------------------------------------------------------------------------------------------------
# Export

def detectron2_name(name):
    """torchvision's name of a ResNet's parameter -> detectron2's, as in MoCo's convert-pretrain-to-detectron2.py."""
    name = name if name.startswith('layer') else f'stem.{name}'
    name = re.sub(r'^layer(\d)', lambda m: f'res{int(m[1]) + 1}', name)
    name = re.sub(r'bn(\d)', r'conv\1.norm', name)
    return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


def save_backbone(path, backbone, config, mean, std):
    """Write the backbone of a pretraining, with torchvision's or timm's names, and what one must know to use it."""
    state = {k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}
    save_checkpoint(path, {'state_dict': state, **describe(config['backbone'])[0], 'feature_dim': backbone.feature_dim,
                           'mean': list(mean), 'std': list(std), 'image_size': config['image_size'],
                           'method': config['method']})


def export(path, folder, **hints):
    """Write the backbone of any file that load_backbone (with its keywords as hints) reads, for use elsewhere:

    backbone.pth     state dict with torchvision's (ResNet) or timm's names and without a head:
                     state = torch.load('backbone.pth', weights_only=True)
                     torchvision.models.resnet50().load_state_dict(state, strict=False)
    backbone.json    architecture, normalisation (for values in [0, 1]; null where it is not known), image size
    detectron2.pth   of a ResNet with ImageNet stem: the same for MODEL.WEIGHTS
    detectron2.json  the settings that belong to it, and the map of the names"""
    module, info = load_backbone(path, **hints)
    state, folder = module.state_dict(), Path(folder)
    note = info.pop('note')
    save_checkpoint(folder / 'backbone.pth', state)
    save_json(folder / 'backbone.json', info)
    if info['stem'] == 'imagenet':
        names = {name: detectron2_name(name) for name in state if not name.endswith('num_batches_tracked')}
        save_checkpoint(folder / 'detectron2.pth', {
            'model': {new: state[old] for old, new in names.items()}, '__author__': '', 'matching_heuristics': True})
        mean, std = normalization(None, (info['mean'], info['std']))
        settings = {'MODEL.PIXEL_MEAN': [255 * v for v in mean], 'MODEL.PIXEL_STD': [255 * v for v in std],
                    'MODEL.RESNETS.DEPTH': int(info['arch'].removeprefix('resnet')),
                    'MODEL.RESNETS.STEM_OUT_CHANNELS': info['width'], 'MODEL.RESNETS.WIDTH_PER_GROUP': info['width'],
                    'MODEL.RESNETS.RES2_OUT_CHANNELS': info['feature_dim'] // 8,
                    'MODEL.RESNETS.STRIDE_IN_1X1': False, 'INPUT.FORMAT': 'RGB'}
        save_json(folder / 'detectron2.json', {'settings': settings, 'names': names})
    return f"{folder}: {info['text']}, {info['feature_dim']} features{'; ' * bool(note)}{note}"


if __name__ == '__main__':
    if len(sys.argv) < 3 or not all(re.match('(arch|heads|prefix)=', word) for word in sys.argv[3:]):
        sys.exit('usage: python checkpoints.py CHECKPOINT FOLDER [arch=...] [heads=...] [prefix=...]')
    words = dict(word.split('=', 1) for word in sys.argv[3:])
    open_streams()
    try:
        say(export(*sys.argv[1:3], **{k: int(v) if k == 'heads' and v.isdigit() else v for k, v in words.items()}))
    except Fail as error:
        say(f'checkpoints.py: {error}', sys.stderr)
        sys.exit(2)
