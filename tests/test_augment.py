"Views of an image, and of a whole batch: each operation against Pillow's, the draws against their tables"

import copy
import pickle
import random

import numpy as np
import pytest
import timm.data.auto_augment as timm_ops
import torch
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from fixmatch_fastai.augment import (
    BATCH_OPS,
    BATCH_STRENGTHS,
    OPS,
    STRENGTHS,
    Cutout,
    FixMatchBatchTransform,
    FixMatchTransform,
    StrongAugment,
    apply_ops,
    draw_boxes,
    draw_ops,
    draw_shifts,
    same_pixels,
    shift_reflect,
    strong_augment,
    uint8_tensor,
    weak_augment,
)

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
    "1,200 strong views of each recipe, of noise, a digit-like figure on black, and a grey image with one odd pixel"
    seed(0)
    figure = Image.new(mode, (16, 16))
    figure.paste(255 if mode == 'L' else (255, 255, 255), (6, 2, 9, 14))
    odd = Image.new(mode, (16, 16), 128 if mode == 'L' else (128,) * 3)
    odd.putpixel((3, 3), 0 if mode == 'L' else (0, 0, 0))
    strong = strong_augment(name, weak_augment())
    for img in (noise(mode=mode), figure, odd):
        for _ in range(400):
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
                assert np.array_equal(
                    np.asarray(shift_reflect(img, dx, dy)), a[h - 1 - dy : 2 * h - 1 - dy, w - 1 - dx : 2 * w - 1 - dx]
                )


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['L', 'RGB'])
def test_timm_recipe_is_timm(mode):
    "Pixel for pixel what timm's operations make of the same seed, though some tables are built sooner"
    ours = strong_augment('timm').ops
    theirs = timm_ops.rand_augment_transform(
        'rand-m9-mstd0.5', {'img_mean': 128 if mode == 'L' else (128,) * 3, 'interpolation': Image.Resampling.BILINEAR}
    )
    assert theirs.num_layers == 2 and theirs.choice_weights is None, 'two, any of them as often as the others'
    for img in (
        noise(mode=mode),
        noise((1, 1), mode),
        noise((90, 73), mode),
        Image.new(mode, (8, 6), 7 if mode == 'L' else (7, 9, 100)),
    ):
        for i in range(120):
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
        assert t.is_contiguous() and torch.equal(
            t, torch.from_numpy(np.array(img).reshape(size[1], size[0], -1)).permute(2, 0, 1)
        )
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
    expected = {
        shift_reflect(o, dx, dy).tobytes()
        for o in (img, img.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        for dx in range(-4, 5)
        for dy in range(-4, 5)
    }
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
        assert ImageChops.difference(OPS[name](img, v), expected).getbbox() is None, name
    assert set(OPS) - set(same) == {'ShearX', 'ShearY', 'TranslateX', 'TranslateY'}
    a = np.asarray(img).astype(int)
    assert np.array_equal(np.asarray(OPS['TranslateX'](img, 0.25))[:, :24], a[:, 8:])
    assert (np.asarray(OPS['TranslateX'](img, 0.25))[:, 24:] == 128).all()
    assert np.array_equal(np.asarray(OPS['TranslateY'](img, -0.25))[6:], a[:18])
    assert np.abs(np.asarray(OPS['ShearX'](img, 0.3))[0] - a[0]).max() <= 40, 'the first row hardly moves'
    assert np.array_equal(
        np.asarray(OPS['ShearY'](img.transpose(Image.Transpose.TRANSPOSE), 0.3)),
        np.asarray(OPS['ShearX'](img, 0.3)).transpose(1, 0, 2),
    )


@pytest.mark.parametrize('name', RECIPES)
def test_transform_repr_and_pickle(name):
    tfm = FixMatchTransform([0.5] * 3, [0.2] * 3, strong=strong_augment(name))
    assert f"'{name}'" in repr(tfm) and 'flip=True' in repr(tfm)
    again = pickle.loads(pickle.dumps(tfm))
    seed(1)
    a = tfm(noise())
    seed(1)
    for o, p in zip(a, again(noise())):
        assert torch.equal(o, p)


# --- views of a batch ------------------------------------------------------------------------------------------------


PIL_OPS = {
    **OPS,  # rotate, shear and translate call Pillow; the others are Pillow's and timm's own here, not our faster ones
    'AutoContrast': lambda img, v: ImageOps.autocontrast(img),
    'Brightness': lambda img, v: ImageEnhance.Brightness(img).enhance(v),
    'Color': lambda img, v: ImageEnhance.Color(img).enhance(v),
    'Contrast': lambda img, v: ImageEnhance.Contrast(img).enhance(v),
    'Equalize': lambda img, v: ImageOps.equalize(img),
    'Posterize': lambda img, v: ImageOps.posterize(img, int(v)),
    'Sharpness': lambda img, v: ImageEnhance.Sharpness(img).enhance(v),
    'Solarize': lambda img, v: ImageOps.solarize(img, v),
    'Invert': lambda img, v: ImageOps.invert(img),
    'SolarizeAdd': timm_ops.solarize_add,
}
FACTORS = np.linspace(0.05, 1.9, 40)
SOME_STRENGTHS = {
    **dict.fromkeys(('Brightness', 'Color', 'Contrast', 'Sharpness'), FACTORS),
    'Posterize': np.arange(1, 9),
    'Rotate': np.linspace(-30, 30, 40),
    **dict.fromkeys(('ShearX', 'ShearY'), np.linspace(-0.3, 0.3, 40)),
    'Solarize': np.linspace(0, 256, 40),
    'SolarizeAdd': np.arange(0, 111, 3),
    **dict.fromkeys(('TranslateX', 'TranslateY'), np.r_[np.linspace(-0.45, 0.45, 40), np.arange(-9, 10) / 32]),
}
WARPED = ['Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY']
SIZES = [(1, 1), (2, 2), (3, 5), (24, 20), (33, 47), (32, 32)]  # height, width


def images(size, channels, seed=0):
    "Noise, a smooth image, a dark one of few values, a constant one"
    rng = np.random.default_rng(seed)
    h, w = size
    y, x = np.mgrid[:h, :w]
    smooth = np.stack([127 + 60 * np.sin(x / 9 + c) + 60 * np.cos(y / 7 - c) for c in range(channels)])
    noise = rng.integers(0, 256, (channels, h, w))
    dark = rng.integers(20, 26, (channels, h, w))
    return torch.from_numpy(np.stack([noise, smooth, dark, np.full_like(dark, 77)]).astype(np.uint8))


def to_pil(x):
    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy() if len(x) == 1 else x.permute(1, 2, 0).numpy())


def from_pil(img):
    a = torch.from_numpy(np.array(img))
    return a[None] if a.ndim == 2 else a.permute(2, 0, 1)


def apply(x, name, vs):
    "Every image of `x` with every strength, in one batch: (strengths, images, channels, H, W)"
    vs = np.asarray(vs, dtype=float)
    out = apply_ops(
        x.repeat(len(vs), 1, 1, 1), np.full((1, len(vs) * len(x)), BATCH_OPS.index(name)), vs.repeat(len(x))[None]
    )
    return out.view(len(vs), *x.shape)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', [o for o in BATCH_OPS if o not in WARPED])
def test_colour_operations_are_pillows(name, channels):
    "Not one level off, whatever the strength"
    for size in SIZES:
        x, vs = images(size, channels), SOME_STRENGTHS.get(name, [0])
        for v, got in zip(vs, apply(x, name, vs)):
            v = v.item() if hasattr(v, 'item') else v
            for a, b in zip(x, got):
                assert torch.equal(b, from_pil(PIL_OPS[name](to_pil(a), v))), (size, v)


@pytest.mark.slow
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('name', WARPED)
def test_geometry_is_pillows_bilinear(name, channels):
    "Up to one level inside, on noise too; grey 128 in the same pixels but for a few at the very border"
    for size in SIZES:
        x, vs = images(size, channels), SOME_STRENGTHS[name]
        covered = torch.full_like(x[:1], 255)
        diffs = []
        for v, got, cover in zip(vs, apply(x, name, vs), apply(covered, name, vs)):
            filled = (cover[0] == 128) | (from_pil(PIL_OPS[name](to_pil(covered[0]), v.item())) == 128)
            expected = torch.stack([from_pil(PIL_OPS[name](to_pil(o), v.item())) for o in x])
            diffs.append(((got.int() - expected.int()).abs() * ~filled).flatten())
        diffs = torch.cat(diffs)
        assert diffs.max() <= 1 and diffs.float().mean() < 0.02, (size, diffs.max(), diffs.float().mean())
        disagree = np.mean(
            [
                (from_pil(PIL_OPS[name](to_pil(covered[0]), v.item())) != c[0]).float().mean()
                for v, c in zip(vs, apply(covered, name, vs))
            ]
        )
        assert disagree < 0.005 or min(size) < 9, (size, disagree)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
    'name', ['AutoContrast', 'Brightness', 'Color', 'Contrast', 'Equalize', 'Posterize', 'Sharpness', 'Solarize']
)
def test_operations_of_workers_are_pillows(name, channels):
    for size in SIZES:
        for x in images(size, channels):
            for v in SOME_STRENGTHS.get(name, [0]):
                assert OPS[name](to_pil(x), v) == PIL_OPS[name](to_pil(x), v), (size, v)


def test_smooth_is_pillows():
    x = images((20, 24), 3)
    for a, b in zip(x, apply(x, 'Sharpness', [0])[0]):
        assert torch.equal(b, from_pil(to_pil(a).filter(ImageFilter.SMOOTH)))


def test_other_channel_counts():
    "Two or five: each operation treats them one by one, but for `Color` and `Contrast`, which look at their mean"
    for channels in (2, 5):
        x = images((9, 12), channels)
        for name in BATCH_OPS:
            out = apply(x, name, [0.3])[0]
            if name not in ('Color', 'Contrast'):
                assert torch.equal(out, torch.cat([apply(o, name, [0.3])[0] for o in x.split(1, 1)], 1)), name
        mean = x.float().mean(1, keepdim=True).round()
        assert torch.equal(apply(x, 'Color', [0])[0].float(), mean.expand(x.shape))
        assert torch.equal(
            apply(x, 'Contrast', [0])[0][:, :1].float().amax((1, 2, 3)), (mean.mean((1, 2, 3)) + 0.5).floor()
        )


def test_mixed_layers_equal_one_image_at_a_time():
    "Sorted, grouped, sorted again: every image keeps its own operations and its place"
    x = torch.randint(0, 256, (60, 3, 10, 13), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in RECIPES:
        torch.manual_seed(1)
        kinds, v = draw_ops(name, 60)
        together = apply_ops(x, kinds, v)
        apart = torch.cat([apply_ops(x[i : i + 1], kinds[:, i : i + 1], v[:, i : i + 1]) for i in range(60)])
        assert (together.int() - apart.int()).abs().max() <= 1 and (together != apart).float().mean() < 1e-3


def test_batch_weak_equals_shift_reflect():
    for h, w in ((1, 1), (2, 3), (9, 14), (32, 32)):
        x = torch.randint(0, 256, (40, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        weak = weak_augment(shift=0.5)
        torch.manual_seed(3)
        got, _ = FixMatchBatchTransform(weak)(x)
        torch.manual_seed(3)
        shift, _, step = draw_shifts(weak, 40, h, w)
        for a, b, (dy, dx), flip in zip(x, got, shift.astype(int), step[:, 1] == 1):
            img = to_pil(a)
            img = shift_reflect(img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else img, int(dx), int(dy))
            assert torch.equal(b, from_pil(img))


def test_batch_shifts():
    "Half are flipped; every shift of -4 to 4 by -4 to 4 is as likely as any other"
    torch.manual_seed(0)
    shift, _, step = draw_shifts(weak_augment(), 81000, 32, 32)
    assert abs((step[:, 1] == 1).mean() - 0.5) < 0.01
    _, counts = np.unique(shift @ [9, 1], return_counts=True)
    assert len(counts) == 81 and counts.min() > 850 and counts.max() < 1150 and np.abs(shift).max() == 4
    assert not (draw_shifts(weak_augment(flip=False), 1000, 32, 32)[2] == 1).any()
    assert not draw_shifts(weak_augment(shift=0), 1000, 32, 32)[0].any()


def test_batch_boxes():
    "The rectangles of `Cutout`: the centre anywhere in the image, the side rounded as there"
    torch.manual_seed(0)
    for size, h, w in ((0.5, 32, 32), (0.5, 9, 15), ((0, 0.5), 20, 31)):
        cutout = Cutout(size)
        middle, half = draw_boxes(cutout, 20000, h, w)
        for i, n in enumerate((h, w)):
            side = (2 * half[:, i]).astype(int)
            assert side.min() == round(cutout.low * n) and side.max() == round(
                cutout.high * n - 0.01 * (cutout.low < cutout.high)
            )
            centre = middle[:, i] - (side - 1) / 2 + side // 2
            assert set(centre) == set(range(n))
            assert np.bincount(centre.astype(int)).min() > 20000 / n * 0.8
    x = torch.full((2000, 1, 32, 32), 255, dtype=torch.uint8)
    strong = strong_augment('timm')
    only_cutout = FixMatchBatchTransform(strong=StrongAugment('timm', strong.ops, strong.cutout, weak_augment()))
    hidden = (only_cutout(x)[1] == 128).sum((1, 2, 3))
    assert hidden.min() >= 8 * 8


@pytest.mark.parametrize('name', RECIPES)
def test_operations_are_equally_likely(name):
    torch.manual_seed(0)
    kinds, v = draw_ops(name, 60000)
    allowed = [o for o in BATCH_OPS if o not in (['Identity'] if name == 'timm' else ['Invert', 'SolarizeAdd'])]
    p = (1 if name == 'paper' else 0.5) / len(allowed)
    for layer in kinds:
        share = np.bincount(layer, minlength=len(BATCH_OPS)) / layer.size
        for o, s in zip(BATCH_OPS, share):
            expected = (0 if name == 'paper' else 0.5) + p * (o in allowed) if o == 'Identity' else p * (o in allowed)
            assert abs(s - expected) < 0.006, (o, s, expected)
    both = np.histogram2d(kinds[0], kinds[1], bins=len(BATCH_OPS))[0] / kinds.shape[1]
    assert np.abs(both - both.sum(1, keepdims=True) * both.sum(0, keepdims=True)).max() < 0.004, (
        'the layers are independent'
    )
    a, b = kinds[0][:-1], kinds[0][1:]
    assert abs((a == b).mean() - ((np.bincount(a) / a.size) ** 2).sum()) < 0.01, 'neighbours are independent'


def test_strengths_follow_timm():
    "The same level through timm's own functions"
    torch.manual_seed(0)
    n = 20000
    kinds, v = draw_ops('timm', n)
    torch.manual_seed(0)
    torch.rand(4, 2, n, dtype=torch.float64)
    level = 9 + 0.5 * torch.randn(2, n, dtype=torch.float64).numpy()
    level = level.clip(0, 10)
    assert abs(level.mean() - 9) < 0.02 and level.max() == 10
    names = dict(TranslateX='TranslateXRel', TranslateY='TranslateYRel')
    for o in BATCH_STRENGTHS['timm']:
        mine = kinds == BATCH_OPS.index(o)
        level_fn = timm_ops.LEVEL_TO_ARG[names.get(o, o)]
        expected = np.array([level_fn(m, {})[0] for m in level[mine]])
        signed = o in WARPED
        assert np.allclose(np.abs(v[mine]) if signed else v[mine], np.abs(expected), atol=1e-9), o
        assert abs((v[mine] < 0).mean() - 0.5 * signed) < 0.06, o


def test_strengths_follow_the_recipes():
    "The range and the values that `strong_augment` draws from, for the other two"
    torch.manual_seed(0)
    for name, recipe in STRENGTHS.items():
        kinds, v = draw_ops(name, 60000)
        for o, draw in recipe.items():
            got, expected = v[kinds == BATCH_OPS.index(o)], np.array([draw() for _ in range(5000)])
            if name == 'google' or o == 'Posterize':
                assert set(got.round(9)) == set(expected.round(9)), o
            spread = max(np.ptp(expected), 1e-9)
            assert (
                abs(got.mean() - expected.mean()) < 0.03 * spread and abs(got.std() - expected.std()) < 0.03 * spread
            ), o
            assert (
                abs(got.min() - expected.min()) < 0.01 * spread and abs(got.max() - expected.max()) < 0.01 * spread
            ), o


@pytest.mark.parametrize('name', RECIPES)
def test_batch_views(name):
    "Shapes, types, repetition, no image like its neighbour, the input as it was"
    tfm = FixMatchBatchTransform(strong=strong_augment(name))
    for shape in ((448, 3, 32, 32), (0, 3, 8, 8), (1, 1, 1, 1), (5, 2, 7, 9), (3, 1, 2, 2), (8, 4, 48, 64)):
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
        before = x.clone()
        torch.manual_seed(0)
        weak, strong = tfm(x)
        for o in (weak, strong):
            assert o.shape == x.shape and o.dtype == torch.uint8 and o.is_contiguous() and o.device == x.device
        assert torch.equal(x, before)
        torch.manual_seed(0)
        assert all(torch.equal(a, b) for a, b in zip(tfm(x), (weak, strong)))
        assert weak.data_ptr() != x.data_ptr() or not x.numel()
    same = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(300, -1, -1, -1)
    weak, strong = tfm(same)
    assert len(weak.unique(dim=0)) > 100, '162 weak views exist'
    assert len(strong.unique(dim=0)) == 300
    assert not (strong == same).flatten(1).all(1).any()


def test_strong_starts_from_a_weak_view_of_its_own():
    "Without operations and Cutout the strong view is a weak view, another one"
    x = torch.arange(32, dtype=torch.uint8).mul(8).expand(400, 1, 32, 32).contiguous()
    tfm = FixMatchBatchTransform(weak_augment(flip=False), StrongAugment('google', None, Cutout(0)))
    torch.manual_seed(0)
    weak, strong = tfm(x)
    torch.manual_seed(0)
    shifts = [draw_shifts(tfm.weak, 400, 32, 32)[0] for _ in range(2)]
    draw_boxes(tfm.strong.cutout, 400, 32, 32)
    kinds, _ = draw_ops('google', 400)
    still = (kinds == 0).all(0)
    assert still.sum() > 50
    columns = (np.arange(32) - shifts[1][still][:, 1:]).astype(int)
    columns = np.abs(31 - np.abs(31 - np.abs(columns)))
    assert np.array_equal(strong[still][:, 0, 0].numpy(), columns * 8)
    assert np.abs(np.corrcoef(shifts[0][:, 1], shifts[1][:, 1])[0, 1]) < 0.15


@pytest.mark.slow
def test_same_distribution_as_one_image_at_a_time():
    "Mean distance from the input, of many views of one image, within the noise of what `FixMatchTransform` does"
    random.seed(0)
    torch.manual_seed(0)
    x = images((32, 32), 3)[1]
    img = to_pil(x)
    for name in RECIPES:
        one, many = (cls(strong=strong_augment(name)) for cls in (FixMatchTransform, FixMatchBatchTransform))
        a = [torch.stack(o).float() for o in zip(*(one(img) for _ in range(1500)))]
        b = [o.float() for o in many(x.expand(3000, -1, -1, -1))]
        for o, p in zip(a, b):
            d, e = ((v - x).abs().mean((1, 2, 3)) for v in (o, p))
            error = (d.var() / len(d) + e.var() / len(e)).sqrt()
            assert abs(d.mean() - e.mean()) < 4 * error, (name, d.mean(), e.mean(), error)


def test_batch_transform_refuses():
    own = weak_augment()
    for kwargs in (
        dict(weak=lambda o: o),
        dict(strong=lambda o: o),
        dict(strong=strong_augment('timm', weak=lambda o: o)),
        dict(strong=own),
        dict(weak=strong_augment()),
        dict(strong=StrongAugment('mine', None, Cutout(), own)),
    ):
        with pytest.raises(TypeError, match='use FixMatchTransform for PIL functions'):
            FixMatchBatchTransform(**kwargs)
    tfm = FixMatchBatchTransform()
    for x in (
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        Image.new('RGB', (8, 8)),
        np.zeros((2, 3, 8, 8), np.uint8),
    ):
        with pytest.raises(TypeError, match='takes a uint8 batch'):
            tfm(x)


def test_batch_repr_pickle_copy():
    for name in RECIPES:
        tfm = FixMatchBatchTransform(weak_augment(flip=False), strong_augment(name))
        assert repr(tfm).startswith('FixMatchBatchTransform(weak=weak_augment(flip=False') and f"'{name}'" in repr(tfm)
        x = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
        for again in (pickle.loads(pickle.dumps(tfm)), copy.deepcopy(tfm)):
            assert repr(again) == repr(tfm)
            torch.manual_seed(0)
            a = tfm(x)
            torch.manual_seed(0)
            assert all(torch.equal(o, p) for o, p in zip(a, again(x)))


def test_nothing_is_asked_of_the_device():
    "No `item`, no `nonzero`, and few launches, whatever was drawn"
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    tfm, x = FixMatchBatchTransform(), torch.zeros(448, 3, 8, 8, dtype=torch.uint8)
    with Watch():
        tfm(x)
    names = {f.overloadpacket.__name__ for f in seen}
    assert not names & {'_local_scalar_dense', 'nonzero', 'masked_select', 'bincount', 'unique', 'equal', 'is_nonzero'}
    assert not any(f.overloadpacket.__name__ == 'index' for f in seen), 'a mask as an index would count on the device'
    launches = [
        f
        for f in seen
        if not f.is_view
        and f.overloadpacket.__name__ not in ('empty', 'rand', 'randn', '_unsafe_view', 'lift_fresh', 'detach')
    ]
    assert len(launches) < 170, len(launches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_cuda_equals_cpu():
    x = torch.randint(0, 256, (448, 3, 32, 32), dtype=torch.uint8)
    for name in RECIPES:
        tfm = FixMatchBatchTransform(strong=strong_augment(name))
        torch.manual_seed(0)
        here = tfm(x)
        torch.manual_seed(0)
        torch.cuda.set_sync_debug_mode('error')
        try:
            there = tfm(x.cuda())
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert torch.equal(here[0], there[0].cpu())
        d = (here[1].int() - there[1].cpu().int()).abs()
        assert (d > 1).float().mean() < 1e-4
