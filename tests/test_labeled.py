"Few labels, chosen and split off, in long epochs"

import random
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.callback.data import WeightedDL
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    DataLoaders,
    ImageBlock,
    IndexSplitter,
    Learner,
    Normalize,
    PILImageBW,
    get_image_files,
    parent_label,
    set_seed,
)

from fixmatch_fastai.all import WeakTransform, split_labeled, weak_augment
from fixmatch_fastai.labeled import StratifiedSplitter, digits_dls, split_classes


def test_repeat_train_validates_and_predicts_as_before(make_dls, digits):
    short, long = make_dls(n_batches=None), make_dls(n_batches=7)
    assert (len(short.train), len(long.train)) == (5, 7)
    for a, b in zip(short.valid, long.valid):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    learn = Learner(long, tiny_net())
    assert len(learn.get_preds(ds_idx=0)[0]) == 20, 'each training image once'
    quiet_fit(learn, 1)
    learn.validate(ds_idx=0)
    assert learn.predict(digits[0])[0] in long.vocab


def test_repeat_train_keeps_weights(make_dls):
    "A loader that draws by weight still does"
    dls = make_dls(n_batches=None)
    weighted = dls.train.new(cls=WeightedDL, wgts=[1.0] + [0.0] * 19)
    assert list(DataLoaders(weighted, dls.valid, device='cpu').repeat_train(4).train.get_idxs()) == [0] * 16


def test_digits_dls_is_what_one_would_write(digits):
    train, valid = split_labeled(digits, parent_label, 1300)
    labeled, rest = split_labeled(train, parent_label, 20, seed=3)
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_y=parent_label,
        splitter=IndexSplitter(range(20, 20 + len(valid))),
        item_tfms=WeakTransform(weak_augment(flip=False)),
        batch_tfms=Normalize.from_stats([0.3], [0.33]),
    )
    set_seed(0)
    expected = [*block.dataloaders(labeled + valid, bs=8, val_bs=512, num_workers=0).repeat_train(5).train]
    set_seed(0)
    dls, unlabeled = digits_dls(20, n_batches=5, bs=8, seed=3)
    for a, b in zip(expected, dls.train, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert unlabeled == rest and dls.train_ds.items == labeled and dls.valid_ds.items == valid


# --- which are labelled ----------------------------------------------------------------------------------------------


@pytest.fixture
def table(digits):
    "Files with their class, some twice, and a few columns more"
    files = [*digits[::20], *digits[::60]]
    df = pd.DataFrame(
        dict(file=files, label=[parent_label(o) for o in files], note=[None, 3, 'text'] * (len(files) // 3))
    )
    return df.assign(size=np.arange(len(df)) % 7 / 2)


def of_row(row):
    return row.label


def contents(df):
    "What rows say, sorted"
    return sorted(map(str, df[['file', 'label', 'note', 'size']].to_dict('records')))


@pytest.mark.parametrize('seed', range(5))
def test_split_labeled_of_a_table_in_any_order(table, seed):
    expected, rest = split_labeled(table, of_row, 20, seed=7)
    other = table.sample(frac=1, random_state=seed, ignore_index=seed % 2 == 0)
    labeled, unlabeled = split_labeled(other, of_row, 20, seed=7)
    assert contents(labeled) == contents(expected) and contents(unlabeled) == contents(rest)
    idxs = [*other.index.get_indexer(labeled.index)]
    assert idxs == sorted(idxs), 'in the order of the table'


def test_split_labeled_of_a_column_and_of_a_set(digits):
    column = pd.Series(digits[::10], index=range(len(digits[::10]), 0, -1))
    expected, rest = split_labeled(digits[::10], parent_label, 20)
    labeled, unlabeled = split_labeled(column.sample(frac=1, random_state=0), parent_label, 20)
    assert isinstance(labeled, pd.Series) and {*labeled} == {*expected} and {*unlabeled} == {*rest}
    assert split_labeled({*digits[::10]}, parent_label, 20) == (expected.sorted(), rest.sorted())
    assert split_labeled(iter(digits[::10]), parent_label, 20) == (expected, rest)
    for items, says in (
        (dict.fromkeys(digits), 'is a dict'),
        (str(digits[0].parent), 'not the folder'),
        (str(digits[0]), 'not the file'),
    ):
        with pytest.raises(TypeError, match=says):
            split_labeled(items, parent_label, 20)


# --- which are validated on ------------------------------------------------------------------------------------------


def split(items, *args, **kwargs):
    train, valid = StratifiedSplitter(*args, **kwargs)(items)
    assert sorted([*train, *valid]) == list(range(len(items)))
    return train, valid


@pytest.mark.parametrize('share', [0.01, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize('n', [2, 3, 10])
def test_each_class_is_on_both_sides(n, share):
    items = [f'{c}/{i}.png' for i in range(n) for c in 'abc']
    train, valid = split(items, share, seed=0)
    for c in 'abc':
        there = [sum(items[i][0] == c for i in side) for side in (train, valid)]
        assert min(there) >= 1 and there[1] == min(n - 1, max(1, round(share * n)))


@pytest.mark.parametrize('seed', [0, 1, 42])
def test_a_seed_chooses_the_images_that_it_always_chose(digits, seed):
    "As commands have done it: of the sorted files of each class in turn"
    rng, expected = random.Random(seed), set()
    for c in map(str, range(10)):
        files = sorted(o for o in digits if parent_label(o) == c)
        expected |= {files[i] for i in rng.sample(range(len(files)), round(0.2 * len(files)))}
    for items in (digits, digits.shuffle(), digits[::-1]):
        assert {items[i] for i in split(items, 0.2, seed)[1]} == expected
    by_class = {c: [o for o in digits if parent_label(o) == c] for c in map(str, range(10))}
    train, valid = split_classes(by_class, 0.2, seed)
    assert {o for files in valid.values() for o in files} == expected and list(valid) == list(train) == list(by_class)


def test_without_a_seed_it_is_as_set_seed_has_it(digits):
    def drawn():
        return split(digits)[1]

    assert drawn() != drawn()
    set_seed(3)
    first = drawn()
    set_seed(3)
    assert drawn() == first
    state = random.getstate(), torch.get_rng_state()
    split(digits, seed=1)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def test_splitter_of_tables_and_of_folders_in_folders(table, tmp_path):
    expected = contents(table.iloc[split(table, 0.3, 5, of_row)[1]])
    other = table.sample(frac=1, random_state=1)
    assert contents(other.iloc[split(other, 0.3, 5, of_row)[1]]) == expected
    for i in range(3):
        for name in ('one/cat', 'two/cat', 'two/dog'):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(table.file[0], tmp_path / name / f'{i}.png')
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_items=get_image_files,
        get_y=parent_label,
        splitter=StratifiedSplitter(),
    )
    dls = block.dataloaders(tmp_path, bs=2, num_workers=0)
    assert sorted(map(parent_label, dls.valid_ds.items)) == ['cat', 'dog'] and len(dls.train_ds) == 7
    assert len([*dls.valid]) == 1


def test_what_can_not_be_stratified(digits):
    for items in (['a/1.png', 'a/2.png', 'b/1.png'], pd.DataFrame(dict(label=['a', 'b', 'a']))):
        label = of_row if isinstance(items, pd.DataFrame) else parent_label
        with pytest.raises(
            ValueError, match="only one labelled image of 'b', so none is left to validate on: add one, or"
        ):
            StratifiedSplitter(label_func=label)(items)
    for share in (0, 1, -0.2, 20):
        with pytest.raises(ValueError, match=f'`valid_pct` is a share .* but got {share}'):
            StratifiedSplitter(share)
    with pytest.raises(TypeError, match='one class for each item'):
        StratifiedSplitter(label_func=lambda o: [parent_label(o)])(digits)
    with pytest.raises(ValueError, match='`label_func` fails for item 0'):
        StratifiedSplitter()(pd.DataFrame(dict(label=['a', 'b'])))
