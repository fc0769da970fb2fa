"""The benchmarks' own arithmetic, and that those of the stages run to their last line."""
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]  # in this order: both have a gen_views and a fg_proportion
import gen_views  # noqa: E402
import pretrain  # noqa: E402
from config import load_config  # noqa: E402
from data import PairLoader, open_beton, write_beton  # noqa: E402
from files import save_json  # noqa: E402

from conftest import picture, small_gan  # noqa: E402


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f'benchmarks/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark, effect, methods, latent = map(load, ('gen_views', 'cifar10_effect', 'methods', 'latent_effect'))


def test_architecture_is_that_of_stable_unclip():
    with torch.device('meta'):
        parts = benchmark.stable_unclip()
    # Stable Diffusion 2.1 as published, its UNet with two layers more that take the noised embedding of 2,048 numbers
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == {
        'unet': 865_910_724 + 2049 * 1280 + 1281 * 1280, 'vae': 83_653_863, 'text_encoder': 340_387_840,
        'image_encoder': 632_076_800}


def test_operations_of_a_view():
    small, more_steps, larger = (benchmark.operations(*v) for v in ((512, 20), (512, 40), (768, 20)))
    # the UNet is known to take 0.8e12 at 512 px; twice for guidance, 21 times (the scheduler's first step takes two)
    assert small == pytest.approx(21 * 2 * 0.8e12 + 2.5e12, rel=0.03)
    assert more_steps - small == pytest.approx(20 * 2 * 0.8e12, rel=0.03)
    assert 2.25 < larger / small < 2.25 ** 2  # convolutions grow with the area, attention with its square


def test_view_benchmark_with_the_full_architecture_made_small(monkeypatch, capsys):
    for name, values in {'UNET': dict(block_out_channels=(32,) * 4, attention_head_dim=(1,) * 4, cross_attention_dim=32,
                                      projection_class_embeddings_input_dim=32),
                         'VAE': dict(block_out_channels=(32,) * 4),
                         'TEXT': dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
                         'VISION': dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, projection_dim=16)}.items():
        monkeypatch.setattr(benchmark, name, {**getattr(benchmark, name), **values})
    monkeypatch.setattr(sys, 'argv', 'gen_views.py device=cpu model=full pixels=64 steps=2 rounds=1 seconds=0.1 '
                                     'batch_size=3'.split())
    benchmark.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result['ratio'] == pytest.approx(result['ours'] / result['theirs'], rel=0.05)
    assert result['model'] == 'full' and result['ratio'] > 0


def test_stage_1_benchmark(tmp_path):
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    output = subprocess.run([sys.executable, 'benchmarks/fg_proportion.py', 'name=folder', f'root={tmp_path}',
                             'images=10', 'batch_size=4', 'rounds=1', 'workers=1'], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    assert result['ratio'] == pytest.approx(result['stage'] / result['bare'], rel=0.05)
    assert 0 <= result['data_wait'] <= 1


def test_cost_of_views(tmp_path):
    for i in range(5):
        Image.fromarray(picture(i)).save(tmp_path / f'{i}.png')
    small_gan(tmp_path / 'icgan', feature=193, levels=True)
    output = subprocess.run([sys.executable, 'benchmarks/views.py', 'name=folder', f'root={tmp_path}', 'images=5',
                             'batch=3', 'singles=1', 'steps=1', f'icgan={tmp_path}/icgan', 'maskgit=nowhere',
                             'device=cpu', f'output={tmp_path}/out'], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.splitlines()
    rows = {row['view']: row for row in json.loads(output[-1])['rows']}
    assert list(rows) == ['crop', 'jitter', 'blur', 'unclip', 'icgan'] and 'maskgit: nowhere is not there' in output[0]
    assert output[-8].startswith('| view | SSIM | frechet_clip | ms, batch 1 | ms, batch 3 | parameters |')
    assert all(row['ms'] > 0 and row['ms_batch'] > 0 and row['frechet_clip'] > 0 for row in rows.values())
    assert rows['blur']['ssim'] > rows['crop']['ssim'] > rows['icgan']['ssim']
    assert rows['crop']['parameters'] == 0 < rows['icgan']['parameters'] < rows['unclip']['parameters']
    with Image.open(tmp_path / 'out/views.png') as drawn:
        assert min(drawn.size) > 300


def test_table_of_the_effect(capsys):
    """Mean, deviation, difference to two crops and its 95 % interval: 2.776 standard errors of two groups of 3."""
    values = {'two_crops': [40., 41., 42.], 'adaptive': [43., 44., 48.], 'random': [50.]}
    titles = {row: title for row, (_, _, title) in effect.ROWS.items()}
    effect.bench.table([dict(row=row, seed=seed, precision='float32', knn=v, linear=2 * v, seconds=60)
                        for row, column in values.items() for seed, v in enumerate(column)], titles, 'two_crops')
    out = capsys.readouterr().out
    assert 'pretrained in float32' in out
    lines = [line.split(' | ') for line in out.splitlines() if line.startswith('| ')][1:]
    assert [line[0][2:] for line in lines] == [titles[row] for row in ('two_crops', 'random', 'adaptive')]
    assert lines[0][1:] == ['3', '41.00 ± 1.00', '', '82.00 ± 2.00', '', '1.0 |']
    assert lines[1][1:] == ['1', '50.00', '+9.00', '100.00', '+18.00', '1.0 |']
    width = 2.7764 * ((1 + 7) / 3) ** 0.5
    assert lines[2][1:] == ['3', '45.00 ± 2.65', f'+4.00 ({4 - width:+.2f} to {4 + width:+.2f})', '90.00 ± 5.29',
                            f'+8.00 ({8 - 2 * width:+.2f} to {8 + 2 * width:+.2f})', '1.0 |']


def test_area_under_curve():
    scores, positive = np.array([1., 2., 2., 3.]), np.array([False, True, False, True])
    # pairs of a positive and a negative: 2 > 1, 2 = 2, 3 > 1, 3 > 2
    assert effect.area_under_curve(scores, positive) == pytest.approx(3.5 / 4)


def test_partners_of_a_control():
    labels = np.arange(200) % 4
    for share in (1, 0.5, 0):
        found = effect.partners(labels, share, 10)
        assert found.shape == (200, 10) and (found != np.arange(200)[:, None]).all()
        assert (labels[found] == labels[:, None]).mean() == pytest.approx(share, abs=0.03)
        assert len(np.unique(found)) == 200


def test_controls_are_betons_like_those_of_views(tmp_path, monkeypatch):
    """Partners of the same class are other images as they are; reconstructions are close to their source."""
    random = np.random.default_rng(0)
    images = np.stack([np.asarray(Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
        (32, 32), Image.Resampling.BICUBIC)) for _ in range(12)])

    class Source(list):
        labels, classes = [i % 2 for i in range(12)], ['a', 'b']
    config = load_config(gen_views.DEFAULTS, [str(ROOT / 'yamls/gen_views/effect.yaml')])
    config['generator']['model'] = str(ROOT / 'tiny/unclip')
    monkeypatch.setattr(effect, 'load_config', lambda *_: {**config, 'views_per_image': 3})
    monkeypatch.setattr(effect, 'source_dataset', lambda _: Source((Image.fromarray(x), 0) for x in images))
    monkeypatch.setattr(effect, 'ROOT', tmp_path)
    plain, seen = dict(size=32, crop_scale=None), {}
    for views in ('same_class_100', 'reconstruction'):
        effect.write_control(views)
        beton = tmp_path / 'runs/effect' / views / 'pairs.beton'
        assert open_beton(beton)['settings']['classes'] == ['a', 'b']
        loader = PairLoader(beton, [plain, plain], 1.0, 'second', batch_size=12, seed=0, num_workers=1, shuffle=False)
        batches = [next(iter(loader.epoch(epoch))) for epoch in range(6)]
        assert batches[0]['label'].tolist() == Source.labels
        assert (batches[0]['views'][0].permute(0, 2, 3, 1).numpy() == images).all()
        seen[views] = [batch['views'][1].permute(0, 2, 3, 1).numpy() for batch in batches]
    for drawn in seen['same_class_100']:
        for i, view in enumerate(drawn):
            found, = np.flatnonzero((images == view).all((1, 2, 3)))
            assert found != i and found % 2 == i % 2
    assert any((a != seen['same_class_100'][0]).any() for a in seen['same_class_100'])  # several partners an image
    difference = np.abs(seen['reconstruction'][0].astype(float) - images)
    assert 0 < difference.mean() < 15 and (seen['reconstruction'][0] == seen['reconstruction'][1]).all()


def test_controls_of_the_latent_table(tmp_path, monkeypatch):
    """Another anchor of the class that the judge finds, and the one nearest in its features."""
    anchors = np.random.default_rng(0).integers(0, 100, (20, 32, 32, 3), dtype=np.uint8)
    anchors[::2] += 128                                       # bright ones are class 1
    folder = tmp_path / latent.RUN / 'none'
    folder.mkdir(parents=True)
    write_beton(folder / 'pairs.beton', lambda i: (anchors[i], anchors[(i + 1) % 20], -1, i, 0), 20, {})

    def judge(path, device):
        return lambda x: (torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1), x.mean((2, 3)) - 0.4)
    monkeypatch.setattr(importlib.import_module('report'), 'published_judge', judge)
    monkeypatch.setattr(latent, 'ROOT', tmp_path)
    latent.write_control('same_class', 'judge.th')
    seen, (scores, _), (found, _) = latent.judged('same_class', 'judge.th')
    assert (seen == anchors).all() and scores.argmax(1).tolist() == [1, 0] * 10 == found.argmax(1).tolist()
    assert (latent.judged('none', 'judge.th')[2][0].argmax(1) != found.argmax(1)).all()
    latent.write_control('nearest', 'judge.th')
    features = anchors.mean((1, 2)) / 255 - 0.4
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    others = (unit @ unit.T - 2 * np.eye(20)).argmax(1)
    plain = dict(size=32, crop_scale=None)
    for row in latent.CONTROLS:
        loader = PairLoader(tmp_path / latent.RUN / row / 'pairs.beton', [plain, plain], 1.0, 'second', batch_size=20,
                            seed=0, num_workers=1, shuffle=False)
        positives = next(loader.epoch(0))['views'][1].permute(0, 2, 3, 1).numpy()
        of = [int(np.flatnonzero((p == anchors).all((1, 2, 3)))[0]) for p in positives]
        assert of == others.tolist() if row == 'nearest' else all(i != k for i, k in enumerate(of))


@pytest.mark.parametrize('module, rows', [(effect, 63), (methods, 18), (latent, 24)])
def test_stages_of_a_benchmark_fit_together(module, rows, tmp_path, monkeypatch):
    """Every stage reads what an earlier one wrote, and what is finished is not done again."""
    made, ran = set(), []

    def stage(script, experiment, *keys):
        name = script.removesuffix('.py')
        settings = load_config(importlib.import_module(name).DEFAULTS, [str(ROOT / experiment), *keys])
        if name == 'gen_views' and settings['strategy'] == 'latent':
            walkers = [move['walker'] for move in settings['latent']['chunks'].values()]
            assert {str(Path(file).parent) for file in (*walkers, settings['latent']['discriminator']) if file} <= made
            gen_views.check(settings)
        elif name == 'gen_views' and settings['strategy'] != 'none':
            assert settings['proportions'] in made
        if name == 'pretrain':
            assert settings['data']['beton'].removesuffix('/pairs.beton') in made
            assert not settings['quality']['enabled'] or str(Path(settings['quality']['pc']).parent) in made
            pretrain.check(settings, 1)
        folder = tmp_path / settings['output']
        folder.mkdir(parents=True, exist_ok=True)
        if name == 'linear_eval':
            assert {str(Path(settings[key]).parent) for key in ('checkpoint', 'train_beton', 'test_beton')} <= made
            save_json(folder / 'results.json', dict(knn=dict(top1=len(ran)), linear=dict(top1=2.0 * len(ran))))
        if name == 'pretrain':
            (folder / 'config.yaml').write_text(f"precision: {settings['precision']}")
        made.add(settings['output'])
        ran.append(name)
        return 1.0

    for key, value in dict(stage=stage, ROOT=tmp_path, RESULTS=tmp_path / 'results/r.json').items():
        monkeypatch.setattr(module, key, value)
        monkeypatch.setattr(module.bench, key, value, raising=False)
    monkeypatch.setattr(module, 'write_control', lambda views: made.add(f'runs/effect/{views}'), raising=False)
    monkeypatch.setattr(sys, 'argv', ['benchmark'])
    module.main()
    done = json.loads((tmp_path / 'results/r.json').read_text())
    assert ran.count('pretrain') == ran.count('linear_eval') == len(done) == len({r['knn'] for r in done}) == rows
    module.main()
    assert ran.count('pretrain') == rows
