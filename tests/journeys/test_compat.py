"The tool that runs the tests with other versions notices when it does not"

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / 'tools'))
import compat  # noqa: E402

PINS = {'fastai': '2.8.7', 'plum-dispatch': '2.5.8'}


def found(imported='2.8.7', installed='2.8.7', package=ROOT / 'fixmatch_fastai/__init__.py', unmet=()):
    return dict(imported={'fastai': imported}, installed={'fastai': installed, 'plum-dispatch': '2.5.8'}, package=str(package), unmet=list(unmet))


def test_check():
    assert list(compat.check('kaggle', PINS, found())) == []
    assert list(compat.check('kaggle', PINS, found(imported='2.8.12'))) == ['kaggle should have fastai 2.8.7, but imports 2.8.12.']
    assert list(compat.check('kaggle', PINS, found(unmet=['timm needs torch, but there is None']))) == ['kaggle: timm needs torch, but there is None.']
    (wrong,) = compat.check('kaggle', PINS, found(package='/elsewhere/fixmatch_fastai/__init__.py'))
    assert 'not the package beside it' in wrong


def test_look_tells_what_is_imported():
    import fastai

    here = compat.look(sys.executable, ['fastai', 'timm'])
    assert here['imported']['fastai'] == fastai.__version__ and here['unmet'] == []
    assert f'fastai {fastai.__version__}' in compat.said(here)


def test_unknown_environment():
    with pytest.raises(SystemExit, match='no environment nowhere: use kaggle or colab'):
        compat.main(['nowhere', '--', '-x'])
