"Images of an experiment: torchvision's files, folders, what a learner keeps of them"

import pickle
import re
import shutil
from multiprocessing import context
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision.datasets as tv
from conftest import quiet_fit
from fastai.vision.all import PILImage, load_learner, parent_label
from PIL import Image

from fixmatch_fastai.console import CommandError
from fixmatch_fastai.experiment.config import ExperimentConfig, ViewsConfig, resolved
from fixmatch_fastai.experiment.datasets import ArrayImages, class_files, load_images, make_dataloaders
from fixmatch_fastai.experiment.run import get_learner, run

pytest.importorskip('omegaconf', reason='omegaconf is not installed')


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small(**kwargs):
    short = dict(data='digits', n_labels=20, network='small_cnn', bs=4, mu=2, steps=6, eval_every=2, workers=0)
    return ExperimentConfig(**{**short, **kwargs})


def mistake(**kwargs):
    "The sentence that refuses the images of a configuration"
    with pytest.raises(CommandError) as e:
        load_images(ExperimentConfig(**kwargs))
    assert '\n' not in str(e.value)
    return str(e.value)


# --- torchvision's data sets


@pytest.fixture(scope='module')
def shapes():
    "Images with the sizes of each data set, of no meaning: 20 of each class of ten"
    rng = np.random.default_rng(0)
    return lambda n, size: rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def write_cifar(root, imgs, y, coarse):
    "Python batches as they are in the archive: rows of 3,072 bytes, red first, in five files and one"
    folder = root / ('cifar-100-python' if coarse else 'cifar-10-batches-py')
    folder.mkdir(parents=True)
    rows = imgs.transpose(0, 3, 1, 2).reshape(len(imgs), -1)
    n = len(y) * 4 // 5
    parts = (
        {'train': slice(0, n), 'test': slice(n, None)}
        if coarse
        else {
            **{f'data_batch_{i + 1}': slice(i * n // 5, (i + 1) * n // 5) for i in range(5)},
            'test_batch': slice(n, None),
        }
    )
    for name, part in parts.items():
        entry = {'data': rows[part], ('fine_labels' if coarse else 'labels'): [int(o) for o in y[part]]}
        (folder / name).write_bytes(pickle.dumps(entry, protocol=2))
    names = (
        {'fine_label_names': [f'kind {i}' for i in range(100)]}
        if coarse
        else {'label_names': 'airplane automobile bird cat deer dog frog horse ship truck'.split()}
    )
    (folder / ('meta' if coarse else 'batches.meta')).write_bytes(pickle.dumps(names, protocol=2))


def write_svhn(root, imgs, y):
    from scipy.io import savemat

    root.mkdir(parents=True)
    n = len(y) * 4 // 5
    for name, part in (('train', slice(0, n)), ('test', slice(n, None))):
        labels = np.where(y[part] == 0, 10, y[part]).astype(np.uint8)[:, None]  # the digit 0 is class 10 there
        savemat(root / f'{name}_32x32.mat', {'X': imgs[part].transpose(1, 2, 3, 0), 'y': labels})


def write_stl10(root, imgs, y, n_unlabeled):
    "Bytes, channel first, then column by column; labels from 1; folds as lines of places"
    folder = root / 'stl10_binary'
    folder.mkdir(parents=True)
    raw = imgs.transpose(0, 3, 2, 1)
    n = (len(imgs) - n_unlabeled) * 4 // 5
    raw[:n].tofile(folder / 'train_X.bin')
    raw[n : len(imgs) - n_unlabeled].tofile(folder / 'test_X.bin')
    raw[len(imgs) - n_unlabeled :].tofile(folder / 'unlabeled_X.bin')
    (y[:n] + 1).astype(np.uint8).tofile(folder / 'train_y.bin')
    (y[n : len(imgs) - n_unlabeled] + 1).astype(np.uint8).tofile(folder / 'test_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join('airplane bird car cat deer dog horse monkey ship truck'.split()))
    (folder / 'fold_indices.txt').write_text(
        '\n'.join(' '.join(str((10 * k + i) % n) for i in range(40)) for k in range(10))
    )


@pytest.fixture
def torchvision_files(tmp_path, monkeypatch, shapes):
    "A folder with all four, and no check that these are the originals"
    for module in (tv.cifar, tv.svhn, tv.stl10, tv.utils):
        monkeypatch.setattr(module, 'check_integrity', lambda *args, **kwargs: True)
    y = np.arange(200) % 10
    imgs = {32: shapes(400, 32), 96: shapes(130, 96)}
    write_cifar(tmp_path / 'sets' / 'cifar10', imgs[32][:200], y, False)
    write_cifar(tmp_path / 'sets' / 'cifar100', imgs[32], np.arange(400) % 100, True)
    write_svhn(tmp_path / 'sets' / 'svhn', imgs[32][:200], y)
    write_stl10(tmp_path / 'sets' / 'stl10', imgs[96], y[:100], 30)
    return tmp_path / 'sets', imgs


EXPECTED = dict(  # training and test images, pool, and the class of the first training image
    cifar10=(160, 40, 160, 'airplane'),
    cifar100=(320, 80, 320, 'kind 0'),
    svhn=(160, 40, 160, '0'),
    stl10=(80, 20, 110, 'airplane'),
)


@pytest.mark.parametrize('data', EXPECTED)
def test_images_of_torchvisions_sets(torchvision_files, data):
    root, imgs = torchvision_files
    n_labels = 100 if data == 'cifar100' else 20
    images = load_images(ExperimentConfig(data=data, root=str(root)))
    n_train, n_test, n_pool, first = EXPECTED[data]
    labeled, pool = images.split(n_labels, 0)
    assert (len(images.train), len(images.test), len(pool)) == (n_train, n_test, n_pool)
    assert set(labeled) <= set(pool) and parent_label(images.train[0]) == first
    assert len(images.classes) == (100 if data == 'cifar100' else 10)
    own = imgs[96 if data == 'stl10' else 32]
    for i in (0, 17, n_train - 1):
        assert np.array_equal(np.array(images.opener(images.train[i])), own[i]), 'the image, the right way up'
    assert np.array_equal(np.array(images.opener(images.test[3])), own[n_train + 3])


@pytest.mark.slow
@pytest.mark.parametrize('data', EXPECTED)
def test_torchvisions_sets_train(torchvision_files, data, undrawn):
    n_labels, views = 100 if data == 'cifar100' else 20, ViewsConfig(device=data == 'svhn')
    short = dict(steps=2, eval_every=1, network='wrn_10_1')
    row = run(small(data=data, root=str(torchvision_files[0]), n_labels=n_labels, views=views, **short))
    n_train, n_test, n_pool, _ = EXPECTED[data]
    assert row['n_test'] == n_test and 0 <= row['accuracy'] <= 1
    scores = pd.read_csv(Path('experiments') / f'{data}_{n_labels}_fixed' / 'seed_0' / 'scores.csv')
    assert len(scores) == n_pool and scores.truth.notna().sum() == n_train - n_labels


def test_official_choices_of_stl10(torchvision_files):
    root, imgs = torchvision_files
    images = load_images(small(data='stl10', root=str(root)))
    first, fourth = (images.split(40, o)[0] for o in (0, 3))
    assert first == images.train[list(range(40))] and fourth == images.train[list(range(30, 70))], (
        'the official choices'
    )
    assert len(images.split(20, 3)[0]) == 20, 'other numbers are drawn'
    with pytest.raises(CommandError, match='10 official choices of 40 labels'):
        images.split(40, 10)
    assert np.array_equal(np.array(images.opener(images.unlabeled[5])), imgs[96][105])
    assert {parent_label(o) for o in images.unlabeled} == {'unknown'}


@pytest.mark.slow
def test_a_learner_trained_on_arrays(torchvision_files, tmp_path):
    "It is small, and opens files; workers get the arrays, also where they are no forks"
    root, imgs = torchvision_files
    config = small(data='cifar10', root=str(root), network='wrn_10_1', workers=1, steps=2, eval_every=2)
    learn = get_learner(config)
    quiet_fit(learn, 1)
    learn.export(tmp_path / 'learner.pkl')
    assert (tmp_path / 'learner.pkl').stat().st_size < 1_500_000
    assert learn.dls.valid_ds[0][0].size == (32, 32), 'they are still there'
    Image.fromarray(imgs[32][0]).save(tmp_path / 'a.png')
    loaded = load_learner(tmp_path / 'learner.pkl')
    with loaded.no_bar(), learn.no_bar():
        expected = learn.predict(PILImage.create(tmp_path / 'a.png'))[2]
        for o in (tmp_path / 'a.png', str(tmp_path / 'a.png'), PILImage.create(tmp_path / 'a.png')):
            torch.testing.assert_close(loaded.predict(o)[2], expected)


def test_arrays_go_to_spawned_workers_only(monkeypatch):
    opener = ArrayImages({'train': np.zeros((1, 4, 4, 3), dtype=np.uint8)})
    assert pickle.loads(pickle.dumps(opener)).arrays == {}
    monkeypatch.setattr(context, 'get_spawning_popen', lambda: object())
    assert pickle.loads(pickle.dumps(opener)).arrays['train'].shape == (1, 4, 4, 3)


def test_no_internet(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError('no route')

    monkeypatch.setattr(tv.cifar, 'download_and_extract_archive', offline)
    sentence = mistake(root=str(tmp_path))
    assert sentence.startswith("data cifar10 can't be had (URLError: ") and 'no route' in sentence
    assert "connect to the internet, or put torchvision's files into" in sentence


# --- folders


@pytest.fixture
def folder(tmp_path):
    "Class folders: 8 colour images of each of two classes to train on, 4 to test on, 6 without a class"
    rng = np.random.default_rng(1)
    for part, n in (
        ('train/red', 8),
        ('train/blue', 8),
        ('test/red', 4),
        ('test/blue', 4),
        ('unlabeled/some/where', 6),
    ):
        (tmp_path / 'own' / part).mkdir(parents=True)
        for i in range(n):
            a = rng.integers(0, 200, (16, 16, 3), dtype=np.uint8)
            a[..., 0 if 'red' in part else 2] += 50
            Image.fromarray(a).save(tmp_path / 'own' / part / f'{i}.png')
    return tmp_path / 'own'


def test_a_folder_of_ones_own(folder):
    images = load_images(small(data=str(folder)))
    assert (len(images.train), len(images.test), len(images.unlabeled), images.grey) == (16, 8, 6, False)
    labeled, pool = images.split(4, 0)
    assert len(labeled) == 4 and len(pool) == 22 and images.classes == ['blue', 'red']
    a = np.stack([np.array(Image.open(o)) for o in images.train]) / 255
    np.testing.assert_allclose(images.stats, (a.mean((0, 1, 2)), a.std((0, 1, 2))), rtol=1e-6)


def test_a_folder_trains(folder):
    config = small(data=str(folder), n_labels=4, size=16, views=ViewsConfig(cache=True))
    learn = get_learner(config)
    quiet_fit(learn, 1)
    assert len(learn.fix_match.history) == 2 and learn.dls.vocab == ['blue', 'red']
    assert len(learn.dls.valid_ds) == 8 and len(learn.pool.dataset) == 22


def test_class_folders_without_a_test_set(folder):
    images = load_images(small(data=str(folder / 'train')))
    assert sorted(map(parent_label, images.test)) == ['blue', 'blue', 'red', 'red'] and len(images.train) == 12
    assert not set(images.test) & set(images.train)
    again = load_images(small(data=str(folder / 'train'), seed=5))
    assert again.test == images.test, 'the same for all seeds'


def test_mistakes_in_a_folder(folder):
    Image.new('RGB', (20, 16)).save(folder / 'train/red/wide.png')
    assert 'such as 16×16 and 20×16: give size, as size=64' in mistake(data=str(folder))
    assert load_images(small(data=str(folder), size=16)).stats
    (folder / 'test/green').mkdir()
    Image.new('RGB', (16, 16)).save(folder / 'test/green/0.png')
    assert "test/ has a class 'green'" in mistake(data=str(folder), size=16)
    assert 'two classes or more' in mistake(data=str(folder / 'unlabeled'))
    assert 'two classes or more' in mistake(data=str(folder / 'train/red'))
    (folder / 'test').rename(folder / 'elsewhere')
    assert 'has train/, but no test/' in mistake(data=str(folder))


def test_mistakes_in_the_name_and_the_number_of_labels():
    assert 'data cifar_10 is not known: did you mean cifar10' in mistake(data='cifar_10')
    images = load_images(small())
    for n, sentence in ((25, 'n_labels: 25 labels'), (1400, "images of '0' (")):
        with pytest.raises(CommandError, match=re.escape(sentence)):
            images.split(n)


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize('size', [None, 16])
def test_a_damaged_image_with_a_label(folder, part, size):
    (folder / part / 'blue/broken.png').write_bytes(b'no image')
    sentence = mistake(data=str(folder), n_labels=4, size=size)
    why = r'UnidentifiedImageError: cannot identify image file'
    assert re.search(rf"The labelled image .*broken\.png can't be opened \({why}\): mend it", sentence)


def test_images_by_class(folder):
    found = class_files(folder / 'train')
    assert list(found) == ['blue', 'red']
    assert [o.name for o in found['red']] == [f'{i}.png' for i in range(8)]
    (folder / 'train/.hidden').mkdir()
    (folder / 'train/empty').mkdir()
    Image.new('RGB', (16, 16)).save(folder / 'train/.hidden/0.png')
    assert class_files(folder / 'train') == found
    assert list(class_files(folder / 'unlabeled', recurse=True)) == ['where'], 'the innermost folder'
    shutil.copytree(folder / 'train', folder / 'deeper' / 'all')
    for o, sentence in (
        (folder / 'unlabeled', 'holds no folder with images: put the images of each class in a folder of their own'),
        (folder / 'deeper', r'holds no folder with images, but .*deeper/all does: give that'),
        (folder / 'nothing', 'is not a folder: give one that holds a folder of images for each class'),
    ):
        with pytest.raises(CommandError, match=f'^{re.escape(str(o))} {sentence}'):
            class_files(o)


def test_grey_images(tmp_path):
    for k, c in enumerate('ab'):
        (tmp_path / 'grey' / c).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((16, 16), 40 * k + i, dtype=np.uint8)).save(tmp_path / 'grey' / c / f'{i}.png')
    config = small(data=str(tmp_path / 'grey'), n_labels=4)
    images = load_images(config)
    assert images.grey and len(images.stats[0]) == 1
    assert get_learner(config, images).model[0][0].in_channels == 1


def test_loaders_are_as_configured():
    c = resolved(small(mu=3))
    dls, unlabeled_dl = make_dataloaders(c, load_images(c))
    assert (len(dls.train_ds), len(dls.train), dls.train.bs, unlabeled_dl.bs) == (20, 2, 4, 12)
    assert len(unlabeled_dl.dataset) == 1300, 'the pool holds the labelled images too'
    assert unlabeled_dl.dataset.tfm.strong.name == 'google' and not unlabeled_dl.dataset.tfm.weak.flip
    assert dls.valid.after_batch.fs[-1].mean.flatten().tolist() == pytest.approx([0.3])
