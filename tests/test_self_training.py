"Tables of pseudo-labels, soft labels, teachers and students, and the supervised twin"

import json
import os
import shutil
import tracemalloc
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    ConvLayer,
    CrossEntropyLossFlat,
    CutMix,
    DataBlock,
    DataLoaders,
    F1Score,
    ImageBlock,
    ImageDataLoaders,
    IndexSplitter,
    Learner,
    MixUp,
    MultiCategoryBlock,
    PILImage,
    PILImageBW,
    RandomSplitter,
    accuracy,
    load_learner,
    nn,
    noop,
    parent_label,
    set_seed,
)

from fixmatch_fastai import self_training
from fixmatch_fastai.all import (
    DistillationLoss,
    FixMatch,
    FixMatchTransform,
    FlexMatch,
    LogitsMSELoss,
    NoisyStudent,
    SoftBCELoss,
    SoftCategoryBlock,
    SoftCrossEntropyLoss,
    SoftFocalLoss,
    SupervisedTwin,
    TableLabels,
    WeakTransform,
    add_drop_path,
    balance_classes,
    compare_supervised,
    pseudo_label,
    read_pseudo_labels,
    self_distill,
    semi_weak,
    soft_accuracy,
    split_labeled,
    with_pseudo_labels,
)

LOSSES = [SoftCrossEntropyLoss, DistillationLoss, SoftFocalLoss, SoftBCELoss]


@pytest.fixture
def make(tmp_path):
    "A student: a fresh tiny network"
    return lambda dls: Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path)


@pytest.fixture
def teacher(make_dls, make):
    set_seed(0)
    learn = make(make_dls(n_batches=20))
    quiet_fit(learn, 2, 1e-2)
    return learn


def passes(learn, stop_at=None):
    "Sizes of the batches that the model sees from now on; `stop_at` interrupts one"
    seen = []

    def look(module, xb):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(len(xb[0]))

    return seen, learn.model.register_forward_pre_hook(look)


# --- tables ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('soft', [False, True, 'logits'])
@pytest.mark.parametrize('tta', [False, True])
def test_the_table_is_what_fastai_predicts(teacher, pool, soft, tta):
    if tta and soft == 'logits':
        with pytest.raises(ValueError, match='so there are no logits'):
            pseudo_label(teacher, pool, soft=soft, tta=tta)
        return
    df = pseudo_label(teacher, pool, soft=soft, tta=tta)
    with teacher.no_bar():
        dl = teacher.dls.test_dl(pool)
        probs = (teacher.tta(dl=dl) if tta else teacher.get_preds(dl=dl))[0]  # nothing is random in these `dls`
        logits = teacher.get_preds(dl=dl, act=noop)[0]
    np.testing.assert_allclose(df.confidence, probs.max(1).values, atol=1e-5)
    assert df.predicted.tolist() == [teacher.dls.vocab[i] for i in probs.argmax(1)] and df.file.tolist() == [str(o) for o in pool]
    if soft:
        name, expected = ('logit', logits) if soft == 'logits' else ('prob', probs)
        np.testing.assert_allclose(df[[f'{name}_{o}' for o in teacher.dls.vocab]], expected, atol=1e-4)
    else:
        assert list(df.columns) == ['file', 'predicted', 'confidence']


@pytest.mark.parametrize('stop_at', [0, 1, 5, 9])
def test_an_interrupted_table_goes_on(teacher, pool, tmp_path, stop_at):
    out = tmp_path / 'a' / 'table.csv'
    whole = pseudo_label(teacher, pool, soft=True)
    seen, handle = passes(teacher, stop_at)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(teacher, pool, soft=True, out=out, bs=10)
    handle.remove()
    assert not out.exists()
    seen, handle = passes(teacher)
    again = pseudo_label(teacher, pool, soft=True, out=out, bs=10)
    handle.remove()
    assert sum(seen) == len(pool) - 10 * stop_at
    pd.testing.assert_frame_equal(again, whole)
    pd.testing.assert_frame_equal(read_pseudo_labels(out), whole)
    assert [o.name for o in out.parent.iterdir()] == ['table.csv']
    quiet_fit(teacher, 1, 1e-2)  # training goes on


def test_a_torn_row_is_made_anew(teacher, pool, tmp_path):
    out = tmp_path / 'table.csv'
    _, handle = passes(teacher, 5)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(teacher, pool, out=out, bs=10)
    handle.remove()
    (part,) = tmp_path.glob('*.part')
    part.write_bytes(part.read_bytes()[:-3])
    seen, handle = passes(teacher)
    again = pseudo_label(teacher, pool, out=out)
    handle.remove()
    assert sum(seen) == len(pool) - 49
    pd.testing.assert_frame_equal(again, pseudo_label(teacher, pool))


@pytest.mark.parametrize('what', ['weights', 'images', 'soft'])
def test_what_belongs_to_another_call_is_not_gone_on_with(teacher, pool, tmp_path, what):
    out = tmp_path / 'table.csv'
    _, handle = passes(teacher, 5)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(teacher, pool, out=out, bs=10)
    handle.remove()
    if what == 'weights':
        with torch.no_grad():
            next(teacher.model.parameters()).mul_(0.9)
    items = pool[::-1] if what == 'images' else pool
    seen, handle = passes(teacher)
    again = pseudo_label(teacher, items, soft=what == 'soft', out=out)
    handle.remove()
    assert sum(seen) == len(pool) and len(again) == len(pool)


def test_damaged_images_are_left_out(teacher, pool, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no image')
    with pytest.warns(UserWarning, match=r'2 of 12 images can\'t be opened .*bad\.png \(UnidentifiedImageError'):
        df = pseudo_label(teacher, [*pool[:5], bad, *pool[5:10], bad], num_workers=2, bs=4)
    pd.testing.assert_frame_equal(df, pseudo_label(teacher, pool[:10]))


def test_damaged_images_of_an_earlier_call_are_told(teacher, pool, tmp_path, monkeypatch):
    bad, out = tmp_path / 'bad.png', tmp_path / 't.csv'
    bad.write_bytes(b'no image')
    items = [pool[0], bad, *pool[1:10]]
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(self_training._Rows, 'add', interrupted_after(self_training._Rows.add, 5))
        pseudo_label(teacher, items, out=out)
    with pytest.warns(UserWarning, match=r'1 of 11 images can\'t be opened .*bad\.png \(found by an earlier call\)'):
        pd.testing.assert_frame_equal(pseudo_label(teacher, items, out=out), pseudo_label(teacher, pool[:10]))


def test_nothing_kept_is_said(teacher, pool):
    with pytest.warns(UserWarning, match='No pseudo-label is kept: the largest confidence is 0'):
        assert len(pseudo_label(teacher, pool, threshold=1.0)) == 0


def test_names_that_csv_would_change(make_learner, pool, tmp_path):
    names = dict(zip('0123456789', ['NA', 'null', '007', 'x,y', 'true', '', ' a', 'ä"', '1e3', 'None']))
    files = []
    for o in pool:
        files.append(tmp_path / f'{names[parent_label(o)]}, {o.name}')
        shutil.copy(o, files[-1])
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=lambda o: o.name.rsplit(', ', 1)[0], splitter=RandomSplitter(0.5, seed=0))
    dls = block.dataloaders(files, bs=8, num_workers=0)
    learn = Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path)
    quiet_fit(learn, 3, 1e-2)
    df = pseudo_label(learn, files, soft=True, out=tmp_path / 't.csv')
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path / 't.csv'), df)
    assert len(with_pseudo_labels(dls, df, labeled=False).train_ds) == 50  # validation images are left out


def test_classes_that_are_numbers(pool, tmp_path):
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=lambda o: int(parent_label(o)), splitter=RandomSplitter(0.5, seed=0))
    dls = block.dataloaders(pool, bs=8, num_workers=0)
    learn = Learner(dls, tiny_net(), metrics=accuracy)
    df = pseudo_label(learn, pool, out=tmp_path / 't.csv')
    assert df.predicted.map(type).eq(int).all()
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path / 't.csv', dls.vocab), df, check_dtype=False)
    a, b = (with_pseudo_labels(dls, o, labeled=False).train_ds.targets for o in (df, read_pseudo_labels(tmp_path / 't.csv')))
    assert a.tolist() == b.tolist()


def test_images_that_are_no_files(pool):
    pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
    images = [np.asarray(PILImageBW.create(o)) for o in pool]
    labels = [parent_label(o) for o in pool]
    rows = pd.DataFrame(dict(image=images, label=labels), index=[f'row {i}' for i in range(len(pool))])
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_x=lambda r: r['image'], get_y=lambda r: r['label'], splitter=IndexSplitter(range(50, 100)))
    dls = block.dataloaders(rows, bs=8, num_workers=0)
    learn = Learner(dls, tiny_net(), metrics=accuracy)
    df = pseudo_label(learn, rows[:50], soft=True)
    assert df.file.tolist() == [f'row {i}' for i in range(50)]
    with pytest.raises(ValueError, match='give the images with `items`'):
        with_pseudo_labels(dls, df.assign(file=range(50)), labeled=False)
    student = self_distill(learn, lambda dls: Learner(dls, tiny_net(), metrics=accuracy), partial(quiet_fit, n_epoch=1), items=rows[:50])
    assert len(student.dls.train_ds) == 50 and student.dls.one_batch()[1].shape == (8, 10)


def test_a_loaded_learner_labels(teacher, pool, tmp_path):
    expected = pseudo_label(teacher, pool)
    teacher.export(tmp_path / 'teacher.pkl')
    pd.testing.assert_frame_equal(pseudo_label(load_learner(tmp_path / 'teacher.pkl'), pool), expected)


def test_what_has_no_table(teacher, pool, make_dls):
    block = DataBlock((ImageBlock(PILImageBW), MultiCategoryBlock), get_y=lambda o: [parent_label(o)], splitter=RandomSplitter(0.5, seed=0))
    several = Learner(block.dataloaders(pool, bs=8, num_workers=0), tiny_net())
    with pytest.raises(ValueError, match='several labels|a CategoryBlock'):
        pseudo_label(several, pool)
    with pytest.raises(ValueError, match="False, True or 'logits'"):
        pseudo_label(teacher, pool, soft='probs')
    with pytest.raises(ValueError, match='is no table of pseudo-labels'):
        file = teacher.path / 'x.csv'
        file.write_text('a,b\n1,2\n')
        read_pseudo_labels(file)
    quiet_fit(teacher, 1, 1e-2)


# --- soft labels -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('cls', [*LOSSES, LogitsMSELoss])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_losses_have_a_row_for_each_image(cls, dtype):
    torch.manual_seed(0)
    pred = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    targ = torch.randn(6, 4) if cls is LogitsMSELoss else torch.randn(6, 4).softmax(1)
    rows = cls(reduction='none')(pred, targ)
    assert rows.shape == (6,) and rows.dtype == torch.float32 and (rows >= 0).all()
    torch.testing.assert_close(cls()(pred, targ), rows.mean())
    torch.testing.assert_close(cls(reduction='sum')(pred, targ), rows.sum())
    cls()(pred, targ).backward()
    assert pred.grad.isfinite().all() and pred.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none'"):
        cls(reduction='max')


@pytest.mark.parametrize('cls', [SoftCrossEntropyLoss, DistillationLoss, SoftFocalLoss, SoftBCELoss])
def test_probabilities_of_0_and_1_are_finite(cls):
    pred = torch.tensor([[100.0, 0, -100], [0, 0, 0]], requires_grad=True)
    loss = cls()(pred, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    loss.backward()
    assert loss.isfinite() and pred.grad.isfinite().all()


@pytest.mark.parametrize('cls,good,bad', [(o, 0.25, 0.7) for o in LOSSES[:3]] + [(SoftBCELoss, 0.7, 2.0), (LogitsMSELoss, 3.0, 0.25)])
def test_on_a_device_only_the_first_batch_is_asked(cls, good, bad):
    "`meta` tensors have no values: to look at them is an error, as on a GPU it is a wait"
    pred, loss = torch.randn(2, 4), cls()
    with pytest.raises(RuntimeError):
        loss(pred.to('meta'), torch.empty(2, 4, device='meta'))
    with pytest.raises(ValueError, match='but the target has rows like'):
        loss(pred, torch.full((2, 4), bad))
    loss(pred, torch.full((2, 4), good))
    assert loss(pred.to('meta'), torch.empty(2, 4, device='meta')).shape == ()
    with pytest.raises(ValueError, match='but the target has rows like'):
        loss(pred, torch.full((2, 4), bad))


@pytest.mark.parametrize('cls', LOSSES)
@pytest.mark.parametrize('mix', [None, MixUp, CutMix])
def test_soft_losses_in_a_learner(teacher, make_dls, pool, cls, mix, tmp_path):
    dls = with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True))
    learn = Learner(dls, tiny_net(), loss_func=cls(), metrics=[accuracy, F1Score(average='macro')], path=tmp_path, cbs=mix and mix())
    quiet_fit(learn, 1, 1e-2)
    with learn.no_bar():
        preds, targs, decoded = learn.get_preds(with_decoded=True)
        with_loss = learn.get_preds(with_loss=True)[2]
        values = learn.validate()
    assert with_loss.shape == targs.shape == (len(dls.valid_ds),)
    assert (decoded == preds.argmax(1)).all() and values[1] == pytest.approx((decoded == targs).float().mean().item())
    np.testing.assert_allclose(with_loss.mean(), values[0], rtol=1e-4)
    learn.show_results(max_n=2)
    assert learn.predict(pool[0])[0] in dls.vocab
    learn.export(tmp_path / 'student.pkl')
    assert load_learner(tmp_path / 'student.pkl').predict(pool[0])[0] == learn.predict(pool[0])[0]


def test_training_metrics_need_the_likeliest_class(teacher, pool, make):
    dls = with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True))
    learn = Learner(dls, tiny_net(), metrics=soft_accuracy)
    learn.recorder.train_metrics = True
    quiet_fit(learn, 1, 1e-2)
    assert len(learn.recorder.values[0]) == 4


def test_labelled_images_keep_their_labels(teacher, pool):
    "Those in the table too are there once, with the true label; validation images are not trained on"
    labeled, valid = teacher.dls.train_ds.items, teacher.dls.valid_ds.items
    table = pseudo_label(teacher, [*pool, *labeled, *valid], soft=True).assign(predicted='0')
    dls = with_pseudo_labels(teacher.dls, table)
    apart = set(pool) - set(labeled) - set(valid)
    assert len(dls.train_ds) == len(labeled) + len(apart)
    hot = torch.stack([torch.as_tensor(dls.train_ds[i][1]) for i in range(len(labeled))])
    assert [teacher.dls.vocab[i] for i in hot.argmax(1)] == [parent_label(o) for o in labeled] and (hot.max(1).values == 1).all()
    x, y = dls.one_batch()
    assert y.shape == (4, 10) and dls.train.n_batches == 20  # `repeat_train` stays
    assert dls.vocab == teacher.dls.vocab and dls.c == 10
    many = with_pseudo_labels(teacher.dls, table, bs=32)
    assert many.one_batch()[1].shape == (32, 10) and many.train.n_batches == 20 and many.valid.bs == teacher.dls.valid.bs
    with pytest.raises(ValueError, match='`bs` is a number of images'):
        with_pseudo_labels(teacher.dls, table, bs=0)


def in_frame(digits):
    "A learner's `dls` of rows of a DataFrame, and the rows of all its images and 30 others"
    few, rest = split_labeled(digits, parent_label, 40, seed=0)
    more, _ = split_labeled(rest, parent_label, 30, seed=0)
    df = pd.DataFrame({'image': [o.name for o in few], 'folder': [str(o.parent) for o in few], 'label': [parent_label(o) for o in few]})
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_x=lambda r: f'{r["folder"]}/{r["image"]}',
        get_y=ColReader('label'),
        splitter=IndexSplitter(range(0, 40, 2)),
    )
    frame = pd.DataFrame({'image': [o.name for o in few + more], 'folder': [str(o.parent) for o in few + more]})
    return block.dataloaders(df, bs=4, num_workers=0), frame.sample(frac=1, random_state=0).reset_index(drop=True)


def in_memory(digits):
    "The same with arrays"
    few, rest = split_labeled(digits, parent_label, 40, seed=0)
    more, _ = split_labeled(rest, parent_label, 30, seed=0)
    opened = [np.array(PILImage.create(o)) for o in few + more]
    labels = {o.tobytes(): parent_label(f) for o, f in zip(opened, few)}
    block = DataBlock((ImageBlock, CategoryBlock), get_y=lambda o: labels[o.tobytes()], splitter=IndexSplitter(range(0, 40, 2)))
    return block.dataloaders(opened[:40], bs=4, num_workers=0), [o.copy() for o in opened]


def by_path(digits):
    "The same with files, which the pool spells in another way"
    few, rest = split_labeled(digits, parent_label, 40, seed=0)
    more, _ = split_labeled(rest, parent_label, 30, seed=0)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=parent_label, splitter=IndexSplitter(range(0, 40, 2)))
    return block.dataloaders(few, bs=4, num_workers=0), [os.path.relpath(o) for o in few + more]


@pytest.mark.parametrize('images', [by_path, in_frame, in_memory])
def test_images_are_known_again(digits, images, tmp_path):
    "20 are validated on, 20 labelled, 30 are new"
    dls, items = images(digits)
    learn = Learner(dls, tiny_net(n_in=3 if images is in_memory else 1), metrics=accuracy, path=tmp_path)
    table = pseudo_label(learn, items)
    assert len(table) == 70
    assert len(with_pseudo_labels(dls, table, items=items).train_ds) == 20 + 30
    assert len(with_pseudo_labels(dls, table, items=items, labeled=False).train_ds) == 20 + 30
    known = with_pseudo_labels(dls, table, items=items)
    labels = [dls.vocab[int(known.train_ds[i][1])] for i in range(20)]
    assert labels == [dls.vocab[int(dls.train_ds[i][1])] for i in range(20)]
    rounds = NoisyStudent(
        learn, lambda dls: Learner(dls, tiny_net(n_in=3 if images is in_memory else 1), path=tmp_path), items, rounds=1, threshold=0.0, dropout=0
    )
    rounds.label_func = lambda o: '1'
    rounds.fit(lambda learn: None)
    assert rounds.history.pseudo_labels[1] == 30 and 0 <= rounds.history.pseudo_acc[1] <= 1


def test_a_table_knows_files_by_any_path(teacher, pool):
    table = pseudo_label(teacher, pool)
    for o in (pool[2], os.path.relpath(pool[2]), str(pool[2])):
        assert TableLabels(table)(o) == table.predicted[2]
    row = pd.Series({'file': str(pool[2])})
    assert TableLabels(table, lambda o: 'labelled')(row) == 'labelled'
    with pytest.raises(ValueError, match='is not in the table of pseudo-labels'):
        TableLabels(table)(row)


def test_soft_labels_go_by_the_names_of_classes(teacher, pool):
    "A block with the classes in another order puts them right; one with others refuses"
    table = pseudo_label(teacher, pool, soft=True)
    label = TableLabels(table)(pool[3])
    assert label == {o: table[f'prob_{o}'][3] for o in teacher.dls.vocab}
    turned = list(teacher.dls.vocab)[::-1]
    for vocab in (turned, list(teacher.dls.vocab), [int(o) for o in turned]):
        got = self_training.SoftCategorize(vocab).encodes(label)
        assert got.tolist() == [label[str(o)] for o in vocab]
    with pytest.raises(ValueError, match='give it the classes of the teacher'):
        self_training.SoftCategorize([*turned[:-1], 'x']).encodes(label)
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=TableLabels(table))
    with pytest.raises(TypeError, match=r'needs `SoftCategoryBlock\(learn.dls.vocab\)`'):
        block.dataloaders(list(pool), num_workers=0)


@pytest.mark.parametrize('way', ['with_pseudo_labels', 'DataBlock'])
def test_logits_train_and_validate(teacher, pool, make, way):
    "Trains on squared errors, validates by cross-entropy, and comes to say what the teacher says"
    table = pseudo_label(teacher, pool, soft='logits')
    if way == 'DataBlock':
        valid = list(teacher.dls.valid_ds.items)
        block = DataBlock(
            (ImageBlock(PILImageBW), SoftCategoryBlock(teacher.dls.vocab)), get_y=TableLabels(table, parent_label), splitter=IndexSplitter(range(len(valid)))
        )
        dls = block.dataloaders([*valid, *(o for o in pool if o not in valid)], bs=8, num_workers=0)
    else:
        dls = with_pseudo_labels(teacher.dls, table, labeled=False)
        assert type(dls.loss_func) is LogitsMSELoss
        row = table[[f'logit_{o}' for o in dls.vocab]].to_numpy()[table.file.isin(map(str, teacher.dls.valid_ds.items)).to_numpy() == 0][4]
        assert dls.train_ds[4][1].tolist() == row.tolist()
    learn = Learner(dls, tiny_net(), loss_func=LogitsMSELoss(), metrics=accuracy, path=make(dls).path)
    quiet_fit(learn, 1, 1e-2)
    first, loss, acc = learn.recorder.values[0]
    with learn.no_bar():
        probs, y = learn.get_preds()
    assert loss == pytest.approx(F.nll_loss(probs.log(), y).item(), rel=1e-3) and acc == pytest.approx((probs.argmax(1) == y).float().mean().item())
    quiet_fit(learn, 8, 1e-2)
    assert learn.recorder.values[-1][0] < first / 2


def test_fixmatch_says_that_it_makes_its_own(teacher, pool, make):
    learn = make(with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True)))
    learn.add_cb(FixMatch(teacher.dls.unlabeled_dl(pool, mu=1)))
    with pytest.raises(ValueError, match='looks like soft labels: FixMatch makes its own pseudo-labels'):
        quiet_fit(learn, 1)


def test_several_labels_of_a_soft_network_are_told(teacher, pool, make):
    dls = with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True))
    learn = Learner(dls, tiny_net(), loss_func=SoftBCELoss(thresh=0.0))
    assert list(learn.predict(pool[0])[0]) == list(dls.vocab)
    with pytest.raises(ValueError, match='`thresh` is a probability'):
        SoftBCELoss(2)


def test_no_pseudo_label_is_said_and_the_round_can_be_fitted_again(teacher, pool, make):
    rounds = NoisyStudent(teacher, make, pool, rounds=1, threshold=1.0)
    with (
        pytest.warns(UserWarning, match='No pseudo-label is kept'),
        pytest.raises(ValueError, match='Round 1 has no pseudo-label to train on: lower `threshold`'),
    ):
        rounds.fit(pytest.fail)
    rounds.threshold = 0.0
    rounds.fit(partial(quiet_fit, n_epoch=1, lr=1e-2))
    assert len(rounds.history) == 2


def test_stale_parts_go_with_the_finished_table(teacher, pool, tmp_path):
    (tmp_path / 't.csv.0123abcd.part').touch()
    (tmp_path / 'other.csv.0123abcd.part').touch()
    (tmp_path / 't.csv.mine.part').touch()
    pseudo_label(teacher, pool[:5], out=tmp_path / 't.csv')
    assert sorted(o.name for o in tmp_path.iterdir() if o.is_file()) == ['other.csv.0123abcd.part', 't.csv', 't.csv.mine.part']


def test_an_index_in_the_file_is_left_out(teacher, pool, tmp_path):
    table = pseudo_label(teacher, pool[:5], soft=True)
    table.to_csv(tmp_path / 't.csv')
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path / 't.csv'), table)


def of_values(dls):
    return DataLoaders.from_dsets([(torch.zeros(1, 8, 8), 0.5)] * 8, [(torch.zeros(1, 8, 8), 0.5)] * 8, bs=4, num_workers=0)


def of_several(dls):
    block = DataBlock((ImageBlock(PILImageBW), MultiCategoryBlock), get_y=lambda o: [parent_label(o)], splitter=IndexSplitter(range(5)))
    return block.dataloaders(list(dls.train_ds.items), bs=4, num_workers=0)


@pytest.mark.parametrize(
    'call,exc,says',
    [
        (lambda t, p, df: pseudo_label(t.model, p), TypeError, 'must be a Learner, but is a Sequential'),
        (lambda t, p, df: pseudo_label(t, None), TypeError, '`items` must be images'),
        (lambda t, p, df: pseudo_label(t, p[0]), TypeError, r'or `\[file\]` for one'),
        (lambda t, p, df: pseudo_label(t, p, threshold='0.5'), ValueError, "a confidence, 0 to 1, but got '0.5'"),
        (lambda t, p, df: pseudo_label(t, p, bs=0), ValueError, '`bs` is a number of images'),
        (lambda t, p, df: pseudo_label(t, p, out=t.path), ValueError, '`out` must be a file'),
        (lambda t, p, df: pseudo_label(t, pd.DataFrame({'f': list(p)}, index=[0] * len(p))), ValueError, 'have the same index'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df, mu=0), ValueError, '`mu` is how many'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df, strong='timm'), TypeError, '`strong` must make one PIL image of another'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df, strong=FixMatchTransform()), TypeError, 'or the `.strong` of what was given'),
        (lambda t, p, df: with_pseudo_labels(with_pseudo_labels(t.dls, df), df), ValueError, 'hold pseudo-labels already'),
        (lambda t, p, df: with_pseudo_labels(of_values(t.dls), df), ValueError, 'use one whose target is a CategoryBlock'),
        (lambda t, p, df: with_pseudo_labels(of_several(t.dls), df), ValueError, 'a CategoryBlock|several labels'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df.to_dict('records')), TypeError, '`table` must be a DataFrame'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df.assign(file=range(len(df))), items=p[:50]), ValueError, 'names image 99, but `items` has 50'),
        (lambda t, p, df: TableLabels(df[['file']]), TypeError, '`table` must be a DataFrame'),
        (lambda t, p, df: balance_classes(df.drop(columns='confidence')), TypeError, '`table` must be a DataFrame'),
        (lambda t, p, df: NoisyStudent(t, noop, []), ValueError, 'no images to label'),
        (lambda t, p, df: NoisyStudent(t, noop, p, dropout=1), ValueError, '`dropout` must be 0 or more and below 1'),
        (lambda t, p, df: NoisyStudent(t, noop, p, drop_path=-0.1), ValueError, '`drop_path` must be'),
        (lambda t, p, df: NoisyStudent(t, noop, p, mu=-1), ValueError, '`mu` is how many'),
        (lambda t, p, df: NoisyStudent(t, noop, p, threshold=95), ValueError, '`threshold` is a confidence'),
        (lambda t, p, df: NoisyStudent(t.model, noop, p), TypeError, 'must be a Learner'),
        (lambda t, p, df: NoisyStudent(t, lambda dls: None, p, threshold=0.0).fit(noop), TypeError, 'it returned a NoneType'),
        (lambda t, p, df: self_distill(t, lambda dls: None, noop), TypeError, 'it returned a NoneType'),
        (lambda t, p, df: semi_weak(t, noop, p, noop, noop, k=0), ValueError, '`k` is a number of images'),
        (lambda t, p, df: semi_weak(t, lambda dls: None, p, noop, noop), TypeError, 'it returned a NoneType'),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(teacher, pool, call, exc, says):
    with pytest.raises(exc, match=says) as e:
        call(teacher, pool, pseudo_label(teacher, pool))
    assert str(e.value).endswith('.')


def test_images_that_all_are_damaged_are_told_once(teacher, tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'no image')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always', UserWarning)
        assert len(pseudo_label(teacher, [tmp_path / 'bad.png'] * 2)) == 0
    assert [str(o.message).split("can't")[0] for o in w if 'images' in str(o.message) or 'kept' in str(o.message)] == ['2 of 2 images ']


def test_noise_is_for_training_images_alone(teacher, pool):
    seen = []

    def strong(img):
        seen.append(img.size)
        return img

    dls = with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool), strong=strong)
    dls.one_batch()
    assert len(seen) == 4
    dls.valid.one_batch()
    teacher.dls.one_batch()
    assert len(seen) == 4


@pytest.mark.parametrize('wrong', ['classes', 'probabilities'])
def test_a_table_of_other_classes_is_refused(teacher, pool, wrong):
    table = pseudo_label(teacher, pool, soft=True)
    table = table.assign(predicted='cat') if wrong == 'classes' else table.drop(columns='prob_9')
    with pytest.raises(ValueError, match='a learner of the same classes'):
        with_pseudo_labels(teacher.dls, table)


def test_a_data_block_trains_on_the_table(teacher, pool, make):
    labeled, valid = teacher.dls.train_ds.items, teacher.dls.valid_ds.items
    hard, soft = pseudo_label(teacher, pool), pseudo_label(teacher, pool, soft=True)
    items = [*valid, *labeled, *pool]
    for table, block in ((hard, CategoryBlock), (soft, SoftCategoryBlock(teacher.dls.vocab))):
        db = DataBlock((ImageBlock(PILImageBW), block), get_y=TableLabels(table, parent_label), splitter=IndexSplitter(range(len(valid))))
        learn = make(db.dataloaders(items, bs=8, num_workers=0))
        quiet_fit(learn, 1, 1e-2)
        with learn.no_bar():
            assert learn.validate()[1] == pytest.approx(np.mean([parent_label(o) == learn.predict(o)[0] for o in valid]), abs=1e-6)
    assert learn.loss_func.__class__ is SoftCrossEntropyLoss


def test_image_data_loaders_and_batch_transforms(pool, tmp_path, make):
    "Also with fastai's factory, random transforms and a short last batch"
    from fastai.vision.all import Resize, aug_transforms, resnet18, vision_learner

    for o in pool[:60]:
        to = tmp_path / 'labeled' / parent_label(o) / o.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(o, to)
    dls = ImageDataLoaders.from_folder(
        tmp_path / 'labeled', valid_pct=0.3, seed=0, item_tfms=Resize(32), batch_tfms=aug_transforms(size=28), bs=8, num_workers=0
    )
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path)
    table = pseudo_label(learn, pool[60:], soft=True)
    student = vision_learner(with_pseudo_labels(dls, table), resnet18, pretrained=False, metrics=accuracy, path=tmp_path)
    quiet_fit(student, 1, 1e-3)
    x, y = student.dls.one_batch()
    assert x.shape == (8, 3, 28, 28) and y.shape == (8, dls.c)


# --- rounds ------------------------------------------------------------------------------------------------------------------------------


def test_balance_by_hand():
    table = pd.DataFrame(dict(file=list('abcdef'), predicted=list('xxxxyz'), confidence=[0.9, 0.8, 0.95, 0.7, 0.6, 0.5]))
    assert balance_classes(table).file.tolist() == ['c', 'a', 'e', 'e', 'f', 'f']
    assert balance_classes(table, 1).file.tolist() == ['c', 'e', 'f']
    assert balance_classes(table).predicted.value_counts().nunique() == 1
    with pytest.raises(ValueError, match='1 or more'):
        balance_classes(table, 0)


def test_rounds(teacher, pool, make):
    made = []

    def student(dls):
        made.append(dls)
        return make(dls)

    rounds = NoisyStudent(teacher, student, pool, rounds=2, threshold=0.0, label_func=parent_label)
    last = rounds.fit(partial(quiet_fit, n_epoch=2, lr=1e-2))
    df = rounds.history
    known = {*teacher.dls.train_ds.items, *teacher.dls.valid_ds.items}
    news = [o for o in pool if o not in known]
    assert 0 < len(news) < len(pool)
    assert df['round'].tolist() == [0, 1, 2] and df.pseudo_labels.tolist() == [0, len(news), len(news)] and len(made) == 2
    table = pseudo_label(teacher, news, soft=True)
    assert df.pseudo_acc[1] == pytest.approx(np.mean([parent_label(f) == p for f, p in zip(news, table.predicted)]))
    with last.no_bar():
        assert df.accuracy[2] == pytest.approx(last.validate()[1])
    targets = torch.stack([torch.as_tensor(made[0].train_ds[i][1]) for i in range(20, len(made[0].train_ds))])
    said, kinds = targets.argmax(1).bincount(), table.predicted.nunique()
    assert said[said > 0].tolist() == [round(len(news) / kinds)] * kinds, 'of each class as many'
    assert any('_Dropout' in type(h).__name__ for m in last.model.modules() for h in m._forward_pre_hooks.values())


def test_an_interrupted_round_is_trained_again(teacher, pool, make):
    fits = []

    def fit(learn):
        fits.append(learn)
        quiet_fit(learn, 1, 1e-2)
        if len(fits) == 2:
            raise KeyboardInterrupt

    rounds = NoisyStudent(teacher, make, pool, rounds=3, threshold=0.0)
    with pytest.raises(KeyboardInterrupt):
        rounds.fit(fit)
    assert rounds.student is fits[0] and rounds.history['round'].tolist() == [0, 1]
    assert rounds.fit(fit) is fits[-1] and len(fits) == 4 and rounds.history['round'].tolist() == [0, 1, 2, 3]
    assert rounds.fit(fit) is fits[-1] and len(fits) == 4, 'there is nothing left to train'


def test_hard_losses_are_refused_before_training(teacher, pool):
    hard = lambda dls: Learner(dls, tiny_net(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='CrossEntropyLossFlat, is not made for soft labels'):
        NoisyStudent(teacher, hard, pool, threshold=0).fit(pytest.fail)
    with pytest.raises(ValueError, match='is not made for soft labels'):
        self_distill(teacher, hard, pytest.fail)
    quiet_fit(NoisyStudent(teacher, hard, pool, rounds=1, threshold=0, soft=False).fit(partial(quiet_fit, n_epoch=1)), 1)
    with pytest.raises(TypeError, match='a function that makes a Learner'):
        NoisyStudent(teacher, 'resnet34', pool)


def test_semi_weak_trains_on_the_best_then_on_the_labels(teacher, pool, make):
    sets = []
    semi_weak(teacher, make, pool, *[lambda learn: (sets.append(learn.dls.train_ds), quiet_fit(learn, 1, 1e-2))] * 2, k=3)
    best = pseudo_label(teacher, pool, top_k_per_class=3)
    known = set(map(str, teacher.dls.valid_ds.items))
    assert len(sets[0]) == len([o for o in best.file if o not in known]) and sets[1] is teacher.dls.train_ds


def test_self_distillation_learns_what_the_teacher_says(teacher, make, pool):
    "With enough steps the student agrees with the teacher more than chance would"
    set_seed(0)
    student = self_distill(teacher, make, partial(quiet_fit, n_epoch=10, lr=1e-2), items=pool)
    a, b = (pseudo_label(o, pool).predicted for o in (teacher, student))
    assert (a == b).mean() > 0.6
    with pytest.raises(ValueError, match='1 or more'):
        self_distill(teacher, make, noop, rounds=0)


@pytest.mark.parametrize('arch, n', [('resnet18', 8), ('vit_tiny_patch16_224', 12), ('convnext_atto', 12)])
def test_drop_path_in_bodies_of_timm(arch, n):
    kwargs = dict(img_size=32, patch_size=8) if arch.startswith('vit') else {}
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=3, **kwargs)
    for p in model.parameters():  # some begin as 0, so that whole blocks do nothing
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(4, 3, 32, 32)
    model.eval()
    before = model(x)
    assert add_drop_path(model, 0.5) == n
    torch.testing.assert_close(model(x), before)  # in evaluation nothing changes
    reference = timm.create_model(arch, num_classes=3, drop_path_rate=0.5, **kwargs)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == 'DropPath']
    assert max(rates) == 0.5 == max(m.drop_prob for m in reference.modules() if type(m).__name__ == 'DropPath') and rates == sorted(rates)
    model.train()
    torch.manual_seed(0)
    a, b = model(x), model(x)
    assert not torch.equal(a, b)
    assert add_drop_path(tiny_net()) == 0
    with pytest.raises(ValueError, match='below 1'):
        add_drop_path(model, 1)


# --- twin --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def arms(digits):
    "Functions that make a learner and a pool"
    train, test = split_labeled(digits, parent_label, 200, seed=3)
    test = test[::40]

    def make_learner(n_labels=20, seed=0):
        labeled, _ = split_labeled(train, parent_label, n_labels, seed)
        block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=parent_label, splitter=IndexSplitter(range(n_labels, n_labels + len(test))))
        return Learner(block.dataloaders(labeled + test, bs=4, val_bs=64, num_workers=0).repeat_train(3), tiny_net(), metrics=accuracy)

    return make_learner, lambda dls: dls.unlabeled_dl(train, mu=2, num_workers=0)


FIT = partial(quiet_fit, n_epoch=2, lr=1e-2)


def test_both_arms_begin_alike_and_take_as_many_steps(arms):
    pairs = []

    def keep(learn):
        pairs.append(([o.clone() for o in learn.model.parameters()], list(learn.dls.train_ds.items), hasattr(learn, 'fix_match')))
        FIT(learn)

    twin = compare_supervised(*arms, seeds=2, fit=keep, progress=False)
    for a, b in (pairs[:2], pairs[2:]):
        assert (a[2], b[2]) == (False, True) and a[1] == b[1]
        assert all(torch.equal(p, q) for p, q in zip(a[0], b[0], strict=True))
    assert pairs[0][1] != pairs[2][1], 'each seed has its own labels'
    assert twin.runs.steps.tolist() == [0, 6, 6] * 2 and twin.runs.seed.tolist() == [0, 0, 0, 1, 1, 1]
    assert twin.runs.method.tolist() == ['probe', 'supervised', 'FixMatch'] * 2 == [*twin.methods] * 2 and twin.arms == ('supervised', 'FixMatch')
    assert len(twin.table()) == 1 and twin.table().seeds.iloc[0] == 2
    assert twin.learn.fix_match.history.shape[0] == 6


def test_accuracies_are_those_of_the_validation_images(arms):
    kept = []
    twin = compare_supervised(*arms, seeds=1, fit=lambda learn: (FIT(learn), kept.append(learn)), progress=False)
    for learn, accuracy_ in zip(kept, twin.runs.accuracy[1:], strict=True):
        with learn.no_bar():
            assert learn.validate()[1] == pytest.approx(accuracy_)
    assert [len(o['curve']) for o in twin.rows] == [0, 2, 2] and twin.rows[1]['curve'][-1] == pytest.approx(twin.rows[1]['accuracy'])


def test_an_interrupted_comparison_goes_on(arms, tmp_path):
    fits, out = [], tmp_path / 'twin.json'

    def fit(learn):
        fits.append(learn)
        if len(fits) == 3:
            raise KeyboardInterrupt
        FIT(learn)

    with pytest.raises(KeyboardInterrupt):
        compare_supervised(*arms, seeds=2, fit=fit, out=out, progress=False)
    twin = compare_supervised(*arms, seeds=2, fit=fit, out=out, progress=False)
    assert len(fits) == 5 and len(twin.rows) == 6
    whole = compare_supervised(*arms, seeds=2, fit=FIT, progress=False)
    pd.testing.assert_frame_equal(twin.runs.drop(columns='seconds'), whole.runs.drop(columns='seconds'))
    assert twin.table().equals(whole.table()) and repr(twin) == repr(whole)
    again = compare_supervised(*arms, seeds=2, fit=pytest.fail, out=out, progress=False)
    assert again.table().equals(whole.table())


def test_several_numbers_of_labels(arms):
    twin = compare_supervised(*arms, seeds=[5, 7], n_labels=[10, 40], fit=FIT, progress=False)
    assert twin.table().index.tolist() == [10, 40] and len(twin.rows) == 12
    assert '10 labels:' in repr(twin) and 'worth' in repr(twin)
    hidden = compare_supervised(lambda **kwargs: arms[0](**kwargs), arms[1], seeds=[5], n_labels=10, fit=FIT, progress=False)
    assert hidden.runs.accuracy.tolist() == twin.runs[(twin.runs.n_labels == 10) & (twin.runs.seed == 5)].accuracy.tolist()
    assert twin.plot().get_xscale() == 'log'


@pytest.mark.parametrize('resumed', [False, True])
def test_arms_that_share_a_model_are_refused(arms, tmp_path, resumed):
    "The second would begin where the first ended"
    make_learner, pool = arms
    net, out = tiny_net(), tmp_path / 'new folder/twin.json'
    shared = lambda: Learner(make_learner().dls, net, metrics=accuracy)
    with pytest.raises(ValueError, match='`make_learner` must make a new model each time'):
        compare_supervised(shared, pool, seeds=1, fit=FIT, out=out, progress=False)
    if resumed:
        with pytest.raises(ValueError, match='`make_learner` must make a new model each time'):
            compare_supervised(shared, pool, seeds=1, fit=FIT, out=out, progress=False)


def test_other_validation_images_are_told(arms):
    make_learner, pool = arms

    def of_seed(seed):
        learn = make_learner(20, seed)
        learn.dls.loaders[1] = learn.dls.test_dl(learn.dls.valid_ds.items[: 10 + seed], with_labels=True)
        return learn

    with pytest.warns(UserWarning, match='but on 10 to 11 of them'):
        twin = compare_supervised(of_seed, pool, seeds=2, fit=FIT, progress=False)
    assert twin.table()['low, over images'].isna().all()
    with pytest.raises(ValueError, match='no run with 11 labels: give one of 0'):
        twin.worth(11)


def test_what_can_not_be_compared(arms, tmp_path):
    make_learner, pool = arms
    with pytest.raises(ValueError, match='without FixMatch'):
        compare_supervised(lambda: (lambda o: o.add_cb(FixMatch(pool(o.dls))))(make_learner()), pool, seeds=1, progress=False)
    with pytest.raises(ValueError, match='`make_learner` must take it'):
        compare_supervised(lambda: make_learner(), pool, n_labels=[10, 20])
    with pytest.raises(TypeError, match='must return a Learner'):
        compare_supervised(lambda: None, pool, seeds=1, progress=False)
    with pytest.raises(ValueError, match='nothing to compare'):
        compare_supervised(make_learner, pool, seeds=0)
    with pytest.raises(ValueError, match="'supervised' is the other one"):
        compare_supervised(make_learner, pool, name='supervised')
    with pytest.raises(ValueError, match="'probe' is what stands beside the two"):
        compare_supervised(make_learner, pool, name='probe')
    with pytest.raises(TypeError, match=r'`method` must make a callback of the loader, as `lambda dl: FixMatch\(dl, policy=FlexMatch\(\)\)`'):
        compare_supervised(make_learner, pool, method=FlexMatch)
    with pytest.raises(TypeError, match='but made a FlexMatch'):
        compare_supervised(make_learner, pool, seeds=1, fit=FIT, method=lambda dl: FlexMatch(), progress=False)
    with pytest.warns(UserWarning, match='No step was trained'):
        compare_supervised(make_learner, pool, seeds=1, fit=noop, progress=False)
    (tmp_path / 'x.json').write_text('[{')
    with pytest.raises(ValueError, match=r'x\.json is no file of finished runs'):
        compare_supervised(make_learner, pool, out=tmp_path / 'x.json')
    lengths = iter([1, 2])
    with pytest.warns(UserWarning, match='with 3 to 6: the comparison is not fair'):
        compare_supervised(make_learner, pool, seeds=1, fit=lambda learn: quiet_fit(learn, next(lengths)), progress=False)


@pytest.mark.parametrize('n_labels', [10, 30])
def test_the_probe_is_scikit_learns(arms, n_labels):
    "On the features that the network has before training, with the labels of each seed; of one label a class there is no cross-validation"
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    twin = compare_supervised(*arms, seeds=2, n_labels=n_labels, fit=FIT, progress=False)
    for seed, found in enumerate(o for o in twin.rows if o['method'] == 'probe'):
        set_seed(seed)
        learn = arms[0](n_labels, seed)
        features = []
        for dl in (learn.dls.test_dl(learn.dls.train_ds.items, with_labels=True), learn.dls.valid):
            x, y = (torch.cat(o) for o in zip(*dl, strict=True))
            with torch.no_grad():
                features.append((learn.model.eval()[:-1](x).double().numpy(), y.numpy()))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        if n_labels > 10:
            folds = StratifiedKFold(n_labels // 10, shuffle=True, random_state=0)
            model = GridSearchCV(model, {'logisticregression__C': [0.001, 0.01, 0.1, 1]}, scoring='neg_log_loss', cv=folds)
        right = model.fit(*features[0]).predict(features[1][0]) == features[1][1]
        assert found['right'].dtype == bool and found['right'].tolist() == right.tolist() and found['accuracy'] == right.mean() and found['seed'] == seed
        assert 0.2 < right.mean() < 1


def refused(learn):
    raise ValueError('Not this one.')


def of_fastai(n_labels=20, seed=0, arms=None):
    "Random views, shuffled validation and a worker"
    dls = arms[0](n_labels, seed).dls
    noisy = nn.Sequential(*tiny_net()[:3], nn.Dropout(0.2), nn.Linear(128, 10))
    dls.train.after_item.add(WeakTransform())
    return Learner(DataLoaders(dls.train, dls.valid.new(shuffle=True, num_workers=1)), noisy, metrics=accuracy, loss_func=CrossEntropyLossFlat())


def of_torch(n_labels=20, seed=0, arms=None):
    "Loaders with random numbers of their own"
    dls = arms[0](n_labels, seed).dls
    x, y = (torch.cat(o) for o in zip(*dls.test_dl(dls.train_ds.items, with_labels=True), strict=True))
    train = torch.utils.data.TensorDataset(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))
    train = torch.utils.data.DataLoader(train, 4, shuffle=True, generator=torch.Generator().manual_seed(seed))
    return Learner(DataLoaders(train, dls.valid), tiny_net(), metrics=accuracy, loss_func=CrossEntropyLossFlat())


@pytest.mark.parametrize('make_learner', [of_fastai, of_torch])
def test_the_probe_changes_nothing_of_the_training(arms, monkeypatch, make_learner):
    x = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    pool = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.flip(-1)), 8)

    def trained():
        kept = []

        def fit(learn):
            FIT(learn)
            kept.append([o.clone() for o in learn.model.state_dict().values()])

        twin = compare_supervised(partial(make_learner, arms=arms), pool, seeds=2, fit=fit, progress=False)
        return twin, kept

    twin, weights = trained()
    monkeypatch.setattr(self_training, 'probe', refused)
    with pytest.warns(UserWarning, match=r'goes without the probe\. Not this one\.') as told:
        without, expected = trained()
    assert len([o for o in told if 'probe' in str(o.message)]) == 1 and told[0].filename == __file__
    assert all(torch.equal(p, q) for a, b in zip(weights, expected, strict=True) for p, q in zip(a, b, strict=True))
    rows = [o for o in twin.rows if o['method'] != 'probe']
    assert len(rows) == 4 == len(without.rows) and len(twin.rows) == 6
    for a, b in zip(rows, without.rows, strict=True):
        assert a['right'].tolist() == b['right'].tolist()
        assert all(a[k] == b[k] for k in ('method', 'seed', 'accuracy', 'steps', 'curve', 'start'))
    assert without.methods == without.arms and 'probe' not in repr(without) + ''.join(without.table().columns)
    pd.testing.assert_frame_equal(twin.table()[without.table().columns], without.table())
    assert [o for o in twin.report().splitlines() if not o.startswith('probe')] == without.report().splitlines()
    assert len(without.plot().get_legend().get_texts()) == 2


def test_what_can_not_be_probed_is_compared_all_the_same(arms):
    "Here a network without a linear layer"
    make_learner, pool = arms

    def convolutional():
        return Learner(make_learner().dls, nn.Sequential(ConvLayer(1, 8), nn.Conv2d(8, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), metrics=accuracy)

    with pytest.warns(UserWarning, match=r'goes without the probe\. The model has no linear layer') as told:
        twin = compare_supervised(convolutional, pool, seeds=2, fit=FIT, progress=False)
    assert len(told) == 1 and twin.runs.method.tolist() == ['supervised', 'FixMatch'] * 2
    assert len(twin.report().splitlines()) == 4


def test_an_old_file_without_probes_goes_on(arms, tmp_path):
    out = tmp_path / 'twin.json'
    whole = compare_supervised(*arms, seeds=2, fit=FIT, out=out, progress=False)
    new = json.loads(out.read_text())
    assert [o['method'] for o in new] == ['probe', 'supervised', 'FixMatch'] * 2
    old = [o for o in new if o['method'] != 'probe']
    out.write_text(json.dumps(old[:3]))
    twin = compare_supervised(*arms, seeds=2, fit=FIT, out=out, progress=False)
    assert twin.table().equals(whole.table()) and repr(twin) == repr(whole)
    out.write_text(json.dumps(old))
    twin = compare_supervised(*arms, seeds=2, fit=pytest.fail, out=out, progress=False)
    assert twin.table().equals(whole.table()) and len(json.loads(out.read_text())) == 6
    calls = []
    compare_supervised(lambda: calls.append(1), arms[1], seeds=2, fit=pytest.fail, out=out, progress=False)
    assert not calls, 'nothing is left to do'
    out.write_text(json.dumps(old))

    def other():
        torch.rand(1)
        return arms[0]()

    with pytest.warns(UserWarning, match='goes without the probe. The finished runs began with other weights'):
        twin = compare_supervised(other, arms[1], seeds=2, fit=pytest.fail, out=out, progress=False)
    assert 'probe' not in repr(twin) and twin.table()['FixMatch mean'].equals(whole.table()['FixMatch mean'])


def run_of(method, right, n_labels=0, seed=0, curve=()):
    right = np.array(list(right)) == '1'
    steps = 0 if method == 'probe' else 9
    return dict(n_labels=n_labels, seed=seed, method=method, accuracy=right.mean(), steps=steps, seconds=1.0, right=right, curve=[*curve])


def test_the_probe_is_a_line_beside_the_two():
    "Of four images each it has 1 and 2 right, supervised training 2 and 2, FixMatch 3 and 3"
    twin = SupervisedTwin()
    for seed, (a, b) in enumerate((('1100', '1110'), ('1010', '0111'))):
        twin.rows += [run_of('supervised', a, seed=seed, curve=(0.25, 0.5)), run_of('FixMatch', b, seed=seed, curve=(0.5, 0.75))]
    without = twin.table()
    twin.rows.append(run_of('probe', '1000'))
    assert 'probe  ' not in twin.report() and np.isnan(twin.table()['probe mean'].iloc[0]), 'a mean of other seeds is no comparison'
    twin.rows.append(run_of('probe', '1001', seed=1))
    pd.testing.assert_frame_equal(twin.table()[without.columns], without)
    lines = twin.report().splitlines()
    assert [o.split()[0] for o in lines[1:]] == ['probe', 'supervised', 'FixMatch', 'difference'] and 'better in 2 of 2' in lines[4]
    assert lines[1].startswith('probe         37.5 ± 17.7 %   logistic regression'), lines[1]
    twin.rows.append(run_of('probe', '1111', seed=2))
    assert twin.report().splitlines() == lines, 'a seed of which the two are not known yet'


def test_the_probe_is_flat_in_the_plot():
    twin = SupervisedTwin()
    for seed, (a, b, c) in enumerate((('1000', '1100', '1110'), ('1001', '1010', '0111'))):
        twin.rows += [run_of('probe', a, seed=seed), run_of('supervised', b, seed=seed, curve=(0.25, 0.5)), run_of('FixMatch', c, seed=seed, curve=(0.5, 0.75))]
    ax = twin.plot()
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['probe, 37.5 %', 'supervised, 50.0 %', 'FixMatch, 75.0 %']
    flat = [o for o in ax.lines if len(set(o.get_ydata())) == 1]
    assert [o.get_ydata()[0] for o in flat] == [25, 50, 37.5] and {o.get_color() for o in flat} == {'C1'}
    assert len({o.get_color() for o in ax.lines}) == 3
    twin.rows += [{**o, 'n_labels': 40} for o in twin.rows]
    ax = twin.plot()
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['probe', 'supervised', 'FixMatch']
    assert [o.get_ydata()[-1] for o in ax.lines[1::2]] == [37.5, 50, 75]
    plt.close('all')


def test_the_probe_has_no_say_in_what_labels_are_worth():
    twin = SupervisedTwin()
    for n, a, b in ((10, '1100', '1110'), (40, '1111', '1111')):
        twin.rows += [run_of('supervised', a, n), run_of('FixMatch', b, n)]
    assert twin.worth(10) == pytest.approx(20)
    twin.rows += [run_of('probe', '0000', n) for n in (5, 10, 40)]
    assert twin.worth(10) == pytest.approx(20) and twin.table().worth[10] == pytest.approx(20)
    with pytest.raises(ValueError, match='no run with 5 labels: give one of 10, 40'):
        twin.worth(5)


def test_intervals_are_scipys():
    d = np.array([0.03, 0.05, 0.01, 0.06])
    from scipy import stats

    low, high = stats.ttest_1samp(d, 0).confidence_interval()
    np.testing.assert_allclose(self_training._t_interval(d), (low, high))
    images = np.random.default_rng(0).choice([-1.0, 0, 0, 1], (3, 500))
    mean = images.mean(0)
    np.testing.assert_allclose(self_training._images_interval(list(images)), stats.norm(mean.mean(), stats.sem(mean)).interval(0.95), rtol=1e-5)


def test_the_comparison_warns_of_nothing(arms):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        compare_supervised(*arms, seeds=1, fit=FIT, progress=False)


def test_many_soft_labels_are_in_memory_once(teacher, pool, monkeypatch, tmp_path):
    "1,000 images and 1,000 classes are 4 MB; text of some rows comes on top"
    n, c = 1000, 1000
    probs = torch.full((c,), 1 / c)

    def predictions(learn, items, *args):
        yield from ((i, probs, None) for i in range(len(items)))

    monkeypatch.setattr(self_training, 'predictions', predictions)
    monkeypatch.setattr(self_training, '_vocab', lambda *args: [str(i) for i in range(c)])
    items = [pool[0]] * n
    for stop in (n // 2, n):  # the second call goes on
        monkeypatch.setattr(self_training._Rows, 'add', interrupted_after(self_training._Rows.add, stop) if stop < n else original)
        tracemalloc.start()
        try:
            with teacher.no_bar():
                pseudo_label(teacher, items, soft=True, out=tmp_path / 't.csv')
        except KeyboardInterrupt:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 4e6 < peak < 10e6, f'{peak / 1e6:.1f} MB'
    assert len(read_pseudo_labels(tmp_path / 't.csv')) == n


original = self_training._Rows.add


def interrupted_after(add, n):
    def interrupted(self, *args):
        if self.done == n:
            raise KeyboardInterrupt
        add(self, *args)

    return interrupted
