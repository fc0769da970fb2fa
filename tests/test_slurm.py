"""The Slurm templates, with srun and scontrol replaced by scripts that do what those would do on this machine."""
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = sorted((ROOT / 'slurm').glob('*.sbatch'))
SLURM = {'SLURM_JOB_ID': '123456', 'SLURM_NNODES': '2', 'SLURM_JOB_NODELIST': 'node[07-08]'}


@pytest.fixture
def cluster(tmp_path):
    """submit(template, *arguments, **environment): what the batch script prints, srun's arguments one a line."""
    for name, script in {'srun': 'printf "%s\\n" "$@"', 'scontrol': '[ "$*" = "show hostnames node[07-08]" ] && printf '
                         '"node07\\nnode08\\n"'}.items():
        (tmp_path / name).write_text(f'#!/bin/bash\n{script}\n')
        (tmp_path / name).chmod(0o755)

    def submit(template, *arguments):
        return subprocess.run(['bash', ROOT / 'slurm' / template, *arguments], cwd=tmp_path, text=True, check=True,
                              env={**os.environ, **SLURM, 'PATH': f"{tmp_path}:{os.environ['PATH']}"},
                              capture_output=True).stdout.splitlines()
    return submit


@pytest.mark.parametrize('path', TEMPLATES, ids=lambda path: path.name)
def test_template_is_valid(path):
    assert subprocess.run(['bash', '-n', path], capture_output=True).returncode == 0
    lines = path.read_text().splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith('#SBATCH')]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith('#')]
    assert lines[0].startswith('#!') and options and max(options) < min(commands)  # Slurm reads no further


@pytest.mark.parametrize('stage', ['fg_proportion', 'gen_views'])
def test_array_task_hands_its_arguments_on(cluster, stage):
    arguments = cluster(f'{stage}.sbatch', 'a file.yaml', 'seed=1')
    assert arguments == ['python', f'{stage}.py', 'device=cuda', 'a file.yaml', 'seed=1']
    assert (ROOT / f'{stage}.py').is_file()


def test_pretraining_on_two_nodes_as_torchrun_reads_it(cluster):
    from torch.distributed.run import get_args_parser
    torchrun, *arguments = cluster('pretrain.sbatch', 'a.yaml', 'seed=1')
    read = get_args_parser().parse_args(arguments)
    assert torchrun == 'torchrun' and (read.nnodes, read.nproc_per_node, read.rdzv_backend) == ('2', 'gpu', 'c10d')
    assert (read.rdzv_endpoint, read.rdzv_id, read.shutdown_timeout) == ('node07:23456', '123456', 120)
    assert 'SIGUSR1' in read.signals_to_handle.split(',') and 'SIGTERM' in read.signals_to_handle.split(',')
    assert [read.training_script, *read.training_script_args] == ['pretrain.py', 'a.yaml', 'seed=1', 'requeue=true']
