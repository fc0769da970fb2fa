"""Files: written whole or not at all, and read so that a damaged one is one line."""
import errno
import fcntl
import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from config import Fail


def lock(file, how=None):
    """Lock an open file until it is closed or the process ends, however it ends; raises BlockingIOError while another
    process has it. how: fcntl.flock (default) or .lockf. Returns whether the file system knows locks: Lustre and NFS
    often do not."""
    try:
        (how or fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from None
        return False
    return True


def atomic(path, write, once=False):
    """write(temporary_path), then rename: a reader sees the old file or the new one, never half of one. once: a file
    that is there stays as it is, so that of two processes that make the same one the first counts for both."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{os.uname().nodename}.{os.getpid()}.tmp{path.suffix}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed process with this number; maybe a link to the finished file
        write(temporary)
        with open(temporary, 'rb') as file:
            os.fsync(file.fileno())
        if once:
            with suppress(OSError):  # it is there, or the file system has no links
                os.link(temporary, path)
        if not once or not path.exists():
            os.replace(temporary, path)
    except OSError as error:
        raise Fail(f'{path}: cannot be written: {error.strerror or error}') from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_checkpoint(path, state):
    def write(temporary):
        with open(temporary, 'wb') as file:  # of a path torch.save puts the name into the file: no two would be equal
            try:
                torch.save(state, file)
            except RuntimeError as error:  # from its writer, also where the disk is full
                raise error.__context__ if isinstance(error.__context__, OSError) else error
    atomic(path, write)


def damage(path):
    """What a file that could not be read is by its first bytes, and what mends it: two texts, empty where none show."""
    path, again = Path(path), 'copy or download it again'
    try:
        with open(path, 'rb') as file:
            head, size = file.read(1024), path.stat().st_size
            text, length = head.removeprefix(b'\xef\xbb\xbf').lstrip().lower(), int.from_bytes(head[:8], 'little')
            file.seek(max(0, size - 66_000))  # where a zip archive, as torch.save and np.savez write, has its end
            whole = b'PK\5\6' in file.read()
            file.seek(8)
            entries = json.loads(file.read(length)) if head[8:9] == b'{' and length + 8 <= min(size, 1e8) else {}
            end = 8 + max([length, *(length + e['data_offsets'][1] for e in entries.values() if 'data_offsets' in e)])
    except OSError as error:
        return f'cannot be read ({error.strerror})', again
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # another format's, or nonsense
        end = 0
    if not size:
        return 'is empty', again
    if not head.strip(b'\0'):
        return 'begins with zeros: it was not written to the end', again
    if text.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer, not the file itself', '`git lfs pull` fetches that'
    if text.startswith((b'<!doctype', b'<html', b'<head', b'<?xml')):
        return 'is a web page, not the file itself', again
    if head.startswith(b'PK\3\4') and not whole:
        return 'is cut short', again
    if end and head[8:9] == b'{' and length < 1e8:
        if end > size:
            return 'is cut short', again
        if path.suffix != '.safetensors':
            return 'is in the format of safetensors', 'let its name end in .safetensors'
    if head.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b'\x28\xb5\x2f\xfd')):
        return 'is compressed', 'unpack it first'
    if head[257:262] == b'ustar' and path.suffix != '.tar':
        return 'is a tar archive', 'unpack it first'
    if path.suffix == '.json':
        try:
            return ('', again) if isinstance(json.loads(path.read_bytes()), (dict, list)) else ('is no JSON', again)
        except (OSError, ValueError):
            return 'is no JSON, or cut short', again
    if path.suffix != '.yaml' and not set(head) - set(range(32, 127)) - set(b'\t\r\n'):
        return 'is text', again
    if path.suffix == '.safetensors' and head[8:9] != b'{':
        return 'is not in the format of safetensors', again
    return '', again


def unreadable(path, error, mend=None, what=''):
    """The Fail for a file whose reading ended in `error`. mend: how to get it again, where we know. what: it should be.
    """
    found, usual = damage(path)
    if not found:
        found = f"cannot be read{what and f' as {what}'} ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return Fail(f'{path}: {found}; {mend or usual}')


def load_checkpoint(path, mend=None):
    """A checkpoint on the CPU, unpickled without running code. mend: what the user should do about a damaged one."""
    path = Path(path)
    if not path.is_file():
        raise Fail(f'{path}: no such checkpoint')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            return load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        names = re.findall(r'GLOBAL (\S+)', str(error))
        with suppress(Exception):  # all of them, where the file is of a kind that can be searched
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path) or names
        if names and not damage(path)[0]:
            raise Fail(f"{path}: holds objects of {', '.join(names)}, whose code would have to run to read it: load it "
                       'where you trust it and save its state_dict alone') from None
        raise unreadable(path, error, mend, 'a checkpoint') from None


def weights_checksum(path):
    """Of the bytes of a file, or of all .safetensors below a folder (where there are none: .bin): a number that tells
    other weights."""
    path, found = Path(path), 0
    inside = sorted(path.rglob('*.safetensors')) or sorted(path.rglob('*.bin')) or [path / 'model.safetensors']
    try:
        for file in inside if path.is_dir() else [path]:
            found = zlib.crc32(file.read_bytes(), found)
    except OSError as error:
        raise Fail(f'{file}: ' + ('no such checkpoint' if isinstance(error, FileNotFoundError) else
                                  f'cannot be read: {error.strerror}')) from None
    return found


def checksums(*paths):
    """{path: number} of those that are there: tells whether a file or folder of the same name has another content."""
    return {str(path): weights_checksum(path) for path in paths if path and Path(path).exists()}


def load_json(path, mend=None):
    """The dict that a .json holds."""
    try:
        found = json.loads(Path(path).read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f'holds {type(found).__name__}')
        return found
    except (OSError, ValueError) as error:
        raise unreadable(path, error, mend) from None


def load_arrays(path, mend=None, keys=None, mmap_mode=None):
    """The arrays `keys` of a .npz as a dict, all for (); without keys the one array of a .npy."""
    try:
        found = np.load(path, mmap_mode, allow_pickle=False)
        if isinstance(found, np.ndarray) != (keys is None):
            raise ValueError('holds one array' if keys else 'holds several arrays')
        if keys is None:
            return found
        with found:
            absent = [key for key in keys if key not in found]
            if absent:
                raise ValueError(f"holds no {', '.join(absent)}")
            return {key: found[key] for key in keys or found}
    except Exception as error:  # of numpy, zipfile and pickle
        raise unreadable(path, error, mend) from None


def save_json(path, value, once=False):
    atomic(path, lambda p: p.write_text(json.dumps(value, indent=1) + '\n'), once)
