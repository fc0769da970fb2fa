"""view_eval.py with the embedded CLIP and planted pairs: same, exchanged and missing views, near neighbours, levels."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import view_eval  # noqa: E402
from common import Processes  # noqa: E402
from config import Fail, load_config  # noqa: E402
from data import write_beton  # noqa: E402
from distances import Frechet, ssim  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from loss import pair_quality  # noqa: E402
from models import normalize  # noqa: E402

N, WITHOUT, TWINS = 17, 9, (2, 11)  # images, the one without a view, two that look alike
LEVELS = np.array([-1 if i == WITHOUT else (0, 100, 300)[i % 3] for i in range(N)])
pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """Betons whose views are the originals themselves (same), others' originals (exchanged), both (half: level 0 the
    same, the others exchanged), or not there (none), and a principal component for tiny/clip."""
    folder, random = tmp_path_factory.mktemp('view_eval'), np.random.default_rng(0)
    images = [np.asarray(Image.fromarray(random.integers(0, 255, (4, 4, 3), np.uint8)).resize((32, 32)))
              for _ in range(N)]
    images[TWINS[1]] = np.clip(images[TWINS[0]] + random.integers(-4, 5, (32, 32, 3)), 0, 255).astype(np.uint8)
    other = [images[(i + 5) % N] for i in range(N)]
    views = {'same': images, 'exchanged': other, 'half': [images[i] if LEVELS[i] == 0 else other[i] for i in range(N)]}
    for name, made in views.items():
        write_beton(folder / f'{name}.beton', lambda i: (
            images[i], None if i == WITHOUT else made[i], 0, i, LEVELS[i]), N, {'strategy': 'adaptive'}, num_workers=1)
    write_beton(folder / 'none.beton', lambda i: (images[i], None, 0, i, -1), N, {'strategy': 'none'}, num_workers=1)
    clip = FrozenClip({'model': str(ROOT / 'tiny/clip')})
    np.savez(folder / 'fg_proportion.npz', pc=random.normal(size=192).astype(np.float32), encoder=clip.fingerprint())
    np.savez(folder / 'other.npz', pc=random.normal(size=192).astype(np.float32), encoder='0123')
    np.save(folder / 'narrow.npy', np.ones(7, np.float32))
    return folder, images, clip


def changes_of(workplace, name, *changes):
    folder, _, _ = workplace
    return [str(ROOT / 'yamls/view_eval/cifar10.yaml'), f'clip.model={ROOT}/tiny/clip', f'pairs={folder}/{name}.beton',
            f'quality.pc={folder}/fg_proportion.npz', 'batch=4', 'num_workers=1', 'precision=fp32', 'examples=12',
            *changes]


def evaluate(workplace, name, output, *changes):
    view_eval.main(load_config(view_eval.DEFAULTS, changes_of(workplace, name, f'output={output}', *changes),
                               nullable=('images',)))
    return json.loads((output / 'results.json').read_text())


def test_identical_views_have_cosine_one(workplace, tmp_path):
    found = evaluate(workplace, 'same', tmp_path)
    for part in found['cosine'].values():
        assert part['5%'] == part['95%'] == pytest.approx(1, abs=1e-4)
    assert {key: part['n'] for key, part in found['cosine'].items()} == {'all': 16, '0': 5, '100': 6, '300': 5}
    assert (found['pairs'], found['without_view'], found['strategy']) == (16, 1, 'adaptive')
    assert found['quality']['all']['mean'] == pytest.approx(0, abs=1e-4)  # foreground and background are the same
    assert {part['mean'] for part in found['ssim'].values()} == {1} and list(found['ssim']) == list(found['cosine'])
    assert found['frechet_clip'] == pytest.approx(0, abs=1e-5) and 'fid' not in found
    assert found['unrelated']['mean'] < 0.95 and found['retrieval']['mean'] < 0.99
    for name in ('pairs.png', 'cosine.png'):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert('RGB').resize((64, 64)).getcolors(4096)) > 20
    assert {'config.yaml', 'versions.json', 'log.jsonl'} < {p.name for p in tmp_path.iterdir()}


def test_levels_and_exchanged_views(workplace, tmp_path):
    exchanged, half = (evaluate(workplace, name, tmp_path / name) for name in ('exchanged', 'half'))
    assert exchanged['cosine']['all']['mean'] < 0.95
    assert half['cosine']['0']['mean'] == pytest.approx(1, abs=1e-4)
    for level in ('100', '300'):
        assert half['cosine'][level] == exchanged['cosine'][level] and half['cosine'][level]['mean'] < 0.95
    assert half['retrieval'] == exchanged['retrieval']  # has nothing to do with the views


def test_measures_are_those_of_the_encoder(workplace, tmp_path):
    """Cosines and qualities pair by pair, straight from the images."""
    folder, images, clip = workplace
    config = load_config(view_eval.DEFAULTS, changes_of(workplace, 'exchanged'))
    positions, pc = np.flatnonzero(LEVELS >= 0), torch.from_numpy(np.load(folder / 'fg_proportion.npz')['pc'])
    originals, views, quality = view_eval.embed(config, clip, pc, positions, Processes('cpu'), torch.float32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (clip.mean, clip.std))
    tokens, embedding = clip.forward(normalize(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), mean, std))
    embedding, other = embedding / embedding.norm(dim=1, keepdim=True), (positions + 5) % N
    assert torch.allclose(originals, embedding[positions], atol=1e-5)
    assert torch.allclose(views, embedding[other], atol=1e-5)
    assert torch.allclose(quality, pair_quality(tokens[positions], tokens[other], pc), atol=1e-5)
    assert view_eval.embed(config, clip, None, positions, Processes('cpu'), torch.float32)[2] is None


def test_retrieval(workplace, monkeypatch):
    """The planted twins find each other, no image itself, and blocks change nothing."""
    _, _, clip = workplace
    config = load_config(view_eval.DEFAULTS, changes_of(workplace, 'same'))
    positions = np.flatnonzero(LEVELS >= 0)
    originals, _, _ = view_eval.embed(config, clip, None, positions, Processes('cpu'), torch.float32)
    cosines, numbers = view_eval.nearest_other(originals, Processes('cpu'))
    first, second = (positions.tolist().index(twin) for twin in TWINS)
    assert numbers[first] == second and numbers[second] == first and cosines[first] == cosines[second] > 0.9
    expected = (originals @ originals.T).numpy()
    np.fill_diagonal(expected, -2)
    assert numbers.tolist() == expected.argmax(1).tolist() and np.allclose(cosines, expected.max(1), atol=1e-6)
    monkeypatch.setattr(view_eval, 'BLOCK', 3 * len(positions))
    blocks = view_eval.nearest_other(originals, Processes('cpu'))
    assert torch.allclose(blocks[0], cosines, atol=1e-6) and torch.equal(blocks[1], numbers)


class Colours(torch.nn.Module):
    """Stands for FID's network: uint8 (B, 3, S, S) -> mean and deviation of each colour (B, 6)."""
    width = 6

    def forward(self, images):
        return torch.cat([images.float().flatten(2).mean(2), images.float().flatten(2).std(2)], 1)


def test_distances_are_those_of_the_images(workplace, tmp_path, monkeypatch):
    folder, images, clip = workplace
    monkeypatch.setattr(view_eval, 'fid_inception', lambda path: {'weights.pth': Colours()}[path])
    found = evaluate(workplace, 'half', tmp_path, 'fid.weights=weights.pth')
    every = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    of = np.delete(np.arange(N), WITHOUT)
    made = np.where(LEVELS[of] == 0, of, (of + 5) % N)
    assert found['ssim']['all']['mean'] == pytest.approx(ssim(every[of], every[made]).mean().item(), abs=1e-4)
    assert found['ssim']['0']['mean'] == 1 and found['ssim']['100']['mean'] < 0.5
    _, embedding = clip.encode(every, torch.float32)
    for key, rows in (('fid', Colours()(every)), ('frechet_clip', torch.nn.functional.normalize(embedding))):
        expected = Frechet(rows.shape[1], torch.device('cpu'))
        expected.add(rows[of], rows[made])
        assert found[key] == pytest.approx(float(expected.compute()), rel=1e-3) and found[key] > 0.001
    assert f"| fid {found['fid']:.3f}" in found['summary']
    smaller = evaluate(workplace, 'half', tmp_path / 'smaller', 'size=16')
    assert smaller['ssim']['100']['mean'] != found['ssim']['100']['mean']
    assert smaller['frechet_clip'] == found['frechet_clip'] and 'fid' not in smaller


def test_by_level():
    values, levels = torch.tensor([1.0, 2, 3, 10]), np.array([0, 0, 0, 400])
    found = view_eval.by_level(values, levels)
    assert list(found) == ['all', '0', '400'] and [found[k]['n'] for k in found] == [4, 3, 1]
    assert found['0'] == {'n': 3, 'mean': 2.0, 'std': pytest.approx(0.8165, abs=1e-4), '5%': 1.1, '25%': 1.5,
                          '50%': 2.0, '75%': 2.5, '95%': 2.9}


def test_drawn_pairs_without_component(workplace, tmp_path, capsys):
    found = evaluate(workplace, 'half', tmp_path, 'images=7', 'quality.pc=')
    again = evaluate(workplace, 'half', tmp_path / 'again', 'images=7', 'quality.pc=', 'batch=3')
    assert found['pairs'] == 7 and 'quality' not in found and found['cosine'] == again['cosine']
    capsys.readouterr()
    written = (tmp_path / 'results.json').stat().st_mtime_ns
    evaluate(workplace, 'half', tmp_path, 'images=7', 'quality.pc=', 'batch=5')
    assert 'finished before' in capsys.readouterr().out
    assert (tmp_path / 'results.json').stat().st_mtime_ns == written
    assert evaluate(workplace, 'half', tmp_path, 'images=', 'quality.pc=')['pairs'] == 16


def test_files_that_changed_under_their_names_are_another_question(workplace, tmp_path, capsys):
    pc = dict(np.load(workplace[0] / 'fg_proportion.npz'))
    np.savez(tmp_path / 'pc.npz', **pc)
    changes = ('half', tmp_path / 'out', f'quality.pc={tmp_path}/pc.npz')
    first = evaluate(workplace, *changes)['quality']['all']['mean']
    assert evaluate(workplace, *changes)['quality']['all']['mean'] == first
    assert 'finished before' in capsys.readouterr().out
    np.savez(tmp_path / 'pc.npz', **{**pc, 'pc': -pc['pc']})  # stage 1 again, with the other sign
    assert evaluate(workplace, *changes)['quality']['all']['mean'] == pytest.approx(-first, abs=1e-4)
    assert 'finished before' not in capsys.readouterr().out and abs(first) > 1e-3


def test_two_processes_find_the_same(workplace, tmp_path):
    one = evaluate(workplace, 'half', tmp_path / 'one', 'images=15')  # does not divide by 2
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         str(ROOT / 'view_eval.py'), *changes_of(workplace, 'half', 'images=15', f'output={tmp_path}/two')],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    two = json.loads((tmp_path / 'two/results.json').read_text())
    for key in ('pairs', 'without_view', 'encoder'):
        assert one[key] == two[key]
    for a, b in ((one[k], two[k]) for k in ('retrieval', 'unrelated')):
        assert a == pytest.approx(b, abs=2e-5)
    assert one['frechet_clip'] == pytest.approx(two['frechet_clip'], rel=1e-3)
    for key in ('cosine', 'quality', 'ssim'):
        for level in one[key]:
            assert one[key][level] == pytest.approx(two[key][level], abs=2e-5)


@pytest.mark.parametrize('change, message', [
    ('pairs=', 'pairs: must name a file'), ('pairs=none/at.all', 'at.all: does not exist'),
    ('quality.pc=nowhere.npz', 'quality.pc: nowhere.npz: no such file'), ('batch=0', 'batch: 0 must be a whole'),
    ('quality.pc=FOLDER/other.npz', 'was made with other weights'), ('quality.pc=FOLDER/narrow.npy', 'has width 7'),
    ('clip.model=tiny/clop', 'tiny/clop. is no folder'), ('images=1', 'images: 1 must be a whole number from 2'),
    ('precision=fp8', 'precision'), ('size=10', 'size: 10 must be a whole number from 11'),
    ('fid.weights=nowhere.pth', 'nowhere.pth: no such checkpoint'),
    ('pairs=FOLDER/none.beton', 'holds 0 images with a synthetic view')])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    with pytest.raises(Fail, match=message) as error:
        evaluate(workplace, 'same', tmp_path / 'out', change.replace('FOLDER', str(workplace[0])))
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', sorted((ROOT / 'yamls/view_eval').glob('*.yaml')), ids=lambda p: p.name)
def test_experiments_that_ship_are_valid(path):
    view_eval.check(load_config(view_eval.DEFAULTS, [str(path)], nullable=('images',)))


def test_result_is_there_before_its_pictures(workplace, tmp_path, monkeypatch, capsys):
    def draw(*_, **__):
        assert (tmp_path / 'results.json').is_file()
        raise RuntimeError('cannot draw')
    monkeypatch.setattr(view_eval, 'histograms', draw)
    assert evaluate(workplace, 'half', tmp_path, 'images=7', 'quality.pc=')['pairs'] == 7
    assert capsys.readouterr().err.endswith('no picture, but nothing else is missing (RuntimeError: cannot draw)\n')
