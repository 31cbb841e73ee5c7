"What is known of the pool's classes: labelled images count as unknown, and slips of `label_func` are said at once"

import os
import pickle
import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    MultiCategoryBlock,
    PILImageBW,
    TransformBlock,
    nn,
    noop,
    parent_label,
)
from PIL import Image

from fixmatch_fastai.all import FixMatch, FixMatchBatchTransform, FixMatchTransform, split_labeled, weak_augment
from fixmatch_fastai.interpret import PseudoLabelInterpretation

WEAK = FixMatchTransform(weak=weak_augment(flip=False))


def digit(o):
    return int(parent_label(o))


class SaysThree(nn.Module):
    "A model that finds 3 in each image, and learns nothing else"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (torch.eye(10)[3] * self.scale * 9).expand(len(x), 10)


def fit_threes(dls, loader):
    "The last line of a fit of such a model, by column"
    learn = Learner(dls, SaysThree(), cbs=FixMatch(loader))
    quiet_fit(learn, 1, 0.0)
    return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1], strict=False)), learn


@pytest.fixture(scope='session')
def others(digits, make_dls):
    "Four images of each class that are neither labelled nor validated on"
    dls = make_dls()
    known = {*dls.train_ds.items, *dls.valid_ds.items}
    return sorted(split_labeled([o for o in digits if o not in known], parent_label, 40)[0], key=digit)


# --- labelled images in the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize('opts', [{}, {'tfm': FixMatchBatchTransform()}, {'cache': True}], ids=str)
def test_pseudo_acc_is_that_of_the_images_without_a_label(make_dls, others, opts):
    "Half of the others are threes: 50 %, and 39 % if the labelled ones counted"
    dls = make_dls()
    pool = [*dls.train_ds.items, *[o for o in others if digit(o) in (3, 5)]]
    line, learn = fit_threes(dls, dls.unlabeled_dl(pool, mu=7, label_func=parent_label, **{'tfm': WEAK, **opts}))
    assert line['mask_rate'] == 1 and line['pseudo_acc'] == 0.5
    interp = PseudoLabelInterpretation.from_learner(learn)
    assert interp.known.tolist() == [False] * 20 + [True] * 8 and interp.right.sum() == 4


def test_validation_images_are_known(make_dls):
    dls = make_dls()
    line, _ = fit_threes(
        dls, dls.unlabeled_dl([*dls.train_ds.items, *dls.valid_ds.items], bs=40, label_func=digit_name)
    )
    assert line['pseudo_acc'] == pytest.approx(0.1)


def digit_name(o):
    return parent_label(o)


@pytest.mark.parametrize('way', ['itself', 'str', 'relative', 'dots', 'link', 'copy of the list'])
def test_no_column_where_the_labelled_are_all_that_is_known(make_dls, digits, tmp_path, monkeypatch, way):
    dls, other = make_dls(), [o for o in digits if parent_label(o) == '1'][:9]
    monkeypatch.chdir(digits[0].parent)
    links = [tmp_path / str(i) for i in range(20)]
    for link, file in zip(links, dls.train_ds.items, strict=True):
        link.symlink_to(file)
    ways = {
        'itself': noop,
        'str': str,
        'relative': os.path.relpath,
        'dots': lambda o: f'{o.parent}/../{o.parent.name}/./{o.name}',
        'link': dict(zip(dls.train_ds.items, links, strict=True)).get,
        'copy of the list': lambda o: type(o)(str(o)),
    }
    same = [ways[way](o) for o in dls.train_ds.items]
    truth = {str(o): parent_label(os.path.realpath(o)) for o in same}
    loader = dls.unlabeled_dl([*other, *same], mu=2, label_func=lambda o: truth.get(str(o)))
    line, learn = fit_threes(dls, loader)
    assert not loader.knows_truth and 'pseudo_acc' not in line
    assert learn.fix_match.history.pseudo_acc.isna().all()
    assert dls.unlabeled_dl([*other, *same], label_func=lambda o: '1').knows_truth


def test_rows_of_a_table_that_are_labelled(digits):
    df = pd.DataFrame(
        dict(name=[f'{o.parent.name}/{o.name}' for o in digits[::60]], label=[*map(digit_name, digits[::60])])
    )
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=[*map(str, range(10))])),
        get_x=ColReader('name', pref=digits[0].parent.parent),
        get_y=ColReader('label'),
        splitter=IndexSplitter([0, 5, 10]),
    )
    dls = block.dataloaders(df, bs=4, num_workers=0)
    loader = dls.unlabeled_dl(df.sort_values('name', ascending=False), bs=len(df), label_func=lambda row: row.label)
    _, y, idxs = loader.one_batch()
    known = {loader.dataset.items.name.iloc[i] for i in idxs[y >= 0].tolist()}
    assert known == set(df.name[[0, 5, 10]])


def test_arrays_that_are_labelled(digits):
    pixels = np.stack([np.array(Image.open(o)) for o in digits[::60]])
    truth = {o.tobytes(): parent_label(f) for o, f in zip(pixels, digits[::60], strict=True)}
    label = lambda o: truth[o.tobytes()]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock(vocab=[*map(str, range(10))])), get_y=label)
    dls = block.dataloaders([*pixels], bs=4, num_workers=0)
    _, y, idxs = dls.unlabeled_dl(pixels.copy(), bs=30, label_func=label).one_batch()
    valid = {o.tobytes() for o in dls.valid_ds.items}
    assert [i in idxs[y >= 0] for i in range(30)] == [o.tobytes() in valid for o in pixels]


def test_truth_is_that_beside_the_learner(make_dls, others):
    "A loader that was made with others: their labelled images and their classes are what counts"
    ours = make_dls()
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock(vocab=[str(9 - i) for i in range(10)], sort=False)),
        get_y=parent_label,
        splitter=IndexSplitter(range(30, 40)),
    )
    theirs = block.dataloaders(others, bs=4, num_workers=0)
    loader = ours.unlabeled_dl(others[:30], mu=2, tfm=WEAK, label_func=parent_label)
    assert loader.knows_truth and not loader.knows_truth_beside(theirs)
    assert 'pseudo_acc' not in fit_threes(theirs, loader)[0] and 'pseudo_acc' in fit_threes(ours, loader)[0]
    more = ours.unlabeled_dl(others, tfm=WEAK, label_func=parent_label)
    learn = Learner(theirs, tiny_net(), cbs=FixMatch(more))
    quiet_fit(learn, 1)
    _, truth, *_ = learn.fix_match.peek()
    _, y, idxs = next(more.stream(theirs))
    assert [9 - int(parent_label(others[i])) if i >= 30 else -1 for i in idxs.tolist()] == y.tolist()
    assert set(truth.tolist()) <= {-1, 0, 1, 2}


@pytest.mark.parametrize('change', ['new', 'repeat_train', 'stream', 'workers'])
def test_labelled_images_stay_unknown(make_dls, others, change):
    dls = make_dls(n_batches=None)
    loader = dls.unlabeled_dl([*dls.train_ds.items, *others], bs=60, label_func=parent_label, shuffle=False)
    if change == 'new':
        batch = loader.new(num_workers=0).one_batch()
    elif change == 'workers':
        batch = next(loader.new(num_workers=2).stream())
    else:
        batch = next(loader.stream(dls.repeat_train(3) if change == 'repeat_train' else None))
    assert batch[1].tolist() == [-1] * 20 + [digit(o) for o in others]


def test_labelled_images_keep_their_name_in_pictures(make_dls, others):
    dls = make_dls()
    pool = [dls.train_ds.items[-1], others[0], others[-1]]
    loader = dls.unlabeled_dl(pool, label_func=lambda o: None if o == others[0] else parent_label(o), shuffle=False)
    loader.show_batch(loader.one_batch())
    assert [ax.get_title() for ax in plt.gcf().axes[:3]] == [parent_label(pool[0]), '?', '9']


# --- a pool of a million ---------------------------------------------------------------------------------------------


def test_a_million_images_are_not_asked_for(make_dls, pool):
    dls, folder, asked = make_dls(), str(pool[0].parent), []

    def label(o):
        asked.append(o)
        return parent_label(o)

    items = [*map(str, dls.train_ds.items), *(f'{folder}/{i}.png' for i in range(1_000_000))]
    assert dls.unlabeled_dl(items, label_func=label).knows_truth
    assert asked == items[:21]


# --- slips of label_func ---------------------------------------------------------------------------------------------


SLIPS = {
    'a number': (
        digit,
        ValueError,
        r"returned \d for {}, but the classes are '0', '1', '2', '3', '4' and 5 more: return one",
    ),
    'a blank': (lambda o: parent_label(o) + ' ', ValueError, r"returned '\d ' for {}"),
    'a tensor': (lambda o: torch.tensor(digit(o)), ValueError, r'returned tensor\(\d\) for {}'),
    'a path': (lambda o: o.parent, ValueError, r"returned .*Path\('.*'\) for {}"),
    'a list': (lambda o: [parent_label(o)], TypeError, r"returned \['\d'\] for {}.*return one of them, or None where"),
    'the whole vocabulary': (lambda o: np.arange(1000), TypeError, r'returned array\(\[.*…? for {}'),
    'an error': (
        lambda o: {}[o.name],
        ValueError,
        r'`label_func` fails for {} \(KeyError: .*: it must .*, or None where',
    ),
}


@pytest.mark.parametrize('label_func,error,says', SLIPS.values(), ids=SLIPS)
def test_label_func_that_never_fits(make_dls, pool, label_func, error, says):
    with pytest.raises(error, match=says.format(re.escape(str(pool[0])))) as caught:
        make_dls().unlabeled_dl(pool, label_func=label_func)
    assert len(str(caught.value)) < 400 and str(caught.value).endswith('.')


@pytest.mark.parametrize('unknown', [None, float('nan'), np.nan, pd.NA, pd.NaT, 'what is this', 77, -1, ''], ids=repr)
def test_strangers_among_classes_are_unknown(make_dls, others, unknown):
    label = lambda o: parent_label(o) if o == others[-1] else unknown
    _, y, idxs = make_dls().unlabeled_dl(others, bs=40, label_func=label, shuffle=False).one_batch()
    assert y.tolist() == [-1] * 39 + [9]


def test_nothing_known_is_no_slip(make_dls, others):
    for unknown in (None, float('nan'), pd.NA):
        assert not make_dls().unlabeled_dl(others, label_func=dict.fromkeys(others, unknown).get).knows_truth


@pytest.mark.parametrize('num_workers', [0, 2])
def test_an_error_in_a_worker_names_the_image(make_dls, others, num_workers):
    truth = dict.fromkeys(others[:-1], '3')
    loader = make_dls().unlabeled_dl(others, bs=40, label_func=truth.__getitem__, num_workers=num_workers)
    with pytest.raises(ValueError, match=f'`label_func` fails for {others[-1]} .KeyError'):
        next(loader.stream())


@pytest.fixture
def multi_dls(digits):
    block = DataBlock(
        (ImageBlock(PILImageBW), MultiCategoryBlock(vocab=['even', 'odd', 'round'])),
        get_y=lambda o: ['odd' if digit(o) % 2 else 'even'],
        splitter=IndexSplitter(range(8)),
    )
    return block.dataloaders(digits[::100], bs=2, num_workers=0)


SLIPS_OF_SEVERAL = {
    'a number': (digit, TypeError, r'returned \d for {}'),
    'None of its kind': (lambda o: 2.5, TypeError, r'returned 2.5 for {}'),
    'a name': (lambda o: 'even', TypeError, r"in {}, .* a list of them, but it returned 'even': return \['even'\]"),
    'names of none': (lambda o: ['Even', 'odd '], ValueError, r"returned \['Even', 'odd '\] for {}"),
    'none, or of none': (lambda o: ['Even'] if digit(o) % 2 else [], ValueError, r"returned \['Even'\] for"),
    'lists': (lambda o: [['even']], TypeError, r"returned \[\['even'\]\] for {}"),
    'zeros and ones': (lambda o: torch.tensor([1, 0, 1]), ValueError, r'returned tensor.* for {}'),
}


@pytest.mark.parametrize('label_func,error,says', SLIPS_OF_SEVERAL.values(), ids=SLIPS_OF_SEVERAL)
def test_label_func_of_several_that_never_fits(multi_dls, pool, label_func, error, says):
    with pytest.raises(error, match=says.format(re.escape(str(pool[0])))) as caught:
        multi_dls.unlabeled_dl(pool, label_func=label_func)
    assert "the classes are 'even', 'odd', 'round'" in str(caught.value)


@pytest.mark.parametrize(
    'answer,row',
    [
        (['odd', 'round'], [0, 1, 1]),
        ({'even'}, [1, 0, 0]),
        (np.array(['even', 'a stranger']), [1, 0, 0]),
        ([], [0, 0, 0]),
        (['a stranger'], [-1, -1, -1]),
        (None, [-1, -1, -1]),
        (float('nan'), [-1, -1, -1]),
    ],
    ids=str,
)
def test_rows_of_several_labels(multi_dls, others, answer, row):
    label = lambda o: ['even'] if o == others[0] else answer
    _, y, _ = multi_dls.unlabeled_dl(others, bs=40, label_func=label, shuffle=False).one_batch()
    assert y.tolist() == [[1, 0, 0]] + [row] * 39


@pytest.fixture
def number_dls(digits):
    "Classes without names"
    block = DataBlock((ImageBlock(PILImageBW), TransformBlock), get_y=digit, splitter=IndexSplitter(range(8)))
    return block.dataloaders(digits[::100], bs=2, num_workers=0)


@pytest.mark.parametrize('label_func', [digit, np.int64, torch.tensor, float], ids=['int', 'numpy', 'tensor', 'float'])
def test_numbers_where_classes_have_no_names(number_dls, others, label_func):
    answer = label_func if label_func is digit else lambda o: label_func(digit(o))
    _, y, _ = number_dls.unlabeled_dl(others, bs=40, label_func=answer, shuffle=False).one_batch()
    assert y.tolist() == [digit(o) for o in others]


@pytest.mark.parametrize('answer', ['cat', 2.5, [1, 2], torch.tensor([1, 2])], ids=str)
def test_no_number_where_classes_have_no_names(number_dls, pool, answer):
    says = f'for {pool[0]}, but these DataLoaders have no names of classes: return the number of its class, or None'
    with pytest.raises(TypeError, match=re.escape(says)):
        number_dls.unlabeled_dl(pool, label_func=lambda o: answer)


@pytest.mark.parametrize('func', [parent_label, lambda o: parent_label(o)], ids=['function', 'lambda'])
def test_any_label_func_goes_to_another_process(make_dls, pool, func):
    files = pool[:4]
    views = make_dls().unlabeled_dl(files, tfm=WEAK, label_func=func).dataset
    sent = pickle.loads(pickle.dumps(views))
    assert [sent[i][1] for i in range(4)] == [views[i][1] for i in range(4)] == [digit(o) for o in files]
