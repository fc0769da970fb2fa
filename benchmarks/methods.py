"""Does every method learn? All of them on the demo's data, with one small budget: kNN accuracy on CIFAR-10.

    python benchmarks/methods.py                             # all methods, without and with GenView, seed 0
    python benchmarks/methods.py methods=byol,swav views=baseline seed=1     # a part of it

2,500 images, ResNet-18 of width 32, 20 epochs in batches of 256, SGD, one learning rate for all that are not named in
METHODS: far too little to tell which method is best, and none is tuned. What is finished is not done again. Numbers go
to results/cifar10_methods.json; the table is made from that file.
"""
import json
import sys
from pathlib import Path

import bench
from bench import ROOT, stage
from files import save_json

RUN, RESULTS = Path('runs/methods'), ROOT / 'results/cifar10_methods.json'
METHODS = {  # heads in proportion to the narrow backbone's 256 features
    'mocov2': [],
    'mocov3': ['mocov3.dim=128', 'mocov3.hidden=1024', 'mocov3.temperature=0.2'],
    'byol': ['byol.dim=128', 'byol.hidden=1024', 'optimizer.lr=0.05'],
    'simsiam': ['simsiam.dim=512', 'simsiam.hidden=128'],
    'swav': ['swav.hidden=512', 'swav.prototypes=100', 'swav.queue=0', 'swav.freeze_prototypes=9', 'swav.epsilon=0.03',
             'optimizer.lr=0.1'],
    'simclr': ['simclr.temperature=0.2'],
    'vicreg': ['vicreg.dim=1024', 'vicreg.hidden=1024', 'optimizer.lr=0.05'],
    'supcon': ['supcon.temperature=0.2'],
    'nnclr': ['nnclr.dim=128', 'nnclr.hidden=1024', 'nnclr.queue=2048', 'nnclr.temperature=0.2'],
}
BATCH = ['epochs=20', 'batch_size=256', 'backbone.width=32', 'backbone.stem=cifar', 'optimizer.lr=0.25',
         'optimizer.warmup_epochs=2', 'moco.queue=768', 'moco.momentum=0.99', 'moco.bn_splits=8', 'log_every=18']
VIEWS = {'baseline': ['data.alpha=0', 'quality.enabled=false'], 'genview': []}


def main():
    options = bench.options(methods=','.join(METHODS), views=','.join(VIEWS), seed='0')
    methods, views, seed = options['methods'].split(','), options['views'].split(','), int(options['seed'])
    if unknown := {*methods, *views} - {*METHODS, *VIEWS}:
        sys.exit(f'no {", ".join(unknown)}; there are {", ".join([*METHODS, *VIEWS])}')
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for script, yaml in (('fg_proportion', 'demo'), ('fg_proportion', 'demo_quality'), ('gen_views', 'demo'),
                         ('gen_views', 'demo_test')):
        stage(f'{script}.py', f'yamls/{script}/{yaml}.yaml')
    for method in methods:
        for name in views:
            folder = RUN / f'{method}_{name}_{seed}'
            if (ROOT / folder / 'linear_eval/results.json').exists():
                continue
            seconds = stage('pretrain.py', 'yamls/pretrain/demo.yaml', f'method={method}', *BATCH, *METHODS[method],
                            *VIEWS[name], f'seed={seed}', f'output={folder}')
            stage('linear_eval.py', 'yamls/linear_eval/demo.yaml', f'checkpoint={folder}/backbone.pt',
                  f'output={folder}/linear_eval')
            measured = json.loads((ROOT / folder / 'linear_eval/results.json').read_text())
            done = [r for r in done if (r['method'], r['views'], r['seed']) != (method, name, seed)]
            done.append(dict(method=method, views=name, seed=seed, knn=measured['knn']['top1'],
                             linear=measured['linear']['top1'], seconds=round(seconds)))
            RESULTS.parent.mkdir(exist_ok=True)
            save_json(RESULTS, done)
    print('\n| method | views | seed | kNN top-1 | linear top-1 | minutes |\n|---|---|---|---|---|---|')
    for r in done:
        print(f"| {r['method']} | {r['views']} | {r['seed']} | {r['knn']:.1f} | {r['linear']:.1f} | "
              f"{r['seconds'] / 60:.1f} |")


if __name__ == '__main__':
    main()
