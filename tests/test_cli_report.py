"What a run writes: its files agree with the learner, and its report is one whole page that says what was measured"

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cli_runs import *  # noqa: F403  fixtures
from cli_runs import ODD, Page, learner, options
from fastai.vision.all import load_learner
from safetensors.torch import load_file

from fixmatch_fastai.cli.folders import find_images, flat
from fixmatch_fastai.recipe import probe

TABLES = 'history.csv supervised_history.csv pseudo_labels.csv to_label.csv'.split()
PICTURES = 'training.png pseudo_labels.png acceptance.png confusion.png'.split()
WRITTEN = {'learner.pkl', 'weights.safetensors', 'report.html', *TABLES, *PICTURES}


def all_is_written(folder):
    assert {o.name for o in folder.iterdir() if o.is_file()} == WRITTEN
    assert not list(folder.rglob('*.tmp'))


@pytest.mark.slow
def test_everything_is_written(run):
    all_is_written(run)


@pytest.mark.slow
def test_everything_of_a_tuned_run_is_written(tuned):
    all_is_written(tuned[0])


@pytest.mark.slow
def test_tables_agree_with_the_learner(run, there):
    df = pd.read_csv(run / 'pseudo_labels.csv')
    learn = load_learner(run / 'learner.pkl')
    assert list(learn.dls.vocab) == sorted(['1', '2', ODD])
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl([Path(o) for o in df['item']]))[0]
    assert len(df) == 24 and not df['item'].str.contains('damaged').any()
    assert df.predicted.tolist() == [learn.dls.vocab[i] for i in probs.argmax(1)]
    np.testing.assert_allclose(df.confidence, probs.max(1).values, atol=1e-5)
    history = pd.read_csv(run / 'history.csv')
    assert history.epoch.tolist() == [0, 1]
    assert {'train_loss', 'valid_loss', 'accuracy', 'loss_x', 'loss_u', 'mask_rate', 'time'} <= set(history)
    assert set(pd.read_csv(run / 'to_label.csv')['item']) <= set(df['item'])


@pytest.mark.slow
def test_weights_are_those_of_the_learner(run):
    saved, model = load_file(run / 'weights.safetensors'), load_learner(run / 'learner.pkl').model.state_dict()
    assert saved.keys() == model.keys()
    assert all(torch.equal(v, model[k]) for k, v in saved.items())


@pytest.mark.slow
def test_the_report_is_one_whole_page(run):
    page, text = Page(run / 'report.html'), (run / 'report.html').read_text(encoding='utf-8')
    assert page.headings == ['What it was trained on', 'Epochs', 'Pictures', 'Settings', 'How to use it', 'Versions']
    assert page.tags.count('img') == 4 and all(o.startswith('data:image/png;base64,') for o in page.links)
    assert not {'script', 'link', 'iframe'} & set(page.tags)
    assert not re.search(r'url\(|@import|https?://', text)
    assert 'prefers-color-scheme:dark' in text and '@media print' in text and 'width=device-width' in text


@pytest.mark.slow
def test_the_report_escapes_class_names(run):
    assert ODD not in (run / 'report.html').read_text(encoding='utf-8') and ODD in Page(run / 'report.html').text


@pytest.mark.slow
def test_the_report_says_what_was_measured(run, there):
    page = Page(run / 'report.html').text
    learn, history = load_learner(run / 'learner.pkl'), pd.read_csv(run / 'history.csv')
    valid = flat(find_images(options()).valid)
    with learn.no_bar():
        probs = learn.get_preds(dl=learn.dls.test_dl(valid))[0]
    right = np.mean([learn.dls.vocab[i] == o.parent.name for i, o in zip(probs.argmax(1), valid)])
    assert len(valid) == 6 and abs(right - history.accuracy.iloc[-1]) < 1e-6
    assert f'{100 * right:.1f} %accuracy on 6 validation images; 95 % interval' in page
    assert 'supervised twin' in page and '1 unlabelled image could not be opened' in page
    assert '20 % of the labelled images of each class were kept out' in page and 'policyFreeMatch' in page


@pytest.mark.slow
def test_a_new_network_has_no_probe(run):
    page = Page(run / 'report.html').text
    assert 'Chance: 33.3 %' in page and 'chance is 33.3 %' in page
    assert 'recipepaper' in page and 'probe' not in page and 'file of weights' not in page


@pytest.mark.slow
def test_a_tuned_run_is_shown_beside_probe_and_chance(tuned, there, weights):
    folder, printed = tuned
    found, last = probe(learner(weights)), pd.read_csv(folder / 'history.csv').accuracy.iloc[-1]
    page = Page(folder / 'report.html').text
    assert f'{100 * found.accuracy:.1f} %accuracy of the probe' in page and 'chance is 33.3 %' in page
    for text in (printed, page):
        assert 'Chance: 33.3 %' in text and f'before the training: {100 * found.accuracy:.1f} %.' in text
        assert f'Difference {100 * (last - found.accuracy):+.1f} points' in text
        assert 'The supervised twin, with the same labels, steps and starting weights' in text
    assert 'recipefinetune' in page and 'policyaligned' in page and 'file of weightsnet.safetensors' in page
    assert 'nan' not in page and 'An epoch on labels alone has neither.' in page and 'of the head alone' not in page
