"An unlabelled image goes the way of a labelled one, or is refused"

import numpy as np
import pytest
import torch
from fastai.vision.all import (
    CategoryBlock,
    CropPad,
    DataBlock,
    DisplayedTransform,
    Flip,
    FlipItem,
    ImageBlock,
    IntToFloatTensor,
    ItemTransform,
    Normalize,
    PILImage,
    PILImageBW,
    Pipeline,
    RandomResizedCrop,
    RandomResizedCropGPU,
    Resize,
    TensorImage,
    TensorImageBW,
    TfmdLists,
    ToTensor,
    Transform,
    TransformBlock,
    aug_transforms,
    compose_tfms,
    image2tensor,
    parent_label,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from fixmatch_fastai.augment import FixMatchBatchTransform, FixMatchTransform
from fixmatch_fastai.core import finished
from fixmatch_fastai.opening import OpenImage, UprightImage
from fixmatch_fastai.pipeline import both_ways, shared_way


def as_it_is(img):
    return img


PLAIN = FixMatchTransform(weak=as_it_is, strong=as_it_is)


class Negative(Transform):
    "Of single images, behind `ToTensor`"

    order = 6

    def encodes(self, x: TensorImage):
        return 255 - x


class GreyOnly(Transform):
    "Of batches, and of one class of tensor"

    order = 20

    def encodes(self, x: TensorImageBW):
        return x.flip(-1)


class Turn(ItemTransform):
    "Of the tuple"

    def encodes(self, xs):
        return type(xs[0])(xs[0].rotate(90)), *xs[1:]


class Early(Transform):
    "Of pictures"

    order = -1

    def encodes(self, x: PILImage):
        return type(x)(x.transpose(Image.Transpose.FLIP_TOP_BOTTOM))


class HSVImage(PILImage):
    _open_args = {'mode': 'HSV'}


class YCbCrImage(PILImage):
    _open_args = {'mode': 'YCbCr'}


class AlphaImage(PILImage):
    _open_args = {'mode': 'RGBA'}


class InkImage(PILImage):
    _open_args = {'mode': 'CMYK'}


class Deep(PILImage):
    "Keeps 16 bits"

    _open_args = {'mode': 'I;16'}


def saved_in_class_folders(folder, imgs, ending, **kwargs):
    "Files of images, in turn of class a and b"
    for i, img in enumerate(imgs):
        (folder / 'ab'[i % 2]).mkdir(exist_ok=True)
        img.save(folder / 'ab'[i % 2] / f'{i}.{ending}', **kwargs)
    return sorted(folder.rglob(f'*.{ending}'))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Six colourful pictures of two sizes, in two class folders"
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (6, 4 + i % 2, 3), np.uint8) for i in range(6)]
    imgs = [Image.fromarray(np.kron(o, np.ones((4, 6, 1), np.uint8))) for o in coarse]
    return saved_in_class_folders(tmp_path_factory.mktemp('photos'), imgs, 'png')


def make_dls(photos, img_cls=PILImage, item_tfms=None, batch_tfms=None):
    block = DataBlock((ImageBlock(img_cls), CategoryBlock), get_y=parent_label, item_tfms=item_tfms,
                      batch_tfms=batch_tfms)  # fmt: skip
    return block.dataloaders(photos, bs=2, num_workers=0)


def difference(dls, photos, **kwargs):
    "Largest difference of a labelled image and the view of it that the loader gives, and of its strong view"
    dl = dls.unlabeled_dl(photos[:1], mu=1, bs=1, **{'tfm': PLAIN, **kwargs})
    labeled = next(iter(dls.test_dl(photos[:1])))[0]
    weak, strong, _ = next(dl.stream())
    weak, strong = finished(weak, dls), finished(strong, dls)
    assert weak.shape == labeled.shape
    return (weak - labeled).abs().max().item(), (strong - labeled).abs().max().item()


@pytest.mark.parametrize('cache', [False, True])
@pytest.mark.parametrize('tfms', [
    dict(item_tfms=[Resize(16), Negative()]),
    dict(item_tfms=Resize(16), batch_tfms=GreyOnly(), img_cls=PILImageBW),
    dict(item_tfms=[Resize(16), Turn()]),
    dict(item_tfms=[Early(), Resize(16)], batch_tfms=Normalize.from_stats([0.5] * 3, [0.2] * 3, cuda=False)),
    dict(img_cls=HSVImage),
    dict(item_tfms=Negative(), img_cls=YCbCrImage),
    dict(item_tfms=[Resize(16), Negative()], img_cls=YCbCrImage),
])  # fmt: skip
def test_a_view_that_changes_nothing_is_the_labeled_image(photos, tfms, cache):
    weak, strong = difference(make_dls(photos, **tfms), photos, cache=cache)
    assert weak == 0
    # there and back through RGB
    assert strong == 0 if tfms.get('img_cls') not in (HSVImage, YCbCrImage) else strong < 0.2


@pytest.mark.parametrize('tfms', [
    dict(item_tfms=[Resize(16), Negative()]),
    dict(item_tfms=Resize(16), batch_tfms=GreyOnly(), img_cls=PILImageBW),
])  # fmt: skip
def test_views_made_of_batches_too(photos, tfms):
    class Same:
        takes_batches = True

        def __call__(self, x):
            return x, x

    assert difference(make_dls(photos, **tfms), photos, tfm=Same()) == (0, 0)


@pytest.mark.parametrize('img_cls, mode', [(AlphaImage, 'RGBA'), (InkImage, 'CMYK'), (Deep, 'I;16')])
def test_modes_without_views(photos, img_cls, mode):
    with pytest.raises(ValueError, match=f'8 bits with one channel or three, but the DataLoaders open them as {mode}'):
        make_dls(photos, img_cls).unlabeled_dl(photos)


def test_views_of_batches_are_of_grey_and_rgb(photos):
    with pytest.raises(ValueError, match='FixMatchBatchTransform draws on grey and RGB images.*as HSV: use'):
        make_dls(photos, HSVImage).unlabeled_dl(photos, tfm=FixMatchBatchTransform())


class Floats(Transform):
    order = 6

    def encodes(self, x: TensorImage):
        return x / 255


class Centre(Transform):
    "Changes the size, and not by a resize"

    order = 20

    def encodes(self, x: TensorImage):
        return x[..., 1:-1, 1:-1]


@pytest.mark.parametrize('tfms, message', [
    (dict(item_tfms=[Resize(16), Floats()]), 'Floats makes floats of single images.*`batch_tfms`'),
    (dict(item_tfms=Resize(16), batch_tfms=Centre()), 'Centre makes something else of an unlabelled image.*before'),
])  # fmt: skip
def test_what_can_not_be_the_same_is_named(photos, tfms, message):
    with pytest.raises(ValueError, match=message):
        make_dls(photos, **tfms).unlabeled_dl(photos)


def test_other_dls_are_looked_at_when_they_are_followed(photos):
    dl = make_dls(photos, item_tfms=Resize(16)).unlabeled_dl(photos, tfm=PLAIN)
    with pytest.raises(ValueError, match='Floats makes floats'):
        next(dl.stream(make_dls(photos, item_tfms=[Resize(16), Floats()])))


@pytest.mark.parametrize('size, sees, batch_tfms', [
    (24, 16, lambda: aug_transforms(size=16)),
    (24, 16, lambda: RandomResizedCropGPU(16)),
    (12, 20, lambda: aug_transforms(size=20)),
])  # fmt: skip
def test_presizing_is_let_pass(photos, size, sees, batch_tfms):
    weak, _, _ = next(make_dls(photos, item_tfms=Resize(size), batch_tfms=batch_tfms()).unlabeled_dl(photos).stream())
    assert weak.shape[-2:] == (sees, sees)


class Mirrored(Transform):
    "Of single images, and not of those that are views of a picture resized"

    order = 20

    def encodes(self, x: TensorImage):
        return x.flip(-1) if x.shape[-1] == 24 else x


def test_presizing_hides_no_other_difference(photos):
    tfms = dict(item_tfms=Resize(24), batch_tfms=[Mirrored(), *aug_transforms(size=16)])
    with pytest.raises(ValueError, match='Mirrored makes something else'):
        make_dls(photos, **tfms).unlabeled_dl(photos)


def test_an_image_that_shows_nothing_hides_no_difference(photos, tmp_path):
    blank = tmp_path / 'blank.png'
    Image.new('RGB', (30, 24), (200, 200, 200)).save(blank)
    with pytest.raises(ValueError, match='Mirrored makes something else'):
        tfms = dict(item_tfms=Resize(24), batch_tfms=[Mirrored(), *aug_transforms(size=16)])
        make_dls(photos, **tfms).unlabeled_dl([blank, *photos])


@pytest.mark.parametrize('size, sees', [(128, 64), (40, 16), (256, 128)])
@pytest.mark.parametrize('batch_tfms', [lambda n: aug_transforms(size=n, do_flip=False), RandomResizedCropGPU])
def test_a_page_of_text_is_presized(photos, tmp_path, size, sees, batch_tfms):
    page = Image.new('RGB', (400, 550), 'white')
    for y in range(3, 540, 9):
        ImageDraw.Draw(page).text((3, y), 'lorem ipsum dolor sit amet consectetur ' * 3, fill=0)
    page.save(tmp_path / 'page.png')
    dls = make_dls(photos, item_tfms=Resize(size, 'pad'), batch_tfms=batch_tfms(sees))
    weak, _, _ = next(dls.unlabeled_dl([tmp_path / 'page.png'], bs=1, mu=1).stream())
    assert weak.shape[-2:] == (sees, sees)


def middle(x: TensorImage):
    return x[..., 2:-2, 2:-2]


class Backwards(ToTensor):
    "As another library has its channels"

    order = 4

    def encodes(self, o: PILImage):
        return TensorImage(image2tensor(o)[[2, 1, 0]])


@pytest.mark.parametrize('tfms, name', [
    (dict(item_tfms=Resize(16), batch_tfms=middle), 'middle'),
    (dict(item_tfms=[Resize(16), Backwards()]), 'Backwards'),
    (dict(item_tfms=Resize((20, 40)), batch_tfms=RandomResizedCropGPU(16)), 'RandomResizedCropGPU'),
])  # fmt: skip
def test_functions_and_ones_own_to_tensor_are_named(photos, tfms, name):
    with pytest.raises(ValueError, match=f'^{name} makes something else of an unlabelled image'):
        make_dls(photos, **tfms).unlabeled_dl(photos)


class OfBoth(ItemTransform):
    def encodes(self, xy):
        x, y = xy
        return x, y


def test_a_transform_that_needs_the_label_is_named(photos):
    with pytest.raises(TypeError, match='^OfBoth takes image and label together, and stops where there is no label'):
        make_dls(photos, item_tfms=[OfBoth(), Resize(16)]).unlabeled_dl(photos)


class Shuffled(DisplayedTransform):
    "By chance in validation too"

    order = 20

    def encodes(self, x: TensorImage):
        return x + torch.rand(1)


def test_chance_on_the_labeled_side_is_no_difference(photos):
    make_dls(photos, item_tfms=Resize(16), batch_tfms=Shuffled()).unlabeled_dl(photos)


class Unseeded(DisplayedTransform):
    "By a chance of its own"

    order = 20

    def __init__(self):
        self.rng = np.random.default_rng()

    def encodes(self, x: TensorImage):
        return x + 0.01 * torch.as_tensor(self.rng.random(x.shape[-2:]), dtype=torch.float32)


@pytest.mark.parametrize('noise', [Shuffled, Unseeded])
def test_chance_hides_no_difference(photos, noise):
    make_dls(photos, item_tfms=Resize(24), batch_tfms=[noise(), *aug_transforms(size=16)]).unlabeled_dl(photos)
    for tfms in ([noise(), Centre()], [noise(), Mirrored(), *aug_transforms(size=16)]):
        with pytest.raises(ValueError, match='makes something else'):
            make_dls(photos, item_tfms=Resize(24), batch_tfms=tfms).unlabeled_dl(photos)


IN_ITEMS = [Early, Turn, Negative, lambda: CropPad(12), lambda: Resize(20), lambda: Flip(p=1)]
IN_BATCHES = [GreyOnly, lambda: Flip(p=1), lambda: Normalize.from_stats([0.4] * 3, [0.3] * 3, cuda=False), Centre]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(IN_ITEMS), max_size=4),
    st.lists(st.sampled_from(IN_BATCHES), max_size=3),
    st.sampled_from([PILImage, HSVImage, YCbCrImage, AlphaImage]),
    st.sampled_from([9, 16]),
)
def test_any_pipeline_is_the_same_on_both_sides_or_refused(photos, in_items, in_batches, img_cls, size):
    opened = TfmdLists(photos, img_cls.create)
    item_tfms = Pipeline([Resize(size), ToTensor(), *(o() for o in in_items)]).fs
    batch_tfms = Pipeline([IntToFloatTensor(), *(o() for o in in_batches)]).fs
    both = (opened[0],), list(item_tfms), list(batch_tfms), torch.device('cpu')
    try:
        shared_way(*both)
    except ValueError as e:
        # and nothing else is refused
        assert 'Centre makes something else' in str(e) and Centre in in_batches or img_cls is AlphaImage
    except (RuntimeError, TypeError) as e:  # fastai's own: of so small an image nothing is left, or of its channels
        with pytest.raises(type(e)):
            compose_tfms(compose_tfms(both[0], item_tfms, split_idx=1)[0][None], batch_tfms, split_idx=1)
    else:
        _, labeled, view = both_ways(*both)
        torch.testing.assert_close(view, labeled)


@pytest.fixture(scope='module')
def large_photos(tmp_path_factory):
    "Six JPEG files of 1000 by 800 pixels, in two class folders"
    rng = np.random.default_rng(0)
    imgs = [Image.fromarray(rng.integers(0, 256, (80, 100, 3), np.uint8)).resize((1000, 800)) for _ in range(6)]
    return saved_in_class_folders(tmp_path_factory.mktemp('large'), imgs, 'jpg', quality=90)


def cut_first(file):
    return PILImage(PILImage.create(file).crop((0, 0, 900, 700)))


@pytest.mark.parametrize('tfms, late', [
    (dict(item_tfms=Resize(64)), True),
    (dict(item_tfms=Resize(64), img_cls=UprightImage), True),
    (dict(item_tfms=Resize(64, 'pad'), img_cls=PILImageBW), True),
    (dict(item_tfms=Resize((32, 64), 'squish')), True),
    (dict(item_tfms=[RandomResizedCrop(64), FlipItem()]), True),
    (dict(item_tfms=[Resize(64), Negative()]), True),
    (dict(item_tfms=Resize(96), batch_tfms=aug_transforms(size=64)), True),
    (dict(item_tfms=[CropPad(400), Resize(64)]), False),  # `CropPad` comes first
    (dict(item_tfms=[Early(), Resize(64)]), False),
    (dict(item_tfms=[Resize(64), Turn()]), False),  # whose order is 0, that of `Resize` 1
    (dict(item_tfms=Resize(64), img_cls=YCbCrImage), False),  # fastai's `Resize` loses its mode
    (dict(item_tfms=Resize(600)), False),
    (dict(), False),
])  # fmt: skip
def test_large_photos_of_a_pool_are_decoded_small(large_photos, tfms, late):
    weak, _ = difference(make_dls(large_photos, **tfms), large_photos)
    if late and 'batch_tfms' not in tfms:
        assert 0 < weak < 30 / 255
    elif not late:
        assert weak == 0


def test_only_known_ways_of_opening_are_changed(large_photos):
    for opener in (cut_first, lambda o: PILImage.create(o), OpenImage()):
        block = DataBlock((TransformBlock(opener, batch_tfms=IntToFloatTensor), CategoryBlock), get_y=parent_label,
                          item_tfms=Resize(64))  # fmt: skip
        assert difference(block.dataloaders(large_photos, bs=2, num_workers=0), large_photos) == (0, 0)


@pytest.mark.parametrize('cache', [False, True])
@pytest.mark.parametrize('item_tfms', [Resize(64), None])
def test_large_photos_that_are_damaged_are_replaced(large_photos, tmp_path, item_tfms, cache):
    torn = tmp_path / 'torn.jpg'
    torn.write_bytes(large_photos[0].read_bytes()[:20000])
    dls = make_dls(large_photos, item_tfms=item_tfms)
    dl = dls.unlabeled_dl([torn, *large_photos[:3]], mu=1, bs=4, cache=cache)
    next(dl.stream())
    assert dl.damaged['item'].tolist() == [torn] and f'{torn} can' in dl.damaged['error'].item()


@pytest.mark.parametrize('predict', ['get_preds', 'validate', 'tta'])
def test_an_unlabeled_loader_is_not_predicted_from(make_learner, predict):
    learn = make_learner()
    with learn.no_bar(), pytest.raises(ValueError, match=r'two views of each image.*use `learn.dls.test_dl\(items\)`'):
        getattr(learn, predict)(dl=learn.fix_match.unlabeled_dl)
    with learn.no_bar():
        assert len(learn.validate()) == 2
