"""Does decoding starve the encoder of stage 1? The stage's pass over images, as users run it (decoding, encoding,
proportions, saving), against the bare encoder on the same batches, ready in memory; alternating rounds.

    python benchmarks/fg_proportion.py                                      CIFAR-10's training images, tiny/clip
    python benchmarks/fg_proportion.py name=folder root=data/imagenet split=val model=ViT-H-14 \
        pretrained=laion2b_s32b_b79k workers=12 images=20000                a GPU and the published encoder

On a CPU the decoding processes take their time from the cores that the encoder computes on, so the ratio cannot be 1
there; `decoding` says how many images a second one core decodes. The last line is one JSON object: `ratio` is the
median over the rounds of stage / bare, `data_wait` the share of the stage's time that the encoder waited for images.
"""
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import bench
import fg_proportion
from common import Log, Processes, precision_dtype
from config import default_config
from frozen_clip import FrozenClip
from sources import source_dataset

options = bench.options(name='CIFAR10', root='data/cifar10', split='train', images=5000, model='tiny/clip',
                        pretrained='', batch_size=256, workers=os.cpu_count(), rounds=3)

if __name__ == '__main__':
    processes = Processes()
    device = processes.device
    config = default_config(fg_proportion.DEFAULTS)
    config.update(batch_size=options['batch_size'], num_workers=options['workers'])
    source = source_dataset({'name': options['name'], 'root': options['root'], 'split': options['split']})
    clip = FrozenClip({'model': options['model'], 'pretrained': options['pretrained'] or None}, device)
    dtype = precision_dtype('fp16' if device.type == 'cuda' else 'fp32', device)
    indices = np.random.default_rng(0).permutation(len(source))[:options['images']]
    pc = torch.randn(clip.token_dim, device=device)

    def measures(tokens, embedding, readable, identity):
        return {'proportion': (torch.einsum('bkhw,k->bhw', tokens, pc) > 0).float().mean((1, 2)),
                'embedding': (embedding * readable[:, None]).half()}

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        log = Log(folder, config)
        (folder / 'parts').mkdir()
        sweep = fg_proportion.Sweep(config, folder / 'parts', source, clip, dtype, processes, log)
        begin = time.perf_counter()
        ready = [torch.stack([sweep.images[i][0] for i in indices[start:start + options['batch_size']]])
                 for start in range(0, min(len(indices), 8 * options['batch_size']), options['batch_size'])]
        decoding = sum(map(len, ready)) / (time.perf_counter() - begin)
        ready = [batch.to(device) for batch in ready]
        batches = -(-len(indices) // options['batch_size'])

        def bare():
            for number in range(batches):
                clip.encode(ready[number % len(ready)], dtype)
            if device.type == 'cuda':
                torch.cuda.synchronize()
            return sum(len(ready[number % len(ready)]) for number in range(batches))

        def stage(name):
            sweep(name, indices, measures, lambda a, b: torch.cat([a, b]))
            return len(indices)

        clip.encode(ready[0], dtype)
        rounds = []
        for r in range(options['rounds']):
            rates = []
            for step in (bare, lambda: stage(f'round{r}')):
                begin = time.perf_counter()
                rates.append(step() / (time.perf_counter() - begin))
            rounds.append(rates)
            print(f'round {r}: stage {rates[1]:,.0f} images/s, bare encoder {rates[0]:,.0f} images/s, '
                  f'ratio {rates[1] / rates[0]:.3f}', flush=True)
        waits = [line['data_wait'] for line in map(json.loads, (folder / 'log.jsonl').read_text().splitlines())
                 if line.get('step') == len(indices)]
    print(json.dumps({**options, 'device': device.type, 'decoding': round(decoding, 1),
                      'bare': round(statistics.median(a for a, _ in rounds), 1),
                      'stage': round(statistics.median(b for _, b in rounds), 1), 'data_wait': statistics.median(waits),
                      'ratio': round(statistics.median(b / a for a, b in rounds), 3)}))
