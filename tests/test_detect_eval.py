"""detect_eval.py on 40 drawn images in COCO's format and a handful in VOC's: learning, AP, resuming, two processes, bad
input."""
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import detect_eval  # noqa: E402
from checkpoints import load_backbone  # noqa: E402
from common import Processes, StopSignal  # noqa: E402
from config import Fail, load_config  # noqa: E402
from conftest import held  # noqa: E402
from models import build_backbone  # noqa: E402

ENVIRONMENT = {**os.environ, 'OMP_NUM_THREADS': '1'}
MEAN, STD = [0.5, 0.4, 0.45], [0.2, 0.25, 0.3]
BOX, ROOF = 7, 3  # category ids, with gaps and not in order
pytestmark = pytest.mark.usefixtures('one_thread')


def draw_things(image, random, count):
    """`count` red boxes and blue roofs beside each other: [(category, [x, y, side, side], polygon)]."""
    (width, height), pen, things = image.size, ImageDraw.Draw(image), []
    for k in range(count):
        side = int(random.integers(14, 22))
        x = k * width // 2 + int(random.integers(0, width // 2 - side + 1))
        y = int(random.integers(0, height - side))
        category = (BOX, ROOF)[int(random.integers(2))]
        shape = {BOX: [x, y, x + side, y, x + side, y + side, x, y + side],
                 ROOF: [x, y + side, x + side, y + side, x + side // 2, y]}[category]
        pen.polygon(shape, fill=(220, 40, 40) if category == BOX else (40, 60, 220))
        things.append((category, [x, y, side, side], shape))
    return things


def background(random, number):
    width, height = (64, 48) if number % 3 else (48, 64)
    return Image.fromarray(random.integers(90, 140, (height, width, 3), np.uint8))


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    """40 images (3 of them empty), 11 of them as another split, a narrow random ResNet-18 and the experiment that
    overfits them."""
    folder, random = tmp_path_factory.mktemp('detect_eval'), np.random.default_rng(0)
    (folder / 'set/drawn').mkdir(parents=True)
    (folder / 'set/annotations').mkdir()
    content = {'images': [], 'annotations': [],
               'categories': [{'id': BOX, 'name': 'box'}, {'id': ROOF, 'name': 'roof'}]}
    for i in range(40):
        image, number = background(random, i), 1000 - 7 * i
        for category, box, shape in draw_things(image, random, (0 if i in (5, 17, 30) else 1 + i % 2)):
            content['annotations'].append({'id': len(content['annotations']) + 1, 'image_id': number, 'bbox': box,
                                           'category_id': category, 'area': box[2] ** 2, 'iscrowd': 0,
                                           'segmentation': [shape]})
        content['images'].append({'id': number, 'file_name': f'{i}.png', 'width': image.width, 'height': image.height})
        image.save(folder / f'set/drawn/{i}.png')
    (folder / 'set/annotations/instances_drawn.json').write_text(json.dumps(content))
    few = {**content, 'images': content['images'][:11]}
    few['annotations'] = [a for a in content['annotations'] if a['image_id'] in {i['id'] for i in few['images']}]
    (folder / 'set/annotations/instances_few.json').write_text(json.dumps(few))
    (folder / 'set/few').symlink_to('drawn')
    torch.manual_seed(0)
    torch.save({'state_dict': build_backbone('resnet18', width=8).state_dict(), 'arch': 'resnet18', 'stem': 'imagenet',
                'width': 8, 'mean': MEAN, 'std': STD, 'image_size': 64}, folder / 'backbone.pt')
    return folder


SMALL = ('num_workers=0', 'channels=16', 'anchors=[16,20,24,28,32]', 'regions=16', 'train_sizes=[64]', 'test_size=64',
         'batch_size=4', 'iterations=120', 'lr=0.04', 'steps=[100]', 'warmup=10', 'log_every=10', 'save_every=50')


def changes_of(workplace, *changes, experiment='coco'):
    return [str(ROOT / f'yamls/detect_eval/{experiment}.yaml'), f'checkpoint={workplace}/backbone.pt',
            f'dataset.root={workplace}/set', 'dataset.train=drawn', 'dataset.test=drawn', *SMALL, *changes]


def config_of(workplace, *changes, **keywords):
    return load_config(detect_eval.DEFAULTS, changes_of(workplace, *changes, **keywords))


def command(workplace, *changes, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / 'detect_eval.py'), *changes_of(workplace, *changes)]


def read(folder):
    log = [json.loads(text) for text in (folder / 'log.jsonl').read_text().splitlines()]
    return json.loads((folder / 'results.json').read_text()), [line for line in log if 'loss' in line]


@pytest.fixture(scope='module')
def trained(workplace, one_thread):
    """A run that overfits the 40 images."""
    with redirect_stdout(io.StringIO()) as said:
        detect_eval.main(config_of(workplace, f'output={workplace}/trained'))
    (workplace / 'trained/said').write_text(said.getvalue())
    return workplace / 'trained'


# ---------------------------------------------------------------------------------------------------
# Learning and evaluation

def test_it_learns(trained):
    results, losses = read(trained)
    assert losses[-1]['loss'] < losses[0]['loss'] / 2 and len(losses) == 12
    assert {'loss_classifier', 'loss_box_reg', 'loss_mask', 'loss_objectness', 'loss_rpn_box_reg', 'lr',
            'images_per_second', 'data_wait'} < set(losses[0])
    assert results['box']['AP50'] > 40 and results['mask']['AP50'] > 40 and results['mask']['AP'] > 15
    assert {'detections.json', 'checkpoint.pt', 'loss.png', 'config.yaml', 'versions.json'} < {
        p.name for p in trained.iterdir()}


def test_ap_is_that_of_pycocotools(workplace, trained):
    """From the annotation file and detections.json alone, as COCO's own evaluation does it."""
    results, _ = read(trained)
    with redirect_stdout(io.StringIO()):
        truth = COCO(workplace / 'set/annotations/instances_drawn.json')
        for name, kind in (('box', 'bbox'), ('mask', 'segm')):
            evaluation = COCOeval(truth, truth.loadRes(str(trained / 'detections.json')), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert [results[name][key] for key in ('AP', 'AP50', 'AP75')] == pytest.approx(
                100 * evaluation.stats[:3], abs=1e-3)


def test_normalisation_and_all_layers(workplace, trained):
    """The checkpoint's own mean and std; every layer of the backbone has moved, batch norm included."""
    model = detect_eval.build_detector(config_of(workplace), *_backbone(workplace), 2, MEAN, STD)
    model.load_state_dict(torch.load(trained / 'checkpoint.pt', weights_only=True)['model'])
    assert model.transform.image_mean == MEAN and model.transform.image_std == STD
    said = (trained / 'said').read_text()
    assert f'mean {tuple(MEAN)}, std {tuple(STD)}; 37 training images, 3 more without objects, 40 test images' in said
    before = load_backbone(workplace / 'backbone.pt')[0].state_dict()
    for name, value in model.backbone.body.state_dict().items():
        assert not torch.equal(value, before[name]), name


def _backbone(workplace):
    backbone, info = load_backbone(workplace / 'backbone.pt')
    return backbone, info['feature_dim']


def test_no_detection_at_all_is_zero(workplace):
    truth, _ = detect_eval.annotations(config_of(workplace)['dataset'], 'drawn', True)
    assert detect_eval.average_precision(truth, [], 'segm') == {'AP': 0, 'AP50': 0, 'AP75': 0}


def test_half_precision_does_not_move_boxes(workplace):
    """torchvision casts anchors, in pixels, to the precision of what the heads predict: bf16 rounds to 4 px there."""
    model = detect_eval.build_detector(config_of(workplace), *_backbone(workplace), 2, MEAN, STD).eval()
    seen = []
    model.rpn.box_coder.decode = lambda codes, boxes: seen.append(codes.dtype) or type(model.rpn.box_coder).decode(
        model.rpn.box_coder, codes, boxes)
    with torch.autocast('cpu', dtype=torch.bfloat16), torch.no_grad():
        model([torch.rand(3, 64, 64)])
    assert seen == [torch.float32]


# ---------------------------------------------------------------------------------------------------
# VOC

def draw_voc(root, counts):
    """counts: (year, split) -> images. Every second object of the test split is difficult."""
    random = np.random.default_rng(1)
    for (year, split), count in counts.items():
        folder = root / f'VOCdevkit/VOC{year}'
        for part in ('ImageSets/Main', 'Annotations', 'JPEGImages'):
            (folder / part).mkdir(parents=True, exist_ok=True)
        names = [f'{split}{i:04d}' for i in range(count)]
        (folder / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names) + '\n')
        for i, name in enumerate(names):
            image = background(random, i)
            objects = ''.join(
                f'<object><name>{"dog" if category == BOX else "sofa"}</name><difficult>{k % 2 * (split == "test")}'
                f'</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>'
                '</bndbox></object>' for k, (category, (x, y, w, h), _) in enumerate(draw_things(image, random, 2)))
            image.save(folder / f'JPEGImages/{name}.jpg')
            (folder / f'Annotations/{name}.xml').write_text(
                f'<annotation><size><width>{image.width}</width><height>{image.height}</height><depth>3</depth></size>'
                f'{objects}</annotation>')


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp('voc')
    draw_voc(root, {(2007, 'trainval'): 5, (2012, 'trainval'): 4, (2007, 'test'): 6})
    return root


def voc_ap50(truth, detections, points=None):
    """AP at IoU 0.5 by the rules of VOC, slowly: all points, or the mean of 11. Difficult objects do not count."""
    found = []
    for category in {a['category_id'] for a in truth.anns.values() if a['area'] < 1e10}:
        objects = [a for a in truth.anns.values() if a['category_id'] == category]
        taken, hits, misses, curve = set(), 0, 0, []
        for d in sorted((d for d in detections if d['category_id'] == category), key=lambda d: -d['score']):
            overlaps = {}
            for a in objects:
                if a['image_id'] == d['image_id']:
                    (x, y, w, h), (u, v, s, t) = a['bbox'], d['bbox']
                    inside = max(0, min(x + w, u + s) - max(x, u)) * max(0, min(y + h, v + t) - max(y, v))
                    overlaps[a['id']] = inside / (w * h + s * t - inside)
            best = max(overlaps, key=overlaps.get, default=None)
            if best is not None and overlaps[best] >= 0.5:
                if truth.anns[best]['area'] > 1e10:
                    continue
                hits, misses = (hits + 1, misses) if best not in taken else (hits, misses + 1)
                taken.add(best)
            else:
                misses += 1
            curve.append((hits / sum(a['area'] < 1e10 for a in objects), hits / (hits + misses)))
        recalls = sorted({r for r, _ in curve})
        best = lambda least: max((p for r, p in curve if r >= least - 1e-12), default=0)
        if points is None:
            found.append(sum((r - before) * best(r) for before, r in zip([0, *recalls], recalls)))
        else:
            found.append(np.mean([best(r) for r in np.linspace(0, 1, points)]))
    return 100 * np.mean(found)


def test_voc_ap(voc):
    """Planted detections: shifted, doubled, of the wrong class, on difficult objects, in the empty."""
    truth, _ = detect_eval.annotations({'name': 'voc', 'root': str(voc)}, 'test07', False)
    assert len(truth.imgs) == 6 and sum(a['area'] > 1e10 for a in truth.anns.values()) == 6
    random, detections = np.random.default_rng(2), []
    for a in truth.anns.values():
        x, y, w, h = a['bbox']
        for shift, category in ((0, a['category_id']), (2, a['category_id']), (9, a['category_id']), (1, 12)):
            if shift != 2 or a['area'] < 1e10:  # two detections of a difficult object: the one known difference
                detections.append({'image_id': a['image_id'], 'category_id': category, 'bbox': [x + shift, y, w, h],
                                   'score': float(random.random())})
    result = detect_eval.average_precision(truth, detections, 'bbox', voc=True)
    assert 5 < result['AP50'] < 95
    assert result['AP50'] == pytest.approx(voc_ap50(truth, detections), abs=0.02)
    assert result['eleven_points']['AP50'] == pytest.approx(voc_ap50(truth, detections, 11), abs=1e-3)
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(detections), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert [result['AP'], result['AP75']] == pytest.approx(100 * evaluation.stats[[0, 2]], abs=1e-3)


def test_voc_trains_with_c4(workplace, voc, tmp_path):
    detect_eval.main(config_of(workplace, f'dataset.root={voc}', 'dataset.train=trainval07+12', 'dataset.test=test07',
                               'anchors=[16,24]', 'iterations=3', 'precision=bf16', f'output={tmp_path}',
                               experiment='voc'))
    results, losses = read(tmp_path)
    assert results['config']['images'] == [9, 6] and set(results['box']) == {'AP', 'AP50', 'AP75', 'eleven_points'}
    assert 'loss_mask' not in losses[0] and 'mask' not in results


# ---------------------------------------------------------------------------------------------------
# Data

def test_order_does_not_depend_on_processes_and_can_start_anywhere(workplace):
    config, processes = config_of(workplace, 'batch_size=6'), Processes('cpu')
    whole = list(detect_eval.positions(10, config, processes, 0, 9))
    assert list(detect_eval.positions(10, config, processes, 4, 9)) == whole[4:]
    flat = [number for batch in whole for _, number in batch]
    assert all(sorted(flat[k:k + 10]) == list(range(10)) for k in range(0, 50, 10)) and flat[:10] != flat[10:20]
    processes.world, parts = 3, []
    for processes.rank in range(3):
        parts.append(list(detect_eval.positions(10, config, processes, 0, 9)))
    assert [sum(share, []) for share in zip(*parts)] == whole


def test_targets(workplace):
    """Boxes are cut to the image; crowds, boxes outside and empty images go; flips depend on the position alone."""
    index, folder = detect_eval.annotations(config_of(workplace)['dataset'], 'drawn', True)
    image_id = index.dataset['images'][1]['id']
    x, y, w, h = index.imgToAnns[image_id][0]['bbox']
    extra = {'image_id': image_id, 'category_id': BOX, 'iscrowd': 0, 'segmentation': [[0, 0, 9, 0, 9, 9]]}
    index.imgToAnns[image_id] += [{**extra, 'bbox': [-5, -5, 10, 10]}, {**extra, 'bbox': [70, 2, 5, 5]},
                                  {**extra, 'bbox': [1, 1, 9, 9], 'iscrowd': 1}]
    images = detect_eval.Images(index, folder, {ROOF: 1, BOX: 2}, True, seed=0)
    assert len(images) == 37 and len(detect_eval.Images(index, folder, {}, True)) == 40
    number = sorted(i for i in index.imgs if index.imgToAnns[i]).index(image_id)
    flipped = 0
    for position in range(12):
        (image, target), (again, _) = images[position, number], images[position, number]
        assert torch.equal(image, again) and image.dtype == torch.uint8
        boxes, masks = target['boxes'].tolist(), target['masks']
        assert len(boxes) == len(index.imgToAnns[image_id]) - 2 == len(masks) == len(target['labels'])
        left = boxes[0][0] == x
        assert boxes[0] == ([x, y, x + w, y + h] if left else [image.shape[2] - x - w, y, image.shape[2] - x, y + h])
        assert boxes[-1] == ([0, 0, 5, 5] if left else [image.shape[2] - 5, 0, image.shape[2], 5])
        columns = torch.nonzero(masks[0].any(0))
        assert abs(columns.min() - boxes[0][0]) <= 1 and abs(columns.max() + 1 - boxes[0][2]) <= 1
        flipped += not left
    assert 0 < flipped < 12


def test_learning_rate(workplace):
    config = config_of(workplace, 'lr=0.02', 'warmup=1000', 'steps=[60000,80000]')
    for step, expected in ((0, 2e-5), (500, 0.01001), (1000, 0.02), (59999, 0.02), (60000, 2e-3), (80000, 2e-4)):
        assert detect_eval.learning_rate(step, config) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------
# Resuming, processes

SHORT = ('iterations=8', 'steps=[6]', 'save_every=2', 'log_every=1', 'batch_size=2', 'dataset.test=few',
         'detector=faster_rcnn_fpn')


def weights(folder):
    return torch.load(folder / 'checkpoint.pt', weights_only=True)


def test_runs_that_were_stopped_resume_bit_exactly(workplace, tmp_path, monkeypatch, capsys):
    detect_eval.main(config_of(workplace, *SHORT, f'output={tmp_path}/reference'))
    call = command(workplace, *SHORT, f'output={tmp_path}/killed', launcher=held('detect_eval.py', 'iteration', 6))
    process = subprocess.Popen(call, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    begin = time.time()
    while not (tmp_path / 'killed/checkpoint.pt').is_file() and process.poll() is None and time.time() - begin < 900:
        time.sleep(0.002)
    process.kill()
    assert process.wait(timeout=900) == -signal.SIGKILL, process.stderr.read()
    rate = detect_eval.learning_rate
    monkeypatch.setattr(detect_eval, 'learning_rate', lambda step, config: (
        step == 4 and os.kill(os.getpid(), signal.SIGTERM), rate(step, config))[1])
    with pytest.raises(SystemExit) as left:
        detect_eval.main(config_of(workplace, *SHORT, f'output={tmp_path}/stopped'))
    assert left.value.code == StopSignal.exit_code and weights(tmp_path / 'stopped')['iteration'] == 5
    assert 'SIGTERM: saved at iteration 5 of 8; the same command resumes' in capsys.readouterr().out
    monkeypatch.undo()
    reference = weights(tmp_path / 'reference')
    for folder in (tmp_path / 'killed', tmp_path / 'stopped'):
        assert not (folder / 'results.json').exists() and 0 < weights(folder)['iteration'] <= 8
        detect_eval.main(config_of(workplace, *SHORT, f'output={folder}'))
        resumed = weights(folder)
        assert all(torch.equal(value, resumed['model'][key]) for key, value in reference['model'].items())
        for (_, a), (_, b) in zip(*(sorted(w['optimizer']['state'].items()) for w in (reference, resumed))):
            assert torch.equal(a['momentum_buffer'], b['momentum_buffer'])
        assert read(folder)[0]['box'] == read(tmp_path / 'reference')[0]['box']


def test_a_signal_to_all_processes_of_a_job(workplace, tmp_path, monkeypatch, capsys):
    """Slurm's reach the processes that decode too, and come from neither parent nor child."""
    rate, workers = detect_eval.learning_rate, []

    def signalled(step, config):
        if step == 4:
            workers[:] = multiprocessing.active_children()
            subprocess.run(['kill', '-TERM', str(os.getpid()), *(str(worker.pid) for worker in workers)], check=True)
        return rate(step, config)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(detect_eval, 'learning_rate', signalled)
        detect_eval.main(config_of(workplace, *SHORT, 'num_workers=2', f'output={tmp_path}'))
    assert left.value.code == StopSignal.exit_code and weights(tmp_path)['iteration'] == 5
    assert 'SIGTERM: saved at iteration 5 of 8' in capsys.readouterr().out
    assert len(workers) == 2 and not multiprocessing.active_children()


def test_a_signal_while_detections_are_made(workplace, tmp_path, monkeypatch, capsys):
    detect, changes = detect_eval.detect, (*SHORT, 'iterations=1', f'output={tmp_path}')
    monkeypatch.setattr(detect_eval, 'detect', lambda *args: (os.kill(os.getpid(), signal.SIGTERM), detect(*args))[1])
    with pytest.raises(SystemExit) as left:
        detect_eval.main(config_of(workplace, *changes))
    assert left.value.code == StopSignal.exit_code and not (tmp_path / 'results.json').exists()
    assert 'SIGTERM: left while the test images were looked at' in capsys.readouterr().out
    monkeypatch.undo()
    detect_eval.main(config_of(workplace, *changes))
    assert read(tmp_path)[1][-1]['step'] == 1


def test_two_processes(workplace, trained, tmp_path):
    """Three iterations, then 11 images between two: every one once, and all is as with the same weights in one
    process, which has nothing left to train."""
    state = weights(trained)
    changes = (*SHORT[2:-1], 'iterations=123', 'steps=[100]')
    (tmp_path / 'two').mkdir()
    detect_eval.main(config_of(workplace, *changes, 'iterations=1', 'warmup=0', f'output={tmp_path}/short'))
    config = {**weights(tmp_path / 'short')['config'], **config_of(workplace, *changes)}  # with its data's checksums
    torch.save({**state, 'config': config}, tmp_path / 'two/checkpoint.pt')
    launcher = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2')
    run = subprocess.run(command(workplace, *changes, f'output={tmp_path}/two', launcher=launcher),
                         env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    assert 'resumed at iteration 120' in run.stdout and '2 x cpu' in run.stdout
    two, losses = read(tmp_path / 'two')
    assert [line['step'] for line in losses] == [121, 122, 123] and two['box']['AP50'] > 30
    (tmp_path / 'one').mkdir()
    shutil.copy(tmp_path / 'two/checkpoint.pt', tmp_path / 'one')
    detect_eval.main(config_of(workplace, *changes, f'output={tmp_path}/one'))
    one = read(tmp_path / 'one')[0]
    assert [one[kind] for kind in ('box', 'mask')] == [two[kind] for kind in ('box', 'mask')]
    detections = [json.loads((tmp_path / name / 'detections.json').read_text()) for name in ('one', 'two')]
    assert detections[0] == detections[1] and len({d['image_id'] for d in detections[0]}) >= 10


def test_finished_run_shows_its_results_and_refuses_others(workplace, trained, capsys):
    written = (trained / 'results.json').stat().st_mtime_ns
    detect_eval.main(config_of(workplace, f'output={trained}', 'num_workers=1'))
    assert 'finished before' in capsys.readouterr().out
    assert (trained / 'results.json').stat().st_mtime_ns == written
    with pytest.raises(Fail, match=r'another config: lr \(was 0.04, now 0.02\)'):
        detect_eval.main(config_of(workplace, f'output={trained}', 'lr=0.02'))
    with pytest.raises(Fail, match='another config: normalization'):
        detect_eval.main(config_of(workplace, f'output={trained}', 'normalization=[[0.5, 0.5, 0.5], [1, 1, 1]]'))


def test_other_annotations_under_the_same_name_are_another_run(workplace, trained, capsys):
    path = workplace / 'set/annotations/instances_drawn.json'
    whole = path.read_text()
    content = json.loads(whole)
    for change in (lambda: content['annotations'][0].update(category_id=ROOF + BOX - content['annotations'][0][
            'category_id']), lambda: content['categories'][0].update(name='crate')):
        content = json.loads(whole)
        change()
        path.write_text(json.dumps(content))
        try:
            with pytest.raises(Fail, match='another config: data_sha256'):
                detect_eval.main(config_of(workplace, f'output={trained}'))
        finally:
            path.write_text(whole)
    detect_eval.main(config_of(workplace, f'output={trained}'))
    assert 'finished before' in capsys.readouterr().out


def test_other_weights_under_the_same_name_are_another_run(workplace, trained, tmp_path):
    content = torch.load(workplace / 'backbone.pt', weights_only=True)
    torch.save(content, tmp_path / 'moved.pt')  # the same ones elsewhere are not
    detect_eval.main(config_of(workplace, f'output={trained}', f'checkpoint={tmp_path}/moved.pt'))
    content['state_dict']['layer4.1.bn2.bias'] += 1
    torch.save(content, tmp_path / 'moved.pt')
    with pytest.raises(Fail, match='another config: backbone_sha256'):
        detect_eval.main(config_of(workplace, f'output={trained}', f'checkpoint={tmp_path}/moved.pt'))


def test_the_competing_network_that_is_meant_can_be_named(workplace, tmp_path):
    state = torch.load(workplace / 'backbone.pt', weights_only=True)['state_dict']
    torch.save({name: {f'backbone.{k}': v for k, v in state.items() if k[0] != 'f'} | {'backbone.bn1.bias': torch.ones(
        8) * number} for number, name in enumerate(('student', 'teacher'))}, tmp_path / 'dino.pth')
    with pytest.raises(Fail, match='set backbone.prefix'):
        detect_eval.main(config_of(workplace, f'checkpoint={tmp_path}/dino.pth'))
    changes = (f'output={tmp_path}/out', f'checkpoint={tmp_path}/dino.pth', 'backbone.prefix=teacher.backbone')
    detect_eval.main(config_of(workplace, *SHORT, 'iterations=1', 'warmup=0', 'lr=1e-9', *changes))
    assert torch.allclose(weights(tmp_path / 'out')['model']['backbone.body.bn1.bias'], torch.ones(8))


# ---------------------------------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize('change, message', [
    ('checkpoint=', 'checkpoint: must name a file'), ('checkpoint=none.pt', 'none.pt: no such checkpoint'),
    ('dataset.root=', 'dataset.root: must name a folder'), ('dataset.name=coca', "'coca' is none of coco, voc"),
    ('dataset.test=val', r'instances_val.json: No such file or directory; COCO is at'),
    ('dataset.name=voc detector=faster_rcnn_c4 dataset.test=test07', 'VOC drawn cannot be read from'),
    ('detector=retina', "detector: 'retina' is none of"), ('batch_size=0', 'batch_size: 0'), ('lr=0', 'lr: 0'),
    ('anchors=[16]', 'an FPN needs 5 anchors'), ('detector=faster_rcnn_c4 anchors=[]', 'none may be empty'),
    ('train_sizes=[1.5]', 'train_sizes: 1.5'), ('train_sizes=[]', 'none may be empty'),
    ('precision=fp8', 'precision'), ('backbone.prefix=online', "'online' fits 0"),
    ('normalization=clpi', "normalization: 'clpi' is none of")])
def test_impossible_settings_leave_nothing_behind(workplace, tmp_path, change, message):
    with pytest.raises(Fail, match=message) as error:
        detect_eval.main(config_of(workplace, f'output={tmp_path}/out', *change.split(' ')))
    assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def write_set(root, content, split='drawn'):
    (root / 'annotations').mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / f'annotations/instances_{split}.json').write_text(text)
    return {'name': 'coco', 'root': str(root)}


def test_wrong_annotations(workplace, tmp_path):
    good = json.loads((workplace / 'set/annotations/instances_drawn.json').read_text())
    first, image, box = good['annotations'][0], good['images'][0], good['categories'][0]

    def changed(**fields):
        return {**good, 'annotations': [{**first, **fields}, *good['annotations'][1:]]}

    def pictured(**fields):
        return {**good, 'images': [{**image, **fields}, *good['images'][1:]]}
    of_image, rle = r'annotation 1 of image 1000 \(0.png\) ', {'size': [64, 48], 'counts': [64 * 48]}
    needs = of_image + '.*or segmentation, which detector=faster_rcnn_fpn does not need'
    wrong = [
        ('lacks file_name, width or height', pictured(file_name=None)), ('lacks id', pictured(id=None)),
        ('lacks file_name, width or height', pictured(width='64')), ('lacks file_name', pictured(height=64.5)),
        ('lacks file_name', pictured(height=0)), ('images: id 993 stands twice', pictured(id=993)),
        ('images: some ids are numbers and some are text', pictured(id='1000')),
        ('categories: id 7 stands twice', {**good, 'categories': [box, *good['categories']]}),
        ('categories: .* lacks id', {**good, 'categories': [{'name': 'box'}]}),
        ('annotation 1 has category_id 99', changed(category_id=99)),
        ('annotation 1 has image_id -1', changed(image_id=-1)),
        ('annotation 1 has image_id .1000.', changed(image_id=[1000])),
        *((of_image + 'lacks bbox', changed(bbox=bbox)) for bbox in (
            [1, 2, 3], None, [1, 2, float('nan'), 4], [1, 2, -3, 4], ['1', 2, 3, 4], 'box', [1, 2, 3, 4, 5])),
        (of_image + 'has area', changed(area='large')), (of_image + 'has iscrowd', changed(iscrowd='no')),
        *((needs, changed(segmentation=shape)) for shape in (
            [], None, 'mask', [[1, 2, 3, 4]], [[0, 0, 9, 0, 9]], [[0, 0, 9, 0, 9, 9, 1]], [[0, 0, 9, 0, 9, 'x']],
            [0, 0, 9, 0, 9, 9], {}, {**rle, 'size': [48, 64]}, {**rle, 'counts': [5]}, {**rle, 'counts': None},
            {**rle, 'counts': 'zzzz'}, {**rle, 'counts': 'abc'}, {**rle, 'counts': ''})),
        ('none of its 40 images has an annotation', {**good, 'annotations': []}),
        (r'not in the format of COCO \(KeyError', {'images': []}), (r'not in the format of COCO \(TypeError', [good]),
        ('annotations is not a list of objects', {**good, 'annotations': {'1': first}}), ('is empty; COCO', ''),
        ('is no JSON, or cut short', json.dumps(good)[:2000]), ('is a web page', '<!DOCTYPE html><html>'),
        ('no image of drawn has an object to learn', {**good, 'annotations': [{**first, 'iscrowd': 1}]}),
        ('drawn/gone.png: no such image; so with 1 of the 37', pictured(file_name='gone.png')),
        ('drawn and test have other categories: 3 dog, 3 roof', good)]
    (tmp_path / 'drawn').symlink_to(workplace / 'set/drawn')
    write_set(tmp_path, {**good, 'categories': [box, {'id': ROOF, 'name': 'dog'}]}, 'test')
    for message, content in wrong:
        write_set(tmp_path, content)
        with pytest.raises(Fail, match=message) as error:
            detect_eval.main(config_of(workplace, f'dataset.root={tmp_path}', f'output={tmp_path}/out',
                                       *['dataset.test=test'] * ('other categories' in message)))
        assert '\n' not in str(error.value) and 'drawn' in str(error.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('ids', [range(0, 999), [7] * 999, [None] * 999, ['a', 0] * 500], ids=[
    'counted from 0', 'all equal', 'missing', 'mixed'])
@pytest.mark.parametrize('named', [int, str, lambda number: number - 1000], ids=['', 'text', 'from 0'])
def test_a_perfect_detector_is_perfect_whatever_the_ids(workplace, tmp_path, ids, named):
    """pycocotools takes an annotation's id 0 for 'not matched', and keeps the last of those that share one."""
    content = json.loads((workplace / 'set/annotations/instances_drawn.json').read_text())
    for image in content['images']:
        image.update(id=named(image['id']), width=float(image['width']))
    for a, number in zip(content['annotations'], ids):
        a.update(id=number, image_id=named(a['image_id']), iscrowd=None)
        del a['area'], a['id' if number is None else 'iscrowd']
    truth, _ = detect_eval.annotations(write_set(tmp_path, content), 'drawn', True)
    found = [{'image_id': a['image_id'], 'category_id': a['category_id'], 'bbox': a['bbox'], 'score': 1.0,
              'segmentation': {**(shape := truth.annToRLE(a)), 'counts': shape['counts'].decode()}}
             for a in truth.dataset['annotations']]
    assert len(found) == len(truth.anns) == 55
    for kind in ('bbox', 'segm'):
        assert detect_eval.average_precision(truth, found, kind) == {'AP': 100, 'AP50': 100, 'AP75': 100}


def test_compressed_run_lengths_are_those_of_pycocotools():
    random = np.random.default_rng(0)
    for k in range(100):
        mask = np.asfortranarray(random.random((random.integers(1, 90), random.integers(1, 90))) < random.random(),
                                 np.uint8)
        pixels = mask.flatten('F').tolist()
        counts = [0] * pixels[0] + [len(list(run)) for _, run in groupby(pixels)]
        assert detect_eval.run_lengths(mask_tools.encode(mask)['counts'].decode()) == counts


def test_run_lengths_are_masks_too(workplace, tmp_path):
    """Uncompressed and compressed, as tools write them; the target is that of the polygon."""
    content = json.loads((workplace / 'set/annotations/instances_drawn.json').read_text())
    truth, folder = detect_eval.annotations(write_set(tmp_path, content), 'drawn', True)
    for a in content['annotations']:
        pixels, shape = truth.annToMask(a).flatten('F').tolist(), truth.annToRLE(a)
        counts = [0] * pixels[0] + [len(list(run)) for _, run in groupby(pixels)]  # begins with those outside
        a['segmentation'] = {'size': shape['size'], 'counts': counts if a['id'] % 2 else shape['counts'].decode()}
    again, _ = detect_eval.annotations(write_set(tmp_path, content), 'drawn', True)
    one, two = (detect_eval.Images(index, workplace / 'set/drawn', {ROOF: 1, BOX: 2}, True, 0)
                for index in (truth, again))
    for k in range(37):
        assert torch.equal(one[k, k][1]['masks'], two[k, k][1]['masks'])


def test_unusable_images_are_named(workplace, tmp_path):
    shutil.copytree(workplace / 'set', tmp_path / 'set')
    Image.new('RGB', (9, 9)).save(tmp_path / 'set/drawn/3.png')
    (tmp_path / 'set/drawn/4.png').write_bytes(b'noise')
    index, folder = detect_eval.annotations({'name': 'coco', 'root': str(tmp_path / 'set')}, 'drawn', True)
    images = detect_eval.Images(index, folder, {BOX: 1, ROOF: 2}, True)
    numbers = {index.imgs[i]['file_name']: k for k, i in enumerate(sorted(index.imgs))}
    for workers, name, message in ((0, '3.png', r'3.png: has \(9, 9\) pixels'), (1, '4.png', '4.png: cannot be read')):
        with pytest.raises(Fail, match=message) as error:
            list(detect_eval.batches(images, [[(0, numbers[name])]], {'num_workers': workers}, torch.device('cpu')))
        assert '\n' not in str(error.value)


def test_a_vit_is_refused(workplace, tmp_path):
    backbone = build_backbone('vit_small', patch_size=16, image_size=32)
    torch.save({'state_dict': backbone.state_dict(), 'arch': 'vit_small', 'patch_size': 16, 'image_size': 32,
                'mean': MEAN, 'std': STD}, tmp_path / 'vit.pt')
    with pytest.raises(Fail, match='is a vit_small; this detector needs a ResNet'):
        detect_eval.main(config_of(workplace, f'checkpoint={tmp_path}/vit.pt'))


def test_weights_that_explode_stop_the_run(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(detect_eval, 'learning_rate', lambda *_: 1e30)  # more than a config may ask for
    with pytest.raises(Fail, match='iteration [0-9]+: the weights are not finite; lower lr'):
        detect_eval.main(config_of(workplace, *SHORT, 'warmup=0', f'output={tmp_path}'))


@pytest.mark.parametrize('path', sorted((ROOT / 'yamls/detect_eval').glob('*.yaml')), ids=lambda p: p.name)
def test_experiments_that_ship_are_valid(path):
    config = load_config(detect_eval.DEFAULTS, [str(path)])
    for world in (1, 2, 4, 8):
        detect_eval.check(config, world)
    with torch.device('meta'):
        backbone = build_backbone('resnet50')
        model = detect_eval.build_detector(config, backbone, 2048, 80, MEAN, STD)
    assert sum(p.numel() for p in model.parameters()) > 30e6
