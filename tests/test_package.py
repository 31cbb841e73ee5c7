"The package as a whole"

import ast
import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import fixmatch_fastai
import fixmatch_fastai.all as public

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'fixmatch_fastai'


def test_public_names():
    for name in public.__all__:
        assert getattr(public, name).__doc__, f'{name} has no docstring'
    names = {'FixMatch', 'FixMatchTransform', 'split_labeled', 'FixedThreshold', 'Policy', 'PseudoLabels', 'SemiBatch'}
    assert names <= set(public.__all__)


def test_version_is_that_of_the_settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    assert fixmatch_fastai.__version__ == ini['DEFAULT']['version']


# what each room, or the rooms of each package, may import
KNOWS = {
    'core': '',
    'around': '',
    'console': 'around',
    'augment': '',
    'policy': '',
    'ema': 'core policy',
    'pipeline': 'core augment opening',
    'opening': '',
    'items': '',
    'truth': 'core items',
    'labeled': 'augment items opening',
    'data': 'core around augment items pipeline labeled truth',
    'uncertainty': 'policy',
    'batch': 'core policy',
    'record': 'core policy',
    'callback': 'core around policy batch record',
    'show': 'core policy batch record callback',
    'recipe': 'core policy callback show ema',
    'weights': 'core',
    'checkpoint': 'core around record callback ema',
    'class_folders': '',
    'kinds': '',
    'duplicates': 'core data opening pipeline kinds',
    'rehearsal': 'core policy batch callback checkpoint',
    'findings': '',
    'inspection': 'core console data batch callback class_folders kinds duplicates findings rehearsal',
    'check': 'core opening batch callback class_folders duplicates findings inspection rehearsal',
    'interpret': 'core around augment items opening data policy uncertainty batch record callback show recipe',
    'self_training': 'core around augment items opening labeled data policy uncertainty batch record callback recipe '
    'rehearsal',
    'experiment': 'core around console augment opening labeled data policy uncertainty callback ema recipe checkpoint '
    'class_folders check interpret',
    'cli': 'core around console augment opening labeled data callback ema recipe checkpoint weights class_folders '
    'duplicates findings check interpret self_training experiment',
}


def rooms_imported(file):
    "Rooms and packages that a module imports, at its top or in a function"
    folder = file.relative_to(PACKAGE.parent).parent.parts
    for o in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(o, ast.ImportFrom):
            path = [*folder[: len(folder) - o.level + 1]] if o.level else []
            path += o.module.split('.') if o.module else []
            if path == ['fixmatch_fastai']:
                yield from (name.name for name in o.names if name.name != '__version__')
            elif path[0] == 'fixmatch_fastai':
                yield path[1]


def test_a_room_imports_only_what_it_may():
    found = {}
    for file in PACKAGE.rglob('*.py'):
        room = file.relative_to(PACKAGE).parts[0].removesuffix('.py')
        if room not in ('__init__', '_modidx', 'all'):
            found.setdefault(room, set()).update(rooms_imported(file))
    assert found.keys() == KNOWS.keys()
    for room, names in found.items():
        assert names <= {room, *KNOWS[room].split()}, room


LOADED = """
import json, sys
from importlib import import_module

loaded = {}
for module in sys.argv[1:]:
    import_module(f'fixmatch_fastai.{module}')
    loaded[module] = list(sys.modules)
print(json.dumps(loaded))
"""


@pytest.mark.slow
def test_the_package_loads_no_more_than_it_needs():
    light, heavy = ['console', 'experiment.config'], ['augment', 'policy', 'uncertainty', 'all']
    python = [sys.executable, '-W', 'ignore', '-c', LOADED, *light, *heavy]
    res = subprocess.run(python, capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stderr
    loaded = json.loads(res.stdout)  # after each
    assert not {'torch', 'pandas', 'matplotlib'} & set(loaded['experiment.config'])
    assert 'fastai' not in loaded['uncertainty']
    assert not {'accelerate', 'nbdev', 'fastai.distributed', 'mlflow', 'tensorboard'} & set(loaded['all'])
