"Photos are opened as their owners see them"

import io

import numpy as np
import pytest
from conftest import tiny_net
from fastai.vision.all import (
    CategoryBlock,
    DataBlock,
    ImageBlock,
    Learner,
    PILImage,
    Resize,
    accuracy,
    parent_label,
)
from PIL import Image, ImageOps

from fixmatch_fastai.all import FixMatch, FixMatchTransform, fixmatch_check
from fixmatch_fastai.cli.folders import find_images
from fixmatch_fastai.cli.learner import make_dataloaders, make_unlabeled_dl
from fixmatch_fastai.cli.options import Options
from fixmatch_fastai.opening import UprightImage, UprightImageBW, is_blank, left_lying, to_8_bits

# what must be done with the pixels of a photo, so that the note with this number turns it back
LYING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def as_it_is(img):
    return img


def picture(seed, size=(40, 24)):
    "Six by four coloured fields, without symmetry"
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def save(img, file, note=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = note
    img.transpose(LYING[note]).save(file, exif=exif) if note in LYING else img.save(file)
    return file


@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp', 'tiff'])
@pytest.mark.parametrize('note', LYING)
def test_every_note_is_obeyed(tmp_path, note, ending):
    file = save(picture(0), tmp_path / f'photo.{ending}', note)
    upright = UprightImage.create(file)
    assert upright.size == (40, 24) and upright.mode == 'RGB' and type(upright) is UprightImage
    assert np.abs(np.asarray(upright).astype(int) - np.asarray(picture(0))).mean() < 30  # JPEG's and WebP's
    assert np.array_equal(UprightImage.create(file.read_bytes()), upright)
    assert UprightImageBW.create(str(file)).mode == 'L' and UprightImageBW.create(file).size == (40, 24)
    assert left_lying(file, PILImage.create(file)) == (ending != 'tiff')  # which Pillow turns itself
    assert not left_lying(file, upright)


def test_notes_that_say_nothing(tmp_path):
    plain = save(picture(0), tmp_path / 'plain.png')
    exif = Image.Exif()
    for note in (0, 1, 9):
        exif[274] = note
        picture(0).save(tmp_path / 'odd.png', exif=exif)
        assert np.array_equal(UprightImage.create(tmp_path / 'odd.png'), UprightImage.create(plain))
        assert not left_lying(tmp_path / 'odd.png', PILImage.create(tmp_path / 'odd.png'))


@pytest.mark.parametrize('ending, dtype, low, high', [
    ('png', np.uint16, 0, 65535),
    ('png', np.uint16, 900, 1300),
    ('tiff', np.uint16, 10, 4095),
    ('tiff', np.int32, -70000, 70000),
    ('tiff', np.float32, -1, 1),
    ('tiff', np.float32, 0, 1),
    ('tiff', np.float32, 0, 1e-3),
    ('tiff', np.float32, 0, 255),
    ('tiff', np.int32, 0, 255),
])  # fmt: skip
def test_more_than_8_bits(tmp_path, ending, dtype, low, high):
    ramp = np.linspace(low, high, 24 * 40).reshape(24, 40)
    Image.fromarray(ramp.astype(dtype)).save(tmp_path / f'deep.{ending}')
    img = np.asarray(UprightImageBW.create(tmp_path / f'deep.{ending}')).astype(float)
    assert np.abs(img - np.linspace(0, 255, 24 * 40).reshape(24, 40)).max() < 2
    colour = np.asarray(UprightImage.create(tmp_path / f'deep.{ending}'))
    assert colour.shape == (24, 40, 3) and np.array_equal(colour[..., 0], img)


def test_numbers_without_a_range():
    for a in (np.full((2, 2), 70000, np.int32), np.full((2, 2), np.nan, np.float32)):
        assert to_8_bits(Image.fromarray(a)).mode == 'L'
    a = np.array([[np.inf, 300], [-np.inf, 0]], np.float32)
    assert np.asarray(to_8_bits(Image.fromarray(a))).tolist() == [[255, 255], [0, 0]]


def test_what_pilimage_takes(tmp_path):
    img = picture(1)
    for o in (np.asarray(img), img, PILImage(img)):
        assert np.array_equal(UprightImage.create(o), img)
    with pytest.raises(Image.UnidentifiedImageError):
        UprightImage.create(io.BytesIO(b'no image').getvalue())


def test_blank():
    assert is_blank(Image.new('RGB', (9, 9), 'white')) and not is_blank(picture(0))


@pytest.fixture
def phone_folders(tmp_path):
    "Photos of a phone, all lying: labelled ones of two classes, and a pool"
    for i in range(8):
        save(picture(i), tmp_path / 'labeled' / 'ab'[i % 2] / f'{i}.jpg', 6)
        save(picture(10 + i), tmp_path / 'unlabeled' / f'{i}.jpg', 8)
    return tmp_path


def test_commands_set_photos_upright(phone_folders):
    small = dict(arch='resnet18', pretrained=False, size=24, bs=2, mu=1, steps=2, workers=0, flip=False)
    options = Options(phone_folders / 'labeled', phone_folders / 'unlabeled', **small)
    images = find_images(options)
    dls = make_dataloaders(options, images)
    pool = make_unlabeled_dl(options, images, dls)
    for files, ds in ((images.train, dls.train_ds), (images.valid, dls.valid_ds)):
        assert all(o[0].size == (40, 24) for o in ds) and len(ds) == len([f for v in files.values() for f in v])
    # the middle of the upright photo, not of the lying one
    upright = ImageOps.fit(ImageOps.exif_transpose(Image.open(images.pool[0])), (24, 24), Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(pool.dataset.image(0)).astype(int) - np.asarray(upright)).mean() < 12
    assert dls.valid.after_item is not None and next(iter(dls.test_dl([images.pool[0]])))[0].shape[-2:] == (24, 24)


@pytest.mark.parametrize('img_cls, found', [(PILImage, True), (UprightImage, False)])
def test_the_preflight_counts_what_lies(phone_folders, tmp_path, img_cls, found):
    block = DataBlock((ImageBlock(img_cls), CategoryBlock), get_y=parent_label, item_tfms=Resize(16))
    labeled = sorted((phone_folders / 'labeled').rglob('*.jpg'))
    dls = block.dataloaders(labeled, bs=2, num_workers=0)
    pool = dls.unlabeled_dl(sorted((phone_folders / 'unlabeled').glob('*')), mu=1)
    learn = Learner(dls, tiny_net(2, n_in=3), metrics=accuracy, path=tmp_path, cbs=FixMatch(pool))
    report = fixmatch_check(learn, speed=False)
    assert ('upright' in report) == found and 'blank' not in report
    if found:
        assert report['upright'].found.startswith('16 of 16 images opened are not turned as their files say')
        assert 'UprightImage' in report['upright'].advice


def test_the_preflight_finds_blanks(phone_folders, tmp_path):
    pool = sorted((phone_folders / 'unlabeled').glob('*'))
    for i in range(3):
        ramp = np.linspace(1000, 60000, 24 * 40).reshape(24, 40).astype(np.uint16)
        Image.fromarray(ramp).save(tmp_path / f'deep{i}.png')
        pool.append(tmp_path / f'deep{i}.png')
    labeled = sorted((phone_folders / 'labeled').rglob('*.jpg'))
    for img_cls in (PILImage, UprightImage):
        block = DataBlock((ImageBlock(img_cls), CategoryBlock), get_y=parent_label, item_tfms=Resize(16))
        dls = block.dataloaders(labeled, bs=2, num_workers=0)
        loader = dls.unlabeled_dl(pool, mu=1, tfm=FixMatchTransform(weak=as_it_is))
        learn = Learner(dls, tiny_net(2, n_in=3), metrics=accuracy, path=tmp_path, cbs=FixMatch(loader))
        report = fixmatch_check(learn, speed=False)
        assert ('blank' in report) == (img_cls is PILImage)
        if img_cls is PILImage:
            assert report['blank'].level == 'problem' and report['blank'].found.startswith('3 of 19 images opened')
