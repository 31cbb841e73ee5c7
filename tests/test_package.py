"The package as a whole"

import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

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


def test_rooms_know_only_what_they_may():
    ours = [f'fixmatch_fastai.{o}' for o in ('augment', 'data', 'policy', 'callback', 'record', 'cli')]
    assert imported('fixmatch_fastai.augment', 'fastai', *ours[1:]) == '[]'
    assert imported('fixmatch_fastai.policy', 'fastai', *(o for o in ours if 'policy' not in o)) == '[]'
    assert imported('fixmatch_fastai.data', *ours[2:]) == '[]'
    assert imported('fixmatch_fastai.callback', ours[0], ours[1], ours[5], 'accelerate', 'nbdev') == '[]'
    assert imported('fixmatch_fastai.all', 'accelerate', 'nbdev', 'fastai.distributed') == '[]'
