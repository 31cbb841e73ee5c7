"The package as a whole"

import json
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

import fixmatch_fastai
import fixmatch_fastai.all as public

ROOT = Path(__file__).parent.parent


def test_public_names():
    for name in public.__all__:
        assert getattr(public, name).__doc__, f'{name} has no docstring'
    names = {'FixMatch', 'FixMatchTransform', 'split_labeled', 'FixedThreshold', 'Policy', 'PseudoLabels', 'SemiBatch'}
    assert names <= set(public.__all__)


def test_version_is_that_of_the_settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    assert fixmatch_fastai.__version__ == ini['DEFAULT']['version']


LOADED = """
import json, sys
from importlib import import_module

loaded = {}
for module in sys.argv[1:]:
    for name in [o for o in sys.modules if o.startswith('fixmatch_fastai')]:
        del sys.modules[name]
    import_module(f'fixmatch_fastai.{module}')
    loaded[module] = list(sys.modules)
print(json.dumps(loaded))
"""


def loaded_with(*modules):
    "What is loaded after each module of the package is imported, one after another in a new process"
    python = [sys.executable, '-W', 'ignore', '-c', LOADED, *modules]
    res = subprocess.run(python, capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stderr
    return json.loads(res.stdout)


# a room may load these, and what they may load
KNOWS = {
    'core': [],
    'console': [],
    'augment': [],
    'policy': [],
    'ema': [],
    'data': ['core', 'augment'],
    'uncertainty': ['policy'],
    'batch': ['core', 'policy'],
    'record': ['core', 'policy'],
    'callback': ['batch', 'record'],
    'show': ['callback'],
    'recipe': ['show', 'ema'],
    'checkpoint': ['callback', 'ema'],
    'check': ['data', 'checkpoint'],
    'interpret': ['data', 'uncertainty', 'show'],
    'self_training': ['uncertainty', 'recipe', 'check'],
    'meta_pseudo_labels': ['callback'],
    'warm_start': ['data'],
    'experiment': ['console', 'recipe', 'check', 'interpret'],
}
WITHOUT_FASTAI = ['augment', 'policy', 'uncertainty']


def may_load(room):
    return {room}.union(*map(may_load, KNOWS[room]))


@pytest.mark.slow
def test_a_room_loads_only_what_it_may():
    loaded = loaded_with(*WITHOUT_FASTAI, *(o for o in KNOWS if o not in WITHOUT_FASTAI))
    for room, names in loaded.items():
        rooms = {o.split('.')[1] for o in names if o.startswith('fixmatch_fastai.')}
        assert rooms <= may_load(room), room
        assert not {'accelerate', 'nbdev'} & set(names), room
        assert 'fastai' not in names or room not in WITHOUT_FASTAI, room


@pytest.mark.slow
def test_the_package_loads_no_more_than_it_needs():
    heavy = {'accelerate', 'nbdev', 'fastai.distributed', 'mlflow', 'omegaconf', 'tensorboard'}
    assert not heavy & set(loaded_with('all')['all'])
