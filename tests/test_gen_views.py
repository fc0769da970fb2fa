"""Stage 2 with a small random Stable unCLIP pipeline made here: the views, the chunks, the beton, what can go wrong."""
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tiny')]
import gen_views  # noqa: E402
from common import Fail, load_config  # noqa: E402
from data import PairLoader, open_beton  # noqa: E402
from generators import UnCLIP  # noqa: E402
from train import schedulers, text_models  # noqa: E402

N, D, UNREADABLE = 23, 12, 9
LEVELS = np.array([(0, 100, 200, 300, 400)[i % 5] if i != UNREADABLE else -1 for i in range(N)], np.int16)
SPEC = {'fallbacks': [], 'steps': 2, 'guidance_scale': 3.0, 'precision': 'fp32'}


@pytest.fixture(scope='module')
def generator_folder(tmp_path_factory):
    """A StableUnCLIPImg2ImgPipeline with random weights and its own image encoder, 16 px."""
    from diffusers import AutoencoderKL, StableUnCLIPImg2ImgPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    tokenizer, text_encoder = text_models()
    torch.manual_seed(1)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
        cross_attention_dim=32, attention_head_dim=2, class_embed_type='projection',
        projection_class_embeddings_input_dim=2 * D)
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, down_block_types=('DownEncoderBlock2D',) * 2,
                        up_block_types=('UpDecoderBlock2D',) * 2)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=D)
    normalizer.mean.data.normal_()
    normalizer.std.data.uniform_(0.5, 2)
    image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=D))
    scheduler, noising = schedulers()
    folder = tmp_path_factory.mktemp('generator')
    StableUnCLIPImg2ImgPipeline(
        feature_extractor=None, image_encoder=image_encoder, image_normalizer=normalizer, unet=unet, vae=vae,
        image_noising_scheduler=noising, tokenizer=tokenizer, text_encoder=text_encoder,
        scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def stage1(tmp_path_factory):
    """N images, one of them damaged, and what fg_proportion.py would have written of them."""
    root, random = tmp_path_factory.mktemp('stage1'), np.random.default_rng(0)
    (root / 'images').mkdir()
    for i in range(N):
        Image.fromarray(random.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(root / f'images/{i:03d}.png')
    (root / f'images/{UNREADABLE:03d}.png').write_bytes(b'not an image')
    np.savez(root / 'fg_proportion.npz', noise_level=LEVELS)
    np.save(root / 'embeddings.npy', random.normal(size=(N, D)).astype(np.float16))
    return root


@pytest.fixture
def settings(tmp_path, stage1, generator_folder):
    return {'output': str(tmp_path / 'views'), 'dataset': {'name': 'folder', 'root': str(stage1 / 'images')},
            'proportions': str(stage1), 'generator': {'model': str(generator_folder), **SPEC}, 'view_size': 16,
            'view_format': 'png', 'beton_mode': 'raw', 'batch_size': 4, 'chunk_size': 5, 'device': 'cpu'}


def generate(settings, tmp_path, **changes):
    """Run the stage in this process; returns the run folder."""
    path = tmp_path / 'experiment.yaml'
    path.write_text(yaml.safe_dump({**settings, **changes}))
    config = load_config(gen_views.DEFAULTS, [str(path)])
    gen_views.main(config)
    return Path(config['output'])


def command(path):
    return [sys.executable, 'gen_views.py', str(path)]


def stored(folder):
    """All views and records of the chunks: {index: pixels}, {index: record}."""
    views, records = {}, {}
    for chunk in sorted((folder / 'views').glob('*.tar')):
        with tarfile.open(chunk) as tar:
            for member in tar:
                index, suffix = member.name.split('.')
                file = tar.extractfile(member)
                if suffix == 'json':
                    records[int(index)] = json.load(file)
                else:
                    views[int(index)] = np.asarray(Image.open(file))
    return views, records


def test_view_equals_published_pipeline(generator_folder):
    """One image per call of the published pipeline gives the pixels that our mixed batch gives."""
    from diffusers import StableUnCLIPImg2ImgPipeline
    published = StableUnCLIPImg2ImgPipeline.from_pretrained(generator_folder, feature_extractor=None)
    published.set_progress_bar_config(disable=True)
    ours = UnCLIP({'model': str(generator_folder), **SPEC}, torch.device('cpu'))
    embeddings, levels, seeds = np.random.default_rng(3).normal(size=(3, D)).astype(np.float32), [0, 400, 999], [5, 6, 7]
    views = ours.views(embeddings, levels, seeds)
    assert views.shape == (3, 16, 16, 3) and views.dtype == np.uint8
    for view, embedding, level, seed in zip(views, embeddings, levels, seeds):
        expected = published(image_embeds=torch.from_numpy(embedding)[None], prompt='', noise_level=level,
                             generator=torch.Generator().manual_seed(seed), num_inference_steps=2, guidance_scale=3.0,
                             output_type='np').images[0]
        assert np.abs(view - expected * 255).max() <= 0.51  # rounding to 8 bits
        assert view.std() > 5


def test_stage_writes_pairs(settings, stage1, tmp_path):
    folder = generate(settings, tmp_path)
    views, records = stored(folder)
    assert sorted(records) == list(range(N)) and sorted(views) == [i for i in range(N) if i != UNREADABLE]
    assert records[UNREADABLE]['error'] and all(records[i]['noise_level'] == LEVELS[i] for i in range(N))
    sidecar = open_beton(folder / 'pairs.beton')
    assert sidecar['samples'] == N - 1 and (folder / 'pairs.png').stat().st_size > 1000
    recipe = {'size': 16, 'crop_scale': None}
    loader = PairLoader(folder / 'pairs.beton', [recipe, recipe], alpha=1.0, swap='second', batch_size=N - 1, seed=0,
                        num_workers=1, shuffle=False)
    batch = next(iter(loader.epoch(0)))
    assert batch['index'].tolist() == sorted(views) and batch['noise_level'].tolist() == LEVELS[sorted(views)].tolist()
    for k, i in enumerate(batch['index'].tolist()):
        assert (batch['views'][1][k].permute(1, 2, 0).numpy() == views[i]).all()
        source = np.asarray(Image.open(stage1 / f'images/{i:03d}.png').resize((19, 16), Image.Resampling.BILINEAR))
        assert np.abs(batch['views'][0][k].permute(1, 2, 0).numpy().astype(int) - source[:, 2:18]).mean() < 2


def test_view_depends_on_seed_and_index_alone(settings, tmp_path):
    views, _ = stored(generate(settings, tmp_path))
    other, _ = stored(generate(settings, tmp_path, output=str(tmp_path / 'b'), batch_size=7, chunk_size=11))
    seeded, _ = stored(generate(settings, tmp_path, output=str(tmp_path / 'c'), seed=1))
    for i in views:  # a batch of another size may round differently: one grey level
        assert np.abs(views[i].astype(int) - other[i]).max() <= 1
        assert np.abs(views[i].astype(int) - seeded[i]).mean() > 2


def test_killed_run_goes_on_and_equals_an_undisturbed_one(settings, tmp_path):
    whole = generate(settings, tmp_path)
    path = tmp_path / 'killed.yaml'
    killed = tmp_path / 'killed'
    path.write_text(yaml.safe_dump({**settings, 'output': str(killed), 'generator': {
        **settings['generator']}}))
    for left in (1, 3):  # killed twice, after some chunks
        job = subprocess.Popen(command(path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while len(list((killed / 'views').glob('0*.tar'))) < left and job.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        job.wait()
    made = {p.name: p.stat().st_mtime_ns for p in (killed / 'views').glob('0*.tar')}
    assert made
    generate({**settings, 'output': str(killed)}, tmp_path)
    for name, stamp in made.items():
        assert (killed / 'views' / name).stat().st_mtime_ns == stamp, 'a finished chunk was made again'
    names = sorted(p.name for p in (whole / 'views').glob('*.tar'))
    assert names == sorted(p.name for p in (killed / 'views').glob('0*.tar')) and len(names) == 5
    for file in [*(f'views/{name}' for name in names), 'pairs.beton']:
        assert (whole / file).read_bytes() == (killed / file).read_bytes(), file


def test_processes_share_the_chunks(settings, tmp_path, monkeypatch, capsys):
    whole = generate(settings, tmp_path)
    settings = {**settings, 'output': str(tmp_path / 'shared')}
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('RANK', '0')
    with pytest.raises(SystemExit) as left:
        generate(settings, tmp_path)
    shared = Path(settings['output'])
    assert left.value.code == 0
    assert sorted(p.name for p in (shared / 'views').glob('*')) == ['000000.tar', '000002.tar', '000004.tar']
    assert not (shared / 'pairs.beton').exists() and '2 of 5 chunks' in capsys.readouterr().out
    monkeypatch.setenv('RANK', '1')
    generate(settings, tmp_path)
    assert (shared / 'pairs.beton').read_bytes() == (whole / 'pairs.beton').read_bytes()


def test_sigterm_leaves_whole_chunks(settings, tmp_path):
    path = tmp_path / 'slow.yaml'
    path.write_text(yaml.safe_dump({**settings, 'generator': {**settings['generator'], 'steps': 200}}))
    job = subprocess.Popen(command(path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folder = Path(settings['output'])
    while not (folder / 'views/000000.tar').exists() and job.poll() is None:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 143 and 'SIGTERM: leaving' in output and not (folder / 'pairs.beton').exists()
    assert all(p.suffix == '.tar' and not p.name.startswith('.') for p in (folder / 'views').iterdir())


def test_strategies(settings, tmp_path):
    constant = stored(generate(settings, tmp_path, strategy='constant', noise_level=250))[1]
    assert {r['noise_level'] for i, r in constant.items() if i != UNREADABLE} == {250}
    random = [stored(generate(settings, tmp_path, strategy='random', output=str(tmp_path / f'r{k}'), seed=seed))[1]
              for k, seed in enumerate((0, 0, 1))]
    levels = [[r[i]['noise_level'] for i in range(N)] for r in random]
    assert levels[0] == levels[1] != levels[2] and set(levels[0]) - {-1} <= {0, 100, 200, 300, 400}
    assert len(set(levels[0])) > 3
    plain = generate({**settings, 'proportions': '', 'generator': {'model': ''}}, tmp_path, strategy='none',
                     output=str(tmp_path / 'none'))
    assert open_beton(plain / 'pairs.beton')['samples'] == N - 1 and not (plain / 'views').exists()


@pytest.mark.parametrize('changes, message', [
    ({'strategy': 'adaptiv'}, "'strategy' must be one of adaptive"),
    ({'noise_level': 1000}, "'noise_level' must lie in 0..999"),
    ({'proportions': 'nowhere'}, 'run fg_proportion.py on this dataset first'),
    ({'generator': {'model': 'nowhere/at-all', **SPEC}}, 'generator.model cannot be loaded: nowhere/at-all'),
    ({'generator': {'model': str(ROOT), **SPEC}}, 'holds no model_index.json'),
    ({'output': ''}, "'output' is not set"),
])
def test_bad_settings(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(Fail, match=message) as error:
        generate(settings, tmp_path, **changes)
    assert '\n' not in str(error.value)


def test_other_settings_do_not_mix(settings, tmp_path):
    folder = generate(settings, tmp_path)
    for changes, key in (({'seed': 3}, 'seed'), ({'generator': {**settings['generator'], 'steps': 3}}, 'generator.steps'),
                         ({'strategy': 'random'}, 'strategy')):
        with pytest.raises(Fail, match=f'made with {key} = '):
            generate(settings, tmp_path, **changes)
    before = (folder / 'pairs.beton').stat().st_mtime_ns
    generate(settings, tmp_path)
    assert (folder / 'pairs.beton').stat().st_mtime_ns == before


def test_stage_1_of_something_else(settings, stage1, tmp_path):
    wrong = tmp_path / 'wrong'
    wrong.mkdir()
    np.savez(wrong / 'fg_proportion.npz', noise_level=LEVELS)
    np.save(wrong / 'embeddings.npy', np.zeros((N, D + 1), np.float16))
    with pytest.raises(Fail, match=f'embeddings have {D + 1} dimensions'):
        generate(settings, tmp_path, proportions=str(wrong))
    np.save(wrong / 'embeddings.npy', np.zeros((N - 2, D), np.float16))
    with pytest.raises(Fail, match='run fg_proportion.py with the same dataset keys'):
        generate(settings, tmp_path, proportions=str(wrong), output=str(tmp_path / 'other'))


def test_damaged_generator_and_chunk(settings, generator_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    import shutil
    broken = tmp_path / 'broken'
    shutil.copytree(generator_folder, broken)
    weights = broken / 'unet/diffusion_pytorch_model.safetensors'
    save_file({k: v * float('nan') for k, v in load_file(weights).items()}, weights, {'format': 'pt'})
    with pytest.raises(Fail, match='gave NaN'):
        generate(settings, tmp_path, generator={'model': str(broken), **SPEC}, output=str(tmp_path / 'nan'))
    folder = generate(settings, tmp_path)
    (folder / 'pairs.beton').unlink()
    chunk = folder / 'views/000001.tar'
    chunk.write_bytes(chunk.read_bytes()[:700])
    with pytest.raises(Exception, match='000001.tar: cannot be read'):
        generate(settings, tmp_path)


def test_yaml_error_is_one_line(tmp_path):
    path = tmp_path / 'bad.yaml'
    path.write_text('outptu: here\n')
    job = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert job.returncode == 2 and job.stderr.strip().endswith("unknown key 'outptu'; did you mean 'output'?")
    assert len(job.stderr.strip().splitlines()) == 1
