"Few labels, long epochs"

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
    parent_label,
    set_seed,
)

from fixmatch_fastai.all import WeakTransform, split_labeled, weak_augment
from fixmatch_fastai.labeled import digits_dls


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
