"""Stage 2 with a small random Stable unCLIP pipeline made here: the views, the chunks, the beton, what can go wrong."""
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tiny')]
import data  # noqa: E402
import gen_views  # noqa: E402
from chunks import read_chunk, write_chunk  # noqa: E402
from config import Fail, load_config  # noqa: E402
from conftest import damages  # noqa: E402
from data import PairLoader, open_beton  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from generators import UnCLIP  # noqa: E402
from sources import source_dataset  # noqa: E402
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
    levels, seeds = [0, 400, 999], [5, 6, 7]
    embeddings = np.random.default_rng(3).normal(size=(3, D)).astype(np.float32)
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


KILLED = """
import os, signal
import gen_views, start
write = gen_views.write_chunk
def killed(path, files):
    write(path, files)
    if '000002' in str(path):  # written, and not yet under its name
        os.kill(os.getpid(), signal.SIGKILL)
gen_views.write_chunk = killed
start.run(gen_views.main, gen_views.DEFAULTS)
"""


@pytest.mark.parametrize('kind', ['unclip', 'icgan', 'maskgit'])
def test_killed_run_goes_on_and_equals_an_undisturbed_one(settings, stage1, tmp_path, kind):
    if kind != 'unclip':  # the embedded ones
        settings['generator'] = {'kind': kind, 'model': str(ROOT / 'tiny' / kind), 'precision': 'fp32',
                                 'mask': {'steps': 3}}
        shutil.copytree(stage1, tmp_path / 'stage1')
        np.save(tmp_path / 'stage1/embeddings.npy', np.random.default_rng(0).normal(size=(N, 192)).astype(np.float16))
        settings['proportions'] = str(tmp_path / 'stage1') if kind == 'icgan' else ''
    whole = generate(settings, tmp_path)
    path = tmp_path / 'killed.yaml'
    killed = tmp_path / 'killed'
    path.write_text(yaml.safe_dump({**settings, 'output': str(killed)}))
    job = subprocess.run([sys.executable, '-c', KILLED, str(path)], cwd=ROOT, capture_output=True, text=True)
    made = {p.name: p.stat().st_mtime_ns for p in (killed / 'views').glob('0*.tar')}
    assert job.returncode == -signal.SIGKILL and sorted(made) == ['000000.tar', '000001.tar'], job.stderr
    assert list((killed / 'views').glob('.000002.tar.*'))
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
    for name, value in {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0', 'MASTER_ADDR': 'localhost',
                        'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        generate(settings, tmp_path)
    shared = Path(settings['output'])
    assert left.value.code == 0
    assert sorted(p.name for p in (shared / 'views').glob('*')) == ['000000.tar', '000002.tar', '000004.tar']
    assert not (shared / 'pairs.beton').exists() and '2 of 5 chunks' in capsys.readouterr().out
    monkeypatch.setenv('RANK', '1')
    generate(settings, tmp_path)
    assert (shared / 'pairs.beton').read_bytes() == (whole / 'pairs.beton').read_bytes()


def test_sigterm_leaves_whole_chunks(settings, tmp_path, monkeypatch, capsys):
    calls, views, folder = [], UnCLIP.views, Path(settings['output'])

    def signalled(*arguments):
        calls.append(1)
        if len(calls) == 3:                              # the first batch of the second chunk
            os.kill(os.getpid(), signal.SIGTERM)
        return views(*arguments)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(UnCLIP, 'views', signalled)
        generate(settings, tmp_path)
    assert left.value.code == 143 and 'SIGTERM: leaving; 4 of 5 chunks are still to be made' in capsys.readouterr().out
    assert os.listdir(folder / 'views') == ['000000.tar'] and not (folder / 'pairs.beton').exists()


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
    ({'strategy': 'adaptiv'}, "strategy: 'adaptiv' is none of adaptive, .*; did you mean 'adaptive'"),
    ({'noise_level': 1000}, 'noise_level: 1000 must be a whole number from 0 to 999'),
    ({'proportions': 'nowhere'}, 'run fg_proportion.py on this dataset first'),
    ({'generator': {'model': 'nowhere/at-all', **SPEC}}, 'generator.model cannot be loaded: nowhere/at-all'),
    ({'generator': {'model': str(ROOT), **SPEC}}, 'holds no model_index.json'),
    ({'output': ''}, 'output: must name a folder'),
    ({'source': 'folder'}, 'views_root: must name a folder'),
    ({'pack': 'yes'}, "'pack' must be bool or null, not 'yes'"),
    ({'shard': '4/4'}, 'shard: must be i/n'),
    ({'seed': -1}, 'seed: -1 must be a whole number from 0'),
    ({'generator': {'model': 'any', **SPEC, 'steps': 0}}, 'generator.steps: 0 must be'),
    ({'image_size': -1}, 'image_size: -1 must be'),
])
def test_bad_settings(settings, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(Fail, match=message) as error:
        generate(settings, tmp_path, **changes)
    assert '\n' not in str(error.value)


def test_other_settings_do_not_mix(settings, tmp_path):
    folder = generate(settings, tmp_path)
    known = json.loads((folder / 'settings.json').read_text())  # as before there were other kinds: such runs go on
    assert known['generator'].keys() == {'model', 'fallbacks', 'steps', 'guidance_scale', 'precision'}
    assert known['made_by']['generator'] == settings['generator']['model'] and 'weights' not in known
    for changes, key in (({'seed': 3}, 'seed'), ({'strategy': 'random'}, 'strategy'),
                         ({'generator': {**settings['generator'], 'steps': 3}}, 'generator.steps'),
                         ({'views_per_image': 2}, 'views_per_image')):
        with pytest.raises(Fail, match=f'made with other settings: {key} '):
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
    broken = tmp_path / 'broken'
    shutil.copytree(generator_folder, broken)
    weights = broken / 'unet/diffusion_pytorch_model.safetensors'
    save_file({k: v * float('nan') for k, v in load_file(weights).items()}, weights, {'format': 'pt'})
    with pytest.raises(Fail, match='gave NaN'):
        generate(settings, tmp_path, generator={'model': str(broken), **SPEC}, output=str(tmp_path / 'nan'))
    assert not (tmp_path / 'nan/settings.json').exists(), 'it would stand in the way of a generator that works'
    folder = generate(settings, tmp_path)
    (folder / 'pairs.beton').unlink()
    chunk = folder / 'views/000001.tar'
    chunk.write_bytes(chunk.read_bytes()[:700])
    with pytest.raises(Exception, match='000001.tar: .*; delete it, and the same command makes it again'):
        generate(settings, tmp_path)


def test_damaged_files_of_stage_1_and_of_the_run(settings, stage1, tmp_path):
    folder = tmp_path / 'proportions'
    shutil.copytree(stage1, folder)
    for name in ('fg_proportion.npz', 'embeddings.npy'):
        for damaged in damages(folder / name):
            with pytest.raises(Fail, match=f'{name}: .*run fg_proportion.py on this dataset again') as error:
                generate(settings, tmp_path, proportions=str(folder))
            assert damaged in str(error.value) and '\n' not in str(error.value)
    path, known = tmp_path / 'settings.json', {'seed': 0, 'dataset': {'name': 'folder'}}
    path.write_text(json.dumps(known))
    for damaged in damages(path):
        with pytest.raises(Fail, match='settings.json: .*; delete it where the views') as error:
            gen_views.same_settings(path, known, ())
        assert damaged in str(error.value) and '\n' not in str(error.value)
    gen_views.same_settings(path, known, ())


def test_generator_that_was_not_downloaded_whole(settings, generator_folder, tmp_path):
    shutil.copytree(generator_folder, tmp_path / 'generator')
    for name in ('unet/diffusion_pytorch_model.safetensors', 'vae/config.json', 'model_index.json'):
        for damaged in damages(tmp_path / 'generator' / name):
            with pytest.raises(Fail, match='generator.model cannot be loaded: .*generator/' + name) as error:
                generate(settings, tmp_path, generator={'model': str(tmp_path / 'generator'), **SPEC})
            assert damaged in str(error.value) and '\n' not in str(error.value)


def test_yaml_error_is_one_line(tmp_path):
    path = tmp_path / 'bad.yaml'
    path.write_text('outptu: here\n')
    job = subprocess.run(command(path), cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert job.returncode == 2 and job.stderr.strip().endswith("unknown key 'outptu'; did you mean 'output'?")
    assert len(job.stderr.strip().splitlines()) == 1


def test_generator_that_lacks_a_component(settings, generator_folder, tmp_path):
    broken = tmp_path / 'broken'
    shutil.copytree(generator_folder, broken)
    shutil.rmtree(broken / 'image_normalizer')
    index = json.loads((broken / 'model_index.json').read_text())
    for entry in (index['image_normalizer'], [None, None]):
        (broken / 'model_index.json').write_text(json.dumps({**index, 'image_normalizer': entry}))
        with pytest.raises(Fail, match='broken: ValueError: lacks image_normalizer; download the whole') as error:
            generate(settings, tmp_path, generator={'model': str(broken), **SPEC})
        assert '\n' not in str(error.value)
    with pytest.raises(Fail, match='lacks feature_extractor'):  # this one's own is not in the folder
        generate(settings, tmp_path, generator={'model': str(generator_folder), **SPEC, 'condition': 'pipeline'})


def test_shards_by_hand_or_of_a_slurm_array_and_packing_apart(settings, tmp_path, monkeypatch):
    whole = generate(settings, tmp_path)
    settings = {**settings, 'output': str(tmp_path / 'shared')}
    with pytest.raises(SystemExit) as left:
        generate(settings, tmp_path, shard='1/2')
    folder = Path(settings['output'])
    assert left.value.code == 0 and sorted(p.name for p in (folder / 'views').iterdir()) == ['000001.tar', '000003.tar']
    with pytest.raises(Fail, match=r'3 of 5 chunks are missing \(000000.tar, 000002.tar, 000004.tar\)'):
        generate(settings, tmp_path, pack=True)
    for name, value in (('ID', 4), ('COUNT', 2), ('MIN', 4), ('MAX', 5), ('STEP', 1)):
        monkeypatch.setenv(f'SLURM_ARRAY_TASK_{name}', str(value))
    generate(settings, tmp_path, pack=False)
    assert len(list((folder / 'views').iterdir())) == 5 and not (folder / 'pairs.beton').exists()
    generate(settings, tmp_path, pack=True)
    assert (folder / 'pairs.beton').read_bytes() == (whole / 'pairs.beton').read_bytes()


def test_two_tasks_with_other_settings_do_not_both_go_on(settings, tmp_path, monkeypatch):
    """The other task writes its settings between our look at them and our first view."""
    views, folder = UnCLIP.views, Path(settings['output'])

    def meanwhile(*arguments):
        shutil.copy(other / 'settings.json', folder / 'settings.json')
        return views(*arguments)

    other = generate(settings, tmp_path, seed=1, output=str(tmp_path / 'other'))
    monkeypatch.setattr(UnCLIP, 'views', meanwhile)
    with pytest.raises(Fail, match=r'other settings: seed \(was 1, now 0\)'):
        generate(settings, tmp_path)
    assert not list(folder.glob('views/*')) and sorted(p.name for p in folder.glob('.*')) == []


def change_chunk(path, change):
    """Open a chunk, let `change` work on its files {name: bytes}, write it again."""
    files = read_chunk(path)
    change(files)
    write_chunk(path, files)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'PNG')
    return file.getvalue()


def test_verify_finds_every_planted_defect_and_the_same_command_mends_it(settings, tmp_path, capsys):
    settings = {**settings, 'chunk_size': 2}
    folder = generate(settings, tmp_path)
    whole = {p.name: p.read_bytes() for p in [*folder.glob('views/*.tar'), folder / 'pairs.beton']}
    generate(settings, tmp_path, verify=True)
    assert 'verify: 22 views in 12 chunks and pairs.beton; all is well' in capsys.readouterr().out
    chunk = [folder / f'views/{k:06d}.tar' for k in range(12)]

    def edit_record(key, value):
        def edit(files):
            name = min(name for name in files if name.endswith('json'))
            files[name] = json.dumps({**json.loads(files[name]), key: value}).encode()
        return edit

    chunk[0].unlink()
    chunk[1].write_bytes(chunk[1].read_bytes()[:700])
    change_chunk(chunk[2], lambda files: files.update({'00000005.png': png(np.zeros((16, 16, 3), np.uint8))}))
    change_chunk(chunk[3], lambda files: files.update({'00000007.png': files['00000006.png']}))
    change_chunk(chunk[4], edit_record('error', 'the generator gave NaN'))
    change_chunk(chunk[5], edit_record('noise_level', 350))
    change_chunk(chunk[6], edit_record('seed', 1))
    change_chunk(chunk[7], edit_record('settings', '01234567'))
    change_chunk(chunk[8], lambda files: files.update({'00000016.png': png(np.eye(15, dtype=np.uint8) * 255)}))
    change_chunk(chunk[9], lambda files: files.pop('00000018.png'))
    change_chunk(chunk[10], lambda files: files.update({'00000099.json': b'{}'}))
    change_chunk(chunk[11], lambda files: files.update({'00000022.png': b'no picture', '00000022.json': b'{'}))
    with pytest.raises(SystemExit) as left:
        generate(settings, tmp_path, verify=True)
    out = capsys.readouterr().out
    assert left.value.code == 1
    for words in ('missing chunks: 1 (000000.tar)', 'unreadable chunks: 1 (000001.tar',
                  'black or constant views: 1 (00000005', 'duplicate views: 1 (00000006.png and 00000007.png)',
                  'failed views: 1 (00000008.json: the generator',
                  'other noise_level in the record: 1 (00000010', 'other seed in the record: 1 (00000012',
                  'other settings in the record: 1 (00000014', 'views of another size: 1 (00000016',
                  'missing views: 1 (00000018', 'files too many: 1 (000010.tar/00000099',
                  'unreadable views: 1 (00000022', 'missing or unreadable records: 1 (000011', 'makes 12 chunks again'):
        assert words in out, words
    assert len(list(folder.glob('views/*.tar'))) == 0 and not (folder / 'pairs.beton').exists()
    generate(settings, tmp_path, verify=True)
    assert 'all is well' in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in [*folder.glob('views/*'), folder / 'pairs.beton']} == whole

    content = bytearray(whole['pairs.beton'])
    content[len(content) // 2] ^= 1
    (folder / 'pairs.beton').write_bytes(content)
    chunk[4].unlink()
    with pytest.raises(SystemExit) as left:
        generate(settings, tmp_path, verify=True)
    assert left.value.code == 1 and 'damaged beton: 1' in capsys.readouterr().out
    generate(settings, tmp_path)  # without verify, too
    assert {p.name: p.read_bytes() for p in [*folder.glob('views/*'), folder / 'pairs.beton']} == whole
    assert not list(folder.glob('*.bad'))


def test_verify_where_nothing_is_or_machines_differ_or_only_a_share_is_looked_at(settings, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        generate(settings, tmp_path, verify=True)
    assert left.value.code == 1 and 'missing chunks: 5' in capsys.readouterr().out
    folder = generate(settings, tmp_path, pack=False)
    whole = {p.name: p.read_bytes() for p in folder.glob('views/*.tar')}

    def of_another_machine(files):
        for name in files:
            if name.endswith('json'):
                files[name] = json.dumps({**json.loads(files[name]), 'precision': 'float16'}).encode()
    change_chunk(folder / 'views/000003.tar', of_another_machine)
    generate(settings, tmp_path, verify=True, shard='0/2')  # chunks 0, 2, 4
    assert 'all is well' in capsys.readouterr().out and not (folder / 'pairs.beton').exists()
    with pytest.raises(SystemExit):
        generate(settings, tmp_path, verify=True)
    assert 'other generator or precision: 1 (000003.tar' in capsys.readouterr().out
    generate(settings, tmp_path)
    assert {p.name: p.read_bytes() for p in folder.glob('views/*')} == whole and (folder / 'pairs.beton').exists()


def swap(images, removed, added):
    """One image less, another one more: as many as before, and from there on each in the place of another."""
    (images / removed).unlink()
    shutil.copy(images / '022.png', images / added)


@pytest.fixture
def own_stage1(stage1, tmp_path):
    """stage1 that a test may change; it tells by what it knew the images."""
    shutil.copytree(stage1, tmp_path / 'stage1')
    source = source_dataset({'name': 'folder', 'root': tmp_path / 'stage1/images'})
    np.savez(tmp_path / 'stage1/fg_proportion.npz', noise_level=LEVELS, identity=source.identities(range(N)))
    return tmp_path / 'stage1'


def test_images_that_changed_after_stage_1(settings, own_stage1, tmp_path):
    settings |= {'proportions': str(own_stage1), 'dataset': {'name': 'folder', 'root': str(own_stage1 / 'images')}}
    swap(own_stage1 / 'images', '003.png', '010b.png')
    words = f'{own_stage1}: was made from other images: image 3 of 23 is 004.png now, one of 23'
    for changes in ({}, {'verify': True}):
        with pytest.raises(Fail, match=words):
            generate(settings, tmp_path, **changes)
    assert not list(tmp_path.glob('views/views/*')) and not (tmp_path / 'views/pairs.beton').exists()


def test_images_that_changed_after_the_views(settings, own_stage1, tmp_path, capsys):
    settings |= {'proportions': str(own_stage1), 'dataset': {'name': 'folder', 'root': str(own_stage1 / 'images')}}
    folder = generate(settings, tmp_path, pack=False)
    swap(own_stage1 / 'images', '003.png', '010b.png')
    for changes in ({'pack': True}, {'verify': True}, {}):
        with pytest.raises(Fail, match='image 3 of 23 is 004.png now'):
            generate(settings, tmp_path, **changes)
    assert not (folder / 'pairs.beton').exists()
    (own_stage1 / 'images/010b.png').rename(own_stage1 / 'images/003.png')
    with pytest.raises(Fail, match='image 3 of 23 is 003.png now'):  # its place, not its size
        Image.new('RGB', (20, 24)).save(own_stage1 / 'images/003.png')
        generate(settings, tmp_path)


def test_views_of_other_weights_do_not_mix(settings, generator_folder, tmp_path, capsys):
    copies = [tmp_path / 'first', tmp_path / 'second']
    for copy in copies:
        shutil.copytree(generator_folder, copy)
    settings['generator'] |= {'model': str(copies[0]), 'fallbacks': [str(copies[1])]}
    folder = generate(settings, tmp_path, pack=False)
    made_by = json.loads((folder / 'settings.json').read_text())['made_by']
    assert [*made_by][:2] == ['generator', 'precision'] and made_by['generator'] == str(copies[0])
    (folder / 'views/000001.tar').unlink()
    weights = copies[0] / 'unet/diffusion_pytorch_model.safetensors'
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Fail, match=f'views were made by {copies[0]}, float32, [0-9]+, not by {copies[0]}, float32, '):
        generate(settings, tmp_path)
    weights.write_bytes(content)
    (copies[0] / 'unet/config.json').rename(copies[0] / 'unet/config')  # the first one cannot be loaded
    with pytest.raises(Fail, match=f'made by {copies[0]}, .*, not by {copies[1]}, .*: make that generator available'):
        generate(settings, tmp_path)
    assert f'{copies[1]} stands in' in capsys.readouterr().err and not (folder / 'views/000001.tar').exists()
    settings_file = json.loads((folder / 'settings.json').read_text())
    del settings_file['made_by']  # of an earlier version
    (folder / 'settings.json').write_text(json.dumps(settings_file))
    generate(settings, tmp_path, pack=False)
    assert (folder / 'views/000001.tar').exists()
    for copy in copies:  # to make room: what is there needs none
        shutil.rmtree(copy)
    generate(settings, tmp_path)
    assert open_beton(folder / 'pairs.beton')['samples'] == N - 1


def test_images_that_changed_after_packing(settings, own_stage1, tmp_path, capsys):
    settings |= {'strategy': 'none', 'dataset': {'name': 'folder', 'root': str(own_stage1 / 'images')}}
    folder = generate(settings, tmp_path)
    generate(settings, tmp_path)
    assert 'is complete' in capsys.readouterr().out
    swap(own_stage1 / 'images', '003.png', '010b.png')
    for changes in ({}, {'verify': True}):
        with pytest.raises(Fail, match=f'{folder}: was made from other images: image 3 of 23 is 004.png now'):
            generate(settings, tmp_path, **changes)
    (folder / 'pairs.beton').unlink()  # nothing that was made from them is left
    generate(settings, tmp_path)
    assert open_beton(folder / 'pairs.beton')['samples'] == N - 1
    generate(settings, tmp_path, verify=True)


def test_the_sidecar_names_the_classes_and_the_log_what_is_not_used(settings, stage1, tmp_path, capsys):
    for name in ('dog', 'cat', 'empty'):
        (tmp_path / 'tree' / name).mkdir(parents=True)
        if name != 'empty':
            shutil.copy(stage1 / 'images/000.png', tmp_path / 'tree' / name)
    folder = generate(settings, tmp_path, strategy='none', dataset={'name': 'folder', 'root': str(tmp_path / 'tree')})
    assert open_beton(folder / 'pairs.beton')['settings']['classes'] == ['cat', 'dog']
    assert 'folders without images, which are no classes: empty' in capsys.readouterr().out


def test_the_images_may_move(settings, stage1, tmp_path, capsys):
    folder = generate(settings, tmp_path)
    (tmp_path / 'elsewhere').symlink_to(stage1 / 'images')
    (folder / 'views/000001.tar').unlink()
    moved = {**settings, 'dataset': {'name': 'folder', 'root': str(tmp_path / 'elsewhere')}}
    generate(moved, tmp_path)
    generate(moved, tmp_path, verify=True)
    assert 'all is well' in capsys.readouterr().out


def test_out_of_memory_halves_the_batch(settings, tmp_path, monkeypatch, capsys):
    expected, _ = stored(generate(settings, tmp_path, output=str(tmp_path / 'whole')))
    views = UnCLIP.views

    def limited(self, embeddings, levels, seeds, most=2):
        if len(seeds) > most:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory')
        return views(self, embeddings, levels, seeds)

    monkeypatch.setattr(UnCLIP, 'views', limited)
    found, _ = stored(generate(settings, tmp_path, batch_size=8))
    out = capsys.readouterr().out
    assert 'batches of 4' in out and 'batches of 2' in out and 'batches of 1' not in out
    assert found.keys() == expected.keys()
    assert max(np.abs(found[i].astype(int) - expected[i]).max() for i in found) <= 1
    monkeypatch.setattr(UnCLIP, 'views', lambda *arguments: limited(*arguments, most=0))
    with pytest.raises(Fail, match='too little memory for one image'):
        generate(settings, tmp_path, output=str(tmp_path / 'small'))


def test_nan_of_one_image_costs_one_view(settings, tmp_path, monkeypatch, capsys):
    whole, _ = stored(generate(settings, tmp_path, output=str(tmp_path / 'whole')))
    draw, broken = UnCLIP._draw, gen_views.draw(0, 6)

    def sometimes(self, embeddings, levels, seeds):
        images = draw(self, embeddings, levels, seeds)
        images[[k for k, seed in enumerate(seeds) if seed == broken]] = float('nan')
        return images

    monkeypatch.setattr(UnCLIP, '_draw', sometimes)
    folder = generate(settings, tmp_path)
    assert '1 views failed or cannot be read: [6]' in capsys.readouterr().out
    views, records = stored(folder)
    assert records[6]['error'] == 'the generator gave NaN' and views.keys() == whole.keys() - {6}
    assert all((views[i] == whole[i]).all() for i in views)
    metadata = data.Reader(str(folder / 'pairs.beton')).metadata
    assert metadata['f3'].tolist() == sorted(whole) and metadata['f3'][metadata['f4'] < 0].tolist() == [6]
    with pytest.raises(SystemExit):
        generate(settings, tmp_path, verify=True)
    assert 'failed views: 1 (00000006.json' in capsys.readouterr().out


def test_nan_in_half_precision_is_drawn_again_in_fp32(generator_folder, monkeypatch):
    spec = {**SPEC, 'model': str(generator_folder)}
    levels, seeds = [0, 400, 999], [5, 6, 7]
    embeddings = np.random.default_rng(3).normal(size=(3, D)).astype(np.float32)
    exact, half = (UnCLIP({**spec, 'precision': precision}, torch.device('cpu')) for precision in ('fp32', 'bf16'))
    single = exact.views(embeddings[1:2], levels[1:2], seeds[1:2])[0]
    before, draw = half.views(embeddings, levels, seeds), UnCLIP._draw

    def overflow(self, embeddings, levels, seeds):
        images = draw(self, embeddings, levels, seeds)
        if self.dtype == torch.bfloat16:
            images[[k for k, seed in enumerate(seeds) if seed == 6]] = float('nan')
        return images

    monkeypatch.setattr(UnCLIP, '_draw', overflow)
    found = half.views(embeddings, levels, seeds)
    assert (before[1] != single).any(), 'bf16 and fp32 must differ for this test to see anything'
    # the weights were rounded to bf16 when they were loaded
    assert np.abs(found[1].astype(int) - single).mean() < 3 and (found[[0, 2]] == before[[0, 2]]).all()
    monkeypatch.undo()
    assert half.dtype == torch.bfloat16 and (half.views(embeddings, levels, seeds) == before).all()


def test_disk_full_is_one_line_and_the_same_command_goes_on(settings, tmp_path, monkeypatch):
    add, left = tarfile.TarFile.addfile, [17]

    def addfile(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return add(*arguments)

    monkeypatch.setattr(tarfile.TarFile, 'addfile', addfile)
    with pytest.raises(Fail, match='000001.tar: cannot be written: No space left on device') as error:
        generate(settings, tmp_path)
    assert '\n' not in str(error.value)
    assert os.listdir(Path(settings['output']) / 'views') == ['000000.tar']
    monkeypatch.undo()
    views, _ = stored(generate(settings, tmp_path))
    assert len(views) == N - 1


def test_odd_source_images_come_through(settings, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    plain, root = Image.fromarray(pixels).resize((24, 20), Image.Resampling.BICUBIC), tmp_path / 'odd'
    pixels = np.asarray(plain)
    root.mkdir()
    plain.convert('CMYK').save(root / 'a.jpg')
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(root / 'b.png')
    plain.resize((1, 1)).save(root / 'c.png')
    plain.save(root / 'd.gif', save_all=True, append_images=[Image.new('RGB', plain.size)])
    (root / 'e.png').write_bytes((root / 'b.png').read_bytes()[:100])
    np.savez(root / 'fg_proportion.npz', noise_level=np.array([0, 100, 200, 300, -1], np.int16))
    np.save(root / 'embeddings.npy', np.zeros((5, D), np.float16))
    folder = generate(settings, tmp_path, dataset={'name': 'folder', 'root': str(root)}, proportions=str(root),
                      beton_mode='jpg', image_size=16)
    loader = PairLoader(folder / 'pairs.beton', [{'size': 16}], alpha=0.0, batch_size=4, seed=0, num_workers=1,
                        shuffle=False)
    batch = next(iter(loader.epoch(0)))
    assert batch['index'].tolist() == [0, 1, 2, 3] and batch['noise_level'].tolist() == [0, 100, 200, 300]
    found = batch['views'][0].permute(0, 2, 3, 1).numpy().astype(int)
    assert np.ptp(found[2], (0, 1)).max() == 0 and np.ptp(found[1], 2).max() <= 3  # one pixel; grey
    source = np.asarray(plain.resize((19, 16), Image.Resampling.LANCZOS))[:, 2:18].astype(int)
    assert np.abs(found[0] - source).mean() < 15 and np.abs(found[3] - source).mean() < 15


def test_images_of_which_none_can_be_read_are_one_line(settings, tmp_path):
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none/a.jpg').write_bytes(b'not an image')
    with pytest.raises(Fail, match='pairs.beton: none of the 1 source images can be read'):
        generate(settings, tmp_path, dataset={'name': 'folder', 'root': str(tmp_path / 'none')}, strategy='none')


def test_several_views_an_image(settings, tmp_path, capsys):
    one, _ = stored(generate(settings, tmp_path, output=str(tmp_path / 'one')))
    folder = generate(settings, tmp_path, views_per_image=3)
    files = {name: content for chunk in folder.glob('views/*.tar') for name, content in read_chunk(chunk).items()}
    assert len(files) == 3 * (N - 1) + N
    views = {i: [np.asarray(Image.open(io.BytesIO(files[f'{i:08d}{v}.png']))).astype(int) for v in ('', '.2', '.3')]
             for i in one}
    for i, (first, second, third) in views.items():
        assert np.abs(first - one[i]).max() <= 1 and np.abs(first - second).mean() > 2 < np.abs(second - third).mean()
    assert open_beton(folder / 'pairs.beton')['fields'][-2:] == ['view_2', 'view_3']
    loader = PairLoader(folder / 'pairs.beton', [{'size': 16}] * 2, swap='second', batch_size=N - 1, seed=0,
                        num_workers=1)
    seen = {i: set() for i in one}
    for batch in (b for epoch in range(12) for b in loader.epoch(epoch)):
        for i, view in zip(batch['index'].tolist(), batch['views'][1]):
            seen[i] |= {v for v in range(3) if (view.permute(1, 2, 0).numpy() == views[i][v]).all()}
    assert sum(map(len, seen.values())) > 2.7 * len(seen)  # each is missed by 12 draws of an image with 0.8 %
    generate(settings, tmp_path, views_per_image=3, verify=True)
    assert f'verify: {3 * (N - 1)} views in 5 chunks and pairs.beton; all is well' in capsys.readouterr().out


def test_retrieval_takes_the_most_similar_other_image(settings, stage1, tmp_path, monkeypatch, capsys):
    """Against plain numpy; the pool compared in blocks; an unreadable image is never chosen."""
    from generators import Retrieval
    monkeypatch.setattr(Retrieval, 'BLOCK', 7)
    own = {'dataset': {'name': 'folder', 'root': str(stage1 / 'images'), 'split': 'train', 'subset': None}}
    (stage1 / 'config.yaml').write_text(yaml.safe_dump(own))
    embeddings = np.load(stage1 / 'embeddings.npy').astype(np.float64)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    images = [np.asarray(Image.open(stage1 / f'images/{i:03d}.png').resize(
        (16, 16), Image.Resampling.BICUBIC, box=(2, 0, 22, 20))) if i != UNREADABLE else None for i in range(N)]

    def check(folder, pool, forbidden, count=1):
        views, records = stored(folder) if count == 1 else (None, None)
        chunks = {name: content for path in sorted((folder / 'views').glob('*.tar'))
                  for name, content in read_chunk(path).items()}
        for i in set(range(N)) - {UNREADABLE}:
            cosine = embeddings[i] @ pool.T
            cosine[[UNREADABLE, *([i] if forbidden else [])]] = -2
            for v, j in enumerate(np.argsort(-cosine)[:count]):
                view = Image.open(io.BytesIO(chunks[f"{i:08d}{f'.{v + 1}' if v else ''}.png"]))
                assert (np.asarray(view) == images[j]).all()
            assert count > 1 or records[i]['noise_level'] == 0

    keys = {'strategy': 'retrieval', 'generator': {}}
    folder = generate(settings, tmp_path, **keys)
    check(folder, embeddings, True)
    assert open_beton(folder / 'pairs.beton')['samples'] == N - 1
    generate(settings, tmp_path, **keys, verify=True)
    assert 'all is well' in capsys.readouterr().out  # two images may have the same nearest one
    check(generate(settings, tmp_path, **keys, output=str(tmp_path / 'b'), views_per_image=3, pool=str(stage1),
                   batch_size=9), embeddings, True, 3)

    pool = tmp_path / 'pool'
    pool.mkdir()
    np.savez(pool / 'fg_proportion.npz', noise_level=LEVELS)
    np.save(pool / 'embeddings.npy', np.load(stage1 / 'embeddings.npy')[::-1])
    with pytest.raises(Fail, match='pool/config.yaml'):
        generate(settings, tmp_path, **keys, output=str(tmp_path / 'c'), pool=str(pool))
    (pool / 'config.yaml').write_text(yaml.safe_dump(own))
    check(generate(settings, tmp_path, **keys, output=str(tmp_path / 'c'), pool=str(pool)), embeddings[::-1], False)
    source = source_dataset({**own['dataset'], 'download': False})
    known = np.array([source.identity(i) for i in range(N)], np.uint32)
    np.savez(pool / 'fg_proportion.npz', noise_level=LEVELS, identity=np.where(np.arange(N) == 20, known + 1, known))
    with pytest.raises(Fail, match='pool.*020.png'):  # it has changed since
        generate(settings, tmp_path, **keys, output=str(tmp_path / 'e'), pool=str(pool), views_per_image=22)
    with pytest.raises(Fail, match='other settings: pool'):
        generate(settings, tmp_path, **keys, output=str(tmp_path / 'c'))
    absent = 'none/embeddings.npy: cannot be read .No such file.*run fg_proportion.py'
    for changes, message in (({'pool': str(tmp_path / 'none')}, absent),
                             ({'views_per_image': 22}, 'has 22 images, too few for views_per_image=22'),
                             ({'source': 'folder', 'views_root': str(stage1)}, 'set one of the two')):
        with pytest.raises(Fail, match=message):
            generate(settings, tmp_path, **{**keys, 'output': str(tmp_path / 'd'), **changes})


def test_views_made_elsewhere(settings, stage1, tmp_path, capsys):
    root, random_ = tmp_path / 'made', np.random.default_rng(5)
    pictures = {i: random_.integers(0, 255, (30, 26, 3), dtype=np.uint8) for i in range(N)}
    (root / 'deep').mkdir(parents=True)
    for i in range(N):
        if i not in (3, 4):
            Image.fromarray(pictures[i]).save(root / f'{i:03d}.webp', lossless=True)
    Image.fromarray(pictures[4]).save(root / 'deep/004.png')  # the right name in the wrong folder
    (root / '005.webp').write_bytes(b'no picture')
    changes = dict(source='folder', views_root=str(root), view_size=40)
    folder = generate(settings, tmp_path, **changes)
    out = capsys.readouterr().out
    assert 'made: 2 images have no view: 003.png, 004.png' in out
    assert '1 files there belong to no image: deep/004.png' in out
    assert '1 views failed or cannot be read: [5]' in out
    loader = PairLoader(folder / 'pairs.beton', [{'size': 26}] * 2, swap='second', batch_size=N - 1, seed=0,
                        num_workers=1, shuffle=False)
    batch = next(iter(loader.epoch(0)))
    levels = [-1 if i in (3, 4, 5) else LEVELS[i] for i in range(N) if i != UNREADABLE]
    assert batch['noise_level'].tolist() == levels
    for i, level, view in zip(batch['index'].tolist(), levels, batch['views'][1]):
        assert (view.permute(1, 2, 0).numpy() == pictures[i][2:28]).all() == (level >= 0)
    assert not (folder / 'views').exists()
    plain = generate(settings, tmp_path, **changes, proportions='', noise_level=250, output=str(tmp_path / 'plain'))
    assert set(data.Reader(str(plain / 'pairs.beton')).metadata['f4'].tolist()) == {-1, 250}
    with pytest.raises(Fail, match='no file in .* is named like an image of the dataset'):
        generate(settings, tmp_path, **{**changes, 'views_root': str(stage1)}, output=str(tmp_path / 'no'))


def of_transformers(visual, heads):
    """An open_clip ViT (its own layout, exact GELU, as ViT-H-14) as the image encoder of a diffusers pipeline."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    blocks, width = visual.transformer.resblocks, visual.conv1.out_channels
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=width, intermediate_size=blocks[0].mlp.c_fc.out_features, num_hidden_layers=len(blocks),
        num_attention_heads=heads, image_size=visual.image_size[0], patch_size=visual.patch_size[0],
        projection_dim=visual.output_dim, hidden_act='gelu'))
    old, new = visual.state_dict(), {}
    for ours, theirs in (('class_embedding', 'embeddings.class_embedding'), ('ln_pre', 'pre_layrnorm'),
                         ('positional_embedding', 'embeddings.position_embedding.weight'),
                         ('conv1', 'embeddings.patch_embedding'), ('ln_post', 'post_layernorm'),
                         *((f'transformer.resblocks.{k}.{a}', f'encoder.layers.{k}.{b}') for k in range(len(blocks))
                           for a, b in (('ln_1', 'layer_norm1'), ('ln_2', 'layer_norm2'), ('mlp.c_fc', 'mlp.fc1'),
                                        ('mlp.c_proj', 'mlp.fc2'), ('attn.out_proj', 'self_attn.out_proj')))):
        new |= {f'vision_model.{theirs}{key[len(ours):]}': value for key, value in old.items()
                if key == ours or key.startswith(f'{ours}.')}
    for k in range(len(blocks)):
        for kind in ('weight', 'bias'):
            parts = old[f'transformer.resblocks.{k}.attn.in_proj_{kind}'].chunk(3)
            new |= {f'vision_model.encoder.layers.{k}.self_attn.{n}_proj.{kind}': part for n, part in zip('qkv', parts)}
    model.load_state_dict({**new, 'visual_projection.weight': old['proj'].T.contiguous()}, strict=True)
    return model.eval()


def test_condition_of_the_pipelines_own_encoder(settings, stage1, tmp_path):
    """Stage 1's encoder (open_clip) and the pipeline's own image_encoder, on the same weights, those of tiny/clip: the
    embeddings agree within 1e-4 of their length, and so do the views."""
    from transformers import CLIPImageProcessor
    clip, folder = FrozenClip({'model': str(ROOT / 'tiny/clip')}), tmp_path / 'unclip'
    shutil.copytree(ROOT / 'tiny/unclip', folder)
    of_transformers(clip.visual, 3).save_pretrained(folder / 'image_encoder')
    CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=32, image_mean=clip.mean,
                       image_std=clip.std).save_pretrained(folder / 'feature_extractor')
    index = json.loads((folder / 'model_index.json').read_text())
    index.update(image_encoder=['transformers', 'CLIPVisionModelWithProjection'],
                 feature_extractor=['transformers', 'CLIPImageProcessor'])
    (folder / 'model_index.json').write_text(json.dumps(index))
    spec = {**SPEC, 'model': str(folder), 'condition': 'pipeline'}
    generator = UnCLIP(spec, torch.device('cpu'))
    paths = sorted(stage1.glob('images/*.png'))[:UNREADABLE]
    images = [Image.open(path).convert('RGB').resize((32, 32)) for path in paths]
    ours = clip.forward(torch.stack([clip.preprocess(image) for image in images]))[1].numpy()
    theirs = generator.embed(images)
    assert np.linalg.norm(theirs - ours, axis=1).max() < 1e-4 * np.linalg.norm(ours, axis=1).min()
    assert np.linalg.norm(ours[0] - ours[1]) > 0.1 * np.linalg.norm(ours[0])

    (tmp_path / 'small').mkdir()
    for k, image in enumerate(images):
        image.save(tmp_path / f'small/{k}.png')
    np.savez(tmp_path / 'fg_proportion.npz', noise_level=LEVELS[:UNREADABLE])
    common = {**settings, 'dataset': {'name': 'folder', 'root': str(tmp_path / 'small')}, 'proportions': str(tmp_path)}
    own, _ = stored(generate(common, tmp_path, generator=spec, output=str(tmp_path / 'own')))  # no embeddings.npy
    np.save(tmp_path / 'embeddings.npy', ours)
    kept, _ = stored(generate(common, tmp_path, generator={**spec, 'condition': 'stored'}))
    assert all(np.abs(own[i].astype(int) - kept[i]).mean() < 0.5 for i in range(UNREADABLE))


def test_beton_is_there_before_its_picture(settings, tmp_path, monkeypatch, capsys):
    def spread(*_):
        raise RuntimeError('cannot draw')
    monkeypatch.setattr(gen_views, 'spread', spread)
    folder = generate(settings, tmp_path)
    open_beton(folder / 'pairs.beton')
    out, err = capsys.readouterr()
    assert f'{folder}/pairs.png: no picture, but nothing else is missing (RuntimeError: cannot draw)\n' in err
    assert 'source above' not in out


def test_names_that_the_terminal_cannot_print(settings, stage1, tmp_path):
    """Views made elsewhere: of the four images one is damaged, one has no view, and one view has no image."""
    images, views = (os.fsencode(tmp_path) + part for part in (b'/images/', b'/made/'))
    for folder, names in ((images, (b'1.png', b'caf\xe9.png', '\u00e9.png'.encode())), (views, (b'1.png', b'b\xe9.png',
                                                                                           '\u00e9.png'.encode()))):
        os.mkdir(folder)
        for name in names:
            with open(stage1 / 'images/000.png', 'rb') as source, open(folder + name, 'wb') as file:
                file.write(source.read())
    with open(images + b'bad\xe9.png', 'wb') as file:
        file.write(b'not an image')
    path = tmp_path / 'experiment.yaml'
    path.write_text(yaml.safe_dump({
        **settings, 'dataset': {'name': 'folder', 'root': str(tmp_path / 'images')}, 'source': 'folder',
        'views_root': str(tmp_path / 'made'), 'proportions': ''}))
    ascii_only = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = subprocess.run(command(path), cwd=ROOT, env={**os.environ, **ascii_only}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert r'2 images have no view: bad\udce9.png, caf\udce9.png' in done.stdout
    assert r'1 files there belong to no image: b\udce9.png' in done.stdout
    assert open_beton(tmp_path / 'views/pairs.beton')['samples'] == 3
