"A pool with files that can't be opened: batches stay full, the fit ends, and the files are told"

import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import quiet_fit
from fastai.vision.all import ImageDataLoaders, PILImageBW, parent_label
from PIL import Image

from fixmatch_fastai.all import FixMatchTransform, FlexMatch, weak_augment
from fixmatch_fastai.data import _collate_replaced, _Replacing


def huge(file, _):
    "A few kB that would be 400 megapixels"
    Image.new('1', (20000, 20000)).save(file)


DAMAGE = {
    'no image': lambda file, good: file.write_bytes(b'not an image at all'),
    'zero bytes': lambda file, good: file.write_bytes(b''),
    'cut short': lambda file, good: file.write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3]),
    'missing': lambda file, good: None,
    'a folder': lambda file, good: file.mkdir(),
    'a dead link': lambda file, good: file.symlink_to(file.with_name('nowhere.png')),
    'too large': huge,
}


@pytest.fixture
def damaged(tmp_path, pool):
    files = []
    for name, damage in DAMAGE.items():
        files.append(tmp_path / f'{name}.png')
        damage(files[-1], pool[0])
    return files


@pytest.mark.parametrize('num_workers', [0, 2])
def test_replaced_and_told(make_dls, make_learner, pool, damaged, num_workers):
    dls = make_dls(bs=4, n_batches=4)
    items = [*damaged[:3], *pool[:30], *damaged[3:]]  # the first, of which the size is learned, is damaged too
    loader = dls.unlabeled_dl(items, mu=7, tfm=FixMatchTransform(weak=weak_augment(flip=False)), num_workers=num_workers)
    learn = make_learner(dls=dls, loader=loader)
    with pytest.warns(UserWarning, match='could not be opened were replaced by others, 7 so far') as said:
        quiet_fit(learn, 2)
    assert len([o for o in said if 'could not be opened' in str(o.message)]) == 1
    assert learn.fix_match._recorder._steps[:, 6].tolist() == [28] * 8
    table = learn.fix_match.damaged
    assert [items[i] for i in table.index] == list(table.item) and sorted(table.item) == sorted(damaged)
    assert 'DecompressionBomb' in table.error[table.item == damaged[-1]].item()
    assert 'truncated' in table.error[[o.name == 'cut short.png' for o in table.item]].item()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet_fit(learn, 1)  # nothing new to tell


def test_files_that_vanish_in_training(make_dls, make_learner, pool, tmp_path):
    files = [tmp_path / f'{i}.png' for i in range(20)]
    for a, b in zip(pool, files):
        shutil.copy(a, b)
    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(files, mu=5, num_workers=0))
    quiet_fit(learn, 1)
    assert len(learn.fix_match.damaged) == 0
    for o in files[5:]:
        o.unlink()
    with pytest.warns(UserWarning, match='15 so far'):
        quiet_fit(learn, 1)


def test_replacement_counts_as_itself(make_dls, pool, damaged):
    "`idxs` and the truth are those of the image that is seen, which FlexMatch's memory needs"
    dls = make_dls()
    items = [*pool[:5], damaged[0]]
    loader = dls.unlabeled_dl(items, tfm=lambda img: (torch.tensor(np.array(img))[None],) * 2, label_func=parent_label)
    (weak, _), y, idxs = next(loader.stream())
    assert len(idxs) == 28 and 5 not in idxs.tolist()
    for img, c, i in zip(weak, y, idxs):
        assert np.array_equal(img[0], PILImageBW.create(items[i])) and dls.vocab[c] == parent_label(items[i])


def test_flexmatch_trains(make_dls, make_learner, pool, damaged):
    dls = make_dls()
    learn = make_learner(
        dls=dls, loader=dls.unlabeled_dl([*damaged, *pool[:10]], num_workers=0), fixmatch=dict(policy=FlexMatch(threshold=0.0), threshold=0.95)
    )
    with pytest.warns(UserWarning, match='could not be opened'):
        quiet_fit(learn, 2)
    counts = learn.fix_match.policy.counts
    assert counts.sum() == 17 and counts[-1] >= 7  # damaged ones are never learned


def test_nothing_readable(make_dls, damaged):
    with pytest.raises(
        ValueError,
        match=r'None of 7 unlabelled images that were tried can be opened; place 0 of the pool for this reason: UnidentifiedImageError.*Check the files',
    ):
        make_dls().unlabeled_dl(damaged)


def test_nothing_readable_any_more(make_dls, make_learner, pool, tmp_path):
    "All files go while training: the fit ends with a sentence, and the learner stays usable"
    files = [tmp_path / f'{i}.png' for i in range(3)]
    for a, b in zip(pool, files):
        shutil.copy(a, b)
    dls = make_dls()
    learn = make_learner(dls=dls, loader=dls.unlabeled_dl(files, num_workers=0))
    for o in files:
        o.unlink()
    with pytest.raises(ValueError, match='None of 3 unlabelled images that were tried can be opened'):
        quiet_fit(learn, 1)
    assert len(learn.validate()) == 2


def test_tries_are_bounded(make_dls, pool):
    views = make_dls().unlabeled_dl(pool[:1]).dataset
    tried = []

    class Broken(type(views.dataset)):
        pass

    def failing(i):
        tried.append(i)
        raise OSError('gone')

    views._item = failing
    with pytest.raises(ValueError, match='None of 1 unlabelled'):
        _Replacing(views)[0]
    assert len(tried) == 100


def test_one_pass_is_strict(make_dls, pool, damaged):
    "Iterating the loader, and a labelled file that can't be opened, are errors: there each image is asked for by name"
    dls = make_dls()
    with pytest.raises(FileNotFoundError, match='missing.png'):
        list(dls.unlabeled_dl([*pool[:5], damaged[3]]))
    labeled = ImageDataLoaders.from_path_func('.', [*pool[:9], damaged[3]], lambda o: o.parent.name, valid_pct=0.5, bs=2, num_workers=0, img_cls=PILImageBW)
    with pytest.raises(FileNotFoundError, match='missing.png'):
        list(labeled.train) + list(labeled.valid)


def test_shown_too(make_dls, pool, damaged):
    make_dls().unlabeled_dl([*pool[:3], *damaged]).show_batch()


def test_errors_of_a_view_transform_are_no_damage(make_dls, pool):
    def tfm(img):
        raise ZeroDivisionError('a mistake in the transform')

    with pytest.raises(ZeroDivisionError, match='mistake'):
        next(make_dls().unlabeled_dl(pool[:3], tfm=tfm, num_workers=0).stream())


def test_collated(make_dls, pool, damaged):
    views = make_dls().unlabeled_dl([*pool[:3], damaged[0]]).dataset
    batch, told = _collate_replaced([_Replacing(views)[i] for i in range(4)])
    assert len(batch[0]) == 4 and list(told) == [3]
