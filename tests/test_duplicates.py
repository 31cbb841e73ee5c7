"Images that are in two sets: by path, by pixels, by what they look like"

import random

import numpy as np
import pandas as pd
import pytest
from fastai.vision.all import L, Path, parent_label
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from fixmatch_fastai.all import split_labeled
from fixmatch_fastai.duplicates import (
    DatasetImages,
    Hashes,
    images_of,
    in_both,
    near_images,
    pairs,
    perceptual_hash,
    repeated_images,
    same_images,
    sample_idxs,
    shared_files,
)


@pytest.fixture
def valid(make_dls):
    "20 images of a learner's validation set"
    return make_dls().valid_ds


@pytest.fixture
def others(digits, valid):
    "Images that are not among these"
    return split_labeled(L(o for o in digits if o not in valid.items), parent_label, 30)[0]


def of_files(files, n=1000, phash=None):
    return Hashes(DatasetImages(files, lambda i: Image.open(files[i])), n, phash)


def of_dataset(ds, n=1000, phash=None):
    return Hashes(images_of(ds), n, phash)


@pytest.mark.parametrize('n, most', [(0, 3), (3, 3), (10, 3)])
def test_sample(n, most):
    state = random.getstate()
    idxs = list(sample_idxs(n, most))
    assert len(idxs) == min(n, most) and idxs == sorted(set(idxs)) and set(idxs) <= set(range(n))
    assert list(sample_idxs(n, most)) == idxs and random.getstate() == state


def test_paths_of_what_has_some():
    files = L('a/b/1.png', Path('c/2.png'), '3.png')
    images = DatasetImages(files, None)
    assert images.paths() == {i: str(o) for i, o in enumerate(files)}
    assert len(images.paths(2)) == 2 and images.paths(2).items() <= images.paths().items()
    assert [images.name(i) for i in range(3)] == ['b/1.png', 'c/2.png', '3.png']
    for items in ([], [np.zeros((2, 2))], pd.DataFrame({'file': ['a.png']})):
        assert DatasetImages(items, None).paths() == {}
    assert DatasetImages([np.zeros((2, 2))], None).name(0) == 'the one at place 0'


def test_images_of_a_learner(valid):
    images = images_of(valid)
    assert len(images) == 20 and images.item(3) == valid.items[3]
    assert images.get(3).tobytes() == Image.open(valid.items[3]).tobytes()
    assert images_of(valid.tls[0]).paths() == images.paths()
    assert images_of([1, 2]) is None and images_of(None) is None


def test_images_of_a_folder_and_of_a_part(valid, others, tmp_path):
    (tmp_path / 'a').mkdir()
    for o in [*others[:10], *valid.items[:3]]:
        (tmp_path / 'a' / f'{o.parent.name}_{o.name}').write_bytes(o.read_bytes())
    folder = ImageFolder(tmp_path)
    names = [Path(o).name for o, _ in folder.samples]
    shared = [names.index(f'{o.parent.name}_{o.name}') for o in valid.items[:3]]
    found = in_both(of_dataset(folder), of_dataset(valid))
    assert sorted(found.pool) == sorted(shared) and set(found.how) == {'same'}
    some = Subset(folder, [i for i in range(13) if i not in shared] + shared[:1])
    assert in_both(of_dataset(some), of_dataset(valid)).values.tolist() == [[10, 0, 'same']]


def test_same_path_needs_no_opening(valid):
    valid = images_of(valid)
    files = [valid.item(3), Path('gone.png'), valid.item(0)]
    assert same_images(of_files(files, n=0), Hashes(valid, 0)) == {0: 3, 2: 0}


def test_same_pixels(valid, others, tmp_path):
    Image.open(valid.items[3]).save(tmp_path / 'other_name.bmp')
    a, b = of_files(others + L(tmp_path / 'other_name.bmp')), of_dataset(valid)
    assert same_images(a, b) == {30: 3} and in_both(a, b).values.tolist() == [[30, 3, 'same']]


def test_other_sizes_are_not_the_same():
    wide, high = (DatasetImages([0], lambda i, size=size: Image.new('L', size)) for size in ((4, 2), (2, 4)))
    assert same_images(Hashes(wide, 1), Hashes(high, 1)) == {}


def test_near_is_two_bits_of_64():
    "Images of 64 black and white pixels, whose looks are the pixels themselves"

    def hashes(*changed):
        pixels = np.zeros((len(changed), 8, 8), np.uint8)
        for o, n in zip(pixels, changed):
            o.flat[:n] = 255
        images = DatasetImages(changed, lambda i: Image.fromarray(pixels[i]))
        return Hashes(images, 100, lambda img: np.where(np.array(img.convert('L')).ravel() > 0, 1, -1))

    assert near_images(hashes(0, 2, 3, 10, 64), hashes(12, 0)) == {0: 1, 1: 1, 3: 0}
    assert near_images(hashes(4), hashes(2, 5, 6)) == {0: 1}  # the nearest
    assert near_images(hashes(0), hashes()) == near_images(hashes(), hashes(0)) == {}
    assert in_both(hashes(1, 2), hashes(2)).values.tolist() == [[1, 0, 'same'], [0, 0, 'near']]  # once


def test_looks_of_saved_images(valid, others, tmp_path):
    pytest.importorskip('imagehash')
    img = Image.open(valid.items[3])
    img.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / 'large.jpg')
    phash = perceptual_hash()
    a, b = of_files(others + L(tmp_path / 'large.jpg'), phash=phash), of_dataset(valid, phash=phash)
    assert near_images(a, b)[30] == 3 and same_images(a, b) == {}
    assert near_images(of_files(others), b) == {}  # without looks


def test_damaged(others, tmp_path):
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'half.png').write_bytes(others[0].read_bytes()[:40])
    files = [tmp_path / 'empty.png', others[1], tmp_path / 'half.png']
    hashes = of_files(files)
    assert list(hashes.damaged.index) == [0, 2] and list(hashes.damaged['item']) == [files[0], files[2]]
    assert all('Error: ' in o for o in hashes.damaged.error)
    assert hashes.n == 3 and str(hashes) == '3' and list(hashes.pixels) == [1]
    assert str(of_files(files, 2)) == '2 of 3' and of_files(others).damaged.empty


def test_twice_in_one_set(valid, others, tmp_path):
    pytest.importorskip('imagehash')
    Image.open(others[0]).save(tmp_path / 'pixels.bmp')
    Image.open(others[1]).resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / 'near.jpg')
    files = [*others[:5], tmp_path / 'pixels.bmp', others[2], tmp_path / 'near.jpg', tmp_path / 'pixels.bmp']
    hashes = of_files(files, phash=perceptual_hash())
    assert repeated_images(hashes) == {5: 0, 6: 2, 8: 0}, 'each with the first'
    assert pairs(hashes) == [(5, 0, 'same'), (6, 2, 'same'), (8, 0, 'same'), (7, 1, 'near')]
    assert pairs(of_files(others)) == [] and pairs(of_files([])) == []


def test_files_are_compared_unopened(valid, others, tmp_path):
    copy, large, other = (tmp_path / o for o in ('copy.png', 'large.bin', 'other.bin'))
    copy.write_bytes(others[3].read_bytes())
    noise = np.random.default_rng(0).integers(0, 256, 3 * 2**20, dtype=np.uint8).tobytes()
    large.write_bytes(noise)
    other.write_bytes(noise[:-1] + bytes([noise[-1] ^ 1]))  # the last byte of 3 MB
    a, b = of_files([copy, large, Path('gone.png')], n=0), of_files([*others[:5], other], n=0)
    a.files, b.files = shared_files(a.images.paths(), b.images.paths())
    assert set(a.files) == {0, 1} and {3, 5} <= set(b.files)
    assert same_images(a, b) == {0: 3} and pairs(a, b) == [(0, 3, 'same')]
    assert shared_files() == [] and shared_files({}, {0: tmp_path}) == [{}, {}]


def test_watched(others):
    seen = []
    of_files = Hashes(DatasetImages(others, lambda i: Image.open(others[i])), 7, watch=lambda o: seen.extend(o) or o)
    assert len(seen) == 7 == len(of_files.pixels) == len(of_files.kinds) and set(of_files.sizes.values()) == {(16, 16)}
