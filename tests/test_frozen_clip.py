"""frozen_clip.py on small random models: tokens and embeddings by hand, one-line errors, the quality of pairs."""
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from config import Fail  # noqa: E402
from conftest import damages  # noqa: E402
from frozen_clip import FrozenClip, Quality  # noqa: E402
from models import normalize  # noqa: E402


def test_vit_tokens_and_embedding_by_hand(clips):
    clip = FrozenClip({'model': str(clips['vit'])})
    assert (clip.image_size, clip.token_dim, clip.embedding_dim) == (32, 24, 20)
    assert clip.mean == (0.5, 0.4, 0.3) and clip.std == (0.2, 0.3, 0.4)
    pixels = torch.randn(3, 3, 32, 32)
    tokens, embedding = clip.forward(pixels)
    v = clip.visual
    with torch.no_grad():  # written out: no method of the tower but its layers
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(3, 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        x = v.ln_post(x)
    expected = x[:, 1:].transpose(1, 2).reshape(3, 24, 8, 8)
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(embedding, x[:, 0] @ v.proj)
    torch.testing.assert_close(clip.tokens(pixels), tokens)


def test_convnext_tokens_and_embedding(clips):
    clip = FrozenClip({'model': f"local-dir:{clips['convnext']}"})
    pixels = torch.randn(2, 3, 96, 96)
    tokens, embedding = clip.forward(pixels)
    model = open_clip.create_model(f"local-dir:{clips['convnext']}").eval()
    with torch.no_grad():
        torch.testing.assert_close(tokens, model.visual.trunk.forward_features(pixels))
        torch.testing.assert_close(embedding, model.encode_image(pixels))
    torch.testing.assert_close(clip.tokens(pixels), tokens)
    assert tokens.shape == (2, 320, 3, 3)
    smaller = FrozenClip({'model': str(clips['convnext']), 'image_size': 64})
    assert smaller.image_size == 64 and smaller.preprocess(Image.new('RGB', (80, 90))).shape == (3, 64, 64)
    assert smaller.fingerprint() == clip.fingerprint() != FrozenClip({'model': str(clips['vit'])}).fingerprint()


def test_half_precision_weights_at_another_size(clips, tmp_path):
    from safetensors.torch import load_file, save_file
    (tmp_path / 'half').mkdir()
    config, weights = 'open_clip_config.json', 'open_clip_model.safetensors'
    (tmp_path / 'half' / config).write_text((clips['vit'] / config).read_text())
    save_file({k: v.half() for k, v in load_file(clips['vit'] / weights).items()}, tmp_path / 'half' / weights)
    half, full = (FrozenClip({'model': str(f), 'image_size': 48}) for f in (tmp_path / 'half', clips['vit']))
    assert {v.dtype for v in half.visual.state_dict().values() if v.is_floating_point()} == {torch.float32}
    pixels = torch.randn(2, 3, 48, 48)
    assert half.tokens(pixels).shape == (2, 24, 12, 12)
    torch.testing.assert_close(half.tokens(pixels), full.tokens(pixels), atol=0.05, rtol=0.05)


def test_encoder_stays_out_of_checkpoints_and_graphs(clips):
    class Method(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = FrozenClip({'model': str(clips['vit'])})

    method = Method()
    assert not method.state_dict() and not list(method.parameters())
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not any(t.requires_grad for t in (*method.clip.forward(pixels), method.clip.tokens(pixels)))


@pytest.mark.parametrize('spec, words', [
    ({'model': 'ViT-B-23', 'pretrained': 'openai'}, "clip.model: 'ViT-B-23' .* did you mean 'ViT-B-"),
    ({'model': 'ViT-H-14', 'pretrained': 'laion2b_s32b_b79'}, "did you mean 'laion2b_s32b_b79k'"),
    ({'model': 'ViT-H-14'}, 'clip.pretrained: ViT-H-14 needs a hub tag'),
    ({'model': 'no/such/folder'}, "'no/such/folder' is no folder"),
    ({'model': 'empty'}, 'open_clip_model.safetensors: no such file'),
    ({'model': 'damaged'}, 'open_clip_model.safetensors: is text; copy or download it again')])
def test_encoder_errors_are_one_line(spec, words, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('empty', 'damaged'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'open_clip_config.json').write_text((clips['vit'] / 'open_clip_config.json').read_text())
    (tmp_path / 'damaged/open_clip_model.safetensors').write_bytes(b'no weights')
    with pytest.raises(Fail, match=words) as error:
        FrozenClip(spec)
    assert '\n' not in str(error.value)


def test_unreachable_hub_is_one_line(monkeypatch):
    def create_model(*args, **kwargs):
        raise RuntimeError('Failed to download weights:\n (MaxRetryError: Failed to resolve huggingface.co)')
    monkeypatch.setattr(open_clip, 'create_model', create_model)
    with pytest.raises(Fail, match='ViT-H-14 / laion2b_s32b_b79k: the hub cannot be reached') as error:
        FrozenClip({'model': 'ViT-H-14', 'pretrained': 'laion2b_s32b_b79k'})
    assert '\n' not in str(error.value)


def test_encode_normalises_and_gives_float32(clips):
    clip = FrozenClip({'model': str(clips['vit'])})
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    expected = clip.forward((images / 255 - mean) / std)
    for found, value in zip(clip.encode(images, torch.float32), expected):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(normalize(images, *clip.mean_std), (images / 255 - mean) / std)
    for half, value in zip(clip.encode(images, torch.bfloat16), expected):
        assert half.dtype == torch.float32 and 0 < (half - value).abs().max() < 0.1 * value.abs().max()


# ---------------------------------------------------------------------------------------------------
# Quality

def test_views_are_interpolated_to_the_encoder_and_component_must_fit(clips, tmp_path):
    settings = {'clip': {'model': str(clips['vit']), 'pretrained': None, 'image_size': None}, 'temperature': 1.0}
    pc = np.random.default_rng(0).normal(size=24).astype(np.float32)
    np.savez(tmp_path / 'fg.npz', pc=pc, mean=np.zeros(24, np.float32))
    quality = Quality({**settings, 'pc': str(tmp_path / 'fg.npz')}, torch.device('cpu'))
    weights, values = quality(*(torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8) for _ in range(2)))
    assert weights.shape == values.shape == (4,) and weights.mean().item() == pytest.approx(1, abs=1e-5)
    for name, wrong in (('zero', np.zeros(24)), ('nan', pc * np.nan), ('matrix', np.ones((6, 4)))):
        np.save(tmp_path / f'{name}.npy', wrong)
        with pytest.raises(Fail, match=f'quality.pc: .*{name}.npy: no principal component in it: it must be of'):
            Quality({**settings, 'pc': str(tmp_path / f'{name}.npy')}, torch.device('cpu'))
    np.save(tmp_path / 'published.npy', np.ones((24, 1)))
    Quality({**settings, 'pc': str(tmp_path / 'published.npy')}, torch.device('cpu'))
    np.savez(tmp_path / 'narrow.npz', pc=np.ones(7))
    np.savez(tmp_path / 'other.npz', pc=np.ones(24), encoder='0123456789ab')
    np.savez(tmp_path / 'empty.npz', mean=np.ones(7))
    for name, message in (('narrow.npz', 'width 7, the tokens of this encoder have 24'), ('other.npz', 'other weights'),
                          ('empty.npz', 'no principal component in it'), ('missing.npz', 'no such file')):
        with pytest.raises(Fail, match=message):
            Quality({**settings, 'pc': str(tmp_path / name)}, torch.device('cpu'))
    for name in ('fg.npz', 'published.npy'):
        for damaged in damages(tmp_path / name):
            with pytest.raises(Fail, match=f'quality.pc: .*{name}: .*; run fg_proportion.py') as error:
                Quality({**settings, 'pc': str(tmp_path / name)}, torch.device('cpu'))
            assert damaged in str(error.value) and '\n' not in str(error.value)


def test_damaged_weights_are_named(clips, tmp_path):
    shutil.copytree(clips['vit'], tmp_path / 'clip')
    for name in ('open_clip_model.safetensors', 'open_clip_config.json'):
        for damaged in damages(tmp_path / 'clip' / name):
            with pytest.raises(Fail, match=f'clip.model: .*clip/{name}: ') as error:
                FrozenClip({'model': str(tmp_path / 'clip')})
            assert damaged in str(error.value) and '\n' not in str(error.value)
    (tmp_path / 'weights.pt').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(Fail, match='weights.pt: is a Git LFS pointer, not the file itself; `git lfs pull`'):
        FrozenClip({'model': 'RN50', 'pretrained': str(tmp_path / 'weights.pt')})
