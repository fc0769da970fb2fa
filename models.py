"""Encoders and SSL methods as nn.Modules: the frozen CLIP encoder and the quality of a pair, backbones, the methods
(METHODS: MoCo v2, MoCo v3, BYOL, SimSiam, SwAV, SimCLR, VICReg), frozen features and kNN, loading and exporting.

    python models.py CHECKPOINT FOLDER [arch=...] [heads=...] [prefix=...]

writes any backbone that load_backbone knows into FOLDER: backbone.pth (plain torchvision or timm state dict),
backbone.json (architecture and normalisation) and, of a ResNet, detectron2.pth with detectron2.json."""
import difflib
import hashlib
import json
import logging
import math
import re
import sys
from contextlib import closing, suppress
from copy import deepcopy
from functools import partial
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from tqdm import tqdm

from common import Fail, load_checkpoint, save_checkpoint, save_json
from loss import (info_nce, info_nce_batch, negative_cosine, nt_xent, pair_quality, quality_weights, sinkhorn,
                  swapped_prediction, vicreg)

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


class Quality:
    """Weights of a batch of pairs from the frozen encoder (GenView eq. 10-14), which sees the very same views.

    All pairs are weighted, those without a synthetic view too, as in the official code."""

    def __init__(self, config, device):
        path = Path(config['pc'] or '')
        if not path.is_file():
            raise Fail(f"quality.pc: {config['pc']}: no such file; fg_proportion.py writes it as fg_proportion.npz")
        try:
            loaded = np.load(path)
            pc = np.asarray(loaded['pc'] if path.suffix == '.npz' else loaded, np.float32).reshape(-1)
            encoder = str(loaded['encoder']) if path.suffix == '.npz' and 'encoder' in loaded else None
        except (KeyError, ValueError, OSError) as error:
            raise Fail(f'quality.pc: {path}: no principal component in it ({error})') from None
        self.clip, self.temperature = FrozenClip(config['clip'], device), config['temperature']
        if len(pc) != self.clip.token_dim:
            raise Fail(f"quality.pc: {path} has width {len(pc)}, tokens of {config['clip']['model']} have "
                       f'{self.clip.token_dim}: run fg_proportion.py with this encoder')
        if encoder not in (None, self.clip.fingerprint()):
            raise Fail(f"quality.pc: {path} was made with other weights than {config['clip']['model']}: run "
                       'fg_proportion.py with this encoder')
        self.pc = torch.from_numpy(pc).to(device)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (self.clip.mean, self.clip.std))

    @torch.no_grad()
    def __call__(self, view_1, view_2):
        """uint8 views (B, 3, S, S) -> weights (B,) of mean 1 over the global batch, quality (B,)."""
        images = normalize(torch.cat([view_1, view_2]), self.mean, self.std)
        if images.shape[-1] != self.clip.image_size:
            images = F.interpolate(images, size=self.clip.image_size, mode='bilinear')
        quality = pair_quality(*self.clip.tokens(images).chunk(2), self.pc)
        return quality_weights(quality, self.temperature), quality


# ---------------------------------------------------------------------------------------------------
# Backbones: torchvision's ResNets with a stem for small images and a width key, timm's ViT as MoCo v3 uses it

BLOCKS = {'resnet18': (BasicBlock, (2, 2, 2, 2)), 'resnet34': (BasicBlock, (3, 4, 6, 3)),
          'resnet50': (Bottleneck, (3, 4, 6, 3)), 'resnet101': (Bottleneck, (3, 4, 23, 3))}
VITS = {'vit_small': 384, 'vit_base': 768}  # width; both have 12 blocks and 12 heads


class Backbone(ResNet):
    """ResNet without classifier: images (B, 3, H, W) -> features (B, feature_dim); torchvision's parameter names.

    stem: 'imagenet' (7x7 stride 2 and max-pool) or 'cifar' (3x3 stride 1, no max-pool: GenView appendix A).
    width: channels of the first stage (64 as published; 32 has a quarter of the cost).
    """

    def __init__(self, arch, stem='imagenet', width=64, zero_init_residual=False, norm_layer=None):
        self.width = width  # read by _make_layer, which ResNet's constructor calls
        block, layers = BLOCKS[arch]
        super().__init__(block, list(layers), zero_init_residual=zero_init_residual, norm_layer=norm_layer)
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


class ViT(VisionTransformer):
    """Vision transformer of MoCo v3: images (B, 3, H, W) -> class token after the last norm (B, feature_dim); timm's
    parameter names. Fixed 2-D sin-cos position embedding, frozen random patch embedding, 12 heads at any width: timm's
    and DeiT's vit_small has 6 and reads the same weights without complaint, to no use. Another image size than that of
    training interpolates the position embedding."""

    def __init__(self, arch, patch_size=16, image_size=224):
        self.feature_dim = width = VITS[arch]
        super().__init__(img_size=image_size, patch_size=patch_size, embed_dim=width, depth=12, num_heads=12,
                         num_classes=0, weight_init='moco', dynamic_img_size=True)
        bound = (6 / (3 * patch_size ** 2 + width)) ** 0.5
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(self.patch_embed.proj.bias)
        row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in self.patch_embed.grid_size),
                                     indexing='ij')
        frequency = 10_000 ** (-torch.arange(width // 4, dtype=torch.float32) / (width // 4))
        angles = [place.reshape(-1, 1) * frequency for place in (row, column)]
        places = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
        self.pos_embed = nn.Parameter(torch.cat([torch.zeros(1, width), places])[None])  # nothing for the class token
        for frozen in (self.pos_embed, *self.patch_embed.parameters()):
            frozen.requires_grad_(False)


def build_backbone(arch, stem='imagenet', width=64, patch_size=16, image_size=224, zero_init_residual=False,
                   norm_layer=None):
    """Backbone by name (a key of BLOCKS or VITS), randomly initialised. What belongs to the other kind is not used."""
    if arch in VITS:
        if patch_size < 1 or image_size % patch_size:
            raise Fail(f'backbone.patch_size: {patch_size} pixels do not divide the {image_size} of image_size')
        return ViT(arch, patch_size, image_size)
    if arch not in BLOCKS:
        raise Fail(f"backbone.arch: '{arch}' is unknown; there are {', '.join([*BLOCKS, *VITS])}")
    if stem not in ('imagenet', 'cifar'):
        raise Fail(f"backbone.stem: '{stem}' is unknown; there are imagenet, cifar")
    if width < 8 or width % 8:
        raise Fail(f'backbone.width: {width} must be a multiple of 8')
    return Backbone(arch, stem, width, zero_init_residual, norm_layer)


def describe(backbone):
    """Of the keys of a backbone those that its kind has, for files, and words for the log."""
    if backbone['arch'] in VITS:
        return ({'arch': backbone['arch'], 'patch_size': backbone['patch_size'], 'heads': 12},
                f"{backbone['arch']} (patches of {backbone['patch_size']} px, 12 heads)")
    kept = {key: backbone[key] for key in ('arch', 'stem', 'width')}
    return kept, f"{kept['arch']} (width {kept['width']}, {kept['stem']} stem)"


# ---------------------------------------------------------------------------------------------------
# Processes and batch norm

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def gather(tensor):
    """(B, ...) on each process -> (world * B, ...) on all of them, in order of rank; no gradient flows."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


def global_mean(tensor):
    """Mean over the processes of a scalar tensor, as a float."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor.item()


def average_running_statistics(model):
    """Processes keep their own batch norm statistics while they train; what is saved is their mean, on all of them."""
    if dist.is_initialized():
        for name, buffer in model.named_buffers():
            if name.endswith(('running_mean', 'running_var')):
                dist.all_reduce(buffer)
                buffer /= dist.get_world_size()


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


class _ProcessMean(torch.autograd.Function):
    """Mean over the processes. Each has a loss of its own that depends on it: backward adds up their gradients, and
    the share of each process in the mean is 1 / world."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor / dist.get_world_size()

    @staticmethod
    def backward(ctx, gradient):
        return _ProcessMean.forward(ctx, gradient)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and 2d with the statistics of the global batch, on any device: torch's SyncBatchNorm needs a GPU.
    Every process must hold equally many samples."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        shape, axes = [1, -1] + [1] * (x.dim() - 2), [0, *range(2, x.dim())]
        values = x.float()
        mean = _ProcessMean.apply(values.mean(axes))
        centred = values - mean.view(shape)
        variance = _ProcessMean.apply(centred.square().mean(axes))  # two passes: E[x^2] - E[x]^2 would cancel
        with torch.no_grad():
            count = world_size() * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked += 1
        values = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            values = values * self.weight.view(shape) + self.bias.view(shape)
        return values.to(x.dtype)


def synchronize_batch_norm(model, device):
    """Every BatchNorm of `model` takes the statistics of the global batch from now on. In one process it does."""
    if world_size() > 1 and device.type == 'cuda':
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if world_size() > 1:
        for module in model.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
                module.__class__ = GlobalBatchNorm  # same parameters and buffers under the same names
    return model


# ---------------------------------------------------------------------------------------------------
# The methods

def normalize(images, mean, std):
    """uint8 images (B, 3, H, W) -> float32, channels last; mean and std are (1, 3, 1, 1) for values in [0, 1]."""
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.sub_(mean * 255).div_(std * 255)


def mlp(*sizes, bias=False, last_bias=False):
    """Linear - BatchNorm - ReLU for each hidden size and a Linear at the end."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:-1]):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=last_bias))


def cosine(start, end, step, total):
    """Half a cosine from start (step 0) to end (step `total`)."""
    return end - (end - start) * (math.cos(math.pi * step / total) + 1) / 2


@torch.no_grad()
def follow(slow, fast, momentum):
    """Exponential moving average of the parameters alone: batch norm keeps statistics of its own."""
    torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), 1 - momentum)


@torch.no_grad()
def feature_std(features):
    """Mean standard deviation of the L2-normalised features (B, D) of the global batch: 1/sqrt(D) when they are spread
    over all of the sphere, 0 when they have collapsed."""
    return gather(F.normalize(features.float(), dim=1)).std(0, correction=0).mean()


@torch.no_grad()
def batch_top1(query, key):
    """Share of the queries whose own key is the nearest of the global batch; (B, D) each, rows normalised."""
    with torch.autocast(query.device.type, enabled=False):
        nearest = (query.float() @ gather(key.float()).T).argmax(1)
    return (nearest == rank() * len(query) + torch.arange(len(query), device=query.device)).float().mean()


class Method(nn.Module):
    """What the methods share. A step is: before_step(step), forward once per micro-batch, backward, grad = None for the
    parameters in frozen(step), optimizer, after_step(step).

    forward(views, step, look=False): views, a list of uint8 (B, 3, S_k, S_k) of this process, is the pair and, for
    SwAV, small crops. Returns loss (B,), extra () and figures. The loss of the process is (weights * loss).mean() +
    extra; figures are scalars that show whether the run is healthy, {} unless look. All processes must call it alike.

    backbone: keywords of build_backbone, zero_init_residual null for the method's own. mean, std: normalisation of the
    views, 3 floats each. total_steps, steps_per_epoch: for schedules, which are functions of the step alone."""
    sync_bn = True                  # batch norm over the global batch
    zero_init_residual = False      # as torchvision's ResNets start, unless the official code says otherwise
    fix_predictor_lr = False        # the predictor's learning rate stays at its start

    def __init__(self, backbone, norm_layer=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), seed=0,
                 total_steps=1, steps_per_epoch=1):
        super().__init__()
        zero = backbone.get('zero_init_residual')
        zero = self.zero_init_residual if zero is None else zero
        self.new_backbone = partial(build_backbone, **{**backbone, 'zero_init_residual': zero}, norm_layer=norm_layer)
        self.backbone = self.new_backbone()
        self.seed, self.total_steps, self.steps_per_epoch = seed, total_steps, steps_per_epoch
        self.register_buffer('mean', torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def features(self, view):
        return self.backbone(normalize(view, self.mean, self.std))

    def before_step(self, step):
        pass

    def after_step(self, step):
        pass

    def frozen(self, step):
        return ()


class MoCoV2(Method):
    """MoCo v2 (He et al. 2020; Chen et al. 2020), details after facebookresearch/moco and its CIFAR notebook.

    backbone, projector: query side. momentum_backbone, momentum_projector: exponential moving average of the
    parameters alone; their batch norm runs in train mode on its own statistics. queue (K, D): keys of the past.

    bn_splits: batch norm sees the global batch in this many groups, and the keys are shuffled between the groups, so
    that a query and its key share no statistics that would give the pair away. The groups are spread over the
    processes: the result does not depend on how many there are.
    """
    sync_bn = False

    def __init__(self, backbone, dim=128, queue=65536, momentum=0.999, temperature=0.2, bn_splits=8, symmetric=False,
                 **common):
        splits = bn_splits // world_size()
        super().__init__(backbone, partial(SplitBatchNorm2d, splits=splits) if splits > 1 else None, **common)
        width = self.backbone.feature_dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        self.momentum_backbone = deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)
        self.momentum, self.temperature, self.symmetric = momentum, temperature, symmetric
        self.shuffle = bn_splits > 1
        self.register_buffer('queue', F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer('queue_pointer', torch.zeros((), dtype=torch.long))

    def before_step(self, step):
        """The keys come from encoders that already follow the last step, as in the official code."""
        follow(self.momentum_backbone, self.backbone, self.momentum)
        follow(self.momentum_projector, self.projector, self.momentum)

    @torch.no_grad()
    def keys(self, images, order):
        """Keys of the global batch (world * B, D), unshuffled, from this process's uint8 images (B, 3, H, W).

        order: permutation of the global batch; process r encodes the r-th part of the permuted batch."""
        local = len(images)
        if self.shuffle:
            images = gather(images)[order[rank() * local:(rank() + 1) * local]]
        keys = self.momentum_projector(self.momentum_backbone(normalize(images, self.mean, self.std)))
        keys = gather(F.normalize(keys.float(), dim=1))
        return keys[order.argsort()] if self.shuffle else keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Overwrite the oldest keys of the queue; keys (N, D) are those of all processes, so all queues stay equal."""
        place = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % len(self.queue))

    def forward(self, views, step, look=False):
        """views: query, key. The number of the step seeds the shuffling. See Method."""
        view_1, view_2 = views
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(view_1) * world_size(), generator=generator).to(view_1.device)
        mine = slice(rank() * len(view_1), (rank() + 1) * len(view_1))
        loss, all_keys, figures = 0, [], {}
        for query_view, key_view in ((view_1, view_2), (view_2, view_1))[:2 if self.symmetric else 1]:
            query = F.normalize(self.projector(self.features(query_view)).float(), dim=1)
            keys = self.keys(key_view, order)
            loss = loss + info_nce(query, keys[mine], self.queue, self.temperature)
            figures = self.figures(query, keys[mine]) if look else {}
            all_keys.append(keys)
        self.enqueue(torch.cat(all_keys))  # after the logits: a key is never its own negative
        return loss, loss.new_zeros(()), figures

    @torch.no_grad()
    def figures(self, query, key):
        """query, key: (B, D). contrastive_top1: share of the queries whose own key is nearer than all of the queue."""
        with torch.autocast(query.device.type, enabled=False):
            nearest = (query * key).sum(1) > (query @ self.queue.T).amax(1)
        return {'contrastive_top1': nearest.float().mean(), 'feature_std': feature_std(query)}


class MoCoV3(Method):
    """MoCo v3 (Chen, Xie, He 2021), after facebookresearch/moco-v3. A view's negatives are the other keys of the global
    batch; both directions count.

    Projector: 2 layers (ViT: 3), batch norm without scale and shift at its end. Predictor: 2 layers, for ViT with such
    a batch norm. No bias in either. Loss 2 T (l(q1, k2) + l(q2, k1)). ResNets start with zero residuals (GenView's own
    config: without). The momentum goes to 1 on a cosine per step. SyncBatchNorm."""
    zero_init_residual = True

    def __init__(self, backbone, dim=256, hidden=4096, momentum=0.99, momentum_end=1.0, temperature=1.0, **common):
        super().__init__(backbone, **common)
        vit, width = isinstance(self.backbone, ViT), self.backbone.feature_dim
        self.projector = mlp(width, *[hidden] * (2 if vit else 1), dim).append(nn.BatchNorm1d(dim, affine=False))
        self.predictor = mlp(dim, hidden, dim).append(nn.BatchNorm1d(dim, affine=False) if vit else nn.Identity())
        self.momentum_backbone = deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)
        self.momentum, self.momentum_end, self.temperature = momentum, momentum_end, temperature

    def before_step(self, step):
        """Official: between queries and keys, which comes to the same: the queries do not change a parameter."""
        momentum = cosine(self.momentum, self.momentum_end, step, self.total_steps)
        follow(self.momentum_backbone, self.backbone, momentum)
        follow(self.momentum_projector, self.projector, momentum)

    @torch.no_grad()
    def key(self, view):
        features = self.momentum_backbone(normalize(view, self.mean, self.std))
        return F.normalize(self.momentum_projector(features).float(), dim=1)

    def forward(self, views, step, look=False):
        """views: the pair. See Method."""
        query_1, query_2 = (F.normalize(self.predictor(self.projector(self.features(v))).float(), dim=1) for v in views)
        key_1, key_2 = (self.key(v) for v in views)
        loss = 2 * self.temperature * (info_nce_batch(query_1, key_2, self.temperature)
                                       + info_nce_batch(query_2, key_1, self.temperature))
        figures = {'contrastive_top1': batch_top1(query_1, key_2), 'feature_std': feature_std(query_1)} if look else {}
        return loss, loss.new_zeros(()), figures


class BYOL(Method):
    """BYOL (Grill et al. 2020), after deepmind-research/byol: predict the momentum encoder's projection of the other
    view; no negatives.

    Projector and predictor: Linear with bias, batch norm, ReLU, Linear without bias, initialised as haiku does
    (truncated normal of std 1/sqrt(inputs), bias 0); the backbone as torchvision does. The momentum network starts from
    its own random draw (paper and mmselfsup: a copy) and follows after the optimizer's step, momentum to 1 on a cosine.
    Bottleneck ResNets start with zero residuals (mmselfsup's, GenView's source: without), those of basic blocks do not.
    SyncBatchNorm. fix_predictor_lr: see SimSiam."""

    def __init__(self, backbone, dim=256, hidden=4096, momentum=0.99, momentum_end=1.0, fix_predictor_lr=False,
                 **common):
        self.zero_init_residual = BLOCKS.get(backbone['arch'], [None])[0] is Bottleneck
        super().__init__(backbone, **common)
        self.momentum, self.momentum_end, self.fix_predictor_lr = momentum, momentum_end, fix_predictor_lr
        self.projector, self.predictor, self.momentum_projector = (
            mlp(width, hidden, dim, bias=True) for width in (self.backbone.feature_dim, dim, self.backbone.feature_dim))
        for layer in (*self.projector, *self.predictor, *self.momentum_projector):
            if isinstance(layer, nn.Linear):
                std = layer.in_features ** -0.5
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.momentum_backbone = self.new_backbone().requires_grad_(False)
        self.momentum_projector.requires_grad_(False)

    def after_step(self, step):
        momentum = cosine(self.momentum, self.momentum_end, step, self.total_steps)
        follow(self.momentum_backbone, self.backbone, momentum)
        follow(self.momentum_projector, self.projector, momentum)

    @torch.no_grad()
    def target(self, view):
        return self.momentum_projector(self.momentum_backbone(normalize(view, self.mean, self.std)))

    def forward(self, views, step, look=False):
        """views: the pair. See Method."""
        projection_1, projection_2 = (self.projector(self.features(v)) for v in views)
        target_1, target_2 = (self.target(v) for v in views)
        loss = 4 + 2 * (negative_cosine(self.predictor(projection_1), target_2)
                        + negative_cosine(self.predictor(projection_2), target_1))
        return loss, loss.new_zeros(()), {'feature_std': feature_std(projection_1)} if look else {}


class SimSiam(Method):
    """SimSiam (Chen & He 2021), after facebookresearch/simsiam: one encoder, a predictor and a stopped gradient.

    Projector: 3 layers as wide as the features, batch norm without scale and shift at its end and therefore a frozen
    bias before it. Predictor: a bottleneck, plain Linear at its end; fix_predictor_lr keeps its learning rate constant.
    Zero residuals at the start. SyncBatchNorm. Loss: mean of the two directions."""
    zero_init_residual = True

    def __init__(self, backbone, dim=2048, hidden=512, fix_predictor_lr=True, **common):
        super().__init__(backbone, **common)
        width, self.fix_predictor_lr = self.backbone.feature_dim, fix_predictor_lr
        self.projector = mlp(width, width, width, dim, last_bias=True).append(nn.BatchNorm1d(dim, affine=False))
        self.projector[-2].bias.requires_grad_(False)
        self.predictor = mlp(dim, hidden, dim, last_bias=True)

    def forward(self, views, step, look=False):
        """views: the pair. See Method."""
        z1, z2 = (self.projector(self.features(v)) for v in views)
        loss = (negative_cosine(self.predictor(z1), z2) + negative_cosine(self.predictor(z2), z1)) / 2
        return loss, loss.new_zeros(()), {'feature_std': feature_std(z1)} if look else {}


class SwAV(Method):
    """SwAV (Caron et al. 2020), after facebookresearch/swav: predict the cluster assignment of a crop from the others.

    The first two views, the large crops, get codes, over the global batch and the queue; every other crop predicts
    them. They are the pair of GenView: its quality weights all terms of the sample, those of small crops too (neither
    GenView's paper nor its code says how it was done).

    Crops of one size share a pass and so batch norm statistics. Projector: one hidden layer with batch norm. Prototypes
    are normalised before each step and learn after the first `freeze_prototypes`. queue (2, Q, D): projections of the
    last Q samples, from the epoch on that is named, in use once it is full; the global one on every process, so that a
    run may change their number (official: a file per process). SyncBatchNorm over the global batch (official: at batch
    4096 over groups of 8 GPUs). No zero residuals at the start (mmselfsup's, GenView's source: with)."""

    def __init__(self, backbone, dim=128, hidden=2048, prototypes=3000, temperature=0.1, epsilon=0.05, iterations=3,
                 queue=3840, queue_from_epoch=15, freeze_prototypes=5005, **common):
        super().__init__(backbone, **common)
        self.projector = mlp(self.backbone.feature_dim, hidden, dim, bias=True, last_bias=True)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_from_step, self.freeze_prototypes = queue_from_epoch * self.steps_per_epoch, freeze_prototypes
        self.register_buffer('queue', torch.zeros(2, queue, dim))
        self.queue_is_full = [False, False]  # read from the queue until it is: a GPU has to be waited for

    @torch.no_grad()
    def before_step(self, step):
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def frozen(self, step):
        return self.prototypes.parameters() if step < self.freeze_prototypes else ()

    @torch.no_grad()
    def codes(self, crop, z, scores, step):
        """Codes (B, K) of large crop 0 or 1 with projections z (B, D) and scores (B, K); z joins the queue."""
        queue, rows = self.queue[crop], scores
        if len(queue) and step >= self.queue_from_step:
            self.queue_is_full[crop] = self.queue_is_full[crop] or bool(queue[-1].any())
            if self.queue_is_full[crop]:
                share = len(queue) // world_size()
                rows = torch.cat([self.prototypes(queue[rank() * share:(rank() + 1) * share]), scores])
            queue.copy_(torch.cat([gather(z), queue])[:len(queue)])
        return sinkhorn(rows, self.epsilon, self.iterations)[-len(scores):]

    def forward(self, views, step, look=False):
        """views: two large crops, the pair, and any number of small ones. See Method."""
        features = [self.features(torch.cat(list(crops))) for _, crops in groupby(views, lambda view: view.shape[-1])]
        z = F.normalize(self.projector(torch.cat(features)).float(), dim=1)
        with torch.autocast(z.device.type, enabled=False):  # divided by 0.05: bf16 would show
            scores, loss = self.prototypes(z).chunk(len(views)), 0
            for crop in (0, 1):
                codes = self.codes(crop, z.chunk(len(views))[crop], scores[crop], step)
                terms = [swapped_prediction(other, codes, self.temperature)
                         for k, other in enumerate(scores) if k != crop]
                loss = loss + sum(terms) / len(terms) / 2
        return loss, loss.new_zeros(()), self.figures(z[:len(views[0])], scores[0]) if look else {}

    @torch.no_grad()
    def figures(self, z, scores):
        """assignment_entropy: of the shares of the global batch whose nearest prototype is k, relative to the largest
        possible one; 0 when one prototype has all samples."""
        nearest, prototypes = gather(scores.argmax(1)), scores.shape[1]
        share = torch.bincount(nearest, minlength=prototypes) / len(nearest)
        entropy = torch.special.entr(share).sum() / math.log(min(prototypes, len(nearest)))
        return {'assignment_entropy': entropy, 'feature_std': feature_std(z)}


class SimCLR(Method):
    """SimCLR (Chen et al. 2020), after google-research/simclr: NT-Xent over all views of the global batch, with
    gradient to all of them.

    Both views share a pass and so batch norm statistics. Projector: hidden layers as wide as the features, no bias,
    normal initialisation of std 0.01, batch norm without shift at its end (norm=False: Linear with bias, ReLU, Linear,
    as COP-Gen's code); the backbone is initialised as torchvision does. Loss: sum of the two directions as in the
    official code (paper and SupConLoss: their mean). Zero residuals at the start. Batch norm over the global batch."""
    zero_init_residual = True

    def __init__(self, backbone, dim=128, layers=2, norm=True, temperature=0.1, **common):
        super().__init__(backbone, **common)
        sizes, self.temperature = [self.backbone.feature_dim] * layers + [dim], temperature
        if norm:
            self.projector = mlp(*sizes).append(nn.BatchNorm1d(dim))
            self.projector[-1].bias.requires_grad_(False)
            for layer in self.projector:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.01)
        else:
            hidden = [(nn.Linear(a, b), nn.ReLU(inplace=True)) for a, b in zip(sizes, sizes[1:-1])]
            self.projector = nn.Sequential(*sum(hidden, ()), nn.Linear(*sizes[-2:]))

    def forward(self, views, step, look=False):
        """views: the pair. See Method."""
        z1, z2 = F.normalize(self.projector(self.features(torch.cat(views))).float(), dim=1).chunk(2)
        loss = 2 * nt_xent(z1, z2, self.temperature)
        figures = {'contrastive_top1': batch_top1(z1, z2), 'feature_std': feature_std(z1)} if look else {}
        return loss, loss.new_zeros(()), figures


class VICReg(Method):
    """VICReg (Bardes et al. 2022), after facebookresearch/vicreg: like projections of the two views (invariance), with
    spread in every dimension (variance) and little correlation between them (covariance).

    The weights of the pairs act on the invariance; variance and covariance are of the global batch and come as `extra`.
    Expander: two hidden layers with bias and batch norm, Linear without bias. Zero residuals at the start.
    SyncBatchNorm."""
    zero_init_residual = True

    def __init__(self, backbone, dim=8192, hidden=8192, invariance=25.0, variance=25.0, covariance=1.0, **common):
        super().__init__(backbone, **common)
        self.projector = mlp(self.backbone.feature_dim, hidden, hidden, dim, bias=True)
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def forward(self, views, step, look=False):
        """views: the pair. See Method."""
        z1, z2 = (self.projector(self.features(v)) for v in views)
        invariance, variance, covariance = vicreg(z1, z2)
        extra = self.variance * variance + self.covariance * covariance
        return self.invariance * invariance, extra, {'feature_std': feature_std(z1)} if look else {}


METHODS = {'mocov2': MoCoV2, 'mocov3': MoCoV3, 'byol': BYOL, 'simsiam': SimSiam, 'swav': SwAV, 'simclr': SimCLR,
           'vicreg': VICReg}


# ---------------------------------------------------------------------------------------------------
# Frozen features and kNN

class Encoder:
    """Frozen backbone with its normalisation: uint8 (B, 3, S, S) -> float32 features (B, D)."""

    def __init__(self, backbone, mean, std, device, dtype):
        self.backbone = backbone.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def __call__(self, images):
        images = normalize(images.to(self.device, non_blocking=True), self.mean, self.std)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return self.backbone(images).float()


def all_features(loader_of, n, encoder, processes, what, stop=False):
    """Features (N, D) and labels (N,) of n images, in their order, on the CPU of every process. None instead when
    `stop` has become true on one of them.

    loader_of: function of positions (an array, not empty) -> PairLoader over them, in order and with the last batch.
    Each process encodes every world-th image: none is encoded twice, whatever n is. Half precision is kept as such."""
    mine = np.arange(processes.rank, n, processes.world)
    features, labels = [], []
    kept = torch.float32 if encoder.dtype == torch.float32 else torch.float16  # as exact, and ImageNet's fit in memory
    loader = loader_of(mine) if len(mine) else None
    shared = torch.tensor(len(loader) if loader else 0)  # batches that every process has: there they can ask each other
    if dist.is_initialized():
        dist.all_reduce(shared, dist.ReduceOp.MIN)
    with closing(loader.epoch(0) if loader else (_ for _ in ())) as batches:
        bar = tqdm(batches, what, len(loader or ()), disable=None if processes.main else True)
        for number, batch in enumerate(bar):
            if number < shared and processes.any(stop):
                return None
            features.append(encoder(batch['views'][0]).to(kept).cpu())
            labels.append(batch['label'])
    width = encoder.backbone.feature_dim
    features = torch.cat([torch.empty(0, width, dtype=kept), *features])
    labels = torch.cat([torch.empty(0).long(), *labels])
    share = -(-n // processes.world)  # the last processes may have one less: padded to travel, cut off again
    features = F.pad(features, (0, 0, 0, share - len(features))).to(processes.device)
    labels = F.pad(labels, (0, share - len(labels))).to(processes.device)
    features, labels = (gather(t).view(processes.world, share, *t.shape[1:]).transpose(0, 1).flatten(0, 1)[:n].cpu()
                        for t in (features, labels))
    return features, labels


def hits(scores, labels):
    """How many rows of scores (B, C) have their label (B,) first, and among the first five: tensor (2,)."""
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([best[:, 0].sum(), best.any(1).sum()]).double()


def percent(counts, n, processes):
    """Hits (K,) of this process's share of n images (a number or (K,)) -> percent over all processes, a list."""
    if dist.is_initialized():
        counts = counts.to(processes.device)
        dist.all_reduce(counts)
    return [round(v, 3) for v in (100 * counts / n).tolist()]


def knn_accuracy(train, train_labels, test, test_labels, classes, k, temperature, batch, processes):
    """Weighted kNN (Wu et al. 2018): the k nearest by cosine vote with exp(cosine / temperature). [top-1, top-5]."""
    device = processes.device
    kept = train.dtype if device.type == 'cuda' else torch.float32  # ImageNet's features: 5 GB of a GPU, not 10
    train = torch.cat([F.normalize(part.to(device).float(), dim=1).to(kept) for part in train.split(65536)])
    train_labels = train_labels.to(device)
    counts = torch.zeros(2, dtype=torch.double, device=device)
    for chunk in torch.arange(len(test))[processes.rank::processes.world].split(batch):
        query = F.normalize(test[chunk].to(device).float(), dim=1)
        cosines, nearest = (query.to(kept) @ train.T).float().topk(k, dim=1)
        votes = torch.zeros(len(chunk), classes, device=device)
        votes.scatter_add_(1, train_labels[nearest], (cosines / temperature).exp())
        counts += hits(votes, test_labels[chunk].to(device))
    return percent(counts, len(test), processes)


# ---------------------------------------------------------------------------------------------------
# Loading: our backbones and the files that others publish; exporting

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


def digest(module):
    """sha256 of all parameters and buffers, byte for byte."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _names(keys):
    keys = sorted(keys)
    return ', '.join(keys[:8]) + (f', ... ({len(keys)})' if len(keys) > 8 else '')


def _tensors(value, name=''):
    """Nested dicts -> {'dotted.name': tensor}."""
    if torch.is_tensor(value):
        return {name: value}
    inner = value.items() if isinstance(value, dict) else ()
    parts = [_tensors(v, f'{name}.{k}' if name else str(k)) for k, v in inner]
    return {key: tensor for part in parts for key, tensor in part.items()}


def _find(tensors, layouts, prefix, path):
    """The network that is meant: its prefix and the name of its first convolution, a key of layouts."""
    found = {}
    for key, value in tensors.items():
        fits = [name for name in layouts if f'.{key}'.endswith(f'.{name}')]
        if fits and value.dim() == 4 and value.shape[1] == 3 and not re.search(r'(^|\.)clip', key):  # GenView's judge
            first = max(fits, key=len)
            found[key[:-len(first)]] = first
    if prefix is not None:
        asked = f".{prefix.rstrip('.')}." if prefix else '.'
        fits = {p: first for p, first in found.items() if f'.{p}'.endswith(asked)}
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
        from data import NORMALIZATIONS
        name = config['normalization'] or 'clip'
        mean, std = NORMALIZATIONS[name] if isinstance(name, str) else name
        return {**describe(config['backbone'])[0], 'mean': mean, 'std': std, 'image_size': config['image_size']}
    with suppress(OSError, ValueError, TypeError):
        card = json.loads(Path(path).with_suffix('.json').read_text())
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
        named = content.get('arch')  # timm's training script writes it
        named = arch or (named if isinstance(named, str) and timm.is_model(named) else None)
        info['arch'] = None if named in (*BLOCKS, *VITS) else named
    layouts, vits = LAYOUTS, TIMM_VITS.values()
    if info['arch'] and info['arch'] not in (*BLOCKS, *VITS, *vits):
        module, text = _build(info)
        layouts = {**LAYOUTS, **{k: () for k, v in module.state_dict().items() if v.dim() == 4 and v.shape[1] == 3}}

    tensors = _tensors(content)
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


# ---------------------------------------------------------------------------------------------------
# Export

def detectron2_name(name):
    """torchvision's name of a ResNet's parameter -> detectron2's, as in MoCo's convert-pretrain-to-detectron2.py."""
    name = name if name.startswith('layer') else f'stem.{name}'
    name = re.sub(r'^layer(\d)', lambda m: f'res{int(m[1]) + 1}', name)
    name = re.sub(r'bn(\d)', r'conv\1.norm', name)
    return name.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')


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
        mean, std = info['mean'] or (0.485, 0.456, 0.406), info['std'] or (0.229, 0.224, 0.225)
        settings = {'MODEL.PIXEL_MEAN': [255 * v for v in mean], 'MODEL.PIXEL_STD': [255 * v for v in std],
                    'MODEL.RESNETS.DEPTH': int(info['arch'].removeprefix('resnet')),
                    'MODEL.RESNETS.STEM_OUT_CHANNELS': info['width'], 'MODEL.RESNETS.WIDTH_PER_GROUP': info['width'],
                    'MODEL.RESNETS.RES2_OUT_CHANNELS': info['feature_dim'] // 8,
                    'MODEL.RESNETS.STRIDE_IN_1X1': False, 'INPUT.FORMAT': 'RGB'}
        save_json(folder / 'detectron2.json', {'settings': settings, 'names': names})
    return f"{folder}: {info['text']}, {info['feature_dim']} features{'; ' * bool(note)}{note}"


if __name__ == '__main__':
    if len(sys.argv) < 3 or not all(re.match('(arch|heads|prefix)=', word) for word in sys.argv[3:]):
        sys.exit('usage: python models.py CHECKPOINT FOLDER [arch=...] [heads=...] [prefix=...]')
    words = dict(word.split('=', 1) for word in sys.argv[3:])
    try:
        print(export(*sys.argv[1:3], **{k: int(v) if k == 'heads' and v.isdigit() else v for k, v in words.items()}))
    except Fail as error:
        print(f'models.py: {error}', file=sys.stderr)
        sys.exit(2)
