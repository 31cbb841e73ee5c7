"What images are listed by, and what tells one from another"

import copy
import os
from collections import deque

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, ItemGetter, L
from PIL import Image

from fixmatch_fastai.items import by_class, image_fingerprint, image_identities, image_identity, listed

NAMES = [f'{o}.png' for o in 'abcde']
ONCE = dict.fromkeys(NAMES)
FORMS = {
    'list': NAMES,
    'L': L(NAMES),
    'tuple': tuple(NAMES),
    'set': set(NAMES),
    'frozenset': frozenset(NAMES),
    'generator': (o for o in NAMES),
    'map': map(str, NAMES),
    'keys': ONCE.keys(),
    'values': {o: o for o in NAMES}.values(),
    'deque': deque(NAMES),
    'array': np.array(NAMES),
    'array of objects': np.array(NAMES, dtype=object),
    'Index': pd.Index(NAMES),
    'Series': pd.Series(NAMES, index=[4, 3, 2, 1, 0]),
    'Series of strings': pd.Series(NAMES, dtype='string'),
    'categories': pd.Series(NAMES, dtype='category'),
}


@pytest.mark.parametrize('items', FORMS.values(), ids=FORMS)
def test_listed_in_an_order_that_stays(items):
    found = listed(items)
    assert [found[i] for i in range(len(found))] == NAMES and all(type(o) is str for o in found)


REFUSED = {
    'a folder': ('images', 'use `get_image_files'),
    'a dict': (ONCE, r'is a dict: use for example `list\(items.values\(\)\)`'),
    'nothing': (None, 'is a NoneType'),
    'a number': (5, 'is a int'),
    'bytes': (b'abc', 'is a bytes'),
    'a PIL image': (Image.new('L', (4, 4)), r'use `\[image\]`'),
    'an image in grey': (np.zeros((8, 8), np.uint8), r'use `\[image\]`'),
    'an image in colour': (np.zeros((8, 8, 3), np.uint8), r'use `\[image\]`'),
    'a tensor': (torch.zeros(8, 8), r'use `\[image\]`'),
    'a set of others': ({1, 2}, 'give a list'),
}


@pytest.mark.parametrize('items,says', REFUSED.values(), ids=REFUSED)
def test_no_list_of_images(items, says):
    with pytest.raises(TypeError, match=says):
        listed(items)


def test_tables_and_stacks_stay_as_they_are():
    for items in (pd.DataFrame(dict(a=[1])), np.zeros((3, 8, 8)), np.zeros((3, 8, 8, 3)), torch.zeros(3, 1, 8, 8)):
        assert listed(items) is items


# --- sorted ----------------------------------------------------------------------------------------------------------


def rows(df, idxs):
    return [tuple(map(str, df.iloc[i][['name', 'n']])) for i in idxs]


def test_rows_of_a_class_whatever_the_order_of_the_table():
    "Also with rows that are there twice, columns of mixed kinds, missing values, and images in a cell"
    dots = [np.full((2, 2), i, np.uint8) for i in range(12)]
    df = pd.DataFrame(dict(name=['b', 3, None, 'a'] * 3, n=[1.5, 2, 2, 1.5] * 3, y=['x', 'y'] * 6, image=dots))
    df.loc[7] = df.loc[3]
    expected = {c: rows(df, idxs) for c, idxs in by_class(df, lambda row: row.y).items()}
    assert list(expected) == ['x', 'y']
    for seed in range(6):
        other = df.sample(frac=1, random_state=seed, ignore_index=seed % 2 == 0)[['image', 'y', 'n', 'name']]
        assert {c: rows(other, idxs) for c, idxs in by_class(other, lambda row: row.y).items()} == expected


def test_a_column_of_mixed_kinds_is_sorted_too():
    column = pd.Series(['b', 3, None, 'a', 2.5])
    expected = [str(column[i]) for i in by_class(column, lambda o: 0)[0]]
    for seed in range(4):
        other = column.sample(frac=1, random_state=seed)
        assert [str(other.iloc[i]) for i in by_class(other, lambda o: 0)[0]] == expected


def test_arrays_stay_in_their_order():
    assert by_class(np.zeros((5, 8, 8)), lambda o: 0) == {0: [0, 1, 2, 3, 4]}
    assert by_class([3, 10, 2], lambda o: o > 2) == {False: [2], True: [0, 1]}


def test_what_label_func_may_not_do():
    with pytest.raises(TypeError, match=r"one class for each item, but it returned \['a'\] for a.png"):
        by_class(NAMES, lambda o: ['a'])
    with pytest.raises(ValueError, match=r'`label_func` fails for c.png \(KeyError: '):
        by_class(NAMES, {o: 0 for o in 'a.png b.png'.split()}.__getitem__)
    with pytest.raises(ValueError, match=r'`label_func` fails for item 0 \(ZeroDivisionError'):
        by_class(np.zeros((5, 8, 8)), lambda o: 1 / 0)


# --- told apart ------------------------------------------------------------------------------------------------------


def dataset(items, get_x=None):
    return DataBlock(ImageBlock, get_x=get_x, splitter=IndexSplitter([])).datasets(items).train


@pytest.fixture
def images(tmp_path):
    "Three files, and other ways to the second"
    folder = tmp_path / 'folder'
    folder.mkdir()
    files = [folder / o for o in NAMES[:3]]
    for i, o in enumerate(files):
        Image.new('L', (4, 4), i).save(o)
    (tmp_path / 'link of another name.png').symlink_to(files[1])
    (tmp_path / 'linked').symlink_to(folder)
    return files


WAYS = ['{folder}/b.png', '{folder}/../folder/b.png', 'folder/b.png', 'link of another name.png', 'linked/b.png']


@pytest.mark.parametrize('way', WAYS)
def test_one_file_however_its_path_is_written(images, way, monkeypatch):
    folder = images[0].parent
    monkeypatch.chdir(folder.parent)
    other = way.format(folder=folder)
    assert image_identity(None, other) in image_identities(dataset(images[:2]))
    assert image_identity(None, images[1]) in image_identities(dataset([other]))
    assert image_identity(None, other) not in image_identities(dataset(images[::2]))


def test_images_of_tables_tuples_and_memory(images):
    table = pd.DataFrame(dict(file=images))
    by_row = dataset(table, lambda row: row.file)
    by_tuple = dataset([(o, 'cat') for o in images], ItemGetter(0))
    assert image_identities(by_row) == image_identities(by_tuple) == image_identities(dataset(images))
    pixels = np.stack([np.array(Image.open(o)) for o in images])
    by_number = dataset([0, 1, 2], lambda i: pixels[i])
    assert image_identities(by_number) == image_identities(dataset([*pixels])) and len(image_identities(by_number)) == 3
    assert image_identity(by_number, 1) == image_identity(None, torch.from_numpy(pixels[1].copy()))


def test_what_can_not_be_told_apart(images):
    by_row = dataset(pd.DataFrame(dict(file=images)), lambda row: row.file)
    assert image_identity(by_row, 3) is None and image_identity(None, 3) is None
    assert image_identities(None) == image_identities(torch.utils.data.TensorDataset(torch.zeros(2))) == set()


GREY = np.arange(16, dtype=np.uint8).reshape(2, 8)
PALETTE = Image.fromarray(GREY).convert('P')
OTHER_PALETTE = PALETTE.copy()
OTHER_PALETTE.putpalette(list(range(255, -1, -1)) * 3)
UNLIKE = {
    'pixels': (GREY, GREY + 1),
    'shape': (GREY, GREY.reshape(4, 4)),
    'type': (GREY, GREY.astype(np.uint16)),
    'tensors': (torch.tensor(GREY), torch.tensor(GREY).flip(0)),
    'a type without numpy': (torch.ones(3, 3).bfloat16(), torch.zeros(3, 3).bfloat16()),
    'PIL images': (Image.fromarray(GREY), Image.fromarray(GREY.T)),
    'palettes': (PALETTE, OTHER_PALETTE),
    'rows': (pd.Series({'image': GREY, 'name': 'a'}), pd.Series({'image': GREY, 'name': 'b'})),
    'pixels of rows': (pd.Series({'image': GREY}), pd.Series({'image': GREY[::-1]})),
    'dicts': ({'image': GREY}, {'image': GREY + 1}),
    'numbers': (1, 2),
    'names': ('caf\udce9', 'caf\\udce9'),
}


@pytest.mark.parametrize('one,other', UNLIKE.values(), ids=UNLIKE)
def test_fingerprints_of_what_is_not_the_same(one, other):
    assert image_fingerprint(None, one) != image_fingerprint(None, other)
    assert image_fingerprint(None, copy.deepcopy(one)) == image_fingerprint(None, one)


def test_a_fingerprint_finds_the_file_or_the_pixels_behind_an_item(tmp_path):
    file = tmp_path / 'a.png'
    Image.fromarray(GREY).save(file)
    block = DataBlock(ImageBlock, get_x=lambda name: tmp_path / name, splitter=IndexSplitter([]))
    ds = block.datasets(['a.png']).train
    before = image_fingerprint(ds, 'a.png')
    assert image_fingerprint(ds, 'a.png') == before != image_fingerprint(ds, 'missing.png')
    os.utime(file, ns=(0, 0))
    later = image_fingerprint(ds, 'a.png')
    file.write_bytes(file.read_bytes() + b' ')
    os.utime(file, ns=(0, 0))
    assert len({before, later, image_fingerprint(ds, 'a.png')}) == 3
    images = [GREY, GREY.T.copy()]
    of_numbers = DataBlock(ImageBlock, get_x=lambda i: images[i], splitter=IndexSplitter([])).datasets([0, 1]).train
    before = image_fingerprint(of_numbers, 1)
    images[1] = images[1] + 1
    assert image_fingerprint(of_numbers, 1) != before
