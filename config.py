"""What a config may hold: the YAML of an experiment on top of a script's defaults, read strictly, and its checks."""
import copy
import difflib
import functools
import os
import re
import reprlib
import sys
from pathlib import Path

import yaml


class Fail(Exception):
    """A problem the user can mend: printed as one line (what, where, how), exit code 2."""

    def __init__(self, problem):
        super().__init__(' '.join(str(problem).splitlines()))  # names and texts of others may hold line breaks


# ---------------------------------------------------------------------------------------------------
# Config: a YAML block of defaults in the script, an experiment's YAML on top, key.sub=value on top of that

_shown = reprlib.Repr()  # for error lines: no value is too large for one, and none too deep
_shown.maxstring, _shown.maxother, _shown.maxlevel = 120, 120, 2


class _Loader(yaml.SafeLoader):
    """safe_load of what a config may hold: keys are words, each written once, 1e-4 is a number (YAML 1.1 wants 1.0e-4),
    010 is 10 (there 8), and dates, 0x10, 1_000, 1:30 and .nan are texts."""

    yaml_implicit_resolvers = {
        first: [(tag, expression) for tag, expression in pairs if tag.endswith(('bool', 'null', 'merge'))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()}

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            line = f'line {key.start_mark.line + 1}'
            if not isinstance(key, yaml.ScalarNode):
                raise Fail(f'{line}: a key must be a word')
            if key.value in seen:
                raise Fail(f"{line}: key '{key.value}' stands twice")
            seen.add(key.value)
        return node

    def flatten_mapping(self, node):
        super().flatten_mapping(node)
        node.value = list({key.value: (key, value) for key, value in node.value}.values())  # '<<' of '<<' would swell


for _kind, _digits in (('int', r'[0-9]+$'), ('float', r'([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$')):
    _Loader.add_implicit_resolver(f'tag:yaml.org,2002:{_kind}', re.compile('[-+]?' + _digits), list('-+0123456789.'))
_Loader.add_constructor('tag:yaml.org,2002:int', lambda loader, node: int(loader.construct_scalar(node)))


class _DefaultsLoader(_Loader):
    """`!int null`: null or what the tag says (!texts: a text or a list). The value of such a key becomes the types."""


class _Each(dict):
    """`!each {...}`: the user chooses the keys; under each of them stand these."""

    def get(self, key, otherwise=None):
        return dict(self)


_DefaultsLoader.add_constructor('!each', lambda loader, node: _Each(loader.construct_mapping(node, deep=True)))
for _tag, _types in (('text', str), ('int', int), ('float', float), ('bool', bool), ('texts', (str, list))):
    _DefaultsLoader.add_constructor(f'!{_tag}', lambda loader, node, types=_types: types)


def _read_yaml(text, where, loader=_Loader):
    try:
        return yaml.load(text, loader)  # a SafeLoader
    except Fail as error:
        raise Fail(f'{where}: {error}') from None
    except Exception as error:  # PyYAML raises nearly everything: `!!bool x` is a KeyError, deep nesting ends the stack
        mark = getattr(error, 'problem_mark', None)
        raise Fail(f"{where}{f', line {mark.line + 1}' if mark else ''}: not valid YAML: "
                   f"{getattr(error, 'problem', None) or str(error) or repr(error)}") from None


def _null_types(value):
    """Of a default that is null: what may stand in its place."""
    return value if isinstance(value, tuple) else (value,) if isinstance(value, type) else ()


def default_config(defaults):
    """The config that the defaults (YAML text) alone give."""
    return copy.deepcopy(_without_types(_read_defaults(defaults)))


@functools.cache
def _read_defaults(defaults):
    return _read_yaml(defaults, 'defaults', _DefaultsLoader)


def _without_types(value):
    return None if _null_types(value) else {} if isinstance(value, _Each) else \
        {k: _without_types(v) for k, v in value.items()} if isinstance(value, dict) else value


def _plain(value, problem, depth=0):
    """A value with $NAME and ~ expanded. problem(text): the Fail for what no key of any stage can hold."""
    if isinstance(value, list) and depth < 2 and len(value) <= 1000:
        return [_plain(entry, problem, depth + 1) for entry in value]
    if isinstance(value, str):
        for name in re.findall(r'\$(\w+|\{\w+\})', value):
            if name.strip('{}') not in os.environ:
                raise problem(f'names ${name}, which is not set in the environment')
        value = os.path.expanduser(os.path.expandvars(value))
        if value.startswith('~'):
            raise problem('begins with the name of a user who is not there')
        if re.search(r'[\0-\x1f\ud800-\udfff]', value):
            raise problem('holds a character that no name has (a control character, or what is not UTF-8)')
        if max(len(part.encode()) for part in value.split('/')) > 255 or len(value.encode()) > 4000:
            raise problem('is longer than a name can be (255 bytes)')
    elif isinstance(value, (int, float)):
        if not abs(value) < 2 ** 63:  # so with nan
            raise problem('must be finite and have at most 18 digits')
    elif value is not None:
        raise problem('must hold one value, or a list of values')
    return value


def _fits(default, value):
    if default is None:
        return True
    for kind in _null_types(default) or (type(default),):
        if isinstance(value, (int, float) if kind is float else kind) and (kind is bool) == isinstance(value, bool):
            return True
    return value is None and bool(_null_types(default))


def check_keys(given, known, where, prefix=''):
    """Raises Fail unless `given` is a dict with keys of `known` alone. prefix: what they stand under ('moco.')."""
    if not isinstance(given, dict):
        raise Fail(f"{where}: expected the keys {', '.join(known)}, not {_shown.repr(given)}")
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key)[:100], [str(k) for k in known], 1, 0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(map(str, known))}"
            raise Fail(f"{where}: unknown key '{prefix}{str(key)[:100]}'; {hint}")


def _merge(config, defaults, changes, where, prefix='', nullable=()):
    """Write `changes` over `config`. In `defaults` every allowed key stands with a value of its type, or the types of
    one that is null (null itself: any)."""
    if isinstance(defaults, _Each):
        if not changes:  # {}: none of those that a file named before
            config.clear()
        changes = {str(key): value for key, value in changes.items()}
        for key in changes:
            config.setdefault(key, _without_types(dict(defaults)))
        defaults = dict.fromkeys(changes, dict(defaults))
    check_keys(changes, defaults, where, prefix)
    for key, value in changes.items():
        name, default = f'{prefix}{key}', defaults[key]
        types = _null_types(default)

        def problem(text):
            return Fail(f"{where}: '{name}' {text}: {_shown.repr(value)}")
        if isinstance(default, dict) and default:
            if not isinstance(value, dict):
                names = f"names, and under each {', '.join(default)}" if isinstance(default, _Each) else \
                    f"keys ({', '.join(default)})"
                raise problem(f'must hold {names}')
            _merge(config[key], default, value, where, f'{name}.', nullable)
            continue
        value = _plain(value, problem)
        if not _fits(default, value) and not (value is None and name in nullable):
            kind = ' or '.join(t.__name__ for t in types) + ' or null' if types else \
                f'{type(default).__name__} (like {default!r})'
            text = str in (*types, type(default)) and isinstance(value, (int, float))
            raise Fail(f"{where}: '{name}' must be {kind}, not {_shown.repr(value)}" + '; put it in quotes' * text)
        number = (isinstance(default, float) or float in types) and value is not None
        config[key] = float(value) if number else value


def _at_command_line(text, default, argument):
    """The value of key=text. Where a text is due it is the text as it stands, without YAML's comments and dates."""
    types = _null_types(default)
    if types and text in ('', 'null', '~'):
        return None
    if isinstance(default, str) or types[:1] == (str,) and not (list in types and text.startswith('[')):
        return text
    return _read_yaml(text, argument)  # nothing after = is null


def load_config(defaults, argv, nullable=()):
    """Defaults (YAML text) <- experiment file <- 'key.sub=value' (the other arguments).

    Keys of `nullable` may be set to null though their default is not; what keys that are null may hold instead stands
    in the defaults as a tag. In texts ~ and $NAME are expanded. Returns a nested dict."""
    config, defaults = default_config(defaults), _read_defaults(defaults)
    changes = [a for a in argv if '=' in a and '/' not in a.partition('=')[0] and not os.path.isfile(a)]
    files = [a for a in argv if a not in changes]
    if len(files) != 1:
        raise Fail(f"usage: python {Path(sys.argv[0]).name} EXPERIMENT.yaml [key.sub=value ...]")
    path, = files
    try:
        if os.path.exists(path) and not os.path.isdir(path) and (
                not os.path.isfile(path) or os.path.getsize(path) > 1_000_000):  # a pipe, a device, a beton
            raise Fail(f'{path}: is not an experiment file')
        text = Path(path).read_bytes()
        found = _read_yaml(text.decode('utf-8-sig'), path)
    except (FileNotFoundError, NotADirectoryError):
        near = [str(p) for p in sorted(Path('yamls').rglob('*.yaml')) if p.parent.name == Path(sys.argv[0]).stem]
        raise Fail(f"{path}: no such file{'; there are ' + ', '.join(near[:6]) if near else ''}") from None
    except UnicodeDecodeError as error:
        raise Fail(f'{path}: is not UTF-8 (byte {error.start}): save it as UTF-8') from None
    except IsADirectoryError:
        raise Fail(f'{path}: is a folder; name a YAML file in it') from None
    except (OSError, ValueError) as error:
        raise Fail(f'{path}: cannot be read: {getattr(error, "strerror", None) or error}') from None
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise Fail(f'{path}: must hold keys and values, not {type(found).__name__}')
    _merge(config, defaults, found, path, nullable=nullable)
    for argument in changes:
        name, text = argument.split('=', 1)
        default = defaults
        for key in name.split('.'):
            default = default.get(key) if isinstance(default, dict) else None
        change = _at_command_line(text, default, argument)
        for key in reversed(name.split('.')):
            change = {key: change}
        _merge(config, defaults, change, 'command line', nullable=nullable)
    return config


def flat(config, prefix=''):
    """Nested dict -> {'key.sub': value}."""
    parts = [flat(v, f'{prefix}{k}.') if isinstance(v, dict) else {f'{prefix}{k}': v} for k, v in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def few(names):
    """The first of many names, for a line."""
    return ', '.join(names[:5]) + ', ...' * (len(names) > 5)


def check_values(config, allowed):
    """Raises Fail where a value is none of those that a stage can work with; what may be null, may.

    allowed: {dotted key, or the last part of several: rule}, a rule being what must be named ('file'; of a list each),
    (lowest, highest) of a number or of each in a list, whole where lowest is, or a list of the values that there are"""
    for key, value in flat(config).items():
        rule = allowed.get(key, allowed.get(key.rpartition('.')[2]))
        if isinstance(rule, str):
            names = value if isinstance(value, list) and value else [value]
            if not all(isinstance(name, str) and name for name in names):
                raise Fail(f'{key}: must name a {rule} ({key}=...)')
        elif isinstance(rule, tuple):
            for number in value if isinstance(value, list) else [value] if value is not None else []:
                kinds = (int,) if isinstance(rule[0], int) else (int, float)
                if type(number) not in kinds or not rule[0] <= number <= rule[1]:
                    raise Fail(f"{key}: {_shown.repr(number)} must be a {'whole ' * (kinds == (int,))}number from "
                               f'{rule[0]} to {rule[1]}')
        elif rule and value is not None and value not in rule:
            near = difflib.get_close_matches(str(value), map(str, rule), 1, 0.7)
            raise Fail(f"{key}: {_shown.repr(value)} is none of {', '.join(map(str, rule))}"
                       + ''.join(f"; did you mean '{name}'?" for name in near))


def run_folder(output):
    """The folder that a stage writes into, as a Path. Raises Fail where it cannot be made or written into; nothing is
    made yet. (One that is full may be read alone: it may hold the finished result.)"""
    folder = Path(output)
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not place.is_dir():
        raise Fail(f'output: {place} is a file, or a link to nowhere, where {folder} is to be a folder; set another '
                   'output=')
    if not os.access(place, os.W_OK | os.X_OK) and not os.path.isfile(folder / 'config.yaml'):
        raise Fail(f'output: {folder}: {place} cannot be written into (read-only, or of another user); set another '
                   'output=')
    return folder


def changed_keys(old, new, ignore=(), prefix=''):
    """Dotted names of the keys in which two configs differ, with both values; `ignore` may differ."""
    found = []
    for key in {**old, **new}:
        name, b = f'{prefix}{key}', new.get(key)
        a = old.get(key, {} if isinstance(b, dict) else None)  # an earlier version lacks the block: null
        if name in ignore or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed_keys(a, b, ignore, f'{name}.')
        else:
            found.append(f'{name} (was {a!r}, now {b!r})')
    return found
