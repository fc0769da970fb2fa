"""The embedded models as they are shipped: their formats, and that the generator follows its condition."""
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tiny')]
import train  # noqa: E402
from fg_proportion import first_component  # noqa: E402
from frozen_clip import FrozenClip  # noqa: E402
from generators import UnCLIP  # noqa: E402
from loss import pair_quality  # noqa: E402

SPEC = {'model': str(ROOT / 'tiny/unclip'), 'fallbacks': [], 'steps': 20, 'guidance_scale': 3.0, 'precision': 'fp32'}


def test_size_and_formats():
    weights = [p for p in (ROOT / 'tiny').rglob('*') if p.suffix in ('.safetensors', '.bin', '.pt', '.pth', '.npy')]
    assert sum(p.stat().st_size for p in weights) <= 25e6
    assert {p.suffix for p in weights} == {'.safetensors'}
    clip = FrozenClip({'model': str(ROOT / 'tiny/clip')})
    assert (clip.image_size, clip.token_dim, clip.embedding_dim) == (32, 192, train.SEMANTIC + train.APPEARANCE)
    generator = UnCLIP(SPEC, torch.device('cpu'))
    assert generator.embedding_dim == clip.embedding_dim and generator.latent_shape == (16, 8, 8)


def test_quality_encoder_prefers_a_view_of_the_same_image():
    """The pair quality (eq. 12) of the images of tiny/views.png with their own views and with those of another one."""
    clip = FrozenClip({'model': str(ROOT / 'tiny/quality')})
    assert (clip.image_size, clip.token_dim) == (32, 64)
    pixels = torch.from_numpy(np.asarray(Image.open(ROOT / 'tiny/views.png').convert('RGB'))[::2, ::2].copy())
    rows = pixels.permute(2, 0, 1).unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4) / 255  # 7 x 20 images
    tokens = clip.tokens((rows.flatten(0, 1) - train.MEAN) / train.STD).unflatten(0, (7, 20))
    flat = tokens[0].permute(0, 2, 3, 1).flatten(0, 2).double()
    pc, mean, covariance = first_component(len(flat), flat.sum(0).numpy(), (flat.T @ flat).numpy())
    pc *= -np.sign(pc[0])  # the first channel is high on surroundings
    assert abs(pc[0]) > 0.9 and pc @ covariance @ pc / np.trace(covariance) > 0.25
    images, views, pc = tokens[:1].expand(5, -1, -1, -1, -1).flatten(0, 1), tokens[2:], torch.from_numpy(pc).float()
    own = pair_quality(images, views.flatten(0, 1), pc)
    others = torch.stack([pair_quality(images, views.roll(shift, 1).flatten(0, 1), pc) for shift in range(1, 20)])
    assert (own > others).float().mean() > 0.6


def test_text_tower_tells_names_apart():
    """tiny/clip is a whole CLIP for open_clip: names of classes, in any case, get directions of their own."""
    import open_clip
    name = f'local-dir:{ROOT / "tiny/clip"}'
    model, tokenize = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    with torch.no_grad():
        found = model.encode_text(tokenize(['goldfish', 'goose', 'sports car', 'Sports Car']), normalize=True)
    assert found.shape == (4, train.SEMANTIC + train.APPEARANCE)
    similarity = found @ found.T
    assert torch.equal(found[2], found[3]) and similarity[:3, :3].fill_diagonal_(-1).max() < 0.9


def test_tokens_of_trains_what_open_clip_runs():
    """train.tokens_of, without patches left out, is open_clip's own forward pass."""
    torch.manual_seed(0)
    visual = train.clip_model().visual.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        out = train.tokens_of(visual, images)
        some = train.tokens_of(visual, images, torch.arange(64).flip(0).expand(2, -1))
        expected = visual.forward_intermediates(images, indices=1, normalize_intermediates=True)
    torch.testing.assert_close(out[:, 0] @ visual.proj, expected['image_features'])
    torch.testing.assert_close(out[:, 1:].transpose(1, 2).unflatten(2, (8, 8)), expected['image_intermediates'][-1])
    torch.testing.assert_close(some[:, 1:].flip(1), out[:, 1:], rtol=1e-4, atol=1e-4)


def test_views_follow_their_condition_and_wander_with_the_noise_level():
    """Views of 24 drawn embeddings, encoded again: nearest to their own condition several times as often as chance
    (1 in 24) would have it, and less and less alike at higher levels."""
    clip, generator = FrozenClip({'model': str(ROOT / 'tiny/clip')}), UnCLIP(SPEC, torch.device('cpu'))
    normalizer = generator.pipeline.image_normalizer
    noise = torch.randn(24, generator.embedding_dim, generator=torch.Generator().manual_seed(0))
    conditions = normalizer.unscale(noise).detach()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.mean, clip.std))
    similarity = []
    for level in (0, 400, 900):
        views = generator.views(conditions.numpy(), np.full(24, level), list(range(24)))
        assert views.shape == (24, 32, 32, 3) and views.std((1, 2, 3)).min() > 5
        pixels = torch.from_numpy(views).permute(0, 3, 1, 2) / 255
        found = normalizer.scale(clip.forward((pixels - mean) / std)[1]).detach()
        cosine = torch.nn.functional.cosine_similarity(
            found[:, None], normalizer.scale(conditions).detach()[None], dim=2)
        own, others = cosine.diagonal().mean().item(), (cosine.sum() - cosine.trace()).item() / (24 * 23)
        similarity.append(own - others)
        if level == 0:
            assert (cosine.argmax(1) == torch.arange(24)).float().mean() > 4 / 24 - 1e-6
    assert similarity[0] > similarity[1] > similarity[2]


def test_a_tenth_of_a_batch_has_no_condition_and_none_of_the_first():
    data = dict(embeddings=torch.randn(8, 2, 192), latents=torch.randn(8, 2, 16, 8, 8), scaling_factor=0.5)
    batch = torch.randint(8, (4000,), generator=torch.Generator().manual_seed(0))
    for conditioned in (0, 2000):
        mirrored, noisy, velocity, t, condition = train.noised_batch(
            data, torch.zeros(192), torch.ones(192), batch, torch.Generator().manual_seed(1), conditioned)
        without = (condition == 0).all(1)
        assert 0.085 < without.float().mean() < 0.115 and not without[:conditioned].any()
        torch.testing.assert_close(train.implied(noisy, velocity, t), data['latents'][batch, mirrored] * 0.5,
                                   rtol=1e-3, atol=1e-4)


def test_perceptual_loss_tells_pictures_apart():
    torch.manual_seed(0)
    teacher = timm.create_model('efficientnet_lite0').eval()
    pictures = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        meant = train.look(teacher, pictures)
        centre, spread = meant[1].mean(0), meant[1].std(0).clamp_min(1e-3)
        losses = [train.perceptual_loss(train.look(teacher, x), meant, centre, spread).item()
                  for x in (pictures, pictures + 0.05 * torch.randn_like(pictures), pictures.roll(1, 0))]
    assert abs(losses[0]) < 1e-5 < losses[1] < losses[2]
    assert 0.08 < losses[2] < 0.04 * 2 * len(meant[0]) + 0.16  # unit vectors differ by at most 4, unrelated ones by 2


def test_refine_goes_on_from_the_exported_models(tmp_path, monkeypatch):
    """Two steps on two images, with an untrained teacher: the exported UNet has changed a little and loads again."""
    shutil.copytree(ROOT / 'tiny', tmp_path / 'tiny')
    folder = tmp_path / 'data/train' / train.CLASSES[0] / 'images'
    folder.mkdir(parents=True)
    (tmp_path / 'data/wnids.txt').write_text(f'{train.CLASSES[0]}\n')
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.JPEG')
    monkeypatch.setattr(train, 'HERE', tmp_path / 'tiny')
    monkeypatch.setattr(train, 'teacher_model', lambda *_: timm.create_model('efficientnet_lite0').eval())
    learns = []
    loss = train.perceptual_loss
    monkeypatch.setattr(train, 'perceptual_loss', lambda drawn, meant, *scale: learns.append(
        (drawn[1].requires_grad, meant[1].requires_grad)) or loss(drawn, meant, *scale))
    args = Namespace(data=tmp_path / 'data', work=tmp_path, seed=0, steps=2, batch_size=4)
    train.refine(args, torch.device('cpu'))
    assert learns == [(True, False)] * 2
    before, after = (UnCLIP({**SPEC, 'model': str(folder / 'unclip')}, torch.device('cpu')).pipeline.unet.state_dict()
                     for folder in (ROOT / 'tiny', tmp_path / 'tiny'))
    change = torch.stack([(after[k] - before[k]).abs().max() for k in before])
    assert 0 < change.max() < 0.05 and (change > 0).float().mean() > 0.5
    weights = tmp_path / 'tiny/unclip/unet/diffusion_pytorch_model.safetensors'
    written = weights.read_bytes()
    train.refine(args, torch.device('cpu'))  # finished: trains no further
    assert weights.read_bytes() == written


def test_quality_trains_and_writes_its_encoder(tmp_path, monkeypatch):
    """Two steps on six images: what is written loads again, has moved, and keeps its embedding when its first token
    channel is made larger; once more writes the same."""
    monkeypatch.setattr(torch, 'compile', lambda function, **_: function)
    monkeypatch.setattr(train, 'HERE', tmp_path / 'tiny')
    shutil.copytree(ROOT / 'tiny/quality', tmp_path / 'tiny/quality')
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    train.save(tmp_path / 'data.pt', dict(
        images=images, labels=torch.arange(6) % 2, wnids=['a', 'b'], some=torch.tensor([1, 3, 4]),
        weight=torch.ones(112), semantic=torch.randn(6, 112, generator=generator),
        subjects=torch.randn(3, 64, generator=generator)))
    learned = []
    monkeypatch.setattr(train, 'learn', lambda *args, learn=train.learn: learned.append(args) or learn(*args))
    args = Namespace(work=tmp_path, seed=0, steps=2, batch_size=4)
    train.quality(args, torch.device('cpu'))
    data = learned[0][3]
    tokens, p, semantic = data['tokens'], train.load(tmp_path / 'data.pt')['subjects'].sigmoid(), data['semantic']
    assert tokens.shape == (3, 64, 64) and torch.allclose(tokens[..., 0].float(), 4 * (0.75 - p), atol=1e-2)
    torch.testing.assert_close(tokens[1, 5, 1:].float(), p[1, 5] * semantic[3, :63], atol=1e-2, rtol=1e-2)
    clip = FrozenClip({'model': str(tmp_path / 'tiny/quality')})
    written, (features, embedding) = clip.fingerprint(), clip.forward((images.float() / 255 - train.MEAN) / train.STD)
    assert written != FrozenClip({'model': str(ROOT / 'tiny/quality')}).fingerprint()
    visual = train.trained(args, 'quality', train.clip_model('quality').visual, 'visual.')
    with torch.no_grad():
        out = train.tokens_of(visual, (images.float() / 255 - train.MEAN) / train.STD)
    torch.testing.assert_close(embedding, out[:, 0] @ visual.proj, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(features[:, :2].flatten(2).mT, out[:, 1:, :2] * torch.tensor([1.5, 1]), rtol=1e-2,
                               atol=1e-2)
    train.quality(args, torch.device('cpu'))
    assert FrozenClip({'model': str(tmp_path / 'tiny/quality')}).fingerprint() == written


def test_training_resumes_where_it_was_killed(tmp_path):
    """tiny/train.py: the loop's result does not depend on where it was stopped."""

    def final(folder, *stops):
        folder.mkdir()
        for steps in (*stops, 400):
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 1)

            def loss_of(indices, generator, progress):
                x = torch.randn(len(indices), 4, generator=generator)
                if steps != 400 and torch.load(folder / 'toy.ckpt', weights_only=True)['step'] >= steps \
                        if (folder / 'toy.ckpt').exists() else False:
                    raise KeyboardInterrupt
                return (model(x) - x.sum(1, keepdim=True)).square().mean()

            try:
                train.train('toy', Namespace(work=folder, seed=0, batch_size=None), model, loss_of, 1e-2, 400, 8, 100,
                            torch.device('cpu'), ema_decay=0.9)
            except KeyboardInterrupt:
                continue
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole, killed = final(tmp_path / 'a'), final(tmp_path / 'b', 200)
    assert torch.equal(whole, killed) and (whole[:4] - 1).abs().max() < 0.2
