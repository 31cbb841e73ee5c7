"`fixmatch_predict`: the learner's own answers, damaged files, and mistakes"

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cli_runs import *  # noqa: F403  fixtures
from cli_runs import exit_code, learner, working_in
from fastai.vision.all import get_image_files, load_learner

from fixmatch_fastai.cli.predict import fixmatch_predict
from fixmatch_fastai.self_training import predictions


@pytest.fixture(scope='module')
def exported(folders, tmp_path_factory):
    "A learner that knows nothing, beside weights alone"
    file = tmp_path_factory.mktemp('exported') / 'learner.pkl'
    with working_in(folders):
        learner().export(file)
    file.with_name('weights.safetensors').touch()
    return file


def predict(learner, *args):
    return exit_code(fixmatch_predict, '--learner', learner, '--workers', 0, *args)


def test_predictions_are_the_learners_own(exported, there, tmp_path, capsys):
    assert predict(exported, 'new', '--out', tmp_path / 'p.csv', '--bs', 4, '--topk', 9) == 0
    df = pd.read_csv(tmp_path / 'p.csv', dtype={'predicted': str})
    learn = load_learner(exported)
    files = get_image_files('new').sorted()
    assert df.file.tolist() == [str(o) for o in files] and df.columns[-1] == 'error'
    bad = df.error.notna()
    assert df.file[bad].tolist() == ['new/cut_short.png'] and df.predicted[bad].isna().all()
    assert "1 of 7 files can't be opened, such as new/cut_short.png" in capsys.readouterr().err
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl([o for o in files if o.name != 'cut_short.png']))[0]
    for k, name in enumerate(('', '_2', '_3')):
        np.testing.assert_allclose(df[f'confidence{name}'][~bad], probs.sort(descending=True).values[:, k], atol=1e-5)
    assert df.predicted[~bad].tolist() == [learn.dls.vocab[i] for i in probs.argmax(1)]


def probs_of(learn, files, tta):
    return torch.stack([o for _, o, _ in predictions(learn, files, tta=tta, bs=4)])


def test_predictions_of_views_are_blended(exported, there):
    learn = load_learner(exported)
    files = [o for o in get_image_files('new').sorted() if o.name != 'cut_short.png']
    plain, views = (probs_of(learn, files, o) for o in (False, True))
    assert (plain - views).abs().max() > 1e-5
    torch.testing.assert_close(views.sum(1), torch.ones(len(files)))


def test_views_that_are_the_image_itself_change_nothing(make_learner, there):
    learn = make_learner()
    files = [o for o in get_image_files('new').sorted() if o.name != 'cut_short.png']
    torch.testing.assert_close(probs_of(learn, files, True), probs_of(learn, files, False), atol=1e-5, rtol=0)


def test_only_damaged_files_are_exit_code_1(exported, there, tmp_path):
    assert predict(exported, 'new/cut_short.png', 'gone.png', '--out', tmp_path / 'p.csv') == 1
    df = pd.read_csv(tmp_path / 'p.csv')
    assert df.error.str.contains('FileNotFoundError').tolist() == [False, True]


@pytest.mark.parametrize(
    'learner,args,text',
    [
        ('gone.pkl', ['new'], 'is not there'),
        ('file', ['new'], "can't be loaded"),
        ('learner.pkl', ['empty'], 'holds no images'),
        ('learner.pkl', ['new', 'nowhere'], 'nowhere is not there'),
        ('learner.pkl', ['gone.png'], 'gone.png is not there'),
        ('weights.safetensors', ['new'], 'holds weights alone'),
        ('learner.pkl', ['new', '--out', 'empty'], 'is a folder'),
        ('learner.pkl', ['new', '--topk', 0], '--topk must be'),
    ],
)
def test_a_mistake_in_predict_is_one_sentence(learner, args, text, exported, there, capsys):
    file = exported.with_name(learner)
    assert predict(file if file.exists() else learner, *args) == 2
    err = capsys.readouterr().err.strip()
    assert text in err and err.startswith('fixmatch_predict: ') and '\n' not in err
    assert not Path('predictions.csv').exists()
