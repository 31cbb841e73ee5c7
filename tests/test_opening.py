"Photos are opened as their owners see them"

import io
import pickle
import subprocess
import sys
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import quiet_fit, tiny_net
from fastai.vision.all import (
    CategoryBlock,
    ColReader,
    CropPad,
    DataBlock,
    ImageBlock,
    IndexSplitter,
    Learner,
    PILImage,
    PILImageBW,
    RandomResizedCrop,
    Resize,
    TfmdLists,
    ToTensor,
    accuracy,
    get_image_files,
    load_learner,
    parent_label,
    set_seed,
)
from fastai.vision.all import test_set as unlabeled_set
from PIL import Image, ImageOps

from fixmatch_fastai.all import FixMatch, FixMatchTransform, fixmatch_check
from fixmatch_fastai.cli.folders import find_images
from fixmatch_fastai.cli.learner import make_dataloaders, make_unlabeled_dl
from fixmatch_fastai.cli.options import Options
from fixmatch_fastai.experiment.datasets import channel_stats
from fixmatch_fastai.opening import (
    OpenImage,
    UprightImage,
    UprightImageBW,
    is_blank,
    left_lying,
    open_late,
    open_upright,
    to_8_bits,
)

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
    for o in (np.asarray(img), torch.from_numpy(np.array(img)), img, PILImage(img)):
        assert np.array_equal(UprightImage.create(o), img)
    with pytest.raises(Image.UnidentifiedImageError):
        UprightImage.create(io.BytesIO(b'no image').getvalue())


def test_an_image_that_pillow_has_opened_is_as_its_file(tmp_path):
    upright = UprightImage.create(save(picture(0), tmp_path / 'photo.png', 6))
    with Image.open(tmp_path / 'photo.png') as img:
        assert np.array_equal(UprightImage.create(img), upright)
    with open(tmp_path / 'photo.png', 'rb') as f:
        assert np.array_equal(UprightImage.create(f), upright)
    turned = Image.open(tmp_path / 'photo.png').rotate(-90, expand=True)  # by hand, and the note is still there
    assert np.array_equal(UprightImage.create(turned), upright)
    grey = np.asarray(picture(0).convert('L'))
    for o in (grey, grey.astype(np.uint16) * 256, picture(0).convert('L')):  # arrays and images of another mode
        assert UprightImage.create(o).mode == 'RGB' and UprightImageBW.create(o).mode == 'L'
    assert np.array_equal(UprightImage.create(picture(0).quantize()), picture(0))  # colours, not their numbers


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp', 'gif', 'tiff'])
def test_errors_name_the_file(tmp_path, ending):
    pixels = np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8)
    file = save(Image.fromarray(pixels), tmp_path / f'whole.{ending}')
    torn = tmp_path / f'torn.{ending}'
    torn.write_bytes(file.read_bytes()[:9000])
    for opened in (UprightImage.create, open_upright, lambda o: OpenImage()(o).load(), OpenImage(PILImage)):
        if ending == 'jpg' or not isinstance(opened, OpenImage):  # a late one, and fastai's own
            with pytest.raises(OSError, match=f'torn.{ending}'):
                np.asarray(opened(torn))
    with pytest.raises(FileNotFoundError, match='gone'):
        UprightImage.create(tmp_path / f'gone.{ending}')
    with pytest.raises(OSError, match='.'):  # bytes have no name
        UprightImage.create(torn.read_bytes())


def test_blank():
    assert is_blank(Image.new('RGB', (9, 9), 'white')) and not is_blank(picture(0))


@pytest.fixture
def phone_folders(tmp_path):
    "Photos of a phone, all lying: labelled ones of two classes, and a pool"
    for i in range(8):
        save(picture(i), tmp_path / 'labeled' / 'ab'[i % 2] / f'{i}.jpg', 6)
        save(picture(10 + i), tmp_path / 'unlabeled' / f'{i}.jpg', 8)
    return tmp_path


def loaders_of_commands(folder, size):
    "`(images, DataLoaders, pool)` as the commands make them"
    small = dict(arch='resnet18', pretrained=False, size=size, bs=2, mu=1, steps=2, workers=0, flip=False)
    options = Options(folder / 'labeled', folder / 'unlabeled', **small)
    images = find_images(options)
    dls = make_dataloaders(options, images)
    return images, dls, make_unlabeled_dl(options, images, dls)


def test_commands_set_photos_upright(phone_folders):
    images, dls, pool = loaders_of_commands(phone_folders, 24)
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


def slice_of(i):
    "A slice of a scan: 16 bits, dark around it"
    grey = np.asarray(picture(i).convert('L'), dtype=float)
    return np.where(grey > 100, grey * 200 + 2000, 0)


@pytest.mark.parametrize('img_cls, found', [(PILImage, True), (UprightImage, False)])
@pytest.mark.parametrize('dtype, ending', [(np.uint16, 'png'), (np.int32, 'tif'), (np.float32, 'tif')])
def test_the_preflight_finds_more_than_8_bits(phone_folders, tmp_path, img_cls, found, dtype, ending):
    pool = sorted((phone_folders / 'unlabeled').glob('*'))
    Image.new('RGB', (40, 24)).save(tmp_path / 'blank.png')
    for i in range(3):
        Image.fromarray(slice_of(i % 2).astype(dtype)).save(tmp_path / f'deep{i}.{ending}')  # one of them twice
        pool.append(tmp_path / f'deep{i}.{ending}')
    labeled = sorted((phone_folders / 'labeled').rglob('*.jpg'))
    block = DataBlock((ImageBlock(img_cls), CategoryBlock), get_y=parent_label, item_tfms=Resize(16))
    dls = block.dataloaders(labeled, bs=2, num_workers=0)
    loader = dls.unlabeled_dl([*pool, tmp_path / 'blank.png'], mu=1, tfm=FixMatchTransform(weak=as_it_is))
    learn = Learner(dls, tiny_net(2, n_in=3), metrics=accuracy, path=tmp_path, cbs=FixMatch(loader))
    report = fixmatch_check(learn, speed=False)
    assert report['blank'].found.startswith('1 of 20 images opened are blank')
    assert ('bits' in report) == found and len(report.duplicates.query("how == 'same'")) == 1  # by file
    if found:
        assert report['bits'].level == 'problem' and report['bits'].found.startswith('3 of 20 images opened')
        assert 'UprightImage' in report['bits'].advice


@cache
def textured(size, seed=0):
    "A picture with detail of all sizes"
    rng, pixels = np.random.default_rng(seed), np.full((size[1], size[0], 3), 128.0)
    for n in (8, 32, 128, 512):
        detail = Image.fromarray(rng.integers(0, 256, (n * 3 // 4, n, 3), np.uint8)).resize(size)
        pixels += (np.asarray(detail, dtype=float) - 128) / 2
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mean_difference(a, b):
    assert a.size == b.size and a.mode == b.mode
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()


def save_jpeg(img, file, note=1, **kwargs):
    exif = Image.Exif()
    exif[274] = note
    (img.transpose(LYING[note]) if note in LYING else img).save(file, quality=95, exif=exif, **kwargs)
    return file


@pytest.fixture
def photo_1601():
    return textured((1601, 1203))


@pytest.mark.parametrize('note', [1, *LYING])
@pytest.mark.parametrize('at_least, size', [(1, (200, 150)), (150, (200, 150)), (151, (400, 301)), (700, (1601, 1203))])
def test_a_jpeg_is_decoded_no_smaller_than_asked(photo_1601, tmp_path, note, at_least, size):
    file = save_jpeg(photo_1601, tmp_path / 'photo.jpg', note)
    for small in (open_upright(file, 'RGB', at_least), UprightImage.create(file.read_bytes(), at_least=at_least)):
        assert small.size == size
        assert mean_difference(small, photo_1601.resize(size, Image.Resampling.BOX)) < 8


@pytest.mark.parametrize('mode, kwargs', [
    ('L', {}),
    ('CMYK', {}),
    ('RGB', dict(progressive=True)),
    ('RGB', dict(subsampling=0)),
    ('RGB', dict(format='MPO', save_all=True, append_images=[Image.new('RGB', (64, 48))])),
])  # fmt: skip
def test_jpegs_of_all_kinds(photo_1601, tmp_path, mode, kwargs):
    file = save_jpeg(photo_1601.convert(mode), tmp_path / 'photo.jpg', 6, **kwargs)
    for cls in (UprightImage, UprightImageBW):
        whole, small = cls.create(file), cls.create(file, at_least=300)
        assert small.size == (400, 301) and small.mode == whole.mode
        assert mean_difference(small, whole.resize(small.size, Image.Resampling.BOX)) < 8
        resized = Resize(64)(whole, split_idx=1)
        assert 0 < mean_difference(Resize(64)(OpenImage(cls)(file), split_idx=1), resized) < 2


def test_other_files_are_opened_as_they_are(tmp_path):
    for ending in ('png', 'webp', 'tiff', 'gif', 'bmp'):
        file = save(textured((640, 600)), tmp_path / f'photo.{ending}')
        misnamed = tmp_path / f'{ending}.jpg'
        misnamed.write_bytes(file.read_bytes())
        for o in (UprightImage.create(file, at_least=10), OpenImage()(file), OpenImage(PILImage)(misnamed)):
            assert np.array_equal(o, PILImage.create(file))
    small = save_jpeg(textured((300, 200)), tmp_path / 'small.jpg', 6)
    for cls in (PILImage, PILImageBW, UprightImage):
        assert type(OpenImage(cls)(small)) is cls and np.array_equal(OpenImage(cls)(small), cls.create(small))


def test_an_image_is_decoded_smaller_only_before_it_is_decoded(photo_1601, tmp_path):
    with Image.open(save_jpeg(photo_1601, tmp_path / 'photo.jpg', 6)) as img:
        assert UprightImage.create(img, at_least=150).size == (200, 150)
    with Image.open(tmp_path / 'photo.jpg') as img:
        img.load()
        assert UprightImage.create(img, at_least=150).size == (1601, 1203)


RESIZES = [
    lambda size, **kwargs: Resize(size, **kwargs),
    lambda size, **kwargs: Resize(size, 'squish', **kwargs),
    lambda size, **kwargs: Resize(size, 'pad', **kwargs),
    lambda size, **kwargs: Resize(size, 'pad', pad_mode='zeros', **kwargs),
    lambda size, **kwargs: Resize(size, 'pad', pad_mode='border', **kwargs),
    lambda size, **kwargs: Resize((size, 2 * size), **kwargs),
    lambda size, **kwargs: RandomResizedCrop(size, **kwargs),
]


@pytest.mark.parametrize('cls, note', [(PILImage, 1), (PILImageBW, 6), (UprightImage, 3), (UprightImage, 6)])
@pytest.mark.parametrize('size', [(1203, 901), (600, 1200), (1606, 518)])
def test_a_late_photo_differs_less_than_by_another_filter(tmp_path, size, cls, note):
    file = save_jpeg(textured(size), tmp_path / 'photo.jpg', note)
    whole, bicubic = cls.create(file), (Image.Resampling.BICUBIC, Image.Resampling.NEAREST)
    for resize in RESIZES:
        late = OpenImage(cls)(file)
        assert isinstance(late, cls) and late.size == whole.size and late.mode == whole.mode
        for px in (32, 100):
            resized = resize(px)(whole, split_idx=1)
            other = mean_difference(resize(px, resamples=bicubic)(whole, split_idx=1), resized)
            assert mean_difference(resize(px)(late, split_idx=1), resized) < 0.8 * other


@pytest.mark.parametrize('cls', [PILImage, UprightImage])
def test_a_late_photo_is_whole_for_everything_else(photo_1601, tmp_path, cls):
    file = save_jpeg(photo_1601, tmp_path / 'photo.jpg', 8)
    whole, nearest = cls.create(file), (Image.Resampling.NEAREST,) * 2
    for f in (
        lambda o: o,
        lambda o: o.crop((100, 100, 200, 300)),
        lambda o: o.resize((70, 50), Image.Resampling.BICUBIC),
        lambda o: o.transpose(Image.Transpose.TRANSPOSE).convert('L'),
        lambda o: ImageOps.mirror(o),
        lambda o: o.copy(),
        lambda o: o.crop_pad(64),
        lambda o: CropPad(64)(o),
        lambda o: Resize(64)(CropPad(200)(o)),
        lambda o: Resize(64, resamples=nearest)(o, split_idx=1),
        lambda o: Resize(700)(o, split_idx=1),
        lambda o: RandomResizedCrop(128, max_scale=0.02, min_scale=0.01)(o, split_idx=0),  # a piece of 128 pixels or so
        lambda o: Image.fromarray(ToTensor()(o).permute(1, 2, 0).numpy()),
    ):
        set_seed(0)
        expected = f(whole)
        set_seed(0)
        assert np.array_equal(np.asarray(f(OpenImage(cls)(file))), np.asarray(expected))
    late = OpenImage()(file)
    assert np.array_equal(pickle.loads(pickle.dumps(late)), UprightImage.create(file))
    assert late.getpixel((3, 5)) == UprightImage.create(file).getpixel((3, 5))


def test_a_late_photo_has_its_size_before_it_is_decoded(photo_1601, tmp_path):
    file = save_jpeg(photo_1601, tmp_path / 'photo.jpg', 6)
    file.write_bytes(file.read_bytes()[:20000])
    late = OpenImage()(file)
    assert late.size == (1601, 1203)
    for decode in (late.load, late.verify, lambda: late.draft(None, (64, 64)), lambda: Resize(32)(late)):
        with pytest.raises(OSError, match='photo.jpg'):
            decode()
    save_jpeg(photo_1601, file, 6)  # and when the file is mended, it can be decoded
    late.draft(None, (150, 150))
    assert late.size == (200, 150) and late.load()[0, 0] == late.getpixel((0, 0))


def absolute(file):
    return file.absolute()


def create_otherwise(file):
    return PILImage.create(file).crop((0, 0, 100, 100))


def wrapped(f):
    return lambda file: f(file)


class InAFrame(PILImage):
    @classmethod
    def create(cls, fn, **kwargs):
        return cls(ImageOps.expand(super().create(fn, **kwargs), 5))


class Blueish(PILImage):
    _open_args = {'mode': 'YCbCr'}


@pytest.mark.parametrize('opener, known', [
    (PILImage.create, True),
    (PILImageBW.create, True),
    (UprightImage.create, True),
    (UprightImageBW.create, True),
    (Blueish.create, True),
    (partial(PILImage.create, mode='L'), True),
    (partial(UprightImage.create, mode='HSV'), True),
    ([absolute, PILImage.create], True),
    (create_otherwise, False),
    (wrapped(PILImage.create), False),
    (partial(create_otherwise), False),
    (partial(UprightImage.create, at_least=64), False),
    (InAFrame.create, False),
    ([PILImage.create, lambda o: o.crop((0, 0, 100, 100))], False),
    (OpenImage(), False),
])  # fmt: skip
def test_which_datasets_can_open_late(photo_1601, tmp_path, opener, known):
    ds = TfmdLists([save_jpeg(photo_1601, tmp_path / 'photo.jpg', 6)] * 2, opener)
    late = open_late(ds)
    assert (late is not ds) == known and len(late) == 2
    assert np.array_equal(late[0], ds[0]) and late[0].mode == ds[0].mode
    assert late[1].size == ds[1].size
    if known and ds[0].mode in ('L', 'RGB'):
        img = late[0]
        img.draft(None, (300, 300))
        assert min(img.size) == 301 and max(ds[0].size) == 1601  # and `ds` stays as it is


def test_rows_of_a_table_open_late(photo_1601, tmp_path):
    save_jpeg(photo_1601, tmp_path / 'photo.jpg')
    df = pd.DataFrame(dict(name=['photo.jpg'] * 4, label=list('abab')))
    get = dict(get_x=ColReader('name', pref=f'{tmp_path}/'), get_y=ColReader('label'))
    ds = DataBlock((ImageBlock(), CategoryBlock), splitter=IndexSplitter([1, 2]), **get).datasets(df).valid
    late = open_late(ds)
    late[0][0].draft(None, (1, 1))
    assert late[0][0].size == (1601, 1203) and late[0][1] == ds[0][1] and late.n_inp == ds.n_inp
    assert np.array_equal(open_late(unlabeled_set(ds, df))[1][0], ds[0][0])


@pytest.fixture
def large_folders(tmp_path):
    "Large photos of a phone"
    for i in range(6):
        for name in (f'labeled/{"ab"[i % 2]}', 'unlabeled'):
            (tmp_path / name).mkdir(exist_ok=True, parents=True)
            save_jpeg(textured((801, 603), seed=i), tmp_path / name / f'{name[0]}{i}.jpg', 6)
    return tmp_path


def test_commands_decode_no_larger_than_needed(large_folders):
    images, dls, pool = loaders_of_commands(large_folders, 32)
    resized = Resize(32)(UprightImage.create(images.pool[0]), split_idx=1)
    assert 0 < mean_difference(pool.dataset.image(0), resized) < 1
    # and both sides in the same way
    item = dls.test_dl(images.pool[:1]).dataset[0][0]
    assert np.array_equal(pool.dataset.image(0), Resize(32)(item, split_idx=1))

    stats = [channel_stats(images.pool, o, 32) for o in (OpenImage(), UprightImage.create)]
    np.testing.assert_allclose(*stats, atol=0.002)

    file, learn = images.pool[0], Learner(dls, tiny_net(2, n_in=3), metrics=accuracy, path=large_folders)
    quiet_fit(learn, 1)
    learn.export('learner.pkl')
    loaded = load_learner(large_folders / 'learner.pkl')
    with learn.no_bar(), loaded.no_bar():
        expected = learn.predict(file)[2]
        for o in (file, str(file)):
            torch.testing.assert_close(loaded.predict(o)[2], expected)
        whole = UprightImage.create(file)
        for o in (file.read_bytes(), np.asarray(whole), whole, Image.open(file)):
            torch.testing.assert_close(loaded.predict(o)[2], expected, atol=0.02, rtol=0.1)


def test_phones_write_heic(tmp_path):
    heif = pytest.importorskip('pillow_heif', reason='HEIC needs pillow-heif')
    large = picture(0, (240, 144))
    for note in (1, *LYING):
        exif, lying = Image.Exif(), large.transpose(LYING[note]) if note in LYING else large
        exif[274] = note
        file = tmp_path / f'{note}.heic'
        heif.from_pillow(lying).save(file, exif=exif.tobytes(), quality=90)
        for o in (file, str(file), file.read_bytes()):
            assert mean_difference(UprightImage.create(o), large) < 3  # turned, and once
        assert mean_difference(OpenImage(PILImage)(file), large) < 3 and not left_lying(file, PILImage.create(file))
    assert get_image_files(tmp_path).map(lambda o: UprightImage.create(o).size) == [(240, 144)] * 8
    heif.from_pillow(large.convert('RGBA')).save(file)
    assert UprightImage.create(file).mode == 'RGB' and UprightImageBW.create(file).mode == 'L'
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(OSError, match='8.heic'):
        UprightImage.create(file)


@pytest.mark.parametrize('brand', [b'heic', b'heix', b'hevc', b'mif1', b'msf1'])
@pytest.mark.parametrize('create', [PILImage.create, UprightImage.create, OpenImage(PILImage), Image.open])
def test_heic_names_what_opens_it(tmp_path, monkeypatch, brand, create):
    monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    file = tmp_path / 'IMG_0001.HEIC'
    file.write_bytes(b'\0\0\0\x18ftyp' + brand + b'\0\0\0\0mif1heic' + bytes(100))
    with pytest.raises(OSError, match='IMG_0001.HEIC is HEIC.*install it by `pip install pillow-heif`'):
        create(file)


@pytest.mark.parametrize('installed', [True, False])
def test_avif_is_left_to_pillow(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, 'pillow_heif', None)
    file = tmp_path / 'photo.avif'
    try:
        picture(0, (240, 144)).save(file)
    except (KeyError, OSError, ValueError):
        pytest.skip('this Pillow writes no AVIF')
    for brand in (b'avif', b'mif1'):
        content = bytearray(file.read_bytes())
        content[8:12] = brand
        file.write_bytes(content)
        assert mean_difference(UprightImage.create(file), picture(0, (240, 144))) < 9


FINDS = """
import mimetypes, sys
mimetypes.init([])
mimetypes.types_map.clear()
mimetypes.types_map['.png'] = 'image/png'
from fixmatch_fastai.experiment.datasets import get_image_files
print(*sorted(o.name for o in get_image_files(sys.argv[1])), 'pillow_heif' in sys.modules)
"""


@pytest.mark.slow
def test_photos_are_found_whatever_endings_the_system_knows(tmp_path):
    names = ['a.png', 'b.heic', 'c.HEIC', 'd.heif', 'e.hif', 'f.webp', 'g.avif', 'h.jfif', 'i.txt']
    for name in names:
        (tmp_path / name).touch()
    python = [sys.executable, '-W', 'ignore', '-c', FINDS, tmp_path]
    res = subprocess.run(python, capture_output=True, text=True, timeout=200)
    assert res.returncode == 0, res.stderr
    assert res.stdout.split() == [*names[:-1], 'False']
