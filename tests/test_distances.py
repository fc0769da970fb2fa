"""SSIM and Fréchet distance against numbers of scikit-image 0.26, pytorch-fid 0.3.0 (scipy's sqrtm) and its network."""
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from config import Fail  # noqa: E402
from distances import BasicConv2d, FidInception, Frechet, fid_inception, ssim  # noqa: E402

pytestmark = pytest.mark.usefixtures('one_thread')


def test_ssim_is_that_of_scikit_image():
    """structural_similarity(a, b, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)"""
    random = np.random.default_rng(0)
    first = random.integers(0, 256, (3, 24, 31, 3), np.uint8)
    second = np.clip(first + random.normal(0, 20, first.shape), 0, 255).astype(np.uint8)
    second[1] = 255 - first[1]
    first, second = (torch.from_numpy(images).permute(0, 3, 1, 2) for images in (first, second))
    found = ssim(first, second)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([0.9662453903197129, -0.9699100824862511, 0.963329078719754], abs=1e-9)
    assert ssim(first, first).tolist() == [1, 1, 1]


def test_frechet_distance_is_that_of_pytorch_fid():
    """calculate_frechet_distance of means and covariances, of more rows than columns and of fewer."""
    random = np.random.default_rng(0)
    for n, d, expected in ((200, 16, 3.0363495169732957), (20, 32, 6.037843794972105)):
        first = random.normal(size=(n, d))
        second = first * np.linspace(0.5, 1.5, d) + 0.1 * random.normal(size=(n, d)) + 0.3
        distance = Frechet(d, torch.device('cpu'))
        for rows in np.array_split(np.arange(n), 3):
            distance.add(torch.from_numpy(first[rows]), torch.from_numpy(second[rows]))
        assert float(distance.compute()) == pytest.approx(expected, rel=1e-6)
    same = Frechet(16, torch.device('cpu'))
    same.add(*[torch.randn(100, 16)] * 2)
    assert float(same.compute()) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope='module')
def weights():
    """Weights that are the same everywhere, drawn in the order of the network's layers."""
    random, state = np.random.default_rng(0), {}
    for name, value in FidInception().state_dict().items():
        if value.ndim == 4:
            value = torch.from_numpy(random.normal(size=value.shape) * (2 / value[0].numel()) ** 0.5).float()
        elif value.is_floating_point():
            value = torch.full_like(value, 1 if name.endswith(('bn.weight', 'var')) else 0.1 * name.endswith('bias'))
        state[name] = value
    return state


def test_network_is_that_of_pytorch_fid(weights, tmp_path):
    """Its patched blocks in torchvision's Inception3, on the pixels - 128 over 128, by numbers: without resizing."""
    torch.save({**weights, 'fc.weight': torch.zeros(1008, 2048), 'fc.bias': torch.zeros(1008)}, tmp_path / 'fid.pth')
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, 3, 299, 299)).astype(np.uint8))
    with torch.no_grad():
        found = fid_inception(tmp_path / 'fid.pth')(images)
    assert found.shape == (2, 2048)
    assert found.mean(1).tolist() == pytest.approx([1.5623246431350708, 1.5610227584838867], rel=1e-5)
    assert found.std(1).tolist() == pytest.approx([1.9755423069000244, 1.9756070375442505], rel=1e-5)
    assert found[0, [0, 500, 1000, 2000, 2047]].tolist() == pytest.approx(
        [1.067205786705017, 0, 0.1530056744813919, 1.231339693069458, 4.1762375831604], rel=1e-4)


def test_images_are_resized_as_tensorflow_does(monkeypatch):
    """Pixel k of the new 299 shows place k * S / 299 of the old: no half pixel, and the border goes on."""
    seen = []
    monkeypatch.setattr('torchvision.models.Inception3.forward', lambda _, images: seen.append(images))
    ramp = torch.arange(13, dtype=torch.uint8).expand(1, 3, 13, 13)
    FidInception()(ramp)
    expected = (np.minimum(np.arange(299) * 13 / 299, 12) - 128) / 128
    assert np.allclose(seen[0][0, 0, 7], expected, atol=1e-5) and seen[0].shape == (1, 3, 299, 299)


class Layer(nn.Module):
    def __init__(self, state, name):
        super().__init__()
        for key, part in (('weight', 'conv.weight'), ('beta', 'bn.bias'), ('mean', 'bn.running_mean'),
                          ('var', 'bn.running_var')):
            setattr(self, key, nn.Parameter(state[f'{name}.{part}']))
        self.padding = [1, 1]

    def forward(self, x):
        return x * self.weight.sum() * self.padding[0]


def test_tensors_of_a_torchscript_file_are_read_and_nothing_runs(weights, tmp_path):
    layers = [name for name, layer in FidInception().named_modules() if isinstance(layer, BasicConv2d)]
    random = {name: value + torch.rand(value.shape) if value.is_floating_point() and not name.endswith('bn.weight')
              else value for name, value in weights.items()}
    path = tmp_path / 'scripted.pt'
    torch.jit.script(nn.Sequential(*(Layer(random, name) for name in layers))).save(path)
    assert all(torch.equal(value, random[name]) for name, value in fid_inception(path).state_dict().items()
               if not name.endswith('tracked'))
    torch.jit.script(nn.Sequential(*(Layer(random, name) for name in layers[:3]))).save(path)
    with pytest.raises(Fail, match='fid.weights: .*scripted.pt: is no TorchScript file of FID'):
        fid_inception(path)
    with zipfile.ZipFile(path, 'w') as archive:  # what pickle would run
        archive.writestr('a/constants.pkl', b'')
        archive.writestr('a/data.pkl', b'cos\nsystem\n(S"touch ' + str(tmp_path / 'ran').encode() + b'"\ntR.')
    with pytest.raises(Fail, match='names os.system'):
        fid_inception(path)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('content, message', [(b'', 'scripted.pt'), ({'a': torch.zeros(1)}, 'does not fit its network'),
                                              (torch.zeros(1), 'does not fit its network'),
                                              (None, 'no such checkpoint')])
def test_a_file_that_is_another_one(content, message, tmp_path):
    path = tmp_path / 'scripted.pt'
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(Fail, match=message) as error:
        fid_inception(path)
    assert '\n' not in str(error.value)
