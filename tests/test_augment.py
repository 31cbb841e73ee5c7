"Views of any image, many times over"

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from fixmatch_fastai.all import FixMatchTransform, strong_augment, weak_augment
from fixmatch_fastai.augment import _OPS, Cutout, same_pixels, shift_reflect, uint8_tensor

RECIPES = ['timm', 'google', 'paper']


def seed(i):
    random.seed(i)
    torch.manual_seed(i)


def noise(size=(24, 20), mode='RGB'):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name', RECIPES)
def test_never_raises_never_equal(name, mode):
    "3,000 strong views of each recipe, of noise, a digit-like figure on black, and a grey image with one odd pixel"
    seed(0)
    figure = Image.new(mode, (16, 16))
    figure.paste(255 if mode == 'L' else (255, 255, 255), (6, 2, 9, 14))
    odd = Image.new(mode, (16, 16), 128 if mode == 'L' else (128,) * 3)
    odd.putpixel((3, 3), 0 if mode == 'L' else (0, 0, 0))
    strong = strong_augment(name, weak_augment())
    for img in (noise(mode=mode), figure, odd):
        for _ in range(1000):
            out = strong(img)
            assert out.size == img.size and out.mode == mode
            assert not same_pixels(out, img)


@pytest.mark.parametrize('name', RECIPES)
@pytest.mark.parametrize('size', [(1, 1), (1, 9), (2, 2), (3, 2), (7, 5), (64, 48)], ids=str)
@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'CMYK', 'I;16', 'F'])
def test_any_mode_and_size(mode, size, name):
    seed(0)
    img = noise(size)
    img = img.convert('L').convert('I').convert('I;16') if mode == 'I;16' else img.convert(mode)
    tfm = FixMatchTransform(strong=strong_augment(name))
    for _ in range(5):
        for v in tfm(img):
            assert v.dtype == torch.uint8 and v.is_contiguous()
            assert tuple(v.shape) == (1 if mode in ('1', 'L', 'LA', 'I;16', 'F') else 3, size[1], size[0])


def test_transparent_palette_without_a_warning(recwarn):
    img = noise(mode='P')
    img.info['transparency'] = bytes(range(256))
    FixMatchTransform()(img)
    assert not recwarn.list


def test_shift_equals_numpy():
    img = noise((11, 9))
    a = np.pad(np.asarray(img), ((5, 5), (5, 5), (0, 0)), mode='reflect')
    for dx, dy in [(0, 0), (5, 5), (-5, -5), (3, -4), (-1, 2)]:
        assert np.array_equal(np.asarray(shift_reflect(img, dx, dy)), a[5 - dy : 14 - dy, 5 - dx : 16 - dx])


def test_shift_by_more_than_half():
    "Up to one pixel less than the side, as the docstring says; even and odd sides"
    for w, h in ((3, 2), (4, 4), (7, 5)):
        img = noise((w, h))
        a = np.pad(np.asarray(img), ((h - 1, h - 1), (w - 1, w - 1), (0, 0)), mode='reflect')
        for dx in range(1 - w, w):
            for dy in range(1 - h, h):
                assert np.array_equal(np.asarray(shift_reflect(img, dx, dy)), a[h - 1 - dy : 2 * h - 1 - dy, w - 1 - dx : 2 * w - 1 - dx])


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_timm_recipe_is_timm(mode):
    "Pixel for pixel what timm's operations make of the same seed, though some tables are built sooner"
    from timm.data.auto_augment import rand_augment_transform

    ours = strong_augment('timm').ops
    theirs = rand_augment_transform('rand-m9-mstd0.5', {'img_mean': 128 if mode == 'L' else (128,) * 3, 'interpolation': Image.Resampling.BILINEAR})
    assert theirs.num_layers == 2 and theirs.choice_weights is None, 'two, any of them as often as the others'
    for img in (noise(mode=mode), noise((1, 1), mode), noise((90, 73), mode), Image.new(mode, (8, 6), 7 if mode == 'L' else (7, 9, 100))):
        for i in range(300):
            seed(i)
            expected = img
            for op in random.choices(theirs.ops, k=2):
                expected = op(expected)
            seed(i)
            assert ours(img) == expected


@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_tensors_of_small_and_large_images(mode):
    for size in ((1, 1), (7, 5), (127, 129), (128, 128), (300, 200)):
        img = noise(size, mode)
        t = uint8_tensor(img)
        assert t.is_contiguous() and torch.equal(t, torch.from_numpy(np.array(img).reshape(size[1], size[0], -1)).permute(2, 0, 1))
        t.zero_()
        assert np.asarray(img).any(), 'a copy'


def test_same_pixels():
    a = noise((8, 6))
    for at in ((4, 3), (0, 0), (7, 5)):
        b = a.copy()
        b.putpixel(at, tuple(255 - o for o in a.getpixel(at)))
        assert not same_pixels(a, b)
    assert same_pixels(a, a.copy()) and not same_pixels(a, a.convert('L')) and not same_pixels(a, a.resize((8, 5)))


def test_weak_reaches_its_bounds_and_no_further():
    "12.5 % of 32 pixels are 4: all of the 9 × 9 shifts and both flips occur, nothing else"
    seed(0)
    img = noise((32, 32), 'L')
    expected = {shift_reflect(o, dx, dy).tobytes() for o in (img, img.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for dx in range(-4, 5) for dy in range(-4, 5)}
    weak = weak_augment()
    got = {weak(img).tobytes() for _ in range(3000)}
    assert got == expected and len(expected) == 162


def test_no_flip_anywhere():
    "An image that is dark on the left stays so in its weak views, and in the weak part of its strong views"
    seed(0)
    img = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1)))
    weak = weak_augment(flip=False)
    tfm = FixMatchTransform(weak=weak, strong=strong_augment('google'))
    assert tfm.strong.weak is weak
    for _ in range(100):
        w = tfm(img)[0][0].float()
        assert w[:, :8].mean() < w[:, -8:].mean()
    seen = []
    FixMatchTransform(weak=lambda o: seen.append(1) or o)(img)
    assert len(seen) == 2, 'once for the weak view, once for the strong'


def test_views_are_independent():
    seed(0)
    tfm = FixMatchTransform(strong=lambda o: weak_augment()(o))
    img = noise((32, 32))
    assert sum(torch.equal(*tfm(img)) for _ in range(200)) < 10


def test_normalised_is_uint8_normalised():
    img = noise()
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    seed(3)
    raw = FixMatchTransform()(img)
    seed(3)
    for a, b in zip(raw, FixMatchTransform(mean, std)(img)):
        expected = (a.numpy() / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        assert b.dtype == torch.float32 and b.shape == a.shape
        np.testing.assert_allclose(b.numpy(), expected, atol=1e-5)


def test_one_channel_statistics_make_grey():
    w, s = FixMatchTransform(0.5, 0.25)(noise())
    assert w.shape == s.shape == (1, 20, 24)


def test_cutout_area():
    "Half the sides: between a quarter of that box at a corner and the whole box, grey 128"
    seed(0)
    white = Image.new('L', (32, 32), 255)
    areas = [(np.asarray(Cutout(0.5)(white)) == 128).sum() for _ in range(2000)]
    assert max(areas) == 16 * 16 and min(areas) >= 8 * 8
    assert np.asarray(white).min() == 255, 'the input stays as it is'
    areas = [(np.asarray(Cutout((0, 0.5))(white)) == 128).sum() for _ in range(2000)]
    assert max(areas) <= 16 * 16 and min(areas) == 0


def test_operations_against_torchvision():
    "The fourteen operations are what torchvision calls by these names"
    from torchvision.transforms.v2 import functional as F

    img = noise((32, 24))
    same = {
        'AutoContrast': (None, F.autocontrast(img)),
        'Brightness': (1.5, F.adjust_brightness(img, 1.5)),
        'Color': (0.3, F.adjust_saturation(img, 0.3)),
        'Contrast': (0.7, F.adjust_contrast(img, 0.7)),
        'Equalize': (None, F.equalize(img)),
        'Identity': (None, img),
        'Posterize': (3, F.posterize(img, 3)),
        'Rotate': (20, F.rotate(img, 20, interpolation=F.InterpolationMode.BILINEAR, fill=128)),
        'Sharpness': (1.8, F.adjust_sharpness(img, 1.8)),
        'Solarize': (100, F.solarize(img, 100)),
    }
    for name, (v, expected) in same.items():
        assert ImageChops.difference(_OPS[name](img, v), expected).getbbox() is None, name
    assert set(_OPS) - set(same) == {'ShearX', 'ShearY', 'TranslateX', 'TranslateY'}
    a = np.asarray(img).astype(int)
    assert np.array_equal(np.asarray(_OPS['TranslateX'](img, 0.25))[:, :24], a[:, 8:])
    assert (np.asarray(_OPS['TranslateX'](img, 0.25))[:, 24:] == 128).all()
    assert np.array_equal(np.asarray(_OPS['TranslateY'](img, -0.25))[6:], a[:18])
    assert np.abs(np.asarray(_OPS['ShearX'](img, 0.3))[0] - a[0]).max() <= 40, 'the first row hardly moves'
    assert np.array_equal(np.asarray(_OPS['ShearY'](img.transpose(Image.Transpose.TRANSPOSE), 0.3)), np.asarray(_OPS['ShearX'](img, 0.3)).transpose(1, 0, 2))


@pytest.mark.parametrize('name', RECIPES)
def test_repr_and_pickle(name):
    tfm = FixMatchTransform([0.5] * 3, [0.2] * 3, strong=strong_augment(name))
    assert f"'{name}'" in repr(tfm) and 'flip=True' in repr(tfm)
    again = pickle.loads(pickle.dumps(tfm))
    seed(1)
    a = tfm(noise())
    seed(1)
    for o, p in zip(a, again(noise())):
        assert torch.equal(o, p)
