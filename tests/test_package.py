"The package as a whole"

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


def imported(module, *names):
    "Which of `names` are loaded after importing `module` in a new process"
    code = f'import sys, {module}; print([n for n in {names!r} if n in sys.modules])'
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert res.returncode == 0, res.stderr
    return res.stdout.strip()


# a room may load these, and what they may load
KNOWS = {
    'core': [],
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
    'experiment': ['recipe', 'check', 'interpret'],
}
WITHOUT_FASTAI = {'augment', 'policy', 'uncertainty'}


def may_load(room):
    return {room}.union(*map(may_load, KNOWS[room]))


@pytest.mark.slow
@pytest.mark.parametrize('room', KNOWS)
def test_a_room_loads_only_what_it_may(room):
    never = [f'fixmatch_fastai.{o}' for o in sorted({*KNOWS, 'cli'} - may_load(room))] + ['accelerate', 'nbdev']
    if room in WITHOUT_FASTAI:
        never.append('fastai')
    assert imported(f'fixmatch_fastai.{room}', *never) == '[]'


@pytest.mark.slow
def test_the_package_loads_no_more_than_it_needs():
    heavy = ['accelerate', 'nbdev', 'fastai.distributed', 'mlflow', 'omegaconf', 'tensorboard']
    assert imported('fixmatch_fastai.all', *heavy) == '[]'
