"""Stage 6: how well a backbone transfers to detection and instance segmentation, every layer fine-tuned.

    torchrun --nproc-per-node 8 detect_eval.py yamls/detect_eval/voc.yaml checkpoint=backbone.pt
    torchrun --nproc-per-node 8 detect_eval.py yamls/detect_eval/coco.yaml checkpoint=resnet50.pth

Writes results.json, detections.json (COCO's results format), checkpoint.pt, loss.png, config.yaml, versions.json and
log.jsonl into `output`. The same command again resumes; SIGTERM and SIGUSR1 save and leave. Images and flips depend on
(seed, iteration) alone, the drawn sizes and regions on the process as well.

COCO (GenView Table 3): Mask R-CNN R50-FPN, detectron2's 1x schedule; batch norm over the global batch in backbone, FPN,
box head (4 convolutions, 1 fully connected layer) and mask head, as the SSL benchmark of mmselfsup. VOC (COP-Gen Table
1, hierarchical-latent Table 2): Faster R-CNN R50-C4 with a batch norm after res5, as MoCo's code. AP, AP50 and AP75 are
COCO's (pycocotools); on VOC AP50 takes the whole precision-recall curve, and `eleven_points` are all three by the VOC
2007 rule, which detectron2 applies to test07: compare published VOC numbers with these. What differs from detectron2:
torchvision's RoIAlign is not shifted by half a pixel and, behind an FPN, takes 2 x 2 samples a bin (there as many as it
has pixels), its box loss is smooth L1 with beta 1/9 (there 0), its predictors are initialised as any layer (there by
small normal values); images are not grouped by aspect ratio; batch norm keeps its moving averages for evaluation (there
PRECISE_BN); on VOC, boxes are matched as on COCO, so that a difficult object excuses one detection, not any number.
"""
import io
import json
import os
import signal
import time
from contextlib import closing, redirect_stdout
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from xml.etree import ElementTree

from config import Fail, check_values, run_folder
from start import run

DEFAULTS = """
checkpoint: !text null  # backbone.pt of pretrain.py, or another ResNet that checkpoints.load_backbone knows
backbone:
  prefix: !text null    # of the network that is meant, where several compete, e.g. teacher.backbone
output: !text null      # run folder; null: <checkpoint without suffix>_<dataset.name>
seed: 0                 # of new layers, order of the images, flips, sizes and sampled regions
device: auto            # auto | cpu | cuda
precision: fp32         # fp32 (as published) | bf16 | fp16 (GPU, with loss scaling) | auto
num_workers: 4          # processes that read images, per process
normalization: !texts null  # null: the checkpoint's own (where it has none: imagenet) | clip | imagenet | cifar10 |
                            # [[r, g, b], [r, g, b]] (mean, std)

dataset:
  name: coco            # coco: any set in COCO's format, laid out like it | voc
  root: !text null      # coco: holds annotations/instances_SPLIT.json and SPLIT/*.jpg; voc: holds VOCdevkit/
  train: train2017      # split; voc: trainval07+12
  test: val2017         # split; voc: test07

detector: mask_rcnn_fpn # mask_rcnn_fpn | faster_rcnn_fpn | faster_rcnn_c4
channels: 256           # of FPN and its heads
anchors: [32, 64, 128, 256, 512]    # sides, pixels of the resized image; FPN: one for each level
regions: 512            # per image, for the heads to train on
train_sizes: [640, 672, 704, 736, 768, 800]     # shorter side, pixels; one is drawn for each image
test_size: 800          # shorter side, pixels
max_size: 1333          # longer side at most, pixels

batch_size: 16          # images of all processes together
iterations: 90000       # detectron2's 1x schedule (GenView section 4.1); the next three too
lr: 0.02                # for batch_size as it is, not scaled
steps: [60000, 80000]   # iterations after which the learning rate is a tenth
warmup: 1000            # iterations, linear from lr / 1000
momentum: 0.9
weight_decay: 0.0001    # not of batch norm
log_every: 50           # iterations
save_every: 1000        # iterations
requeue: false          # on SIGUSR1 (#SBATCH --signal=USR1@120) save, then `scontrol requeue` the Slurm job
"""
BOOKKEEPING = ('checkpoint', 'output', 'device', 'num_workers', 'log_every', 'save_every', 'requeue')
ALLOWED = {
    'checkpoint': 'file', 'root': 'folder', 'name': ['coco', 'voc'], 'seed': (0, 10 ** 12), 'num_workers': (0, 1024),
    'detector': ['mask_rcnn_fpn', 'faster_rcnn_fpn', 'faster_rcnn_c4'], 'channels': (1, 8192), 'anchors': (1, 10 ** 4),
    'regions': (1, 10 ** 5), 'train_sizes': (1, 10 ** 4), 'test_size': (1, 10 ** 4), 'max_size': (1, 10 ** 4),
    'batch_size': (1, 10 ** 5), 'iterations': (1, 10 ** 9), 'lr': (1e-30, 1000.0), 'steps': (1, 10 ** 9),
    'warmup': (0, 10 ** 9), 'momentum': (0.0, 0.9999), 'weight_decay': (0.0, 0.999), 'log_every': (1, 10 ** 9),
    'save_every': (1, 10 ** 9)}


def check(config, world=1):
    check_values(config, ALLOWED)
    if len(config['anchors']) != 5 and config['detector'] != 'faster_rcnn_c4' or not (
            config['anchors'] and config['train_sizes']):
        raise Fail('anchors, train_sizes: an FPN needs 5 anchors, one for each level, and none may be empty')
    if config['batch_size'] % world:
        raise Fail(f"batch_size: {config['batch_size']} (of all processes) is not a multiple of the {world} processes")


if __name__ == '__main__':  # a mistake in the YAML is answered before the imports below take seconds
    run(check, DEFAULTS)

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.models.detection import FasterRCNN, MaskRCNN, anchor_utils, backbone_utils, faster_rcnn, mask_rcnn
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2
from tqdm import tqdm

from checkpoints import digest, load_backbone, normalization
from common import Log, Processes, StopSignal, answered, earlier, precision_dtype
from files import damage, save_checkpoint, save_json
from models import BLOCKS, average_running_statistics, distributed, global_mean, synchronize_batch_norm
from pictures import curves

VOC_CLASSES = ('aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person '
               'pottedplant sheep sofa train tvmonitor').split()


# ---------------------------------------------------------------------------------------------------
# Annotations and images. COCO's format is the only one inside: VOC is translated into it.

def read_coco(root, split):
    path = root / f'annotations/instances_{split}.json'
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        content = {key: content[key] for key in ('images', 'annotations', 'categories')}
        for key, entries in content.items():
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f'{key} is not a list of objects')
        return path, root / split, content
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, 'strerror', None) or damage(path)[0] or f'not in the format of COCO ({error!r})'
        raise Fail(f'{path}: {reason}; COCO is at https://cocodataset.org/#download; in dataset.root stand this file '
                   'and SPLIT/') from None


def read_voc(root, split):
    """trainval07+12 -> both years in COCO's format, pixels counted from 0."""
    part, images, things = split.rstrip('0123456789+'), [], []
    try:
        for year in split[len(part):].split('+'):
            source = VOCDetection(root, f'20{year}', part)
            for path, file in zip(source.images, source.annotations):
                tree = VOCDetection.parse_voc_xml(ElementTree.parse(file).getroot())['annotation']
                images.append({'id': len(images), 'file_name': path,
                               'width': int(tree['size']['width']), 'height': int(tree['size']['height'])})
                for thing in tree['object']:
                    x0, y0, x1, y1 = (float(thing['bndbox'][key]) for key in ('xmin', 'ymin', 'xmax', 'ymax'))
                    box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
                    # a difficult one is learned but no error in a test: COCOeval ignores areas of more than 1e10
                    area = 1e11 if thing.get('difficult') == '1' else box[2] * box[3]
                    things.append({'id': len(things) + 1, 'image_id': images[-1]['id'], 'bbox': box, 'area': area,
                                   'category_id': VOC_CLASSES.index(thing['name']) + 1})
    except (RuntimeError, OSError, ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
        raise Fail(f'dataset: VOC {split} cannot be read from {root} ({" ".join(str(error).split())}); unpack there '
                   'VOC2007 trainval and test and VOC2012 trainval of host.robots.ox.ac.uk/pascal/VOC') from None
    categories = [{'id': number, 'name': name} for number, name in enumerate(VOC_CLASSES, 1)]
    return root / split, Path(), {'images': images, 'annotations': things, 'categories': categories}


def numbers(values, least=1):
    return isinstance(values, list) and len(values) >= least and all(
        type(v) in (int, float) and abs(v) < 1e9 for v in values)  # NaN is not


def run_lengths(text):
    """The numbers in pycocotools' compressed form, which does not look at their sum itself."""
    counts, number, shift = [], 0, 0
    for byte in text.encode():
        number, shift = number | (byte - 48 & 31) << shift, shift + 5
        if not byte - 48 & 32:
            number -= (byte - 48 >> 4 & 1) << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number = shift = 0
    return counts


def wrong_with(thing, size, masks):
    """What is wrong with an annotation, in words; '' where nothing is. size: [height, width] of its image."""
    box, shape, area = (thing.get(key) for key in ('bbox', 'segmentation', 'area'))
    if not numbers(box, 4) or len(box) > 4 or min(box[2:]) < 0:  # (COCO has boxes of height 0; nothing learns them)
        return f'lacks bbox [x, y, width, height] (has {box!r:.60})'
    if area is not None and (type(area) not in (int, float) or not area >= 0):
        return f'has area {area!r:.60}, not a number'
    if thing.get('iscrowd') not in (None, 0, 1):
        return f'has iscrowd {thing["iscrowd"]!r:.60}, not 0 or 1'
    if not masks:
        return ''
    if isinstance(shape, dict):  # run lengths, as numbers or compressed
        counts = shape.get('counts')
        counts = run_lengths(counts) if isinstance(counts, str) and counts.isascii() else counts
        good = shape.get('size') == size and numbers(counts) and min(counts) >= 0 and sum(counts) == size[0] * size[1]
    else:
        good = isinstance(shape, list) and shape and all(numbers(part, 6) and len(part) % 2 == 0 for part in shape)
    return '' if good else (
        'lacks bbox or segmentation, which detector=faster_rcnn_fpn does not need: polygons [[x, y, x, y, x, y, ...], '
        f'...] or run lengths {{size: [height, width], counts}} of its image, {size} (has {shape!r:.60})')


def annotations(dataset, split, masks):
    """pycocotools' index of a split, checked and completed, and the folder of its images."""
    path, folder, content = (read_voc if dataset['name'] == 'voc' else read_coco)(Path(dataset['root']), split)
    known = {'images': {}, 'categories': {}}
    for key, found in known.items():
        for entry in content[key]:
            number = entry.get('id')
            if type(number) not in (int, str):
                raise Fail(f'{path}: {key}: {entry!r:.200} lacks id, a whole number or text')
            if number in found:
                raise Fail(f'{path}: {key}: id {number} stands twice')
            found[number] = entry
        if len(set(map(type, found))) > 1:
            raise Fail(f'{path}: {key}: some ids are numbers and some are text')
    for image in content['images']:
        if not image.get('file_name') or not isinstance(image['file_name'], str) or \
                not numbers([image.get('width'), image.get('height')]) or \
                any(image[side] < 1 or image[side] % 1 for side in ('width', 'height')):
            raise Fail(f'{path}: image {image!r:.200} lacks file_name, width or height (in whole pixels)')
        image.update(width=int(image['width']), height=int(image['height']))
    for place, a in enumerate(content['annotations'], 1):
        name = f"annotation {a['id'] if 'id' in a else f'number {place}, without id,'}"
        for key, entries in (('category_id', known['categories']), ('image_id', known['images'])):
            if type(a.get(key)) not in (int, str) or a[key] not in entries:
                raise Fail(f'{path}: {name} has {key} {a.get(key)!r:.60}, which the file does not list')
        image = known['images'][a['image_id']]
        wrong = wrong_with(a, [image['height'], image['width']], masks)
        if wrong:
            raise Fail(f"{path}: {name} of image {image['id']} ({image['file_name']}) {wrong}")
        a['iscrowd'] = int(a.get('iscrowd') or 0)
        a['area'] = a['bbox'][2] * a['bbox'][3] if a.get('area') is None else a['area']
        a['id'] = place  # to pycocotools 0 means that nothing was matched, and of a repeated id it keeps one
    images = known['images']
    if not content['annotations']:
        raise Fail(f'{path}: none of its {len(images)} images has an annotation')
    index = COCO()
    index.dataset = content
    with redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        index.createIndex()
    return index, folder


class Images(Dataset):
    """[position in the run, number] -> uint8 image (3, H, W) and targets; of an image that cannot be used: why (text).

    labels: category id -> 1, 2, ... With a seed, for the flips: images that have objects to learn; boxes are cut to the
    image, crowds and boxes under a pixel left out. Without: all images, and the target is the id. What is known of them
    lies as JSON in one array that worker processes share; Python objects would be copied into each."""

    def __init__(self, index, folder, labels, masks, seed=None):
        self.seed, self.flip, records = seed, v2.Compose([v2.RandomHorizontalFlip(0.5), v2.ToPureTensor()]), []
        missing, listed = [], lru_cache(None)(lambda path: set(os.listdir(path) if os.path.isdir(path) else ()))
        for number, image in sorted(index.imgs.items()):
            found, (height, width) = [], (image['height'], image['width'])
            for a in index.imgToAnns[number] if seed is not None else ():
                x, y, w, h = a['bbox']
                box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
                if not a['iscrowd'] and min(box[2] - box[0], box[3] - box[1]) >= 1:
                    found.append((box, labels[a['category_id']], index.annToRLE(a) if masks else None))
            if found or seed is None:
                record = number, str(folder / image['file_name']), (height, width), found
                missing += [record[1]] * (os.path.basename(record[1]) not in listed(os.path.dirname(record[1])))
                records.append(json.dumps(record, default=bytes.decode).encode())  # (of masks: compressed, in ASCII)
        if missing:
            raise Fail(f'{missing[0]}: no such image; so with {len(missing)} of the {len(records)} that are needed')
        self.ends, self.content = np.cumsum([0, *map(len, records)]), np.frombuffer(b''.join(records), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, key):
        number, path, size, found = json.loads(self.content[self.ends[key[1]]:self.ends[key[1] + 1]].tobytes())
        try:
            with Image.open(path) as file:
                image = v2.functional.pil_to_tensor(file.convert('RGB'))
        except Exception as error:  # PIL raises nearly everything on a damaged file
            return f'{path}: cannot be read: {" ".join(str(error).split())}'
        if list(image.shape[1:]) != size:
            return f'{path}: has {tuple(image.shape[1:])} pixels, its annotations are for {tuple(size)} (height, width)'
        if self.seed is None:
            return image, number
        boxes, labels, masks = zip(*found)
        target = {'boxes': tv_tensors.BoundingBoxes(boxes, dtype=torch.float32, format='XYXY', canvas_size=tuple(size)),
                  'labels': torch.tensor(labels)}
        if masks[0] is not None:
            target['masks'] = tv_tensors.Mask(rle.decode(list(masks)).transpose(2, 0, 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, key[0])))  # of numbers: the same in every process
            return self.flip(tv_tensors.Image(image), target)


def positions(n, config, processes, first, last):
    """[(position, number), ...] of this process's share of each global batch: one endless list of shuffled epochs."""
    size = config['batch_size'] // processes.world
    order = lru_cache(2)(lambda epoch: np.random.default_rng([config['seed'], epoch]).permutation(n).tolist())
    for iteration in range(first, last):
        start = iteration * config['batch_size'] + processes.rank * size
        yield [(position, order(position // n)[position % n]) for position in range(start, start + size)]


def ignore_signals(worker):
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def batches(images, keys, config, device):
    """The samples that `keys` name, read ahead; Fail says which one cannot be used. To be closed by who asked: Slurm
    signals all processes of a job, and the workers ignore what the stage answers by saving."""
    for samples in DataLoader(images, batch_sampler=keys, num_workers=config['num_workers'], collate_fn=list,
                              pin_memory=device.type == 'cuda', worker_init_fn=ignore_signals):
        for problem in (sample for sample in samples if isinstance(sample, str)):
            raise Fail(problem)
        yield samples


def build_detector(config, backbone, width, classes, mean, std):
    """torchvision's detector around the layers of a ResNet whose last one has `width` channels."""
    norm, channels, anchors = nn.BatchNorm2d, config['channels'], config['anchors']
    settings = {'min_size': config['train_sizes'], 'max_size': config['max_size'], 'image_mean': mean, 'image_std': std,
                'box_batch_size_per_image': config['regions']}
    if config['detector'] == 'faster_rcnn_c4':  # with detectron2's numbers
        *layers, layer4, pool, _ = backbone.children()
        head = nn.Sequential(layer4, norm(width), pool, nn.Flatten())
        body, features, anchors = nn.Sequential(*layers), width, (tuple(anchors),)
        body.out_channels = width // 2
        settings |= {'box_roi_pool': MultiScaleRoIAlign(['0'], 14, 0), 'rpn_pre_nms_top_n_train': 12000,
                     'rpn_pre_nms_top_n_test': 6000}
    else:
        body = backbone_utils.BackboneWithFPN(backbone, {f'layer{k + 1}': str(k) for k in range(4)},
                                              [width >> 3 - k for k in range(4)], channels, norm_layer=norm)
        features, anchors = 4 * channels, tuple((side,) for side in anchors)
        head = faster_rcnn.FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [features], norm)
        settings['rpn_post_nms_top_n_train'] = 1000
    settings |= {'rpn_anchor_generator': anchor_utils.AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
                 'box_head': head, 'box_predictor': faster_rcnn.FastRCNNPredictor(features, classes + 1)}
    if config['detector'] == 'mask_rcnn_fpn':
        model = MaskRCNN(body, mask_head=mask_rcnn.MaskRCNNHeads(channels, [channels] * 4, 1, norm),
                         mask_predictor=mask_rcnn.MaskRCNNPredictor(channels, channels, classes + 1), **settings)
    else:
        model = FasterRCNN(body, **settings)
    for part in (model.rpn.head, model.roi_heads.box_predictor):  # torchvision rounds boxes to the precision of these
        part.register_forward_hook(lambda module, inputs, output: tuple(
            [level.float() for level in value] if isinstance(value, list) else value.float() for value in output))
    return model


def optimizer_of(model, config):
    """SGD, without weight decay on the batch norms."""
    no_decay = {p for norm in model.modules() if isinstance(norm, _BatchNorm) for p in norm.parameters()}
    groups = [{'params': [p for p in model.parameters() if p not in no_decay]},
              {'params': [p for p in model.parameters() if p in no_decay], 'weight_decay': 0.0}]
    return torch.optim.SGD(groups, lr=0.0, momentum=config['momentum'], weight_decay=config['weight_decay'])


def learning_rate(step, config):
    """Linear warm-up from a thousandth; a tenth after each of `steps` (detectron2's WarmupMultiStepLR)."""
    warm = min(1.0, 0.001 + 0.999 * step / config['warmup']) if config['warmup'] else 1.0
    return config['lr'] * warm * 0.1 ** sum(step >= end for end in config['steps'])


@torch.no_grad()
def detect(model, images, categories, config, processes, dtype, stop):
    """Detections in this process's share of the images, in COCO's results format. categories: label - 1 -> id."""
    device, detections = processes.device, []
    keys = [[(0, k)] for k in range(processes.rank, len(images), processes.world)]
    model.eval()
    model.transform.min_size = [config['test_size']]
    with closing(batches(images, keys, config, device)) as parts:
        for (image, number), in tqdm(parts, 'detections', len(keys), disable=None if processes.main else True):
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                found, = model([image.to(device).float() / 255])
            found['boxes'][:, 2:] -= found['boxes'][:, :2]
            labels, boxes, scores = (found[key].tolist() for key in ('labels', 'boxes', 'scores'))
            detections += [{'image_id': number, 'category_id': categories[label - 1], 'bbox': box, 'score': score}
                           for label, box, score in zip(labels, boxes, scores)]
            if labels and 'masks' in found:
                masks = (found['masks'][:, 0] > 0.5).byte().permute(1, 2, 0).cpu().numpy()
                for detection, mask in zip(detections[-len(labels):], rle.encode(np.asfortranarray(masks))):
                    detection['segmentation'] = {**mask, 'counts': mask['counts'].decode()}
            if stop:
                break
    return detections


def average_precision(truth, detections, kind, voc=False):
    """AP over IoU 0.5 to 0.95, AP50 and AP75, in percent; kind: 'bbox' or 'segm'. VOC: see the top of this file."""
    def mean_at(recalls):
        evaluator.params.recThrs = np.linspace(0, 1, recalls)
        evaluator.accumulate()
        precision = evaluator.eval['precision'][..., 0, -1]  # (IoU, recall, category); -1: category without objects
        precision = np.where(precision < 0, np.nan, precision)
        return {name: round(100 * float(np.nanmean(part)), 3)
                for name, part in (('AP', precision), ('AP50', precision[0]), ('AP75', precision[5]))}

    if not detections:  # pycocotools stumbles over that
        nothing = dict.fromkeys(('AP', 'AP50', 'AP75'), 0.0)
        return {**nothing, 'eleven_points': nothing} if voc else nothing
    with redirect_stdout(io.StringIO()):
        other = 'segmentation' if kind == 'bbox' else 'bbox'
        found = truth.loadRes([{k: v for k, v in detection.items() if k != other} for detection in detections])
        evaluator = COCOeval(truth, found, kind)
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ['all']
        evaluator.evaluate()
        result = mean_at(101)
        if voc:
            result |= {'AP50': mean_at(10001)['AP50'], 'eleven_points': mean_at(11)}
    return result


def main(config):
    processes = Processes(config['device'])
    check(config, processes.world)
    device, world, dataset, iterations = processes.device, processes.world, config['dataset'], config['iterations']
    dtype, masks = precision_dtype(config['precision'], device), config['detector'] == 'mask_rcnn_fpn'
    folder = run_folder(config['output'] or f"{os.path.splitext(config['checkpoint'])[0]}_{dataset['name']}")
    checkpoint, results = folder / 'checkpoint.pt', folder / 'results.json'

    # Everything is checked before anything is written
    backbone, info = load_backbone(config['checkpoint'], **config['backbone'])
    if info['arch'] not in BLOCKS:
        raise Fail(f"checkpoint: {config['checkpoint']} is a {info['arch']}; this detector needs a ResNet")
    mean, std = normalization(config['normalization'], (info['mean'], info['std']))
    (train, train_folder), (test, test_folder) = (annotations(dataset, dataset[k], masks) for k in ('train', 'test'))
    names, others = ({c['id']: c.get('name') for c in index.dataset['categories']} for index in (train, test))
    if names != others:
        differ = ', '.join(sorted(f'{number} {name}' for number, name in names.items() ^ others.items())[:9])
        raise Fail(f"dataset: {dataset['train']} and {dataset['test']} have other categories: {differ}")
    categories, labels = sorted(names), {category: label for label, category in enumerate(sorted(names), 1)}
    train_images = Images(train, train_folder, labels, masks, config['seed'])
    test_images = Images(test, test_folder, labels, masks)
    if not len(train_images):
        raise Fail(f"dataset.train: no image of {dataset['train']} has an object to learn")
    both = {str(train_folder / i['file_name']) for i in train.dataset['images']} & {
        str(test_folder / i['file_name']) for i in test.dataset['images']}
    truth = json.dumps([test.dataset['annotations'], sorted(names.items())]).encode()
    empty, train = len(train.imgs) - len(train_images), None
    identity = {**config, 'dtype': str(dtype), 'images': [len(train_images), len(test_images)],
                'backbone_sha256': digest(backbone, {**info, 'mean': mean, 'std': std}),
                'data_sha256': [sha256(part).hexdigest() for part in (
                    train_images.content, test_images.content, truth)]}
    saved = earlier(checkpoint, identity, BOOKKEEPING, needs=('model', 'optimizer', 'scaler', 'iteration'))
    if answered(results, identity, BOOKKEEPING, processes):
        return

    torch.manual_seed(config['seed'])  # the same on all processes: they build the same model
    torch.set_float32_matmul_precision('high')  # TF32 where the GPU has it
    model = build_detector(config, backbone, info['feature_dim'], len(categories), mean, std)
    model = synchronize_batch_norm(model.to(device), device).train()
    parameters, optimizer = list(model.parameters()), optimizer_of(model, config)
    scaler, first = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16), 0
    if saved:
        for name, part in (('model', model), ('optimizer', optimizer), ('scaler', scaler)):
            part.load_state_dict(saved[name])
        first = saved['iteration']
    wrapped = distributed(model, device)

    stop, log = StopSignal(), Log(folder, config, processes.main)
    log.write(f"{config['detector']} on {config['checkpoint']}: {info['text']}; {info['note'] or 'all of it'}; mean "
              f'{mean}, std {std}; {len(train_images)} training images, {empty} more without objects, '
              f"{len(test_images)} test images, {len(categories)} categories; global batch {config['batch_size']} on "
              f'{world} x {device.type}, {str(dtype)[6:]}' + f'; resumed at iteration {first}' * bool(saved))
    log.write(f'WARNING: {len(both)} images of dataset.test are images of dataset.train ({min(both)}): what is '
              'measured on those says nothing about new ones' if both else None)
    train_batches = batches(train_images, positions(len(train_images), config, processes, first, iterations), config,
                            device)
    step, waited, sums, counted, leave, since = first, 0.0, {}, 0, False, time.perf_counter()
    bar = tqdm(total=iterations, initial=first, unit='iteration', disable=None if processes.main else True)
    with closing(train_batches):
        while step < iterations and not leave:
            asked = time.perf_counter()
            samples = next(train_batches)
            waited += time.perf_counter() - asked
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(step, config)
            torch.manual_seed(hash((config['seed'], step, processes.rank)))  # sizes and regions are drawn from it
            images = [image.to(device, non_blocking=True).float() / 255 for image, _ in samples]
            targets = [{k: v.to(device, non_blocking=True) for k, v in target.items()} for _, target in samples]
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                losses = wrapped(images, targets)
            optimizer.zero_grad()
            scaler.scale(sum(losses.values())).backward()
            scaler.step(optimizer)
            scaler.update()
            step, counted = step + 1, counted + 1
            sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
            bar.update()
            leave = processes.any(stop)
            save = leave or step % config['save_every'] == 0 or step == iterations
            if save or step % config['log_every'] == 0:
                if not torch.stack(torch._foreach_norm(parameters)).isfinite().all():
                    raise Fail(f'iteration {step}: the weights are not finite; lower lr, raise warmup or set '
                               'precision=fp32' + f'; the last good checkpoint is {checkpoint}' * checkpoint.is_file())
                parts, seconds = {k: global_mean(v / counted) for k, v in sums.items()}, time.perf_counter() - since
                line = {'step': step, 'loss': sum(parts.values()), **parts, 'lr': optimizer.param_groups[0]['lr'],
                        'images_per_second': round(counted * config['batch_size'] / seconds, 1),
                        'data_wait': round(waited / seconds, 4)}
                text = (f"loss {line['loss']:.4f}  lr {line['lr']:.4g}  {line['images_per_second']} images/s  "
                        f"data wait {line['data_wait']:.0%}")
                bar.set_postfix_str(text)
                log.write(f'iteration {step}/{iterations}  {text}' if bar.disable else None, **line)
                waited, sums, counted, since = 0.0, {}, 0, time.perf_counter()
            if save:
                average_running_statistics(model)
                if processes.main:
                    save_checkpoint(checkpoint, {'model': model.state_dict(), 'optimizer': optimizer.state_dict(),
                                                 'scaler': scaler.state_dict(), 'iteration': step, 'config': identity})
                processes.barrier()  # nobody goes on, or leaves, before it is written
    bar.close()
    if leave:
        stop.leave(log, f'saved at iteration {step} of {iterations}; the same command resumes',
                   config['requeue'] and processes.any(stop.name == 'SIGUSR1'))  # SIGTERM may be scancel: not to undo

    parts = [detect(model, test_images, categories, config, processes, dtype, stop)]
    if processes.any(stop):  # all of them leave, and none waits for the detections of one that has left
        stop.leave(log, 'left while the test images were looked at; the same command looks at them again')
    if dist.is_initialized():
        mine, parts = parts[0], [None] * world if processes.main else None
        dist.gather_object(mine, parts)
    if processes.main:
        detections = sorted((found for part in parts for found in part), key=lambda found: found['image_id'])
        found = {name: average_precision(test, detections, kind, dataset['name'] == 'voc')
                 for name, kind in (('box', 'bbox'), ('mask', 'segm'))[:1 + masks]}
        summary = f"{config['checkpoint']} on {dataset['test']}: " + ' | '.join(
            name + ''.join(f'  {k} {part[k]:.2f}' for k in ('AP', 'AP50', 'AP75')) for name, part in found.items())
        save_json(folder / 'detections.json', detections)
        save_json(results, {'summary': summary, **found, 'config': identity})
        curves(folder / 'loss.png', folder / 'log.jsonl', ['loss'],
               ['loss_classifier', 'loss_box_reg', 'loss_mask', 'loss_objectness'])
        log.write(f'{summary} -> {results}', **found)
    log.close()


if __name__ == '__main__':
    run(main, DEFAULTS)
