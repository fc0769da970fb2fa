"""data.py: betons that are damaged in every way, writing them, the loader's order, pixels and errors."""
import errno
import fcntl
import gc
import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from config import Fail  # noqa: E402
from conftest import FULL, picture  # noqa: E402
from data import PairLoader, open_beton, write_beton  # noqa: E402


def sample(i):
    """Every fifth sample has no view; sizes differ."""
    view = None if i % 5 == 4 else picture(1000 + i, 36, 36)
    return picture(i, 40 + i % 7, 48), view, i % 3, 10 * i, -1 if view is None else 100


def flat(batch):
    """A batch as bytes per index, to compare across batch sizes and ranks."""
    pixels = lambda k: b''.join(v[k].contiguous().numpy().tobytes() for v in batch['views'])
    return {int(i): pixels(k) + bytes([batch['synthetic'][k] + 1]) for k, i in enumerate(batch['index'])}


def epoch(loader, *args):
    found = {}
    for batch in loader.epoch(*args):
        found |= flat(batch)
    return found


@pytest.fixture(scope='module')
def jpg(tmp_path_factory):
    path = tmp_path_factory.mktemp('jpg') / 'pairs.beton'
    write_beton(path, sample, 60, {'what': 'test'}, mode='jpg', quality=95)
    return path


@pytest.fixture(scope='module')
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp('raw') / 'pairs.beton'
    write_beton(path, sample, 60, {}, mode='raw')
    return path


@pytest.fixture
def copy(jpg, tmp_path):
    """A copy of the beton and its sidecar, to damage."""
    for name in (jpg.name, f'{jpg.name}.json'):
        shutil.copy(jpg.parent / name, tmp_path / name)
    return tmp_path / jpg.name


def flip(path, at):
    with open(path, 'r+b') as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0xFF]))


def reseal(path):
    """Make the sidecar agree with a damaged beton, so that only reading can find the damage."""
    side = json.loads(Path(f'{path}.json').read_text())
    side['bytes'] = path.stat().st_size
    side['crc32'] = data._crc32(path, range(-(-side['bytes'] // data.BLOCK)))
    Path(f'{path}.json').write_text(json.dumps(side))


# ---------------------------------------------------------------------------------------------------------------------
# The fault table: what a user does to a file, and the one line that answers

def half_written(p):
    p.rename(f'{p}.partial')


def edit_sidecar(**changes):
    return lambda p: Path(f'{p}.json').write_text(json.dumps({**json.loads(Path(f'{p}.json').read_text()), **changes}))


FAULTS = {
    'missing': (lambda p: p.unlink(), 'does not exist'),
    'half-written': (half_written, 'does not exist .only a half-written'),
    'empty': (lambda p: p.write_bytes(b''), 'empty or not an FFCV beton'),
    'foreign': (lambda p: p.write_bytes(b'PK\3\4' * 5000), 'empty or not an FFCV beton'),
    'half': (lambda p: os.truncate(p, p.stat().st_size // 2), 'truncated'),
    'nine tenths': (lambda p: os.truncate(p, p.stat().st_size * 9 // 10), 'truncated'),
    'last 4 KB': (lambda p: os.truncate(p, p.stat().st_size - 4096), 'truncated'),
    'longer': (lambda p: os.truncate(p, p.stat().st_size + 4096), 'not the file the sidecar belongs to'),
    'data flipped': (lambda p: flip(p, data.Reader(str(p)).alloc_table['ptr'][17] + 99), 'damaged'),
    'metadata flipped': (lambda p: flip(p, 24 + 5 * 1041 + 30), 'damaged'),
    'number of samples flipped': (lambda p: flip(p, 12), 'damaged'),
    'table flipped': (lambda p: flip(p, p.stat().st_size - 20), 'damaged'),
    'no sidecar': (lambda p: Path(f'{p}.json').unlink(), 'sidecar pairs.beton.json is missing'),
    'sidecar is no JSON': (lambda p: Path(f'{p}.json').write_text('{"samples": 6'), 'not the sidecar'),
    'sidecar is other JSON': (lambda p: Path(f'{p}.json').write_text('[1, 2]'), 'not the sidecar'),
    'sidecar of another beton': (edit_sidecar(bytes=1 << 24), 'truncated'),
    'sidecar counts other samples': (edit_sidecar(samples=59), '60 samples, its sidecar says 59'),
    'sidecar without checksums': (edit_sidecar(crc32=[]), 'not the sidecar'),
    'sidecar without settings': (lambda p: Path(f'{p}.json').write_text(Path(f'{p}.json').read_text().replace(
        '"settings"', '"setings"')), 'not the sidecar'),
    'other fields': (edit_sidecar(fields=['image', 'label']), 'its fields are'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_every_damage_is_one_clear_line(copy, fault):
    damage, words = FAULTS[fault]
    open_beton(copy)                                     # remembered as good: the damage must be seen all the same
    damage(copy)
    with pytest.raises(Fail, match=words) as e:
        PairLoader(copy, [FULL], batch_size=4, seed=0, num_workers=1)
    assert str(copy) in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 400


def test_metadata_is_checked_without_verify(copy):
    flip(copy, 24 + 5 * 1041 + 30)
    with pytest.raises(Fail, match='damaged'):
        open_beton(copy, verify=False)


def test_a_beton_with_other_fields_is_refused(copy):
    with open(copy, 'r+b') as file:                      # rename `view` in the file itself
        file.seek(24 + 1041 + 1)
        file.write(b'wiew')
    reseal(copy)
    with pytest.raises(Fail, match='its fields are image, wiew'):
        open_beton(copy)


def test_full_check_is_remembered_until_the_file_changes(copy, monkeypatch):
    monkeypatch.setattr(data, 'BLOCK', 1 << 16)
    reseal(copy)
    checked, crc32 = [], data._crc32
    monkeypatch.setattr(data, '_crc32', lambda path, blocks: checked.append(len(blocks)) or crc32(path, blocks))
    every = -(-copy.stat().st_size // data.BLOCK)
    open_beton(copy), open_beton(copy)
    assert checked[0] == every and 0 < checked[1] < every
    os.utime(copy)
    open_beton(copy)
    assert checked[2] == every


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def test_sidecar_and_bytes_do_not_depend_on_workers(tmp_path):
    for mode in ('raw', 'jpg'):
        for workers in (1, 3):
            side = write_beton(tmp_path / f'{mode}{workers}', sample, 40, {'a': [1]}, mode=mode, num_workers=workers)
        assert (tmp_path / f'{mode}1').read_bytes() == (tmp_path / f'{mode}3').read_bytes()
        assert side == open_beton(tmp_path / f'{mode}3')
        assert (side['samples'], side['with_view'], side['max_resolution']) == (40, 32, 48)
        assert side['settings'] == {'a': [1]}
        assert side['bytes'] < 20e6                      # small sets stay small
    assert not list(tmp_path.glob('*.partial'))


def test_no_image_crosses_a_page_and_all_lie_in_order(tmp_path):
    page = 1 << 19
    write_beton(tmp_path / 'b', lambda i: (picture(i, 300, 400), picture(i, 200, 300), 0, i, 0), 20, {}, page_size=page)
    regions = data.Reader(str(tmp_path / 'b')).alloc_table.astype([(k, np.int64) for k in ('sample_id', 'ptr', 'size')])
    first, end = regions['ptr'], regions['ptr'] + regions['size']
    assert (first // page == (end - 1) // page).all() and (first[1:] >= end[:-1]).all()
    assert len(np.unique(first // page)) > 5


@pytest.mark.parametrize('bad, words', [
    (lambda: (np.zeros((8, 8), np.uint8), None, 0, 7, -1), r'`image` must be a uint8 array'),
    (lambda: (np.zeros((8, 8, 4), np.uint8), None, 0, 7, -1), r'not uint8 \(8, 8, 4\)'),
    (lambda: (np.zeros((8, 8, 3)), None, 0, 7, -1), 'not float64'),
    (lambda: (Image.new('RGB', (8, 8)), None, 0, 7, -1), 'not Image'),
    (lambda: (None, None, 0, 7, -1), 'not NoneType'),
    (lambda: (picture(0), np.zeros((0, 8, 3), np.uint8), 0, 7, 0), '`view` has 0 x 8 pixels'),
    (lambda: (picture(0), None, 0, 7, 200), 'noise_level'),
    (lambda: (picture(0), picture(1), 0, 7, -1), 'noise_level'),
    (lambda: (picture(0), None, 0, -7, -1), 'index'),
    (lambda: open('/nowhere/at/all'), 'sample 7 cannot be read: .*No such file'),
    (lambda: 1 / 0, 'division by zero')])
def test_a_bad_sample_stops_the_writer_and_leaves_nothing(tmp_path, bad, words):
    before = threading.active_count()
    with pytest.raises((Fail, ZeroDivisionError), match=words) as e:
        write_beton(tmp_path / 'b.beton', lambda i: bad() if i == 7 else sample(i), 30, {})
    assert 'division' in words or 'sample 7' in str(e.value)
    assert os.listdir(tmp_path) == [] and threading.active_count() <= before


def test_a_page_grows_with_the_largest_image_unless_it_was_chosen(tmp_path):
    big = lambda i: (picture(i, *((1000, 1000) if i == 7 else (40, 48))), None, 0, i, -1)
    with pytest.raises(Fail, match='sample 7: an image of 3,000,000 bytes does not fit a page of 1,048,576'):
        write_beton(tmp_path / 'b', big, 30, {}, page_size=1 << 20)
    write_beton(tmp_path / 'b', big, 30, {})
    header, = np.fromfile(tmp_path / 'b', data.HeaderType, 1)
    regions = data.Reader(str(tmp_path / 'b')).alloc_table
    first, size = (regions[key].astype(np.int64) for key in ('ptr', 'size'))
    assert header['page_size'] == 1 << 22                # from 2 MiB
    stored = first[size > 0] // header['page_size'], (first + size - 1)[size > 0] // header['page_size']
    assert (stored[0] == stored[1]).all() and size.max() == 3_000_000
    loader = PairLoader(tmp_path / 'b', [{'size': 40, 'resize': 40, 'crop_scale': None}], batch_size=30, seed=0,
                        num_workers=1, shuffle=False)
    found = next(loader.epoch(0))['views'][0]
    assert (found[3].permute(1, 2, 0).numpy() == picture(3, 40, 48)[:, 4:44]).all()


def test_settings_that_are_no_json_are_refused_before_any_work(tmp_path):
    with pytest.raises(Fail, match='JSON'):
        write_beton(tmp_path / 'b', lambda i: pytest.fail('a sample was asked for'), 3, {'a': object()})


def test_odd_memory_layouts_are_stored_right(tmp_path):
    image = picture(3)
    write_beton(tmp_path / 'b', lambda i: (image[::2, ::-1], np.asfortranarray(image), 0, i, 0), 2, {})
    with open(tmp_path / 'b', 'rb') as file:
        meta = data.Reader(str(tmp_path / 'b')).metadata[1]
        for field, want in (('f0', image[::2, ::-1]), ('f1', image)):
            file.seek(meta[field]['data_ptr'])
            assert file.read(want.size) == want.tobytes()


def run(code, *args, **kwargs):
    """A Python process that runs `code`, with our modules and numpy imported and a sample to write."""
    head = f'import sys, time; sys.path.insert(0, {str(Path(data.__file__).parent)!r})\n' \
        'import numpy as np, augment, common, data\n' \
        'pixels = np.arange(6000, dtype=np.uint8).reshape(40, 50, 3)\n'
    return subprocess.Popen([sys.executable, '-c', head + inspect.cleandoc(code), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def test_a_killed_writer_leaves_no_beton_and_no_process(tmp_path):
    process = run('''
        def slow(i):
            if i == 70:
                print('under way', flush=True)
            time.sleep(0.01)
            return pixels, None, 0, i, -1
        data.write_beton(sys.argv[1], slow, 100_000, {})''', tmp_path / 'b.beton', start_new_session=True)
    assert process.stdout.readline() == 'under way\n'
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    with pytest.raises(ProcessLookupError):              # nobody of its process group is left
        time.sleep(0.2)
        os.killpg(process.pid, 0)
    assert not (tmp_path / 'b.beton').exists()
    with pytest.raises(Fail, match='half-written'):
        open_beton(tmp_path / 'b.beton')
    write_beton(tmp_path / 'b.beton', sample, 5, {})     # the same command again
    assert open_beton(tmp_path / 'b.beton')['samples'] == 5 and not list(tmp_path.glob('*.partial'))


def test_disk_full_is_one_error_and_leaves_nothing(tmp_path):
    process = run('''
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
        try:
            data.write_beton(sys.argv[1], lambda i: (pixels, None, 0, i, -1), 2000, {})
        except common.Fail as e:
            print(e)''', tmp_path / 'b.beton')
    out, err = process.communicate(timeout=600)
    assert out.count('\n') == 1 and 'cannot be written: File too large' in out and str(tmp_path) in out, out + err
    assert os.listdir(tmp_path) == []


def test_two_writers_of_one_file(tmp_path):
    def nested(i):
        with pytest.raises(Fail, match='another process'):
            write_beton(tmp_path / 'b', sample, 5, {})
        return sample(i)
    write_beton(tmp_path / 'b', nested, 3, {}, num_workers=1)
    assert open_beton(tmp_path / 'b')['samples'] == 3


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    """The work goes on; of two writers at once each has a file of its own, and the last one counts."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    write_beton(tmp_path / 'expected', sample, 5, {})
    monkeypatch.setattr(fcntl, 'flock', refuse)
    write_beton(tmp_path / 'b', sample, 5, {})
    assert (tmp_path / 'b').read_bytes() == (tmp_path / 'expected').read_bytes()
    assert capsys.readouterr().err == f'{tmp_path}: a file system without locks: a second process may write b too\n'

    def nested(i):
        with monkeypatch.context() as patch:
            patch.setattr(os, 'getpid', lambda: 1)
            write_beton(tmp_path / 'b', sample, 5, {}) if i == 3 else None
        return sample(i)
    write_beton(tmp_path / 'b', nested, 5, {}, num_workers=1)
    assert (tmp_path / 'b').read_bytes() == (tmp_path / 'expected').read_bytes()
    open_beton(tmp_path / 'b')
    assert not list(tmp_path.glob('*partial*'))


def test_an_unwritable_folder(tmp_path):
    with pytest.raises(Fail, match='cannot be written'):
        write_beton(tmp_path / 'missing' / 'b', sample, 5, {})


def test_stock_ffcv_reads_it(tmp_path):
    """In a process of its own: FFCV's loader makes numba's type of uint8 arrays read-only for the whole process, and
    kernels compiled before are not found again."""
    write_beton(tmp_path / 'b', lambda i: (picture(i), picture(i + 50), i % 3, 7 * i, 100), 10, {}, mode='raw')
    subprocess.run([sys.executable, '-c', STOCK_FFCV, tmp_path / 'b', Path(__file__).parent], check=True, timeout=600)


STOCK_FFCV = """
import sys
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.transforms import ToTensor
sys.path.insert(0, sys.argv[2])
from conftest import picture
pixels, number = (lambda: [SimpleRGBImageDecoder(), ToTensor()]), (lambda: [IntDecoder(), ToTensor()])
loader = Loader(sys.argv[1], batch_size=5, num_workers=1, order=OrderOption.SEQUENTIAL, pipelines={
    'image': pixels(), 'view': pixels(), 'label': number(), 'index': number(), 'noise_level': number()})
seen = 0
for images, views, label, index, noise_level in loader:
    for k in range(5):
        assert (images[k].numpy() == picture(seen)).all() and (views[k].numpy() == picture(seen + 50)).all()
        assert (int(label[k]), int(index[k]), int(noise_level[k])) == (seen % 3, 7 * seen, 100)
        seen += 1
assert seen == 10
"""


# ---------------------------------------------------------------------------------------------------------------------
# The loader

def test_a_batch_is_what_the_docstring_says(jpg):
    loader = PairLoader(jpg, [FULL, FULL, {**FULL, 'size': 16}], batch_size=7, seed=0, num_workers=2, drop_last=False)
    batches = list(loader.epoch(3))
    assert len(loader) == len(batches) == 9 and len(batches[-1]['index']) == 60 - 8 * 7
    seen = torch.cat([b['index'] for b in batches])
    assert sorted(seen.tolist()) == list(range(0, 600, 10)) and seen.tolist() != sorted(seen.tolist())
    for b in batches:
        for view, size in zip(b['views'], (32, 32, 16)):
            assert view.shape == (len(b['index']), 3, size, size) and view.dtype == torch.uint8
            assert view.is_contiguous(memory_format=torch.channels_last)
        assert b['label'].dtype == b['index'].dtype == b['noise_level'].dtype == torch.int64
        assert b['synthetic'].dtype == torch.int8
        assert (b['label'] == b['index'] // 10 % 3).all()
        assert (b['noise_level'] == torch.where(b['index'] // 10 % 5 == 4, -1, 100)).all()
        assert ((b['synthetic'] == -1) == (b['noise_level'] == -1)).all()


@pytest.mark.parametrize('mode', ['jpg', 'raw'])
def test_pixels_are_those_of_the_right_image(request, mode):
    views = [{'size': 36, 'crop_scale': [1, 1]}, {'size': 36}]
    loader = PairLoader(request.getfixturevalue(mode), views, swap='second', batch_size=60, seed=0, num_workers=2,
                        shuffle=False)
    batch = next(loader.epoch(0))
    for k, i in enumerate((batch['index'] // 10).tolist()):
        image, view, *_ = sample(i)
        want = image if view is None else view
        want = np.asarray(F.center_crop(F.resize(Image.fromarray(want), 36), 36)).astype(int)
        difference = abs(batch['views'][1][k].permute(1, 2, 0).numpy() - want)
        assert difference.max() == 0 if mode == 'raw' else difference.mean() < 12


def test_pixels_do_not_depend_on_threads_batches_or_processes(jpg):
    base = dict(seed=5, views=[FULL, FULL])
    one = epoch(PairLoader(jpg, batch_size=60, num_workers=1, **base), 2)
    assert len(one) == 60
    assert one == epoch(PairLoader(jpg, batch_size=6, num_workers=3, **base), 2)
    ranks = [PairLoader(jpg, batch_size=15, num_workers=2, rank=r, world=2, **base) for r in (0, 1)]
    halves = [epoch(r, 2) for r in ranks]
    assert len(halves[0]) == len(halves[1]) == 30 and halves[0] | halves[1] == one
    again = PairLoader(jpg, batch_size=6, num_workers=2, **base)
    other = epoch(again, 3), epoch(PairLoader(jpg, batch_size=60, num_workers=2, seed=6, views=base['views']), 2)
    for different in other:
        assert sum(different[i] == one[i] for i in one) <= 1
    assert epoch(again, 2) == one                        # and epochs in any order


def test_global_batches_are_the_same_for_any_world(jpg):
    def batches(world, start=0):
        loaders = [PairLoader(jpg, [FULL], batch_size=12 // world, seed=1, num_workers=1, rank=r, world=world)
                   for r in range(world)]
        return [sum((b['index'].tolist() for b in parts), [])
                    for parts in zip(*(one.epoch(4, start) for one in loaders))]
    assert batches(1) == batches(2) == batches(3) and len(batches(1)) == 5
    assert batches(2, start=3) == batches(1)[3:]
    assert batches(1, start=5) == []


def test_a_resumed_epoch_continues_exactly(jpg):
    loader = PairLoader(jpg, [FULL, FULL], batch_size=8, seed=1, num_workers=2)
    whole, rest = [flat(b) for b in loader.epoch(1)], [flat(b) for b in loader.epoch(1, start_batch=4)]
    assert rest == whole[4:] and len(rest) == 3


def test_the_last_batch_is_shared_out_evenly(jpg):
    common = dict(views=[FULL], batch_size=16, seed=1, num_workers=1, world=3, drop_last=False)
    loaders = [PairLoader(jpg, rank=r, **common) for r in range(3)]
    parts = [[b['index'].tolist() for b in one.epoch(0)] for one in loaders]
    assert [len(p) for p in parts] == [2, 2, 2] and [len(p[1]) for p in parts] == [4, 4, 4]
    assert sorted(i for p in parts for b in p for i in b) == list(range(0, 600, 10))


def test_indices_choose_samples(jpg):
    loader = PairLoader(jpg, [FULL], batch_size=2, seed=1, num_workers=1, indices=[3, 9, 4, 20])
    assert sorted(epoch(loader, 0)) == [30, 40, 90, 200]
    in_order = PairLoader(jpg, [FULL], batch_size=2, seed=1, num_workers=1, indices=[3, 9, 4, 20], shuffle=False)
    assert list(epoch(in_order, 0)) == [30, 90, 40, 200]


def test_alpha_and_swap(raw):
    def synthetic(epochs=20, **kw):
        loader = PairLoader(raw, [{'size': 8}, {'size': 8}, {'size': 8}], batch_size=60, seed=0, num_workers=2, **kw)
        batches = [b for e in range(epochs) for b in loader.epoch(e)]
        have = torch.cat([b['noise_level'] for b in batches]) >= 0
        found = torch.cat([b['synthetic'] for b in batches])
        assert (found[~have] == -1).all() and have.sum() == 48 * epochs
        return found[have]
    assert (synthetic(alpha=0) == -1).all()
    assert (synthetic(swap='first') == 0).all() and (synthetic(swap='second') == 1).all()
    both = synthetic()                                   # 960 draws: four standard deviations are 0.065
    assert set(both.tolist()) == {0, 1} and abs((both == 0).float().mean() - 0.5) < 0.065
    some = synthetic(alpha=0.3)
    assert abs((some >= 0).float().mean() - 0.3) < 0.06 and {-1, 0, 1} == set(some.tolist())
    assert len({tuple(x.tolist()) for x in both.view(20, 48)}) == 20     # anew every epoch


@pytest.mark.parametrize('swap', ['random', 'first', 'second'])
def test_the_synthetic_view_is_where_the_batch_says_and_small_crops_take_turns(tmp_path, swap):
    write_beton(tmp_path / 'b', lambda i: (np.full((9, 9, 3), 10, np.uint8), None if i % 8 == 3 else
                np.full((9, 9, 3), 200, np.uint8), 0, i, -1 if i % 8 == 3 else 0), 64, {})
    views = [{'size': 8, 'crop_scale': [0.5, 1]}] * 2 + [{'size': 3, 'crop_scale': [0.1, 0.5]}] * 6
    batch = next(PairLoader(tmp_path / 'b', views, alpha=0.7, swap=swap, batch_size=64, seed=0, num_workers=2).epoch(0))
    assert [v.shape[-1] for v in batch['views']] == [8] * 2 + [3] * 6
    assert set(batch['synthetic'].tolist()) == {'random': {-1, 0, 1}, 'first': {-1, 0}, 'second': {-1, 1}}[swap]
    for v, view in enumerate(batch['views']):            # 2, 4, 6 come from the image of view 0, the others of view 1
        want = torch.where(batch['synthetic'] == v % 2, 200, 10)[:, None, None, None]
        assert (view == want).all()


def test_a_synthetic_image_has_a_recipe_of_its_own(tmp_path):
    """All else is drawn as without: its views are those of a loader with that recipe, the others as they were."""
    instead, sample = {'blur_prob': 0.0, 'gray_prob': 1.0}, lambda i: (
        picture(i), picture(100 + i) if i % 4 else None, 0, i, 0 if i % 4 else -1)
    write_beton(tmp_path / 'b', sample, 40, {}, mode='raw')

    def batch(recipe, **changes):
        views = [{**recipe, 'solarize_prob': 0.0}, recipe, {**recipe, 'size': 12}, {**recipe, 'size': 12}]
        return next(PairLoader(tmp_path / 'b', views, batch_size=40, seed=0, num_workers=2, alpha=0.8,
                               **changes).epoch(0))
    own, plain, there = batch(FULL, generated=instead), batch(FULL), batch({**FULL, **instead})
    assert set(own['synthetic'].tolist()) == {-1, 0, 1}
    for v in range(4):
        made = (own['synthetic'] == v % 2)[:, None, None, None]
        assert torch.equal(own['views'][v], torch.where(made, there['views'][v], plain['views'][v]))
        assert (own['views'][v] != plain['views'][v]).flatten(1).any(1)[own['synthetic'] == v % 2].any()
    assert all(map(torch.equal, batch(FULL, generated={})['views'], plain['views']))
    with pytest.raises(Fail, match=r"views\[0\]: unknown key 'blur'"):
        batch(FULL, generated={'blur': 0})


def several(i, k=3):
    """A grey 20 and views of 100, 101, ...: which one is shown can be read from the pixels."""
    flat_ = lambda value: np.full((9, 8, 3), value, np.uint8)
    return flat_(20), None if i % 5 == 4 else [flat_(100 + v) for v in range(k)], 0, i, -1 if i % 5 == 4 else 200


def shown(loader, *epochs):
    """{(epoch, index): value of the second view}"""
    return {(e, i): value for e in epochs for batch in loader.epoch(e)
            for i, value in zip(batch['index'].tolist(), batch['views'][1][:, 0, 0, 0].tolist())}


def test_one_of_several_views_is_drawn_per_epoch(tmp_path):
    sidecar = write_beton(tmp_path / 'b', several, 200, {}, views=3)
    assert sidecar['fields'] == [*data.FIELDS, 'view_2', 'view_3'] and open_beton(tmp_path / 'b') == sidecar
    base = dict(views=[{'size': 4}] * 2, swap='second', num_workers=1)
    found = shown(PairLoader(tmp_path / 'b', batch_size=50, seed=1, **base), *range(10))
    assert {value for (_, i), value in found.items() if i % 5 == 4} == {20}
    drawn = np.array([[found[e, i] - 100 for i in range(200) if i % 5 < 4] for e in range(10)])
    counts = np.bincount(drawn.ravel(), minlength=3)     # of 1600; four standard deviations are 75
    assert len(counts) == 3 and np.abs(counts - 1600 / 3).max() < 75
    assert 0.2 < (drawn[1:] == drawn[:-1]).mean() < 0.47  # anew every epoch: a third stays
    again = [PairLoader(tmp_path / 'b', batch_size=10, seed=1, rank=r, world=2, **base | {'num_workers': 2})
             for r in (0, 1)]
    assert shown(again[0], 3, 7) | shown(again[1], 3, 7) == {k: v for k, v in found.items() if k[0] in (3, 7)}
    other = shown(PairLoader(tmp_path / 'b', batch_size=50, seed=2, **base), 0)
    assert other.keys() < found.keys() and other != {k: found[k] for k in other}


def test_betons_of_one_and_of_several_views_are_one_set(tmp_path):
    write_beton(tmp_path / 'a', lambda i: several(i, 2), 20, {}, views=2)
    write_beton(tmp_path / 'b', lambda i: (*several(i)[:1], np.full((3, 3, 3), 50, np.uint8), 0, i + 100, 0), 20, {})
    loader = PairLoader([tmp_path / 'a', tmp_path / 'b'], [{'size': 4}] * 2, swap='second', batch_size=40, seed=0,
                        num_workers=1)
    found = shown(loader, *range(6))
    assert {v for (_, i), v in found.items() if i >= 100} == {50}
    assert {v for (_, i), v in found.items() if i < 100} == {20, 100, 101}
    with pytest.raises(Fail, match='sample 0: 2 views where 3 are expected'):
        write_beton(tmp_path / 'c', lambda i: several(i, 2), 20, {}, views=3)


def test_a_beton_of_one_view_keeps_its_bytes(tmp_path):
    """Betons written before there could be several views stay readable: the format is the same, byte for byte."""
    pixels = lambda i, n: (np.arange(n * (n + 1) * 3) * 7 + i).astype(np.uint8).reshape(n, n + 1, 3)
    for name, wrap in (('a', lambda view: view), ('b', lambda view: view if view is None else [view])):
        write_beton(tmp_path / name, lambda i: (
            pixels(i, 9), wrap(None if i % 3 == 1 else pixels(i + 40, 5)), i % 2, 3 * i,
            -1 if i % 3 == 1 else 100 * (i % 5)), 7, {}, mode='raw')
        assert sha256((tmp_path / name).read_bytes()).hexdigest() == \
            '7b37b6d226f7fa830cc79c4b6f9c03f447e5cc8a90238c56c6c97aea170c557d'


def test_every_small_crop_is_another_one(raw):
    crop = {'size': 8, 'crop_scale': [0.05, 0.14]}
    batch = next(PairLoader(raw, [FULL, FULL] + [crop] * 6, alpha=0, batch_size=60, seed=0, num_workers=2).epoch(0))
    same = [(a[k] == b[k]).all().item() for i, a in enumerate(batch['views'][2:]) for b in batch['views'][2:2 + i]
            for k in range(60)]
    assert len(same) == 15 * 60 and not any(same)


# ---------------------------------------------------------------------------------------------------------------------
# Several betons as one training set

@pytest.fixture(scope='module')
def extra(tmp_path_factory):
    """10 further JPEG samples whose `index` collides with that of `raw`; larger, every second one without a view."""
    path = tmp_path_factory.mktemp('extra') / 'extra.beton'
    write_beton(path, lambda i: (picture(500 + i, 60, 50), None if i % 2 else picture(600 + i, 33, 70), 100 + i, 10 * i,
                                 -1 if i % 2 else 300), 10, {}, mode='jpg', quality=95)
    return path


def by_label(loader, *args):
    """The views as bytes per (index, from the extra beton); for batches of one sample."""
    return {(int(i), int(label) >= 100): pixels for batch in loader.epoch(*args)
            for i, label, pixels in zip(batch['index'], batch['label'], flat(batch).values())}


def test_several_betons_are_one_set(raw, extra):
    base = dict(views=[FULL, FULL, {**FULL, 'size': 16}], seed=5, num_workers=2, drop_last=False)
    both, first = (PairLoader(p, batch_size=1, **base) for p in ([str(raw), extra], raw))
    sides = open_beton(raw), open_beton(extra)
    assert {k: both.sidecar[k] for k in ('samples', 'with_view', 'max_resolution')} == \
        {'samples': 70, 'with_view': 48 + 5, 'max_resolution': 70}
    assert both.sidecar['bytes'] == sides[0]['bytes'] + sides[1]['bytes']
    assert both.sidecar['crc32'] == sides[0]['crc32'] + sides[1]['crc32']
    assert PairLoader([extra, raw], batch_size=1, **base).sidecar['crc32'] != both.sidecar['crc32']
    got, alone = by_label(both, 2), by_label(first, 2)
    assert len(both) == len(got) == 70 and len(alone) == 60
    assert {k: v for k, v in got.items() if not k[1]} == alone               # the first beton as it is alone
    ranks = [by_label(PairLoader([raw, extra], batch_size=1, rank=r, world=2, **base), 2) for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 35 and ranks[0] | ranks[1] == got
    order = [(int(b['index']), int(b['label'])) for b in both.epoch(2)]
    assert order != sorted(order, key=lambda x: x[1] >= 100)                 # shuffled across the betons
    one = PairLoader([raw], batch_size=1, **base)                            # a list of one is that one
    assert one.sidecar == first.sidecar
    assert all(flat(a) == flat(b) for a, b in zip(one.epoch(2), first.epoch(2)))


def test_positions_run_over_all_betons_and_find_the_right_images(raw, extra):
    loader = PairLoader([raw, extra], [{'size': 32}] * 2, swap='second', batch_size=4, seed=0, num_workers=1,
                        shuffle=False, indices=[0, 59, 60, 69])
    batch = next(loader.epoch(0))
    assert batch['index'].tolist() == [0, 590, 0, 90] and batch['label'].tolist() == [0, 2, 100, 109]
    assert batch['noise_level'].tolist() == [100, -1, 300, -1] and batch['synthetic'].tolist() == [1, -1, 1, -1]
    pictures = [(sample(0)[0], sample(0)[1]), (sample(59)[0],) * 2, (picture(500, 60, 50), picture(600, 33, 70)),
                (picture(509, 60, 50),) * 2]
    for k, pair in enumerate(pictures):
        for view, image in zip(batch['views'], pair):
            want = np.asarray(F.center_crop(F.resize(Image.fromarray(image), 32), 32)).astype(int)
            difference = abs(view[k].permute(1, 2, 0).numpy() - want)
            assert difference.max() == 0 if k < 2 else difference.mean() < 12
    with pytest.raises(Fail, match='positions from 0 to 69'):
        PairLoader([raw, extra], [FULL], batch_size=1, seed=0, num_workers=1, indices=[70])


def test_equal_indices_of_two_betons_draw_other_numbers(raw):
    loader = PairLoader([raw, raw], [FULL, FULL], batch_size=120, seed=0, num_workers=2, shuffle=False)
    batch = next(loader.epoch(0))
    assert batch['index'][:60].tolist() == batch['index'][60:].tolist()
    assert sum((view[:60] == view[60:]).flatten(1).all(1).sum() for view in batch['views']) <= 1
    assert (batch['synthetic'][:60] != batch['synthetic'][60:]).sum() > 10


def test_what_is_wrong_with_one_of_several_betons_names_it(raw, copy):
    def load():
        return PairLoader([raw, copy], [FULL, FULL], batch_size=4, seed=0, num_workers=1)
    assert load().sidecar['samples'] == 120
    regions = data.Reader(str(copy)).alloc_table.reshape(60, 2)
    with open(copy, 'r+b') as file:
        file.seek(int(regions['ptr'][23, 0]) + 2)
        file.write(bytes(40))
    with pytest.raises(Fail, match='damaged') as damaged:
        load()
    reseal(copy)
    with pytest.raises(Fail, match='`image` of the sample with index 230 is a JPEG that does not decode') as jpeg:
        for _ in load().epoch(0):
            pass
    loader = load()
    os.truncate(copy, 99_999)
    with pytest.raises(Fail, match='when it was opened') as shorter:
        loader.epoch(1)
    copy.unlink()
    with pytest.raises(Fail, match='does not exist') as missing:
        load()
    for e in (damaged, jpeg, shorter, missing):
        assert str(copy) in str(e.value) and str(raw) not in str(e.value) and '\n' not in str(e.value)
    for path in ([], [raw, None], None, [[raw]]):
        with pytest.raises(Fail, match='path: .* is neither the name of a beton nor a list'):
            PairLoader(path, [FULL], batch_size=4, seed=0, num_workers=1)


def test_batches_are_never_overwritten(jpg):
    loader = PairLoader(jpg, [FULL, FULL], batch_size=4, seed=0, num_workers=2)
    kept, copies = [], []
    for batch in (b for e in range(3) for b in loader.epoch(e)):
        kept.append(batch)
        copies.append({k: [x.clone() for x in v] if k == 'views' else v.clone() for k, v in batch.items()})
        time.sleep(0.002)
    assert len(kept) == 45
    for batch, copied in zip(kept, copies):
        assert all(torch.equal(a, b) for a, b in zip(batch['views'], copied['views']))
        assert all(torch.equal(batch[k], copied[k]) for k in ('label', 'index', 'noise_level', 'synthetic'))


def test_an_early_break_leaks_nothing(jpg):
    def count():                                         # threads of loaders, and what holds this beton open
        files = [os.path.realpath(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')]
        return sum(t.name.startswith('PairLoader') for t in threading.enumerate()), files.count(os.path.realpath(jpg))
    gc.collect()                                         # loaders of earlier tests
    for _ in range(100):
        if count() == (0, 0):
            break
        time.sleep(0.05)
    before = count()
    loader = PairLoader(jpg, [FULL, FULL], batch_size=4, seed=0, num_workers=2)
    for batch in loader.epoch(0):
        break
    one = count()
    assert one[0] <= before[0] + 2 and one[1] == before[1] + 1
    for e in range(20):
        for batch in loader.epoch(e):
            break
    assert count() == one
    assert len(epoch(loader, 0)) == 60                   # and it still works
    del loader, batch
    for _ in range(100):                                 # its threads end soon after the loader
        if count() == before:
            break
        time.sleep(0.05)
    assert count() == before


def test_two_epochs_at_once(jpg):
    loader = PairLoader(jpg, [FULL], batch_size=10, seed=0, num_workers=2)
    want = [flat(b) for e in (0, 1) for b in loader.epoch(e)]
    pairs = [(flat(a), flat(b)) for a, b in zip(loader.epoch(0), loader.epoch(1))]
    assert [a for a, _ in pairs] + [b for _, b in pairs] == want


def test_an_exception_in_a_worker_reaches_the_consumer(jpg, monkeypatch):
    loader = PairLoader(jpg, [FULL], batch_size=10, seed=0, num_workers=2)
    monkeypatch.setattr(data, 'render', lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loader.epoch(0))
    monkeypatch.undo()
    assert len(epoch(loader, 0)) == 60


@pytest.mark.parametrize('field', ['image', 'view'])
def test_a_jpeg_that_does_not_decode_is_named(copy, field):
    regions = data.Reader(str(copy)).alloc_table.reshape(60, 2)
    with open(copy, 'r+b') as file:
        file.seek(int(regions['ptr'][23, int(field == 'view')]) + 2)
        file.write(bytes(40))                            # overwrites the JPEG's tables
    reseal(copy)
    loader = PairLoader(copy, [FULL, FULL], batch_size=4, seed=0, num_workers=2)
    with pytest.raises(Fail, match=f'`{field}` of the sample with index 230 is a JPEG that does not decode') as e:
        epoch(loader, 0)
    assert str(copy) in str(e.value)
    if field == 'view':                                  # alpha = 0 reads no views
        assert len(epoch(PairLoader(copy, [FULL], alpha=0, batch_size=4, seed=0, num_workers=2), 0)) == 60


def test_where_something_is_measured_jpegs_are_decoded_as_pil_does(tmp_path):
    pixels = F.resize(Image.fromarray(picture(3, 24, 30)), [96, 120])
    for quality, lossless in ((90, 8), (100, 2)):
        write_beton(tmp_path / 'a.beton', lambda i: (np.asarray(pixels), None, 0, i, -1), 2, {}, mode='jpg',
                    quality=quality, num_workers=1)
        reader = data.Reader(str(tmp_path / 'a.beton'))
        at, size = (int(reader.alloc_table[key][0]) for key in ('ptr', 'size'))
        content = io.BytesIO((tmp_path / 'a.beton').read_bytes()[at:at + size])
        theirs, recipe = np.asarray(Image.open(content)).astype(int), {'size': 96, 'resize': 96, 'crop_scale': None}
        off = {}
        for exact in (True, False):
            loader = PairLoader(tmp_path / 'a.beton', [recipe], batch_size=2, seed=0, num_workers=1, exact=exact)
            found = next(loader.epoch(0))['views'][0][0].permute(1, 2, 0).numpy().astype(int)
            off[exact] = abs(found - theirs[:, 12:108]).mean()
        assert off[True] == 0 < off[False] < 3 and abs(theirs - np.asarray(pixels)).mean() < lossless


def test_a_file_truncated_while_it_is_read(copy):
    loader = PairLoader(copy, [FULL], batch_size=4, seed=0, num_workers=1)
    batches = loader.epoch(0)
    next(batches)
    os.truncate(copy, 24 + 5 * 1041)
    with pytest.raises(Fail, match='ends early: the file has been truncated'):
        list(batches)
    with pytest.raises(Fail, match='when it was opened'):
        loader.epoch(1)


def test_a_read_that_a_signal_or_the_network_cut_short_is_tried_again(copy, monkeypatch):
    loader = lambda: PairLoader(copy, [FULL, FULL], batch_size=20, seed=0, num_workers=1)
    expected, render, calls = epoch(loader(), 0), data.render, []

    def cut(io, table, first, last, *rest):
        calls.append(first)
        if len(calls) in (2, 5):                         # in the middle of a part, which goes on from there
            assert render(io, table, first, last - 1, *rest) == -1
            return 4 * (last - 1) + 2 * data.VIEW
        return render(io, table, first, last, *rest)
    monkeypatch.setattr(data, 'render', cut)
    found = epoch(loader(), 0)
    assert found.keys() == expected.keys() and all(found[k] == expected[k] for k in found)
    assert len(calls) > 5 and calls[2] > calls[1]

    def lost(file, size, at):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    third = loader()
    calls.clear()
    monkeypatch.setattr(data.os, 'pread', lost)
    with pytest.raises(Fail, match='`view` of the sample with index [0-9]+ cannot be read: Stale file handle'):
        epoch(third, 0)


@pytest.mark.parametrize('change, words', [
    (dict(batch_size=61), 'batch of 61'),
    (dict(batch_size=31, world=2), 'batch of 31 on each of 2'),
    (dict(batch_size=0), 'batch_size'),
    (dict(batch_size=2.0), 'batch_size'),
    (dict(indices=[]), 'indices'),
    (dict(indices=[0, 60]), 'positions from 0 to 59'),
    (dict(indices=[-1, 5]), 'positions'),
    (dict(indices=[0.5]), 'positions'),
    (dict(rank=2, world=2), 'rank 2 does not fit'),
    (dict(num_workers=0), 'num_workers'),
    (dict(seed=-1), 'seed'),
    (dict(alpha=1.5), 'alpha'),
    (dict(alpha='1'), 'alpha'),
    (dict(swap='third'), 'swap'),
    (dict(views=[]), 'views'),
    (dict(views=[FULL], swap='second'), 'swap'),
    (dict(views=[3]), r'views\[0\]'),
    (dict(views=[FULL, {**FULL, 'jiter': 1}]), r"views\[1\]: unknown key 'jiter'; did you mean 'jitter'"),
    (dict(views=[FULL, {'flip': 0.5}]), r'views\[1\]: size is None')])
def test_impossible_settings_are_refused_up_front(jpg, change, words):
    with pytest.raises(Fail, match=words):
        PairLoader(jpg, **{**dict(views=[FULL, FULL], batch_size=4, seed=0, num_workers=1), **change})


def test_impossible_epochs(jpg):
    loader = PairLoader(jpg, [FULL], batch_size=4, seed=0, num_workers=1)
    for bad in ((-1,), (0, 16), (0, -1)):
        with pytest.raises(Fail, match='out of range'):
            loader.epoch(*bad)


def test_a_second_process_and_a_new_recipe_compile_nothing(jpg):
    epoch(PairLoader(jpg, [FULL], batch_size=60, seed=0, num_workers=1), 0)      # compiled at the latest here
    process = run('''
        views = [dict(size=24, crop_scale=[0.3, 0.9], blur_prob=1), dict(size=16, jitter=[1, 1, 1, .5]), dict(size=8)]
        loader = data.PairLoader(sys.argv[1], views, swap='first', batch_size=5, seed=9, num_workers=3)
        print(len(list(loader.epoch(7))), len(augment.render.stats.cache_hits), len(augment.render.stats.cache_misses),
              len(augment.permutation_keys.stats.cache_misses))''', jpg)
    out, err = process.communicate(timeout=600)
    assert out.split() == ['12', '1', '0', '0'], out + err


def test_a_process_with_one_core_that_has_forked_ends():
    code = 'import os, data\nif not os.fork():\n    os._exit(0)\nos.wait()'
    one_core = dict(preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}))
    done = subprocess.run([sys.executable, '-c', code], cwd=Path(data.__file__).parent, timeout=300, **one_core)
    assert done.returncode == 0
