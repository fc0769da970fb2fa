"""Latents, moves, walkers; pairs without images from gen_views.py. With a small BigGAN of random weights."""
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import gen_views  # noqa: E402
import latents  # noqa: E402
from chunks import read_chunk  # noqa: E402
from config import Fail, default_config  # noqa: E402
from conftest import small_gan  # noqa: E402
from data import PairLoader, open_beton  # noqa: E402
from latents import (LatentGenerator, LatentPairs, Moves, Steering, Walker, load_walker, normal, save_walker,  # noqa: E402
                     uniform)

WIDTH, CHUNKS = 8, 6                                     # of small_gan


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return small_gan(tmp_path_factory.mktemp('gan'))


@pytest.fixture(scope='module')
def generator(folder):
    return LatentGenerator(spec(folder), torch.device('cpu'))


def spec(folder, **changes):
    return {'kind': 'biggan', 'model': str(folder), 'truncation': 2.0, 'psi': 1.0, 'crop': None, 'discriminator': '',
            **changes}


def move(**changes):
    return {'std': 0.0, 'truncation': 2.0, 'walker': '', **changes}


def test_numbers_depend_on_seed_and_index_alone():
    found = uniform(3, range(100), 0, 50)
    assert found.shape == (100, 50) and 0 < found.min() < 0.01 and 0.99 < found.max() < 1
    assert torch.equal(uniform(3, [70, 2], 0, 50), found[[70, 2]])
    assert torch.equal(uniform(3, [2], 0, 20), found[2:3, :20])
    others = [uniform(4, range(100), 0, 50), uniform(3, range(100), 1, 50), uniform(3, range(100, 200), 0, 50)]
    assert not any((other == found).any() for other in others)
    assert abs(found.mean() - 0.5) < 0.02 and abs(found.var() - 1 / 12) < 0.003


@pytest.mark.parametrize('std, truncation, published', [
    (1, 2, .880), (1, .9, .492), (.05, 2, .044), (.15, .9, .074), (.3, 1, .162), (.8, 1, .432)])
def test_truncated_normal_is_scipys(std, truncation, published):
    """The real standard deviations of the papers' N^t(0, s, t): the bound counts in units of s."""
    numbers = uniform(0, range(400), 0, 100)
    found = std * normal(numbers, truncation)
    assert np.allclose(found, std * truncnorm.ppf(numbers, -truncation, truncation), atol=1e-5)
    assert found.abs().max() <= std * truncation and abs(found.std() - published) < 0.004
    assert np.allclose(normal(numbers, 0.0), truncnorm.ppf(numbers, -np.inf, np.inf), atol=1e-5)


def test_only_named_chunks_move(generator):
    z = generator.anchors(0, range(4))
    moves = Moves({'1-2': move(std=1.0), '4': move(std=0.5, truncation=0.1)}, generator)
    moved = generator.moved(z, moves(z, 0, range(4), 1))
    parts = (moved - z).view(4, CHUNKS, WIDTH)
    assert (parts[:, [0, 3, 5]] == 0).all() and (parts[:, [1, 2, 4]] != 0).all()
    assert 0.5 < parts[:, 1:3].std() and 0.02 < parts[:, 4].abs().max() <= 0.05 + 1e-6
    assert torch.equal(generator.moved(z[2:], moves(z[2:], 0, [2, 3], 1)), moved[2:])    # whatever the batch
    assert not torch.equal(generator.moved(z, moves(z, 0, range(4), 2)), moved)          # another positive
    found = generator.hierarchy.distances(z, moved)
    assert torch.allclose(found, parts.norm(dim=2)) and found.shape == (4, CHUNKS)
    images = generator.images(moved)
    assert images.shape == (4, 3, 32, 32) and 0 <= images.min() < images.max() <= 1


def test_crop_and_size(folder, generator):
    z = generator.anchors(0, range(2))
    whole = generator.images(z)
    cut = LatentGenerator(spec(folder, crop=16), torch.device('cpu'))
    assert torch.equal(cut.images(z), whole[:, :, 8:24, 8:24])
    half = LatentGenerator(spec(folder), torch.device('cpu'), size=16).images(z)
    assert half.shape[2:] == (16, 16) and (half - nn.functional.avg_pool2d(whole, 2)).abs().mean() < 0.01
    with pytest.raises(Fail, match='latent.crop: 64 is more than the 32 pixels'):
        LatentGenerator(spec(folder, crop=64), torch.device('cpu'))
    with pytest.raises(Fail, match='latent.psi'):
        LatentGenerator(spec(folder, psi=0.7), torch.device('cpu'))


def test_uint8_is_floor_of_256_times(folder):
    """COP-Gen's and GenRep's rounding; anchors and positives whatever is asked for together."""
    pairs = LatentPairs({**spec(folder), 'chunks': {'1-5': move(std=1.0)}}, 5, 32, torch.device('cpu'))
    found = pairs.views(None, None, [(3, 0), (3, 1), (9, 0), (3, 2)])
    generator = pairs.generator
    z = generator.anchors(5, [3])
    expected = [generator.images(z), *(generator.images(generator.moved(z, pairs.moves(z, 5, [3], n))) for n in (1, 2))]
    for at, image in zip((0, 1, 3), expected):
        scaled = 256 * image[0].permute(1, 2, 0).numpy()
        level = found[at].astype(np.float32)             # one apart only where rounding of the batch decides
        assert ((level == np.floor(scaled)) | (np.abs(scaled - np.round(scaled)) < 1e-3)).all()
    assert len({image.tobytes() for image in found}) == 4


@pytest.fixture(scope='module')
def cars(tmp_path_factory):
    """A StyleGAN2 file: 16 px, 6 rows of W in groups of 2, 1, 1, 2, random weights."""
    from safetensors.torch import save_file
    from gan import StyleGAN2
    torch.manual_seed(3)
    path, network = tmp_path_factory.mktemp('cars') / 'cars.safetensors', StyleGAN2([16] * 3, [8] * 3)
    network.mapping.w_avg.normal_()
    for name, value in network.named_parameters():
        if name.endswith('noise_strength'):
            value.data.fill_(0.1)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return path


def test_groups_of_stylegan2(cars):
    """Hierarchical-latent's code: the displaced z is mapped anew and gives the rows of its groups, all by one noise."""
    generator = LatentGenerator(spec(cars, kind='stylegan2', truncation=0.9), torch.device('cpu'))
    assert (generator.dim, generator.chunks, generator.size) == (16, 4, 16)
    z = generator.anchors(0, range(5))
    assert z.abs().max() <= 0.9
    rows, edges = generator.code(z), [0, 2, 3, 4, 6]
    assert rows.shape == (5, 6, 16) and torch.equal(rows[:, 0], generator.hierarchy.network.mapping(z))
    moves = Moves({'0': move(std=0.3, truncation=1.0), '2-3': move(std=0.8, truncation=1.0)}, generator)
    shifts = moves(z, 0, range(5), 1)
    assert torch.allclose(shifts[0, 0] / 0.3, shifts[2, 3] / 0.8, atol=1e-6) and shifts[2, 3].abs().max() <= 0.8
    moved = generator.moved(z, shifts)
    for k, group in enumerate((shifts[0, 0], None, shifts[2, 3], shifts[2, 3])):
        expected = rows[:, 0] if group is None else generator.hierarchy.network.mapping(z + group)
        assert all(torch.equal(moved[:, row], expected) for row in range(edges[k], edges[k + 1]))
    distances = generator.hierarchy.distances(rows, moved)
    assert (distances[:, 1] == 0).all()
    assert torch.allclose(distances[:, 3], (moved - rows)[:, 4:].flatten(1).norm(dim=1))
    image = generator.hierarchy.network.synthesis(moved)
    assert torch.allclose(generator.images(moved), ((image * 127.5 + 128) / 255).clamp(0, 1))
    half = LatentGenerator(spec(cars, kind='stylegan2', psi=0.5), torch.device('cpu'))
    average = half.hierarchy.network.mapping.w_avg
    assert torch.allclose(half.code(z), average + 0.5 * (rows - average), atol=1e-6)


def test_pairs_of_stylegan2(cars, tmp_path):
    settings = config(cars, tmp_path)
    settings['latent'].update(kind='stylegan2', crop=12, chunks={'0': move(std=0.3), '3': move(std=0.8)})
    gen_views.main({**settings, 'view_size': 16})
    assert open_beton(tmp_path / 'run/pairs.beton')['with_view'] == 23
    with pytest.raises(Fail, match="'3-4' is no chunk or range of chunks from 0 to 3"):
        gen_views.main({**settings, 'output': str(tmp_path / 'b'), 'latent': {**settings['latent'],
                                                                             'chunks': {'3-4': move(std=1.0)}}})


@pytest.mark.parametrize('chunks, message', [
    ({'1-6': move()}, "'1-6' is no chunk or range of chunks from 0 to 5"),
    ({'3-1': move()}, "'3-1' is no chunk"), ({'all': move()}, "'all' is no chunk"),
    ({'0-2': move(std=1.0), '2': move(std=1.0)}, "'2' and another range share chunks"),
    ({'1': move()}, 'chunks.1: nothing moves it'),
    ({'1': move(std=1.0, walker='w.pt')}, 'chunks.1: std is of noise, walker moves by itself'),
    ({'1': move(walker='none.pt')}, 'none.pt: no such checkpoint')])
def test_wrong_moves_are_one_line(generator, chunks, message):
    with pytest.raises(Fail, match=message):
        Moves(chunks, generator)


def test_walkers_as_published_start_as_published():
    """FACTS of COP-Gen's code: an untrained walker moves a latent already."""
    torch.manual_seed(0)
    z = normal(uniform(0, range(5000), 0, 120), 2.0)
    shift = Walker(120)(z)
    assert 0.205 < shift.std() < 0.216 and 2.1 < shift.norm(dim=1).mean() < 2.4 and 0.16 < shift.std(0).mean() < 0.18
    small = Walker(100, start='small')(z[:, :100]).norm(dim=1).mean()
    assert 0.05 < small < 0.07                           # hierarchical-latent's, 0.060
    walker = Walker(120, relu=False)
    line = walker(z[:1] * torch.arange(4)[:, None])
    assert torch.allclose(line[1:] - line[:-1], (line[1] - line[0]).expand(3, -1), atol=1e-5)


def test_walker_moves_the_chunks_it_was_made_for(generator, tmp_path):
    torch.manual_seed(0)
    walker = Walker(2 * WIDTH)
    save_walker(tmp_path / 'w.pt', walker, chunks=[2, 3])
    z = generator.anchors(0, range(3))
    moves = Moves({'2-3': move(walker=str(tmp_path / 'w.pt'))}, generator)
    shift = (generator.moved(z, moves(z, 0, range(3), 1)) - z).view(3, CHUNKS, WIDTH)
    assert torch.allclose(shift[:, 2:4].flatten(1), walker(z[:, 2 * WIDTH:4 * WIDTH]), atol=1e-6)
    assert (shift[:, [0, 1, 4, 5]] == 0).all()
    with pytest.raises(Fail, match='w.pt is a walker of width 16, these chunks of .* have 24'):
        Moves({'1-3': move(walker=str(tmp_path / 'w.pt'))}, generator)
    with pytest.raises(Fail, match='chunks.3-4: .*w.pt was trained on the chunks 2-3'):
        Moves({'3-4': move(walker=str(tmp_path / 'w.pt'))}, generator)


class NonlinearWalk(nn.Module):                          # what COP-Gen pickled
    def __init__(self, width):
        super().__init__()
        self.walker = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, z):
        return self.walker(z)


@pytest.mark.parametrize('module, name, parallel', [
    ('__main__', 'NonlinearWalk', True), ('src.noise_maker.walkers', 'NonlinearWalker', False)])
def test_published_walkers_load_without_their_code(tmp_path, monkeypatch, module, name, parallel):
    torch.manual_seed(0)
    kind = type(name, (NonlinearWalk,), {'__module__': module})
    for part in ('src', 'src.noise_maker'):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    home = sys.modules['__main__'] if module == '__main__' else types.ModuleType(module)
    monkeypatch.setitem(sys.modules, module, home)
    monkeypatch.setattr(home, name, kind, raising=False)
    walker, z = kind(12), torch.randn(5, 12)
    torch.save({'nn_walker': nn.DataParallel(walker) if parallel else walker}, tmp_path / 'navigator.pth')
    monkeypatch.delattr(home, name)
    found = load_walker(tmp_path / 'navigator.pth')
    assert found.relu and found.width == 12 and torch.equal(found(z), walker(z))
    assert not any(p.requires_grad for p in found.parameters())


class Harm:
    def __reduce__(self):
        return exec, ('raise SystemExit("code of the file was run")',)


def test_files_that_are_no_walkers(tmp_path):
    path = tmp_path / 'w.pt'
    torch.save({'nn_walker': Harm()}, path)
    with pytest.raises(Fail, match='w.pt: holds objects of builtins.exec, whose code would have to run'):
        load_walker(path)
    for content in ({'walker': {}, 'width': 4, 'relu': True}, {'model': 1}, [1], {'nn_walker': torch.zeros(3)},
                    {'walker': {k: v * torch.nan for k, v in Walker(4).state_dict().items()}, 'width': 4,
                     'relu': True}):
        torch.save(content, path)
        with pytest.raises(Fail, match='w.pt: cannot be read as a walker'):
            load_walker(path)


def test_sliders_of_steering():
    """GenRep's: whole steps of 10 degrees of 60, 5 of 30 and a tenth of the shift; zoom a quarter to four, by coin."""
    sliders = Steering.sliders(uniform(0, range(20000), 1, Steering.NUMBERS))
    for column, steps in ((0, 6), (1, 6), (3, 10), (4, 10)):
        values, counts = np.unique(np.round(sliders[:, column] * steps, 3), return_counts=True)
        assert values.tolist() == list(range(-steps, steps + 1)) and counts.min() > 0.8 * 20000 / len(values)
    zoom = sliders[:, 2].exp()
    assert 0.25 <= zoom.min() < 0.27 and 3.9 < zoom.max() <= 4 and abs((zoom < 1).float().mean() - 0.5) < 0.02
    assert abs(zoom[zoom < 1].mean() - 0.625) < 0.01 and abs(zoom[zoom > 1].mean() - 2.5) < 0.03
    assert -0.5 <= sliders[:, 5:].min() and sliders[:, 5:].max() <= 0.5 and sliders[:, 5:].std() > 0.28
    steering = Steering(7)
    numbers = uniform(0, range(6), 1, Steering.NUMBERS)
    expected = Steering.sliders(numbers) * torch.tensor([5., 1, 1, 1, 1, 1, 1, 1])       # as when GenRep generates
    assert torch.allclose(steering(torch.zeros(6, 7), numbers), expected @ steering.directions, atol=1e-6)


def config(folder, tmp_path, **latent):
    found = default_config(gen_views.DEFAULTS)
    found.update(output=str(tmp_path / 'run'), strategy='latent', view_size=32, view_format='png', beton_mode='raw',
                 batch_size=7, chunk_size=10, seed=2)
    found['latent'].update(model=str(folder), anchors=23, chunks={'1-5': move(std=1.0)}, **latent)
    return found


def test_pairs_without_images(folder, tmp_path, capsys):
    settings = config(folder, tmp_path)
    gen_views.main(settings)
    run = tmp_path / 'run'
    sidecar = open_beton(run / 'pairs.beton')
    assert sidecar['samples'] == sidecar['with_view'] == 23 and (run / 'pairs.png').is_file()
    pairs = LatentPairs(settings['latent'], 2, 32, torch.device('cpu'))
    expected = pairs.views(None, None, [(i, n) for i in range(23) for n in (0, 1)]).reshape(23, 2, 32, 32, 3)
    whole = [{'size': 32, 'crop_scale': None}] * 2
    loader = PairLoader(run / 'pairs.beton', whole, swap='second', batch_size=23, seed=0, num_workers=1, shuffle=False)
    batch = next(iter(loader.epoch(0)))
    assert batch['label'].tolist() == [-1] * 23 and batch['index'].tolist() == list(range(23))
    for v in range(2):
        found = batch['views'][v].permute(0, 2, 3, 1).numpy().astype(int)
        assert np.abs(found - expected[:, v]).max() <= 1  # rounding of another batch
    assert sorted(read_chunk(run / 'views/000002.tar'))[:3] == ['00000020.2.png', '00000020.json', '00000020.png']

    (run / 'views/000001.tar').unlink()
    (run / 'pairs.beton').unlink()
    chunk = (run / 'views/000002.tar').read_bytes()
    gen_views.main(settings)                             # what is missing is made again
    assert (run / 'views/000002.tar').read_bytes() == chunk and open_beton(run / 'pairs.beton')['samples'] == 23
    capsys.readouterr()
    gen_views.main({**settings, 'verify': True})
    assert 'verify: 46 views in 3 chunks and pairs.beton; all is well' in capsys.readouterr().out
    with pytest.raises(Fail, match='other settings: latent.truncation .was 2.0, now 1.0'):
        gen_views.main({**settings, 'latent': {**settings['latent'], 'truncation': 1.0}})


def test_several_positives_and_none(folder, tmp_path, capsys):
    settings = config(folder, tmp_path)
    gen_views.main({**settings, 'views_per_image': 3})
    sidecar = json.loads((tmp_path / 'run/pairs.beton.json').read_text())
    assert sidecar['with_view'] == 23 and len(read_chunk(tmp_path / 'run/views/000000.tar')) == 10 * 5
    alone = {**settings, 'output': str(tmp_path / 'alone'), 'latent': {**settings['latent'], 'chunks': {}}}
    gen_views.main(alone)                                # anchors alone: the papers' row without a move
    sidecar = open_beton(tmp_path / 'alone/pairs.beton')
    assert sidecar['samples'] == 23 and sidecar['with_view'] == 0
    assert 'failed' not in (tmp_path / 'alone/log.jsonl').read_text() + capsys.readouterr().out
    with pytest.raises(Fail, match='views_per_image: strategy latent without latent.chunks'):
        gen_views.main({**alone, 'views_per_image': 2})


def test_damaged_weights_are_one_line(folder, tmp_path, monkeypatch):
    settings, images = config(folder, tmp_path), LatentGenerator.images
    with monkeypatch.context() as patch, pytest.raises(Fail, match='gave NaN: its weights, or a walker, are damaged'):
        patch.setattr(LatentGenerator, 'images', lambda generator, code: images(generator, code) * torch.nan)
        gen_views.main(settings)
    assert not list((tmp_path / 'run').glob('views/*.tar'))
    with monkeypatch.context() as patch:                 # black is what a walker may lead to, and no failure
        patch.setattr(LatentGenerator, 'images', lambda generator, code: images(generator, code) * (
            torch.arange(len(code)) % 2).view(-1, 1, 1, 1))
        gen_views.main(settings)
    assert open_beton(tmp_path / 'run/pairs.beton')['with_view'] == 23


def test_a_batch_makes_each_pair_once(folder, monkeypatch):
    pairs = LatentPairs({**spec(folder), 'chunks': {'1-5': move(std=1.0)}}, 5, 32, torch.device('cpu'))
    made, images = [], LatentGenerator.images
    monkeypatch.setattr(LatentGenerator, 'images', lambda generator, code: made.append(len(code)) or images(
        generator, code))
    asked = [(i, n) for i in range(6) for n in (0, 1)] + [(9, 0), (3, 1)]
    views = pairs.views(None, None, asked)
    assert made == [14, 2]                               # 7 pairs, and an anchor whose positive nobody asked for
    for k, (i, n) in enumerate(asked):
        alone = pairs.images([i], max(n, 1))[bool(n)][0].permute(1, 2, 0).numpy() * 256
        assert np.abs(views[k] - alone).max() < 1.01


def test_blocks_change_nothing_but_rounding(folder, monkeypatch):
    pairs = LatentPairs({**spec(folder), 'chunks': {'1-5': move(std=1.0)}}, 5, 32, torch.device('cpu'))
    pairs.discriminator = lambda images: images.mean((1, 2, 3))
    for number in (1, 2):
        whole = pairs.images(range(8), number)
        with monkeypatch.context() as patch:
            patch.setattr(latents, 'BLOCK', 3)
            for images, parts in zip(whole, pairs.images(range(8), number)):
                assert len(parts) == 8 and torch.allclose(images, parts, atol=1e-5)


def test_weights_decide_about_settings(folder, tmp_path):
    """Pairs of another generator, or of a walker trained anew, do not mix with those there are."""
    torch.manual_seed(0)
    walker = tmp_path / 'w.pt'
    save_walker(walker, Walker(5 * WIDTH))
    settings = config(folder, tmp_path)
    settings['latent']['chunks'] = {'1-5': move(walker=str(walker))}
    gen_views.main(settings)
    save_walker(walker, Walker(5 * WIDTH))
    with pytest.raises(Fail, match='other settings: weights'):
        gen_views.main(settings)


@pytest.mark.parametrize('changes, message', [
    ({'latent': {'model': ''}}, 'latent.model: must name a file'),
    ({'latent': {'model': 'absent.pth'}}, 'absent.pth: no such checkpoint'),
    ({'source': 'folder', 'views_root': 'x'}, 'strategy: latent makes the views'),
    ({'latent': {'anchors': 0}}, 'anchors: 0 must be a whole number')])
def test_wrong_settings_are_one_line(folder, tmp_path, changes, message):
    settings = config(folder, tmp_path)
    settings['latent'].update(changes.pop('latent', {}))
    with pytest.raises(Fail, match=message):
        gen_views.main({**settings, **changes})
    assert not (tmp_path / 'run/views').exists() and not (tmp_path / 'run/settings.json').exists()
