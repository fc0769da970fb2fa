"""Encoders and SSL methods as nn.Modules: the frozen CLIP encoder, backbones, MoCo v2, loading foreign checkpoints."""
import difflib
import hashlib
import logging
import re
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common import Fail, load_checkpoint
from loss import info_nce

# ---------------------------------------------------------------------------------------------------
# Frozen CLIP

class FrozenClip:
    """Image tower of any open_clip model: tokens and embedding of one pass, without gradient.

    spec: model       an architecture of open_clip ('ViT-H-14'), 'hf-hub:owner/name', or a local folder that holds
                      open_clip_config.json and open_clip_model.safetensors
          pretrained  for an architecture: hub tag ('laion2b_s32b_b79k') or local weights file; otherwise null
          image_size  pixels (optional; default: the model's own). ViT position embeddings are interpolated; the maps of
                      a ConvNeXt grow with it (convnext_base_w is published at 256; 224 gives the 7 x 7 of GenView)

    Attributes: image_size (pixels), mean and std (of the inputs, 3 floats each), token_dim K, embedding_dim D,
    preprocess: PIL image -> (3, S, S), normalised. Not an nn.Module, so that it never gets into a checkpoint, an
    optimizer or DistributedDataParallel. Raises Fail when the model or its weights cannot be had.
    """

    def __init__(self, spec, device='cpu'):
        import open_clip
        name, pretrained, image_size = _clip_source(spec, open_clip)
        logging.disable(logging.CRITICAL)  # open_clip logs what it then raises; ours is one line
        try:
            model = open_clip.create_model(name, pretrained, force_image_size=image_size, require_pretrained=True)
        except Exception as error:  # the hub, files and timm raise nearly everything
            reason = ' '.join(str(error).split())
            where = f"{spec['model']}{f' / {pretrained}' if pretrained else ''}"
            if re.search('connect|resolve|offline|timed out|Max retries|LocalEntryNotFound', reason, re.IGNORECASE):
                raise Fail(f'clip.model: {where}: the hub cannot be reached; download the weights on a machine that '
                           'can, and name the file in clip.pretrained or the folder in clip.model') from None
            raise Fail(f'clip.model: {where} cannot be loaded: {type(error).__name__}: {reason[:160]}') from None
        finally:
            logging.disable(logging.NOTSET)
        self.device = torch.device(device)
        self.visual = model.visual.eval().requires_grad_(False).to(self.device)  # the text tower goes
        settings = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
        self.preprocess = open_clip.transform.image_transform_v2(settings, is_train=False)
        self.mean, self.std = tuple(settings.mean), tuple(settings.std)
        self.image_size = settings.size[0] if isinstance(settings.size, (tuple, list)) else settings.size
        tokens, embedding = self.forward(torch.zeros(1, 3, self.image_size, self.image_size, device=self.device))
        self.token_dim, self.embedding_dim = tokens.shape[1], embedding.shape[1]

    @torch.no_grad()
    def forward(self, images):
        """images: (B, 3, S, S), normalised with `mean` and `std`. Returns tokens (B, K, H, W) and the projected,
        not normalised embedding (B, D).

        ViT: patch tokens after the final norm, without class token, before the projection. ConvNeXt and other timm
        towers: the trunk's last map, before pooling and head norm. Call under autocast for half precision."""
        output = self.visual.forward_intermediates(images, **self._last_map())
        return output['image_intermediates'][-1], output['image_features']

    @torch.no_grad()
    def tokens(self, images):
        """The tokens of `forward` alone, (B, K, H, W); pooling and projection are skipped."""
        return self.visual.forward_intermediates(
            images, **self._last_map(), intermediates_only=True)['image_intermediates'][-1]

    def _last_map(self):
        # the norm after an attention pool (CoCa) belongs to the pooled vector and may have another width
        norm = getattr(self.visual, 'attn_pool', None) is None
        return {'indices': 1, 'output_fmt': 'NCHW', 'normalize_intermediates': norm}

    def fingerprint(self):
        """12 hex digits of the weights: tells a principal component of this encoder from that of another one."""
        digest = hashlib.sha256()
        for key, value in self.visual.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:12]


def _clip_source(spec, open_clip):
    """Check a `clip:` spec without loading anything. Returns (name for open_clip, pretrained, image size or None)."""
    name, pretrained, image_size = spec['model'], spec.get('pretrained'), spec.get('image_size')
    if not isinstance(name, str) or not isinstance(pretrained, (str, type(None))):
        raise Fail(f'clip.model and clip.pretrained must be text, not {name!r} and {pretrained!r}')
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise Fail(f'clip.image_size must be a number of pixels or null, not {image_size!r}')
    if name.replace('/', '-') in open_clip.list_models():
        name = name.replace('/', '-')
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None:
            raise Fail(f"clip.pretrained: {name} needs a hub tag ({', '.join(tags[:4])}) or a local weights file")
        if not open_clip.get_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
            near = difflib.get_close_matches(pretrained, tags, 1, 0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"tags: {', '.join(tags) or 'none'}"
            raise Fail(f"clip.pretrained: '{pretrained}' is no weights file and no tag of {name}; {hint}")
        return name, pretrained, image_size
    folder = Path(name.removeprefix('local-dir:'))
    if not name.startswith('hf-hub:') and not folder.is_dir():
        near = difflib.get_close_matches(name, open_clip.list_models(), 1, 0.6)
        hint = f"did you mean '{near[0]}'?" if near else 'open_clip.list_models() names the architectures'
        raise Fail(f"clip.model: '{name}' is no folder and no open_clip architecture; {hint}")
    if pretrained is not None:
        raise Fail(f"clip.pretrained must be null for '{name}': a folder or hub id brings its own weights")
    if name.startswith('hf-hub:'):
        return name, None, image_size
    for file in ('open_clip_config.json', 'open_clip_model.safetensors'):
        if not (folder / file).is_file():
            raise Fail(f'clip.model: {folder / file}: no such file')
    return f'local-dir:{folder}', None, image_size


# ---------------------------------------------------------------------------------------------------
# Backbones: torchvision's ResNets with a stem for small images and a width key

BLOCKS = {'resnet18': (BasicBlock, (2, 2, 2, 2)), 'resnet34': (BasicBlock, (3, 4, 6, 3)),
          'resnet50': (Bottleneck, (3, 4, 6, 3)), 'resnet101': (Bottleneck, (3, 4, 23, 3))}


class Backbone(ResNet):
    """ResNet without classifier: images (B, 3, H, W) -> features (B, feature_dim); torchvision's parameter names.

    stem: 'imagenet' (7x7 stride 2 and max-pool) or 'cifar' (3x3 stride 1, no max-pool: GenView appendix A).
    width: channels of the first stage (64 as published; 32 has a quarter of the cost). No zero-initialised residuals.
    """

    def __init__(self, arch, stem='imagenet', width=64, norm_layer=None):
        self.width = width  # read by _make_layer, which ResNet's constructor calls
        block, layers = BLOCKS[arch]
        super().__init__(block, list(layers), norm_layer=norm_layer)
        self.feature_dim = 8 * width * block.expansion
        kernel = 3 if stem == 'cifar' else 7
        self.conv1 = nn.Conv2d(3, width, kernel, stride=1 if stem == 'cifar' else 2, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.bn1 = self._norm_layer(width)
        if stem == 'cifar':
            self.maxpool = nn.Identity()
        self.fc = nn.Identity()

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage sees the stem's channels
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


def build_backbone(arch, stem='imagenet', width=64, norm_layer=None):
    """Backbone by name (a key of BLOCKS), randomly initialised."""
    if arch not in BLOCKS:
        raise Fail(f"backbone.arch: '{arch}' is unknown; there are {', '.join(BLOCKS)}")
    if stem not in ('imagenet', 'cifar'):
        raise Fail(f"backbone.stem: '{stem}' is unknown; there are imagenet, cifar")
    if width < 8 or width % 8:
        raise Fail(f'backbone.width: {width} must be a multiple of 8')
    return Backbone(arch, stem, width, norm_layer)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that takes its statistics over each of `splits` consecutive parts of the batch, as that many
    processes would. The running statistics follow the mean over the parts."""

    def __init__(self, channels, splits):
        super().__init__(channels)
        self.splits = splits

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        means, variances = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)
        parts = [F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum, self.eps)
                 for part, mean, variance in zip(x.chunk(self.splits), means, variances)]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked += 1
        return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------
# MoCo v2

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def gather(tensor):
    """(B, ...) on each process -> (world * B, ...) on all of them, in order of rank; no gradient flows."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def normalize(images, mean, std):
    """uint8 images (B, 3, H, W) -> float32, channels last; mean and std are (1, 3, 1, 1) for values in [0, 1]."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(mean * 255).div_(std * 255)


class MoCo(nn.Module):
    """MoCo v2 (He et al. 2020; Chen et al. 2020), details after facebookresearch/moco and its CIFAR notebook.

    backbone, projector: query side. momentum_backbone, momentum_projector: exponential moving average of the
    parameters alone; their batch norm runs in train mode on its own statistics. queue (K, D): keys of the past.

    bn_splits: batch norm sees the global batch in this many groups, and the keys are shuffled between the groups, so
    that a query and its key share no statistics that would give the pair away. The groups are spread over the
    processes: the result does not depend on how many there are.
    mean, std: 3 floats each, normalisation of the uint8 views.
    """

    def __init__(self, backbone, dim=128, queue=65536, momentum=0.999, temperature=0.2, bn_splits=8, symmetric=False,
                 mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), seed=0):
        super().__init__()
        splits = bn_splits // world_size()
        norm_layer = partial(SplitBatchNorm2d, splits=splits) if splits > 1 else None
        self.backbone = build_backbone(**backbone, norm_layer=norm_layer)
        width = self.backbone.feature_dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        self.momentum_backbone = deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)
        self.momentum, self.temperature, self.symmetric, self.seed = momentum, temperature, symmetric, seed
        self.shuffle = bn_splits > 1
        self.register_buffer('queue', F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer('queue_pointer', torch.zeros((), dtype=torch.long))
        self.register_buffer('mean', torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def update_momentum_encoder(self):
        for slow, fast in ((self.momentum_backbone, self.backbone), (self.momentum_projector, self.projector)):
            torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def keys(self, images, order):
        """Keys of the global batch (world * B, D), unshuffled, from this process's uint8 images (B, 3, H, W).

        order: permutation of the global batch; process r encodes the r-th part of the permuted batch."""
        local = len(images)
        if self.shuffle:
            rank = dist.get_rank() if world_size() > 1 else 0
            images = gather(images)[order[rank * local:(rank + 1) * local]]
        keys = self.momentum_projector(self.momentum_backbone(normalize(images, self.mean, self.std)))
        keys = gather(F.normalize(keys.float(), dim=1))
        return keys[order.argsort()] if self.shuffle else keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Overwrite the oldest keys of the queue; keys (N, D) are those of all processes, so all queues stay equal."""
        place = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % len(self.queue))

    def forward(self, view_1, view_2, step, look=False):
        """view_1 (query), view_2 (key): uint8 (B, 3, S, S) -> (loss per sample (B,), figures if look else None).

        step: number of this step, which seeds the shuffling. figures: see contrastive_figures."""
        self.update_momentum_encoder()  # before the keys are computed, as in the official code
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(view_1) * world_size(), generator=generator).to(view_1.device)
        rank = dist.get_rank() if world_size() > 1 else 0
        mine = slice(rank * len(view_1), (rank + 1) * len(view_1))
        loss, all_keys, figures = 0, [], None
        for query_view, key_view in ((view_1, view_2), (view_2, view_1))[:2 if self.symmetric else 1]:
            features = self.backbone(normalize(query_view, self.mean, self.std))
            query = F.normalize(self.projector(features).float(), dim=1)
            keys = self.keys(key_view, order)
            loss = loss + info_nce(query, keys[mine], self.queue, self.temperature)
            figures = contrastive_figures(query, keys[mine], self.queue) if look else None
            all_keys.append(keys)
        self.enqueue(torch.cat(all_keys))  # after the logits: a key is never its own negative
        return loss, figures


@torch.no_grad()
def contrastive_figures(query, key, queue):
    """What shows whether a contrastive run is healthy, as tensors: share of queries whose own key is the nearest of
    all, and the mean standard deviation of the normalised features: 1/sqrt(D) when they fill the sphere, 0 collapsed.
    query, key: (B, D), queue: (K, D), rows normalised."""
    with torch.autocast(query.device.type, enabled=False):
        nearest = (query * key).sum(1) > (query @ queue.T).amax(1)
    return {'contrastive_top1': nearest.float().mean(), 'feature_std': query.std(0).mean()}


# ---------------------------------------------------------------------------------------------------
# Loading: our backbones and the state dicts that others publish

MOMENTUM_NAMES = ('encoder_k', 'momentum', 'teacher', 'target', 'ema')


def _guess_backbone(state, where):
    """arch, stem and width from the shapes of a torchvision or timm ResNet's state dict."""
    width, _, kernel, _ = state['conv1.weight'].shape
    block = Bottleneck if 'layer1.0.conv3.weight' in state else BasicBlock
    layers = tuple(len({k.split('.')[1] for k in state if k.startswith(f'layer{i}.')}) for i in (1, 2, 3, 4))
    for arch, known in BLOCKS.items():
        if known == (block, layers):
            return {'arch': arch, 'stem': 'cifar' if kernel == 3 else 'imagenet', 'width': width}
    raise Fail(f"{where}: a ResNet of {block.__name__} {layers} is none of {', '.join(BLOCKS)}")


def _names(keys):
    keys = sorted(keys)
    return ', '.join(keys[:8]) + (f', ... ({len(keys)})' if len(keys) > 8 else '')


def _part(key):
    """Name of the part of a foreign file that a key belongs to: module.encoder_k.conv1.weight -> module.encoder_k."""
    first, _, rest = key.partition('.')
    return f"{first}.{rest.partition('.')[0]}" if first == 'module' else first


def load_backbone(path):
    """Backbone in evaluation mode and what is known of it, from our backbone.pt or a torchvision/timm state dict.

    The state dict may stand under 'state_dict' or 'model', carry a prefix (module., backbone., encoder_q., ...) and a
    classifier `fc`, which is left out. Returns (module, {'arch', 'stem', 'width', 'mean', 'std', 'image_size',
    'feature_dim', 'note'}); mean, std and image_size are None in foreign files; note says what was left out.
    Raises Fail that names missing and unexpected keys."""
    content = load_checkpoint(path)
    info = {k: content.get(k) for k in ('arch', 'stem', 'width', 'mean', 'std', 'image_size')}
    state = next((content[k] for k in ('state_dict', 'model') if isinstance(content.get(k), dict)), content)
    stems = [k for k, v in state.items() if k.endswith('conv1.weight') and torch.is_tensor(v) and v.dim() == 4
             and v.shape[1] == 3]
    stems = [k for k in stems if not any(n in k for n in MOMENTUM_NAMES)] or stems
    if not stems:
        raise Fail(f"{path}: no ResNet in it (no '...conv1.weight' with 3 input channels); keys: {_names(state)}")
    if len(stems) > 1:
        raise Fail(f'{path}: several networks in it ({_names(stems)}); save the one that is meant alone')
    prefix = stems[0][:-len('conv1.weight')]
    outside = [k for k in state if not k.startswith(prefix)]
    state = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    head = [k for k in state if k.startswith('fc.')]
    state = {k: v for k, v in state.items() if k not in head}
    info.update({} if info['arch'] else _guess_backbone(state, path))
    module = build_backbone(info['arch'], info['stem'], info['width'])
    expected = module.state_dict()
    missing = {k for k in expected if k not in state and not k.endswith('num_batches_tracked')}  # absent in old files
    unexpected = set(state) - set(expected)
    shapes = [f'{k} {tuple(state[k].shape)} for {tuple(v.shape)}' for k, v in expected.items()
              if k in state and state[k].shape != v.shape]
    problems = [f'{what} {_names(keys)}' for what, keys in
                (('missing', missing), ('unexpected', unexpected), ('of another shape', shapes)) if keys]
    if problems:
        raise Fail(f"{path}: not a {info['arch']} ({info['stem']} stem, width {info['width']}): " + '; '.join(problems))
    module.load_state_dict({k: state.get(k, v) for k, v in expected.items()})
    notes = [text for text in (prefix and f"prefix '{prefix}' taken off",
                               head and f'classifier left out ({_names(head)})',
                               outside and f'left out: {_names({_part(k) for k in outside})}') if text]
    return module.eval(), {**info, 'feature_dim': module.feature_dim, 'note': '; '.join(notes)}
