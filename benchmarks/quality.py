"""What the weights of quality cost: a training step with them against one without. The frozen encoder looks at both
views of every pair.

    python benchmarks/quality.py                         # CPU: yamls/pretrain/effect.yaml's network, tiny/quality
    python benchmarks/quality.py width=64 batch=128      # the published ResNet-18
    python benchmarks/quality.py device=cuda             # GPU: ResNet-50 and ConvNeXt-B at 224 px, as GenView

encoder: a folder of open_clip, or the name of one of its architectures, which then has random weights: their values
cost nothing. variants: of the encoder, channels_last and compile, timed beside it as it is. The contenders take turns.
The last line is one JSON object: `cost` is the time of a step with weights over that of one without, `ratio` its
inverse, `limit` the share of a step with weights that the step without and the bare encoder's pass take: medians over
the rounds.
"""
import json
import statistics
import tempfile
import time
from importlib import metadata
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import bench
import pretrain
from common import keep_memory, precision_dtype
from config import default_config
from frozen_clip import FrozenClip, Quality
from models import normalize


def encoder_folder(name, folder):
    """Where FrozenClip finds it: `name` itself, or `folder`, into which it is written with random weights."""
    if Path(name).is_dir():
        return name
    import open_clip
    settings = {'model_cfg': open_clip.get_model_config(name),
                'preprocess_cfg': {'mean': open_clip.OPENAI_DATASET_MEAN, 'std': open_clip.OPENAI_DATASET_STD}}
    (folder / 'open_clip_config.json').write_text(json.dumps(settings))
    weights = open_clip.create_model(name, pretrained=None).state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / 'open_clip_model.safetensors')
    return str(folder)


def build_quality(spec, folder, device, variant):
    width = FrozenClip(spec, device).token_dim
    np.save(folder / 'pc.npy', np.random.default_rng(0).normal(size=width).astype(np.float32))
    quality = Quality({'clip': spec, 'pc': folder / 'pc.npy', 'temperature': 1.0}, device)
    if variant == 'channels_last':
        quality.clip.visual.to(memory_format=torch.channels_last)
    if variant == 'compile':
        quality.clip.tokens = torch.compile(quality.clip.tokens)
    return quality


def contenders(options, folder):
    """{name: function that makes one step}."""
    device, config = torch.device(options['device']), default_config(pretrain.DEFAULTS)
    dtype, batch, size = precision_dtype(options['precision'], device), options['batch'], options['size']
    config['backbone'] |= dict(arch=options['arch'], width=options['width'])
    config |= dict(method=options['method'], image_size=size, batch_size=batch, epochs=100)
    views = [torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2) for _ in range(2)]
    batches = cycle([{'views': [view.pin_memory() if device.type == 'cuda' else view for view in views]}])
    model = pretrain.build_model(config, 1000).to(device, memory_format=torch.channels_last)
    optimizer = pretrain.build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=False)

    def step(quality):
        pretrain.train_step(batches, model, optimizer, scaler, quality, 0, False, config, dtype)

    spec = {'model': encoder_folder(options['encoder'], folder), 'image_size': options['encoder_size'] or None}
    quality = {name: build_quality(spec, folder, device, name)
               for name in ['as it is', *filter(None, options['variants'].split(','))]}
    clip = quality['as it is'].clip
    images = normalize(torch.cat(views).to(device), *clip.mean_std)
    if size != clip.image_size:
        images = torch.nn.functional.interpolate(images, size=clip.image_size, mode='bilinear')

    def encode():
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            clip.tokens(images)
    return {'without': lambda: step(None), 'encoder alone': encode,
            **{name: lambda weights=weights: step(weights) for name, weights in quality.items()}}


def main():
    options = bench.options(device='cpu', method='simclr', arch='', width=0, batch=0, size=0, encoder='',
                            encoder_size=0, variants='', rounds=15, steps=3, precision='auto')
    cuda = options['device'] == 'cuda'
    for key, small, large in (('arch', 'resnet18', 'resnet50'), ('width', 16, 64), ('batch', 64, 256),
                              ('size', 32, 224), ('encoder', str(bench.ROOT / 'tiny/quality'), 'convnext_base_w'),
                              ('encoder_size', 0, 224)):
        options[key] = options[key] or (large if cuda else small)
    torch.set_float32_matmul_precision('high')
    torch.backends.cudnn.benchmark = True
    if not cuda:
        keep_memory()
    wait = torch.cuda.synchronize if cuda else lambda: None
    packages = ('torch', 'open_clip_torch', 'timm')
    print(f"{bench.device_name()}; {', '.join(f'{name} {metadata.version(name)}' for name in packages)}")
    with tempfile.TemporaryDirectory() as folder:
        steps, times = contenders(options, Path(folder)), {}
        for number in range(-1, options['rounds']):     # the first one warms up
            for name, step in steps.items():
                wait()
                begin = time.perf_counter()
                for _ in range(options['steps']):
                    step()
                wait()
                if number >= 0:
                    times.setdefault(name, []).append((time.perf_counter() - begin) / options['steps'])
    print('\n| a step | ms | over one without |\n|---|---|---|')
    for name, seconds in times.items():
        over = [a / b for a, b in zip(seconds, times['without'])]
        print(f'| {name} | {1000 * statistics.median(seconds):.1f} | {statistics.median(over):.2f} '
              f'({min(over):.2f}-{max(over):.2f}) |')
    without, encoder, ours = (np.array(times[name]) for name in ('without', 'encoder alone', 'as it is'))
    figures = {'cost': ours / without, 'ratio': without / ours, 'limit': (without + encoder) / ours}
    print(json.dumps({**options, 'hardware': bench.device_name(),
                      'ms': {name: round(1000 * statistics.median(seconds), 2) for name, seconds in times.items()},
                      **{name: round(float(np.median(values)), 3) for name, values in figures.items()}}))


if __name__ == '__main__':
    main()
