"""Imports torchvision without torch's compiler: torchvision's RoIAlign asks that one question, on a GPU under
deterministic algorithms, and importing it takes as long as torch itself. Import this before torchvision; the compiler
then comes with the first question, or with the first optimizer, which needs it too."""
import sys
from importlib import import_module
from types import ModuleType

NAME = 'torch._dynamo.utils'


def later(name):
    """A function of the compiler that imports it when it is called."""
    if name.startswith('__'):
        raise AttributeError(name)
    return lambda *arguments: getattr(import_module(NAME), name)(*arguments)


if 'torchvision' not in sys.modules and NAME not in sys.modules:
    sys.modules[NAME] = stand_in = ModuleType(NAME)
    stand_in.__getattr__ = later
    try:
        import torchvision  # noqa: F401
    finally:
        del sys.modules[NAME]
    assert 'torch._dynamo' not in sys.modules, 'half a compiler: something else in torchvision has imported it'
