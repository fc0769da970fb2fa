"""Stage 2c: a discriminator between drawn images and those of a small BigGAN, and what it leaves out."""
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_discriminator  # noqa: E402
from config import Fail, default_config  # noqa: E402
from conftest import picture, small_gan  # noqa: E402
from data import PairLoader, write_beton  # noqa: E402
from files import save_checkpoint  # noqa: E402
from latents import Discriminator, LatentPairs, load_discriminator  # noqa: E402
from test_latents import move, spec  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return small_gan(tmp_path_factory.mktemp('gan'))


@pytest.fixture(scope='module')
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp('beton') / 'real.beton'
    write_beton(path, lambda i: (picture(i, 32, 32), None, -1, i, -1), 192, {}, num_workers=1)
    return path


def config(folder, beton, output, **changes):
    found = default_config(train_discriminator.DEFAULTS)
    found['latent'].update({k: v for k, v in spec(folder).items() if k in found['latent']})
    found.update({**dict(output=str(output), beton=str(beton), image_size=32, width=8, epochs=4, batch_size=16,
                         num_workers=1, log_every=6, lr=1e-3), **changes})
    return found


def test_tells_apart_and_resumes_bit_exactly(folder, beton, tmp_path, monkeypatch):
    settings = config(folder, beton, tmp_path / 'run')
    train_discriminator.main(settings)
    lines = [json.loads(line) for line in (tmp_path / 'run/log.jsonl').read_text().splitlines()]
    accuracy = [line['accuracy'] for line in lines if 'accuracy' in line]
    assert len(accuracy) == 8 and accuracy[-1] > 0.95
    discriminator = load_discriminator(tmp_path / 'run/discriminator.pt')
    pairs = LatentPairs({**spec(folder), 'chunks': {}}, 9, 32, torch.device('cpu'))
    loader = PairLoader(beton, [{'size': 32, 'crop_scale': None}], batch_size=64, seed=0, num_workers=1, swap='first')
    real = discriminator(next(iter(loader.epoch(0)))['views'][0].float() / 255)
    assert real.median() > discriminator(pairs.images(range(64))[0]).median() + 1   # also latents it has not seen

    (tmp_path / 'run/discriminator.pt').unlink()         # killed between the last checkpoint and the result
    train_discriminator.main(settings)
    assert (tmp_path / 'run/discriminator.pt').is_file()

    count, batch = [], PairLoader._collect
    def killed(loader, *args):
        count.append(1)
        if len(count) == 20:
            raise KeyboardInterrupt
        return batch(loader, *args)
    again = config(folder, beton, tmp_path / 'again', save_every=5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PairLoader, '_collect', killed)
        train_discriminator.main(again)
    with monkeypatch.context() as patch:
        patch.setattr(PairLoader, '_collect', lambda loader, *args: (count.append(1), batch(loader, *args))[1])
        train_discriminator.main(again)
    assert len(count) == 20 + 48 - 15                    # it went on at step 15
    whole, found = discriminator.state_dict(), load_discriminator(tmp_path / 'again/discriminator.pt').state_dict()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_other_images_or_weights_under_the_same_name_do_not_mix(folder, beton, tmp_path):
    gan, real = tmp_path / 'gan', tmp_path / 'real.beton'
    shutil.copytree(folder, gan)
    shutil.copy(beton, real)
    shutil.copy(f'{beton}.json', f'{real}.json')
    settings = config(gan, real, tmp_path / 'run', epochs=1)
    train_discriminator.main(settings)
    train_discriminator.main(settings)
    weights, = gan.glob('*.safetensors')
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(Fail, match='another config: weights'):
        train_discriminator.main(settings)
    weights.write_bytes(whole)
    write_beton(real, lambda i: (picture(i + 1, 32, 32), None, -1, i, -1), 192, {}, num_workers=1)
    with pytest.raises(Fail, match='another config: beton_sha256'):
        train_discriminator.main(settings)


def test_the_better_of_two_candidates(folder, tmp_path):
    torch.manual_seed(1)
    discriminator = Discriminator(8).eval()
    save_checkpoint(tmp_path / 'd.pt', {'discriminator': discriminator.state_dict(), 'width': 8})
    latent = {**spec(folder), 'chunks': {'1-5': move(std=1.0)}}
    plain = LatentPairs(latent, 0, 32, torch.device('cpu'))
    better = LatentPairs({**latent, 'discriminator': str(tmp_path / 'd.pt')}, 0, 32, torch.device('cpu'))
    every = plain.images(range(40))
    with torch.no_grad():
        scores = sum(map(discriminator, every)).view(20, 2)
    chosen = scores.argmax(1) + 2 * torch.arange(20)
    assert 3 < (scores.argmax(1) == 0).sum() < 17
    found = better.images(range(20))
    assert all(torch.allclose(a, b[chosen], atol=1e-5) for a, b in zip(found, every))
    some = better.images([7, 3])                         # whatever else is in the batch
    assert all(torch.allclose(a, b[[7, 3]], atol=1e-5) for a, b in zip(some, found))
    second = better.images([7, 3], 2)                    # another positive of the same anchor
    assert torch.allclose(second[0], some[0], atol=1e-5) and (second[1] - some[1]).abs().mean() > 0.01
    views = better.views(None, None, [(3, 0), (3, 1), (7, 1)])
    assert np.abs(views[1] / 256 - found[1][3].permute(1, 2, 0).numpy()).max() < 0.01


@pytest.mark.parametrize('changes, message', [
    ({'beton': ''}, 'beton: must name a file'), ({'batch_size': 0}, 'batch_size: 0 must be'),
    ({'beton': 'absent.beton'}, 'absent.beton'),
    ({'image_size': 65}, 'image_size: views of 65 px from stored images of 32 px')])
def test_wrong_settings_are_one_line(folder, beton, tmp_path, changes, message):
    with pytest.raises(Fail, match=message):
        train_discriminator.main({**config(folder, beton, tmp_path / 'run'), **changes})
    assert not (tmp_path / 'run').exists()


def test_files_that_are_no_discriminators(tmp_path):
    damaged = Discriminator(8).state_dict()
    damaged['1.weight'][0] = torch.nan
    for content in ({'width': 8}, [1], {'discriminator': {}, 'width': 8}, {'discriminator': damaged, 'width': 8}):
        torch.save(content, tmp_path / 'd.pt')
        with pytest.raises(Fail, match='d.pt: cannot be read as a discriminator'):
            load_discriminator(tmp_path / 'd.pt')
