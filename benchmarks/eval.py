"""What evaluation costs beside the network: features, kNN, the linear probe, and several probes in one pass.

    python benchmarks/eval.py                            # minutes on two cores
    python benchmarks/eval.py train=5000 test=1000 images=256 rounds=1

Probes run as linear_eval.py runs them, on made features of `train` images (ResNet-18: 512 numbers, 10 classes, batch
256): seconds of 100 epochs, from the difference of a run of 1 epoch and one of 1 + `epochs`, for one head and for
`heads` learning rates. kNN (k 200) is ours against the plain way, lightly's if it is installed, which must find the
same; its limit is the product with topk alone. Features are timed against the bare network on batches in memory, and
the loader alone. The last line is one JSON object: `ratio` and `limit` are those of kNN, `heads_ratio` is many heads
over one (`heads_ratio_augmented`: with the encoder in each step, as on augmented images, reckoned from the two speeds),
`features_ratio` the stage's images/s over the bare network's. Contenders alternate, medians over rounds.
"""
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import bench
import features
import linear_eval
from common import Processes, versions
from config import default_config
from data import write_beton
from models import build_backbone

WIDTH, CLASSES, K, TEMPERATURE = 512, 10, 200, 0.07


def made(n, seed):
    """Features (n, 512) of classes that overlap, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 12 * torch.randn(n, WIDTH, generator=generator), labels


def seconds(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def plain_knn(query, bank, labels):
    """Votes of the k nearest as lightly counts them: through one-hot labels."""
    cosines, nearest = (query @ bank).topk(K, dim=1)
    one_hot = F.one_hot(labels[nearest], CLASSES).float()
    return (one_hot * (cosines / TEMPERATURE).exp()[:, :, None]).sum(1).argsort(dim=1, descending=True)


def main():
    options = bench.options(train=50_000, test=10_000, heads=6, epochs=10, images=512, batch=128, rounds=3,
                            workers=os.cpu_count())
    print(f'{bench.device_name()}; {versions()}', flush=True)
    processes, rounds = Processes('cpu'), range(options['rounds'])
    train, test = made(options['train'], 1), made(options['test'], 2)
    try:
        from lightly.utils.benchmarking import knn_predict
        theirs = lambda query, bank, labels: knn_predict(query, bank, labels, CLASSES, K, TEMPERATURE)
    except ImportError:
        print('lightly: is not installed; kNN is compared with its arithmetic written here')
        theirs = plain_knn

    accuracy = {}

    def knn_ours():
        accuracy['ours'] = features.knn_accuracy(*train, *test, CLASSES, K, TEMPERATURE, 256, processes)[0]

    def knn_theirs():
        bank, right = F.normalize(train[0], dim=1).T.contiguous(), 0
        for query, truth in zip(test[0].split(256), test[1].split(256)):
            right += (theirs(F.normalize(query, dim=1), bank, train[1])[:, 0] == truth).sum().item()
        accuracy['theirs'] = 100 * right / len(test[1])

    def knn_limit():
        for query in test[0].split(256):
            (query @ train[0].T).topk(K, dim=1)

    knn = [[seconds(work) for work in (knn_ours, knn_theirs, knn_limit)] for _ in rounds]
    print(f'kNN of {options["test"]:,} in {options["train"]:,}: ours {knn[0][0]:.1f} s, theirs {knn[0][1]:.1f} s, '
          f'product and topk {knn[0][2]:.1f} s; top-1 {accuracy["ours"]:.2f} and {accuracy["theirs"]:.2f}', flush=True)
    if abs(accuracy['ours'] - accuracy['theirs']) > 0.05:
        raise SystemExit('kNN: ours and theirs differ')

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (options['images'], 32, 32, 3), dtype=np.uint8)
        for part, data in (('train', train), ('test', test)):
            image = np.full((4, 4, 3), len(data[1]) % 251, np.uint8)
            write_beton(f'{folder}/{part}.beton', lambda i: (image, None, int(data[1][i]), i, -1), len(data[1]), {})
        write_beton(f'{folder}/images.beton', lambda i: (pixels[i], None, 0, i, -1), len(pixels), {})
        backbone = build_backbone('resnet18', 'cifar')
        torch.save({'state_dict': backbone.state_dict(), 'arch': 'resnet18', 'stem': 'cifar', 'feature_dim': WIDTH,
                    'width': 64, 'mean': [0.5] * 3, 'std': [0.25] * 3, 'image_size': 4},
                   f'{folder}/backbone.pt')
        config = default_config(linear_eval.DEFAULTS)
        config.update(checkpoint=f'{folder}/backbone.pt', train_beton=f'{folder}/train.beton', device='cpu',
                      test_beton=f'{folder}/test.beton', num_workers=options['workers'])
        linear_eval.all_features = lambda loader_of, n, encoder, processes, what, stop: (
            train if what.startswith('train') else test)
        linear_eval.knn_accuracy = lambda *_: [0.0, 0.0]
        lrs = [0.2 * 2 ** k for k in range(1, options['heads'])]

        def probe(epochs, more):
            config['linear'].update(augment=False, epochs=epochs, more_lrs=more)
            config['output'] = tempfile.mkdtemp(dir=folder)
            with contextlib.redirect_stdout(io.StringIO()):
                return seconds(lambda: linear_eval.main(config))

        probes = []
        for r in rounds:
            probes.append([(probe(1 + options['epochs'], more) - probe(1, more)) * 100 / options['epochs']
                           for more in ([], lrs)])
            print(f'round {r}: 100 epochs of one probe {probes[-1][0]:.1f} s, of {options["heads"]} together '
                  f'{probes[-1][1]:.1f} s', flush=True)

        encoder = features.Encoder(backbone, [0.5] * 3, [0.25] * 3, processes.device, torch.float32)
        loader_of = partial(features.plain_images, f'{folder}/images.beton', {'size': 32, 'crop_scale': None},
                            options['batch'], options['workers'])
        ready = [batch['views'][0] for batch in loader_of(np.arange(len(pixels))).epoch(0)]
        encoder(ready[0])
        loader = loader_of(np.arange(len(pixels)))
        speeds = []
        for r in rounds:
            speeds.append([len(pixels) / seconds(work) for work in (
                lambda: features.all_features(loader_of, len(pixels), encoder, processes, 'features'),
                lambda: [encoder(batch) for batch in ready], lambda: [None for _ in loader.epoch(r)])])
            print(f'round {r}: features {speeds[-1][0]:,.0f} images/s, bare network {speeds[-1][1]:,.0f}, loader alone '
                  f'{speeds[-1][2]:,.0f}', flush=True)

    middle = lambda rows, ratio: [round(f([ratio(row) for row in rows]), 3) for f in (statistics.median, min, max)]
    found = {'knn_seconds': middle(knn, lambda row: row[0]), 'knn_ratio': middle(knn, lambda row: row[1] / row[0]),
             'probe_seconds': middle(probes, lambda row: row[0]),
             'heads_ratio': middle(probes, lambda row: row[1] / row[0]),
             'features_ratio': middle(speeds, lambda row: row[0] / row[1])}
    encoding = 100 * options['train'] / statistics.median(row[1] for row in speeds)
    found['heads_ratio_augmented'] = middle(probes, lambda row: (row[1] + encoding) / (row[0] + encoding))
    print(json.dumps({**options, **found, 'ratio': found['knn_ratio'][0],
                      'limit': middle(knn, lambda row: row[2] / row[0])[0]}))


if __name__ == '__main__':
    main()
