"""What benchmarks share: the project's modules within reach, options, stages as a user runs them, the hardware's name.

Import it before the project's modules."""
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tiny')]


def options(**defaults):
    """The defaults, changed by what the command line says: key=value, of the default's type."""
    for argument in sys.argv[1:]:
        key, _, value = argument.partition('=')
        if key not in defaults:
            sys.exit(f'unknown option {key!r}; known are {", ".join(defaults)}')
        defaults[key] = type(defaults[key])(value)
    return defaults


def stage(script, *arguments):
    """Run a stage; returns how many seconds it took."""
    print(f"\n=== python {script} {' '.join(arguments)}", flush=True)
    start = time.time()
    if code := subprocess.run([sys.executable, script, *arguments], cwd=ROOT).returncode:
        sys.exit(f'{script} ended with exit code {code}; its message stands above. The same command goes on from here')
    return time.time() - start


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = [line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')] \
        if Path('/proc/cpuinfo').exists() else [platform.processor()]
    return f'{model[0]}, {torch.get_num_threads()} threads'
