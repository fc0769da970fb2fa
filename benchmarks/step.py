"""A training step of ours against one of lightly's: same network (theirs is torchvision's ResNet, as in its examples),
heads of the same sizes, batch, precision, optimizer (torch's SGD with momentum and weight decay).

    python benchmarks/step.py             # CPU: ResNet-18 with the stem for 32 px, heads as in lightly's examples
    python benchmarks/step.py device=cuda # GPU: ResNet-50, 224 px, heads as published

Ours is pretrain.py's train_step with everything that is in it: uint8 views to the device, normalisation, momentum
update, networks, loss, queue, backward, optimizer. Theirs is the loop of lightly's examples in examples/pytorch, on
float views that are normalised already, as its transforms hand them out. lightly has no MoCo v3: its MoCo heads with
batch norm, BYOL's predictor and NTXentLoss in both directions stand for it. MoCo v2 has one batch norm group in both.

Each contender has a process of its own, as for a user; they take turns, and nothing else of them runs meanwhile. The
bare networks are ours again: the same passes forward and backward on normalised images, and nothing else. The last line
is one JSON object: `ratio` is lightly's time over ours, `limit` that of the bare networks over ours, each the smallest
median over the rounds of all methods.
"""
import copy
import importlib.util
import json
import multiprocessing
import statistics
import time
from importlib import metadata
from itertools import cycle

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import bench
import pretrain
from common import keep_memory, precision_dtype
from config import default_config
from models import normalize

EXAMPLES = {  # heads of lightly's examples on ResNet-18
    'mocov2': dict(dim=128, queue=4096), 'mocov3': dict(dim=256, hidden=1024), 'simsiam': dict(dim=128, hidden=64),
    'swav': dict(dim=128, hidden=512, prototypes=512, queue=0), 'vicreg': dict(dim=2048, hidden=2048)}
PUBLISHED = {  # those of the papers on ResNet-50: pretrain.py's, where nothing else is said
    'mocov2': {}, 'mocov3': {}, 'simsiam': {}, 'swav': dict(queue=0), 'vicreg': {}}


def config_of(method, options):
    """pretrain.py's config of this method."""
    config = default_config(pretrain.DEFAULTS)
    block = pretrain.BLOCKS[method]
    config[block] |= (PUBLISHED if options['device'] == 'cuda' else EXAMPLES)[method]
    config['moco']['bn_splits'] = 1
    config['swav']['freeze_prototypes'] = 0
    config['backbone'] |= dict(arch=options['arch'], stem=options['stem'])
    config |= dict(method=method, image_size=options['size'], batch_size=options['batch'], epochs=100)
    return config


def views_of(method, options):
    """uint8 views as data.PairLoader hands them out: (B, 3, S, S), channels last."""
    generator = torch.Generator().manual_seed(0)
    sizes = [options['size']] * 2 + [options['size'] * 3 // 7] * (options['crops'] if method == 'swav' else 0)
    views = [torch.randint(0, 256, (options['batch'], size, size, 3), dtype=torch.uint8, generator=generator)
             for size in sizes]
    return [view.pin_memory() if options['device'] == 'cuda' else view for view in views]


def prepare(config, device):
    """The model as pretrain.py has it before the first step."""
    if device.type == 'cpu':
        keep_memory()
    model = pretrain.build_model(config, 1000).to(device, memory_format=torch.channels_last)
    return model, torch.amp.GradScaler(device.type, enabled=False)


def ours(method, options, device, dtype):
    config = config_of(method, options)
    model, scaler = prepare(config, device)
    optimizer = pretrain.build_optimizer(model, config)
    for group in optimizer.param_groups:
        group['lr'] = config['optimizer']['lr']
    batches = cycle([{'views': [view.permute(0, 3, 1, 2) for view in views_of(method, options)]}])
    return lambda step: pretrain.train_step(batches, model, optimizer, scaler, None, step, False, config, dtype)


def bare(method, options, device, dtype):
    """The networks' part of `ours`: no loss, queue, momentum update, optimizer, no views to normalise."""
    model, _ = prepare(config_of(method, options), device)
    images = [normalize(view.permute(0, 3, 1, 2).to(device), model.mean, model.std)
              for view in views_of(method, options)]

    def outputs():
        if method == 'swav':
            small = [torch.cat(images[2:])] if images[2:] else []
            features = torch.cat([model.backbone(x) for x in (torch.cat(images[:2]), *small)])
            return [model.prototypes(F.normalize(model.projector(features), dim=1))]
        if method == 'mocov2':
            return [model.projector(model.backbone(images[0]))]
        projections = [model.projector(model.backbone(x)) for x in images]
        return [model.predictor(z) for z in projections] if hasattr(model, 'predictor') else projections

    def step(_):
        model.zero_grad()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                for x in images[1:] if method == 'mocov2' else images if method == 'mocov3' else ():
                    model.momentum_projector(model.momentum_backbone(x))
            found = outputs()
        torch.autograd.backward(found, [torch.ones_like(x) for x in found])
    return step


def lightly(method, options, device, dtype):
    """As lightly/examples/pytorch/METHOD.py, with heads as wide as ours."""
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss, VICRegLoss
    from lightly.models.modules import heads
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    config = config_of(method, options)
    block = config[pretrain.BLOCKS[method]]
    model = nn.Module()
    model.backbone = getattr(torchvision.models, options['arch'])()
    width, dim, hidden = model.backbone.fc.in_features, block['dim'], block.get('hidden')
    model.backbone.fc = nn.Identity()
    if options['stem'] == 'cifar':
        model.backbone.conv1, model.backbone.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    if method == 'mocov2':
        model.projector = heads.MoCoProjectionHead(width, width, dim)
        criterion = NTXentLoss(block['temperature'], (block['queue'], dim))
    elif method == 'mocov3':
        model.projector = heads.MoCoProjectionHead(width, hidden, dim, num_layers=2, batch_norm=True)
        model.predictor = heads.BYOLPredictionHead(dim, hidden, dim)
        criterion = NTXentLoss(block['temperature'])
    elif method == 'simsiam':
        model.projector = heads.SimSiamProjectionHead(width, width, dim)
        model.predictor = heads.SimSiamPredictionHead(dim, hidden, dim)
        criterion = NegativeCosineSimilarity()
    elif method == 'swav':
        model.projector = heads.SwaVProjectionHead(width, hidden, dim)
        model.prototypes = heads.SwaVPrototypes(dim, block['prototypes'])
        criterion = SwaVLoss(block['temperature'], block['iterations'], block['epsilon'])
    else:
        model.projector = heads.VICRegProjectionHead(width, hidden, dim, num_layers=3)
        criterion = VICRegLoss()
    if method.startswith('moco'):
        slow = [copy.deepcopy(part) for part in (model.backbone, model.projector)]
        for part in slow:
            deactivate_requires_grad(part.to(device))
    model.to(device)
    criterion.to(device)
    settings = config['optimizer']
    optimizer = torch.optim.SGD(model.parameters(), lr=settings['lr'], momentum=settings['momentum'],
                                weight_decay=settings['weight_decay'])
    views = [((view.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25).contiguous() for view in views_of(method, options)]
    views = [view.pin_memory() if device.type == 'cuda' else view for view in views]

    def forward(x):
        z = model.projector(model.backbone(x).flatten(start_dim=1))
        if method == 'swav':
            return model.prototypes(F.normalize(z, dim=1, p=2))
        return (z, model.predictor(z)) if hasattr(model, 'predictor') else z

    def target(x):
        return slow[1](slow[0](x).flatten(start_dim=1)).detach()

    def loss_of(batch):
        if method == 'mocov2':
            return criterion(forward(batch[0]), target(batch[1]))
        outputs = [forward(view) for view in batch]
        if method == 'swav':
            return criterion(outputs[:2], outputs[2:])
        if method == 'vicreg':
            return criterion(*outputs)
        (z1, p1), (z2, p2) = outputs
        if method == 'mocov3':
            return criterion(p1, target(batch[1])) + criterion(p2, target(batch[0]))
        return 0.5 * (criterion(z1.detach(), p2) + criterion(z2.detach(), p1))

    def step(_):
        if method.startswith('moco'):
            update_momentum(model.backbone, slow[0], m=0.99)
            update_momentum(model.projector, slow[1], m=0.99)
        if method == 'swav':
            model.prototypes.normalize()
        batch = [view.to(device, non_blocking=True) for view in views]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


CONTENDERS = {'ours': ours, 'lightly': lightly, 'bare': bare}


def contend(pipe, name, method, options):
    """A contender's process: told a number of steps, answers with the seconds of one."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')  # the same precision for all: TF32 where the GPU has it
    torch.backends.cudnn.benchmark = True
    device = torch.device(options['device'])
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    step, done = CONTENDERS[name](method, options, device, precision_dtype(options['precision'], device)), 0
    while count := pipe.recv():
        wait()
        begin = time.perf_counter()
        for _ in range(count):
            step(done)
            done += 1
        wait()
        pipe.send((time.perf_counter() - begin) / count)


def race(method, names, options):
    """{contender: seconds a step in each round}."""
    context, pipes, processes = multiprocessing.get_context('spawn'), {}, []
    for name in names:
        pipes[name], end = context.Pipe()
        processes.append(context.Process(target=contend, args=(end, name, method, options), daemon=True))
        processes[-1].start()
    found = {name: [] for name in names}
    for number in range(-1, options['rounds']):         # the first one warms up
        for name, pipe in pipes.items():
            pipe.send(3 if number < 0 else options['steps'])
            while not pipe.poll(1):
                if not processes[names.index(name)].is_alive():
                    raise SystemExit(f'{method}: {name} ended early; its message stands above')
            seconds = pipe.recv()
            if number >= 0:
                found[name].append(seconds)
    for pipe, process in zip(pipes.values(), processes):
        pipe.send(0)
        process.join()
    return found


def spread(values):
    return [round(statistics.median(values), 3), round(min(values), 3), round(max(values), 3)]


def main():
    options = bench.options(device='cpu', methods=','.join(EXAMPLES), arch='', stem='', size=0, batch=0,
                            crops=-1, rounds=15, steps=1, precision='auto')
    cuda = options['device'] == 'cuda'
    for key, small, large in (('arch', 'resnet18', 'resnet50'), ('stem', 'cifar', 'imagenet'), ('size', 32, 224),
                              ('batch', 128, 256)):
        options[key] = options[key] or (large if cuda else small)
    options['crops'] = 6 * cuda if options['crops'] < 0 else options['crops']
    names, packages = ['ours', 'bare'], ['torch', 'torchvision']
    if importlib.util.find_spec('lightly'):
        names.insert(1, 'lightly')
        packages.append('lightly')
    else:
        print('lightly is not installed: pip install -r benchmarks/requirements.txt; the bare networks alone')
    print(f"{bench.device_name()}; {', '.join(f'{name} {metadata.version(name)}' for name in packages)}")
    print('\n| method | ours, ms | lightly, ms | ratio | outside the networks |\n|---|---|---|---|---|')
    rows = []
    for method in options['methods'].split(','):
        found = race(method, names, options)
        row = {'method': method, **{name: round(1000 * statistics.median(found[name]), 2) for name in names}}
        for key, name in (('ratio', 'lightly'), ('limit', 'bare')):
            row[key] = spread([b / a for a, b in zip(found['ours'], found[name])]) if name in found else None
        rows.append(row)
        ratio = '{} ({}-{})'.format(*row['ratio']) if row['ratio'] else ''
        share = [f'{100 * (1 - x):.1f}' for x in row['limit']]
        print(f"| {method} | {row['ours']:.1f} | {row.get('lightly', '')} | {ratio} | {share[0]} % ({share[2]} to "
              f'{share[1]}) |', flush=True)
    smallest = {key: rows[0][key] and min(row[key][0] for row in rows) for key in ('ratio', 'limit')}
    print(json.dumps({**options, 'hardware': bench.device_name(), 'rows': rows, **smallest}))


if __name__ == '__main__':
    main()
