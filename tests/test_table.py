"Tables of pseudo-labels: made, interrupted, written, read, and trained on"

import gc
import os
import random
import shutil
import tracemalloc
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
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
    Normalize,
    Path,
    PILImage,
    PILImageBW,
    RandomSplitter,
    Resize,
    accuracy,
    aug_transforms,
    load_learner,
    noop,
    parent_label,
    set_seed,
    vision_learner,
)
from PIL import Image

from fixmatch_fastai.augment import FixMatchTransform
from fixmatch_fastai.callback import FixMatch
from fixmatch_fastai.labeled import WeakTransform, split_labeled
from fixmatch_fastai.self_training import (
    DistillationLoss,
    LogitsMSELoss,
    SoftBCELoss,
    SoftCategoryBlock,
    SoftCrossEntropyLoss,
    SoftFocalLoss,
    TableLabels,
    balance_classes,
    predictions,
    pseudo_label,
    read_pseudo_labels,
    soft_accuracy,
    with_pseudo_labels,
)
from fixmatch_fastai.self_training import table as table_room
from fixmatch_fastai.self_training.table import right_predictions


def passes(learn, stop_at=None):
    "Sizes of the batches that the model sees from now on; `stop_at` interrupts one"
    seen = []

    def look(module, xb):
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        seen.append(len(xb[0]))

    return seen, learn.model.register_forward_pre_hook(look)


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
    assert df.predicted.tolist() == [teacher.dls.vocab[i] for i in probs.argmax(1)]
    assert df.file.tolist() == [str(o) for o in pool]
    if soft:
        name, expected = ('logit', logits) if soft == 'logits' else ('prob', probs)
        np.testing.assert_allclose(df[[f'{name}_{o}' for o in teacher.dls.vocab]], expected, atol=1e-4)
    else:
        assert list(df.columns) == ['file', 'predicted', 'confidence']


def test_views_of_test_time_augmentation_are_random_draws(make_dls, make_student, pool):
    "A mean of one plain and four other views: it differs from the plain one and from another draw, and is a softmax"
    learn = make_student(make_dls(item_tfms=WeakTransform()))
    plain, once, again = (torch.stack([o for _, o, _ in predictions(learn, pool, tta=o)]) for o in (False, True, True))
    for a, b in ((plain, once), (once, again)):
        assert (a - b).abs().max() > 1e-5
    torch.testing.assert_close(once.sum(1), torch.ones(len(pool)))


def test_right_predictions_are_those_of_validation(teacher):
    with teacher.no_bar():
        accuracy_ = teacher.validate()[1]
    right = right_predictions(teacher)
    assert right.dtype == bool and right.shape == (20,) and right.mean() == pytest.approx(accuracy_)


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


def test_a_file_to_write_draws_nothing(teacher, pool, tmp_path):
    "Random numbers go on as without it"
    drawn = []
    for out in (None, tmp_path / 'table.csv'):
        set_seed(0)
        pseudo_label(teacher, pool[:3], out=out)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_a_torn_row_is_made_anew(teacher, pool, tmp_path):
    out = tmp_path / 'table.csv'
    interrupt(teacher, pool, out)
    (part,) = tmp_path.glob('*.part')
    part.write_bytes(part.read_bytes()[:-3])
    seen, handle = passes(teacher)
    again = pseudo_label(teacher, pool, out=out)
    handle.remove()
    assert sum(seen) == len(pool) - 49
    pd.testing.assert_frame_equal(again, pseudo_label(teacher, pool))


def interrupt(learn, items, out, **kwargs):
    "Predict 50 images, and stop"
    _, handle = passes(learn, 5)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(learn, items, out=out, bs=10, **kwargs)
    handle.remove()


def other_weights(learn):
    with torch.no_grad():
        next(learn.model.parameters()).mul_(0.9)


def other_layers(learn):
    learn.model.insert(3, torch.nn.Tanh())  # without weights


def other_classes(learn):
    learn.dls.vocab.items[:2] = learn.dls.vocab.items[1::-1]


def other_transforms(learn):
    learn.dls.valid.after_batch.add(Normalize.from_stats([0.3], [0.4], cuda=False))


OTHERS = {
    'weights': other_weights,
    'layers': other_layers,
    'classes': other_classes,
    'transforms': other_transforms,
    'order': lambda learn: dict(items=lambda o: o[::-1]),
    'fewer': lambda learn: dict(items=lambda o: o[:60]),
    'one more': lambda learn: dict(items=lambda o: [*o, o[0]]),
    'soft': lambda learn: dict(soft=True),
    'tta': lambda learn: dict(tta=True),
}


@pytest.mark.parametrize('other', OTHERS)
def test_what_belongs_to_another_call_is_not_gone_on_with(teacher, pool, tmp_path, other):
    out = tmp_path / 'table.csv'
    interrupt(teacher, pool, out)
    changed = OTHERS[other](teacher) or {}
    items = changed.pop('items', list)(pool)
    with pytest.warns(UserWarning, match=r'another learner or other options, so all images are predicted anew\.'):
        again = pseudo_label(teacher, items, out=out, **changed)
    pd.testing.assert_frame_equal(again, pseudo_label(teacher, items, **changed))
    assert [o.name for o in tmp_path.glob('table*')] == ['table.csv']


def arrays(files):
    "A learner of arrays, and these"
    opened = [np.asarray(PILImageBW.create(o)) for o in files]
    labels = {o.tobytes(): parent_label(f) for o, f in zip(opened, files)}
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=lambda o: labels[o.tobytes()])
    return block.dataloaders(opened, bs=8, num_workers=0), opened


def rows_of_arrays(files):
    "The same as rows of a DataFrame"
    rows = pd.DataFrame(dict(image=arrays(files)[1], label=[parent_label(o) for o in files]))
    getters = dict(get_x=ColReader('image'), get_y=ColReader('label'))
    return DataBlock((ImageBlock(PILImageBW), CategoryBlock), **getters).dataloaders(rows, bs=8, num_workers=0), rows


def rows_of_files(files):
    "Rows of a DataFrame that name files"
    rows = pd.DataFrame(dict(name=[str(o.relative_to(files[0].parents[1])) for o in files]))
    getters = dict(get_x=ColReader('name', pref=files[0].parents[1]), get_y=lambda r: parent_label(Path(r['name'])))
    return DataBlock((ImageBlock(PILImageBW), CategoryBlock), **getters).dataloaders(rows, bs=8, num_workers=0), rows


def plain_files(files):
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=parent_label)
    return block.dataloaders(files, bs=8, num_workers=0), files


@pytest.mark.parametrize('form', [arrays, rows_of_arrays, rows_of_files, plain_files])
def test_a_part_belongs_to_the_pixels_of_its_images(pool, tmp_path, form):
    "The same images go on; one with new pixels, of the same name or number, begins anew"
    files = []
    for o in pool:
        files.append(tmp_path / 'images' / o.parent.name / o.name)
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(o, files[-1])
    dls, items = form(files)
    learn, out = Learner(dls, tiny_net()), tmp_path / 'table.csv'
    interrupt(learn, items, out)
    seen, handle = passes(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        pseudo_label(learn, items, out=out)
    assert sum(seen) == 50
    handle.remove()
    interrupt(learn, items, out)
    Image.fromarray(255 - np.asarray(Image.open(files[0]))).save(files[0])
    if form is arrays:
        items[0] = 255 - items[0]
    if form is rows_of_arrays:
        items.at[0, 'image'] = 255 - items.at[0, 'image']
    with pytest.warns(UserWarning, match='so all images are predicted anew'):
        again = pseudo_label(learn, items, out=out)
    pd.testing.assert_frame_equal(again, pseudo_label(learn, items))


@pytest.mark.parametrize('damage', ['header', 'row', 'last row', 'zeros', 'too long', 'short', 'other'])
def test_a_damaged_part_is_not_gone_on_with(teacher, pool, tmp_path, damage):
    interrupt(teacher, pool, tmp_path / 'table.csv', soft=True)
    (part,) = tmp_path.glob('*.part')
    data = bytearray(part.read_bytes())
    if damage in ('header', 'row', 'last row'):
        data[dict(zip(('header', 'row', 'last row'), (3, 1000, -10)))[damage]] ^= 1
    if damage == 'zeros':
        data[500:900] = bytes(400)
    if damage == 'too long':
        data *= 3
    part.write_bytes({'short': data[:5], 'other': b'no pseudo-labels' * 40}.get(damage, data))
    with pytest.warns(UserWarning, match=r'\.part is damaged, so all images are predicted anew\.'):
        again = pseudo_label(teacher, pool, soft=True, out=tmp_path / 'table.csv')
    pd.testing.assert_frame_equal(again, pseudo_label(teacher, pool, soft=True))


@pytest.mark.parametrize('text', ['', 'file,predicted,confidence\na,b,c\n', 'a,"b\n', b'\xff\xfe\x00'])
def test_a_damaged_table_is_refused_in_a_sentence(tmp_path, text):
    file = tmp_path / 't.csv'
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r't\.csv is no table of pseudo-labels'):
        read_pseudo_labels(file)


def test_stale_parts_go_with_the_finished_table(teacher, pool, tmp_path):
    (tmp_path / 't.csv.0123abcd.part').touch()
    (tmp_path / 'other.csv.0123abcd.part').touch()
    (tmp_path / 't.csv.mine.part').touch()
    with pytest.warns(UserWarning, match='0123abcd.part is of a call with other images'):
        pseudo_label(teacher, pool[:5], out=tmp_path / 't.csv')
    left = sorted(o.name for o in tmp_path.iterdir() if o.is_file())
    assert left == ['other.csv.0123abcd.part', 't.csv', 't.csv.mine.part']


@pytest.mark.slow
def test_many_soft_labels_are_in_memory_once(teacher, pool, monkeypatch, tmp_path):
    "500 images and 1,000 classes are 2 MB; text of some rows comes on top"
    n, c = 500, 1000
    probs = torch.full((c,), 1 / c)

    def predictions(learn, items, **kwargs):
        "All that are asked for, or half of the images, and then an interrupt"
        for i in range(len(items)):
            if len(items) == n and i == n // 2:
                raise KeyboardInterrupt
            yield i, probs, None

    monkeypatch.setattr(table_room, 'predictions', predictions)
    monkeypatch.setattr(table_room, 'teacher_classes', lambda *args: [str(i) for i in range(c)])
    for _ in range(2):  # the second call goes on
        gc.collect()
        tracemalloc.start()
        try:
            with teacher.no_bar():
                pseudo_label(teacher, [pool[0]] * n, soft=True, out=tmp_path / 't.csv')
        except KeyboardInterrupt:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 2e6 < peak < 7.5e6, f'{peak / 1e6:.1f} MB'
    assert len(read_pseudo_labels(tmp_path / 't.csv')) == n


def test_damaged_images_are_left_out_of_the_table(teacher, pool, tmp_path):
    bad = tmp_path / 'bad.png'
    bad.write_bytes(b'no image')
    with pytest.warns(UserWarning, match=r'2 of 12 images can\'t be opened .*bad\.png \(UnidentifiedImageError'):
        df = pseudo_label(teacher, [*pool[:5], bad, *pool[5:10], bad], num_workers=2, bs=4)
    pd.testing.assert_frame_equal(df, pseudo_label(teacher, pool[:10]))


def test_damaged_images_of_an_earlier_call_are_reported(teacher, pool, tmp_path):
    bad, out = tmp_path / 'bad.png', tmp_path / 't.csv'
    bad.write_bytes(b'no image')
    items = [pool[0], bad, *pool[1:10]]
    _, handle = passes(teacher, 1)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label(teacher, items, out=out, bs=5)
    handle.remove()
    with pytest.warns(UserWarning, match=r'1 of 11 images can\'t be opened .*bad\.png \(found by an earlier call\)'):
        pd.testing.assert_frame_equal(pseudo_label(teacher, items, out=out), pseudo_label(teacher, pool[:10]))


def test_images_that_all_are_damaged_give_one_warning(teacher, tmp_path):
    (tmp_path / 'bad.png').write_bytes(b'no image')
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always', UserWarning)
        assert len(pseudo_label(teacher, [tmp_path / 'bad.png'] * 2)) == 0
    messages = [str(o.message) for o in w]
    assert [o.split("can't")[0] for o in messages if 'images' in o or 'kept' in o] == ['2 of 2 images ']


def test_a_threshold_that_keeps_nothing_warns(teacher, pool):
    with pytest.warns(UserWarning, match='No pseudo-label is kept: the largest confidence is 0'):
        assert len(pseudo_label(teacher, pool, threshold=1.0)) == 0


def test_names_that_csv_would_change(pool, tmp_path):
    names = dict(zip('0123456789', ['NA', 'null', '007', 'x,y', 'true', '', ' a', 'ä"', '1e3', 'None']))
    files = []
    for o in pool:
        files.append(tmp_path / f'{names[parent_label(o)]}, {o.name}')
        shutil.copy(o, files[-1])
    label = lambda o: o.name.rsplit(', ', 1)[0]
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=label, splitter=RandomSplitter(0.5, seed=0))
    dls = block.dataloaders(files, bs=8, num_workers=0)
    learn = Learner(dls, tiny_net(), metrics=accuracy, path=tmp_path)
    quiet_fit(learn, 3, 1e-2)
    df = pseudo_label(learn, files, soft=True, out=tmp_path / 't.csv')
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path / 't.csv'), df)
    assert len(with_pseudo_labels(dls, df, labeled=False).train_ds) == 50  # validation images are left out


def test_an_index_in_the_file_is_left_out(teacher, pool, tmp_path):
    table = pseudo_label(teacher, pool[:5], soft=True)
    table.to_csv(tmp_path / 't.csv')
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path / 't.csv'), table)


def test_classes_that_are_numbers(pool, tmp_path):
    label = lambda o: int(parent_label(o))
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=label, splitter=RandomSplitter(0.5, seed=0))
    dls = block.dataloaders(pool, bs=8, num_workers=0)
    learn = Learner(dls, tiny_net(), metrics=accuracy)
    df = pseudo_label(learn, pool, out=tmp_path / 't.csv')
    assert df.predicted.map(type).eq(int).all()
    pd.testing.assert_frame_equal(read_pseudo_labels(tmp_path / 't.csv', dls.vocab), df, check_dtype=False)
    both = df, read_pseudo_labels(tmp_path / 't.csv')
    a, b = (with_pseudo_labels(dls, o, labeled=False).train_ds.targets for o in both)
    assert a.tolist() == b.tolist()


def test_images_that_are_no_files(pool):
    pool = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
    images = [np.asarray(PILImageBW.create(o)) for o in pool]
    labels = [parent_label(o) for o in pool]
    rows = pd.DataFrame(dict(image=images, label=labels), index=[f'row {i}' for i in range(len(pool))])
    getters = dict(get_x=lambda r: r['image'], get_y=lambda r: r['label'])
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), splitter=IndexSplitter(range(50, 100)), **getters)
    dls = block.dataloaders(rows, bs=8, num_workers=0)
    learn = Learner(dls, tiny_net(), metrics=accuracy)
    df = pseudo_label(learn, rows[:50], soft=True)
    assert df.file.tolist() == [f'row {i}' for i in range(50)]
    with pytest.raises(ValueError, match='give the images with `items`'):
        with_pseudo_labels(dls, df.assign(file=range(50)), labeled=False)
    mixed = with_pseudo_labels(dls, df, labeled=False, items=rows[:50])
    assert len(mixed.train_ds) == 50 and mixed.one_batch()[1].shape == (8, 10)
    quiet_fit(Learner(mixed, tiny_net(), metrics=accuracy), 1)


def test_a_loaded_learner_labels(teacher, pool, tmp_path):
    expected = pseudo_label(teacher, pool)
    teacher.export(tmp_path / 'teacher.pkl')
    pd.testing.assert_frame_equal(pseudo_label(load_learner(tmp_path / 'teacher.pkl'), pool), expected)


def multi_label_dls(files):
    block = DataBlock(
        (ImageBlock(PILImageBW), MultiCategoryBlock),
        get_y=lambda o: [parent_label(o)],
        splitter=IndexSplitter(range(5)),
    )
    return block.dataloaders(list(files), bs=4, num_workers=0)


def dls_of_values():
    images = [(torch.zeros(1, 8, 8), 0.5)] * 8
    return DataLoaders.from_dsets(images, images, bs=4, num_workers=0)


def test_what_has_no_table(teacher, pool, make_dls):
    multi_label = Learner(multi_label_dls(pool), tiny_net())
    with pytest.raises(ValueError, match='several labels|a CategoryBlock'):
        pseudo_label(multi_label, pool)
    with pytest.raises(ValueError, match="False, True or 'logits'"):
        pseudo_label(teacher, pool, soft='probs')
    with pytest.raises(ValueError, match='is no table of pseudo-labels'):
        file = teacher.path / 'x.csv'
        file.write_text('a,b\n1,2\n')
        read_pseudo_labels(file)
    quiet_fit(teacher, 1, 1e-2)


def frame_without_index(files):
    return pd.DataFrame({'f': list(files)}, index=[0] * len(files))


@pytest.mark.parametrize(
    'call,exc,match',
    [
        (lambda t, p, df: pseudo_label(t.model, p), TypeError, 'must be a Learner, but is a Sequential'),
        (lambda t, p, df: pseudo_label(t, None), TypeError, '`items` must be a list of images'),
        (lambda t, p, df: pseudo_label(t, p[0]), TypeError, r'not the file .*: use `\[.*\]`'),
        (lambda t, p, df: pseudo_label(t, p, threshold='0.5'), ValueError, "a confidence, 0 to 1, but got '0.5'"),
        (lambda t, p, df: pseudo_label(t, p, bs=0), ValueError, '`bs` is a number of images'),
        (lambda t, p, df: pseudo_label(t, p, out=t.path), ValueError, '`out` must be a file'),
        (lambda t, p, df: pseudo_label(t, frame_without_index(p)), ValueError, 'have the same index'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df, mu=0), ValueError, '`mu` is how many'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df, strong='timm'), TypeError, '`strong` must make one PIL image'),
        (lambda t, p, df: with_pseudo_labels(t.dls, df, strong=FixMatchTransform()), TypeError, 'or the `.strong` of'),
        (
            lambda t, p, df: with_pseudo_labels(with_pseudo_labels(t.dls, df), df),
            ValueError,
            'hold pseudo-labels already',
        ),
        (lambda t, p, df: with_pseudo_labels(dls_of_values(), df), ValueError, 'whose target is a CategoryBlock'),
        (
            lambda t, p, df: with_pseudo_labels(multi_label_dls(t.dls.train_ds.items), df),
            ValueError,
            'a CategoryBlock|several labels',
        ),
        (lambda t, p, df: with_pseudo_labels(t.dls, df.to_dict('records')), TypeError, '`table` must be a DataFrame'),
        (
            lambda t, p, df: with_pseudo_labels(t.dls, df.assign(file=range(len(df))), items=p[:50]),
            ValueError,
            'names image 99, but `items` has 50',
        ),
        (lambda t, p, df: TableLabels(df[['file']]), TypeError, '`table` must be a DataFrame'),
        (lambda t, p, df: balance_classes(df.drop(columns='confidence')), TypeError, '`table` must be a DataFrame'),
    ],
)
def test_a_wrong_table_is_refused_in_a_sentence(teacher, pool, call, exc, match):
    with pytest.raises(exc, match=match) as e:
        call(teacher, pool, pseudo_label(teacher, pool))
    assert str(e.value).endswith('.')


def test_a_table_knows_files_by_any_path(teacher, pool):
    table = pseudo_label(teacher, pool)
    for o in (pool[2], os.path.relpath(pool[2]), str(pool[2])):
        assert TableLabels(table)(o) == table.predicted[2]
    row = pd.Series({'file': str(pool[2])})
    assert TableLabels(table, lambda o: 'labelled')(row) == 'labelled'
    with pytest.raises(ValueError, match='is not in the table of pseudo-labels'):
        TableLabels(table)(row)


def test_labels_of_a_soft_table(teacher, pool):
    "By name, for a block that needs no order; a `CategoryBlock` can't take them"
    table = pseudo_label(teacher, pool, soft=True)
    assert TableLabels(table)(pool[3]) == {o: table[f'prob_{o}'][3] for o in teacher.dls.vocab}
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=TableLabels(table))
    with pytest.raises(TypeError, match=r'needs `SoftCategoryBlock\(learn.dls.vocab\)`'):
        block.dataloaders(list(pool), num_workers=0)


def test_a_data_block_trains_on_the_table(teacher, pool, make_student):
    labeled, valid = teacher.dls.train_ds.items, teacher.dls.valid_ds.items
    hard, soft = pseudo_label(teacher, pool), pseudo_label(teacher, pool, soft=True)
    items = [*valid, *labeled, *pool]
    for table, block in ((hard, CategoryBlock), (soft, SoftCategoryBlock(teacher.dls.vocab))):
        splitter, get_y = IndexSplitter(range(len(valid))), TableLabels(table, parent_label)
        db = DataBlock((ImageBlock(PILImageBW), block), get_y=get_y, splitter=splitter)
        learn = make_student(db.dataloaders(items, bs=8, num_workers=0))
        quiet_fit(learn, 1, 1e-2)
        with learn.no_bar():
            right = [parent_label(o) == learn.predict(o)[0] for o in valid]
            assert learn.validate()[1] == pytest.approx(np.mean(right), abs=1e-6)
    assert learn.loss_func.__class__ is SoftCrossEntropyLoss


def test_labelled_images_keep_their_labels(teacher, pool):
    "Those in the table too are there once, with the true label; validation images are not trained on"
    labeled, valid = teacher.dls.train_ds.items, teacher.dls.valid_ds.items
    table = pseudo_label(teacher, [*pool, *labeled, *valid], soft=True).assign(predicted='0')
    dls = with_pseudo_labels(teacher.dls, table)
    apart = set(pool) - set(labeled) - set(valid)
    assert len(dls.train_ds) == len(labeled) + len(apart)
    hot = torch.stack([torch.as_tensor(dls.train_ds[i][1]) for i in range(len(labeled))])
    assert [teacher.dls.vocab[i] for i in hot.argmax(1)] == [parent_label(o) for o in labeled]
    assert (hot.max(1).values == 1).all()
    x, y = dls.one_batch()
    assert y.shape == (4, 10) and dls.train.n_batches == 20  # `repeat_train` stays
    assert dls.vocab == teacher.dls.vocab and dls.c == 10
    many = with_pseudo_labels(teacher.dls, table, bs=32)
    assert many.one_batch()[1].shape == (32, 10)
    assert many.train.n_batches == 20 and many.valid.bs == teacher.dls.valid.bs
    with pytest.raises(ValueError, match='`bs` is a number of images'):
        with_pseudo_labels(teacher.dls, table, bs=0)


@pytest.mark.parametrize('soft', [False, True])
def test_bytes_for_each_row_of_a_table(teacher, pool, soft):
    "Names stay in their column: a path for each would take 300 bytes"
    n, names = 5000, [f'/pool/images/{i:08d}.png' for i in range(5000)]
    table = pseudo_label(teacher, pool[:1], soft=soft).iloc[[0] * n].assign(file=names)
    gc.collect()
    tracemalloc.start()
    dls = with_pseudo_labels(teacher.dls, table)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    dls.train_ds.pool.tls[0].tfms.fs = []
    assert dls.train_ds.pool[n - 1] == (Path(names[-1]),)
    assert kept < 60 * n and peak < 120 * n, f'{kept / n:.0f} and {peak / n:.0f} bytes a row'


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


def in_frame(digits):
    "A learner's `dls` of rows of a DataFrame, and the rows of all its images and 30 others"
    few, rest = split_labeled(digits, parent_label, 40, seed=0)
    more, _ = split_labeled(rest, parent_label, 30, seed=0)
    frame = pd.DataFrame({'image': [o.name for o in few + more], 'folder': [str(o.parent) for o in few + more]})
    df = frame[:40].assign(label=[parent_label(o) for o in few])
    block = DataBlock(
        (ImageBlock(PILImageBW), CategoryBlock),
        get_x=lambda r: f'{r["folder"]}/{r["image"]}',
        get_y=ColReader('label'),
        splitter=IndexSplitter(range(0, 40, 2)),
    )
    return block.dataloaders(df, bs=4, num_workers=0), frame.sample(frac=1, random_state=0).reset_index(drop=True)


def in_memory(digits):
    "The same with arrays"
    few, rest = split_labeled(digits, parent_label, 40, seed=0)
    more, _ = split_labeled(rest, parent_label, 30, seed=0)
    opened = [np.array(PILImage.create(o)) for o in few + more]
    labels = {o.tobytes(): parent_label(f) for o, f in zip(opened, few)}
    label = lambda o: labels[o.tobytes()]
    block = DataBlock((ImageBlock, CategoryBlock), get_y=label, splitter=IndexSplitter(range(0, 40, 2)))
    return block.dataloaders(opened[:40], bs=4, num_workers=0), [o.copy() for o in opened]


def by_path(digits):
    "The same with files, which the pool spells in another way"
    few, rest = split_labeled(digits, parent_label, 40, seed=0)
    more, _ = split_labeled(rest, parent_label, 30, seed=0)
    splitter = IndexSplitter(range(0, 40, 2))
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock), get_y=parent_label, splitter=splitter)
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


def test_image_data_loaders_and_batch_transforms(pool, tmp_path):
    "Also with fastai's factory, random transforms and a short last batch"
    for o in pool[:60]:
        to = tmp_path / 'labeled' / parent_label(o) / o.name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(o, to)
    tfms = dict(item_tfms=Resize(32), batch_tfms=aug_transforms(size=28))
    dls = ImageDataLoaders.from_folder(tmp_path / 'labeled', valid_pct=0.3, seed=0, bs=8, num_workers=0, **tfms)
    make_learner = partial(vision_learner, arch='test_resnet', pretrained=False, metrics=accuracy, path=tmp_path)
    table = pseudo_label(make_learner(dls), pool[60:], soft=True)
    student = make_learner(with_pseudo_labels(dls, table))
    quiet_fit(student, 1, 1e-3)
    x, y = student.dls.one_batch()
    assert x.shape == (8, 3, 28, 28) and y.shape == (8, dls.c)


LOSSES = SoftCrossEntropyLoss, DistillationLoss, SoftFocalLoss, SoftBCELoss


@pytest.mark.parametrize('cls, mix', [*((o, None) for o in LOSSES), *zip(LOSSES, 2 * [MixUp, CutMix])])
def test_soft_losses_in_a_learner(teacher, pool, make_dls, cls, mix, tmp_path):
    dls = with_pseudo_labels(make_dls(), pseudo_label(teacher, pool, soft=True))
    metrics = [accuracy, F1Score(average='macro')]
    learn = Learner(dls, tiny_net(), loss_func=cls(), metrics=metrics, path=tmp_path, cbs=mix and mix())
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


def test_training_metrics_need_the_likeliest_class(teacher, pool):
    dls = with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True))
    learn = Learner(dls, tiny_net(), metrics=soft_accuracy)
    learn.recorder.train_metrics = True
    quiet_fit(learn, 1, 1e-2)
    assert len(learn.recorder.values[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize('way', ['with_pseudo_labels', 'DataBlock'])
def test_logits_train_and_validate(teacher, pool, make_student, way):
    "Trains on squared errors, validates by cross-entropy, and comes to predict what the teacher says"
    table = pseudo_label(teacher, pool, soft='logits')
    if way == 'DataBlock':
        valid = list(teacher.dls.valid_ds.items)
        block = DataBlock(
            (ImageBlock(PILImageBW), SoftCategoryBlock(teacher.dls.vocab)),
            get_y=TableLabels(table, parent_label),
            splitter=IndexSplitter(range(len(valid))),
        )
        dls = block.dataloaders([*valid, *(o for o in pool if o not in valid)], bs=8, num_workers=0)
    else:
        dls = with_pseudo_labels(teacher.dls, table, labeled=False)
        assert type(dls.loss_func) is LogitsMSELoss
        new = table[~table.file.isin(map(str, teacher.dls.valid_ds.items))]
        row = new[[f'logit_{o}' for o in dls.vocab]].to_numpy()[4]
        assert dls.train_ds[4][1].tolist() == row.tolist()
    learn = Learner(dls, tiny_net(), loss_func=LogitsMSELoss(), metrics=accuracy, path=make_student(dls).path)
    quiet_fit(learn, 1, 1e-2)
    first, loss, acc = learn.recorder.values[0]
    with learn.no_bar():
        probs, y = learn.get_preds()
    assert loss == pytest.approx(F.nll_loss(probs.log(), y).item(), rel=1e-3)
    assert acc == pytest.approx((probs.argmax(1) == y).float().mean().item())
    quiet_fit(learn, 8, 1e-2)
    assert learn.recorder.values[-1][0] < first / 2


def test_fixmatch_refuses_soft_labels(teacher, pool, make_student):
    learn = make_student(with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True)))
    learn.add_cb(FixMatch(teacher.dls.unlabeled_dl(pool, mu=1)))
    with pytest.raises(ValueError, match='looks like soft labels: FixMatch makes its own pseudo-labels'):
        quiet_fit(learn, 1)


def test_a_soft_network_may_name_more_than_one_class(teacher, pool):
    dls = with_pseudo_labels(teacher.dls, pseudo_label(teacher, pool, soft=True))
    learn = Learner(dls, tiny_net(), loss_func=SoftBCELoss(thresh=0.0))
    assert list(learn.predict(pool[0])[0]) == list(dls.vocab)


def test_balance_by_hand():
    confidence = [0.9, 0.8, 0.95, 0.7, 0.6, 0.5]
    table = pd.DataFrame(dict(file=list('abcdef'), predicted=list('xxxxyz'), confidence=confidence))
    assert balance_classes(table).file.tolist() == ['c', 'a', 'e', 'e', 'f', 'f']
    assert balance_classes(table, 1).file.tolist() == ['c', 'e', 'f']
    assert balance_classes(table).predicted.value_counts().nunique() == 1
    with pytest.raises(ValueError, match='1 or more'):
        balance_classes(table, 0)
