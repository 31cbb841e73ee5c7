"Folders of labelled images: what a system left there, and what is in the wrong place"

import pytest
from fastai.vision.all import Path
from PIL import Image

from fixmatch_fastai.class_folders import class_roots, folder_faults, image_files, names_alike


@pytest.fixture
def photos(tmp_path):
    "Writes images, and returns the folder they are in"

    def write(*names):
        for o in names:
            (tmp_path / o).parent.mkdir(parents=True, exist_ok=True)
            Image.new('L', (2, 2)).save(tmp_path / o)
        return tmp_path

    return write


def names(files, root):
    return [str(o.relative_to(root)) for o in files]


def test_images_of_systems_and_hidden_ones_are_left_out(photos):
    root = photos('b/2.png', 'a/1.jpg', '__MACOSX/a/1.jpg', 'a/@eaDir/1.jpg', '.hidden/3.jpg', 'a/.4.jpg', '0.png')
    (root / 'a' / 'text.txt').touch()
    assert names(image_files(root), root) == ['0.png', 'a/1.jpg', 'b/2.png']
    assert names(image_files(root, recurse=False), root) == ['0.png']
    assert names(image_files(root / '__MACOSX'), root) == ['__MACOSX/a/1.jpg'], 'asked for by name'


def test_roots():
    assert class_roots(['x/cat/1.jpg', Path('x/dog/2.jpg'), 'y/cat/3.jpg']) == [Path('x'), Path('y')]
    assert class_roots(['x/cat/1.jpg', 'x/cat/more/2.jpg']) == [Path('x')], 'not a root inside another'
    assert class_roots([]) == []


@pytest.mark.parametrize(
    'alike',
    [['Cat', 'cat'], ['cat', 'cat '], ['caf\u00e9', 'cafe\u0301'], ['STRASSE', 'straße'], ['a', 'A', ' a']],
)
def test_names_that_look_alike(alike):
    assert names_alike([*alike, 'dog', 'category']) == [sorted(alike)]


def test_names_that_do_not():
    assert names_alike(['cat', 'dog', 'cat2', 'cat dog', 'catdog']) == names_alike([]) == []
    assert names_alike(['cat', 'cat']) == [], 'one name'


def test_nothing_is_wrong(photos):
    root = photos('cat/1.jpg', 'dog/2.jpg', '.git/3.jpg')
    (root / 'readme.txt').touch()
    assert folder_faults(root) == {}


def test_each_fault(photos):
    root = photos('cat/1.jpg', 'cat/more/2.jpg', 'dog/deep/er/3.jpg', '4.jpg', '__MACOSX/5.jpg')
    for o in ('fish', 'bird/none', '@eaDir'):
        (root / o).mkdir(parents=True)
    (root / 'fish' / 'text.txt').touch()
    found = {k: list(map(str, v)) for k, v in folder_faults(root).items()}
    assert found == {
        'empty': ['bird', 'fish'],
        'system': ['@eaDir', '__MACOSX'],
        'beside': ['4.jpg'],
        'below': ['cat/more/2.jpg', 'dog/deep/er/3.jpg'],
    }
