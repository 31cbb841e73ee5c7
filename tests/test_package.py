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
    assert {'FixMatch', 'FixMatchTransform', 'split_labeled', 'FixedThreshold', 'Policy', 'PseudoLabels', 'SemiBatch'} <= set(public.__all__)


def test_version():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    assert fixmatch_fastai.__version__ == ini['DEFAULT']['version']


def imported(module, *names):
    "Which of `names` are loaded after importing `module` in a new process"
    code = f'import sys, {module}; print([n for n in {names!r} if n in sys.modules])'
    res = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert res.returncode == 0, res.stderr
    return res.stdout.strip()


ROOMS = {'core', 'batch', 'show', 'augment', 'data', 'policy', 'uncertainty', 'callback', 'record', 'ema', 'recipe', 'checkpoint', 'check', 'interpret',
         'self_training', 'meta_pseudo_labels', 'warm_start', 'experiment', 'cli'}  # fmt: skip
KNOWS = dict(
    core=[], augment=[], data=['core', 'augment'], policy=[], uncertainty=['policy'], batch=['core', 'policy'],
    callback=['core', 'batch', 'policy', 'record'], record=['core', 'policy'], show=['core', 'batch', 'callback', 'policy', 'record'],
    ema=[], recipe=['core', 'batch', 'callback', 'policy', 'record', 'show', 'ema'],
    checkpoint=['core', 'batch', 'callback', 'policy', 'record', 'ema'],
    check=['core', 'augment', 'data', 'policy', 'batch', 'callback', 'record', 'ema', 'checkpoint'],
    interpret=['core', 'augment', 'data', 'policy', 'uncertainty', 'batch', 'callback', 'record', 'show'],
    self_training=['core', 'augment', 'data', 'policy', 'uncertainty', 'batch', 'callback', 'record', 'show', 'checkpoint', 'ema', 'recipe', 'check'],
    meta_pseudo_labels=['core', 'batch', 'callback', 'policy', 'record'], warm_start=['core', 'augment', 'data'],
    experiment=['core', 'augment', 'data', 'policy', 'uncertainty', 'batch', 'callback', 'record', 'show', 'ema', 'recipe', 'checkpoint', 'check', 'interpret'],
)  # fmt: skip


@pytest.mark.parametrize('room', KNOWS)
def test_a_room_knows_only_what_it_may(room):
    others = [f'fixmatch_fastai.{o}' for o in sorted(ROOMS - {room, *KNOWS[room]})]
    assert imported(f'fixmatch_fastai.{room}', *others, *['fastai'] * (room in ('augment', 'policy', 'uncertainty')), 'accelerate', 'nbdev') == '[]'


def test_the_package_loads_no_more_than_it_needs():
    assert imported('fixmatch_fastai.all', 'accelerate', 'nbdev', 'fastai.distributed', 'mlflow', 'omegaconf', 'tensorboard') == '[]'
