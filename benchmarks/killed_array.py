"""Stages 1 and 2 as Slurm arrays whose tasks are killed (SIGKILL) at random moments and started again until they end by
themselves, against one undisturbed process: the results must be the same to the byte.

    python benchmarks/killed_array.py                 10,000 images of CIFAR-10, four tasks, one after the other

The tasks are processes of this machine with the variables that Slurm sets; parallel=2 runs two at once. A task is
killed 0 to `seconds` seconds after its start, a tenth later each time, so that it ends on a slow machine too. The last
line is one JSON object; exit code 1 if anything differs.
"""
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import bench
from bench import ROOT

RESULTS = {'fg_proportion': ('fg_proportion.npz', 'embeddings.npy'), 'gen_views': ('views/[0-9]*.tar', 'pairs.beton')}
options = bench.options(images=10_000, tasks=4, parallel=1, seconds=40.0, seed=0, root='data/cifar10',
                        output='runs/killed_array')
output, chunk = ROOT / options['output'], max(1, options['images'] // 100)


def start(stage, folder, **slurm):
    """A process of stage 1 or 2 with the embedded models; results go to folder/stage, what it says to stage.log."""
    chunks = {'fg_proportion': [f'chunk={chunk}'],
              'gen_views': [f'chunk_size={chunk}', f'batch_size={chunk}', f'proportions={folder}/fg_proportion']}
    command = [sys.executable, f'{stage}.py', f'yamls/{stage}/effect.yaml', f'output={folder}/{stage}', *chunks[stage],
               f"dataset.subset={options['images']}", f"dataset.root={options['root']}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith('SLURM_')} | slurm
    with open(folder / f'{stage}.log', 'a') as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def undisturbed(stage, folder):
    if start(stage, folder).wait():
        sys.exit(f'{stage} failed; see {folder}/{stage}.log')


def disturbed(stage, folder, task):
    """One task of the array until it ends by itself. Returns how often it was killed, or None where it failed."""
    moments, kills = random.Random(f"{options['seed']} {stage} {task}"), 0
    slurm = dict(SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_COUNT=str(options['tasks']),
                 SLURM_ARRAY_TASK_MIN='0', SLURM_ARRAY_TASK_MAX=str(options['tasks'] - 1))
    while True:
        job = start(stage, folder, **slurm)
        try:
            return None if job.wait(moments.uniform(0, options['seconds'] * 1.1 ** kills)) else kills
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            kills += 1


def differences(stage, one, other):
    """Names of the result files that are not the same to the byte in both folders, and how many there are."""
    names = {str(file.relative_to(folder / stage)) for folder in (one, other)
             for pattern in RESULTS[stage] for file in (folder / stage).glob(pattern)}
    same = [(one / stage / name).is_file() and (other / stage / name).is_file() and
            (one / stage / name).read_bytes() == (other / stage / name).read_bytes() for name in sorted(names)]
    return [name for name, equal in zip(sorted(names), same) if not equal], len(names)


if __name__ == '__main__':
    shutil.rmtree(output, ignore_errors=True)
    single, array = output / 'single', output / 'array'
    kills, different, files = {}, [], 0
    for folder in (single, array):
        folder.mkdir(parents=True)
    for stage in RESULTS:
        begin = time.perf_counter()
        undisturbed(stage, single)
        print(f'{stage}: undisturbed {time.perf_counter() - begin:.0f} s', flush=True)
        begin = time.perf_counter()
        with ThreadPoolExecutor(options['parallel']) as pool:
            counts = list(pool.map(lambda task: disturbed(stage, array, task), range(options['tasks'])))
        if None in counts:
            sys.exit(f'{stage}: task {counts.index(None)} failed; see {array}/{stage}.log')
        names, count = differences(stage, single, array)
        kills[stage], different, files = sum(counts), different + names, files + count
        print(f'{stage}: {options["tasks"]} tasks, killed {" + ".join(map(str, counts))} times, '
              f'{time.perf_counter() - begin:.0f} s; {count - len(names)} of {count} files are the same', flush=True)
    there = (array / 'gen_views/pairs.beton').is_file()
    print(json.dumps({**options, 'kills': kills, 'files': files, 'different': different[:10],
                      'identical': there and not different}))
    sys.exit(not (there and not different))
