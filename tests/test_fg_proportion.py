"""Stage 1 on small random models and images made here: the maths, the stage as users run it."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fg_proportion  # noqa: E402
from config import Fail, load_config  # noqa: E402
from files import atomic  # noqa: E402
from conftest import damages  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from start import mendable  # noqa: E402

N, UNREADABLE = 44, 13


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """N images of a bright square on dark noise; one of them is damaged."""
    root, random = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for i in range(N):
        pixels = random.integers(0, 80, (40, 36, 3), dtype=np.uint8)
        top, left, side = *random.integers(8, 20, 2), random.integers(4, 16)
        pixels[top:top + side, left:left + side] = random.integers(150, 255, 3)
        Image.fromarray(pixels).save(root / f'{i:03d}.png')
    (root / f'{UNREADABLE:03d}.png').write_bytes(b'not an image')
    return root


def write_yaml(path, images, clip, output, **more):
    path.write_text(yaml.safe_dump({
        'output': str(output), 'dataset': {'name': 'folder', 'root': str(images)}, 'clip': {'model': str(clip)},
        'pca_images': 20, 'chunk': 8, 'batch_size': 4, 'num_workers': 0, 'device': 'cpu', **more}))
    return path


def start(*arguments, processes=1):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    return subprocess.Popen([sys.executable, *(launcher if processes > 1 else []), 'fg_proportion.py',
                             *map(str, arguments)], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(job):
    output, errors = job.communicate(timeout=200)
    return job.returncode, output, errors


def load(folder):
    with np.load(folder / 'fg_proportion.npz', allow_pickle=False) as file:
        result = dict(file)
    if (folder / 'embeddings.npy').exists():
        result['embeddings'] = np.load(folder / 'embeddings.npy', mmap_mode='r')
    return result


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.fixture(scope='module')
def run(tmp_path_factory, clips, images):
    """An uninterrupted run with two workers: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp('run') / 'out'
    code, output, errors = finish(start(write_yaml(folder.parent / 'a.yaml', images, clips['vit'], folder,
                                                   num_workers=2)))
    assert code == 0, errors
    return folder, output


# ---------------------------------------------------------------------------------------------------
# Maths

@pytest.mark.parametrize('tokens', [16, 25, 49, 64, 100, 256])
def test_noise_level_is_equation_8(tokens):
    counts = np.arange(tokens + 1)
    expected = [min(400, 100 * (Fraction(int(c), tokens) // Fraction(1, 5))) for c in counts]
    for dtype in (np.float32, np.float64):
        assert fg_proportion.noise_level((counts / tokens).astype(dtype)).tolist() == expected
    assert fg_proportion.noise_level(np.array([np.nan, 0.5])).tolist() == [-1, 200]
    if tokens == 256:  # as the docstring says: here the official bins agree
        official = np.clip(100 * (np.digitize(counts / tokens, [0, .2, .4, .6, .8, 1], right=True) - 1), 0, None)
        np.testing.assert_array_equal(official, expected)


def test_position_share():
    """Of maps that are position plus independent noise: the share that position has of the variance."""
    random = np.random.default_rng(0)
    place, noise = random.normal(size=(8, 8)), random.normal(size=(4000, 8, 8))
    for scale in (0, 0.5, 3):
        share = scale ** 2 * place.var() / (scale ** 2 * place.var() + 1)
        assert fg_proportion.position_share(scale * place + noise) == pytest.approx(share, abs=0.01)
    assert fg_proportion.position_share(np.ones((5, 4, 4), np.float32)) == 0


def test_a_foreground_that_is_a_fixed_spot_is_warned_of(clips, images, tmp_path, capsys):
    """Of thirty times the same image, where position explains everything; not of the images of the other tests."""
    (tmp_path / 'same').mkdir()
    for i in range(30):
        shutil.copy(images / '000.png', tmp_path / f'same/{i:02d}.png')
    for name, root, warned in (('a', tmp_path / 'same', True), ('b', images, False)):
        path = write_yaml(tmp_path / f'{name}.yaml', root, ROOT / 'tiny/clip', tmp_path / name)
        fg_proportion.main(load_config(fg_proportion.DEFAULTS, [str(path)]))
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith('position: ')]
        record, = [json.loads(line) for line in open(tmp_path / name / 'log.jsonl') if '"position"' in line]
        assert ('WARNING: the foreground is nearly the same spot' in line) == warned == (record['position'] > 0.6)
        assert f"explains {record['position']:.0%} of" in line and (not warned or record['position'] > 0.999)


def test_first_component_equals_numpy_on_all_tokens():
    random = np.random.default_rng(0)
    tokens = random.normal(size=(500, 7)) @ random.normal(size=(7, 7)) + 30 * random.normal(size=7)
    halves = tokens[:200], tokens[200:]
    pc, mean, covariance = fg_proportion.first_component(
        500, sum(h.sum(0) for h in halves), sum(h.T @ h for h in halves))
    values, vectors = np.linalg.eigh(np.cov(tokens.T, bias=True))
    np.testing.assert_allclose(covariance, np.cov(tokens.T, bias=True), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(mean, tokens.mean(0))
    assert abs(pc @ vectors[:, -1]) == pytest.approx(1) and pc[np.abs(pc).argmax()] > 0
    assert pc @ covariance @ pc == pytest.approx(values[-1])


def test_sign_puts_the_foreground_in_the_middle():
    projection = np.random.default_rng(0).normal(size=(30, 8, 8))
    projection[:, 2:6, 2:6] -= 3
    sign, line = fg_proportion.choose_sign(projection, 0.4)
    assert sign == -1 and 'sign -1' in line and 'not sure' not in line
    assert fg_proportion.choose_sign(-projection, 0.4)[0] == 1
    assert fg_proportion.choose_sign(projection, 0.4, forced=1)[0] == 1
    noise = np.random.default_rng(1).normal(size=(300, 8, 8))
    assert 'not sure' in fg_proportion.choose_sign(noise, 0.4)[1]
    with pytest.raises(Fail, match='2 x 2 tokens'):
        fg_proportion.choose_sign(projection[:, :2, :2], 0.4)


# ---------------------------------------------------------------------------------------------------
# The stage as users run it

def test_stage_equals_plain_numpy(run, clips, images):
    folder, output = run
    result = load(folder)
    clip = FrozenClip({'model': str(clips['vit'])})
    readable = np.array([i for i in range(N) if i != UNREADABLE])
    tokens, embeddings = clip.forward(torch.stack([
        clip.preprocess(Image.open(images / f'{i:03d}.png')) for i in readable]))
    tokens = tokens.double().numpy()

    picked = np.random.default_rng(0).choice(N, 20, replace=False)
    chosen = np.isin(readable, picked)
    rows = tokens[chosen].transpose(0, 2, 3, 1).reshape(-1, 24)
    values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
    assert abs(vectors[:, -1] @ result['pc']) == pytest.approx(1, abs=1e-5)
    assert result['explained'] == pytest.approx(values[-1] / values.sum(), abs=1e-5)
    np.testing.assert_allclose(result['mean'], rows.mean(0), atol=1e-4)
    pc = vectors[:, -1] * np.sign(vectors[:, -1] @ result['pc'])
    projection = np.einsum('bkhw,k->bhw', tokens, pc)
    assert result['threshold'] == pytest.approx(np.quantile(projection[chosen], 0.6), abs=1e-4)
    foreground = projection > result['threshold']
    middle = np.zeros((8, 8), bool)
    middle[2:6, 2:6] = True
    border = np.ones((8, 8), bool)
    border[1:-1, 1:-1] = False
    assert foreground[chosen][:, middle].mean() > foreground[chosen][:, border].mean()

    proportion = result['proportion']
    assert proportion.dtype == np.float32 and result['noise_level'].dtype == np.int16
    assert proportion.shape == result['noise_level'].shape == (N,)
    np.testing.assert_allclose(proportion[readable], foreground.mean((1, 2)), atol=1 / 64)
    assert (np.abs(proportion[readable] - foreground.mean((1, 2))) < 1e-6).mean() > 0.9  # a token may sit on the edge
    np.testing.assert_array_equal(result['noise_level'][readable],
                                  np.minimum(400, 100 * np.floor(proportion[readable] * 64 * 5 / 64)))
    assert len(set(result['noise_level'].tolist())) > 2
    assert result['embeddings'].shape == (N, 20) and result['embeddings'].dtype == np.float16
    np.testing.assert_allclose(result['embeddings'][readable], embeddings, rtol=2e-3, atol=1e-3)
    assert f"sign {result['sign']:+d}: foreground are" in output


def test_unreadable_image_is_recorded_and_reported(run):
    folder, output = run
    result = load(folder)
    assert np.flatnonzero(np.isnan(result['proportion'])).tolist() == [UNREADABLE]
    assert np.flatnonzero(result['noise_level'] < 0).tolist() == [UNREADABLE]
    assert not result['embeddings'][UNREADABLE].any() and result['embeddings'][UNREADABLE + 1].any()
    assert f'1 unreadable images have noise level -1 and get no view: {UNREADABLE} ' in output
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    assert [line['unreadable'][0]['index'] for line in lines if 'unreadable' in line] == [UNREADABLE]
    assert {'stage', 'step', 'images_per_second', 'data_wait'} <= set(lines[1])


def test_run_folder(run):
    folder, _ = run
    assert {p.name for p in folder.iterdir()} == {
        'fg_proportion.npz', 'embeddings.npy', 'histogram.png', 'foreground.png', 'config.yaml', 'versions.json',
        'log.jsonl'}
    for name in ('histogram.png', 'foreground.png'):
        picture = np.asarray(Image.open(folder / name).convert('RGB'))
        assert picture.std() > 10 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_finished_run_stops_and_changed_settings_are_refused(run, clips, images, capsys):
    folder, _ = run
    before = (folder / 'fg_proportion.npz').stat().st_mtime_ns
    config = yaml.safe_load((folder / 'config.yaml').read_text())
    fg_proportion.main({**config, 'batch_size': 7})
    assert 'finished' in capsys.readouterr().out and (folder / 'fg_proportion.npz').stat().st_mtime_ns == before
    with pytest.raises(Fail, match=r'clip\.image_size \(was None, now 64\)'):
        fg_proportion.main({**config, 'clip': {**config['clip'], 'image_size': 64}})


def test_a_run_notices_that_its_images_have_changed(stage, clips, images, tmp_path, capsys):
    shutil.copytree(images, tmp_path / 'images')
    path = write_yaml(tmp_path / 'a.yaml', tmp_path / 'images', clips['vit'], tmp_path / 'out')
    stage(path, 'shard=0/2')                                     # chunks 0, 2, 4 of 8 images each
    (tmp_path / 'images/017.png').rename(tmp_path / 'images/0175.png')
    with pytest.raises(Fail, match='proportion-000002.npz: was made from other images: image 17 of 44 is 0175.png now'):
        stage(path)
    (tmp_path / 'images/0175.png').rename(tmp_path / 'images/017.png')
    stage(path)
    stage(path)
    assert 'finished' in capsys.readouterr().out
    (tmp_path / 'images/043.png').write_bytes((tmp_path / 'images/042.png').read_bytes() + b'x')
    with pytest.raises(Fail, match='fg_proportion.npz: was made from other images: image 43 of 44 is 043.png now'):
        stage(path)


def wait_for(path, job):
    begin = time.time()
    while not path.exists():
        assert job.poll() is None, job.communicate()
        assert time.time() - begin < 300
        time.sleep(0.005)


HELD = """
import sys, time
import fg_proportion, start
part, save = sys.argv.pop(), fg_proportion.Sweep.save
def held(self, file, *rest):
    save(self, file, *rest)
    begin = time.time()
    while file.stem == part and not self.stop and time.time() - begin < 300:
        time.sleep(0.01)
fg_proportion.Sweep.save = held
start.run(fg_proportion.main, fg_proportion.DEFAULTS)
"""  # waits for the signal once this part is written: on a busy machine it would have gone on before


def test_resumed_run_equals_uninterrupted(run, clips, images, tmp_path):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')
    for number, part in ((signal.SIGKILL, 'covariance-000001'), (signal.SIGKILL, 'proportion-000000'),
                         (signal.SIGTERM, 'proportion-000002')):
        job = subprocess.Popen([sys.executable, '-c', HELD, str(path), part], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
        wait_for(tmp_path / f'out/parts/{part}.npz', job)
        job.send_signal(number)
        code, output, errors = finish(job)
        assert code == (128 + number if number == signal.SIGTERM else -number), errors
        assert not (tmp_path / 'out/fg_proportion.npz').exists() and (tmp_path / f'out/parts/{part}.npz').exists()
    assert 'SIGTERM: finished chunks are saved; the same command resumes' in output
    code, output, errors = finish(start(path, 'num_workers=1'))
    assert code == 0 and 'covariance' not in output, errors
    assert re.search(r'proportion: \d+ of 44 images were done before', output)
    assert_equal(load(tmp_path / 'out'), load(run[0]))
    assert not (tmp_path / 'out/parts').exists()


def test_two_processes_equal_one(run, clips, images, tmp_path):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')
    code, output, errors = finish(start(path, processes=2))
    assert code == 0, errors
    assert_equal(load(tmp_path / 'out'), load(run[0]))
    assert output.count('wrote ') == 1


@pytest.fixture
def stage():
    """The stage inside this process."""
    return lambda *arguments: fg_proportion.main(load_config(fg_proportion.DEFAULTS, [str(a) for a in arguments]))


def test_tasks_of_an_array(stage, run, clips, images, tmp_path, monkeypatch, capsys):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')
    stage(path, 'shard=50/64')  # has no chunk of its own, but can do all of pass 1
    assert (tmp_path / 'out/parts/component.npz').is_file() and not list(tmp_path.glob('out/parts/proportion*'))
    assert '6 of 6 chunks are still to be made by other tasks' in capsys.readouterr().out
    stage(path, 'shard=0/2')
    output = capsys.readouterr().out
    assert '3 of 6 chunks are still to be made' in output and 'covariance: ' not in output
    assert not (tmp_path / 'out/fg_proportion.npz').exists()
    (tmp_path / 'out/.embeddings.npy.node.1.tmp.npy').touch()  # a killed process was writing it
    for name, value in {'ID': 7, 'COUNT': 2, 'MIN': 6, 'MAX': 7}.items():
        monkeypatch.setenv(f'SLURM_ARRAY_TASK_{name}', str(value))
    stage(path, 'num_workers=1')
    assert 'wrote ' in capsys.readouterr().out
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {path.name for path in run[0].iterdir()}
    assert_equal(load(tmp_path / 'out'), load(run[0]))


def test_two_tasks_on_the_same_chunks_do_no_harm(run, clips, images, tmp_path):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')
    jobs = [start(path, 'shard=0/1') for _ in range(2)]
    for code, output, errors in map(finish, jobs):
        assert code == 0, errors
    assert_equal(load(tmp_path / 'out'), load(run[0]))


def test_result_taken_away_by_a_faster_task(stage, run, clips, images, tmp_path, monkeypatch):
    folder, load_parts = tmp_path / 'out', fg_proportion.load_parts

    def late(files, *keys):  # another task has made the result and removed the chunks that this one is about to read
        if 'proportion' in files[0].name:
            (folder / 'fg_proportion.npz').write_bytes((run[0] / 'fg_proportion.npz').read_bytes())
            raise Fail('is missing')
        return load_parts(files, *keys)
    monkeypatch.setattr(fg_proportion, 'load_parts', late)
    stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], folder))
    assert (folder / 'fg_proportion.npz').read_bytes() == (run[0] / 'fg_proportion.npz').read_bytes()
    assert not (folder / 'parts').exists()


@pytest.mark.parametrize('links', [True, False])
def test_first_complete_file_counts(links, tmp_path, monkeypatch):
    if not links:
        def link(*_):
            raise OSError(errno.EPERM, 'Operation not permitted')
        monkeypatch.setattr(os, 'link', link)
    for text in ('first', 'second'):
        atomic(tmp_path / 'file', lambda path: path.write_text(text), once=True)
    assert (tmp_path / 'file').read_text() == 'first' and len(list(tmp_path.iterdir())) == 1

    def killed(path):  # between the link and the removal of the temporary file, by a process of the same number
        os.link(tmp_path / 'file', path) if links else None
        raise SystemExit
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, 'unlink', lambda *_, **__: None)
        atomic(tmp_path / 'file', killed, once=True)
    atomic(tmp_path / 'file', lambda path: path.write_text('third'), once=True)
    assert (tmp_path / 'file').read_text() == 'first' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('victim', ['covariance-000001.npz', 'proportion-000002.npz', 'embeddings.npy'])
def test_full_disk_is_one_line_and_loses_nothing(victim, stage, run, clips, images, tmp_path, monkeypatch):
    def fsync(number):
        if victim in os.readlink(f'/proc/self/fd/{number}'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')
    with monkeypatch.context() as patch, pytest.raises(Fail, match=f'{victim}: cannot be written: No space left'):
        patch.setattr(os, 'fsync', fsync)
        stage(path)
    assert not list((tmp_path / 'out').rglob('.*')) and not (tmp_path / 'out/fg_proportion.npz').exists()
    stage(path)
    assert_equal(load(tmp_path / 'out'), load(run[0]))


def test_full_disk_met_by_the_log(clips, images, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/log.jsonl').symlink_to('/dev/full')
    code, _, errors = finish(start(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')))
    assert code == 2 and errors.startswith('fg_proportion.py: No space left on device'), errors
    assert 'Traceback' not in errors


def test_kinds_of_images(stage, clips, tmp_path):
    folder = tmp_path / 'images'
    folder.mkdir()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    grey = np.asarray(rgb)[..., 0]
    files = {'0.tif': rgb.convert('CMYK'), '1.png': Image.fromarray(grey.astype(np.uint16) * 257), '2.png': rgb.crop(
        (3, 3, 4, 4)), '3.gif': rgb.convert('P'), '4.png': rgb}
    for name, image in files.items():
        image.save(folder / name, **({'save_all': True, 'append_images': [Image.new('P', (40, 40))]}
                                     if name == '3.gif' else {}))
    (folder / '5.png').write_bytes((folder / '4.png').read_bytes()[:900])  # cut short
    assert Image.open(folder / '3.gif').is_animated
    stage(write_yaml(tmp_path / 'a.yaml', folder, clips['vit'], tmp_path / 'out'))
    result, clip = load(tmp_path / 'out'), FrozenClip({'model': str(clips['vit'])})
    expected = [rgb.convert('CMYK').convert('RGB'), Image.fromarray(grey).convert('RGB'), files['2.png'],
                files['3.gif'].convert('RGB'), rgb]
    _, embeddings = clip.forward(torch.stack([clip.preprocess(image) for image in expected]))
    np.testing.assert_allclose(result['embeddings'][:5], embeddings, rtol=2e-3, atol=2e-3)
    assert np.isnan(result['proportion']).tolist() == [False] * 5 + [True]


def test_quality_encoder_writes_the_component_only(stage, clips, images, tmp_path, capsys):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['convnext'], tmp_path / 'out', pca_images=1000)
    stage(path, 'proportions=false')
    result = load(tmp_path / 'out')
    assert result.keys() == {'pc', 'mean', 'threshold', 'sign', 'explained', 'encoder', 'images', 'pca_images',
                             'pca_identity'}
    assert result['pc'].shape == (320,) and np.linalg.norm(result['pc']) == pytest.approx(1, abs=1e-6)
    assert f'1,000 asked for, the dataset has {N}: all are used' in capsys.readouterr().out


def test_published_component_and_sign_by_hand(stage, run, clips, images, tmp_path, capsys):
    vector = -3 * load(run[0])['pc'][:, None]  # shape (K, 1), another length, turned round
    np.save(tmp_path / 'pc.npy', vector)
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out', pca=str(tmp_path / 'pc.npy'))
    stage(path, 'sign=-1')
    got, expected = load(tmp_path / 'out'), load(run[0])
    assert got['sign'] == -1 and 'sign -1 (set by hand)' in capsys.readouterr().out
    np.testing.assert_allclose(got['pc'], expected['pc'], atol=1e-6)
    assert got['explained'] == pytest.approx(float(expected['explained']), abs=1e-5)
    assert np.nanmax(np.abs(got['proportion'] - expected['proportion'])) <= 1 / 64
    stage(path, f"output={tmp_path / 'again'}", f"pca={run[0] / 'fg_proportion.npz'}")  # and from another run
    np.testing.assert_allclose(load(tmp_path / 'again')['pc'], expected['pc'], atol=1e-6)


def test_bfloat16_changes_little(stage, run, clips, images, tmp_path):
    stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out'), 'precision=bf16')
    got, expected = load(tmp_path / 'out'), load(run[0])
    assert abs(got['pc'] @ expected['pc']) > 0.99
    assert not np.array_equal(got['embeddings'], expected['embeddings'])  # it was used
    assert np.nanmean(np.abs(got['proportion'] - expected['proportion'])) < 0.05


# ---------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize('change, words', [
    ('pca_image=5', "command line: unknown key 'pca_image'; did you mean 'pca_images'?"),
    ('foreground_share=much', "command line: 'foreground_share' must be float"),
    ('pca=nowhere.npy', 'pca: nowhere.npy: no such file')])
def test_mistakes_are_one_line_and_code_2(change, words, clips, images, tmp_path):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out')
    code, output, errors = finish(start(path, change))
    assert code == 2 and errors.startswith(f'fg_proportion.py: {words}') and errors.count('\n') == 1, errors
    assert not (tmp_path / 'out').exists() and not output


def test_missing_yaml_is_one_line_and_code_2(tmp_path):
    code, _, errors = finish(start(tmp_path / 'nowhere.yaml'))
    assert code == 2 and 'nowhere.yaml: no such file' in errors and errors.count('\n') == 1


@pytest.mark.parametrize('change, words', [
    ({'batch_size': 0}, 'batch_size: 0 must be a whole number from 1'),
    ({'foreground_share': 1.0}, 'foreground_share: 1.0 must be a number from 0.001 to 0.999'),
    ({'sign': 2}, 'sign: 2 is none of 1, -1'), ({'precision': 'fp8'}, "precision: 'fp8' is unknown"),
    ({'pca': 'wide.npy'}, 'wide.npy has width 25, the tokens of this encoder have 24'),
    ({'pca': 'flat.npy'}, 'flat.npy: no principal component in it: it must be of shape'),
    ({'pca': 'text.npy'}, 'text.npy: is text'),
    ({'pca': 'zero.npy'}, 'zero.npy: no principal component in it')])
def test_impossible_values_leave_nothing_behind(change, words, clips, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save('wide.npy', np.ones(25))
    np.save('flat.npy', np.ones((2, 12)))
    np.save('zero.npy', np.zeros(24))
    Path('text.npy').write_text('1 2 3')
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out', **change)
    with pytest.raises(Fail, match=words):
        fg_proportion.main(load_config(fg_proportion.DEFAULTS, [str(path)]))
    assert not (tmp_path / 'out').exists()


def test_damaged_files_of_an_earlier_run(stage, run, clips, images, tmp_path):
    folder = tmp_path / 'out'
    yaml_ = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], folder)
    (folder / 'parts').mkdir(parents=True)
    for name, source in (('config.yaml', run[0] / 'config.yaml'), ('parts/run.npz', run[0] / 'fg_proportion.npz')):
        shutil.copy(source, folder / name)
        for damaged in damages(folder / name):
            with pytest.raises(Fail, match=f'{name}: .*delete {folder} to start again') as error:
                stage(yaml_)
            assert damaged in str(error.value) and '\n' not in str(error.value)
        (folder / name).unlink()
    np.savez(tmp_path / 'part.npz', pc=np.ones(500))
    for damaged in damages(tmp_path / 'part.npz'):
        with pytest.raises(Fail, match='part.npz: .*; delete it and start the same command again') as error:
            list(fg_proportion.load_parts([tmp_path / 'part.npz'], 'pc'))
        assert damaged in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(Fail, match='part.npz: .*holds no mean'):
        list(fg_proportion.load_parts([tmp_path / 'part.npz'], 'pc', 'mean'))


def test_a_task_with_other_settings_does_not_join(stage, clips, images, tmp_path, monkeypatch):
    """It looked before the first one had written its config.yaml."""
    folder = tmp_path / 'out'
    with pytest.raises(Fail, match='to start again'):  # the first task ends early: its chunks and run.npz stay
        with monkeypatch.context() as patch:
            patch.setattr(fg_proportion, 'first_component', lambda *_: (_ for _ in ()).throw(Fail('to start again')))
            stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], folder))
    (folder / 'config.yaml').unlink()
    for changes, words in (({'foreground_share': 0.3}, r'other settings: foreground_share \(was 0.4, now 0.3\)'),
                           ({'precision': 'bf16'}, r'other settings: precision')):
        with pytest.raises(Fail, match=f'{folder}: another task has begun with {words}'):
            stage(write_yaml(tmp_path / 'b.yaml', images, clips['vit'], folder, **changes))
        assert not (folder / 'config.yaml').exists()
    monkeypatch.setattr(fg_proportion, 'precision_dtype', lambda *_: torch.bfloat16)  # auto, on another device
    with pytest.raises(Fail, match='was started in float32, this device would go on in bfloat16'):
        stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], folder))
    monkeypatch.undo()
    stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], folder))
    assert (folder / 'fg_proportion.npz').is_file()


def test_images_of_the_component_that_changed(stage, clips, images, tmp_path):
    """With proportions: false, and between the two passes of a run."""
    root = tmp_path / 'images'
    shutil.copytree(images, root)
    path = write_yaml(tmp_path / 'a.yaml', root, clips['vit'], tmp_path / 'out', proportions=False, pca_images=N)
    stage(path)
    stage(path)  # finished
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / '020.png')
    with pytest.raises(Fail, match='was made from other images: image 20 of 44 is 020.png now'):
        stage(path)


def test_all_images_unreadable(stage, clips, tmp_path):
    (tmp_path / 'images').mkdir()
    for i in range(3):
        (tmp_path / f'images/{i}.png').write_bytes(b'not an image')
    with pytest.raises(Fail, match='unreadable, and so are all of the pca images'):
        stage(write_yaml(tmp_path / 'a.yaml', tmp_path / 'images', clips['vit'], tmp_path / 'out'))


def test_result_is_there_before_its_pictures(stage, run, clips, images, tmp_path, monkeypatch, capsys):
    def draw(*_, **__):
        assert (tmp_path / 'out/fg_proportion.npz').is_file()
        raise RuntimeError('cannot draw')
    monkeypatch.setattr(fg_proportion, 'histograms', draw)
    stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out'))
    assert_equal(load(tmp_path / 'out'), load(run[0]))
    assert capsys.readouterr().err == (f'{tmp_path}/out: no picture, but nothing else is missing (RuntimeError: cannot '
                                       'draw)\n')


LOSES_A_WORKER = """
import os, signal
import fg_proportion, start
def dies(self, index):
    os.kill(os.getpid(), signal.SIGBUS)
fg_proportion.Images.__getitem__ = dies
start.run(fg_proportion.main, fg_proportion.DEFAULTS)
"""


def test_a_worker_that_dies_is_one_line(clips, images, tmp_path):
    path = write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out', num_workers=1)
    done = subprocess.run([sys.executable, '-c', LOSES_A_WORKER, str(path)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    ours = done.stderr.splitlines()[-1]  # of a bus error the worker has its say too
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert all(word in ours for word in ('num_workers=0', '--shm-size', 'DataLoader worker'))


@pytest.mark.parametrize('text, known', [
    ('unable to write to file </torch_1_2>: allocate shared memory: No space left on device (28)', True),
    ('another mistake', False)])  # ours keeps its traceback
def test_shared_memory_that_is_too_small_is_one_line(text, known, clips, images, tmp_path, stage, monkeypatch):
    def fails(self, index):
        raise RuntimeError(text)
    monkeypatch.setattr(fg_proportion.Images, '__getitem__', fails)  # in the forked worker too
    with pytest.raises(RuntimeError, match='Caught RuntimeError in DataLoader worker') as error:
        stage(write_yaml(tmp_path / 'a.yaml', images, clips['vit'], tmp_path / 'out', num_workers=1))
    ours = mendable(error.value)
    assert bool(ours) == known
    assert not known or all(word in ours for word in ('num_workers=0', '--shm-size', 'No space left'))


def test_names_that_the_terminal_cannot_print(clips, tmp_path):
    folder, random = os.fsencode(tmp_path) + b'/images', np.random.default_rng(0)
    os.mkdir(folder)
    for name in (b'/caf\xe9.png', '/\u00e9.png'.encode(), b'/1.png'):
        with open(folder + name, 'wb') as file:
            Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, 'PNG')
    with open(folder + b'/bad\xe9.png', 'wb') as file:
        file.write(b'not an image')
    path = write_yaml(tmp_path / 'a.yaml', tmp_path / 'images', clips['vit'], tmp_path / 'out')
    ascii_only = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = subprocess.run([sys.executable, 'fg_proportion.py', str(path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **ascii_only}, timeout=300)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    assert r'bad\udce9.png' in done.stdout
    assert (load(tmp_path / 'out')['noise_level'] < 0).tolist() == [False, True, False, False]
