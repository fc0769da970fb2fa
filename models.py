"""Backbones, batch norm over the global batch, and the SSL methods as nn.Modules (METHODS: MoCo v2, MoCo v3, BYOL,
SimSiam, SwAV, SimCLR, SupCon, VICReg, NNCLR)."""
import math
import warnings
from copy import deepcopy
from functools import partial
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from config import Fail
from loss import (info_nce, info_nce_batch, negative_cosine, nnclr, nt_xent, sinkhorn, sup_con, swapped_prediction,
                  vicreg)


def normalize(images, mean, std):
    """Images (B, 3, H, W), uint8 or 0..255 -> float32, channels last; mean and std (1, 3, 1, 1) are of 0..1."""
    images = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    return images.sub_(mean * 255).div_(std * 255)


# ---------------------------------------------------------------------------------------------------
# Backbones: torchvision's ResNets with a stem for small images and a width key (for the ViT see vit.py)

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


def build_backbone(arch, stem='imagenet', width=64, patch_size=16, image_size=224, zero_init_residual=False,
                   norm_layer=None):
    """Backbone by name (a key of BLOCKS or VITS), randomly initialised. What belongs to the other kind is not used."""
    if arch in VITS:
        if patch_size < 1 or image_size % patch_size:
            raise Fail(f'backbone.patch_size: {patch_size} pixels do not divide the {image_size} of image_size')
        from vit import ViT  # timm takes as long to import as torch
        return ViT(arch, patch_size, image_size)
    if width % 8:
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


def distributed(model, device):
    """The model as it is called in training: of several processes each gets the mean of their gradients."""
    if not dist.is_initialized():
        return model
    warnings.filterwarnings('ignore', message='.*broadcast_buffers')  # torch 2.15's new name is too new
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None,
                                   broadcast_buffers=False, gradient_as_bucket_view=True)


def average(tensors):
    """In place, over the processes."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def average_running_statistics(model):
    """Processes keep their own batch norm statistics while they train; what is saved is their mean, on all of them."""
    average(buffer for name, buffer in model.named_buffers() if name.endswith(('running_mean', 'running_var')))


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
    if world_size() == 1:
        return model
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    odd = {type(norm).__name__ for norm in norms} - {'BatchNorm1d', 'BatchNorm2d'}
    if device.type == 'cuda':
        if odd:  # timm's apply the activation too, which torch's conversion would leave out
            from timm.layers import convert_sync_batchnorm
            return convert_sync_batchnorm(model)
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if odd:
        raise Fail(f"{', '.join(odd)} of this network cannot be trained by several processes on CPUs: start one")
    for norm in norms:
        norm.__class__ = GlobalBatchNorm  # same parameters and buffers under the same names
    return model


# ---------------------------------------------------------------------------------------------------
# The methods

def mlp(*sizes, bias=False, last_bias=False):
    """Linear - BatchNorm - ReLU for each hidden size and a Linear at the end."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:-1]):
        layers += [nn.Linear(inputs, outputs, bias=bias), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=last_bias))


def cosine(start, end, step, total):
    """Half a cosine from start (step 0) to end (step `total`)."""
    return end - (end - start) * (math.cos(math.pi * step / total) + 1) / 2


def decayed(step, steps, config):
    """Factor of a probe's learning rate at a step, with `steps` of them an epoch: by milestones or by a cosine."""
    if config['milestones']:
        return config.get('gamma', 0.1) ** sum(step >= epoch * steps for epoch in config['milestones'])
    return cosine(1, config.get('final_share', 0), step, steps * config['epochs'])


@torch.no_grad()
def follow(model, momentum):
    """Exponential moving average of the parameters alone: batch norm keeps statistics of its own."""
    for part in ('backbone', 'projector'):
        slow, fast = (list(getattr(model, prefix + part).parameters()) for prefix in ('momentum_', ''))
        torch._foreach_lerp_(slow, fast, 1 - momentum)


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


def mixing(a, seed, step, rows):
    """How the negatives of a step are mixed (arXiv 2108.02982): one share ~ Beta(a, a), and partners (rows,). From seed
    and step alone: the same on all processes and after a break. a = 0: None."""
    draw = np.random.default_rng((seed, step))
    return (draw.beta(a, a), torch.from_numpy(draw.permutation(rows))) if a else None


class Method(nn.Module):
    """What the methods share. A step is: before_step(step), forward once per micro-batch, backward, grad = None for the
    parameters in frozen(step), optimizer, after_step(step).

    forward(views, step, look=False): views, a list of uint8 (B, 3, S_k, S_k) of this process, is the pair and, for
    SwAV, small crops. Returns loss (B,), extra () and figures. The loss of the process is (weights * loss).mean() +
    extra; figures are scalars that show whether the run is healthy, {} unless look. All processes must call it alike.

    backbone: keywords of build_backbone, zero_init_residual null for the method's own. mean, std: normalisation of the
    views, 3 floats each. total_steps, steps_per_epoch: for schedules, which are functions of the step alone."""
    sync_bn = True                  # batch norm over the global batch
    labelled = False                # forward takes the labels (B,) of the samples too
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

    @torch.no_grad()
    def target(self, view):
        return self.momentum_projector(self.momentum_backbone(normalize(view, self.mean, self.std)))

    def before_step(self, step):
        pass

    after_step = before_step

    def frozen(self, step):
        return ()


class MoCoV2(Method):
    """MoCo v2 (He et al. 2020; Chen et al. 2020), details after facebookresearch/moco and its CIFAR notebook.

    backbone, projector: query side. momentum_backbone, momentum_projector: exponential moving average of the
    parameters alone; their batch norm runs in train mode on its own statistics. queue (K, D): keys of the past.

    bn_splits: batch norm sees the global batch in this many groups, and the keys are shuffled between the groups, so
    that a query and its key share no statistics that would give the pair away. The groups are spread over the
    processes: the result does not depend on how many there are. negative_mixing: 0, or the a of `mixing`, by which a
    step mixes the keys of the queue."""
    sync_bn = False

    def __init__(self, backbone, dim=128, queue=65536, momentum=0.999, temperature=0.2, bn_splits=8, symmetric=False,
                 negative_mixing=0.0, **common):
        splits = bn_splits // world_size()
        super().__init__(backbone, partial(SplitBatchNorm2d, splits=splits) if splits > 1 else None, **common)
        width = self.backbone.feature_dim
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, dim))
        self.momentum_backbone = deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)
        self.momentum, self.temperature, self.symmetric = momentum, temperature, symmetric
        self.shuffle, self.negative_mixing = bn_splits > 1, negative_mixing
        self.register_buffer('queue', F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer('queue_pointer', torch.zeros((), dtype=torch.long))

    def before_step(self, step):
        """The keys come from encoders that already follow the last step, as in the official code."""
        follow(self, self.momentum)

    @torch.no_grad()
    def keys(self, images, order):
        """Keys of the global batch (world * B, D), unshuffled, from this process's uint8 images (B, 3, H, W).

        order: permutation of the global batch; process r encodes the r-th part of the permuted batch."""
        local = len(images)
        if self.shuffle:
            images = gather(images)[order[rank() * local:(rank() + 1) * local]]
        keys = gather(F.normalize(self.target(images).float(), dim=1))
        return keys[order.argsort()] if self.shuffle else keys

    @torch.no_grad()
    def enqueue(self, keys):
        """Overwrite the oldest keys of the queue; keys (N, D) are those of all processes, so all queues stay equal."""
        place = (self.queue_pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[place] = keys
        self.queue_pointer.copy_((self.queue_pointer + len(keys)) % len(self.queue))

    def forward(self, views, step, look=False):
        view_1, view_2 = views
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(view_1) * world_size(), generator=generator).to(view_1.device)
        mine = slice(rank() * len(view_1), (rank() + 1) * len(view_1))
        loss, all_keys, figures, queue = 0, [], {}, self.queue
        if self.negative_mixing:
            share, partner = mixing(self.negative_mixing, self.seed, step, len(queue))
            queue = share * queue + (1 - share) * queue[partner.to(queue.device)]
        for query_view, key_view in ((view_1, view_2), (view_2, view_1))[:2 if self.symmetric else 1]:
            query = F.normalize(self.projector(self.features(query_view)).float(), dim=1)
            keys = self.keys(key_view, order)
            loss = loss + info_nce(query, keys[mine], queue, self.temperature)
            figures = self.figures(query, keys[mine]) if look else {}
            all_keys.append(keys)
        self.enqueue(torch.cat(all_keys))  # after the logits: a key is never its own negative
        return loss, loss.new_zeros(()), figures

    @torch.no_grad()
    def figures(self, query, key):
        """query, key: (B, D). contrastive_top1: share of the queries whose own key is nearer than all of the queue;
        batch_top1: nearer than the other keys of the batch, which are as old: near chance where a key is told from
        those of the queue by its age and not by its image."""
        with torch.autocast(query.device.type, enabled=False):
            nearest = (query * key).sum(1) > (query @ self.queue.T).amax(1)
        return {'contrastive_top1': nearest.float().mean(), 'feature_std': feature_std(query),
                'batch_top1': batch_top1(query, key)}


class MoCoV3(Method):
    """MoCo v3 (Chen, Xie, He 2021), after facebookresearch/moco-v3. A view's negatives are the other keys of the global
    batch; both directions count.

    Projector: 2 layers (ViT: 3), batch norm without scale and shift at its end. Predictor: 2 layers, for ViT with such
    a batch norm. No bias in either. Loss 2 T (l(q1, k2) + l(q2, k1)). ResNets start with zero residuals (GenView's own
    config: without). The momentum goes to 1 on a cosine per step. SyncBatchNorm."""
    zero_init_residual = True

    def __init__(self, backbone, dim=256, hidden=4096, momentum=0.99, momentum_end=1.0, temperature=1.0, **common):
        super().__init__(backbone, **common)
        vit, width = backbone['arch'] in VITS, self.backbone.feature_dim
        self.projector = mlp(width, *[hidden] * (2 if vit else 1), dim).append(nn.BatchNorm1d(dim, affine=False))
        self.predictor = mlp(dim, hidden, dim).append(nn.BatchNorm1d(dim, affine=False) if vit else nn.Identity())
        self.momentum_backbone = deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)
        self.momentum, self.momentum_end, self.temperature = momentum, momentum_end, temperature

    def before_step(self, step):
        """Official: between queries and keys, which comes to the same: the queries do not change a parameter."""
        follow(self, cosine(self.momentum, self.momentum_end, step, self.total_steps))

    def forward(self, views, step, look=False):
        query_1, query_2 = (F.normalize(self.predictor(self.projector(self.features(v))).float(), dim=1) for v in views)
        key_1, key_2 = (F.normalize(self.target(v).float(), dim=1) for v in views)
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
        follow(self, cosine(self.momentum, self.momentum_end, step, self.total_steps))

    def forward(self, views, step, look=False):
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
    as COP-Gen's code); the backbone is initialised as torchvision does. Loss: the mean over all views (the paper's)
    times loss_factor, None: 2, the sum of the two directions as in the official code (SupConLoss, COP-Gen: temperature
    / 0.07). Zero residuals at the start. Batch norm over the global batch.
    negative_mixing: 0, or a: the negatives of the batch are mixed, see `mixing` and nt_xent."""
    zero_init_residual = True

    def __init__(self, backbone, dim=128, layers=2, norm=True, temperature=0.1, negative_mixing=0.0, loss_factor=None,
                 **common):
        super().__init__(backbone, **common)
        sizes, self.temperature = [self.backbone.feature_dim] * layers + [dim], temperature
        self.loss_factor = loss_factor or 2
        self.negative_mixing = negative_mixing
        if norm:
            self.projector = mlp(*sizes).append(nn.BatchNorm1d(dim))
            self.projector[-1].bias.requires_grad_(False)
            for layer in self.projector[::3]:
                nn.init.normal_(layer.weight, std=0.01)
        else:
            hidden = [(nn.Linear(a, b), nn.ReLU(inplace=True)) for a, b in zip(sizes, sizes[1:-1])]
            self.projector = nn.Sequential(*sum(hidden, ()), nn.Linear(*sizes[-2:]))

    def forward(self, views, step, look=False, labels=None):
        z1, z2 = F.normalize(self.projector(self.features(torch.cat(views))).float(), dim=1).chunk(2)
        mixed = mixing(self.negative_mixing, self.seed, step, 2 * len(z1) * world_size())
        loss = self.temperature / 0.07 * sup_con(z1, z2, labels, self.temperature) if self.labelled else \
            self.loss_factor * nt_xent(z1, z2, self.temperature, mixed)
        figures = {'contrastive_top1': batch_top1(z1, z2), 'feature_std': feature_std(z1)} if look else {}
        return loss, loss.new_zeros(()), figures


class SupCon(SimCLR):
    """Supervised contrastive (Khosla et al. 2020), after HobbitLong/SupContrast: the positives are all views of all
    samples of its label in the beton. Loss times temperature / 0.07, no zero residuals."""
    labelled, zero_init_residual = True, False


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
        z1, z2 = (self.projector(self.features(v)) for v in views)
        invariance, variance, covariance = vicreg(z1, z2)
        extra = self.variance * variance + self.covariance * covariance
        return self.invariance * invariance, extra, {'feature_std': feature_std(z1)} if look else {}


class NNCLR(Method):
    """NNCLR (Dwibedi et al. 2021), after its algorithm 1: a view predicts the nearest neighbour of the other view among
    earlier images. queue (K, D): their first views' normalised projections; those of the batch join after the look-up.

    Projector: 3 layers, hidden ones as wide as the features (ResNet-50: 2048), batch norm at its end. Predictor: 2
    layers. Biases, which the paper leaves open, as in solo-learn. Batch norm over the global batch."""
    enqueue = MoCoV2.enqueue

    def __init__(self, backbone, dim=256, hidden=4096, queue=98304, temperature=0.1, **common):
        super().__init__(backbone, **common)
        width, self.temperature = self.backbone.feature_dim, temperature
        self.projector = mlp(width, width, width, dim, bias=True, last_bias=True).append(nn.BatchNorm1d(dim))
        self.predictor = mlp(dim, hidden, dim, bias=True, last_bias=True)
        self.register_buffer('queue', F.normalize(torch.randn(queue, dim), dim=1))
        self.register_buffer('queue_pointer', torch.zeros((), dtype=torch.long))

    def forward(self, views, step, look=False):
        projections = [self.projector(self.features(v)) for v in views]
        z1, z2 = (F.normalize(z.detach().float(), dim=1) for z in projections)
        p1, p2 = (F.normalize(self.predictor(z).float(), dim=1) for z in projections)
        loss = (nnclr(z1, p2, self.queue, self.temperature) + nnclr(z2, p1, self.queue, self.temperature)) / 2
        self.enqueue(gather(z1))
        figures = {'contrastive_top1': batch_top1(p2, z1), 'feature_std': feature_std(z1)} if look else {}
        return loss, loss.new_zeros(()), figures


METHODS = {'mocov2': MoCoV2, 'mocov3': MoCoV3, 'byol': BYOL, 'simsiam': SimSiam, 'swav': SwAV, 'simclr': SimCLR,
           'supcon': SupCon, 'vicreg': VICReg, 'nnclr': NNCLR}
